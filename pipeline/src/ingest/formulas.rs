//! Formulas of pages as LaTeX text, before extraction: where a page carries the LaTeX beside what it shows, the text
//! of the page is not readable (MathML flattened to letters) or not there at all (scripts).

use std::borrow::Cow;

use memchr::memmem;

/// A formula reaches this far at most (bytes).
const MAX_FORMULA: usize = 100_000;

/// The page with `$…$` (or `$$…$$` for displayed formulas) in place of
/// - MathJax's `<script type="math/tex">…</script>`, with `; mode=display`;
/// - `<math>` with an `<annotation encoding="application/x-tex">`, as KaTeX, MediaWiki and Pandoc write it.
///
/// Other MathML stays as it is. Borrowed when there is neither.
pub(super) fn as_latex(html: &str) -> Cow<'_, str> {
    let bytes = html.as_bytes();
    if memmem::find(bytes, b"math/tex").is_none() && memmem::find(bytes, b"application/x-tex").is_none() {
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
                out.push_str(&html[done..start]);
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

fn begins(text: &str, prefix: &str) -> bool {
    text.as_bytes().get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes()))
}

fn script(rest: &str) -> Element {
    let reach = &rest[..rest.floor_char_boundary(MAX_FORMULA)];
    let Some(open) = reach.find('>') else { return Element::Endless };
    let tag = &reach[..open];
    if !tag.contains("math/tex") {
        return Element::Nothing(open + 1);
    }
    let Some(end) = reach[open + 1..].find("</script>").map(|end| open + 1 + end) else { return Element::Endless };
    let length = end + "</script>".len();
    // The content of a script is not HTML; as text it must become so.
    let latex = reach[open + 1..end].trim().replace('&', "&amp;").replace('<', "&lt;");
    if latex.is_empty() {
        return Element::Nothing(length);
    }
    Element::Formula { length, latex, display: tag.contains("mode=display") }
}

fn math(rest: &str) -> Element {
    let reach = &rest[..rest.floor_char_boundary(MAX_FORMULA)];
    let Some(end) = reach.find("</math>") else { return Element::Endless };
    let body = &reach[..end];
    let length = end + "</math>".len();
    match annotation(body) {
        Some((latex, display)) => Element::Formula { length, latex: latex.to_owned(), display },
        None => Element::Nothing(length),
    }
}

/// The LaTeX of a `<math>` element, and whether it is displayed.
fn annotation(body: &str) -> Option<(&str, bool)> {
    let open = body.find('>')?;
    let annotation = body.find("application/x-tex")?;
    let from = annotation + body[annotation..].find('>')? + 1;
    let to = from + body[from..].find("</annotation>")?;
    let mut latex = body[from..to].trim();
    // MediaWiki wraps every formula.
    if let Some(inner) = latex.strip_prefix("{\\displaystyle").and_then(|l| l.strip_suffix('}')) {
        latex = inner.trim();
    }
    (!latex.is_empty()).then(|| (latex, body[..open].contains("display=\"block\"")))
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
            ("<math><mi>x</mi></math> application/x-tex", "<math><mi>x</mi></math> application/x-tex"),
            ("<script>math/tex</script>", "<script>math/tex</script>"),
            ("<script type=\"math/tex\">never closed", "<script type=\"math/tex\">never closed"),
        ] {
            assert_eq!(as_latex(html), expected);
        }
        as_latex(&"<math application/x-tex>".repeat(100_000));
        as_latex(&"<script math/tex>".repeat(100_000));
    }
}
