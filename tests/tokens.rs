//! Tokens from the command line: a tokenizer trained alone, shards looked into, figures of a run.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use support::{fulgurite, small_recipe, succeed};

#[test]
fn a_tokenizer_is_trained_shards_are_shown_and_figures_add_up() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = small_recipe(dir.path());
    let run = dir.path().join("run");
    let json = dir.path().join("tokenizer.json");
    let train = |output: &std::path::Path| {
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
