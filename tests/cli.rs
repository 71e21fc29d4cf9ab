//! The contract of the command line: exit codes, streams, errors that help.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use support::{fulgurite, small_recipe, succeed};

fn failure(args: &[&str]) -> (i32, String) {
    let output = fulgurite().args(args).output().unwrap();
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn wrong_usage_is_two() {
    let (code, text) = failure(&["run"]);
    assert_eq!(code, 2, "{text}");
    let (code, text) = failure(&["run", "no-such-recipe.toml"]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("no-such-recipe.toml"), "{text}");
    // A path that is not there is wrong usage whatever the command.
    let missing = "/nonexistent-path";
    for args in [
        &["status", missing][..],
        &["report", missing],
        &["sql", missing, "select 1"],
        &["inspect", missing],
        &["export", missing, "/tmp"],
        &["generate", "--prompt", "x", "--checkpoint", missing],
        &["evaluate", "--ids", "Cargo.toml", "--model", missing],
    ] {
        let (code, text) = failure(args);
        assert_eq!(code, 2, "{args:?}: {text}");
        assert!(text.contains(missing), "{args:?}: {text}");
    }
}

#[test]
fn errors_are_json_where_logs_are() {
    for args in [&["--log-format", "json", "status", "/nonexistent-path"][..], &["run", "--log-format=json"]] {
        let (code, text) = failure(args);
        assert_eq!(code, 2, "{text}");
        let record: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(record["level"], "ERROR");
        assert!(!record["fields"]["message"].as_str().unwrap().is_empty(), "{text}");
    }
}

#[test]
fn what_a_recipe_cannot_mean_is_refused_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = small_recipe(dir.path());
    let good = std::fs::read_to_string(&path).unwrap();
    let run = dir.path().join("run");
    for (from, to, line) in [
        ("split_bytes = 60000", "split_bytes = 0", "split_bytes = 0"),
        ("paths = [\"docs.jsonl.gz\"]", "paths = [\"dogs.jsonl.gz\"]", "paths = [\"dogs.jsonl.gz\"]"),
        ("[\"gopher_quality\"]", "[\"gofer\"]", "profiles = [\"gofer\"]"),
        ("[near]", "[near]\nbands = 0", "bands = 0"),
        ("vocab_size = 512", "vocab_size = 5", "vocab_size = 5"),
        ("steps = 24", "steps = 2", "warmup_steps = 4"),
        ("decoder_attention_heads = 2", "decoder_attention_heads = 5", "decoder_embed_dim = 32"),
    ] {
        assert!(good.contains(from), "{from}");
        std::fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let (code, text) =
            failure(&["run", path.to_str().unwrap(), "--run-dir", run.to_str().unwrap(), "--device", "cpu"]);
        assert_eq!(code, 2, "{text}");
        if line != "decoder_embed_dim = 32" {
            assert!(text.contains(&format!(" | {line}\n")), "{to}: {text}");
        } else {
            assert!(text.contains("line ") && text.contains("train.model"), "{to}: {text}");
        }
        assert!(!run.join("ingest/journal.jsonl").exists(), "{to}: found out after work was done");
    }
}

#[test]
fn a_corpus_of_which_nothing_is_left_is_told_before_tokenizing() {
    let dir = tempfile::tempdir().unwrap();
    let path = small_recipe(dir.path());
    let run = dir.path().join("run");
    let set = "filter.rules=[{name=\"all\", drop_when=\"word_count >= 0\"}]";
    let (code, text) =
        failure(&["run", "-q", path.to_str().unwrap(), "--run-dir", run.to_str().unwrap(), "--set", set]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("no document is left to tokenize") && text.contains("fulgurite report"), "{text}");
}

#[test]
fn a_recipe_with_an_unknown_key_is_refused_with_line_and_suggestion() {
    let dir = tempfile::tempdir().unwrap();
    let path = small_recipe(dir.path());
    let text = std::fs::read_to_string(&path).unwrap().replace("split_bytes", "split_byte");
    std::fs::write(&path, text).unwrap();
    let (code, text) = failure(&["run", path.to_str().unwrap(), "--dry-run"]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("line 7") && text.contains("did you mean `split_bytes`?"), "{text}");
}

#[test]
fn an_unknown_signal_in_a_rule_is_refused_before_work_starts() {
    let dir = tempfile::tempdir().unwrap();
    let path = small_recipe(dir.path());
    let run = dir.path().join("run");
    let set = "filter.rules=[{name=\"a\", drop_when=\"word_cont < 3\"}]";
    let (code, text) = failure(&["run", path.to_str().unwrap(), "--run-dir", run.to_str().unwrap(), "--set", set]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("word_cont") && text.contains("word_count"), "{text}");
    assert!(!run.join("ingest").exists());
}

#[test]
fn dry_run_lists_every_stage_and_does_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = small_recipe(dir.path());
    let run = dir.path().join("run");
    let output = succeed(fulgurite().arg("run").arg(&path).arg("--run-dir").arg(&run).args(["--dry-run", "--json"]));
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let stages: Vec<&str> = plan["stages"].as_array().unwrap().iter().map(|s| s["stage"].as_str().unwrap()).collect();
    for stage in ["ingest", "signals", "filter", "exact", "near", "curate", "tokenizer", "tokens", "train"] {
        assert!(stages.contains(&stage), "{stage} in {stages:?}");
    }
    assert!(plan["stages"].as_array().unwrap().iter().all(|s| s["status"] == "fresh"));
    assert!(!run.exists());

    // Nor does it touch a run that is there, even one that a process works in.
    succeed(fulgurite().args(["run", "-q", "--until", "ingest", "--run-dir"]).arg(&run).arg(&path));
    std::fs::remove_dir_all(run.join("spill")).unwrap();
    let lock = std::fs::File::options().write(true).open(run.join("lock")).unwrap();
    lock.lock().unwrap();
    let before = std::fs::metadata(run.join("lock")).unwrap().modified().unwrap();
    let output = succeed(fulgurite().args(["run", "--dry-run", "--run-dir"]).arg(&run).arg(&path));
    assert!(String::from_utf8_lossy(&output.stdout).contains("done: "));
    assert_eq!(std::fs::metadata(run.join("lock")).unwrap().modified().unwrap(), before);
    assert!(!run.join("spill").exists());
}

#[test]
fn status_tells_what_is_outdated_and_what_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let path = small_recipe(dir.path());
    let run_dir = dir.path().join("run");
    let run = |until: &str, set: &[&str]| {
        let mut command = fulgurite();
        command.args(["run", "-q", "--until", until, "--run-dir"]).arg(&run_dir).arg(&path).args(set);
        command
    };
    let status = || -> Vec<(String, Option<String>)> {
        let output = succeed(fulgurite().arg("status").arg(&run_dir).arg("--json"));
        let stages: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let stage = |s: &serde_json::Value| {
            (s["stage"].as_str().unwrap().to_string(), s["outdated"].as_str().map(str::to_string))
        };
        stages.as_array().unwrap().iter().map(stage).collect()
    };
    succeed(&mut run("curate", &[]));
    assert!(status().iter().all(|(_, outdated)| outdated.is_none()), "{:?}", status());
    succeed(&mut run("filter", &["--set", "filter.profiles=[\"fineweb\"]"]));
    let outdated = status();
    let of = |name: &str| outdated.iter().find(|(stage, _)| stage == name).unwrap().1.clone();
    assert_eq!((of("ingest"), of("signals"), of("filter")), (None, None, None));
    assert_eq!(of("exact_hashes").unwrap(), "its input filter was made again since");
    assert!(of("curate").unwrap().ends_with("is outdated"), "{outdated:?}");

    let manifest = run_dir.join("signals/manifest.json");
    std::fs::write(&manifest, "{").unwrap();
    let table = String::from_utf8(succeed(fulgurite().arg("status").arg(&run_dir)).stdout).unwrap();
    assert!(table.contains("signals: manifest.json is damaged"), "{table}");
    let refused = run("curate", &[]).output().unwrap();
    let text = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert!(text.contains("signals/manifest.json") && text.contains("remove"), "{text}");
    std::fs::remove_dir_all(run_dir.join("signals")).unwrap();
    succeed(&mut run("curate", &[]));
    assert!(status().iter().all(|(_, outdated)| outdated.is_none()), "{:?}", status());
}

#[test]
fn a_recipe_beside_the_caller_runs_and_foreign_directories_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let inputs = dir.path().join("inputs");
    let work = dir.path().join("work");
    std::fs::create_dir(&inputs).unwrap();
    std::fs::create_dir_all(work.join("taken/ingest")).unwrap();
    std::fs::write(inputs.join("a.txt"), "One text.").unwrap();
    std::fs::write(work.join("taken/ingest/thesis.txt"), "mine").unwrap();
    let recipe = "name = \"r\"\n[ingest]\n[[ingest.inputs]]\nsource = \"a\"\npaths = [\"../inputs/*.txt\"]\n";
    std::fs::write(work.join("r.toml"), recipe).unwrap();
    succeed(fulgurite().current_dir(&work).args(["run", "-q", "r.toml"]));
    assert!(work.join("runs/r/curate/part-00000.parquet").exists());
    let refused = fulgurite().current_dir(&work).args(["run", "-q", "r.toml", "--run-dir", "taken"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(work.join("taken/ingest/thesis.txt").exists());
}

#[test]
fn version_names_the_commit_and_completions_complete() {
    let version = String::from_utf8(succeed(fulgurite().arg("--version")).stdout).unwrap();
    assert!(version.starts_with("fulgurite 0."), "{version}");
    for shell in ["bash", "zsh", "fish"] {
        let script = String::from_utf8(succeed(fulgurite().args(["completions", shell])).stdout).unwrap();
        assert!(script.contains("--dry-run") || script.contains("dry-run"), "{shell}");
    }
}

#[test]
fn sigterm_stops_after_a_commit_with_143() {
    let dir = tempfile::tempdir().unwrap();
    let path = small_recipe(dir.path());
    let run = dir.path().join("run");
    let mut child = fulgurite()
        .args(["run", "-q", "--device", "cpu", "--set", "train.steps=100000", "--run-dir"])
        .arg(&run)
        .arg(&path)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = run.join("train/metrics.jsonl");
    let started = std::time::Instant::now();
    while !metrics.exists() || std::fs::metadata(&metrics).unwrap().len() == 0 {
        assert!(child.try_wait().unwrap().is_none(), "the run ended early");
        assert!(started.elapsed().as_secs() < 300, "training did not start");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let status = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("run the same command again"));
    let status = succeed(fulgurite().arg("status").arg(&run).arg("--json"));
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    let train = status.as_array().unwrap().iter().find(|s| s["stage"] == "train").unwrap();
    assert_eq!(train["state"], "running");
}
