//! UTF-8 that was decoded as windows-1252 (or Latin-1) and stored as UTF-8 again.

use std::borrow::Cow;

use super::Output;

/// Deepest nesting that is undone: text that went through the mistake more than once.
const ROUNDS: usize = 3;
/// Of the sequences that begin like UTF-8, so many must be whole before any is believed.
const TRUSTED: f64 = 0.6;

/// Repairs sequences that are whole UTF-8 when taken as windows-1252 bytes, if most of the text's candidates are.
///
/// A single odd sequence is believed only when it decodes to punctuation or to a letter of Latin-1: other results are
/// as likely to be what the author wrote (`groß»` is no mojibake).
pub(super) fn repair(out: &mut Output<'_>) {
    let mut text = Cow::Borrowed(out.text());
    let mut count = 0;
    for _ in 0..ROUNDS {
        let sequences = find(&text);
        if !believable(&sequences) {
            break;
        }
        let mut round = Output::new(&text);
        for Sequence { start, end, repaired } in sequences {
            if let Some(character) = repaired {
                round.replace(start..end, character.encode_utf8(&mut [0; 4]));
            }
        }
        let Some((repaired, changes)) = round.finish() else { break };
        count += changes;
        text = Cow::Owned(repaired);
    }
    if let Cow::Owned(text) = text {
        out.become_all(text, count);
    }
}

struct Sequence {
    start: usize,
    end: usize,
    /// The character it stands for, or none where the bytes are no whole UTF-8 sequence.
    repaired: Option<char>,
}

/// Every place where two or more characters beyond ASCII begin like a UTF-8 sequence.
fn find(text: &str) -> Vec<Sequence> {
    let mut found = Vec::new();
    let bytes = text.as_bytes();
    let mut at = 0;
    // The letters that stand for lead bytes C2–F4 are U+00C2–U+00F4: C3 82–B4 in UTF-8.
    while let Some(offset) = memchr::memchr(0xc3, &bytes[at..]) {
        let start = at + offset;
        at = start + 2;
        let Some(lead) = bytes.get(start + 1).map(|b| b + 0x40).filter(|b| (0xc2..=0xf4).contains(b)) else {
            continue;
        };
        let length = match lead {
            0xf0.. => 4,
            0xe0.. => 3,
            _ => 2,
        };
        let mut raw = [lead, 0, 0, 0];
        let mut characters = text[at..].chars();
        let mut met = 1;
        while met < length {
            let Some(byte) = characters.next().and_then(byte_of).filter(|b| (0x80..=0xbf).contains(b)) else { break };
            raw[met] = byte;
            met += 1;
        }
        if met == 1 {
            // A letter with an accent and something else behind it: every French word has it.
            continue;
        }
        let end = text.len() - characters.as_str().len();
        let repaired = std::str::from_utf8(&raw[..met]).ok().filter(|_| met == length).and_then(|s| s.chars().next());
        if repaired.is_some() {
            found.push(Sequence { start, end, repaired });
            at = end;
        } else {
            found.push(Sequence { start, end: at, repaired: None });
        }
    }
    found
}

fn believable(sequences: &[Sequence]) -> bool {
    let whole = sequences.iter().filter(|s| s.repaired.is_some()).count();
    let usual = sequences
        .iter()
        .filter_map(|s| s.repaired)
        .filter(|c| matches!(u32::from(*c), 0xa0..=0xff | 0x2010..=0x2027 | 0x2030..=0x203a | 0x20ac | 0x2122));
    let usual = usual.count();
    whole > 0 && (usual > 0 || whole >= 3) && whole as f64 >= TRUSTED * sequences.len() as f64
}

/// The windows-1252 byte of a character; C1 controls stand for themselves, as browsers have it.
fn byte_of(character: char) -> Option<u8> {
    Some(match u32::from(character) {
        code @ 0x80..=0xff => code as u8,
        0x20ac => 0x80,
        0x201a => 0x82,
        0x192 => 0x83,
        0x201e => 0x84,
        0x2026 => 0x85,
        0x2020 => 0x86,
        0x2021 => 0x87,
        0x2c6 => 0x88,
        0x2030 => 0x89,
        0x160 => 0x8a,
        0x2039 => 0x8b,
        0x152 => 0x8c,
        0x17d => 0x8e,
        0x2018 => 0x91,
        0x2019 => 0x92,
        0x201c => 0x93,
        0x201d => 0x94,
        0x2022 => 0x95,
        0x2013 => 0x96,
        0x2014 => 0x97,
        0x2dc => 0x98,
        0x2122 => 0x99,
        0x161 => 0x9a,
        0x203a => 0x9b,
        0x153 => 0x9c,
        0x17e => 0x9e,
        0x178 => 0x9f,
        _ => return None,
    })
}
