//! AdamW (arXiv 1711.05101) over one flat buffer on a CUDA device: global norm, clipping, the check
//! that the gradient is a number, the update and the bf16 copy of the weights, in three launches and
//! without a word from the host.
//!
//! The twin on the CPU is [`crate::optimizer`].

use std::ops::Range;

use burn::tensor::DType;
use burn_cubecl::CubeDevice;
use burn_cubecl::tensor::CubeTensor;

use crate::config::Moments;
use crate::cuda::{self, Grid, Kernel, Source, Work};

pub(crate) static SOURCE: Source = Source { name: "adamw.cu", text: include_str!("../kernels/adamw.cu") };

/// Blocks that add up squares, `PARTS` in `adamw.cu`.
const PARTS: usize = 1024;

/// Settings of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Learning rate.
    pub rate: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Times the learning rate: what a weight that decays loses of itself.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; 0 is no limit.
    pub clip_norm: f64,
}

/// What is known after a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Taken {
    /// Global norm of the last gradient before clipping, finite or not.
    pub norm: f32,
    /// Whether the last step was taken: its norm was finite.
    pub finite: bool,
    /// Steps taken.
    pub steps: u32,
    /// Steps not taken, since the gradient was no number.
    pub skipped: u32,
    /// Those since the last step that was taken.
    pub skipped_last: u32,
}

/// The buffers of all weights and their optimizer. All are contiguous and of one length.
#[derive(Clone, Debug)]
pub struct FlatAdamW {
    /// The weights in float32.
    pub values: CubeTensor,
    /// The first moments, float32 or bf16.
    pub first: CubeTensor,
    /// The second moments, of the type of the first.
    pub second: CubeTensor,
    /// Where the gradient is put before a step, float32.
    pub gradient: CubeTensor,
    /// The weights in bf16, written by every step.
    pub working: CubeTensor,
    /// `Control` in `adamw.cu`.
    control: CubeTensor,
    partials: CubeTensor,
    bounds: CubeTensor,
    bound_count: u32,
}

impl FlatAdamW {
    /// Moments before the first step of `values`.
    pub fn zero_moments(values: &CubeTensor, moments: Moments) -> [CubeTensor; 2] {
        let dtype = match moments {
            Moments::Float32 => DType::F32,
            Moments::Bf16 => DType::BF16,
        };
        let zeros = [0; 2].map(|_| cuda::empty(values, [values.meta.shape()[0]], dtype));
        let mut work = Work::near(values);
        zeros.iter().for_each(|buffer| work.zero(buffer));
        work.submit();
        zeros
    }

    /// `values`, a contiguous float32 buffer, and its moments, both in float32 or both in bf16, after `steps` steps.
    /// Weights in `without_decay`, ascending and apart, do not decay. Moments in bf16 are rounded to one of their two
    /// neighbours by chance, so that their mean stays what it is in float32. The bf16 copy is made by the first
    /// step or by [`FlatAdamW::write_working`].
    ///
    /// # Panics
    /// When they are not such buffers.
    pub fn new(values: CubeTensor, moments: [CubeTensor; 2], without_decay: &[Range<usize>], steps: u32) -> Self {
        let shape = values.meta.shape();
        assert!(shape.num_dims() == 1 && values.dtype == DType::F32, "no flat buffer: {values:?}");
        let count = shape[0];
        let mut bounds: Vec<u32> = Vec::new();
        for bound in without_decay.iter().flat_map(|range| [range.start as u64, range.end as u64]) {
            bounds.extend([bound as u32, (bound >> 32) as u32]);
        }
        let bound_count = bounds.len() as u32 / 2;
        // A buffer of no bytes has no address.
        bounds.resize(bounds.len().max(2), 0);
        let device = values.device.clone();
        let [first, second] = moments;
        let fits = |buffer: &CubeTensor| buffer.meta.shape() == shape && cuda::is_contiguous(buffer);
        assert!(fits(&first) && fits(&second) && first.dtype == second.dtype, "no moments: {first:?} {second:?}");
        Self {
            gradient: cuda::empty(&values, [count], DType::F32),
            working: cuda::empty(&values, [count], DType::BF16),
            control: control(&device, steps),
            partials: cuda::empty(&values, [PARTS], DType::F64),
            bounds: cuda::upload(&device, &bounds),
            bound_count,
            first,
            second,
            values,
        }
    }

    fn count(&self) -> usize {
        self.values.meta.shape()[0]
    }

    /// Takes a step with the gradient in its buffer. When the norm of that is not finite, nothing
    /// changes but the counts.
    pub fn step(&self, settings: &Settings) {
        let count = self.count();
        let (beta1, beta2) = (settings.beta1 as f32, settings.beta2 as f32);
        let mut work = Work::near(&self.values);
        let arguments = [cuda::read(&self.gradient), cuda::write(&self.partials), cuda::u64(count as u64)];
        work.launch(&Kernel::new(&SOURCE, "square_sums"), Grid::new(PARTS as u32, 512), &arguments);
        let arguments = [
            cuda::read(&self.partials),
            cuda::update(&self.control),
            cuda::f32(settings.clip_norm as f32),
            cuda::f32(settings.rate as f32),
            cuda::f32(beta1),
            cuda::f32(beta2),
        ];
        work.launch(&Kernel::new(&SOURCE, "adamw_control"), Grid::new(1, PARTS as u32), &arguments);
        let arguments = [
            cuda::update(&self.values),
            cuda::update(&self.first),
            cuda::update(&self.second),
            cuda::read(&self.gradient),
            cuda::write(&self.working),
            cuda::read(&self.control),
            cuda::read(&self.bounds),
            cuda::u32(self.bound_count),
            cuda::f32(beta1),
            cuda::f32(beta2),
            cuda::f32(settings.epsilon as f32),
            cuda::f32((settings.rate * settings.weight_decay) as f32),
            cuda::u64(count as u64),
        ];
        let entry = if self.first.dtype == DType::BF16 { "adamw_bf16_moments" } else { "adamw" };
        work.launch(&Kernel::new(&SOURCE, entry), grid(count), &arguments);
        work.submit();
    }

    /// Makes the bf16 copy from the weights.
    pub fn write_working(&self) {
        let mut work = Work::near(&self.values);
        let count = self.count();
        let arguments = [cuda::read(&self.values), cuda::write(&self.working), cuda::u64(count as u64)];
        work.launch(&Kernel::new(&SOURCE, "write_working"), grid(count), &arguments);
        work.submit();
    }

    /// What became of the last step. Waits for the device.
    ///
    /// # Errors
    /// When work on the device has failed.
    pub fn taken(&self) -> Result<Taken, cuda::Error> {
        let words = cuda::download(&self.control)?;
        let [norm, _, _, _, finite, steps, skipped, skipped_last] = words[..] else {
            unreachable!("the control block has eight words")
        };
        Ok(Taken { norm: f32::from_bits(norm), finite: finite != 0, steps, skipped, skipped_last })
    }
}

/// A thread for every four values.
fn grid(count: usize) -> Grid {
    Grid::new(count.div_ceil(1024) as u32, 256)
}

fn control(device: &CubeDevice, steps: u32) -> CubeTensor {
    cuda::upload(device, &[0, 0, 0, 0, 0, steps, 0, 0])
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use super::*;
    use crate::Model;
    use crate::config::{ModelConfig, OptimizerConfig};
    use crate::ops::testing::{assert_close_on_cuda, cuda_device, random};
    use crate::optimizer::AdamW;

    #[test]
    fn cuda_form_equals_the_optimizer_of_the_cpu() {
        let Some(device) = cuda_device("adamw") else { return };
        // Sizes with angles of LRPE in the middle, which do not decay.
        let config = ModelConfig {
            vocab_size: 30,
            decoder_embed_dim: 8,
            decoder_layers: 2,
            decoder_attention_heads: 2,
            hidden_dim: 8,
            glu_dim: 12,
            linear_use_lrpe_list: vec![1, 1],
            ..ModelConfig::default()
        };
        let mut model = Model::new(&config, 3, &Device::flex()).unwrap();
        let list = model.parameters().clone();
        let kept: Vec<Range<usize>> = list.iter().filter(|p| !p.decays()).map(|p| p.range()).collect();
        let on_device = |values: Vec<f32>| {
            let count = values.len();
            cuda::of(Tensor::<1>::from_data(burn::tensor::TensorData::new(values, [count]), &device))
        };
        let values = on_device(model.values());
        let state = FlatAdamW::new(values.clone(), FlatAdamW::zero_moments(&values, Moments::Float32), &kept, 0);
        let settings = OptimizerConfig { clip_norm: 0.5, ..OptimizerConfig::default() };
        let mut optimizer = AdamW::new(&settings, &model);
        for (step, rate) in [0.01, 0.02, f64::NAN, 0.005].into_iter().enumerate() {
            let bad = rate.is_nan();
            let gradients: Vec<Tensor<2>> = list
                .iter()
                .enumerate()
                .map(|(index, parameter)| {
                    let gradient = random(parameter.matrix(), (100 * step + index) as u64);
                    if bad { gradient / 0.0 } else { gradient }
                })
                .collect();
            let flat: Vec<f32> = gradients.iter().flat_map(|g| g.clone().try_into_vec_as::<f32>().unwrap()).collect();
            let rate = if bad { 0.01 } else { rate };
            optimizer.step(&mut model, gradients, rate);
            let mut work = Work::near(&state.values);
            work.copy(&on_device(flat), &state.gradient);
            work.submit();
            state.step(&Settings {
                rate,
                beta1: settings.beta1,
                beta2: settings.beta2,
                epsilon: settings.epsilon,
                weight_decay: settings.weight_decay,
                clip_norm: settings.clip_norm,
            });
            assert_eq!(state.taken().unwrap().finite, !bad);
        }
        let taken = state.taken().unwrap();
        assert_eq!((taken.steps, taken.skipped, taken.skipped_last), (3, 1, 0));
        let count = list.total();
        let want = Tensor::<1>::from_data(burn::tensor::TensorData::new(model.values(), [count]), &Device::flex());
        assert_close_on_cuda("values", cuda::to_tensor::<1>(state.values.clone()), want.clone(), 1e-6);
        assert_close_on_cuda("bf16 copy", cuda::to_tensor::<1>(state.working.clone()), want, 3e-3);
    }
}
