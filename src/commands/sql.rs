//! `fulgurite sql`

use std::sync::Arc;

use anyhow::{Context, Result};
use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions, StringArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::json::LineDelimitedWriter;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use arrow::util::pretty::pretty_format_batches;
use datafusion::execution::context::SQLOptions;
use datafusion::logical_expr::ScalarUDF;
use futures::StreamExt;

use crate::cli::Sql;
use crate::commands::existing;
use crate::commands::run::runtime;
use crate::exit::Usage;
use crate::output;

/// Rows printed at a time: a table of them is aligned together.
const TABLE_ROWS: usize = 1000;
/// Characters of a value that a table shows: one page of text would push every other column off the screen.
const CELL_CHARS: usize = 60;

/// Answer a query over a run, or list its tables.
pub fn sql(args: &Sql) -> Result<()> {
    runtime(None)?.block_on(async {
        let (session, tables) = pipeline::sql::session(existing(&args.run)?, functions()).await?;
        let Some(query) = &args.query else {
            for table in tables {
                let columns: Vec<String> =
                    session.table(table.as_str()).await?.schema().fields().iter().map(|f| f.name().clone()).collect();
                output::line(match args.json {
                    true => serde_json::json!({ "table": table, "columns": columns }).to_string(),
                    false => format!("{table}({})", columns.join(", ")),
                })?;
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
            batches.push(cells(&batch)?);
            if held >= TABLE_ROWS {
                output::line(pretty_format_batches(&batches)?.to_string())?;
                printed = true;
                (batches, held) = (Vec::new(), 0);
            }
        }
        if held > 0 || !printed {
            batches.insert(0, cells(&RecordBatch::new_empty(schema))?);
            output::line(pretty_format_batches(&batches)?.to_string())?;
        }
        Ok(())
    })
}

/// The values of a batch as a table shows them: on one line, and cut where they are long.
fn cells(batch: &RecordBatch) -> Result<RecordBatch> {
    let options = FormatOptions::default();
    let mut columns = Vec::with_capacity(batch.num_columns());
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        let values = ArrayFormatter::try_new(column, &options)?;
        let values = (0..batch.num_rows()).map(|row| Some(cell(&values.value(row).to_string())));
        columns.push((field.name().clone(), Arc::new(StringArray::from_iter(values)) as ArrayRef));
    }
    let schema: SchemaRef = Arc::new(Schema::new(
        columns.iter().map(|(name, _)| Field::new(name, DataType::Utf8, true)).collect::<Vec<_>>(),
    ));
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    let columns = columns.into_iter().map(|(_, column)| column).collect();
    Ok(RecordBatch::try_new_with_options(schema, columns, &options)?)
}

fn cell(value: &str) -> String {
    let mut shown = String::new();
    let mut chars = value.chars();
    for c in chars.by_ref().take(CELL_CHARS) {
        match c {
            '\n' => shown.push('↵'),
            c if c.is_control() => shown.push(' '),
            c => shown.push(c),
        }
    }
    if chars.next().is_some() {
        shown.pop();
        shown.push('…');
    }
    shown
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_value_is_cut_and_stays_on_its_line() {
        assert_eq!(cell("a\nb\tc"), "a↵b c");
        assert_eq!(cell(&"é".repeat(CELL_CHARS)), "é".repeat(CELL_CHARS));
        assert_eq!(cell(&"é".repeat(1000)), format!("{}…", "é".repeat(CELL_CHARS - 1)));
    }
}
