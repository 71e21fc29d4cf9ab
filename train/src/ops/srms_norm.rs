//! SRMSNorm: division by the root mean square, without parameters (arXiv 2307.14995, section 3.3).

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use rayon::prelude::*;

use super::cpu::{self, FlexTensor};
use super::lanes::dot;
use super::operation::{Operation, apply};
use crate::cuda::{self, Grid, Kernel, Source, Work};

/// The kernels of the norm and of the gate, [`super::gate`].
pub(crate) static SOURCE: Source = Source { name: "norm.cu", text: include_str!("../kernels/norm.cu") };

/// Added to the root mean square.
pub(crate) const EPSILON: f64 = 1e-8;

/// `x / (‖x‖₂/√d + 1e-8)` over the last axis of `x: [N, d]`.
pub fn srms_norm(x: Tensor<2>) -> Tensor<2> {
    if super::has_cpu_form(&x) {
        return apply::<Flex, _, _, _>(SrmsNorm, [x]);
    }
    if super::has_cuda_form(&x) && has_kernel(x.dims()[1]) {
        return apply::<CubeBackend, _, _, _>(SrmsNorm, [x]);
    }
    composed(x)
}

/// The same of tensor primitives.
pub(crate) fn composed(x: Tensor<2>) -> Tensor<2> {
    let root = x.clone().square().mean_dim(1).sqrt();
    x / (root + EPSILON)
}

/// 1/(r + ε) and r for the root mean square r of `x`.
pub(crate) fn scale(sum_of_squares: f32, width: usize) -> (f32, f32) {
    let root = (sum_of_squares / width as f32).sqrt();
    (1.0 / (root + EPSILON as f32), root)
}

/// Factor c of x in `dx = dy·s - x·c`, from `dot = Σ dy·x` and what [`scale`] gave.
pub(crate) fn backward_factor(dot: f32, (scale, root): (f32, f32), width: usize) -> f32 {
    // At x = 0 the norm has no derivative; its part is left out there.
    if root > 0.0 { dot * scale * scale / (root * width as f32) } else { 0.0 }
}

#[derive(Clone, Debug)]
struct SrmsNorm;

/// Rows that one task takes.
const ROWS: usize = 64;

impl Operation<Flex, 1> for SrmsNorm {
    fn forward(&self, [x]: [FlexTensor; 1], _tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let x = cpu::contiguous(x);
        let [rows, width] = x.layout().shape().dims();
        let mut y = vec![0f32; rows * width];
        let tasks = y.par_chunks_mut(ROWS * width);
        let from = cpu::values(&x).par_chunks(ROWS * width);
        tasks.zip(from).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                let (scale, _) = scale(dot(x, x), width);
                for (y, x) in y.iter_mut().zip(x) {
                    *y = x * scale;
                }
            }
        });
        (cpu::tensor(y, [rows, width]), vec![x])
    }

    fn backward(&self, saved: Vec<FlexTensor>, gradient: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let (x, gradient) = (&saved[0], cpu::contiguous(gradient));
        let [rows, width] = x.layout().shape().dims();
        let mut dx = vec![0f32; rows * width];
        let tasks = dx.par_chunks_mut(ROWS * width);
        let x = cpu::values(x).par_chunks(ROWS * width);
        let dy = cpu::values(&gradient).par_chunks(ROWS * width);
        tasks.zip(x).zip(dy).for_each(|((dx, x), dy)| {
            let lines = dx.chunks_exact_mut(width).zip(x.chunks_exact(width));
            for ((dx, x), dy) in lines.zip(dy.chunks_exact(width)) {
                let scale = scale(dot(x, x), width);
                let factor = backward_factor(dot(dy, x), scale, width);
                for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
                    *dx = dy * scale.0 - x * factor;
                }
            }
        });
        [Some(cpu::tensor(dx, [rows, width]))]
    }
}

/// Whether the kernels take rows of `width` values.
pub(crate) fn has_kernel(width: usize) -> bool {
    width > 0 && width.is_multiple_of(8) && width <= 1 << 14
}

/// A kernel for rows of `width` values, and the launch for `rows` of them.
pub(crate) fn kernel(entry: &'static str, rows: usize, width: usize) -> (Kernel, Grid) {
    assert!(has_kernel(width), "no kernel for rows of {width} values");
    // Warps that share a row: each lane holds at most 32 of its values, as long as a block lasts.
    let group = width.div_ceil(1024).next_power_of_two().min(8);
    let kernel = Kernel::new(&SOURCE, entry).define("WIDTH", width as i64).define("GROUP", group as i64);
    (kernel, Grid::new(rows.div_ceil(8 / group) as u32, 256))
}

/// The norm of the rows of a contiguous `x`, in bf16.
pub fn forward_on_cuda(x: &CubeTensor) -> CubeTensor {
    let ([rows, width], _) = cuda::rows(x);
    let y = cuda::empty_like(x);
    let (kernel, grid) = kernel("norm_forward", rows, width);
    let mut work = Work::near(x);
    work.launch(&kernel, grid, &[cuda::read(x), cuda::write(&y), cuda::u32(rows as u32)]);
    work.submit();
    y
}

/// `x + branch` and its norm, in one pass.
pub fn add_forward_on_cuda(x: &CubeTensor, branch: &CubeTensor) -> [CubeTensor; 2] {
    let ([rows, width], _) = cuda::rows(x);
    let (sum, y) = (cuda::empty_like(x), cuda::empty_like(x));
    let (kernel, grid) = kernel("add_norm_forward", rows, width);
    let mut work = Work::near(x);
    let rows = cuda::u32(rows as u32);
    work.launch(&kernel, grid, &[cuda::read(x), cuda::read(branch), cuda::write(&sum), cuda::write(&y), rows]);
    work.submit();
    [sum, y]
}

/// `x + branch` alone.
pub(crate) fn add_on_cuda(x: &CubeTensor, branch: &CubeTensor) -> CubeTensor {
    let ([rows, width], _) = cuda::rows(x);
    let sum = cuda::empty_like(x);
    let (kernel, grid) = kernel("add_norm_forward", rows, width);
    let mut work = Work::near(x);
    let rows = cuda::u32(rows as u32);
    work.launch(&kernel, grid, &[cuda::read(x), cuda::read(branch), cuda::write(&sum), cuda::absent(), rows]);
    work.submit();
    sum
}

/// `x + s · branch` and its norm, with the s of rows of `channels` values whose `squares: [N]` in float32 have been added up.
pub(crate) fn add_scaled_forward_on_cuda(
    x: &CubeTensor,
    branch: &CubeTensor,
    squares: &CubeTensor,
    channels: usize,
) -> [CubeTensor; 2] {
    let ([rows, width], _) = cuda::rows(x);
    let (sum, y) = (cuda::empty_like(x), cuda::empty_like(x));
    let (kernel, grid) = kernel("add_scaled_norm_forward", rows, width);
    let arguments = [
        cuda::read(x),
        cuda::read(branch),
        cuda::read(squares),
        cuda::u32(channels as u32),
        cuda::write(&sum),
        cuda::write(&y),
        cuda::u32(rows as u32),
    ];
    let mut work = Work::near(x);
    work.launch(&kernel, grid, &arguments);
    work.submit();
    [sum, y]
}

/// The gradient of `x`, plus `residual`: what reaches x past the norm. Writes the norm once more into `y` where
/// that is given, for who did not keep it.
pub fn backward_on_cuda(
    x: &CubeTensor,
    dy: &CubeTensor,
    residual: Option<&CubeTensor>,
    y: Option<&CubeTensor>,
) -> CubeTensor {
    let ([rows, width], _) = cuda::rows(x);
    let dx = cuda::empty_like(x);
    let mut work = Work::near(x);
    let count = cuda::u32(rows as u32);
    let y = y.map_or_else(cuda::absent, cuda::write);
    match residual {
        None => {
            let (kernel, grid) = kernel("norm_backward", rows, width);
            work.launch(&kernel, grid, &[cuda::read(x), cuda::read(dy), cuda::write(&dx), y, count]);
        }
        Some(residual) => {
            let (kernel, grid) = kernel("norm_backward_add", rows, width);
            let arguments = [cuda::read(x), cuda::read(dy), cuda::read(residual), cuda::write(&dx), y, count];
            work.launch(&kernel, grid, &arguments);
        }
    }
    work.submit();
    dx
}

impl Operation<CubeBackend, 1> for SrmsNorm {
    fn forward(&self, [x]: [CubeTensor; 1], _tracked: bool) -> (CubeTensor, Vec<CubeTensor>) {
        let x = into_contiguous(x);
        (forward_on_cuda(&x), vec![x])
    }

    fn backward(&self, saved: Vec<CubeTensor>, dy: CubeTensor, _: [bool; 1]) -> [Option<CubeTensor>; 1] {
        [Some(backward_on_cuda(&saved[0], &into_contiguous(dy), None, None))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, assert_close_on_cuda, cuda_device, on, random, rounded};

    #[test]
    fn cuda_form_equals_the_cpu_form() {
        let Some(device) = cuda_device("srms_norm") else { return };
        // One and several warps a row, rows that do not fill a block or a lane.
        for [rows, width] in [[1, 8], [3, 264], [70, 1024], [9, 1032], [5, 2560], [3, 8192], [2, 12288]] {
            let (x, factor) = (random([rows, width], 1), random([rows, width], 2));
            let run = |x: Tensor<2>, factor: Tensor<2>| {
                let x = x.autodiff().require_grad();
                let y = srms_norm(x.clone());
                let gradients = (y.clone() * factor.autodiff()).sum().backward();
                [y.inner(), x.grad(&gradients).unwrap()]
            };
            let got = run(on(&x, &device), on(&factor, &device));
            let want = run(rounded(x), rounded(factor));
            for (what, (got, want)) in ["y", "dx"].into_iter().zip(got.into_iter().zip(want)) {
                assert_close_on_cuda(what, got, want, 3e-3);
            }
        }
    }

    #[test]
    fn sums_and_their_norms_are_those_of_float64() {
        let Some(device) = cuda_device("sums with a norm") else { return };
        for [rows, width, channels] in [[1, 8, 16], [70, 1024, 512], [9, 1032, 1032], [3, 8192, 2048]] {
            let (x, branch) = (random([rows, width], 1), random([rows, width], 2));
            let values = |tensor: &Tensor<2>| -> Vec<f64> { rounded(tensor.clone()).try_into_vec_as().unwrap() };
            let (tx, tb) = (values(&x), values(&branch));
            let squares: Vec<f32> = (0..rows).map(|row| channels as f32 * (0.5 + row as f32)).collect();
            let [near, branch] = [&x, &branch].map(|tensor| cuda::contiguous(cuda::of(on(tensor, &device))));
            let sums = cuda::upload_floats(&near.device, &squares);
            let one = add_on_cuda(&near, &branch);
            let [plain, plain_norm] = add_forward_on_cuda(&near, &branch);
            let [scaled, scaled_norm] = add_scaled_forward_on_cuda(&near, &branch, &sums, channels);
            let [one, plain, scaled] = [one, plain, scaled].map(|sum| cuda::download_floats(&sum).unwrap());
            assert!(one == plain);
            let scale = |row: usize| 1.0 / ((f64::from(squares[row]) / channels as f64).sqrt() + EPSILON);
            for (at, (plain, scaled)) in plain.iter().zip(&scaled).enumerate() {
                for (got, want) in [(plain, tx[at] + tb[at]), (scaled, tx[at] + tb[at] * scale(at / width))] {
                    // Half a unit of bf16, and what float32 loses where much cancels.
                    let most = want.abs() * 2f64.powi(-8) + 1e-6 * tx[at].abs();
                    assert!((f64::from(*got) - want).abs() <= most, "{rows} {width} {at}: {got} {want}");
                }
            }
            for (sum, norm) in [(plain, plain_norm), (scaled, scaled_norm)] {
                let norm = cuda::download_floats(&norm).unwrap();
                for (row, norm) in norm.chunks(width).enumerate() {
                    let sum = &sum[row * width..(row + 1) * width];
                    let square: f64 = sum.iter().map(|x| f64::from(*x).powi(2)).sum();
                    let root = (square / width as f64).sqrt() + EPSILON;
                    for (got, x) in norm.iter().zip(sum) {
                        let want = f64::from(*x) / root;
                        assert!((f64::from(*got) - want).abs() <= want.abs() * 2f64.powi(-8), "{got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn cpu_form_equals_the_composed_one_with_its_gradient() {
        for [rows, width] in [[1, 1], [3, 7], [130, 64]] {
            let (x, weight) = (random([rows, width], 1), random([rows, width], 2));
            let run = |norm: fn(Tensor<2>) -> Tensor<2>| {
                let x = x.clone().autodiff().require_grad();
                let y = norm(x.clone());
                let gradients = (y.clone() * weight.clone()).sum().backward();
                (y.inner(), x.grad(&gradients).unwrap())
            };
            let (own, composed) = (run(srms_norm), run(composed));
            assert_close("y", own.0, composed.0, 1e-6);
            // At width 1 the gradient is rounding alone.
            if width > 1 {
                assert_close("dx", own.1, composed.1, 1e-5);
            }
        }
    }

    #[test]
    fn zeros_stay_finite() {
        let x = Tensor::<2>::zeros([2, 8], &burn::tensor::Device::flex().autodiff()).require_grad();
        let y = srms_norm(x.clone());
        let gradient = x.grad(&y.clone().sum().backward()).unwrap();
        for tensor in [y.inner(), gradient] {
            let values = tensor.into_data().try_into_vec::<f32>().unwrap();
            assert!(values.iter().all(|value| value.is_finite()));
        }
    }
}
