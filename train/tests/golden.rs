//! A small model with its logits, loss and gradients, computed in float64 by another
//! implementation of the same definition.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Device;
use safetensors::SafeTensors;
use train::ops::sequences::Sequences;
use train::{Batch, Model, evaluate, published};

const TOLERANCE: f64 = 1e-4;

struct Golden {
    content: Vec<u8>,
    model: Model,
    ids: Vec<u32>,
}

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"))
}

impl Golden {
    fn load() -> Self {
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
            model: Model::from_values(&config, values, &Device::flex()).unwrap(),
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
fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    let norm: f64 = want.iter().map(|&w| square(w)).sum();
    let relative = (error / norm).sqrt();
    assert!(relative < TOLERANCE, "{what}: relative error {relative:e}");
}

#[test]
fn logits_agree() {
    let golden = Golden::load();
    let sequences = Arc::new(Sequences::whole(2, 97));
    let logits = golden.model.logits(&golden.ids, &sequences).unwrap();
    assert_close("logits", &logits.try_into_vec_as().unwrap(), &golden.tensor("logits"));
}

#[test]
fn loss_and_every_gradient_agree() {
    let golden = Golden::load();
    let batch = Batch { tokens: golden.ids.clone(), starts: vec![vec![0]; 2], length: 96 };
    // Both rows at once, and one after the other as gradient accumulation does.
    for rows in [2, 1] {
        let parameters = golden.model.parameters();
        let mut sums: Vec<Vec<f32>> = parameters.iter().map(|parameter| vec![0.0; parameter.range().len()]).collect();
        let loss = golden.model.gradients(&batch, rows, |gradients| {
            for (sum, gradient) in sums.iter_mut().zip(gradients) {
                let gradient: Vec<f32> = gradient.try_into_vec_as().unwrap();
                for (sum, value) in sum.iter_mut().zip(gradient) {
                    *sum += value;
                }
            }
        });
        assert_close("loss", &[loss.unwrap() as f32], &golden.tensor("loss"));
        for (parameter, sum) in parameters.iter().zip(&sums) {
            let want = golden.tensor(&format!("grad.{}", parameter.name));
            assert_close(&parameter.name, sum, &want);
        }
    }
}

#[test]
fn the_exported_model_evaluates_to_the_same_loss() {
    let golden = Golden::load();
    let directory = tempfile::tempdir().unwrap();
    published::save(&golden.model, directory.path(), None).unwrap();
    let sequences: Vec<&[u32]> = golden.ids.chunks(97).collect();
    let evaluation = evaluate(directory.path(), &sequences).unwrap();
    assert_eq!(evaluation.tokens, 2 * 96);
    assert_close("loss", &[evaluation.loss as f32], &golden.tensor("loss"));
}
