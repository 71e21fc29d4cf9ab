//! The definition, quadratic in T: what the other forms are tested against.

use burn::tensor::{Tensor, TensorData};

use crate::ops::sequences::Sequences;

/// Attention of `q, k: [B, H, T, K]`, `v: [B, H, T, V]` as a masked product of T×T scores, with
/// `decay` the λ of every head. Gives `[B, H, T, V]` in the type of `q`.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, decay: &[f64], sequences: &Sequences) -> Tensor<4> {
    let length = sequences.length();
    let mut mask = vec![0f64; sequences.rows() * decay.len() * length * length];
    for (index, line) in mask.chunks_exact_mut(length.max(1)).enumerate() {
        let (rest, i) = (index / length, index % length);
        let (row, rate) = (rest / decay.len(), decay[rest % decay.len()]);
        // A document that began before this row is seen as far as the row holds it.
        let begin = i.saturating_sub(sequences.positions(row)[i] as usize);
        for (j, factor) in line.iter_mut().enumerate().take(i + 1).skip(begin) {
            *factor = (-rate * (i - j) as f64).exp();
        }
    }
    let shape = [sequences.rows(), decay.len(), length, length];
    let mask = Tensor::<4>::from_data(TensorData::new(mask, shape), (&q.device(), q.dtype()));
    q.matmul(k.transpose()).mul(mask).matmul(v)
}
