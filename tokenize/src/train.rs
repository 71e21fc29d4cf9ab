//! Training a byte-level BPE tokenizer: word counts, merges, `tokenizer.json`.

use std::collections::{HashMap, HashSet};

use rayon::prelude::*;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits as DigitsPreTokenizer;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use crate::bpe;
use crate::config::{Digits, Pattern, TokenizerConfig};
use crate::error::{Error, Result};
use crate::split::Splitter;

/// Longer words (runs without a border) are counted in parts of this many bytes: it bounds the work of
/// one merge and loses nothing that a vocabulary could hold.
const WORD_BYTES: usize = 1024;
/// How the names of reserved tokens begin.
const RESERVED: &str = "<|reserved_";

/// Counts the words of documents, from as many threads as there are, and learns a tokenizer from them.
///
/// The result is a function of the set of documents alone: counting commutes, and the learner breaks
/// ties by id.
pub struct Trainer {
    config: TokenizerConfig,
    splitter: Splitter,
    words: HashMap<Box<[u8]>, u64>,
    /// Sum of their lengths.
    word_bytes: u64,
}

impl Trainer {
    /// A trainer without words.
    pub fn new(config: &TokenizerConfig) -> Result<Self> {
        config.validate()?;
        let splitter = Splitter::new(&config.pattern, config.digits)?;
        Ok(Self { config: config.clone(), splitter, words: HashMap::new(), word_bytes: 0 })
    }

    /// Count the words of some documents.
    pub fn feed(&mut self, texts: &[&str]) {
        let counts = texts
            .par_iter()
            .fold(HashMap::<&[u8], u64>::new, |mut counts, text| {
                self.splitter.for_each(text, |piece| {
                    for word in piece.as_bytes().chunks(WORD_BYTES) {
                        *counts.entry(word).or_default() += 1;
                    }
                });
                counts
            })
            .reduce(HashMap::new, |a, b| {
                let (mut large, small) = if a.len() < b.len() { (b, a) } else { (a, b) };
                small.into_iter().for_each(|(word, n)| *large.entry(word).or_default() += n);
                large
            });
        for (word, n) in counts {
            match self.words.get_mut(word) {
                Some(count) => *count += n,
                None => {
                    self.word_bytes += word.len() as u64;
                    self.words.insert(word.into(), n);
                }
            }
        }
    }

    /// Words that differ.
    pub fn distinct_words(&self) -> usize {
        self.words.len()
    }

    /// Bytes of words that differ.
    pub fn word_bytes(&self) -> u64 {
        self.word_bytes
    }

    /// Whether these are as many as the settings allow. It is for the caller to stop then: which documents are left out
    /// must not depend on the order in which they happen to come.
    pub fn is_full(&self) -> bool {
        self.word_bytes >= self.config.word_bytes
    }

    /// Learn the merges and build the tokenizer. `progress` is told the number of tokens now and then
    /// and answers whether to go on; `None` is returned when it says no.
    ///
    /// The vocabulary has exactly [`TokenizerConfig::rounded_vocab_size`] entries: special tokens, the
    /// 256 bytes, the merges in order, and, if the text was too small for so many merges, reserved
    /// special tokens at the end.
    pub fn finish(self, progress: impl FnMut(usize) -> bool) -> Result<Option<Tokenizer>> {
        let special = self.config.special_tokens.len();
        let size = self.config.rounded_vocab_size() as usize;
        let mut pieces = self.config.special_tokens.clone();
        // By character, as `tokenizers` numbers its alphabet.
        let mut alphabet: Vec<(char, u8)> = byte_characters().into_iter().zip(0..=255).collect();
        alphabet.sort_unstable();
        let mut ids = [0u32; 256];
        for (character, byte) in alphabet {
            ids[usize::from(byte)] = pieces.len() as u32;
            pieces.push(character.into());
        }
        let mut words: Vec<(Vec<u32>, u64)> =
            self.words.into_iter().map(|(word, n)| (word.iter().map(|&b| ids[usize::from(b)]).collect(), n)).collect();
        words.sort_unstable();
        let learnt = bpe::learn(pieces, special, words, size, self.config.min_frequency, progress);
        let Some(mut learnt) = learnt else {
            return Ok(None);
        };
        let names: Vec<(String, String)> = learnt
            .merges
            .iter()
            .map(|&(a, b)| (learnt.pieces[a as usize].clone(), learnt.pieces[b as usize].clone()))
            .collect();
        let mut special_tokens = self.config.special_tokens;
        // A text may have taught a piece of such a name.
        let taken: HashSet<String> =
            learnt.pieces.iter().filter(|piece| piece.starts_with(RESERVED)).cloned().collect();
        let reserved = (0..).map(|i| format!("{RESERVED}{i}|>")).filter(|name| !taken.contains(name));
        for name in reserved.take(size.saturating_sub(learnt.pieces.len())) {
            special_tokens.push(name.clone());
            learnt.pieces.push(name);
        }
        let vocabulary: Vocab = learnt.pieces.into_iter().zip(0..).collect();
        let model = BPE::builder().vocab_and_merges(vocabulary, names).build().map_err(Error::Tokenizers)?;
        let mut tokenizer = Tokenizer::new(model);
        tokenizer
            .with_pre_tokenizer(Some(pre_tokenizer(&self.config.pattern, self.config.digits)?))
            .with_decoder(Some(ByteLevel::new(false, false, true)));
        tokenizer
            .add_special_tokens(special_tokens.into_iter().map(|t| AddedToken::from(t, true)))
            .map_err(Error::Tokenizers)?;
        Ok(Some(tokenizer))
    }
}

/// The pre-tokenizer in the terms of `tokenizer.json`; cuts like [`Splitter`].
fn pre_tokenizer(pattern: &Pattern, digits: Digits) -> Result<PreTokenizerWrapper> {
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    if digits == Digits::Individual {
        steps.push(DigitsPreTokenizer::new(true).into());
    }
    if *pattern == Pattern::Gpt2 {
        steps.push(ByteLevel::new(false, false, true).into());
    } else {
        let regex = SplitPattern::Regex(pattern.regex().into());
        let split = Split::new(regex, SplitDelimiterBehavior::Isolated, false).map_err(Error::Tokenizers)?;
        steps.push(split.into());
        steps.push(ByteLevel::new(false, false, false).into());
    }
    Ok(match steps.len() {
        1 => steps.remove(0),
        _ => Sequence::new(steps).into(),
    })
}

/// The character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`):
/// printable Latin-1 stands for itself, the others for U+0100 and up.
pub(crate) fn byte_characters() -> [char; 256] {
    let mut next = 256u32;
    std::array::from_fn(|byte| {
        let printable = matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if printable {
            byte as u32
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).unwrap_or('\u{FFFD}')
    })
}
