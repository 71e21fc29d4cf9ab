//! Deduplication from files of text to files of text, stage by stage, as a run does it.
//!
//!     cargo bench --workspace --bench corpus -- DIRECTORY compatible|fast|exact|substring THREADS [--compression NAME] FILE…
//!
//! The files are those of an ingest input, NAME is as `ingest.compression` in a recipe. Every chain begins with `ingest` and ends with `curate`; `compatible` and `fast`
//! are near-duplicate removal with 5-word shingles and 14 bands of 8 rows. Seconds are those of all processors together, which
//! other work on the machine moves less than the clock; the clock is told for the whole.
#![allow(missing_docs, clippy::print_stdout)]

#[path = "../../pipeline/benches/stages/mod.rs"]
mod stages;

use std::path::Path;
use std::sync::Arc;

use dedup::{ExactConfig, Mode, NearConfig, SubstringConfig, exact_stages, near_stages, substring_stages};
use pipeline::Stage;
use pipeline::stages::curate::CurateStage;
use pipeline::stages::ingest::IngestStage;
use stages::failed;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [dir, kind, threads, files @ ..] = arguments.as_slice() else {
        println!("corpus: give a directory, a chain, a number of threads and files");
        return;
    };
    let threads = threads.parse().unwrap_or(1);
    let (compression, files) = match files {
        [option, name, files @ ..] if option == "--compression" => (Some(name), files),
        files => (None, files),
    };
    let mut ingest = serde_json::json!({ "inputs": [{ "source": "text", "paths": files }] });
    if let Some(name) = compression {
        ingest["compression"] = name.as_str().into();
    }
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
    let mut chain: Vec<Arc<dyn Stage>> =
        vec![Arc::new(IngestStage::new(ingest, here.clone()).unwrap_or_else(|e| failed(e)))];
    chain.extend(middle);
    chain.push(Arc::new(CurateStage::new(documents, selection)));
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("one pool");
    println!("{kind}:");
    stages::run(
        Path::new(dir),
        threads,
        chain,
        &["anchors", "candidates", "windows", "repeats", "cuts", "bytes_removed"],
    );
}
