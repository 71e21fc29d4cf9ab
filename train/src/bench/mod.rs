//! What `fulgurite bench` measures.

mod attention;
mod training;

pub use attention::{AttentionShape, AttentionTime, attention};
pub use training::{StepTime, training};
