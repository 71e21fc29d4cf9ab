//! Stages of `[mix]`: how much of what. Fractions of sources, and caps on domains, sources, languages or any other
//! stratum, both decided by a hash of the document's id: the same documents for any number of threads, and a smaller
//! fraction or cap keeps a subset of what a larger one keeps.
//!
//! `mix_keys` writes a row of numbers for each document that its source's fraction keeps; `mix_removals` sorts them by
//! stratum and hash, spilling what does not fit in memory, and writes what lies beyond a cap; `mix` makes it a selection.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, StringViewBuilder, UInt64Builder};
use arrow::compute::cast;
use arrow::datatypes::DataType;
use async_trait::async_trait;
use datafusion::common::JoinType;
use datafusion::common::utils::take_function_args;
use datafusion::logical_expr::{
    ColumnarValue, Expr, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility, cast as cast_to,
};
use datafusion::prelude::{DataFrame, SessionContext, col, lit, octet_length, when};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::with_languages;
use crate::error::{Error, Result};
use crate::run::RunContext;
use crate::stage::{Output, RULE, RowsRead, Stage, Task, TaskContext, TaskReport, tasks_per_shard};
use crate::urls::Address;

/// How much of what is kept. Weights above one, epochs, are the token loader's (`[train.data]`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MixConfig {
    /// Fraction of the documents of a source that is kept, by name of the source; all of the others.
    pub fractions: BTreeMap<String, f64>,
    /// Caps, each over all documents that the fractions leave.
    pub caps: Vec<CapConfig>,
    /// Seed of the hash that decides.
    pub seed: u64,
}

/// A cap on every stratum.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapConfig {
    /// Name: documents beyond it are dropped by the rule `cap_NAME`.
    pub name: String,
    /// What the strata are: `domain` (the registered domain of the address), `source`, `language` (as identified by
    /// `[signals.language]`, or else as the input says), `url`, or any SQL over these and `timestamp`. A document for
    /// which it is null is in no stratum and stays.
    pub by: String,
    /// Documents of a stratum that stay at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_documents: Option<u64>,
    /// Bytes of text of a stratum that stay at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
}

/// The stages of `config` over the documents of stage `documents` that `selection` kept. Their language is the one that
/// stage `languages` has for them, where there is one.
///
/// # Errors
/// [`Error::Setting`] for a fraction or a cap that means nothing.
pub fn mix_stages(
    config: &MixConfig,
    documents: &str,
    selection: Option<&str>,
    languages: Option<&str>,
    sources: &[String],
) -> Result<Vec<Arc<dyn Stage>>> {
    for (source, fraction) in &config.fractions {
        let key = format!("mix.fractions.{source}");
        if !sources.contains(source) {
            return Err(Error::setting(
                key,
                format!("no input has the source \"{source}\"; there are {}", sources.join(", ")),
            ));
        }
        if !(0.0..=1.0).contains(fraction) {
            return Err(Error::setting(
                key,
                format!(
                    "{fraction} is not from 0 to 1; to see documents more than once, give the source `epochs` in [train.data]"
                ),
            ));
        }
    }
    for (number, cap) in config.caps.iter().enumerate() {
        let key = format!("mix.caps.{number}");
        let fits =
            !cap.name.is_empty() && cap.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if !fits || config.caps[..number].iter().any(|c| c.name == cap.name) {
            return Err(Error::setting(
                format!("{key}.name"),
                format!("\"{}\" must be new, of lower-case letters, digits and underscores", cap.name),
            ));
        }
        if cap.max_documents.is_none() && cap.max_bytes.is_none() {
            return Err(Error::setting(key, "give max_documents or max_bytes"));
        }
        check_stratum(&cap.by).map_err(|reason| Error::setting(format!("{key}.by"), reason))?;
    }
    let base = Base {
        config: config.clone(),
        documents: documents.into(),
        selection: selection.map(String::from),
        // Only caps look at it.
        languages: languages.filter(|_| !config.caps.is_empty()).map(String::from),
    };
    let mut stages: Vec<Arc<dyn Stage>> = Vec::new();
    if !config.caps.is_empty() {
        stages.push(Arc::new(Keys(base.clone())));
        stages.push(Arc::new(Removals(config.caps.clone())));
    }
    stages.push(Arc::new(MixStage(base)));
    Ok(stages)
}

/// Plans a stratum over no rows, to find out before any work what is wrong with it.
fn check_stratum(by: &str) -> Result<(), String> {
    let session = SessionContext::new();
    let empty = arrow::array::RecordBatch::new_empty(crate::document::SCHEMA.clone());
    let planned = session
        .read_batch(empty)
        .and_then(with_domain)
        .and_then(|documents| documents.parse_sql_expr(by).and_then(|stratum| documents.select(vec![stratum])));
    planned
        .map(|_| ())
        .map_err(|e| format!("{}; columns are domain, source, language, url, timestamp", e.strip_backtrace()))
}

fn with_domain(documents: DataFrame) -> datafusion::error::Result<DataFrame> {
    documents.with_column("domain", domain().call(vec![col("url")]))
}

#[derive(Clone)]
struct Base {
    config: MixConfig,
    documents: String,
    selection: Option<String>,
    languages: Option<String>,
}

impl Base {
    fn inputs(&self) -> Vec<String> {
        let mut inputs = vec![self.documents.clone()];
        inputs.extend(self.selection.clone().filter(|s| *s != self.documents));
        inputs
    }

    fn config(&self) -> Result<serde_json::Value> {
        let settings = serde_json::to_value(&self.config).map_err(Error::abort)?;
        let mut config =
            serde_json::json!({ "documents": self.documents, "selection": self.selection, "settings": settings });
        if let Some(languages) = &self.languages {
            config["languages"] = languages.as_str().into();
        }
        Ok(config)
    }

    fn counted(&self) -> &str {
        self.selection.as_deref().unwrap_or(&self.documents)
    }

    /// Null for a document that its source's fraction keeps, else the rule.
    fn fraction_verdict(&self) -> Result<Expr> {
        let mut verdict = lit(datafusion::common::ScalarValue::Utf8View(None));
        for (source, fraction) in &self.config.fractions {
            // Of 2⁶⁴ hashes so many are kept; all of them for 1.
            let beyond = if *fraction >= 1.0 {
                lit(false)
            } else {
                mix_key(self.config.seed).call(vec![col("id")]).gt_eq(lit((fraction * 2f64.powi(64)) as u64))
            };
            let gone = col("source").eq(lit(source.as_str())).and(beyond);
            verdict = when(gone, cast_to(lit("fraction"), DataType::Utf8View)).otherwise(verdict)?;
        }
        Ok(verdict)
    }
}

/// One row of numbers for each document.
struct Keys(Base);

#[async_trait]
impl Stage for Keys {
    fn name(&self) -> &str {
        "mix_keys"
    }

    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        let mut inputs = self.0.inputs();
        inputs.extend(self.0.languages.clone());
        inputs
    }

    fn config(&self) -> Result<serde_json::Value> {
        self.0.config()
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, self.0.counted())
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = task.session();
        let base = &self.0;
        let documents = task.read_selected(&session, &base.documents, base.selection.as_deref(), task.index()).await?;
        let documents = with_languages(documents, task, &session, base.languages.as_deref()).await?;
        let documents = with_domain(documents)?;
        let sized = base.config.caps.iter().any(|cap| cap.max_bytes.is_some());
        let bytes = if sized { octet_length(col("text")) } else { lit(0u64) };
        let mut columns = vec![
            col("ordinal"),
            mix_key(base.config.seed).call(vec![col("id")]).alias("key"),
            cast_to(bytes, DataType::UInt64).alias("bytes"),
            base.fraction_verdict()?.alias("fraction"),
        ];
        for (number, cap) in base.config.caps.iter().enumerate() {
            let stratum = cast_to(documents.parse_sql_expr(&cap.by)?, DataType::Utf8View);
            columns.push(stratum_key().call(vec![stratum]).alias(format!("stratum_{number}")));
        }
        let mut kept: Vec<String> = ["ordinal", "key", "bytes"].map(String::from).into();
        kept.extend((0..base.config.caps.len()).map(|number| format!("stratum_{number}")));
        let kept: Vec<&str> = kept.iter().map(String::as_str).collect();
        let rows = documents.select(columns)?.filter(col("fraction").is_null())?;
        task.write(rows, Output { kept: &kept, dropped: &[] }, RowsRead::Made).await
    }
}

/// The documents beyond a cap, by ordinal.
struct Removals(Vec<CapConfig>);

#[async_trait]
impl Stage for Removals {
    fn name(&self) -> &str {
        "mix_removals"
    }

    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        vec!["mix_keys".into()]
    }

    fn config(&self) -> Result<serde_json::Value> {
        serde_json::to_value(&self.0).map_err(Error::abort)
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let shards: Vec<_> = run.shards("mix_keys")?.into_iter().map(|shard| shard.xxh3).collect();
        Ok(vec![Task { index: 0, inputs: serde_json::json!({ "stage": "mix_keys", "xxh3": shards }) }])
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = task.session();
        let keys = task.read_all(&session, "mix_keys").await?;
        session.register_table("keys", keys.into_view())?;
        let mut parts = Vec::new();
        for (number, cap) in self.0.iter().enumerate() {
            // The order within a stratum is one of distinct keys, so the removals are a function of the documents.
            let over = format!(
                "OVER (PARTITION BY stratum_{number} ORDER BY key, ordinal ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW)"
            );
            let mut beyond = Vec::new();
            beyond.extend(cap.max_documents.map(|max| format!("place > {max}")));
            beyond.extend(cap.max_bytes.map(|max| format!("total > {max}")));
            parts.push(format!(
                "SELECT ordinal, {number} AS cap FROM (SELECT ordinal, row_number() {over} AS place, sum(bytes) {over} AS total \
                 FROM keys WHERE stratum_{number} IS NOT NULL) WHERE {}",
                beyond.join(" OR ")
            ));
        }
        let sql = format!(
            "SELECT ordinal, min(cap) AS cap FROM ({}) GROUP BY ordinal ORDER BY ordinal",
            parts.join(" UNION ALL ")
        );
        let removals = session.sql(&sql).await?;
        task.write(removals, Output { kept: &["ordinal", "cap"], dropped: &[] }, RowsRead::Made).await
    }
}

/// The selection: documents that fractions and caps leave.
struct MixStage(Base);

/// Name of the stage whose shards are the selection.
pub const NAME: &str = "mix";

#[async_trait]
impl Stage for MixStage {
    fn name(&self) -> &str {
        NAME
    }

    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        let mut inputs = self.0.inputs();
        inputs.extend((!self.0.config.caps.is_empty()).then(|| "mix_removals".to_owned()));
        inputs
    }

    fn config(&self) -> Result<serde_json::Value> {
        self.0.config()
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, self.0.counted())
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let session = task.session();
        let base = &self.0;
        let index = task.index();
        let read = task.run.shard(base.counted(), index)?;
        let documents = task.read_selected(&session, &base.documents, base.selection.as_deref(), index).await?;
        let documents = documents.select(vec![
            col("id"),
            col("ordinal"),
            col("source"),
            base.fraction_verdict()?.alias("fraction"),
        ])?;
        let mut rule = col("fraction");
        let documents = if base.config.caps.is_empty() {
            documents
        } else {
            // Ordinals of shard N begin with N, so the removals of this shard are one range of them.
            let first = u64::from(index) << 32;
            let of_shard = col("ordinal").gt_eq(lit(first)).and(col("ordinal").lt_eq(lit(first | 0xffff_ffff)));
            let removals = task.read_all(&session, "mix_removals").await?.filter(of_shard)?;
            let removals = removals.select(vec![col("ordinal").alias("removed"), col("cap")])?;
            let mut name = lit(datafusion::common::ScalarValue::Utf8View(None));
            for (number, cap) in base.config.caps.iter().enumerate() {
                let text = cast_to(lit(format!("cap_{}", cap.name)), DataType::Utf8View);
                name = when(col("cap").eq(lit(number as i64)), text).otherwise(name)?;
            }
            rule = when(col("fraction").is_not_null(), col("fraction")).otherwise(name)?;
            let joined = documents.join(removals, JoinType::Left, &["ordinal"], &["removed"], None)?;
            joined.sort(vec![col("ordinal").sort(true, false)])?
        };
        let verdicts = documents.select(vec![col("id"), col("ordinal"), col("source"), rule.alias(RULE)])?;
        let output = Output { kept: &["id", "ordinal"], dropped: &["id", "ordinal", "source", RULE] };
        task.write(verdicts, output, RowsRead::Known(read.rows)).await
    }
}

/// A function of one column, row by row.
#[derive(Debug, PartialEq, Eq, Hash)]
struct RowFunction {
    kind: Kind,
    signature: Signature,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    /// `mix_key(id)`: the hash that decides.
    Key { seed: u64 },
    /// `stratum_key(text)`: 64 bits for a name; null for null.
    Stratum,
    /// `domain(url)`: the registered domain; null where there is none.
    Domain,
}

fn function(kind: Kind) -> ScalarUDF {
    ScalarUDF::from(RowFunction { kind, signature: Signature::any(1, Volatility::Immutable) })
}

fn mix_key(seed: u64) -> ScalarUDF {
    function(Kind::Key { seed })
}

fn stratum_key() -> ScalarUDF {
    function(Kind::Stratum)
}

/// `domain(url)`: the registered domain of an address, by the public suffix list; null where there is none.
pub fn domain() -> ScalarUDF {
    function(Kind::Domain)
}

impl ScalarUDFImpl for RowFunction {
    fn name(&self) -> &str {
        match self.kind {
            Kind::Key { .. } => "mix_key",
            Kind::Stratum => "stratum_key",
            Kind::Domain => "domain",
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> datafusion::error::Result<DataType> {
        Ok(if self.kind == Kind::Domain { DataType::Utf8View } else { DataType::UInt64 })
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> datafusion::error::Result<ColumnarValue> {
        let [values] = take_function_args(self.name(), &args.args)?;
        let values = values.to_array(args.number_rows)?;
        let array: ArrayRef = match self.kind {
            Kind::Key { seed } => {
                let ids = cast(&values, &DataType::Binary)?;
                let mut keys = UInt64Builder::with_capacity(ids.len());
                ids.as_binary::<i32>()
                    .iter()
                    .for_each(|id| keys.append_option(id.map(|id| xxh3_64_with_seed(id, seed))));
                Arc::new(keys.finish())
            }
            Kind::Stratum => {
                let names = cast(&values, &DataType::Utf8View)?;
                let mut keys = UInt64Builder::with_capacity(names.len());
                names.as_string_view().iter().for_each(|name| keys.append_option(name.map(|n| xxh3_64(n.as_bytes()))));
                Arc::new(keys.finish())
            }
            Kind::Domain => {
                let urls = cast(&values, &DataType::Utf8View)?;
                let mut domains = StringViewBuilder::with_capacity(urls.len());
                for url in urls.as_string_view() {
                    domains.append_option(url.and_then(Address::parse).map(|address| address.domain().to_owned()));
                }
                Arc::new(domains.finish())
            }
        };
        Ok(ColumnarValue::Array(array))
    }
}
