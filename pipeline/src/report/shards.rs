//! Reading columns of shards with Polars.

use std::path::{Path, PathBuf};

use polars::prelude::{Column, DataFrame, DataType, LazyFrame, PlRefPath, PolarsError, ScanArgsParquet, col};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::Journal;
use crate::status::{StageSummary, decisive};

/// The committed files of a stage that hold rows, by number of their task: kept ones, or those below `dropped/`.
pub(super) fn files(run_dir: &Path, stage: &str, dropped: bool) -> Result<Vec<(u32, PathBuf)>> {
    files_below(run_dir, stage, if dropped { "dropped" } else { "" })
}

/// The committed files of a stage that hold rows and lie in its directory `below`, by number of their task.
pub(super) fn files_below(run_dir: &Path, stage: &str, below: &str) -> Result<Vec<(u32, PathBuf)>> {
    let dir = run_dir.join(stage);
    let mut files = Vec::new();
    for (task, entry) in Journal::read(&dir)? {
        for file in entry.files {
            let parquet = file.path.extension().is_some_and(|e| e == "parquet");
            let place = file.path.parent().is_some_and(|p| p.as_os_str() == below);
            if parquet && place && file.rows > 0 {
                files.push((task, dir.join(file.path)));
            }
        }
    }
    Ok(files)
}

/// Some columns of a shard.
pub(super) fn read(path: &Path, columns: &[&str]) -> Result<DataFrame> {
    let paths = vec![PlRefPath::new(path.to_string_lossy())].into();
    LazyFrame::scan_parquet_files(paths, ScanArgsParquet::default())
        .and_then(|rows| rows.select(columns.iter().map(|name| col(*name)).collect::<Vec<_>>()).collect())
        .map_err(|e| fault(path, e))
}

/// Names of a shard's columns.
pub(super) fn columns(path: &Path) -> Result<Vec<String>> {
    let paths = vec![PlRefPath::new(path.to_string_lossy())].into();
    LazyFrame::scan_parquet_files(paths, ScanArgsParquet::default())
        .and_then(|mut rows| rows.collect_schema())
        .map(|schema| schema.iter_names().map(ToString::to_string).collect())
        .map_err(|e| fault(path, e))
}

/// The rows whose ordinal is one of `ordinals`.
pub(super) fn read_rows(path: &Path, columns: &[&str], ordinals: &[u64]) -> Result<DataFrame> {
    let wanted = ordinals.iter().map(|n| col("ordinal").eq(polars::prelude::lit(*n)));
    let Some(wanted) = wanted.reduce(|a, b| a.or(b)) else { return read(path, columns).map(|rows| rows.head(Some(0))) };
    let paths = vec![PlRefPath::new(path.to_string_lossy())].into();
    LazyFrame::scan_parquet_files(paths, ScanArgsParquet::default())
        .and_then(|rows| {
            rows.filter(wanted).select(columns.iter().map(|name| col(*name)).collect::<Vec<_>>()).collect()
        })
        .map_err(|e| fault(path, e))
}

pub(super) fn fault(path: &Path, error: PolarsError) -> Error {
    Error::Corrupt { path: path.into(), reason: error.to_string() }
}

fn column<'f>(frame: &'f DataFrame, path: &Path, name: &str) -> Result<&'f Column> {
    frame.column(name).map_err(|e| fault(path, e))
}

/// A column of unsigned integers.
pub(super) fn integers(frame: &DataFrame, path: &Path, name: &str) -> Result<Vec<u64>> {
    let cast = column(frame, path, name)?.cast(&DataType::UInt64).map_err(|e| fault(path, e))?;
    let values = cast.u64().map_err(|e| fault(path, e))?;
    Ok(values.iter().map(Option::unwrap_or_default).collect())
}

/// A column of numbers or truth values (0 and 1), NaN for null.
pub(super) fn numbers(frame: &DataFrame, path: &Path, name: &str) -> Result<Vec<f64>> {
    let cast = column(frame, path, name)?.cast(&DataType::Float64).map_err(|e| fault(path, e))?;
    let values = cast.f64().map_err(|e| fault(path, e))?;
    Ok(values.iter().map(|value| value.unwrap_or(f64::NAN)).collect())
}

/// A column of texts.
pub(super) fn texts(frame: &DataFrame, path: &Path, name: &str) -> Result<Vec<Option<String>>> {
    let cast = column(frame, path, name)?.cast(&DataType::String).map_err(|e| fault(path, e))?;
    let values = cast.str().map_err(|e| fault(path, e))?;
    Ok((0..frame.height()).map(|row| values.get(row).map(str::to_owned)).collect())
}

/// The ids of documents, as they are written: numbers whose first byte is the highest.
pub(super) fn ids(frame: &DataFrame, path: &Path) -> Result<Vec<Digest>> {
    let column = column(frame, path, "id")?;
    let values = column.binary().map_err(|e| fault(path, e))?;
    let id = |row: usize| values.get(row).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok());
    let missing = || Error::Corrupt { path: path.into(), reason: "a document without an id of 16 bytes".into() };
    (0..frame.height()).map(|row| id(row).map(|id| Digest(u128::from_be_bytes(id))).ok_or_else(missing)).collect()
}

/// A stage that decides on documents: its shards are one to one with those of `ingest` and hold what is left after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DocumentStage<'s> {
    /// Name.
    pub name: &'s str,
    /// Whether it writes the documents themselves, with the texts as they are from here on.
    pub texts: bool,
}

/// The stages that decide on the documents of the recipe as it is ([`decisive`]), in the order of the run. What they write
/// says which they are, so that none has to be entered anywhere: rows with `id` and `ordinal`, and either texts or dropped
/// documents beside them (signals are no decision).
pub(super) fn document_stages<'s>(run_dir: &Path, stages: &'s [StageSummary]) -> Result<Vec<DocumentStage<'s>>> {
    let mut found = Vec::new();
    for summary in decisive(stages).into_iter().filter(|s| s.done > 0) {
        let dir = run_dir.join(&summary.stage);
        let (mut kept, mut drops) = (None, false);
        for file in Journal::read(&dir)?.into_values().flat_map(|entry| entry.files) {
            let below = file.path.parent().map(Path::as_os_str).unwrap_or_default();
            if file.path.extension().is_some_and(|e| e == "parquet") {
                drops |= below == "dropped";
                kept = kept.or_else(|| below.is_empty().then(|| dir.join(&file.path)));
            }
        }
        let Some(kept) = kept else { continue };
        let names = columns(&kept)?;
        let has = |name: &str| names.iter().any(|n| n == name);
        if has("id") && has("ordinal") && (has("text") || drops) {
            found.push(DocumentStage { name: &summary.stage, texts: has("text") });
        }
    }
    Ok(found)
}
