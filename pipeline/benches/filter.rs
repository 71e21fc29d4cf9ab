//! From files of text to verdicts, stage by stage, as a run does it: ingest, signals, and the rules of Gopher, C4 and FineWeb.
//!
//!     cargo bench --workspace --bench filter -- DIRECTORY THREADS [--compression NAME] [--only NAME]... [--without SIGNAL]... FILE...
//!
//! The files are those of an ingest input, NAME is as `ingest.compression` in a recipe, DIRECTORY is where the run goes: a new one. `peers.py` beside this file runs
//! datatrove's filters over the same files.
#![allow(missing_docs, clippy::print_stdout)]

mod stages;

use std::path::Path;
use std::sync::Arc;

use pipeline::stages::filter::{FilterConfig, FilterStage};
use pipeline::stages::ingest::IngestStage;
use pipeline::stages::signals::{SignalsConfig, SignalsStage};
use stages::failed;

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let (Some(dir), Some(threads)) = (arguments.next(), arguments.next().and_then(|n| n.parse().ok())) else {
        println!("filter: give a directory, a number of threads and files");
        return;
    };
    let mut signals = SignalsConfig::default();
    let mut files = Vec::new();
    let mut compression = None;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--only" => signals.only.extend(arguments.next()),
            "--compression" => compression = arguments.next(),
            "--without" => signals.without.extend(arguments.next()),
            _ => files.push(argument),
        }
    }
    let mut ingest = serde_json::json!({ "inputs": [{ "source": "text", "paths": files }] });
    if let Some(name) = compression {
        ingest["compression"] = name.into();
    }
    let ingest = serde_json::from_value(ingest).unwrap_or_else(|e| failed(e));
    let here = std::path::absolute(Path::new(".")).unwrap_or_else(|e| failed(e));
    let signal_stage = SignalsStage::new("ingest", None, &signals, &here).unwrap_or_else(|e| failed(e));
    let rules = FilterStage::new("signals", &FilterConfig::default(), &signals).unwrap_or_else(|e| failed(e));
    let ingest = IngestStage::new(ingest, here).unwrap_or_else(|e| failed(e));
    stages::run(Path::new(&dir), threads, vec![Arc::new(ingest), Arc::new(signal_stage), Arc::new(rules)], &[]);
}
