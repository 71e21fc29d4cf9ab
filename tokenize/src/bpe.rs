//! Learning byte-pair merges from word counts (Sennrich, Haddow and Birch 2016, algorithm 1).
//!
//! The trainer of the `tokenizers` crate does the same work as fast. This one is here for what that one
//! cannot do: it tells how far it is and stops when asked, so that a run can; its counts do not overflow at
//! 2^31; no merge spells a special token; and that two trainings agree is a property of the algorithm
//! (counts are exact, ties go to the smaller pair) rather than of the order in which hash maps are read.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// Two neighbouring symbols.
pub type Pair = (u32, u32);

/// What was learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Learnt {
    /// Every symbol by id: the given alphabet, then the new ones in the order of their merges.
    pub pieces: Vec<String>,
    /// Merges by rank.
    pub merges: Vec<Pair>,
}

/// Hasher of pairs: one multiplication (Fibonacci hashing) and a fold, enough for small integers.
#[derive(Default)]
struct PairHasher(u64);

impl Hasher for PairHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.write_u32(b.into()));
    }
    fn write_u32(&mut self, value: u32) {
        self.0 = (self.0.rotate_left(5) ^ u64::from(value)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

type PairMap<V> = HashMap<Pair, V, BuildHasherDefault<PairHasher>>;

/// Learn merges until there are `size` pieces or no pair is seen `min_frequency` times.
///
/// `pieces` begins with `special` tokens, which no merge ever spells, and goes on with the alphabet;
/// `words` are sequences of ids of the alphabet with their counts. `progress` is told the number of
/// pieces now and then and answers whether to go on; `None` is returned when it says no.
pub fn learn(
    mut pieces: Vec<String>,
    special: usize,
    mut words: Vec<(Vec<u32>, u64)>,
    size: usize,
    min_frequency: u64,
    mut progress: impl FnMut(usize) -> bool,
) -> Option<Learnt> {
    let mut ids: HashMap<String, u32> = pieces.iter().cloned().zip(0..).collect();
    let mut counts: PairMap<i64> = PairMap::default();
    // Words in which a pair was ever seen; some may hold it no more.
    let mut places: PairMap<Vec<u32>> = PairMap::default();
    for (index, (word, count)) in words.iter().enumerate() {
        for pair in pairs(word) {
            *counts.entry(pair).or_default() += *count as i64;
            note_place(&mut places, pair, index as u32);
        }
    }
    let least = min_frequency.max(1) as i64;
    // An entry is never below the pair's count: growth is pushed, shrinking is seen when popped. Most pairs are too
    // rare to be merged, and wait for their growth outside.
    let frequent = counts.iter().filter(|(_, n)| **n >= least);
    let mut queue: BinaryHeap<(i64, Reverse<Pair>)> = frequent.map(|(&p, &n)| (n, Reverse(p))).collect();
    let mut merges = Vec::new();
    let mut merged: HashSet<Pair, BuildHasherDefault<PairHasher>> = HashSet::default();
    let mut change: PairMap<i64> = PairMap::default();
    while pieces.len() < size {
        let Some((count, Reverse(pair))) = queue.pop() else {
            break;
        };
        let now = counts.get(&pair).copied().unwrap_or(0);
        if now != count {
            if now >= least && now < count {
                queue.push((now, Reverse(pair)));
            }
            continue;
        }
        let piece = format!("{}{}", pieces[pair.0 as usize], pieces[pair.1 as usize]);
        // Another pair may have spelt this piece before; the merge then leads to the same id.
        let id = match ids.entry(piece) {
            Entry::Occupied(known) if (*known.get() as usize) < special => continue,
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(new) => {
                let id = pieces.len() as u32;
                pieces.push(new.key().clone());
                *new.insert(id)
            }
        };
        // A piece that is spelt in another way later can bring a merged pair back: its rank is the first.
        if merged.insert(pair) {
            merges.push(pair);
        }
        let mut at = places.remove(&pair).unwrap_or_default();
        at.sort_unstable();
        at.dedup();
        for index in at {
            let (word, count) = &mut words[index as usize];
            let count = *count as i64;
            merge(word, pair, id, |gone, made| {
                *change.entry(gone).or_default() -= count;
                if let Some(made) = made {
                    *change.entry(made).or_default() += count;
                    note_place(&mut places, made, index);
                }
            });
        }
        for (p, by) in change.drain() {
            if by == 0 {
                continue;
            }
            let count = counts.entry(p).or_default();
            *count += by;
            let now = *count;
            if by > 0 && now >= least {
                queue.push((now, Reverse(p)));
            } else if now == 0 {
                counts.remove(&p);
                places.remove(&p);
            }
        }
        if merges.len().is_multiple_of(64) && !progress(pieces.len()) {
            return None;
        }
    }
    Some(Learnt { pieces, merges })
}

fn pairs(word: &[u32]) -> impl Iterator<Item = Pair> + '_ {
    word.windows(2).map(|w| (w[0], w[1]))
}

fn note_place(places: &mut PairMap<Vec<u32>>, pair: Pair, index: u32) {
    let at = places.entry(pair).or_default();
    if at.last() != Some(&index) {
        at.push(index);
    }
}

/// Replace every occurrence of `pair`, from the left. `change` is told each pair that goes and, but for `pair` itself,
/// the one that takes its place: a word of a script without spaces is long, and most of it stays.
fn merge(word: &mut Vec<u32>, pair: Pair, id: u32, mut change: impl FnMut(Pair, Option<Pair>)) {
    let (mut read, mut write) = (0, 0);
    // The symbol before `read` as it was, if there is one, and whether it is merged now.
    let mut before = None;
    let mut is_merged = false;
    while read < word.len() {
        let merges = read + 1 < word.len() && (word[read], word[read + 1]) == pair;
        let symbol = if merges { id } else { word[read] };
        if let Some(before) = before
            && (merges || is_merged)
        {
            change((before, word[read]), Some((word[write - 1], symbol)));
        }
        if merges {
            change(pair, None);
        }
        before = Some(if merges { pair.1 } else { symbol });
        is_merged = merges;
        word[write] = symbol;
        read += 1 + usize::from(merges);
        write += 1;
    }
    word.truncate(write);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, step by step: count all pairs of all words, merge the best, again.
    fn naive(mut pieces: Vec<String>, mut words: Vec<(Vec<u32>, u64)>, size: usize, min_frequency: u64) -> Learnt {
        let mut merges = Vec::new();
        while pieces.len() < size {
            let mut counts = std::collections::BTreeMap::<Pair, u64>::new();
            for (word, count) in &words {
                pairs(word).for_each(|p| *counts.entry(p).or_default() += count);
            }
            let Some((&pair, &count)) = counts.iter().max_by_key(|(p, n)| (**n, Reverse(**p))) else {
                break;
            };
            if count < min_frequency.max(1) {
                break;
            }
            let piece = format!("{}{}", pieces[pair.0 as usize], pieces[pair.1 as usize]);
            let id = pieces.iter().position(|p| *p == piece).unwrap_or(pieces.len()) as u32;
            if id as usize == pieces.len() {
                pieces.push(piece);
            }
            if !merges.contains(&pair) {
                merges.push(pair);
            }
            words.iter_mut().for_each(|(word, _)| merge(word, pair, id, |_, _| ()));
        }
        Learnt { pieces, merges }
    }

    fn alphabet(n: u32) -> Vec<String> {
        (0..n).map(|i| char::from(b'a' + i as u8).to_string()).collect()
    }

    proptest! {
        #[test]
        fn merges_are_those_of_the_definition(
            words in prop::collection::vec((prop::collection::vec(0u32..3, 1..12), 1u64..6), 1..30),
            size in 3usize..60,
            min_frequency in 0u64..4,
        ) {
            let learnt = learn(alphabet(3), 0, words.clone(), size, min_frequency, |_| true).unwrap();
            prop_assert_eq!(&learnt, &naive(alphabet(3), words.clone(), size, min_frequency));
            let reversed = words.into_iter().rev().collect();
            prop_assert_eq!(&learnt, &learn(alphabet(3), 0, reversed, size, min_frequency, |_| true).unwrap());
        }
    }

    #[test]
    fn stops_when_told() {
        // Without repetition but in pairs, there is something to merge many times.
        let letters =
            std::iter::successors(Some(1u32), |x| Some(x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223)));
        let words = vec![(letters.map(|x| (x >> 16) % 26).take(5000).collect(), 1)];
        let stopped_at = |most| learn(alphabet(26), 0, words.clone(), 400, 1, |pieces| pieces < most);
        assert_eq!(stopped_at(200), None);
        assert_eq!(stopped_at(1000).unwrap().pieces.len(), 400);
    }

    #[test]
    fn no_merge_spells_a_special_token() {
        let pieces = ["ab".to_string()].into_iter().chain(alphabet(3)).collect::<Vec<_>>();
        // "abab…" over the ids 1 = a and 2 = b: (a, b) would spell "ab", so (b, a) comes first.
        let words = vec![((0..40).map(|i| 1 + i % 2).collect(), 1)];
        let learnt = learn(pieces, 1, words, 6, 1, |_| true).unwrap();
        assert_eq!(learnt.merges[0], (2, 1));
        assert_eq!(learnt.pieces.iter().filter(|p| *p == "ab").count(), 1);
    }
}
