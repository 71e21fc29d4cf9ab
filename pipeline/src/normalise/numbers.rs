//! Numbers in one form: ASCII digits, no separators between thousands, a point before the fraction.

use std::net::Ipv4Addr;
use std::ops::Range;

use super::{Output, is_protected};

fn is_digit(character: char) -> bool {
    matches!(character, '0'..='9' | '\u{ff10}'..='\u{ff19}')
}

/// What may stand between two digits of one number.
fn parts_digits(character: char) -> bool {
    matches!(character, '.' | ',' | '\'' | '’' | '\u{a0}' | '\u{2009}' | '\u{202f}' | '\u{ff0c}' | '\u{ff0e}')
}

/// Bytes of the number at the start of `rest`, which begins with a digit: digits, parted by one sign at a time.
fn length(rest: &str) -> usize {
    let mut length = 0;
    // Whether a sign stands behind the last digit.
    let mut parted = false;
    for (at, character) in rest.char_indices() {
        if is_digit(character) {
            length = at + character.len_utf8();
            parted = false;
        } else if !parted && parts_digits(character) {
            parted = true;
        } else {
            break;
        }
    }
    length
}

pub(super) fn standardise(out: &mut Output<'_>, spans: &[Range<usize>]) {
    let text = out.text();
    let mut span = 0;
    let mut at = 0;
    // Full-width digits begin with EF, as other characters do.
    while let Some(offset) = text.as_bytes()[at..].iter().position(|byte| matches!(byte, b'0'..=b'9' | 0xef)) {
        let start = at + offset;
        let Some(first) = text[start..].chars().next() else { break };
        if !is_digit(first) {
            at = start + first.len_utf8();
            continue;
        }
        let found = &text[start..start + length(&text[start..])];
        at = start + found.len();
        // Nearly all numbers are in the one form already.
        if found.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        // `v1,234` and `x_1` are names.
        let before = text[..start].chars().next_back();
        let joined = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
        if joined(before) || is_protected(spans, &mut span, start) {
            continue;
        }
        let plain = ascii(found);
        let standard = ungrouped(&plain).unwrap_or(plain);
        if standard != found {
            out.replace(start..at, &standard);
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
/// spaces), `1'234`. None when the groups are not of three digits, when one separator could be a decimal sign
/// (`1.234`), or for an IP address (`203.105.112.118`). A list of numbers of three digits without spaces (`100,200,300`)
/// cannot be told from one number and is taken for one.
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
    if whole.parse::<Ipv4Addr>().is_ok() {
        return None;
    }
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
