//! The output head with its loss: mean cross-entropy of the next token without the logits of the
//! whole batch in memory.

use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData, activation};
use rayon::prelude::*;

use super::cpu::{self, CpuOperation, FlexTensor, View, parallel_product};
use super::exp::exp;
use super::lanes;

/// A target that predicts nothing: the position does not count.
pub const IGNORE: u32 = u32::MAX;

/// Logits that are in memory at once.
const LOGITS: usize = 1 << 21;

/// Mean cross-entropy in nats of `targets` under `softmax(hidden · weightᵀ)`, for
/// `hidden: [N, D]`, `weight: [vocabulary, D]` and one target per row. Rows with [`IGNORE`] do not
/// count; without any other row the loss is 0. Gives `[1]`.
pub fn cross_entropy(hidden: Tensor<2>, weight: Tensor<2>, targets: &[u32]) -> Tensor<1> {
    if super::has_cpu_form(&hidden) {
        let operation = CrossEntropy { targets: targets.into() };
        return cpu::apply(operation, [hidden, weight]);
    }
    composed(hidden, weight, targets)
}

fn rows_at_once(vocabulary: usize) -> usize {
    (LOGITS / vocabulary).max(16)
}

fn counted(targets: &[u32]) -> usize {
    targets.iter().filter(|&&target| target != IGNORE).count()
}

/// The same of tensor primitives.
pub(crate) fn composed(hidden: Tensor<2>, weight: Tensor<2>, targets: &[u32]) -> Tensor<1> {
    let device = hidden.device();
    let count = counted(targets).max(1) as f64;
    let rows = rows_at_once(weight.dims()[0]);
    let weight = weight.transpose();
    let mut sum = Tensor::<1>::zeros([1], (&device, hidden.dtype()));
    for (part, targets) in targets.chunks(rows).enumerate() {
        let n = targets.len();
        let logits = hidden.clone().narrow(0, part * rows, n).matmul(weight.clone());
        let index = |&target: &u32| i64::from(if target == IGNORE { 0 } else { target });
        let index: Vec<i64> = targets.iter().map(index).collect();
        let index = Tensor::<2, Int>::from_data(TensorData::new(index, [n, 1]), &device);
        let counts: Vec<f64> = targets.iter().map(|&target| f64::from(u8::from(target != IGNORE))).collect();
        let counts = TensorData::new(counts, [n, 1]);
        let counts = Tensor::<2>::from_data(counts, (&device, logits.dtype()));
        let chosen = activation::log_softmax(logits, 1).gather(1, index);
        sum = sum - (chosen * counts).sum();
    }
    sum.div_scalar(count)
}

#[derive(Clone, Debug)]
struct CrossEntropy {
    targets: Arc<[u32]>,
}

/// Logits that are summed in float32 before the sum goes on in float64.
const PART: usize = 256;

/// The loss of one row of logits. With `gradient` the logits become the gradient of that loss
/// times `gradient`.
fn row_loss(logits: &mut [f32], target: u32, gradient: Option<f32>) -> f64 {
    let largest = lanes::max(logits);
    let chosen = f64::from(logits[target as usize] - largest);
    let Some(gradient) = gradient else {
        let mut buffer = [0f32; PART];
        let mut sum = 0f64;
        for part in logits.chunks(PART) {
            let buffer = &mut buffer[..part.len()];
            for (to, logit) in buffer.iter_mut().zip(part) {
                *to = exp(logit - largest);
            }
            sum += f64::from(lanes::sum(buffer));
        }
        return sum.ln() - chosen;
    };
    let mut sum = 0f64;
    for part in logits.chunks_mut(PART) {
        for logit in part.iter_mut() {
            *logit = exp(*logit - largest);
        }
        sum += f64::from(lanes::sum(part));
    }
    let factor = gradient / sum as f32;
    for logit in logits.iter_mut() {
        *logit *= factor;
    }
    logits[target as usize] -= gradient;
    sum.ln() - chosen
}

impl CpuOperation<2> for CrossEntropy {
    /// Computes the gradients, where they are wanted, along with the loss: every chunk of logits is
    /// made once.
    fn forward(&self, [hidden, weight]: [FlexTensor; 2], tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        let (hidden, weight) = (cpu::contiguous(hidden), cpu::contiguous(weight));
        let [tokens, width] = hidden.layout().shape().dims();
        let [vocabulary, _] = weight.layout().shape().dims();
        let (h, w) = (cpu::values(&hidden), cpu::values(&weight));
        let share = 1.0 / counted(&self.targets).max(1) as f32;
        let rows = rows_at_once(vocabulary);
        let (mut dh, mut dw) = (Vec::new(), Vec::new());
        if tracked {
            dh.resize(tokens * width, 0f32);
            dw.resize(vocabulary * width, 0f32);
        }
        let mut logits = vec![0f32; rows.min(tokens) * vocabulary];
        let mut loss = 0f64;
        for (part, targets) in self.targets.chunks(rows).enumerate() {
            let n = targets.len();
            let from = part * rows * width;
            let hidden = View::rows(&h[from..from + n * width], width);
            let weight = View::rows(w, width);
            let logits = &mut logits[..n * vocabulary];
            let sizes = [n, vocabulary, width];
            parallel_product(sizes, logits, vocabulary, 0.0, hidden, weight.t());
            let losses: Vec<f64> = logits
                .par_chunks_mut(vocabulary)
                .zip(targets)
                .map(|(logits, &target)| {
                    if target == IGNORE {
                        logits.fill(0.0);
                        return 0.0;
                    }
                    row_loss(logits, target, tracked.then_some(share))
                })
                .collect();
            loss += losses.iter().sum::<f64>();
            if !tracked {
                continue;
            }
            let dlogits = View::rows(logits, vocabulary);
            let to = &mut dh[from..from + n * width];
            parallel_product([n, width, vocabulary], to, width, 0.0, dlogits, weight);
            let sizes = [vocabulary, width, n];
            parallel_product(sizes, &mut dw, width, 1.0, dlogits.t(), hidden);
        }
        let loss = cpu::tensor(vec![(loss * f64::from(share)) as f32], [1]);
        if !tracked {
            return (loss, Vec::new());
        }
        let dh = cpu::tensor(dh, [tokens, width]);
        (loss, vec![dh, cpu::tensor(dw, [vocabulary, width])])
    }

    fn backward(&self, saved: Vec<FlexTensor>, gradient: FlexTensor) -> [FlexTensor; 2] {
        let gradient = cpu::contiguous(gradient);
        let factor = cpu::values(&gradient)[0];
        let Ok(gradients) = <[FlexTensor; 2]>::try_from(saved) else {
            unreachable!("forward saved the gradients of its two inputs")
        };
        gradients.map(|mut tensor| {
            if factor != 1.0 {
                let values: &mut [f32] = tensor.storage_mut();
                values.par_iter_mut().for_each(|value| *value *= factor);
            }
            tensor
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, random};

    #[test]
    fn cpu_form_equals_the_composed_one_with_its_gradients() {
        let targets = [3, 0, IGNORE, 299, 7, 3, IGNORE, 150, 1];
        let (hidden, weight) = (random([9, 16], 1), random([300, 16], 2));
        let run = |loss: fn(Tensor<2>, Tensor<2>, &[u32]) -> Tensor<1>| {
            let hidden = hidden.clone().autodiff().require_grad();
            let weight = weight.clone().autodiff().require_grad();
            let loss = loss(hidden.clone(), weight.clone(), &targets) * 3.0;
            let gradients = loss.backward();
            let of = |tensor: Tensor<2>| tensor.grad(&gradients).unwrap();
            (loss.inner(), of(hidden), of(weight))
        };
        let (own, composed) = (run(cross_entropy), run(composed));
        assert_close("loss", own.0, composed.0, 1e-6);
        assert_close("dh", own.1, composed.1, 1e-5);
        assert_close("dw", own.2, composed.2, 1e-5);
    }

    #[test]
    fn nothing_to_predict_is_no_loss_and_huge_logits_do_not_overflow() {
        let hidden = random([2, 4], 1);
        let loss = |hidden: Tensor<2>, targets: &[u32]| -> f32 {
            cross_entropy(hidden, random([5, 4], 2), targets).into_scalar()
        };
        assert_eq!(loss(hidden.clone(), &[IGNORE, IGNORE]), 0.0);
        assert!(loss(hidden * 1e30, &[0, 1]).is_finite());
    }
}
