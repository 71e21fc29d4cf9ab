//! Shingles of `fast` signatures, and of everything else that compares runs of words.
//!
//! Words are those of Unicode's segmentation (UAX #29) between white space, in lower case. It makes a word of every
//! ideograph and every kana, so a shingle of Chinese or Japanese text is a run of characters. Stretches
//! of ASCII are cut by the same rules with masks ([`crate::ascii`]); the rest goes through `unicode-segmentation`.
//!
//! A word is hashed eight bytes at a time, a shingle is a polynomial of its word hashes that rolls along the
//! text, so that its cost does not depend on the length of a shingle; a finaliser mixes it.

use std::ops::Range;

use pipeline::language::is_unspaced;
use unicode_segmentation::UnicodeSegmentation;

use crate::ascii::{BLOCK, Blocks};

/// Multiplier of the polynomial: odd, its powers are distinct for any practical length.
pub(crate) const POLYNOMIAL: u64 = 0x9e37_79b9_7f4a_7c15;
/// Bytes behind the text that a load of eight may touch.
const PADDING: usize = 8;

/// The words of a text as hashes, with their places, and their shingles. Memory is kept from text to text.
#[derive(Debug, Default)]
pub struct Shingles {
    cutter: Cutter,
    words: Vec<u64>,
    hashes: Vec<u64>,
}

impl Shingles {
    /// Hashes of the runs of `n` words of `text`, in order, repeats included; of all its words if there are
    /// fewer; none if there are none.
    pub fn of(&mut self, text: &str, n: usize) -> &[u64] {
        let Self { cutter, words, hashes } = self;
        words.clear();
        cutter.each_word(text, |hash, _| words.push(hash));
        hashes.clear();
        roll(words, n, hashes);
        hashes
    }

    /// What [`Self::of`] gave last.
    pub fn last(&self) -> &[u64] {
        &self.hashes
    }

    /// Hashes of the words of `text`, and the bytes that each comes from.
    pub(crate) fn words(&mut self, text: &str, places: &mut Vec<Range<usize>>) -> &[u64] {
        let Self { cutter, words, .. } = self;
        words.clear();
        places.clear();
        cutter.each_word(text, |hash, place| {
            words.push(hash);
            places.push(place);
        });
        words
    }

    /// As [`Self::of`], of the text that was cut into words last.
    pub(crate) fn again(&mut self, n: usize) -> &[u64] {
        self.hashes.clear();
        roll(&self.words, n, &mut self.hashes);
        &self.hashes
    }

    /// As [`Self::of`], and the bytes of `text` that every word comes from.
    pub fn with_places(&mut self, text: &str, n: usize, places: &mut Vec<Range<usize>>) -> &[u64] {
        self.words(text, places);
        self.again(n)
    }
}

/// Whether a word of the segmentation is a part of what people call one: one character of a script without spaces, with its
/// marks. Runs of katakana are words.
pub(crate) fn is_small_word(word: &str) -> bool {
    let is_katakana = |c| matches!(c, '\u{30a1}'..='\u{30ff}' | '\u{31f0}'..='\u{31ff}' | '\u{ff66}'..='\u{ff9f}');
    let mut chars = word.chars();
    chars.next().is_some_and(|first| is_unspaced(first) && (!is_katakana(first) || chars.next().is_none()))
}

/// Append the hash of every run of `n` words.
fn roll(words: &[u64], n: usize, hashes: &mut Vec<u64>) {
    if words.is_empty() {
        return;
    }
    let n = n.clamp(1, words.len());
    let (first, rest) = words.split_at(n);
    let mut sum = first.iter().fold(0u64, |sum, word| sum.wrapping_mul(POLYNOMIAL).wrapping_add(*word));
    let leaving = POLYNOMIAL.wrapping_pow(n as u32);
    hashes.reserve(rest.len() + 1);
    hashes.push(mix(sum));
    hashes.extend(rest.iter().zip(words).map(|(come, go)| {
        sum = sum.wrapping_mul(POLYNOMIAL).wrapping_add(*come).wrapping_sub(go.wrapping_mul(leaving));
        mix(sum)
    }));
}

/// MurmurHash3's finaliser: every bit of the result depends on every bit of `x`.
#[inline(always)]
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

/// Cuts texts into words.
#[derive(Debug, Default)]
struct Cutter {
    blocks: Blocks,
    /// A word in lower case.
    lower: Vec<u8>,
}

impl Cutter {
    /// Give `emit` the hash and the place of every word of `text`.
    fn each_word(&mut self, text: &str, mut emit: impl FnMut(u64, Range<usize>)) {
        let bytes = text.as_bytes();
        self.blocks.set(bytes);
        let mut at = 0;
        // White space always parts words, so the piece around a character beyond ASCII is on its own.
        while let Some(other) = self.blocks.next_other(at) {
            let start = bytes[at..other].iter().rposition(u8::is_ascii_whitespace).map_or(at, |n| at + n + 1);
            let end = bytes[other..].iter().position(u8::is_ascii_whitespace).map_or(bytes.len(), |n| other + n);
            self.ascii_words(at..start, &mut emit);
            self.other_words(text, start..end, &mut emit);
            at = end;
        }
        self.ascii_words(at..bytes.len(), &mut emit);
    }

    /// Words of a piece with characters beyond ASCII.
    fn other_words(&mut self, text: &str, piece: Range<usize>, emit: &mut impl FnMut(u64, Range<usize>)) {
        let lower = &mut self.lower;
        for (offset, word) in text[piece.clone()].unicode_word_indices() {
            let from = piece.start + offset;
            lower.clear();
            for c in word.chars() {
                if c.is_ascii() {
                    lower.push(c.to_ascii_lowercase() as u8);
                } else {
                    let mut utf8 = [0; 4];
                    c.to_lowercase().for_each(|c| lower.extend_from_slice(c.encode_utf8(&mut utf8).as_bytes()));
                }
            }
            let length = lower.len();
            lower.extend_from_slice(&[0; PADDING]);
            emit(word_hash(lower, 0, length), from..from + word.len());
        }
    }

    /// Words of a stretch of ASCII between white space or the ends of the text.
    fn ascii_words(&self, stretch: Range<usize>, emit: &mut impl FnMut(u64, Range<usize>)) {
        let Blocks { lower, blocks } = &self.blocks;
        let mut word = |start: usize, end: usize| {
            // Low lines alone are no word.
            if lower[start] != b'_' || lower[start..end].iter().any(u8::is_ascii_alphanumeric) {
                emit(word_hash(lower, start, end - start), start..end);
            }
        };
        let (first, last) = (stretch.start / BLOCK, stretch.end / BLOCK);
        let (mut open, mut start) = (false, 0);
        // Letters, digits and parts of words at the end of the block before.
        let (mut letter, mut digit, mut part) = (0, 0, 0);
        for n in first..=last {
            let block = &blocks[n];
            let next = blocks.get(n + 1).copied().unwrap_or_default();
            // A mark between two letters, or between two digits, joins them (UAX #29, rules WB6, WB7, WB11, WB12).
            let between = |mask: u64, before: u64, next: u64| (mask << 1 | before) & (mask >> 1 | next << 63);
            let letters = between(block.letters, letter, next.letters) & (block.dots | block.colons);
            let digits = between(block.digits, digit, next.digits) & (block.dots | block.commas);
            let mut parts = block.letters | block.digits | block.low_lines | letters | digits;
            if n == first {
                parts &= u64::MAX << (stretch.start % BLOCK);
            }
            if n == last {
                parts &= !(u64::MAX << (stretch.end % BLOCK));
            }
            let mut edges = parts ^ (parts << 1 | part);
            (letter, digit, part) = (block.letters >> 63, block.digits >> 63, parts >> 63);
            while edges != 0 {
                let at = n * BLOCK + edges.trailing_zeros() as usize;
                edges &= edges - 1;
                if open {
                    word(start, at);
                }
                open = !open;
                start = at;
            }
        }
    }
}

/// Hash of `length` bytes from `start`; [`PADDING`] bytes lie behind them.
#[inline(always)]
fn word_hash(bytes: &[u8], start: usize, length: usize) -> u64 {
    let load = |at: usize| {
        let eight: [u8; 8] = bytes[at..at + 8].try_into().unwrap_or_default();
        u64::from_le_bytes(eight)
    };
    let step = |hash: u64, eight: u64| {
        let product = u128::from(hash ^ eight) * 0xa076_1d64_78bd_642f;
        (product as u64) ^ (product >> 64) as u64
    };
    let mut hash = 0xe703_7ed1_a0b4_28db ^ length as u64;
    let (mut at, mut left) = (start, length);
    while left > 8 {
        hash = step(hash, load(at));
        at += 8;
        left -= 8;
    }
    let mask = u64::MAX >> (64 - 8 * left.max(1));
    step(hash, load(at) & mask)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn single_characters_of_scripts_without_spaces_are_small_words() {
        let mut places = Vec::new();
        let mut small = |text: &str| {
            Shingles::default().words(text, &mut places);
            places.iter().map(|place| is_small_word(&text[place.start..place.end])).collect::<Vec<_>>()
        };
        assert_eq!(small("日本の a"), [true, true, true, false]);
        assert_eq!(small("カタカナ"), [false], "a run of katakana is a word");
        assert!(small("ภาษาไทย").iter().all(|small| *small));
        // The ideograph for nothing, one with a selector of its form, a kana with its mark, and letters that Burmese has further on.
        assert_eq!(small("二〇 葛\u{e0100} か\u{3099}"), [true; 4]);
        assert_eq!(small("\u{aa60}"), [true]);
        assert_eq!(small("한국어 слово ελ x1"), [false; 4]);
    }

    /// Places and hashes by the segmentation crate alone.
    fn plain(text: &str) -> Vec<(u64, Range<usize>)> {
        let hash = |word: &str| {
            let mut lower: Vec<u8> = word.chars().flat_map(char::to_lowercase).collect::<String>().into_bytes();
            let length = lower.len();
            lower.extend_from_slice(&[0; PADDING]);
            word_hash(&lower, 0, length)
        };
        // White space first: a mark behind a space belongs to no word before it.
        let pieces = text.split_ascii_whitespace();
        let at = |piece: &str| piece.as_ptr() as usize - text.as_ptr() as usize;
        pieces
            .flat_map(|piece| piece.unicode_word_indices().map(move |(offset, word)| (at(piece) + offset, word)))
            .map(|(at, word)| (hash(word), at..at + word.len()))
            .collect()
    }

    fn words(text: &str) -> Vec<(u64, Range<usize>)> {
        let mut words = Vec::new();
        Cutter::default().each_word(text, |hash, place| words.push((hash, place)));
        words
    }

    proptest! {
        #[test]
        fn ascii_is_cut_as_unicode_says(text in r"[ -~\n]{0,60}", marks in "[a1_.:,;' ]{0,40}") {
            prop_assert_eq!(words(&text), plain(&text), "{}", text);
            prop_assert_eq!(words(&marks), plain(&marks), "{}", marks);
        }

        #[test]
        fn any_text_is_cut_as_unicode_says(text in r"(\PC|[ \n\r\t]){0,80}", n in 0usize..400) {
            let text = format!("{}{text}", "pad ".repeat(n));
            prop_assert_eq!(words(&text), plain(&text), "{}", text);
        }

        #[test]
        fn a_shingle_is_its_words(picked in prop::collection::vec(0usize..4, 1..30), n in 1usize..8) {
            let word = |i: &usize| ["a", "bb", "longer.than-eight", "ünï"][*i];
            let text = picked.iter().map(word).collect::<Vec<_>>().join(" ");
            let mut shingles = Shingles::default();
            let all = shingles.of(&text, n).to_vec();
            let words: Vec<u64> = words(&text).into_iter().map(|(hash, _)| hash).collect();
            let windows: Vec<&[u64]> = words.windows(n.min(words.len())).collect();
            prop_assert_eq!(all.len(), windows.len());
            for (hash, window) in all.iter().zip(&windows) {
                let sum = window.iter().fold(0u64, |sum, word| sum.wrapping_mul(POLYNOMIAL).wrapping_add(*word));
                prop_assert_eq!(*hash, mix(sum));
            }
        }
    }

    #[test]
    fn words_of_several_scripts() {
        let text = "Don't pay 3.14 to a.b, l'Été costs 1,000_x: 東京タワー です";
        let found: Vec<&str> = words(text).into_iter().map(|(_, place)| &text[place]).collect();
        assert_eq!(
            found,
            ["Don't", "pay", "3.14", "to", "a.b", "l'Été", "costs", "1,000_x", "東", "京", "タワー", "で", "す"]
        );
        let mut shingles = Shingles::default();
        assert_eq!(shingles.of("", 5), [0u64; 0]);
        assert_eq!(shingles.of("one two", 5).len(), 1);
        assert_eq!(shingles.of("ONE, two!", 5).to_vec(), shingles.of("one two", 5).to_vec());
        assert_ne!(shingles.of("one two", 5).to_vec(), shingles.of("two one", 5).to_vec());
    }
}
