//! Cutting text into the pieces that merges never cross, exactly as the `tokenizers` crate cuts it.

use tokenizers::utils::SysRegex;

use crate::config::{Digits, Pattern};
use crate::error::{Error, Result};

/// A pre-tokenizer: an optional cut around every digit, then a pattern.
pub struct Splitter {
    individual_digits: bool,
    regex: SysRegex,
}

impl Splitter {
    /// A splitter of this pattern and digits policy.
    pub fn new(pattern: &Pattern, digits: Digits) -> Result<Self> {
        Self::from_regex(pattern.regex(), digits == Digits::Individual)
    }

    pub(crate) fn from_regex(regex: &str, individual_digits: bool) -> Result<Self> {
        let regex = SysRegex::new(regex).map_err(|e| Error::config("tokenizer.pattern", format!("{regex:?}: {e}")))?;
        Ok(Self { individual_digits, regex })
    }

    /// Call `piece` with every piece of `text`, in order; together they are `text`.
    pub fn for_each<'t>(&self, text: &'t str, mut piece: impl FnMut(&'t str)) {
        if !self.individual_digits {
            return self.split(text, &mut piece);
        }
        let mut start = 0;
        for (at, digit) in text.match_indices(char::is_numeric) {
            self.split(&text[start..at], &mut piece);
            self.split(digit, &mut piece);
            start = at + digit.len();
        }
        self.split(&text[start..], &mut piece);
    }

    /// Matches and what lies between them. Where matching gives up (a run of white space beyond the
    /// backtracking limit), the rest is one piece, as in `tokenizers`.
    fn split<'t>(&self, text: &'t str, piece: &mut impl FnMut(&'t str)) {
        let mut done = 0;
        let mut emit = |from: usize, to: usize| {
            if from < to {
                piece(&text[from..to]);
            }
        };
        for (start, end) in self.regex.find_iter(text) {
            emit(done, start);
            emit(start, end);
            done = end;
        }
        emit(done, text.len());
    }
}
