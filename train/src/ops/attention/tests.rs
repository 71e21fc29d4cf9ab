use std::sync::Arc;

use burn::tensor::{DType, Tensor};

use super::gated::{Form, gated_attention, gated_part, stateful, stateful_part};
use super::{chunked, naive, recurrent};
use crate::ops::sequences::Sequences;
use crate::ops::testing::{assert_close, random};

const LENGTHS: [usize; 9] = [1, 2, 63, 64, 65, 97, 128, 130, 200];

/// From no decay at all to a head that forgets within a few tokens.
const DECAY: [f64; 3] = [0.0, 0.05, 1.5];

/// Without borders, with borders at every kind of place, and with one-token documents.
fn documents(length: usize) -> Vec<Sequences> {
    let within = |starts: &[usize]| -> Vec<u32> {
        let starts = starts.iter().filter(|&&start| start < length);
        starts.map(|&start| start as u32).collect()
    };
    let rows = [within(&[1, 2, 3, 64, 65, 127, 129]), within(&[63, 96, 128, 192])];
    vec![
        Sequences::whole(2, length),
        Sequences::packed(&rows, length).unwrap(),
        Sequences::packed(&[within(&[64]), vec![]], length).unwrap(),
    ]
}

/// Standard normal q, k, v with K = `key` and V = 4 in float64.
fn inputs(length: usize, key: usize) -> [Tensor<4>; 3] {
    let make = |width, stream| random([2, 3, length, width], stream).cast(DType::F64);
    [make(key, 1), make(key, 2), make(4, 3)]
}

#[test]
fn three_forms_agree() {
    for length in LENGTHS {
        for sequences in documents(length) {
            for key in [4, 8] {
                let [q, k, v] = inputs(length, key);
                let want = naive::attention(q.clone(), k.clone(), v.clone(), &DECAY, &sequences);
                let run = |form: Form| form(q.clone(), k.clone(), v.clone(), &DECAY, &sequences, None);
                let (by_chunks, chunk_state) = run(chunked::attention);
                let (by_tokens, token_state) = run(recurrent::attention);
                assert_close("chunked", by_chunks, want.clone(), 1e-12);
                assert_close("recurrent", by_tokens, want, 1e-12);
                assert_close("state", chunk_state, token_state, 1e-12);
            }
        }
    }
}

#[test]
fn a_sequence_can_be_cut_anywhere() {
    let length = 150;
    let [q, k, v] = inputs(length, 4);
    let whole = Sequences::whole(2, length);
    let want = naive::attention(q.clone(), k.clone(), v.clone(), &DECAY, &whole);
    for cut in [1, 64, 70, 149] {
        let part = |x: &Tensor<4>, from, count| x.clone().narrow(2, from, count);
        for (first, second) in [
            (chunked::attention as Form, chunked::attention as Form),
            (chunked::attention, recurrent::attention),
            (recurrent::attention, chunked::attention),
        ] {
            let run = |form: Form, from: usize, count: usize, state| {
                let sequences = Sequences::continued(2, count, from);
                let of = |x| part(x, from, count);
                form(of(&q), of(&k), of(&v), &DECAY, &sequences, state)
            };
            let (left, state) = run(first, 0, cut, None);
            let (right, _) = run(second, cut, length - cut, Some(state));
            assert_close("cut", Tensor::cat(vec![left, right], 2), want.clone(), 1e-12);
        }
    }
}

#[test]
fn gradients_of_the_chunked_form_are_the_naive_ones() {
    for length in [1, 65, 130] {
        for sequences in documents(length) {
            let weight = random([2, 3, length, 4], 9).cast(DType::F64);
            let run = |form: &dyn Fn(&[Tensor<4>; 3]) -> Tensor<4>| {
                let leaves = inputs(length, 8).map(|x| x.autodiff().require_grad());
                let gradients = (form(&leaves) * weight.clone().autodiff()).sum().backward();
                leaves.map(|leaf| leaf.grad(&gradients).unwrap())
            };
            let got = run(&|[q, k, v]| {
                let (q, k, v) = (q.clone(), k.clone(), v.clone());
                chunked::attention(q, k, v, &DECAY, &sequences, None).0
            });
            let want = run(&|[q, k, v]| naive::attention(q.clone(), k.clone(), v.clone(), &DECAY, &sequences));
            for ((got, want), name) in got.into_iter().zip(want).zip(["dq", "dk", "dv"]) {
                assert_close(name, got, want, 1e-11);
            }
        }
    }
}

/// The naive form behind the interface of the others.
fn naive_form(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    decay: &[f64],
    sequences: &Sequences,
    state: Option<Tensor<4>>,
) -> (Tensor<4>, Tensor<4>) {
    assert!(state.is_none());
    let output = naive::attention(q, k, v, decay, sequences);
    (output.clone(), output)
}

#[test]
fn the_cpu_operation_is_the_naive_form_in_float64_with_its_gradients() {
    let decay: Arc<[f64]> = DECAY.into();
    for length in LENGTHS {
        for sequences in documents(length).map_arc() {
            for rotated in [false, true] {
                let qkvu = random([2 * length, 4 * 12], 1);
                let theta = rotated.then(|| random([3, 4], 2).abs());
                let weight = random([2 * length, 12], 3);
                let run = |dtype: DType| {
                    let qkvu = qkvu.clone().cast(dtype).autodiff().require_grad();
                    let theta = theta.clone().map(|theta| theta.cast(dtype).autodiff().require_grad());
                    let y = match dtype {
                        DType::F32 => gated_attention(qkvu.clone(), theta.clone(), &decay, &sequences),
                        _ => {
                            let theta = theta.clone();
                            stateful(naive_form, qkvu.clone(), theta, &decay, &sequences, None).0
                        }
                    };
                    let weight = weight.clone().cast(dtype).autodiff();
                    let gradients = (y.clone() * weight).sum().backward();
                    let dtheta = theta.map(|theta| theta.grad(&gradients).unwrap());
                    (y.inner(), qkvu.grad(&gradients).unwrap(), dtheta)
                };
                let (got, want) = (run(DType::F32), run(DType::F64));
                let what = format!("T {length}, LRPE {rotated}");
                assert_close(&what, got.0, want.0, 2e-5);
                assert_close(&format!("{what}: dqkvu"), got.1, want.1, 5e-5);
                if let (Some(got), Some(want)) = (got.2, want.2) {
                    // At T = 1 the only position is 0 and the angles have no effect.
                    if length > 1 {
                        assert_close(&format!("{what}: dθ"), got, want, 1e-4);
                    }
                }
            }
        }
    }
}

#[test]
fn a_part_of_the_heads_is_the_naive_form_without_its_norm() {
    let decay: Arc<[f64]> = DECAY.into();
    for sequences in documents(130).map_arc() {
        for rotated in [false, true] {
            let qkvu = random([2 * 130, 4 * 12], 1);
            let theta = rotated.then(|| random([3, 4], 2).abs());
            let weights = [random([2 * 130, 12], 3), random([2 * 130, 1], 4)];
            let run = |dtype: DType| {
                let qkvu = qkvu.clone().cast(dtype).autodiff().require_grad();
                let theta = theta.clone().map(|theta| theta.cast(dtype).autodiff().require_grad());
                let parts = match dtype {
                    DType::F32 => gated_part(qkvu.clone(), theta.clone(), &decay, &sequences),
                    _ => stateful_part(naive_form, qkvu.clone(), theta.clone(), &decay, &sequences, None).0,
                };
                let weights = weights.clone().map(|weight| weight.cast(dtype).autodiff());
                let [first, second] = [0, 1].map(|n| (parts[n].clone() * weights[n].clone()).sum());
                let gradients = (first + second).backward();
                let dtheta = theta.map(|theta| theta.grad(&gradients).unwrap());
                (parts.map(Tensor::inner), qkvu.grad(&gradients).unwrap(), dtheta)
            };
            let (got, want) = (run(DType::F32), run(DType::F64));
            for ((what, got), want) in ["u o", "squares"].into_iter().zip(got.0).zip(want.0) {
                assert_close(what, got, want, 2e-5);
            }
            assert_close("dqkvu", got.1, want.1, 5e-5);
            if let (Some(got), Some(want)) = (got.2, want.2) {
                assert_close("dθ", got, want, 1e-4);
            }
        }
    }
}

trait MapArc {
    fn map_arc(self) -> Vec<Arc<Sequences>>;
}

impl MapArc for Vec<Sequences> {
    fn map_arc(self) -> Vec<Arc<Sequences>> {
        self.into_iter().map(Arc::new).collect()
    }
}
