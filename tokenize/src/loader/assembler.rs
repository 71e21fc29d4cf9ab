//! Makes batches: one window of every source in memory.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::batch::{Batch, Row};
use super::config::LoaderConfig;
use super::index::Index;
use super::mixture::Mixture;
use super::pack::{Cuts, Plan, Sequences};
use super::stream::Stream;
use crate::error::Result;

pub(super) struct Assembler {
    config: LoaderConfig,
    mixture: Mixture,
    plans: Vec<Plan>,
    sources: Vec<Sequences>,
}

impl Assembler {
    pub fn new(index: Index, config: LoaderConfig) -> Result<Self> {
        let known: Vec<(&str, u64)> = index.sources().iter().map(|s| (s.name.as_str(), s.tokens)).collect();
        let shares = config.data.shares(&known)?;
        let plan = |(share, (_, tokens)): (&f64, &(&str, u64))| {
            let window = config.data.shuffle_window_tokens as f64 * share;
            Plan::new(&config.data, config.sequence_length, window, *tokens)
        };
        let plans: Vec<Plan> = shares.iter().zip(&known).map(plan).collect();
        // Shares are of tokens; where there is padding, a sequence holds fewer.
        let parts = shares.iter().zip(&plans).map(|(share, plan)| part(share * plan.inputs_per_token()));
        let mixture = Mixture::new(parts.collect(), config.seed);
        let sources = plans.iter().enumerate().map(|(number, &plan)| {
            // By name: another source beside it changes nothing in this one.
            let seed = source_seed(known[number].0, config.seed);
            Sequences::new(Stream::new(index.clone(), number, seed), plan, seed, index.metadata().eos_id)
        });
        let sources = sources.collect();
        Ok(Self { mixture, plans, sources, config })
    }

    pub fn batch(&mut self, step: u64) -> Result<Batch> {
        let length = self.config.sequence_length;
        let LoaderConfig { rows, rank, world_size, .. } = self.config;
        let chosen = rows * rank / world_size..rows * (rank + 1) / world_size;
        let mut batch = Batch {
            step,
            rows: chosen.len(),
            sequence_length: length,
            tokens: Vec::with_capacity(chosen.len() * (length + 1)),
            document_starts: Vec::with_capacity(chosen.len()),
            filled: Vec::with_capacity(chosen.len()),
        };
        let Batch { tokens, document_starts, filled, .. } = &mut batch;
        let mut row = Row { tokens, document_starts, filled };
        for number in chosen {
            let sequence = step * self.config.rows as u64 + number as u64;
            let (source, sequence) = self.mixture.locate(sequence);
            self.sources[source].append(sequence, &mut row)?;
        }
        Ok(batch)
    }

    /// For each source the tokens of its stream that come before a step.
    pub fn tokens_before(&mut self, step: u64) -> Vec<f64> {
        let counts = self.mixture.counts(step * self.config.rows as u64);
        let tokens = |(count, plan): (u64, &Plan)| count as f64 * plan.tokens as f64 / plan.sequences as f64;
        counts.into_iter().zip(&self.plans).map(tokens).collect()
    }

    /// For each source how its stream is cut.
    pub fn plans(&self) -> &[Plan] {
        &self.plans
    }

    /// What packing does to the documents of the first window of a source.
    pub fn cuts(&mut self, source: usize) -> Result<Cuts> {
        self.sources[source].cuts(0)
    }
}

/// The seed of everything about a source.
pub(super) fn source_seed(source: &str, seed: u64) -> u64 {
    xxh3_64_with_seed(source.as_bytes(), seed)
}

/// A share as a whole number: fine enough that a source of a millionth of the data has its share to a
/// millionth.
fn part(share: f64) -> u64 {
    (share * (1u64 << 50) as f64).round() as u64
}
