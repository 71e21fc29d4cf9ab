//! Generation in bf16 on CUDA: a prompt is read by the chunked kernel, then every token takes the same time and memory,
//! however many came before.

use burn::tensor::{DType, Device};
use burn_cubecl::CubeDevice;
use burn_cubecl::tensor::CubeTensor;

use super::block::Weights;
use super::weights::{self, ModelWeights};
use crate::Error;
use crate::config::ModelConfig;
use crate::cuda::{self, Grid, Kernel, Product, Source, Work};
use crate::ops::attention::gated_cuda::{Documents, Mixer};
use crate::ops::sequences::Sequences;
use crate::ops::{is_cuda, srms_norm};

pub(crate) static SOURCE: Source = Source { name: "recurrent.cu", text: include_str!("../kernels/recurrent.cu") };

/// Tokens of a prompt that are read at once: memory does not grow with its length.
const WINDOW: usize = 1 << 13;
/// Fewer than these are read one by one: the chunked kernel takes no shorter row.
const CHUNK: usize = 64;

/// Rows of text that are continued together, each at its own position.
pub struct Decoder {
    model: ModelConfig,
    weights: ModelWeights,
    device: CubeDevice,
    /// Of every layer: `[rows, H, K, V]` in float32, 2K with LRPE.
    states: Vec<CubeTensor>,
    /// Tokens read of every row.
    positions: Vec<u32>,
}

impl Decoder {
    /// `rows` rows that have read nothing, for the parameters `values` in the order of the parameter list.
    ///
    /// # Errors
    /// [`Error::Config`] when the sizes have no form in bf16, [`Error::Device`] when `device` is no CUDA device or a library
    /// lacks.
    pub fn new(model: &ModelConfig, values: &[f32], rows: usize, device: &Device) -> Result<Self, Error> {
        let refused = |reason: String| Error::Device { device: format!("{device:?}"), reason };
        if !is_cuda(device) {
            return Err(refused("bf16 needs a CUDA device".to_owned()));
        }
        weights::check(model).map_err(|reason| Error::config("model", reason))?;
        cuda::libraries::find().products.found.clone().map_err(refused)?;
        let place = cuda::of(burn::tensor::Tensor::<1>::zeros([8], device)).device;
        let weights = ModelWeights::upload(model, values, &place);
        Ok(Self::of(model, weights, rows, place))
    }

    pub(super) fn of(model: &ModelConfig, weights: ModelWeights, rows: usize, device: CubeDevice) -> Self {
        let (heads, width) = (model.decoder_attention_heads, model.head_dim());
        let states = weights.blocks.iter().map(|block| {
            let features = if block.theta.is_some() { 2 * width } else { width };
            cuda::empty(&weights.head, [rows, heads, features, width], DType::F32)
        });
        let states: Vec<CubeTensor> = states.collect();
        let mut work = Work::near(&weights.head);
        states.iter().for_each(|state| work.zero(state));
        work.submit();
        Self { model: model.clone(), states, weights, device, positions: vec![0; rows] }
    }

    /// Forgets all that was read.
    pub fn restart(&mut self) {
        let mut work = Work::near(&self.weights.head);
        self.states.iter().for_each(|state| work.zero(state));
        work.submit();
        self.positions.fill(0);
    }

    /// The sizes of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.model
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.positions.len()
    }

    /// Bytes of the states of all rows.
    pub fn state_bytes(&self) -> usize {
        self.states.iter().map(|state| 4 * state.meta.shape().num_elements()).sum()
    }

    /// Bytes of the device's memory that are taken, by anyone, where that can be told.
    pub fn memory_bytes(&self) -> Option<u64> {
        cuda::memory(&self.weights.head).ok().map(|memory| memory.total - memory.free)
    }

    /// Reads `ids` as the next tokens of row `row` alone; the logits after the last of them.
    ///
    /// # Errors
    /// [`Error::Input`] when there are no ids or one is not below the vocabulary size; when the device has failed.
    pub fn read(&mut self, row: usize, ids: &[u32]) -> Result<Vec<f32>, Error> {
        crate::model::check_ids(ids, self.model.vocab_size)?;
        let near = self.weights.head.clone();
        let mut last = None;
        let mut rest = ids;
        while !rest.is_empty() {
            let count = if rest.len() < CHUNK { 1 } else { rest.len().min(WINDOW) };
            let (window, after) = rest.split_at(count);
            let mut logits_after = || {
                let hidden = self.window(row, window);
                after.is_empty().then(|| self.logits(&hidden))
            };
            last = Some(match window {
                // Its tensors are small, its launches many.
                [_] => cuda::together(&near, logits_after),
                _ => logits_after(),
            });
            rest = after;
        }
        match last.flatten() {
            Some(logits) => read(&logits),
            None => Err(Error::Input("no tokens to read".to_owned())),
        }
    }

    /// Reads one token of every row; the logits after each, row after row.
    ///
    /// # Errors
    /// As [`Decoder::read`], and when there is not one id for every row.
    pub fn step(&mut self, ids: &[u32]) -> Result<Vec<f32>, Error> {
        crate::model::check_ids(ids, self.model.vocab_size)?;
        if ids.len() != self.rows() {
            return Err(Error::Input(format!("{} tokens for {} rows", ids.len(), self.rows())));
        }
        let positions = cuda::upload(&self.device, &self.positions);
        let logits = cuda::together(&positions, || {
            let mut x = self.weights.embed(ids);
            for (block, state) in self.weights.blocks.iter().zip(&self.states) {
                x = block.forward_with(&x, |projected| recurrent(block, projected, &positions, state));
            }
            self.logits(&x)
        });
        self.positions.iter_mut().for_each(|position| *position += 1);
        read(&logits)
    }

    /// The last row of the stream after one window of one row.
    fn window(&mut self, row: usize, ids: &[u32]) -> CubeTensor {
        let offset = self.positions[row] as usize;
        let of_row = |state: &CubeTensor| {
            let shape = state.meta.shape();
            let [heads, keys, values] = [shape[1], shape[2], shape[3]];
            cuda::flat_view(state, row * heads * keys * values, [1, heads, keys, values])
        };
        let mut x = self.weights.embed(ids);
        if ids.len() == 1 {
            let positions = cuda::upload(&self.device, &[offset as u32]);
            for (block, state) in self.weights.blocks.iter().zip(&self.states) {
                x = block.forward_with(&x, |projected| recurrent(block, projected, &positions, &of_row(state)));
            }
        } else {
            let documents = Documents::new(&Sequences::continued(1, ids.len(), offset), &self.device);
            for (block, state) in self.weights.blocks.iter().zip(&self.states) {
                let mixer = Mixer { decay: block.decay.clone(), heads: block.heads, documents: documents.clone() };
                let before = of_row(state);
                let after = cuda::empty_like(&before);
                x = block.forward_with(&x, |projected| {
                    mixer.attend(projected, block.theta.as_ref(), Some(&before), Some(&after))
                });
                let mut work = Work::near(&x);
                work.copy(&after, &before);
                work.submit();
            }
        }
        self.positions[row] += ids.len() as u32;
        cuda::row_range(&x, ids.len() - 1, 1)
    }

    /// The logits of rows of the stream after the last block, in float32.
    fn logits(&self, x: &CubeTensor) -> CubeTensor {
        let ([rows, _], _) = cuda::rows(x);
        let hidden = srms_norm::forward_on_cuda(x);
        let logits = cuda::empty(x, [rows, self.model.vocab_size], DType::F32);
        let mut work = Work::near(x);
        work.product(&Product::new(&hidden, &self.weights.head, &logits).transpose_b());
        work.submit();
        logits
    }
}

/// The values of a float32 buffer. Waits for the device.
fn read(buffer: &CubeTensor) -> Result<Vec<f32>, Error> {
    let words = cuda::download(buffer).map_err(super::failed)?;
    Ok(words.into_iter().map(f32::from_bits).collect())
}

/// The attention's output for one token of every row, which goes into the state.
fn recurrent(block: &Weights, projected: &CubeTensor, positions: &CubeTensor, state: &CubeTensor) -> CubeTensor {
    let ([rows, width], stride) = cuda::rows(projected);
    let width = width / 4;
    let head = width / block.heads;
    let o = cuda::empty(projected, [rows, width], DType::BF16);
    let rotated = block.theta.is_some();
    let kernel = Kernel::new(&SOURCE, "recurrent_step").define("HEAD", head as i64).define("ROTATED", rotated);
    let grid = Grid::new(1, 256).blocks([head.div_ceil(32) as u32, block.heads as u32, rows as u32]);
    let arguments = [
        cuda::view(projected),
        cuda::i64(stride as i64),
        block.theta.as_ref().map_or_else(cuda::absent, cuda::read),
        cuda::read(positions),
        cuda::read(&block.decay),
        cuda::update(state),
        cuda::write(&o),
        cuda::i32(block.heads as i32),
    ];
    let mut work = Work::near(projected);
    work.launch(&kernel, grid, &arguments);
    work.submit();
    o
}
