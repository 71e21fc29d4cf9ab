//! From files of text to verdicts, stage by stage, as a run does it: ingest, signals, and the rules of Gopher, C4 and FineWeb.
//!
//!     cargo bench --workspace --bench filter -- DIRECTORY THREADS [--without SIGNAL]... FILE...
//!
//! The files are those of an ingest input, DIRECTORY is where the run goes: a new one. `peers.py` beside this file runs
//! datatrove's filters over the same files.
#![allow(missing_docs, clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use pipeline::stages::filter::{FilterConfig, FilterStage};
use pipeline::stages::ingest::IngestStage;
use pipeline::stages::signals::{SignalsConfig, SignalsStage};
use pipeline::{RunContext, RunOptions, Runner, Stage};

fn failed(e: impl std::fmt::Display) -> ! {
    panic!("{e}")
}

/// Processor seconds of this process, as Linux tells them, to a hundredth.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<f64> = stat.split_whitespace().skip(13).take(2).filter_map(|n| n.parse().ok()).collect();
    fields.iter().sum::<f64>() / 100.0
}

/// The most memory that this process has held, in MiB.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:"));
    line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) >> 10
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let (Some(dir), Some(threads)) = (arguments.next(), arguments.next().and_then(|n| n.parse().ok())) else {
        println!("filter: give a directory, a number of threads and files");
        return;
    };
    let mut signals = SignalsConfig::default();
    let mut files = Vec::new();
    while let Some(argument) = arguments.next() {
        if argument == "--without" { signals.without.extend(arguments.next()) } else { files.push(argument) }
    }
    let ingest = serde_json::json!({ "inputs": [{ "source": "text", "paths": files }] });
    let ingest = serde_json::from_value(ingest).unwrap_or_else(|e| failed(e));
    let here = std::path::absolute(Path::new(".")).unwrap_or_else(|e| failed(e));
    let signal_stage = SignalsStage::new("ingest", None, &signals, &here).unwrap_or_else(|e| failed(e));
    let rules = FilterStage::new("signals", &FilterConfig::default(), &signals).unwrap_or_else(|e| failed(e));
    let ingest = IngestStage::new(ingest, here).unwrap_or_else(|e| failed(e));
    let stages: Vec<Arc<dyn Stage>> = vec![Arc::new(ingest), Arc::new(signal_stage), Arc::new(rules)];

    let run = RunContext::new(PathBuf::from(dir), RunOptions { threads, ..RunOptions::new() });
    let run = run.unwrap_or_else(|e| failed(e));
    let names: Vec<String> = stages.iter().map(|stage| stage.name().to_owned()).collect();
    let runner = Runner::new(run.clone(), stages).unwrap_or_else(|e| failed(e));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().expect("threads");
    let (started, cpu) = (Instant::now(), cpu_seconds());
    runtime.block_on(runner.run(None)).unwrap_or_else(|e| failed(e));
    let (wall, cpu) = (started.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let shards = run.shards("ingest").unwrap_or_else(|e| failed(e));
    let text: u64 = shards.iter().map(|s| pipeline::shard::text_bytes(&s.path).unwrap_or_else(|e| failed(e))).sum();
    let megabytes = text as f64 / 1e6;
    let documents: u64 = shards.iter().map(|s| s.rows).sum();
    println!("{documents} documents, {megabytes:.1} MB of text, {threads} threads");
    for name in &names {
        let journal = run.journal(name);
        let seconds: f64 = journal.values().map(|e| e.seconds).sum();
        let bytes: u64 = journal.values().flat_map(|e| &e.files).map(|f| f.bytes).sum();
        let kept: u64 = journal.values().map(|e| e.rows_kept).sum();
        println!(
            "{name:8} {seconds:7.2} s of tasks, {:6.1} MB/s, {:.3} bytes a byte of text, {kept} rows",
            megabytes / seconds,
            bytes as f64 / text as f64
        );
    }
    println!(
        "in all {wall:.2} s, {:.1} MB/s; {cpu:.2} s of processors, {:.1} MB/s; peak {} MiB",
        megabytes / wall,
        megabytes / cpu,
        peak_mib()
    );
}
