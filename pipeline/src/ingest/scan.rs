//! The input files of one task as a DataFusion table: a [`FileSource`] over [`FileScanConfig`], so that
//! ingest is a scan in a plan like any other, reading through the session's object stores.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::physical_plan::{
    FileGroup, FileOpenFuture, FileOpener, FileScanConfig, FileScanConfigBuilder, FileSource,
};
use datafusion::datasource::projection::{ProjectionOpener, SplitProjection};
use datafusion::datasource::source::DataSourceExec;
use datafusion::datasource::table_schema::TableSchema;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::logical_expr::{Expr, TableType};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::projection::ProjectionExprs;
use datafusion::physical_plan::metrics::ExecutionPlanMetricsSet;
use datafusion::physical_plan::stream::RecordBatchReceiverStream;
use datafusion::physical_plan::{ExecutionPlan, apply_expression_roots};
use futures::{FutureExt, StreamExt};
use object_store::ObjectStore;

use super::bad::BadInTask;
use super::bytes::{StoredFile, decompress};
use super::config::FieldMapping;
use super::json::{self, Fields, Span};
use super::listing::{Compression, FileFormat, InputFile};
use super::parquet::{self, ParquetFile};
use super::rows::{Ordinals, Rows, SCHEMA};
use super::splits::Split;
use super::{text, warc};

/// Batches between the reading thread and the plan.
const BATCHES_AHEAD: usize = 1;

/// A split with what its reader has to know; travels as an extension of [`PartitionedFile`].
#[derive(Clone, Debug)]
struct SplitOf {
    uri: Arc<str>,
    source: Arc<str>,
    format: FileFormat,
    compression: Compression,
    fields: Arc<FieldMapping>,
}

/// Limits and counters of a scan.
#[derive(Clone)]
pub(crate) struct ScanContext {
    /// Number of the task, for ordinals.
    pub shard: u32,
    /// See [`super::IngestConfig::max_record_bytes`].
    pub max_record_bytes: usize,
    /// Counts the records read.
    pub read: Arc<AtomicU64>,
    /// Counts the bad ones.
    pub bad: Arc<BadInTask>,
}

/// The records of some splits, in order, as rows of [`SCHEMA`].
pub(crate) struct RawTable {
    files: Vec<PartitionedFile>,
    context: ScanContext,
}

impl RawTable {
    /// The records of `splits`, each with its file, the name of its source and its field mapping.
    pub fn new<'a>(
        splits: impl IntoIterator<Item = (&'a Split, &'a InputFile, &'a str, Arc<FieldMapping>)>,
        context: ScanContext,
    ) -> crate::Result<Self> {
        let mut files = Vec::new();
        for (split, file, source, fields) in splits {
            let location = object_store::path::Path::from_absolute_path(&file.path)
                .map_err(|e| crate::Error::Corrupt { path: file.path.clone(), reason: e.to_string() })?;
            let mut part = PartitionedFile::new(String::new(), file.size).with_extension(SplitOf {
                uri: file.uri.as_str().into(),
                source: source.into(),
                format: file.format,
                compression: file.compression,
                fields,
            });
            part.object_meta.location = location;
            if let Some(range) = &split.range {
                part = part.with_range(signed(range.start), signed(range.end));
            }
            files.push(part);
        }
        Ok(Self { files, context })
    }
}

/// DataFusion counts bytes of ranges in `i64`.
fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

impl fmt::Debug for RawTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawTable").field("files", &self.files.len()).finish_non_exhaustive()
    }
}

#[async_trait]
impl TableProvider for RawTable {
    fn schema(&self) -> SchemaRef {
        SCHEMA.clone()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    async fn scan(
        &self,
        _session: &dyn Session,
        projection: Option<&Vec<usize>>,
        _filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let config = FileScanConfigBuilder::new(
            ObjectStoreUrl::local_filesystem(),
            Arc::new(RawSource::new(self.context.clone())),
        )
        .with_file_group(FileGroup::new(self.files.clone()))
        .with_preserve_order(true)
        .with_limit(limit)
        .with_projection_indices(projection.cloned())?
        .build();
        Ok(DataSourceExec::from_data_source(config))
    }
}

/// Reads raw files of any of our formats.
#[derive(Clone)]
struct RawSource {
    context: ScanContext,
    schema: TableSchema,
    projection: SplitProjection,
    metrics: ExecutionPlanMetricsSet,
}

impl RawSource {
    fn new(context: ScanContext) -> Self {
        let schema = TableSchema::from(SCHEMA.clone());
        let projection = SplitProjection::unprojected(&schema);
        Self { context, schema, projection, metrics: ExecutionPlanMetricsSet::new() }
    }
}

impl FileSource for RawSource {
    fn create_file_opener(
        &self,
        store: Arc<dyn ObjectStore>,
        _config: &FileScanConfig,
        _partition: usize,
    ) -> Result<Arc<dyn FileOpener>> {
        let opener = RawOpener {
            store,
            context: self.context.clone(),
            ordinals: Arc::new(Ordinals::new(self.context.shard)),
            columns: self.projection.file_indices.clone(),
        };
        ProjectionOpener::try_new(self.projection.clone(), Arc::new(opener), self.schema.file_schema())
    }

    fn table_schema(&self) -> &TableSchema {
        &self.schema
    }

    fn with_batch_size(&self, _batch_size: usize) -> Arc<dyn FileSource> {
        // Batches are bounded in bytes and in rows by the readers.
        Arc::new(self.clone())
    }

    fn projection(&self) -> Option<&ProjectionExprs> {
        Some(&self.projection.source)
    }

    fn try_pushdown_projection(&self, projection: &ProjectionExprs) -> Result<Option<Arc<dyn FileSource>>> {
        let merged = self.projection.source.try_merge(projection)?;
        let projection = SplitProjection::new(self.schema.file_schema(), &merged);
        Ok(Some(Arc::new(Self { projection, ..self.clone() })))
    }

    fn metrics(&self) -> &ExecutionPlanMetricsSet {
        &self.metrics
    }

    fn file_type(&self) -> &str {
        "raw"
    }

    fn supports_repartitioning(&self) -> bool {
        // Splits are planned by the stage: ordinals depend on them.
        false
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        apply_expression_roots(self.projection.source.iter(), f)
    }
}

/// Opens the splits of one scan.
struct RawOpener {
    store: Arc<dyn ObjectStore>,
    context: ScanContext,
    ordinals: Arc<Ordinals>,
    columns: Vec<usize>,
}

impl FileOpener for RawOpener {
    fn open(&self, file: PartitionedFile) -> Result<FileOpenFuture> {
        let split = file
            .extension::<SplitOf>()
            .cloned()
            .ok_or_else(|| DataFusionError::Internal(format!("{} is not a split of the ingest stage", file.path())))?;
        let store = self.store.clone();
        let context = self.context.clone();
        let ordinals = self.ordinals.clone();
        let columns = self.columns.clone();
        Ok(async move {
            let uri = split.uri.clone();
            let blame_file = move |e: DataFusionError| e.context(format!("cannot read {uri}"));
            let batches = open(store, file, split, context).await.map_err(&blame_file)?;
            // Batches of one file are handed on before the next file's: the order is the input's.
            Ok(batches.map(move |batch| Ok(ordinals.set(batch.map_err(&blame_file)?)?.project(&columns)?)).boxed())
        }
        .boxed())
    }
}

type Batches = futures::stream::BoxStream<'static, Result<RecordBatch>>;

/// Read a split on a thread of its own, which ends with the stream.
async fn open(
    store: Arc<dyn ObjectStore>,
    file: PartitionedFile,
    split: SplitOf,
    context: ScanContext,
) -> Result<Batches> {
    let size = file.object_meta.size;
    // A damaged footer may place a row group behind the end of the file. It belongs to the last range, which finds that
    // it cannot be read: else no range would have it, and nobody would count it.
    let end_of = |end: u64| if end == size { u64::MAX } else { end };
    let range = file.range.as_ref().map_or(0..u64::MAX, |r| r.start.unsigned_abs()..end_of(r.end.unsigned_abs()));
    let span = Span { start: range.start, end: range.end, by_offset: split.compression == Compression::None };
    let mut stream = RecordBatchReceiverStream::builder(SCHEMA.clone(), BATCHES_AHEAD);
    let out = stream.tx();
    let path = file.path();
    let input = match split.format {
        FileFormat::Parquet => Input::Parquet(ParquetFile::open(store, path).await?),
        _ => Input::Bytes(StoredFile::open(store.as_ref(), path, span.read_from(), out.clone()).await?),
    };
    stream.spawn_blocking(move || {
        let send = move |batch| {
            out.blocking_send(Ok(batch)).map_err(|_| DataFusionError::Execution("nobody reads the rows".into()))
        };
        let mut rows = Rows::new(split.uri.clone(), split.source.clone(), context.read, context.bad, Box::new(send));
        let limit = context.max_record_bytes;
        match input {
            Input::Parquet(file) => parquet::read(&file, span, &split.fields, limit, &mut rows)?,
            Input::Bytes(bytes) => split.read(bytes, size, span, limit, &mut rows)?,
        }
        rows.flush()
    });
    Ok(stream.build().boxed())
}

enum Input {
    Parquet(ParquetFile),
    Bytes(StoredFile),
}

impl SplitOf {
    /// Read the stored `bytes` of a file that is not Parquet.
    fn read(
        &self,
        bytes: impl std::io::Read + Send + 'static,
        size: u64,
        span: Span,
        limit: usize,
        rows: &mut Rows,
    ) -> Result<()> {
        // An empty compressed file is not a truncated one.
        let compression = if size == 0 { Compression::None } else { self.compression };
        match self.format {
            FileFormat::Jsonl => {
                json::read(decompress(bytes, compression)?, span, &Fields::new(&self.fields), limit, rows)
            }
            FileFormat::Text => text::read(decompress(bytes, compression)?, limit, rows),
            FileFormat::Warc => warc::read(bytes, compression, size, &self.fields, limit, rows),
            FileFormat::Parquet => Err(DataFusionError::Internal("Parquet is not read as a stream of bytes".into())),
        }
    }
}
