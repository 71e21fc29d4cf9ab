//! The form that trains: quadratic inside chunks, a state of K×V between them, all in matrix
//! products. Every operation is Burn's own, so it runs and differentiates on every device.

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::ops::sequences::Sequences;

/// Tokens of a chunk.
pub const CHUNK: usize = 64;

/// Attention of `q, k: [B, H, T, K]`, `v: [B, H, T, V]`, with `decay` the λ of every head, from
/// `state: [B, H, K, V]` on (zero without one). Gives the output `[B, H, T, V]` and the state after
/// the last token. T is positive; the last chunk may be shorter than the others.
///
/// With chunk m, its incoming state S_m and local indices i, j:
/// `o_i = exp(-λ(i+1)) q_i S_m + Σ_{j≤i} exp(-λ(i-j)) (q_i·k_j) v_j`. All S_m come from one
/// triangular product over the chunks' own sums `Σ_j exp(-λ(C-1-j)) k_jᵀ v_j`. Where a document
/// starts, the factors across it are zero.
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    decay: &[f64],
    sequences: &Sequences,
    state: Option<Tensor<4>>,
) -> (Tensor<4>, Tensor<4>) {
    let [rows, heads, length, key] = q.dims();
    let value = v.dims()[3];
    let factors = Factors::new(decay, sequences);
    let chunks = factors.chunks;
    let place = (&q.device(), q.dtype());
    let split = |x: Tensor<4>| -> Tensor<5> {
        let width = x.dims()[3];
        let padding = chunks * CHUNK - length;
        let x = match padding {
            0 => x,
            _ => Tensor::cat(vec![x, Tensor::zeros([rows, heads, padding, width], place)], 2),
        };
        x.reshape([rows, heads, chunks, CHUNK, width])
    };
    let (q, k, v) = (split(q), split(k), split(v));

    let within = factors.within(place);
    let within = q.clone().matmul(k.clone().transpose()).mul(within);
    let within = within.matmul(v.clone());

    let sums = k.mul(factors.until_end(place)).transpose().matmul(v);
    let sums: Tensor<4> = sums.reshape([rows, heads, chunks, key * value]);
    let first = match state {
        Some(state) => state.reshape([rows, heads, 1, key * value]),
        None => Tensor::zeros([rows, heads, 1, key * value], place),
    };
    // [B, H, n + 1, n + 1] × [B, H, n + 1, K·V]: the state before every chunk and after the last.
    let states = factors.between(place).matmul(Tensor::cat(vec![first, sums], 2));
    let before: Tensor<5> = states.clone().narrow(2, 0, chunks).reshape([rows, heads, chunks, key, value]);
    let last = states.narrow(2, chunks, 1).reshape([rows, heads, key, value]);

    let across = q.mul(factors.since_start(place)).matmul(before);
    let output: Tensor<4> = (within + across).reshape([rows, heads, chunks * CHUNK, value]);
    (output.narrow(2, 0, length), last)
}

/// The decays of one batch, as the tensors the chunked form multiplies with. Without packing all
/// rows share them and their first axis is 1.
struct Factors<'a> {
    decay: &'a [f64],
    sequences: &'a Sequences,
    /// Rows whose documents differ.
    rows: usize,
    chunks: usize,
}

impl<'a> Factors<'a> {
    fn new(decay: &'a [f64], sequences: &'a Sequences) -> Self {
        Self {
            decay,
            sequences,
            rows: if sequences.is_packed() { sequences.rows() } else { 1 },
            chunks: sequences.length().div_ceil(CHUNK),
        }
    }

    /// Tokens in chunk `m`.
    fn tokens(&self, m: usize) -> usize {
        CHUNK.min(self.sequences.length() - m * CHUNK)
    }

    /// Fills `[rows, H, chunks, ..line]` with `f(row, rate, chunk, line)`.
    fn fill<const D: usize>(
        &self,
        line: [usize; 2],
        place: (&Device, DType),
        f: impl Fn(&[u32], f64, usize, &mut [f64]),
    ) -> Tensor<D> {
        let size = line[0] * line[1];
        let mut values = vec![0f64; self.rows * self.decay.len() * self.chunks * size];
        for (index, line) in values.chunks_exact_mut(size).enumerate() {
            let (rest, m) = (index / self.chunks, index % self.chunks);
            let (row, head) = (rest / self.decay.len(), rest % self.decay.len());
            let from = m * CHUNK;
            let positions = &self.sequences.positions(row)[from..from + self.tokens(m)];
            f(positions, self.decay[head], m, line);
        }
        let shape = [self.rows, self.decay.len(), self.chunks, line[0], line[1]];
        Tensor::from_data(TensorData::new(values, shape), place)
    }

    /// `[.., C, C]`: exp(-λ(i-j)) for j ≤ i in the same document.
    fn within(&self, place: (&Device, DType)) -> Tensor<5> {
        self.fill([CHUNK, CHUNK], place, |positions, rate, _, line| {
            for (i, &position) in positions.iter().enumerate() {
                for j in i.saturating_sub(position as usize)..=i {
                    line[i * CHUNK + j] = (-rate * (i - j) as f64).exp();
                }
            }
        })
    }

    /// `[.., C, 1]`: exp(-λ(i+1)) where the document of i began before the chunk.
    fn since_start(&self, place: (&Device, DType)) -> Tensor<5> {
        self.fill([CHUNK, 1], place, |positions, rate, _, line| {
            for (i, &position) in positions.iter().enumerate() {
                if position as usize > i {
                    line[i] = (-rate * (i + 1) as f64).exp();
                }
            }
        })
    }

    /// `[.., C, 1]`: exp(-λ(c-1-j)) where j is in the document of the chunk's last token, c its
    /// length.
    fn until_end(&self, place: (&Device, DType)) -> Tensor<5> {
        self.fill([CHUNK, 1], place, |positions, rate, _, line| {
            let last = positions.len() - 1;
            let begin = last.saturating_sub(positions[last] as usize);
            for (j, factor) in line.iter_mut().enumerate().take(last + 1).skip(begin) {
                *factor = (-rate * (last - j) as f64).exp();
            }
        })
    }

    /// `[.., n + 1, n + 1]`: how much of the incoming state (column 0) and of the sum of chunk m
    /// (column m + 1) is left before chunk l (row l), or after the last chunk (row n).
    fn between(&self, place: (&Device, DType)) -> Tensor<4> {
        let n = self.chunks;
        let heads = self.decay.len();
        let mut values = vec![0f64; self.rows * heads * (n + 1) * (n + 1)];
        for (index, table) in values.chunks_exact_mut((n + 1) * (n + 1)).enumerate() {
            let (row, rate) = (index / heads, self.decay[index % heads]);
            let positions = self.sequences.positions(row);
            table[0] = 1.0;
            for l in 1..=n {
                // Through chunk l - 1 everything before it decays, or ends at a document.
                let (from, tokens) = ((l - 1) * CHUNK, self.tokens(l - 1));
                let ends = positions[from..from + tokens].contains(&0);
                let factor = if ends { 0.0 } else { (-rate * tokens as f64).exp() };
                let (before, after) = table.split_at_mut(l * (n + 1));
                let before = &before[(l - 1) * (n + 1)..];
                for (to, from) in after[..l].iter_mut().zip(before) {
                    *to = from * factor;
                }
                after[l] = 1.0;
            }
        }
        let shape = [self.rows, heads, n + 1, n + 1];
        Tensor::from_data(TensorData::new(values, shape), place)
    }
}
