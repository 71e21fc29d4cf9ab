//! What near-duplicate removal will find and cost, before anything runs.

use serde::Serialize;

use super::{NearConfig, Verify, clusters, pairs, sets, signatures};
use crate::disk::EXPECTED_DUPLICATES;
use crate::minhash::{candidate_probability, sketch_probability};
use crate::runs::{Pair, Record};

/// A point of the S-curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CurvePoint {
    /// Jaccard similarity of two documents.
    pub similarity: f64,
    /// Probability that they share a band: the expected recall at that similarity.
    pub found: f64,
    /// The same after verification: nothing below the threshold of an exact one is kept, and of a sketch what passes.
    pub kept: f64,
}

/// Disk that a stage takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageBytes {
    /// Stage name.
    pub stage: String,
    /// Bytes it writes, about.
    pub bytes: u64,
}

/// Expectation for a corpus.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Documents of the corpus.
    pub documents: u64,
    /// Bytes of text of a document.
    pub bytes_per_document: u64,
    /// Share of the documents that are taken to be in pairs.
    pub expected_duplicates: f64,
    /// Similarity at which half of the pairs are found.
    pub half_found_at: f64,
    /// The S-curve from 0.5 to 1.
    pub curve: Vec<CurvePoint>,
    /// Disk by stage.
    pub disk: Vec<StageBytes>,
    /// Disk in all.
    pub disk_bytes: u64,
    /// Bytes that signatures write for a document.
    pub signature_bytes_per_document: f64,
    /// Tasks of `near_pairs`.
    pub pair_tasks: u64,
    /// Bytes a task of `near_pairs` holds: there are as many at a time as the memory limit has room for.
    pub memory_per_thread_bytes: u64,
    /// Bytes of the union-find, which lies in a file where the memory limit has no room.
    pub union_find_bytes: u64,
}

/// What `config` means for `documents` documents of `bytes_per_document` bytes of text.
pub fn estimate(config: &NearConfig, documents: u64, bytes_per_document: u64) -> Estimate {
    let (bands, rows) = (config.bands as usize, config.rows as usize);
    let curve = (10..=20)
        .map(|twentieth| {
            let similarity = f64::from(twentieth) / 20.0;
            let found = candidate_probability(similarity, bands, rows);
            let passes = match config.verify {
                Verify::None => 1.0,
                Verify::Sketch => sketch_probability(similarity, config.threshold, rows),
                Verify::Exact => f64::from(u8::from(similarity >= config.threshold)),
            };
            let kept = found * passes;
            CurvePoint { similarity, found, kept }
        })
        .collect();
    let duplicates = documents as f64 * EXPECTED_DUPLICATES;
    let signatures = signatures::predicted_bytes(config, documents);
    let pairs = pairs::predicted_bytes(config, documents);
    let mut disk = vec![("near_signatures", signatures), ("near_pairs", pairs)];
    if config.verify == Verify::Exact {
        // The first of a pair is a candidate, too.
        disk.push(("near_sets", sets::predicted_bytes(2.0 * duplicates, bytes_per_document as f64)));
    }
    let (pair_tasks, memory_per_thread_bytes) = pairs::tasks_and_bytes(config, documents);
    let pair = Pair::BYTES as f64;
    if config.verify != Verify::None {
        disk.push(("near_verified", (duplicates * pair) as u64));
    }
    disk.push(("near_clusters", (duplicates * pair) as u64));
    disk.push(("near_removals", (duplicates * crate::removals::ROW_BYTES) as u64));
    Estimate {
        documents,
        bytes_per_document,
        expected_duplicates: EXPECTED_DUPLICATES,
        half_found_at: (1.0 - 0.5f64.powf(1.0 / bands as f64)).powf(1.0 / rows as f64),
        curve,
        disk_bytes: disk.iter().map(|d| d.1).sum(),
        disk: disk.into_iter().map(|(stage, bytes)| StageBytes { stage: stage.into(), bytes }).collect(),
        signature_bytes_per_document: signatures as f64 / documents.max(1) as f64,
        pair_tasks,
        memory_per_thread_bytes,
        union_find_bytes: clusters::union_find_bytes(documents),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Mode;

    #[test]
    fn an_estimate_is_the_published_curve_and_the_width_of_the_records() {
        let config = NearConfig { mode: Mode::Fast, verify: Verify::Exact, ..NearConfig::default() };
        let plan = estimate(&config, 100_000_000, 5000);
        let at = |similarity: f64| plan.curve.iter().find(|p| (p.similarity - similarity).abs() < 1e-9).unwrap();
        assert!((at(0.8).found - 0.92).abs() < 0.01 && at(0.7).kept == 0.0 && at(1.0).kept == 1.0);
        assert!((candidate_probability(plan.half_found_at, 14, 8) - 0.5).abs() < 1e-9, "{}", plan.half_found_at);
        let sketched = estimate(&NearConfig { verify: Verify::Sketch, ..config.clone() }, 1000, 5000);
        let kept = |twentieth: usize| sketched.curve[twentieth - 10].kept / sketched.curve[twentieth - 10].found;
        // At the threshold a third of the pairs pass: it is half a standard error below what an estimate must come to. On
        // either side all or none but for the noise of the sketch.
        assert!((0.2..0.4).contains(&kept(15)) && kept(12) < 0.01 && kept(18) > 0.99 && kept(20) == 1.0);
        // 14 keys of 10 bytes with an eighth of a byte of directory, 8 bytes and a sketch of 48.
        assert!((196.0..=200.0).contains(&plan.signature_bytes_per_document));
        assert_eq!(plan.union_find_bytes, 400_000_000);
        // 30% of the documents in pairs of 10 bytes in each band, and twice 5 bytes of their documents for the sets.
        let pairs = |verify| {
            let plan = estimate(&NearConfig { verify, ..config.clone() }, 1_000_000, 5000);
            plan.disk.iter().find(|stage| stage.stage == "near_pairs").unwrap().bytes
        };
        assert_eq!(pairs(Verify::Sketch), 300_000 * 14 * 10);
        assert_eq!(pairs(Verify::Exact), 300_000 * 14 * 20);
        // A task holds 2²¹ keys twice over, 16 bytes each, with buffers of pairs and candidates; of 2³¹ documents sixteen times the
        // keys, and no more tasks.
        assert_eq!((plan.pair_tasks, plan.memory_per_thread_bytes), (14 * 64, (64 << 20) + (24 << 20)));
        let large = estimate(&config, 1 << 31, 5000);
        assert_eq!((large.pair_tasks, large.memory_per_thread_bytes), (14 * 64, (1 << 30) + (24 << 20)));
        assert!(estimate(&config, 1000, 5000).memory_per_thread_bytes < 100_000);
        assert_eq!(estimate(&config, 1 << 33, 1).union_find_bytes, 8 << 33);
    }
}
