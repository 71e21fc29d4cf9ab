//! Rows of a token shard for people: what each token stands for.

use std::fs::File;
use std::path::{Path, PathBuf};

use arrow::array::AsArray;
use arrow::compute::cast;
use arrow::datatypes::{DataType, UInt64Type};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::Serialize;

use crate::encoder::Encoder;
use crate::error::{Error, Result};
use crate::loader::{Documents, ShardReader};
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
/// If the file is no token shard or damaged (its row groups are checked against their checksums), or the tokenizer is
/// not the one that made it.
pub fn token_rows(
    path: &Path,
    tokenizer: Option<&Path>,
    rows: usize,
    tokens: usize,
) -> Result<(ShardMetadata, Vec<TokenRow>)> {
    let shard = ShardReader::open(path)?;
    let metadata = shard.metadata().clone();
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
    // Everything but the tokens, which the reader of the loader checks.
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| fault(e.to_string()))?;
    let columns = ProjectionMask::columns(reader.parquet_schema(), ["id", "source", "bytes"]);
    let reader = reader.with_projection(columns).with_limit(rows).with_batch_size(64);
    let mut found = Vec::new();
    for batch in reader.build().map_err(|e| fault(e.to_string()))? {
        let batch = batch.map_err(|e| fault(e.to_string()))?;
        let column = |name: &str| batch.column_by_name(name).ok_or_else(|| fault(format!("no column {name}")));
        let as_type = |name: &str, to: &DataType| cast(column(name)?, to).map_err(|e| fault(e.to_string()));
        let ids = column("id")?.clone();
        let ids = ids.as_fixed_size_binary_opt().ok_or_else(|| fault("ids are not of a fixed size".into()))?;
        let (sources, bytes) = (as_type("source", &DataType::Utf8)?, as_type("bytes", &DataType::UInt64)?);
        for row in 0..batch.num_rows() {
            found.push(TokenRow {
                id: ids.value(row).iter().map(|byte| format!("{byte:02x}")).collect(),
                source: sources.as_string::<i32>().value(row).into(),
                bytes: bytes.as_primitive::<UInt64Type>().value(row),
                tokens: 0,
                ids: Vec::new(),
                pieces: Vec::new(),
            });
        }
    }
    let mut left = found.iter_mut();
    let mut documents = Documents::default();
    for group in 0..metadata.row_groups.len() {
        if left.len() == 0 {
            break;
        }
        shard.read(group, &mut documents)?;
        let Documents { tokens: ids, starts } = &documents;
        let ends = starts.iter().skip(1).map(|&next| next as usize).chain([ids.len()]);
        for ((&start, end), row) in starts.iter().zip(ends).zip(&mut left) {
            let ids = &ids[start as usize..end];
            row.tokens = ids.len();
            row.ids = ids.iter().copied().take(tokens).collect();
            row.pieces = row.ids.iter().map(|&id| visible(&encoder, id)).collect();
        }
    }
    match left.len() {
        0 => Ok((metadata, found)),
        more => Err(fault(format!("{more} of its rows have no tokens"))),
    }
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
