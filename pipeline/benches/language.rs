//! Accuracy and speed of language identification on text with gold labels.
//!
//!     cargo bench --workspace --bench language -- [--model lid.176.ftz] DOCUMENTS.jsonl.zst...
//!
//! Documents have `text` and `lang` (gold, ISO 639). Each is judged whole, by its first 200 characters and by its first 50.
//! Languages that are identified nowhere, which the identifier does not know, are listed apart.
#![allow(missing_docs, clippy::print_stdout)]

use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::time::Instant;

use pipeline::classify::FastTextScratch;
use pipeline::language::{Identifier, LanguageConfig, code_of};

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench").peekable();
    let mut config = LanguageConfig::default();
    if arguments.peek().is_some_and(|a| a == "--model") {
        arguments.next();
        config.model = arguments.next().map(PathBuf::from);
    }
    let files: Vec<String> = arguments.collect();
    if files.is_empty() {
        println!("language: give files of documents, JSON lines compressed with zstd");
        return;
    }
    let identifier = Identifier::load(&config, Path::new(".")).expect("the model");
    let mut documents: Vec<(String, String)> = Vec::new();
    for path in files {
        let file = std::fs::File::open(&path).expect("a file of documents");
        for line in std::io::BufReader::new(zstd::Decoder::new(file).expect("zstd")).lines() {
            let record: serde_json::Value = serde_json::from_str(&line.expect("text")).expect("JSON");
            let gold = record["lang"].as_str().unwrap_or_default();
            documents.push((code_of(gold).to_owned(), record["text"].as_str().unwrap_or_default().to_owned()));
        }
    }
    let mut table: BTreeMap<&str, [(u64, u64); 3]> = BTreeMap::new();
    let mut scratch = FastTextScratch::default();
    let mut seconds = [0.0; 3];
    let mut bytes = [0usize; 3];
    for (gold, text) in &documents {
        for (way, chars) in [usize::MAX, 200, 50].into_iter().enumerate() {
            let piece: String = text.chars().take(chars).collect();
            let start = Instant::now();
            let found = identifier.document(&piece, false, &mut scratch);
            seconds[way] += start.elapsed().as_secs_f64();
            bytes[way] += piece.len();
            let cell = &mut table.entry(gold).or_default()[way];
            cell.1 += 1;
            cell.0 += u64::from(found.language.as_deref() == Some(gold.as_str()));
        }
    }
    let known: Vec<_> = table.iter().filter(|(_, ways)| ways[0].0 > 0).collect();
    println!("| language | documents | whole | 200 characters | 50 characters |\n| --- | --- | --- | --- | --- |");
    let share = |(right, all): (u64, u64)| format!("{:.1}%", 100.0 * right as f64 / all as f64);
    for (language, ways) in &known {
        println!("| {language} | {} | {} | {} | {} |", ways[0].1, share(ways[0]), share(ways[1]), share(ways[2]));
    }
    let sum = |way: usize| known.iter().fold((0, 0), |sum, (_, ways)| (sum.0 + ways[way].0, sum.1 + ways[way].1));
    println!("| all {} | {} | {} | {} | {} |", known.len(), sum(0).1, share(sum(0)), share(sum(1)), share(sum(2)));
    let mean = |way: usize| {
        known.iter().map(|(_, w)| w[way].0 as f64 / w[way].1 as f64).sum::<f64>() / known.len().max(1) as f64 * 100.0
    };
    println!("mean over languages: {:.1}%, {:.1}%, {:.1}%", mean(0), mean(1), mean(2));
    for way in 0..3 {
        println!(
            "{} documents, {:.1} MB: {:.1} µs a document, {:.1} MB/s",
            documents.len(),
            bytes[way] as f64 / 1e6,
            seconds[way] / documents.len() as f64 * 1e6,
            bytes[way] as f64 / 1e6 / seconds[way]
        );
    }
    let unknown: Vec<&str> = table.iter().filter(|(_, w)| w[0].0 == 0).map(|(language, _)| *language).collect();
    println!("{} languages never identified: {}", unknown.len(), unknown.join(" "));
}
