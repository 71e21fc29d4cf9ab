//! The report as one HTML file without anything outside of it.

use std::collections::BTreeMap;

use pipeline::report::{Histogram, Report, Sample};

use super::{TOKENS_HEAD, ends, number, percent, threshold, tokens};
use crate::output::{bytes, thousands};

/// Size of a histogram in pixels.
const WIDTH: f64 = 340.0;
const HEIGHT: f64 = 110.0;
/// Colours of sources, told apart by people who see few colours too.
const COLOURS: [&str; 8] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#777777"];

const STYLE: &str = include_str!("style.css");

/// The whole page.
pub fn page(facts: &Report) -> String {
    let mut out = String::new();
    let title = escape(&facts.run);
    out.push_str(&format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title} – fulgurite report</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    ));
    let (first, last) = ends(facts);
    out.push_str(&format!(
        "<p class=\"lead\"><b>{}</b> of {} documents are left ({}).</p>\n",
        thousands(last),
        thousands(first),
        percent(last, first)
    ));
    funnel(&mut out, facts);
    rules(&mut out, facts);
    histograms(&mut out, facts);
    simple(
        &mut out,
        "Languages",
        &["language", "documents", "share"],
        facts.languages.iter().map(|(language, count)| {
            let all = facts.languages.iter().map(|(_, count)| count).sum();
            vec![escape(language), thousands(*count), percent(*count, all)]
        }),
    );
    simple(
        &mut out,
        "What cleaning changed",
        &["change", "documents", "changes"],
        facts.changes.iter().map(|(name, c)| vec![escape(name), thousands(c.documents), thousands(c.changes)]),
    );
    removed(&mut out, facts);
    let counts = tokens(facts);
    simple(
        &mut out,
        "Tokens",
        &TOKENS_HEAD,
        counts.into_iter().map(|row| row.into_iter().map(|cell| escape(&cell)).collect()),
    );
    simple(
        &mut out,
        "Stages",
        &["stage", "read", "kept", "dropped", "size", "seconds of work", "rows/s"],
        facts.stages.iter().map(|s| {
            vec![
                escape(&s.stage),
                thousands(s.read),
                thousands(s.kept),
                thousands(s.dropped),
                bytes(s.bytes),
                format!("{:.1}", s.seconds),
                thousands(s.rows_per_second as u64),
            ]
        }),
    );
    samples(&mut out, &facts.samples);
    out.push_str("</body>\n</html>\n");
    out
}

fn funnel(out: &mut String, facts: &Report) {
    let Some(first) = facts.funnel.first() else { return };
    let colours: BTreeMap<&String, &str> = first.by_source.keys().zip(COLOURS.iter().cycle().copied()).collect();
    out.push_str("<h2>Documents after each stage</h2>\n<p class=\"legend\">");
    for (source, colour) in &colours {
        out.push_str(&format!("<span><i style=\"background:{colour}\"></i>{}</span>", escape(source)));
    }
    out.push_str("</p>\n<table class=\"funnel\">\n");
    let whole = first.documents.max(1) as f64;
    for stage in &facts.funnel {
        out.push_str(&format!("<tr><th>{}</th><td class=\"bar\">", escape(&stage.stage)));
        for (source, count) in &stage.by_source {
            let share = 100.0 * *count as f64 / whole;
            let colour = colours.get(source).copied().unwrap_or("#777777");
            out.push_str(&format!(
                "<i style=\"width:{share:.3}%;background:{colour}\" title=\"{}: {}\"></i>",
                escape(source),
                thousands(*count)
            ));
        }
        out.push_str(&format!(
            "</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>\n",
            thousands(stage.documents),
            percent(stage.documents, first.documents)
        ));
    }
    out.push_str("</table>\n<details><summary>By source</summary>\n");
    let mut head = vec!["after"];
    head.extend(first.by_source.keys().map(String::as_str));
    let rows = facts.funnel.iter().map(|stage| {
        let mut row = vec![escape(&stage.stage)];
        row.extend(first.by_source.iter().map(|(source, all)| {
            let count = stage.by_source.get(source).copied().unwrap_or_default();
            format!("{} <small>{}</small>", thousands(count), percent(count, *all))
        }));
        row
    });
    table(out, &head, rows);
    out.push_str("</details>\n");
}

fn rules(out: &mut String, facts: &Report) {
    if facts.rules.is_empty() {
        out.push_str("<h2>Rules</h2>\n<p>Nothing was dropped.</p>\n");
        return;
    }
    out.push_str(
        "<h2>Rules</h2>\n<p>A document is dropped by the first rule that it fails. <b>matched</b> counts every document \
         that fails a rule, <b>alone</b> those that fail no other: what would stay without the rule.</p>\n",
    );
    let head = ["stage", "rule", "dropped", "share of stage", "matched", "alone", "threshold", "median value"];
    table(
        out,
        &head,
        facts.rules.iter().map(|r| {
            let of = |counts: &BTreeMap<String, u64>| {
                if r.stage == "filter" {
                    thousands(counts.get(&r.rule).copied().unwrap_or_default())
                } else {
                    "–".into()
                }
            };
            vec![
                escape(&r.stage),
                format!("<code>{}</code>", escape(&r.rule)),
                thousands(r.dropped),
                format!("<meter min=\"0\" max=\"1\" value=\"{:.4}\"></meter> {:.2}%", r.share, r.share * 100.0),
                of(&facts.overlap.matched),
                of(&facts.overlap.alone),
                threshold(r).unwrap_or("–".into()),
                r.median_value.map_or("–".into(), number),
            ]
        }),
    );
    // Rules that drop only what an earlier rule has dropped stand in no row above.
    let shadowed = facts.overlap.matched.iter().filter(|(rule, _)| facts.rules.iter().all(|r| r.rule != **rule));
    simple(
        out,
        "Rules behind others",
        &["rule", "matched"],
        shadowed.map(|(rule, count)| vec![format!("<code>{}</code>", escape(rule)), thousands(*count)]),
    );
    simple(
        out,
        "Rules together",
        &["rule", "and", "documents"],
        facts.overlap.pairs.iter().map(|pair| {
            let code = |rule: &str| format!("<code>{}</code>", escape(rule));
            vec![code(&pair.rules.0), code(&pair.rules.1), thousands(pair.documents)]
        }),
    );
}

fn histograms(out: &mut String, facts: &Report) {
    if facts.histograms.is_empty() {
        return;
    }
    out.push_str(
        "<h2>Signals</h2>\n<p class=\"legend\"><span><i class=\"kept\"></i>kept by the filter</span>\
         <span><i class=\"gone\"></i>dropped by it</span><span><i class=\"line\"></i>threshold</span></p>\n<div class=\"grid\">\n",
    );
    let (with, without): (Vec<_>, Vec<_>) = facts.histograms.iter().partition(|h| !h.thresholds.is_empty());
    with.into_iter().for_each(|h| histogram(out, h));
    out.push_str("</div>\n<details><summary>Signals without a rule</summary>\n<div class=\"grid\">\n");
    without.into_iter().for_each(|h| histogram(out, h));
    out.push_str("</div>\n</details>\n");
}

fn histogram(out: &mut String, h: &Histogram) {
    let bars = h.kept.len().max(1);
    let most = h.kept.iter().zip(&h.dropped).map(|(k, d)| k + d).max().unwrap_or(0).max(1) as f64;
    let width = WIDTH / bars as f64;
    let mut svg = String::new();
    for (bar, (kept, dropped)) in h.kept.iter().zip(&h.dropped).enumerate() {
        // Square roots, so that the few documents beyond a threshold can be seen beside the many.
        let height = |count: u64| (count as f64 / most).sqrt() * HEIGHT;
        let all = height(kept + dropped);
        let part = if kept + dropped == 0 { 0.0 } else { all * *kept as f64 / (kept + dropped) as f64 };
        if all == 0.0 {
            continue;
        }
        let tip = format!(
            "{} to {}: {} kept, {} dropped",
            number(h.borders[bar]),
            number(h.borders[bar + 1]),
            thousands(*kept),
            thousands(*dropped)
        );
        let x = bar as f64 * width;
        let w = (width - 0.5).max(0.5);
        svg.push_str(&format!(
            "<g><title>{tip}</title><rect class=\"kept\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{w:.1}\" height=\"{part:.1}\"/>\
             <rect class=\"gone\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{w:.1}\" height=\"{:.1}\"/></g>",
            HEIGHT - part,
            HEIGHT - all,
            all - part
        ));
    }
    for threshold in &h.thresholds {
        let x = place(&h.borders, threshold.value) * width;
        if x <= WIDTH {
            svg.push_str(&format!(
                "<g><title>{}: {}</title><line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{HEIGHT}\"/></g>",
                escape(&threshold.rule),
                escape(&threshold.drop_when)
            ));
        }
    }
    let rules: Vec<String> = h.thresholds.iter().map(|t| format!("<code>{}</code>", escape(&t.drop_when))).collect();
    let missing =
        if h.missing > 0 { format!(" <small>{} without</small>", thousands(h.missing)) } else { String::new() };
    out.push_str(&format!(
        "<figure><figcaption><b>{}</b>{missing}</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"distribution of {0}\">{svg}</svg><div class=\"axis\"><span>{}</span><span>{}</span></div>\
         <div class=\"rules\">{}</div></figure>\n",
        escape(&h.signal),
        h.borders.first().map_or(String::new(), |b| number(*b)),
        h.borders.last().map_or(String::new(), |b| number(*b)),
        rules.join("<br>")
    ));
}

/// Where a value lies among the borders, in bars.
fn place(borders: &[f64], value: f64) -> f64 {
    let bar = borders.partition_point(|border| *border <= value);
    match (bar.checked_sub(1).and_then(|b| borders.get(b)), borders.get(bar)) {
        (Some(low), Some(high)) => (bar - 1) as f64 + (value - low) / (high - low),
        (None, _) => 0.0,
        (Some(_), None) if borders.last() == Some(&value) => (borders.len() - 1) as f64,
        _ => f64::INFINITY,
    }
}

/// What went from inside the documents, and which evaluation sets were met.
fn removed(out: &mut String, facts: &Report) {
    simple(
        out,
        "Repeated lines",
        &["documents", "lines removed", "of text"],
        facts.lines.iter().map(|l| vec![thousands(l.documents), thousands(l.lines), bytes(l.bytes)]),
    );
    simple(
        out,
        "Most frequent lines",
        &["documents", "line"],
        facts
            .lines
            .iter()
            .flat_map(|l| &l.frequent)
            .map(|f| vec![thousands(f.documents), format!("<span dir=\"auto\">{}</span>", escape(&f.line))]),
    );
    simple(
        out,
        "Evaluation sets",
        &["benchmark", "records", "texts", "too short to look for", "documents that hold some of it"],
        facts.benchmarks.iter().map(|b| {
            let mut row = vec![escape(&b.benchmark)];
            row.extend([b.records, b.texts, b.too_short, b.documents].map(thousands));
            row
        }),
    );
}

fn samples(out: &mut String, samples: &[Sample]) {
    if samples.is_empty() {
        return;
    }
    out.push_str("<h2>Samples</h2>\n<p>Chosen by hash: of each rule some of what it dropped, of each source some of what was kept.</p>\n");
    for sample in samples {
        let verdict = match &sample.rule {
            Some(rule) => format!("<b class=\"gone\">{}</b> {}", escape(rule), escape(&sample.stage)),
            None => "<b class=\"kept\">kept</b>".to_owned(),
        };
        let mut facts = vec![escape(&sample.source)];
        facts.extend(sample.value.map(|v| format!("value {}", number(v))));
        facts.extend(sample.threshold.map(|t| format!("threshold {}", number(t))));
        facts.extend(sample.detail.as_deref().map(escape));
        facts.push(format!("{} characters", thousands(sample.chars)));
        let more = if sample.chars > sample.text.chars().count() as u64 { " …" } else { "" };
        out.push_str(&format!(
            "<details><summary>{verdict} <small>{}</small></summary><pre class=\"text\" dir=\"auto\">{}{more}</pre></details>\n",
            facts.join(" · "),
            escape(&sample.text)
        ));
    }
}

/// A heading and a table of cells that are HTML; nothing when there are no rows.
fn simple(out: &mut String, title: &str, head: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let rows: Vec<Vec<String>> = rows.collect();
    if !rows.is_empty() {
        out.push_str(&format!("<h2>{title}</h2>\n"));
        table(out, head, rows.into_iter());
    }
}

fn table(out: &mut String, head: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    out.push_str("<div class=\"wide\"><table>\n<tr>");
    head.iter().for_each(|name| out.push_str(&format!("<th>{}</th>", escape(name))));
    out.push_str("</tr>\n");
    for row in rows {
        out.push_str("<tr>");
        for cell in row {
            let figures = cell.starts_with(|c: char| c.is_ascii_digit() || c == '–');
            out.push_str(&format!("<td{}>{cell}</td>", if figures { " class=\"n\"" } else { "" }));
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
}

/// Text as HTML. Controls, which HTML cannot hold, become marks.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_cannot_become_markup() {
        assert_eq!(escape("<b a=\"x\">&'\u{0}\r\n"), "&lt;b a=&quot;x&quot;&gt;&amp;&#39;\u{fffd}\u{fffd}\n");
    }

    #[test]
    fn thresholds_stand_where_their_values_do() {
        let borders = [0.0, 1.0, 3.0, 7.0];
        assert_eq!(place(&borders, 0.0), 0.0);
        assert_eq!(place(&borders, 2.0), 1.5);
        assert_eq!(place(&borders, 7.0), 3.0);
        assert_eq!(place(&borders, 8.0), f64::INFINITY);
        assert_eq!(place(&borders, -1.0), 0.0);
    }
}
