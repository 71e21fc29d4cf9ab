//! Raw files in: WARC and WET, JSON lines, Parquet and plain text become rows of documents.
//!
//! The files of a recipe are listed once ([`listing`]) and cut into tasks by size alone ([`splits`]).
//! A task scans its splits through a DataFusion [file source](scan) whose rows carry, beside the
//! columns of a document, a rule: null for a document, the reason for a record that did not become
//! one. So a bad record is data like any other: counted, kept with file, place and excerpt, never lost
//! and never the end of a shard. Readers hold one record and one batch, whatever the size of the file.

pub(crate) mod bad;
mod bytes;
mod charset;
pub mod config;
pub mod extract;
mod formulas;
mod http;
mod json;
mod lines;
pub mod listing;
mod members;
mod parquet;
pub mod rows;
pub(crate) mod scan;
pub mod splits;
#[cfg(test)]
mod tests;
mod text;
mod texts;
mod tree;
mod warc;
mod window;

pub use config::{FieldMapping, IngestConfig, InputConfig, InputFormat};
pub use listing::{Compression, FileFormat, InputFile, Listing};
pub use rows::Reason;
pub use splits::Split;
pub use texts::for_each_text;
