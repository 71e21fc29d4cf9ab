//! The report as Markdown.

use pipeline::report::Report;

use super::{TOKENS_HEAD, ends, number, percent, threshold, tokens};
use crate::output::{bytes, thousands};

/// The whole report.
pub fn page(facts: &Report) -> String {
    let (first, last) = ends(facts);
    let mut out = format!("# {}\n\n", cell(&facts.run));
    out.push_str(&format!(
        "{} of {} documents are left ({}).\n",
        thousands(last),
        thousands(first),
        percent(last, first)
    ));
    section(
        &mut out,
        "Stages",
        &["stage", "read", "kept", "dropped", "size", "seconds", "rows/s"],
        facts.stages.iter().map(|s| {
            vec![
                s.stage.clone(),
                thousands(s.read),
                thousands(s.kept),
                thousands(s.dropped),
                bytes(s.bytes),
                format!("{:.1}", s.seconds),
                thousands(s.rows_per_second as u64),
            ]
        }),
    );
    let sources: Vec<&String> = facts.funnel.first().map(|s| s.by_source.keys().collect()).unwrap_or_default();
    let mut head = vec!["after"];
    head.extend(sources.iter().map(|s| s.as_str()));
    head.push("all");
    section(
        &mut out,
        "Documents by source",
        &head,
        facts.funnel.iter().map(|stage| {
            let mut row = vec![stage.stage.clone()];
            row.extend(sources.iter().map(|s| thousands(stage.by_source.get(*s).copied().unwrap_or_default())));
            row.push(thousands(stage.documents));
            row
        }),
    );
    section(
        &mut out,
        "Rules",
        &["stage", "rule", "dropped", "share", "matched", "alone", "threshold", "median value"],
        facts.rules.iter().map(|r| {
            let of = |counts: &std::collections::BTreeMap<String, u64>| {
                if r.stage == "filter" {
                    thousands(counts.get(&r.rule).copied().unwrap_or_default())
                } else {
                    "–".into()
                }
            };
            vec![
                r.stage.clone(),
                r.rule.clone(),
                thousands(r.dropped),
                format!("{:.2}%", r.share * 100.0),
                of(&facts.overlap.matched),
                of(&facts.overlap.alone),
                threshold(r).unwrap_or("–".into()),
                r.median_value.map_or("–".into(), number),
            ]
        }),
    );
    section(
        &mut out,
        "Rules together",
        &["rule", "rule", "documents"],
        facts
            .overlap
            .pairs
            .iter()
            .map(|pair| vec![pair.rules.0.clone(), pair.rules.1.clone(), thousands(pair.documents)]),
    );
    section(
        &mut out,
        "Cleaning",
        &["change", "documents", "changes"],
        facts
            .changes
            .iter()
            .map(|(name, change)| vec![name.clone(), thousands(change.documents), thousands(change.changes)]),
    );
    section(
        &mut out,
        "Repeated lines",
        &["documents", "lines removed", "bytes removed"],
        facts.lines.iter().map(|l| [l.documents, l.lines, l.bytes].map(thousands).to_vec()),
    );
    section(
        &mut out,
        "Most frequent lines",
        &["documents", "line"],
        facts.lines.iter().flat_map(|l| &l.frequent).map(|f| vec![thousands(f.documents), f.line.clone()]),
    );
    section(
        &mut out,
        "Evaluation sets",
        &["benchmark", "records", "texts", "too short", "documents"],
        facts.benchmarks.iter().map(|b| {
            let mut row = vec![b.benchmark.clone()];
            row.extend([b.records, b.texts, b.too_short, b.documents].map(thousands));
            row
        }),
    );
    section(
        &mut out,
        "Languages",
        &["language", "documents"],
        facts.languages.iter().map(|(language, count)| vec![language.clone(), thousands(*count)]),
    );
    section(&mut out, "Tokens", &TOKENS_HEAD, tokens(facts).into_iter());
    section(
        &mut out,
        "Samples",
        &["rule", "value", "source", "text"],
        facts.samples.iter().map(|s| {
            let text: String = s.text.chars().take(160).collect();
            let rule = s.rule.clone().unwrap_or_else(|| "kept".into());
            vec![rule, s.value.map_or("–".into(), number), s.source.clone(), text]
        }),
    );
    out
}

/// A heading and a table; nothing when there are no rows.
fn section(out: &mut String, title: &str, head: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let rows: Vec<Vec<String>> = rows.collect();
    if rows.is_empty() {
        return;
    }
    out.push_str(&format!("\n## {title}\n\n"));
    let mut line = |cells: Vec<String>| out.push_str(&format!("| {} |\n", cells.join(" | ")));
    line(head.iter().map(|h| cell(h)).collect());
    line(head.iter().map(|_| "---".into()).collect());
    rows.into_iter().for_each(|row| line(row.iter().map(|value| cell(value)).collect()));
}

/// A text that does not end its cell.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('\\', "\\\\").replace('|', "\\|").replace('<', "&lt;")
}
