//! XXH64 (Collet 2012) with seed 0 of many short stretches of one buffer.
//!
//! Shingles have any length below some sixty bytes, which nobody guesses, and every step of a hash waits for the one before. So
//! with AVX-512, which multiplies eight 64-bit numbers at a time, a batch of stretches is hashed side by side: every step that a
//! stretch of less than [`LONGEST`] bytes can have is computed, and each takes those that it has. Other machines hash one
//! after the other, and so are longer stretches.

use std::ops::Range;

use xxhash_rust::xxh64::xxh64;

/// Stretches that are hashed together.
const BATCH: usize = 64;
/// Bytes that a stretch of a batch is shorter than: with one round over all four lanes at most.
const LONGEST: usize = 64;
/// Bytes behind the last stretch that may be read.
const BEYOND: usize = LONGEST;

const PRIMES: [u64; 5] =
    [0x9e37_79b1_85eb_ca87, 0xc2b2_ae3d_27d4_eb4f, 0x1656_67b1_9e37_79f9, 0x85eb_ca77_c2b2_ae63, 0x27d4_eb2f_1656_67c5];

/// Append the hash of the bytes of `buffer` at every place of `places`. The buffer is as it was afterwards.
pub(crate) fn hash_each(buffer: &mut Vec<u8>, places: impl Iterator<Item = Range<usize>>, hashes: &mut Vec<u64>) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
        fn avx512(batch: &Batch, hashes: &mut [u64; BATCH]) {
            hash_batch(batch, hashes);
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: the processor has these features.
            return hash_batches(buffer, places, hashes, |batch, hashes| unsafe { avx512(batch, hashes) });
        }
    }
    hashes.extend(places.map(|place| xxh64(&buffer[place], 0)));
}

/// As [`hash_each`], by batches that `hash_batch` hashes.
#[inline(always)]
fn hash_batches(
    buffer: &mut Vec<u8>,
    mut places: impl Iterator<Item = Range<usize>>,
    hashes: &mut Vec<u64>,
    hash_batch: impl Fn(&Batch, &mut [u64; BATCH]),
) {
    let end = buffer.len();
    buffer.resize(end + BEYOND, 0);
    let mut batch = Batch::default();
    let mut of_batch = [0; BATCH];
    let mut long: Vec<(usize, Range<usize>)> = Vec::new();
    loop {
        let mut n = 0;
        for place in places.by_ref().take(BATCH) {
            if place.len() >= LONGEST {
                long.push((hashes.len() + n, place.clone()));
            }
            batch.put(n, buffer, place);
            n += 1;
        }
        hash_batch(&batch, &mut of_batch);
        hashes.extend_from_slice(&of_batch[..n]);
        long.drain(..).for_each(|(at, place)| hashes[at] = xxh64(&buffer[place], 0));
        if n < BATCH {
            break;
        }
    }
    buffer.truncate(end);
}

/// What is hashed of a batch, by the place in a stretch; numbers are little-endian.
struct Batch {
    /// The first 32 bytes.
    first: [[u64; BATCH]; 4],
    /// Of what is behind those that go through the lanes, the first 24 bytes.
    rest: [[u64; BATCH]; 3],
    /// What is behind the last eighth byte.
    last: [u64; BATCH],
    length: [u64; BATCH],
}

impl Default for Batch {
    fn default() -> Self {
        Self { first: [[0; BATCH]; 4], rest: [[0; BATCH]; 3], last: [0; BATCH], length: [0; BATCH] }
    }
}

impl Batch {
    /// Put the stretch of `buffer` at `place` at place `n`; [`BEYOND`] bytes are behind it.
    #[inline(always)]
    fn put(&mut self, n: usize, buffer: &[u8], place: Range<usize>) {
        let length = place.len().min(LONGEST - 1);
        let bytes = buffer[place.start..].first_chunk().unwrap_or(&[0; LONGEST]);
        let eight = |at: usize| bytes[at..].first_chunk().map_or(0, |eight| u64::from_le_bytes(*eight));
        (0..4).for_each(|i| self.first[i][n] = eight(8 * i));
        let rest = length & 32;
        (0..3).for_each(|i| self.rest[i][n] = eight(rest + 8 * i));
        self.last[n] = eight(length & 56);
        self.length[n] = length as u64;
    }
}

/// Loops over a batch are what a compiler makes vectors of.
#[inline(always)]
fn hash_batch(batch: &Batch, hashes: &mut [u64; BATCH]) {
    for n in 0..BATCH {
        let length = batch.length[n];
        let mut lanes = [PRIMES[0].wrapping_add(PRIMES[1]), PRIMES[1], 0, PRIMES[0].wrapping_neg()];
        for (lane, first) in lanes.iter_mut().zip(&batch.first) {
            *lane = round(*lane, first[n]);
        }
        let [a, b, c, d] = lanes;
        let mut hash = a.rotate_left(1).wrapping_add(b.rotate_left(7));
        hash = hash.wrapping_add(c.rotate_left(12)).wrapping_add(d.rotate_left(18));
        for lane in lanes {
            hash = (hash ^ round(0, lane)).wrapping_mul(PRIMES[0]).wrapping_add(PRIMES[3]);
        }
        hash = if length >= 32 { hash } else { PRIMES[4] }.wrapping_add(length);
        let left = length & 31;
        for (i, rest) in batch.rest.iter().enumerate() {
            let next = (hash ^ round(0, rest[n])).rotate_left(27).wrapping_mul(PRIMES[0]).wrapping_add(PRIMES[3]);
            hash = if left >= 8 * (i as u64 + 1) { next } else { hash };
        }
        let mut last = batch.last[n];
        let four = (last & 0xffff_ffff).wrapping_mul(PRIMES[0]);
        let next = (hash ^ four).rotate_left(23).wrapping_mul(PRIMES[1]).wrapping_add(PRIMES[2]);
        hash = if left & 4 == 0 { hash } else { next };
        last = if left & 4 == 0 { last } else { last >> 32 };
        for i in 0..3 {
            let byte = (last >> (8 * i) & 0xff).wrapping_mul(PRIMES[4]);
            let next = (hash ^ byte).rotate_left(11).wrapping_mul(PRIMES[0]);
            hash = if left & 3 > i { next } else { hash };
        }
        hash = (hash ^ hash >> 33).wrapping_mul(PRIMES[1]);
        hash = (hash ^ hash >> 29).wrapping_mul(PRIMES[2]);
        hashes[n] = hash ^ hash >> 32;
    }
}

#[inline(always)]
fn round(lane: u64, eight: u64) -> u64 {
    lane.wrapping_add(eight.wrapping_mul(PRIMES[1])).rotate_left(31).wrapping_mul(PRIMES[0])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_stretch_has_its_xxh64(
            bytes in prop::collection::vec(any::<u8>(), 150), starts in prop::collection::vec(0usize..150, 0..4),
        ) {
            let places = || starts.iter().flat_map(|start| (*start..=150).map(|end| *start..end));
            let expected: Vec<u64> = places().map(|place| xxh64(&bytes[place], 0)).collect();
            let mut buffer = bytes.clone();
            let mut hashes = Vec::new();
            hash_each(&mut buffer, places(), &mut hashes);
            prop_assert_eq!(&hashes, &expected);
            hashes.clear();
            hash_batches(&mut buffer, places(), &mut hashes, hash_batch);
            prop_assert_eq!(&hashes, &expected);
            prop_assert_eq!(buffer, bytes);
        }
    }
}
