//! `fulgurite status`

use anyhow::Result;
use pipeline::StageState;
use pipeline::status::{StageSummary, summaries};

use crate::cli::Status;
use crate::output::{self, bytes, thousands};

/// Print what each stage of a run has done.
pub fn status(args: &Status) -> Result<()> {
    let stages = summaries(&args.run)?;
    if args.json { output::json(&stages) } else { Ok(output::line(table(&stages))?) }
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
            match stage.state {
                StageState::Done => "done".into(),
                StageState::Running => "unfinished".into(),
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
