//! The record that every curation stage reads: one document, in memory always a row of an Arrow
//! batch.

use std::sync::{Arc, LazyLock};

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};

use crate::digest::Digest;

/// Column names of a document shard, in order.
pub const COLUMNS: [&str; 8] = ["id", "ordinal", "text", "url", "source", "language", "timestamp", "metadata"];

/// Schema of a document shard.
///
/// | column | type | meaning |
/// | --- | --- | --- |
/// | `id` | fixed binary, 16 bytes | [`document_id`]: stable across runs and machines |
/// | `ordinal` | u64 | position in the run, [`ordinal`]: strictly increasing within a shard |
/// | `text` | string | the text, UTF-8 |
/// | `url` | string? | where it was found |
/// | `source` | string | name of the recipe's input that it came from |
/// | `language` | string? | language code, as given by the input; in `curate` as identified, where the recipe has that done |
/// | `timestamp` | timestamp(ms, UTC)? | when it was fetched or written, as given by the input |
/// | `metadata` | string? | JSON object of the remaining fields that the recipe asked to keep |
pub static SCHEMA: LazyLock<SchemaRef> = LazyLock::new(|| {
    Arc::new(Schema::new(vec![
        Field::new("id", DataType::FixedSizeBinary(16), false),
        Field::new("ordinal", DataType::UInt64, false),
        Field::new("text", DataType::Utf8View, false),
        Field::new("url", DataType::Utf8View, true),
        Field::new("source", DataType::Utf8View, false),
        Field::new("language", DataType::Utf8View, true),
        Field::new("timestamp", DataType::Timestamp(TimeUnit::Millisecond, Some("UTC".into())), true),
        Field::new("metadata", DataType::Utf8View, true),
    ]))
});

/// The stable identity of a document: a hash of the URI it was read from (as written in the recipe,
/// so that a checkout may move) and of its place in that file (byte offset of the record in plain
/// files, record number in compressed ones).
pub fn document_id(uri: &str, record: u64) -> [u8; 16] {
    let mut key = Vec::with_capacity(uri.len() + 9);
    key.extend_from_slice(uri.as_bytes());
    key.push(0);
    key.extend_from_slice(&record.to_le_bytes());
    Digest::of(&key).0.to_be_bytes()
}

/// Position of a record in a run: the ingest shard in the high half, the record's number within the
/// shard's input in the low half. Later stages select by ordinal; "earliest" means smallest ordinal.
pub fn ordinal(shard: u32, record: u32) -> u64 {
    (shard as u64) << 32 | record as u64
}
