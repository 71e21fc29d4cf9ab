//! Checkpoints: directories `step-000123` that are either whole or not used.
//!
//! A checkpoint is the published layout (so generation, evaluation and export read it as it is)
//! with the optimizer's moments in `optimizer.safetensors`, everything else the run has to know in
//! `state.json`, and the XXH3 of each file in `checksums.json`. It is written under another name,
//! made durable and renamed. No random numbers are drawn while training runs: the first weights
//! follow from the seed and the order of the data from the loader's state.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use crate::config::{ModelConfig, TrainConfig};
use crate::engine::{Pending, Snapshot};
use crate::parameters::ParameterList;
use crate::{Error, files, published, tensors};

const OPTIMIZER: &str = "optimizer.safetensors";
pub(crate) const STATE: &str = "state.json";
const CHECKSUMS: &str = "checksums.json";
const MOMENTS: [&str; 2] = ["first.", "second."];

/// What a run knows besides its weights and moments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Steps taken; the next step has this number, counted from 0.
    pub step: u64,
    /// Predicted tokens so far.
    pub tokens: u64,
    /// Steps among them that changed nothing, since the gradient was no number.
    #[serde(default)]
    pub skipped: u64,
    /// State of the batch source, as it gave it.
    pub loader: Value,
    /// Settings of the run; with `step` they say where the schedule is.
    pub config: TrainConfig,
}

/// A checkpoint that was loaded.
#[derive(Debug)]
pub struct Checkpoint {
    /// The directory it came from.
    pub path: PathBuf,
    /// The sizes of the model.
    pub model: ModelConfig,
    /// Weights and moments.
    pub snapshot: Snapshot,
    /// Everything else.
    pub state: State,
}

/// Writes a checkpoint into `directory` and gives its path. A tokenizer is copied beside the model.
///
/// # Errors
/// [`Error::Io`] with the file that cannot be written; then there is no checkpoint of this step.
pub fn save(directory: &Path, snapshot: &Snapshot, state: &State, tokenizer: Option<&Path>) -> Result<PathBuf, Error> {
    let path = directory.join(format!("step-{:06}", state.step));
    let partial = files::partial(&path);
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(Error::io(&partial))?;
    }
    let model = &state.config.model;
    published::write(model, &snapshot.values, &partial, tokenizer)?;
    files::replace(&partial.join(OPTIMIZER), |path| {
        let buffers = [(MOMENTS[0], &snapshot.first[..]), (MOMENTS[1], &snapshot.second[..])];
        tensors::write(path, &ParameterList::of(model), &buffers)
    })?;
    write_json(&partial.join(STATE), state)?;
    write_json(&partial.join(CHECKSUMS), &checksums(&partial)?)?;
    if path.exists() {
        // Only a checkpoint that does not verify is written again.
        fs::remove_dir_all(&path).map_err(Error::io(&path))?;
    }
    fs::rename(&partial, &path).map_err(Error::io(&path))?;
    files::sync(directory)?;
    Ok(path)
}

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// The newest so many; all for 0.
    pub newest: usize,
    /// And those of steps that are a multiple of this; 0 adds none.
    pub every_steps: u64,
}

/// Writes checkpoints on a thread of its own, one at a time.
#[derive(Debug)]
pub struct Writer {
    directory: PathBuf,
    tokenizer: Option<PathBuf>,
    keep: Keep,
    running: Option<JoinHandle<Result<PathBuf, Error>>>,
}

impl Writer {
    /// A writer into `directory`.
    pub fn new(directory: &Path, tokenizer: Option<&Path>, keep: Keep) -> Self {
        Self { directory: directory.to_owned(), tokenizer: tokenizer.map(Path::to_owned), keep, running: None }
    }

    /// Begins to write a checkpoint, after the one before is done.
    ///
    /// # Errors
    /// What kept the one before from being written.
    pub fn begin(&mut self, pending: Pending, mut state: State) -> Result<(), Error> {
        self.finish()?;
        let (directory, tokenizer, keep) = (self.directory.clone(), self.tokenizer.clone(), self.keep);
        self.running = Some(std::thread::spawn(move || {
            let snapshot = pending()?;
            state.skipped = snapshot.skipped;
            let path = save(&directory, &snapshot, &state, tokenizer.as_deref())?;
            prune(&directory, keep)?;
            Ok(path)
        }));
        Ok(())
    }

    /// Waits for the checkpoint that is being written, and gives its path.
    ///
    /// # Errors
    /// What kept it from being written.
    pub fn finish(&mut self) -> Result<Option<PathBuf>, Error> {
        match self.running.take().map(JoinHandle::join) {
            None => Ok(None),
            Some(Ok(written)) => written.map(Some),
            Some(Err(panic)) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The run failed elsewhere; its last checkpoint is whole all the same.
        if let Some(Ok(Err(error))) = self.running.take().map(JoinHandle::join) {
            tracing::error!(%error, "a checkpoint was not written");
        }
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_vec_pretty(value).map_err(|error| Error::format(path, error))?;
    files::replace(path, |path| fs::write(path, text).map_err(Error::io(path)))
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, Error> {
    let text = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&text).map_err(|error| Error::format(path, error))
}

/// The XXH3 of every file in a checkpoint but the list itself, by name.
fn checksums(directory: &Path) -> Result<BTreeMap<String, String>, Error> {
    let mut sums = BTreeMap::new();
    for entry in fs::read_dir(directory).map_err(Error::io(directory))? {
        let entry = entry.map_err(Error::io(directory))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != CHECKSUMS {
            sums.insert(name, checksum(&entry.path())?);
        }
    }
    Ok(sums)
}

fn checksum(path: &Path) -> Result<String, Error> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut hasher = Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(Error::io(path))? {
            0 => return Ok(format!("{:032x}", hasher.digest128())),
            read => hasher.update(&buffer[..read]),
        }
    }
}

/// Checks every file of the checkpoint `path` against its checksum.
///
/// # Errors
/// [`Error::Io`] or [`Error::Format`] with the first file that is missing, too many or changed.
pub fn verify(path: &Path) -> Result<(), Error> {
    let want: BTreeMap<String, String> = read_json(&path.join(CHECKSUMS))?;
    let have = checksums(path)?;
    for name in want.keys().chain(have.keys()) {
        let reason = match (want.get(name), have.get(name)) {
            (Some(want), Some(have)) if want == have => continue,
            (Some(_), Some(_)) => "does not have the checksum it was written with",
            (Some(_), None) => "is missing",
            (None, _) => "does not belong to the checkpoint",
        };
        return Err(Error::format(&path.join(name), reason));
    }
    Ok(())
}

/// Verifies and loads the checkpoint `path`.
///
/// # Errors
/// [`Error::Io`] or [`Error::Format`] with the file that is not what it has to be.
pub fn load(path: &Path) -> Result<Checkpoint, Error> {
    verify(path)?;
    let state: State = read_json(&path.join(STATE))?;
    let (model, values) = published::read(path)?;
    let [first, second] = tensors::read(&path.join(OPTIMIZER), &ParameterList::of(&model), MOMENTS)?;
    let (taken, skipped) = (state.step.saturating_sub(state.skipped), state.skipped);
    let snapshot = Snapshot { values, first, second, taken, skipped };
    Ok(Checkpoint { path: path.to_owned(), model, snapshot, state })
}

/// The checkpoints in `directory` by step, the oldest first; none when it does not exist.
///
/// # Errors
/// [`Error::Io`] when the directory cannot be read.
pub fn list(directory: &Path) -> Result<Vec<(u64, PathBuf)>, Error> {
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let mut checkpoints = Vec::new();
    for entry in fs::read_dir(directory).map_err(Error::io(directory))? {
        let entry = entry.map_err(Error::io(directory))?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|name| name.strip_prefix("step-"));
        if let Some(step) = step.and_then(|step| step.parse().ok()) {
            checkpoints.push((step, entry.path()));
        }
    }
    checkpoints.sort();
    Ok(checkpoints)
}

/// Loads the newest checkpoint in `directory` that verifies. Each newer one that does not is
/// reported as a warning.
///
/// # Errors
/// [`Error::Io`] when the directory cannot be read.
pub fn load_newest(directory: &Path) -> Result<Option<Checkpoint>, Error> {
    for (_, path) in list(directory)?.into_iter().rev() {
        match load(&path) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(error) => tracing::warn!(
                checkpoint = %path.display(),
                %error,
                "a checkpoint cannot be used; trying the one before"
            ),
        }
    }
    Ok(None)
}

/// Removes the checkpoints that `keep` does not name, and what a crash left behind.
///
/// # Errors
/// [`Error::Io`] with the directory that cannot be removed.
pub fn prune(directory: &Path, keep: Keep) -> Result<(), Error> {
    let checkpoints = list(directory)?;
    let old = match keep.newest {
        0 => 0,
        newest => checkpoints.len().saturating_sub(newest),
    };
    for (step, path) in &checkpoints[..old] {
        if keep.every_steps == 0 || !step.is_multiple_of(keep.every_steps) {
            // Under its other name first: a removal that is cut short leaves no half checkpoint.
            fs::rename(path, files::partial(path)).map_err(Error::io(path))?;
        }
    }
    if !directory.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(directory).map_err(Error::io(directory))? {
        let path = entry.map_err(Error::io(directory))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.starts_with("step-") && name.ends_with(".partial")) {
            fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}
