//! The gate on the way out of the token mixer: `u ⊙ SRMSNorm(o)`.

use burn::tensor::Tensor;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::operation::{Operation, apply};
use super::srms_norm;
use crate::cuda::{self, Work};

/// `u ⊙ SRMSNorm(o)` for `u, o: [N, E]`, the norm over the last axis.
pub fn gate(u: Tensor<2>, o: Tensor<2>) -> Tensor<2> {
    if super::has_cuda_form(&o) && srms_norm::has_kernel(o.dims()[1]) {
        return apply::<CubeBackend, _, _, _>(Gate, [u, o]);
    }
    u * srms_norm::srms_norm(o)
}

#[derive(Clone, Debug)]
struct Gate;

/// The gate of a contiguous `o`, in bf16, on CUDA; the rows of `u` may be apart, as in the projection it is part of.
pub fn forward(u: &CubeTensor, o: &CubeTensor) -> CubeTensor {
    let ([rows, width], _) = cuda::rows(o);
    let (_, stride) = cuda::rows(u);
    let y = cuda::empty_like(o);
    let (kernel, grid) = srms_norm::kernel("gate_forward", rows, width);
    let mut work = Work::near(o);
    let arguments = [cuda::view(u), cuda::u32(stride as u32), cuda::read(o), cuda::write(&y), cuda::u32(rows as u32)];
    work.launch(&kernel, grid, &arguments);
    work.submit();
    y
}

/// Writes the gradient of u into `du`, whose rows may be apart, and gives that of o, on CUDA. Writes the gate's
/// output once more into `y` where that is given, for who did not keep it.
pub fn backward(
    u: &CubeTensor,
    o: &CubeTensor,
    dy: &CubeTensor,
    du: &CubeTensor,
    y: Option<&CubeTensor>,
) -> CubeTensor {
    let ([rows, width], _) = cuda::rows(o);
    let ((_, stride), (_, du_stride)) = (cuda::rows(u), cuda::rows(du));
    let d_o = cuda::empty_like(o);
    let (kernel, grid) = srms_norm::kernel("gate_backward", rows, width);
    let mut work = Work::near(o);
    let arguments = [
        cuda::view(u),
        cuda::u32(stride as u32),
        cuda::read(o),
        cuda::read(dy),
        cuda::write(du),
        cuda::u32(du_stride as u32),
        cuda::write(&d_o),
        y.map_or_else(cuda::absent, cuda::write),
        cuda::u32(rows as u32),
    ];
    work.launch(&kernel, grid, &arguments);
    work.submit();
    d_o
}

impl Operation<CubeBackend, 2> for Gate {
    fn forward(&self, [u, o]: [CubeTensor; 2], _tracked: bool) -> (CubeTensor, Vec<CubeTensor>) {
        let (u, o) = (cuda::in_rows(u), into_contiguous(o));
        (forward(&u, &o), vec![u, o])
    }

    fn backward(&self, saved: Vec<CubeTensor>, dy: CubeTensor, _: [bool; 2]) -> [Option<CubeTensor>; 2] {
        let du = cuda::empty_like(&saved[1]);
        let d_o = backward(&saved[0], &saved[1], &into_contiguous(dy), &du, None);
        [Some(du), Some(d_o)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close_on_cuda, cuda_device, on, random, rounded};

    #[test]
    fn cuda_form_equals_the_cpu_form_for_rows_that_are_apart() {
        let Some(device) = cuda_device("gate") else { return };
        for [rows, width] in [[1, 8], [70, 1024], [5, 2560], [3, 8192]] {
            // The gate is the last quarter of what the projection gives.
            let (wide, o, factor) = (random([rows, 4 * width], 1), random([rows, width], 2), random([rows, width], 3));
            let run = |wide: Tensor<2>, o: Tensor<2>, factor: Tensor<2>| {
                let (wide, o) = (wide.autodiff().require_grad(), o.autodiff().require_grad());
                let y = gate(wide.clone().narrow(1, 3 * width, width), o.clone());
                let gradients = (y.clone() * factor.autodiff()).sum().backward();
                [y.inner(), wide.grad(&gradients).unwrap(), o.grad(&gradients).unwrap()]
            };
            let got = run(on(&wide, &device), on(&o, &device), on(&factor, &device));
            let want = run(rounded(wide), rounded(o), rounded(factor));
            for (what, (got, want)) in ["y", "du", "do"].into_iter().zip(got.into_iter().zip(want)) {
                assert_close_on_cuda(what, got, want, 3e-3);
            }
        }
    }
}
