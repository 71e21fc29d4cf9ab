//! Stages `substring_windows` and `substring_repeats`: windows that stand earlier, too.

use async_trait::async_trait;
use pipeline::document::ordinal;
use pipeline::{Result, RunContext, Stage, Task, TaskContext, TaskReport};

use super::anchors::{candidates, half_words};
use super::windows::Finder;
use super::{CANDIDATES, Input, REPEATS, Sizes, WINDOWS};
use crate::disk::check_room;
use crate::documents::{digest_of_stage, each_section_of, sum_of_notes};
use crate::partition::{keys_of, partition_rows, partition_tasks, rows_of};
use crate::runs::{Record, RunWriter, u32_at, u64_at};

/// A window in a text of the shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Occurrence {
    high: u64,
    low: u64,
    record: u32,
    start: u32,
    end: u32,
}

impl Record for Occurrence {
    const BYTES: usize = 28;
    const KEY_BITS: u32 = 64;
    fn key(&self) -> u64 {
        self.high
    }
    fn put(&self, bytes: &mut [u8]) {
        bytes[..8].copy_from_slice(&self.high.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.low.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.record.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.start.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.end.to_le_bytes());
    }
    fn get(bytes: &[u8]) -> Self {
        Self {
            high: u64_at(bytes, 0),
            low: u64_at(bytes, 8),
            record: u32_at(bytes, 16),
            start: u32_at(bytes, 20),
            end: u32_at(bytes, 24),
        }
    }
}

/// Bytes of a text that stand earlier: those from `start` to `end`, of which the first window is that of `first_start` in
/// document `first`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Repeat {
    pub(super) ordinal: u64,
    pub(super) start: u32,
    pub(super) end: u32,
    pub(super) first: u64,
    pub(super) first_start: u32,
}

impl Record for Repeat {
    const BYTES: usize = 28;
    const KEY_BITS: u32 = 64;
    const COUNTED: bool = true;
    fn key(&self) -> u64 {
        self.ordinal
    }
    fn put(&self, bytes: &mut [u8]) {
        bytes[..8].copy_from_slice(&self.ordinal.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.start.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.end.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.first.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.first_start.to_le_bytes());
    }
    fn get(bytes: &[u8]) -> Self {
        Self {
            ordinal: u64_at(bytes, 0),
            start: u32_at(bytes, 8),
            end: u32_at(bytes, 12),
            first: u64_at(bytes, 16),
            first_start: u32_at(bytes, 24),
        }
    }
}

/// The one tag of the runs of these stages.
const TAG: u32 = 0;

/// The windows of a document shard around anchors that the corpus has more than once.
pub(super) struct Windows {
    pub(super) input: Input,
    pub(super) sizes: Sizes,
}

#[async_trait]
impl Stage for Windows {
    fn name(&self) -> &str {
        WINDOWS
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        self.input.texts.stages().into_iter().chain([CANDIDATES.into()]).collect()
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!(self.input.config))
    }
    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        // An anchor is that of about half as many windows as a window has halves.
        let windows = sum_of_notes(run, CANDIDATES, "places") as f64 * (half_words(&self.input.config) / 2.0 + 1.0);
        check_room(run, WINDOWS, (windows * (Occurrence::BYTES + 1) as f64) as u64)?;
        self.input.texts.tasks_with(run, digest_of_stage(run, CANDIDATES))
    }
    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        // A section of windows. The candidates of a shard are fewer: one word in fourteen begins an anchor.
        let windows = sum_of_notes(run, CANDIDATES, "candidates") as f64 * (half_words(&self.input.config) / 2.0 + 1.0);
        Ok((windows as u64).min(self.sizes.section as u64) * size_of::<Occurrence>() as u64)
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let candidates = candidates(task)?;
        let mut writer = RunWriter::create(task)?;
        let (mut finder, mut windows, mut written) = (Finder::default(), Vec::new(), 0);
        let config = &self.input.config;
        let documents = self
            .input
            .texts
            .each(task, task.index(), |ordinal, text| {
                if candidates.is_empty() {
                    return Ok(());
                }
                finder.set(text, config);
                for around in finder.windows().chunk_by(|a, b| a.anchor == b.anchor) {
                    if candidates.binary_search(&finder.anchor(&around[0])).is_err() {
                        continue;
                    }
                    windows.extend(around.iter().map(|window| {
                        let hash = finder.hash(window, text, config.measure);
                        let place = finder.place(window);
                        Occurrence {
                            high: (hash >> 64) as u64,
                            low: hash as u64,
                            record: ordinal as u32,
                            start: place.start as u32,
                            end: place.end as u32,
                        }
                    }));
                    if windows.len() >= self.sizes.section {
                        written += windows.len();
                        writer.records(TAG, 0, &mut windows)?;
                        windows.clear();
                    }
                }
                Ok(())
            })
            .await?;
        written += windows.len();
        writer.records(TAG, 0, &mut windows)?;
        writer.report(documents, serde_json::json!({ "windows": written }))
    }
}

/// The repeats among the windows of a partition.
pub(super) struct Repeats {
    pub(super) sizes: Sizes,
}

#[async_trait]
impl Stage for Repeats {
    fn name(&self) -> &str {
        REPEATS
    }
    fn version(&self) -> u32 {
        2
    }
    fn inputs(&self) -> Vec<String> {
        vec![WINDOWS.into()]
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({}))
    }
    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let windows = sum_of_notes(run, WINDOWS, "windows");
        check_room(run, REPEATS, windows * (Repeat::BYTES as u64 + 1))?;
        let partition = partition_rows(windows, self.sizes.partition);
        Ok(partition_tasks(windows, partition, digest_of_stage(run, WINDOWS)))
    }
    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        let windows = sum_of_notes(run, WINDOWS, "windows");
        let partition = windows.min(partition_rows(windows, self.sizes.partition));
        let repeats = windows.min(self.sizes.section as u64) * size_of::<Repeat>() as u64;
        Ok(2 * partition * size_of::<HeldWindow>() as u64 + repeats)
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let mut writer = RunWriter::create(task)?;
        let mut held = Held { windows: Vec::new(), most: 2 * rows_of(task)?, repeats: Vec::new(), written: 0 };
        each_section_of(task, WINDOWS, TAG, keys_of::<Occurrence>(task)?, |source, found: &[Occurrence]| {
            let window = |o: &Occurrence| (o.high, o.low, ordinal(source.shard, o.record), o.start, o.end);
            held.windows.extend(found.iter().map(window));
            held.shorten(&mut writer, self.sizes)
        })?;
        held.compare(&mut writer, self.sizes)?;
        held.flush(&mut writer)?;
        writer.report(held.written, serde_json::json!({ "repeats": held.written }))
    }
}

/// A window of a partition: hash, ordinal, start, end.
type HeldWindow = (u64, u64, u64, u32, u32);

/// The windows of a partition. They come in the order of the corpus, so that the first of its
/// kind is known as soon as it is seen: of many only that one is held.
struct Held {
    windows: Vec<HeldWindow>,
    most: usize,
    repeats: Vec<Repeat>,
    written: u64,
}

impl Held {
    /// Hold one window of each kind if there are too many; call it now and then.
    fn shorten(&mut self, writer: &mut RunWriter, sizes: Sizes) -> Result<()> {
        if self.windows.len() > self.most {
            self.compare(writer, sizes)?;
            // All of them distinct: wait until there are as many again.
            self.most = self.most.max(2 * self.windows.len());
        }
        Ok(())
    }

    /// Write what stands earlier.
    fn compare(&mut self, writer: &mut RunWriter, sizes: Sizes) -> Result<()> {
        let mut windows = std::mem::take(&mut self.windows);
        windows.sort_unstable();
        for same in windows.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            let (_, _, first, first_start, first_end) = same[0];
            for &(_, _, ordinal, start, end) in &same[1..] {
                // A text that goes on repeating itself keeps the first round.
                if ordinal != first || start >= first_end {
                    self.repeats.push(Repeat { ordinal, start, end, first, first_start });
                }
            }
            if self.repeats.len() >= sizes.section {
                self.flush(writer)?;
            }
        }
        windows.dedup_by_key(|window| (window.0, window.1));
        self.windows = windows;
        Ok(())
    }

    fn flush(&mut self, writer: &mut RunWriter) -> Result<()> {
        self.written += self.repeats.len() as u64;
        writer.records(TAG, 0, &mut self.repeats)?;
        self.repeats.clear();
        Ok(())
    }
}

/// The repeats in the texts of the task's shard, in order, those that meet as one. More than `most` are not held beyond what
/// merging leaves.
pub(super) fn repeats(task: &TaskContext, mut most: usize) -> Result<Vec<Repeat>> {
    let mut repeats: Vec<Repeat> = Vec::new();
    let own = (ordinal(task.index(), 0), ordinal(task.index(), u32::MAX));
    each_section_of(task, REPEATS, TAG, own, |_, found: &[Repeat]| {
        repeats.extend_from_slice(found);
        if repeats.len() > most {
            merge(&mut repeats);
            most = most.max(2 * repeats.len());
        }
        Ok(())
    })?;
    merge(&mut repeats);
    Ok(repeats)
}

/// Sort, and make one of repeats that overlap or touch.
fn merge(repeats: &mut Vec<Repeat>) {
    repeats.sort_unstable();
    repeats.dedup_by(|next, repeat| {
        let meet = next.ordinal == repeat.ordinal && next.start <= repeat.end;
        if meet {
            repeat.end = repeat.end.max(next.end);
        }
        meet
    });
}
