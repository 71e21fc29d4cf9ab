//! The memory of a large list of domains, alone in its process so that nothing else is measured.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use std::fs;
use std::io::{BufWriter, Write};
use std::time::Instant;

use pipeline::urls::{UrlFilter, UrlsConfig};

/// Five million entries: measured where Linux tells it.
#[test]
fn five_million_domains_take_less_than_a_hundred_megabytes() {
    let resident = || -> Option<usize> {
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
        line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kib| kib << 10)
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("block.txt");
    {
        let mut file = BufWriter::new(fs::File::create(&path).unwrap());
        (0..5_000_000).for_each(|n| writeln!(file, "d{n}.example").unwrap());
    }
    let before = resident();
    let start = Instant::now();
    let config = UrlsConfig { blocklists: vec![path], ..UrlsConfig::default() };
    let filter = UrlFilter::load(&config, dir.path()).unwrap();
    let loaded = start.elapsed();
    let grown = before.zip(resident()).map(|(before, after)| after - before);
    let start = Instant::now();
    let met = (0..100_000).filter(|n| filter.judge(&format!("http://www.d{}.example/a", n * 100)).is_some()).count();
    println!(
        "5,000,000 domains: {loaded:.1?} to load, {:?} MB more at the peak, {:.0} ns a document",
        grown.map(|bytes| bytes / 1_000_000),
        start.elapsed().as_nanos() as f64 / 1e5
    );
    assert_eq!(met, 50_000);
    match grown {
        Some(bytes) => assert!(bytes < 100_000_000, "{bytes}"),
        None => println!("memory is not measured: no /proc/self/status here"),
    }
}
