//! Evaluation sets: JSON lines, plain or compressed.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use pipeline::{Error, Result};
use serde_json::Value;

use crate::decontaminate::Benchmark;
use crate::paths::expand;

/// A record of an evaluation set.
pub(crate) struct Record {
    /// Number of the benchmark.
    pub(crate) benchmark: usize,
    /// File and line.
    pub(crate) name: String,
}

/// The files of a benchmark, by name.
pub(crate) fn files(benchmark: &Benchmark, base: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for pattern in &benchmark.paths {
        let before = files.len();
        expand(base, pattern, &mut files)?;
        files.retain(|path| path.is_file());
        if files.len() == before {
            return Err(Error::Recipe(format!(
                "decontaminate: benchmark {}: no file matches {pattern} in {}",
                benchmark.name,
                base.display()
            )));
        }
    }
    files.sort();
    files.dedup();
    Ok(files)
}

/// Give every record's name and texts to `take`. A line that is no JSON object is an error: an evaluation set
/// that is read in part would leave contamination unseen.
pub(crate) fn read(benchmark: &Benchmark, base: &Path, mut take: impl FnMut(String, &[String])) -> Result<()> {
    for path in files(benchmark, base)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        let inner: Box<dyn Read> = match path.extension().and_then(|e| e.to_str()) {
            Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(file)),
            Some("zst" | "zstd") => Box::new(zstd::Decoder::new(file).map_err(|e| Error::io(&path, e))?),
            _ => Box::new(file),
        };
        for (number, line) in BufReader::new(inner).lines().enumerate() {
            let line = line.map_err(|e| Error::io(&path, e))?;
            if line.trim().is_empty() {
                continue;
            }
            let at = |reason: String| Error::Corrupt {
                path: path.clone(),
                reason: format!("line {}: {reason}", number + 1),
            };
            let record: Value = serde_json::from_str(&line).map_err(|e| at(e.to_string()))?;
            let mut texts = Vec::new();
            if benchmark.fields.is_empty() {
                strings(&record, &mut texts);
            } else {
                for field in &benchmark.fields {
                    let value = record.get(field).ok_or_else(|| at(format!("no field {field:?}")))?;
                    strings(value, &mut texts);
                }
            }
            take(format!("{name}:{}", number + 1), &texts);
        }
    }
    Ok(())
}

/// Every string in a value.
fn strings(value: &Value, texts: &mut Vec<String>) {
    match value {
        Value::String(text) => texts.push(text.clone()),
        Value::Array(values) => values.iter().for_each(|value| strings(value, texts)),
        Value::Object(fields) => fields.values().for_each(|value| strings(value, texts)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}
