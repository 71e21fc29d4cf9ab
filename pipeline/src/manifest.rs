//! What a stage has done: `manifest.json`, replaced by atomic rename, and `journal.jsonl`, one line
//! per committed shard, append-only. The journal line is the commit.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::shard::FileEntry;

/// Version of the files in a run directory. A run of another version is refused, never misread.
pub const FORMAT_VERSION: u32 = 1;

/// Whether a stage still has work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StageState {
    /// Some of its tasks may be journalled.
    Running,
    /// All of its tasks are journalled.
    Done,
}

/// State of one stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`].
    pub format: u32,
    /// Stage name.
    pub stage: String,
    /// Hash of configuration, code version and input fingerprints.
    pub fingerprint: Digest,
    /// Version of the stage's code.
    pub version: u32,
    /// Everything of the recipe that influences the output.
    pub config: serde_json::Value,
    /// Fingerprints of the input stages, by name.
    pub inputs: BTreeMap<String, Digest>,
    /// Number of tasks.
    pub tasks: u32,
    /// Whether all of them are committed.
    pub state: StageState,
    /// Sums over the journal, filled in when the stage is done.
    pub totals: Totals,
    /// Figures of a stage that has a single task, such as bytes per token by source, filled in likewise.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub notes: serde_json::Value,
}

/// Sums over a journal.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Rows read.
    pub rows_read: u64,
    /// Rows kept.
    pub rows_kept: u64,
    /// Rows dropped, by rule.
    pub dropped: BTreeMap<String, u64>,
    /// Bytes of the stage's files.
    pub bytes: u64,
    /// Seconds of work, summed over tasks.
    pub seconds: f64,
}

impl Totals {
    /// Rows dropped by any rule.
    pub fn rows_dropped(&self) -> u64 {
        self.dropped.values().sum()
    }

    /// Add one journal line.
    pub fn add(&mut self, entry: &JournalEntry) {
        self.rows_read += entry.rows_read;
        self.rows_kept += entry.rows_kept;
        for (rule, n) in &entry.dropped {
            *self.dropped.entry(rule.clone()).or_default() += n;
        }
        self.bytes += entry.files.iter().map(|f| f.bytes).sum::<u64>();
        self.seconds += entry.seconds;
    }
}

/// One committed task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JournalEntry {
    /// Task number; a later line for the same task replaces an earlier one.
    pub task: u32,
    /// Digest of the task's inputs, so that a line never stands for other work.
    pub inputs: Digest,
    /// Files of this task, paths relative to the stage directory.
    pub files: Vec<FileEntry>,
    /// Rows read.
    pub rows_read: u64,
    /// Rows kept.
    pub rows_kept: u64,
    /// Rows dropped, by rule.
    pub dropped: BTreeMap<String, u64>,
    /// Figures of the stage's own, such as token counts.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub notes: serde_json::Value,
    /// Seconds of work, wall clock.
    pub seconds: f64,
}

impl Manifest {
    /// Path of the manifest in a stage directory.
    pub fn path(stage_dir: &Path) -> PathBuf {
        stage_dir.join("manifest.json")
    }

    /// The stage's manifest, or `None` if the stage never began.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a file that is no manifest: nothing says any more what the stage's files were made
    /// from. [`Error::Recipe`] for one of another format, which another version of the program can read.
    pub fn load(stage_dir: &Path) -> Result<Option<Self>> {
        let path = Self::path(stage_dir);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(path, e)),
        };
        let corrupt = |e: serde_json::Error| Error::Corrupt {
            path: path.clone(),
            reason: format!(
                "damaged, so nothing says what the files beside it were made from ({e}); put it back, or remove {} to \
                 have the stage done again",
                stage_dir.display()
            ),
        };
        // The format first: a manifest of another format need not have these keys.
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(corrupt)?;
        if let Some(format) = value.get("format").and_then(serde_json::Value::as_u64)
            && format != u64::from(FORMAT_VERSION)
        {
            return Err(Error::Recipe(format!(
                "{}: manifest format {format}, this program reads {FORMAT_VERSION}; use the program that wrote it, or \
                 another run directory",
                path.display()
            )));
        }
        serde_json::from_value(value).map(Some).map_err(corrupt)
    }

    /// Replace the stage's manifest by atomic rename.
    pub fn save(&self, stage_dir: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self).map_err(Error::abort)?;
        text.push('\n');
        replace_file(&Self::path(stage_dir), text.as_bytes())
    }
}

/// Write `bytes` to `path` so that a reader, or a crash, sees the old file or the new one, never a
/// part: temporary name, sync, rename, sync of the directory.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = directory_of(path);
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".tmp");
    let temporary = dir.join(name);
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| Error::io(path, e))?;
    sync_dir(dir)
}

/// The directory that a file lies in. The parent of a bare name is the empty path, which no call takes for the working
/// directory.
fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Make renames in `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io(dir, e))
}

/// The append-only list of committed tasks of one stage.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Path of the journal in a stage directory.
    pub fn path(stage_dir: &Path) -> PathBuf {
        stage_dir.join("journal.jsonl")
    }

    /// The committed tasks by number. A last line torn by a crash was never a commit and is left
    /// out; so is a line that was damaged later, whose task is then undone.
    pub fn read(stage_dir: &Path) -> Result<BTreeMap<u32, JournalEntry>> {
        Ok(Self::parse(stage_dir)?.entries)
    }

    /// As [`Self::read`], with what is wrong with the file, for people.
    pub fn inspect(stage_dir: &Path) -> Result<(BTreeMap<u32, JournalEntry>, Vec<String>)> {
        let parsed = Self::parse(stage_dir)?;
        Ok((parsed.entries, parsed.faults))
    }

    fn parse(stage_dir: &Path) -> Result<Parsed> {
        let path = Self::path(stage_dir);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Parsed::default()),
            Err(e) => return Err(Error::io(path, e)),
        };
        let mut parsed = Parsed::default();
        let mut start = 0usize;
        for (number, end) in memchr::memchr_iter(b'\n', &bytes).enumerate() {
            let line = &bytes[start..end];
            match serde_json::from_slice::<JournalEntry>(line) {
                Ok(entry) => {
                    parsed.entries.insert(entry.task, entry);
                    parsed.valid.extend_from_slice(&bytes[start..=end]);
                }
                // A crash of the machine may leave a block of zeroes as the last line.
                Err(_) if end + 1 == bytes.len() => break,
                Err(e) => parsed.faults.push(format!("line {} of journal.jsonl is damaged: {e}", number + 1)),
            }
            start = end + 1;
        }
        Ok(parsed)
    }

    /// Open for appending. A torn last line is cut off; damaged lines are taken out.
    pub fn open(stage_dir: &Path) -> Result<(Self, BTreeMap<u32, JournalEntry>)> {
        let Parsed { entries, valid, faults } = Self::parse(stage_dir)?;
        let path = Self::path(stage_dir);
        if !faults.is_empty() {
            replace_file(&path, &valid)?;
        }
        let open = || -> std::io::Result<File> {
            let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(&path)?;
            file.set_len(valid.len() as u64)?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        let file = open().map_err(|e| Error::io(&path, e))?;
        sync_dir(stage_dir)?;
        Ok((Self { path, file }, entries))
    }

    /// Commit one task: the line is on disk when this returns.
    pub fn commit(&mut self, entry: &JournalEntry) -> Result<()> {
        let mut line = serde_json::to_vec(entry).map_err(Error::abort)?;
        line.push(b'\n');
        // One write, then sync: a crash leaves all of the line or a torn tail that `open` cuts.
        self.file.write_all(&line).and_then(|()| self.file.sync_data()).map_err(|e| Error::io(&self.path, e))
    }
}

/// What a journal file holds.
#[derive(Default)]
struct Parsed {
    entries: BTreeMap<u32, JournalEntry>,
    /// The lines that are whole.
    valid: Vec<u8>,
    /// What is wrong with the others.
    faults: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(task: u32) -> JournalEntry {
        JournalEntry {
            task,
            inputs: Digest::of(b"in"),
            files: vec![],
            rows_read: 10,
            rows_kept: 7,
            dropped: BTreeMap::from([("short".into(), 3)]),
            notes: serde_json::Value::Null,
            seconds: 0.5,
        }
    }

    #[test]
    fn a_bare_name_lies_in_the_working_directory() {
        for (path, directory) in [("tokenizer.json", "."), ("a/b", "a"), ("./a", "."), ("/a", "/"), ("", ".")] {
            assert_eq!(directory_of(Path::new(path)), Path::new(directory), "{path:?}");
        }
        let name = format!("replaced-by-a-test-{}", std::process::id());
        let replaced = replace_file(Path::new(&name), b"new");
        let read = fs::read(&name);
        fs::remove_file(&name).unwrap();
        replaced.unwrap();
        assert_eq!(read.unwrap(), b"new");
    }

    #[test]
    fn a_torn_last_line_is_cut_at_every_length() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(dir.path()).unwrap();
        for t in 0..3 {
            journal.commit(&entry(t)).unwrap();
        }
        let whole = fs::read(Journal::path(dir.path())).unwrap();
        let line = whole.len() / 3;
        for cut in 2 * line..whole.len() {
            fs::write(Journal::path(dir.path()), &whole[..cut]).unwrap();
            let (mut journal, entries) = Journal::open(dir.path()).unwrap();
            assert_eq!(entries.len(), 2, "cut at {cut}");
            journal.commit(&entry(2)).unwrap();
            assert_eq!(fs::read(Journal::path(dir.path())).unwrap(), whole);
        }
    }

    #[test]
    fn a_damaged_line_in_the_middle_undoes_its_task_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(dir.path()).unwrap();
        for t in 0..3 {
            journal.commit(&entry(t)).unwrap();
        }
        let mut bytes = fs::read(Journal::path(dir.path())).unwrap();
        bytes[5] = b'#';
        fs::write(Journal::path(dir.path()), &bytes).unwrap();
        let (entries, faults) = Journal::inspect(dir.path()).unwrap();
        assert_eq!(entries.keys().copied().collect::<Vec<_>>(), [1, 2]);
        assert!(faults.len() == 1 && faults[0].starts_with("line 1 of journal.jsonl is damaged"), "{faults:?}");
        let (mut journal, entries) = Journal::open(dir.path()).unwrap();
        assert_eq!(entries.len(), 2);
        journal.commit(&entry(0)).unwrap();
        let (entries, faults) = Journal::inspect(dir.path()).unwrap();
        assert_eq!((entries.len(), faults), (3, vec![]));
    }

    #[test]
    fn a_damaged_manifest_is_told_from_one_of_another_format() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Manifest::load(dir.path()).unwrap().is_none());
        fs::write(Manifest::path(dir.path()), b"{\"format\": 1, \xff").unwrap();
        let error = Manifest::load(dir.path()).unwrap_err();
        assert!(matches!(&error, Error::Corrupt { .. }) && error.to_string().contains("or remove"), "{error}");
        fs::write(Manifest::path(dir.path()), "{\"format\": 99}").unwrap();
        let error = Manifest::load(dir.path()).unwrap_err();
        assert!(
            matches!(&error, Error::Recipe(m) if m.contains("format 99") && m.contains("another run directory")),
            "{error}"
        );
    }

    #[test]
    fn the_last_line_of_a_task_wins_and_totals_add_up() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(dir.path()).unwrap();
        journal.commit(&entry(0)).unwrap();
        journal.commit(&JournalEntry { rows_read: 11, rows_kept: 8, ..entry(0) }).unwrap();
        let entries = Journal::read(dir.path()).unwrap();
        let mut totals = Totals::default();
        entries.values().for_each(|e| totals.add(e));
        assert_eq!((totals.rows_read, totals.rows_kept, totals.rows_dropped()), (11, 8, 3));
    }
}
