//! What several ranks take, told before anything runs: memory and bytes of each for every kind of sharding, and how long
//! a step takes where links are as fast as stated. docs/scaling.md explains the formulas, and which figures were fitted to
//! measured steps.

use serde::Serialize;

use crate::config::{GradientReduction, ModelConfig, Sharding, TrainConfig};
use crate::estimate::{
    Cost, Gpu, activation_bytes, backward_cost, forward_cost, head_cost, moment_bytes, optimizer_seconds,
};
use crate::parallel::{Partition, share};
use crate::{Error, engine};

/// Links between GPUs, and what it costs to use them beside computing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Links {
    /// GPUs of a host.
    pub gpus_per_host: usize,
    /// Bytes per second that a GPU sends to others of its host, at best.
    pub host_bandwidth: f64,
    /// Bytes per second that a GPU sends to other hosts, at best.
    pub network_bandwidth: f64,
    /// Share of the first that collectives reach.
    pub host_reached: f64,
    /// Share of the second.
    pub network_reached: f64,
    /// Seconds from one GPU to the next in a host.
    pub host_latency_s: f64,
    /// Seconds from one host to the next.
    pub network_latency_s: f64,
    /// Seconds of a collective, whatever its size.
    pub call_s: f64,
    /// Share of its speed that computing loses while a collective goes on beside it: both need processors and memory.
    pub slowed: f64,
    /// Share of its computing that a step takes longer because GPUs are not equally fast and wait for the slowest.
    pub uneven: f64,
}

impl Default for Links {
    /// NVLink of Hopper and a network card of 400 Gbit/s a GPU. What collectives reach in a host, and what a call costs, is
    /// near what they were measured at alone on H200s; the last two are fitted to all steps that were measured there with two
    /// and four of one host (docs/RESULTS.md). The rest of the network is assumed.
    fn default() -> Self {
        Self {
            gpus_per_host: 8,
            host_bandwidth: 450e9,
            network_bandwidth: 50e9,
            host_reached: 0.65,
            network_reached: 0.75,
            host_latency_s: 2e-6,
            network_latency_s: 8e-6,
            call_s: 1e-4,
            slowed: 0.5,
            uneven: 0.025,
        }
    }
}

impl Links {
    /// Seconds of a collective that sends `bytes` in all between `ranks` GPUs, every `step`-th in a row, round a ring, `rounds`
    /// times: once for an all-gather or a reduce-scatter, twice for an all-reduce.
    fn seconds(&self, bytes: f64, [ranks, step]: [usize; 2], rounds: f64) -> f64 {
        if ranks == 1 {
            return 0.0;
        }
        let hosts = (ranks * step).div_ceil(self.gpus_per_host).min(ranks);
        let bandwidth = match hosts {
            1 => self.host_reached * self.host_bandwidth,
            _ => self.network_reached * self.network_bandwidth,
        };
        let hops = (ranks - hosts) as f64 * self.host_latency_s + (hosts - 1) as f64 * self.network_latency_s;
        self.call_s + rounds * (bytes * (ranks - 1) as f64 / ranks as f64 / bandwidth + hops)
    }
}

/// What one kind of sharding takes of each rank.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Mode {
    /// The kind.
    pub sharding: Sharding,
    /// Bytes of weights, gradients and moments as the step in bf16 has them: 18 a value before sharding.
    pub state_bytes: u64,
    /// Bytes of the same by the formulas of ZeRO (arXiv 1910.02054): 16 a value before sharding, with gradients in bf16.
    pub zero_bytes: u64,
    /// Bytes at the fullest moment.
    pub peak_bytes: u64,
    /// Whether the GPU has them.
    pub fits: bool,
    /// Bytes that a rank sends in a step.
    pub sent_bytes: u64,
    /// The largest size of the paper's table that fits with these settings.
    pub largest_model: Option<&'static str>,
}

/// A step of some number of GPUs, which share the micro batches of the settings as long as each gets one; beyond that the
/// global batch grows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scale {
    /// GPUs.
    pub ranks: usize,
    /// The kind of sharding.
    pub sharding: Sharding,
    /// Predicted tokens of a step.
    pub tokens_per_step: u64,
    /// Whether it fits.
    pub fits: bool,
    /// Seconds a step.
    pub step_s: f64,
    /// Of these, waiting for other ranks.
    pub exposed_s: f64,
    /// Predicted tokens per second of all.
    pub tokens_per_s: f64,
    /// Tokens per second of a GPU over those of a GPU alone with the same settings.
    pub efficiency: f64,
}

/// What ranks take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scaling {
    /// Ranks that `modes` are for.
    pub ranks: usize,
    /// How many of them share each block.
    pub tensor_ranks: usize,
    /// The links that times are for.
    pub links: Links,
    /// Every kind of sharding that these ranks can have.
    pub modes: Vec<Mode>,
    /// Steps of 8, 64 and 1024 GPUs.
    pub scales: Vec<Scale>,
}

/// The estimate of `config` for `ranks` GPUs like `gpu`. Of other kinds of sharding and other numbers of GPUs, those that
/// training refuses are left out.
///
/// # Errors
/// [`Error::Config`] when training refuses `ranks`.
pub fn estimate(config: &TrainConfig, gpu: &Gpu, ranks: usize) -> Result<Scaling, Error> {
    config.neighbours(config.sharding, ranks)?;
    of_part(config, &config.model, ranks)?;
    let links = Links::default();
    let modes = Sharding::ALL.into_iter().filter_map(|sharding| mode(config, gpu, sharding, ranks).ok());
    let scales = [8, 64, 1024].into_iter().flat_map(|ranks| {
        let links = &links;
        Sharding::ALL.into_iter().filter_map(move |sharding| scale(config, gpu, links, sharding, ranks).ok())
    });
    let tensor_ranks = config.tensor_ranks.clamp(1, ranks);
    Ok(Scaling { ranks, tensor_ranks, modes: modes.collect(), scales: scales.collect(), links: links.clone() })
}

/// Bytes of a value of weights and of gradients on their way between GPUs.
fn widths(config: &TrainConfig) -> [u64; 2] {
    match config.gradient_reduction {
        GradientReduction::Float32 => [2, 4],
        GradientReduction::Bf16 => [2, 2],
    }
}

/// Bytes that `rank` sends in a step of `rounds` micro batches a rank, when a value of the weights takes `weight` bytes
/// and one of the gradients `gradient`: reduce-scatter and all-gather go straight from rank to rank.
///
/// Without sharding the sum of the gradients is gathered, else the weights: after the update, or with all sharded, for each
/// micro batch those of a block in the forward and in the backward, those of embedding and head once.
pub fn sent_bytes(
    partition: &Partition,
    rank: usize,
    sharding: Sharding,
    rounds: usize,
    [weight, gradient]: [u64; 2],
) -> u64 {
    let others = partition.world() as u64 - 1;
    let last = partition.buckets().len() - 1;
    let of = |bucket: usize| {
        let (all, own) = (partition.buckets()[bucket].len() as u64, partition.piece(bucket, rank).len() as u64);
        let gathered = match sharding {
            Sharding::None => gradient * own * others,
            Sharding::Optimizer | Sharding::Gradients => weight * own * others,
            Sharding::Full => {
                let passes = if bucket == 0 || bucket == last { 1 } else { 2 };
                weight * own * others * passes * rounds as u64
            }
        };
        gradient * (all - own) + gathered
    };
    (0..=last).map(of).sum()
}

/// Bytes that `rank` of `ranks` sends to the others that share its blocks for one micro batch of `tokens` tokens: in each block
/// two sums of the stream each way, of reduce-scatter and all-gather straight from rank to rank, of `stream` bytes a value, and
/// sums of `token` bytes for every token: 4 on CPUs, which add up squares in the forward, 8 on GPUs, which have a sum of
/// the backward, too.
pub fn joined_bytes(config: &ModelConfig, tokens: usize, rank: usize, ranks: usize, [stream, token]: [u64; 2]) -> u64 {
    let sum = |count: usize| {
        let own = share(count, rank, ranks).len();
        (count - own + own * (ranks - 1)) as u64
    };
    config.decoder_layers as u64 * (4 * stream * sum(tokens * config.decoder_embed_dim) + token * sum(tokens))
}

/// Bytes that one of `ranks` GPUs that share blocks sends to the others in a step of `rounds` micro batches of `tokens` tokens for
/// embedding and head. Of the head each makes loss and gradients of a part of the tokens: those of the stream are gathered.
/// Of the gradients of both a GPU has so many values, `tables`, where they are added up over these GPUs; that of the head
/// once more among `copies` GPUs that have the same of it, where three and more terms may be added up in other orders.
fn shared_table_bytes(
    config: &ModelConfig,
    tokens: usize,
    (tables, copies): ([usize; 2], usize),
    ranks: usize,
    rounds: usize,
    [stream, gradient]: [u64; 2],
) -> u64 {
    let gathered = stream * (ranks as u64 - 1) * (tokens.div_ceil(ranks) * config.decoder_embed_dim) as u64;
    let sum = |values: usize, ranks: usize| 2 * gradient * values as u64 * (ranks as u64 - 1) / ranks as u64;
    let [embedding, head] = tables;
    let level = if ranks > 2 { sum(head, copies) } else { 0 };
    rounds as u64 * gathered + sum(embedding, ranks) + sum(head, ranks) + level
}

/// The settings of one of `ranks` ranks at most that share the blocks: those of a smaller model, for so many ranks that have
/// other tokens, of the same rows or of others.
///
/// # Errors
/// [`Error::Config`] where training on GPUs refuses such a part.
fn of_part(config: &TrainConfig, model: &ModelConfig, ranks: usize) -> Result<(TrainConfig, usize), Error> {
    let tensor_ranks = config.tensor_ranks.clamp(1, ranks);
    let model = engine::shared(model, tensor_ranks)?;
    let places = (ranks / tensor_ranks).max(1);
    let sequence_ranks = config.sequence_ranks.clamp(1, places);
    Ok((TrainConfig { model, tensor_ranks, sequence_ranks, ..config.clone() }, places))
}

/// Bytes of weights, gradients and moments in float32 as CPUs have them, of rank `rank` by the formulas of ZeRO.
pub fn host_state_bytes(partition: &Partition, rank: usize, sharding: Sharding) -> u64 {
    let (all, own) = (partition.parameters().total() as u64, partition.shard_len(rank) as u64);
    match sharding {
        Sharding::None => 16 * all,
        Sharding::Optimizer => 8 * all + 8 * own,
        Sharding::Gradients => 4 * all + 12 * own,
        Sharding::Full => 16 * own,
    }
}

/// Bytes of weights, gradients and moments of a rank.
fn state_bytes(config: &TrainConfig, partition: &Partition, sharding: Sharding, rounds: usize) -> u64 {
    let all = partition.parameters().total() as u64;
    let own = partition.shard_len(0) as u64;
    let optimizer = 4 + moment_bytes(config);
    if partition.world() == 1 {
        return (6 + optimizer) * all;
    }
    // With several micro batches gradients stay whole and in float32 until the last.
    let once = rounds == 1;
    let gradient = if once { widths(config)[1] } else { 4 };
    // The largest bucket whole, twice: of gradients that are made, and of weights in use and on their way.
    let largest = partition.buckets().iter().map(|bucket| bucket.len() as u64).max().unwrap_or(0);
    let made = if gradient == 2 || once && sharding >= Sharding::Gradients { 8 * largest } else { 0 };
    // What is sent in bf16 and not kept so, twice.
    let apart = !once || sharding >= Sharding::Gradients;
    let sent = if widths(config)[1] == 2 && apart { 4 * largest } else { 0 };
    made + sent
        + match sharding {
            Sharding::None => (2 + gradient + optimizer) * all,
            Sharding::Optimizer => (2 + gradient) * all + optimizer * own,
            Sharding::Gradients if once => 2 * all + (gradient + optimizer) * own,
            Sharding::Gradients => (2 + gradient) * all + optimizer * own,
            Sharding::Full if once => (2 + gradient + optimizer) * own + 4 * largest,
            Sharding::Full => gradient * all + (2 + optimizer) * own + 4 * largest,
        }
}

fn peak_bytes(config: &TrainConfig, partition: &Partition, sharding: Sharding, rounds: usize) -> u64 {
    state_bytes(config, partition, sharding, rounds) + activation_bytes(config, config.activation_checkpointing).1
}

/// Values of the gradients of embedding and head that a GPU has where they are added up over the ranks, and how many have
/// the same of them, with the same part of the blocks.
fn tables(partition: &Partition, sharding: Sharding, copies: usize) -> ([usize; 2], usize) {
    let ends = [0, partition.buckets().len() - 1];
    match sharding {
        Sharding::None => (ends.map(|bucket| partition.buckets()[bucket].len()), partition.world()),
        _ => (ends.map(|bucket| partition.piece(bucket, 0).len()), copies),
    }
}

fn mode(whole: &TrainConfig, gpu: &Gpu, sharding: Sharding, ranks: usize) -> Result<Mode, Error> {
    let (part, places) = of_part(whole, &whole.model, ranks)?;
    let config = &part;
    let neighbours = config.neighbours(sharding, ranks)? / config.tensor_ranks;
    let partition = Partition::new(&config.model, neighbours);
    let rounds = config.gradient_accumulation.div_ceil((places / config.sequence_ranks).max(1));
    let (all, own) = (partition.parameters().total() as u64, partition.shard_len(0) as u64);
    let peak = peak_bytes(config, &partition, sharding, rounds);
    let fits = |name: &&str| {
        let Some(model) = ModelConfig::named(name) else { return false };
        let vocab_size = config.model.vocab_size;
        let Ok((config, _)) = of_part(whole, &ModelConfig { vocab_size, ..model }, ranks) else { return false };
        let partition = Partition::new(&config.model, neighbours);
        peak_bytes(&config, &partition, sharding, rounds) < gpu.memory_bytes
    };
    // The pieces of a copy are added to those of the others.
    let copies = (places / neighbours).max(1);
    let between = 2 * widths(config)[1] * own * (copies as u64 - 1) / copies as u64;
    let tokens = config.tokens_of_rank();
    let joined = rounds as u64 * joined_bytes(&config.model, tokens, 0, config.tensor_ranks, [widths(config)[0], 8]);
    let (tables, alike) = tables(&partition, sharding, copies);
    let of_tables =
        shared_table_bytes(&config.model, tokens, (tables, alike), config.tensor_ranks, rounds, widths(config));
    Ok(Mode {
        sharding,
        state_bytes: state_bytes(config, &partition, sharding, rounds),
        zero_bytes: match sharding {
            Sharding::None => 16 * all,
            Sharding::Optimizer => 4 * all + 12 * own,
            Sharding::Gradients => 2 * all + 14 * own,
            Sharding::Full => 16 * own,
        },
        peak_bytes: peak,
        fits: peak < gpu.memory_bytes,
        sent_bytes: joined + of_tables + between + sent_bytes(&partition, 0, sharding, rounds, widths(config)),
        largest_model: ModelConfig::names().filter(fits).last(),
    })
}

/// A step of `ranks` GPUs.
fn scale(whole: &TrainConfig, gpu: &Gpu, links: &Links, sharding: Sharding, ranks: usize) -> Result<Scale, Error> {
    let (part, places) = of_part(whole, &whole.model, ranks)?;
    let config = &part;
    let neighbours = config.neighbours(sharding, ranks)? / config.tensor_ranks;
    let partition = Partition::new(&config.model, neighbours);
    let rows = (places / config.sequence_ranks).max(1);
    let rounds = (config.gradient_accumulation / rows).max(1);
    let of_round = TrainConfig { gradient_accumulation: rounds, ..config.clone() };
    let whole = TrainConfig { tensor_ranks: 1, sequence_ranks: 1, ..whole.clone() };
    let alone = step_seconds(&whole, gpu, links, Sharding::None, &Partition::new(&whole.model, 1), 1).0;
    let alone = whole.tokens_per_step() as f64 / alone;
    let (step_s, busy_s) = step_seconds(&of_round, gpu, links, sharding, &partition, places / neighbours);
    let tokens_per_step = rows as u64 * of_round.tokens_per_step();
    let tokens_per_s = tokens_per_step as f64 / step_s;
    Ok(Scale {
        tokens_per_step,
        ranks,
        sharding,
        fits: peak_bytes(config, &partition, sharding, rounds) < gpu.memory_bytes,
        step_s,
        exposed_s: step_s - busy_s,
        tokens_per_s,
        efficiency: tokens_per_s / ranks as f64 / alone,
    })
}

/// A GPU and its link: what is computed goes in order, what is sent goes in order beside it.
struct Clock<'a> {
    links: &'a Links,
    /// When the GPU has computed all so far, and the link has sent all so far.
    free: f64,
    link: f64,
    /// Seconds that the GPU computed.
    busy: f64,
}

impl Clock<'_> {
    /// Sends something that is there `after` then; when it has arrived.
    fn send(&mut self, after: f64, seconds: f64) -> f64 {
        if seconds > 0.0 {
            self.link = self.link.max(after) + seconds;
        }
        self.link
    }

    /// Computes what takes so long on a GPU whose link is idle, from `begin` on.
    fn compute(&mut self, begin: f64, seconds: f64) {
        let beside = (self.link - begin).max(0.0);
        let done = beside * (1.0 - self.links.slowed);
        let took = if seconds <= done { seconds / (1.0 - self.links.slowed) } else { beside + seconds - done };
        self.free = begin + took;
        self.busy += took;
    }
}

/// Seconds of a step among others, and of its computing alone, where each of `copies` hosts or groups of them has one copy of
/// what is sharded. Each bucket waits for its weights, a reduction for its gradients, the update for all; weights that were
/// updated are sent beside the rest of the update and the next step's forward.
fn step_seconds(
    config: &TrainConfig,
    gpu: &Gpu,
    links: &Links,
    sharding: Sharding,
    partition: &Partition,
    copies: usize,
) -> (f64, f64) {
    let ranks = partition.world();
    let [weight, gradient] = widths(config).map(|bytes| bytes as f64);
    let (layers, head) = (config.model.decoder_layers, partition.buckets().len() - 1);
    let tokens = config.tokens_of_rank() as f64;
    let values = |bucket: usize| partition.buckets()[bucket].len() as f64;
    // Ranks that share blocks are neighbours; others that share something are as far apart as those are many.
    let share = config.tensor_ranks;
    let (inner, outer, partners) = ([ranks, share], [copies, ranks * share], [share, 1]);
    let gather = |bucket: usize| links.seconds(weight * values(bucket), inner, 1.0);
    // Within a copy, then each piece over the copies.
    let rounds = if sharding == Sharding::None { 2.0 } else { 1.0 };
    let reduce = |bucket: usize| {
        let piece = gradient * partition.piece(bucket, 0).len() as f64;
        // Of those that share blocks each has made a part of the head's, one of them the embedding's.
        let (made, alike) = match sharding {
            Sharding::None => (gradient * values(bucket), inner),
            _ => (piece, outer),
        };
        let over_parts = if bucket == 0 || bucket == head { links.seconds(made, partners, 2.0) } else { 0.0 };
        let level = if bucket == head && share > 2 { links.seconds(made, alike, 2.0) } else { 0.0 };
        links.seconds(gradient * values(bucket), inner, rounds) + links.seconds(piece, outer, 2.0) + over_parts + level
    };
    let full = sharding == Sharding::Full && ranks > 1;
    // Two sums of the stream, each of which everything waits for; those of one number for each token are beside products.
    let stream = weight * tokens * config.model.decoder_embed_dim as f64;
    let joined = 2.0 * links.seconds(stream, partners, 2.0);
    // Of the head each makes a part of the tokens; their gradients are gathered.
    let of_head = head_cost(config);
    let of_head = Cost { flops: of_head.flops / share as f64, bytes: of_head.bytes / share as f64 };
    let gathered = links.seconds(stream, partners, 1.0);
    // What is computed with which bucket, and whether its gradient is ready then.
    let forward = |layer: usize| (layer + 1, forward_cost(config, layer), false);
    let backward =
        |layer: usize| (layer + 1, backward_cost(config, layer, config.activation_checkpointing.again(layer)), true);
    let parts: Vec<_> = [(0, Cost::default(), false)]
        .into_iter()
        .chain((0..layers).map(forward))
        .chain([(head, of_head, true)])
        .chain((0..layers).rev().map(backward))
        .collect();

    let mut clock = Clock { links, free: 0.0, link: 0.0, busy: 0.0 };
    // When the weights of a bucket are there: those that were updated, and those that were gathered ahead.
    let mut there = vec![0.0; head + 1];
    let mut ahead: Option<(usize, f64)> = None;
    let mut told = (0.0, 0.0);
    // The second step begins as every other one does.
    for _ in 0..2 {
        let (begun, busy) = (clock.free, clock.busy);
        for round in 0..config.gradient_accumulation {
            let last = round + 1 == config.gradient_accumulation;
            for (index, (bucket, cost, ready)) in parts.iter().enumerate() {
                let arrival = match ahead.take() {
                    Some((gathered, arrival)) if gathered == *bucket => arrival,
                    _ if full => clock.send(clock.free, gather(*bucket)),
                    _ => there[*bucket],
                };
                let begin = clock.free.max(arrival);
                let next = parts.get(index + 1).or(parts.first().filter(|_| !last));
                if let Some((next, ..)) = next.filter(|(next, ..)| full && next != bucket) {
                    ahead = Some((*next, clock.send(begin, gather(*next))));
                }
                clock.compute(begin, cost.seconds(tokens, gpu));
                if share > 1 && *bucket > 0 {
                    // On the one stream, behind what is on its way.
                    let seconds = if *bucket == head { gathered } else { joined };
                    clock.free = clock.send(clock.free, seconds);
                }
                if *ready && last {
                    clock.send(clock.free, reduce(*bucket));
                }
            }
            if last {
                clock.send(clock.free, reduce(0));
            }
        }
        // The norm is one number of every rank.
        clock.free = clock.free.max(clock.link) + links.seconds(8.0, [ranks * copies * share, 1], 2.0);
        for (bucket, there) in there.iter_mut().enumerate() {
            let updated = match sharding {
                Sharding::None => values(bucket),
                _ => partition.piece(bucket, 0).len() as f64,
            };
            clock.compute(clock.free, optimizer_seconds(config, updated, gpu));
            if matches!(sharding, Sharding::Optimizer | Sharding::Gradients) {
                *there = clock.send(clock.free, gather(bucket));
            }
        }
        told = (clock.free - begun, clock.busy - busy);
    }
    let blocks = parts.iter().map(|(_, cost, _)| cost.seconds(tokens, gpu)).sum::<f64>();
    let waits = match ranks * copies * share {
        1 => 0.0,
        _ => links.uneven * blocks * config.gradient_accumulation as f64,
    };
    (told.0 + waits, told.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(size: &str) -> TrainConfig {
        let model = ModelConfig::named(size).unwrap();
        TrainConfig { model, batch: 4, sequence_length: 2048, ..TrainConfig::default() }
    }

    #[test]
    fn states_are_within_a_twentieth_of_zeros_formulas_with_gradients_in_float32() {
        let config = config("7b");
        let told = estimate(&config, &Gpu::h200(), 64).unwrap();
        let all = config.model.parameters() as f64;
        let wide = [18.0, 6.0 + 12.0 / 64.0, 2.0 + 16.0 / 64.0, 18.0 / 64.0];
        let zero = [16.0, 4.0 + 12.0 / 64.0, 2.0 + 14.0 / 64.0, 16.0 / 64.0];
        let largest = Partition::new(&config.model, 64).buckets().iter().map(|b| b.len()).max().unwrap() as f64;
        for ((mode, wide), (zero, transient)) in
            told.modes.iter().zip(wide).zip(zero.into_iter().zip([0.0, 0.0, 8.0, 12.0]))
        {
            let state = mode.state_bytes as f64 - transient * largest;
            assert!((state / (wide * all) - 1.0).abs() < 0.05, "{mode:?}");
            assert!((mode.zero_bytes as f64 / (zero * all) - 1.0).abs() < 0.05, "{mode:?}");
        }
        // The more is sharded, the larger the model that fits.
        let largest: Vec<usize> = told
            .modes
            .iter()
            .map(|mode| ModelConfig::names().position(|name| Some(name) == mode.largest_model).unwrap())
            .collect();
        assert!(largest.is_sorted() && largest[0] < largest[3], "{:?}", told.modes);
    }

    #[test]
    fn ranks_that_share_blocks_have_a_part_of_them_and_all_of_the_tables() {
        let config = TrainConfig { gradient_accumulation: 8, ..config("7b") };
        let shared = TrainConfig { tensor_ranks: 4, ..config.clone() };
        let tables = 2.0 * 64000.0 * 4096.0;
        let blocks = config.model.parameters() as f64 - tables;
        let [one, four] = [&config, &shared].map(|config| estimate(config, &Gpu::h200(), 8).unwrap());
        assert_eq!((one.tensor_ranks, four.tensor_ranks), (1, 4));
        // Without sharding each has 18 bytes of every value that it has.
        let state = four.modes[0].state_bytes as f64;
        assert!((state / (18.0 * (tables + blocks / 4.0)) - 1.0).abs() < 0.01, "{:?}", four.modes[0]);
        // All of it sharded, the blocks take the same on each of eight ranks; the tables are there four times.
        let more = four.modes[3].zero_bytes as f64 - one.modes[3].zero_bytes as f64;
        assert!((more / (16.0 * tables * (4.0 - 1.0) / 8.0) - 1.0).abs() < 0.02, "{more}");
        // Beside the gradients four sums in each of 30 blocks for each micro batch, each of them three quarters of it twice.
        let joined = joined_bytes(&config.model, 8192, 0, 4, [2, 8]);
        let stream = 2.0 * 8192.0 * 4096.0;
        assert!((joined as f64 / (30.0 * 4.0 * 2.0 * 0.75 * stream) - 1.0).abs() < 1e-3, "{joined}");
        assert_eq!(joined_bytes(&config.model, 8192, 0, 1, [2, 8]), 0);
        let partition = Partition::new(&config.model.part(4).unwrap(), 2);
        let piece = partition.piece(31, 0).len();
        assert_eq!(piece, 64000 * 4096 / 2);
        // The sums of embedding and head; no other rank has the same half of the head.
        let of_tables = 4 * 3 * 2 * 8192 / 4 * 4096 + 2 * 2 * 4 * piece as u64 * 3 / 4;
        let want = 4 * joined + of_tables + sent_bytes(&partition, 0, Sharding::Full, 4, [2, 4]);
        assert_eq!(four.modes[3].sent_bytes, want);
        // Without sharding two ranks have the same head, of which four terms are added up.
        let of_tables = of_tables + 2 * 2 * 4 * piece as u64 * 3 / 4 + 2 * 4 * 2 * piece as u64 / 2;
        let want = 4 * joined + of_tables + sent_bytes(&partition, 0, Sharding::None, 4, [2, 4]);
        assert_eq!(four.modes[0].sent_bytes, want);
        // Who waits for sums is slower.
        assert!(four.scales[0].efficiency < one.scales[0].efficiency, "{:?} {:?}", four.scales[0], one.scales[0]);
        // The paper's 3b has 20 heads.
        let small = ModelConfig::named("3b").unwrap();
        assert!(of_part(&TrainConfig { tensor_ranks: 8, ..config }, &small, 8).is_err());
    }

    #[test]
    fn full_sharding_sends_at_most_half_more_than_none() {
        let partition = Partition::new(&config("385m").model, 8);
        for widths in [[4, 4], [2, 4], [2, 2]] {
            let sent = |sharding| sent_bytes(&partition, 0, sharding, 1, widths) as f64;
            let none = sent(Sharding::None);
            assert!(sent(Sharding::Full) <= 1.5 * none, "{widths:?}");
            assert!(sent(Sharding::Optimizer) <= none && sent(Sharding::Optimizer) == sent(Sharding::Gradients));
        }
        let alone = Partition::new(&config("385m").model, 1);
        assert!(Sharding::ALL.into_iter().all(|sharding| sent_bytes(&alone, 0, sharding, 3, [4, 4]) == 0));
    }

    #[test]
    fn no_number_of_gpus_is_faster_than_each_alone_and_slow_links_show() {
        let (config, gpu) = (config("1b"), Gpu::h200());
        for scale in estimate(&config, &gpu, 8).unwrap().scales {
            // The update is shared, too.
            let most = if scale.sharding == Sharding::None { 1.0 } else { 1.2 };
            assert!(scale.efficiency > 0.0 && scale.efficiency <= most, "{scale:?}");
            assert!(scale.exposed_s >= 0.0 && scale.exposed_s < scale.step_s, "{scale:?}");
        }
        let hybrid = TrainConfig { hybrid: 8, ..config.clone() };
        let [all, host] =
            [&config, &hybrid].map(|config| scale(config, &gpu, &Links::default(), Sharding::Full, 1024).unwrap());
        assert!(host.efficiency > all.efficiency, "{host:?} {all:?}");
        let slow = Links { network_bandwidth: 1e9, ..Links::default() };
        let [fast, slow] =
            [&Links::default(), &slow].map(|links| scale(&config, &gpu, links, Sharding::Full, 64).unwrap());
        assert!(slow.efficiency < fast.efficiency / 4.0, "{slow:?} {fast:?}");
    }

    #[test]
    fn what_ranks_that_share_blocks_have_apart_goes_over_the_network() {
        let (config, gpu) = (TrainConfig { tensor_ranks: 8, ..config("7b") }, Gpu::h200());
        let slow = Links { network_bandwidth: 1e9, ..Links::default() };
        // Eight GPUs have the same part, each of them in another host.
        let [fast, slow] =
            [&Links::default(), &slow].map(|links| scale(&config, &gpu, links, Sharding::Full, 64).unwrap());
        assert!(slow.step_s > 2.0 * fast.step_s, "{slow:?} {fast:?}");
        // Copies that are in one host are not between hosts.
        let links = Links::default();
        assert_eq!(links.seconds(1e9, [4, 2], 2.0), links.seconds(1e9, [4, 1], 2.0));
        assert!(links.seconds(1e9, [4, 8], 2.0) > 5.0 * links.seconds(1e9, [4, 2], 2.0));
    }

    #[test]
    fn what_is_sent_takes_turns() {
        // Links so slow that computing is nothing beside them.
        let links = Links { host_bandwidth: 1e9, ..Links::default() };
        let config = TrainConfig { tensor_ranks: 2, gradient_accumulation: 1, ..config("1b") };
        let (part, _) = of_part(&config, &config.model, 4).unwrap();
        let partition = Partition::new(&part.model, 2);
        let stream = 2.0 * (part.tokens_of_rank() * part.model.decoder_embed_dim) as f64;
        let layers = part.model.decoder_layers as f64;
        let joined = layers * 4.0 * links.seconds(stream, [2, 1], 2.0) + links.seconds(stream, [2, 1], 1.0);
        let last = partition.buckets().len() - 1;
        let reduced = |bucket: usize| {
            let bytes = 4.0 * partition.buckets()[bucket].len() as f64;
            let over_parts = if bucket == 0 || bucket == last { links.seconds(bytes, [2, 1], 2.0) } else { 0.0 };
            links.seconds(bytes, [2, 2], 2.0) + over_parts
        };
        let sent = joined + (0..=last).map(reduced).sum::<f64>();
        let (step, busy) = step_seconds(&part, &Gpu::h200(), &links, Sharding::None, &partition, 1);
        assert!(step >= sent && busy < sent / 4.0, "{step} s, of which {sent} s are sent and {busy} s computed");
    }

    /// Every step that was measured, docs/RESULTS.md: GPUs, model, rows of a GPU, sharding, what gradients are sent in, tokens
    /// per second of all, and of one GPU in the same call.
    const MEASURED: [(usize, &str, usize, Sharding, GradientReduction, f64, f64); 16] = {
        use GradientReduction::{Bf16, Float32};
        use Sharding::{Full, Gradients, None, Optimizer};
        [
            (2, "1b", 8, None, Float32, 169_523.0, 91_005.0),
            (2, "1b", 8, Optimizer, Float32, 174_469.0, 91_005.0),
            (2, "1b", 8, Gradients, Float32, 173_811.0, 91_005.0),
            (2, "1b", 8, Full, Float32, 171_827.0, 91_005.0),
            (2, "1b", 8, None, Bf16, 170_693.0, 91_005.0),
            (2, "1b", 8, Full, Bf16, 171_982.0, 91_005.0),
            (4, "1b", 8, None, Float32, 334_104.0, 91_153.0),
            (4, "1b", 8, Optimizer, Float32, 348_683.0, 91_153.0),
            (4, "1b", 8, Gradients, Float32, 348_641.0, 91_153.0),
            (4, "1b", 8, Full, Float32, 344_946.0, 91_153.0),
            (2, "385m", 16, None, Float32, 397_646.0, 207_517.0),
            (2, "385m", 16, Optimizer, Float32, 401_207.0, 207_517.0),
            (2, "385m", 16, Gradients, Float32, 400_729.0, 207_517.0),
            (2, "385m", 16, Full, Float32, 397_889.0, 207_517.0),
            (4, "385m", 16, None, Float32, 780_411.0, 210_772.0),
            (4, "385m", 16, Full, Float32, 792_185.0, 210_772.0),
        ]
    };

    #[test]
    fn every_measured_step_is_told_within_two_points_of_efficiency() {
        let (gpu, links) = (Gpu::h200(), Links::default());
        for (ranks, size, batch, sharding, gradient_reduction, of_all, of_one) in MEASURED {
            let config = TrainConfig { batch, gradient_reduction, ..config(size) };
            let seconds = |sharding, ranks| {
                step_seconds(&config, &gpu, &links, sharding, &Partition::new(&config.model, ranks), 1).0
            };
            let told = seconds(Sharding::None, 1) / seconds(sharding, ranks);
            let measured = of_all / of_one / ranks as f64;
            assert!(
                (told - measured).abs() < 0.02,
                "{ranks} {size} {sharding:?} {gradient_reduction:?}: {told:.3}, measured {measured:.3}"
            );
        }
    }

    #[test]
    fn what_is_sent_in_bf16_has_room_of_its_own() {
        let config = TrainConfig { gradient_reduction: GradientReduction::Bf16, ..config("1b") };
        let partition = Partition::new(&config.model, 2);
        let [all, own] = [partition.parameters().total(), partition.shard_len(0)].map(|count| count as u64);
        let largest = partition.buckets().iter().map(|bucket| bucket.len() as u64).max().unwrap();
        let state = |sharding, rounds| state_bytes(&config, &partition, sharding, rounds);
        // Kept as it is sent.
        assert_eq!(state(Sharding::Optimizer, 1), 4 * all + 12 * own + 8 * largest);
        assert_eq!(state(Sharding::Gradients, 1), 2 * all + 14 * own + 12 * largest);
        assert_eq!(state(Sharding::Optimizer, 2), 6 * all + 12 * own + 4 * largest);
    }

    #[test]
    fn ranks_that_training_refuses_have_no_estimate() {
        let model = ModelConfig { glu_dim: 392, ..config("1b").model };
        let shared = TrainConfig { model, tensor_ranks: 2, ..config("1b") };
        assert!(estimate(&TrainConfig { tensor_ranks: 1, ..shared.clone() }, &Gpu::h200(), 2).is_ok());
        let error = estimate(&shared, &Gpu::h200(), 2).unwrap_err().to_string();
        assert!(error.starts_with("tensor_ranks: ") && error.contains("model.glu_dim is 196 for each of 2"), "{error}");
        let config = TrainConfig { hybrid: 12, sharding: Sharding::Full, ..config("1b") };
        let error = estimate(&config, &Gpu::h200(), 18).unwrap_err().to_string();
        assert!(error.contains("hybrid") && error.contains("18 ranks are not a multiple of 12"), "{error}");
        let unsharded = TrainConfig { sharding: Sharding::None, ..config.clone() };
        assert_eq!(estimate(&unsharded, &Gpu::h200(), 18).unwrap().modes.len(), 1);
        // Of the steps those of 8 GPUs, one copy, and those without sharding are left.
        let told = estimate(&config, &Gpu::h200(), 24).unwrap();
        let left: Vec<usize> = told.scales.iter().map(|scale| scale.ranks).collect();
        assert_eq!(left, [8, 8, 8, 8, 64, 1024]);
    }
}
