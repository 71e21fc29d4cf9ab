//! Documents through the stages: the shuffle depends on the seed alone, and nothing is lost.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use arrow::array::AsArray;
use arrow::compute::cast;
use arrow::datatypes::{DataType, UInt32Type, UInt64Type};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use pipeline::RunOptions;
use pipeline::shard::BATCH_ROWS;
use tokenize::counts::unigram_entropy;
use tokenize::inspect::token_rows;
use tokenize::loader::{DataConfig, Documents, Loader, LoaderConfig, Location, ShardReader};
use tokenize::shard::{METADATA_KEY, ShardMetadata, TokensDigest};
use tokenize::shuffle::{Split, shuffle_key};
use tokenize::{Encoder, TokenStatistics, TokenizeConfig, tokenizer_path};

use common::{Document, FAR, FAR_TEXT, config, documents, far_tokens, run, run_with};

struct Row {
    id: [u8; 16],
    source: String,
    bytes: u64,
    tokens: Vec<u32>,
}

fn shard_paths(run: &Path, stage: &str) -> Vec<PathBuf> {
    Location::Directory(run.join(stage)).shards().unwrap().into_iter().map(|s| s.path).collect()
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
fn sorts_that_spill_to_disk_write_the_same_bytes() {
    let tokenizer = tempfile::tempdir().unwrap();
    // One shard of each source, of ids of 32 bits: in both passes more than a task may hold.
    let config = TokenizeConfig { shard_tokens: 1 << 40, ..far_tokens(tokenizer.path()) };
    let mut many = Vec::new();
    for copy in 0..100u64 {
        many.extend((0..).zip(documents()).map(|(i, document)| Document {
            id: pipeline::document::document_id("copies", copy << 32 | i),
            ..document
        }));
    }
    let least = RunOptions { threads: 1, memory_limit_bytes: 32 << 20, ..RunOptions::new() };
    let ample = RunOptions { threads: 2, memory_limit_bytes: 4 << 30, ..RunOptions::new() };
    let outputs = [(least, true), (ample, false)].map(|(options, spills)| {
        let dir = tempfile::tempdir().unwrap();
        let seen = spilled_by(dir.path(), || run_with(dir.path(), many.clone(), 1, &config, 5, options).unwrap());
        for stage in ["encoded", "tokens"] {
            assert_eq!(seen.contains(stage), spills, "{stage}: spilled by {seen:?}");
        }
        bytes(dir.path(), &OUTPUTS)
    });
    assert!(outputs[0] == outputs[1]);
}

#[test]
fn documents_of_half_a_megabyte_are_sorted_in_little_memory() {
    let tokenizer = tempfile::tempdir().unwrap();
    let config = TokenizeConfig { shard_tokens: 1 << 40, ..far_tokens(tokenizer.path()) };
    let words: Vec<&str> = common::SPEECHES.split_whitespace().collect();
    let mut state = 1u64;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        words[(state >> 33) as usize % words.len()]
    };
    // Several row groups are slices of what was one batch.
    let long = |i: u64, text: String| Document { id: pipeline::document::document_id("long", i), source: "long", text };
    let text = |bytes: usize, word: &mut dyn FnMut() -> &'static str| {
        let mut text = String::new();
        while text.len() < bytes {
            text.push_str(word());
            text.push(' ');
        }
        text
    };
    let documents: Vec<Document> = (0..96).map(|i| long(i, text(512 << 10, &mut word))).collect();
    let little = RunOptions { threads: 1, memory_limit_bytes: 32 << 20, ..RunOptions::new() };
    let ample = RunOptions { threads: 2, memory_limit_bytes: 4 << 30, ..RunOptions::new() };
    let outputs = [little, ample].map(|options| {
        let dir = tempfile::tempdir().unwrap();
        run_with(dir.path(), documents.clone(), 1, &config, 5, options).unwrap();
        bytes(dir.path(), &OUTPUTS)
    });
    assert!(outputs[0] == outputs[1]);
}

/// The stages, by their manifests the last that had begun, in whose time there were files of spilled rows.
fn spilled_by(run: &Path, work: impl FnOnce() + Send) -> BTreeSet<&'static str> {
    std::thread::scope(|scope| {
        let working = scope.spawn(work);
        let mut seen = BTreeSet::new();
        while !working.is_finished() {
            let begun = ["tokens_validation", "tokens", "encoded", "tokenizer"];
            let stage = begun.into_iter().find(|stage| run.join(stage).join("manifest.json").exists());
            if has_file(&run.join("spill")) {
                seen.extend(stage);
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        working.join().unwrap();
        seen
    })
}

/// Whether there is a file below a directory, which need not be there.
fn has_file(dir: &Path) -> bool {
    let mut entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.any(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => has_file(&entry.path()),
        kind => kind.is_ok(),
    })
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
        let key = |row: &Row| {
            let text = &by_id[&row.id].text;
            (shuffle_key(&row.id, text, seed, config.validation_fraction), row.id)
        };
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
            bos_id: Some(1),
            pad_id: Some(0),
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
    // What cannot be used is refused by the key to change, before any work.
    let third = tempfile::tempdir().unwrap();
    let refused = |config: &TokenizeConfig| match run(third.path(), documents(), 1, config, 5).unwrap_err() {
        pipeline::Error::Setting { key, reason } => (key, reason),
        error => panic!("{error}"),
    };
    config.add_bos = true;
    config.tokenizer.bos_token = "<s>".into();
    let (key, reason) = refused(&config);
    assert!(key == "tokenize.tokenizer.bos_token" && reason.contains("\"<s>\""), "{key}: {reason}");
    config.tokenizer.eos_token = "</s>".into();
    let (key, reason) = refused(&config);
    assert!(key == "tokenize.tokenizer.eos_token" && reason.contains("\"</s>\""), "{key}: {reason}");
    assert!(reason.contains("<|endoftext|>"), "it says what there is: {reason}");
    let path = third.path().join("missing.json");
    config.tokenizer.path = Some(path.clone());
    let (key, reason) = refused(&config);
    assert!(key == "tokenize.tokenizer.path" && reason.contains("missing.json"), "{key}: {reason}");
    std::fs::write(&path, "{").unwrap();
    assert_eq!(refused(&config).0, "tokenize.tokenizer.path");
    assert!(!third.path().join("curate").exists());
}

#[test]
fn equal_texts_are_on_one_side_wherever_they_stand() {
    // Every text a second time in another place, and in another order: ids that none of them had.
    let mut moved = documents();
    moved.reverse();
    for (place, document) in (0..).zip(&mut moved) {
        document.id = pipeline::document::document_id("moved", place);
    }
    let twice: Vec<Document> = documents().into_iter().chain(moved.clone()).collect();
    let held_out = |documents: &[Document]| -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        run(dir.path(), documents.to_vec(), 3, &config(), 5).unwrap();
        let by_id: BTreeMap<[u8; 16], &str> = documents.iter().map(|d| (d.id, d.text.as_str())).collect();
        let of = |stage| -> BTreeSet<&str> { all_rows(dir.path(), stage).iter().map(|row| by_id[&row.id]).collect() };
        let (train, held_out) = (of("tokens"), of("tokens_validation"));
        assert!(train.is_disjoint(&held_out));
        held_out.into_iter().map(String::from).collect()
    };
    let first = held_out(&documents());
    assert!(first.len() > 50, "{}", first.len());
    assert!(held_out(&moved) == first && held_out(&twice) == first);
}

#[test]
fn ids_of_32_bits_go_through_stages_loader_and_inspection() {
    let dir = tempfile::tempdir().unwrap();
    let config = TokenizeConfig { add_bos: true, ..far_tokens(dir.path()) };
    let run_dir = dir.path().join("run");
    run(&run_dir, documents(), 3, &config, 5).unwrap();
    let mut reference = tokenizers::Tokenizer::from_file(tokenizer_path(&run_dir)).unwrap();
    reference.set_encode_special_tokens(true);
    let by_id: BTreeMap<[u8; 16], Document> = documents().into_iter().map(|d| (d.id, d)).collect();
    let (mut seen, mut far) = (0, 0);
    for path in shard_paths(&run_dir, "tokens").iter().chain(&shard_paths(&run_dir, "tokens_validation")) {
        let rows = rows(path);
        for row in &rows {
            let text = &by_id[&row.id].text;
            let mut expected = vec![1];
            expected.extend_from_slice(reference.encode_fast(text.as_str(), false).unwrap().get_ids());
            expected.push(FAR[0]);
            assert_eq!(row.tokens, expected);
            assert_eq!(row.tokens.iter().filter(|&&id| id == FAR[1]).count(), text.matches(FAR_TEXT).count());
            far += text.matches(FAR_TEXT).count();
        }
        seen += rows.len();
        let shard = ShardReader::open(path).unwrap();
        let metadata = shard.metadata();
        assert_eq!((metadata.vocabulary_size, metadata.eos_id), (FAR[1] + 1, FAR[0]));
        let (mut documents, mut loaded) = (Documents::default(), Vec::new());
        for group in 0..metadata.row_groups.len() {
            shard.read(group, &mut documents).unwrap();
            loaded.extend_from_slice(&documents.tokens);
        }
        assert!(loaded == rows.iter().flat_map(|row| row.tokens.clone()).collect::<Vec<u32>>());
        let (_, shown) = token_rows(path, None, 10_000, usize::MAX).unwrap();
        assert_eq!(shown.len(), rows.len());
        for (shown, row) in shown.iter().zip(&rows) {
            assert!(shown.ids == row.tokens && shown.tokens == row.tokens.len());
            let pieces = shown.pieces.iter().filter(|piece| *piece == FAR_TEXT).count();
            assert_eq!(pieces, by_id[&row.id].text.matches(FAR_TEXT).count());
        }
    }
    assert_eq!(seen, by_id.len());
    assert!(far > 30, "{far}");
    let config = LoaderConfig { sequence_length: 64, rows: 4, ..LoaderConfig::default() };
    let mut loader = Loader::open_stage(&run_dir.join("tokens"), config).unwrap();
    assert_eq!((loader.vocabulary_size(), loader.eos_id()), (FAR[1] + 1, FAR[0]));
    assert_eq!((loader.bos_id(), loader.pad_id()), (Some(1), Some(0)));
    assert!((0..500).any(|step| loader.batch(step).unwrap().tokens.contains(&FAR[1])));
}

#[test]
fn a_damaged_shard_is_not_shown() {
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), documents(), 2, &config(), 5).unwrap();
    let path = shard_paths(dir.path(), "tokens").remove(0);
    let (_, shown) = token_rows(&path, None, 3, 5).unwrap();
    for (shown, row) in shown.iter().zip(rows(&path)) {
        assert!(shown.ids == row.tokens[..row.tokens.len().min(5)] && shown.tokens == row.tokens.len());
        assert_eq!((shown.source.as_str(), shown.bytes), (row.source.as_str(), row.bytes));
    }
    assert_eq!(shown.len(), 3);
    // A bit in the middle of the tokens.
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(&path).unwrap()).unwrap();
    let group = reader.metadata().row_group(0);
    let tokens = group.columns().iter().find(|chunk| chunk.column_path().string().starts_with("tokens")).unwrap();
    let (start, length) = tokens.byte_range();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[(start + length / 2) as usize] ^= 4;
    std::fs::write(&path, bytes).unwrap();
    let error = token_rows(&path, None, 1, 5).unwrap_err().to_string();
    assert!(error.contains("part-00000.parquet") && error.contains("row group 0"), "{error}");
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
fn a_tokenizer_learns_from_no_more_words_than_it_is_told_to() {
    // Those of the documents of lowest hash, wherever they lie.
    let mut many = Vec::new();
    for copy in 0..4u64 {
        many.extend((0..).zip(documents()).map(|(i, document)| Document {
            id: pipeline::document::document_id("copies", copy << 32 | i),
            text: format!("{} w{copy}w{i}", document.text),
            ..document
        }));
    }
    let mut config = config();
    config.tokenizer.word_bytes = 50_000;
    let trained = |shards: usize, threads: usize, config: &TokenizeConfig| {
        let dir = tempfile::tempdir().unwrap();
        run_with(dir.path(), many.clone(), shards, config, 5, RunOptions { threads, ..RunOptions::new() }).unwrap();
        let notes = pipeline::Journal::read(&dir.path().join("tokenizer")).unwrap()[&0].notes.clone();
        (std::fs::read(tokenizer_path(dir.path())).unwrap(), notes)
    };
    let (tokenizer, notes) = trained(1, 2, &config);
    let number = |key: &str| notes[key].as_u64().unwrap();
    assert!(number("counted_bytes") < number("sample_bytes"), "{notes}");
    assert!(number("word_bytes") >= 50_000, "{notes}");
    for threads in [1, 4] {
        assert!(trained(6, threads, &config) == (tokenizer.clone(), notes.clone()), "{threads} threads");
    }
    // That is the tokenizer of a smaller sample, and no other words were looked at.
    config.tokenizer.sample_bytes = number("counted_bytes");
    config.tokenizer.word_bytes = 1 << 30;
    let (_, smaller) = trained(2, 2, &config);
    assert_eq!((&smaller["counted_bytes"], &smaller["word_bytes"]), (&notes["counted_bytes"], &notes["word_bytes"]));
    assert_eq!(smaller["distinct_words"], notes["distinct_words"]);
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
                            let number = step as usize * 16 + 16 * rank / world_size + row;
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
