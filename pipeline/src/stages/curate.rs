//! Stage `curate`: the documents that every stage kept, written out in full.

use async_trait::async_trait;
use datafusion::prelude::col;

use super::with_languages;
use crate::document::COLUMNS;
use crate::error::Result;
use crate::run::RunContext;
use crate::stage::{Output, RowsRead, Stage, Task, TaskContext, TaskReport, tasks_per_shard};

/// Writes the curated corpus: of every document shard the rows that the last selection kept, with all
/// columns of a document, in the order of the input.
///
/// The stages between carry ordinals alone, so the text is written once here, whatever their number.
pub struct CurateStage {
    documents: String,
    selection: Option<String>,
    languages: Option<String>,
}

impl CurateStage {
    /// Name of the stage.
    pub const NAME: &'static str = "curate";

    /// Of the shards of stage `documents`, the rows in the shards of stage `selection`; all of them
    /// if there is none.
    pub fn new(documents: impl Into<String>, selection: Option<String>) -> Self {
        Self { documents: documents.into(), selection, languages: None }
    }

    /// With the languages of stage `languages` (`signals`, where it identifies them) in the column `language`.
    #[must_use]
    pub fn with_languages(self, languages: Option<String>) -> Self {
        Self { languages, ..self }
    }
}

#[async_trait]
impl Stage for CurateStage {
    fn name(&self) -> &str {
        Self::NAME
    }

    fn version(&self) -> u32 {
        2
    }

    fn inputs(&self) -> Vec<String> {
        let mut inputs = vec![self.documents.clone()];
        inputs.extend(self.selection.clone().filter(|s| *s != self.documents));
        inputs.extend(self.languages.clone());
        inputs
    }

    fn config(&self) -> Result<serde_json::Value> {
        let mut config = serde_json::json!({ "documents": self.documents, "selection": self.selection });
        if let Some(languages) = &self.languages {
            config["languages"] = languages.as_str().into();
        }
        Ok(config)
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, self.selection.as_deref().unwrap_or(&self.documents))
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = task.session();
        let index = task.index();
        let kept = task.run.shard(self.selection.as_deref().unwrap_or(&self.documents), index)?;
        let documents = task.read_selected(&session, &self.documents, self.selection.as_deref(), index).await?;
        let documents = with_languages(documents, task, &session, self.languages.as_deref()).await?;
        let documents = documents.select(COLUMNS.map(col))?;
        // Every selected document must be found again: the count of the selection is what is read.
        task.write(documents, Output { kept: &COLUMNS, dropped: &[] }, RowsRead::Known(kept.rows)).await
    }
}
