//! What a run did to its documents, for people: rules, funnel, histograms, samples.
//!
//! Polars scans shard by shard, a few columns at a time, so memory is that of one shard whatever the corpus.

mod funnel;
mod histograms;
mod overlap;
mod removed;
mod rules;
mod samples;
mod shards;
mod standing;

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

pub use funnel::FunnelStage;
pub use histograms::{Histogram, Threshold};
pub use overlap::{Overlap, RulePair};
pub use removed::{BenchmarkReport, FrequentLine, KEPT_LINE_CHARS, LinesReport};
pub use rules::{RuleReport, rules};
pub use samples::{Excerpt, Sample, by_rule, by_source};
pub use standing::{Standing, standing};

use crate::error::Result;
use crate::pii::{Pii, PiiFinder};
use crate::status::{StageSummary, decisive, summaries};

/// Dropped documents shown of each rule, and kept ones of each source.
const SAMPLES: usize = 3;
/// Characters of a sample's text.
const SAMPLE_CHARS: usize = 700;

/// Everything that a report shows.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the run directory.
    pub run: String,
    /// The stages in order.
    pub stages: Vec<StageReport>,
    /// Documents left after each stage, by source.
    pub funnel: Vec<FunnelStage>,
    /// What each rule dropped.
    pub rules: Vec<RuleReport>,
    /// What the rules of `filter` drop alone and together.
    pub overlap: Overlap,
    /// Distributions of the signals, with the thresholds of rules.
    pub histograms: Vec<Histogram>,
    /// Documents by language, the most frequent first.
    pub languages: Vec<(String, u64)>,
    /// What `clean` changed: documents and changes, by part.
    pub changes: BTreeMap<String, Change>,
    /// What `lines` took from the texts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lines: Option<LinesReport>,
    /// The evaluation sets that `decontaminate` looks for.
    pub benchmarks: Vec<BenchmarkReport>,
    /// Tokens by source, where the run has come so far.
    #[serde(skip_serializing_if = "serde_json::Value::is_null")]
    pub tokens: serde_json::Value,
    /// Dropped documents of each rule, and documents kept to the end, with placeholders for all personal data.
    pub samples: Vec<Sample>,
}

/// What a stage did.
#[derive(Clone, Debug, Serialize)]
pub struct StageReport {
    /// Name.
    pub stage: String,
    /// Rows read.
    pub read: u64,
    /// Rows kept.
    pub kept: u64,
    /// Rows dropped.
    pub dropped: u64,
    /// Bytes of its files.
    pub bytes: u64,
    /// Seconds of work, summed over tasks.
    pub seconds: f64,
    /// Rows read in a second of work.
    pub rows_per_second: f64,
}

/// How often something was changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Documents.
    pub documents: u64,
    /// Changes.
    pub changes: u64,
}

/// The report of `run_dir`, as far as the run has come.
pub fn report(run_dir: &Path) -> Result<Report> {
    let stages = summaries(run_dir)?;
    let signals = histograms::scan(run_dir, &stages)?;
    // A report is passed on: personal data that the run dropped, or let stand, is no part of it, whatever the recipe looks for.
    let excerpt = Excerpt { chars: SAMPLE_CHARS, hidden: PiiFinder::new(Pii::ALL) };
    let mut samples = by_rule(run_dir, &stages, SAMPLES, &excerpt, 0)?;
    samples.extend(by_source(run_dir, &stages, None, SAMPLES, &excerpt, 0)?);
    let absolute = std::path::absolute(run_dir).unwrap_or_else(|_| run_dir.into());
    Ok(Report {
        run: absolute.file_name().map_or_else(|| ".".into(), |name| name.to_string_lossy().into_owned()),
        stages: stages.iter().map(StageReport::of).collect(),
        funnel: funnel::scan(run_dir, &stages)?,
        rules: rules::of(run_dir, &stages)?,
        overlap: overlap::scan(run_dir, &stages)?,
        histograms: signals.histograms,
        languages: signals.languages,
        changes: changes(&stages),
        lines: removed::lines(run_dir, &stages, &excerpt)?,
        benchmarks: removed::benchmarks(run_dir, &stages)?,
        tokens: tokens(&stages),
        samples,
    })
}

impl StageReport {
    fn of(summary: &StageSummary) -> Self {
        let totals = &summary.totals;
        Self {
            stage: summary.stage.clone(),
            read: totals.rows_read,
            kept: totals.rows_kept,
            dropped: totals.rows_dropped(),
            bytes: totals.bytes,
            seconds: totals.seconds,
            rows_per_second: if totals.seconds > 0.0 { totals.rows_read as f64 / totals.seconds } else { 0.0 },
        }
    }
}

/// The notes of `clean`, added up.
fn changes(stages: &[StageSummary]) -> BTreeMap<String, Change> {
    let mut changes: BTreeMap<String, Change> = BTreeMap::new();
    for notes in decisive(stages).into_iter().filter(|s| s.stage == "clean").flat_map(|s| &s.notes) {
        for (group, prefix) in [("changes", ""), ("redacted", "redacted ")] {
            for (name, counts) in notes[group].as_object().into_iter().flatten() {
                let change = changes.entry(format!("{prefix}{name}")).or_default();
                change.documents += counts["documents"].as_u64().unwrap_or_default();
                change.changes += counts["changes"].as_u64().unwrap_or_default();
            }
        }
    }
    changes
}

fn tokens(stages: &[StageSummary]) -> serde_json::Value {
    let notes = stages.iter().find(|s| s.stage == "token_statistics").and_then(|s| s.notes.first());
    notes.cloned().unwrap_or_default()
}
