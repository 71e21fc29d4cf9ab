//! Near-duplicate removal: MinHash, locality-sensitive hashing in bands, clusters by union-find.
//!
//! | stage | task | rows |
//! | --- | --- | --- |
//! | `near_signatures` | document shard | `band`, `key`, `ordinal`, `bytes`, sorted by band and key |
//! | `near_pairs` | band × partition of its keys | edges: `first` (smallest of the bucket), `ordinal` |
//! | `near_clusters` | one | removals: `ordinal`, `survivor`, `cluster_id`, sorted by ordinal |
//! | `near` | document shard | selection `id`, `ordinal`; dropped with `rule`, `cluster_id`, `survivor` |
//!
//! Text is read once, by the signatures, which write about 9 bytes a band and document (8 of hash,
//! the rest after compression). A task of `near_pairs` reads its range of keys out of every shard by
//! the statistics of row groups and pages and sorts it within the memory limit, on disk beyond.
//!
//! Memory that grows with the corpus is in `near_clusters` alone: 4 bytes a document (8 beyond 2³²
//! documents), twice that and 4 more with `keep = "longest"`; see [`crate::clusters`].

use std::sync::{Arc, LazyLock};

use arrow::array::{ArrayRef, AsArray, RecordBatch, UInt64Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, UInt64Type};
use async_trait::async_trait;
use datafusion::dataframe::DataFrame;
use datafusion::prelude::{col, lit};
use futures::StreamExt;
use pipeline::shard::{BATCH_ROWS, ShardWriter, part_name};
use pipeline::stage::tasks_per_shard;
use pipeline::{Error, Output, Result, RowsRead, RunContext, Stage, Task, TaskContext, TaskReport};
use serde::{Deserialize, Serialize};

use crate::clusters::{Clusters, Numbering, Removal};
use crate::partition::{PARTITION_ROWS, digest_of, hash_range, input_number, partitions};
use crate::selection::{Selection, register, session};
use crate::survivor::Keep;
use crate::union_find::Number;

/// Definition of the signature.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// datatrove's, bit for bit, see [`crate::minhash`].
    #[default]
    Compatible,
}

/// Near-duplicate removal in a recipe. The defaults are FineWeb's setting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NearConfig {
    /// Definition of the signature.
    pub mode: Mode,
    /// Words in a shingle, at least 1.
    pub ngram: u32,
    /// Bands, 1 to 255.
    pub bands: u32,
    /// Permutations in a band, at least 1.
    pub rows: u32,
    /// Seed of the permutations.
    pub seed: u32,
    /// Which member of a cluster survives.
    pub keep: Keep,
}

impl Default for NearConfig {
    fn default() -> Self {
        Self { mode: Mode::Compatible, ngram: 5, bands: 14, rows: 8, seed: 1, keep: Keep::default() }
    }
}

impl NearConfig {
    /// Refuse a setting that has no meaning.
    pub fn check(&self) -> Result<()> {
        let refuse = |key: &str, what: &str| Err(Error::setting(format!("near.{key}"), what));
        if self.ngram == 0 {
            return refuse("ngram", "must be at least 1");
        }
        if self.rows == 0 {
            return refuse("rows", "must be at least 1");
        }
        if !(1..=255).contains(&self.bands) {
            return refuse("bands", "must be 1 to 255");
        }
        if self.bands.saturating_mul(self.rows) > 4096 {
            return refuse("rows", "bands × rows must be at most 4096");
        }
        Ok(())
    }
}

/// The stages of near-duplicate removal among the documents of `selection` (all, if `None`), whose
/// text is in stage `documents`. The last is called `near`.
pub fn near_stages(config: &NearConfig, documents: &str, selection: Option<&str>) -> Vec<Arc<dyn Stage>> {
    vec![
        Arc::new(Signatures {
            config: config.clone(),
            documents: documents.into(),
            selection: selection.map(Into::into),
        }),
        Arc::new(Pairs { bands: config.bands, partition_rows: PARTITION_ROWS }),
        Arc::new(ClusterStage { keep: config.keep }),
        Arc::new(Selection {
            name: "near".into(),
            rule: "near_duplicate",
            selection: selection.unwrap_or(documents).into(),
            removals: CLUSTERS.into(),
        }),
    ]
}

const SIGNATURES: &str = "near_signatures";
const PAIRS: &str = "near_pairs";
const CLUSTERS: &str = "near_clusters";

/// The band keys of a document shard.
struct Signatures {
    config: NearConfig,
    documents: String,
    selection: Option<String>,
}

#[async_trait]
impl Stage for Signatures {
    fn name(&self) -> &str {
        SIGNATURES
    }

    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        std::iter::once(self.documents.clone()).chain(self.selection.clone()).collect()
    }

    fn config(&self) -> Result<serde_json::Value> {
        self.config.check()?;
        // Not the survivor: another policy needs no new signatures.
        let NearConfig { mode, ngram, bands, rows, seed, keep: _ } = self.config;
        Ok(serde_json::json!({ "mode": mode, "ngram": ngram, "bands": bands, "rows": rows, "seed": seed }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, self.selection.as_ref().unwrap_or(&self.documents))
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = session(task);
        let documents = task.read_selected(&session, &self.documents, self.selection.as_deref(), task.index()).await?;
        register(&session, "documents", documents)?;
        let NearConfig { ngram, bands, rows, seed, .. } = self.config;
        // The length is a fact of the document: it stands in the rows of the first band only, where it
        // costs little.
        let plan = session
            .sql(&format!(
                "select band, key, ordinal, case when band = 0 then bytes end as bytes from
                 (select get_field(band, 'band') as band, get_field(band, 'key') as key, ordinal, bytes from
                  (select unnest(minhash_bands(text, {ngram}, {bands}, {rows}, {seed})) as band, ordinal,
                          cast(octet_length(text) as bigint unsigned) as bytes
                   from documents))
                 order by band, key, ordinal"
            ))
            .await?;
        let output = Output { kept: &["band", "key", "ordinal", "bytes"], dropped: &[] };
        task.write(plan, output, RowsRead::Made).await
    }
}

/// The edges of one band and one range of its keys.
struct Pairs {
    bands: u32,
    partition_rows: u64,
}

#[async_trait]
impl Stage for Pairs {
    fn name(&self) -> &str {
        PAIRS
    }

    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        vec![SIGNATURES.into()]
    }

    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({}))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let shards = run.shards(SIGNATURES)?;
        if shards.is_empty() {
            return Ok(Vec::new());
        }
        let rows: u64 = shards.iter().map(|s| s.rows).sum();
        let count = partitions(rows / u64::from(self.bands.max(1)), self.partition_rows);
        let digest = digest_of(&shards);
        Ok((0..self.bands)
            .flat_map(|band| (0..count).map(move |partition| (band, partition)))
            .map(|(band, partition)| Task {
                index: band * count + partition,
                inputs: serde_json::json!({
                    "band": band, "partition": partition, "partitions": count, "signatures": digest,
                }),
            })
            .collect())
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = session(task);
        let band = input_number(&task.task, "band")?;
        let (first, last) = hash_range(input_number(&task.task, "partition")?, input_number(&task.task, "partitions")?);
        let keys = task.read_all(&session, SIGNATURES).await?.filter(
            col("band").eq(lit(band as u8)).and(col("key").gt_eq(lit(first))).and(col("key").lt_eq(lit(last))),
        )?;
        register(&session, "keys", keys)?;
        // The window runs over sorted rows and holds one value: a bucket may have any size.
        let plan = session
            .sql(
                "select first, ordinal from
                 (select ordinal, first_value(ordinal) over (partition by key order by ordinal
                         rows between unbounded preceding and current row) as first
                  from keys)
                 where first <> ordinal",
            )
            .await?;
        task.write(plan, Output { kept: &["first", "ordinal"], dropped: &[] }, RowsRead::Made).await
    }
}

/// The removals: what the edges connect, without its survivor.
struct ClusterStage {
    keep: Keep,
}

#[async_trait]
impl Stage for ClusterStage {
    fn name(&self) -> &str {
        CLUSTERS
    }

    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        match self.keep {
            Keep::Earliest => vec![PAIRS.into()],
            Keep::Longest => vec![PAIRS.into(), SIGNATURES.into()],
        }
    }

    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "keep": self.keep }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let pairs = run.shards(PAIRS)?;
        Ok(vec![Task { index: 0, inputs: serde_json::json!({ "pairs": digest_of(&pairs) }) }])
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let mut numbering = Numbering::default();
        self.read_edges(task, "numbering", |first, second| {
            numbering.cover(first);
            numbering.cover(second);
        })
        .await?;
        if numbering.len() <= 1 << 32 {
            self.cluster::<u32>(task, numbering).await
        } else {
            self.cluster::<u64>(task, numbering).await
        }
    }
}

/// Schema of the removals.
static REMOVALS: LazyLock<SchemaRef> = LazyLock::new(|| {
    let column = |name: &str| Field::new(name, DataType::UInt64, false);
    Arc::new(Schema::new(vec![column("ordinal"), column("survivor"), column("cluster_id")]))
});

impl ClusterStage {
    /// Unite what the edges connect and write the removals.
    async fn cluster<N: Number>(&self, task: &TaskContext, numbering: Numbering) -> Result<TaskReport> {
        let mut clusters = Clusters::<N>::new(numbering);
        self.read_edges(task, "uniting", |first, second| clusters.unite(first, second)).await?;
        if self.keep == Keep::Longest {
            let session = session(task);
            let lengths = task.read_all(&session, SIGNATURES).await?;
            let lengths = lengths.filter(col("band").eq(lit(0u8)))?.select_columns(&["ordinal", "bytes"])?;
            let mut lengths_of = clusters.by_length();
            each_pair(lengths, |ordinal, bytes| lengths_of.add(ordinal, bytes)).await?;
        }
        let mut writer = ShardWriter::create(task.stage_dir(), part_name(0), REMOVALS.clone(), Vec::new())?;
        let mut removals = clusters.removals().peekable();
        while removals.peek().is_some() {
            let batch: Vec<Removal> = removals.by_ref().take(BATCH_ROWS).collect();
            let column = |value: fn(&Removal) -> u64| -> ArrayRef {
                Arc::new(UInt64Array::from_iter_values(batch.iter().map(value)))
            };
            let columns = vec![column(|r| r.ordinal), column(|r| r.survivor), column(|r| r.cluster)];
            writer.write(RecordBatch::try_new(REMOVALS.clone(), columns)?)?;
        }
        let rows = writer.rows();
        let files = vec![writer.finish()?];
        Ok(TaskReport { files, rows_read: rows, rows_kept: rows, ..TaskReport::default() })
    }

    /// Give every edge to `take`, in the order of the shards.
    async fn read_edges(&self, task: &TaskContext, doing: &str, mut take: impl FnMut(u64, u64)) -> Result<()> {
        let shards = task.run.shards(PAIRS)?;
        let total: u64 = shards.iter().map(|s| s.rows).sum();
        let mut done = 0;
        for shard in &shards {
            let session = task.session();
            let edges = task.read(&session, PAIRS, shard.index).await?.select_columns(&["first", "ordinal"])?;
            each_pair(edges, &mut take).await?;
            done += shard.rows;
            task.progress(done, Some(total), format!("{doing} {done} of {total} edges"));
        }
        Ok(())
    }
}

/// Give every row of two columns of numbers to `take`.
async fn each_pair(rows: DataFrame, mut take: impl FnMut(u64, u64)) -> Result<()> {
    let mut stream = rows.execute_stream().await?;
    while let Some(batch) = stream.next().await {
        let batch = batch?;
        let column = |i: usize| batch.column(i).as_primitive::<UInt64Type>().values();
        column(0).iter().zip(column(1)).for_each(|(&a, &b)| take(a, b));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition::tests::{Rows, removals_of, shuffled};

    #[tokio::test(flavor = "multi_thread")]
    async fn the_number_of_partitions_changes_no_removal() {
        // Two bands; buckets of 1 to 4 documents in the first, of two neighbours in the second.
        let rows = shuffled((0..600u64).flat_map(|i| {
            let key = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            [[0, key(i * i % 300), i << 32 | i, i % 7], [1, key(i / 2 * 1000), i << 32 | i, 0]]
        }));
        for keep in [Keep::Earliest, Keep::Longest] {
            let stages = |partition_rows| -> Vec<Arc<dyn Stage>> {
                vec![
                    Arc::new(Rows::new(SIGNATURES, &["band", "key", "ordinal", "bytes"], rows.clone())),
                    Arc::new(Pairs { bands: 2, partition_rows }),
                    Arc::new(ClusterStage { keep }),
                ]
            };
            let columns = ["ordinal", "survivor", "cluster_id"];
            let (_, whole) = removals_of(stages(1 << 20), CLUSTERS, &columns).await;
            assert!(whole.len() > 300);
            let (_, parts) = removals_of(stages(100), CLUSTERS, &columns).await;
            assert_eq!(parts, whole, "{keep:?}");
            let (tasks, _) = removals_of(stages(100), PAIRS, &["first", "ordinal"]).await;
            assert_eq!(tasks, 2 * 8);
        }
    }
}
