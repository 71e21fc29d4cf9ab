//! Disjoint sets whose representative is the smallest member, whatever the order of the unions.

/// A number of a document: 32 bits while there are few enough, 64 beyond.
pub(crate) trait Number: Copy + Ord {
    fn from_usize(n: usize) -> Self;
    fn to_usize(self) -> usize;
}

impl Number for u32 {
    fn from_usize(n: usize) -> Self {
        n as Self
    }
    fn to_usize(self) -> usize {
        self as usize
    }
}

impl Number for u64 {
    fn from_usize(n: usize) -> Self {
        n as Self
    }
    fn to_usize(self) -> usize {
        self as usize
    }
}

/// Union-find over `0..len` with linking by minimum: a root is linked to the smaller root, so a
/// parent is never larger than its child and the root of a set is its minimum. Path halving keeps
/// paths short. One [`Number`] of memory for each element, nothing else.
pub(crate) struct UnionFind<N> {
    parents: Vec<N>,
}

impl<N: Number> UnionFind<N> {
    /// `len` sets of one element. `len - 1` must fit in `N`.
    pub(crate) fn new(len: usize) -> Self {
        Self { parents: (0..len).map(N::from_usize).collect() }
    }

    pub(crate) fn len(&self) -> usize {
        self.parents.len()
    }

    /// Smallest member of the set of `element`.
    pub(crate) fn find(&mut self, element: usize) -> usize {
        let mut at = element;
        loop {
            let parent = self.parents[at].to_usize();
            if parent == at {
                return at;
            }
            let grandparent = self.parents[parent];
            self.parents[at] = grandparent;
            at = grandparent.to_usize();
        }
    }

    /// Make one set of the sets of `a` and `b`.
    pub(crate) fn union(&mut self, a: usize, b: usize) {
        let (a, b) = (self.find(a), self.find(b));
        let (small, large) = if a < b { (a, b) } else { (b, a) };
        self.parents[large] = N::from_usize(small);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEN: usize = 60;

    /// Smallest element reachable from each, by repeated sweeps over the edges.
    fn closure(edges: &[(usize, usize)]) -> Vec<usize> {
        let mut least: Vec<usize> = (0..LEN).collect();
        loop {
            let before = least.clone();
            for &(a, b) in edges {
                let m = least[a].min(least[b]);
                (least[a], least[b]) = (m, m);
            }
            if before == least {
                return least;
            }
        }
    }

    fn representatives<N: Number>(edges: &[(usize, usize)]) -> Vec<usize> {
        let mut sets = UnionFind::<N>::new(LEN);
        edges.iter().for_each(|&(a, b)| sets.union(a, b));
        (0..LEN).map(|i| sets.find(i)).collect()
    }

    proptest! {
        #[test]
        fn is_the_closure_under_any_order(
            (edges, shuffled) in prop::collection::vec((0..LEN, 0..LEN), 0..80)
                .prop_flat_map(|edges| (Just(edges.clone()), Just(edges).prop_shuffle())),
        ) {
            let expected = closure(&edges);
            prop_assert_eq!(&representatives::<u32>(&edges), &expected);
            prop_assert_eq!(&representatives::<u64>(&shuffled), &expected);
            let turned: Vec<_> = shuffled.iter().map(|&(a, b)| (b, a)).collect();
            prop_assert_eq!(&representatives::<u32>(&turned), &expected);
        }
    }

    #[test]
    fn a_chain_of_a_million_is_one_set_in_either_direction() {
        let n = 1_000_000;
        for backwards in [false, true] {
            let mut sets = UnionFind::<u32>::new(n);
            for i in 1..n {
                let i = if backwards { n - i } else { i };
                sets.union(i - 1, i);
            }
            assert!((0..n).all(|i| sets.find(i) == 0));
        }
    }
}
