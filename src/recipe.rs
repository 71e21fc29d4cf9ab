//! The recipe: one TOML file that describes a run completely.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dedup::{DecontaminateConfig, ExactConfig, LinesConfig, NearConfig, SubstringConfig};
use pipeline::ingest::IngestConfig;
use pipeline::stages::clean::CleanConfig;
use pipeline::stages::filter::FilterConfig;
use pipeline::stages::mix::MixConfig;
use pipeline::stages::signals::SignalsConfig;
use pipeline::urls::UrlsConfig;
use serde::{Deserialize, Serialize};
use tokenize::TokenizeConfig;
use train::TrainConfig;

use crate::source::Source;

/// A run, from raw files to a sample of generated text. A table that is left out is a stage that is
/// left out; every key of a table that is there has its default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the run: `runs/NAME`.
    pub name: String,
    /// What it is, for people.
    #[serde(default)]
    pub description: String,
    /// Seed of the shuffle and the sampling; training has `train.seed`, and what is held out depends on no seed.
    #[serde(default)]
    pub seed: u64,
    /// Directory that input paths are relative to: the recipe's own, unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_dir: Option<PathBuf>,
    /// Raw files to documents.
    pub ingest: IngestConfig,
    /// Addresses to verdicts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub urls: Option<UrlsConfig>,
    /// Text to cleaner text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clean: Option<CleanConfig>,
    /// Documents to signals.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signals: Option<SignalsConfig>,
    /// Signals to verdicts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<FilterConfig>,
    /// Exact duplicates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exact: Option<ExactConfig>,
    /// Near duplicates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub near: Option<NearConfig>,
    /// Lines and paragraphs that stand in many documents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lines: Option<LinesConfig>,
    /// Spans that stand earlier in the corpus, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub substring: Option<SubstringConfig>,
    /// Texts of evaluation sets in documents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decontaminate: Option<DecontaminateConfig>,
    /// How much of what.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mix: Option<MixConfig>,
    /// Curated documents to token shards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenize: Option<TokenizeConfig>,
    /// Token shards to a model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<TrainConfig>,
    /// A text by the model, printed at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<SampleConfig>,
}

/// What to generate at the end of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleConfig {
    /// Texts to continue.
    pub prompts: Vec<String>,
    /// Tokens to write for each.
    pub max_tokens: usize,
    /// 0 takes the likeliest token every time.
    pub temperature: f64,
    /// Choose among the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Choose among the likeliest tokens that together have this probability.
    pub top_p: f64,
    /// Seed of the choice.
    pub seed: u64,
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self { prompts: vec!["The".into()], max_tokens: 96, temperature: 0.8, top_k: 0, top_p: 0.95, seed: 0 }
    }
}

impl Recipe {
    /// The recipe of `source`.
    ///
    /// # Errors
    /// [`Usage`] with file, line and, for an unknown key, a suggestion.
    pub fn load(source: &Source) -> Result<Self> {
        let mut recipe: Self = source.parse()?;
        // The parent of a bare file name is the empty path, which no call takes for the current directory.
        let path = source.path();
        let beside = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_path_buf();
        let base = recipe.base_dir.take().map_or(beside.clone(), |dir| beside.join(dir));
        recipe.base_dir = Some(std::path::absolute(&base).with_context(|| base.display().to_string())?);
        let tokenizer = recipe.tokenize.as_mut().and_then(|t| t.tokenizer.path.as_mut());
        if let (Some(path), Some(base)) = (tokenizer, &recipe.base_dir) {
            *path = base.join(&path);
        }
        recipe.check().map_err(|(key, reason)| source.refuse_key(key, &reason))?;
        if let Some(train) = &mut recipe.train {
            train.schedule = train.schedule.resolved(train.steps);
        }
        Ok(recipe)
    }

    /// What no single table can see: the key to change, and why.
    fn check(&self) -> Result<(), (&'static str, String)> {
        check_name(&self.name).map_err(|reason| ("name", reason))?;
        if let (Some(tokenize), Some(train)) = (&self.tokenize, &self.train) {
            let (ids, places) = (tokenize.tokenizer.rounded_vocab_size() as usize, train.model.vocab_size);
            if tokenize.tokenizer.path.is_none() && (1..ids).contains(&places) {
                return Err(("train.model.vocab_size", format!("{places} is less than the tokenizer's {ids} ids")));
            }
        }
        if let Some(sample) = &self.sample {
            if !(sample.temperature >= 0.0 && sample.temperature.is_finite()) {
                return Err(("sample.temperature", format!("{} is not 0 or positive", sample.temperature)));
            }
            if !(sample.top_p > 0.0 && sample.top_p <= 1.0) {
                return Err(("sample.top_p", format!("{} is not above 0 and at most 1", sample.top_p)));
            }
        }
        if self.filter.is_some() && self.signals.is_none() {
            return Err(("filter", "it decides on signals: add a [signals] table (it may be empty)".into()));
        }
        if self.train.is_some() && self.tokenize.is_none() {
            return Err(("train", "it reads token shards: add a [tokenize] table (it may be empty)".into()));
        }
        if self.sample.is_some() && self.train.is_none() {
            return Err(("sample", "it needs a model: add a [train] table".into()));
        }
        Ok(())
    }

    /// Directory that input paths are relative to.
    pub fn base_dir(&self) -> &Path {
        self.base_dir.as_deref().unwrap_or(Path::new(""))
    }

    /// The recipe with every default written out.
    pub fn resolved(&self) -> Result<String> {
        Ok(toml::to_string(self)?)
    }
}

/// Whether a run may be called so: its directory is.
///
/// # Errors
/// What cannot be in the name.
pub fn check_name(name: &str) -> Result<(), String> {
    if let Some(wrong) = name.chars().find(|c| !(c.is_alphanumeric() || "-_.".contains(*c))) {
        return Err(format!("{wrong:?} cannot be in the name of a directory"));
    }
    match name.trim_matches('.').is_empty() {
        true => Err(format!("{name:?} cannot be the name of a directory")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "name = \"a\"\n[[ingest.inputs]]\nsource = \"s\"\npaths = [\"x.jsonl\"]\n[train]\nsteps = 5\n";

    fn load(text: &str, set: &[&str]) -> Result<Recipe> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.toml");
        std::fs::write(&path, text).unwrap();
        Recipe::load(&Source::read(&path, &set.iter().map(|s| s.to_string()).collect::<Vec<_>>())?)
    }

    #[test]
    fn an_unknown_key_is_refused_with_line_and_suggestion() {
        let error = load(&format!("{SMALL}checkpoint_every_step = 3\n[tokenize]\n"), &[]).unwrap_err().to_string();
        assert!(error.contains("line 7"), "{error}");
        assert!(error.contains("did you mean `checkpoint_every_steps`?"), "{error}");
    }

    #[test]
    fn a_wrong_type_is_refused_with_line() {
        let error = load(&SMALL.replace("steps = 5", "steps = \"five\""), &[]).unwrap_err().to_string();
        assert!(error.contains("line 6") && error.contains("five"), "{error}");
    }

    #[test]
    fn with_overrides_the_quoted_line_is_the_file_s_and_a_wrong_override_is_named() {
        let wrong = format!("{SMALL}checkpoint_every_step = 3\n[tokenize]\n");
        let error = load(&wrong, &["exact.keep=longest", "seed=3"]).unwrap_err().to_string();
        assert!(error.contains("line 7") && error.contains("7 | checkpoint_every_step = 3"), "{error}");
        let error = load(SMALL, &["seed=3", "train.steps=many", "name=b"]).unwrap_err().to_string();
        assert!(error.contains("--set train.steps=many: invalid type") && !error.contains("line"), "{error}");
        let error = load(SMALL, &["train.step=3"]).unwrap_err().to_string();
        assert!(
            error.contains("--set train.step=3: unknown field") && error.contains("did you mean `steps`?"),
            "{error}"
        );
    }

    #[test]
    fn overrides_reach_tables_arrays_and_missing_tables() {
        let recipe = load(
            SMALL,
            &["train.steps=7", "ingest.inputs.0.source=other", "tokenize.tokenizer.vocab_size=512", "seed = 9"],
        )
        .unwrap();
        assert_eq!(recipe.train.unwrap().steps, 7);
        assert_eq!(recipe.ingest.inputs[0].source, "other");
        assert_eq!(recipe.tokenize.unwrap().tokenizer.vocab_size, 512);
        assert_eq!(recipe.seed, 9);
        assert!(load(SMALL, &["train"]).is_err());
        assert!(load(SMALL, &["name.x=1"]).is_err());
    }

    #[test]
    fn tables_that_need_each_other_say_so() {
        let error = load(SMALL, &[]).unwrap_err().to_string();
        assert!(error.contains("line 5: train: ") && error.contains("add a [tokenize] table"), "{error}");
    }

    #[test]
    fn the_resolved_recipe_is_a_recipe_that_says_the_same() {
        let recipe = load(SMALL, &["tokenize.tokenizer.vocab_size=512", "exact.keep=\"longest\""]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolved.toml");
        std::fs::write(&path, recipe.resolved().unwrap()).unwrap();
        assert_eq!(Recipe::load(&Source::read(&path, &[]).unwrap()).unwrap(), recipe);
        assert!(recipe.resolved().unwrap().contains("warmup_steps = 0"));
    }
}
