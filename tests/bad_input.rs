//! Bad input is counted and quarantined with its reason, never lost and never fatal without a limit.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pipeline::digest::Digest;

use support::{fulgurite, outputs, root, small_recipe, succeed};

fn recipe(dir: &Path, base: &Path, limit: u64, extra: &str, paths: &str) -> PathBuf {
    let path = dir.join("bad.toml");
    let text = format!(
        "name = \"bad\"\nbase_dir = {base:?}\n[ingest]\nmax_bad_records = {limit}\n{extra}\n\
         [[ingest.inputs]]\nsource = \"bad\"\npaths = [{paths}]\n"
    );
    std::fs::write(&path, text).unwrap();
    path
}

const FILES: &str = "\"truncated.jsonl.gz\", \"invalid_utf8.jsonl\", \"broken_lines.jsonl\", \"empty.jsonl\", \
                     \"other_schema.parquet\", \"not_gzip.jsonl.gz\", \"truncated.warc.gz\", \"bad_content_length.warc.gz\"";

fn run(recipe: &Path, dir: &Path) -> Command {
    let mut command = fulgurite();
    command.args(["run", "-q", "--until", "ingest", "--run-dir"]).arg(dir).arg(recipe);
    command
}

fn query(run: &Path, sql: &str) -> Vec<serde_json::Value> {
    let output = succeed(fulgurite().arg("sql").arg(run).arg(sql).arg("--json"));
    String::from_utf8(output.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn every_kind_of_bad_record_is_quarantined_with_file_place_and_reason() {
    let work = tempfile::tempdir().unwrap();
    let run_dir = work.path().join("run");
    let recipe = recipe(work.path(), &root().join("tests/fixtures/bad"), 100, "", FILES);
    succeed(&mut run(&recipe, &run_dir));
    let rows = query(&run_dir, "select file, rule, record, detail from ingest_dropped order by file, \"offset\"");
    let of = |file: &str| -> Vec<&str> {
        rows.iter()
            .filter(|r| r["file"].as_str().unwrap().ends_with(file))
            .map(|r| r["rule"].as_str().unwrap())
            .collect()
    };
    assert_eq!(of("invalid_utf8.jsonl"), ["invalid_utf8"]);
    assert_eq!(of("broken_lines.jsonl"), ["invalid_json", "missing_text", "wrong_type"]);
    assert_eq!(of("empty.jsonl"), ["empty_file"]);
    assert_eq!(of("other_schema.parquet"), ["wrong_schema"]);
    assert_eq!(of("truncated.jsonl.gz"), ["truncated"]);
    for file in ["not_gzip.jsonl.gz", "truncated.warc.gz", "bad_content_length.warc.gz"] {
        assert!(!of(file).is_empty(), "{file}: {rows:?}");
    }
    assert!(
        rows.iter().all(|r| !r["record"].as_str().unwrap().is_empty() && !r["detail"].as_str().unwrap().is_empty())
    );
    // What was good stays: four lines of broken_lines, three of the truncated gzip, and so on.
    let kept = query(&run_dir, "select count(*) as n from ingest")[0]["n"].as_u64().unwrap();
    assert!(kept >= 4 + 3 + 2, "{kept} documents kept");
    let status = succeed(fulgurite().arg("status").arg(&run_dir).arg("--json"));
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    let totals = &status[0]["totals"];
    let dropped: u64 = totals["dropped"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
    assert_eq!(totals["rows_read"].as_u64().unwrap(), kept + dropped);
}

#[test]
fn past_the_limit_the_run_stops_and_says_what_it_met() {
    let work = tempfile::tempdir().unwrap();
    let recipe = recipe(work.path(), &root().join("tests/fixtures/bad"), 2, "", FILES);
    let output = run(&recipe, &work.path().join("run")).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("max_bad_records"), "{text}");
}

#[test]
fn the_limit_holds_within_one_file() {
    let work = tempfile::tempdir().unwrap();
    std::fs::write(work.path().join("rubbish.jsonl"), "{\"txt\": 1}\n{broken\n".repeat(200_000)).unwrap();
    let recipe = recipe(work.path(), work.path(), 10, "", "\"rubbish.jsonl\"");
    let output = run(&recipe, &work.path().join("run")).arg("--threads").arg("1").output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    // Not read to its end, and told what is wrong, once for each reason.
    assert!(text.contains("11 bad records (5 invalid_json, 6 missing_text), more than max_bad_records = 10"), "{text}");
    assert!(text.contains("rubbish.jsonl, line 1: missing_text: no field \"text\" among txt"), "{text}");
    assert!(text.contains("rubbish.jsonl, line 2: invalid_json"), "{text}");
}

#[test]
fn a_line_of_a_gigabyte_is_passed_over_in_little_memory() {
    let work = tempfile::tempdir().unwrap();
    let file = work.path().join("long.jsonl");
    let mut out = std::fs::File::create(&file).unwrap();
    // A hole of the file system: a gigabyte of NUL bytes that takes no room.
    out.set_len(1 << 30).unwrap();
    std::io::Seek::seek(&mut out, std::io::SeekFrom::End(0)).unwrap();
    writeln!(out, "\n{{\"text\": \"the line after it\"}}").unwrap();
    drop(out);
    let extra = "split_bytes = 4294967296";
    let recipe = recipe(work.path(), work.path(), 5, extra, "\"long.jsonl\"");
    let run_dir = work.path().join("run");
    let mut child = run(&recipe, &run_dir).spawn().unwrap();
    let mut peak_kib = 0;
    let status = loop {
        if let Ok(text) = std::fs::read_to_string(format!("/proc/{}/status", child.id())) {
            let line = text.lines().find(|l| l.starts_with("VmHWM:"));
            let kib = line.and_then(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0);
            peak_kib = peak_kib.max(kib);
        }
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    assert!(status.success());
    let rows = query(&run_dir, "select rule from ingest_dropped");
    assert_eq!(rows, [serde_json::json!({ "rule": "too_long" })]);
    assert_eq!(query(&run_dir, "select text from ingest"), [serde_json::json!({ "text": "the line after it" })]);
    if peak_kib == 0 {
        println!("peak memory not checked: no /proc/PID/status here");
    }
    assert!(peak_kib < 500 << 10, "{peak_kib} KiB for a line of 1 GiB");
}

/// The small recipe as far as its curated shards.
fn curate(recipe: &Path, dir: &Path) -> Command {
    let mut command = fulgurite();
    command.args(["run", "-q", "--threads", "2", "--until", "curate", "--run-dir"]).arg(dir).arg(recipe);
    command
}

/// The run stopped at a full disk; `continued`, with room, ended, and `found` is what an undisturbed run writes.
fn is_told_and_mended(full: Output, continued: Output, found: &BTreeMap<PathBuf, Digest>, recipe: &Path, work: &Path) {
    let text = String::from_utf8(full.stderr).unwrap();
    assert_eq!(full.status.code(), Some(1), "{text}");
    assert!(text.contains("no space left"), "{text}");
    assert!(continued.status.success(), "{}", String::from_utf8_lossy(&continued.stderr));
    let whole = work.join("whole");
    succeed(&mut curate(recipe, &whole));
    assert_eq!(*found, outputs(&whole));
}

#[test]
fn a_full_disk_stops_the_run_and_room_lets_it_go_on() {
    let work = tempfile::tempdir().unwrap();
    let disk = work.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let mount = |options: &str| Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&disk).output();
    match mount("size=600k") {
        Ok(output) if output.status.success() => {}
        other => return println!("not run: a small file system cannot be mounted here: {other:?}"),
    }
    let recipe = small_recipe(work.path());
    let run_dir = disk.join("run");
    let full = curate(&recipe, &run_dir).output().unwrap();
    let remounted = mount("remount,size=64m").unwrap();
    let continued = curate(&recipe, &run_dir).output().unwrap();
    let found = outputs(&run_dir);
    Command::new("umount").arg(&disk).status().unwrap();
    assert!(remounted.status.success());
    is_told_and_mended(full, continued, &found, &recipe, work.path());
}

/// The same where nothing can be mounted: no file may grow beyond 16 KiB, and a process that ignores SIGXFSZ is told so
/// by the write.
#[test]
fn a_limit_on_the_size_of_files_is_a_full_disk() {
    let work = tempfile::tempdir().unwrap();
    let recipe = small_recipe(work.path());
    let run_dir = work.path().join("run");
    let plain = curate(&recipe, &run_dir);
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 32; exec \"$@\"", "sh"])
        .arg(plain.get_program())
        .args(plain.get_args());
    limited.env_remove("RUST_LOG").env("NO_COLOR", "1");
    let full = limited.output().unwrap();
    let continued = curate(&recipe, &run_dir).output().unwrap();
    is_told_and_mended(full, continued, &outputs(&run_dir), &recipe, work.path());
}
