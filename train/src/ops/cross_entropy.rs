//! The output head with its loss: mean cross-entropy of the next token without the logits of the
//! whole batch in memory.

use std::sync::Arc;

use burn::backend::Flex;
use burn::tensor::{DType, Int, Tensor, TensorData, activation};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use rayon::prelude::*;

use super::cpu::{self, FlexTensor, View, parallel_product};
use super::exp::exp;
use super::lanes;
use super::operation::{Operation, apply};
use super::weight::{GradientSum, Weight};
use crate::cuda::{self, Grid, Kernel, Product, Source, Work};

pub(crate) static SOURCE: Source =
    Source { name: "cross_entropy.cu", text: include_str!("../kernels/cross_entropy.cu") };

/// A target that predicts nothing: the position does not count.
pub const IGNORE: u32 = u32::MAX;

/// Logits that are in memory at once.
const LOGITS: usize = 1 << 21;

/// Mean cross-entropy in nats of `targets` under `softmax(hidden · weightᵀ)`, for
/// `hidden: [N, D]`, `weight: [vocabulary, D]` and one target per row. Rows with [`IGNORE`] do not
/// count; without any other row the loss is 0. Gives `[1]`.
///
/// `z_loss` times the squared logarithm of the softmax's denominator is added to the loss of every
/// row that gradients are taken of (PaLM, arXiv 2204.02311, section 5): it keeps the logits from drifting. 0 is
/// without. The loss that is given is the cross-entropy alone, so that it means the same with and without.
///
/// On CUDA in bf16 the logits of a chunk are in bf16, sums in float32, the loss in float32. Gradients
/// are computed along with the loss. A weight that comes with a [`GradientSum`] has its gradient
/// added there at once, as of a loss that the backward starts from: where another gradient than 1
/// comes from above, that of `hidden` becomes NaN rather than wrong. `share` is the factor for a part
/// of a batch: the loss is multiplied by it.
pub fn cross_entropy<W: Into<Weight>>(
    hidden: Tensor<2>,
    weight: W,
    targets: &[u32],
    z_loss: f64,
    share: f64,
) -> Tensor<1> {
    let weight = weight.into();
    if super::has_cuda_form(&hidden) {
        let factor = share as f32 / counted(targets).max(1) as f32;
        let operation = CudaCrossEntropy { targets: targets.into(), z_loss: z_loss as f32, factor, sum: weight.sum };
        return apply::<CubeBackend, _, _, _>(operation, [hidden, weight.value]);
    }
    let weight = weight.without_sum();
    let loss = if super::has_cpu_form(&hidden) {
        apply::<Flex, _, _, _>(CrossEntropy { targets: targets.into(), z_loss: z_loss as f32 }, [hidden, weight])
    } else {
        composed(hidden, weight, targets, z_loss)
    };
    if share == 1.0 { loss } else { loss * share }
}

fn rows_at_once(vocabulary: usize) -> usize {
    (LOGITS / vocabulary).max(16)
}

fn counted(targets: &[u32]) -> usize {
    targets.iter().filter(|&&target| target != IGNORE).count()
}

/// The same of tensor primitives.
pub(crate) fn composed(hidden: Tensor<2>, weight: Tensor<2>, targets: &[u32], z_loss: f64) -> Tensor<1> {
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
        let chosen = activation::log_softmax(logits.clone(), 1).gather(1, index.clone());
        sum = sum - (chosen.clone() * counts.clone()).sum();
        if z_loss != 0.0 {
            let log_sum = logits.gather(1, index) - chosen;
            let extra = (log_sum.square() * counts).sum() * z_loss;
            // Its gradient without its value.
            sum = sum + (extra.clone() - extra.detach());
        }
    }
    sum.div_scalar(count)
}

#[derive(Clone, Debug)]
struct CrossEntropy {
    targets: Arc<[u32]>,
    z_loss: f32,
}

/// Logits that are summed in float32 before the sum goes on in float64.
const PART: usize = 256;

/// The loss of one row of logits. With `gradient` the logits become the gradient of that loss and the z-loss,
/// times `gradient`.
fn row_loss(logits: &mut [f32], target: u32, z_loss: f32, gradient: Option<f32>) -> f64 {
    let largest = lanes::max(logits);
    // The loss of a row whose exponentials sum to `sum`, and the logarithm of the denominator.
    let ended = |sum: f64, chosen: f64| {
        let log_sum = sum.ln() + f64::from(largest);
        (sum.ln() - chosen, log_sum)
    };
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
        return ended(sum, chosen).0;
    };
    let mut sum = 0f64;
    for part in logits.chunks_mut(PART) {
        for logit in part.iter_mut() {
            *logit = exp(*logit - largest);
        }
        sum += f64::from(lanes::sum(part));
    }
    let (loss, log_sum) = ended(sum, chosen);
    let factor = gradient * (1.0 + 2.0 * z_loss * log_sum as f32) / sum as f32;
    for logit in logits.iter_mut() {
        *logit *= factor;
    }
    logits[target as usize] -= gradient;
    loss
}

impl Operation<Flex, 2> for CrossEntropy {
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
                    row_loss(logits, target, self.z_loss, tracked.then_some(share))
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

    fn backward(&self, saved: Vec<FlexTensor>, gradient: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
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
            Some(tensor)
        })
    }
}

/// Bytes of logits that are in memory at once on CUDA.
pub(crate) const LOGIT_BYTES: usize = 1 << 30;

#[derive(Clone, Debug)]
struct CudaCrossEntropy {
    targets: Arc<[u32]>,
    z_loss: f32,
    /// Of the loss of every row.
    factor: f32,
    sum: Option<GradientSum>,
}

impl CudaCrossEntropy {
    /// The loss, and where `tracked` the gradients of hidden and, without a sum, of the weight.
    fn run(&self, hidden: &CubeTensor, weight: &CubeTensor, tracked: bool) -> (CubeTensor, Vec<CubeTensor>) {
        let head = Head { targets: &self.targets, z_loss: self.z_loss, factor: self.factor };
        if !tracked {
            return (head.loss(hidden, weight), Vec::new());
        }
        let ([vocabulary, width], _) = cuda::rows(weight);
        let own = self.sum.is_none().then(|| cuda::empty(hidden, [vocabulary, width], DType::F32));
        let (dw, accumulate) = match (&self.sum, &own) {
            (Some(sum), _) => sum.next(),
            (None, Some(own)) => (own, false),
            (None, None) => unreachable!("made above"),
        };
        let (loss, dh) = head.gradients(hidden, weight, dw, accumulate);
        (loss, [dh].into_iter().chain(own).collect())
    }
}

/// The loss of rows on CUDA, in bf16.
pub(crate) struct Head<'a> {
    pub(crate) targets: &'a [u32],
    pub(crate) z_loss: f32,
    /// Of the loss of every row: its share of the whole batch's mean.
    pub(crate) factor: f32,
}

impl Head<'_> {
    /// The loss alone: `[1]`, float32.
    pub(crate) fn loss(&self, hidden: &CubeTensor, weight: &CubeTensor) -> CubeTensor {
        self.run(hidden, weight, None).0
    }

    /// The loss and the gradient of `hidden`; that of the weight is put into `dw`, or added to it.
    pub(crate) fn gradients(
        &self,
        hidden: &CubeTensor,
        weight: &CubeTensor,
        dw: &CubeTensor,
        accumulate: bool,
    ) -> (CubeTensor, CubeTensor) {
        match self.run(hidden, weight, Some((dw, accumulate))) {
            (loss, Some(dh)) => (loss, dh),
            (_, None) => unreachable!("asked for"),
        }
    }

    fn run(
        &self,
        hidden: &CubeTensor,
        weight: &CubeTensor,
        dw: Option<(&CubeTensor, bool)>,
    ) -> (CubeTensor, Option<CubeTensor>) {
        let ([tokens, width], _) = cuda::rows(hidden);
        let ([vocabulary, _], _) = cuda::rows(weight);
        let stride = vocabulary.next_multiple_of(8);
        // Whole tiles of the products in every chunk but the last.
        let chunk = (LOGIT_BYTES / (2 * stride) / 256 * 256).clamp(256, tokens.next_multiple_of(4).max(256));
        let logits = cuda::empty(hidden, [chunk.min(tokens), stride], DType::BF16);
        let targets = cuda::upload(&hidden.device, self.targets);
        let losses = cuda::empty(hidden, [tokens], DType::F32);
        let loss = cuda::empty(hidden, [1], DType::F32);
        let dh = dw.map(|_| cuda::empty(hidden, [tokens, width], DType::BF16));
        let rows = Kernel::new(&SOURCE, "cross_entropy_rows");
        let mut work = Work::near(hidden);
        for begin in (0..tokens).step_by(chunk) {
            let count = chunk.min(tokens - begin);
            let hidden = cuda::row_range(hidden, begin, count);
            let logits = cuda::columns(&cuda::row_range(&logits, 0, count), 0, vocabulary);
            let (targets, losses) =
                (cuda::flat_view(&targets, begin, [count]), cuda::flat_view(&losses, begin, [count]));
            work.product(&Product::new(&hidden, weight, &logits).transpose_b());
            let arguments = [
                cuda::update(&logits),
                cuda::read(&targets),
                cuda::write(&losses),
                cuda::u32(vocabulary as u32),
                cuda::u32(stride as u32),
                cuda::f32(self.factor),
                cuda::f32(self.z_loss),
            ];
            work.launch(&rows, Grid::new(count as u32, 512), &arguments);
            if let (Some(dh), Some((dw, accumulate))) = (&dh, dw) {
                work.product(&Product::new(&logits, weight, &cuda::row_range(dh, begin, count)));
                work.product(&Product::new(&logits, &hidden, dw).transpose_a().accumulate(accumulate || begin > 0));
            }
        }
        let total = Kernel::new(&SOURCE, "cross_entropy_total");
        let arguments = [cuda::read(&losses), cuda::write(&loss), cuda::u32(tokens as u32), cuda::f32(self.factor)];
        work.launch(&total, Grid::new(1, 1024), &arguments);
        work.submit();
        (loss, dh)
    }
}

/// Multiplies by the gradient that comes from above. With `must_be_one` another one makes NaN.
fn scale(work: &mut Work, tensor: &CubeTensor, factor: &CubeTensor, must_be_one: bool) {
    let count = tensor.meta.shape().num_elements();
    let (entry, pack) = if tensor.dtype == DType::BF16 { ("scale_bf16", 8) } else { ("scale_float", 4) };
    let packs = count.div_ceil(pack) as u64;
    let kernel = Kernel::new(&SOURCE, entry);
    let arguments =
        [cuda::update(tensor), cuda::read(factor), cuda::u64(count as u64), cuda::u32(u32::from(must_be_one))];
    work.launch(&kernel, Grid::new(packs.div_ceil(256) as u32, 256), &arguments);
}

impl Operation<CubeBackend, 2> for CudaCrossEntropy {
    fn forward(&self, [hidden, weight]: [CubeTensor; 2], tracked: bool) -> (CubeTensor, Vec<CubeTensor>) {
        self.run(&into_contiguous(hidden), &cuda::in_rows(weight), tracked)
    }

    fn backward(&self, saved: Vec<CubeTensor>, gradient: CubeTensor, _: [bool; 2]) -> [Option<CubeTensor>; 2] {
        let gradient = into_contiguous(gradient);
        let mut work = Work::near(&gradient);
        for tensor in &saved {
            scale(&mut work, tensor, &gradient, self.sum.is_some());
        }
        work.submit();
        let mut saved = saved.into_iter();
        [saved.next(), saved.next()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, assert_close_on_cuda, cuda_device, on, random, rounded};

    #[test]
    fn cuda_form_equals_the_cpu_form() {
        let Some(device) = cuda_device("cross_entropy") else { return };
        for (tokens, width, vocabulary, z_loss) in [(9, 16, 300, 0.0), (200, 64, 1003, 0.01)] {
            let targets: Vec<u32> =
                (0..tokens as u32).map(|t| if t % 5 == 2 { IGNORE } else { t * 37 % vocabulary as u32 }).collect();
            let (hidden, weight) = (random([tokens, width], 1), random([vocabulary, width], 2));
            let run = |hidden: Tensor<2>, weight: Tensor<2>| {
                let (hidden, weight) = (hidden.autodiff().require_grad(), weight.autodiff().require_grad());
                let loss = cross_entropy(hidden.clone(), weight.clone(), &targets, z_loss, 0.5);
                let gradients = loss.backward();
                (loss.inner(), [hidden.grad(&gradients).unwrap(), weight.grad(&gradients).unwrap()])
            };
            let (loss, got) = run(on(&hidden, &device), on(&weight, &device));
            let (want_loss, want) = run(rounded(hidden), rounded(weight));
            assert_close_on_cuda("loss", loss, want_loss, 3e-3);
            // The logits are rounded to bf16, so their exponentials are off by as much.
            for (what, (got, want)) in ["dh", "dw"].into_iter().zip(got.into_iter().zip(want)) {
                assert_close_on_cuda(what, got, want, 2e-2);
            }
        }
    }

    #[test]
    fn cpu_form_equals_the_composed_one_with_its_gradients() {
        let targets = [3, 0, IGNORE, 299, 7, 3, IGNORE, 150, 1];
        let (hidden, weight) = (random([9, 16], 1), random([300, 16], 2));
        for z_loss in [0.0, 0.01] {
            let run = |loss: &dyn Fn(Tensor<2>, Tensor<2>) -> Tensor<1>| {
                let hidden = hidden.clone().autodiff().require_grad();
                let weight = weight.clone().autodiff().require_grad();
                let loss = loss(hidden.clone(), weight.clone()) * 3.0;
                let gradients = loss.backward();
                let of = |tensor: Tensor<2>| tensor.grad(&gradients).unwrap();
                (loss.inner(), of(hidden), of(weight))
            };
            let own = run(&|hidden, weight| cross_entropy(hidden, weight, &targets, z_loss, 0.25));
            let composed = run(&|hidden, weight| composed(hidden, weight, &targets, z_loss) * 0.25);
            assert_close("loss", own.0, composed.0, 1e-6);
            assert_close("dh", own.1, composed.1, 1e-5);
            assert_close("dw", own.2, composed.2, 1e-5);
        }
    }

    #[test]
    fn nothing_to_predict_is_no_loss_and_huge_logits_do_not_overflow() {
        let hidden = random([2, 4], 1);
        let loss = |hidden: Tensor<2>, targets: &[u32]| -> f32 {
            cross_entropy(hidden, random([5, 4], 2), targets, 0.0, 1.0).into_scalar()
        };
        assert_eq!(loss(hidden.clone(), &[IGNORE, IGNORE]), 0.0);
        assert!(loss(hidden * 1e30, &[0, 1]).is_finite());
    }
}
