//! The words of a document by number: what depends on a word alone is found out once for each distinct one.

/// A sentence ends with the word.
pub(super) const SENTENCE_END: u8 = 1;
/// The word has "javascript" in it.
pub(super) const JAVASCRIPT: u8 = 2;
/// The word begins as the last word of one of C4's phrases does.
pub(super) const PHRASE: u8 = 4;
/// The word has an ellipsis.
pub(super) const ELLIPSES: u8 = 8;
/// The word has an alphabetic character.
pub(super) const ALPHABETIC: u8 = 16;
/// The word has an alphanumeric character.
pub(super) const ALPHANUMERIC: u8 = 32;
/// The word has an upper-case and no lower-case character.
pub(super) const ALL_CAPS: u8 = 64;
/// The word is in the list of stop words.
pub(super) const LISTED: u8 = 128;

/// What depends on a word and the list of stop words alone.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Description {
    /// Its length in characters.
    pub chars: u32,
    /// [`SENTENCE_END`] and its kind.
    pub marks: u8,
    /// Which of the first eight stop words it is: one bit or none.
    pub gopher: u8,
}

/// A distinct word of a document.
#[derive(Clone, Copy, Debug)]
pub(super) struct DistinctWord {
    /// How often it occurs.
    pub count: u32,
    /// What else is known of it.
    pub is: Description,
}

/// Numbers the words of a document in the order of their first occurrence and counts them: an open-addressing table
/// that is kept from document to document. Up to 2³² − 2 words, each of fewer than 2³² characters.
#[derive(Debug, Default)]
pub(super) struct Vocabulary {
    /// Number of the word that is here, plus one. 0: free. Those behind `mask` are free.
    slots: Vec<u32>,
    mask: usize,
    /// [`super::words::hash`] of each distinct word: apart from the rest, so that what every word asks for stays near the
    /// processor.
    hashes: Vec<u64>,
    distinct: Vec<DistinctWord>,
    /// Numbers of the words of the document, in order.
    words: Vec<u32>,
}

impl Vocabulary {
    /// Begins a document of so many bytes.
    pub fn begin(&mut self, bytes: usize) {
        /// Elements kept for the next document; a longer one gives its memory back.
        const KEEP: usize = 1 << 18;
        let used = self.slots.len().min(self.mask + 1);
        self.slots[..used].fill(0);
        self.slots.truncate(2 * KEEP);
        self.slots.shrink_to(2 * KEEP);
        self.hashes.clear();
        self.hashes.shrink_to(KEEP);
        self.distinct.clear();
        self.distinct.shrink_to(KEEP);
        self.words.clear();
        self.words.shrink_to(KEEP);
        // Prose of some kilobytes has a new word every 16 bytes, and the emptier the table, the more words are in their first
        // place; of longer texts more would be guessed than there are.
        let size = (bytes / 2).next_power_of_two().clamp(1 << 8, 1 << 15);
        if self.slots.len() < size {
            self.slots.resize(size, 0);
        }
        self.mask = size - 1;
    }

    /// One more word, of this hash, which `describe` is asked about when it is new. Gives the marks of the word.
    #[inline]
    pub fn add(&mut self, hash: u64, describe: impl FnOnce() -> Description) -> u8 {
        let mut at = hash as usize & self.mask;
        loop {
            let slot = self.slots[at];
            if slot == 0 {
                break;
            }
            let number = slot - 1;
            if self.hashes[number as usize] == hash {
                let word = &mut self.distinct[number as usize];
                word.count += 1;
                self.words.push(number);
                return word.is.marks;
            }
            at = (at + 1) & self.mask;
        }
        let is = describe();
        let number = self.distinct.len() as u32;
        self.hashes.push(hash);
        self.distinct.push(DistinctWord { count: 1, is });
        self.words.push(number);
        self.slots[at] = number + 1;
        if self.distinct.len() * 2 > self.mask {
            self.grow();
        }
        is.marks
    }

    #[cold]
    fn grow(&mut self) {
        let size = (self.mask + 1) * 2;
        self.slots[..=self.mask].fill(0);
        if self.slots.len() < size {
            self.slots.resize(size, 0);
        }
        self.mask = size - 1;
        for (hash, slot) in self.hashes.iter().zip(1u32..) {
            let mut at = *hash as usize & self.mask;
            while self.slots[at] != 0 {
                at = (at + 1) & self.mask;
            }
            self.slots[at] = slot;
        }
    }

    /// The distinct words in the order of their first occurrence.
    pub fn distinct(&self) -> &[DistinctWord] {
        &self.distinct
    }

    /// The words of the document: for each its number among the distinct ones.
    pub fn words(&self) -> &[u32] {
        &self.words
    }
}

#[cfg(test)]
mod tests {
    use super::super::words;
    use super::*;

    #[test]
    fn words_are_numbered_and_counted_in_any_number() {
        let mut vocabulary = Vocabulary::default();
        for distinct in [5usize, 60_000, 3, 700, 0, 20_000] {
            vocabulary.begin(100);
            for _ in 0..3 {
                for n in 0..distinct {
                    let described = Description { chars: n as u32, marks: n as u8, gopher: 0 };
                    assert_eq!(vocabulary.add(words::hash(n.to_string().as_bytes()), || described), n as u8);
                }
            }
            assert_eq!(vocabulary.distinct().len(), distinct);
            assert!(vocabulary.distinct().iter().zip(0..).all(|(word, n)| word.is.chars == n && word.count == 3));
            assert!(vocabulary.words().iter().zip(0..).all(|(number, n)| *number as usize == n % distinct));
        }
    }
}
