//! Byte-pair merges of one word, with the result of the `tokenizers` crate.
//!
//! Of all neighbours the pair of lowest rank is merged, the leftmost of equals, until no pair is left
//! (Sennrich, Haddow and Birch 2016). The `bpe` crate encodes in linear time, but knows ranks of tokens
//! only, as tiktoken has them; a `tokenizer.json` ranks pairs, two of which may spell one token and some of
//! which are no merge though they spell one. So the merges are done here, over the pairs of the file.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Words of more symbols are merged by sweeps and with a queue, shorter ones by looking for the best pair each time.
const SEARCH_UP_TO: usize = 48;

/// A sweep has to merge one symbol of so many for another one to be tried.
const SWEEP_GAIN: usize = 16;

/// What stands for no merge; greater than any.
const NONE: u64 = u64::MAX;

/// Merges by pair of ids: a table with open addressing, a power of two in size, at most half full.
pub struct Merges {
    /// Pair (left in the high half) and rank with the id of the result in the low half.
    table: Vec<(u64, u64)>,
    shift: u32,
}

/// Buffers of [`Merges::merge`], to be used again.
#[derive(Default)]
pub struct Buffers {
    ranks: Vec<u64>,
    links: Vec<(u32, u32)>,
    queue: BinaryHeap<Reverse<(u64, u32)>>,
}

fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

impl Merges {
    /// Merges by rank: two ids and the id of the result. Of a pair that is there twice the last one counts,
    /// as in `tokenizers`.
    pub fn new(merges: impl ExactSizeIterator<Item = (u32, u32, u32)>) -> Self {
        let size = (merges.len() * 2).next_power_of_two().max(2);
        let mut this = Self { table: vec![(NONE, NONE); size], shift: u64::BITS - size.trailing_zeros() };
        for (rank, (left, right, result)) in (0u64..).zip(merges) {
            let at = this.place(key(left, right));
            this.table[at] = (key(left, right), rank << 32 | u64::from(result));
        }
        this
    }

    /// Where a pair is, or would be.
    #[inline(always)]
    fn place(&self, key: u64) -> usize {
        // Fibonacci hashing; the fold brings the left id to bits that the product spreads.
        let mut at = ((key ^ key >> 29).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize;
        while self.table[at].0 != key && self.table[at].0 != NONE {
            at = (at + 1) & (self.table.len() - 1);
        }
        at
    }

    /// Rank and result of a pair, the rank in the high half; [`NONE`] if it is no merge.
    #[inline(always)]
    fn get(&self, left: u32, right: u32) -> u64 {
        self.table[self.place(key(left, right))].1
    }

    /// Merge the symbols in `ids` from `start` on, in place.
    pub fn merge(&self, ids: &mut Vec<u32>, start: usize, buffers: &mut Buffers) {
        if ids.len() - start > SEARCH_UP_TO {
            self.merge_by_sweeps(ids, start, buffers);
        }
        if ids.len() - start > SEARCH_UP_TO {
            self.merge_with_queue(ids, start, buffers);
        } else {
            self.merge_by_search(ids, start, buffers);
        }
    }

    /// Begins with a long word: merges the best pair wherever it stands, in one pass over the word, as long as that shortens it
    /// well and it is long. Lines of tables and runs of spaces, which text has much of, are one pair for the most part.
    fn merge_by_sweeps(&self, ids: &mut Vec<u32>, start: usize, buffers: &mut Buffers) {
        let ranks = &mut buffers.ranks;
        let word = &mut ids[start..];
        let mut length = word.len();
        ranks.clear();
        ranks.extend(word.windows(2).map(|pair| self.get(pair[0], pair[1])));
        ranks.push(NONE);
        while length > SEARCH_UP_TO {
            let best = ranks[..length].iter().copied().min().unwrap_or(NONE);
            if best == NONE {
                break;
            }
            let (mut read, mut write) = (0, 0);
            while read < length {
                if ranks[read] != best {
                    (word[write], ranks[write]) = (word[read], ranks[read]);
                    (read, write) = (read + 1, write + 1);
                    continue;
                }
                word[write] = best as u32;
                read += 2;
                let left = match write {
                    0 => NONE,
                    _ => {
                        ranks[write - 1] = self.get(word[write - 1], word[write]);
                        ranks[write - 1]
                    }
                };
                ranks[write] = if read < length { self.get(word[write], word[read]) } else { NONE };
                let right = ranks[write];
                write += 1;
                if left.min(right) <= best {
                    // What this has made comes before the next of its kind.
                    break;
                }
            }
            word.copy_within(read..length, write);
            ranks.copy_within(read..length, write);
            let merged = read - write;
            length -= merged;
            if merged * SWEEP_GAIN < length {
                break;
            }
        }
        ids.truncate(start + length);
    }

    fn merge_by_search(&self, ids: &mut Vec<u32>, start: usize, buffers: &mut Buffers) {
        let Buffers { ranks, .. } = buffers;
        let mut length = ids.len() - start;
        let word = &mut ids[start..];
        ranks.clear();
        ranks.extend(word.windows(2).map(|pair| self.get(pair[0], pair[1])));
        while length > 1 {
            let (mut at, mut best) = (0, NONE);
            for (i, &rank) in ranks[..length - 1].iter().enumerate() {
                if rank < best {
                    (at, best) = (i, rank);
                }
            }
            if best == NONE {
                break;
            }
            word[at] = best as u32;
            word.copy_within(at + 2..length, at + 1);
            ranks.copy_within(at + 1..length - 1, at);
            length -= 1;
            if at > 0 {
                ranks[at - 1] = self.get(word[at - 1], word[at]);
            }
            if at + 1 < length {
                ranks[at] = self.get(word[at], word[at + 1]);
            }
        }
        ids.truncate(start + length);
    }

    /// The same with a queue of pairs, for long words: n log n.
    fn merge_with_queue(&self, ids: &mut Vec<u32>, start: usize, buffers: &mut Buffers) {
        let Buffers { ranks, links, queue } = buffers;
        let word = &mut ids[start..];
        let length = word.len();
        // The rank of the pair that begins at a symbol, while both are there.
        ranks.clear();
        ranks.extend(word.windows(2).map(|pair| self.get(pair[0], pair[1])));
        ranks.push(NONE);
        // The symbols before and after.
        links.clear();
        links.extend((0..length as u32).map(|i| (i.wrapping_sub(1), i + 1)));
        queue.clear();
        queue.extend((0..).zip(ranks.iter()).filter(|(_, rank)| **rank != NONE).map(|(i, &rank)| Reverse((rank, i))));
        while let Some(Reverse((rank, at))) = queue.pop() {
            let left = at as usize;
            if ranks[left] != rank {
                // The pair has changed since.
                continue;
            }
            let right = links[left].1 as usize;
            let (before, after) = (links[left].0, links[right].1);
            word[left] = rank as u32;
            ranks[right] = NONE;
            links[left].1 = after;
            ranks[left] = NONE;
            if (after as usize) < length {
                links[after as usize].0 = at;
                ranks[left] = self.get(word[left], word[after as usize]);
                if ranks[left] != NONE {
                    queue.push(Reverse((ranks[left], at)));
                }
            }
            if let Some(rank) = ranks.get_mut(before as usize) {
                *rank = self.get(word[before as usize], word[left]);
                if *rank != NONE {
                    queue.push(Reverse((*rank, before)));
                }
            }
        }
        let (mut read, mut write) = (0, 0);
        while read < length {
            word[write] = word[read];
            write += 1;
            read = links[read].1 as usize;
        }
        ids.truncate(start + write);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// The definition: look for the best pair, merge it, look again.
    fn naive(merges: &[(u32, u32, u32)], word: &[u32]) -> Vec<u32> {
        let ranks: HashMap<(u32, u32), (usize, u32)> =
            merges.iter().enumerate().map(|(rank, &(a, b, c))| ((a, b), (rank, c))).collect();
        let mut word = word.to_vec();
        loop {
            let pairs = word.windows(2).enumerate().filter_map(|(i, p)| Some((ranks.get(&(p[0], p[1]))?, i)));
            let Some((&(_, id), at)) = pairs.min() else { return word };
            word.splice(at..at + 2, [id]);
        }
    }

    /// Merges of earlier symbols, at random; nothing says that they are those of a training.
    fn merges() -> impl Strategy<Value = Vec<(u32, u32, u32)>> {
        prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..40).prop_map(|pairs| {
            let pairs = (3u32..).zip(pairs);
            pairs.map(|(id, (a, b))| (a.index(id as usize) as u32, b.index(id as usize) as u32, id)).collect()
        })
    }

    proptest! {
        #[test]
        fn words_are_merged_as_defined(merges in merges(), word in prop::collection::vec(0u32..3, 0..120)) {
            let table = Merges::new(merges.iter().copied());
            let expected = naive(&merges, &word);
            let merged = |merge: fn(&Merges, &mut Vec<u32>, usize, &mut Buffers)| {
                let mut ids = vec![7, 7];
                ids.extend(&word);
                merge(&table, &mut ids, 2, &mut Buffers::default());
                ids.split_off(2)
            };
            prop_assert_eq!(&merged(Merges::merge_by_search), &expected);
            prop_assert_eq!(&merged(Merges::merge_with_queue), &expected);
            prop_assert_eq!(&merged(Merges::merge), &expected);
        }

        /// Runs, as tables and spaces are: sweeps go far, and what they make may come before what is left.
        #[test]
        fn long_runs_are_merged_as_defined(
            merges in merges(),
            runs in prop::collection::vec((0u32..3, 1usize..90), 1..8),
        ) {
            let word: Vec<u32> = runs.iter().flat_map(|&(id, count)| std::iter::repeat_n(id, count)).collect();
            let table = Merges::new(merges.iter().copied());
            let mut ids = vec![7, 7];
            ids.extend(&word);
            table.merge(&mut ids, 2, &mut Buffers::default());
            prop_assert_eq!(&ids[2..], naive(&merges, &word));
        }
    }
}
