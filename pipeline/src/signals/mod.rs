//! Quality signals: typed numbers about a document, all computed in one pass over its text from one word
//! segmentation.
//!
//! **Signals are columns, rules are SQL.** [`compute`] turns a text into [`Signals`], one field per
//! column of [`SIGNALS`]; [`profiles`] names the published rules as predicates over those columns;
//! [`udf`] makes both available to DataFusion plans. `docs/SIGNALS.md` lists every formula and where we
//! differ from other systems.
//!
//! Conventions: a character is a Unicode scalar value; a word is a maximal run of characters that are
//! not Unicode white space; a line is trimmed of white space and not blank; a fraction of nothing is 0.
//! Fractions lie in [0, 1], ratios are per word and may exceed 1. White space at the ends of a text and
//! of its lines changes no signal but `char_count` and `byte_count`.

mod c4;
mod lines;
#[cfg(test)]
mod naive;
pub mod profiles;
mod repetition;
pub mod udf;
mod words;

pub use c4::{C4Lines, MIN_WORDS_PER_LINE, c4_clean};

use repetition::Repetition;
use xxhash_rust::xxh3::xxh3_64;

/// Type of a signal's column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Arrow and SQL 64-bit integer.
    Int64,
    /// Arrow and SQL double.
    Float64,
    /// Arrow and SQL boolean.
    Boolean,
}

/// One value of a signal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// Of an [`Kind::Int64`] signal.
    Int64(i64),
    /// Of a [`Kind::Float64`] signal.
    Float64(f64),
    /// Of a [`Kind::Boolean`] signal.
    Boolean(bool),
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int64(value)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Float64(value)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Boolean(value)
    }
}

/// Description of a signal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Signal {
    /// Name of the column.
    pub name: &'static str,
    /// Type of the column.
    pub kind: Kind,
    /// What it says, in a line.
    pub meaning: &'static str,
    /// How it is computed.
    pub formula: &'static str,
    /// Where it comes from.
    pub source: &'static str,
}

macro_rules! rust_type {
    (Int64) => {
        i64
    };
    (Float64) => {
        f64
    };
    (Boolean) => {
        bool
    };
}

/// The one list of signals: makes the table [`SIGNALS`], the struct [`Signals`] and the values of a row.
macro_rules! signals {
    ($($name:ident: $kind:ident, $meaning:literal, $formula:literal, $source:literal;)*) => {
        /// Every signal, in the order of the columns.
        pub static SIGNALS: [Signal; signals!(@count $($name)*)] = [$(Signal {
            name: stringify!($name),
            kind: Kind::$kind,
            meaning: $meaning,
            formula: $formula,
            source: $source,
        }),*];

        /// The signals of one document.
        #[derive(Clone, Copy, Debug, Default, PartialEq)]
        pub struct Signals {
            $(#[doc = $meaning] #[doc = ""] #[doc = $formula] pub $name: rust_type!($kind),)*
        }

        impl Signals {
            /// The values in the order of [`SIGNALS`].
            pub fn values(&self) -> [Value; SIGNALS.len()] {
                [$(Value::from(self.$name)),*]
            }
        }
    };
    (@count) => { 0 };
    (@count $head:ident $($tail:ident)*) => { 1 + signals!(@count $($tail)*) };
}

signals! {
    byte_count: Int64, "Length of the text in bytes.", "bytes of UTF-8", "";
    char_count: Int64, "Length of the text in characters.", "Unicode scalar values", "";
    word_count: Int64, "Number of words.", "maximal runs without Unicode white space", "";
    non_symbol_word_count: Int64, "Number of words that are not pure symbols.",
        "words with an alphanumeric character", "Gopher A.1.1";
    line_count: Int64, "Number of lines.", "pieces between newlines that are not blank", "";
    paragraph_count: Int64, "Number of paragraphs.", "maximal runs of lines without a blank one between", "";
    mean_word_length: Float64, "Mean length of the words that are not pure symbols, in characters.",
        "characters of these words / non_symbol_word_count", "Gopher A.1.1";
    max_word_length: Int64, "Length of the longest word in characters.", "max over all words", "C4 (code)";
    hash_ratio: Float64, "Number signs per word.", "count of '#' / word_count", "Gopher A.1.1";
    ellipsis_ratio: Float64, "Ellipses per word.",
        "count of '...' (no overlap) and '…' / word_count", "Gopher A.1.1";
    symbol_ratio: Float64, "Number signs and ellipses per word.", "hash_ratio + ellipsis_ratio", "RedPajama-v2";
    alpha_word_fraction: Float64, "Fraction of words with an alphabetic character.",
        "words with a character of Unicode Alphabetic / word_count", "Gopher A.1.1";
    stop_word_count: Int64, "How many of the eight English stop words occur.",
        "distinct of {the, be, to, of, and, that, have, with} among the words, case and all", "Gopher A.1.1";
    bullet_line_fraction: Float64, "Fraction of lines that start with a bullet.",
        "lines starting with '•', '-' or '*' / line_count", "Gopher A.1.1";
    ellipsis_line_fraction: Float64, "Fraction of lines that end in an ellipsis.",
        "lines ending in '...' or '…' / line_count", "Gopher A.1.1";
    duplicate_line_fraction: Float64, "Fraction of lines that occurred before in the text.",
        "lines equal to an earlier line / line_count", "Gopher table A1";
    duplicate_line_char_fraction: Float64, "Fraction of characters in lines that occurred before.",
        "characters of these lines / characters of all lines", "Gopher table A1, FineWeb";
    duplicate_paragraph_fraction: Float64, "Fraction of paragraphs that occurred before in the text.",
        "paragraphs equal to an earlier one line by line / paragraph_count", "Gopher table A1";
    duplicate_paragraph_char_fraction: Float64, "Fraction of characters in paragraphs that occurred before.",
        "characters of these paragraphs' lines / characters of all lines", "Gopher table A1";
    top_2gram_char_fraction: Float64, "Fraction of characters in the most frequent 2-gram of words.",
        "occurrences × characters of its words / characters of all words, at most 1", "Gopher table A1";
    top_3gram_char_fraction: Float64, "Fraction of characters in the most frequent 3-gram of words.",
        "occurrences × characters of its words / characters of all words, at most 1", "Gopher table A1";
    top_4gram_char_fraction: Float64, "Fraction of characters in the most frequent 4-gram of words.",
        "occurrences × characters of its words / characters of all words, at most 1", "Gopher table A1";
    duplicate_5gram_char_fraction: Float64, "Fraction of characters in 5-grams of words that occurred before.",
        "characters of words in 5-grams found again by a walk without overlap / characters of all words",
        "Gopher table A1";
    duplicate_6gram_char_fraction: Float64, "Fraction of characters in 6-grams of words that occurred before.",
        "characters of words in 6-grams found again by a walk without overlap / characters of all words",
        "Gopher table A1";
    duplicate_7gram_char_fraction: Float64, "Fraction of characters in 7-grams of words that occurred before.",
        "characters of words in 7-grams found again by a walk without overlap / characters of all words",
        "Gopher table A1";
    duplicate_8gram_char_fraction: Float64, "Fraction of characters in 8-grams of words that occurred before.",
        "characters of words in 8-grams found again by a walk without overlap / characters of all words",
        "Gopher table A1";
    duplicate_9gram_char_fraction: Float64, "Fraction of characters in 9-grams of words that occurred before.",
        "characters of words in 9-grams found again by a walk without overlap / characters of all words",
        "Gopher table A1";
    duplicate_10gram_char_fraction: Float64,
        "Fraction of characters in 10-grams of words that occurred before.",
        "characters of words in 10-grams found again by a walk without overlap / characters of all words",
        "Gopher table A1";
    c4_kept_line_count: Int64, "Number of lines that C4 keeps.",
        "lines with a terminal mark, three words, no JavaScript and no policy notice", "C4 section 2.2";
    c4_no_terminal_mark_line_count: Int64, "Number of lines C4 removes for their end.",
        "lines not ending in one of . ? ! \" or ending in '...'", "C4 section 2.2";
    c4_too_few_words_line_count: Int64, "Number of lines C4 removes for having too few words.",
        "of the other lines, those of fewer than 3 words", "C4 section 2.2";
    c4_javascript_line_count: Int64, "Number of lines C4 removes for JavaScript.",
        "of the other lines, those with 'javascript' in any ASCII case", "C4 section 2.2";
    c4_policy_line_count: Int64, "Number of lines C4 removes for a policy notice.",
        "of the other lines, those with one of six phrases such as 'privacy policy'", "C4 section 2.2";
    c4_sentence_count: Int64, "Number of sentences in the lines that C4 keeps.",
        "words ending in . ? ! that are no abbreviation, plus one for a rest of a line", "C4 section 2.2";
    c4_has_lorem_ipsum: Boolean, "Whether 'lorem ipsum' occurs anywhere, in any ASCII case.",
        "a line contains 'lorem ipsum'", "C4 section 2.2";
    c4_has_curly_bracket: Boolean, "Whether an opening curly bracket occurs anywhere.",
        "the text contains '{'", "C4 section 2.2";
    terminal_line_fraction: Float64, "Fraction of lines that end in a terminal punctuation mark.",
        "lines ending in a character of Unicode Sentence_Terminal / line_count", "FineWeb section 3.6";
    short_line_fraction: Float64, "Fraction of lines of at most 30 characters.",
        "lines of <= 30 characters / line_count", "FineWeb section 3.6";
    newline_ratio: Float64, "Newlines per word.",
        "newlines between the first and the last line / word_count", "FineWeb section 3.6";
}

/// Memory that [`compute`] keeps from document to document: after the first few, no allocation. A document
/// needs up to 70 bytes of it per word; what a document of more than some four million words took is given back.
#[derive(Debug, Default)]
pub struct Scratch {
    repetition: Repetition,
}

/// All signals of `text`. Linear time; a function of the text alone.
pub fn compute(text: &str, scratch: &mut Scratch) -> Signals {
    let repetition = &mut scratch.repetition;
    repetition.clear();
    let mut word_count = 0u64;
    let mut non_symbol_words = 0u64;
    let mut non_symbol_chars = 0u64;
    let mut alpha_words = 0u64;
    let mut max_word_length = 0;
    let mut hashes = 0;
    let mut ellipses = 0;
    let mut stop_words = 0u8;
    let mut bullet_lines = 0u64;
    let mut ellipsis_lines = 0u64;
    let mut terminal_lines = 0u64;
    let mut short_lines = 0u64;
    let mut c4_lines = C4Lines::default();
    let mut c4_sentences = 0u64;
    let mut lorem_ipsum = false;
    let mut curly_bracket = false;
    let mut newlines = 0u64;
    let mut newlines_to_last_line = 0u64;
    let mut newlines_to_first_line = None;
    let mut after_blank = true;

    lines::for_each(text, |line| {
        newlines += 1;
        if line.is_empty() {
            after_blank = true;
            return;
        }
        newlines_to_first_line.get_or_insert(newlines);
        newlines_to_last_line = newlines;
        let mut phrases = c4::Phrases::default();
        let mut sentences = 0u64;
        let mut sentence_open = false;
        let mut words_of_line = 0usize;
        let bytes = line.as_bytes();
        let continuation = words::scan(line, |word| {
            let word_bytes = &bytes[word.start..word.end];
            let chars = word.chars();
            words_of_line += 1;
            repetition.push_word(xxh3_64(word_bytes), chars);
            max_word_length = max_word_length.max(chars);
            if word.class & words::ALPHANUMERIC != 0 {
                non_symbol_words += 1;
                non_symbol_chars += chars as u64;
            }
            alpha_words += u64::from(word.class & words::ALPHABETIC);
            hashes += words::hash_signs(word_bytes, word.class);
            ellipses += words::ellipses(word_bytes, &word);
            stop_words |= words::stop_word(word_bytes);
            phrases.observe(bytes, &word);
            sentence_open = !words::ends_sentence(&line[word.start..word.end]);
            sentences += u64::from(!sentence_open);
        });
        let chars = line.len() - continuation;
        word_count += words_of_line as u64;
        repetition.push_line(xxh3_64(bytes), chars, after_blank);
        after_blank = false;
        bullet_lines += u64::from(lines::starts_with_bullet(line));
        ellipsis_lines += u64::from(lines::ends_with_ellipsis(line));
        terminal_lines += u64::from(lines::ends_with_terminal_mark(line));
        short_lines += u64::from(chars <= lines::SHORT_LINE_CHARS);
        lorem_ipsum |= phrases.lorem_ipsum;
        curly_bracket |= phrases.curly_bracket;
        if c4_lines.count(line, words_of_line, phrases) {
            c4_sentences += sentences + u64::from(sentence_open);
        }
    });

    let line_count = repetition.line_count();
    let paragraph_count = repetition.paragraph_count();
    let line_chars = repetition.line_chars();
    let word_chars = repetition.word_chars();
    let duplicate_lines = repetition.duplicate_lines();
    let duplicate_paragraphs = repetition.duplicate_paragraphs();
    let ngrams = repetition.ngram_chars();
    let inner_newlines = newlines_to_first_line.map_or(0, |first| newlines_to_last_line - first);
    let top = ngrams.top.map(|chars| ratio(chars.min(word_chars), word_chars));
    let duplicate = ngrams.duplicate.map(|chars| ratio(chars, word_chars));

    Signals {
        byte_count: text.len() as i64,
        char_count: text.chars().count() as i64,
        word_count: word_count as i64,
        non_symbol_word_count: non_symbol_words as i64,
        line_count: line_count as i64,
        paragraph_count: paragraph_count as i64,
        mean_word_length: ratio(non_symbol_chars, non_symbol_words),
        max_word_length: max_word_length as i64,
        hash_ratio: ratio(hashes, word_count),
        ellipsis_ratio: ratio(ellipses, word_count),
        symbol_ratio: ratio(hashes + ellipses, word_count),
        alpha_word_fraction: ratio(alpha_words, word_count),
        stop_word_count: i64::from(stop_words.count_ones()),
        bullet_line_fraction: ratio(bullet_lines, line_count),
        ellipsis_line_fraction: ratio(ellipsis_lines, line_count),
        duplicate_line_fraction: ratio(duplicate_lines.units, line_count),
        duplicate_line_char_fraction: ratio(duplicate_lines.chars, line_chars),
        duplicate_paragraph_fraction: ratio(duplicate_paragraphs.units, paragraph_count),
        duplicate_paragraph_char_fraction: ratio(duplicate_paragraphs.chars, line_chars),
        top_2gram_char_fraction: top[0],
        top_3gram_char_fraction: top[1],
        top_4gram_char_fraction: top[2],
        duplicate_5gram_char_fraction: duplicate[0],
        duplicate_6gram_char_fraction: duplicate[1],
        duplicate_7gram_char_fraction: duplicate[2],
        duplicate_8gram_char_fraction: duplicate[3],
        duplicate_9gram_char_fraction: duplicate[4],
        duplicate_10gram_char_fraction: duplicate[5],
        c4_kept_line_count: c4_lines.kept as i64,
        c4_no_terminal_mark_line_count: c4_lines.no_terminal_mark as i64,
        c4_too_few_words_line_count: c4_lines.too_few_words as i64,
        c4_javascript_line_count: c4_lines.javascript as i64,
        c4_policy_line_count: c4_lines.policy as i64,
        c4_sentence_count: c4_sentences as i64,
        c4_has_lorem_ipsum: lorem_ipsum,
        c4_has_curly_bracket: curly_bracket,
        terminal_line_fraction: ratio(terminal_lines, line_count),
        short_line_fraction: ratio(short_lines, line_count),
        newline_ratio: ratio(inner_newlines, word_count),
    }
}

/// A fraction of nothing is 0.
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests;
