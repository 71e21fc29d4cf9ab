//! Steps of a training run on random tokens: time, memory, and where the time goes.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;
use serde::Serialize;

use crate::config::{Sharding, TrainConfig};
use crate::cuda::profile::{Span, Total, totals};
use crate::cuda::{COMMUNICATION, EXPOSED};
use crate::engine::{self, Engine, Snapshot};
use crate::estimate::model_flops_per_token;
use crate::parallel::{Collective, Team};
use crate::rng::Rng;
use crate::{Batch, Error, model};

/// What a step takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepTime {
    /// Ranks, a GPU each.
    pub world: usize,
    /// What they share.
    pub sharding: Sharding,
    /// Trained values.
    pub parameters: usize,
    /// Predicted tokens of a step, of all ranks together.
    pub tokens_per_step: u64,
    /// Median over groups of steps, by the host's clock.
    pub step_ms: f64,
    /// From that.
    pub tokens_per_s: f64,
    /// Model operations over what the devices can do at best, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Bytes of a device's memory that are taken after the steps, the most of all ranks; its pools never shrink.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Bytes of it that were taken before the first step: weights, moments, gradients and what libraries need.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_before_bytes: Option<u64>,
    /// Bytes of the weights, gradients and moments of rank 0, counted buffer by buffer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_bytes: Option<u64>,
    /// Collectives of one step, where there are other ranks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub communication: Option<Communication>,
    /// Loss of the first and of the last step.
    pub loss: [f64; 2],
    /// Time of one step by phase and kernel, the longest first; with gaps between kernels left out.
    pub kernels: Vec<Total>,
}

/// What goes between the GPUs in one step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Communication {
    /// Milliseconds of all collectives, waiting for slower ranks included.
    pub total_ms: f64,
    /// Milliseconds in which this GPU did nothing else.
    pub exposed_ms: f64,
}

impl Communication {
    /// The share of the time of collectives that is spent beside products, from 0 to 1.
    pub fn hidden(&self) -> f64 {
        if self.total_ms > 0.0 { (1.0 - self.exposed_ms / self.total_ms).max(0.0) } else { 1.0 }
    }

    fn of(spans: &[Span]) -> Option<Self> {
        let sum = |phase| spans.iter().filter(|span| span.phase == phase).map(|span| span.duration_us / 1e3).sum();
        let has_any = spans.iter().any(|span| span.phase == COMMUNICATION);
        has_any.then(|| Self { total_ms: sum(COMMUNICATION), exposed_ms: sum(EXPOSED) })
    }
}

/// Steps that are timed together: the device works through them without a word to the host.
const GROUP: usize = 5;

/// Takes `steps` steps with `config` on tokens that are drawn anew for every step, after a few for warming up. All ranks of
/// `group` call it together and get the same, but for the kernels, the memory before and the communication of each.
///
/// # Errors
/// [`Error::Config`] for settings that do not fit, and what the step gives.
pub fn training(
    device: &Device,
    config: &TrainConfig,
    group: &Arc<dyn Collective>,
    steps: usize,
) -> Result<StepTime, Error> {
    config.validate()?;
    let world = group.world();
    let team = Team::new(group, config)?;
    let shard = team.partition(config).places(team.inner.rank());
    let snapshot = Snapshot::fresh(model::initial_shard(&config.model, config.seed, &shard));
    let mut engine = engine::start(config, device, group, snapshot)?;
    let memory_before_bytes = engine.memory_bytes();
    let batches: Vec<Batch> = (0..GROUP as u64).map(|seed| random(config, seed, team.rows())).collect();
    let rate = config.optimizer.peak_learning_rate;
    let together = |engine: &mut dyn Engine| -> Result<f64, Error> {
        group.barrier()?;
        let begin = Instant::now();
        batches.iter().try_for_each(|batch| engine.step(batch, rate))?;
        // Waits for the device.
        engine.outcome()?;
        Ok(begin.elapsed().as_secs_f64() / GROUP as f64)
    };
    engine.step(&batches[0], rate)?;
    let first = engine.outcome()?.loss;
    together(engine.as_mut())?;
    let mut times = Vec::new();
    for _ in 0..steps.div_ceil(GROUP).max(1) {
        times.push(together(engine.as_mut())?);
    }
    times.sort_by(f64::total_cmp);
    let step_s = times[times.len() / 2];
    let last = engine.outcome()?.loss;
    engine.record();
    engine.step(&batches[0], rate)?;
    engine.outcome()?;
    let spans = engine.recorded()?;
    let memory_bytes = engine.memory_bytes();
    let said = group.exchange(&memory_bytes.unwrap_or(0).to_le_bytes())?;
    let most = said.iter().filter_map(|bytes| <[u8; 8]>::try_from(&bytes[..]).ok().map(u64::from_le_bytes)).max();
    let tokens_per_s = config.tokens_per_step() as f64 / step_s;
    let operations_per_s = tokens_per_s * model_flops_per_token(config);
    Ok(StepTime {
        world,
        sharding: config.sharding,
        parameters: config.model.parameters(),
        tokens_per_step: config.tokens_per_step(),
        step_ms: 1e3 * step_s,
        tokens_per_s,
        mfu: engine.peak_flops().map(|peak| operations_per_s / (peak * world as f64)),
        memory_bytes: memory_bytes.and(most),
        memory_before_bytes,
        state_bytes: engine.state_bytes(),
        communication: Communication::of(&spans),
        loss: [first, last],
        kernels: totals(&spans),
    })
}

/// The rows of rank so and so of so many, of a batch that is the same for any number of ranks.
fn random(config: &TrainConfig, seed: u64, (rank, world): (usize, usize)) -> Batch {
    let (rows, width) = (config.batch * config.gradient_accumulation, config.sequence_length + 1);
    let mut rng = Rng::new(seed, 0);
    let vocabulary = config.model.vocab_size as u64;
    let tokens: Vec<u32> = (0..rows * width).map(|_| (rng.next_u64() % vocabulary) as u32).collect();
    let own = rows * rank / world..rows * (rank + 1) / world;
    let tokens = tokens[own.start * width..own.end * width].to_vec();
    Batch { tokens, starts: vec![vec![0]; own.len()], length: config.sequence_length }
}
