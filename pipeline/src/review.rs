//! Marks that people give to documents, and what they say about rules.
//!
//! Marks are lines of `RUN/review/marks.jsonl`, appended and synced one by one, so that they survive whatever happens to
//! the program or the run. A later mark of the same document under the same rule replaces an earlier one.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::manifest::sync_dir;

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
    /// The document's place in the run.
    pub ordinal: u64,
    /// The rule that dropped it; none for a document that was kept.
    #[serde(default)]
    pub rule: Option<String>,
    /// The document's source.
    pub source: String,
    /// What was said.
    pub mark: Verdict,
}

/// Marks of one rule, or of the kept documents of one source, and what they say.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Precision {
    /// The rule; none for kept documents.
    pub rule: Option<String>,
    /// The source, for kept documents.
    pub source: Option<String>,
    /// Marked to keep.
    pub keep: u64,
    /// Marked to drop.
    pub drop: u64,
    /// Marked unsure: in none of the figures.
    pub unsure: u64,
    /// Fraction of the decided marks that agree with the run: `drop` for a rule, `keep` for kept documents.
    pub precision: Option<f64>,
    /// Wilson's interval for it, 95%.
    pub interval: Option<(f64, f64)>,
}

/// The marks of a run.
pub struct Marks {
    path: PathBuf,
    file: File,
    /// By rule and ordinal.
    marks: BTreeMap<(Option<String>, u64), Mark>,
}

impl Marks {
    /// Where the marks of a run are.
    pub fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("review").join("marks.jsonl")
    }

    /// The marks of a run so far; a last line that a crash has torn is cut off.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for another line that is no mark, with its number.
    pub fn open(run_dir: &Path) -> Result<Self> {
        let path = Self::path(run_dir);
        let dir = path.parent().unwrap_or(run_dir);
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let (marks, whole) = Self::parse(&path)?;
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

    /// The marks of a run, to look at.
    pub fn read(run_dir: &Path) -> Result<Vec<Mark>> {
        Ok(Self::parse(&Self::path(run_dir))?.0.into_values().collect())
    }

    #[allow(clippy::type_complexity)]
    fn parse(path: &Path) -> Result<(BTreeMap<(Option<String>, u64), Mark>, u64)> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(Error::io(path, e)),
        };
        let mut marks = BTreeMap::new();
        let mut start = 0;
        for (number, end) in memchr::memchr_iter(b'\n', &bytes).enumerate() {
            let mark: Mark = serde_json::from_slice(&bytes[start..end]).map_err(|e| Error::Corrupt {
                path: path.into(),
                reason: format!("line {}: {e}; mend or remove the line", number + 1),
            })?;
            marks.insert((mark.rule.clone(), mark.ordinal), mark);
            start = end + 1;
        }
        Ok((marks, start as u64))
    }

    /// Adds a mark: it is on the disk when this returns.
    pub fn add(&mut self, mark: Mark) -> Result<()> {
        let mut line = serde_json::to_vec(&mark).map_err(Error::abort)?;
        line.push(b'\n');
        self.file.write_all(&line).and_then(|()| self.file.sync_data()).map_err(|e| Error::io(&self.path, e))?;
        self.marks.insert((mark.rule.clone(), mark.ordinal), mark);
        Ok(())
    }

    /// All marks.
    pub fn all(&self) -> impl Iterator<Item = &Mark> {
        self.marks.values()
    }
}

/// What marks say: a line for each rule, and one for the kept documents of each source.
pub fn precision<'m>(marks: impl IntoIterator<Item = &'m Mark>) -> Vec<Precision> {
    let mut counts: BTreeMap<(Option<&str>, Option<&str>), [u64; 3]> = BTreeMap::new();
    for mark in marks {
        let source = mark.rule.is_none().then_some(mark.source.as_str());
        counts.entry((mark.rule.as_deref(), source)).or_default()[mark.mark as usize] += 1;
    }
    let line = |((rule, source), [keep, drop, unsure]): ((Option<&str>, Option<&str>), [u64; 3])| {
        let agree = if rule.is_some() { drop } else { keep };
        Precision {
            rule: rule.map(str::to_owned),
            source: source.map(str::to_owned),
            keep,
            drop,
            unsure,
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

    fn mark(ordinal: u64, rule: Option<&str>, mark: Verdict) -> Mark {
        Mark { ordinal, rule: rule.map(str::to_owned), source: "web".into(), mark }
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
    fn marks_survive_and_the_last_one_counts() {
        let dir = tempfile::tempdir().unwrap();
        let mut marks = Marks::open(dir.path()).unwrap();
        marks.add(mark(1, Some("short"), Verdict::Drop)).unwrap();
        marks.add(mark(2, Some("short"), Verdict::Drop)).unwrap();
        marks.add(mark(2, Some("short"), Verdict::Keep)).unwrap();
        marks.add(mark(3, Some("short"), Verdict::Unsure)).unwrap();
        marks.add(mark(2, None, Verdict::Keep)).unwrap();
        drop(marks);
        // A line that a crash has torn.
        let path = Marks::path(dir.path());
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"ordinal\": 9");
        fs::write(&path, &bytes).unwrap();
        let mut marks = Marks::open(dir.path()).unwrap();
        marks.add(mark(4, Some("short"), Verdict::Drop)).unwrap();
        let read = Marks::read(dir.path()).unwrap();
        assert_eq!(read, marks.all().cloned().collect::<Vec<_>>());
        assert_eq!(read.len(), 5);
        let found = precision(&read);
        assert_eq!((found[0].source.as_deref(), found[0].precision), (Some("web"), Some(1.0)));
        assert_eq!((found[1].keep, found[1].drop, found[1].unsure), (1, 2, 1));
        assert_eq!(found[1].precision, Some(2.0 / 3.0));
        assert_eq!(found[1].interval, wilson(2, 3));

        fs::write(&path, "{}\n").unwrap();
        assert!(Marks::open(dir.path()).err().unwrap().to_string().contains("line 1"));
    }
}
