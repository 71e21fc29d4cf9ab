//! Checkpoints: directories `step-000123` that are either whole or not used.
//!
//! A checkpoint is the published layout (so generation, evaluation and export read it as it is)
//! with the optimizer's moments in `optimizer.safetensors`, everything else the run has to know in
//! `state.json`, and the XXH3 of each file in `checksums.json`. Of several ranks each writes its shard of weights and
//! moments, `weights-00003-of-00008.safetensors` and `optimizer-00003-of-00008.safetensors`, whose tensors say what
//! part of which parameter they are: any number of ranks continues from it. It is written under another name,
//! made durable and renamed; one that was damaged later is named `step-000123.damaged`, and left to people. No random numbers are drawn while training runs: the first weights
//! follow from the seed and the order of the data from the loader's state.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use crate::config::{ModelConfig, TrainConfig};
use crate::engine::{Pending, Snapshot};
use crate::parallel::{Collective, Team, all_of};
use crate::parameters::ParameterList;
use crate::tensors::{self, Shard, Store, Values};
use crate::{Error, files, published};

const OPTIMIZER: &str = "optimizer.safetensors";
/// Begin of the names of the files that ranks write instead.
const MOMENTS_OF: &str = "optimizer";
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
    /// What is not weights and moments.
    pub state: State,
    weights: Store,
    moments: Store,
}

impl Checkpoint {
    /// Weights and moments in `ranges` of the flat buffer of the whole model: a shard, of whatever ranks wrote the checkpoint.
    /// Nothing else is read.
    ///
    /// # Errors
    /// [`Error::Io`] with the file that cannot be read.
    pub fn snapshot(&self, ranges: &[Range<usize>]) -> Result<Snapshot, Error> {
        let (taken, skipped) = (self.state.step.saturating_sub(self.state.skipped), self.state.skipped);
        let [first, second] = [self.moments.read(0, ranges)?, self.moments.read(1, ranges)?];
        Ok(Snapshot { values: self.weights.read(0, ranges)?, first, second, taken, skipped })
    }
}

/// Writes a checkpoint into `directory` and gives its path. A tokenizer is copied beside the model.
///
/// # Errors
/// [`Error::Io`] with the file that cannot be written; then there is no checkpoint of this step.
pub fn save(directory: &Path, snapshot: &Snapshot, state: &State, tokenizer: Option<&Path>) -> Result<PathBuf, Error> {
    let (path, partial) = begin(directory, state)?;
    let model = &state.config.model;
    published::write(model, &snapshot.values, &partial, tokenizer)?;
    let list = ParameterList::of(model);
    write_moments(&partial.join(OPTIMIZER), &list, &[list.range()], &[list.range()], snapshot)?;
    write_json(&partial.join(STATE), state)?;
    let sums = checksums(&partial)?;
    commit(directory, &partial, &path, &sums)?;
    Ok(path)
}

/// The same by all ranks of `team` together, each of which has the `snapshot` of its shard: rank 0 makes the directory, all
/// shards are written, each by one that has it, and rank 0 commits what was written.
///
/// # Errors
/// As [`save`], and [`Error::Rank`] when another rank cannot write; then there is no checkpoint of this step.
pub fn save_together(
    directory: &Path,
    team: &Team,
    snapshot: &Snapshot,
    state: &State,
    tokenizer: Option<&Path>,
) -> Result<PathBuf, Error> {
    let (group, rank) = (team.all.as_ref(), team.all.rank());
    let (path, partial) = (place(directory, state), files::partial(&place(directory, state)));
    let begun = match rank {
        0 => begin(directory, state).and_then(|_| fs::create_dir_all(&partial).map_err(Error::io(&partial))),
        _ => Ok(()),
    };
    all_of(group, begun.map(|()| String::new()))?;
    let own = match team.writes() {
        true => write_shard(&partial, team, snapshot, state),
        false => Ok(BTreeMap::new()),
    };
    let text = own.and_then(|sums| serde_json::to_string(&sums).map_err(|error| Error::format(&partial, error)));
    let written = all_of(group, text)?;
    let committed = match rank {
        0 => commit_shards(directory, &partial, &path, state, tokenizer, &written),
        _ => Ok(()),
    };
    all_of(group, committed.map(|()| String::new()))?;
    Ok(path)
}

/// Writes the shard of one rank; the checksums of its files.
fn write_shard(
    partial: &Path,
    team: &Team,
    snapshot: &Snapshot,
    state: &State,
) -> Result<BTreeMap<String, String>, Error> {
    let (partition, (number, count)) = (team.partition(&state.config), team.shard());
    let (list, held) = (partition.parameters(), partition.shard(team.inner.rank()));
    // What all ranks have that share a block is written by the first of them.
    let written = held.iter().enumerate().filter(|(bucket, _)| team.tensor.rank() == 0 || partition.is_split(*bucket));
    let ranges: Vec<Range<usize>> = written.map(|(_, range)| range.clone()).collect();
    let [weights, moments] = [published::WEIGHTS, MOMENTS_OF].map(|kind| published::shard_name(kind, number, count));
    let values = Shard { ranges: &held, values: &snapshot.values };
    files::replace(&partial.join(&weights), |path| tensors::write(path, list, &ranges, &[("", &values)]))?;
    write_moments(&partial.join(&moments), list, &ranges, &held, snapshot)?;
    let sum = |name: String| checksum(&partial.join(&name)).map(|sum| (name, sum));
    [weights, moments].into_iter().map(sum).collect()
}

/// Rank 0: what is beside the shards, and the commit.
fn commit_shards(
    directory: &Path,
    partial: &Path,
    path: &Path,
    state: &State,
    tokenizer: Option<&Path>,
    written: &[String],
) -> Result<(), Error> {
    published::write_description(&state.config.model, partial, tokenizer)?;
    write_json(&partial.join(STATE), state)?;
    let mut sums = BTreeMap::new();
    for text in written {
        let of_rank: BTreeMap<String, String> =
            serde_json::from_str(text).map_err(|error| Error::format(partial, error))?;
        sums.extend(of_rank);
    }
    for name in names(partial)? {
        if !sums.contains_key(&name) {
            sums.insert(name.clone(), checksum(&partial.join(&name))?);
        }
    }
    commit(directory, partial, path, &sums)
}

fn place(directory: &Path, state: &State) -> PathBuf {
    directory.join(format!("step-{:06}", state.step))
}

/// Where a checkpoint goes, and where it is made; what a crash left there is removed.
fn begin(directory: &Path, state: &State) -> Result<(PathBuf, PathBuf), Error> {
    let path = place(directory, state);
    let partial = files::partial(&path);
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(Error::io(&partial))?;
    }
    Ok((path, partial))
}

/// Writes the moments in `ranges` of a snapshot that has those in `held`.
fn write_moments(
    path: &Path,
    list: &ParameterList,
    ranges: &[Range<usize>],
    held: &[Range<usize>],
    snapshot: &Snapshot,
) -> Result<(), Error> {
    let [first, second] = [&snapshot.first, &snapshot.second].map(|values| Shard { ranges: held, values });
    let buffers: [(&str, &dyn Values); 2] = [(MOMENTS[0], &first), (MOMENTS[1], &second)];
    files::replace(path, |path| tensors::write(path, list, ranges, &buffers))
}

/// Gives a checkpoint that is written its checksums and its name.
fn commit(directory: &Path, partial: &Path, path: &Path, sums: &BTreeMap<String, String>) -> Result<(), Error> {
    write_json(&partial.join(CHECKSUMS), sums)?;
    if path.try_exists().map_err(Error::io(path))? {
        // Nobody has gone on from it; but what was trained is not removed.
        set_aside(path)?;
    }
    fs::rename(partial, path).map_err(Error::io(path))?;
    files::sync(directory)
}

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// The newest so many; all for 0.
    pub newest: usize,
    /// And those of steps that are a multiple of this; 0 adds none.
    pub every_steps: u64,
}

/// Writes checkpoints, one at a time: of one rank on a thread of its own; several write together, and go on when all have.
#[derive(Debug)]
pub struct Writer {
    directory: PathBuf,
    tokenizer: Option<PathBuf>,
    keep: Keep,
    team: Team,
    running: Option<JoinHandle<Result<PathBuf, Error>>>,
    written: Option<PathBuf>,
}

impl Writer {
    /// A writer into `directory`.
    pub fn new(directory: &Path, tokenizer: Option<&Path>, keep: Keep, team: &Team) -> Self {
        Self {
            directory: directory.to_owned(),
            tokenizer: tokenizer.map(Path::to_owned),
            keep,
            team: team.clone(),
            running: None,
            written: None,
        }
    }

    /// Begins to write a checkpoint, after the one before is done.
    ///
    /// # Errors
    /// What kept the one before from being written.
    pub fn begin(&mut self, pending: Pending, mut state: State) -> Result<(), Error> {
        self.finish()?;
        if self.team.all.world() > 1 {
            let snapshot = pending()?;
            state.skipped = snapshot.skipped;
            let tokenizer = self.tokenizer.as_deref();
            self.written = Some(save_together(&self.directory, &self.team, &snapshot, &state, tokenizer)?);
            if self.team.all.rank() == 0 {
                prune(&self.directory, self.keep)?;
            }
            return Ok(());
        }
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
            None => Ok(self.written.take()),
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
    let sum = |name: String| checksum(&directory.join(&name)).map(|sum| (name, sum));
    names(directory)?.into_iter().map(sum).collect()
}

/// The names of the files in a checkpoint, but that of the list of checksums, in order.
fn names(directory: &Path) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(Error::io(directory))? {
        let name = entry.map_err(Error::io(directory))?.file_name().to_string_lossy().into_owned();
        if name != CHECKSUMS {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
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
    verify_share(path, 0, 1)
}

/// [`verify`] by `world` ranks, each of which reads some of the files.
fn verify_share(path: &Path, rank: usize, world: usize) -> Result<(), Error> {
    let want: BTreeMap<String, String> = read_json(&path.join(CHECKSUMS))?;
    let have = names(path)?;
    let refuse = |name: &str, reason| Err(Error::format(&path.join(name), reason));
    for (index, (name, want)) in want.iter().enumerate() {
        if !have.contains(name) {
            return refuse(name, "is missing");
        }
        if index % world == rank && checksum(&path.join(name))? != *want {
            return refuse(name, "does not have the checksum it was written with");
        }
    }
    match have.iter().find(|name| !want.contains_key(*name)) {
        Some(name) => refuse(name, "does not belong to the checkpoint"),
        None => Ok(()),
    }
}

/// Verifies and loads the checkpoint `path`.
///
/// # Errors
/// [`Error::Io`] or [`Error::Format`] with the file that is not what it has to be.
pub fn load(path: &Path) -> Result<Checkpoint, Error> {
    verify(path)?;
    open(path)
}

/// [`load`] of a checkpoint that was verified.
fn open(path: &Path) -> Result<Checkpoint, Error> {
    let state: State = read_json(&path.join(STATE))?;
    let model = published::read_config(&path.join(published::CONFIG))?;
    let list = ParameterList::of(&model);
    let weights = published::open(path, &list)?;
    let moments = Store::open(published::tensor_files(path, OPTIMIZER, MOMENTS_OF)?, &list, &MOMENTS)?;
    Ok(Checkpoint { path: path.to_owned(), model, state, weights, moments })
}

/// The checkpoints in `directory` by step, the oldest first; none when it does not exist. Those that were found damaged have
/// other names, and are none.
///
/// # Errors
/// [`Error::Io`] when the directory cannot be read.
pub fn list(directory: &Path) -> Result<Vec<(u64, PathBuf)>, Error> {
    let of = |path: PathBuf| Some((path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?, path));
    let mut checkpoints: Vec<(u64, PathBuf)> = entries(directory)?.into_iter().filter_map(of).collect();
    checkpoints.sort();
    Ok(checkpoints)
}

/// What is in a directory; nothing when it does not exist.
fn entries(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let found = match fs::read_dir(directory) {
        Ok(found) => found,
        // Only that: a directory that cannot be read for the moment is not empty.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(directory)(error)),
    };
    found.map(|entry| entry.map(|entry| entry.path()).map_err(Error::io(directory))).collect()
}

/// Why a checkpoint is damaged, nothing where it is whole: a file is not what was written, so nobody can go on from it, now
/// or later.
///
/// # Errors
/// [`Error::Io`] where that cannot be told: the file system does not give what it has.
fn damage(verified: Result<(), Error>) -> Result<String, Error> {
    use io::ErrorKind::{NotFound, UnexpectedEof};
    match verified {
        Ok(()) => Ok(String::new()),
        Err(Error::Io { path, source }) if !matches!(source.kind(), NotFound | UnexpectedEof) => {
            Err(Error::Io { path, source })
        }
        Err(error) => Ok(error.to_string()),
    }
}

/// An error that keeps the run from going on from a checkpoint, with what to do about it.
fn advise(error: Error, checkpoint: &Path) -> Error {
    let advice = format!(
        "no checkpoint was changed: start again when this is mended, or move {} away to go on from the one before",
        checkpoint.display()
    );
    match error {
        Error::Io { path, source } => {
            Error::Io { path, source: io::Error::new(source.kind(), format!("{source}; {advice}")) }
        }
        Error::Format { path, reason } => Error::Format { path, reason: format!("{reason}; {advice}") },
        other => other,
    }
}

/// Gives a checkpoint that is not used the name `step-N.damaged`, or one with a number where that is taken: what was trained
/// is removed by people alone.
fn set_aside(path: &Path) -> Result<PathBuf, Error> {
    let mut number = 1;
    loop {
        let mut name = path.as_os_str().to_owned();
        name.push(if number == 1 { ".damaged".to_owned() } else { format!(".damaged-{number}") });
        let aside = PathBuf::from(name);
        if !aside.try_exists().map_err(Error::io(&aside))? {
            fs::rename(path, &aside).map_err(Error::io(path))?;
            return Ok(aside);
        }
        number += 1;
    }
}

/// Loads the newest checkpoint in `directory` that verifies, the same on all ranks of `group`, which share the reading.
/// Each newer one with a file that is missing or not as it was written is named `step-N.damaged`, and told as a warning.
///
/// # Errors
/// [`Error::Io`] when the directory or a file of a checkpoint cannot be read, which is no damage: a file system may be away
/// for a moment. [`Error::Format`] for a checkpoint that is as it was written, but not by this version of the program.
/// [`Error::Rank`] when that is so on another rank.
pub fn load_newest(directory: &Path, group: &dyn Collective) -> Result<Option<Checkpoint>, Error> {
    let leads = group.rank() == 0;
    // Rank 0 says which there are.
    let steps = if leads { list(directory) } else { Ok(Vec::new()) };
    let steps = steps.map(|steps| steps.iter().map(|(step, _)| format!("{step:06}\n")).collect::<String>());
    let steps = all_of(group, steps)?.swap_remove(0);
    for step in steps.lines().rev() {
        let path = directory.join(format!("step-{step}"));
        // A directory that rank 0 has seen is there for all, or it is not the same on all hosts.
        let seen = names(&path).map(|mut names| {
            names.extend(path.join(CHECKSUMS).exists().then(|| CHECKSUMS.to_owned()));
            names.join(", ")
        });
        let seen = seen.map_err(|error| advise(error, &path));
        let seen = all_of(group, seen)?;
        if let Some(rank) = seen.iter().position(|names| *names != seen[0]) {
            let (first, other) = (&seen[0], &seen[rank]);
            let reason = format!("sees in {} {other}, where rank 0 sees {first}", path.display());
            return Err(Error::Rank { rank, reason });
        }
        // What one rank cannot read no rank goes on from, and none falls back for that.
        let found = damage(verify_share(&path, group.rank(), group.world())).map_err(|error| advise(error, &path));
        let found = all_of(group, found)?.into_iter().find(|reason| !reason.is_empty());
        let Some(reason) = found else {
            // As it was written: what this program cannot make of it is no damage.
            let (checkpoint, said) = match open(&path) {
                Ok(checkpoint) => (Some(checkpoint), Ok(String::new())),
                Err(error) => (None, Err(advise(error, &path))),
            };
            all_of(group, said)?;
            return Ok(checkpoint);
        };
        let aside = if leads { set_aside(&path).map(|aside| aside.display().to_string()) } else { Ok(String::new()) };
        let aside = all_of(group, aside)?.swap_remove(0);
        tracing::warn!(
            checkpoint = %path.display(),
            %aside,
            error = %reason,
            "a checkpoint is damaged and set aside; the run goes on from the one before. Remove it when you do not need it"
        );
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
    for path in entries(directory)? {
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.starts_with("step-") && name.ends_with(".partial")) {
            fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::Alone;

    /// A checkpoint of a tiny model after `step` steps.
    fn saved(directory: &Path, step: u64) -> PathBuf {
        let config = TrainConfig { model: ModelConfig::smallest(), ..TrainConfig::default() };
        let values = crate::model::initial_values(&config.model, step);
        let state = State { step, tokens: 8 * step, skipped: 0, loader: Value::Null, config };
        save(directory, &Snapshot::fresh(values), &state, None).unwrap()
    }

    fn newest(directory: &Path) -> Result<Option<PathBuf>, Error> {
        load_newest(directory, &Alone).map(|found| found.map(|checkpoint| checkpoint.path))
    }

    #[test]
    fn a_damaged_checkpoint_is_set_aside_and_does_not_count_as_one_that_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        assert!(newest(directory).unwrap().is_none() && newest(&directory.join("none")).unwrap().is_none());
        let (good, flipped, missing) = (saved(directory, 3), saved(directory, 6), saved(directory, 9));
        let path = flipped.join(OPTIMIZER);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, &bytes).unwrap();
        fs::remove_file(missing.join(published::MODEL)).unwrap();
        assert_eq!(newest(directory).unwrap(), Some(good.clone()));
        assert_eq!(fs::read(directory.join("step-000006.damaged").join(OPTIMIZER)).unwrap(), bytes);
        assert!(directory.join("step-000009.damaged").is_dir());
        // The newest of those that are left stays, whatever lies beside it.
        prune(directory, Keep { newest: 1, every_steps: 0 }).unwrap();
        assert_eq!(newest(directory).unwrap(), Some(good));
        // The same step again, and damaged again, through a file that does not belong to it.
        fs::write(saved(directory, 6).join("more"), "x").unwrap();
        assert_eq!(newest(directory).unwrap(), Some(directory.join("step-000003")));
        assert!(directory.join("step-000006.damaged-2").is_dir());
    }

    #[test]
    fn what_cannot_be_read_for_the_moment_is_no_damage() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        saved(directory, 3);
        let newer = saved(directory, 6);
        // A directory in the place of a file gives an error of its own kind to whoever reads it, root or not.
        let (path, away) = (newer.join(published::MODEL), directory.join("away"));
        fs::rename(&path, &away).unwrap();
        fs::create_dir(&path).unwrap();
        let error = newest(directory).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
        let error = error.to_string();
        assert!(
            error.contains("model.safetensors") && error.contains("move") && error.contains("step-000006"),
            "{error}"
        );
        fs::remove_dir(&path).unwrap();
        fs::rename(&away, &path).unwrap();
        assert_eq!(newest(directory).unwrap(), Some(newer.clone()));
        // A list of checkpoints that cannot be read is not an empty one.
        let file = directory.join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(newest(&file), Err(Error::Io { .. })));
        // As it was written, but by a program that knows more: no damage either.
        let text = fs::read_to_string(newer.join(STATE)).unwrap();
        fs::write(newer.join(STATE), text.replacen('{', "{\"of_tomorrow\": 1,", 1)).unwrap();
        write_json(&newer.join(CHECKSUMS), &checksums(&newer).unwrap()).unwrap();
        let error = newest(directory).unwrap_err().to_string();
        assert!(error.contains("of_tomorrow") && newer.is_dir(), "{error}");
    }
}
