//! The stages ingest, clean and curate through the runner, on files of every format.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch, StringArray, UInt64Array};
use arrow::datatypes::{DataType, Field, Schema, UInt64Type};
use async_trait::async_trait;
use datafusion::prelude::{ParquetReadOptions, SessionContext, col, lit};
use pipeline::digest::Digest;
use pipeline::document::{self, document_id};
use pipeline::ingest::{FieldMapping, IngestConfig, InputConfig, InputFormat};
use pipeline::shard::TextCompression;
use pipeline::stage::tasks_per_shard;
use pipeline::stages::clean::{CleanConfig, CleanStage};
use pipeline::stages::curate::CurateStage;
use pipeline::stages::ingest::IngestStage;
use pipeline::{
    Error, Output, Result, RowsRead, RunContext, RunOptions, Runner, Stage, StageStatus, Task, TaskContext, TaskReport,
};

const LINES: usize = 300;

/// Files of every format below `dir/in`.
fn write_inputs(dir: &Path) {
    let input = dir.join("in");
    std::fs::create_dir_all(input.join("deep")).unwrap();
    let lines = |name: &str| -> String {
        (0..LINES)
            .map(|n| {
                format!(
                    "{{\"text\":\"{name} says that document {n} is here. lower line\",\"url\":\"http://{name}/{n}\"}}\n"
                )
            })
            .collect()
    };
    std::fs::write(input.join("plain.jsonl"), lines("plain")).unwrap();
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(lines("gz").as_bytes()).unwrap();
    std::fs::write(input.join("deep/b.jsonl.gz"), gz.finish().unwrap()).unwrap();
    std::fs::write(input.join("deep/c.jsonl.zst"), zstd::encode_all(lines("zst").as_bytes(), 3).unwrap()).unwrap();
    std::fs::write(input.join("note.txt"), "A note in a file of its own.\nno mark here at all").unwrap();
    std::fs::write(input.join("bad.jsonl"), "{\"text\":\"One good line.\"}\n{\"text\":\n{\"txt\":\"x\"}\n").unwrap();
    let texts: StringArray = (0..LINES).map(|n| Some(format!("Row {n} of the table is a document too."))).collect();
    let schema = Arc::new(Schema::new(vec![Field::new("text", DataType::Utf8, false)]));
    let batch = RecordBatch::try_new(schema.clone(), vec![Arc::new(texts)]).unwrap();
    let file = std::fs::File::create(input.join("deep/d.parquet")).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, schema, None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn config(max_bad_records: u64) -> IngestConfig {
    let input = InputConfig {
        source: "all".into(),
        paths: vec!["in".into()],
        format: InputFormat::Auto,
        fields: FieldMapping::default(),
    };
    IngestConfig { split_bytes: 5000, max_bad_records, inputs: vec![input], ..IngestConfig::default() }
}

fn ingest(dir: &Path, config: IngestConfig) -> Arc<dyn Stage> {
    Arc::new(IngestStage::new(config, dir.to_path_buf()).unwrap())
}

fn runner(dir: &Path, threads: usize, stages: Vec<Arc<dyn Stage>>) -> Runner {
    let options = RunOptions { threads, ..RunOptions::new() };
    Runner::new(RunContext::new(dir, options).unwrap(), stages).unwrap()
}

/// Digest of every Parquet file below `dir`.
fn outputs(dir: &Path) -> BTreeMap<PathBuf, Digest> {
    let mut found = BTreeMap::new();
    let mut left = vec![dir.to_path_buf()];
    while let Some(next) = left.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|e| e == "parquet") {
                found.insert(path.strip_prefix(dir).unwrap().into(), Digest::of_file(&path).unwrap());
            }
        }
    }
    found
}

/// Rows of the shards below `dir`, in order.
async fn rows(dir: &Path, sql: &str) -> RecordBatch {
    let session = SessionContext::new();
    let path = format!("{}/", dir.display());
    session.register_parquet("shards", path, ParquetReadOptions::default()).await.unwrap();
    let frame = session.sql(sql).await.unwrap();
    let schema = frame.schema().inner().clone();
    arrow::compute::concat_batches(&schema, &frame.collect().await.unwrap()).unwrap()
}

fn strings(batch: &RecordBatch, column: usize) -> Vec<String> {
    batch.column(column).as_string_view().iter().map(|s| s.unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_every_format_become_the_same_shards_for_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    write_inputs(dir.path());
    let (one, four) = (dir.path().join("one"), dir.path().join("four"));
    runner(&one, 1, vec![ingest(dir.path(), config(10))]).run(None).await.unwrap();
    runner(&four, 4, vec![ingest(dir.path(), config(10))]).run(None).await.unwrap();
    assert_eq!(outputs(&one), outputs(&four));
    assert!(outputs(&one).len() > 10, "{} files", outputs(&one).len());

    let totals = &pipeline::status::summaries(&one).unwrap()[0].totals;
    assert_eq!(totals.rows_kept, 4 * LINES as u64 + 2);
    assert_eq!(totals.dropped, BTreeMap::from([("invalid_json".into(), 1), ("missing_text".into(), 1)]));
    assert_eq!(totals.rows_read, totals.rows_kept + totals.rows_dropped());

    let documents = rows(&one.join("ingest"), "select id, ordinal, text, url from shards order by ordinal").await;
    let ordinals = documents.column(1).as_primitive::<UInt64Type>();
    assert!(ordinals.values().windows(2).all(|pair| pair[0] < pair[1]));
    // The order is that of the sorted file names; ids are those of file and place.
    let texts = strings(&documents, 2);
    assert_eq!(texts[0], "One good line.");
    assert!(texts[1].starts_with("gz says that document 0"), "{}", texts[1]);
    let ids = documents.column(0).as_fixed_size_binary();
    assert_eq!(ids.value(0), document_id("in/bad.jsonl", 0));
    assert_eq!(ids.value(2), document_id("in/deep/b.jsonl.gz", 1));
    assert_eq!(documents.column(3).as_string_view().value(2), "http://gz/1");
    let plain = texts.iter().position(|t| t.starts_with("plain says that document 1 ")).unwrap();
    let first_line = "{\"text\":\"plain says that document 0 is here. lower line\",\"url\":\"http://plain/0\"}\n".len();
    assert_eq!(ids.value(plain), document_id("in/plain.jsonl", first_line as u64));

    let sql = "select rule, file, record, detail from shards order by ordinal";
    let dropped = rows(&one.join("ingest/dropped"), sql).await;
    assert_eq!(strings(&dropped, 0), ["invalid_json", "missing_text"]);
    assert_eq!(strings(&dropped, 1), ["in/bad.jsonl", "in/bad.jsonl"]);
    assert_eq!(strings(&dropped, 2), ["line 2", "line 3"]);

    // The checkout may move: the same files elsewhere give the same bytes.
    let elsewhere = tempfile::tempdir().unwrap();
    write_inputs(elsewhere.path());
    runner(&elsewhere.path().join("run"), 2, vec![ingest(elsewhere.path(), config(10))]).run(None).await.unwrap();
    assert_eq!(outputs(&elsewhere.path().join("run")), outputs(&one));
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_have_the_schema_of_documents() {
    let dir = tempfile::tempdir().unwrap();
    write_inputs(dir.path());
    let run = dir.path().join("run");
    runner(&run, 2, vec![ingest(dir.path(), config(10))]).run(None).await.unwrap();
    let batch = rows(&run.join("ingest"), "select * from shards").await;
    assert_eq!(batch.schema().fields(), document::SCHEMA.fields());
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_bad_records_stop_the_stage_and_a_changed_file_makes_it_stale() {
    let dir = tempfile::tempdir().unwrap();
    write_inputs(dir.path());
    let run = dir.path().join("run");
    let error = runner(&run, 1, vec![ingest(dir.path(), config(1))]).run(None).await.unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::Limit(_)), "{message}");
    for part in [
        "2 bad records (1 invalid_json, 1 missing_text)",
        "max_bad_records = 1",
        "in/bad.jsonl, line 2",
        "ingest/dropped",
    ] {
        assert!(message.contains(part), "{part} in {message}");
    }
    // The limit does not influence the output: a higher one goes on where the stage stopped.
    runner(&run, 1, vec![ingest(dir.path(), config(2))]).run(None).await.unwrap();
    let status = |n| runner(&run, 1, vec![ingest(dir.path(), config(n))]).plan(None).unwrap()[0].status.clone();
    assert_eq!(status(5), StageStatus::Done);
    std::fs::write(dir.path().join("in/note.txt"), "Another note.").unwrap();
    assert!(matches!(status(5), StageStatus::Stale { .. }), "{:?}", status(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_compression_is_other_bytes_of_the_same_documents() {
    let dir = tempfile::tempdir().unwrap();
    write_inputs(dir.path());
    let run = dir.path().join("run");
    let stage = |name: &str| {
        let compression = TextCompression::try_from(name.to_owned()).unwrap();
        vec![ingest(dir.path(), IngestConfig { compression, ..config(10) })]
    };
    let mut found = Vec::new();
    for name in ["zstd:1", "none", "zstd:3"] {
        if name != "zstd:1" {
            let plan = runner(&run, 1, stage(name)).plan(None).unwrap();
            let StageStatus::Stale { reason } = &plan[0].status else { panic!("{name}: {:?}", plan[0].status) };
            assert!(reason.contains("compression") && reason.contains(name), "{reason}");
        }
        runner(&run, 2, stage(name)).run(None).await.unwrap();
        assert_eq!(runner(&run, 1, stage(name)).plan(None).unwrap()[0].status, StageStatus::Done);
        found.push((outputs(&run), rows(&run.join("ingest"), "select * from shards order by ordinal").await));
    }
    // The default is what is compressed when nothing is said.
    let plain = dir.path().join("plain");
    runner(&plain, 1, vec![ingest(dir.path(), config(10))]).run(None).await.unwrap();
    assert_eq!(outputs(&plain), found[0].0);
    assert_eq!((&found[0].1, &found[0].1), (&found[1].1, &found[2].1));
    assert!(found[0].0 != found[1].0 && found[0].0 != found[2].0);
}

#[test]
fn recipes_that_cannot_work_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |config| IngestStage::new(config, dir.path().to_path_buf()).err().unwrap().to_string();
    assert!(refused(IngestConfig::default()).starts_with("ingest.inputs: there are none"));
    assert!(refused(config(1)).starts_with("ingest.inputs.0.paths: \"in\" does not exist"));
    assert!(refused(IngestConfig { split_bytes: 0, ..config(1) }).starts_with("ingest.split_bytes"));
}

/// Keeps every third document.
struct EveryThird;

#[async_trait]
impl Stage for EveryThird {
    fn name(&self) -> &str {
        "third"
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        vec!["clean".into()]
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::Value::Null)
    }
    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, "clean")
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let plan = task.read(&task.session(), "clean", task.index()).await?;
        let plan = plan.filter((col("ordinal") % lit(3u64)).eq(lit(0u64)))?;
        task.write(plan, Output { kept: &["ordinal"], dropped: &[] }, RowsRead::Made).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cleaned_and_selected_documents_are_curated_in_order() {
    let dir = tempfile::tempdir().unwrap();
    write_inputs(dir.path());
    let run = dir.path().join("run");
    let stages: Vec<Arc<dyn Stage>> = vec![
        ingest(dir.path(), config(10)),
        Arc::new(CleanStage::new(CleanConfig { c4_lines: true, ..CleanConfig::default() }, "ingest", None).unwrap()),
        Arc::new(EveryThird),
        Arc::new(CurateStage::new("clean", Some("third".into()))),
    ];
    runner(&run, 2, stages).run(None).await.unwrap();
    let totals: Vec<_> = pipeline::status::summaries(&run).unwrap().into_iter().map(|s| s.totals).collect();
    // The lines of the JSON files have no terminal mark, so nothing of them is left.
    assert_eq!(totals[1].dropped, BTreeMap::from([("no_line_left".into(), 3 * LINES as u64)]));
    assert_eq!(totals[1].rows_kept, LINES as u64 + 2);
    assert_eq!(totals[3].rows_read, totals[2].rows_kept);
    assert_eq!(totals[3].rows_kept, totals[2].rows_kept);

    let sql = "select ordinal, text from shards order by ordinal";
    let cleaned = rows(&run.join("clean"), sql).await;
    assert!(strings(&cleaned, 1).contains(&"A note in a file of its own.".to_owned()));
    let keep: UInt64Array = cleaned.column(0).as_primitive::<UInt64Type>().clone();
    let mask = arrow::array::BooleanArray::from_iter(keep.iter().map(|n| Some(n.unwrap() % 3 == 0)));
    let expected = arrow::compute::filter_record_batch(&cleaned, &mask).unwrap();
    let curated = rows(&run.join("curate"), sql).await;
    assert_eq!(curated, expected);
    let columns = rows(&run.join("curate"), "select * from shards").await;
    let names: Vec<String> = columns.schema().fields().iter().map(|f| f.name().clone()).collect();
    assert_eq!(names, document::COLUMNS);
    assert_eq!(columns.column(0).null_count(), 0);
}
