//! Near-duplicate removal: MinHash, locality-sensitive hashing in bands, verification, clusters by
//! union-find.
//!
//! | stage | task | output |
//! | --- | --- | --- |
//! | `near_signatures` | document shard | runs: band keys by band; a table of the documents with a sketch |
//! | `near_pairs` | band × partition of its keys | runs: pairs (smallest document of a bucket, another) |
//! | `near_sets` (`verify = "exact"`) | document shard | shingle sets of the documents in pairs |
//! | `near_verified` (`sketch`, `exact`) | partition of the pairs | runs: pairs that are similar |
//! | `near_clusters` | one | runs: pairs (smallest document of a cluster, another) |
//! | `near_removals` | partition of the clusters | Parquet: `ordinal`, `survivor`, `cluster_id`, `similarity`, `survivor_index`; the same in runs |
//! | `near` | document shard | selection `id`, `ordinal`; dropped with `rule`, `cluster_id`, `survivor`, `similarity` |
//!
//! Text is read once, by the signatures (and again by `near_sets`, of shards with candidates). What grows
//! with the corpus is in sorted runs on disk (`runs.rs`); a task holds a partition of some two million records at
//! a time, of up to 2²⁵ beyond 2²⁷ documents. In memory stays one number a document, in `near_clusters`: 4 bytes, 8 beyond 2³² documents,
//! and in a file where the memory limit has no room for it; and 4 bytes a document of a group of more than a million in `near_verified`.
//!
//! `against` puts the signatures of older runs before those of this one: keys are grouped together, so the
//! clusters are those of a joint run, and the removals of this run's documents are kept. Old text is
//! not read.

use std::path::PathBuf;
use std::sync::Arc;

use pipeline::{Error, Result, Stage};
use serde::{Deserialize, Serialize};

use crate::minhash::{MinHash, Mode, SKETCH_BYTES, positions_of_band, sketch_bound};
use crate::paths::{Places, indices};
use crate::removals::{Removals, Similarity};
use crate::selection::Selection;
use crate::survivor::Keep;
use crate::texts::Texts;

mod clusters;
mod estimate;
mod pairs;
mod sets;
mod signatures;
mod verify;

pub use estimate::{CurvePoint, Estimate, StageBytes, estimate};
pub(crate) use sets::Sets;
pub use signatures::SignatureWriter;

pub(crate) const SIGNATURES: &str = "near_signatures";
pub(crate) const PAIRS: &str = "near_pairs";
pub(crate) const SETS: &str = "near_sets";
pub(crate) const VERIFIED: &str = "near_verified";
pub(crate) const CLUSTERS: &str = "near_clusters";
pub(crate) const REMOVALS: &str = "near_removals";

/// Pairs are tagged with their band, below this.
const MOST_BANDS: u32 = 256;

/// Bands that candidates of verification can have: they are kept as bits.
const MOST_VERIFIED_BANDS: u32 = 128;

/// How candidates are looked at again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verify {
    /// Not at all: a common band is enough, as in datatrove.
    #[default]
    None,
    /// By the similarity of the sketches, whose standard error at 0.75 is 0.038. So that few pairs below the threshold pass,
    /// an estimate must be half a standard error above it.
    Sketch,
    /// By the Jaccard similarity of the shingle sets. Reads the text of shards with candidates again, and so is refused together with
    /// `against`, which reads no old text: an index has the sketches of all its documents and the shingles of none.
    Exact,
}

/// Near-duplicate removal in a recipe. The defaults are FineWeb's setting.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NearConfig {
    /// Definition of the signature.
    pub mode: Mode,
    /// Words in a shingle, at least 1.
    pub ngram: u32,
    /// Bands, 1 to 255.
    pub bands: u32,
    /// Permutations in a band, at least 1.
    pub rows: u32,
    /// Seed of the permutations.
    pub seed: u32,
    /// How candidates are verified.
    pub verify: Verify,
    /// Similarity that a verified pair has at least, 0 to 1.
    pub threshold: f64,
    /// Which member of a cluster survives.
    pub keep: Keep,
    /// `near_signatures` directories of older runs, `*` for any part of a name: documents near one of
    /// theirs go, too. Relative to the recipe's base directory.
    pub against: Vec<String>,
}

impl Default for NearConfig {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            ngram: 5,
            bands: 14,
            rows: 8,
            seed: 1,
            verify: Verify::default(),
            threshold: 0.75,
            keep: Keep::default(),
            against: Vec::new(),
        }
    }
}

impl NearConfig {
    /// Refuse a setting that has no meaning.
    pub fn check(&self) -> Result<()> {
        let refuse = |key: &str, what: &str| Err(Error::setting(format!("near.{key}"), what));
        if self.ngram == 0 {
            return refuse("ngram", "must be at least 1");
        }
        if self.rows == 0 {
            return refuse("rows", "must be at least 1");
        }
        if !(1..=255).contains(&self.bands) {
            return refuse("bands", "must be 1 to 255");
        }
        if self.bands.saturating_mul(self.rows) > 4096 {
            return refuse("rows", "bands × rows must be at most 4096");
        }
        if !(0.0..=1.0).contains(&self.threshold) {
            return refuse("threshold", "must be 0 to 1");
        }
        if self.verify != Verify::None && self.bands > MOST_VERIFIED_BANDS {
            return refuse("verify", "takes at most 128 bands");
        }
        if self.verify == Verify::Exact && !self.against.is_empty() {
            return refuse(
                "verify",
                "exact compares the shingles of both documents, and an index of against has none: its text is not read, and its \
                 pairs were not those of today. Use verify = \"sketch\", which compares what the index has, or deduplicate the \
                 old documents and the new ones in one run",
            );
        }
        Ok(())
    }

    /// The signature of these settings.
    pub fn minhash(&self) -> MinHash {
        MinHash::new(self.mode, self.ngram as usize, self.bands as usize, self.rows as usize, self.seed)
    }

    /// Of two documents that share band `band`: the positions of their sketches that agree for that, and what the others must
    /// come to.
    fn bound(&self, band: usize) -> (usize, f64) {
        let agreed = positions_of_band(band, self.rows as usize);
        (agreed, sketch_bound(self.threshold, agreed))
    }

    /// Bytes of a document's row in the table of documents.
    pub(crate) fn row_bytes(&self) -> usize {
        crate::documents::ROW_BYTES + self.keep.row_bytes() + SKETCH_BYTES
    }

    /// What signatures depend on: of an older index it must be the same.
    pub(crate) fn signature(&self) -> serde_json::Value {
        let Self { mode, ngram, bands, rows, seed, .. } = self;
        let mut value = serde_json::json!({ "mode": mode, "ngram": ngram, "bands": bands, "rows": rows, "seed": seed });
        // Not the other policies: they need no new signatures.
        if let (Some(_), Some(map)) = (self.keep.expression(), value.as_object_mut()) {
            map.insert("keep".into(), serde_json::json!(self.keep));
        }
        value
    }
}

/// The stages of near-duplicate removal among the documents of `selection` (all, if `None`), whose
/// text is in stage `documents` and whose signals, if there are any, in stage `signals`. The last is called
/// `near`. Older runs are looked for in `places`.
pub fn near_stages<'a>(
    config: &NearConfig,
    documents: &str,
    selection: Option<&str>,
    signals: Option<&str>,
    places: impl Into<Places<'a>>,
) -> Result<Vec<Arc<dyn Stage>>> {
    config.check()?;
    let against = indices("near.against", &config.against, places.into())?;
    let texts = Texts::new(documents, selection);
    let signals = signals.filter(|_| config.keep.expression().is_some()).map(Into::into);
    let signatures = signatures::Signatures::new(config.clone(), texts.clone(), signals);
    let sets = sets::SetStage { config: config.clone(), texts: texts.clone() };
    let mut stages: Vec<Arc<dyn Stage>> = vec![Arc::new(signatures)];
    stages.extend(clustering(config, &against, Some(sets)));
    stages.push(selection_stage(texts.chosen(), &against));
    Ok(stages)
}

/// The last stage, `near`: of the documents of stage `selection`, of which it reads `id` and `ordinal`, those that are not in
/// `near_removals`. `against` are the older indices that those were made with.
pub fn selection_stage(selection: &str, against: &[PathBuf]) -> Arc<dyn Stage> {
    Arc::new(Selection {
        name: "near".into(),
        rule: "near_duplicate",
        selection: selection.into(),
        removals: REMOVALS.into(),
        against: against.to_vec(),
    })
}

/// The stages from signatures, which a stage `near_signatures` has written with [`SignatureWriter`], to
/// `near_removals`: everything that needs no text.
pub fn clustering_stages(config: &NearConfig) -> Result<Vec<Arc<dyn Stage>>> {
    config.check()?;
    if config.verify == Verify::Exact {
        return Err(Error::Recipe("near: exact verification needs text".into()));
    }
    Ok(clustering(config, &[], None))
}

fn clustering(config: &NearConfig, against: &[PathBuf], sets: Option<sets::SetStage>) -> Vec<Arc<dyn Stage>> {
    let against = against.to_vec();
    let mut stages: Vec<Arc<dyn Stage>> = vec![Arc::new(pairs::Pairs::new(config.clone(), against.clone()))];
    let mut edges = PAIRS;
    if config.verify != Verify::None {
        if config.verify == Verify::Exact {
            stages.extend(sets.map(|sets| Arc::new(sets) as Arc<dyn Stage>));
        }
        stages.push(Arc::new(verify::Verified::new(config.clone(), against.clone())));
        edges = VERIFIED;
    }
    stages.push(Arc::new(clusters::Clusters { edges: edges.into(), against: against.clone() }));
    stages.push(Arc::new(Removals {
        name: REMOVALS.into(),
        members: CLUSTERS.into(),
        table: SIGNATURES.into(),
        keep: config.keep.clone(),
        similarity: match config.verify {
            Verify::Exact => Similarity::Exact,
            _ => Similarity::Sketch { keep: config.keep.clone() },
        },
        against,
    }));
    stages
}
