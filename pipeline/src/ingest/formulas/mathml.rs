//! Presentation MathML written as LaTeX: scripts, fractions, roots, accents, tables. The result is HTML text, as the
//! content of the elements was.

/// Elements deeper than this are given up.
const MAX_DEPTH: usize = 64;
/// Names that LaTeX has a command for.
const FUNCTIONS: &[&str] = &[
    "arccos", "arcsin", "arctan", "arg", "cos", "cosh", "cot", "det", "dim", "exp", "gcd", "inf", "ker", "lim", "ln",
    "log", "max", "min", "sec", "sin", "sinh", "sup", "tan", "tanh", "Pr",
];
/// Operators whose limits stand below and above.
const LARGE: &[&str] =
    &["∑", "∏", "∐", "∫", "∮", "⋃", "⋂", "⋁", "⋀", "⨁", "&sum;", "&prod;", "&int;", "&#x2211;", "&#x220f;", "&#x222b;"];
/// Function application, invisible times, separator and plus, by character and by name.
const INVISIBLE: &[&str] = &[
    "\u{2061}",
    "\u{2062}",
    "\u{2063}",
    "\u{2064}",
    "&#x2061;",
    "&#x2062;",
    "&#x2063;",
    "&#x2064;",
    "&#8289;",
    "&#8290;",
    "&ApplyFunction;",
    "&InvisibleTimes;",
];

/// The content of a `<math>` element as LaTeX; none for what is empty or too deep.
pub(super) fn to_latex(content: &str) -> Option<String> {
    let latex = row(&Reader { rest: content }.children(0)?);
    let latex = latex.trim();
    (!latex.is_empty()).then(|| latex.to_owned())
}

struct Reader<'h> {
    rest: &'h str,
}

impl<'h> Reader<'h> {
    /// What each child says, up to the end tag of the element that holds them; text between them is none of theirs.
    fn children(&mut self, depth: usize) -> Option<Vec<String>> {
        let mut children = Vec::new();
        while let Some(start) = self.rest.find('<') {
            self.rest = &self.rest[start..];
            if self.rest.starts_with("<!--") {
                self.skip_behind("-->");
            } else if self.rest.starts_with("</") {
                self.skip_behind(">");
                return Some(children);
            } else if self.rest[1..].starts_with(|c: char| c.is_ascii_alphabetic()) {
                let child = self.element(depth)?;
                children.extend(child);
            } else {
                self.rest = &self.rest[1..];
            }
        }
        Some(children)
    }

    /// The element that begins here; `Some(None)` for one that says nothing and holds no place of its own.
    fn element(&mut self, depth: usize) -> Option<Option<String>> {
        let (tag, rest) = self.rest.split_once('>').unwrap_or((self.rest, ""));
        self.rest = rest;
        let name = tag[1..].split(|c: char| c.is_ascii_whitespace() || c == '/').next().unwrap_or_default();
        // `m:mi` where a page declares a prefix.
        let name = name.rsplit(':').next().unwrap_or_default().to_ascii_lowercase();
        let empty = tag.ends_with('/');
        if matches!(name.as_str(), "mi" | "mn" | "mo" | "ms" | "mtext") {
            return Some(Some(if empty { String::new() } else { token(&name, self.text()) }));
        }
        if name == "mspace" && empty {
            return Some(Some(" ".into()));
        }
        let parts = match empty {
            true => Vec::new(),
            false if depth < MAX_DEPTH => self.children(depth + 1)?,
            false => return None,
        };
        Some(match name.as_str() {
            "annotation" | "annotation-xml" => None,
            "mphantom" => Some(String::new()),
            "mspace" => Some(" ".into()),
            _ => Some(combined(&name, &parts)),
        })
    }

    /// The text up to the next end tag, which is passed.
    fn text(&mut self) -> &'h str {
        let end = self.rest.find("</").unwrap_or(self.rest.len());
        let text = &self.rest[..end];
        self.rest = &self.rest[end..];
        self.skip_behind(">");
        text
    }

    fn skip_behind(&mut self, end: &str) {
        self.rest = self.rest.find(end).map_or("", |at| &self.rest[at + end.len()..]);
    }
}

/// A leaf as LaTeX.
fn token(name: &str, text: &str) -> String {
    // Something marked within a leaf is a part of it.
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, tag)) = rest.split_once('<') {
        plain.push_str(before);
        rest = tag.split_once('>').map_or("", |(_, behind)| behind);
    }
    plain.push_str(rest);
    let words: Vec<&str> = plain.split_whitespace().collect();
    let plain = words.join(" ");
    if INVISIBLE.contains(&plain.as_str()) {
        return String::new();
    }
    let letters = plain.len() > 1 && plain.bytes().all(|b| b.is_ascii_alphabetic());
    match (name, plain.as_str()) {
        ("mo" | "mi", word) if FUNCTIONS.contains(&word) => format!("\\{word} "),
        ("mi", word) if letters => format!("\\mathrm{{{word}}}"),
        ("mtext" | "ms", "" | "&nbsp;") => " ".into(),
        ("mtext" | "ms", words) => format!("\\text{{{words}}}"),
        (_, "{" | "}" | "%" | "#" | "&amp;") => format!("\\{plain}"),
        _ => plain,
    }
}

/// An element as LaTeX, from what its children say.
fn combined(name: &str, parts: &[String]) -> String {
    match (name, parts) {
        ("mfrac", [above, below]) => format!("\\frac{{{above}}}{{{below}}}"),
        ("msqrt", _) => format!("\\sqrt{{{}}}", row(parts)),
        ("mroot", [under, degree]) => format!("\\sqrt[{degree}]{{{under}}}"),
        ("msup", [base, above]) => format!("{}^{{{above}}}", based(base)),
        ("msub", [base, below]) => format!("{}_{{{below}}}", based(base)),
        ("msubsup", [base, below, above]) => format!("{}_{{{below}}}^{{{above}}}", based(base)),
        ("munder", [base, below]) if has_limits(base) => format!("{base}_{{{below}}}"),
        ("mover", [base, above]) if has_limits(base) => format!("{base}^{{{above}}}"),
        ("munderover", [base, below, above]) if has_limits(base) => format!("{base}_{{{below}}}^{{{above}}}"),
        ("mover", [base, above]) => match above.as_str() {
            "¯" | "‾" | "_" | "&OverBar;" => format!("\\overline{{{base}}}"),
            "→" | "\u{20d7}" => format!("\\vec{{{base}}}"),
            "^" | "ˆ" => format!("\\hat{{{base}}}"),
            "~" | "˜" => format!("\\tilde{{{base}}}"),
            "˙" => format!("\\dot{{{base}}}"),
            "⏞" => format!("\\overbrace{{{base}}}"),
            above => format!("\\overset{{{above}}}{{{base}}}"),
        },
        ("munder", [base, below]) => match below.as_str() {
            "_" | "\u{332}" => format!("\\underline{{{base}}}"),
            "⏟" => format!("\\underbrace{{{base}}}"),
            below => format!("\\underset{{{below}}}{{{base}}}"),
        },
        ("munderover", [base, below, above]) => {
            format!("\\overset{{{above}}}{{\\underset{{{below}}}{{{base}}}}}")
        }
        // Scripts that cannot be told from the base must not become one number with it.
        ("mmultiscripts", _) => parts.join(" "),
        ("mfenced", _) => format!("({})", parts.join(", ")),
        ("mtable", _) => format!("\\begin{{matrix}}{}\\end{{matrix}}", parts.join(" \\\\ ")),
        ("mtr" | "mlabeledtr", _) => parts.join(" &amp; "),
        _ => row(parts),
    }
}

/// One after the other; two numbers that meet stay two.
fn row(parts: &[String]) -> String {
    let mut row = String::new();
    for part in parts {
        let meet = |c: char| c.is_ascii_digit();
        if row.ends_with(meet) && part.starts_with(meet) {
            row.push(' ');
        }
        row.push_str(part);
    }
    row
}

/// What can have scripts: LaTeX wants braces around what has some already.
fn based(base: &str) -> String {
    let simple = !base.contains(['^', '_']) && !base.starts_with("\\frac") && !base.starts_with("\\begin");
    if simple { base.trim_end().to_owned() } else { format!("{{{base}}}") }
}

/// Whether what stands below and above are limits: of a large operator, or of `lim` and its like.
fn has_limits(base: &str) -> bool {
    LARGE.contains(&base) || (base.starts_with('\\') && base.ends_with(' '))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mathml_is_written_as_latex() {
        for (mathml, latex) in [
            ("<mfrac><mn>1</mn><mn>2</mn></mfrac>", "\\frac{1}{2}"),
            ("<mn>3</mn><mfrac><mn>1</mn><mn>2</mn></mfrac>", "3\\frac{1}{2}"),
            ("<msup><mn>10</mn><mrow><mo>-</mo><mn>3</mn></mrow></msup>", "10^{-3}"),
            ("<msub><mi>x</mi><mn>1</mn></msub><mo>≤</mo><mi>y</mi>", "x_{1}≤y"),
            ("<msubsup><mi>x</mi><mi>i</mi><mn>2</mn></msubsup>", "x_{i}^{2}"),
            ("<msup><msub><mi>x</mi><mi>i</mi></msub><mn>2</mn></msup>", "{x_{i}}^{2}"),
            ("<msqrt><mi>a</mi><mo>+</mo><mi>b</mi></msqrt>", "\\sqrt{a+b}"),
            ("<mroot><mi>a</mi><mn>3</mn></mroot>", "\\sqrt[3]{a}"),
            ("<mi>sin</mi><mo>&#x2061;</mo><mi>x</mi>", "\\sin x"),
            ("<mi>Re</mi><mo>&amp;</mo><mo>{</mo>", "\\mathrm{Re}\\&amp;\\{"),
            (
                "<munderover><mo>∑</mo><mrow><mi>i</mi><mo>=</mo><mn>1</mn></mrow><mi>n</mi></munderover><mi>i</mi>",
                "∑_{i=1}^{n}i",
            ),
            ("<munder><mo>lim</mo><mi>n</mi></munder><mi>a</mi>", "\\lim _{n}a"),
            ("<mover><mi>v</mi><mo>→</mo></mover><mover><mi>x</mi><mo>¯</mo></mover>", "\\vec{v}\\overline{x}"),
            ("<mover><mi>a</mi><mtext>def</mtext></mover>", "\\overset{\\text{def}}{a}"),
            ("<mn>1</mn><mn>2</mn>", "1 2"),
            ("<mmultiscripts><mi>C</mi><mprescripts/><mn>6</mn><mn>12</mn></mmultiscripts>", "C  6 12"),
            (
                "<mtable><mtr><mtd><mn>1</mn></mtd><mtd><mn>0</mn></mtd></mtr><mtr><mtd><mi>a</mi></mtd></mtr></mtable>",
                "\\begin{matrix}1 &amp; 0 \\\\ a\\end{matrix}",
            ),
            (
                "\n<m:semantics><!-- <mn>7</mn> --><m:mrow>\n <m:mi>a</m:mi>\n <m:mspace width='1em'/>\n</m:mrow>\
                 <m:annotation-xml><m:mn>9</m:mn></m:annotation-xml></m:semantics>",
                "a",
            ),
            ("<mn>1</mn", "1"),
            ("<mfrac><mn>1", "1"),
        ] {
            assert_eq!(to_latex(mathml).as_deref(), Some(latex), "{mathml}");
        }
        for nothing in ["", "text", "<mrow></mrow>", "<", "<mi/>", &"<mrow>".repeat(1000)] {
            assert_eq!(to_latex(nothing), None, "{nothing:.40}");
        }
    }
}
