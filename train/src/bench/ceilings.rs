//! What a GPU reaches at best: the ceilings that everything else is measured against.

use burn::tensor::{DType, Device, Distribution, Tensor};
use serde::Serialize;

use super::attention::{bandwidth, seconds};
use crate::Error;
use crate::cuda::{self, Product, Work};

/// Rates of one GPU.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ceilings {
    /// Bytes read and written per second by a copy of 1 GiB.
    pub copy_bytes_per_s: f64,
    /// Operations per second of a bf16 product of two 8192 x 8192 matrices of random numbers.
    pub product_flops: f64,
}

/// Measures both.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// When `device` is no CUDA device.
pub fn ceilings(device: &Device) -> Result<Ceilings, Error> {
    const SIZE: usize = 8192;
    let copy_bytes_per_s = bandwidth(device)?;
    let normal = || {
        let tensor = Tensor::<2>::random([SIZE, SIZE], Distribution::Normal(0.0, 1.0), device);
        cuda::contiguous(cuda::of(tensor.cast(DType::BF16)))
    };
    let (a, b) = (normal(), normal());
    let out = cuda::empty_like(&a);
    let time = seconds(device, || {
        let mut work = Work::near(&a);
        work.product(&Product::new(&a, &b, &out));
        work.submit();
    })?;
    // Reading says whether the product ran: work that failed is only logged.
    let one = cuda::row_range(&out, 0, 1);
    cuda::to_tensor::<2>(one)
        .try_into_data()
        .map_err(|error| Error::Input(format!("the product failed: {error:?}")))?;
    Ok(Ceilings { copy_bytes_per_s, product_flops: 2.0 * (SIZE as f64).powi(3) / time })
}
