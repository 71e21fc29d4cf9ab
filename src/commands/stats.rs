//! `fulgurite stats`

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::Serialize;
use tokenize::counts::Counts;
use tokenize::loader::{DataConfig, Loader, LoaderConfig, Packing, PackingReport};
use tokenize::stages::TOKENS;
use tokenize::{Encoder, TokenStatistics, tokenizer_path};

use crate::cli::{Stats, StatsOf, StatsTokens};
use crate::output::{self, bytes, thousands};

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
    let statistics = TokenStatistics::load(&args.run)?;
    let vocabulary_size = Encoder::load(tokenizer_path(&args.run))?.vocabulary_size();
    let report = |packing| {
        let data = DataConfig { packing, ..DataConfig::default() };
        let config = LoaderConfig { sequence_length: args.sequence_length, data, ..LoaderConfig::default() };
        Loader::open_stage(&args.run.join(TOKENS), config)?.packing()
    };
    let packing = vec![report(Packing::Concatenate)?, report(Packing::BestFit)?];
    let facts = TokenFacts { vocabulary_size, statistics, packing };
    if args.json { output::json(&facts) } else { print(&facts) }
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
        let sources = report.sources.values();
        let (short, cut) = sources.fold((0, 0), |sum, s| (sum.0 + s.short_documents, sum.1 + s.cut_documents));
        output::line(match report.packing {
            Packing::Concatenate => format!("sequences of {} by concatenation: no padding", report.sequence_length),
            Packing::BestFit => format!(
                "sequences of {} by best fit: {:.2}% padding; of {} documents no longer than that, {} are cut",
                report.sequence_length,
                100.0 * report.padding,
                thousands(short),
                thousands(cut)
            ),
        })?;
    }
    Ok(())
}
