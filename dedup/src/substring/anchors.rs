//! Stages `substring_anchors` and `substring_candidates`: anchors that the corpus has more than once.

use async_trait::async_trait;
use pipeline::{Result, RunContext, Stage, Task, TaskContext, TaskReport};

use super::windows::Finder;
use super::{ANCHORS, CANDIDATES, Input, Measure, Sizes, SubstringConfig};
use crate::disk::{EXPECTED_DUPLICATES, check_room, text_bytes};
use crate::documents::{digest_of_stage, each_section_of, sum_of_notes};
use crate::partition::{keys_of, partition_rows, partition_tasks};
use crate::runs::{Record, RunWriter, u32_at, u64_at};

/// An anchor of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Anchor {
    hash: u64,
    /// How often it stands there, which tells what the windows around it will take: an exponent of 2 and, in the lowest three bits,
    /// eighths; 0 for once.
    times: u8,
}

impl Anchor {
    fn new(hash: u64, times: u32) -> Self {
        let exponent = times.max(1).ilog2();
        let eighths = (u64::from(times) << 3 >> exponent) as u8 & 7;
        Self { hash, times: (exponent as u8) << 3 | eighths }
    }

    /// How often it stands there, or less by less than an eighth.
    fn times(&self) -> u64 {
        u64::from(self.times & 7 | 8) << (self.times >> 3) >> 3
    }
}

impl Record for Anchor {
    const BYTES: usize = 9;
    const KEY_BITS: u32 = 64;
    fn key(&self) -> u64 {
        self.hash
    }
    fn put(&self, bytes: &mut [u8]) {
        bytes[..8].copy_from_slice(&self.hash.to_le_bytes());
        bytes[8] = self.times;
    }
    fn get(bytes: &[u8]) -> Self {
        Self { hash: u64_at(bytes, 0), times: bytes[8] }
    }
}

/// An anchor of a shard that the corpus has more than once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    shard: u32,
    hash: u64,
}

impl Record for Candidate {
    const BYTES: usize = 12;
    const KEY_BITS: u32 = 32;
    const COUNTED: bool = true;
    fn key(&self) -> u64 {
        u64::from(self.shard)
    }
    fn put(&self, bytes: &mut [u8]) {
        bytes[..4].copy_from_slice(&self.shard.to_le_bytes());
        bytes[4..12].copy_from_slice(&self.hash.to_le_bytes());
    }
    fn get(bytes: &[u8]) -> Self {
        Self { shard: u32_at(bytes, 0), hash: u64_at(bytes, 4) }
    }
}

/// The one tag of the runs of these stages.
const TAG: u32 = 0;
/// Bytes of text under a word, about, so that disk is rather over- than underestimated.
const WORD_BYTES: f64 = 4.0;

/// Words of half a window, about.
pub(super) fn half_words(config: &SubstringConfig) -> f64 {
    let words = f64::from(config.length) / if config.measure == Measure::Bytes { WORD_BYTES } else { 1.0 };
    (words / 2.0).max(1.0)
}

/// Bytes of the anchors of `text` bytes of text, about: the density of minimizers is 2 / (w + 1).
fn predicted_bytes(config: &SubstringConfig, text: u64) -> u64 {
    (text as f64 / WORD_BYTES * 2.0 / (half_words(config) + 1.0) * (Anchor::BYTES as f64 + 0.25)) as u64
}

/// The anchors of a document shard.
pub(super) struct Anchors {
    pub(super) input: Input,
    pub(super) sizes: Sizes,
}

#[async_trait]
impl Stage for Anchors {
    fn name(&self) -> &str {
        ANCHORS
    }
    fn version(&self) -> u32 {
        2
    }
    fn inputs(&self) -> Vec<String> {
        self.input.texts.stages()
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!(self.input.config))
    }
    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let text = text_bytes(run, &self.input.texts.documents)?;
        check_room(run, ANCHORS, predicted_bytes(&self.input.config, text))?;
        self.input.texts.tasks(run)
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let mut writer = RunWriter::create(task)?;
        let (mut finder, mut hashes, mut written) = (Finder::default(), Vec::new(), 0);
        let mut flush = |hashes: &mut Vec<u64>, writer: &mut RunWriter| {
            hashes.sort_unstable();
            let one = |same: &[u64]| Anchor::new(same[0], u32::try_from(same.len()).unwrap_or(u32::MAX));
            let mut anchors: Vec<Anchor> = hashes.chunk_by(|a, b| a == b).map(one).collect();
            hashes.clear();
            written += anchors.len();
            writer.records(TAG, 0, &mut anchors)
        };
        let documents = self
            .input
            .texts
            .each(task, task.index(), |_, text| {
                finder.set(text, &self.input.config);
                let places = finder.windows().chunk_by(|a, b| a.anchor == b.anchor);
                hashes.extend(places.map(|windows| finder.anchor(&windows[0])));
                if hashes.len() >= self.sizes.section { flush(&mut hashes, &mut writer) } else { Ok(()) }
            })
            .await?;
        flush(&mut hashes, &mut writer)?;
        writer.report(documents, serde_json::json!({ "anchors": written }))
    }
}

/// The anchors of a partition that stand in two places; the journal says in how many places they stand, about.
pub(super) struct Candidates {
    pub(super) sizes: Sizes,
}

#[async_trait]
impl Stage for Candidates {
    fn name(&self) -> &str {
        CANDIDATES
    }
    fn version(&self) -> u32 {
        2
    }
    fn inputs(&self) -> Vec<String> {
        vec![ANCHORS.into()]
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({}))
    }
    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let anchors = sum_of_notes(run, ANCHORS, "anchors");
        check_room(run, CANDIDATES, (anchors as f64 * EXPECTED_DUPLICATES * (Candidate::BYTES + 1) as f64) as u64)?;
        let partition = partition_rows(anchors, self.sizes.partition);
        Ok(partition_tasks(anchors, partition, digest_of_stage(run, ANCHORS)))
    }
    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        let anchors = sum_of_notes(run, ANCHORS, "anchors");
        let partition = anchors.min(partition_rows(anchors, self.sizes.partition));
        let candidates = anchors.min(self.sizes.section as u64) * size_of::<Candidate>() as u64;
        // Hash, shard, and the anchor itself.
        Ok(2 * partition * (16 + size_of::<Anchor>()) as u64 + candidates)
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let mut writer = RunWriter::create(task)?;
        let mut anchors = Vec::new();
        each_section_of(task, ANCHORS, TAG, keys_of::<Anchor>(task)?, |source, found: &[Anchor]| {
            anchors.extend(found.iter().map(|anchor| (anchor.hash, source.shard, *anchor)));
            Ok(())
        })?;
        anchors.sort_unstable();
        let (mut candidates, mut written, mut places) = (Vec::new(), 0, 0);
        for anchor in anchors.chunk_by(|a, b| a.0 == b.0) {
            if anchor.len() == 1 && anchor[0].2.times == 0 {
                continue;
            }
            places += anchor.iter().map(|section| section.2.times()).sum::<u64>();
            let shards = anchor.chunk_by(|a, b| a.1 == b.1);
            candidates.extend(shards.map(|shard| Candidate { shard: shard[0].1, hash: shard[0].0 }));
            if candidates.len() >= self.sizes.section {
                written += candidates.len() as u64;
                writer.records(TAG, 0, &mut candidates)?;
                candidates.clear();
            }
        }
        written += candidates.len() as u64;
        writer.records(TAG, 0, &mut candidates)?;
        writer.report(written, serde_json::json!({ "candidates": written, "places": places }))
    }
}

/// The anchors of the task's shard that the corpus has more than once, sorted.
pub(super) fn candidates(task: &TaskContext) -> Result<Vec<u64>> {
    let mut hashes = Vec::new();
    let shard = u64::from(task.index());
    each_section_of(task, CANDIDATES, TAG, (shard, shard), |_, found: &[Candidate]| {
        hashes.extend(found.iter().map(|candidate| candidate.hash));
        Ok(())
    })?;
    hashes.sort_unstable();
    Ok(hashes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_anchor_tells_how_often_it_stands() {
        for times in [1, 2, 3, 4, 10, 1000, 12_345, 10_000_000, u32::MAX] {
            let mut bytes = [0; Anchor::BYTES];
            Anchor::new(5, times).put(&mut bytes);
            let anchor = Anchor::get(&bytes);
            assert_eq!((anchor.hash, anchor.times == 0), (5, times == 1));
            let of = anchor.times() as f64 / f64::from(times);
            assert!(of > 0.875 && of <= 1.0, "{times}: {}", anchor.times());
        }
    }
}
