//! A web address in its parts, and the domain that somebody registered.

use url::{Host, Url};

/// Host and path of a web address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Lower case, without a final dot; internationalised names in their ASCII form.
    pub host: String,
    /// Path and query, beginning with `/`.
    pub path: String,
    /// Whether the host is a name and not a number.
    pub named: bool,
}

impl Address {
    /// The parts of `url`; a scheme may be missing. None for what is no web address.
    pub fn parse(url: &str) -> Option<Self> {
        let url = url.trim();
        if is_plain_name(url) {
            return Some(Self { host: url.to_owned(), path: "/".into(), named: true });
        }
        let parsed = match url.split_once("://") {
            Some(_) => Url::parse(url).ok()?,
            // `mailto:a@b.org` is an address of another kind.
            None if url.contains('@') => return None,
            None => Url::parse(&format!("http://{}", url.trim_start_matches('/'))).ok()?,
        };
        if !matches!(parsed.scheme(), "http" | "https" | "ftp") {
            return None;
        }
        let (host, named) = match parsed.host()? {
            Host::Domain(name) => (name.trim_end_matches('.').to_ascii_lowercase(), true),
            number => (number.to_string(), false),
        };
        if host.is_empty() || (named && !host.contains('.')) {
            return None;
        }
        let path = match parsed.query() {
            Some(query) => format!("{}?{query}", parsed.path()),
            None => parsed.path().to_owned(),
        };
        Some(Self { host, path, named })
    }

    /// The registered domain of the host: [`registered_domain`]; the host itself where it has none.
    pub fn domain(&self) -> &str {
        if self.named { registered_domain(&self.host).unwrap_or(&self.host) } else { &self.host }
    }
}

/// Whether `text` is a name as it stands, which most lines of a list are: lower-case ASCII labels parted by full stops,
/// the last one of letters.
fn is_plain_name(text: &str) -> bool {
    let label = |label: &str| {
        let bytes = label.as_bytes();
        !bytes.is_empty()
            && bytes.len() <= 63
            && !label.starts_with("xn--")
            && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
    };
    let Some((rest, top)) = text.rsplit_once('.') else { return false };
    text.len() <= 253 && top.bytes().all(|b| b.is_ascii_lowercase()) && label(top) && rest.split('.').all(label)
}

/// The name that somebody registered below a public suffix: `example.co.uk` of `www.example.co.uk`, `me.github.io`
/// of `x.me.github.io`. None for a public suffix itself.
pub fn registered_domain(host: &str) -> Option<&str> {
    psl::domain_str(host)
}

/// Whether the name is a suffix under which registries (not companies) sell names: `com`, `co.uk`.
pub(super) fn is_registry(host: &str) -> bool {
    psl::suffix(host.as_bytes())
        .is_some_and(|suffix| suffix.as_bytes() == host.as_bytes() && suffix.typ() != Some(psl::Type::Private))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registered_domains_follow_the_public_suffix_list() {
        for (url, domain) in [
            ("http://www.example.com/a", "example.com"),
            ("https://a.b.example.co.uk", "example.co.uk"),
            ("http://x.me.github.io/", "me.github.io"),
            ("http://192.168.1.1:80/", "192.168.1.1"),
            ("http://[2001:db8::1]/", "[2001:db8::1]"),
            ("example.org/path", "example.org"),
            ("http://www.ck/", "www.ck"),
        ] {
            assert_eq!(Address::parse(url).unwrap().domain(), domain, "{url}");
        }
        for none in
            ["http://localhost/", "mailto:a@b.org", "javascript:alert(1)", "http://", "file:///etc/passwd", "a b"]
        {
            assert_eq!(Address::parse(none), None, "{none}");
        }
        assert!(is_registry("co.uk") && is_registry("com") && !is_registry("github.io") && !is_registry("example.com"));
    }
}
