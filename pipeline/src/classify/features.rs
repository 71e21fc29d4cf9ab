//! From a text to hashed features: n-grams of its words.

use xxhash_rust::xxh3::xxh3_64;

/// Words of a text that are looked at; what follows says little that is new.
pub(super) const MAX_WORDS: usize = 2000;

/// Calls `visit` with the number, below 2^`bits`, of every n-gram of up to `ngrams` words. Words are what white space
/// parts, without punctuation at their ends, in lower case; characters of scripts without spaces are words each.
pub(super) fn for_each(text: &str, ngrams: usize, bits: u32, buffer: &mut Vec<u64>, mut visit: impl FnMut(u32)) {
    buffer.clear();
    let mut lower = String::new();
    'text: for run in text.split_whitespace() {
        let core = run.trim_matches(|c: char| !c.is_alphanumeric());
        if core.is_empty() {
            continue;
        }
        lower.clear();
        if core.is_ascii() {
            lower.push_str(core);
            lower.make_ascii_lowercase();
        } else {
            lower.extend(core.chars().flat_map(char::to_lowercase));
        }
        // Not `language::is_unspaced`: the weights of a model are of the words that it was trained with, so these ranges are part of
        // its format (`FULGLIN1`) and stay as they are whatever becomes of those.
        let unspaced = |c: char| matches!(u32::from(c), 0xe00..=0xeff | 0x1000..=0x109f | 0x1780..=0x17ff | 0x3040..=0x30ff | 0x3400..=0x9fff | 0x20000..=0x3ffff);
        if lower.contains(unspaced) {
            for character in lower.chars().filter(|c| c.is_alphanumeric()) {
                buffer.push(xxh3_64(character.encode_utf8(&mut [0; 4]).as_bytes()));
                if buffer.len() >= MAX_WORDS {
                    break 'text;
                }
            }
        } else {
            buffer.push(xxh3_64(lower.as_bytes()));
        }
        if buffer.len() >= MAX_WORDS {
            break;
        }
    }
    for first in 0..buffer.len() {
        let mut hash = 0u64;
        for word in &buffer[first..buffer.len().min(first + ngrams)] {
            hash = (hash.rotate_left(25) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            visit((hash >> (64 - bits)) as u32);
        }
    }
}
