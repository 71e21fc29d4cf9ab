//! Recall and precision of near-duplicate search on real documents whose similarity is known exactly.
//!
//!     cargo bench --workspace --bench recall -- DOCUMENTS.jsonl.zst [SEEDS [compatible|fast]]
//!
//! The gold are all pairs of documents whose shingle sets (by the words of the mode) have a Jaccard similarity of at least 0.5,
//! counted by an index of the shingles. In every trial the pairs that share one of 14 bands are found, and the share of the
//! gold pairs among them is set against the S-curve, bin by bin. Pairs of one family of documents share shingles and so are found
//! together, but permutations are independent: the spread over the trials says how sure a mean is. A seed has 20 times the
//! bands, which are 20 trials; the sketch is looked at in the first. Recall is wanted within a point of the curve; a bin
//! `holds` or `fails` if its whole interval does, else it is `open` and needs more seeds.
#![allow(missing_docs, clippy::print_stdout)]

use std::collections::HashMap;
use std::io::BufRead;

use dedup::minhash::{
    MinHash, Mode, SKETCH_MARGIN, Scratch, candidate_probability, jaccard, positions_of_band, sketch_error,
    sketch_probability, sketch_similarity,
};

const BANDS: usize = 14;
const ROWS: usize = 8;
/// Trials of a seed.
const TRIALS: usize = 20;
const THRESHOLD: f64 = 0.75;
/// Bins of 0.05 from 0.5 on.
const BINS: usize = 10;
/// Points of recall that a bin may be from the curve.
const TOLERANCE: f64 = 1.0;
/// Standard errors above the threshold that an estimate must be for a pair to pass, to choose from.
const MARGINS: [f64; 5] = [0.0, 0.25, SKETCH_MARGIN, 0.75, 1.0];

fn bin_of(similarity: f64) -> usize {
    (((similarity - 0.5) * 20.0 + 1e-9) as usize).min(BINS - 1)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let [path, rest @ ..] = arguments.as_slice() else {
        println!("recall: give a file of documents, JSON lines compressed with zstd");
        return;
    };
    let seeds: u32 = rest.first().and_then(|n| n.parse().ok()).unwrap_or(20);
    let file = std::fs::File::open(path).expect("the file of documents");
    let lines = std::io::BufReader::new(zstd::Decoder::new(file).expect("zstd")).lines();
    let texts: Vec<String> = lines
        .map(|line| {
            let record: serde_json::Value = serde_json::from_str(&line.expect("text")).expect("JSON");
            record["text"].as_str().unwrap_or_default().to_string()
        })
        .collect();
    let modes = Mode::ALL.into_iter().filter(|mode| rest.get(1).is_none_or(|name| name == mode.name()));
    for mode in modes {
        table(mode, &texts, seeds);
    }
}

/// Passed pairs, those of them that are similar, and those that are nearly.
#[derive(Clone, Copy, Default)]
struct Passed {
    all: u64,
    similar: u64,
    close: u64,
}

impl Passed {
    fn add(&mut self, passes: bool, similarity: f64) {
        if passes {
            self.all += 1;
            self.similar += u64::from(similarity >= THRESHOLD);
            self.close += u64::from(similarity >= THRESHOLD - 0.05);
        }
    }

    fn print(&self, what: &str, candidates: &Self) {
        println!(
            "| {what} | {:.4} | {:.4} | {:.4} |",
            self.similar as f64 / self.all as f64,
            self.close as f64 / self.all as f64,
            self.similar as f64 / candidates.similar as f64
        );
    }
}

fn table(mode: Mode, texts: &[String], seeds: u32) {
    let sets = sets(mode, texts);
    let gold = gold(&sets);
    println!(
        "\n{}: {} documents, {} pairs of similarity 0.5 and more, {seeds} seeds of {TRIALS} trials\n",
        mode.name(),
        texts.len(),
        gold.len()
    );
    // Of every bin the share of its pairs that each trial finds.
    let mut by_trial = vec![Vec::new(); BINS];
    let bins: Vec<usize> = gold.iter().map(|g| bin_of(g.2)).collect();
    let sizes: Vec<usize> = (0..BINS).map(|bin| bins.iter().filter(|b| **b == bin).count()).collect();
    let (mut candidates, mut exact) = (Passed::default(), Passed::default());
    let mut sketched = [Passed::default(); MARGINS.len()];
    let (mut found, mut sketch_error_sum, mut sketch_bias) = (0u64, 0.0, 0.0);
    let by_pair: HashMap<(u32, u32), usize> = gold.iter().enumerate().map(|(i, g)| ((g.0, g.1), i)).collect();
    for seed in 1..=seeds {
        let minhash = MinHash::new(mode, 5, BANDS * TRIALS, ROWS, seed);
        let (mut scratch, mut keys, mut sketches) = (Scratch::default(), Vec::new(), Vec::new());
        let mut buckets: HashMap<(usize, u64), Vec<u32>> = HashMap::new();
        for (document, text) in texts.iter().enumerate() {
            keys.clear();
            let mut sketch = Vec::new();
            if minhash.band_keys(text, &mut scratch, &mut keys) {
                minhash.sketch(&mut scratch, &mut sketch);
            }
            sketches.push(sketch);
            keys.iter()
                .enumerate()
                .for_each(|(band, key)| buckets.entry((band, *key)).or_default().push(document as u32));
        }
        let mut met: Vec<Vec<((u32, u32), usize)>> = vec![Vec::new(); TRIALS];
        for ((band, _), bucket) in &buckets {
            for (i, &b) in bucket.iter().enumerate() {
                met[band / BANDS].extend(bucket[..i].iter().map(|&a| ((a, b), *band)));
            }
        }
        for (trial, mut met) in met.into_iter().enumerate() {
            met.sort_unstable();
            // The first band they share.
            met.dedup_by_key(|met| met.0);
            let mut hits = [0u32; BINS];
            for (pair, band) in met {
                let at = by_pair.get(&pair);
                if let Some(&at) = at {
                    hits[bins[at]] += 1;
                }
                if trial > 0 {
                    continue;
                }
                // Below 0.5 the similarity is not in the gold: below the threshold it is all the same.
                let similarity = at.map_or(0.0, |&at| gold[at].2);
                candidates.add(true, similarity);
                let (a, b) = (pair.0 as usize, pair.1 as usize);
                exact.add(jaccard(&sets[a], &sets[b]) >= THRESHOLD, similarity);
                let agreed = positions_of_band(band, ROWS);
                let estimate = sketch_similarity(&sketches[a], &sketches[b], agreed);
                for (passed, margin) in sketched.iter_mut().zip(MARGINS) {
                    passed.add(estimate >= THRESHOLD + margin * sketch_error(THRESHOLD, agreed), similarity);
                }
                if at.is_some() {
                    found += 1;
                    sketch_error_sum += (estimate - similarity).powi(2);
                    sketch_bias += estimate - similarity;
                }
            }
            let share = |bin: usize| 100.0 * f64::from(hits[bin]) / sizes[bin].max(1) as f64;
            by_trial.iter_mut().enumerate().for_each(|(bin, shares)| shares.push(share(bin)));
        }
    }
    println!("| Jaccard | pairs | expected % | found %, ± 95% | difference | within a point |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for bin in 0..BINS {
        let low = 0.5 + 0.05 * bin as f64;
        let n = sizes[bin].max(1) as f64;
        let inside = (0..gold.len()).filter(|&i| bins[i] == bin);
        let expected = 100.0 * inside.map(|i| candidate_probability(gold[i].2, BANDS, ROWS)).sum::<f64>() / n;
        let trials = by_trial[bin].len() as f64;
        let hit = by_trial[bin].iter().sum::<f64>() / trials;
        let variance = by_trial[bin].iter().map(|share| (share - hit).powi(2)).sum::<f64>() / (trials - 1.0);
        let sure = 1.96 * (variance / trials).sqrt();
        let off = (hit - expected).abs();
        let verdict = if off + sure <= TOLERANCE {
            "holds"
        } else if off - sure > TOLERANCE {
            "fails"
        } else {
            "open"
        };
        println!(
            "| {low:.2}–{:.2} | {} | {expected:.2} | {hit:.2} ± {sure:.2} | {:+.2} | {verdict} |",
            low + 0.05,
            sizes[bin],
            hit - expected
        );
    }
    println!("\n| verification at {THRESHOLD} | precision | at {THRESHOLD} − 0.05 | recall of similar candidates |");
    println!("| --- | --- | --- | --- |");
    candidates.print("none", &candidates);
    for (passed, margin) in sketched.iter().zip(MARGINS) {
        let chosen = if margin == SKETCH_MARGIN { " (chosen)" } else { "" };
        passed.print(&format!("sketch, {margin} standard errors above{chosen}"), &candidates);
    }
    exact.print("exact", &candidates);
    // What the noise of the sketch alone comes to, pair by pair.
    let passes =
        |g: &(u32, u32, f64)| candidate_probability(g.2, BANDS, ROWS) * sketch_probability(g.2, THRESHOLD, ROWS);
    let all: f64 = gold.iter().map(passes).sum();
    let right: f64 = gold.iter().filter(|g| g.2 >= THRESHOLD).map(passes).sum();
    println!(
        "\nsketch: precision of the chosen margin by its noise alone {:.4}; root mean square error {:.4}, mean error {:+.4}",
        right / all,
        (sketch_error_sum / found as f64).sqrt(),
        sketch_bias / found as f64
    );
}

/// The shingle set of every text, sorted.
fn sets(mode: Mode, texts: &[String]) -> Vec<Vec<u64>> {
    let minhash = MinHash::new(mode, 5, 1, 1, 1);
    let mut scratch = Scratch::default();
    let set = |text: &String| {
        let mut set = minhash.shingles(text, &mut scratch).to_vec();
        set.sort_unstable();
        set.dedup();
        set
    };
    texts.iter().map(set).collect()
}

/// Every pair with a Jaccard similarity of at least 0.5, by an index of the shingles.
fn gold(sets: &[Vec<u64>]) -> Vec<(u32, u32, f64)> {
    let mut holders: HashMap<u64, Vec<u32>> = HashMap::new();
    let mut pairs = Vec::new();
    for (document, set) in sets.iter().enumerate() {
        let mut common: HashMap<u32, usize> = HashMap::new();
        for shingle in set {
            let holders = holders.entry(*shingle).or_default();
            holders.iter().for_each(|other| *common.entry(*other).or_default() += 1);
            holders.push(document as u32);
        }
        for (other, both) in common {
            let similarity = both as f64 / (set.len() + sets[other as usize].len() - both) as f64;
            if similarity >= 0.5 {
                pairs.push((other, document as u32, similarity));
            }
        }
    }
    pairs.sort_unstable_by_key(|p| (p.0, p.1));
    pairs
}
