//! Which source a sequence is of.
//!
//! Every source has a rate, and gives, of any number of blocks of sequences, its exact share to within
//! one sequence: `floor(b · rate)` in the first `b` blocks. So the place of any sequence is found without
//! those before it. Within a block the sources are shuffled.

use super::order::{MIXTURE, permutation};

/// Sequences in a block, about: the sum of the sources' roundings is what it may be short of.
const BLOCK: u64 = 512;

/// Assigns sequences to sources by their parts.
pub struct Mixture {
    parts: Vec<u64>,
    total: u64,
    seed: u64,
    block: Option<Block>,
}

/// The sources of the sequences of one block.
struct Block {
    number: u64,
    /// Of the first sequence.
    start: u64,
    /// For every sequence its source and its number in it.
    sequences: Vec<(u32, u64)>,
}

impl Mixture {
    /// Sources with these parts of the whole; at least one is above 0, and the sum is below 2^63.
    pub fn new(parts: Vec<u64>, seed: u64) -> Self {
        let total = parts.iter().sum();
        Self { parts, total, seed, block: None }
    }

    /// Sequences of a source in the first `blocks` blocks.
    fn sequences(&self, source: usize, blocks: u64) -> u64 {
        // A block has few enough sequences that this fits: 2^40 blocks of 2^12 times 2^63.
        (u128::from(blocks) * u128::from(BLOCK) * u128::from(self.parts[source]) / u128::from(self.total)) as u64
    }

    fn start(&self, block: u64) -> u64 {
        (0..self.parts.len()).map(|source| self.sequences(source, block)).sum()
    }

    /// The source of a sequence, and its number among the sequences of that source.
    pub fn locate(&mut self, sequence: u64) -> (usize, u64) {
        if let [_] = *self.parts {
            return (0, sequence);
        }
        let block = match self.block.take() {
            Some(block) if (block.start..block.start + block.sequences.len() as u64).contains(&sequence) => block,
            _ => self.find(sequence),
        };
        let (source, number) = block.sequences[(sequence - block.start) as usize];
        self.block = Some(block);
        (source as usize, number)
    }

    /// How many of the first `sequences` sequences are of each source.
    pub fn counts(&mut self, sequences: u64) -> Vec<u64> {
        if let [_] = *self.parts {
            return vec![sequences];
        }
        let block = self.find(sequences);
        let mut counts: Vec<u64> = (0..self.parts.len()).map(|s| self.sequences(s, block.number)).collect();
        for (source, _) in &block.sequences[..(sequences - block.start) as usize] {
            counts[*source as usize] += 1;
        }
        counts
    }

    fn find(&self, sequence: u64) -> Block {
        // Block b begins at most one sequence a source before b · BLOCK.
        let mut number = sequence / BLOCK;
        while self.start(number + 1) <= sequence {
            number += 1;
        }
        let mut of = Vec::new();
        for source in 0..self.parts.len() {
            let from = self.sequences(source, number);
            of.extend((from..self.sequences(source, number + 1)).map(|_| source as u32));
        }
        let mut next: Vec<u64> = (0..self.parts.len()).map(|source| self.sequences(source, number)).collect();
        let order = permutation(&[self.seed, MIXTURE, number], of.len());
        let sequences = order
            .into_iter()
            .map(|place| {
                let source = of[place as usize];
                let number = next[source as usize];
                next[source as usize] += 1;
                (source, number)
            })
            .collect();
        Block { number, start: self.start(number), sequences }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_sequence_of_every_source_comes_once_and_in_order(
            parts in prop::collection::vec(0u64..1 << 50, 1..6).prop_filter("nothing", |p| p.iter().any(|&n| n > 0)),
            seed in any::<u64>(),
        ) {
            let mut mixture = Mixture::new(parts.clone(), seed);
            let mut next = vec![0; parts.len()];
            for sequence in 0..20_000 {
                if sequence % 999 == 0 {
                    prop_assert_eq!(&mixture.counts(sequence), &next);
                }
                let (source, number) = mixture.locate(sequence);
                prop_assert_eq!(number, next[source]);
                next[source] += 1;
            }
            let total: u64 = parts.iter().sum();
            for (count, part) in next.iter().zip(&parts) {
                let share = 20_000.0 * *part as f64 / total as f64;
                // Exact to a sequence at the end of a block, and within one no further off than it is long.
                prop_assert!((*count as f64 - share).abs() < BLOCK as f64, "{} {}", count, share);
            }
            let mut fresh = Mixture::new(parts, seed);
            prop_assert_eq!(fresh.locate(12_345), mixture.locate(12_345));
        }
    }

    #[test]
    fn shares_are_exact_in_the_long_run() {
        let mut mixture = Mixture::new(vec![1, 2, 997], 5);
        let far = BLOCK * 1000;
        assert_eq!(mixture.counts(far * 1000), [far, 2 * far, 997 * far]);
        // A block is mixed: a source of a tenth never waits for hundreds of sequences.
        let mut mixture = Mixture::new(vec![1, 9], 5);
        let first: Vec<u64> = (0..20_000).filter(|&n| mixture.locate(n).0 == 0).collect();
        assert_eq!(first.len() as u64, mixture.counts(20_000)[0]);
        assert!(first.windows(2).all(|w| w[1] - w[0] < 200));
    }
}
