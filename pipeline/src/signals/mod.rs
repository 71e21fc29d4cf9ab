//! Quality signals: typed numbers about a document, all computed in one pass over its text from one word
//! segmentation.
//!
//! **Signals are columns, rules are SQL.** [`compute`] turns a text into [`Signals`], one field per
//! column of [`SIGNALS`]; [`profiles`] names the published rules as predicates over those columns;
//! [`udf`] makes both available to DataFusion plans. `docs/SIGNALS.md` lists every formula and where we
//! differ from other systems.
//!
//! Conventions: a character is a Unicode scalar value; a word is a maximal run of characters that are
//! not Unicode white space (in scripts without spaces, a piece of such a run); a line is trimmed of white space and not blank; a fraction of nothing is 0.
//! Fractions lie in [0, 1], ratios are per word and may exceed 1. White space at the ends of a text and
//! of its lines changes no signal but `char_count` and `byte_count`.

mod c4;
mod compression;
pub mod document;
mod entropy;
mod lines;
#[cfg(test)]
mod naive;
pub mod profiles;
mod refinedweb;
mod repetition;
mod stop_words;
pub mod udf;
mod vocabulary;
pub(crate) mod words;

pub use c4::{C4Lines, MIN_WORDS_PER_LINE, c4_clean};
pub use document::{ClassifierConfig, DocumentSignals, SignalsConfig};
pub use refinedweb::{COUNTERS, LineFault, RefinedWebLine, refinedweb_line};
pub use stop_words::StopWords;

use c4::Phrases;
use compression::Compression;
use memchr::{memchr, memchr_iter};
use refinedweb::LineShape;
use repetition::Repetition;
use vocabulary::{
    ALL_CAPS, ALPHABETIC, ALPHANUMERIC, Description, DistinctWord, ELLIPSES, JAVASCRIPT, LISTED, PHRASE, SENTENCE_END,
    Vocabulary,
};
use words::{Scan, Short, Spaces};
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
    sentence_count: Int64, "Number of sentences.",
        "words ending in . ? ! that are no abbreviation, plus one for a rest of a line", "RedPajama-v2";
    stop_word_fraction: Float64, "Fraction of words that are stop words of the language.",
        "words of the language's list, in lower case or capitalised, without ASCII punctuation at their ends / word_count",
        "RedPajama-v2";
    unique_word_fraction: Float64, "Fraction of words that are different from each other.",
        "distinct words / word_count", "RedPajama-v2";
    word_entropy: Float64, "Entropy of the distribution of words in nats.",
        "-sum over distinct words of p ln p, p = occurrences / word_count", "RedPajama-v2";
    all_caps_word_fraction: Float64, "Fraction of words in capital letters.",
        "words with an upper-case and no lower-case character / word_count", "RedPajama-v2";
    curly_bracket_fraction: Float64, "Fraction of characters that are curly brackets.",
        "count of '{' and '}' / characters of all words", "RedPajama-v2";
    uppercase_char_fraction: Float64, "Fraction of characters that are upper-case letters.",
        "characters of Unicode Uppercase / characters of all words", "RedPajama-v2";
    digit_char_fraction: Float64, "Fraction of characters that are numbers.",
        "characters of category Nd, Nl, No / characters of all words", "RedPajama-v2";
    symbol_char_fraction: Float64, "Fraction of characters that are neither letters nor numbers.",
        "characters that are not alphanumeric / characters of all words", "";
    javascript_line_count: Int64, "Number of lines that speak of JavaScript.",
        "lines with 'javascript' in any ASCII case", "RedPajama-v2";
    mean_any_word_length: Float64, "Mean length of all words, in characters.",
        "characters of all words / word_count", "MassiveText, RefinedWeb";
    covered_5gram_char_fraction: Float64, "Fraction of characters in 5-grams of words that occur more than once.",
        "characters of words in any such 5-gram, each once / characters of all words", "MassiveText table A1";
    covered_6gram_char_fraction: Float64, "Fraction of characters in 6-grams of words that occur more than once.",
        "characters of words in any such 6-gram, each once / characters of all words", "MassiveText table A1";
    covered_7gram_char_fraction: Float64, "Fraction of characters in 7-grams of words that occur more than once.",
        "characters of words in any such 7-gram, each once / characters of all words", "MassiveText table A1";
    covered_8gram_char_fraction: Float64, "Fraction of characters in 8-grams of words that occur more than once.",
        "characters of words in any such 8-gram, each once / characters of all words", "MassiveText table A1";
    covered_9gram_char_fraction: Float64, "Fraction of characters in 9-grams of words that occur more than once.",
        "characters of words in any such 9-gram, each once / characters of all words", "MassiveText table A1";
    covered_10gram_char_fraction: Float64, "Fraction of characters in 10-grams of words that occur more than once.",
        "characters of words in any such 10-gram, each once / characters of all words", "MassiveText table A1";
    refinedweb_uppercase_line_count: Int64, "Number of lines RefinedWeb removes for capital letters.",
        "lines with more than half of their characters of Unicode Uppercase", "RefinedWeb G.2, DCLM";
    refinedweb_numeric_line_count: Int64, "Number of lines RefinedWeb removes for being numbers.",
        "of the other lines, those of numbers alone", "RefinedWeb G.2, DCLM";
    refinedweb_counter_line_count: Int64, "Number of lines RefinedWeb removes for being counters.",
        "of the other lines, those like '3 likes'", "RefinedWeb G.2, DCLM";
    refinedweb_one_word_line_count: Int64, "Number of lines RefinedWeb removes for having one word.",
        "of the other lines, those of fewer than 2 words", "RefinedWeb G.2, DCLM";
    refinedweb_cut_line_count: Int64, "Number of lines RefinedWeb cuts words of a page's frame from.",
        "of the other lines, those of at most 10 words with 'items in cart', beginning 'sign-in' or ending 'read more...'",
        "RefinedWeb G.2, DCLM";
    refinedweb_removed_word_fraction: Float64, "Fraction of words in what RefinedWeb removes and cuts.",
        "words that the line rules take away / word_count", "RefinedWeb G.2, DCLM";
    byte_entropy: Float64, "Entropy of the distribution of bytes in bits.",
        "-sum over byte values of p log2 p, over the text without white space at its ends", "";
    compression_ratio: Float64, "Size under compression per byte of text.",
        "bytes of a zstd frame of level 1 / bytes, of the text without white space at its ends, at most 1", "";
}

/// Memory that [`compute`] keeps from document to document: after the first few, no allocation. A document
/// needs up to 120 bytes of it per word; what a document of more than some 260,000 words took is given back.
#[derive(Debug, Default)]
pub struct Scratch {
    spaces: Spaces,
    vocabulary: Vocabulary,
    repetition: Repetition,
    compression: Compression,
    parts: Parts,
}

/// What takes time for a few signals alone: nothing of it is done where none of them is wanted.
#[derive(Clone, Copy, Debug)]
struct Parts {
    compression: bool,
    /// Counts of every byte and of characters by what they are.
    characters: bool,
    /// Words in n-grams that occur more than once.
    covered: bool,
    /// The line rules of RefinedWeb.
    line_rules: bool,
    /// Words of the list of stop words in any shape.
    stop_words: bool,
}

impl Default for Parts {
    fn default() -> Self {
        Self { compression: true, characters: true, covered: true, line_rules: true, stop_words: true }
    }
}

impl Scratch {
    /// For the `wanted` signals: with it, [`compute`] leaves out what none of them needs, and the others may be anything.
    pub fn only(wanted: impl Fn(&str) -> bool) -> Self {
        let any = |begins: &[&str]| {
            SIGNALS
                .iter()
                .any(|signal| begins.iter().any(|begin| signal.name.starts_with(begin)) && wanted(signal.name))
        };
        let parts = Parts {
            compression: any(&["compression_ratio"]),
            characters: any(&["byte_entropy", "curly_bracket_", "uppercase_char_", "digit_char_", "symbol_char_"]),
            covered: any(&["covered_"]),
            line_rules: any(&["refinedweb_"]),
            stop_words: any(&["stop_word_fraction"]),
        };
        Self { parts, ..Self::default() }
    }
}

/// All signals of `text` in English. Linear time; a function of the text alone.
pub fn compute(text: &str, scratch: &mut Scratch) -> Signals {
    compute_in(text, StopWords::of(None), scratch)
}

/// All signals of `text` in the language of `stop_words`, on which `stop_word_count` and `stop_word_fraction` depend.
pub fn compute_in(text: &str, stop_words: &StopWords, scratch: &mut Scratch) -> Signals {
    let Scratch { spaces, vocabulary, repetition, compression, parts } = scratch;
    let bytes = text.as_bytes();
    spaces.look(bytes);
    vocabulary.begin(bytes.len());
    repetition.clear();
    let mut wide = Scan::default();
    let mut all_sentences = 0u64;
    let mut javascript_lines = 0u64;
    let mut refinedweb = RefinedWebCounts::default();
    let mut word_count = 0u64;
    let mut ellipses = 0;
    let mut bullet_lines = 0u64;
    let mut ellipsis_lines = 0u64;
    let mut terminal_lines = 0u64;
    let mut short_lines = 0u64;
    let mut c4_lines = C4Lines::default();
    let mut c4_sentences = 0u64;
    let mut lorem_ipsum = false;
    let mut newlines = 0u64;
    let mut newlines_to_last_line = 0u64;
    let mut newlines_to_first_line = None;
    let mut after_blank = true;
    let mut tokens = [Token::default(); AHEAD];

    lines::for_each(text, |at, line| {
        newlines += 1;
        if line.is_empty() {
            after_blank = true;
            return;
        }
        newlines_to_first_line.get_or_insert(newlines);
        newlines_to_last_line = newlines;
        let mut found = LineWords::new(text, at, stop_words, parts.stop_words, &mut tokens);
        let mut scan = Scan::default();
        spaces.runs(at..at + line.len(), |from, to| {
            match Short::of(bytes, from, to).filter(|short| short.is_ascii()) {
                Some(short) => found.add(Token { from, to, hash: short.hash() }, vocabulary),
                // Long words, and those beyond ASCII, among which may be other white space.
                None => scan.add(words::scan(&text[from..to], |word| {
                    let (from, to) = (from + word.start, from + word.end);
                    found.add(Token { from, to, hash: words::hash_within(bytes, from, to) }, vocabulary);
                })),
            }
        });
        found.settle(vocabulary);
        let line_bytes = line.as_bytes();
        let chars = line.len() - scan.continuation;
        if parts.line_rules {
            let (ascii_upper, ascii_digits) = words::ascii_upper_and_digits(line_bytes);
            let (upper, numbers) = (ascii_upper + scan.upper, ascii_digits + scan.numbers);
            refinedweb.add(line, LineShape { words: found.words, characters: chars, upper, numbers });
        }
        wide.add(scan);
        let phrases = found.phrases();
        let sentences = found.sentences();
        all_sentences += sentences;
        ellipses += found.ellipses;
        javascript_lines += u64::from(phrases.javascript);
        word_count += found.words as u64;
        repetition.push_line(xxh3_64(line_bytes), chars, after_blank);
        after_blank = false;
        bullet_lines += u64::from(lines::starts_with_bullet(line));
        ellipsis_lines += u64::from(lines::ends_with_ellipsis(line));
        terminal_lines += u64::from(lines::ends_with_terminal_mark(line));
        short_lines += u64::from(chars <= lines::SHORT_LINE_CHARS);
        lorem_ipsum |= phrases.lorem_ipsum;
        if c4_lines.count(line, found.words, phrases) {
            c4_sentences += sentences;
        }
    });

    let of_words = WordCounts::of(vocabulary.distinct());
    let word_chars = of_words.chars;
    let line_count = repetition.line_count();
    let paragraph_count = repetition.paragraph_count();
    let line_chars = repetition.line_chars();
    let duplicate_lines = repetition.duplicate_lines();
    let duplicate_paragraphs = repetition.duplicate_paragraphs();
    let ngrams = repetition.ngram_chars(vocabulary, parts.covered);
    let inner_newlines = newlines_to_first_line.map_or(0, |first| newlines_to_last_line - first);
    let top = ngrams.top.map(|chars| ratio(chars.min(word_chars), word_chars));
    let duplicate = ngrams.duplicate.map(|chars| ratio(chars, word_chars));
    let covered = ngrams.covered.map(|chars| ratio(chars, word_chars));
    let content = text.trim().as_bytes();
    let (characters, byte_entropy) = if parts.characters {
        let counts = entropy::count(content);
        (CharacterCounts::of(&counts, wide), entropy::of_counts(&counts))
    } else {
        (CharacterCounts::of_signs(content), 0.0)
    };

    Signals {
        byte_count: text.len() as i64,
        char_count: text.chars().count() as i64,
        word_count: word_count as i64,
        non_symbol_word_count: of_words.non_symbol as i64,
        line_count: line_count as i64,
        paragraph_count: paragraph_count as i64,
        mean_word_length: ratio(of_words.non_symbol_chars, of_words.non_symbol),
        max_word_length: of_words.longest as i64,
        hash_ratio: ratio(characters.hashes, word_count),
        ellipsis_ratio: ratio(ellipses, word_count),
        symbol_ratio: ratio(characters.hashes + ellipses, word_count),
        alpha_word_fraction: ratio(of_words.alphabetic, word_count),
        stop_word_count: i64::from(of_words.gopher.count_ones()),
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
        c4_has_curly_bracket: characters.opening_curly > 0,
        terminal_line_fraction: ratio(terminal_lines, line_count),
        short_line_fraction: ratio(short_lines, line_count),
        newline_ratio: ratio(inner_newlines, word_count),
        sentence_count: all_sentences as i64,
        stop_word_fraction: ratio(of_words.listed, word_count),
        unique_word_fraction: ratio(ngrams.distinct_words, word_count),
        word_entropy: word_entropy(word_count, ngrams.count_logs),
        all_caps_word_fraction: ratio(of_words.all_caps, word_count),
        curly_bracket_fraction: ratio(characters.curly, word_chars),
        uppercase_char_fraction: ratio(characters.upper, word_chars),
        digit_char_fraction: ratio(characters.numbers, word_chars),
        symbol_char_fraction: ratio(word_chars - characters.alphanumeric, word_chars),
        javascript_line_count: javascript_lines as i64,
        mean_any_word_length: ratio(word_chars, word_count),
        covered_5gram_char_fraction: covered[0],
        covered_6gram_char_fraction: covered[1],
        covered_7gram_char_fraction: covered[2],
        covered_8gram_char_fraction: covered[3],
        covered_9gram_char_fraction: covered[4],
        covered_10gram_char_fraction: covered[5],
        refinedweb_uppercase_line_count: refinedweb.uppercase as i64,
        refinedweb_numeric_line_count: refinedweb.numeric as i64,
        refinedweb_counter_line_count: refinedweb.counters as i64,
        refinedweb_one_word_line_count: refinedweb.one_word as i64,
        refinedweb_cut_line_count: refinedweb.cut as i64,
        refinedweb_removed_word_fraction: ratio(refinedweb.removed_words, word_count),
        byte_entropy,
        compression_ratio: if parts.compression { compression.ratio(content) } else { 0.0 },
    }
}

/// A word in a text: its first byte, the byte behind it and its hash.
#[derive(Clone, Copy, Default)]
struct Token {
    from: usize,
    to: usize,
    hash: u64,
}

/// So many words are hashed before the first of them is looked up: whether a word is new cannot be predicted, and what
/// depends on the answer should not wait for a hash too.
const AHEAD: usize = 64;

/// What the words of a line come to, one after the other.
struct LineWords<'t> {
    text: &'t str,
    stop_words: &'t StopWords,
    /// As of [`describe`].
    with_core: bool,
    /// First byte of the line.
    start: usize,
    words: usize,
    /// Words that end a sentence.
    ends: u64,
    ellipses: u64,
    /// Marks of all words.
    marks: u8,
    /// Marks of the last one.
    last: u8,
    phrases: Phrases,
    /// Words that have not been looked up: the first `waiting` of them.
    tokens: &'t mut [Token; AHEAD],
    waiting: usize,
}

impl<'t> LineWords<'t> {
    fn new(
        text: &'t str,
        start: usize,
        stop_words: &'t StopWords,
        with_core: bool,
        tokens: &'t mut [Token; AHEAD],
    ) -> Self {
        Self {
            text,
            stop_words,
            with_core,
            start,
            words: 0,
            ends: 0,
            ellipses: 0,
            marks: 0,
            last: SENTENCE_END,
            phrases: Phrases::default(),
            tokens,
            waiting: 0,
        }
    }

    /// The next word.
    #[inline]
    fn add(&mut self, token: Token, vocabulary: &mut Vocabulary) {
        self.tokens[self.waiting] = token;
        self.waiting += 1;
        if self.waiting == AHEAD {
            self.settle(vocabulary);
        }
    }

    /// Looks up the words that wait.
    #[inline(never)]
    fn settle(&mut self, vocabulary: &mut Vocabulary) {
        for number in 0..self.waiting {
            let Token { from, to, hash } = self.tokens[number];
            let marks = vocabulary.add(hash, || describe(self.text, from, to, hash, self.stop_words, self.with_core));
            self.ends += u64::from(marks & SENTENCE_END);
            self.marks |= marks;
            self.last = marks;
            if marks & (PHRASE | ELLIPSES) != 0 {
                self.look_closer(from, to, marks);
            }
        }
        self.words += self.waiting;
        self.waiting = 0;
    }

    #[cold]
    fn look_closer(&mut self, from: usize, to: usize, marks: u8) {
        let text = self.text.as_bytes();
        let word = &text[from..to];
        if marks & PHRASE != 0 {
            self.phrases.look_back(&text[self.start..from], word);
        }
        if marks & ELLIPSES != 0 {
            self.ellipses += words::ellipses(word);
        }
    }

    /// What remains after the last end of a sentence is one more.
    fn sentences(&self) -> u64 {
        self.ends + u64::from(self.last & SENTENCE_END == 0)
    }

    fn phrases(&self) -> Phrases {
        Phrases { javascript: self.marks & JAVASCRIPT != 0, ..self.phrases }
    }
}

/// What is to be known of the word `text[from..to]`: everything that depends on it alone. `with_core`: whether a word of the
/// list of stop words counts in any shape.
#[inline(never)]
fn describe(text: &str, from: usize, to: usize, hash: u64, stop_words: &StopWords, with_core: bool) -> Description {
    let mark = |is: bool, mark: u8| if is { mark } else { 0 };
    let bytes = text.as_bytes();
    let (gopher, listed) = stop_words.look_up(hash);
    let short = Short::of(bytes, from, to).filter(|short| short.is_ascii());
    let (class, chars, may_end_phrase) = match short {
        Some(short) => (short.class(), to - from, short.may_end_phrase()),
        None => {
            let (class, chars) = words::class_and_chars(&text[from..to]);
            (class, chars, c4::may_end_phrase(&bytes[from..to]))
        }
    };
    let mut marks = mark(class & words::ALPHABETIC != 0, ALPHABETIC)
        | mark(class & words::ALPHANUMERIC != 0, ALPHANUMERIC)
        | mark(class & (words::UPPER | words::LOWER) == words::UPPER, ALL_CAPS)
        | mark(may_end_phrase, PHRASE)
        | mark(listed, LISTED);
    // Most words are letters alone: these end no sentence, have no ellipsis and nothing to take off.
    let letters_alone =
        short.is_some() && class & (words::SIGN | words::JAY) == 0 && bytes[from] != 0 && bytes[to - 1] != 0;
    if !letters_alone {
        let word = &text[from..to];
        let may_have_ellipsis = short.map_or(class & (words::DOT | words::ELLIPSIS) != 0, Short::has_two_full_stops);
        marks |= mark(words::ends_sentence(word), SENTENCE_END)
            | mark(c4::speaks_of_javascript(word.as_bytes(), class), JAVASCRIPT)
            | mark(may_have_ellipsis && words::ellipses(word.as_bytes()) > 0, ELLIPSES)
            | mark(!listed && with_core && stop_words.has_core(bytes, from, to), LISTED);
    }
    Description { chars: chars as u32, marks, gopher }
}

/// What depends on each word alone, of all words.
#[derive(Default)]
struct WordCounts {
    chars: u64,
    non_symbol: u64,
    non_symbol_chars: u64,
    alphabetic: u64,
    all_caps: u64,
    listed: u64,
    longest: u64,
    /// Which of the first eight stop words there are.
    gopher: u8,
}

impl WordCounts {
    fn of(distinct: &[DistinctWord]) -> Self {
        let mut all = Self::default();
        for DistinctWord { count, is, .. } in distinct {
            // Nothing is added where a word is not of the kind: a branch could not be predicted.
            let of = |mark: u8| u64::from(*count) * u64::from(is.marks & mark != 0);
            let chars = u64::from(is.chars);
            all.chars += u64::from(*count) * chars;
            all.non_symbol += of(ALPHANUMERIC);
            all.non_symbol_chars += of(ALPHANUMERIC) * chars;
            all.alphabetic += of(ALPHABETIC);
            all.all_caps += of(ALL_CAPS);
            all.listed += of(LISTED);
            all.longest = all.longest.max(chars);
            all.gopher |= is.gopher;
        }
        all
    }
}

/// Characters of all words, by what they are.
#[derive(Default)]
struct CharacterCounts {
    alphanumeric: u64,
    upper: u64,
    numbers: u64,
    curly: u64,
    opening_curly: u64,
    hashes: u64,
}

impl CharacterCounts {
    /// Of the bytes of a text, and what was found beyond ASCII.
    fn of(bytes: &[u64; 256], wide: Scan) -> Self {
        let sum = |first: u8, last: u8| bytes[usize::from(first)..=usize::from(last)].iter().sum::<u64>();
        let (upper, digits) = (sum(b'A', b'Z'), sum(b'0', b'9'));
        let opening_curly = sum(b'{', b'{');
        Self {
            alphanumeric: upper + digits + sum(b'a', b'z') + wide.alphanumeric as u64,
            upper: upper + wide.upper as u64,
            numbers: digits + wide.numbers as u64,
            curly: opening_curly + sum(b'}', b'}'),
            opening_curly,
            hashes: sum(b'#', b'#'),
        }
    }

    /// Number signs of a text and whether it has an opening curly bracket, alone.
    fn of_signs(text: &[u8]) -> Self {
        let opening_curly = u64::from(memchr(b'{', text).is_some());
        Self { hashes: memchr_iter(b'#', text).count() as u64, opening_curly, ..Self::default() }
    }
}

/// Lines that RefinedWeb removes or cuts.
#[derive(Default)]
struct RefinedWebCounts {
    uppercase: u64,
    numeric: u64,
    counters: u64,
    one_word: u64,
    cut: u64,
    removed_words: u64,
}

impl RefinedWebCounts {
    fn add(&mut self, line: &str, shape: LineShape) {
        let counter = match refinedweb::judge(line, shape) {
            RefinedWebLine::Kept => return,
            RefinedWebLine::Cut { before, after } => {
                let left = word_count(format!("{before}{after}").as_str());
                self.removed_words += shape.words.saturating_sub(left) as u64;
                self.cut += 1;
                return;
            }
            RefinedWebLine::Removed(LineFault::Uppercase) => &mut self.uppercase,
            RefinedWebLine::Removed(LineFault::Numeric) => &mut self.numeric,
            RefinedWebLine::Removed(LineFault::Counter) => &mut self.counters,
            RefinedWebLine::Removed(LineFault::OneWord) => &mut self.one_word,
        };
        *counter += 1;
        self.removed_words += shape.words as u64;
    }
}

/// Number of words of a line.
fn word_count(line: &str) -> usize {
    let mut count = 0;
    words::scan(line, |_| count += 1);
    count
}

/// ln N − (Σ c ln c) / N, which is −Σ p ln p.
fn word_entropy(words: u64, count_logs: f64) -> f64 {
    if words == 0 { 0.0 } else { ((words as f64).ln() - count_logs / words as f64).max(0.0) }
}

/// A fraction of nothing is 0.
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests;
