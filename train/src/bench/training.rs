//! Steps of a training run on random tokens: time, memory, and where the time goes.

use std::time::Instant;

use burn::tensor::Device;
use serde::Serialize;

use crate::config::TrainConfig;
use crate::cuda::profile::{Total, totals};
use crate::engine::{self, Engine, Snapshot};
use crate::estimate::model_flops_per_token;
use crate::rng::Rng;
use crate::{Batch, Error, model};

/// What a step takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepTime {
    /// Trained values.
    pub parameters: usize,
    /// Predicted tokens of a step.
    pub tokens_per_step: u64,
    /// Median over groups of steps, by the host's clock.
    pub step_ms: f64,
    /// From that.
    pub tokens_per_s: f64,
    /// Model operations over what the device can do at best, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Bytes of the device's memory that are taken after the steps; its pools never shrink.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Loss of the first and of the last step.
    pub loss: [f64; 2],
    /// Time of one step by phase and kernel, the longest first; with gaps between kernels left out.
    pub kernels: Vec<Total>,
}

/// Steps that are timed together: the device works through them without a word to the host.
const GROUP: usize = 5;

/// Takes `steps` steps with `config` on tokens that are drawn anew for every step, after a few for warming up.
///
/// # Errors
/// [`Error::Config`] for settings that do not fit, and what the step gives.
pub fn training(device: &Device, config: &TrainConfig, steps: usize) -> Result<StepTime, Error> {
    config.validate()?;
    let snapshot = Snapshot::fresh(model::initial_values(&config.model, config.seed));
    let mut engine = engine::start(config, device, snapshot)?;
    let batches: Vec<Batch> = (0..GROUP as u64).map(|seed| random(config, seed)).collect();
    let rate = config.optimizer.peak_learning_rate;
    let group = |engine: &mut dyn Engine| -> Result<f64, Error> {
        let begin = Instant::now();
        batches.iter().try_for_each(|batch| engine.step(batch, rate))?;
        // Waits for the device.
        engine.outcome()?;
        Ok(begin.elapsed().as_secs_f64() / GROUP as f64)
    };
    engine.step(&batches[0], rate)?;
    let first = engine.outcome()?.loss;
    group(engine.as_mut())?;
    let mut times = Vec::new();
    for _ in 0..steps.div_ceil(GROUP).max(1) {
        times.push(group(engine.as_mut())?);
    }
    times.sort_by(f64::total_cmp);
    let step_s = times[times.len() / 2];
    let last = engine.outcome()?.loss;
    engine.record();
    engine.step(&batches[0], rate)?;
    engine.outcome()?;
    let kernels = totals(&engine.recorded()?);
    let tokens_per_s = config.tokens_per_step() as f64 / step_s;
    Ok(StepTime {
        parameters: config.model.parameters(),
        tokens_per_step: config.tokens_per_step(),
        step_ms: 1e3 * step_s,
        tokens_per_s,
        mfu: engine.peak_flops().map(|peak| tokens_per_s * model_flops_per_token(config) / peak),
        memory_bytes: engine.memory_bytes(),
        loss: [first, last],
        kernels,
    })
}

fn random(config: &TrainConfig, seed: u64) -> Batch {
    let rows = config.batch * config.gradient_accumulation;
    let mut rng = Rng::new(seed, 0);
    let vocabulary = config.model.vocab_size as u64;
    let tokens = (0..rows * (config.sequence_length + 1)).map(|_| (rng.next_u64() % vocabulary) as u32).collect();
    Batch { tokens, starts: vec![vec![0]; rows], length: config.sequence_length }
}
