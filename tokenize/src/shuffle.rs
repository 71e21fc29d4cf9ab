//! The global order of documents: a key per document that depends on the document and the seed alone.
//!
//! The top bit of a key says whether the document is held out, by a hash of its text; the rest is its place in the
//! shuffle, by a hash of its id. The split and every shard are ranges of keys, and sorting by `(key, id)` is the
//! global shuffle.

use std::ops::Range;

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Keys at and above this one belong to held-out documents.
pub const HELD_OUT: u64 = 1 << 63;

/// Seed of the hash that decides about the split. Fixed, so that a text that was held out once is held out under
/// every other shuffle.
const SPLIT_SEED: u64 = u64::from_be_bytes(*b"held out");
/// Seed of the hash that samples documents for the tokenizer, so that the sample is independent of
/// both the split and the shuffle.
const SAMPLE_SEED: u64 = u64::from_be_bytes(*b"sampling");

/// Which documents a stage is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Documents to train on.
    Train,
    /// Documents held out.
    Validation,
}

impl Split {
    /// Keys of the split.
    pub fn keys(self) -> Range<u128> {
        match self {
            Self::Train => 0..u128::from(HELD_OUT),
            Self::Validation => u128::from(HELD_OUT)..1 << 64,
        }
    }

    /// The keys of each of `n` shards: equal parts of the split's keys.
    pub fn shards(self, n: u32) -> Vec<Range<u128>> {
        let Range { start, end } = self.keys();
        let bound = |i: u32| start + (end - start) * u128::from(i) / u128::from(n);
        (0..n).map(|i| bound(i)..bound(i + 1)).collect()
    }

    /// The split that a key belongs to.
    pub fn of_key(key: u64) -> Self {
        if key < HELD_OUT { Self::Train } else { Self::Validation }
    }
}

/// The shuffle key of a document.
pub fn shuffle_key(id: &[u8], text: &str, seed: u64, validation_fraction: f64) -> u64 {
    let place = xxh3_64_with_seed(id, seed) >> 1;
    if is_held_out(text, validation_fraction) { HELD_OUT | place } else { place }
}

/// Whether a document is held out: by hash of its text, never by position. An id knows the place of a document in its
/// file, so that it would not do: equal texts are on the same side, wherever they stand and wherever they move.
pub fn is_held_out(text: &str, validation_fraction: f64) -> bool {
    below(xxh3_64_with_seed(text.as_bytes(), SPLIT_SEED), validation_fraction)
}

/// The hash by which documents are sampled: the lowest are in the sample.
pub fn sample_key(id: &[u8], seed: u64) -> u64 {
    xxh3_64_with_seed(id, seed ^ SAMPLE_SEED)
}

/// Whether a uniform 64-bit hash is in the lowest `fraction` of its range.
fn below(hash: u64, fraction: f64) -> bool {
    // 2^64 as a float is exact; a fraction of 1 takes all.
    u128::from(hash) < (fraction * 18_446_744_073_709_551_616.0) as u128
}

#[cfg(test)]
mod tests {
    use pipeline::document::document_id;

    use super::*;

    #[test]
    fn splits_have_their_share_and_depend_on_the_texts_alone() {
        let held = |file: &str, seed| -> Vec<u64> {
            let key = |i| shuffle_key(&document_id(file, i), &format!("text {i}"), seed, 0.05);
            (0..100_000).filter(|&i| key(i) >= HELD_OUT).collect()
        };
        assert_eq!(held("a", 1), held("a", 2));
        assert_eq!(held("a", 1), held("b", 1));
        assert!((4_500..5_500).contains(&held("a", 1).len()), "{}", held("a", 1).len());
        assert_eq!((0..1000).filter(|i| is_held_out(&i.to_string(), 0.0)).count(), 0);
        // The place is by the id: equal texts are not neighbours.
        assert_ne!(shuffle_key(&document_id("a", 0), "x", 1, 0.0), shuffle_key(&document_id("a", 1), "x", 1, 0.0));
    }

    #[test]
    fn shards_cut_the_keys_of_a_split_without_gap_or_overlap() {
        for split in [Split::Train, Split::Validation] {
            for n in [1, 2, 3, 7, 1000] {
                let shards = split.shards(n);
                assert_eq!((shards[0].start, shards[n as usize - 1].end), (split.keys().start, split.keys().end));
                assert!(shards.windows(2).all(|w| w[0].end == w[1].start && w[0].start < w[0].end));
            }
        }
        assert_eq!(Split::of_key(HELD_OUT), Split::Validation);
        assert_eq!(Split::of_key(HELD_OUT - 1), Split::Train);
    }
}
