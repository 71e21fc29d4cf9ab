//! Encoding is that of the `tokenizers` crate: every kind of tokenizer, ours beside the crate's, over
//! corpora, over texts that are odd, and over texts made at random.
//!
//! The random part is the fuzz target of the encoder. It is driven by proptest, which needs neither a nightly
//! compiler nor libFuzzer; `PROPTEST_CASES=1000000 cargo test -p tokenize --test encoding` runs it for long.
//! `FULGURITE_CORPUS=DIR` adds every `.jsonl.zst` and `.warc.gz` below a directory to the corpora.
#![allow(clippy::print_stderr, clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;
use rayon::prelude::*;
use serde_json::{Value, json};
use tokenize::train::Trainer;
use tokenize::{Digits, Encoder, Pattern, TokenizerConfig};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::{Tokenizer, Trainer as _};

use common::{DECLARATION, SPEECHES, corpora, every, texts};

struct Kind {
    name: &'static str,
    encoder: Encoder,
    reference: Tokenizer,
    /// Spaces come back as they were.
    lossless: bool,
}

fn paragraphs() -> Vec<&'static str> {
    [SPEECHES, DECLARATION].iter().flat_map(|t| t.split(['\u{c}', '\n'])).collect()
}

fn kind(name: &'static str, json: &Value, lossless: bool) -> Kind {
    let json = json.to_string();
    let mut reference = Tokenizer::from_bytes(&json).unwrap();
    reference.set_encode_special_tokens(true);
    let encoder = Encoder::from_bytes(json.as_bytes(), Path::new("tokenizer.json")).unwrap();
    Kind { name, encoder, reference, lossless }
}

fn trained(pattern: Pattern, digits: Digits) -> Value {
    let config = TokenizerConfig { vocab_size: 1200, pattern, digits, ..Default::default() };
    let mut trainer = Trainer::new(&config).unwrap();
    trainer.feed(&paragraphs());
    let json = trainer.finish(|_| true).unwrap().unwrap().to_string(false).unwrap();
    serde_json::from_str(&json).unwrap()
}

/// Llama 2 and its like: a mark for the space, bytes for unknown characters.
fn with_marks(normalizer: Value, pre_tokenizer: Value, words: fn(&str) -> Vec<String>) -> Value {
    let mut trainer = BpeTrainer::builder().vocab_size(900).show_progress(false).build();
    trainer.feed(paragraphs().into_iter(), |text| Ok(words(&text.replace(' ', "▁")))).unwrap();
    let mut model = BPE::default();
    trainer.train(&mut model).unwrap();
    let model: Value = serde_json::from_str(&serde_json::to_string(&model).unwrap()).unwrap();
    let mut vocabulary = serde_json::Map::new();
    let first = ["<unk>", "<s>", "</s>"].map(String::from).into_iter();
    let bytes = (0..256).map(|byte| format!("<{byte:#04X}>"));
    let mut learnt: Vec<(String, u64)> =
        model["vocab"].as_object().unwrap().iter().map(|(token, id)| (token.clone(), id.as_u64().unwrap())).collect();
    learnt.sort_by_key(|(_, id)| *id);
    for token in first.chain(bytes).chain(learnt.into_iter().map(|(token, _)| token)) {
        let id = vocabulary.len();
        vocabulary.entry(token).or_insert(id.into());
    }
    let added = ["<unk>", "<s>", "</s>"].iter().enumerate().map(|(id, content)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "post_processor": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary, "merges": model["merges"]},
    })
}

/// Add tokens that are not special, to be found in the normalized text or before.
fn add(json: &mut Value, tokens: &[(&str, bool)]) {
    for (content, normalized) in tokens {
        let id = json["model"]["vocab"].as_object().unwrap().len() + json["added_tokens"].as_array().unwrap().len();
        json["added_tokens"].as_array_mut().unwrap().push(json!({"id": id, "content": content, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": normalized, "special": false}));
    }
}

/// Words begin with their mark.
fn marked_words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    for c in format!("▁{text}").chars() {
        if c == '▁' && words.last().is_some_and(|word| !word.ends_with('▁')) {
            words.push(String::new());
        }
        words.last_mut().unwrap().push(c);
    }
    words.retain(|word| !word.is_empty());
    words
}

/// Three words at a time, so that merges reach over the marks between them.
fn three_words(text: &str) -> Vec<String> {
    text.split('▁').collect::<Vec<_>>().chunks(3).map(|words| words.join("▁")).collect()
}

static KINDS: LazyLock<Vec<Kind>> = LazyLock::new(|| {
    let changed = |pattern, change: fn(&mut Value)| {
        let mut json = trained(pattern, Digits::Pattern);
        change(&mut json);
        json
    };
    let prepend = json!({"type": "Prepend", "prepend": "▁"});
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let llama = json!({"type": "Sequence", "normalizers": [prepend, replace]});
    let metaspace =
        |scheme, split| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
    vec![
        kind("gpt2", &trained(Pattern::Gpt2, Digits::Pattern), true),
        kind("gpt2, digits one by one", &trained(Pattern::Gpt2, Digits::Individual), true),
        kind("cl100k", &trained(Pattern::Cl100k, Digits::Pattern), true),
        kind("o200k", &trained(Pattern::O200k, Digits::Pattern), true),
        kind("o200k, digits one by one", &trained(Pattern::O200k, Digits::Individual), true),
        kind("a pattern of one's own", &trained(Pattern::Regex(r"\w+|[^\w\s]+".into()), Digits::Individual), true),
        kind(
            "a pattern with a look-ahead",
            &trained(Pattern::Regex(r"[a-z]+(?=[A-Z])|\p{L}+".into()), Digits::Pattern),
            true,
        ),
        // As Llama 3: a piece that is a token is that token, whatever merges there are for it.
        kind(
            "tokens before merges",
            &changed(Pattern::Cl100k, |json| {
                json["model"]["ignore_merges"] = true.into();
                let merges = json["model"]["merges"].as_array_mut().unwrap();
                let mut number = 0;
                merges.retain(|_| {
                    number += 1;
                    number % 5 != 0
                });
            }),
            true,
        ),
        // Ranks that no training would give.
        kind(
            "merges in another order",
            &changed(Pattern::Gpt2, |json| json["model"]["merges"].as_array_mut().unwrap().reverse()),
            true,
        ),
        // As Qwen 2: NFC, and tokens that are not special.
        kind(
            "qwen 2",
            &changed(Pattern::Cl100k, |json| {
                let split = &mut json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"];
                *split = split.as_str().unwrap().replace("{1,3}", "").into();
                json["normalizer"] = json!({"type": "NFC"});
                add(json, &[("<tool_call>", false), ("</tool_call>", false), ("<|end", false)]);
            }),
            false,
        ),
        // As GPT-NeoX: runs of spaces are tokens.
        kind("runs of spaces", &changed(Pattern::Gpt2, |json| add(json, &[("    ", true), ("  ", true)])), true),
        kind(
            "both",
            &changed(Pattern::O200k, |json| add(json, &[("<|", true), ("e\u{301}", false), ("<", false)])),
            true,
        ),
        kind("a normalizer", &changed(Pattern::Gpt2, |json| json["normalizer"] = json!({"type": "NFKC"})), false),
        kind(
            "a space in front",
            &changed(Pattern::Gpt2, |json| json["pre_tokenizer"]["add_prefix_space"] = true.into()),
            false,
        ),
        kind("llama 2", &with_marks(llama.clone(), Value::Null, marked_words), true),
        kind("llama 2, merges across words", &with_marks(llama, Value::Null, three_words), true),
        kind("spaces to marks alone", &with_marks(replace, Value::Null, marked_words), false),
        kind("metaspace", &with_marks(Value::Null, metaspace("always", true), marked_words), false),
        kind("metaspace, uncut", &with_marks(Value::Null, metaspace("first", false), marked_words), false),
        kind("metaspace, none in front", &with_marks(Value::Null, metaspace("never", true), marked_words), false),
    ]
});

/// Ours and theirs, and back.
fn check(text: &str) {
    for Kind { name, encoder, reference, lossless } in KINDS.iter() {
        let mut ids = Vec::new();
        encoder.encode(text, &mut ids).unwrap();
        let expected = reference.encode_fast(text, false).unwrap();
        if ids != expected.get_ids() {
            let at = ids.iter().zip(expected.get_ids()).take_while(|(a, b)| a == b).count();
            panic!("{name}: {} ids, {} expected, from {at} on others: {text:?}", ids.len(), expected.get_ids().len());
        }
        if *lossless {
            // A mark in the text is a space to those that write spaces as marks, which put one in front.
            let marks = name.starts_with("llama");
            let expected = if marks { text.replace('▁', " ") } else { text.into() };
            assert_eq!(encoder.decode(&ids).unwrap(), expected, "{name}");
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| encoder.token_bytes(id).unwrap()).collect();
            let front = if marks && !text.is_empty() { " " } else { "" };
            assert!(bytes == format!("{front}{expected}").into_bytes(), "{name}: {text:?}");
        }
    }
}

#[test]
fn all_kinds_but_two_are_encoded_here() {
    for kind in KINDS.iter() {
        let left_to_tokenizers = ["a normalizer", "a space in front"].contains(&kind.name);
        assert_eq!(kind.encoder.is_fast(), !left_to_tokenizers, "{}", kind.name);
    }
}

#[test]
fn ids_are_those_of_tokenizers_on_real_text() {
    check(SPEECHES);
    check(DECLARATION);
    check(include_str!("../src/bpe.rs"));
}

#[test]
fn ids_are_those_of_tokenizers_on_odd_text() {
    let blanks = " ".repeat(5000);
    let odd = [
        "",
        " ",
        "   ",
        "\n\n \t",
        "a",
        " a",
        "a ",
        "é",
        "e\u{301}",
        "\u{0}",
        "\u{feff}x",
        "<|endoftext|>",
        "x<|pad|>y <|reserved_0|>",
        "<s>a</s> <unk> <0x41>",
        "1234567890 ½ Ⅷ ٣",
        "don't DON'T 'll 'ſ",
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "\r\n\r\n",
        "ﬁ ﷺ",
        "ab\u{85}cd\u{2028}ef",
        "▁a▁▁b ▁ c",
        "a <tool_call>{}</tool_call>\n<|end<|endoftext|><|end|>    x      y  z",
        "cafe\u{301} <too\u{301}l_call> \u{1100}\u{1161}\u{11a8} \u{212b}ngstr\u{f6}m \u{915}\u{93c} \u{344}",
        &blanks,
    ];
    odd.into_iter().for_each(check);
    check(&format!("x{}y", "=".repeat(3000)));
    check(&"the people of the United States ".repeat(300).replace(' ', ""));
    check(&DECLARATION.replace(char::is_whitespace, ""));
}

#[test]
fn very_long_runs_are_no_exception() {
    // Around what a backtracking engine can hold, for the scanners alone: 17 kinds would take minutes.
    let kinds = ["gpt2", "cl100k", "o200k"];
    for text in [" ".repeat(1 << 20), format!("{}x", "\t".repeat(150_000)), "a".repeat(1 << 20), "\n".repeat(200_000)] {
        for Kind { encoder, reference, .. } in KINDS.iter().filter(|kind| kinds.contains(&kind.name)) {
            let mut ids = Vec::new();
            encoder.encode(&text, &mut ids).unwrap();
            assert!(ids == reference.encode_fast(text.as_str(), false).unwrap().get_ids());
        }
    }
}

#[test]
fn special_tokens_in_text_are_text() {
    for Kind { encoder, .. } in KINDS.iter() {
        for special in ["<|endoftext|>", "</s>"] {
            let Ok(id) = encoder.token_id(special) else { continue };
            let mut ids = Vec::new();
            encoder.encode(&format!("before{special}after"), &mut ids).unwrap();
            assert!(!ids.contains(&id));
        }
    }
}

#[test]
fn many_threads_share_an_encoder() {
    let Kind { encoder, reference, .. } = &KINDS[2];
    let texts: Vec<&str> = paragraphs();
    std::thread::scope(|scope| {
        for part in 0..4 {
            let texts = &texts;
            scope.spawn(move || {
                for text in texts.iter().skip(part) {
                    let mut ids = Vec::new();
                    encoder.encode(text, &mut ids).unwrap();
                    assert_eq!(ids, reference.encode_fast(*text, false).unwrap().get_ids());
                }
            });
        }
    });
}

#[test]
fn ids_are_those_of_tokenizers_over_corpora() {
    // Of every file a document in so many, so that a large corpus takes minutes.
    let every = every();
    let (mut documents, mut bytes) = (0, 0);
    for path in corpora() {
        for texts in chunks(texts(&path).step_by(every)) {
            documents += texts.len();
            bytes += texts.iter().map(String::len).sum::<usize>();
            texts.par_iter().for_each(|text| check(text));
        }
    }
    eprintln!("all kinds of tokenizers: {documents} documents, {bytes} bytes");
    assert!(documents > 0);
}

/// Texts some hundred at a time.
fn chunks(mut texts: impl Iterator<Item = String>) -> impl Iterator<Item = Vec<String>> {
    std::iter::from_fn(move || Some(texts.by_ref().take(256).collect::<Vec<_>>()).filter(|texts| !texts.is_empty()))
}

#[test]
fn ids_of_large_vocabularies_are_those_of_tokenizers_over_all_of_the_corpora() {
    // A vocabulary of the size that is used, learnt from the corpora: its merges are deep.
    let paths = corpora();
    let mut sample: Vec<String> = Vec::new();
    for path in &paths {
        let mut left = (24 << 20) / paths.len();
        sample.extend(texts(path).take_while(|text| {
            let before = left;
            left = left.saturating_sub(text.len());
            before > 0
        }));
    }
    let kinds: Vec<Kind> = [("gpt2", Pattern::Gpt2), ("cl100k", Pattern::Cl100k), ("o200k", Pattern::O200k)]
        .into_iter()
        .map(|(name, pattern)| {
            let config = TokenizerConfig { vocab_size: 32_000, pattern, ..Default::default() };
            let mut trainer = Trainer::new(&config).unwrap();
            trainer.feed(&sample.iter().map(String::as_str).collect::<Vec<_>>());
            let json = trainer.finish(|_| true).unwrap().unwrap().to_string(false).unwrap();
            kind(name, &serde_json::from_str(&json).unwrap(), true)
        })
        .collect();
    drop(sample);
    // All of a corpus, by the directory of its files.
    let mut seen = std::collections::BTreeMap::<String, [usize; 3]>::new();
    for path in &paths {
        let name = path.parent().and_then(Path::file_name).unwrap().to_string_lossy().into_owned();
        let seen = seen.entry(name).or_default();
        for texts in chunks(texts(path)) {
            let tokens = texts.par_iter().map(|text| {
                let of = |kind: &Kind| {
                    let mut ids = Vec::new();
                    kind.encoder.encode(text, &mut ids).unwrap();
                    let expected = kind.reference.encode_fast(text.as_str(), false).unwrap();
                    assert!(ids == expected.get_ids(), "{} in {}: {text:?}", kind.name, path.display());
                    assert!(
                        kind.encoder.decode(&ids).unwrap() == *text,
                        "{} in {}: {text:?}",
                        kind.name,
                        path.display()
                    );
                    ids.len()
                };
                kinds.iter().map(of).sum::<usize>()
            });
            seen[0] += texts.len();
            seen[1] += texts.iter().map(String::len).sum::<usize>();
            seen[2] += tokens.sum::<usize>();
        }
    }
    for (name, [documents, bytes, tokens]) in seen {
        eprintln!("{name}: {documents} documents, {bytes} bytes, {tokens} tokens of three tokenizers");
        assert!(tokens > 0 || documents == 0);
    }
}

/// A stretch of real text with some of its bytes changed.
fn damaged() -> impl Strategy<Value = String> {
    let texts: Vec<&str> = vec![SPEECHES, DECLARATION, include_str!("../src/split.rs")];
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12);
    (prop::sample::select(texts), any::<prop::sample::Index>(), 0usize..400, changes).prop_map(
        |(text, from, length, changes)| {
            let from = from.index(text.len());
            let mut bytes = text.as_bytes()[from..(from + length).min(text.len())].to_vec();
            for (at, byte) in changes {
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    bytes[at] = byte;
                }
            }
            String::from_utf8_lossy(&bytes).into_owned()
        },
    )
}

proptest! {
    #[test]
    fn ids_are_those_of_tokenizers_on_any_text(text in any::<String>()) {
        check(&text);
    }

    #[test]
    fn ids_are_those_of_tokenizers_on_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        check(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn ids_are_those_of_tokenizers_on_text_like_text(
        text in "([a-zA-Z' ]{0,8}|[0-9.,]{0,4}|[ \n\t\r▁]{0,3}|[а-яé中文👍]{0,3}|e?[\u{301}\u{323}\u{327}]{0,3}|    ?|<\\|end(oftext\\|>)?|</?tool_call>|</s>){0,40}"
    ) {
        check(&text);
    }

    #[test]
    fn ids_are_those_of_tokenizers_on_damaged_text(text in damaged()) {
        check(&text);
    }
}
