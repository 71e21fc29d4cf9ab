//! Words: maximal runs of characters that are not Unicode white space.
//!
//! This is the only word segmentation of the signals. A scan over a line yields every word with what
//! the signals need to know about it (class bits, number of characters), so that no signal has to walk
//! the bytes again.

/// The word has an alphabetic character (Unicode `Alphabetic`).
pub(super) const ALPHABETIC: u8 = 1;
/// The word has an alphanumeric character (`Alphabetic`, or a number of category Nd, Nl, No). A word
/// without one is a pure symbol.
pub(super) const ALPHANUMERIC: u8 = 2;
/// The word has a full stop.
pub(super) const DOT: u8 = 4;
/// The word has a number sign.
pub(super) const HASH: u8 = 8;
/// The word has an opening curly bracket.
pub(super) const CURLY: u8 = 16;
/// The word has a `j` or `J`.
pub(super) const JAY: u8 = 32;
/// The byte is ASCII white space.
const SPACE: u8 = 64;
/// The byte is not ASCII.
const WIDE: u8 = 128;

/// Class bits of every byte.
static CLASS: [u8; 256] = classes();

const fn classes() -> [u8; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let b = byte as u8;
        table[byte] = match b {
            // U+000B (vertical tab) is white space in Unicode though not for `is_ascii_whitespace`.
            b'\t'..=b'\r' | b' ' => SPACE,
            b'j' | b'J' => ALPHABETIC | ALPHANUMERIC | JAY,
            b'a'..=b'z' | b'A'..=b'Z' => ALPHABETIC | ALPHANUMERIC,
            b'0'..=b'9' => ALPHANUMERIC,
            b'.' => DOT,
            b'#' => HASH,
            b'{' => CURLY,
            0x80..=0xff => WIDE,
            _ => 0,
        };
        byte += 1;
    }
    table
}

/// A word of a line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Word {
    /// First byte of the word in its line.
    pub start: usize,
    /// First byte after the word in its line.
    pub end: usize,
    /// Bytes of the word that continue a character: `end - start - continuation` is its length in
    /// characters.
    pub continuation: usize,
    /// Number of `…` (U+2026) in the word.
    pub ellipsis_marks: u32,
    /// Class bits: [`ALPHABETIC`], [`ALPHANUMERIC`], [`DOT`], [`HASH`], [`CURLY`], [`JAY`].
    pub class: u8,
}

impl Word {
    /// Length in characters (Unicode scalar values).
    pub fn chars(&self) -> usize {
        self.end - self.start - self.continuation
    }
}

/// Calls `visit` with every word of `line` in order. Returns the number of bytes of `line` that continue
/// a character, so that `line.len()` minus it is the length of the line in characters.
#[inline]
pub(super) fn scan(line: &str, mut visit: impl FnMut(Word)) -> usize {
    let bytes = line.as_bytes();
    let mut continuation_in_line = 0;
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        let mut class = 0;
        let mut continuation = 0;
        let mut ellipsis_marks = 0;
        // Bytes of the white space character that ends the word.
        let mut gap = 1;
        while at < bytes.len() {
            let bits = CLASS[bytes[at] as usize];
            if bits & (SPACE | WIDE) == 0 {
                class |= bits;
                at += 1;
                continue;
            }
            if bits & SPACE != 0 {
                break;
            }
            let Some(character) = line.get(at..).and_then(|rest| rest.chars().next()) else {
                break;
            };
            let width = character.len_utf8();
            if character.is_whitespace() {
                gap = width;
                continuation_in_line += width - 1;
                break;
            }
            if class & ALPHABETIC == 0 && character.is_alphabetic() {
                class |= ALPHABETIC | ALPHANUMERIC;
            }
            if class & ALPHANUMERIC == 0 && character.is_numeric() {
                class |= ALPHANUMERIC;
            }
            ellipsis_marks += u32::from(character == '…');
            continuation += width - 1;
            at += width;
        }
        if at > start {
            continuation_in_line += continuation;
            visit(Word { start, end: at, continuation, ellipsis_marks, class });
        }
        at += gap;
    }
    continuation_in_line
}

/// Number of `#` in a word.
pub(super) fn hash_signs(word: &[u8], class: u8) -> u64 {
    if class & HASH == 0 {
        return 0;
    }
    word.iter().filter(|b| **b == b'#').count() as u64
}

/// Number of ellipses in a word: `...` counted without overlap from the left, and every `…`.
pub(super) fn ellipses(word: &[u8], found: &Word) -> u64 {
    let mut count = u64::from(found.ellipsis_marks);
    if found.class & DOT != 0 && word.len() >= 3 {
        let mut run = 0;
        for byte in word {
            run = if *byte == b'.' { run + 1 } else { 0 };
            if run == 3 {
                count += 1;
                run = 0;
            }
        }
    }
    count
}

/// The eight English stop words of Gopher (Rae et al. 2021, A.1.1), compared exactly, case included, with
/// a whole word. Returns a bit per stop word, 0 for any other word.
pub(super) fn stop_word(word: &[u8]) -> u8 {
    match word {
        b"the" => 1,
        b"be" => 2,
        b"to" => 4,
        b"of" => 8,
        b"and" => 16,
        b"that" => 32,
        b"have" => 64,
        b"with" => 128,
        _ => 0,
    }
}

/// Characters that may close a quotation or a bracket behind the mark that ends a sentence.
const CLOSERS: [char; 8] = ['"', '\'', ')', ']', '}', '”', '’', '»'];

/// Titles and Latin shorthand whose full stop does not end a sentence.
const ABBREVIATIONS: [&str; 22] = [
    "Mr", "Mrs", "Ms", "Dr", "Prof", "St", "Sr", "Jr", "Gen", "Col", "Capt", "Lt", "Rev", "Hon", "Gov", "Sen", "Rep",
    "Fig", "Eq", "Vol", "vs", "cf",
];

/// Whether the sentence ends with this word: behind closing quotes and brackets stands one of `. ? !`,
/// which is not part of an ellipsis and does not abbreviate. Abbreviations are single letters joined by
/// full stops (`J.`, `e.g.`, `U.S.`) and a fixed list of titles (`Dr.`, `Prof.`, …).
pub(super) fn ends_sentence(word: &str) -> bool {
    let Some(last) = word.as_bytes().last() else {
        return false;
    };
    // Nearly every word ends here: only a mark, an ASCII closer or the last byte of a wide closer goes on.
    if !matches!(last, b'.' | b'?' | b'!' | b'"' | b'\'' | b')' | b']' | b'}' | 0x9d | 0x99 | 0xbb) {
        return false;
    }
    let core = word.trim_end_matches(CLOSERS);
    let Some(stem) = core.strip_suffix('.') else {
        return core.ends_with(['?', '!']);
    };
    if stem.ends_with("..") {
        return false;
    }
    let stem = stem.trim_start_matches(|c: char| !c.is_alphanumeric());
    !ABBREVIATIONS.contains(&stem) && !is_initials(stem)
}

/// `J`, `U.S`, `e.g`: single letters joined by full stops.
fn is_initials(stem: &str) -> bool {
    let mut letter_expected = true;
    for character in stem.chars() {
        if letter_expected != character.is_alphabetic() || (!letter_expected && character != '.') {
            return false;
        }
        letter_expected = !letter_expected;
    }
    !letter_expected
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        let mut out = Vec::new();
        scan(line, |w| out.push(line[w.start..w.end].to_owned()));
        out
    }

    #[test]
    fn words_are_split_by_unicode_white_space() {
        assert_eq!(words("  a\u{a0}bc\u{3000}d\u{85}\u{2003}e\u{b}f \t"), ["a", "bc", "d", "e", "f"]);
        assert_eq!(words("one-word,still"), ["one-word,still"]);
        assert_eq!(words("\u{200b}x"), ["\u{200b}x"], "zero width space is not white space");
        assert!(words("").is_empty());
        assert!(words(" \u{2028} ").is_empty());
    }

    #[test]
    fn a_scan_counts_characters() {
        let mut chars = Vec::new();
        let continuation = scan("naïve 日本 🙂", |w| chars.push(w.chars()));
        assert_eq!(chars, [5, 2, 1]);
        assert_eq!("naïve 日本 🙂".len() - continuation, "naïve 日本 🙂".chars().count());
    }

    #[test]
    fn classes_of_words() {
        let class = |word: &str| {
            let mut class = 0;
            scan(word, |w| class |= w.class);
            class
        };
        assert_eq!(class("42"), ALPHANUMERIC);
        assert_eq!(class("Ⅻ") & ALPHANUMERIC, ALPHANUMERIC);
        assert_eq!(class("é"), ALPHABETIC | ALPHANUMERIC);
        assert_eq!(class("—•🙂|"), 0);
        assert_eq!(class("#{.J"), HASH | CURLY | DOT | JAY | ALPHABETIC | ALPHANUMERIC);
    }

    #[test]
    fn ellipses_do_not_overlap() {
        let count = |word: &str| {
            let mut n = 0;
            scan(word, |w| n += ellipses(word.as_bytes(), &w));
            n
        };
        assert_eq!(count("wait..."), 1);
        assert_eq!(count("....."), 1);
        assert_eq!(count("......"), 2);
        assert_eq!(count("a…b…..."), 3);
        assert_eq!(count(".. ."), 0);
    }

    #[test]
    fn sentence_ends() {
        for word in ["end.", "end?", "end!", "end.\"", "(end.)", "end?!", "end.”", "etc.", "1999.", "?", "no.»"] {
            assert!(ends_sentence(word), "{word}");
        }
        for word in ["end", "end,", "end...", "Dr.", "(Dr.", "J.", "U.S.", "e.g.", "\"", "end…", ".\".x", "c.f,"] {
            assert!(!ends_sentence(word), "{word}");
        }
    }
}
