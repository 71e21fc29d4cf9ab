//! `fulgurite report`, `review` and `classifier` as processes over a small run.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use pipeline::pii::{Pii, PiiCounts, PiiFinder};
use support::{fulgurite, root, small_recipe, succeed};

/// A run of the small recipe as far as its curated shards.
fn curated(dir: &Path) -> PathBuf {
    let run = dir.join("run");
    let recipe = small_recipe(dir);
    let set = "clean={repeated_punctuation=true, pii={redact=[\"email\", \"phone\"]}}";
    let mut command = fulgurite();
    command.args(["run", "-q", "--until", "curate", "--set", set, "--run-dir"]).arg(&run).arg(&recipe);
    succeed(&mut command);
    run
}

fn text(command: &mut Command) -> String {
    String::from_utf8(succeed(command).stdout).unwrap()
}

#[test]
fn a_report_is_one_file_and_its_figures_are_those_of_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let run = curated(dir.path());
    let table = text(fulgurite().arg("report").arg(&run));
    assert!(table.contains("gopher_") && table.contains("near_duplicate"), "{table}");

    let json: serde_json::Value =
        serde_json::from_str(&text(fulgurite().arg("report").arg(&run).arg("--json"))).unwrap();
    let count = |sql: &str| -> u64 {
        let row = text(fulgurite().arg("sql").arg(&run).args([sql, "--json"]));
        serde_json::from_str::<serde_json::Value>(&row).unwrap()["n"].as_u64().unwrap()
    };
    let funnel = json["funnel"].as_array().unwrap();
    let left = |stage: &str| funnel.iter().find(|s| s["stage"] == stage).unwrap();
    for stage in ["ingest", "clean", "filter", "exact", "near", "curate"] {
        assert_eq!(left(stage)["documents"], count(&format!("select count(*) as n from {stage}")), "{stage}");
    }
    assert_eq!(left("curate")["by_source"]["docs"], count("select count(*) as n from curate where source = 'docs'"));
    let dropped = count("select count(*) as n from filter_dropped");
    let words = json["histograms"].as_array().unwrap().iter().find(|h| h["signal"] == "non_symbol_word_count").unwrap();
    let sum = |key: &str| words[key].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum::<u64>();
    assert_eq!((sum("kept"), sum("dropped")), (count("select count(*) as n from filter"), dropped));
    assert!(words["thresholds"].as_array().unwrap().iter().any(|t| t["value"] == 50.0), "{words}");
    let alone = count("select count(*) as n from filter_dropped where array_length(rules) = 1");
    let told: u64 = json["overlap"]["alone"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(told, alone);
    assert!(json["samples"].as_array().unwrap().iter().any(|s| s["rule"] == "near_duplicate" && s["text"] != ""));

    let markdown = text(fulgurite().arg("report").arg(&run).args(["--format", "md"]));
    assert!(markdown.contains("## Documents by source") && markdown.contains("| filter |"), "{markdown}");

    let html = std::fs::read_to_string(run.join("report.html")).unwrap();
    for outside in ["<script", "<link", "<img", "src=", "@import", "url("] {
        assert!(!html.contains(outside) || html.find(outside) > html.find("<h2>Samples"), "{outside}");
    }
    assert!(html.contains("<svg") && html.contains("<line") && html.contains("gopher_too_few_words"));
    for element in ["div", "table", "details", "figure", "svg", "tr", "td", "pre"] {
        let opened = html.matches(&format!("<{element}>")).count() + html.matches(&format!("<{element} ")).count();
        assert_eq!(opened, html.matches(&format!("</{element}>")).count(), "{element}");
    }
    look_at(&run.join("report.html"), dir.path());

    let output = fulgurite().arg("report").arg(&run).args(["--output", "/nonexistent-path/x.html"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--output"));
}

#[test]
fn every_stage_that_decides_on_documents_is_reported_and_reviewed() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = small_recipe(dir.path());
    let words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau";
    std::fs::write(dir.path().join("quiz.jsonl"), serde_json::json!({ "question": words }).to_string()).unwrap();
    let quiz = dir.path().join("quiz.jsonl");
    let more = format!(
        "\n[urls]\n[clean]\n[lines]\n[substring]\nlength = 20\n[mix.fractions]\ndocs = 0.5\n\
         [decontaminate]\nbenchmarks = [{{ name = \"quiz\", paths = [{quiz:?}] }}]\n"
    );
    let small = std::fs::read_to_string(&recipe).unwrap();
    let large = small.replace("[exact]", "[exact]\nby = [\"url\", \"text\"]") + &more;
    std::fs::write(&recipe, large).unwrap();
    let run = dir.path().join("run");
    succeed(fulgurite().args(["run", "-q", "--until", "curate", "--run-dir"]).arg(&run).arg(&recipe));

    let told: serde_json::Value =
        serde_json::from_str(&text(fulgurite().arg("report").arg(&run).arg("--json"))).unwrap();
    let funnel: Vec<(&str, u64)> = told["funnel"]
        .as_array()
        .unwrap()
        .iter()
        .map(|stage| (stage["stage"].as_str().unwrap(), stage["documents"].as_u64().unwrap()))
        .collect();
    let expected = [
        "ingest",
        "urls",
        "clean",
        "filter",
        "exact_url",
        "exact",
        "near",
        "lines",
        "substring",
        "decontaminate",
        "mix",
        "curate",
    ];
    assert_eq!(funnel.iter().map(|(stage, _)| *stage).collect::<Vec<_>>(), expected);
    for (stage, documents) in funnel {
        let sql = format!("select count(*) as n from {stage}");
        let row = text(fulgurite().arg("sql").arg(&run).args([sql.as_str(), "--json"]));
        assert_eq!(serde_json::from_str::<serde_json::Value>(&row).unwrap()["n"], documents, "{stage}");
    }
    let samples = told["samples"].as_array().unwrap();
    let of = |stage: &str| samples.iter().filter(|s| s["stage"] == stage).collect::<Vec<_>>();
    assert!(!of("mix").is_empty() && of("ingest").is_empty(), "{samples:?}");
    // A document that the last of them drops is shown as the stages before it left it.
    let dropped = of("mix")[0];
    let sql = format!("select text from substring where ordinal = {}", dropped["ordinal"]);
    let row = text(fulgurite().arg("sql").arg(&run).args([sql.as_str(), "--json"]));
    let whole = serde_json::from_str::<serde_json::Value>(&row).unwrap()["text"].as_str().unwrap().to_owned();
    let shown = PiiFinder::new(Pii::ALL).redact(&whole, &mut PiiCounts::default()).into_owned();
    assert_eq!(dropped["text"], shown.chars().take(700).collect::<String>());

    for stage in expected {
        let mut server = fulgurite();
        server.args(["review", "--port", "0", "--by", "source", "--stage", stage]).arg(&run);
        let mut server = server.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
        server.kill().unwrap();
        server.wait().unwrap();
        assert!(line.starts_with("http://"), "{stage}: {line}");
    }

    // In a recipe without most of them their directories stay, and what they dropped is missing no more.
    let gone = ["urls", "exact_url", "lines", "substring", "decontaminate", "mix"];
    let of_gone = |told: &serde_json::Value| {
        let rules = told["rules"].as_array().unwrap();
        rules.iter().filter(|rule| gone.iter().any(|stage| rule["stage"] == *stage)).count()
    };
    assert!(of_gone(&told) > 0 && told["lines"].is_object() && told["benchmarks"][0]["benchmark"] == "quiz", "{told}");
    std::fs::write(&recipe, small).unwrap();
    succeed(fulgurite().args(["run", "-q", "--until", "curate", "--run-dir"]).arg(&run).arg(&recipe));
    assert!(gone.iter().all(|stage| run.join(stage).join("manifest.json").exists()));
    let told: serde_json::Value =
        serde_json::from_str(&text(fulgurite().arg("report").arg(&run).arg("--json"))).unwrap();
    assert_eq!(
        (of_gone(&told), &told["lines"], told["benchmarks"].as_array().unwrap().len()),
        (0, &serde_json::Value::Null, 0)
    );
}

/// A picture of the page by a browser without a window, if this machine has one.
fn look_at(page: &Path, dir: &Path) {
    let names = ["chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell"];
    let Some(browser) = names.into_iter().find(|name| Command::new(name).arg("--version").output().is_ok()) else {
        println!("the report was not looked at in a browser: none of {} is on this machine", names.join(", "));
        return;
    };
    let picture = dir.join("report.png");
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,3000"])
        .arg(format!("--screenshot={}", picture.display()))
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    let size = std::fs::metadata(&picture).map_or(0, |m| m.len());
    // A page that shows nothing compresses to next to nothing.
    assert!(size > 40_000, "{size} bytes: {}", String::from_utf8_lossy(&output.stderr));
}

/// A server of documents of the stage `filter`, and the line that it says first.
fn review(run: &Path, arguments: &[&str]) -> (Child, String) {
    let mut server = fulgurite()
        .args(["review", "--port", "0", "--stage", "filter"])
        .args(arguments)
        .arg(run)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (server, line)
}

#[test]
fn a_review_serves_documents_and_keeps_marks() {
    let dir = tempfile::tempdir().unwrap();
    let run = curated(dir.path());
    let (mut server, line) = review(&run, &["--documents", "2"]);
    let address = line.trim().strip_prefix("http://").and_then(|a| a.strip_suffix('/')).unwrap().to_owned();
    assert!(address.starts_with("127.0.0.1:"), "{address}");
    let ask = |request: String| -> String {
        let mut connection = TcpStream::connect(&address).unwrap();
        connection.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    };
    assert!(ask(format!("GET / HTTP/1.1\r\nHost: {address}\r\n\r\n")).contains("fulgurite review"));
    let documents: serde_json::Value =
        serde_json::from_str(&ask(format!("GET /documents HTTP/1.1\r\nHost: {address}\r\n\r\n"))).unwrap();
    let documents = documents.as_array().unwrap();
    assert!(!documents.is_empty() && documents.iter().all(|d| d["stage"] == "filter" && d["text"] != ""));
    let first = &documents[0];
    for mark in ["keep", "drop"] {
        let body = serde_json::json!({
            "ordinal": first["ordinal"], "rule": first["rule"], "source": first["source"], "mark": mark
        })
        .to_string();
        let answer = ask(format!(
            "POST /marks HTTP/1.1\r\nHost: {address}\r\nOrigin: http://{address}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        ));
        assert!(answer.contains("precision"), "{answer}");
    }
    // Whatever happens to the server, the marks are there.
    server.kill().unwrap();
    server.wait().unwrap();
    let summary = text(fulgurite().arg("review").arg(&run).args(["--summary", "--json"]));
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    assert_eq!((&summary[0]["rule"], &summary[0]["drop"], &summary[0]["keep"]), (&first["rule"], &1.into(), &0.into()));
    let low = summary[0]["interval"][0].as_f64().unwrap();
    assert!((low - 0.2065).abs() < 1e-3, "Wilson's interval for one of one: {low}");
    let table = text(fulgurite().arg("review").arg(&run).arg("--summary"));
    assert!(table.contains("95% interval"), "{table}");

    // Of every source what the stage kept.
    let (mut server, line) = review(&run, &["--by", "source"]);
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(line.starts_with("http://"), "{line}");

    let output = fulgurite().arg("review").arg(&run).args(["--stage", "nothing"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_classifier_is_trained_from_files_and_used_in_a_recipe() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = root().join("configs/quickstart/corpus");
    let model = dir.path().join("prose.model");
    let train = |negative: &Path| {
        let mut command = fulgurite();
        command.args(["classifier", "train", "--bits", "16", "--epochs", "3", "--positive"]);
        command.arg(corpus.join("prose.jsonl.zst")).arg("--negative").arg(negative);
        command.arg("--output").arg(&model).arg("--json");
        command
    };
    let report: serde_json::Value = serde_json::from_str(&text(&mut train(&corpus.join("docs.jsonl.gz")))).unwrap();
    assert!(report["accuracy"].as_f64().unwrap() > 0.9 && report["auc"].as_f64().unwrap() > 0.95, "{report}");
    let bytes = std::fs::read(&model).unwrap();
    succeed(&mut train(&corpus.join("docs.jsonl.gz")));
    assert_eq!(std::fs::read(&model).unwrap(), bytes, "the same examples give the same file");

    let recipe = small_recipe(dir.path());
    let run = dir.path().join("run");
    let classifiers = format!("signals.classifiers=[{{name=\"prose\", model={:?}}}]", model.display().to_string());
    let rules = "filter.rules=[{name=\"no_prose\", drop_when=\"prose < 0.5\"}]";
    let mut command = fulgurite();
    command.args(["run", "-q", "--until", "filter", "--set", &classifiers, "--set", rules, "--run-dir"]);
    succeed(command.arg(&run).arg(&recipe));
    let sql = "select count(*) as n from filter_dropped where rule = 'no_prose'";
    let row = text(fulgurite().arg("sql").arg(&run).args([sql, "--json"]));
    assert!(!row.contains("\"n\":0"), "{row}");

    let output = train(Path::new("/nonexistent-path")).output().unwrap();
    assert_ne!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nonexistent-path"));
}
