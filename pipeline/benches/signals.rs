//! Throughput of the signals, one core, over the prose that ships with the quickstart: 342 documents, 5.5 MB.
//!
//! `cargo bench -p pipeline --bench signals`

use std::error::Error;
use std::fs::File;
use std::path::Path;

use divan::counter::BytesCount;
use pipeline::signals::{Scratch, c4_clean, compute};

fn main() {
    divan::main();
}

/// The texts of the corpus.
fn documents() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/quickstart/corpus/prose.jsonl.zst");
    read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn read(path: &Path) -> Result<Vec<String>, Box<dyn Error>> {
    let jsonl = zstd::decode_all(File::open(path)?)?;
    let records = serde_json::Deserializer::from_slice(&jsonl).into_iter::<serde_json::Value>();
    records.map(|record| Ok(record?["text"].as_str().ok_or("a record without text")?.to_owned())).collect()
}

fn bytes(documents: &[String]) -> BytesCount {
    BytesCount::new(documents.iter().map(String::len).sum::<usize>())
}

/// The whole family of signals.
#[divan::bench]
fn all_signals(bencher: divan::Bencher<'_, '_>) {
    let documents = documents();
    let mut scratch = Scratch::default();
    bencher
        .counter(bytes(&documents))
        .bench_local(|| documents.iter().map(|text| compute(text, &mut scratch).word_count).sum::<i64>());
}

/// The line rule of C4.
#[divan::bench]
fn c4_lines(bencher: divan::Bencher<'_, '_>) {
    let documents = documents();
    let mut cleaned = String::new();
    bencher.counter(bytes(&documents)).bench_local(|| {
        documents
            .iter()
            .map(|text| {
                cleaned.clear();
                c4_clean(text, &mut cleaned).kept
            })
            .sum::<u64>()
    });
}
