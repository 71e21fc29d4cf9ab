//! Token embedding.

use std::sync::Arc;

use burn::backend::Flex;
use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use rayon::prelude::*;

use super::cpu::{self, FlexTensor};
use super::operation::{Operation, apply};
use super::weight::{GradientSum, Weight};
use crate::cuda::{self, Grid, Kernel, Source, Work};

pub(crate) static SOURCE: Source = Source { name: "embedding.cu", text: include_str!("../kernels/embedding.cu") };

/// Rows `ids` of `weight: [vocabulary, D]`, times `scale`: `[N, D]`. Ids are below `vocabulary`.
pub fn embedding<W: Into<Weight>>(weight: W, ids: &[u32], scale: f64) -> Tensor<2> {
    let weight = weight.into();
    let [vocabulary, width] = weight.value.dims();
    if super::has_cuda_form(&weight.value) && width.is_multiple_of(8) && !ids.is_empty() {
        let operation = CudaEmbedding {
            backward: Backward::new(ids, vocabulary, scale as f32),
            ids: ids.into(),
            vocabulary,
            scale: scale as f32,
            sum: weight.sum,
        };
        return apply::<CubeBackend, _, _, _>(operation, [weight.value]);
    }
    let weight = weight.without_sum();
    if super::has_cpu_form(&weight) {
        let operation = Embedding { ids: ids.into(), vocabulary, scale: scale as f32 };
        return apply::<Flex, _, _, _>(operation, [weight]);
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

impl Operation<Flex, 1> for Embedding {
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

    fn backward(&self, _saved: Vec<FlexTensor>, gradient: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
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
        [Some(cpu::tensor(sums, [self.vocabulary, width]))]
    }
}

/// The gradient of the table of `vocabulary` rows, for that of the rows `ids` of it times `scale`, `dy: [N, D]`: what the
/// backward of [`embedding`] gives, without a tape, which would keep the table. On the CPU in float32.
pub(crate) fn gradient_on_cpu(dy: Tensor<2>, ids: &[u32], vocabulary: usize, scale: f64) -> Tensor<2> {
    let operation = Embedding { ids: ids.into(), vocabulary, scale: scale as f32 };
    let dy = dy.try_into_primitive::<Flex>().unwrap_or_else(|error| unreachable!("{error:?}"));
    match operation.backward(Vec::new(), dy, [true]) {
        [Some(gradient)] => Tensor::from_primitive::<Flex>(gradient),
        [None] => unreachable!("it was wanted"),
    }
}

/// Tokens that one block of the backward adds up.
const PIECE: usize = 32;

/// A piece that is the only one of its id has no row among the partial sums.
const ALONE: u32 = u32::MAX;

/// The tokens of a batch by id, cut into pieces whose gradients are summed apart; the order depends
/// on the ids alone. Fields as the kernels of `embedding.cu` take them.
#[derive(Debug, PartialEq, Eq)]
struct Pieces {
    /// Tokens in ascending order of id, those of one id in the order of the batch.
    order: Vec<u32>,
    /// Begin and end in the order, id, row of the partial sums.
    pieces: Vec<[u32; 4]>,
    /// Begin and end in the partial sums, id, nothing.
    joins: Vec<[u32; 4]>,
}

impl Pieces {
    fn of(ids: &[u32], vocabulary: usize) -> Self {
        let mut ends = vec![0u32; vocabulary + 1];
        for &id in ids {
            ends[id as usize + 1] += 1;
        }
        for id in 0..vocabulary {
            ends[id + 1] += ends[id];
        }
        // Now the first place of every id; once the tokens are placed, its end.
        let mut order = vec![0u32; ids.len()];
        for (token, &id) in ids.iter().enumerate() {
            let place = &mut ends[id as usize];
            order[*place as usize] = token as u32;
            *place += 1;
        }
        let (mut pieces, mut joins) = (Vec::new(), Vec::new());
        let (mut begin, mut partials) = (0, 0);
        for (id, &end) in ends[..vocabulary].iter().enumerate() {
            let count = (end - begin).div_ceil(PIECE as u32);
            if count > 1 {
                joins.push([partials, partials + count, id as u32, 0]);
            }
            while begin < end {
                let to = end.min(begin + PIECE as u32);
                let partial = if count > 1 { partials } else { ALONE };
                pieces.push([begin, to, id as u32, partial]);
                partials += u32::from(count > 1);
                begin = to;
            }
        }
        Self { order, pieces, joins }
    }

    /// Rows of partial sums.
    fn partials(&self) -> usize {
        self.joins.last().map_or(0, |join| join[1] as usize)
    }
}

#[derive(Clone, Debug)]
struct CudaEmbedding {
    ids: Arc<[u32]>,
    backward: Backward,
    vocabulary: usize,
    scale: f32,
    sum: Option<GradientSum>,
}

/// The backward for the tokens of one batch, on CUDA.
#[derive(Clone, Debug)]
pub struct Backward {
    pieces: Arc<Pieces>,
    scale: f32,
}

fn kernel(entry: &'static str, width: usize) -> Kernel {
    Kernel::new(&SOURCE, entry).define("WIDTH", width as i64)
}

impl Backward {
    /// Sorts the tokens; ids are below `vocabulary`.
    pub fn new(ids: &[u32], vocabulary: usize, scale: f32) -> Self {
        Self { pieces: Pieces::of(ids, vocabulary).into(), scale }
    }

    /// Adds the gradient of the table, for `dy: [N, D]` in bf16, to the float32 `to`, or replaces what
    /// is there. The order of all additions is fixed.
    pub fn add(&self, dy: &CubeTensor, to: &CubeTensor, accumulate: bool) {
        let ([_, width], _) = cuda::rows(dy);
        let Pieces { order, pieces, joins } = &*self.pieces;
        // One upload; every part begins at a multiple of 16 bytes.
        let mut numbers = order.clone();
        numbers.resize(order.len().next_multiple_of(4), 0);
        let at_pieces = numbers.len();
        numbers.extend(pieces.iter().flatten());
        let at_joins = numbers.len();
        numbers.extend(joins.iter().flatten());
        let numbers = cuda::upload(&dy.device, &numbers);
        let part = |at: usize, count: usize| cuda::flat_view(&numbers, at, [count]);
        let (order, pieces) = (part(0, order.len()), part(at_pieces, 4 * pieces.len()));
        let partials = cuda::empty(dy, [self.pieces.partials().max(1), width], DType::F32);

        let threads = (width / 8).next_multiple_of(32).min(256) as u32;
        let blocks = |count: usize| Grid::new(count as u32, threads);
        let add = cuda::u32(u32::from(accumulate));
        let mut work = Work::near(dy);
        if !accumulate {
            work.zero(to);
        }
        let arguments = [
            cuda::read(dy),
            cuda::read(&order),
            cuda::read(&pieces),
            cuda::update(to),
            cuda::write(&partials),
            cuda::f32(self.scale),
            cuda::u32(u32::from(accumulate)),
        ];
        work.launch(&kernel("embedding_sum", width), blocks(self.pieces.pieces.len()), &arguments);
        if !joins.is_empty() {
            let ranges = part(at_joins, 4 * joins.len());
            let arguments = [cuda::read(&partials), cuda::read(&ranges), cuda::update(to), add];
            work.launch(&kernel("embedding_join", width), blocks(joins.len()), &arguments);
        }
        work.submit();
    }
}

/// Rows `ids` of the contiguous `weight`, times `scale`, in bf16, on CUDA.
pub fn forward(weight: &CubeTensor, ids: &[u32], scale: f32) -> CubeTensor {
    let ([_, width], _) = cuda::rows(weight);
    let y = cuda::empty(weight, [ids.len(), width], DType::BF16);
    let packs = (ids.len() * width / 8) as u64;
    let ids = cuda::upload(&weight.device, ids);
    let mut work = Work::near(weight);
    let arguments = [cuda::read(weight), cuda::read(&ids), cuda::write(&y), cuda::u64(packs), cuda::f32(scale)];
    work.launch(&kernel("embedding_forward", width), Grid::new(packs.div_ceil(256) as u32, 256), &arguments);
    work.submit();
    y
}

impl Operation<CubeBackend, 1> for CudaEmbedding {
    fn forward(&self, [weight]: [CubeTensor; 1], _tracked: bool) -> (CubeTensor, Vec<CubeTensor>) {
        (forward(&into_contiguous(weight), &self.ids, self.scale), Vec::new())
    }

    fn backward(&self, _saved: Vec<CubeTensor>, dy: CubeTensor, _: [bool; 1]) -> [Option<CubeTensor>; 1] {
        let dy = into_contiguous(dy);
        let ([_, width], _) = cuda::rows(&dy);
        match &self.sum {
            Some(sum) => {
                let (to, accumulate) = sum.next();
                self.backward.add(&dy, to, accumulate);
                [None]
            }
            None => {
                let dw = cuda::empty(&dy, [self.vocabulary, width], DType::F32);
                self.backward.add(&dy, &dw, false);
                [Some(dw)]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, assert_close_on_cuda, cuda_device, on, random, rounded};

    #[test]
    fn pieces_hold_every_token_once_in_order() {
        let ids: Vec<u32> = (0..300u32).map(|token| if token % 3 == 0 { 5 } else { token * token % 11 }).collect();
        let Pieces { order, pieces, joins } = Pieces::of(&ids, 12);
        let sorted: Vec<(u32, u32)> = order.iter().map(|&token| (ids[token as usize], token)).collect();
        assert!(sorted.is_sorted() && sorted.len() == 300);
        let (mut next, mut partials) = (0, Vec::new());
        for [begin, end, id, partial] in &pieces {
            assert_eq!((*begin, *end > *begin, (*end - *begin) as usize <= PIECE), (next, true, true));
            assert!(order[*begin as usize..*end as usize].iter().all(|&token| ids[token as usize] == *id));
            let count = ids.iter().filter(|&other| other == id).count();
            assert_eq!(*partial == ALONE, count <= PIECE, "{id}");
            if *partial != ALONE {
                partials.push((*partial, *id));
            }
            next = *end;
        }
        assert_eq!(next, 300);
        let joined = joins.iter().flat_map(|&[begin, end, id, _]| (begin..end).map(move |at| (at, id)));
        assert_eq!(partials, joined.collect::<Vec<_>>());
        assert!(joins.len() > 1);
    }

    #[test]
    fn cuda_form_equals_the_cpu_form_and_adds_to_a_sum() {
        let Some(device) = cuda_device("embedding") else { return };
        for (vocabulary, width, count) in [(40, 8, 1), (40, 136, 500), (3000, 1024, 4096)] {
            let ids: Vec<u32> = (0..count as u32).map(|token| token.wrapping_mul(token) % 97 % vocabulary).collect();
            let vocabulary = vocabulary as usize;
            let (weight, factor) = (random([vocabulary, width], 1), random([count, width], 2));
            let run = |weight: Tensor<2>, factor: Tensor<2>| {
                let weight = weight.autodiff().require_grad();
                let x = embedding(weight.clone(), &ids, 2.5);
                let gradients = (x.clone() * factor.autodiff()).sum().backward();
                [x.inner(), weight.grad(&gradients).unwrap()]
            };
            let got = run(on(&weight, &device), on(&factor, &device));
            let want = run(rounded(weight.clone()), rounded(factor.clone()));
            for (what, (got, want)) in ["x", "dw"].into_iter().zip(got.into_iter().zip(want.clone())) {
                assert_close_on_cuda(what, got, want, 3e-3);
            }
            let near = cuda::of(on(&weight, &device));
            let buffer = cuda::empty(&near, [vocabulary, width], DType::F32);
            let sum = GradientSum::new(buffer.clone());
            for _ in 0..2 {
                let value = on(&weight, &device).autodiff().require_grad();
                let x = embedding(Weight::with_sum(value.clone(), sum.clone()), &ids, 2.5);
                let gradients = (x * on(&factor, &device).autodiff()).sum().backward();
                assert!(value.grad(&gradients).is_none());
            }
            let [_, dw] = want;
            assert_close_on_cuda("twice dw", cuda::to_tensor::<2>(buffer), dw * 2.0, 3e-3);
        }
    }

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
