//! International bank account numbers (ISO 13616).

use std::ops::Range;

/// Country and length, as in the registry of SWIFT.
#[rustfmt::skip]
const LENGTHS: [(&[u8; 2], usize); 79] = [
    (b"AD", 24), (b"AE", 23), (b"AL", 28), (b"AT", 20), (b"AZ", 28), (b"BA", 20), (b"BE", 16), (b"BG", 22),
    (b"BH", 22), (b"BI", 27), (b"BR", 29), (b"BY", 28), (b"CH", 21), (b"CR", 22), (b"CY", 28), (b"CZ", 24),
    (b"DE", 22), (b"DJ", 27), (b"DK", 18), (b"DO", 28), (b"EE", 20), (b"EG", 29), (b"ES", 24), (b"FI", 18),
    (b"FO", 18), (b"FR", 27), (b"GB", 22), (b"GE", 22), (b"GI", 23), (b"GL", 18), (b"GR", 27), (b"GT", 28),
    (b"HR", 21), (b"HU", 28), (b"IE", 22), (b"IL", 23), (b"IQ", 23), (b"IS", 26), (b"IT", 27), (b"JO", 30),
    (b"KW", 30), (b"KZ", 20), (b"LB", 28), (b"LC", 32), (b"LI", 21), (b"LT", 20), (b"LU", 20), (b"LV", 21),
    (b"LY", 25), (b"MC", 27), (b"MD", 24), (b"ME", 22), (b"MK", 19), (b"MN", 20), (b"MR", 27), (b"MT", 31),
    (b"MU", 30), (b"NL", 18), (b"NO", 15), (b"OM", 23), (b"PK", 24), (b"PL", 28), (b"PS", 29), (b"PT", 25),
    (b"QA", 29), (b"RO", 24), (b"RS", 22), (b"RU", 33), (b"SA", 24), (b"SC", 31), (b"SD", 18), (b"SE", 24),
    (b"SI", 19), (b"SK", 24), (b"SM", 27), (b"TN", 24), (b"TR", 26), (b"UA", 29), (b"VA", 22),
];

/// The number that begins at `at`, in one piece or in groups of four.
pub(super) fn at(bytes: &[u8], at: usize) -> Option<Range<usize>> {
    let rest = &bytes[at..];
    let head = rest.get(..4)?;
    if !head[2..].iter().all(u8::is_ascii_digit) {
        return None;
    }
    let length = LENGTHS.iter().find(|(country, _)| country[..] == head[..2])?.1;
    let mut number = Vec::with_capacity(length);
    let mut end = 0;
    for (offset, byte) in rest.iter().enumerate().take(length + length / 4) {
        match byte {
            b'0'..=b'9' | b'A'..=b'Z' => number.push(*byte),
            b' ' | b'-' if number.len() % 4 == 0 && offset > 0 && rest[offset - 1].is_ascii_alphanumeric() => {}
            _ => break,
        }
        end = offset + 1;
        if number.len() == length {
            break;
        }
    }
    let ends = rest.get(end).is_none_or(|b| !b.is_ascii_alphanumeric());
    (number.len() == length && ends && checksum(&number) == 1).then(|| at..at + end)
}

/// The number with its first four characters at the end and letters as 10 to 35, modulo 97.
fn checksum(number: &[u8]) -> u32 {
    number[4..].iter().chain(&number[..4]).fold(0, |rest, byte| match byte {
        b'0'..=b'9' => (rest * 10 + u32::from(byte - b'0')) % 97,
        _ => (rest * 100 + u32::from(byte - b'A') + 10) % 97,
    })
}
