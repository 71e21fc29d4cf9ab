//! What `fulgurite bench` measures.

mod attention;
mod ceilings;
mod collectives;
mod generation;
mod training;

pub use attention::{AttentionShape, AttentionTime, attention};
pub use ceilings::{Ceilings, ceilings};
pub use collectives::{CollectiveTime, collectives};
pub use generation::{GenerationTime, generation};
pub use training::{Communication, StepTime, training};
