//! Clusters of near duplicates and their survivors, in a small constant of memory a document.
//!
//! Ordinals are sparse (shard and record), so documents get dense numbers: every shard begins where
//! the shard before it ends, and a shard has as many numbers as its last duplicate needs. Translation is
//! one addition, and a shard without duplicates costs nothing. Memory is one number a document for
//! the sets (4 bytes up to 2³² documents, 8 beyond); choosing the longest takes another number and 4
//! bytes. The result is a function of the set of edges, not of their order.

use pipeline::document::ordinal;

use crate::union_find::{Number, UnionFind};

/// Dense numbers for the documents that have edges.
#[derive(Debug, Default)]
pub(crate) struct Numbering {
    /// Numbers of each shard.
    records: Vec<u64>,
}

impl Numbering {
    /// Make room for a document.
    pub(crate) fn cover(&mut self, ordinal: u64) {
        let (shard, record) = split(ordinal);
        if shard >= self.records.len() {
            self.records.resize(shard + 1, 0);
        }
        let records = &mut self.records[shard];
        *records = (*records).max(record + 1);
    }

    /// Numbers in all.
    pub(crate) fn len(&self) -> u64 {
        self.records.iter().sum()
    }
}

/// Shard and record of an ordinal.
fn split(ordinal: u64) -> (usize, u64) {
    ((ordinal >> 32) as usize, ordinal & u64::from(u32::MAX))
}

/// A document that goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Removal {
    pub(crate) ordinal: u64,
    /// Ordinal of the member of the cluster that stays.
    pub(crate) survivor: u64,
    /// Smallest ordinal of the cluster: its name.
    pub(crate) cluster: u64,
}

/// Sets of documents. Every document given to it was [covered](Numbering::cover) before.
pub(crate) struct Clusters<N> {
    /// First number of each shard, and the end.
    starts: Vec<u64>,
    sets: UnionFind<N>,
    /// Survivor of the set of which the index is the smallest member; empty: that member.
    survivors: Vec<N>,
}

impl<N: Number> Clusters<N> {
    pub(crate) fn new(numbering: Numbering) -> Self {
        let mut starts = vec![0];
        let mut end = 0;
        starts.extend(numbering.records.iter().map(|records| {
            end += records;
            end
        }));
        Self { starts, sets: UnionFind::new(end as usize), survivors: Vec::new() }
    }

    /// Two documents are near duplicates.
    pub(crate) fn unite(&mut self, a: u64, b: u64) {
        if let (Some(a), Some(b)) = (self.number(a), self.number(b)) {
            self.sets.union(a, b);
        }
    }

    /// Let the longest member of every set survive, the earliest among equals; call it after the last
    /// [`Self::unite`] and add the length of every document. Until then the earliest survives.
    pub(crate) fn by_length(&mut self) -> ByLength<'_, N> {
        self.survivors = (0..self.sets.len()).map(N::from_usize).collect();
        ByLength { longest: vec![0; self.sets.len()], clusters: self }
    }

    /// The members of every set but its survivor, in order of ordinals.
    pub(crate) fn removals(&mut self) -> impl Iterator<Item = Removal> {
        let Self { starts, sets, survivors } = self;
        let mut shard = 0;
        (0..sets.len()).filter_map(move |number| {
            while starts[shard + 1] <= number as u64 {
                shard += 1;
            }
            let root = sets.find(number);
            let survivor = if survivors.is_empty() { root } else { survivors[root].to_usize() };
            (survivor != number).then(|| Removal {
                ordinal: ordinal(shard as u32, (number as u64 - starts[shard]) as u32),
                survivor: ordinal_of(starts, survivor),
                cluster: ordinal_of(starts, root),
            })
        })
    }

    /// Dense number of a document, if it was covered.
    fn number(&self, ordinal: u64) -> Option<usize> {
        let (shard, record) = split(ordinal);
        let number = self.starts.get(shard)? + record;
        (number < *self.starts.get(shard + 1)?).then_some(number as usize)
    }
}

fn ordinal_of(starts: &[u64], number: usize) -> u64 {
    let number = number as u64;
    // The last shard that begins at or before it; empty shards before it begin at the same number.
    let shard = starts.partition_point(|&start| start <= number) - 1;
    ordinal(shard as u32, (number - starts[shard]) as u32)
}

/// Finds the longest member of every set.
pub(crate) struct ByLength<'c, N> {
    clusters: &'c mut Clusters<N>,
    /// Bytes of the survivor so far, cut at 4 GiB.
    longest: Vec<u32>,
}

impl<N: Number> ByLength<'_, N> {
    /// The text of the document has so many bytes. Documents without edges are passed over.
    pub(crate) fn add(&mut self, ordinal: u64, bytes: u64) {
        let Some(number) = self.clusters.number(ordinal) else { return };
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let root = self.clusters.sets.find(number);
        let (longest, survivor) = (&mut self.longest[root], &mut self.clusters.survivors[root]);
        let challenger = N::from_usize(number);
        if bytes > *longest || bytes == *longest && challenger < *survivor {
            (*longest, *survivor) = (bytes, challenger);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Documents in shards 0, 1, 3 and 7, with gaps between their records.
    fn ordinals() -> Vec<u64> {
        let mut all: Vec<u64> = [0u32, 1, 3, 7].iter().flat_map(|&s| (0..10).map(move |r| ordinal(s, r * r))).collect();
        all.sort_unstable();
        all
    }

    fn removals<N: Number>(edges: &[(u64, u64)], lengths: Option<&[(u64, u64)]>) -> Vec<Removal> {
        let mut numbering = Numbering::default();
        edges.iter().for_each(|&(a, b)| {
            numbering.cover(a);
            numbering.cover(b);
        });
        let mut clusters = Clusters::<N>::new(numbering);
        edges.iter().for_each(|&(a, b)| clusters.unite(a, b));
        if let Some(lengths) = lengths {
            let mut by_length = clusters.by_length();
            lengths.iter().for_each(|&(ordinal, bytes)| by_length.add(ordinal, bytes));
        }
        clusters.removals().collect()
    }

    /// The definition: closure of the edges by sweeps, survivor by comparison of all members.
    fn naive(edges: &[(u64, u64)], lengths: Option<&[(u64, u64)]>) -> Vec<Removal> {
        let mut cluster: BTreeMap<u64, u64> = edges.iter().flat_map(|&(a, b)| [(a, a), (b, b)]).collect();
        for _ in 0..cluster.len() {
            for &(a, b) in edges {
                let least = cluster[&a].min(cluster[&b]);
                cluster.insert(a, least);
                cluster.insert(b, least);
            }
        }
        let length = |o: u64| lengths.map_or(0, |l| l.iter().find(|(other, _)| *other == o).unwrap().1);
        let survivor = |c: u64| {
            let members = cluster.iter().filter(|(_, other)| **other == c).map(|(o, _)| *o);
            members.min_by_key(|&o| (std::cmp::Reverse(length(o)), o)).unwrap()
        };
        cluster
            .iter()
            .map(|(&ordinal, &cluster)| Removal { ordinal, survivor: survivor(cluster), cluster })
            .filter(|r| r.ordinal != r.survivor)
            .collect()
    }

    proptest! {
        #[test]
        fn removals_are_the_definition_in_any_order(
            (picked, shuffled) in prop::collection::vec((0usize..40, 0usize..40), 0..40)
                .prop_flat_map(|edges| (Just(edges.clone()), Just(edges).prop_shuffle())),
            lengths in prop::collection::vec(0u64..4, 40),
        ) {
            let all = ordinals();
            let edges = |picked: &[(usize, usize)]| -> Vec<(u64, u64)> {
                picked.iter().filter(|(a, b)| a != b).map(|&(a, b)| (all[a], all[b])).collect()
            };
            let lengths: Vec<(u64, u64)> = all.iter().copied().zip(lengths).collect();
            let (edges, shuffled) = (edges(&picked), edges(&shuffled));
            prop_assert_eq!(removals::<u32>(&edges, None), naive(&edges, None));
            prop_assert_eq!(removals::<u64>(&shuffled, None), naive(&edges, None));
            prop_assert_eq!(removals::<u32>(&shuffled, Some(&lengths)), naive(&edges, Some(&lengths)));
        }
    }

    #[test]
    fn no_edges_no_removals() {
        assert_eq!(removals::<u32>(&[], None), []);
        assert_eq!(removals::<u32>(&[], Some(&[(0, 5), (ordinal(9, 3), 7)])), []);
    }
}
