//! Whether what the run said of some documents, when somebody looked at them, is what it says now.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::shards::{document_stages, files, ids, read, texts};
use crate::digest::Digest;
use crate::error::Result;
use crate::status::StageSummary;

/// What has become of a verdict of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It is the run's still.
    Stands,
    /// The run has the document and says something else of it: thresholds or stages have changed.
    Changed,
    /// The run has no such document: its file is no input any more, or is another file.
    Gone,
}

/// Of each verdict, document, stage and the rule of that stage that dropped it (none: the stage kept it), what has become of
/// it. Reads the ids of the stages that the verdicts are of, and those of all documents where a verdict does not stand.
///
/// # Errors
/// A shard or journal that cannot be read.
pub fn standing(
    run_dir: &Path,
    stages: &[StageSummary],
    verdicts: &[(Digest, &str, Option<&str>)],
) -> Result<Vec<Standing>> {
    let mut wanted: BTreeMap<(&str, bool), HashMap<Digest, Vec<usize>>> = BTreeMap::new();
    for (at, (id, stage, rule)) in verdicts.iter().enumerate() {
        wanted.entry((stage, rule.is_some())).or_default().entry(*id).or_default().push(at);
    }
    let mut found = vec![Standing::Gone; verdicts.len()];
    let deciding = document_stages(run_dir, stages)?;
    for ((stage, dropped), of) in wanted {
        if deciding.iter().all(|deciding| deciding.name != stage) {
            continue;
        }
        for (_, path) in files(run_dir, stage, dropped)? {
            let rows = read(&path, if dropped { &["id", "rule"] } else { &["id"] })?;
            let rules = if dropped { texts(&rows, &path, "rule")? } else { Vec::new() };
            for (row, id) in ids(&rows, &path)?.iter().enumerate() {
                let rule = rules.get(row).and_then(Option::as_deref);
                let same = of.get(id).into_iter().flatten().filter(|at| verdicts[**at].2 == rule);
                same.for_each(|at| found[*at] = Standing::Stands);
            }
        }
    }
    let mut others: HashSet<Digest> =
        verdicts.iter().zip(&found).filter(|(_, found)| **found == Standing::Gone).map(|(v, _)| v.0).collect();
    if !others.is_empty() {
        let mut here = HashSet::new();
        for (_, path) in files(run_dir, "ingest", false)? {
            here.extend(ids(&read(&path, &["id"])?, &path)?.into_iter().filter(|id| others.contains(id)));
        }
        others.retain(|id| here.contains(id));
    }
    for (found, (id, ..)) in found.iter_mut().zip(verdicts) {
        if *found == Standing::Gone && others.contains(id) {
            *found = Standing::Changed;
        }
    }
    Ok(found)
}
