//! Numbers in one form: ASCII digits, no separators between thousands, a point before the fraction.

use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;

use super::{Output, is_protected};

/// Digits and what may stand between them.
static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    #[allow(clippy::unwrap_used, reason = "a constant pattern, compiled by the tests")]
    Regex::new("[0-9\u{ff10}-\u{ff19}]+(?:[.,'’\u{a0}\u{2009}\u{202f}\u{ff0c}\u{ff0e}][0-9\u{ff10}-\u{ff19}]+)*")
        .unwrap()
});

pub(super) fn standardise(out: &mut Output<'_>, spans: &[Range<usize>]) {
    let text = out.text();
    let mut span = 0;
    for found in NUMBER.find_iter(text) {
        // `v1,234` and `x_1` are names.
        let before = text[..found.start()].chars().next_back();
        let joined = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
        if joined(before) || is_protected(spans, &mut span, found.start()) {
            continue;
        }
        let plain = ascii(found.as_str());
        let standard = ungrouped(&plain).unwrap_or(plain);
        if standard != found.as_str() {
            out.replace(found.range(), &standard);
        }
    }
}

/// Full-width forms to ASCII.
fn ascii(number: &str) -> String {
    let plain = |c: char| match u32::from(c) {
        code @ 0xff0c..=0xff19 => char::from_u32(code - 0xfee0).unwrap_or(c),
        _ => c,
    };
    number.chars().map(plain).collect()
}

/// A number whose thousands are grouped, without the separators: `1,234,567.8`, `1.234.567,8`, `1 234 567` (narrow
/// spaces), `1'234`. None when the groups are not of three digits, or when one separator could be a decimal sign
/// (`1.234`).
fn ungrouped(number: &str) -> Option<String> {
    let separators: Vec<char> = number.chars().filter(|c| !c.is_ascii_digit()).collect();
    let first = *separators.first()?;
    let grouping: Vec<char> = separators.iter().copied().take_while(|c| *c == first).collect();
    let rest = &separators[grouping.len()..];
    // At most one sign behind the groups, the decimal one, and another than the separator.
    if rest.len() > 1 || (first == '.' && grouping.len() < 2) || rest.iter().any(|c| !matches!(c, '.' | ',')) {
        return None;
    }
    let (whole, fraction) = match rest.first() {
        Some(sign) => number.rsplit_once(*sign).map(|(whole, fraction)| (whole, Some(fraction)))?,
        None => (number, None),
    };
    let mut groups = whole.split(first);
    let leading = groups.next()?;
    if leading.is_empty() || leading.len() > 3 || leading == "0" || !groups.all(|g| g.len() == 3) {
        return None;
    }
    let digits: String = whole.chars().filter(char::is_ascii_digit).collect();
    Some(match fraction {
        Some(fraction) => format!("{digits}.{fraction}"),
        None => digits,
    })
}
