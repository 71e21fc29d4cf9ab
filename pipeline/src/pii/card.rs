//! Payment card numbers.

use std::ops::Range;

/// The number that begins at `at`: 13 to 19 digits in one piece, or in groups of four to six parted by one kind of sign.
/// Of several numbers that begin there, with more or fewer groups, the longest.
pub(super) fn at(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    if at > 0 && matches!(bytes[at - 1], b'-' | b'.' | b'/') {
        return None;
    }
    let rest = &bytes[at..];
    let mut digits = [0u8; 19];
    let mut count = 0;
    let mut sign = None;
    let mut group = 0;
    let mut longest = None;
    for (offset, byte) in rest.iter().enumerate().take(26) {
        match byte {
            b'0'..=b'9' if count < digits.len() => {
                digits[count] = byte - b'0';
                count += 1;
                group += 1;
            }
            b' ' | b'-' if (4..=6).contains(&group) && *sign.get_or_insert(*byte) == *byte => group = 0,
            _ => break,
        }
        let end = offset + 1;
        if group > 0 && ends(rest, end) && is_issued(&digits[..count]) && luhn(&digits[..count]) {
            longest = Some(at..at + end);
        }
    }
    longest
}

/// Whether a number can end there: no digit or letter goes on, and no fraction or further group.
fn ends(rest: &[u8], end: usize) -> bool {
    let digit_behind = || rest.get(end + 1).is_some_and(u8::is_ascii_digit);
    match rest.get(end) {
        Some(b) if b.is_ascii_alphanumeric() || *b == b'_' => false,
        Some(b'.' | b'-' | b',') => !digit_behind(),
        _ => true,
    }
}

/// Whether prefix and length are those of an issuer.
fn is_issued(digits: &[u8]) -> bool {
    if digits.len() < 13 {
        return false;
    }
    let first = |n: usize| digits[..n].iter().fold(0u32, |number, d| number * 10 + u32::from(*d));
    match digits.len() {
        13 => digits[0] == 4,
        14 => matches!(first(3), 300..=305 | 309) || matches!(first(2), 36 | 38 | 39),
        15 => matches!(first(2), 34 | 37),
        16 => {
            digits[0] == 4
                || matches!(first(2), 51..=55 | 62 | 65)
                || matches!(first(4), 2221..=2720 | 3528..=3589 | 6011)
                || matches!(first(3), 644..=649)
        }
        17 | 18 => first(2) == 62,
        19 => digits[0] == 4 || matches!(first(2), 62 | 65) || first(4) == 6011,
        _ => false,
    }
}

fn luhn(digits: &[u8]) -> bool {
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(place, digit)| match u32::from(*digit) << (place % 2) {
            doubled @ 10.. => doubled - 9,
            single => single,
        })
        .sum();
    sum.is_multiple_of(10) && digits.iter().any(|d| *d != digits[0])
}
