//! Stage `ingest`: raw files become shards of documents.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::document::COLUMNS;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::ingest::IngestConfig;
use crate::ingest::bad::BadRecords;
use crate::ingest::config::FieldMapping;
use crate::ingest::listing::{self, Listing};
use crate::ingest::rows::DROPPED;
use crate::ingest::scan::{RawTable, ScanContext};
use crate::ingest::splits::{self, Split};
use crate::manifest::Totals;
use crate::run::RunContext;
use crate::shard::TextCompression;
use crate::stage::{Output, RowsRead, Stage, Task, TaskContext, TaskReport};

/// Reads the files of a recipe: one task per [`IngestConfig::split_bytes`] of input.
///
/// Kept shards hold [`crate::document::SCHEMA`]. Dropped shards hold one row per record that did not
/// become a document, with file, place, reason and the beginning of the record ([`DROPPED`]).
pub struct IngestStage {
    config: IngestConfig,
    listing: Listing,
    fields: Vec<Arc<FieldMapping>>,
    bad: Arc<BadRecords>,
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
            return Err(Error::setting("ingest.inputs", "there are none; add [[ingest.inputs]] with source and paths"));
        }
        for (key, value) in [("split_bytes", config.split_bytes), ("max_record_bytes", config.max_record_bytes as u64)]
        {
            if value == 0 {
                return Err(Error::setting(format!("ingest.{key}"), "must be at least 1"));
            }
        }
        let listing = listing::list(&config.inputs, &base_dir)?;
        let bad = BadRecords::new(config.max_bad_records);
        let fields = config.inputs.iter().map(|input| Arc::new(input.fields.clone())).collect();
        Ok(Self { config, listing, fields, bad })
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
        5
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
        let mut config = serde_json::json!({
            "split_bytes": self.config.split_bytes,
            "max_record_bytes": self.config.max_record_bytes,
            "inputs": inputs,
            "files": self.listing.files,
        });
        // Left out where it is what it was before there was a choice, so that shards of then are as good as new.
        if self.config.compression != TextCompression::default() {
            config["compression"] = serde_json::json!(self.config.compression);
        }
        Ok(config)
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        // One line for each reason, however many files.
        let mut by_reason: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
        for skipped in &self.listing.skipped {
            by_reason.entry(skipped.reason).or_insert((0, &skipped.name)).0 += 1;
        }
        for (reason, (count, first)) in by_reason {
            let more = if count > 1 { format!(" (and {} more)", count - 1) } else { String::new() };
            run.emit(&Event::Warning { message: format!("ingest leaves out {first}{more}: {reason}") });
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
        let bad = self.bad.task();
        let context = ScanContext {
            shard: task.index(),
            max_record_bytes: self.config.max_record_bytes,
            read: read.clone(),
            bad: bad.clone(),
        };
        let documents = task.session().read_table(Arc::new(RawTable::new(splits, context)?))?;
        let output = Output { kept: &COLUMNS, dropped: &DROPPED };
        let mut report =
            match task.write_compressed(documents, output, RowsRead::Counted(read), self.config.compression).await {
                Ok(report) => report,
                // The readers stop at the limit; what they then say is not the cause.
                Err(error) => return Err(self.too_many(task.run.dir()).err().unwrap_or(error)),
            };
        bad.keep();
        report.notes = serde_json::json!({ "input_bytes": bytes });
        Ok(report)
    }

    fn check(&self, run: &RunContext, totals: &Totals) -> Result<()> {
        self.bad.begin(&totals.dropped);
        self.too_many(run.dir())
    }
}

impl IngestStage {
    /// An error when there are more bad records than the recipe allows.
    fn too_many(&self, run_dir: &Path) -> Result<()> {
        let Some(what) = self.bad.exceeded() else { return Ok(()) };
        Err(Error::Limit(format!(
            "ingest: {what}\n  those of finished tasks with file, place and reason: {}; mend the input, or raise \
             ingest.max_bad_records",
            run_dir.join("ingest/dropped").display()
        )))
    }
}
