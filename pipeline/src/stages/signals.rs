//! Stage `signals`: the quality signals of every document, as columns.

use async_trait::async_trait;
use datafusion::prelude::{DataFrame, col, ident};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::run::RunContext;
use crate::signals::{SIGNALS, udf};
use crate::stage::{Output, RowsRead, Stage, Task, TaskContext, TaskReport, tasks_per_shard};

/// Settings of the stage. There are none: every signal is computed, whichever rules ask for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SignalsConfig {}

/// Computes all signals of the documents: one shard of `id`, `ordinal` and the columns of
/// [`SIGNALS`] for every shard of documents, same rows, same order. Every row is kept; the text is not written.
pub struct SignalsStage {
    documents: String,
    selection: Option<String>,
    config: SignalsConfig,
}

impl SignalsStage {
    /// Over the shards of stage `documents`; of their rows those that stage `selection` kept, or all.
    pub fn new(documents: impl Into<String>, selection: Option<String>, config: SignalsConfig) -> Self {
        Self { documents: documents.into(), selection, config }
    }
}

#[async_trait]
impl Stage for SignalsStage {
    fn name(&self) -> &str {
        "signals"
    }

    /// Raise it when a formula changes.
    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        let mut inputs = vec![self.documents.clone()];
        inputs.extend(self.selection.clone().filter(|s| *s != self.documents));
        inputs
    }

    fn config(&self) -> Result<serde_json::Value> {
        // Names of the columns: a new signal makes the stage stale though no formula changed.
        let columns: Vec<&str> = SIGNALS.iter().map(|signal| signal.name).collect();
        Ok(serde_json::json!({
            "documents": self.documents,
            "selection": self.selection,
            "columns": columns,
            "settings": serde_json::to_value(&self.config).unwrap_or_default(),
        }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, self.selection.as_deref().unwrap_or(&self.documents))
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = task.session();
        let index = task.index();
        let read = task.run.shard(self.selection.as_deref().unwrap_or(&self.documents), index)?;
        let documents = task.read_selected(&session, &self.documents, self.selection.as_deref(), index).await?;
        let kept = columns();
        task.write(with_signals(documents)?, Output { kept: &kept, dropped: &[] }, RowsRead::Known(read.rows)).await
    }
}

/// Columns of the stage's shards.
fn columns() -> Vec<&'static str> {
    ["id", "ordinal"].into_iter().chain(SIGNALS.iter().map(|signal| signal.name)).collect()
}

/// From `id`, `ordinal`, `text` to `id`, `ordinal` and the signals.
fn with_signals(documents: DataFrame) -> Result<DataFrame> {
    const STRUCT: &str = "signals";
    let computed = udf::signals().call(vec![col("text")]).alias(STRUCT);
    // Unnesting, unlike a projection of the fields, is nothing that the optimiser could merge with the
    // projection below it: the function runs once per text.
    let spread = documents.select(vec![col("id"), col("ordinal"), computed])?.unnest_columns(&[STRUCT])?;
    let signals = SIGNALS.iter().map(|signal| ident(format!("{STRUCT}.{}", signal.name)).alias(signal.name));
    Ok(spread.select([col("id"), col("ordinal")].into_iter().chain(signals).collect::<Vec<_>>())?)
}
