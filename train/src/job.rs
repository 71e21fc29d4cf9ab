//! A training run of its own: one file of settings, the token shards of any run, a directory for the result.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use burn::tensor::Device;
use serde::{Deserialize, Serialize};
use tokenize::stages::{TOKENS, TOKENS_VALIDATION};
use tokenize::{TokenStatistics, tokenizer_path};

use crate::Error;
use crate::config::TrainConfig;
use crate::data::{Data, Place, Places, bytes_per_token};
use crate::run::{Metrics, Outcome, Run, train};

/// The settings of a training run: everything that it depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Name of the run: `runs/NAME`.
    pub name: String,
    /// What it is, for people.
    #[serde(default)]
    pub description: String,
    /// The token shards: a run's directory, a directory of token shards, or the URL of one of these
    /// (`s3://bucket/runs/fineweb`).
    pub tokens: String,
    /// The run.
    pub train: TrainConfig,
}

/// How a job is to be run.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Where checkpoints and metrics go.
    pub directory: &'a Path,
    /// The device that trains.
    pub device: &'a Device,
    /// As in [`Run::profile_steps`].
    pub profile_steps: u64,
    /// As in [`Run::stop`].
    pub stop: &'a AtomicBool,
}

impl Job {
    /// Runs the job, or continues it where it stopped.
    ///
    /// # Errors
    /// As [`train`], and [`Error::Data`] for shards that cannot be read.
    pub fn run(&self, options: &Options<'_>, on_step: &mut dyn FnMut(&Metrics)) -> Result<Outcome, Error> {
        let places = self.places()?;
        let Data { mut source, held_out, config } = Data::open(&places, &self.train)?;
        let run_dir = self.run_dir();
        let tokenizer = run_dir.as_deref().map(tokenizer_path).filter(|path| path.exists());
        let statistics = run_dir.as_deref().and_then(|dir| TokenStatistics::load(dir).ok());
        let run = Run {
            config: &config,
            device: options.device,
            directory: options.directory,
            tokenizer: tokenizer.as_deref(),
            held_out: held_out.as_ref(),
            bytes_per_token: statistics.as_ref().and_then(bytes_per_token),
            profile_steps: options.profile_steps,
            stop: options.stop,
        };
        train(&run, &mut source, on_step)
    }

    /// The run whose tokens are trained on, where it is a local one.
    fn run_dir(&self) -> Option<PathBuf> {
        let path = Path::new(&self.tokens);
        if path.join(TOKENS).is_dir() {
            return Some(path.to_owned());
        }
        // The directory of a stage lies in that of its run.
        path.parent()
            .filter(|parent| path.file_name().is_some_and(|name| name == TOKENS) && parent.is_dir())
            .map(Path::to_owned)
    }

    fn places(&self) -> Result<Places, Error> {
        if self.tokens.contains("://") {
            let url = self.tokens.trim_end_matches('/');
            return Ok(match url.strip_suffix(TOKENS) {
                Some(_) => Places { training: Place::Url(url.to_owned()), held_out: Place::None },
                None => Places {
                    training: Place::Url(format!("{url}/{TOKENS}")),
                    held_out: match self.train.evaluation.every_steps {
                        0 => Place::None,
                        _ => Place::Url(format!("{url}/{TOKENS_VALIDATION}")),
                    },
                },
            });
        }
        let path = Path::new(&self.tokens);
        if let Some(run) = self.run_dir() {
            let held_out = run.join(TOKENS_VALIDATION);
            let held_out = if held_out.is_dir() { Place::Directory(held_out) } else { Place::None };
            return Ok(Places { training: Place::Directory(run.join(TOKENS)), held_out });
        }
        if path.is_dir() {
            return Ok(Places { training: Place::Directory(path.to_owned()), held_out: Place::None });
        }
        let reason = format!("{} is no directory of a run and none of token shards", path.display());
        Err(Error::config("tokens", reason))
    }
}
