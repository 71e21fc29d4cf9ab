//! What a loader knows of its shards before it reads them: what their stage's journal tells, or else their footers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use pipeline::Shard;
use pipeline::digest::Digest;

use super::row_group::token_column;
use super::storage::{Object, Storage};
use crate::error::{Error, Result};
use crate::shard::{CHECKSUM_KEY, METADATA_KEY, ShardMetadata};

/// Bytes at the end of a shard that are read for its footer, at first.
const FOOTER_BYTES: u64 = 64 << 10;
/// Values of one column in a row group, at most: a list column counts them so.
const MOST_VALUES: i64 = i32::MAX as i64;

/// A shard, and what is known of it before it is opened.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The shard.
    pub shard: Shard,
    /// What the journal of its stage tells, if it does: the source (none where there is no document) and the number of tokens,
    /// which is 0 only where there is no document.
    pub told: Option<(Option<String>, u64)>,
}

/// The shards of a data set: a few words each, whatever their number of documents.
#[derive(Clone)]
pub struct Index {
    storage: Storage,
    sources: Arc<[Source]>,
    metadata: Arc<ShardMetadata>,
    tokens: u64,
    fingerprint: Digest,
}

/// The shards of one source that have tokens, in order.
pub struct Source {
    /// Its name.
    pub name: String,
    /// Its shards.
    pub shards: Vec<IndexedShard>,
    /// Tokens in them.
    pub tokens: u64,
    /// Documents in them.
    pub documents: u64,
}

/// One shard with tokens in it.
pub struct IndexedShard {
    /// Its place in the data set.
    pub number: u32,
    /// The file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Tokens in it.
    pub tokens: u64,
    /// Documents in it.
    documents: u64,
}

impl IndexedShard {
    /// As its storage knows it.
    pub fn object(&self) -> Object<'_> {
        Object { number: self.number, path: &self.path }
    }
}

impl Index {
    /// An index of shards by what is told of them. Of each that nothing is told of the footer is read, and of the first of the
    /// others, for what all have in common; theirs are looked at by [`Self::check`] when they are opened.
    pub fn open(shards: &[Listed], storage: Storage) -> Result<Self> {
        let mut sources: BTreeMap<String, Source> = BTreeMap::new();
        let mut common: Option<ShardMetadata> = None;
        let mut total = 0u64;
        let object = |number: usize| Object { number: number as u32, path: &shards[number].shard.path };
        let is_read = |listed: &Listed, common: &Option<ShardMetadata>| match &listed.told {
            Some((_, tokens)) => *tokens > 0 && common.is_none(),
            None => true,
        };
        for (number, listed) in shards.iter().enumerate() {
            let shard = &listed.shard;
            let fault = |reason: String| Error::Shard { path: shard.path.clone(), row_group: None, reason };
            // It may be opened days from now: that it is not there is better known today.
            let there = storage.length(&object(number)).map_err(|e| Error::io(&shard.path, e))?;
            if let Some(there) = there.filter(|there| *there != shard.bytes) {
                return Err(fault(format!(
                    "it has {there} bytes, its stage's journal promises {}: have the stage made again, or copied again",
                    shard.bytes
                )));
            }
            let (name, tokens) = match &listed.told {
                Some(told) if !is_read(listed, &common) => told.clone(),
                told => {
                    // A few footers are on their way while one is looked at.
                    for (ahead, next) in shards.iter().enumerate().skip(number + 1).take(16) {
                        if next.told.is_none() {
                            let range = next.shard.bytes.saturating_sub(FOOTER_BYTES)..next.shard.bytes;
                            storage.read_ahead(&object(ahead), std::iter::once(range));
                        }
                    }
                    let footer = read_footer(&storage, &object(number), shard.bytes)?;
                    let metadata = shard_metadata(&shard.path, &footer)?;
                    let tokens = row_group_tokens(&shard.path, &footer)?.iter().sum();
                    check_counts(&metadata, tokens, shard.rows).map_err(fault)?;
                    let name = metadata.source.clone().ok_or_else(|| fault(OF_SEVERAL_SOURCES.into()))?;
                    if told.as_ref().is_some_and(|told| *told != (Some(name.clone()), tokens)) {
                        return Err(fault(OTHER_THAN_TOLD.into()));
                    }
                    let same = in_common(&metadata);
                    if common.as_ref().is_some_and(|first| *first != same) {
                        return Err(fault(OTHER_TOKENIZER.into()));
                    }
                    common = Some(same);
                    (Some(name), tokens)
                }
            };
            if let Some(name) = name.filter(|_| tokens > 0) {
                let source =
                    sources.entry(name.clone()).or_insert(Source { name, shards: Vec::new(), tokens: 0, documents: 0 });
                let sums = total.checked_add(tokens).zip(source.documents.checked_add(shard.rows));
                (total, source.documents) = sums.ok_or_else(|| fault(TOO_MANY.into()))?;
                // Not more than all.
                source.tokens += tokens;
                let (number, path, bytes, documents) = (number as u32, shard.path.clone(), shard.bytes, shard.rows);
                source.shards.push(IndexedShard { number, path, bytes, tokens, documents });
            }
        }
        match common {
            Some(metadata) if total > 0 => {
                let digests: Vec<u8> = shards.iter().flat_map(|s| s.shard.xxh3.0.to_be_bytes()).collect();
                let fingerprint = Digest::of(&digests);
                let sources = sources.into_values().collect();
                Ok(Self { storage, sources, metadata: Arc::new(metadata), tokens: total, fingerprint })
            }
            _ => Err(Error::Loader("there are no tokens to load: every token shard is empty".into())),
        }
    }

    /// Refuses a shard of a source whose footer says something else than the index: it was told wrong, or the file is another.
    pub fn check(&self, source: &Source, shard: &IndexedShard, metadata: &ShardMetadata, tokens: u64) -> Result<()> {
        let fault = |reason: String| Error::Shard { path: shard.path.clone(), row_group: None, reason };
        check_counts(metadata, tokens, shard.documents).map_err(fault)?;
        if in_common(metadata) != *self.metadata {
            return Err(fault(OTHER_TOKENIZER.into()));
        }
        if tokens != shard.tokens || metadata.source.as_ref() != Some(&source.name) {
            return Err(fault(OTHER_THAN_TOLD.into()));
        }
        Ok(())
    }

    /// Where the shards lie.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Sources that have tokens, by name.
    pub fn sources(&self) -> &[Source] {
        &self.sources
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

const OF_SEVERAL_SOURCES: &str =
    "it has documents of several sources: a shard of the first pass, not of the shuffled tokens";
const OTHER_TOKENIZER: &str = "it was made with another tokenizer or seed than the first shard";
const TOO_MANY: &str = "with those of the shards before it, the journal of its stage promises more tokens or documents than can be \
                        counted: have the stage made again, or copied again with its journal";
const OTHER_THAN_TOLD: &str = "its source or its number of tokens is not what the journal of its stage promised when the shards were opened: \
                               have the stage made again, or copied again with its journal";

/// Whether row groups of so many tokens are what the footer says, and the documents those of the journal; if not, why.
fn check_counts(metadata: &ShardMetadata, tokens: u64, documents: u64) -> Result<(), String> {
    if (tokens, documents) == (metadata.tokens, metadata.documents) {
        return Ok(());
    }
    Err(format!(
        "the footer promises {} tokens of {} documents, the row groups have {tokens} of {documents}",
        metadata.tokens, metadata.documents
    ))
}

/// What all shards of a data set have in common.
fn in_common(metadata: &ShardMetadata) -> ShardMetadata {
    let mut common = metadata.clone();
    (common.tokens, common.documents, common.source) = (0, 0, None);
    common.row_groups.clear();
    common
}

/// The footer of a token shard of `bytes` bytes, whose row groups lie in the file.
pub fn read_footer(storage: &Storage, object: &Object<'_>, bytes: u64) -> Result<ParquetMetaData> {
    let fault = |reason: String| Error::Shard { path: object.path.into(), row_group: None, reason };
    let mut reader = ParquetMetaDataReader::new();
    let mut wanted = FOOTER_BYTES.min(bytes);
    loop {
        let tail: Bytes = storage.read(object, bytes - wanted..bytes).map_err(|e| Error::io(object.path, e))?;
        match reader.try_parse_sized(&tail, bytes) {
            Ok(()) => {
                let footer = reader.finish().map_err(|e| fault(e.to_string()))?;
                check_row_groups(&footer, bytes).map_err(|(row_group, reason)| Error::Shard {
                    path: object.path.into(),
                    row_group: Some(row_group),
                    reason,
                })?;
                return Ok(footer);
            }
            Err(ParquetError::NeedMoreData(more)) if more as u64 > wanted && more as u64 <= bytes => {
                wanted = more as u64;
            }
            Err(error) => return Err(fault(error.to_string())),
        }
    }
}

/// Refuse a footer by which bytes outside of a file of `bytes` bytes would be read: the row group, and why.
///
/// `parquet` takes every number as it is, asserts later that offsets are not negative, and whoever reads allocates
/// what it is told. So a damaged number has to be met here.
fn check_row_groups(footer: &ParquetMetaData, bytes: u64) -> Result<(), (usize, String)> {
    for (number, group) in footer.row_groups().iter().enumerate() {
        for chunk in group.columns() {
            let start = chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset());
            let (size, values) = (chunk.compressed_size(), chunk.num_values());
            let end = u64::try_from(start).ok().zip(u64::try_from(size).ok()).and_then(|(s, n)| s.checked_add(n));
            let lies_inside = end.is_some_and(|end| end <= bytes);
            if !lies_inside || !(0..=MOST_VALUES).contains(&values) || group.num_rows() < 0 {
                let column = chunk.column_path().string();
                return Err((
                    number,
                    format!(
                        "its footer is damaged: it puts {values} values of column {column} into {size} bytes from byte \
                         {start} on, in a file of {bytes} bytes; have the stage made again, or copied again"
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// What the footer says about the shard.
pub fn shard_metadata(path: &Path, footer: &ParquetMetaData) -> Result<ShardMetadata> {
    let fault = |reason: String| Error::Shard { path: path.into(), row_group: None, reason };
    let pairs = footer.file_metadata().key_value_metadata();
    let value_of =
        |key: &str| pairs.into_iter().flatten().find(|pair| pair.key == key).and_then(|pair| pair.value.as_ref());
    let value = value_of(METADATA_KEY);
    let value = value.ok_or_else(|| fault(format!("not a token shard: its footer has no {METADATA_KEY}")))?;
    if value_of(CHECKSUM_KEY).is_some_and(|checksum| *checksum != Digest::of(value.as_bytes()).to_string()) {
        return Err(fault(format!(
            "its footer is damaged: {METADATA_KEY} fails its checksum; have the stage made again"
        )));
    }
    serde_json::from_str(value).map_err(|e| fault(format!("{METADATA_KEY}: {e}")))
}

/// Tokens in each row group. No document is empty, so every value of the column is a token.
pub fn row_group_tokens(path: &Path, footer: &ParquetMetaData) -> Result<Vec<u64>> {
    let fault = |reason: String| Error::Shard { path: path.into(), row_group: None, reason };
    let column = token_column(footer).map_err(fault)?;
    Ok(footer.row_groups().iter().map(|group| group.column(column).num_values() as u64).collect())
}
