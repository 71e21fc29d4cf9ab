//! Line deduplication and decontamination through the runner.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use dedup::{Action, Benchmark, DecontaminateConfig, DecontaminateStage, LinesConfig, Method, Unit, line_stages};
use pipeline::{RunContext, RunOptions, Runner, Stage};

mod support;
use support::{Corpus, Document, plain, record, run, table, text};

/// Texts of the kept rows of a stage, by ordinal.
async fn texts(run: &Arc<RunContext>, stage: &str) -> BTreeMap<u64, String> {
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
async fn the_most_frequent_lines_are_told_with_what_went_in_all() {
    // Line k of thirty stands in 40 − k documents; a hundred more in two each, and every document has one of its own.
    let corpus: Vec<Vec<Document>> = (0..4)
        .map(|shard| {
            (0..10)
                .map(|i| {
                    // Documents in descending order, so that the lines begin in several shards.
                    let number = 39 - (shard * 10 + i);
                    let mut lines = vec![format!("own {number}")];
                    lines.extend((0..30).filter(|k| number < 40 - k).map(|k| format!("Line {k} of many.")));
                    lines.extend((0..100).filter(|k| k % 20 == number % 20).map(|k| format!("Pair {k}")));
                    plain(lines.join("\n"))
                })
                .collect()
        })
        .collect();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut told = Vec::new();
    for (dir, threads) in dirs.iter().zip([1, 3]) {
        let stages =
            line_stages(&LinesConfig { max_documents: 2, ..LinesConfig::default() }, "documents", None).unwrap();
        let run = run(dir.path(), &corpus, stages, threads).await;
        let report = pipeline::report::report(run.dir()).unwrap().lines.unwrap();
        let before: usize = corpus.iter().flatten().map(|(text, _)| text.len()).sum();
        let after: usize = texts(&run, "lines").await.values().map(String::len).sum();
        assert_eq!(report.bytes, (before - after) as u64);
        // All but the first document of each line, and the first document loses none.
        assert_eq!((report.lines, report.documents), ((0..30).map(|k| 39 - k).sum::<u64>(), 39));
        let frequent: Vec<(String, u64)> = report.frequent.into_iter().map(|f| (f.line, f.documents)).collect();
        let expected: Vec<(String, u64)> = (0..20).map(|k| (format!("Line {k} of many."), 40 - k)).collect();
        assert_eq!(frequent, expected);
        let files = [0, 1].map(|shard| dir.path().join(format!("lines/frequent/part-0000{shard}.parquet")));
        told.push(files.map(|file| std::fs::read(file).unwrap()));
    }
    assert!(told[0] == told[1], "1 and 3 threads differ");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_in_a_frequent_line_is_no_part_of_the_report_wherever_it_stands() {
    let line = |before: usize| format!("{} jane.doe@example.org", "w".repeat(before));
    let lines: Vec<String> = [10, 185, 190, 195, 198].map(line).to_vec();
    let corpus = vec![vec![plain(lines.join("\n")), plain(lines.join("\n"))]];
    let dir = tempfile::tempdir().unwrap();
    let run = run(dir.path(), &corpus, line_stages(&LinesConfig::default(), "documents", None).unwrap(), 1).await;
    let told = pipeline::report::report(run.dir()).unwrap().lines.unwrap().frequent;
    assert_eq!(told.len(), 5);
    for line in told.into_iter().map(|frequent| frequent.line) {
        assert!(line.starts_with("wwwwwwwwww") && line.chars().count() <= 200 && !line.contains("jane"), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_memory_of_a_task_is_told_of_lines_that_go_and_of_the_filter() {
    // The second shard has 500 lines that stand in the first, the third one of them.
    let lines = |n: usize| plain((0..n).map(|i| format!("line {i}\n")).collect::<String>());
    let corpus = vec![vec![lines(500)], vec![lines(500)], vec![lines(1)]];
    let bloom = LinesConfig { method: Method::Bloom, expected_lines: 1_000_000, ..LinesConfig::default() };
    for (config, filter) in [(LinesConfig::default(), 0), (bloom, 2_396_272)] {
        let dir = tempfile::tempdir().unwrap();
        let stages = line_stages(&config, "documents", None).unwrap();
        let run = run(dir.path(), &corpus, stages.clone(), 1).await;
        let [.., decisions, rewrite] = stages.as_slice() else { panic!("no stages") };
        // Hash, document, and the room that a table leaves free.
        assert_eq!(rewrite.task_memory_bytes(&run).unwrap(), 500 * 112, "{config:?}");
        let decisions = decisions.task_memory_bytes(&run).unwrap();
        assert!((filter + 20 * 500..filter + 100_000).contains(&decisions), "{decisions}");
    }
    // A filter that the limit has no room for is refused with what would help.
    let dir = tempfile::tempdir().unwrap();
    let large = LinesConfig { method: Method::Bloom, expected_lines: 1_000_000_000, ..LinesConfig::default() };
    let options = RunOptions { threads: 1, memory_limit_bytes: 1 << 30, ..RunOptions::new() };
    let mut stages: Vec<Arc<dyn Stage>> = vec![Arc::new(Corpus(corpus))];
    stages.extend(line_stages(&large, "documents", None).unwrap());
    let runner = Runner::new(RunContext::new(dir.path(), options).unwrap(), stages).unwrap();
    let said = runner.run(None).await.unwrap_err().to_string();
    assert!(said.contains("the Bloom filter takes 2285 MiB") && said.contains("lower lines.expected_lines"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_lines_than_a_bloom_filter_is_made_for_stop_the_run_and_lose_nothing() {
    // 20,000 lines of their own in 1,000 documents, and one that all have.
    let own = |document: usize| (0..20).map(move |line| format!("line {line} of document {document}\n"));
    let corpus: Vec<Vec<Document>> = (0..2)
        .map(|shard| {
            (0..500).map(|i| plain(own(shard * 500 + i).collect::<String>() + "All rights reserved\n")).collect()
        })
        .collect();
    let bloom = |expected_lines| LinesConfig { method: Method::Bloom, expected_lines, ..LinesConfig::default() };
    let dir = tempfile::tempdir().unwrap();
    let all = |expected_lines| {
        let mut all: Vec<Arc<dyn Stage>> = vec![Arc::new(Corpus(corpus.clone()))];
        all.extend(line_stages(&bloom(expected_lines), "documents", None).unwrap());
        all
    };
    let tried = |expected_lines| {
        let run = RunContext::new(dir.path(), RunOptions { threads: 2, ..RunOptions::new() }).unwrap();
        let stages = all(expected_lines);
        async move {
            let done = Runner::new(run.clone(), stages).unwrap().run(None).await;
            (run, done)
        }
    };
    let (full, done) = tried(2_000).await;
    let error = done.unwrap_err();
    assert!(matches!(error, pipeline::Error::Limit(_)), "{error}");
    // A hundredth of the lines are new a document: what would do is known from the first tenth.
    let said = error.to_string();
    assert!(
        said.contains("lines.expected_lines: 2000 distinct lines are in the first 100 of 1000 documents"),
        "{said}"
    );
    assert!(said.contains("set it to 25000 or more"), "{said}");
    assert!(full.journal("lines").is_empty(), "no text was written");
    drop(full);
    let (filled, done) = tried(25_000).await;
    done.unwrap();
    let left = texts(&filled, "lines").await;
    let expected = corpus.iter().flatten().enumerate().map(|(i, (text, _))| match i {
        0 => text.clone(),
        _ => text.replace("All rights reserved\n", ""),
    });
    let lost = left.values().zip(expected).filter(|(left, expected)| *left != expected).count();
    // One in ten thousand lines at most, of 20,000.
    assert!(left.len() == 1000 && lost <= 6, "{lost}");
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
    let report = pipeline::report::report(dropping.dir()).unwrap().benchmarks;
    let expected = [("quiz".to_string(), 2, 2, 0, 4)];
    let found = report.into_iter().map(|b| (b.benchmark, b.records, b.texts, b.too_short, b.documents));
    assert_eq!(found.collect::<Vec<_>>(), expected);
    let matches = table(&dropping, "decontaminate/matches", &["ordinal", "record", "excerpt"]).await;
    assert_eq!(matches.len(), 4);
    assert!(part.starts_with(&matches[1][2]) && !matches[1][2].is_empty());

    let masking = DecontaminateConfig { action: Action::Mask, mask: "[…]".into(), ..config.clone() };
    let masked =
        run(runs[1].path(), &corpus, stage(&DecontaminateConfig { mask: String::new(), ..masking.clone() }), 2).await;
    assert_eq!(texts(&masked, "decontaminate").await.len(), 5, "nothing is left of the question alone");
    drop(masked);
    let again = tempfile::tempdir().unwrap();
    let masked = run(again.path(), &corpus, stage(&masking), 1).await;
    let again_notes: BTreeMap<u32, _> =
        masked.journal("decontaminate").into_iter().map(|(task, entry)| (task, entry.notes)).collect();
    let masked = texts(&masked, "decontaminate").await;
    assert_eq!(masked[&u64::from(record(0))], around("[…]"));
    assert_eq!(masked[&u64::from(record(2))], corpus[0][2].0);
    let notes = &again_notes[&0];
    assert_eq!(notes["benchmarks"], serde_json::json!([{"name": "quiz", "records": 2, "texts": 2, "too_short": 0}]));
    let error =
        DecontaminateStage::new(DecontaminateConfig::default(), "documents", None, Path::new(".")).err().unwrap();
    assert!(error.to_string().contains("benchmarks"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evaluation_set_that_cannot_be_found_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let record = serde_json::json!({"question": text(1, 7).join(" "), "answer": text(1, 30).join(" ")});
    std::fs::write(dir.path().join("quiz.jsonl"), record.to_string()).unwrap();
    let of = |name: &str, field: &str| Benchmark {
        name: name.into(),
        paths: vec!["quiz.jsonl".into()],
        fields: vec![field.into()],
    };
    let tried = |benchmarks: Vec<Benchmark>, min_ngram| {
        let config = DecontaminateConfig { benchmarks, min_ngram, ..DecontaminateConfig::default() };
        let stage = DecontaminateStage::new(config, "documents", None, dir.path()).unwrap();
        let run = tempfile::tempdir().unwrap();
        let run = RunContext::new(run.path(), RunOptions::new()).unwrap();
        let stages: [Arc<dyn Stage>; 2] = [Arc::new(Corpus(Vec::new())), Arc::new(stage)];
        Runner::new(run, stages.to_vec()).err()
    };
    let error = tried(vec![of("answers", "answer"), of("questions", "question")], 8).unwrap();
    let said = error.to_string();
    assert!(matches!(&error, pipeline::Error::Setting { key, .. } if key == "decontaminate.benchmarks.1"), "{said}");
    assert!(said.contains("questions: none of the 1 texts of its 1 records has min_ngram = 8 words"), "{said}");
    assert!(tried(vec![of("answers", "answer"), of("questions", "question")], 7).is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn in_text_without_spaces_a_common_phrase_is_no_contamination() {
    // From the preamble of the Constitution of Japan (1946) and the opening of the Analects, both free of rights.
    let japanese = "日本国民は、正当に選挙された国会における代表者を通じて行動し、われらとわれらの子孫のために、諸国民との協和による成果を確保";
    let chinese = "子曰學而時習之不亦說乎有朋自遠方來不亦樂乎人不知而不慍不亦君子乎";
    let cut = |text: &str, from: usize, n: usize| text.chars().skip(from).take(n).collect::<String>();
    let english = text(1, 20);
    let dir = tempfile::tempdir().unwrap();
    let records: Vec<String> = [japanese.to_string(), chinese.to_string(), cut(chinese, 2, 15), english.join(" ")]
        .iter()
        .map(|text| serde_json::json!({ "text": text }).to_string())
        .collect();
    std::fs::write(dir.path().join("quiz.jsonl"), records.join("\n")).unwrap();
    let corpus = vec![vec![
        // Thirteen to twenty characters in common are a phrase, twenty-six a quotation.
        plain(format!("これは{}という話です。", cut(japanese, 6, 18))),
        plain(format!("昔者{}云云", cut(chinese, 2, 20))),
        plain(format!("昔者{}云云", cut(chinese, 2, 26))),
        plain(format!("これは{}という話です。", cut(japanese, 6, 30))),
        // Of spaced words thirteen are enough, whatever script they are beside.
        plain(format!("昔者云云 {} 云云昔者", english[3..16].join(" "))),
    ]];
    let benchmark = Benchmark { name: "quiz".into(), paths: vec!["quiz.jsonl".into()], fields: Vec::new() };
    let config = DecontaminateConfig { benchmarks: vec![benchmark], ..DecontaminateConfig::default() };
    let stage: Arc<dyn Stage> = Arc::new(DecontaminateStage::new(config, "documents", None, dir.path()).unwrap());
    let runs = tempfile::tempdir().unwrap();
    let run = run(runs.path(), &corpus, vec![stage], 1).await;
    let kept: Vec<String> = table(&run, "decontaminate", &["ordinal"]).await.into_iter().flatten().collect();
    assert_eq!(kept, [0, 1].map(|i| u64::from(record(i)).to_string()));
    let notes = &run.journal("decontaminate")[&0].notes;
    assert_eq!(notes["benchmarks"][0]["too_short"], 1, "fifteen characters are less than eight words: {notes}");
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
