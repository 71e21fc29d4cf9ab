//! Radix partitions: hashes are cut into equal ranges of their top bits, so that records sorted by
//! hash hold every partition as one run of records ([`crate::runs`]).

use pipeline::digest::Digest;
use pipeline::{Error, Result, Shard, Task, TaskContext};

use crate::runs::{Record, key_range};

/// Records of a partition at least, about: 32 MB of keys with their documents, twice that at most. [`partition_rows`] says when
/// they are more.
pub(crate) const PARTITION_ROWS: u64 = 1 << 21;

/// Partitions up to which each has the least number of records.
const FEW_PARTITIONS: u64 = 64;

/// How many times the least number of records a partition has at most.
const MOST_TIMES: u64 = 16;

/// Records of a partition, about, where `rows` records lie in the files of all shards: `least`, and where those were more than
/// [`FEW_PARTITIONS`], as many as make these, up to [`MOST_TIMES`] as many.
///
/// A task opens the file of every shard, and both tasks and shards become more with the corpus: their product would outgrow
/// all other work. So it is the partitions that grow, by the number of records alone, never by the memory limit: that says how
/// many tasks there are at a time ([`pipeline::Stage::task_memory_bytes`]).
pub(crate) fn partition_rows(rows: u64, least: u64) -> u64 {
    rows.div_ceil(FEW_PARTITIONS).clamp(least, least.saturating_mul(MOST_TIMES))
}

/// How many partitions of about `partition_rows` rows `rows` hashed rows are cut into: a power of two
/// that depends on the number of rows alone.
pub(crate) fn partitions(rows: u64, partition_rows: u64) -> u32 {
    let wanted = rows.div_ceil(partition_rows.max(1)).next_power_of_two();
    u32::try_from(wanted).unwrap_or(1 << 31)
}

/// A task for each of the partitions of about `partition_rows` records that `rows` records are cut into, which are in files of
/// digest `made_of`.
pub(crate) fn partition_tasks(rows: u64, partition_rows: u64, made_of: Digest) -> Vec<Task> {
    let count = partitions(rows, partition_rows);
    let inputs = serde_json::json!({ "partitions": count, "partition_rows": partition_rows, "made_of": made_of });
    let task = |index| Task { index, inputs: inputs.clone() };
    (0..count).map(task).collect()
}

/// First and last key of the partition that is the task of [`partition_tasks`].
pub(crate) fn keys_of<R: Record>(task: &TaskContext) -> Result<(u64, u64)> {
    Ok(key_range(task.index(), input_number(&task.task, "partitions")?, R::KEY_BITS))
}

/// Records of the task's partition, about.
pub(crate) fn rows_of(task: &TaskContext) -> Result<usize> {
    Ok(input_number(&task.task, "partition_rows")? as usize)
}

/// One digest over the shards of a stage, for the inputs of a task that reads all of them.
pub(crate) fn digest_of(shards: &[Shard]) -> Digest {
    let mut bytes = Vec::with_capacity(shards.len() * 20);
    for shard in shards {
        bytes.extend_from_slice(&shard.index.to_le_bytes());
        bytes.extend_from_slice(&shard.xxh3.0.to_le_bytes());
    }
    Digest::of(&bytes)
}

/// A number that a stage put into the inputs of its task.
pub(crate) fn input_number(task: &Task, name: &str) -> Result<u32> {
    task.inputs
        .get(name)
        .and_then(serde_json::Value::as_u64)
        .and_then(|n| u32::try_from(n).ok())
        .ok_or_else(|| Error::Recipe(format!("task {} has no {name} among its inputs", task.index)))
}

/// Leave a long task when the run was asked to stop; what it has written was never there.
pub(crate) fn stop_if_asked(task: &TaskContext) -> Result<()> {
    if task.run.stop_requested() { Err(Error::Interrupted) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_partitions_is_a_power_of_two_of_bounded_size() {
        assert_eq!(partitions(0, 100), 1);
        assert_eq!(partitions(100, 100), 1);
        assert_eq!(partitions(101, 100), 2);
        assert_eq!(partitions(500, 100), 8);
        assert_eq!(partitions(u64::MAX, 1 << 33), 1 << 31);
    }

    #[test]
    fn files_opened_grow_with_the_corpus_and_not_with_its_square() {
        let of = |rows: u64| u64::from(partitions(rows, partition_rows(rows, PARTITION_ROWS)));
        // As ever while there are few partitions.
        for rows in [0, 1, 3_000_000, 100_000_000, 1 << 27] {
            assert_eq!(of(rows), u64::from(partitions(rows, PARTITION_ROWS)), "{rows}");
        }
        let mut rows = 1 << 20;
        while rows < 1 << 36 {
            let partition = partition_rows(rows, PARTITION_ROWS);
            assert!((PARTITION_ROWS..=16 * PARTITION_ROWS).contains(&partition));
            assert!(rows > 1 << 31 || of(rows) <= 64, "{rows}: {} partitions", of(rows));
            assert!(rows.div_ceil(of(rows)) <= partition);
            rows += rows / 3;
        }
    }
}
