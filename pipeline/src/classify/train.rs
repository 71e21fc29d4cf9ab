//! Training of [`Linear`]: stochastic gradient descent with steps per weight (AdaGrad), calibration on documents held
//! out by hash. One thread, one order: the same examples and settings give the same bytes.

use std::collections::BTreeMap;

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::features;
use super::linear::{Calibration, Header, Linear};

/// Seed of the hash that chooses examples: what is kept must say nothing of what is held out.
const SAMPLE_SEED: u64 = 0x73_61_6d_70_6c_65;

/// How to train.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainSettings {
    /// 2^bits weights.
    pub bits: u32,
    /// Words of the longest n-grams.
    pub ngrams: usize,
    /// Passes over the examples.
    pub epochs: u32,
    /// First step of a weight.
    pub rate: f64,
    /// Fraction of the examples that calibrate and measure instead of training.
    pub held_out: f64,
    /// Seed of the order and of what is held out.
    pub seed: u64,
}

impl Default for TrainSettings {
    fn default() -> Self {
        Self { bits: 20, ngrams: 2, epochs: 5, rate: 0.5, held_out: 0.1, seed: 0 }
    }
}

/// A text and whether it is of the positive kind, as features: 4 bytes each.
pub struct Example {
    features: Vec<u32>,
    positive: bool,
    hash: u64,
}

impl Example {
    /// Of `text`, for training with `settings`; none for a text without words.
    pub fn new(text: &str, positive: bool, settings: &TrainSettings) -> Option<Self> {
        let mut found = Vec::new();
        features::for_each(text, settings.ngrams, settings.bits, &mut Vec::new(), |feature| found.push(feature));
        // As many are kept as memory was counted for, and no more.
        found.shrink_to_fit();
        let hash = hash(text, settings);
        (!found.is_empty()).then_some(Self { features: found, positive, hash })
    }

    /// Whether it calibrates and measures instead of training.
    fn held_out(&self, settings: &TrainSettings) -> bool {
        self.hash < (settings.held_out * u64::MAX as f64) as u64
    }
}

/// Decides whether a text is held out, and the order of training.
fn hash(text: &str, settings: &TrainSettings) -> u64 {
    xxh3_64_with_seed(text.as_bytes(), settings.seed)
}

/// Examples of one kind in memory that does not grow with the texts: of all that are added those `most` of the smallest
/// keys, which are hashes, so that it does not matter in what order they come. Keys are hashes of the hash that holds examples
/// out: by that one itself the smallest, which are kept, would be those that are held out.
pub struct Examples {
    positive: bool,
    settings: TrainSettings,
    most: usize,
    /// By key, then by number, so that equal texts have places of their own.
    kept: BTreeMap<(u64, u64), Example>,
    texts: u64,
}

impl Examples {
    /// None yet.
    pub fn new(positive: bool, most: usize, settings: TrainSettings) -> Self {
        Self { positive, settings, most, kept: BTreeMap::new(), texts: 0 }
    }

    /// Looks at one more text.
    pub fn add(&mut self, text: &str) {
        self.texts += 1;
        let key = Self::key(hash(text, &self.settings));
        let full = self.kept.len() >= self.most;
        if full && self.kept.last_key_value().is_none_or(|((largest, _), _)| key >= *largest) {
            return;
        }
        let Some(example) = Example::new(text, self.positive, &self.settings) else { return };
        self.kept.insert((key, self.texts), example);
        if full {
            self.kept.pop_last();
        }
    }

    /// By what a text of this hash is chosen.
    fn key(hash: u64) -> u64 {
        xxh3_64_with_seed(&hash.to_le_bytes(), SAMPLE_SEED)
    }

    /// Texts that were looked at.
    pub fn texts(&self) -> u64 {
        self.texts
    }

    /// Examples that are kept.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// The examples in the order in which they came.
    pub fn finish(self) -> Vec<Example> {
        let mut examples: Vec<_> = self.kept.into_iter().map(|((_, number), example)| (number, example)).collect();
        examples.sort_by_key(|(number, _)| *number);
        examples.into_iter().map(|(_, example)| example).collect()
    }
}

/// How good the classifier is on the examples held out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TrainReport {
    /// Examples it was trained on.
    pub trained: usize,
    /// Examples held out, of which the rest speaks.
    pub held_out: usize,
    /// Fraction on the right side of one half.
    pub accuracy: f64,
    /// Probability that a positive one scores higher than a negative one.
    pub auc: f64,
    /// Mean over ten bins of the difference between probability and frequency, weighted by examples.
    pub calibration_error: f64,
    /// The same without calibration.
    pub uncalibrated_error: f64,
}

/// Trains a classifier.
///
/// # Errors
/// What the examples lack.
pub fn train(examples: &[Example], settings: &TrainSettings) -> Result<(Linear, TrainReport), String> {
    if !(1..=28).contains(&settings.bits) || !(1..=5).contains(&settings.ngrams) {
        return Err("weights are numbered by 1 to 28 bits, and n-grams have 1 to 5 words".into());
    }
    if !(settings.held_out > 0.0 && settings.held_out < 0.9) {
        return Err(format!("{} of the examples cannot be held out: above 0 and below 0.9", settings.held_out));
    }
    let (held, used): (Vec<&Example>, Vec<&Example>) = examples.iter().partition(|e| e.held_out(settings));
    for (set, name) in [(&used, "to train on"), (&held, "held out")] {
        let positive = set.iter().filter(|e| e.positive).count();
        if positive == 0 || positive == set.len() {
            return Err(format!(
                "of the {} examples {name}, {positive} are positive: both kinds are needed, give more examples",
                set.len()
            ));
        }
    }
    let mut weights = vec![0f32; 1 << settings.bits];
    let mut steps = vec![0f32; weights.len()];
    let (mut intercept, mut intercept_step) = (0f64, 0f64);
    let mut order: Vec<usize> = (0..used.len()).collect();
    for epoch in 0..settings.epochs {
        let key = |at: &usize| (xxh3_64_with_seed(&used[*at].hash.to_le_bytes(), u64::from(epoch) + 1), *at);
        order.sort_by_cached_key(key);
        for at in &order {
            let example = used[*at];
            let scale = 1.0 / (example.features.len() as f64).sqrt();
            let sum: f64 = example.features.iter().map(|f| f64::from(weights[*f as usize])).sum();
            let slope = sigmoid(intercept + sum * scale) - f64::from(u8::from(example.positive));
            intercept_step += slope * slope;
            intercept -= settings.rate * slope / intercept_step.sqrt().max(1e-8);
            let gradient = (slope * scale) as f32;
            let rate = settings.rate as f32;
            for feature in &example.features {
                let feature = *feature as usize;
                steps[feature] += gradient * gradient;
                weights[feature] -= rate * gradient / (steps[feature].sqrt() + 1e-6);
            }
        }
    }
    let header = Header {
        bits: settings.bits,
        ngrams: settings.ngrams,
        intercept,
        calibration: Calibration { slope: 1.0, offset: 0.0 },
    };
    let mut model = Linear { header, weights };
    let scored: Vec<(f64, bool)> = held.iter().map(|example| (score(&model, example), example.positive)).collect();
    let uncalibrated_error = calibration_error(&scored, model.header.calibration);
    // Fitted on one half, measured on the other, then fitted on all.
    let (first, second): (Vec<_>, Vec<_>) = scored.iter().enumerate().partition(|(at, _)| at % 2 == 0);
    let halves = [first, second].map(|half| half.into_iter().map(|(_, scored)| *scored).collect::<Vec<_>>());
    let calibration_error = calibration_error(&halves[1], platt(&halves[0]));
    model.header.calibration = platt(&scored);
    let right = scored.iter().filter(|(s, positive)| (model.calibration().probability(*s) >= 0.5) == *positive).count();
    let report = TrainReport {
        trained: used.len(),
        held_out: held.len(),
        accuracy: right as f64 / scored.len() as f64,
        auc: auc(&scored),
        calibration_error,
        uncalibrated_error,
    };
    Ok((model, report))
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn score(model: &Linear, example: &Example) -> f64 {
    let sum: f64 = example.features.iter().map(|f| f64::from(model.weights[*f as usize])).sum();
    model.header.intercept + sum / (example.features.len() as f64).sqrt()
}

/// Slope and offset of least log loss, by Newton's method, with Platt's targets that are never quite 0 and 1.
fn platt(scored: &[(f64, bool)]) -> Calibration {
    let positive = scored.iter().filter(|(_, p)| *p).count() as f64;
    let negative = scored.len() as f64 - positive;
    let targets = ((positive + 1.0) / (positive + 2.0), 1.0 / (negative + 2.0));
    let target = |p: bool| if p { targets.0 } else { targets.1 };
    let loss = |c: Calibration| -> f64 {
        scored
            .iter()
            .map(|(s, p)| {
                let (x, t) = (c.slope * s + c.offset, target(*p));
                // log(1 + e^x) − t x, without overflow.
                x.max(0.0) + (-x.abs()).exp().ln_1p() - t * x
            })
            .sum()
    };
    let mut best = Calibration { slope: 1.0, offset: 0.0 };
    let mut least = loss(best);
    for _ in 0..100 {
        let (mut gs, mut go, mut hss, mut hso, mut hoo) = (0.0, 0.0, 1e-9, 0.0, 1e-9);
        for (s, p) in scored {
            let probability = best.probability(*s);
            let (d, w) = (probability - target(*p), probability * (1.0 - probability));
            gs += d * s;
            go += d;
            hss += w * s * s;
            hso += w * s;
            hoo += w;
        }
        let determinant = hss * hoo - hso * hso;
        if determinant.abs() < 1e-12 {
            break;
        }
        let (ds, d_o) = ((hoo * gs - hso * go) / determinant, (hss * go - hso * gs) / determinant);
        let mut step = 1.0;
        let mut moved = false;
        while step > 1e-6 {
            let next = Calibration { slope: best.slope - step * ds, offset: best.offset - step * d_o };
            let found = loss(next);
            if found < least - 1e-12 {
                (best, least, moved) = (next, found, true);
                break;
            }
            step /= 2.0;
        }
        if !moved {
            break;
        }
    }
    best
}

fn auc(scored: &[(f64, bool)]) -> f64 {
    let mut sorted = scored.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let positive = sorted.iter().filter(|(_, p)| *p).count() as f64;
    let negative = sorted.len() as f64 - positive;
    let (mut wins, mut below, mut at) = (0.0, 0.0, 0);
    while at < sorted.len() {
        let end = at + sorted[at..].iter().take_while(|(s, _)| *s == sorted[at].0).count();
        let here = sorted[at..end].iter().filter(|(_, p)| *p).count() as f64;
        let others = (end - at) as f64 - here;
        wins += here * (below + others / 2.0);
        below += others;
        at = end;
    }
    wins / (positive * negative)
}

fn calibration_error(scored: &[(f64, bool)], calibration: Calibration) -> f64 {
    let mut bins = [(0.0, 0.0, 0.0); 10];
    for (score, positive) in scored {
        let probability = calibration.probability(*score);
        let bin = &mut bins[((probability * 10.0) as usize).min(9)];
        bin.0 += probability;
        bin.1 += f64::from(u8::from(*positive));
        bin.2 += 1.0;
    }
    bins.iter().map(|(p, f, _)| (p - f).abs()).sum::<f64>() / scored.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::super::linear::LinearScratch;
    use super::*;

    fn examples(settings: &TrainSettings, count: usize) -> Vec<Example> {
        let mut examples = Vec::new();
        for n in 0..count {
            let positive = n % 3 != 0;
            // Words of both kinds in all, a few more of its own in each.
            let own = if positive { ["theorem", "river", "garden"] } else { ["casino", "bonus", "click"] };
            let text: Vec<String> =
                (0..30)
                    .map(|k| {
                        if (k + n) % 5 == 0 {
                            own[(k + n) % 3].to_owned()
                        } else {
                            format!("w{}", (k * 7 + n * 13) % 97)
                        }
                    })
                    .collect();
            examples.extend(Example::new(&text.join(" "), positive, settings));
        }
        examples
    }

    #[test]
    fn two_kinds_are_told_apart_and_a_file_keeps_the_model() {
        let settings = TrainSettings { bits: 16, ..TrainSettings::default() };
        let examples = examples(&settings, 900);
        let (model, report) = train(&examples, &settings).unwrap();
        assert!(report.accuracy > 0.97 && report.auc > 0.99 && report.calibration_error < 0.1, "{report:?}");
        assert_eq!(report.trained + report.held_out, 900);
        let (again, _) = train(&examples, &settings).unwrap();
        assert_eq!(model, again, "the same bytes every time");

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        model.save(&path).unwrap();
        let loaded = Linear::load(&path).unwrap();
        assert_eq!(loaded, model);
        let scratch = &mut LinearScratch::default();
        let good = loaded.probability("The theorem, the river & the garden", scratch).unwrap();
        let bad = loaded.probability("casino bonus click", scratch).unwrap();
        assert!(good > 0.8 && bad < 0.2, "{good} {bad}");
        assert_eq!(loaded.probability(" ... ", scratch), None);

        let mut bytes = std::fs::read(&path).unwrap();
        bytes[100] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert!(Linear::load(&path).unwrap_err().to_string().contains("damaged"));
        std::fs::write(&path, "{}").unwrap();
        assert!(Linear::load(&path).unwrap_err().to_string().contains("neither a classifier"));
    }

    #[test]
    fn a_sample_is_the_same_in_any_order_and_whole_where_there_is_room() {
        let settings = TrainSettings { bits: 12, ..TrainSettings::default() };
        let text = |n: u64| format!("word{n} of text {n}");
        let sample = |most: usize, order: &mut dyn Iterator<Item = u64>| {
            let mut examples = Examples::new(true, most, settings);
            order.for_each(|n| examples.add(&text(n)));
            assert_eq!((examples.texts(), examples.len()), (200, most.min(200)));
            examples.finish().into_iter().map(|e| (e.hash, e.features)).collect::<Vec<_>>()
        };
        let forward = sample(30, &mut (0..200));
        let mut backward = sample(30, &mut (0..200).rev());
        backward.reverse();
        assert_eq!(forward, backward);
        let whole = sample(1000, &mut (0..200));
        let all: Vec<Example> = (0..200).filter_map(|n| Example::new(&text(n), true, &settings)).collect();
        assert_eq!(whole, all.into_iter().map(|e| (e.hash, e.features)).collect::<Vec<_>>());
        let mut keys: Vec<u64> = whole.iter().map(|(hash, _)| Examples::key(*hash)).collect();
        keys.sort_unstable();
        assert!(forward.iter().all(|(hash, _)| Examples::key(*hash) <= keys[29]));

        let mut none = Examples::new(true, 0, settings);
        none.add("a text");
        assert!(none.is_empty() && none.finish().is_empty());
    }

    #[test]
    fn a_sample_says_nothing_of_what_is_held_out() {
        const MOST: usize = 1000;
        let settings = TrainSettings { bits: 12, epochs: 1, ..TrainSettings::default() };
        // Both kinds far above what is kept, then each alone.
        for (positive, negative) in [(20 * MOST, 30 * MOST), (20 * MOST, 600), (600, 20 * MOST)] {
            let mut examples = Vec::new();
            for (count, kind, word) in [(positive, true, "theorem"), (negative, false, "casino")] {
                let mut sample = Examples::new(kind, MOST, settings);
                (0..count).for_each(|n| sample.add(&format!("{word} {n}")));
                let kept = sample.finish();
                assert_eq!(kept.len(), count.min(MOST));
                let held = kept.iter().filter(|e| e.held_out(&settings)).count() as f64 / kept.len() as f64;
                assert!((held - 0.1).abs() < 0.03, "{held} of the kept {word} of {count} are held out");
                examples.extend(kept);
            }
            let (_, report) = train(&examples, &settings).unwrap();
            assert_eq!(report.trained + report.held_out, examples.len());
            let held = report.held_out as f64 / examples.len() as f64;
            assert!((held - 0.1).abs() < 0.02, "{positive} and {negative}: {report:?}");
        }
    }

    #[test]
    fn examples_of_one_kind_are_refused() {
        let settings = TrainSettings::default();
        let one: Vec<Example> = (0..50).filter_map(|n| Example::new(&format!("word {n}"), true, &settings)).collect();
        assert!(train(&one, &settings).unwrap_err().contains("both kinds are needed"));
        assert!(train(&[], &settings).is_err());
        assert!(Example::new("...", true, &settings).is_none());
    }

    #[test]
    fn auc_and_calibration_by_hand() {
        assert_eq!(auc(&[(0.1, false), (0.2, true)]), 1.0);
        assert_eq!(auc(&[(0.2, false), (0.1, true)]), 0.0);
        assert_eq!(auc(&[(0.5, false), (0.5, true)]), 0.5);
        assert_eq!(auc(&[(1.0, true), (2.0, false), (3.0, true)]), 0.5);
        // At score 0 half are positive, so the probability there is one half whatever the slope.
        let scored: Vec<(f64, bool)> =
            (0..100).map(|n| (f64::from(n % 5) - 2.0, n % 5 > 2 || (n % 5 == 2 && n % 2 == 0))).collect();
        let fitted = platt(&scored);
        assert!((fitted.probability(0.0) - 0.5).abs() < 0.01 && fitted.slope > 1.0, "{fitted:?}");
        assert!(calibration_error(&scored, fitted) < 0.05);
    }
}
