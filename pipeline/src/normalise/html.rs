//! What HTML leaves in a text: tags, comments, scripts, character references.

use std::ops::Range;
use std::sync::LazyLock;

use memchr::memmem;
use regex::Regex;

use super::{Output, is_protected};

/// Elements whose tags part lines.
const BLOCKS: [&str; 33] = [
    "address",
    "article",
    "aside",
    "blockquote",
    "br",
    "dd",
    "div",
    "dl",
    "dt",
    "figure",
    "footer",
    "form",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "header",
    "hr",
    "li",
    "main",
    "nav",
    "ol",
    "option",
    "p",
    "pre",
    "section",
    "table",
    "tbody",
    "td",
    "tr",
    "ul",
];
/// Elements whose tags part nothing.
const INLINE: [&str; 46] = [
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "button", "center", "cite", "code", "col", "colgroup", "dfn",
    "em", "font", "head", "html", "body", "i", "iframe", "img", "input", "ins", "kbd", "label", "link", "mark", "meta",
    "noscript", "q", "s", "samp", "select", "small", "span", "strike", "strong", "sub", "sup", "textarea", "tfoot",
    "th", "thead", "u", "var",
];
/// A comment, script or style sheet reaches this far at most (bytes): what is longer is text that mentions one.
const MAX_ELEMENT: usize = 200_000;

/// A tag is this long at most (bytes).
const MAX_TAG: usize = 2_000;

static REFERENCE: LazyLock<Regex> = LazyLock::new(|| {
    #[allow(clippy::unwrap_used, reason = "a constant pattern, compiled by the tests")]
    Regex::new(r"^&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});").unwrap()
});

pub(super) fn remains(out: &mut Output<'_>, spans: &[Range<usize>]) {
    let text = out.text();
    let mut span = 0;
    let mut at = 0;
    let mut hopeless = [false; 3];
    while let Some(offset) = memchr::memchr2(b'<', b'&', &text.as_bytes()[at..]) {
        let start = at + offset;
        at = start + 1;
        if is_protected(spans, &mut span, start) {
            continue;
        }
        let rest = &text[start..];
        if rest.starts_with('&') {
            if let Some(found) = REFERENCE.find(rest) {
                let decoded = html_escape::decode_html_entities(found.as_str());
                if decoded != found.as_str() {
                    out.replace(start..start + found.end(), if decoded == "\u{a0}" { " " } else { &decoded });
                    at = start + found.end();
                }
            }
            continue;
        }
        if let Some((end, parts_lines)) = element(rest, &mut hopeless) {
            let newline = parts_lines && !out.at_line_start(start);
            out.replace(start..start + end, if newline { "\n" } else { "" });
            at = start + end;
        }
    }
}

/// Where the tag, comment or script at the start of `rest` ends, and whether it parts lines.
fn element(rest: &str, hopeless: &mut [bool; 3]) -> Option<(usize, bool)> {
    const WHOLE: [(&str, &str); 3] = [("<!--", "-->"), ("<script", "</script>"), ("<style", "</style>")];
    for (kind, (opener, closer)) in WHOLE.into_iter().enumerate() {
        let opens = rest.get(..opener.len()).is_some_and(|r| r.eq_ignore_ascii_case(opener));
        if !opens || hopeless[kind] {
            continue;
        }
        let reach = &rest.as_bytes()[..rest.len().min(MAX_ELEMENT)];
        let end = if kind == 0 {
            memmem::find(reach, closer.as_bytes())
        } else {
            memmem::find_iter(reach, b"</")
                .find(|at| reach.get(*at..at + closer.len()).is_some_and(|r| r.eq_ignore_ascii_case(closer.as_bytes())))
        };
        match end {
            Some(end) => return Some((end + closer.len(), true)),
            None => hopeless[kind] = true,
        }
    }
    let (name, end) = tag(rest.as_bytes())?;
    let parts_lines = BLOCKS.contains(&name.as_str());
    let known = parts_lines || INLINE.contains(&name.as_str()) || matches!(name.as_str(), "script" | "style");
    known.then_some((end, parts_lines))
}

/// Name of the tag at the start of `rest`, in lower case, and where it ends. Only names that HTML knows are removed, so
/// that `Vec<T>` and `<stdio.h>` stay.
fn tag(rest: &[u8]) -> Option<(String, usize)> {
    let from = 1 + usize::from(rest.get(1) == Some(&b'/'));
    let length = rest[from..].iter().take(11).take_while(|b| b.is_ascii_alphanumeric()).count();
    let behind = rest.get(from + length)?;
    if length == 0 || length > 10 || !(behind.is_ascii_whitespace() || matches!(behind, b'/' | b'>')) {
        return None;
    }
    let reach = &rest[from..rest.len().min(MAX_TAG)];
    let end = memchr::memchr2(b'<', b'>', reach).filter(|end| reach[*end] == b'>')?;
    Some((String::from_utf8_lossy(&rest[from..from + length]).to_ascii_lowercase(), from + end + 1))
}
