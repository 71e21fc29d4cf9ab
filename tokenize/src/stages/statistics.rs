//! Stage `token_statistics`: how often each token occurs in the training shards, and the entropy of
//! that distribution.

use std::path::Path;

use arrow::array::AsArray;
use arrow::datatypes::UInt64Type;
use async_trait::async_trait;
use datafusion::functions_aggregate::expr_fn::sum;
use datafusion::prelude::col;
use pipeline::stage::{Output, read_shards};
use pipeline::{Error, Journal, Result, RowsRead, RunContext, Shard, Stage, Task, TaskContext, TaskReport};
use serde::{Deserialize, Serialize};

use super::tokens::{UNIGRAM, encoded_counts, sum_notes};
use super::{ENCODED, TOKEN_STATISTICS, TOKENS, TOKENS_VALIDATION};
use crate::counts::{SourceCounts, unigram_entropy};
use crate::shuffle::Split;

/// Columns: `token` u32, `count` u64, by token.
pub(super) struct Statistics;

/// The notes of the stage `token_statistics`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenStatistics {
    /// Entropy of the distribution of single tokens in the training shards, in nats per token: the loss
    /// of the best model that looks at no context.
    pub unigram_entropy: f64,
    /// Ids that occur in the training shards.
    pub tokens_used: u64,
    /// Training documents, tokens, bytes of text and bytes per token, in all and by source.
    pub train: serde_json::Value,
    /// The same of held-out documents.
    pub validation: serde_json::Value,
}

impl TokenStatistics {
    /// Those of a run, once the stage is done.
    pub fn load(run_dir: &Path) -> Result<Self> {
        let dir = run_dir.join(TOKEN_STATISTICS);
        let notes = Journal::read(&dir)?.into_values().next().map(|entry| entry.notes);
        let fault = |reason: String| Error::Corrupt { path: Journal::path(&dir), reason };
        let notes = notes.ok_or_else(|| fault("the stage is not done".into()))?;
        serde_json::from_value(notes).map_err(|e| fault(format!("no token statistics: {e}")))
    }

    /// Counts of the training documents by source.
    pub fn train_counts(&self) -> Option<SourceCounts> {
        SourceCounts::from_notes(&self.train)
    }

    /// Counts of the held-out documents by source.
    pub fn validation_counts(&self) -> Option<SourceCounts> {
        SourceCounts::from_notes(&self.validation)
    }
}

#[async_trait]
impl Stage for Statistics {
    fn name(&self) -> &str {
        TOKEN_STATISTICS
    }

    fn version(&self) -> u32 {
        2
    }

    fn inputs(&self) -> Vec<String> {
        vec![ENCODED.into(), TOKENS.into(), TOKENS_VALIDATION.into()]
    }

    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({}))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let inputs = run.shards(TOKENS)?.iter().map(|s| s.xxh3.to_string()).collect();
        Ok(vec![Task { index: 0, inputs }])
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let train = sum_notes(&task.run, TOKENS, &[])?;
        let validation = sum_notes(&task.run, TOKENS_VALIDATION, &[])?;
        // Every document of `encoded` is in exactly one shard of one split.
        for (stage, split, counts) in
            [(TOKENS, Split::Train, &train), (TOKENS_VALIDATION, Split::Validation, &validation)]
        {
            let (read, kept) = (encoded_counts(&task.run, split)?, counts.total().documents);
            if read != *counts {
                let read = read.total().documents;
                return Err(Error::RowsLost { stage: stage.into(), task: 0, read, kept, dropped: 0 });
            }
        }
        let session = task.session();
        let counts = read_shards(&session, &occurrence_files(&task.run)).await?;
        let counts = counts
            .aggregate(vec![col("token")], vec![sum(col("count")).alias("count")])?
            .sort(vec![col("token").sort(true, false)])?
            .collect()
            .await?;
        let occurrences: Vec<u64> =
            counts.iter().flat_map(|b| b.column(1).as_primitive::<UInt64Type>().values().to_vec()).collect();
        let statistics = TokenStatistics {
            unigram_entropy: unigram_entropy(occurrences.iter().copied()),
            tokens_used: occurrences.len() as u64,
            train: train.notes(),
            validation: validation.notes(),
        };
        let plan = session.read_batches(counts)?;
        let output = Output { kept: &["token", "count"], dropped: &[] };
        let mut report = task.write(plan, output, RowsRead::Made).await?;
        report.notes = serde_json::to_value(statistics).map_err(Error::abort)?;
        Ok(report)
    }
}

/// The files of token counts beside the training shards.
fn occurrence_files(run: &RunContext) -> Vec<Shard> {
    let mut files = Vec::new();
    for entry in run.journal(TOKENS).into_values() {
        let counts = entry.files.into_iter().find(|f| f.path.starts_with(UNIGRAM));
        files.extend(counts.map(|f| Shard {
            index: entry.task,
            path: run.stage_dir(TOKENS).join(&f.path),
            rows: f.rows,
            bytes: f.bytes,
            xxh3: f.xxh3,
        }));
    }
    files
}
