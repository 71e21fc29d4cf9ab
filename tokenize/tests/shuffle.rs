//! Documents through the stages: the shuffle depends on the seed alone, and nothing is lost.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use arrow::array::AsArray;
use arrow::compute::cast;
use arrow::datatypes::{DataType, UInt32Type, UInt64Type};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use pipeline::shard::BATCH_ROWS;
use tokenize::counts::unigram_entropy;
use tokenize::loader::{DataConfig, Loader, LoaderConfig, committed_shards};
use tokenize::shard::{METADATA_KEY, ShardMetadata, TokensDigest};
use tokenize::shuffle::{Split, shuffle_key};
use tokenize::{Encoder, TokenStatistics, TokenizeConfig, tokenizer_path};

use common::{Document, config, documents, run};

struct Row {
    id: [u8; 16],
    source: String,
    bytes: u64,
    tokens: Vec<u32>,
}

fn shard_paths(run: &Path, stage: &str) -> Vec<PathBuf> {
    committed_shards(&run.join(stage)).unwrap().into_iter().map(|s| s.path).collect()
}

fn rows(path: &Path) -> Vec<Row> {
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(path).unwrap()).unwrap();
    let mut rows = Vec::new();
    for batch in reader.with_batch_size(BATCH_ROWS).build().unwrap() {
        let batch = batch.unwrap();
        let column = |name| batch.column_by_name(name).unwrap().clone();
        let sources = cast(&column("source"), &DataType::Utf8).unwrap();
        for i in 0..batch.num_rows() {
            let tokens = cast(&column("tokens").as_list::<i32>().value(i), &DataType::UInt32).unwrap();
            rows.push(Row {
                id: column("id").as_fixed_size_binary().value(i).try_into().unwrap(),
                source: sources.as_string::<i32>().value(i).into(),
                bytes: column("bytes").as_primitive::<UInt64Type>().value(i),
                tokens: tokens.as_primitive::<UInt32Type>().values().to_vec(),
            });
        }
    }
    rows
}

fn metadata(path: &Path) -> ShardMetadata {
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(path).unwrap()).unwrap();
    let pairs = reader.metadata().file_metadata().key_value_metadata().unwrap().clone();
    serde_json::from_str(pairs.iter().find(|p| p.key == METADATA_KEY).unwrap().value.as_ref().unwrap()).unwrap()
}

fn all_rows(run: &Path, stage: &str) -> Vec<Row> {
    shard_paths(run, stage).iter().flat_map(|p| rows(p)).collect()
}

fn bytes(run: &Path, stages: &[&str]) -> Vec<Vec<u8>> {
    let files = stages.iter().flat_map(|stage| shard_paths(run, stage));
    files.map(|path| std::fs::read(path).unwrap()).collect()
}

const OUTPUTS: [&str; 3] = ["tokens", "tokens_validation", "token_statistics"];

#[test]
fn token_shards_depend_on_documents_and_seed_not_on_the_layout_of_shards() {
    let dirs: Vec<_> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
    let mut reversed = documents();
    reversed.reverse();
    run(dirs[0].path(), documents(), 1, &config(), 7).unwrap();
    run(dirs[1].path(), documents(), 5, &config(), 7).unwrap();
    run(dirs[2].path(), reversed, 3, &config(), 7).unwrap();
    run(dirs[3].path(), documents(), 5, &config(), 8).unwrap();
    let outputs: Vec<_> = dirs.iter().map(|d| bytes(d.path(), &OUTPUTS)).collect();
    let tokenizers: Vec<_> = dirs.iter().map(|d| std::fs::read(tokenizer_path(d.path())).unwrap()).collect();
    assert!(shard_paths(dirs[0].path(), "tokens").len() > 3);
    assert!(tokenizers[..3].iter().all(|t| *t == tokenizers[0]));
    assert!(outputs[1] == outputs[0] && outputs[2] == outputs[0], "the layout of the shards shows");
    assert!(outputs[3] != outputs[0], "the seed does not show");
    // Another seed: another order, the same split.
    let ids = |dir: &Path, stage| {
        let mut ids: Vec<_> = all_rows(dir, stage).into_iter().map(|r| r.id).collect();
        ids.sort();
        ids
    };
    for stage in ["tokens", "tokens_validation"] {
        assert_eq!(ids(dirs[3].path(), stage), ids(dirs[0].path(), stage));
    }
}

#[test]
fn every_document_is_in_one_shard_with_its_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, seed) = (dir.path(), 3);
    let config = TokenizeConfig { add_bos: true, ..config() };
    run(dir, documents(), 4, &config, seed).unwrap();
    let encoder = Encoder::load(tokenizer_path(dir)).unwrap();
    let by_id: BTreeMap<[u8; 16], Document> = documents().into_iter().map(|d| (d.id, d)).collect();
    let mut seen = 0;
    for (stage, split) in [("tokens", Split::Train), ("tokens_validation", Split::Validation)] {
        // Sources one after the other, each in shuffled order.
        let key = |row: &Row| (shuffle_key(&row.id, seed, config.validation_fraction), row.id);
        let rows = all_rows(dir, stage);
        seen += rows.len();
        let order = |row: &Row| (row.source.clone(), key(row));
        assert!(rows.windows(2).all(|w| order(&w[0]) < order(&w[1])), "{stage} is not in order");
        assert!(rows.iter().all(|r| Split::of_key(key(r).0) == split));
        for row in &rows {
            let document = &by_id[&row.id];
            let mut expected = vec![1];
            encoder.encode(&document.text, &mut expected).unwrap();
            expected.push(2);
            assert_eq!(row.tokens, expected);
            assert_eq!((row.bytes, row.source.as_str()), (document.text.len() as u64, document.source));
            assert_eq!(encoder.decode(&row.tokens[1..row.tokens.len() - 1]).unwrap(), document.text);
        }
    }
    assert_eq!(seen, by_id.len());
    let held_out = all_rows(dir, "tokens_validation").len() as f64 / seen as f64;
    assert!((0.08..0.17).contains(&held_out), "{held_out}");
}

#[test]
fn footers_notes_and_statistics_count_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    run(dir, documents(), 2, &config(), 5).unwrap();
    let encoder = Encoder::load(tokenizer_path(dir)).unwrap();
    for path in shard_paths(dir, "tokens").iter().chain(&shard_paths(dir, "tokens_validation")) {
        let rows = rows(path);
        let tokens: Vec<u32> = rows.iter().flat_map(|r| r.tokens.iter().copied()).collect();
        let starts = rows.iter().scan(0, |at, row| {
            *at += row.tokens.len() as u32;
            Some(*at - row.tokens.len() as u32)
        });
        let expected = ShardMetadata {
            tokenizer: encoder.digest(),
            vocabulary_size: 1024,
            eos_id: 2,
            seed: 5,
            source: Some(rows[0].source.clone()),
            documents: rows.len() as u64,
            tokens: tokens.len() as u64,
            // They are shorter than a row group.
            row_groups: vec![TokensDigest::of(&tokens, &starts.collect::<Vec<u32>>())],
        };
        assert!(rows.iter().all(|row| row.source == rows[0].source));
        assert_eq!(metadata(path), expected);
    }
    let rows = all_rows(dir, "tokens");
    let statistics = TokenStatistics::load(dir).unwrap();
    let counts = statistics.train_counts().unwrap();
    for source in ["speeches", "declaration"] {
        let of_source: Vec<&Row> = rows.iter().filter(|r| r.source == source).collect();
        let counts = counts.0[source];
        assert_eq!(counts.documents, of_source.len() as u64);
        assert_eq!(counts.tokens, of_source.iter().map(|r| r.tokens.len() as u64).sum::<u64>());
        assert_eq!(counts.bytes, of_source.iter().map(|r| r.bytes).sum::<u64>());
    }
    let mut occurrences = vec![0u64; 1024];
    rows.iter().flat_map(|r| &r.tokens).for_each(|&t| occurrences[t as usize] += 1);
    let entropy = unigram_entropy(occurrences.iter().copied());
    assert!((statistics.unigram_entropy - entropy).abs() < 1e-12);
    assert!(entropy > 4.0 && entropy < 1024f64.ln());
    assert_eq!(statistics.tokens_used, occurrences.iter().filter(|&&n| n > 0).count() as u64);
}

#[test]
fn an_existing_tokenizer_is_used_as_it_is() {
    let first = tempfile::tempdir().unwrap();
    run(first.path(), documents(), 1, &config(), 5).unwrap();
    let mut config = config();
    config.tokenizer.path = Some(tokenizer_path(first.path()));
    let second = tempfile::tempdir().unwrap();
    run(second.path(), documents(), 2, &config, 5).unwrap();
    let files = |dir: &Path| (std::fs::read(tokenizer_path(dir)).unwrap(), bytes(dir, &OUTPUTS));
    assert!(files(first.path()) == files(second.path()));
    // A role that the file has no token for is refused by name.
    config.tokenizer.eos_token = "</s>".into();
    let third = tempfile::tempdir().unwrap();
    let error = run(third.path(), documents(), 1, &config, 5).unwrap_err().to_string();
    assert!(error.contains("</s>"), "{error}");
}

#[test]
fn a_sample_of_the_documents_trains_the_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config();
    config.tokenizer.sample_bytes = 100_000;
    run(dir.path(), documents(), 2, &config, 5).unwrap();
    let notes = pipeline::Journal::read(&dir.path().join("tokenizer")).unwrap()[&0].notes.clone();
    let sampled = notes["sample_bytes"].as_u64().unwrap();
    // Up to the document with which it is reached.
    assert!((100_000..103_000).contains(&sampled), "{notes}");
    assert!(notes["text_bytes"].as_u64().unwrap() > 2 * sampled, "{notes}");
    // By source, each its share.
    let dir = tempfile::tempdir().unwrap();
    config.tokenizer.source_weights = [("speeches".to_string(), 3.0), ("declaration".to_string(), 1.0)].into();
    run(dir.path(), documents(), 2, &config, 5).unwrap();
    let notes = pipeline::Journal::read(&dir.path().join("tokenizer")).unwrap()[&0].notes.clone();
    for (source, share) in [("speeches", 75_000), ("declaration", 25_000)] {
        let bytes = notes["sample_bytes_by_source"][source].as_u64().unwrap();
        assert!((share..share + 3_000).contains(&bytes), "{notes}");
    }
    config.tokenizer.source_weights = [("speech".to_string(), 1.0)].into();
    let dir = tempfile::tempdir().unwrap();
    let error = run(dir.path(), documents(), 2, &config, 5).unwrap_err().to_string();
    assert!(error.contains("\"speech\"") && error.contains("speeches"), "{error}");
}

#[test]
fn no_held_out_documents_make_an_empty_shard() {
    let dir = tempfile::tempdir().unwrap();
    let config = TokenizeConfig { validation_fraction: 0.0, ..config() };
    run(dir.path(), documents(), 2, &config, 5).unwrap();
    assert_eq!(all_rows(dir.path(), "tokens_validation").len(), 0);
    assert_eq!(all_rows(dir.path(), "tokens").len(), documents().len());
}

#[test]
fn all_ranks_together_load_every_kept_document_once_an_epoch_when_the_world_changes_its_size() {
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), documents(), 3, &config(), 5).unwrap();
    let encoder = Encoder::load(tokenizer_path(dir.path())).unwrap();
    let by_id: BTreeMap<[u8; 16], Document> = documents().into_iter().map(|d| (d.id, d)).collect();
    let rows = all_rows(dir.path(), "tokens");
    for source in ["speeches", "declaration"] {
        // What has to come: the documents, encoded anew, in the order of the shuffle.
        let (mut expected, mut starts) = (Vec::new(), Vec::new());
        for row in rows.iter().filter(|row| row.source == source) {
            starts.push(expected.len());
            encoder.encode(&by_id[&row.id].text, &mut expected).unwrap();
            expected.push(2);
        }
        // Windows of one sequence, so that sequences come in the order of the stream.
        let weights = [(source.to_string(), 1.0)].into();
        let data = DataConfig { weights, shuffle_window_tokens: 1, ..DataConfig::default() };
        let length = 50;
        let config = LoaderConfig { sequence_length: length, rows: 16, data, ..LoaderConfig::default() };
        let steps = expected.len().div_ceil(16 * length) as u64;
        for worlds in [[1, 2], [2, 3], [3, 8], [8, 1]] {
            let mut sequences = BTreeMap::new();
            let open = |rank, world_size| {
                let config = LoaderConfig { rank, world_size, ..config.clone() };
                Loader::open_stage(&dir.path().join("tokens"), config).unwrap()
            };
            let mut state = open(0, worlds[0]).state(0);
            for (world_size, until) in worlds.into_iter().zip([steps / 2, steps]) {
                for rank in 0..world_size {
                    let mut loader = open(rank, world_size);
                    let first = loader.resume(&state).unwrap();
                    for step in first..until {
                        let batch = loader.batch(step).unwrap();
                        for row in 0..batch.rows {
                            let number = step as usize * 16 + rank + row * world_size;
                            let starts = batch.document_starts[row].clone();
                            assert!(sequences.insert(number, (batch.row(row)[..length].to_vec(), starts)).is_none());
                        }
                    }
                }
                state = open(0, world_size).state(until);
            }
            assert_eq!(sequences.len() as u64, 16 * steps);
            let mut loaded: Vec<u32> = sequences.values().flat_map(|(tokens, _)| tokens.iter().copied()).collect();
            loaded.truncate(expected.len());
            assert!(loaded == expected, "{source} {worlds:?}");
            // No document follows another without a border.
            for &start in &starts {
                assert!(sequences[&(start / length)].1.contains(&((start % length) as u32)), "{source} {start}");
            }
        }
    }
}
