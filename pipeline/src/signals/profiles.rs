//! Named profiles of published rules, and rules of the recipe: each is an SQL predicate over the signals
//! that drops the documents for which it is true.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use arrow::datatypes::{DataType, SchemaRef};
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::common::utils::datafusion_strsim::levenshtein;
use datafusion::common::{Column, DFSchema, DataFusionError, ScalarValue, SchemaError};
use datafusion::logical_expr::{BinaryExpr, Expr, Operator, Volatility};
use datafusion::prelude::SessionContext;
use serde::{Deserialize, Serialize};

use super::document::LANGUAGE;

/// How a rule compares its signal with its threshold to drop a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// `<`
    Less,
    /// `<=`
    LessOrEqual,
    /// `>`
    Greater,
    /// `>=`
    GreaterOrEqual,
    /// `=`
    Equal,
    /// `<>`
    NotEqual,
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Less => "<",
            Self::LessOrEqual => "<=",
            Self::Greater => ">",
            Self::GreaterOrEqual => ">=",
            Self::Equal => "=",
            Self::NotEqual => "<>",
        })
    }
}

impl Comparison {
    fn from_operator(operator: Operator) -> Option<Self> {
        Some(match operator {
            Operator::Lt => Self::Less,
            Operator::LtEq => Self::LessOrEqual,
            Operator::Gt => Self::Greater,
            Operator::GtEq => Self::GreaterOrEqual,
            Operator::Eq => Self::Equal,
            Operator::NotEq => Self::NotEqual,
            _ => return None,
        })
    }

    /// The comparison with its sides exchanged.
    fn flipped(self) -> Self {
        match self {
            Self::Less => Self::Greater,
            Self::LessOrEqual => Self::GreaterOrEqual,
            Self::Greater => Self::Less,
            Self::GreaterOrEqual => Self::LessOrEqual,
            Self::Equal | Self::NotEqual => self,
        }
    }
}

/// A rule: drops every document for which its predicate is true (neither false nor null).
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Unique name: what the `rule` column of a dropped document says.
    pub name: String,
    /// SQL predicate over the columns of [`SIGNALS`].
    pub drop_when: String,
    /// The column whose value a dropped document reports; none when the predicate is not about one.
    pub signal: Option<String>,
    /// How the signal is compared; none for a Boolean signal and for a predicate that is not
    /// `column comparison number`.
    pub comparison: Option<Comparison>,
    /// The number it is compared with; none where there is no comparison.
    pub threshold: Option<f64>,
    /// SQL for the number where it depends on the language of the document.
    pub threshold_sql: Option<String>,
}

/// What is different for documents of one language.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LanguageRules {
    /// Thresholds, by name of the rule.
    pub thresholds: BTreeMap<String, f64>,
    /// Rules that do not apply.
    pub off: Vec<String>,
}

/// Why rules cannot be used.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum RuleError {
    /// There is no such profile.
    #[error("unknown profile \"{name}\"{}; profiles are {}", suggest(name, PROFILES), PROFILES.join(", "))]
    UnknownProfile {
        /// The name.
        name: String,
    },
    /// A threshold is given for a rule that no selected profile has.
    #[error("threshold for unknown rule \"{name}\"{}", suggest(name, known))]
    UnknownRule {
        /// The name.
        name: String,
        /// Names of the rules of the selected profiles.
        known: Vec<String>,
    },
    /// A threshold is given for a rule that compares with none.
    #[error("rule \"{name}\" has no threshold: it drops when {drop_when}")]
    NoThreshold {
        /// The name.
        name: String,
        /// Its predicate.
        drop_when: String,
    },
    /// A language code that cannot be one.
    #[error("\"{code}\" is no language code; documents have codes such as en, de, zh or ceb")]
    Language {
        /// The code.
        code: String,
    },
    /// A threshold is not a finite number.
    #[error("threshold of rule \"{name}\" must be a finite number, not {value}")]
    NotFinite {
        /// The name.
        name: String,
        /// The value.
        value: f64,
    },
    /// A rule's name is not fit to be a value that others select by.
    #[error("rule name \"{name}\" must be lower-case letters, digits and underscores, and begin with a letter")]
    Name {
        /// The name.
        name: String,
    },
    /// Two rules have one name.
    #[error("two rules are named \"{name}\"")]
    Twice {
        /// The name.
        name: String,
    },
    /// A predicate names a column that is no signal.
    #[error("rule \"{rule}\": unknown signal \"{column}\"{} in: {drop_when}", suggest(column, known))]
    UnknownSignal {
        /// Names of the signals.
        known: Vec<String>,
        /// Name of the rule.
        rule: String,
        /// The column.
        column: String,
        /// The predicate.
        drop_when: String,
    },
    /// A predicate is not SQL, or not of type Boolean.
    #[error("rule \"{rule}\": {reason} in: {drop_when}")]
    Predicate {
        /// Name of the rule.
        rule: String,
        /// The predicate.
        drop_when: String,
        /// What is wrong.
        reason: String,
    },
}

/// Names of the profiles.
pub const PROFILES: &[&str] =
    &["gopher", "gopher_quality", "gopher_repetition", "c4", "fineweb", "massiveweb", "refinedweb"];

/// The rules of a profile in order, with the published thresholds.
pub fn profile(name: &str) -> Result<Vec<Rule>, RuleError> {
    let tables: &[&[Published]] = match name {
        "gopher" => &[GOPHER_QUALITY, GOPHER_REPETITION],
        "gopher_quality" => &[GOPHER_QUALITY],
        "gopher_repetition" => &[GOPHER_REPETITION],
        "c4" => &[C4],
        "fineweb" => &[FINEWEB],
        "massiveweb" => &[MASSIVEWEB],
        "refinedweb" => &[MASSIVEWEB, REFINEDWEB],
        _ => return Err(RuleError::UnknownProfile { name: name.into() }),
    };
    Ok(tables.concat().into_iter().map(Published::rule).collect())
}

/// The rules of several profiles in order, each once, with thresholds replaced by name, and after them
/// the recipe's own rules: pairs of a name and a predicate. Every predicate is planned, so that none can fail later.
pub fn resolve<'a>(
    profiles: impl IntoIterator<Item = &'a str>,
    thresholds: &BTreeMap<String, f64>,
    own: impl IntoIterator<Item = (&'a str, &'a str)>,
    languages: &BTreeMap<String, LanguageRules>,
    schema: &SchemaRef,
) -> Result<Vec<Rule>, RuleError> {
    let mut rules: Vec<Rule> = Vec::new();
    for name in profiles {
        for rule in profile(name)? {
            if rules.iter().all(|r| r.name != rule.name) {
                rules.push(rule);
            }
        }
    }
    // The recipe may have left the signal of a published rule out.
    let there = |signal: &String| schema.field_with_name(signal).is_ok();
    if let Some(rule) = rules.iter().find(|rule| !rule.signal.as_ref().is_none_or(there)) {
        return Err(RuleError::UnknownSignal {
            rule: rule.name.clone(),
            column: rule.signal.clone().unwrap_or_default(),
            drop_when: rule.drop_when.clone(),
            known: Vec::new(),
        });
    }
    for (name, value) in thresholds {
        let Some(rule) = rules.iter_mut().find(|rule| rule.name == *name) else {
            let known = rules.into_iter().map(|rule| rule.name).collect();
            return Err(RuleError::UnknownRule { name: name.clone(), known });
        };
        let (Some(signal), Some(comparison)) = (&rule.signal, rule.comparison) else {
            return Err(RuleError::NoThreshold { name: name.clone(), drop_when: rule.drop_when.clone() });
        };
        if !value.is_finite() {
            return Err(RuleError::NotFinite { name: name.clone(), value: *value });
        }
        rule.drop_when = format!("{signal} {comparison} {value}");
        rule.threshold = Some(*value);
    }
    for (name, drop_when) in own {
        rules.push(own_rule(name, drop_when, schema)?);
    }
    by_language(&mut rules, languages)?;
    let mut names = HashSet::new();
    match rules.iter().find(|rule| !names.insert(&rule.name)) {
        Some(twice) => Err(RuleError::Twice { name: twice.name.clone() }),
        None => Ok(rules),
    }
}

/// Rewrites the rules that are different for some languages: their thresholds become a CASE over the language. A
/// threshold of null, where a rule is off, drops nothing.
fn by_language(rules: &mut [Rule], languages: &BTreeMap<String, LanguageRules>) -> Result<(), RuleError> {
    let known: Vec<String> = rules.iter().map(|rule| rule.name.clone()).collect();
    for name in languages.values().flat_map(|l| l.thresholds.keys().chain(&l.off)) {
        if !known.contains(name) {
            return Err(RuleError::UnknownRule { name: name.clone(), known });
        }
    }
    if let Some(wrong) = languages.keys().find(|code| !code.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')) {
        return Err(RuleError::Language { code: wrong.clone() });
    }
    for rule in rules {
        let mut cases = String::new();
        for (code, of) in languages {
            let number = of.thresholds.get(&rule.name);
            if let Some(value) = number.filter(|value| !value.is_finite()) {
                return Err(RuleError::NotFinite { name: rule.name.clone(), value: *value });
            }
            if of.off.contains(&rule.name) {
                cases.push_str(&format!(" WHEN '{code}' THEN NULL"));
            } else if let Some(value) = number {
                cases.push_str(&format!(" WHEN '{code}' THEN {value:?}"));
            }
        }
        if cases.is_empty() {
            continue;
        }
        match (&rule.signal, rule.comparison, rule.threshold) {
            (Some(signal), Some(comparison), Some(threshold)) => {
                let number = format!("CASE {LANGUAGE}{cases} ELSE {threshold:?} END");
                rule.drop_when = format!("{signal} {comparison} {number}");
                rule.threshold_sql = Some(number);
            }
            _ if languages.values().any(|of| of.thresholds.contains_key(&rule.name)) => {
                return Err(RuleError::NoThreshold { name: rule.name.clone(), drop_when: rule.drop_when.clone() });
            }
            _ => rule.drop_when = format!("CASE {LANGUAGE}{cases} ELSE ({}) END", rule.drop_when),
        }
    }
    Ok(())
}

/// A rule of the recipe. Its value and threshold are known when the predicate is a Boolean signal or
/// `column comparison number` (or that with the sides exchanged).
pub fn own_rule(name: &str, drop_when: &str, schema: &SchemaRef) -> Result<Rule, RuleError> {
    let fits = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if !fits {
        return Err(RuleError::Name { name: name.into() });
    }
    let predicate = plan(name, drop_when, schema)?;
    let (signal, comparison, threshold) = match simple(&predicate) {
        Some((signal, comparison, threshold)) => (Some(signal), comparison, threshold),
        None => (None, None, None),
    };
    Ok(Rule { name: name.into(), drop_when: drop_when.into(), signal, comparison, threshold, threshold_sql: None })
}

/// Parses a predicate and plans it against the signals: their names, their types, a Boolean result.
fn plan(rule: &str, drop_when: &str, columns: &SchemaRef) -> Result<Expr, RuleError> {
    let failed = |error: DataFusionError| match error.find_root() {
        DataFusionError::SchemaError(schema_error, _) => match schema_error.as_ref() {
            SchemaError::FieldNotFound { field, .. } => RuleError::UnknownSignal {
                rule: rule.into(),
                column: field.name().into(),
                drop_when: drop_when.into(),
                known: columns.fields().iter().map(|field| field.name().clone()).collect(),
            },
            other => RuleError::Predicate { rule: rule.into(), drop_when: drop_when.into(), reason: other.to_string() },
        },
        other => {
            RuleError::Predicate { rule: rule.into(), drop_when: drop_when.into(), reason: other.strip_backtrace() }
        }
    };
    let session = SessionContext::new();
    let schema = DFSchema::try_from(columns.clone()).map_err(failed)?;
    let predicate = session.parse_sql_expr(drop_when, &schema).map_err(failed)?;
    // SQL would turn the number into text and compare letter by letter.
    if compares_numbers_with_text(&predicate).map_err(failed)? {
        return Err(RuleError::Predicate {
            rule: rule.into(),
            drop_when: drop_when.into(),
            reason: format!("signals but {LANGUAGE} are numbers and truth values, not text"),
        });
    }
    // What a rule decides must be the same tomorrow and after a crash.
    let varying = |expr: &Expr| match expr {
        Expr::ScalarFunction(call) if call.func.signature().volatility != Volatility::Immutable => {
            Some(call.func.name().to_owned())
        }
        _ => None,
    };
    let mut found = None;
    predicate
        .apply(|expr| {
            found = varying(expr);
            Ok(if found.is_some() { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
        })
        .map_err(failed)?;
    if let Some(function) = found {
        return Err(RuleError::Predicate {
            rule: rule.into(),
            drop_when: drop_when.into(),
            reason: format!("{function}() gives another answer every time"),
        });
    }
    let physical = session.create_physical_expr(predicate.clone(), &schema).map_err(failed)?;
    match physical.data_type(columns).map_err(failed)? {
        DataType::Boolean => Ok(predicate),
        other => Err(RuleError::Predicate {
            rule: rule.into(),
            drop_when: drop_when.into(),
            reason: format!("a predicate must be true or false, this one is of type {other}"),
        }),
    }
}

/// Signal, comparison and threshold of a predicate that is that simple.
fn simple(predicate: &Expr) -> Option<(String, Option<Comparison>, Option<f64>)> {
    match predicate {
        Expr::Column(Column { name, .. }) => Some((name.clone(), None, None)),
        Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
            let comparison = Comparison::from_operator(*op)?;
            match (left.as_ref(), right.as_ref()) {
                (Expr::Column(column), number) => Some((column.name.clone(), Some(comparison), Some(literal(number)?))),
                (number, Expr::Column(column)) => {
                    Some((column.name.clone(), Some(comparison.flipped()), Some(literal(number)?)))
                }
                _ => None,
            }
        }
        _ => None,
    }
}

fn is_text(expr: &Expr) -> bool {
    matches!(expr, Expr::Literal(value, _) if value.data_type().is_string())
}

/// Whether a text stands anywhere but beside the one signal that is a text.
fn compares_numbers_with_text(predicate: &Expr) -> Result<bool, DataFusionError> {
    let is_language = |expr: &Expr| matches!(expr, Expr::Column(column) if column.name == LANGUAGE);
    let mut texts = 0usize;
    let mut beside_language = 0usize;
    predicate.apply(|expr| {
        texts += usize::from(is_text(expr));
        beside_language += match expr {
            Expr::BinaryExpr(BinaryExpr { left, right, .. }) => {
                usize::from(is_language(left) && is_text(right)) + usize::from(is_language(right) && is_text(left))
            }
            Expr::InList(list) if is_language(&list.expr) => list.list.iter().filter(|e| is_text(e)).count(),
            Expr::Like(like) if is_language(&like.expr) => usize::from(is_text(&like.pattern)),
            _ => 0,
        };
        Ok(TreeNodeRecursion::Continue)
    })?;
    Ok(texts > beside_language)
}

fn literal(expr: &Expr) -> Option<f64> {
    match expr {
        Expr::Literal(value, _) => match value.cast_to(&DataType::Float64) {
            Ok(ScalarValue::Float64(number)) if value.data_type().is_numeric() => number,
            _ => None,
        },
        Expr::Negative(inner) => literal(inner).map(|number| -number),
        _ => None,
    }
}

/// `, did you mean "x"?` for the nearest known name, when one is near.
pub(super) fn suggest<S: AsRef<str>>(name: &str, known: &[S]) -> String {
    let name = name.to_lowercase();
    known
        .iter()
        .map(|known| (levenshtein(&name, known.as_ref()), known.as_ref()))
        .min()
        .filter(|(distance, known)| *distance <= known.len().max(name.len()) / 3)
        .map_or_else(String::new, |(_, known)| format!(", did you mean \"{known}\"?"))
}

/// One line of the tables below.
#[derive(Clone, Copy)]
enum Published {
    Compare(&'static str, &'static str, Comparison, f64),
    Is(&'static str, &'static str),
}

impl Published {
    fn rule(self) -> Rule {
        match self {
            Self::Compare(name, signal, comparison, threshold) => Rule {
                name: name.into(),
                drop_when: format!("{signal} {comparison} {threshold}"),
                signal: Some(signal.into()),
                comparison: Some(comparison),
                threshold: Some(threshold),
                threshold_sql: None,
            },
            Self::Is(name, signal) => Rule {
                name: name.into(),
                drop_when: signal.into(),
                signal: Some(signal.into()),
                comparison: None,
                threshold: None,
                threshold_sql: None,
            },
        }
    }
}

use Comparison::{Greater, Less};
use Published::{Compare, Is};

/// Rae et al. 2021 (Gopher), A.1.1, "Quality filtering".
const GOPHER_QUALITY: &[Published] = &[
    Compare("gopher_too_few_words", "non_symbol_word_count", Less, 50.0),
    Compare("gopher_too_many_words", "non_symbol_word_count", Greater, 100_000.0),
    Compare("gopher_short_words", "mean_word_length", Less, 3.0),
    Compare("gopher_long_words", "mean_word_length", Greater, 10.0),
    Compare("gopher_hashes", "hash_ratio", Greater, 0.1),
    Compare("gopher_ellipses", "ellipsis_ratio", Greater, 0.1),
    Compare("gopher_bullet_lines", "bullet_line_fraction", Greater, 0.9),
    Compare("gopher_ellipsis_lines", "ellipsis_line_fraction", Greater, 0.3),
    Compare("gopher_alphabetic_words", "alpha_word_fraction", Less, 0.8),
    Compare("gopher_stop_words", "stop_word_count", Less, 2.0),
];

/// Rae et al. 2021 (Gopher), table A1, "Repetition removal".
const GOPHER_REPETITION: &[Published] = &[
    Compare("gopher_duplicate_lines", "duplicate_line_fraction", Greater, 0.3),
    Compare("gopher_duplicate_paragraphs", "duplicate_paragraph_fraction", Greater, 0.3),
    Compare("gopher_duplicate_line_chars", "duplicate_line_char_fraction", Greater, 0.2),
    Compare("gopher_duplicate_paragraph_chars", "duplicate_paragraph_char_fraction", Greater, 0.2),
    Compare("gopher_top_2gram", "top_2gram_char_fraction", Greater, 0.2),
    Compare("gopher_top_3gram", "top_3gram_char_fraction", Greater, 0.18),
    Compare("gopher_top_4gram", "top_4gram_char_fraction", Greater, 0.16),
    Compare("gopher_duplicate_5grams", "duplicate_5gram_char_fraction", Greater, 0.15),
    Compare("gopher_duplicate_6grams", "duplicate_6gram_char_fraction", Greater, 0.14),
    Compare("gopher_duplicate_7grams", "duplicate_7gram_char_fraction", Greater, 0.13),
    Compare("gopher_duplicate_8grams", "duplicate_8gram_char_fraction", Greater, 0.12),
    Compare("gopher_duplicate_9grams", "duplicate_9gram_char_fraction", Greater, 0.11),
    Compare("gopher_duplicate_10grams", "duplicate_10gram_char_fraction", Greater, 0.1),
];

/// Raffel et al. 2020 (C4), section 2.2: the rules on whole pages; `c4_clean` is the rule on lines.
const C4: &[Published] = &[
    Is("c4_lorem_ipsum", "c4_has_lorem_ipsum"),
    Is("c4_curly_bracket", "c4_has_curly_bracket"),
    Compare("c4_too_few_sentences", "c4_sentence_count", Less, 5.0),
];

/// Penedo et al. 2024 (FineWeb), section 3.6.
const FINEWEB: &[Published] = &[
    Compare("fineweb_terminal_lines", "terminal_line_fraction", Less, 0.12),
    Compare("fineweb_short_lines", "short_line_fraction", Greater, 0.67),
    Compare("fineweb_duplicate_line_chars", "duplicate_line_char_fraction", Greater, 0.01),
    Compare("fineweb_newlines", "newline_ratio", Greater, 0.3),
];

/// Rae et al. 2021, A.1.1 and table A1, to the letter: all words are words, and repeated n-grams count wherever they
/// stand, their first occurrence included. `gopher` has the same rules as later systems read them.
const MASSIVEWEB: &[Published] = &[
    Compare("massiveweb_too_few_words", "word_count", Less, 50.0),
    Compare("massiveweb_too_many_words", "word_count", Greater, 100_000.0),
    Compare("massiveweb_short_words", "mean_any_word_length", Less, 3.0),
    Compare("massiveweb_long_words", "mean_any_word_length", Greater, 10.0),
    Compare("massiveweb_hashes", "hash_ratio", Greater, 0.1),
    Compare("massiveweb_ellipses", "ellipsis_ratio", Greater, 0.1),
    Compare("massiveweb_bullet_lines", "bullet_line_fraction", Greater, 0.9),
    Compare("massiveweb_ellipsis_lines", "ellipsis_line_fraction", Greater, 0.3),
    Compare("massiveweb_alphabetic_words", "alpha_word_fraction", Less, 0.8),
    Compare("massiveweb_stop_words", "stop_word_count", Less, 2.0),
    Compare("massiveweb_duplicate_lines", "duplicate_line_fraction", Greater, 0.3),
    Compare("massiveweb_duplicate_paragraphs", "duplicate_paragraph_fraction", Greater, 0.3),
    Compare("massiveweb_duplicate_line_chars", "duplicate_line_char_fraction", Greater, 0.2),
    Compare("massiveweb_duplicate_paragraph_chars", "duplicate_paragraph_char_fraction", Greater, 0.2),
    Compare("massiveweb_top_2gram", "top_2gram_char_fraction", Greater, 0.2),
    Compare("massiveweb_top_3gram", "top_3gram_char_fraction", Greater, 0.18),
    Compare("massiveweb_top_4gram", "top_4gram_char_fraction", Greater, 0.16),
    Compare("massiveweb_repeated_5grams", "covered_5gram_char_fraction", Greater, 0.15),
    Compare("massiveweb_repeated_6grams", "covered_6gram_char_fraction", Greater, 0.14),
    Compare("massiveweb_repeated_7grams", "covered_7gram_char_fraction", Greater, 0.13),
    Compare("massiveweb_repeated_8grams", "covered_8gram_char_fraction", Greater, 0.12),
    Compare("massiveweb_repeated_9grams", "covered_9gram_char_fraction", Greater, 0.11),
    Compare("massiveweb_repeated_10grams", "covered_10gram_char_fraction", Greater, 0.1),
];

/// Penedo et al. 2023 (RefinedWeb), G.2: the document goes when its line rules take away too much. The rule on lines
/// rewrites the text and is the part `refinedweb_lines` of the stage `clean`.
const REFINEDWEB: &[Published] =
    &[Compare("refinedweb_removed_words", "refinedweb_removed_word_fraction", Greater, 0.05)];

#[cfg(test)]
mod tests {
    use super::super::SignalsConfig;
    use super::*;

    fn message(error: RuleError) -> String {
        error.to_string()
    }

    fn schema() -> SchemaRef {
        SignalsConfig::default().schema()
    }

    fn own(drop_when: &str) -> Result<Rule, RuleError> {
        own_rule("mine", drop_when, &schema())
    }

    fn resolved(
        profiles: &[&str],
        thresholds: &BTreeMap<String, f64>,
        own: &[(&str, &str)],
        languages: &BTreeMap<String, LanguageRules>,
    ) -> Result<Vec<Rule>, RuleError> {
        resolve(profiles.iter().copied(), thresholds, own.iter().copied(), languages, &schema())
    }

    #[test]
    fn a_rule_needs_its_signal() {
        let without = SignalsConfig { without: vec!["hash_ratio".into()], ..SignalsConfig::default() }.schema();
        let resolved = |profile: &'static str, own: Option<(&'static str, &'static str)>| {
            resolve([profile], &BTreeMap::new(), own, &BTreeMap::new(), &without).map_err(message)
        };
        assert_eq!(
            resolved("gopher", None).unwrap_err(),
            "rule \"gopher_hashes\": unknown signal \"hash_ratio\" in: hash_ratio > 0.1"
        );
        assert!(
            resolved("c4", Some(("mine", "hash_ratio > 1"))).unwrap_err().contains("unknown signal \"hash_ratio\"")
        );
        assert!(resolved("c4", Some(("mine", "symbol_ratio > 1"))).is_ok());
    }

    #[test]
    fn rules_are_different_by_language() {
        let languages = BTreeMap::from([
            (
                "de".to_owned(),
                LanguageRules { thresholds: BTreeMap::from([("gopher_long_words".into(), 14.0)]), off: vec![] },
            ),
            (
                "zh".to_owned(),
                LanguageRules {
                    thresholds: BTreeMap::new(),
                    off: vec!["gopher_short_words".into(), "gopher_long_words".into(), "mine".into()],
                },
            ),
        ]);
        let rules = resolved(&["gopher_quality"], &BTreeMap::new(), &[("mine", "word_count < line_count")], &languages)
            .unwrap();
        let of = |name: &str| rules.iter().find(|r| r.name == name).unwrap();
        assert_eq!(
            of("gopher_long_words").drop_when,
            "mean_word_length > CASE language WHEN 'de' THEN 14.0 WHEN 'zh' THEN NULL ELSE 10.0 END"
        );
        assert_eq!(
            of("gopher_short_words").threshold_sql.as_deref(),
            Some("CASE language WHEN 'zh' THEN NULL ELSE 3.0 END")
        );
        assert_eq!(of("mine").drop_when, "CASE language WHEN 'zh' THEN NULL ELSE (word_count < line_count) END");
        assert_eq!(of("gopher_hashes").threshold_sql, None);
        let wrong = BTreeMap::from([(
            "de".to_owned(),
            LanguageRules { off: vec!["gopher_shrt_words".into()], ..LanguageRules::default() },
        )]);
        assert!(
            message(resolved(&["gopher"], &BTreeMap::new(), &[], &wrong).unwrap_err())
                .contains("did you mean \"gopher_short_words\"?")
        );
        let wrong = BTreeMap::from([("d'e".to_owned(), LanguageRules::default())]);
        assert!(matches!(resolved(&["gopher"], &BTreeMap::new(), &[], &wrong), Err(RuleError::Language { .. })));
    }

    #[test]
    fn languages_are_text_and_nothing_else_is() {
        for good in [
            "language = 'de'",
            "language IN ('de', 'fr') AND word_count < 3",
            "'en' <> language",
            "language LIKE 'z%'",
            "language IS NULL",
        ] {
            assert!(own(good).is_ok(), "{good}");
        }
        for bad in [
            "word_count < '80'",
            "language = 'de' AND word_count < '80'",
            "word_count IN ('1')",
            "language_score > 'x'",
        ] {
            assert!(own(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_published_rule_is_what_its_predicate_says() {
        for name in PROFILES {
            let rules = profile(name).unwrap();
            assert!(!rules.is_empty());
            for rule in rules {
                assert_eq!(own_rule(&rule.name, &rule.drop_when, &schema()).unwrap(), rule);
            }
        }
        let gopher: Vec<_> = profile("gopher").unwrap();
        assert_eq!(gopher.len(), 23);
        assert_eq!(gopher[0].drop_when, "non_symbol_word_count < 50");
        assert_eq!(gopher[22].drop_when, "duplicate_10gram_char_fraction > 0.1");
    }

    #[test]
    fn profiles_overlap_and_thresholds_are_replaced() {
        let thresholds = BTreeMap::from([("gopher_hashes".into(), 0.25), ("gopher_stop_words".into(), 1.0)]);
        let rules = resolved(&["gopher_quality", "gopher"], &thresholds, &[], &BTreeMap::new()).unwrap();
        assert_eq!(rules.len(), 23);
        assert_eq!(rules[4].drop_when, "hash_ratio > 0.25");
        assert_eq!(rules[4].threshold, Some(0.25));
        assert_eq!(rules[9].drop_when, "stop_word_count < 1");
    }

    #[test]
    fn thresholds_must_fit_a_rule() {
        let with = |name: &str, value| {
            resolved(&["c4"], &BTreeMap::from([(name.into(), value)]), &[], &BTreeMap::new()).unwrap_err()
        };
        assert_eq!(
            message(with("c4_to_few_sentences", 3.0)),
            "threshold for unknown rule \"c4_to_few_sentences\", did you mean \"c4_too_few_sentences\"?"
        );
        assert_eq!(message(with("gopher_hashes", 3.0)), "threshold for unknown rule \"gopher_hashes\"");
        assert_eq!(
            message(with("c4_lorem_ipsum", 3.0)),
            "rule \"c4_lorem_ipsum\" has no threshold: it drops when c4_has_lorem_ipsum"
        );
        assert!(message(with("c4_too_few_sentences", f64::NAN)).contains("finite"));
    }

    #[test]
    fn unknown_profiles_get_a_suggestion() {
        assert_eq!(
            message(profile("fine_web").unwrap_err()),
            "unknown profile \"fine_web\", did you mean \"fineweb\"?; \
             profiles are gopher, gopher_quality, gopher_repetition, c4, fineweb, massiveweb, refinedweb"
        );
        assert!(message(profile("xyz").unwrap_err()).starts_with("unknown profile \"xyz\"; profiles are"));
    }

    #[test]
    fn own_rules_show_value_and_threshold_where_they_can() {
        let rule = own("word_count < 80").unwrap();
        assert_eq!(rule.signal.as_deref(), Some("word_count"));
        assert_eq!((rule.comparison, rule.threshold), (Some(Less), Some(80.0)));
        let rule = own("0.5 <= symbol_ratio").unwrap();
        assert_eq!(rule.signal.as_deref(), Some("symbol_ratio"));
        assert_eq!((rule.comparison, rule.threshold), (Some(Comparison::GreaterOrEqual), Some(0.5)));
        let rule = own("mean_word_length > -1.5").unwrap();
        assert_eq!(rule.threshold, Some(-1.5));
        let rule = own("c4_has_curly_bracket").unwrap();
        assert_eq!(rule.signal.as_deref(), Some("c4_has_curly_bracket"));
        assert_eq!(rule.threshold, None);
        for complex in [
            "word_count < 80 AND symbol_ratio > 0.05",
            "word_count + 1 < 80",
            "word_count < line_count",
            "NOT c4_has_curly_bracket",
            "word_count BETWEEN 1 AND 5",
            "c4_has_curly_bracket = true",
        ] {
            let rule = own(complex).unwrap();
            assert_eq!((rule.comparison, rule.threshold), (None, None), "{complex}");
            assert_eq!(rule.signal, None, "{complex}");
        }
    }

    #[test]
    fn own_rules_are_planned() {
        assert_eq!(
            message(own("word_cuont < 80 AND symbol_ratio > 0.05").unwrap_err()),
            "rule \"mine\": unknown signal \"word_cuont\", did you mean \"word_count\"? \
             in: word_cuont < 80 AND symbol_ratio > 0.05"
        );
        assert!(
            message(own("nothing_like_it > 1").unwrap_err())
                .starts_with("rule \"mine\": unknown signal \"nothing_like_it\" in:")
        );
        assert!(message(own("word_count + 1").unwrap_err()).contains("of type Int64"));
        assert!(matches!(own("word_count <"), Err(RuleError::Predicate { .. })));
        assert!(matches!(own(""), Err(RuleError::Predicate { .. })));
        assert!(matches!(own("word_count < 80; DROP TABLE t"), Err(RuleError::Predicate { .. })));
        assert!(matches!(own("word_count < '80'"), Err(RuleError::Predicate { .. })));
        assert!(matches!(own("sum(word_count) > 3"), Err(RuleError::Predicate { .. })));
        assert!(message(own("random() < 0.5").unwrap_err()).contains("random() gives another answer every time"));
        assert!(message(own("word_count > 3 AND abs(random()) < 0.5").unwrap_err()).contains("random()"));
        assert!(own("abs(word_count) > 3").is_ok());
        assert!(matches!(own("no_such_function(word_count) > 3"), Err(RuleError::Predicate { .. })));
    }

    #[test]
    fn names_are_checked() {
        for name in ["", "Upper", "with space", "1st", "comma,name", "_x"] {
            assert_eq!(own_rule(name, "word_count < 1", &schema()), Err(RuleError::Name { name: name.into() }));
        }
        let twice = [("c4_lorem_ipsum", "word_count < 1")];
        assert_eq!(
            resolved(&["c4"], &BTreeMap::new(), &twice, &BTreeMap::new()),
            Err(RuleError::Twice { name: "c4_lorem_ipsum".into() })
        );
    }
}
