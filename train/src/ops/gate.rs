//! The gate on the way out of the token mixer: `u ⊙ SRMSNorm(o)`.

use burn::tensor::{DType, Tensor};
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

/// Some of the channels of a gate, of which other GPUs have the rest. The norm is over all of them: it is one factor for every
/// row, `y = s · (u ⊙ o)`, and can come after the product that the gate goes into.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part<'a> {
    /// `[N, E']`; its rows may be apart.
    pub(crate) u: &'a CubeTensor,
    /// `[N, E']`, contiguous.
    pub(crate) o: &'a CubeTensor,
    /// E, the channels of all.
    pub(crate) width: usize,
}

impl Part<'_> {
    /// `u ⊙ o`, and Σ o² of every row: `[N]` in float32, which add up to those of all channels.
    pub(crate) fn forward(&self) -> [CubeTensor; 2] {
        let &Self { u, o, .. } = self;
        let ([rows, width], _) = cuda::rows(o);
        let (y, squares) = (cuda::empty_like(o), cuda::empty(o, [rows], DType::F32));
        let (kernel, grid) = srms_norm::kernel("gate_part_forward", rows, width);
        let stride = cuda::u32(cuda::rows(u).1 as u32);
        let rows = cuda::u32(rows as u32);
        let mut work = Work::near(o);
        work.launch(
            &kernel,
            grid,
            &[cuda::view(u), stride, cuda::read(o), cuda::write(&y), cuda::write(&squares), rows],
        );
        work.submit();
        [y, squares]
    }

    /// What [`forward`] gives of these channels, from the squares of all, and Σ dy ⊙ u ⊙ o of every row, which add up to those of
    /// all channels as well.
    pub(crate) fn again(&self, dy: &CubeTensor, squares: &CubeTensor) -> [CubeTensor; 2] {
        let &Self { u, o, .. } = self;
        let ([rows, width], _) = cuda::rows(o);
        let (y, dots) = (cuda::empty_like(o), cuda::empty_like(squares));
        let (kernel, grid) = srms_norm::kernel("gate_part_again", rows, width);
        let arguments = [
            cuda::view(u),
            cuda::u32(cuda::rows(u).1 as u32),
            cuda::read(o),
            cuda::read(dy),
            cuda::read(squares),
            cuda::u32(self.width as u32),
            cuda::write(&y),
            cuda::write(&dots),
            cuda::u32(rows as u32),
        ];
        let mut work = Work::near(o);
        work.launch(&kernel, grid, &arguments);
        work.submit();
        [y, dots]
    }

    /// [`backward`] of these channels, from the squares and the sums of [`Part::again`] of all.
    pub(crate) fn backward(
        &self,
        dy: &CubeTensor,
        squares: &CubeTensor,
        dots: &CubeTensor,
        du: &CubeTensor,
    ) -> CubeTensor {
        let &Self { u, o, .. } = self;
        let ([rows, width], _) = cuda::rows(o);
        let d_o = cuda::empty_like(o);
        let (kernel, grid) = srms_norm::kernel("gate_part_backward", rows, width);
        let arguments = [
            cuda::view(u),
            cuda::u32(cuda::rows(u).1 as u32),
            cuda::read(o),
            cuda::read(dy),
            cuda::read(squares),
            cuda::read(dots),
            cuda::u32(self.width as u32),
            cuda::write(du),
            cuda::u32(cuda::rows(du).1 as u32),
            cuda::write(&d_o),
            cuda::u32(rows as u32),
        ];
        let mut work = Work::near(o);
        work.launch(&kernel, grid, &arguments);
        work.submit();
        d_o
    }
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

    /// In float64, of values that bf16 holds.
    fn values(tensor: &Tensor<2>) -> Vec<f64> {
        rounded(tensor.clone()).try_into_vec_as().unwrap()
    }

    fn assert_near(what: &str, got: &CubeTensor, want: &[f64], tolerance: f64) {
        let got = cuda::download_floats(&cuda::contiguous(got.clone())).unwrap();
        assert_eq!(got.len(), want.len(), "{what}");
        let error: f64 = got.iter().zip(want).map(|(got, want)| (f64::from(*got) - want).powi(2)).sum();
        let norm: f64 = want.iter().map(|want| want * want).sum();
        assert!((error / norm).sqrt() < tolerance, "{what}: off by {:e}", (error / norm).sqrt());
    }

    #[test]
    fn parts_of_a_gate_with_their_sums_are_the_gate_in_float64() {
        let Some(device) = cuda_device("parts of a gate") else { return };
        for [rows, width, parts] in [[1, 16, 2], [70, 1024, 4], [5, 2560, 2], [3, 8192, 2], [9, 264, 3]] {
            let (u, o, dy) = (random([rows, width], 1), random([rows, width], 2), random([rows, width], 3));
            let [tu, to, tdy] = [&u, &o, &dy].map(values);
            let (mut scales, mut factors, mut squares, mut dots) = (vec![], vec![], vec![], vec![]);
            for row in 0..rows {
                let row = row * width..(row + 1) * width;
                let square: f64 = to[row.clone()].iter().map(|o| o * o).sum();
                let dot: f64 = row.map(|at| tdy[at] * tu[at] * to[at]).sum();
                let root = (square / width as f64).sqrt();
                let scale = 1.0 / (root + srms_norm::EPSILON);
                scales.push(scale);
                factors.push(dot * scale * scale / (root * width as f64));
                squares.push(square);
                dots.push(dot);
            }
            let upload = |sums: &[f64]| {
                cuda::upload_floats(
                    &cuda::of(on(&o, &device)).device,
                    &sums.iter().map(|x| *x as f32).collect::<Vec<_>>(),
                )
            };
            let (all_squares, all_dots) = (upload(&squares), upload(&dots));
            let own = width / parts;
            let (mut sum_of_squares, mut sum_of_dots) = (vec![0f64; rows], vec![0f64; rows]);
            for part in 0..parts {
                let places: Vec<usize> =
                    (0..rows).flat_map(|row| row * width + part * own..row * width + (part + 1) * own).collect();
                let cut = |tensor: &Tensor<2>| on(&tensor.clone().narrow(1, part * own, own), &device);
                // u and its gradient are the last quarters of wider matrices.
                let wide = cuda::contiguous(cuda::of(Tensor::cat(vec![cut(&u), cut(&u), cut(&u), cut(&u)], 1)));
                let d_wide = cuda::empty_like(&wide);
                let [of_o, of_dy] = [&o, &dy].map(|tensor| cuda::contiguous(cuda::of(cut(tensor))));
                let [of_u, d_u] = [&wide, &d_wide].map(|wide| cuda::columns(wide, 3 * own, own));
                let gate = Part { u: &of_u, o: &of_o, width };
                let of_place = |of: &dyn Fn(usize) -> f64| -> Vec<f64> { places.iter().map(|&at| of(at)).collect() };

                let [y, of_squares] = gate.forward();
                assert_near("u o", &y, &of_place(&|at| tu[at] * to[at]), 3e-3);
                let [y, of_dots] = gate.again(&of_dy, &all_squares);
                assert_near("y", &y, &of_place(&|at| tu[at] * to[at] * scales[at / width]), 3e-3);
                let d_o = gate.backward(&of_dy, &all_squares, &all_dots, &d_u);
                assert_near("du", &d_u, &of_place(&|at| tdy[at] * to[at] * scales[at / width]), 3e-3);
                let want = of_place(&|at| tdy[at] * tu[at] * scales[at / width] - to[at] * factors[at / width]);
                assert_near("do", &d_o, &want, 3e-3);
                for (sum, own) in [(&mut sum_of_squares, of_squares), (&mut sum_of_dots, of_dots)] {
                    let own = cuda::download_floats(&own).unwrap();
                    sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += f64::from(own));
                }
            }
            for (sums, want) in [(sum_of_squares, squares), (sum_of_dots, dots)] {
                for (row, (sum, want)) in sums.iter().zip(&want).enumerate() {
                    // Values of either sign add up to less than they are.
                    let size: f64 = (row * width..(row + 1) * width).map(|at| (tdy[at] * tu[at] * to[at]).abs()).sum();
                    assert!((sum - want).abs() < 1e-5 * size.max(want.abs()), "{rows} {width}: {sum} {want}");
                }
            }
        }
    }
}
