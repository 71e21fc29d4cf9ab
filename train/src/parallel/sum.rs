//! Sums whose result does not depend on how their terms are spread over ranks.

use rayon::prelude::*;

/// Values that one task adds.
const TASK: usize = 1 << 14;

/// Adds vectors of one length pairwise, as a balanced tree over them in their order.
///
/// The first 2ⁿ terms that are as many as fit are one half, the others the other, and so on. So the sum over all micro
/// batches of a step has the same bits as the sum over ranks of the sums over their micro batches, where each rank
/// has the same power of two of them, one after the other.
#[derive(Debug, Default)]
pub struct Tree {
    /// Finished halves: the logarithm of the number of terms, falling, and their sum.
    halves: Vec<(u32, Vec<f32>)>,
}

impl Tree {
    /// Adds the next term.
    pub fn push(&mut self, mut term: Vec<f32>) {
        let mut height = 0;
        while self.halves.last().is_some_and(|(of, _)| *of == height) {
            let Some((_, mut left)) = self.halves.pop() else { break };
            add(&mut left, &term);
            (term, height) = (left, height + 1);
        }
        self.halves.push((height, term));
    }

    /// Bytes of the values that it holds.
    pub fn bytes(&self) -> usize {
        self.halves.iter().map(|(_, half)| 4 * half.capacity()).sum()
    }

    /// The sum; nothing without a term.
    pub fn finish(self) -> Option<Vec<f32>> {
        let mut halves = self.halves.into_iter().rev().map(|(_, half)| half);
        let last = halves.next()?;
        Some(halves.fold(last, |right, mut left| {
            add(&mut left, &right);
            left
        }))
    }
}

fn add(left: &mut [f32], right: &[f32]) {
    left.par_chunks_mut(TASK).zip(right.par_chunks(TASK)).for_each(|(left, right)| {
        left.iter_mut().zip(right).for_each(|(left, right)| *left += right);
    });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sum(terms: &[Vec<f32>]) -> Vec<f32> {
        let mut tree = Tree::default();
        terms.iter().for_each(|term| tree.push(term.clone()));
        tree.finish().unwrap_or_default()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn three_and_four_terms_have_the_tree_that_is_written_down() {
        let [a, b, c, d] = [1e8f32, 1.0, -1e8, 3.0];
        assert_eq!(sum(&[vec![a], vec![b], vec![c]]), [(a + b) + c]);
        assert_eq!(sum(&[vec![a], vec![b], vec![c], vec![d]]), [(a + b) + (c + d)]);
        assert!(Tree::default().finish().is_none());
    }

    proptest! {
        #[test]
        fn ranks_with_a_power_of_two_of_terms_each_give_the_bits_of_one(
            world in 1usize..9,
            height in 0u32..4,
            seed in any::<u64>(),
        ) {
            let mut rng = crate::rng::Rng::new(seed, 0);
            let each = 1usize << height;
            let terms: Vec<Vec<f32>> = (0..world * each)
                .map(|_| (0..5).map(|_| (rng.normal() * 10f64.powf(6.0 * rng.uniform())) as f32).collect())
                .collect();
            let parts: Vec<Vec<f32>> = terms.chunks(each).map(sum).collect();
            prop_assert_eq!(bits(&sum(&terms)), bits(&sum(&parts)));
        }
    }
}
