//! Text to token ids and back, with a `tokenizer.json`.

use std::path::{Path, PathBuf};

use pipeline::digest::Digest;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{Model, ModelWrapper, PaddingParams, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use crate::config::Pattern;
use crate::error::{Error, Result};
use crate::split::Splitter;
use crate::train::byte_characters;

/// Encodes text exactly as the `tokenizers` crate does with the same file, without adding special
/// tokens.
///
/// Text that spells a special token ("<|endoftext|>" in a web page) is encoded as ordinary text
/// (`encode_special_tokens` of `tokenizers`), so that no document can forge a boundary.
pub struct Encoder {
    tokenizer: Tokenizer,
    /// For the tokenizers that we train and those like them.
    byte_level: Option<ByteLevelSplit>,
    path: PathBuf,
    digest: Digest,
    vocabulary_size: u32,
}

impl Encoder {
    /// Load a `tokenizer.json`. Fails on a file that is none and on BPE dropout, with which the same
    /// text has many encodings.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        Self::from_bytes(&bytes, path)
    }

    /// As [`Self::load`], with the contents of `path` given.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        let fault = |reason: String| Error::Tokenizer { path: path.into(), reason };
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|e| fault(e.to_string()))?;
        if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
            && bpe.dropout.is_some_and(|p| p > 0.0)
        {
            return Err(fault("it has BPE dropout; remove it, or the same text has many encodings".into()));
        }
        tokenizer.with_truncation(None).map_err(Error::Tokenizers)?;
        tokenizer.with_padding(None::<PaddingParams>);
        tokenizer.set_encode_special_tokens(true);
        let largest = tokenizer.get_vocab(true).into_values().max();
        let largest = largest.ok_or_else(|| fault("its vocabulary is empty".into()))?;
        let byte_level = ByteLevelSplit::of(&tokenizer);
        Ok(Self { tokenizer, byte_level, path: path.into(), digest: Digest::of(bytes), vocabulary_size: largest + 1 })
    }

    /// Append the ids of `text` to `ids`.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        let Some(byte_level) = &self.byte_level else {
            let encoding = self.tokenizer.encode_fast(text, false).map_err(Error::Tokenizers)?;
            ids.extend_from_slice(encoding.get_ids());
            return Ok(());
        };
        let model = self.tokenizer.get_model();
        let (mut word, mut result) = (String::new(), Ok(()));
        byte_level.splitter.for_each(text, |piece| {
            word.clear();
            word.extend(piece.bytes().map(|byte| byte_level.characters[usize::from(byte)]));
            match model.tokenize(&word) {
                Ok(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                Err(error) => result = Err(Error::Tokenizers(error)),
            }
        });
        result
    }

    /// The text of `ids`, special tokens included. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, false).map_err(Error::Tokenizers)
    }

    /// The id of a token by name.
    pub fn token_id(&self, token: &str) -> Result<u32> {
        self.tokenizer
            .token_to_id(token)
            .ok_or_else(|| Error::Tokenizer { path: self.path.clone(), reason: format!("it has no token {token:?}") })
    }

    /// Ids that stand for no text: special tokens, and, below `size`, ids that no token has. A model whose
    /// vocabulary is that large may give them a probability, but a text cannot contain them.
    pub fn ids_without_text(&self, size: u32) -> Vec<u32> {
        let special = self.tokenizer.get_added_tokens_decoder();
        let textless = |id: &u32| match special.get(id) {
            Some(token) => token.special,
            None => self.tokenizer.id_to_token(*id).is_none(),
        };
        (0..size).filter(textless).collect()
    }

    /// One more than the largest id.
    pub fn vocabulary_size(&self) -> u32 {
        self.vocabulary_size
    }

    /// XXH3 of the file.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The tokenizer itself, for streaming decoders and the like.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

/// The way from text to words of a byte-level BPE tokenizer without a normalizer.
///
/// `tokenizers` keeps, for every character of the text, where it came from, at some fifty bytes for a
/// byte of text. Nobody here asks for that, so the pieces are cut from the text itself, and the model of
/// `tokenizers` encodes them one by one.
struct ByteLevelSplit {
    splitter: Splitter,
    characters: [char; 256],
}

impl ByteLevelSplit {
    /// `None` if the tokenizer does anything that this way would leave out.
    fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
        let characters = byte_characters();
        let complete = characters.iter().all(|c| model.token_to_id(c.encode_utf8(&mut [0; 4])).is_some());
        // Special tokens in the text are text to us; other added tokens are not.
        let special = tokenizer.get_added_tokens_decoder().values().all(|token| token.special);
        let plain = |model: &BPE| model.continuing_subword_prefix.is_none() && model.end_of_word_suffix.is_none();
        if tokenizer.get_normalizer().is_some() || !complete || !special || !plain(model) {
            return None;
        }
        let steps = match tokenizer.get_pre_tokenizer()? {
            PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref(),
            single => std::slice::from_ref(single),
        };
        let (individual_digits, steps) = match steps {
            [PreTokenizerWrapper::Digits(Digits { individual_digits: true, .. }), rest @ ..] => (true, rest),
            all => (false, all),
        };
        let regex = match steps {
            [PreTokenizerWrapper::ByteLevel(ByteLevel { add_prefix_space: false, use_regex: true, .. })] => {
                Pattern::Gpt2.regex()
            }
            [
                PreTokenizerWrapper::Split(Split {
                    pattern: SplitPattern::Regex(regex),
                    behavior: SplitDelimiterBehavior::Isolated,
                    invert: false,
                    ..
                }),
                PreTokenizerWrapper::ByteLevel(ByteLevel { add_prefix_space: false, use_regex: false, .. }),
            ] => regex,
            _ => return None,
        };
        Some(Self { splitter: Splitter::from_regex(regex, individual_digits).ok()?, characters })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Digits, TokenizerConfig};
    use crate::train::Trainer;

    fn tokenizer(config: TokenizerConfig) -> serde_json::Value {
        let trainer = Trainer::new(&config).unwrap();
        let json = trainer.finish(|_| true).unwrap().unwrap().to_string(false).unwrap();
        serde_json::from_str(&json).unwrap()
    }

    fn encoder(json: &serde_json::Value) -> Encoder {
        Encoder::from_bytes(json.to_string().as_bytes(), Path::new("tokenizer.json")).unwrap()
    }

    #[test]
    fn the_short_way_is_taken_by_what_we_train_and_by_nothing_that_does_more() {
        let config = TokenizerConfig { vocab_size: 300, ..TokenizerConfig::default() };
        for pattern in [Pattern::Gpt2, Pattern::Cl100k, Pattern::O200k, Pattern::Regex(".".into())] {
            for digits in [Digits::Pattern, Digits::Individual] {
                let json = tokenizer(TokenizerConfig { pattern: pattern.clone(), digits, ..config.clone() });
                assert!(encoder(&json).byte_level.is_some());
            }
        }
        let plain = tokenizer(config);
        let changed = |change: fn(&mut serde_json::Value)| {
            let mut json = plain.clone();
            change(&mut json);
            encoder(&json)
        };
        assert!(changed(|_| ()).byte_level.is_some());
        assert!(changed(|json| json["normalizer"] = serde_json::json!({"type": "NFC"})).byte_level.is_none());
        assert!(changed(|json| json["pre_tokenizer"]["add_prefix_space"] = true.into()).byte_level.is_none());
        assert!(changed(|json| json["added_tokens"][1]["special"] = false.into()).byte_level.is_none());
        assert!(changed(|json| json["pre_tokenizer"] = serde_json::json!({"type": "Whitespace"})).byte_level.is_none());
        // The long way gives what `tokenizers` gives: the prefix space here.
        let mut ids = [Vec::new(), Vec::new()];
        changed(|json| json["pre_tokenizer"]["add_prefix_space"] = true.into()).encode("a", &mut ids[0]).unwrap();
        encoder(&plain).encode(" a", &mut ids[1]).unwrap();
        assert_eq!(ids[0], ids[1]);
    }
}
