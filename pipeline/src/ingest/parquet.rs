//! Parquet input: one row per document, columns by the field mapping.
//!
//! Files are decoded page by page, so that a row group of any size needs little memory. A file of another
//! schema, a broken file and a broken row group are one quarantined record each.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, RecordBatch, StringViewArray, TimestampMillisecondArray};
use arrow::compute::{can_cast_types, cast};
use arrow::datatypes::{DataType, Float64Type, Int64Type, SchemaRef, TimeUnit, UInt64Type};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use bytes::Bytes;
use datafusion::error::{DataFusionError, Result};
use object_store::path::Path;
use object_store::{GetResultPayload, ObjectStore, ObjectStoreExt};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use parquet::errors::ParquetError;
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::{ChunkReader, Length};
use serde_json::{Map, Value};
use tokio::runtime::Handle;

use super::config::FieldMapping;
use super::json::{Span, missing_field, parse_time, unix_time};
use super::rows::{Document, Place, Reason, Rows};
use crate::shard::BATCH_ROWS;

/// Decoded bytes of a batch, as far as the averages of the row group tell.
const BATCH_BYTES: i64 = 8 << 20;

/// Bytes fetched at a time from a store that is not on this machine.
const BLOCK_BYTES: u64 = 256 << 10;

/// An opened Parquet file, read page by page; for threads that may block.
pub(super) enum ParquetFile {
    /// On this machine.
    Local(File),
    /// Anywhere else.
    Remote(Remote),
}

/// A file in an object store.
#[derive(Clone)]
pub(super) struct Remote {
    store: Arc<dyn ObjectStore>,
    path: Path,
    size: u64,
    runtime: Handle,
}

impl ParquetFile {
    /// Open `path`.
    pub async fn open(store: Arc<dyn ObjectStore>, path: &Path) -> Result<Self> {
        let found = store.get(path).await.map_err(|e| DataFusionError::ObjectStore(Box::new(e)))?;
        Ok(match found.payload {
            GetResultPayload::File(file, _) => Self::Local(file),
            GetResultPayload::Stream(_) => {
                Self::Remote(Remote { store, path: path.clone(), size: found.meta.size, runtime: Handle::current() })
            }
        })
    }

    /// Another handle of the same file.
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Local(file) => Self::Local(file.try_clone()?),
            Self::Remote(remote) => Self::Remote(remote.clone()),
        })
    }
}

impl Remote {
    fn range(&self, range: Range<u64>) -> Result<Bytes, ParquetError> {
        self.runtime.block_on(self.store.get_range(&self.path, range)).map_err(|e| ParquetError::External(Box::new(e)))
    }
}

impl Length for ParquetFile {
    fn len(&self) -> u64 {
        match self {
            Self::Local(file) => Length::len(file),
            Self::Remote(remote) => remote.size,
        }
    }
}

impl ChunkReader for ParquetFile {
    type T = Box<dyn Read + Send>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(match self {
            Self::Local(file) => Box::new(file.get_read(start)?),
            Self::Remote(remote) => Box::new(Blocks { remote: remote.clone(), at: start, block: Bytes::new() }),
        })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        match self {
            Self::Local(file) => file.get_bytes(start, length),
            Self::Remote(remote) => remote.range(start..start + length as u64),
        }
    }
}

/// Reads a remote file from some place on, block by block.
struct Blocks {
    remote: Remote,
    at: u64,
    block: Bytes,
}

impl Read for Blocks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.block.is_empty() && self.at < self.remote.size {
            let end = (self.at + BLOCK_BYTES).min(self.remote.size);
            self.block = self.remote.range(self.at..end).map_err(io::Error::other)?;
            self.at = end;
        }
        let n = self.block.len().min(buffer.len());
        buffer[..n].copy_from_slice(&self.block.split_to(n));
        Ok(n)
    }
}

/// Read the row groups that start in `span`.
pub(super) fn read(file: &ParquetFile, span: Span, fields: &FieldMapping, limit: usize, rows: &mut Rows) -> Result<()> {
    let whole = Place { unit: "file", number: None, offset: 0 };
    let mut refuse = |reason, detail: &str| {
        // A file that was cut into several ranges is refused once.
        if span.start > 0 {
            return Ok(());
        }
        rows.count();
        rows.quarantine(reason, whole, None, detail, b"")
    };
    if file.len() == 0 {
        return refuse(Reason::EmptyFile, "the file holds no record");
    }
    let metadata = match guarded(|| ArrowReaderMetadata::load(file, ArrowReaderOptions::new())) {
        Ok(metadata) => metadata,
        Err(e) => return refuse(Reason::Corrupt, &format!("not a Parquet file that can be read: {}", blame(e)?)),
    };
    let columns = match Columns::new(fields, metadata.schema()) {
        Ok(columns) => columns,
        Err(detail) => return refuse(Reason::WrongSchema, &detail),
    };
    let groups = metadata.metadata().row_groups();
    if groups.iter().all(|group| group.num_rows() == 0) {
        return refuse(Reason::EmptyFile, "the file holds no record");
    }
    let mask = ProjectionMask::roots(metadata.parquet_schema(), columns.roots.iter().copied());
    let mut first_row = 0u64;
    for (number, group) in groups.iter().enumerate() {
        let group_rows = group.num_rows().unsigned_abs();
        let start = group_start(group);
        if span.start <= start && start < span.end {
            let batch_rows = batch_rows(group, &columns.roots);
            let group = Group { file, metadata: &metadata, number, first_row, batch_rows, mask: &mask };
            group.read(&columns, limit, rows)?;
        }
        first_row += group_rows;
    }
    Ok(())
}

/// Where a row group begins in the file.
fn group_start(group: &RowGroupMetaData) -> u64 {
    let starts = group.columns().iter().map(|column| {
        column.dictionary_page_offset().filter(|at| *at > 0).unwrap_or(column.data_page_offset()).unsigned_abs()
    });
    starts.min().unwrap_or(0)
}

fn batch_rows(group: &RowGroupMetaData, roots: &[usize]) -> usize {
    let bytes: i64 = group
        .columns()
        .iter()
        .enumerate()
        .filter(|(leaf, _)| roots.contains(&group.schema_descr().get_column_root_idx(*leaf)))
        .map(|(_, column)| column.uncompressed_size().max(0))
        .fold(0, i64::saturating_add);
    let row = (bytes / group.num_rows().max(1)).max(1);
    usize::try_from(BATCH_BYTES / row).unwrap_or(1).clamp(1, BATCH_ROWS)
}

struct Group<'a> {
    file: &'a ParquetFile,
    metadata: &'a ArrowReaderMetadata,
    number: usize,
    first_row: u64,
    batch_rows: usize,
    mask: &'a ProjectionMask,
}

impl Group<'_> {
    fn read(&self, columns: &Columns, limit: usize, rows: &mut Rows) -> Result<()> {
        let mut row = self.first_row;
        let open = || {
            ParquetRecordBatchReaderBuilder::new_with_metadata(self.file.try_clone()?, self.metadata.clone())
                .with_row_groups(vec![self.number])
                .with_projection(self.mask.clone())
                .with_batch_size(self.batch_rows)
                .build()
        };
        let failed = match guarded(open) {
            Err(e) => Some(e),
            Ok(mut batches) => loop {
                match guarded(|| Ok(batches.next().transpose()?)) {
                    Ok(Some(batch)) => {
                        columns.rows(&batch, row, limit, rows)?;
                        row += batch.num_rows() as u64;
                    }
                    Ok(None) => break None,
                    Err(e) => break Some(e),
                }
            },
        };
        let Some(error) = failed else { return Ok(()) };
        rows.count();
        let detail = format!("row group {} cannot be read from here on: {}", self.number, blame(error)?);
        rows.quarantine(Reason::Corrupt, row_place(row), None, &detail, b"")
    }
}

fn row_place(row: u64) -> Place {
    Place { unit: "row", number: Some(row + 1), offset: row }
}

/// Run a decoder on bytes that may be anything; a panic of it is an error of the file.
fn guarded<T>(decode: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, ParquetError> {
    catch_unwind(AssertUnwindSafe(decode))
        .unwrap_or_else(|_| Err(ParquetError::General("the decoder gave up on malformed pages".into())))
}

/// The text of an error of the file; an error of the storage is given back.
fn blame(error: ParquetError) -> Result<String> {
    if let ParquetError::External(inner) = &error {
        let storage = match inner.downcast_ref::<io::Error>() {
            Some(io) => io.raw_os_error().is_some(),
            None => inner.is::<object_store::Error>(),
        };
        if storage {
            return Err(DataFusionError::ParquetError(Box::new(error)));
        }
    }
    Ok(error.to_string())
}

/// Where the mapped fields are in a file.
struct Columns {
    /// Top-level columns to read.
    roots: Vec<usize>,
    text: String,
    url: Option<String>,
    language: Option<String>,
    timestamp: Option<String>,
    /// Key in the metadata, and field.
    metadata: Vec<(String, String)>,
}

impl Columns {
    /// Find the fields in the schema of a file, or say why it is the wrong one.
    fn new(fields: &FieldMapping, schema: &SchemaRef) -> Result<Self, String> {
        let there: Vec<String> = schema.fields().iter().map(|f| f.name().clone()).collect();
        let Some(text) = field_type(schema, &fields.text) else {
            return Err(missing_field(&fields.text, &there));
        };
        if !is_text(&text) {
            return Err(format!("column {:?} is {text}, not a string; columns: {}", fields.text, there.join(", ")));
        }
        let optional = |name: &String| field_type(schema, name).map(|_| name.clone());
        let mut metadata: Vec<(String, String)> = Vec::new();
        metadata.extend(fields.id.as_ref().and_then(optional).map(|name| ("id".to_owned(), name)));
        metadata.extend(fields.metadata.iter().filter_map(optional).map(|name| (name.clone(), name)));
        let mut columns = Self {
            roots: Vec::new(),
            text: fields.text.clone(),
            url: optional(&fields.url),
            language: optional(&fields.language),
            timestamp: optional(&fields.timestamp),
            metadata,
        };
        let names = [Some(&columns.text), columns.url.as_ref(), columns.language.as_ref(), columns.timestamp.as_ref()];
        let metadata = columns.metadata.iter().map(|(_, name)| name);
        let mut roots: Vec<usize> =
            names.into_iter().flatten().chain(metadata).filter_map(|name| root(schema, name)).collect();
        roots.sort_unstable();
        roots.dedup();
        columns.roots = roots;
        Ok(columns)
    }

    /// Add the rows of a batch, whose first row is row `first` of the file.
    fn rows(&self, batch: &RecordBatch, first: u64, limit: usize, rows: &mut Rows) -> Result<()> {
        let strings = |name: &str| -> Result<Option<StringViewArray>> {
            let Some(array) = array(batch, name)? else { return Ok(None) };
            if !can_cast_types(array.data_type(), &DataType::Utf8View) {
                return Ok(None);
            }
            Ok(Some(cast(&array, &DataType::Utf8View)?.as_string_view().clone()))
        };
        let optional = |name: &Option<String>| name.as_deref().map_or(Ok(None), strings);
        let Some(raw_text) = array(batch, &self.text)? else {
            return Err(DataFusionError::Internal(format!("column {} was not read", self.text)));
        };
        let text = cast(&raw_text, &DataType::Utf8View)?;
        let text = text.as_string_view();
        let url = optional(&self.url)?;
        let language = optional(&self.language)?;
        let timestamp = match &self.timestamp {
            Some(name) => array(batch, name)?.map(Times::new).transpose()?,
            None => None,
        };
        let metadata: Vec<(&str, ArrayRef)> = self
            .metadata
            .iter()
            .filter_map(|(key, name)| Some(array(batch, name).transpose()?.map(|array| (key.as_str(), array))))
            .collect::<Result<_>>()?;
        let value = |column: &Option<StringViewArray>, row: usize| {
            column.as_ref().filter(|c| c.is_valid(row)).map(|c| c.value(row).to_owned())
        };
        for row in 0..batch.num_rows() {
            let place = row_place(first + row as u64);
            let url = value(&url, row);
            rows.count();
            if text.is_null(row) {
                let (reason, detail) = if raw_text.is_null(row) {
                    (Reason::MissingText, format!("column {:?} is null", self.text))
                } else {
                    (Reason::InvalidUtf8, format!("column {:?} is not UTF-8", self.text))
                };
                rows.quarantine(reason, place, url.as_deref(), &detail, b"")?;
                continue;
            }
            let text = text.value(row);
            if text.len() > limit {
                let detail = format!("{} bytes, max_record_bytes is {limit}", text.len());
                rows.quarantine(Reason::TooLong, place, url.as_deref(), &detail, text.as_bytes())?;
                continue;
            }
            let mut object = Map::new();
            for (key, array) in &metadata {
                let value = json_value(array, row)?;
                if !value.is_null() {
                    object.insert((*key).to_owned(), value);
                }
            }
            let mut time = None;
            if let (Some(times), Some(name)) = (&timestamp, &self.timestamp) {
                time = times.get(row);
                if time.is_none() {
                    let value = json_value(&times.raw, row)?;
                    if !value.is_null() {
                        object.insert(name.clone(), value);
                    }
                }
            }
            let document = Document {
                text: Cow::Borrowed(text),
                url: url.map(Cow::Owned),
                language: value(&language, row).map(Cow::Owned),
                timestamp: time,
                metadata: (!object.is_empty()).then(|| Value::Object(object).to_string()),
            };
            rows.keep(place, document)?;
        }
        Ok(())
    }
}

/// A time column of any type.
struct Times {
    raw: ArrayRef,
    kind: TimeKind,
}

enum TimeKind {
    Millis(TimestampMillisecondArray),
    Unix(Float64Array),
    Text(StringViewArray),
    Unknown,
}

impl Times {
    fn new(raw: ArrayRef) -> Result<Self> {
        let millis = DataType::Timestamp(TimeUnit::Millisecond, Some("UTC".into()));
        let kind = match raw.data_type() {
            DataType::Timestamp(..) | DataType::Date32 | DataType::Date64 => {
                TimeKind::Millis(cast(&raw, &millis)?.as_primitive().clone())
            }
            kind if kind.is_numeric() => TimeKind::Unix(cast(&raw, &DataType::Float64)?.as_primitive().clone()),
            kind if can_cast_types(kind, &DataType::Utf8View) => {
                TimeKind::Text(cast(&raw, &DataType::Utf8View)?.as_string_view().clone())
            }
            _ => TimeKind::Unknown,
        };
        Ok(Self { raw, kind })
    }

    fn get(&self, row: usize) -> Option<i64> {
        match &self.kind {
            TimeKind::Millis(times) => times.is_valid(row).then(|| times.value(row)),
            TimeKind::Unix(times) => times.is_valid(row).then(|| times.value(row)).and_then(unix_time),
            TimeKind::Text(times) => times.is_valid(row).then(|| times.value(row)).and_then(parse_time),
            TimeKind::Unknown => None,
        }
    }
}

fn is_text(kind: &DataType) -> bool {
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => true,
        DataType::Dictionary(_, value) => is_text(value),
        _ => false,
    }
}

/// Index of the top-level column that holds field `name`.
fn root(schema: &SchemaRef, name: &str) -> Option<usize> {
    let head = name.split_once('.').map_or(name, |(head, _)| head);
    schema.index_of(name).or_else(|_| schema.index_of(head)).ok()
}

/// Type of field `name`, which may be a dotted path into structs.
fn field_type(schema: &SchemaRef, name: &str) -> Option<DataType> {
    if let Ok(field) = schema.field_with_name(name) {
        return Some(field.data_type().clone());
    }
    let mut parts = name.split('.');
    let mut kind = schema.field_with_name(parts.next()?).ok()?.data_type().clone();
    for part in parts {
        let DataType::Struct(fields) = kind else { return None };
        kind = fields.iter().find(|f| f.name() == part)?.data_type().clone();
    }
    Some(kind)
}

/// The values of field `name`, null where a struct above it is null.
fn array(batch: &RecordBatch, name: &str) -> Result<Option<ArrayRef>> {
    if let Some(array) = batch.column_by_name(name) {
        return Ok(Some(array.clone()));
    }
    let mut parts = name.split('.');
    let Some(mut array) = parts.next().and_then(|head| batch.column_by_name(head)).cloned() else { return Ok(None) };
    for part in parts {
        let Some(parent) = array.as_struct_opt() else { return Ok(None) };
        let Some(child) = parent.column_by_name(part).cloned() else { return Ok(None) };
        array = match parent.nulls() {
            Some(nulls) => {
                let nulls = arrow::buffer::NullBuffer::union(Some(nulls), child.logical_nulls().as_ref());
                arrow::array::make_array(child.to_data().into_builder().nulls(nulls).build()?)
            }
            None => child,
        };
    }
    Ok(Some(array))
}

/// One value as JSON.
fn json_value(array: &dyn Array, row: usize) -> Result<Value> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    let kind = array.data_type();
    Ok(match kind {
        DataType::Boolean => array.as_boolean().value(row).into(),
        kind if kind.is_unsigned_integer() => {
            cast(&array.slice(row, 1), &DataType::UInt64)?.as_primitive::<UInt64Type>().value(0).into()
        }
        kind if kind.is_signed_integer() => {
            cast(&array.slice(row, 1), &DataType::Int64)?.as_primitive::<Int64Type>().value(0).into()
        }
        kind if kind.is_floating() => {
            cast(&array.slice(row, 1), &DataType::Float64)?.as_primitive::<Float64Type>().value(0).into()
        }
        DataType::List(_) => json_list(&array.as_list::<i32>().value(row))?,
        DataType::LargeList(_) => json_list(&array.as_list::<i64>().value(row))?,
        DataType::Struct(_) => {
            let structs = array.as_struct();
            let mut object = Map::new();
            for (name, column) in structs.column_names().into_iter().zip(structs.columns()) {
                object.insert(name.to_owned(), json_value(column, row)?);
            }
            Value::Object(object)
        }
        _ => ArrayFormatter::try_new(array, &FormatOptions::default())?.value(row).to_string().into(),
    })
}

fn json_list(items: &ArrayRef) -> Result<Value> {
    Ok(Value::Array((0..items.len()).map(|i| json_value(items, i)).collect::<Result<_>>()?))
}
