//! Stage `near_verified`: pairs of documents in one bucket that are as similar as the threshold asks.

use std::collections::HashMap;
use std::path::PathBuf;

use async_trait::async_trait;
use pipeline::{Result, RunContext, Stage, Task, TaskContext, TaskReport};

use super::{NearConfig, PAIRS, SETS, SIGNATURES, Sets, VERIFIED, Verify};
use crate::disk::check_room;
use crate::documents::{Documents, ROW_BYTES, digest_of_stage, run_files, sum_of_notes};
use crate::minhash::{jaccard, positions_of_band, sketch_similarity};
use crate::partition::{input_number, partitions, stop_if_asked};
use crate::runs::{Buffered, Pair, Record, RunFile, RunWriter, key_range};

/// Tag of the pairs.
pub(super) const SIMILAR: u32 = 0;

/// Pairs of a partition, about, every band counted.
const PARTITION_PAIRS: u64 = 1 << 20;

/// Verifies a partition of the pairs.
///
/// All buckets of one first document are looked at together. Each other document is compared with the first
/// one; those that are not similar to it with all others of a bucket they are in, unless both are
/// connected already. So two documents end in one cluster exactly where a chain of pairs leads from one to the
/// other, each pair in a common bucket and similar.
pub(super) struct Verified {
    pub(super) config: NearConfig,
    pub(super) against: Vec<PathBuf>,
}

#[async_trait]
impl Stage for Verified {
    fn name(&self) -> &str {
        VERIFIED
    }

    fn version(&self) -> u32 {
        2
    }

    fn inputs(&self) -> Vec<String> {
        match self.config.verify {
            Verify::Exact => vec![SIGNATURES.into(), PAIRS.into(), SETS.into()],
            _ => vec![SIGNATURES.into(), PAIRS.into()],
        }
    }

    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "verify": self.config.verify, "threshold": self.config.threshold }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let pairs = sum_of_notes(run, PAIRS, "pairs");
        // If all of them are similar, and each is in one band alone.
        check_room(run, VERIFIED, pairs * Pair::BYTES as u64)?;
        let count = partitions(pairs, PARTITION_PAIRS);
        let pairs = digest_of_stage(run, PAIRS);
        let task = |index| Task { index, inputs: serde_json::json!({ "partitions": count, "pairs": pairs }) };
        Ok((0..count).map(task).collect())
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let documents = Documents::of(&task.run, SIGNATURES, &self.against)?;
        let buckets = self.buckets(task)?;
        let mut judge = Judge {
            config: &self.config,
            sets: (self.config.verify == Verify::Exact).then(|| Sets::new(&task.run, &documents)),
            sketches: HashMap::new(),
            looked: u64::MAX,
            set: Vec::new(),
            other: Vec::new(),
            compared: 0,
        };
        if judge.sets.is_none() {
            let mut numbers: Vec<u64> = buckets.iter().flat_map(|(pair, _)| [pair.first(), pair.second]).collect();
            numbers.sort_unstable();
            numbers.dedup();
            let from = ROW_BYTES + self.config.keep.row_bytes();
            documents.look_up(&numbers, |i, _, row| {
                judge.sketches.insert(numbers[i], row[from..].into());
            })?;
        }
        let mut writer = RunWriter::create(task)?;
        let mut similar = Buffered::new(SIMILAR);
        let mut group = Vec::new();
        for pairs in buckets.chunk_by(|a, b| a.0.first() == b.0.first()) {
            stop_if_asked(task)?;
            group.clear();
            group.push((pairs[0].0.first(), u128::MAX));
            group.extend(pairs.iter().map(|(pair, bands)| (pair.second, *bands)));
            verify(&group, &mut judge, |a, b| similar.push(Pair::new(a, b), &mut writer))?;
        }
        similar.flush(&mut writer)?;
        let rows = similar.written();
        let notes = serde_json::json!({ "pairs": rows, "candidates": buckets.len(), "compared": judge.compared });
        Ok(TaskReport {
            files: vec![writer.finish(rows)?],
            rows_read: rows,
            rows_kept: rows,
            notes,
            ..TaskReport::default()
        })
    }
}

impl Verified {
    /// The pairs of the partition, each with the bands it is in, in order.
    fn buckets(&self, task: &TaskContext) -> Result<Vec<(Pair, u128)>> {
        let count = input_number(&task.task, "partitions")?;
        let (first, last) = key_range(task.index(), count, Pair::KEY_BITS);
        let (mut pairs, mut most) = (Vec::new(), 4 * PARTITION_PAIRS as usize);
        let mut bytes = Vec::new();
        for path in run_files(&task.run, PAIRS) {
            let file = RunFile::open(&path)?;
            for band in 0..self.config.bands {
                for section in file.sections(band) {
                    file.range::<Pair>(section, first, last, &mut bytes, |pair| pairs.push((pair, 1u128 << band)))?;
                }
            }
            if pairs.len() > most {
                merge(&mut pairs);
                most = most.max(2 * pairs.len());
            }
        }
        merge(&mut pairs);
        Ok(pairs)
    }
}

/// Sort, and make one of equal pairs.
fn merge(pairs: &mut Vec<(Pair, u128)>) {
    pairs.sort_unstable();
    pairs.dedup_by(|next, pair| {
        let same = next.0 == pair.0;
        if same {
            pair.1 |= next.1;
        }
        same
    });
}

/// Find a forest of similar pairs of a group. Two documents may be compared where they share a band.
fn verify(group: &[(u64, u128)], judge: &mut Judge<'_>, mut similar: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
    fn find(parents: &mut [u32], mut at: u32) -> u32 {
        while parents[at as usize] != at {
            parents[at as usize] = parents[parents[at as usize] as usize];
            at = parents[at as usize];
        }
        at
    }
    let mut parents: Vec<u32> = (0..group.len() as u32).collect();
    let mut sets = group.len();
    for i in 0..group.len() {
        if sets == 1 {
            break;
        }
        for j in i + 1..group.len() {
            let (a, b) = (find(&mut parents, i as u32), find(&mut parents, j as u32));
            let shared = group[i].1 & group[j].1;
            if a != b && shared != 0 && judge.similar(group[i].0, group[j].0, shared.trailing_zeros())? {
                parents[b.max(a) as usize] = a.min(b);
                sets -= 1;
                similar(group[i].0.min(group[j].0), group[i].0.max(group[j].0))?;
            }
        }
    }
    Ok(())
}

/// Says whether two documents are similar.
struct Judge<'d> {
    config: &'d NearConfig,
    sets: Option<Sets<'d>>,
    sketches: HashMap<u64, Box<[u8]>>,
    /// The document whose set is in `set`.
    looked: u64,
    set: Vec<u64>,
    other: Vec<u64>,
    compared: u64,
}

impl Judge<'_> {
    /// Of two documents that share `band`.
    fn similar(&mut self, a: u64, b: u64, band: u32) -> Result<bool> {
        self.compared += 1;
        let similarity = match &mut self.sets {
            Some(sets) => {
                if self.looked != a {
                    sets.read(a, &mut self.set)?;
                    self.looked = a;
                }
                sets.read(b, &mut self.other)?;
                jaccard(&self.set, &self.other)
            }
            None => match (self.sketches.get(&a), self.sketches.get(&b)) {
                (Some(a), Some(b)) => {
                    let (bands, rows) = (self.config.bands as usize, self.config.rows as usize);
                    sketch_similarity(a, b, bands * rows, positions_of_band(band as usize, bands, rows))
                }
                _ => 0.0,
            },
        };
        Ok(similarity >= self.config.threshold)
    }
}
