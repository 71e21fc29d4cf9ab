//! The stage `train`: token shards in, a trained model out.
//!
//! The stage has one task. It keeps checkpoints and metrics of its own in the stage directory and
//! continues from the newest checkpoint after a stop or a crash; what it commits is the trained model
//! in the published layout, `RUN/train/model/`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use pipeline::digest::Digest;
use pipeline::{
    Error as StageError, PendingFile, Result as StageResult, RunContext, Stage, Task, TaskContext, TaskReport,
};
use serde_json::{Value, json};
use tokenize::loader::{DataConfig, Loader, LoaderConfig};
use tokenize::stages::{TOKEN_STATISTICS, TOKENIZER, TOKENS, TOKENS_VALIDATION};
use tokenize::{TokenStatistics, tokenizer_path};

use crate::config::TrainConfig;
use crate::device::DeviceChoice;
use crate::run::{BatchSource, METRICS, Metrics, Outcome, Run, train};
use crate::{Batch, Error, published};

/// Name of the stage.
pub const TRAIN: &str = "train";
/// Directory of the result, below the stage's.
pub const RESULT: &str = "model";

/// Trains a model on the token shards of a run.
pub struct TrainStage {
    config: TrainConfig,
    device: DeviceChoice,
}

impl TrainStage {
    /// A training run of `config` on `device`. The device is not part of the configuration: a run may
    /// move.
    ///
    /// # Errors
    /// [`Error::Config`] for settings that do not fit, as far as they can be told without a tokenizer.
    pub fn new(config: TrainConfig, device: DeviceChoice) -> Result<Self, Error> {
        let mut known = config.clone();
        if known.model.vocab_size == 0 {
            // The real size comes from the tokenizer; any large one lets the other keys be checked.
            known.model.vocab_size = 1 << 20;
        }
        known.validate()?;
        Ok(Self { config, device })
    }

    /// The training run itself, on a thread that may block.
    fn work(&self, task: &TaskContext) -> Result<TaskReport, StageError> {
        let run_dir = task.run.dir();
        let config = &self.config;
        let rows = config.batch * config.gradient_accumulation;
        let loader_config = LoaderConfig {
            sequence_length: config.sequence_length,
            rows,
            seed: config.seed,
            data: config.data.clone(),
            ..LoaderConfig::default()
        };
        let loader = Loader::open(&task.run.shards(TOKENS)?, loader_config.clone()).map_err(StageError::abort)?;
        let mut config = config.clone();
        let vocabulary = loader.vocabulary_size() as usize;
        if config.model.vocab_size == 0 {
            config.model.vocab_size = vocabulary;
        }
        if config.model.vocab_size < vocabulary {
            let reason = format!("{} is less than the tokenizer's {vocabulary} ids", config.model.vocab_size);
            return Err(StageError::abort(Error::config("model.vocab_size", reason)));
        }
        config.model.eos_token_id = loader.eos_id();
        let held_out = match config.evaluation.every_steps {
            0 => None,
            _ => {
                // All of the held-out documents, in their own proportion, whatever is trained on.
                let data = DataConfig::default();
                held_out(&task.run, &LoaderConfig { rows: config.evaluation.sequences, data, ..loader_config })?
            }
        };
        let device = self.device.select().map_err(StageError::abort)?;
        let tokenizer = tokenizer_path(run_dir);
        let run = Run {
            config: &config,
            device: &device,
            directory: task.stage_dir(),
            tokenizer: Some(&tokenizer),
            held_out: held_out.as_ref(),
            stop: &task.run.options().stop,
        };
        let mut on_step = |metrics: &Metrics| {
            let held_out = metrics.held_out_loss.map_or(String::new(), |l| format!(", held-out {l:.3}"));
            let message = format!("loss {:.3}{held_out}, {:.0} tokens/s", metrics.loss, metrics.tokens_per_s);
            task.progress(metrics.step, Some(config.steps), message);
        };
        let mut source = Shards { loader, step: 0 };
        let checkpoint = match train(&run, &mut source, &mut on_step).map_err(severity)? {
            Outcome::Finished(checkpoint) => checkpoint,
            Outcome::Stopped(_) => return Err(StageError::Interrupted),
        };
        let files = [published::MODEL, published::CONFIG, published::TOKENIZER]
            .iter()
            .map(|name| publish(task, &checkpoint.join(name), &Path::new(RESULT).join(name)))
            .collect::<StageResult<Vec<_>>>()?;
        let entropy = TokenStatistics::load(run_dir).map_err(StageError::abort)?.unigram_entropy;
        Ok(TaskReport { files, notes: notes(task.stage_dir(), entropy)?, ..TaskReport::default() })
    }
}

/// What the journal keeps of a finished run, with a line for people under `summary`. From the metrics
/// file alone, so that a run that was killed after its last checkpoint says the same.
fn notes(directory: &Path, unigram_entropy: f64) -> Result<Value, StageError> {
    /// The loss of one batch is noisy; the mean over the last lines is what is told.
    const LAST_LINES: usize = 5;
    let path = directory.join(METRICS);
    let text = fs::read_to_string(&path).map_err(|e| StageError::io(&path, e))?;
    let lines = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<Vec<Metrics>, _>>()
        .map_err(|e| StageError::Corrupt { path: path.clone(), reason: e.to_string() })?;
    let tail = &lines[lines.len().saturating_sub(LAST_LINES)..];
    let Some(last) = tail.last() else {
        return Err(StageError::Corrupt { path, reason: "has no line".into() });
    };
    let loss = tail.iter().map(|m| m.loss).sum::<f64>() / tail.len() as f64;
    let held_out = last.held_out_loss.map_or(String::new(), |l| format!(" (held-out {l:.3})"));
    Ok(json!({
        "steps": last.step,
        "tokens": last.tokens,
        "loss": loss,
        "held_out_loss": last.held_out_loss,
        "unigram_entropy": unigram_entropy,
        "summary": format!(
            "loss {loss:.3}{held_out} nats per token after {} tokens; the unigram entropy of the data is {unigram_entropy:.3}",
            last.tokens
        ),
    }))
}

/// The first rows of the held-out shards; fewer where there are not enough tokens for as many.
fn held_out(run: &RunContext, config: &LoaderConfig) -> StageResult<Option<Batch>> {
    let shards = run.shards(TOKENS_VALIDATION)?;
    if shards.iter().all(|shard| shard.rows == 0) {
        return Ok(None);
    }
    let mut loader = Loader::open(&shards, config.clone()).map_err(StageError::abort)?;
    let sequences = loader.tokens_per_epoch() / config.sequence_length as u64;
    let rows = config.rows.min(usize::try_from(sequences).unwrap_or(usize::MAX));
    if rows == 0 {
        return Ok(None);
    }
    if rows < config.rows {
        let config = LoaderConfig { rows, ..config.clone() };
        loader = Loader::open(&shards, config).map_err(StageError::abort)?;
    }
    loader.batch(0).map(|batch| Some(adapt(batch))).map_err(StageError::abort)
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
struct Shards {
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

/// A checkpoint's file as a file of the stage's result.
fn publish(task: &TaskContext, from: &Path, name: &PathBuf) -> StageResult<PendingFile> {
    let mut file = fs::File::open(from).map_err(|e| StageError::io(from, e))?;
    let mut writer = task.create_file(name)?;
    io::copy(&mut file, &mut writer).map_err(|e| StageError::io(from, e))?;
    writer.finish(0)
}

/// Trying again cannot mend any of them but a passing fault of the file system.
fn severity(error: Error) -> StageError {
    match error {
        Error::Io { path, source } => StageError::io(path, source),
        error => StageError::abort(error),
    }
}

#[async_trait]
impl Stage for TrainStage {
    fn name(&self) -> &str {
        TRAIN
    }

    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        [TOKENIZER, TOKENS, TOKENS_VALIDATION, TOKEN_STATISTICS].map(String::from).to_vec()
    }

    fn config(&self) -> StageResult<Value> {
        let mut config = serde_json::to_value(&self.config).map_err(StageError::abort)?;
        if let Some(keys) = config.as_object_mut() {
            // They change what is told and kept on the way, not the model.
            for key in ["log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "evaluation"] {
                keys.remove(key);
            }
        }
        Ok(config)
    }

    async fn tasks(&self, run: &RunContext) -> StageResult<Vec<Task>> {
        let shards: Vec<Digest> = run.shards(TOKENS)?.iter().map(|s| s.xxh3).collect();
        Ok(vec![Task { index: 0, inputs: json!({ "tokens": shards }) }])
    }

    async fn execute(&self, task: &TaskContext) -> StageResult<TaskReport> {
        // Blocks this worker thread; others go on with whatever they have.
        tokio::task::block_in_place(|| self.work(task))
    }

    fn stops_itself(&self) -> bool {
        true
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
