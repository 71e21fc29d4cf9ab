//! All weights of a model in bf16 on CUDA, as views of one flat buffer.

use std::sync::Arc;

use burn_cubecl::CubeDevice;
use burn_cubecl::tensor::CubeTensor;

use super::block::{Gradients, Weights};
use crate::config::ModelConfig;
use crate::cuda;
use crate::ops::attention::decay::decay_rates;
use crate::ops::attention::gated_cuda;
use crate::ops::sequences::Sequences;
use crate::ops::weight::GradientSum;
use crate::ops::{embedding, srms_norm};
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

/// Embedding, layers, head.
fn places<'a>(model: &ModelConfig, list: &'a ParameterList) -> (&'a Parameter, Vec<Layer<'a>>, &'a Parameter) {
    let mut parameters = list.iter();
    let mut next = || parameters.next().unwrap_or_else(|| unreachable!("the list has every parameter"));
    let embed = next();
    let layers = (0..model.decoder_layers)
        .map(|layer| {
            let (qkvu, out) = (next(), next());
            let theta = model.uses_lrpe(layer).then(&mut next);
            let (l1, _l2, l3) = (next(), next(), next());
            Layer { qkvu, out, theta, l1, l3 }
        })
        .collect();
    (embed, layers, next())
}

impl ModelWeights {
    /// Views of `working`, all parameters in bf16; `theta` gives the angles of a layer in float32.
    pub(crate) fn new(
        model: &ModelConfig,
        working: &CubeTensor,
        mut theta: impl FnMut(&Parameter) -> CubeTensor,
    ) -> Self {
        let list = ParameterList::of(model);
        let (embed, layers, head) = places(model, &list);
        let view = |parameter: &Parameter| cuda::flat_view(working, parameter.offset, parameter.matrix());
        let heads = model.decoder_attention_heads;
        let blocks = layers.iter().enumerate().map(|(layer, places)| Weights {
            qkvu: view(places.qkvu),
            out: view(places.out),
            theta: places.theta.map(&mut theta),
            up: cuda::flat_view(working, places.l1.offset, places.up()),
            down: view(places.l3),
            decay: gated_cuda::upload_decay(&decay_rates(heads, layer, model.decoder_layers), &working.device),
            heads,
        });
        Self {
            blocks: blocks.collect(),
            embed: view(embed),
            scale: match model.no_scale_embedding {
                true => 1.0,
                false => (model.decoder_embed_dim as f32).sqrt(),
            },
            head: view(head),
        }
    }

    /// Of float32 `values` in the order of the parameter list, put on `device`.
    pub(crate) fn upload(model: &ModelConfig, values: &[f32], device: &CubeDevice) -> Self {
        let working = cuda::upload_bf16(device, values);
        Self::new(model, &working, |parameter| {
            let flat = cuda::upload_floats(device, &values[parameter.range()]);
            cuda::flat_view(&flat, 0, parameter.matrix())
        })
    }

    /// The stream before the first block: `[N, D]`.
    pub(crate) fn embed(&self, ids: &[u32]) -> CubeTensor {
        embedding::forward(&self.embed, ids, self.scale)
    }
}

/// Sums of the gradients of all parameters in float32, as views of one flat buffer.
#[derive(Clone, Debug)]
pub(super) struct Sums {
    pub(super) embed: GradientSum,
    pub(super) blocks: Arc<[Gradients]>,
    pub(super) head: GradientSum,
}

impl Sums {
    pub(super) fn new(model: &ModelConfig, gradient: &CubeTensor) -> Self {
        let list = ParameterList::of(model);
        let (embed, layers, head) = places(model, &list);
        let at = |offset, shape| GradientSum::new(cuda::flat_view(gradient, offset, shape));
        let sum = |parameter: &Parameter| at(parameter.offset, parameter.matrix());
        let blocks = layers.iter().map(|places| Gradients {
            qkvu: sum(places.qkvu),
            out: sum(places.out),
            theta: places.theta.map(sum),
            up: at(places.l1.offset, places.up()),
            down: sum(places.l3),
        });
        Self { embed: sum(embed), blocks: blocks.collect(), head: sum(head) }
    }
}
