//! Normal forms under which two documents count as equal.

use serde::{Deserialize, Serialize};
use url::Url;
use xxhash_rust::xxh3::xxh3_128;

/// The normal form of a text before it is hashed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalise {
    /// Byte for byte.
    None,
    /// Runs of Unicode white space are one space; none at the ends.
    Whitespace,
    /// As [`Self::Whitespace`], and every character in lower case (Unicode's mapping of the single
    /// character, without context: `Σ` is `σ` also at the end of a word).
    #[default]
    LowerWhitespace,
}

impl Normalise {
    /// Every form.
    pub const ALL: [Self; 3] = [Self::None, Self::Whitespace, Self::LowerWhitespace];

    /// The form's name in a recipe and in SQL.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Whitespace => "whitespace",
            Self::LowerWhitespace => "lower_whitespace",
        }
    }

    /// The form of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|form| form.name() == name)
    }
}

/// 128-bit XXH3 of the normal form of `text`; `scratch` keeps its memory from text to text.
pub fn content_hash(text: &str, normalise: Normalise, scratch: &mut String) -> u128 {
    let lower = match normalise {
        Normalise::None => return xxh3_128(text.as_bytes()),
        Normalise::Whitespace => false,
        Normalise::LowerWhitespace => true,
    };
    scratch.clear();
    scratch.reserve(text.len());
    let mut gap = false;
    for c in text.chars() {
        if c.is_whitespace() {
            gap = true;
            continue;
        }
        if gap && !scratch.is_empty() {
            scratch.push(' ');
        }
        gap = false;
        if !lower {
            scratch.push(c);
        } else if c.is_ascii() {
            scratch.push(c.to_ascii_lowercase());
        } else {
            scratch.extend(c.to_lowercase());
        }
    }
    xxh3_128(scratch.as_bytes())
}

/// Query parameters that say where a visitor came from, not what the page is.
const TRACKING: [&str; 6] = ["fbclid", "gclid", "dclid", "msclkid", "mc_cid", "mc_eid"];

/// A URL in the form under which two addresses count as the same page: parsed as WHATWG says (so
/// lower-case scheme and host, no default port, dot segments resolved), `https` for `http`, without
/// fragment, user and password, and without tracking parameters (`utm_*` and the click identifiers of
/// advertisers). What does not parse as a URL is kept, trimmed.
pub fn canonical_url(url: &str) -> String {
    let Ok(mut parsed) = Url::parse(url.trim()) else { return url.trim().into() };
    parsed.set_fragment(None);
    // These refuse URLs without a host, which have nothing to change.
    let _ = parsed.set_username("");
    let _ = parsed.set_password(None);
    if parsed.scheme() == "http" {
        // Port 443 on http is another server than the default of https: only then the scheme stays.
        if parsed.port() != Some(443) {
            let _ = parsed.set_scheme("https");
        }
    }
    if let Some(query) = parsed.query() {
        let kept: Vec<&str> = query
            .split('&')
            .filter(|pair| {
                let name = pair.split('=').next().unwrap_or_default();
                !(name.is_empty() || name.starts_with("utm_") || TRACKING.contains(&name))
            })
            .collect();
        let kept = kept.join("&");
        parsed.set_query((!kept.is_empty()).then_some(kept.as_str()));
    }
    parsed.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(text: &str, normalise: Normalise) -> u128 {
        content_hash(text, normalise, &mut String::from("left over"))
    }

    #[test]
    fn forms_forget_what_they_say_and_nothing_else() {
        let variants = ["Ein Wort", "Ein \n\tWort ", "\u{a0}ein wort"];
        let distinct =
            |form| variants.map(|v| hash(v, form)).into_iter().collect::<std::collections::BTreeSet<_>>().len();
        assert_eq!(distinct(Normalise::None), 3);
        assert_eq!(distinct(Normalise::Whitespace), 2);
        assert_eq!(distinct(Normalise::LowerWhitespace), 1);
        assert_ne!(hash("einwort", Normalise::LowerWhitespace), hash("ein wort", Normalise::LowerWhitespace));
        assert_eq!(hash("ÄÖÜ ΑΒΓ", Normalise::LowerWhitespace), hash("äöü αβγ", Normalise::LowerWhitespace));
        assert_eq!(hash("", Normalise::Whitespace), hash(" \n", Normalise::Whitespace));
    }

    #[test]
    fn the_hash_is_xxh3_of_the_form() {
        assert_eq!(hash("Ab  c\n", Normalise::LowerWhitespace), xxh3_128(b"ab c"));
        assert_eq!(hash("Ab  c\n", Normalise::Whitespace), xxh3_128(b"Ab c"));
        assert_eq!(hash("Ab  c\n", Normalise::None), xxh3_128(b"Ab  c\n"));
        // Published value of XXH3_128bits of the empty input with seed 0.
        assert_eq!(hash("", Normalise::None), 0x99aa_06d3_0147_98d8_6001_c324_468d_497f);
    }

    #[test]
    fn names_round_trip() {
        for form in Normalise::ALL {
            assert_eq!(Normalise::from_name(form.name()), Some(form));
            assert_eq!(serde_json::to_value(form).unwrap(), form.name());
        }
        assert_eq!(Normalise::from_name("upper"), None);
    }

    #[test]
    fn addresses_of_one_page_are_one() {
        for url in [
            "https://example.org/a/b?x=1",
            "HTTP://Example.ORG:80/a/b?x=1",
            "https://example.org:443/a/./c/../b?x=1#part",
            " https://u:p@example.org/a/b?utm_source=mail&x=1&fbclid=77 ",
        ] {
            assert_eq!(canonical_url(url), "https://example.org/a/b?x=1", "{url}");
        }
        assert_eq!(canonical_url("http://example.org:443/"), "http://example.org:443/");
        assert_eq!(canonical_url("http://example.org:8080/?utm_medium=x"), "https://example.org:8080/");
        assert_eq!(canonical_url(" no url "), "no url");
        assert_ne!(canonical_url("https://example.org/a"), canonical_url("https://example.org/A"));
    }
}
