//! HTML to text: the one place that names the extraction crate.
//!
//! `dom_smoothie` (a Readability port) was chosen among eleven crates on 330 web pages and 3,769
//! documentation pages: with the best of them in F1 (0.878), it alone keeps paragraphs, code
//! blocks, table cells and list items on lines of their own, which line-based filters need. See
//! docs/BENCHMARKS.md for the comparison.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use dom_smoothie::{Config, Readability, ReadabilityError, TextMode};

use super::formulas;
use super::nesting::nesting_estimate;

/// Longer pages are dropped: the work of extraction grows with the page.
pub const MAX_HTML_BYTES: usize = 8 << 20;
/// Deeper pages are dropped: tree construction is quadratic in the depth. Browsers flatten at 512.
pub const MAX_HTML_DEPTH: usize = 256;
/// Pages of more elements are dropped before they are scored.
pub const MAX_HTML_ELEMENTS: usize = 100_000;
/// Stack of the extracting thread: within the depth above far more than is used, because an overflow
/// would end the whole program.
const STACK_BYTES: usize = 16 << 20;

/// Within the bounds above no page was seen to need a second. One that takes this long met a defect of the extraction:
/// it is dropped, and its thread is left to end by itself, so that no page can stall a shard.
pub const MAX_HTML_TIME: Duration = Duration::from_secs(60);

/// Why a page gives no text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExtractError {
    /// Longer than [`MAX_HTML_BYTES`].
    #[error("the page has {0} bytes, more than {MAX_HTML_BYTES}")]
    TooLarge(usize),
    /// Deeper than [`MAX_HTML_DEPTH`].
    #[error("the page nests deeper than {MAX_HTML_DEPTH} elements")]
    TooDeep,
    /// More than [`MAX_HTML_ELEMENTS`].
    #[error("the page has {0} elements, more than {MAX_HTML_ELEMENTS}")]
    TooManyElements(usize),
    /// Longer than [`MAX_HTML_TIME`] in work.
    #[error("the page was not done after {} s", MAX_HTML_TIME.as_secs())]
    TooSlow,
    /// The page has no main text.
    #[error("the page has no main text")]
    NoText,
    /// The extraction failed; the page is dropped.
    #[error("the extraction failed: {0}")]
    Failed(String),
}

/// The main text of a page: paragraphs, list items, table rows and lines of code on lines of their own.
///
/// The work is bounded by size, depth and number of elements, and runs on a thread of its own with a
/// stack to match; a panic there costs the page alone.
pub fn extract(html: &str) -> Result<String, ExtractError> {
    if html.len() > MAX_HTML_BYTES {
        return Err(ExtractError::TooLarge(html.len()));
    }
    if nesting_estimate(html.as_bytes(), MAX_HTML_DEPTH) > MAX_HTML_DEPTH {
        return Err(ExtractError::TooDeep);
    }
    within(MAX_HTML_TIME, html, main_text)
}

/// What `work` makes of the page on a thread of its own, unless it takes longer than `limit`.
fn within(
    limit: Duration,
    html: &str,
    work: impl FnOnce(&str) -> Result<String, ExtractError> + Send + 'static,
) -> Result<String, ExtractError> {
    let html: Arc<str> = html.into();
    let (done, result) = sync_channel(1);
    let worker = thread::Builder::new()
        .name("extract".into())
        .stack_size(STACK_BYTES)
        // Nobody listens any more when the time was up.
        .spawn(move || drop(done.send(work(&html))))
        .map_err(|e| ExtractError::Failed(format!("no thread for it: {e}")))?;
    match result.recv_timeout(limit) {
        Ok(text) => {
            // It has nothing left to do: waiting here bounds the number of threads.
            let _ = worker.join();
            text
        }
        Err(RecvTimeoutError::Timeout) => Err(ExtractError::TooSlow),
        Err(RecvTimeoutError::Disconnected) => {
            Err(ExtractError::Failed("the page is malformed in an unforeseen way".into()))
        }
    }
}

fn main_text(html: &str) -> Result<String, ExtractError> {
    let config =
        Config { text_mode: TextMode::Formatted, max_elements_to_parse: MAX_HTML_ELEMENTS, ..Config::default() };
    let html = formulas::as_latex(html);
    let article =
        Readability::new(html.as_ref(), None, Some(config)).and_then(|mut page| page.parse()).map_err(|e| match e {
            ReadabilityError::TooManyElements(found, _) => ExtractError::TooManyElements(found),
            ReadabilityError::GrabFailed => ExtractError::NoText,
            other => ExtractError::Failed(other.to_string()),
        })?;
    let text = tidy(&article.text_content);
    if text.is_empty() { Err(ExtractError::NoText) } else { Ok(text) }
}

/// Take the white space off line ends, and leave at most one empty line between two lines.
fn tidy(text: &str) -> String {
    let mut tidied = String::with_capacity(text.len());
    let mut empty = 0;
    for line in text.lines().map(str::trim_end) {
        if line.is_empty() {
            empty += 1;
            continue;
        }
        if !tidied.is_empty() {
            tidied.push_str(if empty > 0 { "\n\n" } else { "\n" });
        }
        empty = 0;
        tidied.push_str(line);
    }
    tidied
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(body: &str) -> String {
        let story =
            "Fulgurite is the glass that lightning leaves in sand, and it is found on dunes and mountains alike. ";
        format!(
            "<html><head><title>Glass</title><style>p{{}}</style></head><body><nav><a href=/>Home</a></nav>\
             <article><h1>Glass</h1><p>{}</p>{body}</article><script>x()</script></body></html>",
            story.repeat(6)
        )
    }

    #[test]
    fn the_main_text_keeps_its_lines() {
        let text = extract(&page(
            "<p>Second paragraph, with enough words to be one.</p><pre>a\n  b</pre><ul><li>one<li>two</ul>",
        ))
        .unwrap();
        assert!(text.contains("Fulgurite is the glass"), "{text}");
        assert!(text.contains("\n  b"), "{text}");
        assert!(text.lines().any(|line| line.trim().ends_with("one")), "{text}");
        assert!(!text.contains("x()") && !text.contains("Home") && !text.contains("\n\n\n"), "{text}");
    }

    #[test]
    fn a_page_that_takes_too_long_or_panics_costs_itself_alone() {
        let limit = Duration::from_millis(20);
        let slow = within(limit, "", |_| {
            thread::sleep(Duration::from_millis(500));
            Ok(String::new())
        });
        assert_eq!(slow, Err(ExtractError::TooSlow));
        let broken = within(MAX_HTML_TIME, "", |html| panic!("unforeseen: {html}"));
        assert!(matches!(broken, Err(ExtractError::Failed(_))));
        assert_eq!(within(limit, "x", |html| Ok(html.to_owned())), Ok("x".to_owned()));
    }

    #[test]
    fn formulas_stay() {
        let text = extract(&page(
            "<p>In text $a^2 + b^2$ and \\(c\\) and <math><mi>x</mi><mo>=</mo><mn>2</mn></math> stand here, in a paragraph \
             of its own that is long enough to be one.</p><pre><code>let x = 1;\n    let y = 2;</code></pre>",
        ))
        .unwrap();
        assert!(text.contains("$a^2 + b^2$") && text.contains("\\(c\\)"), "{text}");
        assert!(text.contains("x=2") || text.contains("x = 2"), "{text}");
        assert!(text.contains("let x = 1;\n    let y = 2;"), "{text}");
    }

    #[test]
    fn pages_that_would_stall_or_overflow_are_refused() {
        assert_eq!(extract(&page(&"<div>".repeat(100_000))), Err(ExtractError::TooDeep));
        assert_eq!(extract(&" ".repeat(MAX_HTML_BYTES + 1)), Err(ExtractError::TooLarge(MAX_HTML_BYTES + 1)));
        let links = page(&"<a href=x>y</a>".repeat(MAX_HTML_ELEMENTS));
        assert!(matches!(extract(&links), Err(ExtractError::TooManyElements(n)) if n > MAX_HTML_ELEMENTS));
        assert_eq!(extract(""), Err(ExtractError::NoText));
        assert_eq!(extract("<html><body></body></html>"), Err(ExtractError::NoText));
        extract(&page(&"<div>".repeat(MAX_HTML_DEPTH - 20))).unwrap();
    }

    /// Soup of tags, attributes, scripts, formulas and broken bits.
    fn soup() -> impl Strategy<Value = String> {
        let piece = prop::sample::select(vec![
            "<div>",
            "</div>",
            "<p>",
            "<p class=x",
            "<table><tr><td>",
            "</table>",
            "<ul><li>",
            "<script>",
            "</script>",
            "<script type=\"math/tex\">",
            "<math>",
            "</math>",
            "<annotation encoding=\"application/x-tex\">",
            "<svg>",
            "<!--",
            "-->",
            "<![CDATA[",
            "]]>",
            "<template>",
            "<select><option>",
            "<b><i></b></i>",
            "<a href='",
            "'>",
            "&",
            "&#x0;",
            "&#xD800;",
            "&amp;",
            "<",
            ">",
            "\"",
            "\u{0}",
            "é",
            "日本",
            "\u{202e}",
            "<pre>\n  x",
            "</pre>",
            "<title>",
            "<base href=x>",
            "<meta charset=utf-16>",
            "<frameset>",
            "<plaintext>",
            "<style>p{",
            "</style>",
            "<article>",
            "</article>",
            "A sentence that is long enough to be taken for text, with commas, and a full stop. ",
            "word ",
            "\r\n",
        ]);
        prop::collection::vec(piece, 0..150).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]

        #[test]
        fn any_soup_is_a_text_or_a_reason(html in prop_oneof![soup(), any::<String>()]) {
            let story = "Fulgurite is the glass that lightning leaves in sand, found on dunes and mountains alike. ".repeat(8);
            for html in [html.clone(), format!("<body><article><p>{story}</p>{html}</article>")] {
                match extract(&html) {
                    Ok(text) => prop_assert!(!text.trim().is_empty()),
                    Err(ExtractError::Failed(reason)) => prop_assert!(false, "{} of {:?}", reason, html),
                    Err(_) => {}
                }
            }
        }
    }
}
