//! Stage `signals`: the quality signals of every document, as columns.

use std::path::Path;
use std::sync::Arc;

use arrow::datatypes::{Fields, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::prelude::{DataFrame, col, ident};

use crate::document::SCHEMA;
use crate::error::Result;
use crate::run::RunContext;
use crate::shared::Shared;
use crate::signals::document::{self, DocumentSignals};
use crate::stage::{Output, RowsRead, Stage, Task, TaskContext, TaskReport, tasks_per_shard};

pub use crate::signals::document::{ClassifierConfig, SignalsConfig};

/// Computes all signals of the documents: one shard of `id`, `ordinal` and the columns of
/// [`SignalsConfig::schema`] for every shard of documents, same rows, same order. Every row is kept; the text is not
/// written.
pub struct SignalsStage {
    documents: String,
    selection: Option<String>,
    signals: Shared<DocumentSignals>,
}

impl SignalsStage {
    /// Over the shards of stage `documents`; of their rows those that stage `selection` kept, or all. Paths of models
    /// are relative to `base_dir`.
    ///
    /// # Errors
    /// As [`DocumentSignals::load`].
    pub fn new(
        documents: impl Into<String>,
        selection: Option<String>,
        config: &SignalsConfig,
        base_dir: &Path,
    ) -> Result<Self> {
        let signals = Shared::new(DocumentSignals::load(config, base_dir)?);
        Ok(Self { documents: documents.into(), selection, signals })
    }
}

#[async_trait]
impl Stage for SignalsStage {
    fn name(&self) -> &str {
        "signals"
    }

    /// Raise it when a formula changes.
    fn version(&self) -> u32 {
        4
    }

    fn inputs(&self) -> Vec<String> {
        let mut inputs = vec![self.documents.clone()];
        inputs.extend(self.selection.clone().filter(|s| *s != self.documents));
        inputs
    }

    fn config(&self) -> Result<serde_json::Value> {
        // Names of the columns: a new signal makes the stage stale though no formula changed.
        Ok(serde_json::json!({
            "documents": self.documents,
            "selection": self.selection,
            "columns": self.signals.config().columns(),
            "settings": serde_json::to_value(self.signals.config()).unwrap_or_default(),
            "models": self.signals.digests(),
        }))
    }

    fn schema(&self) -> Option<SchemaRef> {
        let signals = self.signals.config().schema();
        // The documents' `id` and `ordinal`, then the signals.
        let fields = SCHEMA.fields()[..2].iter().chain(signals.fields().iter());
        Some(Arc::new(Schema::new(fields.cloned().collect::<Fields>())))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, self.selection.as_deref().unwrap_or(&self.documents))
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = task.text_session();
        let index = task.index();
        let read = task.run.shard(self.selection.as_deref().unwrap_or(&self.documents), index)?;
        let documents = task.read_selected(&session, &self.documents, self.selection.as_deref(), index).await?;
        let columns = self.signals.config().columns();
        let kept: Vec<&str> = ["id", "ordinal"].into_iter().chain(columns.iter().map(String::as_str)).collect();
        let signals = self.with_signals(documents, &columns)?;
        task.write(signals, Output { kept: &kept, dropped: &[] }, RowsRead::Known(read.rows)).await
    }
}

impl SignalsStage {
    /// From `id`, `ordinal`, `text`, `language` to `id`, `ordinal` and the signals.
    fn with_signals(&self, documents: DataFrame, columns: &[String]) -> Result<DataFrame> {
        const STRUCT: &str = "signals";
        let computed = document::function(self.signals.clone()).call(vec![col("text"), col("language")]).alias(STRUCT);
        // Unnesting, unlike a projection of the fields, is nothing that the optimiser could merge with the
        // projection below it: the function runs once per text.
        let spread = documents.select(vec![col("id"), col("ordinal"), computed])?.unnest_columns(&[STRUCT])?;
        let signals = columns.iter().map(|name| ident(format!("{STRUCT}.{name}")).alias(name));
        Ok(spread.select([col("id"), col("ordinal")].into_iter().chain(signals).collect::<Vec<_>>())?)
    }
}
