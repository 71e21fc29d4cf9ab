//! Stage `near_clusters`: the sets of documents that pairs connect.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64};

use async_trait::async_trait;
use pipeline::{Result, RunContext, Stage, Task, TaskContext, TaskReport};
use rayon::prelude::*;

use super::{CLUSTERS, MOST_BANDS, SIGNATURES};
use crate::disk::check_room;
use crate::documents::{Documents, digest_of_stage, sum_of_notes};
use crate::partition::stop_if_asked;
use crate::removals::MEMBERS;
use crate::runs::{Buffered, Pair, Record, RunFile, RunWriter};
use crate::union_find::{Cell, Cells, UnionFind};

/// Bytes of the union-find of so many documents.
pub(super) fn union_find_bytes(documents: u64) -> u64 {
    documents * if u32::try_from(documents).is_ok() { 4 } else { 8 }
}

/// Unites what the pairs of stage `edges` connect and writes, for every document but the smallest of
/// its cluster, that one and it. All threads unite; the result is a function of the set of pairs.
pub(super) struct Clusters {
    pub(super) edges: String,
    pub(super) against: Vec<PathBuf>,
}

#[async_trait]
impl Stage for Clusters {
    fn name(&self) -> &str {
        CLUSTERS
    }

    fn version(&self) -> u32 {
        2
    }

    fn inputs(&self) -> Vec<String> {
        vec![SIGNATURES.into(), self.edges.clone()]
    }

    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({}))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let pairs = sum_of_notes(run, &self.edges, "pairs");
        let cells = union_find_bytes(Documents::of(run, SIGNATURES, &self.against)?.len());
        let in_file = if cells > run.options().memory_limit_bytes as u64 { cells } else { 0 };
        check_room(run, CLUSTERS, pairs * Pair::BYTES as u64 + in_file)?;
        Ok(vec![Task { index: 0, inputs: serde_json::json!({ "pairs": digest_of_stage(run, &self.edges) }) }])
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let documents = Documents::of(&task.run, SIGNATURES, &self.against)?.len();
        let limit = task.run.options().memory_limit_bytes;
        let spill = task.run.dir().join("spill");
        if u32::try_from(documents).is_ok() {
            self.cluster(task, Cells::new(documents as usize, limit, &spill, || AtomicU32::new(0))?)
        } else {
            self.cluster(task, Cells::new(documents as usize, limit, &spill, || AtomicU64::new(0))?)
        }
    }
}

impl Clusters {
    fn cluster<C: Cell>(&self, task: &TaskContext, mut cells: Cells<C>) -> Result<TaskReport> {
        let cells = cells.cells();
        let documents = cells.len();
        let sets = UnionFind::new(cells);
        let edges = Documents::of(&task.run, &self.edges, &[])?;
        edges.sources.par_iter().try_for_each(|source| -> Result<()> {
            stop_if_asked(task)?;
            RunFile::open(&source.path)?.each::<Pair>(0..MOST_BANDS, |pair| {
                sets.union(pair.first() as usize, pair.second as usize);
            })
        })?;
        let mut writer = RunWriter::create(task)?;
        let mut members = Buffered::new(MEMBERS);
        for number in 0..documents {
            let root = sets.find(number);
            if root != number {
                members.push(Pair::new(root as u64, number as u64), &mut writer)?;
            }
        }
        members.flush(&mut writer)?;
        let rows = members.written();
        writer.report(rows, serde_json::json!({ "pairs": rows, "documents": documents }))
    }
}
