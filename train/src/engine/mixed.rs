//! The step in bf16 on CUDA: weights, moments (unless the recipe has them in bf16) and sums of gradients in float32,
//! products and activations in bf16, nothing on the host but the order of the launches.

use burn::tensor::{Device, Tensor, TensorData};
use burn_cubecl::tensor::CubeTensor;

use super::block::{Gradients, Kept};
use super::weights::{self, ModelWeights, Sums};
use super::{Decoder, Engine, Outcome, Pending, Snapshot, failed};
use crate::batch::Rows;
use crate::config::{Moments, TrainConfig};
use crate::cuda::{self, profile};
use crate::generate::Reader;
use crate::ops::adamw::{FlatAdamW, Settings};
use crate::ops::attention::gated_cuda::Documents;
use crate::ops::cross_entropy::Head;
use crate::ops::{embedding, srms_norm};
use crate::parameters::ParameterList;
use crate::{Batch, Error};

/// Model and optimizer on one GPU.
pub struct Mixed {
    config: TrainConfig,
    optimizer: FlatAdamW,
    weights: ModelWeights,
    sums: Sums,
    /// Losses of the parts of the last step; they add up.
    losses: Vec<CubeTensor>,
    /// Steps skipped before this process.
    skipped_before: u64,
    /// A snapshot is being read: what it is read from may not change before it is done.
    reading: Option<std::sync::mpsc::Receiver<()>>,
}

impl Mixed {
    /// Why a model of these settings has no such step.
    pub(super) fn check(config: &TrainConfig) -> Result<(), String> {
        if config.sequence_length < 64 {
            return Err(format!("bf16 needs sequences of 64 tokens or more, not {}", config.sequence_length));
        }
        weights::check(&config.model)
    }

    /// The engine at `snapshot`.
    ///
    /// # Errors
    /// When a library lacks that the step needs.
    pub(super) fn new(config: &TrainConfig, device: &Device, snapshot: Snapshot) -> Result<Self, Error> {
        let libraries = cuda::libraries::find();
        if let Err(advice) = &libraries.products.found {
            return Err(Error::Device { device: format!("{device:?}"), reason: advice.clone() });
        }
        let list = ParameterList::of(&config.model);
        let Snapshot { values, first, second, taken, skipped } = snapshot;
        let place = |values: Vec<f32>| -> CubeTensor {
            let count = values.len();
            cuda::contiguous(cuda::of(Tensor::<1>::from_data(TensorData::new(values, [count]), device)))
        };
        let without_decay: Vec<_> = list.iter().filter(|p| !p.decays()).map(|p| p.range()).collect();
        let taken = u32::try_from(taken).unwrap_or(u32::MAX);
        let values = place(values);
        let moments = match (taken, config.optimizer.moments) {
            (0, moments) => FlatAdamW::zero_moments(&values, moments),
            (_, Moments::Float32) => [place(first), place(second)],
            // Exact for what was bf16.
            (_, Moments::Bf16) => [first, second].map(|moment| cuda::upload_bf16(&values.device, &moment)),
        };
        let optimizer = FlatAdamW::new(values, moments, &without_decay, taken);
        optimizer.write_working();

        let weights = ModelWeights::new(&config.model, &optimizer.working, |theta| {
            cuda::flat_view(&optimizer.values, theta.offset, theta.matrix())
        });
        let sums = Sums::new(&config.model, &optimizer.gradient);
        Ok(Self {
            config: config.clone(),
            optimizer,
            weights,
            sums,
            losses: Vec::new(),
            skipped_before: skipped,
            reading: None,
        })
    }

    /// A decoder of `rows` rows with the weights as they are; later steps change them.
    pub fn decoder(&self, rows: usize) -> Decoder {
        Decoder::of(&self.config.model, self.weights.clone(), rows, self.optimizer.values.device.clone())
    }

    /// Something on its device.
    pub fn near(&self) -> &CubeTensor {
        &self.optimizer.values
    }

    fn parts(&self, batch: &Batch) -> Result<Vec<Rows>, Error> {
        crate::model::check_ids(&batch.tokens, self.config.model.vocab_size)?;
        batch.split(self.config.batch)
    }

    /// The stream after the last block, and what every block keeps; nothing without `keep`.
    fn forward(&self, rows: &Rows, documents: &Documents, keep: bool) -> (CubeTensor, Vec<Kept>) {
        let mut x = self.weights.embed(&rows.inputs);
        let mut kept = Vec::with_capacity(self.weights.blocks.len());
        for (layer, block) in self.weights.blocks.iter().enumerate() {
            let again = !keep || self.config.activation_checkpointing.again(layer);
            let (y, of_block) = block.forward(x, documents, again);
            x = y;
            if keep {
                kept.push(of_block);
            }
        }
        (x, kept)
    }

    /// Forward and backward of one part; `share` is the factor of every row's loss.
    fn part(&mut self, rows: &Rows, share: f32) {
        profile::phase("forward");
        let documents = Documents::new(&rows.sequences, &self.optimizer.values.device);
        let (x, kept) = self.forward(rows, &documents, true);
        let hidden = srms_norm::forward_on_cuda(&x);
        profile::phase("head");
        let head = Head { targets: &rows.targets, z_loss: self.config.z_loss as f32, factor: share };
        let (dw, accumulate) = self.sums.head.next();
        let (loss, d_hidden) = head.gradients(&hidden, &self.weights.head, dw, accumulate);
        drop(hidden);
        self.losses.push(loss);
        profile::phase("backward");
        let mut dx = srms_norm::backward_on_cuda(&x, &d_hidden, None, None);
        drop((x, d_hidden));
        for ((block, sums), kept) in self.weights.blocks.iter().zip(self.sums.blocks.iter()).zip(kept).rev() {
            dx = block.backward(sums, kept, dx, &documents);
        }
        let backward = embedding::Backward::new(&rows.inputs, self.config.model.vocab_size, self.weights.scale);
        let (dw, accumulate) = self.sums.embed.next();
        backward.add(&dx, dw, accumulate);
    }

    /// Forward and backward of a whole batch, the gradient left in the optimizer's buffer.
    fn accumulate(&mut self, batch: &Batch) -> Result<(), Error> {
        let parts = self.parts(batch)?;
        let counted: usize = parts.iter().map(Rows::counted).sum();
        self.losses.clear();
        for sum in [&self.sums.embed, &self.sums.head] {
            sum.restart();
        }
        self.sums.blocks.iter().for_each(Gradients::restart);
        for rows in &parts {
            self.part(rows, 1.0 / counted.max(1) as f32);
        }
        Ok(())
    }

    /// The gradient of `batch`'s loss, in the order of the parameter list, and the loss. For tests and checks.
    ///
    /// # Errors
    /// As [`Engine::step`] and [`Engine::outcome`].
    pub fn gradient(&mut self, batch: &Batch) -> Result<(f64, Vec<f32>), Error> {
        self.accumulate(batch)?;
        let gradient = cuda::download_floats(&self.optimizer.gradient).map_err(failed)?;
        Ok((self.summed_losses(&self.losses)?, gradient))
    }

    fn summed_losses(&self, losses: &[CubeTensor]) -> Result<f64, Error> {
        let mut sum = 0.0;
        for loss in losses {
            let words = cuda::download(loss).map_err(failed)?;
            sum += f64::from(f32::from_bits(words[0]));
        }
        Ok(sum)
    }
}

impl Engine for Mixed {
    fn step(&mut self, batch: &Batch, rate: f64) -> Result<(), Error> {
        self.accumulate(batch)?;
        if let Some(reading) = self.reading.take() {
            // Ends with the sender, whether it sent or not.
            let _ = reading.recv();
        }
        profile::phase("optimizer");
        let config = &self.config.optimizer;
        self.optimizer.step(&Settings {
            rate,
            beta1: config.beta1,
            beta2: config.beta2,
            epsilon: config.epsilon,
            weight_decay: config.weight_decay,
            clip_norm: config.clip_norm,
        });
        Ok(())
    }

    fn outcome(&mut self) -> Result<Outcome, Error> {
        let loss = self.summed_losses(&self.losses)?;
        let taken = self.optimizer.taken().map_err(failed)?;
        Ok(Outcome {
            loss,
            grad_norm: f64::from(taken.norm),
            skipped: self.skipped_before + u64::from(taken.skipped),
            skipped_last: u64::from(taken.skipped_last),
        })
    }

    fn is_synchronous(&self) -> bool {
        false
    }

    fn loss(&self, batch: &Batch) -> Result<f64, Error> {
        profile::phase("evaluation");
        let parts = self.parts(batch)?;
        let counted: usize = parts.iter().map(Rows::counted).sum();
        let mut losses = Vec::with_capacity(parts.len());
        for rows in &parts {
            let documents = Documents::new(&rows.sequences, &self.optimizer.values.device);
            let (x, _) = self.forward(rows, &documents, false);
            let hidden = srms_norm::forward_on_cuda(&x);
            let head = Head { targets: &rows.targets, z_loss: 0.0, factor: 1.0 / counted.max(1) as f32 };
            losses.push(head.loss(&hidden, &self.weights.head));
        }
        self.summed_losses(&losses)
    }

    fn reader(&self) -> Box<dyn Reader + '_> {
        profile::phase("sample");
        Box::new(self.decoder(1))
    }

    fn record(&mut self) {
        profile::start();
    }

    fn recorded(&mut self) -> Result<Vec<profile::Span>, Error> {
        profile::stop(self.near()).map_err(failed)
    }

    fn memory_bytes(&self) -> Option<u64> {
        cuda::memory(self.near()).ok().map(|memory| memory.total - memory.free)
    }

    fn peak_flops(&self) -> Option<f64> {
        cuda::facts_of(self.near()).peak_bf16_flops()
    }

    fn snapshot(&mut self) -> Result<Pending, Error> {
        let taken = self.optimizer.taken().map_err(failed)?;
        let buffers = [&self.optimizer.values, &self.optimizer.first, &self.optimizer.second].map(CubeTensor::clone);
        let skipped = self.skipped_before + u64::from(taken.skipped);
        let (done, reading) = std::sync::mpsc::channel();
        self.reading = Some(reading);
        Ok(Box::new(move || {
            let [values, first, second] = buffers.each_ref().map(read_back);
            drop(done);
            let (values, first, second) = (values?, first?, second?);
            Ok(Snapshot { values, first, second, taken: u64::from(taken.steps), skipped })
        }))
    }
}

/// Values that are read back at once: what the way through pinned memory takes.
const PIECE: usize = 1 << 26;

fn read_back(buffer: &CubeTensor) -> Result<Vec<f32>, Error> {
    let count = buffer.meta.shape()[0];
    let mut values = Vec::with_capacity(count);
    for begin in (0..count).step_by(PIECE) {
        let piece = cuda::flat_view(buffer, begin, [PIECE.min(count - begin)]);
        values.extend(cuda::download_floats(&piece).map_err(failed)?);
    }
    Ok(values)
}
