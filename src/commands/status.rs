//! `fulgurite status`

use anyhow::Result;
use pipeline::StageState;
use pipeline::status::{StageSummary, summaries};

use crate::cli::Status;
use crate::commands::existing;
use crate::output::{self, bytes, thousands};

/// Print what each stage of a run has done.
pub fn status(args: &Status) -> Result<()> {
    let stages = summaries(existing(&args.run)?)?;
    if args.json {
        return output::json(&stages);
    }
    output::line(table(&stages))?;
    for stage in &stages {
        if let Some(reason) = &stage.outdated {
            output::line(format!("{}: {reason}", stage.stage))?;
        }
    }
    Ok(())
}

/// The stages as a table; also printed at the end of a run.
pub fn table(stages: &[StageSummary]) -> String {
    let mut rows =
        vec![["stage", "state", "tasks", "read", "kept", "dropped", "size", "seconds"].map(String::from).to_vec()];
    for stage in stages {
        let t = &stage.totals;
        // A stage that makes no rows (a tokenizer, a model) has no row counts.
        let count = |n: u64| if t.rows_read == 0 { "-".into() } else { thousands(n) };
        rows.push(vec![
            stage.stage.clone(),
            match (&stage.outdated, stage.state) {
                (Some(_), _) => "outdated".into(),
                (None, StageState::Done) => "done".into(),
                (None, StageState::Running) => "unfinished".into(),
            },
            format!("{}/{}", stage.done, stage.tasks),
            count(t.rows_read),
            count(t.rows_kept),
            count(t.rows_dropped()),
            bytes(t.bytes),
            format!("{:.1}", t.seconds),
        ]);
    }
    output::table(&rows)
}
