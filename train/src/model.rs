//! TransNormerLLM (arXiv 2307.14995) on Burn.
//!
//! The parameters live in one flat buffer; the matrices of a pass are views of it. A pass is a
//! function of these views, on the tape or not, so there is no module tree beside the list of
//! parameters.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Gradients, Tensor, TensorData};
use rayon::prelude::*;

use crate::Error;
use crate::batch::{Batch, Rows};
use crate::config::ModelConfig;
use crate::ops::attention::{chunked, decay::decay_rates, gated, recurrent};
use crate::ops::cross_entropy::cross_entropy;
use crate::ops::embedding::embedding;
use crate::ops::sequences::Sequences;
use crate::ops::srms_norm::srms_norm;
use crate::parameters::{Parameter, ParameterList};
use crate::rng::Rng;

/// A model: its sizes and its parameters in float32 on one device.
#[derive(Clone, Debug)]
pub struct Model {
    network: Network,
    parameters: ParameterList,
    /// Every parameter, in the order of the list.
    flat: Tensor<1>,
}

/// The passes through a model of given sizes, with weights that come from anywhere.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    /// The sizes: of the part of a rank where ranks share the blocks.
    config: ModelConfig,
    /// λ of every head of every layer.
    decay: Vec<Arc<[f64]>>,
    /// Whether other ranks have other heads.
    shared: bool,
}

/// The matrices of one block, `[out, in]`.
pub(crate) struct Block {
    qkvu: Tensor<2>,
    out: Tensor<2>,
    /// `[H, K]`.
    theta: Option<Tensor<2>>,
    l1: Tensor<2>,
    l2: Tensor<2>,
    l3: Tensor<2>,
}

impl Block {
    /// Of the next of `views`, which are in the order of the parameter list.
    pub(crate) fn next(views: &mut impl Iterator<Item = Tensor<2>>, uses_lrpe: bool) -> Self {
        let mut next = || views.next().unwrap_or_else(|| unreachable!("a view per parameter"));
        Self { qkvu: next(), out: next(), theta: uses_lrpe.then(&mut next), l1: next(), l2: next(), l3: next() }
    }

    /// The matrices in the order of the parameter list.
    pub(crate) fn in_order(&self) -> impl Iterator<Item = &Tensor<2>> {
        self.of_mixer().chain(self.of_channels())
    }

    /// Those of the token mixer.
    pub(crate) fn of_mixer(&self) -> impl Iterator<Item = &Tensor<2>> {
        [&self.qkvu, &self.out].into_iter().chain(&self.theta)
    }

    /// Those of the channel mixer, which come after.
    pub(crate) fn of_channels(&self) -> impl Iterator<Item = &Tensor<2>> {
        [&self.l1, &self.l2, &self.l3].into_iter()
    }
}

/// What is before the tokens of a pass. There is one at a time.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Before {
    /// Nothing: they are whole documents.
    Nothing,
    /// Other tokens of the same rows, which have left this state; none for the first tokens.
    Tokens(Option<Tensor<4>>),
}

/// What the token mixer of a block makes.
pub(crate) struct Mixture {
    /// The stream after it, `[N, D]`. Of some of the heads a term of what all of them add to the stream, before the norm.
    pub(crate) out: Tensor<2>,
    /// Σ o² of every token over these heads, `[N, 1]`, where they are not all.
    pub(crate) squares: Option<Tensor<2>>,
    /// The state after the tokens, where one before them was given.
    pub(crate) after: Option<Tensor<4>>,
}

/// Views of `parameters` in `buffer`, which begins with value `begin` of the flat buffer; leaves of a tape where
/// `tracked`.
pub(crate) fn views(buffer: &Tensor<1>, parameters: &[Parameter], begin: usize, tracked: bool) -> Vec<Tensor<2>> {
    let view = |parameter: &Parameter| {
        let range = parameter.range();
        let view = buffer.clone().narrow(0, range.start - begin, range.len());
        let view = view.reshape(parameter.matrix());
        if tracked { view.autodiff().require_grad() } else { view }
    };
    parameters.iter().map(view).collect()
}

/// The gradient of `leaf`, taken out of `gradients`; zeros where nothing depends on it.
pub(crate) fn gradient_of<const D: usize>(leaf: &Tensor<D>, gradients: &mut Gradients) -> Tensor<D> {
    leaf.grad_remove(gradients).unwrap_or_else(|| leaf.clone().inner().zeros_like())
}

/// The parameters of one pass, as views of the flat buffer.
pub(crate) struct Weights {
    embed: Tensor<2>,
    blocks: Vec<Block>,
    head: Tensor<2>,
}

impl Weights {
    /// The views in the order of the parameter list.
    fn in_order(&self) -> impl Iterator<Item = &Tensor<2>> {
        let blocks = self.blocks.iter().flat_map(Block::in_order);
        std::iter::once(&self.embed).chain(blocks).chain(std::iter::once(&self.head))
    }
}

/// What a model remembers of the tokens it has read: one K×V matrix per head and layer, whatever
/// their number.
#[derive(Clone, Debug)]
pub struct RecurrentState {
    layers: Vec<Option<Tensor<4>>>,
    /// Tokens read.
    position: usize,
}

impl RecurrentState {
    /// Tokens read so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Number of values in the state of all layers.
    pub fn len(&self) -> usize {
        let size = |state: &Tensor<4>| state.dims().iter().product::<usize>();
        self.layers.iter().flatten().map(size).sum()
    }

    /// Whether nothing has been read.
    pub fn is_empty(&self) -> bool {
        self.position == 0
    }
}

fn linear(x: Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
    x.matmul(weight.clone().transpose())
}

impl Network {
    /// Of a model of these sizes, which fit each other.
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let decay = (0..config.decoder_layers)
            .map(|layer| decay_rates(config.decoder_attention_heads, layer, config.decoder_layers).into());
        Self { decay: decay.collect(), config: config.clone(), shared: false }
    }

    /// What rank `rank` of `world` has that share the blocks of a model of these sizes.
    ///
    /// # Errors
    /// As [`ModelConfig::part`].
    pub(crate) fn part(config: &ModelConfig, rank: usize, world: usize) -> Result<Self, Error> {
        let (whole, config) = (Self::new(config), config.part(world)?);
        let heads = config.decoder_attention_heads;
        let decay = whole.decay.iter().map(|rates| rates[rank * heads..(rank + 1) * heads].into());
        Ok(Self { decay: decay.collect(), config, shared: world > 1 })
    }

    /// The sizes.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The factor of the embeddings.
    pub(crate) fn scale(&self) -> f64 {
        match self.config.no_scale_embedding {
            true => 1.0,
            false => (self.config.decoder_embed_dim as f64).sqrt(),
        }
    }

    /// The stream before the first block: `[N, D]`.
    pub(crate) fn embed(&self, table: &Tensor<2>, ids: &[u32]) -> Tensor<2> {
        embedding(table.clone(), ids, self.scale())
    }

    /// One block: `mix` is the token mixer between its projections.
    fn block(&self, block: &Block, x: Tensor<2>, mix: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<2> {
        let qkvu = linear(srms_norm(x.clone()), &block.qkvu);
        self.channels(block, x + linear(mix(qkvu), &block.out))
    }

    /// The stream after the channel mixer of `block` and `x` before it; of some of its channels a term of what all of them
    /// add to it.
    pub(crate) fn channels(&self, block: &Block, x: Tensor<2>) -> Tensor<2> {
        let normed = srms_norm(x.clone());
        let gate = linear(normed.clone(), &block.l1) * linear(normed, &block.l2);
        self.added(x, linear(gate, &block.l3))
    }

    /// `x` with what a half of a block adds to it, where this is all of that.
    fn added(&self, x: Tensor<2>, out: Tensor<2>) -> Tensor<2> {
        if self.shared { out } else { x + out }
    }

    /// The stream after block `layer`, with the weights `block`, for whole documents.
    pub(crate) fn layer(&self, layer: usize, block: &Block, x: Tensor<2>, sequences: &Arc<Sequences>) -> Tensor<2> {
        let decay = &self.decay[layer];
        self.block(block, x, |qkvu| gated::gated_attention(qkvu, block.theta.clone(), decay, sequences))
    }

    /// What the token mixer of block `layer`, with the weights `block`, makes of the stream `x`. A state is `[B, H, K, V]`, 2K in
    /// place of K with LRPE.
    pub(crate) fn mixer(
        &self,
        layer: usize,
        block: &Block,
        x: Tensor<2>,
        sequences: &Arc<Sequences>,
        before: Before,
    ) -> Mixture {
        let (theta, decay) = (block.theta.clone(), &self.decay[layer]);
        let qkvu = linear(srms_norm(x.clone()), &block.qkvu);
        let form = chunked::attention;
        let (mixed, squares, after) = match (before, self.shared) {
            (Before::Nothing, false) => (gated::gated_attention(qkvu, theta, decay, sequences), None, None),
            (Before::Nothing, true) => {
                let [mixed, squares] = gated::gated_part(qkvu, theta, decay, sequences);
                (mixed, Some(squares), None)
            }
            (Before::Tokens(state), false) => {
                let (mixed, after) = gated::stateful(form, qkvu, theta, decay, sequences, state);
                (mixed, None, Some(after))
            }
            (Before::Tokens(state), true) => {
                let ([mixed, squares], after) = gated::stateful_part(form, qkvu, theta, decay, sequences, state);
                (mixed, Some(squares), Some(after))
            }
        };
        Mixture { out: self.added(x, linear(mixed, &block.out)), squares, after }
    }

    /// The shape of the state of block `layer` for `rows` rows.
    pub(crate) fn state_shape(&self, layer: usize, rows: usize) -> [usize; 4] {
        let (heads, width) = (self.config.decoder_attention_heads, self.config.head_dim());
        let keys = if self.config.uses_lrpe(layer) { 2 * width } else { width };
        [rows, heads, keys, width]
    }

    /// Mean cross-entropy in nats after the last block, whose stream is `x`: `[1]`.
    pub(crate) fn loss(&self, head: &Tensor<2>, x: Tensor<2>, targets: &[u32], z_loss: f64) -> Tensor<1> {
        cross_entropy(srms_norm(x), head.clone(), targets, z_loss, 1.0)
    }
}

impl Model {
    /// A model with fresh weights: normal with the standard deviation of the configuration, LRPE's
    /// angles `10000^(-2c/(H·K))`. The same seed gives the same weights on every device.
    ///
    /// # Errors
    /// [`Error::Config`] when the sizes do not fit each other.
    pub fn new(config: &ModelConfig, seed: u64, device: &Device) -> Result<Self, Error> {
        config.validate()?;
        Self::from_values(config, initial_values(config, seed), device)
    }

    /// A model with the given parameters, in the order of [`ParameterList`].
    ///
    /// # Errors
    /// [`Error::Config`] when the sizes do not fit each other, [`Error::Input`] when there are more
    /// or fewer values than parameters.
    pub fn from_values(config: &ModelConfig, values: Vec<f32>, device: &Device) -> Result<Self, Error> {
        config.validate()?;
        let parameters = ParameterList::of(config);
        if values.len() != parameters.total() {
            return Err(Error::Input(format!("{} values for {} parameters", values.len(), parameters.total())));
        }
        let shape = [values.len()];
        Ok(Self {
            network: Network::new(config),
            flat: Tensor::from_data(TensorData::new(values, shape), device),
            parameters,
        })
    }

    /// The sizes of the model.
    pub fn config(&self) -> &ModelConfig {
        self.network.config()
    }

    /// Names, shapes and places of the parameters.
    pub fn parameters(&self) -> &ParameterList {
        &self.parameters
    }

    /// The device the parameters are on.
    pub fn device(&self) -> Device {
        self.flat.device()
    }

    /// All parameters, in the order of [`Model::parameters`].
    pub fn values(&self) -> Vec<f32> {
        read(self.flat.clone())
    }

    /// The flat buffer, for the optimizer to replace.
    pub(crate) fn flat_mut(&mut self) -> &mut Tensor<1> {
        &mut self.flat
    }

    /// Views of all parameters, as leaves of a tape where `tracked`.
    pub(crate) fn weights(&self, tracked: bool) -> Weights {
        let views = views(&self.flat, self.parameters.iter().as_slice(), 0, tracked);
        let (mut views, config) = (views.into_iter(), self.config());
        let one = |views: &mut std::vec::IntoIter<Tensor<2>>| {
            views.next().unwrap_or_else(|| unreachable!("a view per parameter"))
        };
        Weights {
            embed: one(&mut views),
            blocks: (0..config.decoder_layers).map(|l| Block::next(&mut views, config.uses_lrpe(l))).collect(),
            head: one(&mut views),
        }
    }

    /// Checks that every id is below the vocabulary size.
    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<(), Error> {
        check_ids(ids, self.config().vocab_size)
    }

    /// The stream after the last block for whole documents: `[B·T, D]`.
    fn stream(&self, weights: &Weights, ids: &[u32], sequences: &Arc<Sequences>) -> Tensor<2> {
        let mut x = self.network.embed(&weights.embed, ids);
        for (layer, block) in weights.blocks.iter().enumerate() {
            x = self.network.layer(layer, block, x, sequences);
        }
        x
    }

    /// Mean cross-entropy of a part of a batch, in nats: `[1]`.
    fn rows_loss(&self, weights: &Weights, rows: &Rows, z_loss: f64) -> Tensor<1> {
        let x = self.stream(weights, &rows.inputs, &rows.sequences);
        self.network.loss(&weights.head, x, &rows.targets, z_loss)
    }

    /// Mean cross-entropy in nats over the predicted tokens of `batch`, computed `rows` rows at a
    /// time.
    ///
    /// # Errors
    /// [`Error::Input`] when the batch does not fit its own sizes or the vocabulary.
    pub fn loss(&self, batch: &Batch, rows: usize) -> Result<f64, Error> {
        self.check_ids(&batch.tokens)?;
        let weights = self.weights(false);
        let (mut sum, mut count) = (0.0, 0);
        for rows in batch.split(rows)? {
            let loss: f32 = self.rows_loss(&weights, &rows, 0.0).into_scalar();
            sum += f64::from(loss) * rows.counted() as f64;
            count += rows.counted();
        }
        Ok(sum / count.max(1) as f64)
    }

    /// [`Model::loss`] and the gradient of it and of `z_loss`, a tensor for every parameter in the order of the list,
    /// given to `accumulate` for every part of `rows` rows. The gradients of all parts add up to
    /// that of the loss.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn gradients(
        &self,
        batch: &Batch,
        rows: usize,
        z_loss: f64,
        mut accumulate: impl FnMut(Vec<Tensor<2>>),
    ) -> Result<f64, Error> {
        self.check_ids(&batch.tokens)?;
        let parts = batch.split(rows)?;
        let count: usize = parts.iter().map(Rows::counted).sum();
        let mut sum = 0.0;
        for rows in parts {
            let share = rows.counted() as f64 / count.max(1) as f64;
            let weights = self.weights(true);
            let loss = self.rows_loss(&weights, &rows, z_loss) * share;
            let mut gradients = loss.backward();
            let loss: f32 = loss.inner().into_scalar();
            sum += f64::from(loss);
            accumulate(weights.in_order().map(|leaf| gradient_of(leaf, &mut gradients)).collect());
        }
        Ok(sum)
    }

    /// The logits of every token of `ids: [B·T]`: `[B·T, vocabulary]`.
    ///
    /// # Errors
    /// [`Error::Input`] when the ids do not fit `sequences` or the vocabulary.
    pub fn logits(&self, ids: &[u32], sequences: &Arc<Sequences>) -> Result<Tensor<2>, Error> {
        self.check_ids(ids)?;
        if ids.len() != sequences.rows() * sequences.length() || ids.is_empty() {
            return Err(Error::Input(format!(
                "{} ids for {} rows of {}",
                ids.len(),
                sequences.rows(),
                sequences.length()
            )));
        }
        let weights = self.weights(false);
        Ok(linear(srms_norm(self.stream(&weights, ids, sequences)), &weights.head))
    }

    /// The state of a model that has read nothing.
    pub fn start(&self) -> RecurrentState {
        RecurrentState { layers: vec![None; self.config().decoder_layers], position: 0 }
    }

    /// Reads `ids`, one sequence, after what `state` remembers, which it brings up to date. Gives
    /// the normed output of the last block: `[T, D]`.
    ///
    /// # Errors
    /// [`Error::Input`] when there are no ids or one is not below the vocabulary size.
    pub(crate) fn read(&self, weights: &Weights, ids: &[u32], state: &mut RecurrentState) -> Result<Tensor<2>, Error> {
        self.check_ids(ids)?;
        if ids.is_empty() {
            return Err(Error::Input("no tokens to read".to_owned()));
        }
        let sequences = Sequences::continued(1, ids.len(), state.position);
        let form = match ids.len() {
            1 => recurrent::attention,
            _ => chunked::attention,
        };
        let mut x = self.network.embed(&weights.embed, ids);
        let layers = weights.blocks.iter().zip(&self.network.decay);
        for ((block, decay), memory) in layers.zip(&mut state.layers) {
            x = self.network.block(block, x, |qkvu| {
                let theta = block.theta.clone();
                let (mixed, after) = gated::stateful(form, qkvu, theta, decay, &sequences, memory.take());
                *memory = Some(after);
                mixed
            });
        }
        state.position += ids.len();
        Ok(srms_norm(x))
    }

    /// The logits of one row of hidden values `[1, D]`.
    pub(crate) fn head(&self, weights: &Weights, hidden: Tensor<2>) -> Vec<f32> {
        read(linear(hidden, &weights.head))
    }

    /// Summed cross-entropy in nats of `targets` after `hidden: [T, D]`.
    pub(crate) fn head_loss(&self, weights: &Weights, hidden: Tensor<2>, targets: &[u32]) -> f64 {
        let count = targets.len() as f64;
        let loss: f32 = cross_entropy(hidden, weights.head.clone(), targets, 0.0, 1.0).into_scalar();
        f64::from(loss) * count
    }
}

/// The first weights of [`Model::new`], in the order of the parameter list.
pub(crate) fn initial_values(config: &ModelConfig, seed: u64) -> Vec<f32> {
    initial_shard(config, seed, &[ParameterList::of(config).range()])
}

/// Values of a parameter, by their place in it, and where they go.
type Run<'a> = (Range<usize>, &'a mut [f32]);

/// Those of [`initial_values`] that are in `ranges`, one after the other: no more is in memory at once.
pub(crate) fn initial_shard(config: &ModelConfig, seed: u64, ranges: &[Range<usize>]) -> Vec<f32> {
    let list = ParameterList::of(config);
    let parameters = list.iter().as_slice();
    let mut values = vec![0f32; ranges.iter().map(Range::len).sum()];
    let mut rest = values.as_mut_slice();
    // By parameter, its ranges in ascending order.
    let mut parts: Vec<(usize, Vec<Run<'_>>)> = Vec::new();
    for range in ranges {
        let mut begin = range.start;
        while begin < range.end {
            let index = parameters.partition_point(|parameter| parameter.range().end <= begin);
            let whole = parameters[index].range();
            let end = whole.end.min(range.end);
            let (part, after) = std::mem::take(&mut rest).split_at_mut(end - begin);
            rest = after;
            let place = begin - whole.start..end - whole.start;
            match parts.last_mut() {
                Some((last, runs)) if *last == index && runs.last().is_some_and(|(run, _)| run.end <= place.start) => {
                    runs.push((place, part));
                }
                _ => parts.push((index, vec![(place, part)])),
            }
            begin = end;
        }
    }
    // Every parameter draws from a stream of its own: threads do not change a value.
    parts.into_par_iter().for_each(|(index, runs)| {
        let parameter = &parameters[index];
        let (mut rng, mut next) = (Rng::new(seed, index as u64), 0);
        for (place, values) in runs {
            if parameter.decays() {
                for _ in next..place.start {
                    rng.normal();
                }
                next = place.end;
                values.fill_with(|| (rng.normal() * config.init_std) as f32);
            } else {
                let channels = parameter.range().len() as f64;
                for (c, theta) in place.zip(values) {
                    *theta = 10000f64.powf(-2.0 * c as f64 / channels) as f32;
                }
            }
        }
    });
    values
}

/// Checks that every id is below the vocabulary size.
pub(crate) fn check_ids(ids: &[u32], vocabulary: usize) -> Result<(), Error> {
    match ids.iter().position(|&id| id as usize >= vocabulary) {
        None => Ok(()),
        Some(at) => Err(Error::Input(format!(
            "token id {} at position {at} is not below the vocabulary size {vocabulary}",
            ids[at]
        ))),
    }
}

/// The values of a tensor in row-major order.
pub(crate) fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as().unwrap_or_else(|error| panic!("a float32 tensor can be read: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::assert_close;

    #[test]
    fn a_shard_of_the_first_weights_is_cut_out_of_them() {
        let config = ModelConfig::smallest();
        let whole = initial_values(&config, 3);
        // Also backwards, and in pieces of one parameter.
        let ranges = [0..0, 7..250, 250..251, 600..whole.len(), 300..310, 320..321, 340..360, 260..261];
        let want: Vec<f32> = ranges.iter().flat_map(|range| whole[range.clone()].to_vec()).collect();
        assert_eq!(initial_shard(&config, 3, &ranges), want);
    }

    #[test]
    fn packed_documents_do_not_see_each_other() {
        let config = ModelConfig {
            vocab_size: 30,
            decoder_embed_dim: 16,
            decoder_layers: 3,
            decoder_attention_heads: 2,
            hidden_dim: 16,
            glu_dim: 24,
            linear_use_lrpe_list: vec![1, 0, 1],
            init_std: 0.3,
            ..ModelConfig::default()
        };
        let model = Model::new(&config, 4, &Device::flex()).unwrap();
        let mut rng = Rng::new(6, 0);
        let ids: Vec<u32> = (0..150).map(|_| (rng.next_u64() % 30) as u32).collect();
        let starts = [0, 1, 40, 104];
        let packed = Arc::new(Sequences::packed(&[starts], ids.len()).unwrap());
        let together = model.logits(&ids, &packed).unwrap();
        let ends = starts[1..].iter().copied().chain([ids.len() as u32]);
        let alone = starts.into_iter().zip(ends).map(|(start, end)| {
            let ids = &ids[start as usize..end as usize];
            model.logits(ids, &Arc::new(Sequences::whole(1, ids.len()))).unwrap()
        });
        let alone = Tensor::cat(alone.collect(), 0);
        assert_close("logits", together.clone(), alone, 1e-6);
        let one = model.logits(&ids, &Arc::new(Sequences::whole(1, ids.len()))).unwrap();
        let difference: f32 = (one - together).abs().max().into_scalar();
        assert!(difference > 1e-2, "without borders they do: {difference}");
    }
}
