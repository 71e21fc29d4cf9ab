//! Training runs that are stopped, killed and damaged continue as if nothing had happened.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::Device;
use serde_json::{Value, json};
use train::config::{ModelConfig, TrainConfig};
use train::parallel::Alone;
use train::rng::Rng;
use train::run::{BatchSource, CHECKPOINTS, METRICS, Metrics, Outcome, Run, train};
use train::{Batch, Error, checkpoint, published};

const VOCABULARY: u64 = 60;

/// Documents in which each token follows from the one before, of random lengths.
struct Documents {
    rows: usize,
    length: usize,
    /// The step whose batch cannot be made: what a kill looks like from outside.
    fails_at: Option<u64>,
    next: u64,
}

impl BatchSource for Documents {
    fn batch(&mut self, step: u64) -> Result<Batch, Error> {
        if self.fails_at == Some(step) {
            let reason = "the power went out".to_owned();
            return Err(Error::Batch { step, reason });
        }
        self.next = step + 1;
        let mut rng = Rng::new(9, step);
        let (mut tokens, mut starts) = (Vec::new(), Vec::new());
        for _ in 0..self.rows {
            let mut row_starts = Vec::new();
            let mut token = 0;
            for t in 0..=self.length {
                let starts_here = rng.uniform() < 0.05;
                if t == 0 || starts_here {
                    row_starts.push(t as u32);
                    token = rng.next_u64() % VOCABULARY;
                }
                tokens.push(token as u32);
                token = (token * 7 + 3) % VOCABULARY;
            }
            starts.push(row_starts);
        }
        Ok(Batch { tokens, starts, length: self.length })
    }

    fn state(&self) -> Value {
        json!({ "next": self.next })
    }

    fn resume(&mut self, state: &Value, step: u64) -> Result<(), Error> {
        assert_eq!(state, &json!({ "next": step }));
        Ok(())
    }
}

fn config() -> TrainConfig {
    let mut config: TrainConfig = TrainConfig {
        sequence_length: 70,
        batch: 2,
        gradient_accumulation: 2,
        steps: 12,
        log_every_steps: 1,
        checkpoint_every_steps: 3,
        model: ModelConfig {
            vocab_size: VOCABULARY as usize,
            decoder_embed_dim: 32,
            decoder_layers: 2,
            decoder_attention_heads: 2,
            hidden_dim: 32,
            glu_dim: 48,
            linear_use_lrpe_list: vec![1, 0],
            ..ModelConfig::default()
        },
        ..TrainConfig::default()
    };
    config.schedule = serde_json::from_value(json!({"kind": "cosine", "warmup_steps": 2})).unwrap();
    config.optimizer.peak_learning_rate = 0.01;
    config
}

fn documents(config: &TrainConfig, fails_at: Option<u64>) -> Documents {
    Documents { rows: config.batch * config.gradient_accumulation, length: config.sequence_length, fails_at, next: 0 }
}

/// Runs until the end, the failure, or the step after which the stop flag is set.
fn run(
    config: &TrainConfig,
    directory: &Path,
    fails_at: Option<u64>,
    stops_after: Option<u64>,
) -> Result<Outcome, Error> {
    let stop = AtomicBool::new(false);
    let run = Run {
        config,
        device: &Device::flex(),
        group: &Alone::shared(),
        directory,
        tokenizer: None,
        held_out: None,
        bytes_per_token: None,
        profile_steps: 0,
        stop: &stop,
    };
    train(&run, &mut documents(config, fails_at), &mut |metrics| {
        stop.store(Some(metrics.step) == stops_after, Ordering::Relaxed);
    })
}

fn metrics(directory: &Path) -> Vec<Metrics> {
    let text = fs::read_to_string(directory.join(METRICS)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Every line up to the speed: step, loss, learning rate, norm and tokens. They are compared as
/// text, which is exact; reading them back may round. Steps are in order and without gaps.
fn losses(directory: &Path) -> Vec<String> {
    for (index, line) in metrics(directory).iter().enumerate() {
        assert_eq!(line.step, index as u64 + 1);
    }
    let text = fs::read_to_string(directory.join(METRICS)).unwrap();
    text.lines().map(|line| line.split_once(",\"tokens_per_s\"").unwrap().0.to_owned()).collect()
}

fn weights(directory: &Path, step: u64) -> (Vec<u8>, Vec<u8>) {
    let path = directory.join(CHECKPOINTS).join(format!("step-{step:06}"));
    checkpoint::verify(&path).unwrap();
    let read = |name| fs::read(path.join(name)).unwrap();
    (read("model.safetensors"), read("optimizer.safetensors"))
}

#[test]
fn stopped_and_killed_runs_continue_bit_for_bit() {
    let config = config();
    let straight = tempfile::tempdir().unwrap();
    let outcome = run(&config, straight.path(), None, None).unwrap();
    let last = straight.path().join(CHECKPOINTS).join("step-000012");
    assert_eq!(outcome, Outcome::Finished(last));
    assert_eq!(losses(straight.path()).len(), 12);
    let lines = metrics(straight.path());
    let (first, last) = (lines[0].loss, lines[11].loss);
    assert!(last < 0.8 * first, "the loss falls: {first} {last}");

    // Stopped after step 5, killed while step 8 is fetched, then left alone.
    let broken = tempfile::tempdir().unwrap();
    let outcome = run(&config, broken.path(), None, Some(5)).unwrap();
    let at_five = broken.path().join(CHECKPOINTS).join("step-000005");
    assert_eq!(outcome, Outcome::Stopped(at_five));
    let error = run(&config, broken.path(), Some(8), None).unwrap_err();
    assert!(error.to_string().contains("step 8: the power went out"));
    assert_eq!(losses(broken.path()).len(), 8, "two lines after the checkpoint of step 6");
    run(&config, broken.path(), None, None).unwrap();
    assert_eq!(losses(broken.path()), losses(straight.path()));
    assert_eq!(weights(broken.path(), 12), weights(straight.path(), 12));

    // Nothing is left to do: the same outcome and the same file.
    run(&config, broken.path(), Some(0), None).unwrap();
    assert_eq!(losses(broken.path()), losses(straight.path()));
    let left = checkpoint::list(&broken.path().join(CHECKPOINTS)).unwrap();
    let steps: Vec<u64> = left.into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [6, 9, 12]);
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let mut config = config();
    config.steps = 7;
    let straight = tempfile::tempdir().unwrap();
    run(&config, straight.path(), None, None).unwrap();
    for name in ["model.safetensors", "optimizer.safetensors", "state.json"] {
        let directory = tempfile::tempdir().unwrap();
        run(&config, directory.path(), Some(6), None).unwrap_err();
        run(&config, directory.path(), None, Some(6)).unwrap();
        let newest = directory.path().join(CHECKPOINTS).join("step-000006");
        let path = newest.join(name);
        let mut content = fs::read(&path).unwrap();
        let middle = content.len() / 2;
        content[middle] ^= 1;
        fs::write(&path, content).unwrap();
        let error = checkpoint::verify(&newest).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("checksum"), "{error}");
        // What a crash in the middle of writing leaves does no harm.
        fs::create_dir(directory.path().join(CHECKPOINTS).join("step-000007.partial")).unwrap();
        run(&config, directory.path(), None, None).unwrap();
        assert_eq!(losses(directory.path()), losses(straight.path()));
        assert_eq!(weights(directory.path(), 7), weights(straight.path(), 7));
    }
}

#[test]
fn another_model_is_not_continued() {
    let mut config = config();
    config.steps = 3;
    let directory = tempfile::tempdir().unwrap();
    run(&config, directory.path(), None, None).unwrap();
    config.model.glu_dim = 64;
    let error = run(&config, directory.path(), None, None).unwrap_err();
    assert!(error.to_string().starts_with("model: "), "{error}");
}

#[test]
fn threads_do_not_change_a_bit() {
    let mut config = config();
    // Large enough that every product is split between threads.
    config.model.decoder_embed_dim = 256;
    config.model.hidden_dim = 256;
    config.model.glu_dim = 384;
    config.model.vocab_size = 1000;
    config.sequence_length = 200;
    config.steps = 3;
    let results: Vec<_> = [1, 2, 3]
        .into_iter()
        .map(|threads| {
            let directory = tempfile::tempdir().unwrap();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().unwrap();
            pool.install(|| run(&config, directory.path(), None, None).unwrap());
            (losses(directory.path()), weights(directory.path(), 3))
        })
        .collect();
    assert!(results[0] == results[1], "1 and 2 threads differ");
    assert!(results[0] == results[2], "1 and 3 threads differ");
}

#[test]
fn accumulated_micro_batches_are_one_batch() {
    let (mut one, mut four) = (config(), config());
    (one.batch, one.gradient_accumulation) = (4, 1);
    (four.batch, four.gradient_accumulation) = (1, 4);
    let metrics = [one, four].map(|config| {
        let directory = tempfile::tempdir().unwrap();
        run(&config, directory.path(), None, None).unwrap();
        metrics(directory.path())
    });
    for (a, b) in metrics[0].iter().zip(&metrics[1]) {
        for (a, b) in [(a.loss, b.loss), (a.grad_norm, b.grad_norm)] {
            assert!((a - b).abs() < 1e-3 * a, "{a} {b}");
        }
    }
}

#[test]
fn a_batch_of_another_size_and_a_token_out_of_range_are_errors() {
    let mut config = config();
    let directory = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let mut source = documents(&config, None);
    config.batch = 3;
    let mut train = |config: &TrainConfig| {
        let run = Run {
            config,
            device: &Device::flex(),
            group: &Alone::shared(),
            directory: directory.path(),
            tokenizer: None,
            held_out: None,
            bytes_per_token: None,
            profile_steps: 0,
            stop: &stop,
        };
        train(&run, &mut source, &mut |_| {}).unwrap_err().to_string()
    };
    let error = train(&config);
    assert!(error.contains("4 rows of 70 tokens, the settings say 6"), "{error}");
    config.batch = 2;
    config.model.vocab_size = 10;
    let error = train(&config);
    assert!(error.contains("is not below the vocabulary size 10"), "{error}");
}

#[test]
fn held_out_rows_are_evaluated_and_the_tokenizer_is_kept() {
    let mut config = config();
    config.evaluation.every_steps = 5;
    config.log_every_steps = 100;
    let directory = tempfile::tempdir().unwrap();
    let tokenizer = directory.path().join("some-tokenizer.json");
    fs::write(&tokenizer, "{}").unwrap();
    let held_out = documents(&config, None).batch(1_000_000).unwrap();
    let run = Run {
        config: &config,
        device: &Device::flex(),
        group: &Alone::shared(),
        directory: directory.path(),
        tokenizer: Some(&tokenizer),
        held_out: Some(&held_out),
        bytes_per_token: None,
        profile_steps: 0,
        stop: &AtomicBool::new(false),
    };
    let Outcome::Finished(last) = train(&run, &mut documents(&config, None), &mut |_| {}).unwrap() else {
        panic!("nothing stops this run")
    };
    let lines = metrics(directory.path());
    let steps: Vec<u64> = lines.iter().map(|line| line.step).collect();
    assert_eq!(steps, [5, 10, 12]);
    assert_eq!(fs::read_to_string(last.join("tokenizer.json")).unwrap(), "{}");
    // The checkpoint is a published model with the loss of the last line.
    let model = published::load(&last, &Device::flex()).unwrap();
    let loss = model.loss(&held_out, config.batch).unwrap();
    let text = fs::read_to_string(directory.path().join(METRICS)).unwrap();
    let written = format!("\"held_out_loss\":{},", serde_json::to_string(&loss).unwrap());
    assert!(text.lines().last().unwrap().contains(&written), "{text} {written}");
    assert!(lines[2].held_out_loss < lines[0].held_out_loss);
}
