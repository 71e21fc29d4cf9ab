//! Batches of training sequences from token shards.
//!
//! A batch depends on the shards, the seed and the step alone: not on the number of ranks, on what was
//! loaded before, or on timing. The documents of an epoch, one after the other, are a stream of tokens;
//! epochs follow each other without a gap. The stream is cut into sequences of `sequence_length` inputs
//! (each with one more token as the last target), and sequence `n` is row `n mod rows` of step
//! `n / rows`, up to a shuffle within windows of some million tokens that keeps the parts of a long
//! document out of one batch. So every token of every document is trained on exactly once per epoch,
//! and the whole state is one number, the step.

mod index;
mod order;
mod stream;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use pipeline::digest::Digest;
use pipeline::shard::part_name;
use pipeline::{Journal, Shard};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use index::Index;
use order::permutation;
use stream::Stream;

/// How token shards become batches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoaderConfig {
    /// Inputs of a sequence, T: a row has one token more.
    pub sequence_length: usize,
    /// Rows of the global batch, over all ranks.
    pub rows: usize,
    /// Seed of the order of epochs and windows.
    pub seed: u64,
    /// Sequences are shuffled within windows of about this many tokens, but not more than an epoch. A
    /// loader holds one window in memory (4 bytes a token).
    pub shuffle_window_tokens: usize,
    /// Batches that are made ahead of the training thread.
    pub prefetch: usize,
    /// Which rows this loader gives: those whose number is `rank` modulo `world_size`.
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
            shuffle_window_tokens: 4 << 20,
            prefetch: 4,
            rank: 0,
            world_size: 1,
        }
    }
}

impl LoaderConfig {
    /// Refuse values that cannot work.
    pub fn validate(&self) -> Result<()> {
        let fault = |what: &str| Err(Error::Loader(what.into()));
        match self {
            Self { sequence_length: 0, .. } => fault("sequence_length must be above 0"),
            Self { rows: 0, .. } => fault("a batch must have a row"),
            Self { rank, world_size, .. } if rank >= world_size => fault("rank must be below world_size"),
            Self { rows, world_size, .. } if rows < world_size => fault("a batch must have a row for every rank"),
            _ => Ok(()),
        }
    }

    /// Sequences in a window of data with so many tokens.
    fn window(&self, tokens: u64) -> u64 {
        let length = (self.shuffle_window_tokens as u64).min(tokens);
        (length / self.sequence_length as u64).max(1)
    }
}

/// The rows of one rank of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The step.
    pub step: u64,
    /// Rows in this batch.
    pub rows: usize,
    /// Inputs of a row, T.
    pub sequence_length: usize,
    /// Token ids, row-major `[rows, T + 1]`: inputs are the first T of a row, targets the last T.
    pub tokens: Vec<u32>,
    /// For each row, where its segments begin: 0 always, then every input position `1..T` at which a
    /// document begins. State must not pass these positions. With T appended they are the row's
    /// cumulative sequence lengths.
    pub document_starts: Vec<Vec<u32>>,
    /// The epoch that the first token of the batch belongs to, from 0.
    pub epoch: u64,
}

impl Batch {
    /// The T + 1 tokens of a row.
    pub fn row(&self, row: usize) -> &[u32] {
        let width = self.sequence_length + 1;
        &self.tokens[row * width..(row + 1) * width]
    }
}

/// What a checkpoint keeps of a loader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoaderState {
    /// The next step.
    pub step: u64,
    /// Epoch of the next step's first token, for people.
    pub epoch: u64,
    /// [`Loader::fingerprint`] of the data.
    pub fingerprint: Digest,
    /// Everything else that decides the batches.
    pub sequence_length: usize,
    /// Rows of the global batch.
    pub rows: usize,
    /// Seed of the order.
    pub seed: u64,
    /// Sequences in a shuffle window.
    pub window: u64,
}

/// Gives batches by step. A background thread makes the next ones ahead and waits when enough are made.
pub struct Loader {
    index: Index,
    config: LoaderConfig,
    worker: Option<Worker>,
}

struct Worker {
    /// The step of the next batch in the channel.
    next: u64,
    batches: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Without a receiver the thread's next send fails, and it ends.
        drop(self.batches.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was already seen as a closed channel.
            let _ = thread.join();
        }
    }
}

impl Loader {
    /// A loader of these token shards, in this order. Reads the footers of all, nothing else.
    pub fn open(shards: &[Shard], config: LoaderConfig) -> Result<Self> {
        config.validate()?;
        let index = Index::open(shards)?;
        Ok(Self { index, config, worker: None })
    }

    /// A loader of the shards that the stage in this directory (`RUN/tokens`) has committed.
    pub fn open_stage(stage_dir: &Path, config: LoaderConfig) -> Result<Self> {
        Self::open(&committed_shards(stage_dir)?, config)
    }

    /// The batch of a step. Steps in order come from the prefetch thread; any other step restarts it.
    pub fn batch(&mut self, step: u64) -> Result<Batch> {
        if self.worker.as_ref().is_none_or(|w| w.next != step) {
            self.worker = Some(self.start(step)?);
        }
        let received = self.worker.as_mut().and_then(|worker| {
            worker.next += 1;
            worker.batches.as_ref()?.recv().ok()
        });
        let batch = received.unwrap_or_else(|| Err(Error::State("the loader's thread died".into())));
        if batch.is_err() {
            self.worker = None;
        }
        batch
    }

    fn start(&self, step: u64) -> Result<Worker> {
        let (send, batches) = sync_channel(self.config.prefetch.max(1));
        let mut assembler = Assembler::new(self.index.clone(), self.config.clone());
        let work = move || {
            for step in step.. {
                let batch = assembler.batch(step);
                let failed = batch.is_err();
                if send.send(batch).is_err() || failed {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("loader".into()).spawn(work);
        let thread = thread.map_err(|e| Error::io("loader thread", e))?;
        Ok(Worker { next: step, batches: Some(batches), thread: Some(thread) })
    }

    /// Tokens of the data: what one epoch trains on.
    pub fn tokens_per_epoch(&self) -> u64 {
        self.index.tokens()
    }

    /// One more than the largest token id that can occur.
    pub fn vocabulary_size(&self) -> u32 {
        self.index.metadata().vocabulary_size
    }

    /// Id of the token that ends every document.
    pub fn eos_id(&self) -> u32 {
        self.index.metadata().eos_id
    }

    /// XXH3 of the `tokenizer.json` that made the tokens.
    pub fn tokenizer_digest(&self) -> Digest {
        self.index.metadata().tokenizer
    }

    /// What identifies the data: a digest of the checksums of the shards, in order.
    pub fn fingerprint(&self) -> Digest {
        self.index.fingerprint()
    }

    /// Settings.
    pub fn config(&self) -> &LoaderConfig {
        &self.config
    }

    /// The epoch that the first token of a step belongs to.
    pub fn epoch(&self, step: u64) -> u64 {
        epoch(step, &self.config, self.index.tokens())
    }

    /// What a checkpoint keeps, when `step` is the next one: the size of a few numbers.
    pub fn state(&self, step: u64) -> serde_json::Value {
        let state = LoaderState {
            step,
            epoch: self.epoch(step),
            fingerprint: self.fingerprint(),
            sequence_length: self.config.sequence_length,
            rows: self.config.rows,
            seed: self.config.seed,
            window: self.config.window(self.index.tokens()),
        };
        // A struct of numbers and a string always has a JSON form.
        serde_json::to_value(state).unwrap_or_default()
    }

    /// The next step of a saved state, after a check that this loader goes on with the same batches.
    /// The world size may differ.
    pub fn resume(&self, state: &serde_json::Value) -> Result<u64> {
        let saved: LoaderState = serde_json::from_value(state.clone()).map_err(|e| Error::State(format!("{e}")))?;
        let mut now = self.state(saved.step);
        if now == *state {
            return Ok(saved.step);
        }
        let mut changes = Vec::new();
        if let (Some(now), Some(saved)) = (now.as_object_mut(), state.as_object()) {
            for (key, value) in now.iter().filter(|(key, value)| saved.get(*key) != Some(value)) {
                let saved = saved.get(key).cloned().unwrap_or_default();
                changes.push(format!("{key} was {saved}, is {value}"));
            }
        }
        Err(Error::State(changes.join(", ")))
    }
}

/// The committed shards of the stage in `stage_dir`, in order.
pub fn committed_shards(stage_dir: &Path) -> Result<Vec<Shard>> {
    let journal = Journal::read(stage_dir)?;
    let shards = journal.into_values().filter_map(|entry| {
        let name = part_name(entry.task);
        let file = entry.files.into_iter().find(|f| f.path.as_os_str() == name.as_str())?;
        Some(Shard {
            index: entry.task,
            path: stage_dir.join(&file.path),
            rows: file.rows,
            bytes: file.bytes,
            xxh3: file.xxh3,
        })
    });
    Ok(shards.collect())
}

fn epoch(step: u64, config: &LoaderConfig, tokens: u64) -> u64 {
    let position = u128::from(step) * config.rows as u128 * config.sequence_length as u128;
    (position / u128::from(tokens)) as u64
}

/// Makes batches, holding one window of the stream.
struct Assembler {
    config: LoaderConfig,
    tokens_per_epoch: u64,
    stream: Stream,
    /// Sequences in a window.
    window_sequences: u64,
    window: Option<Window>,
}

/// A shuffle window: the tokens of its sequences in stream order, and the order they are used in.
struct Window {
    number: u64,
    tokens: Vec<u32>,
    /// Positions in `tokens` at which a document begins, ascending.
    starts: Vec<u32>,
    order: Vec<u32>,
}

impl Assembler {
    fn new(index: Index, config: LoaderConfig) -> Self {
        let tokens_per_epoch = index.tokens();
        let stream = Stream::new(index, config.seed);
        let window_sequences = config.window(tokens_per_epoch);
        Self { config, tokens_per_epoch, stream, window_sequences, window: None }
    }

    fn batch(&mut self, step: u64) -> Result<Batch> {
        let length = self.config.sequence_length;
        let chosen = (self.config.rank..self.config.rows).step_by(self.config.world_size);
        let mut batch = Batch {
            step,
            rows: chosen.len(),
            sequence_length: length,
            tokens: Vec::with_capacity(chosen.len() * (length + 1)),
            document_starts: Vec::with_capacity(chosen.len()),
            epoch: epoch(step, &self.config, self.tokens_per_epoch),
        };
        for row in chosen {
            let sequence = step * self.config.rows as u64 + row as u64;
            let window = self.window(sequence / self.window_sequences)?;
            let place = window.order[(sequence % window.order.len() as u64) as usize] as usize * length;
            batch.tokens.extend_from_slice(&window.tokens[place..=place + length]);
            let first = window.starts.partition_point(|&s| s as usize <= place);
            let inside = window.starts[first..].iter().take_while(|&&s| (s as usize) < place + length);
            let starts = std::iter::once(0).chain(inside.map(|&s| s - place as u32));
            batch.document_starts.push(starts.collect());
        }
        Ok(batch)
    }

    fn window(&mut self, number: u64) -> Result<&Window> {
        if self.window.as_ref().is_none_or(|w| w.number != number) {
            let sequences = self.window_sequences;
            let length = sequences as usize * self.config.sequence_length;
            // Freed first, so that there is never more than one.
            let (mut tokens, mut starts) = match self.window.take() {
                Some(old) => (old.tokens, old.starts),
                None => (Vec::new(), Vec::new()),
            };
            tokens.clear();
            starts.clear();
            // One token more: the last target of the last sequence.
            self.stream.read(u128::from(number) * length as u128, length + 1, &mut tokens, &mut starts)?;
            let order = permutation(&[self.config.seed, order::WINDOW, number], sequences as usize);
            self.window = Some(Window { number, tokens, starts, order });
        }
        self.window.as_ref().ok_or_else(|| Error::State("no window".into()))
    }
}
