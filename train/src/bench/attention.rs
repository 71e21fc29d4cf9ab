//! Time of the CUDA operations against their floor, as `fulgurite bench` prints it.

use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_cubecl::tensor::CubeTensor;
use serde::Serialize;

use crate::cuda::{self, Work};
use crate::ops::attention::decay::decay_rates;
use crate::ops::attention::lightning::{self, Attention, Heads, States};
use crate::ops::is_cuda;
use crate::{Error, device};

/// One shape of the attention: tensors `[rows, heads, tokens, width]`, K = V.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct AttentionShape {
    /// B.
    pub rows: usize,
    /// H.
    pub heads: usize,
    /// T.
    pub tokens: usize,
    /// K = V.
    pub width: usize,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AttentionTime {
    /// The shape.
    #[serde(flatten)]
    pub shape: AttentionShape,
    /// `forward` or `backward`.
    pub pass: &'static str,
    /// Documents end every so many tokens; never without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub document_tokens: Option<usize>,
    /// Whether SiLU of q and k rides in the kernel.
    pub silu: bool,
    /// Whether tensors are float16, else bf16.
    pub float16: bool,
    /// Median time of one call.
    pub time_ms: f64,
    /// Every tensor read or written once at the rate of a large copy.
    pub floor_ms: f64,
    /// Bytes of the floor over the time.
    pub achieved_tb_per_s: f64,
}

/// Batches of a measurement, and about how long one takes.
const BATCHES: usize = 9;
const BATCH_S: f64 = 0.03;

/// Seconds a call by the host's clock, around batches of calls that end with the device idle: the median.
pub(super) fn seconds(device: &Device, mut call: impl FnMut()) -> Result<f64, Error> {
    let mut batch = |count: usize| -> Result<f64, Error> {
        let begin = Instant::now();
        (0..count).for_each(|_| call());
        device.sync().map_err(|error| Error::Input(format!("the device failed: {error:?}")))?;
        Ok(begin.elapsed().as_secs_f64() / count as f64)
    };
    batch(3)?;
    let count = (BATCH_S / batch(3)?).ceil().clamp(1.0, 2000.0) as usize;
    let mut times = (0..BATCHES).map(|_| batch(count)).collect::<Result<Vec<f64>, Error>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[BATCHES / 2])
}

/// Measures forward and backward of every shape, without and with documents of `document_tokens`
/// tokens, on random data in bf16 or float16.
///
/// # Errors
/// [`Error::Device`] when `device` is no CUDA device; [`Error::Input`] for a shape that is empty or whose heads are too wide
/// for the GPU, and when the device fails.
pub fn attention(
    device: &Device,
    shapes: &[AttentionShape],
    document_tokens: Option<usize>,
    silu: bool,
    float16: bool,
    mut on_time: impl FnMut(&AttentionTime),
) -> Result<(), Error> {
    if !is_cuda(device) {
        let reason = device::cuda_devices().map_or_else(|reason| reason.to_string(), |n| format!("{n} CUDA devices"));
        return Err(Error::Device {
            device: format!("{device:?}"),
            reason: format!("the kernels need a CUDA device: {reason}"),
        });
    }
    let bandwidth = bandwidth(device)?;
    for &shape in shapes {
        let AttentionShape { rows, heads, tokens, width } = shape;
        if rows * heads * tokens * width == 0 || document_tokens == Some(0) {
            return Err(Error::Input(format!("nothing to measure in {shape:?}")));
        }
        let normal = || {
            let tensor = Tensor::<4>::random([rows, heads, tokens, width], Distribution::Normal(0.0, 1.0), device);
            Heads::of(cuda::contiguous(cuda::of(tensor.cast(if float16 { DType::F16 } else { DType::BF16 }))))
        };
        let [q, k, v, d_o, o, d_q, d_k, d_v] = [(); 8].map(|()| normal());
        lightning::check_widths(&q, &v)?;
        let cube = q.device().clone();
        let rates: Vec<f32> = decay_rates(heads, 0, 24).into_iter().map(|rate| rate as f32).collect();
        let decay = cuda::upload_floats(&cube, &rates);
        let positions = document_tokens.map(|length| {
            let row = (0..tokens).map(|token| (token % length) as u32);
            cuda::upload(&cube, &(0..rows).flat_map(|_| row.clone()).collect::<Vec<u32>>())
        });
        let call = Attention { decay: &decay, positions: positions.as_ref(), silu };
        let bytes = (2 * rows * heads * tokens * width) as f64;
        let forward = seconds(device, || lightning::forward(&call, [&q, &k, &v], &o, None, None))?;
        let backward = seconds(device, || {
            lightning::backward(&call, [&q, &k, &v], &d_o, [&d_q, &d_k, &d_v], States::default());
        })?;
        for (pass, time, tensors) in [("forward", forward, 4.0), ("backward", backward, 7.0)] {
            on_time(&AttentionTime {
                shape,
                pass,
                document_tokens,
                silu,
                float16,
                time_ms: 1e3 * time,
                floor_ms: 1e3 * tensors * bytes / bandwidth,
                achieved_tb_per_s: tensors * bytes / time / 1e12,
            });
        }
    }
    Ok(())
}

/// Bytes per second, read and written, of a copy of 1 GiB.
pub(super) fn bandwidth(device: &Device) -> Result<f64, Error> {
    let bytes = 1 << 30;
    let buffer = || -> CubeTensor { cuda::of(Tensor::<1>::ones([bytes / 4], device)) };
    let (from, to) = (buffer(), buffer());
    let time = seconds(device, || {
        let mut work = Work::near(&from);
        work.copy(&from, &to);
        work.submit();
    })?;
    Ok(2.0 * bytes as f64 / time)
}
