//! HTML to text: the one place that names the extraction crate.
//!
//! `dom_smoothie` (a Readability port) was chosen among fourteen crates on 330 pages with gold text and
//! 3,769 documentation pages: with the best of them in F1 (0.878), it alone keeps paragraphs, code
//! blocks, table cells and list items on lines of their own, which line-based filters need. See
//! docs/ARCHITECTURE.md for the comparison.

use std::thread;

use dom_smoothie::{Config, Readability, ReadabilityError, TextMode};

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
    thread::scope(|scope| {
        thread::Builder::new()
            .name("extract".into())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, || main_text(html))
            .map_err(|e| ExtractError::Failed(format!("no thread for it: {e}")))?
            .join()
            .unwrap_or_else(|_| Err(ExtractError::Failed("the page is malformed in an unforeseen way".into())))
    })
}

fn main_text(html: &str) -> Result<String, ExtractError> {
    let config =
        Config { text_mode: TextMode::Formatted, max_elements_to_parse: MAX_HTML_ELEMENTS, ..Config::default() };
    let article =
        Readability::new(html, None, Some(config)).and_then(|mut page| page.parse()).map_err(|e| match e {
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
    fn pages_that_would_stall_or_overflow_are_refused() {
        assert_eq!(extract(&page(&"<div>".repeat(100_000))), Err(ExtractError::TooDeep));
        assert_eq!(extract(&" ".repeat(MAX_HTML_BYTES + 1)), Err(ExtractError::TooLarge(MAX_HTML_BYTES + 1)));
        let links = page(&"<a href=x>y</a>".repeat(MAX_HTML_ELEMENTS));
        assert!(matches!(extract(&links), Err(ExtractError::TooManyElements(n)) if n > MAX_HTML_ELEMENTS));
        assert_eq!(extract(""), Err(ExtractError::NoText));
        assert_eq!(extract("<html><body></body></html>"), Err(ExtractError::NoText));
        extract(&page(&"<div>".repeat(MAX_HTML_DEPTH - 20))).unwrap();
    }
}
