//! Every published rule on both sides of its threshold: texts with the value of its signal and its verdict by hand.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, RecordBatch, StringViewArray};
use arrow::datatypes::Float64Type;
use datafusion::prelude::SessionContext;
use pipeline::signals::{profiles, udf};

/// Name of a rule, a text, the value of the rule's signal, and whether the rule drops the text.
type Row = (&'static str, String, f64, bool);

/// `n` words of one letter, a word of `filler` letters, the `n` words again.
fn twice(n: u8, filler: usize) -> String {
    let words: String = (0..n).map(|word| format!("{} ", char::from(b'a' + word))).collect();
    format!("{words}{} {words}", "z".repeat(filler))
}

fn rows() -> Vec<Row> {
    let lines = |line: &str, times: usize| format!("{line}\n").repeat(times);
    let mut rows: Vec<Row> = Vec::new();
    let mut row = |rule: &'static str, text: &str, value: f64, drops: bool| {
        rows.push((rule, text.to_owned(), value, drops));
    };

    row("gopher_too_few_words", &("word ".repeat(49) + "# … --"), 49.0, true);
    row("gopher_too_few_words", &"word ".repeat(50), 50.0, false);
    row("gopher_too_few_words", "", 0.0, true);
    row("gopher_too_few_words", "one", 1.0, true);
    row("gopher_too_few_words", "# … — 🙂", 0.0, true);
    row("gopher_too_many_words", &"a ".repeat(100_000), 100_000.0, false);
    row("gopher_too_many_words", &"a ".repeat(100_001), 100_001.0, true);
    row("gopher_short_words", "ab abcd #", 3.0, false);
    row("gopher_short_words", "ab\r\nabc", 2.5, true);
    row("gopher_short_words", "", 0.0, true);
    row("gopher_long_words", "abcdefghij", 10.0, false);
    row("gopher_long_words", "ábcdéfghíjk", 11.0, true);
    row("gopher_hashes", "#a b c d e f g h i j", 0.1, false);
    row("gopher_hashes", "#a b c d e f g h i", 1.0 / 9.0, true);
    row("gopher_hashes", "# # #", 1.0, true);
    row("gopher_ellipses", "a... b c d e f g h i j", 0.1, false);
    row("gopher_ellipses", "a… b c d e f g h i", 1.0 / 9.0, true);
    row("gopher_bullet_lines", &(lines("- a", 9) + "b"), 0.9, false);
    row("gopher_bullet_lines", "• a\r\n* b\r\n\r\n  - c", 1.0, true);
    row("gopher_ellipsis_lines", &(lines("a...", 3) + &lines("b", 7)), 0.3, false);
    row("gopher_ellipsis_lines", "a…\nb\nc", 1.0 / 3.0, true);
    row("gopher_alphabetic_words", "a b c d 5", 0.8, false);
    row("gopher_alphabetic_words", "a b c 4 5", 0.6, true);
    row("gopher_alphabetic_words", "مرحبا بالعالم", 1.0, false);
    row("gopher_alphabetic_words", "🙂 🙂", 0.0, true);
    row("gopher_stop_words", "the cat", 1.0, true);
    row("gopher_stop_words", "the cat and", 2.0, false);
    row("gopher_stop_words", "the The the, the", 1.0, true);

    row("gopher_duplicate_lines", "a\nb\nc\nd\ne\nf\ng\na\nb\nc", 0.3, false);
    row("gopher_duplicate_lines", "a\nb\na", 1.0 / 3.0, true);
    row("gopher_duplicate_lines", "a\r\n b\r\n\r\na\r\n", 1.0 / 3.0, true);
    row("gopher_duplicate_paragraphs", "a\n\nb\n\nc\n\na", 0.25, false);
    row("gopher_duplicate_paragraphs", "a\nb\n\nc\n\na\nb\n", 1.0 / 3.0, true);
    row("gopher_duplicate_line_chars", "aaaa\nbb\nbb\ncc", 0.2, false);
    row("gopher_duplicate_line_chars", "ééé\nbb\nbb", 2.0 / 7.0, true);
    row("gopher_duplicate_paragraph_chars", "aaaa\n\nbb\n\nbb\n\ncc", 0.2, false);
    row("gopher_duplicate_paragraph_chars", "aaa\n\nbb\n \nbb", 2.0 / 7.0, true);
    // "a b" twice is four characters; where nothing repeats, the first 2-gram counts once.
    row("gopher_top_2gram", "a b cccc dddd eeee ffff a b", 4.0 / 20.0, false);
    row("gopher_top_2gram", "a b cc dd ee a b", 4.0 / 10.0, true);
    row("gopher_top_2gram", "ab cd ef gh ij kl mn op qr st", 4.0 / 20.0, false);
    row("gopher_top_2gram", "two words", 1.0, true);
    row("gopher_top_2gram", "word", 0.0, false);
    row("gopher_top_3gram", &twice(3, 34), 6.0 / 40.0, false);
    row("gopher_top_3gram", &twice(3, 27), 6.0 / 33.0, true);
    row("gopher_top_4gram", &twice(4, 42), 8.0 / 50.0, false);
    row("gopher_top_4gram", &twice(4, 41), 8.0 / 49.0, true);
    // The walk finds the second n words again: n of 2 n + filler characters.
    row("gopher_duplicate_5grams", &twice(5, 24), 5.0 / 34.0, false);
    row("gopher_duplicate_5grams", &twice(5, 23), 5.0 / 33.0, true);
    row("gopher_duplicate_6grams", &twice(6, 31), 6.0 / 43.0, false);
    row("gopher_duplicate_6grams", &twice(6, 30), 6.0 / 42.0, true);
    row("gopher_duplicate_7grams", &twice(7, 40), 7.0 / 54.0, false);
    row("gopher_duplicate_7grams", &twice(7, 39), 7.0 / 53.0, true);
    row("gopher_duplicate_8grams", &twice(8, 51), 8.0 / 67.0, false);
    row("gopher_duplicate_8grams", &twice(8, 50), 8.0 / 66.0, true);
    row("gopher_duplicate_9grams", &twice(9, 64), 9.0 / 82.0, false);
    row("gopher_duplicate_9grams", &twice(9, 63), 9.0 / 81.0, true);
    row("gopher_duplicate_10grams", &twice(10, 80), 10.0 / 100.0, false);
    row("gopher_duplicate_10grams", &twice(10, 79), 10.0 / 99.0, true);

    row("c4_lorem_ipsum", "lorem  ipsum", 0.0, false);
    row("c4_lorem_ipsum", "and\nxLOREM Ipsum", 1.0, true);
    row("c4_curly_bracket", "}", 0.0, false);
    row("c4_curly_bracket", "{", 1.0, true);
    row("c4_too_few_sentences", &"It rains today. ".repeat(5), 5.0, false);
    row("c4_too_few_sentences", &"It rains today. ".repeat(4), 4.0, true);
    // C4 removes the line, and its sentences with it: it has no mark at its end.
    row("c4_too_few_sentences", &("It rains today. ".repeat(5) + "and"), 0.0, true);
    row(
        "c4_too_few_sentences",
        "Dr. J. Who e.g. sleeps.\r\nHe does! Does he?\r\nYes, he does.\r\nOf course he does.",
        5.0,
        false,
    );

    row("fineweb_terminal_lines", &(lines("a.", 3) + &lines("b", 22)), 0.12, false);
    row("fineweb_terminal_lines", &(lines("你好。", 2) + &lines("b", 23)), 0.08, true);
    row("fineweb_terminal_lines", "", 0.0, true);
    row("fineweb_short_lines", &(lines("a", 2) + &"x".repeat(31)), 2.0 / 3.0, false);
    row("fineweb_short_lines", &(lines("a", 2) + &"é".repeat(30)), 1.0, true);
    row("fineweb_duplicate_line_chars", &("b\nb\n".to_owned() + &"c".repeat(98)), 0.01, false);
    row("fineweb_duplicate_line_chars", &("b\nb\n".to_owned() + &"c".repeat(97)), 1.0 / 99.0, true);
    row("fineweb_newlines", "a b c\nd e f\ng h i\nj", 0.3, false);
    row("fineweb_newlines", "\n\na b\nc\n\n\n", 1.0 / 3.0, true);

    row("massiveweb_too_few_words", &"# ".repeat(50), 50.0, false);
    row("massiveweb_too_few_words", &"# ".repeat(49), 49.0, true);
    row("massiveweb_too_many_words", &"# ".repeat(100_000), 100_000.0, false);
    row("massiveweb_too_many_words", &"# ".repeat(100_001), 100_001.0, true);
    row("massiveweb_short_words", "ab ----", 3.0, false);
    row("massiveweb_short_words", "--- ab", 2.5, true);
    row("massiveweb_long_words", "abcdefghijkl --------", 10.0, false);
    row("massiveweb_long_words", "abcdefghijkl ----------", 11.0, true);
    // Both occurrences count: 2 n of 2 n + filler characters.
    row("massiveweb_repeated_5grams", &twice(5, 57), 10.0 / 67.0, false);
    row("massiveweb_repeated_5grams", &twice(5, 56), 10.0 / 66.0, true);
    row("massiveweb_repeated_6grams", &twice(6, 74), 12.0 / 86.0, false);
    row("massiveweb_repeated_6grams", &twice(6, 73), 12.0 / 85.0, true);
    row("massiveweb_repeated_7grams", &twice(7, 94), 14.0 / 108.0, false);
    row("massiveweb_repeated_7grams", &twice(7, 93), 14.0 / 107.0, true);
    row("massiveweb_repeated_8grams", &twice(8, 118), 16.0 / 134.0, false);
    row("massiveweb_repeated_8grams", &twice(8, 117), 16.0 / 133.0, true);
    row("massiveweb_repeated_9grams", &twice(9, 146), 18.0 / 164.0, false);
    row("massiveweb_repeated_9grams", &twice(9, 145), 18.0 / 163.0, true);
    row("massiveweb_repeated_10grams", &twice(10, 180), 20.0 / 200.0, false);
    row("massiveweb_repeated_10grams", &twice(10, 179), 20.0 / 199.0, true);

    row("refinedweb_removed_words", &("word\r\n".to_owned() + &"more ".repeat(19)), 0.05, false);
    row("refinedweb_removed_words", &("word\n".to_owned() + &"more ".repeat(18)), 1.0 / 19.0, true);
    row("refinedweb_removed_words", "3 likes\nSHOUTING LINE", 1.0, true);
    rows
}

#[tokio::test]
async fn every_rule_drops_on_one_side_of_its_threshold_alone() {
    let mut rules = BTreeMap::new();
    for profile in profiles::PROFILES {
        rules.extend(profiles::profile(profile).unwrap().into_iter().map(|rule| (rule.name.clone(), rule)));
    }
    let mut rows: Vec<(String, String, f64, bool)> =
        rows().into_iter().map(|(rule, text, value, drops)| (rule.to_owned(), text, value, drops)).collect();
    // MassiveWeb has many of Gopher's rules under names of its own.
    for (rule, text, value, drops) in rows.clone() {
        let own = rule.replace("gopher_", "massiveweb_");
        if rule.starts_with("gopher_") && rules.get(&own).is_some_and(|r| r.drop_when == rules[&rule].drop_when) {
            rows.push((own, text, value, drops));
        }
    }
    let texts: ArrayRef = Arc::new(StringViewArray::from_iter_values(rows.iter().map(|(_, text, ..)| text)));
    let session = SessionContext::new();
    session.register_udf(udf::signals());
    session.register_batch("texts", RecordBatch::try_from_iter([("text", texts)]).unwrap()).unwrap();
    let batches = session.sql("SELECT signals(text) AS s FROM texts").await.unwrap().collect().await.unwrap();
    let signals = arrow::compute::concat_batches(&batches[0].schema(), &batches).unwrap();
    session.register_batch("signals", RecordBatch::from(signals["s"].as_struct())).unwrap();

    let mut told = BTreeSet::new();
    for (name, rule) in &rules {
        let signal = rule.signal.as_ref().unwrap();
        let sql =
            format!("SELECT CAST(({}) AS BOOLEAN) AS d, CAST({signal} AS DOUBLE) AS v FROM signals", rule.drop_when);
        let batches = session.sql(&sql).await.unwrap().collect().await.unwrap();
        let found = arrow::compute::concat_batches(&batches[0].schema(), &batches).unwrap();
        assert_eq!(found.num_rows(), rows.len());
        for (row, (_, text, value, drops)) in rows.iter().enumerate().filter(|(_, (rule, ..))| rule == name) {
            let shown: String = text.chars().take(60).collect();
            assert_eq!(found["v"].as_primitive::<Float64Type>().value(row), *value, "{name} of {shown:?}");
            assert_eq!(found["d"].as_boolean().value(row), *drops, "{name} of {shown:?}");
            told.insert((name.clone(), *drops));
        }
    }
    for name in rules.keys() {
        for drops in [false, true] {
            assert!(
                told.contains(&(name.clone(), drops)),
                "no text that {name} {}",
                if drops { "drops" } else { "keeps" }
            );
        }
    }
}
