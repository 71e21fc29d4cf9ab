//! What can go wrong in this crate.

use std::path::{Path, PathBuf};

/// An error of the trainer; every variant names the file or the setting and the reason.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting that no run can start with.
    #[error("{key}: {reason}")]
    Config {
        /// The setting, as a dotted path below the `train` table.
        key: String,
        /// What is wrong with its value.
        reason: String,
    },
    /// The operating system refused a file.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// A directory that was to hold a model holds none.
    #[error("{path}: holds no model and no checkpoint")]
    NoModel {
        /// The directory.
        path: PathBuf,
    },
    /// A file whose content is not what it has to be.
    #[error("{path}: {reason}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Token ids or sequences that the model cannot take.
    #[error("{0}")]
    Input(String),
    /// A device that is not there.
    #[error("device {device}: {reason}")]
    Device {
        /// The device as it was asked for.
        device: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// The loss or the gradient stopped being a number, more often in a row than the settings allow.
    #[error(
        "step {step}: the {what} is {value}, the gradient of {times} steps in a row was no number \
         (max_skipped_steps allows fewer); a lower learning rate or a longer warm-up may help"
    )]
    NonFinite {
        /// The optimizer step.
        step: u64,
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// Its value.
        value: f64,
        /// Steps in a row.
        times: u64,
    },
    /// The ranks of a run did not find each other.
    #[error("rank {rank} of {world} at {address}: {reason}")]
    Rendezvous {
        /// The rank that says so.
        rank: usize,
        /// Number of ranks.
        world: usize,
        /// MASTER_ADDR:MASTER_PORT.
        address: String,
        /// Who is missing, or what went wrong.
        reason: String,
    },
    /// The stop flag was set before the ranks had found each other: nothing was begun.
    #[error("stopped while it waited for the other ranks")]
    Interrupted,
    /// A rank died, hangs, left or is not doing what this one does.
    #[error("rank {rank} {reason}")]
    Rank {
        /// That rank.
        rank: usize,
        /// What of it.
        reason: String,
    },
    /// Token shards that cannot be opened.
    #[error("token shards: {0}")]
    Data(String),
    /// The source of batches failed.
    #[error("batch of step {step}: {reason}")]
    Batch {
        /// The optimizer step.
        step: u64,
        /// The reason given by the source.
        reason: String,
    },
}

impl Error {
    pub(crate) fn config(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { key: key.into(), reason: reason.into() }
    }

    pub(crate) fn format(path: &Path, reason: impl ToString) -> Self {
        Self::Format { path: path.to_owned(), reason: reason.to_string() }
    }

    /// Turns an IO error of `path` into an [`Error::Io`], for `map_err`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}
