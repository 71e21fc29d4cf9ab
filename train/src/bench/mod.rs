//! What `fulgurite bench` measures.

mod attention;
mod generation;
mod training;

pub use attention::{AttentionShape, AttentionTime, attention};
pub use generation::{GenerationTime, generation};
pub use training::{StepTime, training};
