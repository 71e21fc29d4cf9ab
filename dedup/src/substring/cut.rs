//! Stage `substring`: the documents without their repeats, and what was cut.

use std::path::Path;
use std::sync::{Arc, Mutex};

use arrow::array::{ArrayRef, AsArray, RecordBatch, StringArray, StringViewBuilder, UInt32Array, UInt64Array};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, UInt64Type};
use async_trait::async_trait;
use datafusion::common::{DataFusionError, exec_err};
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};
use datafusion::prelude::{col, lit, when};
use pipeline::document::COLUMNS;
use pipeline::shard::{ShardWriter, part_name};
use pipeline::stage::RULE;
use pipeline::{Output, Result, RowsRead, RunContext, Stage, Task, TaskContext, TaskReport};

use super::repeats::{Repeat, repeats};
use super::{REPEATS, SECTION_RECORDS, SUBSTRING};
use crate::disk::check_room;
use crate::documents::{digest_of_stage, sum_of_notes};
use crate::texts::Texts;

/// Writes the documents without their repeats.
pub(super) struct Cut {
    pub(super) texts: Texts,
}

#[async_trait]
impl Stage for Cut {
    fn name(&self) -> &str {
        SUBSTRING
    }
    fn version(&self) -> u32 {
        1
    }
    fn inputs(&self) -> Vec<String> {
        self.texts.stages().into_iter().chain([REPEATS.into()]).collect()
    }
    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({}))
    }
    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        check_room(run, SUBSTRING, self.texts.stored_bytes(run)?)?;
        self.texts.tasks_with(run, digest_of_stage(run, REPEATS))
    }
    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        // The repeats of a shard, of which no more than a section are held before they are merged, and one that is read.
        let held = sum_of_notes(run, REPEATS, "repeats").min(2 * SECTION_RECORDS as u64);
        Ok(held * size_of::<Repeat>() as u64)
    }
    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let repeats = repeats(task, SECTION_RECORDS)?;
        let read = task.run.shard(self.texts.chosen(), task.index())?.rows;
        let session = crate::selection::session(task);
        let name = Path::new("cuts").join(part_name(task.index()));
        let schema = schema();
        let writer = ShardWriter::create(task.stage_dir(), name, schema.clone(), Vec::new())?;
        let cuts = Arc::new(Mutex::new(Cuts { schema, writer: Some(writer), bytes: 0 }));
        let without = ScalarUDF::from(Without {
            signature: Signature::any(2, Volatility::Volatile),
            repeats: Arc::new(repeats),
            cuts: cuts.clone(),
        });
        let rows = self.texts.rows(task, &session, task.index()).await?;
        let rows = rows.with_column("text", without.call(vec![col("ordinal"), col("text")]))?;
        let rows = rows.with_column(RULE, when(col("text").eq(lit("")), lit("no_text_left")).end()?)?;
        let output = Output { kept: &COLUMNS, dropped: &["id", "ordinal", "source", "url", RULE] };
        let mut report = task.write(rows, output, RowsRead::Known(read)).await?;
        let mut cuts = cuts.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(writer) = cuts.writer.take() {
            report.notes = serde_json::json!({ "cuts": writer.rows(), "bytes_removed": cuts.bytes });
            report.files.push(writer.finish()?);
        }
        Ok(report)
    }
}

/// Schema of the cuts. `start` and `bytes` are of the text that the stage read; `first_ordinal` and `first_start` say where
/// the first window of the cut stands first.
fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("ordinal", DataType::UInt64, false),
        Field::new("start", DataType::UInt32, false),
        Field::new("bytes", DataType::UInt32, false),
        Field::new("first_ordinal", DataType::UInt64, false),
        Field::new("first_start", DataType::UInt32, false),
        Field::new("text", DataType::Utf8, false),
    ]))
}

/// Where cuts are written, in the order of the rows: a plan has one partition.
struct Cuts {
    schema: SchemaRef,
    writer: Option<ShardWriter>,
    bytes: u64,
}

impl Cuts {
    fn write(&mut self, cuts: &[(Repeat, &str)]) -> Result<()> {
        self.bytes += cuts.iter().map(|cut| cut.1.len() as u64).sum::<u64>();
        let columns: Vec<ArrayRef> = vec![
            Arc::new(UInt64Array::from_iter_values(cuts.iter().map(|cut| cut.0.ordinal))),
            Arc::new(UInt32Array::from_iter_values(cuts.iter().map(|cut| cut.0.start))),
            Arc::new(UInt32Array::from_iter_values(cuts.iter().map(|cut| cut.0.end - cut.0.start))),
            Arc::new(UInt64Array::from_iter_values(cuts.iter().map(|cut| cut.0.first))),
            Arc::new(UInt32Array::from_iter_values(cuts.iter().map(|cut| cut.0.first_start))),
            Arc::new(StringArray::from_iter_values(cuts.iter().map(|cut| cut.1))),
        ];
        match &mut self.writer {
            Some(writer) => writer.write(RecordBatch::try_new(self.schema.clone(), columns)?),
            None => Ok(()),
        }
    }
}

/// `without_repeats(ordinal, text)` over the rows of one shard, in order; empty where nothing is left.
struct Without {
    signature: Signature,
    repeats: Arc<Vec<Repeat>>,
    cuts: Arc<Mutex<Cuts>>,
}

impl std::fmt::Debug for Without {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Without").field("repeats", &self.repeats.len()).finish_non_exhaustive()
    }
}

// Two functions are the same where they write to the same place.
impl PartialEq for Without {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.cuts, &other.cuts)
    }
}

impl Eq for Without {}

impl std::hash::Hash for Without {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.cuts).hash(state);
    }
}

impl ScalarUDFImpl for Without {
    fn name(&self) -> &str {
        "without_repeats"
    }
    fn signature(&self) -> &Signature {
        &self.signature
    }
    fn return_type(&self, _: &[DataType]) -> datafusion::error::Result<DataType> {
        Ok(DataType::Utf8View)
    }
    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> datafusion::error::Result<ColumnarValue> {
        let ordinals = args.args[0].to_array(args.number_rows)?;
        let Some(ordinals) = ordinals.as_primitive_opt::<UInt64Type>() else {
            return exec_err!("without_repeats takes an ordinal and a text");
        };
        let texts = cast(&args.args[1].to_array(args.number_rows)?, &DataType::Utf8View)?;
        let texts = texts.as_string_view();
        let mut all = Vec::new();
        let mut rewritten = StringViewBuilder::with_capacity(args.number_rows);
        for (ordinal, text) in ordinals.values().iter().zip(texts.iter()) {
            let text = text.unwrap_or_default();
            let from = self.repeats.partition_point(|repeat| repeat.ordinal < *ordinal);
            let repeats = self.repeats[from..].iter().take_while(|repeat| repeat.ordinal == *ordinal);
            let (mut rest, mut at, before) = (String::new(), 0, all.len());
            for repeat in repeats {
                let (start, end) = (repeat.start as usize, repeat.end as usize);
                let (Some(stays), Some(goes)) = (text.get(at..start), text.get(start..end)) else {
                    return exec_err!(
                        "{start}..{end} is no place in document {ordinal}: run the stage {REPEATS} again"
                    );
                };
                rest.push_str(stays);
                all.push((*repeat, goes));
                at = end;
            }
            if all.len() == before {
                rewritten.append_value(text);
                continue;
            }
            rest.push_str(&text[at..]);
            // Marks that stood between words are no text.
            rewritten.append_value(if rest.contains(char::is_alphanumeric) { rest.as_str() } else { "" });
        }
        let mut cuts = self.cuts.lock().unwrap_or_else(|e| e.into_inner());
        cuts.write(&all).map_err(|e| DataFusionError::External(Box::new(e)))?;
        Ok(ColumnarValue::Array(Arc::new(rewritten.finish())))
    }
}
