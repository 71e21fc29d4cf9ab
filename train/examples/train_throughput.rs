//! Tokens per second of training a small model on random tokens, and where the time goes:
//! `cargo run --release -p train --example train_throughput [DEVICE [LAYERS D HEADS GLU VOCABULARY T BATCH]]`
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::time::Instant;

use train::config::{ModelConfig, OptimizerConfig};
use train::device::DeviceChoice;
use train::generate::{GenerateConfig, ModelReader, generate};
use train::optimizer::AdamW;
use train::rng::Rng;
use train::{Batch, Model};

const STEPS: u32 = 8;

fn main() {
    let device: DeviceChoice = std::env::args().nth(1).unwrap_or("cpu".to_owned()).parse().unwrap();
    let device = device.select().unwrap();
    let given: Vec<usize> = std::env::args().skip(2).map(|argument| argument.parse().unwrap()).collect();
    let sizes = if given.is_empty() { vec![4, 128, 4, 384, 2048, 256, 8] } else { given };
    let [layers, width, heads, glu, vocabulary, length, rows] = sizes.try_into().unwrap();
    let config = ModelConfig {
        vocab_size: vocabulary,
        decoder_embed_dim: width,
        decoder_layers: layers,
        decoder_attention_heads: heads,
        hidden_dim: width,
        glu_dim: glu,
        linear_use_lrpe_list: (0..layers).map(|layer| u8::from(layer == 0)).collect(),
        ..ModelConfig::default()
    };
    let mut model = Model::new(&config, 1, &device).unwrap();
    let mut optimizer = AdamW::new(&OptimizerConfig::default(), &model);
    let mut rng = Rng::new(0, 0);
    let mut id = move || (rng.next_u64() % vocabulary as u64) as u32;
    let batch = Batch { tokens: (0..rows * (length + 1)).map(|_| id()).collect(), starts: vec![vec![0]; rows], length };

    let mut times = [0f64; 3];
    for step in 0..=STEPS {
        let begin = Instant::now();
        model.loss(&batch, rows).unwrap();
        let forward = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let mut gradients = Vec::new();
        model.gradients(&batch, rows, 0.0, |part| gradients = part).unwrap();
        let passes = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        optimizer.step(&mut model, gradients, 1e-3);
        let update = begin.elapsed().as_secs_f64();
        // The first step is a warm-up.
        if step > 0 {
            for (total, time) in times.iter_mut().zip([forward, passes, update]) {
                *total += time / f64::from(STEPS);
            }
        }
    }
    let [forward, passes, update] = times;
    let threads = rayon::current_num_threads();
    println!(
        "{} parameters, {rows} x {length} tokens, {threads} threads: {:.0} tokens/s",
        config.parameters(),
        (rows * length) as f64 / (passes + update)
    );
    println!(
        "loss alone {:.1} ms, loss and gradients {:.1} ms, update {:.1} ms",
        1e3 * forward,
        1e3 * passes,
        1e3 * update
    );

    let settings = GenerateConfig { max_tokens: 200, temperature: 0.0, ignore_eos: true, ..GenerateConfig::default() };
    for prompt in [16, 4096] {
        let prompt: Vec<u32> = (0..prompt).map(|_| id()).collect();
        let mut times = Vec::new();
        generate(&mut ModelReader::new(&model), &prompt, &settings, |_| {
            times.push(Instant::now());
            ControlFlow::Continue(())
        })
        .unwrap();
        let span = times[times.len() - 1].duration_since(times[0]).as_secs_f64();
        println!("generation after {} tokens: {:.0} tokens/s", prompt.len(), (times.len() - 1) as f64 / span);
    }
}
