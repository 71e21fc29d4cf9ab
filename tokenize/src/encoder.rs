//! Text to token ids and back, with a `tokenizer.json`.

use std::path::{Path, PathBuf};

use pipeline::digest::Digest;
use tokenizers::{ModelWrapper, PaddingParams, Tokenizer};

use crate::error::{Error, Result};
use crate::words::{Scratch, Words};

/// Encodes text exactly as the `tokenizers` crate does with the same file, without adding special
/// tokens.
///
/// Text that spells a special token ("<|endoftext|>" in a web page) is encoded as ordinary text
/// (`encode_special_tokens` of `tokenizers`), so that no document can forge a boundary.
pub struct Encoder {
    tokenizer: Tokenizer,
    /// For the kinds of tokenizers that are done here, several times faster; or why this one is not.
    words: Result<Words, &'static str>,
    path: PathBuf,
    digest: Digest,
    vocabulary_size: u32,
    /// Ids of tokens beside the model's, in order.
    added: Vec<u32>,
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
        let words = Words::of(&tokenizer, bytes);
        let mut added: Vec<u32> = tokenizer.get_added_tokens_decoder().into_keys().collect();
        added.sort_unstable();
        Ok(Self { tokenizer, words, path: path.into(), digest: Digest::of(bytes), vocabulary_size: largest + 1, added })
    }

    /// Append the ids of `text` to `ids`.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        self.worker().encode(text, ids)
    }

    /// This encoder in the hands of one thread, for many texts.
    pub fn worker(&self) -> EncoderWorker<'_> {
        EncoderWorker { encoder: self, scratch: self.words.as_ref().ok().map(Words::take_scratch) }
    }

    /// The text of `ids`, special tokens included. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, false).map_err(Error::Tokenizers)
    }

    /// The id of a token by name.
    pub fn token_id(&self, token: &str) -> Result<u32> {
        /// Names in a suggestion: some files have hundreds.
        const SUGGESTED: usize = 8;
        self.tokenizer.token_to_id(token).ok_or_else(|| {
            let tokens = self.tokenizer.get_added_tokens_decoder();
            let special = self.added.iter().filter_map(|id| tokens.get(id)).filter(|token| token.special);
            let names: Vec<&str> = special.map(|token| token.content.as_str()).take(SUGGESTED).collect();
            let suggestion = match names.is_empty() {
                true => "it has no special tokens".into(),
                false => format!("special tokens that it has: {}", names.join(", ")),
            };
            Error::Tokenizer { path: self.path.clone(), reason: format!("it has no token {token:?}; {suggestion}") }
        })
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

    /// The bytes of text that a token stands for; of an added token its name. `None` if there is no such
    /// token.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.tokenizer.id_to_token(id)?;
        let added = self.added.binary_search(&id).is_ok();
        match &self.words {
            Ok(words) if !added => Some(words.bytes_of(&token)),
            _ => Some(token.into_bytes()),
        }
    }

    /// Whether texts are encoded here; otherwise the file asks for something that is left to the `tokenizers`
    /// crate, at its speed.
    pub fn is_fast(&self) -> bool {
        self.words.is_ok()
    }

    /// What the file asks for that is left to the `tokenizers` crate, if anything.
    pub fn slow_because(&self) -> Option<&'static str> {
        self.words.as_ref().err().copied()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
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

/// An encoder in the hands of one thread: its cache is taken once, not for every text, so that threads with short texts
/// do not wait for each other.
pub struct EncoderWorker<'e> {
    encoder: &'e Encoder,
    /// None where texts are left to `tokenizers`.
    scratch: Option<Scratch>,
}

impl EncoderWorker<'_> {
    /// Append the ids of `text` to `ids`, as [`Encoder::encode`] does.
    pub fn encode(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        match (&self.encoder.words, &mut self.scratch) {
            (Ok(words), Some(scratch)) => words.encode(text, scratch, ids),
            _ => {
                let encoding = self.encoder.tokenizer.encode_fast(text, false).map_err(Error::Tokenizers)?;
                ids.extend_from_slice(encoding.get_ids());
            }
        }
        Ok(())
    }
}

impl Drop for EncoderWorker<'_> {
    fn drop(&mut self) {
        if let (Ok(words), Some(scratch)) = (&self.encoder.words, self.scratch.take()) {
            words.keep_scratch(scratch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Digits, Pattern, TokenizerConfig};
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
                assert!(encoder(&json).is_fast());
            }
        }
        let plain = tokenizer(config);
        let changed = |change: fn(&mut serde_json::Value)| {
            let mut json = plain.clone();
            change(&mut json);
            encoder(&json)
        };
        assert!(changed(|_| ()).is_fast());
        assert!(changed(|json| json["normalizer"] = serde_json::json!({"type": "NFC"})).is_fast());
        assert!(changed(|json| json["normalizer"] = serde_json::json!({"type": "NFKC"})).slow_because().is_some());
        assert!(changed(|json| json["pre_tokenizer"]["add_prefix_space"] = true.into()).slow_because().is_some());
        assert!(changed(|json| json["added_tokens"][1]["special"] = false.into()).is_fast());
        let stripping = |json: &mut serde_json::Value| {
            json["added_tokens"][1]["special"] = false.into();
            json["added_tokens"][1]["rstrip"] = true.into();
        };
        assert!(changed(stripping).slow_because().is_some());
        assert!(
            changed(|json| json["pre_tokenizer"] = serde_json::json!({"type": "Whitespace"})).slow_because().is_some()
        );
        // The long way gives what `tokenizers` gives: the prefix space here.
        let mut ids = [Vec::new(), Vec::new()];
        changed(|json| json["pre_tokenizer"]["add_prefix_space"] = true.into()).encode("a", &mut ids[0]).unwrap();
        encoder(&plain).encode(" a", &mut ids[1]).unwrap();
        assert_eq!(ids[0], ids[1]);
    }
}
