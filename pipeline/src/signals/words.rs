//! Words: maximal runs of characters that are not Unicode white space; in scripts that are written without spaces,
//! the word borders of UAX #29 within such a run.
//!
//! This is the only word segmentation of the signals. A scan over a line yields every word with what
//! the signals need to know about it (class bits, number of characters), so that no signal has to walk
//! the bytes again.

use std::sync::LazyLock;

use unicode_segmentation::UnicodeSegmentation;

/// The word has an alphabetic character (Unicode `Alphabetic`).
pub(super) const ALPHABETIC: u16 = 1;
/// The word has an alphanumeric character (`Alphabetic`, or a number of category Nd, Nl, No). A word
/// without one is a pure symbol.
pub(super) const ALPHANUMERIC: u16 = 2;
/// The word has a full stop.
pub(super) const DOT: u16 = 4;
/// The word has a number sign.
pub(super) const HASH: u16 = 8;
/// The word has an opening curly bracket.
pub(super) const CURLY: u16 = 16;
/// The word has a `j` or `J`.
pub(super) const JAY: u16 = 32;
/// The character is white space.
const SPACE: u16 = 64;
/// The byte is not ASCII.
const WIDE: u16 = 128;
/// The word has a character of Unicode `Uppercase`.
pub(super) const UPPER: u16 = 256;
/// The word has a character of Unicode `Lowercase`.
pub(super) const LOWER: u16 = 512;
/// The character is of a script that is written without spaces.
const UNSPACED: u16 = 1024;
/// The character is a number (Nd, Nl, No).
const NUMBER: u16 = 2048;
/// The character is `…`.
const ELLIPSIS: u16 = 4096;

/// Class bits of every byte.
static CLASS: [u16; 256] = classes();

const fn classes() -> [u16; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let b = byte as u8;
        table[byte] = match b {
            // U+000B (vertical tab) is white space in Unicode though not for `is_ascii_whitespace`.
            b'\t'..=b'\r' | b' ' => SPACE,
            b'j' => ALPHABETIC | ALPHANUMERIC | LOWER | JAY,
            b'J' => ALPHABETIC | ALPHANUMERIC | UPPER | JAY,
            b'a'..=b'z' => ALPHABETIC | ALPHANUMERIC | LOWER,
            b'A'..=b'Z' => ALPHABETIC | ALPHANUMERIC | UPPER,
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

/// Class bits of the characters up to U+FFFF: what the standard library says, found with one load.
static WIDE_CLASS: LazyLock<Box<[u16]>> =
    LazyLock::new(|| (0..=0xffff).map(|code| char::from_u32(code).map_or(0, wide_class)).collect());

/// Class bits of a character beyond ASCII.
fn wide_class(character: char) -> u16 {
    let bit = |is: bool, class: u16| if is { class } else { 0 };
    bit(character.is_whitespace(), SPACE)
        | bit(character.is_alphabetic(), ALPHABETIC | ALPHANUMERIC)
        | bit(character.is_numeric(), ALPHANUMERIC | NUMBER)
        | bit(character.is_uppercase(), UPPER)
        | bit(character.is_lowercase(), LOWER)
        | bit(is_unspaced(character), UNSPACED)
        | bit(character == '…', ELLIPSIS)
}

/// Chinese, Japanese, Thai, Lao, Burmese and Khmer characters.
pub(super) fn is_unspaced(character: char) -> bool {
    matches!(u32::from(character),
        0xe01..=0xe5b | 0xe81..=0xedf | 0x1000..=0x109f | 0x1780..=0x17ff | 0x3005..=0x3007 | 0x3041..=0x30ff
        | 0x31f0..=0x31ff | 0x3400..=0x4dbf | 0x4e00..=0x9fff | 0xa9e0..=0xa9fe | 0xaa60..=0xaa7f | 0xf900..=0xfaff
        | 0xff66..=0xff9f | 0x1b000..=0x1b16f | 0x20000..=0x3ffff)
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
    /// Class bits: [`ALPHABETIC`], [`ALPHANUMERIC`], [`DOT`], [`HASH`], [`CURLY`], [`JAY`], [`UPPER`], [`LOWER`].
    pub class: u16,
}

impl Word {
    /// Length in characters (Unicode scalar values).
    pub fn chars(&self) -> usize {
        self.end - self.start - self.continuation
    }
}

/// What a scan counts of the characters beyond ASCII; those of ASCII are counted by [`ascii_counts`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Scan {
    /// Bytes of the line that continue a character, so that `line.len()` minus it is its length in characters.
    pub continuation: usize,
    /// Alphanumeric characters.
    pub alphanumeric: usize,
    /// Upper-case characters.
    pub upper: usize,
    /// Numbers.
    pub numbers: usize,
}

/// Calls `visit` with every word of `line` in order.
#[inline]
pub(super) fn scan(line: &str, mut visit: impl FnMut(Word)) -> Scan {
    let wide_class_of: &[u16] = &WIDE_CLASS;
    let bytes = line.as_bytes();
    let mut counts = Scan::default();
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
            let bits = match wide_class_of.get(u32::from(character) as usize) {
                Some(bits) => *bits,
                None => wide_class(character),
            };
            if bits & SPACE != 0 {
                gap = width;
                counts.continuation += width - 1;
                break;
            }
            class |= bits;
            counts.alphanumeric += usize::from(bits & ALPHANUMERIC != 0);
            counts.upper += usize::from(bits & UPPER != 0);
            counts.numbers += usize::from(bits & NUMBER != 0);
            ellipsis_marks += u32::from(bits & ELLIPSIS != 0);
            continuation += width - 1;
            at += width;
        }
        if at > start {
            counts.continuation += continuation;
            if class & UNSPACED == 0 {
                visit(Word { start, end: at, continuation, ellipsis_marks, class });
            } else {
                pieces(line, start, at, &mut visit);
            }
        }
        at += gap;
    }
    counts
}

/// The words of `line[start..end]`, which has no white space: pieces between the word borders of UAX #29, each with
/// the symbols behind it (as punctuation stays with its word elsewhere); symbols in front are a piece of their own.
/// Ideographs and hiragana are words of one character, katakana goes in runs, a Thai consonant has its marks with it.
fn pieces(line: &str, start: usize, end: usize, visit: &mut impl FnMut(Word)) {
    let mut open: Option<Word> = None;
    for (offset, piece) in line[start..end].split_word_bound_indices() {
        let mut next = Word {
            start: start + offset,
            end: start + offset + piece.len(),
            continuation: piece.bytes().filter(|b| b & 0xc0 == 0x80).count(),
            ellipsis_marks: piece.matches('…').count() as u32,
            class: piece
                .chars()
                .fold(0, |class, c| class | if c.is_ascii() { CLASS[c as usize] } else { wide_class(c) }),
        };
        if let Some(word) = open {
            if next.class & ALPHANUMERIC == 0 {
                next.start = word.start;
                next.continuation += word.continuation;
                next.ellipsis_marks += word.ellipsis_marks;
                next.class |= word.class;
            } else {
                visit(word);
            }
        }
        open = Some(next);
    }
    if let Some(word) = open {
        visit(word);
    }
}

/// Counts of the ASCII characters of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct AsciiCounts {
    /// `A` to `Z`, `a` to `z`, `0` to `9`.
    pub alphanumeric: usize,
    /// `A` to `Z`.
    pub upper: usize,
    /// `0` to `9`.
    pub digits: usize,
    /// `{` and `}`.
    pub curly: usize,
}

/// Counts without branches, which the compiler turns into vector code.
pub(super) fn ascii_counts(bytes: &[u8]) -> AsciiCounts {
    let mut counts = AsciiCounts::default();
    // Sums of up to 255 comparisons fit a byte.
    for chunk in bytes.chunks(224) {
        let (mut lower, mut upper, mut digits, mut curly) = (0u8, 0u8, 0u8, 0u8);
        for byte in chunk {
            lower += u8::from(byte.wrapping_sub(b'a') < 26);
            upper += u8::from(byte.wrapping_sub(b'A') < 26);
            digits += u8::from(byte.wrapping_sub(b'0') < 10);
            curly += u8::from(*byte == b'{') | u8::from(*byte == b'}');
        }
        counts.alphanumeric += usize::from(lower) + usize::from(upper) + usize::from(digits);
        counts.upper += usize::from(upper);
        counts.digits += usize::from(digits);
        counts.curly += usize::from(curly);
    }
    counts
}

/// Number of `#` in a word.
pub(super) fn hash_signs(word: &[u8], class: u16) -> u64 {
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
        // Chinese, Japanese (katakana in runs), Thai, and what is mixed with them.
        assert_eq!(words("「我爱你。」 ok"), ["「", "我", "爱", "你。」", "ok"]);
        assert_eq!(words("カタカナです"), ["カタカナ", "で", "す"]);
        assert_eq!(words("iPhone的, 한국어"), ["iPhone", "的,", "한국어"]);
        assert_eq!(words("ที่นี่"), ["ที่", "นี่"]);
        assert_eq!(words("\u{200b}x"), ["\u{200b}x"], "zero width space is not white space");
        assert!(words("").is_empty());
        assert!(words(" \u{2028} ").is_empty());
    }

    #[test]
    fn a_scan_counts_characters() {
        let mut chars = Vec::new();
        let text = "naïve 日本 🙂 É٣";
        let scan = scan(text, |w| chars.push(w.chars()));
        assert_eq!(chars, [5, 1, 1, 1, 2]);
        assert_eq!(text.len() - scan.continuation, text.chars().count());
        assert_eq!((scan.alphanumeric, scan.upper, scan.numbers), (5, 1, 1));
        let ascii = ascii_counts("aB{9}-é".repeat(100).as_bytes());
        assert_eq!(ascii, AsciiCounts { alphanumeric: 300, upper: 100, digits: 100, curly: 200 });
    }

    #[test]
    fn classes_of_words() {
        let class = |word: &str| {
            let mut class = 0;
            scan(word, |w| class |= w.class);
            class
        };
        assert_eq!(class("42"), ALPHANUMERIC);
        assert_eq!(class("Ab") & (UPPER | LOWER), UPPER | LOWER);
        assert_eq!(class("ÄÖ") & (UPPER | LOWER), UPPER);
        assert_eq!(class("Ⅻ") & ALPHANUMERIC, ALPHANUMERIC);
        assert_eq!(class("é"), ALPHABETIC | ALPHANUMERIC | LOWER);
        assert_eq!(class("—•🙂|"), 0);
        assert_eq!(class("#{.J"), HASH | CURLY | DOT | JAY | UPPER | ALPHABETIC | ALPHANUMERIC);
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
