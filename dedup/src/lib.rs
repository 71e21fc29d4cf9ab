//! Deduplication: stages that read the text of documents once and pass on small records.
//!
//! Documents are dense numbers: rows of the shards of a stage, one shard after the other. What is kept of
//! them on disk is sorted runs of fixed-width records ([`runs`]), which any task reads by a range of keys; so
//! every step is a radix partition of bounded size. A stage's output is in the end the selection of the
//! documents that stay, and a dropped document is written down with its cluster and its survivor.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod ascii;
mod buckets;
mod decontaminate;
mod disk;
mod documents;
mod english;
mod evaluation;
mod exact;
mod functions;
mod lines;
pub mod minhash;
pub mod near;
pub mod normalise;
mod numpy_random;
mod partition;
mod paths;
pub mod permutations;
mod removals;
mod runs;
mod selection;
pub mod shingles;
mod substring;
#[cfg(test)]
#[path = "../tests/support/mod.rs"]
mod support;
mod survivor;
mod texts;
mod unicode_tables;
mod union_find;
pub mod words;
mod xxh64;

pub use decontaminate::{Action, Benchmark, DecontaminateConfig, DecontaminateStage};
pub use exact::{ExactConfig, Key, exact_stages};
pub use functions::udfs;
pub use lines::{LINES, LinesConfig, Method, Unit, line_stages};
pub use minhash::Mode;
pub use near::{NearConfig, Verify, near_stages};
pub use paths::Places;
pub use substring::{Measure, SUBSTRING, SubstringConfig, substring_stages, substring_stages_cut};
pub use survivor::Keep;
