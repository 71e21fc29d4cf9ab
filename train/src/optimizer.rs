//! AdamW over the flat buffer, with clipping by the global norm.

use burn::backend::Flex;
use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;

use crate::Model;
use crate::config::OptimizerConfig;
use crate::model::read;
use crate::ops::{cpu, is_flex};
use crate::parallel::CHUNK;
use crate::parameters::ParameterList;

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101): moments in float32, decay of matrices only.
#[derive(Debug)]
pub struct AdamW {
    config: OptimizerConfig,
    /// Steps taken.
    steps: u64,
    first: Tensor<1>,
    second: Tensor<1>,
    /// 1 where a value decays, else 0; only where the step is made of tensor primitives.
    decays: Option<Tensor<1>>,
}

/// The factors of one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factors {
    /// Of the gradient: clipping.
    clip: f32,
    beta1: f32,
    beta2: f32,
    /// Learning rate over the bias correction of the first moment.
    rate: f32,
    /// 1 over the root of the bias correction of the second moment.
    root: f32,
    epsilon: f32,
    /// Learning rate times weight decay.
    decay: f32,
}

impl Factors {
    /// Of step `step`, counted from 1, for a gradient of this norm; nothing when it is not finite.
    pub(crate) fn new(config: &OptimizerConfig, step: u64, norm: f64, rate: f64) -> Option<Self> {
        if !norm.is_finite() {
            return None;
        }
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        let clip = match config.clip_norm {
            limit if limit > 0.0 && norm > limit => limit / norm,
            _ => 1.0,
        };
        Some(Self {
            clip: clip as f32,
            beta1: config.beta1 as f32,
            beta2: config.beta2 as f32,
            rate: (rate / correction(config.beta1)) as f32,
            root: (1.0 / correction(config.beta2).sqrt()) as f32,
            epsilon: config.epsilon as f32,
            decay: (rate * config.weight_decay) as f32,
        })
    }

    /// Changes `values` and their moments with `gradient`; `decays` says whether they lose a share of themselves.
    pub(crate) fn update(&self, values: &mut [f32], [first, second]: [&mut [f32]; 2], gradient: &[f32], decays: bool) {
        let factors = *self;
        let keep = if decays { 1.0 - factors.decay } else { 1.0 };
        values
            .par_chunks_mut(TASK)
            .zip(first.par_chunks_mut(TASK))
            .zip(second.par_chunks_mut(TASK))
            .zip(gradient.par_chunks(TASK))
            .for_each(|(((values, first), second), gradient)| {
                let moments = first.iter_mut().zip(second);
                for ((value, (m, v)), gradient) in values.iter_mut().zip(moments).zip(gradient) {
                    let gradient = gradient * factors.clip;
                    *m = factors.beta1 * *m + (1.0 - factors.beta1) * gradient;
                    *v = factors.beta2 * *v + (1.0 - factors.beta2) * gradient * gradient;
                    let root = v.sqrt() * factors.root + factors.epsilon;
                    *value = *value * keep - factors.rate * *m / root;
                }
            });
    }
}

/// Values that one task takes: fixed, so that sums do not depend on the number of threads.
const TASK: usize = 1 << 14;

impl AdamW {
    /// An optimizer that has taken no step.
    pub fn new(config: &OptimizerConfig, model: &Model) -> Self {
        let zeros = vec![0f32; model.parameters().total()];
        Self::with_state(config, model, 0, zeros.clone(), zeros)
    }

    /// An optimizer that has taken `steps` steps and holds the given moments.
    pub(crate) fn with_state(
        config: &OptimizerConfig,
        model: &Model,
        steps: u64,
        first: Vec<f32>,
        second: Vec<f32>,
    ) -> Self {
        let device = model.device();
        let place = |values: Vec<f32>| {
            let shape = [values.len()];
            Tensor::from_data(TensorData::new(values, shape), &device)
        };
        let decays = (!is_flex(&device)).then(|| {
            let mut decays = vec![0f32; model.parameters().total()];
            for parameter in model.parameters().iter().filter(|p| p.decays()) {
                decays[parameter.range()].fill(1.0);
            }
            place(decays)
        });
        Self { config: config.clone(), steps, first: place(first), second: place(second), decays }
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The first and the second moment of every parameter, in the order of the list.
    pub fn moments(&self) -> [Vec<f32>; 2] {
        [read(self.first.clone()), read(self.second.clone())]
    }

    /// Takes one step with `gradients`, one tensor for every parameter in the order of the list.
    /// Gives their global norm before clipping; when that is not finite, nothing changes.
    pub fn step(&mut self, model: &mut Model, gradients: Vec<Tensor<2>>, rate: f64) -> f64 {
        if self.decays.is_some() {
            return self.step_composed(model, gradients, rate);
        }
        let gradients: Vec<_> = gradients
            .into_iter()
            .map(|gradient| {
                let gradient = gradient.try_into_primitive::<Flex>();
                cpu::contiguous(gradient.unwrap_or_else(|error| unreachable!("{error:?}")))
            })
            .collect();
        let norm = gradients.iter().map(|gradient| square_sums(cpu::values(gradient)).iter().sum::<f64>());
        let norm = norm.sum::<f64>().sqrt();
        let Some(factors) = self.factors(norm, rate) else {
            return norm;
        };
        let list = model.parameters().clone();
        let mut buffers = [model.flat_mut(), &mut self.first, &mut self.second].map(|tensor| {
            let buffer = tensor.extract().try_into_primitive::<Flex>();
            buffer.unwrap_or_else(|error| unreachable!("{error:?}"))
        });
        let [values, first, second] = buffers.each_mut().map(|buffer| buffer.storage_mut::<f32>());
        update(&list, &gradients, values, first, second, factors);
        let [values, first, second] = buffers.map(Tensor::from_primitive::<Flex>);
        *model.flat_mut() = values;
        (self.first, self.second) = (first, second);
        norm
    }

    /// Counts the step and gives its factors; nothing when the norm is not finite.
    fn factors(&mut self, norm: f64, rate: f64) -> Option<Factors> {
        let factors = Factors::new(&self.config, self.steps + 1, norm, rate)?;
        self.steps += 1;
        Some(factors)
    }

    /// The step of tensor primitives over the whole flat buffer.
    fn step_composed(&mut self, model: &mut Model, gradients: Vec<Tensor<2>>, rate: f64) -> f64 {
        let flatten = |gradient: Tensor<2>| {
            let [rows, columns] = gradient.dims();
            gradient.reshape([rows * columns])
        };
        let gradient = Tensor::cat(gradients.into_iter().map(flatten).collect(), 0);
        let norm: f32 = gradient.clone().square().sum().sqrt().into_scalar();
        let norm = f64::from(norm);
        let Some(factors) = self.factors(norm, rate) else {
            return norm;
        };
        let Factors { beta1, beta2, .. } = factors;
        let gradient = gradient * factors.clip;
        self.first = self.first.extract() * beta1 + gradient.clone() * (1.0 - beta1);
        self.second = self.second.extract() * beta2 + gradient.square() * (1.0 - beta2);
        let root = self.second.clone().sqrt() * factors.root + factors.epsilon;
        let change = self.first.clone() * factors.rate / root;
        let values = model.flat_mut().extract();
        let values = match &self.decays {
            Some(decays) => values * (decays.clone() * -factors.decay + 1.0),
            None => values,
        };
        *model.flat_mut() = values - change;
        norm
    }
}

/// Σ x² of every [`CHUNK`] values, in float64.
pub(crate) fn square_sums(values: &[f32]) -> Vec<f64> {
    let of = |chunk: &[f32]| chunk.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    values.par_chunks(CHUNK).with_min_len(TASK / CHUNK).map(of).collect()
}

fn update(
    list: &ParameterList,
    gradients: &[cpu::FlexTensor],
    values: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    factors: Factors,
) {
    for (parameter, gradient) in list.iter().zip(gradients) {
        let range = parameter.range();
        let moments = [&mut first[range.clone()], &mut second[range.clone()]];
        factors.update(&mut values[range], moments, cpu::values(gradient), parameter.decays());
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::config::ModelConfig;
    use crate::ops::testing::{assert_close, random};

    fn model() -> Model {
        Model::new(&ModelConfig::smallest(), 3, &Device::flex()).unwrap()
    }

    fn gradients(model: &Model, step: u64) -> Vec<Tensor<2>> {
        let shapes = model.parameters().iter().map(|parameter| parameter.matrix());
        // Laid out column by column, as the backward of a product leaves them.
        let columns = shapes
            .enumerate()
            .map(|(index, [rows, columns])| random([columns, rows], 100 * step + index as u64).transpose());
        columns.collect()
    }

    /// AdamW as the paper writes it, in float64.
    fn reference(config: &OptimizerConfig, model: &Model, rates: &[f64]) -> Vec<f64> {
        let mut values: Vec<f64> = model.values().into_iter().map(f64::from).collect();
        let mut moments = vec![[0f64; 2]; values.len()];
        for (step, rate) in rates.iter().enumerate() {
            let gradient: Vec<f64> = gradients(model, step as u64)
                .into_iter()
                .flat_map(|gradient| gradient.try_into_vec_as::<f64>().unwrap())
                .collect();
            let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
            let clip = (config.clip_norm / norm).min(1.0);
            for parameter in model.parameters().iter() {
                for i in parameter.range() {
                    let g = gradient[i] * clip;
                    let [m, v] = &mut moments[i];
                    *m = config.beta1 * *m + (1.0 - config.beta1) * g;
                    *v = config.beta2 * *v + (1.0 - config.beta2) * g * g;
                    let t = step as i32 + 1;
                    let m = *m / (1.0 - config.beta1.powi(t));
                    let v = *v / (1.0 - config.beta2.powi(t));
                    if parameter.shape.len() == 2 {
                        values[i] -= rate * config.weight_decay * values[i];
                    }
                    values[i] -= rate * m / (v.sqrt() + config.epsilon);
                }
            }
        }
        values
    }

    #[test]
    fn both_forms_are_the_papers_adamw() {
        let rates = [0.01, 0.02, 0.005, 0.01];
        for clip_norm in [0.5, 1e9] {
            let config = OptimizerConfig { clip_norm, ..OptimizerConfig::default() };
            let want = reference(&config, &model(), &rates);
            let count = want.len();
            let want = Tensor::<1>::from_data(TensorData::new(want, [count]), &Device::flex());
            for composed in [false, true] {
                let mut model = model();
                let mut optimizer = AdamW::new(&config, &model);
                if composed {
                    let of = |p: &crate::parameters::Parameter| vec![f32::from(u8::from(p.decays())); p.range().len()];
                    let decays: Vec<f32> = model.parameters().iter().flat_map(of).collect();
                    let decays = TensorData::new(decays, [count]);
                    optimizer.decays = Some(Tensor::from_data(decays, &Device::flex()));
                }
                for (step, &rate) in rates.iter().enumerate() {
                    let gradients = gradients(&model, step as u64);
                    optimizer.step(&mut model, gradients, rate);
                }
                let got = TensorData::new(model.values(), [count]);
                let got = Tensor::<1>::from_data(got, &Device::flex());
                assert_close("values", got, want.clone(), 1e-6);
            }
        }
    }

    #[test]
    fn a_gradient_that_is_not_a_number_changes_nothing() {
        let mut model = model();
        let before = model.values();
        let mut optimizer = AdamW::new(&OptimizerConfig::default(), &model);
        let mut gradients = gradients(&model, 0);
        gradients[3] = gradients[3].clone() / 0.0 * 0.0;
        assert!(optimizer.step(&mut model, gradients, 0.1).is_nan());
        assert_eq!((model.values(), optimizer.steps()), (before, 0));
        assert!(optimizer.moments()[0].iter().all(|&m| m == 0.0));
    }
}
