//! The last step of every deduplication: which members of a cluster go, for whom.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use arrow::array::{ArrayRef, Float32Array, RecordBatch, StringArray, UInt64Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use pipeline::document::ordinal;
use pipeline::shard::{BATCH_ROWS, ShardWriter, part_name};
use pipeline::{Result, RunContext, Stage, Task, TaskContext, TaskReport};

use crate::disk::check_room;
use crate::documents::{
    Documents, ROW_BYTES as HEAD_BYTES, digest_of_stage, each_section_of, ordinal_of, sum_of_notes,
};
use crate::minhash::{SKETCH_BYTES, jaccard, sketch_similarity};
use crate::near::Sets;
use crate::partition::{keys_of, partition_rows, partition_tasks, rows_of};
use crate::runs::{Pair, Record, RunWriter, u32_at, u64_at};
use crate::survivor::Keep;

/// Tag of the members: pairs of the smallest document of a cluster and another of it.
pub(crate) const MEMBERS: u32 = 0;
/// Tag of the removals in the run files.
const REMOVALS: u32 = 0;
/// Bytes of a removal on disk: a record, and a row in Parquet, about.
pub(crate) const ROW_BYTES: f64 = Removal::BYTES as f64 + 0.125 + 24.0;
/// Members of a partition at least, about. So many are worked on at a time: their rows in the table of documents are looked up
/// together, which opens the files of nearly all shards.
const PARTITION_MEMBERS: u64 = 1 << 18;
/// Bytes of memory for a member: its pair, twice over, what is looked up and where to put it, and the survivor of its cluster.
const MEMBER_BYTES: u64 = 288;

/// How similar a document that goes is to its survivor.
#[derive(Clone, Debug)]
pub(crate) enum Similarity {
    /// Equal.
    One,
    /// By the sketches in the table.
    Sketch {
        /// Policy, whose value stands before the sketch.
        keep: Keep,
    },
    /// By the shingle sets.
    Exact,
}

/// Names a survivor for the clusters of a partition. Two passes: the survivors, unless they are the smallest,
/// then the members. Memory is the clusters of the partition, and about a partition of members, however many it has.
///
/// What comes out is there twice: as a table for people and, by ordinal, as runs, of which the last stage reads those of its
/// shard. A row group of the table holds documents of all shards.
pub(crate) struct Removals {
    pub(crate) name: String,
    /// Stage of the members.
    pub(crate) members: String,
    /// Stage of the table of documents.
    pub(crate) table: String,
    pub(crate) keep: Keep,
    pub(crate) similarity: Similarity,
    pub(crate) against: Vec<PathBuf>,
}

/// Schema of the removals. `survivor` and `cluster_id` are ordinals; where the survivor is in an older index,
/// `survivor_index` is its directory. `cluster_id` is the smallest member.
static SCHEMA: LazyLock<SchemaRef> = LazyLock::new(|| {
    let number = |name: &str| Field::new(name, DataType::UInt64, false);
    Arc::new(Schema::new(vec![
        number("ordinal"),
        number("survivor"),
        number("cluster_id"),
        Field::new("similarity", DataType::Float32, false),
        Field::new("survivor_index", DataType::Utf8, true),
    ]))
});

/// A document that goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Removal {
    ordinal: u64,
    survivor: u64,
    cluster: u64,
    /// Bits of the similarity, a number of 32 bits.
    similarity: u32,
    /// Where the survivor is: in this run (0), or in an older index (its place among them, from 1).
    survivor_index: u32,
}

impl Record for Removal {
    const BYTES: usize = 32;
    const KEY_BITS: u32 = 64;
    const COUNTED: bool = true;
    fn key(&self) -> u64 {
        self.ordinal
    }
    fn put(&self, bytes: &mut [u8]) {
        bytes[..8].copy_from_slice(&self.ordinal.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.survivor.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.cluster.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.similarity.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.survivor_index.to_le_bytes());
    }
    fn get(bytes: &[u8]) -> Self {
        Self {
            ordinal: u64_at(bytes, 0),
            survivor: u64_at(bytes, 8),
            cluster: u64_at(bytes, 16),
            similarity: u32_at(bytes, 24),
            survivor_index: u32_at(bytes, 28),
        }
    }
}

/// The removals of the documents of shard `shard` in stage `stage`, in order, as rows of [`SCHEMA`]; the older indices are `against`.
pub(crate) fn removals_of(task: &TaskContext, stage: &str, shard: u32, against: &[PathBuf]) -> Result<RecordBatch> {
    let own = (ordinal(shard, 0), ordinal(shard, u32::MAX));
    let mut removals = Vec::new();
    let files = Documents::of(&task.run, stage, &[])?;
    files.each_section(task, REMOVALS..REMOVALS + 1, own, |_, _, some: &[Removal]| {
        removals.extend_from_slice(some);
        Ok(())
    })?;
    removals.sort_unstable();
    rows(&removals, against)
}

/// Removals as rows of [`SCHEMA`].
fn rows(removals: &[Removal], against: &[PathBuf]) -> Result<RecordBatch> {
    let number = |value: fn(&Removal) -> u64| -> ArrayRef {
        Arc::new(UInt64Array::from_iter_values(removals.iter().map(value)))
    };
    let names: Vec<String> = against.iter().map(|dir| dir.display().to_string()).collect();
    let index = |r: &Removal| Some(names.get((r.survivor_index as usize).checked_sub(1)?)?.as_str());
    let columns = vec![
        number(|r| r.ordinal),
        number(|r| r.survivor),
        number(|r| r.cluster),
        Arc::new(Float32Array::from_iter_values(removals.iter().map(|r| f32::from_bits(r.similarity)))) as ArrayRef,
        Arc::new(removals.iter().map(index).collect::<StringArray>()),
    ];
    Ok(RecordBatch::try_new(SCHEMA.clone(), columns)?)
}

#[async_trait]
impl Stage for Removals {
    fn name(&self) -> &str {
        &self.name
    }

    fn version(&self) -> u32 {
        2
    }

    fn inputs(&self) -> Vec<String> {
        let mut inputs = vec![self.table.clone(), self.members.clone()];
        if matches!(self.similarity, Similarity::Exact) {
            inputs.push(crate::near::SETS.into());
        }
        inputs
    }

    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "keep": self.keep }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let pairs = sum_of_notes(run, &self.members, "pairs");
        check_room(run, &self.name, (pairs as f64 * ROW_BYTES) as u64)?;
        let partition = partition_rows(pairs, PARTITION_MEMBERS);
        Ok(partition_tasks(pairs, partition, digest_of_stage(run, &self.members)))
    }

    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        let pairs = sum_of_notes(run, &self.members, "pairs");
        Ok(pairs.min(partition_rows(pairs, PARTITION_MEMBERS)) * MEMBER_BYTES)
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let documents = Documents::of(&task.run, &self.table, &self.against)?;
        let survivors = self.survivors(task, &documents)?;
        let mut writer = Writer {
            table: ShardWriter::create(task.stage_dir(), part_name(task.index()), SCHEMA.clone(), Vec::new())?,
            runs: RunWriter::create(task)?,
        };
        // The smallest member, where another survives, is in no pair as the second.
        let mut first: Vec<Pair> = survivors
            .iter()
            .filter(|(root, (_, best))| root != &best)
            .map(|(&root, _)| Pair::new(root, root))
            .collect();
        first.sort_unstable();
        for chunk in first.chunks(rows_of(task)?) {
            self.write(task, &documents, &survivors, chunk, &mut writer)?;
        }
        self.each_chunk(task, |chunk| self.write(task, &documents, &survivors, chunk, &mut writer))?;
        let rows = writer.table.rows();
        let files = vec![writer.table.finish()?, writer.runs.finish(rows)?];
        Ok(TaskReport { files, rows_read: rows, rows_kept: rows, ..TaskReport::default() })
    }
}

/// The files of a task.
struct Writer {
    table: ShardWriter,
    runs: RunWriter,
}

impl Removals {
    /// Give the members of the partition to `take`, about a partition's number at a time.
    fn each_chunk(&self, task: &TaskContext, mut take: impl FnMut(&[Pair]) -> Result<()>) -> Result<()> {
        let most = rows_of(task)?;
        let mut chunk: Vec<Pair> = Vec::new();
        each_section_of(task, &self.members, MEMBERS, keys_of::<Pair>(task)?, |_, pairs: &[Pair]| {
            chunk.extend_from_slice(pairs);
            if chunk.len() >= most {
                chunk.chunks(most).try_for_each(&mut take)?;
                chunk.clear();
            }
            Ok(())
        })?;
        chunk.chunks(most).try_for_each(&mut take)
    }

    /// Rank and number of the survivor of every cluster; empty where it is the smallest member of each.
    fn survivors(&self, task: &TaskContext, documents: &Documents) -> Result<HashMap<u64, (u64, u64)>> {
        let mut survivors: HashMap<u64, (u64, u64)> = HashMap::new();
        if self.keep == Keep::Earliest {
            return Ok(survivors);
        }
        self.each_chunk(task, |chunk| {
            // The root is a member like the others, looked up with the first chunk of its cluster.
            let mut members: Vec<(u64, u64)> = chunk.iter().map(|pair| (pair.first(), pair.second)).collect();
            let mut roots: Vec<u64> = members.iter().map(|m| m.0).filter(|r| !survivors.contains_key(r)).collect();
            roots.sort_unstable();
            roots.dedup();
            members.extend(roots.into_iter().map(|root| (root, root)));
            let numbers: Vec<u64> = members.iter().map(|m| m.1).collect();
            documents.look_up(&numbers, |i, _, row| {
                let (root, number) = members[i];
                let challenger = (self.keep.rank(row), number);
                let best = survivors.entry(root).or_insert(challenger);
                *best = challenger.min(*best);
            })
        })?;
        Ok(survivors)
    }

    fn write(
        &self,
        task: &TaskContext,
        documents: &Documents,
        survivors: &HashMap<u64, (u64, u64)>,
        chunk: &[Pair],
        writer: &mut Writer,
    ) -> Result<()> {
        let survivor = |root: u64| survivors.get(&root).map_or(root, |(_, number)| *number);
        let gone: Vec<(u64, u64, u64)> = chunk
            .iter()
            .map(|pair| (pair.second, survivor(pair.first()), pair.first()))
            .filter(|(number, survivor, _)| number != survivor)
            .collect();
        let n = gone.len();
        // Survivor and first member are looked up once for those of a cluster that stand together here.
        let mut numbers: Vec<u64> = gone.iter().map(|g| g.0).collect();
        let mut cluster_of: Vec<u32> = Vec::with_capacity(n);
        for (at, cluster) in (0..).zip(gone.chunk_by(|a, b| a.2 == b.2)) {
            numbers.extend([cluster[0].1, cluster[0].2]);
            cluster_of.resize(cluster_of.len() + cluster.len(), at);
        }
        let clusters = (numbers.len() - n) / 2;
        let mut removals = vec![Removal::default(); n];
        let mut foreign = vec![false; n];
        // Of each cluster: ordinal of the survivor and where that is, ordinal of the first member.
        let mut heads = vec![(0, 0, 0); clusters];
        let (width, from) = match &self.similarity {
            Similarity::Sketch { keep } => (SKETCH_BYTES, HEAD_BYTES + keep.row_bytes()),
            _ => (0, 0),
        };
        // Of those that go, then of the survivors.
        let mut sketches = vec![0; (n + clusters) * width];
        documents.look_up(&numbers, |i, source, row| {
            let ordinal = ordinal_of(source, row);
            let place = match i.checked_sub(n).map(|i| (i / 2, i % 2)) {
                None => {
                    (removals[i].ordinal, foreign[i]) = (ordinal, source.index.is_some());
                    i
                }
                Some((cluster, 0)) => {
                    (heads[cluster].0, heads[cluster].1) = (ordinal, source.index.map_or(0, |index| index + 1));
                    n + cluster
                }
                Some((cluster, _)) => return heads[cluster].2 = ordinal,
            };
            sketches[place * width..(place + 1) * width].copy_from_slice(&row[from..from + width]);
        })?;
        for (removal, &cluster) in removals.iter_mut().zip(&cluster_of) {
            (removal.survivor, removal.survivor_index, removal.cluster) = heads[cluster as usize];
        }
        match &self.similarity {
            Similarity::One => removals.iter_mut().for_each(|r| r.similarity = 1f32.to_bits()),
            Similarity::Sketch { .. } => {
                let sketch = |place: usize| &sketches[place * width..(place + 1) * width];
                for (i, removal) in removals.iter_mut().enumerate() {
                    let of_survivor = sketch(n + cluster_of[i] as usize);
                    removal.similarity = (sketch_similarity(sketch(i), of_survivor, 0) as f32).to_bits();
                }
            }
            Similarity::Exact => {
                let mut sets = Sets::new(&task.run, documents);
                let (mut held, mut set, mut other) = (None, Vec::new(), Vec::new());
                for ((number, survivor, _), removal) in gone.iter().zip(&mut removals) {
                    if held != Some(*survivor) {
                        sets.read(*survivor, &mut set)?;
                        held = Some(*survivor);
                    }
                    sets.read(*number, &mut other)?;
                    removal.similarity = (jaccard(&set, &other) as f32).to_bits();
                }
            }
        }
        // What goes of an older index is no removal of this run.
        let mut removals: Vec<Removal> =
            removals.into_iter().zip(foreign).filter(|(_, foreign)| !foreign).map(|(removal, _)| removal).collect();
        removals.sort_unstable();
        for some in removals.chunks(BATCH_ROWS) {
            writer.table.write(rows(some, &self.against)?)?;
        }
        writer.runs.records(REMOVALS, 0, &mut removals)
    }
}
