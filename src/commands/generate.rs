//! `fulgurite generate`, and the samples at the end of a run.

use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use serde::Serialize;
use tokenize::Encoder;
use train::device::DeviceChoice;
use train::engine::Decoder;
use train::generate::{Finish, GenerateConfig, ModelReader, Reader, generate_rows};
use train::{Model, ModelConfig};

use crate::cli::Generate;
use crate::commands::existing;
use crate::exit::Usage;
use crate::output;
use crate::recipe::SampleConfig;

/// A prompt and what the model made of it.
#[derive(Clone, Debug, Serialize)]
pub struct Text {
    /// What it was given.
    pub prompt: String,
    /// What it wrote.
    pub text: String,
    /// The ids it wrote.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Continue a prompt, printing as the model writes.
pub fn generate(args: &Generate) -> Result<()> {
    let rows = args.prompt.len();
    let writer = Writer::load(&args.checkpoint, args.tokenizer.as_deref(), &args.device, rows)?;
    let config = GenerateConfig {
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
        ..writer.config()
    };
    if let [prompt] = args.prompt.as_slice() {
        if args.json {
            return output::json(&writer.write(prompt, &config, |_| Ok(()))?);
        }
        output::piece(prompt)?;
        writer.write(prompt, &config, output::piece)?;
        return Ok(output::line("")?);
    }
    let texts = writer.write_all(&args.prompt, &config)?;
    if args.json {
        return output::json(&texts);
    }
    for text in texts {
        output::line(format!("{}{}\n", text.prompt, text.text))?;
    }
    Ok(())
}

/// The samples of a recipe, unless `stop` is set before they are written.
pub fn samples(checkpoint: &Path, sample: &SampleConfig, device: &str, stop: &AtomicBool) -> Result<Vec<Text>> {
    let writer = Writer::load(checkpoint, None, device, 1)?;
    let config = GenerateConfig {
        max_tokens: sample.max_tokens,
        temperature: sample.temperature,
        top_k: sample.top_k,
        top_p: sample.top_p,
        seed: sample.seed,
        ..writer.config()
    };
    let stopped = || stop.load(Ordering::Relaxed);
    let go_on = |_: &str| -> std::io::Result<()> {
        if stopped() { Err(std::io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    };
    let texts: Result<Vec<Text>> = sample.prompts.iter().map(|prompt| writer.write(prompt, &config, go_on)).collect();
    match texts {
        Err(_) if stopped() => Err(pipeline::Error::Interrupted.into()),
        texts => texts,
    }
}

/// A model in the form that its device has.
enum Loaded {
    /// float32.
    Model(Box<Model>),
    /// bf16 on CUDA.
    Decoder(Box<RefCell<Decoder>>),
}

/// A model and its tokenizer.
struct Writer {
    model: Loaded,
    encoder: Encoder,
    suppressed: Vec<u32>,
    bos: u32,
}

/// The model in `directory`, in bf16 where its device and sizes allow it.
fn load(directory: &Path, device: &train::device::Device, rows: usize) -> Result<(ModelConfig, Loaded)> {
    let (config, values) = train::published::read(directory)?;
    let decoder = Decoder::new(&config, &values, rows, device);
    let loaded = match decoder {
        Ok(decoder) => Loaded::Decoder(Box::new(RefCell::new(decoder))),
        Err(_) => Loaded::Model(Box::new(Model::from_values(&config, values, device)?)),
    };
    Ok((config, loaded))
}

impl Writer {
    fn load(checkpoint: &Path, tokenizer: Option<&Path>, device: &str, rows: usize) -> Result<Self> {
        let directory = train::locate(existing(checkpoint)?)?;
        let tokenizer = tokenizer_of(&directory, tokenizer)?;
        let device = device.parse::<DeviceChoice>().map_err(|e| Usage(e.to_string()))?.select()?;
        let (config, model) = load(&directory, &device, rows)?;
        let encoder = Encoder::load(&tokenizer)?;
        // Padding and reserved places of the vocabulary are no text; the end of a text is for the generator to see.
        let mut suppressed = encoder.ids_without_text(config.vocab_size as u32);
        suppressed.retain(|id| *id != config.eos_token_id);
        Ok(Self { model, encoder, suppressed, bos: config.bos_token_id })
    }

    /// What the model and its tokenizer say about generation.
    fn config(&self) -> GenerateConfig {
        GenerateConfig { suppressed: self.suppressed.clone(), ..GenerateConfig::default() }
    }

    /// The ids of a prompt.
    fn ids(&self, prompt: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        self.encoder.encode(prompt, &mut ids)?;
        if ids.is_empty() {
            // Nothing to continue: the beginning of a document.
            ids.push(self.bos);
        }
        Ok(ids)
    }

    /// Continues several prompts, the n-th with the seed plus n.
    fn write_all(&self, prompts: &[String], config: &GenerateConfig) -> Result<Vec<Text>> {
        let Loaded::Decoder(decoder) = &self.model else {
            let alone = |(row, prompt): (usize, &String)| {
                let config = GenerateConfig { seed: config.seed.wrapping_add(row as u64), ..config.clone() };
                self.write(prompt, &config, |_| Ok(()))
            };
            return prompts.iter().enumerate().map(alone).collect();
        };
        let ids = prompts.iter().map(|prompt| self.ids(prompt)).collect::<Result<Vec<_>>>()?;
        let mut written: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
        let mut decoder = decoder.borrow_mut();
        let ends = generate_rows(&mut decoder, &ids, config, |row, id| {
            written[row].push(id);
            ControlFlow::Continue(())
        })?;
        let texts = prompts.iter().zip(written).zip(ends).map(|((prompt, ids), finish)| {
            Ok(Text { prompt: prompt.clone(), text: self.encoder.decode(&ids)?, ids, finish })
        });
        texts.collect()
    }

    fn write(
        &self,
        prompt: &str,
        config: &GenerateConfig,
        mut piece: impl FnMut(&str) -> std::io::Result<()>,
    ) -> Result<Text> {
        let prompt_ids = self.ids(prompt)?;
        let (mut ids, mut text, mut told, mut failed) = (Vec::new(), String::new(), 0, None);
        let mut decoder;
        let mut reader;
        let reader: &mut dyn Reader = match &self.model {
            Loaded::Model(model) => {
                reader = ModelReader::new(model);
                &mut reader
            }
            Loaded::Decoder(shared) => {
                decoder = shared.borrow_mut();
                decoder.restart();
                &mut *decoder
            }
        };
        let finish = train::generate::generate(reader, &prompt_ids, config, |id| {
            ids.push(id);
            // A character may take several tokens: only what later tokens cannot change is told.
            let result = self.encoder.decode(&ids[told..]).map_err(anyhow::Error::from).and_then(|more| {
                if !more.ends_with('\u{fffd}') {
                    piece(&more)?;
                    text.push_str(&more);
                    told = ids.len();
                }
                Ok(())
            });
            match result {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let rest = self.encoder.decode(&ids[told..])?;
        piece(&rest)?;
        text.push_str(&rest);
        Ok(Text { prompt: prompt.into(), text, ids, finish })
    }
}

/// The tokenizer that is given, or the one beside the model.
pub fn tokenizer_of(directory: &Path, given: Option<&Path>) -> Result<PathBuf> {
    let beside = directory.join(train::published::TOKENIZER);
    let path = given.map_or(beside, Path::to_owned);
    if !path.exists() {
        return Err(Usage(format!("{}: no such file; name a tokenizer with --tokenizer", path.display())))
            .context("no tokenizer");
    }
    Ok(path)
}
