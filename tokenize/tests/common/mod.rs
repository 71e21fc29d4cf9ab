//! A stage of given documents, and runs of it.
#![allow(dead_code, clippy::print_stderr)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{FixedSizeBinaryArray, RecordBatch, StringViewArray};
use arrow::datatypes::{DataType, Field, Schema};
use async_trait::async_trait;
use pipeline::document::document_id;
use pipeline::stage::Output;
use pipeline::{Result, RowsRead, RunContext, RunOptions, Runner, Stage, Task, TaskContext, TaskReport};
use tokenize::train::Trainer;
use tokenize::{TokenizeConfig, TokenizerConfig};

pub const SPEECHES: &str = include_str!("../fixtures/inaugural_addresses.txt");
pub const DECLARATION: &str = include_str!("../fixtures/udhr.txt");

#[derive(Clone, Debug)]
pub struct Document {
    pub id: [u8; 16],
    pub source: &'static str,
    pub text: String,
}

/// Paragraphs of the fixtures as documents, and an empty one.
pub fn documents() -> Vec<Document> {
    let sources = [("speeches", SPEECHES), ("declaration", DECLARATION)];
    let mut documents: Vec<Document> = sources
        .into_iter()
        .flat_map(|(source, text)| {
            let paragraphs = text.split(['\u{c}', '\n']).filter(|p| !p.is_empty());
            paragraphs.enumerate().map(move |(i, p)| Document {
                id: document_id(source, i as u64),
                source,
                text: p.into(),
            })
        })
        .collect();
    documents.push(Document { id: document_id("empty", 0), source: "speeches", text: String::new() });
    documents
}

/// Cuts documents into `shards` shards, unevenly; the last of several is empty.
pub struct Curate {
    pub documents: Vec<Document>,
    pub shards: usize,
}

#[async_trait]
impl Stage for Curate {
    fn name(&self) -> &str {
        "curate"
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        Vec::new()
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "shards": self.shards, "documents": self.documents.len() }))
    }
    async fn tasks(&self, _: &RunContext) -> Result<Vec<Task>> {
        Ok((0..self.shards as u32).map(|index| Task { index, inputs: serde_json::Value::Null }).collect())
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let chosen = || {
            let of_shard = |i: usize| (i * i / 7) % (self.shards - 1).max(1) == task.index() as usize;
            self.documents.iter().enumerate().filter(move |(i, _)| of_shard(*i)).map(|(_, d)| d)
        };
        let schema = Arc::new(Schema::new(vec![
            Field::new("id", DataType::FixedSizeBinary(16), false),
            Field::new("text", DataType::Utf8View, false),
            Field::new("source", DataType::Utf8View, false),
        ]));
        let batch = RecordBatch::try_new(
            schema,
            vec![
                Arc::new(
                    FixedSizeBinaryArray::try_from_sparse_iter_with_size(chosen().map(|d| Some(d.id)), 16).unwrap(),
                ),
                Arc::new(StringViewArray::from_iter_values(chosen().map(|d| &d.text))),
                Arc::new(StringViewArray::from_iter_values(chosen().map(|d| d.source))),
            ],
        )?;
        let plan = task.session().read_batch(batch)?;
        task.write(plan, Output { kept: &["id", "text", "source"], dropped: &[] }, RowsRead::Made).await
    }
}

/// Every `.jsonl.zst` and `.warc.gz` of the corpora at hand: the quickstart's, and those below `FULGURITE_CORPUS`.
pub fn corpora() -> Vec<PathBuf> {
    fn below(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.to_string_lossy();
            if path.is_dir() {
                below(&path, found);
            } else if name.ends_with(".jsonl.zst") || name.ends_with(".warc.gz") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/quickstart/corpus"), &mut found);
    match std::env::var_os("FULGURITE_CORPUS") {
        Some(dir) => below(Path::new(&dir), &mut found),
        None => eprintln!("only the quickstart's corpus was checked: FULGURITE_CORPUS names no directory of others"),
    }
    found.sort();
    found
}

/// Where not all of the corpora is checked, a document in so many is: `FULGURITE_CORPUS_EVERY`, or else 20.
pub fn every() -> usize {
    std::env::var("FULGURITE_CORPUS_EVERY").map_or(20, |n| n.parse().unwrap())
}

/// The `text` of every line of a `.jsonl.zst`; of a `.warc.gz` every record as it is, markup and all.
pub fn texts(path: &Path) -> Box<dyn Iterator<Item = String>> {
    let file = File::open(path).unwrap();
    if path.extension().is_some_and(|extension| extension == "zst") {
        let lines = BufReader::new(zstd::Decoder::new(file).unwrap()).lines();
        return Box::new(lines.filter_map(|line| {
            let record: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
            record["text"].as_str().map(String::from)
        }));
    }
    let mut bytes = Vec::new();
    flate2::read::MultiGzDecoder::new(file).read_to_end(&mut bytes).unwrap();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Box::new(text.split("WARC/1.").map(String::from).collect::<Vec<_>>().into_iter())
}

/// A Python that has these modules: `FULGURITE_PYTHON`, or else `python3`. Where the latter has not, the reason is
/// printed; who names a Python wants it asked.
pub fn python(modules: &str) -> Option<std::ffi::OsString> {
    let named = std::env::var_os("FULGURITE_PYTHON");
    let python = named.clone().unwrap_or_else(|| "python3".into());
    let reason = match std::process::Command::new(&python).args(["-c", &format!("import {modules}")]).output() {
        Ok(output) if output.status.success() => return Some(python),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim_end().to_owned(),
        Err(error) => error.to_string(),
    };
    assert!(named.is_none(), "FULGURITE_PYTHON: {python:?} cannot import {modules}: {reason}");
    let packages = modules.replace(',', "");
    eprintln!("not checked: python3 cannot import {packages} (pip install them, or set FULGURITE_PYTHON): {reason}");
    None
}

/// Ids of the two tokens of [`far_tokens`].
pub const FAR: [u32; 2] = [70_000, 70_001];
/// A text that is one token there.
pub const FAR_TEXT: &str = "United States";

/// Settings with a tokenizer of `dir` whose ids do not fit 16 bits: the small one, with a special token at the end of
/// documents and one that is not special, both far behind the others.
pub fn far_tokens(dir: &Path) -> TokenizeConfig {
    let mut config = config();
    let mut trainer = Trainer::new(&config.tokenizer).unwrap();
    trainer.feed(&[SPEECHES, DECLARATION]);
    let json = trainer.finish(|_| true).unwrap().unwrap().to_string(false).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&json).unwrap();
    for (id, (content, special)) in FAR.into_iter().zip([("<|far|>", true), (FAR_TEXT, false)]) {
        // `tokenizers` numbers an added token itself, unless the model has it.
        json["model"]["vocab"][content] = id.into();
        json["added_tokens"].as_array_mut().unwrap().push(serde_json::json!({"id": id, "content": content,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special}));
    }
    let path = dir.join("far.json");
    std::fs::write(&path, json.to_string()).unwrap();
    config.tokenizer.path = Some(path);
    config.tokenizer.eos_token = "<|far|>".into();
    config
}

/// A small vocabulary, an eighth held out, and shards of some thousand tokens.
pub fn config() -> TokenizeConfig {
    TokenizeConfig {
        tokenizer: TokenizerConfig { vocab_size: 1000, ..TokenizerConfig::default() },
        validation_fraction: 0.125,
        shard_tokens: 30_000,
        ..TokenizeConfig::default()
    }
}

/// Run all stages over `documents` in `shards` shards.
pub fn run(dir: &Path, documents: Vec<Document>, shards: usize, config: &TokenizeConfig, seed: u64) -> Result<()> {
    run_with(dir, documents, shards, config, seed, RunOptions { threads: 2, ..RunOptions::new() })
}

/// The same under other options.
pub fn run_with(
    dir: &Path,
    documents: Vec<Document>,
    shards: usize,
    config: &TokenizeConfig,
    seed: u64,
    options: RunOptions,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let context = RunContext::new(dir, options)?;
        let mut stages: Vec<Arc<dyn Stage>> = vec![Arc::new(Curate { documents, shards })];
        stages.extend(tokenize::token_stages(config, "curate", seed));
        Runner::new(context, stages)?.run(None).await
    })
}
