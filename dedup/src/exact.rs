//! Exact deduplication: documents whose normalised text (or canonical URL) has the same 128-bit
//! XXH3, grouped by external sort in radix partitions.
//!
//! | stage | task | rows |
//! | --- | --- | --- |
//! | `exact_hashes` | document shard | `hash_hi`, `hash_lo`, `ordinal`, `bytes`, sorted by hash |
//! | `exact_groups` | partition of the hashes | removals: `ordinal`, `survivor`, `cluster_id`, sorted by ordinal |
//! | `exact` | document shard | selection `id`, `ordinal`; dropped with `rule`, `cluster_id`, `survivor` |
//!
//! With `by = ["url", "text"]` three more stages (`exact_url_hashes`, …) come first: the text is
//! compared among the documents that the URLs left, so that no text goes with a document that
//! another text's page displaced.
//!
//! Text is read once, by the hashes. A task of `exact_groups` reads its range of hashes out of every
//! shard (row groups and pages outside it are skipped by their statistics), 24 bytes a document, and
//! sorts it within the memory limit, on disk beyond. Nothing in memory grows with the corpus.

use std::sync::Arc;

use async_trait::async_trait;
use datafusion::prelude::{col, ident, lit};
use pipeline::stage::tasks_per_shard;
use pipeline::{Output, Result, RowsRead, RunContext, Stage, Task, TaskContext, TaskReport};
use serde::{Deserialize, Serialize};

use crate::normalise::Normalise;
use crate::partition::{PARTITION_ROWS, digest_of, hash_range, input_number, partitions};
use crate::selection::{Selection, register, session};
use crate::survivor::Keep;

/// What makes two documents the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Key {
    /// The text in normal form.
    Text,
    /// The canonical URL; documents without one are all different.
    Url,
}

/// Exact deduplication in a recipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExactConfig {
    /// Normal form of the text.
    pub normalise: Normalise,
    /// What is compared: `["text"]`, `["url"]` or both. The URL always comes first.
    pub by: Vec<Key>,
    /// Which copy survives.
    pub keep: Keep,
}

impl Default for ExactConfig {
    fn default() -> Self {
        Self { normalise: Normalise::default(), by: vec![Key::Text], keep: Keep::default() }
    }
}

/// The stages of exact deduplication of the documents of `selection` (all, if `None`), whose text is
/// in stage `documents`. The last is called `exact`.
pub fn exact_stages(config: &ExactConfig, documents: &str, selection: Option<&str>) -> Vec<Arc<dyn Stage>> {
    let by_url = config.by.contains(&Key::Url);
    let by_text = config.by.contains(&Key::Text) || !by_url;
    let mut stages = Vec::new();
    if by_url && by_text {
        stages.extend(chain("exact_url", Key::Url, config, documents, selection));
        stages.extend(chain("exact", Key::Text, config, documents, Some("exact_url")));
    } else {
        let key = if by_url { Key::Url } else { Key::Text };
        stages.extend(chain("exact", key, config, documents, selection));
    }
    stages
}

/// Hashes, groups and selection by one key.
fn chain(name: &str, key: Key, config: &ExactConfig, documents: &str, selection: Option<&str>) -> [Arc<dyn Stage>; 3] {
    let (hashes, groups) = (format!("{name}_hashes"), format!("{name}_groups"));
    [
        Arc::new(Hashes {
            name: hashes.clone(),
            key,
            normalise: config.normalise,
            documents: documents.into(),
            selection: selection.map(Into::into),
        }),
        Arc::new(Groups { name: groups.clone(), hashes, keep: config.keep, partition_rows: PARTITION_ROWS }),
        Arc::new(Selection {
            name: name.into(),
            rule: match key {
                Key::Text => "exact_duplicate",
                Key::Url => "same_url",
            },
            selection: selection.unwrap_or(documents).into(),
            removals: groups,
        }),
    ]
}

/// A hash for every document of a shard.
struct Hashes {
    name: String,
    key: Key,
    normalise: Normalise,
    documents: String,
    selection: Option<String>,
}

#[async_trait]
impl Stage for Hashes {
    fn name(&self) -> &str {
        &self.name
    }

    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        std::iter::once(self.documents.clone()).chain(self.selection.clone()).collect()
    }

    fn config(&self) -> Result<serde_json::Value> {
        // The normal form is one of texts.
        Ok(match self.key {
            Key::Text => serde_json::json!({ "key": self.key, "normalise": self.normalise }),
            Key::Url => serde_json::json!({ "key": self.key }),
        })
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, self.selection.as_ref().unwrap_or(&self.documents))
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = session(task);
        let documents = task.read_selected(&session, &self.documents, self.selection.as_deref(), task.index()).await?;
        let documents = match self.key {
            Key::Text => documents,
            Key::Url => documents.filter(col("url").is_not_null())?,
        };
        register(&session, "documents", documents)?;
        let hash = match self.key {
            Key::Text => format!("content_hash(text, '{}')", self.normalise.name()),
            Key::Url => "content_hash(canonical_url(url), 'none')".into(),
        };
        // Taken apart by unnest, not by get_field: the optimiser would move that into the scan and hash
        // every text twice.
        let plan = session
            .sql(&format!(
                "select {hash} as hash, ordinal, cast(octet_length(text) as bigint unsigned) as bytes from documents"
            ))
            .await?
            .unnest_columns(&["hash"])?
            .select(vec![
                ident("hash.hi").alias("hash_hi"),
                ident("hash.lo").alias("hash_lo"),
                col("ordinal"),
                col("bytes"),
            ])?
            .sort(["hash_hi", "hash_lo", "ordinal"].map(|name| col(name).sort(true, false)).to_vec())?;
        let output = Output { kept: &["hash_hi", "hash_lo", "ordinal", "bytes"], dropped: &[] };
        task.write(plan, output, RowsRead::Made).await
    }
}

/// The removals of one partition of the hashes.
struct Groups {
    name: String,
    hashes: String,
    keep: Keep,
    partition_rows: u64,
}

#[async_trait]
impl Stage for Groups {
    fn name(&self) -> &str {
        &self.name
    }

    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        vec![self.hashes.clone()]
    }

    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "keep": self.keep }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let shards = run.shards(&self.hashes)?;
        if shards.is_empty() {
            return Ok(Vec::new());
        }
        let count = partitions(shards.iter().map(|s| s.rows).sum(), self.partition_rows);
        let digest = digest_of(&shards);
        Ok((0..count)
            .map(|index| Task {
                index,
                inputs: serde_json::json!({ "partition": index, "partitions": count, "hashes": digest }),
            })
            .collect())
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = session(task);
        let (first, last) = hash_range(task.index(), input_number(&task.task, "partitions")?);
        let hashes = task.read_all(&session, &self.hashes).await?;
        let hashes = hashes.filter(col("hash_hi").gt_eq(lit(first)).and(col("hash_hi").lt_eq(lit(last))))?;
        register(&session, "hashes", hashes)?;
        let window = |order: &str| {
            format!(
                "first_value(ordinal) over (partition by hash_hi, hash_lo order by {order}
                 rows between unbounded preceding and current row)"
            )
        };
        // Both windows run over sorted rows and hold one value: a group may have any size.
        let (cluster, survivor) = match self.keep {
            Keep::Earliest => ("survivor".to_string(), window("ordinal")),
            Keep::Longest => (window("ordinal"), window("bytes desc, ordinal")),
        };
        let plan = session
            .sql(&format!(
                "select ordinal, survivor, {cluster} as cluster_id from
                 (select *, {survivor} as survivor from hashes)"
            ))
            .await?
            .filter(col("ordinal").not_eq(col("survivor")))?
            .sort(vec![col("ordinal").sort(true, false)])?;
        let output = Output { kept: &["ordinal", "survivor", "cluster_id"], dropped: &[] };
        task.write(plan, output, RowsRead::Made).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition::tests::{Rows, removals_of, shuffled};

    #[tokio::test(flavor = "multi_thread")]
    async fn the_number_of_partitions_changes_no_removal() {
        // 300 hashes over the whole range, each of 1 to 4 documents.
        let rows = shuffled((0..750u64).map(|i| {
            let hash = (i * i % 300).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            [hash, !hash, i << 32 | i, i % 7]
        }));
        for keep in [Keep::Earliest, Keep::Longest] {
            let groups = |partition_rows| -> Vec<Arc<dyn Stage>> {
                vec![
                    Arc::new(Rows::new("hashes", &["hash_hi", "hash_lo", "ordinal", "bytes"], rows.clone())),
                    Arc::new(Groups { name: "groups".into(), hashes: "hashes".into(), keep, partition_rows }),
                ]
            };
            let (tasks, whole) = removals_of(groups(1 << 20), "groups", &["ordinal", "survivor", "cluster_id"]).await;
            assert_eq!(tasks, 1);
            assert!(whole.len() > 400);
            let (tasks, parts) = removals_of(groups(100), "groups", &["ordinal", "survivor", "cluster_id"]).await;
            assert_eq!((tasks, parts), (8, whole), "{keep:?}");
        }
    }
}
