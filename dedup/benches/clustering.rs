//! Near-duplicate clustering of many documents, from signatures on disk to removals and the selection of what stays.
//!
//!     cargo bench --workspace --bench clustering -- DIRECTORY DOCUMENTS [THREADS [earliest|longest|highest]]
//!
//! Signatures are made by a generator, so that the number of documents is free. Document `i` of `N` draws
//! from SplitMix64 of `i`: with probability 0.3 it belongs to cluster `c`, drawn from `N / 10`, and agrees with it
//! in a band with probability 0.43 (0.9⁸: similarity 0.9, 8 rows), so that its key is that of `(c, band)`; every
//! other key is of `(i, band)`. Sketches are drawn likewise, and so are lengths and values, by which the survivor is chosen where it is not
//! the earliest. Processor seconds are those of all threads; other work on the machine moves them less than the clock.
#![allow(missing_docs, clippy::print_stdout)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{ArrayRef, FixedSizeBinaryArray, RecordBatch, UInt64Array};
use arrow::datatypes::{DataType, Field, Schema};
use async_trait::async_trait;
use dedup::minhash::SKETCH_BYTES;
use dedup::near::{SignatureWriter, clustering_stages, selection_stage};
use dedup::{Keep, Mode, NearConfig};
use pipeline::document::ordinal;
use pipeline::shard::{BATCH_ROWS, ShardWriter, part_name};
use pipeline::{Journal, Result, RunContext, RunOptions, Runner, Stage, Task, TaskContext, TaskReport};

/// Documents of a shard: half a gigabyte of text of 5 kB each.
const SHARD: u64 = 100_000;

struct Synthetic {
    config: NearConfig,
    documents: u64,
}

fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number from 0 to 1.
fn share(z: u64) -> f64 {
    (z >> 11) as f64 / (1u64 << 53) as f64
}

#[async_trait]
impl Stage for Synthetic {
    fn name(&self) -> &str {
        "near_signatures"
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        Vec::new()
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "documents": self.documents }))
    }
    async fn tasks(&self, _: &RunContext) -> Result<Vec<Task>> {
        let shards = self.documents.div_ceil(SHARD) as u32;
        Ok((0..shards).map(|index| Task { index, inputs: serde_json::json!({}) }).collect())
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let mut writer = SignatureWriter::create(task, &self.config)?;
        let bands = u64::from(self.config.bands);
        let clusters = (self.documents / 10).max(1);
        let mut keys = vec![0; bands as usize];
        let first = u64::from(task.index()) * SHARD;
        for i in first..(first + SHARD).min(self.documents) {
            let own = mix(i);
            let cluster = (share(own) < 0.3).then(|| mix(own) % clusters);
            for (band, key) in (0..bands).zip(&mut keys) {
                let alone = mix(own ^ (band + 1) << 56);
                *key = match cluster {
                    Some(cluster) if share(mix(alone)) < 0.43 => mix(mix(!cluster) ^ (band + 1) << 56),
                    _ => alone,
                };
            }
            writer.push(&keys, |row| {
                row.extend_from_slice(&((i - first) as u32).to_le_bytes());
                row.extend_from_slice(&(4000 + (mix(own) % 2000) as u32).to_le_bytes());
                if matches!(self.config.keep, Keep::Highest(_)) {
                    row.extend_from_slice(&mix(!own).to_le_bytes());
                }
                let sketch = cluster.map_or(own, |c| mix(!c));
                row.extend((0..SKETCH_BYTES as u64).map(|byte| mix(sketch ^ byte) as u8));
            })?;
        }
        let rows = writer.rows();
        Ok(TaskReport { files: vec![writer.finish()?], rows_read: rows, rows_kept: rows, ..TaskReport::default() })
    }
}

/// The rows that the selection chooses from.
struct Rows {
    documents: u64,
}

#[async_trait]
impl Stage for Rows {
    fn name(&self) -> &str {
        "documents"
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        Vec::new()
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "documents": self.documents }))
    }
    async fn tasks(&self, _: &RunContext) -> Result<Vec<Task>> {
        let shards = self.documents.div_ceil(SHARD) as u32;
        Ok((0..shards).map(|index| Task { index, inputs: serde_json::json!({}) }).collect())
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let schema = Arc::new(Schema::new(vec![
            Field::new("id", DataType::FixedSizeBinary(16), false),
            Field::new("ordinal", DataType::UInt64, false),
        ]));
        let mut writer = ShardWriter::create(task.stage_dir(), part_name(task.index()), schema.clone(), Vec::new())?;
        let rows = SHARD.min(self.documents - u64::from(task.index()) * SHARD);
        for first in (0..rows).step_by(BATCH_ROWS) {
            let ordinals: Vec<u64> =
                (first..rows.min(first + BATCH_ROWS as u64)).map(|row| ordinal(task.index(), row as u32)).collect();
            let id = |ordinal: &u64| [mix(*ordinal), mix(!*ordinal)].map(u64::to_le_bytes).concat();
            let columns: Vec<ArrayRef> = vec![
                Arc::new(FixedSizeBinaryArray::try_from_iter(ordinals.iter().map(id))?),
                Arc::new(UInt64Array::from(ordinals)),
            ];
            writer.write(RecordBatch::try_new(schema.clone(), columns)?)?;
        }
        Ok(TaskReport { files: vec![writer.finish()?], rows_read: rows, rows_kept: rows, ..TaskReport::default() })
    }
}

/// The most memory that this process has held, in bytes, as Linux tells it.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:"));
    line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Seconds that the threads of this process have worked so far, as Linux tells them in hundredths.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name, which may have spaces in it: user and system time are the twelfth and the thirteenth number.
    let numbers = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    numbers.filter_map(|n| n.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn failed(e: pipeline::Error) -> ! {
    panic!("{e}")
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [dir, documents, rest @ ..] = arguments.as_slice() else {
        println!("clustering: give a directory and a number of documents");
        return;
    };
    let documents = documents.parse::<f64>().unwrap_or(0.0) as u64;
    let threads = rest.first().and_then(|n| n.parse().ok()).unwrap_or(2);
    let dir = PathBuf::from(dir);
    let keep = match rest.get(1).map(String::as_str) {
        None | Some("earliest") => Keep::Earliest,
        Some("longest") => Keep::Longest,
        Some("highest") => Keep::Highest("value".into()),
        Some(other) => panic!("there is no policy {other}"),
    };
    let config = NearConfig { mode: Mode::Fast, keep, ..NearConfig::default() };
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("one pool");
    let run = RunContext::new(&dir, RunOptions { threads, ..RunOptions::new() }).unwrap_or_else(|e| failed(e));
    let mut stages: Vec<Arc<dyn Stage>> = vec![Arc::new(Synthetic { config: config.clone(), documents })];
    stages.extend(clustering_stages(&config).unwrap_or_else(|e| failed(e)));
    stages.extend([Arc::new(Rows { documents }) as Arc<dyn Stage>, selection_stage("documents", &[])]);
    let names: Vec<String> = stages.iter().map(|s| s.name().to_string()).collect();
    let runner = Runner::new(run.clone(), stages).unwrap_or_else(|e| failed(e));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().expect("threads");
    println!("documents {documents}, threads {threads}");
    let mut whole = 0.0;
    for name in &names {
        let (started, worked) = (Instant::now(), processor_seconds());
        runtime.block_on(runner.run(Some(name))).unwrap_or_else(|e| failed(e));
        // Earlier stages are found done, which takes their checksums: that is not this stage's time.
        let work: f64 = run.journal(name).values().map(|e| e.seconds).sum();
        let bytes: u64 =
            Journal::read(&dir.join(name)).map_or(0, |j| j.values().flat_map(|e| &e.files).map(|f| f.bytes).sum());
        let rows: u64 = run.journal(name).values().map(|e| e.rows_kept).sum();
        if name != &names[0] && name != "documents" {
            whole += work;
        }
        println!(
            "{name:16} {work:8.1} s of tasks, {:8.1} s wall and {:8.1} s of processors with checksums, {:6.1} bytes a document, {rows} rows, \
             peak {} MiB",
            started.elapsed().as_secs_f64(),
            processor_seconds() - worked,
            bytes as f64 / documents as f64,
            peak_bytes() >> 20
        );
    }
    println!("clustering {whole:.1} s of tasks, {:.3} µs a document", whole * 1e6 / documents as f64);
}
