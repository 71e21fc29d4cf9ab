//! `kill -9` at any moment, then the same command: the outputs are those of an uninterrupted run, byte
//! for byte, for any number of threads.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod support;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;
use std::time::{Duration, Instant};

use support::{fulgurite, nothing_was_done_twice, outputs, small_recipe, succeed};

const KILLS: u32 = 20;

fn run(recipe: &Path, dir: &Path, threads: u32) -> std::process::Command {
    let mut command = fulgurite();
    command.args(["run", "-q", "--device", "cpu", "--threads", &threads.to_string(), "--run-dir"]).arg(dir).arg(recipe);
    command
}

#[test]
fn killed_twenty_times_at_random_moments_the_outputs_are_those_of_a_whole_run() {
    let work = tempfile::tempdir().unwrap();
    let recipe = small_recipe(work.path());
    let started = Instant::now();
    let whole = work.path().join("one-thread");
    succeed(&mut run(&recipe, &whole, 1));
    let duration = started.elapsed();
    let expected = outputs(&whole);
    assert!(expected.keys().any(|p| p.ends_with("tokenizer.json")));
    assert!(expected.keys().any(|p| p.starts_with("train")), "{expected:?}");

    let seed = RandomState::new().build_hasher().finish();
    println!("whole run {duration:?}; seed of the moments: {seed}");
    let mut state = seed;
    let mut random = || {
        // SplitMix64 (Steele et al. 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let killed = work.path().join("killed");
    let (mut kills, mut finished) = (0, 0);
    while kills < KILLS {
        let threads = 1 + kills % 3;
        let mut child = run(&recipe, &killed, threads).spawn().unwrap();
        // Long enough that most attempts commit something, short enough that none does all.
        let moment = Duration::from_secs_f64(duration.as_secs_f64() * 0.45 * random());
        let started = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success(), "run after {kills} kills: {status}");
                assert_eq!(outputs(&killed), expected, "after {kills} kills, seed {seed}");
                std::fs::remove_dir_all(&killed).unwrap();
                finished += 1;
                break;
            }
            if started.elapsed() >= moment {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    println!("{kills} kills over {} runs", finished + 1);
    succeed(&mut run(&recipe, &killed, 4));
    nothing_was_done_twice(&killed);
    assert_eq!(outputs(&killed), expected, "seed {seed}");

    // All is done: nothing is touched again.
    let journal = std::fs::read(killed.join("filter/journal.jsonl")).unwrap();
    succeed(&mut run(&recipe, &killed, 2));
    assert_eq!(std::fs::read(killed.join("filter/journal.jsonl")).unwrap(), journal);

    a_changed_threshold_redoes_only_the_decision_and_what_follows(&recipe, &killed);
    a_damaged_shard_is_made_again(&recipe, &killed);
}

fn a_changed_threshold_redoes_only_the_decision_and_what_follows(recipe: &Path, dir: &Path) {
    let before = outputs(dir);
    let journal = |stage: &str| std::fs::read(dir.join(stage).join("journal.jsonl")).unwrap();
    let (ingest, signals) = (journal("ingest"), journal("signals"));
    let set = ["--set", "filter.rules=[{name=\"short\", drop_when=\"word_count < 300\"}]"];
    let plan = succeed(run(recipe, dir, 2).args(set).arg("--dry-run"));
    let plan = String::from_utf8(plan.stdout).unwrap();
    let word = |stage: &str| {
        let line = plan.lines().find(|l| l.split_whitespace().next() == Some(stage)).unwrap();
        line.split_whitespace().nth(1).unwrap().trim_end_matches(':').to_string()
    };
    assert_eq!(
        [word("ingest"), word("signals"), word("filter"), word("near"), word("train")],
        ["done", "done", "stale", "stale", "stale"],
        "{plan}"
    );
    assert!(plan.contains("rules: ") && plan.contains(" entries"), "{plan}");

    succeed(run(recipe, dir, 2).args(set).args(["--until", "curate"]));
    assert_eq!((journal("ingest"), journal("signals")), (ingest, signals));
    let after = outputs(dir);
    let curated = Path::new("curate/part-00000.parquet");
    assert_ne!(before[curated], after[curated]);
    // And back: the old outputs again.
    succeed(&mut run(recipe, dir, 2));
    assert_eq!(outputs(dir), before);
}

fn a_damaged_shard_is_made_again(recipe: &Path, dir: &Path) {
    let before = outputs(dir);
    let damaged = dir.join("curate/part-00001.parquet");
    let mut bytes = std::fs::read(&damaged).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    std::fs::write(&damaged, bytes).unwrap();
    std::fs::remove_file(dir.join("signals/part-00000.parquet")).unwrap();
    let plan = succeed(run(recipe, dir, 1).arg("--dry-run"));
    let plan = String::from_utf8(plan.stdout).unwrap();
    // Sizes alone show what is missing, not what changed in place.
    let sizes = succeed(run(recipe, dir, 1).args(["--dry-run", "--verify", "sizes"]));
    let sizes = String::from_utf8(sizes.stdout).unwrap();
    assert!(sizes.contains("is missing") && !sizes.contains("checksum"), "{sizes}");
    assert!(
        plan.contains("part-00001.parquet fails its checksum") && plan.contains("part-00000.parquet is missing"),
        "{plan}"
    );
    succeed(&mut run(recipe, dir, 2));
    assert_eq!(outputs(dir), before);
}
