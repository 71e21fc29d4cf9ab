//! The last stage of a deduplication: which documents stay.

use std::path::PathBuf;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::dataframe::DataFrame;
use datafusion::prelude::SessionContext;
use pipeline::{Output, Result, RowsRead, RunContext, Stage, Task, TaskContext, TaskReport};

use crate::disk::check_room;
use crate::functions::udfs;
use crate::partition::digest_of;
use crate::removals::removals_of;

/// Bytes of a document in Parquet, at most about: its id, its ordinal and, if it goes, for whom.
pub(crate) const ROW_BYTES: u64 = 48;

/// The documents of a shard that are in no removal.
pub(crate) struct Selection {
    pub(crate) name: String,
    pub(crate) rule: &'static str,
    /// Stage of the rows `id`, `ordinal` to choose from.
    pub(crate) selection: String,
    /// Stage of the removals.
    pub(crate) removals: String,
    /// The older indices that it was made with.
    pub(crate) against: Vec<PathBuf>,
}

#[async_trait]
impl Stage for Selection {
    fn name(&self) -> &str {
        &self.name
    }

    fn version(&self) -> u32 {
        3
    }

    fn inputs(&self) -> Vec<String> {
        vec![self.selection.clone(), self.removals.clone()]
    }

    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "rule": self.rule }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let documents: u64 = run.shards(&self.selection)?.iter().map(|shard| shard.rows).sum();
        check_room(run, &self.name, documents * ROW_BYTES)?;
        let removals = digest_of(&run.shards(&self.removals)?);
        Ok(run
            .shards(&self.selection)?
            .iter()
            .map(|shard| Task {
                index: shard.index,
                inputs: serde_json::json!({
                    "stage": self.selection,
                    "shard": shard.index,
                    "xxh3": shard.xxh3,
                    "removals": removals,
                }),
            })
            .collect())
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = session(task);
        let shard = task.run.shard(&self.selection, task.index())?;
        let documents = task.read(&session, &self.selection, task.index()).await?;
        register(&session, "documents", documents)?;
        let removals = removals_of(task, &self.removals, task.index(), &self.against)?;
        register(&session, "removals", session.read_batch(removals)?)?;
        let plan = session
            .sql(&format!(
                "select id, documents.ordinal, cluster_id, survivor, similarity, survivor_index,
                        case when survivor is not null then '{}' end as rule
                 from removals right join documents on removals.ordinal = documents.ordinal
                 order by documents.ordinal",
                self.rule
            ))
            .await?;
        let dropped = &["id", "ordinal", "rule", "cluster_id", "survivor", "similarity", "survivor_index"];
        let output = Output { kept: &["id", "ordinal"], dropped };
        task.write(plan, output, RowsRead::Known(shard.rows)).await
    }
}

/// The task's session, with our functions.
pub(crate) fn session(task: &TaskContext) -> SessionContext {
    with_functions(task.session())
}

/// A session to plan expressions of a recipe with, before any work: the same functions, over [`no_rows`].
pub(crate) fn planning_session() -> SessionContext {
    with_functions(SessionContext::new())
}

fn with_functions(session: SessionContext) -> SessionContext {
    udfs().into_iter().for_each(|udf| session.register_udf(udf));
    session
}

/// A table of `schema` without rows.
pub(crate) fn no_rows(session: &SessionContext, schema: &SchemaRef) -> datafusion::error::Result<DataFrame> {
    session.read_batch(RecordBatch::new_empty(schema.clone()))
}

/// Make `rows` a table of the session.
pub(crate) fn register(session: &SessionContext, name: &str, rows: DataFrame) -> Result<()> {
    session.register_table(name, rows.into_view())?;
    Ok(())
}
