//! The trainer: TransNormerLLM on Burn, on the CPU or a CUDA GPU chosen at run time.
//!
//! [`config`] holds the settings, [`model`] the network over the operations of [`ops`],
//! [`published`] the layout other programs read.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod batch;
pub mod config;
mod error;
pub mod model;
pub mod ops;
pub mod parameters;
pub mod rng;

pub use batch::Batch;
pub use error::Error;
pub use model::Model;
