//! Lines and paragraphs.
//!
//! A line is what stands between two `\n`, without the white space at both its ends (so a CRLF file has
//! the lines of its LF twin); an empty one is blank and is no line. A paragraph is a maximal run of
//! lines without a blank one between. White space appended to a text therefore changes nothing here.

use memchr::memchr_iter;

/// Lines of at most this many characters are short (FineWeb: `short_line_length`).
pub(super) const SHORT_LINE_CHARS: usize = 30;

/// Calls `visit` with every piece of `text` between two `\n`, white space trimmed, and where it begins in the text: blank
/// ones come as `""`.
#[inline]
pub(super) fn for_each<'t>(text: &'t str, mut visit: impl FnMut(usize, &'t str)) {
    let mut start = 0;
    // The end of the text ends its last line.
    for end in memchr_iter(b'\n', text.as_bytes()).chain([text.len()]) {
        let begun = text[start..end].trim_start();
        visit(end - begun.len(), begun.trim_end());
        start = end + 1;
    }
}

/// Whether the line starts with a bullet: `•` and `-` (datatrove) or `*` (Dolma).
pub(super) fn starts_with_bullet(line: &str) -> bool {
    line.starts_with(['-', '*', '•'])
}

/// Whether the line ends in an ellipsis, `...` or `…`.
pub(super) fn ends_with_ellipsis(line: &str) -> bool {
    line.ends_with("...") || line.ends_with('…')
}

/// Whether the line ends in a terminal punctuation mark of any script: Unicode 16 `Sentence_Terminal`, and
/// three Khmer signs that datatrove's list has besides.
pub(super) fn ends_with_terminal_mark(line: &str) -> bool {
    let Some(last) = line.chars().next_back() else {
        return false;
    };
    if last.is_ascii() {
        return matches!(last, '.' | '?' | '!');
    }
    let code = u32::from(last);
    let after = TERMINAL_MARKS.partition_point(|(first, _)| *first <= code);
    after > 0 && code <= TERMINAL_MARKS[after - 1].1
}

/// Ranges of the terminal marks outside ASCII, ascending, both ends included.
#[rustfmt::skip]
static TERMINAL_MARKS: [(u32, u32); 86] = [
    (0x589, 0x589), (0x61d, 0x61f), (0x6d4, 0x6d4), (0x700, 0x702), (0x7f9, 0x7f9), (0x837, 0x837),
    (0x839, 0x839), (0x83d, 0x83e), (0x964, 0x965), (0x104a, 0x104b), (0x1362, 0x1362),
    (0x1367, 0x1368), (0x166e, 0x166e), (0x1735, 0x1736), (0x17d4, 0x17d6), (0x17d9, 0x17da),
    (0x1803, 0x1803), (0x1809, 0x1809), (0x1944, 0x1945), (0x1aa8, 0x1aab), (0x1b4e, 0x1b4f),
    (0x1b5a, 0x1b5b), (0x1b5e, 0x1b5f), (0x1b7d, 0x1b7f), (0x1c3b, 0x1c3c), (0x1c7e, 0x1c7f),
    (0x2024, 0x2024), (0x203c, 0x203d), (0x2047, 0x2049), (0x2cf9, 0x2cfb), (0x2e2e, 0x2e2e),
    (0x2e3c, 0x2e3c), (0x2e53, 0x2e54), (0x3002, 0x3002), (0xa4ff, 0xa4ff), (0xa60e, 0xa60f),
    (0xa6f3, 0xa6f3), (0xa6f7, 0xa6f7), (0xa876, 0xa877), (0xa8ce, 0xa8cf), (0xa92f, 0xa92f),
    (0xa9c8, 0xa9c9), (0xaa5d, 0xaa5f), (0xaaf0, 0xaaf1), (0xabeb, 0xabeb), (0xfe12, 0xfe12),
    (0xfe15, 0xfe16), (0xfe52, 0xfe52), (0xfe56, 0xfe57), (0xff01, 0xff01), (0xff0e, 0xff0e),
    (0xff1f, 0xff1f), (0xff61, 0xff61), (0x10a56, 0x10a57), (0x10f55, 0x10f59), (0x10f86, 0x10f89),
    (0x11047, 0x11048), (0x110be, 0x110c1), (0x11141, 0x11143), (0x111c5, 0x111c6), (0x111cd, 0x111cd),
    (0x111de, 0x111df), (0x11238, 0x11239), (0x1123b, 0x1123c), (0x112a9, 0x112a9), (0x113d4, 0x113d5),
    (0x1144b, 0x1144c), (0x115c2, 0x115c3), (0x115c9, 0x115d7), (0x11641, 0x11642), (0x1173c, 0x1173e),
    (0x11944, 0x11944), (0x11946, 0x11946), (0x11a42, 0x11a43), (0x11a9b, 0x11a9c), (0x11c41, 0x11c42),
    (0x11ef7, 0x11ef8), (0x11f43, 0x11f44), (0x16a6e, 0x16a6f), (0x16af5, 0x16af5), (0x16b37, 0x16b38),
    (0x16b44, 0x16b44), (0x16d6e, 0x16d6f), (0x16e98, 0x16e98), (0x1bc9f, 0x1bc9f), (0x1da88, 0x1da88),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<&str> {
        let mut out = Vec::new();
        for_each(text, |at, line| {
            assert!(text[at..].starts_with(line));
            out.push(line);
        });
        out
    }

    #[test]
    fn lines_are_trimmed() {
        assert_eq!(lines("a\r\n b \n\n\u{a0}c\u{2003}"), ["a", "b", "", "c"]);
        assert_eq!(lines(""), [""]);
        assert_eq!(lines("\n"), ["", ""]);
        assert_eq!(lines("a\rb"), ["a\rb"], "a lone carriage return ends no line");
    }

    #[test]
    fn marks() {
        for line in ["x.", "x?", "x!", "x。", "x؟", "x।", "x៖", "x៚", "x𝪈"] {
            assert!(ends_with_terminal_mark(line), "{line}");
        }
        for line in ["", "x", "x\"", "x:", "x…", "x、", "x\u{10ffff}"] {
            assert!(!ends_with_terminal_mark(line), "{line}");
        }
        assert!(TERMINAL_MARKS.iter().all(|(a, b)| a <= b));
        assert!(TERMINAL_MARKS.windows(2).all(|w| w[0].1 < w[1].0), "ascending and disjoint");
    }

    #[test]
    fn bullets_and_ellipses() {
        assert!(starts_with_bullet("- a") && starts_with_bullet("• a") && starts_with_bullet("*a"));
        assert!(!starts_with_bullet("– a") && !starts_with_bullet(""));
        assert!(ends_with_ellipsis("a...") && ends_with_ellipsis("a…") && ends_with_ellipsis("a...."));
        assert!(!ends_with_ellipsis("a..") && !ends_with_ellipsis("…a"));
    }
}
