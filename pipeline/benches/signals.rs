//! Throughput of signals, cleaning and personal data, one core, over the prose that ships with the quickstart (342
//! documents, 5.5 MB), or over the first 40 MB of `FULGURITE_BENCH_DOCUMENTS`, a file of JSON lines compressed with zstd.
//!
//! `cargo bench --workspace --bench signals`

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use divan::counter::BytesCount;
use pipeline::language::Identifier;
use pipeline::normalise::{Changes, Normaliser, Part};
use pipeline::pii::{Pii, PiiCounts, PiiFinder};
use pipeline::signals::{Scratch, c4_clean, compute};

fn main() {
    divan::main();
}

/// The texts of the corpus.
fn documents() -> Vec<String> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/quickstart/corpus/prose.jsonl.zst");
    let path = std::env::var_os("FULGURITE_BENCH_DOCUMENTS").map_or(own, PathBuf::from);
    read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn read(path: &Path) -> Result<Vec<String>, Box<dyn Error>> {
    let mut texts = Vec::new();
    let mut bytes = 0;
    for line in BufReader::new(zstd::Decoder::new(File::open(path)?)?).lines() {
        let record: serde_json::Value = serde_json::from_str(&line?)?;
        let text = record["text"].as_str().ok_or("a record without text")?;
        bytes += text.len();
        texts.push(text.to_owned());
        if bytes > 40_000_000 {
            break;
        }
    }
    Ok(texts)
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

/// One part of the cleaning at a time.
#[divan::bench(args = Part::ALL.map(Part::name))]
fn clean(bencher: divan::Bencher<'_, '_>, name: &str) {
    let documents = documents();
    let normaliser = Normaliser::new(Part::ALL.into_iter().filter(|part| part.name() == name));
    bencher.counter(bytes(&documents)).bench_local(|| {
        documents.iter().map(|text| normaliser.apply(text, &mut Changes::default()).len()).sum::<usize>()
    });
}

/// All parts but the line rules of C4.
#[divan::bench]
fn clean_all(bencher: divan::Bencher<'_, '_>) {
    let documents = documents();
    let normaliser = Normaliser::new(Part::ALL.into_iter().filter(|part| *part != Part::C4Lines));
    bencher.counter(bytes(&documents)).bench_local(|| {
        documents.iter().map(|text| normaliser.apply(text, &mut Changes::default()).len()).sum::<usize>()
    });
}

/// Personal data of every kind.
#[divan::bench]
fn personal_data(bencher: divan::Bencher<'_, '_>) {
    let documents = documents();
    let finder = PiiFinder::new(Pii::ALL);
    bencher.counter(bytes(&documents)).bench_local(|| {
        documents.iter().map(|text| finder.redact(text, &mut PiiCounts::default()).len()).sum::<usize>()
    });
}

/// The embedded identifier.
#[divan::bench]
fn language(bencher: divan::Bencher<'_, '_>) {
    let documents = documents();
    bencher.counter(bytes(&documents)).bench_local(|| {
        documents
            .iter()
            .filter(|text| Identifier::Embedded.document(text, false, &mut Default::default()).language.is_some())
            .count()
    });
}
