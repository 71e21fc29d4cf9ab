//! Linear text classifiers: trained here ([`Linear`]) or loaded from fastText ([`FastText`]), applied as signals.
//!
//! Quality, toxicity and domain are the same mechanism with other examples.

mod fasttext;
mod features;
mod linear;
mod train;

use std::path::{Path, PathBuf};

pub use fasttext::{FastText, FastTextScratch};
pub use linear::{Calibration, Linear, LinearScratch};
pub use train::{Example, Examples, TrainReport, TrainSettings, train};

/// A model that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct ModelError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// A model that gives a text one probability.
// One stands in a stage, not many: the size of the larger form is of no account.
#[allow(clippy::large_enum_variant)]
pub enum Classifier {
    /// Trained by `fulgurite classifier train`.
    Linear(Linear),
    /// The probability of one label of a fastText model.
    FastText {
        /// The model.
        model: FastText,
        /// Number of the label.
        label: usize,
    },
}

/// Memory of a prediction, kept from text to text.
#[derive(Default)]
pub struct ClassifierScratch {
    linear: LinearScratch,
    fasttext: FastTextScratch,
}

impl Classifier {
    /// The model in `path`, told by its first bytes. `label` names a label of a fastText model (`__label__` may be left
    /// out), and is for those alone.
    pub fn load(path: &Path, label: Option<&str>) -> Result<Self, ModelError> {
        let fail = |reason: String| ModelError { path: path.into(), reason };
        if !FastText::is_model(path) {
            if label.is_some() {
                return Err(fail("`label` is for fastText models, and this is none".into()));
            }
            return Linear::load(path).map(Self::Linear);
        }
        let model = FastText::load(path)?;
        let plain = |label: &str| label.strip_prefix("__label__").unwrap_or(label).to_owned();
        let names = || model.labels().iter().take(20).map(|l| plain(l)).collect::<Vec<_>>().join(", ");
        let Some(wanted) = label else {
            return Err(fail(format!("a fastText model needs a `label`, one of {}", names())));
        };
        match model.labels().iter().position(|l| plain(l) == plain(wanted)) {
            Some(label) => Ok(Self::FastText { model, label }),
            None => Err(fail(format!("no label \"{wanted}\"; it has {}", names()))),
        }
    }

    /// The probability that `text` is of the positive kind; none when the model knows nothing of the text.
    pub fn probability(&self, text: &str, scratch: &mut ClassifierScratch) -> Option<f64> {
        match self {
            Self::Linear(model) => model.probability(text, &mut scratch.linear),
            Self::FastText { model, label } => {
                let probabilities = model.probabilities(text, &mut scratch.fasttext)?;
                Some(f64::from(probabilities[*label].clamp(0.0, 1.0)))
            }
        }
    }
}
