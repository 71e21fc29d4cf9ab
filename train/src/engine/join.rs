//! What ranks that share the blocks (`tensor_ranks`) make of their parts, one sum for each half of a block and each way
//! (Megatron-LM, arXiv 1909.08053, section 3).
//!
//! The projections into a half are cut by their outputs (heads, or channels inside the SGLU), the one out of it by its inputs:
//! what that gives is a term of the sum over the ranks, and so is the gradient of the half's input. In between a rank
//! needs nothing of the others, but for the norm of the token mixer, which is over the channels of all heads. It is a
//! factor for every token, `y = s · Σ_r (u_r ⊙ o_r) W_rᵀ` with `s = 1 / (√(Σ_r Σ o_r² / E) + ε)`, so it can come after the
//! projection: the squares go along in the same sum. And back, where all ranks have dy and what the sum was, they have the
//! gradient of s, too: nothing is sent for it.

use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

use crate::Error;
use crate::model::read;
use crate::ops::lanes::dot;
use crate::ops::srms_norm;
use crate::parallel::{Collective, share};

/// The sum of `values` of all ranks, each of which adds up a share of them: the same bits on all.
pub(super) fn add_up(group: &dyn Collective, values: Vec<f32>) -> Result<Vec<f32>, Error> {
    let world = group.world();
    let pieces: Vec<_> = (0..world).map(|rank| share(values.len(), rank, world)).collect();
    group.all_reduce(values, &pieces)
}

fn tensor(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// The stream `before` a half of a block with the ranks' terms of what that adds to it, or its gradient after the half with
/// the terms of what comes from there. The one term of a rank alone has that in it.
pub(super) fn sum(group: &dyn Collective, before: Tensor<2>, term: Tensor<2>) -> Result<Tensor<2>, Error> {
    if group.world() == 1 {
        return Ok(term);
    }
    let (shape, device) = (term.dims(), term.device());
    Ok(before + tensor(add_up(group, read(term))?, shape, &device))
}

/// Goes along with a sum that other ranks make for tokens of theirs: every rank goes through the same operations.
pub(super) fn nothing(group: &dyn Collective) -> Result<(), Error> {
    if group.world() > 1 {
        add_up(group, Vec::new())?;
    }
    Ok(())
}

/// What the token mixer of a block has made with all its heads.
#[derive(Clone, Debug)]
pub(super) struct Joined {
    /// `[N, D]`: what it adds to the stream, before the norm; of a rank alone the stream after it.
    sum: Tensor<2>,
    /// Factor and root of [`srms_norm::scale`] of every token, where several ranks share the heads.
    norms: Option<Vec<(f32, f32)>>,
    /// E, the channels of all heads.
    width: usize,
}

impl Joined {
    /// Of the terms `out: [N, D]` of several ranks, and of `squares: [N, 1]`, Σ o² over the heads of each; of a rank alone, which
    /// has no squares, what it has made.
    pub(super) fn new(
        group: &dyn Collective,
        out: Tensor<2>,
        squares: Option<Tensor<2>>,
        width: usize,
    ) -> Result<Self, Error> {
        let Some(squares) = squares else { return Ok(Self { sum: out, norms: None, width }) };
        let (shape, device) = (out.dims(), out.device());
        let mut values = read(out);
        values.extend(read(squares));
        let mut values = add_up(group, values)?;
        let squares = values.split_off(shape[0] * shape[1]);
        let norms = squares.into_iter().map(|sum| srms_norm::scale(sum, width)).collect();
        Ok(Self { sum: tensor(values, shape, &device), norms: Some(norms), width })
    }

    /// s of every token, `[N, 1]`.
    fn factors(&self, norms: &[(f32, f32)]) -> Tensor<2> {
        tensor(norms.iter().map(|norm| norm.0).collect(), [norms.len(), 1], &self.sum.device())
    }

    /// The stream after the token mixer of a block that begins with `x`.
    pub(super) fn added_to(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.norms {
            None => self.sum.clone(),
            Some(norms) => x + self.sum.clone() * self.factors(norms),
        }
    }

    /// The gradients of a rank's terms: of `out` and, where there were some, of `squares`, from `dy` of the stream after.
    pub(super) fn backward(&self, dy: &Tensor<2>) -> (Tensor<2>, Option<Tensor<2>>) {
        let Some(norms) = &self.norms else { return (dy.clone(), None) };
        let d_out = dy.clone() * self.factors(norms);
        let [_, columns] = dy.dims();
        let (dy, sum) = (read(dy.clone()), read(self.sum.clone()));
        // ds · ∂s/∂(Σ o²), and ds = Σ dy · sum: half of what the norm's own gradient has as the factor of o.
        let d_squares = norms.par_iter().zip(dy.par_chunks(columns)).zip(sum.par_chunks(columns));
        let d_squares = d_squares
            .map(|((norm, dy), sum)| -0.5 * srms_norm::backward_factor(dot(dy, sum), *norm, self.width))
            .collect();
        (d_out, Some(tensor(d_squares, [norms.len(), 1], &self.sum.device())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random};
    use crate::parallel::Alone;

    #[test]
    fn a_norm_after_the_projection_is_one_before_it_with_its_gradients() {
        let (x, dy) = (random([9, 5], 1), random([9, 5], 2));
        let leaves = || [random([9, 6], 3), random([9, 6], 4), random([5, 6], 5)].map(|t| t.autodiff().require_grad());
        let [u, o, w] = leaves();
        let y = x.clone() + (u.clone() * srms_norm::srms_norm(o.clone())).matmul(w.clone().transpose());
        let gradients = (y.clone() * dy.clone()).sum().backward();
        let want = [u, o, w].map(|leaf| leaf.grad(&gradients).unwrap());

        let [u, o, w] = leaves();
        let out = (u.clone() * o.clone()).matmul(w.clone().transpose());
        let squares = o.clone().square().sum_dim(1);
        let terms = (out.clone().inner(), Some(squares.clone().inner()));
        let joined = Joined::new(&Alone, terms.0, terms.1, 6).unwrap();
        assert_close("y", joined.added_to(x), y.inner(), 1e-6);
        let (d_out, d_squares) = joined.backward(&dy);
        let gradients = ((out * d_out).sum() + (squares * d_squares.unwrap()).sum()).backward();
        for ((got, want), what) in [u, o, w].into_iter().zip(want).zip(["du", "do", "dw"]) {
            assert_close(what, got.grad(&gradients).unwrap(), want, 2e-6);
        }
    }

    #[test]
    fn a_token_without_any_output_has_no_gradient_of_its_norm() {
        let zeros = |shape: [usize; 2]| Tensor::<2>::zeros(shape, &Device::flex());
        let joined = Joined::new(&Alone, zeros([2, 3]), Some(zeros([2, 1])), 4).unwrap();
        let (d_out, d_squares) = joined.backward(&random([2, 3], 1));
        assert_eq!(read(d_squares.unwrap()), [0.0; 2]);
        assert!(read(d_out).into_iter().chain(read(joined.added_to(zeros([2, 3])))).all(f32::is_finite));
    }
}
