//! Deduplication: stages that read the text of documents once and pass on small columns.
//!
//! Every stage is a [`pipeline::Stage`] whose tasks are DataFusion plans over the functions of this
//! crate. Documents are addressed by ordinal; a stage's output is the selection of the documents
//! that stay, and a dropped document is written down with its cluster and its survivor.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod clusters;
mod english;
mod exact;
mod functions;
pub mod minhash;
mod near;
pub mod normalise;
mod numpy_random;
mod partition;
mod selection;
mod survivor;
mod unicode_tables;
mod union_find;
pub mod words;

pub use exact::{ExactConfig, Key, exact_stages};
pub use functions::udfs;
pub use near::{Mode, NearConfig, near_stages};
pub use survivor::Keep;
