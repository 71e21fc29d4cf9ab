//! Rows of a token shard for people: what each token stands for.

use std::fs::File;
use std::path::{Path, PathBuf};

use arrow::array::AsArray;
use arrow::compute::cast;
use arrow::datatypes::{DataType, UInt32Type, UInt64Type};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::Serialize;

use crate::encoder::Encoder;
use crate::error::{Error, Result};
use crate::loader::ShardReader;
use crate::shard::ShardMetadata;
use crate::stages::tokenizer_path;

/// A document of a token shard.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TokenRow {
    /// The document's id, hexadecimal.
    pub id: String,
    /// Its source.
    pub source: String,
    /// Bytes of its text.
    pub bytes: u64,
    /// How many tokens it has.
    pub tokens: usize,
    /// Its first tokens.
    pub ids: Vec<u32>,
    /// What each of them stands for. Bytes that are no text of their own (parts of a character) are written
    /// `⟨E4⟩`, a line feed `⏎`.
    pub pieces: Vec<String>,
}

/// The first `rows` rows of a shard with at most `tokens` tokens of each, and what the footer says.
///
/// `tokenizer` is the `tokenizer.json`; without it the one of the run that the shard lies in.
///
/// # Errors
/// If the file is no token shard, or the tokenizer is not the one that made it.
pub fn token_rows(
    path: &Path,
    tokenizer: Option<&Path>,
    rows: usize,
    tokens: usize,
) -> Result<(ShardMetadata, Vec<TokenRow>)> {
    let metadata = ShardReader::open(path)?.metadata().clone();
    let encoder = match tokenizer {
        Some(path) => Encoder::load(path)?,
        None => Encoder::load(tokenizer_of(path)?)?,
    };
    if encoder.digest() != metadata.tokenizer {
        let (made_by, given) = (metadata.tokenizer, encoder.digest());
        return Err(Error::Tokenizer {
            path: encoder.path().into(),
            reason: format!(
                "its checksum is {given}, but {} was made with {made_by}: give that one with --tokenizer",
                path.display()
            ),
        });
    }
    let fault = |reason: String| Error::Shard { path: path.into(), row_group: None, reason };
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| fault(e.to_string()))?;
    let reader = reader.with_limit(rows).with_batch_size(64).build().map_err(|e| fault(e.to_string()))?;
    let mut found = Vec::new();
    for batch in reader {
        let batch = batch.map_err(|e| fault(e.to_string()))?;
        let column = |name: &str| batch.column_by_name(name).ok_or_else(|| fault(format!("no column {name}")));
        let as_type = |name: &str, to: &DataType| cast(column(name)?, to).map_err(|e| fault(e.to_string()));
        let ids = column("id")?.clone();
        let ids = ids.as_fixed_size_binary_opt().ok_or_else(|| fault("ids are not of a fixed size".into()))?;
        let (sources, bytes) = (as_type("source", &DataType::Utf8)?, as_type("bytes", &DataType::UInt64)?);
        let lists = column("tokens")?.clone();
        let lists = lists.as_list_opt::<i32>().ok_or_else(|| fault("tokens are not lists".into()))?;
        for row in 0..batch.num_rows() {
            let list = cast(&lists.value(row), &DataType::UInt32).map_err(|e| fault(e.to_string()))?;
            let mut ids_of_row = list.as_primitive::<UInt32Type>().values().to_vec();
            let count = ids_of_row.len();
            ids_of_row.truncate(tokens);
            found.push(TokenRow {
                id: ids.value(row).iter().map(|byte| format!("{byte:02x}")).collect(),
                source: sources.as_string::<i32>().value(row).into(),
                bytes: bytes.as_primitive::<UInt64Type>().value(row),
                tokens: count,
                pieces: ids_of_row.iter().map(|&id| visible(&encoder, id)).collect(),
                ids: ids_of_row,
            });
        }
    }
    Ok((metadata, found))
}

/// The tokenizer of the run that a shard lies in: `RUN/tokens/part-00000.parquet`.
fn tokenizer_of(shard: &Path) -> Result<PathBuf> {
    let shard = std::path::absolute(shard).map_err(|e| Error::io(shard, e))?;
    let run = shard.parent().and_then(Path::parent);
    let path = run.map(tokenizer_path).filter(|path| path.exists());
    path.ok_or_else(|| Error::Tokenizer {
        path: shard,
        reason: "there is no tokenizer beside its directory; give the tokenizer.json with --tokenizer".into(),
    })
}

/// What a token stands for, on one line.
fn visible(encoder: &Encoder, id: u32) -> String {
    let Some(bytes) = encoder.token_bytes(id) else { return format!("⟨no token {id}⟩") };
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\n' => text.push('⏎'),
                '\t' => text.push('⇥'),
                c if c.is_control() => text.extend(c.escape_default()),
                c => text.push(c),
            }
        }
        text.extend(chunk.invalid().iter().map(|byte| format!("⟨{byte:02X}⟩")));
    }
    text
}
