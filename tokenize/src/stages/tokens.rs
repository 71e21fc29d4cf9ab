//! Stages `tokens` and `tokens_validation`, the second pass of the shuffle: each shard is a range of
//! keys of one source, gathered from all encoded shards and sorted.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, UInt32Array, UInt64Array};
use arrow::datatypes::{DataType, Field, Schema};
use async_trait::async_trait;
use datafusion::prelude::{col, lit};
use futures::StreamExt;
use pipeline::digest::Digest;
use pipeline::shard::{ShardWriter, part_name};
use pipeline::{Error, Result, RunContext, Stage, Task, TaskContext, TaskReport};
use serde::{Deserialize, Serialize};

use super::{ENCODED, TOKENIZER, shard_metadata, shared_encoder};
use crate::config::TokenizeConfig;
use crate::counts::{Counts, SourceCounts, TokenCounter};
use crate::shard::TokenShardWriter;
use crate::shuffle::Split;

/// Columns: `id`, `source`, `bytes` (of text) u64, `tokens` list of u16 or u32. Beside every shard,
/// `unigram/` has a file of the same name that counts each token in it.
pub(super) struct Tokens {
    pub name: &'static str,
    pub split: Split,
    pub config: TokenizeConfig,
    pub seed: u64,
}

/// What a task reads: the keys from `first` to `last` of a source.
#[derive(Serialize, Deserialize)]
struct KeyRange {
    source: String,
    first: u64,
    last: u64,
    /// Digest of the checksums of the shards it reads from, so that a journal line never stands for other
    /// rows.
    encoded: Digest,
}

#[async_trait]
impl Stage for Tokens {
    fn name(&self) -> &str {
        self.name
    }

    fn version(&self) -> u32 {
        4
    }

    fn inputs(&self) -> Vec<String> {
        vec![TOKENIZER.into(), ENCODED.into()]
    }

    fn config(&self) -> Result<serde_json::Value> {
        self.config.validate()?;
        Ok(serde_json::json!({ "shard_tokens": self.config.shard_tokens }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let total = encoded_counts(run, self.split)?.total();
        if self.split == Split::Train && total.documents == 0 {
            return Err(Error::abort(format!(
                "every document is held out: with validation_fraction = {} none of the {} documents is left to train on",
                self.config.validation_fraction,
                encoded_counts(run, Split::Validation)?.total().documents
            )));
        }
        let checksums: Vec<u8> = run.shards(ENCODED)?.iter().flat_map(|s| s.xxh3.0.to_be_bytes()).collect();
        let encoded = Digest::of(&checksums);
        let mut tasks = Vec::new();
        let mut sources = encoded_counts(run, self.split)?.0;
        if sources.is_empty() {
            // An empty shard, so that the split is there to be asked about.
            sources.insert(String::new(), Counts::default());
        }
        for (source, counts) in sources {
            let shards = counts.tokens.div_ceil(self.config.shard_tokens).clamp(1, u64::from(u32::MAX)) as u32;
            for keys in self.split.shards(shards) {
                let (first, last) = (keys.start as u64, (keys.end - 1) as u64);
                let range = KeyRange { source: source.clone(), first, last, encoded };
                let inputs = serde_json::to_value(range).map_err(Error::abort)?;
                tasks.push(Task { index: tasks.len() as u32, inputs });
            }
        }
        Ok(tasks)
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let KeyRange { source, first, last, .. } =
            serde_json::from_value(task.task.inputs.clone()).map_err(Error::abort)?;
        let encoder = shared_encoder(&task.run)?;
        let session = task.session();
        let plan = task
            .read_all(&session, ENCODED)
            .await?
            .filter(col("source").eq(lit(source.as_str())))?
            .filter(col("shuffle_key").gt_eq(lit(first)).and(col("shuffle_key").lt_eq(lit(last))))?
            .sort(vec![col("shuffle_key").sort(true, false), col("id").sort(true, false)])?
            .select_columns(&["id", "source", "bytes", "tokens"])?;
        let mut rows = plan.execute_stream().await?;
        let name = part_name(task.index());
        let metadata = shard_metadata(&encoder, &self.config.tokenizer, self.seed, Some(source))?;
        let path = task.stage_dir().join(&name);
        let mut writer = TokenShardWriter::new(task.create_file(&name)?, path, rows.schema(), metadata)?;
        let mut counter = TokenCounter::new(encoder.vocabulary_size());
        while let Some(batch) = rows.next().await {
            let batch = batch?;
            counter.count(&batch)?;
            writer.write(&batch)?;
        }
        let (file, metadata) = writer.finish()?;
        let unigram = write_occurrences(task, &counter.occurrences)?;
        Ok(TaskReport {
            files: vec![file, unigram],
            rows_read: metadata.documents,
            rows_kept: metadata.documents,
            notes: counter.sources.notes(),
            ..TaskReport::default()
        })
    }
}

/// What the stage `encoded` counted in a split.
pub(super) fn encoded_counts(run: &RunContext, split: Split) -> Result<SourceCounts> {
    let key = match split {
        Split::Train => "train",
        Split::Validation => "validation",
    };
    sum_notes(run, ENCODED, &[key])
}

/// Sum the counts in the journal notes of a stage, found there under `path`.
pub(super) fn sum_notes(run: &RunContext, stage: &str, path: &[&str]) -> Result<SourceCounts> {
    let mut sum = SourceCounts::default();
    for entry in run.journal(stage).values() {
        let counts = path.iter().try_fold(&entry.notes, |notes, key| notes.get(key));
        let counts = counts.and_then(SourceCounts::from_notes).ok_or_else(|| Error::Corrupt {
            path: pipeline::Journal::path(&run.stage_dir(stage)),
            reason: format!("the line of task {} has no token counts", entry.task),
        })?;
        sum.add(&counts);
    }
    Ok(sum)
}

/// Write the tokens that occur, with how often.
fn write_occurrences(task: &TaskContext, occurrences: &[u64]) -> Result<pipeline::PendingFile> {
    let schema = Arc::new(Schema::new(vec![
        Field::new("token", DataType::UInt32, false),
        Field::new("count", DataType::UInt64, false),
    ]));
    let name = std::path::Path::new(UNIGRAM).join(part_name(task.index()));
    let mut writer = ShardWriter::create(task.stage_dir(), name, schema.clone(), Vec::new())?;
    let (tokens, counts): (Vec<u32>, Vec<u64>) = (0..).zip(occurrences).filter(|(_, n)| **n > 0).unzip();
    let columns: Vec<ArrayRef> = vec![Arc::new(UInt32Array::from(tokens)), Arc::new(UInt64Array::from(counts))];
    writer.write(RecordBatch::try_new(schema, columns)?)?;
    writer.finish()
}

/// Directory of the token counts in the stage's directory.
pub(super) const UNIGRAM: &str = "unigram";
