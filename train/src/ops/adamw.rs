//! AdamW (arXiv 1711.05101) over flat buffers on a CUDA device: global norm, clipping, the check
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

/// What the steps of AdamW share, on whatever buffers they are taken: settings, counts and the norm.
#[derive(Clone, Debug)]
pub struct Steps {
    /// `Control` in `adamw.cu`.
    control: CubeTensor,
    partials: CubeTensor,
    bounds: CubeTensor,
    bound_count: u32,
}

/// Consecutive weights and what belongs to them: contiguous buffers of one length.
#[derive(Clone, Debug)]
pub struct Stretch {
    /// The weights in float32.
    pub values: CubeTensor,
    /// The first moments, float32 or bf16.
    pub first: CubeTensor,
    /// The second moments, of the type of the first.
    pub second: CubeTensor,
    /// The gradient, float32 or bf16.
    pub gradient: CubeTensor,
    /// The weights in bf16, which a step writes.
    pub working: CubeTensor,
    /// Number of the first weight among all.
    pub origin: usize,
}

impl Steps {
    /// Of an optimizer on the device of `near` that has taken `steps` steps. Weights whose numbers are in `without_decay`,
    /// ascending and apart, do not decay.
    pub fn new(near: &CubeTensor, without_decay: &[Range<usize>], steps: u32) -> Self {
        let mut bounds: Vec<u32> = Vec::new();
        for bound in without_decay.iter().flat_map(|range| [range.start as u64, range.end as u64]) {
            bounds.extend([bound as u32, (bound >> 32) as u32]);
        }
        let bound_count = bounds.len() as u32 / 2;
        // A buffer of no bytes has no address.
        bounds.resize(bounds.len().max(2), 0);
        Self {
            control: control(&near.device, steps),
            partials: cuda::empty(near, [PARTS], DType::F64),
            bounds: cuda::upload(&near.device, &bounds),
            bound_count,
        }
    }

    /// Begins a step: adds up the squares of `gradients`, which are all that this device has.
    pub fn sum_squares<'a>(&self, gradients: impl IntoIterator<Item = &'a CubeTensor>) {
        let mut work = Work::near(&self.control);
        let mut add = 0;
        for gradient in gradients {
            let count = gradient.meta.shape().num_elements();
            let arguments =
                [cuda::read(gradient), cuda::update(&self.partials), cuda::u32(add), cuda::u64(count as u64)];
            let entry = if gradient.dtype == DType::BF16 { "square_sums_bf16" } else { "square_sums" };
            work.launch(&Kernel::new(&SOURCE, entry), Grid::new(PARTS as u32, 512), &arguments);
            add = 1;
        }
        if add == 0 {
            work.zero(&self.partials);
        }
        work.submit();
    }

    /// The sums of squares, which add up to the square of the norm: `[1024]` in float64. Where other devices have other
    /// gradients, theirs are added before [`Steps::decide`].
    pub fn partials(&self) -> &CubeTensor {
        &self.partials
    }

    /// Decides from the sums of squares whether the step is taken, and with what factors.
    pub fn decide(&self, settings: &Settings) {
        let mut work = Work::near(&self.control);
        let arguments = [
            cuda::read(&self.partials),
            cuda::update(&self.control),
            cuda::f32(settings.clip_norm as f32),
            cuda::f32(settings.rate as f32),
            cuda::f32(settings.beta1 as f32),
            cuda::f32(settings.beta2 as f32),
        ];
        work.launch(&Kernel::new(&SOURCE, "adamw_control"), Grid::new(1, PARTS as u32), &arguments);
        work.submit();
    }

    /// Takes the step that was decided on these weights. Changes nothing where the norm was not finite. Moments in bf16 are
    /// rounded to one of their two neighbours by chance, so that their mean stays what it is in float32; the chance
    /// follows from the weight's number and the step.
    pub fn update(&self, stretch: &Stretch, settings: &Settings) {
        let count = stretch.values.meta.shape().num_elements();
        let arguments = [
            cuda::update(&stretch.values),
            cuda::update(&stretch.first),
            cuda::update(&stretch.second),
            cuda::read(&stretch.gradient),
            cuda::write(&stretch.working),
            cuda::read(&self.control),
            cuda::read(&self.bounds),
            cuda::u32(self.bound_count),
            cuda::f32(settings.beta1 as f32),
            cuda::f32(settings.beta2 as f32),
            cuda::f32(settings.epsilon as f32),
            cuda::f32((settings.rate * settings.weight_decay) as f32),
            cuda::u64(stretch.origin as u64),
            cuda::u64(count as u64),
        ];
        let entry = match (stretch.first.dtype, stretch.gradient.dtype) {
            (DType::BF16, DType::BF16) => "adamw_bf16_moments_and_gradient",
            (DType::BF16, _) => "adamw_bf16_moments",
            (_, DType::BF16) => "adamw_bf16_gradient",
            _ => "adamw",
        };
        let mut work = Work::near(&self.control);
        work.launch(&Kernel::new(&SOURCE, entry), grid(count), &arguments);
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

/// Writes the float32 `values` to `working`, rounded to bf16. Both are contiguous and of one length.
pub fn narrow(values: &CubeTensor, working: &CubeTensor) {
    convert("write_working", values, working);
}

/// Writes the values of `narrow`, in bf16, to the float32 `to`. Both are contiguous and of one length.
pub fn widen(narrow: &CubeTensor, to: &CubeTensor) {
    convert("widen", narrow, to);
}

fn convert(entry: &'static str, from: &CubeTensor, to: &CubeTensor) {
    let count = from.meta.shape().num_elements();
    assert!(to.meta.shape().num_elements() == count, "{entry} of {count} values to {to:?}");
    let mut work = Work::near(from);
    let arguments = [cuda::read(from), cuda::write(to), cuda::u64(count as u64)];
    work.launch(&Kernel::new(&SOURCE, entry), grid(count), &arguments);
    work.submit();
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
    steps: Steps,
}

/// Moments before the first step of `values`, a flat buffer.
pub fn zero_moments(values: &CubeTensor, moments: Moments) -> [CubeTensor; 2] {
    let dtype = match moments {
        Moments::Float32 => DType::F32,
        Moments::Bf16 => DType::BF16,
    };
    let zeros = [0; 2].map(|_| cuda::lasting(values, [values.meta.shape()[0]], dtype));
    let mut work = Work::near(values);
    zeros.iter().for_each(|buffer| work.zero(buffer));
    work.submit();
    zeros
}

impl FlatAdamW {
    /// `values`, a contiguous float32 buffer, and its moments, both in float32 or both in bf16, after `steps` steps.
    /// Weights in `without_decay`, ascending and apart, do not decay. The bf16 copy is made by the first step or by
    /// [`FlatAdamW::write_working`].
    ///
    /// # Panics
    /// When they are not such buffers.
    pub fn new(values: CubeTensor, moments: [CubeTensor; 2], without_decay: &[Range<usize>], steps: u32) -> Self {
        let shape = values.meta.shape();
        assert!(shape.num_dims() == 1 && values.dtype == DType::F32, "no flat buffer: {values:?}");
        let count = shape[0];
        let [first, second] = moments;
        let fits = |buffer: &CubeTensor| buffer.meta.shape() == shape && cuda::is_contiguous(buffer);
        assert!(fits(&first) && fits(&second) && first.dtype == second.dtype, "no moments: {first:?} {second:?}");
        Self {
            gradient: cuda::empty(&values, [count], DType::F32),
            working: cuda::empty(&values, [count], DType::BF16),
            steps: Steps::new(&values, without_decay, steps),
            first,
            second,
            values,
        }
    }

    /// Takes a step with the gradient in its buffer. When the norm of that is not finite, nothing
    /// changes but the counts.
    pub fn step(&self, settings: &Settings) {
        self.steps.sum_squares([&self.gradient]);
        self.steps.decide(settings);
        let stretch = Stretch {
            values: self.values.clone(),
            first: self.first.clone(),
            second: self.second.clone(),
            gradient: self.gradient.clone(),
            working: self.working.clone(),
            origin: 0,
        };
        self.steps.update(&stretch, settings);
    }

    /// Makes the bf16 copy from the weights.
    pub fn write_working(&self) {
        narrow(&self.values, &self.working);
    }

    /// What became of the last step. Waits for the device.
    ///
    /// # Errors
    /// When work on the device has failed.
    pub fn taken(&self) -> Result<Taken, cuda::Error> {
        self.steps.taken()
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
        let config = ModelConfig { linear_use_lrpe_list: vec![1, 1], ..ModelConfig::smallest() };
        let mut model = Model::new(&config, 3, &Device::flex()).unwrap();
        let list = model.parameters().clone();
        let kept: Vec<Range<usize>> = list.iter().filter(|p| !p.decays()).map(|p| p.range()).collect();
        let on_device = |values: Vec<f32>| {
            let count = values.len();
            cuda::of(Tensor::<1>::from_data(burn::tensor::TensorData::new(values, [count]), &device))
        };
        let values = on_device(model.values());
        let state = FlatAdamW::new(values.clone(), zero_moments(&values, Moments::Float32), &kept, 0);
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
