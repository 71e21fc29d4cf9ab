//! Several ranks as real processes: equal bits, measured bytes, shards that any other number of ranks reads, and ranks
//! that die, hang, differ or do not come.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod support;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use support::{fulgurite, json_lines, refused, root, said, small_job, small_tokens, succeed};
use train::config::{ModelConfig, Sharding};
use train::parallel::Partition;
use train::parameters::ParameterList;
use train::scaling::{host_state_bytes, joined_bytes, sent_bytes};

/// Steps of the runs that are compared.
const STEPS: usize = 6;
/// Micro batches of a step.
const MICRO_BATCHES: usize = 8;
/// Largest buckets that are in memory at once beside what a rank keeps: one as it was made and as it is sent, in use, and
/// on their way to and from others.
const TRANSIENT: u64 = 4;

/// Token shards and the reference: one process.
struct Prepared {
    directory: tempfile::TempDir,
    curve: Vec<String>,
    samples: String,
    weights: Vec<u8>,
}

impl Prepared {
    fn settings(&self) -> PathBuf {
        self.directory.path().join("job.toml")
    }

    fn place(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn job(&self, directory: &Path, set: &[&str]) -> Command {
        support::job(&self.settings(), directory, set)
    }

    /// A job of `world` ranks that the program starts itself, to its end.
    fn run(&self, directory: &Path, world: usize, set: &[&str]) -> Output {
        succeed(self.job(directory, set).args(["--nproc", &world.to_string()]))
    }

    /// `world` ranks that this test starts itself, `extra` for one of them.
    fn ranks(&self, directory: &Path, world: usize, set: &[&str], extra: impl Fn(usize) -> Vec<String>) -> Vec<Child> {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        (0..world)
            .map(|rank| {
                let mut command = self.job(directory, set);
                command
                    .args(extra(rank))
                    .env("RANK", rank.to_string())
                    .env("WORLD_SIZE", world.to_string())
                    .env("LOCAL_RANK", rank.to_string())
                    .env("MASTER_ADDR", "127.0.0.1")
                    .env("MASTER_PORT", free.port().to_string())
                    .env("RAYON_NUM_THREADS", "1");
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
            })
            .collect()
    }
}

/// Made once for all tests of this file.
fn prepared() -> &'static Prepared {
    static PREPARED: OnceLock<Prepared> = OnceLock::new();
    PREPARED.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let run = small_tokens(directory.path(), &[]);
        let keys = format!(
            "batch = 1\ngradient_accumulation = {MICRO_BATCHES}\nsteps = {STEPS}\nlog_every_steps = 1\n\
             checkpoint_every_steps = 3"
        );
        let tables = r#"[train.schedule]
kind = "warmup_stable_decay"
warmup_steps = 2
decay_steps = 0

[train.optimizer]
peak_learning_rate = 0.01
clip_norm = 0.5

[train.evaluation]
every_steps = 3
sequences = 3
prompts = ["The sea"]
sample_tokens = 4"#;
        small_job(directory.path(), &run, &keys, tables);
        let mut prepared = Prepared { directory, curve: Vec::new(), samples: String::new(), weights: Vec::new() };
        let one = prepared.place("one");
        succeed(&mut prepared.job(&one, &[]));
        prepared.curve = curve(&one);
        prepared.samples = fs::read_to_string(one.join("samples.jsonl")).unwrap();
        prepared.weights = exported(&one);
        assert_eq!(prepared.curve.len(), STEPS);
        prepared
    })
}

fn lines(directory: &Path) -> Vec<serde_json::Value> {
    json_lines(&directory.join("metrics.jsonl"))
}

/// What is the same for any number of ranks, as it was written.
fn curve(directory: &Path) -> Vec<String> {
    let keys = ["step", "loss", "grad_norm", "tokens", "held_out_loss"];
    let of = |line: &serde_json::Value| keys.map(|key| line[key].to_string()).join(" ");
    lines(directory).iter().map(of).collect()
}

/// The curve in `directory` is that of one process but for the order of additions.
fn assert_within_roundings(directory: &Path) {
    let (one, other) = (lines(&prepared().place("one")), lines(directory));
    assert_eq!(other.len(), STEPS, "{}", directory.display());
    for (a, b) in one.iter().zip(&other) {
        for key in ["loss", "grad_norm", "held_out_loss"] {
            let [a, b] = [a, b].map(|line| line[key].as_f64());
            let (Some(a), Some(b)) = (a, b) else {
                assert_eq!(a, b, "{} {key}", directory.display());
                continue;
            };
            assert!((a - b).abs() < 1e-4 * a, "{} {key}: {a} {b}", directory.display());
        }
    }
}

/// The newest checkpoint as one file.
fn exported(directory: &Path) -> Vec<u8> {
    let to = directory.join("exported");
    succeed(fulgurite().arg("export").arg(directory).arg(&to));
    fs::read(to.join("model.safetensors")).unwrap()
}

fn sharding(sharding: Sharding) -> String {
    format!("train.sharding={}", sharding.name())
}

/// The model of the settings, or one of more layers.
fn model(layers: usize) -> ModelConfig {
    let lrpe = (0..layers).map(|layer| u8::from(layer == 0));
    ModelConfig {
        vocab_size: 512,
        decoder_layers: layers,
        decoder_embed_dim: 32,
        decoder_attention_heads: 2,
        hidden_dim: 32,
        glu_dim: 128,
        linear_use_lrpe_list: lrpe.collect(),
        ..ModelConfig::default()
    }
}

#[test]
fn every_world_and_sharding_gives_the_bits_of_one_process_and_sends_what_the_formulas_say() {
    let prepared = prepared();
    let all = Sharding::ALL;
    let runs = [(2, &all[..]), (4, &all[..]), (8, &all[3..])];
    for (world, modes) in runs {
        for &mode in modes {
            let directory = prepared.place(&format!("{world}-{}", mode.name()));
            prepared.run(&directory, world, &[&sharding(mode)]);
            assert_eq!(curve(&directory), prepared.curve, "{world} {mode:?}");
            assert_eq!(fs::read_to_string(directory.join("samples.jsonl")).unwrap(), prepared.samples);
            assert!(exported(&directory) == prepared.weights, "{world} {mode:?}");
            // A step without evaluation and checkpoint.
            let sent = lines(&directory)[4]["sent_bytes"].as_f64().unwrap();
            let partition = Partition::new(&model(2), world);
            let rounds = MICRO_BATCHES / world;
            let want = sent_bytes(&partition, 0, mode, rounds, [4, 4]) as f64;
            // Counts, losses and norms are beside the formula.
            assert!(sent >= want && sent <= 1.02 * want + 1000.0, "{world} {mode:?}: {sent} for {want}");
            if rounds == 1 && mode == Sharding::Full {
                let without = sent_bytes(&partition, 0, Sharding::None, rounds, [4, 4]) as f64;
                assert!(sent <= 1.5 * without, "{sent} against {without}");
            }
        }
    }
}

#[test]
fn rows_that_ranks_share_give_the_curve_of_one_process_for_a_state_a_layer() {
    let prepared = prepared();
    for (world, parts, mode) in [(2, 2, Sharding::None), (4, 2, Sharding::Full), (3, 3, Sharding::Gradients)] {
        let directory = prepared.place(&format!("rows-{world}-{parts}"));
        let parts = format!("train.sequence_ranks={parts}");
        prepared.run(&directory, world, &[&sharding(mode), &parts]);
        assert_within_roundings(&directory);
        let shared = lines(&directory);
        if world == 2 {
            // Beside the gradients, one state of every layer for every micro batch; from rank 0 forwards alone.
            let states: usize = [2 * 16, 16].iter().map(|keys| 2 * keys * 16 * 4).sum();
            let want =
                sent_bytes(&Partition::new(&model(2), 2), 0, mode, 1, [4, 4]) as f64 + (MICRO_BATCHES * states) as f64;
            let sent = shared[4]["sent_bytes"].as_f64().unwrap();
            assert!(sent >= want && sent <= 1.02 * want + 1500.0, "{sent} for {want}");
        }
    }
}

/// The settings of a model whose heads four ranks can share.
const FOUR_HEADS: &str = "train.model.decoder_attention_heads=4";

/// The curve of `directory` is that of `one`, but for sums in another order: roundings at first, later what training makes of
/// them, as much as of micro batches of another size.
fn assert_near(directory: &Path, one: &Path) {
    let (one, other) = (lines(one), lines(directory));
    assert_eq!(other.len(), one.len());
    for (a, b) in one.iter().zip(&other) {
        let early = a["step"].as_u64().unwrap() <= 10;
        for (key, late) in [("loss", 1e-4), ("held_out_loss", 1e-4), ("grad_norm", 1e-2)] {
            let [a, b] = [a, b].map(|line| line[key].as_f64());
            assert_eq!(a.is_some(), b.is_some());
            let apart = a.zip(b).map_or(0.0, |(a, b)| (a - b).abs() / a);
            assert!(apart < if early { 1e-6 } else { late }, "{directory:?} {key}: {apart:e}");
        }
    }
}

#[test]
fn blocks_that_ranks_share_give_the_curve_of_one_process_for_two_sums_each_way() {
    let prepared = prepared();
    let set = ["train.steps=24", FOUR_HEADS];
    let one = prepared.place("heads");
    succeed(&mut prepared.job(&one, &set));
    let full = ModelConfig { decoder_attention_heads: 4, ..model(2) };
    let mut curves: Vec<(usize, Vec<String>, Vec<u8>)> = Vec::new();
    for (world, parts, mode, more) in [
        (2, 2, Sharding::None, ""),
        (4, 2, Sharding::Full, ""),
        (4, 2, Sharding::Optimizer, "train.hybrid=2"),
        (4, 4, Sharding::None, ""),
        (4, 2, Sharding::None, "train.sequence_ranks=2"),
    ] {
        let directory = prepared.place(&format!("blocks-{world}-{parts}-{}-{}", mode.name(), more.len()));
        let tensor = format!("train.tensor_ranks={parts}");
        let sharding = sharding(mode);
        let mut all = vec![set[0], set[1], &tensor, &sharding];
        all.extend(Some(more).filter(|more| !more.is_empty()));
        succeed(prepared.job(&directory, &all).args(["--nproc", &world.to_string()]));
        assert_near(&directory, &one);
        if more.contains("sequence") {
            continue;
        }
        // The same bits for every sharding and any number of ranks that share blocks by as many.
        let own = (parts, curve(&directory), exported(&directory));
        match curves.iter().find(|(of, ..)| *of == parts) {
            Some(same) => assert!(*same == own, "{world} {parts} {mode:?}"),
            None => curves.push(own),
        }
        // A step without evaluation and checkpoint.
        let sent = lines(&directory)[4]["sent_bytes"].as_f64().unwrap();
        if more.is_empty() {
            let partition = Partition::of(ParameterList::part(&full, 0, parts), world / parts);
            let rounds = MICRO_BATCHES / (world / parts);
            let joined = rounds as u64 * joined_bytes(&full, 32, 0, parts, [4, 4]);
            let want = (joined + sent_bytes(&partition, 0, mode, rounds, [4, 4])) as f64;
            // Heads of messages of 18 bytes: eight operations a block and micro batch, to each of the others.
            let heads = (18 * 8 * 2 * rounds * (parts - 1)) as f64;
            assert!(
                sent >= want && sent <= 1.02 * want + heads + 2000.0,
                "{world} {parts} {mode:?}: {sent} for {want}"
            );
        }
    }
    // What cannot be shared.
    for (nproc, parts, reason) in [
        ("3", 3, "3 ranks cannot share the 4 heads and glu_dim = 128 of a block; 1, 2, 4 can"),
        ("3", 2, "3 ranks are not a multiple"),
    ] {
        let mut command =
            prepared.job(&prepared.place("refused-parts"), &[FOUR_HEADS, &format!("train.tensor_ranks={parts}")]);
        let output = command.args(["--nproc", nproc]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains(reason), "{}", said(&output));
    }
}

#[test]
fn a_checkpoint_of_shared_blocks_is_continued_by_any_other_number_of_ranks() {
    let prepared = prepared();
    let one = prepared.place("heads-12");
    let set = ["train.steps=12", "train.checkpoint_every_steps=6", FOUR_HEADS];
    succeed(&mut prepared.job(&one, &set));
    // Both parts of both halves of the shards.
    let saved = prepared.place("saved-parts");
    let half = ["train.steps=6", set[1], FOUR_HEADS];
    let two = ["train.tensor_ranks=2", "train.sharding=full"];
    let whole = prepared.place("parts-12");
    succeed(prepared.job(&whole, &[set[0], set[1], set[2], two[0]]).args(["--nproc", "2"]));
    succeed(prepared.job(&saved, &[half[0], half[1], half[2], two[0], two[1]]).args(["--nproc", "4"]));
    let checkpoint = saved.join("checkpoints/step-000006");
    let facts = train::describe(&checkpoint).unwrap();
    assert_eq!(facts.facts["parameters"], ModelConfig { decoder_attention_heads: 4, ..model(2) }.parameters());
    let names: Vec<&str> = facts.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    assert!(names.iter().any(|name| name.starts_with("model.layers.0.token_mixer.out_proj.weight@16/32")), "{names:?}");
    assert_eq!(names.iter().filter(|name| name.starts_with("lm_head.weight")).count(), 2);
    // What other commands read of it.
    let saved_path = saved.to_str().unwrap();
    for command in [
        vec!["generate", "--max-tokens", "2", "--prompt", "a", "--device", "cpu", "--checkpoint", saved_path],
        vec!["inspect", checkpoint.to_str().unwrap()],
    ] {
        succeed(fulgurite().args(command));
    }
    let ids = prepared.place("ids.json");
    fs::write(&ids, "[[1, 2, 3, 4, 5, 6, 7, 8]]").unwrap();
    let evaluated = |model: &Path| {
        let mut command = fulgurite();
        command.args(["evaluate", "--json", "--ids"]).arg(&ids).arg("--model").arg(model);
        succeed(&mut command).stdout
    };
    exported(&saved);
    assert_eq!(evaluated(&checkpoint), evaluated(&saved.join("exported")));
    for (world, parts) in [(1, 1), (4, 4), (2, 1), (2, 2)] {
        let directory = prepared.place(&format!("parts-to-{world}-{parts}"));
        copy(&saved, &directory);
        let parts_set = format!("train.tensor_ranks={parts}");
        succeed(prepared.job(&directory, &[set[0], set[1], set[2], &parts_set]).args(["--nproc", &world.to_string()]));
        assert_near(&directory, &one);
        if parts == 2 {
            // As if it had never stopped, whatever was sharded.
            assert_eq!(curve(&directory), curve(&whole));
            assert!(exported(&directory) == exported(&whole));
        }
    }
    // And the other way.
    let saved = prepared.place("saved-whole");
    succeed(prepared.job(&saved, &half).args(["--nproc", "1"]));
    for parts in [2, 4] {
        let directory = prepared.place(&format!("whole-to-{parts}"));
        copy(&saved, &directory);
        let parts_set = format!("train.tensor_ranks={parts}");
        succeed(prepared.job(&directory, &[set[0], set[1], set[2], &parts_set]).args(["--nproc", &parts.to_string()]));
        assert_near(&directory, &one);
    }
}

#[test]
fn copies_of_shards_give_the_bits_of_one_process() {
    let prepared = prepared();
    for mode in [Sharding::Optimizer, Sharding::Full] {
        let directory = prepared.place(&format!("hybrid-{}", mode.name()));
        let set = ["train.hybrid=2", &sharding(mode)];
        // Stopped and continued, at once or not.
        prepared.run(&directory, 4, &[&set[..], &["train.steps=3"]].concat());
        prepared.run(&directory, 4, &set);
        assert_eq!(curve(&directory), prepared.curve, "{mode:?}");
        assert!(exported(&directory) == prepared.weights, "{mode:?}");
        // One copy of the shards of two ranks.
        let checkpoint = fs::read_dir(directory.join("checkpoints/step-000006")).unwrap();
        let names = checkpoint.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut shards: Vec<String> = names.filter(|name| name.starts_with("weights")).collect();
        shards.sort();
        assert_eq!(shards, ["weights-00000-of-00002.safetensors", "weights-00001-of-00002.safetensors"]);
    }
    let directory = prepared.place("hybrid-refused");
    let mut command = prepared.job(&directory, &[&sharding(Sharding::Full), "train.hybrid=2"]);
    let text = refused(command.args(["--nproc", "3"]), 2);
    assert!(text.contains("3 ranks are not a multiple of 2"), "{text}");
}

#[test]
fn ranks_with_unequal_shares_give_the_curve_within_roundings_and_their_checkpoint_goes_on_with_others() {
    let prepared = prepared();
    // Eight rows: two, three and three.
    for mode in [Sharding::None, Sharding::Full] {
        let directory = prepared.place(&format!("3-{}", mode.name()));
        prepared.run(&directory, 3, &[&sharding(mode)]);
        assert_within_roundings(&directory);
    }
    let directory = prepared.place("from-3-to-2");
    prepared.run(&directory, 3, &[&sharding(Sharding::Gradients), "train.steps=3"]);
    assert!(directory.join("checkpoints/step-000003/optimizer-00002-of-00003.safetensors").exists());
    prepared.run(&directory, 2, &[&sharding(Sharding::Optimizer)]);
    assert_within_roundings(&directory);
}

#[test]
fn ranks_that_have_no_piece_of_a_bucket_give_the_bits_of_one_process() {
    let prepared = prepared();
    let small = ["train.model.decoder_embed_dim=8", "train.steps=3", "train.evaluation.every_steps=2"];
    let one = prepared.place("small-one");
    succeed(&mut prepared.job(&one, &small));
    for mode in [Sharding::Optimizer, Sharding::Full] {
        let directory = prepared.place(&format!("small-8-{}", mode.name()));
        let kind = sharding(mode);
        prepared.run(&directory, 8, &[&small[..], &[kind.as_str()]].concat());
        assert_eq!(curve(&directory), curve(&one), "{mode:?}");
        assert!(exported(&directory) == exported(&one), "{mode:?}");
    }
    // So it is: two chunks of a layer for eight ranks.
    let model = ModelConfig { decoder_embed_dim: 8, hidden_dim: 8, glu_dim: 64, ..model(2) };
    assert!(Partition::new(&model, 8).pieces(1)[2..].iter().all(|piece| piece.is_empty()));
}

#[test]
fn a_rank_holds_what_the_formulas_of_zero_say() {
    const LAYERS: usize = 48;
    let prepared = prepared();
    let partition = Partition::new(&model(LAYERS), 4);
    let largest = partition.buckets().iter().map(|bucket| 4 * bucket.len() as u64).max().unwrap();
    for mode in Sharding::ALL {
        let directory = prepared.place(&format!("memory-{}", mode.name()));
        let layers = format!("train.model.decoder_layers={LAYERS}");
        // One micro batch a rank: with more, sums of them are kept, whole.
        let set = [
            "train.gradient_accumulation=4",
            "train.steps=3",
            "train.evaluation.every_steps=0",
            &layers,
            &sharding(mode),
        ];
        prepared.run(&directory, 4, &set);
        let held = lines(&directory)[1]["state_bytes"].as_u64().unwrap();
        let want = host_state_bytes(&partition, 0, mode);
        println!("{mode:?}: {held} bytes, the formula {want}, the largest bucket {largest}");
        // A few buckets are made, sent and received at any moment.
        let transient = if mode == Sharding::None { 0 } else { TRANSIENT * largest };
        assert!(held <= want + want / 20 + transient, "{mode:?}: {held} for {want}");
        // And it is counted: weights and moments at least.
        let at_least = match mode {
            Sharding::None => 3 * want / 4,
            Sharding::Optimizer => want - 4 * partition.parameters().total() as u64,
            Sharding::Gradients | Sharding::Full => want - 4 * partition.shard_len(0) as u64,
        };
        assert!(held >= at_least, "{mode:?}: {held} for {at_least}");
    }
}

#[test]
fn a_checkpoint_of_four_ranks_is_continued_by_one_two_and_eight() {
    let prepared = prepared();
    let saved = prepared.place("saved");
    let set = ["train.steps=3", &sharding(Sharding::Full)];
    prepared.run(&saved, 4, &set);
    let checkpoint = saved.join("checkpoints/step-000003");
    let mut names: Vec<String> =
        fs::read_dir(&checkpoint).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.ends_with(".safetensors"));
    names.sort();
    let kinds = ["optimizer", "weights"].into_iter();
    let want: Vec<String> =
        kinds.flat_map(|kind| (0..4).map(move |rank| format!("{kind}-{rank:05}-of-00004.safetensors"))).collect();
    assert_eq!(names, want);
    // What other commands read of it.
    succeed(
        fulgurite()
            .args(["generate", "--max-tokens", "2", "--prompt", "a", "--device", "cpu", "--checkpoint"])
            .arg(&saved),
    );
    succeed(fulgurite().arg("inspect").arg(&checkpoint));
    for (world, mode) in [(1, Sharding::None), (2, Sharding::Optimizer), (8, Sharding::None)] {
        let directory = prepared.place(&format!("from-4-to-{world}"));
        copy(&saved, &directory);
        prepared.run(&directory, world, &[&sharding(mode)]);
        assert_eq!(curve(&directory), prepared.curve, "{world}");
        assert!(exported(&directory) == prepared.weights, "{world}");
    }
}

#[test]
fn a_damaged_checkpoint_is_set_aside_by_all_ranks_and_one_that_cannot_be_read_stops_all() {
    let prepared = prepared();
    let saved = prepared.place("to-damage");
    prepared.run(&saved, 2, &[&sharding(Sharding::Full)]);
    let shard = "optimizer-00001-of-00002.safetensors";
    // Two checkpoints; the newer one has a flipped byte, or lacks a file: nobody goes on from it, and it stays beside.
    let flip = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let remove = |path: &Path| fs::remove_file(path).unwrap();
    for (name, damage) in [("flipped", &flip as &dyn Fn(&Path)), ("missing", &remove)] {
        let directory = prepared.place(name);
        copy(&saved, &directory);
        damage(&directory.join("checkpoints/step-000006").join(shard));
        let output = prepared.run(&directory, 2, &["train.keep_checkpoints=1"]);
        assert!(said(&output).contains(shard) && said(&output).contains("step-000006.damaged"), "{}", said(&output));
        assert_eq!(curve(&directory), prepared.curve, "{name}");
        let mut left: Vec<String> = fs::read_dir(directory.join("checkpoints"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["step-000006", "step-000006.damaged"], "{name}");
    }
    // A file that one rank cannot read for now: all stop, and nothing is lost.
    let directory = prepared.place("unreadable");
    copy(&saved, &directory);
    let (path, away) = (directory.join("checkpoints/step-000006").join(shard), directory.join("away"));
    fs::rename(&path, &away).unwrap();
    fs::create_dir(&path).unwrap();
    let text = refused(prepared.job(&directory, &[]).args(["--nproc", "2"]), 1);
    assert!(text.contains(shard) && text.contains("no checkpoint was changed"), "{text}");
    fs::remove_dir(&path).unwrap();
    fs::rename(&away, &path).unwrap();
    let output = prepared.run(&directory, 2, &["train.steps=7"]);
    assert!(!said(&output).contains("damaged"), "{}", said(&output));
    assert_eq!(curve(&directory)[..STEPS], prepared.curve);
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target)
        } else {
            fs::copy(entry.path(), target).map(drop).unwrap()
        }
    }
}

fn wait_for_lines(directory: &Path, count: usize, children: &mut [Child]) {
    let begin = Instant::now();
    while lines(directory).len() < count {
        for child in children.iter_mut() {
            assert!(child.try_wait().unwrap().is_none(), "it ended early");
        }
        assert!(begin.elapsed() < Duration::from_secs(120), "no line {count}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn send(signal: &str, child: &Child) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

/// Sends `signal` to rank 1 of three, and looks at how the others end.
fn lost(name: &str, signal: &str, words: &str) {
    // Longer than a loaded disk takes for a checkpoint.
    const TIMEOUT_S: u64 = 6;
    let prepared = prepared();
    let directory = prepared.place(name);
    let set = ["train.steps=1000000", "train.evaluation.every_steps=0", &sharding(Sharding::Full)];
    let extra = |_| vec!["--rank-timeout-s".to_owned(), TIMEOUT_S.to_string()];
    let mut ranks = prepared.ranks(&directory, 3, &set, extra);
    wait_for_lines(&directory, 4, &mut ranks);
    let begin = Instant::now();
    send(signal, &ranks[1]);
    let mut victim = ranks.remove(1);
    for rank in ranks {
        let output = rank.wait_with_output().unwrap();
        let text = said(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("rank 1 ") && text.contains(words), "{text}");
    }
    // The time, and what a loaded machine takes to end processes.
    assert!(begin.elapsed() < Duration::from_secs(TIMEOUT_S + 15), "{:?}", begin.elapsed());
    victim.kill().unwrap();
    victim.wait().unwrap();
    // The job goes on from its last checkpoint, with the curve it had.
    let newest = train::checkpoint::list(&directory.join("checkpoints")).unwrap().pop().unwrap().0;
    let steps = format!("train.steps={}", newest + 2);
    succeed(prepared.job(&directory, &[&steps, set[1], set[2]]).args(["--nproc", "2"]));
    assert_eq!(lines(&directory).len() as u64, newest + 2);
}

#[test]
fn a_rank_that_dies_is_named_by_the_others_and_the_job_goes_on() {
    lost("killed", "-KILL", "ended without a word");
}

#[test]
fn a_rank_that_hangs_is_named_by_the_others_and_the_job_goes_on() {
    lost("stopped", "-STOP", "no sign of life");
}

#[test]
fn sigterm_saves_and_exits_with_0() {
    let prepared = prepared();
    let directory = prepared.place("terminated");
    let mut command = prepared.job(&directory, &["train.steps=1000000", "train.checkpoint_every_steps=0"]);
    command.args(["--nproc", "2"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut launcher = [command.spawn().unwrap()];
    wait_for_lines(&directory, 3, &mut launcher);
    // Schedulers and launchers both send it: the second says nothing new.
    send("-TERM", &launcher[0]);
    send("-TERM", &launcher[0]);
    let [launcher] = launcher;
    let output = launcher.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let path = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    train::checkpoint::verify(&path).unwrap();
    let step: usize = path.file_name().unwrap().to_str().unwrap().strip_prefix("step-").unwrap().parse().unwrap();
    assert_eq!(lines(&directory).len(), step, "stopped after the step that was under way");
    // Nothing is lost: one process goes on.
    succeed(&mut prepared.job(&directory, &[&format!("train.steps={}", step + 1)]));
    assert_eq!(lines(&directory).len(), step + 1);
    // A person stops the launcher: all save, none counts as failed.
    let mut command = prepared.job(&directory, &["train.steps=1000000", "train.checkpoint_every_steps=0"]);
    command.args(["--nproc", "2"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut launcher = [command.spawn().unwrap()];
    wait_for_lines(&directory, step + 3, &mut launcher);
    send("-INT", &launcher[0]);
    let [launcher] = launcher;
    let output = launcher.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", said(&output));
    assert!(!said(&output).contains("ended with") && !said(&output).contains("killed"), "{}", said(&output));
    let (newest, path) = train::checkpoint::list(&directory.join("checkpoints")).unwrap().pop().unwrap();
    train::checkpoint::verify(&path).unwrap();
    assert_eq!(lines(&directory).len() as u64, newest);
}

#[test]
fn sigterm_to_every_rank_at_once_and_before_all_have_come() {
    let prepared = prepared();
    let directory = prepared.place("each-terminated");
    let set = ["train.steps=1000000", "train.evaluation.every_steps=0", "train.checkpoint_every_steps=0"];
    let mut ranks = prepared.ranks(&directory, 2, &set, |_| Vec::new());
    wait_for_lines(&directory, 3, &mut ranks);
    for rank in [0, 1, 1, 0] {
        send("-TERM", &ranks[rank]);
    }
    for rank in ranks {
        let output = rank.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    }
    let (newest, path) = train::checkpoint::list(&directory.join("checkpoints")).unwrap().pop().unwrap();
    train::checkpoint::verify(&path).unwrap();
    assert_eq!(lines(&directory).len() as u64, newest);
    // Rank 0, whose others never come: nothing was begun, nothing is to be saved.
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut command = prepared.job(&prepared.place("alone-terminated"), &set);
    command.env("RANK", "0").env("WORLD_SIZE", "2").env("MASTER_ADDR", "127.0.0.1");
    command.env("MASTER_PORT", free.port().to_string()).stderr(Stdio::piped());
    let mut rank = command.spawn().unwrap();
    let begin = Instant::now();
    while TcpStream::connect(free).is_err() {
        assert!(rank.try_wait().unwrap().is_none() && begin.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
    send("-TERM", &rank);
    let output = rank.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(begin.elapsed() < Duration::from_secs(60), "it waits for the others: {:?}", begin.elapsed());
}

#[test]
fn what_ranks_cannot_start_with_is_refused() {
    let prepared = prepared();
    let directory = prepared.place("refused");
    // Settings that differ: every rank names the key.
    let extra = |rank| match rank {
        1 => vec!["--set".to_owned(), "train.optimizer.beta1=0.8".to_owned()],
        _ => Vec::new(),
    };
    for rank in prepared.ranks(&directory, 2, &[], extra) {
        let output = rank.wait_with_output().unwrap();
        let text = said(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains("optimizer.beta1") && text.contains("0.8 on rank 1 and 0.9 on rank 0"), "{text}");
    }
    // Held-out rows that one rank has not: they are evaluated by all together.
    let elsewhere = prepared.place("without-held-out");
    copy(&prepared.place("run"), &elsewhere);
    fs::remove_dir_all(elsewhere.join("tokens_validation")).unwrap();
    let tokens = format!("tokens={elsewhere:?}");
    let extra = |rank| if rank == 1 { vec!["--set".to_owned(), tokens.clone()] } else { Vec::new() };
    for rank in prepared.ranks(&directory, 2, &[], extra) {
        let output = rank.wait_with_output().unwrap();
        let text = said(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("held-out rows is null on rank 1"), "{text}");
    }
    // Ranks that do not come.
    let extra = |_| vec!["--rank-timeout-s".to_owned(), "1".to_owned()];
    let mut ranks = prepared.ranks(&directory, 3, &[], extra);
    for rank in &mut ranks[1..] {
        rank.kill().unwrap();
        rank.wait().unwrap();
    }
    let output = ranks.remove(0).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    // One of them may have come before it was killed.
    assert!(said(&output).contains("did not come") || said(&output).contains("rank "), "{}", said(&output));
    // More ranks than rows, and a launcher in a launcher.
    let mut command = prepared.job(&directory, &["train.gradient_accumulation=1"]);
    let text = refused(command.args(["--nproc", "2"]), 2);
    assert!(text.contains("each needs one"), "{text}");
    for count in ["1", "2"] {
        let text = refused(prepared.job(&directory, &[]).args(["--nproc", count]).env("RANK", "0"), 2);
        assert!(text.contains("RANK is set"), "{text}");
    }
}

#[test]
fn one_rank_in_a_batch_script_of_slurm_is_alone() {
    let prepared = prepared();
    let directory = prepared.place("sbatch");
    let mut command = prepared.job(&directory, &["train.steps=3"]);
    let of_script =
        [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4"), ("SLURM_JOB_ID", "1"), ("SLURM_JOB_NODELIST", "n[1-4]")];
    succeed(command.args(["--nproc", "1"]).envs(of_script));
    assert_eq!(curve(&directory), prepared.curve[..3]);
}

#[test]
fn an_estimate_tells_of_ranks() {
    let mut command = fulgurite();
    command.arg("train").arg(root().join("configs/train/tnl-7b.toml")).args(["--estimate", "--nproc", "64", "--json"]);
    let told: serde_json::Value = serde_json::from_slice(&succeed(&mut command).stdout).unwrap();
    assert_eq!(told["parameters"], 7_098_863_616u64);
    let modes = told["scaling"]["modes"].as_array().unwrap();
    assert_eq!(modes.len(), 4);
    assert_eq!(modes[0]["zero_bytes"], 16 * 7_098_863_616u64);
    assert_eq!((&modes[3]["sharding"], &modes[3]["fits"]), (&"full".into(), &true.into()));
    assert_eq!(told["scaling"]["scales"].as_array().unwrap().len(), 12);
    let mut command = fulgurite();
    command.arg("train").arg(root().join("configs/train/tnl-7b.toml")).args(["--estimate", "--nproc", "8"]);
    let text = String::from_utf8(succeed(&mut command).stdout).unwrap();
    assert!(text.contains("of each of 8 ranks") && text.contains("1024") && text.contains("fitted"), "{text}");
    let mut command = fulgurite();
    command.arg("train").arg(root().join("configs/train/tnl-7b.toml")).args(["--estimate", "--nproc", "12"]);
    let text = refused(command.args(["--set", "train.hybrid=8", "--set", "train.sharding=\"full\""]), 2);
    assert!(text.contains("12 ranks are not a multiple of 8"), "{text}");
    let mut command = fulgurite();
    command.arg("train").arg(root().join("configs/train/tnl-7b.toml")).args([
        "--set",
        "train.tensor_ranks=4",
        "--estimate",
    ]);
    let shared = String::from_utf8(succeed(command.args(["--nproc", "8"])).stdout).unwrap();
    assert!(shared.contains("of each of 8 ranks, where 4 share each block"), "{shared}");
}
