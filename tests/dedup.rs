//! `kill -9` in every phase of deduplication, then the same command: the outputs are those of an uninterrupted run,
//! byte for byte, for any number of threads.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use support::{fulgurite, is_done, nothing_was_done_twice, outputs, succeed};

/// Every stage behind the documents, in order.
const STAGES: [&str; 25] = [
    "exact_url_hashes",
    "exact_url_groups",
    "exact_url_removals",
    "exact_url",
    "exact_hashes",
    "exact_groups",
    "exact_removals",
    "exact",
    "near_signatures",
    "near_pairs",
    "near_sets",
    "near_verified",
    "near_clusters",
    "near_removals",
    "near",
    "line_hashes",
    "line_counts",
    "lines",
    "substring_anchors",
    "substring_candidates",
    "substring_windows",
    "substring_repeats",
    "substring",
    "decontaminate",
    "curate",
];

/// SplitMix64 (Steele et al. 2014).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as usize % n
    }

    fn words(&mut self, n: usize) -> Vec<String> {
        (0..n).map(|_| format!("w{}", self.below(5000))).collect()
    }
}

/// What a recipe does with the corpus, where each stage can do its work in one of two ways.
const WITH_COUNTS_AND_SETS: &str = r#"
[near]
mode = "fast"
verify = "exact"

[lines]

[substring]
length = 30

[decontaminate]
action = "mask"
benchmarks = [{ name = "quiz", paths = ["quiz.jsonl"] }]
"#;

const WITH_A_FILTER_AND_SKETCHES: &str = r#"
[near]
mode = "fast"
bands = 20
rows = 6
verify = "sketch"
keep = "longest"

[lines]
method = "bloom"
expected_lines = 200_000

[substring]
measure = "bytes"
length = 40

[decontaminate]
benchmarks = [{ name = "quiz", paths = ["quiz.jsonl"] }]
"#;

/// 3,000 documents of some 300 words: copies, near copies, copied spans, pages of one URL, common lines. The path of a recipe
/// with these tables, behind exact deduplication.
fn corpus(dir: &Path, tables: &str) -> PathBuf {
    let mut numbers = Numbers(5);
    let mut documents: Vec<Vec<String>> = Vec::new();
    let mut lines = String::new();
    for i in 0..3000 {
        let older = documents.get(i / 2).cloned().unwrap_or_default();
        let mut words = match i % 10 {
            0 => older,
            1 => {
                let mut words = older;
                (0..3).for_each(|_| {
                    let at = numbers.below(words.len().max(1));
                    words.splice(at..at, numbers.words(1));
                });
                words
            }
            2 => {
                let mut words = numbers.words(100);
                words.extend(older.into_iter().skip(20).take(40));
                words.extend(numbers.words(100));
                words
            }
            _ => Vec::new(),
        };
        if words.is_empty() {
            words = numbers.words(250 + i % 100);
        }
        let text: Vec<String> = words.chunks(12).map(|line| line.join(" ")).collect();
        let footer = if i % 3 == 0 { "\nAccept all cookies\nRead the terms of use" } else { "" };
        let record = serde_json::json!({
            "text": format!("{}{footer}", text.join("\n")),
            "url": format!("https://example.org/{}", if i % 25 == 0 { i / 100 } else { i + 1000 }),
        });
        lines.push_str(&format!("{record}\n"));
        documents.push(words);
    }
    std::fs::write(dir.join("documents.jsonl"), lines).unwrap();
    let question = documents[77][30..50].join(" ");
    std::fs::write(dir.join("quiz.jsonl"), format!("{}\n", serde_json::json!({ "question": question }))).unwrap();
    let head = r#"
name = "dedup"

[ingest]
split_bytes = 600000

[[ingest.inputs]]
source = "made"
paths = ["documents.jsonl"]

[exact]
by = ["url", "text"]
"#;
    let path = dir.join("dedup.toml");
    std::fs::write(&path, format!("{head}{tables}")).unwrap();
    path
}

fn run(recipe: &Path, dir: &Path, threads: u32) -> Command {
    let mut command = fulgurite();
    command.args(["run", "-q", "--threads", &threads.to_string(), "--run-dir"]).arg(dir).arg(recipe);
    command
}

#[test]
fn killed_in_every_phase_of_deduplication_the_outputs_are_those_of_a_whole_run() {
    killed(WITH_COUNTS_AND_SETS, &STAGES, 8);
}

#[test]
fn so_are_those_by_sketches_and_a_bloom_filter() {
    // The phases that do other work than those of the other recipe.
    let phases = [
        "near_signatures",
        "near_pairs",
        "near_verified",
        "near_removals",
        "line_filter",
        "lines",
        "substring_anchors",
        "substring_windows",
        "substring",
        "decontaminate",
    ];
    killed(WITH_A_FILTER_AND_SKETCHES, &phases, 3);
}

/// Run a recipe with these tables on one thread, then with a `kill -9` in each of `phases` on two and on five: the outputs are
/// the same. At least so many of the kills must have been within their phase.
fn killed(tables: &str, phases: &[&str], least: usize) {
    let work = tempfile::tempdir().unwrap();
    let recipe = corpus(work.path(), tables);
    let whole = work.path().join("one-thread");
    succeed(&mut run(&recipe, &whole, 1));
    let expected = outputs(&whole);
    for stage in phases {
        assert!(expected.keys().any(|path| path.starts_with(stage)), "{stage} has no files");
    }
    for (table, least) in [
        ("exact_url_removals", 20),
        ("exact_removals", 100),
        ("near_removals", 100),
        ("substring_cuts", 100),
        ("decontaminate_matches", 1),
    ] {
        let count = format!("select count(*) as n from {table}");
        let said = succeed(fulgurite().args(["sql", "--json"]).arg(&whole).arg(&count));
        let said = String::from_utf8(said.stdout).unwrap();
        let n: u64 = said.chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap();
        assert!(n >= least, "{table}: {said}");
    }

    let mut numbers = Numbers(11);
    for threads in [2, 5] {
        let dir = work.path().join(format!("killed-{threads}"));
        let mut unfinished = Vec::new();
        for &stage in phases {
            if dir.join(stage).join("manifest.json").exists() {
                continue;
            }
            let mut child = run(&recipe, &dir, threads).spawn().unwrap();
            while !dir.join(stage).join("manifest.json").exists() {
                assert!(child.try_wait().unwrap().is_none(), "ended before {stage} began");
                std::thread::sleep(Duration::from_micros(200));
            }
            std::thread::sleep(Duration::from_micros(numbers.below(12_000) as u64));
            child.kill().unwrap();
            child.wait().unwrap();
            if !is_done(&dir, stage) {
                unfinished.push(stage);
            }
        }
        println!("{threads} threads: killed within {} stages: {}", unfinished.len(), unfinished.join(", "));
        assert!(unfinished.len() >= least, "the kills came too late to say much");
        succeed(&mut run(&recipe, &dir, threads));
        nothing_was_done_twice(&dir);
        assert_eq!(outputs(&dir), expected, "{threads} threads");
    }
}

#[test]
fn a_plan_says_what_is_found_and_what_it_takes_before_anything_runs() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("near.toml");
    // The input is not there: a plan looks at the table alone.
    let text = "name = \"near\"\n[[ingest.inputs]]\nsource = \"web\"\npaths = [\"crawl-*.jsonl.zst\"]\n[near]\nmode = \"fast\"\nverify = \"sketch\"\n";
    std::fs::write(&recipe, text).unwrap();
    let plan = |more: &[&str]| {
        let mut command = fulgurite();
        let said = succeed(command.args(["dedup", "plan", "--documents", "1e8"]).args(more).arg(&recipe));
        String::from_utf8(said.stdout).unwrap()
    };
    let said: serde_json::Value = serde_json::from_str(&plan(&["--json"])).unwrap();
    let curve = said["curve"].as_array().unwrap();
    let at = |similarity: f64, what: &str| {
        let point = curve.iter().find(|p| (p["similarity"].as_f64().unwrap() - similarity).abs() < 1e-9).unwrap();
        point[what].as_f64().unwrap()
    };
    // 1 − (1 − J⁸)¹⁴; and a sketch keeps what is well above the threshold, not what is well below.
    for (similarity, found) in [(0.7, 0.565), (0.75, 0.772), (0.8, 0.924), (0.85, 0.988), (0.9, 0.9996), (0.95, 1.0)] {
        assert!((at(similarity, "found") - found).abs() < 0.002, "{similarity}: {}", at(similarity, "found"));
    }
    assert!(at(0.65, "kept") < 0.01 && at(0.9, "kept") > 0.99, "{said}");
    let bytes = said["signature_bytes_per_document"].as_f64().unwrap();
    assert!((190.0..=200.0).contains(&bytes), "{bytes}");
    assert_eq!(said["union_find_bytes"], 400_000_000);
    assert!(said["disk_bytes"].as_u64().unwrap() > 20_000_000_000);
    let said = plan(&["--set", "near.bands=20", "--set", "near.rows=4"]);
    assert!(said.contains("100,000,000 documents") && said.contains("20 bands of 4 permutations"), "{said}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was written");
}
