//! Stage `clean`: text to text, line by line.

use async_trait::async_trait;
use datafusion::prelude::{col, lit, when};
use serde::{Deserialize, Serialize};

use crate::document::COLUMNS;
use crate::error::Result;
use crate::run::RunContext;
use crate::signals::udf::c4_clean;
use crate::stage::{Output, RULE, RowsRead, Stage, Task, TaskContext, TaskReport, tasks_per_shard};

/// Columns of the dropped shards.
pub const DROPPED: [&str; 5] = ["id", "ordinal", "source", "url", RULE];

/// How texts are cleaned before the signals are computed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CleanConfig {
    /// Keep the lines that C4 keeps: those with a terminal mark and enough words, without
    /// "javascript" and policy notices.
    pub c4_lines: bool,
}

impl Default for CleanConfig {
    fn default() -> Self {
        Self { c4_lines: true }
    }
}

/// Rewrites the text of every document; a document without a line left is dropped by the rule
/// `no_line_left`. Kept shards hold all columns of a document.
pub struct CleanStage {
    config: CleanConfig,
    documents: String,
}

impl CleanStage {
    /// Over the shards of stage `documents`.
    pub fn new(config: CleanConfig, documents: impl Into<String>) -> Self {
        Self { config, documents: documents.into() }
    }
}

#[async_trait]
impl Stage for CleanStage {
    fn name(&self) -> &str {
        "clean"
    }

    fn version(&self) -> u32 {
        2
    }

    fn inputs(&self) -> Vec<String> {
        vec![self.documents.clone()]
    }

    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "documents": self.documents, "c4_lines": self.config.c4_lines }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, &self.documents)
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = task.session();
        let read = task.run.shard(&self.documents, task.index())?;
        let mut documents = task.read(&session, &self.documents, task.index()).await?;
        if self.config.c4_lines {
            documents = documents.with_column("text", c4_clean().call(vec![col("text")]))?;
        }
        let verdict = when(col("text").eq(lit("")), lit("no_line_left")).end()?;
        let documents = documents.with_column(RULE, verdict)?;
        task.write(documents, Output { kept: &COLUMNS, dropped: &DROPPED }, RowsRead::Known(read.rows)).await
    }
}
