//! Millions of domains and URL prefixes in eight bytes each.
//!
//! Entries are kept as sorted 64-bit hashes: 40 MB for five million. A name is taken for an entry that it is not with
//! probability entries / 2⁶⁴, below 3 · 10⁻¹³ for five million.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::path::Path;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::host::{Address, is_registry};
use crate::digest::{Digest, DigestWriter};

/// A set of domains and URL prefixes.
#[derive(Debug, Default)]
pub struct UrlList {
    hashes: Vec<u64>,
    /// Whether any entry has a path: without one paths need no looking up.
    has_paths: bool,
}

/// A list being read.
#[derive(Debug, Default)]
pub struct UrlListBuilder {
    list: UrlList,
    /// Up to here `hashes` is sorted and without duplicates.
    settled: usize,
}

impl UrlListBuilder {
    /// Adds the entries of one line of a file: a domain or URL prefix, the names of a line of a hosts file behind their
    /// address, or the domain of a blocker's rule (`||example.org^`, whatever its options say).
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn add(&mut self, line: &str) -> Result<(), String> {
        let line = line.trim();
        // The head of a blocker's list names its format.
        if line.starts_with("[Adblock") {
            return Ok(());
        }
        if let Some(rule) = line.strip_prefix("||") {
            return match rule.split_once('^') {
                Some((entry, "" | "|")) => self.add_entry(entry),
                Some((entry, options)) if options.starts_with('$') => self.add_entry(entry),
                Some(_) => Err(format!("\"{line}\" is a rule for some paths; name a domain or a URL prefix")),
                None => self.add_entry(rule),
            };
        }
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let mut names = words.take_while(|word| !word.starts_with('#')).peekable();
        // A hosts file has the address that the names are to be resolved to in front, with a zone (`fe80::1%lo0`) or not.
        let address = first.split('%').next().unwrap_or_default().parse::<IpAddr>();
        let hosts = names.peek().is_some();
        match (hosts, address) {
            // `0.0.0.0` is no host.
            (false, Ok(address)) if address.is_unspecified() => Ok(()),
            (false, Ok(IpAddr::V6(address))) => self.add_entry(&format!("[{address}]")),
            (false, _) => self.add_entry(first),
            (true, Ok(_)) => names
                // These files name the machine itself and its networks too, mostly without a full stop.
                .filter(|name| {
                    name.contains('.') && *name != "localhost.localdomain" && name.parse::<IpAddr>().is_err()
                })
                .try_for_each(|name| self.add_entry(name)),
            (true, Err(_)) => Err(format!("\"{line}\" is no domain or URL")),
        }
    }

    fn add_entry(&mut self, entry: &str) -> Result<(), String> {
        let entry = entry.trim_end_matches('^').trim_start_matches("*.").trim_start_matches('.');
        let Some(address) = Address::parse(entry) else {
            return match entry {
                // Lists made of hosts files keep these names.
                "localhost" | "localhost.localdomain" | "local" | "broadcasthost" | "ip6-localhost" => Ok(()),
                _ if is_registry(entry) => Err(registry(entry)),
                _ => Err(format!("\"{entry}\" is no domain or URL")),
            };
        };
        if address.named && is_registry(&address.host) {
            return Err(registry(&address.host));
        }
        let path = address.path.trim_end_matches('/');
        self.list.has_paths |= !path.is_empty();
        self.list.hashes.push(hash(&address.host, path));
        // Lists repeat each other: duplicates go before memory is asked for.
        if self.list.hashes.len() == self.list.hashes.capacity() && self.list.hashes.len() > self.settled * 5 / 4 {
            self.settle();
        }
        Ok(())
    }

    fn settle(&mut self) {
        self.list.hashes.sort_unstable();
        self.list.hashes.dedup();
        self.settled = self.list.hashes.len();
        // Growing by a fourth rather than by doubling keeps the peak near the end size.
        self.list.hashes.reserve_exact(self.settled / 4 + 1024);
    }

    /// The list.
    pub fn build(mut self) -> UrlList {
        self.list.hashes.sort_unstable();
        self.list.hashes.dedup();
        self.list.hashes.shrink_to_fit();
        self.list
    }
}

fn registry(entry: &str) -> String {
    format!("\"{entry}\" is a public suffix: it would block every domain below it; name the domains")
}

fn hash(host: &str, path: &str) -> u64 {
    if path.is_empty() {
        return xxh3_64(host.as_bytes());
    }
    let mut hasher = Xxh3::new();
    hasher.update(host.as_bytes());
    hasher.update(path.as_bytes());
    hasher.digest()
}

impl UrlList {
    /// An empty list to add to.
    pub fn builder() -> UrlListBuilder {
        UrlListBuilder::default()
    }

    /// Number of different entries.
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.hashes.capacity() * size_of::<u64>()
    }

    /// The entry that `address` is below, if any: the host or one that it is below, with a prefix of the path or
    /// without.
    pub fn find(&self, address: &Address) -> Option<String> {
        if self.hashes.is_empty() {
            return None;
        }
        let mut host = address.host.as_str();
        loop {
            if self.contains(hash(host, "")) {
                return Some(host.to_owned());
            }
            if self.has_paths {
                let path = address.path.trim_end_matches('/');
                let ends = path.bytes().enumerate().skip(1).filter(|(_, b)| matches!(b, b'/' | b'?')).map(|(at, _)| at);
                for end in ends.chain([path.len()]).filter(|end| *end > 0) {
                    if self.contains(hash(host, &path[..end])) {
                        return Some(format!("{host}{}", &path[..end]));
                    }
                }
            }
            if !address.named {
                return None;
            }
            host = host.split_once('.')?.1;
        }
    }

    /// Interpolation search: hashes are spread evenly, so the first guess is off by some hundred entries.
    fn contains(&self, hash: u64) -> bool {
        let (mut low, mut high) = (0usize, self.hashes.len());
        let guess = ((u128::from(hash) * self.hashes.len() as u128) >> 64) as usize;
        let mut step = 64;
        let mut at = guess;
        // Widen around the guess until the hash must lie within, then halve.
        while low < high {
            match self.hashes[at].cmp(&hash) {
                std::cmp::Ordering::Equal => return true,
                std::cmp::Ordering::Less => {
                    low = at + 1;
                    if self.hashes.get(at + step).is_none_or(|h| *h >= hash) {
                        high = high.min(at + step + 1);
                        break;
                    }
                    at += step;
                }
                std::cmp::Ordering::Greater => {
                    high = at;
                    if at < step || self.hashes[at - step] <= hash {
                        low = low.max(at.saturating_sub(step));
                        break;
                    }
                    at -= step;
                }
            }
            step *= 2;
        }
        self.hashes[low..high].binary_search(&hash).is_ok()
    }
}

/// Calls `each` with every line of the file that is neither blank nor a comment (`#`, `!`); what follows ` #` in a
/// line is a comment too. Gives the digest of the file.
pub(super) fn for_each_line(path: &Path, each: &mut dyn FnMut(&str) -> Result<(), String>) -> Result<Digest, String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    let mut reader = BufReader::with_capacity(1 << 18, file);
    let mut digest = DigestWriter::new(std::io::sink());
    let mut line = Vec::new();
    let mut number = 0u64;
    loop {
        line.clear();
        number += 1;
        if reader.read_until(b'\n', &mut line).map_err(|e| e.to_string())? == 0 {
            return Ok(digest.finish().2);
        }
        std::io::Write::write_all(&mut digest, &line).map_err(|e| e.to_string())?;
        let text = std::str::from_utf8(&line).map_err(|_| format!("line {number} is not UTF-8"))?;
        let text = text.split_once(" #").map_or(text, |(entry, _)| entry).trim();
        if !text.is_empty() && !text.starts_with(['#', '!']) {
            each(text).map_err(|reason| format!("line {number}: {reason}"))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hash_is_found_and_no_other() {
        for count in [0usize, 1, 2, 3, 63, 64, 65, 1000, 100_000] {
            let mut list = UrlList::builder();
            for number in 0..count {
                list.list.hashes.push(xxh3_64(&number.to_le_bytes()));
            }
            let list = list.build();
            assert!((0..count).all(|n| list.contains(xxh3_64(&n.to_le_bytes()))), "{count}");
            assert!(!(count..count + 1000).any(|n| list.contains(xxh3_64(&n.to_le_bytes()))), "{count}");
            assert!(!list.contains(0) && !list.contains(u64::MAX));
        }
    }

    #[test]
    fn clustered_hashes_are_found() {
        let mut list = UrlList::builder();
        list.list.hashes.extend((0..5000).chain([u64::MAX - 1, u64::MAX]));
        let list = list.build();
        assert!((0..5000).all(|n| list.contains(n)) && list.contains(u64::MAX));
        assert!(!list.contains(5000) && !list.contains(1 << 40));
    }

    /// The head of the usual hosts files, and rules of blockers.
    #[test]
    fn hosts_files_and_rules_are_read() {
        let mut list = UrlList::builder();
        for line in [
            "[Adblock Plus 2.0]",
            "127.0.0.1 localhost",
            "127.0.0.1 localhost.localdomain",
            "127.0.0.1 local",
            "255.255.255.255 broadcasthost",
            "::1 localhost",
            "::1 ip6-localhost ip6-loopback",
            "fe80::1%lo0 localhost",
            "ff00::0 ip6-localnet",
            "ff00::0 ip6-mcastprefix",
            "ff02::1 ip6-allnodes",
            "ff02::3\tip6-allhosts",
            "0.0.0.0 0.0.0.0",
            "0.0.0.0",
            "0.0.0.0 ads.example.com tracker.example.net\t# two.example",
            "192.168.0.1\trouter.example.org",
            "||ads.example.org^$third-party",
            "||banner.example.org^",
            "||plain.example.org/ads/",
            "203.0.113.5",
            "2001:db8::5",
        ] {
            list.add(line).unwrap_or_else(|reason| panic!("{line}: {reason}"));
        }
        let list = list.build();
        let found = |url: &str| list.find(&Address::parse(url).unwrap());
        for (url, entry) in [
            ("http://a.ads.example.com/", Some("ads.example.com")),
            ("http://tracker.example.net/x", Some("tracker.example.net")),
            ("http://router.example.org/", Some("router.example.org")),
            ("http://ads.example.org/", Some("ads.example.org")),
            ("http://banner.example.org/", Some("banner.example.org")),
            ("http://plain.example.org/ads/1", Some("plain.example.org/ads")),
            ("http://plain.example.org/", None),
            ("http://203.0.113.5/", Some("203.0.113.5")),
            ("http://[2001:db8::5]/", Some("[2001:db8::5]")),
            ("http://two.example/", None),
            ("http://192.168.0.1/", None),
            ("http://0.0.0.0/", None),
            ("http://example.org/", None),
        ] {
            assert_eq!(found(url).as_deref(), entry, "{url}");
        }
        assert_eq!(list.len(), 8);
        let mut list = UrlList::builder();
        for line in
            ["two.example words.example", "||example.org^*/ads/", "@@||good.example^", "a b", "0.0.0.0 co.uk", "word"]
        {
            assert!(list.add(line).is_err(), "{line}");
        }
    }

    #[test]
    fn duplicates_take_no_room() {
        let mut list = UrlList::builder();
        for round in 0..3 {
            for number in 0..50_000 {
                list.add(&format!("host{number}.example{}", ["", "/", ""][round])).unwrap();
            }
        }
        let list = list.build();
        assert_eq!((list.len(), list.bytes()), (50_000, 400_000));
    }
}
