//! Words and signatures against those of datatrove itself.
//!
//! `fixtures/datatrove_signatures.json` was written by datatrove 0.10.1 with its default
//! `MinhashConfig` and `TextNormConfig` (Python 3.11, numpy 2.4.6, spaCy 3.8.18, xxhash 4.1.0): for each
//! text the tokens of `word_tokenize(simplify_text(text))` and the 112 minima of
//! `get_signature(get_shingles(text))`, none where a text has fewer words than a shingle.
#![allow(clippy::unwrap_used)]

use dedup::minhash::{MinHash, Mode, Scratch, Signature};
use dedup::words::Words;
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    text: String,
    words: Vec<String>,
    signature: Vec<u64>,
}

fn cases() -> Vec<Case> {
    serde_json::from_str(include_str!("fixtures/datatrove_signatures.json")).unwrap()
}

#[test]
fn words_are_those_of_datatrove() {
    let mut words = Words::default();
    for case in cases() {
        words.set(&case.text);
        let found: Vec<&str> = words.runs(1).map(|word| str::from_utf8(word).unwrap()).collect();
        assert_eq!(found, case.words, "{}", case.text);
        assert_eq!(words.runs(words.len()).collect::<Vec<_>>(), [case.words.join(" ").as_bytes()]);
    }
}

#[test]
fn signatures_are_those_of_datatrove() {
    let minhash = MinHash::new(Mode::Compatible, 5, 14, 8, 1);
    let mut scratch = Scratch::default();
    let mut compared = 0;
    for case in cases() {
        let signature = minhash.signature(&case.text, &mut scratch).unwrap();
        if case.words.len() < 5 {
            assert!(case.signature.is_empty(), "datatrove gives short texts none");
            continue;
        }
        assert_eq!(signature, Signature::Compatible(&case.signature), "{}", case.text);
        compared += 1;
    }
    assert!(compared >= 8);
}
