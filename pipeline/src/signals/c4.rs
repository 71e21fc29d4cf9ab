//! The line and page rules of C4 (Raffel et al. 2020, section 2.2; reference implementation `clean_page`
//! of TensorFlow Datasets' `c4_utils.py`).
//!
//! A line stays when it ends in a terminal mark that is no ellipsis, has at least three words, and speaks
//! neither of JavaScript nor of a cookie or privacy policy. A removed line is counted under the first of
//! these reasons in that order, which is the reference's. Letter case is ignored for ASCII letters.

use super::lines;
use super::words::{self, JAY, Word};

/// Fewest words of a line that stays.
pub const MIN_WORDS_PER_LINE: usize = 3;

/// Phrases of a policy notice, in lower case: the reference's `_POLICY_SUBSTRINGS`.
#[cfg(test)]
pub(super) const POLICY_PHRASES: [&str; 6] =
    ["terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"];

/// Counts of lines by what C4 does with them. Blank lines are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct C4Lines {
    /// Lines that stay.
    pub kept: u64,
    /// Lines without a terminal mark (`. ? ! "`) at their end, or with an ellipsis there.
    pub no_terminal_mark: u64,
    /// Lines of fewer than [`MIN_WORDS_PER_LINE`] words.
    pub too_few_words: u64,
    /// Lines with "javascript".
    pub javascript: u64,
    /// Lines with a phrase of a policy notice, such as "privacy policy" or "use cookies".
    pub policy: u64,
}

impl C4Lines {
    /// Counts one line; true when it stays.
    pub(super) fn count(&mut self, line: &str, words: usize, phrases: Phrases) -> bool {
        let counter = if !has_terminal_mark(line) {
            &mut self.no_terminal_mark
        } else if words < MIN_WORDS_PER_LINE {
            &mut self.too_few_words
        } else if phrases.javascript {
            &mut self.javascript
        } else if phrases.policy {
            &mut self.policy
        } else {
            self.kept += 1;
            return true;
        };
        *counter += 1;
        false
    }

    /// Lines removed, for any reason.
    pub fn removed(&self) -> u64 {
        self.no_terminal_mark + self.too_few_words + self.javascript + self.policy
    }
}

/// The line without marks of citations at its end, `[3]`, `[edit]` and `[citation needed]`: the reference takes them out of a line,
/// wherever they stand, before it looks at its end. The verdict differs where a mark parts the full stops of an ellipsis: of
/// `and so on..[3].` the reference sees `and so on...`, which goes; here the line ends in a full stop and stays.
fn without_citations(mut line: &str) -> &str {
    while let Some((before, mark)) = line.strip_suffix(']').and_then(|rest| rest.rsplit_once('[')) {
        if !(mark == "edit" || mark == "citation needed" || mark.bytes().all(|byte| byte.is_ascii_digit())) {
            break;
        }
        line = before;
    }
    line
}

fn look(line: &str) -> (usize, Phrases) {
    let mut phrases = Phrases::default();
    let mut count = 0;
    words::scan(line, |word| {
        phrases.observe(line.as_bytes(), &word);
        count += 1;
    });
    (count, phrases)
}

/// Appends to `out` the lines of `text` that C4 keeps, trimmed and joined by `\n`, and counts all of them.
pub fn c4_clean(text: &str, out: &mut String) -> C4Lines {
    let mut counts = C4Lines::default();
    lines::for_each(text, |_, line| {
        if line.is_empty() {
            return;
        }
        let (count, phrases) = look(line);
        if counts.count(line, count, phrases) {
            if counts.kept > 1 {
                out.push('\n');
            }
            out.push_str(line);
        }
    });
    counts
}

fn has_terminal_mark(line: &str) -> bool {
    let line = without_citations(line);
    line.ends_with(['.', '?', '!', '"']) && !line.ends_with("...")
}

/// What C4 looks for inside a line, found word by word while the line is scanned.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Phrases {
    /// "javascript"
    pub javascript: bool,
    /// One of the policy phrases.
    pub policy: bool,
    /// "lorem ipsum"
    pub lorem_ipsum: bool,
}

impl Phrases {
    /// Looks at one more word of `line`.
    #[inline]
    fn observe(&mut self, line: &[u8], word: &Word) {
        let bytes = &line[word.start..word.end];
        self.javascript |= speaks_of_javascript(bytes, word.class);
        if may_end_phrase(&line[word.start..]) {
            self.look_back(&line[..word.start], bytes);
        }
    }

    /// Looks for a phrase that ends with `word`, of which [`may_end_phrase`] is true; `before` is what stands before
    /// it in the line. The last word of every phrase stands behind a space and so begins a word; what comes before is compared
    /// backwards.
    pub fn look_back(&mut self, before: &[u8], word: &[u8]) {
        if starts(word, b"policy") {
            self.policy |= ends(before, b"privacy ") || ends(before, b"cookie ");
        } else if starts(word, b"cookies") {
            self.policy |= ends(before, b"use ") || ends(before, b"uses ") || ends(before, b"use of ");
        } else if starts(word, b"use") {
            self.policy |= ends(before, b"terms of ");
        } else if starts(word, b"ipsum") {
            self.lorem_ipsum |= ends(before, b"lorem ");
        }
    }
}

/// Whether the word at the start of `word` begins as the last word of one of the phrases does: letters that stand together
/// are of one word, so it does not matter what else stands behind it. Without branches: which letters words begin with
/// cannot be predicted.
#[inline]
pub(super) fn may_end_phrase(word: &[u8]) -> bool {
    let head = match word.first_chunk::<8>() {
        Some(head) => u64::from_le_bytes(*head),
        None => word.iter().rev().fold(0, |head, byte| head << 8 | u64::from(*byte)),
    };
    begins_as_last_word(head)
}

/// As [`may_end_phrase`], of the first eight bytes, from the lowest on, with zeros behind a shorter word.
#[inline]
pub(super) fn begins_as_last_word(head: u64) -> bool {
    const fn number(letters: &[u8]) -> u64 {
        let mut number = 0;
        let mut at = letters.len();
        while at > 0 {
            at -= 1;
            number = number << 8 | letters[at] as u64;
        }
        number
    }
    // Letters in lower case; nothing but `P` and `p` becomes `p`.
    let head = head | 0x2020_2020_2020_2020;
    (head & number(&[0xff; 6]) == number(b"policy"))
        | (head & number(&[0xff; 7]) == number(b"cookies"))
        | (head & number(&[0xff; 5]) == number(b"ipsum"))
        | (head & number(&[0xff; 3]) == number(b"use"))
}

/// Whether a word of class bits `class` has "javascript" in it.
#[inline]
pub(super) fn speaks_of_javascript(word: &[u8], class: u16) -> bool {
    class & JAY != 0 && contains(word, b"javascript")
}

fn starts(bytes: &[u8], prefix: &[u8]) -> bool {
    bytes.len() >= prefix.len() && bytes[..prefix.len()].eq_ignore_ascii_case(prefix)
}

fn ends(bytes: &[u8], suffix: &[u8]) -> bool {
    bytes.len() >= suffix.len() && bytes[bytes.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window.eq_ignore_ascii_case(needle))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(text: &str) -> (String, C4Lines) {
        let mut out = String::new();
        let counts = c4_clean(text, &mut out);
        (out, counts)
    }

    #[test]
    fn lines_go_for_the_first_reason() {
        let text = "A line that is kept.\n\
                    A line without a mark\n\
                    A line that trails off...\n\
                    Two words.\n\
                    Please enable JavaScript now.\n\
                    \n  \t\n\
                    Read our Privacy Policy here.\r\n\
                    She said \"this stays.\"\n\
                    javascript\n\
                    Is this kept? Yes it is!  ";
        let (out, counts) = clean(text);
        assert_eq!(out, "A line that is kept.\nShe said \"this stays.\"\nIs this kept? Yes it is!");
        assert_eq!(counts, C4Lines { kept: 3, no_terminal_mark: 3, too_few_words: 1, javascript: 1, policy: 1 });
        assert_eq!(counts.removed(), 6);
    }

    #[test]
    fn citations_hide_no_end_of_a_line() {
        // In the last the reference sees an ellipsis.
        for line in
            ["He died in 1912.[3]", "It was so.[12][edit][]", "Who said that?[citation needed]", "And so on..[3]."]
        {
            assert_eq!(clean(line), (line.to_owned(), C4Lines { kept: 1, ..C4Lines::default() }));
        }
        for line in
            ["He died in 1912[3]", "He died in 1912. [3]", "See the note.[a]", "And so on...[3]", "not so.]", "[1]"]
        {
            assert_eq!(clean(line).1.no_terminal_mark, 1, "{line}");
        }
    }

    #[test]
    fn every_policy_phrase_is_found_in_any_case() {
        for phrase in POLICY_PHRASES {
            for phrase in [phrase.to_owned(), phrase.to_uppercase(), format!("x{phrase}x")] {
                let (out, counts) = clean(&format!("See the {phrase} of it."));
                assert_eq!((out.as_str(), counts.policy), ("", 1), "{phrase}");
            }
        }
        for other in ["the use of a cookie.", "a policy of privacy.", "use  cookies here.", "use\u{a0}cookies here."] {
            assert_eq!(clean(other).1.kept, 1, "{other}");
        }
    }

    #[test]
    fn javascript_is_found_inside_a_word() {
        assert_eq!(clean("Go to (nojavascript:void) now.").1.javascript, 1);
        assert_eq!(clean("The java script is here.").1.kept, 1);
    }

    #[test]
    fn output_is_appended() {
        let mut out = String::from("before|");
        c4_clean("one two three.\nfour five six.", &mut out);
        assert_eq!(out, "before|one two three.\nfour five six.");
        assert_eq!(clean(""), (String::new(), C4Lines::default()));
    }
}
