//! Signals with values computed by hand.
#![allow(clippy::unwrap_used)]

use super::*;

fn of(text: &str) -> Signals {
    compute(text, &mut Scratch::default())
}

/// The struct with every field that is not named at zero.
macro_rules! expect {
    ($text:expr, $($field:ident: $value:expr),* $(,)?) => {
        let text: &str = $text;
        let signals = of(text);
        $(assert_eq!(signals.$field, $value, "{} of {text:?}", stringify!($field));)*
    };
}

#[test]
fn names_are_unique_columns() {
    let mut names: Vec<&str> = SIGNALS.iter().map(|s| s.name).collect();
    assert!(names.iter().all(|n| n.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')));
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), SIGNALS.len());
    assert!(SIGNALS.iter().all(|s| !s.meaning.is_empty() && !s.formula.is_empty()));
    let values = Signals::default().values();
    for (signal, value) in SIGNALS.iter().zip(values) {
        let kind = match value {
            Value::Int64(_) => Kind::Int64,
            Value::Float64(_) => Kind::Float64,
            Value::Boolean(_) => Kind::Boolean,
        };
        assert_eq!(kind, signal.kind);
    }
}

#[test]
fn nothing_gives_zeros() {
    assert_eq!(of(""), Signals::default());
    assert_eq!(of(" \r\n\u{a0} "), Signals { byte_count: 6, char_count: 5, ..Signals::default() });
}

#[test]
fn counts() {
    // Lines: "Héllo  world" (12 characters), "# 42 …" (6), "end." (4).
    expect!("Héllo  world\r\n# 42 …\n\n\nend.",
        byte_count: 30, char_count: 27, word_count: 6, non_symbol_word_count: 4,
        line_count: 3, paragraph_count: 2, max_word_length: 5,
        mean_word_length: 16.0 / 4.0, // Héllo 5, world 5, 42 2, end. 4
        newline_ratio: 4.0 / 6.0);
    expect!("a\n\nb\n \nc", paragraph_count: 3, line_count: 3, newline_ratio: 4.0 / 3.0);
    expect!("\n\n a b \n\n", newline_ratio: 0.0, line_count: 1);
}

#[test]
fn symbols() {
    expect!("#tag # a...b …… ....", hash_ratio: 2.0 / 5.0, ellipsis_ratio: 4.0 / 5.0, symbol_ratio: 6.0 / 5.0,
        word_count: 5, non_symbol_word_count: 2, alpha_word_fraction: 2.0 / 5.0);
    expect!("1 a 2b --- é", alpha_word_fraction: 3.0 / 5.0, non_symbol_word_count: 4);
}

#[test]
fn stop_words() {
    expect!("the cat and the dog", stop_word_count: 2);
    expect!("the be to of and that have with", stop_word_count: 8);
    expect!("The, the. AND theirs", stop_word_count: 0);
}

#[test]
fn line_shapes() {
    expect!("- one\n  • two\n* three\n– four\n-", bullet_line_fraction: 4.0 / 5.0);
    expect!("one...\ntwo…\n\nthree.\nfour ... \nfive. ..", ellipsis_line_fraction: 3.0 / 5.0);
    expect!("one.\ntwo?\nthree!\nfour\"\nfive:\n六。\nseven.)", terminal_line_fraction: 4.0 / 7.0);
    let thirty = "x".repeat(30);
    let umlauts = "ü".repeat(30);
    expect!(&format!("{thirty}\n{thirty}y\n  {umlauts}  \n"), short_line_fraction: 2.0 / 3.0);
}

#[test]
fn repeated_lines_and_paragraphs() {
    // Lines: aa, bbb, aa (again), "aa" (again), c: 2 + 3 + 2 + 2 + 1 characters.
    expect!("aa\nbbb\n aa \n\n\naa\nc", duplicate_line_fraction: 2.0 / 5.0, duplicate_line_char_fraction: 4.0 / 10.0,
        duplicate_paragraph_fraction: 0.0, duplicate_paragraph_char_fraction: 0.0);
    // Paragraphs: (aa, bb), (aa), (aa, bb) again, (bb, aa).
    expect!("aa\nbb\n\naa\n\naa\r\nbb\r\n\r\nbb\naa", duplicate_paragraph_fraction: 1.0 / 4.0,
        duplicate_paragraph_char_fraction: 4.0 / 14.0, duplicate_line_fraction: 5.0 / 7.0);
}

#[test]
fn repeated_ngrams() {
    // Words: I am Frank, I am Frank, I am Frank → 1 2 6 1 2 6 1 2 5 = 26 characters.
    // 2-grams: "I am" ×3 = 9; 3-grams: "I am Frank," ×2 = 18, first of the two that occur twice;
    // 4-grams: "I am Frank, I" ×2 = 20.
    expect!("I am Frank, I am Frank, I am Frank", top_2gram_char_fraction: 9.0 / 26.0,
        top_3gram_char_fraction: 18.0 / 26.0, top_4gram_char_fraction: 20.0 / 26.0,
        duplicate_5gram_char_fraction: 12.0 / 26.0); // "I am Frank, I am" found again at 3
    // Overlapping occurrences: "a a" ×3 is 6 of 4 characters, so 1.
    expect!("a a a a", top_2gram_char_fraction: 1.0);
    // Without a repetition the first n-gram counts once.
    expect!("ab cd ef gh", top_2gram_char_fraction: 0.5, top_3gram_char_fraction: 0.75, top_4gram_char_fraction: 1.0,
        duplicate_5gram_char_fraction: 0.0);
    // n-grams run over line ends.
    expect!("a b c\nd e\n\na b\nc d e f", duplicate_5gram_char_fraction: 5.0 / 11.0, duplicate_6gram_char_fraction: 0.0);
    expect!("one", top_2gram_char_fraction: 0.0);
    // Ten words of 2 characters, twice, and one between.
    let ten = "k0 k1 k2 k3 k4 k5 k6 k7 k8 k9";
    let text = format!("{ten} xxxx {ten}");
    expect!(&text, duplicate_5gram_char_fraction: 20.0 / 44.0, duplicate_6gram_char_fraction: 12.0 / 44.0,
        duplicate_7gram_char_fraction: 14.0 / 44.0, duplicate_8gram_char_fraction: 16.0 / 44.0,
        duplicate_9gram_char_fraction: 18.0 / 44.0, duplicate_10gram_char_fraction: 20.0 / 44.0);
}

#[test]
fn c4() {
    let text = "Mr. Smith went home. He slept! Did he?\n\
                Nothing at the end\n\
                Too short.\n\
                We use cookies on this page.\n\
                Turn on JavaScript to read.\n\
                It rained. And then \"it\n\
                stopped.\" The rest of it: e.g. this\"";
    expect!(text, c4_kept_line_count: 2, c4_no_terminal_mark_line_count: 2, c4_too_few_words_line_count: 1,
        c4_javascript_line_count: 1, c4_policy_line_count: 1,
        c4_sentence_count: 3 + 2, // home. slept! he? | stopped." and the rest of the line
        c4_has_lorem_ipsum: false, c4_has_curly_bracket: false);
    expect!("xLOREM Ipsum.", c4_has_lorem_ipsum: true);
    expect!("lorem  ipsum lorem\nipsum", c4_has_lorem_ipsum: false);
    expect!("}\nfn main() {", c4_has_curly_bracket: true);
    expect!("} only", c4_has_curly_bracket: false);
}

#[test]
fn redpajama() {
    expect!("The cat. The CAT, AND {dogs} 42", sentence_count: 2, unique_word_fraction: 6.0 / 7.0,
        all_caps_word_fraction: 2.0 / 7.0, // CAT, AND
        stop_word_fraction: 2.0 / 7.0, // The, The
        curly_bracket_fraction: 2.0 / 25.0, uppercase_char_fraction: 8.0 / 25.0, digit_char_fraction: 2.0 / 25.0,
        symbol_char_fraction: 4.0 / 25.0, mean_any_word_length: 25.0 / 7.0);
    expect!("a b a b", word_entropy: 2f64.ln(), unique_word_fraction: 0.5, byte_entropy: 
        // a, b twice each, three spaces: of 7
        7f64.log2() - (2.0 * 2.0 + 3.0 * 3f64.log2()) / 7.0);
    expect!("word", word_entropy: 0.0, unique_word_fraction: 1.0, compression_ratio: 1.0);
    expect!("Use JavaScript!\njavascript\nno", javascript_line_count: 2);
    expect!("ÄÖ ü１", uppercase_char_fraction: 2.0 / 4.0, digit_char_fraction: 1.0 / 4.0, all_caps_word_fraction: 0.5);
    expect!("--- !!!", symbol_char_fraction: 1.0, sentence_count: 1);
}

#[test]
fn massiveweb() {
    // "a b c d e" stands twice: all ten of eleven one-letter words are covered, the walk finds five.
    expect!("a b c d e x a b c d e", covered_5gram_char_fraction: 10.0 / 11.0, duplicate_5gram_char_fraction: 5.0 / 11.0,
        covered_6gram_char_fraction: 0.0);
    expect!("-- ab -- cdef", mean_any_word_length: 10.0 / 4.0, mean_word_length: 3.0);
}

#[test]
fn refinedweb() {
    let text = "SHOUTING LINE HERE\n12345\n3 likes\nword\nSign-in to read on\nA line that stays as it is.";
    expect!(text, refinedweb_uppercase_line_count: 1, refinedweb_numeric_line_count: 1, refinedweb_counter_line_count: 1,
        refinedweb_one_word_line_count: 1, refinedweb_cut_line_count: 1,
        refinedweb_removed_word_fraction: (3.0 + 1.0 + 2.0 + 1.0 + 1.0) / 18.0);
    expect!("", refinedweb_removed_word_fraction: 0.0);
}

#[test]
fn a_signal_is_the_same_alone_and_among_all() {
    let texts = [
        "The cat. SHOUTING {dogs} # 42...\n3 likes\na b c d e f g h i j k\na b c d e f g h i j k\nSign-in, the “end”… J.",
        "ÄÖ ü１ 我爱你。 'the' and (with,\n\nWe use cookies. Java javascript: x\r\nword",
        "",
    ];
    for text in texts {
        let all = of(text).values();
        for (signal, value) in SIGNALS.iter().zip(all) {
            let alone = compute(text, &mut Scratch::only(|name| name == signal.name)).values();
            let alone = SIGNALS.iter().zip(alone).find(|(s, _)| s.name == signal.name).unwrap().1;
            assert_eq!(alone, value, "{} of {text:?}", signal.name);
        }
    }
    // Every part is left out where it can be, and only there.
    let of_default_rules = |name: &str| {
        let rules = ["gopher", "c4", "fineweb"].into_iter().flat_map(|p| profiles::profile(p).unwrap());
        rules.filter_map(|rule| rule.signal).any(|signal| signal == name)
    };
    let parts = Scratch::only(of_default_rules).parts;
    assert!(!(parts.compression || parts.characters || parts.covered || parts.line_rules || parts.stop_words));
    let parts = Scratch::only(|_| true).parts;
    assert!(parts.compression && parts.characters && parts.covered && parts.line_rules && parts.stop_words);
}

#[test]
fn a_line_of_ten_megabytes() {
    let text = "seven words stand here again and again ".repeat(260_000);
    expect!(&text, line_count: 1, word_count: 7 * 260_000, max_word_length: 5, terminal_line_fraction: 0.0,
        refinedweb_removed_word_fraction: 0.0, covered_10gram_char_fraction: 1.0);
    assert!(of(&text).compression_ratio < 0.01);
    let symbols = "#".repeat(10 << 20);
    expect!(&symbols, word_count: 1, non_symbol_word_count: 0, hash_ratio: (10 << 20) as f64, symbol_char_fraction: 1.0,
        refinedweb_one_word_line_count: 1, byte_entropy: 0.0);
}

#[test]
fn the_page_of_signals_has_every_column_and_rule() {
    let page = include_str!("../../../docs/SIGNALS.md");
    for signal in &SIGNALS {
        let source = if signal.source.is_empty() { "–" } else { signal.source };
        let Signal { name, kind, meaning, formula, .. } = signal;
        let row = format!("| `{name}` | {kind:?} | {meaning} | {formula} | {source} |");
        assert!(page.contains(&row), "docs/SIGNALS.md lacks {row}");
    }
    for profile in profiles::PROFILES {
        for rule in profiles::profile(profile).unwrap() {
            let row = format!("| `{}` | `{}` |", rule.name, rule.drop_when);
            assert!(page.contains(&row), "docs/SIGNALS.md lacks {row}");
        }
    }
}
