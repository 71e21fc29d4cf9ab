//! The endless stream of tokens of a source: epoch after epoch, each in an order of its own.
//!
//! In epoch 0 documents come in the order of the shards, which is a global shuffle already. In later
//! epochs the shards are permuted, the row groups within each shard, and the documents within each row
//! group. So any position is found from prefix sums over shards and over the row groups of one shard,
//! and reading is sequential within a shard.

use super::index::{Index, Source};
use super::order::{DOCUMENTS, ROW_GROUPS, SHARDS, permutation};
use super::row_group::Documents;
use super::shard_reader::ShardReader;
use crate::error::Result;

/// Row groups that are asked of an object store before they are wanted.
const AHEAD: usize = 8;

/// Reads ranges of the stream of one source. Holds one footer and one row group.
pub struct Stream {
    index: Index,
    source: usize,
    seed: u64,
    epoch: Option<EpochOrder>,
    shard: Option<OpenShard>,
    row_group: Option<RowGroup>,
    spare: Documents,
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
    /// Its place among the shards of the source.
    place: u32,
    reader: ShardReader,
    row_groups: Vec<u32>,
    offsets: Vec<u64>,
}

/// A decoded row group, its documents in the order of an epoch.
struct RowGroup {
    epoch: u64,
    shard: u32,
    number: u32,
    documents: Documents,
}

impl Stream {
    /// The stream of a source under a seed.
    pub fn new(index: Index, source: usize, seed: u64) -> Self {
        let spare = Documents::default();
        Self { index, source, seed, epoch: None, shard: None, row_group: None, spare }
    }

    /// Append `length` tokens from `position` to `tokens`, and to `starts` the places in `tokens` at
    /// which documents begin.
    pub fn read(&mut self, position: u128, length: usize, tokens: &mut Vec<u32>, starts: &mut Vec<u32>) -> Result<()> {
        let end = tokens.len() + length;
        let mut position = position;
        while tokens.len() < end {
            let per_epoch = u128::from(self.source().tokens);
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

    fn source(&self) -> &Source {
        &self.index.sources()[self.source]
    }

    /// The row group that holds a position of an epoch, and the place in it.
    fn locate(&mut self, epoch: u64, position: u64) -> Result<(&Documents, usize)> {
        let order = match self.epoch.take().filter(|e| e.epoch == epoch) {
            Some(order) => order,
            None => self.epoch_order(epoch),
        };
        let at = order.offsets.partition_point(|&o| o <= position) - 1;
        let (place, within_shard) = (order.shards[at], position - order.offsets[at]);
        self.epoch = Some(order);
        let shard = match self.shard.take().filter(|s| (s.epoch, s.place) == (epoch, place)) {
            Some(shard) => shard,
            None => self.open_shard(epoch, place)?,
        };
        let at = shard.offsets.partition_point(|&o| o <= within_shard) - 1;
        let (number, within) = (shard.row_groups[at], within_shard - shard.offsets[at]);
        let group = match self.row_group.take() {
            Some(group) if (group.epoch, group.shard, group.number) == (epoch, place, number) => group,
            old => {
                let mut documents = old.map(|old| old.documents).unwrap_or_default();
                let ahead = shard.row_groups.iter().skip(at + 1).take(AHEAD);
                shard.reader.read_ahead(ahead.map(|&group| group as usize));
                shard.reader.read(number as usize, &mut documents)?;
                if epoch > 0 {
                    let key = [self.seed, DOCUMENTS, epoch, place.into(), number.into()];
                    let order = permutation(&key, documents.starts.len());
                    reorder(&documents, &order, &mut self.spare);
                    std::mem::swap(&mut documents, &mut self.spare);
                }
                RowGroup { epoch, shard: place, number, documents }
            }
        };
        self.shard = Some(shard);
        Ok((&self.row_group.insert(group).documents, within as usize))
    }

    fn epoch_order(&self, epoch: u64) -> EpochOrder {
        let shards = &self.source().shards;
        let order = ordered(epoch, &[self.seed, SHARDS, epoch], shards.len());
        let offsets = offsets(order.iter().map(|&s| shards[s as usize].tokens));
        EpochOrder { epoch, shards: order, offsets }
    }

    fn open_shard(&self, epoch: u64, place: u32) -> Result<OpenShard> {
        let shard = &self.source().shards[place as usize];
        let reader = ShardReader::open_in(self.index.storage().clone(), &shard.object(), shard.bytes)?;
        let tokens = reader.row_group_tokens()?;
        self.index.check(self.source(), shard, reader.metadata(), tokens.iter().sum())?;
        let row_groups = ordered(epoch, &[self.seed, ROW_GROUPS, epoch, place.into()], tokens.len());
        let offsets = offsets(row_groups.iter().map(|&g| tokens[g as usize]));
        Ok(OpenShard { epoch, place, reader, row_groups, offsets })
    }
}

/// The documents of a row group in another order.
fn reorder(documents: &Documents, order: &[u32], reordered: &mut Documents) {
    let Documents { tokens, starts } = documents;
    reordered.tokens.clear();
    reordered.starts.clear();
    for &document in order {
        let document = document as usize;
        let end = starts.get(document + 1).map_or(tokens.len(), |&s| s as usize);
        reordered.starts.push(reordered.tokens.len() as u32);
        reordered.tokens.extend_from_slice(&tokens[starts[document] as usize..end]);
    }
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
