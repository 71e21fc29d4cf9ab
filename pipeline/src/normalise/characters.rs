//! Parts that look at single characters: controls, zero-width ones, composition, special ones.

use std::ops::Range;

use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use super::{Output, is_protected};

/// Control characters (but tab and newline) and noncharacters.
pub(super) fn controls(out: &mut Output<'_>) {
    let text = out.text();
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        if (0x20..0x7f).contains(&byte) || byte == b'\n' || byte == b'\t' {
            at += 1;
            continue;
        }
        if byte < 0x80 {
            match byte {
                b'\r' if bytes.get(at + 1) == Some(&b'\n') => out.remove(at..at + 1),
                b'\r' => out.replace(at..at + 1, "\n"),
                // A form feed and a vertical tab part what stands on both sides.
                0x0b | 0x0c => out.replace(at..at + 1, "\n"),
                _ => out.remove(at..at + 1),
            }
            at += 1;
            continue;
        }
        // Beyond ASCII: C1 controls begin with C2, noncharacters end in FFFE or FFFF or lie in FDD0–FDEF.
        if !matches!(byte, 0xc2 | 0xef | 0xf0..=0xf4) {
            at += width(byte);
            continue;
        }
        let Some(character) = text[at..].chars().next() else { break };
        let end = at + character.len_utf8();
        match u32::from(character) {
            0x85 => out.replace(at..end, "\n"),
            0x80..=0x9f => out.remove(at..end),
            code if code & 0xfffe == 0xfffe || (0xfdd0..=0xfdef).contains(&code) => out.remove(at..end),
            _ => {}
        }
        at = end;
    }
}

fn width(lead: u8) -> usize {
    match lead {
        0xf0.. => 4,
        0xe0.. => 3,
        _ => 2,
    }
}

/// Characters without width, and those that turn the direction of what follows.
pub(super) fn zero_width(out: &mut Output<'_>) {
    let text = out.text();
    let bytes = text.as_bytes();
    let mut at = 0;
    // Only soft hyphens (C2 AD), U+034F, U+061C, U+180E, U+200B–200F, U+202A–202E, U+2060–2069 and U+FEFF matter.
    while let Some(offset) = bytes[at..].iter().position(|b| matches!(b, 0xc2 | 0xcd | 0xd8 | 0xe1 | 0xe2 | 0xef)) {
        let start = at + offset;
        let Some(character) = text.get(start..).and_then(|rest| rest.chars().next()) else {
            at = start + 1;
            continue;
        };
        let end = start + character.len_utf8();
        let gone = match u32::from(character) {
            0xad | 0x34f | 0x180e | 0x200b | 0x202a..=0x202e | 0x2060..=0x2069 | 0xfeff => true,
            // Joiners shape letters of Arabic and Indic scripts and tie emoji together; direction marks order such text.
            0x200c..=0x200f | 0x61c => {
                let plain = |c: Option<char>| c.is_none_or(|c| u32::from(c) < 0x590 || c.is_whitespace());
                plain(text[..start].chars().next_back()) && plain(text[end..].chars().next())
            }
            _ => false,
        };
        if gone {
            out.remove(start..end);
        }
        at = end;
    }
}

/// Canonical composition. Only stretches with a character from U+0300 on can change; each is composed together with
/// the character before it.
pub(super) fn nfc(out: &mut Output<'_>) {
    let text = out.text();
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(offset) = bytes[at..].iter().position(|b| *b >= 0xcc) {
        let found = at + offset;
        let end = bytes[found..].iter().position(u8::is_ascii).map_or(bytes.len(), |n| found + n);
        // A mark composes with the character before it, which is whole ASCII or lies in the same stretch.
        let mut start = found;
        while start > at && !bytes[start - 1].is_ascii() {
            start -= 1;
        }
        start = text[..start].chars().next_back().map_or(0, |c| start - c.len_utf8());
        let stretch = &text[start..end];
        if is_nfc_quick(stretch.chars()) != IsNormalized::Yes {
            let composed: String = stretch.nfc().collect();
            if composed != stretch {
                out.replace(start..end, &composed);
            }
        }
        at = end;
    }
}

/// Private-use and replacement characters go; odd spaces, Latin ligatures and full-width letters become plain.
pub(super) fn special(out: &mut Output<'_>, spans: &[Range<usize>]) {
    let text = out.text();
    let mut span = 0;
    let mut next = 0;
    while let Some(offset) = text.as_bytes()[next..].iter().position(|byte| !byte.is_ascii()) {
        let at = next + offset;
        let Some(character) = text[at..].chars().next() else { break };
        next = at + character.len_utf8();
        let ascii;
        let with = match u32::from(character) {
            0xa0 | 0x1680 | 0x2000..=0x200a | 0x202f | 0x205f => " ",
            0xfb00 => "ff",
            0xfb01 => "fi",
            0xfb02 => "fl",
            0xfb03 => "ffi",
            0xfb04 => "ffl",
            0xfb05 | 0xfb06 => "st",
            code @ (0xff21..=0xff3a | 0xff41..=0xff5a) => {
                ascii = [(code - 0xfee0) as u8];
                std::str::from_utf8(&ascii).unwrap_or_default()
            }
            0xe000..=0xf8ff | 0xfffc | 0xfffd | 0xf0000..=0x10ffff => "",
            _ => continue,
        };
        if !is_protected(spans, &mut span, at) {
            out.replace(at..next, with);
        }
    }
}
