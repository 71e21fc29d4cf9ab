//! Marks that are repeated for emphasis.

use std::ops::Range;

use super::{Output, is_protected};

/// Marks that say the same once as many times. Hyphens, stars, quotes, slashes and the like mean something when they
/// are doubled (Markdown, LaTeX, code) and stay.
fn repeats(character: char) -> bool {
    matches!(
        character,
        '!' | '?'
            | ','
            | ';'
            | '.'
            | '…'
            | '。'
            | '，'
            | '、'
            | '！'
            | '？'
            | '；'
            | '：'
            | '·'
            | '・'
            | '؟'
            | '،'
            | '।'
    )
}

/// First bytes of these marks, which other characters share.
static MAY_REPEAT: [bool; 256] = {
    let mut table = [false; 256];
    let firsts = *b"!?,;.\xc2\xd8\xe0\xe2\xe3\xef";
    let mut at = 0;
    while at < firsts.len() {
        table[firsts[at] as usize] = true;
        at += 1;
    }
    table
};

pub(super) fn collapse(out: &mut Output<'_>, spans: &[Range<usize>]) {
    let text = out.text();
    let mut span = 0;
    let mut at = 0;
    while let Some(offset) = text.as_bytes()[at..].iter().position(|byte| MAY_REPEAT[usize::from(*byte)]) {
        let start = at + offset;
        let Some(first) = text[start..].chars().next() else { break };
        let mut end = start + first.len_utf8();
        at = end;
        if !repeats(first) {
            continue;
        }
        let exclaims = |c: char| matches!(c, '!' | '?' | '！' | '？');
        let mut count = 1usize;
        let mut second = None;
        for next in text[end..].chars() {
            if next != first && !(exclaims(first) && exclaims(next)) {
                break;
            }
            if next != first {
                second.get_or_insert(next);
            }
            count += 1;
            end += next.len_utf8();
        }
        at = end;
        let with: String = match (first, second) {
            // `..` is a slip or a path, `...` an ellipsis.
            ('.', _) if count <= 3 => continue,
            ('.', _) => "...".into(),
            // In Chinese an ellipsis is two of these.
            ('…', _) if count <= 2 => continue,
            (_, None) if count == 1 => continue,
            (_, Some(_)) if count == 2 => continue,
            (first, second) => [Some(first), second].into_iter().flatten().collect(),
        };
        if !is_protected(spans, &mut span, start) {
            out.replace(start..end, &with);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_byte_of_every_mark_is_looked_at() {
        for mark in ('\0'..=char::MAX).filter(|c| repeats(*c)) {
            let mut bytes = [0; 4];
            mark.encode_utf8(&mut bytes);
            assert!(MAY_REPEAT[usize::from(bytes[0])], "{mark}");
        }
    }
}
