//! Text to token ids and back, with a `tokenizer.json`.

use std::path::{Path, PathBuf};

use pipeline::digest::Digest;
use tokenizers::{ModelWrapper, PaddingParams, Tokenizer};

use crate::error::{Error, Result};

/// Encodes text exactly as the `tokenizers` crate does with the same file, without adding special
/// tokens.
///
/// Text that spells a special token ("<|endoftext|>" in a web page) is encoded as ordinary text
/// (`encode_special_tokens` of `tokenizers`), so that no document can forge a boundary.
pub struct Encoder {
    tokenizer: Tokenizer,
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
        Ok(Self { tokenizer, path: path.into(), digest: Digest::of(bytes), vocabulary_size: largest + 1 })
    }

    /// Append the ids of `text` to `ids`.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(Error::Tokenizers)?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
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
