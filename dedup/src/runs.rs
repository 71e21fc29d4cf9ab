//! Sorted runs on disk: what deduplication keeps of a corpus, radix-partitioned.
//!
//! A run file is a list of sections. A section of *records* is sorted, each record of fixed width, with a
//! directory of where every value of the top bits of the key begins (of keys that are numbers, not hashes, of the
//! bits that the largest has); so any range of keys, a radix
//! partition of any size, is one read of consecutive bytes, whatever number of partitions the reader
//! chooses later. A section that is a *table* is rows of fixed width found by number. Numbers are
//! little-endian.
//!
//! ```text
//! sections: records, directory of 2^bits + 1 offsets of 4 bytes | rows | anything
//! footer:   a section: tag 4, width 4, base 8, records 8, offset 8, bits 4, shift 4 bytes
//! end:      number of sections 4, magic 8 bytes
//! ```
//!
//! Writer and reader hold one section and a buffer; nothing grows with the corpus.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pipeline::shard::PendingWriter;
use pipeline::{Error, PendingFile, Result, TaskContext, TaskReport};

const MAGIC: &[u8; 8] = b"FULGRUN1";
const SECTION_BYTES: usize = 40;
const END_BYTES: usize = 12;
/// Records under one entry of a directory, about: an eighth of a byte a record.
const BUCKET_RECORDS: u64 = 32;
/// Bytes that are read at a time.
const READ_BYTES: usize = 1 << 20;
/// Bytes at the end of a file that are read at first: the footer of a hundred sections.
const TAIL_BYTES: usize = 4096;
/// Bytes from one row of a table to the next that are read rather than asked for anew: a page, whose copy takes less than a call.
const NEAR_BYTES: u64 = 4096;
/// Bytes of rows that are read at a time.
const ROWS_BYTES: u64 = 1 << 16;
/// Entries of a directory that are read at a time to find a range.
const ENTRIES: usize = 256;

/// A record of fixed width with a key that it is sorted by first.
pub(crate) trait Record: Copy + Ord {
    /// Bytes on disk.
    const BYTES: usize;
    /// Significant bits of the key.
    const KEY_BITS: u32;
    /// Whether keys are numbers counted from 0 rather than hashes, so that the top bits of all are zero.
    const COUNTED: bool = false;
    /// What ranges are cut by.
    fn key(&self) -> u64;
    fn put(&self, bytes: &mut [u8]);
    fn get(bytes: &[u8]) -> Self;
}

/// One section of a run file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Section {
    /// What is in it, in the terms of the stage that wrote it.
    pub(crate) tag: u32,
    width: u32,
    /// Added to the row numbers in it.
    pub(crate) base: u64,
    /// Records or rows in it.
    pub(crate) records: u64,
    offset: u64,
    bits: u32,
    shift: u32,
}

/// Writes a run file.
pub(crate) struct RunWriter {
    file: PendingWriter,
    path: PathBuf,
    sections: Vec<Section>,
    at: u64,
    bytes: Vec<u8>,
}

impl RunWriter {
    /// The run file of the task, `part-N.runs`.
    pub(crate) fn create(task: &TaskContext) -> Result<Self> {
        let name = run_name(task.index());
        let path = task.stage_dir().join(&name);
        Ok(Self { file: task.create_file(name)?, path, sections: Vec::new(), at: 0, bytes: Vec::new() })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io(&self.path, e))?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Sort `records` and write them as a section. None, no section.
    pub(crate) fn records<R: Record>(&mut self, tag: u32, base: u64, records: &mut [R]) -> Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        records.sort_unstable();
        let n = records.len() as u64;
        let (bits, shift) = directory(records);
        let section = Section { tag, width: R::BYTES as u32, base, records: n, offset: self.at, bits, shift };
        self.sections.push(section);
        for some in records.chunks(READ_BYTES / R::BYTES) {
            let mut bytes = std::mem::take(&mut self.bytes);
            bytes.resize(some.len() * R::BYTES, 0);
            some.iter().zip(bytes.chunks_exact_mut(R::BYTES)).for_each(|(record, bytes)| record.put(bytes));
            self.write(&bytes)?;
            self.bytes = bytes;
        }
        let mut directory = Vec::with_capacity(4 * ((1 << bits) + 1));
        let mut at = 0;
        for bucket in 0..=1u64 << bits {
            while at < records.len() && section.bucket(records[at].key()) < bucket {
                at += 1;
            }
            directory.extend_from_slice(&(at as u32).to_le_bytes());
        }
        self.write(&directory)
    }

    /// Write rows of `width` bytes as a section.
    pub(crate) fn table(&mut self, tag: u32, base: u64, width: usize, rows: &[u8]) -> Result<()> {
        let records = (rows.len() / width.max(1)) as u64;
        if records == 0 {
            return Ok(());
        }
        self.sections.push(Section { tag, width: width as u32, base, records, offset: self.at, bits: 0, shift: 0 });
        self.write(rows)
    }

    /// Write bytes that a record of a section will point at; where they begin.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> Result<u64> {
        let at = self.at;
        self.write(bytes)?;
        Ok(at)
    }

    /// Write the footer and hand over to the commit. `rows` is what the journal says of the file.
    pub(crate) fn finish(mut self, rows: u64) -> Result<PendingFile> {
        let mut end = Vec::new();
        for s in &self.sections {
            end.extend_from_slice(&s.tag.to_le_bytes());
            end.extend_from_slice(&s.width.to_le_bytes());
            end.extend_from_slice(&s.base.to_le_bytes());
            end.extend_from_slice(&s.records.to_le_bytes());
            end.extend_from_slice(&s.offset.to_le_bytes());
            end.extend_from_slice(&s.bits.to_le_bytes());
            end.extend_from_slice(&s.shift.to_le_bytes());
        }
        end.extend_from_slice(&(self.sections.len() as u32).to_le_bytes());
        end.extend_from_slice(MAGIC);
        self.write(&end)?;
        self.file.finish(rows)
    }

    /// As [`Self::finish`], for a task whose one file this is: `rows` records, of which nothing was dropped.
    pub(crate) fn report(self, rows: u64, notes: serde_json::Value) -> Result<TaskReport> {
        let files = vec![self.finish(rows)?];
        Ok(TaskReport { files, rows_read: rows, rows_kept: rows, notes, ..TaskReport::default() })
    }
}

/// Of the directory of sorted records: bits of its entries' numbers, and how far a key is shifted to be one.
fn directory<R: Record>(records: &[R]) -> (u32, u32) {
    let largest = records.last().map_or(0, R::key);
    let significant = if R::COUNTED { u64::BITS - largest.leading_zeros() } else { R::KEY_BITS };
    let bits = (records.len() as u64 / BUCKET_RECORDS).checked_ilog2().unwrap_or(0).min(significant).min(20);
    (bits, significant - bits)
}

/// File name of the run file of task `index`.
pub(crate) fn run_name(index: u32) -> String {
    format!("part-{index:05}.runs")
}

impl Section {
    fn bucket(&self, key: u64) -> u64 {
        // A shift by all 64 bits is an overflow; one bucket holds everything.
        if self.bits == 0 { 0 } else { key >> self.shift }
    }

    /// The entries of the directory that tell where records with keys from `first` to `last` begin, and where they end. Keys may be
    /// beyond the largest of the section.
    fn entries(&self, first: u64, last: u64) -> (u64, u64) {
        let end = 1 << self.bits;
        (self.bucket(first).min(end), self.bucket(last).min(end - 1) + 1)
    }
}

/// Reads a run file.
pub(crate) struct RunFile {
    path: PathBuf,
    file: File,
    sections: Vec<Section>,
}

impl RunFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let fail = |e| Error::io(path, e);
        let corrupt = |reason: &str| Error::Corrupt { path: path.into(), reason: reason.into() };
        let file = File::open(path).map_err(fail)?;
        let length = file.metadata().map_err(fail)?.len();
        // End and footer are one read, but for files of very many sections.
        let mut tail = vec![0; TAIL_BYTES.min(length as usize)];
        let from = length - tail.len() as u64;
        file.read_exact_at(&mut tail, from).map_err(fail)?;
        let at = tail.len().checked_sub(END_BYTES).ok_or_else(|| corrupt("too short for a run file"))?;
        if tail[at + 4..] != MAGIC[..] {
            return Err(corrupt("not a run file of this version: run the stage that wrote it again"));
        }
        let bytes = u32_at(&tail, at) as usize * SECTION_BYTES;
        let footer = match at.checked_sub(bytes) {
            Some(from) => tail[from..at].to_vec(),
            None => {
                let at =
                    length.checked_sub((END_BYTES + bytes) as u64).ok_or_else(|| corrupt("its footer is cut off"))?;
                let mut footer = vec![0; bytes];
                file.read_exact_at(&mut footer, at).map_err(fail)?;
                footer
            }
        };
        let sections = footer
            .chunks_exact(SECTION_BYTES)
            .map(|s| Section {
                tag: u32_at(s, 0),
                width: u32_at(s, 4),
                base: u64_at(s, 8),
                records: u64_at(s, 16),
                offset: u64_at(s, 24),
                bits: u32_at(s, 32),
                shift: u32_at(s, 36),
            })
            .collect();
        Ok(Self { path: path.into(), file, sections })
    }

    /// The sections of a tag, in the order they were written.
    pub(crate) fn sections(&self, tag: u32) -> impl Iterator<Item = &Section> {
        self.sections.iter().filter(move |s| s.tag == tag)
    }

    /// Give the records of every section whose tag is one of `tags` and whose keys are those from the first to the last of
    /// `keys` to `take`, section by section as they were written, each in order. Sections without one are left out.
    pub(crate) fn each_section<R: Record>(
        &self,
        tags: Range<u32>,
        keys: (u64, u64),
        mut take: impl FnMut(&Section, &[R]) -> Result<()>,
    ) -> Result<()> {
        let (mut records, mut bytes) = (Vec::new(), Vec::new());
        for section in self.sections.iter().filter(|s| tags.contains(&s.tag)) {
            records.clear();
            self.range(section, keys.0, keys.1, &mut bytes, |record: R| records.push(record))?;
            if !records.is_empty() {
                take(section, &records)?;
            }
        }
        Ok(())
    }

    /// Give every record of the sections whose tag is one of `tags` to `take`, as they were written. A buffer is held, no section.
    pub(crate) fn each<R: Record>(&self, tags: Range<u32>, mut take: impl FnMut(R)) -> Result<()> {
        let mut bytes = Vec::new();
        let mut sections = self.sections.iter().filter(|s| tags.contains(&s.tag));
        sections.try_for_each(|section| self.range(section, 0, u64::MAX, &mut bytes, &mut take))
    }

    /// Fill `bytes` from `offset`.
    pub(crate) fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(bytes, offset).map_err(|e| Error::io(&self.path, e))
    }

    /// Give the records of a section with keys from `first` to `last` to `take`, in order.
    pub(crate) fn range<R: Record>(
        &self,
        section: &Section,
        first: u64,
        last: u64,
        bytes: &mut Vec<u8>,
        mut take: impl FnMut(R),
    ) -> Result<()> {
        debug_assert_eq!(section.width as usize, R::BYTES);
        let last = last.min(u64::MAX >> (64 - R::KEY_BITS));
        let directory = section.offset + section.records * R::BYTES as u64;
        // The entries from one bucket to another, of which the first and the last are looked at.
        let entries = |from: u64, to: u64| -> Result<(u64, u64)> {
            let mut entries = [0; 4 * ENTRIES];
            let some = &mut entries[..4 * (to - from + 1) as usize];
            self.read_at(some, directory + 4 * from)?;
            Ok((u64::from(u32_at(some, 0)), u64::from(u32_at(some, some.len() - 4))))
        };
        let (from, to) = match section.entries(first, last) {
            _ if section.bits == 0 => (0, section.records),
            (from, to) if to - from < ENTRIES as u64 => entries(from, to)?,
            (from, to) => (entries(from, from)?.0, entries(to, to)?.0),
        };
        let step = (READ_BYTES / R::BYTES) as u64;
        let mut at = from;
        while at < to {
            let n = step.min(to - at);
            bytes.resize(n as usize * R::BYTES, 0);
            self.read_at(bytes, section.offset + at * R::BYTES as u64)?;
            let records = bytes.chunks_exact(R::BYTES).map(R::get);
            records.filter(|r| (first..=last).contains(&r.key())).for_each(&mut take);
            at += n;
        }
        Ok(())
    }

    /// Give `rows` (ascending, repeats allowed) of a table whose sections follow one another to `take`, each with its place among
    /// them; `false` if there is one that the table has not. Rows that lie near each other are one read.
    pub(crate) fn rows(&self, tag: u32, rows: &[u64], mut take: impl FnMut(usize, &[u8])) -> Result<bool> {
        let (mut bytes, mut at) = (Vec::new(), 0);
        while let Some(&first) = rows.get(at) {
            let Some(section) = self.sections(tag).find(|s| (s.base..s.base + s.records).contains(&first)) else {
                return Ok(false);
            };
            let (width, end) = (u64::from(section.width), section.base + section.records);
            let joins = |(row, next): (u64, u64)| {
                next < end && (next - row) * width <= NEAR_BYTES && (next + 1 - first) * width <= ROWS_BYTES
            };
            let joined = rows[at..].windows(2).take_while(|pair| joins((pair[0], pair[1]))).count();
            let some = &rows[at..=at + joined];
            bytes.resize(((some[joined] + 1 - first) * width) as usize, 0);
            self.read_at(&mut bytes, section.offset + (first - section.base) * width)?;
            for (place, row) in (at..).zip(some) {
                let from = ((row - first) * width) as usize;
                take(place, &bytes[from..from + width as usize]);
            }
            at += some.len();
        }
        Ok(true)
    }
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// A number of a document in five bytes: 2⁴⁰ documents.
pub(crate) const NUMBER_BYTES: usize = 5;

pub(crate) fn put_number(number: u64, bytes: &mut [u8]) {
    bytes[..NUMBER_BYTES].copy_from_slice(&number.to_le_bytes()[..NUMBER_BYTES]);
}

pub(crate) fn number_at(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight[..NUMBER_BYTES].copy_from_slice(&bytes[at..at + NUMBER_BYTES]);
    u64::from_le_bytes(eight)
}

/// Two documents that belong together, partitioned by the first. The smallest document of a bucket is
/// the first of all its pairs, and early documents are in many: so partitions are of a bijection of
/// the number (Fibonacci hashing of 40 bits), which spreads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Pair {
    spread: u64,
    pub(crate) second: u64,
}

const NUMBER_MASK: u64 = (1 << (8 * NUMBER_BYTES)) - 1;
const SPREAD: u64 = 0x9e_3779_b97f;
/// Inverse of [`SPREAD`] modulo 2⁴⁰.
const GATHER: u64 = {
    // Newton: each step doubles the bits that are right.
    let mut inverse = SPREAD;
    let mut step = 0;
    while step < 5 {
        inverse = inverse.wrapping_mul(2u64.wrapping_sub(SPREAD.wrapping_mul(inverse)));
        step += 1;
    }
    inverse & NUMBER_MASK
};

impl Pair {
    pub(crate) fn new(first: u64, second: u64) -> Self {
        Self { spread: first.wrapping_mul(SPREAD) & NUMBER_MASK, second }
    }

    /// The first pair whose key is `key`.
    pub(crate) fn of_key(key: u64) -> Self {
        Self { spread: key, second: 0 }
    }

    pub(crate) fn first(&self) -> u64 {
        self.spread.wrapping_mul(GATHER) & NUMBER_MASK
    }
}

impl Record for Pair {
    const BYTES: usize = 2 * NUMBER_BYTES;
    const KEY_BITS: u32 = 8 * NUMBER_BYTES as u32;
    fn key(&self) -> u64 {
        self.spread
    }
    fn put(&self, bytes: &mut [u8]) {
        put_number(self.spread, bytes);
        put_number(self.second, &mut bytes[NUMBER_BYTES..]);
    }
    fn get(bytes: &[u8]) -> Self {
        Self { spread: number_at(bytes, 0), second: number_at(bytes, NUMBER_BYTES) }
    }
}

/// First and last key of radix partition `index` of `count`, a power of two, of keys of `bits` bits.
pub(crate) fn key_range(index: u32, count: u32, bits: u32) -> (u64, u64) {
    let cut = count.trailing_zeros().min(bits);
    let all = u64::MAX >> (64 - bits);
    if cut == 0 {
        return (0, all);
    }
    let first = u64::from(index) << (bits - cut);
    (first, first | (all >> cut))
}

/// Collects records and writes a section whenever so many are there.
pub(crate) struct Buffered<R> {
    tag: u32,
    records: Vec<R>,
    written: u64,
}

/// Records in a buffer: 16 MB of pairs.
pub(crate) const BUFFER_RECORDS: usize = 1 << 20;

impl<R: Record> Buffered<R> {
    pub(crate) fn new(tag: u32) -> Self {
        Self { tag, records: Vec::new(), written: 0 }
    }

    pub(crate) fn push(&mut self, record: R, writer: &mut RunWriter) -> Result<()> {
        self.records.push(record);
        if self.records.len() >= BUFFER_RECORDS { self.flush(writer) } else { Ok(()) }
    }

    /// Write what is left. Records that were there twice at a time are written once.
    pub(crate) fn flush(&mut self, writer: &mut RunWriter) -> Result<()> {
        self.records.sort_unstable();
        self.records.dedup();
        self.written += self.records.len() as u64;
        writer.records(self.tag, 0, &mut self.records)?;
        self.records.clear();
        Ok(())
    }

    /// Records written so far.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_tile_the_keys() {
        for bits in [40, 64] {
            for count in [1u32, 2, 8, 1 << 20] {
                let mut next = 0u64;
                for index in 0..count {
                    let (first, last) = key_range(index, count, bits);
                    assert_eq!(first, next, "{index} of {count}");
                    assert!(last > first);
                    next = last.wrapping_add(1);
                }
                assert_eq!(next, if bits == 64 { 0 } else { 1 << bits });
            }
        }
    }

    /// The section of a run of records, and where in it those with keys from `first` to `last` are, as a directory tells.
    fn found<R: Record>(records: &mut [R], first: u64, last: u64) -> Range<usize> {
        records.sort_unstable();
        let (bits, shift) = directory(records);
        let n = records.len() as u64;
        let section = Section { tag: 0, width: R::BYTES as u32, base: 0, records: n, offset: 0, bits, shift };
        let place = |entry: u64| records.partition_point(|record| section.bucket(record.key()) < entry);
        let (from, to) = section.entries(first, last);
        place(from)..place(to)
    }

    #[test]
    fn what_a_shard_reads_is_its_own_and_little_more() {
        use crate::buckets::Number;
        // 100,000 documents of 100,000,000, in order: a range of them, some of them, and some behind the last.
        let mut numbers: Vec<Number> = (0..100_000).map(|i| Number(i * 1000)).collect();
        for (first, last, there) in
            [(5_000_000, 5_099_999, 100), (7000, 7000, 1), (99_999_500, u64::MAX, 0), (1 << 39, 1 << 39, 0)]
        {
            let range = found(&mut numbers, first, last);
            let wanted: Vec<u64> = numbers.iter().map(|n| n.0).filter(|n| (first..=last).contains(n)).collect();
            assert_eq!(wanted.len(), there);
            let read: Vec<u64> = numbers[range].iter().map(|n| n.0).collect();
            assert!(wanted.iter().all(|n| read.contains(n)), "{first}");
            assert!(read.len() <= there + 2 * 2 * BUCKET_RECORDS as usize, "{first}: {} for {there}", read.len());
        }
        // Hashes are as they were: the top bits of the key, whatever the largest.
        let pairs: Vec<Pair> = (0..64).map(|second| Pair::new(0, second)).collect();
        assert_eq!(directory(&pairs), (1, 39));
    }

    #[test]
    fn rows_of_a_table_are_found_alone_together_and_more_than_once() {
        const WIDTH: u64 = 24;
        let row = |number: u64| [number, !number, number * 7].map(u64::to_le_bytes).concat();
        let table = |rows: Range<u64>| rows.flat_map(row).collect::<Vec<u8>>();
        let (dir, cut, all) = (tempfile::tempdir().unwrap(), 5000, 20_000);
        let path = dir.path().join("table");
        // Two sections, the later one first in the file.
        std::fs::write(&path, [b"before".to_vec(), table(cut..all), table(0..cut)].concat()).unwrap();
        let section = |base: u64, end: u64, offset| Section {
            tag: 3,
            width: WIDTH as u32,
            base,
            records: end - base,
            offset,
            bits: 0,
            shift: 0,
        };
        let sections = vec![section(0, cut, 6 + (all - cut) * WIDTH), section(cut, all, 6)];
        let file = RunFile { file: File::open(&path).unwrap(), path, sections };
        let wanted = [0, 0, 1, 170, 341, 342, 4999, 5000, 5001, 9000, 9000, 19_999];
        let everything: Vec<u64> = (0..all).collect();
        for wanted in [&wanted[..], &everything, &[]] {
            let mut places = 0..wanted.len();
            let found = file.rows(3, wanted, |place, bytes| {
                assert_eq!((Some(place), bytes), (places.next(), &row(wanted[place])[..]));
            });
            assert!(found.unwrap() && places.is_empty());
        }
        for missing in [all, u64::MAX] {
            assert!(!file.rows(3, &[7, missing], |_, _| {}).unwrap());
        }
        assert!(!file.rows(4, &[7], |_, _| {}).unwrap(), "another table");
    }

    #[test]
    fn pairs_keep_their_first_through_the_spread() {
        for first in [0, 1, 2, 77, 1 << 33, NUMBER_MASK] {
            let pair = Pair::new(first, 5);
            let mut bytes = [0; Pair::BYTES];
            pair.put(&mut bytes);
            assert_eq!((Pair::get(&bytes).first(), Pair::get(&bytes).second), (first, 5));
        }
    }
}
