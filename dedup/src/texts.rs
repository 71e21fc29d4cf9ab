//! The texts that a stage reads, once and in order.

use arrow::array::AsArray;
use arrow::compute::cast;
use arrow::datatypes::{DataType, UInt64Type};
use datafusion::dataframe::DataFrame;
use datafusion::prelude::{SessionContext, col};
use futures::StreamExt;
use pipeline::digest::Digest;
use pipeline::stage::tasks_per_shard;
use pipeline::{Error, Result, RunContext, Task, TaskContext};

use crate::disk::text_bytes;

/// The documents of stage `selection` (all, if `None`), whose text is in stage `documents`.
#[derive(Clone, Debug)]
pub(crate) struct Texts {
    pub(crate) documents: String,
    pub(crate) selection: Option<String>,
}

impl Texts {
    pub(crate) fn new(documents: &str, selection: Option<&str>) -> Self {
        Self { documents: documents.into(), selection: selection.map(Into::into) }
    }

    /// The stages that are read.
    pub(crate) fn stages(&self) -> Vec<String> {
        std::iter::once(self.documents.clone()).chain(self.selection.clone()).collect()
    }

    /// The stage whose rows are the documents.
    pub(crate) fn chosen(&self) -> &str {
        self.selection.as_deref().unwrap_or(&self.documents)
    }

    /// Number of documents.
    pub(crate) fn count(&self, run: &RunContext) -> Result<u64> {
        Ok(run.shards(self.chosen())?.iter().map(|shard| shard.rows).sum())
    }

    /// What writing all texts again takes, about: the bytes of the shards that hold them, but not less than two fifths of the
    /// text, since they may be compressed harder than stages after `ingest` do it (0.35 bytes a byte of English prose).
    pub(crate) fn stored_bytes(&self, run: &RunContext) -> Result<u64> {
        let stored: u64 = run.shards(&self.documents)?.iter().map(|shard| shard.bytes).sum();
        Ok(stored.max(text_bytes(run, &self.documents)? * 2 / 5))
    }

    /// A task for every shard.
    pub(crate) fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, self.chosen())
    }

    /// A task for every shard, which reads files of digest `besides`, too.
    pub(crate) fn tasks_with(&self, run: &RunContext, besides: Digest) -> Result<Vec<Task>> {
        let mut tasks = self.tasks(run)?;
        tasks.iter_mut().for_each(|task| task.inputs = serde_json::json!([task.inputs, besides]));
        Ok(tasks)
    }

    /// The documents of shard `shard`, all columns, in order.
    pub(crate) async fn rows(&self, task: &TaskContext, session: &SessionContext, shard: u32) -> Result<DataFrame> {
        task.read_selected(session, &self.documents, self.selection.as_deref(), shard).await
    }

    /// Give ordinal and text of every document of shard `shard` to `take`; how many there were.
    ///
    /// # Errors
    /// [`Error::RowsLost`] if they are not as many as the stage has rows.
    pub(crate) async fn each(
        &self,
        task: &TaskContext,
        shard: u32,
        mut take: impl FnMut(u64, &str) -> Result<()> + Send,
    ) -> Result<u64> {
        let session = crate::selection::session(task);
        let rows = self.rows(task, &session, shard).await?.select(vec![col("ordinal"), col("text")])?;
        let mut stream = rows.execute_stream().await?;
        let mut documents = 0;
        while let Some(batch) = stream.next().await {
            let batch = batch?;
            let ordinals = batch.column(0).as_primitive::<UInt64Type>().values();
            let texts = cast(batch.column(1), &DataType::Utf8View)?;
            let texts = texts.as_string_view();
            for (&ordinal, text) in ordinals.iter().zip(texts) {
                take(ordinal, text.unwrap_or_default())?;
            }
            documents += batch.num_rows() as u64;
        }
        self.all_read(task, shard, documents)?;
        Ok(documents)
    }

    /// Refuses to go on with fewer or more documents than shard `shard` has.
    pub(crate) fn all_read(&self, task: &TaskContext, shard: u32, documents: u64) -> Result<()> {
        let read = task.run.shard(self.chosen(), shard)?.rows;
        if documents == read {
            return Ok(());
        }
        let stage = task.stage_dir().file_name().unwrap_or_default().to_string_lossy().into_owned();
        Err(Error::RowsLost { stage, task: task.index(), read, kept: documents, dropped: 0 })
    }
}
