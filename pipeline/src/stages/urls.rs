//! Stage `urls`: keep or drop by the address of a document.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, StringViewBuilder, StructArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Fields};
use async_trait::async_trait;
use datafusion::common::utils::take_function_args;
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};
use datafusion::prelude::{col, ident};

use crate::error::{Error, Result};
use crate::run::RunContext;
use crate::shared::Shared;
use crate::stage::{Output, RULE, RowsRead, Stage, Task, TaskContext, TaskReport, tasks_per_shard};
use crate::urls::{UrlFilter, UrlsConfig};

/// Columns of the kept shards.
pub const KEPT: [&str; 2] = ["id", "ordinal"];

/// Columns of the dropped shards: the rule, and what of the address it met.
pub const DROPPED: [&str; 6] = ["id", "ordinal", "source", "url", RULE, "detail"];

/// Drops documents by lists of domains and words in their addresses; documents without an address stay. Reads ids and
/// addresses alone.
pub struct UrlsStage {
    documents: String,
    config: UrlsConfig,
    filter: Shared<UrlFilter>,
}

impl UrlsStage {
    /// The stage's name.
    pub const NAME: &str = "urls";

    /// Over the shards of stage `documents`, with the lists of `config` below `base_dir`.
    ///
    /// # Errors
    /// As [`UrlFilter::load`].
    pub fn new(documents: impl Into<String>, config: &UrlsConfig, base_dir: &Path) -> Result<Self> {
        let filter = Shared::new(UrlFilter::load(config, base_dir)?);
        Ok(Self { documents: documents.into(), config: config.clone(), filter })
    }
}

#[async_trait]
impl Stage for UrlsStage {
    fn name(&self) -> &str {
        Self::NAME
    }

    fn version(&self) -> u32 {
        1
    }

    fn inputs(&self) -> Vec<String> {
        vec![self.documents.clone()]
    }

    fn config(&self) -> Result<serde_json::Value> {
        let settings = serde_json::to_value(&self.config).map_err(Error::abort)?;
        let digests: Vec<_> = self.filter.digests().iter().map(|(_, digest)| digest).collect();
        Ok(serde_json::json!({ "documents": self.documents, "settings": settings, "files": digests }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, &self.documents)
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        const STRUCT: &str = "verdict";
        let session = task.session();
        let read = task.run.shard(&self.documents, task.index())?;
        let documents = task.read(&session, &self.documents, task.index()).await?;
        let signature = Signature::any(1, Volatility::Immutable);
        let function = ScalarUDF::from(JudgeFunction { filter: self.filter.clone(), signature });
        let names = ["id", "ordinal", "source", "url"];
        let mut columns: Vec<_> = names.map(col).into();
        columns.push(function.call(vec![col("url")]).alias(STRUCT));
        let spread = documents.select(columns)?.unnest_columns(&[STRUCT])?;
        let mut columns: Vec<_> = names.map(col).into();
        columns.extend([RULE, "detail"].map(|name| ident(format!("{STRUCT}.{name}")).alias(name)));
        let verdicts = spread.select(columns)?;
        task.write(verdicts, Output { kept: &KEPT, dropped: &DROPPED }, RowsRead::Known(read.rows)).await
    }
}

/// `judge(url)`: a struct of the rule and what it met, both null for an address that stays.
#[derive(Debug, PartialEq, Eq, Hash)]
struct JudgeFunction {
    filter: Shared<UrlFilter>,
    signature: Signature,
}

fn fields() -> Fields {
    [RULE, "detail"].map(|name| Field::new(name, DataType::Utf8View, true)).into_iter().collect()
}

impl ScalarUDFImpl for JudgeFunction {
    fn name(&self) -> &str {
        "judge"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> datafusion::error::Result<DataType> {
        Ok(DataType::Struct(fields()))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> datafusion::error::Result<ColumnarValue> {
        let [urls] = take_function_args(self.name(), &args.args)?;
        let urls = cast(&urls.to_array(args.number_rows)?, &DataType::Utf8View)?;
        let mut rules = StringViewBuilder::with_capacity(urls.len());
        let mut details = StringViewBuilder::with_capacity(urls.len());
        for url in urls.as_string_view() {
            let verdict = url.and_then(|url| self.filter.judge(url));
            rules.append_option(verdict.as_ref().map(|v| v.rule));
            details.append_option(verdict.map(|v| v.detail));
        }
        let columns: Vec<ArrayRef> = vec![Arc::new(rules.finish()), Arc::new(details.finish())];
        Ok(ColumnarValue::Array(Arc::new(StructArray::try_new(fields(), columns, None)?)))
    }
}
