//! The tokens of one row group.

use std::io::Read;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use parquet::basic::{Encoding, Type};
use parquet::column::page::{Page, PageReader};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;
use pipeline::digest::Digest;

use crate::shard::TokensDigest;

/// Decoded documents, one after the other.
#[derive(Default)]
pub struct Documents {
    /// Their tokens.
    pub tokens: Vec<u32>,
    /// Where each begins.
    pub starts: Vec<u32>,
}

/// Number of the leaf column that holds the tokens.
pub fn token_column(footer: &ParquetMetaData) -> Result<usize, String> {
    let columns = footer.file_metadata().schema_descr().columns();
    let column = columns.iter().position(|c| c.path().parts().first().is_some_and(|name| name == "tokens"));
    let number = column.ok_or("no column tokens")?;
    let column = &columns[number];
    if column.physical_type() != Type::INT32 || column.max_rep_level() != 1 || column.max_def_level() > 1 {
        return Err("tokens are not lists of integers".into());
    }
    Ok(number)
}

/// Where the bytes of a row group's tokens lie in the file.
pub fn byte_range(footer: &ParquetMetaData, row_group: usize, column: usize) -> Range<u64> {
    let (start, length) = footer.row_group(row_group).column(column).byte_range();
    start..start + length
}

/// Decode the tokens of a row group into `documents`, from the bytes at [`byte_range`], and check them
/// against the footer: their number, every id (`expected.0` is the size of the vocabulary) and the checksum.
///
/// Pages are as [`crate::shard::TokenShardWriter`] writes them, so they are read without the general
/// machinery of columns, which would make a number of every level of every token.
pub fn decode(
    footer: &ParquetMetaData,
    row_group: usize,
    column: usize,
    bytes: Bytes,
    expected: (u32, Digest),
    documents: &mut Documents,
) -> Result<(), String> {
    let metadata = footer.row_group(row_group);
    let chunk = metadata.column(column);
    let (rows, promised) = (metadata.num_rows() as usize, chunk.num_values() as usize);
    let reader = Chunk { base: chunk.byte_range().0, bytes };
    let mut pages = SerializedPageReader::new(Arc::new(reader), chunk, rows, None).map_err(|e| e.to_string())?;
    let definition = footer.file_metadata().schema_descr().column(column).max_def_level();
    let Documents { tokens, starts } = documents;
    tokens.clear();
    starts.clear();
    while let Some(page) = pages.get_next_page().map_err(|e| e.to_string())? {
        let Page::DataPage { buf, num_values, encoding: Encoding::BYTE_STREAM_SPLIT, .. } = page else {
            return Err("its pages are not as this program writes them".into());
        };
        let torn = || "a page is shorter than it says".to_string();
        let (first, count) = (tokens.len(), num_values as usize);
        if first + count > promised {
            break;
        }
        let (repetition, rest) = levels(&buf).ok_or_else(torn)?;
        // A token is there at every place: only a document without tokens has another level.
        let (definition_levels, values) = levels(rest).ok_or_else(torn)?;
        let all = each_run(definition_levels, definition, count, |_, level| level == definition as u8);
        if all != Some(true) {
            return Err("a document without tokens, or a token that is null".into());
        }
        let found = each_run(repetition, 1, count, |places, level| {
            if level == 0 {
                starts.extend(places.map(|at| (first + at) as u32));
            }
            true
        });
        found.ok_or_else(torn)?;
        if values.len() != 4 * count {
            return Err(torn());
        }
        // Stream k has the k-th byte of every id.
        let (low, high) = values.split_at(2 * count);
        let ((a, b), (c, d)) = (low.split_at(count), high.split_at(count));
        tokens
            .extend(a.iter().zip(b).zip(c.iter().zip(d)).map(|((&a, &b), (&c, &d))| u32::from_le_bytes([a, b, c, d])));
    }
    let (vocabulary_size, checksum) = expected;
    let count = tokens.len();
    if count != promised || starts.len() != rows {
        let found = starts.len();
        return Err(format!("{count} tokens of {found} documents, the footer promises {promised} of {rows}"));
    }
    if let Some(id) = tokens.iter().max().filter(|&&id| id >= vocabulary_size) {
        return Err(format!("token {id}, but the vocabulary has {vocabulary_size}"));
    }
    if checksum != TokensDigest::of(tokens, starts) {
        return Err("its tokens fail their checksum".into());
    }
    Ok(())
}

/// The levels at the beginning of a page or of what is left of one, and what follows: four bytes say how
/// long they are.
fn levels(page: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = page.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}

/// Call `run` with the places and the value of each run of `count` levels below 2, in Parquet's hybrid of
/// run-length encoding and bit packing; whether it was content with all of them. `None` if there are fewer.
fn each_run(
    mut levels: &[u8],
    largest: i16,
    count: usize,
    mut run: impl FnMut(Range<usize>, u8) -> bool,
) -> Option<bool> {
    if largest == 0 {
        return Some(true);
    }
    let (mut at, mut content) = (0, true);
    while at < count {
        // A varint: the number of levels, or of groups of eight packed ones, and which of them in its last bit.
        let (mut header, mut shift) = (0u64, 0);
        loop {
            let (&byte, rest) = levels.split_first()?;
            levels = rest;
            header |= u64::from(byte & 0x7F) << shift;
            shift += 7;
            if byte < 0x80 {
                break;
            }
            if shift > 28 {
                return None;
            }
        }
        let length = (header >> 1) as usize;
        if header & 1 == 0 {
            let (&value, rest) = levels.split_first()?;
            levels = rest;
            let end = at.saturating_add(length).min(count);
            content &= run(at..end, value);
            at = end;
        } else {
            let (packed, rest) = levels.split_at_checked(length)?;
            levels = rest;
            for &byte in packed {
                for bit in 0..8.min(count - at) {
                    content &= run(at + bit..at + bit + 1, byte >> bit & 1);
                }
                at = (at + 8).min(count);
            }
        }
        if length == 0 {
            return None;
        }
    }
    Some(content)
}

/// A part of a file, at its place in it.
struct Chunk {
    base: u64,
    bytes: Bytes,
}

impl Chunk {
    fn from(&self, start: u64, length: Option<usize>) -> ParquetResult<Bytes> {
        let outside = || ParquetError::EOF(format!("bytes from {start} on are not in the column"));
        let from = start.checked_sub(self.base).ok_or_else(outside)? as usize;
        let to = length.map_or(Some(self.bytes.len()), |length| from.checked_add(length)).ok_or_else(outside)?;
        match from <= to && to <= self.bytes.len() {
            true => Ok(self.bytes.slice(from..to)),
            false => Err(outside()),
        }
    }
}

impl Length for Chunk {
    fn len(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }
}

impl ChunkReader for Chunk {
    type T = Box<dyn Read>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        Ok(Box::new(self.from(start, None)?.reader()))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        self.from(start, Some(length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(levels: &[u8], count: usize) -> Option<Vec<u8>> {
        let mut all = Vec::new();
        each_run(levels, 1, count, |places, value| {
            assert_eq!(places.start, all.len());
            all.resize(places.end, value);
            true
        })?;
        Some(all)
    }

    #[test]
    fn levels_are_runs_or_packed_bits() {
        // Five ones; then a group of eight bits, lowest first.
        assert_eq!(
            expanded(&[5 << 1, 1, 1 << 1 | 1, 0b1000_0110], 13).unwrap(),
            [1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 1]
        );
        // The last group may be longer than there are levels.
        assert_eq!(expanded(&[1 << 1 | 1, 0b0000_0010], 3).unwrap(), [0, 1, 0]);
        // 300 in two bytes of a varint.
        assert_eq!(expanded(&[0xD8, 0x04, 0], 300).unwrap(), [0; 300]);
        for torn in [&[][..], &[4], &[0, 1], &[0xFF], &[0xFF; 9], &[3]] {
            assert_eq!(expanded(torn, 10), None);
        }
    }
}
