//! Line-level cleaning by the rules of C4 and of RefinedWeb.

use super::Output;
use crate::signals::{RefinedWebLine, c4_clean, refinedweb_line};

/// Keeps the lines that C4 keeps; blank lines go with those removed.
pub(super) fn c4(out: &mut Output<'_>) {
    let text = out.text();
    let mut kept = String::with_capacity(text.len());
    let removed = c4_clean(text, &mut kept).removed();
    if removed > 0 {
        out.become_all(kept, removed);
    }
}

/// Removes and cuts the lines that RefinedWeb does.
pub(super) fn refinedweb(out: &mut Output<'_>) {
    let text = out.text();
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let content = line.trim();
        let end = at + line.len();
        if !content.is_empty() {
            match refinedweb_line(content) {
                RefinedWebLine::Kept => {}
                RefinedWebLine::Removed(_) => out.remove(at..end),
                RefinedWebLine::Cut { before, after } => {
                    let cut = format!("{before}{after}");
                    let newline = if line.ends_with('\n') { "\n" } else { "" };
                    out.replace(at..end, &format!("{}{newline}", cut.trim()));
                }
            }
        }
        at = end;
    }
}
