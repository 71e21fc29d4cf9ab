//! `fulgurite classifier`

use anyhow::{Context, Result};
use pipeline::classify::{Example, TrainSettings, train};
use pipeline::ingest::{FieldMapping, InputConfig, InputFormat, for_each_text};

use crate::cli::{Classifier, ClassifierTrain};
use crate::commands::run::runtime;
use crate::exit::Usage;
use crate::output;

/// Do what is asked of classifiers.
pub fn classifier(what: &Classifier) -> Result<()> {
    match what {
        Classifier::Train(args) => train_one(args),
    }
}

fn train_one(args: &ClassifierTrain) -> Result<()> {
    let settings = TrainSettings {
        bits: args.bits,
        ngrams: args.ngrams,
        epochs: args.epochs,
        seed: args.seed,
        ..TrainSettings::default()
    };
    if !(1..=28).contains(&settings.bits) || !(1..=5).contains(&settings.ngrams) {
        return Err(Usage("--bits is from 1 to 28, --ngrams from 1 to 5".into()).into());
    }
    let mut examples = Vec::new();
    for (paths, positive) in [(&args.positive, true), (&args.negative, false)] {
        let input = InputConfig {
            source: if positive { "positive" } else { "negative" }.into(),
            paths: paths.clone(),
            format: InputFormat::Auto,
            fields: FieldMapping { text: args.field.clone(), ..FieldMapping::default() },
        };
        let here = std::env::current_dir().context("the current directory")?;
        let read = for_each_text(&input, &here, |text| examples.extend(Example::new(text, positive, &settings)));
        let skipped = runtime(None)?.block_on(read)?;
        if skipped > 0 {
            output::note(format!("{skipped} records of the {} examples hold no text", input.source));
        }
    }
    let (model, report) = train(&examples, &settings).map_err(Usage)?;
    model.save(&args.output)?;
    if args.json {
        return output::json(&report);
    }
    output::line(format!(
        "{} examples, {} held out: accuracy {:.4}, AUC {:.4}, calibration error {:.4} (before calibration {:.4})",
        report.trained + report.held_out,
        report.held_out,
        report.accuracy,
        report.auc,
        report.calibration_error,
        report.uncalibrated_error
    ))?;
    output::note(format!(
        "written to {0}; use it in a recipe:\n  [[signals.classifiers]]\n  name = \"quality\"\n  model = {0:?}",
        args.output.display().to_string()
    ));
    Ok(())
}
