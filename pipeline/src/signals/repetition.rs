//! Repeated lines, paragraphs and n-grams (Gopher: Rae et al. 2021, A.1.1 and table A1).
//!
//! n-grams get dense numbers level by level: an (n+1)-gram is the pair of the numbers of the two n-grams
//! it is made of, so every comparison above the words is exact. An n-gram can only repeat where both of
//! its (n-1)-grams repeat, so each level looks at the repeated positions of the level before alone; in
//! prose few positions get past the 3-grams. The counts are those of a walk over all n-grams.

use std::sync::LazyLock;

/// Numbers distinct keys in order of first occurrence and counts them: an open-addressing table that is
/// kept from document to document.
#[derive(Debug, Default)]
struct Numbering {
    /// High half: high half of the key's hash. Low half: number of the key, plus one. 0: free.
    slots: Vec<u64>,
    entries: Vec<Entry>,
    mask: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    key: u64,
    count: u32,
}

const TAG: u64 = 0xffff_ffff_0000_0000;

/// Spreads the bits of a key: the halves of a 128-bit product, folded.
#[inline]
fn mix(key: u64) -> u64 {
    let product = u128::from(key ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93_u128;
    (product as u64) ^ ((product >> 64) as u64)
}

impl Numbering {
    /// Forgets all keys and makes room for `keys` of them.
    fn reset(&mut self, keys: usize) {
        let size = (keys * 2).next_power_of_two().max(16);
        if self.slots.len() < size {
            self.slots.resize(size, 0);
        }
        self.slots[..size].fill(0);
        self.mask = size - 1;
        self.entries.clear();
    }

    /// Number of `key`; its count goes up by one. At most as many keys as [`Self::reset`] was told.
    #[inline]
    fn number(&mut self, key: u64) -> u32 {
        let hash = mix(key);
        let mut at = hash as usize & self.mask;
        loop {
            let slot = self.slots[at];
            if slot == 0 {
                let number = self.entries.len() as u32;
                self.slots[at] = (hash & TAG) | u64::from(number + 1);
                self.entries.push(Entry { key, count: 1 });
                return number;
            }
            if (slot ^ hash) & TAG == 0 {
                let number = slot as u32 - 1;
                let entry = &mut self.entries[number as usize];
                if entry.key == key {
                    entry.count += 1;
                    return number;
                }
            }
            at = (at + 1) & self.mask;
        }
    }

    fn count(&self, number: u32) -> u32 {
        self.entries[number as usize].count
    }
}

/// An n-gram that occurs more than once.
#[derive(Clone, Copy, Debug)]
struct Gram {
    /// Number of its first word.
    position: u32,
    /// Number of the n-gram among those of its length, by first occurrence.
    number: u32,
}

/// Duplicates among the units (lines, paragraphs) of a document.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Duplicates {
    /// Units that occurred before.
    pub units: u64,
    /// Their characters.
    pub chars: u64,
}

/// The words, lines and paragraphs of one document, and the tables to count them with. Up to 2³² − 2 words.
#[derive(Debug, Default)]
pub(super) struct Repetition {
    /// Hash of every word.
    words: Vec<u64>,
    /// `ends[k]`: characters of the first k words.
    ends: Vec<u64>,
    lines: Vec<Unit>,
    paragraphs: Vec<Unit>,
    numbering: Numbering,
    grams: Vec<Gram>,
}

#[derive(Clone, Copy, Debug)]
struct Unit {
    hash: u64,
    chars: u64,
}

/// Characters covered by repeated n-grams. Words' characters only: white space is in neither the
/// numerators nor the denominator.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct NgramChars {
    /// For n = 2, 3, 4: characters of the most frequent n-gram (of several, the one that comes
    /// first) times its occurrences, which may overlap.
    pub top: [u64; 3],
    /// For n = 5 to 10: characters of the n-grams that a walk from the left finds again;
    /// behind such an n-gram the walk goes on after its last word.
    pub duplicate: [u64; 6],
    /// For n = 5 to 10: characters of the words that stand in any n-gram that occurs more than once.
    pub covered: [u64; 6],
    /// Number of different words.
    pub distinct_words: u64,
    /// Sum of c · ln c over the different words, which occur c times.
    pub count_logs: f64,
}

impl Repetition {
    pub fn clear(&mut self) {
        /// Elements kept for the next document; a longer one gives its memory back.
        const KEEP: usize = 1 << 22;
        self.words.clear();
        self.ends.clear();
        self.ends.push(0);
        self.lines.clear();
        self.paragraphs.clear();
        self.grams.clear();
        self.words.shrink_to(KEEP);
        self.ends.shrink_to(KEEP);
        self.lines.shrink_to(KEEP);
        self.paragraphs.shrink_to(KEEP);
        self.grams.shrink_to(KEEP);
        self.numbering.slots.truncate(2 * KEEP);
        self.numbering.slots.shrink_to(2 * KEEP);
        self.numbering.entries.clear();
        self.numbering.entries.shrink_to(KEEP);
    }

    #[inline]
    pub fn push_word(&mut self, hash: u64, chars: usize) {
        let before = self.ends.last().copied().unwrap_or(0);
        self.words.push(hash);
        self.ends.push(before + chars as u64);
    }

    /// One more line; `begins_paragraph` when it is the first of its paragraph.
    #[inline]
    pub fn push_line(&mut self, hash: u64, chars: usize, begins_paragraph: bool) {
        let chars = chars as u64;
        self.lines.push(Unit { hash, chars });
        match self.paragraphs.last_mut() {
            Some(paragraph) if !begins_paragraph => {
                paragraph.hash = mix(paragraph.hash.rotate_left(23) ^ hash);
                paragraph.chars += chars;
            }
            _ => self.paragraphs.push(Unit { hash, chars }),
        }
    }

    /// Number of lines.
    pub fn line_count(&self) -> u64 {
        self.lines.len() as u64
    }

    /// Number of paragraphs.
    pub fn paragraph_count(&self) -> u64 {
        self.paragraphs.len() as u64
    }

    /// Characters of all lines, which are also those of all paragraphs.
    pub fn line_chars(&self) -> u64 {
        self.lines.iter().map(|line| line.chars).sum()
    }

    /// Characters of all words.
    pub fn word_chars(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    pub fn duplicate_lines(&mut self) -> Duplicates {
        duplicates(&mut self.numbering, &self.lines)
    }

    pub fn duplicate_paragraphs(&mut self) -> Duplicates {
        duplicates(&mut self.numbering, &self.paragraphs)
    }

    pub fn ngram_chars(&mut self) -> NgramChars {
        let mut found = NgramChars::default();
        self.number_words();
        found.distinct_words = self.numbering.entries.len() as u64;
        found.count_logs = self.numbering.entries.iter().map(|entry| count_log(entry.count)).sum();
        self.keep_repeated();
        for n in 2..=10 {
            self.lengthen();
            if n <= 4 {
                found.top[n - 2] = self.top_chars(n);
            } else {
                found.duplicate[n - 5] = self.duplicate_chars(n);
            }
            self.keep_repeated();
            if n > 4 {
                found.covered[n - 5] = self.covered_chars(n);
            }
        }
        found
    }

    /// Level 1: the words.
    fn number_words(&mut self) {
        self.numbering.reset(self.words.len());
        self.grams.clear();
        for (position, hash) in self.words.iter().enumerate() {
            let number = self.numbering.number(*hash);
            self.grams.push(Gram { position: position as u32, number });
        }
    }

    /// From n-grams to (n+1)-grams, in place: wherever two neighbouring positions both hold a repeated
    /// n-gram.
    fn lengthen(&mut self) {
        let Self { grams, numbering, .. } = self;
        numbering.reset(grams.len());
        let mut kept = 0;
        for at in 1..grams.len() {
            let (left, right) = (grams[at - 1], grams[at]);
            if left.position + 1 == right.position {
                let key = u64::from(left.number) << 32 | u64::from(right.number);
                grams[kept] = Gram { position: left.position, number: numbering.number(key) };
                kept += 1;
            }
        }
        grams.truncate(kept);
    }

    fn keep_repeated(&mut self) {
        let Self { grams, numbering, .. } = self;
        // Every n-gram is moved and the place given up again when it was the only one of its kind: whether it
        // was cannot be predicted, and a branch would cost more than the move.
        let mut kept = 0;
        for at in 0..grams.len() {
            let gram = grams[at];
            grams[kept] = gram;
            kept += usize::from(numbering.count(gram.number) > 1);
        }
        grams.truncate(kept);
    }

    /// Characters of the n words from `position`.
    fn chars(&self, position: u32, n: usize) -> u64 {
        self.ends[position as usize + n] - self.ends[position as usize]
    }

    fn top_chars(&self, n: usize) -> u64 {
        if self.words.len() < n {
            return 0;
        }
        let mut best = (1, 0);
        // Numbers rise with the first occurrence, so the first of equals comes first.
        let mut best_number = None;
        for (number, entry) in self.numbering.entries.iter().enumerate() {
            if entry.count > best.0 {
                best = (entry.count, 0);
                best_number = Some(number as u32);
            }
        }
        if let Some(number) = best_number {
            let first = self.grams.iter().find(|gram| gram.number == number);
            best.1 = first.map_or(0, |gram| gram.position);
        }
        u64::from(best.0) * self.chars(best.1, n)
    }

    /// Characters of the words in repeated n-grams, each once; of the n-grams that are left by [`Self::keep_repeated`].
    fn covered_chars(&self, n: usize) -> u64 {
        let mut chars = 0;
        let mut end = 0;
        for gram in &self.grams {
            let from = gram.position.max(end);
            end = gram.position + n as u32;
            chars += self.ends[end as usize] - self.ends[from as usize];
        }
        chars
    }

    fn duplicate_chars(&mut self, n: usize) -> u64 {
        let mut chars = 0;
        let mut next = 0;
        for at in 0..self.grams.len() {
            let Gram { position, number } = self.grams[at];
            let entry = &mut self.numbering.entries[number as usize];
            if entry.count < 2 || position < next {
                continue;
            }
            // The key is no longer looked up: it marks the n-grams that the walk has seen.
            if entry.key == SEEN {
                chars += self.chars(position, n);
                next = position + n as u32;
            } else {
                entry.key = SEEN;
            }
        }
        chars
    }
}

/// c · ln c, looked up for the counts that nearly all words have.
fn count_log(count: u32) -> f64 {
    static LOGS: LazyLock<[f64; 256]> =
        LazyLock::new(|| std::array::from_fn(|c| if c < 2 { 0.0 } else { c as f64 * (c as f64).ln() }));
    match LOGS.get(count as usize) {
        Some(log) => *log,
        None => f64::from(count) * f64::from(count).ln(),
    }
}

/// No pair of numbers: there are at most 2³² − 2 of them.
const SEEN: u64 = u64::MAX;

fn duplicates(numbering: &mut Numbering, units: &[Unit]) -> Duplicates {
    numbering.reset(units.len());
    let mut found = Duplicates::default();
    for unit in units {
        let number = numbering.number(unit.hash);
        if numbering.count(number) > 1 {
            found.units += 1;
            found.chars += unit.chars;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(words: &str) -> (NgramChars, u64) {
        let mut repetition = Repetition::default();
        repetition.clear();
        for word in words.split_whitespace() {
            repetition.push_word(xxhash_rust::xxh3::xxh3_64(word.as_bytes()), word.chars().count());
        }
        (repetition.ngram_chars(), repetition.word_chars())
    }

    #[test]
    fn the_most_frequent_ngram() {
        // "a bb" three times, "bb a" twice; 3-grams "a bb a" and "bb a bb" twice each; 4-grams "a bb a bb"
        // twice.
        let (found, chars) = of("a bb a bb a bb");
        assert_eq!(chars, 9);
        assert_eq!(found.top, [9, 8, 12]);
        // Nothing repeats: the first n-gram, once.
        assert_eq!(of("one two three four five").0.top, [6, 11, 15]);
        // Of two 2-grams that occur twice, the first counts.
        assert_eq!(of("a b cc dd a b cc dd").0.top[0], 4);
        assert_eq!(of("one").0, NgramChars { distinct_words: 1, ..NgramChars::default() });
        assert_eq!(of("").0, NgramChars::default());
        let counts = of("a b a c a b").0;
        assert_eq!((counts.distinct_words, counts.count_logs), (3, 3.0 * 3f64.ln() + 2.0 * 2f64.ln()));
    }

    #[test]
    fn the_walk_over_duplicates_does_not_overlap() {
        // Ten equal words: 5-grams at 0 (new), 1 (again; on to 6), and there the text has only 4 words left.
        assert_eq!(of("a a a a a a a a a a").0.duplicate, [5, 6, 7, 8, 9, 0]);
        // Five words twice: the 5-gram at 5 repeats the one at 0.
        assert_eq!(of("a b c d e a b c d e").0.duplicate, [5, 0, 0, 0, 0, 0]);
        // Ten words twice: the walk finds 5-grams at 10 and 15, and one n-gram of each other length but 10.
        assert_eq!(of("a b c d e f g h i j a b c d e f g h i j").0.duplicate, [10, 6, 7, 8, 9, 10]);
        assert_eq!(of("a b c d e f g h i j k").0.duplicate, [0; 6]);
    }

    #[test]
    fn every_word_of_a_repeated_ngram_is_covered_once() {
        assert_eq!(of("a a a a a a a a a a").0.covered, [10, 10, 10, 10, 10, 0]);
        assert_eq!(of("a b c d e a b c d e").0.covered, [10, 0, 0, 0, 0, 0]);
        assert_eq!(of("a b c d e f x a b c d e f y").0.covered, [12, 12, 0, 0, 0, 0]);
    }

    #[test]
    fn a_numbering_survives_many_keys_and_resets() {
        let mut numbering = Numbering::default();
        for round in 0..3u64 {
            numbering.reset(5000);
            for key in 0..5000 {
                assert_eq!(u64::from(numbering.number(key << round)), key);
            }
            assert_eq!(numbering.number(7 << round), 7);
            assert_eq!(numbering.count(7), 2);
        }
    }
}
