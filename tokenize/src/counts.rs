//! What is counted of token shards while they are written.

use std::collections::BTreeMap;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, UInt16Type, UInt32Type, UInt64Type};
use serde::{Deserialize, Serialize};

/// Documents, tokens and bytes of text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Documents.
    pub documents: u64,
    /// Tokens, those that begin and end documents included.
    pub tokens: u64,
    /// Bytes of UTF-8 text.
    pub bytes: u64,
}

impl Counts {
    /// Fertility: bytes of text per token; 0 where there are no tokens.
    pub fn bytes_per_token(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.bytes as f64 / self.tokens as f64 }
    }

    /// Add other counts.
    pub fn add(&mut self, other: Self) {
        self.documents += other.documents;
        self.tokens += other.tokens;
        self.bytes += other.bytes;
    }
}

/// [`Counts`] by source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SourceCounts(pub BTreeMap<String, Counts>);

impl SourceCounts {
    /// Sum over sources.
    pub fn total(&self) -> Counts {
        let mut total = Counts::default();
        self.0.values().for_each(|c| total.add(*c));
        total
    }

    /// Add other counts.
    pub fn add(&mut self, other: &Self) {
        for (source, counts) in &other.0 {
            self.0.entry(source.clone()).or_default().add(*counts);
        }
    }

    fn count(&mut self, source: &str, counts: Counts) {
        match self.0.get_mut(source) {
            Some(known) => known.add(counts),
            None => {
                self.0.insert(source.into(), counts);
            }
        }
    }

    /// For journal notes: totals and sources, with bytes per token.
    pub fn notes(&self) -> serde_json::Value {
        let describe = |c: &Counts| {
            serde_json::json!({
                "documents": c.documents,
                "tokens": c.tokens,
                "bytes": c.bytes,
                "bytes_per_token": c.bytes_per_token(),
            })
        };
        let mut notes = describe(&self.total());
        notes["sources"] = self.0.iter().map(|(source, c)| (source.clone(), describe(c))).collect();
        notes
    }

    /// Read [`Self::notes`] back.
    pub fn from_notes(notes: &serde_json::Value) -> Option<Self> {
        let sources = notes.get("sources")?.as_object()?;
        let counts = sources.iter().map(|(source, c)| {
            let number = |key| c.get(key)?.as_u64();
            let counts = Counts { documents: number("documents")?, tokens: number("tokens")?, bytes: number("bytes")? };
            Some((source.clone(), counts))
        });
        counts.collect::<Option<_>>().map(Self)
    }
}

/// Counts documents, tokens and bytes by source, and how often each token occurs.
pub struct TokenCounter {
    /// By source.
    pub sources: SourceCounts,
    /// By token id.
    pub occurrences: Vec<u64>,
}

impl TokenCounter {
    /// Nothing counted yet.
    pub fn new(vocabulary_size: u32) -> Self {
        Self { sources: SourceCounts::default(), occurrences: vec![0; vocabulary_size as usize] }
    }

    /// Count rows with the columns `source`, `bytes` and `tokens`.
    pub fn count(&mut self, batch: &RecordBatch) -> pipeline::Result<()> {
        let column = |name: &str| {
            batch.column_by_name(name).ok_or_else(|| {
                pipeline::Error::Arrow(arrow::error::ArrowError::SchemaError(format!("no column {name}")))
            })
        };
        let sources = cast(column("source")?, &DataType::Utf8View)?;
        let bytes = cast(column("bytes")?, &DataType::UInt64)?;
        let (sources, bytes) = (sources.as_string_view(), bytes.as_primitive::<UInt64Type>());
        let tokens = column("tokens")?.as_list::<i32>();
        for row in 0..batch.num_rows() {
            let counts = Counts { documents: 1, tokens: tokens.value_length(row) as u64, bytes: bytes.value(row) };
            self.sources.count(sources.value(row), counts);
        }
        let offsets = tokens.value_offsets();
        let range = offsets[0] as usize..offsets[batch.num_rows()] as usize;
        match tokens.values().data_type() {
            DataType::UInt16 => {
                let ids = &tokens.values().as_primitive::<UInt16Type>().values()[range];
                ids.iter().for_each(|&id| self.occurrences[usize::from(id)] += 1);
            }
            _ => {
                let ids = &tokens.values().as_primitive::<UInt32Type>().values()[range];
                ids.iter().for_each(|&id| self.occurrences[id as usize] += 1);
            }
        }
        Ok(())
    }
}

/// Entropy in nats per token of a distribution given by counts: the loss of the best model that knows
/// nothing of context.
pub fn unigram_entropy(occurrences: impl Iterator<Item = u64> + Clone) -> f64 {
    let total = occurrences.clone().sum::<u64>() as f64;
    let terms = occurrences.filter(|&n| n > 0).map(|n| {
        let p = n as f64 / total;
        -p * p.ln()
    });
    terms.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_of_known_distributions() {
        assert_eq!(unigram_entropy([0, 7, 0].into_iter()), 0.0);
        assert!((unigram_entropy([3, 3, 3, 3].into_iter()) - 4f64.ln()).abs() < 1e-12);
        let mixed = unigram_entropy([1, 2, 1].into_iter());
        assert!((mixed - 1.5 * 2f64.ln()).abs() < 1e-12, "{mixed}");
    }

    #[test]
    fn notes_read_back() {
        let mut counts = SourceCounts::default();
        counts.count("a", Counts { documents: 1, tokens: 10, bytes: 40 });
        counts.count("b", Counts { documents: 2, tokens: 5, bytes: 5 });
        let notes = counts.notes();
        assert_eq!(notes["bytes_per_token"], 3.0);
        assert_eq!(SourceCounts::from_notes(&notes), Some(counts));
    }
}
