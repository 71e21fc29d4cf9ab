//! MinHash signatures and their bands (Broder 1997; Leskovec, Rajaraman and Ullman, *Mining of
//! Massive Datasets*, section 3.4).
//!
//! A document is the set of its shingles, runs of `ngram` words. The signature keeps, for each of
//! `bands × rows` permutations, the smallest permuted shingle hash; two documents agree at a
//! position with probability equal to the Jaccard similarity `s` of their sets. They become candidates when
//! a whole band agrees, with probability `1 − (1 − s^rows)^bands`.
//!
//! In mode `compatible` the signature is datatrove's, bit for bit (`MinhashDedupSignature` with its default
//! hash): xxh64 of the words joined by spaces; `a·h + b` in 64-bit arithmetic that wraps, then modulo the
//! Mersenne prime 2⁶¹ − 1; `a` and `b` from numpy's `RandomState(seed)`. In mode `fast` words are those of
//! [`crate::shingles`] and permutations affine maps of 32-bit numbers.
//!
//! A sketch is a short summary for estimates of similarity: two bits of the minima of [`SKETCH_PERMUTATIONS`]
//! permutations, those of the bands first (b-bit minwise hashing, Li and König 2010).
//!
//! In both a text of fewer words than a shingle has one shingle of all its words, so that equal short texts
//! still meet, where datatrove gives them no signature.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::permutations::{Affine, Mersenne};
use crate::shingles::Shingles;
use crate::words::Words;

/// Definition of the signature.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// datatrove's, bit for bit. Its words are parted by spaces and marks, so that it finds hardly any near duplicates in
    /// Chinese, Japanese or Thai; a run says so.
    #[default]
    Compatible,
    /// Ours: Unicode's words, 32-bit permutations.
    Fast,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Self; 2] = [Self::Compatible, Self::Fast];

    /// Name in a recipe and in SQL.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compatible => "compatible",
            Self::Fast => "fast",
        }
    }
}

/// Permutations that a sketch keeps two bits of.
pub const SKETCH_PERMUTATIONS: usize = 192;
/// Bytes of a sketch.
pub const SKETCH_BYTES: usize = SKETCH_PERMUTATIONS / 4;
/// Standard errors by which the similarity that two sketches say must be above the threshold. Pairs just below it are as
/// many as those just above, and an estimate errs to either side: without a margin one pair in a hundred that pass
/// does not belong there (docs/BENCHMARKS.md has precision and recall of several margins).
pub const SKETCH_MARGIN: f64 = 0.5;

/// Signature and banding for one setting.
#[derive(Clone, Debug)]
pub struct MinHash {
    ngram: usize,
    bands: usize,
    rows: usize,
    permutations: Permutations,
}

#[derive(Clone, Debug)]
enum Permutations {
    /// Those of the bands, and what a sketch has beyond them.
    Compatible(Mersenne, Affine),
    /// Those of the bands first.
    Fast(Affine),
}

/// Memory that is used again from text to text.
#[derive(Debug, Default)]
pub struct Scratch {
    words: Words,
    shingles: Shingles,
    hashes: Vec<u64>,
    wide: Vec<u64>,
    narrow: Vec<u32>,
    band: Vec<u8>,
}

/// The minima of one text, a number for each permutation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signature<'s> {
    /// Below [`crate::permutations::MERSENNE_PRIME`].
    Compatible(&'s [u64]),
    /// Any 32-bit number.
    Fast(&'s [u32]),
}

impl MinHash {
    /// Shingles of `ngram` words, `bands` bands of `rows` permutations each; all at least 1.
    pub fn new(mode: Mode, ngram: usize, bands: usize, rows: usize, seed: u32) -> Self {
        let (ngram, bands, rows) = (ngram.max(1), bands.max(1), rows.max(1));
        let n = bands * rows;
        let permutations = match mode {
            Mode::Compatible => Permutations::Compatible(
                Mersenne::new(n, seed),
                Affine::new(SKETCH_PERMUTATIONS.saturating_sub(n), seed),
            ),
            Mode::Fast => Permutations::Fast(Affine::new(n.max(SKETCH_PERMUTATIONS), seed)),
        };
        Self { ngram, bands, rows, permutations }
    }

    /// Number of bands.
    pub fn bands(&self) -> usize {
        self.bands
    }

    /// Hashes of the shingles of `text`, in order, repeats included; none if it has no words.
    pub fn shingles<'s>(&self, text: &str, scratch: &'s mut Scratch) -> &'s [u64] {
        let Scratch { words, shingles, hashes, .. } = scratch;
        if let Permutations::Fast(_) = self.permutations {
            return shingles.of(text, self.ngram);
        }
        words.set(text);
        hashes.clear();
        if !words.is_empty() {
            words.hashes(self.ngram.min(words.len()), hashes);
        }
        hashes
    }

    /// The signature of `text`, or `None` if it has no words.
    pub fn signature<'s>(&self, text: &str, scratch: &'s mut Scratch) -> Option<Signature<'s>> {
        let n = self.bands * self.rows;
        if self.shingles(text, scratch).is_empty() {
            return None;
        }
        let Scratch { shingles, hashes, wide, narrow, .. } = scratch;
        Some(match &self.permutations {
            Permutations::Compatible(mersenne, _) => {
                mersenne.minima(hashes, wide);
                Signature::Compatible(&wide[..n])
            }
            Permutations::Fast(affine) => {
                affine.minima(shingles.last(), narrow);
                Signature::Fast(&narrow[..n])
            }
        })
    }

    /// Append the key of every band of `text` to `keys`: 64-bit XXH3 of the band's minima as
    /// little-endian bytes. `false`, and nothing appended, if the text has no words.
    ///
    /// Two different bands share a key with probability 2⁻⁶⁴: among 10⁹ documents, 0.03 expected
    /// false pairs a band.
    pub fn band_keys(&self, text: &str, scratch: &mut Scratch, keys: &mut Vec<u64>) -> bool {
        let mut band = std::mem::take(&mut scratch.band);
        let signature = self.signature(text, scratch);
        match signature {
            None => {}
            Some(Signature::Compatible(minima)) => keys_of_bands(minima, self.rows, u64::to_le_bytes, &mut band, keys),
            Some(Signature::Fast(minima)) => keys_of_bands(minima, self.rows, u32::to_le_bytes, &mut band, keys),
        }
        let any = signature.is_some();
        scratch.band = band;
        any
    }

    /// Append the sketch of the text that `scratch` was last used for, [`SKETCH_BYTES`] bytes.
    pub fn sketch(&self, scratch: &mut Scratch, sketch: &mut Vec<u8>) {
        let Scratch { hashes, wide, narrow, .. } = scratch;
        let mut minima = [0; SKETCH_PERMUTATIONS];
        match &self.permutations {
            Permutations::Compatible(_, rest) => {
                let (of_bands, beyond) = minima.split_at_mut((self.bands * self.rows).min(SKETCH_PERMUTATIONS));
                // 61 bits, of which the highest are zeroes.
                of_bands.iter_mut().zip(wide.iter()).for_each(|(m, wide)| *m = *wide as u32 ^ (*wide >> 29) as u32);
                rest.minima(hashes, narrow);
                beyond.copy_from_slice(&narrow[..beyond.len()]);
            }
            Permutations::Fast(_) => minima.copy_from_slice(&narrow[..SKETCH_PERMUTATIONS]),
        }
        // The lowest bits of an affine map are those of what it was given, the highest of a minimum are zeroes; of a product
        // the highest depend on all.
        let two_bits = |minimum: u32| (minimum.wrapping_mul(0x9e37_79b1) >> 30) as u8;
        let bytes = minima.as_chunks::<4>().0.iter();
        sketch.extend(bytes.map(|four| four.iter().rev().fold(0u8, |byte, minimum| byte << 2 | two_bits(*minimum))));
    }
}

/// Append the hash of every `rows` minima, whose bytes are put into `band`.
fn keys_of_bands<N: Copy, const BYTES: usize>(
    minima: &[N],
    rows: usize,
    bytes: fn(N) -> [u8; BYTES],
    band: &mut Vec<u8>,
    keys: &mut Vec<u64>,
) {
    for rows in minima.chunks_exact(rows) {
        band.clear();
        rows.iter().for_each(|minimum| band.extend_from_slice(&bytes(*minimum)));
        keys.push(xxh3_64(band));
    }
}

/// Similarity estimated from two sketches: a quarter of the positions that differ agree by chance. `agreed` positions are
/// those of a band that the two were chosen for: they agree whatever the similarity is, and say nothing of it.
pub fn sketch_similarity(a: &[u8], b: &[u8], agreed: usize) -> f64 {
    let differ: u32 = (a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0))
        .map(|(a, b)| {
            let bits = u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b);
            ((bits | bits >> 1) & 0x5555_5555_5555_5555).count_ones()
        })
        .sum();
    let agree = 1.0 - f64::from(differ) / positions_but(agreed) as f64;
    ((agree - 0.25) / 0.75).clamp(0.0, 1.0)
}

/// Positions of a sketch besides `agreed` of them; all, if none are left.
fn positions_but(agreed: usize) -> usize {
    if agreed < SKETCH_PERMUTATIONS { SKETCH_PERMUTATIONS - agreed } else { SKETCH_PERMUTATIONS }
}

/// Positions of a sketch that belong to band `band` of `rows` permutations.
pub fn positions_of_band(band: usize, rows: usize) -> usize {
    SKETCH_PERMUTATIONS.min((band + 1) * rows).saturating_sub(band * rows)
}

/// Standard error of [`sketch_similarity`] for two documents of Jaccard similarity `similarity`.
pub fn sketch_error(similarity: f64, agreed: usize) -> f64 {
    let agree = similarity + (1.0 - similarity) / 4.0;
    (agree * (1.0 - agree) / positions_but(agreed) as f64).sqrt() / 0.75
}

/// What [`sketch_similarity`] must come to for a pair to pass as one of similarity `threshold`: [`SKETCH_MARGIN`] standard
/// errors more.
pub fn sketch_bound(threshold: f64, agreed: usize) -> f64 {
    (threshold + SKETCH_MARGIN * sketch_error(threshold, agreed)).min(1.0)
}

/// Probability that the sketches of two documents of Jaccard similarity `similarity` that share a band of `rows` permutations
/// pass at `threshold`: of the other positions, so many agree (a binomial tail).
pub fn sketch_probability(similarity: f64, threshold: f64, rows: usize) -> f64 {
    let agreed = positions_of_band(0, rows);
    let n = positions_but(agreed);
    let agree = similarity + (1.0 - similarity) / 4.0;
    let bound = 0.25 + 0.75 * sketch_bound(threshold, agreed);
    // Of exactly k positions, from all of them down: agree is a quarter at least, so the power is no zero.
    let (mut exactly, mut tail) = (agree.powi(n as i32), 0.0);
    for k in (0..=n).rev().take_while(|k| *k as f64 / n as f64 >= bound) {
        tail += exactly;
        exactly *= k as f64 / (n - k + 1) as f64 * (1.0 - agree) / agree;
    }
    f64::min(tail, 1.0)
}

/// Jaccard similarity of two sorted sets; of two empty ones 1.
pub fn jaccard(a: &[u64], b: &[u64]) -> f64 {
    let (mut i, mut j, mut both) = (0, 0, 0usize);
    while i < a.len() && j < b.len() {
        // Without branches: which way it goes cannot be guessed.
        let (x, y) = (a[i], b[j]);
        both += usize::from(x == y);
        i += usize::from(x <= y);
        j += usize::from(y <= x);
    }
    let either = a.len() + b.len() - both;
    if either == 0 { 1.0 } else { both as f64 / either as f64 }
}

/// Probability that two documents of Jaccard similarity `similarity` agree in at least one band.
pub fn candidate_probability(similarity: f64, bands: usize, rows: usize) -> f64 {
    1.0 - (1.0 - similarity.powf(rows as f64)).powf(bands as f64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn numbers(signature: Signature<'_>) -> Vec<u64> {
        match signature {
            Signature::Compatible(minima) => minima.to_vec(),
            Signature::Fast(minima) => minima.iter().map(|m| u64::from(*m)).collect(),
        }
    }

    proptest! {
        #[test]
        fn keys_agree_exactly_where_bands_do(
            words in prop::collection::vec(0u8..4, 1..12),
            other in prop::collection::vec(0u8..4, 1..12),
            fast: bool,
        ) {
            let mode = if fast { Mode::Fast } else { Mode::Compatible };
            let minhash = MinHash::new(mode, 2, 6, 2, 7);
            let text = |words: &[u8]| words.iter().map(|w| ["a", "b", "c", "d"][*w as usize]).collect::<Vec<_>>().join(" ");
            let mut scratch = Scratch::default();
            let mut both = |text: &str| {
                let signature = numbers(minhash.signature(text, &mut scratch).unwrap());
                let mut keys = Vec::new();
                assert!(minhash.band_keys(text, &mut scratch, &mut keys));
                (signature, keys)
            };
            let ((s, k), (t, l)) = (both(&text(&words)), both(&text(&other)));
            for band in 0..6 {
                let equal = s[2 * band..2 * band + 2] == t[2 * band..2 * band + 2];
                prop_assert_eq!(k[band] == l[band], equal);
            }
        }

        #[test]
        fn sketches_agree_where_minima_do_and_in_a_quarter_of_the_rest(
            common in prop::collection::vec("[a-f]{3}", 1..200), n in 1usize..300, fast: bool,
        ) {
            let mode = if fast { Mode::Fast } else { Mode::Compatible };
            let minhash = MinHash::new(mode, 2, n, 1, 7);
            let mut scratch = Scratch::default();
            let mut both = |text: &str| {
                let signature = numbers(minhash.signature(text, &mut scratch).unwrap());
                let mut sketch = Vec::new();
                minhash.sketch(&mut scratch, &mut sketch);
                assert_eq!(sketch.len(), SKETCH_BYTES);
                (signature, sketch)
            };
            let text = common.join(" ");
            let ((s, a), (t, b)) = (both(&text), both(&format!("{text} another word or two")));
            for i in (0..n.min(SKETCH_PERMUTATIONS)).filter(|&i| s[i] == t[i]) {
                prop_assert_eq!(a[i / 4] >> (2 * (i % 4)) & 3, b[i / 4] >> (2 * (i % 4)) & 3);
            }
            prop_assert_eq!(sketch_similarity(&a, &a, 0), 1.0);
            // Nothing in common: a quarter of 192 agree, give or take six standard errors of 6.
            let (_, other) = both("words that no text of those above has in it at all, and there are a few of them");
            let agree = 0.25 + 0.75 * sketch_similarity(&a, &other, 0);
            prop_assert!(agree < 0.25 + 36.0 / 192.0, "{}", agree);
        }

        #[test]
        fn jaccard_is_intersection_over_union(a in prop::collection::btree_set(0u64..20, 0..15), b in prop::collection::btree_set(0u64..20, 0..15)) {
            let (x, y): (Vec<u64>, Vec<u64>) = (a.iter().copied().collect(), b.iter().copied().collect());
            let union = a.union(&b).count();
            let expected = if union == 0 { 1.0 } else { a.intersection(&b).count() as f64 / union as f64 };
            prop_assert_eq!(jaccard(&x, &y), expected);
        }
    }

    /// Documents of known similarity: what signatures of either mode find must be what the S-curve says.
    #[test]
    fn candidates_of_planted_similarity_follow_the_s_curve() {
        let trials = 3000;
        for mode in Mode::ALL {
            let minhash = MinHash::new(mode, 1, 14, 8, 1);
            let mut scratch = Scratch::default();
            for (shared, own) in [(120, 40), (160, 20)] {
                // Jaccard shared / (shared + 2 own): 0.6 and 0.8.
                let similarity = f64::from(shared) / f64::from(shared + 2 * own);
                let (mut found, mut estimate) = (0, 0.0);
                for trial in 0..trials {
                    let word = |i: u32| format!("w{} ", letters(trial * 1000 + i));
                    let common: String = (0..shared).map(word).collect();
                    let first: String = common.clone() + &(200..200 + own).map(word).collect::<String>();
                    let second: String = common + &(300..300 + own).map(word).collect::<String>();
                    let mut side = |text: &str| {
                        let (mut keys, mut sketch) = (Vec::new(), Vec::new());
                        minhash.band_keys(text, &mut scratch, &mut keys);
                        minhash.sketch(&mut scratch, &mut sketch);
                        (keys, sketch)
                    };
                    let ((k, s), (l, t)) = (side(&first), side(&second));
                    found += u32::from(k.iter().zip(&l).any(|(a, b)| a == b));
                    estimate += sketch_similarity(&s, &t, 0);
                }
                let n = f64::from(trials);
                let expected = candidate_probability(similarity, 14, 8);
                // Four standard errors of the share, and of the mean of the estimates.
                let error = 4.0 * (expected * (1.0 - expected) / n).sqrt();
                let recall = f64::from(found) / n;
                assert!(
                    (recall - expected).abs() < error,
                    "{mode:?} {similarity}: {recall}, expected {expected} ± {error}"
                );
                let mean = estimate / n;
                let sure = 4.0 * sketch_error(similarity, 0) / n.sqrt();
                assert!((mean - similarity).abs() < sure, "{mode:?}: {mean} for {similarity}");
            }
        }
    }

    /// A number without digits, which `compatible` would make 0.
    fn letters(mut n: u32) -> String {
        let mut word = String::new();
        loop {
            word.push((b'a' + (n % 26) as u8) as char);
            n /= 26;
            if n == 0 {
                return word;
            }
        }
    }

    #[test]
    fn short_texts_meet_when_equal_and_only_then() {
        for mode in Mode::ALL {
            let minhash = MinHash::new(mode, 5, 14, 8, 1);
            let mut scratch = Scratch::default();
            let mut keys = |text: &str| {
                let mut keys = Vec::new();
                minhash.band_keys(text, &mut scratch, &mut keys).then_some(keys)
            };
            assert_eq!(keys(""), None);
            assert_eq!(keys(" ... \n"), None);
            assert_eq!(keys("One, two, three, FOUR!"), keys("one two three four"));
            assert_eq!(keys("one").unwrap().len(), 14);
            assert_ne!(keys("one two three four"), keys("one two three"));
            assert_ne!(keys("one two three four"), keys("one two three four five"));
        }
    }

    #[test]
    fn the_s_curve_of_fineweb() {
        // Published with the setting: 0.75 → 77 %, 0.8 → 92 %, 0.85 → 98.8 %.
        for (similarity, published) in [(0.75, 0.77), (0.8, 0.92), (0.85, 0.988)] {
            assert!((candidate_probability(similarity, 14, 8) - published).abs() < 0.006, "{similarity}");
        }
    }
}
