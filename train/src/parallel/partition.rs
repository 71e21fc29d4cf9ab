//! How the flat buffer of all parameters is cut: into buckets, which are gathered and reduced as one, and each
//! bucket into pieces, one for every rank.

use std::ops::Range;

use crate::config::ModelConfig;
use crate::parameters::ParameterList;

/// Pieces begin at multiples of so many values from the beginning of their bucket, and squares of gradients are summed
/// over as many: so the norm is the same sum in the same order for every world size.
pub const CHUNK: usize = 1024;

/// The embedding, a block or the output head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Its parameters, by their numbers in the list.
    pub parameters: Range<usize>,
    /// Its values in the flat buffer.
    pub range: Range<usize>,
}

impl Bucket {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Never: every bucket has a matrix.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

/// The buckets of a model and the pieces of each for a number of ranks.
///
/// Rank r has the values `r·p..(r+1)·p` of a bucket, as far as the bucket goes, where p is the same for all ranks and
/// a multiple of [`CHUNK`]. What a rank has of all buckets, one after the other, is its shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    list: ParameterList,
    buckets: Vec<Bucket>,
    world: usize,
}

impl Partition {
    /// Of a model of these sizes over `world` ranks, at least one.
    pub fn new(config: &ModelConfig, world: usize) -> Self {
        Self::of(ParameterList::of(config), world)
    }

    /// Of a list, which may be what one of the ranks has that share the blocks: then over the `world` ranks that have the same.
    pub fn of(list: ParameterList, world: usize) -> Self {
        let parameters: Vec<_> = list.iter().collect();
        let buckets = list.blocks().iter().map(|block| Bucket {
            range: parameters[block.start].offset..parameters[block.end - 1].range().end,
            parameters: block.clone(),
        });
        Self { buckets: buckets.collect(), list, world: world.max(1) }
    }

    /// Names, shapes and places of the parameters.
    pub fn parameters(&self) -> &ParameterList {
        &self.list
    }

    /// Embedding, blocks, head: in the order of the flat buffer, without gaps.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Ranks.
    pub fn world(&self) -> usize {
        self.world
    }

    /// Values of a piece of bucket `bucket`, p above; the last pieces hold fewer or none where the bucket ends before.
    /// A buffer of `world · padded_piece(bucket)` values holds the bucket in pieces of one size.
    pub fn padded_piece(&self, bucket: usize) -> usize {
        self.buckets[bucket].len().div_ceil(CHUNK).div_ceil(self.world) * CHUNK
    }

    /// What `rank` has of bucket `bucket`, counted from the beginning of the bucket; may be empty.
    pub fn piece(&self, bucket: usize, rank: usize) -> Range<usize> {
        let (size, len) = (self.padded_piece(bucket), self.buckets[bucket].len());
        (rank * size).min(len)..((rank + 1) * size).min(len)
    }

    /// The pieces of bucket `bucket` in the order of the ranks.
    pub fn pieces(&self, bucket: usize) -> Vec<Range<usize>> {
        (0..self.world).map(|rank| self.piece(bucket, rank)).collect()
    }

    /// The shard of `rank`: for every bucket its piece as a range of the flat buffer.
    pub fn shard(&self, rank: usize) -> Vec<Range<usize>> {
        let of = |(index, bucket): (usize, &Bucket)| {
            let piece = self.piece(index, rank);
            bucket.range.start + piece.start..bucket.range.start + piece.end
        };
        self.buckets.iter().enumerate().map(of).collect()
    }

    /// The same values as ranges of the flat buffer of the whole model.
    pub fn places(&self, rank: usize) -> Vec<Range<usize>> {
        let mut places: Vec<Range<usize>> = Vec::new();
        for range in self.shard(rank) {
            for parameter in self.list.iter() {
                let whole = parameter.range();
                let (begin, end) = (whole.start.max(range.start), whole.end.min(range.end));
                if begin >= end {
                    continue;
                }
                for place in parameter.place.ranges(begin - whole.start..end - whole.start) {
                    match places.last_mut() {
                        Some(last) if last.end == place.start => last.end = place.end,
                        _ => places.push(place),
                    }
                }
            }
        }
        places
    }

    /// Whether a bucket holds parts of parameters, of which other ranks have the others.
    pub fn is_split(&self, bucket: usize) -> bool {
        let first = self.buckets[bucket].parameters.start;
        !self.list.iter().as_slice()[first].place.is_whole()
    }

    /// Values in the shard of `rank`.
    pub fn shard_len(&self, rank: usize) -> usize {
        self.shard(rank).iter().map(Range::len).sum()
    }

    /// The parts of `range`, a range of the flat buffer inside of one bucket, that decay with the weights or do not, each
    /// with whether it does.
    pub fn decays(&self, range: &Range<usize>) -> Vec<(Range<usize>, bool)> {
        let parts = self.list.iter().map(|parameter| {
            let whole = parameter.range();
            (whole.start.max(range.start)..whole.end.min(range.end), parameter.decays())
        });
        parts.filter(|(part, _)| part.start < part.end).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        ModelConfig {
            vocab_size: 301,
            decoder_embed_dim: 24,
            decoder_layers: 3,
            decoder_attention_heads: 3,
            hidden_dim: 24,
            glu_dim: 40,
            linear_use_lrpe_list: vec![1, 0, 1],
            ..ModelConfig::default()
        }
    }

    #[test]
    fn buckets_are_embedding_blocks_and_head_without_gaps() {
        let partition = Partition::new(&config(), 4);
        let names: Vec<&str> = partition.parameters().iter().map(|p| p.name.as_str()).collect();
        let firsts: Vec<&str> = partition.buckets().iter().map(|bucket| names[bucket.parameters.start]).collect();
        let layer = |n: usize| format!("model.layers.{n}.token_mixer.qkvu_proj.weight");
        assert_eq!(firsts, ["model.embed_tokens.weight", &layer(0), &layer(1), &layer(2), "lm_head.weight"]);
        let mut next = 0;
        for bucket in partition.buckets() {
            assert_eq!(bucket.range.start, next);
            next = bucket.range.end;
        }
        assert_eq!(next, partition.parameters().total());
    }

    #[test]
    fn shards_of_any_world_hold_every_value_once_and_are_cut_at_chunks() {
        for world in [1, 2, 3, 4, 7, 8, 64] {
            let partition = Partition::new(&config(), world);
            let mut holders = vec![0; partition.parameters().total()];
            for rank in 0..world {
                let shard = partition.shard(rank);
                assert_eq!(shard.iter().map(Range::len).sum::<usize>(), partition.shard_len(rank));
                for (bucket, range) in partition.buckets().iter().zip(shard) {
                    assert!(range.is_empty() || (range.start - bucket.range.start).is_multiple_of(CHUNK));
                    holders[range].iter_mut().for_each(|count| *count += 1);
                }
            }
            assert!(holders.iter().all(|&count| count == 1), "{world}");
            for bucket in 0..partition.buckets().len() {
                let largest = partition.pieces(bucket).iter().map(Range::len).max().unwrap();
                assert!(largest <= partition.padded_piece(bucket));
                assert!(world * partition.padded_piece(bucket) >= partition.buckets()[bucket].len());
            }
        }
    }

    #[test]
    fn alone_a_shard_is_the_flat_buffer() {
        let partition = Partition::new(&config(), 1);
        let buckets: Vec<Range<usize>> = partition.buckets().iter().map(|bucket| bucket.range.clone()).collect();
        assert_eq!(partition.shard(0), buckets);
        assert_eq!(partition.places(0), [partition.parameters().range()]);
    }

    #[test]
    fn shards_of_parts_are_places_in_the_whole_model() {
        let config = ModelConfig { glu_dim: 42, ..config() };
        for (parts, world) in [(1, 3), (3, 1), (3, 2)] {
            let mut holders = vec![0; Partition::new(&config, 1).parameters().total()];
            for part in 0..parts {
                let partition = Partition::of(ParameterList::part(&config, part, parts), world);
                assert_eq!(partition.is_split(1), parts > 1);
                assert!(!partition.is_split(0) && !partition.is_split(4));
                for rank in 0..world {
                    let places = partition.places(rank);
                    assert_eq!(places.iter().map(Range::len).sum::<usize>(), partition.shard_len(rank));
                    places.into_iter().flatten().for_each(|at| holders[at] += 1);
                }
            }
            // Every part has embedding and head.
            let tables = 301 * 24;
            let blocks = tables..holders.len() - tables;
            assert!(holders.iter().enumerate().all(|(at, n)| *n == if blocks.contains(&at) { 1 } else { parts }));
        }
    }

    #[test]
    fn angles_do_not_decay_wherever_a_piece_begins() {
        for world in [1, 2, 5] {
            let partition = Partition::new(&config(), world);
            let mut kept = 0;
            for rank in 0..world {
                for range in partition.shard(rank) {
                    let parts = partition.decays(&range);
                    assert_eq!(parts.iter().map(|(part, _)| part.len()).sum::<usize>(), range.len());
                    kept += parts.iter().filter(|(_, decays)| !decays).map(|(part, _)| part.len()).sum::<usize>();
                }
            }
            // 24 angles in two of three layers.
            assert_eq!(kept, 48, "{world}");
        }
    }
}
