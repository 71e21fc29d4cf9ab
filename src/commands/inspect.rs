//! `fulgurite inspect`

use std::path::Path;

use anyhow::{Context, Result};
use datafusion::prelude::{ParquetReadOptions, SessionContext};
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde::Serialize;

use crate::cli::{Inspect, InspectCloser, InspectTokens};
use crate::commands::existing;
use crate::commands::run::runtime;
use crate::exit::Usage;
use crate::output::{self, bytes, thousands};

/// Look into one file or directory of a run.
pub fn inspect(args: &Inspect) -> Result<()> {
    if let Some(InspectCloser::Tokens(args)) = &args.closer {
        return tokens(args);
    }
    let Some(path) = &args.path else {
        return Err(
            Usage("say what to look into: a shard, a manifest, a journal, a checkpoint or a model".into()).into()
        );
    };
    let path = existing(path)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if path.is_dir() {
        return directory(path, args.json);
    }
    if name.ends_with(".parquet") {
        shard(path, args)
    } else if name.ends_with(".json") {
        let value: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path)?).with_context(|| path.display().to_string())?;
        output::json(&value)
    } else if name == "journal.jsonl" {
        journal(path, args.json)
    } else {
        Err(Usage(format!("{}: not a shard, a manifest, a journal, a checkpoint or a model", path.display())).into())
    }
}

#[derive(Serialize)]
struct ShardFacts {
    path: String,
    bytes: u64,
    rows: u64,
    row_groups: usize,
    created_by: Option<String>,
    metadata: Vec<(String, String)>,
    columns: Vec<ColumnFacts>,
}

#[derive(Serialize)]
struct ColumnFacts {
    name: String,
    r#type: String,
    compressed_bytes: i64,
    uncompressed_bytes: i64,
}

fn shard(path: &Path, args: &Inspect) -> Result<()> {
    let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    let size = file.metadata()?.len();
    let reader = SerializedFileReader::new(file).with_context(|| path.display().to_string())?;
    let metadata = reader.metadata();
    let schema = metadata.file_metadata().schema_descr();
    let sum = |c: usize, f: fn(&parquet::file::metadata::ColumnChunkMetaData) -> i64| {
        metadata.row_groups().iter().map(|g| f(g.column(c))).sum()
    };
    let facts = ShardFacts {
        path: path.display().to_string(),
        bytes: size,
        rows: metadata.file_metadata().num_rows() as u64,
        row_groups: metadata.num_row_groups(),
        created_by: metadata.file_metadata().created_by().map(String::from),
        metadata: metadata
            .file_metadata()
            .key_value_metadata()
            .into_iter()
            .flatten()
            .map(|kv| (kv.key.clone(), kv.value.clone().unwrap_or_default()))
            .collect(),
        columns: (0..schema.num_columns())
            .map(|c| ColumnFacts {
                name: schema.column(c).path().string(),
                r#type: match schema.column(c).logical_type_ref() {
                    Some(logical) => format!("{logical:?}"),
                    None => schema.column(c).physical_type().to_string(),
                },
                compressed_bytes: sum(c, |m| m.compressed_size()),
                uncompressed_bytes: sum(c, |m| m.uncompressed_size()),
            })
            .collect(),
    };
    if args.json {
        return output::json(&facts);
    }
    output::line(format!(
        "{}: {} rows in {} row groups, {}",
        facts.path,
        thousands(facts.rows),
        facts.row_groups,
        bytes(facts.bytes)
    ))?;
    for (key, value) in &facts.metadata {
        output::line(format!("{key} = {value}"))?;
    }
    let mut rows = vec![["column", "type", "stored", "plain"].map(String::from).to_vec()];
    rows.extend(facts.columns.iter().map(|c| {
        vec![c.name.clone(), c.r#type.clone(), bytes(c.compressed_bytes as u64), bytes(c.uncompressed_bytes as u64)]
    }));
    output::line(output::table(&rows))?;
    if args.rows > 0 {
        let batches = runtime(None)?.block_on(async {
            let url = pipeline::stage::file_url(path)?;
            let options = ParquetReadOptions { file_extension: "", ..Default::default() };
            anyhow::Ok(
                SessionContext::new().read_parquet(url, options).await?.limit(0, Some(args.rows))?.collect().await?,
            )
        })?;
        for (i, row) in rows_of(&batches)?.into_iter().enumerate() {
            output::line(format!("\nrow {i}\n{row}"))?;
        }
    }
    Ok(())
}

/// Documents of a token shard: a header, then the tokens between bars.
fn tokens(args: &InspectTokens) -> Result<()> {
    let path = &args.shard;
    let (metadata, rows) = tokenize::inspect::token_rows(path, args.tokenizer.as_deref(), args.rows, args.tokens)?;
    if args.json {
        for row in &rows {
            output::line(serde_json::to_string(row)?)?;
        }
        return Ok(());
    }
    output::line(format!(
        "{}: {} tokens of {} documents{}, vocabulary {}, tokenizer {}, seed {}",
        path.display(),
        thousands(metadata.tokens),
        thousands(metadata.documents),
        metadata.source.map(|source| format!(" of {source}")).unwrap_or_default(),
        thousands(metadata.vocabulary_size.into()),
        metadata.tokenizer,
        metadata.seed
    ))?;
    for row in &rows {
        let more = match row.tokens - row.ids.len() {
            0 => String::new(),
            more => format!("… {} more", thousands(more as u64)),
        };
        output::line(format!(
            "\ndocument {} of {}: {} bytes, {} tokens, {:.2} bytes a token\n│{}│{more}",
            row.id,
            row.source,
            thousands(row.bytes),
            thousands(row.tokens as u64),
            row.bytes as f64 / row.tokens.max(1) as f64,
            row.pieces.join("│")
        ))?;
    }
    Ok(())
}

/// Rows one under the other, a column a line: documents are too long for a table.
fn rows_of(batches: &[arrow::array::RecordBatch]) -> Result<Vec<String>> {
    const SHOWN: usize = 400;
    let mut rows = Vec::new();
    for batch in batches {
        for r in 0..batch.num_rows() {
            let mut text = String::new();
            for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
                let value = arrow::util::display::array_value_to_string(column, r)?;
                let mut shown: String = value.chars().take(SHOWN).collect();
                if shown.len() < value.len() {
                    shown.push_str(&format!("… ({} bytes)", thousands(value.len() as u64)));
                }
                text.push_str(&format!("  {}: {shown}\n", field.name()));
            }
            rows.push(text.trim_end().to_string());
        }
    }
    Ok(rows)
}

fn journal(path: &Path, json: bool) -> Result<()> {
    let entries = pipeline::Journal::read(path.parent().unwrap_or(Path::new(".")))?;
    let entries: Vec<_> = entries.into_values().collect();
    if json {
        return output::json(&entries);
    }
    let mut rows = vec![["task", "read", "kept", "dropped", "files", "size", "seconds"].map(String::from).to_vec()];
    rows.extend(entries.iter().map(|e| {
        vec![
            e.task.to_string(),
            thousands(e.rows_read),
            thousands(e.rows_kept),
            thousands(e.dropped.values().sum()),
            e.files.iter().map(|f| f.path.display().to_string()).collect::<Vec<_>>().join(" "),
            bytes(e.files.iter().map(|f| f.bytes).sum()),
            format!("{:.2}", e.seconds),
        ]
    }));
    Ok(output::line(output::table(&rows))?)
}

/// A checkpoint or a published model; a stage directory shows its manifest.
fn directory(path: &Path, json: bool) -> Result<()> {
    if let Some(manifest) = pipeline::Manifest::load(path)? {
        return output::json(&manifest);
    }
    let facts = train::describe(path)?;
    if json {
        return output::json(&facts);
    }
    for (key, value) in &facts.facts {
        output::line(format!("{key} = {value}"))?;
    }
    let mut rows = vec![["tensor", "type", "shape"].map(String::from).to_vec()];
    rows.extend(facts.tensors.iter().map(|t| vec![t.name.clone(), t.dtype.clone(), format!("{:?}", t.shape)]));
    Ok(output::line(output::table(&rows))?)
}
