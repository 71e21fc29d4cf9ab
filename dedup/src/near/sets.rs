//! Stage `near_sets`: the shingle sets of documents that are in pairs, for exact verification.

use std::collections::HashMap;

use async_trait::async_trait;
use pipeline::{Error, Result, RunContext, Stage, Task, TaskContext, TaskReport};

use super::{NearConfig, PAIRS, SETS, SIGNATURES};
use crate::buckets::{CANDIDATES, Number};
use crate::disk::{check_room, text_bytes};
use crate::documents::{Documents, digest_of_stage, each_section_of, sum_of_notes};
use crate::minhash::Scratch;
use crate::runs::{NUMBER_BYTES, Record, RunFile, RunWriter, number_at, put_number, run_name, u32_at};
use crate::texts::Texts;

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
    const COUNTED: bool = true;
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
    pub(super) texts: Texts,
}

#[async_trait]
impl Stage for SetStage {
    fn name(&self) -> &str {
        SETS
    }

    fn version(&self) -> u32 {
        2
    }

    fn inputs(&self) -> Vec<String> {
        self.texts.stages().into_iter().chain([PAIRS.into()]).collect()
    }

    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "mode": self.config.mode, "ngram": self.config.ngram }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let texts: u64 = run.shards(&self.texts.documents)?.iter().map(|s| s.rows).sum();
        let bytes = text_bytes(run, &self.texts.documents)? as f64 / texts.max(1) as f64;
        let candidates = self.texts.count(run)?.min(sum_of_notes(run, PAIRS, "pairs"));
        check_room(run, SETS, predicted_bytes(candidates as f64, bytes))?;
        self.texts.tasks_with(run, digest_of_stage(run, PAIRS))
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let documents = Documents::of(&task.run, SIGNATURES, &[])?;
        let wanted = candidates(task, &documents)?;
        let mut writer = RunWriter::create(task)?;
        let mut places = Vec::new();
        if wanted.iter().any(|w| *w) {
            let minhash = self.config.minhash();
            let mut scratch = Scratch::default();
            let (mut set, mut bytes, mut row) = (Vec::new(), Vec::new(), 0usize);
            self.texts
                .each(task, task.index(), |_, text| {
                    if wanted.get(row).copied().unwrap_or(false) {
                        set.clear();
                        set.extend_from_slice(minhash.shingles(text, &mut scratch));
                        set.sort_unstable();
                        set.dedup();
                        bytes.clear();
                        bytes.extend(set.iter().flat_map(|s: &u64| s.to_le_bytes()));
                        let offset = writer.raw(&bytes)?;
                        places.push(Place { row: row as u64, offset, shingles: set.len() as u32 });
                    }
                    row += 1;
                    Ok(())
                })
                .await?;
        }
        let rows = places.len() as u64;
        writer.records(PLACES, 0, &mut places)?;
        writer.report(rows, serde_json::Value::Null)
    }
}

/// For every row of the task's shard whether it is in a pair.
fn candidates(task: &TaskContext, documents: &Documents) -> Result<Vec<bool>> {
    let Some(source) = documents.own(task.index()) else { return Ok(Vec::new()) };
    let mut wanted = vec![false; source.rows as usize];
    if source.rows == 0 {
        return Ok(wanted);
    }
    let own = (source.start, source.start + source.rows - 1);
    each_section_of(task, PAIRS, CANDIDATES, own, |_, numbers: &[Number]| {
        numbers.iter().for_each(|number| wanted[(number.0 - source.start) as usize] = true);
        Ok(())
    })?;
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
