//! The texts of an input one after the other, outside of a run: examples to train on.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use arrow::array::{Array, AsArray};
use arrow::compute::cast;
use arrow::datatypes::DataType;
use datafusion::prelude::{SessionConfig, SessionContext, col};
use futures::StreamExt;

use super::bad::BadRecords;
use super::config::{IngestConfig, InputConfig};
use super::listing;
use super::scan::{RawTable, ScanContext};
use super::splits;
use crate::error::Result;
use crate::shard::BATCH_ROWS;

/// Calls `visit` with the text of every document of `input`, whose paths are relative to `base_dir`, in the order of
/// files and records. Gives the number of records that held none.
///
/// # Errors
/// As those of the ingest stage, but that records which cannot be read are only counted.
pub async fn for_each_text(input: &InputConfig, base_dir: &Path, mut visit: impl FnMut(&str)) -> Result<u64> {
    let listing = listing::list(std::slice::from_ref(input), base_dir)?;
    let fields = Arc::new(input.fields.clone());
    let config = SessionConfig::new().with_target_partitions(1).with_batch_size(BATCH_ROWS);
    let session = SessionContext::new_with_config(config);
    let mut skipped = 0;
    for file in &listing.files {
        let splits = splits::plan(std::slice::from_ref(file), u64::MAX);
        let splits = splits.iter().flatten().map(|split| (split, file, input.source.as_str(), fields.clone()));
        let context = ScanContext {
            shard: 0,
            max_record_bytes: IngestConfig::default().max_record_bytes,
            read: Arc::new(AtomicU64::new(0)),
            bad: BadRecords::new(u64::MAX).task(),
        };
        let table = session.read_table(Arc::new(RawTable::new(splits, context)?))?;
        let mut rows = table.select(vec![col("text"), col("rule")])?.execute_stream().await?;
        while let Some(batch) = rows.next().await {
            let batch = batch?;
            let texts = cast(&batch["text"], &DataType::Utf8View)?;
            for row in 0..batch.num_rows() {
                if batch["rule"].is_valid(row) {
                    skipped += 1;
                } else {
                    visit(texts.as_string_view().value(row));
                }
            }
        }
    }
    Ok(skipped)
}
