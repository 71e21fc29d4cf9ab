//! The signals as DataFusion functions: `signals(text)` and `c4_clean(text)`.
//!
//! Thin wrappers of the pure functions over string arrays. Both are immutable and strict: a null text
//! gives a null struct, or a null text.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanBuilder, Float64Builder, Int64Builder, NullBufferBuilder, StringViewBuilder,
    StructArray,
};
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use datafusion::common::{exec_err, utils::take_function_args};
use datafusion::error::Result;
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};

use super::{Kind, SIGNALS, Scratch, StopWords, Value, c4_clean as clean, compute_in};

/// Columns of the signals, in the order of [`SIGNALS`]. A signal is null where the text is.
pub fn fields() -> Fields {
    SIGNALS.iter().map(|signal| Field::new(signal.name, data_type(signal.kind), true)).collect()
}

/// The schema that predicates over signals are planned against: [`fields`].
pub fn schema() -> SchemaRef {
    Arc::new(Schema::new(fields()))
}

fn data_type(kind: Kind) -> DataType {
    match kind {
        Kind::Int64 => DataType::Int64,
        Kind::Float64 => DataType::Float64,
        Kind::Boolean => DataType::Boolean,
    }
}

/// `signals(text)`: a struct with one field per signal; null for a null text. Takes Utf8View, Utf8 and
/// LargeUtf8.
pub fn signals() -> ScalarUDF {
    ScalarUDF::from(SignalsFunction { signature: one_string() })
}

/// `c4_clean(text)`: the lines of the text that C4 keeps, as Utf8View; null for a null text. Takes
/// Utf8View, Utf8 and LargeUtf8.
pub fn c4_clean() -> ScalarUDF {
    ScalarUDF::from(C4CleanFunction { signature: one_string() })
}

fn one_string() -> Signature {
    Signature::string(1, Volatility::Immutable)
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct SignalsFunction {
    signature: Signature,
}

impl ScalarUDFImpl for SignalsFunction {
    fn name(&self) -> &str {
        "signals"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Struct(fields()))
    }

    fn is_strict(&self) -> bool {
        true
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let mut columns = Columns::new(args.number_rows);
        let mut scratch = Scratch::default();
        let english = StopWords::of(None);
        for_each_text(&args, |text| columns.push(text, english, &mut scratch))?;
        Ok(ColumnarValue::Array(Arc::new(columns.finish()?)))
    }
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct C4CleanFunction {
    signature: Signature,
}

impl ScalarUDFImpl for C4CleanFunction {
    fn name(&self) -> &str {
        "c4_clean"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Utf8View)
    }

    fn is_strict(&self) -> bool {
        true
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let mut cleaned = StringViewBuilder::with_capacity(args.number_rows);
        let mut line_buffer = String::new();
        for_each_text(&args, |text| match text {
            Some(text) => {
                line_buffer.clear();
                clean(text, &mut line_buffer);
                cleaned.append_value(&line_buffer);
            }
            None => cleaned.append_null(),
        })?;
        Ok(ColumnarValue::Array(Arc::new(cleaned.finish())))
    }
}

/// Calls `visit` with the only argument of every row.
fn for_each_text(args: &ScalarFunctionArgs, visit: impl FnMut(Option<&str>)) -> Result<()> {
    let [texts] = take_function_args("text", &args.args)?;
    let texts = texts.to_array(args.number_rows)?;
    match texts.data_type() {
        DataType::Utf8View => texts.as_string_view().iter().for_each(visit),
        DataType::Utf8 => texts.as_string::<i32>().iter().for_each(visit),
        DataType::LargeUtf8 => texts.as_string::<i64>().iter().for_each(visit),
        other => return exec_err!("a text must be a string, not {other}"),
    }
    Ok(())
}

/// The signals of many documents, column by column.
pub(super) struct Columns {
    /// One for each of [`SIGNALS`]; none for those that get no column.
    builders: Vec<Option<Builder>>,
    validity: NullBufferBuilder,
}

enum Builder {
    Int64(Int64Builder),
    Float64(Float64Builder),
    Boolean(BooleanBuilder),
}

impl Columns {
    /// Of all signals.
    fn new(rows: usize) -> Self {
        Self::of(rows, |_| true)
    }

    /// Of the signals whose names are `wanted`.
    pub fn of(rows: usize, wanted: impl Fn(&str) -> bool) -> Self {
        let builder = |kind| match kind {
            Kind::Int64 => Builder::Int64(Int64Builder::with_capacity(rows)),
            Kind::Float64 => Builder::Float64(Float64Builder::with_capacity(rows)),
            Kind::Boolean => Builder::Boolean(BooleanBuilder::with_capacity(rows)),
        };
        Self {
            builders: SIGNALS.iter().map(|signal| wanted(signal.name).then(|| builder(signal.kind))).collect(),
            validity: NullBufferBuilder::new(rows),
        }
    }

    /// Below a null struct stand nulls too: a field that is taken out of the struct must not show a value.
    pub fn push(&mut self, text: Option<&str>, stop_words: &StopWords, scratch: &mut Scratch) {
        self.validity.append(text.is_some());
        let Some(text) = text else {
            for builder in self.builders.iter_mut().flatten() {
                match builder {
                    Builder::Int64(builder) => builder.append_null(),
                    Builder::Float64(builder) => builder.append_null(),
                    Builder::Boolean(builder) => builder.append_null(),
                }
            }
            return;
        };
        for (builder, value) in self.builders.iter_mut().zip(compute_in(text, stop_words, scratch).values()) {
            match (builder, value) {
                (Some(Builder::Int64(builder)), Value::Int64(value)) => builder.append_value(value),
                (Some(Builder::Float64(builder)), Value::Float64(value)) => builder.append_value(value),
                (Some(Builder::Boolean(builder)), Value::Boolean(value)) => builder.append_value(value),
                // No column is wanted. Builders and values come from one list; were they not, the short column fails
                // below.
                _ => {}
            }
        }
    }

    /// One array for each signal that is wanted.
    pub fn finish_columns(&mut self) -> Vec<ArrayRef> {
        self.builders
            .iter_mut()
            .flatten()
            .map(|builder| match builder {
                Builder::Int64(builder) => Arc::new(builder.finish()) as ArrayRef,
                Builder::Float64(builder) => Arc::new(builder.finish()),
                Builder::Boolean(builder) => Arc::new(builder.finish()),
            })
            .collect()
    }

    fn finish(mut self) -> Result<StructArray> {
        let columns = self.finish_columns();
        Ok(StructArray::try_new(fields(), columns, self.validity.finish())?)
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Float64Array, Int64Array, LargeStringArray, RecordBatch, StringArray, StringViewArray};
    use arrow::compute::concat_batches;
    use datafusion::prelude::SessionContext;

    use super::*;

    async fn query(column: ArrayRef, sql: &str) -> RecordBatch {
        let session = SessionContext::new();
        session.register_udf(signals());
        session.register_udf(c4_clean());
        let batch = RecordBatch::try_from_iter([("text", column)]).unwrap();
        session.register_batch("t", batch).unwrap();
        let batches = session.sql(sql).await.unwrap().collect().await.unwrap();
        concat_batches(&batches[0].schema(), &batches).unwrap()
    }

    #[tokio::test]
    async fn signals_of_every_string_type() {
        let texts = [Some("one two\nthree {"), None, Some("")];
        let columns: [ArrayRef; 3] = [
            Arc::new(StringViewArray::from_iter(texts)),
            Arc::new(StringArray::from_iter(texts)),
            Arc::new(LargeStringArray::from_iter(texts)),
        ];
        for column in columns {
            let batch = query(
                column,
                "SELECT s['word_count'] AS n, s['mean_word_length'] AS m, s['c4_has_curly_bracket'] AS c, s IS NULL AS gone
                 FROM (SELECT signals(text) AS s FROM t)",
            )
            .await;
            let ints: Vec<_> = batch["n"].as_any().downcast_ref::<Int64Array>().unwrap().iter().collect();
            assert_eq!(ints, [Some(4), None, Some(0)]);
            let means: Vec<_> = batch["m"].as_any().downcast_ref::<Float64Array>().unwrap().iter().collect();
            assert_eq!(means, [Some(11.0 / 3.0), None, Some(0.0)]);
            let curly: Vec<_> = batch["c"].as_boolean().iter().collect();
            assert_eq!(curly, [Some(true), None, Some(false)]);
            let gone: Vec<_> = batch["gone"].as_boolean().iter().collect();
            assert_eq!(gone, [Some(false), Some(true), Some(false)]);
        }
    }

    #[tokio::test]
    async fn a_constant_text() {
        let column: ArrayRef = Arc::new(StringArray::from(vec!["a", "b"]));
        let batch = query(column, "SELECT signals('one two three')['word_count'] AS n FROM t").await;
        assert_eq!(batch["n"].as_any().downcast_ref::<Int64Array>().unwrap().values(), &[3, 3]);
    }

    #[tokio::test]
    async fn c4_clean_keeps_lines_and_nulls() {
        let column: ArrayRef =
            Arc::new(StringArray::from(vec![Some("keep this line.\nnot this"), None, Some("nothing")]));
        let batch = query(column, "SELECT c4_clean(text) AS c FROM t").await;
        assert_eq!(batch["c"].data_type(), &DataType::Utf8View);
        let cleaned: Vec<_> = batch["c"].as_string_view().iter().collect();
        assert_eq!(cleaned, [Some("keep this line."), None, Some("")]);
    }

    #[tokio::test]
    async fn a_number_is_no_text() {
        let session = SessionContext::new();
        session.register_udf(signals());
        let error = session.sql("SELECT signals(42)").await.unwrap_err();
        assert!(error.to_string().contains("String"), "{error}");
    }
}
