//! Token shards are plain Parquet: a reader that knows nothing of this program reads them.
#![allow(clippy::print_stderr, clippy::unwrap_used)]

mod common;

use std::process::Command;

use tokenize::loader::committed_shards;
use tokenize::{Encoder, tokenizer_path};

use common::{config, documents, run};

/// Prints, for every row: id, source, bytes and the token ids, by pyarrow; then the footer's metadata.
const SCRIPT: &str = r#"
import sys, pyarrow.parquet as parquet
for path in sys.argv[1:]:
    for row in parquet.read_table(path).to_pylist():
        print(row["id"].hex(), row["source"], row["bytes"], *row["tokens"])
print(parquet.read_metadata(sys.argv[1]).metadata[b"fulgurite.tokens"].decode(), file=sys.stderr)
"#;

#[test]
fn pyarrow_reads_token_shards() {
    let present = Command::new("python3").args(["-c", "import pyarrow.parquet"]).output();
    match present {
        Ok(output) if output.status.success() => {}
        Ok(_) => return eprintln!("not checked: this python3 has no pyarrow (pip install pyarrow)"),
        Err(error) => return eprintln!("not checked: no python3 here ({error})"),
    }
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), documents(), 3, &config(), 5).unwrap();
    let shards = ["tokens", "tokens_validation"].map(|stage| committed_shards(&dir.path().join(stage)).unwrap());
    let paths = shards.iter().flatten().map(|shard| &shard.path);
    let output = Command::new("python3").arg("-c").arg(SCRIPT).args(paths).output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    assert!(errors.contains("\"vocabulary_size\":1024"), "{errors}");
    let encoder = Encoder::load(tokenizer_path(dir.path())).unwrap();
    let expected = documents().into_iter().map(|document| {
        let mut ids = Vec::new();
        encoder.encode(&document.text, &mut ids).unwrap();
        ids.push(2);
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
}
