//! Batches of training sequences from token shards.
//!
//! A batch depends on the shards, the settings, the seed and the step alone: not on the number of ranks, on
//! what was loaded before, or on timing. The documents of an epoch of a source, one after the other, are a
//! stream of tokens; epochs follow each other without a gap. Streams are cut into sequences
//! ([`Packing`]), [`DataConfig`] says in which proportion sources give them, and sequence `n` of the
//! mixture is row `n mod rows` of step `n / rows`. Sequences are shuffled within windows of some million
//! tokens, which keeps the parts of a long document out of one batch. So every token of every document is in
//! a sequence exactly once in each epoch of its source, and the whole state is one number, the step.
//!
//! Every token is a target too, but the first of each document, which nothing foretells. By best fit the parts of
//! a document that is cut lie in sequences of their own, so that the first token of each part is no target either:
//! one is lost at each cut.

mod assembler;
mod batch;
mod config;
mod index;
mod location;
mod mixture;
mod order;
mod pack;
mod row_group;
mod shard_reader;
mod state;
mod storage;
mod stream;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use object_store::ObjectStore;
use pipeline::digest::Digest;
use pipeline::shard::part_name;
use pipeline::{JournalEntry, Shard};

use crate::counts::SourceCounts;
use crate::error::{Error, Result};
use assembler::Assembler;
use index::{Index, Listed};
use storage::{Remote, Storage};

pub use batch::Batch;
pub use config::{BufferConfig, DataConfig, LoaderConfig, Packing};
pub use location::Location;
pub use row_group::Documents;
pub use shard_reader::ShardReader;
pub use state::{LoaderState, PackingReport, SourceReport};

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
    /// A loader of these token shards, in this order. Reads the footers of all, nothing else; [`Self::open_stage`] reads those of
    /// shards that a batch is made of.
    pub fn open(shards: &[Shard], config: LoaderConfig) -> Result<Self> {
        let listed: Vec<Listed> = shards.iter().map(|shard| Listed { shard: shard.clone(), told: None }).collect();
        Self::with_storage(&listed, config, Storage::Local)
    }

    /// A loader of the shards of the stage in this directory (`RUN/tokens`).
    ///
    /// # Errors
    /// If the stage is not done, or its journal damaged: some of its documents would be missing.
    pub fn open_stage(stage_dir: &Path, config: LoaderConfig) -> Result<Self> {
        Location::Directory(stage_dir.into()).loader(config)
    }

    /// A loader of a stage directory that was copied, with its `journal.jsonl`, below `prefix` in an object
    /// store. Shards are read by ranges, some of them ahead; at most [`BufferConfig::cache_bytes`] of them
    /// are kept. Batches are those of the local directory.
    pub fn open_store(
        store: Arc<dyn ObjectStore>,
        prefix: &object_store::path::Path,
        config: LoaderConfig,
    ) -> Result<Self> {
        let remote = Remote::new(store, config.buffers.cache_bytes).map_err(|e| Error::io(prefix.to_string(), e))?;
        let journal = prefix.clone().join(JOURNAL);
        let name = journal.to_string();
        let bytes = remote.read_whole(&journal).map_err(|e| Error::io(&name, e))?;
        let entries = journal_entries(Path::new(&name), &bytes)?;
        let shards = listed(entries, Path::new(&prefix.to_string()));
        Self::with_storage(&shards, config, Storage::Remote(remote))
    }

    /// A loader of a stage directory, or a copy of it, at a URL such as `https://host/runs/web/tokens`,
    /// `s3://bucket/runs/web/tokens` or `file:///disk/runs/web/tokens`; the stage has to be done.
    pub fn open_url(url: &str, config: LoaderConfig) -> Result<Self> {
        Location::of_url(url)?.loader(config)
    }

    fn with_storage(shards: &[Listed], config: LoaderConfig, storage: Storage) -> Result<Self> {
        config.validate()?;
        let index = Index::open(shards, storage)?;
        let loader = Self { index, config, worker: None };
        loader.assembler()?;
        Ok(loader)
    }

    fn assembler(&self) -> Result<Assembler> {
        Assembler::new(self.index.clone(), self.config.clone())
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
        let batch = received.unwrap_or_else(|| Err(Error::Thread { step }));
        if batch.is_err() {
            self.worker = None;
        }
        batch
    }

    fn start(&self, step: u64) -> Result<Worker> {
        let (send, batches) = sync_channel(self.config.buffers.prefetch_batches);
        let mut assembler = self.assembler()?;
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

    /// Tokens of the data, of all sources.
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

    /// Id of the token that may begin a document, if the tokenizer has one.
    pub fn bos_id(&self) -> Option<u32> {
        self.index.metadata().bos_id
    }

    /// Id of the token for padding, if the tokenizer has one. Batches are padded with [`Self::eos_id`] all the same.
    pub fn pad_id(&self) -> Option<u32> {
        self.index.metadata().pad_id
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
}

const JOURNAL: &str = "journal.jsonl";

/// The lines of a journal, by task: of a task that was done twice the last one counts. Unlike a run, which makes the
/// shard of a damaged line again, a loader can only refuse it.
fn journal_entries(path: &Path, bytes: &[u8]) -> Result<BTreeMap<u32, JournalEntry>> {
    let lines = (1..).zip(bytes.split(|&byte| byte == b'\n')).filter(|(_, line)| !line.is_empty());
    let entry = |(number, line): (u64, &[u8])| match serde_json::from_slice::<JournalEntry>(line) {
        Ok(entry) => Ok((entry.task, entry)),
        Err(error) => {
            let reason = format!("line {number} is damaged ({error}); run its recipe again, or copy it again");
            Err(Error::Shard { path: path.into(), row_group: None, reason })
        }
    };
    lines.map(entry).collect()
}

/// The shards of a journal, with what its notes tell of them.
fn listed(journal: BTreeMap<u32, JournalEntry>, stage_dir: &Path) -> Vec<Listed> {
    let shards = journal.into_values().filter_map(|entry| {
        let name = part_name(entry.task);
        let file = entry.files.into_iter().find(|f| f.path.as_os_str() == name.as_str())?;
        let told = SourceCounts::from_notes(&entry.notes).and_then(|counts| told(counts, file.rows));
        let shard = Shard {
            index: entry.task,
            path: stage_dir.join(&file.path),
            rows: file.rows,
            bytes: file.bytes,
            xxh3: file.xxh3,
        };
        Some(Listed { shard, told })
    });
    shards.collect()
}

/// The source and the tokens that the counts of a shard of `rows` documents tell of; none where they are not those of one
/// source and of so many documents. A shard that is told to have no tokens is never looked at again, so one with documents must
/// not be taken for it.
fn told(SourceCounts(counts): SourceCounts, rows: u64) -> Option<(Option<String>, u64)> {
    let mut counts = counts.into_iter();
    match (counts.next(), counts.next()) {
        (None, _) => (rows == 0).then_some((None, 0)),
        (Some((source, of)), None) => {
            (of.documents == rows && (of.tokens == 0) == (rows == 0)).then_some((Some(source), of.tokens))
        }
        _ => None,
    }
}
