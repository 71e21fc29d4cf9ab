//! Documents that are left after each stage, by source.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::Serialize;

use super::shards::{document_stages, files, integers, read, texts};
use crate::error::Result;
use crate::status::StageSummary;

/// What is left after a stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FunnelStage {
    /// Name.
    pub stage: String,
    /// Documents by source.
    pub by_source: BTreeMap<String, u64>,
    /// All of them.
    pub documents: u64,
}

pub(super) fn scan(run_dir: &Path, stages: &[StageSummary]) -> Result<Vec<FunnelStage>> {
    let ingested: HashMap<u32, _> = files(run_dir, "ingest", false)?.into_iter().collect();
    let mut funnel = Vec::new();
    for stage in document_stages(run_dir, stages)?.into_iter().map(|stage| stage.name) {
        let mut by_source: BTreeMap<String, u64> = BTreeMap::new();
        for (task, path) in files(run_dir, stage, false)? {
            let Some(documents) = ingested.get(&task) else { continue };
            // Both are in ascending order of ordinals, so one walk finds the source of every row.
            let rows = read(documents, &["ordinal", "source"])?;
            let (all, sources) = (integers(&rows, documents, "ordinal")?, texts(&rows, documents, "source")?);
            let left = integers(&read(&path, &["ordinal"])?, &path, "ordinal")?;
            let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
            let mut at = 0;
            for ordinal in left {
                while all.get(at).is_some_and(|o| *o < ordinal) {
                    at += 1;
                }
                if all.get(at) == Some(&ordinal) {
                    *counts.entry(sources[at].as_deref().unwrap_or_default()).or_default() += 1;
                }
            }
            for (source, count) in counts {
                *by_source.entry(source.to_owned()).or_default() += count;
            }
        }
        let documents = by_source.values().sum();
        funnel.push(FunnelStage { stage: stage.into(), by_source, documents });
    }
    Ok(funnel)
}
