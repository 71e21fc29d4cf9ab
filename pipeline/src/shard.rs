//! Shards: Parquet files that are written under a temporary name with their checksum taken on the
//! way, and named for good only when the stage commits them.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use arrow::array::{AsArray, RecordBatch};
use arrow::compute::{BatchCoalescer, cast};
use arrow::datatypes::{DataType, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::ColumnPath;
use serde::{Deserialize, Serialize};

use crate::digest::{Digest, DigestWriter};
use crate::error::{Error, Result};

/// Rows in a batch, when written and when read back. Small, because a row holds a document.
pub const BATCH_ROWS: usize = 1024;
/// A batch of documents is closed at this many bytes of text when it is written, and a page of a column as well: what is
/// copied, compressed and looked at is still near the processor then, and its memory does for the next one.
pub const BATCH_TEXT_BYTES: usize = 256 << 10;
/// Rows in a batch where texts are read back: some [`BATCH_TEXT_BYTES`] of documents of a few kilobytes.
pub const TEXT_BATCH_ROWS: usize = 64;
/// A row group is closed at this many encoded bytes: what a writer holds in memory.
pub const ROW_GROUP_BYTES: usize = 8 << 20;
/// A row group is closed at this many rows.
pub const ROW_GROUP_ROWS: usize = 64 << 10;
/// Zstandard level of shards, and of their texts unless a stage says otherwise: level 3 saves a tenth of the bytes of English
/// text and takes nearly twice the time, which is then the most of a stage that writes texts. Another level is other bytes: it
/// raises the version of `ingest`, and so the fingerprint of every stage.
const ZSTD_LEVEL: i32 = 1;

/// How the column `text` of a shard is compressed; written `zstd:1` to `zstd:22` or `none`. The other columns are small and
/// are always compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum TextCompression {
    /// Zstandard of this level.
    Zstd(ZstdLevel),
    /// As it is: three times the bytes of English text on disk, for next to no time of a processor.
    None,
}

impl Default for TextCompression {
    fn default() -> Self {
        Self::Zstd(ZstdLevel::try_new(ZSTD_LEVEL).unwrap_or_default())
    }
}

impl TryFrom<String> for TextCompression {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        if name == "none" {
            return Ok(Self::None);
        }
        let level = name.strip_prefix("zstd:").and_then(|level| level.parse().ok());
        match level.map(ZstdLevel::try_new) {
            Some(Ok(level)) => Ok(Self::Zstd(level)),
            _ => Err(format!("unknown compression \"{name}\"; there are none and zstd:1 to zstd:22")),
        }
    }
}

impl From<TextCompression> for String {
    fn from(compression: TextCompression) -> Self {
        match compression {
            TextCompression::Zstd(level) => format!("zstd:{}", level.compression_level()),
            TextCompression::None => "none".into(),
        }
    }
}

impl From<TextCompression> for Compression {
    fn from(compression: TextCompression) -> Self {
        match compression {
            TextCompression::Zstd(level) => Self::ZSTD(level),
            TextCompression::None => Self::UNCOMPRESSED,
        }
    }
}

/// A committed file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Path relative to the stage directory.
    pub path: PathBuf,
    /// Rows, for shards; 0 for other files.
    pub rows: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// XXH3 of the file.
    pub xxh3: Digest,
}

/// A committed shard of kept rows, as a later stage sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Number of the task that wrote it.
    pub index: u32,
    /// Where it is.
    pub path: PathBuf,
    /// Rows in it.
    pub rows: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// XXH3 of the file.
    pub xxh3: Digest,
}

/// File name of shard `index`.
pub fn part_name(index: u32) -> String {
    format!("part-{index:05}.parquet")
}

/// A file that is complete and synced under a temporary name.
#[derive(Debug)]
pub struct PendingFile {
    /// Where it is now.
    pub temporary: PathBuf,
    /// What it will be.
    pub entry: FileEntry,
}

/// An open file of any kind under a temporary name.
pub struct PendingWriter {
    temporary: PathBuf,
    name: PathBuf,
    inner: DigestWriter<BufWriter<File>>,
}

impl PendingWriter {
    /// Create the temporary file of `name` (relative to `stage_dir`).
    pub fn create(stage_dir: &Path, name: impl Into<PathBuf>) -> Result<Self> {
        let name = name.into();
        let temporary = temporary_path(stage_dir, &name);
        let dir = temporary.parent().unwrap_or(stage_dir);
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let file = File::create(&temporary).map_err(|e| Error::io(&temporary, e))?;
        Ok(Self { temporary, name, inner: DigestWriter::new(BufWriter::with_capacity(1 << 18, file)) })
    }

    /// Flush, sync and hand over to the commit.
    pub fn finish(self, rows: u64) -> Result<PendingFile> {
        let Self { temporary, name, inner } = self;
        let (buffered, bytes, xxh3) = inner.finish();
        buffered
            .into_inner()
            .map_err(|e| e.into_error())
            .and_then(|file| file.sync_all())
            .map_err(|e| Error::io(&temporary, e))?;
        Ok(PendingFile { temporary, entry: FileEntry { path: name, rows, bytes, xxh3 } })
    }
}

impl Write for PendingWriter {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.inner.write(buf)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// Directory of temporary files in a stage directory; cleared when the stage is opened.
pub(crate) fn temporary_dir(stage_dir: &Path) -> PathBuf {
    stage_dir.join("tmp")
}

fn temporary_path(stage_dir: &Path, name: &Path) -> PathBuf {
    // Flat: `dropped/part-0` and `part-0` must not meet.
    let flat = name.to_string_lossy().replace(['/', '\\'], "--");
    temporary_dir(stage_dir).join(flat)
}

/// Key in the footer of a shard with a column `text`: bytes of text in all its rows.
pub const TEXT_BYTES: &str = "text_bytes";

/// Bytes of text in a shard, from its footer alone.
pub fn text_bytes(path: &Path) -> Result<u64> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let reader = SerializedFileReader::new(file).map_err(|e| Error::parquet(path, e))?;
    let metadata = reader.metadata().file_metadata().key_value_metadata().into_iter().flatten();
    let value = metadata.filter(|kv| kv.key == TEXT_BYTES).find_map(|kv| kv.value.as_ref()?.parse().ok());
    value.ok_or_else(|| Error::Corrupt { path: path.into(), reason: format!("no {TEXT_BYTES} in its footer") })
}

/// Writes batches of one schema to a Parquet shard.
///
/// Bytes depend on the sequence of rows alone, not on how it was cut into batches: rows are
/// re-cut into batches of [`BATCH_ROWS`], or of [`BATCH_TEXT_BYTES`] if those are fewer rows, first.
pub struct ShardWriter {
    path: PathBuf,
    writer: ArrowWriter<PendingWriter>,
    coalescer: BatchCoalescer,
    rows: u64,
    text: Option<TextColumn>,
}

/// The column `text` of a shard.
struct TextColumn {
    position: usize,
    /// Bytes so far.
    bytes: u64,
    /// Bytes since a batch was closed for them.
    in_batch: usize,
}

impl ShardWriter {
    /// A shard `name` (relative to `stage_dir`) of rows of `schema`, with `metadata` in its footer.
    pub fn create(
        stage_dir: &Path,
        name: impl Into<PathBuf>,
        schema: SchemaRef,
        metadata: Vec<(String, String)>,
    ) -> Result<Self> {
        Self::create_compressed(stage_dir, name, schema, metadata, TextCompression::default())
    }

    /// As [`Self::create`], with the texts compressed as `compression` says.
    pub fn create_compressed(
        stage_dir: &Path,
        name: impl Into<PathBuf>,
        schema: SchemaRef,
        metadata: Vec<(String, String)>,
        compression: TextCompression,
    ) -> Result<Self> {
        let file = PendingWriter::create(stage_dir, name)?;
        let path = file.temporary.clone();
        let properties = properties(&schema, metadata, compression)?;
        // Without the Arrow schema in the footer: types are the Parquet ones that every reader knows.
        let options = ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true);
        let writer =
            ArrowWriter::try_new_with_options(file, schema.clone(), options).map_err(|e| Error::parquet(&path, e))?;
        let text = schema.index_of("text").ok().map(|position| TextColumn { position, bytes: 0, in_batch: 0 });
        Ok(Self { path, writer, coalescer: BatchCoalescer::new(schema, BATCH_ROWS), rows: 0, text })
    }

    /// Append rows.
    pub fn write(&mut self, batch: RecordBatch) -> Result<()> {
        let rows = batch.num_rows();
        self.rows += rows as u64;
        let mut begin = 0;
        if let Some(text) = &mut self.text {
            let texts = cast(batch.column(text.position), &DataType::Utf8View)?;
            for (row, length) in texts.as_string_view().lengths().enumerate() {
                text.bytes += u64::from(length);
                text.in_batch += length as usize;
                if text.in_batch >= BATCH_TEXT_BYTES {
                    text.in_batch = 0;
                    self.coalescer.push_batch(batch.slice(begin, row + 1 - begin))?;
                    self.coalescer.finish_buffered_batch()?;
                    begin = row + 1;
                }
            }
        }
        if begin < rows {
            self.coalescer.push_batch(batch.slice(begin, rows - begin))?;
        }
        self.drain()
    }

    /// Rows so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    fn drain(&mut self) -> Result<()> {
        while let Some(batch) = self.coalescer.next_completed_batch() {
            self.writer.write(&batch).map_err(|e| Error::parquet(&self.path, e))?;
        }
        Ok(())
    }

    /// Write the rest and the footer, and hand over to the commit.
    pub fn finish(mut self) -> Result<PendingFile> {
        self.coalescer.finish_buffered_batch()?;
        self.drain()?;
        if let Some(TextColumn { bytes, .. }) = self.text {
            self.writer.append_key_value_metadata(KeyValue { key: TEXT_BYTES.into(), value: Some(bytes.to_string()) });
        }
        let file = self.writer.into_inner().map_err(|e| Error::parquet(&self.path, e))?;
        file.finish(self.rows)
    }
}

fn properties(schema: &SchemaRef, metadata: Vec<(String, String)>, text: TextCompression) -> Result<WriterProperties> {
    let level = ZstdLevel::try_new(ZSTD_LEVEL).map_err(|e| Error::parquet("zstd", e))?;
    let mut builder = WriterProperties::builder()
        .set_compression(Compression::ZSTD(level))
        .set_column_compression(ColumnPath::from("text"), text.into())
        .set_data_page_size_limit(BATCH_TEXT_BYTES)
        .set_max_row_group_bytes(Some(ROW_GROUP_BYTES))
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .set_created_by("fulgurite".into())
        .set_key_value_metadata(Some(
            metadata.into_iter().map(|(key, value)| KeyValue { key, value: Some(value) }).collect(),
        ));
    for field in schema.fields() {
        let column = ColumnPath::from(field.name().clone());
        builder = match field.data_type() {
            // Unique long values: a dictionary would be built and thrown away, statistics say nothing.
            DataType::Utf8 | DataType::Utf8View | DataType::LargeUtf8
                if matches!(field.name().as_str(), "text" | "url" | "metadata") =>
            {
                builder
                    .set_column_dictionary_enabled(column.clone(), false)
                    .set_column_statistics_enabled(column, EnabledStatistics::None)
            }
            DataType::FixedSizeBinary(_) => builder
                .set_column_dictionary_enabled(column.clone(), false)
                .set_column_statistics_enabled(column, EnabledStatistics::None),
            DataType::UInt64 => builder
                .set_column_dictionary_enabled(column.clone(), false)
                .set_column_encoding(column, Encoding::DELTA_BINARY_PACKED),
            _ => builder,
        };
    }
    Ok(builder.build())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, StringViewArray, UInt64Array};
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    use super::*;

    #[test]
    fn compressions_are_named() {
        for name in ["none", "zstd:1", "zstd:22"] {
            let compression = TextCompression::try_from(name.to_owned()).unwrap();
            assert_eq!(String::from(compression), name);
        }
        assert_eq!(String::from(TextCompression::default()), "zstd:1");
        for name in ["", "zstd", "zstd:0", "zstd:23", "zstd:-1", "zstd:x", "lz4"] {
            let error = TextCompression::try_from(name.to_owned()).unwrap_err();
            assert!(error.contains(&format!("\"{name}\"")), "{error}");
        }
    }

    #[test]
    fn texts_are_compressed_as_told_and_read_back_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let texts: Vec<String> = (0..2000usize).map(|n| format!("{} and {n}. ", n % 7).repeat(n % 500)).collect();
        let text: ArrayRef = Arc::new(StringViewArray::from_iter_values(&texts));
        let url: ArrayRef = Arc::new(StringViewArray::from_iter_values(&texts));
        let all = RecordBatch::try_from_iter([("text", text), ("url", url)]).unwrap();
        let bytes = |compression: TextCompression| {
            let name = String::from(compression).replace(':', "");
            let mut writer =
                ShardWriter::create_compressed(dir.path(), name, all.schema(), Vec::new(), compression).unwrap();
            writer.write(all.clone()).unwrap();
            let shard = writer.finish().unwrap();
            let reader = SerializedFileReader::new(File::open(&shard.temporary).unwrap()).unwrap();
            for group in reader.metadata().row_groups() {
                assert_eq!(group.column(0).compression(), compression.into());
                assert_eq!(group.column(1).compression(), TextCompression::default().into());
            }
            let file = File::open(&shard.temporary).unwrap();
            let batches: Vec<_> =
                ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap().map(Result::unwrap).collect();
            let found: Vec<String> = batches
                .iter()
                .flat_map(|batch| {
                    let column = cast(&batch["text"], &DataType::Utf8View).unwrap();
                    column.as_string_view().iter().map(|t| t.unwrap().to_owned()).collect::<Vec<_>>()
                })
                .collect();
            assert!(found == texts);
            shard.entry.bytes
        };
        let total: usize = texts.iter().map(String::len).sum();
        let none = bytes(TextCompression::None);
        let zstd = bytes(TextCompression::default());
        assert!(none > total as u64 && zstd < total as u64 / 4, "{none} and {zstd} of {total}");
    }

    #[test]
    fn bytes_of_a_shard_depend_on_its_rows_alone() {
        let dir = tempfile::tempdir().unwrap();
        // Texts of up to 100 KB, two of several batches' worth, and many short ones.
        let texts: Vec<String> = (0..3000usize)
            .map(|n| match n {
                700 | 701 => format!("{n} ").repeat(900_000),
                0..400 => format!("{} ", n * 7919).repeat(n * n % 15_000),
                _ => format!("{}", n * 7919),
            })
            .collect();
        let text: ArrayRef = Arc::new(StringViewArray::from_iter_values(&texts));
        let ordinal: ArrayRef = Arc::new(UInt64Array::from_iter_values(0..3000));
        let all = RecordBatch::try_from_iter([("ordinal", ordinal), ("text", text)]).unwrap();
        let shard = |name: String, rows: usize| {
            let mut writer = ShardWriter::create(dir.path(), name, all.schema(), Vec::new()).unwrap();
            for begin in (0..3000).step_by(rows) {
                writer.write(all.slice(begin, rows.min(3000 - begin))).unwrap();
            }
            writer.finish().unwrap()
        };
        let once = shard("3000".into(), 3000);
        assert_eq!(once.entry.rows, 3000);
        for rows in [1, 7, 1000] {
            assert_eq!(shard(rows.to_string(), rows).entry.xxh3, once.entry.xxh3, "{rows} rows at a time");
        }
        let total: usize = texts.iter().map(String::len).sum();
        assert_eq!(text_bytes(&once.temporary).unwrap(), total as u64);
        let file = File::open(&once.temporary).unwrap();
        let mut row = 0;
        for batch in ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap() {
            let column = cast(&batch.unwrap()["text"], &DataType::Utf8View).unwrap();
            for found in column.as_string_view().iter() {
                assert!(found == Some(texts[row].as_str()), "row {row}");
                row += 1;
            }
        }
        assert_eq!(row, 3000);
    }
}
