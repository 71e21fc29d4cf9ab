//! How the signals are spread over documents, kept and dropped, and where the thresholds are.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde::Serialize;

use super::shards::{columns, files, integers, numbers, read, texts};
use crate::error::Result;
use crate::signals::SIGNALS;
use crate::signals::document::LANGUAGE;
use crate::status::StageSummary;

/// Bars of a fraction.
const FRACTION_BARS: usize = 50;

/// The distribution of one signal.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Histogram {
    /// The signal.
    pub signal: String,
    /// Borders of the bars: one more than bars. A bar holds values from its lower border on, below its upper one; the
    /// last one its upper border too.
    pub borders: Vec<f64>,
    /// Documents of each bar that `filter` kept.
    pub kept: Vec<u64>,
    /// Documents of each bar that `filter` dropped.
    pub dropped: Vec<u64>,
    /// Documents without a value.
    pub missing: u64,
    /// Thresholds of the rules over this signal.
    pub thresholds: Vec<Threshold>,
}

/// A rule's number.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Threshold {
    /// Name of the rule.
    pub rule: String,
    /// What it drops.
    pub drop_when: String,
    /// The number.
    pub value: f64,
}

pub(super) struct Scanned {
    pub histograms: Vec<Histogram>,
    pub languages: Vec<(String, u64)>,
}

pub(super) fn scan(run_dir: &Path, stages: &[StageSummary]) -> Result<Scanned> {
    let mut languages: BTreeMap<String, u64> = BTreeMap::new();
    let mut bars: Vec<(String, Bars)> = Vec::new();
    let shards =
        if stages.iter().any(|s| s.stage == "signals") { files(run_dir, "signals", false)? } else { Vec::new() };
    let kept: HashMap<u32, _> = match stages.iter().any(|s| s.stage == "filter") {
        true => files(run_dir, "filter", false)?.into_iter().collect(),
        false => HashMap::new(),
    };
    for (task, path) in &shards {
        let names = columns(path)?;
        if bars.is_empty() {
            let signals = names.iter().filter(|n| !["id", "ordinal", LANGUAGE].contains(&n.as_str()));
            bars = signals.map(|name| (name.clone(), Bars::new(name))).collect();
        }
        let ordinals = integers(&read(path, &["ordinal"])?, path, "ordinal")?;
        // Without `filter` everything is kept.
        let is_kept: Option<HashSet<u64>> = match kept.get(task) {
            Some(path) => Some(integers(&read(path, &["ordinal"])?, path, "ordinal")?.into_iter().collect()),
            None if kept.is_empty() => None,
            None => Some(HashSet::new()),
        };
        let is_kept: Vec<bool> =
            ordinals.iter().map(|o| is_kept.as_ref().is_none_or(|kept| kept.contains(o))).collect();
        for (name, bars) in bars.iter_mut().filter(|(name, _)| names.contains(name)) {
            let values = numbers(&read(path, &[name.as_str()])?, path, name)?;
            values.into_iter().zip(&is_kept).for_each(|(value, kept)| bars.add(value, *kept));
        }
        if names.iter().any(|n| n == LANGUAGE) {
            for language in texts(&read(path, &[LANGUAGE])?, path, LANGUAGE)? {
                *languages.entry(language.unwrap_or_else(|| "unknown".into())).or_default() += 1;
            }
        }
    }
    let mut languages: Vec<(String, u64)> = languages.into_iter().collect();
    languages.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let mut thresholds = thresholds(stages);
    let histograms =
        bars.into_iter().map(|(name, bars)| bars.finish(thresholds.remove(&name).unwrap_or_default(), name)).collect();
    Ok(Scanned { histograms, languages })
}

/// Thresholds by signal, from the configuration that the stage `filter` ran with.
fn thresholds(stages: &[StageSummary]) -> BTreeMap<String, Vec<Threshold>> {
    let mut found: BTreeMap<String, Vec<Threshold>> = BTreeMap::new();
    let manifest = stages.iter().find(|s| s.stage == "filter").and_then(|s| s.manifest.as_ref());
    for rule in manifest.and_then(|m| m.config["rules"].as_array()).into_iter().flatten() {
        let text = |key: &str| rule[key].as_str().unwrap_or_default().to_owned();
        if let (Some(signal), Some(value)) = (rule["signal"].as_str(), rule["threshold"].as_f64()) {
            let threshold = Threshold { rule: text("name"), drop_when: text("drop_when"), value };
            found.entry(signal.to_owned()).or_default().push(threshold);
        }
    }
    found
}

/// How wide the bars of a signal are, known before its values are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scale {
    /// All the same, from 0 to 1.
    Fraction,
    /// `per_doubling` of them for each doubling of 1 + value / `unit`: for what may be of any size.
    Doubling { unit: f64, per_doubling: f64 },
}

impl Scale {
    fn of(signal: &str) -> Self {
        // What is none of the signals is a classifier's probability.
        let fraction = ["_fraction", "_score", "compression_ratio"].iter().any(|end| signal.ends_with(end))
            || SIGNALS.iter().all(|s| s.name != signal);
        match signal {
            _ if fraction => Self::Fraction,
            // Most texts have next to none of what a ratio counts, and thresholds are at a tenth or so.
            _ if signal.ends_with("_ratio") => Self::Doubling { unit: 1.0 / 64.0, per_doubling: 3.0 },
            _ if signal.ends_with("_count") => Self::Doubling { unit: 1.0, per_doubling: 2.0 },
            _ => Self::Doubling { unit: 1.0, per_doubling: 6.0 },
        }
    }
}

/// Bars of one signal.
struct Bars {
    scale: Scale,
    kept: Vec<u64>,
    dropped: Vec<u64>,
    missing: u64,
}

impl Bars {
    fn new(signal: &str) -> Self {
        Self { scale: Scale::of(signal), kept: Vec::new(), dropped: Vec::new(), missing: 0 }
    }

    fn add(&mut self, value: f64, kept: bool) {
        if !value.is_finite() {
            self.missing += 1;
            return;
        }
        let bar = match self.scale {
            Scale::Fraction => ((value.clamp(0.0, 1.0) * FRACTION_BARS as f64) as usize).min(FRACTION_BARS - 1),
            Scale::Doubling { unit, per_doubling } => ((1.0 + value.max(0.0) / unit).log2() * per_doubling) as usize,
        };
        if bar >= self.kept.len() {
            self.kept.resize(bar + 1, 0);
            self.dropped.resize(bar + 1, 0);
        }
        let counts = if kept { &mut self.kept } else { &mut self.dropped };
        counts[bar] += 1;
    }

    fn finish(mut self, thresholds: Vec<Threshold>, signal: String) -> Histogram {
        if self.scale == Scale::Fraction {
            self.kept.resize(FRACTION_BARS, 0);
            self.dropped.resize(FRACTION_BARS, 0);
        }
        let border = |bar: usize| match self.scale {
            Scale::Fraction => bar as f64 / FRACTION_BARS as f64,
            Scale::Doubling { unit, per_doubling } => ((bar as f64 / per_doubling).exp2() - 1.0) * unit,
        };
        let borders = (0..=self.kept.len()).map(border).collect();
        Histogram { signal, borders, kept: self.kept, dropped: self.dropped, missing: self.missing, thresholds }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fall_into_their_bars() {
        let mut bars = Bars::new("symbol_char_fraction");
        [0.0, 0.019, 0.02, 1.0, f64::NAN].into_iter().for_each(|value| bars.add(value, true));
        bars.add(0.5, false);
        let histogram = bars.finish(Vec::new(), "x".into());
        assert_eq!((histogram.kept[0], histogram.kept[1], histogram.kept[49]), (2, 1, 1));
        assert_eq!((histogram.dropped[25], histogram.missing, histogram.borders.len()), (1, 1, 51));

        for (signal, values) in [
            ("word_count", [0.0, 1.0, 3.0, 100.0]),
            ("hash_ratio", [0.0, 0.02, 0.1, 2.5]),
            ("mean_word_length", [2.9, 4.2, 4.9, 11.0]),
        ] {
            let mut bars = Bars::new(signal);
            values.into_iter().for_each(|value| bars.add(value, true));
            let histogram = bars.finish(Vec::new(), signal.into());
            for value in values {
                let bar = (0..histogram.kept.len()).find(|b| value < histogram.borders[b + 1]).unwrap();
                assert!(histogram.borders[bar] <= value + 1e-9 && histogram.kept[bar] == 1, "{signal}: {value}");
            }
        }
        // A classifier's column: a probability.
        assert_eq!(Scale::of("quality"), Scale::Fraction);
    }
}
