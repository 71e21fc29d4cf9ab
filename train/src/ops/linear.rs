//! The linear layer without bias.

use burn::tensor::{DType, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::operation::{Operation, apply};
use super::weight::{GradientSum, Weight};
use crate::cuda::{self, Product, Work};

/// `x · weightᵀ` for `x: [N, in]`, `weight: [out, in]`: `[N, out]`.
pub fn linear<W: Into<Weight>>(x: Tensor<2>, weight: W) -> Tensor<2> {
    let weight = weight.into();
    if super::has_cuda_form(&x) {
        return apply::<CubeBackend, _, _, _>(Linear { sum: weight.sum }, [x, weight.value]);
    }
    composed(x, weight.without_sum())
}

/// `residual + x · weightᵀ`, the addition inside of the product where that has a form of its own.
pub fn linear_add<W: Into<Weight>>(residual: Tensor<2>, x: Tensor<2>, weight: W) -> Tensor<2> {
    let weight = weight.into();
    if super::has_cuda_form(&x) {
        return apply::<CubeBackend, _, _, _>(Linear { sum: weight.sum }, [x, weight.value, residual]);
    }
    residual + composed(x, weight.without_sum())
}

/// The same of tensor primitives.
pub(crate) fn composed(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    x.matmul(weight.transpose())
}

/// Over cuBLASLt, with the gradient of the weight in float32.
#[derive(Clone, Debug)]
struct Linear {
    sum: Option<GradientSum>,
}

/// `x · weightᵀ`, plus `residual`, in bf16, on CUDA.
pub fn forward(x: &CubeTensor, weight: &CubeTensor, residual: Option<&CubeTensor>) -> CubeTensor {
    let ([rows, _], _) = cuda::rows(x);
    let ([width, _], _) = cuda::rows(weight);
    let y = cuda::empty(x, [rows, width], DType::BF16);
    let mut work = Work::near(x);
    let product = Product::new(x, weight, &y).transpose_b();
    work.product(&match residual {
        Some(residual) => product.plus(residual),
        None => product,
    });
    work.submit();
    y
}

/// The gradient of x, `dy · weight`, in bf16, on CUDA.
pub fn backward_input(dy: &CubeTensor, weight: &CubeTensor) -> CubeTensor {
    let ([rows, _], _) = cuda::rows(dy);
    let ([_, width], _) = cuda::rows(weight);
    let dx = cuda::empty(dy, [rows, width], DType::BF16);
    let mut work = Work::near(dy);
    work.product(&Product::new(dy, weight, &dx));
    work.submit();
    dx
}

/// The gradient of the weight, `dyᵀ · x` in float32, on CUDA: into the sum, or as a tensor of its own.
pub fn backward_weight(dy: &CubeTensor, x: &CubeTensor, sum: Option<&GradientSum>) -> Option<CubeTensor> {
    let ([_, rows], _) = cuda::rows(dy);
    let ([_, columns], _) = cuda::rows(x);
    let own = sum.is_none().then(|| cuda::empty(dy, [rows, columns], DType::F32));
    let (to, accumulate) = match (sum, &own) {
        (Some(sum), _) => sum.next(),
        (None, Some(own)) => (own, false),
        (None, None) => unreachable!("made above"),
    };
    let mut work = Work::near(dy);
    work.product(&Product::new(dy, x, to).transpose_a().accumulate(accumulate));
    work.submit();
    own
}

impl Linear {
    fn gradients(&self, saved: Vec<CubeTensor>, dy: &CubeTensor, wanted: [bool; 2]) -> [Option<CubeTensor>; 2] {
        let (x, weight) = (&saved[0], &saved[1]);
        let dx = wanted[0].then(|| backward_input(dy, weight));
        let dw = if wanted[1] { backward_weight(dy, x, self.sum.as_ref()) } else { None };
        [dx, dw]
    }
}

impl Operation<CubeBackend, 2> for Linear {
    fn forward(&self, inputs: [CubeTensor; 2], _tracked: bool) -> (CubeTensor, Vec<CubeTensor>) {
        let [x, weight] = inputs.map(cuda::in_rows);
        (forward(&x, &weight, None), vec![x, weight])
    }

    fn backward(&self, saved: Vec<CubeTensor>, dy: CubeTensor, wanted: [bool; 2]) -> [Option<CubeTensor>; 2] {
        self.gradients(saved, &cuda::in_rows(dy), wanted)
    }
}

impl Operation<CubeBackend, 3> for Linear {
    fn forward(&self, inputs: [CubeTensor; 3], _tracked: bool) -> (CubeTensor, Vec<CubeTensor>) {
        let [x, weight, residual] = inputs.map(cuda::in_rows);
        (forward(&x, &weight, Some(&residual)), vec![x, weight])
    }

    fn backward(&self, saved: Vec<CubeTensor>, dy: CubeTensor, wanted: [bool; 3]) -> [Option<CubeTensor>; 3] {
        let dy = cuda::in_rows(dy);
        let [dx, dw] = self.gradients(saved, &dy, [wanted[0], wanted[1]]);
        [dx, dw, wanted[2].then_some(dy)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, assert_close_on_cuda, cuda_device, on, random, rounded};

    #[test]
    fn the_added_residual_is_the_sum() {
        let (x, weight, residual) = (random([5, 7], 1), random([3, 7], 2), random([5, 3], 3));
        let y = linear_add(residual.clone(), x.clone(), weight.clone());
        assert_close("y", y, residual + x.matmul(weight.transpose()), 1e-6);
    }

    #[test]
    fn cuda_form_equals_the_cpu_form_and_adds_to_a_sum() {
        let Some(device) = cuda_device("linear") else { return };
        for [tokens, width, out] in [[8, 8, 16], [200, 264, 72], [512, 1024, 2816]] {
            let (x, weight) = (random([tokens, width], 1), random([out, width], 2));
            let (residual, factor) = (random([tokens, out], 3), random([tokens, out], 4));
            let run = |x: Tensor<2>, weight: Tensor<2>, residual: Tensor<2>, factor: Tensor<2>| {
                let [x, weight, residual] = [x, weight, residual].map(|t| t.autodiff().require_grad());
                let y = linear_add(residual.clone(), x.clone(), weight.clone());
                let gradients = (y.clone() * factor.autodiff()).sum().backward();
                let of = |t: Tensor<2>| t.grad(&gradients).unwrap();
                [y.inner(), of(x), of(weight), of(residual)]
            };
            let got = run(on(&x, &device), on(&weight, &device), on(&residual, &device), on(&factor, &device));
            let want = run(rounded(x.clone()), rounded(weight.clone()), rounded(residual), rounded(factor.clone()));
            let dw = want[2].clone();
            for (what, (got, want)) in ["y", "dx", "dw", "dr"].into_iter().zip(got.into_iter().zip(want)) {
                assert_close_on_cuda(what, got, want, 3e-3);
            }
            let near = cuda::of(on(&weight, &device));
            let buffer = cuda::empty(&near, [out, width], DType::F32);
            let sum = GradientSum::new(buffer.clone());
            for _ in 0..2 {
                let value = on(&weight, &device).autodiff().require_grad();
                let y = linear(on(&x, &device).autodiff(), Weight::with_sum(value.clone(), sum.clone()));
                let gradients = (y * on(&factor, &device).autodiff()).sum().backward();
                assert!(value.grad(&gradients).is_none());
            }
            assert_close_on_cuda("twice dw", cuda::to_tensor::<2>(buffer), dw * 2.0, 1e-4);
        }
    }
}
