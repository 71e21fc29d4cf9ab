//! What takes the steps of a run: the tape of Burn in float32, or the block by block form in bf16 on CUDA.
//!
//! Both hold the same flat buffers in float32 (weights and two moments), so a checkpoint of one is a
//! checkpoint of the other.

mod block;
pub(crate) mod decoder;
mod mixed;
mod tape;
mod weights;

use burn::tensor::Device;

pub use decoder::Decoder;
pub use mixed::Mixed;

use crate::config::{Moments, Precision, Recompute, TrainConfig};
use crate::cuda::{self, profile::Span};
use crate::generate::Reader;
use crate::ops::is_cuda;
use crate::parameters::ParameterList;
use crate::{Batch, Error};
use tape::Tape;

/// Weights and moments in float32, in the order of the parameter list, and the steps taken with them.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// The weights.
    pub values: Vec<f32>,
    /// The first moments.
    pub first: Vec<f32>,
    /// The second moments.
    pub second: Vec<f32>,
    /// Steps that the optimizer has taken.
    pub taken: u64,
    /// Steps that it has not taken, since the gradient was no number.
    pub skipped: u64,
}

impl Snapshot {
    /// What there is before the first step.
    pub fn fresh(values: Vec<f32>) -> Self {
        let zeros = || vec![0f32; values.len()];
        Self { first: zeros(), second: zeros(), values, taken: 0, skipped: 0 }
    }
}

/// What became of the last step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Mean cross-entropy of its batch in nats, before the update (without the z-loss).
    pub loss: f64,
    /// Norm of all gradients together before clipping.
    pub grad_norm: f64,
    /// Steps that were not taken so far, since the gradient was no number.
    pub skipped: u64,
    /// Those since the last step that was taken.
    pub skipped_last: u64,
}

/// A copy of the state that is on its way out of the device.
pub type Pending = Box<dyn FnOnce() -> Result<Snapshot, Error> + Send>;

/// Takes the steps of a run.
pub trait Engine {
    /// Puts the step of `batch` on its way, with this learning rate. Does not wait for a device.
    ///
    /// # Errors
    /// [`Error::Input`] when the batch does not fit its own sizes or the vocabulary.
    fn step(&mut self, batch: &Batch, rate: f64) -> Result<(), Error>;

    /// What became of the last step. Waits for the device.
    ///
    /// # Errors
    /// When the device has failed.
    fn outcome(&mut self) -> Result<Outcome, Error>;

    /// Whether [`Engine::outcome`] costs nothing, so that it may be asked after every step.
    fn is_synchronous(&self) -> bool;

    /// Mean cross-entropy in nats over the predicted tokens of `batch`.
    ///
    /// # Errors
    /// As [`Engine::step`], and when the device has failed.
    fn loss(&self, batch: &Batch) -> Result<f64, Error>;

    /// The weights and moments after the last step, to be waited for elsewhere: the next step may be put on its way
    /// meanwhile.
    ///
    /// # Errors
    /// When the device has failed.
    fn snapshot(&mut self) -> Result<Pending, Error>;

    /// A reader with the weights after the last step, that has read nothing.
    fn reader(&self) -> Box<dyn Reader + '_>;

    /// Records from now on what the device does, where that can be told.
    fn record(&mut self) {}

    /// Ends the recording and gives it. Waits for the device.
    ///
    /// # Errors
    /// When the device has failed.
    fn recorded(&mut self) -> Result<Vec<Span>, Error> {
        Ok(Vec::new())
    }

    /// Bytes of the device's memory that are taken, by anyone, where that can be told.
    fn memory_bytes(&self) -> Option<u64> {
        None
    }

    /// Floating-point operations per second that the device can do at best in this precision, where known.
    fn peak_flops(&self) -> Option<f64> {
        None
    }
}

fn failed(error: cuda::Error) -> Error {
    Error::Device { device: "cuda".to_owned(), reason: error.to_string() }
}

/// The engine that `config` asks for on `device`, at `snapshot`.
///
/// # Errors
/// [`Error::Config`] when it cannot run there.
pub fn start(config: &TrainConfig, device: &Device, snapshot: Snapshot) -> Result<Box<dyn Engine>, Error> {
    let list = ParameterList::of(&config.model);
    if snapshot.values.len() != list.total() {
        let reason = format!("{} values for {} parameters", snapshot.values.len(), list.total());
        return Err(Error::Input(reason));
    }
    let mixed = match config.precision {
        Precision::Float32 => false,
        Precision::Bf16 if !is_cuda(device) => {
            return Err(Error::config("precision", "bf16 needs a CUDA device; \"auto\" is float32 on the CPU"));
        }
        Precision::Bf16 => {
            Mixed::check(config).map_err(|reason| Error::config("precision", reason))?;
            true
        }
        Precision::Auto if is_cuda(device) => match Mixed::check(config) {
            Ok(()) => true,
            Err(reason) => {
                tracing::warn!("training in float32, which is several times slower: {reason}");
                false
            }
        },
        Precision::Auto => false,
    };
    if mixed {
        return Ok(Box::new(Mixed::new(config, device, snapshot)?));
    }
    if config.optimizer.moments == Moments::Bf16 {
        let reason = "\"bf16\" belongs to the step in bf16 on a CUDA device; this run computes in float32";
        return Err(Error::config("optimizer.moments", reason));
    }
    if config.activation_checkpointing != Recompute::None {
        tracing::warn!(
            "activation_checkpointing belongs to the step in bf16; in float32 every block keeps what it made"
        );
    }
    Ok(Box::new(Tape::new(config, device, snapshot)?))
}
