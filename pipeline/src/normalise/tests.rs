//! Tables of texts with what each part makes of them, worked out by hand, and what holds for any text.

use proptest::prelude::*;

use super::*;

fn by(part: Part, text: &str) -> (String, u64) {
    let mut changes = Changes::default();
    let out = Normaliser::new([part]).apply(text, &mut changes).into_owned();
    assert!(Part::ALL.into_iter().all(|p| p == part || changes.of(p) == 0));
    (out, changes.of(part))
}

fn table(part: Part, rows: &[(&str, &str, u64)]) {
    for (text, expected, count) in rows {
        assert_eq!(by(part, text), (expected.to_string(), *count), "{} of {text:?}", part.name());
        let (again, _) = by(part, expected);
        assert_eq!(again, *expected, "{} twice of {text:?}", part.name());
    }
}

#[test]
fn mojibake() {
    table(
        Part::Mojibake,
        &[
            ("", "", 0),
            ("plain", "plain", 0),
            ("itâ€™s", "it’s", 1),
            ("cafÃ© naÃ¯ve", "café naïve", 2),
            ("â€œquotedâ€\u{9d} â€“ Â£5", "“quoted” – £5", 4),
            // Twice through the mistake: three sequences in the first round, one in the second.
            ("itÃ¢â‚¬â„¢s", "it’s", 4),
            // Correct text with letters and marks that look like lead bytes.
            ("groß» und mehr", "groß» und mehr", 0),
            ("Ärger, Übermut, NÃO", "Ärger, Übermut, NÃO", 0),
            // Cyrillic: believed because there are many.
            ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "привет", 6),
            ("ß»", "ß»", 0),
            ("ðŸ˜€ and â€™", "😀 and ’", 2),
        ],
    );
}

#[test]
fn controls() {
    table(
        Part::Controls,
        &[
            ("a\r\nb\rc\n", "a\nb\nc\n", 2),
            ("a\u{0}b\u{1b}[0m\u{7f}", "ab[0m", 3),
            ("a\u{b}b\u{c}c", "a\nb\nc", 2),
            ("a\u{85}b\u{9f}", "a\nb", 2),
            ("\u{fffe}x\u{fdd0}\u{1ffff}", "x", 3),
            ("tab\tstays é \u{fe0f}", "tab\tstays é \u{fe0f}", 0),
        ],
    );
}

#[test]
fn zero_width() {
    table(
        Part::ZeroWidth,
        &[
            ("\u{feff}a\u{200b}b\u{ad}c\u{2060}", "abc", 4),
            ("\u{202e}evil\u{202c}", "evil", 2),
            ("a\u{200d}b", "ab", 1),
            ("👩\u{200d}👧 می\u{200c}خواهم", "👩\u{200d}👧 می\u{200c}خواهم", 0),
            ("x \u{200e}(y)", "x (y)", 1),
        ],
    );
}

#[test]
fn nfc() {
    table(
        Part::Nfc,
        &[
            ("e\u{301} a\u{308}b", "é äb", 2),
            ("é\u{323}", "ẹ\u{301}", 1),
            ("\u{1112}\u{1161}\u{11ab}", "한", 1),
            ("\u{212b}", "\u{c5}", 1),
            ("é日本ü", "é日本ü", 0),
            ("\u{301}", "\u{301}", 0),
        ],
    );
}

#[test]
fn html() {
    table(
        Part::Html,
        &[
            ("a <b>bold</b> move", "a bold move", 2),
            ("<p>one</p><p class=\"x\">two<br/>three", "one\ntwo\nthree", 4),
            ("a &amp; b&nbsp;c &#39;d&#x27; &unknown; &", "a & b c 'd' &unknown; &", 4),
            ("x<!-- gone -->y<script>var a = '<b>';</script>z", "x\ny\nz", 2),
            ("Vec<T> and <stdio.h> and a < b > c", "Vec<T> and <stdio.h> and a < b > c", 0),
            ("`<b>` and\n```\n<p>", "`<b>` and\n```\n<p>", 0),
            ("$a<b>c$", "$a<b>c$", 0),
            ("<!-- never closed", "<!-- never closed", 0),
        ],
    );
}

#[test]
fn urls() {
    table(
        Part::Urls,
        &[
            ("see https://example.org/a?b=c. Then", "see . Then", 1),
            ("at www.example.com/x, or HTTP://X.ORG now", "at , or now", 2),
            ("(https://en.wikipedia.org/wiki/A_(b)) c", "() c", 1),
            ("https://only.example", "", 1),
            (
                "[text](https://example.org) and [1]: https://example.org/x",
                "[text](https://example.org) and [1]: https://example.org/x",
                0,
            ),
            ("<https://example.org> x", "x", 1),
            ("e-mail a@b.org, std::vec, a://b", "e-mail a@b.org, std::vec, a://b", 0),
            ("wwwwww.x", "wwwwww.x", 0),
        ],
    );
}

#[test]
fn abnormal_strings() {
    let blob = "iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4//8/w38GIAXDIBKE0DHxgljNBAAO9TXL0Y4OHwAAAABJRU5ErkJggg==";
    let sha = "3f2a9c0b7d1e4f5a6b8c9d0e1f2a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c";
    let long = "x".repeat(201);
    table(
        Part::AbnormalStrings,
        &[
            (&format!("before {blob} after"), "before after", 1),
            (&format!("{sha}\nline"), "\nline", 1),
            (&format!("a {long} b"), "a b", 1),
            ("text\n@@##$$%%^^&&\nmore", "text\nmore", 1),
            (
                "Title\n========\n---------\n| a |\n|---|:--|\n~~~~~~~~",
                "Title\n========\n---------\n| a |\n|---|:--|\n~~~~~~~~",
                0,
            ),
            (
                "a_rather_long_identifier_that_somebody_wrote_in_their_program_for_a_reason",
                "a_rather_long_identifier_that_somebody_wrote_in_their_program_for_a_reason",
                0,
            ),
            ("。。。。。。。。。", "", 1),
        ],
    );
    let chinese = "中".repeat(500);
    assert_eq!(by(Part::AbnormalStrings, &chinese).1, 0);
}

#[test]
fn repeated_punctuation() {
    table(
        Part::RepeatedPunctuation,
        &[
            ("What?!?!?! No!!!! Well,, yes;;", "What?! No! Well, yes;", 4),
            ("wait..... or... or..", "wait... or... or..", 1),
            ("好。。。真的！！！", "好。真的！", 2),
            ("省略……号", "省略……号", 0),
            ("--- a -- b ## ** // :: ''", "--- a -- b ## ** // :: ''", 0),
            ("`a!!` $b,,c$ d!!", "`a!!` $b,,c$ d!", 1),
            ("!?", "!?", 0),
        ],
    );
}

#[test]
fn special_characters() {
    table(
        Part::SpecialCharacters,
        &[
            ("a\u{a0}b\u{2003}c", "a b c", 2),
            ("e\u{fb03}cient \u{fb01}sh", "efficient fish", 2),
            ("\u{e000}x\u{fffd}\u{fffc}", "x", 3),
            ("ＡＢｃ１", "ABc１", 3),
            ("naïve 日本 🙂 — “x”", "naïve 日本 🙂 — “x”", 0),
        ],
    );
}

#[test]
fn numbers() {
    table(
        Part::Numbers,
        &[
            ("1,234,567.89 and 12,345", "1234567.89 and 12345", 2),
            ("1.234.567,8 or 1'234 or 1\u{202f}234\u{202f}567", "1234567.8 or 1234 or 1234567", 3),
            ("１２３", "123", 1),
            ("1.234 and 3,14 and 1,2,3 and 0,123 and 12,34,567", "1.234 and 3,14 and 1,2,3 and 0,123 and 12,34,567", 0),
            ("v1,234 $1,234$ 127.0.0.1", "v1,234 $1,234$ 127.0.0.1", 0),
            // Four groups are an address where each fits into a byte.
            (
                "203.105.112.118 and 192.168.100.200:80, 100.100.100.100",
                "203.105.112.118 and 192.168.100.200:80, 100.100.100.100",
                0,
            ),
            (
                "203.105.112.118,203.105.112.119 203.105.112.118,5",
                "203.105.112.118,203.105.112.119 203.105.112.118,5",
                0,
            ),
            ("１２３.105.112.118", "123.105.112.118", 1),
            ("1.234.567.890 and 1.000.000.000 and 203,105,112,118", "1234567890 and 1000000000 and 203105112118", 3),
            // A list without spaces cannot be told from one number.
            ("100,200,300 and 100, 200, 300", "100200300 and 100, 200, 300", 1),
        ],
    );
}

#[test]
fn c4_lines() {
    table(Part::C4Lines, &[("This line stays.\nNot this\n\nTwo words.\n", "This line stays.", 2), ("", "", 0)]);
}

#[test]
fn refinedweb_lines() {
    table(
        Part::RefinedwebLines,
        &[
            ("HELLO WORLD\n\nHello world there\n", "\nHello world there\n", 1),
            ("12345\n3,000 likes\n5.1M   Views!\n3 cats are here\none\n", "3 cats are here\n", 4),
            (
                "Sign-in or register now\nThere are 3 items in cart today\nA long story read more...\n",
                " or register now\nThere are 3  today\nA long story\n".trim_start(),
                3,
            ),
            ("Hello World is half", "Hello World is half", 0),
            // Exactly half of the characters: stays.
            ("ABCDE abcd", "ABCDE abcd", 0),
        ],
    );
}

#[test]
fn white_space() {
    table(
        Part::WhiteSpace,
        &[
            ("a  \nb\t\n", "a\nb\n", 2),
            ("\n\na\n\n\n\nb", "a\n\nb", 4),
            ("    code\n\n    more", "    code\n\n    more", 0),
            ("a\n \t\nb", "a\n\nb", 1),
        ],
    );
}

#[test]
fn parts_run_in_one_order_and_count_apart() {
    let mut changes = Changes::default();
    let all = Normaliser::new(Part::ALL.into_iter().rev().filter(|p| *p != Part::C4Lines));
    let text = "\u{feff}Itâ€™s <b>fine</b>!!! See https://example.org now.  \r\nA second line with 1,234 words.";
    assert_eq!(all.apply(text, &mut changes), "It’s fine! See now.\nA second line with 1234 words.");
    let of = |part| changes.of(part);
    assert_eq!(
        [of(Part::Mojibake), of(Part::Controls), of(Part::ZeroWidth), of(Part::Html), of(Part::Urls)],
        [1, 1, 1, 2, 1]
    );
    assert_eq!([of(Part::RepeatedPunctuation), of(Part::Numbers), of(Part::WhiteSpace)], [1, 1, 1]);
    assert!(changes.any() && !Changes::default().any());
}

#[test]
fn markdown_and_latex_stay() {
    let text = "# Title\n\n```rust\nlet x = a!!; // https://example.org <b>\n```\n\nA formula $a_{1,,2} < b > c$ and \
                \\begin{align}x &amp; y!!\\end{align}\n\n| a | b |\n|---|---|\n* item\n";
    let mut changes = Changes::default();
    let all = Normaliser::new(Part::ALL.into_iter().filter(|p| !matches!(p, Part::C4Lines | Part::RefinedwebLines)));
    assert_eq!(all.apply(text, &mut changes), text);
}

#[test]
fn long_texts_take_linear_time() {
    let all = Normaliser::new(Part::ALL);
    for piece in [
        "<",
        "&",
        "<a ",
        "<!--",
        "<script",
        "https://",
        "www.",
        "Ã",
        "â€",
        "!?",
        "$",
        "`",
        "\\begin{x}",
        "1,",
        "\u{301}",
        "\u{200d}",
        "x",
        " ",
        "\r",
        "\n",
    ] {
        let text = piece.repeat((2 << 20) / piece.len());
        all.apply(&text, &mut Changes::default());
    }
    let line = "one line of ten megabytes ".repeat(400_000);
    assert_eq!(all.apply(&line, &mut Changes::default()).len(), 0, "C4 keeps no line without a mark");
}

fn odd_text() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "a",
        "The ",
        "Ã©",
        "â€™",
        "Â",
        "\r\n",
        "\r",
        "\n",
        "\n\n",
        "\u{0}",
        "\u{200d}",
        "\u{feff}",
        "e\u{301}",
        "é",
        "日本",
        "👩\u{200d}👧",
        "<b>",
        "</p>",
        "<!--",
        "-->",
        "<script>",
        "</script>",
        "&amp;",
        "&#x41;",
        "&",
        "<",
        ">",
        "https://a.b/c",
        "www.x.y",
        "](",
        ")",
        "`",
        "```",
        "$",
        "$$",
        "\\(",
        "\\)",
        "\\begin{a}",
        "\\end{a}",
        "!",
        "?",
        "...",
        "。",
        "\u{a0}",
        "\u{fb01}",
        "\u{e000}",
        "1,234",
        "12345",
        "5 likes",
        "SIGN-IN ",
        "read more...",
        "ABC DEF",
        " ",
        "  ",
        "\t",
        "\u{2028}",
        "مرحبا",
        "\u{202e}",
    ]);
    prop::collection::vec(piece, 0..80).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Whatever the text, no part panics, a count of none means the same text and the other way round, and what is
    /// protected from removals survives them.
    #[test]
    fn nothing_changes_uncounted(text in prop_oneof![odd_text(), any::<String>()]) {
        for part in Part::ALL {
            let (out, count) = by(part, &text);
            if part != Part::C4Lines {
                prop_assert_eq!(count == 0, out == text, "{} of {:?}", part.name(), text);
            }
        }
        let mut changes = Changes::default();
        Normaliser::new(Part::ALL).apply(&text, &mut changes);
    }

    /// Spans are ascending, disjoint and on character borders.
    #[test]
    fn spans_are_whole(text in odd_text()) {
        let spans = protect::spans(&text);
        prop_assert!(spans.windows(2).all(|w| w[0].end <= w[1].start));
        for span in spans {
            prop_assert!(text.get(span).is_some_and(|s| !s.is_empty()));
        }
    }
}
