//! Token shards: Parquet files with a row per document.
//!
//! The ids are a list of unsigned integers that any reader knows. They are stored as streams of their
//! bytes (BYTE_STREAM_SPLIT): Parquet has no integers below 32 bits, and the streams of high bytes, all
//! zero in a small vocabulary, cost nothing in the file and next to nothing to read.

use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, ListArray, RecordBatch};
use arrow::buffer::OffsetBuffer;
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, UInt16Type, UInt32Type};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use pipeline::digest::Digest;
use pipeline::shard::{PendingFile, PendingWriter};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};

/// A row group is closed at the document with which it reaches this many tokens. Small, so that a range
/// of keys reads little else, and so that the loader holds little; a longer document is a row group of
/// its own.
pub const ROW_GROUP_TOKENS: usize = 256 << 10;
/// A row group is closed at this many documents.
pub const ROW_GROUP_DOCUMENTS: usize = 64 << 10;
/// Key of [`ShardMetadata`] in the footer's key-value metadata.
pub const METADATA_KEY: &str = "fulgurite.tokens";
/// Key of the XXH3 of that value: nothing else in a Parquet footer is protected. Older shards have none.
pub const CHECKSUM_KEY: &str = "fulgurite.tokens.xxh3";
/// Zstandard level of token shards. Level 3 makes them 3% smaller and costs the second pass of the shuffle, which does
/// little else, a quarter of its processor time more.
const ZSTD_LEVEL: i32 = 1;

/// What the footer of a token shard says about it, as JSON under [`METADATA_KEY`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardMetadata {
    /// XXH3 of the `tokenizer.json` that made the tokens.
    pub tokenizer: Digest,
    /// One more than the largest id that can occur.
    pub vocabulary_size: u32,
    /// Id of the token that ends every document.
    pub eos_id: u32,
    /// Id of the token that may begin a document, whether documents here begin with it or not; none where the
    /// tokenizer has no such token, and in shards of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos_id: Option<u32>,
    /// Id of the token for padding, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pad_id: Option<u32>,
    /// Seed of the shuffle.
    pub seed: u64,
    /// The source that all its documents are of; none in shards of the first pass of the shuffle, which
    /// have several.
    pub source: Option<String>,
    /// Documents in the shard.
    #[serde(default)]
    pub documents: u64,
    /// Tokens in the shard, those that end documents included.
    #[serde(default)]
    pub tokens: u64,
    /// [`TokensDigest`] of each row group.
    #[serde(default)]
    pub row_groups: Vec<Digest>,
}

/// Checksum of the tokens of a row group: XXH3 of the ids as little-endian integers of 32 bits, then of
/// the first place of every document, likewise.
///
/// Parquet's own checksums are optional and few readers look at them.
#[derive(Default)]
pub struct TokensDigest(Xxh3);

impl TokensDigest {
    /// Of a row group.
    pub fn of(tokens: &[u32], starts: &[u32]) -> Digest {
        let mut this = Self::default();
        this.update(tokens);
        this.update(starts);
        Digest(this.0.digest128())
    }

    fn update(&mut self, numbers: &[u32]) {
        let mut bytes = [0; 4096];
        for chunk in numbers.chunks(bytes.len() / 4) {
            for (bytes, number) in bytes.chunks_exact_mut(4).zip(chunk) {
                bytes.copy_from_slice(&number.to_le_bytes());
            }
            self.0.update(&bytes[..chunk.len() * 4]);
        }
    }
}

/// Writes rows with the columns `source`, `bytes` and `tokens` (and others) to a shard.
///
/// Row groups are cut by the rows alone, so the bytes do not depend on how the rows were batched.
pub struct TokenShardWriter {
    path: PathBuf,
    writer: ArrowWriter<PendingWriter>,
    schema: SchemaRef,
    /// The same with tokens that are always there, whatever the plan that made the rows could promise: then a
    /// level less is stored for each of them.
    written: SchemaRef,
    metadata: ShardMetadata,
    /// Rows of the next row group, and their tokens.
    pending: Vec<RecordBatch>,
    pending_rows: usize,
    pending_tokens: usize,
}

/// `schema` with lists of which neither the list nor an element is ever null.
fn without_nulls(schema: &SchemaRef) -> SchemaRef {
    let fields = schema.fields().iter().map(|field| match field.data_type() {
        DataType::List(element) => {
            let element = Arc::new(element.as_ref().clone().with_nullable(false));
            Arc::new(Field::new(field.name(), DataType::List(element), false))
        }
        _ => field.clone(),
    });
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

impl TokenShardWriter {
    /// A shard of rows of `schema` in `file`; `metadata` goes to the footer with the counts filled in.
    pub fn new(file: PendingWriter, path: PathBuf, schema: SchemaRef, metadata: ShardMetadata) -> Result<Self> {
        let level = ZstdLevel::try_new(ZSTD_LEVEL).map_err(|e| pipeline::Error::parquet("zstd", e))?;
        let mut properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(level))
            // The writer here cuts row groups; these limits only must not be in the way.
            .set_max_row_group_row_count(Some(usize::MAX))
            .set_max_row_group_bytes(None)
            .set_created_by("fulgurite".into());
        let written = without_nulls(&schema);
        for field in written.fields() {
            let (dictionary, statistics) = match field.data_type() {
                DataType::FixedSizeBinary(_) => (false, EnabledStatistics::None),
                DataType::UInt64 => (false, EnabledStatistics::Page),
                // Streams of bytes are smaller than a dictionary, which a row group of this size cannot
                // pay for.
                DataType::List(_) => (false, EnabledStatistics::None),
                _ => (true, EnabledStatistics::Chunk),
            };
            let column = match field.data_type() {
                DataType::List(element) => {
                    let column = ColumnPath::new(vec![field.name().clone(), "list".into(), element.name().clone()]);
                    properties = properties.set_column_encoding(column.clone(), Encoding::BYTE_STREAM_SPLIT);
                    column
                }
                _ => ColumnPath::from(field.name().clone()),
            };
            properties = properties
                .set_column_dictionary_enabled(column.clone(), dictionary)
                .set_column_statistics_enabled(column, statistics);
        }
        let options = ArrowWriterOptions::new().with_properties(properties.build()).with_skip_arrow_metadata(true);
        let writer = ArrowWriter::try_new_with_options(file, written.clone(), options)
            .map_err(|e| pipeline::Error::parquet(&path, e))?;
        Ok(Self { path, writer, schema, written, metadata, pending: Vec::new(), pending_rows: 0, pending_tokens: 0 })
    }

    /// Append rows.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        let tokens = self.tokens(batch)?;
        let tokens = tokens.as_list::<i32>();
        let mut start = 0;
        for row in 0..batch.num_rows() {
            let length = tokens.value_length(row) as usize;
            self.pending_rows += 1;
            self.pending_tokens += length;
            self.metadata.documents += 1;
            self.metadata.tokens += length as u64;
            if self.pending_tokens >= ROW_GROUP_TOKENS || self.pending_rows >= ROW_GROUP_DOCUMENTS {
                self.pending.push(batch.slice(start, row + 1 - start));
                start = row + 1;
                self.close_row_group()?;
            }
        }
        if start < batch.num_rows() {
            self.pending.push(batch.slice(start, batch.num_rows() - start));
        }
        Ok(())
    }

    fn tokens(&self, batch: &RecordBatch) -> Result<ArrayRef> {
        let column = batch.column_by_name("tokens").filter(|c| c.as_list_opt::<i32>().is_some());
        column.cloned().ok_or_else(|| Error::Shard {
            path: self.path.clone(),
            row_group: None,
            reason: "rows without a list column tokens".into(),
        })
    }

    /// The rows in the schema that is written.
    fn present(&self, rows: &RecordBatch) -> Result<RecordBatch> {
        let columns = rows.columns().iter().zip(self.written.fields()).map(|(column, field)| {
            let (DataType::List(element), Some(lists)) = (field.data_type(), column.as_list_opt::<i32>()) else {
                return Ok(column.clone());
            };
            let (_, offsets, values, nulls) = lists.clone().into_parts();
            if nulls.is_some_and(|nulls| nulls.null_count() > 0) || values.null_count() > 0 {
                let reason = format!("a null in the column {}", field.name());
                return Err(Error::Shard { path: self.path.clone(), row_group: None, reason });
            }
            // The ids of these rows alone: the writer converts all of the array that it is given, and rows that are a slice
            // of a batch of long documents come with those of the whole batch.
            let (first, last) = (offsets[0], offsets[offsets.len() - 1]);
            let values = values.slice(first as usize, (last - first) as usize);
            let offsets = OffsetBuffer::new(offsets.iter().map(|&at| at - first).collect());
            let lists = ListArray::try_new(element.clone(), offsets, values, None).map_err(pipeline::Error::from)?;
            Ok(Arc::new(lists) as ArrayRef)
        });
        let columns = columns.collect::<Result<Vec<_>>>()?;
        Ok(RecordBatch::try_new(self.written.clone(), columns).map_err(pipeline::Error::from)?)
    }

    fn close_row_group(&mut self) -> Result<()> {
        // One batch, so that pages too are cut by the rows alone.
        let rows = concat_batches(&self.schema, &self.pending).map_err(pipeline::Error::from)?;
        self.pending.clear();
        (self.pending_rows, self.pending_tokens) = (0, 0);
        let tokens = self.tokens(&rows)?;
        let lists = tokens.as_list::<i32>();
        let offsets = lists.value_offsets();
        let range = offsets[0] as usize..offsets[lists.len()] as usize;
        let ids: Vec<u32> = match lists.values().data_type() {
            DataType::UInt16 => {
                lists.values().as_primitive::<UInt16Type>().values()[range].iter().map(|&id| id.into()).collect()
            }
            _ => lists.values().as_primitive::<UInt32Type>().values()[range].to_vec(),
        };
        let starts: Vec<u32> = offsets[..lists.len()].iter().map(|&at| (at - offsets[0]) as u32).collect();
        self.metadata.row_groups.push(TokensDigest::of(&ids, &starts));
        let rows = self.present(&rows)?;
        self.writer
            .write(&rows)
            .and_then(|()| self.writer.flush())
            .map_err(|e| pipeline::Error::parquet(&self.path, e).into())
    }

    /// Write the rest and the footer.
    pub fn finish(mut self) -> Result<(PendingFile, ShardMetadata)> {
        if !self.pending.is_empty() {
            self.close_row_group()?;
        }
        let value = serde_json::to_string(&self.metadata).map_err(pipeline::Error::abort)?;
        let checksum = Digest::of(value.as_bytes()).to_string();
        for (key, value) in [(METADATA_KEY, value), (CHECKSUM_KEY, checksum)] {
            self.writer.append_key_value_metadata(KeyValue { key: key.into(), value: Some(value) });
        }
        let file = self.writer.into_inner().map_err(|e| pipeline::Error::parquet(&self.path, e))?;
        let documents = self.metadata.documents;
        Ok((file.finish(documents)?, self.metadata))
    }
}
