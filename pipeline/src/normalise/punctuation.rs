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

pub(super) fn collapse(out: &mut Output<'_>, spans: &[Range<usize>]) {
    let text = out.text();
    let mut span = 0;
    let mut characters = text.char_indices().peekable();
    while let Some((start, first)) = characters.next() {
        if !repeats(first) {
            continue;
        }
        let exclaims = |c: char| matches!(c, '!' | '?' | '！' | '？');
        let mut end = start + first.len_utf8();
        let mut count = 1usize;
        let mut second = None;
        while let Some((at, next)) = characters.peek().copied() {
            if next != first && !(exclaims(first) && exclaims(next)) {
                break;
            }
            if next != first {
                second.get_or_insert(next);
            }
            count += 1;
            end = at + next.len_utf8();
            characters.next();
        }
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
