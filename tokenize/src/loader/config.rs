//! Settings of a loader.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How token shards become batches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoaderConfig {
    /// Inputs of a sequence, T: a row has one token more.
    pub sequence_length: usize,
    /// Rows of the global batch, over all ranks.
    pub rows: usize,
    /// Seed of the order of epochs and windows.
    pub seed: u64,
    /// What is in a sequence.
    pub data: DataConfig,
    /// What is held in memory.
    pub buffers: BufferConfig,
    /// Which rows this loader gives: from number `rows * rank / world_size` on, up to those of the next rank.
    pub rank: usize,
    /// Number of loaders that share the global batch.
    pub world_size: usize,
}

impl Default for LoaderConfig {
    fn default() -> Self {
        Self {
            sequence_length: 2048,
            rows: 8,
            seed: 0,
            data: DataConfig::default(),
            buffers: BufferConfig::default(),
            rank: 0,
            world_size: 1,
        }
    }
}

/// What a loader holds beside its windows: a table of a recipe. How long a batch is waited for depends on it; no batch
/// does, and no state of a loader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BufferConfig {
    /// Batches that are made ahead of the training thread, 1 to 1,024. When all of them are there, the thread that makes
    /// them waits.
    pub prefetch_batches: usize,
    /// Bytes of shards in an object store that are kept in memory, at most; half of them may be on their way. Local
    /// files are read past it.
    pub cache_bytes: usize,
}

impl Default for BufferConfig {
    fn default() -> Self {
        Self { prefetch_batches: 4, cache_bytes: 256 << 20 }
    }
}

impl BufferConfig {
    /// Refuse values that cannot work.
    pub fn validate(&self) -> Result<()> {
        const MOST: usize = 1024;
        match self.prefetch_batches {
            1..=MOST => Ok(()),
            n => Err(Error::Loader(format!("prefetch_batches is {n}; it must be from 1 to {MOST}"))),
        }
    }
}

/// The part of the settings that says what sequences are made of: a table of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// How documents are put into sequences.
    pub packing: Packing,
    /// With `best_fit`, the share of positions that is left free: the more room, the fewer documents are cut.
    pub padding: f64,
    /// Sequences are shuffled within windows of about this many tokens over all sources, but not more than
    /// an epoch of a source. A loader holds these windows in memory (4 bytes a token).
    pub shuffle_window_tokens: usize,
    /// Share of each source in the sequences, in any unit; a source that is not named is left out. Sources
    /// then go through their epochs each at its own pace.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub weights: BTreeMap<String, f64>,
    /// Instead of weights: how often each source is gone through while one that is not named is gone
    /// through once.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub epochs: BTreeMap<String, f64>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            packing: Packing::Concatenate,
            padding: 0.005,
            shuffle_window_tokens: 4 << 20,
            weights: BTreeMap::new(),
            epochs: BTreeMap::new(),
        }
    }
}

/// How documents are put into sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// One after the other, cut where a sequence ends: no padding.
    Concatenate,
    /// Whole where they fit: hardly a document is cut that is no longer than a sequence, for some padding.
    BestFit,
}

impl LoaderConfig {
    /// Refuse values that cannot work.
    pub fn validate(&self) -> Result<()> {
        let fault = |what: &str| Err(Error::Loader(what.into()));
        match self {
            Self { sequence_length: 0, .. } => fault("sequence_length must be above 0"),
            Self { sequence_length, .. } if *sequence_length > 1 << 30 => fault("sequence_length must be below 2^30"),
            Self { rows: 0, .. } => fault("a batch must have a row"),
            Self { rank, world_size, .. } if rank >= world_size => fault("rank must be below world_size"),
            Self { rows, world_size, .. } if rows < world_size => fault("a batch must have a row for every rank"),
            _ => self.buffers.validate().and_then(|()| self.data.validate()),
        }
    }
}

impl DataConfig {
    /// Refuse values that cannot work.
    pub fn validate(&self) -> Result<()> {
        if !(0.0..0.9).contains(&self.padding) {
            return Err(Error::Loader(format!("padding is {}; it must be at least 0 and below 0.9", self.padding)));
        }
        if !self.weights.is_empty() && !self.epochs.is_empty() {
            return Err(Error::Loader("give weights or epochs of sources, not both".into()));
        }
        for (name, &value) in self.weights.iter().chain(&self.epochs) {
            if !(0.0..=1e9).contains(&value) {
                return Err(Error::Loader(format!(
                    "the share of source {name:?} is {value}; it must be from 0 to 1e9"
                )));
            }
        }
        Ok(())
    }

    /// The share of each source of the tokens that are loaded, given its name and number of tokens.
    pub(super) fn shares(&self, sources: &[(&str, u64)]) -> Result<Vec<f64>> {
        for name in self.weights.keys().chain(self.epochs.keys()) {
            if !sources.iter().any(|(known, _)| known == name) {
                return Err(Error::Loader(Error::unknown_source(name, sources.iter().map(|(name, _)| *name))));
            }
        }
        let share = |&(name, tokens): &(&str, u64)| match self.weights.is_empty() {
            true => self.epochs.get(name).copied().unwrap_or(1.0) * tokens as f64,
            false => self.weights.get(name).copied().unwrap_or(0.0),
        };
        let shares: Vec<f64> = sources.iter().map(share).collect();
        let total: f64 = shares.iter().sum();
        if total <= 0.0 {
            return Err(Error::Loader("no source has a share above 0".into()));
        }
        Ok(shares.into_iter().map(|share| share / total).collect())
    }
}
