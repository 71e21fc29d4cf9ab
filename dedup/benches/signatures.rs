//! Bytes of text a second on one core: `cargo bench --workspace --bench signatures`.

use dedup::minhash::{MinHash, Mode, Scratch};
use dedup::normalise::{Normalise, content_hash};
use dedup::shingles::Shingles;
use dedup::words::Words;
use divan::counter::BytesCount;
use divan::{Bencher, black_box};

const PARAGRAPH: &str = include_str!("../tests/fixtures/declaration_of_independence.txt");

fn main() {
    divan::main();
}

/// A document of about `bytes` bytes: words of the fixture in an order of their own.
fn document(bytes: usize) -> String {
    let words: Vec<&str> = PARAGRAPH.split_whitespace().collect();
    let mut text = String::with_capacity(bytes + 16);
    let mut state = 1u64;
    while text.len() < bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.push_str(words[(state >> 33) as usize % words.len()]);
        text.push(' ');
    }
    text
}

/// From raw text to 14 band keys of 8 permutations over 5-word shingles.
#[divan::bench(args = [500, 5_000, 500_000], consts = [true, false])]
fn band_keys<const FAST: bool>(bencher: Bencher<'_, '_>, bytes: usize) {
    let text = document(bytes);
    let minhash = MinHash::new(if FAST { Mode::Fast } else { Mode::Compatible }, 5, 14, 8, 1);
    let (mut scratch, mut keys) = (Scratch::default(), Vec::new());
    bencher.counter(BytesCount::of_str(&text)).bench_local(|| {
        keys.clear();
        minhash.band_keys(black_box(&text), &mut scratch, &mut keys);
        black_box(keys.last().copied())
    });
}

/// The same with the sketch, which the stage keeps, too.
#[divan::bench(args = [500, 5_000], consts = [true, false])]
fn band_keys_and_sketch<const FAST: bool>(bencher: Bencher<'_, '_>, bytes: usize) {
    let text = document(bytes);
    let minhash = MinHash::new(if FAST { Mode::Fast } else { Mode::Compatible }, 5, 14, 8, 1);
    let (mut scratch, mut keys, mut sketch) = (Scratch::default(), Vec::new(), Vec::new());
    bencher.counter(BytesCount::of_str(&text)).bench_local(|| {
        keys.clear();
        sketch.clear();
        minhash.band_keys(black_box(&text), &mut scratch, &mut keys);
        minhash.sketch(&mut scratch, &mut sketch);
        black_box((keys.last().copied(), sketch.last().copied()))
    });
}

/// The shingles of `fast` alone.
#[divan::bench]
fn shingles(bencher: Bencher<'_, '_>) {
    let text = document(5_000);
    let mut shingles = Shingles::default();
    bencher.counter(BytesCount::of_str(&text)).bench_local(|| shingles.of(black_box(&text), 5).len());
}

/// The words of `compatible` alone: simplified and cut.
#[divan::bench]
fn words(bencher: Bencher<'_, '_>) {
    let text = document(5_000);
    let mut words = Words::default();
    bencher.counter(BytesCount::of_str(&text)).bench_local(|| {
        words.set(black_box(&text));
        words.len()
    });
}

/// Exact deduplication's hash of the normal form.
#[divan::bench(args = Normalise::ALL.map(Normalise::name))]
fn exact_hash(bencher: Bencher<'_, '_>, form: &str) {
    let text = document(5_000);
    let form = Normalise::from_name(form).unwrap_or_default();
    let mut scratch = String::new();
    bencher.counter(BytesCount::of_str(&text)).bench_local(|| content_hash(black_box(&text), form, &mut scratch));
}
