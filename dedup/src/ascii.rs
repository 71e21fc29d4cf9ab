//! The bytes of a text sixty-four at a time: of what kind each is, as bits of masks, and all of them in lower case.
//!
//! Words begin and end where a mask changes, which takes no guess of a branch for every byte. The masks are made by one
//! kernel for AVX-512, AVX2 and everything else (plain arithmetic that a compiler makes NEON of); run-time detection
//! chooses, and tests compare.

/// Bytes of a mask.
pub(crate) const BLOCK: usize = 64;
/// Zeroes behind the last block, for loads that go beyond a word.
const PADDING: usize = 16;

/// Of what kind the bytes of a block are, the first as the lowest bit. What has no bit is another ASCII character or lies
/// behind the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Block {
    /// ASCII letters.
    pub(crate) letters: u64,
    /// ASCII digits.
    pub(crate) digits: u64,
    /// `_`
    pub(crate) low_lines: u64,
    /// `:`
    pub(crate) colons: u64,
    /// `,` and `;`
    pub(crate) commas: u64,
    /// `.` and `'`
    pub(crate) dots: u64,
    /// Bytes of characters beyond ASCII.
    pub(crate) others: u64,
}

/// The blocks of a text. Memory is kept from text to text.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    /// The bytes, ASCII letters in lower case, and zeroes behind them: sixteen bytes may be read from any byte of the text.
    pub(crate) lower: Vec<u8>,
    /// One more than the text fills: there is a block that its end is in.
    pub(crate) blocks: Vec<Block>,
}

impl Blocks {
    /// Replace the blocks by those of `text`.
    pub(crate) fn set(&mut self, text: &[u8]) {
        let blocks = text.len() / BLOCK + 1;
        self.lower.clear();
        self.lower.extend_from_slice(text);
        self.lower.resize(blocks * BLOCK + PADDING, 0);
        self.blocks.clear();
        self.blocks.resize(blocks, Block::default());
        read(self.lower.as_chunks_mut().0, &mut self.blocks);
    }

    /// Place of the first byte from `at` on that is not ASCII.
    pub(crate) fn next_other(&self, at: usize) -> Option<usize> {
        let from = at / BLOCK;
        let mut seen = u64::MAX << (at % BLOCK);
        for (i, block) in self.blocks[from..].iter().enumerate() {
            let others = block.others & seen;
            if others != 0 {
                return Some((from + i) * BLOCK + others.trailing_zeros() as usize);
            }
            seen = u64::MAX;
        }
        None
    }
}

/// Sort the bytes by their kind, and put them in lower case.
fn read(bytes: &mut [[u8; BLOCK]], blocks: &mut [Block]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: the processor has these features.
            return unsafe { read_avx512(bytes, blocks) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { read_avx2(bytes, blocks) };
        }
    }
    read_plain(bytes, blocks);
}

fn read_plain(bytes: &mut [[u8; BLOCK]], blocks: &mut [Block]) {
    for (bytes, block) in bytes.iter_mut().zip(blocks) {
        let mask = |is: fn(u8) -> bool, bytes: &[u8; BLOCK]| bits(&bytes.map(|byte| u8::from(is(byte))));
        bytes.iter_mut().for_each(|byte| *byte |= u8::from(byte.wrapping_sub(b'A') < 26) << 5);
        *block = Block {
            letters: mask(|c| c.wrapping_sub(b'a') < 26, bytes),
            digits: mask(|c| c.wrapping_sub(b'0') < 10, bytes),
            low_lines: mask(|c| c == b'_', bytes),
            colons: mask(|c| c == b':', bytes),
            commas: mask(|c| c == b',' || c == b';', bytes),
            dots: mask(|c| c == b'.' || c == b'\'', bytes),
            others: mask(|c| c >= 0x80, bytes),
        };
    }
}

/// One bit for each byte, which is 0 or 1.
fn bits(flags: &[u8; BLOCK]) -> u64 {
    // The product moves bit 0 of byte k to bit 56 + k; no two of its terms meet.
    let eight = |eight: &[u8; 8]| u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080) >> 56;
    flags.as_chunks::<8>().0.iter().enumerate().fold(0, |all, (i, flags)| all | eight(flags) << (8 * i))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn read_avx512(bytes: &mut [[u8; BLOCK]], blocks: &mut [Block]) {
    use std::arch::x86_64::*;
    let all = |byte: u8| _mm512_set1_epi8(byte as i8);
    for (bytes, block) in bytes.iter_mut().zip(blocks) {
        // SAFETY: the array is as long as the register.
        let given = unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) };
        let within = |v, first: u8, n: u8| _mm512_cmplt_epu8_mask(_mm512_sub_epi8(v, all(first)), all(n));
        let lower = _mm512_or_si512(given, _mm512_maskz_mov_epi8(within(given, b'A', 26), all(0x20)));
        let is = |byte: u8| _mm512_cmpeq_epi8_mask(lower, all(byte));
        *block = Block {
            letters: within(lower, b'a', 26),
            digits: within(lower, b'0', 10),
            low_lines: is(b'_'),
            colons: is(b':'),
            commas: is(b',') | is(b';'),
            dots: is(b'.') | is(b'\''),
            others: _mm512_movepi8_mask(lower),
        };
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), lower) };
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn read_avx2(bytes: &mut [[u8; BLOCK]], blocks: &mut [Block]) {
    use std::arch::x86_64::*;
    let all = |byte: u8| _mm256_set1_epi8(byte as i8);
    let bits = |flags| u64::from(_mm256_movemask_epi8(flags) as u32);
    for (bytes, block) in bytes.iter_mut().zip(blocks) {
        *block = Block::default();
        for (half, bytes) in bytes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            // SAFETY: the array is as long as the register.
            let given = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
            // There is no comparison of bytes without a sign: what is below a bound is its own minimum with it.
            let within = |v, first: u8, n: u8| {
                let from = _mm256_sub_epi8(v, all(first));
                _mm256_cmpeq_epi8(_mm256_min_epu8(from, all(n - 1)), from)
            };
            let lower = _mm256_or_si256(given, _mm256_and_si256(within(given, b'A', 26), all(0x20)));
            let is = |byte: u8| _mm256_cmpeq_epi8(lower, all(byte));
            let shift = 32 * half;
            block.letters |= bits(within(lower, b'a', 26)) << shift;
            block.digits |= bits(within(lower, b'0', 10)) << shift;
            block.low_lines |= bits(is(b'_')) << shift;
            block.colons |= bits(is(b':')) << shift;
            block.commas |= bits(_mm256_or_si256(is(b','), is(b';'))) << shift;
            block.dots |= bits(_mm256_or_si256(is(b'.'), is(b'\''))) << shift;
            block.others |= bits(lower) << shift;
            // SAFETY: as above.
            unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), lower) };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Kernel = fn(&mut [[u8; BLOCK]], &mut [Block]);

    /// Every kernel that this machine can run.
    fn kernels() -> Vec<Kernel> {
        #[allow(unused_mut)]
        let mut kernels: Vec<Kernel> = vec![read, read_plain];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                // SAFETY: the processor has these features.
                kernels.push(|bytes, blocks| unsafe { read_avx512(bytes, blocks) });
            }
            if is_x86_feature_detected!("avx2") {
                // SAFETY: as above.
                kernels.push(|bytes, blocks| unsafe { read_avx2(bytes, blocks) });
            }
        }
        kernels
    }

    proptest! {
        #[test]
        fn every_kernel_sorts_every_byte(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            // Every byte at every place of a block, sooner or later; the first 256 in order at least.
            let text: Vec<u8> = (0..=255).chain(bytes).collect();
            for kernel in kernels() {
                let mut all = Blocks::default();
                all.set(&text);
                let mut lower = text.clone();
                lower.resize(all.blocks.len() * BLOCK, 0);
                kernel(lower.as_chunks_mut().0, &mut all.blocks);
                for (at, byte) in text.iter().enumerate() {
                    let block = all.blocks[at / BLOCK];
                    let of = |mask: u64| mask >> (at % BLOCK) & 1 == 1;
                    prop_assert_eq!(lower[at], byte.to_ascii_lowercase());
                    prop_assert_eq!(of(block.letters), byte.is_ascii_alphabetic());
                    prop_assert_eq!(of(block.digits), byte.is_ascii_digit());
                    prop_assert_eq!(of(block.low_lines), *byte == b'_');
                    prop_assert_eq!(of(block.colons), *byte == b':');
                    prop_assert_eq!(of(block.commas), b",;".contains(byte));
                    prop_assert_eq!(of(block.dots), b".'".contains(byte));
                    prop_assert_eq!(of(block.others), !byte.is_ascii());
                }
                let last = all.blocks[text.len() / BLOCK];
                let kinds = last.letters | last.digits | last.low_lines | last.colons | last.commas | last.dots | last.others;
                prop_assert_eq!(kinds & u64::MAX << (text.len() % BLOCK), 0, "nothing is behind the text");
                let other = text[100..].iter().position(|byte| !byte.is_ascii()).map(|at| at + 100);
                prop_assert_eq!(all.next_other(100), other);
            }
        }
    }
}
