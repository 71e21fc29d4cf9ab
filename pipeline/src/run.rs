//! One run: its directory, its settings, and what its stages have committed so far.

use std::any::{Any, TypeId};
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::FairSpillPool;
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use datafusion::prelude::{SessionConfig, SessionContext};

use crate::error::{Error, Result};
use crate::event::{Event, Observer};
use crate::manifest::JournalEntry;
use crate::shard::{BATCH_ROWS, Shard, part_name};

/// The first file of a run directory: what tells it from any other.
const LOCK: &str = "lock";

/// A sort keeps 10 MiB in reserve for merging what it spilled, and a task may hold two.
const LEAST_MEMORY_PER_TASK_BYTES: usize = 32 << 20;

/// How committed files are checked before they are built upon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Every file is read and its checksum compared.
    #[default]
    Checksums,
    /// Only that every file is there and as long as it was: for corpora that take long to read. A file whose bytes
    /// changed in place is not noticed.
    Sizes,
}

/// Settings of a run that never change its output.
#[derive(Clone)]
pub struct RunOptions {
    /// Tasks at a time.
    pub threads: usize,
    /// Bytes that DataFusion may hold before it spills to disk, over all tasks; and that the tasks of a stage hold together
    /// which says what one of them takes ([`crate::Stage::task_memory_bytes`]).
    pub memory_limit_bytes: usize,
    /// How committed files are checked.
    pub verify: Verify,
    /// Who watches.
    pub observer: Observer,
    /// Set by a signal handler: stop after a commit.
    pub stop: Arc<AtomicBool>,
}

impl RunOptions {
    /// One task per core, half of the machine's memory, nobody watching.
    pub fn new() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            memory_limit_bytes: default_memory_limit(),
            verify: Verify::default(),
            observer: Arc::new(|_| {}),
            stop: Arc::new(AtomicBool::new(false)),
        }
    }
}

impl Default for RunOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// Half of the memory that this process may take, as Linux tells it: the machine's, or its control group's where that
/// is less, as in a container. 4 GiB where nothing is told.
pub(crate) fn default_memory_limit() -> usize {
    let told = |path: &str, parse: fn(&str) -> Option<usize>| parse(&std::fs::read_to_string(path).ok()?);
    let limits = [
        told("/proc/meminfo", machine_memory),
        told("/sys/fs/cgroup/memory.max", group_memory),
        told("/sys/fs/cgroup/memory/memory.limit_in_bytes", group_memory),
    ];
    limits.into_iter().flatten().min().map_or(4 << 30, |bytes| bytes / 2)
}

/// Bytes of physical memory by `/proc/meminfo`.
fn machine_memory(text: &str) -> Option<usize> {
    let line = text.lines().find(|l| l.starts_with("MemTotal:"))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok()?.checked_mul(1024)
}

/// Bytes that a control group may take. No limit is written as `max` in version 2 and as a number beyond any machine's
/// memory in version 1.
fn group_memory(text: &str) -> Option<usize> {
    text.trim().parse::<usize>().ok().filter(|bytes| *bytes < 1 << 60)
}

/// Everything the tasks of a run share.
pub struct RunContext {
    dir: PathBuf,
    options: RunOptions,
    runtime: Arc<RuntimeEnv>,
    committed: RwLock<BTreeMap<String, BTreeMap<u32, JournalEntry>>>,
    shared: Mutex<HashMap<(TypeId, String), Arc<dyn Any + Send + Sync>>>,
    /// None for a run that is only looked at.
    _lock: Option<File>,
}

impl RunContext {
    /// A run in `dir`, which is created and locked while this lives: one process at a time works in
    /// a run directory. What a killed process has spilled is removed.
    pub fn new(dir: impl Into<PathBuf>, options: RunOptions) -> Result<Arc<Self>> {
        let dir = dir.into();
        check_memory(&options)?;
        std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        refuse_foreign(&dir)?;
        let lock = lock(&dir)?;
        let spill = dir.join("spill");
        match std::fs::remove_dir_all(&spill) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&spill, e)),
            _ => std::fs::create_dir_all(&spill).map_err(|e| Error::io(&spill, e))?,
        }
        Self::with(dir, options, DiskManagerMode::Directories(vec![spill]), Some(lock))
    }

    /// The run in `dir`, which need not exist, to plan it: nothing is written, and it does not matter whether a process
    /// works in it.
    pub fn look(dir: impl Into<PathBuf>, options: RunOptions) -> Result<Arc<Self>> {
        let dir = dir.into();
        check_memory(&options)?;
        if dir.exists() {
            refuse_foreign(&dir)?;
        }
        Self::with(dir, options, DiskManagerMode::Disabled, None)
    }

    fn with(dir: PathBuf, options: RunOptions, spill: DiskManagerMode, lock: Option<File>) -> Result<Arc<Self>> {
        let runtime = RuntimeEnvBuilder::new()
            .with_memory_pool(Arc::new(FairSpillPool::new(options.memory_limit_bytes)))
            .with_disk_manager_builder(DiskManagerBuilder::default().with_mode(spill))
            .build_arc()?;
        Ok(Arc::new(Self {
            dir,
            options,
            runtime,
            committed: RwLock::default(),
            shared: Mutex::default(),
            _lock: lock,
        }))
    }

    /// The run directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory of a stage.
    pub fn stage_dir(&self, stage: &str) -> PathBuf {
        self.dir.join(stage)
    }

    /// Settings.
    pub fn options(&self) -> &RunOptions {
        &self.options
    }

    /// Whether the run was asked to stop.
    pub fn stop_requested(&self) -> bool {
        self.options.stop.load(Ordering::Relaxed)
    }

    /// Tell the observer.
    pub fn emit(&self, event: &Event) {
        (self.options.observer)(event);
    }

    /// A fresh DataFusion session; see [`crate::stage::TaskContext::session`].
    pub fn session(&self) -> SessionContext {
        self.session_of(BATCH_ROWS)
    }

    /// A session whose plans hand on so many rows at a time.
    pub(crate) fn session_of(&self, batch_rows: usize) -> SessionContext {
        let config = SessionConfig::new()
            .with_target_partitions(1)
            .with_batch_size(batch_rows)
            .with_information_schema(false)
            // The build side of a join is the one we name: order and memory depend on it.
            .set_bool("datafusion.optimizer.join_reordering", false);
        SessionContext::new_with_config_rt(config, self.runtime.clone())
    }

    /// Committed tasks of a stage, by number.
    pub fn journal(&self, stage: &str) -> BTreeMap<u32, JournalEntry> {
        self.read_committed().get(stage).cloned().unwrap_or_default()
    }

    /// Committed shards of a stage, by number.
    pub fn shards(&self, stage: &str) -> Result<Vec<Shard>> {
        let committed = self.read_committed();
        let journal = committed
            .get(stage)
            .ok_or_else(|| Error::Recipe(format!("stage {stage} has no output in {}", self.dir.display())))?;
        Ok(journal.values().filter_map(|entry| self.shard_of(stage, entry)).collect())
    }

    /// Committed shard `index` of a stage.
    pub fn shard(&self, stage: &str, index: u32) -> Result<Shard> {
        self.read_committed()
            .get(stage)
            .and_then(|journal| journal.get(&index))
            .and_then(|entry| self.shard_of(stage, entry))
            .ok_or_else(|| Error::Recipe(format!("stage {stage} has no shard {index} in {}", self.dir.display())))
    }

    fn shard_of(&self, stage: &str, entry: &JournalEntry) -> Option<Shard> {
        let name = part_name(entry.task);
        let file = entry.files.iter().find(|f| f.path.as_os_str() == name.as_str())?;
        Some(Shard {
            index: entry.task,
            path: self.stage_dir(stage).join(&file.path),
            rows: file.rows,
            bytes: file.bytes,
            xxh3: file.xxh3,
        })
    }

    /// What `make` makes, such as a model or an index of the outputs of earlier stages, made once for all tasks of the stage at work
    /// and dropped when that has ended; `name` tells it from others of its type. This is how tasks share what is expensive to
    /// make: a stage that keeps it holds it from the first look at the recipe to the end of the run.
    ///
    /// # Errors
    /// Those of `make`; the next task tries again.
    pub fn shared<T: Send + Sync + 'static>(&self, name: &str, make: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        // A panic while the lock is held has put nothing in. The lock is held by who makes it: others want the same.
        let mut shared = self.shared.lock().unwrap_or_else(|e| e.into_inner());
        let key = (TypeId::of::<T>(), name.to_string());
        let held = shared.get(&key).and_then(|held| held.clone().downcast::<T>().ok());
        if let Some(held) = held {
            return Ok(held);
        }
        let made = Arc::new(make()?);
        shared.insert(key, made.clone());
        Ok(made)
    }

    /// Forget what the tasks of the stage that has ended shared.
    pub(crate) fn forget_shared(&self) {
        self.shared.lock().unwrap_or_else(|e| e.into_inner()).clear();
    }

    pub(crate) fn set_journal(&self, stage: &str, journal: BTreeMap<u32, JournalEntry>) {
        self.write_committed().insert(stage.into(), journal);
    }

    pub(crate) fn add_entry(&self, stage: &str, entry: JournalEntry) {
        self.write_committed().entry(stage.into()).or_default().insert(entry.task, entry);
    }

    // A panic while the lock is held cannot leave the map half changed.
    fn read_committed(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, BTreeMap<u32, JournalEntry>>> {
        self.committed.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write_committed(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, BTreeMap<u32, JournalEntry>>> {
        self.committed.write().unwrap_or_else(|e| e.into_inner())
    }
}

fn check_memory(options: &RunOptions) -> Result<()> {
    let least = options.threads.max(1) * LEAST_MEMORY_PER_TASK_BYTES;
    if options.memory_limit_bytes < least {
        return Err(Error::Recipe(format!(
            "a memory limit of {} bytes is too little for {} tasks at a time: give at least {least}, or fewer threads",
            options.memory_limit_bytes, options.threads
        )));
    }
    Ok(())
}

/// Stages clear their directories, so a directory that holds anything but a run is never worked in.
fn refuse_foreign(dir: &Path) -> Result<()> {
    let mut entries = std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    if entries.next().is_none() || dir.join(LOCK).exists() {
        return Ok(());
    }
    Err(Error::Recipe(format!("{} is not empty and not a run directory: choose another --run-dir", dir.display())))
}

/// Takes a directory for this process until the file that is given is closed.
///
/// # Errors
/// When another process has it.
pub fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(|e| Error::io(&path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Recipe(format!("another process is working in {}", dir.display()))),
        Err(TryLockError::Error(e)) => Err(Error::io(path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_linux_writes_it() {
        assert_eq!(machine_memory("MemFree: 5 kB\nMemTotal:       24576 kB\n"), Some(24 << 20));
        assert_eq!(machine_memory("MemFree: 5 kB\n"), None);
        assert_eq!(group_memory("2147483648\n"), Some(2 << 30));
        // No limit, in either version.
        assert_eq!(group_memory("max\n"), None);
        assert_eq!(group_memory("9223372036854771712\n"), None);
        assert!(default_memory_limit() > 0);
    }
}
