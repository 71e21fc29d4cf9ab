//! The settings of a model and of a training run, as they stand in a recipe.

use serde::{Deserialize, Serialize};
use tokenize::loader::{BufferConfig, DataConfig};

use crate::Error;

/// The sizes of a TransNormerLLM.
///
/// In a recipe (`[train.model]`) a table may name one of the paper's sizes and override keys of it:
/// `size = "385m"`, `vocab_size = 32000`. What is left out comes from the named size, or from the
/// `tiny` size without one; written out, the table holds every key and no `size`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "ModelTable")]
pub struct ModelConfig {
    /// Number of token ids. 0 stands for "as many as the tokenizer has" and has to be replaced
    /// before a model is made.
    pub vocab_size: usize,
    /// D, the width of the residual stream.
    pub decoder_embed_dim: usize,
    /// L, the number of blocks.
    pub decoder_layers: usize,
    /// H, the number of attention heads; divides `hidden_dim`.
    pub decoder_attention_heads: usize,
    /// E = H·K, the summed width of the heads.
    pub hidden_dim: usize,
    /// G, the width inside the SGLU.
    pub glu_dim: usize,
    /// Per layer 1 where queries and keys get LRPE, else 0.
    pub linear_use_lrpe_list: Vec<u8>,
    /// Leaves out the factor √D on the embeddings.
    pub no_scale_embedding: bool,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
    /// Id that pads a batch.
    pub pad_token_id: u32,
    /// Id that begins a document.
    pub bos_token_id: u32,
    /// Id that ends a document; generation stops at it.
    pub eos_token_id: u32,
}

/// [`ModelConfig`] as it is written by hand: every key optional, and `size` beside them.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelTable {
    size: Option<String>,
    vocab_size: Option<usize>,
    decoder_embed_dim: Option<usize>,
    decoder_layers: Option<usize>,
    decoder_attention_heads: Option<usize>,
    hidden_dim: Option<usize>,
    glu_dim: Option<usize>,
    linear_use_lrpe_list: Option<Vec<u8>>,
    no_scale_embedding: Option<bool>,
    init_std: Option<f64>,
    pad_token_id: Option<u32>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<u32>,
}

impl TryFrom<ModelTable> for ModelConfig {
    type Error = String;

    fn try_from(table: ModelTable) -> Result<Self, String> {
        let named = match &table.size {
            Some(name) => Self::named(name).ok_or_else(|| {
                let names: Vec<&str> = SIZES.iter().map(|size| size.0).collect();
                format!("no size \"{name}\"; there are {}", names.join(", "))
            })?,
            None => Self::default(),
        };
        // The derived widths follow the one they are derived from unless they are given.
        let embed_dim = table.decoder_embed_dim.unwrap_or(named.decoder_embed_dim);
        let layers = table.decoder_layers.unwrap_or(named.decoder_layers);
        let same_width = embed_dim == named.decoder_embed_dim;
        Ok(Self {
            vocab_size: table.vocab_size.unwrap_or(named.vocab_size),
            decoder_embed_dim: embed_dim,
            decoder_layers: layers,
            decoder_attention_heads: table.decoder_attention_heads.unwrap_or(named.decoder_attention_heads),
            hidden_dim: table.hidden_dim.unwrap_or(match same_width {
                true => named.hidden_dim,
                false => embed_dim,
            }),
            glu_dim: table.glu_dim.unwrap_or(match same_width {
                true => named.glu_dim,
                false => glu_dim(embed_dim),
            }),
            linear_use_lrpe_list: table.linear_use_lrpe_list.unwrap_or_else(|| lrpe_in_first_layer(layers)),
            no_scale_embedding: table.no_scale_embedding.unwrap_or(named.no_scale_embedding),
            init_std: table.init_std.unwrap_or(named.init_std),
            pad_token_id: table.pad_token_id.unwrap_or(named.pad_token_id),
            bos_token_id: table.bos_token_id.unwrap_or(named.bos_token_id),
            eos_token_id: table.eos_token_id.unwrap_or(named.eos_token_id),
        })
    }
}

/// Name, layers, width, heads: the paper's table (arXiv 2307.14995), and two sizes for a CPU.
const SIZES: [(&str, usize, usize, usize); 9] = [
    ("tiny", 4, 128, 4),
    ("small", 6, 256, 4),
    ("385m", 24, 1024, 8),
    ("1b", 16, 2048, 16),
    ("3b", 32, 2560, 20),
    ("7b", 30, 4096, 32),
    ("13b", 36, 5120, 40),
    ("65b", 72, 8192, 64),
    ("175b", 88, 12288, 96),
];

/// 8/3·D, rounded up to a multiple of 256 (of 64 below D = 512, where 256 is a large part).
fn glu_dim(embed_dim: usize) -> usize {
    let multiple = if embed_dim < 512 { 64 } else { 256 };
    (8 * embed_dim).div_ceil(3).next_multiple_of(multiple)
}

fn lrpe_in_first_layer(layers: usize) -> Vec<u8> {
    (0..layers).map(|layer| u8::from(layer == 0)).collect()
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self::sized(SIZES[0])
    }
}

impl ModelConfig {
    fn sized((_, layers, embed_dim, heads): (&str, usize, usize, usize)) -> Self {
        Self {
            vocab_size: if embed_dim < 512 { 0 } else { 64000 },
            decoder_embed_dim: embed_dim,
            decoder_layers: layers,
            decoder_attention_heads: heads,
            hidden_dim: embed_dim,
            glu_dim: glu_dim(embed_dim),
            linear_use_lrpe_list: lrpe_in_first_layer(layers),
            no_scale_embedding: false,
            init_std: 0.02,
            pad_token_id: 0,
            bos_token_id: 1,
            eos_token_id: 2,
        }
    }

    /// The smallest with all parts: two blocks, the first with LRPE.
    #[cfg(test)]
    pub(crate) fn smallest() -> Self {
        Self {
            vocab_size: 30,
            decoder_embed_dim: 8,
            decoder_layers: 2,
            decoder_attention_heads: 2,
            hidden_dim: 8,
            glu_dim: 12,
            linear_use_lrpe_list: vec![1, 0],
            ..Self::default()
        }
    }

    /// One of `tiny`, `small`, `385m`, `1b`, `3b`, `7b`, `13b`, `65b`, `175b`, in any case.
    pub fn named(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        SIZES.into_iter().find(|size| size.0 == name).map(Self::sized)
    }

    /// The names that [`ModelConfig::named`] knows, the smallest first.
    pub fn names() -> impl Iterator<Item = &'static str> {
        SIZES.into_iter().map(|size| size.0)
    }

    /// K = V, the width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_dim / self.decoder_attention_heads
    }

    /// Whether layer `layer` rotates its queries and keys.
    pub fn uses_lrpe(&self, layer: usize) -> bool {
        self.linear_use_lrpe_list[layer] != 0
    }

    /// What each of `ranks` ranks has of a block that they share, as the sizes of a smaller model: some of the heads, and of
    /// the channels inside the SGLU.
    ///
    /// # Errors
    /// [`Error::Config`] when they cannot be divided so, with the numbers of ranks that would do.
    pub fn part(&self, ranks: usize) -> Result<Self, Error> {
        let (heads, channels) = (self.decoder_attention_heads, self.glu_dim);
        let divides = |ranks: &usize| heads.is_multiple_of(*ranks) && channels.is_multiple_of(*ranks);
        if ranks == 0 || !divides(&ranks) {
            let fitting: Vec<String> = (1..=heads).filter(divides).map(|ranks| ranks.to_string()).collect();
            let reason = format!(
                "{ranks} ranks cannot share the {heads} heads and glu_dim = {channels} of a block; {} can",
                fitting.join(", ")
            );
            return Err(Error::config("tensor_ranks", reason));
        }
        Ok(Self {
            decoder_attention_heads: heads / ranks,
            hidden_dim: self.hidden_dim / ranks,
            glu_dim: channels / ranks,
            ..self.clone()
        })
    }

    /// Number of trained values.
    pub fn parameters(&self) -> usize {
        crate::parameters::ParameterList::of(self).total()
    }

    /// Checks that a model of these sizes can be made.
    ///
    /// # Errors
    /// [`Error::Config`] with the first key that does not fit.
    pub fn validate(&self) -> Result<(), Error> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("decoder_embed_dim", self.decoder_embed_dim),
            ("decoder_layers", self.decoder_layers),
            ("decoder_attention_heads", self.decoder_attention_heads),
            ("hidden_dim", self.hidden_dim),
            ("glu_dim", self.glu_dim),
        ];
        for (key, value) in positive {
            if value == 0 {
                return Err(Error::config(format!("model.{key}"), "has to be positive"));
            }
        }
        if !self.hidden_dim.is_multiple_of(self.decoder_attention_heads) {
            return Err(Error::config(
                "model.hidden_dim",
                format!(
                    "{} is not a multiple of decoder_attention_heads = {}",
                    self.hidden_dim, self.decoder_attention_heads
                ),
            ));
        }
        let lrpe = &self.linear_use_lrpe_list;
        if lrpe.len() != self.decoder_layers || lrpe.iter().any(|&flag| flag > 1) {
            return Err(Error::config(
                "model.linear_use_lrpe_list",
                format!("needs one 0 or 1 for each of the {} layers, has {lrpe:?}", self.decoder_layers),
            ));
        }
        for (key, id) in [
            ("bos_token_id", self.bos_token_id),
            ("eos_token_id", self.eos_token_id),
            ("pad_token_id", self.pad_token_id),
        ] {
            if id as usize >= self.vocab_size {
                return Err(Error::config(
                    format!("model.{key}"),
                    format!("{id} is not below vocab_size = {}", self.vocab_size),
                ));
            }
        }
        if !(self.init_std.is_finite() && self.init_std > 0.0) {
            return Err(Error::config("model.init_std", "has to be positive"));
        }
        Ok(())
    }
}

/// A training run: the `[train]` table of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Predicted tokens of one sequence; a sequence holds one token more.
    pub sequence_length: usize,
    /// Sequences of one micro batch.
    pub batch: usize,
    /// Micro batches whose gradients make one step, of all ranks together: the step is the same for any number of them.
    pub gradient_accumulation: usize,
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Seed of the initial weights and of the order of the data.
    pub seed: u64,
    /// A metrics line and a progress report every so many steps.
    pub log_every_steps: u64,
    /// A checkpoint every so many steps, and one after the last; 0 leaves only the last.
    pub checkpoint_every_steps: u64,
    /// Newest checkpoints that are kept; 0 keeps all.
    pub keep_checkpoints: usize,
    /// Checkpoints of steps that are a multiple of this are kept beside the newest; 0 keeps none for that.
    pub keep_checkpoint_every_steps: u64,
    /// What products and activations are computed in; weights are float32 always.
    pub precision: Precision,
    /// Blocks whose forward is made again in the backward, which saves their memory and costs their time.
    pub activation_checkpointing: Recompute,
    /// What each of several ranks keeps a part of alone (ZeRO, arXiv 1910.02054); one rank keeps everything.
    pub sharding: Sharding,
    /// Ranks, neighbours by their numbers, that share one copy of what is sharded, the others having copies of their own: best
    /// those of a host. 0 is all of them.
    pub hybrid: usize,
    /// Neighbouring ranks that share the tokens of every row, each of which has a part of it: for rows that are too long for
    /// one. From one to the next goes the state of the attention, whose size does not depend on the length. GPUs cut rows at
    /// multiples of 64 tokens.
    pub sequence_ranks: usize,
    /// Neighbouring ranks that share each block, of which each has some of the heads and of the channels inside the SGLU: for
    /// blocks that are too large for one. They see the same tokens.
    pub tensor_ranks: usize,
    /// What GPUs add up each other's gradients in.
    pub gradient_reduction: GradientReduction,
    /// Weight of the squared logarithm of the softmax's denominator in the loss (PaLM, arXiv 2204.02311,
    /// section 5); 0 is without.
    pub z_loss: f64,
    /// Steps in a row whose gradient is no number, each of which is skipped, before the run stops: looked at after every
    /// step on the CPU, on a GPU where a metric is read and where a checkpoint is written. Counted anew by each process.
    pub max_skipped_steps: u64,
    /// The sizes of the model.
    pub model: ModelConfig,
    /// AdamW and clipping.
    pub optimizer: OptimizerConfig,
    /// Learning rate over the steps.
    pub schedule: ScheduleConfig,
    /// Loss on held-out sequences.
    pub evaluation: EvaluationConfig,
    /// What the sequences are made of: packing, and the shares of the sources.
    pub data: DataConfig,
    /// What the loader of the sequences holds in memory.
    pub loader: BufferConfig,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            sequence_length: 256,
            batch: 8,
            gradient_accumulation: 1,
            steps: 1000,
            seed: 0,
            log_every_steps: 10,
            checkpoint_every_steps: 200,
            keep_checkpoints: 3,
            keep_checkpoint_every_steps: 0,
            precision: Precision::Auto,
            activation_checkpointing: Recompute::None,
            sharding: Sharding::None,
            hybrid: 0,
            sequence_ranks: 1,
            tensor_ranks: 1,
            gradient_reduction: GradientReduction::Float32,
            z_loss: 0.0,
            max_skipped_steps: 10,
            model: ModelConfig::default(),
            optimizer: OptimizerConfig::default(),
            schedule: ScheduleConfig::default(),
            evaluation: EvaluationConfig::default(),
            data: DataConfig::default(),
            loader: BufferConfig::default(),
        }
    }
}

impl TrainConfig {
    /// Predicted tokens of one optimizer step.
    pub fn tokens_per_step(&self) -> u64 {
        (self.sequence_length * self.batch * self.gradient_accumulation) as u64
    }

    /// Checks that a run can start with these settings.
    ///
    /// # Errors
    /// [`Error::Config`] with the first key that does not fit.
    pub fn validate(&self) -> Result<(), Error> {
        self.model.validate()?;
        for (key, value) in [
            ("sequence_length", self.sequence_length as u64),
            ("batch", self.batch as u64),
            ("gradient_accumulation", self.gradient_accumulation as u64),
            ("log_every_steps", self.log_every_steps),
            ("sequence_ranks", self.sequence_ranks as u64),
            ("tensor_ranks", self.tensor_ranks as u64),
        ] {
            if value == 0 {
                return Err(Error::config(key, "has to be positive"));
            }
        }
        self.model.part(self.tensor_ranks)?;
        if !(0.0..=1.0).contains(&self.z_loss) {
            return Err(Error::config("z_loss", format!("{} is not between 0 and 1", self.z_loss)));
        }
        if self.activation_checkpointing == (Recompute::Every { every: 0 }) {
            return Err(Error::config("activation_checkpointing.every", "has to be positive"));
        }
        self.data.validate().map_err(|error| Error::config("data", error.to_string()))?;
        self.loader.validate().map_err(|error| Error::config("loader", error.to_string()))?;
        self.optimizer.validate()?;
        self.schedule.validate(self.steps)
    }

    /// Tokens of a micro batch that one rank has, at most, where several share its rows.
    pub(crate) fn tokens_of_rank(&self) -> usize {
        self.batch * self.sequence_length.div_ceil(self.sequence_ranks.max(1))
    }

    /// Of `ranks` ranks how many together have one copy of what `sharding` cuts, those that share blocks among them.
    ///
    /// # Errors
    /// [`Error::Config`] when the ranks are no multiple of `hybrid`, `tensor_ranks` or, those that share blocks for one, of
    /// `sequence_ranks`, or `hybrid` is none of `tensor_ranks`.
    pub fn neighbours(&self, sharding: Sharding, ranks: usize) -> Result<usize, Error> {
        let size = match (sharding, self.hybrid) {
            (Sharding::None, _) | (_, 0) => ranks,
            (_, size) => size.min(ranks),
        };
        if !ranks.is_multiple_of(size) {
            return Err(Error::config("hybrid", format!("{ranks} ranks are not a multiple of {size}")));
        }
        let tensor = self.tensor_ranks.clamp(1, ranks);
        if !ranks.is_multiple_of(tensor) {
            return Err(Error::config("tensor_ranks", format!("{ranks} ranks are not a multiple of {tensor}")));
        }
        if !size.is_multiple_of(tensor) {
            let reason =
                format!("{size} ranks have one copy of the model, which is no multiple of tensor_ranks = {tensor}");
            return Err(Error::config("hybrid", reason));
        }
        let parts = self.sequence_ranks.clamp(1, ranks / tensor);
        let both = tensor * parts;
        if !ranks.is_multiple_of(both) || self.sequence_length < parts {
            let reason = format!("{ranks} ranks are not a multiple of {both}, or a row has fewer tokens");
            return Err(Error::config("sequence_ranks", reason));
        }
        Ok(size)
    }
}

/// What products and activations are computed in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// bf16 on CUDA for the sizes that have it, else float32.
    #[default]
    Auto,
    /// float32.
    Float32,
    /// bf16 with float32 sums; CUDA alone.
    Bf16,
}

/// What gradients are added up in between GPUs, and kept in until the step; on each they are made in float32. CPUs add in
/// float32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GradientReduction {
    /// float32.
    #[default]
    Float32,
    /// bf16: half as many bytes, with a rounding for every addition.
    Bf16,
}

/// What a rank keeps only its part of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharding {
    /// Nothing: gradients are added up over ranks, all of them take the whole step.
    #[default]
    None,
    /// The moments, and the weights as the optimizer has them (ZeRO 1).
    Optimizer,
    /// And gradients, once they are added up (ZeRO 2).
    Gradients,
    /// And the weights: those of a block are gathered when it is its turn (ZeRO 3).
    Full,
}

impl Sharding {
    /// All of them, the least first.
    pub const ALL: [Self; 4] = [Self::None, Self::Optimizer, Self::Gradients, Self::Full];

    /// As it is written in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Optimizer => "optimizer",
            Self::Gradients => "gradients",
            Self::Full => "full",
        }
    }
}

/// Blocks whose activations are not kept: `"none"`, `"full"` or `{ every = N }`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", untagged, try_from = "RecomputeValue")]
pub enum Recompute {
    /// Every block keeps what its products made.
    #[serde(serialize_with = "none")]
    None,
    /// Every block keeps its input alone.
    #[serde(serialize_with = "full")]
    Full,
    /// Every n-th block keeps its input alone.
    Every {
        /// n.
        every: usize,
    },
}

impl Recompute {
    /// Whether block `layer` is made again.
    pub fn again(self, layer: usize) -> bool {
        match self {
            Self::None => false,
            Self::Full => true,
            Self::Every { every } => layer.is_multiple_of(every.max(1)),
        }
    }
}

fn none<S: serde::Serializer>(to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str("none")
}

fn full<S: serde::Serializer>(to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str("full")
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RecomputeValue {
    Name(String),
    Every(RecomputeEvery),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RecomputeEvery {
    every: usize,
}

impl TryFrom<RecomputeValue> for Recompute {
    type Error = String;

    fn try_from(value: RecomputeValue) -> Result<Self, String> {
        match value {
            RecomputeValue::Name(name) if name == "none" => Ok(Self::None),
            RecomputeValue::Name(name) if name == "full" => Ok(Self::Full),
            RecomputeValue::Name(name) => Err(format!("\"{name}\" is not \"none\", \"full\" or {{ every = N }}")),
            RecomputeValue::Every(RecomputeEvery { every }) => Ok(Self::Every { every }),
        }
    }
}

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101) with clipping by the global norm; the defaults
/// are the paper's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Learning rate at the end of the warm-up.
    pub peak_learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Share of a weight that a step at learning rate 1 takes away. Matrices only, which includes
    /// the embedding and the output head; the angles of LRPE are not decayed.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; 0 turns clipping off.
    pub clip_norm: f64,
    /// What the moments are kept in.
    pub moments: Moments,
}

/// What AdamW's moments are kept in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moments {
    /// float32.
    #[default]
    Float32,
    /// bf16, rounded stochastically: 4 bytes a weight less. For the step in bf16 alone.
    Bf16,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            peak_learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
            moments: Moments::Float32,
        }
    }
}

impl OptimizerConfig {
    fn validate(&self) -> Result<(), Error> {
        let checks = [
            ("peak_learning_rate", self.peak_learning_rate, f64::MAX),
            ("beta1", self.beta1, 1.0 - f64::EPSILON),
            ("beta2", self.beta2, 1.0 - f64::EPSILON),
            ("epsilon", self.epsilon, f64::MAX),
            ("weight_decay", self.weight_decay, f64::MAX),
            ("clip_norm", self.clip_norm, f64::MAX),
        ];
        for (key, value, most) in checks {
            if !(0.0..=most).contains(&value) {
                return Err(Error::config(format!("optimizer.{key}"), format!("{value} is out of range")));
            }
        }
        Ok(())
    }
}

/// How the learning rate runs over the steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", try_from = "ScheduleTable")]
pub enum ScheduleConfig {
    /// Linear warm-up, then half a cosine down to a share of the peak, which it would reach one step after the last.
    Cosine(CosineConfig),
    /// Linear warm-up, constant, then a linear decay over the last steps (WSD, arXiv 2404.06395).
    WarmupStableDecay(WarmupStableDecayConfig),
}

/// See [`ScheduleConfig::Cosine`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CosineConfig {
    /// Steps until the peak; unset, a twentieth of the run, at most 2000.
    pub warmup_steps: Option<u64>,
    /// Last learning rate as a share of the peak.
    pub minimum_ratio: f64,
}

/// See [`ScheduleConfig::WarmupStableDecay`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WarmupStableDecayConfig {
    /// Steps until the peak; unset, a twentieth of the run, at most 2000.
    pub warmup_steps: Option<u64>,
    /// Steps of the decay at the end of the run; unset, a tenth of the run.
    pub decay_steps: Option<u64>,
    /// Last learning rate as a share of the peak.
    pub minimum_ratio: f64,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self::Cosine(CosineConfig::default())
    }
}

impl Default for CosineConfig {
    fn default() -> Self {
        Self { warmup_steps: None, minimum_ratio: 0.1 }
    }
}

impl Default for WarmupStableDecayConfig {
    fn default() -> Self {
        Self { warmup_steps: None, decay_steps: None, minimum_ratio: 0.0 }
    }
}

/// The `[train.schedule]` table: every key has a default.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ScheduleTable {
    #[serde(default)]
    kind: ScheduleKind,
    warmup_steps: Option<u64>,
    decay_steps: Option<u64>,
    minimum_ratio: Option<f64>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ScheduleKind {
    #[default]
    Cosine,
    WarmupStableDecay,
}

impl TryFrom<ScheduleTable> for ScheduleConfig {
    type Error = String;

    fn try_from(table: ScheduleTable) -> Result<Self, String> {
        let ScheduleTable { kind, warmup_steps, decay_steps, minimum_ratio } = table;
        match kind {
            ScheduleKind::Cosine if decay_steps.is_some() => {
                Err("decay_steps belongs to kind = \"warmup_stable_decay\": a cosine decays all the way".into())
            }
            ScheduleKind::Cosine => {
                let minimum_ratio = minimum_ratio.unwrap_or(CosineConfig::default().minimum_ratio);
                Ok(Self::Cosine(CosineConfig { warmup_steps, minimum_ratio }))
            }
            ScheduleKind::WarmupStableDecay => {
                let minimum_ratio = minimum_ratio.unwrap_or(WarmupStableDecayConfig::default().minimum_ratio);
                Ok(Self::WarmupStableDecay(WarmupStableDecayConfig { warmup_steps, decay_steps, minimum_ratio }))
            }
        }
    }
}

impl ScheduleConfig {
    /// Steps of the warm-up and of the decay at the end of a run of `steps`. The decay of a cosine is not at the end.
    pub fn parts(&self, steps: u64) -> (u64, u64) {
        let (warmup, decay) = match self {
            Self::Cosine(cosine) => (cosine.warmup_steps, Some(0)),
            Self::WarmupStableDecay(wsd) => (wsd.warmup_steps, wsd.decay_steps),
        };
        (warmup.unwrap_or_else(|| (steps / 20).min(2000)), decay.unwrap_or(steps / 10))
    }

    /// The same schedule of a run of `steps` with its defaults written out.
    pub fn resolved(&self, steps: u64) -> Self {
        let (warmup, decay) = self.parts(steps);
        match self.clone() {
            Self::Cosine(cosine) => Self::Cosine(CosineConfig { warmup_steps: Some(warmup), ..cosine }),
            Self::WarmupStableDecay(wsd) => Self::WarmupStableDecay(WarmupStableDecayConfig {
                warmup_steps: Some(warmup),
                decay_steps: Some(decay),
                ..wsd
            }),
        }
    }

    fn validate(&self, steps: u64) -> Result<(), Error> {
        let (warmup, decay) = self.parts(steps);
        if warmup.saturating_add(decay) > steps {
            return Err(Error::config(
                "schedule.warmup_steps",
                format!("warm-up and decay take {warmup} and {decay} steps, the run has {steps}"),
            ));
        }
        let (Self::Cosine(CosineConfig { minimum_ratio, .. })
        | Self::WarmupStableDecay(WarmupStableDecayConfig { minimum_ratio, .. })) = self;
        if !(0.0..=1.0).contains(minimum_ratio) {
            return Err(Error::config("schedule.minimum_ratio", format!("{minimum_ratio} is not between 0 and 1")));
        }
        Ok(())
    }
}

/// Loss on held-out sequences during the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluationConfig {
    /// Evaluate every so many steps and after the last; 0 never.
    pub every_steps: u64,
    /// Held-out sequences of `sequence_length + 1` tokens.
    pub sequences: usize,
    /// Texts that the model continues at every evaluation, into `samples.jsonl`.
    pub prompts: Vec<String>,
    /// Tokens that it writes for each.
    pub sample_tokens: usize,
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        Self { every_steps: 0, sequences: 16, prompts: Vec::new(), sample_tokens: 64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_sizes_have_the_published_parameter_counts() {
        // 464 M and 1.15 G: counted by the PyTorch model of the same configuration, less its lack
        // of θ (E values in the one LRPE layer).
        let count = |name| ModelConfig::named(name).unwrap().parameters();
        let matrices = |l: usize, d: usize, g: usize| 2 * 64000 * d + l * (5 * d * d + 3 * d * g);
        assert_eq!(count("385m"), matrices(24, 1024, 2816) + 1024);
        assert_eq!(count("1b"), matrices(16, 2048, 5632) + 2048);
        assert_eq!(count("385m") / 1_000_000, 464);
    }

    #[test]
    fn a_size_can_be_overridden_and_is_written_out() {
        let config: TrainConfig = toml::from_str("[model]\nsize = \"385M\"\nvocab_size = 300\n").unwrap();
        assert_eq!(config.model.decoder_layers, 24);
        assert_eq!(config.model.vocab_size, 300);
        let written = toml::to_string(&config).unwrap();
        assert!(written.contains("glu_dim = 2816") && !written.contains("size = \"385M\""));
        assert_eq!(toml::from_str::<TrainConfig>(&written).unwrap(), config);
    }

    #[test]
    fn a_schedule_has_defaults_that_fit_any_run() {
        let schedule = |text: &str| toml::from_str::<TrainConfig>(text).unwrap().schedule;
        assert_eq!(schedule(""), schedule("[schedule]\n"));
        assert_eq!(schedule("[schedule]\nwarmup_steps = 3\n").parts(1000), (3, 0));
        for steps in [0, 1, 7, 1000, 1 << 40] {
            for text in ["", "[schedule]\nkind = \"warmup_stable_decay\"\n"] {
                let schedule = schedule(text);
                schedule.validate(steps).unwrap();
                let resolved = schedule.resolved(steps);
                assert_eq!(resolved.parts(steps), schedule.parts(steps));
                let written = toml::to_string(&resolved).unwrap();
                assert!(written.contains("warmup_steps = "), "{written}");
                assert_eq!(toml::from_str::<ScheduleConfig>(&written).unwrap(), resolved);
            }
        }
    }

    #[test]
    fn unknown_keys_and_sizes_are_refused() {
        for text in [
            "stepz = 3",
            "[model]\nlayers = 3",
            "[model]\nsize = \"2b\"",
            "[optimizer]\nlr = 1",
            "[schedule]\nkind = \"cosine\"\ndecay_steps = 3",
            "[schedule]\nkind = \"step\"",
        ] {
            assert!(toml::from_str::<TrainConfig>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused_with_their_key() {
        let mut config = TrainConfig::default();
        config.model.vocab_size = 10;
        config.validate().unwrap();
        config.model.hidden_dim = 130;
        let error = config.validate().unwrap_err().to_string();
        assert!(error.starts_with("model.hidden_dim: 130"), "{error}");
        config.model.hidden_dim = 128;
        config.steps = 3;
        config.validate().unwrap();
        config.schedule = ScheduleConfig::Cosine(CosineConfig { warmup_steps: Some(4), minimum_ratio: 0.1 });
        let error = config.validate().unwrap_err().to_string();
        assert!(error.starts_with("schedule.warmup_steps: warm-up"), "{error}");
        let shared: TrainConfig =
            toml::from_str("tensor_ranks = 3\n[model]\nvocab_size = 300\nglu_dim = 390\n").unwrap();
        let error = shared.validate().unwrap_err().to_string();
        assert!(error.starts_with("tensor_ranks: 3 ranks") && error.ends_with("; 1, 2 can"), "{error}");
        let config: TrainConfig =
            toml::from_str("[model]\nvocab_size = 300\n[loader]\nprefetch_batches = 0\n").unwrap();
        let error = config.validate().unwrap_err().to_string();
        assert!(error.starts_with("loader: prefetch_batches is 0"), "{error}");
    }
}
