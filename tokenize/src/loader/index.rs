//! What a loader knows of its shards before it reads them: their footers.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::file::metadata::RowGroupMetaData;
use pipeline::Shard;
use pipeline::digest::Digest;

use crate::error::{Error, Result};
use crate::shard::{METADATA_KEY, ShardMetadata};

/// The shards of a data set: a few words each, whatever their number of documents.
#[derive(Clone)]
pub struct Index {
    shards: Arc<[IndexedShard]>,
    metadata: Arc<ShardMetadata>,
    tokens: u64,
    fingerprint: Digest,
}

/// One shard with tokens in it.
pub struct IndexedShard {
    /// The file.
    pub path: std::path::PathBuf,
    /// Tokens in it.
    pub tokens: u64,
}

impl Index {
    /// Read the footers.
    pub fn open(shards: &[Shard]) -> Result<Self> {
        let mut indexed = Vec::with_capacity(shards.len());
        let mut common: Option<ShardMetadata> = None;
        for shard in shards {
            let footer = read_footer(&shard.path)?;
            let metadata = shard_metadata(&shard.path, &footer)?;
            let fault = |reason: String| Error::Shard { path: shard.path.clone(), row_group: None, reason };
            let tokens = row_group_tokens(&shard.path, &footer)?.iter().sum();
            if (tokens, shard.rows) != (metadata.tokens, metadata.documents) {
                return Err(fault(format!(
                    "the footer promises {} tokens of {} documents, the row groups have {tokens} of {}",
                    metadata.tokens, metadata.documents, shard.rows
                )));
            }
            let same = ShardMetadata { tokens: 0, documents: 0, ..metadata };
            match &common {
                None => common = Some(same),
                Some(first) if *first != same => {
                    return Err(fault("it was made with another tokenizer or seed than the first shard".into()));
                }
                Some(_) => {}
            }
            if tokens > 0 {
                indexed.push(IndexedShard { path: shard.path.clone(), tokens });
            }
        }
        let tokens = indexed.iter().map(|s| s.tokens).sum();
        match common {
            Some(metadata) if tokens > 0 => {
                let digests: Vec<u8> = shards.iter().flat_map(|s| s.xxh3.0.to_be_bytes()).collect();
                let fingerprint = Digest::of(&digests);
                Ok(Self { shards: indexed.into(), metadata: Arc::new(metadata), tokens, fingerprint })
            }
            _ => Err(Error::Loader("there are no tokens to load: every token shard is empty".into())),
        }
    }

    /// Shards that have tokens, in order.
    pub fn shards(&self) -> &[IndexedShard] {
        &self.shards
    }

    /// What all shards have in common.
    pub fn metadata(&self) -> &ShardMetadata {
        &self.metadata
    }

    /// Tokens in all.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Digest of the checksums of the shards.
    pub fn fingerprint(&self) -> Digest {
        self.fingerprint
    }
}

/// The footer of a token shard.
pub fn read_footer(path: &Path) -> Result<ArrowReaderMetadata> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    ArrowReaderMetadata::load(&file, ArrowReaderOptions::new()).map_err(|e| Error::Shard {
        path: path.into(),
        row_group: None,
        reason: e.to_string(),
    })
}

/// What the footer says about the shard.
pub fn shard_metadata(path: &Path, footer: &ArrowReaderMetadata) -> Result<ShardMetadata> {
    let fault = |reason: String| Error::Shard { path: path.into(), row_group: None, reason };
    let pairs = footer.metadata().file_metadata().key_value_metadata();
    let value = pairs.into_iter().flatten().find(|pair| pair.key == METADATA_KEY).and_then(|pair| pair.value.as_ref());
    let value = value.ok_or_else(|| fault(format!("not a token shard: its footer has no {METADATA_KEY}")))?;
    serde_json::from_str(value).map_err(|e| fault(format!("{METADATA_KEY}: {e}")))
}

/// Tokens in each row group. No document is empty, so every value of the column is a token.
pub fn row_group_tokens(path: &Path, footer: &ArrowReaderMetadata) -> Result<Vec<u64>> {
    let groups = footer.metadata().row_groups().iter().enumerate();
    groups
        .map(|(number, group)| {
            let column = token_column(group).ok_or_else(|| Error::Shard {
                path: path.into(),
                row_group: Some(number),
                reason: "no column tokens".into(),
            })?;
            Ok(group.column(column).num_values() as u64)
        })
        .collect()
}

/// Number of the leaf column that holds the tokens.
pub fn token_column(group: &RowGroupMetaData) -> Option<usize> {
    group.columns().iter().position(|c| c.column_path().parts().first().is_some_and(|name| name == "tokens"))
}
