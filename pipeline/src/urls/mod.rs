//! Judging documents by their address: lists of domains and URL prefixes, and words in the address.
//!
//! Lists are files of the user's: nothing is built in, because what is unwanted is for the user to say.

mod host;
mod list;
mod words;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};

pub use host::{Address, registered_domain};
pub use list::UrlList;
pub use words::UrlWords;

/// How documents are judged by their addresses. Paths are relative to the recipe's directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UrlsConfig {
    /// Files of unwanted domains and URL prefixes, one a line: `example.org` (with all below it),
    /// `example.org/adult/` (with all paths below it); also hosts files and `||example.org^`. `#` begins a comment.
    pub blocklists: Vec<PathBuf>,
    /// Files of strings, one a line, that no address may contain anywhere.
    pub substrings: Vec<PathBuf>,
    /// Files of words, one a line, that no address may contain as a whole word.
    pub words: Vec<PathBuf>,
    /// Files of words, one a line, of which an address may contain fewer than `soft_word_limit`.
    pub soft_words: Vec<PathBuf>,
    /// So many soft words drop a document.
    pub soft_word_limit: usize,
}

impl Default for UrlsConfig {
    fn default() -> Self {
        Self {
            blocklists: Vec::new(),
            substrings: Vec::new(),
            words: Vec::new(),
            soft_words: Vec::new(),
            soft_word_limit: 2,
        }
    }
}

/// Why an address drops its document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UrlVerdict {
    /// `url_blocklist`, `url_substring`, `url_word` or `url_soft_words`.
    pub rule: &'static str,
    /// What of the address was met: the entry, or the words.
    pub detail: String,
}

/// The lists of a recipe, loaded.
pub struct UrlFilter {
    list: UrlList,
    words: UrlWords,
    digests: Vec<(PathBuf, Digest)>,
}

impl UrlFilter {
    /// Loads the files of `config`.
    ///
    /// # Errors
    /// [`Error::Setting`] for a file that cannot be read or holds what is no entry, with its line.
    pub fn load(config: &UrlsConfig, base_dir: &Path) -> Result<Self> {
        if config.soft_word_limit == 0 {
            return Err(Error::setting("urls.soft_word_limit", "0 would drop every document; use 1 or more"));
        }
        let mut digests = Vec::new();
        let mut read = |key: &str, files: &[PathBuf], each: &mut dyn FnMut(&str) -> Result<(), String>| {
            for (number, file) in files.iter().enumerate() {
                let path = base_dir.join(file);
                let key = format!("urls.{key}.{number}");
                let digest = list::for_each_line(&path, each)
                    .map_err(|reason| Error::setting(key, format!("{}: {reason}", path.display())))?;
                digests.push((file.clone(), digest));
            }
            Ok::<(), Error>(())
        };
        let mut list = UrlList::builder();
        read("blocklists", &config.blocklists, &mut |line| list.add(line))?;
        let mut words = UrlWords::builder(config.soft_word_limit);
        read("substrings", &config.substrings, &mut |line| words.substring(line))?;
        read("words", &config.words, &mut |line| words.word(line))?;
        read("soft_words", &config.soft_words, &mut |line| words.soft_word(line))?;
        let words = words.build().map_err(|reason| Error::setting("urls.substrings", reason))?;
        Ok(Self { list: list.build(), words, digests })
    }

    /// The files and what was in them: a list that changed makes the stage stale.
    pub fn digests(&self) -> &[(PathBuf, Digest)] {
        &self.digests
    }

    /// Why the document at `url` is dropped; none when it is not, or when `url` is no web address.
    pub fn judge(&self, url: &str) -> Option<UrlVerdict> {
        let address = Address::parse(url)?;
        if let Some(entry) = self.list.find(&address) {
            return Some(UrlVerdict { rule: "url_blocklist", detail: entry });
        }
        self.words.judge(&address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(dir: &Path, files: &[(&str, &str)]) -> Result<UrlFilter> {
        let mut config = UrlsConfig::default();
        for (name, text) in files {
            std::fs::write(dir.join(name), text).unwrap();
            let list = match name.split('.').next().unwrap() {
                "block" => &mut config.blocklists,
                "sub" => &mut config.substrings,
                "word" => &mut config.words,
                _ => &mut config.soft_words,
            };
            list.push(name.into());
        }
        UrlFilter::load(&config, dir)
    }

    #[test]
    fn addresses_are_judged_by_lists_and_words() {
        let dir = tempfile::tempdir().unwrap();
        let filter = filter(
            dir.path(),
            &[
                ("block.txt", "# comment\nBad.example\n0.0.0.0 tracker.example.co.uk # hosts\n||ads.example^\nok.example/adult/\nfine.example/page?x=1\nmünchen.example\n\n"),
                ("sub.txt", "xxx\n"),
                ("word.txt", "Casino\n"),
                ("soft.txt", "poker\nbet\nbonus\n"),
            ],
        )
        .unwrap();
        let judged = |url: &str| filter.judge(url).map(|v| format!("{} {}", v.rule, v.detail));
        for (url, expected) in [
            ("http://bad.example/", Some("url_blocklist bad.example")),
            ("https://WWW.Bad.Example.:8080/x", Some("url_blocklist bad.example")),
            ("http://user@deep.below.bad.example?q", Some("url_blocklist bad.example")),
            ("http://notbad.example/", None),
            ("http://bad.example.org/", None),
            ("http://tracker.example.co.uk/a", Some("url_blocklist tracker.example.co.uk")),
            ("http://example.co.uk/a", None),
            ("//ads.example/x", Some("url_blocklist ads.example")),
            ("http://ok.example/adult/1", Some("url_blocklist ok.example/adult")),
            ("http://ok.example/adult", Some("url_blocklist ok.example/adult")),
            ("http://www.ok.example/adult/1", Some("url_blocklist ok.example/adult")),
            ("http://ok.example/adulthood", None),
            ("http://fine.example/page?x=1", Some("url_blocklist fine.example/page?x=1")),
            ("http://fine.example/page", None),
            ("http://xn--mnchen-3ya.example/", Some("url_blocklist xn--mnchen-3ya.example")),
            ("http://a.example/fooxXxbar", Some("url_substring xxx")),
            ("http://a.example/my-casino-page", Some("url_word casino")),
            ("http://a.example/casinos", None),
            ("http://a.example/poker/x", None),
            ("http://poker.example/bonus_bet", Some("url_soft_words poker bonus bet")),
            ("http://a.example/bet-bet", Some("url_soft_words bet bet")),
            ("not a url", None),
            ("", None),
            ("urn:uuid:1", None),
        ] {
            assert_eq!(judged(url).as_deref(), expected, "{url}");
        }
    }

    #[test]
    fn a_wrong_list_is_refused_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let error = filter(dir.path(), &[("block.txt", "good.example\nco.uk\n")]).err().unwrap().to_string();
        assert!(error.contains("block.txt: line 2") && error.contains("co.uk"), "{error}");
        let config = UrlsConfig { words: vec!["missing.txt".into()], ..UrlsConfig::default() };
        let error = UrlFilter::load(&config, dir.path()).err().unwrap();
        assert!(matches!(&error, Error::Setting { key, .. } if key == "urls.words.0"), "{error}");
        let config = UrlsConfig { soft_word_limit: 0, ..UrlsConfig::default() };
        assert!(UrlFilter::load(&config, dir.path()).is_err());
    }

    #[test]
    fn nothing_is_dropped_by_empty_lists() {
        let filter = UrlFilter::load(&UrlsConfig::default(), Path::new(".")).unwrap();
        assert_eq!(filter.judge("http://any.example/xxx"), None);
    }
}
