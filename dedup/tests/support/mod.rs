//! A corpus through the runner, and what came of it.
#![allow(dead_code)]

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, FixedSizeBinaryArray, RecordBatch, StringViewArray, UInt64Array, new_null_array};
use arrow::compute::cast;
use arrow::datatypes::DataType;
use async_trait::async_trait;
use pipeline::document::{SCHEMA, document_id, ordinal};
use pipeline::shard::{ShardWriter, part_name};
use pipeline::stage::read_shards;
use pipeline::{RunContext, RunOptions, Runner, Stage, Task, TaskContext, TaskReport};

/// One document of a corpus: text and URL.
pub type Document = (String, Option<String>);

/// A stage that writes a given corpus, shard by shard. Every third record number is left out, as
/// ingest does when it quarantines a record.
pub struct Corpus(pub Vec<Vec<Document>>);

pub fn record(i: usize) -> u32 {
    (i + i / 2) as u32
}

#[async_trait]
impl Stage for Corpus {
    fn name(&self) -> &str {
        "documents"
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        Vec::new()
    }
    fn config(&self) -> pipeline::Result<serde_json::Value> {
        Ok(serde_json::json!({ "corpus": self.0 }))
    }
    async fn tasks(&self, _: &RunContext) -> pipeline::Result<Vec<Task>> {
        Ok((0..self.0.len() as u32).map(|index| Task { index, inputs: serde_json::json!({}) }).collect())
    }
    async fn execute(&self, task: &TaskContext) -> pipeline::Result<TaskReport> {
        let documents = &self.0[task.index() as usize];
        let n = documents.len();
        let ids = (0..n).map(|i| document_id(&format!("shard-{}", task.index()), u64::from(record(i))));
        let null = |column: usize| new_null_array(SCHEMA.field(column).data_type(), n);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(FixedSizeBinaryArray::try_from_sparse_iter_with_size(ids.map(Some), 16)?),
            Arc::new(UInt64Array::from_iter_values((0..n).map(|i| ordinal(task.index(), record(i))))),
            Arc::new(documents.iter().map(|(text, _)| Some(text.as_str())).collect::<StringViewArray>()),
            Arc::new(documents.iter().map(|(_, url)| url.as_deref()).collect::<StringViewArray>()),
            Arc::new(documents.iter().map(|_| Some("test")).collect::<StringViewArray>()),
            null(5),
            null(6),
            null(7),
        ];
        let mut writer = ShardWriter::create(task.stage_dir(), part_name(task.index()), SCHEMA.clone(), Vec::new())?;
        writer.write(RecordBatch::try_new(SCHEMA.clone(), columns)?)?;
        let files = vec![writer.finish()?];
        Ok(TaskReport { files, rows_read: n as u64, rows_kept: n as u64, ..TaskReport::default() })
    }
}

/// Run the stages behind the corpus.
pub async fn run(dir: &Path, corpus: &[Vec<Document>], stages: Vec<Arc<dyn Stage>>, threads: usize) -> Arc<RunContext> {
    let run = RunContext::new(dir, RunOptions { threads, ..RunOptions::new() }).unwrap();
    let mut all: Vec<Arc<dyn Stage>> = vec![Arc::new(Corpus(corpus.to_vec()))];
    all.extend(stages);
    Runner::new(run.clone(), all).unwrap().run(None).await.unwrap();
    run
}

/// A text of `n` words that no other seed shares shingles with.
pub fn text(seed: usize, n: usize) -> Vec<String> {
    (0..n).map(|i| format!("w{}x{}", letters(seed), letters(i * 7919 + seed))).collect()
}

pub fn letters(mut n: usize) -> String {
    let mut word = String::new();
    loop {
        word.push((b'a' + (n % 26) as u8) as char);
        n /= 26;
        if n == 0 {
            return word;
        }
    }
}

pub fn plain(text: impl Into<String>) -> Document {
    (text.into(), None)
}

/// Columns of a stage's rows as text; of its files in a directory below it with `STAGE/DIRECTORY`.
pub async fn table(run: &Arc<RunContext>, stage: &str, columns: &[&str]) -> Vec<Vec<String>> {
    use arrow::array::AsArray;
    let session = run.session();
    let (stage, below) = stage.split_once('/').unwrap_or((stage, ""));
    let mut rows = Vec::new();
    for entry in run.journal(stage).values() {
        let path = run.stage_dir(stage).join(below).join(part_name(entry.task));
        let file = &entry.files[0];
        let shard = pipeline::Shard { index: entry.task, path, rows: file.rows, bytes: file.bytes, xxh3: file.xxh3 };
        let table = read_shards(&session, &[shard]).await.unwrap();
        for batch in table.select_columns(columns).unwrap().collect().await.unwrap() {
            let texts: Vec<ArrayRef> = batch.columns().iter().map(|c| cast(c, &DataType::Utf8).unwrap()).collect();
            rows.extend(
                (0..batch.num_rows())
                    .map(|row| texts.iter().map(|t| t.as_string::<i32>().value(row).to_string()).collect()),
            );
        }
    }
    rows
}
