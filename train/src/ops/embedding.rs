//! Token embedding.

use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData};
use rayon::prelude::*;

use super::cpu::{self, CpuOperation, FlexTensor};

/// Rows `ids` of `weight: [vocabulary, D]`, times `scale`: `[N, D]`. Ids are below `vocabulary`.
pub fn embedding(weight: Tensor<2>, ids: &[u32], scale: f64) -> Tensor<2> {
    if super::has_cpu_form(&weight) {
        let operation = Embedding { ids: ids.into(), vocabulary: weight.dims()[0], scale: scale as f32 };
        return cpu::apply(operation, [weight]);
    }
    composed(weight, ids, scale)
}

/// The same of tensor primitives.
pub(crate) fn composed(weight: Tensor<2>, ids: &[u32], scale: f64) -> Tensor<2> {
    let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let count = ids.len();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [count]), &weight.device());
    weight.select(0, ids).mul_scalar(scale)
}

#[derive(Clone, Debug)]
struct Embedding {
    ids: Arc<[u32]>,
    vocabulary: usize,
    scale: f32,
}

impl CpuOperation<1> for Embedding {
    fn forward(&self, [weight]: [FlexTensor; 1], _tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let weight = cpu::contiguous(weight);
        let [_, width] = weight.layout().shape().dims();
        let table = cpu::values(&weight);
        let mut output = vec![0f32; self.ids.len() * width];
        for (to, &id) in output.chunks_exact_mut(width).zip(self.ids.iter()) {
            let from = &table[id as usize * width..][..width];
            for (to, from) in to.iter_mut().zip(from) {
                *to = from * self.scale;
            }
        }
        (cpu::tensor(output, [self.ids.len(), width]), Vec::new())
    }

    fn backward(&self, _saved: Vec<FlexTensor>, gradient: FlexTensor) -> [FlexTensor; 1] {
        let gradient = cpu::contiguous(gradient);
        let [_, width] = gradient.layout().shape().dims();
        let gradient = cpu::values(&gradient);
        // Tokens sorted by id, stable: every row of the result is summed by one task in the order
        // of the batch.
        let mut order: Vec<usize> = (0..self.ids.len()).collect();
        order.sort_by_key(|&token| self.ids[token]);
        let mut sums = vec![0f32; self.vocabulary * width];
        let rows = self.vocabulary.div_ceil(64).max(1);
        sums.par_chunks_mut(rows * width).enumerate().for_each(|(part, sums)| {
            let id = |token: usize| self.ids[token] as usize;
            let first = part * rows;
            let begin = order.partition_point(|&token| id(token) < first);
            for &token in &order[begin..] {
                let Some(to) = sums.chunks_exact_mut(width).nth(id(token) - first) else {
                    break;
                };
                let from = &gradient[token * width..][..width];
                for (to, from) in to.iter_mut().zip(from) {
                    *to += from * self.scale;
                }
            }
        });
        [cpu::tensor(sums, [self.vocabulary, width])]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random};

    #[test]
    fn cpu_form_equals_the_composed_one_with_its_gradient() {
        let ids = [3, 0, 3, 299, 7, 3, 0, 150];
        let (weight, factor) = (random([300, 5], 1), random([ids.len(), 5], 2));
        let run = |embed: fn(Tensor<2>, &[u32], f64) -> Tensor<2>| {
            let weight = weight.clone().autodiff().require_grad();
            let x = embed(weight.clone(), &ids, 2.5);
            let gradients = (x.clone() * factor.clone()).sum().backward();
            (x.inner(), weight.grad(&gradients).unwrap())
        };
        let (own, composed) = (run(embedding), run(composed));
        assert_close("x", own.0, composed.0, 1e-6);
        assert_close("dw", own.1, composed.1, 1e-6);
    }
}
