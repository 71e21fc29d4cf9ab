//! The documents of a corpus as dense numbers: the rows of the shards of a stage, one shard after the
//! other, those of older indices before all. And the run files of a stage, which are read in this order.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pipeline::digest::Digest;
use pipeline::document::ordinal;
use pipeline::{Error, Journal, JournalEntry, Manifest, Result, RunContext, StageState, TaskContext};

use crate::partition::stop_if_asked;
use crate::runs::{Record, RunFile, Section, run_name, u32_at};

/// Tag of the table of documents in the run files of hashes and signatures. A row is the record number
/// in the ingest shard (4 bytes), the bytes of text, cut at 4 GiB (4 bytes), and what the stage adds.
pub(crate) const TABLE: u32 = u32::MAX;
/// Bytes of a row of the table before what the stage adds.
pub(crate) const ROW_BYTES: usize = 8;

/// Append the head of a row of the table.
pub(crate) fn put_row(ordinal: u64, text: &str, table: &mut Vec<u8>) {
    table.extend_from_slice(&(ordinal as u32).to_le_bytes());
    table.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
}

/// One run file of documents.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    /// Number of the ingest shard.
    pub(crate) shard: u32,
    /// Number of its first document.
    pub(crate) start: u64,
    /// Documents in it.
    pub(crate) rows: u64,
    /// The older index it belongs to: its place among those that were named.
    pub(crate) index: Option<u32>,
    xxh3: Digest,
}

/// All of them, in the order of their numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Documents {
    pub(crate) sources: Vec<Source>,
}

impl Documents {
    /// The documents of stage `stage` of the run, behind those of the stage directories `against`. Journals are read once for all
    /// tasks of a stage: each has a line for every shard.
    pub(crate) fn of(run: &RunContext, stage: &str, against: &[PathBuf]) -> Result<Arc<Self>> {
        run.shared(&format!("{stage} {against:?}"), || {
            let mut documents = Self::default();
            for (index, dir) in (0..).zip(against) {
                documents.add(dir, Journal::read(dir)?.into_values(), Some(index));
            }
            documents.add(&run.stage_dir(stage), run.journal(stage).into_values(), None);
            Ok(documents)
        })
    }

    fn add(&mut self, dir: &Path, entries: impl Iterator<Item = JournalEntry>, index: Option<u32>) {
        for entry in entries {
            let name = run_name(entry.task);
            let Some(file) = entry.files.iter().find(|f| f.path.as_os_str() == name.as_str()) else { continue };
            self.sources.push(Source {
                path: dir.join(name),
                shard: entry.task,
                start: self.len(),
                rows: file.rows,
                index,
                xxh3: file.xxh3,
            });
        }
    }

    /// Give the records that a radix partition or a shard is made of to `take`: of every run file, the sections whose tag is
    /// one of `tags`, the records with keys from the first to the last of `keys`. The order is that of the documents.
    pub(crate) fn each_section<R: Record>(
        &self,
        task: &TaskContext,
        tags: Range<u32>,
        keys: (u64, u64),
        mut take: impl FnMut(&Source, &Section, &[R]) -> Result<()>,
    ) -> Result<()> {
        self.sources.iter().try_for_each(|source| {
            stop_if_asked(task)?;
            RunFile::open(&source.path)?
                .each_section::<R>(tags.clone(), keys, |section, records| take(source, section, records))
        })
    }

    /// Number of documents.
    pub(crate) fn len(&self) -> u64 {
        self.sources.last().map_or(0, |s| s.start + s.rows)
    }

    /// One digest over all files.
    pub(crate) fn digest(&self) -> Digest {
        let bytes: Vec<u8> = self.sources.iter().flat_map(|s| s.xxh3.0.to_le_bytes()).collect();
        Digest::of(&bytes)
    }

    /// The source that document `number` is in.
    pub(crate) fn source(&self, number: u64) -> Option<usize> {
        // The last that begins at or before it; empty ones before it begin at the same number.
        let at = self.sources.partition_point(|s| s.start <= number).checked_sub(1)?;
        (number < self.sources[at].start + self.sources[at].rows).then_some(at)
    }

    /// The source of this run's ingest shard `shard`.
    pub(crate) fn own(&self, shard: u32) -> Option<&Source> {
        let (_, own) = self.sources.split_at(self.sources.partition_point(|s| s.index.is_some()));
        own.binary_search_by_key(&shard, |s| s.shard).ok().map(|at| &own[at])
    }

    /// Look up the table rows of `numbers` (in any order, repeats allowed) and give each with its place in
    /// `numbers` to `take`. Files are opened one after the other.
    pub(crate) fn look_up(&self, numbers: &[u64], mut take: impl FnMut(usize, &Source, &[u8])) -> Result<()> {
        // Numbers beside their places: sorting places alone looks a number up for every comparison.
        let mut order: Vec<(u64, u32)> = numbers.iter().copied().zip(0..).collect();
        order.sort_unstable();
        let (mut rest, mut rows) = (order.as_slice(), Vec::new());
        while let Some(&(number, _)) = rest.first() {
            let missing = || Error::Recipe(format!("document number {number} is in no shard of the index"));
            let source = &self.sources[self.source(number).ok_or_else(missing)?];
            let end = source.start + source.rows;
            let (own, behind) = rest.split_at(rest.partition_point(|(number, _)| *number < end));
            rows.clear();
            rows.extend(own.iter().map(|(number, _)| number - source.start));
            let file = RunFile::open(&source.path)?;
            if !file.rows(TABLE, &rows, |at, row| take(own[at].1 as usize, source, row))? {
                return Err(missing());
            }
            rest = behind;
        }
        Ok(())
    }
}

/// Give the records of tag `tag` that stage `stage` of this run has written to `take`, those with keys from the first to the last of
/// `keys`, in the order of [`Documents::each_section`].
pub(crate) fn each_section_of<R: Record>(
    task: &TaskContext,
    stage: &str,
    tag: u32,
    keys: (u64, u64),
    mut take: impl FnMut(&Source, &[R]) -> Result<()>,
) -> Result<()> {
    let files = Documents::of(&task.run, stage, &[])?;
    files.each_section(task, tag..tag + 1, keys, |source, _, records| take(source, records))
}

/// Ordinal of the document of a table row.
pub(crate) fn ordinal_of(source: &Source, row: &[u8]) -> u64 {
    ordinal(source.shard, u32_at(row, 0))
}

/// One digest over the files that a stage has committed.
pub(crate) fn digest_of_stage(run: &RunContext, stage: &str) -> Digest {
    let files = run.journal(stage).into_values().flat_map(|entry| entry.files);
    let bytes: Vec<u8> = files.flat_map(|file| file.xxh3.0.to_le_bytes()).collect();
    Digest::of(&bytes)
}

/// Sum of a note of the journal lines of a stage.
pub(crate) fn sum_of_notes(run: &RunContext, stage: &str, note: &str) -> u64 {
    run.journal(stage).values().filter_map(|entry| entry.notes.get(note)?.as_u64()).sum()
}

/// Refuse an index that was not made by `version` of the stage as `config` says, or is not finished.
pub(crate) fn check_index(dir: &Path, version: u32, config: &serde_json::Value) -> Result<Digest> {
    let refuse = |reason: String| Err(Error::Recipe(format!("against: {}: {reason}", dir.display())));
    let Some(manifest) = Manifest::load(dir)? else {
        return refuse("no manifest.json: not the directory of a stage".into());
    };
    if manifest.state != StageState::Done {
        return refuse("the stage is not done: finish that run first".into());
    }
    if manifest.version != version {
        let made = manifest.version;
        return refuse(format!("made by version {made} of the stage, this is version {version}: run it again"));
    }
    if manifest.config != *config {
        return refuse(format!("made with {}, this recipe says {config}: keys would never meet", manifest.config));
    }
    let (entries, damaged) = Journal::inspect(dir)?;
    // Whether the files are what the journal says is looked at by the runner.
    if !damaged.is_empty() || entries.len() != manifest.tasks as usize {
        let (there, tasks, damaged) = (entries.len(), manifest.tasks, damaged.join("; "));
        return refuse(format!(
            "{there} of {tasks} tasks are in its journal; run that run again, which makes up for it {damaged}"
        ));
    }
    let bytes: Vec<u8> = entries.into_values().flat_map(|e| e.files).flat_map(|f| f.xxh3.0.to_le_bytes()).collect();
    Ok(Digest::of(&bytes))
}
