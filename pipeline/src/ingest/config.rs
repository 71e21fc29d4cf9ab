//! What a recipe says about its input.

use serde::{Deserialize, Serialize};

use crate::shard::TextCompression;

/// Settings of the ingest stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IngestConfig {
    /// Bytes of input (as stored, compressed or not) per task and output shard. Files that can be
    /// read from the middle are cut at this size, small files are read together up to it, and a
    /// compressed file is never cut.
    pub split_bytes: u64,
    /// A longer record (line, text, WARC record, decompressed HTTP body) is quarantined as
    /// `too_long`. Also what a reader holds in memory at most for one record.
    pub max_record_bytes: usize,
    /// The stage stops after this many records that could not be read. Records that were read and
    /// hold no document (an empty text, an HTTP error page) do not count.
    pub max_bad_records: u64,
    /// How the texts of the shards are compressed: `zstd:1` to `zstd:22`, or `none`, which takes three times the
    /// disk for English and spares half of the time of this stage and some of each that reads them. Texts that later
    /// stages write are not of it.
    pub compression: TextCompression,
    /// The inputs; documents keep this order, then the order of the file names.
    pub inputs: Vec<InputConfig>,
}

impl Default for IngestConfig {
    fn default() -> Self {
        Self {
            split_bytes: 64 << 20,
            max_record_bytes: 64 << 20,
            max_bad_records: 1000,
            compression: TextCompression::default(),
            inputs: Vec::new(),
        }
    }
}

/// One named source of documents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputConfig {
    /// Name of the source: becomes the column `source` of its documents.
    pub source: String,
    /// Files, directories (all files below, hidden ones left out) and globs (`*` stays within one
    /// directory, `**` does not), relative to the recipe's directory.
    pub paths: Vec<String>,
    /// Format of the files.
    #[serde(default)]
    pub format: InputFormat,
    /// Which field of a record becomes which column.
    #[serde(default)]
    pub fields: FieldMapping,
}

/// Format of an input's files. Compression is always told by the extension (`.gz`, `.zst`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InputFormat {
    /// By extension: `.warc`, `.wet`, `.jsonl`, `.ndjson`, `.json`, `.parquet`, `.txt`, `.text`, `.md`.
    #[default]
    Auto,
    /// WARC: HTML and text responses, and the conversion records of WET files.
    Warc,
    /// The same as `warc`: what a record holds is decided record by record.
    Wet,
    /// One JSON object per line.
    Jsonl,
    /// Parquet with one row per document.
    Parquet,
    /// Plain UTF-8 text, one document per file.
    Text,
}

/// Names of the fields that hold a document's columns. In JSON a name may be a dotted path into
/// nested objects; in Parquet a dotted path into structs; in WARC the names of headers apply to
/// `metadata` alone, because the format says where the rest is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FieldMapping {
    /// The text; required in every record.
    pub text: String,
    /// The record's own identifier, kept as `id` in the metadata. The document's `id` is always the
    /// hash of file and place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Where it was found.
    pub url: String,
    /// Language code.
    pub language: String,
    /// When it was fetched or written: RFC 3339, a date, or Unix time in seconds or milliseconds. What
    /// cannot be read as a time is kept in the metadata under this name.
    pub timestamp: String,
    /// Fields to keep as JSON in the column `metadata`.
    pub metadata: Vec<String>,
}

impl Default for FieldMapping {
    fn default() -> Self {
        Self {
            text: "text".into(),
            id: None,
            url: "url".into(),
            language: "language".into(),
            timestamp: "timestamp".into(),
            metadata: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_written_out_and_unknown_keys_refused() {
        let config: IngestConfig = toml::from_str("[[inputs]]\nsource = \"web\"\npaths = [\"a/*.warc.gz\"]\n").unwrap();
        let written = toml::to_string(&config).unwrap();
        for key in [
            "split_bytes = 67108864",
            "max_bad_records = 1000",
            "compression = \"zstd:1\"",
            "format = \"auto\"",
            "text = \"text\"",
            "metadata = []",
        ] {
            assert!(written.contains(key), "{key} in\n{written}");
        }
        assert_eq!(toml::from_str::<IngestConfig>(&written).unwrap(), config);
        assert!(toml::from_str::<IngestConfig>("split_byte = 3\n").is_err());
        let none: IngestConfig = toml::from_str("compression = \"none\"\n").unwrap();
        assert_eq!(none.compression, TextCompression::None);
        let error = toml::from_str::<IngestConfig>("compression = \"lz4\"\n").unwrap_err().to_string();
        assert!(error.contains("zstd:1 to zstd:22"), "{error}");
        assert!(
            toml::from_str::<IngestConfig>("[[inputs]]\nsource = \"a\"\npaths = []\n[inputs.fields]\ntxt = \"a\"\n")
                .is_err()
        );
    }
}
