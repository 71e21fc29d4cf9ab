//! Texts that a model writes while it is trained: `samples.jsonl`.

use std::fs::{self, File};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokenize::Encoder;

use crate::config::TrainConfig;
use crate::generate::{GenerateConfig, Reader, generate};
use crate::{Error, files};

/// Name of the file in the directory of a run.
pub const SAMPLES: &str = "samples.jsonl";

/// One line of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Steps taken.
    pub step: u64,
    /// What the model was given.
    pub prompt: String,
    /// What it wrote.
    pub text: String,
}

/// Writes the samples of a run.
pub(crate) struct Samples {
    path: PathBuf,
    encoder: Encoder,
    prompts: Vec<(String, Vec<u32>)>,
    settings: GenerateConfig,
}

impl Samples {
    /// Whether a run with these settings writes samples: prompts need a tokenizer.
    pub(crate) fn are_wanted(config: &TrainConfig, tokenizer: Option<&Path>) -> bool {
        !config.evaluation.prompts.is_empty() && config.evaluation.every_steps > 0 && tokenizer.is_some()
    }

    /// Of the prompts in the settings of a run that goes on at `step`; nothing where there are none, or no tokenizer.
    pub(crate) fn open(
        directory: &Path,
        config: &TrainConfig,
        tokenizer: Option<&Path>,
        step: u64,
    ) -> Result<Option<Self>, Error> {
        let evaluation = &config.evaluation;
        if evaluation.prompts.is_empty() || evaluation.every_steps == 0 {
            return Ok(None);
        }
        let Some(tokenizer) = tokenizer else {
            tracing::warn!("no samples are written: the tokens came without a tokenizer");
            return Ok(None);
        };
        let encoder = Encoder::load(tokenizer).map_err(|error| Error::format(tokenizer, error))?;
        let prompts = evaluation
            .prompts
            .iter()
            .map(|prompt| {
                let mut ids = Vec::new();
                encoder.encode(prompt, &mut ids).map_err(|error| Error::format(tokenizer, error))?;
                if ids.is_empty() {
                    // Nothing to continue: the beginning of a document.
                    ids.push(config.model.bos_token_id);
                }
                Ok((prompt.clone(), ids))
            })
            .collect::<Result<_, Error>>()?;
        let path = directory.join(SAMPLES);
        let mut kept = String::new();
        if path.exists() {
            // What follows the checkpoint is about to be written again.
            for line in fs::read_to_string(&path).map_err(Error::io(&path))?.lines() {
                if serde_json::from_str(line).is_ok_and(|sample: Sample| sample.step <= step) {
                    kept += line;
                    kept.push('\n');
                }
            }
        }
        files::replace(&path, |path| fs::write(path, &kept).map_err(Error::io(path)))?;
        let mut suppressed = encoder.ids_without_text(config.model.vocab_size as u32);
        suppressed.retain(|id| *id != config.model.eos_token_id);
        let settings = GenerateConfig {
            max_tokens: evaluation.sample_tokens,
            seed: config.seed,
            suppressed,
            ..GenerateConfig::default()
        };
        Ok(Some(Self { path, encoder, prompts, settings }))
    }

    /// Writes a sample of every prompt after step `step`, with the weights of `reader`.
    pub(crate) fn write(&self, step: u64, reader: &mut dyn Reader) -> Result<(), Error> {
        let mut lines = Vec::new();
        for (prompt, ids) in &self.prompts {
            let mut written = Vec::new();
            reader.restart();
            generate(reader, ids, &self.settings, |id| {
                written.push(id);
                ControlFlow::Continue(())
            })?;
            let text = self.encoder.decode(&written).map_err(|error| Error::format(&self.path, error))?;
            let sample = Sample { step, prompt: prompt.clone(), text };
            serde_json::to_writer(&mut lines, &sample).map_err(|error| Error::format(&self.path, error))?;
            lines.push(b'\n');
        }
        let file = File::options().append(true).open(&self.path);
        file.and_then(|mut file| file.write_all(&lines)).map_err(Error::io(&self.path))
    }
}
