//! Exact deduplication: documents whose normalised text, canonical URL or value of a SQL expression has
//! the same 128-bit XXH3.
//!
//! | stage | task | output |
//! | --- | --- | --- |
//! | `exact_hashes` | document shard | runs: hashes; a table of the documents |
//! | `exact_groups` | partition of the hashes | runs: pairs (smallest document of a hash, another) |
//! | `exact_removals` | partition of the groups | Parquet: `ordinal`, `survivor`, `cluster_id`, `similarity`, `survivor_index`; the same in runs |
//! | `exact` | document shard | selection `id`, `ordinal`; dropped with `rule`, `cluster_id`, `survivor` |
//!
//! With several keys each has stages of its own, one after the other: URLs first (`exact_url_hashes`, …),
//! then expressions, text last. A key is compared among the documents that the keys before it left, so that no
//! text goes with a document that another text's page displaced.
//!
//! `against` puts the hashes of older runs before those of this one: a document goes if an older one has its
//! hash, as in a joint run. With several keys an older run's hashes of each are taken. Old text is not read.
//!
//! Text is read once, by the hashes: 18 bytes a document, and 8 to 16 of the table. Nothing in memory grows with
//! the corpus.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{Array, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, SchemaRef, UInt64Type};
use async_trait::async_trait;
use datafusion::dataframe::DataFrame;
use datafusion::prelude::col;
use futures::StreamExt;
use pipeline::document::SCHEMA;
use pipeline::{Error, Result, RunContext, Stage, Task, TaskContext, TaskReport};
use serde::{Deserialize, Serialize};

use crate::buckets::{self, Buckets};
use crate::disk::check_room;
use crate::documents::{Documents, ROW_BYTES, TABLE, check_index, put_row};
use crate::normalise::{Normalise, canonical_url, content_hash};
use crate::partition::{PARTITION_ROWS, keys_of, partition_rows, partition_tasks, rows_of};
use crate::paths::{Places, indices};
use crate::removals::{MEMBERS, Removals, Similarity};
use crate::runs::{Pair, Record, RunWriter, u64_at};
use crate::selection::{Selection, no_rows, planning_session, session};
use crate::survivor::Keep;
use crate::texts::Texts;

/// What makes two documents the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Key {
    /// The text in normal form.
    Text,
    /// The canonical URL; documents without one, or with nothing but white space for one, are all different.
    Url,
    /// The value of a SQL expression over the columns of a document, as a string; documents where it is null
    /// are all different.
    Sql(String),
}

impl Key {
    /// Version of its hashes, which older indices must have been made by.
    fn version(&self) -> u32 {
        match self {
            Self::Text | Self::Sql(_) => 2,
            Self::Url => 3,
        }
    }

    /// What is compared of a document that has `value` for the key; nothing, if that makes it equal to none.
    fn hash(&self, value: &str, normalise: Normalise, scratch: &mut String) -> Option<u128> {
        match self {
            Self::Text => Some(content_hash(value, normalise, scratch)),
            // Sources write an empty string for "unknown".
            Self::Url if value.trim().is_empty() => None,
            Self::Url => Some(content_hash(&canonical_url(value), Normalise::None, scratch)),
            Self::Sql(_) => Some(content_hash(value, Normalise::None, scratch)),
        }
    }

    /// `documents` with what is compared as a column `key`.
    fn with_key(&self, documents: DataFrame) -> datafusion::error::Result<DataFrame> {
        let key = match self {
            Self::Text => col("text"),
            Self::Url => col("url"),
            Self::Sql(expression) => documents.parse_sql_expr(&format!("cast(({expression}) as varchar)"))?,
        };
        documents.with_column("key", key)
    }
}

/// Exact deduplication in a recipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExactConfig {
    /// Normal form of the text.
    pub normalise: Normalise,
    /// What is compared: `"text"`, `"url"`, `{ sql = "EXPRESSION" }`, or several of them. URLs come first,
    /// then expressions, then the text.
    pub by: Vec<Key>,
    /// Which copy survives.
    pub keep: Keep,
    /// `exact_hashes` directories of older runs, `*` for any part of a name: documents that are equal to one of
    /// theirs go, too. Relative to the recipe's base directory. With several keys the directories of the other
    /// keys' hashes stand beside it.
    pub against: Vec<String>,
}

impl Default for ExactConfig {
    fn default() -> Self {
        Self { normalise: Normalise::default(), by: vec![Key::Text], keep: Keep::default(), against: Vec::new() }
    }
}

/// The stages of exact deduplication of the documents of `selection` (all, if `None`), whose text is
/// in stage `documents` and whose signals, if there are any, in stage `signals`. The last is called `exact`. Older runs are
/// looked for in `places`.
///
/// # Errors
/// [`Error::Setting`] for an expression of `by` that cannot be planned over the columns of a document;
/// [`Error::Recipe`] for a path of `against` that nothing matches.
pub fn exact_stages<'a>(
    config: &ExactConfig,
    documents: &str,
    selection: Option<&str>,
    signals: Option<&str>,
    places: impl Into<Places<'a>>,
) -> Result<Vec<Arc<dyn Stage>>> {
    let against = indices("exact.against", &config.against, places.into())?;
    for (number, key) in config.by.iter().enumerate().filter(|(_, key)| matches!(key, Key::Sql(_))) {
        // Planned over no rows, to find out before any work what is wrong with it.
        let planned = no_rows(&planning_session(), &SCHEMA).and_then(|documents| key.with_key(documents));
        planned
            .and_then(DataFrame::into_optimized_plan)
            .map_err(|e| Error::setting(format!("exact.by.{number}.sql"), e.strip_backtrace()))?;
    }
    let mut keys: Vec<(String, Key)> = Vec::new();
    if config.by.contains(&Key::Url) {
        keys.push(("exact_url".into(), Key::Url));
    }
    for key in config.by.iter().filter(|key| matches!(key, Key::Sql(_))) {
        let name = if keys.iter().any(|(name, _)| name == "exact_sql") {
            format!("exact_sql_{}", keys.len())
        } else {
            "exact_sql".into()
        };
        keys.push((name, key.clone()));
    }
    if config.by.contains(&Key::Text) || keys.is_empty() {
        keys.push(("exact".into(), Key::Text));
    }
    if let Some((name, _)) = keys.last_mut() {
        *name = "exact".into();
    }
    let mut stages = Vec::new();
    let mut selection = selection.map(String::from);
    for (name, key) in keys {
        stages.extend(chain(&name, key, config, documents, selection.as_deref(), signals, &against)?);
        selection = Some(name);
    }
    Ok(stages)
}

/// Hashes, groups, removals and selection by one key.
fn chain(
    name: &str,
    key: Key,
    config: &ExactConfig,
    documents: &str,
    selection: Option<&str>,
    signals: Option<&str>,
    against: &[PathBuf],
) -> Result<[Arc<dyn Stage>; 4]> {
    let (hashes, groups, removals) = (format!("{name}_hashes"), format!("{name}_groups"), format!("{name}_removals"));
    let rule = match key {
        Key::Text => "exact_duplicate",
        Key::Url => "same_url",
        Key::Sql(_) => "same_value",
    };
    let against: Vec<PathBuf> = against.iter().map(|dir| dir.with_file_name(&hashes)).collect();
    let texts = Texts::new(documents, selection);
    let first = Hashes {
        name: hashes.clone(),
        key,
        normalise: config.normalise,
        keep: config.keep.clone(),
        texts: texts.clone(),
        signals: signals.filter(|_| config.keep.expression().is_some()).map(Into::into),
    };
    let second = Groups {
        name: groups.clone(),
        hashes: hashes.clone(),
        made_by: (first.version(), first.config()?),
        against: against.clone(),
        partition_rows: PARTITION_ROWS,
    };
    Ok([
        Arc::new(first),
        Arc::new(second),
        Arc::new(Removals {
            name: removals.clone(),
            members: groups,
            table: hashes,
            keep: config.keep.clone(),
            similarity: Similarity::One,
            against: against.clone(),
        }),
        Arc::new(Selection { name: name.into(), rule, selection: texts.chosen().into(), removals, against }),
    ])
}

/// The hash of a document of the section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ContentKey {
    high: u64,
    low: u64,
    row: u16,
}

impl Record for ContentKey {
    const BYTES: usize = 18;
    const KEY_BITS: u32 = 64;
    fn key(&self) -> u64 {
        self.high
    }
    fn put(&self, bytes: &mut [u8]) {
        bytes[..8].copy_from_slice(&self.high.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.low.to_le_bytes());
        bytes[16..18].copy_from_slice(&self.row.to_le_bytes());
    }
    fn get(bytes: &[u8]) -> Self {
        Self { high: u64_at(bytes, 0), low: u64_at(bytes, 8), row: u16::from_le_bytes([bytes[16], bytes[17]]) }
    }
}

/// Tag of the hashes.
const HASHES: u32 = 0;
/// Documents in a section: row numbers in two bytes.
const SECTION_ROWS: u64 = 1 << 16;

/// A hash for every document of a shard.
struct Hashes {
    name: String,
    key: Key,
    normalise: Normalise,
    keep: Keep,
    texts: Texts,
    signals: Option<String>,
}

#[async_trait]
impl Stage for Hashes {
    fn name(&self) -> &str {
        &self.name
    }

    fn version(&self) -> u32 {
        self.key.version()
    }

    fn inputs(&self) -> Vec<String> {
        self.texts.stages().into_iter().chain(self.signals.clone()).collect()
    }

    fn config(&self) -> Result<serde_json::Value> {
        // The normal form is one of texts; policies that need no value need no new hashes.
        let normalise = (self.key == Key::Text).then_some(self.normalise);
        let keep = self.keep.expression().map(|_| &self.keep);
        Ok(serde_json::json!({ "key": self.key, "normalise": normalise, "keep": keep }))
    }

    fn check_settings(&self, schemas: &BTreeMap<String, SchemaRef>) -> Result<()> {
        self.keep.check("exact", self.signals.as_deref(), schemas)
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let bytes = (ContentKey::BYTES + ROW_BYTES + self.keep.row_bytes() + 1) as u64;
        check_room(run, &self.name, self.texts.count(run)? * bytes)?;
        self.texts.tasks(run)
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = session(task);
        let documents = self.key.with_key(self.texts.rows(task, &session, task.index()).await?)?;
        let rows = self.keep.with_value(task, &session, documents, self.signals.as_deref()).await?;
        let columns = ["ordinal", "text", "value", "key"].map(col).to_vec();
        let mut stream = rows.select(columns)?.execute_stream().await?;
        let mut writer = RunWriter::create(task)?;
        let (mut hashes, mut table, mut scratch) = (Vec::new(), Vec::new(), String::new());
        let (mut base, mut row) = (0, 0);
        let row_bytes = ROW_BYTES + self.keep.row_bytes();
        while let Some(batch) = stream.next().await {
            let batch = batch?;
            let ordinals = batch.column(0).as_primitive::<UInt64Type>().values();
            let texts = cast(batch.column(1), &DataType::Utf8View)?;
            let texts = texts.as_string_view();
            let values = batch.column(2).as_primitive::<Float64Type>();
            let keys = cast(batch.column(3), &DataType::Utf8View)?;
            let keys = keys.as_string_view();
            for (i, &ordinal) in ordinals.iter().enumerate() {
                let key = (!keys.is_null(i)).then(|| keys.value(i));
                if let Some(hash) = key.and_then(|key| self.key.hash(key, self.normalise, &mut scratch)) {
                    hashes.push(ContentKey { high: (hash >> 64) as u64, low: hash as u64, row: (row - base) as u16 });
                }
                put_row(ordinal, texts.value(i), &mut table);
                if self.keep.expression().is_some() {
                    let value = (!values.is_null(i)).then(|| values.value(i));
                    table.extend_from_slice(&self.keep.rank_of(value).to_le_bytes());
                }
                row += 1;
                if row - base == SECTION_ROWS {
                    writer.records(HASHES, base, &mut hashes)?;
                    writer.table(TABLE, base, row_bytes, &table)?;
                    hashes.clear();
                    table.clear();
                    base = row;
                }
            }
        }
        writer.records(HASHES, base, &mut hashes)?;
        writer.table(TABLE, base, row_bytes, &table)?;
        self.texts.all_read(task, task.index(), row)?;
        writer.report(row, serde_json::Value::Null)
    }
}

/// The groups of one partition of the hashes.
struct Groups {
    name: String,
    hashes: String,
    /// Version and configuration of the hashes, which those of older runs must have, too.
    made_by: (u32, serde_json::Value),
    against: Vec<PathBuf>,
    /// Records of a partition at least, about.
    partition_rows: u64,
}

#[async_trait]
impl Stage for Groups {
    fn name(&self) -> &str {
        &self.name
    }

    fn version(&self) -> u32 {
        3
    }

    fn inputs(&self) -> Vec<String> {
        vec![self.hashes.clone()]
    }

    fn indices(&self) -> &[PathBuf] {
        &self.against
    }

    fn config(&self) -> Result<serde_json::Value> {
        if self.against.is_empty() {
            return Ok(serde_json::json!({}));
        }
        let (version, config) = &self.made_by;
        let check = |dir: &PathBuf| check_index(dir, *version, config);
        let against = self.against.iter().map(check).collect::<Result<Vec<_>>>()?;
        Ok(serde_json::json!({ "against": against }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let documents = Documents::of(run, &self.hashes, &self.against)?;
        // If all of them are equal.
        check_room(run, &self.name, documents.len() * (Pair::BYTES + 1) as u64)?;
        if documents.sources.is_empty() {
            return Ok(Vec::new());
        }
        let partition = partition_rows(documents.len(), self.partition_rows);
        Ok(partition_tasks(documents.len(), partition, documents.digest()))
    }

    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        let documents = Documents::of(run, &self.hashes, &self.against)?.len();
        Ok(buckets::bytes::<(u64, u64)>(documents, partition_rows(documents, self.partition_rows), false))
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let mut writer = RunWriter::create(task)?;
        let mut buckets = Buckets::new(MEMBERS, false, 2 * rows_of(task)?);
        let documents = Documents::of(&task.run, &self.hashes, &self.against)?;
        let range = keys_of::<ContentKey>(task)?;
        documents.each_section(task, HASHES..HASHES + 1, range, |source, section, keys: &[ContentKey]| {
            let start = source.start + section.base;
            keys.iter().for_each(|key| buckets.push((key.high, key.low), start + u64::from(key.row)));
            buckets.shorten(&mut writer)
        })?;
        let pairs = buckets.finish(&mut writer)?;
        writer.report(pairs, serde_json::json!({ "pairs": pairs }))
    }
}
