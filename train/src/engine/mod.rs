//! What takes the steps of a run: block by block in float32 on the CPU or in bf16 on CUDA, or on one tape in float32 on
//! CUDA, for the sizes that have no form in bf16.
//!
//! All hold the same values in float32 (weights and two moments, cut as [`crate::parallel::Partition`] says), so a checkpoint of one is a
//! checkpoint of the others.

mod block;
pub(crate) mod decoder;
mod host;
mod join;
mod mixed;
mod partners;
mod relay;
mod shards;
mod tape;
mod weights;

use std::sync::Arc;

use burn::tensor::Device;

pub use decoder::Decoder;
pub use mixed::Mixed;
pub(crate) use weights::shared;

use crate::config::{Moments, Precision, Recompute, TrainConfig};
use crate::cuda::{self, profile::Span};
use crate::generate::Reader;
use crate::ops::{is_cuda, is_flex};
use crate::parallel::{Collective, Team};
use crate::{Batch, Error};
use host::Host;
use tape::Tape;

/// The shard of one rank: weights and moments in float32 of its pieces of all buckets, one after the other, and the
/// steps taken with them. The shard of one rank alone is everything, in the order of the parameter list.
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

/// Takes the steps of a run. Of several ranks each has one, and all call the same methods in the same order.
pub trait Engine {
    /// Puts the step of `batch` on its way, with this learning rate: of this rank's rows of the global batch. Does not wait
    /// for a device.
    ///
    /// # Errors
    /// [`Error::Input`] when the batch does not fit its own sizes or the vocabulary, [`Error::Rank`] when another rank
    /// fails.
    fn step(&mut self, batch: &Batch, rate: f64) -> Result<(), Error>;

    /// What became of the last step, the same on all ranks. Waits for the device.
    ///
    /// # Errors
    /// When the device has failed.
    fn outcome(&mut self) -> Result<Outcome, Error>;

    /// Whether [`Engine::outcome`] costs nothing, so that it may be asked after every step.
    fn is_synchronous(&self) -> bool;

    /// Mean cross-entropy in nats over the predicted tokens of `batch`, which is the same on all ranks: they share the work.
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

    /// On rank 0 a reader with the weights after the last step, that has read nothing and holds those of the whole model; the
    /// other ranks give it what it needs.
    ///
    /// # Errors
    /// When the device or another rank has failed.
    fn reader(&mut self) -> Result<Option<Box<dyn Reader + '_>>, Error>;

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

    /// Bytes of weights, gradients and moments that this rank had at the fullest moment of the last step, counted over the
    /// buffers that there were.
    fn state_bytes(&self) -> Option<u64> {
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

/// The engine that `config` asks for on `device`, for this rank of `group`, at the `snapshot` of its shard.
///
/// # Errors
/// [`Error::Config`] when it cannot run there, [`Error::Rank`] when another rank fails.
pub fn start(
    config: &TrainConfig,
    device: &Device,
    group: &Arc<dyn Collective>,
    snapshot: Snapshot,
) -> Result<Box<dyn Engine>, Error> {
    let team = Team::new(group, config)?;
    let count = team.partition(config).shard_len(team.inner.rank());
    if [&snapshot.values, &snapshot.first, &snapshot.second].iter().any(|values| values.len() != count) {
        let reason = format!("{} values for {count} parameters", snapshot.values.len());
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
        shared(&config.model, team.tensor.world())?;
        relay::check(config.sequence_length, team.sequence.world())
            .map_err(|reason| Error::config("sequence_ranks", reason))?;
        return Ok(Box::new(Mixed::new(config, device, team, snapshot)?));
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
    if is_flex(device) {
        return Ok(Box::new(Host::new(config, device, team, snapshot)?));
    }
    if group.world() > 1 {
        let reason = "several ranks train in bf16 on CUDA devices, or in float32 on CPUs; this run is float32 on CUDA";
        return Err(Error::config("precision", reason));
    }
    Ok(Box::new(Tape::new(config, device, snapshot)?))
}
