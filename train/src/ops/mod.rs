//! The model's operations, one file each.
//!
//! Every operation takes and gives `burn` tensors and works on any device through tensor
//! primitives. On Burn's CPU backend (Flex) in float32 the costly ones have their own forward and
//! backward; the composed form of tensor primitives stays beside it and is what it is tested
//! against.

pub mod attention;
pub(crate) mod cpu;
pub mod cross_entropy;
pub mod embedding;
mod exp;
mod lanes;
pub mod lrpe;
pub mod sequences;
pub mod srms_norm;

#[cfg(test)]
pub(crate) mod testing;

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, Tensor};

/// Whether `device` is Burn's CPU backend, with or without autodiff.
pub(crate) fn is_flex(device: &Device) -> bool {
    matches!(device.as_dispatch().clone().inner(), DispatchDevice::Flex(_))
}

/// Whether an operation on `x` runs in its own CPU form: Flex, float32.
pub(crate) fn has_cpu_form<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && is_flex(&x.device())
}
