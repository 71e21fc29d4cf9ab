//! Stage `filter`: keep or drop, decided by SQL rules over the columns of the signals.

use std::collections::{BTreeMap, BTreeSet};

use arrow::datatypes::DataType;
use async_trait::async_trait;
use datafusion::common::ScalarValue;
use datafusion::functions_nested::expr_fn::{array_compact, make_array};
use datafusion::logical_expr::expr::Case;
use datafusion::logical_expr::{Expr, cast};
use datafusion::prelude::{DataFrame, col, ident, lit};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::run::RunContext;
use crate::signals::SignalsConfig;
use crate::signals::profiles::{self, LanguageRules, Rule, RuleError};
use crate::stage::{Output, RULE, RowsRead, Stage, Task, TaskContext, TaskReport, tasks_per_shard};

/// Columns of the kept shards.
pub const KEPT: [&str; 2] = ["id", "ordinal"];

/// Columns of the dropped shards: the first rule that dropped the document, the value of that rule's signal
/// and its threshold (null where the predicate does not show them), and all rules that drop it.
pub const DROPPED: [&str; 6] = ["id", "ordinal", RULE, "value", "threshold", "rules"];

/// Which rules decide.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FilterConfig {
    /// Named profiles, in order: see [`profiles::PROFILES`].
    pub profiles: Vec<String>,
    /// Thresholds that replace the published ones, by name of the rule.
    pub thresholds: BTreeMap<String, f64>,
    /// Rules of the recipe, after those of the profiles.
    pub rules: Vec<RuleConfig>,
    /// What is different for a language, by its code: thresholds, and rules that are off.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub languages: BTreeMap<String, LanguageRules>,
}

impl Default for FilterConfig {
    fn default() -> Self {
        Self {
            profiles: ["gopher", "c4", "fineweb"].map(String::from).into(),
            thresholds: BTreeMap::new(),
            rules: Vec::new(),
            languages: BTreeMap::new(),
        }
    }
}

/// A rule of the recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    /// Unique name, lower-case letters, digits and underscores.
    pub name: String,
    /// SQL predicate over the signals; documents for which it is true are dropped.
    pub drop_when: String,
}

impl FilterConfig {
    /// The rules in the order of evaluation, every predicate planned against the columns that `signals` gives.
    ///
    /// # Errors
    /// [`Error::Setting`] for an unknown profile, rule or signal, with a suggestion, and for a
    /// predicate that is not SQL or not Boolean.
    pub fn resolve(&self, signals: &SignalsConfig) -> Result<Vec<Rule>> {
        let own = self.rules.iter().map(|rule| (rule.name.as_str(), rule.drop_when.as_str()));
        let profiles = self.profiles.iter().map(String::as_str);
        profiles::resolve(profiles, &self.thresholds, own, &self.languages, &signals.schema()).map_err(|error| {
            let why = match &error {
                RuleError::UnknownSignal { column, .. } => signals.why_not(column),
                _ => "",
            };
            Error::setting(self.key_of(&error), format!("{error}{why}"))
        })
    }
}

impl FilterConfig {
    /// The key of the recipe that an error is about.
    fn key_of(&self, error: &RuleError) -> String {
        let rule = |name: &str, key: &str| match self.rules.iter().rposition(|rule| rule.name == name) {
            Some(number) => format!("filter.rules.{number}.{key}"),
            None => "filter.profiles".into(),
        };
        // An error of a language's rules, whose names and numbers stand in no other place.
        let of_language = |name: &str| {
            self.languages.iter().find_map(|(code, of)| {
                let key = if of.thresholds.contains_key(name) && !self.thresholds.contains_key(name) {
                    format!("thresholds.{name}")
                } else {
                    format!("off.{}", of.off.iter().position(|off| off == name)?)
                };
                Some(format!("filter.languages.{code}.{key}"))
            })
        };
        match error {
            RuleError::UnknownProfile { .. } => "filter.profiles".into(),
            RuleError::Language { code } => format!("filter.languages.{code}"),
            RuleError::UnknownRule { name, .. }
            | RuleError::NoThreshold { name, .. }
            | RuleError::NotFinite { name, .. } => {
                of_language(name).unwrap_or_else(|| format!("filter.thresholds.{name}"))
            }
            RuleError::Name { name } | RuleError::Twice { name } => rule(name, "name"),
            RuleError::UnknownSignal { rule: name, .. } | RuleError::Predicate { rule: name, .. } => {
                rule(name, "drop_when")
            }
        }
    }
}

/// Drops documents by rules over their signals. It reads the shards of the signals alone, so another
/// threshold costs one scan of a few columns. Kept rows are `id` and `ordinal`.
pub struct FilterStage {
    signals: String,
    rules: Vec<Rule>,
}

impl FilterStage {
    /// Over the shards of stage `signals`, which has the columns of `columns`.
    ///
    /// # Errors
    /// As [`FilterConfig::resolve`].
    pub fn new(signals: impl Into<String>, config: &FilterConfig, columns: &SignalsConfig) -> Result<Self> {
        Ok(Self { signals: signals.into(), rules: config.resolve(columns)? })
    }

    /// The rules in the order of evaluation.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }
}

#[async_trait]
impl Stage for FilterStage {
    fn name(&self) -> &str {
        "filter"
    }

    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        vec![self.signals.clone()]
    }

    /// The resolved rules: a profile is only their abbreviation.
    fn config(&self) -> Result<serde_json::Value> {
        let rules: Vec<_> = self
            .rules
            .iter()
            .map(|rule| {
                serde_json::json!({
                    "name": rule.name,
                    "drop_when": rule.drop_when,
                    "signal": rule.signal,
                    "threshold": rule.threshold,
                })
            })
            .collect();
        Ok(serde_json::json!({ "signals": self.signals, "rules": rules }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, &self.signals)
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = task.session();
        let read = task.run.shard(&self.signals, task.index())?;
        let signals = task.read(&session, &self.signals, task.index()).await?;
        let verdicts = with_verdicts(signals, &self.rules)?;
        task.write(verdicts, Output { kept: &KEPT, dropped: &DROPPED }, RowsRead::Known(read.rows)).await
    }
}

/// From `id`, `ordinal` and the signals to the columns of [`DROPPED`].
fn with_verdicts(signals: DataFrame, rules: &[Rule]) -> Result<DataFrame> {
    // Every predicate becomes a column first, so that it is evaluated once. A name with a space cannot be
    // a signal's.
    let verdict = |number: usize| format!("drop {number}");
    let reported: BTreeSet<&str> = rules.iter().filter_map(|rule| rule.signal.as_deref()).collect();
    let mut columns = vec![col("id"), col("ordinal")];
    columns.extend(reported.into_iter().map(ident));
    for (number, rule) in rules.iter().enumerate() {
        columns.push(signals.parse_sql_expr(&rule.drop_when)?.is_true().alias(verdict(number)));
        if let Some(sql) = &rule.threshold_sql {
            let threshold = cast(signals.parse_sql_expr(sql)?, DataType::Float64);
            columns.push(threshold.alias(format!("threshold of {}", rule.name)));
        }
    }
    let name_of = |rule: &Rule| lit(ScalarValue::Utf8View(Some(rule.name.clone())));
    let first = |null: ScalarValue, of: &dyn Fn(&Rule) -> Expr| {
        first_true(rules.iter().enumerate().map(|(number, rule)| (ident(verdict(number)), of(rule))), null)
    };
    let no_number = ScalarValue::Float64(None);
    let rule = first(ScalarValue::Utf8View(None), &name_of);
    let value = first(no_number.clone(), &|rule| match &rule.signal {
        Some(signal) => cast(ident(signal), DataType::Float64),
        None => lit(no_number.clone()),
    });
    let mut thresholds = Vec::with_capacity(rules.len());
    for rule in rules {
        thresholds.push(match &rule.threshold_sql {
            // Only as a name of a column: it is computed below, where the language is still there.
            Some(_) => ident(format!("threshold of {}", rule.name)),
            None => lit(ScalarValue::Float64(rule.threshold)),
        });
    }
    let threshold = first_true(
        thresholds.into_iter().enumerate().map(|(number, threshold)| (ident(verdict(number)), threshold)),
        no_number.clone(),
    );
    let names = rules.iter().enumerate().map(|(number, rule)| {
        first_true([(ident(verdict(number)), name_of(rule))].into_iter(), ScalarValue::Utf8View(None))
    });
    let all = if rules.is_empty() {
        lit(ScalarValue::List(ScalarValue::new_list(&[], &DataType::Utf8View, true)))
    } else {
        array_compact(make_array(names.collect()))
    };
    Ok(signals.select(columns)?.select(vec![
        col("id"),
        col("ordinal"),
        rule.alias(RULE),
        value.alias("value"),
        threshold.alias("threshold"),
        all.alias("rules"),
    ])?)
}

/// The value beside the first condition that is true; null when none is.
fn first_true(cases: impl Iterator<Item = (Expr, Expr)>, null: ScalarValue) -> Expr {
    let cases: Vec<_> = cases.map(|(condition, value)| (Box::new(condition), Box::new(value))).collect();
    if cases.is_empty() {
        return lit(null);
    }
    Expr::Case(Case::new(None, cases, Some(Box::new(lit(null)))))
}
