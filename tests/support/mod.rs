//! What the tests of whole processes share.
#![allow(clippy::unwrap_used, dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pipeline::digest::Digest;

pub mod browser;

/// The program, quiet about colours and free of the caller's settings.
pub fn fulgurite() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fulgurite"));
    command.env_remove("RUST_LOG").env("NO_COLOR", "1").env("RUST_BACKTRACE", "0");
    command
}

/// The checkout.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A small recipe over a part of the quickstart corpus, written to `dir`: every stage, seconds long.
pub fn small_recipe(dir: &Path) -> PathBuf {
    let text = format!(
        r#"
name = "small"
seed = 7
base_dir = {base:?}

[ingest]
split_bytes = 60000

[[ingest.inputs]]
source = "docs"
paths = ["docs.jsonl.gz"]

[[ingest.inputs]]
source = "table"
paths = ["table.parquet"]
fields = {{ text = "content", url = "link" }}

[[ingest.inputs]]
source = "notes"
paths = ["notes"]

[[ingest.inputs]]
source = "extracts"
paths = ["extracts.wet.gz"]

[signals]

[filter]
profiles = ["gopher_quality"]

[exact]

[near]

[tokenize]
validation_fraction = 0.05
shard_tokens = 40000

[tokenize.tokenizer]
vocab_size = 512

[train]
sequence_length = 32
batch = 2
steps = 24
checkpoint_every_steps = 6
log_every_steps = 1

[train.schedule]
warmup_steps = 4

[train.model]
decoder_layers = 2
decoder_embed_dim = 32
decoder_attention_heads = 2
"#,
        base = root().join("configs/quickstart/corpus")
    );
    let path = dir.join("small.toml");
    std::fs::write(&path, text).unwrap();
    path
}

/// Settings of a training job on the token shards `tokens`, with a model that takes milliseconds a step; `keys` are more of the
/// table `[train]`, `tables` what follows it.
pub fn small_job(dir: &Path, tokens: &Path, keys: &str, tables: &str) -> PathBuf {
    let text = format!(
        r#"
name = "job"
tokens = {tokens:?}

[train]
sequence_length = 32
{keys}

[train.model]
decoder_layers = 2
decoder_embed_dim = 32
decoder_attention_heads = 2

{tables}
"#
    );
    let path = dir.join("job.toml");
    std::fs::write(&path, text).unwrap();
    path
}

/// The small recipe as far as its token shards: the directory of the run.
pub fn small_tokens(dir: &Path, set: &[&str]) -> PathBuf {
    let run = dir.join("run");
    let mut command = fulgurite();
    command.arg("run").arg(small_recipe(dir)).arg("--run-dir").arg(&run).args(["--until", "token_statistics"]);
    for set in set {
        command.args(["--set", set]);
    }
    succeed(&mut command);
    run
}

/// A training job in `directory`, on the CPU.
pub fn job(settings: &Path, directory: &Path, set: &[&str]) -> Command {
    let mut command = fulgurite();
    command.arg("train").arg(settings).args(["--device", "cpu", "--run-dir"]).arg(directory);
    for set in set {
        command.args(["--set", set]);
    }
    command
}

/// The whole lines of a file of JSON lines; none where there is no file.
pub fn json_lines(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// What a command said to people.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Run to the end and insist on this code; what was said.
pub fn refused(command: &mut Command, code: i32) -> String {
    let output = command.output().unwrap();
    let text = said(&output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    text
}

/// Run to the end and insist on success.
pub fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Whether a stage of a run is done.
pub fn is_done(run: &Path, stage: &str) -> bool {
    let Ok(manifest) = std::fs::read(run.join(stage).join("manifest.json")) else { return false };
    serde_json::from_slice::<serde_json::Value>(&manifest).unwrap()["state"] == "done"
}

/// Every task of every stage of a finished run has one line in its journal: one that is done again adds another.
pub fn nothing_was_done_twice(run: &Path) {
    let mut stages = 0;
    for entry in std::fs::read_dir(run).unwrap() {
        let dir = entry.unwrap().path();
        let Ok(manifest) = std::fs::read(dir.join("manifest.json")) else { continue };
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let journal = std::fs::read_to_string(dir.join("journal.jsonl")).unwrap();
        assert_eq!(journal.lines().count() as u64, manifest["tasks"].as_u64().unwrap(), "{}", dir.display());
        stages += 1;
    }
    assert!(stages > 0, "{} holds no stage", run.display());
}

/// Digests of every output of a run: shards, sorted runs, tokenizers, weights; not journals, which hold seconds.
pub fn outputs(run: &Path) -> BTreeMap<PathBuf, Digest> {
    let mut found = BTreeMap::new();
    let mut left = vec![run.to_path_buf()];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
                continue;
            }
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let kinds = [".parquet", ".runs", ".safetensors"];
            if kinds.iter().any(|kind| name.ends_with(kind)) || name == "tokenizer.json" {
                found.insert(path.strip_prefix(run).unwrap().to_path_buf(), Digest::of_file(&path).unwrap());
            }
        }
    }
    found
}
