//! Stage `near_sets`: the shingle sets of documents that are in pairs, for exact verification.

use std::collections::HashMap;

use arrow::array::AsArray;
use arrow::compute::cast;
use arrow::datatypes::DataType;
use async_trait::async_trait;
use datafusion::prelude::col;
use futures::StreamExt;
use pipeline::stage::tasks_per_shard;
use pipeline::{Error, Result, RunContext, Stage, Task, TaskContext, TaskReport};

use super::{NearConfig, PAIRS, SETS, SIGNATURES};
use crate::buckets::{CANDIDATES, Number};
use crate::disk::{check_room, text_bytes};
use crate::documents::{Documents, digest_of_stage, run_files, sum_of_notes};
use crate::minhash::Scratch;
use crate::runs::{NUMBER_BYTES, Record, RunFile, RunWriter, number_at, put_number, run_name, u32_at};

/// Tag of the places of the sets.
const PLACES: u32 = 0;

/// Where the set of a document of the shard is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    row: u64,
    offset: u64,
    shingles: u32,
}

impl Record for Place {
    const BYTES: usize = NUMBER_BYTES + 12;
    const KEY_BITS: u32 = 8 * NUMBER_BYTES as u32;
    fn key(&self) -> u64 {
        self.row
    }
    fn put(&self, bytes: &mut [u8]) {
        put_number(self.row, bytes);
        bytes[NUMBER_BYTES..NUMBER_BYTES + 8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[NUMBER_BYTES + 8..NUMBER_BYTES + 12].copy_from_slice(&self.shingles.to_le_bytes());
    }
    fn get(bytes: &[u8]) -> Self {
        Self {
            row: number_at(bytes, 0),
            offset: crate::runs::u64_at(bytes, NUMBER_BYTES),
            shingles: u32_at(bytes, NUMBER_BYTES + 8),
        }
    }
}

/// Bytes of text under a shingle, about.
const SHINGLE_BYTES: f64 = 6.0;

/// Bytes of the sets of `documents` documents of `bytes` bytes of text each, about.
pub(crate) fn predicted_bytes(documents: f64, bytes: f64) -> u64 {
    (documents * (8.0 * bytes / SHINGLE_BYTES + Place::BYTES as f64)) as u64
}

/// The sets of a document shard.
pub(super) struct SetStage {
    pub(super) config: NearConfig,
    pub(super) documents: String,
    pub(super) selection: Option<String>,
}

#[async_trait]
impl Stage for SetStage {
    fn name(&self) -> &str {
        SETS
    }

    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        let mut inputs = vec![self.documents.clone(), PAIRS.into()];
        inputs.extend(self.selection.clone());
        inputs
    }

    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "mode": self.config.mode, "ngram": self.config.ngram }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let documents: u64 =
            run.shards(self.selection.as_ref().unwrap_or(&self.documents))?.iter().map(|s| s.rows).sum();
        let texts: u64 = run.shards(&self.documents)?.iter().map(|s| s.rows).sum();
        let bytes = text_bytes(run, &self.documents)? as f64 / texts.max(1) as f64;
        let candidates = documents.min(sum_of_notes(run, PAIRS, "pairs"));
        check_room(run, SETS, predicted_bytes(candidates as f64, bytes))?;
        let pairs = digest_of_stage(run, PAIRS);
        let mut tasks = tasks_per_shard(run, self.selection.as_ref().unwrap_or(&self.documents))?;
        for task in &mut tasks {
            task.inputs = serde_json::json!([task.inputs, pairs]);
        }
        Ok(tasks)
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let documents = Documents::of(&task.run, SIGNATURES, &[])?;
        let wanted = candidates(task, &documents)?;
        let mut writer = RunWriter::create(task)?;
        let mut places = Vec::new();
        if wanted.iter().any(|w| *w) {
            let session = crate::selection::session(task);
            let rows = task.read_selected(&session, &self.documents, self.selection.as_deref(), task.index()).await?;
            let mut stream = rows.select(vec![col("text")])?.execute_stream().await?;
            let minhash = self.config.minhash();
            let mut scratch = Scratch::default();
            let (mut set, mut bytes, mut row) = (Vec::new(), Vec::new(), 0usize);
            while let Some(batch) = stream.next().await {
                let batch = batch?;
                for text in cast(batch.column(0), &DataType::Utf8View)?.as_string_view() {
                    if wanted.get(row).copied().unwrap_or(false) {
                        set.clear();
                        set.extend_from_slice(minhash.shingles(text.unwrap_or_default(), &mut scratch));
                        set.sort_unstable();
                        set.dedup();
                        bytes.clear();
                        bytes.extend(set.iter().flat_map(|s: &u64| s.to_le_bytes()));
                        let offset = writer.raw(&bytes)?;
                        places.push(Place { row: row as u64, offset, shingles: set.len() as u32 });
                    }
                    row += 1;
                }
            }
        }
        let rows = places.len() as u64;
        writer.records(PLACES, 0, &mut places)?;
        Ok(TaskReport { files: vec![writer.finish(rows)?], rows_read: rows, rows_kept: rows, ..TaskReport::default() })
    }
}

/// For every row of the task's shard whether it is in a pair.
fn candidates(task: &TaskContext, documents: &Documents) -> Result<Vec<bool>> {
    let Some(source) = documents.own(task.index()) else { return Ok(Vec::new()) };
    let mut wanted = vec![false; source.rows as usize];
    if source.rows == 0 {
        return Ok(wanted);
    }
    let mut bytes = Vec::new();
    for path in run_files(&task.run, PAIRS) {
        let file = RunFile::open(&path)?;
        for section in file.sections(CANDIDATES) {
            file.range::<Number>(section, source.start, source.start + source.rows - 1, &mut bytes, |number| {
                wanted[(number.0 - source.start) as usize] = true;
            })?;
        }
    }
    Ok(wanted)
}

/// Files that are held open.
const OPEN_FILES: usize = 256;

/// Reads sets by number of document.
pub(crate) struct Sets<'d> {
    documents: &'d Documents,
    open: HashMap<usize, RunFile>,
    run: &'d RunContext,
    bytes: Vec<u8>,
}

impl<'d> Sets<'d> {
    pub(crate) fn new(run: &'d RunContext, documents: &'d Documents) -> Self {
        Self { documents, open: HashMap::new(), run, bytes: Vec::new() }
    }

    /// Replace `set` by the set of document `number`, sorted.
    pub(crate) fn read(&mut self, number: u64, set: &mut Vec<u64>) -> Result<()> {
        let missing = || Error::Recipe(format!("document number {number} has no shingle set in {SETS}"));
        let at = self.documents.source(number).ok_or_else(missing)?;
        let source = &self.documents.sources[at];
        if !self.open.contains_key(&at) && self.open.len() == OPEN_FILES {
            self.open.clear();
        }
        let file = match self.open.entry(at) {
            std::collections::hash_map::Entry::Occupied(file) => file.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(RunFile::open(&self.run.stage_dir(SETS).join(run_name(source.shard)))?)
            }
        };
        let row = number - source.start;
        let mut found = None;
        for section in file.sections(PLACES) {
            file.range::<Place>(section, row, row, &mut self.bytes, |place| found = Some(place))?;
        }
        let place = found.ok_or_else(missing)?;
        self.bytes.resize(place.shingles as usize * 8, 0);
        file.read_at(&mut self.bytes, place.offset)?;
        set.clear();
        set.extend(self.bytes.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)));
        Ok(())
    }
}
