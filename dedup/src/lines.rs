//! Lines and paragraphs that stand in many documents: boilerplate, removed from the texts.
//!
//! | stage | task | output |
//! | --- | --- | --- |
//! | `line_hashes` (`exact`) | document shard | runs: every line's 128-bit hash once a shard, with its documents |
//! | `line_counts` (`exact`) | partition of the hashes | runs: by shard, the lines that stand in too many documents |
//! | `line_filter` (`bloom`) | one | the same, from one pass over the text with a Bloom filter |
//! | `lines` | document shard | documents without these lines; dropped, where nothing is left |
//! | its table `lines_frequent` (`exact`) | | those of the most frequent lines that stand in this shard first: `line`, `documents` |
//!
//! `exact` counts by external aggregation: hashes are partitioned on disk, a task holds one partition, and what a
//! shard needs to know comes to it as one range of a run. `bloom` (Bloom 1970) remembers the lines of earlier
//! documents in a filter of fixed size: a line seen before goes, and one that was not goes with the stated
//! probability at most. More distinct lines than the stated number stop the run.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray, StringViewBuilder, UInt64Array};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema};
use async_trait::async_trait;
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};
use datafusion::prelude::{col, lit, when};
use pipeline::document::COLUMNS;
use pipeline::report::KEPT_LINE_CHARS;
use pipeline::shard::{ShardWriter, part_name};
use pipeline::stage::RULE;
use pipeline::{Error, Output, PendingFile, Result, RowsRead, RunContext, Stage, Task, TaskContext, TaskReport};
use serde::{Deserialize, Serialize};

use crate::disk::{EXPECTED_DUPLICATES, check_room, most_text_bytes, text_bytes};
use crate::documents::{digest_of_stage, each_section_of, sum_of_notes};
use crate::normalise::{Normalise, content_hash};
use crate::partition::{PARTITION_ROWS, keys_of, partition_rows, partition_tasks, stop_if_asked};
use crate::runs::{Record, RunWriter, u32_at, u64_at};
use crate::texts::Texts;

/// What is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// What is between line ends.
    #[default]
    Line,
    /// What is between empty lines.
    Paragraph,
}

/// How lines seen before are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// By counting all of them on disk.
    #[default]
    Exact,
    /// By a Bloom filter, in one pass: `max_documents` is 1 and the first document keeps its line.
    Bloom,
}

/// Line and paragraph deduplication in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinesConfig {
    /// What is compared.
    pub unit: Unit,
    /// How.
    pub method: Method,
    /// Normal form under which two lines are equal.
    pub normalise: Normalise,
    /// Documents that a line may stand in.
    pub max_documents: u32,
    /// Whether the first of too many documents keeps the line.
    pub keep_first: bool,
    /// Shorter lines, in bytes without white space around, stay.
    pub min_bytes: u32,
    /// `bloom`: probability that a new line is taken for one seen before.
    pub false_positive_rate: f64,
    /// `bloom`: distinct lines that the filter is made for. More stop the run: in a filter that is too full, lines that
    /// stand nowhere else are taken for lines seen before.
    pub expected_lines: u64,
}

impl Default for LinesConfig {
    fn default() -> Self {
        Self {
            unit: Unit::default(),
            method: Method::default(),
            normalise: Normalise::default(),
            max_documents: 1,
            keep_first: true,
            min_bytes: 1,
            false_positive_rate: 1e-4,
            expected_lines: 100_000_000,
        }
    }
}

impl LinesConfig {
    fn check(&self) -> Result<()> {
        let refuse = |key: &str, what: &str| Err(Error::setting(format!("lines.{key}"), what));
        if self.max_documents == 0 {
            return refuse("max_documents", "must be at least 1");
        }
        if self.method == Method::Bloom {
            if self.max_documents != 1 || !self.keep_first {
                return refuse(
                    "method",
                    "a Bloom filter cannot count: use max_documents = 1, keep_first = true, or method = \"exact\"",
                );
            }
            if !(self.false_positive_rate > 0.0 && self.false_positive_rate < 1.0) || self.expected_lines == 0 {
                return refuse("false_positive_rate", "must be between 0 and 1, and expected_lines at least 1");
            }
        }
        Ok(())
    }
}

/// Name of the last stage, whose kept shards are documents.
pub const LINES: &str = "lines";
const HASHES: &str = "line_hashes";
const COUNTS: &str = "line_counts";
const FILTER: &str = "line_filter";

/// The stages of line deduplication of the documents of `selection` (all, if `None`), whose text is in stage
/// `documents`. The last is called `lines`.
pub fn line_stages(config: &LinesConfig, documents: &str, selection: Option<&str>) -> Result<Vec<Arc<dyn Stage>>> {
    config.check()?;
    let input = Input { config: config.clone(), texts: Texts::new(documents, selection) };
    let last = |decisions: &str| Arc::new(Rewrite { input: input.clone(), decisions: decisions.into() });
    Ok(match config.method {
        Method::Exact => vec![
            Arc::new(Hashes { input: input.clone() }),
            Arc::new(Counts { config: config.clone(), partition_rows: PARTITION_ROWS }),
            last(COUNTS),
        ],
        Method::Bloom => vec![Arc::new(Filter { input: input.clone() }), last(FILTER)],
    })
}

/// The texts that are read, and how.
#[derive(Clone)]
struct Input {
    config: LinesConfig,
    texts: Texts,
}

impl Input {
    /// Give the hashes of the lines of every document of a shard to `take`, with the number of the document; how many
    /// documents there were.
    async fn each_document(
        &self,
        task: &TaskContext,
        shard: u32,
        mut take: impl FnMut(u32, &[u128]) -> Result<()> + Send,
    ) -> Result<u64> {
        let (mut row, mut hashes, mut scratch) = (0, Vec::new(), String::new());
        self.texts
            .each(task, shard, |_, text| {
                hashes.clear();
                for unit in units(text, self.config.unit) {
                    hashes.extend(hash(unit, &self.config, &mut scratch));
                }
                take(row, &hashes)?;
                row += 1;
                Ok(())
            })
            .await
    }
}

/// The lines or paragraphs of a text, each with what ends it.
fn units(text: &str, unit: Unit) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = match unit {
            Unit::Line => rest.find('\n').map_or(rest.len(), |at| at + 1),
            Unit::Paragraph => paragraph_end(rest),
        };
        let (first, behind) = rest.split_at(end);
        rest = behind;
        Some(first)
    })
}

/// End of the first paragraph, the empty lines behind it included.
fn paragraph_end(text: &str) -> usize {
    let (mut at, mut empty) = (0, false);
    for line in text.split_inclusive('\n') {
        let blank = line.trim().is_empty();
        if empty && !blank {
            return at;
        }
        empty |= blank;
        at += line.len();
    }
    text.len()
}

/// The hash of a line, if it is long enough to be compared.
fn hash(unit: &str, config: &LinesConfig, scratch: &mut String) -> Option<u128> {
    let trimmed = unit.trim();
    let compared = !trimmed.is_empty() && trimmed.len() >= config.min_bytes as usize;
    compared.then(|| content_hash(trimmed, config.normalise, scratch))
}

/// A line of a shard: documents of the shard it stands in, and the first of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct LineKey {
    high: u64,
    low: u64,
    first: u32,
    documents: u32,
}

impl Record for LineKey {
    const BYTES: usize = 24;
    const KEY_BITS: u32 = 64;
    fn key(&self) -> u64 {
        self.high
    }
    fn put(&self, bytes: &mut [u8]) {
        bytes[..8].copy_from_slice(&self.high.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.low.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.first.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.documents.to_le_bytes());
    }
    fn get(bytes: &[u8]) -> Self {
        Self { high: u64_at(bytes, 0), low: u64_at(bytes, 8), first: u32_at(bytes, 16), documents: u32_at(bytes, 20) }
    }
}

/// A line that goes from a shard, but for the first time it stands in document `keep`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Hit {
    shard: u32,
    high: u64,
    low: u64,
    keep: u32,
}

/// No document keeps the line.
const NONE: u32 = u32::MAX;

impl Record for Hit {
    const BYTES: usize = 24;
    const KEY_BITS: u32 = 32;
    const COUNTED: bool = true;
    fn key(&self) -> u64 {
        u64::from(self.shard)
    }
    fn put(&self, bytes: &mut [u8]) {
        bytes[..4].copy_from_slice(&self.shard.to_le_bytes());
        bytes[4..12].copy_from_slice(&self.high.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.low.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.keep.to_le_bytes());
    }
    fn get(bytes: &[u8]) -> Self {
        Self { shard: u32_at(bytes, 0), high: u64_at(bytes, 4), low: u64_at(bytes, 12), keep: u32_at(bytes, 20) }
    }
}

/// Bytes of text under a line, about: rather few, for a prediction that should not be too small.
const LINE_BYTES: f64 = 40.0;

const KEYS: u32 = 0;
const HITS: u32 = 0;
/// Distinct lines of a section of hashes, and hits of a section: 32 MB.
const SECTION_RECORDS: usize = 1 << 20;

/// Bytes of memory of a distinct line while they are gathered: an entry of a table that is half empty, and the record.
const GATHERED_BYTES: u64 = 96;
/// Bytes of memory of a line that is looked up in a table: an entry of one that has just grown, beside the one it grew from.
const LOOKED_UP_BYTES: u64 = 112;

/// What the journal says of a task's hits: those of the shard that has the most. Added up over tasks, it is what a shard has at
/// most, and nearly what one has, since partitions are of hashes.
const MOST_HITS: &str = "most_hits_of_a_shard";

struct Hashes {
    input: Input,
}

#[async_trait]
impl Stage for Hashes {
    fn name(&self) -> &str {
        HASHES
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        self.input.texts.stages()
    }
    fn config(&self) -> Result<serde_json::Value> {
        let LinesConfig { unit, normalise, min_bytes, .. } = &self.input.config;
        Ok(serde_json::json!({ "unit": unit, "normalise": normalise, "min_bytes": min_bytes }))
    }
    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let lines = text_bytes(run, &self.input.texts.documents)? as f64 / LINE_BYTES;
        check_room(run, HASHES, (lines * (LineKey::BYTES + 1) as f64) as u64)?;
        self.input.texts.tasks(run)
    }
    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        let lines = (text_bytes(run, &self.input.texts.documents)? as f64 / LINE_BYTES) as u64;
        Ok(lines.min(SECTION_RECORDS as u64) * GATHERED_BYTES)
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let mut writer = RunWriter::create(task)?;
        let mut lines: HashMap<u128, (u32, u32)> = HashMap::new();
        let mut written = 0;
        let mut seen = HashSet::new();
        let mut flush = |lines: &mut HashMap<u128, (u32, u32)>, writer: &mut RunWriter| {
            let key = |(hash, (first, documents)): (u128, (u32, u32))| LineKey {
                high: (hash >> 64) as u64,
                low: hash as u64,
                first,
                documents,
            };
            let mut keys: Vec<LineKey> = lines.drain().map(key).collect();
            written += keys.len();
            writer.records(KEYS, 0, &mut keys)
        };
        let documents = self
            .input
            .each_document(task, task.index(), |row, hashes| {
                seen.clear();
                for &hash in hashes {
                    if seen.insert(hash) {
                        lines.entry(hash).or_insert((row, 0)).1 += 1;
                    }
                }
                if lines.len() >= SECTION_RECORDS { flush(&mut lines, &mut writer) } else { Ok(()) }
            })
            .await?;
        flush(&mut lines, &mut writer)?;
        writer.report(documents, serde_json::json!({ "lines": written }))
    }
}

/// Lines that the journal of a partition tells of, and that `lines_frequent` holds in all.
const MOST_FREQUENT: usize = 20;
/// Lines that a task holds before it leaves those.
const HELD_FREQUENT: usize = 1 << 12;

/// A line that stands in many documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Frequent {
    documents: u64,
    high: u64,
    low: u64,
    /// The first shard it stands in: whose task writes down its text.
    shard: u32,
}

/// Leave those of `lines` that stand in the most documents, these first.
fn keep_most_frequent(lines: &mut Vec<Frequent>) {
    lines.sort_unstable_by_key(|line| (std::cmp::Reverse(line.documents), line.high, line.low));
    lines.truncate(MOST_FREQUENT);
}

/// The most frequent lines of all partitions.
fn most_frequent(run: &RunContext, stage: &str) -> Result<Vec<Frequent>> {
    let mut all = Vec::new();
    for entry in run.journal(stage).into_values() {
        let told = entry.notes.get("most_frequent").cloned().unwrap_or_else(|| serde_json::json!([]));
        all.extend(serde_json::from_value::<Vec<Frequent>>(told).map_err(Error::abort)?);
        keep_most_frequent(&mut all);
    }
    Ok(all)
}
/// A line of a shard as counting has it: hash, shard, and what [`LineKey`] says.
type Counted = (u64, u64, u32, u32, u32);

struct Counts {
    config: LinesConfig,
    /// Records of a partition at least, about.
    partition_rows: u64,
}

#[async_trait]
impl Stage for Counts {
    fn name(&self) -> &str {
        COUNTS
    }
    fn version(&self) -> u32 {
        3
    }
    fn inputs(&self) -> Vec<String> {
        vec![HASHES.into()]
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "max_documents": self.config.max_documents, "keep_first": self.config.keep_first }))
    }
    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let lines = sum_of_notes(run, HASHES, "lines");
        check_room(run, COUNTS, (lines as f64 * EXPECTED_DUPLICATES * (Hit::BYTES + 1) as f64) as u64)?;
        let partition = partition_rows(lines, self.partition_rows);
        Ok(partition_tasks(lines, partition, digest_of_stage(run, HASHES)))
    }
    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        let lines = sum_of_notes(run, HASHES, "lines");
        let partition = lines.min(partition_rows(lines, self.partition_rows));
        let hits = lines.min(SECTION_RECORDS as u64) * size_of::<Hit>() as u64;
        Ok(2 * partition * size_of::<Counted>() as u64 + hits)
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let mut writer = RunWriter::create(task)?;
        let mut lines: Vec<Counted> = Vec::new();
        each_section_of(task, HASHES, KEYS, keys_of::<LineKey>(task)?, |source, keys: &[LineKey]| {
            lines.extend(keys.iter().map(|key| (key.high, key.low, source.shard, key.first, key.documents)));
            Ok(())
        })?;
        lines.sort_unstable();
        let (mut hits, mut frequent) = (Vec::new(), 0);
        let mut hits_of: HashMap<u32, u64> = HashMap::new();
        let mut most = Vec::new();
        for line in lines.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            let documents: u64 = line.iter().map(|l| u64::from(l.4)).sum();
            if documents <= u64::from(self.config.max_documents) {
                continue;
            }
            frequent += 1;
            most.push(Frequent { documents, high: line[0].0, low: line[0].1, shard: line[0].2 });
            if most.len() == HELD_FREQUENT {
                keep_most_frequent(&mut most);
            }
            // A shard whose lines were written in parts has several entries, the earliest first.
            for (i, one) in line.chunk_by(|a, b| a.2 == b.2).enumerate() {
                let keep = if i == 0 && self.config.keep_first { one[0].3 } else { NONE };
                hits.push(Hit { shard: one[0].2, high: one[0].0, low: one[0].1, keep });
                *hits_of.entry(one[0].2).or_default() += 1;
            }
            if hits.len() >= SECTION_RECORDS {
                writer.records(HITS, 0, &mut hits)?;
                hits.clear();
            }
        }
        writer.records(HITS, 0, &mut hits)?;
        keep_most_frequent(&mut most);
        let most_hits = hits_of.into_values().max().unwrap_or(0);
        writer
            .report(frequent, serde_json::json!({ "frequent": frequent, "most_frequent": most, MOST_HITS: most_hits }))
    }
}

/// A Bloom filter with double hashing (Kirsch and Mitzenmacher 2006) of 128-bit hashes.
struct Bloom {
    bits: Vec<u64>,
    functions: u32,
}

impl Bloom {
    fn new(expected: u64, rate: f64) -> Self {
        let functions = (-rate.log2()).round().clamp(1.0, 32.0) as u32;
        Self { bits: vec![0; Self::words(expected, rate)], functions }
    }

    /// Words of 64 bits that a filter takes.
    fn words(expected: u64, rate: f64) -> usize {
        let bits = (-(expected as f64) * rate.ln() / std::f64::consts::LN_2.powi(2)).ceil();
        (bits as usize).div_ceil(64).max(1)
    }

    /// Put a hash in; whether it was there already.
    fn insert(&mut self, hash: u128) -> bool {
        let n = self.bits.len() as u64 * 64;
        let (mut at, step) = (hash as u64, (hash >> 64) as u64 | 1);
        let mut there = true;
        for _ in 0..self.functions {
            // The upper half of the product is uniform below n.
            let bit = ((u128::from(at) * u128::from(n)) >> 64) as usize;
            there &= self.bits[bit / 64] >> (bit % 64) & 1 == 1;
            self.bits[bit / 64] |= 1 << (bit % 64);
            at = at.wrapping_add(step);
        }
        there
    }
}

struct Filter {
    input: Input,
}

#[async_trait]
impl Stage for Filter {
    fn name(&self) -> &str {
        FILTER
    }
    fn version(&self) -> u32 {
        3
    }
    fn inputs(&self) -> Vec<String> {
        self.input.texts.stages()
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!(self.input.config))
    }
    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let lines = text_bytes(run, &self.input.texts.documents)? as f64 / LINE_BYTES;
        check_room(run, FILTER, (lines * EXPECTED_DUPLICATES * (Hit::BYTES + 1) as f64) as u64)?;
        let shards: Vec<_> = run.shards(self.input.texts.chosen())?.iter().map(|s| s.xxh3).collect();
        Ok(vec![Task { index: 0, inputs: serde_json::json!({ "shards": shards }) }])
    }
    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        let LinesConfig { expected_lines, false_positive_rate, .. } = self.input.config;
        let filter = 8 * Bloom::words(expected_lines, false_positive_rate) as u64;
        // The lines of one shard: where they stand first in it, or that they go.
        let lines = (most_text_bytes(run, &self.input.texts.documents)? as f64 / LINE_BYTES) as u64;
        let bytes = filter.saturating_add(lines * LOOKED_UP_BYTES);
        let limit = run.options().memory_limit_bytes;
        if bytes > limit as u64 {
            return Err(Error::Limit(format!(
                "lines: the Bloom filter takes {} MiB and the lines of a shard about {} MiB, and the memory limit is {} MiB: lower \
                 lines.expected_lines, raise lines.false_positive_rate, or give --memory-limit {}MiB or more",
                filter >> 20,
                (lines * LOOKED_UP_BYTES) >> 20,
                limit >> 20,
                bytes.div_ceil(1 << 20)
            )));
        }
        Ok(bytes)
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let config = &self.input.config;
        let mut filter = Bloom::new(config.expected_lines, config.false_positive_rate);
        let bytes = filter.bits.len() * 8;
        let mut writer = RunWriter::create(task)?;
        let (mut lines, mut found) = (0u64, 0u64);
        let (mut read, documents) = (0u64, self.input.texts.count(&task.run)?);
        let mut hits = Vec::new();
        let mut most_hits = 0;
        let mut seen: HashSet<u128> = HashSet::new();
        for shard in task.run.shards(self.input.texts.chosen())? {
            stop_if_asked(task)?;
            // A line that is new here and comes again in a later document of the shard goes from there alone.
            let mut own: HashMap<u128, u32> = HashMap::new();
            self.input
                .each_document(task, shard.index, |row, hashes| {
                    seen.clear();
                    read += 1;
                    for &hash in hashes {
                        if !seen.insert(hash) {
                            continue;
                        }
                        lines += 1;
                        if !filter.insert(hash) {
                            own.insert(hash, row);
                            if lines - found > config.expected_lines {
                                return Err(too_many_lines(config.expected_lines, read, documents));
                            }
                            continue;
                        }
                        found += 1;
                        let keep = own.get(&hash).copied().unwrap_or(NONE);
                        hits.push(Hit { shard: shard.index, high: (hash >> 64) as u64, low: hash as u64, keep });
                    }
                    Ok(())
                })
                .await?;
            hits.sort_unstable();
            hits.dedup();
            most_hits = most_hits.max(hits.len());
            writer.records(HITS, 0, &mut hits)?;
            hits.clear();
        }
        let notes =
            serde_json::json!({ "lines": lines, "seen_before": found, "filter_bytes": bytes, MOST_HITS: most_hits });
        writer.report(found, notes)
    }
}

/// The filter is full with `read` of `documents` documents read: going on would take lines for seen that were not.
fn too_many_lines(expected: u64, read: u64, documents: u64) -> Error {
    // If the rest is like what was read, and a quarter more: the share of new lines falls on the way, if anything.
    let enough = (expected as f64 * documents as f64 / read.max(1) as f64 * 1.25).ceil();
    let unit = 10f64.powf((enough.log10() - 1.0).floor().max(0.0));
    Error::Limit(format!(
        "lines.expected_lines: {expected} distinct lines are in the first {read} of {documents} documents, and a Bloom filter that holds \
         more takes new lines for lines seen before: set it to {} or more, or method = \"exact\"",
        (enough / unit).ceil() * unit
    ))
}

/// Writes the documents without the lines that go.
struct Rewrite {
    input: Input,
    decisions: String,
}

#[async_trait]
impl Stage for Rewrite {
    fn name(&self) -> &str {
        LINES
    }
    fn version(&self) -> u32 {
        3
    }
    fn inputs(&self) -> Vec<String> {
        self.input.texts.stages().into_iter().chain([self.decisions.clone()]).collect()
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({}))
    }
    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        check_room(run, LINES, self.input.texts.stored_bytes(run)?)?;
        self.input.texts.tasks_with(run, digest_of_stage(run, &self.decisions))
    }
    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        Ok(sum_of_notes(run, &self.decisions, MOST_HITS) * LOOKED_UP_BYTES)
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let shard = u64::from(task.index());
        let mut gone = HashMap::new();
        each_section_of(task, &self.decisions, HITS, (shard, shard), |_, hits: &[Hit]| {
            gone.extend(hits.iter().map(|hit| (u128::from(hit.high) << 64 | u128::from(hit.low), hit.keep)));
            Ok(())
        })?;
        let read = task.run.shard(self.input.texts.chosen(), task.index())?.rows;
        let session = crate::selection::session(task);
        let mut frequent = most_frequent(&task.run, &self.decisions)?;
        frequent.retain(|line| line.shard == task.index());
        let key = |line: &Frequent| u128::from(line.high) << 64 | u128::from(line.low);
        let state = Arc::new(Mutex::new(State {
            shown: frequent.iter().map(|line| (key(line), None)).collect(),
            ..State::default()
        }));
        let without = ScalarUDF::from(Without {
            signature: Signature::any(1, Volatility::Volatile),
            config: self.input.config.clone(),
            gone: Arc::new(gone),
            state: state.clone(),
        });
        let rows = self.input.texts.rows(task, &session, task.index()).await?;
        let rows = rows.with_column("text", without.call(vec![col("text")]))?;
        let rows = rows.with_column(RULE, when(col("text").eq(lit("")), lit("no_line_left")).end()?)?;
        let output = Output { kept: &COLUMNS, dropped: &["id", "ordinal", "source", "url", RULE] };
        let mut report = task.write(rows, output, RowsRead::Known(read)).await?;
        let state = state.lock().unwrap_or_else(|e| e.into_inner());
        report.notes = serde_json::json!({
            "documents_changed": state.documents,
            "lines_removed": state.lines,
            "bytes_removed": state.bytes,
        });
        if !frequent.is_empty() {
            let text = |line: &Frequent| state.shown.get(&key(line)).cloned().flatten().unwrap_or_default();
            let lines = frequent.iter().map(|line| (text(line), line.documents));
            report.files.push(write_frequent(task, lines.collect())?);
        }
        Ok(report)
    }
}

/// The table `lines_frequent` of a shard.
fn write_frequent(task: &TaskContext, lines: Vec<(String, u64)>) -> Result<PendingFile> {
    let schema = Arc::new(Schema::new(vec![
        Field::new("line", DataType::Utf8, false),
        Field::new("documents", DataType::UInt64, false),
    ]));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(lines.iter().map(|(line, _)| line))),
        Arc::new(UInt64Array::from_iter_values(lines.iter().map(|(_, documents)| *documents))),
    ];
    let name = Path::new("frequent").join(part_name(task.index()));
    let mut writer = ShardWriter::create(task.stage_dir(), name, schema.clone(), Vec::new())?;
    writer.write(RecordBatch::try_new(schema, columns)?)?;
    writer.finish()
}

/// What has become of the rows so far.
#[derive(Default)]
struct State {
    row: u32,
    /// Documents that lost a line.
    documents: u64,
    lines: u64,
    bytes: u64,
    /// The frequent lines to write down, and the text of those that were met.
    shown: HashMap<u128, Option<String>>,
}

/// `without_lines(text)` over the rows of one shard, in order.
struct Without {
    signature: Signature,
    config: LinesConfig,
    gone: Arc<HashMap<u128, u32>>,
    state: Arc<Mutex<State>>,
}

impl std::fmt::Debug for Without {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Without").field("config", &self.config).finish_non_exhaustive()
    }
}

// Two functions are the same where they count the same rows.
impl PartialEq for Without {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.state, &other.state)
    }
}

impl Eq for Without {}

impl std::hash::Hash for Without {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.state).hash(state);
    }
}

impl Without {
    /// The text of document `row` without the lines that go.
    fn rewrite(
        &self,
        text: &str,
        row: u32,
        scratch: &mut String,
        kept: &mut HashSet<u128>,
        state: &mut State,
    ) -> String {
        let mut rest = String::with_capacity(text.len());
        kept.clear();
        let before = state.lines;
        for unit in units(text, self.config.unit) {
            let hash = hash(unit, &self.config, scratch);
            let found = hash.and_then(|h| Some((h, *self.gone.get(&h)?)));
            if let Some(shown) = found.and_then(|(h, _)| state.shown.get_mut(&h)) {
                shown.get_or_insert_with(|| unit.trim().chars().take(KEPT_LINE_CHARS).collect());
            }
            // The document that keeps a line keeps it once.
            let goes = found.is_some_and(|(h, keep)| keep != row || !kept.insert(h));
            if goes {
                state.lines += 1;
                state.bytes += unit.len() as u64;
            } else {
                rest.push_str(unit);
            }
        }
        state.documents += u64::from(state.lines > before);
        if rest.trim().is_empty() && !text.trim().is_empty() { String::new() } else { rest }
    }
}

impl ScalarUDFImpl for Without {
    fn name(&self) -> &str {
        "without_lines"
    }
    fn signature(&self) -> &Signature {
        &self.signature
    }
    fn return_type(&self, _: &[DataType]) -> datafusion::error::Result<DataType> {
        Ok(DataType::Utf8View)
    }
    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> datafusion::error::Result<ColumnarValue> {
        let texts = cast(&args.args[0].to_array(args.number_rows)?, &DataType::Utf8View)?;
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let (mut scratch, mut kept) = (String::new(), HashSet::new());
        let mut rewritten = StringViewBuilder::with_capacity(texts.len());
        for text in texts.as_string_view() {
            let row = state.row;
            rewritten.append_value(self.rewrite(text.unwrap_or_default(), row, &mut scratch, &mut kept, &mut state));
            state.row += 1;
        }
        Ok(ColumnarValue::Array(Arc::new(rewritten.finish()) as ArrayRef))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_tile_the_text() {
        let text = "a\nb\n\n \nc\n\nd";
        assert_eq!(units(text, Unit::Line).collect::<Vec<_>>(), ["a\n", "b\n", "\n", " \n", "c\n", "\n", "d"]);
        assert_eq!(units(text, Unit::Paragraph).collect::<Vec<_>>(), ["a\nb\n\n \n", "c\n\n", "d"]);
        assert_eq!(units("\n\na", Unit::Paragraph).collect::<Vec<_>>(), ["\n\n", "a"]);
        assert_eq!(units("", Unit::Line).count(), 0);
    }

    #[test]
    fn a_full_filter_says_what_would_do() {
        let error = too_many_lines(10_000, 1_000, 40_000);
        assert!(matches!(error, Error::Limit(_)));
        let text = error.to_string();
        assert!(
            text.starts_with("lines.expected_lines: 10000 distinct lines are in the first 1000 of 40000"),
            "{text}"
        );
        assert!(text.contains("set it to 500000 or more"), "{text}");
        assert!(too_many_lines(7, 7, 7).to_string().contains("set it to 9 or more"));
    }

    #[test]
    fn a_filter_holds_its_rate() {
        let hash = |i: u64| xxhash_rust::xxh3::xxh3_128(&i.to_le_bytes());
        let n = 200_000;
        let mut filter = Bloom::new(n, 0.01);
        let early = (0..n).filter(|&i| filter.insert(hash(i))).count() as f64 / n as f64;
        assert!((0..n).all(|i| filter.insert(hash(i))), "what is in is found");
        // While it fills up the rate is below the stated one; full, it is at it.
        let late = (n..n + 1000).filter(|&i| filter.insert(hash(i))).count() as f64 / 1000.0;
        assert!(early < 0.01 && late < 0.02, "{early} {late}");
        // 9.6 bits a line at 1 %.
        let bits_per_line = (filter.bits.len() * 64) as f64 / n as f64;
        assert!(bits_per_line < 9.7, "{bits_per_line}");
    }
}
