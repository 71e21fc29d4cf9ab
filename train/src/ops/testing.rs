//! Random tensors and comparison for the tests of the operations.

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::device::{DeviceChoice, cuda_devices};
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

/// The first CUDA device, or a line that says that the test of `what` on it is skipped, and why.
#[allow(clippy::print_stderr)]
pub(crate) fn cuda_device(what: &str) -> Option<Device> {
    match cuda_devices() {
        Ok(count) if count > 0 => Some(DeviceChoice::Cuda(0).select().unwrap()),
        Ok(_) => {
            eprintln!("skipped: {what} on CUDA, no device");
            None
        }
        Err(reason) => {
            eprintln!("skipped: {what} on CUDA, {reason}");
            None
        }
    }
}

/// [`cuda_device`] where NCCL is, too.
#[allow(clippy::print_stderr)]
pub(crate) fn nccl_device(what: &str) -> Option<Device> {
    let device = cuda_device(what)?;
    match &crate::cuda::libraries::find().collectives.found {
        Ok(_) => Some(device),
        Err(reason) => {
            eprintln!("skipped: {what} through NCCL, {reason}");
            None
        }
    }
}

/// The values in bf16 on `device`.
pub(crate) fn on<const D: usize>(tensor: &Tensor<D>, device: &Device) -> Tensor<D> {
    Tensor::from_data(tensor.to_data(), (device, DType::BF16))
}

/// The values rounded to bf16, in float32 on the CPU.
pub(crate) fn rounded<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    let shape = tensor.dims();
    let values: Vec<f32> = tensor.try_into_vec_as().unwrap();
    let values: Vec<f32> = values.into_iter().map(|x| half::bf16::from_f32(x).to_f32()).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

/// [`assert_close`] of what a CUDA device computed and the CPU's result.
#[track_caller]
pub(crate) fn assert_close_on_cuda<const D: usize>(what: &str, got: Tensor<D>, want: Tensor<D>, tolerance: f64) {
    let got: Vec<f32> = got.into_data().convert::<f32>().try_into_vec().unwrap();
    let shape = want.dims();
    let got = Tensor::from_data(TensorData::new(got, shape), &Device::flex());
    assert_close(what, got, want, tolerance);
}
