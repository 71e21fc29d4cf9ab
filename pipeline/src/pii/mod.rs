//! Personal data and secrets in texts: found by shape and checksum, replaced by placeholders or a reason to drop the
//! document.
//!
//! One walk over the bytes looks at the places where one may begin; each kind has its own file with its own checks.
//! Where two overlap, the one that begins first counts, then the order of [`Pii::ALL`]. Time is linear in the text.

mod card;
mod email;
mod iban;
mod ip;
mod phone;
mod secret;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::language::is_unspaced;

/// A kind of personal data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pii {
    /// Keys and tokens of well-known services, and private keys.
    Secret,
    /// E-mail addresses.
    Email,
    /// International bank account numbers: country, length and checksum fit.
    Iban,
    /// Payment card numbers: prefix, length and Luhn checksum fit.
    CreditCard,
    /// Public IPv4 and IPv6 addresses; private, reserved and documentation ones are none.
    IpAddress,
    /// Phone numbers: international with `+`, and North American.
    Phone,
}

impl Pii {
    /// All kinds.
    pub const ALL: [Self; 6] = [Self::Secret, Self::Email, Self::Iban, Self::CreditCard, Self::IpAddress, Self::Phone];

    /// The name in recipes and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Secret => "secret",
            Self::Email => "email",
            Self::Iban => "iban",
            Self::CreditCard => "credit_card",
            Self::IpAddress => "ip_address",
            Self::Phone => "phone",
        }
    }

    /// What stands in its place: the same for every value, so that nothing can be told from it.
    pub fn placeholder(self) -> &'static str {
        match self {
            Self::Secret => "<SECRET>",
            Self::Email => "<EMAIL>",
            Self::Iban => "<IBAN>",
            Self::CreditCard => "<CREDIT_CARD>",
            Self::IpAddress => "<IP_ADDRESS>",
            Self::Phone => "<PHONE>",
        }
    }
}

/// How many of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PiiCounts([u64; Pii::ALL.len()]);

impl PiiCounts {
    /// Of one kind.
    pub fn of(&self, kind: Pii) -> u64 {
        self.0[kind as usize]
    }
}

/// A set of kinds to look for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PiiFinder {
    kinds: [bool; Pii::ALL.len()],
}

impl PiiFinder {
    /// For the given kinds.
    pub fn new(kinds: impl IntoIterator<Item = Pii>) -> Self {
        let mut finder = Self::default();
        kinds.into_iter().for_each(|kind| finder.kinds[kind as usize] = true);
        finder
    }

    /// Whether it looks for anything.
    pub fn is_empty(&self) -> bool {
        self.kinds.iter().all(|kind| !kind)
    }

    /// Everything found in `text`, ascending and disjoint.
    pub fn find(&self, text: &str) -> Vec<(Range<usize>, Pii)> {
        let mut found = Vec::new();
        if self.kinds[Pii::Secret as usize] {
            secret::find(text, |range| found.push((range, Pii::Secret)));
        }
        self.walk(text, &mut found);
        found.sort_by_key(|(range, kind)| (range.start, *kind));
        let mut end = 0;
        found.retain(|(range, _)| {
            let free = range.start >= end;
            end = if free { range.end } else { end };
            free
        });
        found
    }

    /// The kinds that begin at a byte of a certain sort.
    fn walk(&self, text: &str, found: &mut Vec<(Range<usize>, Pii)>) {
        let wanted = |kind: Pii| self.kinds[kind as usize];
        let bytes = text.as_bytes();
        // Whether the character before belongs to the same word: numbers inside of words are none.
        let mut inside = false;
        let mut at = 0;
        while at < bytes.len() {
            let byte = bytes[at];
            if !byte.is_ascii() {
                // `at` is always where a character begins: what is found begins and ends with ASCII.
                let Some(character) = text[at..].chars().next() else { break };
                inside = character.is_alphanumeric() && !is_unspaced(character);
                at += character.len_utf8();
                continue;
            }
            let mut end = None;
            let mut take = |kind: Pii, range: Option<Range<usize>>| {
                if let Some(range) = range.filter(|_| wanted(kind)) {
                    end = Some(range.end);
                    found.push((range, kind));
                    return true;
                }
                false
            };
            match byte {
                b'0'..=b'9' | b'(' if !inside => {
                    let _ = wanted(Pii::CreditCard) && take(Pii::CreditCard, card::at(bytes, at))
                        || wanted(Pii::IpAddress) && take(Pii::IpAddress, ip::v4(text, at))
                        || wanted(Pii::IpAddress) && take(Pii::IpAddress, ip::v6(text, at))
                        || wanted(Pii::Phone) && take(Pii::Phone, phone::national(bytes, at));
                }
                b'a'..=b'f' | b'A'..=b'Z' if !inside => {
                    let _ = wanted(Pii::Iban) && byte.is_ascii_uppercase() && take(Pii::Iban, iban::at(bytes, at))
                        || wanted(Pii::IpAddress) && byte.is_ascii_hexdigit() && take(Pii::IpAddress, ip::v6(text, at));
                }
                b'+' if wanted(Pii::Phone) => {
                    take(Pii::Phone, phone::international(bytes, at));
                }
                b'@' if wanted(Pii::Email) => {
                    take(Pii::Email, email::around(bytes, at));
                }
                _ => {}
            }
            inside = byte.is_ascii_alphanumeric() || byte == b'_' || (inside && byte == b'.');
            at = match end {
                Some(end) => {
                    inside = false;
                    end
                }
                None => at + 1,
            };
        }
    }

    /// The text with everything found replaced, counted. Borrowed when nothing was found.
    pub fn redact<'t>(&self, text: &'t str, counts: &mut PiiCounts) -> Cow<'t, str> {
        let found = self.find(text);
        if found.is_empty() {
            return Cow::Borrowed(text);
        }
        let mut out = String::with_capacity(text.len());
        let mut done = 0;
        for (range, kind) in found {
            out.push_str(&text[done..range.start]);
            out.push_str(kind.placeholder());
            done = range.end;
            counts.0[kind as usize] += 1;
        }
        out.push_str(&text[done..]);
        Cow::Owned(out)
    }
}
