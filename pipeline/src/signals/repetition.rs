//! Repeated lines, paragraphs and n-grams (Gopher: Rae et al. 2021, A.1.1 and table A1).
//!
//! n-grams get dense numbers level by level: an (n+1)-gram is the pair of the numbers of the two n-grams
//! it is made of, so every comparison above the words is exact. An n-gram can only repeat where both of
//! its (n-1)-grams repeat, so each level looks at the repeated positions of the level before alone; in
//! prose few positions get past the 3-grams. The counts are those of a walk over all n-grams.

use std::sync::LazyLock;

use super::vocabulary::Vocabulary;

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

/// An n-gram both of whose (n-1)-grams occur more than once.
#[derive(Clone, Copy, Debug, Default)]
struct Candidate {
    /// The numbers of the two, which tell it from all others.
    key: u64,
    /// Number of its first word.
    position: u32,
    /// Bits of a hash of the key.
    spread: u32,
}

impl Candidate {
    #[inline]
    fn new(position: u32, left: u32, right: u32) -> Self {
        let key = u64::from(left) << 32 | u64::from(right);
        Self { key, position, spread: mix(key) as u32 }
    }
}

/// An n-gram that may occur more than once.
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

/// The lines and paragraphs of one document, and the tables to count them and the n-grams of its words with.
#[derive(Debug, Default)]
pub(super) struct Repetition {
    /// `ends[k]`: characters of the first k words.
    ends: Vec<u64>,
    lines: Vec<Unit>,
    paragraphs: Vec<Unit>,
    numbering: Numbering,
    /// Room for the candidates of one length; how many there are is handed on apart.
    candidates: Vec<Candidate>,
    /// 1 or more where a candidate has been met, 2 or more where two have.
    met: Vec<u8>,
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
        const KEEP: usize = 1 << 18;
        self.ends.clear();
        self.lines.clear();
        self.paragraphs.clear();
        self.grams.clear();
        self.ends.shrink_to(KEEP);
        self.lines.shrink_to(KEEP);
        self.paragraphs.shrink_to(KEEP);
        self.grams.shrink_to(KEEP);
        self.candidates.truncate(KEEP);
        self.candidates.shrink_to(KEEP);
        self.met.truncate(8 * KEEP);
        self.met.shrink_to(8 * KEEP);
        self.numbering.slots.truncate(2 * KEEP);
        self.numbering.slots.shrink_to(2 * KEEP);
        self.numbering.entries.clear();
        self.numbering.entries.shrink_to(KEEP);
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

    pub fn duplicate_lines(&mut self) -> Duplicates {
        duplicates(&mut self.numbering, &self.lines)
    }

    pub fn duplicate_paragraphs(&mut self) -> Duplicates {
        duplicates(&mut self.numbering, &self.paragraphs)
    }

    /// Of the words of a document; `covered` is 0 where it is not wanted.
    pub fn ngram_chars(&mut self, words: &Vocabulary, covered: bool) -> NgramChars {
        let mut found = NgramChars {
            distinct_words: words.distinct().len() as u64,
            count_logs: words.distinct().iter().map(|word| count_log(word.count)).sum(),
            ..NgramChars::default()
        };
        for n in 2..=10 {
            let candidates = if n == 2 { self.pairs(words) } else { self.lengthen() };
            self.number(candidates);
            if n <= 4 {
                found.top[n - 2] = self.top_chars(n);
            } else {
                found.duplicate[n - 5] = self.duplicate_chars(n);
            }
            self.keep_repeated();
            if n > 4 && covered {
                found.covered[n - 5] = self.covered_chars(n);
            }
        }
        found
    }

    /// The 2-grams of words that both repeat; and the ends of the words. Gives the number of candidates.
    fn pairs(&mut self, words: &Vocabulary) -> usize {
        let Self { ends, candidates, .. } = self;
        let (numbers, distinct) = (words.words(), words.distinct());
        if candidates.len() < numbers.len() {
            candidates.resize(numbers.len(), Candidate::default());
        }
        ends.clear();
        ends.push(0);
        let mut chars = 0;
        let mut found = 0;
        let mut left = 0;
        let mut left_repeats = false;
        for (position, number) in numbers.iter().enumerate() {
            let word = &distinct[*number as usize];
            chars += u64::from(word.is.chars);
            ends.push(chars);
            let repeats = word.count > 1;
            // Written in any case and kept if it counts: whether it does cannot be predicted.
            candidates[found] = Candidate::new((position as u32).wrapping_sub(1), left, *number);
            found += usize::from(left_repeats & repeats);
            (left, left_repeats) = (*number, repeats);
        }
        found
    }

    /// From n-grams that repeat to (n+1)-grams: wherever two neighbouring positions both hold one. Gives the number of
    /// candidates.
    fn lengthen(&mut self) -> usize {
        let Self { grams, candidates, .. } = self;
        // No more of them than grams, of which there were no more than candidates before.
        let mut found = 0;
        for pair in grams.windows(2) {
            let (left, right) = (pair[0], pair[1]);
            candidates[found] = Candidate::new(left.position, left.number, right.number);
            found += usize::from(left.position + 1 == right.position);
        }
        found
    }

    /// From the first candidates to numbered n-grams. Most candidates occur once, and a table of bytes says so of most of
    /// these without a branch; what it lets pass is numbered exactly.
    fn number(&mut self, candidates: usize) {
        let Self { candidates: all, met, numbering, grams, .. } = self;
        let candidates = &mut all[..candidates];
        grams.clear();
        let size = (candidates.len() * 8).next_power_of_two();
        if met.len() < size {
            met.resize(size, 0);
        }
        let met = &mut met[..size];
        met.fill(0);
        for candidate in candidates.iter() {
            let times = &mut met[candidate.spread as usize & (size - 1)];
            *times = *times << 1 | 1;
        }
        let mut kept = 0;
        for at in 0..candidates.len() {
            let candidate = candidates[at];
            candidates[kept] = candidate;
            kept += usize::from(met[candidate.spread as usize & (size - 1)] > 1);
        }
        numbering.reset(kept);
        for candidate in &candidates[..kept] {
            grams.push(Gram { position: candidate.position, number: numbering.number(candidate.key) });
        }
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
        if self.ends.len() <= n {
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
    use super::super::vocabulary::Description;
    use super::*;

    fn of(text: &str) -> (NgramChars, u64) {
        let mut words = Vocabulary::default();
        words.begin(text.len());
        for word in text.split_whitespace() {
            let chars = word.chars().count() as u32;
            words.add(super::super::words::hash(word.as_bytes()), || Description { chars, ..Description::default() });
        }
        let mut repetition = Repetition::default();
        repetition.clear();
        (
            repetition.ngram_chars(&words, true),
            words.distinct().iter().map(|w| u64::from(w.is.chars) * u64::from(w.count)).sum(),
        )
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
