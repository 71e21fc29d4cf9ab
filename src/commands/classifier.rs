//! `fulgurite classifier`

use anyhow::{Context, Result};
use pipeline::classify::{Examples, TrainSettings, train};
use pipeline::ingest::{FieldMapping, InputConfig, InputFormat, for_each_text};

use crate::cli::{Classifier, ClassifierTrain};
use crate::commands::run::runtime;
use crate::exit::Usage;
use crate::output::{self, thousands};

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
    if args.max_examples == 0 {
        return Err(Usage("--max-examples 0 leaves nothing to train on".into()).into());
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
        let mut kind = Examples::new(positive, args.max_examples, settings);
        let skipped = runtime(None)?.block_on(for_each_text(&input, &here, |text| kind.add(text)))?;
        if skipped > 0 {
            output::note(format!("{} records of the {} examples hold no text", thousands(skipped), input.source));
        }
        if kind.texts() > args.max_examples as u64 {
            output::note(format!(
                "{} of {} {} examples are used, chosen by hash (--max-examples)",
                thousands(kind.len() as u64),
                thousands(kind.texts()),
                input.source
            ));
        }
        examples.extend(kind.finish());
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
