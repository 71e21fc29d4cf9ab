//! `fulgurite review`

use anyhow::{Context, Result};
use pipeline::pii::PiiFinder;
use pipeline::report::{Excerpt, by_rule, by_source};
use pipeline::review::{Marks, Precision, precision};
use pipeline::status::summaries;

use crate::cli::{Review, ReviewBy};
use crate::commands::existing;
use crate::exit::Usage;
use crate::output;

mod server;

/// Characters of a document that are shown.
const SHOWN_CHARS: usize = 12_000;

/// Serve a page to mark documents on, or print what the marks say.
pub fn review(args: &Review) -> Result<()> {
    let run = existing(&args.run)?;
    let stages = summaries(run)?;
    if args.summary {
        let found = precision(&Marks::read(run, &stages)?);
        return if args.json { output::json(&found) } else { Ok(output::line(table(&found))?) };
    }
    let stage = args.stage.as_deref();
    if let Some(stage) = stage.filter(|&stage| stages.iter().all(|s| s.stage != stage)) {
        let names: Vec<&str> = stages.iter().map(|s| s.stage.as_str()).collect();
        return Err(Usage(format!("the run has no stage \"{stage}\"; it has {}", names.join(", "))).into());
    }
    // Whether a rule is right about personal data can only be told by who sees it; nothing leaves this machine.
    let excerpt = Excerpt { chars: SHOWN_CHARS, hidden: PiiFinder::default() };
    let samples = match args.by {
        ReviewBy::Rule => {
            let mut dropped = by_rule(run, &stages, args.documents, &excerpt, args.seed)?;
            dropped.retain(|sample| stage.is_none_or(|stage| sample.stage == stage));
            dropped
        }
        ReviewBy::Source => by_source(run, &stages, stage, args.documents, &excerpt, args.seed)?,
    };
    if samples.is_empty() {
        return Ok(output::line("there is no document to review")?);
    }
    let count = samples.len();
    let server = server::Server::bind(args.port, samples, Marks::open(run, &stages)?)
        .with_context(|| format!("port {} of the loopback interface; choose another with --port", args.port))?;
    output::line(format!("http://{}/", server.address()))?;
    output::note(format!("{count} documents; marks go to {}; stop with Ctrl-C", Marks::path(run).display()));
    server.serve();
    Ok(())
}

/// The figures as a table.
fn table(found: &[Precision]) -> String {
    if found.is_empty() {
        return "no document has been marked; `fulgurite review RUN` serves a page to do it on".into();
    }
    let head = ["stage", "rule", "drop", "keep", "unsure", "precision", "95% interval", "changed", "gone"];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(found.iter().map(|p| {
        let name = match (&p.rule, &p.source) {
            (Some(rule), _) => rule.clone(),
            (None, source) => format!("kept, {}", source.as_deref().unwrap_or("any source")),
        };
        vec![
            p.stage.clone(),
            name,
            p.drop.to_string(),
            p.keep.to_string(),
            p.unsure.to_string(),
            p.precision.map_or("-".into(), |p| format!("{p:.3}")),
            p.interval.map_or("-".into(), |(low, high)| format!("{low:.3} to {high:.3}")),
            p.changed.to_string(),
            p.gone.to_string(),
        ]
    }));
    let mut told = output::table(&rows);
    if found.iter().any(|p| p.changed + p.gone > 0) {
        told.push_str(
            "\nchanged: marks of documents of which the run says something else by now; gone: of documents that it does not have \
             any more. They are kept, and in no other figure.",
        );
    }
    told
}
