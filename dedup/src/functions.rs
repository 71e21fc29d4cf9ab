//! The pure functions of this crate as DataFusion functions.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, ListArray, StringViewArray, StringViewBuilder, StructArray, UInt8Array, UInt64Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Fields};
use datafusion::common::{ScalarValue, exec_err, plan_err};
use datafusion::error::Result;
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};

use crate::minhash::{MinHash, Mode, Scratch};
use crate::normalise::{Normalise, canonical_url, content_hash};

/// The functions that the plans of this crate use, for a session that wants to call them in SQL.
///
/// | function | value |
/// | --- | --- |
/// | `content_hash(text, form)` | `{hi, lo}`: 128-bit XXH3 of the text in normal form `none`, `whitespace` or `lower_whitespace` |
/// | `canonical_url(url)` | the URL without what does not tell pages apart, see [`canonical_url`] |
/// | `minhash_bands(text, mode, ngram, bands, rows, seed)` | list of `{band, key}`, see [`MinHash::band_keys`]; empty for a text without words |
pub fn udfs() -> Vec<ScalarUDF> {
    vec![
        ScalarUDF::from(ContentHash::new()),
        ScalarUDF::from(CanonicalUrl::new()),
        ScalarUDF::from(MinHashBands::new()),
    ]
}

/// Argument `index` as strings.
fn strings(args: &ScalarFunctionArgs, index: usize) -> Result<StringViewArray> {
    let array = args.args[index].to_array(args.number_rows)?;
    Ok(cast(&array, &DataType::Utf8View)?.as_string_view().clone())
}

/// Argument `index`, which must be a constant string.
fn constant_string(args: &ScalarFunctionArgs, index: usize, function: &str) -> Result<String> {
    match &args.args[index] {
        ColumnarValue::Scalar(
            ScalarValue::Utf8(Some(s)) | ScalarValue::Utf8View(Some(s)) | ScalarValue::LargeUtf8(Some(s)),
        ) => Ok(s.clone()),
        _ => exec_err!("argument {} of {function} must be a constant string", index + 1),
    }
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct ContentHash {
    signature: Signature,
}

impl ContentHash {
    fn new() -> Self {
        Self { signature: Signature::string(2, Volatility::Immutable) }
    }

    fn fields() -> Fields {
        Fields::from(vec![Field::new("hi", DataType::UInt64, false), Field::new("lo", DataType::UInt64, false)])
    }
}

impl ScalarUDFImpl for ContentHash {
    fn name(&self) -> &str {
        "content_hash"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, arguments: &[DataType]) -> Result<DataType> {
        if arguments.len() != 2 {
            return plan_err!("content_hash takes a text and the name of a normal form");
        }
        Ok(DataType::Struct(Self::fields()))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let name = constant_string(&args, 1, "content_hash")?;
        let Some(form) = Normalise::from_name(&name) else {
            return exec_err!(
                "content_hash knows no normal form {name}; there are {}",
                Normalise::ALL.map(Normalise::name).join(", ")
            );
        };
        let texts = strings(&args, 0)?;
        let mut scratch = String::new();
        let (mut hi, mut lo) = (Vec::with_capacity(texts.len()), Vec::with_capacity(texts.len()));
        for row in 0..texts.len() {
            // A null text has a null hash; its fields are never looked at.
            let hash = if texts.is_null(row) { 0 } else { content_hash(texts.value(row), form, &mut scratch) };
            hi.push((hash >> 64) as u64);
            lo.push(hash as u64);
        }
        let columns: Vec<ArrayRef> = vec![Arc::new(UInt64Array::from(hi)), Arc::new(UInt64Array::from(lo))];
        Ok(ColumnarValue::Array(Arc::new(StructArray::new(Self::fields(), columns, texts.nulls().cloned()))))
    }
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct CanonicalUrl {
    signature: Signature,
}

impl CanonicalUrl {
    fn new() -> Self {
        Self { signature: Signature::string(1, Volatility::Immutable) }
    }
}

impl ScalarUDFImpl for CanonicalUrl {
    fn name(&self) -> &str {
        "canonical_url"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::Utf8View)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let urls = strings(&args, 0)?;
        let mut canonical = StringViewBuilder::with_capacity(urls.len());
        for url in &urls {
            canonical.append_option(url.map(canonical_url));
        }
        Ok(ColumnarValue::Array(Arc::new(canonical.finish())))
    }
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct MinHashBands {
    signature: Signature,
}

impl MinHashBands {
    fn new() -> Self {
        Self { signature: Signature::any(6, Volatility::Immutable) }
    }

    fn fields() -> Fields {
        Fields::from(vec![Field::new("band", DataType::UInt8, false), Field::new("key", DataType::UInt64, false)])
    }

    fn item() -> Field {
        Field::new("item", DataType::Struct(Self::fields()), false)
    }
}

/// Argument `index`, which must be a constant number from `low` to `high`.
fn constant_number(args: &ScalarFunctionArgs, index: usize, low: u32, high: u32, function: &str) -> Result<u32> {
    let number = match &args.args[index] {
        ColumnarValue::Scalar(scalar) => match scalar.cast_to(&DataType::UInt32) {
            Ok(ScalarValue::UInt32(number)) => number,
            _ => None,
        },
        ColumnarValue::Array(_) => None,
    };
    match number.filter(|n| (low..=high).contains(n)) {
        Some(number) => Ok(number),
        None => exec_err!("argument {} of {function} must be a constant from {low} to {high}", index + 1),
    }
}

impl ScalarUDFImpl for MinHashBands {
    fn name(&self) -> &str {
        "minhash_bands"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> Result<DataType> {
        Ok(DataType::List(Arc::new(Self::item())))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let number = |index, low, high| constant_number(&args, index, low, high, "minhash_bands");
        let name = constant_string(&args, 1, "minhash_bands")?;
        let Some(mode) = Mode::ALL.into_iter().find(|mode| mode.name() == name) else {
            return exec_err!("minhash_bands knows no mode {name}; there are {}", Mode::ALL.map(Mode::name).join(", "));
        };
        let (ngram, bands, rows) = (number(2, 1, u32::MAX)?, number(3, 1, 255)?, number(4, 1, 4096)?);
        let minhash = MinHash::new(mode, ngram as usize, bands as usize, rows as usize, number(5, 0, u32::MAX)?);
        let texts = strings(&args, 0)?;
        let mut scratch = Scratch::default();
        let mut keys = Vec::with_capacity(texts.len() * bands as usize);
        let mut lengths = Vec::with_capacity(texts.len());
        for text in &texts {
            let before = keys.len();
            if let Some(text) = text {
                minhash.band_keys(text, &mut scratch, &mut keys);
            }
            lengths.push(keys.len() - before);
        }
        let bands: UInt8Array = (0..bands as u8).cycle().take(keys.len()).collect();
        let columns: Vec<ArrayRef> = vec![Arc::new(bands), Arc::new(UInt64Array::from(keys))];
        let items = StructArray::new(Self::fields(), columns, None);
        let offsets = OffsetBuffer::from_lengths(lengths);
        let list = ListArray::new(Arc::new(Self::item()), offsets, Arc::new(items), texts.nulls().cloned());
        Ok(ColumnarValue::Array(Arc::new(list)))
    }
}
