//! A slow twin of [`super::compute`], written from the definitions with owned strings and ordinary
//! collections, and the property tests that hold both together.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::c4::POLICY_PHRASES;
use super::*;

fn fraction(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn chars<S: AsRef<str>>(strings: &[S]) -> usize {
    strings.iter().map(|s| s.as_ref().chars().count()).sum()
}

/// Number of elements seen before, and their characters.
fn seen_before(units: &[Vec<String>]) -> (usize, usize) {
    let mut seen = HashSet::new();
    let again: Vec<&Vec<String>> = units.iter().filter(|unit| !seen.insert(*unit)).collect();
    (again.len(), again.iter().map(|unit| chars(unit)).sum())
}

fn top(words: &[String], n: usize) -> f64 {
    let mut counts: HashMap<&[String], usize> = HashMap::new();
    for gram in words.windows(n) {
        *counts.entry(gram).or_default() += 1;
    }
    let Some(most) = counts.values().max() else { return 0.0 };
    let gram = words.windows(n).find(|gram| counts[gram] == *most).unwrap();
    fraction((chars(gram) * most).min(chars(words)), chars(words))
}

fn duplicate(words: &[String], n: usize) -> f64 {
    let mut seen = HashSet::new();
    let (mut at, mut found) = (0, 0);
    while at + n <= words.len() {
        if seen.insert(&words[at..at + n]) {
            at += 1;
        } else {
            found += chars(&words[at..at + n]);
            at += n;
        }
    }
    fraction(found, chars(words))
}

/// The words of a text: what white space parts, and in scripts without spaces the pieces of that, symbols with what
/// stands before them.
fn words_of(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    for run in text.split_whitespace() {
        if !run.chars().any(crate::language::is_unspaced) {
            words.push(run.to_owned());
            continue;
        }
        for (number, piece) in unicode_segmentation::UnicodeSegmentation::split_word_bounds(run).enumerate() {
            match words.last_mut() {
                Some(word) if number > 0 && !piece.chars().any(char::is_alphanumeric) => word.push_str(piece),
                _ => words.push(piece.to_owned()),
            }
        }
    }
    words
}

/// Words in any n-gram that occurs more than once.
fn covered(words: &[String], n: usize) -> f64 {
    let mut counts: HashMap<&[String], usize> = HashMap::new();
    for gram in words.windows(n) {
        *counts.entry(gram).or_default() += 1;
    }
    let mut marked = vec![false; words.len()];
    for (at, gram) in words.windows(n).enumerate() {
        if counts[gram] > 1 {
            marked[at..at + n].fill(true);
        }
    }
    let found: usize = words.iter().zip(&marked).filter(|(_, m)| **m).map(|(w, _)| w.chars().count()).sum();
    fraction(found, chars(words))
}

/// The entropy of the words, summed in the order of their first occurrence.
fn word_entropy(words: &[String]) -> f64 {
    let mut counts: Vec<(&String, usize)> = Vec::new();
    for word in words {
        match counts.iter_mut().find(|(w, _)| *w == word) {
            Some((_, count)) => *count += 1,
            None => counts.push((word, 1)),
        }
    }
    -counts.iter().map(|(_, c)| *c as f64 / words.len() as f64).map(|p| p * p.ln()).sum::<f64>()
}

fn byte_entropy(text: &str) -> f64 {
    let bytes = text.trim().as_bytes();
    let of = |value: u8| bytes.iter().filter(|b| **b == value).count() as f64 / bytes.len() as f64;
    -(0..=255).map(of).filter(|p| *p > 0.0).map(|p| p * p.log2()).sum::<f64>()
}

/// A word without ASCII punctuation at its ends.
fn core(word: &str) -> &str {
    word.trim_matches(|c: char| c.is_ascii() && !c.is_ascii_alphanumeric())
}

fn sentences(line: &str) -> usize {
    let mut count = 0;
    let mut open = false;
    for word in &words_of(line) {
        open = !words::ends_sentence(word);
        count += usize::from(!open);
    }
    count + usize::from(open)
}

fn is_citation(mark: &str) -> bool {
    let digits = mark.trim_start_matches('[').trim_end_matches(']').bytes().all(|b| b.is_ascii_digit());
    mark == "[edit]" || mark == "[citation needed]" || (mark.matches(']').count() == 1 && mark.ends_with(']') && digits)
}

fn twin(text: &str) -> Signals {
    let words: Vec<String> = words_of(text);
    let raw_lines: Vec<&str> = text.split('\n').map(str::trim).collect();
    let lines: Vec<String> = raw_lines.iter().filter(|l| !l.is_empty()).map(|l| (*l).to_owned()).collect();
    let paragraphs: Vec<Vec<String>> = raw_lines
        .split(|line| line.is_empty())
        .filter(|run| !run.is_empty())
        .map(|run| run.iter().map(|l| (*l).to_owned()).collect())
        .collect();
    let count_words = |f: &dyn Fn(&str) -> bool| words.iter().filter(|w| f(w)).count();
    let count_lines = |f: &dyn Fn(&str) -> bool| lines.iter().filter(|l| f(l)).count();
    let real: Vec<String> = words.iter().filter(|w| w.chars().any(char::is_alphanumeric)).cloned().collect();
    let hashes = text.matches('#').count();
    let ellipses = text.matches("...").count() + text.matches('…').count();
    let stop_words: HashSet<&str> = ["the", "be", "to", "of", "and", "that", "have", "with"].into();
    let found: HashSet<&str> = words.iter().map(String::as_str).filter(|w| stop_words.contains(w)).collect();
    let singles: Vec<Vec<String>> = lines.iter().map(|l| vec![l.clone()]).collect();
    let (dup_lines, dup_line_chars) = seen_before(&singles);
    let (dup_paragraphs, dup_paragraph_chars) = seen_before(&paragraphs);

    let mut c4 = C4Lines::default();
    let mut c4_sentences = 0;
    let mut c4_text = Vec::new();
    for line in &lines {
        let lower = line.to_ascii_lowercase();
        let mut end = line.as_str();
        while let Some(at) = end.rfind('[').filter(|at| is_citation(&end[*at..])) {
            end = &end[..at];
        }
        if !end.ends_with(['.', '?', '!', '"']) || end.ends_with("...") {
            c4.no_terminal_mark += 1;
        } else if words_of(line).len() < 3 {
            c4.too_few_words += 1;
        } else if lower.contains("javascript") {
            c4.javascript += 1;
        } else if POLICY_PHRASES.iter().any(|p| lower.contains(p)) {
            c4.policy += 1;
        } else {
            c4.kept += 1;
            c4_sentences += sentences(line);
            c4_text.push(line.as_str());
        }
    }
    let mut cleaned = String::new();
    assert_eq!(c4_clean(text, &mut cleaned), c4);
    assert_eq!(cleaned, c4_text.join("\n"));

    let mut refined = [0usize; 5];
    let mut refined_words = 0;
    for line in &lines {
        let before = words_of(line).len();
        let (which, after) = match refinedweb_line(line) {
            RefinedWebLine::Kept => continue,
            RefinedWebLine::Removed(LineFault::Uppercase) => (0, 0),
            RefinedWebLine::Removed(LineFault::Numeric) => (1, 0),
            RefinedWebLine::Removed(LineFault::Counter) => (2, 0),
            RefinedWebLine::Removed(LineFault::OneWord) => (3, 0),
            RefinedWebLine::Cut { before, after } => (4, words_of(&format!("{before}{after}")).len()),
        };
        refined[which] += 1;
        refined_words += before - after.min(before);
    }
    let all = chars(&words);
    let count_chars = |f: &dyn Fn(char) -> bool| words.iter().flat_map(|w| w.chars()).filter(|c| f(*c)).count();
    let upper_only = |w: &str| w.chars().any(char::is_uppercase) && !w.chars().any(char::is_lowercase);
    let listed = |w: &str| [w, core(w)].iter().any(|w| StopWords::of(None).look_up(words::hash(w.as_bytes())).1);

    let inner = text.trim().matches('\n').count();
    Signals {
        byte_count: text.len() as i64,
        char_count: text.chars().count() as i64,
        word_count: words.len() as i64,
        non_symbol_word_count: real.len() as i64,
        line_count: lines.len() as i64,
        paragraph_count: paragraphs.len() as i64,
        mean_word_length: fraction(chars(&real), real.len()),
        max_word_length: words.iter().map(|w| w.chars().count()).max().unwrap_or(0) as i64,
        hash_ratio: fraction(hashes, words.len()),
        ellipsis_ratio: fraction(ellipses, words.len()),
        symbol_ratio: fraction(hashes + ellipses, words.len()),
        alpha_word_fraction: fraction(count_words(&|w| w.chars().any(char::is_alphabetic)), words.len()),
        stop_word_count: found.len() as i64,
        bullet_line_fraction: fraction(count_lines(&|l| l.starts_with(['•', '-', '*'])), lines.len()),
        ellipsis_line_fraction: fraction(count_lines(&|l| l.ends_with("...") || l.ends_with('…')), lines.len()),
        duplicate_line_fraction: fraction(dup_lines, lines.len()),
        duplicate_line_char_fraction: fraction(dup_line_chars, chars(&lines)),
        duplicate_paragraph_fraction: fraction(dup_paragraphs, paragraphs.len()),
        duplicate_paragraph_char_fraction: fraction(dup_paragraph_chars, chars(&lines)),
        top_2gram_char_fraction: top(&words, 2),
        top_3gram_char_fraction: top(&words, 3),
        top_4gram_char_fraction: top(&words, 4),
        duplicate_5gram_char_fraction: duplicate(&words, 5),
        duplicate_6gram_char_fraction: duplicate(&words, 6),
        duplicate_7gram_char_fraction: duplicate(&words, 7),
        duplicate_8gram_char_fraction: duplicate(&words, 8),
        duplicate_9gram_char_fraction: duplicate(&words, 9),
        duplicate_10gram_char_fraction: duplicate(&words, 10),
        c4_kept_line_count: c4.kept as i64,
        c4_no_terminal_mark_line_count: c4.no_terminal_mark as i64,
        c4_too_few_words_line_count: c4.too_few_words as i64,
        c4_javascript_line_count: c4.javascript as i64,
        c4_policy_line_count: c4.policy as i64,
        c4_sentence_count: c4_sentences as i64,
        c4_has_lorem_ipsum: text.to_ascii_lowercase().contains("lorem ipsum"),
        c4_has_curly_bracket: text.contains('{'),
        terminal_line_fraction: fraction(count_lines(&lines::ends_with_terminal_mark), lines.len()),
        short_line_fraction: fraction(count_lines(&|l| l.chars().count() <= 30), lines.len()),
        newline_ratio: fraction(inner, words.len()),
        sentence_count: lines.iter().map(|l| sentences(l)).sum::<usize>() as i64,
        stop_word_fraction: fraction(count_words(&listed), words.len()),
        unique_word_fraction: fraction(words.iter().collect::<HashSet<_>>().len(), words.len()),
        word_entropy: word_entropy(&words),
        all_caps_word_fraction: fraction(count_words(&upper_only), words.len()),
        curly_bracket_fraction: fraction(count_chars(&|c| c == '{' || c == '}'), all),
        uppercase_char_fraction: fraction(count_chars(&char::is_uppercase), all),
        digit_char_fraction: fraction(count_chars(&char::is_numeric), all),
        symbol_char_fraction: fraction(count_chars(&|c| !c.is_alphanumeric()), all),
        javascript_line_count: count_lines(&|l| l.to_ascii_lowercase().contains("javascript")) as i64,
        mean_any_word_length: fraction(all, words.len()),
        covered_5gram_char_fraction: covered(&words, 5),
        covered_6gram_char_fraction: covered(&words, 6),
        covered_7gram_char_fraction: covered(&words, 7),
        covered_8gram_char_fraction: covered(&words, 8),
        covered_9gram_char_fraction: covered(&words, 9),
        covered_10gram_char_fraction: covered(&words, 10),
        refinedweb_uppercase_line_count: refined[0] as i64,
        refinedweb_numeric_line_count: refined[1] as i64,
        refinedweb_counter_line_count: refined[2] as i64,
        refinedweb_one_word_line_count: refined[3] as i64,
        refinedweb_cut_line_count: refined[4] as i64,
        refinedweb_removed_word_fraction: fraction(refined_words, words.len()),
        byte_entropy: byte_entropy(text),
        compression_ratio: Compression::default().ratio(text.trim().as_bytes()),
    }
}

fn check(text: &str, scratch: &mut Scratch) {
    let signals = compute(text, scratch);
    let mut expected = twin(text);
    // The two sum in another order.
    for (found, expected) in
        [(signals.word_entropy, &mut expected.word_entropy), (signals.byte_entropy, &mut expected.byte_entropy)]
    {
        assert!((found - *expected).abs() < 1e-9, "{found} and {expected} for {text:?}");
        *expected = found;
    }
    assert_eq!(signals, expected, "{text:?}");
    for (signal, value) in SIGNALS.iter().zip(signals.values()) {
        match value {
            Value::Float64(x) if signal.name.ends_with("_fraction") => {
                assert!((0.0..=1.0).contains(&x), "{} = {x} for {text:?}", signal.name);
            }
            Value::Float64(x) => assert!(x.is_finite() && x >= 0.0, "{} = {x}", signal.name),
            Value::Int64(n) => assert!(n >= 0, "{} = {n}", signal.name),
            Value::Boolean(_) => {}
        }
    }
    // White space behind a text changes only its length.
    for tail in ["\n", "  \t", "\r\n\r\n", "\u{a0}\u{2028}\n"] {
        let longer = compute(&format!("{text}{tail}"), scratch);
        let expected = Signals { byte_count: longer.byte_count, char_count: longer.char_count, ..signals };
        assert_eq!(longer, expected, "{text:?} + {tail:?}");
    }
}

/// Texts of few different words, so that words, n-grams, lines and paragraphs repeat.
fn repetitive() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "a",
        "a",
        "a",
        "bb",
        "bb",
        "the",
        "of",
        "and",
        "The",
        "é",
        "日本",
        "42",
        "#",
        "##x",
        "...",
        "wait…",
        "end.",
        "end?\"",
        "Dr.",
        "U.S.",
        "-",
        "•",
        "*",
        "{",
        "javascript",
        "JavaScript:",
        "use",
        "uses",
        "cookies",
        "cookie",
        "privacy",
        "policy.",
        "terms",
        "of",
        "Lorem",
        "ipsum",
        "—",
        "ABC",
        "5",
        "likes",
        "我们。",
        "テスト",
        "ที่",
        "🙂",
        "।",
    ]);
    let gap = prop::sample::select(vec![
        " ", " ", " ", " ", " ", " ", "\n", "\n", "\n\n", "\r\n", " \n \n", "\t", "\u{a0}", "\u{3000}", "\u{2028}",
        "\u{b}", "\u{85}",
    ]);
    prop::collection::vec((word, gap), 0..200)
        .prop_map(|pairs| pairs.into_iter().flat_map(|(word, gap)| [word, gap]).collect())
}

/// Few words in long runs: long n-grams repeat and overlap themselves.
fn very_repetitive() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a ", "b ", "cc ", "\n"]), 0..400).prop_map(|words| words.concat())
}

/// A passage copied several times with other words between, so that n-grams of every length repeat.
fn copied() -> impl Strategy<Value = String> {
    let passage = prop::collection::vec("[a-z]{1,4}", 1..20);
    (passage, prop::collection::vec(prop::collection::vec("[a-z]{1,3}", 0..12), 1..6)).prop_map(|(passage, others)| {
        others.iter().map(|other| format!("{} {}\n", passage.join(" "), other.join(" "))).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn equals_the_twin_on_repetitive_text(text in repetitive()) {
        check(&text, &mut Scratch::default());
    }

    #[test]
    fn equals_the_twin_on_very_repetitive_text(text in very_repetitive()) {
        check(&text, &mut Scratch::default());
    }

    #[test]
    fn equals_the_twin_on_copied_passages(text in copied()) {
        check(&text, &mut Scratch::default());
    }

    #[test]
    fn equals_the_twin_on_any_unicode(text in any::<String>()) {
        check(&text, &mut Scratch::default());
    }

    #[test]
    fn equals_the_twin_on_unicode_with_white_space(text in "(\\PC|[ \n\r\t\u{a0}\u{3000}.…#\"{]){0,120}") {
        check(&text, &mut Scratch::default());
    }

    #[test]
    fn scratch_carries_nothing_over(texts in prop::collection::vec(repetitive(), 1..6)) {
        let mut scratch = Scratch::default();
        for text in &texts {
            prop_assert_eq!(compute(text, &mut scratch), compute(text, &mut Scratch::default()));
        }
    }
}

#[test]
fn equals_the_twin_on_edges() {
    let mut scratch = Scratch::default();
    for text in [
        "",
        " ",
        "\n",
        "\n\n\n\n",
        "\r\n\r\n",
        " \t\u{a0}\u{2003}\u{3000}",
        "word",
        "# # ... …",
        "a\r\nb\r\n\r\na\r\nb",
        "no final newline.\nno final newline.",
        "\u{feff}bom first",
        "مرحبا بالعالم. هذا نص عربي؟\nمرحبا بالعالم. هذا نص عربي؟",
        "👩‍👩‍👧‍👦 👩‍👩‍👧‍👦 👩‍👩‍👧‍👦",
        "e\u{301}\u{301}\u{301} combining",
        "\u{0}\u{1}\u{7f} controls\u{0}",
        "ab c a bc ab c a bc ab c a bc",
    ] {
        check(text, &mut scratch);
    }
    for language in [Some("de"), Some("xx")] {
        let stop_words = StopWords::of(language);
        let found = compute_in("Die Katze und the dog", stop_words, &mut scratch);
        assert_eq!(found.stop_word_fraction, if language == Some("de") { 0.4 } else { 0.0 });
        assert_eq!(found.stop_word_count, i64::from(language == Some("de")));
    }
    for long in
        ["x".repeat(1 << 20), "é".repeat(1 << 19), "\n".repeat(1 << 20), " ".repeat(1 << 20), ".".repeat(1 << 20)]
    {
        check(&long, &mut scratch);
    }
    check(&"one line ".repeat(20_000), &mut scratch);
    check(&"a\n".repeat(50_000), &mut scratch);
}
