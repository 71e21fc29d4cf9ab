//! SRMSNorm: division by the root mean square, without parameters (arXiv 2307.14995, section 3.3).

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::cpu::{self, CpuOperation, FlexTensor};
use super::lanes::dot;

/// Added to the root mean square.
pub(crate) const EPSILON: f64 = 1e-8;

/// `x / (‖x‖₂/√d + 1e-8)` over the last axis of `x: [N, d]`.
pub fn srms_norm(x: Tensor<2>) -> Tensor<2> {
    if super::has_cpu_form(&x) {
        return cpu::apply(SrmsNorm, [x]);
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

impl CpuOperation<1> for SrmsNorm {
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

    fn backward(&self, saved: Vec<FlexTensor>, gradient: FlexTensor) -> [FlexTensor; 1] {
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
        [cpu::tensor(dx, [rows, width])]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random};

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
