//! `fulgurite stats`

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use tokenize::counts::Counts;
use tokenize::loader::{DataConfig, Loader, LoaderConfig, Packing, PackingReport};
use tokenize::stages::TOKENS;
use tokenize::{Encoder, TokenStatistics, tokenizer_path};

use super::existing;
use crate::cli::{Stats, StatsOf, StatsTokens};
use crate::output::{self, bytes, thousands};
use crate::recipe::Recipe;
use crate::source::Source;

/// Print figures.
pub fn stats(args: &Stats) -> Result<()> {
    let StatsOf::Tokens(args) = &args.of;
    tokens(args)
}

#[derive(Serialize)]
struct TokenFacts {
    vocabulary_size: u32,
    statistics: TokenStatistics,
    packing: Vec<PackingReport>,
}

fn tokens(args: &StatsTokens) -> Result<()> {
    let statistics = TokenStatistics::load(existing(&args.run)?)?;
    let vocabulary_size = Encoder::load(tokenizer_path(&args.run))?.vocabulary_size();
    let settings = data_settings(&args.run)?;
    let report = |packing| {
        let data = DataConfig { packing, ..settings.clone() };
        let config = LoaderConfig { sequence_length: args.sequence_length, data, ..LoaderConfig::default() };
        Loader::open_stage(&args.run.join(TOKENS), config)?.packing()
    };
    let packing = vec![report(Packing::Concatenate)?, report(Packing::BestFit)?];
    let facts = TokenFacts { vocabulary_size, statistics, packing };
    if args.json { output::json(&facts) } else { print(&facts) }
}

/// How the run makes sequences, but for the packing; by default where its recipe trains nothing.
fn data_settings(run: &Path) -> Result<DataConfig> {
    let path = run.join("recipe.toml");
    if !path.exists() {
        return Ok(DataConfig::default());
    }
    let recipe = Recipe::load(&Source::read(&path, &[])?)?;
    Ok(recipe.train.map(|train| train.data).unwrap_or_default())
}

fn print(facts: &TokenFacts) -> Result<()> {
    let TokenFacts { statistics, .. } = facts;
    let train = statistics.train_counts().context("the statistics have no counts by source")?;
    let validation = statistics.validation_counts().context("the statistics have no counts by source")?;
    let heads = ["source", "split", "documents", "tokens", "text", "bytes/token", "share"];
    let mut rows = vec![heads.map(String::from).to_vec()];
    let mut add = |sources: &BTreeMap<String, Counts>, split: &str, total: Counts| {
        let all = ("all".to_string(), total);
        for (source, counts) in sources.iter().chain(std::iter::once((&all.0, &all.1))) {
            rows.push(vec![
                source.clone(),
                split.into(),
                thousands(counts.documents),
                thousands(counts.tokens),
                bytes(counts.bytes),
                format!("{:.3}", counts.bytes_per_token()),
                format!("{:.2}%", 100.0 * counts.tokens as f64 / total.tokens.max(1) as f64),
            ]);
        }
    };
    add(&train.0, "train", train.total());
    add(&validation.0, "held out", validation.total());
    output::line(output::table(&rows))?;
    output::line(format!(
        "\n{} of {} tokens of the vocabulary occur; the unigram entropy is {:.3} nats per token",
        thousands(statistics.tokens_used),
        thousands(facts.vocabulary_size.into()),
        statistics.unigram_entropy
    ))?;
    for report in &facts.packing {
        output::line(report.to_string())?;
    }
    Ok(())
}
