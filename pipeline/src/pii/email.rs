//! E-mail addresses.

use std::ops::Range;

/// Longest local part and longest domain (RFC 5321).
const MAX_LOCAL: usize = 64;
const MAX_DOMAIN: usize = 255;
/// Endings of file names that look like top-level domains: `icon@2x.png`.
const FILES: [&[u8]; 9] = [b"png", b"jpg", b"jpeg", b"gif", b"svg", b"webp", b"css", b"js", b"html"];

/// The address around the `@` at `at`.
pub(super) fn around(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    let local = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'%' | b'+' | b'-' | b'\'');
    let mut length = bytes[..at].iter().rev().take(MAX_LOCAL + 1).take_while(|b| local(b)).count();
    while length > 0 && !bytes[at - length].is_ascii_alphanumeric() && bytes[at - length] != b'_' {
        length -= 1;
    }
    if length == 0 || length > MAX_LOCAL || bytes[at - 1] == b'.' {
        return None;
    }
    let rest = &bytes[at + 1..];
    let mut domain =
        rest.iter().take(MAX_DOMAIN + 1).take_while(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-')).count();
    while domain > 0 && matches!(rest[domain - 1], b'.' | b'-') {
        domain -= 1;
    }
    let name = &rest[..domain];
    let mut labels = name.split(|b| *b == b'.');
    let top = labels.next_back()?;
    let whole = labels.clone().count() > 0
        && labels.all(|l| !l.is_empty() && l.len() <= 63 && !l.starts_with(b"-") && !l.ends_with(b"-"));
    let top_fits = (2..=24).contains(&top.len()) && top.iter().all(u8::is_ascii_alphabetic);
    let file = FILES.iter().any(|f| top.eq_ignore_ascii_case(f));
    (whole && top_fits && !file && domain <= MAX_DOMAIN).then(|| at - length..at + 1 + domain)
}
