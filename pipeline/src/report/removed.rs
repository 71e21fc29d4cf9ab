//! What went from inside the documents, and for which evaluation sets documents went.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use super::shards::{files_below, integers, read, texts};
use crate::error::Result;
use crate::status::StageSummary;

/// Lines that a report shows.
const LINES: usize = 20;

/// What line deduplication took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LinesReport {
    /// Documents that lost a line.
    pub documents: u64,
    /// Lines (or paragraphs) removed.
    pub lines: u64,
    /// Bytes of text removed.
    pub bytes: u64,
    /// Lines that stand in too many documents, those in the most first. None of a Bloom filter, which does not count.
    pub frequent: Vec<FrequentLine>,
}

/// A line that stands in many documents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FrequentLine {
    /// Its beginning.
    pub line: String,
    /// Documents that it stands in.
    pub documents: u64,
}

/// What is known of an evaluation set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BenchmarkReport {
    /// Its name in the recipe.
    pub benchmark: String,
    /// Its records.
    pub records: u64,
    /// Texts in them.
    pub texts: u64,
    /// Texts of too few words to be looked for.
    pub too_short: u64,
    /// Documents that hold an n-gram of it, as far as the run has come.
    pub documents: u64,
}

/// The sums of the notes of `lines`, and its table of frequent lines.
pub(super) fn lines(run_dir: &Path, stages: &[StageSummary]) -> Result<Option<LinesReport>> {
    let Some(stage) = stages.iter().find(|s| s.stage == "lines" && s.done > 0) else { return Ok(None) };
    let sum = |name: &str| stage.notes.iter().filter_map(|notes| notes[name].as_u64()).sum();
    let mut frequent = Vec::new();
    for (_, path) in files_below(run_dir, "lines", "frequent")? {
        let rows = read(&path, &["line", "documents"])?;
        let counts = integers(&rows, &path, "documents")?;
        let lines = texts(&rows, &path, "line")?.into_iter().map(Option::unwrap_or_default);
        frequent.extend(lines.zip(counts).map(|(line, documents)| FrequentLine { line, documents }));
        frequent.sort_by(|a, b| (Reverse(a.documents), &a.line).cmp(&(Reverse(b.documents), &b.line)));
        frequent.truncate(LINES);
    }
    Ok(Some(LinesReport {
        documents: sum("documents_changed"),
        lines: sum("lines_removed"),
        bytes: sum("bytes_removed"),
        frequent,
    }))
}

/// The evaluation sets of `decontaminate`, in the order of the recipe.
pub(super) fn benchmarks(run_dir: &Path, stages: &[StageSummary]) -> Result<Vec<BenchmarkReport>> {
    let Some(stage) = stages.iter().find(|s| s.stage == "decontaminate" && s.done > 0) else { return Ok(Vec::new()) };
    // Every task notes what the index holds.
    let told = stage.notes.first().and_then(|notes| notes["benchmarks"].as_array());
    let mut report: Vec<BenchmarkReport> = told
        .into_iter()
        .flatten()
        .map(|set| {
            let number = |name: &str| set[name].as_u64().unwrap_or_default();
            BenchmarkReport {
                benchmark: set["name"].as_str().unwrap_or_default().into(),
                records: number("records"),
                texts: number("texts"),
                too_short: number("too_short"),
                documents: 0,
            }
        })
        .collect();
    for (_, path) in files_below(run_dir, "decontaminate", "matches")? {
        let rows = read(&path, &["ordinal", "benchmark"])?;
        let names = texts(&rows, &path, "benchmark")?;
        // A row for every document and record: each document counts once for a benchmark.
        let met: BTreeSet<(u64, &str)> =
            integers(&rows, &path, "ordinal")?.into_iter().zip(names.iter().flatten().map(String::as_str)).collect();
        for (_, name) in met {
            report.iter_mut().filter(|set| set.benchmark == name).for_each(|set| set.documents += 1);
        }
    }
    Ok(report)
}
