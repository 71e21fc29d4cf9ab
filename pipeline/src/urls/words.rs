//! Words in addresses: RefinedWeb's three kinds (Penedo et al. 2023, G.1).

use std::collections::HashSet;

use aho_corasick::AhoCorasick;

use super::{Address, UrlVerdict};

/// Strings and words that addresses are judged by. ASCII letter case is ignored.
pub struct UrlWords {
    substrings: Option<AhoCorasick>,
    names: Vec<String>,
    words: HashSet<String>,
    soft_words: HashSet<String>,
    soft_word_limit: usize,
}

/// Words being read.
pub struct UrlWordsBuilder(UrlWords);

impl UrlWordsBuilder {
    /// A string that no address may contain.
    pub fn substring(&mut self, line: &str) -> Result<(), String> {
        self.0.names.push(line.to_lowercase());
        Ok(())
    }

    /// A word that no address may contain.
    pub fn word(&mut self, line: &str) -> Result<(), String> {
        self.0.words.insert(whole(line)?);
        Ok(())
    }

    /// A word of which an address may contain few.
    pub fn soft_word(&mut self, line: &str) -> Result<(), String> {
        self.0.soft_words.insert(whole(line)?);
        Ok(())
    }

    /// All of them, ready for searching.
    pub fn build(mut self) -> Result<UrlWords, String> {
        if !self.0.names.is_empty() {
            let search = AhoCorasick::builder().ascii_case_insensitive(true).build(&self.0.names);
            self.0.substrings = Some(search.map_err(|e| e.to_string())?);
        }
        Ok(self.0)
    }
}

/// A word as it can be met in an address.
fn whole(line: &str) -> Result<String, String> {
    if line.chars().all(char::is_alphanumeric) {
        return Ok(line.to_lowercase());
    }
    Err(format!("\"{line}\" is no single word of letters and digits; words are what stands between other characters"))
}

impl UrlWords {
    /// Nothing yet; `soft_word_limit` soft words will drop a document.
    pub fn builder(soft_word_limit: usize) -> UrlWordsBuilder {
        UrlWordsBuilder(Self {
            substrings: None,
            names: Vec::new(),
            words: HashSet::new(),
            soft_words: HashSet::new(),
            soft_word_limit,
        })
    }

    /// Why the address drops its document.
    pub fn judge(&self, address: &Address) -> Option<UrlVerdict> {
        if self.substrings.is_none() && self.words.is_empty() && self.soft_words.is_empty() {
            return None;
        }
        let text = format!("{}{}", address.host, address.path).to_lowercase();
        if let Some(found) = self.substrings.as_ref().and_then(|search| search.find(&text)) {
            let name = self.names[found.pattern().as_usize()].clone();
            return Some(UrlVerdict { rule: "url_substring", detail: name });
        }
        let mut soft = Vec::new();
        for word in text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
            if self.words.contains(word) {
                return Some(UrlVerdict { rule: "url_word", detail: word.into() });
            }
            if self.soft_words.contains(word) {
                soft.push(word);
            }
        }
        (soft.len() >= self.soft_word_limit && !soft.is_empty())
            .then(|| UrlVerdict { rule: "url_soft_words", detail: soft.join(" ") })
    }
}
