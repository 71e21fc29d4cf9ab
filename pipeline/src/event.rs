//! What a run tells whoever watches it. Libraries never print.

use std::sync::Arc;

use serde::Serialize;

use crate::manifest::JournalEntry;
use crate::runner::StageStatus;

/// One thing that happened in a run.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A stage is about to work, or is done already: then nothing more is told of it.
    StageStarted {
        /// Stage name.
        stage: String,
        /// Fresh, stale, resumed or done, with the reason.
        status: StageStatus,
        /// Tasks in all.
        tasks: u64,
        /// Tasks that need no work.
        done: u64,
    },
    /// A task committed its shard.
    TaskCommitted {
        /// Stage name.
        stage: String,
        /// The journal line.
        entry: JournalEntry,
    },
    /// A task failed and will be tried again.
    TaskRetried {
        /// Stage name.
        stage: String,
        /// Task number.
        task: u32,
        /// Why.
        reason: String,
    },
    /// Progress inside a long task, in units of the stage's choice (documents, steps, merges).
    Progress {
        /// Stage name.
        stage: String,
        /// Units done.
        done: u64,
        /// Units in all, when known.
        total: Option<u64>,
        /// A short line for people: the loss, the rate.
        message: String,
    },
    /// A stage finished; the totals of its journal.
    StageFinished {
        /// Stage name.
        stage: String,
        /// Rows read.
        rows_read: u64,
        /// Rows kept.
        rows_kept: u64,
        /// Seconds of work in this process, wall clock.
        seconds: f64,
    },
    /// Something that a person should know but that does not stop the run.
    Warning {
        /// The message.
        message: String,
    },
}

/// Receives events, from any thread.
pub type Observer = Arc<dyn Fn(&Event) + Send + Sync>;
