//! Many equal documents, many distinct ones, and band keys that were made to collide.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, FixedSizeBinaryArray, RecordBatch, StringViewArray, UInt64Array, new_null_array};
use async_trait::async_trait;
use dedup::minhash::SKETCH_BYTES;
use dedup::near::{SignatureWriter, clustering_stages};
use dedup::{ExactConfig, Mode, NearConfig, Verify, exact_stages, near_stages};
use pipeline::document::{SCHEMA, document_id, ordinal};
use pipeline::shard::{ShardWriter, part_name};
use pipeline::{RunContext, RunOptions, Runner, Stage, Task, TaskContext, TaskReport};

const SHARDS: u32 = 8;

/// A stage `documents` of short texts, the same in every place or another in each.
struct Texts {
    rows: u32,
    same: bool,
}

#[async_trait]
impl Stage for Texts {
    fn name(&self) -> &str {
        "documents"
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        Vec::new()
    }
    fn config(&self) -> pipeline::Result<serde_json::Value> {
        Ok(serde_json::json!({ "rows": self.rows, "same": self.same }))
    }
    async fn tasks(&self, _: &RunContext) -> pipeline::Result<Vec<Task>> {
        Ok((0..SHARDS).map(|index| Task { index, inputs: serde_json::json!({}) }).collect())
    }
    async fn execute(&self, task: &TaskContext) -> pipeline::Result<TaskReport> {
        let mut writer = ShardWriter::create(task.stage_dir(), part_name(task.index()), SCHEMA.clone(), Vec::new())?;
        for first in (0..self.rows).step_by(1 << 14) {
            let rows: Vec<u32> = (first..self.rows.min(first + (1 << 14))).collect();
            let id = |row: &u32| Some(document_id(&format!("{}", task.index()), u64::from(*row)));
            let text = |row: &u32| {
                let row = if self.same { 0 } else { 1 + ordinal(task.index(), *row) };
                format!("page {row} has words {row} times like everybody has copied {row}")
            };
            let null = |column: usize| new_null_array(SCHEMA.field(column).data_type(), rows.len());
            let columns: Vec<ArrayRef> = vec![
                Arc::new(FixedSizeBinaryArray::try_from_sparse_iter_with_size(rows.iter().map(id), 16)?),
                Arc::new(UInt64Array::from_iter_values(rows.iter().map(|row| ordinal(task.index(), *row)))),
                Arc::new(StringViewArray::from_iter_values(rows.iter().map(text))),
                null(3),
                Arc::new(StringViewArray::from_iter_values(rows.iter().map(|_| "test"))),
                null(5),
                null(6),
                null(7),
            ];
            writer.write(RecordBatch::try_new(SCHEMA.clone(), columns)?)?;
        }
        let rows = u64::from(self.rows);
        Ok(TaskReport { files: vec![writer.finish()?], rows_read: rows, rows_kept: rows, ..TaskReport::default() })
    }
}

async fn run(dir: &Path, first: impl Stage + 'static, stages: Vec<Arc<dyn Stage>>) -> Arc<RunContext> {
    let run = RunContext::new(dir, RunOptions { threads: 2, ..RunOptions::new() }).unwrap();
    let all = std::iter::once(Arc::new(first) as Arc<dyn Stage>).chain(stages).collect();
    Runner::new(run.clone(), all).unwrap().run(None).await.unwrap();
    run
}

/// Rows that a stage kept, and that it dropped.
fn rows(run: &RunContext, stage: &str) -> (u64, u64) {
    let journal = run.journal(stage);
    (journal.values().map(|e| e.rows_kept).sum(), journal.values().flat_map(|e| e.dropped.values()).sum())
}

/// Exact, and near beside it: both see every document.
fn both(verify: Verify) -> Vec<Arc<dyn Stage>> {
    let config = NearConfig { mode: Mode::Fast, verify, ..NearConfig::default() };
    let mut stages = exact_stages(&ExactConfig::default(), "documents", None, None, Path::new(".")).unwrap();
    stages.extend(near_stages(&config, "documents", None, None, Path::new(".")).unwrap());
    stages
}

#[tokio::test(flavor = "multi_thread")]
async fn a_million_equal_documents_are_one_cluster() {
    let dir = tempfile::tempdir().unwrap();
    // More than 2²⁰, the pairs that verification holds: the group is looked at in a file.
    let run = run(dir.path(), Texts { rows: 135_000, same: true }, both(Verify::Sketch)).await;
    assert_eq!(rows(&run, "exact"), (1, 1_079_999));
    assert_eq!(rows(&run, "near"), (1, 1_079_999));
    assert_eq!(run.journal("near")[&0].rows_kept, 1, "the earliest stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_thousand_distinct_documents_all_stay() {
    let dir = tempfile::tempdir().unwrap();
    let run = run(dir.path(), Texts { rows: 25_000, same: false }, both(Verify::None)).await;
    assert_eq!(rows(&run, "exact"), (200_000, 0));
    assert_eq!(rows(&run, "near"), (200_000, 0));
}

/// Signatures that were made up: one band's key is that of all documents, every other one's own.
struct Collisions {
    config: NearConfig,
    documents: u32,
}

/// MurmurHash3's finaliser.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

#[async_trait]
impl Stage for Collisions {
    fn name(&self) -> &str {
        "near_signatures"
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        Vec::new()
    }
    fn config(&self) -> pipeline::Result<serde_json::Value> {
        Ok(serde_json::json!({ "documents": self.documents }))
    }
    async fn tasks(&self, _: &RunContext) -> pipeline::Result<Vec<Task>> {
        Ok((0..SHARDS).map(|index| Task { index, inputs: serde_json::json!({}) }).collect())
    }
    async fn execute(&self, task: &TaskContext) -> pipeline::Result<TaskReport> {
        let mut writer = SignatureWriter::create(task, &self.config)?;
        for row in (task.index()..self.documents).step_by(SHARDS as usize) {
            // The top bits of every key are the same: one radix partition has them all.
            let keys: Vec<u64> =
                (0..14u64).map(|band| if band == 3 { 77 } else { mix(u64::from(row) << 4 | band) >> 24 }).collect();
            writer.push(&keys, |table| {
                table.extend_from_slice(&row.to_le_bytes());
                table.extend_from_slice(&100u32.to_le_bytes());
                table.extend((0..SKETCH_BYTES as u64).map(|byte| mix(!(u64::from(row) << 6 | byte)) as u8));
            })?;
        }
        let rows = writer.rows();
        Ok(TaskReport { files: vec![writer.finish()?], rows_read: rows, rows_kept: rows, ..TaskReport::default() })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_made_to_collide_are_one_cluster_unless_verified() {
    // Verified, the five billion pairs of a hundred thousand are too many: the comparisons are bounded, and the journal says so.
    for (verify, documents, gone) in
        [(Verify::None, 100_000, 99_999), (Verify::Sketch, 2_000, 0), (Verify::Sketch, 100_000, 0)]
    {
        let config = NearConfig { mode: Mode::Fast, verify, ..NearConfig::default() };
        let dir = tempfile::tempdir().unwrap();
        let stages = clustering_stages(&config).unwrap();
        let run = run(dir.path(), Collisions { config, documents }, stages).await;
        assert_eq!(rows(&run, "near_removals").0, gone, "{verify:?}");
        let note = |name: &str| -> u64 {
            run.journal("near_verified").values().filter_map(|entry| entry.notes.get(name)?.as_u64()).sum()
        };
        let (compared, left) = (note("compared"), note("not_compared"));
        let pairs = if verify == Verify::Sketch { u64::from(documents) * u64::from(documents - 1) / 2 } else { 0 };
        assert_eq!(compared + left, pairs, "every pair is looked at or counted");
        assert!(compared < 70_000_000 && (documents == 100_000 || left == 0), "{compared} {left}");
    }
}
