//! The bytes of a file: from an object store through a decompressor to a blocking reader.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use arrow::array::RecordBatch;
use bytes::Bytes;
use datafusion::error::{DataFusionError, Result};
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, GetResultPayload, ObjectStore};
use tokio::runtime::Handle;
use tokio::sync::mpsc::Sender;

use super::listing::Compression;
use super::rows::Reason;

/// Bytes asked for at a time.
pub(super) const CHUNK_BYTES: usize = 256 << 10;

/// Marks an error of the storage, so that it is never taken for a defect of the file's content.
#[derive(Debug)]
struct StorageError(io::Error);

impl std::fmt::Display for StorageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for StorageError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

/// What an error while reading says about the file: `Err` where it says nothing, because the storage
/// failed or nobody wants the rows any more.
pub(super) fn blame(error: io::Error) -> Result<(Reason, String), io::Error> {
    if error.get_ref().is_some_and(|e| e.is::<StorageError>()) {
        return Err(error);
    }
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Ok((Reason::Truncated, format!("the compressed data ends too early: {error}"))),
        _ => Ok((Reason::Corrupt, format!("cannot be decompressed: {error}"))),
    }
}

/// Reads a file of an object store, blocking; for threads that may block.
///
/// Gives an error once the receiver of the rows is gone, so that the reading thread ends soon after
/// its plan was dropped.
pub(super) struct StoredFile {
    payload: Payload,
    rows: Sender<Result<RecordBatch>>,
}

enum Payload {
    File(File),
    Stream { stream: BoxStream<'static, object_store::Result<Bytes>>, chunk: Bytes, runtime: Handle },
}

impl StoredFile {
    /// Open from byte `start` to the end.
    pub async fn open(
        store: &dyn ObjectStore,
        path: &Path,
        start: u64,
        rows: Sender<Result<RecordBatch>>,
    ) -> Result<Self> {
        let mut options = GetOptions::default();
        if start > 0 {
            options.range = Some(GetRange::Offset(start));
        }
        let found = store.get_opts(path, options).await.map_err(|e| DataFusionError::ObjectStore(Box::new(e)))?;
        let payload = match found.payload {
            GetResultPayload::File(mut file, _) => {
                file.seek(SeekFrom::Start(found.range.start))?;
                Payload::File(file)
            }
            GetResultPayload::Stream(stream) => {
                Payload::Stream { stream, chunk: Bytes::new(), runtime: Handle::current() }
            }
        };
        Ok(Self { payload, rows })
    }
}

impl Read for StoredFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let failed = |e: io::Error| io::Error::new(e.kind(), StorageError(e));
        let gone = || failed(io::Error::other("the reader was stopped"));
        if self.rows.is_closed() {
            return Err(gone());
        }
        match &mut self.payload {
            Payload::File(file) => loop {
                match file.read(buffer) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    result => return result.map_err(failed),
                }
            },
            Payload::Stream { stream, chunk, runtime } => {
                while chunk.is_empty() {
                    let next = runtime.block_on(async {
                        tokio::select! {
                            next = stream.next() => Ok(next),
                            () = self.rows.closed() => Err(gone()),
                        }
                    })?;
                    match next {
                        Some(Ok(bytes)) => *chunk = bytes,
                        Some(Err(e)) => return Err(failed(io::Error::other(e))),
                        None => return Ok(0),
                    }
                }
                let n = chunk.len().min(buffer.len());
                buffer[..n].copy_from_slice(&chunk.split_to(n));
                Ok(n)
            }
        }
    }
}

/// The decompressed bytes of `file`: all members of a gzip file, all frames of a Zstandard file.
pub(super) fn decompress<'a>(
    file: impl Read + Send + 'a,
    compression: Compression,
) -> io::Result<Box<dyn Read + Send + 'a>> {
    Ok(match compression {
        Compression::None => Box::new(file),
        Compression::Gzip => {
            Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(CHUNK_BYTES, file)))
        }
        Compression::Zstd => {
            Box::new(zstd::stream::read::Decoder::with_buffer(BufReader::with_capacity(CHUNK_BYTES, file))?)
        }
    })
}
