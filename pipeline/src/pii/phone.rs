//! Phone numbers.
//!
//! Only two shapes are told from other numbers without knowing the country: a plus sign with 8 to 15 digits (E.164),
//! and North American numbers in their usual groups.

use std::ops::Range;

/// `+49 30 901820`, `+1 (212) 555-0100`: begins at the plus sign.
pub(super) fn international(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    if at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || matches!(bytes[at - 1], b'+' | b'=' | b')')) {
        return None;
    }
    let mut digits = 0;
    let mut end = at + 1;
    let mut gap = 0;
    for (offset, byte) in bytes[at + 1..].iter().take(32).enumerate() {
        match byte {
            b'0' if digits == 0 => return None,
            b'0'..=b'9' => {
                digits += 1;
                gap = 0;
                end = at + 2 + offset;
            }
            b' ' | b'-' | b'.' | b'(' | b')' | b'/' if gap < 2 && digits > 0 => gap += 1,
            _ => break,
        }
    }
    let ends = bytes.get(end).is_none_or(|b| !b.is_ascii_alphanumeric());
    // Arithmetic (`+12345678`) has no groups: a number without any needs a country code's length behind it.
    ((8..=15).contains(&digits) && ends).then_some(at..end)
}

/// `(212) 555-0100`, `212-555-0100`, `212.555.0100`, `1-800-555-0100`: area code and exchange begin with 2 to 9.
pub(super) fn national(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    let rest = &bytes[at..];
    let prefix = [&b"1-"[..], b"1 ", b"1."].into_iter().find(|p| rest.starts_with(p)).map_or(0, |p| p.len());
    let number = &rest[prefix..];
    let group = |from: usize, length: usize| {
        number.get(from..from + length).filter(|g| g.iter().all(u8::is_ascii_digit)).is_some()
    };
    let code = |from: usize| group(from, 3) && number[from] >= b'2';
    let length = if number.first() == Some(&b'(') {
        let close = code(1) && number.get(4) == Some(&b')');
        let from = 5 + usize::from(number.get(5) == Some(&b' '));
        let parted = number.get(from + 3).is_some_and(|b| matches!(b, b'-' | b' ' | b'.'));
        (close && code(from) && parted && group(from + 4, 4)).then_some(from + 8)?
    } else {
        let sign = *number.get(3)?;
        let parted = matches!(sign, b'-' | b'.') && number.get(7) == Some(&sign);
        (code(0) && parted && code(4) && group(8, 4)).then_some(12)?
    };
    let end = at + prefix + length;
    let ends = bytes.get(end).is_none_or(|b| !b.is_ascii_alphanumeric())
        && !(matches!(bytes.get(end), Some(b'-' | b'.')) && bytes.get(end + 1).is_some_and(u8::is_ascii_digit));
    let begins = at == 0 || !matches!(bytes[at - 1], b'-' | b'.' | b'/' | b'=' | b'$');
    (ends && begins).then_some(at..end)
}
