//! MinHash signatures and their bands (Broder 1997; Leskovec, Rajaraman and Ullman, *Mining of
//! Massive Datasets*, section 3.4).
//!
//! A document is the set of its shingles, runs of `ngram` words. The signature keeps, for each of
//! `bands × rows` permutations, the smallest permuted shingle hash; two documents agree at a
//! position with probability equal to the Jaccard similarity `s` of their sets. They become candidates when
//! a whole band agrees, with probability `1 − (1 − s^rows)^bands`.
//!
//! The signature is datatrove's, bit for bit (`MinhashDedupSignature` with its default hash): xxh64 of
//! the words joined by spaces; `a·h + b` in 64-bit arithmetic that wraps, then modulo the Mersenne
//! prime 2⁶¹ − 1; `a` and `b` from numpy's `RandomState(seed)`. One thing is added: a text of fewer
//! words than a shingle has one shingle of all its words, so that equal short texts still meet, where
//! datatrove gives them no signature.

use xxhash_rust::xxh3::xxh3_64;
use xxhash_rust::xxh64::xxh64;

use crate::numpy_random::RandomState;
use crate::words::Words;

/// The Mersenne prime 2⁶¹ − 1.
pub const MERSENNE_PRIME: u64 = (1 << 61) - 1;

/// Permutations that are worked on at a time: two AVX-512 registers, four of AVX2.
const LANES: usize = 16;

/// Signature and banding for one setting.
#[derive(Clone, Debug)]
pub struct MinHash {
    ngram: usize,
    bands: usize,
    rows: usize,
    /// Coefficients of the permutations, filled up with zeroes to a multiple of [`LANES`].
    a: Vec<u64>,
    b: Vec<u64>,
}

/// Memory that is used again from text to text.
#[derive(Debug, Default)]
pub struct Scratch {
    words: Words,
    hashes: Vec<u64>,
    minima: Vec<u64>,
    band: Vec<u8>,
}

impl MinHash {
    /// Shingles of `ngram` words, `bands` bands of `rows` permutations each; all at least 1.
    pub fn new(ngram: usize, bands: usize, rows: usize, seed: u32) -> Self {
        let (ngram, bands, rows) = (ngram.max(1), bands.max(1), rows.max(1));
        let mut random = RandomState::new(seed);
        let n = bands * rows;
        let mut draw = |low| {
            let mut drawn: Vec<u64> = (0..n).map(|_| random.randint(low, MERSENNE_PRIME)).collect();
            drawn.resize(n.next_multiple_of(LANES), 0);
            drawn
        };
        Self { ngram, bands, rows, a: draw(1), b: draw(0) }
    }

    /// Number of bands.
    pub fn bands(&self) -> usize {
        self.bands
    }

    /// The signature of `text`, `bands × rows` minima below [`MERSENNE_PRIME`], or `None` if it has no words.
    pub fn signature<'s>(&self, text: &str, scratch: &'s mut Scratch) -> Option<&'s [u64]> {
        let Scratch { words, hashes, minima, .. } = scratch;
        words.set(text);
        if words.is_empty() {
            return None;
        }
        hashes.clear();
        let ngram = self.ngram.min(words.len());
        hashes.extend((0..=words.len() - ngram).map(|first| xxh64(words.joined(first, ngram).as_bytes(), 0)));
        minima.resize(self.a.len(), 0);
        permuted_minima(hashes, &self.a, &self.b, minima);
        Some(&minima[..self.bands * self.rows])
    }

    /// Append the key of every band of `text` to `keys`: 64-bit XXH3 of the band's minima as
    /// little-endian bytes. `false`, and nothing appended, if the text has no words.
    ///
    /// Two different bands share a key with probability 2⁻⁶⁴: among 10⁹ documents, 0.03 expected
    /// false pairs a band.
    pub fn band_keys(&self, text: &str, scratch: &mut Scratch, keys: &mut Vec<u64>) -> bool {
        if self.signature(text, scratch).is_none() {
            return false;
        }
        let Scratch { minima, band, .. } = scratch;
        for rows in minima[..self.bands * self.rows].chunks_exact(self.rows) {
            band.clear();
            band.extend(rows.iter().flat_map(|minimum| minimum.to_le_bytes()));
            keys.push(xxh3_64(band));
        }
        true
    }
}

/// Probability that two documents of Jaccard similarity `similarity` agree in at least one band.
pub fn candidate_probability(similarity: f64, bands: usize, rows: usize) -> f64 {
    1.0 - (1.0 - similarity.powf(rows as f64)).powf(bands as f64)
}

/// `minima[i]` = smallest of `(a[i]·h + b[i]) mod 2⁶⁴ mod 2⁶¹ − 1` over all `h`. The three slices are
/// equally long, a multiple of [`LANES`].
fn permuted_minima(hashes: &[u64], a: &[u64], b: &[u64], minima: &mut [u64]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") {
            // SAFETY: the processor has these features.
            return unsafe { permuted_minima_avx512(hashes, a, b, minima) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { permuted_minima_avx2(hashes, a, b, minima) };
        }
    }
    permuted_minima_any(hashes, a, b, minima);
}

// One loop, compiled for several instruction sets: the results agree because the code is the same.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq")]
fn permuted_minima_avx512(hashes: &[u64], a: &[u64], b: &[u64], minima: &mut [u64]) {
    permuted_minima_any(hashes, a, b, minima);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn permuted_minima_avx2(hashes: &[u64], a: &[u64], b: &[u64], minima: &mut [u64]) {
    permuted_minima_any(hashes, a, b, minima);
}

#[inline(always)]
fn permuted_minima_any(hashes: &[u64], a: &[u64], b: &[u64], minima: &mut [u64]) {
    let coefficients = a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0);
    for (minima, (a, b)) in minima.as_chunks_mut::<LANES>().0.iter_mut().zip(coefficients) {
        let mut least = [u64::MAX; LANES];
        for &hash in hashes {
            for lane in 0..LANES {
                let value = modulo_mersenne(hash.wrapping_mul(a[lane]).wrapping_add(b[lane]));
                least[lane] = least[lane].min(value);
            }
        }
        *minima = least;
    }
}

/// `value mod 2⁶¹ − 1` without a division: 2⁶¹ is 1, so the top three bits are added to the rest; what
/// is then still too large wraps to a small number, what was not wraps to a huge one.
#[inline(always)]
fn modulo_mersenne(value: u64) -> u64 {
    let folded = (value & MERSENNE_PRIME) + (value >> 61);
    folded.min(folded.wrapping_sub(MERSENNE_PRIME))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn coefficients_are_those_of_numpy() {
        // numpy 2.4: g = RandomState(1); g.randint(1, 2**61 - 1, dtype=uint64, size=112), then from 0.
        let minhash = MinHash::new(5, 14, 8, 1);
        assert_eq!(minhash.a[..3], A1);
        assert_eq!(minhash.a[111], A1_LAST);
        assert_eq!(minhash.b[..3], B1);
        assert_eq!(minhash.b[111], B1_LAST);
    }

    fn naive(hashes: &[u64], a: &[u64], b: &[u64]) -> Vec<u64> {
        let permuted = |h: &u64, a: &u64, b: &u64| {
            let wrapped = (u128::from(*h) * u128::from(*a) + u128::from(*b)) % (1 << 64);
            (wrapped % u128::from(MERSENNE_PRIME)) as u64
        };
        a.iter().zip(b).map(|(a, b)| hashes.iter().map(|h| permuted(h, a, b)).min().unwrap()).collect()
    }

    proptest! {
        #[test]
        fn the_fold_is_a_remainder(value: u64) {
            prop_assert_eq!(u128::from(modulo_mersenne(value)), u128::from(value) % u128::from(MERSENNE_PRIME));
        }

        #[test]
        fn every_instruction_set_gives_the_naive_minima(
            hashes in prop::collection::vec(any::<u64>(), 1..40),
            seed: u32,
            n in 1usize..4,
        ) {
            let MinHash { a, b, .. } = MinHash::new(1, n, LANES, seed);
            let (mut picked, mut plain) = (vec![0; a.len()], vec![0; a.len()]);
            permuted_minima(&hashes, &a, &b, &mut picked);
            permuted_minima_any(&hashes, &a, &b, &mut plain);
            prop_assert_eq!(&picked, &naive(&hashes, &a, &b));
            prop_assert_eq!(&picked, &plain);
        }

        #[test]
        fn keys_agree_exactly_where_bands_do(words in prop::collection::vec(0u8..4, 1..12), other in prop::collection::vec(0u8..4, 1..12)) {
            let minhash = MinHash::new(2, 6, 2, 7);
            let text = |words: &[u8]| words.iter().map(|w| ["a", "b", "c", "d"][*w as usize]).collect::<Vec<_>>().join(" ");
            let mut scratch = Scratch::default();
            let mut both = |text: &str| {
                let signature = minhash.signature(text, &mut scratch).unwrap().to_vec();
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
    }

    #[test]
    fn edges_of_the_fold() {
        let p = MERSENNE_PRIME;
        for value in [0, 1, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 7 * p, 8 * p, 8 * p + 6, u64::MAX] {
            assert_eq!(modulo_mersenne(value), value % p, "{value}");
        }
    }

    #[test]
    fn short_texts_meet_when_equal_and_only_then() {
        let minhash = MinHash::new(5, 14, 8, 1);
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

    #[test]
    fn the_s_curve_of_fineweb() {
        // Published with the setting: 0.75 → 77 %, 0.8 → 92 %, 0.85 → 98.8 %.
        for (similarity, published) in [(0.75, 0.77), (0.8, 0.92), (0.85, 0.988)] {
            assert!((candidate_probability(similarity, 14, 8) - published).abs() < 0.006, "{similarity}");
        }
    }

    const A1: [u64; 3] = [775_169_054_918_279_404, 1_758_426_461_858_698_313, 2_109_959_069_025_162];
    const A1_LAST: u64 = 223_865_076_026_037_746;
    const B1: [u64; 3] = [1_062_448_801_025_099_917, 1_324_811_268_927_594_100, 1_217_488_311_597_731_462];
    const B1_LAST: u64 = 1_097_409_548_522_419_201;
}
