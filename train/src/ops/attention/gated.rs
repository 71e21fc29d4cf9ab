//! The token mixer between its two projections: SiLU, LRPE, attention, norm and gate.

use std::sync::Arc;

use burn::backend::Flex;
use burn::tensor::{Tensor, activation};

use super::{chunked, gated_cpu::GatedAttention, gated_cuda};
use crate::ops::lrpe::lrpe;
use crate::ops::operation::apply;
use crate::ops::sequences::Sequences;
use crate::ops::srms_norm::srms_norm;
use crate::ops::{has_cpu_form, has_cuda_form};

/// One form of the attention: (q, k, v, λ per head, documents, incoming state) gives the output and
/// the state after the last token.
pub type Form = fn(Tensor<4>, Tensor<4>, Tensor<4>, &[f64], &Sequences, Option<Tensor<4>>) -> (Tensor<4>, Tensor<4>);

/// `u ⊙ SRMSNorm(attention(LRPE(SiLU(q)), LRPE(SiLU(k)), v))` for whole documents.
///
/// `qkvu: [B·T, 4E]` holds q, k, v and u side by side, as one projection gives them; `theta: [H, K]`
/// are the angles of LRPE in the layers that have it; `decay` is the λ of every head. Gives
/// `[B·T, E]`.
pub fn gated_attention(
    qkvu: Tensor<2>,
    theta: Option<Tensor<2>>,
    decay: &Arc<[f64]>,
    sequences: &Arc<Sequences>,
) -> Tensor<2> {
    if has_cuda_form(&qkvu) && gated_cuda::has_form(qkvu.dims()[1] / 4, decay.len(), sequences, theta.is_some()) {
        return gated_cuda::apply(qkvu, theta, decay, sequences);
    }
    if !has_cpu_form(&qkvu) {
        return stateful(chunked::attention, qkvu, theta, decay, sequences, None).0;
    }
    on_cpu(GatedAttention::new(decay, sequences, theta.is_some()), qkvu, theta)
}

fn on_cpu(operation: GatedAttention, qkvu: Tensor<2>, theta: Option<Tensor<2>>) -> Tensor<2> {
    match theta {
        Some(theta) => apply::<Flex, _, 2, 2>(operation, [qkvu, theta]),
        None => apply::<Flex, _, 1, 2>(operation, [qkvu]),
    }
}

/// [`gated_attention`] of some of the heads, for who has only these: `[u ⊙ o, Σ o²]` with the attention's output o, `[B·T, E]`
/// and `[B·T, 1]`, E their channels. The norm is over the channels of all heads; `Σ o²` of all together gives it.
pub fn gated_part(
    qkvu: Tensor<2>,
    theta: Option<Tensor<2>>,
    decay: &Arc<[f64]>,
    sequences: &Arc<Sequences>,
) -> [Tensor<2>; 2] {
    if !has_cpu_form(&qkvu) {
        return stateful_part(chunked::attention, qkvu, theta, decay, sequences, None).0;
    }
    let width = qkvu.dims()[1] / 4;
    let both = on_cpu(GatedAttention::new(decay, sequences, theta.is_some()).without_norm(), qkvu, theta);
    [both.clone().narrow(1, 0, width), both.narrow(1, width, 1)]
}

/// [`gated_attention`] of tensor primitives, with `form` of the attention, from `state: [B, H, K, V]`
/// on (zero without one; 2K in place of K with LRPE). Gives the state after the last token too.
pub fn stateful(
    form: Form,
    qkvu: Tensor<2>,
    theta: Option<Tensor<2>>,
    decay: &[f64],
    sequences: &Sequences,
    state: Option<Tensor<4>>,
) -> (Tensor<2>, Tensor<4>) {
    let ([u, o], state) = attend(form, qkvu, theta, decay, sequences, state);
    (u * srms_norm(o), state)
}

/// [`gated_part`] as [`stateful`] is.
pub fn stateful_part(
    form: Form,
    qkvu: Tensor<2>,
    theta: Option<Tensor<2>>,
    decay: &[f64],
    sequences: &Sequences,
    state: Option<Tensor<4>>,
) -> ([Tensor<2>; 2], Tensor<4>) {
    let ([u, o], state) = attend(form, qkvu, theta, decay, sequences, state);
    ([u * o.clone(), o.square().sum_dim(1)], state)
}

/// u and the attention's output, `[B·T, E]` each, and the state after the last token.
fn attend(
    form: Form,
    qkvu: Tensor<2>,
    theta: Option<Tensor<2>>,
    decay: &[f64],
    sequences: &Sequences,
    state: Option<Tensor<4>>,
) -> ([Tensor<2>; 2], Tensor<4>) {
    let [tokens, width] = qkvu.dims();
    let (heads, width) = (decay.len(), width / 4);
    let (rows, length) = (sequences.rows(), sequences.length());
    let part = |index: usize| qkvu.clone().narrow(1, index * width, width);
    let split = |x: Tensor<2>| -> Tensor<4> { x.reshape([rows, length, heads, width / heads]).swap_dims(1, 2) };
    let feature = |index: usize| {
        let z = activation::silu(split(part(index)));
        match &theta {
            Some(theta) => lrpe(z, theta.clone(), sequences),
            None => z,
        }
    };
    let (output, state) = form(feature(0), feature(1), split(part(2)), decay, sequences, state);
    let output: Tensor<2> = output.swap_dims(1, 2).reshape([tokens, width]);
    ([part(3), output], state)
}
