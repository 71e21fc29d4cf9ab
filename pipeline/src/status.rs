//! What the stages of a run directory have done, read from manifests and journals alone: works
//! while the run is going on, and without its recipe.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::manifest::{Journal, Manifest, StageState, Totals};
use crate::stages::curate::CurateStage;

/// One stage of a run.
#[derive(Clone, Debug, Serialize)]
pub struct StageSummary {
    /// Stage name.
    pub stage: String,
    /// Running (or stopped) or done.
    pub state: StageState,
    /// Committed tasks.
    pub done: u32,
    /// Tasks in all.
    pub tasks: u32,
    /// Sums over the committed tasks.
    pub totals: Totals,
    /// Why the output is not that of its inputs as they are now, or cannot be told to be: the next run makes it again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outdated: Option<String>,
    /// Notes of the committed tasks that have any, in task order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<serde_json::Value>,
    /// Manifest, where it can be read.
    #[serde(skip)]
    pub manifest: Option<Manifest>,
}

impl StageSummary {
    fn read(dir: &Path) -> Result<Option<Self>> {
        let (manifest, outdated) = match Manifest::load(dir) {
            Ok(None) => return Ok(None),
            Ok(Some(manifest)) => (Some(manifest), None),
            Err(Error::Corrupt { reason, .. }) => (None, Some(format!("manifest.json is {reason}"))),
            Err(other) => return Err(other),
        };
        let journal = Journal::read(dir)?;
        let mut totals = Totals::default();
        journal.values().for_each(|e| totals.add(e));
        let name = || dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Some(Self {
            stage: manifest.as_ref().map_or_else(name, |m| m.stage.clone()),
            state: manifest.as_ref().map_or(StageState::Running, |m| m.state),
            done: journal.len() as u32,
            tasks: manifest.as_ref().map_or(journal.len() as u32, |m| m.tasks),
            totals,
            outdated,
            notes: journal.into_values().map(|e| e.notes).filter(|n| !n.is_null()).collect(),
            manifest,
        }))
    }
}

/// The stages found in `run_dir`, inputs before those that read them.
pub fn summaries(run_dir: &Path) -> Result<Vec<StageSummary>> {
    let mut found = Vec::new();
    let entries = std::fs::read_dir(run_dir).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::Recipe(format!("{} does not exist", run_dir.display())),
        _ => Error::io(run_dir, e),
    })?;
    for entry in entries {
        let dir = entry.map_err(|e| Error::io(run_dir, e))?.path();
        if dir.is_dir() {
            found.extend(StageSummary::read(&dir)?);
        }
    }
    if found.is_empty() {
        return Err(Error::Recipe(format!(
            "{} is not a run directory: no stage has a manifest in it",
            run_dir.display()
        )));
    }
    found.sort_by(|a, b| a.stage.cmp(&b.stage));
    let mut ordered: Vec<StageSummary> = Vec::with_capacity(found.len());
    while !found.is_empty() {
        let known = |name: &String| ordered.iter().any(|s| s.stage == *name) || !found.iter().any(|s| s.stage == *name);
        let inputs = |s: &StageSummary| s.manifest.iter().flat_map(|m| m.inputs.keys()).all(known);
        // A cycle cannot be written by the runner; if a manifest was edited into one, keep its order.
        let next = found.iter().position(inputs).unwrap_or(0);
        ordered.push(found.remove(next));
    }
    mark_outdated(&mut ordered);
    Ok(ordered)
}

/// Those of `stages`, which are as [`summaries`] gives them, that the curated documents were made from, and `curate` itself: what
/// others have dropped, stages of an earlier form of the recipe, is not missing from the documents. All of them while the
/// curated documents are not those of the run as it is, when nothing tells which they are.
pub(crate) fn decisive(stages: &[StageSummary]) -> Vec<&StageSummary> {
    let mut decisive: Vec<&StageSummary> = stages.iter().collect();
    if stages.iter().any(|s| s.stage == CurateStage::NAME && s.done > 0 && s.outdated.is_none()) {
        let mut read = BTreeSet::from([CurateStage::NAME]);
        // Inputs come before those that read them.
        for summary in stages.iter().rev() {
            if let Some(manifest) = summary.manifest.as_ref().filter(|_| read.contains(summary.stage.as_str())) {
                read.extend(manifest.inputs.keys().map(String::as_str));
            }
        }
        decisive.retain(|summary| read.contains(summary.stage.as_str()));
    }
    decisive
}

/// Compare the fingerprints that each stage was built on with those of its inputs as they are.
fn mark_outdated(stages: &mut [StageSummary]) {
    // What each stage offers those that read it: a fingerprint, or the news that it is outdated itself.
    let mut offered = BTreeMap::new();
    for stage in stages {
        if let Some(manifest) = &stage.manifest {
            stage.outdated = manifest.inputs.iter().find_map(|(name, wanted)| match offered.get(name) {
                None => Some(format!("its input {name} is gone")),
                Some(None) => Some(format!("its input {name} is outdated")),
                Some(Some(found)) if found != wanted => Some(format!("its input {name} was made again since")),
                Some(_) => None,
            });
        }
        let fingerprint = stage.manifest.as_ref().filter(|_| stage.outdated.is_none()).map(|m| m.fingerprint);
        offered.insert(stage.stage.clone(), fingerprint);
    }
}
