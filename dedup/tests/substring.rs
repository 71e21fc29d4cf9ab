//! Removal of repeated spans through the runner, against a search by hand.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use dedup::shingles::Shingles;
use dedup::{Measure, SUBSTRING, SubstringConfig, substring_stages_cut};
use pipeline::RunContext;
use pipeline::document::ordinal;
use proptest::prelude::*;

mod support;
use support::{Document, plain, record, run, table, text};

/// How work is cut: records of a partition, and of a section.
#[derive(Clone, Copy)]
struct Sizes {
    partition: u64,
    section: usize,
}

fn stages(config: &SubstringConfig, sizes: Sizes) -> pipeline::Result<Vec<Arc<dyn pipeline::Stage>>> {
    substring_stages_cut(config, "documents", None, sizes.partition, sizes.section)
}

/// A cut: ordinal, start, text, ordinal and start of where it stands first.
type Cut = (u64, usize, String, u64, usize);

/// What must be left and what must go, by comparing every window with all before it.
fn by_hand(corpus: &[Vec<Document>], config: &SubstringConfig) -> (BTreeMap<u64, String>, Vec<Cut>) {
    let (mut left, mut cuts) = (BTreeMap::new(), Vec::new());
    let mut first_places: HashMap<Vec<u8>, (u64, usize, usize)> = HashMap::new();
    for (shard, documents) in corpus.iter().enumerate() {
        for (i, (text, _)) in documents.iter().enumerate() {
            let ordinal = ordinal(shard as u32, record(i));
            let mut places = Vec::new();
            let words = Shingles::default().with_places(text, 1, &mut places).to_vec();
            let mut gone: Vec<Option<(u64, usize)>> = vec![None; text.len()];
            for first in 0..words.len() {
                let long = |end: &usize| {
                    let n = match config.measure {
                        Measure::Words => end - first,
                        Measure::Bytes => places[end - 1].end - places[first].start,
                    };
                    n >= config.length as usize
                };
                let Some(end) = (first + 1..=words.len()).find(long) else { break };
                let (from, to) = (places[first].start, places[end - 1].end);
                let key = match config.measure {
                    Measure::Words => words[first..end].iter().flat_map(|w| w.to_le_bytes()).collect(),
                    Measure::Bytes => text.as_bytes()[from..to].to_vec(),
                };
                let (other, at, behind) = *first_places.entry(key).or_insert((ordinal, from, to));
                if (other, at) != (ordinal, from) && (other != ordinal || behind <= from) {
                    gone[from..to].iter_mut().filter(|g| g.is_none()).for_each(|g| *g = Some((other, at)));
                }
            }
            let mut rest = Vec::new();
            let mut at = 0;
            while at < text.len() {
                let end = (at..text.len()).find(|&i| gone[i].is_some() != gone[at].is_some()).unwrap_or(text.len());
                match gone[at] {
                    None => rest.extend_from_slice(&text.as_bytes()[at..end]),
                    Some((other, first)) => cuts.push((ordinal, at, text[at..end].to_string(), other, first)),
                }
                at = end;
            }
            let rest = String::from_utf8(rest).unwrap();
            // A text that was empty before goes, too, as it does from the lines.
            if rest.contains(char::is_alphanumeric) || !rest.is_empty() && gone.iter().all(Option::is_none) {
                left.insert(ordinal, rest);
            }
        }
    }
    (left, cuts)
}

async fn outcome(run: &Arc<RunContext>) -> (BTreeMap<u64, String>, Vec<Cut>) {
    let rows = table(run, SUBSTRING, &["ordinal", "text"]).await;
    let left = rows.into_iter().map(|r| (r[0].parse().unwrap(), r[1].clone())).collect();
    let columns = ["ordinal", "start", "bytes", "first_ordinal", "first_start", "text"];
    let mut cuts = Vec::new();
    for r in table(run, "substring/cuts", &columns).await {
        assert_eq!(r[2], r[5].len().to_string());
        cuts.push((
            r[0].parse().unwrap(),
            r[1].parse().unwrap(),
            r[5].clone(),
            r[3].parse().unwrap(),
            r[4].parse().unwrap(),
        ));
    }
    (left, cuts)
}

/// Run over `corpus` with work cut as `sizes` say.
async fn with(
    corpus: &[Vec<Document>],
    config: &SubstringConfig,
    sizes: Sizes,
    threads: usize,
) -> (BTreeMap<u64, String>, Vec<Cut>) {
    let dir = tempfile::tempdir().unwrap();
    let run = run(dir.path(), corpus, stages(config, sizes).unwrap(), threads).await;
    outcome(&run).await
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn equals_a_search_by_hand_however_work_is_cut(
        texts in prop::collection::vec("(([ab]|Ab|b\\.a|東|é|cc)([ ,]|\n|  ){1}){0,30}", 1..9),
        shards in 1usize..4, length in 1u32..14, bytes: bool, section in 1usize..40, partition in 1u64..60,
    ) {
        let measure = if bytes { Measure::Bytes } else { Measure::Words };
        let config = SubstringConfig { measure, length };
        let mut corpus = vec![Vec::new(); shards];
        let each = texts.len().div_ceil(shards);
        texts.iter().enumerate().for_each(|(i, text)| corpus[i / each].push(plain(text.as_str())));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let found = runtime.block_on(with(&corpus, &config, Sizes { partition, section }, 2));
        prop_assert_eq!(found, by_hand(&corpus, &config));
    }
}

/// Long texts: spans of 30 to 90 words of a common stock between words of their own, in three shards.
fn corpus() -> Vec<Vec<Document>> {
    let stock = text(1, 400);
    (0..3usize)
        .map(|shard| {
            (0..20)
                .map(|i| {
                    let n = shard * 20 + i;
                    let (from, length) = (n * 37 % 300, 30 + n * 13 % 61);
                    let mut words = text(100 + n, 40);
                    words.extend_from_slice(&stock[from..from + length]);
                    words.extend(text(200 + n, 25));
                    if n % 7 == 0 {
                        words = stock[from..from + length].to_vec();
                    }
                    plain(words.join(if n % 3 == 0 { "\n" } else { " " }))
                })
                .collect()
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_words_go_across_shards_for_any_cut_and_any_number_of_threads() {
    let corpus = corpus();
    for config in [
        SubstringConfig::default(),
        SubstringConfig { measure: Measure::Bytes, length: 300 },
        SubstringConfig { length: 2000, ..SubstringConfig::default() },
    ] {
        let expected = by_hand(&corpus, &config);
        assert_eq!(expected.1.is_empty(), config.length == 2000);
        assert!(config.length == 2000 || expected.0.len() < 60, "some are stock alone");
        for (partition, section, threads) in [(1 << 21, 1 << 20, 1), (100, 64, 2), (7, 1, 4)] {
            assert_eq!(with(&corpus, &config, Sizes { partition, section }, threads).await, expected, "{config:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_the_same_bytes_for_any_number_of_threads_and_after_a_loss() {
    let corpus = corpus();
    let names = ["substring_anchors", "substring_candidates", "substring_windows", "substring_repeats", SUBSTRING];
    let sizes = Sizes { partition: 300, section: 200 };
    let all = || stages(&SubstringConfig::default(), sizes).unwrap();
    let files = |run: &RunContext| {
        let mut files = BTreeMap::new();
        for name in names {
            for file in run.journal(name).values().flat_map(|entry| &entry.files) {
                let path = run.stage_dir(name).join(&file.path);
                files.insert((name, file.path.clone()), std::fs::read(path).unwrap());
            }
        }
        files
    };
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let expected = files(&*run(dirs[0].path(), &corpus, all(), 1).await);
    assert!(expected.len() > 20, "{}", expected.len());
    assert!(expected == files(&*run(dirs[1].path(), &corpus, all(), 4).await), "1 and 4 threads differ");
    for lost in
        ["substring_windows/part-00001.runs", "substring_repeats/part-00001.runs", "substring/part-00000.parquet"]
    {
        std::fs::remove_file(dirs[0].path().join(lost)).unwrap();
    }
    assert!(expected == files(&*run(dirs[0].path(), &corpus, all(), 3).await), "a lost file came back otherwise");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_repeats_itself_keeps_the_first_round_and_cuts_stand_at_borders() {
    let round = text(1, 60).join(" ");
    let corpus = vec![vec![plain([round.as_str(); 4].join(" ")), plain(""), plain("…"), plain(format!("«{round}»"))]];
    let (left, cuts) = with(&corpus, &SubstringConfig::default(), Sizes { partition: 100, section: 50 }, 1).await;
    let at = |i| ordinal(0, record(i));
    assert_eq!(left, BTreeMap::from([(at(0), format!("{round} ")), (at(2), "…".into())]));
    assert_eq!(cuts.len(), 2);
    assert_eq!((cuts[0].1, cuts[0].3, cuts[0].4), (round.len() + 1, at(0), 0));
    assert_eq!((cuts[1].1, cuts[1].2.as_str()), ("«".len(), round.as_str()));

    // 200 characters that are three bytes each, in the middle of others.
    let same: String = (0..200u32).filter_map(|i| char::from_u32(0x4e00 + i * 7)).collect();
    let corpus = vec![vec![plain(format!("甲{same}乙"))], vec![plain(format!("丙{same}丁"))]];
    let config = SubstringConfig { measure: Measure::Bytes, length: 500 };
    let (left, cuts) = with(&corpus, &config, Sizes { partition: 100, section: 50 }, 2).await;
    assert_eq!(left[&ordinal(1, 0)], "丙丁");
    assert_eq!(cuts[0].2, same);
    assert!(stages(&SubstringConfig { length: 0, ..config }, Sizes { partition: 1, section: 1 }).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corpus_of_copies_and_templates_keeps_one_of_each_and_says_what_it_will_take() {
    // A page 400 times, and 400 pages of four templates with words of their own in the middle.
    let page = text(1, 300).join(" ");
    let templates: Vec<Vec<String>> = (0..4).map(|i| text(10 + i, 120)).collect();
    let corpus: Vec<Vec<Document>> = (0..4)
        .map(|shard| {
            let of_template = |i: usize| {
                let (head, tail) = templates[i % 4].split_at(60);
                plain([head, &text(100 + shard * 100 + i, 30), tail].concat().join(" "))
            };
            (0..100).map(|_| plain(page.as_str())).chain((0..100).map(of_template)).collect()
        })
        .collect();
    let config = SubstringConfig::default();
    for sizes in [Sizes { partition: 1 << 21, section: 1 << 20 }, Sizes { partition: 500, section: 300 }] {
        let dir = tempfile::tempdir().unwrap();
        let run = run(dir.path(), &corpus, stages(&config, sizes).unwrap(), 2).await;
        assert_eq!(outcome(&run).await, by_hand(&corpus, &config));
        let note = |stage: &str, name: &str| -> f64 {
            run.journal(stage).values().filter_map(|entry| entry.notes.get(name)?.as_f64()).sum()
        };
        // What room on the disk is looked at for: windows by the places of their anchors, 13.5 each with 50 words.
        let (windows, predicted) =
            (note("substring_windows", "windows"), note("substring_candidates", "places") * 13.5);
        assert!(windows > 100_000.0 && (0.7..1.4).contains(&(windows / predicted)), "{windows} {predicted}");
    }
}
