//! What the rules of `filter` drop alone and together.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::shards::{fault, files, read};
use crate::error::Result;
use crate::status::{StageSummary, decisive};

/// Pairs that a report shows.
const PAIRS: usize = 30;

/// Counts over the dropped documents of `filter`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Overlap {
    /// Documents that a rule drops, whichever else does.
    pub matched: BTreeMap<String, u64>,
    /// Documents that a rule drops and no other: what would stay without it.
    pub alone: BTreeMap<String, u64>,
    /// Pairs of rules by the documents that both drop, the most frequent first.
    pub pairs: Vec<RulePair>,
}

/// Two rules and how many documents both drop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RulePair {
    /// The rules.
    pub rules: (String, String),
    /// Documents.
    pub documents: u64,
}

pub(super) fn scan(run_dir: &Path, stages: &[StageSummary]) -> Result<Overlap> {
    let mut overlap = Overlap::default();
    if !decisive(stages).into_iter().any(|s| s.stage == "filter") {
        return Ok(overlap);
    }
    // Few combinations of rules are met, and each is taken apart once.
    let mut combinations: BTreeMap<Vec<String>, u64> = BTreeMap::new();
    for (_, path) in files(run_dir, "filter", true)? {
        let rows = read(&path, &["rules"])?;
        let column = rows.column("rules").and_then(|c| c.list().cloned()).map_err(|e| fault(&path, e))?;
        for row in 0..rows.height() {
            let Some(rules) = column.get_as_series(row) else { continue };
            let rules = rules.str().map_err(|e| fault(&path, e))?;
            let names = (0..rules.len()).filter_map(|at| rules.get(at).map(str::to_owned)).collect();
            *combinations.entry(names).or_default() += 1;
        }
    }
    let mut pairs: BTreeMap<(String, String), u64> = BTreeMap::new();
    for (rules, count) in combinations {
        if let [rule] = rules.as_slice() {
            *overlap.alone.entry(rule.clone()).or_default() += count;
        }
        for (at, rule) in rules.iter().enumerate() {
            *overlap.matched.entry(rule.clone()).or_default() += count;
            for other in &rules[at + 1..] {
                let (a, b) = if rule < other { (rule, other) } else { (other, rule) };
                *pairs.entry((a.clone(), b.clone())).or_default() += count;
            }
        }
    }
    overlap.pairs = pairs.into_iter().map(|(rules, documents)| RulePair { rules, documents }).collect();
    overlap.pairs.sort_by(|a, b| b.documents.cmp(&a.documents).then_with(|| a.rules.cmp(&b.rules)));
    overlap.pairs.truncate(PAIRS);
    Ok(overlap)
}
