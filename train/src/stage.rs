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
use tokenize::loader::Location;
use tokenize::stages::{TOKEN_STATISTICS, TOKENIZER, TOKENS, TOKENS_VALIDATION};
use tokenize::{TokenStatistics, tokenizer_path};

use crate::config::TrainConfig;
use crate::data::{Data, Place, Places, bytes_per_token};
use crate::device::DeviceChoice;
use crate::parallel::Alone;
use crate::run::{METRICS, Metrics, Outcome, Run, train};
use crate::{Error, published};

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
        let places = Places {
            training: Place::At(Location::Directory(task.run.stage_dir(TOKENS))),
            held_out: Place::At(Location::Directory(task.run.stage_dir(TOKENS_VALIDATION))),
        };
        let Data { mut source, held_out, config } =
            Data::open(&places, &self.config, (0, 1), true).map_err(severity)?;
        let statistics = TokenStatistics::load(run_dir).map_err(StageError::abort)?;
        let device = self.device.select().map_err(StageError::abort)?;
        let tokenizer = tokenizer_path(run_dir);
        let run = Run {
            config: &config,
            device: &device,
            group: &Alone::shared(),
            directory: task.stage_dir(),
            tokenizer: Some(&tokenizer),
            held_out: held_out.as_ref(),
            bytes_per_token: bytes_per_token(&statistics),
            profile_steps: 0,
            stop: &task.run.options().stop,
        };
        let mut on_step = |metrics: &Metrics| {
            let held_out = metrics.held_out_loss.map_or(String::new(), |l| format!(", held-out {l:.3}"));
            let message = format!("loss {:.3}{held_out}, {:.0} tokens/s", metrics.loss, metrics.tokens_per_s);
            task.progress(metrics.step, Some(config.steps), message);
        };
        let checkpoint = match train(&run, &mut source, &mut on_step).map_err(severity)? {
            Outcome::Finished(checkpoint) => checkpoint,
            Outcome::Stopped(_) => return Err(StageError::Interrupted),
        };
        let files = [published::MODEL, published::CONFIG, published::TOKENIZER]
            .iter()
            .map(|name| publish(task, &checkpoint.join(name), &Path::new(RESULT).join(name)))
            .collect::<StageResult<Vec<_>>>()?;
        Ok(TaskReport { files, notes: notes(task.stage_dir(), statistics.unigram_entropy)?, ..TaskReport::default() })
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
        Error::Config { key, reason } => StageError::setting(format!("train.{key}"), reason),
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
            // They change what is told, kept and held on the way, not the model.
            for key in [
                "log_every_steps",
                "checkpoint_every_steps",
                "keep_checkpoints",
                "keep_checkpoint_every_steps",
                "max_skipped_steps",
                "activation_checkpointing",
                "sharding",
                "hybrid",
                "sequence_ranks",
                "tensor_ranks",
                "evaluation",
                "loader",
            ] {
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

    #[test]
    fn what_the_loader_holds_in_memory_makes_no_other_model() {
        let keys = |text: &str| {
            let config: TrainConfig = toml::from_str(text).unwrap();
            TrainStage::new(config, DeviceChoice::Cpu).unwrap().config().unwrap()
        };
        let usual = keys("");
        assert_eq!(keys("[loader]\nprefetch_batches = 9\ncache_bytes = 0\n"), usual);
        assert_ne!(keys("[data]\nshuffle_window_tokens = 9\n"), usual);
    }
}
