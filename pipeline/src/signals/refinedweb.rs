//! The line rules of RefinedWeb (Penedo et al. 2023, arXiv:2306.01116, G.2 "line-wise corrections"), with the
//! thresholds of DCLM's published recipe (arXiv:2406.11794, its reproduction of RefinedWeb).
//!
//! A line goes when most of its characters are capital letters, when it is a number, a counter ("3 likes") or a
//! single word; a short line (up to ten words) with words of a page's frame loses these words.

use super::words;

/// What a counter counts.
pub const COUNTERS: [&str; 12] = [
    "likes",
    "shares",
    "comments",
    "retweets",
    "reposts",
    "quotes",
    "bookmarks",
    "upvotes",
    "downvotes",
    "downloads",
    "views",
    "followers",
];
/// Lines of more words are not looked at for words of a page's frame.
const SHORT_LINE_WORDS: usize = 10;

/// Why RefinedWeb removes a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineFault {
    /// More than half of its characters are capital letters.
    Uppercase,
    /// All of its characters are digits.
    Numeric,
    /// A number and what it counts: "3,000 likes".
    Counter,
    /// Fewer than two words.
    OneWord,
}

/// What RefinedWeb makes of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefinedWebLine<'t> {
    /// It stays as it is.
    Kept,
    /// It stays without the words of a page's frame that stood at its start or end, or somewhere in it.
    Cut {
        /// What stood before them.
        before: &'t str,
        /// What stood behind them.
        after: &'t str,
    },
    /// It goes.
    Removed(LineFault),
}

/// Looks at one line, which is trimmed and not blank.
pub fn refinedweb_line(line: &str) -> RefinedWebLine<'_> {
    let (upper, digits) = words::ascii_upper_and_digits(line.as_bytes());
    if line.is_ascii() {
        // More words than a short line has are all the same.
        let runs = line.as_bytes().split(|byte| matches!(byte, b'\t'..=b'\r' | b' ')).filter(|run| !run.is_empty());
        let words = runs.take(SHORT_LINE_WORDS + 1).count();
        return judge(line, LineShape { words, characters: line.len(), upper, numbers: digits });
    }
    let mut words = 0;
    let scan = words::scan(line, |_| words += 1);
    judge(
        line,
        LineShape {
            words,
            characters: line.len() - scan.continuation,
            upper: upper + scan.upper,
            numbers: digits + scan.numbers,
        },
    )
}

/// What a line is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct LineShape {
    pub words: usize,
    pub characters: usize,
    pub upper: usize,
    pub numbers: usize,
}

/// As [`refinedweb_line`], of a line that has been counted.
pub(super) fn judge(line: &str, shape: LineShape) -> RefinedWebLine<'_> {
    let LineShape { words, characters, upper, numbers: digits } = shape;
    if upper * 2 > characters {
        return RefinedWebLine::Removed(LineFault::Uppercase);
    }
    if digits == characters {
        return RefinedWebLine::Removed(LineFault::Numeric);
    }
    if words <= SHORT_LINE_WORDS && digits > 0 && is_counter(line) {
        return RefinedWebLine::Removed(LineFault::Counter);
    }
    if words < 2 {
        return RefinedWebLine::Removed(LineFault::OneWord);
    }
    if words <= SHORT_LINE_WORDS {
        if let Some(at) = find(line, "items in cart") {
            return RefinedWebLine::Cut { before: &line[..at], after: &line[at + 13..] };
        }
        if let Some(at) = line.len().checked_sub(12).filter(|at| find_at(line, *at, "read more...")) {
            return RefinedWebLine::Cut { before: &line[..at], after: "" };
        }
        if find_at(line, 0, "sign-in") {
            return RefinedWebLine::Cut { before: "", after: &line[7..] };
        }
    }
    RefinedWebLine::Kept
}

fn find_at(line: &str, at: usize, phrase: &str) -> bool {
    line.as_bytes().get(at..at + phrase.len()).is_some_and(|part| part.eq_ignore_ascii_case(phrase.as_bytes()))
}

fn find(line: &str, phrase: &str) -> Option<usize> {
    (0..line.len().saturating_sub(phrase.len() - 1)).find(|at| find_at(line, *at, phrase))
}

/// `^\W*\d(?:,|\.|\d)*[KkMmBb]?\s+(?:likes|…)\W*$`, in any case.
fn is_counter(line: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let line = line.trim_matches(|c: char| !word(c));
    if !line.starts_with(|c: char| c.is_numeric()) {
        return false;
    }
    let rest = line.trim_start_matches(|c: char| c.is_numeric() || c == ',' || c == '.');
    let rest = rest.strip_prefix(['K', 'k', 'M', 'm', 'B', 'b']).unwrap_or(rest);
    let counted = rest.trim_start();
    counted.len() < rest.len() && COUNTERS.iter().any(|counter| counted.eq_ignore_ascii_case(counter))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_by_hand() {
        use LineFault::{Counter, Numeric, OneWord, Uppercase};
        for (line, fault) in [
            ("ABCd", Some(Uppercase)),
            ("ABCDE abcd", None), // 5 of 10
            ("ÄÖÜ xy", None),     // 3 of 6
            ("ÄÖÜ x", Some(Uppercase)),
            ("12345", Some(Numeric)),
            ("٣٤", Some(Numeric)),
            ("12,345", Some(OneWord)),
            ("3 likes", Some(Counter)),
            ("(3,000   Views!)", Some(Counter)),
            ("5.1M downloads", Some(Counter)),
            ("3 cats", None),
            ("about 3 likes", None),
            ("word", Some(OneWord)),
            ("🙂", Some(OneWord)),
            ("مرحبا بالعالم", None),
        ] {
            let expected = fault.map_or(RefinedWebLine::Kept, RefinedWebLine::Removed);
            assert_eq!(refinedweb_line(line), expected, "{line}");
        }
        assert_eq!(refinedweb_line("Sign-in or register"), RefinedWebLine::Cut { before: "", after: " or register" });
        assert_eq!(
            refinedweb_line("So it went. Read more..."),
            RefinedWebLine::Cut { before: "So it went. ", after: "" }
        );
        assert_eq!(refinedweb_line("2 items in cart now"), RefinedWebLine::Cut { before: "2 ", after: " now" });
        let long = "Sign-in is what one has to do before one can read this page";
        assert_eq!(refinedweb_line(long), RefinedWebLine::Kept, "more than ten words");
    }
}
