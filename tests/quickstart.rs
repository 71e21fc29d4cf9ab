//! The whole path on the quickstart's own recipe (with few training steps), and what can be done with the
//! result.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::path::Path;

use support::{fulgurite, root, small_recipe, succeed};

fn json(output: std::process::Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn raw_files_become_a_model_that_can_be_used() {
    let work = tempfile::tempdir().unwrap();
    let run = work.path().join("run");
    let recipe = root().join("configs/quickstart.toml");
    let output = succeed(
        fulgurite()
            .args(["run", "--device", "cpu", "--json", "--set", "train.steps=24", "--set", "train.batch=2"])
            .args(["--set", "train.evaluation.every_steps=0", "--set", "sample.max_tokens=8", "--run-dir"])
            .arg(&run)
            .arg(&recipe),
    );
    let progress = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(progress.contains("ingest") && !progress.contains('\x1b'), "{progress}");
    let result = json(output);
    let stages = result["stages"].as_array().unwrap();
    let totals = |name: &str| &stages.iter().find(|s| s["stage"] == name).unwrap()["totals"];
    let count = |name: &str, what: &str| totals(name)[what].as_u64().unwrap();
    assert!(stages.iter().all(|s| s["state"] == "done"));
    for stage in ["ingest", "filter", "exact", "near"] {
        let dropped: u64 = totals(stage)["dropped"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
        assert!(dropped > 0 || stage == "ingest", "{stage} dropped nothing");
        assert_eq!(count(stage, "rows_read"), count(stage, "rows_kept") + dropped, "{stage}");
    }
    assert_eq!(count("curate", "rows_kept"), count("near", "rows_kept"));
    assert_eq!(result["samples"].as_array().unwrap().len(), 2);
    let resolved = std::fs::read_to_string(run.join("recipe.toml")).unwrap();
    assert!(resolved.contains("max_record_bytes") && resolved.contains("steps = 24"), "{resolved}");

    questions_have_answers(&run, count("curate", "rows_kept"));
    a_checkpoint_exports_evaluates_and_generates(&run, work.path());
}

fn questions_have_answers(run: &Path, curated: u64) {
    let sql = |query: &str| {
        let text = String::from_utf8(succeed(fulgurite().arg("sql").arg(run).args([query, "--json"])).stdout).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap()).collect::<Vec<serde_json::Value>>()
    };
    assert_eq!(sql("select count(*) as n from curate")[0]["n"], curated);
    let documents = sql("select count(*) as n from tokens_validation")[0]["n"].as_u64().unwrap();
    assert_eq!(sql("select count(*) as n from tokens")[0]["n"].as_u64().unwrap() + documents, curated);
    let joined = "select count(*) as n from filter_dropped d join signals s on d.ordinal = s.ordinal join ingest i on i.ordinal = d.ordinal";
    assert_eq!(sql(joined)[0]["n"], sql("select count(*) as n from filter_dropped")[0]["n"]);
    // The tables agree with the rules: no kept document is below a threshold of its profile.
    let kept = "select min(word_count) as words from signals s join filter f on s.ordinal = f.ordinal";
    assert!(sql(kept)[0]["words"].as_u64().unwrap() >= 50);
    // Every survivor of a duplicate is a document that was not itself dropped as one.
    let orphans = "select count(*) as n from exact_dropped d where d.survivor in (select ordinal from exact_dropped)";
    assert_eq!(sql(orphans)[0]["n"], 0);
    let tables = String::from_utf8(succeed(fulgurite().arg("sql").arg(run).arg("--json")).stdout).unwrap();
    let tables: Vec<serde_json::Value> = tables.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let selection = tables.iter().find(|t| t["table"] == "near").unwrap();
    assert_eq!(selection["columns"], serde_json::json!(["id", "ordinal"]));
    let error = fulgurite().arg("sql").arg(run).arg("select * from nothing").output().unwrap();
    assert_eq!(error.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&error.stderr).contains("tables: ingest"));

    let report = json(succeed(fulgurite().arg("report").arg(run).arg("--json")));
    let stages: Vec<&str> = report["rules"].as_array().unwrap().iter().map(|r| r["stage"].as_str().unwrap()).collect();
    assert!(["filter", "exact", "near"].iter().all(|s| stages.contains(s)), "{stages:?}");
    let report = String::from_utf8(succeed(fulgurite().arg("report").arg(run)).stdout).unwrap();
    assert!(report.contains("near_duplicate"), "{report}");

    for (path, key) in
        [("curate/part-00000.parquet", "rows"), ("near/manifest.json", "fingerprint"), ("train", "fingerprint")]
    {
        let facts = json(succeed(fulgurite().arg("inspect").arg(run.join(path)).arg("--json")));
        assert!(!facts[key].is_null(), "{path}: {facts}");
    }
    let shard = succeed(fulgurite().arg("inspect").arg(run.join("curate/part-00000.parquet")).args(["--rows", "1"]));
    let shard = String::from_utf8(shard.stdout).unwrap();
    assert!(shard.contains("row 0") && shard.contains("source:"), "{shard}");
    let status = String::from_utf8(succeed(fulgurite().arg("status").arg(run)).stdout).unwrap();
    assert!(status.lines().count() > 10 && !status.contains("unfinished"), "{status}");
}

fn a_checkpoint_exports_evaluates_and_generates(run: &Path, work: &Path) {
    let exported = work.join("exported");
    succeed(fulgurite().arg("export").arg(run.join("train")).arg(&exported));
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(exported.join(name).exists(), "{name}");
    }
    let ids = work.join("ids.json");
    std::fs::write(&ids, "[[5, 6, 7, 8, 9, 10], [300, 400, 301], [7]]").unwrap();
    let evaluate = |model: &Path| {
        json(succeed(fulgurite().arg("evaluate").arg("--model").arg(model).arg("--ids").arg(&ids).arg("--json")))
    };
    let loss = evaluate(&exported);
    assert_eq!(loss["tokens"], 7);
    let value = loss["loss"].as_f64().unwrap();
    assert!(value.is_finite() && value > 0.0, "{loss}");
    let checkpoints = run.join("train/checkpoints");
    assert_eq!(loss, evaluate(&checkpoints));
    assert_eq!(loss, evaluate(&run.join("train/model")));
    let facts = json(succeed(fulgurite().arg("inspect").arg(&checkpoints).arg("--json")));
    assert_eq!(facts["facts"]["step"], 24, "{facts}");

    let generate = |extra: &[&str]| {
        let mut command = fulgurite();
        command
            .arg("generate")
            .arg("--checkpoint")
            .arg(&exported)
            .args(["--prompt", "The sea", "--max-tokens", "12"])
            .args(extra);
        String::from_utf8(succeed(&mut command).stdout).unwrap()
    };
    let text = generate(&["--seed", "5"]);
    assert!(text.starts_with("The sea") && text.ends_with('\n'), "{text}");
    assert_eq!(text, generate(&["--seed", "5"]));
    let streamed = generate(&["--temperature", "0"]);
    let whole: serde_json::Value = serde_json::from_str(&generate(&["--temperature", "0", "--json"])).unwrap();
    assert_eq!(streamed, format!("The sea{}\n", whole["text"].as_str().unwrap()));
    assert_eq!(streamed, generate(&["--top-k", "1"]));

    // What no model can be asked for is wrong usage.
    for (wrong, key) in [("--temperature=-1", "temperature"), ("--top-p=0", "top_p")] {
        let mut command = fulgurite();
        let refused =
            command.args(["generate", "--prompt", "x", wrong, "--checkpoint"]).arg(&exported).output().unwrap();
        let text = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{wrong}: {text}");
        assert!(text.contains(key), "{wrong}: {text}");
    }

    let weights = checkpoints.join("step-000024/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let damaged = fulgurite().args(["generate", "--prompt", "x", "--checkpoint"]).arg(&checkpoints).output().unwrap();
    assert_eq!(damaged.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&damaged.stderr).contains("checksum"));

    let wrong = fulgurite().args(["generate", "--prompt", "x", "--checkpoint"]).arg(work).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    let missing = work.join("no.json");
    let wrong = fulgurite().arg("evaluate").arg("--model").arg(&exported).arg("--ids").arg(&missing).output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn a_trained_model_knows_more_than_how_often_each_token_is() {
    let work = tempfile::tempdir().unwrap();
    let run = work.path().join("run");
    let mut command = fulgurite();
    command.args(["run", "-q", "--device", "cpu", "--run-dir"]).arg(&run).arg(small_recipe(work.path()));
    for set in [
        "train.steps=250",
        "train.batch=16",
        "train.sequence_length=64",
        "train.checkpoint_every_steps=250",
        "train.evaluation.every_steps=0",
        "train.schedule.warmup_steps=20",
        "train.optimizer.peak_learning_rate=3e-3",
        "train.model.decoder_embed_dim=64",
    ] {
        command.args(["--set", set]);
    }
    succeed(&mut command);
    let manifest = std::fs::read(run.join("train/manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let note = |name: &str| manifest["notes"][name].as_f64().unwrap();
    let (loss, entropy) = (note("loss"), note("unigram_entropy"));
    assert!(loss > 0.0 && loss < entropy, "loss {loss}, unigram entropy {entropy}");
}
