//! Words of a simplified text, cut the way spaCy's English tokenizer cuts them.
//!
//! FineWeb's near-duplicate signatures are over the words of spaCy 3.8 (`spacy.blank("en")`), which
//! splits at white space and then cuts symbols, currency signs, units and contractions off. On
//! simplified text (lower case, every number `0`, no punctuation) few of its rules can fire, and
//! these are all of them; the tables below are read off its compiled rules (MIT licence), reduced to
//! what simplified text can hold.

use std::collections::HashMap;
use std::sync::LazyLock;

use crate::unicode_tables::contains;

/// Cut `word`, a maximal run of non-space characters of a simplified text, and give every piece to
/// `emit`, in order.
pub(crate) fn cut<'w>(word: &'w str, mut emit: impl FnMut(&'w str)) {
    if let Some(parts) = contraction(word) {
        return emit_parts(word, parts, &mut emit);
    }
    if word.is_ascii() {
        let (stem, unit) = word.split_at(word.len() - unit_length(word));
        emit(stem);
        if !unit.is_empty() {
            emit(unit);
        }
        return;
    }
    cut_affixes(word, &mut emit);
}

/// spaCy's loop (`Tokenizer._split_affixes`): take a mark off each end until nothing comes off or
/// a contraction is left, then cut what is left at symbols.
fn cut_affixes<'w>(word: &'w str, emit: &mut impl FnMut(&'w str)) {
    let mut rest = word;
    let mut suffixes: Vec<&'w str> = Vec::new();
    while !rest.is_empty() && contraction(rest).is_none() {
        let prefix = prefix_length(rest);
        let (front, behind) = rest.split_at(prefix);
        if prefix > 0 && contraction(behind).is_some() {
            emit(front);
            rest = behind;
            break;
        }
        // A suffix is looked for behind the prefix.
        let suffix = suffix_length(behind);
        let (before, end) = rest.split_at(rest.len() - suffix);
        if suffix > 0 && contraction(before).is_some() {
            suffixes.push(end);
            rest = before;
            break;
        }
        if prefix == 0 && suffix == 0 {
            break;
        }
        if prefix > 0 {
            emit(front);
        }
        if suffix > 0 {
            suffixes.push(end);
        }
        rest = &rest[prefix..rest.len() - suffix];
    }
    match contraction(rest) {
        Some(parts) => emit_parts(rest, parts, emit),
        None => cut_symbols(rest, emit),
    }
    suffixes.into_iter().rev().for_each(emit);
}

/// Every symbol inside a word is a word (spaCy's infixes).
fn cut_symbols<'w>(word: &'w str, emit: &mut impl FnMut(&'w str)) {
    let mut start = 0;
    for (at, c) in word.char_indices() {
        if !c.is_ascii() && contains(&SYMBOLS, c) {
            if at > start {
                emit(&word[start..at]);
            }
            start = at + c.len_utf8();
            emit(&word[at..start]);
        }
    }
    if start < word.len() {
        emit(&word[start..]);
    }
}

fn emit_parts<'w>(word: &'w str, parts: &str, emit: &mut impl FnMut(&'w str)) {
    let mut rest = word;
    for part in parts.split(' ') {
        let (piece, behind) = rest.split_at(part.len());
        emit(piece);
        rest = behind;
    }
}

/// Bytes of the mark at the front of `word`.
fn prefix_length(word: &str) -> usize {
    match word.chars().next() {
        Some(c) if c.is_ascii() => 0,
        Some(c) if c == '§' || contains(&SYMBOLS, c) || contains(&EDGE_MARKS, c) || contains(&CURRENCIES, c) => {
            c.len_utf8()
        }
        _ => 0,
    }
}

/// Bytes of the mark, currency sign or unit at the end of `word`.
fn suffix_length(word: &str) -> usize {
    let unit = unit_length(word);
    if unit > 0 {
        return unit;
    }
    let mut chars = word.chars().rev();
    match chars.next() {
        Some(c) if c.is_ascii() => 0,
        Some(c) if contains(&SYMBOLS, c) || contains(&EDGE_MARKS, c) => c.len_utf8(),
        Some(c) if chars.next() == Some('0') && contains(&CURRENCIES, c) => c.len_utf8(),
        _ => 0,
    }
}

/// Bytes of the unit at the end of `word`: all that follows its last digit, of which there is only 0.
fn unit_length(word: &str) -> usize {
    match memrchr(b'0', word.as_bytes()) {
        // Most numbers stand alone: nothing to look for.
        Some(digit) if digit + 1 < word.len() && UNITS.contains(&&word[digit + 1..]) => word.len() - digit - 1,
        _ => 0,
    }
}

fn memrchr(byte: u8, bytes: &[u8]) -> Option<usize> {
    bytes.iter().rposition(|&b| b == byte)
}

/// The parts of a contraction, separated by spaces.
fn contraction(word: &str) -> Option<&'static str> {
    /// By their letters.
    static PARTS: LazyLock<HashMap<String, &'static str>> =
        LazyLock::new(|| CONTRACTIONS.iter().map(|parts| (parts.replace(' ', ""), *parts)).collect());
    if is_rare(word.as_bytes()) { PARTS.get(word).copied() } else { None }
}

/// Whether a word may be a contraction: a filter that turns nearly all others away.
#[inline(always)]
pub(crate) fn is_rare(word: &[u8]) -> bool {
    let n = word.len();
    if !(2..=11).contains(&n) {
        return false;
    }
    let slot = slot(n, word[0], word[n - 2], word[n - 1]);
    FILTER[slot / 64] >> (slot % 64) & 1 == 1
}

/// Five bits each of the first and the last two letters of a word of `n`, stirred by its length.
const fn slot(n: usize, first: u8, last_but_one: u8, last: u8) -> usize {
    let letters = (first as usize & 31) << 10 | (last_but_one as usize & 31) << 5 | last as usize & 31;
    (letters ^ n.wrapping_mul(0x1b35)) % (64 * FILTER_WORDS)
}

const FILTER_WORDS: usize = 512;

/// A bit for every slot that a contraction has.
static FILTER: [u64; FILTER_WORDS] = {
    let mut filter = [0; FILTER_WORDS];
    let mut i = 0;
    while i < CONTRACTIONS.len() {
        let parts = CONTRACTIONS[i].as_bytes();
        let (mut letters, mut n, mut at) = ([0; 16], 0, 0);
        while at < parts.len() {
            if parts[at] != b' ' {
                letters[n] = parts[at];
                n += 1;
            }
            at += 1;
        }
        let slot = slot(n, letters[0], letters[n - 2], letters[n - 1]);
        filter[slot / 64] |= 1 << (slot % 64);
        i += 1;
    }
    filter
};

/// Symbols that are words of their own wherever they stand (spaCy: `LIST_ICONS`).
const SYMBOLS: [(u32, u32); 178] = [
    (0xa6, 0xa6),
    (0xa9, 0xa9),
    (0xae, 0xae),
    (0xb0, 0xb0),
    (0x482, 0x482),
    (0x58d, 0x58e),
    (0x60e, 0x60f),
    (0x6de, 0x6de),
    (0x6e9, 0x6e9),
    (0x6fd, 0x6fe),
    (0x7f6, 0x7f6),
    (0x9fa, 0x9fa),
    (0xb70, 0xb70),
    (0xbf3, 0xbf8),
    (0xbfa, 0xbfa),
    (0xc7f, 0xc7f),
    (0xd4f, 0xd4f),
    (0xd79, 0xd79),
    (0xf01, 0xf03),
    (0xf13, 0xf13),
    (0xf15, 0xf17),
    (0xf1a, 0xf1f),
    (0xf34, 0xf34),
    (0xf36, 0xf36),
    (0xf38, 0xf38),
    (0xfbe, 0xfc5),
    (0xfc7, 0xfcc),
    (0xfce, 0xfcf),
    (0xfd5, 0xfd8),
    (0x109e, 0x109f),
    (0x1390, 0x1399),
    (0x1940, 0x1940),
    (0x19de, 0x19ff),
    (0x1b61, 0x1b6a),
    (0x1b74, 0x1b7c),
    (0x2100, 0x2101),
    (0x2103, 0x2106),
    (0x2108, 0x2109),
    (0x2114, 0x2114),
    (0x2116, 0x2117),
    (0x211e, 0x2123),
    (0x2125, 0x2125),
    (0x2127, 0x2127),
    (0x2129, 0x2129),
    (0x212e, 0x212e),
    (0x213a, 0x213b),
    (0x214a, 0x214a),
    (0x214c, 0x214d),
    (0x214f, 0x214f),
    (0x218a, 0x218b),
    (0x2195, 0x2199),
    (0x219c, 0x219f),
    (0x21a1, 0x21a2),
    (0x21a4, 0x21a5),
    (0x21a7, 0x21ad),
    (0x21af, 0x21cc),
    (0x21d0, 0x21d1),
    (0x21d3, 0x21d3),
    (0x21d5, 0x21f3),
    (0x2300, 0x2307),
    (0x230c, 0x231f),
    (0x2322, 0x2328),
    (0x232b, 0x237b),
    (0x237d, 0x239a),
    (0x23b4, 0x23db),
    (0x23e2, 0x2426),
    (0x2440, 0x244a),
    (0x249c, 0x24b5),
    (0x24d0, 0x24e9),
    (0x2500, 0x2500),
    (0x2502, 0x25b6),
    (0x25b8, 0x25b9),
    (0x25bb, 0x25c0),
    (0x25c2, 0x25f7),
    (0x2600, 0x266e),
    (0x2670, 0x2767),
    (0x2794, 0x27bf),
    (0x2800, 0x28ff),
    (0x2b00, 0x2b2f),
    (0x2b45, 0x2b46),
    (0x2b4d, 0x2b73),
    (0x2b76, 0x2b95),
    (0x2b98, 0x2bc8),
    (0x2bca, 0x2bfe),
    (0x2ce5, 0x2cea),
    (0x2e80, 0x2e99),
    (0x2e9b, 0x2ef3),
    (0x2f00, 0x2fd5),
    (0x2ff0, 0x2ffb),
    (0x3004, 0x3004),
    (0x3012, 0x3013),
    (0x3020, 0x3020),
    (0x3036, 0x3037),
    (0x303e, 0x303f),
    (0x3190, 0x3191),
    (0x3196, 0x319f),
    (0x31c0, 0x31e3),
    (0x3200, 0x321e),
    (0x322a, 0x3247),
    (0x3250, 0x3250),
    (0x3260, 0x327f),
    (0x328a, 0x32b0),
    (0x32c0, 0x32fe),
    (0x3300, 0x33ff),
    (0x4dc0, 0x4dff),
    (0xa490, 0xa4c6),
    (0xa828, 0xa82b),
    (0xa836, 0xa837),
    (0xa839, 0xa839),
    (0xaa77, 0xaa79),
    (0xfdfd, 0xfdfd),
    (0xffe4, 0xffe4),
    (0xffe8, 0xffe8),
    (0xffed, 0xffee),
    (0xfffc, 0xfffd),
    (0x10137, 0x1013f),
    (0x10179, 0x10189),
    (0x1018c, 0x1018e),
    (0x10190, 0x1019b),
    (0x101a0, 0x101a0),
    (0x101d0, 0x101fc),
    (0x10877, 0x10878),
    (0x10ac8, 0x10ac8),
    (0x1173f, 0x1173f),
    (0x16b3c, 0x16b3f),
    (0x16b45, 0x16b45),
    (0x1bc9c, 0x1bc9c),
    (0x1d000, 0x1d0f5),
    (0x1d100, 0x1d126),
    (0x1d129, 0x1d15d),
    (0x1d16a, 0x1d16c),
    (0x1d183, 0x1d184),
    (0x1d18c, 0x1d1a9),
    (0x1d1ae, 0x1d1ba),
    (0x1d1c1, 0x1d1e8),
    (0x1d200, 0x1d241),
    (0x1d245, 0x1d245),
    (0x1d300, 0x1d356),
    (0x1d800, 0x1d9ff),
    (0x1da37, 0x1da3a),
    (0x1da6d, 0x1da74),
    (0x1da76, 0x1da83),
    (0x1da85, 0x1da86),
    (0x1ecac, 0x1ecac),
    (0x1f000, 0x1f02b),
    (0x1f030, 0x1f093),
    (0x1f0a0, 0x1f0ae),
    (0x1f0b1, 0x1f0bf),
    (0x1f0c1, 0x1f0cf),
    (0x1f0d1, 0x1f0f5),
    (0x1f110, 0x1f16b),
    (0x1f170, 0x1f1ac),
    (0x1f1e6, 0x1f202),
    (0x1f210, 0x1f23b),
    (0x1f240, 0x1f248),
    (0x1f250, 0x1f251),
    (0x1f260, 0x1f265),
    (0x1f300, 0x1f3fa),
    (0x1f400, 0x1f6d4),
    (0x1f6e0, 0x1f6ec),
    (0x1f6f0, 0x1f6f9),
    (0x1f700, 0x1f773),
    (0x1f780, 0x1f7d8),
    (0x1f800, 0x1f80b),
    (0x1f810, 0x1f847),
    (0x1f850, 0x1f859),
    (0x1f860, 0x1f887),
    (0x1f890, 0x1f8ad),
    (0x1f900, 0x1f90b),
    (0x1f910, 0x1f93e),
    (0x1f940, 0x1f970),
    (0x1f973, 0x1f976),
    (0x1f97a, 0x1f97a),
    (0x1f97c, 0x1f9a2),
    (0x1f9b0, 0x1f9b9),
    (0x1f9c0, 0x1f9c2),
    (0x1f9d0, 0x1f9ff),
    (0x1fa60, 0x1fa6d),
];

/// Marks that are cut off both ends of a word (spaCy: `LIST_PUNCT`, `LIST_QUOTES`).
const EDGE_MARKS: [(u32, u32); 14] = [
    (0xa1, 0xa1),
    (0xb7, 0xb7),
    (0xbf, 0xbf),
    (0x60c, 0x60c),
    (0x61b, 0x61b),
    (0x61f, 0x61f),
    (0x66a, 0x66a),
    (0x6d4, 0x6d4),
    (0x964, 0x964),
    (0x2018, 0x2018),
    (0x201a, 0x201a),
    (0x27e6, 0x27e7),
    (0x300e, 0x300f),
    (0x3014, 0x3015),
];

/// Currency signs: cut off the front of a word, and off its end after a digit (spaCy: `LIST_CURRENCY`).
const CURRENCIES: [(u32, u32); 5] = [(0xa3, 0xa3), (0xa5, 0xa5), (0xe3f, 0xe3f), (0x20a0, 0x20bf), (0xfdfc, 0xfdfc)];

/// Units of measure: cut off the end of a word after a digit (spaCy: `UNITS`).
const UNITS: [&str; 78] = [
    "km",
    "km²",
    "km³",
    "m",
    "m²",
    "m³",
    "dm",
    "dm²",
    "dm³",
    "cm",
    "cm²",
    "cm³",
    "mm",
    "mm²",
    "mm³",
    "ha",
    "µm",
    "nm",
    "yd",
    "in",
    "ft",
    "kg",
    "g",
    "mg",
    "µg",
    "t",
    "lb",
    "oz",
    "kmh",
    "mph",
    "mbar",
    "mb",
    "kb",
    "gb",
    "tb",
    "км",
    "км²",
    "км³",
    "м",
    "м²",
    "м³",
    "дм",
    "дм²",
    "дм³",
    "см",
    "см²",
    "см³",
    "мм",
    "мм²",
    "мм³",
    "нм",
    "кг",
    "г",
    "мг",
    "мбар",
    "кб",
    "мб",
    "гб",
    "тбكم",
    "كم²",
    "كم³",
    "م",
    "م²",
    "م³",
    "سم",
    "سم²",
    "سم³",
    "مم",
    "مم²",
    "مم³",
    "كم",
    "غرام",
    "جرام",
    "جم",
    "كغ",
    "ملغ",
    "كوب",
    "اكواب",
];

/// Words that are several, with a space where they part (spaCy: the exceptions of its English).
const CONTRACTIONS: [&str; 151] = [
    "ai nt",
    "are nt",
    "can not",
    "ca nt",
    "ca nt ve",
    "could nt",
    "could nt ve",
    "could ve",
    "dare nt",
    "did nt",
    "did nt ve",
    "does nt",
    "does nt ve",
    "do nt",
    "do nt ve",
    "gon na",
    "got ta",
    "had nt",
    "had nt ve",
    "has nt",
    "have nt",
    "he d",
    "he d ve",
    "he ll ve",
    "he s",
    "how d",
    "how d ve",
    "how ll",
    "how ll ve",
    "how re",
    "how s",
    "how ve",
    "i d",
    "i d ve",
    "i ll ve",
    "i m",
    "i m a",
    "is nt",
    "it d",
    "it d ve",
    "it ll",
    "it ll ve",
    "i ve",
    "may nt",
    "may nt ve",
    "might nt",
    "might nt ve",
    "might ve",
    "must nt",
    "must nt ve",
    "must ve",
    "need nt",
    "need nt ve",
    "not ve",
    "ought nt",
    "ought nt ve",
    "sha nt",
    "sha nt ve",
    "she d ve",
    "she ll ve",
    "she s",
    "should nt",
    "should nt ve",
    "should ve",
    "that d",
    "that d ve",
    "that ll",
    "that ll ve",
    "that s",
    "there d",
    "there d ve",
    "there ll",
    "there ll ve",
    "there re",
    "there s",
    "there ve",
    "these d",
    "these d ve",
    "these ll",
    "these ll ve",
    "these re",
    "these ve",
    "they d",
    "they d ve",
    "they ll",
    "they ll ve",
    "they re",
    "they ve",
    "this d",
    "this d ve",
    "this ll",
    "this ll ve",
    "this s",
    "those d",
    "those d ve",
    "those ll",
    "those ll ve",
    "those re",
    "those ve",
    "was nt",
    "we d",
    "we d ve",
    "we ll ve",
    "were nt",
    "we ve",
    "what d",
    "what d ve",
    "what ll",
    "what ll ve",
    "what re",
    "what s",
    "what ve",
    "when d",
    "when d ve",
    "when ll",
    "when ll ve",
    "when re",
    "when s",
    "when ve",
    "where d",
    "where d ve",
    "where ll",
    "where ll ve",
    "where re",
    "where s",
    "where ve",
    "who d",
    "who d ve",
    "who ll",
    "who ll ve",
    "who s",
    "who ve",
    "why d",
    "why d ve",
    "why ll",
    "why ll ve",
    "why re",
    "why s",
    "why ve",
    "wo nt",
    "wo nt ve",
    "would nt",
    "would nt ve",
    "would ve",
    "y all",
    "you d",
    "you d ve",
    "you ll",
    "you ll ve",
    "you re",
    "you ve",
];
