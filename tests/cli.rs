//! The contract of the command line: exit codes, streams, errors that help.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use support::{fulgurite, nothing_was_done_twice, outputs, root, small_recipe, succeed};

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
    // So is a device that is not there; the model is not read.
    let model = tempfile::tempdir().unwrap();
    for name in ["model.safetensors", "tokenizer.json"] {
        std::fs::write(model.path().join(name), "").unwrap();
    }
    let path = model.path().to_str().unwrap();
    let (code, text) = failure(&["generate", "--prompt", "x", "--device", "cuda:9", "--checkpoint", path]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("device cuda:9"), "{text}");
}

#[test]
fn an_argument_that_is_not_utf_8_is_no_panic() {
    let odd = OsStr::from_bytes(b"odd-\xff");
    let refused = fulgurite().arg(odd).output().unwrap();
    let text = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{text}");
    let dir = tempfile::tempdir().unwrap();
    let path = small_recipe(dir.path());
    let mut command = fulgurite();
    command.arg("run").arg(&path).args(["--dry-run", "--json", "--run-dir"]).arg(dir.path().join(odd));
    let plan: serde_json::Value = serde_json::from_slice(&succeed(&mut command).stdout).unwrap();
    assert!(plan["run_dir"].as_str().unwrap().ends_with("odd-\u{fffd}"), "{plan}");
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
        ("[exact]", "[exact]\nby = [{ sql = \"lenght(url)\" }]", "by = [{ sql = \"lenght(url)\" }]"),
        ("[exact]", "[exact]\nkeep = { lowest = \"nothing\" }", "keep = { lowest = \"nothing\" }"),
        ("[near]", "[near]\nkeep = { highest = \"word_cont\" }", "keep = { highest = \"word_cont\" }"),
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
    // Signals can decide which copy survives.
    std::fs::write(&path, good).unwrap();
    let sets = ["--set", "exact.keep={ highest = \"word_count\" }", "--set", "near.keep={ lowest = \"hash_ratio\" }"];
    succeed(fulgurite().arg("run").arg(&path).args(sets).arg("--dry-run"));
}

#[test]
fn until_names_a_stage_and_cuts_the_plan() {
    let dir = tempfile::tempdir().unwrap();
    let path = small_recipe(dir.path());
    let run = dir.path().join("run");
    let (recipe, run_dir) = (path.to_str().unwrap(), run.to_str().unwrap());
    for more in [None, Some("--dry-run")] {
        let mut args = vec!["run", recipe, "--run-dir", run_dir, "--until", "nothing"];
        args.extend(more);
        let (code, text) = failure(&args);
        assert_eq!(code, 2, "{text}");
        assert!(text.contains("no stage is called nothing; there are ingest, signals"), "{text}");
        assert!(!run.exists(), "{more:?}");
    }
    let output =
        succeed(fulgurite().args(["run", recipe, "--run-dir", run_dir, "--dry-run", "--json", "--until", "filter"]));
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let stages: Vec<&str> = plan["stages"].as_array().unwrap().iter().map(|s| s["stage"].as_str().unwrap()).collect();
    assert_eq!(stages, ["ingest", "signals", "filter"]);
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
    let head = Command::new("git").args(["rev-parse", "HEAD"]).current_dir(root()).output();
    if root().join(".git").exists() && head.is_ok_and(|output| output.status.success()) {
        let commit = version.trim_end().strip_suffix(')').and_then(|text| Some(text.split_once(" (")?.1)).unwrap();
        assert!(commit.len() >= 10 && commit.bytes().all(|b| b.is_ascii_hexdigit()), "{version}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = String::from_utf8(succeed(fulgurite().args(["completions", shell])).stdout).unwrap();
        assert!(script.contains("--dry-run") || script.contains("dry-run"), "{shell}");
    }
}

#[test]
fn verbosity_and_rust_log_choose_what_is_logged() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.txt"), "One text.").unwrap();
    let recipe = dir.path().join("r.toml");
    std::fs::write(&recipe, "name = \"r\"\n[ingest]\n[[ingest.inputs]]\nsource = \"a\"\npaths = [\"a.txt\"]\n")
        .unwrap();
    // What the query engine says of its plans.
    let says_debug = |more: &[&str], rust_log: Option<&str>| {
        let run = tempfile::tempdir().unwrap();
        let mut command = fulgurite();
        command.arg("run").arg(&recipe).arg("--run-dir").arg(run.path()).args(more);
        command.envs(rust_log.map(|level| ("RUST_LOG", level)));
        String::from_utf8(succeed(&mut command).stderr).unwrap().contains("DEBUG datafusion")
    };
    assert!(!says_debug(&[], None));
    assert!(!says_debug(&["-v"], None));
    assert!(says_debug(&["-vvv"], None));
    assert!(says_debug(&[], Some("debug")));
    assert!(!says_debug(&["-vvv"], Some("error")));
}

/// Starts `command`, sends it `signal` once `begun` has something in it, and waits for its end.
fn interrupted(command: &mut Command, signal: &str, begun: &Path) -> Output {
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while std::fs::metadata(begun).map_or(0, |file| file.len()) == 0 {
        assert!(child.try_wait().unwrap().is_none(), "the run ended early");
        assert!(started.elapsed().as_secs() < 300, "{} did not come", begun.display());
        std::thread::sleep(Duration::from_millis(5));
    }
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    child.wait_with_output().unwrap()
}

#[test]
fn sigterm_stops_after_a_commit_with_143() {
    let dir = tempfile::tempdir().unwrap();
    let path = small_recipe(dir.path());
    let run = dir.path().join("run");
    let mut command = fulgurite();
    command.args(["run", "-q", "--device", "cpu", "--set", "train.steps=100000", "--run-dir"]).arg(&run).arg(&path);
    let output = interrupted(&mut command, "-TERM", &run.join("train/metrics.jsonl"));
    assert_eq!(output.status.code(), Some(143), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("run the same command again"));
    let status = succeed(fulgurite().arg("status").arg(&run).arg("--json"));
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    let train = status.as_array().unwrap().iter().find(|s| s["stage"] == "train").unwrap();
    assert_eq!(train["state"], "running");
}

#[test]
fn sigint_stops_curation_with_130_and_what_is_committed_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = small_recipe(dir.path());
    let near = |run: &Path| {
        let mut command = fulgurite();
        command.args(["run", "-q", "--threads", "2", "--until", "near", "--run-dir"]).arg(run).arg(&path);
        command
    };
    let run = dir.path().join("run");
    let output = interrupted(&mut near(&run), "-INT", &run.join("ingest/journal.jsonl"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(text.contains("run the same command again"), "{text}");
    let (committed, faults) = pipeline::Journal::inspect(&run.join("ingest")).unwrap();
    assert!(!committed.is_empty() && faults.is_empty(), "{faults:?}");
    let plan = succeed(near(&run).arg("--dry-run"));
    let plan = String::from_utf8(plan.stdout).unwrap();
    assert!(plan.contains("fresh") && !plan.contains("missing") && !plan.contains("checksum"), "{plan}");
    succeed(&mut near(&run));
    nothing_was_done_twice(&run);
    let whole = dir.path().join("whole");
    succeed(&mut near(&whole));
    assert_eq!(outputs(&run), outputs(&whole));
}
