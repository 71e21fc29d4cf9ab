//! Stage `near_signatures`: the band keys of every document, and a table of the documents.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use arrow::array::{Array, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, SchemaRef, UInt64Type};
use async_trait::async_trait;
use datafusion::prelude::col;
use futures::StreamExt;
use pipeline::language::is_unspaced;
use pipeline::{Event, PendingFile, Result, RunContext, Stage, Task, TaskContext, TaskReport};

use super::{NearConfig, SIGNATURES};
use crate::disk::check_room;
use crate::documents::{TABLE, put_row};
use crate::minhash::{MinHash, Mode, SKETCH_BYTES, Scratch};
use crate::runs::{Record, RunWriter, u64_at};
use crate::texts::Texts;

/// Version of the stage, which older indices must have been made by.
pub(super) const VERSION: u32 = 3;

/// Documents in a section: row numbers in two bytes.
const SECTION_ROWS: usize = 1 << 16;

/// A band key of a document of the section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BandKey {
    pub(crate) key: u64,
    pub(crate) row: u16,
}

impl Record for BandKey {
    const BYTES: usize = 10;
    const KEY_BITS: u32 = 64;
    fn key(&self) -> u64 {
        self.key
    }
    fn put(&self, bytes: &mut [u8]) {
        bytes[..8].copy_from_slice(&self.key.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.row.to_le_bytes());
    }
    fn get(bytes: &[u8]) -> Self {
        Self { key: u64_at(bytes, 0), row: u16::from_le_bytes([bytes[8], bytes[9]]) }
    }
}

/// Bytes on disk of `documents` documents, about.
pub(crate) fn predicted_bytes(config: &NearConfig, documents: u64) -> u64 {
    // The directories of the sections: an eighth of a byte a record at most.
    let band = BandKey::BYTES as f64 + 0.125;
    (documents as f64 * (f64::from(config.bands) * band + config.row_bytes() as f64)) as u64
}

/// Writes the signatures of a shard of documents.
pub struct SignatureWriter {
    writer: RunWriter,
    bands: Vec<Vec<BandKey>>,
    table: Vec<u8>,
    row_bytes: usize,
    base: u64,
    rows: u64,
}

impl SignatureWriter {
    /// The run file of the task.
    pub fn create(task: &TaskContext, config: &NearConfig) -> Result<Self> {
        Ok(Self {
            writer: RunWriter::create(task)?,
            bands: vec![Vec::new(); config.bands as usize],
            table: Vec::new(),
            row_bytes: config.row_bytes(),
            base: 0,
            rows: 0,
        })
    }

    /// Append a document: a key for every band (or none, if it has no words) and `row`, what
    /// the table holds of it.
    pub fn push(&mut self, keys: &[u64], row: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let number = (self.rows - self.base) as u16;
        self.bands.iter_mut().zip(keys).for_each(|(band, &key)| band.push(BandKey { key, row: number }));
        row(&mut self.table);
        self.rows += 1;
        debug_assert_eq!(self.table.len() as u64, (self.rows - self.base) * self.row_bytes as u64);
        if self.rows - self.base == SECTION_ROWS as u64 { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        for (band, keys) in self.bands.iter_mut().enumerate() {
            self.writer.records(band as u32, self.base, keys)?;
            keys.clear();
        }
        self.writer.table(TABLE, self.base, self.row_bytes, &self.table)?;
        self.table.clear();
        self.base = self.rows;
        Ok(())
    }

    /// Documents so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Write what is left and hand over to the commit.
    pub fn finish(mut self) -> Result<PendingFile> {
        self.flush()?;
        self.writer.finish(self.rows)
    }
}

/// One in so many documents without spaces is worth a warning.
const UNSPACED_SHARE: u64 = 20;
/// Characters of a text that tell whether it has spaces between its words.
const TOLD_BY: usize = 256;

/// Whether most of the letters at the beginning of `text` are of scripts that put no spaces between words.
fn is_mostly_unspaced(text: &str) -> bool {
    let (mut letters, mut unspaced) = (0, 0);
    for c in text.chars().take(TOLD_BY).filter(|c| c.is_alphanumeric()) {
        letters += 1;
        unspaced += u32::from(is_unspaced(c));
    }
    2 * unspaced > letters
}

/// The signatures of a document shard.
pub(super) struct Signatures {
    config: NearConfig,
    texts: Texts,
    signals: Option<String>,
    /// Whether it was said that the mode finds little in such texts.
    warned: AtomicBool,
}

#[async_trait]
impl Stage for Signatures {
    fn name(&self) -> &str {
        SIGNATURES
    }

    fn version(&self) -> u32 {
        VERSION
    }

    fn inputs(&self) -> Vec<String> {
        self.texts.stages().into_iter().chain(self.signals.clone()).collect()
    }

    fn config(&self) -> Result<serde_json::Value> {
        self.config.check()?;
        Ok(self.config.signature())
    }

    fn check_settings(&self, schemas: &BTreeMap<String, SchemaRef>) -> Result<()> {
        self.config.keep.check("near", self.signals.as_deref(), schemas)
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        check_room(run, SIGNATURES, predicted_bytes(&self.config, self.texts.count(run)?))?;
        self.texts.tasks(run)
    }

    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        // A section: some thousands of bytes a document with hundreds of bands.
        let row = self.config.bands as usize * size_of::<BandKey>() + self.config.row_bytes();
        Ok(self.texts.count(run)?.min(SECTION_ROWS as u64) * row as u64)
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = crate::selection::session(task);
        let documents = self.texts.rows(task, &session, task.index()).await?;
        let rows = self.config.keep.with_value(task, &session, documents, self.signals.as_deref()).await?;
        let mut stream = rows.select(vec![col("ordinal"), col("text"), col("value")])?.execute_stream().await?;
        let minhash = self.config.minhash();
        let mut writer = SignatureWriter::create(task, &self.config)?;
        let (mut scratch, mut keys) = (Scratch::default(), Vec::new());
        let mut unspaced = 0;
        while let Some(batch) = stream.next().await {
            let batch = batch?;
            let ordinals = batch.column(0).as_primitive::<UInt64Type>().values();
            let texts = cast(batch.column(1), &DataType::Utf8View)?;
            let texts = texts.as_string_view();
            let values = batch.column(2).as_primitive::<Float64Type>();
            for (row, &ordinal) in ordinals.iter().enumerate() {
                let text = texts.value(row);
                unspaced += u64::from(self.config.mode == Mode::Compatible && is_mostly_unspaced(text));
                let value = (!values.is_null(row)).then(|| values.value(row));
                self.document(&minhash, &mut scratch, &mut keys, &mut writer, (ordinal, text, value))?;
            }
        }
        let rows = writer.rows();
        self.warn(task, unspaced, rows);
        self.texts.all_read(task, task.index(), rows)?;
        Ok(TaskReport { files: vec![writer.finish()?], rows_read: rows, rows_kept: rows, ..TaskReport::default() })
    }
}

impl Signatures {
    pub(super) fn new(config: NearConfig, texts: Texts, signals: Option<String>) -> Self {
        Self { config, texts, signals, warned: AtomicBool::new(false) }
    }

    /// Say once that of a shard with `unspaced` such texts among `documents` little will be found.
    fn warn(&self, task: &TaskContext, unspaced: u64, documents: u64) {
        if unspaced * UNSPACED_SHARE < documents.max(1) || self.warned.swap(true, Ordering::Relaxed) {
            return;
        }
        let message = format!(
            "near.mode = \"compatible\" takes what stands between spaces and marks for a word, as datatrove does: {unspaced} of the \
             {documents} documents of shard {} are mostly in a script without spaces (Chinese, Japanese, Thai), and near \
             duplicates of these will hardly be found; mode = \"fast\" finds them",
            task.index()
        );
        task.run.emit(&Event::Warning { message });
    }

    fn document(
        &self,
        minhash: &MinHash,
        scratch: &mut Scratch,
        keys: &mut Vec<u64>,
        writer: &mut SignatureWriter,
        (ordinal, text, value): (u64, &str, Option<f64>),
    ) -> Result<()> {
        keys.clear();
        let any = minhash.band_keys(text, scratch, keys);
        let keep = &self.config.keep;
        writer.push(keys, |row| {
            put_row(ordinal, text, row);
            if keep.expression().is_some() {
                row.extend_from_slice(&keep.rank_of(value).to_le_bytes());
            }
            if any {
                minhash.sketch(scratch, row);
            } else {
                row.resize(row.len() + SKETCH_BYTES, 0);
            }
        })
    }
}
