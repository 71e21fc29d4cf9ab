//! HTML extraction against gold text: precision, recall, F1, pages and bytes a second, one core.
//!
//!     cargo bench --workspace --bench extract -- PAGES.jsonl
//!
//! A line is `{"uri", "html", "gold", "with", "without"}`: gold is the main text or null, `with` and `without` are strings that
//! must and must not be in the extraction. P, R, F1 are means over pages with gold of the multiset overlap of
//! lower-cased words.
#![allow(missing_docs, clippy::print_stdout)]

use std::collections::HashMap;
use std::time::Instant;

use pipeline::ingest::extract::extract;
use serde::Deserialize;

#[derive(Deserialize)]
struct Page {
    html: String,
    gold: Option<String>,
    with: Vec<String>,
    without: Vec<String>,
}

fn main() {
    let Some(path) = std::env::args().skip(1).find(|a| a != "--bench") else {
        println!("extract: give a file of pages, JSON lines with html, gold, with, without");
        return;
    };
    let text = std::fs::read_to_string(&path).expect("the file of pages");
    let pages: Vec<Page> = text.lines().map(|line| serde_json::from_str(line).expect("a page")).collect();
    let bytes: usize = pages.iter().map(|page| page.html.len()).sum();
    let mut best = f64::INFINITY;
    let mut texts = Vec::new();
    let mut slowest = 0f64;
    for _ in 0..3 {
        let start = Instant::now();
        texts = pages
            .iter()
            .map(|page| {
                let start = Instant::now();
                let text = extract(&page.html).unwrap_or_default();
                slowest = slowest.max(start.elapsed().as_secs_f64());
                text
            })
            .collect();
        best = best.min(start.elapsed().as_secs_f64());
    }
    let scores: Vec<[f64; 3]> =
        pages.iter().zip(&texts).filter_map(|(page, text)| Some(score(text, page.gold.as_ref()?))).collect();
    let mean = |at: usize| scores.iter().map(|s| s[at]).sum::<f64>() / scores.len().max(1) as f64;
    let share = |of: &dyn Fn(&Page) -> &Vec<String>, there: bool| {
        let found: Vec<bool> = pages
            .iter()
            .zip(&texts)
            .flat_map(|(page, text)| {
                let text = squash(text);
                of(page).iter().map(move |s| text.contains(&squash(s)) == there).collect::<Vec<_>>()
            })
            .collect();
        found.iter().filter(|ok| **ok).count() as f64 / found.len().max(1) as f64
    };
    println!(
        "{} pages, {} with gold: P {:.3} R {:.3} F1 {:.3}, with {:.3} without {:.3}, {:.0} pages/s, {:.1} MB/s, slowest page {:.0} ms",
        pages.len(),
        scores.len(),
        mean(0),
        mean(1),
        mean(2),
        share(&|page| &page.with, true),
        share(&|page| &page.without, false),
        pages.len() as f64 / best,
        bytes as f64 / 1e6 / best,
        slowest * 1e3
    );
}

fn squash(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn words(text: &str) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    let lower = text.to_lowercase();
    for word in lower.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty()) {
        *counts.entry(word.to_owned()).or_default() += 1;
    }
    counts
}

fn score(found: &str, gold: &str) -> [f64; 3] {
    let (found, gold) = (words(found), words(gold));
    let both: usize = found.iter().map(|(word, n)| gold.get(word).map_or(0, |m| *n.min(m))).sum();
    if both == 0 {
        return [0.0; 3];
    }
    let all = |counts: &HashMap<String, usize>| counts.values().sum::<usize>() as f64;
    let (p, r) = (both as f64 / all(&found), both as f64 / all(&gold));
    [p, r, 2.0 * p * r / (p + r)]
}
