//! Text to token ids, token ids to shards, shards to batches.
//!
//! - [`train`]: byte-level BPE in the Hugging Face `tokenizer.json` format.
//! - [`encoder`]: the ids of the `tokenizers` crate, several times faster.
//! - [`stages`]: the stages of a run that make token shards in a globally shuffled order.
//! - [`loader`]: batches that depend on data set, seed and step alone.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod added;
mod bpe;
mod cache;
mod classes;
mod config;
pub mod counts;
pub mod encoder;
mod error;
pub mod functions;
pub mod inspect;
pub mod loader;
mod merges;
pub mod sample;
pub mod shard;
pub mod shuffle;
mod split;
pub mod stages;
pub mod train;
mod words;

pub use config::{Digits, Pattern, TokenizeConfig, TokenizerConfig, VOCABULARY_MULTIPLE};
pub use encoder::{Encoder, EncoderWorker};
pub use error::{Error, Result};
pub use stages::{TokenStatistics, token_stages, tokenizer_path};
