//! Tokens from the command line: a tokenizer trained alone, shards looked into, figures of a run, a shuffle that is
//! killed.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use support::{fulgurite, is_done, nothing_was_done_twice, outputs, small_recipe, succeed};

/// Tasks of a stage that are committed.
fn committed(run: &Path, stage: &str) -> usize {
    let journal = std::fs::read(run.join(stage).join("journal.jsonl"));
    journal.map_or(0, |bytes| bytes.iter().filter(|&&byte| byte == b'\n').count())
}

/// Run a command and kill it when it has committed two tasks more of a stage; whether that was before the last of them.
fn is_killed_within(command: &mut Command, run: &Path, stage: &str) -> bool {
    let before = committed(run, stage);
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    while committed(run, stage) < before + 2 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(200));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    !is_done(run, stage)
}

#[test]
fn killed_in_both_passes_of_the_shuffle_the_token_shards_are_those_of_a_whole_run() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = small_recipe(dir.path());
    let run = |run: &Path, threads: u32, until: &str| {
        let mut command = fulgurite();
        command.args(["run", "-q", "--set", "ingest.split_bytes=15000", "--set", "tokenize.shard_tokens=15000"]);
        command.args(["--until", until, "--run-dir"]).arg(run);
        command.args(["--threads", &threads.to_string()]).arg(&recipe);
        command
    };
    let whole = dir.path().join("whole");
    succeed(&mut run(&whole, 1, "token_statistics"));
    let expected = outputs(&whole);
    for stage in ["encoded", "tokens", "tokens_validation", "token_statistics"] {
        assert!(expected.keys().any(|path| path.starts_with(stage)), "{stage} has no files");
    }
    for threads in [1, 3] {
        let killed = dir.path().join(format!("killed-{threads}"));
        succeed(&mut run(&killed, threads, "tokenizer"));
        for pass in ["encoded", "tokens"] {
            let mut kills = 0;
            while is_killed_within(&mut run(&killed, threads, pass), &killed, pass) {
                kills += 1;
            }
            println!("{threads} threads: killed {kills} times within {pass}, of {} tasks", committed(&killed, pass));
            assert!(kills >= 2, "the kills came too late to say much");
        }
        succeed(&mut run(&killed, threads, "token_statistics"));
        nothing_was_done_twice(&killed);
        assert_eq!(outputs(&killed), expected, "{threads} threads");
    }
}

#[test]
fn a_tokenizer_is_trained_shards_are_shown_and_figures_add_up() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = small_recipe(dir.path());
    let run = dir.path().join("run");
    let json = dir.path().join("tokenizer.json");
    let train = |output: &Path| {
        let mut command = fulgurite();
        command.args(["tokenizer", "train"]).arg(&recipe).arg("--run-dir").arg(&run).arg("--output").arg(output);
        succeed(&mut command)
    };
    let said = String::from_utf8(train(&json).stdout).unwrap();
    assert!(said.contains("tokenizer.json"), "{said}");
    assert!(!run.join("encoded").exists());
    let encoder = tokenize::Encoder::load(&json).unwrap();
    assert_eq!(encoder.vocabulary_size(), 512);
    // Again: nothing to do, the same file.
    let again = dir.path().join("again.json");
    train(&again);
    assert_eq!(std::fs::read(&again).unwrap(), std::fs::read(&json).unwrap());

    // The run goes on from there.
    succeed(fulgurite().arg("run").arg(&recipe).arg("--run-dir").arg(&run).args(["--until", "token_statistics"]));
    let shard = run.join("tokens/part-00000.parquet");
    let shown = |args: &[&str]| {
        String::from_utf8(succeed(fulgurite().args(["inspect", "tokens"]).arg(&shard).args(args)).stdout).unwrap()
    };
    let documents: Vec<serde_json::Value> = shown(&["--json", "--rows", "3", "--tokens", "100000"])
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(documents.len(), 3);
    for document in &documents {
        let pieces: Vec<&str> = document["pieces"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
        assert_eq!(pieces.len() as u64, document["tokens"].as_u64().unwrap());
        assert_eq!(*pieces.last().unwrap(), "<|endoftext|>");
        // Piece by piece it is the text.
        let ids: Vec<u32> = document["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let text = encoder.decode(&ids[..ids.len() - 1]).unwrap();
        assert_eq!(text.len() as u64, document["bytes"].as_u64().unwrap());
        let ascii = |text: &str| text.chars().filter(char::is_ascii_alphanumeric).collect::<String>();
        let in_pieces = pieces[..pieces.len() - 1].concat();
        if text.is_ascii() {
            assert_eq!(ascii(&in_pieces), ascii(&text));
        }
    }
    let table = shown(&["--rows", "1", "--tokens", "10"]);
    assert!(
        table.contains("vocabulary 512") && table.lines().any(|l| l.starts_with('│') && l.contains("… ")),
        "{table}"
    );
    // The tokenizer of another run is refused.
    let other = dir.path().join("other.json");
    let changed = std::fs::read_to_string(&json).unwrap().replace("<|pad|>", "<|PAD|>");
    std::fs::write(&other, changed).unwrap();
    let output = fulgurite().args(["inspect", "tokens"]).arg(&shard).arg("--tokenizer").arg(&other).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("other.json") && error.contains("--tokenizer"), "{error}");

    let stats = |args: &[&str]| succeed(fulgurite().args(["stats", "tokens"]).arg(&run).args(args)).stdout;
    let facts: serde_json::Value = serde_json::from_slice(&stats(&["--json", "--sequence-length", "64"])).unwrap();
    let train = &facts["statistics"]["train"];
    let sources = train["sources"].as_object().unwrap();
    for what in ["documents", "tokens", "bytes"] {
        let sum: u64 = sources.values().map(|source| source[what].as_u64().unwrap()).sum();
        assert_eq!(sum, train[what].as_u64().unwrap());
    }
    assert!(sources.values().all(|source| source["bytes_per_token"].as_f64().unwrap() > 1.0));
    assert_eq!(facts["packing"][0]["padding"], 0.0);
    assert!(facts["packing"][1]["padding"].as_f64().unwrap() > 0.0);
    let text = String::from_utf8(stats(&[])).unwrap();
    assert!(text.contains("bytes/token") && text.contains("held out") && text.contains("best fit"), "{text}");
    // Fertility by source is in the manifest of the stage that sums it up.
    let manifest = std::fs::read_to_string(run.join("token_statistics/manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    for (source, counts) in sources {
        assert_eq!(manifest["notes"]["train"]["sources"][source]["bytes_per_token"], counts["bytes_per_token"]);
    }
}

#[test]
fn what_cannot_be_trained_or_shown_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = small_recipe(dir.path());
    let text = std::fs::read_to_string(&recipe).unwrap();
    let bare = dir.path().join("bare.toml");
    std::fs::write(&bare, &text[..text.find("[tokenize]").unwrap()]).unwrap();
    let fails = |args: &[&str]| {
        let output = fulgurite().args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stderr).unwrap()
    };
    let run = dir.path().join("run");
    let (bare, run) = (bare.to_str().unwrap(), run.to_str().unwrap());
    assert!(fails(&["tokenizer", "train", bare, "--run-dir", run]).contains("[tokenize]"));
    assert!(fails(&["tokenizer", "train", bare, "--run-dir", run, "--until", "ingest"]).contains("--until"));
    assert!(fails(&["inspect"]).contains("PATH"));
}
