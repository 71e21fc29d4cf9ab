//! Formulas of pages as LaTeX text, before extraction: where a page carries the LaTeX beside what it shows, the text
//! of the page is not readable or not there at all (scripts), and MathML flattened to its letters is another formula
//! (a half becomes "12").

mod mathml;

use std::borrow::Cow;

use memchr::memmem;

/// A formula reaches this far at most (bytes).
const MAX_FORMULA: usize = 100_000;
/// A tag before a formula reaches this far at most (bytes).
const MAX_TAG: usize = 1000;

/// The page with `$…$` (or `$$…$$` for displayed formulas) in place of
/// - MathJax's `<script type="math/tex">…</script>`, with `; mode=display`;
/// - `<math>`: its `<annotation encoding="application/x-tex">`, as KaTeX, MediaWiki and Pandoc write it; or its `alttext`,
///   as LaTeXML does; or else what it says, written as LaTeX.
///
/// A tag right before a formula that hides it, as MediaWiki does (which shows a picture instead), hides it no more.
/// Borrowed when there is no formula.
pub(super) fn as_latex(html: &str) -> Cow<'_, str> {
    let bytes = html.as_bytes();
    if memmem::find(bytes, b"math/tex").is_none() && memmem::find(bytes, b"<math").is_none() {
        return Cow::Borrowed(html);
    }
    let mut out = String::with_capacity(html.len());
    let mut done = 0;
    let mut at = 0;
    while let Some(start) = memchr::memchr(b'<', &bytes[at..]).map(|n| at + n) {
        let rest = &html[start..];
        let found = if begins(rest, "<script") {
            script(rest)
        } else if begins(rest, "<math") {
            math(rest)
        } else {
            Element::Nothing(1)
        };
        match found {
            Element::Nothing(length) => at = start + length,
            Element::Formula { length, latex, display } => {
                let mark = if display { "$$" } else { "$" };
                push_shown(&mut out, &html[done..start]);
                out.push_str(&format!("<span>{mark}{latex}{mark}</span>"));
                done = start + length;
                at = done;
            }
            // Whatever comes behind cannot end either.
            Element::Endless => break,
        }
    }
    out.push_str(&html[done..]);
    Cow::Owned(out)
}

/// What stands at the start of a piece of HTML.
enum Element {
    /// No formula, within so many bytes.
    Nothing(usize),
    /// A formula of so many bytes, as HTML text.
    Formula { length: usize, latex: String, display: bool },
    /// An element without an end within [`MAX_FORMULA`].
    Endless,
}

/// Whether a start tag stands here: `<math` is the beginning of `<math-field>` too.
fn begins(text: &str, tag: &str) -> bool {
    let (name, behind) = (text.as_bytes().get(..tag.len()), text.as_bytes().get(tag.len()));
    name.is_some_and(|name| name.eq_ignore_ascii_case(tag.as_bytes()))
        && behind.is_some_and(|b| b.is_ascii_whitespace() || matches!(b, b'>' | b'/'))
}

/// Adds what stands before a formula. A start tag at its end that hides what it holds loses its attributes.
fn push_shown(out: &mut String, before: &str) {
    let end = before.trim_end();
    let reach = end.ceil_char_boundary(end.len().saturating_sub(MAX_TAG));
    let tag = end[reach..].rfind('<').map(|at| reach + at).filter(|at| end.ends_with('>') && hides(&end[*at..]));
    match tag {
        Some(tag) => {
            let name = end[tag + 1..].bytes().take_while(u8::is_ascii_alphanumeric).count();
            out.push_str(&before[..tag + 1 + name]);
            out.push('>');
        }
        None => out.push_str(before),
    }
}

/// Whether the tag is one that starts an element that is not shown.
fn hides(tag: &str) -> bool {
    if !tag[1..].starts_with(|c: char| c.is_ascii_alphabetic()) {
        return false;
    }
    let lower = tag.to_ascii_lowercase();
    let dense: String = lower.split_ascii_whitespace().collect();
    let hidden = |word: &str| word.trim_end_matches('>') == "hidden" || word.starts_with("hidden=");
    dense.contains("display:none")
        || dense.contains("visibility:hidden")
        || lower.split_ascii_whitespace().skip(1).any(hidden)
}

fn script(rest: &str) -> Element {
    let reach = &rest[..rest.floor_char_boundary(MAX_FORMULA)];
    let Some(open) = tag_end(reach) else { return Element::Endless };
    let tag = &reach[..open];
    if !tag.contains("math/tex") {
        // What looks like a formula in a program is none.
        return match end_tag(&rest[open..], "</script") {
            Some((end, _)) => Element::Nothing(open + end + 1),
            None => Element::Endless,
        };
    }
    let Some((end, length)) = end_tag(&reach[open + 1..], "</script") else { return Element::Endless };
    let (end, length) = (open + 1 + end, open + 1 + length);
    // The content of a script is not HTML; as text it must become so.
    let latex = reach[open + 1..end].trim().replace('&', "&amp;").replace('<', "&lt;");
    if latex.is_empty() {
        return Element::Nothing(length);
    }
    Element::Formula { length, latex, display: tag.contains("mode=display") }
}

fn math(rest: &str) -> Element {
    let reach = &rest[..rest.floor_char_boundary(MAX_FORMULA)];
    let Some(open) = tag_end(reach) else { return Element::Endless };
    let Some((end, length)) = end_tag(&reach[open..], "</math") else { return Element::Endless };
    let (tag, content, length) = (&reach[..open], &reach[open + 1..open + end], open + length);
    let display = attribute(tag, "display") == Some("block");
    let alternative = attribute(tag, "alttext").map(undisplayed).filter(|latex| !latex.is_empty());
    let latex = annotation(content)
        .map(in_one_piece)
        // An attribute has its ampersands escaped, and need not have what would be a tag outside of it.
        .or_else(|| alternative.map(|latex| in_one_piece(latex).replace('<', "&lt;")))
        .or_else(|| mathml::to_latex(content));
    match latex {
        Some(latex) => Element::Formula { length, latex, display },
        None => Element::Nothing(length),
    }
}

/// Where the `>` stands that ends the start tag at the beginning of a piece of HTML: none in a quoted value of an attribute.
fn tag_end(html: &str) -> Option<usize> {
    let (mut quote, mut before) = (None, b' ');
    html.bytes().position(|byte| {
        let ends = quote.is_none() && byte == b'>';
        match quote {
            Some(open) if byte == open => quote = None,
            None if before == b'=' && matches!(byte, b'"' | b'\'') => quote = Some(byte),
            _ => {}
        }
        before = if byte.is_ascii_whitespace() && before == b'=' { before } else { byte };
        ends
    })
}

/// Where the first end tag called `tag` (`</math`) begins and ends, whatever its case.
fn end_tag(html: &str, tag: &str) -> Option<(usize, usize)> {
    let mut from = 0;
    loop {
        let start = from + memmem::find(&html.as_bytes()[from..], b"</")?;
        if begins(&html[start..], tag) {
            return Some((start, start + html[start..].find('>')? + 1));
        }
        from = start + 2;
    }
}

/// The value of an attribute of a tag, as it is written.
fn attribute<'t>(tag: &'t str, name: &str) -> Option<&'t str> {
    let mut from = 0;
    while let Some(at) = tag[from..].find(name).map(|at| from + at) {
        from = at + name.len();
        let rest = tag[from..].trim_start();
        if tag[..at].ends_with(|c: char| c.is_ascii_whitespace())
            && let Some(value) = rest.strip_prefix('=').map(str::trim_start)
            && let Some(quote) = value.chars().next().filter(|c| matches!(c, '"' | '\''))
        {
            return value[1..].split_once(quote).map(|(value, _)| value);
        }
    }
    None
}

/// The LaTeX beside a `<math>` element.
fn annotation(content: &str) -> Option<&str> {
    let annotation = content.find("application/x-tex")?;
    let from = annotation + content[annotation..].find('>')? + 1;
    let to = from + content[from..].find("</annotation>")?;
    Some(undisplayed(&content[from..to])).filter(|latex| !latex.is_empty())
}

/// LaTeX without the line breaks that LaTeXML marks with a per cent sign: once the lines are one, it would hide what
/// stands behind it.
fn in_one_piece(latex: &str) -> String {
    let broken = |line: &str| line.ends_with("%\n") && !line.ends_with("\\%\n");
    latex.split_inclusive('\n').map(|line| if broken(line) { &line[..line.len() - 2] } else { line }).collect()
}

/// LaTeX without the `{\displaystyle …}` that MediaWiki wraps around every formula.
fn undisplayed(latex: &str) -> &str {
    let latex = latex.trim();
    match latex.strip_prefix("{\\displaystyle").and_then(|inner| inner.strip_suffix('}')) {
        Some(inner) => inner.trim(),
        None => latex,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latex_beside_a_formula_takes_its_place() {
        for (html, expected) in [
            ("<p>a</p>", "<p>a</p>"),
            ("x <script type=\"math/tex\">a<b</script> y", "x <span>$a&lt;b$</span> y"),
            ("<script type=\"math/tex; mode=display\">\\int</script>", "<span>$$\\int$$</span>"),
            (
                "<math><semantics><mi>x</mi><annotation encoding=\"application/x-tex\">{\\displaystyle x^2}</annotation></semantics></math>.",
                "<span>$x^2$</span>.",
            ),
            (
                "<math display=\"block\"><annotation encoding='application/x-tex'>y &lt; 1</annotation></math>",
                "<span>$$y &lt; 1$$</span>",
            ),
            ("<math alttext='\\frac{a}{b}' display = \"block\"><mi>a</mi></math>", "<span>$$\\frac{a}{b}$$</span>"),
            ("<math alttext=\"a\\pmod%\n{p} 5\\%\nb\"></math>", "<span>$a\\pmod{p} 5\\%\nb$</span>"),
            ("<math alttext=\"a<b>c &amp; d\"><mi>a</mi></math>.", "<span>$a&lt;b>c &amp; d$</span>."),
            ("<math alttext = 'x>\"y'></MATH >!", "<span>$x>\"y$</span>!"),
            ("<math title=\"a=b></math>", "<math title=\"a=b></math>"),
            ("<math title=a\"><mi>x</mi></math>", "<span>$x$</span>"),
            ("<SCRIPT TYPE=\"math/tex\">a</b</SCRIPT> y", "<span>$a&lt;/b$</span> y"),
            ("<script type=\"math/tex\">x</script\n>", "<span>$x$</span>"),
            (
                "<script>'<math><mi>x</mi></math>'</SCRIPT><math><mi>y</mi></math>",
                "<script>'<math><mi>x</mi></math>'</SCRIPT><span>$y$</span>",
            ),
            ("<math data-alttext=\"no\"><mi>x</mi></math> application/x-tex", "<span>$x$</span> application/x-tex"),
            ("<math></math>a", "<math></math>a"),
            ("<math-field><math><mi>x</mi></math>", "<math-field><span>$x$</span>"),
            (
                "<script>'<math><mi>x</mi></math>'; math/tex</script>",
                "<script>'<math><mi>x</mi></math>'; math/tex</script>",
            ),
            ("<script>a</script><math><mi>x</mi></math>", "<script>a</script><span>$x$</span>"),
            ("<script type=\"math/tex\">never closed", "<script type=\"math/tex\">never closed"),
        ] {
            assert_eq!(as_latex(html), expected);
        }
        as_latex(&"<math application/x-tex>".repeat(100_000));
        as_latex(&"<script math/tex>".repeat(100_000));
        as_latex(&"<script><math>".repeat(100_000));
        as_latex(&"<math title=\"".repeat(100_000));
        as_latex(&"<math></".repeat(100_000));
    }

    #[test]
    fn a_tag_that_hides_a_formula_is_bared() {
        let math = "<math><mi>x</mi></math>";
        for (before, expected) in [
            ("<span class=\"a\" style=\"display: none;\">", "<span>"),
            ("é<span class=\"a\">\n<SPAN STYLE='visibility:hidden'>\n ", "é<span class=\"a\">\n<SPAN>"),
            ("<div hidden>", "<div>"),
            ("<div class=hidden-math>", "<div class=hidden-math>"),
            ("<b style=\"display:none\">x</b>", "<b style=\"display:none\">x</b>"),
            ("<b style=\"display:none\">x", "<b style=\"display:none\">x"),
            ("a > ", "a > "),
            ("", ""),
        ] {
            assert_eq!(as_latex(&format!("{before}{math}")), format!("{expected}<span>$x$</span>"));
        }
        let far = format!("<span style=\"display:none\" title=\"{}\">", "é".repeat(MAX_TAG));
        assert_eq!(as_latex(&format!("{far}{math}")), format!("{far}<span>$x$</span>"));
    }
}
