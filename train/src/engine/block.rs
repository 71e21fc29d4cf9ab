//! One block in bf16 on CUDA: forward, and a backward that is written out, without a tape.
//!
//! What is kept of the forward is what matrix products and the attention made: the stream at both
//! ends of the token mixer, the projection, the attention's output and the two factors of SGLU. Norms,
//! gate and product are made again by the very kernels that read the same values for the gradients, so
//! keeping them would cost memory and save hardly any time.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::relay::{Line, Relay};
use crate::cuda;
use crate::ops::attention::gated_cuda::{Documents, Mixer};
use crate::ops::attention::lightning::States;
use crate::ops::weight::GradientSum;
use crate::ops::{gate, linear, sglu, srms_norm};

/// The weights of one block, matrices in bf16.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    /// q, k, v and u: `[4E, D]`.
    pub(crate) qkvu: CubeTensor,
    /// `[D, E]`.
    pub(crate) out: CubeTensor,
    /// The angles of LRPE `[H, K]` in float32, in the layers that have them.
    pub(crate) theta: Option<CubeTensor>,
    /// l1 over l2: `[2G, D]`.
    pub(crate) up: CubeTensor,
    /// l3: `[D, G]`.
    pub(crate) down: CubeTensor,
    /// λ of every head, float32.
    pub(crate) decay: CubeTensor,
    pub(crate) heads: usize,
}

/// Sums of the gradients of the same, in float32.
#[derive(Clone, Debug)]
pub(super) struct Gradients {
    pub(super) qkvu: GradientSum,
    pub(super) out: GradientSum,
    pub(super) theta: Option<GradientSum>,
    pub(super) up: GradientSum,
    pub(super) down: GradientSum,
}

/// Adds the gradient of a matrix to its sum.
fn add(sum: &GradientSum, dy: &CubeTensor, x: &CubeTensor) {
    let own = linear::backward_weight(dy, x, Some(sum));
    debug_assert!(own.is_none(), "the gradient went into the sum");
}

/// What a block keeps for its backward.
#[derive(Debug)]
pub(super) enum Kept {
    /// All that is not cheap to make again.
    Products(Box<Products>),
    /// What it began with, the stream and the state; the forward is made again.
    Input(Box<(CubeTensor, Option<CubeTensor>)>),
}

/// Tensors `[N, ..]` in bf16.
#[derive(Debug)]
pub(super) struct Products {
    /// The stream before the block: D.
    x: CubeTensor,
    /// 4E.
    projected: CubeTensor,
    /// The state that the attention began with, where ranks share rows.
    before: Option<CubeTensor>,
    /// The attention's output: E.
    attended: CubeTensor,
    /// The stream between the mixers: D.
    middle: CubeTensor,
    /// 2G.
    factors: CubeTensor,
}

impl Weights {
    fn mixer(&self, documents: &Documents) -> Mixer {
        Mixer { decay: self.decay.clone(), heads: self.heads, documents: documents.clone() }
    }

    /// Makes ready for the state of this block's attention, or its gradient, to come and go.
    pub(super) fn relay<'a>(&self, line: Option<&'a dyn Line>, documents: &Documents, backwards: bool) -> Relay<'a> {
        let room = || {
            let ([_, inner], _) = cuda::rows(&self.out);
            self.mixer(documents).state(&self.out, inner, self.theta.is_some())
        };
        line.map_or_else(Relay::default, |line| line.relay(&room, backwards))
    }

    /// As far as the factors of SGLU.
    fn products(&self, x: CubeTensor, documents: &Documents, relay: Relay<'_>) -> Products {
        let (mixer, theta) = (self.mixer(documents), self.theta.as_ref());
        let projected = linear::forward(&srms_norm::forward_on_cuda(&x), &self.qkvu, None);
        let before = relay.receive.map(|receive| receive());
        let attended = match relay.send {
            None => mixer.attend(&projected, theta, before.as_ref(), None),
            Some(send) => {
                let (attended, after) = mixer.attend_and_leave(&projected, theta, before.as_ref());
                send(after);
                attended
            }
        };
        let middle = linear::forward(&mixer.gate(&projected, &attended), &self.out, Some(&x));
        let factors = linear::forward(&srms_norm::forward_on_cuda(&middle), &self.up, None);
        Products { x, projected, before, attended, middle, factors }
    }

    /// The stream after the block for the stream `x: [N, D]` before it, and what the backward needs;
    /// only what the block begins with where `again`.
    pub(super) fn forward(
        &self,
        x: CubeTensor,
        documents: &Documents,
        again: bool,
        relay: Relay<'_>,
    ) -> (CubeTensor, Kept) {
        let products = self.products(x, documents, relay);
        let y = linear::forward(&sglu::forward(&products.factors), &self.down, Some(&products.middle));
        let kept = match again {
            true => Kept::Input(Box::new((products.x, products.before))),
            false => Kept::Products(Box::new(products)),
        };
        (y, kept)
    }

    /// [`Weights::forward`] with another token mixer: `mix` makes of the projection what the gate takes.
    pub(crate) fn forward_with(&self, x: &CubeTensor, mix: impl FnOnce(&CubeTensor) -> CubeTensor) -> CubeTensor {
        let projected = linear::forward(&srms_norm::forward_on_cuda(x), &self.qkvu, None);
        let attended = mix(&projected);
        let ([_, width], _) = cuda::rows(&attended);
        let gated = gate::forward(&cuda::columns(&projected, 3 * width, width), &attended);
        let middle = linear::forward(&gated, &self.out, Some(x));
        let factors = linear::forward(&srms_norm::forward_on_cuda(&middle), &self.up, None);
        linear::forward(&sglu::forward(&factors), &self.down, Some(&middle))
    }

    /// The gradient of the stream before the block from that after it; those of the weights are added
    /// to their sums.
    pub(super) fn backward(
        &self,
        sums: &Gradients,
        kept: Kept,
        dy: CubeTensor,
        documents: &Documents,
        relay: Relay<'_>,
    ) -> CubeTensor {
        let products = match kept {
            Kept::Products(products) => *products,
            Kept::Input(began) => {
                let (x, before) = *began;
                self.products(x, documents, Relay::again(before))
            }
        };
        let Products { x, projected, before, attended, middle, factors } = products;
        let ([tokens, width], _) = cuda::rows(&middle);

        // The channel mixer.
        let d_product = linear::backward_input(&dy, &self.down);
        let product = cuda::empty_like(&d_product);
        let d_factors = sglu::backward(&factors, &d_product, Some(&product));
        drop((factors, d_product));
        add(&sums.down, &dy, &product);
        drop(product);
        let d_normed = linear::backward_input(&d_factors, &self.up);
        let normed = cuda::empty_like(&middle);
        let d_middle = srms_norm::backward_on_cuda(&middle, &d_normed, Some(&dy), Some(&normed));
        drop((middle, d_normed, dy));
        add(&sums.up, &d_factors, &normed);
        drop((d_factors, normed));

        // The token mixer.
        let d_gated = linear::backward_input(&d_middle, &self.out);
        let ([_, inner], _) = cuda::rows(&attended);
        let gated = cuda::empty(&attended, [tokens, inner], DType::BF16);
        let (mixer, theta) = (self.mixer(documents), self.theta.as_ref().zip(sums.theta.as_ref()));
        let d_after = relay.receive.map(|receive| receive());
        let leaving = relay.send.map(|send| (send, mixer.state(&attended, inner, theta.is_some())));
        let states = States {
            before: before.as_ref(),
            d_after: d_after.as_ref(),
            d_before: leaving.as_ref().map(|(_, d_before)| d_before),
        };
        let d_projected = mixer.backward(&projected, theta, &attended, &d_gated, Some(&gated), states);
        if let Some((send, d_before)) = leaving {
            send(d_before);
        }
        drop((projected, before, d_after, attended, d_gated));
        add(&sums.out, &d_middle, &gated);
        drop(gated);
        let d_normed = linear::backward_input(&d_projected, &self.qkvu);
        let normed = cuda::empty(&x, [tokens, width], DType::BF16);
        let dx = srms_norm::backward_on_cuda(&x, &d_normed, Some(&d_middle), Some(&normed));
        add(&sums.qkvu, &d_projected, &normed);
        dx
    }
}

impl Gradients {
    /// All of them.
    pub(super) fn sums(&self) -> impl Iterator<Item = &GradientSum> {
        [&self.qkvu, &self.out, &self.up, &self.down].into_iter().chain(&self.theta)
    }
}
