//! Generation in the recurrent form: the prompt is read in chunks, then every token takes the same
//! time and memory, however many came before.

use std::collections::HashSet;
use std::ops::ControlFlow;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::config::ModelConfig;
use crate::engine::Decoder;
use crate::evaluate::WINDOW;
use crate::model::{RecurrentState, Weights};
use crate::rng::Rng;
use crate::{Error, Model};

/// How tokens are chosen and when to stop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GenerateConfig {
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Only the `top_k` likeliest tokens are candidates; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability are candidates; 1 for all.
    pub top_p: f64,
    /// Seed of the choice.
    pub seed: u64,
    /// Go on after the end-of-text token.
    pub ignore_eos: bool,
    /// Ids that are never chosen: padding, reserved places of the vocabulary.
    pub suppressed: Vec<u32>,
}

impl Default for GenerateConfig {
    fn default() -> Self {
        Self {
            max_tokens: 200,
            temperature: 0.8,
            top_k: 0,
            top_p: 0.95,
            seed: 0,
            ignore_eos: false,
            suppressed: Vec::new(),
        }
    }
}

impl GenerateConfig {
    fn validate(&self) -> Result<(), Error> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            let reason = format!("{} is not 0 or positive", self.temperature);
            return Err(Error::config("temperature", reason));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let reason = format!("{} is not above 0 and at most 1", self.top_p);
            return Err(Error::config("top_p", reason));
        }
        Ok(())
    }
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended the text.
    EndOfText,
    /// `max_tokens` were generated.
    Length,
    /// The callback asked for it.
    Stopped,
}

/// What reads tokens and says what it expects next, in the recurrent form.
pub trait Reader {
    /// The sizes of the model.
    fn config(&self) -> &ModelConfig;

    /// Reads `ids` after all that was read before; the logits after the last of them.
    ///
    /// # Errors
    /// [`Error::Input`] when there are no ids or one is not below the vocabulary size; when the device has failed.
    fn read(&mut self, ids: &[u32]) -> Result<Vec<f32>, Error>;

    /// Forgets all that was read.
    fn restart(&mut self);
}

/// Reads with a [`Model`], in float32 on any device.
pub struct ModelReader {
    /// Shares its weights with the one it was made of.
    model: Model,
    weights: Weights,
    state: RecurrentState,
}

impl ModelReader {
    /// One that has read nothing.
    pub fn new(model: &Model) -> Self {
        Self { model: model.clone(), weights: model.weights(false), state: model.start() }
    }
}

impl Reader for ModelReader {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn restart(&mut self) {
        self.state = self.model.start();
    }

    fn read(&mut self, ids: &[u32]) -> Result<Vec<f32>, Error> {
        let mut hidden = None;
        for window in ids.chunks(WINDOW) {
            hidden = Some((self.model.read(&self.weights, window, &mut self.state)?, window.len()));
        }
        let Some((hidden, count)) = hidden else { return Err(Error::Input("no tokens to read".to_owned())) };
        Ok(self.model.head(&self.weights, hidden.narrow(0, count - 1, 1)))
    }
}

impl Reader for Decoder {
    fn config(&self) -> &ModelConfig {
        Decoder::config(self)
    }

    fn read(&mut self, ids: &[u32]) -> Result<Vec<f32>, Error> {
        Decoder::read(self, 0, ids)
    }

    fn restart(&mut self) {
        Decoder::restart(self);
    }
}

/// Continues `prompt` and gives each token to `on_token` as soon as it is chosen, except the one
/// that ends the text.
///
/// # Errors
/// [`Error::Config`] for settings out of range, [`Error::Input`] for an empty prompt, an id that is
/// not below the vocabulary size, or logits that are not numbers.
pub fn generate(
    reader: &mut dyn Reader,
    prompt: &[u32],
    config: &GenerateConfig,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Finish, Error> {
    config.validate()?;
    if prompt.is_empty() {
        return Err(Error::Input("the prompt has no tokens".to_owned()));
    }
    let eos = reader.config().eos_token_id;
    let allowed = allowed(reader.config().vocab_size, config)?;
    let mut rng = Rng::new(config.seed, 0);
    let mut logits = reader.read(prompt)?;
    for generated in 1..=config.max_tokens {
        let token = choose(&logits, &allowed, config, &mut rng)?;
        if token == eos && !config.ignore_eos {
            return Ok(Finish::EndOfText);
        }
        if on_token(token).is_break() {
            return Ok(Finish::Stopped);
        }
        if generated < config.max_tokens {
            logits = reader.read(&[token])?;
        }
    }
    Ok(Finish::Length)
}

/// Continues several prompts together, each as [`generate`] alone would with the seed of its own: `config.seed` plus its
/// number. `on_token` gets the number of the prompt with every token. A prompt that has ended is carried along until all
/// have.
///
/// # Errors
/// As [`generate`], and [`Error::Input`] when there is not one prompt for every row of the decoder.
pub fn generate_rows(
    decoder: &mut Decoder,
    prompts: &[Vec<u32>],
    config: &GenerateConfig,
    mut on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<Finish>, Error> {
    config.validate()?;
    if prompts.len() != decoder.rows() {
        return Err(Error::Input(format!("{} prompts for {} rows", prompts.len(), decoder.rows())));
    }
    let (eos, vocabulary) = (decoder.config().eos_token_id, decoder.config().vocab_size);
    let allowed = allowed(vocabulary, config)?;
    let mut rngs: Vec<Rng> = (0..prompts.len() as u64).map(|row| Rng::new(config.seed.wrapping_add(row), 0)).collect();
    let mut logits = Vec::with_capacity(prompts.len() * vocabulary);
    for (row, prompt) in prompts.iter().enumerate() {
        logits.extend(decoder.read(row, prompt)?);
    }
    let mut ended: Vec<Option<Finish>> = vec![None; prompts.len()];
    for generated in 1..=config.max_tokens {
        let chosen: Vec<Result<u32, Error>> = logits
            .par_chunks(vocabulary)
            .zip(&mut rngs)
            .zip(&ended)
            .map(|((logits, rng), ended)| if ended.is_some() { Ok(eos) } else { choose(logits, &allowed, config, rng) })
            .collect();
        let mut tokens = Vec::with_capacity(chosen.len());
        for (row, token) in chosen.into_iter().enumerate() {
            let token = token?;
            if ended[row].is_none() {
                if token == eos && !config.ignore_eos {
                    ended[row] = Some(Finish::EndOfText);
                } else if on_token(row, token).is_break() {
                    ended[row] = Some(Finish::Stopped);
                }
            }
            tokens.push(token);
        }
        if generated == config.max_tokens || ended.iter().all(Option::is_some) {
            break;
        }
        logits = decoder.step(&tokens)?;
    }
    Ok(ended.into_iter().map(|finish| finish.unwrap_or(Finish::Length)).collect())
}

/// Candidates that are put in order before more are: the likeliest few hold most of the probability.
const FEW: usize = 256;

/// The ids that may be chosen: half of a vocabulary may be suppressed, so they are not looked for at every token.
fn allowed(vocabulary: usize, config: &GenerateConfig) -> Result<Vec<u32>, Error> {
    let suppressed: HashSet<u32> = config.suppressed.iter().copied().collect();
    let allowed: Vec<u32> = (0..vocabulary as u32).filter(|id| !suppressed.contains(id)).collect();
    match allowed.is_empty() {
        true => Err(Error::Input("every token is suppressed".to_owned())),
        false => Ok(allowed),
    }
}

/// Chooses one of the ids `allowed`, which are not none; of equal logits the lower id comes first.
fn choose(logits: &[f32], allowed: &[u32], config: &GenerateConfig, rng: &mut Rng) -> Result<u32, Error> {
    if logits.iter().any(|logit| logit.is_nan()) {
        return Err(Error::Input("the model's logits are not numbers".to_owned()));
    }
    let likelier = |a: &u32, b: &u32| {
        let (x, y) = (logits[*a as usize], logits[*b as usize]);
        y.total_cmp(&x).then(a.cmp(b))
    };
    let mut order = allowed.to_vec();
    let count = match (config.temperature, config.top_k) {
        (0.0, _) => 1,
        (_, 0) => order.len(),
        (_, k) => k.min(order.len()),
    };
    if count < order.len() {
        order.select_nth_unstable_by(count - 1, likelier);
        order.truncate(count);
    }
    if count == 1 {
        return Ok(order[0]);
    }
    let largest = order.iter().map(|&id| logits[id as usize]).fold(f32::NEG_INFINITY, f32::max);
    let weight = |id: u32| (f64::from(logits[id as usize] - largest) / config.temperature).exp();
    let total: f64 = order.iter().map(|&id| weight(id)).sum();
    // The likeliest that together have the probability `top_p`, of which as many are put in order as it takes.
    let (mut sorted, mut kept, mut nucleus) = (0, 0, 0.0);
    while kept < order.len() && (kept == 0 || nucleus < config.top_p * total) {
        if kept == sorted {
            let rest = &mut order[sorted..];
            let more = FEW.max(3 * sorted).min(rest.len());
            if more < rest.len() {
                rest.select_nth_unstable_by(more - 1, likelier);
            }
            rest[..more].sort_unstable_by(likelier);
            sorted += more;
        }
        nucleus += weight(order[kept]);
        kept += 1;
    }
    let mut left = rng.uniform() * nucleus;
    for &id in &order[..kept] {
        left -= weight(id);
        if left < 0.0 {
            return Ok(id);
        }
    }
    // Rounding can leave a remainder after the last candidate.
    Ok(order[kept - 1])
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use burn::tensor::Device;

    use super::*;
    use crate::model::read;
    use crate::ops::sequences::Sequences;

    fn model() -> Model {
        let config = ModelConfig {
            vocab_size: 40,
            decoder_embed_dim: 24,
            decoder_layers: 3,
            decoder_attention_heads: 3,
            hidden_dim: 24,
            glu_dim: 40,
            linear_use_lrpe_list: vec![1, 0, 1],
            init_std: 0.2,
            ..ModelConfig::default()
        };
        Model::new(&config, 5, &Device::flex()).unwrap()
    }

    fn run(model: &Model, prompt: &[u32], config: &GenerateConfig) -> (Vec<u32>, Finish) {
        let mut tokens = Vec::new();
        let finish = generate(&mut ModelReader::new(model), prompt, config, |token| {
            tokens.push(token);
            ControlFlow::Continue(())
        });
        (tokens, finish.unwrap())
    }

    #[test]
    fn recurrent_logits_are_those_of_the_parallel_form() {
        let model = model();
        let mut rng = Rng::new(2, 0);
        let ids: Vec<u32> = (0..140).map(|_| (rng.next_u64() % 40) as u32).collect();
        let sequences = Arc::new(Sequences::whole(1, ids.len()));
        let parallel = read(model.logits(&ids, &sequences).unwrap());
        let weights = model.weights(false);
        for prefill in [1, 64, 100] {
            let mut state = model.start();
            let hidden = model.read(&weights, &ids[..prefill], &mut state).unwrap();
            let mut logits = model.head(&weights, hidden);
            let size = state.len();
            for &id in &ids[prefill..] {
                let hidden = model.read(&weights, &[id], &mut state).unwrap();
                logits.extend(model.head(&weights, hidden));
            }
            assert_eq!((state.len(), state.position()), (size, ids.len()));
            let norm = |values: &mut dyn Iterator<Item = f32>| -> f64 {
                values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt()
            };
            let error = norm(&mut parallel.iter().zip(&logits).map(|(a, b)| a - b));
            assert!(error < 1e-5 * norm(&mut parallel.iter().copied()), "{error}");
        }
    }

    #[test]
    fn greedy_generation_is_the_argmax_of_the_parallel_form() {
        let model = model();
        let config = GenerateConfig { max_tokens: 70, temperature: 0.0, ignore_eos: true, ..GenerateConfig::default() };
        let (tokens, finish) = run(&model, &[7, 3], &config);
        assert_eq!((tokens.len(), finish), (70, Finish::Length));
        let ids: Vec<u32> = [7, 3].into_iter().chain(tokens.clone()).collect();
        let sequences = Arc::new(Sequences::whole(1, ids.len()));
        let logits = read(model.logits(&ids, &sequences).unwrap());
        let argmax = |line: &[f32]| {
            let best = line.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            line.iter().position(|&logit| logit == best).unwrap() as u32
        };
        let want: Vec<u32> = logits.chunks(40).map(argmax).collect();
        assert_eq!(tokens, want[1..71]);
    }

    #[test]
    fn the_seed_decides_and_eos_and_the_callback_stop() {
        let model = model();
        let config = GenerateConfig { max_tokens: 300, temperature: 1.5, top_p: 1.0, ..GenerateConfig::default() };
        let (first, finish) = run(&model, &[7], &config);
        assert_eq!((first.clone(), finish), run(&model, &[7], &config));
        assert_eq!(finish, Finish::EndOfText);
        assert!(first.len() < 300 && !first.contains(&model.config().eos_token_id));
        let other = GenerateConfig { seed: 1, ..config.clone() };
        assert_ne!(first, run(&model, &[7], &other).0);
        let stopped = generate(&mut ModelReader::new(&model), &[7], &config, |_| ControlFlow::Break(()));
        assert_eq!(stopped.unwrap(), Finish::Stopped);
        assert!(generate(&mut ModelReader::new(&model), &[], &config, |_| ControlFlow::Continue(())).is_err());
        assert!(generate(&mut ModelReader::new(&model), &[40], &config, |_| ControlFlow::Continue(())).is_err());
    }

    #[test]
    fn top_k_and_top_p_leave_the_likeliest() {
        let logits = [0.0, 2.0, 1.0, 2.0, -3.0];
        let seen = |top_k, top_p| {
            let config = GenerateConfig { temperature: 1.0, top_k, top_p, ..GenerateConfig::default() };
            let all = allowed(5, &config).unwrap();
            let mut rng = Rng::new(0, 0);
            let mut seen = [0u32; 5];
            for _ in 0..4000 {
                seen[choose(&logits, &all, &config, &mut rng).unwrap() as usize] += 1;
            }
            seen
        };
        assert!(seen(0, 1.0).iter().all(|&count| count > 0));
        let [a, b, c, d, e] = seen(3, 1.0);
        assert!(a == 0 && e == 0 && b > 0 && c > 0 && d > 0);
        // Two tokens share 0.79 of the probability.
        let [a, b, c, d, e] = seen(0, 0.75);
        assert!(a == 0 && c == 0 && e == 0 && b.abs_diff(d) < 300);
        assert_eq!(seen(1, 1.0)[1], 4000);
    }

    #[test]
    fn suppressed_ids_are_never_chosen() {
        let logits = [9.0, 2.0, 1.0, 2.0, -3.0];
        for (temperature, top_k) in [(0.0, 0), (1.0, 0), (1.0, 2)] {
            let config =
                GenerateConfig { temperature, top_k, top_p: 1.0, suppressed: vec![0, 3], ..GenerateConfig::default() };
            let others = allowed(5, &config).unwrap();
            let mut rng = Rng::new(0, 0);
            for _ in 0..500 {
                assert!([1, 2, 4].contains(&choose(&logits, &others, &config, &mut rng).unwrap()));
            }
        }
        let all = GenerateConfig { suppressed: (0..5).collect(), ..GenerateConfig::default() };
        assert!(allowed(5, &all).is_err());
    }
}
