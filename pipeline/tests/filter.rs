//! The stages `signals` and `filter` over documents with known signals.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    Array, AsArray, FixedSizeBinaryBuilder, RecordBatch, StringViewArray, TimestampMillisecondArray, UInt64Array,
};
use arrow::compute::concat_batches;
use arrow::datatypes::{Float64Type, Int64Type, UInt64Type};
use async_trait::async_trait;
use datafusion::prelude::ParquetReadOptions;
use pipeline::document::{COLUMNS, SCHEMA, document_id, ordinal};
use pipeline::signals::{SIGNALS, Scratch, Value, compute};
use pipeline::stages::filter::{FilterConfig, FilterStage, RuleConfig};
use pipeline::stages::signals::{SignalsConfig, SignalsStage};
use pipeline::{
    Error, Output, Result, RowsRead, RunContext, RunOptions, Runner, Stage, StageStatus, Task, TaskContext, TaskReport,
};

/// Shards of documents with the given texts.
struct Documents {
    shards: Vec<Vec<String>>,
}

#[async_trait]
impl Stage for Documents {
    fn name(&self) -> &str {
        "documents"
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        vec![]
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!(self.shards))
    }
    async fn tasks(&self, _: &RunContext) -> Result<Vec<Task>> {
        Ok((0..self.shards.len() as u32).map(|index| Task { index, inputs: index.into() }).collect())
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let texts = &self.shards[task.index() as usize];
        let rows = texts.len();
        let none = StringViewArray::from(vec![None::<&str>; rows]);
        let mut ids = FixedSizeBinaryBuilder::new(16);
        for row in 0..rows {
            ids.append_value(document_id(&format!("shard {}", task.index()), row as u64))?;
        }
        let batch = RecordBatch::try_new(
            SCHEMA.clone(),
            vec![
                Arc::new(ids.finish()),
                Arc::new(UInt64Array::from_iter_values((0..rows as u32).map(|row| ordinal(task.index(), row)))),
                Arc::new(StringViewArray::from_iter_values(texts)),
                Arc::new(none.clone()),
                Arc::new(StringViewArray::from_iter_values(vec!["test"; rows])),
                Arc::new(none.clone()),
                Arc::new(TimestampMillisecondArray::from(vec![None; rows]).with_timezone("UTC")),
                Arc::new(none),
            ],
        )?;
        let plan = task.session().read_batch(batch)?;
        task.write(plan, Output { kept: &COLUMNS, dropped: &[] }, RowsRead::Made).await
    }
}

/// A text that passes every rule of every profile.
fn good(seed: usize) -> String {
    let subjects = ["river", "teacher", "market", "garden", "engine", "letter", "winter", "island"];
    let verbs = ["carried", "painted", "measured", "followed", "repaired", "described", "crossed", "opened"];
    let objects = ["bridges", "stories", "machines", "valleys", "windows", "baskets", "harbours", "lanterns"];
    let mut text = String::new();
    for n in 0..8 {
        let (s, v, o) = (subjects[(n + seed) % 8], verbs[(n * 3 + seed) % 8], objects[(n * 5 + seed) % 8]);
        text.push_str(&format!("{} the {s} that we {v} with care {n}{seed} went to {o}. ", 1900 + n));
    }
    text
}

async fn run_stages(
    dir: &Path,
    threads: usize,
    shards: &[Vec<String>],
    config: &FilterConfig,
) -> Result<Vec<StageStatus>> {
    let options = RunOptions { threads, ..RunOptions::new() };
    let run = RunContext::new(dir, options)?;
    let stages: Vec<Arc<dyn Stage>> = vec![
        Arc::new(Documents { shards: shards.to_vec() }),
        Arc::new(SignalsStage::new("documents", None, &SignalsConfig::default(), Path::new("."))?),
        Arc::new(FilterStage::new("signals", config, &SignalsConfig::default())?),
    ];
    let runner = Runner::new(run, stages)?;
    let plan = runner.plan(None)?.into_iter().map(|stage| stage.status).collect();
    runner.run(None).await?;
    Ok(plan)
}

async fn read(path: &Path) -> RecordBatch {
    let session = datafusion::prelude::SessionContext::new();
    let frame = session.read_parquet(path.to_str().unwrap(), ParquetReadOptions::default()).await.unwrap();
    let schema = Arc::new(frame.schema().as_arrow().clone());
    concat_batches(&schema, &frame.collect().await.unwrap()).unwrap()
}

fn part(dir: &Path, stage: &str, index: u32) -> std::path::PathBuf {
    dir.join(stage).join(pipeline::shard::part_name(index))
}

fn dropped(dir: &Path, index: u32) -> std::path::PathBuf {
    dir.join("filter/dropped").join(pipeline::shard::part_name(index))
}

fn ordinals(batch: &RecordBatch) -> Vec<u64> {
    batch["ordinal"].as_primitive::<UInt64Type>().values().to_vec()
}

fn strings(column: &dyn Array) -> Vec<Option<String>> {
    let strings = arrow::compute::cast(column, &arrow::datatypes::DataType::Utf8View).unwrap();
    strings.as_string_view().iter().map(|s| s.map(str::to_owned)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_are_the_columns_of_every_row() {
    let dir = tempfile::tempdir().unwrap();
    // More rows than a batch holds, so that order across batches shows.
    let shards: Vec<Vec<String>> = vec![
        (0..2500).map(|n| format!("{}\n{{{n}}} and…", "word ".repeat(n % 7))).collect(),
        vec![],
        vec![good(1), String::new()],
    ];
    run_stages(dir.path(), 2, &shards, &FilterConfig::default()).await.unwrap();
    for (index, texts) in shards.iter().enumerate() {
        let batch = read(&part(dir.path(), "signals", index as u32)).await;
        assert_eq!(batch.num_rows(), texts.len());
        assert_eq!(batch.num_columns(), 2 + SIGNALS.len() + 3, "and three of the language");
        assert_eq!(ordinals(&batch), (0..texts.len() as u32).map(|n| ordinal(index as u32, n)).collect::<Vec<_>>());
        let mut scratch = Scratch::default();
        for (row, text) in texts.iter().enumerate() {
            for (signal, value) in SIGNALS.iter().zip(compute(text, &mut scratch).values()) {
                let column = &batch[signal.name];
                let found = match value {
                    Value::Int64(_) => Value::Int64(column.as_primitive::<Int64Type>().value(row)),
                    Value::Float64(_) => Value::Float64(column.as_primitive::<Float64Type>().value(row)),
                    Value::Boolean(_) => Value::Boolean(column.as_boolean().value(row)),
                };
                assert_eq!(found, value, "{} of row {row}", signal.name);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_that_is_left_out_has_no_column_and_the_others_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let without = ["compression_ratio", "char_count"].map(str::to_owned);
    let config = SignalsConfig { without: without.to_vec(), ..SignalsConfig::default() };
    let texts = vec![good(1), "short".into(), String::new()];
    let run = RunContext::new(dir.path(), RunOptions::new()).unwrap();
    let stages: Vec<Arc<dyn Stage>> = vec![
        Arc::new(Documents { shards: vec![texts.clone()] }),
        Arc::new(SignalsStage::new("documents", None, &config, Path::new(".")).unwrap()),
        Arc::new(FilterStage::new("signals", &FilterConfig::default(), &config).unwrap()),
    ];
    Runner::new(run, stages).unwrap().run(None).await.unwrap();
    let batch = read(&part(dir.path(), "signals", 0)).await;
    assert_eq!(batch.num_columns(), 2 + SIGNALS.len() - 2 + 3);
    assert_eq!(ordinals(&read(&part(dir.path(), "filter", 0)).await), [0]);
    for signal in &SIGNALS {
        let Some(column) = batch.column_by_name(signal.name) else {
            assert!(without.iter().any(|name| name == signal.name), "{}", signal.name);
            continue;
        };
        let column = arrow::compute::cast(column, &arrow::datatypes::DataType::Float64).unwrap();
        for (row, text) in texts.iter().enumerate() {
            let all = compute(text, &mut Scratch::default()).values();
            let at = SIGNALS.iter().position(|s| s.name == signal.name).unwrap();
            let expected = match all[at] {
                Value::Int64(n) => n as f64,
                Value::Float64(x) => x,
                Value::Boolean(is) => f64::from(u8::from(is)),
            };
            assert_eq!(column.as_primitive::<Float64Type>().value(row), expected, "{} of row {row}", signal.name);
        }
    }
    let named = ["c4", "word_entropy", "compression_ratio"].map(str::to_owned).to_vec();
    let only = SignalsConfig { only: named, without: without.to_vec(), ..SignalsConfig::default() };
    let columns = ["c4_sentence_count", "c4_has_lorem_ipsum", "c4_has_curly_bracket", "word_entropy"];
    assert_eq!(only.columns()[..only.columns().len() - 3], columns);
    let error = FilterConfig::default().resolve(&only).unwrap_err().to_string();
    assert!(error.contains("gopher_too_few_words") && error.contains("signals.only leaves it out"), "{error}");
    // The profiles of the filter have all that its rules ask for.
    let profiles = FilterConfig::default().profiles;
    FilterConfig::default().resolve(&SignalsConfig { only: profiles, ..SignalsConfig::default() }).unwrap();
    let wrong = SignalsConfig { only: vec!["c4".into(), "finewbe".into()], ..SignalsConfig::default() };
    let error = SignalsStage::new("documents", None, &wrong, Path::new(".")).err().unwrap().to_string();
    assert!(error.contains("signals.only.1") && error.contains("did you mean \"fineweb\"?"), "{error}");
    let wrong = SignalsConfig { without: vec!["compresion_ratio".into()], ..SignalsConfig::default() };
    let error = SignalsStage::new("documents", None, &wrong, Path::new(".")).err().unwrap().to_string();
    assert!(error.contains("signals.without.0") && error.contains("did you mean \"compression_ratio\"?"), "{error}");
    let needed = SignalsConfig { without: vec!["hash_ratio".into()], ..SignalsConfig::default() };
    let error = FilterConfig::default().resolve(&needed).unwrap_err().to_string();
    assert!(error.contains("gopher_hashes") && error.contains("signals.without leaves it out"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_documents_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let config = FilterConfig {
        profiles: vec!["gopher".into(), "c4".into(), "fineweb".into()],
        thresholds: BTreeMap::from([("gopher_too_few_words".into(), 40.0)]),
        rules: vec![
            RuleConfig { name: "mine".into(), drop_when: "word_count > 107 AND symbol_ratio >= 0.0".into() },
            RuleConfig { name: "two_lines".into(), drop_when: "1 < line_count".into() },
        ],
        ..FilterConfig::default()
    };
    let curly = format!("{} {{ }}", good(2));
    let long = format!("{}After that, not one of them could remember what all this was for.", good(3));
    let shards = vec![vec![
        good(0),
        "too short".into(),
        curly,
        long,
        format!("{}\nAnother line that stands below and ends well.", good(5)),
        String::new(),
    ]];
    run_stages(dir.path(), 2, &shards, &config).await.unwrap();

    let kept = read(&part(dir.path(), "filter", 0)).await;
    assert_eq!(ordinals(&kept), [0]);
    assert_eq!(kept.num_columns(), 2);
    let gone = read(&dropped(dir.path(), 0)).await;
    assert_eq!(ordinals(&gone), [1, 2, 3, 4, 5]);
    assert_eq!(
        strings(&gone["rule"]),
        ["gopher_too_few_words", "c4_curly_bracket", "mine", "two_lines", "gopher_too_few_words"]
            .map(|s| Some(s.to_owned()))
    );
    let values: Vec<_> = gone["value"].as_primitive::<Float64Type>().iter().collect();
    assert_eq!(values, [Some(2.0), Some(1.0), None, Some(2.0), Some(0.0)]);
    let thresholds: Vec<_> = gone["threshold"].as_primitive::<Float64Type>().iter().collect();
    assert_eq!(thresholds, [Some(40.0), None, None, Some(1.0), Some(40.0)]);
    let rules = gone["rules"].as_list::<i32>();
    let of = |row| strings(&rules.value(row)).into_iter().flatten().collect::<Vec<_>>();
    // "too short": two words, no stop word, one 2-gram, no sentence.
    assert_eq!(
        of(0),
        [
            "gopher_too_few_words",
            "gopher_stop_words",
            "gopher_top_2gram",
            "c4_too_few_sentences",
            "fineweb_terminal_lines",
            "fineweb_short_lines"
        ]
    );
    // The last line ends in "}", so C4 would remove the only line, and FineWeb finds no line that ends well.
    assert_eq!(of(1), ["c4_curly_bracket", "c4_too_few_sentences", "fineweb_terminal_lines"]);
    assert_eq!(of(2), ["mine"]);
    assert_eq!(of(3), ["two_lines"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_threshold_redoes_the_decision_alone() {
    let dir = tempfile::tempdir().unwrap();
    let shards = vec![vec![good(0), "too short.".into()], vec![good(1)]];
    let mut config = FilterConfig { profiles: vec!["gopher_quality".into()], ..FilterConfig::default() };
    run_stages(dir.path(), 1, &shards, &config).await.unwrap();
    let signals = fs::read(part(dir.path(), "signals", 0)).unwrap();

    config.thresholds.insert("gopher_too_few_words".into(), 1.0);
    config.thresholds.insert("gopher_stop_words".into(), 0.0);
    config.thresholds.insert("gopher_mean".into(), 0.0);
    let error = run_stages(dir.path(), 1, &shards, &config).await.unwrap_err();
    assert!(
        matches!(&error, Error::Setting { key, reason } if key.starts_with("filter.thresholds.gopher_mean") && reason.contains("unknown rule \"gopher_mean")),
        "{error}"
    );

    config.thresholds.remove("gopher_mean");
    let plan = run_stages(dir.path(), 2, &shards, &config).await.unwrap();
    assert_eq!(plan[..2], [StageStatus::Done, StageStatus::Done]);
    assert!(matches!(plan[2], StageStatus::Stale { .. }), "{:?}", plan[2]);
    assert_eq!(fs::read(part(dir.path(), "signals", 0)).unwrap(), signals);
    assert_eq!(ordinals(&read(&part(dir.path(), "filter", 0)).await), [0, 1]);

    let plan = run_stages(dir.path(), 2, &shards, &config).await.unwrap();
    assert!(plan.iter().all(|status| *status == StageStatus::Done));
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_do_not_depend_on_threads() {
    let shards: Vec<Vec<String>> =
        (0..5).map(|s| (0..700).map(|n| if n % 3 == 0 { good(n + s) } else { "x ".repeat(n) }).collect()).collect();
    let mut outputs: Vec<Vec<Vec<u8>>> = Vec::new();
    for threads in [1, 2, 5] {
        let dir = tempfile::tempdir().unwrap();
        run_stages(dir.path(), threads, &shards, &FilterConfig::default()).await.unwrap();
        let files = (0..5).flat_map(|index| {
            [part(dir.path(), "signals", index), part(dir.path(), "filter", index), dropped(dir.path(), index)]
        });
        outputs.push(files.map(|file| fs::read(file).unwrap()).collect());
    }
    assert!(outputs.windows(2).all(|pair| pair[0] == pair[1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_rules_drop_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = FilterConfig { profiles: vec![], ..FilterConfig::default() };
    run_stages(dir.path(), 1, &[vec!["a".into(), String::new()]], &config).await.unwrap();
    assert_eq!(ordinals(&read(&part(dir.path(), "filter", 0)).await), [0, 1]);
    assert_eq!(read(&dropped(dir.path(), 0)).await.num_rows(), 0);
}

#[test]
fn a_recipe_is_read_strictly() {
    let config: FilterConfig = toml::from_str("").unwrap();
    assert_eq!(config, FilterConfig::default());
    let config: FilterConfig = toml::from_str(
        "profiles = [\"gopher\"]\n[thresholds]\ngopher_too_few_words = 80\n\
         [[rules]]\nname = \"short\"\ndrop_when = \"word_count < 80 AND symbol_ratio > 0.05\"",
    )
    .unwrap();
    let rules = config.resolve(&SignalsConfig::default()).unwrap();
    assert_eq!(rules[0].drop_when, "non_symbol_word_count < 80");
    assert_eq!(rules[23].name, "short");
    assert!(toml::from_str::<FilterConfig>("profile = [\"gopher\"]").is_err());
    assert!(toml::from_str::<FilterConfig>("[[rules]]\nname = \"x\"\ndrop = \"y\"").is_err());
    assert!(toml::from_str::<SignalsConfig>("x = 1").is_err());
    let config: FilterConfig = toml::from_str("profiles = [\"gophers\"]").unwrap();
    assert!(config.resolve(&SignalsConfig::default()).unwrap_err().to_string().contains("did you mean \"gopher\"?"));
}
