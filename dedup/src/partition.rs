//! Radix partitions: hashes are cut into equal ranges of their top bits, so that rows sorted by
//! hash hold every partition as one run of rows.

use pipeline::digest::Digest;
use pipeline::{Error, Result, Shard, Task};

/// Rows of a partition, about. At 24 bytes a row a partition is sorted in some 200 MB; one that
/// does not fit in the memory limit spills.
const PARTITION_ROWS: u64 = 1 << 22;

/// How many partitions `rows` hashed rows are cut into: a power of two that depends on the number
/// of rows alone.
pub(crate) fn partitions(rows: u64) -> u32 {
    let wanted = rows.div_ceil(PARTITION_ROWS).next_power_of_two();
    u32::try_from(wanted).unwrap_or(1 << 31)
}

/// First and last hash of partition `index` of `count`, a power of two.
pub(crate) fn hash_range(index: u32, count: u32) -> (u64, u64) {
    let bits = count.trailing_zeros();
    if bits == 0 {
        return (0, u64::MAX);
    }
    let first = u64::from(index) << (64 - bits);
    (first, first | (u64::MAX >> bits))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_partitions_is_a_power_of_two_of_bounded_size() {
        assert_eq!(partitions(0), 1);
        assert_eq!(partitions(PARTITION_ROWS), 1);
        assert_eq!(partitions(PARTITION_ROWS + 1), 2);
        assert_eq!(partitions(5 * PARTITION_ROWS), 8);
        assert_eq!(partitions(u64::MAX), 1 << 31);
    }

    #[test]
    fn ranges_tile_the_hashes() {
        for count in [1u32, 2, 8, 1 << 20] {
            let mut next = 0u64;
            for index in 0..count {
                let (first, last) = hash_range(index, count);
                assert_eq!(first, next, "{index} of {count}");
                assert!(last > first);
                next = last.wrapping_add(1);
            }
            assert_eq!(next, 0, "{count} ranges end at the last hash");
        }
    }
}
