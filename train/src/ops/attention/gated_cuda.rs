//! [`super::gated`] on CUDA in bf16: the kernels of Lightning Attention between the columns of the
//! projection, with SiLU in them, and the gate behind.
//!
//! Nothing is moved: q, k, v and u are columns of the projection, their gradients are written into
//! the columns of its gradient. In the few layers with LRPE the features q̂, k̂ `[B, H, T, 2K]` are
//! made by a kernel of their own, which takes SiLU along.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};

use super::lightning::{self, Attention, Heads, Rotated, States};
use crate::cuda::{self, Grid, Kernel, Source, Work};
use crate::ops::operation::{self, Operation};
use crate::ops::sequences::Sequences;
use crate::ops::weight::GradientSum;
use crate::ops::{gate, srms_norm};

pub(crate) static LRPE: Source = Source { name: "lrpe.cu", text: include_str!("../../kernels/lrpe.cu") };

/// Tokens that one block of `lrpe.cu` walks over.
const STRIPE: usize = 128;

/// Whether heads of `width / heads` values in rows of this length have this form.
pub(crate) fn has_form(width: usize, heads: usize, sequences: &Sequences, rotated: bool) -> bool {
    let head = width / heads;
    let key = if rotated { 2 * head } else { head };
    srms_norm::has_kernel(width) && head.is_multiple_of(8) && key <= 256 && sequences.length() >= 64
}

/// The documents of a batch, on the device.
#[derive(Clone, Debug)]
pub(crate) struct Documents {
    rows: usize,
    /// Position of every token in its document: `[B · T]`.
    positions: CubeTensor,
    /// Whether documents begin inside rows.
    packed: bool,
}

impl Documents {
    pub(crate) fn new(sequences: &Sequences, device: &CubeDevice) -> Self {
        let positions = cuda::upload(device, sequences.all_positions());
        Self { rows: sequences.rows(), positions, packed: sequences.is_packed() }
    }
}

/// λ of every head, on the device.
pub(crate) fn upload_decay(decay: &[f64], device: &CubeDevice) -> CubeTensor {
    let rates: Vec<f32> = decay.iter().map(|&rate| rate as f32).collect();
    cuda::upload_floats(device, &rates)
}

/// What was made of shared values, as long as someone has these: on the tape all layers and both passes of a batch ask for
/// its documents, and every step for the decays. `D` is the device it is on.
struct Kept<K: ?Sized, D, V> {
    entries: Mutex<Vec<(Weak<K>, D, V)>>,
}

impl<K: ?Sized, D: Clone + PartialEq, V: Clone> Kept<K, D, V> {
    const fn new() -> Self {
        Self { entries: Mutex::new(Vec::new()) }
    }

    /// What `make` made of `key` for `device`, now or before.
    fn get(&self, key: &Arc<K>, device: &D, make: impl FnOnce() -> V) -> V {
        // What a panic elsewhere left is as good as before: every entry is whole.
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        // An address is not given to another value before its entry goes: the entry keeps the allocation.
        entries.retain(|(held, ..)| held.strong_count() > 0);
        let same = |held: &Weak<K>| std::ptr::addr_eq(held.as_ptr(), Arc::as_ptr(key));
        if let Some((.., value)) = entries.iter().find(|(held, on, _)| same(held) && on == device) {
            return value.clone();
        }
        let value = make();
        entries.push((Arc::downgrade(key), device.clone(), value.clone()));
        value
    }
}

static DOCUMENTS: Kept<Sequences, CubeDevice, Documents> = Kept::new();
static DECAYS: Kept<[f64], CubeDevice, CubeTensor> = Kept::new();

/// One layer's token mixer between its projections.
#[derive(Clone, Debug)]
pub(crate) struct Mixer {
    /// λ of every head, float32.
    pub(crate) decay: CubeTensor,
    pub(crate) heads: usize,
    pub(crate) documents: Documents,
}

impl Mixer {
    /// Of values that are uploaded at their first use.
    fn kept(decay: &Arc<[f64]>, sequences: &Arc<Sequences>, device: &CubeDevice) -> Self {
        Self {
            decay: DECAYS.get(decay, device, || upload_decay(decay, device)),
            heads: decay.len(),
            documents: DOCUMENTS.get(sequences, device, || Documents::new(sequences, device)),
        }
    }

    fn attention(&self, silu: bool) -> Attention<'_> {
        let positions = self.documents.packed.then_some(&self.documents.positions);
        Attention { decay: &self.decay, positions, silu }
    }

    /// `[B, H, T, K]` of part `index` (q, k, v, u) of a projection.
    fn part(&self, projected: &CubeTensor, index: usize) -> Heads {
        let width = cuda::rows(projected).0[1] / 4;
        Heads::columns(projected, index * width, [self.documents.rows, self.heads, width / self.heads])
    }

    /// q̂ and k̂ among features `[B·T, 4E]`.
    fn rotated(&self, features: &CubeTensor) -> [Heads; 2] {
        let width = cuda::rows(features).0[1] / 4;
        let sizes = [self.documents.rows, self.heads, 2 * width / self.heads];
        [0, 1].map(|index| Heads::columns(features, index * 2 * width, sizes))
    }

    /// The attention's output `[B·T, E]`, before norm and gate; `theta: [H, K]` in float32. It begins with `state`
    /// `[B, H, K, V]` in float32 (2K with θ, in the order of `lrpe.cu`, zero without one) and writes that after the last token
    /// into `after`.
    pub(crate) fn attend(
        &self,
        projected: &CubeTensor,
        theta: Option<&CubeTensor>,
        state: Option<&CubeTensor>,
        after: Option<&CubeTensor>,
    ) -> CubeTensor {
        let ([tokens, width], _) = cuda::rows(projected);
        let o = cuda::empty(projected, [tokens, width / 4], DType::BF16);
        let to = Heads::columns(&o, 0, [self.documents.rows, self.heads, width / 4 / self.heads]);
        let v = self.part(projected, 2);
        match theta {
            None => {
                let (q, k) = (self.part(projected, 0), self.part(projected, 1));
                lightning::forward(&self.attention(true), [&q, &k, &v], &to, state, after);
            }
            Some(theta) => {
                let features = self.features(projected, theta, None);
                let [q, k] = self.rotated(&features);
                lightning::forward(&self.attention(false), [&q, &k, &v], &to, state, after);
            }
        }
        o
    }

    /// [`Mixer::attend`] of tokens whose documents may go on behind them: with the state after the last one, which with θ is as
    /// exact as [`Mixer::backward`] of those that come next needs the state that it begins with.
    pub(crate) fn attend_and_leave(
        &self,
        projected: &CubeTensor,
        theta: Option<&CubeTensor>,
        state: Option<&CubeTensor>,
    ) -> (CubeTensor, CubeTensor) {
        let after = self.state(projected, cuda::rows(projected).0[1] / 4, theta.is_some());
        let Some(theta) = theta else {
            return (self.attend(projected, None, state, Some(&after)), after);
        };
        let o = self.attend(projected, Some(theta), state, None);
        let rests = self.features_like(projected);
        let features = self.features(projected, theta, Some(&rests));
        let scratch = cuda::empty_like(&features);
        let ([q, k], [q_rest, k_rest]) = (self.rotated(&features), self.rotated(&rests));
        let positions = &self.documents.positions;
        let rotated = Rotated { features: [&q, &k], rests: [&q_rest, &k_rest], positions };
        let [scratch, _] = self.rotated(&scratch);
        lightning::state_rotated(&self.attention(false), rotated, &self.part(projected, 2), &scratch, state, &after);
        (o, after)
    }

    /// Room for the state `[B, H, K, V]` in float32 of heads that have `width` values together; 2K where `rotated`.
    pub(crate) fn state(&self, near: &CubeTensor, width: usize, rotated: bool) -> CubeTensor {
        let head = width / self.heads;
        let keys = if rotated { 2 * head } else { head };
        cuda::empty(near, [self.documents.rows, self.heads, keys, head], DType::F32)
    }

    /// `u ⊙ SRMSNorm(o)`.
    pub(crate) fn gate(&self, projected: &CubeTensor, o: &CubeTensor) -> CubeTensor {
        gate::forward(&gate_of(projected), o)
    }

    /// The gradient of the projection from that of the gate's output, and what `states` asks for. Adds the gradient of θ to its
    /// sum, and writes the gate's output once more into `y` where that is given.
    pub(crate) fn backward(
        &self,
        projected: &CubeTensor,
        theta: Option<(&CubeTensor, &GradientSum)>,
        o: &CubeTensor,
        dy: &CubeTensor,
        y: Option<&CubeTensor>,
        states: States<'_>,
    ) -> CubeTensor {
        let backward = |u: &CubeTensor, du: &CubeTensor| gate::backward(u, o, dy, du, y);
        self.backward_with(projected, theta, backward, states)
    }

    /// [`Mixer::backward`], where `backward` gives the gradient of the attention's output for u and writes that of u.
    pub(crate) fn backward_with(
        &self,
        projected: &CubeTensor,
        theta: Option<(&CubeTensor, &GradientSum)>,
        backward: impl FnOnce(&CubeTensor, &CubeTensor) -> CubeTensor,
        states: States<'_>,
    ) -> CubeTensor {
        let ([tokens, width], _) = cuda::rows(projected);
        let d_projected = cuda::empty(projected, [tokens, width], DType::BF16);
        let width = width / 4;
        let d_o = backward(&gate_of(projected), &gate_of(&d_projected));
        let d_o = Heads::columns(&d_o, 0, [self.documents.rows, self.heads, width / self.heads]);
        let (v, d_v) = (self.part(projected, 2), self.part(&d_projected, 2));
        let Some((theta, d_theta)) = theta else {
            let [q, k, d_q, d_k] = [(projected, 0), (projected, 1), (&d_projected, 0), (&d_projected, 1)]
                .map(|(matrix, index)| self.part(matrix, index));
            lightning::backward(&self.attention(true), [&q, &k, &v], &d_o, [&d_q, &d_k, &d_v], states);
            return d_projected;
        };
        let rests = self.features_like(projected);
        let features = self.features(projected, theta, Some(&rests));
        let d_features = cuda::empty_like(&features);
        let [q, k] = self.rotated(&features);
        let [q_rest, k_rest] = self.rotated(&rests);
        let [d_q, d_k] = self.rotated(&d_features);
        let positions = &self.documents.positions;
        let rotated = Rotated { features: [&q, &k], rests: [&q_rest, &k_rest], positions };
        let attention = self.attention(false);
        let sums = lightning::backward_rotated(&attention, rotated, &v, &d_o, [&d_q, &d_k, &d_v], states);
        self.rotate_back(projected, theta, &d_features, &d_projected);
        add_theta(&sums, d_theta);
        d_projected
    }

    /// Room for features of q and k: `[B·T, 2, H, 2K]`, as many values as the projection has.
    fn features_like(&self, projected: &CubeTensor) -> CubeTensor {
        cuda::empty(projected, cuda::rows(projected).0, DType::BF16)
    }

    /// SiLU and LRPE of q and k: `[B·T, 2, H, 2K]`. What rounding takes from them goes into `rests` of the same shape.
    fn features(&self, projected: &CubeTensor, theta: &CubeTensor, rests: Option<&CubeTensor>) -> CubeTensor {
        let ([tokens, width], stride) = cuda::rows(projected);
        let width = width / 4;
        let features = self.features_like(projected);
        let mut work = Work::near(projected);
        let arguments = [
            cuda::view(projected),
            cuda::i64(stride as i64),
            cuda::read(theta),
            cuda::read(&self.documents.positions),
            cuda::write(&features),
            rests.map_or_else(cuda::absent, cuda::write),
        ];
        let numbers = [tokens, width, STRIPE].map(|n| cuda::i32(n as i32));
        let arguments: Vec<_> = arguments.into_iter().chain(numbers).collect();
        work.launch(&Kernel::new(&LRPE, "lrpe_forward"), stripes(tokens, width), &arguments);
        work.submit();
        features
    }

    /// Writes the gradients of q and k from that of the features.
    fn rotate_back(
        &self,
        projected: &CubeTensor,
        theta: &CubeTensor,
        d_features: &CubeTensor,
        d_projected: &CubeTensor,
    ) {
        let ([tokens, width], stride) = cuda::rows(projected);
        let (_, d_stride) = cuda::rows(d_projected);
        let width = width / 4;
        let mut work = Work::near(projected);
        let arguments = [
            cuda::view(projected),
            cuda::i64(stride as i64),
            cuda::read(theta),
            cuda::read(&self.documents.positions),
            cuda::read(d_features),
            cuda::write(d_projected),
            cuda::i64(d_stride as i64),
        ];
        let numbers = [tokens, width, STRIPE].map(|n| cuda::i32(n as i32));
        let arguments: Vec<_> = arguments.into_iter().chain(numbers).collect();
        work.launch(&Kernel::new(&LRPE, "lrpe_backward"), stripes(tokens, width), &arguments);
        work.submit();
    }
}

/// u of a projection, or its gradient: `[B·T, E]`, the rows apart.
pub(crate) fn gate_of(projected: &CubeTensor) -> CubeTensor {
    let width = cuda::rows(projected).0[1] / 4;
    cuda::columns(projected, 3 * width, width)
}

/// Adds up the sums `[rows, E]` of the attention's backward, and adds the gradient of θ to its own sum.
fn add_theta(sums: &CubeTensor, d_theta: &GradientSum) {
    let ([rows, width], _) = cuda::rows(sums);
    let (d_theta, accumulate) = d_theta.next();
    let mut work = Work::near(sums);
    let arguments = [
        cuda::read(sums),
        cuda::update(d_theta),
        cuda::i32(rows as i32),
        cuda::i32(width as i32),
        cuda::u32(u32::from(accumulate)),
    ];
    work.launch(&Kernel::new(&LRPE, "lrpe_theta"), Grid::new(width.div_ceil(256) as u32, 256), &arguments);
    work.submit();
}

/// A thread for every channel of q and k, a block for every stripe of tokens.
fn stripes(tokens: usize, width: usize) -> Grid {
    Grid::new(1, 256).blocks([(2 * width).div_ceil(256) as u32, tokens.div_ceil(STRIPE) as u32, 1])
}

/// [`super::gated::gated_attention`] in this form.
pub(super) fn apply(
    projected: Tensor<2>,
    theta: Option<Tensor<2>>,
    decay: &Arc<[f64]>,
    sequences: &Arc<Sequences>,
) -> Tensor<2> {
    let operation = Gated { decay: decay.clone(), sequences: sequences.clone() };
    match theta {
        Some(theta) => operation::apply::<CubeBackend, _, 2, 2>(operation, [projected, theta]),
        None => operation::apply::<CubeBackend, _, 1, 2>(operation, [projected]),
    }
}

#[derive(Clone, Debug)]
struct Gated {
    decay: Arc<[f64]>,
    sequences: Arc<Sequences>,
}

impl Gated {
    fn mixer(&self, near: &CubeTensor) -> Mixer {
        Mixer::kept(&self.decay, &self.sequences, &near.device)
    }

    fn run(&self, projected: CubeTensor, theta: Option<CubeTensor>) -> (CubeTensor, Vec<CubeTensor>) {
        let projected = cuda::in_rows(projected);
        let theta = theta.map(in_float32);
        let mixer = self.mixer(&projected);
        let o = mixer.attend(&projected, theta.as_ref(), None, None);
        let y = mixer.gate(&projected, &o);
        (y, [projected, o].into_iter().chain(theta).collect())
    }

    fn gradients(&self, saved: &[CubeTensor], dy: CubeTensor) -> (CubeTensor, Option<CubeTensor>) {
        let d_theta = saved.get(2).map(|theta| GradientSum::new(cuda::empty_like(theta)));
        let theta = saved.get(2).zip(d_theta.as_ref());
        let (mixer, dy) = (self.mixer(&dy), cuda::contiguous(dy));
        let d_projected = mixer.backward(&saved[0], theta, &saved[1], &dy, None, States::default());
        (d_projected, d_theta.map(GradientSum::into_buffer))
    }
}

/// θ, of which there are few, whatever the type of the other weights.
fn in_float32(theta: CubeTensor) -> CubeTensor {
    cuda::contiguous(cuda::of(cuda::to_tensor::<2>(theta).cast(DType::F32)))
}

impl Operation<CubeBackend, 1> for Gated {
    fn forward(&self, [projected]: [CubeTensor; 1], _tracked: bool) -> (CubeTensor, Vec<CubeTensor>) {
        self.run(projected, None)
    }

    fn backward(&self, saved: Vec<CubeTensor>, dy: CubeTensor, _: [bool; 1]) -> [Option<CubeTensor>; 1] {
        [Some(self.gradients(&saved, dy).0)]
    }
}

impl Operation<CubeBackend, 2> for Gated {
    fn forward(&self, [projected, theta]: [CubeTensor; 2], _tracked: bool) -> (CubeTensor, Vec<CubeTensor>) {
        let dtype = theta.dtype;
        let (y, mut saved) = self.run(projected, Some(theta));
        // The gradient of θ leaves in the type that θ came in.
        saved.push(cuda::empty(&y, [1], dtype));
        (y, saved)
    }

    fn backward(&self, saved: Vec<CubeTensor>, dy: CubeTensor, _: [bool; 2]) -> [Option<CubeTensor>; 2] {
        let (d_projected, d_theta) = self.gradients(&saved, dy);
        let dtype = saved[3].dtype;
        [Some(d_projected), d_theta.map(|d_theta| cuda::of(cuda::to_tensor::<2>(d_theta).cast(dtype)))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_is_made_once_for_every_device() {
        let kept: Kept<[f64], usize, f64> = Kept::new();
        let made = std::cell::Cell::new(0);
        let sum = |values: &Arc<[f64]>, device: usize| {
            kept.get(values, &device, || {
                made.set(made.get() + 1);
                values.iter().sum::<f64>() + device as f64
            })
        };
        let (first, second): (Arc<[f64]>, Arc<[f64]>) = (vec![1.0, 2.0].into(), vec![1.0, 2.0].into());
        assert_eq!([sum(&first, 0), sum(&first.clone(), 0), sum(&first, 10)], [3.0, 3.0, 13.0]);
        assert_eq!(made.get(), 2);
        assert_eq!(sum(&second, 0), 3.0);
        assert_eq!(made.get(), 3);
        // Values that are gone are forgotten, also where others come to lie in their place.
        drop(first);
        for n in 0..10 {
            let other: Arc<[f64]> = vec![f64::from(n), 2.0].into();
            assert_eq!(sum(&other, 0), f64::from(n) + 2.0);
        }
        sum(&second, 0);
        assert_eq!((made.get(), kept.entries.lock().unwrap().len()), (13, 1));
    }
}
