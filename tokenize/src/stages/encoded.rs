//! Stage `encoded`, the first pass of the shuffle: each curated shard tokenized, and sorted by source and
//! shuffle key.

use std::ops::Range;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::{DataType, UInt64Type};
use async_trait::async_trait;
use datafusion::functions::expr_fn::octet_length;
use datafusion::prelude::{cast, col};
use futures::StreamExt;
use pipeline::stage::tasks_per_shard;
use pipeline::{Error, Result, RunContext, Stage, Task, TaskContext, TaskReport};

use super::{ENCODED, TOKENIZER, refuse_empty, shard_metadata, shared_encoder};
use crate::config::TokenizeConfig;
use crate::counts::TokenCounter;
use crate::functions::{encode, shuffle_key};
use crate::shard::TokenShardWriter;
use crate::shuffle::Split;

/// Columns: `shuffle_key` u64, `id`, `source`, `bytes` (of text) u64, `tokens` list of u16 or u32.
pub(super) struct Encode {
    config: TokenizeConfig,
    documents: String,
    seed: u64,
}

impl Encode {
    pub fn new(config: TokenizeConfig, documents: String, seed: u64) -> Self {
        Self { config, documents, seed }
    }
}

#[async_trait]
impl Stage for Encode {
    fn name(&self) -> &str {
        ENCODED
    }

    fn version(&self) -> u32 {
        4
    }

    fn inputs(&self) -> Vec<String> {
        vec![self.documents.clone(), TOKENIZER.into()]
    }

    fn config(&self) -> Result<serde_json::Value> {
        self.config.validate()?;
        Ok(serde_json::json!({
            "add_bos": self.config.add_bos,
            "bos_token": self.config.tokenizer.bos_token,
            "eos_token": self.config.tokenizer.eos_token,
            "pad_token": self.config.tokenizer.pad_token,
            "validation_fraction": self.config.validation_fraction,
            "seed": self.seed,
        }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        refuse_empty(run, &self.documents)?;
        tasks_per_shard(run, &self.documents)
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let encoder = shared_encoder(&task.run)?;
        let metadata = shard_metadata(&encoder, &self.config.tokenizer, self.seed, None)?;
        let bos_id = match self.config.add_bos {
            true => Some(encoder.token_id(&self.config.tokenizer.bos_token)?),
            false => None,
        };
        let session = task.session();
        let key = shuffle_key(self.seed, self.config.validation_fraction);
        let tokens = encode(encoder.clone(), Vec::from_iter(bos_id), vec![metadata.eos_id]);
        let plan = task.read(&session, &self.documents, task.index()).await?;
        let plan = plan
            .select(vec![
                key.call(vec![col("id"), col("text")]).alias("shuffle_key"),
                col("id"),
                col("source"),
                cast(octet_length(col("text")), DataType::UInt64).alias("bytes"),
                tokens.call(vec![col("text")]).alias("tokens"),
            ])?
            .sort(["source", "shuffle_key", "id"].map(|column| col(column).sort(true, false)).to_vec())?;
        let mut rows = plan.execute_stream().await?;
        let name = pipeline::shard::part_name(task.index());
        let path = task.stage_dir().join(&name);
        let mut writer = TokenShardWriter::new(task.create_file(name)?, path, rows.schema(), metadata)?;
        let mut train = TokenCounter::new(encoder.vocabulary_size());
        let mut validation = TokenCounter::new(encoder.vocabulary_size());
        while let Some(batch) = rows.next().await {
            let batch = batch?;
            for (split, rows) in splits(&batch)? {
                let counter = match split {
                    Split::Train => &mut train,
                    Split::Validation => &mut validation,
                };
                counter.count(&batch.slice(rows.start, rows.len()))?;
            }
            writer.write(&batch)?;
        }
        let (file, metadata) = writer.finish()?;
        let read = task.run.shard(&self.documents, task.index())?.rows;
        if read != metadata.documents {
            return Err(Error::RowsLost {
                stage: ENCODED.into(),
                task: task.index(),
                read,
                kept: metadata.documents,
                dropped: 0,
            });
        }
        Ok(TaskReport {
            files: vec![file],
            rows_read: read,
            rows_kept: read,
            notes: serde_json::json!({ "train": train.sources.notes(), "validation": validation.sources.notes() }),
            ..TaskReport::default()
        })
    }
}

/// The runs of rows of one split: two for a source.
fn splits(batch: &RecordBatch) -> Result<Vec<(Split, Range<usize>)>> {
    let keys = batch
        .column(0)
        .as_primitive_opt::<UInt64Type>()
        .ok_or_else(|| Error::Arrow(arrow::error::ArrowError::SchemaError("shuffle_key is not a u64".into())))?;
    let mut start = 0;
    let runs = keys.values().chunk_by(|&a, &b| Split::of_key(a) == Split::of_key(b)).map(|run| {
        start += run.len();
        (Split::of_key(run[0]), start - run.len()..start)
    });
    Ok(runs.collect())
}
