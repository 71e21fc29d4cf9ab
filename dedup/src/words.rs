//! Text simplified until two copies of a page agree on its words.
//!
//! The steps are those of datatrove's `simplify_text` with its defaults, in its order: lower case
//! (with Unicode's final sigma), every number (decimal digits of any script, with one decimal
//! separator inside) as `0`, punctuation and control characters as spaces, then canonical
//! decomposition without non-spacing marks, so that `é` is `e`. The words are then cut as spaCy's
//! English tokenizer cuts them, see [`crate::english`]; datatrove uses that one unless told another
//! language.
//!
//! Where this differs: character classes are those of Unicode 17 whatever the interpreter; and two
//! odd strings (`‘s` after a quotation mark cut off, and an emoticon in Kannada letters), which spaCy
//! glues together again, stay as they were cut.

use std::ops::Range;

use unicode_normalization::UnicodeNormalization;

use crate::ascii::{BLOCK, Block, Blocks};
use crate::english;
use crate::unicode_tables::{DECIMAL_DIGITS, NONSPACING_MARKS, contains};
use crate::xxh64::hash_each;

/// The words of a text in one buffer, each followed by one space, so that any run of words joined by
/// spaces is a slice of it.
///
/// A word of ASCII letters between other ASCII characters, which is nearly every word of English, is copied as it stands in
/// the text in lower case; any other is read character by character.
#[derive(Debug, Default)]
pub struct Words {
    blocks: Blocks,
    joined: Joined,
    odd: OddWord,
}

/// Words and where they begin.
#[derive(Debug, Default)]
struct Joined {
    /// UTF-8.
    bytes: Vec<u8>,
    /// Start of every word in `bytes`, and of the one that would be next.
    starts: Vec<usize>,
}

/// Places of the runs of `n` words.
fn places(starts: &[usize], n: usize) -> impl Iterator<Item = Range<usize>> {
    // The start behind a word is behind the space that follows it.
    starts.windows(n.max(1).saturating_add(1)).map(|starts| starts[0]..starts[starts.len() - 1] - 1)
}

/// Bytes that are copied at once: longer than most words.
const COPY: usize = 16;

impl Joined {
    fn clear(&mut self) {
        self.bytes.clear();
        self.starts.clear();
        self.starts.push(0);
    }

    fn push(&mut self, word: &[u8]) {
        self.bytes.extend_from_slice(word);
        self.bytes.push(b' ');
        self.starts.push(self.bytes.len());
    }

    /// Append the word of lower-case letters from `start` to `end` of `lower`, behind which there are [`COPY`] bytes more.
    #[inline(always)]
    fn push_letters(&mut self, lower: &[u8], start: usize, end: usize) {
        let word = &lower[start..end];
        if english::is_rare(word) {
            return self.push_cut(str::from_utf8(word).unwrap_or_default());
        }
        if word.len() >= COPY {
            return self.push(word);
        }
        // What is copied too much is cut off: a length that is known beforehand needs no loop.
        let space = self.bytes.len() + word.len();
        self.bytes.extend_from_slice(&lower[start..start + COPY]);
        self.bytes[space] = b' ';
        self.bytes.truncate(space + 1);
        self.starts.push(space + 1);
    }

    /// Append the words that English makes of `word`.
    #[cold]
    fn push_cut(&mut self, word: &str) {
        english::cut(word, |piece| self.push(piece.as_bytes()));
    }
}

impl Words {
    /// Replace the words by those of `text`. Memory is kept from text to text.
    pub fn set(&mut self, text: &str) {
        if !self.read(text) {
            // A capital sigma: its lower case depends on what is around it.
            self.read(&text.to_lowercase());
        }
    }

    /// Number of words.
    pub fn len(&self) -> usize {
        self.joined.starts.len().saturating_sub(1)
    }

    /// Whether there are no words.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The words of every run of `n` words (at least 1) joined by single spaces, in order, as UTF-8; none if there are fewer.
    pub fn runs(&self, n: usize) -> impl Iterator<Item = &[u8]> {
        places(&self.joined.starts, n).map(|place| &self.joined.bytes[place])
    }

    /// Append the XXH64 of every run of [`Self::runs`].
    pub(crate) fn hashes(&mut self, n: usize, hashes: &mut Vec<u64>) {
        let Joined { bytes, starts } = &mut self.joined;
        hash_each(bytes, places(starts, n), hashes);
    }

    /// Read the words of `text`; `false` if it has a capital sigma.
    fn read(&mut self, text: &str) -> bool {
        let Self { blocks, joined, odd } = self;
        joined.clear();
        blocks.set(text.as_bytes());
        let Blocks { lower, blocks } = &*blocks;
        let is_odd = |block: &Block| block.digits | block.others;
        // A run of letters, digits and characters beyond ASCII is open since `start`; `plain`: of letters alone so far.
        let (mut at, mut open, mut start, mut plain) = (0, false, 0, true);
        while let Some(block) = blocks.get(at / BLOCK) {
            let first = at - at % BLOCK;
            let odd_bytes = is_odd(block);
            let from = |start: usize| if start < first { u64::MAX } else { u64::MAX << (start - first) };
            let parts = (block.letters | odd_bytes) & from(at);
            let mut edges = parts ^ (parts << 1 | u64::from(open));
            at = first + BLOCK;
            while edges != 0 {
                let edge = edges.trailing_zeros() as usize;
                edges &= edges - 1;
                if !open {
                    (open, start, plain) = (true, first + edge, true);
                    continue;
                }
                open = false;
                if plain && odd_bytes & from(start) & !(u64::MAX << edge) == 0 {
                    joined.push_letters(lower, start, first + edge);
                    continue;
                }
                let Some(next) = odd.read(text, start, joined) else { return false };
                at = next;
                break;
            }
            plain &= !open || odd_bytes & from(start) == 0;
        }
        true
    }
}

/// Reads a word character by character.
#[derive(Debug, Default)]
struct OddWord {
    word: String,
    decomposed: String,
}

impl OddWord {
    /// Append the word of `text` that begins at `start`, if there is one; where the next may begin. `None` if a capital
    /// sigma is met.
    fn read(&mut self, text: &str, start: usize, joined: &mut Joined) -> Option<usize> {
        let Self { word, decomposed } = self;
        word.clear();
        let bytes = text.as_bytes();
        // Whether the word may change under decomposition.
        let mut composed = false;
        let mut at = start;
        while let Some(&byte) = bytes.get(at) {
            let class = ASCII[byte as usize];
            if class > DIGIT {
                word.push(class as char);
                at += 1;
            } else if class == GAP {
                at += 1;
                break;
            } else if class == DIGIT {
                word.push('0');
                at = number_end(text, at);
            } else {
                let Some(c) = text[at..].chars().next() else { break };
                if c == 'Σ' {
                    return None;
                }
                if contains(&DECIMAL_DIGITS, c) {
                    word.push('0');
                    at = number_end(text, at);
                    continue;
                }
                at += c.len_utf8();
                let lower = c.to_lowercase();
                // What ends a word has no other case, and is one character.
                if lower.clone().any(|lower| lower.is_whitespace() || is_punctuation(lower)) {
                    break;
                }
                for lower in lower {
                    word.push(lower);
                    // Nothing below À decomposes, nor do the unified ideographs.
                    composed |= lower >= 'À' && !('一'..='鿿').contains(&lower);
                }
            }
        }
        if composed {
            decomposed.clear();
            decomposed.extend(word.nfd().filter(|&c| c < '\u{300}' || !contains(&NONSPACING_MARKS, c)));
            std::mem::swap(word, decomposed);
        }
        if !word.is_empty() {
            joined.push_cut(word);
        }
        Some(at)
    }
}

/// End of the number that begins at `start`: digits, and once a separator between digits.
fn number_end(text: &str, start: usize) -> usize {
    let is_digit = |c: char| c.is_ascii_digit() || !c.is_ascii() && contains(&DECIMAL_DIGITS, c);
    let digits_end = |from: usize| text[from..].find(|c| !is_digit(c)).map_or(text.len(), |n| from + n);
    let whole = digits_end(start);
    let mut after = text[whole..].chars();
    match (after.next(), after.next()) {
        (Some(separator), Some(next)) if ".,،٫⎖⎗⎘".contains(separator) && is_digit(next) => {
            digits_end(whole + separator.len_utf8())
        }
        _ => whole,
    }
}

/// Not ASCII.
const OTHER: u8 = 0;
/// White space, punctuation or a control character.
const GAP: u8 = 1;
/// A digit.
const DIGIT: u8 = 2;

/// What an ASCII byte becomes: one of the classes, or the lower-case letter.
const ASCII: [u8; 256] = {
    let mut table = [OTHER; 256];
    let mut byte = 0u8;
    while byte < 128 {
        table[byte as usize] = match byte {
            b'0'..=b'9' => DIGIT,
            b'A'..=b'Z' | b'a'..=b'z' => byte.to_ascii_lowercase(),
            // DEL is punctuation too; there is no ASCII character besides.
            _ => GAP,
        };
        byte += 1;
    }
    table
};

/// datatrove's `PUNCTUATION` beyond ASCII.
fn is_punctuation(c: char) -> bool {
    matches!(
        c,
        '\u{80}'
            ..='\u{9f}'
                | '«'
                | '´'
                | '»'
                | '–'
                | '—'
                | '’'
                | '“'
                | '”'
                | '„'
                | '…'
                | '∶'
                | '━'
                | '►'
                | '、'
                | '。'
                | '〈'
                | '〉'
                | '《'
                | '》'
                | '「'
                | '」'
                | '【'
                | '】'
                | '！'
                | '％'
                | '（'
                | '）'
                | '，'
                | '．'
                | '１'
                | '：'
                | '；'
                | '？'
                | '～'
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The words of `text`, every one read character by character.
    fn plain(text: &str) -> Vec<Vec<u8>> {
        let (mut joined, mut odd, mut at) = (Joined::default(), OddWord::default(), 0);
        joined.clear();
        while at < text.len() {
            at = odd.read(text, at, &mut joined).unwrap();
        }
        places(&joined.starts, 1).map(|place| joined.bytes[place].to_vec()).collect()
    }

    proptest! {
        #[test]
        fn words_that_are_copied_are_those_that_are_read(
            text in "([a-zA-Z]{1,20}|[0-9.,]{1,5}|[ \n\t'_;:-]{1,3}|[éÀß東—“٣Ⅷ\u{a0}\u{301}]|cannot|theyll|10km|Dont ){0,60}", n in 1usize..7,
        ) {
            let expected = plain(&text);
            let mut words = Words::default();
            words.set("something that was there before");
            words.set(&text);
            prop_assert_eq!(words.len(), expected.len());
            prop_assert!(words.runs(1).eq(expected.iter().map(Vec::as_slice)));
            let runs: Vec<Vec<u8>> = expected.windows(n).map(|words| words.join(&b' ')).collect();
            prop_assert!(words.runs(n).eq(runs.iter().map(Vec::as_slice)));
            let mut hashes = Vec::new();
            words.hashes(n, &mut hashes);
            let xxh64 = |run: &Vec<u8>| xxhash_rust::xxh64::xxh64(run, 0);
            prop_assert_eq!(hashes, runs.iter().map(xxh64).collect::<Vec<u64>>());
        }
    }

    #[test]
    fn a_capital_sigma_is_lower_as_unicode_says() {
        let mut words = Words::default();
        words.set("ΟΔΟΣ 3.14 don't ΣΑΣ");
        let found: Vec<&[u8]> = words.runs(1).collect();
        assert_eq!(found, ["οδος", "0", "don", "t", "σας"].map(str::as_bytes));
    }
}
