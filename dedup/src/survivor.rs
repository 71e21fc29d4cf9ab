//! Which copy of a document survives.

use std::collections::{BTreeMap, BTreeSet};

use arrow::datatypes::SchemaRef;
use datafusion::dataframe::DataFrame;
use datafusion::error::Result as PlanResult;
use datafusion::logical_expr::LogicalPlan;
use datafusion::prelude::{SessionContext, col, ident};
use pipeline::document::SCHEMA;
use pipeline::{Error, Result, TaskContext};
use serde::{Deserialize, Serialize};

use crate::documents::ROW_BYTES;
use crate::runs::{u32_at, u64_at};
use crate::selection::{no_rows, planning_session};

/// Survivor policy: a total order of the members of a cluster, whatever order they were found in. Among
/// equals the smallest ordinal survives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// The smallest ordinal.
    #[default]
    Earliest,
    /// The most bytes of text (of texts of 4 GiB and more, the earliest).
    Longest,
    /// The highest value of a SQL expression over the columns of the documents and, where the recipe has
    /// `[signals]`, the signals: a number. Null is the lowest of all. Where both have a column of a name, as `language` may
    /// be, the name is the signal's, and `document_language` the document's.
    Highest(String),
    /// The lowest value. Null is the highest of all.
    Lowest(String),
}

impl Keep {
    /// The expression that the policy needs to be told.
    pub(crate) fn expression(&self) -> Option<&str> {
        match self {
            Self::Highest(expression) | Self::Lowest(expression) => Some(expression),
            Self::Earliest | Self::Longest => None,
        }
    }

    /// Bytes that it adds to a row of the table of documents.
    pub(crate) fn row_bytes(&self) -> usize {
        if self.expression().is_some() { 8 } else { 0 }
    }

    /// Rank by the value of the expression: the smaller, the better.
    pub(crate) fn rank_of(&self, value: Option<f64>) -> u64 {
        let Some(value) = value.filter(|v| !v.is_nan()) else { return u64::MAX };
        // Adding zero makes one of the two zeroes. Then the order of the bits is that of the numbers.
        let bits = (value + 0.0).to_bits();
        let ascending = if bits >> 63 == 1 { !bits } else { bits | 1 << 63 };
        if matches!(self, Self::Highest(_)) { !ascending } else { ascending }
    }

    /// Rank of the document of a table row.
    pub(crate) fn rank(&self, row: &[u8]) -> u64 {
        match self {
            Self::Earliest => 0,
            Self::Longest => u64::from(!u32_at(row, 4)),
            Self::Highest(_) | Self::Lowest(_) => u64_at(row, ROW_BYTES),
        }
    }

    /// Refuses an expression that cannot be planned over the columns of a document and those of stage `signals`, as far
    /// as `schemas` tell them. The policy is key `keep` of the recipe's table `table`.
    pub(crate) fn check(
        &self,
        table: &str,
        signals: Option<&str>,
        schemas: &BTreeMap<String, SchemaRef>,
    ) -> Result<()> {
        let policy = match self {
            Self::Highest(_) => "highest",
            Self::Lowest(_) => "lowest",
            Self::Earliest | Self::Longest => return Ok(()),
        };
        let columns = signals.and_then(|stage| schemas.get(stage));
        if signals.is_some() && columns.is_none() {
            // Signals of a stage that does not tell its columns: only its shards will.
            return Ok(());
        }
        // Planning over tables in memory waits for nothing.
        match futures::executor::block_on(self.plan(columns)) {
            Ok(_) => Ok(()),
            Err(e) => Err(Error::setting(format!("{table}.keep.{policy}"), e.strip_backtrace())),
        }
    }

    /// The plan of [`Self::with_value`] over no rows.
    async fn plan(&self, signals: Option<&SchemaRef>) -> PlanResult<LogicalPlan> {
        let session = planning_session();
        let documents = no_rows(&session, &SCHEMA)?;
        let signals = signals.map(|schema| no_rows(&session, schema)).transpose()?;
        self.value_of(&session, documents, signals).await?.into_optimized_plan()
    }

    /// `documents` with the value of the expression as a column `value`, null without one; in order.
    pub(crate) async fn with_value(
        &self,
        task: &TaskContext,
        session: &SessionContext,
        documents: DataFrame,
        signals: Option<&str>,
    ) -> Result<DataFrame> {
        let signals = match signals.filter(|_| self.expression().is_some()) {
            None => None,
            Some(stage) => Some(task.read(session, stage, task.index()).await?),
        };
        let refuse = |e| Error::Recipe(format!("keep: {}: {e}", self.expression().unwrap_or_default()));
        self.value_of(session, documents, signals).await.map_err(refuse)
    }

    async fn value_of(
        &self,
        session: &SessionContext,
        documents: DataFrame,
        signals: Option<DataFrame>,
    ) -> PlanResult<DataFrame> {
        let value = self.expression().map_or("null".into(), |e| format!("({e})"));
        let of_signals: BTreeSet<String> =
            signals.iter().flat_map(names).filter(|n| n != "id" && n != "ordinal").collect();
        // A name means one column in the expression: that of the signals, if they have it.
        let inside = |name: &str| match of_signals.contains(name) {
            true => format!("document_{name}"),
            false => name.to_string(),
        };
        let of_documents = names(&documents);
        let columns: Vec<_> = of_documents.iter().map(|name| ident(name).alias(inside(name))).collect();
        session.register_table("documents", documents.select(columns)?.into_view())?;
        let from = match signals {
            None => "documents",
            Some(rows) => {
                let columns = of_signals.iter().map(ident);
                let columns: Vec<_> = columns.chain([col("ordinal").alias("signals_of")]).collect();
                session.register_table("signals", rows.select(columns)?.into_view())?;
                // The signals, few bytes a document, are the build side; the text streams past in order.
                "signals right join documents on signals_of = ordinal"
            }
        };
        let columns: Vec<String> = of_documents
            .iter()
            .map(|name| format!("documents.{} as {}", quoted(&inside(name)), quoted(name)))
            .collect();
        session.sql(&format!("select {}, cast({value} as double) as value from {from}", columns.join(", "))).await
    }
}

/// Names of the columns of `rows`.
fn names(rows: &DataFrame) -> Vec<String> {
    rows.schema().fields().iter().map(|field| field.name().clone()).collect()
}

/// A name in SQL.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_in_the_order_of_the_values() {
        let values = [-f64::INFINITY, -2.5, -1e-300, 0.0, 1e-300, 1.0, 7e200, f64::INFINITY];
        let (lowest, highest) = (Keep::Lowest("x".into()), Keep::Highest("x".into()));
        assert!(values.is_sorted_by(|a, b| lowest.rank_of(Some(*a)) < lowest.rank_of(Some(*b))));
        assert!(values.is_sorted_by(|a, b| highest.rank_of(Some(*a)) > highest.rank_of(Some(*b))));
        for keep in [lowest, highest] {
            assert_eq!(keep.rank_of(Some(-0.0)), keep.rank_of(Some(0.0)));
            assert!(values.iter().all(|v| keep.rank_of(Some(*v)) < keep.rank_of(None)));
            assert_eq!(keep.rank_of(Some(f64::NAN)), keep.rank_of(None));
        }
    }

    #[test]
    fn a_recipe_names_a_policy_or_an_expression() {
        let parsed: Keep = serde_json::from_str(r#"{"highest": "quality"}"#).unwrap();
        assert_eq!(parsed, Keep::Highest("quality".into()));
        assert_eq!(serde_json::from_str::<Keep>(r#""longest""#).unwrap(), Keep::Longest);
    }
}
