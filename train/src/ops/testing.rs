//! Random tensors and comparison for the tests of the operations.

use burn::tensor::{Device, Tensor, TensorData};

use crate::rng::Rng;

/// Standard normal values in float32 on the CPU.
pub(crate) fn random<const D: usize>(shape: [usize; D], stream: u64) -> Tensor<D> {
    let mut rng = Rng::new(11, stream);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.normal() as f32).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

/// ‖got − want‖ ≤ tolerance·‖want‖, and nothing that is not a number.
#[track_caller]
pub(crate) fn assert_close<const D: usize>(what: &str, got: Tensor<D>, want: Tensor<D>, tolerance: f64) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let got: Vec<f64> = got.try_into_vec_as().unwrap();
    let want: Vec<f64> = want.try_into_vec_as().unwrap();
    let error: f64 = got.iter().zip(&want).map(|(g, w)| (g - w) * (g - w)).sum();
    let norm: f64 = want.iter().map(|w| w * w).sum();
    assert!(error.sqrt() <= tolerance * norm.sqrt(), "{what}: relative error {:e}", (error / norm).sqrt());
}
