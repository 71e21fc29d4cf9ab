//! The runner against small stages of its own: resume, staleness, damage, retries, determinism.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use arrow::array::{RecordBatch, UInt64Array};
use arrow::datatypes::{DataType, Field, Schema};
use async_trait::async_trait;
use datafusion::prelude::{col, lit, when};
use pipeline::digest::Digest;
use pipeline::stage::tasks_per_shard;
use pipeline::{
    Error, Event, Output, Result, RowsRead, RunContext, RunOptions, Runner, Stage, StageStatus, Task, TaskContext,
    TaskReport,
};

/// Makes `tasks` shards of the numbers from `first`.
struct Numbers {
    tasks: u32,
    first: u64,
    /// Executions that fail before one succeeds.
    failures: AtomicU32,
}

const ROWS: u64 = 5000;

#[async_trait]
impl Stage for Numbers {
    fn name(&self) -> &str {
        "numbers"
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        vec![]
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "tasks": self.tasks, "first": self.first }))
    }
    async fn tasks(&self, _: &RunContext) -> Result<Vec<Task>> {
        Ok((0..self.tasks).map(|index| Task { index, inputs: index.into() }).collect())
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        if self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
            return Err(Error::shard("the network is down"));
        }
        let start = self.first + task.index() as u64 * ROWS;
        let numbers = UInt64Array::from_iter_values(start..start + ROWS);
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::UInt64, false)]));
        let batch = RecordBatch::try_new(schema, vec![Arc::new(numbers)])?;
        let plan = task.session().read_batch(batch)?;
        task.write(plan, Output { kept: &["n"], dropped: &[] }, RowsRead::Made).await
    }
}

/// Drops multiples of `divisor`.
struct Sieve {
    divisor: u64,
}

#[async_trait]
impl Stage for Sieve {
    fn name(&self) -> &str {
        "sieve"
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        vec!["numbers".into()]
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "divisor": self.divisor }))
    }
    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, "numbers")
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = task.session();
        let rows = task.run.shard("numbers", task.index())?.rows;
        let multiple = when((col("n") % lit(self.divisor)).eq(lit(0u64)), lit("multiple")).end()?;
        let plan = task.read(&session, "numbers", task.index()).await?.with_column("rule", multiple)?;
        task.write(plan, Output { kept: &["n"], dropped: &["n", "rule"] }, RowsRead::Known(rows)).await
    }
}

fn stages(divisor: u64, failures: u32) -> Vec<Arc<dyn Stage>> {
    let failures = AtomicU32::new(failures);
    vec![Arc::new(Numbers { tasks: 4, first: 0, failures }), Arc::new(Sieve { divisor })]
}

fn runner(dir: &Path, threads: usize, divisor: u64, failures: u32) -> Runner {
    let options = RunOptions { threads, ..RunOptions::new() };
    Runner::new(RunContext::new(dir, options).unwrap(), stages(divisor, failures)).unwrap()
}

fn statuses(dir: &Path, divisor: u64) -> Vec<StageStatus> {
    runner(dir, 1, divisor, 0).plan(None).unwrap().into_iter().map(|p| p.status).collect()
}

/// Digest of every Parquet file below `dir`.
fn outputs(dir: &Path) -> BTreeMap<String, Digest> {
    let mut found = BTreeMap::new();
    let mut left = vec![dir.to_path_buf()];
    while let Some(next) = left.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|e| e == "parquet") {
                let name = path.strip_prefix(dir).unwrap().display().to_string();
                found.insert(name, Digest::of_file(&path).unwrap());
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_done_once_and_its_bytes_do_not_depend_on_threads() {
    let dir = tempfile::tempdir().unwrap();
    let (one, four) = (dir.path().join("one [*]"), dir.path().join("four"));
    runner(&one, 1, 3, 0).run(None).await.unwrap();
    runner(&four, 4, 3, 0).run(None).await.unwrap();
    assert_eq!(outputs(&one), outputs(&four));
    assert_eq!(outputs(&one).len(), 4 + 8);
    assert_eq!(statuses(&one, 3), [StageStatus::Done, StageStatus::Done]);
    let totals = &pipeline::status::summaries(&one).unwrap()[1].totals;
    assert_eq!(totals.rows_read, 4 * ROWS);
    assert_eq!(totals.dropped["multiple"], (4 * ROWS).div_ceil(3));
    assert_eq!(totals.rows_kept + totals.rows_dropped(), totals.rows_read);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_threshold_makes_only_its_stage_stale() {
    let dir = tempfile::tempdir().unwrap();
    runner(dir.path(), 2, 3, 0).run(None).await.unwrap();
    let [first, second] = statuses(dir.path(), 5).try_into().unwrap();
    assert_eq!(first, StageStatus::Done);
    assert_eq!(second, StageStatus::Stale { reason: "divisor: 3 → 5".into() });
    runner(dir.path(), 2, 5, 0).run(None).await.unwrap();
    let fresh = tempfile::tempdir().unwrap();
    runner(fresh.path(), 2, 5, 0).run(None).await.unwrap();
    assert_eq!(outputs(dir.path()), outputs(fresh.path()));
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_and_missing_shards_are_noticed_and_made_again() {
    let dir = tempfile::tempdir().unwrap();
    runner(dir.path(), 2, 3, 0).run(None).await.unwrap();
    let whole = outputs(dir.path());
    let flipped = dir.path().join("numbers/part-00001.parquet");
    let mut bytes = std::fs::read(&flipped).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&flipped, bytes).unwrap();
    std::fs::remove_file(dir.path().join("sieve/dropped/part-00002.parquet")).unwrap();
    let [first, second] = statuses(dir.path(), 3).try_into().unwrap();
    let damaged = vec!["part-00001.parquet fails its checksum".to_string()];
    assert_eq!(first, StageStatus::Partial { done: 3, tasks: 4, damaged });
    let damaged = vec!["dropped/part-00002.parquet is missing".to_string()];
    assert_eq!(second, StageStatus::Partial { done: 3, tasks: 4, damaged });
    runner(dir.path(), 2, 3, 0).run(None).await.unwrap();
    assert_eq!(outputs(dir.path()), whole);
    assert_eq!(statuses(dir.path(), 3), [StageStatus::Done, StageStatus::Done]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_task_is_retried_then_reported_while_others_commit() {
    let dir = tempfile::tempdir().unwrap();
    runner(dir.path(), 1, 3, 2).run(None).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    // With one thread the first task uses up all three tries.
    let error = runner(dir.path(), 1, 3, 3).run(None).await.unwrap_err();
    assert!(matches!(&error, Error::TasksFailed { failures, .. } if failures.len() == 1), "{error}");
    assert!(error.to_string().contains("task 0: the network is down"), "{error}");
    let partial = StageStatus::Partial { done: 3, tasks: 4, damaged: vec![] };
    assert_eq!(statuses(dir.path(), 3), [partial, StageStatus::Fresh]);
}

#[tokio::test(flavor = "multi_thread")]
async fn until_and_stop_leave_a_run_that_continues() {
    let dir = tempfile::tempdir().unwrap();
    runner(dir.path(), 2, 3, 0).run(Some("numbers")).await.unwrap();
    assert_eq!(statuses(dir.path(), 3), [StageStatus::Done, StageStatus::Fresh]);
    let error = runner(dir.path(), 2, 3, 0).run(Some("nothing")).await.unwrap_err();
    assert!(error.to_string().contains("there are numbers, sieve"), "{error}");

    let stop = Arc::new(AtomicBool::new(false));
    let (flag, seen) = (stop.clone(), Arc::new(Mutex::new(0)));
    let counter = seen.clone();
    let observer = Arc::new(move |event: &Event| {
        if matches!(event, Event::TaskCommitted { .. }) {
            *counter.lock().unwrap() += 1;
            flag.store(true, Ordering::Relaxed);
        }
    });
    let options = RunOptions { threads: 1, stop, observer, ..RunOptions::new() };
    let stopped = Runner::new(RunContext::new(dir.path(), options).unwrap(), stages(3, 0)).unwrap();
    assert!(matches!(stopped.run(None).await, Err(Error::Interrupted)));
    drop(stopped);
    assert_eq!(*seen.lock().unwrap(), 1);
    let partial = StageStatus::Partial { done: 1, tasks: 4, damaged: vec![] };
    assert_eq!(statuses(dir.path(), 3), [StageStatus::Done, partial]);
    runner(dir.path(), 2, 3, 0).run(None).await.unwrap();
    assert_eq!(statuses(dir.path(), 3), [StageStatus::Done, StageStatus::Done]);

    let plan = runner(dir.path(), 1, 3, 0).plan(Some("numbers")).unwrap();
    assert_eq!(plan.iter().map(|stage| stage.stage.as_str()).collect::<Vec<_>>(), ["numbers"]);
    // A signal is heeded while checksums are taken.
    let options = RunOptions { stop: Arc::new(AtomicBool::new(true)), ..RunOptions::new() };
    let stopped = Runner::new(RunContext::new(dir.path(), options).unwrap(), stages(3, 0)).unwrap();
    assert!(matches!(stopped.plan(None), Err(Error::Interrupted)));
}

/// Eight tasks that say how much memory each takes, and how many of them were at work at a time.
struct Heavy {
    bytes: u64,
    working: AtomicU32,
    most: Arc<AtomicU32>,
}

#[async_trait]
impl Stage for Heavy {
    fn name(&self) -> &str {
        "heavy"
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        vec![]
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::Value::Null)
    }
    async fn tasks(&self, _: &RunContext) -> Result<Vec<Task>> {
        Ok((0..8).map(|index| Task { index, inputs: index.into() }).collect())
    }
    fn task_memory_bytes(&self, _: &RunContext) -> Result<u64> {
        Ok(self.bytes)
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let at_work = 1 + self.working.fetch_add(1, Ordering::SeqCst);
        self.most.fetch_max(at_work, Ordering::SeqCst);
        // All tasks of this stage have one and the same, whoever comes first.
        let shared = task.run.shared("number", || Ok(task.index()))?;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        self.working.fetch_sub(1, Ordering::SeqCst);
        Ok(TaskReport { notes: serde_json::json!(*shared), ..TaskReport::default() })
    }
}

/// Shares with its tasks what the next stage looks for.
struct Holder {
    name: &'static str,
    before: Option<&'static str>,
    /// What it shares is alive as long as this can be upgraded.
    held: Arc<Mutex<std::sync::Weak<Vec<u8>>>>,
    fails: bool,
}

#[async_trait]
impl Stage for Holder {
    fn name(&self) -> &str {
        self.name
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        self.before.iter().map(ToString::to_string).collect()
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::Value::Null)
    }
    async fn tasks(&self, _: &RunContext) -> Result<Vec<Task>> {
        let held = self.held.lock().unwrap().upgrade().is_some();
        Ok((0..2).map(|index| Task { index, inputs: held.into() }).collect())
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        assert_eq!(task.task.inputs, serde_json::Value::Bool(false), "what the stage before shared is still there");
        let shared = task.run.shared("bytes", || Ok(vec![0; 1000]))?;
        *self.held.lock().unwrap() = Arc::downgrade(&shared);
        if self.fails { Err(Error::abort("on purpose")) } else { Ok(TaskReport::default()) }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_tasks_share_is_dropped_when_their_stage_has_ended() {
    for fails in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let held = Arc::new(Mutex::default());
        let stage =
            |name, before, fails| -> Arc<dyn Stage> { Arc::new(Holder { name, before, held: held.clone(), fails }) };
        let stages = vec![stage("first", None, false), stage("second", Some("first"), fails)];
        let run = RunContext::new(dir.path(), RunOptions::new()).unwrap();
        let done = Runner::new(run.clone(), stages).unwrap().run(None).await;
        assert_eq!(done.is_err(), fails, "{done:?}");
        assert!(held.lock().unwrap().upgrade().is_none(), "it outlives the last stage");
    }
}

/// Adds up the numbers of all shards, two of which meet.
struct Sum;

#[async_trait]
impl Stage for Sum {
    fn name(&self) -> &str {
        "sum"
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        vec!["numbers".into()]
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::Value::Null)
    }
    async fn tasks(&self, _: &RunContext) -> Result<Vec<Task>> {
        Ok(vec![Task { index: 0, inputs: serde_json::Value::Null }])
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let sum = Arc::new((Mutex::new((0u64, 0u32)), std::sync::Condvar::new()));
        let (into, threads) = (sum.clone(), task.run.options().threads);
        let take = move |batch: RecordBatch| {
            let numbers = batch.column(0).as_any().downcast_ref::<UInt64Array>().unwrap().values().iter().sum::<u64>();
            let (sum, came) = &*into;
            let mut sum = sum.lock().unwrap();
            (sum.0, sum.1) = (sum.0 + numbers, sum.1 + 1);
            came.notify_all();
            // The first waits for another that comes beside it.
            if threads > 1 && sum.1 == 1 {
                let wait = std::time::Duration::from_secs(20);
                let waited = came.wait_timeout_while(sum, wait, |sum| sum.1 < 2).unwrap();
                assert!(!waited.1.timed_out(), "shards are read one after the other");
            }
            Ok(())
        };
        task.each_batch_in_any_order("numbers", &["n"], take).await?;
        let sum = sum.0.lock().unwrap().0;
        Ok(TaskReport { notes: sum.into(), ..TaskReport::default() })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_are_read_side_by_side_where_their_order_does_not_matter() {
    for threads in [1, 2] {
        let dir = tempfile::tempdir().unwrap();
        let run = RunContext::new(dir.path(), RunOptions { threads, ..RunOptions::new() }).unwrap();
        let stages: Vec<Arc<dyn Stage>> =
            vec![Arc::new(Numbers { tasks: 4, first: 0, failures: AtomicU32::new(0) }), Arc::new(Sum)];
        Runner::new(run.clone(), stages).unwrap().run(None).await.unwrap();
        let n = 4 * ROWS;
        assert_eq!(run.journal("sum")[&0].notes, serde_json::json!(n * (n - 1) / 2));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_tasks_at_a_time_as_the_memory_limit_has_room_for() {
    const LIMIT: usize = 256 << 20;
    for (bytes, most) in [(0, 4), (64 << 20, 4), (100 << 20, 2), (256 << 20, 1)] {
        let dir = tempfile::tempdir().unwrap();
        let options = RunOptions { threads: 4, memory_limit_bytes: LIMIT, ..RunOptions::new() };
        let run = RunContext::new(dir.path(), options).unwrap();
        let seen = Arc::new(AtomicU32::new(0));
        let stage = Heavy { bytes, working: AtomicU32::new(0), most: seen.clone() };
        Runner::new(run.clone(), vec![Arc::new(stage)]).unwrap().run(None).await.unwrap();
        assert_eq!(seen.load(Ordering::SeqCst), most, "{bytes} bytes a task");
        let notes: Vec<_> = run.journal("heavy").into_values().map(|entry| entry.notes).collect();
        assert!(notes.len() == 8 && notes.iter().all(|note| *note == notes[0]), "{notes:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let options = RunOptions { threads: 4, memory_limit_bytes: LIMIT, ..RunOptions::new() };
    let stage = Heavy { bytes: 1 + LIMIT as u64, working: AtomicU32::new(0), most: Arc::default() };
    let runner = Runner::new(RunContext::new(dir.path(), options).unwrap(), vec![Arc::new(stage)]).unwrap();
    let error = runner.run(None).await.unwrap_err();
    assert!(matches!(&error, Error::Limit(reason) if reason.contains("give --memory-limit 257MiB or more")), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_do_not_share_a_run_directory() {
    let dir = tempfile::tempdir().unwrap();
    let _first = runner(dir.path(), 1, 3, 0);
    let Err(error) = RunContext::new(dir.path(), RunOptions::new()) else { panic!("the directory is locked") };
    assert!(error.to_string().contains("another process is working"), "{error}");
}
