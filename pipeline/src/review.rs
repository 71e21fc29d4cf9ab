//! Marks that people give to documents, and what they say about rules.
//!
//! Marks are lines of `RUN/review/marks.jsonl`, appended and synced one by one, so that they survive whatever happens to
//! the program or the run. A mark names its document by the id, which is the same when stages run again. A later mark of the same
//! document by the same stage and rule replaces an earlier one; one of a verdict that the run does not give any more stays in the file and
//! out of the figures, and counts again when the run gives that verdict again.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::sync_dir;
use crate::report::{Standing, standing};
use crate::status::StageSummary;

/// What a person says of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It belongs in the corpus.
    Keep,
    /// It does not.
    Drop,
    /// Hard to say.
    Unsure,
}

/// One mark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// The document.
    pub id: Digest,
    /// The stage that dropped it, or the one that kept it.
    pub stage: String,
    /// The rule that dropped it; none for a document that was kept.
    #[serde(default)]
    pub rule: Option<String>,
    /// The document's source.
    pub source: String,
    /// What was said.
    pub mark: Verdict,
}

impl Mark {
    /// What it is of; without the stage what every stage keeps would be the same.
    fn key(&self) -> Key {
        (self.stage.clone(), self.rule.clone(), self.id)
    }
}

/// Marks of one rule, or of the documents of one source that one stage kept, and what they say.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Precision {
    /// The stage that dropped or kept the documents.
    pub stage: String,
    /// The rule; none for kept documents.
    pub rule: Option<String>,
    /// The source, for kept documents.
    pub source: Option<String>,
    /// Marked to keep.
    pub keep: u64,
    /// Marked to drop.
    pub drop: u64,
    /// Marked unsure: in neither of the fractions.
    pub unsure: u64,
    /// Marks of documents of which the run says something else by now: in no other figure.
    pub changed: u64,
    /// Marks of documents that the run does not have any more: in no other figure.
    pub gone: u64,
    /// Fraction of the decided marks that agree with the run: `drop` for a rule, `keep` for kept documents.
    pub precision: Option<f64>,
    /// Wilson's interval for it, 95%.
    pub interval: Option<(f64, f64)>,
}

/// What a mark is of: the stage, its rule (none: it kept the document) and the document.
type Key = (String, Option<String>, Digest);

/// The marks of a run, each with what has become of the verdict that it is of.
type Marked = BTreeMap<Key, (Mark, Standing)>;

/// The marks of a run, to add to.
pub struct Marks {
    path: PathBuf,
    file: File,
    marks: Marked,
}

impl Marks {
    /// Where the marks of a run are.
    pub fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("review").join("marks.jsonl")
    }

    /// The marks of a run with these stages so far; a last line that a crash has torn is cut off.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for another line that is no mark, with its number.
    pub fn open(run_dir: &Path, stages: &[StageSummary]) -> Result<Self> {
        let path = Self::path(run_dir);
        let dir = path.parent().unwrap_or(run_dir);
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let (marks, whole) = Self::parse(run_dir, stages)?;
        let open = || -> std::io::Result<File> {
            let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
            file.set_len(whole)?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        let file = open().map_err(|e| Error::io(&path, e))?;
        sync_dir(dir)?;
        Ok(Self { path, file, marks })
    }

    /// The marks of a run with these stages, to look at.
    ///
    /// # Errors
    /// As [`Marks::open`].
    pub fn read(run_dir: &Path, stages: &[StageSummary]) -> Result<Vec<(Mark, Standing)>> {
        Ok(Self::parse(run_dir, stages)?.0.into_values().collect())
    }

    /// The marks, and the bytes of the lines that are whole.
    fn parse(run_dir: &Path, stages: &[StageSummary]) -> Result<(Marked, u64)> {
        let path = Self::path(run_dir);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(Error::io(&path, e)),
        };
        let mut marks = BTreeMap::new();
        let mut start = 0;
        for (number, end) in memchr::memchr_iter(b'\n', &bytes).enumerate() {
            let line = &bytes[start..end];
            let mark: Mark = serde_json::from_slice(line).map_err(|e| Error::Corrupt {
                path: path.clone(),
                reason: format!("line {}: {}", number + 1, no_mark(line, &e)),
            })?;
            marks.insert(mark.key(), mark);
            start = end + 1;
        }
        let verdicts: Vec<_> = marks.values().map(|m: &Mark| (m.id, m.stage.as_str(), m.rule.as_deref())).collect();
        let found = if verdicts.is_empty() { Vec::new() } else { standing(run_dir, stages, &verdicts)? };
        let marks = marks.into_iter().zip(found).map(|((key, mark), standing)| (key, (mark, standing))).collect();
        Ok((marks, start as u64))
    }

    /// Adds a mark of a verdict that the run gives: it is on the disk when this returns.
    pub fn add(&mut self, mark: Mark) -> Result<()> {
        let mut line = serde_json::to_vec(&mark).map_err(Error::abort)?;
        line.push(b'\n');
        self.file.write_all(&line).and_then(|()| self.file.sync_data()).map_err(|e| Error::io(&self.path, e))?;
        self.marks.insert(mark.key(), (mark, Standing::Stands));
        Ok(())
    }

    /// All marks, also those of verdicts that the run does not give any more.
    pub fn all(&self) -> impl Iterator<Item = &(Mark, Standing)> {
        self.marks.values()
    }
}

/// Why a line of the file is no mark, and what to do about it.
fn no_mark(line: &[u8], error: &serde_json::Error) -> String {
    let fields = serde_json::from_slice::<serde_json::Value>(line).unwrap_or_default();
    match fields["ordinal"].as_u64().filter(|_| fields.get("id").is_none()) {
        Some(ordinal) => format!(
            "a mark of an earlier version, which names its document by its place in the run ({ordinal}) and not by its id, so \
             that nobody can tell whether it is the same document still; move the file away and mark again, or, if `ingest` has not \
             run since, put `id` (`fulgurite sql RUN \"select id from ingest where ordinal = {ordinal}\"`) and `stage` in the \
             place of `ordinal`"
        ),
        None => format!("{error}; mend or remove the line"),
    }
}

/// What marks say: of each stage a line for each rule, and one for the kept documents of each source.
pub fn precision<'m>(marks: impl IntoIterator<Item = &'m (Mark, Standing)>) -> Vec<Precision> {
    type Line<'m> = (&'m str, Option<&'m str>, Option<&'m str>);
    let mut counts: BTreeMap<Line<'_>, [u64; 5]> = BTreeMap::new();
    for (mark, standing) in marks {
        let source = mark.rule.is_none().then_some(mark.source.as_str());
        let counter = match standing {
            Standing::Stands => mark.mark as usize,
            Standing::Changed => 3,
            Standing::Gone => 4,
        };
        counts.entry((mark.stage.as_str(), mark.rule.as_deref(), source)).or_default()[counter] += 1;
    }
    let line = |((stage, rule, source), [keep, drop, unsure, changed, gone]): (Line<'_>, [u64; 5])| {
        let agree = if rule.is_some() { drop } else { keep };
        Precision {
            stage: stage.to_owned(),
            rule: rule.map(str::to_owned),
            source: source.map(str::to_owned),
            keep,
            drop,
            unsure,
            changed,
            gone,
            precision: (keep + drop > 0).then(|| agree as f64 / (keep + drop) as f64),
            interval: wilson(agree, keep + drop),
        }
    };
    counts.into_iter().map(line).collect()
}

/// Wilson's score interval at 95% for a fraction of `part` in `whole`; none for nothing.
pub fn wilson(part: u64, whole: u64) -> Option<(f64, f64)> {
    /// The 97.5% point of the normal distribution.
    const Z: f64 = 1.959_963_984_540_054;
    if whole == 0 {
        return None;
    }
    let (n, p) = (whole as f64, part as f64 / whole as f64);
    let z2 = Z * Z;
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    Some(((centre - half).max(0.0), (centre + half).min(1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(id: u128, rule: Option<&str>, mark: Verdict) -> Mark {
        let rule = rule.map(str::to_owned);
        Mark { id: Digest(id), stage: "filter".into(), rule, source: "web".into(), mark }
    }

    #[test]
    fn wilson_as_published() {
        let near = |found: Option<(f64, f64)>, low: f64, high: f64| {
            let (a, b) = found.unwrap();
            assert!((a - low).abs() < 5e-4 && (b - high).abs() < 5e-4, "{a} {b}");
        };
        // Newcombe 1998, table I.
        near(wilson(81, 263), 0.2553, 0.3662);
        near(wilson(15, 148), 0.0624, 0.1605);
        near(wilson(0, 20), 0.0, 0.1611);
        near(wilson(1, 29), 0.0061, 0.1718);
        assert_eq!(wilson(0, 0), None);
    }

    #[test]
    fn what_two_stages_keep_is_marked_twice() {
        let dir = tempfile::tempdir().unwrap();
        let mut marks = Marks::open(dir.path(), &[]).unwrap();
        marks.add(mark(1, None, Verdict::Keep)).unwrap();
        marks.add(Mark { stage: "mix".into(), ..mark(1, None, Verdict::Drop) }).unwrap();
        marks.add(Mark { stage: "mix".into(), ..mark(1, Some("short"), Verdict::Drop) }).unwrap();
        let lines = |marks: &Marks| {
            precision(marks.all()).into_iter().map(|p| (p.stage, p.rule, p.keep, p.drop, p.gone)).collect::<Vec<_>>()
        };
        let of = |stage: &str, rule: Option<&str>, counts: [u64; 3]| {
            (stage.to_owned(), rule.map(str::to_owned), counts[0], counts[1], counts[2])
        };
        let expected = [of("filter", None, [1, 0, 0]), of("mix", None, [0, 1, 0]), of("mix", Some("short"), [0, 1, 0])];
        assert_eq!(lines(&marks), expected);
        let read = Marks::open(dir.path(), &[]).unwrap();
        let gone = [of("filter", None, [0, 0, 1]), of("mix", None, [0, 0, 1]), of("mix", Some("short"), [0, 0, 1])];
        assert_eq!(lines(&read), gone);
    }

    #[test]
    fn marks_survive_and_the_last_one_counts() {
        let dir = tempfile::tempdir().unwrap();
        let mut marks = Marks::open(dir.path(), &[]).unwrap();
        marks.add(mark(1, Some("short"), Verdict::Drop)).unwrap();
        marks.add(mark(2, Some("short"), Verdict::Drop)).unwrap();
        marks.add(mark(2, Some("short"), Verdict::Keep)).unwrap();
        marks.add(mark(3, Some("short"), Verdict::Unsure)).unwrap();
        marks.add(mark(2, None, Verdict::Keep)).unwrap();
        let found = precision(marks.all());
        assert_eq!((found[0].source.as_deref(), found[0].precision), (Some("web"), Some(1.0)));
        assert_eq!((found[1].keep, found[1].drop, found[1].unsure, found[1].gone), (1, 1, 1, 0));
        assert_eq!(found[1].precision, Some(0.5));
        assert_eq!(found[1].interval, wilson(1, 2));
        drop(marks);
        // A line that a crash has torn.
        let path = Marks::path(dir.path());
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"id\": 9");
        fs::write(&path, &bytes).unwrap();
        let mut marks = Marks::open(dir.path(), &[]).unwrap();
        marks.add(mark(4, Some("short"), Verdict::Drop)).unwrap();
        let read = Marks::read(dir.path(), &[]).unwrap();
        assert_eq!(read.iter().map(|m| &m.0).collect::<Vec<_>>(), marks.all().map(|m| &m.0).collect::<Vec<_>>());
        assert_eq!(read.len(), 5);
        // This run has no documents: what was marked before it is kept, and no figure of a rule.
        let found = precision(&read);
        assert_eq!((found[1].keep, found[1].drop, found[1].unsure, found[1].gone), (0, 0, 0, 4));
        assert_eq!((found[1].precision, found[1].interval), (None, None));

        let refused = |line: &str| {
            fs::write(&path, format!("{line}\n")).unwrap();
            Marks::open(dir.path(), &[]).err().unwrap().to_string()
        };
        assert!(refused("{}").contains("line 1: missing field"));
        let old = refused(r#"{"ordinal":4294967300,"rule":"short","source":"web","mark":"drop"}"#);
        assert!(old.contains("line 1: a mark of an earlier version") && old.contains("ordinal = 4294967300"), "{old}");
    }
}
