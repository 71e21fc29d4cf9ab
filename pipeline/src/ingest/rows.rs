//! Rows that a reader makes: documents, and the records that could not become one.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use arrow::array::{
    ArrayRef, FixedSizeBinaryBuilder, RecordBatch, StringViewArray, StringViewBuilder, TimestampMillisecondBuilder,
    UInt64Array, UInt64Builder,
};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::error::{DataFusionError, Result};

use super::bad::BadInTask;
use crate::document::{self, document_id};
use crate::shard::{BATCH_ROWS, BATCH_TEXT_BYTES};

/// Bytes of a bad record that are kept for whoever looks at it.
pub(super) const EXCERPT_BYTES: usize = 1024;
/// Position of the ordinal in [`SCHEMA`].
const ORDINAL: usize = 1;

/// Schema of the ingest scan: the columns of a document, then, for records that did not become one,
/// the rule with file, place, reason and the beginning of the raw record.
pub static SCHEMA: LazyLock<SchemaRef> = LazyLock::new(|| {
    let mut fields: Vec<Arc<Field>> = document::SCHEMA.fields().iter().cloned().collect();
    fields.extend(
        [
            Field::new("rule", DataType::Utf8View, true),
            Field::new("file", DataType::Utf8View, false),
            Field::new("record", DataType::Utf8View, true),
            Field::new("offset", DataType::UInt64, false),
            Field::new("detail", DataType::Utf8View, true),
            Field::new("excerpt", DataType::Utf8View, true),
        ]
        .map(Arc::new),
    );
    Arc::new(Schema::new(fields))
});

/// Columns of the dropped shard of the ingest stage.
pub const DROPPED: [&str; 10] =
    ["id", "ordinal", "source", "url", "rule", "file", "record", "offset", "detail", "excerpt"];

/// Why a record did not become a document; the value of the column `rule`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The file ends within a record or a compressed block.
    Truncated,
    /// The bytes cannot be decompressed or decoded.
    Corrupt,
    /// Not UTF-8.
    InvalidUtf8,
    /// Not a JSON object.
    InvalidJson,
    /// The record has no text field.
    MissingText,
    /// The text field is not a string.
    WrongType,
    /// The record is longer than `max_record_bytes`.
    TooLong,
    /// The file holds no record.
    EmptyFile,
    /// The Parquet file has no text column, or one of another type.
    WrongSchema,
    /// A WARC record whose header or length is wrong.
    InvalidRecord,
    /// A WARC response whose HTTP head cannot be read.
    InvalidHttp,
    /// The text is empty or white space.
    EmptyText,
    /// An HTTP response with another status than 200.
    HttpStatus,
    /// An HTTP response that is neither HTML nor text, or encoded in an unknown way.
    ContentType,
    /// A page without text.
    NoText,
    /// A page that is too large, too deep or too odd for the extraction.
    HtmlLimit,
}

impl Reason {
    /// All reasons.
    pub const ALL: [Self; 16] = [
        Self::Truncated,
        Self::Corrupt,
        Self::InvalidUtf8,
        Self::InvalidJson,
        Self::MissingText,
        Self::WrongType,
        Self::TooLong,
        Self::EmptyFile,
        Self::WrongSchema,
        Self::InvalidRecord,
        Self::InvalidHttp,
        Self::EmptyText,
        Self::HttpStatus,
        Self::ContentType,
        Self::NoText,
        Self::HtmlLimit,
    ];

    /// The name in the column `rule`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::Corrupt => "corrupt",
            Self::InvalidUtf8 => "invalid_utf8",
            Self::InvalidJson => "invalid_json",
            Self::MissingText => "missing_text",
            Self::WrongType => "wrong_type",
            Self::TooLong => "too_long",
            Self::EmptyFile => "empty_file",
            Self::WrongSchema => "wrong_schema",
            Self::InvalidRecord => "invalid_record",
            Self::InvalidHttp => "invalid_http",
            Self::EmptyText => "empty_text",
            Self::HttpStatus => "http_status",
            Self::ContentType => "content_type",
            Self::NoText => "no_text",
            Self::HtmlLimit => "html_limit",
        }
    }

    /// Whether the record is bad, rather than a good record that holds no document. Bad records count
    /// towards the limit of the recipe.
    pub fn is_bad(self) -> bool {
        !matches!(self, Self::EmptyText | Self::HttpStatus | Self::ContentType | Self::NoText | Self::HtmlLimit)
    }
}

/// Where a record is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// What the records of the file are called.
    pub unit: &'static str,
    /// Counted from 1; `None` where the beginning of the file was not read.
    pub number: Option<u64>,
    /// Byte offset in plain files, number from 0 otherwise: what the document's id is made of.
    pub offset: u64,
}

impl Place {
    fn name(&self) -> String {
        match self.number {
            Some(number) => format!("{} {number}", self.unit),
            None => format!("{} at byte {}", self.unit, self.offset),
        }
    }
}

/// The columns that a record fills.
#[derive(Debug, Default)]
pub(super) struct Document<'a> {
    pub text: Cow<'a, str>,
    pub url: Option<Cow<'a, str>>,
    pub language: Option<Cow<'a, str>>,
    /// Milliseconds since 1970, UTC.
    pub timestamp: Option<i64>,
    /// A JSON object.
    pub metadata: Option<String>,
}

/// What a reader writes into. Rows leave in batches that are bounded in rows and in bytes.
pub(super) struct Rows {
    uri: Arc<str>,
    source: Arc<str>,
    /// Records met, counted by the readers apart from the rows below.
    read: Arc<AtomicU64>,
    bad: Arc<BadInTask>,
    send: Box<dyn FnMut(RecordBatch) -> Result<()> + Send>,
    ids: FixedSizeBinaryBuilder,
    text: StringViewBuilder,
    url: StringViewBuilder,
    language: StringViewBuilder,
    timestamp: TimestampMillisecondBuilder,
    metadata: StringViewBuilder,
    rule: StringViewBuilder,
    record: StringViewBuilder,
    offset: UInt64Builder,
    detail: StringViewBuilder,
    excerpt: StringViewBuilder,
    rows: usize,
    bytes: usize,
}

impl Rows {
    pub fn new(
        uri: Arc<str>,
        source: Arc<str>,
        read: Arc<AtomicU64>,
        bad: Arc<BadInTask>,
        send: Box<dyn FnMut(RecordBatch) -> Result<()> + Send>,
    ) -> Self {
        Self {
            uri,
            source,
            read,
            bad,
            send,
            ids: FixedSizeBinaryBuilder::new(16),
            text: StringViewBuilder::new().with_fixed_block_size(BATCH_TEXT_BYTES as u32),
            url: StringViewBuilder::new(),
            language: StringViewBuilder::new(),
            timestamp: TimestampMillisecondBuilder::new().with_timezone("UTC"),
            metadata: StringViewBuilder::new(),
            rule: StringViewBuilder::new(),
            record: StringViewBuilder::new(),
            offset: UInt64Builder::new(),
            detail: StringViewBuilder::new(),
            excerpt: StringViewBuilder::new(),
            rows: 0,
            bytes: 0,
        }
    }

    /// A record was met. Called once per record by the reader, before anything is made of it.
    pub fn count(&mut self) {
        self.read.fetch_add(1, Ordering::AcqRel);
    }

    /// Add a document; one without text goes to the dropped ones instead.
    pub fn keep(&mut self, place: Place, document: Document<'_>) -> Result<()> {
        if document.text.trim().is_empty() {
            return self.quarantine(Reason::EmptyText, place, document.url.as_deref(), "the text is empty", b"");
        }
        self.place(place)?;
        self.text.try_append_value(&document.text)?;
        append(&mut self.url, document.url.as_deref())?;
        append(&mut self.language, document.language.as_deref())?;
        self.timestamp.append_option(document.timestamp);
        append(&mut self.metadata, document.metadata.as_deref())?;
        self.rule.append_null();
        self.record.append_null();
        self.detail.append_null();
        self.excerpt.append_null();
        self.bytes += document.text.len() + document.metadata.as_ref().map_or(0, String::len);
        self.next_row()
    }

    /// Add a record that does not become a document. `raw` may be all of it; its beginning is kept.
    pub fn quarantine(
        &mut self,
        reason: Reason,
        place: Place,
        url: Option<&str>,
        detail: &str,
        raw: &[u8],
    ) -> Result<()> {
        if reason.is_bad() {
            let at = || format!("{}, {}: {}: {detail}", self.uri, place.name(), reason.name());
            if !self.bad.add(reason, at) {
                return Err(DataFusionError::Execution("too many bad records".into()));
            }
        }
        self.place(place)?;
        self.text.append_value("");
        append(&mut self.url, url)?;
        self.language.append_null();
        self.timestamp.append_null();
        self.metadata.append_null();
        self.rule.append_value(reason.name());
        self.record.try_append_value(place.name())?;
        self.detail.try_append_value(detail)?;
        let excerpt = String::from_utf8_lossy(&raw[..raw.len().min(EXCERPT_BYTES)]);
        self.excerpt.try_append_value(excerpt)?;
        self.bytes += 2 * EXCERPT_BYTES;
        self.next_row()
    }

    /// An error that no record is to blame for, with the file and the record at which it was met.
    pub fn fault(&self, place: Place, url: Option<&str>, detail: &str) -> DataFusionError {
        let url = url.map(|url| format!(" ({url})")).unwrap_or_default();
        DataFusionError::Execution(format!("{}, {}{url}: {detail}", self.uri, place.name()))
    }

    fn place(&mut self, place: Place) -> Result<()> {
        self.ids.append_value(document_id(&self.uri, place.offset))?;
        self.offset.append_value(place.offset);
        Ok(())
    }

    fn next_row(&mut self) -> Result<()> {
        self.rows += 1;
        if self.rows >= BATCH_ROWS || self.bytes >= BATCH_TEXT_BYTES { self.flush() } else { Ok(()) }
    }

    /// Send what is there. Ordinals count from 0 in every batch until [`Ordinals`] sets them.
    pub fn flush(&mut self) -> Result<()> {
        if self.rows == 0 {
            return Ok(());
        }
        let rows = self.rows;
        let same =
            |value: &str| Arc::new(StringViewArray::from_iter_values(std::iter::repeat_n(value, rows))) as ArrayRef;
        let columns: Vec<ArrayRef> = vec![
            Arc::new(self.ids.finish()),
            Arc::new(UInt64Array::from_iter_values(0..rows as u64)),
            Arc::new(self.text.finish()),
            Arc::new(self.url.finish()),
            same(&self.source),
            Arc::new(self.language.finish()),
            Arc::new(self.timestamp.finish()),
            Arc::new(self.metadata.finish()),
            Arc::new(self.rule.finish()),
            same(&self.uri),
            Arc::new(self.record.finish()),
            Arc::new(self.offset.finish()),
            Arc::new(self.detail.finish()),
            Arc::new(self.excerpt.finish()),
        ];
        self.rows = 0;
        self.bytes = 0;
        (self.send)(RecordBatch::try_new(SCHEMA.clone(), columns)?)
    }
}

fn append(builder: &mut StringViewBuilder, value: Option<&str>) -> Result<()> {
    match value {
        Some(value) => builder.try_append_value(value)?,
        None => builder.append_null(),
    }
    Ok(())
}

/// Numbers the rows of one task in the order in which the scan hands them on.
pub(super) struct Ordinals {
    shard: u32,
    next: AtomicU64,
}

impl Ordinals {
    pub fn new(shard: u32) -> Self {
        Self { shard, next: AtomicU64::new(0) }
    }

    /// Replace the local ordinals of a batch.
    pub fn set(&self, batch: RecordBatch) -> Result<RecordBatch> {
        let rows = batch.num_rows() as u64;
        let first = self.next.fetch_add(rows, Ordering::AcqRel);
        let end = u32::try_from(first + rows).map_err(|_| {
            DataFusionError::Execution(format!(
                "task {} has more than 4294967295 records; use smaller files",
                self.shard
            ))
        })?;
        let ordinals = (end - rows as u32..end).map(|record| document::ordinal(self.shard, record));
        let mut columns = batch.columns().to_vec();
        columns[ORDINAL] = Arc::new(UInt64Array::from_iter_values(ordinals));
        Ok(RecordBatch::try_new(batch.schema(), columns)?)
    }
}
