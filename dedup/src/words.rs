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

use unicode_normalization::UnicodeNormalization;

use crate::english;
use crate::unicode_tables::{DECIMAL_DIGITS, NONSPACING_MARKS, contains};

/// The words of a text in one buffer, each followed by one space, so that any run of words joined by
/// spaces is a slice of it.
#[derive(Debug, Default)]
pub struct Words {
    joined: String,
    /// Start and end of every word in `joined`.
    spans: Vec<(usize, usize)>,
    /// Whether the word being built may change under decomposition.
    composed: bool,
    word: String,
}

impl Words {
    /// Replace the words by those of `text`. Memory is kept from text to text.
    pub fn set(&mut self, text: &str) {
        self.joined.clear();
        self.spans.clear();
        self.composed = false;
        if !self.read(text) {
            // A capital sigma: its lower case depends on what is around it.
            self.joined.clear();
            self.spans.clear();
            self.composed = false;
            self.read(&text.to_lowercase());
        }
    }

    /// Number of words.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether there are no words.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Words `first..first + n` joined by single spaces.
    pub fn joined(&self, first: usize, n: usize) -> &str {
        &self.joined[self.spans[first].0..self.spans[first + n - 1].1]
    }

    /// Every word.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.spans.iter().map(|&(start, end)| &self.joined[start..end])
    }

    /// Read the words of `text`; `false` if it has a capital sigma.
    fn read(&mut self, text: &str) -> bool {
        let bytes = text.as_bytes();
        let mut at = 0;
        let mut start = 0;
        while at < bytes.len() {
            let byte = bytes[at];
            let class = ASCII[byte as usize];
            if class > DIGIT {
                self.joined.push(class as char);
                at += 1;
            } else if class == GAP {
                start = self.end_word(start);
                at += 1;
            } else if class == DIGIT {
                self.joined.push('0');
                at = number_end(text, at);
            } else {
                let Some(c) = text[at..].chars().next() else { break };
                if c == 'Σ' {
                    return false;
                }
                let end = at + c.len_utf8();
                if contains(&DECIMAL_DIGITS, c) {
                    self.joined.push('0');
                    at = number_end(text, at);
                    continue;
                }
                at = end;
                for lower in c.to_lowercase() {
                    if lower.is_whitespace() || is_punctuation(lower) {
                        start = self.end_word(start);
                        continue;
                    }
                    self.joined.push(lower);
                    // Nothing below À decomposes, nor do the unified ideographs.
                    self.composed |= lower >= 'À' && !('一'..='鿿').contains(&lower);
                }
            }
        }
        self.end_word(start);
        true
    }

    /// End the word that began at `start`; the start of the next.
    fn end_word(&mut self, start: usize) -> usize {
        if self.joined.len() == start {
            return start;
        }
        let Self { joined, spans, composed, word } = self;
        if *composed {
            *composed = false;
            word.clear();
            word.extend(joined[start..].nfd().filter(|&c| c < '\u{300}' || !contains(&NONSPACING_MARKS, c)));
            joined.truncate(start);
            joined.push_str(word);
            if joined.len() == start {
                return start;
            }
        }
        let mut pieces = 0usize;
        let before = spans.len();
        let mut at = start;
        english::cut(&joined[start..], |piece| {
            spans.push((at, at + piece.len()));
            // One more for the space that will follow.
            at += piece.len() + 1;
            pieces += 1;
        });
        if pieces > 1 {
            word.clear();
            word.push_str(&joined[start..]);
            joined.truncate(start);
            let mut from = 0;
            for &(a, b) in &spans[before..] {
                joined.push_str(&word[from..from + b - a]);
                joined.push(' ');
                from += b - a;
            }
        } else {
            joined.push(' ');
        }
        joined.len()
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
