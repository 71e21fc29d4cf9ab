//! How deep would a parser nest these elements? Asked before parsing, because HTML tree construction
//! itself is quadratic in the depth: every start tag looks through the stack of open elements.

/// Bytes of a tag that are looked at for its end, so that the pass stays linear.
const MAX_TAG: usize = 4096;

/// Elements that never hold others, or that the parser closes by itself when a sibling starts: they add no depth of
/// their own, since what nests them (`table`, `ul`, `select`, …) is counted.
const NO_DEPTH: &[&str] = &[
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr", "p",
    "li", "dt", "dd", "option", "optgroup", "tr", "td", "th", "thead", "tbody", "tfoot", "colgroup", "html", "head",
    "body", "a", "rt", "rp",
];

/// Start tags that end an enclosing `svg` or `math` (HTML standard, 13.2.6.5).
const BREAKS_OUT: &[&str] = &[
    "b",
    "big",
    "blockquote",
    "body",
    "br",
    "center",
    "code",
    "dd",
    "div",
    "dl",
    "dt",
    "em",
    "embed",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "head",
    "hr",
    "i",
    "img",
    "li",
    "listing",
    "menu",
    "meta",
    "nobr",
    "ol",
    "p",
    "pre",
    "ruby",
    "s",
    "small",
    "span",
    "strong",
    "strike",
    "sub",
    "sup",
    "table",
    "tt",
    "u",
    "ul",
    "var",
];

/// The deepest nesting that a parser may reach, by one pass over the bytes and without a tree; stops at `limit + 1`.
/// An estimate for well-formed pages and an upper bound in spirit: text that merely looks like tags counts too.
pub(super) fn nesting_estimate(html: &[u8], limit: usize) -> usize {
    let mut open: Vec<u64> = Vec::new();
    let mut deepest = 0;
    let mut at = 0;
    while let Some(i) = memchr::memchr(b'<', &html[at..]) {
        at += i + 1;
        let rest = &html[at..];
        if rest.starts_with(b"!--") {
            at += comment_len(rest);
            continue;
        }
        let close = rest.first() == Some(&b'/');
        let name = &rest[usize::from(close)..];
        let len = name.iter().take(16).take_while(|b| b.is_ascii_alphanumeric()).count();
        if len == 0 || !name[0].is_ascii_alphabetic() {
            continue;
        }
        let name = name[..len].to_ascii_lowercase();
        let name = std::str::from_utf8(&name).unwrap_or_default();
        let foreign = open.iter().rposition(|&n| n == packed("svg") || n == packed("math"));
        if foreign.is_none() && !close && (name == "script" || name == "style") {
            at += raw_text_len(rest, name);
            continue;
        }
        if close {
            if let Some(j) = open.iter().rposition(|&n| n == packed(name)) {
                open.truncate(j);
            }
            continue;
        }
        let broken_out = foreign.is_some() && BREAKS_OUT.contains(&name);
        if let (true, Some(j)) = (broken_out, foreign) {
            open.truncate(j);
        }
        if NO_DEPTH.contains(&name) {
            continue;
        }
        // Only foreign content may close a tag in itself: <path/>, but <div/> opens a div.
        if foreign.is_some() && !broken_out && closes_itself(rest) {
            continue;
        }
        open.push(packed(name));
        deepest = deepest.max(open.len());
        if deepest > limit {
            break;
        }
    }
    deepest
}

/// Whether the tag ends in `/>`; one that does not end soon is taken to stay open.
fn closes_itself(tag: &[u8]) -> bool {
    let tag = &tag[..tag.len().min(MAX_TAG)];
    memchr::memchr(b'>', tag).is_some_and(|end| end > 0 && tag[end - 1] == b'/')
}

/// The first eight bytes of a name: enough to tell one element from another.
fn packed(name: &str) -> u64 {
    name.bytes().take(8).fold(0, |n, b| n << 8 | u64::from(b))
}

/// Length of the comment that starts with `!--`; `<!-->`, `<!--->` and `--!>` end one too. All of `rest` when it is never closed.
fn comment_len(rest: &[u8]) -> usize {
    if rest.starts_with(b"!-->") {
        return 4;
    }
    if rest.starts_with(b"!--->") {
        return 5;
    }
    for i in memchr::memmem::find_iter(&rest[3..], b"--") {
        let end = &rest[3 + i + 2..];
        if end.starts_with(b">") {
            return 3 + i + 3;
        }
        if end.starts_with(b"!>") {
            return 3 + i + 4;
        }
    }
    rest.len()
}

/// Bytes up to the end tag of a `script` or `style` element in any case; all of `rest` when it is never closed.
fn raw_text_len(rest: &[u8], name: &str) -> usize {
    for i in memchr::memmem::find_iter(rest, b"</") {
        let end = &rest[i + 2..];
        if end.len() >= name.len() && end[..name.len()].eq_ignore_ascii_case(name.as_bytes()) {
            return i;
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::nesting_estimate;

    fn depth(html: &str) -> usize {
        nesting_estimate(html.as_bytes(), 1000)
    }

    #[test]
    fn counts_what_stays_open() {
        assert_eq!(depth("<html><body><div><p>a<p>b<br><b>c</b></div><div><DIV></div></body>"), 2);
        assert_eq!(depth(&"<div>".repeat(400)), 400);
        assert_eq!(depth(&"<div>".repeat(5000)), 1001);
        assert_eq!(depth(&"<div></div>".repeat(5000)), 1);
    }

    #[test]
    fn is_not_deceived() {
        assert_eq!(depth(&"<div></b>".repeat(300)), 300, "an end tag that closes nothing");
        assert_eq!(depth(&format!("<svg>{}", "<div/>".repeat(300))), 300, "a div ends the svg and cannot close itself");
        assert_eq!(depth(&format!("<!-->{}-->", "<i>".repeat(300))), 300, "an empty comment");
        assert_eq!(depth(&format!("<!-- --!>{}-->", "<i>".repeat(300))), 300);
        assert_eq!(depth(&format!("<svg><script>{}", "<g>".repeat(300))), 302, "a script in an svg is no raw text");
        assert_eq!(depth(&format!("<script></SCRIPT >{}</script>", "<i>".repeat(300))), 300);
    }

    #[test]
    fn is_linear_where_no_tag_ends() {
        let begin = std::time::Instant::now();
        for piece in ["<rt", "<g ", "<a/", "<!-", "</"] {
            let page = format!("<svg>{}/>", piece.repeat(1 << 20));
            assert!(depth(&page) <= 1001);
        }
        assert!(begin.elapsed().as_secs() < 20, "{:?}", begin.elapsed());
    }

    #[test]
    fn skips_what_is_no_element() {
        assert_eq!(
            depth(&format!("<!--{}--><script>{}</script>1 <2 < 3", "<i>".repeat(300), "'<div>'".repeat(300))),
            0
        );
        assert_eq!(depth(&format!("<svg>{}</svg>", "<path d='M0'/>".repeat(300))), 1);
        assert_eq!(depth(""), 0);
        assert_eq!(depth("<"), 0);
        assert_eq!(depth("<!--"), 0);
    }
}
