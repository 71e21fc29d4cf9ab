//! Stage `near_verified`: pairs of documents in one bucket that are as similar as the threshold asks.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use memmap2::Mmap;
use pipeline::{Error, Result, RunContext, Stage, Task, TaskContext, TaskReport};

use super::{NearConfig, PAIRS, SETS, SIGNATURES, Sets, VERIFIED, Verify};
use crate::disk::check_room;
use crate::documents::{Documents, ROW_BYTES, digest_of_stage, sum_of_notes};
use crate::minhash::{SKETCH_BYTES, jaccard, sketch_similarity};
use crate::partition::{keys_of, partition_tasks, stop_if_asked};
use crate::runs::{Buffered, Pair, Record, RunFile, RunWriter, Section, u64_at};

/// Tag of the pairs.
pub(super) const SIMILAR: u32 = 0;

/// Pairs of a partition, about, every band counted.
const PARTITION_PAIRS: u64 = 1 << 20;

/// Pairs that are held at a time: 32 MB, twice that until equal ones of several bands are made one, and 56 bytes for the
/// sketch of a document.
const HELD_PAIRS: usize = 1 << 20;

/// Pairs of one first document that are looked up at a time.
const CHUNK: usize = 1 << 17;

/// Comparisons of a group by sketches that take no more than a second or two: all pairs of 11,585 documents.
const MOST_BY_SKETCH: usize = 1 << 26;

/// Comparisons of a group by sets, likewise: all pairs of 2,897 documents.
const MOST_BY_SET: usize = 1 << 22;

/// Documents of a group that all others are compared with, however many these are.
const LEAST_PIVOTS: usize = 32;

/// Verifies a partition of the pairs.
///
/// All buckets of one first document are looked at together. Each other document is compared with the first
/// one; those that are not similar to it with all others of a bucket they are in, unless both are
/// connected already. So two documents end in one cluster exactly where a chain of pairs leads from one to the
/// other, each pair in a common bucket and similar.
///
/// Where the buckets of one first document hold more than some thousands that are not all similar, comparing all pairs would take
/// hours. There each document is compared with those that were similar to none before them, the first of their kind, as
/// long as [`MOST_BY_SKETCH`] or [`MOST_BY_SET`] lasts. What is lost are chains that lead over others, and the kinds behind the
/// end of that; the journal says how many pairs were left out (`not_compared`).
///
/// So many pairs as [`HELD_PAIRS`] are held. A partition of more is worked on in parts, and where one first document has more,
/// its group is put into a file without a name, from which it is looked at in order, as the one in memory is: what comes out is
/// the same. Memory is then 4 bytes for every document of the group.
pub(super) struct Verified {
    config: NearConfig,
    against: Vec<PathBuf>,
    held_pairs: usize,
}

impl Verified {
    pub(super) fn new(config: NearConfig, against: Vec<PathBuf>) -> Self {
        Self { config, against, held_pairs: HELD_PAIRS }
    }
}

#[async_trait]
impl Stage for Verified {
    fn name(&self) -> &str {
        VERIFIED
    }

    fn version(&self) -> u32 {
        3
    }

    fn inputs(&self) -> Vec<String> {
        match self.config.verify {
            Verify::Exact => vec![SIGNATURES.into(), PAIRS.into(), SETS.into()],
            _ => vec![SIGNATURES.into(), PAIRS.into()],
        }
    }

    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "verify": self.config.verify, "threshold": self.config.threshold }))
    }

    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        // Twice the pairs with their bands, and two sketches for each.
        let pairs = sum_of_notes(run, PAIRS, "pairs").min(PARTITION_PAIRS);
        Ok(pairs * 2 * (size_of::<(Pair, u128)>() + 8 + SKETCH_BYTES) as u64)
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let pairs = sum_of_notes(run, PAIRS, "pairs");
        // If all of them are similar, and each is in one band alone.
        check_room(run, VERIFIED, pairs * Pair::BYTES as u64)?;
        Ok(partition_tasks(pairs, PARTITION_PAIRS, digest_of_stage(run, PAIRS)))
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let documents = Documents::of(&task.run, SIGNATURES, &self.against)?;
        let sets = (self.config.verify == Verify::Exact).then(|| Sets::new(&task.run, &documents));
        let mut judge = Judge::new(&self.config, sets);
        let mut writer = RunWriter::create(task)?;
        let mut similar = Buffered::new(SIMILAR);
        let mut candidates = 0;
        // Ranges of first documents, the next to be looked at last.
        let mut ranges = vec![keys_of::<Pair>(task)?];
        while let Some((first, last)) = ranges.pop() {
            let (pairs, all) = self.pairs(task, (first, last))?;
            let take = |a, b| similar.push(Pair::new(a, b), &mut writer);
            if all {
                candidates += pairs.len();
                self.verify(task, &documents, &pairs, &mut judge, take)?;
                continue;
            }
            // The first document with most pairs is looked at by itself.
            let groups = pairs.chunk_by(|a, b| a.0.key() == b.0.key());
            let key = groups.max_by_key(|group| group.len()).map_or(first, |group| group[0].0.key());
            drop(pairs);
            if (first, last) == (key, key) {
                let group = self.group_of(task, &documents, key)?;
                candidates += group.len() - 1;
                verify(&group, self.most(), &mut judge, take)?;
                continue;
            }
            ranges.extend((key < last).then(|| (key + 1, last)));
            ranges.push((key, key));
            ranges.extend((first < key).then(|| (first, key - 1)));
        }
        similar.flush(&mut writer)?;
        let rows = similar.written();
        let notes = serde_json::json!({
            "pairs": rows,
            "candidates": candidates,
            "compared": judge.compared,
            "not_compared": judge.not_compared,
        });
        writer.report(rows, notes)
    }
}

impl Verified {
    /// Comparisons of a group, about.
    fn most(&self) -> usize {
        if self.config.verify == Verify::Exact { MOST_BY_SET } else { MOST_BY_SKETCH }
    }

    /// The pairs of the first documents from the first to the last of `keys`, each with the bands it is in, in order; and whether
    /// these are all: reading ends where there are more than are held.
    fn pairs(&self, task: &TaskContext, keys: (u64, u64)) -> Result<(Vec<(Pair, u128)>, bool)> {
        let (mut pairs, mut all) = (Vec::new(), true);
        for source in &Documents::of(&task.run, PAIRS, &[])?.sources {
            stop_if_asked(task)?;
            RunFile::open(&source.path)?.each_section(0..self.config.bands, keys, |section, found: &[Pair]| {
                if all {
                    pairs.extend(found.iter().map(|pair| (*pair, 1u128 << section.tag)));
                    if pairs.len() > 2 * self.held_pairs {
                        merge(&mut pairs);
                        all = pairs.len() <= self.held_pairs;
                    }
                }
                Ok(())
            })?;
            if !all {
                break;
            }
        }
        merge(&mut pairs);
        Ok((pairs, all))
    }

    /// Verify `pairs`, group by group.
    fn verify(
        &self,
        task: &TaskContext,
        documents: &Documents,
        pairs: &[(Pair, u128)],
        judge: &mut impl Compare,
        mut similar: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let groups = || pairs.chunk_by(|a, b| a.0.first() == b.0.first());
        let mut numbers: Vec<u64> = pairs.iter().map(|(pair, _)| pair.second).collect();
        numbers.extend(groups().map(|group| group[0].0.first()));
        numbers.sort_unstable();
        numbers.dedup();
        let sketches = self.sketches(documents, &numbers)?;
        let member = |number, bands| {
            let place = numbers.binary_search(&number).unwrap_or(0) * self.sketch_bytes();
            Member { number, bands, sketch: &sketches[place..place + self.sketch_bytes()] }
        };
        let mut group = Vec::new();
        for pairs in groups() {
            stop_if_asked(task)?;
            group.clear();
            group.push(member(pairs[0].0.first(), u128::MAX));
            group.extend(pairs.iter().map(|(pair, bands)| member(pair.second, *bands)));
            verify(group.as_slice(), self.most(), judge, &mut similar)?;
        }
        Ok(())
    }

    /// Bytes that are looked up of a document: none where its set is compared.
    fn sketch_bytes(&self) -> usize {
        if self.config.verify == Verify::Exact { 0 } else { SKETCH_BYTES }
    }

    /// The sketches of documents, one after the other.
    fn sketches(&self, documents: &Documents, numbers: &[u64]) -> Result<Vec<u8>> {
        let bytes = self.sketch_bytes();
        let mut sketches = vec![0; numbers.len() * bytes];
        if bytes > 0 {
            let from = ROW_BYTES + self.config.keep.row_bytes();
            documents.look_up(numbers, |i, _, row| {
                sketches[i * bytes..][..bytes].copy_from_slice(&row[from..from + bytes]);
            })?;
        }
        Ok(sketches)
    }

    /// The group of the first document whose pairs have key `key`, in a file.
    fn group_of(&self, task: &TaskContext, documents: &Documents, key: u64) -> Result<FileGroup> {
        let spill = task.run.dir().join("spill");
        let mut group = GroupWriter::create(&spill, self.sketch_bytes())?;
        let mut pairs = PairsOfOne::open(task, self.config.bands, key)?;
        let mut chunk = vec![(Pair::of_key(key).first(), u128::MAX)];
        loop {
            let next = pairs.next()?;
            let last = next.is_none();
            chunk.extend(next);
            if last || chunk.len() >= CHUNK {
                stop_if_asked(task)?;
                let numbers: Vec<u64> = chunk.iter().map(|member| member.0).collect();
                group.push(&chunk, &self.sketches(documents, &numbers)?)?;
                chunk.clear();
            }
            if last {
                return group.finish();
            }
        }
    }
}

/// The pairs of one first document, in the order of the other, each with the bands it is in.
///
/// In a band these are one bucket, which one task of [`PAIRS`] has written in this order, section by section. A section of every
/// band is held, 8 MB at most.
struct PairsOfOne {
    key: u64,
    paths: Vec<PathBuf>,
    bands: Vec<PairsOfBand>,
}

/// Of one band: the sections that are still to be read, and what is held of the last one.
struct PairsOfBand {
    sections: std::vec::IntoIter<(usize, Section)>,
    seconds: Vec<u64>,
    at: usize,
}

impl PairsOfOne {
    fn open(task: &TaskContext, bands: u32, key: u64) -> Result<Self> {
        let files = Documents::of(&task.run, PAIRS, &[])?;
        let paths: Vec<PathBuf> = files.sources.iter().map(|source| source.path.clone()).collect();
        let mut sections = vec![Vec::new(); bands as usize];
        for (at, path) in paths.iter().enumerate() {
            let file = RunFile::open(path)?;
            for (band, sections) in (0..bands).zip(&mut sections) {
                sections.extend(file.sections(band).map(|section| (at, *section)));
            }
        }
        let band = |sections: Vec<_>| PairsOfBand { sections: sections.into_iter(), seconds: Vec::new(), at: 0 };
        Ok(Self { key, paths, bands: sections.into_iter().map(band).collect() })
    }

    fn next(&mut self) -> Result<Option<(u64, u128)>> {
        let mut next = None;
        for (band, pairs) in self.bands.iter_mut().enumerate() {
            let Some(second) = pairs.peek(self.key, &self.paths)? else { continue };
            match &mut next {
                Some((least, bands)) if *least == second => *bands |= 1 << band,
                Some((least, _)) if *least < second => {}
                _ => next = Some((second, 1u128 << band)),
            }
        }
        if let Some((_, bands)) = next {
            let has = |band: usize| bands >> band & 1 == 1;
            self.bands.iter_mut().enumerate().filter(|(band, _)| has(*band)).for_each(|(_, pairs)| pairs.at += 1);
        }
        Ok(next)
    }
}

impl PairsOfBand {
    /// The next other document.
    fn peek(&mut self, key: u64, paths: &[PathBuf]) -> Result<Option<u64>> {
        while self.at == self.seconds.len() {
            let Some((path, section)) = self.sections.next() else { return Ok(None) };
            let before = self.seconds.last().copied();
            let (mut seconds, mut bytes) = (Vec::new(), Vec::new());
            RunFile::open(&paths[path])?
                .range(&section, key, key, &mut bytes, |pair: Pair| seconds.push(pair.second))?;
            if seconds.is_empty() {
                continue;
            }
            if before.is_some_and(|before| before >= seconds[0]) {
                let reason = format!("pairs are not in the order of their documents: run the stage {PAIRS} again");
                return Err(Error::Corrupt { path: paths[path].clone(), reason });
            }
            (self.seconds, self.at) = (seconds, 0);
        }
        Ok(Some(self.seconds[self.at]))
    }
}

/// Sort, and make one of equal pairs.
fn merge(pairs: &mut Vec<(Pair, u128)>) {
    pairs.sort_unstable();
    pairs.dedup_by(|next, pair| {
        let same = next.0 == pair.0;
        if same {
            pair.1 |= next.1;
        }
        same
    });
}

/// A document of a group.
#[derive(Clone, Copy, Debug)]
struct Member<'g> {
    number: u64,
    /// The bands in which it shares the bucket of the first document.
    bands: u128,
    /// Its sketch; empty where sets are compared.
    sketch: &'g [u8],
}

/// The documents of the buckets of one first document, that one before the others.
trait Group {
    fn len(&self) -> usize;
    fn member(&self, i: usize) -> Member<'_>;
}

impl Group for [Member<'_>] {
    fn len(&self) -> usize {
        self.len()
    }
    fn member(&self, i: usize) -> Member<'_> {
        self[i]
    }
}

/// Bytes of a member in a file before its sketch: number and bands.
const MEMBER_BYTES: usize = 24;

/// Writes a group to a file without a name, which is gone with the process.
struct GroupWriter {
    file: BufWriter<File>,
    dir: PathBuf,
    sketch_bytes: usize,
}

impl GroupWriter {
    fn create(dir: &Path, sketch_bytes: usize) -> Result<Self> {
        let fail = |e| Error::io(dir, e);
        std::fs::create_dir_all(dir).map_err(fail)?;
        let file = BufWriter::with_capacity(1 << 20, tempfile::tempfile_in(dir).map_err(fail)?);
        Ok(Self { file, dir: dir.into(), sketch_bytes })
    }

    /// Append members whose sketches are `sketches`.
    fn push(&mut self, members: &[(u64, u128)], sketches: &[u8]) -> Result<()> {
        for (i, (number, bands)) in members.iter().enumerate() {
            let sketch = &sketches[i * self.sketch_bytes..][..self.sketch_bytes];
            let written = self.file.write_all(&number.to_le_bytes());
            let written = written.and_then(|()| self.file.write_all(&bands.to_le_bytes()));
            written.and_then(|()| self.file.write_all(sketch)).map_err(|e| Error::io(&self.dir, e))?;
        }
        Ok(())
    }

    fn finish(self) -> Result<FileGroup> {
        let file = self.file.into_inner().map_err(|e| Error::io(&self.dir, e.into_error()))?;
        // SAFETY: the file has no name, so that no other process can change or cut it.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&self.dir, e))?;
        Ok(FileGroup { map, width: MEMBER_BYTES + self.sketch_bytes })
    }
}

/// A group in a file, which the system pages.
struct FileGroup {
    map: Mmap,
    width: usize,
}

impl Group for FileGroup {
    fn len(&self) -> usize {
        self.map.len() / self.width
    }
    fn member(&self, i: usize) -> Member<'_> {
        let row = &self.map[i * self.width..(i + 1) * self.width];
        let bands = u128::from(u64_at(row, 8)) | u128::from(u64_at(row, 16)) << 64;
        Member { number: u64_at(row, 0), bands, sketch: &row[MEMBER_BYTES..] }
    }
}

/// Looks at two documents of a group.
trait Compare {
    /// Whether two documents that share band `band` are similar.
    fn similar(&mut self, a: &Member<'_>, b: &Member<'_>, band: u32) -> Result<bool>;
    /// So many pairs are left out.
    fn leave(&mut self, pairs: u64);
}

/// Find a forest of similar pairs of a group: of all pairs if they are at most `most`, else with about so many
/// comparisons. Two documents may be compared where they share a band.
fn verify(
    group: &(impl Group + ?Sized),
    most: usize,
    judge: &mut impl Compare,
    mut similar: impl FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    fn find(parents: &mut [u32], mut at: u32) -> u32 {
        while parents[at as usize] != at {
            parents[at as usize] = parents[parents[at as usize] as usize];
            at = parents[at as usize];
        }
        at
    }
    let n = group.len();
    let all = n * n.saturating_sub(1) / 2;
    let mut parents: Vec<u32> = (0..n as u32).collect();
    let (mut sets, mut pivots, mut compared, mut seen) = (n, 0, 0, 0);
    for i in 0..n {
        if sets == 1 || all > most && pivots >= LEAST_PIVOTS && compared > most {
            break;
        }
        // Of many, only those that nothing before them is similar to are set against the rest.
        if all > most && find(&mut parents, i as u32) != i as u32 {
            continue;
        }
        pivots += 1;
        seen += n - i - 1;
        let pivot = group.member(i);
        for j in i + 1..n {
            let (a, b) = (find(&mut parents, i as u32), find(&mut parents, j as u32));
            if a == b {
                continue;
            }
            let other = group.member(j);
            let shared = pivot.bands & other.bands;
            if shared == 0 {
                continue;
            }
            compared += 1;
            if judge.similar(&pivot, &other, shared.trailing_zeros())? {
                parents[b.max(a) as usize] = a.min(b);
                sets -= 1;
                similar(pivot.number.min(other.number), pivot.number.max(other.number))?;
            }
        }
    }
    if sets > 1 {
        judge.leave((all - seen) as u64);
    }
    Ok(())
}

/// Says whether two documents are similar, by their sets or by their sketches.
struct Judge<'d> {
    threshold: f64,
    sets: Option<Sets<'d>>,
    /// For every band the positions of a sketch that say nothing, and what two sketches must come to.
    bounds: Vec<(usize, f64)>,
    /// The document whose set is in `set`.
    looked: u64,
    set: Vec<u64>,
    other: Vec<u64>,
    compared: u64,
    not_compared: u64,
}

impl<'d> Judge<'d> {
    fn new(config: &NearConfig, sets: Option<Sets<'d>>) -> Self {
        Self {
            threshold: config.threshold,
            sets,
            bounds: (0..config.bands as usize).map(|band| config.bound(band)).collect(),
            looked: u64::MAX,
            set: Vec::new(),
            other: Vec::new(),
            compared: 0,
            not_compared: 0,
        }
    }
}

impl Compare for Judge<'_> {
    fn similar(&mut self, a: &Member<'_>, b: &Member<'_>, band: u32) -> Result<bool> {
        self.compared += 1;
        match &mut self.sets {
            None => {
                let (agreed, bound) = self.bounds[band as usize];
                Ok(sketch_similarity(a.sketch, b.sketch, agreed) >= bound)
            }
            Some(sets) => {
                if self.looked != a.number {
                    sets.read(a.number, &mut self.set)?;
                    self.looked = a.number;
                }
                sets.read(b.number, &mut self.other)?;
                Ok(jaccard(&self.set, &self.other) >= self.threshold)
            }
        }
    }

    fn leave(&mut self, pairs: u64) {
        self.not_compared += pairs;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{pairs, sets, signatures};
    use super::*;
    use crate::Mode;
    use crate::support::{Document, plain, run, text};
    use crate::texts::Texts;

    /// The file of `near_verified` and its notes, where `held_pairs` pairs are held.
    async fn verified(corpus: &[Vec<Document>], verify: Verify, held_pairs: usize) -> (Vec<u8>, serde_json::Value) {
        let config = NearConfig { mode: Mode::Fast, ngram: 2, bands: 40, rows: 2, verify, ..NearConfig::default() };
        let texts = Texts::new("documents", None);
        let mut stages: Vec<Arc<dyn Stage>> = vec![
            Arc::new(signatures::Signatures::new(config.clone(), texts.clone(), None)),
            Arc::new(pairs::Pairs::new(config.clone(), Vec::new())),
        ];
        if verify == Verify::Exact {
            stages.push(Arc::new(sets::SetStage { config: config.clone(), texts }));
        }
        stages.push(Arc::new(Verified { config, against: Vec::new(), held_pairs }));
        let dir = tempfile::tempdir().unwrap();
        let run = run(dir.path(), corpus, stages, 2).await;
        let entry = run.journal(VERIFIED)[&0].clone();
        (std::fs::read(run.stage_dir(VERIFIED).join(&entry.files[0].path)).unwrap(), entry.notes)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_held_at_a_time_changes_nothing() {
        // Pages of two templates and of their own words: the first page of a template is in a pair with hundreds of others, of
        // which some are similar to it, some to each other, and some to none.
        let (templates, tape) = ([text(1, 60), text(2, 60)], text(3, 2000));
        let page = |i: usize| {
            let own = &tape[i % 40 * 9..][..10 + i % 7 * 12];
            let template: &[String] = if i % 5 == 4 { &[] } else { &templates[i % 3 / 2] };
            plain([template, own].concat().join(" "))
        };
        let corpus: Vec<Vec<_>> = (0..4).map(|shard| (0..150).map(|i| page(shard * 150 + i)).collect()).collect();
        for verify in [Verify::Sketch, Verify::Exact] {
            let (expected, notes) = verified(&corpus, verify, HELD_PAIRS).await;
            let note = |name: &str| notes[name].as_u64().unwrap();
            assert!(note("pairs") > 300 && note("candidates") > 500 && note("compared") > 10_000, "{notes}");
            for held_pairs in [1, 10, 100, 400] {
                let (found, of_parts) = verified(&corpus, verify, held_pairs).await;
                assert!(found == expected, "{verify:?}, {held_pairs} pairs held");
                assert_eq!(of_parts, notes);
            }
        }
    }

    /// Documents are similar where their numbers are the same modulo so much; counts what is asked.
    struct Modulo {
        modulus: u64,
        asked: usize,
        left: u64,
    }

    impl Compare for Modulo {
        fn similar(&mut self, a: &Member<'_>, b: &Member<'_>, _: u32) -> Result<bool> {
            self.asked += 1;
            Ok(a.number % self.modulus == b.number % self.modulus)
        }
        fn leave(&mut self, pairs: u64) {
            self.left += pairs;
        }
    }

    /// Edges that a group of `n` documents of one bucket comes to, comparisons, and pairs that were left out.
    fn outcome(n: u64, modulus: u64, most: usize) -> (Vec<(u64, u64)>, usize, u64) {
        let group: Vec<Member<'_>> = (0..n).map(|number| Member { number, bands: 1, sketch: &[] }).collect();
        let (mut judge, mut edges) = (Modulo { modulus, asked: 0, left: 0 }, Vec::new());
        verify(group.as_slice(), most, &mut judge, |a, b| {
            edges.push((a, b));
            Ok(())
        })
        .unwrap();
        (edges, judge.asked, judge.left)
    }

    #[test]
    fn a_group_of_any_size_is_compared_within_bounds() {
        let pairs = |n: u64| n * (n - 1) / 2;
        // All similar: one comparison each.
        assert_eq!(outcome(100_000, 1, 1 << 22).1, 99_999);
        // A small group: every pair.
        assert_eq!(outcome(2000, u64::MAX, 1 << 22), (Vec::new(), pairs(2000) as usize, 0));
        // A large one of few kinds: all of a kind meet, though not every pair was looked at.
        let (edges, asked, left) = outcome(20_000, 100, 1 << 22);
        assert!(edges.iter().all(|(a, b)| a % 100 == b % 100) && edges.len() == 20_000 - 100);
        assert!(asked < 1 << 21 && left > pairs(20_000) * 9 / 10, "{asked} {left}");
        // A large one without any: the comparisons that there is room for.
        let (edges, asked, left) = outcome(100_000, u64::MAX, 1 << 22);
        assert!(edges.is_empty() && (1 << 22..(1 << 22) + 100_000).contains(&asked), "{asked}");
        assert_eq!(asked as u64 + left, pairs(100_000));
        // And with some documents at least, whatever the room.
        assert!(outcome(1_000_000, u64::MAX, 1 << 22).1 > 31_000_000);
    }
}
