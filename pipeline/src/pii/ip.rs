//! Public IP addresses.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Range;

/// The public IPv4 address that begins at `at`, where a word begins.
pub(super) fn v4(text: &str, at: usize) -> Option<Range<usize>> {
    let bytes = &text.as_bytes()[at..];
    let length = bytes.iter().take(16).take_while(|b| b.is_ascii_digit() || **b == b'.').count();
    let candidate = text.get(at..at + length)?.trim_end_matches('.');
    let address: Ipv4Addr = candidate.parse().ok()?;
    let behind = bytes.get(candidate.len());
    let ends = behind.is_none_or(|b| !b.is_ascii_alphanumeric() && *b != b'_')
        && !(behind == Some(&b'.') && bytes.get(candidate.len() + 1).is_some_and(u8::is_ascii_digit));
    // `v1.2.3.4`, `version 1.2.3.4` and object identifiers are numbers of another kind.
    let before = text[..at].trim_end();
    let version = before.len() < at && before.to_ascii_lowercase_tail(8).ends_with("version");
    (ends && !version && is_public_v4(address)).then(|| at..at + candidate.len())
}

trait Tail {
    fn to_ascii_lowercase_tail(&self, bytes: usize) -> String;
}

impl Tail for str {
    /// The last bytes in lower case.
    fn to_ascii_lowercase_tail(&self, bytes: usize) -> String {
        let from = self.len().saturating_sub(bytes);
        String::from_utf8_lossy(&self.as_bytes()[from..]).to_ascii_lowercase()
    }
}

/// Reachable from anywhere: none of the special-purpose blocks of RFC 6890 and its successors.
fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !(address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_documentation()
        || a == 0
        || a >= 240
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && c == 0)
        || (a == 192 && b == 88 && c == 99)
        || (a == 198 && (b == 18 || b == 19)))
}

/// The public IPv6 address that begins at `at`, where a word begins.
pub(super) fn v6(text: &str, at: usize) -> Option<Range<usize>> {
    let bytes = &text.as_bytes()[at..];
    // Nearly every candidate ends here: the first group has up to four digits and a colon behind it.
    let first = bytes.iter().take(5).take_while(|b| b.is_ascii_hexdigit()).count();
    if first > 4 || bytes.get(first) != Some(&b':') {
        return None;
    }
    let length = bytes.iter().take(46).take_while(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.')).count();
    let mut candidate = text.get(at..at + length)?;
    while candidate.ends_with('.') || (candidate.ends_with(':') && !candidate.ends_with("::")) {
        candidate = &candidate[..candidate.len() - 1];
    }
    if bytes.get(candidate.len()).is_some_and(|b| b.is_ascii_alphanumeric()) {
        return None;
    }
    let address: Ipv6Addr = candidate.parse().ok()?;
    is_public_v6(address).then(|| at..at + candidate.len())
}

/// Global unicast (2000::/3) without the blocks for documentation, benchmarks and protocols.
fn is_public_v6(address: Ipv6Addr) -> bool {
    let [a, b, ..] = address.segments();
    a & 0xe000 == 0x2000 && !(a == 0x2001 && (b == 0x0db8 || b < 0x200)) && !(a == 0x3fff && b < 0x1000)
}
