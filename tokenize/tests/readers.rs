//! Token shards are plain Parquet, and tokenizers plain `tokenizer.json`: what knows nothing of this program reads
//! them.
#![allow(clippy::print_stderr, clippy::unwrap_used)]

mod common;

use std::path::PathBuf;
use std::process::Command;

use tokenize::loader::Location;
use tokenize::train::Trainer;
use tokenize::{Digits, Encoder, Pattern, TokenizerConfig, tokenizer_path};

use common::{DECLARATION, FAR, SPEECHES, config, corpora, documents, every, far_tokens, python, run};

/// Prints, for every row: id, source, bytes and the token ids, as the reader named first gives them; then the
/// footer's metadata.
const SCRIPT: &str = r#"
import sys
reader, paths = sys.argv[1], sys.argv[2:]
for path in paths:
    if reader == "pyarrow":
        import pyarrow.parquet
        rows = pyarrow.parquet.read_table(path).to_pylist()
    elif reader == "polars":
        import polars
        rows = polars.read_parquet(path).to_dicts()
    else:
        import duckdb
        names = "id source bytes tokens".split()
        rows = duckdb.sql(f"select id, source, bytes, tokens from read_parquet('{path}')").fetchall()
        rows = [dict(zip(names, row)) for row in rows]
    for row in rows:
        print(bytes(row["id"]).hex(), row["source"], row["bytes"], *row["tokens"])
if reader == "pyarrow":
    metadata = pyarrow.parquet.read_metadata(paths[0]).metadata
    print(metadata[b"fulgurite.tokens"].decode(), file=sys.stderr)
"#;

fn read_by(reader: &str) {
    let Some(python) = python(reader) else { return };
    let files = tempfile::tempdir().unwrap();
    // Ids of 16 bits, and of 32.
    for (config, eos_id, size) in [(config(), 2, 1024), (far_tokens(files.path()), FAR[0], FAR[1] + 1)] {
        let dir = tempfile::tempdir().unwrap();
        run(dir.path(), documents(), 3, &config, 5).unwrap();
        let shards = |stage: &str| Location::Directory(dir.path().join(stage)).shards().unwrap();
        let shards = ["tokens", "tokens_validation"].map(shards);
        let paths = shards.iter().flatten().map(|shard| &shard.path);
        let output = Command::new(&python).args(["-c", SCRIPT, reader]).args(paths).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{errors}");
        assert!(reader != "pyarrow" || errors.contains(&format!("\"vocabulary_size\":{size}")), "{errors}");
        let encoder = Encoder::load(tokenizer_path(dir.path())).unwrap();
        let expected = documents().into_iter().map(|document| {
            let mut ids = Vec::new();
            encoder.encode(&document.text, &mut ids).unwrap();
            ids.push(eos_id);
            let id: String = document.id.iter().map(|byte| format!("{byte:02x}")).collect();
            let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
            format!("{id} {} {} {}", document.source, document.text.len(), ids.join(" "))
        });
        let mut expected: Vec<String> = expected.collect();
        let stdout = String::from_utf8(output.stdout).unwrap();
        let mut rows: Vec<&str> = stdout.lines().collect();
        expected.sort();
        rows.sort();
        assert!(rows == expected, "{} rows, not the {} that were written", rows.len(), expected.len());
        eprintln!("{reader} read {} rows as they were written, of {size} ids", rows.len());
    }
}

#[test]
fn pyarrow_reads_token_shards() {
    read_by("pyarrow");
}

#[test]
fn polars_reads_token_shards() {
    read_by("polars");
}

#[test]
fn duckdb_reads_token_shards() {
    read_by("duckdb");
}

/// Prints the ids of every text of a JSON file by a `tokenizer.json`, a line a text, and checks that they decode to
/// it.
const ENCODE: &str = r#"
import json, sys
library, path, texts = sys.argv[1:]
texts = json.load(open(texts, encoding="utf-8"))
if library == "tokenizers":
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(path)
    tokenizer.encode_special_tokens = True
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
else:
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=path, eos_token="<|endoftext|>")
    assert tokenizer.eos_token_id == 2
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    decode = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
for text, ids in zip(texts, ids):
    assert decode(ids) == text, text
    print(*ids)
"#;

fn loaded_by(library: &str) {
    let Some(python) = python(library) else { return };
    let mut texts: Vec<String> =
        SPEECHES.split('\u{c}').chain(DECLARATION.split('\u{c}')).map(|text| text.trim().to_owned()).collect();
    // Line by line too, where every script has its own.
    texts.extend(DECLARATION.lines().map(String::from));
    texts.extend(
        ["", " ", "don't DON'T 12345 ½\r\n\r\n  x", "👩‍👩‍👧‍👦 日本ABC e\u{301}\u{85}", "\u{0}\t \u{a0}x"].map(String::from),
    );
    if library == "tokenizers" {
        texts.push("a<|endoftext|>b".into());
    }
    let every = every();
    texts.extend(corpora().iter().flat_map(|path| common::texts(path).step_by(every)));
    let dir = tempfile::tempdir().unwrap();
    let text_file = dir.path().join("texts.json");
    std::fs::write(&text_file, serde_json::to_vec(&texts).unwrap()).unwrap();
    let own = Pattern::Regex(r"\p{L}+|[^\p{L}]+".into());
    for (pattern, digits) in [
        (Pattern::Gpt2, Digits::Pattern),
        (Pattern::Gpt2, Digits::Individual),
        (Pattern::Cl100k, Digits::Pattern),
        (Pattern::O200k, Digits::Pattern),
        (own, Digits::Pattern),
    ] {
        let config = TokenizerConfig { vocab_size: 1500, pattern, digits, ..Default::default() };
        let mut trainer = Trainer::new(&config).unwrap();
        trainer.feed(&texts.iter().map(String::as_str).collect::<Vec<_>>());
        let path: PathBuf = dir.path().join("tokenizer.json");
        std::fs::write(&path, trainer.finish(|_| true).unwrap().unwrap().to_string(false).unwrap()).unwrap();
        let encoder = Encoder::load(&path).unwrap();
        let mut command = Command::new(&python);
        let output = command.args(["-c", ENCODE, library]).arg(&path).arg(&text_file).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let stdout = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = stdout.lines().collect();
        assert_eq!(lines.len(), texts.len());
        for (text, line) in texts.iter().zip(lines) {
            let mut ids = Vec::new();
            encoder.encode(text, &mut ids).unwrap();
            let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
            assert!(ids.join(" ") == line, "{:?} {text:?}", config.pattern);
        }
    }
    let bytes: usize = texts.iter().map(String::len).sum();
    eprintln!("{library}: {} documents, {bytes} bytes, by five tokenizers", texts.len());
}

#[test]
fn python_tokenizers_gives_the_same_ids() {
    loaded_by("tokenizers");
}

#[test]
fn transformers_gives_the_same_ids() {
    loaded_by("transformers");
}
