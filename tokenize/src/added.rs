//! Tokens that are looked for in the text before it is cut into pieces.
//!
//! `tokenizers` cuts out the added tokens of a file first: those that are not to be normalized from the text as
//! it is, the others from the normalized text. Special ones are text here, but they still hide what they overlap.

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::{AddedToken, Tokenizer};

/// The added tokens of a file, where some are not special.
pub struct Added {
    raw: Option<Finder>,
    normalized: Option<Finder>,
}

/// Finds tokens, the leftmost first and of these the longest.
struct Finder {
    automaton: AhoCorasick,
    /// The id of each token; none of a special one.
    ids: Vec<Option<u32>>,
}

/// A part of a text.
pub enum Part<'t> {
    /// An added token.
    Token(u32),
    /// What lies between them.
    Text(&'t str),
}

impl Added {
    /// Those of `tokenizer`; `None` where all are special, so that nothing is ever cut out. `Err` if they ask for
    /// something that would be left out here.
    pub fn of(tokenizer: &Tokenizer) -> Result<Option<Self>, ()> {
        let tokens = tokenizer.get_added_tokens_decoder();
        if tokens.values().all(|token| token.special) {
            return Ok(None);
        }
        let plain = |token: &AddedToken| !(token.single_word || token.lstrip || token.rstrip);
        // What normalization does to a token itself: nothing, if it is ASCII.
        let stable = |token: &AddedToken| !token.normalized || token.content.is_ascii();
        if !tokens.values().all(|token| (token.special || plain(token)) && stable(token)) {
            return Err(());
        }
        let finder = |normalized: bool| {
            let (mut ids, mut contents) = (Vec::new(), Vec::new());
            for (&id, token) in tokens.iter().filter(|(_, token)| token.normalized == normalized) {
                ids.push((!token.special).then_some(id));
                contents.push(token.content.as_str());
            }
            if ids.iter().all(Option::is_none) {
                return Ok(None);
            }
            let mut distinct = contents.clone();
            distinct.sort_unstable();
            distinct.dedup();
            if distinct.len() != contents.len() {
                return Err(());
            }
            let automaton = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(contents);
            Ok(Some(Finder { automaton: automaton.map_err(drop)?, ids }))
        };
        Ok(Some(Self { raw: finder(false)?, normalized: finder(true)? }))
    }

    /// Call `part` with the parts of a text as it is, in order.
    pub fn cut<'t>(&self, text: &'t str, part: impl FnMut(Part<'t>)) {
        cut(self.raw.as_ref(), text, part);
    }

    /// Call `part` with the parts of a normalized text, in order.
    pub fn cut_normalized<'t>(&self, text: &'t str, part: impl FnMut(Part<'t>)) {
        cut(self.normalized.as_ref(), text, part);
    }
}

fn cut<'t>(finder: Option<&Finder>, text: &'t str, mut part: impl FnMut(Part<'t>)) {
    let mut from = 0;
    if let Some(Finder { automaton, ids }) = finder {
        for found in automaton.find_iter(text) {
            let Some(id) = ids[found.pattern().as_usize()] else { continue };
            if from < found.start() {
                part(Part::Text(&text[from..found.start()]));
            }
            part(Part::Token(id));
            from = found.end();
        }
    }
    if from < text.len() {
        part(Part::Text(&text[from..]));
    }
}
