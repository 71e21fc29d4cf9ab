//! Stage `ingest`: raw files become shards of documents.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::document::COLUMNS;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::ingest::IngestConfig;
use crate::ingest::config::FieldMapping;
use crate::ingest::listing::{self, Listing};
use crate::ingest::rows::{DROPPED, FirstBad, Reason};
use crate::ingest::scan::{RawTable, ScanContext};
use crate::ingest::splits::{self, Split};
use crate::manifest::Totals;
use crate::run::RunContext;
use crate::stage::{Output, RowsRead, Stage, Task, TaskContext, TaskReport};

/// Reads the files of a recipe: one task per [`IngestConfig::split_bytes`] of input.
///
/// Kept shards hold [`crate::document::SCHEMA`]. Dropped shards hold one row per record that did not
/// become a document, with file, place, reason and the beginning of the record ([`DROPPED`]).
pub struct IngestStage {
    config: IngestConfig,
    listing: Listing,
    fields: Vec<Arc<FieldMapping>>,
    first_bad: FirstBad,
    dir: OnceLock<PathBuf>,
}

/// What a task of this stage reads.
#[derive(Serialize, Deserialize)]
struct Inputs {
    splits: Vec<Split>,
}

impl IngestStage {
    /// List the files of `config`, whose paths are relative to `base_dir`.
    ///
    /// # Errors
    /// [`Error::Recipe`] for a path without files, a file of unknown format or one that two inputs
    /// share; [`Error::Io`] for a directory that cannot be read.
    pub fn new(config: IngestConfig, base_dir: PathBuf) -> Result<Self> {
        if config.inputs.is_empty() {
            return Err(Error::Recipe("ingest has no inputs; add [[ingest.inputs]] with source and paths".into()));
        }
        if config.split_bytes == 0 || config.max_record_bytes == 0 {
            return Err(Error::Recipe("ingest: split_bytes and max_record_bytes must be at least 1".into()));
        }
        let listing = listing::list(&config.inputs, &base_dir)?;
        let fields = config.inputs.iter().map(|input| Arc::new(input.fields.clone())).collect();
        Ok(Self { config, listing, fields, first_bad: FirstBad::default(), dir: OnceLock::new() })
    }

    /// The files that the stage reads, and those that were left out.
    pub fn listing(&self) -> &Listing {
        &self.listing
    }
}

#[async_trait]
impl Stage for IngestStage {
    fn name(&self) -> &str {
        "ingest"
    }

    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        Vec::new()
    }

    fn config(&self) -> Result<serde_json::Value> {
        let inputs: Vec<_> = self
            .config
            .inputs
            .iter()
            .map(|input| serde_json::json!({ "source": input.source, "fields": input.fields }))
            .collect();
        Ok(serde_json::json!({
            "split_bytes": self.config.split_bytes,
            "max_record_bytes": self.config.max_record_bytes,
            "inputs": inputs,
            "files": self.listing.files,
        }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let skipped = &self.listing.skipped;
        if let Some(first) = skipped.first() {
            let message = format!(
                "ingest leaves out {} file{} whose extension does not tell the format, such as {first}",
                skipped.len(),
                if skipped.len() == 1 { "" } else { "s" },
            );
            run.emit(&Event::Warning { message });
        }
        splits::plan(&self.listing.files, self.config.split_bytes)
            .into_iter()
            .zip(0u32..)
            .map(|(splits, index)| {
                let inputs = serde_json::to_value(Inputs { splits }).map_err(Error::abort)?;
                Ok(Task { index, inputs })
            })
            .collect()
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        self.dir.get_or_init(|| task.stage_dir().join("dropped"));
        let inputs: Inputs = serde_json::from_value(task.task.inputs.clone()).map_err(Error::abort)?;
        let files: HashMap<&str, &listing::InputFile> =
            self.listing.files.iter().map(|file| (file.uri.as_str(), file)).collect();
        let splits = inputs
            .splits
            .iter()
            .map(|split| {
                let file = files
                    .get(split.file.as_str())
                    .ok_or_else(|| Error::Recipe(format!("{} is no longer an input of the recipe", split.file)))?;
                let source = self.config.inputs[file.input].source.as_str();
                Ok((split, *file, source, self.fields[file.input].clone()))
            })
            .collect::<Result<Vec<_>>>()?;
        let bytes: u64 = splits
            .iter()
            .map(|(split, file, ..)| split.range.as_ref().map_or(file.size, |range| range.end - range.start))
            .sum();
        let read = Arc::new(AtomicU64::new(0));
        let context = ScanContext {
            shard: task.index(),
            max_record_bytes: self.config.max_record_bytes,
            read: read.clone(),
            first_bad: self.first_bad.clone(),
        };
        let documents = task.session().read_table(Arc::new(RawTable::new(splits, context)?))?;
        let output = Output { kept: &COLUMNS, dropped: &DROPPED };
        let mut report = task.write(documents, output, RowsRead::Counted(read)).await?;
        report.notes = serde_json::json!({ "input_bytes": bytes });
        Ok(report)
    }

    fn check(&self, totals: &Totals) -> Result<()> {
        let bad: Vec<(&str, u64)> = Reason::ALL
            .into_iter()
            .filter(|reason| reason.is_bad())
            .filter_map(|reason| Some((reason.name(), *totals.dropped.get(reason.name())?)))
            .collect();
        let count: u64 = bad.iter().map(|(_, n)| n).sum();
        if count <= self.config.max_bad_records {
            return Ok(());
        }
        let counts: Vec<String> = bad.iter().map(|(name, n)| format!("{n} {name}")).collect();
        let first = self.first_bad.lock().unwrap_or_else(|e| e.into_inner());
        let first = first.as_ref().map_or(String::new(), |first| format!("\n  for example {first}"));
        let dropped =
            self.dir.get().map_or("ingest/dropped in the run directory".into(), |dir| dir.display().to_string());
        Err(Error::Limit(format!(
            "ingest: {count} bad records ({}), more than max_bad_records = {}{first}\n  all of them with file, \
             place and reason: {dropped}",
            counts.join(", "),
            self.config.max_bad_records,
        )))
    }
}
