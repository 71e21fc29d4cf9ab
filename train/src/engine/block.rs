//! One block in bf16 on CUDA: forward, and a backward that is written out, without a tape.
//!
//! What is kept of the forward is what matrix products and the attention made: the stream at both
//! ends of the token mixer, the projection, the attention's output and the two factors of SGLU. Norms,
//! gate and product are made again by the very kernels that read the same values for the gradients, so
//! keeping them would cost memory and save hardly any time.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::partners::Partners;
use super::relay::{Line, Relay};
use crate::cuda;
use crate::ops::attention::gated_cuda::{Documents, Mixer, gate_of};
use crate::ops::attention::lightning::States;
use crate::ops::gate::Part;
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
    /// What the forward is made again from.
    Input(Box<Input>),
}

/// What a block begins with.
#[derive(Debug)]
pub(super) struct Input {
    /// The stream.
    x: CubeTensor,
    /// The state, where ranks share rows.
    before: Option<CubeTensor>,
    /// What ranks that share the block have made together: nothing is sent again.
    joined: Option<Joined>,
}

/// What the token mixer of all ranks has made.
#[derive(Clone, Debug)]
struct Joined {
    /// Σ o² over the heads of all, of every token: `[N]` in float32.
    squares: CubeTensor,
    /// The stream after it.
    middle: CubeTensor,
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
    /// Σ o² over the heads of all ranks, where they share the block: 1, in float32.
    squares: Option<CubeTensor>,
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

    /// As far as the factors of SGLU, of `partners`' parts too where there are any. `joined` is what they have made before.
    fn products(
        &self,
        input: Input,
        documents: &Documents,
        relay: Relay<'_>,
        partners: Option<&dyn Partners>,
    ) -> Products {
        let (mixer, theta) = (self.mixer(documents), self.theta.as_ref());
        let Input { x, before, joined } = input;
        let projected = linear::forward(&srms_norm::forward_on_cuda(&x), &self.qkvu, None);
        let before = before.or_else(|| relay.receive.map(|receive| receive()));
        let attended = match relay.send {
            None => mixer.attend(&projected, theta, before.as_ref(), None),
            Some(send) => {
                let (attended, after) = mixer.attend_and_leave(&projected, theta, before.as_ref());
                send(after);
                attended
            }
        };
        let (middle, normed, squares) = match (joined, partners) {
            (Some(Joined { squares, middle }), _) => {
                let normed = srms_norm::forward_on_cuda(&middle);
                (middle, normed, Some(squares))
            }
            (None, Some(partners)) => {
                let ([middle, normed], squares) = self.mixed(&x, &projected, &attended, partners);
                (middle, normed, Some(squares))
            }
            (None, None) => {
                let middle = linear::forward(&mixer.gate(&projected, &attended), &self.out, Some(&x));
                let normed = srms_norm::forward_on_cuda(&middle);
                (middle, normed, None)
            }
        };
        let factors = linear::forward(&normed, &self.up, None);
        Products { x, projected, before, attended, squares, middle, factors }
    }

    /// The stream after the token mixer of all partners and its norm, and the squares of the attention's output of all.
    fn mixed(
        &self,
        x: &CubeTensor,
        projected: &CubeTensor,
        attended: &CubeTensor,
        partners: &dyn Partners,
    ) -> ([CubeTensor; 2], CubeTensor) {
        let (u, channels) = (gate_of(projected), cuda::rows(attended).0[1] * partners.world());
        let [gated, squares] = Part { u: &u, o: attended, width: channels }.forward();
        let squares_come = partners.add_up(&squares);
        let term = linear::forward(&gated, &self.out, None);
        drop(gated);
        let sum_comes = partners.add_up(&term);
        squares_come();
        sum_comes();
        (srms_norm::add_scaled_forward_on_cuda(x, &term, &squares, channels), squares)
    }

    /// The stream after the block for the stream `x: [N, D]` before it, and what the backward needs;
    /// only what the block begins with where `again`.
    pub(super) fn forward(
        &self,
        x: CubeTensor,
        documents: &Documents,
        again: bool,
        relay: Relay<'_>,
        partners: Option<&dyn Partners>,
    ) -> (CubeTensor, Kept) {
        let input = Input { x, before: None, joined: None };
        let products = self.products(input, documents, relay, partners);
        let past = partners.is_none().then_some(&products.middle);
        let term = linear::forward(&sglu::forward(&products.factors), &self.down, past);
        let y = match partners {
            None => term,
            Some(partners) => {
                partners.add_up(&term)();
                srms_norm::add_on_cuda(&products.middle, &term)
            }
        };
        let kept = match again {
            true => {
                let Products { x, before, squares, middle, .. } = products;
                let joined = squares.map(|squares| Joined { squares, middle });
                Kept::Input(Box::new(Input { x, before, joined }))
            }
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
    /// to their sums. `relay` is asked for once.
    pub(super) fn backward<'a>(
        &self,
        sums: &Gradients,
        kept: Kept,
        dy: CubeTensor,
        documents: &Documents,
        relay: impl Fn() -> Relay<'a>,
        partners: Option<&dyn Partners>,
    ) -> CubeTensor {
        // What partners add up for the channel mixer goes before a state that may be long in coming.
        let early = partners.is_none().then(&relay);
        let products = match kept {
            Kept::Products(products) => *products,
            Kept::Input(input) => self.products(*input, documents, Relay::default(), partners),
        };
        let Products { x, projected, before, attended, squares, middle, factors } = products;
        let ([tokens, width], _) = cuda::rows(&middle);

        // The channel mixer.
        let d_product = linear::backward_input(&dy, &self.down);
        let product = cuda::empty_like(&d_product);
        let d_factors = sglu::backward(&factors, &d_product, Some(&product));
        drop((factors, d_product));
        add(&sums.down, &dy, &product);
        drop(product);
        let d_normed = linear::backward_input(&d_factors, &self.up);
        let d_middle = match partners {
            None => {
                let normed = cuda::empty_like(&middle);
                let d_middle = srms_norm::backward_on_cuda(&middle, &d_normed, Some(&dy), Some(&normed));
                drop((middle, d_normed, dy));
                add(&sums.up, &d_factors, &normed);
                d_middle
            }
            Some(partners) => {
                let d_middle = joined_backward(partners, &middle, &d_normed, &dy, (&sums.up, &d_factors));
                drop((middle, d_normed, dy));
                d_middle
            }
        };
        drop(d_factors);

        // The token mixer.
        let d_gated = linear::backward_input(&d_middle, &self.out);
        let ([_, inner], _) = cuda::rows(&attended);
        let u = gate_of(&projected);
        let part = partners.zip(squares.as_ref()).map(|(partners, squares)| {
            let part = Part { u: &u, o: &attended, width: inner * partners.world() };
            let [gated, dots] = part.again(&d_gated, squares);
            let dots_come = partners.add_up(&dots);
            add(&sums.out, &d_middle, &gated);
            dots_come();
            (part, squares, dots)
        });
        let relay = early.unwrap_or_else(&relay);
        let (mixer, theta) = (self.mixer(documents), self.theta.as_ref().zip(sums.theta.as_ref()));
        let gated = part.is_none().then(|| cuda::empty(&attended, [tokens, inner], DType::BF16));
        let d_after = relay.receive.map(|receive| receive());
        let leaving = relay.send.map(|send| (send, mixer.state(&attended, inner, theta.is_some())));
        let states = States {
            before: before.as_ref(),
            d_after: d_after.as_ref(),
            d_before: leaving.as_ref().map(|(_, d_before)| d_before),
        };
        let d_projected = match &part {
            None => mixer.backward(&projected, theta, &attended, &d_gated, gated.as_ref(), states),
            Some((part, squares, dots)) => {
                let backward = |_: &CubeTensor, du: &CubeTensor| part.backward(&d_gated, squares, dots, du);
                mixer.backward_with(&projected, theta, backward, states)
            }
        };
        if let Some((send, d_before)) = leaving {
            send(d_before);
        }
        drop(part);
        drop((u, projected, before, d_after, attended, d_gated));
        if let Some(gated) = gated {
            add(&sums.out, &d_middle, &gated);
        }
        let d_normed = linear::backward_input(&d_projected, &self.qkvu);
        if let Some(partners) = partners {
            return joined_backward(partners, &x, &d_normed, &d_middle, (&sums.qkvu, &d_projected));
        }
        let normed = cuda::empty(&x, [tokens, width], DType::BF16);
        let dx = srms_norm::backward_on_cuda(&x, &d_normed, Some(&d_middle), Some(&normed));
        add(&sums.qkvu, &d_projected, &normed);
        dx
    }
}

/// The gradient of the stream `x` that a half of a block begins with, from the partners' terms of that of its norm and from `dy`,
/// which reaches it past the half. Meanwhile adds the gradient of the projection of the norm to its sum, from that of what
/// it gave.
fn joined_backward(
    partners: &dyn Partners,
    x: &CubeTensor,
    d_normed: &CubeTensor,
    dy: &CubeTensor,
    (sum, d_projected): (&GradientSum, &CubeTensor),
) -> CubeTensor {
    let sum_comes = partners.add_up(d_normed);
    add(sum, d_projected, &srms_norm::forward_on_cuda(x));
    sum_comes();
    srms_norm::backward_on_cuda(x, d_normed, Some(dy), None)
}

impl Gradients {
    /// All of them.
    pub(super) fn sums(&self) -> impl Iterator<Item = &GradientSum> {
        [&self.qkvu, &self.out, &self.up, &self.down].into_iter().chain(&self.theta)
    }
}
