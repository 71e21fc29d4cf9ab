//! What was removed, by stage and rule: counts from the journals, thresholds and values from the dropped shards, one at a
//! time.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64;

use super::shards::{columns, files, numbers, read, texts};
use crate::error::Result;
use crate::status::{StageSummary, decisive, summaries};

/// Values of a rule that its median is of, chosen by hash where there are more: its rank is off by 0.5% of them in two
/// cases of three (half of one over the root of so many).
const VALUES: usize = 10_000;

/// How often a rule dropped a row, and how far from its threshold.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RuleReport {
    /// Stage name.
    pub stage: String,
    /// Rule name.
    pub rule: String,
    /// Rows it dropped.
    pub dropped: u64,
    /// Share of the rows that the stage read.
    pub share: f64,
    /// Threshold, where the rule has one that is the same for all rows.
    pub threshold: Option<f64>,
    /// Whether rows were dropped by different thresholds, as those of languages are.
    pub thresholds_differ: bool,
    /// Median of the value that failed, where the rule has one: of some ten thousand rows, if it dropped more.
    pub median_value: Option<f64>,
}

/// What the dropped rows say of a rule.
#[derive(Debug, Default)]
struct Seen {
    /// Values by a hash of their place, the smallest hashes.
    values: BTreeMap<u64, f64>,
    threshold: Option<f64>,
    differ: bool,
}

impl Seen {
    fn add(&mut self, place: u64, value: f64, threshold: f64) {
        if threshold.is_finite() {
            let first = *self.threshold.get_or_insert(threshold);
            self.differ |= first != threshold;
        }
        let hash = xxh3_64(&place.to_le_bytes());
        let full = self.values.len() >= VALUES;
        if !value.is_finite() || (full && self.values.last_key_value().is_some_and(|(last, _)| hash > *last)) {
            return;
        }
        self.values.insert(hash, value);
        if self.values.len() > VALUES {
            self.values.pop_last();
        }
    }

    /// The value in the middle, or what is half way between the two there.
    fn median(&self) -> Option<f64> {
        let mut values: Vec<f64> = self.values.values().copied().collect();
        values.sort_unstable_by(f64::total_cmp);
        let upper = *values.get(values.len() / 2)?;
        let lower = values[(values.len() - 1) / 2];
        Some(lower + (upper - lower) / 2.0)
    }
}

/// The rules of the recipe as it is that dropped anything in `run_dir`, in stage order, the busiest rule first.
pub fn rules(run_dir: &Path) -> Result<Vec<RuleReport>> {
    of(run_dir, &summaries(run_dir)?)
}

/// Those of `stages`.
pub(super) fn of(run_dir: &Path, stages: &[StageSummary]) -> Result<Vec<RuleReport>> {
    let mut report = Vec::new();
    for summary in decisive(stages) {
        let mut seen: BTreeMap<String, Seen> = BTreeMap::new();
        for (task, path) in files(run_dir, &summary.stage, true)? {
            // Those of a stage are alike.
            if !columns(&path)?.iter().any(|name| name == "value") {
                break;
            }
            let rows = read(&path, &["rule", "value", "threshold"])?;
            let (values, thresholds) = (numbers(&rows, &path, "value")?, numbers(&rows, &path, "threshold")?);
            for (row, rule) in texts(&rows, &path, "rule")?.into_iter().enumerate() {
                let place = u64::from(task) << 32 | row as u64;
                seen.entry(rule.unwrap_or_default()).or_default().add(place, values[row], thresholds[row]);
            }
        }
        let mut rules: Vec<(&String, u64)> = summary.totals.dropped.iter().map(|(rule, n)| (rule, *n)).collect();
        rules.retain(|(_, dropped)| *dropped > 0);
        rules.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(b.0)));
        report.extend(rules.into_iter().map(|(rule, dropped)| {
            let seen = seen.remove(rule).unwrap_or_default();
            RuleReport {
                stage: summary.stage.clone(),
                rule: rule.clone(),
                dropped,
                share: dropped as f64 / summary.totals.rows_read.max(1) as f64,
                threshold: seen.threshold.filter(|_| !seen.differ),
                thresholds_differ: seen.differ,
                median_value: seen.median(),
            }
        }));
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_exact_of_few_values_and_near_of_many_and_memory_has_an_end() {
        let mut seen = Seen::default();
        assert_eq!(seen.median(), None);
        for (place, value) in [4.0, f64::NAN, 1.0, 2.0, 9.0].into_iter().enumerate() {
            seen.add(place as u64, value, f64::NAN);
        }
        assert_eq!((seen.median(), seen.threshold, seen.differ), (Some(3.0), None, false));
        seen.add(5, 2.5, 10.0);
        seen.add(6, f64::NAN, 10.0);
        assert_eq!((seen.median(), seen.threshold, seen.differ), (Some(2.5), Some(10.0), false));
        seen.add(7, 2.5, 11.0);
        assert!(seen.differ);

        // Values that grow with their place, as those of a sorted corpus do.
        let (mut forth, mut back) = (Seen::default(), Seen::default());
        for place in 0..200_000u64 {
            forth.add(place, place as f64, 1.0);
            back.add(199_999 - place, (199_999 - place) as f64, 1.0);
        }
        assert_eq!((forth.values.len(), &forth.values), (VALUES, &back.values));
        // Four times what the comment on `VALUES` says.
        assert!((forth.median().unwrap() / 200_000.0 - 0.5).abs() < 0.02, "{:?}", forth.median());
    }
}
