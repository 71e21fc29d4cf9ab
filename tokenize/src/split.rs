//! Cutting text into the pieces that merges never cross, exactly as the `tokenizers` crate cuts it.
//!
//! The patterns in wide use are scanned by hand: a regular expression with a look-ahead runs on a
//! backtracking machine, which takes most of the time of `tokenizers`. Any other pattern goes to the very
//! engine that `tokenizers` uses.

use tokenizers::utils::SysRegex;

use crate::classes::{Classes, LETTER, LOWER, NEWLINE, NUMBER, SPACE, UPPER};
use crate::config::{Digits, Pattern};
use crate::error::{Error, Result};

/// The pattern of Qwen 2: `cl100k` with digits one by one.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// In a run of white space of this many bytes the backtracking engine may reach its limits, and then it
/// gives up on the rest of the text. So it decides there itself.
const LONG_SPACE: usize = 100_000;

/// A pre-tokenizer: an optional cut around every digit, then a pattern.
pub struct Splitter {
    individual_digits: bool,
    regex: SysRegex,
    scanner: Option<Scanner>,
}

/// A pattern that is scanned by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scanner {
    Gpt2,
    /// With at most so many digits in a piece.
    Cl100k(usize),
    O200k,
}

impl Scanner {
    fn of(regex: &str) -> Option<Self> {
        let known = [
            (Pattern::Gpt2.regex(), Self::Gpt2),
            (Pattern::Cl100k.regex(), Self::Cl100k(3)),
            (QWEN2, Self::Cl100k(1)),
            (Pattern::O200k.regex(), Self::O200k),
        ];
        known.into_iter().find(|(known, _)| *known == regex).map(|(_, scanner)| scanner)
    }
}

impl Splitter {
    /// A splitter of this pattern and digits policy.
    pub fn new(pattern: &Pattern, digits: Digits) -> Result<Self> {
        Self::from_regex(pattern.regex(), digits == Digits::Individual)
    }

    pub(crate) fn from_regex(regex: &str, individual_digits: bool) -> Result<Self> {
        let scanner = Scanner::of(regex);
        let regex = SysRegex::new(regex).map_err(|e| Error::config("tokenizer.pattern", format!("{regex:?}: {e}")))?;
        Ok(Self { individual_digits, regex, scanner })
    }

    /// Call `piece` with every piece of `text`, in order; together they are `text`.
    #[inline]
    pub fn for_each<'t>(&self, text: &'t str, mut piece: impl FnMut(&'t str)) {
        self.for_each_end(text, |from, to| piece(&text[from..to]));
    }

    /// As [`Self::for_each`], with the bounds of the piece in `text`.
    #[inline]
    pub(crate) fn for_each_end(&self, text: &str, mut piece: impl FnMut(usize, usize)) {
        if !self.individual_digits {
            return self.split(text, 0, &mut piece);
        }
        let mut start = 0;
        for (at, digit) in text.match_indices(char::is_numeric) {
            self.split(&text[start..at], start, &mut piece);
            self.split(digit, at, &mut piece);
            start = at + digit.len();
        }
        self.split(&text[start..], start, &mut piece);
    }

    /// The pieces of `text`, which begins at byte `base` of the whole.
    #[inline]
    fn split(&self, text: &str, base: usize, piece: &mut impl FnMut(usize, usize)) {
        let done = match self.scanner {
            None => 0,
            Some(Scanner::Gpt2) => scan(text, base, piece, gpt2),
            Some(Scanner::Cl100k(1)) => scan(text, base, piece, |c, at| cl100k(c, at, 1)),
            Some(Scanner::Cl100k(digits)) => scan(text, base, piece, |c, at| cl100k(c, at, digits)),
            Some(Scanner::O200k) => scan(text, base, piece, o200k),
        };
        if done < text.len() {
            self.match_rest(text, done, base, piece);
        }
    }

    /// Matches from `done` on, and what lies between them. Where matching gives up, the rest is one piece,
    /// as in `tokenizers`.
    fn match_rest(&self, text: &str, mut done: usize, base: usize, piece: &mut impl FnMut(usize, usize)) {
        // The patterns that are scanned do not look behind: the rest of a text is matched like a text.
        let (rest, shift) = (&text[done..], done);
        let mut emit = |from: usize, to: usize| {
            if from < to {
                piece(base + from, base + to);
            }
        };
        for (start, end) in self.regex.find_iter(rest) {
            emit(done, shift + start);
            emit(shift + start, shift + end);
            done = shift + end;
        }
        emit(done, text.len());
    }
}

/// Why a scanner stops.
struct TooMuchSpace;

/// Cut `text` by `next`, which says where the piece that begins at a byte ends. How far it came: the end,
/// or a place from which the engine must go on.
#[inline(always)]
fn scan(
    text: &str,
    base: usize,
    piece: &mut impl FnMut(usize, usize),
    next: impl Fn(&Scan<'_>, usize) -> Result<usize, TooMuchSpace>,
) -> usize {
    let scan = Scan { text: text.as_bytes(), classes: Classes::of(text) };
    let mut at = 0;
    while at < text.len() {
        let Ok(end) = next(&scan, at) else { break };
        piece(base + at, base + end);
        at = end;
    }
    at
}

struct Scan<'t> {
    text: &'t [u8],
    classes: Classes<'t>,
}

/// `[^\s\p{L}\p{N}]` is what is in none of these.
const NOT_SYMBOL: u8 = SPACE | LETTER | NUMBER;

impl Scan<'_> {
    /// `'s|'t|'re|'ve|'m|'ll|'d` at `at`; where it ends.
    #[inline]
    fn contraction(&self, at: usize) -> Option<usize> {
        match self.text[at..] {
            [b'\'', b's' | b't' | b'm' | b'd', ..] => Some(at + 2),
            [b'\'', b'r' | b'v', b'e', ..] | [b'\'', b'l', b'l', ..] => Some(at + 3),
            _ => None,
        }
    }

    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)` at `at`; where it ends. U+017F, the long s, is an s.
    #[inline]
    fn contraction_of_any_case(&self, at: usize) -> Option<usize> {
        match self.text[at..] {
            [b'\'', b's' | b'S' | b't' | b'T' | b'm' | b'M' | b'd' | b'D', ..] => Some(at + 2),
            [b'\'', b'r' | b'R' | b'v' | b'V', b'e' | b'E', ..] | [b'\'', b'l' | b'L', b'l' | b'L', ..] => Some(at + 3),
            [b'\'', 0xC5, 0xBF, ..] => Some(at + 3),
            _ => None,
        }
    }

    /// `\s+(?!\S)|\s+` where there is white space from `at` to `next` and on: all of the run but its last
    /// character, which belongs to what follows. The run is all there is, or a single one, at the end of
    /// the text or before a character that takes none.
    #[inline]
    fn spaces(&self, at: usize, next: usize) -> Result<usize, TooMuchSpace> {
        let (mut last, mut end) = (at, next);
        loop {
            let (class, next) = self.classes.at(end);
            if class & SPACE == 0 {
                break;
            }
            (last, end) = (end, next);
        }
        if end - at >= LONG_SPACE {
            return Err(TooMuchSpace);
        }
        Ok(if end == self.text.len() || last == at { end } else { last })
    }

    /// `\s*[\r\n]+|\s+(?!\S)|\s+` where there is white space at `at`: through the last line end of the run.
    #[inline]
    fn spaces_by_line(&self, at: usize) -> Result<usize, TooMuchSpace> {
        let (mut last, mut end, mut line_end) = (at, at, None);
        loop {
            let (class, next) = self.classes.at(end);
            if class & SPACE == 0 {
                break;
            }
            (last, end) = (end, next);
            if class & NEWLINE != 0 {
                line_end = Some(next);
            }
        }
        if end - at >= LONG_SPACE {
            return Err(TooMuchSpace);
        }
        let whole = end == self.text.len() || last == at;
        Ok(line_end.unwrap_or(if whole { end } else { last }))
    }
}

/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
#[inline(always)]
fn gpt2(scan: &Scan<'_>, at: usize) -> Result<usize, TooMuchSpace> {
    let classes = scan.classes;
    let first = scan.text[at];
    if first == b'\''
        && let Some(end) = scan.contraction(at)
    {
        return Ok(end);
    }
    let (mut class, mut next) = classes.at(at);
    if first == b' ' {
        let (after, beyond) = classes.at(next);
        if next < scan.text.len() && after & SPACE == 0 {
            (class, next) = (after, beyond);
        }
    }
    Ok(if class & LETTER != 0 {
        classes.run(next, LETTER)
    } else if class & NUMBER != 0 {
        classes.run(next, NUMBER)
    } else if class & SPACE == 0 {
        classes.run_without(next, NOT_SYMBOL)
    } else {
        return scan.spaces(at, next);
    })
}

/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
#[inline(always)]
fn cl100k(scan: &Scan<'_>, at: usize, digits: usize) -> Result<usize, TooMuchSpace> {
    let classes = scan.classes;
    let first = scan.text[at];
    if first == b'\''
        && let Some(end) = scan.contraction_of_any_case(at)
    {
        return Ok(end);
    }
    let (class, next) = classes.at(at);
    if class & LETTER != 0 {
        return Ok(classes.run(next, LETTER));
    }
    if class & NUMBER != 0 {
        return Ok(numbers(scan, next, digits));
    }
    let (after, beyond) = classes.at(next);
    if class & NEWLINE == 0 && after & LETTER != 0 {
        return Ok(classes.run(beyond, LETTER));
    }
    match symbols(scan, first, class, next, after, beyond) {
        Some(end) => Ok(classes.run(end, NEWLINE)),
        None => scan.spaces_by_line(at),
    }
}

/// The end of at most `digits` numbers, of which the first ends at `next`.
#[inline(always)]
fn numbers(scan: &Scan<'_>, next: usize, digits: usize) -> usize {
    let mut end = next;
    for _ in 1..digits {
        let (class, next) = scan.classes.at(end);
        if class & NUMBER == 0 {
            break;
        }
        end = next;
    }
    end
}

/// ` ?[^\s\p{L}\p{N}]+` at a character `first` of `class` before another of class `after`.
#[inline(always)]
fn symbols(scan: &Scan<'_>, first: u8, class: u8, next: usize, after: u8, beyond: usize) -> Option<usize> {
    if class & NOT_SYMBOL == 0 {
        Some(scan.classes.run_without(next, NOT_SYMBOL))
    } else if first == b' ' && next < scan.text.len() && after & NOT_SYMBOL == 0 {
        Some(scan.classes.run_without(beyond, NOT_SYMBOL))
    } else {
        None
    }
}

/// [`Pattern::O200k`]: words by the case of their letters, with their contraction.
#[inline(always)]
fn o200k(scan: &Scan<'_>, at: usize) -> Result<usize, TooMuchSpace> {
    let classes = scan.classes;
    let first = scan.text[at];
    let (class, next) = classes.at(at);
    let with_contraction = |end| scan.contraction_of_any_case(end).unwrap_or(end);
    let takes_prefix = class & (NEWLINE | LETTER | NUMBER) == 0;
    // U*W+ behind a prefix, then without; then U+W*, which only upper-case letters are left for.
    let word = match takes_prefix {
        true => word(scan, next).or_else(|| word(scan, at)),
        false => word(scan, at),
    };
    if let Some(end) = word {
        return Ok(with_contraction(end));
    }
    let begin = if takes_prefix { next } else { at };
    let end = classes.run(begin, UPPER);
    if end > begin {
        return Ok(with_contraction(end));
    }
    if class & NUMBER != 0 {
        return Ok(numbers(scan, next, 3));
    }
    let (after, beyond) = classes.at(next);
    match symbols(scan, first, class, next, after, beyond) {
        Some(mut end) => {
            while matches!(scan.text.get(end), Some(b'\r' | b'\n' | b'/')) {
                end += 1;
            }
            Ok(end)
        }
        None => scan.spaces_by_line(at),
    }
}

/// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+` from `at`; where it ends.
#[inline(always)]
fn word(scan: &Scan<'_>, at: usize) -> Option<usize> {
    let mut end = at;
    // The end of the last character that both parts can take: where the engine backtracks to.
    let mut both = None;
    loop {
        let (class, next) = scan.classes.at(end);
        if class & UPPER == 0 {
            return if class & LOWER != 0 { Some(scan.classes.run(next, LOWER)) } else { both };
        }
        if class & LOWER != 0 {
            both = Some(next);
        }
        end = next;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    fn pieces(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut pieces = Vec::new();
        splitter.for_each(text, |piece| pieces.push(piece.to_owned()));
        pieces
    }

    /// Each scanner beside the engine with the same pattern.
    static SPLITTERS: LazyLock<Vec<(Splitter, Splitter)>> = LazyLock::new(|| {
        let patterns = [Pattern::Gpt2.regex(), Pattern::Cl100k.regex(), QWEN2, Pattern::O200k.regex()];
        let both = |(regex, digits): (&str, bool)| {
            let matching = Splitter { scanner: None, ..Splitter::from_regex(regex, digits).unwrap() };
            (Splitter::from_regex(regex, digits).unwrap(), matching)
        };
        patterns.into_iter().flat_map(|regex| [(regex, false), (regex, true)]).map(both).collect()
    });

    fn check(text: &str) {
        for (number, (scanning, matching)) in SPLITTERS.iter().enumerate() {
            assert!(scanning.scanner.is_some());
            assert_eq!(pieces(scanning, text), pieces(matching, text), "{number} {text:?}");
        }
    }

    #[test]
    fn pieces_are_those_of_the_engine_where_patterns_are_subtle() {
        for text in [
            "",
            " ",
            "  ",
            "a  b",
            "  a",
            "a \n b",
            "a\n\n  b",
            "\r\n \r\nx",
            "don't DON'T 'S'ſ''s 'tis l'l'll",
            "12345 ½x٣٤٥٦",
            "日本ABC日a",
            "ABC\u{301}DE",
            "\u{301}ABC",
            "\u{301}\u{301}a!\u{301}b",
            "!\u{301}A",
            "ǅa ǅA aǅ ʰA Aʰ",
            "a/b//\n/x",
            "\t\tx \u{a0}\u{a0}y \u{85}z",
            "x \u{3000}。」\r\n\r\n ",
            "HTTPServer's camelCase'LL",
            "\u{0}\u{7f}\u{10ffff}",
        ] {
            check(text);
        }
    }

    #[test]
    fn very_long_white_space_is_left_to_the_engine() {
        for text in [" ".repeat(LONG_SPACE + 7), format!("ab{}\n{}x y", " ".repeat(LONG_SPACE), "\t".repeat(9))] {
            check(&text);
        }
    }

    proptest! {
        #[test]
        fn pieces_are_those_of_the_engine(text in any::<String>()) {
            check(&text);
        }

        #[test]
        fn pieces_are_those_of_the_engine_in_dense_text(
            text in "([a-cA-C'sSſtdDmlLvVrReE \n\r\t/.,!0-9\u{301}\u{345}ǅʰ中日аБ٣½\u{a0}\u{3000}\u{85}👍]){0,24}"
        ) {
            check(&text);
        }
    }
}
