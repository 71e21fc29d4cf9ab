//! The endless stream of tokens: epoch after epoch, each in an order of its own.
//!
//! In epoch 0 documents come in the order of the shards, which is a global shuffle already. In later
//! epochs the shards are permuted, the row groups within each shard, and the documents within each row
//! group. So any position is found from prefix sums over shards and over the row groups of one shard,
//! and reading is sequential within a shard.

use std::fs::File;
use std::path::PathBuf;

use arrow::array::{Array, AsArray};
use arrow::datatypes::{DataType, UInt16Type, UInt32Type};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder};

use super::index::{Index, read_footer, row_group_tokens, token_column};
use super::order::{DOCUMENTS, ROW_GROUPS, SHARDS, permutation};
use crate::error::{Error, Result};

/// Reads ranges of the stream. Holds one footer and one row group.
pub struct Stream {
    index: Index,
    seed: u64,
    epoch: Option<EpochOrder>,
    shard: Option<OpenShard>,
    row_group: Option<RowGroup>,
}

/// The shards in the order of an epoch.
struct EpochOrder {
    epoch: u64,
    shards: Vec<u32>,
    /// Position of the first token of each shard, and of the end.
    offsets: Vec<u64>,
}

/// A shard and its row groups in the order of an epoch.
struct OpenShard {
    epoch: u64,
    number: u32,
    path: PathBuf,
    file: File,
    footer: ArrowReaderMetadata,
    row_groups: Vec<u32>,
    offsets: Vec<u64>,
}

/// A decoded row group, its documents in the order of an epoch.
struct RowGroup {
    epoch: u64,
    shard: u32,
    number: u32,
    tokens: Vec<u32>,
    /// Where each document begins.
    starts: Vec<u32>,
}

impl Stream {
    /// The stream of a data set under a seed.
    pub fn new(index: Index, seed: u64) -> Self {
        Self { index, seed, epoch: None, shard: None, row_group: None }
    }

    /// Append `length` tokens from `position` to `tokens`, and to `starts` the places in `tokens` at
    /// which documents begin.
    pub fn read(&mut self, position: u128, length: usize, tokens: &mut Vec<u32>, starts: &mut Vec<u32>) -> Result<()> {
        let end = tokens.len() + length;
        let mut position = position;
        while tokens.len() < end {
            let per_epoch = u128::from(self.index.tokens());
            let (epoch, within) = ((position / per_epoch) as u64, (position % per_epoch) as u64);
            let (group, from) = self.locate(epoch, within)?;
            let take = (group.tokens.len() - from).min(end - tokens.len());
            let first = group.starts.partition_point(|&s| (s as usize) < from);
            let inside = group.starts[first..].iter().take_while(|&&s| (s as usize) < from + take);
            let shift = tokens.len();
            starts.extend(inside.map(|&s| (s as usize - from + shift) as u32));
            tokens.extend_from_slice(&group.tokens[from..from + take]);
            position += take as u128;
        }
        Ok(())
    }

    /// The row group that holds a position of an epoch, and the place in it.
    fn locate(&mut self, epoch: u64, position: u64) -> Result<(&RowGroup, usize)> {
        if self.epoch.as_ref().is_none_or(|e| e.epoch != epoch) {
            self.epoch = Some(self.epoch_order(epoch));
        }
        let order = self.epoch.as_ref().ok_or_else(|| Error::State("no epoch".into()))?;
        let at = order.offsets.partition_point(|&o| o <= position) - 1;
        let (number, within_shard) = (order.shards[at], position - order.offsets[at]);
        if self.shard.as_ref().is_none_or(|s| (s.epoch, s.number) != (epoch, number)) {
            self.shard = Some(self.open_shard(epoch, number)?);
        }
        let shard = self.shard.as_ref().ok_or_else(|| Error::State("no shard".into()))?;
        let at = shard.offsets.partition_point(|&o| o <= within_shard) - 1;
        let (group, within) = (shard.row_groups[at], within_shard - shard.offsets[at]);
        if self.row_group.as_ref().is_none_or(|g| (g.epoch, g.shard, g.number) != (epoch, number, group)) {
            let buffers = self.row_group.take();
            let shard = self.shard.as_ref().ok_or_else(|| Error::State("no shard".into()))?;
            let vocabulary_size = self.index.metadata().vocabulary_size;
            self.row_group = Some(shard.decode(group, self.seed, vocabulary_size, buffers)?);
        }
        let group = self.row_group.as_ref().ok_or_else(|| Error::State("no row group".into()))?;
        Ok((group, within as usize))
    }

    fn epoch_order(&self, epoch: u64) -> EpochOrder {
        let shards = self.index.shards();
        let order = ordered(epoch, &[self.seed, SHARDS, epoch], shards.len());
        let offsets = offsets(order.iter().map(|&s| shards[s as usize].tokens));
        EpochOrder { epoch, shards: order, offsets }
    }

    fn open_shard(&self, epoch: u64, number: u32) -> Result<OpenShard> {
        let path = self.index.shards()[number as usize].path.clone();
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        let footer = read_footer(&path)?;
        let tokens = row_group_tokens(&path, &footer)?;
        let row_groups = ordered(epoch, &[self.seed, ROW_GROUPS, epoch, number.into()], tokens.len());
        let offsets = offsets(row_groups.iter().map(|&g| tokens[g as usize]));
        if offsets.last() != Some(&self.index.shards()[number as usize].tokens) {
            let reason = "it has changed since it was opened".into();
            return Err(Error::Shard { path, row_group: None, reason });
        }
        Ok(OpenShard { epoch, number, path, file, footer, row_groups, offsets })
    }
}

impl OpenShard {
    /// Decode a row group into the buffers of another.
    fn decode(&self, number: u32, seed: u64, vocabulary_size: u32, buffers: Option<RowGroup>) -> Result<RowGroup> {
        let fault = |reason: String| Error::Shard { path: self.path.clone(), row_group: Some(number as usize), reason };
        let (mut tokens, mut starts) = buffers.map_or_else(Default::default, |b| (b.tokens, b.starts));
        tokens.clear();
        starts.clear();
        let metadata = self.footer.metadata().row_group(number as usize);
        let column = token_column(metadata).ok_or_else(|| fault("no column tokens".into()))?;
        let expected = metadata.column(column).num_values() as usize;
        let file = self.file.try_clone().map_err(|e| Error::io(&self.path, e))?;
        let schema = self.footer.metadata().file_metadata().schema_descr();
        let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.footer.clone())
            .with_row_groups(vec![number as usize])
            .with_projection(ProjectionMask::leaves(schema, [column]))
            .with_batch_size(metadata.num_rows() as usize)
            .build()
            .map_err(|e| fault(e.to_string()))?;
        tokens.reserve(expected);
        for batch in reader {
            let batch = batch.map_err(|e| fault(e.to_string()))?;
            let lists = batch.column(0).as_list_opt::<i32>().ok_or_else(|| fault("tokens are not lists".into()))?;
            let offsets = lists.value_offsets();
            let (first, last) = (offsets[0] as usize, offsets[lists.len()] as usize);
            let base = tokens.len();
            starts.extend(offsets[..lists.len()].iter().map(|&o| (o as usize - first + base) as u32));
            let values = lists.values();
            match values.data_type() {
                DataType::UInt16 => {
                    let values = &values.as_primitive::<UInt16Type>().values()[first..last];
                    tokens.extend(values.iter().map(|&t| u32::from(t)));
                }
                DataType::UInt32 => {
                    tokens.extend_from_slice(&values.as_primitive::<UInt32Type>().values()[first..last])
                }
                other => return Err(fault(format!("tokens are {other}, not u16 or u32"))),
            }
        }
        if tokens.len() != expected || starts.len() as i64 != metadata.num_rows() {
            return Err(fault(format!(
                "{} tokens of {} documents, the footer promises {expected} of {}",
                tokens.len(),
                starts.len(),
                metadata.num_rows()
            )));
        }
        if let Some(id) = tokens.iter().find(|&&id| id >= vocabulary_size) {
            return Err(fault(format!("token {id}, but the vocabulary has {vocabulary_size}")));
        }
        if self.epoch > 0 {
            let key = [seed, DOCUMENTS, self.epoch, self.number.into(), number.into()];
            (tokens, starts) = reorder(&tokens, &starts, &permutation(&key, starts.len()));
        }
        Ok(RowGroup { epoch: self.epoch, shard: self.number, number, tokens, starts })
    }
}

/// The documents of a row group in another order.
fn reorder(tokens: &[u32], starts: &[u32], order: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let mut reordered = Vec::with_capacity(tokens.len());
    let mut new_starts = Vec::with_capacity(starts.len());
    for &document in order {
        let document = document as usize;
        let end = starts.get(document + 1).map_or(tokens.len(), |&s| s as usize);
        new_starts.push(reordered.len() as u32);
        reordered.extend_from_slice(&tokens[starts[document] as usize..end]);
    }
    (reordered, new_starts)
}

/// `0..n` as it is in epoch 0, permuted in later ones.
fn ordered(epoch: u64, key: &[u64], n: usize) -> Vec<u32> {
    if epoch == 0 { (0..n as u32).collect() } else { permutation(key, n) }
}

/// Prefix sums, from 0 to the sum.
fn offsets(lengths: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut sum = 0;
    std::iter::once(0)
        .chain(lengths.map(|length| {
            sum += length;
            sum
        }))
        .collect()
}
