//! The pure functions of this crate as DataFusion functions over columns.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, ListArray, UInt16Array, UInt32Array, UInt64Array};
use arrow::buffer::OffsetBuffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, FieldRef};
use datafusion::common::exec_err;
use datafusion::error::DataFusionError;
use datafusion::logical_expr::{ColumnarValue, ScalarUDF, Volatility, create_udf};
use rayon::prelude::*;

use crate::encoder::Encoder;
use crate::shuffle;

/// `shuffle_key(id, text) → u64`: [`shuffle::shuffle_key`].
pub fn shuffle_key(seed: u64, validation_fraction: f64) -> ScalarUDF {
    let takes = vec![DataType::FixedSizeBinary(16), DataType::Utf8View];
    let function = move |arguments: &[ColumnarValue]| {
        let arrays = ColumnarValue::values_to_arrays(arguments)?;
        let [ids, texts] = arrays.as_slice() else { return exec_err!("two arguments, not {}", arrays.len()) };
        let Some(ids) = ids.as_fixed_size_binary_opt() else { return exec_err!("ids are not 16 bytes") };
        let texts = cast(texts, &DataType::Utf8View)?;
        let texts = texts.as_string_view();
        if ids.null_count() > 0 || texts.null_count() > 0 {
            return exec_err!("a document has no id, or no text");
        }
        let key = |row: usize| shuffle::shuffle_key(ids.value(row), texts.value(row), seed, validation_fraction);
        let keys: ArrayRef = Arc::new(UInt64Array::from_iter_values((0..ids.len()).map(key)));
        Ok(ColumnarValue::Array(keys))
    };
    create_udf("shuffle_key", takes, DataType::UInt64, Volatility::Immutable, Arc::new(function))
}

/// Arrow type of one token id: the smallest that holds the vocabulary.
pub fn token_type(vocabulary_size: u32) -> DataType {
    if vocabulary_size <= 1 << 16 { DataType::UInt16 } else { DataType::UInt32 }
}

/// The field inside a list of tokens, named as the Parquet specification names it.
pub fn token_field(vocabulary_size: u32) -> FieldRef {
    Arc::new(Field::new("element", token_type(vocabulary_size), false))
}

/// `encode(text) → list of token ids`: the document's tokens between `before` and `after`. Rows of a
/// batch are encoded on all threads of the Rayon pool.
pub fn encode(encoder: Arc<Encoder>, before: Vec<u32>, after: Vec<u32>) -> ScalarUDF {
    let field = token_field(encoder.vocabulary_size());
    let returns = DataType::List(field.clone());
    let function = move |arguments: &[ColumnarValue]| {
        let arrays = ColumnarValue::values_to_arrays(arguments)?;
        let [texts] = arrays.as_slice() else { return exec_err!("one argument, not {}", arrays.len()) };
        let texts = cast(texts, &DataType::Utf8View)?;
        let texts = texts.as_string_view();
        if texts.null_count() > 0 {
            return exec_err!("a document has no text");
        }
        let rows: Vec<Vec<u32>> = (0..texts.len())
            .into_par_iter()
            .map_init(
                || encoder.worker(),
                |worker, i| {
                    let mut ids = before.clone();
                    worker.encode(texts.value(i), &mut ids)?;
                    ids.extend_from_slice(&after);
                    Ok(ids)
                },
            )
            .collect::<crate::Result<_>>()
            .map_err(|e| DataFusionError::External(Box::new(e)))?;
        let total: usize = rows.iter().map(Vec::len).sum();
        if i32::try_from(total).is_err() {
            return exec_err!("a batch of {} documents has {total} tokens: more than a list column holds", rows.len());
        }
        let offsets = OffsetBuffer::from_lengths(rows.iter().map(Vec::len));
        let ids = rows.into_iter().flatten();
        let values: ArrayRef = match field.data_type() {
            // Every id is below the vocabulary size, which chose the type.
            DataType::UInt16 => Arc::new(UInt16Array::from_iter_values(ids.map(|id| id as u16))),
            _ => Arc::new(UInt32Array::from_iter_values(ids)),
        };
        Ok(ColumnarValue::Array(Arc::new(ListArray::try_new(field.clone(), offsets, values, None)?)))
    };
    create_udf("encode", vec![DataType::Utf8View], returns, Volatility::Immutable, Arc::new(function))
}
