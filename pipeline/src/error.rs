//! Errors, sorted by consequence.

use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};

use datafusion::error::DataFusionError;

/// A result with [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What an error means for the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The run stops at once: going on cannot help.
    Abort,
    /// The shard failed: it is tried again, then reported, while other shards go on.
    Shard,
    /// Not a failure: somebody asked the run to stop.
    Interrupted,
}

/// Everything that can go wrong in a run. A bad record is not here: it is quarantined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// No space left; everything journalled so far is kept.
    #[error("{path}: no space left on device; make room and run the same command again, finished shards are kept")]
    DiskFull {
        /// The file being written.
        path: PathBuf,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The recipe asks for something that cannot be done.
    #[error("{0}")]
    Recipe(String),
    /// One key of the recipe asks for something that cannot be done.
    #[error("{key}: {reason}")]
    Setting {
        /// The key, as a dotted path from the top of the recipe; positions in arrays count from 0.
        key: String,
        /// What is wrong with its value.
        reason: String,
    },
    /// A limit of the recipe was passed.
    #[error("{0}")]
    Limit(String),
    /// A DataFusion plan failed.
    #[error("{}", plan_failed(.0))]
    DataFusion(#[from] DataFusionError),
    /// Arrow refused a batch.
    #[error(transparent)]
    Arrow(#[from] arrow::error::ArrowError),
    /// Parquet refused a file.
    #[error("{path}: {source}")]
    Parquet {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: parquet::errors::ParquetError,
    },
    /// Rows were lost or invented: a defect of the program.
    #[error("stage {stage}, task {task}: read {read} rows but kept {kept} and dropped {dropped}")]
    RowsLost {
        /// Stage name.
        stage: String,
        /// Task number.
        task: u32,
        /// Rows read.
        read: u64,
        /// Rows kept.
        kept: u64,
        /// Rows dropped.
        dropped: u64,
    },
    /// Some shards of a stage failed for good; the others are committed.
    #[error("stage {stage}: {} of its tasks failed:\n{}", failures.len(), failures.iter().map(|(t, e)| format!("  task {t}: {e}")).collect::<Vec<_>>().join("\n"))]
    TasksFailed {
        /// Stage name.
        stage: String,
        /// Task number and reason of each.
        failures: Vec<(u32, String)>,
    },
    /// The run was asked to stop and did so after a commit.
    #[error("stopped; run the same command again to continue")]
    Interrupted,
    /// An error of a library above this one, with its consequence.
    #[error("{source}")]
    Stage {
        /// What it means for the run.
        severity: Severity,
        /// The error.
        source: Box<dyn StdError + Send + Sync>,
    },
}

impl Error {
    /// An error of the recipe at `key`.
    pub fn setting(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Setting { key: key.into(), reason: reason.into() }
    }

    /// An I/O error at `path`; a full disk is told apart.
    pub fn io(path: impl AsRef<Path>, source: io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        if is_disk_full(&source) { Self::DiskFull { path } } else { Self::Io { path, source } }
    }

    /// A Parquet error at `path`; a full disk is told apart.
    pub fn parquet(path: impl AsRef<Path>, source: parquet::errors::ParquetError) -> Self {
        let path = path.as_ref().to_path_buf();
        if is_disk_full(&source) { Self::DiskFull { path } } else { Self::Parquet { path, source } }
    }

    /// An error of a stage outside this crate that fails its shard.
    pub fn shard(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Stage { severity: Severity::Shard, source: source.into() }
    }

    /// An error of a stage outside this crate that stops the run.
    pub fn abort(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Stage { severity: Severity::Abort, source: source.into() }
    }

    /// What this error means for the run.
    pub fn severity(&self) -> Severity {
        match self {
            Self::Interrupted => Severity::Interrupted,
            Self::Stage { severity, .. } => *severity,
            Self::DiskFull { .. } | Self::Recipe(_) | Self::Setting { .. } | Self::Limit(_) | Self::RowsLost { .. } => {
                Severity::Abort
            }
            // Trying again asks for as much.
            Self::DataFusion(error) if is_out_of_memory(error) => Severity::Abort,
            _ if is_disk_full(self) => Severity::Abort,
            _ => Severity::Shard,
        }
    }
}

fn is_out_of_memory(error: &DataFusionError) -> bool {
    matches!(error.find_root(), DataFusionError::ResourcesExhausted(_))
}

/// What a plan failed of, in the terms of this program: DataFusion names settings of its own.
fn plan_failed(error: &DataFusionError) -> String {
    match error.find_root() {
        DataFusionError::ResourcesExhausted(reason) => {
            // "… for ExternalSorter[0] …": who asked for how much is worth knowing, whatever is said around it.
            let asked = reason.find("Failed to allocate").map_or(reason.as_str(), |at| &reason[at..]);
            format!(
                "the memory limit does not suffice for the rows of one task: give a larger --memory-limit, or fewer \
                 --threads, which share it ({})",
                asked.trim_end()
            )
        }
        _ => error.to_string(),
    }
}

/// Whether an "out of space" error is anywhere in the chain of causes.
pub(crate) fn is_disk_full(error: &(dyn StdError + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(e) = cause {
        if let Some(io) = e.downcast_ref::<io::Error>() {
            if matches!(
                io.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
            ) {
                return true;
            }
            // io::Error hides a custom error's own type behind get_ref.
            if io.get_ref().is_some_and(|inner| is_disk_full(inner)) {
                return true;
            }
        }
        if let Some(parquet::errors::ParquetError::External(inner)) = e.downcast_ref()
            && is_disk_full(inner.as_ref())
        {
            return true;
        }
        cause = e.source();
    }
    false
}
