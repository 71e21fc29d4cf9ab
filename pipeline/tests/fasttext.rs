//! Models that fastText wrote, with the predictions of fastText itself.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use pipeline::classify::{Classifier, ClassifierScratch, FastText, FastTextScratch};
use pipeline::language::{Identifier, LanguageConfig};
use serde::Deserialize;

#[derive(Deserialize)]
struct Prediction {
    text: String,
    labels: BTreeMap<String, f32>,
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/fasttext").join(name)
}

#[test]
fn every_kind_of_model_predicts_as_fasttext_does() {
    let all = fs::read_to_string(fixture("predictions.json")).unwrap();
    let all: BTreeMap<String, Vec<Prediction>> = serde_json::from_str(&all).unwrap();
    assert_eq!(all.len(), 4);
    for (name, predictions) in all {
        let model = FastText::load(&fixture(&name)).unwrap();
        let mut scratch = FastTextScratch::default();
        for Prediction { text, labels } in predictions {
            let found = model.probabilities(&text, &mut scratch).unwrap_or_default().to_vec();
            assert_eq!(found.len(), 4, "{name}: {text:?}");
            for (label, probability) in model.labels().iter().zip(&found) {
                // fastText leaves out what hierarchical softmax finds next to impossible.
                let expected = labels.get(label).copied().unwrap_or_default();
                assert!(
                    (probability - expected).abs() < 2e-5,
                    "{name}: {label} {probability}, {expected} for {text:?}"
                );
            }
            let (best, _) = model.best(&text, &mut scratch).unwrap();
            let likeliest = labels.values().copied().fold(0.0, f32::max);
            assert!((labels[&model.labels()[best]] - likeliest).abs() < 1e-5);
        }
    }
}

#[test]
fn a_model_is_a_classifier_and_an_identifier() {
    let path = fixture("softmax.bin");
    let scratch = &mut ClassifierScratch::default();
    let dutch = "een ieder heeft recht op vrijheid en op onschendbaarheid van zijn persoon";
    let probability = |label: &str| Classifier::load(&path, Some(label)).unwrap().probability(dutch, scratch).unwrap();
    let of: Vec<f64> = ["nl", "__label__et"].map(probability).into();
    assert!(of[0] > 0.5 && of[1] < 0.5, "{of:?}");
    let error = Classifier::load(&path, Some("xx")).err().unwrap().to_string();
    assert!(error.contains("softmax.bin") && error.contains("no label \"xx\"") && error.contains("nl"), "{error}");
    assert!(Classifier::load(&path, None).err().unwrap().to_string().contains("needs a `label`"));

    let config = LanguageConfig { model: Some("softmax.bin".into()), paragraphs: false };
    let identifier = Identifier::load(&config, &fixture("")).unwrap();
    let found = identifier.document(dutch, false, &mut FastTextScratch::default());
    assert_eq!(found.language.as_deref(), Some("nl"));
    assert_eq!(identifier.document("12 34", false, &mut FastTextScratch::default()).language, None);
}

#[test]
fn a_cut_or_damaged_file_is_refused_and_never_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.bin");
    for name in ["softmax.bin", "quantised.ftz"] {
        let whole = fs::read(fixture(name)).unwrap();
        for cut in (0..whole.len()).step_by(whole.len() / 60) {
            fs::write(&path, &whole[..cut]).unwrap();
            let error = FastText::load(&path).err().unwrap().to_string();
            assert!(error.contains("model.bin"), "{error}");
        }
        // Any byte of the head and of the sizes may be wrong: an error or a model, no panic and no huge allocation.
        for at in (0..400).chain((400..whole.len()).step_by(97)) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0xff;
            fs::write(&path, &bytes).unwrap();
            if let Ok(model) = FastText::load(&path) {
                model.best("een ieder heeft recht", &mut FastTextScratch::default());
            }
        }
    }
}
