//! `fulgurite sql`

use anyhow::{Context, Result};
use arrow::json::LineDelimitedWriter;
use arrow::util::pretty::pretty_format_batches;
use datafusion::execution::context::SQLOptions;
use datafusion::logical_expr::ScalarUDF;
use futures::StreamExt;

use crate::cli::Sql;
use crate::commands::run::runtime;
use crate::exit::Usage;
use crate::output;

/// Rows printed at a time: a table of them is aligned together.
const TABLE_ROWS: usize = 1000;

/// Answer a query over a run, or list its tables.
pub fn sql(args: &Sql) -> Result<()> {
    runtime(None)?.block_on(async {
        let (session, tables) = pipeline::sql::session(&args.run, functions()).await?;
        let Some(query) = &args.query else {
            for table in tables {
                let columns: Vec<String> =
                    session.table(table.as_str()).await?.schema().fields().iter().map(|f| f.name().clone()).collect();
                output::line(format!("{table}({})", columns.join(", ")))?;
            }
            return Ok(());
        };
        let plan = session
            .sql_with_options(query, read_only())
            .await
            .map_err(|e| Usage(format!("{}\ntables: {}", e.strip_backtrace(), tables.join(", "))))?;
        let mut rows = plan.execute_stream().await.context("the query failed")?;
        let schema = rows.schema();
        if args.json {
            while let Some(batch) = rows.next().await {
                let mut writer = LineDelimitedWriter::new(Vec::new());
                writer.write(&batch?)?;
                writer.finish()?;
                output::piece(&String::from_utf8(writer.into_inner())?)?;
            }
            return Ok(());
        }
        // Memory stays bounded: a long answer is printed as several tables.
        let (mut batches, mut held, mut printed) = (Vec::new(), 0, false);
        while let Some(batch) = rows.next().await {
            let batch = batch?;
            held += batch.num_rows();
            batches.push(batch);
            if held >= TABLE_ROWS {
                output::line(pretty_format_batches(&batches)?.to_string())?;
                printed = true;
                (batches, held) = (Vec::new(), 0);
            }
        }
        if held > 0 || !printed {
            batches.insert(0, arrow::array::RecordBatch::new_empty(schema));
            output::line(pretty_format_batches(&batches)?.to_string())?;
        }
        Ok(())
    })
}

/// A question changes nothing: no tables, no files, no settings.
fn read_only() -> SQLOptions {
    SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false)
}

/// Every function that a stage uses can be used in a question too.
fn functions() -> Vec<ScalarUDF> {
    let mut functions = vec![pipeline::signals::udf::signals(), pipeline::signals::udf::c4_clean()];
    functions.extend(dedup::udfs());
    functions
}
