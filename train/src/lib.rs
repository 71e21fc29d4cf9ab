//! The trainer: TransNormerLLM on Burn, on the CPU or a CUDA GPU chosen at run time.
//!
//! [`config`] holds the settings, [`model`] the network over the operations of [`ops`],
//! [`published`] the layout other programs read, [`evaluate()`] the loss on given sequences and
//! [`mod@generate`] the recurrent form that writes text.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod batch;
pub mod bench;
pub mod checkpoint;
pub mod config;
pub mod cuda;
mod data;
pub mod device;
pub mod engine;
mod error;
pub mod estimate;
mod evaluate;
mod files;
pub mod generate;
pub mod job;
mod locate;
pub mod model;
pub mod ops;
pub mod optimizer;
pub mod parallel;
pub mod parameters;
pub mod published;
pub mod rng;
pub mod run;
pub mod samples;
pub mod scaling;
pub mod schedule;
pub mod stage;
pub mod tensorboard;
mod tensors;

pub use batch::Batch;
pub use config::{ModelConfig, TrainConfig};
pub use error::Error;
pub use evaluate::{Evaluation, evaluate, evaluate_model};
pub use locate::{ModelFacts, TensorFacts, describe, locate};
pub use model::Model;
pub use stage::TrainStage;
