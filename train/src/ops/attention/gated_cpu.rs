//! [`super::gated`] on the CPU: one task per row and head walks over the chunks with its state.
//!
//! Chunks end where documents end, so no factor has to be masked. Forward, with q̂, k̂ the features
//! of a chunk of c tokens: `A = (q̂ k̂ᵀ) ⊙ λ^{i-j}`, `o = A v + λ^{i+1} q̂ S`,
//! `S' = λ^c S + (λ^{c-1-j} k̂)ᵀ v`. Backward, from the last chunk to the first with dS the gradient
//! of the state after the chunk: `dA = (do vᵀ) ⊙ λ^{i-j}`, `dq̂ = dA k̂ + λ^{i+1} do Sᵀ`,
//! `dk̂ = dAᵀ q̂ + λ^{c-1-j} v dSᵀ`, `dv = Aᵀ do + λ^{c-1-j} k̂ dS`, and `λ^c dS + (λ^{i+1} q̂)ᵀ do`
//! goes on. (λ^n stands for exp(-λn).)

use std::ops::Range;
use std::sync::Arc;

use burn::backend::Flex;
use rayon::prelude::*;

use super::chunked::CHUNK;
use crate::ops::cpu::{self, FlexTensor, View, product};
use crate::ops::exp::exp;
use crate::ops::lanes::dot;
use crate::ops::operation::Operation;
use crate::ops::sequences::Sequences;
use crate::ops::srms_norm;

#[derive(Clone, Debug)]
pub(super) struct GatedAttention {
    decay: Arc<[f64]>,
    sequences: Arc<Sequences>,
    rotated: bool,
    normed: bool,
}

impl GatedAttention {
    pub(super) fn new(decay: &Arc<[f64]>, sequences: &Arc<Sequences>, rotated: bool) -> Self {
        Self { decay: decay.clone(), sequences: sequences.clone(), rotated, normed: true }
    }

    /// `u ⊙ o` in place of `u ⊙ SRMSNorm(o)`, and Σ o² in one more column.
    pub(super) fn without_norm(self) -> Self {
        Self { normed: false, ..self }
    }
}

impl Operation<Flex, 1> for GatedAttention {
    fn forward(&self, [qkvu]: [FlexTensor; 1], _tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        self.run_forward(qkvu, None)
    }

    fn backward(&self, saved: Vec<FlexTensor>, gradient: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(self.run_backward(saved, gradient).0)]
    }
}

impl Operation<Flex, 2> for GatedAttention {
    fn forward(&self, [qkvu, theta]: [FlexTensor; 2], _tracked: bool) -> (FlexTensor, Vec<FlexTensor>) {
        self.run_forward(qkvu, Some(theta))
    }

    fn backward(&self, saved: Vec<FlexTensor>, gradient: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let (dqkvu, dtheta) = self.run_backward(saved, gradient);
        [dqkvu, dtheta].map(Some)
    }
}

/// Sizes and shared tables of one call.
struct Call<'a> {
    /// `[B·T, 4E]`.
    qkvu: &'a [f32],
    sequences: &'a Sequences,
    heads: usize,
    /// E.
    width: usize,
    /// K = V.
    head: usize,
    /// Width of q̂ and k̂: K, or 2K with LRPE.
    feature: usize,
    /// cos and sin of position × θ, `[positions, E]` each; empty without LRPE.
    rotation: (Vec<f32>, Vec<f32>),
    /// exp(-λn) for n in 0..=CHUNK, per head.
    powers: Vec<Vec<f32>>,
}

/// q̂ and k̂ of a chunk, and room for its scores.
struct Features {
    q: Vec<f32>,
    k: Vec<f32>,
    scaled: Vec<f32>,
    scores: Vec<f32>,
}

fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// d silu(x) / dx.
fn silu_slope(x: f32) -> f32 {
    let sigmoid = 1.0 / (1.0 + exp(-x));
    sigmoid * (1.0 + x * (1.0 - sigmoid))
}

/// The chunks of a row: at most [`CHUNK`] tokens, none across the start of a document.
fn chunks(positions: &[u32]) -> Vec<Range<usize>> {
    let mut chunks = Vec::new();
    let mut begin = 0;
    for t in 1..=positions.len() {
        if t == positions.len() || positions[t] == 0 || t - begin == CHUNK {
            chunks.push(begin..t);
            begin = t;
        }
    }
    chunks
}

/// Multiplies row i of `values: [.., width]` by `factor(i)`, into `to`.
fn scale_rows(to: &mut [f32], values: &[f32], width: usize, factor: impl Fn(usize) -> f32) {
    let lines = to.chunks_exact_mut(width).zip(values.chunks_exact(width));
    for (i, (to, from)) in lines.enumerate() {
        let factor = factor(i);
        for (to, from) in to.iter_mut().zip(from) {
            *to = from * factor;
        }
    }
}

/// Multiplies score (i, j) by λ^{i-j} for j ≤ i and makes the others zero.
fn decay_scores(scores: &mut [f32], tokens: usize, powers: &[f32]) {
    for (i, line) in scores.chunks_exact_mut(tokens).enumerate() {
        for (j, score) in line[..=i].iter_mut().enumerate() {
            *score *= powers[i - j];
        }
        line[i + 1..].fill(0.0);
    }
}

impl<'a> Call<'a> {
    fn new(operation: &'a GatedAttention, qkvu: &'a FlexTensor, theta: Option<&FlexTensor>) -> Self {
        let [_, width] = qkvu.layout().shape().dims();
        let (heads, width) = (operation.decay.len(), width / 4);
        let sequences = &*operation.sequences;
        let rotation = theta.map_or_else(Default::default, |theta| {
            let theta = cpu::values(theta);
            let positions = sequences.all_positions().iter().max().map_or(0, |&last| last as usize + 1);
            (0..positions * width)
                .into_par_iter()
                .map(|index| {
                    let angle = theta[index % width] * (index / width) as f32;
                    (angle.cos(), angle.sin())
                })
                .unzip()
        });
        let powers = |rate: &f64| (0..=CHUNK).map(|n| (-rate * n as f64).exp() as f32).collect();
        Self {
            qkvu: cpu::values(qkvu),
            sequences,
            heads,
            width,
            head: width / heads,
            feature: width / heads * if operation.rotated { 2 } else { 1 },
            rotation,
            powers: operation.decay.iter().map(powers).collect(),
        }
    }

    fn features(&self) -> Features {
        Features {
            q: vec![0.0; CHUNK * self.feature],
            k: vec![0.0; CHUNK * self.feature],
            scaled: vec![0.0; CHUNK * self.feature],
            scores: vec![0.0; CHUNK * CHUNK],
        }
    }

    /// The K values of part `index` (q, k, v, u) of a token in one head.
    fn part(&self, token: usize, index: usize, head: usize) -> &'a [f32] {
        let from = token * 4 * self.width + index * self.width + head * self.head;
        &self.qkvu[from..from + self.head]
    }

    /// v of the tokens from `token` on, in one head.
    fn v(&self, token: usize, head: usize) -> View<'a> {
        let from = token * 4 * self.width + 2 * self.width + head * self.head;
        View::rows(&self.qkvu[from..], 4 * self.width)
    }

    /// SiLU and LRPE of part `index` of one token in one head, into `to`.
    fn feature(&self, token: usize, position: u32, index: usize, head: usize, to: &mut [f32]) {
        let from = self.part(token, index, head);
        let (first, second) = to.split_at_mut(self.head);
        for (to, &from) in first.iter_mut().zip(from) {
            *to = silu(from);
        }
        if !second.is_empty() {
            let (cos, sin) = self.angles(position, head);
            for ((first, second), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                *second = *first * sin;
                *first *= cos;
            }
        }
    }

    fn angles(&self, position: u32, head: usize) -> (&[f32], &[f32]) {
        let from = position as usize * self.width + head * self.head;
        let range = from..from + self.head;
        (&self.rotation.0[range.clone()], &self.rotation.1[range])
    }

    /// q̂ and k̂ of a chunk of `row`.
    fn load(&self, row: usize, head: usize, chunk: &Range<usize>, to: &mut Features) {
        let positions = self.sequences.positions(row);
        for (i, t) in chunk.clone().enumerate() {
            let token = row * self.sequences.length() + t;
            let range = i * self.feature..(i + 1) * self.feature;
            self.feature(token, positions[t], 0, head, &mut to.q[range.clone()]);
            self.feature(token, positions[t], 1, head, &mut to.k[range]);
        }
    }

    /// `S' = λ^c S + (λ^{c-1-j} k̂)ᵀ v`.
    fn advance(&self, state: &mut [f32], features: &mut Features, v: View<'_>, tokens: usize, powers: &[f32]) {
        let (f, d) = (self.feature, self.head);
        scale_rows(&mut features.scaled, &features.k[..tokens * f], f, |j| powers[tokens - 1 - j]);
        let k = View::rows(&features.scaled, f).t();
        product([f, d, tokens], state, d, powers[tokens], k, v);
    }

    /// The attention of one head of one row, into `output: [T, V]`.
    fn attend(&self, row: usize, head: usize, output: &mut [f32]) {
        let (f, d) = (self.feature, self.head);
        let positions = self.sequences.positions(row);
        let powers = &self.powers[head];
        let mut features = self.features();
        let mut state = vec![0f32; f * d];
        for chunk in chunks(positions) {
            let tokens = chunk.len();
            let v = self.v(row * positions.len() + chunk.start, head);
            let output = &mut output[chunk.start * d..chunk.end * d];
            self.load(row, head, &chunk, &mut features);
            let (q, k) = (View::rows(&features.q, f), View::rows(&features.k, f));
            product([tokens, tokens, f], &mut features.scores, tokens, 0.0, q, k.t());
            decay_scores(&mut features.scores[..tokens * tokens], tokens, powers);
            let scores = View::rows(&features.scores, tokens);
            product([tokens, d, tokens], output, d, 0.0, scores, v);
            if positions[chunk.start] == 0 {
                state.fill(0.0);
            } else {
                scale_rows(&mut features.scaled, &features.q[..tokens * f], f, |i| powers[i + 1]);
                let q = View::rows(&features.scaled, f);
                product([tokens, d, f], output, d, 1.0, q, View::rows(&state, d));
            }
            self.advance(&mut state, &mut features, v, tokens, powers);
        }
    }

    /// The gradients of one head of one row: `gradient` has do `[T, V]` on entry, `output` gets dq,
    /// dk and dv `[3, T, K]`, and dθ `[K]` is given back.
    fn attend_backward(&self, row: usize, head: usize, gradient: &[f32], output: &mut [f32]) -> Vec<f32> {
        let (f, d) = (self.feature, self.head);
        let positions = self.sequences.positions(row);
        let powers = &self.powers[head];
        let first_token = row * positions.len();
        let chunks = chunks(positions);
        let mut features = self.features();

        // The state before every chunk, again.
        let mut states = vec![0f32; chunks.len() * f * d];
        let mut state = vec![0f32; f * d];
        for (chunk, before) in chunks.iter().zip(states.chunks_exact_mut(f * d)) {
            if positions[chunk.start] == 0 {
                state.fill(0.0);
            }
            before.copy_from_slice(&state);
            self.load(row, head, chunk, &mut features);
            let v = self.v(first_token + chunk.start, head);
            self.advance(&mut state, &mut features, v, chunk.len(), powers);
        }

        let (dq, rest) = output.split_at_mut(positions.len() * d);
        let (dk, dv) = rest.split_at_mut(positions.len() * d);
        let mut dtheta = vec![0f32; if f > d { d } else { 0 }];
        let mut dstate = vec![0f32; f * d];
        let mut dscores = vec![0f32; CHUNK * CHUNK];
        let (mut dq_feature, mut dk_feature) = (vec![0f32; CHUNK * f], vec![0f32; CHUNK * f]);
        let mut scaled = vec![0f32; CHUNK * d];
        for (chunk, before) in chunks.iter().zip(states.chunks_exact(f * d)).rev() {
            let tokens = chunk.len();
            let range = chunk.start * d..chunk.end * d;
            let v = self.v(first_token + chunk.start, head);
            let before = View::rows(before, d);
            let gradient = &gradient[range.clone()];
            let do_rows = View::rows(gradient, d);
            self.load(row, head, chunk, &mut features);
            let (q, k) = (View::rows(&features.q, f), View::rows(&features.k, f));
            let square = [tokens, tokens, f];
            product(square, &mut features.scores, tokens, 0.0, q, k.t());
            decay_scores(&mut features.scores[..tokens * tokens], tokens, powers);
            product([tokens, tokens, d], &mut dscores, tokens, 0.0, do_rows, v.t());
            decay_scores(&mut dscores[..tokens * tokens], tokens, powers);
            let scores = View::rows(&features.scores, tokens);
            let dscore_rows = View::rows(&dscores, tokens);

            // dq̂ and dk̂.
            let wide = [tokens, f, tokens];
            product(wide, &mut dq_feature, f, 0.0, dscore_rows, k);
            product(wide, &mut dk_feature, f, 0.0, dscore_rows.t(), q);
            scale_rows(&mut scaled, gradient, d, |i| powers[i + 1]);
            let decayed = View::rows(&scaled, d);
            product([tokens, f, d], &mut dq_feature, f, 1.0, decayed, before.t());
            // λ^{c-1-j} v dSᵀ: the factor goes onto v, which is then the left side.
            let mut decayed_v = vec![0f32; tokens * d];
            for (j, to) in decayed_v.chunks_exact_mut(d).enumerate() {
                let from = self.part(first_token + chunk.start + j, 2, head);
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from * powers[tokens - 1 - j];
                }
            }
            let after = View::rows(&dstate, d);
            let decayed_v = View::rows(&decayed_v, d);
            product([tokens, f, d], &mut dk_feature, f, 1.0, decayed_v, after.t());

            // dv.
            let dv = &mut dv[range.clone()];
            product([tokens, d, tokens], dv, d, 0.0, scores.t(), do_rows);
            scale_rows(&mut features.scaled, &features.k[..tokens * f], f, |j| powers[tokens - 1 - j]);
            let decayed_k = View::rows(&features.scaled, f);
            product([tokens, d, f], dv, d, 1.0, decayed_k, after);

            // The gradient of the state before this chunk.
            if positions[chunk.start] == 0 {
                dstate.fill(0.0);
            } else {
                let keep = powers[tokens];
                product([f, d, tokens], &mut dstate, d, keep, q.t(), decayed);
            }

            for (part, (wide, to)) in [(&dq_feature, &mut *dq), (&dk_feature, &mut *dk)].into_iter().enumerate() {
                let lines = to[range.clone()].chunks_exact_mut(d);
                for (i, (to, wide)) in lines.zip(wide.chunks_exact(f)).enumerate() {
                    let t = chunk.start + i;
                    let from = self.part(first_token + t, part, head);
                    self.feature_backward(positions[t], head, from, wide, to, &mut dtheta);
                }
            }
        }
        dtheta
    }

    /// The gradient of SiLU and LRPE of one token: from `wide`, that of q̂ or k̂, to `to`.
    fn feature_backward(
        &self,
        position: u32,
        head: usize,
        from: &[f32],
        wide: &[f32],
        to: &mut [f32],
        dtheta: &mut [f32],
    ) {
        let (first, second) = wide.split_at(self.head);
        if second.is_empty() {
            for ((to, &x), gradient) in to.iter_mut().zip(from).zip(first) {
                *to = gradient * silu_slope(x);
            }
            return;
        }
        let (cos, sin) = self.angles(position, head);
        for c in 0..self.head {
            let (first, second, x) = (first[c], second[c], from[c]);
            to[c] = (first * cos[c] + second * sin[c]) * silu_slope(x);
            dtheta[c] += position as f32 * silu(x) * (second * cos[c] - first * sin[c]);
        }
    }

    /// Calls `f(head, values)` for every head of a token in an array `[B, H, T, V]`.
    fn each_head<'b>(&self, token: usize, array: &'b [f32], mut f: impl FnMut(usize, &'b [f32])) {
        let length = self.sequences.length();
        let (row, t) = (token / length, token % length);
        for head in 0..self.heads {
            let from = ((row * self.heads + head) * length + t) * self.head;
            f(head, &array[from..from + self.head]);
        }
    }

    /// Σ o² of the attention's output of one token, over all heads.
    fn squares(&self, token: usize, output: &[f32]) -> f32 {
        let mut sum = 0.0;
        self.each_head(token, output, |_, o| sum += dot(o, o));
        sum
    }
}

impl GatedAttention {
    /// Of the result, for E = `width`.
    fn columns(&self, width: usize) -> usize {
        if self.normed { width } else { width + 1 }
    }

    fn run_forward(&self, qkvu: FlexTensor, theta: Option<FlexTensor>) -> (FlexTensor, Vec<FlexTensor>) {
        let qkvu = cpu::contiguous(qkvu);
        let theta = theta.map(cpu::contiguous);
        let call = Call::new(self, &qkvu, theta.as_ref());
        let (rows, length) = (self.sequences.rows(), self.sequences.length());
        let (width, head) = (call.width, call.head);
        let mut output = vec![0f32; rows * length * width];
        output.par_chunks_mut(length * head).enumerate().for_each(|(index, output)| {
            call.attend(index / call.heads, index % call.heads, output);
        });
        let columns = self.columns(width);
        let mut y = vec![0f32; rows * length * columns];
        y.par_chunks_mut(columns).enumerate().for_each(|(token, y)| {
            let squares = call.squares(token, &output);
            let (y, sum) = y.split_at_mut(width);
            sum.fill(squares);
            let scale = if self.normed { srms_norm::scale(squares, width).0 } else { 1.0 };
            call.each_head(token, &output, |h, o| {
                let u = call.part(token, 3, h);
                let y = &mut y[h * head..(h + 1) * head];
                for ((y, o), u) in y.iter_mut().zip(o).zip(u) {
                    *y = u * o * scale;
                }
            });
        });
        let y = cpu::tensor(y, [rows * length, columns]);
        let output = cpu::tensor(output, [rows * length, width]);
        let saved = [qkvu, output].into_iter().chain(theta).collect();
        (y, saved)
    }

    /// The gradients of qkvu and θ; that of θ is empty without LRPE.
    fn run_backward(&self, saved: Vec<FlexTensor>, gradient: FlexTensor) -> (FlexTensor, FlexTensor) {
        let gradient = cpu::contiguous(gradient);
        let (qkvu, theta) = (&saved[0], saved.get(2));
        let call = Call::new(self, qkvu, theta);
        let (dy, output) = (cpu::values(&gradient), cpu::values(&saved[1]));
        let (rows, length) = (self.sequences.rows(), self.sequences.length());
        let (width, head, heads) = (call.width, call.head, call.heads);
        let columns = self.columns(width);

        // do = dy·u·s - o·c for every token: s and c first, as they take all heads.
        let factors: Vec<(f32, f32)> = (0..rows * length)
            .into_par_iter()
            .map(|token| {
                if !self.normed {
                    return (1.0, -2.0 * dy[token * columns + width]);
                }
                let norm = srms_norm::scale(call.squares(token, output), width);
                let mut sum = 0.0;
                call.each_head(token, output, |h, o| {
                    let dy = &dy[token * columns + h * head..][..head];
                    let u = call.part(token, 3, h);
                    sum += dy.iter().zip(u).zip(o).map(|((dy, u), o)| dy * u * o).sum::<f32>();
                });
                (norm.0, srms_norm::backward_factor(sum, norm, width))
            })
            .collect();

        // [B, H, 3, T, K].
        let mut dqkv = vec![0f32; rows * length * width * 3];
        let dtheta: Vec<Vec<f32>> = dqkv
            .par_chunks_mut(length * head * 3)
            .enumerate()
            .map(|(index, dqkv)| {
                let (row, h) = (index / heads, index % heads);
                let mut doutput = vec![0f32; length * head];
                let o = &output[index * length * head..][..length * head];
                let lines = doutput.chunks_exact_mut(head).zip(o.chunks_exact(head));
                for (t, (to, o)) in lines.enumerate() {
                    let token = row * length + t;
                    let (scale, factor) = factors[token];
                    let dy = &dy[token * columns + h * head..][..head];
                    let u = call.part(token, 3, h);
                    for (((to, o), dy), u) in to.iter_mut().zip(o).zip(dy).zip(u) {
                        *to = dy * u * scale - o * factor;
                    }
                }
                call.attend_backward(row, h, &doutput, dqkv)
            })
            .collect();

        let mut dqkvu = vec![0f32; rows * length * width * 4];
        dqkvu.par_chunks_mut(width * 4).enumerate().for_each(|(token, to)| {
            let (row, t) = (token / length, token % length);
            let (scale, _) = factors[token];
            call.each_head(token, output, |h, o| {
                for part in 0..3 {
                    let from = ((row * heads + h) * 3 + part) * length * head + t * head;
                    to[part * width + h * head..][..head].copy_from_slice(&dqkv[from..from + head]);
                }
                let dy = &dy[token * columns + h * head..][..head];
                let du = &mut to[3 * width + h * head..][..head];
                for ((du, o), dy) in du.iter_mut().zip(o).zip(dy) {
                    *du = dy * o * scale;
                }
            });
        });

        let mut sum = vec![0f32; if self.rotated { width } else { 0 }];
        for (index, part) in dtheta.iter().enumerate() {
            let h = index % heads;
            for (to, from) in sum[if part.is_empty() { 0..0 } else { h * head..(h + 1) * head }].iter_mut().zip(part) {
                *to += from;
            }
        }
        let columns = sum.len() / heads;
        (cpu::tensor(dqkvu, [rows * length, width * 4]), cpu::tensor(sum, [heads, columns]))
    }
}
