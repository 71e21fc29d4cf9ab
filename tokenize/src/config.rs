//! The `tokenize` part of a recipe.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Vocabulary sizes are rounded up to a multiple of this, so that the embedding and the output layer
/// have shapes that matrix units like.
pub const VOCABULARY_MULTIPLE: u32 = 128;

/// Everything from curated documents to token shards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizeConfig {
    /// The tokenizer: trained, or taken from a file.
    pub tokenizer: TokenizerConfig,
    /// Fraction of documents, chosen by hash of their text, that goes to `tokens_validation` and is
    /// never trained on.
    pub validation_fraction: f64,
    /// Put the BOS token in front of every document. EOS is always put behind it.
    pub add_bos: bool,
    /// Tokens in one training shard, about: the number of shards is the training tokens over this.
    pub shard_tokens: u64,
}

impl Default for TokenizeConfig {
    fn default() -> Self {
        Self {
            tokenizer: TokenizerConfig::default(),
            validation_fraction: 0.005,
            add_bos: false,
            shard_tokens: 64 << 20,
        }
    }
}

impl TokenizeConfig {
    /// Refuse values that cannot work.
    pub fn validate(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.validation_fraction) {
            return Err(Error::config(
                "validation_fraction",
                format!("is {}; it must be at least 0 and below 1", self.validation_fraction),
            ));
        }
        if self.shard_tokens == 0 {
            return Err(Error::config("shard_tokens", "must be above 0"));
        }
        self.tokenizer.validate()
    }
}

/// A byte-level BPE tokenizer in the Hugging Face `tokenizer.json` format.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerConfig {
    /// An existing `tokenizer.json`, used as it is; the keys about training then say nothing.
    pub path: Option<PathBuf>,
    /// Entries of the vocabulary, special tokens included; rounded up to a multiple of
    /// [`VOCABULARY_MULTIPLE`].
    pub vocab_size: u32,
    /// Special tokens; they get the first ids, in this order.
    pub special_tokens: Vec<String>,
    /// The special token for padding. Its id is told to the model and to whoever reads the shards; sequences made here
    /// are padded with EOS, which is no target there.
    pub pad_token: String,
    /// The special token that may begin a document.
    pub bos_token: String,
    /// The special token that ends every document.
    pub eos_token: String,
    /// How text is split before merges are learnt and applied.
    pub pattern: Pattern,
    /// How numbers are split.
    pub digits: Digits,
    /// Bytes of text to train on, about: documents are sampled by hash of their id. So much text is held in
    /// memory.
    pub sample_bytes: u64,
    /// Bytes of words that differ to learn from, at most, about: where the sample has more, what is left of it when they
    /// are reached is not looked at. Learning takes some 30 bytes of memory for each of them, 50 where letters stand at
    /// random. English has 5 MB of such words in 120 MB of text, Japanese and Chinese, which have no spaces, nearly as
    /// many as text.
    pub word_bytes: u64,
    /// A pair seen less often than this is never merged.
    pub min_frequency: u64,
    /// Share of each source in the sample, in any unit; a source that is not named is left out. Without it
    /// every document is as likely.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub source_weights: BTreeMap<String, f64>,
}

impl Default for TokenizerConfig {
    fn default() -> Self {
        Self {
            path: None,
            vocab_size: 32_000,
            special_tokens: vec!["<|pad|>".into(), "<|bos|>".into(), "<|endoftext|>".into()],
            pad_token: "<|pad|>".into(),
            bos_token: "<|bos|>".into(),
            eos_token: "<|endoftext|>".into(),
            pattern: Pattern::Gpt2,
            digits: Digits::Pattern,
            sample_bytes: 256 << 20,
            word_bytes: 64 << 20,
            source_weights: BTreeMap::new(),
            min_frequency: 2,
        }
    }
}

impl TokenizerConfig {
    /// The size of a trained vocabulary.
    pub fn rounded_vocab_size(&self) -> u32 {
        self.vocab_size.next_multiple_of(VOCABULARY_MULTIPLE)
    }

    /// Refuse values that cannot work.
    pub fn validate(&self) -> Result<()> {
        if self.path.is_some() {
            return Ok(());
        }
        let least = 256 + self.special_tokens.len() as u32;
        if self.vocab_size < least || self.vocab_size > 1 << 24 {
            return Err(Error::config(
                "tokenizer.vocab_size",
                format!(
                    "is {}; it must be at least {least} (every byte and the special tokens) and at most {}",
                    self.vocab_size,
                    1 << 24
                ),
            ));
        }
        for (role, token) in
            [("pad_token", &self.pad_token), ("bos_token", &self.bos_token), ("eos_token", &self.eos_token)]
        {
            if !self.special_tokens.contains(token) {
                let reason = format!("{token:?} is not among special_tokens");
                return Err(Error::config(&format!("tokenizer.{role}"), reason));
            }
        }
        let mut sorted = self.special_tokens.clone();
        sorted.sort();
        sorted.dedup();
        if sorted.len() != self.special_tokens.len() || sorted.iter().any(|t| t.chars().count() < 2) {
            return Err(Error::config("tokenizer.special_tokens", "must differ and have two characters or more"));
        }
        let weights = self.source_weights.values();
        if weights.clone().any(|weight| !(0.0..=1e9).contains(weight))
            || !self.source_weights.is_empty() && weights.sum::<f64>() <= 0.0
        {
            return Err(Error::config("tokenizer.source_weights", "must be from 0 to 1e9, and one above 0"));
        }
        if self.sample_bytes == 0 {
            return Err(Error::config("tokenizer.sample_bytes", "must be above 0: the tokenizer is trained on them"));
        }
        if self.word_bytes == 0 {
            return Err(Error::config("tokenizer.word_bytes", "must be above 0: the tokenizer learns from them"));
        }
        self.pattern.check()
    }
}

/// The pattern that cuts text into pieces; merges never cross their borders.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// GPT-2's (Radford et al. 2019, `encoder.py`).
    Gpt2,
    /// That of OpenAI's `cl100k_base`, in the form of Llama 3's `tokenizer.json`.
    Cl100k,
    /// That of OpenAI's `o200k_base`.
    O200k,
    /// A regular expression in the syntax of the `fancy-regex` crate; what it does not match is kept
    /// as pieces of its own.
    Regex(String),
}

impl Pattern {
    /// The regular expression.
    pub fn regex(&self) -> &str {
        match self {
            Self::Gpt2 => r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
            Self::Cl100k => {
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            }
            Self::O200k => concat!(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
                r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            Self::Regex(regex) => regex,
        }
    }

    fn check(&self) -> Result<()> {
        tokenizers::utils::SysRegex::new(self.regex()).map(drop).map_err(|e| {
            Error::config("tokenizer.pattern", format!("{:?} is not a regular expression: {e}", self.regex()))
        })
    }
}

/// How numbers are split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Digits {
    /// As the pattern says.
    Pattern,
    /// Every digit is a piece of its own, before the pattern is applied.
    Individual,
}
