//! The stages through the runner, on small corpora whose duplicates are known.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::AsArray;
use arrow::compute::cast;
use arrow::datatypes::{DataType, SchemaRef, UInt64Type};
use async_trait::async_trait;
use datafusion::functions::expr_fn::left;
use datafusion::prelude::{col, lit};
use dedup::{ExactConfig, Keep, Key, Mode, NearConfig, Places, Verify, exact_stages, near_stages};
use pipeline::document::{SCHEMA, ordinal};
use pipeline::shard::part_name;
use pipeline::stage::{read_shards, tasks_per_shard};
use pipeline::stages::signals::{SignalsConfig, SignalsStage};
use pipeline::{
    Error, Output, RowsRead, RunContext, RunOptions, Runner, Stage, Task, TaskContext, TaskReport,
    Verify as Verification,
};

mod support;
use support::{Corpus, Document, letters, plain, record, run, table, text};

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
        let config = ExactConfig { keep: keep.clone(), ..ExactConfig::default() };
        let run =
            run(dir.path(), &corpus, exact_stages(&config, "documents", None, None, Path::new(".")).unwrap(), 2).await;
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
        // No address is no page.
        url("fourth text", ""),
        url("fifth text", ""),
        url("sixth text", " \n"),
    ]];
    let dir = tempfile::tempdir().unwrap();
    let config = ExactConfig { by: vec![Key::Text, Key::Url], ..ExactConfig::default() };
    let run =
        run(dir.path(), &corpus, exact_stages(&config, "documents", None, None, Path::new(".")).unwrap(), 2).await;
    let at = |i| ordinal(0, record(i));
    let (_, by_url) = outcome(&run, "exact_url").await;
    assert_eq!(by_url, BTreeMap::from([(at(1), ("same_url".into(), at(0), at(0)))]));
    let (kept, by_text) = outcome(&run, "exact").await;
    assert_eq!(kept, BTreeSet::from([0, 2, 4, 5, 6, 7].map(at)));
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
        let config = NearConfig { keep: keep.clone(), ..NearConfig::default() };
        let run =
            run(dir.path(), &corpus, near_stages(&config, "documents", None, None, Path::new(".")).unwrap(), 2).await;
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

const STAGES: [&str; 9] = [
    "exact_hashes",
    "exact_groups",
    "exact_removals",
    "exact",
    "near_signatures",
    "near_pairs",
    "near_clusters",
    "near_removals",
    "near",
];

fn both() -> Vec<Arc<dyn Stage>> {
    let mut stages = exact_stages(&ExactConfig::default(), "documents", None, None, Path::new(".")).unwrap();
    stages.extend(near_stages(&NearConfig::default(), "documents", Some("exact"), None, Path::new(".")).unwrap());
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

    for lost in ["near_pairs/part-00003.runs", "near_clusters/part-00000.runs", "exact_hashes/part-00001.runs"] {
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
        assert!(near_stages(&bad, "documents", None, None, Path::new(".")).is_err(), "{bad:?}");
    }
    let exact =
        NearConfig { verify: Verify::Exact, against: vec!["old/near_signatures".into()], ..NearConfig::default() };
    let error = near_stages(&exact, "documents", None, None, Path::new(".")).err().unwrap();
    assert!(matches!(&error, Error::Setting { key, reason } if key == "near.verify" && reason.contains("\"sketch\"")));
    let parsed: Result<NearConfig, _> = serde_json::from_str(r#"{"band": 3}"#);
    assert!(parsed.unwrap_err().to_string().contains("unknown field `band`"));
    let parsed: ExactConfig = serde_json::from_str(r#"{"normalise": "none", "by": ["url"]}"#).unwrap();
    assert_eq!(parsed.by, [Key::Url]);
}

/// A generator of numbers (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((z ^ (z >> 27)) >> 11) as usize % n
    }
}

/// 2,000 documents in four shards: families whose members differ from one of them by 0 to 24 words of 40 to 140, and
/// texts of zero, one and four words.
fn families() -> Vec<Vec<Document>> {
    let mut numbers = Numbers(7);
    let mut documents: Vec<String> = Vec::new();
    while documents.len() < 1940 {
        let mut family = vec![text(1000 + documents.len(), 40 + numbers.below(100))];
        for _ in 0..numbers.below(5) {
            let mut words = family[numbers.below(family.len())].clone();
            for _ in 0..numbers.below(25) {
                let at = numbers.below(words.len());
                words[at] = format!("other{}", letters(numbers.below(5000)));
            }
            family.push(words);
        }
        documents.extend(family.into_iter().map(|words| words.join(" ")));
    }
    documents.truncate(1940);
    for short in ["", "one", "four words are short", "Other four words here"] {
        documents.extend(std::iter::repeat_n(short.to_string(), 15));
    }
    let mut shards = vec![Vec::new(); 4];
    // A document's relatives are in all shards.
    for (i, document) in documents.into_iter().enumerate() {
        shards[i * 7 % 4].push(plain(document));
    }
    shards
}

/// What near deduplication must come to, by comparing every document with every other: those that are similar
/// (and, unless `by_similarity_alone`, share a band) are connected; the survivor is chosen among all that are.
fn near_by_hand(corpus: &[Vec<Document>], config: &NearConfig, by_similarity_alone: bool) -> BTreeMap<u64, (u64, u64)> {
    let minhash = config.minhash();
    let mut scratch = dedup::minhash::Scratch::default();
    let mut documents = Vec::new();
    for (shard, texts) in corpus.iter().enumerate() {
        for (i, (text, _)) in texts.iter().enumerate() {
            let mut keys = Vec::new();
            minhash.band_keys(text, &mut scratch, &mut keys);
            let set: BTreeSet<u64> = minhash.shingles(text, &mut scratch).iter().copied().collect();
            documents.push((ordinal(shard as u32, record(i)), keys, set, text.len()));
        }
    }
    let n = documents.len();
    let mut cluster: Vec<usize> = (0..n).collect();
    for a in 0..n {
        for b in 0..a {
            let ((_, keys, set, _), (_, others, other, _)) = (&documents[a], &documents[b]);
            if cluster[a] == cluster[b] || set.is_empty() {
                continue;
            }
            if by_similarity_alone || keys.iter().zip(others).any(|(k, l)| k == l) {
                let both = set.intersection(other).count() as f64;
                if both / ((set.len() + other.len()) as f64 - both) >= config.threshold {
                    let (from, to) = (cluster[a].max(cluster[b]), cluster[a].min(cluster[b]));
                    cluster.iter_mut().filter(|c| **c == from).for_each(|c| *c = to);
                }
            }
        }
    }
    let mut removals = BTreeMap::new();
    for (i, document) in documents.iter().enumerate() {
        let members = (0..n).filter(|&j| cluster[j] == cluster[i]);
        let rank = |j: &usize| match config.keep {
            Keep::Longest => (std::cmp::Reverse(documents[*j].3), *j),
            _ => (std::cmp::Reverse(0), *j),
        };
        let survivor = members.min_by_key(rank).unwrap();
        if survivor != i {
            removals.insert(document.0, (documents[cluster[i]].0, documents[survivor].0));
        }
    }
    removals
}

#[tokio::test(flavor = "multi_thread")]
async fn near_with_exact_verification_equals_brute_force_on_two_thousand_documents() {
    let corpus = families();
    assert_eq!(corpus.iter().flatten().count(), 2000);
    let base = NearConfig { verify: Verify::Exact, ngram: 3, ..NearConfig::default() };
    // A hundred bands of one row meet at 0.6 with all but certainty: there, similarity alone decides.
    let wide = NearConfig { bands: 100, rows: 1, threshold: 0.6, mode: Mode::Fast, ..base.clone() };
    for (config, by_similarity_alone) in [
        (wide.clone(), true),
        (NearConfig { keep: Keep::Longest, ..wide }, true),
        (NearConfig { mode: Mode::Fast, ..base.clone() }, false),
        (base, false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let stages = near_stages(&config, "documents", None, None, Path::new(".")).unwrap();
        let run = run(dir.path(), &corpus, stages, 2).await;
        let (kept, dropped) = outcome(&run, "near").await;
        let found: BTreeMap<u64, (u64, u64)> = dropped.into_iter().map(|(o, (_, c, s))| (o, (c, s))).collect();
        let expected = near_by_hand(&corpus, &config, by_similarity_alone);
        assert!(expected.len() > 200, "{}", expected.len());
        assert_eq!(found, expected, "{config:?}");
        assert_eq!(kept.len() + expected.len(), 2000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn survivors_by_expression_and_keys_by_expression() {
    // The last digit of the URL is a quality; equal texts, and equal first letters of the URL.
    let of = |text: &str, url: &str| (text.to_string(), Some(url.to_string()));
    let corpus = vec![
        vec![of("a text that is there three times in all", "a/3"), of("another text of some more words", "b/1")],
        vec![
            of("a text that is there three times in all", "c/9"),
            of("A text that is there three times in all", "d/5"),
        ],
    ];
    let quality = "cast(right(url, 1) as int)";
    let at = |shard, i| ordinal(shard, record(i));
    for (keep, survivor) in [
        (Keep::Highest(quality.into()), at(1, 0)),
        (Keep::Lowest(quality.into()), at(0, 0)),
        (Keep::Highest(format!("nullif({quality}, 9)")), at(1, 1)),
    ] {
        let exact = ExactConfig { keep: keep.clone(), ..ExactConfig::default() };
        let near = NearConfig { keep: keep.clone(), verify: Verify::Sketch, ..NearConfig::default() };
        let near = near_stages(&near, "documents", None, None, Path::new(".")).unwrap();
        for (stages, last) in
            [(exact_stages(&exact, "documents", None, None, Path::new(".")).unwrap(), "exact"), (near, "near")]
        {
            let dir = tempfile::tempdir().unwrap();
            let run = run(dir.path(), &corpus, stages, 2).await;
            let (kept, dropped) = outcome(&run, last).await;
            assert_eq!(kept, BTreeSet::from([at(0, 1), survivor]), "{keep:?} {last}");
            assert!(dropped.values().all(|(_, cluster, s)| (*cluster, *s) == (at(0, 0), survivor)));
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let by = vec![Key::Sql("nullif(left(url, 1), 'a')".into()), Key::Sql("right(url, 1) in ('3', '9')".into())];
    let config = ExactConfig { by, ..ExactConfig::default() };
    let run =
        run(dir.path(), &corpus, exact_stages(&config, "documents", None, None, Path::new(".")).unwrap(), 1).await;
    assert_eq!(outcome(&run, "exact_sql").await.1.len(), 0, "all letters differ, and null equals nothing");
    let (_, dropped) = outcome(&run, "exact").await;
    assert_eq!(dropped.keys().copied().collect::<Vec<_>>(), [at(1, 0), at(1, 1)]);
    assert!(dropped.values().all(|(rule, ..)| rule == "same_value"));
}

/// A signal of the name of a column of the documents: the first two letters of the text.
struct Languages;

#[async_trait]
impl Stage for Languages {
    fn name(&self) -> &str {
        "signals"
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        vec!["documents".into()]
    }
    fn config(&self) -> pipeline::Result<serde_json::Value> {
        Ok(serde_json::json!({}))
    }
    fn schema(&self) -> Option<SchemaRef> {
        SCHEMA.project(&[0, 1, 5]).ok().map(Arc::new)
    }
    async fn tasks(&self, run: &RunContext) -> pipeline::Result<Vec<Task>> {
        tasks_per_shard(run, "documents")
    }
    async fn execute(&self, task: &TaskContext) -> pipeline::Result<TaskReport> {
        let session = task.session();
        let rows = task.read(&session, "documents", task.index()).await?;
        let rows = rows.select(vec![col("id"), col("ordinal"), left(col("text"), lit(2)).alias("language")])?;
        let read = RowsRead::Known(task.run.shard("documents", task.index())?.rows);
        task.write(rows, Output { kept: &["id", "ordinal", "language"], dropped: &[] }, read).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_signal_and_a_column_of_one_name_the_signal_is_meant() {
    let corpus =
        vec![vec![plain("EN a text of some words"), plain("de other words"), plain("en A text of some words")]];
    let at = |i| ordinal(0, record(i));
    for (expression, survivor) in [
        ("case when language = 'en' then 1 else 0 end", 2),
        ("case when language = 'EN' then 1 else 0 end", 0),
        // The corpus says no language.
        ("case when document_language is null and language = 'en' then 1 else 0 end", 2),
    ] {
        let keep = Keep::Highest(expression.into());
        let exact = ExactConfig { keep: keep.clone(), ..ExactConfig::default() };
        let near = NearConfig { keep, ngram: 2, ..NearConfig::default() };
        let of = |stages: Vec<Arc<dyn Stage>>| {
            let mut all: Vec<Arc<dyn Stage>> = vec![Arc::new(Languages)];
            all.extend(stages);
            all
        };
        for (stages, last) in [
            (exact_stages(&exact, "documents", None, Some("signals"), Path::new(".")).unwrap(), "exact"),
            (near_stages(&near, "documents", None, Some("signals"), Path::new(".")).unwrap(), "near"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let run = run(dir.path(), &corpus, of(stages), 2).await;
            let (kept, _) = outcome(&run, last).await;
            assert_eq!(kept, BTreeSet::from([at(1), at(survivor)]), "{last}: {expression}");
        }
    }
}

#[test]
fn expressions_that_cannot_be_planned_are_refused_before_any_work() {
    let here = Path::new(".");
    let by = vec![Key::Text, Key::Sql("lenght(url)".into())];
    let error =
        exact_stages(&ExactConfig { by, ..ExactConfig::default() }, "documents", None, None, here).err().unwrap();
    assert!(matches!(&error, Error::Setting { key, .. } if key == "exact.by.1.sql"), "{error}");

    let refused = |keep: Keep, signals: Option<&str>| -> Vec<(String, String)> {
        let exact = ExactConfig { keep: keep.clone(), ..ExactConfig::default() };
        let near = NearConfig { keep, ..NearConfig::default() };
        let chains = [
            exact_stages(&exact, "documents", None, signals, here).unwrap(),
            near_stages(&near, "documents", None, signals, here).unwrap(),
        ];
        let errors = chains.into_iter().filter_map(|stages| {
            let dir = tempfile::tempdir().unwrap();
            let run = RunContext::new(dir.path(), RunOptions::new()).unwrap();
            let columns = SignalsStage::new("documents", None, &SignalsConfig::default(), here).unwrap();
            let mut all: Vec<Arc<dyn Stage>> = vec![Arc::new(Corpus(Vec::new())), Arc::new(columns)];
            all.extend(stages);
            match Runner::new(run, all).err()? {
                Error::Setting { key, reason } => Some((key, reason)),
                other => panic!("{other}"),
            }
        });
        errors.collect()
    };
    let keys = |errors: &[(String, String)]| errors.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>();
    let found = refused(Keep::Highest("length(txt)".into()), None);
    assert_eq!(keys(&found), ["exact.keep.highest", "near.keep.highest"]);
    assert!(found.iter().all(|(_, reason)| reason.contains("txt")), "{found:?}");
    let found = refused(Keep::Lowest("word_cont".into()), Some("signals"));
    assert_eq!(keys(&found), ["exact.keep.lowest", "near.keep.lowest"]);
    // Signals are columns where the recipe has them, and only there.
    let found = refused(Keep::Highest("word_count + length(url)".into()), Some("signals"));
    assert!(found.is_empty(), "{found:?}");
    assert_eq!(refused(Keep::Highest("word_count".into()), None).len(), 2);
}

/// Why a run of `stages` over `corpus` is refused before any work.
fn refused(corpus: &[Vec<Document>], stages: Vec<Arc<dyn Stage>>) -> String {
    let dir = tempfile::tempdir().unwrap();
    let run = RunContext::new(dir.path(), RunOptions::new()).unwrap();
    let first: Arc<dyn Stage> = Arc::new(Corpus(corpus.to_vec()));
    Runner::new(run, std::iter::once(first).chain(stages).collect()).err().unwrap().to_string()
}

/// First ordinal of the new crawl in a joint run with an old one of two shards.
const NEW: u64 = 2 << 32;

/// Ordinal in the joint run of a document of the new crawl.
fn shifted(ordinal: u64) -> u64 {
    ordinal + NEW
}

/// What went from a new crawl must be what a joint run dropped of it, for the same survivors.
fn assert_joint(found: &Dropped, joint: &Dropped) {
    let expected: Vec<u64> = joint.range(NEW..).map(|(ordinal, _)| *ordinal).collect();
    assert_eq!(found.keys().map(|ordinal| shifted(*ordinal)).collect::<Vec<u64>>(), expected);
    for (gone, (_, _, survivor)) in found {
        // A survivor of the older index keeps its ordinal there.
        let wanted = joint[&shifted(*gone)].2;
        assert_eq!(if wanted >= NEW { shifted(*survivor) } else { *survivor }, wanted);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_crawl_against_an_index_goes_as_in_a_joint_run() {
    let corpus = families();
    let (old, new) = corpus.split_at(2);
    for (verify, keep) in [(Verify::None, Keep::Earliest), (Verify::Sketch, Keep::Longest)] {
        let config = NearConfig { verify, keep, mode: Mode::Fast, ngram: 3, ..NearConfig::default() };
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let stages = |config: &NearConfig, base: &Path| near_stages(config, "documents", None, None, base).unwrap();
        let joint = run(dirs[0].path(), &corpus, stages(&config, Path::new(".")), 2).await;
        let (_, joint) = outcome(&joint, "near").await;
        drop(run(&dirs[1].path().join("old-1"), old, stages(&config, Path::new(".")), 2).await);
        let incremental = NearConfig { against: vec!["old-*/near_signatures".into()], ..config.clone() };
        let second = run(dirs[2].path(), new, stages(&incremental, dirs[1].path()), 2).await;
        let (_, found) = outcome(&second, "near").await;
        assert!(found.len() > 100, "{}", found.len());
        assert_joint(&found, &joint);
        let other = NearConfig { seed: 2, ..incremental.clone() };
        let error = refused(new, stages(&other, dirs[1].path()));
        assert!(error.contains("keys would never meet"), "{error}");
        // Signatures of another version mean something else.
        let manifest = dirs[1].path().join("old-1/near_signatures/manifest.json");
        let made = std::fs::read_to_string(&manifest).unwrap().replace("\"version\": 3", "\"version\": 2");
        std::fs::write(&manifest, made).unwrap();
        let error = refused(new, stages(&incremental, dirs[1].path()));
        assert!(error.contains("made by version 2 of the stage, this is version 3"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_its_own_pattern_matches_is_not_compared_with_itself() {
    let corpus = exact_corpus();
    let (old, new) = corpus.split_at(2);
    let runs = tempfile::tempdir().unwrap();
    let (first, second) = (runs.path().join("2025-11"), runs.path().join("2025-12"));
    let exact = |against: &[&str]| ExactConfig {
        against: against.iter().map(ToString::to_string).collect(),
        ..ExactConfig::default()
    };
    drop(run(&first, old, exact_stages(&exact(&[]), "documents", None, None, runs.path()).unwrap(), 2).await);
    let stages = || {
        let places = Places { base: runs.path(), run_dir: Some(&second) };
        exact_stages(&exact(&["2025-*/exact_hashes"]), "documents", None, None, places).unwrap()
    };
    // Now the pattern matches the run itself, whose hashes are done or, after a kill, are not.
    let begun = run(&second, new, stages(), 2).await;
    let (kept, dropped) = outcome(&begun, "exact").await;
    assert!(kept.len() > 20 && dropped.len() > 5, "{} {}", kept.len(), dropped.len());
    drop(begun);
    let again = run(&second, new, stages(), 2).await;
    assert_eq!(outcome(&again, "exact").await, (kept.clone(), dropped.clone()));
    drop(again);
    let manifest = second.join("exact_hashes/manifest.json");
    let undone = std::fs::read_to_string(&manifest).unwrap().replace("\"done\"", "\"running\"");
    std::fs::write(&manifest, undone).unwrap();
    std::fs::remove_file(second.join("exact_hashes/journal.jsonl")).unwrap();
    let resumed = run(&second, new, stages(), 2).await;
    assert_eq!(outcome(&resumed, "exact").await, (kept, dropped));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_index_is_refused_before_any_work() {
    let corpus = exact_corpus();
    let (old, new) = corpus.split_at(2);
    let runs = tempfile::tempdir().unwrap();
    let stages = |against: &[&str]| {
        let of = |stage: &str| against.iter().map(|dir| format!("{dir}/{stage}")).collect::<Vec<_>>();
        let exact = ExactConfig { against: of("exact_hashes"), ..ExactConfig::default() };
        let near = NearConfig { against: of("near_signatures"), ..NearConfig::default() };
        let mut stages = exact_stages(&exact, "documents", None, None, runs.path()).unwrap();
        stages.extend(near_stages(&near, "documents", Some("exact"), None, runs.path()).unwrap());
        stages
    };
    drop(run(&runs.path().join("old"), old, stages(&[]), 2).await);
    let tried = |verify: Verification| {
        let dir = tempfile::tempdir().unwrap();
        let run = RunContext::new(dir.path(), RunOptions { threads: 2, verify, ..RunOptions::new() }).unwrap();
        let first: Arc<dyn Stage> = Arc::new(Corpus(new.to_vec()));
        let runner = Runner::new(run.clone(), std::iter::once(first).chain(stages(&["old"])).collect());
        async move {
            let done = match runner {
                Ok(runner) => {
                    let planned = runner.plan(None).err().map(|e| e.to_string());
                    let done = runner.run(None).await.err().map(|e| e.to_string());
                    assert_eq!(planned, done, "a dry run says the same");
                    done
                }
                Err(e) => Some(e.to_string()),
            };
            (done, run.journal("documents").len() + usize::from(dir.path().join("documents").exists()))
        }
    };
    for stage in ["exact_hashes", "near_signatures"] {
        let part = runs.path().join("old").join(stage).join("part-00001.runs");
        let whole = std::fs::read(&part).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 1;
        std::fs::write(&part, &flipped).unwrap();
        let (error, begun) = tried(Verification::Checksums).await;
        let error = error.unwrap();
        assert!(
            error.contains(&format!("old/{stage}: part-00001.runs fails its checksum; run that run again")),
            "{error}"
        );
        assert_eq!(begun, 0, "nothing was done");
        std::fs::write(&part, &whole[..whole.len() - 1]).unwrap();
        let error = tried(Verification::Sizes).await.0.unwrap();
        assert!(error.contains("part-00001.runs has"), "{error}");
        std::fs::write(&part, &whole).unwrap();
        // A line of the journal that cannot be read is a shard that nothing would be compared with.
        let journal = runs.path().join("old").join(stage).join("journal.jsonl");
        let lines = std::fs::read(&journal).unwrap();
        let mut damaged = lines.clone();
        damaged[3] = b'#';
        std::fs::write(&journal, &damaged).unwrap();
        let error = tried(Verification::Sizes).await.0.unwrap();
        assert!(error.contains("1 of 2 tasks are in its journal"), "{error}");
        std::fs::write(&journal, &lines).unwrap();
    }
    assert_eq!(tried(Verification::Checksums).await.0, None, "whole, they are taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_of_equal_text_are_one_cluster_however_many_and_distinct_ones_stay() {
    let many = 20_000;
    let same = "these are the words of a page that everybody has copied";
    let corpus = vec![
        (0..many).map(|_| plain(same)).collect::<Vec<_>>(),
        (0..300).map(|i| plain(text(i, 30).join(" "))).collect(),
    ];
    for verify in [Verify::None, Verify::Sketch, Verify::Exact] {
        let config = NearConfig { verify, mode: Mode::Fast, ..NearConfig::default() };
        let dir = tempfile::tempdir().unwrap();
        let run =
            run(dir.path(), &corpus, near_stages(&config, "documents", None, None, Path::new(".")).unwrap(), 2).await;
        let (kept, dropped) = outcome(&run, "near").await;
        assert_eq!((kept.len(), dropped.len()), (301, many - 1), "{verify:?}");
        // Ten bytes a pair and five for its second document by itself, which the prediction of its disk knows; buckets of
        // two would have five more for the first.
        let entries = run.journal("near_pairs");
        let pairs: u64 = entries.values().map(|e| e.notes["pairs"].as_u64().unwrap()).sum();
        let bytes: u64 = entries.values().flat_map(|e| &e.files).map(|f| f.bytes).sum();
        let expected = pairs * if verify == Verify::Exact { 15 } else { 10 };
        assert!((expected..expected + expected / 8).contains(&bytes), "{verify:?}: {bytes} bytes for {pairs} pairs");
        assert!(dropped.values().all(|(_, cluster, survivor)| (*cluster, *survivor) == (0, 0)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn new_documents_equal_to_those_of_an_index_go_as_in_a_joint_run() {
    // Two thirds of the pages have a URL of their own, the others one of seven.
    let corpus: Vec<Vec<Document>> = exact_corpus()
        .into_iter()
        .enumerate()
        .map(|(shard, documents)| {
            let url = |i: usize| {
                if i.is_multiple_of(3) { format!("http://a.org/{}", i % 7) } else { format!("b/{shard}/{i}") }
            };
            documents.into_iter().enumerate().map(|(i, (text, _))| (text, Some(url(i)))).collect()
        })
        .collect();
    let (old, new) = corpus.split_at(2);
    for (keep, by) in [
        (Keep::Earliest, vec![Key::Text]),
        (Keep::Longest, vec![Key::Text]),
        (Keep::Earliest, vec![Key::Url, Key::Text]),
    ] {
        let config = ExactConfig { keep, by, ..ExactConfig::default() };
        let stages = |config: &ExactConfig, base: &Path| exact_stages(config, "documents", None, None, base).unwrap();
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let joint = run(dirs[0].path(), &corpus, stages(&config, Path::new(".")), 2).await;
        drop(run(&dirs[1].path().join("old-1"), old, stages(&config, Path::new(".")), 2).await);
        let incremental = ExactConfig { against: vec!["old-*/exact_hashes".into()], ..config.clone() };
        let second = run(dirs[2].path(), new, stages(&incremental, dirs[1].path()), 2).await;
        let chains: &[&str] = if config.by.len() == 2 { &["exact_url", "exact"] } else { &["exact"] };
        for stage in chains {
            let (_, joint) = outcome(&joint, stage).await;
            let (_, found) = outcome(&second, stage).await;
            assert!(found.len() > 5, "{stage}: {}", found.len());
            assert_joint(&found, &joint);
        }
        let (kept, _) = outcome(&second, "exact").await;
        let (mut joint_kept, _) = outcome(&joint, "exact").await;
        assert_eq!(kept.into_iter().map(shifted).collect::<BTreeSet<u64>>(), joint_kept.split_off(&NEW));
        let other = ExactConfig { normalise: dedup::normalise::Normalise::None, ..incremental.clone() };
        let error = refused(new, stages(&other, dirs[1].path()));
        assert!(error.contains("keys would never meet"), "{error}");
        let missing = ExactConfig { against: vec!["older/exact_hashes".into()], ..incremental };
        let error = exact_stages(&missing, "documents", None, None, dirs[1].path()).err().unwrap();
        assert!(error.to_string().contains("exact.against: nothing matches older/exact_hashes"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn that_compatible_signatures_see_little_of_chinese_is_said_once() {
    // Runs of one to nine of the commonest characters, as they stand between marks.
    let common: Vec<char> =
        "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可里"
            .chars()
            .collect();
    let mut numbers = Numbers(3);
    let page = |numbers: &mut Numbers| {
        let clause = |numbers: &mut Numbers| {
            (0..4 + numbers.below(9)).map(|_| common[numbers.below(common.len())]).collect::<String>()
        };
        (0..30).map(|_| clause(numbers) + "，").collect::<String>()
    };
    let pages: Vec<String> = (0..20).map(|_| page(&mut numbers)).collect();
    // The first character of every sixth clause is another: most runs of five characters stay, few of five clauses.
    let changed = pages.iter().map(|page| {
        let clauses = page.split_inclusive('，').enumerate();
        clauses
            .map(|(i, c)| if i % 6 == 0 { c.replacen(c.chars().next().unwrap(), "甲", 1) } else { c.into() })
            .collect::<String>()
    });
    let corpus = vec![pages.iter().map(plain).collect::<Vec<_>>(), changed.map(plain).collect()];
    let warnings = |corpus: Vec<Vec<Document>>, mode| async move {
        let dir = tempfile::tempdir().unwrap();
        let heard = Arc::new(std::sync::Mutex::new(Vec::new()));
        let hears = heard.clone();
        let observer: pipeline::Observer = Arc::new(move |event| {
            if let pipeline::Event::Warning { message } = event {
                hears.lock().unwrap().push(message.clone());
            }
        });
        let run = RunContext::new(dir.path(), RunOptions { threads: 2, observer, ..RunOptions::new() }).unwrap();
        let config = NearConfig { mode, ..NearConfig::default() };
        let mut all: Vec<Arc<dyn Stage>> = vec![Arc::new(Corpus(corpus))];
        all.extend(near_stages(&config, "documents", None, None, Path::new(".")).unwrap());
        Runner::new(run.clone(), all).unwrap().run(None).await.unwrap();
        let (_, dropped) = outcome(&run, "near").await;
        let heard = heard.lock().unwrap().clone();
        (dropped.len(), heard)
    };
    let (compatible, heard) = warnings(corpus.clone(), Mode::Compatible).await;
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert!(heard[0].contains("20 of the 20 documents of shard") && heard[0].contains("mode = \"fast\""), "{heard:?}");
    let (fast, heard) = warnings(corpus, Mode::Fast).await;
    assert!(heard.is_empty(), "{heard:?}");
    assert!(compatible == 0 && fast >= 15, "{compatible} by compatible, {fast} by fast");
    assert!(warnings(near_corpus(), Mode::Compatible).await.1.is_empty(), "nothing is said of spaced words");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_is_told_alike_by_the_table_of_removals_and_by_the_shards() {
    let corpus = exact_corpus();
    let dir = tempfile::tempdir().unwrap();
    let stages = |keep: Keep, against: &[&str]| {
        let against = against.iter().map(|pattern| pattern.to_string()).collect();
        let config = ExactConfig { keep, against, ..ExactConfig::default() };
        exact_stages(&config, "documents", None, None, dir.path()).unwrap()
    };
    for (name, shard) in [("old-1", 0), ("old-2", 1)] {
        let old = std::slice::from_ref(&corpus[shard]);
        drop(run(&dir.path().join(name), old, stages(Keep::Earliest, &[]), 2).await);
    }
    // Copies of both older runs and of each other.
    let new: Vec<Vec<Document>> = [2usize, 0, 1, 2].map(|shard| corpus[shard].clone()).to_vec();
    for (name, keep) in [("new-1", Keep::Earliest), ("new-2", Keep::Longest)] {
        let run = run(&dir.path().join(name), &new, stages(keep, &["old-*/exact_hashes"]), 2).await;
        let columns = ["ordinal", "cluster_id", "survivor", "similarity", "survivor_index"];
        let mut told = table(&run, "exact_removals", &columns).await;
        told.sort();
        let mut dropped = table(&run, "exact/dropped", &columns).await;
        dropped.sort();
        assert_eq!(told, dropped);
        for index in ["old-1/exact_hashes", "old-2/exact_hashes"] {
            let named = dir.path().join(index).display().to_string();
            assert!(told.iter().filter(|row| row[4] == named).count() > 30, "{name}: {index}");
        }
        assert!(told.iter().filter(|row| row[4].is_empty()).count() > 10, "{name}");
    }
}
