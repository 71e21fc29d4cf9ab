//! Documents to look at: dropped ones of each rule, and those that were kept, chosen by hash.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::shards::{DocumentStage, columns, document_stages, files, ids, integers, numbers, read, read_rows, texts};
use crate::digest::Digest;
use crate::error::Result;
use crate::pii::{PiiCounts, PiiFinder};
use crate::status::StageSummary;

/// What a sample shows of its document.
#[derive(Clone, Debug)]
pub struct Excerpt {
    /// Characters of the text at most.
    pub chars: usize,
    /// Personal data that stands as placeholders in all that is shown; nothing of the default.
    pub hidden: PiiFinder,
}

impl Excerpt {
    /// The text with placeholders for what is hidden.
    pub(super) fn of(&self, text: &str) -> String {
        match self.hidden.is_empty() {
            true => text.to_owned(),
            false => self.hidden.redact(text, &mut PiiCounts::default()).into_owned(),
        }
    }
}

/// A document to look at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// Its name, the same in every run over the same files.
    pub id: Digest,
    /// Its place in this run.
    pub ordinal: u64,
    /// Where it comes from.
    pub source: String,
    /// Its address, where it has one.
    pub url: Option<String>,
    /// The stage that dropped it, or the one that kept it.
    pub stage: String,
    /// The rule that dropped it; none for a document that was kept.
    pub rule: Option<String>,
    /// The value that the rule met.
    pub value: Option<f64>,
    /// The rule's threshold.
    pub threshold: Option<f64>,
    /// What else the stage says of it.
    pub detail: Option<String>,
    /// The beginning of its text.
    pub text: String,
    /// Characters of the whole text, with placeholders for what is hidden.
    pub chars: u64,
}

/// A document that was picked, before its text is read.
#[derive(Clone, Debug, PartialEq)]
struct Pick {
    hash: u64,
    task: u32,
    id: Digest,
    ordinal: u64,
    stage: String,
    rule: Option<String>,
    value: Option<f64>,
    threshold: Option<f64>,
    detail: Option<String>,
}

/// The smallest hashes of each group, at most `most`.
struct Lowest {
    most: usize,
    groups: BTreeMap<String, Vec<Pick>>,
}

impl Lowest {
    fn new(most: usize) -> Self {
        Self { most, groups: BTreeMap::new() }
    }

    fn add(&mut self, group: &str, pick: Pick) {
        if !self.groups.contains_key(group) {
            self.groups.insert(group.to_owned(), Vec::new());
        }
        let Some(picks) = self.groups.get_mut(group) else { return };
        let at = picks.partition_point(|p| (p.hash, p.ordinal) < (pick.hash, pick.ordinal));
        if at < self.most {
            picks.insert(at, pick);
            picks.truncate(self.most);
        }
    }
}

/// By what a document is picked: its id, so that the same ones are when the run is cut into other shards.
fn hash(id: Digest, seed: u64) -> u64 {
    xxh3_64_with_seed(&id.0.to_le_bytes(), seed)
}

/// Up to `most` documents that each rule dropped, with what `excerpt` shows of them.
pub fn by_rule(
    run_dir: &Path,
    stages: &[StageSummary],
    most: usize,
    excerpt: &Excerpt,
    seed: u64,
) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let deciding = document_stages(run_dir, stages)?;
    // What `ingest` drops never became a document.
    for stage in deciding.iter().map(|stage| stage.name).filter(|stage| *stage != "ingest") {
        let mut lowest = Lowest::new(most);
        for (task, path) in files(run_dir, stage, true)? {
            let names = columns(&path)?;
            let has = |name: &str| names.iter().any(|n| n == name);
            if !has("id") || !has("ordinal") || !has("rule") {
                continue;
            }
            let mut wanted = vec!["id", "ordinal", "rule"];
            wanted.extend(["value", "threshold", "detail", "similarity"].into_iter().filter(|name| has(name)));
            let rows = read(&path, &wanted)?;
            let (ids, ordinals) = (ids(&rows, &path)?, integers(&rows, &path, "ordinal")?);
            let rules = texts(&rows, &path, "rule")?;
            let optional = |name: &str| if has(name) { numbers(&rows, &path, name).map(Some) } else { Ok(None) };
            let (values, thresholds, similarity) =
                (optional("value")?, optional("threshold")?, optional("similarity")?);
            let details = if has("detail") { Some(texts(&rows, &path, "detail")?) } else { None };
            for (row, ordinal) in ordinals.into_iter().enumerate() {
                let number = |column: &Option<Vec<f64>>| column.as_ref().map(|c| c[row]).filter(|v| v.is_finite());
                let rule = rules[row].clone().unwrap_or_default();
                let pick = Pick {
                    hash: hash(ids[row], seed),
                    task,
                    id: ids[row],
                    ordinal,
                    stage: stage.to_owned(),
                    rule: Some(rule.clone()),
                    value: number(&values).or(number(&similarity)),
                    threshold: number(&thresholds),
                    detail: details.as_ref().and_then(|d| d[row].clone()),
                };
                lowest.add(&rule, pick);
            }
        }
        samples.extend(with_texts(run_dir, &deciding, lowest, excerpt)?);
    }
    Ok(samples)
}

/// Up to `most` documents of each source that `stage` kept, without one those that were kept to the end of the curation.
/// None of a stage that is not there or decides on no documents.
pub fn by_source(
    run_dir: &Path,
    stages: &[StageSummary],
    stage: Option<&str>,
    most: usize,
    excerpt: &Excerpt,
    seed: u64,
) -> Result<Vec<Sample>> {
    let mut lowest = Lowest::new(most);
    let deciding = document_stages(run_dir, stages)?;
    let last =
        deciding.iter().rev().map(|deciding| deciding.name).find(|name| stage.is_none_or(|stage| stage == *name));
    let Some(last) = last else { return Ok(Vec::new()) };
    let ingested: HashMap<u32, PathBuf> = files(run_dir, "ingest", false)?.into_iter().collect();
    for (task, path) in files(run_dir, last, false)? {
        let Some(documents) = ingested.get(&task) else { continue };
        let rows = read(documents, &["ordinal", "source"])?;
        let sources: HashMap<u64, Option<String>> =
            integers(&rows, documents, "ordinal")?.into_iter().zip(texts(&rows, documents, "source")?).collect();
        let rows = read(&path, &["id", "ordinal"])?;
        for (id, ordinal) in ids(&rows, &path)?.into_iter().zip(integers(&rows, &path, "ordinal")?) {
            let source = sources.get(&ordinal).cloned().flatten().unwrap_or_default();
            let pick = Pick {
                hash: hash(id, seed),
                task,
                id,
                ordinal,
                stage: last.to_owned(),
                rule: None,
                value: None,
                threshold: None,
                detail: None,
            };
            lowest.add(&source, pick);
        }
    }
    with_texts(run_dir, &deciding, lowest, excerpt)
}

/// Reads the texts of what was picked, shard by shard: each from the last stage that writes texts and has the document, so
/// that of a dropped one it is the text that the rule saw.
fn with_texts(run_dir: &Path, stages: &[DocumentStage<'_>], lowest: Lowest, excerpt: &Excerpt) -> Result<Vec<Sample>> {
    let picks: Vec<Pick> = lowest.groups.into_values().flatten().collect();
    let mut left: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    picks.iter().for_each(|pick| left.entry(pick.task).or_default().push(pick.ordinal));
    let mut found: HashMap<u64, (String, Option<String>, String)> = HashMap::new();
    for stage in stages.iter().rev().filter(|stage| stage.texts) {
        let shards: HashMap<u32, PathBuf> = files(run_dir, stage.name, false)?.into_iter().collect();
        for (task, ordinals) in &mut left {
            let Some(path) = shards.get(task).filter(|_| !ordinals.is_empty()) else { continue };
            let rows = read_rows(path, &["ordinal", "source", "url", "text"], ordinals)?;
            let (sources, urls) = (texts(&rows, path, "source")?, texts(&rows, path, "url")?);
            let bodies = texts(&rows, path, "text")?;
            for (row, ordinal) in integers(&rows, path, "ordinal")?.into_iter().enumerate() {
                let of = |column: &[Option<String>]| column[row].clone();
                found.insert(ordinal, (of(&sources).unwrap_or_default(), of(&urls), of(&bodies).unwrap_or_default()));
            }
            ordinals.retain(|ordinal| !found.contains_key(ordinal));
        }
    }
    let mut samples = Vec::with_capacity(picks.len());
    for pick in picks {
        let Some((source, url, text)) = found.get(&pick.ordinal) else { continue };
        // Before it is cut, so that no part of a number stays at its end.
        let text = excerpt.of(text);
        samples.push(Sample {
            id: pick.id,
            ordinal: pick.ordinal,
            source: source.clone(),
            url: url.as_deref().map(|url| excerpt.of(url)),
            stage: pick.stage,
            rule: pick.rule,
            value: pick.value,
            threshold: pick.threshold,
            detail: pick.detail.map(|detail| excerpt.of(&detail)),
            text: text.chars().take(excerpt.chars).collect(),
            chars: text.chars().count() as u64,
        });
    }
    Ok(samples)
}
