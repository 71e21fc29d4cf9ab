//! Radix partitions: hashes are cut into equal ranges of their top bits, so that rows sorted by
//! hash hold every partition as one run of rows.

use pipeline::digest::Digest;
use pipeline::{Error, Result, Shard, Task};

/// Rows of a partition, about. At 24 bytes a row a partition is sorted in some 200 MB; one that
/// does not fit in the memory limit spills.
pub(crate) const PARTITION_ROWS: u64 = 1 << 22;

/// How many partitions of about `partition_rows` rows `rows` hashed rows are cut into: a power of two
/// that depends on the number of rows alone.
pub(crate) fn partitions(rows: u64, partition_rows: u64) -> u32 {
    let wanted = rows.div_ceil(partition_rows.max(1)).next_power_of_two();
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
pub(crate) mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, AsArray, RecordBatch, UInt64Array};
    use arrow::datatypes::{DataType, Field, Schema, UInt64Type};
    use async_trait::async_trait;
    use pipeline::shard::{ShardWriter, part_name};
    use pipeline::stage::read_shards;
    use pipeline::{RunContext, RunOptions, Runner, Stage, TaskContext, TaskReport};

    use super::*;

    /// A stage that writes given rows of numbers, sorted within each of three shards.
    pub(crate) struct Rows {
        name: String,
        columns: Vec<Field>,
        rows: Vec<Vec<u64>>,
    }

    impl Rows {
        pub(crate) fn new(name: &str, columns: &[&str], rows: Vec<Vec<u64>>) -> Self {
            let field = |name: &&str| {
                let kind = if *name == "band" { DataType::UInt8 } else { DataType::UInt64 };
                Field::new(*name, kind, false)
            };
            Self { name: name.into(), columns: columns.iter().map(field).collect(), rows }
        }
    }

    #[async_trait]
    impl Stage for Rows {
        fn name(&self) -> &str {
            &self.name
        }
        fn version(&self) -> u32 {
            1
        }
        fn inputs(&self) -> Vec<String> {
            Vec::new()
        }
        fn config(&self) -> Result<serde_json::Value> {
            Ok(serde_json::json!({}))
        }
        async fn tasks(&self, _: &RunContext) -> Result<Vec<Task>> {
            Ok((0..3).map(|index| Task { index, inputs: serde_json::json!({}) }).collect())
        }
        async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
            let mut rows: Vec<_> = self.rows.iter().skip(task.index() as usize).step_by(3).collect();
            rows.sort();
            let schema = Arc::new(Schema::new(self.columns.clone()));
            let column = |(i, field): (usize, &Field)| -> Result<ArrayRef> {
                let numbers = UInt64Array::from_iter_values(rows.iter().map(|row| row[i]));
                Ok(arrow::compute::cast(&numbers, field.data_type())?)
            };
            let columns = self.columns.iter().enumerate().map(column).collect::<Result<Vec<_>>>()?;
            let mut writer =
                ShardWriter::create(task.stage_dir(), part_name(task.index()), schema.clone(), Vec::new())?;
            writer.write(RecordBatch::try_new(schema, columns)?)?;
            Ok(TaskReport { files: vec![writer.finish()?], ..TaskReport::default() })
        }
    }

    /// The rows in an order of their own.
    pub(crate) fn shuffled<const N: usize>(rows: impl Iterator<Item = [u64; N]>) -> Vec<Vec<u64>> {
        let mut rows: Vec<Vec<u64>> = rows.map(|row| row.to_vec()).collect();
        rows.sort_by_key(|row| Digest::of(format!("{row:?}").as_bytes()));
        rows
    }

    /// Run the stages; number of tasks of the last, and its rows in order.
    pub(crate) async fn removals_of(
        stages: Vec<Arc<dyn Stage>>,
        last: &str,
        columns: &[&str],
    ) -> (usize, Vec<Vec<u64>>) {
        let dir = tempfile::tempdir().unwrap();
        let run = RunContext::new(dir.path(), RunOptions { threads: 2, ..RunOptions::new() }).unwrap();
        Runner::new(run.clone(), stages).unwrap().run(None).await.unwrap();
        let table = read_shards(&run.session(), &run.shards(last).unwrap()).await.unwrap();
        let mut rows = Vec::new();
        for batch in table.select_columns(columns).unwrap().collect().await.unwrap() {
            for row in 0..batch.num_rows() {
                rows.push(batch.columns().iter().map(|c| c.as_primitive::<UInt64Type>().value(row)).collect());
            }
        }
        rows.sort();
        (run.journal(last).len(), rows)
    }

    #[test]
    fn the_number_of_partitions_is_a_power_of_two_of_bounded_size() {
        assert_eq!(partitions(0, 100), 1);
        assert_eq!(partitions(100, 100), 1);
        assert_eq!(partitions(101, 100), 2);
        assert_eq!(partitions(500, 100), 8);
        assert_eq!(partitions(u64::MAX, 1 << 33), 1 << 31);
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
