//! The loss of a model on given sequences.

use std::path::Path;

use burn::tensor::Device;
use serde::Serialize;

use crate::{Error, Model, published};

/// Tokens of a sequence that are in memory at once; the state carries over.
pub(crate) const WINDOW: usize = 1024;

/// A loss and what it is the mean of.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean cross-entropy in nats of the next token.
    pub loss: f64,
    /// Predicted tokens: one less than every sequence has.
    pub tokens: u64,
}

/// The loss of the published model in `directory` on `sequences` of token ids, in float32 on the
/// CPU. Every token but the first of each sequence is predicted from all before it. Memory does
/// not grow with the length of a sequence.
///
/// # Errors
/// As [`published::load`], and [`Error::Input`] for an id that is not below the vocabulary size and
/// when no sequence has two tokens. A sequence of fewer predicts nothing.
pub fn evaluate<S: AsRef<[u32]>>(directory: &Path, sequences: &[S]) -> Result<Evaluation, Error> {
    evaluate_model(&published::load(directory, &Device::flex())?, sequences)
}

/// [`evaluate`] for a model in memory, on its device.
///
/// # Errors
/// [`Error::Input`] as [`evaluate`].
pub fn evaluate_model<S: AsRef<[u32]>>(model: &Model, sequences: &[S]) -> Result<Evaluation, Error> {
    if sequences.is_empty() {
        return Err(Error::Input("there are no sequences".to_owned()));
    }
    for (index, ids) in sequences.iter().enumerate() {
        model.check_ids(ids.as_ref()).map_err(|error| Error::Input(format!("sequence {index}: {error}")))?;
    }
    if sequences.iter().all(|ids| ids.as_ref().len() < 2) {
        return Err(Error::Input("no sequence has two tokens, so there is nothing to predict".to_owned()));
    }
    let weights = model.weights(false);
    let (mut sum, mut tokens) = (0.0, 0);
    for ids in sequences {
        let ids = ids.as_ref();
        let mut state = model.start();
        for begin in (0..ids.len().saturating_sub(1)).step_by(WINDOW) {
            let end = (begin + WINDOW).min(ids.len() - 1);
            let hidden = model.read(&weights, &ids[begin..end], &mut state)?;
            sum += model.head_loss(&weights, hidden, &ids[begin + 1..=end]);
        }
        tokens += ids.len().saturating_sub(1) as u64;
    }
    Ok(Evaluation { loss: sum / tokens as f64, tokens })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Batch;
    use crate::config::ModelConfig;
    use crate::rng::Rng;

    fn model() -> Model {
        let config = ModelConfig {
            vocab_size: 50,
            decoder_embed_dim: 16,
            decoder_layers: 2,
            decoder_attention_heads: 2,
            hidden_dim: 16,
            glu_dim: 24,
            linear_use_lrpe_list: vec![1, 0],
            init_std: 0.3,
            ..ModelConfig::default()
        };
        Model::new(&config, 3, &Device::flex()).unwrap()
    }

    fn ids(count: usize) -> Vec<u32> {
        let mut rng = Rng::new(1, 0);
        (0..count).map(|_| (rng.next_u64() % 50) as u32).collect()
    }

    #[test]
    fn windows_give_the_loss_of_the_whole_sequence() {
        let model = model();
        let long = ids(2 * WINDOW + 77);
        let batch = Batch { tokens: long.clone(), starts: vec![vec![0]], length: long.len() - 1 };
        let whole = model.loss(&batch, 1).unwrap();
        let windows = evaluate_model(&model, &[long]).unwrap();
        assert!((whole - windows.loss).abs() < 1e-5 * whole, "{whole} {windows:?}");
    }

    #[test]
    fn the_mean_is_over_tokens_not_sequences() {
        let model = model();
        let (short, long) = (ids(2), ids(9));
        let one = |ids: &Vec<u32>| evaluate_model(&model, &[ids]).unwrap().loss;
        let both = evaluate_model(&model, &[&short, &long]).unwrap();
        assert_eq!(both.tokens, 9);
        assert!((both.loss - (one(&short) + 8.0 * one(&long)) / 9.0).abs() < 1e-6);
    }

    #[test]
    fn what_predicts_nothing_is_passed_over_and_refused_alone() {
        let model = model();
        let error = |ids: &[Vec<u32>]| evaluate_model(&model, ids).unwrap_err().to_string();
        assert!(error(&[]).contains("no sequences"));
        assert!(error(&[vec![3], vec![]]).contains("nothing to predict"));
        let loss = |ids: &[Vec<u32>]| evaluate_model(&model, ids).unwrap();
        assert_eq!(loss(&[vec![], vec![1, 2], vec![3]]), loss(&[vec![1, 2]]));
        let message = error(&[vec![1, 50]]);
        assert!(message.contains("sequence 0: token id 50 at position 1"), "{message}");
    }
}
