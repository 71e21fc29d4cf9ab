//! The kernels against the definition in float64, on a GPU where there is one; the plan everywhere.
// The errors that were measured are part of what these tests give.
#![allow(clippy::print_stderr)]

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use rayon::prelude::*;

use super::*;
use crate::ops::attention::gated::{gated_attention, stateful};
use crate::ops::attention::gated_cuda::{Documents, Mixer, upload_decay};
use crate::ops::attention::naive;
use crate::ops::sequences::Sequences;
use crate::ops::testing::{cuda_device, random};
use crate::ops::weight::GradientSum;
use crate::rng::Rng;

fn segments(sequences: usize, tokens: usize, walks: usize) -> usize {
    Plan::of([sequences, tokens.div_ceil(TILE), 128, 128], walks, 132, true).segment[1]
}

#[test]
fn sequences_are_cut_where_there_are_few() {
    assert_eq!(segments(128, 2048, 1), 1);
    assert_eq!(segments(128, 32768, 3), 1);
    assert_eq!(segments(64, 2048, 1), 2);
    assert_eq!(segments(8, 65536, 1), 16);
    assert_eq!(segments(8, 65536, 3), 11);
    assert_eq!(segments(1, 64, 1), 1);
}

#[test]
fn every_token_is_in_one_segment_and_memory_suffices() {
    for sequences in [1, 3, 8, 64, 200] {
        for tokens in [1usize, 63, 64, 65, 1000, 4097, 1 << 20] {
            for (x, z) in [(64, 64), (96, 96), (128, 64), (64, 128), (192, 96), (128, 256), (256, 256)] {
                for (hopper, limit) in [(true, 227 << 10), (false, 99 << 10)] {
                    let chunks = tokens.div_ceil(TILE);
                    let plan = Plan::of([sequences, chunks, x, z], 3, 132, hopper);
                    let [length, segments] = plan.segment;
                    assert!(length * segments >= chunks && length * (segments - 1) < chunks);
                    assert!(plan.groups * plan.z_groups * TILE >= z);
                    for (half, theta) in [(false, false), (true, false), (false, true)] {
                        // LRPE has values of at most 128 channels.
                        let plan = Plan { half, theta: theta && x <= 128, ..plan };
                        assert!(
                            [false, true].iter().all(|&states_only| plan.shared(states_only).1 <= limit),
                            "{plan:?}"
                        );
                    }
                    if segments > 1 {
                        let scratch = plan.blocks * segments * plan.groups * plan.x_tiles * TILE * TILE * 4;
                        let tensors = 7 * sequences * chunks * TILE * (x + z);
                        assert!(10 * scratch <= tensors, "{scratch} bytes beside {tensors}");
                    }
                }
            }
        }
    }
}

#[test]
fn heads_that_do_not_fit_are_refused_with_what_does() {
    for room in [99 << 10, 227 << 10] {
        let Err(Error::Input(reason)) = fits(1024, room) else { panic!("1024 values fit {room} bytes") };
        let widest: usize = reason.rsplit("at most ").next().unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!(widest >= 256 && AnyPlan::shared(widest) <= room && AnyPlan::shared(widest + 1) > room, "{reason}");
        assert!(fits(widest, room).is_ok() && fits(widest + 1, room).is_err());
    }
}

/// Float64 values `[B, H, T, width]`.
#[derive(Clone)]
struct Values {
    dims: [usize; 4],
    values: Vec<f64>,
}

impl Values {
    fn zeros(dims: [usize; 4]) -> Self {
        Self { dims, values: vec![0.0; dims.iter().product()] }
    }

    /// Standard normal, as `dtype` holds them.
    fn random(dims: [usize; 4], dtype: DType, stream: u64) -> Self {
        let mut rng = Rng::new(dims[2] as u64, stream);
        let values = (0..dims.iter().product()).map(|_| round(rng.normal(), dtype)).collect();
        Self { dims, values }
    }

    fn head(&self, sequence: usize) -> &[f64] {
        let size = self.dims[2] * self.dims[3];
        &self.values[sequence * size..][..size]
    }

    fn error(&self, got: &[f64]) -> f64 {
        assert_eq!(got.len(), self.values.len());
        let norm: f64 = self.values.iter().map(|x| x * x).sum();
        let error: f64 = got.iter().zip(&self.values).map(|(g, w)| (g - w) * (g - w)).sum();
        if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
    }
}

fn round(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => half::bf16::from_f64(x).to_f64(),
        DType::F16 => half::f16::from_f64(x).to_f64(),
        _ => f64::from(x as f32),
    }
}

/// One call in float64.
struct Case {
    q: Values,
    k: Values,
    v: Values,
    d_o: Values,
    state: Option<Values>,
    d_after: Option<Values>,
    decay: Vec<f64>,
    sequences: Sequences,
}

/// o, dq, dk, dv, the state after and the gradient of the state before.
type Results = [Values; 6];

impl Case {
    fn dims(&self) -> ([usize; 4], [usize; 4], [usize; 4]) {
        let (q, v) = (self.q.dims, self.v.dims);
        (q, v, [q[0], q[1], q[3], v[3]])
    }

    /// The recurrence and its reverse: the definition, summed token by token.
    fn definition(&self) -> Results {
        let (q, v, s) = self.dims();
        let mut results = [v, q, q, v, s, s].map(Values::zeros);
        let heads = q[1];
        let sequences: Vec<[Vec<f64>; 6]> =
            (0..q[0] * heads).into_par_iter().map(|sequence| self.sequence(sequence, sequence / heads)).collect();
        for (sequence, parts) in sequences.iter().enumerate() {
            for (result, part) in results.iter_mut().zip(parts) {
                result.values[sequence * part.len()..][..part.len()].copy_from_slice(part);
            }
        }
        results
    }

    fn sequence(&self, sequence: usize, row: usize) -> [Vec<f64>; 6] {
        let ([.., tokens, key], [.., value], _) = self.dims();
        let [q, k] = [&self.q, &self.k].map(|x| x.head(sequence));
        let [v, d_o] = [&self.v, &self.d_o].map(|x| x.head(sequence));
        let given =
            |state: &Option<Values>| state.as_ref().map_or(vec![0.0; key * value], |s| s.head(sequence).to_vec());
        let keep = (-self.decay[sequence % self.decay.len()]).exp();
        let positions = self.sequences.positions(row);
        let [mut o, mut dv] = [0; 2].map(|_| vec![0.0; tokens * value]);
        let [mut dq, mut dk] = [0; 2].map(|_| vec![0.0; tokens * key]);
        let mut state = given(&self.state);
        for t in 0..tokens {
            let keep = if positions[t] == 0 { 0.0 } else { keep };
            let (o, d_o, v) = (&mut o[t * value..][..value], &d_o[t * value..][..value], &v[t * value..][..value]);
            for c in 0..key {
                let line = &mut state[c * value..][..value];
                let (q, k) = (q[t * key + c], k[t * key + c]);
                let mut sum = 0.0;
                for ((s, v), (o, d_o)) in line.iter_mut().zip(v).zip(o.iter_mut().zip(d_o)) {
                    *s = keep * *s + k * v;
                    *o += q * *s;
                    sum += d_o * *s;
                }
                dq[t * key + c] = sum;
            }
        }
        // d: the gradient of the state after token t.
        let mut d = given(&self.d_after);
        for t in (0..tokens).rev() {
            let (dv, d_o, v) = (&mut dv[t * value..][..value], &d_o[t * value..][..value], &v[t * value..][..value]);
            let keep = if positions[t] == 0 { 0.0 } else { keep };
            for c in 0..key {
                let line = &mut d[c * value..][..value];
                let (q, k) = (q[t * key + c], k[t * key + c]);
                let mut sum = 0.0;
                for ((d, v), (dv, d_o)) in line.iter_mut().zip(v).zip(dv.iter_mut().zip(d_o)) {
                    *d += q * d_o;
                    *dv += k * *d;
                    sum += v * *d;
                    *d *= keep;
                }
                dk[t * key + c] = sum;
            }
        }
        [o, dq, dk, dv, state, d]
    }
}

#[test]
fn the_reference_is_the_naive_form() {
    let (rows, heads, tokens, key, value) = (2, 2, 70, 6, 4);
    let sequences = Sequences::packed(&[vec![3, 64], vec![]], tokens).unwrap();
    let make = |width, stream| Values::random([rows, heads, tokens, width], DType::F32, stream);
    let (q, k, v) = (make(key, 1), make(key, 2), make(value, 3));
    let case = Case {
        d_o: make(value, 4),
        state: None,
        d_after: None,
        decay: vec![0.3, 1e-3],
        sequences: sequences.clone(),
        q: q.clone(),
        k: k.clone(),
        v: v.clone(),
    };
    let [o, dq, dk, dv, ..] = case.definition();
    let device = Device::flex();
    let on_tape = |x: &Values| {
        let data = TensorData::new(x.values.clone(), x.dims);
        Tensor::<4>::from_data(data, (&device, DType::F64)).autodiff().require_grad()
    };
    let (q, k, v) = (on_tape(&q), on_tape(&k), on_tape(&v));
    let output = naive::attention(q.clone(), k.clone(), v.clone(), &case.decay, &sequences);
    let gradients = (output.clone() * on_tape(&case.d_o)).sum().backward();
    let read = |x: Tensor<4>| -> Vec<f64> { x.try_into_vec_as().unwrap() };
    assert!(o.error(&read(output.inner())) < 1e-12);
    for (want, leaf) in [(dq, q), (dk, k), (dv, v)] {
        assert!(want.error(&read(leaf.grad(&gradients).unwrap())) < 1e-12);
    }
}

/// Where the tensors of a call lie.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    /// `[B, H, T, width]`, one after the other.
    Own,
    /// Columns of a projection `[B·T, 4 · H · width]`, the second quarter.
    Columns,
    /// [`Layout::Own`] at an address that is no multiple of 16 bytes.
    Odd,
}

/// Uploads values, or room for them that holds no number.
fn place(device: &Device, dims: [usize; 4], layout: Layout, dtype: DType, values: Option<&Values>) -> Heads {
    let [rows, heads, tokens, width] = dims;
    let size: usize = dims.iter().product();
    let (total, index): (usize, Box<dyn Fn(usize) -> usize>) = match layout {
        Layout::Own => (size, Box::new(|n| n)),
        Layout::Odd => (size + 3, Box::new(|n| n + 3)),
        Layout::Columns => {
            let row = 4 * heads * width;
            let at = move |n: usize| {
                let (c, rest) = (n % width, n / width);
                let (token, head, row_index) = (rest % tokens, rest / tokens % heads, rest / tokens / heads);
                (row_index * tokens + token) * row + (heads + head) * width + c
            };
            (4 * size, Box::new(at))
        }
    };
    let mut all = vec![f32::NAN; total];
    if let Some(values) = values {
        for (n, value) in values.values.iter().enumerate() {
            all[index(n)] = *value as f32;
        }
    }
    let flat = cuda::of(Tensor::<1>::from_data(TensorData::new(all, [total]), (device, dtype)));
    match layout {
        Layout::Own => Heads::of(cuda::flat_view(&flat, 0, dims)),
        Layout::Odd => Heads::of(cuda::flat_view(&flat, 3, dims)),
        Layout::Columns => {
            let matrix = cuda::flat_view(&flat, 0, [rows * tokens, 4 * heads * width]);
            Heads::columns(&matrix, heads * width, [rows, heads, width])
        }
    }
}

fn read_back(heads: &Heads) -> Vec<f64> {
    let tensor = cuda::to_tensor::<1>(flatten(heads));
    tensor.into_data().convert::<f64>().try_into_vec().unwrap()
}

/// The values of the heads in order, copied.
fn flatten(heads: &Heads) -> CubeTensor {
    use cubecl::zspace::metadata::Metadata;
    use cubecl::zspace::{Shape, Strides};
    let mut view = heads.buffer.clone();
    let [row, head, token] = heads.strides;
    *view.meta = Metadata::new(Shape::new(heads.dims), Strides::new(&[row, head, token, 1]));
    let view = cuda::contiguous(view);
    cuda::flat_view(&view, 0, [heads.dims.iter().product()])
}

fn state(device: &CubeDevice, state: Option<&Values>) -> Option<CubeTensor> {
    state.map(|state| {
        let values: Vec<f32> = state.values.iter().map(|&x| x as f32).collect();
        cuda::flat_view(&cuda::upload_floats(device, &values), 0, state.dims)
    })
}

struct Setting {
    dims: [usize; 2],
    tokens: usize,
    widths: [usize; 2],
    dtype: DType,
    layout: Layout,
    decay: Vec<f64>,
    starts: Vec<u32>,
    states: bool,
    /// What q and k, and v and do, are multiplied with.
    sizes: [f64; 2],
}

impl Setting {
    fn new(tokens: usize, widths: [usize; 2]) -> Self {
        let slopes = crate::ops::attention::decay::decay_rates(4, 0, 24);
        let (dims, dtype, layout) = ([1, 4], DType::BF16, Layout::Own);
        Self { dims, tokens, widths, dtype, layout, decay: slopes, starts: vec![], states: false, sizes: [1.0; 2] }
    }

    fn case(&self) -> Case {
        let [rows, heads] = self.dims;
        let [key, value] = self.widths;
        let make = |width, stream: u64| {
            let mut values = Values::random([rows, heads, self.tokens, width], self.dtype, stream);
            let size = self.sizes[(stream as usize - 1) / 2];
            values.values.iter_mut().for_each(|x| *x = round(*x * size, self.dtype));
            values
        };
        // As large as a state becomes in a few hundred tokens.
        let state = |stream| {
            let mut state = Values::random([rows, heads, key, value], DType::F32, stream);
            state.values.iter_mut().for_each(|x| *x = f64::from((*x * 8.0) as f32));
            self.states.then_some(state)
        };
        let starts: Vec<u32> = self.starts.iter().copied().filter(|&start| (start as usize) < self.tokens).collect();
        Case {
            q: make(key, 1),
            k: make(key, 2),
            v: make(value, 3),
            d_o: make(value, 4),
            state: state(5),
            d_after: state(6),
            decay: self.decay.clone(),
            // The other rows have one document each.
            sequences: match starts.is_empty() {
                true => Sequences::continued(rows, self.tokens, 1),
                false => {
                    let rows: Vec<Vec<u32>> =
                        (0..rows).map(|row| if row == 0 { starts.clone() } else { vec![] }).collect();
                    Sequences::packed(&rows, self.tokens).unwrap()
                }
            },
        }
    }

    /// Runs the case twice on the device, into memory that holds no number, and gives the relative errors.
    fn run(&self, device: &Device) -> [f64; 6] {
        let case = self.case();
        let (q_dims, v_dims, s_dims) = case.dims();
        let (layout, dtype) = (self.layout, self.dtype);
        let up = |values: &Values| place(device, values.dims, layout, dtype, Some(values));
        let (q, k, v, d_o) = (up(&case.q), up(&case.k), up(&case.v), up(&case.d_o));
        let cube = q.buffer.device.clone();
        let decay: Vec<f32> = case.decay.iter().map(|&rate| rate as f32).collect();
        let decay = cuda::upload_floats(&cube, &decay);
        let positions = cuda::upload(&cube, case.sequences.all_positions());
        let attention =
            Attention { decay: &decay, positions: case.sequences.is_packed().then_some(&positions), silu: false };
        let before = state(&cube, case.state.as_ref());
        let d_after = state(&cube, case.d_after.as_ref());
        let results = || {
            let room = |dims| place(device, dims, layout, dtype, None);
            let (o, dq, dk, dv) = (room(v_dims), room(q_dims), room(q_dims), room(v_dims));
            let nan = Values { dims: s_dims, values: vec![f64::NAN; s_dims.iter().product()] };
            let (after, d_before) = (state(&cube, Some(&nan)).unwrap(), state(&cube, Some(&nan)).unwrap());
            forward(&attention, [&q, &k, &v], &o, before.as_ref(), Some(&after));
            let states = States { before: before.as_ref(), d_after: d_after.as_ref(), d_before: Some(&d_before) };
            backward(&attention, [&q, &k, &v], &d_o, [&dq, &dk, &dv], states);
            [o, dq, dk, dv, Heads::of(after), Heads::of(d_before)].map(|heads| read_back(&heads))
        };
        let (got, again) = (results(), results());
        assert!(got == again, "two runs differ");
        let want = case.definition();
        std::array::from_fn(|n| want[n].error(&got[n]))
    }

    #[track_caller]
    fn check(&self, device: &Device, tolerance: f64) {
        let errors = self.run(device);
        let what = format!(
            "T {} widths {:?} {:?} {:?} starts {:?} states {} decay {:?}",
            self.tokens, self.widths, self.dtype, self.layout, self.starts, self.states, self.decay
        );
        let list: Vec<String> = errors.iter().map(|error| format!("{error:.2e}")).collect();
        eprintln!("{what}: o dq dk dv s ds {}", list.join(" "));
        for (name, error) in ["o", "dq", "dk", "dv", "state", "d state"].into_iter().zip(errors) {
            assert!(error <= tolerance, "{name} is off by {error:.2e}: {what}");
        }
    }
}

/// Document starts at every kind of place.
const STARTS: [u32; 10] = [1, 63, 64, 65, 127, 128, 300, 511, 640, 998];
/// From the steepest head of the largest model to one that never forgets.
const DECAYS: [f64; 4] = [0.92, 0.05, 1e-4, 0.0];
/// Heads that forget within a few tokens, of which the gradient of θ is the smallest difference.
const FORGETFUL: [f64; 4] = [0.99, 0.92, 0.5, 0.05];

#[test]
fn bf16_on_tensor_cores() {
    let Some(device) = cuda_device("lightning attention in bf16") else { return };
    for tokens in [1, 63, 64, 65, 1000, 2048, 4097] {
        Setting::new(tokens, [128, 128]).check(&device, 2.5e-3);
        let starts = STARTS.to_vec();
        Setting { decay: DECAYS.to_vec(), states: true, starts, ..Setting::new(tokens, [128, 128]) }
            .check(&device, 2.5e-3);
    }
    let mut rng = Rng::new(3, 3);
    for widths in [[64, 64], [96, 96], [128, 64], [192, 96], [256, 128], [256, 256], [128, 256]] {
        let tokens = 64 + (rng.next_u64() % 900) as usize;
        let starts = vec![1 + (rng.next_u64() % 60) as u32, 64 + (rng.next_u64() % (tokens as u64 - 64)) as u32];
        for (states, starts) in [(true, vec![]), (false, starts)] {
            Setting { states, starts, dims: [2, 3], decay: DECAYS[..3].to_vec(), ..Setting::new(tokens, widths) }
                .check(&device, 2.5e-3);
        }
    }
    for layout in [Layout::Columns, Layout::Odd] {
        let starts = STARTS.to_vec();
        Setting { layout, starts, states: true, ..Setting::new(1000, [128, 128]) }.check(&device, 2.5e-3);
    }
}

#[test]
fn float16_on_tensor_cores() {
    let Some(device) = cuda_device("lightning attention in float16") else { return };
    let half = |tokens, widths| Setting { dtype: DType::F16, decay: DECAYS.to_vec(), ..Setting::new(tokens, widths) };
    for tokens in [64, 65, 1000, 2048, 4097] {
        half(tokens, [128, 128]).check(&device, 1e-3);
        Setting { starts: STARTS.to_vec(), states: true, ..half(tokens, [128, 128]) }.check(&device, 1e-3);
    }
    for (widths, layout) in [([64, 64], Layout::Columns), ([96, 96], Layout::Own), ([256, 128], Layout::Own)] {
        Setting { layout, states: true, starts: vec![70], ..half(300, widths) }.check(&device, 1e-3);
    }
    // Scores beyond what float16 holds, and sums of products far below what it resolves.
    let decay = vec![0.92, 0.5, 0.2, 0.05];
    for sizes in [[100.0, 1e-2], [3e-3, 30.0]] {
        Setting { sizes, decay: decay.clone(), ..half(1000, [128, 128]) }.check(&device, 1e-3);
    }
}

#[test]
fn float32_and_odd_float16_without_tensor_cores() {
    let Some(device) = cuda_device("lightning attention in float32 and float16") else { return };
    for tokens in [1, 63, 64, 65, 1000, 2048, 4097] {
        let starts = if tokens == 1000 { STARTS.to_vec() } else { vec![] };
        Setting { dtype: DType::F32, starts, states: true, decay: DECAYS.to_vec(), ..Setting::new(tokens, [128, 128]) }
            .check(&device, 1e-5);
    }
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 1e-3)] {
        let layouts = [([64, 64], Layout::Columns), ([96, 96], Layout::Odd), ([256, 128], Layout::Own)];
        for (tokens, (widths, layout)) in [200, 200, 63].into_iter().zip(layouts) {
            Setting { dtype, layout, states: true, ..Setting::new(tokens, widths) }.check(&device, tolerance);
        }
    }
}

/// A million tokens that are never forgotten, all alike: the state grows to a million times a product.
#[test]
fn a_million_tokens_do_not_overflow() {
    let Some(device) = cuda_device("lightning attention of a million tokens") else { return };
    let (tokens, width) = (1 << 20, 128);
    let ones = Tensor::<4>::ones([1, 2, tokens, width], (&device, DType::BF16));
    let heads = |tensor: Tensor<4>| Heads::of(cuda::contiguous(cuda::of(tensor)));
    let (q, k, v) = (heads(ones.clone()), heads(ones.clone()), heads(ones.clone()));
    let room = || heads(Tensor::<4>::full([1, 2, tokens, width], f32::NAN, (&device, DType::BF16)));
    let (o, dq, dk, dv) = (room(), room(), room(), room());
    let decay = cuda::upload_floats(&q.buffer.device, &[0.0, 0.92]);
    let attention = Attention { decay: &decay, positions: None, silu: false };
    forward(&attention, [&q, &k, &v], &o, None, None);
    backward(&attention, [&q, &k, &v], &o, [&dq, &dk, &dv], States::default());
    let last = |x: &Heads| -> f32 {
        let tensor = cuda::to_tensor::<4>(x.buffer.clone());
        tensor.narrow(1, 0, 1).narrow(2, tokens - 1, 1).narrow(3, 0, 1).cast(DType::F32).into_scalar()
    };
    // o_t = t · K where nothing is forgotten.
    assert!((last(&o) / (tokens * width) as f32 - 1.0).abs() < 1e-2);
    for tensor in [o, dq, dk, dv] {
        let largest: f32 = cuda::to_tensor::<4>(tensor.buffer).cast(DType::F32).abs().max().into_scalar();
        assert!(largest.is_finite());
    }
}

/// `y`, its gradient with respect to the projection `qkvu` and to `theta` where there is one, for the gradient `factor` of `y`:
/// by tensor primitives in float64.
fn gated_in_float64(
    [qkvu, factor]: [&Tensor<2>; 2],
    theta: Option<&Tensor<2>>,
    decay: &[f64],
    sequences: &Sequences,
) -> Vec<Vec<f64>> {
    let device = Device::flex();
    let leaf = |x: &Tensor<2>| Tensor::<2>::from_data(x.to_data(), (&device, DType::F64)).autodiff().require_grad();
    let (x, theta) = (leaf(qkvu), theta.map(leaf));
    let form = |q: Tensor<4>, k, v, d: &[f64], s: &Sequences, _| (naive::attention(q.clone(), k, v, d, s), q);
    let y = stateful(form, x.clone(), theta.clone(), decay, sequences, None).0;
    let gradients = (y.clone() * leaf(factor)).sum().backward();
    let mut results = vec![y.inner(), x.grad(&gradients).unwrap()];
    results.extend(theta.map(|theta| theta.grad(&gradients).unwrap()));
    results.into_iter().map(|x| x.into_data().try_into_vec::<f64>().unwrap()).collect()
}

/// The angles that a model begins with.
fn angles(heads: usize, width: usize) -> Tensor<2> {
    let all = heads * width;
    let angles: Vec<f32> = (0..all).map(|c| 10000f32.powf(-2.0 * c as f32 / all as f32)).collect();
    Tensor::from_data(TensorData::new(angles, [heads, width]), &Device::flex())
}

/// Relative error, in the norm.
fn error(want: &[f64], got: &[f64]) -> f64 {
    Values { dims: [1, 1, 1, want.len()], values: want.to_vec() }.error(got)
}

/// SiLU and LRPE in the kernels, the gate and θ: the whole mixer against tensor primitives in float64.
#[test]
fn the_gated_form_and_its_gradients() {
    let Some(device) = cuda_device("gated attention") else { return };
    let (heads, width, tokens) = (4, 128, 600);
    let settings = [DECAYS, FORGETFUL].map(|decay| [vec![], STARTS.to_vec()].map(|starts| (decay, starts)));
    for (decay, starts) in settings.into_iter().flatten() {
        let decay: Arc<[f64]> = decay.to_vec().into();
        let starts: Vec<u32> = starts.into_iter().filter(|&s| s < tokens as u32).collect();
        let sequences = Arc::new(match starts.is_empty() {
            true => Sequences::whole(2, tokens),
            false => Sequences::packed(&[starts, vec![77]], tokens).unwrap(),
        });
        for rotated in [false, true] {
            let qkvu = crate::ops::testing::rounded(random([2 * tokens, 4 * heads * width], 1));
            let factor = crate::ops::testing::rounded(random([2 * tokens, heads * width], 2));
            let theta = rotated.then(|| angles(heads, width));
            let want = gated_in_float64([&qkvu, &factor], theta.as_ref(), &decay, &sequences);
            let leaf = |x: &Tensor<2>, dtype: DType| {
                Tensor::<2>::from_data(x.to_data(), (&device, dtype)).autodiff().require_grad()
            };
            let (x, theta) = (leaf(&qkvu, DType::BF16), theta.map(|theta| leaf(&theta, DType::F32)));
            let y = gated_attention(x.clone(), theta.clone(), &decay, &sequences);
            let gradients = (y.clone() * leaf(&factor, DType::BF16)).sum().backward();
            let mut results = vec![y.inner(), x.grad(&gradients).unwrap()];
            results.extend(theta.map(|theta| theta.grad(&gradients).unwrap()));
            let read = |x: Tensor<2>| x.into_data().convert::<f64>().try_into_vec::<f64>().unwrap();
            let got: Vec<Vec<f64>> = results.into_iter().map(read).collect();
            for (name, (want, got)) in ["y", "dqkvu"].into_iter().zip(want.iter().zip(&got)) {
                let error = error(want, got);
                eprintln!("gated, rotated {rotated}, packed {}: {name} {error:.2e}", sequences.is_packed());
                // q̂ and k̂ are rounded to bf16 on the way, o before the norm.
                assert!(error <= 4e-3, "{name} is off by {error:.2e}");
            }
            // dθ is what is left of a sum over t for the queries and one over s for the keys, where only t - s counts.
            if let (Some(want), Some(got)) = (want.get(2), got.get(2)) {
                for (head, (want, got)) in want.chunks(width).zip(got.chunks(width)).enumerate() {
                    let error = error(want, got);
                    let what =
                        format!("dtheta of head {head}, decay {}, packed {}", decay[head], sequences.is_packed());
                    eprintln!("gated, {what}: {error:.2e}");
                    assert!(error <= 0.02, "{what} is off by {error:.2e}");
                }
            }
        }
    }
}

/// Rows in two parts, the states handed on from one to the other and their gradients back, against whole rows in float64.
#[test]
fn the_gated_form_of_rows_in_two_parts() {
    let Some(device) = cuda_device("gated attention of rows in two parts") else { return };
    let (heads, width, tokens, cut) = (4, 128, 600, 5 * CHUNK);
    // Documents everywhere, one that goes over the cut, one that begins at it, and one for a whole row.
    let packed: [Vec<u32>; 4] =
        [STARTS.into_iter().filter(|&s| s < tokens as u32).collect(), vec![77], vec![cut as u32], vec![]];
    let all = [Sequences::whole(packed.len(), tokens), Sequences::packed(&packed, tokens).unwrap()];
    let [qkvu, factor] = [4, 1].map(|parts| {
        crate::ops::testing::rounded(random([packed.len() * tokens, parts * heads * width], parts as u64))
    });
    for (sequences, decay) in all.iter().flat_map(|sequences| [DECAYS, FORGETFUL].map(|decay| (sequences, decay))) {
        for rotated in [false, true] {
            let theta = rotated.then(|| angles(heads, width));
            let want = gated_in_float64([&qkvu, &factor], theta.as_ref(), &decay, sequences);
            let got = in_two_parts([&qkvu, &factor], theta.as_ref(), &decay, sequences, cut, &device, true);
            let apart = in_two_parts([&qkvu, &factor], theta.as_ref(), &decay, sequences, cut, &device, false);
            let what = format!("rotated {rotated}, packed {}, decays {decay:?}", sequences.is_packed());
            for (name, n) in [("y", 0), ("dqkvu", 1)] {
                let (error, without) = (error(&want[n], &got[n]), error(&want[n], &apart[n]));
                eprintln!("gated in two parts, {what}: {name} {error:.2e}, without states {without:.2e}");
                assert!(error <= 4e-3, "{name} is off by {error:.2e}: {what}");
                assert!(without > 0.02, "{name}: states matter: {what}");
            }
            if rotated {
                for (head, (want, got)) in want[2].chunks(width).zip(got[2].chunks(width)).enumerate() {
                    let (error, rate) = (error(want, got), decay[head]);
                    eprintln!("gated in two parts, {what}: dtheta of head {head}, decay {rate}: {error:.2e}");
                    assert!(error <= 0.02, "dtheta of head {head} is off by {error:.2e}: {what}");
                }
            }
        }
    }
}

/// What [`gated_in_float64`] gives, of the two parts before and behind token `cut` of every row; with zeros for the states
/// unless they are `handed_on`.
fn in_two_parts(
    [qkvu, factor]: [&Tensor<2>; 2],
    theta: Option<&Tensor<2>>,
    decay: &[f64],
    sequences: &Sequences,
    cut: usize,
    device: &Device,
    handed_on: bool,
) -> Vec<Vec<f64>> {
    let (rows, length, heads) = (sequences.rows(), sequences.length(), decay.len());
    let (width, ranges) = (factor.dims()[1], [0..cut, cut..length]);
    let cube = cuda::of(Tensor::<1>::zeros([8], device)).device;
    let of = |x: &Tensor<2>, range: &Range<usize>| {
        let columns = x.dims()[1];
        let x: Tensor<3> = x.clone().reshape([rows, length, columns]).narrow(1, range.start, range.len());
        let x: Tensor<2> = x.reshape([rows * range.len(), columns]);
        cuda::contiguous(cuda::of(Tensor::<2>::from_data(x.into_data(), (device, DType::BF16))))
    };
    // Parts of rows where they stand in whole rows.
    let join = |parts: [CubeTensor; 2]| -> Vec<f64> {
        let columns = cuda::rows(&parts[0]).0[1];
        let mut all = vec![f64::NAN; rows * length * columns];
        for (part, range) in parts.iter().zip(&ranges) {
            let values = cuda::download_floats(part).unwrap();
            for (row, values) in values.chunks_exact(range.len() * columns).enumerate() {
                let to = &mut all[(row * length + range.start) * columns..][..values.len()];
                to.iter_mut().zip(values).for_each(|(to, from)| *to = f64::from(*from));
            }
        }
        all
    };
    let theta = theta.map(|theta| cuda::contiguous(cuda::of(Tensor::<2>::from_data(theta.to_data(), device))));
    let d_theta = theta.as_ref().map(|theta| GradientSum::new(cuda::empty_like(theta)));
    let mixers = ranges.clone().map(|range| Mixer {
        decay: upload_decay(decay, &cube),
        heads,
        documents: Documents::new(&sequences.part(range), &cube),
    });
    let projected = ranges.each_ref().map(|range| of(qkvu, range));
    let (first, between) = mixers[0].attend_and_leave(&projected[0], theta.as_ref(), None);
    let between = handed_on.then_some(between);
    let second = mixers[1].attend(&projected[1], theta.as_ref(), between.as_ref(), None);
    let attended = [first, second];
    let d_between = mixers[1].state(&attended[1], width, theta.is_some());
    let states = [
        States { d_after: handed_on.then_some(&d_between), ..States::default() },
        States { before: between.as_ref(), d_before: Some(&d_between), ..States::default() },
    ];
    let gradient = |n: usize| {
        let theta = theta.as_ref().zip(d_theta.as_ref());
        mixers[n].backward(&projected[n], theta, &attended[n], &of(factor, &ranges[n]), None, states[n])
    };
    // The second part goes first.
    let behind = gradient(1);
    let gradients = [gradient(0), behind];
    let y = [0, 1].map(|n| mixers[n].gate(&projected[n], &attended[n]));
    let mut results = vec![join(y), join(gradients)];
    results.extend(d_theta.map(|sum| {
        let values = cuda::download_floats(&sum.into_buffer()).unwrap();
        values.into_iter().map(f64::from).collect::<Vec<f64>>()
    }));
    results
}
