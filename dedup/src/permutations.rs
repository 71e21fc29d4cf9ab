//! The permutations of a MinHash signature and their minima, one loop for every instruction set.
//!
//! A kernel is written once over lanes and compiled for AVX-512, AVX2 and the machine's base set (which
//! on aarch64 has NEON); run-time detection chooses. Integer arithmetic leaves no room for them to
//! differ, and a plain loop in the tests agrees bit for bit.

use crate::numpy_random::RandomState;

/// The Mersenne prime 2⁶¹ − 1.
pub const MERSENNE_PRIME: u64 = (1 << 61) - 1;

/// Permutations that are worked on at a time: two AVX-512 registers of 64-bit numbers.
const LANES: usize = 16;
/// The same for 32-bit numbers: four AVX-512 registers, eight of AVX2; and what is worked on behind the last of these.
const MANY_LANES: usize = 64;
const NARROW_LANES: usize = 16;

/// datatrove's permutations: `(a·h + b) mod 2⁶⁴ mod 2⁶¹ − 1` with numpy's coefficients.
#[derive(Clone, Debug)]
pub(crate) struct Mersenne {
    /// Filled up to a multiple of [`LANES`], as `b`.
    pub(crate) a: Vec<u64>,
    pub(crate) b: Vec<u64>,
}

impl Mersenne {
    pub(crate) fn new(n: usize, seed: u32) -> Self {
        let mut random = RandomState::new(seed);
        let mut draw = |low, fill| {
            let mut drawn: Vec<u64> = (0..n).map(|_| random.randint(low, MERSENNE_PRIME)).collect();
            drawn.resize(n.next_multiple_of(LANES), fill);
            drawn
        };
        // A minimum near zero would be looked for again.
        Self { a: draw(1, 0), b: draw(0, MERSENNE_PRIME / 2) }
    }

    /// The smallest permuted hash of every permutation, and more up to a multiple of the lanes.
    pub(crate) fn minima(&self, hashes: &[u64], minima: &mut Vec<u64>) {
        minima.resize(self.a.len(), 0);
        mersenne_minima(hashes, &self.a, &self.b, minima);
    }
}

/// Permutations of the 32-bit numbers: `a·h + b mod 2³²` with odd `a`, of the upper half of the hash.
///
/// The hashes are well mixed, so an affine map is enough: what is measured against the S-curve in
/// docs/BENCHMARKS.md. Two elements of a document of a million shingles share a value with
/// probability 2⁻¹², which moves an estimate by less than its rounding.
#[derive(Clone, Debug)]
pub(crate) struct Affine {
    /// Filled up with zeroes to a multiple of [`NARROW_LANES`], as `b`.
    a: Vec<u32>,
    b: Vec<u32>,
}

impl Affine {
    pub(crate) fn new(n: usize, seed: u32) -> Self {
        let mut state = u64::from(seed);
        let mut draw = |odd: u32| {
            let mut drawn: Vec<u32> = (0..n).map(|_| (split_mix(&mut state) >> 32) as u32 | odd).collect();
            drawn.resize(n.next_multiple_of(NARROW_LANES), 0);
            drawn
        };
        Self { a: draw(1), b: draw(0) }
    }

    /// The smallest permuted hash of every permutation, and more up to a multiple of the lanes.
    pub(crate) fn minima(&self, hashes: &[u64], minima: &mut Vec<u32>) {
        minima.resize(self.a.len(), 0);
        affine_minima(hashes, &self.a, &self.b, minima);
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Define `$name`, which runs the loop `$loop` on the best instruction set of this machine.
macro_rules! dispatched {
    ($name:ident, $loop:ident, $number:ty) => {
        fn $name(hashes: &[u64], a: &[$number], b: &[$number], minima: &mut [$number]) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
                fn avx512(hashes: &[u64], a: &[$number], b: &[$number], minima: &mut [$number]) {
                    $loop(hashes, a, b, minima);
                }
                #[target_feature(enable = "avx2")]
                fn avx2(hashes: &[u64], a: &[$number], b: &[$number], minima: &mut [$number]) {
                    $loop(hashes, a, b, minima);
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the processor has these features.
                    return unsafe { avx512(hashes, a, b, minima) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    return unsafe { avx2(hashes, a, b, minima) };
                }
            }
            #[cfg(target_arch = "aarch64")]
            {
                #[target_feature(enable = "neon")]
                fn neon(hashes: &[u64], a: &[$number], b: &[$number], minima: &mut [$number]) {
                    $loop(hashes, a, b, minima);
                }
                if std::arch::is_aarch64_feature_detected!("neon") {
                    // SAFETY: as above.
                    return unsafe { neon(hashes, a, b, minima) };
                }
            }
            $loop(hashes, a, b, minima);
        }
    };
}

dispatched!(mersenne_minima, mersenne_loop, u64);
dispatched!(affine_minima, affine_loop, u32);

/// The slices of numbers are equally long, a multiple of [`LANES`].
///
/// What is compared is not the remainder `v` of `x = a·h + b` but the lowest 61 bits of `(x + 1) + ((x + 1) >> 61)`, shifted to the top,
/// which leaves out the last step of a remainder. They are `v + 1`, but for the few `x` whose top three bits and rest come to the prime
/// or more: there they are 7 at most. So a minimum of 8 and more is right, and a smaller one, which nobody will ever
/// see but a test, is looked for again.
#[inline(always)]
fn mersenne_loop(hashes: &[u64], a: &[u64], b: &[u64], minima: &mut [u64]) {
    let coefficients = a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0);
    for (minima, (a, b)) in minima.as_chunks_mut::<LANES>().0.iter_mut().zip(coefficients) {
        let mut least = [u64::MAX; LANES];
        let b_and_one = b.map(|b| b.wrapping_add(1));
        for &hash in hashes {
            for lane in 0..LANES {
                let x = hash.wrapping_mul(a[lane]).wrapping_add(b_and_one[lane]);
                least[lane] = least[lane].min(x.wrapping_add(x >> 61) << 3);
            }
        }
        *minima = least.map(|least| (least >> 3).wrapping_sub(1));
        for lane in 0..LANES {
            if least[lane] >> 3 < 8 {
                let values =
                    hashes.iter().map(|hash| modulo_mersenne(hash.wrapping_mul(a[lane]).wrapping_add(b[lane])));
                minima[lane] = values.min().unwrap_or(u64::MAX);
            }
        }
    }
}

/// The slices of numbers are equally long, a multiple of [`NARROW_LANES`].
#[inline(always)]
fn affine_loop(hashes: &[u64], a: &[u32], b: &[u32], minima: &mut [u32]) {
    // Many lanes at a time hide how long a product takes.
    let many = a.len() - a.len() % MANY_LANES;
    affine_lanes::<MANY_LANES>(hashes, &a[..many], &b[..many], &mut minima[..many]);
    affine_lanes::<NARROW_LANES>(hashes, &a[many..], &b[many..], &mut minima[many..]);
}

#[inline(always)]
fn affine_lanes<const N: usize>(hashes: &[u64], a: &[u32], b: &[u32], minima: &mut [u32]) {
    let coefficients = a.as_chunks::<N>().0.iter().zip(b.as_chunks::<N>().0);
    for (minima, (a, b)) in minima.as_chunks_mut::<N>().0.iter_mut().zip(coefficients) {
        let mut least = [u32::MAX; N];
        for &hash in hashes {
            let hash = (hash >> 32) as u32;
            for lane in 0..N {
                let value = hash.wrapping_mul(a[lane]).wrapping_add(b[lane]);
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
        let Mersenne { a, b } = Mersenne::new(112, 1);
        assert_eq!(a[..3], [775_169_054_918_279_404, 1_758_426_461_858_698_313, 2_109_959_069_025_162]);
        assert_eq!(a[111], 223_865_076_026_037_746);
        assert_eq!(b[..3], [1_062_448_801_025_099_917, 1_324_811_268_927_594_100, 1_217_488_311_597_731_462]);
        assert_eq!(b[111], 1_097_409_548_522_419_201);
    }

    fn plain_mersenne(hashes: &[u64], a: u64, b: u64) -> u64 {
        let permuted = |h: &u64| {
            let wrapped = (u128::from(*h) * u128::from(a) + u128::from(b)) % (1 << 64);
            (wrapped % u128::from(MERSENNE_PRIME)) as u64
        };
        hashes.iter().map(permuted).min().unwrap()
    }

    fn plain_affine(hashes: &[u64], a: u32, b: u32) -> u32 {
        let permuted = |h: &u64| ((u64::from((h >> 32) as u32) * u64::from(a) + u64::from(b)) % (1 << 32)) as u32;
        hashes.iter().map(permuted).min().unwrap()
    }

    proptest! {
        #[test]
        fn the_fold_is_a_remainder(value: u64) {
            prop_assert_eq!(u128::from(modulo_mersenne(value)), u128::from(value) % u128::from(MERSENNE_PRIME));
        }

        #[test]
        fn the_detected_kernels_and_the_base_kernels_give_the_plain_minima(
            hashes in prop::collection::vec(any::<u64>(), 1..40),
            seed: u32,
            n in 1usize..150,
        ) {
            let wide = Mersenne::new(n, seed);
            let plain: Vec<u64> = (0..n).map(|i| plain_mersenne(&hashes, wide.a[i], wide.b[i])).collect();
            let (mut picked, mut base) = (Vec::new(), vec![0; wide.a.len()]);
            wide.minima(&hashes, &mut picked);
            mersenne_loop(&hashes, &wide.a, &wide.b, &mut base);
            prop_assert_eq!(&picked[..n], &plain[..]);
            prop_assert_eq!(&base[..n], &plain[..]);
            let narrow = Affine::new(n, seed);
            let plain: Vec<u32> = (0..n).map(|i| plain_affine(&hashes, narrow.a[i], narrow.b[i])).collect();
            let (mut picked, mut base) = (Vec::new(), vec![0; narrow.a.len()]);
            narrow.minima(&hashes, &mut picked);
            affine_loop(&hashes, &narrow.a, &narrow.b, &mut base);
            prop_assert_eq!(&picked[..n], &plain[..]);
            prop_assert_eq!(&base[..n], &plain[..]);
        }
    }

    #[test]
    fn minima_that_the_kernel_cannot_tell_are_looked_for_again() {
        // The identity, and a permutation that moves every value by one; hashes around the multiples of the prime and of 2⁶¹.
        let permutations = Mersenne { a: vec![1; LANES], b: (0..LANES as u64).map(|i| i % 2).collect() };
        let near = |n: u64, of: u64| (0..18).map(move |i| n.wrapping_mul(of).wrapping_sub(9).wrapping_add(i));
        let edges: Vec<u64> = (0..9).flat_map(|n| near(n, MERSENNE_PRIME).chain(near(n, 1 << 61))).collect();
        let large = MERSENNE_PRIME / 2;
        for &edge in &edges {
            for hashes in [vec![edge], vec![large, edge], vec![edge, large, large + 1]] {
                let mut minima = Vec::new();
                permutations.minima(&hashes, &mut minima);
                for (lane, minimum) in minima.iter().enumerate() {
                    assert_eq!(*minimum, plain_mersenne(&hashes, 1, lane as u64 % 2), "{hashes:?}");
                }
            }
        }
        let mut minima = Vec::new();
        permutations.minima(&edges, &mut minima);
        assert_eq!(minima, [0; LANES]);
    }

    #[test]
    fn edges_of_the_fold() {
        let p = MERSENNE_PRIME;
        for value in [0, 1, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 7 * p, 8 * p, 8 * p + 6, u64::MAX] {
            assert_eq!(modulo_mersenne(value), value % p, "{value}");
        }
    }
}
