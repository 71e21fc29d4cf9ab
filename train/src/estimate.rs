//! What a run will take, told before anything is allocated: parameters, memory, operations, time.
//!
//! Memory counts the tensors of [`crate::engine`]'s step in bf16 one by one. Time is that of the products at a
//! share of the GPU's best rate plus that of all other bytes at a share of its memory's, the shares as measured
//! on an H200 (docs/kernels.md).

use serde::Serialize;

use crate::config::{Moments, Recompute, TrainConfig};
use crate::cuda;
use crate::ops::cross_entropy::LOGIT_BYTES;
use crate::parameters::ParameterList;

/// What is known of a GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// bf16 products with float32 sums, operations per second, at best.
    pub peak_flops: f64,
    /// Bytes per second between it and its memory, at best.
    pub bandwidth: f64,
    /// Bytes of its memory.
    pub memory_bytes: u64,
}

impl Gpu {
    /// The one that the estimate stands for where none is at hand.
    pub fn h200() -> Self {
        Self { name: "NVIDIA H200".into(), peak_flops: 989.4e12, bandwidth: 4.8e12, memory_bytes: 150_754_820_096 }
    }
}

/// What is known of this machine's GPU of this index; nothing when its rates are not known.
pub fn gpu_at(index: u32) -> Option<Gpu> {
    let facts = cuda::device_facts(index).ok()?;
    Some(Gpu {
        peak_flops: facts.peak_bf16_flops()?,
        bandwidth: facts.bandwidth()?,
        memory_bytes: facts.memory,
        name: facts.name,
    })
}

/// Share of the best rate that products reach, and of the memory's that everything else does.
const PRODUCTS: f64 = 0.66;
const BYTES: f64 = 0.75;

/// What one setting of activation checkpointing takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Variant {
    /// The setting.
    pub activation_checkpointing: Recompute,
    /// Bytes that blocks keep between forward and backward.
    pub activation_bytes: u64,
    /// Bytes at the fullest moment.
    pub peak_bytes: u64,
    /// Operations per trained token, those made again included.
    pub hardware_flops_per_token: f64,
    /// Seconds a step.
    pub step_s: f64,
    /// Predicted tokens per second.
    pub tokens_per_s: f64,
    /// Model operations over what the GPU can do.
    pub mfu: f64,
}

/// What a run will take on one GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Trained values.
    pub parameters: u64,
    /// Bytes of weights: float32 and the bf16 copy.
    pub weight_bytes: u64,
    /// Bytes of the sums of gradients, float32.
    pub gradient_bytes: u64,
    /// Bytes of the two moments.
    pub optimizer_bytes: u64,
    /// Operations per trained token, forward and backward: see [`model_flops_per_token`].
    pub flops_per_token: f64,
    /// Predicted tokens of a step.
    pub tokens_per_step: u64,
    /// The GPU it is for.
    pub gpu: Gpu,
    /// The configured setting first.
    pub variants: Vec<Variant>,
}

/// Operations of forward and backward per token, a multiplication and an addition counted as two: 6 for each
/// weight of a matrix but the embedding's, and 12·E·K a layer for the attention in its recurrent form (2K in place of
/// K where LRPE is). What checkpointing makes again is not counted: this is the numerator of MFU (PaLM, arXiv
/// 2204.02311, appendix B).
pub fn model_flops_per_token(config: &TrainConfig) -> f64 {
    3.0 * (block_flops(config) + head_flops(config))
}

fn head_flops(config: &TrainConfig) -> f64 {
    2.0 * (config.model.vocab_size * config.model.decoder_embed_dim) as f64
}

/// Forward of all blocks.
fn block_flops(config: &TrainConfig) -> f64 {
    (0..config.model.decoder_layers).map(|layer| layer_flops(config, layer)).sum()
}

fn layer_flops(config: &TrainConfig, layer: usize) -> f64 {
    let model = &config.model;
    let (d, e, g) = (model.decoder_embed_dim, model.hidden_dim, model.glu_dim);
    let features = if model.uses_lrpe(layer) { 2 * model.head_dim() } else { model.head_dim() };
    (2 * (5 * e * d + 3 * d * g) + 4 * e * features) as f64
}

/// The estimate of `config` for `gpu`, with the configured activation checkpointing and the others beside it.
pub fn estimate(config: &TrainConfig, gpu: Gpu) -> Estimate {
    // One rank has whole rows and whole blocks.
    let config = &TrainConfig { sequence_ranks: 1, tensor_ranks: 1, ..config.clone() };
    let parameters = ParameterList::of(&config.model).total() as u64;
    let mut settings = vec![config.activation_checkpointing];
    for other in [Recompute::None, Recompute::Every { every: 2 }, Recompute::Full] {
        if !settings.contains(&other) {
            settings.push(other);
        }
    }
    Estimate {
        parameters,
        weight_bytes: 6 * parameters,
        gradient_bytes: 4 * parameters,
        optimizer_bytes: moment_bytes(config) * parameters,
        flops_per_token: model_flops_per_token(config),
        tokens_per_step: config.tokens_per_step(),
        variants: settings.into_iter().map(|setting| variant(config, &gpu, setting, parameters)).collect(),
        gpu,
    }
}

/// Bytes of both moments of a weight.
pub(crate) fn moment_bytes(config: &TrainConfig) -> u64 {
    match config.optimizer.moments {
        Moments::Float32 => 8,
        Moments::Bf16 => 4,
    }
}

/// What a part of a step does for a token.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// Operations of products.
    pub(crate) flops: f64,
    /// Bytes that everything else reads and writes.
    pub(crate) bytes: f64,
}

impl Cost {
    /// How long it takes for `tokens` tokens.
    pub(crate) fn seconds(self, tokens: f64, gpu: &Gpu) -> f64 {
        tokens * (self.flops / (PRODUCTS * gpu.peak_flops) + self.bytes / (BYTES * gpu.bandwidth))
    }
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), |a, b| Self { flops: a.flops + b.flops, bytes: a.bytes + b.bytes })
    }
}

/// The forward of a block: norms, gate, product and attention read and write.
pub(crate) fn forward_cost(config: &TrainConfig, layer: usize) -> Cost {
    let model = &config.model;
    let bytes = 8 * model.decoder_embed_dim + 14 * model.hidden_dim + 6 * model.glu_dim;
    Cost { flops: layer_flops(config, layer), bytes: bytes as f64 }
}

/// Its backward, with the forward once more where it is made `again`.
pub(crate) fn backward_cost(config: &TrainConfig, layer: usize, again: bool) -> Cost {
    let model = &config.model;
    let bytes = 20 * model.decoder_embed_dim + 26 * model.hidden_dim + 12 * model.glu_dim;
    let own = Cost { flops: 2.0 * layer_flops(config, layer), bytes: bytes as f64 };
    [Some(own), again.then(|| forward_cost(config, layer))].into_iter().flatten().sum()
}

/// The head with its loss and the embedding, forward and backward.
pub(crate) fn head_cost(config: &TrainConfig) -> Cost {
    let bytes = 10 * config.model.vocab_size + 12 * config.model.decoder_embed_dim;
    Cost { flops: 3.0 * head_flops(config), bytes: bytes as f64 }
}

/// The update of `parameters` values. The norm reads the gradient; the update reads it again with weights and moments,
/// which it writes in their types.
pub(crate) fn optimizer_seconds(config: &TrainConfig, parameters: f64, gpu: &Gpu) -> f64 {
    (18 + 2 * moment_bytes(config)) as f64 * parameters / (BYTES * gpu.bandwidth)
}

/// Bytes that the blocks keep of a micro batch, and all bytes of one at the fullest moment.
pub(crate) fn activation_bytes(config: &TrainConfig, setting: Recompute) -> (u64, u64) {
    let model = &config.model;
    let (d, e, g) = (model.decoder_embed_dim, model.hidden_dim, model.glu_dim);
    let again: Vec<bool> = (0..model.decoder_layers).map(|layer| setting.again(layer)).collect();
    let tokens = config.tokens_of_rank();
    // Bytes per token, two a value.
    let products = 4 * d + 10 * e + 4 * g;
    // Ranks that share blocks keep the stream between the mixers too, which is not sent again.
    let began = if config.tensor_ranks > 1 { 4 * d } else { 2 * d };
    let kept: usize = again.iter().map(|&again| if again { began } else { products }).sum();
    let made_again = if again.contains(&true) { products } else { 0 };
    let transient = made_again + 2 * d + (8 * g).max(12 * e + 4 * d);
    let logits = LOGIT_BYTES.min(2 * model.vocab_size.next_multiple_of(8) * tokens);
    let head = 6 * d * tokens + logits;
    ((kept * tokens) as u64, (kept * tokens + (transient * tokens).max(head)) as u64)
}

fn variant(config: &TrainConfig, gpu: &Gpu, setting: Recompute, parameters: u64) -> Variant {
    let (activation_bytes, with_transient) = activation_bytes(config, setting);
    let blocks = (0..config.model.decoder_layers)
        .flat_map(|layer| [forward_cost(config, layer), backward_cost(config, layer, setting.again(layer))]);
    let cost: Cost = blocks.chain([head_cost(config)]).sum();
    let step_tokens = config.tokens_per_step() as f64;
    let step_s = cost.seconds(step_tokens, gpu) + optimizer_seconds(config, parameters as f64, gpu);
    Variant {
        activation_checkpointing: setting,
        activation_bytes,
        // Weights in both types, gradients, moments.
        peak_bytes: (10 + moment_bytes(config)) * parameters + with_transient,
        hardware_flops_per_token: cost.flops,
        step_s,
        tokens_per_s: step_tokens / step_s,
        mfu: model_flops_per_token(config) * step_tokens / step_s / gpu.peak_flops,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;

    fn config() -> TrainConfig {
        let model = ModelConfig::named("385m").unwrap();
        TrainConfig { model, batch: 16, sequence_length: 2048, ..TrainConfig::default() }
    }

    #[test]
    fn the_published_385m_has_its_parameters_and_operations() {
        let told = estimate(&config(), Gpu::h200());
        // Two tables of 64000 x 1024, 24 blocks of 5 + 3 * 2.75 squares, 1024 angles.
        let square = 1024 * 1024;
        let matrices = 24 * (5 * square + 3 * 1024 * 2816);
        assert_eq!(told.parameters, 2 * 64000 * 1024 + matrices + 1024);
        let attention = 12.0 * 1024.0 * (23.0 * 128.0 + 256.0);
        let want = 6.0 * (matrices + 64000 * 1024) as f64 + attention;
        assert!((told.flops_per_token / want - 1.0).abs() < 1e-12);
    }

    #[test]
    fn checkpointing_trades_memory_for_time() {
        let told = estimate(&config(), Gpu::h200());
        let [none, half, full] = &told.variants[..] else { panic!("{told:?}") };
        assert_eq!(none.activation_checkpointing, Recompute::None);
        assert!(none.peak_bytes > half.peak_bytes && half.peak_bytes > full.peak_bytes);
        assert!(none.tokens_per_s > half.tokens_per_s && half.tokens_per_s > full.tokens_per_s);
        // The full form makes the forward of the blocks, not of the head, once more.
        assert!(full.hardware_flops_per_token < told.flops_per_token * 4.0 / 3.0);
        assert!(full.hardware_flops_per_token > told.flops_per_token * 1.2);
    }

    #[test]
    fn the_configured_setting_comes_first() {
        let config = TrainConfig { activation_checkpointing: Recompute::Every { every: 3 }, ..config() };
        let told = estimate(&config, Gpu::h200());
        assert_eq!(told.variants.len(), 4);
        assert_eq!(told.variants[0].activation_checkpointing, Recompute::Every { every: 3 });
    }
}
