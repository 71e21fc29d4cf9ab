//! Token shards: Parquet files with a row per document, and what is counted while they are written.

use std::collections::BTreeMap;
use std::path::PathBuf;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{DataType, SchemaRef, UInt16Type, UInt32Type, UInt64Type};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use pipeline::digest::Digest;
use pipeline::shard::{PendingFile, PendingWriter};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A row group is closed at the document with which it reaches this many tokens. Small, so that a range
/// of keys reads little else, and so that the loader holds little; a longer document is a row group of
/// its own.
pub const ROW_GROUP_TOKENS: usize = 256 << 10;
/// A row group is closed at this many documents.
pub const ROW_GROUP_DOCUMENTS: usize = 64 << 10;
/// Key of [`ShardMetadata`] in the footer's key-value metadata.
pub const METADATA_KEY: &str = "fulgurite.tokens";
/// Zstandard level of token shards.
const ZSTD_LEVEL: i32 = 3;

/// What the footer of a token shard says about it, as JSON under [`METADATA_KEY`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardMetadata {
    /// XXH3 of the `tokenizer.json` that made the tokens.
    pub tokenizer: Digest,
    /// One more than the largest id that can occur.
    pub vocabulary_size: u32,
    /// Id of the token that ends every document.
    pub eos_id: u32,
    /// Seed of the shuffle.
    pub seed: u64,
    /// Documents in the shard.
    #[serde(default)]
    pub documents: u64,
    /// Tokens in the shard, those that end documents included.
    #[serde(default)]
    pub tokens: u64,
}

/// Documents, tokens and bytes of text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Documents.
    pub documents: u64,
    /// Tokens, those that begin and end documents included.
    pub tokens: u64,
    /// Bytes of UTF-8 text.
    pub bytes: u64,
}

impl Counts {
    /// Fertility: bytes of text per token; 0 where there are no tokens.
    pub fn bytes_per_token(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.bytes as f64 / self.tokens as f64 }
    }

    /// Add other counts.
    pub fn add(&mut self, other: Self) {
        self.documents += other.documents;
        self.tokens += other.tokens;
        self.bytes += other.bytes;
    }
}

/// [`Counts`] by source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SourceCounts(pub BTreeMap<String, Counts>);

impl SourceCounts {
    /// Sum over sources.
    pub fn total(&self) -> Counts {
        let mut total = Counts::default();
        self.0.values().for_each(|c| total.add(*c));
        total
    }

    /// Add other counts.
    pub fn add(&mut self, other: &Self) {
        for (source, counts) in &other.0 {
            self.0.entry(source.clone()).or_default().add(*counts);
        }
    }

    fn count(&mut self, source: &str, counts: Counts) {
        match self.0.get_mut(source) {
            Some(known) => known.add(counts),
            None => {
                self.0.insert(source.into(), counts);
            }
        }
    }

    /// For journal notes: totals and sources, with bytes per token.
    pub fn notes(&self) -> serde_json::Value {
        let describe = |c: &Counts| {
            serde_json::json!({
                "documents": c.documents,
                "tokens": c.tokens,
                "bytes": c.bytes,
                "bytes_per_token": c.bytes_per_token(),
            })
        };
        let mut notes = describe(&self.total());
        notes["sources"] = self.0.iter().map(|(source, c)| (source.clone(), describe(c))).collect();
        notes
    }

    /// Read [`Self::notes`] back.
    pub fn from_notes(notes: &serde_json::Value) -> Option<Self> {
        let sources = notes.get("sources")?.as_object()?;
        let counts = sources.iter().map(|(source, c)| {
            let number = |key| c.get(key)?.as_u64();
            let counts = Counts { documents: number("documents")?, tokens: number("tokens")?, bytes: number("bytes")? };
            Some((source.clone(), counts))
        });
        counts.collect::<Option<_>>().map(Self)
    }
}

/// Writes rows with the columns `source`, `bytes` and `tokens` (and others) to a shard.
///
/// Row groups are cut by the rows alone, so the bytes do not depend on how the rows were batched.
pub struct TokenShardWriter {
    path: PathBuf,
    writer: ArrowWriter<PendingWriter>,
    schema: SchemaRef,
    metadata: ShardMetadata,
    /// Rows of the next row group, and their tokens.
    pending: Vec<RecordBatch>,
    pending_rows: usize,
    pending_tokens: usize,
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
        for field in schema.fields() {
            let (dictionary, statistics) = match field.data_type() {
                DataType::FixedSizeBinary(_) => (false, EnabledStatistics::None),
                DataType::UInt64 => (false, EnabledStatistics::Page),
                // Smaller than a dictionary, which a row group of this size cannot pay for.
                DataType::List(_) => (false, EnabledStatistics::None),
                _ => (true, EnabledStatistics::Chunk),
            };
            let column = match field.data_type() {
                DataType::List(element) => {
                    ColumnPath::new(vec![field.name().clone(), "list".into(), element.name().clone()])
                }
                _ => ColumnPath::from(field.name().clone()),
            };
            properties = properties
                .set_column_dictionary_enabled(column.clone(), dictionary)
                .set_column_statistics_enabled(column, statistics);
        }
        let options = ArrowWriterOptions::new().with_properties(properties.build()).with_skip_arrow_metadata(true);
        let writer = ArrowWriter::try_new_with_options(file, schema.clone(), options)
            .map_err(|e| pipeline::Error::parquet(&path, e))?;
        Ok(Self { path, writer, schema, metadata, pending: Vec::new(), pending_rows: 0, pending_tokens: 0 })
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

    fn close_row_group(&mut self) -> Result<()> {
        // One batch, so that pages too are cut by the rows alone.
        let rows = concat_batches(&self.schema, &self.pending).map_err(pipeline::Error::from)?;
        self.pending.clear();
        (self.pending_rows, self.pending_tokens) = (0, 0);
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
        self.writer.append_key_value_metadata(KeyValue { key: METADATA_KEY.into(), value: Some(value) });
        let file = self.writer.into_inner().map_err(|e| pipeline::Error::parquet(&self.path, e))?;
        let documents = self.metadata.documents;
        Ok((file.finish(documents)?, self.metadata))
    }
}

/// Counts documents, tokens and bytes by source, and how often each token occurs.
pub struct TokenCounter {
    /// By source.
    pub sources: SourceCounts,
    /// By token id.
    pub occurrences: Vec<u64>,
}

impl TokenCounter {
    /// Nothing counted yet.
    pub fn new(vocabulary_size: u32) -> Self {
        Self { sources: SourceCounts::default(), occurrences: vec![0; vocabulary_size as usize] }
    }

    /// Count rows with the columns `source`, `bytes` and `tokens`.
    pub fn count(&mut self, batch: &RecordBatch) -> pipeline::Result<()> {
        let column = |name: &str| {
            batch.column_by_name(name).ok_or_else(|| {
                pipeline::Error::Arrow(arrow::error::ArrowError::SchemaError(format!("no column {name}")))
            })
        };
        let sources = cast(column("source")?, &DataType::Utf8View)?;
        let bytes = cast(column("bytes")?, &DataType::UInt64)?;
        let (sources, bytes) = (sources.as_string_view(), bytes.as_primitive::<UInt64Type>());
        let tokens = column("tokens")?.as_list::<i32>();
        for row in 0..batch.num_rows() {
            let counts = Counts { documents: 1, tokens: tokens.value_length(row) as u64, bytes: bytes.value(row) };
            self.sources.count(sources.value(row), counts);
        }
        let offsets = tokens.value_offsets();
        let range = offsets[0] as usize..offsets[batch.num_rows()] as usize;
        match tokens.values().data_type() {
            DataType::UInt16 => {
                let ids = &tokens.values().as_primitive::<UInt16Type>().values()[range];
                ids.iter().for_each(|&id| self.occurrences[usize::from(id)] += 1);
            }
            _ => {
                let ids = &tokens.values().as_primitive::<UInt32Type>().values()[range];
                ids.iter().for_each(|&id| self.occurrences[id as usize] += 1);
            }
        }
        Ok(())
    }
}

/// Entropy in nats per token of a distribution given by counts: the loss of the best model that knows
/// nothing of context.
pub fn unigram_entropy(occurrences: impl Iterator<Item = u64> + Clone) -> f64 {
    let total = occurrences.clone().sum::<u64>() as f64;
    let terms = occurrences.filter(|&n| n > 0).map(|n| {
        let p = n as f64 / total;
        -p * p.ln()
    });
    terms.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_of_known_distributions() {
        assert_eq!(unigram_entropy([0, 7, 0].into_iter()), 0.0);
        assert!((unigram_entropy([3, 3, 3, 3].into_iter()) - 4f64.ln()).abs() < 1e-12);
        let mixed = unigram_entropy([1, 2, 1].into_iter());
        assert!((mixed - 1.5 * 2f64.ln()).abs() < 1e-12, "{mixed}");
    }

    #[test]
    fn notes_read_back() {
        let mut counts = SourceCounts::default();
        counts.count("a", Counts { documents: 1, tokens: 10, bytes: 40 });
        counts.count("b", Counts { documents: 2, tokens: 5, bytes: 5 });
        let notes = counts.notes();
        assert_eq!(notes["bytes_per_token"], 3.0);
        assert_eq!(SourceCounts::from_notes(&notes), Some(counts));
    }
}
