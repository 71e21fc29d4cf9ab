//! Training is deterministic, and what cannot work is refused.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use tokenize::train::Trainer;
use tokenize::{Digits, Encoder, Pattern, TokenizerConfig};
use tokenizers::Tokenizer;

use common::{DECLARATION, SPEECHES};

fn train(config: &TokenizerConfig, texts: &[&str]) -> String {
    let mut trainer = Trainer::new(config).unwrap();
    texts.chunks(7).for_each(|chunk| trainer.feed(chunk));
    trainer.finish(|_| true).unwrap().unwrap().to_string(false).unwrap()
}

fn paragraphs() -> Vec<&'static str> {
    [SPEECHES, DECLARATION].iter().flat_map(|t| t.split(['\u{c}', '\n'])).collect()
}

fn configs() -> Vec<TokenizerConfig> {
    let regex = Pattern::Regex(r"\w+|[^\w\s]+".into());
    let kinds = [
        (Pattern::Gpt2, Digits::Pattern),
        (Pattern::Gpt2, Digits::Individual),
        (Pattern::Cl100k, Digits::Pattern),
        (Pattern::O200k, Digits::Pattern),
        (regex, Digits::Individual),
    ];
    let config = |(pattern, digits)| TokenizerConfig { vocab_size: 1200, pattern, digits, ..Default::default() };
    kinds.into_iter().map(config).collect()
}

#[test]
fn a_training_is_a_function_of_the_documents() {
    let texts = paragraphs();
    let reversed: Vec<&str> = texts.iter().rev().copied().collect();
    for config in configs() {
        let tokenizer = train(&config, &texts);
        assert_eq!(tokenizer, train(&config, &reversed));
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(tokenizer, one_thread.install(|| train(&config, &texts)));
        let tokenizer = Tokenizer::from_bytes(tokenizer).unwrap();
        assert_eq!(tokenizer.get_vocab_size(true), 1280);
        for (id, token) in ["<|pad|>", "<|bos|>", "<|endoftext|>"].into_iter().enumerate() {
            assert_eq!(tokenizer.token_to_id(token), Some(id as u32));
        }
    }
}

#[test]
fn text_too_small_for_the_vocabulary_leaves_reserved_tokens() {
    let config = TokenizerConfig { vocab_size: 600, ..Default::default() };
    let json = train(&config, &["the cat, the hat", "the cat"]);
    let tokenizer = Tokenizer::from_bytes(&json).unwrap();
    assert_eq!(tokenizer.get_vocab_size(true), 640);
    // None of them, nor an id beyond the vocabulary, may ever be written by a model.
    let encoder = Encoder::from_bytes(json.as_bytes(), Path::new("tokenizer.json")).unwrap();
    let textless = encoder.ids_without_text(650);
    let first_reserved = tokenizer.token_to_id("<|reserved_0|>").unwrap();
    assert_eq!(textless, (0..3).chain(first_reserved..650).collect::<Vec<u32>>());
    assert_eq!(
        tokenizer.id_to_token(639).unwrap(),
        format!("<|reserved_{}|>", 639 - tokenizer.token_to_id("<|reserved_0|>").unwrap())
    );
    // " the" and " cat" are seen twice or more, "hat" once.
    assert!(tokenizer.token_to_id("\u{120}cat").is_some());
    assert!(tokenizer.token_to_id("\u{120}hat").is_none());
}

#[test]
fn training_compresses() {
    let json = train(&configs()[0], &paragraphs());
    let encoder = Encoder::from_bytes(json.as_bytes(), Path::new("tokenizer.json")).unwrap();
    let mut ids = Vec::new();
    encoder.encode(SPEECHES, &mut ids).unwrap();
    let bytes_per_token = SPEECHES.len() as f64 / ids.len() as f64;
    assert!(bytes_per_token > 2.5, "{bytes_per_token}");
}

#[test]
fn a_tokenizer_that_cannot_be_used_is_refused() {
    let error = |json: &str| Encoder::from_bytes(json.as_bytes(), Path::new("t.json")).err().unwrap().to_string();
    assert!(error("{").contains("t.json"));
    let dropout = train(&configs()[0], &["a b"]).replace("\"dropout\":null", "\"dropout\":0.1");
    assert!(error(&dropout).contains("dropout"));
}

#[test]
fn configurations_that_cannot_work_are_refused() {
    let error = |config: TokenizerConfig| Trainer::new(&config).err().unwrap().to_string();
    assert!(error(TokenizerConfig { vocab_size: 200, ..Default::default() }).contains("vocab_size"));
    assert!(error(TokenizerConfig { eos_token: "<|eos|>".into(), ..Default::default() }).contains("eos_token"));
    assert!(error(TokenizerConfig { pattern: Pattern::Regex("(".into()), ..Default::default() }).contains("pattern"));
    assert!(error(TokenizerConfig { sample_bytes: 0, ..Default::default() }).contains("sample_bytes"));
    assert!(error(TokenizerConfig { word_bytes: 0, ..Default::default() }).contains("word_bytes"));
}
