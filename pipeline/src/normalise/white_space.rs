//! White space that says nothing: at the ends of lines, and blank lines after a blank line.

use super::Output;

pub(super) fn tidy(out: &mut Output<'_>) {
    let text = out.text();
    let mut at = 0;
    let mut blank = 0;
    for line in text.split_inclusive('\n') {
        let content = line.trim_end();
        let end = at + line.len();
        let newline = if line.ends_with('\n') { "\n" } else { "" };
        if content.is_empty() {
            blank += 1;
            // Before the first line none stays, between two lines one.
            if blank > 1 || at == 0 {
                blank = blank.max(2);
                out.remove(at..end);
            } else if line != newline {
                out.replace(at..end, newline);
            }
        } else {
            blank = 0;
            let ended = content.len() + newline.len();
            if ended != line.len() {
                out.replace(at + content.len()..end, newline);
            }
        }
        at = end;
    }
}
