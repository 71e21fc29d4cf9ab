//! From a recipe to the list of stages: the one place that knows how the libraries fit together.

use std::path::Path;
use std::sync::Arc;

use dedup::{Action, DecontaminateStage, Places};
use pipeline::stages::clean::CleanStage;
use pipeline::stages::curate::CurateStage;
use pipeline::stages::filter::FilterStage;
use pipeline::stages::ingest::IngestStage;
use pipeline::stages::mix;
use pipeline::stages::signals::SignalsStage;
use pipeline::stages::urls::UrlsStage;
use pipeline::{Result, Stage};
use train::TrainStage;
use train::device::DeviceChoice;

use crate::recipe::Recipe;

/// The stages of a recipe, in order, for a run in `run_dir`, the model on `device`.
pub fn stages(recipe: &Recipe, run_dir: &Path, device: DeviceChoice) -> Result<Vec<Arc<dyn Stage>>> {
    let places = Places { base: recipe.base_dir(), run_dir: Some(run_dir) };
    let mut stages: Vec<Arc<dyn Stage>> = Vec::new();
    stages.push(Arc::new(IngestStage::new(recipe.ingest.clone(), recipe.base_dir().to_path_buf())?));
    let mut documents = "ingest".to_string();
    // The last stage whose shards say which documents are still in.
    let mut selection: Option<String> = None;
    if let Some(config) = &recipe.urls {
        stages.push(Arc::new(UrlsStage::new(documents.clone(), config, recipe.base_dir())?));
        selection = Some(UrlsStage::NAME.into());
    }
    if let Some(config) = &recipe.clean {
        stages.push(Arc::new(CleanStage::new(config.clone(), documents.clone(), selection.take())?));
        documents = "clean".into();
    }
    if let Some(config) = &recipe.signals {
        stages.push(Arc::new(SignalsStage::new(documents.clone(), selection.clone(), config, recipe.base_dir())?));
    }
    if let (Some(config), Some(signals)) = (&recipe.filter, &recipe.signals) {
        stages.push(Arc::new(FilterStage::new("signals", config, signals)?));
        selection = Some("filter".into());
    }
    let signals = recipe.signals.as_ref().map(|_| "signals");
    // Where languages are identified, these are the documents' languages from here on.
    let languages = signals.filter(|_| recipe.signals.as_ref().is_some_and(|config| config.language.is_some()));
    if let Some(config) = &recipe.exact {
        stages.extend(dedup::exact_stages(config, &documents, selection.as_deref(), signals, places)?);
        selection = Some("exact".into());
    }
    if let Some(config) = &recipe.near {
        stages.extend(dedup::near_stages(config, &documents, selection.as_deref(), signals, places)?);
        selection = Some("near".into());
    }
    if let Some(config) = &recipe.lines {
        stages.extend(dedup::line_stages(config, &documents, selection.as_deref())?);
        (documents, selection) = (dedup::LINES.into(), None);
    }
    if let Some(config) = &recipe.substring {
        stages.extend(dedup::substring_stages(config, &documents, selection.as_deref())?);
        (documents, selection) = (dedup::SUBSTRING.into(), None);
    }
    if let Some(config) = &recipe.decontaminate {
        let stage = DecontaminateStage::new(config.clone(), &documents, selection.as_deref(), recipe.base_dir())?;
        stages.push(Arc::new(stage));
        match config.action {
            Action::Drop => selection = Some(DecontaminateStage::NAME.into()),
            Action::Mask => (documents, selection) = (DecontaminateStage::NAME.into(), None),
        }
    }
    let sources: Vec<String> = recipe.ingest.inputs.iter().map(|input| input.source.clone()).collect();
    check_sources(recipe, &sources)?;
    if let Some(config) = &recipe.mix {
        stages.extend(mix::mix_stages(config, &documents, selection.as_deref(), languages, &sources)?);
        selection = Some(mix::NAME.into());
    }
    stages.push(Arc::new(CurateStage::new(documents, selection).with_languages(languages.map(String::from))));
    if let Some(config) = &recipe.tokenize {
        stages.extend(tokenize::token_stages(config, "curate", recipe.seed));
    }
    if let Some(config) = &recipe.train {
        let stage = TrainStage::new(config.clone(), device).map_err(|e| match e {
            train::Error::Config { key, reason } => pipeline::Error::setting(format!("train.{key}"), reason),
            other => pipeline::Error::abort(other),
        })?;
        stages.push(Arc::new(stage));
    }
    Ok(stages)
}

/// Refuse shares of sources that no input has: better said now than by the tokenizer or the trainer, which come last.
fn check_sources(recipe: &Recipe, sources: &[String]) -> Result<()> {
    let weights = recipe
        .tokenize
        .iter()
        .map(|tokenize| ("tokenize.tokenizer.source_weights", &tokenize.tokenizer.source_weights));
    let data = recipe.train.iter().map(|train| &train.data);
    let data = data.flat_map(|data| [("train.data.weights", &data.weights), ("train.data.epochs", &data.epochs)]);
    for (key, shares) in weights.chain(data) {
        if let Some(name) = shares.keys().find(|name| !sources.contains(name)) {
            let reason = tokenize::Error::unknown_source(name, sources.iter().map(String::as_str));
            return Err(pipeline::Error::setting(key, reason));
        }
    }
    Ok(())
}
