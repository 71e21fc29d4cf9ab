//! Linearised relative position encoding with learned angles (LRPE, arXiv 2307.09270).

use burn::tensor::{Tensor, TensorData};

use crate::ops::sequences::Sequences;

/// `z: [B, H, T, K]` with `theta: [H, K]` becomes `[z·cos(θt), z·sin(θt)]: [B, H, T, 2K]`, t the
/// position in the document.
pub fn lrpe(z: Tensor<4>, theta: Tensor<2>, sequences: &Sequences) -> Tensor<4> {
    let [heads, key] = theta.dims();
    let positions: Vec<f64> = sequences.all_positions().iter().map(|&position| f64::from(position)).collect();
    let shape = [sequences.rows(), 1, sequences.length(), 1];
    let positions = TensorData::new(positions, shape);
    let positions = Tensor::<4>::from_data(positions, (&z.device(), z.dtype()));
    let angle = theta.reshape([1, heads, 1, key]) * positions;
    Tensor::cat(vec![z.clone() * angle.clone().cos(), z * angle.sin()], 3)
}
