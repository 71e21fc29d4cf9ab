//! Stage `clean`: text to cleaner text, every change counted.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use arrow::array::{Array, AsArray, StringViewBuilder, StructArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Fields};
use async_trait::async_trait;
use datafusion::common::utils::take_function_args;
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};
use datafusion::prelude::{col, ident};
use serde::{Deserialize, Serialize};

use crate::document::COLUMNS;
use crate::error::{Error, Result};
use crate::normalise::{Changes, Normaliser, Part};
use crate::pii::{Pii, PiiCounts, PiiFinder};
use crate::run::RunContext;
use crate::shared::Shared;
use crate::stage::{Output, RULE, RowsRead, Stage, Task, TaskContext, TaskReport, tasks_per_shard};

/// Columns of the dropped shards.
pub const DROPPED: [&str; 5] = ["id", "ordinal", "source", "url", RULE];

/// How texts are cleaned before the signals are computed. Repairs are on unless turned off; what takes something away
/// is off unless turned on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CleanConfig {
    /// Repair UTF-8 that was read as windows-1252.
    pub mojibake: bool,
    /// Remove control characters and noncharacters.
    pub controls: bool,
    /// Remove zero-width and direction-override characters.
    pub zero_width: bool,
    /// Compose characters (Unicode NFC).
    pub nfc: bool,
    /// Remove spaces at line ends and blank lines after a blank line.
    pub white_space: bool,
    /// Remove tags, comments and scripts, decode character references.
    pub html: bool,
    /// Remove web addresses, except as targets of Markdown links.
    pub urls: bool,
    /// Remove encoded blobs, words of over 200 characters, lines of symbols alone.
    pub abnormal_strings: bool,
    /// Collapse repeated marks.
    pub repeated_punctuation: bool,
    /// Remove private-use characters, make odd spaces, ligatures and full-width letters plain.
    pub special_characters: bool,
    /// Write numbers without separators of thousands.
    pub numbers: bool,
    /// Keep the lines that C4 keeps: those with a terminal mark and enough words, without
    /// "javascript" and policy notices.
    pub c4_lines: bool,
    /// Remove and cut the lines that RefinedWeb does: capitals, numbers, counters, single words, words of a page's frame.
    pub refinedweb_lines: bool,
    /// Personal data and secrets.
    pub pii: PiiConfig,
}

/// What is done with personal data and secrets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PiiConfig {
    /// Kinds that are replaced by a placeholder.
    pub redact: Vec<Pii>,
    /// Kinds that drop the document, by the rule `pii_KIND`.
    pub drop: Vec<Pii>,
}

impl Default for CleanConfig {
    fn default() -> Self {
        Self {
            mojibake: true,
            controls: true,
            zero_width: true,
            nfc: true,
            white_space: true,
            html: false,
            urls: false,
            abnormal_strings: false,
            repeated_punctuation: false,
            special_characters: false,
            numbers: false,
            c4_lines: false,
            refinedweb_lines: false,
            pii: PiiConfig::default(),
        }
    }
}

impl CleanConfig {
    /// The parts that are on, in the order in which they run.
    pub fn parts(&self) -> Vec<Part> {
        let on = |part: Part| match part {
            Part::Mojibake => self.mojibake,
            Part::Controls => self.controls,
            Part::ZeroWidth => self.zero_width,
            Part::Nfc => self.nfc,
            Part::Html => self.html,
            Part::Urls => self.urls,
            Part::AbnormalStrings => self.abnormal_strings,
            Part::RepeatedPunctuation => self.repeated_punctuation,
            Part::SpecialCharacters => self.special_characters,
            Part::Numbers => self.numbers,
            Part::C4Lines => self.c4_lines,
            Part::RefinedwebLines => self.refinedweb_lines,
            Part::WhiteSpace => self.white_space,
        };
        Part::ALL.into_iter().filter(|part| on(*part)).collect()
    }
}

/// Rewrites the text of every document; a document without a line left is dropped by the rule `no_line_left`, one with
/// personal data of a kind that drops by `pii_KIND`. Kept shards hold all columns of a document. The notes of a task say
/// how many documents each part changed, and how often.
pub struct CleanStage {
    config: CleanConfig,
    documents: String,
    selection: Option<String>,
}

impl CleanStage {
    /// Over the shards of stage `documents`; of their rows those that stage `selection` kept, or all.
    ///
    /// # Errors
    /// [`Error::Setting`] for a kind of personal data that is to be replaced and to drop the document.
    pub fn new(config: CleanConfig, documents: impl Into<String>, selection: Option<String>) -> Result<Self> {
        if let Some((number, kind)) =
            config.pii.drop.iter().enumerate().find(|(_, kind)| config.pii.redact.contains(kind))
        {
            return Err(Error::setting(
                format!("clean.pii.drop.{number}"),
                format!("\"{}\" is in `redact` too: choose one", kind.name()),
            ));
        }
        Ok(Self { config, documents: documents.into(), selection })
    }
}

#[async_trait]
impl Stage for CleanStage {
    fn name(&self) -> &str {
        "clean"
    }

    fn version(&self) -> u32 {
        5
    }

    fn inputs(&self) -> Vec<String> {
        let mut inputs = vec![self.documents.clone()];
        inputs.extend(self.selection.clone().filter(|s| *s != self.documents));
        inputs
    }

    fn config(&self) -> Result<serde_json::Value> {
        let config = serde_json::to_value(&self.config).map_err(Error::abort)?;
        Ok(serde_json::json!({ "documents": self.documents, "selection": self.selection, "settings": config }))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        tasks_per_shard(run, self.selection.as_deref().unwrap_or(&self.documents))
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        const STRUCT: &str = "clean";
        let session = task.session();
        let read = task.run.shard(self.selection.as_deref().unwrap_or(&self.documents), task.index())?;
        let documents = task.read_selected(&session, &self.documents, self.selection.as_deref(), task.index()).await?;
        let cleaner = Shared::new(Cleaner::new(&self.config));
        let function = ScalarUDF::from(CleanFunction {
            cleaner: cleaner.clone(),
            signature: Signature::any(1, Volatility::Volatile),
        });
        let mut columns: Vec<_> = COLUMNS.into_iter().filter(|name| *name != "text").map(col).collect();
        columns.push(function.call(vec![col("text")]).alias(STRUCT));
        // Unnesting keeps the function to one call a text, as in `signals`.
        let spread = documents.select(columns)?.unnest_columns(&[STRUCT])?;
        let field = |name: &str| ident(format!("{STRUCT}.{name}")).alias(name);
        let mut columns: Vec<_> =
            COLUMNS.into_iter().map(|name| if name == "text" { field(name) } else { col(name) }).collect();
        columns.push(field(RULE));
        let cleaned = spread.select(columns)?;
        let output = Output { kept: &COLUMNS, dropped: &DROPPED };
        let mut report = task.write(cleaned, output, RowsRead::Known(read.rows)).await?;
        report.notes = cleaner.notes();
        Ok(report)
    }
}

/// The parts of a recipe, and what they did in one task.
struct Cleaner {
    normaliser: Normaliser,
    redact: PiiFinder,
    drop: PiiFinder,
    totals: Mutex<Totals>,
}

#[derive(Default)]
struct Totals {
    documents: u64,
    changed: u64,
    /// By part or kind: documents and changes.
    changes: BTreeMap<&'static str, (u64, u64)>,
    redacted: BTreeMap<&'static str, (u64, u64)>,
}

impl Cleaner {
    fn new(config: &CleanConfig) -> Self {
        Self {
            normaliser: Normaliser::new(config.parts()),
            redact: PiiFinder::new(config.pii.redact.iter().copied()),
            drop: PiiFinder::new(config.pii.drop.iter().copied()),
            totals: Mutex::default(),
        }
    }

    /// Cleans one text: gives it to `keep`, with the rule that drops its document.
    fn clean(&self, text: &str, totals: &mut Totals, keep: impl FnOnce(&str, Option<String>)) {
        let mut changes = Changes::default();
        let mut counts = PiiCounts::default();
        let normal = self.normaliser.apply(text, &mut changes);
        totals.documents += 1;
        for part in self.normaliser.parts() {
            add(&mut totals.changes, part.name(), changes.of(*part));
        }
        let dropped = if self.drop.is_empty() { None } else { self.drop.find(&normal).first().map(|(_, kind)| *kind) };
        if let Some(kind) = dropped {
            return keep("", Some(format!("pii_{}", kind.name())));
        }
        let clean = self.redact.redact(&normal, &mut counts);
        for kind in Pii::ALL {
            add(&mut totals.redacted, kind.name(), counts.of(kind));
        }
        totals.changed += u64::from(changes.any() || Pii::ALL.iter().any(|kind| counts.of(*kind) > 0));
        let empty = clean.trim().is_empty();
        keep(if empty { "" } else { &clean }, empty.then(|| "no_line_left".to_owned()));
    }

    /// What was done, for the journal.
    fn notes(&self) -> serde_json::Value {
        let totals = self.totals.lock().unwrap_or_else(|e| e.into_inner());
        let table = |counts: &BTreeMap<&str, (u64, u64)>| -> serde_json::Value {
            let rows = counts.iter().map(|(name, (documents, changes))| {
                ((*name).to_owned(), serde_json::json!({ "documents": documents, "changes": changes }))
            });
            serde_json::Value::Object(rows.collect())
        };
        serde_json::json!({
            "documents": totals.documents,
            "changed": totals.changed,
            "changes": table(&totals.changes),
            "redacted": table(&totals.redacted),
        })
    }
}

fn add(counts: &mut BTreeMap<&'static str, (u64, u64)>, name: &'static str, changes: u64) {
    if changes > 0 {
        let (documents, all) = counts.entry(name).or_default();
        *documents += 1;
        *all += changes;
    }
}

/// `clean(text)`: a struct of the cleaned text and the rule that drops the document. Volatile, because it counts.
#[derive(Debug, PartialEq, Eq, Hash)]
struct CleanFunction {
    cleaner: Shared<Cleaner>,
    signature: Signature,
}

fn fields() -> Fields {
    [Field::new("text", DataType::Utf8View, false), Field::new(RULE, DataType::Utf8View, true)].into_iter().collect()
}

impl ScalarUDFImpl for CleanFunction {
    fn name(&self) -> &str {
        "clean"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> datafusion::error::Result<DataType> {
        Ok(DataType::Struct(fields()))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> datafusion::error::Result<ColumnarValue> {
        let [texts] = take_function_args(self.name(), &args.args)?;
        let texts = cast(&texts.to_array(args.number_rows)?, &DataType::Utf8View)?;
        let texts = texts.as_string_view();
        let mut cleaned = StringViewBuilder::with_capacity(texts.len());
        let mut rules = StringViewBuilder::with_capacity(texts.len());
        let mut totals = self.cleaner.totals.lock().unwrap_or_else(|e| e.into_inner());
        for text in texts {
            self.cleaner.clean(text.unwrap_or_default(), &mut totals, |text, rule| {
                cleaned.append_value(text);
                rules.append_option(rule);
            });
        }
        let columns: Vec<arrow::array::ArrayRef> = vec![Arc::new(cleaned.finish()), Arc::new(rules.finish())];
        Ok(ColumnarValue::Array(Arc::new(StructArray::try_new(fields(), columns, None)?)))
    }
}
