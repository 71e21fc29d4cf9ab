//! Runs stages as a run does and tells what each of them took: what the benchmarks of whole chains share.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use pipeline::{Event, RunContext, RunOptions, Runner, Stage};

/// A benchmark that cannot go on says why.
pub fn failed(e: impl std::fmt::Display) -> ! {
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

/// Runs `stages`, the first of which is `ingest`, in the new directory `dir` and prints a table: seconds are those of all
/// processors together, which other work on the machine moves less than the clock. Of the stages' own figures the `notes`
/// are told.
pub fn run(dir: &Path, threads: usize, stages: Vec<Arc<dyn Stage>>, notes: &[&str]) {
    pipeline::allocator::keep_buffers();
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
    let run = RunContext::new(dir, options).unwrap_or_else(|e| failed(e));
    let names: Vec<String> = stages.iter().map(|stage| stage.name().to_owned()).collect();
    let runner = Runner::new(run.clone(), stages).unwrap_or_else(|e| failed(e));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().expect("threads");
    let (started, cpu) = (Instant::now(), cpu_seconds());
    runtime.block_on(runner.run(None)).unwrap_or_else(|e| failed(e));
    let (wall, cpu) = (started.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let shards = run.shards("ingest").unwrap_or_else(|e| failed(e));
    let text: u64 = shards.iter().map(|s| pipeline::shard::text_bytes(&s.path).unwrap_or_else(|e| failed(e))).sum();
    let text = text as f64;
    let documents: u64 = shards.iter().map(|s| s.rows).sum();
    println!("{documents} documents, {:.1} MB of text, {threads} threads", text / 1e6);
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
        for note in notes {
            let sum: u64 = journal.values().filter_map(|e| e.notes.get(*note)?.as_u64()).sum();
            if sum > 0 {
                println!("{:22} {note}: {sum}", "");
            }
        }
    }
    println!(
        "in all {wall:.2} s, {:.1} MB/s; {cpu:.2} s of processors, {:.1} MB/s; peak {} MiB",
        text / 1e6 / wall,
        text / 1e6 / cpu,
        peak_mib()
    );
}
