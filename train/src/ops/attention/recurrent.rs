//! One token after the other with a state of constant size: generation.

use burn::tensor::Tensor;
use burn::tensor::TensorData;

use crate::ops::sequences::Sequences;

/// Attention of `q, k: [B, H, T, K]`, `v: [B, H, T, V]`, with `decay` the λ of every head, from
/// `state: [B, H, K, V]` on (zero without one). Gives the output `[B, H, T, V]` and the state after
/// the last token.
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    decay: &[f64],
    sequences: &Sequences,
    state: Option<Tensor<4>>,
) -> (Tensor<4>, Tensor<4>) {
    let [rows, heads, length, key] = q.dims();
    let value = v.dims()[3];
    let options = (&q.device(), q.dtype());
    let mut state = state.unwrap_or_else(|| Tensor::zeros([rows, heads, key, value], options));
    let mut outputs = Vec::with_capacity(length);
    for t in 0..length {
        let factor: Vec<f64> = (0..rows)
            .map(|row| sequences.positions(row)[t])
            .flat_map(|position| {
                let keep = if position == 0 { 0.0 } else { 1.0 };
                decay.iter().map(move |rate| keep * (-rate).exp())
            })
            .collect();
        let factor = TensorData::new(factor, [rows, heads, 1, 1]);
        let token = |x: &Tensor<4>| x.clone().narrow(2, t, 1);
        let update = token(&k).transpose().matmul(token(&v));
        state = state * Tensor::from_data(factor, options) + update;
        outputs.push(token(&q).matmul(state.clone()));
    }
    (Tensor::cat(outputs, 2), state)
}
