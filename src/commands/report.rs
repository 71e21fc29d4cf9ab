//! `fulgurite report`

use anyhow::Result;

use crate::cli::Report;
use crate::commands::existing;
use crate::output::{self, thousands};

/// Print what each rule dropped.
pub fn report(args: &Report) -> Result<()> {
    let rules = pipeline::report::rules(existing(&args.run)?)?;
    if args.json {
        return output::json(&rules);
    }
    if rules.is_empty() {
        return Ok(output::line("nothing was dropped")?);
    }
    let number = |n: Option<f64>| {
        n.map_or("-".into(), |n| format!("{n:.4}").trim_end_matches('0').trim_end_matches('.').to_string())
    };
    let mut rows = vec![["stage", "rule", "dropped", "share", "threshold", "median value"].map(String::from).to_vec()];
    rows.extend(rules.iter().map(|r| {
        vec![
            r.stage.clone(),
            r.rule.clone(),
            thousands(r.dropped),
            format!("{:.2}%", r.share * 100.0),
            number(r.threshold),
            number(r.median_value),
        ]
    }));
    Ok(output::line(output::table(&rows))?)
}
