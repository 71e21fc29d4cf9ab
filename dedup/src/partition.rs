//! Radix partitions: hashes are cut into equal ranges of their top bits, so that records sorted by
//! hash hold every partition as one run of records ([`crate::runs`]).

use pipeline::digest::Digest;
use pipeline::{Error, Result, Shard, Task, TaskContext};

use crate::runs::{Record, key_range};

/// Records of a partition, about: 32 MB of keys with their documents, twice that at most.
pub(crate) const PARTITION_ROWS: u64 = 1 << 21;

/// How many partitions of about `partition_rows` rows `rows` hashed rows are cut into: a power of two
/// that depends on the number of rows alone.
pub(crate) fn partitions(rows: u64, partition_rows: u64) -> u32 {
    let wanted = rows.div_ceil(partition_rows.max(1)).next_power_of_two();
    u32::try_from(wanted).unwrap_or(1 << 31)
}

/// A task for each of the partitions that `rows` records are cut into, which are in files of digest `made_of`.
pub(crate) fn partition_tasks(rows: u64, partition_rows: u64, made_of: Digest) -> Vec<Task> {
    let count = partitions(rows, partition_rows);
    let task = |index| Task { index, inputs: serde_json::json!({ "partitions": count, "made_of": made_of }) };
    (0..count).map(task).collect()
}

/// First and last key of the partition that is the task of [`partition_tasks`].
pub(crate) fn keys_of<R: Record>(task: &TaskContext) -> Result<(u64, u64)> {
    Ok(key_range(task.index(), input_number(&task.task, "partitions")?, R::KEY_BITS))
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
}
