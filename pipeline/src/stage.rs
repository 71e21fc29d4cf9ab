//! The contract of a stage, and what a task of a stage can do.
//!
//! A stage is shards in, shards out. It says what its configuration is, cuts its work into tasks that
//! depend on its inputs alone (never on the number of threads), and executes one task as a DataFusion
//! plan whose rows [`TaskContext::write`] routes to the kept and the dropped shard. Everything about
//! files, threads, retries, commits and resume belongs to the runner.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::{cast, filter_record_batch, is_not_null, is_null};
use arrow::datatypes::{DataType, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::common::JoinType;
use datafusion::dataframe::DataFrame;
use datafusion::prelude::{ParquetReadOptions, SessionContext, col};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::error::{Error, Result};
use crate::event::Event;
use crate::manifest::Totals;
use crate::run::RunContext;
use crate::shard::{
    BATCH_ROWS, PendingFile, PendingWriter, Shard, ShardWriter, TEXT_BATCH_ROWS, TextCompression, part_name,
};

/// Name of the verdict column: null keeps the row, anything else names the rule that drops it.
pub const RULE: &str = "rule";

/// One unit of work. Its output is shard `index` of the stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// Number of the task and of its output shard.
    pub index: u32,
    /// What the task reads, in the stage's own terms (splits of files, an upstream shard, a range).
    pub inputs: serde_json::Value,
}

/// Shards in, shards out.
#[async_trait]
pub trait Stage: Send + Sync {
    /// Name: the directory in the run, the table in SQL. Lower-case letters and underscores.
    fn name(&self) -> &str;

    /// Version of the code: raise it when the same input and configuration give other bytes.
    fn version(&self) -> u32;

    /// Names of the stages this one reads.
    fn inputs(&self) -> Vec<String>;

    /// Directories of stages of other runs whose committed files this one reads. The runner checks those files before any
    /// work, as it does those of its own run.
    fn indices(&self) -> &[PathBuf] {
        &[]
    }

    /// Everything of the recipe (and of the outside world, such as the list of input files with
    /// their sizes) that influences the output. A change makes the stage stale.
    fn config(&self) -> Result<serde_json::Value>;

    /// Columns of the kept rows, where they are known before any work: what later stages plan expressions over.
    fn schema(&self) -> Option<SchemaRef> {
        None
    }

    /// Refuses settings that cannot be planned, such as an expression over a column that is not there. Called before
    /// any work, with the schemas that the stages before this one have told, by name.
    fn check_settings(&self, _schemas: &BTreeMap<String, SchemaRef>) -> Result<()> {
        Ok(())
    }

    /// The tasks. Called when all inputs are done; depends on nothing but inputs and configuration.
    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>>;

    /// Bytes that one task holds, at most about, where that is more than a few buffers. Called when all inputs are done. The
    /// runner does no more tasks at a time than the memory limit has room for, and refuses to begin where it has none for one.
    fn task_memory_bytes(&self, _run: &RunContext) -> Result<u64> {
        Ok(0)
    }

    /// Do one task. Called again after a failure or a crash, so it starts from nothing (or from
    /// checkpoints of its own below [`TaskContext::stage_dir`]).
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport>;

    /// Called with the sums so far before the first task and after every commit; an error stops the run. For limits.
    fn check(&self, _run: &RunContext, _totals: &Totals) -> Result<()> {
        Ok(())
    }

    /// Whether a task watches [`RunContext::stop_requested`] itself and returns
    /// [`Error::Interrupted`] after saving its state. Other tasks are simply dropped when the run is
    /// asked to stop: what is not journalled was never there.
    fn stops_itself(&self) -> bool {
        false
    }
}

/// Tasks that are one to one with the shards of `input`: task `k` reads shard `k`.
pub fn tasks_per_shard(run: &RunContext, input: &str) -> Result<Vec<Task>> {
    run.shards(input)?
        .iter()
        .map(|shard| {
            let inputs = serde_json::json!({ "stage": input, "shard": shard.index, "xxh3": shard.xxh3 });
            Ok(Task { index: shard.index, inputs })
        })
        .collect()
}

/// Which columns of a plan go to which shard.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// Columns of `part-*.parquet`, in order.
    pub kept: &'a [&'a str],
    /// Columns of `dropped/part-*.parquet`, in order; [`RULE`] among them. Empty: the plan has no
    /// verdict column and keeps every row.
    pub dropped: &'a [&'a str],
}

/// How many rows a task read, counted apart from the rows it wrote.
#[derive(Clone, Debug)]
pub enum RowsRead {
    /// Known before: the rows of the input shards.
    Known(u64),
    /// Counted by the reader while it reads.
    Counted(Arc<AtomicU64>),
    /// The plan makes rows rather than passing them on (a grouping): reads are the rows written.
    Made,
}

/// What a task did.
#[derive(Debug, Default)]
pub struct TaskReport {
    /// Files to commit, in order.
    pub files: Vec<PendingFile>,
    /// Rows read.
    pub rows_read: u64,
    /// Rows kept.
    pub rows_kept: u64,
    /// Rows dropped, by rule.
    pub dropped: BTreeMap<String, u64>,
    /// Figures of the stage's own for the journal.
    pub notes: serde_json::Value,
}

/// One task being executed.
pub struct TaskContext {
    /// The run.
    pub run: Arc<RunContext>,
    /// The task.
    pub task: Task,
    stage: String,
    stage_dir: PathBuf,
}

impl TaskContext {
    pub(crate) fn new(run: Arc<RunContext>, stage: &str, task: Task) -> Self {
        let stage_dir = run.stage_dir(stage);
        Self { run, task, stage: stage.into(), stage_dir }
    }

    /// Number of the task and of its output shard.
    pub fn index(&self) -> u32 {
        self.task.index
    }

    /// The stage's directory, for state of its own (checkpoints). Files that others read are
    /// committed through the report instead.
    pub fn stage_dir(&self) -> &Path {
        &self.stage_dir
    }

    /// A fresh DataFusion session: one partition, so that order is the order of the input, with the
    /// run's shared memory pool and spill directory.
    pub fn session(&self) -> SessionContext {
        self.run.session()
    }

    /// As [`Self::session`], for plans that walk over texts: with few rows at a time, a text is looked at while it is near
    /// the processor, and the memory of one batch does for the next.
    pub(crate) fn text_session(&self) -> SessionContext {
        self.run.session_of(TEXT_BATCH_ROWS)
    }

    /// Shard `index` of a stage, all columns, in order.
    pub async fn read(&self, session: &SessionContext, stage: &str, index: u32) -> Result<DataFrame> {
        let shard = self.run.shard(stage, index)?;
        read_shards(session, std::slice::from_ref(&shard)).await
    }

    /// All shards of a stage one after the other, in order.
    pub async fn read_all(&self, session: &SessionContext, stage: &str) -> Result<DataFrame> {
        read_shards(session, &self.run.shards(stage)?).await
    }

    /// Give the batches of all shards of a stage to `take`, of some columns, those of as many shards at a time as there are tasks of
    /// a stage: for the one task of a stage whose result does not depend on the order in which rows come. As such tasks do, each
    /// shard being read takes the chosen columns of a row group, as they are in the file, and a batch.
    pub async fn each_batch_in_any_order<F>(&self, stage: &str, columns: &'static [&'static str], take: F) -> Result<()>
    where
        F: Fn(RecordBatch) -> Result<()> + Send + Sync + 'static,
    {
        let mut left = self.run.shards(stage)?.into_iter();
        let take = Arc::new(take);
        let mut reading: JoinSet<Result<()>> = JoinSet::new();
        loop {
            while reading.len() < self.run.options().threads.max(1)
                && let Some(shard) = left.next()
            {
                let (session, take) = (self.session(), take.clone());
                reading.spawn(async move {
                    let rows = read_shards(&session, &[shard]).await?.select_columns(columns)?;
                    let mut batches = rows.execute_stream().await?;
                    while let Some(batch) = batches.next().await {
                        take(batch?)?;
                    }
                    Ok(())
                });
            }
            match reading.join_next().await {
                Some(read) => read.map_err(Error::shard)??,
                None => return Ok(()),
            }
        }
    }

    /// Rows of shard `index` of `stage` whose `ordinal` is in shard `index` of `selection`, in order:
    /// how a stage sees the documents that the stages before it kept, without their text having been
    /// written again. Both shards are of the same ingest shard.
    pub async fn read_selected(
        &self,
        session: &SessionContext,
        stage: &str,
        selection: Option<&str>,
        index: u32,
    ) -> Result<DataFrame> {
        let rows = self.read(session, stage, index).await?;
        let Some(selection) = selection.filter(|s| *s != stage) else {
            return Ok(rows);
        };
        // The selection (8 bytes a document) is the build side, the text streams past it in order.
        let chosen = self.read(session, selection, index).await?.select(vec![col("ordinal").alias("selected")])?;
        Ok(chosen.join(rows, JoinType::RightSemi, &["selected"], &["ordinal"], None)?)
    }

    /// Execute `plan` and write its rows: those with a null [`RULE`] to `part-N.parquet`, the others
    /// to `dropped/part-N.parquet`. Refuses to lose or invent rows.
    pub async fn write(&self, plan: DataFrame, output: Output<'_>, rows_read: RowsRead) -> Result<TaskReport> {
        self.write_compressed(plan, output, rows_read, TextCompression::default()).await
    }

    /// As [`Self::write`], with the texts of the kept rows compressed as `compression` says.
    pub async fn write_compressed(
        &self,
        plan: DataFrame,
        output: Output<'_>,
        rows_read: RowsRead,
        compression: TextCompression,
    ) -> Result<TaskReport> {
        let mut stream = plan.execute_stream().await?;
        let schema = stream.schema();
        let index = self.index();
        let (kept_columns, kept_schema) = columns(&schema, output.kept)?;
        let name = part_name(index);
        let mut kept = ShardWriter::create_compressed(&self.stage_dir, name, kept_schema, Vec::new(), compression)?;
        let mut dropped = None;
        if !output.dropped.is_empty() {
            let (dropped_columns, dropped_schema) = columns(&schema, output.dropped)?;
            let name = Path::new("dropped").join(part_name(index));
            let writer = ShardWriter::create(&self.stage_dir, name, dropped_schema, Vec::new())?;
            dropped = Some((writer, dropped_columns, schema.index_of(RULE)?));
        }
        let mut by_rule: BTreeMap<String, u64> = BTreeMap::new();
        while let Some(batch) = stream.next().await {
            let batch = batch?;
            let Some((writer, dropped_columns, rule)) = &mut dropped else {
                kept.write(batch.project(&kept_columns)?)?;
                continue;
            };
            let rules = batch.column(*rule);
            if rules.null_count() == batch.num_rows() {
                kept.write(batch.project(&kept_columns)?)?;
                continue;
            }
            kept.write(filter_record_batch(&batch.project(&kept_columns)?, &is_null(rules)?)?)?;
            let gone = filter_record_batch(&batch, &is_not_null(rules)?)?;
            count_rules(&gone, *rule, &mut by_rule)?;
            writer.write(gone.project(dropped_columns)?)?;
        }
        let rows_kept = kept.rows();
        let rows_dropped = dropped.as_ref().map_or(0, |(w, ..)| w.rows());
        let read = match rows_read {
            RowsRead::Known(n) => n,
            RowsRead::Counted(counter) => counter.load(Ordering::Acquire),
            RowsRead::Made => rows_kept + rows_dropped,
        };
        if read != rows_kept + rows_dropped {
            return Err(Error::RowsLost {
                stage: self.stage.clone(),
                task: index,
                read,
                kept: rows_kept,
                dropped: rows_dropped,
            });
        }
        let mut files = vec![kept.finish()?];
        if let Some((writer, ..)) = dropped {
            files.push(writer.finish()?);
        }
        Ok(TaskReport { files, rows_read: read, rows_kept, dropped: by_rule, notes: serde_json::Value::Null })
    }

    /// A file of another kind (a tokenizer, an index), committed with the task's report once
    /// [`PendingWriter::finish`] has put it there.
    pub fn create_file(&self, name: impl Into<PathBuf>) -> Result<PendingWriter> {
        PendingWriter::create(&self.stage_dir, name)
    }

    /// Tell the observer how far a long task is.
    pub fn progress(&self, done: u64, total: Option<u64>, message: impl Into<String>) {
        self.run.emit(&Event::Progress { stage: self.stage.clone(), done, total, message: message.into() });
    }
}

/// Shards as one DataFrame, in the order given. Batches of the session have no more rows from here on than fit
/// [`BATCH_BYTES`].
pub async fn read_shards(session: &SessionContext, shards: &[Shard]) -> Result<DataFrame> {
    let rows = shards.iter().map(batch_rows).min().unwrap_or(BATCH_ROWS);
    {
        let state = session.state_ref();
        let mut state = state.write();
        let config = state.config_mut();
        if rows < config.batch_size() {
            *config = config.clone().with_batch_size(rows);
        }
    }
    let paths: Vec<String> = shards.iter().map(|s| file_url(&s.path)).collect::<Result<_>>()?;
    Ok(session.read_parquet(paths, ParquetReadOptions::default()).await?)
}

/// Bytes of rows in a batch, about, where [`BATCH_ROWS`] rows of long documents would have more: a sort cannot spill a
/// part of a batch, so that a limit of memory has to have room for some.
const BATCH_BYTES: u64 = 16 << 20;

/// Rows of a shard in a batch, from what the journal says of it. Zstandard makes a fifth to a third of text and tokens; eight
/// times what is in the file is on the safe side of nearly all.
fn batch_rows(shard: &Shard) -> usize {
    let row = (shard.bytes.saturating_mul(8) / shard.rows.max(1)).max(1);
    usize::try_from(BATCH_BYTES / row).unwrap_or(BATCH_ROWS).clamp(1, BATCH_ROWS)
}

/// `file://` URL of a path, so that no character of it is taken for a pattern.
pub fn file_url(path: &Path) -> Result<String> {
    let absolute = std::path::absolute(path).map_err(|e| Error::io(path, e))?;
    url::Url::from_file_path(&absolute)
        .map(String::from)
        .map_err(|()| Error::Corrupt { path: absolute, reason: "not a path that can be written as a URL".into() })
}

/// Positions and schema of the named columns.
fn columns(schema: &SchemaRef, names: &[&str]) -> Result<(Vec<usize>, SchemaRef)> {
    let positions = names.iter().map(|name| schema.index_of(name)).collect::<Result<Vec<_>, _>>()?;
    let projected: Schema = schema.project(&positions)?;
    Ok((positions, Arc::new(projected.with_metadata(Default::default()))))
}

fn count_rules(batch: &RecordBatch, rule: usize, counts: &mut BTreeMap<String, u64>) -> Result<()> {
    let rules = cast(batch.column(rule), &DataType::Utf8View)?;
    for name in rules.as_string_view().iter().flatten() {
        match counts.get_mut(name) {
            Some(n) => *n += 1,
            None => {
                counts.insert(name.into(), 1);
            }
        }
    }
    Ok(())
}
