//! The step loop: batches in, a trained model, checkpoints and metrics out.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use crate::checkpoint::{self, Keep, State, Writer};
use crate::config::TrainConfig;
use crate::cuda::profile::{self, Span};
use crate::cuda::{COMMUNICATION, EXPOSED};
use crate::engine::{self, Engine, Snapshot};
use crate::estimate::model_flops_per_token;
use crate::parallel::{Collective, Team, all_of, any, share};
use crate::samples::Samples;
use crate::schedule::learning_rate;
use crate::tensorboard::EventFile;
use crate::{Batch, Error, files, model};

/// Where batches come from. The step alone determines a batch.
pub trait BatchSource {
    /// The batch of step `step`, counted from 0: `batch · gradient_accumulation` rows of
    /// `sequence_length + 1` tokens, or of several ranks this one's part of them, as [`Team::rows`] and [`share`] say.
    ///
    /// # Errors
    /// What keeps the source from making the batch; [`Error::Batch`] carries a foreign reason.
    fn batch(&mut self, step: u64) -> Result<Batch, Error>;

    /// What a checkpoint keeps of the source: the same on all ranks.
    fn state(&self) -> Value;

    /// Continues at step `step` with the state that a checkpoint kept.
    ///
    /// # Errors
    /// When the state belongs to another source, for example to other data.
    fn resume(&mut self, state: &Value, step: u64) -> Result<(), Error>;
}

/// What a run needs besides its batches.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The settings.
    pub config: &'a TrainConfig,
    /// The device that trains.
    pub device: &'a Device,
    /// The ranks that train together.
    pub group: &'a Arc<dyn Collective>,
    /// The same for all ranks. Gets `metrics.jsonl` and `checkpoints/`; a run that was stopped continues from there.
    pub directory: &'a Path,
    /// Copied into every checkpoint.
    pub tokenizer: Option<&'a Path>,
    /// Rows that are not trained on, for the evaluation.
    pub held_out: Option<&'a Batch>,
    /// Bytes of text that a token stands for on the mean, where it is known: for bits per byte.
    pub bytes_per_token: Option<f64>,
    /// Steps to record for `profile.json`, the tenth step of this process the first of them; 0 for none.
    pub profile_steps: u64,
    /// Once true, on any rank, the run saves a checkpoint after the current step and returns.
    pub stop: &'a AtomicBool,
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Steps taken, this one included.
    pub step: u64,
    /// Mean cross-entropy of the step's batch in nats, before its update; `null` when it is no number.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Norm of all gradients before clipping; `null` when it is no number.
    #[serde(deserialize_with = "number")]
    pub grad_norm: f64,
    /// Predicted tokens of all steps so far.
    pub tokens: u64,
    /// Predicted tokens per second since the line before, or since this process began to train.
    pub tokens_per_s: f64,
    /// Mean cross-entropy on the held-out rows after the step, where it was evaluated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_loss: Option<f64>,
    /// The loss in bits per byte of text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Model operations per second (`estimate::model_flops_per_token`) over what the device can do at best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Bytes of the device's memory that are taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Bytes that rank 0 sent to each step to other ranks through the host, the mean since the line before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<f64>,
    /// Bytes of weights, gradients and moments that rank 0 had at the fullest moment of the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_bytes: Option<u64>,
    /// Steps so far that changed nothing, since the gradient was no number.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skipped: u64,
    /// Where the time of the steps since the line before went.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<TimeSplit>,
}

impl Metrics {
    /// The values by the names that TensorBoard shows.
    fn scalars(&self) -> Vec<(&'static str, f64)> {
        let mut scalars = vec![
            ("train/loss", self.loss),
            ("train/grad_norm", self.grad_norm),
            ("train/learning_rate", self.learning_rate),
            ("train/tokens", self.tokens as f64),
            ("speed/tokens_per_s", self.tokens_per_s),
        ];
        scalars.extend(self.held_out_loss.map(|loss| ("held_out/loss", loss)));
        scalars.extend(self.bits_per_byte.map(|bits| ("train/bits_per_byte", bits)));
        scalars.extend(self.mfu.map(|mfu| ("speed/mfu", mfu)));
        scalars.extend(self.memory_bytes.map(|bytes| ("memory/device_gib", bytes as f64 / f64::from(1 << 30))));
        if let Some(time) = self.time {
            scalars.extend([("time/step_ms", time.step_ms), ("time/data_ms", time.data_ms)]);
        }
        if let Some(time) = self.time.filter(|time| time.forward_ms > 0.0) {
            scalars.extend([
                ("time/forward_ms", time.forward_ms),
                ("time/head_ms", time.head_ms),
                ("time/backward_ms", time.backward_ms),
                ("time/optimizer_ms", time.optimizer_ms),
                ("time/wait_ms", time.wait_ms),
            ]);
        }
        scalars
    }
}

/// Where the time of a step goes, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TimeSplit {
    /// By the clock, the mean since the line before; what evaluation and checkpoints took is in it.
    pub step_ms: f64,
    /// Waiting for the batch, the mean since the line before.
    pub data_ms: f64,
    /// The device in the forward of the blocks, in the last step. This and the others of the device are left out
    /// where it cannot be told: on the CPU, in float32, and in steps that `--profile` records.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub forward_ms: f64,
    /// In the loss and its gradient.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub head_ms: f64,
    /// In the backward of the blocks.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub backward_ms: f64,
    /// In the update.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub optimizer_ms: f64,
    /// Nothing to do between the first and the last of these.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub wait_ms: f64,
    /// Collectives between GPUs, beside all of these.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub communication_ms: f64,
    /// That part of `wait_ms` in which a collective was waited for.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub exposed_ms: f64,
}

impl TimeSplit {
    /// What the device did.
    fn of(spans: &[Span]) -> Self {
        let sum = |phase| spans.iter().filter(|span| span.phase == phase).map(|span| span.duration_us / 1e3).sum();
        let (communication_ms, exposed_ms) = (sum(COMMUNICATION), sum(EXPOSED));
        // Collectives go on beside the rest, on a stream of their own.
        let own: Vec<&Span> = spans.iter().filter(|span| span.phase != COMMUNICATION).collect();
        let [first, .., last] = own[..] else { return Self::default() };
        let busy: f64 = own.iter().filter(|span| span.phase != EXPOSED).map(|span| span.duration_us / 1e3).sum();
        let all = (last.begin_us + last.duration_us - first.begin_us) / 1e3;
        Self {
            forward_ms: sum("forward"),
            head_ms: sum("head"),
            backward_ms: sum("backward"),
            optimizer_ms: sum("optimizer"),
            wait_ms: (all - busy).max(0.0),
            communication_ms,
            exposed_ms,
            ..Self::default()
        }
    }
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

fn is_nothing(time: &f64) -> bool {
    *time == 0.0
}

/// A number, or none.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Option::<f64>::deserialize(from).map(|value| value.unwrap_or(f64::NAN))
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done; the last checkpoint.
    Finished(PathBuf),
    /// The stop flag was set; the checkpoint to continue from.
    Stopped(PathBuf),
}

/// Directory of the checkpoints in the directory of a run.
pub const CHECKPOINTS: &str = "checkpoints";
/// Name of the metrics in the directory of a run.
pub const METRICS: &str = "metrics.jsonl";
/// Directory of TensorBoard's event files in the directory of a run.
pub const TENSORBOARD: &str = "tensorboard";
/// Name of the trace in the directory of a run, for Chrome's and Perfetto's viewers.
pub const PROFILE: &str = "profile.json";
/// Steps of a process before its profile begins: compiling and growing memory pools is over by then.
const WARM_STEPS: u64 = 10;

/// Trains, from the newest checkpoint of the run's directory that verifies or from fresh weights.
/// `on_step` gets the metrics of every step on the CPU; on a GPU, where asking means waiting, those of the steps that
/// are written to the file.
///
/// Of several ranks, all of which call this, rank 0 alone writes metrics and samples; settings, data and steps are
/// compared before the first of them.
///
/// A run that was killed and continued has the losses and weights of one that was not, bit for bit: on the CPU for any
/// number of threads, on a GPU of the same kind.
///
/// # Errors
/// [`Error::Config`] for settings that do not fit each other or the checkpoint, [`Error::Io`] and
/// [`Error::Format`] for files, [`Error::NonFinite`] when the gradient is no number too many times in a row,
/// [`Error::Rank`] when another rank fails, and what the source gives.
pub fn train(run: &Run<'_>, source: &mut dyn BatchSource, on_step: &mut dyn FnMut(&Metrics)) -> Result<Outcome, Error> {
    let (config, group) = (run.config, run.group.as_ref());
    config.validate()?;
    let leads = group.rank() == 0;
    let directory = run.directory.join(CHECKPOINTS);
    if leads {
        fs::create_dir_all(&directory).map_err(Error::io(&directory))?;
        checkpoint::prune(&directory, Keep::default())?;
    }
    agree_on_settings(run, source)?;

    let mut saved = None;
    let team = Team::new(run.group, config)?;
    let ranges = team.partition(config).places(team.inner.rank());
    let (snapshot, mut step, mut tokens) = match checkpoint::load_newest(&directory, group)? {
        Some(checkpoint) => {
            let (path, state) = (&checkpoint.path, &checkpoint.state);
            if checkpoint.model != config.model {
                let reason = format!("{} has another model", path.display());
                return Err(Error::config("model", reason));
            }
            for change in changes(&state.config, config) {
                tracing::warn!("{change} since {}", path.display());
            }
            source.resume(&state.loader, state.step)?;
            saved = Some((state.step, path.clone()));
            (checkpoint.snapshot(&ranges)?, state.step, state.tokens)
        }
        None => (Snapshot::fresh(model::initial_shard(&config.model, config.seed, &ranges)), 0, 0),
    };
    let mut engine = engine::start(config, run.device, run.group, snapshot)?;
    let keep = Keep { newest: config.keep_checkpoints, every_steps: config.keep_checkpoint_every_steps };
    let mut writer = Writer::new(&directory, run.tokenizer, keep, &team);
    // What is written but checkpoints is written by rank 0.
    let mut metrics_file = leads.then(|| MetricsFile::open(&run.directory.join(METRICS), step)).transpose()?;
    let flops_per_token = model_flops_per_token(config);
    // All ranks' devices are taken to be of one kind.
    let peak_flops = engine.peak_flops().map(|peak| peak * group.world() as f64);
    let profiler = Profiler::new(run, step);
    let samples = if leads { Samples::open(run.directory, config, run.tokenizer, step)? } else { None };
    let mut board = leads.then(|| EventFile::create(&run.directory.join(TENSORBOARD))).transpose()?;

    let mut since = Since::now(step, tokens, group);
    loop {
        let stopped = any(group, run.stop.load(Ordering::Relaxed))?;
        let done = step >= config.steps;
        let every = config.checkpoint_every_steps;
        let due = every > 0 && step > 0 && step.is_multiple_of(every);
        let newest = saved.as_ref().map(|(step, _)| *step);
        if (stopped || done || due) && newest != Some(step) {
            metrics_file.as_mut().map(MetricsFile::sync).transpose()?;
            // The snapshot waits for the device anyway, so this costs nothing.
            within_limit(config, step, &engine.outcome()?)?;
            let state = State { step, tokens, skipped: 0, loader: source.state(), config: config.clone() };
            writer.begin(engine.snapshot()?, state)?;
            saved = Some((step, PathBuf::new()));
        }
        if stopped || done {
            if let (Some(path), Some((_, newest))) = (writer.finish()?, &mut saved) {
                *newest = path;
            }
            metrics_file.as_mut().map(MetricsFile::sync).transpose()?;
            profiler.end(step, engine.as_mut())?;
            let path = saved.map(|(_, path)| path).unwrap_or_default();
            return Ok(if done { Outcome::Finished(path) } else { Outcome::Stopped(path) });
        }

        let asked = Instant::now();
        let batch = source.batch(step)?;
        since.waited_s += asked.elapsed().as_secs_f64();
        check(config, &team, &batch, step)?;
        let rate = config.optimizer.peak_learning_rate;
        let rate = learning_rate(&config.schedule, rate, config.steps, step);
        let at = |every: u64| every > 0 && ((step + 1).is_multiple_of(every) || step + 1 == config.steps);
        let evaluates = at(config.evaluation.every_steps);
        let evaluated = run.held_out.filter(|_| evaluates);
        let sampled = evaluates && Samples::are_wanted(config, run.tokenizer);
        let written = at(config.log_every_steps) || evaluated.is_some() || sampled;
        let profiled = profiler.before(step, engine.as_mut());
        if written && !profiled {
            engine.record();
        }
        engine.step(&batch, rate)?;
        step += 1;
        tokens += config.tokens_per_step();
        profiler.after(step, engine.as_mut())?;
        if !written && !engine.is_synchronous() {
            continue;
        }

        let outcome = engine.outcome()?;
        within_limit(config, step, &outcome)?;
        if outcome.skipped_last > 0 {
            tracing::warn!(
                step,
                loss = outcome.loss,
                grad_norm = outcome.grad_norm,
                in_a_row = outcome.skipped_last,
                "the gradient is no number; the step was skipped"
            );
        }
        let spans = if written && !profiled { engine.recorded()? } else { Vec::new() };
        let held_out_loss = evaluated.map(|rows| engine.loss(rows)).transpose()?;
        if sampled {
            // All ranks, for the one that writes: it may need what they hold.
            if let Some((samples, mut reader)) = samples.as_ref().zip(engine.reader()?) {
                samples.write(step, reader.as_mut())?;
            }
        }
        let (elapsed_s, steps) = (since.time.elapsed().as_secs_f64(), (step - since.step).max(1) as f64);
        let tokens_per_s = (tokens - since.tokens) as f64 / elapsed_s;
        let metrics = Metrics {
            step,
            loss: outcome.loss,
            learning_rate: rate,
            grad_norm: outcome.grad_norm,
            tokens,
            tokens_per_s,
            held_out_loss,
            bits_per_byte: run.bytes_per_token.map(|bytes| outcome.loss / std::f64::consts::LN_2 / bytes),
            mfu: peak_flops.map(|peak| tokens_per_s * flops_per_token / peak),
            memory_bytes: if written { engine.memory_bytes() } else { None },
            sent_bytes: (group.world() > 1).then(|| (group.bytes_sent() - since.sent_bytes) as f64 / steps),
            state_bytes: engine.state_bytes(),
            skipped: outcome.skipped,
            time: Some(TimeSplit {
                step_ms: 1e3 * elapsed_s / steps,
                data_ms: 1e3 * since.waited_s / steps,
                ..TimeSplit::of(&spans)
            }),
        };
        on_step(&metrics);
        if written {
            metrics_file.as_mut().map(|file| file.write(&metrics)).transpose()?;
            board.as_mut().map(|board| board.scalars(step, &metrics.scalars())).transpose()?;
            since = Since::now(step, tokens, group);
        }
    }
}

/// Whether no more steps in a row than are allowed changed nothing, after step `step`.
fn within_limit(config: &TrainConfig, step: u64, outcome: &engine::Outcome) -> Result<(), Error> {
    if outcome.skipped_last <= config.max_skipped_steps {
        return Ok(());
    }
    let (what, value) =
        if outcome.loss.is_finite() { ("gradient norm", outcome.grad_norm) } else { ("loss", outcome.loss) };
    Err(Error::NonFinite { step: step.saturating_sub(1), what, value, times: outcome.skipped_last })
}

/// Refuses to go on where ranks were started with settings, programs or data that differ.
fn agree_on_settings(run: &Run<'_>, source: &dyn BatchSource) -> Result<(), Error> {
    // All ranks evaluate and sample together, or none does.
    let held_out = run.held_out.map(|rows| {
        let bytes: Vec<u8> = rows.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        serde_json::json!({ "rows": rows.rows(), "xxh3": format!("{:016x}", xxh3_64(&bytes)) })
    });
    let own = serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "settings": serde_json::to_value(run.config).unwrap_or_default(),
        "tokens": source.state(),
        "held-out rows": held_out,
        "writing of samples": Samples::are_wanted(run.config, run.tokenizer),
    });
    let all = all_of(run.group.as_ref(), Ok(own.to_string()))?;
    let read = |text: &String| serde_json::from_str::<Value>(text).unwrap_or_default();
    let first = all.first().map(read).unwrap_or_default();
    for (rank, text) in all.iter().enumerate().skip(1) {
        let Some((key, before, now)) = differences(&first, &read(text)).into_iter().next() else { continue };
        let reason = format!("is {now} on rank {rank} and {before} on rank 0; all ranks need the same");
        return Err(match key.strip_prefix("settings.") {
            Some(key) => Error::config(key, reason),
            None => Error::Data(format!("{key} {reason}")),
        });
    }
    Ok(())
}

/// The settings that differ, each as a line for people.
fn changes(before: &TrainConfig, now: &TrainConfig) -> Vec<String> {
    // The present ones through text, too: a number that was read back may differ in its last digit.
    let value = |config: &TrainConfig| serde_json::to_value(config).unwrap_or_default();
    let now =
        serde_json::from_str::<TrainConfig>(&value(now).to_string()).map_or_else(|_| value(now), |now| value(&now));
    let found = differences(&value(before), &now).into_iter();
    found.map(|(key, before, now)| format!("{key} was changed from {before} to {now}")).collect()
}

/// The keys whose values differ, with both, in the order of their names.
fn differences(before: &Value, now: &Value) -> Vec<(String, Value, Value)> {
    fn compare(key: &str, before: &Value, now: &Value, found: &mut Vec<(String, Value, Value)>) {
        let (Value::Object(old), Value::Object(new)) = (before, now) else {
            if before != now {
                found.push((key.to_owned(), before.clone(), now.clone()));
            }
            return;
        };
        let mut keys: Vec<&String> = old.keys().chain(new.keys()).collect();
        keys.sort();
        keys.dedup();
        for name in keys {
            let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            let of = |side: &serde_json::Map<String, Value>| side.get(name).cloned().unwrap_or(Value::Null);
            compare(&key, &of(old), &of(new), found);
        }
    }
    let mut found = Vec::new();
    compare("", before, now, &mut found);
    found
}

/// Where the line before was written.
struct Since {
    time: Instant,
    step: u64,
    tokens: u64,
    /// Seconds spent waiting for batches.
    waited_s: f64,
    sent_bytes: u64,
}

impl Since {
    fn now(step: u64, tokens: u64, group: &dyn Collective) -> Self {
        Self { time: Instant::now(), step, tokens, waited_s: 0.0, sent_bytes: group.bytes_sent() }
    }
}

/// Refuses a batch of another size than the settings say.
fn check(config: &TrainConfig, team: &Team, batch: &Batch, step: u64) -> Result<(), Error> {
    let (rank, world) = team.rows();
    let rows = share(config.batch * config.gradient_accumulation, rank, world).len();
    let length = config.sequence_length;
    if batch.rows() == rows && batch.length == length {
        return Ok(());
    }
    let reason = format!("{} rows of {} tokens, the settings say {rows} of {length}", batch.rows(), batch.length);
    Err(Error::Batch { step, reason })
}

/// Records a few steps for the trace.
struct Profiler {
    path: PathBuf,
    /// First step, and the one after the last.
    steps: std::ops::Range<u64>,
}

impl Profiler {
    fn new(run: &Run<'_>, step: u64) -> Self {
        let first = step + WARM_STEPS;
        let steps = if run.group.rank() == 0 { run.profile_steps } else { 0 };
        Self { path: run.directory.join(PROFILE), steps: first..first + steps }
    }

    /// Whether the step that is about to be taken is recorded.
    fn before(&self, step: u64, engine: &mut dyn Engine) -> bool {
        if step == self.steps.start && !self.steps.is_empty() {
            engine.record();
        }
        self.steps.contains(&step)
    }

    fn after(&self, step: u64, engine: &mut dyn Engine) -> Result<(), Error> {
        if self.steps.is_empty() || step != self.steps.end {
            return Ok(());
        }
        self.write(engine, step)
    }

    /// Writes what there is of a profile that the end of the run, after step `step`, cut short.
    fn end(&self, step: u64, engine: &mut dyn Engine) -> Result<(), Error> {
        if self.steps.is_empty() || step >= self.steps.end {
            return Ok(());
        }
        if step <= self.steps.start {
            tracing::warn!("no profile was written: it begins at step {}, the run ended before", self.steps.start);
            return Ok(());
        }
        tracing::warn!("the run ended before all steps of the profile were taken");
        self.write(engine, step)
    }

    fn write(&self, engine: &mut dyn Engine, step: u64) -> Result<(), Error> {
        let spans = engine.recorded()?;
        if spans.is_empty() {
            tracing::warn!("no profile was written: it needs a CUDA device and bf16");
            return Ok(());
        }
        let path = &self.path;
        let file = File::create(path).map_err(Error::io(path))?;
        profile::write_chrome_trace(&spans, BufWriter::new(file)).map_err(Error::io(path))?;
        let steps = (step - self.steps.start) as f64;
        for total in profile::totals(&spans).iter().take(25) {
            tracing::info!(
                phase = total.phase,
                count = total.count,
                ms_per_step = total.total_ms / steps,
                "{}",
                total.name
            );
        }
        tracing::info!("profile of {steps} steps in {}", path.display());
        Ok(())
    }
}

/// `metrics.jsonl`, open for appending.
struct MetricsFile {
    path: PathBuf,
    writer: BufWriter<File>,
}

impl MetricsFile {
    /// Opens the file and drops the lines after step `step`, which are about to be written again.
    fn open(path: &Path, step: u64) -> Result<Self, Error> {
        let mut kept = Vec::new();
        if path.exists() {
            let file = File::open(path).map_err(Error::io(path))?;
            for line in BufReader::new(file).split(b'\n') {
                let line = line.map_err(Error::io(path))?;
                // A line that was cut short belongs to a step after the checkpoint.
                let metrics: Result<Metrics, _> = serde_json::from_slice(&line);
                if metrics.is_ok_and(|metrics| metrics.step <= step) {
                    kept.extend(line);
                    kept.push(b'\n');
                }
            }
        }
        files::replace(path, |path| fs::write(path, &kept).map_err(Error::io(path)))?;
        let file = File::options().append(true).open(path);
        Ok(Self { path: path.to_owned(), writer: BufWriter::new(file.map_err(Error::io(path))?) })
    }

    fn write(&mut self, metrics: &Metrics) -> Result<(), Error> {
        let mut line = serde_json::to_vec(metrics).map_err(|error| Error::format(&self.path, error))?;
        line.push(b'\n');
        // Whole lines reach the file at once: others read it while the run goes on.
        let written = self.writer.write_all(&line).and_then(|()| self.writer.flush());
        written.map_err(Error::io(&self.path))
    }

    fn sync(&mut self) -> Result<(), Error> {
        let synced = self.writer.get_ref().sync_data();
        synced.map_err(Error::io(&self.path))
    }
}
