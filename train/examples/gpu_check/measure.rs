//! Time against the floor, and the check of values.

use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};
use burn_cubecl::tensor::CubeTensor;
use train::cuda;

/// The device, its ceilings and what the checks gave.
pub struct Bench {
    pub device: Device,
    /// Bytes per second, read and written, of a large copy.
    pub bandwidth: f64,
    /// Operations per second of a large bf16 product.
    pub operations: f64,
    pub checks: usize,
    pub failed: Vec<String>,
}

/// Batches of a measurement, and seconds of one.
const BATCHES: usize = 9;
const BATCH_S: f64 = 0.02;

impl Bench {
    pub fn new(device: Device) -> Self {
        Self { device, bandwidth: 0.0, operations: 0.0, checks: 0, failed: Vec::new() }
    }

    /// Seconds a call, by the host's clock around batches that end with the device idle: the median.
    pub fn seconds(&self, mut call: impl FnMut()) -> f64 {
        let mut batch = |count: usize| {
            let begin = Instant::now();
            (0..count).for_each(|_| call());
            self.device.sync().unwrap();
            begin.elapsed().as_secs_f64() / count as f64
        };
        batch(2);
        let count = (BATCH_S / batch(1)).ceil().clamp(1.0, 2000.0) as usize;
        let mut times: Vec<f64> = (0..BATCHES).map(|_| batch(count)).collect();
        times.sort_by(f64::total_cmp);
        times[BATCHES / 2]
    }

    /// A line of the table for what moves `bytes` at least.
    pub fn bytes(&self, what: &str, bytes: f64, call: impl FnMut()) -> f64 {
        let seconds = self.seconds(call);
        let floor = bytes / self.bandwidth;
        println!(
            "{what:<44} {:>8.4} ms  {:>6.0} GB/s  floor {:>7.4} ms, {:.2}x",
            1e3 * seconds,
            bytes / seconds / 1e9,
            1e3 * floor,
            seconds / floor
        );
        seconds
    }

    /// A line of the table for what takes `operations` of the matrix units.
    pub fn operations(&self, what: &str, operations: f64, call: impl FnMut()) -> f64 {
        let seconds = self.seconds(call);
        let floor = operations / self.operations;
        println!(
            "{what:<44} {:>8.4} ms  {:>6.0} TFLOP/s  floor {:>7.4} ms, {:.2}x",
            1e3 * seconds,
            operations / seconds / 1e12,
            1e3 * floor,
            seconds / floor
        );
        seconds
    }

    /// ‖got − want‖ ≤ tolerance·‖want‖; what is not a number fails.
    pub fn close(&mut self, what: &str, got: &[f32], want: &[f64], tolerance: f64) {
        let error: f64 = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum();
        let norm: f64 = want.iter().map(|w| w * w).sum();
        let relative = if error == 0.0 { 0.0 } else { (error / norm).sqrt() };
        // The norm of a few values does not average their rounding.
        let tolerance = if got.len() < 256 { tolerance.max(4e-3) } else { tolerance };
        let fits = got.len() == want.len() && relative <= tolerance;
        self.that(&format!("{what}: relative error {relative:.2e} of {tolerance:.1e} over {} values", got.len()), fits);
    }

    pub fn that(&mut self, what: &str, holds: bool) {
        self.checks += 1;
        println!("   {} {what}", if holds { "ok  " } else { "FAIL" });
        if !holds {
            self.failed.push(what.to_owned());
        }
    }

    /// Standard normal values times `scale`.
    pub fn normal<const D: usize>(&self, shape: [usize; D], dtype: DType, scale: f64) -> CubeTensor {
        cuda::contiguous(cuda::of(Tensor::<D>::random(shape, Distribution::Normal(0.0, scale), (&self.device, dtype))))
    }

    /// Given values in `dtype`.
    pub fn place<const D: usize>(&self, values: Vec<f32>, shape: [usize; D], dtype: DType) -> CubeTensor {
        cuda::contiguous(cuda::of(Tensor::<D>::from_data(TensorData::new(values, shape), (&self.device, dtype))))
    }

    /// Leaves NaN in memory of this size that was given back, for the next allocation to find.
    pub fn poison(&self, values: usize, dtype: DType) {
        let nan = Tensor::<1>::full([values], f32::NAN, (&self.device, dtype));
        self.device.sync().unwrap();
        drop(nan);
    }
}

/// The values of a buffer of any dtype and layout.
pub fn host(buffer: &CubeTensor) -> Vec<f32> {
    let read = |data: TensorData| data.convert::<f32>().try_into_vec().unwrap();
    match buffer.meta.shape().num_dims() {
        1 => read(cuda::to_tensor::<1>(buffer.clone()).into_data()),
        _ => read(cuda::to_tensor::<2>(buffer.clone()).into_data()),
    }
}

/// In float64.
pub fn host64(buffer: &CubeTensor) -> Vec<f64> {
    host(buffer).into_iter().map(f64::from).collect()
}

/// Deterministic numbers for indices and targets.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn below(&mut self, end: u32) -> u32 {
        (self.unit() * f64::from(end)) as u32
    }

    pub fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}
