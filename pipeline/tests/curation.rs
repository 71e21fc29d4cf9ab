//! The stages `urls`, `clean`, `signals` with models, `filter` by language, and `mix`, over real files.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use arrow::array::AsArray;
use arrow::datatypes::UInt64Type;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use pipeline::ingest::{FieldMapping, IngestConfig, InputConfig, InputFormat};
use pipeline::normalise::{Normaliser, Part};
use pipeline::pii::{Pii, PiiFinder};
use pipeline::report::{Excerpt, Sample, by_rule};
use pipeline::signals::profiles::LanguageRules;
use pipeline::stages::clean::{CleanConfig, CleanStage, PiiConfig};
use pipeline::stages::curate::CurateStage;
use pipeline::stages::filter::{FilterConfig, FilterStage, RuleConfig};
use pipeline::stages::ingest::IngestStage;
use pipeline::stages::mix::{self, CapConfig, MixConfig, mix_stages};
use pipeline::stages::signals::{ClassifierConfig, SignalsConfig, SignalsStage};
use pipeline::stages::urls::UrlsStage;
use pipeline::urls::UrlsConfig;
use pipeline::{Error, Result, RunContext, RunOptions, Runner, Stage};
use serde_json::{Value, json};

fn input(source: &str, path: &str) -> InputConfig {
    InputConfig {
        source: source.into(),
        paths: vec![path.into()],
        format: InputFormat::Auto,
        fields: FieldMapping::default(),
    }
}

fn write(path: &Path, documents: &[Value]) {
    fs::write(path, documents.iter().map(|d| format!("{d}\n")).collect::<String>()).unwrap();
}

fn ingest(dir: &Path, inputs: Vec<InputConfig>, split_bytes: u64) -> Arc<dyn Stage> {
    let config = IngestConfig { inputs, split_bytes, ..IngestConfig::default() };
    Arc::new(IngestStage::new(config, dir.to_path_buf()).unwrap())
}

async fn run(dir: &Path, threads: usize, stages: Vec<Arc<dyn Stage>>) -> Result<()> {
    let options = RunOptions { threads, ..RunOptions::new() };
    Runner::new(RunContext::new(dir, options)?, stages)?.run(None).await.map(|_| ())
}

async fn rows(run: &Path, sql: &str) -> Vec<Value> {
    let (session, _) = pipeline::sql::session(run, vec![]).await.unwrap();
    let batches = session.sql(sql).await.unwrap().collect().await.unwrap();
    let mut writer = arrow::json::LineDelimitedWriter::new(Vec::new());
    batches.iter().for_each(|batch| writer.write(batch).unwrap());
    writer.finish().unwrap();
    let text = String::from_utf8(writer.into_inner()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The ordinals of a shard as they stand in its file.
fn ordinals(shard: &Path) -> Vec<u64> {
    let rows = ParquetRecordBatchReaderBuilder::try_new(fs::File::open(shard).unwrap()).unwrap().build().unwrap();
    rows.flat_map(|batch| batch.unwrap()["ordinal"].as_primitive::<UInt64Type>().values().to_vec()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_texts_and_personal_data_are_cleaned_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    write(
        &dir.path().join("a.jsonl"),
        &[
            json!({ "url": "http://good.example/1", "text": "Itâ€™s fine.  \r\nWrite to a@b.org or call +49 30 901820!!!" }),
            json!({ "url": "http://www.bad.example/x", "text": "Blocked." }),
            json!({ "text": "No address, so it stays." }),
            json!({ "url": "http://good.example/2", "text": "\u{200b}\u{feff}\n" }),
            json!({ "url": "http://good.example/3", "text": format!("A key: {}{}.", "AKIA", "A1B2".repeat(4)) }),
        ],
    );
    fs::write(dir.path().join("block.txt"), "bad.example\n").unwrap();
    let urls = UrlsConfig { blocklists: vec!["block.txt".into()], ..UrlsConfig::default() };
    let clean = CleanConfig {
        repeated_punctuation: true,
        pii: PiiConfig { redact: vec![Pii::Email, Pii::Phone], drop: vec![Pii::Secret] },
        ..CleanConfig::default()
    };
    let stages = |clean: &CleanConfig| -> Vec<Arc<dyn Stage>> {
        vec![
            ingest(dir.path(), vec![input("web", "a.jsonl")], 1 << 20),
            Arc::new(UrlsStage::new("ingest", &urls, dir.path()).unwrap()),
            Arc::new(CleanStage::new(clean.clone(), "ingest", Some("urls".into())).unwrap()),
            Arc::new(CurateStage::new("clean", None)),
        ]
    };
    let run_dir = dir.path().join("run");
    run(&run_dir, 2, stages(&clean)).await.unwrap();
    let texts = rows(&run_dir, "select text from curate order by ordinal").await;
    assert_eq!(
        texts,
        [
            json!({ "text": "It’s fine.\nWrite to <EMAIL> or call <PHONE>!" }),
            json!({ "text": "No address, so it stays." })
        ]
    );
    assert_eq!(
        rows(&run_dir, "select url, rule, detail from urls_dropped").await,
        [json!({ "url": "http://www.bad.example/x", "rule": "url_blocklist", "detail": "bad.example" })]
    );
    assert_eq!(
        rows(&run_dir, "select url, rule from clean_dropped order by ordinal").await,
        [
            json!({ "url": "http://good.example/2", "rule": "no_line_left" }),
            json!({ "url": "http://good.example/3", "rule": "pii_secret" })
        ]
    );
    let report = pipeline::report::report(&run_dir).unwrap();
    let change = |name: &str| report.changes.get(name).map(|c| (c.documents, c.changes));
    assert_eq!(change("mojibake"), Some((1, 1)));
    assert_eq!(change("zero_width"), Some((1, 2)));
    assert_eq!(change("controls"), Some((1, 1)));
    assert_eq!(change("repeated_punctuation"), Some((1, 1)));
    assert_eq!(change("redacted email"), Some((1, 1)));
    assert_eq!(change("nfc"), None);
    // What was dropped can be looked at as it came, but a report, which is passed on, has no personal data.
    let summaries = pipeline::status::summaries(&run_dir).unwrap();
    let secret_of =
        |samples: Vec<Sample>| samples.into_iter().find(|s| s.rule.as_deref() == Some("pii_secret")).unwrap();
    let as_it_came = Excerpt { chars: 700, hidden: PiiFinder::default() };
    let secret = secret_of(by_rule(&run_dir, &summaries, 3, &as_it_came, 0).unwrap());
    assert!(secret.text.starts_with("A key: AKIA"), "{secret:?}");
    assert!(secret_of(report.samples.clone()).text.starts_with("A key: <SECRET>"), "{:?}", report.samples);
    // Nor has it the beginning of what ends behind the last character shown.
    let cut = Excerpt { chars: 12, hidden: PiiFinder::new(Pii::ALL) };
    assert_eq!(secret_of(by_rule(&run_dir, &summaries, 3, &cut, 0).unwrap()).text, "A key: <SECR");

    // The counts are those of one pass over each text.
    let mut changes = pipeline::normalise::Changes::default();
    Normaliser::new([Part::Mojibake]).apply("Itâ€™s fine.", &mut changes);
    assert_eq!(changes.of(Part::Mojibake), 1);

    let both = PiiConfig { redact: vec![Pii::Email], drop: vec![Pii::Email] };
    let error = CleanStage::new(CleanConfig { pii: both, ..clean }, "ingest", None).err().unwrap();
    assert!(matches!(&error, Error::Setting { key, .. } if key == "clean.pii.drop.0"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_list_redoes_the_verdicts() {
    let dir = tempfile::tempdir().unwrap();
    let address = |n: usize| json!({ "url": format!("http://site{n}.example/"), "text": format!("Text number {n}.") });
    write(&dir.path().join("a.jsonl"), &(0..4).map(address).collect::<Vec<_>>());
    let run_dir = dir.path().join("run");
    let urls = UrlsConfig { blocklists: vec!["block.txt".into()], ..UrlsConfig::default() };
    for (list, left) in [("site1.example\n", 3), ("site1.example\nsite2.example\n", 2)] {
        fs::write(dir.path().join("block.txt"), list).unwrap();
        let stages: Vec<Arc<dyn Stage>> = vec![
            ingest(dir.path(), vec![input("web", "a.jsonl")], 1 << 20),
            Arc::new(UrlsStage::new("ingest", &urls, dir.path()).unwrap()),
        ];
        run(&run_dir, 1, stages).await.unwrap();
        assert_eq!(rows(&run_dir, "select count(*) as n from urls").await[0]["n"], left);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn languages_and_classifiers_are_columns_that_rules_use() {
    let dir = tempfile::tempdir().unwrap();
    let english = "All human beings are born free and equal in dignity and rights. They are endowed with reason.";
    let german = "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft begabt.";
    let chinese = "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。";
    let spam = "casino bonus click here now casino bonus click here now for the bonus and the casino";
    let texts = [english, german, chinese, spam, "the old harbour was"];
    write(&dir.path().join("a.jsonl"), &texts.map(|text| json!({ "text": text })));

    let settings = pipeline::classify::TrainSettings { bits: 12, held_out: 0.3, ..Default::default() };
    let mut examples = Vec::new();
    for n in 0..60 {
        let good = format!("{} {} {n} reason dignity", ["born", "free", "equal"][n % 3], ["rights", "spirit"][n % 2]);
        let bad = format!("{} {} {n} casino bonus", ["click", "here", "now"][n % 3], ["win", "cash"][n % 2]);
        examples.extend(pipeline::classify::Example::new(&good, true, &settings));
        examples.extend(pipeline::classify::Example::new(&bad, false, &settings));
    }
    let (model, _) = pipeline::classify::train(&examples, &settings).unwrap();
    model.save(&dir.path().join("quality.model")).unwrap();

    let signals = SignalsConfig {
        language: Some(Default::default()),
        classifiers: vec![ClassifierConfig { name: "quality".into(), model: "quality.model".into(), label: None }],
        ..SignalsConfig::default()
    };
    let filter = FilterConfig {
        profiles: vec!["gopher_quality".into()],
        thresholds: BTreeMap::from([("gopher_too_few_words".into(), 5.0)]),
        rules: vec![RuleConfig { name: "spam".into(), drop_when: "quality < 0.5 AND language = 'en'".into() }],
        languages: BTreeMap::from([
            (
                "zh".into(),
                LanguageRules {
                    off: vec!["gopher_short_words".into(), "gopher_stop_words".into()],
                    ..Default::default()
                },
            ),
            (
                "de".into(),
                LanguageRules {
                    thresholds: BTreeMap::from([("gopher_too_few_words".into(), 100.0)]),
                    ..Default::default()
                },
            ),
        ]),
    };
    let stages: Vec<Arc<dyn Stage>> = vec![
        ingest(dir.path(), vec![input("web", "a.jsonl")], 1 << 20),
        Arc::new(SignalsStage::new("ingest", None, &signals, dir.path()).unwrap()),
        Arc::new(FilterStage::new("signals", &filter, &signals).unwrap()),
    ];
    let run_dir = dir.path().join("run");
    run(&run_dir, 2, stages).await.unwrap();
    let found =
        rows(&run_dir, "select language, word_count, stop_word_count, quality from signals order by ordinal").await;
    let languages: Vec<&str> = found.iter().take(4).map(|row| row["language"].as_str().unwrap()).collect();
    assert_eq!(languages, ["en", "de", "zh", "en"]);
    // The German list, not the English one; and every ideograph is a word.
    assert!(found[1]["stop_word_count"].as_i64().unwrap() >= 1);
    assert_eq!(found[2]["word_count"], chinese.chars().filter(|c| c.is_alphanumeric()).count());
    assert!(found[0]["quality"].as_f64().unwrap() > 0.5 && found[3]["quality"].as_f64().unwrap() < 0.5, "{found:?}");
    let dropped = rows(&run_dir, "select rule, value, threshold from filter_dropped order by ordinal").await;
    assert_eq!(dropped[0]["rule"], "gopher_too_few_words", "German has a threshold of its own: {dropped:?}");
    assert_eq!(dropped[0]["threshold"], 100.0);
    assert_eq!(dropped[1]["rule"], "spam");
    assert_eq!((&dropped[2]["rule"], &dropped[2]["threshold"]), (&json!("gopher_too_few_words"), &json!(5.0)));
    assert_eq!(rows(&run_dir, "select count(*) as n from filter").await[0]["n"], 2);
    // A rule with a threshold for each language has none to report, but a median.
    let report = pipeline::report::rules(&run_dir).unwrap();
    let words = (dropped[0]["value"].as_f64().unwrap() + dropped[2]["value"].as_f64().unwrap()) / 2.0;
    assert_eq!((report[0].rule.as_str(), report[0].dropped, report[0].share), ("gopher_too_few_words", 2, 0.4));
    assert_eq!((report[0].threshold, report[0].thresholds_differ), (None, true));
    assert_eq!(report[0].median_value, Some(words));
    assert_eq!((report[1].rule.as_str(), report[1].dropped, report[1].thresholds_differ), ("spam", 1, false));

    for (config, key) in [
        (
            ClassifierConfig { name: "word_count".into(), model: "quality.model".into(), label: None },
            "signals.classifiers.0.name",
        ),
        (ClassifierConfig { name: "q".into(), model: "none.model".into(), label: None }, "signals.classifiers.0.model"),
        (ClassifierConfig { name: "q".into(), model: "a.jsonl".into(), label: None }, "signals.classifiers.0.model"),
        (
            ClassifierConfig { name: "q".into(), model: "quality.model".into(), label: Some("x".into()) },
            "signals.classifiers.0.model",
        ),
    ] {
        let config = SignalsConfig { classifiers: vec![config], ..SignalsConfig::default() };
        let error = SignalsStage::new("ingest", None, &config, dir.path()).err().unwrap();
        assert!(matches!(&error, Error::Setting { key: found, .. } if found == key), "{key}: {error}");
    }
}

/// What `[signals.language]` finds is what caps and the curated documents have; what it cannot tell is as the input says.
#[tokio::test(flavor = "multi_thread")]
async fn identified_languages_reach_caps_and_documents() {
    let dir = tempfile::tempdir().unwrap();
    let english = "The harbour was quiet in the morning, and the boats that had come in at night lay along the wall. \
                   Nobody had told the old man what had happened there.";
    let german = "Am Morgen war es still im Hafen, und die Boote, die in der Nacht gekommen waren, lagen an der Mauer. \
                  Niemand hatte dem alten Mann gesagt, was dort geschehen war.";
    let mut documents: Vec<Value> = (0..60)
        .map(|n| {
            let text = if n % 3 == 0 { german } else { english };
            json!({ "url": format!("http://a.example/{n}"), "text": text })
        })
        .collect();
    // Nothing to tell a language by; and one without any.
    documents.push(json!({ "url": "http://a.example/60", "text": "12 34 56", "language": "fra_Latn" }));
    documents.push(json!({ "url": "http://a.example/61", "text": "12 34 57" }));
    // An address of the blocklist: its signals are not there.
    documents.push(json!({ "url": "http://bad.example/62", "text": english }));
    write(&dir.path().join("web.jsonl"), &documents);
    fs::write(dir.path().join("block.txt"), "bad.example\n").unwrap();
    let urls = UrlsConfig { blocklists: vec!["block.txt".into()], ..UrlsConfig::default() };
    let signals = SignalsConfig { language: Some(Default::default()), ..SignalsConfig::default() };
    let mix = MixConfig {
        caps: vec![CapConfig {
            name: "language".into(),
            by: "language".into(),
            max_documents: Some(15),
            max_bytes: None,
        }],
        ..MixConfig::default()
    };
    let mut kept: Vec<Vec<Value>> = Vec::new();
    for (number, (threads, languages)) in
        [(1, Some("signals")), (3, Some("signals")), (2, None)].into_iter().enumerate()
    {
        let run_dir = dir.path().join(format!("run{number}"));
        let mut stages: Vec<Arc<dyn Stage>> = vec![
            ingest(dir.path(), vec![input("web", "web.jsonl")], 4000),
            Arc::new(UrlsStage::new("ingest", &urls, dir.path()).unwrap()),
            Arc::new(SignalsStage::new("ingest", Some("urls".into()), &signals, dir.path()).unwrap()),
        ];
        stages.extend(mix_stages(&mix, "ingest", Some("urls"), languages, &["web".to_owned()]).unwrap());
        let curate = CurateStage::new("ingest", Some(mix::NAME.into())).with_languages(languages.map(String::from));
        stages.push(Arc::new(curate));
        run(&run_dir, threads, stages).await.unwrap();
        kept.push(rows(&run_dir, "select ordinal, language from curate order by ordinal").await);
        for part in fs::read_dir(run_dir.join("curate")).unwrap().map(|entry| entry.unwrap().path()) {
            if part.extension().is_some_and(|e| e == "parquet") {
                let ordinals = ordinals(&part);
                assert!(ordinals.is_sorted() && !ordinals.is_empty(), "in the order of the input: {ordinals:?}");
            }
        }
        let counts = rows(
            &run_dir,
            "select coalesce(language, '-') as language, count(*) as n from curate group by 1 order by 1",
        )
        .await;
        let expected = match languages {
            Some(_) => vec![("-", 1), ("de", 15), ("en", 15), ("fr", 1)],
            None => vec![("-", 61), ("fra_Latn", 1)],
        };
        let expected: Vec<Value> = expected.iter().map(|(l, n)| json!({ "language": l, "n": n })).collect();
        assert_eq!(counts, expected);
        // Rules see the same: what the identifier cannot tell is as the input says, in the form that it has here.
        let untold = "select language, language_score from signals where coalesce(language, '-') in ('-', 'fr') order by ordinal";
        let expected = [json!({ "language": "fr", "language_score": 0.0 }), json!({ "language_score": 0.0 })];
        assert_eq!(rows(&run_dir, untold).await, expected);
    }
    assert_eq!(kept[0], kept[1], "whatever the number of threads");
}

#[tokio::test(flavor = "multi_thread")]
async fn fractions_and_caps_choose_by_hash() {
    let dir = tempfile::tempdir().unwrap();
    let page =
        |n: usize| json!({ "url": format!("http://w{}.site{}.co.uk/{n}", n % 3, n % 4), "text": "x".repeat(10) });
    write(&dir.path().join("web.jsonl"), &(0..400).map(page).collect::<Vec<_>>());
    let book = |n: usize| json!({ "text": format!("{}", "book ".repeat(1 + n % 5)) });
    write(&dir.path().join("books.jsonl"), &(0..300).map(book).collect::<Vec<_>>());
    let inputs = || vec![input("web", "web.jsonl"), input("books", "books.jsonl")];
    let sources = ["web".to_owned(), "books".to_owned()];
    let config = |fraction: f64, documents: u64| MixConfig {
        fractions: BTreeMap::from([("books".into(), fraction)]),
        caps: vec![
            CapConfig { name: "domain".into(), by: "domain".into(), max_documents: Some(documents), max_bytes: None },
            CapConfig {
                name: "books".into(),
                by: "CASE WHEN source = 'books' THEN 'b' END".into(),
                max_documents: None,
                max_bytes: Some(900),
            },
        ],
        seed: 5,
    };
    let mut kept: Vec<Vec<Value>> = Vec::new();
    for (number, (fraction, documents, threads)) in [(1.0, 20, 1), (1.0, 20, 3), (0.5, 10, 2)].into_iter().enumerate() {
        let run_dir = dir.path().join(format!("run{number}"));
        let mut stages = vec![ingest(dir.path(), inputs(), 5000)];
        stages.extend(mix_stages(&config(fraction, documents), "ingest", None, None, &sources).unwrap());
        stages.push(Arc::new(CurateStage::new("ingest", Some(mix::NAME.into()))));
        run(&run_dir, threads, stages).await.unwrap();
        let sites = rows(
            &run_dir,
            "select substr(url, 11, 11) as site, count(*) as n from curate where source = 'web' group by 1 order by 1",
        )
        .await;
        assert_eq!(sites.len(), 4);
        assert!(sites.iter().all(|site| site["n"] == documents), "{sites:?}");
        let bytes =
            rows(&run_dir, "select sum(octet_length(text)) as n from curate where source = 'books'").await[0]["n"]
                .as_u64()
                .unwrap();
        assert!((850..=900).contains(&bytes), "{bytes}");
        let rules = rows(&run_dir, "select rule, count(*) as n from mix_dropped group by rule order by rule").await;
        let names: Vec<&str> = rules.iter().map(|r| r["rule"].as_str().unwrap()).collect();
        assert_eq!(
            names,
            if fraction < 1.0 { vec!["cap_books", "cap_domain", "fraction"] } else { vec!["cap_books", "cap_domain"] }
        );
        kept.push(rows(&run_dir, "select ordinal from curate order by ordinal").await);
    }
    assert_eq!(kept[0], kept[1], "whatever the number of threads");
    let web = |rows: &[Value]| rows.iter().filter(|r| kept[0].contains(r)).count();
    assert!(web(&kept[2]) >= 40, "a smaller cap keeps a part of what a larger one keeps");

    let cap = |by: &str, max: Option<u64>| MixConfig {
        caps: vec![CapConfig { name: "a".into(), by: by.into(), max_documents: max, max_bytes: None }],
        ..MixConfig::default()
    };
    let tenfold = MixConfig { fractions: BTreeMap::from([("web".into(), 10.0)]), ..MixConfig::default() };
    let error = mix_stages(&tenfold, "ingest", None, None, &sources).err().unwrap().to_string();
    assert_eq!(
        error,
        "mix.fractions.web: 10 is not from 0 to 1; to see documents more than once, give the source `epochs` in [train.data]"
    );
    for (config, key) in [
        (cap("domian", Some(3)), "mix.caps.0.by"),
        (cap("domain", None), "mix.caps.0"),
        (MixConfig { fractions: BTreeMap::from([("wbe".into(), 0.5)]), ..MixConfig::default() }, "mix.fractions.wbe"),
        (MixConfig { fractions: BTreeMap::from([("web".into(), 2.0)]), ..MixConfig::default() }, "mix.fractions.web"),
    ] {
        let error = mix_stages(&config, "ingest", None, None, &sources).err().unwrap();
        assert!(matches!(&error, Error::Setting { key: found, .. } if found == key), "{key}: {error}");
    }
}
