//! The stages of this crate, one file each.

pub mod clean;
pub mod curate;
pub mod filter;
pub mod ingest;
pub mod mix;
pub mod signals;
pub mod urls;
