//! The loader beside a naive twin that holds all tokens in memory.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use arrow::array::{
    ArrayRef, FixedSizeBinaryArray, ListArray, RecordBatch, StringArray, UInt16Array, UInt32Array, UInt64Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema};
use object_store::{GetOptions, ObjectStoreExt};
use pipeline::document::document_id;
use pipeline::shard::PendingWriter;
use pipeline::{Manifest, StageState};

use super::assembler::source_seed;
use super::order::{DOCUMENTS, ROW_GROUPS, SHARDS, WINDOW, permutation};
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

/// Shards of one source whose documents have the given lengths. Every token is another one, counted from
/// 0, modulo the vocabulary.
fn data_set(lengths: &[Vec<usize>], vocabulary_size: u32) -> DataSet {
    sources(&lengths.iter().map(|lengths| (SOURCE, lengths.clone())).collect::<Vec<_>>(), vocabulary_size)
}

const SOURCE: &str = "test";

/// Shards by source.
fn sources(lengths: &[(&str, Vec<usize>)], vocabulary_size: u32) -> DataSet {
    let dir = tempfile::tempdir().unwrap();
    let mut next = 0u32;
    let (mut shards, mut documents) = (Vec::new(), Vec::new());
    for (number, (source, lengths)) in lengths.iter().enumerate() {
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
            Arc::new(StringArray::from_iter_values(lengths.iter().map(|_| *source))),
            Arc::new(UInt64Array::from_iter_values(lengths.iter().map(|&l| l as u64))),
            Arc::new(ListArray::try_new(element, offsets, values, None).unwrap()),
        ];
        let batch = RecordBatch::try_new(schema.clone(), columns).unwrap();
        let metadata = ShardMetadata {
            tokenizer: Digest::of(b"tokenizer"),
            vocabulary_size,
            eos_id: 2,
            bos_id: Some(1),
            pad_id: Some(0),
            seed: 1,
            source: Some(source.to_string()),
            documents: 0,
            tokens: 0,
            row_groups: Vec::new(),
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
        let seed = source_seed(SOURCE, seed);
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
        let window = (config.data.shuffle_window_tokens.min(per_epoch as usize) / length).max(1);
        let seed = source_seed(SOURCE, config.seed);
        let mut sequences: Vec<usize> = Vec::new();
        for number in 0.. {
            let order = permutation(&[seed, WINDOW, number], window);
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
                    let inside = starts[starts.partition_point(|&s| s <= p)..].iter().take_while(|&&s| s <= p + length);
                    std::iter::once(0).chain(inside.map(|&s| (s - p) as u32)).collect()
                })
                .collect(),
            filled: vec![length as u32 + 1; config.rows],
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
            data: DataConfig { shuffle_window_tokens, ..DataConfig::default() },
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
        assert!(LARGE.loader(&config).epochs(expected.len() as u64)[SOURCE] > 2.9, "{config:?}");
        let mut loader = LARGE.loader(&config);
        for (step, expected) in expected.iter().enumerate() {
            let batch = loader.batch(step as u64).unwrap();
            assert!(batch == *expected, "step {step} of {config:?}");
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
            let rows: Vec<usize> = (config.rows * rank / world_size..config.rows * (rank + 1) / world_size).collect();
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

/// Loads `batches` of three epochs, on a world that changes its size between `steps` of them, and counts
/// how often every token is there after each.
fn counts(
    data: &DataSet,
    config: &LoaderConfig,
    world_sizes: [usize; 2],
    steps: std::ops::Range<u64>,
    change_at: u64,
    counts: &mut [u32],
) {
    let mut state = data.loader(config).state(steps.start);
    for (world_size, until) in world_sizes.into_iter().zip([change_at, steps.end]) {
        let open = |rank| data.loader(&LoaderConfig { rank, world_size, ..config.clone() });
        let mut loaders: Vec<Loader> = (0..world_size).map(open).collect();
        let first = loaders[0].resume(&state).unwrap();
        for step in first..until {
            for batch in loaders.iter_mut().map(|loader| loader.batch(step).unwrap()) {
                for row in 0..batch.rows {
                    // By concatenation the last token is the first of another row.
                    let inputs = (batch.filled[row] as usize).min(match config.data.packing {
                        Packing::Concatenate => batch.sequence_length,
                        Packing::BestFit => batch.sequence_length + 1,
                    });
                    batch.row(row)[..inputs].iter().for_each(|&t| counts[t as usize] += 1);
                }
            }
        }
        state = loaders[0].state(until);
    }
}

#[test]
fn every_token_comes_once_per_epoch_for_any_world_size_that_changes_on_the_way() {
    // 98,304 tokens of two sources, a third and two thirds: 384 sequences of 256, batches of 8. Windows of
    // 16 and 32 sequences, so that no window reaches over the end of an epoch.
    let data = sources(&[("a", vec![1024; 32]), ("b", vec![2048; 20]), ("b", vec![512; 48])], 1 << 20);
    let config = LoaderConfig {
        sequence_length: 256,
        rows: 8,
        data: DataConfig { shuffle_window_tokens: 48 * 256 + 3, ..DataConfig::default() },
        ..LoaderConfig::default()
    };
    for world_sizes in [[1, 2], [2, 3], [3, 8], [8, 1], [8, 3]] {
        let mut seen = vec![0; 98_304];
        for epoch in 0..3 {
            // Proportions are exact after every block of 512 sequences; an epoch is 384, so that a source may be
            // a little ahead of the other. What each has given is exact.
            counts(&data, &config, world_sizes, epoch * 48..(epoch + 1) * 48, epoch * 48 + 17, &mut seen);
            assert_eq!(seen.iter().map(|&n| u64::from(n)).sum::<u64>(), (epoch + 1) * 98_304);
            let epochs = data.loader(&config).epochs((epoch + 1) * 48);
            for (source, tokens) in [("a", 0..32_768), ("b", 32_768..98_304)] {
                let whole = epochs[source].floor() as u32;
                let counts = &seen[tokens];
                assert!(counts.iter().all(|&n| n == whole || n == whole + 1), "{source} {world_sizes:?}");
                let total: u32 = counts.iter().sum();
                assert!((f64::from(total) / counts.len() as f64 - epochs[source]).abs() < 1e-9);
            }
        }
    }
}

#[test]
fn one_source_is_gone_through_exactly_before_it_begins_again() {
    for (packing, rows_of_epoch) in [(Packing::Concatenate, 384), (Packing::BestFit, 384)] {
        // Best fit without padding, and documents that fill the sequences of 256 or 257 tokens.
        let length = if packing == Packing::BestFit { 255 } else { 256 };
        let data = data_set(&[vec![1024; 32], vec![2048; 20], vec![512; 48]], 1 << 20);
        let shuffle_window_tokens = 32 * length;
        let config = LoaderConfig {
            sequence_length: length,
            rows: 8,
            data: DataConfig { packing, padding: 0.0, shuffle_window_tokens, ..DataConfig::default() },
            ..LoaderConfig::default()
        };
        for world_sizes in [[1, 8], [2, 3], [3, 2], [8, 1]] {
            let mut seen = vec![0; 98_304];
            for epoch in 0..3 {
                let steps = rows_of_epoch / 8;
                counts(&data, &config, world_sizes, epoch * steps..(epoch + 1) * steps, epoch * steps + 5, &mut seen);
                assert!(seen.iter().all(|&n| u64::from(n) == epoch + 1), "{packing:?} {world_sizes:?} {epoch}");
            }
        }
    }
}

#[test]
fn sources_are_mixed_by_weight_or_epochs() {
    let data = sources(&[("a", vec![999; 100]), ("b", vec![700; 50]), ("c", vec![300; 3])], 1 << 20);
    let tokens = [99_900.0, 35_000.0, 900.0];
    let with = |weights: &[(&str, f64)], epochs: &[(&str, f64)]| {
        let map = |pairs: &[(&str, f64)]| pairs.iter().map(|(name, value)| (name.to_string(), *value)).collect();
        let data = DataConfig { weights: map(weights), epochs: map(epochs), ..DataConfig::default() };
        LoaderConfig { sequence_length: 64, rows: 16, data, ..LoaderConfig::default() }
    };
    // 512 sequences make a block of exact proportions.
    let steps = 256 * 3;
    let given = |config: &LoaderConfig| {
        let epochs = data.loader(config).epochs(steps);
        ["a", "b", "c"]
            .map(|name| epochs[name] * tokens[["a", "b", "c"].iter().position(|n| *n == name).unwrap()] / 64.0)
    };
    let total = (steps * 16) as f64;
    let expected = |shares: [f64; 3]| shares.map(|share| share / shares.iter().sum::<f64>() * total);
    for (config, shares) in [
        (with(&[], &[]), tokens),
        (with(&[("a", 1.0), ("c", 3.0)], &[]), [1.0, 0.0, 3.0]),
        (with(&[], &[("b", 2.5)]), [99_900.0, 87_500.0, 900.0]),
        (with(&[], &[("b", 0.0)]), [99_900.0, 0.0, 900.0]),
    ] {
        for (given, expected) in given(&config).into_iter().zip(expected(shares)) {
            assert!((given - expected).abs() <= 1.0, "{given} {expected} {config:?}");
        }
        // What is counted is what is in the batches.
        let mut loader = data.loader(&config);
        let mut of_b = 0;
        for step in 0..100 {
            let batch = loader.batch(step).unwrap();
            of_b += (0..16).filter(|&row| (99_900..134_900).contains(&batch.row(row)[0])).count();
        }
        assert!((loader.epochs(100)["b"] * 35_000.0 / 64.0 - of_b as f64).abs() < 1e-6);
    }
    let refused = |config: LoaderConfig| Loader::open(&data.shards, config).err().unwrap().to_string();
    assert!(refused(with(&[("d", 1.0)], &[])).contains("\"d\""));
    assert!(refused(with(&[("a", 0.0)], &[])).contains("no source has a share"));
    assert!(refused(with(&[("a", 1.0)], &[("a", 1.0)])).contains("not both"));
    assert!(refused(with(&[("a", -1.0)], &[])).contains("-1"));
}

#[test]
fn another_source_beside_it_changes_nothing_in_a_source() {
    let alone = sources(&[("b", vec![700; 50])], 1 << 20);
    let beside = sources(&[("b", vec![700; 50]), ("a", vec![999; 100])], 1 << 20);
    let config = LoaderConfig { sequence_length: 64, rows: 16, ..LoaderConfig::default() };
    let weights = [("b".to_string(), 1.0)].into();
    let only = LoaderConfig { data: DataConfig { weights, ..DataConfig::default() }, ..config.clone() };
    let (mut one, mut two) = (alone.loader(&config), beside.loader(&only));
    for step in 0..100 {
        assert_eq!(one.batch(step).unwrap(), two.batch(step).unwrap());
    }
}

#[test]
fn best_fit_cuts_few_documents_and_says_what_it_costs() {
    let lengths: Vec<usize> = (0..2000).map(|i| 2 + (i * i * 31 + i * 7) % 400).collect();
    let data = data_set(&[lengths], 1 << 20);
    let best_fit = DataConfig { packing: Packing::BestFit, padding: 0.01, ..DataConfig::default() };
    let config = LoaderConfig { sequence_length: 511, rows: 8, data: best_fit, ..LoaderConfig::default() };
    let mut loader = data.loader(&config);
    let report = loader.packing().unwrap();
    let source = &report.sources[SOURCE];
    assert!(report.padding >= 0.01 && report.padding < 0.013, "{report:?}");
    assert!(source.short_documents > 1900 && source.cut_documents * 50 < source.short_documents, "{report:?}");
    let mut first = vec![false; 1 << 20];
    data.documents.iter().flatten().flatten().for_each(|d| first[d[0] as usize] = true);
    let (mut tokens, mut positions) = (0, 0);
    for step in 0..40 {
        let batch = loader.batch(step).unwrap();
        for row in 0..batch.rows {
            let filled = batch.filled[row] as usize;
            tokens += filled;
            positions += 512;
            assert!(batch.row(row)[filled..].iter().all(|&id| id == loader.eos_id()));
            // Every token but a first one follows the one before it in the same document.
            let starts = &batch.document_starts[row];
            for at in 1..filled {
                let follows = batch.row(row)[at] == batch.row(row)[at - 1] + 1 && !first[batch.row(row)[at] as usize];
                assert_eq!(starts.contains(&(at as u32)), !follows);
            }
            assert!(filled > 0 && starts.iter().all(|&start| (start as usize) < filled));
        }
    }
    let padding = 1.0 - f64::from(tokens as u32) / f64::from(positions);
    assert!((padding - report.padding).abs() < 0.003, "{padding} {report:?}");
    // By concatenation nothing is padded.
    let config = LoaderConfig { data: DataConfig::default(), ..config };
    assert_eq!(data.loader(&config).packing().unwrap().padding, 0.0);
}

#[test]
fn lengths_positions_and_mask_of_a_row() {
    let batch = Batch {
        step: 0,
        rows: 3,
        sequence_length: 6,
        tokens: vec![9; 21],
        document_starts: vec![vec![0, 4], vec![0, 2, 6], vec![0, 3]],
        filled: vec![7, 7, 5],
    };
    assert_eq!(batch.cumulative_lengths(0), [0, 4, 6]);
    assert_eq!(batch.cumulative_lengths(1), [0, 2, 6]);
    assert_eq!(batch.cumulative_lengths(2), [0, 3, 5, 6]);
    assert_eq!(batch.positions(2), [0, 1, 2, 0, 1, 0]);
    // Target i is token i + 1: the firsts of documents and padding do not count.
    assert_eq!(batch.loss_mask(0), [true, true, true, false, true, true]);
    assert_eq!(batch.loss_mask(1), [true, false, true, true, true, false]);
    assert_eq!(batch.loss_mask(2), [true, true, false, true, false, false]);
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
            let inside = (1..=config.sequence_length as u32).filter(|&i| first[batch.row(row)[i as usize] as usize]);
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
    let config = LoaderConfig {
        sequence_length: 4,
        rows: 2,
        data: DataConfig { shuffle_window_tokens: 8, ..DataConfig::default() },
        ..LoaderConfig::default()
    };
    let expected = data.naive_batches(&config, 40);
    let mut loader = data.loader(&config);
    for (step, expected) in expected.iter().enumerate() {
        assert_eq!(loader.batch(step as u64).unwrap(), *expected);
    }
    assert_eq!((loader.tokens_per_epoch(), loader.vocabulary_size(), loader.eos_id()), (5, 50_000, 2));
    assert_eq!((loader.bos_id(), loader.pad_id()), (Some(1), Some(0)));
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
fn a_state_that_was_text_in_between_is_that_of_the_same_batches() {
    let data = sources(&[("a", vec![300; 4]), ("b", vec![200; 4])], 1 << 20);
    // Numbers that serde_json, as it is built here, does not read back as it wrote them.
    let with = |a: f64| {
        let weights = [("a".to_string(), a), ("b".to_string(), 10.0 / 11.0)].into();
        let data = DataConfig { weights, padding: 2.0 / 11.0, ..DataConfig::default() };
        LoaderConfig { sequence_length: 64, rows: 2, data, ..LoaderConfig::default() }
    };
    let loader = data.loader(&with(1.0 / 11.0));
    let state = loader.state(5);
    let read: serde_json::Value = serde_json::from_str(&state.to_string()).unwrap();
    assert_eq!(loader.resume(&read).unwrap(), 5);
    assert_eq!(loader.resume(&state).unwrap(), 5);
    let error = data.loader(&with(1.0 / 12.0)).resume(&read).unwrap_err().to_string();
    assert!(error.contains("data was"), "{error}");
}

#[test]
fn metadata_of_older_shards_has_no_ids_of_bos_and_padding() {
    let older = serde_json::json!({"tokenizer": Digest::of(b""), "vocabulary_size": 9, "eos_id": 2, "seed": 1,
        "source": "a", "documents": 1, "tokens": 3, "row_groups": []});
    let metadata: ShardMetadata = serde_json::from_value(older).unwrap();
    assert_eq!((metadata.eos_id, metadata.bos_id, metadata.pad_id), (2, None, None));
}

#[test]
fn a_damaged_footer_is_an_error_with_the_file_or_does_no_harm() {
    use std::os::unix::fs::FileExt;
    let data = data_set(&[vec![300, 20, 7, 150]], 1000);
    let path = &data.shards[0].path;
    let config = LoaderConfig { sequence_length: 32, rows: 4, ..LoaderConfig::default() };
    // Two epochs, on this thread, so that a panic is one of the test.
    let batches = || -> Result<Vec<Batch>> {
        let mut assembler = Loader::open(&data.shards, config.clone())?.assembler()?;
        (0..8).map(|step| assembler.batch(step)).collect()
    };
    let expected = batches().unwrap();
    let whole = fs::read(path).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    let length = u32::from_le_bytes(whole[whole.len() - 8..whole.len() - 4].try_into().unwrap()) as usize;
    let mut refused = 0;
    for at in whole.len() - 8 - length..whole.len() {
        for damage in (0..8).map(|bit| 1u8 << bit).chain([0xFF]) {
            file.write_all_at(&[whole[at] ^ damage], at as u64).unwrap();
            match batches() {
                Ok(found) => assert!(found == expected, "byte {at} changed by {damage:#x} is not noticed"),
                Err(error) => {
                    refused += 1;
                    let error = error.to_string();
                    assert!(error.contains("part-00000.parquet"), "byte {at} changed by {damage:#x}: {error}");
                }
            }
        }
        file.write_all_at(&whole[at..=at], at as u64).unwrap();
    }
    assert!(batches().unwrap() == expected);
    // Of the rest much is for other readers: names, statistics, the other columns.
    assert!(refused > length, "{refused} of {}", 9 * (length + 8));
}

#[test]
fn a_stage_that_is_not_done_or_has_a_damaged_journal_is_not_loaded() {
    let data = data_set(&[vec![40; 9], vec![30; 9], vec![20; 9]], 1000);
    let dir = data.dir.path();
    let config = LoaderConfig { sequence_length: 16, rows: 2, ..LoaderConfig::default() };
    let refused = || Loader::open_stage(dir, config.clone()).err().unwrap().to_string();
    let write_manifest = |state| {
        fs::write(dir.join("manifest.json"), serde_json::to_vec(&manifest(&data, state)).unwrap()).unwrap();
    };
    let write_journal = |bytes: &[u8]| fs::write(dir.join("journal.jsonl"), bytes).unwrap();
    let whole = journal(&data);
    write_journal(&whole);
    let error = refused();
    assert!(error.contains("manifest.json"), "{error}");
    write_manifest(StageState::Running);
    let error = refused();
    assert!(error.contains("finish its run"), "{error}");
    write_manifest(StageState::Done);
    let mut loader = Loader::open_stage(dir, config.clone()).unwrap();
    assert!(loader.batch(3).unwrap() == data.loader(&config).batch(3).unwrap());
    // One byte of the second line of three.
    let second = whole.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    let mut damaged = whole.clone();
    damaged[second] = b'#';
    write_journal(&damaged);
    let error = refused();
    assert!(error.contains("journal.jsonl") && error.contains("line 2 is damaged"), "{error}");
    // The first line is gone.
    write_journal(&whole[second..]);
    let error = refused();
    assert!(error.contains("journal.jsonl") && error.contains("promises 3"), "{error}");
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
    let object = storage::Object { number: 0, path };
    let footer = index::read_footer(&Storage::Local, &object, data.shards[0].bytes).unwrap();
    let range = row_group::byte_range(&footer, groups - 2, row_group::token_column(&footer).unwrap());
    let (start, length) = (range.start, range.end - range.start);
    let mut damaged = whole.clone();
    damaged[start as usize + 30..(start + length) as usize - 30].fill(0);
    fs::write(path, &damaged).unwrap();
    let mut loader = data.loader(&config);
    let error = (0..).find_map(|step| loader.batch(step).err()).unwrap().to_string();
    assert!(error.contains("part-00000.parquet") && error.contains(&format!("row group {}", groups - 2)), "{error}");
    // One bit of one page, wherever it is: what decompression lets pass, the checksum does not.
    for at in [start + 40, start + length / 3, start + length / 2, start + length - 9] {
        let mut damaged = whole.clone();
        damaged[at as usize] ^= 4;
        fs::write(path, &damaged).unwrap();
        let mut loader = data.loader(&config);
        let error = (0..).find_map(|step| loader.batch(step).err()).unwrap().to_string();
        assert!(
            error.contains("part-00000.parquet") && error.contains(&format!("row group {}", groups - 2)),
            "{error}"
        );
    }
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

/// An object store in memory that counts its requests.
#[derive(Debug, Default)]
struct Counting {
    inner: object_store::memory::InMemory,
    requests: Arc<AtomicU64>,
    bytes: Arc<AtomicU64>,
}

impl std::fmt::Display for Counting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("counting")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Counting {
    async fn get_opts(
        &self,
        location: &object_store::path::Path,
        options: GetOptions,
    ) -> object_store::Result<object_store::GetResult> {
        let result = self.inner.get_opts(location, options).await?;
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(result.range.end - result.range.start, Ordering::Relaxed);
        Ok(result)
    }
    async fn put_opts(
        &self,
        location: &object_store::path::Path,
        payload: object_store::PutPayload,
        options: object_store::PutOptions,
    ) -> object_store::Result<object_store::PutResult> {
        self.inner.put_opts(location, payload, options).await
    }
    async fn put_multipart_opts(
        &self,
        location: &object_store::path::Path,
        options: object_store::PutMultipartOptions,
    ) -> object_store::Result<Box<dyn object_store::MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }
    fn delete_stream(
        &self,
        locations: futures::stream::BoxStream<'static, object_store::Result<object_store::path::Path>>,
    ) -> futures::stream::BoxStream<'static, object_store::Result<object_store::path::Path>> {
        self.inner.delete_stream(locations)
    }
    fn list(
        &self,
        prefix: Option<&object_store::path::Path>,
    ) -> futures::stream::BoxStream<'static, object_store::Result<object_store::ObjectMeta>> {
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(
        &self,
        prefix: Option<&object_store::path::Path>,
    ) -> object_store::Result<object_store::ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(
        &self,
        from: &object_store::path::Path,
        to: &object_store::path::Path,
        options: object_store::CopyOptions,
    ) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// The journal of the stage of a data set.
fn journal(data: &DataSet) -> Vec<u8> {
    let mut journal = Vec::new();
    for shard in &data.shards {
        let file = pipeline::shard::FileEntry {
            path: part_name(shard.index).into(),
            rows: shard.rows,
            bytes: shard.bytes,
            xxh3: shard.xxh3,
        };
        let entry = JournalEntry {
            task: shard.index,
            inputs: Digest::of(b""),
            files: vec![file],
            rows_read: shard.rows,
            rows_kept: shard.rows,
            dropped: BTreeMap::new(),
            notes: serde_json::Value::Null,
            seconds: 0.0,
        };
        journal.extend(serde_json::to_vec(&entry).unwrap());
        journal.push(b'\n');
    }
    journal
}

/// The manifest of the stage of a data set.
fn manifest(data: &DataSet, state: StageState) -> Manifest {
    Manifest {
        format: 1,
        stage: "tokens".into(),
        fingerprint: Digest::of(b""),
        version: 1,
        config: serde_json::Value::Null,
        inputs: BTreeMap::new(),
        tasks: data.shards.len() as u32,
        state,
        totals: Default::default(),
        notes: serde_json::Value::Null,
    }
}

/// The stage directory of a data set in an object store, journal and all.
fn uploaded(data: &DataSet) -> Counting {
    let store = Counting::default();
    let put = |name: &str, bytes: Vec<u8>| {
        let path = object_store::path::Path::from("runs/one/tokens").join(name);
        futures::executor::block_on(store.inner.put(&path, bytes.into())).unwrap();
    };
    for shard in &data.shards {
        put(&part_name(shard.index), fs::read(&shard.path).unwrap());
    }
    put("journal.jsonl", journal(data));
    store
}

/// The same with what the stage notes of each shard; `off` is added to the tokens of the last.
fn told_journal(data: &DataSet, off: u64) -> Vec<u8> {
    let mut told = Vec::new();
    for line in journal(data).split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        let mut entry: JournalEntry = serde_json::from_slice(line).unwrap();
        let metadata = ShardReader::open(&data.dir.path().join(&entry.files[0].path)).unwrap().metadata().clone();
        let mut counts = SourceCounts::default();
        if metadata.documents > 0 {
            let last = entry.task as usize + 1 == data.shards.len();
            let tokens = metadata.tokens + if last { off } else { 0 };
            let of = crate::counts::Counts { documents: metadata.documents, tokens, bytes: 0 };
            counts.0.insert(metadata.source.unwrap(), of);
        }
        entry.notes = counts.notes();
        told.extend(serde_json::to_vec(&entry).unwrap());
        told.push(b'\n');
    }
    told
}

#[test]
fn a_stage_is_opened_by_its_journal_and_its_shards_are_checked_when_they_are_read() {
    let prefix = object_store::path::Path::from("runs/one/tokens");
    let config = configs()[0].clone();
    let store = uploaded(&LARGE);
    let name = prefix.clone().join("journal.jsonl");
    futures::executor::block_on(store.inner.put(&name, told_journal(&LARGE, 0).into())).unwrap();
    let requests = store.requests.clone();
    let mut loader = Loader::open_store(Arc::new(store), &prefix, config.clone()).unwrap();
    assert_eq!(requests.load(Ordering::Relaxed), 2, "the journal, and one footer for all shards");
    let mut local = LARGE.loader(&config);
    assert_eq!((loader.fingerprint(), loader.state(9)), (local.fingerprint(), local.state(9)));
    for step in 0..2 * local.tokens_per_epoch() / (4 * 128) {
        assert!(loader.batch(step).unwrap() == local.batch(step).unwrap(), "step {step}");
    }

    let mut data = sources(&[("a", vec![40; 9]), ("a", vec![30; 9]), ("b", vec![20; 9])], 1000);
    let dir = data.dir.path().to_path_buf();
    let config = LoaderConfig { sequence_length: 16, rows: 2, ..LoaderConfig::default() };
    fs::write(dir.join("manifest.json"), serde_json::to_vec(&manifest(&data, StageState::Done)).unwrap()).unwrap();
    let opened = |off| {
        fs::write(dir.join("journal.jsonl"), told_journal(&data, off)).unwrap();
        Loader::open_stage(&dir, config.clone())
    };
    let mut whole = opened(0).unwrap();
    assert!((0..200).all(|step| whole.batch(step).unwrap() == data.loader(&config).batch(step).unwrap()));
    // A count that is wrong is met when the shard is opened.
    let mut wrong = opened(1).unwrap();
    let error = (0..200).find_map(|step| wrong.batch(step).err()).unwrap().to_string();
    assert!(error.contains("part-00002.parquet") && error.contains("journal of its stage promised"), "{error}");
    // One that cannot be added up, at once.
    let error = opened(u64::MAX - 500).err().unwrap().to_string();
    assert!(error.contains("part-00002.parquet") && error.contains("than can be counted"), "{error}");
    // Where notes cannot be those of the shard the footer counts: no document is lost.
    for said in [
        serde_json::json!({}),
        serde_json::json!({ "a": { "documents": 9, "tokens": 0, "bytes": 0 } }),
        serde_json::json!({ "a": { "documents": 0, "tokens": 0, "bytes": 0 } }),
        serde_json::json!({ "a": { "documents": 8, "tokens": 99, "bytes": 0 } }),
    ] {
        let mut altered = Vec::new();
        for line in told_journal(&data, 0).split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            let mut entry: JournalEntry = serde_json::from_slice(line).unwrap();
            if entry.task == 1 {
                entry.notes["sources"] = said.clone();
            }
            altered.extend(serde_json::to_vec(&entry).unwrap());
            altered.push(b'\n');
        }
        fs::write(dir.join("journal.jsonl"), altered).unwrap();
        let mut loader = Loader::open_stage(&dir, config.clone()).unwrap();
        let mut whole = data.loader(&config);
        assert_eq!(loader.tokens_per_epoch(), whole.tokens_per_epoch(), "{said}");
        assert!((0..200).all(|step| loader.batch(step).unwrap() == whole.batch(step).unwrap()), "{said}");
    }
    // A shard that another tokenizer has made is met when it is opened, too.
    let other = sources(&[("b", vec![20; 9])], 2000);
    let (ours, others) = (fs::read(&data.shards[2].path).unwrap(), fs::read(&other.shards[0].path).unwrap());
    fs::write(&data.shards[2].path, &others).unwrap();
    data.shards[2].bytes = others.len() as u64;
    fs::write(dir.join("journal.jsonl"), told_journal(&data, 0)).unwrap();
    let mut loader = Loader::open_stage(&dir, config.clone()).unwrap();
    let error = (0..200).find_map(|step| loader.batch(step).err()).unwrap().to_string();
    assert!(error.contains("part-00002.parquet") && error.contains("another tokenizer"), "{error}");
    // One that is cut short, or gone, when the stage is.
    data.shards[2].bytes = ours.len() as u64;
    fs::write(&data.shards[2].path, &ours).unwrap();
    fs::write(dir.join("journal.jsonl"), told_journal(&data, 0)).unwrap();
    for (left, said) in [(Some(&ours[..ours.len() - 1]), "promises"), (None, "part-00002.parquet")] {
        match left {
            Some(left) => fs::write(&data.shards[2].path, left).unwrap(),
            None => fs::remove_file(&data.shards[2].path).unwrap(),
        }
        let error = Loader::open_stage(&dir, config.clone()).err().unwrap().to_string();
        assert!(error.contains(said) && error.contains("part-00002.parquet"), "{error}");
    }
}

#[test]
fn batches_from_an_object_store_are_those_from_files() {
    let prefix = object_store::path::Path::from("runs/one/tokens");
    let config = configs()[0].clone();
    let mut local = LARGE.loader(&config);
    // Room for everything, and for less than a row group.
    for cache_bytes in [64 << 20, 1 << 10] {
        let store = uploaded(&LARGE);
        let (requests, bytes) = (store.requests.clone(), store.bytes.clone());
        let buffers = BufferConfig { cache_bytes, ..BufferConfig::default() };
        let config = LoaderConfig { buffers, ..config.clone() };
        let mut loader = Loader::open_store(Arc::new(store), &prefix, config).unwrap();
        assert_eq!(loader.fingerprint(), local.fingerprint());
        let opened = requests.load(Ordering::Relaxed);
        assert!(opened <= 1 + 2 * LARGE.shards.len() as u64, "{opened} requests to open");
        let steps = 3 * LARGE.loader(&configs()[0]).tokens_per_epoch() / (4 * 128);
        for step in 0..steps {
            assert!(loader.batch(step).unwrap() == local.batch(step).unwrap(), "step {step}");
        }
        let size: u64 = LARGE.shards.iter().map(|shard| shard.bytes).sum();
        let read = bytes.load(Ordering::Relaxed);
        match cache_bytes {
            // Three epochs, but no row group is read twice; shards this small are also read for their footers.
            0x400_0000 => assert!(read < 2 * size, "{read} of {size} bytes"),
            _ => assert!(read > 3 * size, "{read} of {size} bytes"),
        }
    }
    let error = Loader::open_store(Arc::new(Counting::default()), &prefix, config).err().unwrap().to_string();
    assert!(error.contains("runs/one/tokens/journal.jsonl"), "{error}");
}

#[test]
fn the_first_batch_after_a_far_step_reads_no_more_than_that_of_the_first_step() {
    let prefix = object_store::path::Path::from("runs/one/tokens");
    let size: u64 = LARGE.shards.iter().map(|shard| shard.bytes).sum();
    for step in [0, 1_000_000, 1 << 40] {
        let store = uploaded(&LARGE);
        let bytes = store.bytes.clone();
        let mut loader = Loader::open_store(Arc::new(store), &prefix, configs()[0].clone()).unwrap();
        let step = loader.resume(&loader.state(step)).unwrap();
        loader.batch(step).unwrap();
        drop(loader);
        let read = bytes.load(Ordering::Relaxed);
        assert!(read < 2 * size, "{read} of {size} bytes for step {step}");
    }
}

#[test]
fn what_is_held_ahead_is_no_part_of_batches_or_of_states() {
    let config = configs()[0].clone();
    let with = |prefetch_batches| {
        let buffers = BufferConfig { prefetch_batches, cache_bytes: 0 };
        Loader::open(&LARGE.shards, LoaderConfig { buffers, ..config.clone() })
    };
    let (mut usual, mut one, mut many) = (LARGE.loader(&config), with(1).unwrap(), with(1024).unwrap());
    for step in (0..50).chain([7, 1000]) {
        let batch = usual.batch(step).unwrap();
        assert!(one.batch(step).unwrap() == batch && many.batch(step).unwrap() == batch, "step {step}");
    }
    assert_eq!(many.state(50), usual.state(50));
    assert_eq!(one.resume(&usual.state(50)).unwrap(), 50);
    for prefetch_batches in [0, 1025, usize::MAX] {
        let error = with(prefetch_batches).err().unwrap().to_string();
        assert!(error.contains("prefetch_batches") && error.contains("from 1 to 1024"), "{error}");
    }
}

#[test]
fn the_loader_makes_no_more_batches_than_it_was_told_to() {
    let store = uploaded(&LARGE);
    let requests = store.requests.clone();
    let prefix = object_store::path::Path::from("runs/one/tokens");
    // Windows of one row group, so that what is read shows what is made.
    let data = DataConfig { shuffle_window_tokens: 1 << 18, ..DataConfig::default() };
    let buffers = BufferConfig { prefetch_batches: 1, cache_bytes: 0 };
    let config = LoaderConfig { sequence_length: 1 << 17, rows: 2, buffers, data, ..configs()[0].clone() };
    let mut loader = Loader::open_store(Arc::new(store), &prefix, config).unwrap();
    let opened = requests.load(Ordering::Relaxed);
    loader.batch(0).unwrap();
    // Whatever the time it has: one batch in the channel, one in the thread's hands, and no more.
    let settled = || {
        let mut last = 0;
        loop {
            std::thread::sleep(std::time::Duration::from_millis(200));
            let now = requests.load(Ordering::Relaxed);
            if now == last {
                return now - opened;
            }
            last = now;
        }
    };
    let first = settled();
    assert!(first <= 4 * 3, "{first} requests for a batch and one ahead");
    loader.batch(1).unwrap();
    assert!(settled() > first);
}

/// A server of the files below a directory that knows GET with and without a range, on a thread of its own.
fn serve(dir: std::path::PathBuf) -> (std::net::SocketAddr, Arc<AtomicU64>) {
    use std::io::{BufRead, BufReader, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let ranges = Arc::new(AtomicU64::new(0));
    let counter = ranges.clone();
    let answer = move |stream: std::net::TcpStream| -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let mut stream = stream;
        while let Some(request) = lines.next() {
            let request = request?;
            let path = request.split(' ').nth(1).unwrap_or("/").trim_start_matches('/').to_owned();
            let mut range = None;
            for line in lines.by_ref() {
                let line = line?.to_ascii_lowercase();
                if line.is_empty() {
                    break;
                }
                if let Some(bounds) = line.strip_prefix("range: bytes=") {
                    let (first, last) = bounds.split_once('-').unwrap();
                    range = Some((first.parse::<usize>().unwrap(), last.parse::<usize>().unwrap()));
                }
            }
            let head = match fs::read(dir.join(&path)) {
                Err(_) => ("404 Not Found".to_string(), Vec::new(), String::new()),
                Ok(bytes) => match range {
                    None => ("200 OK".into(), bytes, String::new()),
                    Some((first, last)) => {
                        counter.fetch_add(1, Ordering::Relaxed);
                        let content = format!("Content-Range: bytes {first}-{last}/{}\r\n", bytes.len());
                        ("206 Partial Content".into(), bytes[first..=last].to_vec(), content)
                    }
                },
            };
            let (status, body, range) = head;
            let date = "Last-Modified: Tue, 01 Jan 2030 00:00:00 GMT\r\nETag: \"1\"";
            let length = body.len();
            write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{range}{date}\r\n\r\n")?;
            stream.write_all(&body)?;
        }
        Ok(())
    };
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = answer.clone();
            // A client that goes away is no fault of the server.
            std::thread::spawn(move || drop(answer(stream)));
        }
    });
    (address, ranges)
}

#[test]
fn batches_from_a_web_server_are_those_from_files() {
    fs::write(LARGE.dir.path().join("journal.jsonl"), journal(&LARGE)).unwrap();
    let (address, ranges) = serve(LARGE.dir.path().into());
    let location = Location::of_url(&format!("http://{address}")).unwrap();
    let mut manifest = manifest(&LARGE, StageState::Running);
    let write = |manifest: &Manifest| {
        fs::write(LARGE.dir.path().join("manifest.json"), serde_json::to_vec(manifest).unwrap()).unwrap();
    };
    let refused = |config: &LoaderConfig| location.loader(config.clone()).err().unwrap().to_string();
    let config = configs()[1].clone();
    let error = refused(&config);
    assert!(error.contains(&format!("{address}/manifest.json")), "{error}");
    write(&manifest);
    let error = refused(&config);
    assert!(error.contains("finish its run"), "{error}");
    manifest.state = StageState::Done;
    manifest.tasks += 1;
    write(&manifest);
    let error = refused(&config);
    assert!(error.contains("journal.jsonl") && error.contains("promises"), "{error}");
    manifest.tasks -= 1;
    write(&manifest);
    // Also from within a runtime, as a stage of a run opens it.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut loader = runtime.block_on(async { location.loader(config.clone()).unwrap() });
    let state = LARGE.loader(&config).state(7);
    assert_eq!(loader.resume(&state).unwrap(), 7, "where the shards lie is no part of a state");
    let mut local = LARGE.loader(&config);
    for step in (0..400).chain([1_000_000]) {
        assert!(loader.batch(step).unwrap() == local.batch(step).unwrap(), "step {step}");
    }
    assert!(ranges.load(Ordering::Relaxed) > 5);
    drop(loader);
}
