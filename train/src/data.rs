//! The batches of a run: token shards, wherever they lie, as the step loop takes them.

use pipeline::Shard;
use serde_json::Value;
use tokenize::TokenStatistics;
use tokenize::loader::{DataConfig, Loader, LoaderConfig, Location, Packing};

use crate::config::TrainConfig;
use crate::run::BatchSource;
use crate::{Batch, Error};

/// Where the shards of one stage lie.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// What the stage there has committed; it has to be done.
    At(Location),
    /// The same, where there is one.
    IfAt(Location),
    /// Nowhere.
    None,
}

impl Place {
    /// A loader of the shards; none where there are none, or no document in them.
    fn open(&self, config: LoaderConfig) -> Result<Option<Loader>, Error> {
        let fault = |error: tokenize::Error| Error::Data(error.to_string());
        let is_empty = |shards: &[Shard]| shards.iter().all(|shard| shard.rows == 0);
        let opened = match self {
            Self::IfAt(location) if is_missing(location) => return Ok(None),
            Self::At(location) | Self::IfAt(location) if is_empty(&location.shards().map_err(fault)?) => {
                return Ok(None);
            }
            Self::At(location) | Self::IfAt(location) => location.loader(config),
            Self::None => return Ok(None),
        };
        opened.map(Some).map_err(fault)
    }
}

/// Whether there is no stage: an answer that there is none, not a store that does not answer.
fn is_missing(location: &Location) -> bool {
    match location.manifest() {
        Err(tokenize::Error::Io { source, .. }) => source.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}

/// Where the shards of a run lie.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// What is trained on.
    pub(crate) training: Place,
    /// What is not.
    pub(crate) held_out: Place,
}

/// What a run gets from its shards.
pub(crate) struct Data {
    pub(crate) source: Shards,
    pub(crate) held_out: Option<Batch>,
    /// The settings with the vocabulary that the shards were made with.
    pub(crate) config: TrainConfig,
}

impl Data {
    /// Opens the shards for a run of `config`, for the rows of rank `rank` of `world`; the one that `leads` tells what packing
    /// costs.
    ///
    /// # Errors
    /// [`Error::Data`] for shards that cannot be read, [`Error::Config`] when the vocabulary does not fit.
    pub(crate) fn open(
        places: &Places,
        config: &TrainConfig,
        (rank, world): (usize, usize),
        leads: bool,
    ) -> Result<Self, Error> {
        let rows = config.batch * config.gradient_accumulation;
        if rows < world {
            let reason = format!("a step has {rows} rows for {world} ranks; each needs one");
            return Err(Error::config("gradient_accumulation", reason));
        }
        let mut config = config.clone();
        let loader_config = LoaderConfig {
            sequence_length: config.sequence_length,
            rows,
            seed: config.seed,
            data: config.data.clone(),
            buffers: config.loader,
            ..LoaderConfig::default()
        };
        let own = LoaderConfig { rank, world_size: world, ..loader_config.clone() };
        let loader = places.training.open(own)?;
        let loader = loader.ok_or_else(|| Error::Data("there are no token shards to train on".to_owned()))?;
        if leads && config.data.packing == Packing::BestFit {
            let report = loader.packing().map_err(|error| Error::Data(error.to_string()))?;
            tracing::info!("{report}");
        }
        let vocabulary = loader.vocabulary_size() as usize;
        if config.model.vocab_size == 0 {
            config.model.vocab_size = vocabulary;
        }
        if config.model.vocab_size < vocabulary {
            let reason = format!("{} is less than the tokenizer's {vocabulary} ids", config.model.vocab_size);
            return Err(Error::config("model.vocab_size", reason));
        }
        config.model.eos_token_id = loader.eos_id();
        // Shards of older versions do not know these two.
        config.model.bos_token_id = loader.bos_id().unwrap_or(config.model.bos_token_id);
        config.model.pad_token_id = loader.pad_id().unwrap_or(config.model.pad_token_id);
        let held_out = match config.evaluation.every_steps {
            0 => None,
            _ => {
                // All of the held-out documents, in their own proportion, whatever is trained on.
                let data = DataConfig::default();
                held_out(&places.held_out, &LoaderConfig { rows: config.evaluation.sequences, data, ..loader_config })?
            }
        };
        Ok(Self { source: Shards { loader, step: 0 }, held_out, config })
    }
}

/// Bytes of text of a token on the mean, over all training shards.
pub(crate) fn bytes_per_token(statistics: &TokenStatistics) -> Option<f64> {
    let all = statistics.train_counts()?.total();
    (all.tokens > 0).then(|| all.bytes as f64 / all.tokens as f64)
}

/// The first rows of the held-out shards; fewer where there are not enough tokens for as many.
fn held_out(place: &Place, config: &LoaderConfig) -> Result<Option<Batch>, Error> {
    // How many there are is told by a loader of one row.
    let one = LoaderConfig { rows: 1, ..config.clone() };
    let Some(mut loader) = place.open(one)? else { return Ok(None) };
    let sequences = loader.tokens_per_epoch() / config.sequence_length as u64;
    let rows = config.rows.min(usize::try_from(sequences).unwrap_or(usize::MAX));
    if rows == 0 {
        return Ok(None);
    }
    if rows > 1 {
        let Some(more) = place.open(LoaderConfig { rows, ..config.clone() })? else { return Ok(None) };
        loader = more;
    }
    loader.batch(0).map(|batch| Some(adapt(batch))).map_err(|error| Error::Data(error.to_string()))
}

/// A loader's batch as the trainer takes it.
fn adapt(batch: tokenize::loader::Batch) -> Batch {
    let length = batch.sequence_length;
    let mut starts = batch.document_starts;
    for (starts, filled) in starts.iter_mut().zip(batch.filled) {
        // Padding is documents of one token each, which nothing is predicted of.
        starts.extend((filled..=length as u32).filter(|&start| start > 0));
    }
    Batch { tokens: batch.tokens, starts, length }
}

/// The loader, seen by the step loop.
pub(crate) struct Shards {
    loader: Loader,
    step: u64,
}

impl BatchSource for Shards {
    fn batch(&mut self, step: u64) -> Result<Batch, Error> {
        let batch = self.loader.batch(step).map_err(|e| Error::Batch { step, reason: e.to_string() })?;
        self.step = step + 1;
        Ok(adapt(batch))
    }

    fn state(&self) -> Value {
        self.loader.state(self.step)
    }

    fn resume(&mut self, state: &Value, step: u64) -> Result<(), Error> {
        let fault = |reason| Error::Batch { step, reason };
        self.step = self.loader.resume(state).map_err(|e| fault(e.to_string()))?;
        if self.step == step { Ok(()) } else { Err(fault(format!("the loader's state is of step {}", self.step))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cross_entropy::IGNORE;

    #[test]
    fn padding_and_first_tokens_are_no_targets() {
        let batch = tokenize::loader::Batch {
            step: 0,
            rows: 3,
            sequence_length: 5,
            tokens: (10..28).collect(),
            document_starts: vec![vec![0, 2], vec![0, 5], vec![0]],
            filled: vec![4, 6, 1],
        };
        let masks: Vec<Vec<bool>> = (0..3).map(|row| batch.loss_mask(row)).collect();
        let rows = adapt(batch).split(3).unwrap().remove(0);
        let counted: Vec<bool> = rows.targets.iter().map(|&target| target != IGNORE).collect();
        assert_eq!(counted, masks.concat());
        assert_eq!(counted.iter().filter(|counts| **counts).count(), 2 + 4);
    }
}
