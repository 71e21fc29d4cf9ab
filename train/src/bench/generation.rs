//! Generation by the decoder of a GPU.

use std::ops::ControlFlow;
use std::time::Instant;

use burn::tensor::Device;
use serde::Serialize;

use crate::Error;
use crate::config::ModelConfig;
use crate::engine::Decoder;
use crate::generate::{GenerateConfig, generate_rows};
use crate::model;
use crate::rng::Rng;

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GenerationTime {
    /// Texts that are continued together.
    pub rows: usize,
    /// Tokens that each has read before.
    pub context: usize,
    /// Tokens of contexts read per second.
    pub read_tokens_per_s: f64,
    /// Tokens generated per second, over all rows.
    pub tokens_per_s: f64,
    /// Bytes of the states of all rows.
    pub state_bytes: usize,
    /// Bytes of the device's memory that are taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
}

/// Measures a fresh model of `config`: for every number of rows and length of context, `tokens` tokens a row.
///
/// # Errors
/// As [`Decoder::new`] and [`generate_rows`].
pub fn generation(
    device: &Device,
    config: &ModelConfig,
    rows: &[usize],
    contexts: &[usize],
    tokens: usize,
    mut on_time: impl FnMut(&GenerationTime),
) -> Result<(), Error> {
    let values = model::initial_values(config, 0);
    // A fresh model finds all tokens about as likely: `top_k` keeps the choice as short as that of a trained one.
    let settings =
        GenerateConfig { max_tokens: tokens.max(2), top_k: 50, ignore_eos: true, ..GenerateConfig::default() };
    for &rows in rows {
        let mut decoder = Decoder::new(config, &values, rows, device)?;
        for &context in contexts {
            let mut rng = Rng::new(context as u64, 0);
            let mut draw = |count: usize| -> Vec<u32> {
                (0..count).map(|_| (rng.next_u64() % config.vocab_size as u64) as u32).collect()
            };
            decoder.restart();
            // All but the last token of each row first, in pieces that need no long list.
            let begin = Instant::now();
            for row in 0..rows {
                let mut left = context.saturating_sub(1);
                while left > 0 {
                    let piece = draw(left.min(1 << 13));
                    left -= piece.len();
                    decoder.read(row, &piece)?;
                }
            }
            let read_s = begin.elapsed().as_secs_f64();
            let prompts: Vec<Vec<u32>> = (0..rows).map(|_| draw(1)).collect();
            let mut first = None;
            let mut last = Instant::now();
            let mut count = 0usize;
            generate_rows(&mut decoder, &prompts, &settings, |_, _| {
                last = Instant::now();
                first.get_or_insert(last);
                count += 1;
                ControlFlow::Continue(())
            })?;
            // The first token of every row came with the reading.
            let span_s = first.map_or(f64::NAN, |first| last.duration_since(first).as_secs_f64());
            on_time(&GenerationTime {
                rows,
                context,
                read_tokens_per_s: (rows * context.saturating_sub(1)) as f64 / read_s,
                tokens_per_s: count.saturating_sub(rows) as f64 / span_s,
                state_bytes: decoder.state_bytes(),
                memory_bytes: decoder.memory_bytes(),
            });
        }
    }
    Ok(())
}
