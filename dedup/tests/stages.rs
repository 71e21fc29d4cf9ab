//! The stages through the runner, on small corpora whose duplicates are known.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, FixedSizeBinaryArray, RecordBatch, StringViewArray, UInt64Array, new_null_array,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, UInt64Type};
use async_trait::async_trait;
use dedup::{ExactConfig, Keep, Key, NearConfig, exact_stages, near_stages};
use pipeline::document::{SCHEMA, document_id, ordinal};
use pipeline::shard::{ShardWriter, part_name};
use pipeline::stage::read_shards;
use pipeline::{RunContext, RunOptions, Runner, Stage, Task, TaskContext, TaskReport};

/// One document of a corpus: text and URL.
type Document = (String, Option<String>);

/// A stage that writes a given corpus, shard by shard. Every third record number is left out, as
/// ingest does when it quarantines a record.
struct Corpus(Vec<Vec<Document>>);

fn record(i: usize) -> u32 {
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
async fn run(dir: &Path, corpus: &[Vec<Document>], stages: Vec<Arc<dyn Stage>>, threads: usize) -> Arc<RunContext> {
    let run = RunContext::new(dir, RunOptions { threads, ..RunOptions::new() }).unwrap();
    let mut all: Vec<Arc<dyn Stage>> = vec![Arc::new(Corpus(corpus.to_vec()))];
    all.extend(stages);
    Runner::new(run.clone(), all).unwrap().run(None).await.unwrap();
    run
}

/// A dropped document: rule, cluster and survivor.
type Dropped = BTreeMap<u64, (String, u64, u64)>;

/// What a last stage kept and dropped, by ordinal.
async fn outcome(run: &Arc<RunContext>, stage: &str) -> (BTreeSet<u64>, Dropped) {
    let session = run.session();
    let (mut kept, mut dropped) = (BTreeSet::new(), BTreeMap::new());
    for shard in run.shards(stage).unwrap() {
        let rows = read_shards(&session, std::slice::from_ref(&shard)).await.unwrap();
        for batch in rows.select_columns(&["ordinal"]).unwrap().collect().await.unwrap() {
            let ordinals = batch.column(0).as_primitive::<UInt64Type>().values();
            assert!(ordinals.is_sorted(), "a selection is in the order of its documents");
            kept.extend(ordinals);
        }
        let mut shard = shard;
        shard.path = run.stage_dir(stage).join("dropped").join(part_name(shard.index));
        let rows = read_shards(&session, std::slice::from_ref(&shard)).await.unwrap();
        let rows = rows.select_columns(&["ordinal", "cluster_id", "survivor", "rule"]).unwrap();
        for batch in rows.collect().await.unwrap() {
            let number = |i: usize| batch.column(i).as_primitive::<UInt64Type>();
            let rules = cast(batch.column(3), &DataType::Utf8View).unwrap();
            for row in 0..batch.num_rows() {
                let rule = rules.as_string_view().value(row).to_string();
                dropped.insert(number(0).value(row), (rule, number(1).value(row), number(2).value(row)));
            }
        }
    }
    (kept, dropped)
}

/// Every committed file of a run, by path below its directory.
fn files(run: &RunContext, stages: &[&str]) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for stage in stages {
        for entry in run.journal(stage).values() {
            for file in &entry.files {
                let path = Path::new(stage).join(&file.path);
                files.insert(path.clone(), std::fs::read(run.dir().join(path)).unwrap());
            }
        }
    }
    files
}

/// A text of `n` words that no other seed shares shingles with.
fn text(seed: usize, n: usize) -> Vec<String> {
    (0..n).map(|i| format!("w{}x{}", letters(seed), letters(i * 7919 + seed))).collect()
}

fn letters(mut n: usize) -> String {
    let mut word = String::new();
    loop {
        word.push((b'a' + (n % 26) as u8) as char);
        n /= 26;
        if n == 0 {
            return word;
        }
    }
}

fn plain(text: impl Into<String>) -> Document {
    (text.into(), None)
}

/// Three shards: copies that differ in case and white space within and across shards, short and
/// empty texts among them, and texts of their own.
fn exact_corpus() -> Vec<Vec<Document>> {
    (0..3)
        .map(|shard| {
            (0..50)
                .map(|i| {
                    plain(match (shard * 50 + i) % 10 {
                        0 => format!("The same  Text {}", i / 20),
                        1 => format!(" the same text\n{} ", i / 20),
                        2 if shard == 1 => String::new(),
                        3 => "one".into(),
                        _ => format!("text number {} of shard {shard}", i),
                    })
                })
                .collect()
        })
        .collect()
}

/// What exact deduplication must come to, by comparing every text with all before it.
fn exact_by_hand(corpus: &[Vec<Document>], longest: bool) -> (BTreeSet<u64>, Dropped) {
    let mut groups: BTreeMap<String, Vec<(u64, usize)>> = BTreeMap::new();
    for (shard, documents) in corpus.iter().enumerate() {
        for (i, (text, _)) in documents.iter().enumerate() {
            let form = text.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ");
            groups.entry(form).or_default().push((ordinal(shard as u32, record(i)), text.len()));
        }
    }
    let (mut kept, mut dropped) = (BTreeSet::new(), BTreeMap::new());
    for members in groups.values() {
        let first = members[0].0;
        let length = |m: &(u64, usize)| if longest { m.1 } else { 0 };
        let survivor = members.iter().min_by_key(|m| (std::cmp::Reverse(length(m)), m.0)).unwrap().0;
        kept.insert(survivor);
        for (member, _) in members.iter().filter(|(m, _)| *m != survivor) {
            dropped.insert(*member, ("exact_duplicate".to_string(), first, survivor));
        }
    }
    (kept, dropped)
}

#[tokio::test(flavor = "multi_thread")]
async fn exact_equals_brute_force_for_both_policies() {
    let corpus = exact_corpus();
    for keep in [Keep::Earliest, Keep::Longest] {
        let dir = tempfile::tempdir().unwrap();
        let config = ExactConfig { keep, ..ExactConfig::default() };
        let run = run(dir.path(), &corpus, exact_stages(&config, "documents", None), 2).await;
        let (kept, dropped) = outcome(&run, "exact").await;
        let expected = exact_by_hand(&corpus, keep == Keep::Longest);
        assert!(dropped.len() > 30, "{}", dropped.len());
        assert_eq!((kept, dropped), expected, "{keep:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn urls_go_first_and_texts_are_compared_among_what_they_leave() {
    let url = |text: &str, url: &str| (text.to_string(), Some(url.to_string()));
    let corpus = vec![vec![
        url("first text", "http://example.org/a"),
        // Same page, other text: goes by its URL, so that its text does not take the next with it.
        url("second text", "https://example.org/a#part"),
        url("second text", "https://example.org/b?utm_source=x"),
        plain("second  text"),
        plain("third text"),
    ]];
    let dir = tempfile::tempdir().unwrap();
    let config = ExactConfig { by: vec![Key::Text, Key::Url], ..ExactConfig::default() };
    let run = run(dir.path(), &corpus, exact_stages(&config, "documents", None), 2).await;
    let at = |i| ordinal(0, record(i));
    let (_, by_url) = outcome(&run, "exact_url").await;
    assert_eq!(by_url, BTreeMap::from([(at(1), ("same_url".into(), at(0), at(0)))]));
    let (kept, by_text) = outcome(&run, "exact").await;
    assert_eq!(kept, BTreeSet::from([at(0), at(2), at(4)]));
    assert_eq!(by_text, BTreeMap::from([(at(3), ("exact_duplicate".into(), at(2), at(2)))]));
}

/// From the United States' Declaration of Independence (1776), in the public domain.
const PARAGRAPH: &str = include_str!("fixtures/declaration_of_independence.txt");

/// `words` with word number `at` replaced.
fn with_change(words: &[&str], at: usize) -> String {
    let mut words = words.to_vec();
    words[at] = "zebra";
    words.join(" ")
}

#[tokio::test(flavor = "multi_thread")]
async fn near_finds_the_variants_of_a_real_text() {
    let words: Vec<&str> = PARAGRAPH.split_whitespace().collect();
    // A change in the middle costs five shingles: similarity about (n-9)/(n+1), beyond 0.95 here.
    let changed = with_change(&words, words.len() / 2);
    let shouted = PARAGRAPH.to_uppercase().replace('\n', " ");
    let longer = format!("{PARAGRAPH}\nRead it again.");
    // Half of it: similarity 1/2, chance of meeting 5 %, none with these permutations.
    let half = words[..words.len() / 2].join(" ");
    let corpus = vec![
        vec![plain(text(1, 200).join(" ")), plain(PARAGRAPH), plain("four words are short")],
        vec![plain(half), plain(changed), plain("")],
        vec![
            plain(longer),
            plain(text(2, 200).join(" ")),
            plain(shouted),
            plain("Four words, are... SHORT"),
            plain(""),
        ],
    ];
    let at = |shard, i| ordinal(shard, record(i));
    let gone = |survivor: u64| ("near_duplicate".to_string(), at(0, 1), survivor);
    for (keep, survivor) in [(Keep::Earliest, at(0, 1)), (Keep::Longest, at(2, 0))] {
        let dir = tempfile::tempdir().unwrap();
        let config = NearConfig { keep, ..NearConfig::default() };
        let run = run(dir.path(), &corpus, near_stages(&config, "documents", None), 2).await;
        let (kept, dropped) = outcome(&run, "near").await;
        let mut expected: Dropped = [at(0, 1), at(1, 1), at(2, 0), at(2, 2)]
            .into_iter()
            .filter(|o| *o != survivor)
            .map(|o| (o, gone(survivor)))
            .collect();
        // Equal short texts meet; texts without words do not.
        let short = if keep == Keep::Longest { (at(0, 2), at(2, 3)) } else { (at(2, 3), at(0, 2)) };
        expected.insert(short.0, ("near_duplicate".into(), at(0, 2), short.1));
        assert_eq!(dropped, expected, "{keep:?}");
        assert_eq!(kept.len() + dropped.len(), 11);
        assert!(kept.contains(&at(1, 2)) && kept.contains(&at(2, 4)), "empty documents stay");
    }
}

/// Chains (each document shares most of its words with the next), equal documents, and singles.
fn near_corpus() -> Vec<Vec<Document>> {
    let mut documents = Vec::new();
    let tape = text(3, 1000);
    for i in 0..40 {
        documents.push(tape[i * 4..i * 4 + 400].join(" "));
    }
    for i in 0..120 {
        documents.push(text(10 + i, 60).join(" "));
    }
    documents.extend(std::iter::repeat_n(text(5, 80).join(" "), 60));
    let mut shards = vec![Vec::new(); 4];
    for (i, document) in documents.into_iter().enumerate() {
        shards[i * 13 % 4].push(plain(document));
    }
    shards
}

const STAGES: [&str; 7] =
    ["exact_hashes", "exact_groups", "exact", "near_signatures", "near_pairs", "near_clusters", "near"];

fn both() -> Vec<Arc<dyn Stage>> {
    let mut stages = exact_stages(&ExactConfig::default(), "documents", None);
    stages.extend(near_stages(&NearConfig::default(), "documents", Some("exact")));
    stages
}

#[tokio::test(flavor = "multi_thread")]
async fn outputs_are_the_same_bytes_for_any_number_of_threads_and_after_a_loss() {
    let corpus = near_corpus();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let one = run(dirs[0].path(), &corpus, both(), 1).await;
    let four = run(dirs[1].path(), &corpus, both(), 4).await;
    let expected = files(&one, &STAGES);
    // Three or more files a stage and dropped rows: the comparison says something.
    assert!(expected.len() > 30, "{}", expected.len());
    assert!(expected == files(&four, &STAGES), "1 and 4 threads differ");
    let (kept, dropped) = outcome(&one, "near").await;
    assert_eq!(kept.len(), 1 + 120 + 1);
    let clusters: BTreeSet<u64> = dropped.values().map(|(_, cluster, _)| *cluster).collect();
    assert_eq!((dropped.len(), clusters.len()), (39, 1), "the chain is one cluster");
    drop((one, four));

    for lost in ["near_pairs/part-00003.parquet", "near_clusters/part-00000.parquet", "exact_hashes/part-00001.parquet"]
    {
        std::fs::remove_file(dirs[0].path().join(lost)).unwrap();
    }
    let again = run(dirs[0].path(), &corpus, both(), 3).await;
    assert!(expected == files(&again, &STAGES), "a lost shard came back otherwise");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_documents_and_empty_shards_pass_through() {
    for corpus in [vec![], vec![vec![], vec![]], vec![vec![plain("")], vec![]]] {
        let dir = tempfile::tempdir().unwrap();
        let run = run(dir.path(), &corpus, both(), 2).await;
        let (kept, dropped) = outcome(&run, "near").await;
        assert_eq!((kept.len(), dropped.len()), (corpus.iter().flatten().count(), 0));
        assert_eq!(run.journal("near").len(), corpus.len());
    }
}

#[test]
fn settings_without_meaning_are_refused() {
    for bad in [
        NearConfig { ngram: 0, ..NearConfig::default() },
        NearConfig { rows: 0, ..NearConfig::default() },
        NearConfig { bands: 0, ..NearConfig::default() },
        NearConfig { bands: 256, ..NearConfig::default() },
    ] {
        assert!(near_stages(&bad, "documents", None)[0].config().is_err(), "{bad:?}");
    }
    let parsed: Result<NearConfig, _> = serde_json::from_str(r#"{"band": 3}"#);
    assert!(parsed.unwrap_err().to_string().contains("unknown field `band`"));
    let parsed: ExactConfig = serde_json::from_str(r#"{"normalise": "none", "by": ["url"]}"#).unwrap();
    assert_eq!(parsed.by, [Key::Url]);
}
