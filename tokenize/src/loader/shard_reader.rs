//! One token shard, read by row groups.

use std::path::{Path, PathBuf};

use parquet::file::metadata::ParquetMetaData;

use super::index::{read_footer, row_group_tokens, shard_metadata};
use super::row_group::{Documents, byte_range, decode, token_column};
use super::storage::{Object, Storage};
use crate::error::{Error, Result};
use crate::shard::ShardMetadata;

/// Decodes the tokens of a shard, and nothing else of it. Holds its footer.
pub struct ShardReader {
    storage: Storage,
    number: u32,
    path: PathBuf,
    footer: ParquetMetaData,
    column: usize,
    metadata: ShardMetadata,
}

impl ShardReader {
    /// Of a local file.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
        Self::open_in(Storage::Local, &Object { number: 0, path }, bytes)
    }

    /// Of a shard of `bytes` bytes.
    pub(super) fn open_in(storage: Storage, object: &Object<'_>, bytes: u64) -> Result<Self> {
        let path = object.path.to_path_buf();
        let footer = read_footer(&storage, object, bytes)?;
        let fault = |reason| Error::Shard { path: path.clone(), row_group: None, reason };
        let column = token_column(&footer).map_err(fault)?;
        let metadata = shard_metadata(&path, &footer)?;
        if metadata.row_groups.len() != footer.num_row_groups() {
            let (has, promised) = (footer.num_row_groups(), metadata.row_groups.len());
            return Err(fault(format!("it has {has} row groups, and checksums of {promised}")));
        }
        Ok(Self { storage, number: object.number, path, footer, column, metadata })
    }

    /// What the footer says about the shard.
    pub fn metadata(&self) -> &ShardMetadata {
        &self.metadata
    }

    /// Tokens of each row group.
    pub fn row_group_tokens(&self) -> Result<Vec<u64>> {
        row_group_tokens(&self.path, &self.footer)
    }

    /// Decode a row group, checked against its checksum, into buffers that are used again.
    ///
    /// # Errors
    /// [`Error::Shard`] with file and row group.
    pub fn read(&self, row_group: usize, documents: &mut Documents) -> Result<()> {
        let fault = |reason| Error::Shard { path: self.path.clone(), row_group: Some(row_group), reason };
        let checksum =
            self.metadata.row_groups.get(row_group).copied().ok_or_else(|| fault("it is not there".into()))?;
        let object = Object { number: self.number, path: &self.path };
        let range = byte_range(&self.footer, row_group, self.column);
        let bytes = self.storage.read(&object, range).map_err(|e| fault(e.to_string()))?;
        let expected = (self.metadata.vocabulary_size, checksum);
        decode(&self.footer, row_group, self.column, bytes, expected, documents).map_err(fault)
    }

    /// Begin to read row groups that are wanted soon, where that takes time.
    pub(super) fn read_ahead(&self, row_groups: impl Iterator<Item = usize>) {
        let object = Object { number: self.number, path: &self.path };
        self.storage.read_ahead(&object, row_groups.map(|group| byte_range(&self.footer, group, self.column)));
    }
}
