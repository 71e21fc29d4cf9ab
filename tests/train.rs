//! `fulgurite train`: a job of its own on the token shards of a run, and what is asked before one.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use support::{fulgurite, job, json_lines as lines, refused, root, said, small_job, small_tokens, succeed};

/// A run with token shards, and the settings of a job on them that takes a second.
fn prepared(dir: &Path) -> (PathBuf, PathBuf) {
    let run = small_tokens(dir, &[]);
    let keys = r#"batch = 2
steps = 40
log_every_steps = 1
checkpoint_every_steps = 4
keep_checkpoints = 1
keep_checkpoint_every_steps = 20"#;
    let evaluation = r#"[train.evaluation]
every_steps = 20
sequences = 4
prompts = ["The sea", ""]
sample_tokens = 4"#;
    let settings = small_job(dir, &run, keys, evaluation);
    (run, settings)
}

/// Step, loss and held-out loss of every line.
fn curve(directory: &Path) -> Vec<String> {
    let of = |line: &serde_json::Value| format!("{} {} {}", line["step"], line["loss"], line["held_out_loss"]);
    lines(&directory.join("metrics.jsonl")).iter().map(of).collect()
}

#[test]
fn a_job_that_is_killed_goes_on_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (run, settings) = prepared(dir.path());
    let whole = dir.path().join("whole");
    let output = succeed(&mut job(&settings, &whole, &[]));
    let checkpoint = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    assert!(checkpoint.ends_with("checkpoints/step-000040"), "{}", checkpoint.display());
    let metrics = lines(&whole.join("metrics.jsonl"));
    assert_eq!(metrics.len(), 40);
    assert!(metrics.iter().all(|line| line["bits_per_byte"].is_number() && line["time"]["step_ms"].is_number()));
    assert!(metrics[19]["held_out_loss"].is_number() && metrics[18]["held_out_loss"].is_null());
    // Two prompts after 20 and after 40 steps.
    let samples = lines(&whole.join("samples.jsonl"));
    assert_eq!(samples.len(), 4, "{samples:?}");
    // The newest, and those of every 20th step.
    let mut kept: Vec<_> = std::fs::read_dir(whole.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    kept.sort();
    assert_eq!(kept, ["step-000020", "step-000040"]);

    let cut = dir.path().join("cut");
    for lines_before in [3, 11, 27] {
        let mut child = job(&settings, &cut, &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let started = Instant::now();
        while lines(&cut.join("metrics.jsonl")).len() < lines_before && child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < Duration::from_secs(120), "no line {lines_before}");
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    // The stage itself by its own name gives the same job.
    let tokens = format!("tokens={:?}", run.join("tokens"));
    succeed(&mut job(&settings, &cut, &[&tokens]));
    assert_eq!(curve(&cut), curve(&whole));
    assert_eq!(lines(&cut.join("samples.jsonl")), samples);
    for name in ["model.safetensors", "optimizer.safetensors", "tokenizer.json"] {
        let read = |directory: &Path| std::fs::read(directory.join("checkpoints/step-000040").join(name)).unwrap();
        assert!(read(&cut) == read(&whole), "{name}");
    }
    // Finished: nothing to do.
    succeed(&mut job(&settings, &cut, &[]));
    assert_eq!(curve(&cut), curve(&whole));
    // More steps, and a word about what is not as it was.
    let output = succeed(&mut job(&settings, &cut, &["train.steps=44", "train.optimizer.weight_decay=0.2"]));
    let text = said(&output);
    assert!(text.contains("optimizer.weight_decay was changed from 0.1 to 0.2"), "{text}");
    assert_eq!(curve(&cut).len(), 44);
}

#[test]
fn what_a_job_cannot_start_with_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (run, settings) = prepared(dir.path());
    let directory = dir.path().join("a");
    let refuse = |set: &[&str], code: i32, words: &str| {
        let text = refused(&mut job(&settings, &directory, set), code);
        assert!(text.contains(words), "{set:?}: {text}");
    };
    refuse(&["name=../x"], 2, "cannot be in the name");
    refuse(&["tokens=/nonexistent-path"], 2, "no directory of a run");
    refuse(&["train.model.vocab_size=100"], 2, "less than the tokenizer's 512");
    refuse(&["train.precision=bf16"], 2, "bf16 needs a CUDA device");
    refuse(&["train.optimizer.moments=bf16"], 2, "optimizer.moments");
    // Weights without bounds: every gradient is no number, and a few of these in a row end the run.
    let wild = ["train.model.init_std=1e30", "train.max_skipped_steps=3"];
    refuse(&wild, 1, "steps in a row was no number");
    std::fs::remove_dir_all(&directory).unwrap();

    // A stage that is not done, and a journal that lost a line.
    let tokens = run.join("tokens");
    let manifest = std::fs::read_to_string(tokens.join("manifest.json")).unwrap();
    assert!(manifest.contains("\"done\""), "{manifest}");
    std::fs::write(tokens.join("manifest.json"), manifest.replace("\"done\"", "\"running\"")).unwrap();
    refuse(&[], 1, "is not done");
    std::fs::write(tokens.join("manifest.json"), &manifest).unwrap();
    let journal = std::fs::read_to_string(tokens.join("journal.jsonl")).unwrap();
    std::fs::write(tokens.join("journal.jsonl"), &journal[1..]).unwrap();
    refuse(&[], 1, "journal.jsonl");
    std::fs::write(tokens.join("journal.jsonl"), &journal).unwrap();

    // Two processes never work in one directory.
    let mut child = job(&settings, &directory, &["train.steps=100000"]).stderr(Stdio::null()).spawn().unwrap();
    while lines(&directory.join("metrics.jsonl")).is_empty() {
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    refuse(&[], 2, "another process is working in");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_run_without_held_out_documents_trains() {
    let dir = tempfile::tempdir().unwrap();
    let run = small_tokens(dir.path(), &["tokenize.validation_fraction=0.0"]);
    let settings =
        small_job(dir.path(), Path::new("tokens"), "batch = 2\nsteps = 12", "[train.evaluation]\nevery_steps = 4");
    // From inside of the run, the stage by its bare name.
    let output = succeed(job(&settings, &dir.path().join("a"), &[]).args(["--profile", "1"]).current_dir(&run));
    let text = said(&output);
    assert!(text.contains("no held-out documents") && text.contains("no profile was written"), "{text}");
    let metrics = lines(&dir.path().join("a/metrics.jsonl"));
    assert!(metrics.iter().all(|line| line["held_out_loss"].is_null() && line["bits_per_byte"].is_number()));
}

#[test]
fn an_estimate_needs_no_tokens_and_no_gpu() {
    for (size, parameters) in [("385m", 464_520_192u64), ("7b", 7_098_863_616)] {
        let settings = root().join(format!("configs/train/tnl-{size}.toml"));
        let estimate = |set: &[&str]| {
            let mut command = fulgurite();
            command.arg("train").arg(&settings).args(["--estimate", "--json"]);
            for set in set {
                command.args(["--set", set]);
            }
            serde_json::from_slice::<serde_json::Value>(&succeed(&mut command).stdout).unwrap()
        };
        let told = estimate(&[]);
        assert_eq!(told["parameters"], parameters);
        assert_eq!(told["optimizer_bytes"], 8 * parameters);
        assert_eq!(estimate(&["train.optimizer.moments=bf16"])["optimizer_bytes"], 4 * parameters);
        assert!(told["variants"].as_array().unwrap().len() >= 3);
        let mut command = fulgurite();
        command.arg("train").arg(&settings).args(["--estimate", "--set", "train.precision=float32"]);
        assert!(refused(&mut command, 2).contains("bf16"));
    }
}

#[test]
fn the_doctor_tells_what_is_there_and_what_to_do() {
    let told = succeed(fulgurite().args(["doctor", "--json"]));
    let told: serde_json::Value = serde_json::from_slice(&told.stdout).unwrap();
    let checks = told.as_array().unwrap();
    let of = |what: &str| checks.iter().find(|check| check["what"].as_str().unwrap().contains(what)).unwrap();
    assert_eq!(of("cores")["good"], true);
    // Every library is there with its version, or there is advice.
    assert!(checks.iter().all(|check| !check["found"].as_str().unwrap().is_empty()));
    assert!(checks.len() >= 6, "{told}");
}
