//! The stages of this crate, one file each.

use datafusion::common::JoinType;
use datafusion::functions::core::expr_fn::coalesce;
use datafusion::prelude::{DataFrame, SessionContext, col};

use crate::error::Result;
use crate::signals::document::LANGUAGE;
use crate::stage::TaskContext;

pub mod clean;
pub mod curate;
pub mod filter;
pub mod ingest;
pub mod mix;
pub mod signals;
pub mod urls;

/// `documents` of shard `index`, in order, with the language that stage `languages` has for each of them: as identified,
/// or else as the input says. As they are without such a stage.
async fn with_languages(
    documents: DataFrame,
    task: &TaskContext,
    session: &SessionContext,
    languages: Option<&str>,
) -> Result<DataFrame> {
    let Some(stage) = languages else { return Ok(documents) };
    let found = task.read(session, stage, task.index()).await?;
    let found = found.select(vec![col("ordinal").alias("language_of"), col(LANGUAGE).alias("found_language")])?;
    // The languages (some bytes a document) are the build side, the text streams past them in order.
    let joined = found.join(documents, JoinType::Right, &["language_of"], &["ordinal"], None)?;
    Ok(joined
        .with_column(LANGUAGE, coalesce(vec![col("found_language"), col(LANGUAGE)]))?
        .drop_columns(&["language_of", "found_language"])?)
}
