//! The stages of this crate: `tokenizer` → `encoded` → `tokens`, `tokens_validation` →
//! `token_statistics`.
//!
//! The global shuffle takes two passes of bounded memory. `encoded` tokenizes each curated shard and
//! sorts it by source and shuffle key; `tokens` gathers one range of keys of one source from all of them
//! into each of its shards. Both sorts spill to disk when they must. Sources have shards of their own, so
//! that a loader can mix them in any proportion without reading what it leaves out.

mod encoded;
mod statistics;
mod tokenizer;
mod tokens;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pipeline::{Result, RunContext, Stage};

pub use statistics::TokenStatistics;

use crate::config::{TokenizeConfig, TokenizerConfig};
use crate::encoder::Encoder;
use crate::shard::ShardMetadata;
use crate::shuffle::Split;

/// Name of the stage that trains or copies the tokenizer.
pub const TOKENIZER: &str = "tokenizer";
/// Name of the stage that encodes each curated shard.
pub const ENCODED: &str = "encoded";
/// Name of the stage of training shards.
pub const TOKENS: &str = "tokens";
/// Name of the stage of held-out shards.
pub const TOKENS_VALIDATION: &str = "tokens_validation";
/// Name of the stage that sums up token counts.
pub const TOKEN_STATISTICS: &str = "token_statistics";

/// The stages from the document shards of stage `documents` to token shards, in order.
///
/// `seed` is the seed of the run: it decides the tokenizer's sample and the order of the documents, not
/// the held-out split.
pub fn token_stages(config: &TokenizeConfig, documents: &str, seed: u64) -> Vec<Arc<dyn Stage>> {
    let tokens = |name, split| Arc::new(tokens::Tokens { name, split, config: config.clone(), seed }) as Arc<dyn Stage>;
    vec![
        Arc::new(tokenizer::TrainTokenizer::new(config.clone(), documents.into(), seed)),
        Arc::new(encoded::Encode::new(config.clone(), documents.into(), seed)),
        tokens(TOKENS, Split::Train),
        tokens(TOKENS_VALIDATION, Split::Validation),
        Arc::new(statistics::Statistics),
    ]
}

/// The tokenizer of a run, with its caches, which the tasks of a stage share.
fn shared_encoder(run: &RunContext) -> Result<Arc<Encoder>> {
    run.shared(TOKENIZER, || Ok(Encoder::load(tokenizer_path(run.dir()))?))
}

/// What the footer of a token shard says before there are rows in it; `source` as there.
fn shard_metadata(
    encoder: &Encoder,
    config: &TokenizerConfig,
    seed: u64,
    source: Option<String>,
) -> Result<ShardMetadata> {
    Ok(ShardMetadata {
        tokenizer: encoder.digest(),
        vocabulary_size: encoder.vocabulary_size(),
        eos_id: encoder.token_id(&config.eos_token)?,
        // A file that somebody else made need not have these.
        bos_id: encoder.token_id(&config.bos_token).ok(),
        pad_id: encoder.token_id(&config.pad_token).ok(),
        seed,
        source,
        documents: 0,
        tokens: 0,
        row_groups: Vec::new(),
    })
}

/// There is nothing to tokenize: better said here than by whoever divides by zero later.
fn refuse_empty(run: &RunContext, documents: &str) -> Result<()> {
    let shards = run.shards(documents)?;
    if shards.iter().any(|shard| shard.rows > 0) {
        return Ok(());
    }
    let dir = run.dir().display();
    Err(pipeline::Error::abort(format!(
        "no document is left to tokenize: stage {documents} kept none; `fulgurite report {dir}` says which rule removed \
         them"
    )))
}

/// The `tokenizer.json` of a run.
pub fn tokenizer_path(run_dir: &Path) -> PathBuf {
    run_dir.join(TOKENIZER).join(tokenizer::FILE)
}
