//! Line deduplication and decontamination through the runner.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use dedup::{Action, Benchmark, DecontaminateConfig, DecontaminateStage, LinesConfig, Method, Unit, line_stages};
use pipeline::Stage;

mod support;
use support::{Document, plain, record, run, table, text};

/// Texts of the kept rows of a stage, by ordinal.
async fn texts(run: &Arc<pipeline::RunContext>, stage: &str) -> BTreeMap<u64, String> {
    table(run, stage, &["ordinal", "text"]).await.into_iter().map(|r| (r[0].parse().unwrap(), r[1].clone())).collect()
}

fn corpus() -> Vec<Vec<Document>> {
    let footer = "Accept all cookies\nSubscribe to our newsletter!";
    (0..4)
        .map(|shard| {
            (0..30)
                .map(|i| {
                    let own = format!("Document {i} of shard {shard} has this line.");
                    plain(match i % 6 {
                        0 => format!("{own}\n{footer}\n"),
                        1 => format!("{own}\n\n{}\n\n{own}", footer.to_uppercase()),
                        2 => footer.to_string(),
                        3 => format!("{own}\nTwo of a kind {}\n", i / 12),
                        4 => String::new(),
                        _ => own,
                    })
                })
                .collect()
        })
        .collect()
}

/// What must be left, by counting in memory.
fn by_hand(corpus: &[Vec<Document>], config: &LinesConfig) -> BTreeMap<u64, String> {
    let form = |line: &str| line.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ");
    let compared = |line: &str| !line.trim().is_empty() && line.trim().len() >= config.min_bytes as usize;
    let mut documents: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
    let all = || {
        corpus.iter().enumerate().flat_map(|(shard, texts)| {
            texts.iter().enumerate().map(move |(i, (t, _))| (pipeline::document::ordinal(shard as u32, record(i)), t))
        })
    };
    for (ordinal, text) in all() {
        for line in text.split_inclusive('\n').filter(|l| compared(l)) {
            documents.entry(form(line)).or_default().insert(ordinal);
        }
    }
    let mut left = BTreeMap::new();
    for (ordinal, text) in all() {
        let (mut rest, mut kept) = (String::new(), BTreeSet::new());
        for line in text.split_inclusive('\n') {
            let holders = documents.get(&form(line)).filter(|_| compared(line));
            let goes = holders.is_some_and(|holders| {
                let keeps = config.keep_first && holders.first() == Some(&ordinal);
                holders.len() > config.max_documents as usize && !(keeps && kept.insert(form(line)))
            });
            if !goes {
                rest.push_str(line);
            }
        }
        let rest = if rest.trim().is_empty() { String::new() } else { rest };
        if !rest.is_empty() {
            left.insert(ordinal, rest);
        }
    }
    left
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_equal_a_count_in_memory_for_any_limit_and_number_of_threads() {
    let corpus = corpus();
    for (max_documents, keep_first, min_bytes) in [(1, true, 1), (1, false, 1), (10, false, 1), (3, true, 20)] {
        let config = LinesConfig { max_documents, keep_first, min_bytes, ..LinesConfig::default() };
        for threads in [1, 3] {
            let dir = tempfile::tempdir().unwrap();
            let run = run(dir.path(), &corpus, line_stages(&config, "documents", None).unwrap(), threads).await;
            assert_eq!(texts(&run, "lines").await, by_hand(&corpus, &config), "{config:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bloom_filter_comes_to_the_same_where_it_has_room() {
    let corpus = corpus();
    // One line a document and document order: the filter sees what counting sees.
    let config = LinesConfig {
        method: Method::Bloom,
        false_positive_rate: 1e-9,
        expected_lines: 10_000,
        ..LinesConfig::default()
    };
    let dir = tempfile::tempdir().unwrap();
    let run = run(dir.path(), &corpus, line_stages(&config, "documents", None).unwrap(), 2).await;
    assert_eq!(texts(&run, "lines").await, by_hand(&corpus, &config));
    for bad in [
        LinesConfig { max_documents: 5, ..config.clone() },
        LinesConfig { false_positive_rate: 0.0, ..config.clone() },
        LinesConfig { max_documents: 0, method: Method::Exact, ..config },
    ] {
        assert!(line_stages(&bad, "documents", None).is_err(), "{bad:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paragraphs_go_as_a_whole() {
    let corpus = vec![vec![plain("One.\nTwo.\n\nThree.\n"), plain("One.\nOther.\n\nTHREE.\n\nFour.")]];
    let config = LinesConfig { unit: Unit::Paragraph, ..LinesConfig::default() };
    let dir = tempfile::tempdir().unwrap();
    let run = run(dir.path(), &corpus, line_stages(&config, "documents", None).unwrap(), 1).await;
    let left: Vec<String> = texts(&run, "lines").await.into_values().collect();
    assert_eq!(left, ["One.\nTwo.\n\nThree.\n", "One.\nOther.\n\nFour."]);
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_of_evaluation_sets_are_found_dropped_and_masked() {
    let dir = tempfile::tempdir().unwrap();
    let question = text(1, 20).join(" ");
    let short = text(2, 9).join(" ");
    std::fs::write(
        dir.path().join("quiz-1.jsonl"),
        format!(
            "{}\n\n{}\n",
            serde_json::json!({"question": question, "answer": "no"}),
            serde_json::json!({"question": short, "answer": "yes"})
        ),
    )
    .unwrap();
    let words = text(3, 60);
    let around = |middle: &str| format!("{}. {middle}, {}", words[..30].join(" "), words[30..].join(" "));
    let part = text(1, 20)[4..17].join(" ");
    let corpus = vec![vec![
        plain(around(&question.to_uppercase())),
        plain(around(&part)),
        plain(around(&text(1, 20)[4..16].join(" "))),
        plain(around(&short)),
        plain(question.clone()),
        plain(""),
    ]];
    let config = DecontaminateConfig {
        benchmarks: vec![Benchmark {
            name: "quiz".into(),
            paths: vec!["quiz-*.jsonl".into()],
            fields: vec!["question".into()],
        }],
        ..DecontaminateConfig::default()
    };
    let stage = |config: &DecontaminateConfig| -> Vec<Arc<dyn Stage>> {
        vec![Arc::new(DecontaminateStage::new(config.clone(), "documents", None, dir.path()).unwrap())]
    };
    let runs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let dropping = run(runs[0].path(), &corpus, stage(&config), 2).await;
    let at = |i: usize| u64::from(record(i)).to_string();
    let kept: Vec<String> = table(&dropping, "decontaminate", &["ordinal"]).await.into_iter().flatten().collect();
    assert_eq!(kept, [at(2), at(5)], "twelve words are too few");
    let dropped = table(&dropping, "decontaminate/dropped", &["ordinal", "benchmark", "record", "ngrams"]).await;
    let expected = [(0, 1, "8"), (1, 1, "1"), (3, 3, "1"), (4, 1, "8")];
    let expected =
        expected.map(|(i, line, n)| [at(i), "quiz".into(), format!("quiz-1.jsonl:{line}"), n.into()].to_vec());
    assert_eq!(dropped, expected);
    let matches = table(&dropping, "decontaminate/matches", &["ordinal", "record", "excerpt"]).await;
    assert_eq!(matches.len(), 4);
    assert!(part.starts_with(&matches[1][2]) && !matches[1][2].is_empty());

    let masking = DecontaminateConfig { action: Action::Mask, mask: "[…]".into(), ..config.clone() };
    let masked =
        run(runs[1].path(), &corpus, stage(&DecontaminateConfig { mask: String::new(), ..masking.clone() }), 2).await;
    assert_eq!(texts(&masked, "decontaminate").await.len(), 5, "nothing is left of the question alone");
    drop(masked);
    let again = tempfile::tempdir().unwrap();
    let masked = texts(&run(again.path(), &corpus, stage(&masking), 1).await, "decontaminate").await;
    assert_eq!(masked[&u64::from(record(0))], around("[…]"));
    assert_eq!(masked[&u64::from(record(2))], corpus[0][2].0);
    let error =
        DecontaminateStage::new(DecontaminateConfig::default(), "documents", None, Path::new(".")).err().unwrap();
    assert!(error.to_string().contains("benchmarks"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_very_many_records_begin_with_is_told_of_the_first_of_them() {
    // A question that 150 records of one set and 100 of another begin with, each going on with words of its own.
    let question = text(1, 16).join(" ");
    let dir = tempfile::tempdir().unwrap();
    for (name, records) in [("many", 150), ("few", 100)] {
        let line = |i: usize| serde_json::json!({ "text": format!("{question} {}", text(100 + i, 20).join(" ")) });
        let lines: String = (0..records).map(|i| format!("{}\n", line(i))).collect();
        std::fs::write(dir.path().join(format!("{name}.jsonl")), lines).unwrap();
    }
    let benchmark =
        |name: &str| Benchmark { name: name.into(), paths: vec![format!("{name}.jsonl")], fields: vec!["text".into()] };
    let config =
        DecontaminateConfig { benchmarks: vec![benchmark("many"), benchmark("few")], ..DecontaminateConfig::default() };
    // Most documents have the question alone, one has the words of record 140 of both sets (the smaller has no such), one nothing.
    let mut documents: Vec<Document> =
        (0..60).map(|i| plain(format!("{} {question}", text(1000 + i, 30).join(" ")))).collect();
    documents.push(plain(text(100 + 139, 20).join(" ")));
    documents.push(plain(text(2000, 30).join(" ")));
    let run_dir = tempfile::tempdir().unwrap();
    let stage = DecontaminateStage::new(config, "documents", None, dir.path()).unwrap();
    let run = run(run_dir.path(), &[documents], vec![Arc::new(stage)], 2).await;
    let at = |i: usize| u64::from(record(i)).to_string();
    let kept: Vec<String> = table(&run, "decontaminate", &["ordinal"]).await.into_iter().flatten().collect();
    assert_eq!(kept, [at(61)], "an n-gram of many records counts like any other");
    let matches = table(&run, "decontaminate/matches", &["ordinal", "benchmark", "record", "ngrams"]).await;
    let mut expected: Vec<Vec<String>> = Vec::new();
    for i in 0..60 {
        let mut told = |benchmark: &str, line: usize| {
            expected.push(vec![at(i), benchmark.into(), format!("{benchmark}.jsonl:{line}"), "4".into()]);
        };
        told("many", 1);
        (1..=100).for_each(|line| told("few", line));
    }
    expected.push(vec![at(60), "many".into(), "many.jsonl:140".into(), "8".into()]);
    assert!(matches == expected, "{} {}", matches.len(), expected.len());
    let notes = &run.journal("decontaminate")[&0].notes;
    assert_eq!((&notes["common_ngrams"], &notes["matches"]), (&4.into(), &expected.len().into()));
}
