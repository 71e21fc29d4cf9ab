//! What a checkpoint keeps of a loader, and what is told of it.

use std::collections::BTreeMap;

use pipeline::digest::Digest;
use serde::{Deserialize, Serialize};

use super::{DataConfig, Loader, Packing};
use crate::error::{Error, Result};

/// What a checkpoint keeps of a loader.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoaderState {
    /// The next step.
    pub step: u64,
    /// How often each source has been gone through before it, for people.
    pub epochs: BTreeMap<String, f64>,
    /// [`Loader::fingerprint`] of the data.
    pub fingerprint: Digest,
    /// Everything else that decides the batches.
    pub sequence_length: usize,
    /// Rows of the global batch.
    pub rows: usize,
    /// Seed of the order.
    pub seed: u64,
    /// What is in a sequence.
    pub data: DataConfig,
}

/// What packing does, as the settings have it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PackingReport {
    /// How.
    pub packing: Packing,
    /// T.
    pub sequence_length: usize,
    /// Share of all positions that is padding.
    pub padding: f64,
    /// By source.
    pub sources: BTreeMap<String, SourceReport>,
}

impl std::fmt::Display for PackingReport {
    /// One line for people: what the packing costs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { packing, sequence_length, padding, sources } = self;
        match packing {
            Packing::Concatenate => write!(f, "sequences of {sequence_length} by concatenation: no padding"),
            Packing::BestFit => {
                let short: u64 = sources.values().map(|source| source.short_documents).sum();
                let cut: u64 = sources.values().map(|source| source.cut_documents).sum();
                write!(
                    f,
                    "sequences of {sequence_length} by best fit: {:.2}% padding; of {short} documents no longer than \
                     that, {cut} are cut",
                    100.0 * padding
                )
            }
        }
    }
}

/// What a source gives.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SourceReport {
    /// Documents of an epoch.
    pub documents: u64,
    /// Tokens of an epoch.
    pub tokens: u64,
    /// Share of the sequences.
    pub share: f64,
    /// By best fit, in the first window: documents no longer than a sequence.
    pub short_documents: u64,
    /// And those of them that are cut.
    pub cut_documents: u64,
}

impl Loader {
    /// How often each source has been gone through before a step.
    pub fn epochs(&self, step: u64) -> BTreeMap<String, f64> {
        let Ok(mut assembler) = self.assembler() else { return BTreeMap::new() };
        let sources = self.index.sources().iter().zip(assembler.tokens_before(step));
        sources.map(|(source, tokens)| (source.name.clone(), tokens / source.tokens as f64)).collect()
    }

    /// What a checkpoint keeps, when `step` is the next one: a few numbers.
    pub fn state(&self, step: u64) -> serde_json::Value {
        let state = LoaderState {
            step,
            epochs: self.epochs(step),
            fingerprint: self.fingerprint(),
            sequence_length: self.config.sequence_length,
            rows: self.config.rows,
            seed: self.config.seed,
            data: self.config.data.clone(),
        };
        // A struct of numbers and strings always has a JSON form.
        serde_json::to_value(state).unwrap_or_default()
    }

    /// The next step of a saved state, after a check that this loader goes on with the same batches.
    /// The world size may differ.
    pub fn resume(&self, state: &serde_json::Value) -> Result<u64> {
        let saved: LoaderState = serde_json::from_value(state.clone()).map_err(|e| Error::State(format!("{e}")))?;
        // With the defaults of settings that were not there when it was saved.
        let state = serde_json::to_value(&saved).map_err(|e| Error::State(e.to_string()))?;
        let now = self.state(saved.step);
        // A checkpoint is text, and serde_json reads a tenth of all fractions back as a neighbour of what it wrote. So
        // the settings of now as a checkpoint would give them back are the same settings.
        let read_back: serde_json::Value =
            serde_json::from_str(&now.to_string()).map_err(|e| Error::State(e.to_string()))?;
        let mut changes = Vec::new();
        for (key, value) in now.as_object().into_iter().flatten().filter(|(key, _)| *key != "epochs") {
            let saved = state.get(key);
            if saved != Some(value) && saved != read_back.get(key) {
                let key = if key == "rows" { "rows (batch · gradient_accumulation)" } else { key };
                changes.push(format!("{key} was {}, is {value}", saved.unwrap_or(&serde_json::Value::Null)));
            }
        }
        if changes.is_empty() { Ok(saved.step) } else { Err(Error::State(changes.join(", "))) }
    }

    /// What packing does. Reads the first window of every source where documents are fitted.
    pub fn packing(&self) -> Result<PackingReport> {
        let mut assembler = self.assembler()?;
        let known: Vec<(&str, u64)> = self.index.sources().iter().map(|s| (s.name.as_str(), s.tokens)).collect();
        let shares = self.config.data.shares(&known)?;
        let mut sources = BTreeMap::new();
        let (mut inputs, mut padding) = (0.0, 0.0);
        for (number, (source, share)) in self.index.sources().iter().zip(shares).enumerate() {
            let plan = assembler.plans()[number];
            let sequences = share * plan.inputs_per_token();
            inputs += sequences;
            padding += sequences * plan.padding();
            let cuts = match self.config.data.packing {
                Packing::BestFit if share > 0.0 => assembler.cuts(number)?,
                _ => Default::default(),
            };
            let report = SourceReport {
                documents: source.documents,
                tokens: source.tokens,
                share: sequences,
                short_documents: cuts.short,
                cut_documents: cuts.cut,
            };
            sources.insert(source.name.clone(), report);
        }
        sources.values_mut().for_each(|source| source.share /= inputs);
        let (packing, sequence_length) = (self.config.data.packing, self.config.sequence_length);
        Ok(PackingReport { packing, sequence_length, padding: padding / inputs, sources })
    }
}
