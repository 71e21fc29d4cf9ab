//! HTML to text: the one place that names the extraction crate.
//!
//! `dom_smoothie` (a Readability port) was chosen among eleven crates on 330 web pages and 3,769
//! documentation pages: with the best of them in F1 (0.878), it alone keeps paragraphs, code
//! blocks, table cells and list items on lines of their own, which line-based filters need. See
//! docs/BENCHMARKS.md for the comparison.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use dom_smoothie::{Config, Readability, ReadabilityError, TextMode};

use super::{formulas, tree};

/// Longer pages are dropped: the work of extraction grows with the page.
pub const MAX_HTML_BYTES: usize = 8 << 20;
/// Deeper pages are dropped: tree construction is quadratic in the depth. Browsers flatten at 512.
pub const MAX_HTML_DEPTH: usize = 256;
/// Pages of more elements are dropped while they are parsed; those that the parser makes of itself count too.
pub const MAX_HTML_ELEMENTS: usize = 100_000;
/// Pages of more attributes are dropped while they are parsed: an element that is opened anew has all of them again.
pub const MAX_HTML_ATTRIBUTES: usize = 1_000_000;
/// Stack of the extracting thread: within the depth above far more than is used, because an overflow
/// would end the whole program.
const STACK_BYTES: usize = 16 << 20;

/// Within the bounds above no page was seen to need a second. One that takes this long met a defect of the extraction:
/// it is dropped, and its thread is left to end by itself, so that no page can stall a shard.
pub const MAX_HTML_TIME: Duration = Duration::from_secs(60);

/// Threads left to end by themselves that a process bears: each takes a core and memory, and more of them mean that the
/// input is at fault and not one page.
const MAX_LATE: usize = 4;

/// The threads that were left to end by themselves.
type Late = Mutex<Vec<JoinHandle<()>>>;

static LATE: Late = Mutex::new(Vec::new());

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
    #[error(
        "the page has more than {MAX_HTML_ELEMENTS} elements, those counted that are opened anew because nothing closed them"
    )]
    TooManyElements,
    /// More than [`MAX_HTML_ATTRIBUTES`].
    #[error("the elements of the page have more than {MAX_HTML_ATTRIBUTES} attributes")]
    TooManyAttributes,
    /// Longer than [`MAX_HTML_TIME`] in work.
    #[error("the page was not done after {} s", MAX_HTML_TIME.as_secs())]
    TooSlow,
    /// Too many pages are still worked on after [`MAX_HTML_TIME`]: no verdict on this page, but the end of the run.
    #[error(
        "{0} pages are still worked on after {seconds} s each, more than {MAX_LATE}: this is a defect of the extraction \
         that the input meets again and again; leave this file out of the inputs, and report the page",
        seconds = MAX_HTML_TIME.as_secs()
    )]
    Stuck(usize),
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
/// stack to match; a panic there costs the page alone. [`ExtractError::Stuck`] is about the process, the other errors are
/// about the page.
pub fn extract(html: &str) -> Result<String, ExtractError> {
    if html.len() > MAX_HTML_BYTES {
        return Err(ExtractError::TooLarge(html.len()));
    }
    within(&LATE, MAX_HTML_TIME, html, main_text)
}

/// What `work` makes of the page on a thread of its own, unless it takes longer than `limit`. Then the thread joins those
/// in `late`; none is begun while there are more of them than [`MAX_LATE`].
fn within(
    late: &Late,
    limit: Duration,
    html: &str,
    work: impl FnOnce(&str) -> Result<String, ExtractError> + Send + 'static,
) -> Result<String, ExtractError> {
    // A panic while the lock is held cannot leave the list half changed.
    let late = || {
        let mut late = late.lock().unwrap_or_else(PoisonError::into_inner);
        late.retain(|thread| !thread.is_finished());
        late
    };
    let stuck = late().len();
    if stuck > MAX_LATE {
        return Err(ExtractError::Stuck(stuck));
    }
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
        Err(RecvTimeoutError::Timeout) => {
            let mut late = late();
            late.push(worker);
            if late.len() > MAX_LATE { Err(ExtractError::Stuck(late.len())) } else { Err(ExtractError::TooSlow) }
        }
        Err(RecvTimeoutError::Disconnected) => {
            Err(ExtractError::Failed("the page is malformed in an unforeseen way".into()))
        }
    }
}

fn main_text(html: &str) -> Result<String, ExtractError> {
    let config =
        Config { text_mode: TextMode::Formatted, max_elements_to_parse: MAX_HTML_ELEMENTS, ..Config::default() };
    let html = formulas::as_latex(html);
    let document = tree::parse(&html)?;
    let article = Readability::with_document(document, None, Some(config)).and_then(|mut page| page.parse()).map_err(
        |e| match e {
            ReadabilityError::TooManyElements(..) => ExtractError::TooManyElements,
            ReadabilityError::GrabFailed => ExtractError::NoText,
            other => ExtractError::Failed(other.to_string()),
        },
    )?;
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
        let late = Late::default();
        let slow = within(&late, limit, "", |_| {
            thread::sleep(Duration::from_millis(500));
            Ok(String::new())
        });
        assert_eq!(slow, Err(ExtractError::TooSlow));
        let broken = within(&late, MAX_HTML_TIME, "", |html| panic!("unforeseen: {html}"));
        assert!(matches!(broken, Err(ExtractError::Failed(_))));
        assert_eq!(within(&late, MAX_HTML_TIME, "x", |html| Ok(html.to_owned())), Ok("x".to_owned()));
    }

    #[test]
    fn threads_that_do_not_end_are_counted_and_bounded() {
        let late = Late::default();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let ended = Arc::new(Mutex::new(ended));
        let never = || {
            let ended = ended.clone();
            within(&late, Duration::from_millis(5), "", move |_| {
                // Until the sender is gone.
                let _ = ended.lock().map(|ended| ended.recv());
                Ok(String::new())
            })
        };
        for _ in 0..MAX_LATE {
            assert_eq!(never(), Err(ExtractError::TooSlow));
        }
        assert_eq!(never(), Err(ExtractError::Stuck(MAX_LATE + 1)));
        let page = || within(&late, MAX_HTML_TIME, "x", |html| Ok(html.to_owned()));
        assert_eq!(page(), Err(ExtractError::Stuck(MAX_LATE + 1)), "no further thread is begun");
        assert!(page().unwrap_err().to_string().contains("leave this file out of the inputs"));
        drop(end);
        let waited = std::time::Instant::now();
        while page().is_err() {
            assert!(waited.elapsed() < MAX_HTML_TIME, "threads that ended are forgotten");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// A page of 130 KB that took 1.6 GB: each font is opened anew in every later block.
    #[test]
    fn unclosed_formatting_is_refused_before_it_multiplies() {
        let page: String = (0..5000).map(|i| format!("<div><font id={i}>x</div>")).collect();
        assert!(matches!(extract(&page), Err(ExtractError::TooDeep | ExtractError::TooManyElements)));
    }

    /// What stands around the text of a page, as sites have it.
    #[test]
    fn tables_stay_and_banners_and_footers_go() {
        let story =
            "Fulgurite is the glass that lightning leaves in sand, and it is found on dunes and mountains alike. ";
        let text = extract(&format!(
            "<html><head><title>Glass</title></head><body>\
             <div id=\"cookie-consent\" class=\"cookie-banner\" role=\"dialog\"><p>We use cookies to improve your experience, \
             to show you content that fits, and to count visits. By going on you accept our policy.</p>\
             <button>Accept all</button></div>\
             <header><nav><ul><li><a href=/>Home</a></li><li><a href=/news>News</a></li></ul></nav></header>\
             <main><article><h1>Glass</h1><p>{}</p>\
             <table><thead><tr><th>Mineral</th><th>Melts at</th></tr></thead><tbody>\
             <tr><td>Quartz</td><td>1670 °C</td></tr><tr><td>Feldspar</td><td>1100 °C</td></tr></tbody></table>\
             <p>{}</p></article></main>\
             <footer class=\"site-footer\"><p>Copyright 2024 Example Ltd. All rights reserved.</p>\
             <ul><li><a href=/terms>Terms</a></li><li><a href=/privacy>Privacy</a></li></ul></footer></body></html>",
            story.repeat(5),
            story.repeat(4)
        ))
        .unwrap();
        assert_eq!(text.matches("Fulgurite is the glass").count(), 9, "{text}");
        let row = |cells: [&str; 2]| text.lines().any(|line| cells.iter().all(|cell| line.contains(cell)));
        assert!(row(["Mineral", "Melts at"]) && row(["Quartz", "1670 °C"]) && row(["Feldspar", "1100 °C"]), "{text}");
        assert!(!row(["Quartz", "Feldspar"]), "a line for each row: {text}");
        for gone in ["cookies", "Accept all", "News", "Copyright", "All rights reserved", "Privacy"] {
            assert!(!text.contains(gone), "{gone}: {text}");
        }
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

    /// The markup of MediaWiki's articles: the formula itself is hidden, what is shown is a picture of it.
    #[test]
    fn formulas_of_mediawiki_stay_once() {
        let formula = |latex: &str, kind: &str, display: &str| {
            format!(
                "<span class=\"mwe-math-element mwe-math-element-{kind}\"><span class=\"mwe-math-mathml-{kind} mwe-math-mathml-a11y\" \
                 style=\"display: none;\"><math xmlns=\"http://www.w3.org/1998/Math/MathML\"{display} alttext=\"{{\\displaystyle {latex}}}\">\n  \
                 <semantics>\n    <mrow class=\"MJX-TeXAtom-ORD\">\n      <mstyle displaystyle=\"true\" scriptlevel=\"0\">\n        \
                 <mi>E</mi>\n        <mo>=</mo>\n        <msup><mi>m</mi><mn>2</mn></msup>\n      </mstyle>\n    </mrow>\n    \
                 <annotation encoding=\"application/x-tex\">{{\\displaystyle {latex}}}</annotation>\n  </semantics>\n</math></span>\
                 <img src=\"https://wikimedia.org/api/rest_v1/media/math/render/svg/9f73\" class=\"mwe-math-fallback-image-{kind} \
                 mw-invert skin-invert\" aria-hidden=\"true\" style=\"vertical-align: -0.338ex; width:8.976ex; height:2.676ex;\" \
                 alt=\"{{\\displaystyle {latex}}}\"></span>"
            )
        };
        let text = extract(&page(&format!(
            "<p>The energy of a body at rest is {}, as every reader of this page has seen before, on mugs and on shirts.</p>\
             <p>In general it is</p><dl><dd>{}</dd></dl><p>where the momentum is written in the usual way, with a letter.</p>",
            formula("E=mc^{2}", "inline", ""),
            formula("E^{2}=(pc)^{2}+\\left(mc^{2}\\right)^{2}", "display", " display=\"block\"")
        )))
        .unwrap();
        assert!(text.contains("at rest is $E=mc^{2}$, as every"), "{text}");
        assert!(text.contains("$$E^{2}=(pc)^{2}+\\left(mc^{2}\\right)^{2}$$"), "{text}");
        assert_eq!((text.matches("mc^{2}").count(), text.matches("displaystyle").count()), (2, 0), "{text}");
    }

    #[test]
    fn fractions_and_powers_do_not_become_other_numbers() {
        let text = extract(&page(
            "<p>Half of it, <math><mfrac><mn>1</mn><mn>2</mn></mfrac></math>, is less than the square \
             <math><msup><mn>10</mn><mn>2</mn></msup></math> of what was there at the beginning of this page.</p>",
        ))
        .unwrap();
        assert!(text.contains("$\\frac{1}{2}$") && text.contains("$10^{2}$"), "{text}");
    }

    #[test]
    fn pages_that_would_stall_or_overflow_are_refused() {
        assert_eq!(extract(&page(&"<div>".repeat(100_000))), Err(ExtractError::TooDeep));
        assert_eq!(extract(&" ".repeat(MAX_HTML_BYTES + 1)), Err(ExtractError::TooLarge(MAX_HTML_BYTES + 1)));
        let links = page(&"<a href=x>y</a>".repeat(MAX_HTML_ELEMENTS));
        assert_eq!(extract(&links), Err(ExtractError::TooManyElements));
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
