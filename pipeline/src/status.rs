//! What the stages of a run directory have done, read from manifests and journals alone: works
//! while the run is going on, and without its recipe.

use std::path::Path;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::manifest::{Journal, Manifest, StageState, Totals};

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
    /// Notes of the committed tasks that have any, in task order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<serde_json::Value>,
    /// Manifest.
    #[serde(skip)]
    pub manifest: Manifest,
}

/// The stages found in `run_dir`, inputs before those that read them.
pub fn summaries(run_dir: &Path) -> Result<Vec<StageSummary>> {
    let mut found = Vec::new();
    let entries = std::fs::read_dir(run_dir).map_err(|e| Error::io(run_dir, e))?;
    for entry in entries {
        let dir = entry.map_err(|e| Error::io(run_dir, e))?.path();
        if !dir.is_dir() {
            continue;
        }
        let Some(manifest) = Manifest::load(&dir)? else {
            continue;
        };
        let journal = Journal::read(&dir)?;
        let mut totals = Totals::default();
        journal.values().for_each(|e| totals.add(e));
        found.push(StageSummary {
            stage: manifest.stage.clone(),
            state: manifest.state,
            done: journal.len() as u32,
            tasks: manifest.tasks,
            totals,
            notes: journal.into_values().map(|e| e.notes).filter(|n| !n.is_null()).collect(),
            manifest,
        });
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
        // A cycle cannot be written by the runner; if a manifest was edited into one, keep its order.
        let next = found.iter().position(|s| s.manifest.inputs.keys().all(known)).unwrap_or(0);
        ordered.push(found.remove(next));
    }
    Ok(ordered)
}
