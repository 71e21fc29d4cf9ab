//! Normalisation: text to cleaner text, part by part, every change counted.
//!
//! Each [`Part`] can be switched; they run in the order of [`Part::ALL`], repairs before removals. Parts that remove
//! or rewrite leave code, formulas and link targets of Markdown and LaTeX alone ([`protect`]); repairs (encoding,
//! controls, zero-width characters, NFC) apply everywhere. Time is linear in the text.

mod characters;
mod html;
mod lines;
mod mojibake;
mod numbers;
mod odd;
mod protect;
mod punctuation;
#[cfg(test)]
mod tests;
mod urls;
mod white_space;

use std::borrow::Cow;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// One kind of change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// UTF-8 that was read as windows-1252 (`â€™`) becomes what it was (`’`). Counted: sequences.
    Mojibake,
    /// Control characters and noncharacters go; a lone carriage return becomes a newline. Counted: characters.
    Controls,
    /// Zero-width and direction-override characters go, except joiners where a script or an emoji needs them.
    /// Counted: characters.
    ZeroWidth,
    /// Canonical composition (Unicode NFC). Counted: pieces of text that it changed.
    Nfc,
    /// Tags, comments, scripts and style sheets go, character references are decoded. Counted: each of them.
    Html,
    /// Web addresses go, except as targets of Markdown links. Counted: addresses.
    Urls,
    /// Strings that no reader wrote: encoded blobs, words of over 200 characters, rules of symbols. Counted: strings.
    AbnormalStrings,
    /// Repeated marks become one: `!!!!` → `!`, `?!?!?!` → `?!`, `。。` → `。`, `.....` → `...`. Counted: runs.
    RepeatedPunctuation,
    /// Private-use and replacement characters go; odd spaces, ligatures and full-width letters become plain ones.
    /// Counted: characters.
    SpecialCharacters,
    /// Digits of full-width forms become ASCII, thousands lose their separators. Counted: numbers.
    Numbers,
    /// Lines that C4 removes. Counted: lines.
    C4Lines,
    /// Lines that RefinedWeb removes or cuts. Counted: lines.
    RefinedwebLines,
    /// Spaces at line ends go, more than one blank line in a row becomes one. Counted: lines.
    WhiteSpace,
}

impl Part {
    /// All parts, in the order in which they run.
    pub const ALL: [Self; 13] = [
        Self::Mojibake,
        Self::Controls,
        Self::ZeroWidth,
        Self::Nfc,
        Self::Html,
        Self::Urls,
        Self::AbnormalStrings,
        Self::RepeatedPunctuation,
        Self::SpecialCharacters,
        Self::Numbers,
        Self::C4Lines,
        Self::RefinedwebLines,
        Self::WhiteSpace,
    ];

    /// The name in recipes and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mojibake => "mojibake",
            Self::Controls => "controls",
            Self::ZeroWidth => "zero_width",
            Self::Nfc => "nfc",
            Self::Html => "html",
            Self::Urls => "urls",
            Self::AbnormalStrings => "abnormal_strings",
            Self::RepeatedPunctuation => "repeated_punctuation",
            Self::SpecialCharacters => "special_characters",
            Self::Numbers => "numbers",
            Self::C4Lines => "c4_lines",
            Self::RefinedwebLines => "refinedweb_lines",
            Self::WhiteSpace => "white_space",
        }
    }
}

/// Changes of one text, by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes([u64; Part::ALL.len()]);

impl Changes {
    /// How often `part` changed the text.
    pub fn of(&self, part: Part) -> u64 {
        self.0[part as usize]
    }

    /// Whether anything was changed.
    pub fn any(&self) -> bool {
        self.0.iter().any(|n| *n > 0)
    }
}

/// Which parts run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Normaliser {
    parts: Vec<Part>,
}

impl Normaliser {
    /// The given parts, in the order of [`Part::ALL`] whatever theirs was.
    pub fn new(parts: impl IntoIterator<Item = Part>) -> Self {
        let mut parts: Vec<Part> = parts.into_iter().collect();
        parts.sort_unstable();
        parts.dedup();
        Self { parts }
    }

    /// The parts in order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The text after all parts. Borrowed when nothing changed.
    pub fn apply<'t>(&self, text: &'t str, changes: &mut Changes) -> Cow<'t, str> {
        let mut current = Cow::Borrowed(text);
        // Where code and formulas stand: looked for when a part asks and again after a part that changed the text.
        let mut protected: Option<Vec<Range<usize>>> = None;
        for part in &self.parts {
            let spans: &[Range<usize>] = match part {
                Part::Html
                | Part::Urls
                | Part::AbnormalStrings
                | Part::RepeatedPunctuation
                | Part::SpecialCharacters
                | Part::Numbers => protected.get_or_insert_with(|| protect::spans(&current)),
                _ => &[],
            };
            let mut out = Output::new(&current);
            match part {
                Part::Mojibake => mojibake::repair(&mut out),
                Part::Controls => characters::controls(&mut out),
                Part::ZeroWidth => characters::zero_width(&mut out),
                Part::Nfc => characters::nfc(&mut out),
                Part::Html => html::remains(&mut out, spans),
                Part::Urls => urls::remove(&mut out, spans),
                Part::AbnormalStrings => odd::strings(&mut out, spans),
                Part::RepeatedPunctuation => punctuation::collapse(&mut out, spans),
                Part::SpecialCharacters => characters::special(&mut out, spans),
                Part::Numbers => numbers::standardise(&mut out, spans),
                Part::C4Lines => lines::c4(&mut out),
                Part::RefinedwebLines => lines::refinedweb(&mut out),
                Part::WhiteSpace => white_space::tidy(&mut out),
            }
            if let Some((changed, count)) = out.finish() {
                changes.0[*part as usize] += count;
                current = Cow::Owned(changed);
                protected = None;
            }
        }
        current
    }
}

/// A text being rewritten from left to right: nothing is copied until the first change.
struct Output<'t> {
    text: &'t str,
    /// Bytes of `text` that are dealt with.
    done: usize,
    written: String,
    count: u64,
}

impl<'t> Output<'t> {
    fn new(text: &'t str) -> Self {
        Self { text, done: 0, written: String::new(), count: 0 }
    }

    fn text(&self) -> &'t str {
        self.text
    }

    /// `range` of the text becomes `with`: one change. Ranges come in order; one that begins in what is done is
    /// ignored.
    fn replace(&mut self, range: Range<usize>, with: &str) {
        if range.start < self.done {
            return;
        }
        if self.count == 0 {
            self.written.reserve(self.text.len());
        }
        self.written.push_str(&self.text[self.done..range.start]);
        self.written.push_str(with);
        self.done = range.end;
        self.count += 1;
    }

    /// As [`Self::replace`] with nothing.
    fn remove(&mut self, range: Range<usize>) {
        self.replace(range, "");
    }

    /// Whether what is written so far, and the text up to `at` behind it, ends with a line.
    fn at_line_start(&self, at: usize) -> bool {
        let untouched = &self.text[self.done..at];
        let before = if untouched.is_empty() { self.written.as_str() } else { untouched };
        before.is_empty() || before.ends_with('\n')
    }

    /// All of the text becomes `text`, with `count` changes.
    fn become_all(&mut self, text: String, count: u64) {
        self.written = text;
        self.done = self.text.len();
        self.count = count;
    }

    /// The new text and how many changes there were; none when there were none.
    fn finish(mut self) -> Option<(String, u64)> {
        if self.count == 0 {
            return None;
        }
        self.written.push_str(&self.text[self.done..]);
        Some((self.written, self.count))
    }
}

/// Whether `at` lies in one of `spans`, which are ascending and disjoint; `next` is where the last search ended, for
/// searches at rising places.
fn is_protected(spans: &[Range<usize>], next: &mut usize, at: usize) -> bool {
    while spans.get(*next).is_some_and(|span| span.end <= at) {
        *next += 1;
    }
    spans.get(*next).is_some_and(|span| span.start <= at)
}
