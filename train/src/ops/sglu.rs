//! The product inside of SGLU, the gated channel mixer without activation (arXiv 2307.14995, section
//! 3.4).

use burn::tensor::{DType, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::operation::{Operation, apply};
use crate::cuda::{self, Grid, Kernel, Source, Work};

pub(crate) static SOURCE: Source = Source { name: "sglu.cu", text: include_str!("../kernels/sglu.cu") };

/// `a ⊙ b` for the halves of `ab: [N, 2G]`, side by side as one projection gives them: `[N, G]`.
///
/// # Panics
/// When the width is odd.
pub fn sglu(ab: Tensor<2>) -> Tensor<2> {
    let [_, width] = ab.dims();
    assert!(width.is_multiple_of(2), "two halves of {width} values");
    if super::has_cuda_form(&ab) && (width / 2).is_multiple_of(8) {
        return apply::<CubeBackend, _, _, _>(Sglu, [ab]);
    }
    composed(ab)
}

/// The same of tensor primitives.
pub(crate) fn composed(ab: Tensor<2>) -> Tensor<2> {
    let [_, width] = ab.dims();
    ab.clone().narrow(1, 0, width / 2) * ab.narrow(1, width / 2, width / 2)
}

#[derive(Clone, Debug)]
struct Sglu;

fn kernel(entry: &'static str, half: usize) -> Kernel {
    Kernel::new(&SOURCE, entry).define("WIDTH", half as i64)
}

/// Groups of eight results, and the launch with a thread for each.
fn launch(rows: usize, half: usize) -> (u64, Grid) {
    let packs = (rows * half / 8) as u64;
    (packs, Grid::new(packs.div_ceil(256) as u32, 256))
}

/// `a ⊙ b` of a contiguous `ab`, in bf16, on CUDA.
pub fn forward(ab: &CubeTensor) -> CubeTensor {
    let ([rows, width], _) = cuda::rows(ab);
    let half = width / 2;
    let y = cuda::empty(ab, [rows, half], DType::BF16);
    let (packs, grid) = launch(rows, half);
    let mut work = Work::near(ab);
    work.launch(&kernel("sglu_forward", half), grid, &[cuda::read(ab), cuda::write(&y), cuda::u64(packs)]);
    work.submit();
    y
}

/// The gradient of a contiguous `ab`, in bf16, on CUDA. Writes `a ⊙ b` once more into `y` where that is given, for
/// who did not keep it.
pub fn backward(ab: &CubeTensor, dy: &CubeTensor, y: Option<&CubeTensor>) -> CubeTensor {
    let ([rows, width], _) = cuda::rows(ab);
    let half = width / 2;
    let d_ab = cuda::empty_like(ab);
    let (packs, grid) = launch(rows, half);
    let mut work = Work::near(ab);
    let y = y.map_or_else(cuda::absent, cuda::write);
    let arguments = [cuda::read(ab), cuda::read(dy), cuda::write(&d_ab), y, cuda::u64(packs)];
    work.launch(&kernel("sglu_backward", half), grid, &arguments);
    work.submit();
    d_ab
}

impl Operation<CubeBackend, 1> for Sglu {
    fn forward(&self, [ab]: [CubeTensor; 1], _tracked: bool) -> (CubeTensor, Vec<CubeTensor>) {
        let ab = into_contiguous(ab);
        (forward(&ab), vec![ab])
    }

    fn backward(&self, saved: Vec<CubeTensor>, dy: CubeTensor, _: [bool; 1]) -> [Option<CubeTensor>; 1] {
        [Some(backward(&saved[0], &into_contiguous(dy), None))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close_on_cuda, cuda_device, on, random};

    #[test]
    fn halves_are_multiplied() {
        let ab = Tensor::<2>::from_floats([[1.0, 2.0, 3.0, 4.0]], &burn::tensor::Device::flex());
        let y: Vec<f32> = sglu(ab).try_into_vec_as().unwrap();
        assert_eq!(y, [3.0, 8.0]);
    }

    #[test]
    fn cuda_form_equals_the_composed_one() {
        let Some(device) = cuda_device("sglu") else { return };
        for [rows, half] in [[1, 8], [5, 40], [300, 2816]] {
            let (ab, factor) = (random([rows, 2 * half], 1), random([rows, half], 2));
            let run = |ab: Tensor<2>, factor: Tensor<2>| {
                let ab = ab.autodiff().require_grad();
                let y = sglu(ab.clone());
                let gradients = (y.clone() * factor.autodiff()).sum().backward();
                [y.inner(), ab.grad(&gradients).unwrap()]
            };
            let got = run(on(&ab, &device), on(&factor, &device));
            let want = run(crate::ops::testing::rounded(ab), crate::ops::testing::rounded(factor));
            for (what, (got, want)) in ["y", "d_ab"].into_iter().zip(got.into_iter().zip(want)) {
                assert_close_on_cuda(what, got, want, 3e-3);
            }
        }
    }
}
