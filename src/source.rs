//! A recipe as a person wrote it: the text of the file and the `--set` of the command line, so that an error can
//! name the line, or the option, that has to be changed.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::exit::Usage;

/// Text and overrides of a recipe.
pub struct Source {
    path: PathBuf,
    text: String,
    overrides: Vec<String>,
}

impl Source {
    /// Read `path`; `overrides` are the `key.path=value` of the command line.
    ///
    /// # Errors
    /// [`Usage`] when the file cannot be read.
    pub fn read(path: &Path, overrides: &[String]) -> Result<Self, Usage> {
        let text = std::fs::read_to_string(path).map_err(|e| Usage(format!("{}: {e}", path.display())))?;
        Ok(Self { path: path.into(), text, overrides: overrides.into() })
    }

    /// A text that is not from a file, called `name` in messages.
    pub fn of(name: &str, text: String, overrides: &[String]) -> Self {
        Self { path: name.into(), text, overrides: overrides.into() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The text with the overrides applied, as a value.
    ///
    /// # Errors
    /// [`Usage`] with file, line and, for an unknown key, a suggestion; with the option where an override is to blame.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, Usage> {
        let edited = apply(&self.text, &self.overrides).map_err(|e| self.refuse(e))?;
        toml::from_str(&edited).map_err(|error| self.blame::<T>(&error))
    }

    /// Who is to blame for an error of the edited text: the file, whose own lines are quoted, or an override.
    fn blame<T: DeserializeOwned>(&self, error: &toml::de::Error) -> Usage {
        if let Err(own) = toml::from_str::<T>(&self.text)
            && own.message() == error.message()
        {
            return self.refuse(with_suggestion(own.to_string().trim_end(), &own));
        }
        let guilty = (1..=self.overrides.len()).find(|n| {
            let edited = apply(&self.text, &self.overrides[..*n]);
            edited.is_ok_and(|text| toml::from_str::<T>(&text).is_err_and(|e| e.message() == error.message()))
        });
        let set = guilty.map_or_else(|| self.overrides.join(" --set "), |n| self.overrides[n - 1].clone());
        self.refuse(with_suggestion(&format!("--set {set}: {}", error.message()), error))
    }

    /// An error of the file as a whole.
    pub fn refuse(&self, reason: impl std::fmt::Display) -> Usage {
        Usage(format!("{}: {reason}", self.path.display()))
    }

    /// An error of one key, with the line that sets it or the option that does.
    pub fn refuse_key(&self, key: &str, reason: &str) -> Usage {
        if let Some(set) = self.overrides.iter().rev().find(|set| is_about(set, key)) {
            return self.refuse(format!("--set {set}: {key}: {reason}"));
        }
        match line_of(&self.text, key) {
            Some(line) => {
                let quoted = self.text.lines().nth(line - 1).unwrap_or_default();
                let gap = " ".repeat(line.to_string().len());
                self.refuse(format!("line {line}: {key}: {reason}\n{gap} |\n{line} | {quoted}\n{gap} |"))
            }
            None => self.refuse(format!("{key}: {reason}")),
        }
    }

    /// Give an error about a key of the recipe its line; others stay as they are.
    pub fn explain(&self, error: impl Into<anyhow::Error>) -> anyhow::Error {
        let error = error.into();
        match error.downcast_ref() {
            Some(pipeline::Error::Setting { key, reason }) => self.refuse_key(key, reason).into(),
            _ => error,
        }
    }
}

/// Whether an override sets `key`, something it is part of, or a part of it.
fn is_about(set: &str, key: &str) -> bool {
    let set = set.split_once('=').map_or(set, |(key, _)| key).trim();
    let below = |inner: &str, outer: &str| inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('.'));
    set == key || below(key, set) || below(set, key)
}

/// Line (from 1) of the innermost part of a dotted key that the text has; positions in arrays count from 0.
fn line_of(text: &str, key: &str) -> Option<usize> {
    let document = toml_edit::Document::parse(text).ok()?;
    let mut item = document.as_item();
    let mut at = None;
    for part in key.split('.') {
        let next = match part.parse::<usize>() {
            Ok(index) if item.is_array() || item.is_array_of_tables() => item.get(index),
            _ => item.as_table_like().and_then(|table| table.get(part)),
        };
        let Some(next) = next else { break };
        at = next.span().map(|span| span.start).or(at);
        item = next;
    }
    at.map(|at| text[..at].matches('\n').count() + 1)
}

/// Set `key.path=value` in a TOML text. The value is TOML, or a string where it is not.
fn apply(text: &str, overrides: &[String]) -> Result<String, String> {
    if overrides.is_empty() {
        return Ok(text.into());
    }
    let mut document: toml_edit::DocumentMut = text.parse().map_err(|e: toml_edit::TomlError| e.to_string())?;
    for text in overrides {
        let Some((key, value)) = text.split_once('=') else {
            return Err(format!("--set {text}: write it as KEY=VALUE, such as train.steps=200"));
        };
        let value: toml_edit::Value = value.trim().parse().unwrap_or_else(|_| value.trim().into());
        let mut path: Vec<&str> = key.trim().split('.').collect();
        let last = path.pop().unwrap_or_default();
        let mut item = document.as_item_mut();
        for part in path {
            item = match part.parse::<usize>() {
                Ok(index) if item.is_array_of_tables() || item.is_array() => {
                    item.get_mut(index).ok_or_else(|| format!("--set {text}: there is no entry {index}"))?
                }
                _ if item.is_none() || item.is_table_like() => {
                    let table = item.or_insert(toml_edit::table());
                    &mut table[part]
                }
                _ => return Err(format!("--set {text}: {part} is not below a table")),
            };
        }
        if !(item.is_none() || item.is_table_like()) {
            return Err(format!("--set {text}: {last} is not below a table"));
        }
        item.or_insert(toml_edit::table())[last] = toml_edit::value(value);
    }
    Ok(document.to_string())
}

/// The text of an error, and the nearest name where a key is unknown.
fn with_suggestion(text: &str, error: &toml::de::Error) -> String {
    let names: Vec<&str> = error.message().split('`').skip(1).step_by(2).collect();
    if let [wrong, expected @ ..] = names.as_slice()
        && error.message().starts_with("unknown ")
    {
        let nearest =
            expected.iter().max_by(|a, b| strsim::jaro_winkler(wrong, a).total_cmp(&strsim::jaro_winkler(wrong, b)));
        if let Some(nearest) = nearest.filter(|n| strsim::jaro_winkler(wrong, n) > 0.7) {
            return format!("{text}\ndid you mean `{nearest}`?");
        }
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "name = \"a\"\n\n[[ingest.inputs]]\nsource = \"s\"\npaths = [\n  \"x\",\n]\n\n[train]\nsteps = 5\n\n\
                        [filter]\nrules = [\n  { name = \"r\", drop_when = \"1\" },\n]\n";

    fn source(set: &[&str]) -> Source {
        Source { path: "r.toml".into(), text: TEXT.into(), overrides: set.iter().map(|s| s.to_string()).collect() }
    }

    #[test]
    fn a_key_has_the_line_of_its_innermost_part_that_is_there() {
        for (key, line) in [
            ("name", Some(1)),
            ("ingest.inputs.0.source", Some(4)),
            ("ingest.inputs.0.paths", Some(5)),
            ("ingest.inputs.0.fields.text", Some(3)),
            ("train.steps", Some(10)),
            ("train.model.vocab_size", Some(9)),
            ("filter.rules.0.drop_when", Some(14)),
            ("near.bands", None),
        ] {
            assert_eq!(line_of(TEXT, key), line, "{key}");
        }
        let error = source(&[]).refuse_key("train.steps", "too few").to_string();
        assert_eq!(error, "r.toml: line 10: train.steps: too few\n   |\n10 | steps = 5\n   |");
    }

    #[test]
    fn an_override_that_sets_a_key_is_named_instead_of_a_line() {
        let source = source(&["train.steps=3", "train.model.size=tiny"]);
        let error = source.refuse_key("train.steps", "too few").to_string();
        assert_eq!(error, "r.toml: --set train.steps=3: train.steps: too few");
        assert!(source.refuse_key("train.model", "odd").to_string().contains("--set train.model.size=tiny"));
        assert!(source.refuse_key("name", "odd").to_string().contains("line 1"));
    }
}
