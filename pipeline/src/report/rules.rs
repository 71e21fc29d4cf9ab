//! What was removed, by stage and rule: a lazy Polars scan over the dropped shards.

use std::path::Path;

use polars::prelude::{IntoLazy, LazyFrame, PlRefPath, ScanArgsParquet, col, len};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::manifest::Journal;
use crate::status::summaries;

/// How often a rule dropped a row, and how far from its threshold.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RuleReport {
    /// Stage name.
    pub stage: String,
    /// Rule name.
    pub rule: String,
    /// Rows it dropped.
    pub dropped: u64,
    /// Share of the rows that the stage read.
    pub share: f64,
    /// Threshold, where the rule has one.
    pub threshold: Option<f64>,
    /// Median of the value that failed, where the rule has one.
    pub median_value: Option<f64>,
}

/// The rules that dropped anything in `run_dir`, in stage order, the busiest rule first.
pub fn rules(run_dir: &Path) -> Result<Vec<RuleReport>> {
    let mut report = Vec::new();
    for summary in summaries(run_dir)? {
        let dir = run_dir.join(&summary.stage);
        let files: Vec<_> = Journal::read(&dir)?
            .into_values()
            .flat_map(|e| e.files)
            .filter(|f| f.path.starts_with("dropped") && f.rows > 0)
            .map(|f| dir.join(f.path))
            .collect();
        if files.is_empty() {
            continue;
        }
        let fail = |e: polars::error::PolarsError| Error::Corrupt { path: dir.join("dropped"), reason: e.to_string() };
        let paths = files.iter().map(|p| PlRefPath::new(p.to_string_lossy())).collect::<Vec<_>>().into();
        let mut rows = LazyFrame::scan_parquet_files(paths, ScanArgsParquet::default()).map_err(fail)?;
        let valued = rows.collect_schema().map_err(fail)?.contains("value");
        let mut sums = vec![len().alias("dropped")];
        if valued {
            sums.push(col("threshold").first());
            sums.push(col("value").median());
        }
        let sums = rows.group_by([col("rule")]).agg(sums).collect().map_err(fail)?;
        let sums = sums.lazy().sort_by_exprs([col("dropped"), col("rule")], sort_options()).collect().map_err(fail)?;
        let number = |name: &str, i: usize| -> Option<f64> {
            sums.column(name).ok()?.get(i).ok()?.try_extract::<f64>().ok().filter(|v| v.is_finite())
        };
        for i in 0..sums.height() {
            let rule =
                sums.column("rule").and_then(|c| Ok(c.str()?.get(i).unwrap_or_default().to_string())).map_err(fail)?;
            let dropped = number("dropped", i).unwrap_or_default() as u64;
            report.push(RuleReport {
                stage: summary.stage.clone(),
                rule,
                dropped,
                share: dropped as f64 / (summary.totals.rows_read.max(1)) as f64,
                threshold: number("threshold", i),
                median_value: number("value", i),
            });
        }
    }
    Ok(report)
}

fn sort_options() -> polars::prelude::SortMultipleOptions {
    polars::prelude::SortMultipleOptions::default().with_order_descending_multi([true, false])
}
