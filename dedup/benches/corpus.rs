//! Deduplication from files of text to files of text, stage by stage, as a run does it.
//!
//!     cargo bench --workspace --bench corpus -- DIRECTORY compatible|fast|exact|substring THREADS FILE…
//!
//! The files are those of an ingest input. Every chain begins with `ingest` and ends with `curate`; `compatible` and `fast`
//! are near-duplicate removal with 5-word shingles and 14 bands of 8 rows. Seconds are those of all processors together, which
//! other work on the machine moves less than the clock; the clock is told for the whole.
#![allow(missing_docs, clippy::print_stdout)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use dedup::{ExactConfig, Mode, NearConfig, SubstringConfig, exact_stages, near_stages, substring_stages};
use pipeline::stages::curate::CurateStage;
use pipeline::stages::ingest::IngestStage;
use pipeline::{Event, RunContext, RunOptions, Runner, Stage};

fn failed(e: impl std::fmt::Display) -> ! {
    panic!("{e}")
}

/// Processor seconds of this process, as Linux tells them.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<f64> = stat.split_whitespace().skip(13).take(2).filter_map(|n| n.parse().ok()).collect();
    fields.iter().sum::<f64>() / 100.0
}

/// The most memory that this process has held, in bytes.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:"));
    line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [dir, kind, threads, files @ ..] = arguments.as_slice() else {
        println!("corpus: give a directory, a chain, a number of threads and files");
        return;
    };
    let threads = threads.parse().unwrap_or(1);
    let dir = PathBuf::from(dir);
    let ingest = serde_json::json!({ "inputs": [{ "source": "text", "paths": files }] });
    let ingest = serde_json::from_value(ingest).unwrap_or_else(|e| failed(e));
    let here = std::path::absolute(Path::new(".")).unwrap_or_else(|e| failed(e));
    let near = |mode| {
        let config = NearConfig { mode, ..NearConfig::default() };
        near_stages(&config, "ingest", None, None, here.as_path())
            .map(|stages| (stages, "ingest", Some("near".to_string())))
    };
    let (middle, documents, selection) = match kind.as_str() {
        "compatible" => near(Mode::Compatible),
        "fast" => near(Mode::Fast),
        "exact" => exact_stages(&ExactConfig::default(), "ingest", None, None, here.as_path())
            .map(|stages| (stages, "ingest", Some("exact".to_string()))),
        "substring" => {
            substring_stages(&SubstringConfig::default(), "ingest", None).map(|stages| (stages, dedup::SUBSTRING, None))
        }
        other => failed(format!("there is no chain {other}")),
    }
    .unwrap_or_else(|e| failed(e));
    let mut stages: Vec<Arc<dyn Stage>> =
        vec![Arc::new(IngestStage::new(ingest, here.clone()).unwrap_or_else(|e| failed(e)))];
    stages.extend(middle);
    stages.push(Arc::new(CurateStage::new(documents, selection)));

    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("one pool");
    let spent: Arc<Mutex<HashMap<String, f64>>> = Arc::default();
    let seen = spent.clone();
    let observer = move |event: &Event| {
        let (stage, sign) = match event {
            Event::StageStarted { stage, .. } => (stage, -1.0),
            Event::StageFinished { stage, .. } => (stage, 1.0),
            _ => return,
        };
        *seen.lock().expect("no panic").entry(stage.clone()).or_default() += sign * cpu_seconds();
    };
    let options = RunOptions { threads, observer: Arc::new(observer), ..RunOptions::new() };
    let run = RunContext::new(&dir, options).unwrap_or_else(|e| failed(e));
    let names: Vec<String> = stages.iter().map(|s| s.name().to_string()).collect();
    let runner = Runner::new(run.clone(), stages).unwrap_or_else(|e| failed(e));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().expect("threads");
    let (started, cpu) = (Instant::now(), cpu_seconds());
    runtime.block_on(runner.run(None)).unwrap_or_else(|e| failed(e));
    let (wall, cpu) = (started.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let shards = run.shards("ingest").unwrap_or_else(|e| failed(e));
    let text: u64 = shards.iter().map(|s| pipeline::shard::text_bytes(&s.path).unwrap_or_else(|e| failed(e))).sum();
    let text = text as f64;
    println!(
        "{kind}: {} documents, {:.1} MB of text, {threads} threads",
        shards.iter().map(|s| s.rows).sum::<u64>(),
        text / 1e6
    );
    for name in &names {
        let journal = run.journal(name);
        let seconds = spent.lock().expect("no panic").get(name).copied().unwrap_or(0.0);
        let bytes: u64 = journal.values().flat_map(|e| &e.files).map(|f| f.bytes).sum();
        let kept: u64 = journal.values().map(|e| e.rows_kept).sum();
        println!(
            "{name:22} {seconds:7.2} s of processors, {:7.1} MB/s, {:.3} bytes a byte of text, {kept} rows",
            text / 1e6 / seconds,
            bytes as f64 / text
        );
        for note in ["anchors", "candidates", "windows", "repeats", "cuts", "bytes_removed"] {
            let sum: u64 = journal.values().filter_map(|e| e.notes.get(note)?.as_u64()).sum();
            if sum > 0 {
                println!("{:22} {note}: {sum}", "");
            }
        }
    }
    println!(
        "in all {wall:.2} s, {:.1} MB/s; {cpu:.2} s of processors, {:.1} MB/s; peak {} MiB",
        text / 1e6 / wall,
        text / 1e6 / cpu,
        peak_bytes() >> 20
    );
}
