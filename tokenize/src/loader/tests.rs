//! The loader beside a naive twin that holds all tokens in memory.

use std::fs;
use std::sync::{Arc, LazyLock};

use arrow::array::{
    ArrayRef, FixedSizeBinaryArray, ListArray, RecordBatch, StringArray, UInt16Array, UInt32Array, UInt64Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema};
use pipeline::document::document_id;
use pipeline::shard::PendingWriter;

use super::order::{DOCUMENTS, ROW_GROUPS, SHARDS, WINDOW};
use super::*;
use crate::functions::token_field;
use crate::shard::{ROW_GROUP_TOKENS, ShardMetadata, TokenShardWriter};

/// Documents by shard and row group.
type Documents = Vec<Vec<Vec<Vec<u32>>>>;

struct DataSet {
    dir: tempfile::TempDir,
    shards: Vec<Shard>,
    documents: Documents,
}

/// Shards whose documents have the given lengths. Every token is another one, counted from 0, modulo
/// the vocabulary.
fn data_set(lengths: &[Vec<usize>], vocabulary_size: u32) -> DataSet {
    let dir = tempfile::tempdir().unwrap();
    let mut next = 0u32;
    let (mut shards, mut documents) = (Vec::new(), Vec::new());
    for (number, lengths) in lengths.iter().enumerate() {
        let texts: Vec<Vec<u32>> = lengths
            .iter()
            .map(|&length| {
                let first = next;
                next += length as u32;
                (first..next).map(|t| t % vocabulary_size).collect()
            })
            .collect();
        let element = token_field(vocabulary_size);
        let values: ArrayRef = match element.data_type() {
            DataType::UInt16 => Arc::new(UInt16Array::from_iter_values(texts.iter().flatten().map(|&t| t as u16))),
            _ => Arc::new(UInt32Array::from_iter_values(texts.iter().flatten().copied())),
        };
        let offsets = OffsetBuffer::from_lengths(lengths.iter().copied());
        let schema = Arc::new(Schema::new(vec![
            Field::new("id", DataType::FixedSizeBinary(16), false),
            Field::new("source", DataType::Utf8, false),
            Field::new("bytes", DataType::UInt64, false),
            Field::new("tokens", DataType::List(element.clone()), false),
        ]));
        let ids = (0..lengths.len()).map(|i| document_id("loader", (number << 32 | i) as u64));
        let columns: Vec<ArrayRef> = vec![
            Arc::new(FixedSizeBinaryArray::try_from_sparse_iter_with_size(ids.map(Some), 16).unwrap()),
            Arc::new(StringArray::from_iter_values(lengths.iter().map(|_| "test"))),
            Arc::new(UInt64Array::from_iter_values(lengths.iter().map(|&l| l as u64))),
            Arc::new(ListArray::try_new(element, offsets, values, None).unwrap()),
        ];
        let batch = RecordBatch::try_new(schema.clone(), columns).unwrap();
        let metadata = ShardMetadata {
            tokenizer: Digest::of(b"tokenizer"),
            vocabulary_size,
            eos_id: 2,
            seed: 1,
            documents: 0,
            tokens: 0,
        };
        let name = part_name(number as u32);
        let path = dir.path().join(&name);
        let file = PendingWriter::create(dir.path(), &name).unwrap();
        let mut writer = TokenShardWriter::new(file, path.clone(), schema, metadata).unwrap();
        // Cut otherwise than the row groups: the writer does not care.
        for start in (0..batch.num_rows()).step_by(37) {
            writer.write(&batch.slice(start, 37.min(batch.num_rows() - start))).unwrap();
        }
        let (file, _) = writer.finish().unwrap();
        fs::rename(&file.temporary, &path).unwrap();
        let entry = file.entry;
        shards.push(Shard { index: number as u32, path, rows: entry.rows, bytes: entry.bytes, xxh3: entry.xxh3 });
        // The rule of row groups: closed by the document that fills them.
        let mut groups = vec![Vec::new()];
        let mut filled = 0;
        for text in texts {
            filled += text.len();
            groups.last_mut().unwrap().push(text);
            if filled >= ROW_GROUP_TOKENS {
                groups.push(Vec::new());
                filled = 0;
            }
        }
        groups.retain(|group| !group.is_empty());
        documents.push(groups);
    }
    DataSet { dir, shards, documents }
}

/// Three shards of several row groups and an empty one; documents of 1 to some thousand tokens.
static LARGE: LazyLock<DataSet> = LazyLock::new(|| {
    let lengths = |n: usize, salt: usize| (0..n).map(|i| 1 + (i * i * 31 + salt) % 2999).collect();
    data_set(&[lengths(500, 1), Vec::new(), lengths(300, 5), lengths(40, 9)], 1 << 22)
});

impl DataSet {
    fn loader(&self, config: &LoaderConfig) -> Loader {
        Loader::open(&self.shards, config.clone()).unwrap()
    }

    /// All documents of an epoch, in order, by the definition.
    fn epoch(&self, seed: u64, epoch: u64) -> Vec<&Vec<u32>> {
        let order = |key: &[u64], n: usize| match epoch {
            0 => (0..n as u32).collect(),
            _ => permutation(key, n),
        };
        let shards: Vec<_> = self.documents.iter().filter(|groups| !groups.is_empty()).collect();
        let mut documents = Vec::new();
        for shard in order(&[seed, SHARDS, epoch], shards.len()) {
            let groups = shards[shard as usize];
            for group in order(&[seed, ROW_GROUPS, epoch, shard.into()], groups.len()) {
                let texts = &groups[group as usize];
                let key = [seed, DOCUMENTS, epoch, shard.into(), group.into()];
                documents.extend(order(&key, texts.len()).into_iter().map(|d| &texts[d as usize]));
            }
        }
        documents
    }

    /// Batches of the whole world over some epochs, by the definition.
    fn naive_batches(&self, config: &LoaderConfig, epochs: u64) -> Vec<Batch> {
        let (mut tokens, mut starts) = (Vec::new(), Vec::new());
        for document in (0..epochs).flat_map(|e| self.epoch(config.seed, e)) {
            starts.push(tokens.len());
            tokens.extend_from_slice(document);
        }
        let per_epoch = tokens.len() as u64 / epochs;
        let length = config.sequence_length;
        let window = (config.shuffle_window_tokens.min(per_epoch as usize) / length).max(1);
        let mut sequences: Vec<usize> = Vec::new();
        for number in 0.. {
            let order = permutation(&[config.seed, WINDOW, number], window);
            sequences.extend(order.iter().map(|&s| (number as usize * window + s as usize) * length));
            if (number as usize + 2) * window * length >= tokens.len() {
                break;
            }
        }
        let batch = |(step, places): (usize, &[usize])| Batch {
            step: step as u64,
            rows: config.rows,
            sequence_length: length,
            tokens: places.iter().flat_map(|&p| tokens[p..=p + length].to_vec()).collect(),
            document_starts: places
                .iter()
                .map(|&p| {
                    let inside = starts[starts.partition_point(|&s| s <= p)..].iter().take_while(|&&s| s < p + length);
                    std::iter::once(0).chain(inside.map(|&s| (s - p) as u32)).collect()
                })
                .collect(),
            epoch: (step * config.rows * length) as u64 / per_epoch,
        };
        sequences.chunks_exact(config.rows).enumerate().map(batch).collect()
    }
}

fn configs() -> Vec<LoaderConfig> {
    [(128, 4, 1 << 17), (1023, 3, 40_000), (2048, 8, 1), (70_001, 2, 300_000)]
        .into_iter()
        .map(|(sequence_length, rows, shuffle_window_tokens)| LoaderConfig {
            sequence_length,
            rows,
            shuffle_window_tokens,
            seed: 11,
            ..LoaderConfig::default()
        })
        .collect()
}

#[test]
fn batches_are_those_of_the_naive_twin_over_epochs() {
    assert!(LARGE.documents[0].len() > 2 && LARGE.documents[2].len() > 1);
    for config in configs() {
        let expected = LARGE.naive_batches(&config, 3);
        assert!(expected.last().unwrap().epoch == 2, "{config:?}");
        let mut loader = LARGE.loader(&config);
        for (step, expected) in expected.iter().enumerate() {
            let batch = loader.batch(step as u64).unwrap();
            assert!(batch == *expected, "step {step} of {config:?}");
            assert_eq!(loader.epoch(step as u64), expected.epoch);
        }
    }
}

#[test]
fn any_step_of_a_fresh_loader_is_that_of_a_straight_run() {
    for config in configs() {
        let expected = LARGE.naive_batches(&config, 3);
        let mut wandering = LARGE.loader(&config);
        for i in 0..20 {
            let step = i * 7919 % expected.len();
            assert!(wandering.batch(step as u64).unwrap() == expected[step]);
            let mut fresh = LARGE.loader(&config);
            let state = fresh.state(step as u64);
            let step = fresh.resume(&state).unwrap();
            assert!(fresh.batch(step).unwrap() == expected[step as usize]);
        }
    }
}

#[test]
fn ranks_partition_the_global_batch_and_the_world_may_change_size() {
    let config = LoaderConfig { rows: 10, ..configs()[0].clone() };
    let expected = LARGE.naive_batches(&config, 1);
    for (step, world_size) in [1, 2, 3, 8, 10, 4].into_iter().enumerate() {
        let expected = &expected[step];
        for rank in 0..world_size {
            let config = LoaderConfig { rank, world_size, ..config.clone() };
            let mut loader = LARGE.loader(&config);
            let batch = loader.batch(step as u64).unwrap();
            let rows: Vec<usize> = (rank..config.rows).step_by(world_size).collect();
            assert_eq!(batch.rows, rows.len());
            for (i, &row) in rows.iter().enumerate() {
                assert_eq!(batch.row(i), expected.row(row));
                assert_eq!(batch.document_starts[i], expected.document_starts[row]);
            }
            // A state saved by one world size is good for another.
            assert_eq!(LARGE.loader(&config).resume(&LARGE.loader(&configs_of(&config, 1)).state(3)).unwrap(), 3);
        }
    }
}

fn configs_of(config: &LoaderConfig, world_size: usize) -> LoaderConfig {
    LoaderConfig { rank: 0, world_size, ..config.clone() }
}

#[test]
fn every_token_is_an_input_once_and_a_target_once_per_epoch() {
    // 96,000 tokens: 375 sequences of 256, windows of 25 of them, batches of 5.
    let data = data_set(&[vec![1000; 60], vec![300; 120]], 1 << 20);
    for world_size in [1, 2, 3, 5] {
        let mut inputs = vec![0u32; 96_000];
        let mut targets = vec![0u32; 96_000];
        let config =
            LoaderConfig { sequence_length: 256, rows: 5, shuffle_window_tokens: 25 * 256, ..LoaderConfig::default() };
        let mut loaders: Vec<Loader> =
            (0..world_size).map(|rank| data.loader(&LoaderConfig { rank, world_size, ..config.clone() })).collect();
        for epoch in 1..=3 {
            for step in (epoch - 1) * 75..epoch * 75 {
                for batch in loaders.iter_mut().map(|l| l.batch(step).unwrap()) {
                    assert_eq!(batch.epoch, epoch - 1);
                    for row in 0..batch.rows {
                        let row = batch.row(row);
                        row[..256].iter().for_each(|&t| inputs[t as usize] += 1);
                        row[1..].iter().for_each(|&t| targets[t as usize] += 1);
                    }
                }
            }
            assert!(inputs.iter().all(|&n| u64::from(n) == epoch), "epoch {epoch}, {world_size} ranks");
            // The very first token is no target; the first of the next epoch is one already.
            assert_eq!(targets.iter().map(|&n| u64::from(n)).sum::<u64>(), epoch * 96_000);
            assert!(targets.iter().all(|&n| u64::from(n).abs_diff(epoch) <= 1));
        }
    }
}

#[test]
fn document_starts_are_where_documents_start() {
    let mut first = vec![false; 1 << 22];
    LARGE.documents.iter().flatten().flatten().for_each(|d| first[d[0] as usize] = true);
    let config = configs()[1].clone();
    let mut loader = LARGE.loader(&config);
    let mut boundaries = 0;
    for step in 0..200 {
        let batch = loader.batch(step).unwrap();
        for row in 0..batch.rows {
            let starts = &batch.document_starts[row];
            assert_eq!(starts[0], 0);
            let inside = (1..config.sequence_length as u32).filter(|&i| first[batch.row(row)[i as usize] as usize]);
            assert_eq!(starts[1..], inside.collect::<Vec<_>>());
            boundaries += starts.len() - 1;
        }
    }
    assert!(boundaries > 100);
}

#[test]
fn small_vocabularies_and_tiny_data_work() {
    // 5 tokens, sequences of 4: a sequence spans epochs, and a window many of them.
    let data = data_set(&[vec![3, 2]], 50_000);
    let config = LoaderConfig { sequence_length: 4, rows: 2, shuffle_window_tokens: 8, ..LoaderConfig::default() };
    let expected = data.naive_batches(&config, 40);
    let mut loader = data.loader(&config);
    for (step, expected) in expected.iter().enumerate() {
        assert_eq!(loader.batch(step as u64).unwrap(), *expected);
    }
    assert_eq!((loader.tokens_per_epoch(), loader.vocabulary_size(), loader.eos_id()), (5, 50_000, 2));
}

#[test]
fn a_state_of_other_batches_is_refused_by_name() {
    let config = configs()[0].clone();
    let state = LARGE.loader(&config).state(17);
    assert_eq!(LARGE.loader(&config).resume(&state).unwrap(), 17);
    let other = LARGE.loader(&LoaderConfig { seed: 12, ..config.clone() });
    let error = other.resume(&state).unwrap_err().to_string();
    assert!(error.contains("seed was 11, is 12"), "{error}");
    let data = data_set(&[vec![10_000]], 1000);
    let error = data.loader(&config).resume(&state).unwrap_err().to_string();
    assert!(error.contains("fingerprint"), "{error}");
}

#[test]
fn a_damaged_shard_stops_with_file_and_row_group() {
    let config = configs()[0].clone();
    let lengths: Vec<usize> = (0..600).map(|i| 1 + i * 31 % 1999).collect();
    let data = data_set(&[lengths], 1 << 20);
    let path = &data.shards[0].path;
    let whole = fs::read(path).unwrap();
    let groups = data.documents[0].len();
    assert!(groups > 2);
    // Zeroes over the middle of the pages of a later row group.
    let footer = index::read_footer(path).unwrap();
    let group = footer.metadata().row_group(groups - 2);
    let (start, length) = group.column(index::token_column(group).unwrap()).byte_range();
    let mut damaged = whole.clone();
    damaged[start as usize + 30..(start + length) as usize - 30].fill(0);
    fs::write(path, &damaged).unwrap();
    let mut loader = data.loader(&config);
    let error = (0..).find_map(|step| loader.batch(step).err()).unwrap().to_string();
    assert!(error.contains("part-00000.parquet") && error.contains(&format!("row group {}", groups - 2)), "{error}");
    // Cut short: there is no footer.
    fs::write(path, &whole[..whole.len() / 2]).unwrap();
    let error = Loader::open(&data.shards, config.clone()).err().unwrap().to_string();
    assert!(error.contains("part-00000.parquet"), "{error}");
    // Whole again, but another file than the journal says.
    fs::write(path, &whole).unwrap();
    let mut shards = data.shards.clone();
    shards[0].rows += 1;
    let error = Loader::open(&shards, config.clone()).err().unwrap().to_string();
    assert!(error.contains("promises"), "{error}");
    fs::remove_file(path).unwrap();
    assert!(Loader::open(&data.shards, config).is_err());
}

#[test]
fn nothing_to_load_is_an_error() {
    let data = data_set(&[Vec::new()], 1000);
    assert!(data.dir.path().exists());
    let error = Loader::open(&data.shards, LoaderConfig::default()).err().unwrap().to_string();
    assert!(error.contains("no tokens"), "{error}");
}
