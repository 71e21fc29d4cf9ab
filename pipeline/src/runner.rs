//! The one runner: decides what is stale, executes tasks on all cores, commits, retries, resumes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::digest::Digest;
use crate::error::{Error, Result, Severity};
use crate::event::Event;
use crate::manifest::{FORMAT_VERSION, Journal, JournalEntry, Manifest, StageState, Totals, sync_dir};
use crate::run::{RunContext, RunOptions, Verify};
use crate::shard::{FileEntry, temporary_dir};
use crate::stage::{Stage, Task, TaskContext, TaskReport};

/// A task is tried this often before it is reported as failed.
const TRIES: u32 = 3;
/// How often the runner looks at the stop flag.
const STOP_POLL: Duration = Duration::from_millis(20);

/// What there is to do for a stage, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum StageStatus {
    /// Never done in this run directory.
    Fresh,
    /// Done with another configuration, code or input: its output is thrown away and made again.
    Stale {
        /// What changed.
        reason: String,
    },
    /// Begun with this configuration; some tasks are left or their files damaged.
    Partial {
        /// Tasks whose output is whole.
        done: u32,
        /// Tasks in all.
        tasks: u32,
        /// Files that are missing or fail their checksum, and how.
        damaged: Vec<String>,
    },
    /// Done, and every file is whole.
    Done,
}

impl std::fmt::Display for StageStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fresh => f.write_str("fresh: no output yet"),
            Self::Stale { reason } => write!(f, "stale: {reason}"),
            Self::Partial { done, tasks, damaged } if damaged.is_empty() => {
                write!(f, "partial: {done} of {tasks} tasks done")
            }
            Self::Partial { done, tasks, damaged } => {
                write!(f, "partial: {done} of {tasks} tasks whole; {}", damaged.join("; "))
            }
            Self::Done => f.write_str("done: nothing changed, no damage found"),
        }
    }
}

/// The plan of one stage.
#[derive(Clone, Debug, Serialize)]
pub struct StagePlan {
    /// Stage name.
    pub stage: String,
    /// Fresh, stale, partial or done, and why.
    #[serde(flatten)]
    pub status: StageStatus,
    /// Fingerprint that its output will have.
    pub fingerprint: Digest,
    /// Names of its inputs.
    pub inputs: Vec<String>,
    #[serde(skip)]
    manifest: Manifest,
    /// Whole entries of the journal.
    #[serde(skip)]
    journal: BTreeMap<u32, JournalEntry>,
    /// Digests of entries that are damaged, by task: what a redone shard must come to again.
    #[serde(skip)]
    lost: BTreeMap<u32, JournalEntry>,
}

/// The stages up to and including the one called `until`; all without one.
///
/// # Errors
/// [`Error::Recipe`] when there is none of that name.
pub fn up_to<'a>(stages: &'a [Arc<dyn Stage>], until: Option<&str>) -> Result<&'a [Arc<dyn Stage>]> {
    let Some(until) = until else { return Ok(stages) };
    match stages.iter().position(|stage| stage.name() == until) {
        Some(last) => Ok(&stages[..=last]),
        None => {
            let names: Vec<&str> = stages.iter().map(|stage| stage.name()).collect();
            Err(Error::Recipe(format!("no stage is called {until}; there are {}", names.join(", "))))
        }
    }
}

/// Runs a list of stages in a run directory.
pub struct Runner {
    run: Arc<RunContext>,
    stages: Vec<Arc<dyn Stage>>,
}

impl Runner {
    /// A runner of `stages`, each after the stages it reads. What their settings cannot mean is told here, before any
    /// work.
    pub fn new(run: Arc<RunContext>, stages: Vec<Arc<dyn Stage>>) -> Result<Self> {
        let mut seen = BTreeSet::new();
        let mut schemas = BTreeMap::new();
        for stage in &stages {
            if let Some(input) = stage.inputs().into_iter().find(|i| !seen.contains(i)) {
                return Err(Error::Recipe(format!(
                    "stage {} reads {input}, which does not come before it",
                    stage.name()
                )));
            }
            stage.config()?;
            stage.check_settings(&schemas)?;
            schemas.extend(stage.schema().map(|schema| (stage.name().to_string(), schema)));
            if !seen.insert(stage.name().to_string()) {
                return Err(Error::Recipe(format!("two stages are called {}", stage.name())));
            }
        }
        Ok(Self { run, stages })
    }

    /// What there is to do up to and including `until`, without doing it. Committed files are checked as [`Verify`]
    /// says.
    pub fn plan(&self, until: Option<&str>) -> Result<Vec<StagePlan>> {
        let mut fingerprints: BTreeMap<String, Digest> = BTreeMap::new();
        let mut redone: BTreeSet<String> = BTreeSet::new();
        let stages = up_to(&self.stages, until)?;
        self.check_indices(stages)?;
        stages
            .iter()
            .map(|stage| {
                let plan = self.plan_stage(stage.as_ref(), &fingerprints, &redone)?;
                fingerprints.insert(plan.stage.clone(), plan.fingerprint);
                if matches!(plan.status, StageStatus::Fresh | StageStatus::Stale { .. }) {
                    redone.insert(plan.stage.clone());
                }
                Ok(plan)
            })
            .collect()
    }

    fn plan_stage(
        &self,
        stage: &dyn Stage,
        fingerprints: &BTreeMap<String, Digest>,
        redone: &BTreeSet<String>,
    ) -> Result<StagePlan> {
        let name = stage.name().to_string();
        let inputs = stage.inputs();
        let input_fingerprints: BTreeMap<String, Digest> =
            inputs.iter().map(|i| (i.clone(), fingerprints[i])).collect();
        let config = stage.config()?;
        let fingerprint = Digest::of_json(&serde_json::json!([name, stage.version(), config, input_fingerprints]));
        let wanted = Manifest {
            format: FORMAT_VERSION,
            stage: name.clone(),
            fingerprint,
            version: stage.version(),
            config,
            inputs: input_fingerprints,
            tasks: 0,
            state: StageState::Running,
            totals: Totals::default(),
            notes: serde_json::Value::Null,
        };
        let dir = self.run.stage_dir(&name);
        let mut plan = StagePlan {
            stage: name,
            status: StageStatus::Fresh,
            fingerprint,
            inputs,
            manifest: wanted,
            journal: BTreeMap::new(),
            lost: BTreeMap::new(),
        };
        // A damaged manifest stops the run: its stage may hold days of training, so it is for people to throw away.
        let Some(found) = Manifest::load(&dir)? else {
            return Ok(plan);
        };
        if found.fingerprint != fingerprint {
            plan.status = StageStatus::Stale { reason: difference(&found, &plan.manifest) };
            return Ok(plan);
        }
        if let Some(input) = plan.inputs.iter().find(|i| redone.contains(*i)) {
            plan.status = StageStatus::Stale { reason: format!("its input {input} is made again") };
            return Ok(plan);
        }
        let (entries, mut damaged) = Journal::inspect(&dir)?;
        let mut whole = BTreeMap::new();
        for (entry, fault) in self.faults(&dir, entries)? {
            match fault {
                None => {
                    whole.insert(entry.task, entry);
                }
                Some(reason) => {
                    damaged.push(reason);
                    plan.lost.insert(entry.task, entry);
                }
            }
        }
        plan.manifest.tasks = found.tasks;
        plan.status = if found.state == StageState::Done && whole.len() as u32 == found.tasks {
            StageStatus::Done
        } else {
            StageStatus::Partial { done: whole.len() as u32, tasks: found.tasks, damaged }
        };
        plan.journal = whole;
        Ok(plan)
    }

    /// The tasks committed in a stage's directory, each with what is wrong with one of its files, if anything.
    fn faults(&self, dir: &Path, entries: BTreeMap<u32, JournalEntry>) -> Result<Vec<(JournalEntry, Option<String>)>> {
        let verify = self.run.options().verify;
        // Big files on few cores: the checksum of each is taken on a thread of its own.
        entries
            .into_values()
            .collect::<Vec<_>>()
            .into_par_iter()
            .map(|e| {
                // Reading a large run takes minutes: a signal is heeded here, too.
                if self.run.stop_requested() {
                    return Err(Error::Interrupted);
                }
                let fault = e.files.iter().find_map(|file| fault(dir, file, verify));
                Ok((e, fault))
            })
            .collect()
    }

    /// Refuses to build upon damaged files of other runs: what they have lost would not be missed by anything later.
    fn check_indices(&self, stages: &[Arc<dyn Stage>]) -> Result<()> {
        let dirs: BTreeSet<&PathBuf> = stages.iter().flat_map(|stage| stage.indices()).collect();
        for dir in dirs {
            let (entries, mut damaged) = Journal::inspect(dir)?;
            damaged.extend(self.faults(dir, entries)?.into_iter().filter_map(|(_, fault)| fault));
            if !damaged.is_empty() {
                let reason = format!("{}; run that run again, which makes them anew", damaged.join("; "));
                return Err(Error::Corrupt { path: dir.clone(), reason });
            }
        }
        Ok(())
    }

    /// Run the stages that are not done, up to and including `until`.
    pub async fn run(&self, until: Option<&str>) -> Result<()> {
        let mut fingerprints: BTreeMap<String, Digest> = BTreeMap::new();
        let mut redone: BTreeSet<String> = BTreeSet::new();
        let stages = up_to(&self.stages, until)?;
        self.check_indices(stages)?;
        for stage in stages {
            let plan = self.plan_stage(stage.as_ref(), &fingerprints, &redone)?;
            fingerprints.insert(plan.stage.clone(), plan.fingerprint);
            if matches!(plan.status, StageStatus::Fresh | StageStatus::Stale { .. }) {
                redone.insert(plan.stage.clone());
            }
            let changed = self.run_stage(stage, plan).await;
            // However it ended: the next stage begins with the memory that this one had.
            self.run.forget_shared();
            if changed? {
                // A damaged shard was made again and came out otherwise: what was built on it is stale.
                redone.insert(stage.name().to_string());
            }
        }
        Ok(())
    }

    /// Do one stage; tells whether a redone shard differs from the one that was lost.
    async fn run_stage(&self, stage: &Arc<dyn Stage>, plan: StagePlan) -> Result<bool> {
        let started = Instant::now();
        let dir = self.run.stage_dir(&plan.stage);
        let StagePlan { stage: name, status, mut manifest, journal: whole, lost, .. } = plan;
        if self.run.stop_requested() {
            return Err(Error::Interrupted);
        }
        let started_event = |tasks: u32, left: usize| Event::StageStarted {
            stage: name.clone(),
            status: status.clone(),
            tasks: u64::from(tasks),
            done: (tasks as usize - left) as u64,
        };
        if status == StageStatus::Done {
            self.run.emit(&started_event(manifest.tasks, 0));
            self.run.set_journal(&name, whole);
            return Ok(false);
        }
        if matches!(status, StageStatus::Fresh | StageStatus::Stale { .. }) {
            clear(&dir)?;
        }
        clear(&temporary_dir(&dir))?;
        let tasks = stage.tasks(&self.run).await?;
        manifest.tasks = tasks.len() as u32;
        manifest.save(&dir)?;
        let mut left: Vec<Task> = tasks
            .into_iter()
            .filter(|t| whole.get(&t.index).is_none_or(|e| e.inputs != Digest::of_json(&t.inputs)))
            .collect();
        self.run.emit(&started_event(manifest.tasks, left.len()));
        let mut totals = Totals::default();
        whole.values().for_each(|e| totals.add(e));
        self.run.set_journal(&name, whole);
        let (mut journal, _) = Journal::open(&dir)?;
        stage.check(&self.run, &totals)?;
        left.reverse();
        let changed = self.run_tasks(stage, &dir, left, &mut journal, &mut totals, &lost).await?;
        // Sums anew: a redone task was journalled twice.
        totals = Totals::default();
        self.run.journal(&name).values().for_each(|e| totals.add(e));
        manifest.state = StageState::Done;
        manifest.totals = totals.clone();
        if let [entry] = self.run.journal(&name).into_values().collect::<Vec<_>>().as_slice() {
            manifest.notes = entry.notes.clone();
        }
        manifest.save(&dir)?;
        clear(&temporary_dir(&dir))?;
        self.run.emit(&Event::StageFinished {
            stage: name,
            rows_read: totals.rows_read,
            rows_kept: totals.rows_kept,
            seconds: started.elapsed().as_secs_f64(),
        });
        Ok(changed)
    }

    /// Execute tasks, as many at a time as there are threads and the memory limit has room for; `left` is taken from its end.
    async fn run_tasks(
        &self,
        stage: &Arc<dyn Stage>,
        dir: &Path,
        mut left: Vec<Task>,
        journal: &mut Journal,
        totals: &mut Totals,
        lost: &BTreeMap<u32, JournalEntry>,
    ) -> Result<bool> {
        let at_a_time = tasks_at_a_time(stage.name(), self.run.options(), stage.task_memory_bytes(&self.run)?)?;
        let mut running: JoinSet<(Task, u32, Instant, Result<TaskReport>)> = JoinSet::new();
        let mut failures = Vec::new();
        let (mut changed, mut stopped) = (false, false);
        let mut again: Vec<(Task, u32)> = Vec::new();
        loop {
            while running.len() < at_a_time && !self.run.stop_requested() {
                let Some((task, attempt)) = again.pop().or_else(|| left.pop().map(|t| (t, 1))) else {
                    break;
                };
                let (stage, run) = (stage.clone(), self.run.clone());
                running.spawn(async move {
                    let started = Instant::now();
                    let context = TaskContext::new(run, stage.name(), task.clone());
                    // A panic of a task is a failure of that task, like any other.
                    let work = std::panic::AssertUnwindSafe(stage.execute(&context));
                    let result = match futures::FutureExt::catch_unwind(work).await {
                        Ok(result) => result,
                        Err(panic) => Err(Error::shard(format!("panicked: {}", panic_message(panic.as_ref())))),
                    };
                    (task, attempt, started, result)
                });
            }
            if running.is_empty() {
                break;
            }
            let joined = tokio::select! {
                joined = running.join_next() => joined,
                () = tokio::time::sleep(STOP_POLL) => {
                    if self.run.stop_requested() && !stage.stops_itself() {
                        running.shutdown().await;
                        stopped = true;
                        break;
                    }
                    continue;
                }
            };
            let Some(joined) = joined else { break };
            let (task, attempt, started, result) = joined.map_err(Error::abort)?;
            match result {
                Ok(report) => {
                    let entry = commit(dir, &task, report, started.elapsed(), journal)?;
                    if let Some(old) = lost.get(&task.index) {
                        changed |= old.files.iter().map(|f| f.xxh3).ne(entry.files.iter().map(|f| f.xxh3));
                    }
                    totals.add(&entry);
                    self.run.add_entry(stage.name(), entry.clone());
                    self.run.emit(&Event::TaskCommitted { stage: stage.name().into(), entry });
                    stage.check(&self.run, totals)?;
                }
                Err(error) => match error.severity() {
                    Severity::Abort => return Err(error),
                    Severity::Interrupted => {
                        stopped = true;
                        break;
                    }
                    Severity::Shard if attempt < TRIES => {
                        self.run.emit(&Event::TaskRetried {
                            stage: stage.name().into(),
                            task: task.index,
                            reason: error.to_string(),
                        });
                        again.push((task, attempt + 1));
                    }
                    Severity::Shard => failures.push((task.index, error.to_string())),
                },
            }
        }
        if stopped || !left.is_empty() || !again.is_empty() {
            return Err(Error::Interrupted);
        }
        if !failures.is_empty() {
            failures.sort();
            return Err(Error::TasksFailed { stage: stage.name().into(), failures });
        }
        Ok(changed)
    }
}

/// How many tasks are done at a time, of which each holds `bytes`.
fn tasks_at_a_time(stage: &str, options: &RunOptions, bytes: u64) -> Result<usize> {
    let limit = options.memory_limit_bytes as u64;
    if bytes > limit {
        let (needed, limit) = (bytes.div_ceil(1 << 20), limit >> 20);
        return Err(Error::Limit(format!(
            "a task of stage {stage} holds {needed} MiB, and the memory limit is {limit} MiB: give --memory-limit {needed}MiB or more"
        )));
    }
    let room = usize::try_from(limit / bytes.max(1)).unwrap_or(usize::MAX);
    Ok(options.threads.max(1).min(room))
}

/// Make a task's files visible, then journal it: the line is the commit.
fn commit(dir: &Path, task: &Task, report: TaskReport, spent: Duration, journal: &mut Journal) -> Result<JournalEntry> {
    let mut directories = BTreeSet::new();
    let mut files = Vec::with_capacity(report.files.len());
    for pending in report.files {
        let path = dir.join(&pending.entry.path);
        let parent = path.parent().unwrap_or(dir).to_path_buf();
        fs::create_dir_all(&parent).map_err(|e| Error::io(&parent, e))?;
        fs::rename(&pending.temporary, &path).map_err(|e| Error::io(&path, e))?;
        directories.insert(parent);
        files.push(pending.entry);
    }
    for directory in &directories {
        sync_dir(directory)?;
    }
    let entry = JournalEntry {
        task: task.index,
        inputs: Digest::of_json(&task.inputs),
        files,
        rows_read: report.rows_read,
        rows_kept: report.rows_kept,
        dropped: report.dropped,
        notes: report.notes,
        seconds: spent.as_secs_f64(),
    };
    journal.commit(&entry)?;
    Ok(entry)
}

/// An empty directory at `dir`. The manifest goes first: without it the rest means nothing, so a
/// crash in between leaves a stage that is fresh.
fn clear(dir: &Path) -> Result<()> {
    let gone = |result: std::io::Result<()>, path: &Path| match result {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, e)),
        _ => Ok(()),
    };
    let manifest = Manifest::path(dir);
    gone(fs::remove_file(&manifest), &manifest)?;
    gone(fs::remove_dir_all(dir), dir)?;
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))
}

/// What is wrong with a committed file, if anything.
fn fault(dir: &Path, file: &FileEntry, verify: Verify) -> Option<String> {
    let name = file.path.display();
    match fs::metadata(dir.join(&file.path)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Some(format!("{name} is missing"));
        }
        Err(e) => return Some(format!("{name}: {e}")),
        Ok(found) if found.len() != file.bytes => {
            return Some(format!("{name} has {} bytes, not {}", found.len(), file.bytes));
        }
        Ok(_) if verify == Verify::Sizes => return None,
        Ok(_) => {}
    }
    match Digest::of_file(&dir.join(&file.path)) {
        Err(e) => Some(format!("{name}: {e}")),
        Ok(found) if found != file.xxh3 => Some(format!("{name} fails its checksum")),
        Ok(_) => None,
    }
}

/// Why a manifest is not the one wanted, for people.
fn difference(found: &Manifest, wanted: &Manifest) -> String {
    if found.version != wanted.version {
        return format!("the stage's code is version {}, its output of version {}", wanted.version, found.version);
    }
    let mut changes = Vec::new();
    compare("", &found.config, &wanted.config, &mut changes);
    if !changes.is_empty() {
        let more = changes.len().saturating_sub(3);
        changes.truncate(3);
        if more > 0 {
            changes.push(format!("and {more} more"));
        }
        return changes.join(", ");
    }
    let input = wanted.inputs.iter().find(|(name, print)| found.inputs.get(*name) != Some(print));
    match input {
        Some((name, _)) => format!("its input {name} has changed"),
        None => "its inputs have changed".into(),
    }
}

/// Collect `path: old → new` of every leaf that differs.
fn compare(path: &str, old: &serde_json::Value, new: &serde_json::Value, changes: &mut Vec<String>) {
    use serde_json::Value::{Array, Object};
    let at = |key: &str| {
        if path.is_empty() { key.to_string() } else { format!("{path}.{key}") }
    };
    match (old, new) {
        (Object(a), Object(b)) => {
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let null = serde_json::Value::Null;
                compare(&at(key), a.get(key).unwrap_or(&null), b.get(key).unwrap_or(&null), changes);
            }
        }
        (Array(a), Array(b)) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                compare(&at(&i.to_string()), a, b, changes);
            }
        }
        (Array(a), Array(b)) => changes.push(format!("{path}: {} → {} entries", a.len(), b.len())),
        (a, b) if a != b => changes.push(format!("{path}: {a} → {b}")),
        _ => {}
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|s| (*s).to_string())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".into())
}
