//! A small model with its logits, loss and gradients, computed in float64 by another
//! implementation of the same definition.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use safetensors::SafeTensors;
use train::device::cuda_devices;
use train::ops::sequences::Sequences;
use train::{Batch, Model, evaluate, evaluate_model, published};

/// The CPU, and the first CUDA device where there is one.
fn devices() -> Vec<Device> {
    let cuda = cuda_devices().is_ok_and(|count| count > 0).then(|| Device::cuda(0));
    [Device::flex()].into_iter().chain(cuda).collect()
}

/// Relative norm of the difference. CUDA's float32 products may round their factors to tf32, with
/// 11 bits.
fn tolerance(device: &Device) -> f64 {
    if *device == Device::flex() { 1e-4 } else { 5e-3 }
}

struct Golden {
    content: Vec<u8>,
    model: Model,
    ids: Vec<u32>,
}

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"))
}

impl Golden {
    fn load(device: &Device) -> Self {
        let content = std::fs::read(folder().join("tnl_tiny.safetensors")).unwrap();
        let config = published::read_config(&folder().join("tnl_tiny.config.json")).unwrap();
        let tensors = SafeTensors::deserialize(&content).unwrap();
        let values = train::parameters::ParameterList::of(&config)
            .iter()
            .flat_map(|parameter| {
                let tensor = tensors.tensor(&parameter.name).unwrap();
                assert_eq!(tensor.shape(), parameter.shape);
                floats(tensor.data())
            })
            .collect();
        let ids = tensors.tensor("input_ids").unwrap();
        let ids = ids.data().as_chunks::<8>().0;
        Self {
            ids: ids.iter().map(|&id| i64::from_le_bytes(id) as u32).collect(),
            model: Model::from_values(&config, values, device).unwrap(),
            content,
        }
    }

    fn tensor(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.content).unwrap();
        floats(tensors.tensor(name).unwrap().data())
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let values = bytes.as_chunks::<4>().0;
    values.iter().map(|&value| f32::from_le_bytes(value)).collect()
}

#[track_caller]
fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    let norm: f64 = want.iter().map(|&w| square(w)).sum();
    let relative = (error / norm).sqrt();
    assert!(relative < tolerance, "{what}: relative error {relative:e}");
}

#[test]
fn logits_agree() {
    for device in devices() {
        let golden = Golden::load(&device);
        let sequences = Arc::new(Sequences::whole(2, 97));
        let logits = golden.model.logits(&golden.ids, &sequences).unwrap();
        let logits: Vec<f32> = logits.try_into_vec_as().unwrap();
        assert_close("logits", &logits, &golden.tensor("logits"), tolerance(&device));
    }
}

#[test]
fn loss_and_every_gradient_agree() {
    for device in devices() {
        let golden = Golden::load(&device);
        // Both rows at once, and one after the other as gradient accumulation does.
        for rows in [2, 1] {
            compare_gradients(&golden, rows, tolerance(&device));
        }
    }
}

fn compare_gradients(golden: &Golden, rows: usize, tolerance: f64) {
    let batch = Batch { tokens: golden.ids.clone(), starts: vec![vec![0]; 2], length: 96 };
    let parameters = golden.model.parameters();
    let mut sums: Vec<Vec<f32>> = parameters.iter().map(|parameter| vec![0.0; parameter.range().len()]).collect();
    let loss = golden.model.gradients(&batch, rows, 0.0, |gradients| {
        for (sum, gradient) in sums.iter_mut().zip(gradients) {
            let gradient: Vec<f32> = gradient.try_into_vec_as().unwrap();
            for (sum, value) in sum.iter_mut().zip(gradient) {
                *sum += value;
            }
        }
    });
    assert_close("loss", &[loss.unwrap() as f32], &golden.tensor("loss"), tolerance);
    for (parameter, sum) in parameters.iter().zip(&sums) {
        let want = golden.tensor(&format!("grad.{}", parameter.name));
        assert_close(&parameter.name, sum, &want, tolerance);
    }
}

#[test]
fn the_exported_model_evaluates_to_the_same_loss() {
    let directory = tempfile::tempdir().unwrap();
    for device in devices() {
        let golden = Golden::load(&device);
        let sequences: Vec<&[u32]> = golden.ids.chunks(97).collect();
        published::save(&golden.model, directory.path(), None).unwrap();
        let on_cpu = evaluate(directory.path(), &sequences).unwrap();
        let here = evaluate_model(&golden.model, &sequences).unwrap();
        for (evaluation, tolerance) in [(on_cpu, 1e-4), (here, tolerance(&device))] {
            assert_eq!(evaluation.tokens, 2 * 96);
            assert_close("loss", &[evaluation.loss as f32], &golden.tensor("loss"), tolerance);
        }
    }
}
