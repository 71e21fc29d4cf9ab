//! Errors of this crate, and what each means for a run.

use std::path::{Path, PathBuf};

/// A result with [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong between text and batches.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A key of the recipe asks for something that cannot be done.
    #[error("{key}: {reason}")]
    Config {
        /// The key, as a dotted path from the top of the recipe.
        key: String,
        /// What is wrong with its value.
        reason: String,
    },
    /// A `tokenizer.json` cannot be used.
    #[error("tokenizer {path}: {reason}")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The `tokenizers` crate refused to train, encode or decode.
    #[error("tokenizer: {0}")]
    Tokenizers(#[source] tokenizers::Error),
    /// A file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// A token shard is damaged or is not a token shard.
    #[error("{path}{}: {reason}", row_group.map(|g| format!(", row group {g}")).unwrap_or_default())]
    Shard {
        /// The file.
        path: PathBuf,
        /// Row group within the file, when the footer could be read.
        row_group: Option<usize>,
        /// What is wrong with it.
        reason: String,
    },
    /// The loader cannot work with these settings or these shards.
    #[error("{0}")]
    Loader(String),
    /// A loader state belongs to another data set or another order of it.
    #[error("the saved loader state does not fit this run: {0}")]
    State(String),
    /// The thread that makes batches ended without one.
    #[error(
        "the thread that makes batches ended before that of step {step}: a defect of the program, which the message of \
         the panic above names; please report both"
    )]
    Thread {
        /// The step whose batch was waited for.
        step: u64,
    },
    /// An error of the ground floor.
    #[error(transparent)]
    Pipeline(#[from] pipeline::Error),
}

impl Error {
    /// An error of `key` of the table `[tokenize]`.
    pub(crate) fn config(key: &str, reason: impl Into<String>) -> Self {
        Self::Config { key: format!("tokenize.{key}"), reason: reason.into() }
    }

    /// The settings name a source that the documents do not have.
    pub fn unknown_source<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
        let known: Vec<&str> = known.collect();
        format!("there is no source {name:?} among the documents: they are from {}", known.join(", "))
    }

    /// An I/O error at `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().into(), source }
    }
}

impl From<Error> for pipeline::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Pipeline(error) => error,
            Error::Config { key, reason } => Self::Setting { key, reason },
            Error::Tokenizer { .. } => Self::Recipe(error.to_string()),
            Error::Loader(_) => Self::abort(error),
            Error::Io { path, source } => Self::io(path, source),
            other => Self::shard(other),
        }
    }
}
