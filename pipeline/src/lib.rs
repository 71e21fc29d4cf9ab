//! The ground floor of Fulgurite: documents, shards, manifests, stages and the one runner that owns
//! threads, files, retries and resume. It knows nothing of tokens or tensors.
//!
//! A run is a list of [`Stage`]s. A stage turns shards into shards; its tasks are DataFusion plans
//! over one shard each, executed by [`Runner`], which commits every finished shard with one line in
//! the stage's journal. Everything can be killed at any moment and continued.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod allocator;
pub mod classify;
pub mod digest;
pub mod document;
mod error;
pub mod event;
pub mod ingest;
pub mod language;
pub mod manifest;
pub mod normalise;
pub mod pii;
pub mod report;
pub mod review;
pub mod run;
mod runner;
pub mod shard;
mod shared;
pub mod signals;
pub mod sql;
pub mod stage;
pub mod stages;
pub mod status;
pub mod urls;

pub use error::{Error, Result, Severity};
pub use event::{Event, Observer};
pub use manifest::{Journal, JournalEntry, Manifest, StageState};
pub use run::{RunContext, RunOptions, Verify, lock};
pub use runner::{Runner, StagePlan, StageStatus, up_to};
pub use shard::{FileEntry, PendingFile, Shard};
pub use stage::{Output, RowsRead, Stage, Task, TaskContext, TaskReport};
