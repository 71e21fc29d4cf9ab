//! `fulgurite report`

use std::path::Path;

use anyhow::{Context, Result};
use pipeline::report::{Report as Facts, RuleReport};

use crate::cli::{Report, ReportFormat};
use crate::commands::existing;
use crate::output::{self, bytes, thousands};

mod html;
mod markdown;

/// Print what each rule dropped and write the report of the run, or print it in another form.
pub fn report(args: &Report) -> Result<()> {
    let run = existing(&args.run)?;
    let facts = pipeline::report::report(run)?;
    let format = args.format.unwrap_or(if args.json { ReportFormat::Json } else { ReportFormat::Html });
    let text = match format {
        ReportFormat::Html => html::page(&facts),
        ReportFormat::Json => serde_json::to_string_pretty(&facts)?,
        ReportFormat::Md => markdown::page(&facts),
    };
    let path = match (&args.output, format) {
        (Some(path), _) => path.clone(),
        (None, ReportFormat::Html) => run.join("report.html"),
        (None, _) => return Ok(output::line(text)?),
    };
    write(&path, &text)?;
    output::line(table(&facts.rules))?;
    output::note(format!("the whole report: {}", path.display()));
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text)
        .with_context(|| format!("{} cannot be written; name another file with --output", path.display()))
}

/// The rules as a table.
fn table(rules: &[RuleReport]) -> String {
    if rules.is_empty() {
        return "nothing was dropped".into();
    }
    let mut rows = vec![["stage", "rule", "dropped", "share", "threshold", "median value"].map(String::from).to_vec()];
    rows.extend(rules.iter().map(|r| {
        vec![
            r.stage.clone(),
            r.rule.clone(),
            thousands(r.dropped),
            format!("{:.2}%", r.share * 100.0),
            threshold(r).unwrap_or("-".into()),
            r.median_value.map_or("-".into(), number),
        ]
    }));
    output::table(&rows)
}

/// A number with as many digits as say something.
fn number(value: f64) -> String {
    if value.abs() >= 10_000.0 {
        let sign = if value < 0.0 { "-" } else { "" };
        return format!("{sign}{}", thousands(value.abs().round() as u64));
    }
    format!("{value:.4}").trim_end_matches('0').trim_end_matches('.').to_string()
}

/// A rule's threshold as people read it, where it has any.
fn threshold(rule: &RuleReport) -> Option<String> {
    if rule.thresholds_differ { Some("by language".into()) } else { rule.threshold.map(number) }
}

/// A fraction as people read it.
fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "–".into() } else { format!("{:.2}%", 100.0 * part as f64 / whole as f64) }
}

/// What [`tokens`] tells.
const TOKENS_HEAD: [&str; 6] = ["part", "source", "documents", "tokens", "text", "bytes per token"];

/// The tokens of each part, source by source, where the run has come so far.
fn tokens(facts: &Facts) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for part in ["train", "validation"] {
        let counts = &facts.tokens[part];
        let sources = counts["sources"].as_object().into_iter().flatten();
        let all = (counts["tokens"].is_u64()).then_some(("all", counts));
        for (source, counts) in sources.map(|(source, counts)| (source.as_str(), counts)).chain(all) {
            let count = |key: &str| counts[key].as_u64().unwrap_or_default();
            rows.push(vec![
                part.to_owned(),
                source.to_owned(),
                thousands(count("documents")),
                thousands(count("tokens")),
                bytes(count("bytes")),
                counts["bytes_per_token"].as_f64().map_or("–".into(), number),
            ]);
        }
    }
    rows
}

/// Documents at the start and at the end of the curation.
fn ends(facts: &Facts) -> (u64, u64) {
    let first = facts.funnel.first().map_or(0, |stage| stage.documents);
    (first, facts.funnel.last().map_or(first, |stage| stage.documents))
}
