//! Batches of training sequences from token shards.
//!
//! A batch depends on the shards, the settings, the seed and the step alone: not on the number of ranks, on
//! what was loaded before, or on timing. The documents of an epoch of a source, one after the other, are a
//! stream of tokens; epochs follow each other without a gap. Streams are cut into sequences
//! ([`Packing`]), [`DataConfig`] says in which proportion sources give them, and sequence `n` of the
//! mixture is row `n mod rows` of step `n / rows`. Sequences are shuffled within windows of some million
//! tokens, which keeps the parts of a long document out of one batch. So every token of every document is
//! trained on exactly once in each epoch of its source, and the whole state is one number, the step.

mod assembler;
mod batch;
mod config;
mod index;
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

use object_store::{GetOptions, ObjectStore};
use pipeline::digest::Digest;
use pipeline::shard::part_name;
use pipeline::{Journal, JournalEntry, Shard};

use crate::error::{Error, Result};
use assembler::Assembler;
use index::Index;
use storage::Storage;

pub use batch::Batch;
pub use config::{DataConfig, LoaderConfig, Packing};
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
    /// A loader of these token shards, in this order. Reads the footers of all, nothing else.
    pub fn open(shards: &[Shard], config: LoaderConfig) -> Result<Self> {
        Self::with_storage(shards, config, Storage::Local)
    }

    /// A loader of the shards that the stage in this directory (`RUN/tokens`) has committed.
    pub fn open_stage(stage_dir: &Path, config: LoaderConfig) -> Result<Self> {
        Self::open(&committed_shards(stage_dir)?, config)
    }

    /// A loader of a stage directory that was copied, with its `journal.jsonl`, below `prefix` in an object
    /// store. Shards are read by ranges, some of them ahead; at most [`LoaderConfig::cache_bytes`] of them
    /// are kept. Batches are those of the local directory.
    pub fn open_store(
        store: Arc<dyn ObjectStore>,
        prefix: &object_store::path::Path,
        config: LoaderConfig,
    ) -> Result<Self> {
        let journal = prefix.clone().join(JOURNAL);
        let name = journal.to_string();
        let (send, receive) = std::sync::mpsc::channel();
        let storage = Storage::remote(store.clone(), config.cache_bytes).map_err(|e| Error::io(&name, e))?;
        storage.spawn(async move {
            let read = async { store.get_opts(&journal, GetOptions::default()).await?.bytes().await };
            // The receiver below waits for it.
            let _ = send.send(read.await);
        });
        let read = receive.recv().map_err(std::io::Error::other);
        let bytes = read.and_then(|r| r.map_err(std::io::Error::other)).map_err(|e| Error::io(&name, e))?;
        let mut entries = BTreeMap::new();
        for line in bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            let entry: JournalEntry = serde_json::from_slice(line).map_err(|e| Error::Shard {
                path: name.clone().into(),
                row_group: None,
                reason: e.to_string(),
            })?;
            entries.insert(entry.task, entry);
        }
        Self::with_storage(&shards_of(entries, Path::new(&prefix.to_string())), config, storage)
    }

    /// As [`Self::open_store`], of a URL such as `s3://bucket/run/tokens`. Credentials come from the
    /// environment of the process.
    pub fn open_url(url: &str, config: LoaderConfig) -> Result<Self> {
        let fault = |reason: String| Error::Loader(format!("{url}: {reason}"));
        let parsed = url::Url::parse(url).map_err(|e| fault(e.to_string()))?;
        let variables = std::env::vars().map(|(key, value)| (key.to_ascii_lowercase(), value));
        let (store, prefix) = object_store::parse_url_opts(&parsed, variables).map_err(|e| fault(e.to_string()))?;
        Self::open_store(Arc::from(store), &prefix, config)
    }

    fn with_storage(shards: &[Shard], config: LoaderConfig, storage: Storage) -> Result<Self> {
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
        let batch = received.unwrap_or_else(|| Err(Error::State("the loader's thread died".into())));
        if batch.is_err() {
            self.worker = None;
        }
        batch
    }

    fn start(&self, step: u64) -> Result<Worker> {
        let (send, batches) = sync_channel(self.config.prefetch.max(1));
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

/// The committed shards of the stage in `stage_dir`, in order.
pub fn committed_shards(stage_dir: &Path) -> Result<Vec<Shard>> {
    Ok(shards_of(Journal::read(stage_dir)?, stage_dir))
}

fn shards_of(journal: BTreeMap<u32, JournalEntry>, stage_dir: &Path) -> Vec<Shard> {
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
    shards.collect()
}
