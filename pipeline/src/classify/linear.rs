//! Logistic regression over hashed n-grams of words, with calibrated probabilities.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{ModelError, features};
use crate::digest::Digest;
use crate::manifest::replace_file;

/// First bytes of a model file.
const MAGIC: &[u8; 8] = b"FULGLIN1";

/// From a score to a probability: 1 / (1 + exp(−(slope · score + offset))) (Platt 1999), fitted on documents that the
/// weights were not.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Factor of the score.
    pub slope: f64,
    /// What is added.
    pub offset: f64,
}

/// What a model file says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Header {
    /// Weights are numbered by so many bits.
    pub bits: u32,
    /// Words of the longest n-grams.
    pub ngrams: usize,
    /// Score of a text without features.
    pub intercept: f64,
    pub calibration: Calibration,
}

/// A trained classifier: 4 bytes a weight, 2^bits weights.
#[derive(Debug, PartialEq)]
pub struct Linear {
    pub(super) header: Header,
    pub(super) weights: Vec<f32>,
}

/// Memory of a prediction, kept from text to text.
#[derive(Default)]
pub struct LinearScratch(Vec<u64>);

impl Linear {
    /// Reads a model.
    ///
    /// # Errors
    /// [`ModelError`] for a file that is none, or a damaged one.
    pub fn load(path: &Path) -> Result<Self, ModelError> {
        let fail = |reason: &str| ModelError { path: path.into(), reason: reason.into() };
        let bytes = fs::read(path).map_err(|e| fail(&e.to_string()))?;
        let Some(rest) = bytes.strip_prefix(MAGIC) else {
            return Err(fail("neither a classifier of `fulgurite classifier train` nor a fastText model"));
        };
        let damaged = || fail("the classifier is damaged; train it again or copy it again");
        let (content, digest) = rest.split_at_checked(rest.len().saturating_sub(16)).ok_or_else(damaged)?;
        if Digest::of(content).0.to_le_bytes() != digest {
            return Err(damaged());
        }
        let (length, rest) = content.split_first_chunk::<4>().ok_or_else(damaged)?;
        let (header, weights) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(damaged)?;
        let header: Header = serde_json::from_slice(header).map_err(|_| damaged())?;
        let (weights, _) = weights.as_chunks::<4>();
        if !(1..=30).contains(&header.bits) || weights.len() != 1 << header.bits {
            return Err(damaged());
        }
        Ok(Self { weights: weights.iter().map(|b| f32::from_le_bytes(*b)).collect(), header })
    }

    /// Writes the model by atomic rename.
    pub fn save(&self, path: &Path) -> crate::Result<()> {
        let header = serde_json::to_vec(&self.header).map_err(crate::Error::abort)?;
        let mut content = Vec::with_capacity(self.weights.len() * 4 + header.len() + 32);
        content.extend_from_slice(&(header.len() as u32).to_le_bytes());
        content.extend_from_slice(&header);
        self.weights.iter().for_each(|weight| content.extend_from_slice(&weight.to_le_bytes()));
        let digest = Digest::of(&content).0.to_le_bytes();
        replace_file(path, &[&MAGIC[..], &content, &digest].concat())
    }

    /// How the score becomes a probability.
    pub fn calibration(&self) -> Calibration {
        self.header.calibration
    }

    /// The score before calibration: sum of the weights of all n-grams over the square root of their number. None for
    /// a text without words.
    pub fn score(&self, text: &str, scratch: &mut LinearScratch) -> Option<f64> {
        let (mut sum, mut count) = (0f64, 0u32);
        features::for_each(text, self.header.ngrams, self.header.bits, &mut scratch.0, |feature| {
            sum += f64::from(self.weights[feature as usize]);
            count += 1;
        });
        (count > 0).then(|| self.header.intercept + sum / f64::from(count).sqrt())
    }

    /// The calibrated probability that `text` is of the positive kind; none for a text without words.
    pub fn probability(&self, text: &str, scratch: &mut LinearScratch) -> Option<f64> {
        Some(self.header.calibration.probability(self.score(text, scratch)?))
    }
}

impl Calibration {
    /// The probability of a score.
    pub fn probability(&self, score: f64) -> f64 {
        1.0 / (1.0 + (-(self.slope * score + self.offset)).exp())
    }
}
