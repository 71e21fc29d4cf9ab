//! Words: maximal runs of characters that are not Unicode white space; in scripts that are written without spaces,
//! the word borders of UAX #29 within such a run.
//!
//! This is the only word segmentation of the signals. A scan over a line yields every word with what
//! the signals need to know about it (class bits, number of characters), so that no signal has to walk
//! the bytes again. Where most words are short and ASCII, [`Spaces`] finds them without a branch for each byte and
//! [`Short`] holds each in two registers; what is longer or wider within a run of [`Spaces::runs`] is scanned.

use std::ops::Range;
use std::sync::LazyLock;

use unicode_segmentation::UnicodeSegmentation;
use xxhash_rust::xxh3::xxh3_64;

use crate::language::is_unspaced;

/// The word has an alphabetic character (Unicode `Alphabetic`).
pub(super) const ALPHABETIC: u16 = 1;
/// The word has an alphanumeric character (`Alphabetic`, or a number of category Nd, Nl, No). A word
/// without one is a pure symbol.
pub(super) const ALPHANUMERIC: u16 = 2;
/// The word has a character of ASCII that is neither a letter nor a digit (nor U+0000).
pub(super) const SIGN: u16 = 4;
/// The word has a full stop.
pub(super) const DOT: u16 = 8;
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
/// The word has a `…`.
pub(super) const ELLIPSIS: u16 = 4096;

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
            b'.' => SIGN | DOT,
            0x80..=0xff => WIDE,
            // What fills up a word in registers.
            0 => 0,
            _ => SIGN,
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

/// A word of a line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Word {
    /// First byte of the word in its line.
    pub start: usize,
    /// First byte after the word in its line.
    pub end: usize,
    /// Class bits: [`ALPHABETIC`], [`ALPHANUMERIC`], [`SIGN`], [`DOT`], [`JAY`], [`UPPER`], [`LOWER`], [`ELLIPSIS`].
    pub class: u16,
}

/// What a scan counts of the characters beyond ASCII; those of ASCII are counted byte by byte elsewhere.
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

impl Scan {
    /// Adds what a scan of another piece has counted.
    pub fn add(&mut self, other: Self) {
        self.continuation += other.continuation;
        self.alphanumeric += other.alphanumeric;
        self.upper += other.upper;
        self.numbers += other.numbers;
    }
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
            continuation += width - 1;
            at += width;
        }
        if at > start {
            counts.continuation += continuation;
            if class & UNSPACED == 0 {
                visit(Word { start, end: at, class });
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
        let mut next =
            Word { start: start + offset, end: start + offset + piece.len(), class: class_and_chars(piece).0 };
        if let Some(word) = open {
            if next.class & ALPHANUMERIC == 0 {
                next.start = word.start;
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

/// Where the ASCII white space of a text is: one bit for every byte.
#[derive(Debug, Default)]
pub(super) struct Spaces(Vec<u64>);

impl Spaces {
    /// Looks at all bytes of a text.
    pub fn look(&mut self, text: &[u8]) {
        /// Blocks kept for the next text; a longer one gives its memory back.
        const KEEP: usize = 1 << 16;
        self.0.clear();
        self.0.shrink_to(KEEP);
        // One block more than the text may have, so that every run ends within a block.
        self.0.reserve(text.len() / 64 + 1);
        let (blocks, rest) = text.as_chunks::<64>();
        self.0.extend(blocks.iter().map(space_bits));
        let mut last = [b' '; 64];
        last[..rest.len()].copy_from_slice(rest);
        self.0.push(space_bits(&last));
    }

    /// Calls `visit` with first byte and end of every maximal run of bytes without ASCII white space in `range` of the
    /// text, in order.
    #[inline]
    pub fn runs(&self, range: Range<usize>, mut visit: impl FnMut(usize, usize)) {
        let mut start = range.start;
        // Whether a run goes on from the block before.
        let mut open = false;
        for block in range.start / 64..range.end / 64 + 1 {
            let first = block * 64;
            let mut ink = !self.0[block];
            if first < range.start {
                ink &= u64::MAX << (range.start - first);
            }
            if range.end - first < 64 {
                ink &= (1u64 << (range.end - first)) - 1;
            }
            let behind = ink << 1 | u64::from(open);
            let mut starts = ink & !behind;
            let mut ends = behind & !ink;
            // A start that is not there gives a number that nobody looks at: a branch for it would cost more.
            let mut next_start = || {
                let at = first + starts.trailing_zeros() as usize;
                starts &= starts.wrapping_sub(1);
                at
            };
            if !open {
                start = next_start();
            }
            while ends != 0 {
                visit(start, first + ends.trailing_zeros() as usize);
                ends &= ends - 1;
                start = next_start();
            }
            open = ink >> 63 == 1;
        }
    }
}

/// A byte of 1 in every place.
const ONES: u64 = 0x0101_0101_0101_0101;
/// The high bit of every byte.
const HIGH: u64 = 0x80 * ONES;

/// One bit for every byte: set where it is U+0009 to U+000D or U+0020. Eight bytes at a time.
#[inline]
fn space_bits(block: &[u8; 64]) -> u64 {
    const LOW: u64 = 0x7f * ONES;
    let mut bits = 0;
    for (number, eight) in block.as_chunks::<8>().0.iter().enumerate() {
        let bytes = u64::from_le_bytes(*eight);
        // High bits of the bytes that are not U+0020, of those from U+0009 on, and of those from U+000E on (the
        // latter two of the low seven bits alone).
        let other = bytes ^ (0x20 * ONES);
        let not_blank = ((other & LOW) + LOW) | other;
        let from_tab = (bytes & LOW) + (0x80 - 0x09) * ONES;
        let behind = (bytes & LOW) + (0x80 - 0x0e) * ONES;
        let spaces = (!not_blank | (from_tab & !behind & !bytes)) & HIGH;
        // The product brings the eight bits together in the highest byte.
        bits |= ((spaces >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * number);
    }
    bits
}

/// Class bits of a word, as [`scan`] gives them, and its length in characters.
pub(super) fn class_and_chars(word: &str) -> (u16, usize) {
    word.chars().fold((0, 0), |(class, chars), character| {
        let bits = if character.is_ascii() {
            CLASS[character as usize]
        } else {
            WIDE_CLASS.get(character as usize).copied().unwrap_or_else(|| wide_class(character))
        };
        (class | bits, chars + 1)
    })
}

/// The bytes of two registers that a word of so many bytes has.
static MASKS: [(u64, u64); 17] = {
    let mut masks = [(0, 0); 17];
    let mut len = 0;
    while len <= 16 {
        let mask = if len == 16 { u128::MAX } else { (1u128 << (8 * len)) - 1 };
        masks[len] = (mask as u64, (mask >> 64) as u64);
        len += 1;
    }
    masks
};

/// A word of up to 16 bytes in two registers, with zeros behind it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Short {
    low: u64,
    high: u64,
    len: usize,
}

impl Short {
    /// The word `text[from..to]`, if it is short.
    #[inline]
    pub fn of(text: &[u8], from: usize, to: usize) -> Option<Self> {
        let len = to - from;
        let (low, high) = *MASKS.get(len)?;
        let bytes = match text.get(from..).and_then(<[u8]>::first_chunk::<16>) {
            Some(bytes) => *bytes,
            None => Self::last(&text[from..to]),
        };
        let bytes = u128::from_le_bytes(bytes);
        Some(Self { low: bytes as u64 & low, high: (bytes >> 64) as u64 & high, len })
    }

    /// A word at the end of a text, which has no 16 bytes from there on.
    #[cold]
    fn last(word: &[u8]) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..word.len()].copy_from_slice(word);
        bytes
    }

    /// Whether all of it is ASCII.
    #[inline]
    pub fn is_ascii(self) -> bool {
        (self.low | self.high) & HIGH == 0
    }

    /// As [`hash`].
    #[inline]
    pub fn hash(self) -> u64 {
        // wyhash's way with short keys: a product of both halves, and another one of the halves of that.
        let product = u128::from(self.low ^ 0x2d35_8dcc_aa6c_78a5) * u128::from(self.high ^ 0x8bb8_4b93_962e_acc9);
        let (low, high) = (product as u64, (product >> 64) as u64);
        let product =
            u128::from(low ^ 0x4b33_a62e_d433_d4a3 ^ self.len as u64) * u128::from(high ^ 0x4d5a_2da5_1de1_aa47);
        product as u64 ^ (product >> 64) as u64
    }

    /// As [`super::c4::may_end_phrase`].
    #[inline]
    pub fn may_end_phrase(self) -> bool {
        super::c4::begins_as_last_word(self.low)
    }

    /// Whether two full stops stand together in an ASCII word.
    #[inline]
    pub fn has_two_full_stops(self) -> bool {
        // A byte of a word is a full stop where this is 0, and no sum of an ASCII byte reaches beyond its own.
        let stops = |half: u64| !((half ^ (u64::from(b'.') * ONES)) + 0x7f * ONES) & HIGH;
        let (low, high) = (stops(self.low), stops(self.high));
        (low & low >> 8) | (high & high >> 8) | (low >> 56 & high) != 0
    }

    /// Class bits of an ASCII word.
    #[inline]
    pub fn class(self) -> u16 {
        // Zeros have no class, so all sixteen bytes are looked up, whatever the length.
        let class = |half: u64| half.to_le_bytes().iter().fold(0, |class, byte| class | CLASS[*byte as usize]);
        class(self.low) | class(self.high)
    }
}

/// What words are compared by: 64 bits of a hash of its own for words of up to 16 bytes, XXH3 for longer ones.
#[inline]
pub(super) fn hash(word: &[u8]) -> u64 {
    hash_within(word, 0, word.len())
}

/// [`hash`] of `text[from..to]`: faster where the text goes on behind the word.
#[inline]
pub(super) fn hash_within(text: &[u8], from: usize, to: usize) -> u64 {
    match Short::of(text, from, to) {
        Some(short) => short.hash(),
        None => xxh3_64(&text[from..to]),
    }
}

/// Upper-case letters and digits of ASCII in a line: without branches, which the compiler turns into vector code.
pub(super) fn ascii_upper_and_digits(line: &[u8]) -> (usize, usize) {
    let mut counts = (0, 0);
    // Sums of up to 255 comparisons fit a byte.
    for chunk in line.chunks(224) {
        let (mut upper, mut digits) = (0u8, 0u8);
        for byte in chunk {
            upper += u8::from(byte.wrapping_sub(b'A') < 26);
            digits += u8::from(byte.wrapping_sub(b'0') < 10);
        }
        counts.0 += usize::from(upper);
        counts.1 += usize::from(digits);
    }
    counts
}

/// Number of ellipses in a word: `...` counted without overlap from the left, and every `…`.
pub(super) fn ellipses(word: &[u8]) -> u64 {
    let mut count = 0;
    let mut run = 0;
    for (at, byte) in word.iter().enumerate() {
        run = if *byte == b'.' { run + 1 } else { 0 };
        if run == 3 {
            count += 1;
            run = 0;
        }
        count += u64::from(*byte == 0xe2 && word[at..].starts_with("…".as_bytes()));
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
    // So does a long word of plain letters with a full stop behind it: nearly every one that ends a sentence.
    if let Some((b'.', [.., a, b, c, d, e])) = word.as_bytes().split_last()
        && [a, b, c, d, e].iter().all(|byte| byte.is_ascii_alphanumeric())
    {
        return true;
    }
    let core = word.trim_end_matches(CLOSERS);
    let Some(stem) = core.strip_suffix('.') else {
        return core.ends_with(['?', '!']);
    };
    if stem.ends_with("..") {
        return false;
    }
    let stem = stem.trim_start_matches(|c: char| !c.is_alphanumeric());
    !(stem.len() <= 4 && ABBREVIATIONS.contains(&stem) || is_initials(stem))
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
        let scan = scan(text, |w| chars.push(class_and_chars(&text[w.start..w.end]).1));
        assert_eq!(chars, [5, 1, 1, 1, 2]);
        assert_eq!(text.len() - scan.continuation, text.chars().count());
        assert_eq!((scan.alphanumeric, scan.upper, scan.numbers), (5, 1, 1));
        assert_eq!(ascii_upper_and_digits("aBC{9}-é".repeat(100).as_bytes()), (200, 100));
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
        assert_eq!((class("—•🙂"), class("a|") & SIGN), (0, SIGN));
        assert_eq!(class("#{.J"), SIGN | DOT | JAY | UPPER | ALPHABETIC | ALPHANUMERIC);
        assert_eq!(class("…"), ELLIPSIS);
        for word in ["", "a", "\0", "b\0", "{J.}", "0123456789abcdeF"] {
            assert_eq!(Short::of(word.as_bytes(), 0, word.len()).unwrap().class(), class(word), "{word}");
        }
    }

    #[test]
    fn runs_are_what_ascii_white_space_parts() {
        let pieces =
            ["a", "bc", "é", "\u{a0}", "x".repeat(63).as_str(), "y".repeat(64).as_str(), "z".repeat(130).as_str()]
                .map(str::to_owned);
        let gaps = [" ", "\t", "\n\r", "\u{b}\u{c}", "  ", "\u{1c}"].map(str::to_owned);
        let mut spaces = Spaces::default();
        let mut state = 1u64;
        let mut pick = |from: &[String]| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            from[(state >> 33) as usize % from.len()].clone()
        };
        for length in 0..200 {
            let text: String = (0..length)
                .map(|n| pick(if n % 2 == length % 2 { gaps.as_slice() } else { pieces.as_slice() }))
                .collect();
            spaces.look(text.as_bytes());
            for range in [0..text.len(), text.len() / 3..text.len() / 2, text.len()..text.len()] {
                let mut found = Vec::new();
                spaces.runs(range.clone(), |from, to| found.push(&text.as_bytes()[from..to]));
                let space = |b: &u8| matches!(b, 9..=13 | 32);
                let expected: Vec<&[u8]> =
                    text.as_bytes()[range.clone()].split(space).filter(|run| !run.is_empty()).collect();
                assert_eq!(found, expected, "{text:?} {range:?}");
            }
        }
        let all: Vec<u8> = (0..=255).collect();
        spaces.look(&all);
        for byte in 0..=255u8 {
            let found = spaces.0[usize::from(byte) / 64] >> (byte % 64) & 1 == 1;
            assert_eq!(found, byte.is_ascii() && char::from(byte).is_whitespace(), "{byte}");
        }
    }

    #[test]
    fn a_hash_is_of_the_word_alone() {
        let text = b"one two on two sixteen-letters. seventeen-letters two";
        assert_eq!(hash_within(text, 4, 7), hash(b"two"));
        assert_eq!(hash_within(text, 11, 14), hash(b"two"));
        assert_eq!(hash_within(text, text.len() - 3, text.len()), hash(b"two"));
        assert_eq!(hash_within(text, 15, 31), hash(b"sixteen-letters."));
        assert_eq!(hash_within(text, 32, 49), hash(b"seventeen-letters"));
        // Words of zeros differ by their length, and no two of very many words meet.
        let mut hashes: Vec<u64> = (0..=20).map(|n| hash(&vec![0; n])).collect();
        for n in 0..400_000u32 {
            hashes.extend([hash(n.to_string().as_bytes()), hash(format!("prefix-{n:x}").as_bytes())]);
        }
        hashes.sort_unstable();
        let before = hashes.len();
        hashes.dedup();
        assert_eq!(hashes.len(), before);
    }

    #[test]
    fn ellipses_do_not_overlap() {
        let count = |word: &str| {
            let mut n = 0;
            scan(word, |w| n += ellipses(&word.as_bytes()[w.start..w.end]));
            n
        };
        assert_eq!(count("wait..."), 1);
        assert_eq!(count("....."), 1);
        assert_eq!(count("......"), 2);
        assert_eq!(count("a…b…..."), 3);
        assert_eq!(count(".. ."), 0);
    }

    #[test]
    fn two_full_stops_of_a_short_word() {
        for at in 0..16 {
            for word in [".", "..", "a.b", "...", ".a."] {
                let word = format!("{}{word}", "x".repeat(at));
                let Some(short) = Short::of(word.as_bytes(), 0, word.len()) else { continue };
                assert_eq!(short.has_two_full_stops(), word.contains(".."), "{word}");
            }
        }
    }

    #[test]
    fn sentence_ends() {
        for word in [
            "end.", "end?", "end!", "end.\"", "(end.)", "end?!", "end.”", "etc.", "1999.", "?", "no.»", "words.",
            "a-bcdef.", "J.Capts.",
        ] {
            assert!(ends_sentence(word), "{word}");
        }
        for word in ["end", "end,", "end...", "Dr.", "(Dr.", "J.", "U.S.", "e.g.", "\"", "end…", ".\".x", "c.f,"] {
            assert!(!ends_sentence(word), "{word}");
        }
    }
}
