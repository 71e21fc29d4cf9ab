//! `fulgurite report`, `review` and `classifier` as processes over a small run.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use pipeline::pii::{Pii, PiiCounts, PiiFinder};
use support::browser::Browser;
use support::{fulgurite, json_lines, root, small_recipe, succeed};

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

fn json_rows(text: &str) -> Vec<serde_json::Value> {
    text.lines().map(|row| serde_json::from_str(row).unwrap()).collect()
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
    look_at(&run.join("report.html"), &json);

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

    // Of two documents that every stage kept, one is marked at `filter` and `mix`, the other at `ingest` and `mix`.
    let sql = "select i.id, i.source from mix m join ingest i on m.ordinal = i.ordinal order by i.id limit 2";
    let kept = json_rows(&text(fulgurite().arg("sql").arg(&run).args([sql, "--json"])));
    let mark = |of: usize, stage: &str, said: &str| {
        let (id, source) = (&kept[of]["id"], &kept[of]["source"]);
        serde_json::json!({ "id": id, "stage": stage, "rule": null, "source": source, "mark": said })
    };
    let stand = [mark(0, "filter", "keep"), mark(1, "ingest", "keep")];
    let marks = [&stand[0], &stand[1], &mark(0, "mix", "drop"), &mark(1, "mix", "drop")];
    std::fs::create_dir_all(run.join("review")).unwrap();
    std::fs::write(run.join("review/marks.jsonl"), marks.map(|mark| format!("{mark}\n")).concat()).unwrap();

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

    // What `filter` kept is marked where it was marked at `filter`, whatever other stages kept it, and figures are of one stage each.
    let figures: serde_json::Value =
        serde_json::from_str(&text(fulgurite().arg("review").arg(&run).args(["--summary", "--json"]))).unwrap();
    let figures = figures.as_array().unwrap();
    let sum = |stage: &str, key: &str| -> u64 {
        figures.iter().filter(|p| p["stage"] == stage).map(|p| p[key].as_u64().unwrap()).sum()
    };
    assert_eq!(["keep", "drop", "changed"].map(|key| sum("filter", key)), [1, 0, 0], "{figures:?}");
    assert_eq!(["keep", "drop", "changed"].map(|key| sum("mix", key)), [0, 0, 2], "{figures:?}");
    let (mut server, line) = review(&run, &["--by", "source", "--documents", "1000"]);
    let address = line.trim().strip_prefix("http://").and_then(|a| a.strip_suffix('/')).unwrap();
    let get = |path: &str| -> serde_json::Value {
        serde_json::from_str(&ask(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n"))).unwrap()
    };
    assert_eq!(get("/marks")["marks"], serde_json::json!(stand));
    let documents = get("/documents");
    let documents = documents.as_array().unwrap();
    for kept in &kept {
        assert!(documents.iter().any(|d| d["id"] == kept["id"] && d["rule"].is_null() && d["stage"] == "filter"));
    }
    if let Some(mut browser) = Browser::find() {
        browser.visit(line.trim(), 1280);
        browser.wait_for("document.getElementById('place').textContent !== ''");
        let place = browser.evaluate("document.getElementById('place').textContent");
        let place = place.as_str().unwrap();
        assert!(place.ends_with(&format!(" of {}, 1 marked", documents.len())), "{place}");
    }
    server.kill().unwrap();
    server.wait().unwrap();
}

/// The page as a browser shows it, wide and narrow: everything is there, in colour, and inside of the window.
fn look_at(page: &Path, facts: &serde_json::Value) {
    let Some(mut browser) = Browser::find() else { return };
    let (stages, signals) = (facts["funnel"].as_array().unwrap(), facts["histograms"].as_array().unwrap());
    for width in [1280, 400] {
        browser.visit(&format!("file://{}", page.display()), width);
        assert_eq!(browser.evaluate("document.querySelectorAll('table.funnel tr').length"), stages.len());
        assert_eq!(browser.evaluate("document.querySelectorAll('figure').length"), signals.len());
        let first = "[...document.querySelectorAll('table.funnel tr:first-of-type .bar i')]";
        let bars = browser.evaluate(&format!("{first}.map(bar => bar.getBoundingClientRect().width)"));
        let bars: Vec<f64> = bars.as_array().unwrap().iter().map(|bar| bar.as_f64().unwrap()).collect();
        assert_eq!(bars.len(), stages[0]["by_source"].as_object().unwrap().len());
        assert!(bars.iter().all(|bar| *bar > 0.0) && bars.iter().sum::<f64>() > width as f64 / 4.0, "{bars:?}");
        // Of every signal that a rule asks for: bars of some height, and the thresholds that lie among them.
        let tall = browser.evaluate(
            "[...document.querySelectorAll('.grid:not(details *) figure')].map(figure =>
                [...figure.querySelectorAll('rect')].filter(bar => bar.getBoundingClientRect().height > 1).length)",
        );
        let tall = tall.as_array().unwrap();
        assert!(tall.len() > 5 && tall.iter().all(|bars| bars.as_u64().unwrap() > 0), "{tall:?}");
        assert!(browser.evaluate("document.querySelectorAll('figure line').length").as_u64().unwrap() > 5);
        let over = browser.evaluate("document.documentElement.scrollWidth - innerWidth");
        assert!(over.as_f64().unwrap() <= 0.0, "at {width} pixels the page is {over} wider than the window");
        let picture = browser.picture();
        assert!(picture.width == width && picture.height > 2000, "{picture:?}");
        assert!(picture.colours > 100 && picture.ink > 0.03, "{picture:?}");
        assert_eq!(browser.evaluate("document.querySelector('details').open"), false);
        browser.evaluate("document.querySelector('summary').click()");
        assert_eq!(browser.evaluate("document.querySelector('details').open"), true);
    }
    assert!(browser.complaints().is_empty(), "{:?}", browser.complaints());
}

/// The body of what the server at an address answers.
fn ask(address: &str, request: &str) -> String {
    let mut connection = TcpStream::connect(address).unwrap();
    connection.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
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
    let ask = |request: String| ask(&address, &request);
    assert!(ask(format!("GET / HTTP/1.1\r\nHost: {address}\r\n\r\n")).contains("fulgurite review"));
    let documents: serde_json::Value =
        serde_json::from_str(&ask(format!("GET /documents HTTP/1.1\r\nHost: {address}\r\n\r\n"))).unwrap();
    let documents = documents.as_array().unwrap();
    assert!(!documents.is_empty() && documents.iter().all(|d| d["stage"] == "filter" && d["text"] != ""));
    let first = &documents[0];
    for mark in ["keep", "drop"] {
        let body = serde_json::json!({
            "id": first["id"], "stage": first["stage"], "rule": first["rule"], "source": first["source"], "mark": mark
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
fn a_review_is_done_from_the_keyboard_of_a_browser() {
    let Some(mut browser) = Browser::find() else { return };
    let dir = tempfile::tempdir().unwrap();
    let run = curated(dir.path());
    let (mut server, line) = review(&run, &["--documents", "3"]);
    let page = line.trim();
    for width in [400, 1280] {
        browser.visit(page, width);
        browser.wait_for("document.getElementById('place').textContent !== ''");
        let over = browser.evaluate("document.documentElement.scrollWidth - innerWidth");
        assert!(over.as_f64().unwrap() <= 0.0, "at {width} pixels the page is {over} wider than the window");
        let picture = browser.picture();
        assert!(picture.width == width && picture.colours > 20 && picture.ink > 0.03, "{picture:?}");
    }
    let documents = browser.evaluate("fetch('/documents').then(answer => answer.json())");
    let documents = documents.as_array().unwrap();
    assert!(documents.len() > 5);
    let shown = |browser: &mut Browser| browser.evaluate("document.getElementById('text').textContent");
    assert!(shown(&mut browser).as_str().unwrap().starts_with(documents[0]["text"].as_str().unwrap()));

    // What a rule counts is marked.
    let marked = |browser: &mut Browser, rule: &str| {
        let d = serde_json::json!({ "text": "a b c\na b d a b c\na b c", "stage": "filter", "rule": rule });
        browser.evaluate(&format!("hits({d}).map(([start, end]) => ({d}).text.slice(start, end))"))
    };
    assert_eq!(marked(&mut browser, "gopher_top_2gram"), serde_json::json!(["a b", "a b", "a b", "a b"]));
    assert_eq!(marked(&mut browser, "gopher_duplicate_3grams"), serde_json::json!(["a b c", "a b c"]));
    assert_eq!(marked(&mut browser, "massiveweb_repeated_3grams"), serde_json::json!(["a b c\na b", "a b c\na b c"]));
    assert_eq!(marked(&mut browser, "gopher_duplicate_lines"), serde_json::json!(["a b c"]));
    assert_eq!(marked(&mut browser, "gopher_too_few_words"), serde_json::json!([]));

    // Faster than anything can be stored: each key is of the document in sight.
    let keys = [("k", "keep"), ("d", "drop"), ("u", "unsure"), ("d", "drop")];
    keys.iter().for_each(|(key, _)| browser.press(key));
    assert!(shown(&mut browser).as_str().unwrap().starts_with(documents[4]["text"].as_str().unwrap()));
    browser.wait_for("waiting === 0");
    let marks = json_lines(&run.join("review/marks.jsonl"));
    assert_eq!(marks.len(), keys.len());
    for ((mark, document), (_, said)) in marks.iter().zip(documents).zip(keys) {
        assert_eq!((&mark["id"], &mark["rule"], &mark["mark"]), (&document["id"], &document["rule"], &said.into()));
    }
    let place = browser.evaluate("document.getElementById('place').textContent");
    assert_eq!(place, format!("5 of {}, 4 marked", documents.len()));
    browser.press("ArrowLeft");
    browser.press("ArrowLeft");
    assert_eq!(browser.evaluate("document.querySelector('button.on').dataset.mark"), "unsure");
    assert!(browser.evaluate("document.querySelectorAll('#precision tr').length").as_u64().unwrap() > 1);
    assert!(browser.complaints().is_empty(), "{:?}", browser.complaints());

    // After another start the page begins behind what is marked.
    browser.visit(page, 1280);
    browser.wait_for("document.getElementById('place').textContent.startsWith('5 of')");
    // A mark that cannot be stored is taken back and told.
    server.kill().unwrap();
    server.wait().unwrap();
    browser.press("k");
    browser.wait_for("document.getElementById('failed').textContent.startsWith('not stored')");
    let place = browser.evaluate("document.getElementById('place').textContent");
    assert_eq!(place, format!("5 of {}, 4 marked", documents.len()));
    assert_eq!(json_lines(&run.join("review/marks.jsonl")).len(), keys.len());
}

#[test]
fn marks_are_of_documents_whatever_is_run_again() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = small_recipe(dir.path());
    let run = dir.path().join("run");
    let again = |set: &[&str]| {
        let mut command = fulgurite();
        command.args(["run", "-q", "--until", "filter", "--run-dir"]).arg(&run);
        for set in set {
            command.args(["--set", set]);
        }
        succeed(command.arg(&recipe));
    };
    let query = |sql: &str| -> Vec<serde_json::Value> {
        json_rows(&text(fulgurite().arg("sql").arg(&run).args([sql, "--json"])))
    };
    let summary = || -> serde_json::Value {
        serde_json::from_str(&text(fulgurite().arg("review").arg(&run).args(["--summary", "--json"]))).unwrap()
    };
    again(&[]);
    let rule = "gopher_too_few_words";
    let sql = format!(
        "select f.id, f.ordinal, f.value, i.source from filter_dropped f join ingest i on f.ordinal = i.ordinal \
         where f.rule = '{rule}' order by f.value, f.id"
    );
    let dropped = query(&sql);
    let kept =
        query("select i.id, i.source from filter f join ingest i on f.ordinal = i.ordinal order by i.id limit 2");
    assert!(dropped.len() > 2, "{dropped:?}");
    let line = |row: &serde_json::Value, rule: Option<&str>, mark: &str| {
        let mark = serde_json::json!({
            "id": row["id"], "stage": "filter", "rule": rule, "source": row["source"], "mark": mark
        });
        format!("{mark}\n")
    };
    let mut lines: String = dropped.iter().map(|row| line(row, Some(rule), "drop")).collect();
    lines.extend(kept.iter().map(|row| line(row, None, "keep")));
    std::fs::create_dir(run.join("review")).unwrap();
    let file = run.join("review/marks.jsonl");
    std::fs::write(&file, &lines).unwrap();
    let of = |summary: &serde_json::Value, rule: Option<&str>| {
        let rows = summary.as_array().unwrap().iter().filter(|row| row["rule"] == serde_json::json!(rule));
        rows.fold([0u64; 4], |sums, row| {
            let keys = ["drop", "keep", "changed", "gone"].map(|key| row[key].as_u64().unwrap());
            std::array::from_fn(|at| sums[at] + keys[at])
        })
    };
    let all = dropped.len() as u64;
    assert_eq!(of(&summary(), Some(rule)), [all, 0, 0, 0]);
    assert_eq!(of(&summary(), None), [0, 2, 0, 0]);

    // Other shards: documents have other places in the run and the ids they had.
    again(&["ingest.split_bytes=25000"]);
    let moved = query(&sql);
    assert_eq!(moved.len(), dropped.len());
    assert!(moved.iter().zip(&dropped).any(|(now, before)| now["ordinal"] != before["ordinal"]));
    assert_eq!(of(&summary(), Some(rule)), [all, 0, 0, 0]);

    // Another threshold: what the rule drops no longer is told and counts for nothing.
    let threshold = dropped[dropped.len() / 2]["value"].as_f64().unwrap();
    let still = dropped.iter().filter(|row| row["value"].as_f64().unwrap() < threshold).count() as u64;
    let set = format!("filter.thresholds={{{rule}={threshold}}}");
    again(&["ingest.split_bytes=25000", &set]);
    assert_eq!(of(&summary(), Some(rule)), [still, 0, all - still, 0]);
    assert!(text(fulgurite().arg("review").arg(&run).arg("--summary")).contains("changed: marks"));

    // Without one of the inputs: its documents are gone. With it, they are back.
    let whole = std::fs::read_to_string(&recipe).unwrap();
    let source =
        dropped.iter().map(|row| row["source"].as_str().unwrap()).find(|source| *source != "extracts").unwrap();
    let tables: Vec<&str> = whole.split("[[ingest.inputs]]").collect();
    let (with, without): (Vec<_>, Vec<_>) =
        tables.into_iter().partition(|table| !table.contains(&format!("source = \"{source}\"")));
    assert_eq!(without.len(), 1);
    assert!(!without[0].contains("[signals]"), "the last input, behind which the other tables stand, is not {source}");
    std::fs::write(&recipe, with.join("[[ingest.inputs]]")).unwrap();
    again(&[]);
    let left = dropped.iter().filter(|row| row["source"] != source).count() as u64;
    assert_eq!(of(&summary(), Some(rule)), [left, 0, 0, all - left]);
    std::fs::write(&recipe, whole).unwrap();
    again(&[]);
    assert_eq!(of(&summary(), Some(rule)), [all, 0, 0, 0]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), lines);

    std::fs::write(&file, "{\"ordinal\":7,\"rule\":null,\"source\":\"web\",\"mark\":\"keep\"}\n").unwrap();
    let output = fulgurite().arg("review").arg(&run).arg("--summary").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("earlier version") && said.contains("ordinal = 7"), "{said}");
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
    let output = succeed(train(&corpus.join("docs.jsonl.gz")).args(["--max-examples", "60"]));
    let fewer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(fewer["trained"].as_u64().unwrap() + fewer["held_out"].as_u64().unwrap(), 120, "{fewer}");
    // A tenth, although far more prose is there than is kept.
    assert!((4..=24).contains(&fewer["held_out"].as_u64().unwrap()), "{fewer}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("60 of 342 positive examples are used"), "{said}");
    succeed(&mut train(&corpus.join("docs.jsonl.gz")));

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
