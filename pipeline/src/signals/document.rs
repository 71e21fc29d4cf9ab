//! The signals of a document: those of its text, its language, and the probabilities of the recipe's classifiers.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{Array, ArrayRef, AsArray, Float64Builder, StringViewBuilder, StructArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use datafusion::common::utils::take_function_args;
use datafusion::error::Result as PlanResult;
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};
use serde::{Deserialize, Serialize};

use super::udf::{self, Columns};
use super::{SIGNALS, Scratch, StopWords, profiles};
use crate::classify::{Classifier, ClassifierScratch, FastTextScratch};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::language::{DocumentLanguage, Identifier, LanguageConfig, code_of};
use crate::shared::Shared;

/// The language of a document: as identified, or else, also where nothing was found, as the input says.
pub const LANGUAGE: &str = "language";
/// How sure the identifier is: 0 where it found nothing, null without one.
pub const LANGUAGE_SCORE: &str = "language_score";
/// Fraction of the characters of judged paragraphs that are in the document's language; null where none was judged.
pub const LANGUAGE_PARAGRAPH_FRACTION: &str = "language_paragraph_fraction";

/// What is computed: the signals of the text, all of them whichever rules ask for them unless the recipe says otherwise
/// here, and what else the recipe asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SignalsConfig {
    /// The signals of the text that get a column, by name or by the name of a profile, which stands for those that its
    /// rules ask for; empty: all. What the others take alone is saved: about half of the time for the profiles of the
    /// default filter.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub only: Vec<String>,
    /// Signals of the text that get no column. Of those that take time of their own it is saved, which is
    /// `compression_ratio` more than all others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub without: Vec<String>,
    /// Identify the language of every document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub language: Option<LanguageConfig>,
    /// Classifiers, each a column.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub classifiers: Vec<ClassifierConfig>,
}

/// A classifier as a signal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassifierConfig {
    /// Name of the column: lower-case letters, digits and underscores.
    pub name: String,
    /// The model, relative to the recipe's directory: of `fulgurite classifier train`, or a fastText model.
    pub model: PathBuf,
    /// The label of a fastText model whose probability is the signal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
}

impl SignalsConfig {
    /// Columns behind those of [`SIGNALS`].
    fn more_fields(&self) -> Vec<Field> {
        let number = |name: &str| Field::new(name, DataType::Float64, true);
        let mut fields = vec![
            Field::new(LANGUAGE, DataType::Utf8View, true),
            number(LANGUAGE_SCORE),
            number(LANGUAGE_PARAGRAPH_FRACTION),
        ];
        fields.extend(self.classifiers.iter().map(|classifier| number(&classifier.name)));
        fields
    }

    fn fields(&self) -> Fields {
        let of_profiles: Vec<String> = self
            .only
            .iter()
            .filter_map(|name| profiles::profile(name).ok())
            .flatten()
            .filter_map(|r| r.signal)
            .collect();
        let named = |names: &[String], field: &Field| names.iter().any(|name| name == field.name());
        let all = udf::fields();
        let of_text = all.iter().filter(|field| {
            let only = self.only.is_empty() || named(&self.only, field) || named(&of_profiles, field);
            only && !named(&self.without, field)
        });
        of_text.cloned().chain(self.more_fields().into_iter().map(Arc::new)).collect()
    }

    /// Why a signal of the text has no column, for people.
    pub(crate) fn why_not(&self, signal: &str) -> &'static str {
        if SIGNALS.iter().all(|s| s.name != signal) {
            ""
        } else if self.without.iter().any(|name| name == signal) {
            "; signals.without leaves it out"
        } else if self.only.is_empty() {
            ""
        } else {
            "; signals.only leaves it out"
        }
    }

    /// The schema that rules are planned against: every column of the stage's shards but `id` and `ordinal`.
    pub fn schema(&self) -> SchemaRef {
        Arc::new(Schema::new(self.fields()))
    }

    /// Names of the columns, in order.
    pub fn columns(&self) -> Vec<String> {
        self.fields().iter().map(|field| field.name().clone()).collect()
    }
}

/// The models of a recipe, loaded.
pub struct DocumentSignals {
    config: SignalsConfig,
    fields: Fields,
    identifier: Option<Identifier>,
    classifiers: Vec<Classifier>,
    digests: Vec<Digest>,
    /// Of batches that are done, for those that come.
    scratch: Mutex<Vec<Scratch>>,
}

impl DocumentSignals {
    /// Loads the models of `config`.
    ///
    /// # Errors
    /// [`Error::Setting`] for a model that cannot be used and for a name that cannot be a column's.
    pub fn load(config: &SignalsConfig, base_dir: &Path) -> Result<Self> {
        let signals: Vec<&str> = SIGNALS.iter().map(|signal| signal.name).collect();
        let and_profiles = [signals.as_slice(), profiles::PROFILES].concat();
        for (key, kind, names, known) in [
            ("only", "signal or profile", &config.only, &and_profiles),
            ("without", "signal", &config.without, &signals),
        ] {
            if let Some(number) = names.iter().position(|name| !known.contains(&name.as_str())) {
                let name = &names[number];
                let reason = format!("unknown {kind} \"{name}\"{}", profiles::suggest(name, known));
                return Err(Error::setting(format!("signals.{key}.{number}"), reason));
            }
        }
        let mut digests = Vec::new();
        let mut digest = |key: String, path: &Path| -> Result<()> {
            let path = base_dir.join(path);
            let digest = Digest::of_file(&path).map_err(|e| Error::setting(key, format!("{}: {e}", path.display())))?;
            digests.push(digest);
            Ok(())
        };
        if let Some(path) = config.language.as_ref().and_then(|language| language.model.as_ref()) {
            digest("signals.language.model".into(), path)?;
        }
        let identifier = match &config.language {
            None => None,
            Some(language) => Some(
                Identifier::load(language, base_dir)
                    .map_err(|e| Error::setting("signals.language.model", e.to_string()))?,
            ),
        };
        let mut classifiers = Vec::new();
        for (number, classifier) in config.classifiers.iter().enumerate() {
            let key = format!("signals.classifiers.{number}");
            let name = &classifier.name;
            let fits = name.starts_with(|c: char| c.is_ascii_lowercase())
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
            let taken = SIGNALS.iter().any(|s| s.name == name)
                || [LANGUAGE, LANGUAGE_SCORE, LANGUAGE_PARAGRAPH_FRACTION, "id", "ordinal"].contains(&name.as_str())
                || config.classifiers[..number].iter().any(|c| c.name == *name);
            if !fits || taken {
                let reason =
                    if taken { "is a column already" } else { "must be lower-case letters, digits and underscores" };
                return Err(Error::setting(format!("{key}.name"), format!("\"{name}\" {reason}")));
            }
            digest(format!("{key}.model"), &classifier.model)?;
            let model = Classifier::load(&base_dir.join(&classifier.model), classifier.label.as_deref());
            classifiers.push(model.map_err(|e| Error::setting(format!("{key}.model"), e.to_string()))?);
        }
        Ok(Self {
            config: config.clone(),
            fields: config.fields(),
            identifier,
            classifiers,
            digests,
            scratch: Mutex::default(),
        })
    }

    /// What they were loaded from.
    pub fn config(&self) -> &SignalsConfig {
        &self.config
    }

    /// Digests of the model files.
    pub fn digests(&self) -> &[Digest] {
        &self.digests
    }

    fn compute(&self, texts: &ArrayRef, languages: &ArrayRef) -> PlanResult<StructArray> {
        let rows = texts.len();
        let (texts, languages) = (cast(texts, &DataType::Utf8View)?, cast(languages, &DataType::Utf8View)?);
        let (texts, languages) = (texts.as_string_view(), languages.as_string_view());
        let has = |signal: &str| self.fields.find(signal).is_some();
        let mut columns = Columns::of(rows, has);
        let mut language = StringViewBuilder::with_capacity(rows);
        let mut score = Float64Builder::with_capacity(rows);
        let mut paragraph_fraction = Float64Builder::with_capacity(rows);
        let mut probabilities: Vec<Float64Builder> =
            self.classifiers.iter().map(|_| Float64Builder::with_capacity(rows)).collect();
        let kept = self.scratch.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut scratch = kept.unwrap_or_else(|| Scratch::only(has));
        let mut words = FastTextScratch::default();
        let mut features = ClassifierScratch::default();
        let paragraphs = self.config.language.as_ref().is_some_and(|l| l.paragraphs);
        for row in 0..rows {
            let text = texts.is_valid(row).then(|| texts.value(row));
            let mut found = match (&self.identifier, text) {
                (Some(identifier), Some(text)) => identifier.document(text, paragraphs, &mut words),
                _ => DocumentLanguage::default(),
            };
            if found.language.is_none() && languages.is_valid(row) {
                let given = code_of(languages.value(row));
                found.language = (!given.is_empty()).then(|| given.to_owned());
            }
            columns.push(text, StopWords::of(found.language.as_deref()), &mut scratch);
            language.append_option(found.language.as_deref());
            score.append_option(self.identifier.as_ref().and(text).map(|_| found.score));
            paragraph_fraction.append_option(found.paragraph_fraction);
            for (classifier, column) in self.classifiers.iter().zip(&mut probabilities) {
                column.append_option(text.and_then(|text| classifier.probability(text, &mut features)));
            }
        }
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
        let mut arrays = columns.finish_columns();
        arrays.extend([
            Arc::new(language.finish()) as ArrayRef,
            Arc::new(score.finish()),
            Arc::new(paragraph_fraction.finish()),
        ]);
        arrays.extend(probabilities.iter_mut().map(|column| Arc::new(column.finish()) as ArrayRef));
        Ok(StructArray::try_new(self.fields.clone(), arrays, None)?)
    }
}

/// `document_signals(text, language)`: a struct of all columns of [`SignalsConfig::schema`].
pub(crate) fn function(signals: Shared<DocumentSignals>) -> ScalarUDF {
    ScalarUDF::from(Function { signals, signature: Signature::any(2, Volatility::Immutable) })
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Function {
    signals: Shared<DocumentSignals>,
    signature: Signature,
}

impl ScalarUDFImpl for Function {
    fn name(&self) -> &str {
        "document_signals"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> PlanResult<DataType> {
        Ok(DataType::Struct(self.signals.fields.clone()))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> PlanResult<ColumnarValue> {
        let [texts, languages] = take_function_args(self.name(), &args.args)?;
        let (texts, languages) = (texts.to_array(args.number_rows)?, languages.to_array(args.number_rows)?);
        Ok(ColumnarValue::Array(Arc::new(self.signals.compute(&texts, &languages)?)))
    }
}
