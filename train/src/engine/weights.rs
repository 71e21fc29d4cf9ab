//! All weights of a model in bf16 on CUDA, as views of its buckets.

use burn_cubecl::CubeDevice;
use burn_cubecl::tensor::CubeTensor;

use super::block::{Gradients, Weights};
use crate::Error;
use crate::config::ModelConfig;
use crate::cuda;
use crate::ops::attention::decay::decay_rates;
use crate::ops::attention::gated_cuda;
use crate::ops::sequences::Sequences;
use crate::ops::weight::GradientSum;
use crate::ops::{embedding, srms_norm};
use crate::parallel::{Bucket, Partition};
use crate::parameters::{Parameter, ParameterList};

/// Why a model of these sizes has no form in bf16.
pub(super) fn check(model: &ModelConfig) -> Result<(), String> {
    let sizes =
        [("decoder_embed_dim", model.decoder_embed_dim), ("hidden_dim", model.hidden_dim), ("glu_dim", model.glu_dim)];
    for (key, size) in sizes {
        if !size.is_multiple_of(8) || (!srms_norm::has_kernel(size) && key != "glu_dim") {
            return Err(format!("bf16 needs a multiple of 8 up to 16384, model.{key} is {size}"));
        }
    }
    // Long enough for the kernel, as every sequence that is trained on.
    let whole = Sequences::whole(1, 64);
    let fits = |rotated| gated_cuda::has_form(model.hidden_dim, model.decoder_attention_heads, &whole, rotated);
    let rotated = model.linear_use_lrpe_list.contains(&1);
    if !fits(false) || (rotated && !fits(true)) {
        let head = model.head_dim();
        return Err(format!("bf16 needs heads of a multiple of 8 up to 256 channels (128 with LRPE), not {head}"));
    }
    Ok(())
}

/// What one of `parts` ranks that share the blocks has of `model` on a GPU, as a smaller model.
///
/// # Errors
/// [`Error::Config`] where it cannot be divided so, or a part has no form in bf16.
pub(crate) fn shared(model: &ModelConfig, parts: usize) -> Result<ModelConfig, Error> {
    let part = model.part(parts)?;
    if parts > 1 {
        let refused = |reason: String| {
            Error::config("tensor_ranks", format!("{reason} for each of {parts} GPUs that share a block"))
        };
        check(&part).map_err(refused)?;
    }
    Ok(part)
}

/// Where the parameters of a model, or of what one rank has of it, lie in its buckets, and what its blocks need besides them.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    list: ParameterList,
    buckets: Vec<Bucket>,
    /// λ of every layer's heads.
    decays: Vec<CubeTensor>,
    heads: usize,
    /// The factor of the embeddings.
    pub(super) scale: f32,
}

/// The parameters of one block, where they lie.
struct Layer<'a> {
    qkvu: &'a Parameter,
    out: &'a Parameter,
    theta: Option<&'a Parameter>,
    /// l1, behind which l2 lies: one product makes both factors.
    l1: &'a Parameter,
    l3: &'a Parameter,
}

impl Layer<'_> {
    fn up(&self) -> [usize; 2] {
        let [rows, columns] = self.l1.matrix();
        [2 * rows, columns]
    }
}

impl Plan {
    pub(super) fn new(model: &ModelConfig, device: &CubeDevice) -> Self {
        Self::part(model, [0, 1], device)
    }

    /// Of what rank `rank` of `world` has that share the blocks.
    pub(super) fn part(model: &ModelConfig, [rank, world]: [usize; 2], device: &CubeDevice) -> Self {
        let partition = Partition::of(ParameterList::part(model, rank, world), 1);
        let heads = model.decoder_attention_heads / world;
        let decays = (0..model.decoder_layers).map(|layer| {
            let rates = decay_rates(model.decoder_attention_heads, layer, model.decoder_layers);
            gated_cuda::upload_decay(&rates[rank * heads..(rank + 1) * heads], device)
        });
        Self {
            decays: decays.collect(),
            heads,
            scale: match model.no_scale_embedding {
                true => 1.0,
                false => (model.decoder_embed_dim as f32).sqrt(),
            },
            buckets: partition.buckets().to_vec(),
            list: partition.parameters().clone(),
        }
    }

    /// Embedding, blocks and head.
    pub(super) fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Number of blocks.
    pub(super) fn layers(&self) -> usize {
        self.decays.len()
    }

    /// The bucket of the head.
    pub(super) fn head(&self) -> usize {
        self.buckets.len() - 1
    }

    /// The angles of LRPE of all layers that have them.
    pub(super) fn angles(&self) -> impl Iterator<Item = &Parameter> {
        (0..self.layers()).filter_map(|layer| self.layer(layer).theta)
    }

    fn layer(&self, layer: usize) -> Layer<'_> {
        let parameters: Vec<&Parameter> = self
            .list
            .iter()
            .skip(self.buckets[layer + 1].parameters.start)
            .take(self.buckets[layer + 1].parameters.len())
            .collect();
        match parameters[..] {
            [qkvu, out, l1, _l2, l3] => Layer { qkvu, out, theta: None, l1, l3 },
            [qkvu, out, theta, l1, _l2, l3] => Layer { qkvu, out, theta: Some(theta), l1, l3 },
            _ => unreachable!("a block has five or six parameters"),
        }
    }

    /// `shape` at a parameter of a bucket whose values begin at the first of `values`.
    fn at<const D: usize>(&self, bucket: usize, values: &CubeTensor, offset: usize, shape: [usize; D]) -> CubeTensor {
        cuda::flat_view(values, offset - self.buckets[bucket].range.start, shape)
    }

    /// The matrix of the embedding's or the head's bucket.
    pub(super) fn table(&self, bucket: usize, values: &CubeTensor) -> CubeTensor {
        let parameter = self.list.iter().nth(self.buckets[bucket].parameters.start);
        let parameter = parameter.unwrap_or_else(|| unreachable!("every bucket has a parameter"));
        self.at(bucket, values, parameter.offset, parameter.matrix())
    }

    /// A block's weights in the bf16 `values` of its bucket; `theta` gives the angles in float32.
    pub(super) fn block(
        &self,
        layer: usize,
        values: &CubeTensor,
        theta: impl FnOnce(&Parameter) -> CubeTensor,
    ) -> Weights {
        let places = self.layer(layer);
        let view = |offset, shape| self.at(layer + 1, values, offset, shape);
        let matrix = |parameter: &Parameter| view(parameter.offset, parameter.matrix());
        Weights {
            qkvu: matrix(places.qkvu),
            out: matrix(places.out),
            theta: places.theta.map(theta),
            up: view(places.l1.offset, places.up()),
            down: matrix(places.l3),
            decay: self.decays[layer].clone(),
            heads: self.heads,
        }
    }

    /// Sums of the gradients of a block in the float32 `values` of its bucket.
    pub(super) fn gradients(&self, layer: usize, values: &CubeTensor) -> Gradients {
        let places = self.layer(layer);
        let view = |offset, shape| GradientSum::new(self.at(layer + 1, values, offset, shape));
        let matrix = |parameter: &Parameter| view(parameter.offset, parameter.matrix());
        Gradients {
            qkvu: matrix(places.qkvu),
            out: matrix(places.out),
            theta: places.theta.map(matrix),
            up: view(places.l1.offset, places.up()),
            down: matrix(places.l3),
        }
    }
}

/// The matrices of a model in bf16.
#[derive(Clone, Debug)]
pub(crate) struct ModelWeights {
    /// `[vocabulary, D]`.
    pub(crate) embed: CubeTensor,
    /// The factor of the embeddings.
    pub(crate) scale: f32,
    pub(crate) blocks: Vec<Weights>,
    /// `[vocabulary, D]`.
    pub(crate) head: CubeTensor,
}

impl ModelWeights {
    /// Views of the buckets in bf16 that `bucket` gives; `theta` gives the angles of a layer in float32.
    pub(super) fn new(
        plan: &Plan,
        bucket: impl Fn(usize) -> CubeTensor,
        theta: impl Fn(&Parameter) -> CubeTensor,
    ) -> Self {
        Self {
            embed: plan.table(0, &bucket(0)),
            scale: plan.scale,
            blocks: (0..plan.layers()).map(|layer| plan.block(layer, &bucket(layer + 1), &theta)).collect(),
            head: plan.table(plan.head(), &bucket(plan.head())),
        }
    }

    /// Of float32 `values` in the order of the parameter list, put on `device`.
    pub(crate) fn upload(model: &ModelConfig, values: &[f32], device: &CubeDevice) -> Self {
        let plan = Plan::new(model, device);
        let working = cuda::upload_bf16(device, values);
        let bucket = |bucket: usize| {
            let range = plan.buckets()[bucket].range.clone();
            cuda::flat_view(&working, range.start, [range.len()])
        };
        Self::new(&plan, bucket, |parameter| {
            let flat = cuda::upload_floats(device, &values[parameter.range()]);
            cuda::flat_view(&flat, 0, parameter.matrix())
        })
    }

    /// The stream before the first block: `[N, D]`.
    pub(crate) fn embed(&self, ids: &[u32]) -> CubeTensor {
        embedding::forward(&self.embed, ids, self.scale)
    }
}
