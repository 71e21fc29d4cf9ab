//! Classes of characters that pre-tokenizer patterns tell apart.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

/// `\p{L}`.
pub const LETTER: u8 = 1;
/// `\p{N}`.
pub const NUMBER: u8 = 1 << 1;
/// `\s`.
pub const SPACE: u8 = 1 << 2;
/// `[\r\n]`.
pub const NEWLINE: u8 = 1 << 3;
/// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`: what a capitalised run may begin with.
pub const UPPER: u8 = 1 << 4;
/// `[\p{Ll}\p{Lm}\p{Lo}\p{M}]`: what it may end with.
pub const LOWER: u8 = 1 << 5;

/// Classes by code point, taken from the tables of the regex engine itself: another version of Unicode
/// would cut text in another way.
static CLASSES: LazyLock<Box<[u8]>> = LazyLock::new(|| {
    let mut classes = vec![0; char::MAX as usize + 1];
    for (bit, class) in [
        (LETTER, r"\p{L}"),
        (NUMBER, r"\p{N}"),
        (SPACE, r"\s"),
        (NEWLINE, r"[\r\n]"),
        (UPPER, r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"),
        (LOWER, r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"),
    ] {
        if let Ok(HirKind::Class(Class::Unicode(class))) = regex_syntax::parse(class).map(|hir| hir.into_kind()) {
            for range in class.ranges() {
                classes[range.start() as usize..=range.end() as usize].iter_mut().for_each(|c| *c |= bit);
            }
        }
    }
    classes.into()
});

/// Reads classes of the characters of a text.
#[derive(Clone, Copy)]
pub struct Classes<'t> {
    table: &'static [u8],
    text: &'t str,
}

impl<'t> Classes<'t> {
    /// Of this text.
    pub fn of(text: &'t str) -> Self {
        Self { table: &CLASSES, text }
    }

    /// The class of the character that begins at byte `at`, and where the next one begins. At the end of
    /// the text: no class.
    #[inline(always)]
    pub fn at(self, at: usize) -> (u8, usize) {
        match self.text.as_bytes().get(at) {
            None => (0, at),
            Some(&byte) if byte < 0x80 => (self.table[usize::from(byte)], at + 1),
            Some(_) => self.wide(at),
        }
    }

    #[inline]
    fn wide(self, at: usize) -> (u8, usize) {
        match self.text[at..].chars().next() {
            Some(c) => (self.table[c as usize], at + c.len_utf8()),
            None => (0, at),
        }
    }

    /// The end of the run of characters from byte `at` on that are in a class of `any`.
    #[inline(always)]
    pub fn run(self, mut at: usize, any: u8) -> usize {
        loop {
            let (class, next) = self.at(at);
            if class & any == 0 {
                return at;
            }
            at = next;
        }
    }

    /// The end of the run of characters from byte `at` on that are in no class of `none`.
    #[inline(always)]
    pub fn run_without(self, mut at: usize, none: u8) -> usize {
        loop {
            let (class, next) = self.at(at);
            if class & none != 0 || next == at {
                return at;
            }
            at = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_those_of_the_engine() {
        let patterns = [
            (LETTER, r"^\p{L}$"),
            (NUMBER, r"^\p{N}$"),
            (SPACE, r"^\s$"),
            (NEWLINE, r"^[\r\n]$"),
            (UPPER, r"^[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]$"),
            (LOWER, r"^[\p{Ll}\p{Lm}\p{Lo}\p{M}]$"),
        ];
        for (bit, pattern) in patterns {
            let regex = tokenizers::utils::SysRegex::new(pattern).unwrap();
            let mut seen = 0;
            for c in ('\0'..=char::MAX).step_by(7).chain('\0'..'\u{3000}') {
                let mut buffer = [0; 4];
                let text: &str = c.encode_utf8(&mut buffer);
                let in_class = Classes::of(text).at(0).0 & bit != 0;
                // `$` would also match before a line feed at the end.
                let matches = regex.find_iter(text).any(|(start, end)| (start, end) == (0, text.len()));
                assert_eq!(in_class, matches, "{c:?} {pattern}");
                seen += usize::from(matches);
            }
            assert!(seen > 0);
        }
    }
}
