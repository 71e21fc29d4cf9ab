//! Stage `near_pairs`: documents that share a band key.

use std::path::PathBuf;

use async_trait::async_trait;
use pipeline::{Result, RunContext, Stage, Task, TaskContext, TaskReport};

use super::signatures::{self, BandKey};
use super::{NearConfig, PAIRS, SIGNATURES, Verify};
use crate::buckets::{self, Buckets};
use crate::disk::{EXPECTED_DUPLICATES, check_room};
use crate::documents::{Documents, check_index};
use crate::partition::{PARTITION_ROWS, input_number, partition_rows, partitions, rows_of};
use crate::runs::{NUMBER_BYTES, Pair, Record, RunWriter, key_range};

/// The pairs of one band and one partition of its keys: the smallest document of every bucket with each
/// other. So in one band a document is in the pairs of one first document, and a bucket is a first document
/// with all its seconds.
pub(super) struct Pairs {
    config: NearConfig,
    against: Vec<PathBuf>,
    /// Records of a partition at least, about.
    partition_rows: u64,
}

impl Pairs {
    pub(super) fn new(config: NearConfig, against: Vec<PathBuf>) -> Self {
        Self { config, against, partition_rows: PARTITION_ROWS }
    }
}

/// Bytes of pairs of `documents` documents, about. Exact verification needs the documents of a pair by themselves, too, of
/// which the first is told once a bucket.
pub(crate) fn predicted_bytes(config: &NearConfig, documents: u64) -> u64 {
    let candidates = if config.verify == Verify::Exact { 2 * NUMBER_BYTES } else { 0 };
    let pair = (Pair::BYTES + candidates) as f64;
    (documents as f64 * EXPECTED_DUPLICATES * f64::from(config.bands) * pair) as u64
}

/// Tasks for `documents` documents, and bytes that one of them holds.
pub(crate) fn tasks_and_bytes(config: &NearConfig, documents: u64) -> (u64, u64) {
    let partition = partition_rows(documents, PARTITION_ROWS);
    let bytes = buckets::bytes::<u64>(documents, partition, config.verify == Verify::Exact);
    (u64::from(config.bands) * u64::from(partitions(documents, partition)), bytes)
}

#[async_trait]
impl Stage for Pairs {
    fn name(&self) -> &str {
        PAIRS
    }

    fn version(&self) -> u32 {
        3
    }

    fn inputs(&self) -> Vec<String> {
        vec![SIGNATURES.into()]
    }

    fn indices(&self) -> &[PathBuf] {
        &self.against
    }

    fn config(&self) -> Result<serde_json::Value> {
        let wanted = self.config.signature();
        let check = |dir: &PathBuf| check_index(dir, signatures::VERSION, &wanted);
        let against = self.against.iter().map(check).collect::<Result<Vec<_>>>()?;
        Ok(serde_json::json!({ "candidates": self.config.verify == Verify::Exact, "against": against }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let documents = Documents::of(run, SIGNATURES, &self.against)?;
        check_room(run, PAIRS, predicted_bytes(&self.config, documents.len()))?;
        let digest = documents.digest();
        let rows = partition_rows(documents.len(), self.partition_rows);
        let count = if documents.sources.is_empty() { 0 } else { partitions(documents.len(), rows) };
        Ok((0..self.config.bands)
            .flat_map(|band| (0..count).map(move |partition| (band, partition)))
            .map(|(band, partition)| Task {
                index: band * count + partition,
                inputs: serde_json::json!({
                    "band": band, "partition": partition, "partitions": count, "partition_rows": rows, "signatures": digest,
                }),
            })
            .collect())
    }

    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        Ok(tasks_and_bytes(&self.config, Documents::of(run, SIGNATURES, &self.against)?.len()).1)
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let band = input_number(&task.task, "band")?;
        let (partition, partitions) = (input_number(&task.task, "partition")?, input_number(&task.task, "partitions")?);
        let keys = key_range(partition, partitions, BandKey::KEY_BITS);
        let documents = Documents::of(&task.run, SIGNATURES, &self.against)?;
        let mut writer = RunWriter::create(task)?;
        let mut buckets = Buckets::new(band, self.config.verify == Verify::Exact, 2 * rows_of(task)?);
        documents.each_section(task, band..band + 1, keys, |source, section, keys: &[BandKey]| {
            let start = source.start + section.base;
            keys.iter().for_each(|key| buckets.push(key.key, start + u64::from(key.row)));
            buckets.shorten(&mut writer)
        })?;
        let pairs = buckets.finish(&mut writer)?;
        writer.report(pairs, serde_json::json!({ "pairs": pairs }))
    }
}
