//! Where Markdown and LaTeX keep what must stay as it is: code, formulas, link targets.

use std::ops::Range;

use memchr::{memchr, memchr2, memmem};

/// A formula or a code span reaches this far at most (bytes).
const MAX_INLINE: usize = 2_000;
/// A displayed formula or a LaTeX environment reaches this far at most (bytes).
const MAX_BLOCK: usize = 50_000;

/// The protected spans of `text`, ascending and disjoint: fenced and inline code, `$…$`, `$$…$$`, `\(…\)`, `\[…\]`,
/// `\begin{…}…\end{…}`, targets of Markdown links.
pub(super) fn spans(text: &str) -> Vec<Range<usize>> {
    let bytes = text.as_bytes();
    let mut spans: Vec<Range<usize>> = Vec::new();
    // Openers that found nothing to close them once: they are not tried again, so the time stays linear.
    let mut hopeless = [false; 5];
    let mut at = 0;
    while let Some(offset) = next_opener(&bytes[at..]) {
        let start = at + offset;
        let end = match bytes[start] {
            b'`' => code(bytes, start, &mut hopeless[0]),
            b'$' => dollars(bytes, start),
            b'\\' => latex(bytes, start, &mut hopeless),
            // `](target)`
            _ if bytes[start..].starts_with(b"](") => {
                let reach = &bytes[start..bytes.len().min(start + MAX_INLINE)];
                memchr2(b')', b'\n', reach).filter(|end| reach[*end] == b')').map(|end| start + end + 1)
            }
            _ => None,
        };
        match end {
            Some(end) => {
                spans.push(start..end);
                at = end;
            }
            // All of a run of back quotes or dollars is looked at once.
            None => at = start + run(bytes, start),
        }
    }
    spans
}

/// The first of the bytes that may open a span.
fn next_opener(bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|byte| matches!(byte, b'`' | b'$' | b'\\' | b']'))
}

fn run(bytes: &[u8], start: usize) -> usize {
    match bytes[start] {
        b'`' | b'$' => bytes[start..].iter().take_while(|b| **b == bytes[start]).count(),
        _ => 1,
    }
}

/// Code: as many back quotes at the end as at the start; three or more at the start of a line go on to the end of the
/// text when nothing closes them.
fn code(bytes: &[u8], start: usize, unclosed: &mut bool) -> Option<usize> {
    let ticks = run(bytes, start);
    // Looks no further back than an indent goes: a line may be as long as the text.
    let indent = bytes[..start].iter().rev().take(4).take_while(|b| **b == b' ').count();
    let fence = ticks >= 3 && indent <= 3 && (start == indent || bytes[start - indent - 1] == b'\n');
    if fence {
        let mut from = start + ticks;
        while let Some(newline) = memchr(b'\n', &bytes[from..]) {
            from += newline + 1;
            let indent = bytes[from..].iter().take(3).take_while(|b| **b == b' ').count();
            if bytes.get(from + indent) == Some(&b'`') && run(bytes, from + indent) >= ticks {
                return Some(from + indent + run(bytes, from + indent));
            }
        }
        return Some(bytes.len());
    }
    if *unclosed && ticks == 1 {
        return None;
    }
    let end = bytes.len().min(start + MAX_INLINE);
    let mut from = start + ticks;
    while from < end {
        let Some(next) = memchr(b'`', &bytes[from..end]) else { break };
        let length = run(bytes, from + next);
        from += next + length;
        if length == ticks {
            return Some(from);
        }
    }
    *unclosed = ticks == 1 && end == bytes.len();
    None
}

/// `$$…$$`, or `$…$` on one line with no space inside of the dollars and no digit behind them, as Pandoc has it: so
/// that `$5 and $6` are prices.
fn dollars(bytes: &[u8], start: usize) -> Option<usize> {
    if start > 0 && bytes[start - 1] == b'\\' {
        return None;
    }
    if bytes[start..].starts_with(b"$$") {
        let reach = &bytes[start + 2..bytes.len().min(start + MAX_BLOCK)];
        let end = memmem::find(reach, b"$$")?;
        return (end > 0).then_some(start + 2 + end + 2);
    }
    let reach = &bytes[start + 1..bytes.len().min(start + MAX_INLINE)];
    if reach.first().is_none_or(u8::is_ascii_whitespace) {
        return None;
    }
    let end = memchr2(b'$', b'\n', reach).filter(|end| reach[*end] == b'$')?;
    let closes =
        end > 0 && !reach[end - 1].is_ascii_whitespace() && !reach.get(end + 1).is_some_and(u8::is_ascii_digit);
    closes.then_some(start + 1 + end + 1)
}

/// `\(…\)`, `\[…\]`, `\begin{name}…\end{name}`.
fn latex(bytes: &[u8], start: usize, hopeless: &mut [bool; 5]) -> Option<usize> {
    let rest = &bytes[start..];
    let (kind, closer): (usize, Vec<u8>) = if rest.starts_with(b"\\(") {
        (1, b"\\)".to_vec())
    } else if rest.starts_with(b"\\[") {
        (2, b"\\]".to_vec())
    } else if rest.starts_with(b"\\begin{") {
        let name = memchr(b'}', &rest[7..rest.len().min(7 + 40)])?;
        (3, [&b"\\end{"[..], &rest[7..7 + name], b"}"].concat())
    } else {
        return None;
    };
    if hopeless[kind] {
        return None;
    }
    let reach = &rest[..rest.len().min(if kind == 1 { MAX_INLINE } else { MAX_BLOCK })];
    match memmem::find(&reach[2..], &closer) {
        Some(end) => Some(start + 2 + end + closer.len()),
        None => {
            // Environments have many names; after a few that nothing ends the text is no LaTeX.
            hopeless[kind] = kind != 3 || std::mem::replace(&mut hopeless[4], true);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<&str> {
        spans(text).into_iter().map(|span| &text[span]).collect()
    }

    #[test]
    fn code_formulas_and_targets() {
        assert_eq!(found("a `b!!` c ``d ` e`` f"), ["`b!!`", "``d ` e``"]);
        assert_eq!(found("x\n```rust\nlet a;;\n```\ny"), ["```rust\nlet a;;\n```"]);
        assert_eq!(found("```\nnever closed"), ["```\nnever closed"]);
        assert_eq!(found("$x^2$ and $$\na\n$$ and \\(b\\) and \\[c\\]"), ["$x^2$", "$$\na\n$$", "\\(b\\)", "\\[c\\]"]);
        assert_eq!(found("costs $5 and $6 or $ 7$, \\$8$"), Vec::<&str>::new());
        assert_eq!(found("\\begin{align}\na,,b\n\\end{align}."), ["\\begin{align}\na,,b\n\\end{align}"]);
        assert_eq!(found("see [this](http://x.org/a) now](b"), ["](http://x.org/a)"]);
        assert_eq!(found("`one\n"), Vec::<&str>::new());
        assert_eq!(found(""), Vec::<&str>::new());
    }

    #[test]
    fn openers_without_an_end_take_linear_time() {
        for opener in ["`", "`` `", "$a ", "$$ $", "\\(", "\\[", "\\begin{a}", "](", "```a "] {
            spans(&opener.repeat((4 << 20) / opener.len()));
        }
    }
}
