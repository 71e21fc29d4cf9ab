//! A sample of documents that is a function of the set of documents and the seed, in one pass and bounded
//! memory.
//!
//! Every document has a hash. The sample are the documents of lowest hash, up to the one with which they
//! reach a number of bytes; whatever order they come in, it is enough to keep the lowest so far.

use std::collections::{BTreeMap, BinaryHeap};

use crate::error::{Error, Result};
use crate::shuffle::sample_key;

/// The texts of a sample, in an order in which the first of them, however many, are such a sample too: those of a source
/// by hash, and the sources mixed as their bytes are.
pub type Texts = Vec<Box<str>>;

/// Documents chosen so far, by source where the sources have weights of their own.
pub struct Sample {
    seed: u64,
    /// Bytes of each source, if they have weights.
    budgets: BTreeMap<String, u64>,
    /// Bytes in all, if not.
    budget: u64,
    reservoirs: BTreeMap<String, Reservoir>,
    /// Documents and bytes that were offered.
    seen: (u64, u64),
    sources: BTreeMap<String, u64>,
}

/// The documents of lowest hash, the highest of them on top.
#[derive(Default)]
struct Reservoir {
    documents: BinaryHeap<(u64, [u8; 16], Box<str>)>,
    bytes: u64,
}

impl Sample {
    /// A sample of about `bytes` bytes of text; with `weights`, of that share of each source that is named
    /// and of no other.
    pub fn new(bytes: u64, weights: &BTreeMap<String, f64>, seed: u64) -> Self {
        let total: f64 = weights.values().sum();
        let share = |weight: f64| (bytes as f64 * weight / total).round() as u64;
        let budgets = weights.iter().map(|(source, &weight)| (source.clone(), share(weight))).collect();
        Self { seed, budgets, budget: bytes, reservoirs: BTreeMap::new(), seen: (0, 0), sources: BTreeMap::new() }
    }

    /// Take a document into account.
    pub fn offer(&mut self, id: [u8; 16], source: &str, text: &str) {
        self.seen.0 += 1;
        self.seen.1 += text.len() as u64;
        match self.sources.get_mut(source) {
            Some(documents) => *documents += 1,
            None => {
                self.sources.insert(source.into(), 1);
            }
        }
        let (budget, name) = match self.budgets.is_empty() {
            true => (self.budget, ""),
            false => match self.budgets.get(source) {
                Some(&budget) => (budget, source),
                None => return,
            },
        };
        if !self.reservoirs.contains_key(name) {
            self.reservoirs.insert(name.into(), Reservoir::default());
        }
        if let Some(reservoir) = self.reservoirs.get_mut(name) {
            reservoir.offer(sample_key(&id, self.seed), id, text, budget);
        }
    }

    /// Documents and bytes that were offered.
    pub fn seen(&self) -> (u64, u64) {
        self.seen
    }

    /// Bytes of the texts that are held now.
    pub fn held_bytes(&self) -> u64 {
        self.reservoirs.values().map(|r| r.bytes).sum()
    }

    /// Sources with a weight that have fewer bytes than their share: name, bytes, and what they should have.
    pub fn too_small(&self) -> Vec<(&str, u64, u64)> {
        let bytes = |name: &String| self.reservoirs.get(name).map_or(0, |reservoir| reservoir.bytes);
        let all = self.budgets.iter().map(|(name, &budget)| (name.as_str(), bytes(name), budget));
        all.filter(|(_, bytes, budget)| bytes < budget).collect()
    }

    /// The texts, and bytes by source where there are weights.
    ///
    /// # Errors
    /// If a source that has a weight was never seen.
    pub fn finish(self) -> Result<(Texts, BTreeMap<String, u64>)> {
        for name in self.budgets.keys() {
            if !self.sources.contains_key(name) {
                let reason = Error::unknown_source(name, self.sources.keys().map(String::as_str));
                return Err(Error::config("tokenizer.source_weights", reason));
            }
        }
        let bytes = match self.budgets.is_empty() {
            true => BTreeMap::new(),
            false => self.reservoirs.iter().map(|(name, reservoir)| (name.clone(), reservoir.bytes)).collect(),
        };
        // By the share of the source that comes before; the sort keeps what is equal in that.
        let mut texts = Vec::new();
        for reservoir in self.reservoirs.into_values() {
            let (mut before, all) = (0u64, u128::from(reservoir.bytes.max(1)));
            for (.., text) in reservoir.documents.into_sorted_vec() {
                let place = (u128::from(before) << 64) / all;
                before += text.len() as u64;
                texts.push((place, text));
            }
        }
        texts.sort_by_key(|(place, _)| *place);
        Ok((texts.into_iter().map(|(_, text)| text).collect(), bytes))
    }
}

impl Reservoir {
    fn offer(&mut self, key: u64, id: [u8; 16], text: &str, budget: u64) {
        // Once the lowest reach the budget, a document above them all is none of them.
        let full = self.bytes >= budget;
        if budget == 0 || full && self.documents.peek().is_some_and(|(k, i, _)| (*k, *i) < (key, id)) {
            return;
        }
        self.bytes += text.len() as u64;
        self.documents.push((key, id, text.into()));
        while let Some((.., text)) = self.documents.peek()
            && self.bytes - text.len() as u64 >= budget
        {
            self.bytes -= text.len() as u64;
            self.documents.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(n: u64) -> [u8; 16] {
        pipeline::document::document_id("sample", n)
    }

    /// By the definition: sort all by hash, take while the bytes before are less than the budget. In that order.
    fn naive(documents: &[(u64, String)], budget: u64, seed: u64) -> Vec<String> {
        let mut documents: Vec<_> =
            documents.iter().map(|(n, text)| (sample_key(&id(*n), seed), id(*n), text)).collect();
        documents.sort();
        let mut bytes = 0;
        let chosen = documents.into_iter().take_while(|(.., text)| {
            let before = bytes;
            bytes += text.len() as u64;
            before < budget
        });
        chosen.map(|(.., text)| text.clone()).collect()
    }

    proptest! {
        #[test]
        fn the_sample_is_that_of_the_definition_in_any_order(
            texts in prop::collection::vec("[a-z]{0,30}", 0..60),
            budget in 0u64..600,
            seed in any::<u64>(),
            shift in 0usize..60,
        ) {
            let mut documents: Vec<(u64, String)> = (0..).zip(texts).collect();
            let expected = naive(&documents, budget, seed);
            let middle = shift.min(documents.len());
            documents.rotate_left(middle);
            let mut sample = Sample::new(budget, &BTreeMap::new(), seed);
            for (n, text) in &documents {
                sample.offer(id(*n), "any", text);
                prop_assert!(sample.held_bytes() < budget + 30);
            }
            let texts: Vec<String> = sample.finish().unwrap().0.into_iter().map(String::from).collect();
            prop_assert_eq!(texts, expected);
        }
    }

    #[test]
    fn sources_have_their_weights() {
        let weights = BTreeMap::from([("a".to_string(), 3.0), ("b".to_string(), 1.0)]);
        let mut sample = Sample::new(4000, &weights, 9);
        for n in 0..3000 {
            sample.offer(id(n), ["a", "b", "c"][n as usize % 3], ["a123456789", "b123456789", "c"][n as usize % 3]);
        }
        assert_eq!(sample.seen(), (3000, 21_000));
        let (texts, bytes) = sample.finish().unwrap();
        assert_eq!(bytes, BTreeMap::from([("a".to_string(), 3000), ("b".to_string(), 1000)]));
        assert_eq!(texts.len(), 400);
        // Wherever it is cut off, the sources have their weights.
        for n in 1..=400 {
            let of_a = texts[..n].iter().filter(|text| text.starts_with('a')).count();
            assert!(of_a * 4 + 3 >= n * 3 && of_a * 4 <= n * 3 + 3, "{of_a} of {n}");
        }
        let mut sample = Sample::new(4000, &BTreeMap::from([("web".to_string(), 1.0)]), 9);
        sample.offer(id(0), "webs", "x");
        let error = sample.finish().err().unwrap().to_string();
        assert!(error.contains("they are from webs"), "{error}");
    }
}
