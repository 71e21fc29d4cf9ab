//! What went from inside the documents, and for which evaluation sets documents went.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use super::samples::Excerpt;
use super::shards::{files_below, integers, read, texts};
use crate::error::Result;
use crate::status::{StageSummary, decisive};

/// Lines that a report shows.
const LINES: usize = 20;
/// Characters of a line that a report shows.
const LINE_CHARS: usize = 200;
/// Characters of a line that whoever counts lines keeps for the report. It shows fewer, with placeholders for personal data, which
/// is not recognised where it was cut in two. Nothing of that is longer than the difference but tokens and private keys, of
/// which none is shown that reaches the cut.
pub const KEPT_LINE_CHARS: usize = 4000;

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
    /// Its beginning; empty where that may be part of a key too long to be recognised.
    pub line: String,
    /// Documents that it stands in.
    pub documents: u64,
}

impl FrequentLine {
    /// With placeholders for what `excerpt` hides.
    pub(super) fn shown(self, excerpt: &Excerpt) -> Self {
        let cut = self.line.chars().count() >= KEPT_LINE_CHARS;
        let mut line = excerpt.of(&self.line);
        let mut sure = LINE_CHARS;
        if cut {
            let all = line.chars().count();
            line.truncate(before_open_key(&line));
            let left = line.chars().count();
            // The last characters may be half of something else. Many placeholders, which may be shorter than what they stand for, may
            // have brought these near the beginning.
            sure = left.saturating_sub((KEPT_LINE_CHARS - LINE_CHARS).saturating_sub(all - left));
        }
        Self { line: line.chars().take(sure.min(LINE_CHARS)).collect(), ..self }
    }
}

/// Bytes of a line that was cut before what may be half of a token or of a private key, however long these are: the run of ASCII without
/// white space that reaches the cut, and what begins as a key does and, still being there, was not recognised.
fn before_open_key(line: &str) -> usize {
    let run = line.trim_end_matches(|c: char| c.is_ascii_graphic()).len();
    line.find("-----BEGIN").map_or(run, |begin| begin.min(run))
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

/// The stage `name`, where it has begun and the documents were made from it.
fn found<'s>(stages: &'s [StageSummary], name: &str) -> Option<&'s StageSummary> {
    decisive(stages).into_iter().find(|stage| stage.stage == name && stage.done > 0)
}

/// The sums of the notes of `lines`, and its table of frequent lines, as `excerpt` shows them.
pub(super) fn lines(run_dir: &Path, stages: &[StageSummary], excerpt: &Excerpt) -> Result<Option<LinesReport>> {
    let Some(stage) = found(stages, "lines") else { return Ok(None) };
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
        frequent: frequent.into_iter().map(|line| line.shown(excerpt)).collect(),
    }))
}

/// The evaluation sets of `decontaminate`, in the order of the recipe.
pub(super) fn benchmarks(run_dir: &Path, stages: &[StageSummary]) -> Result<Vec<BenchmarkReport>> {
    let Some(stage) = found(stages, "decontaminate") else { return Ok(Vec::new()) };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pii::{Pii, PiiFinder};

    #[test]
    fn no_half_of_an_address_is_shown() {
        let excerpt = Excerpt { chars: 0, hidden: PiiFinder::new(Pii::ALL) };
        let shown = |line: String| {
            let line: String = line.chars().take(KEPT_LINE_CHARS).collect();
            FrequentLine { line, documents: 2 }.shown(&excerpt).line
        };
        assert_eq!(shown("Write to jane@example.org".into()), "Write to <EMAIL>");
        assert_eq!(shown("x ".repeat(10_000)), "x ".repeat(100));
        assert_eq!(shown("長".repeat(10_000)), "長".repeat(200));
        // Where the line is shown up to, and where it was kept up to.
        for before in (150..210).chain(3950..4000) {
            let line = shown(format!("{} jane.doe.of.the.house@example.org and more", "x".repeat(before)));
            assert!(line.chars().count() <= 200 && !line.contains("jane"), "{before}: {line}");
        }
        // A token that ends far behind what is shown; so many addresses that their placeholders are few characters.
        let token = format!("eyJ{}.eyJ{}.{}", "a".repeat(40), "b".repeat(1500), "c".repeat(300));
        assert_eq!(shown(format!("Use {token} here")), "Use <SECRET> here");
        // Tokens and keys that are cut, with nothing of which they could be recognised.
        let token = format!("eyJ{}.eyJ{}.{}", "a".repeat(40), "b".repeat(5000), "c".repeat(300));
        assert_eq!(shown(format!("Use {token} here")), "Use ");
        assert_eq!(shown(token), "");
        for body in ["k".repeat(5000), format!("{} ", "k".repeat(64)).repeat(100)] {
            let key = format!("-----BEGIN RSA PRIVATE KEY----- {body} -----END RSA PRIVATE KEY-----");
            assert_eq!(shown(format!("Key: {key}")), "Key: ");
        }
        // The end of one is there, but cut itself.
        for end in 3900..4000 {
            let body = "k".repeat(end);
            let line = shown(format!("-----BEGIN PRIVATE KEY----- {body} -----END PRIVATE KEY----- and more"));
            assert!(!line.contains('k'), "{end}: {line}");
        }
        for length in [30, 41, 50, 61] {
            let line = shown(format!("{}@example.org ", "j".repeat(length)).repeat(100));
            assert!(!line.contains("jj"), "{line}");
        }
    }
}
