//! The part of numpy's legacy generator that the permutations of datatrove come from:
//! `RandomState(seed).randint(low, high, dtype=uint64)`.

const N: usize = 624;
const M: usize = 397;

/// MT19937 (Matsumoto and Nishimura 1998), seeded as numpy's `RandomState` does for an integer.
pub(crate) struct RandomState {
    state: [u32; N],
    at: usize,
}

impl RandomState {
    pub(crate) fn new(seed: u32) -> Self {
        let mut state = [seed; N];
        for i in 1..N {
            let previous = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(i as u32);
        }
        Self { state, at: N }
    }

    fn next_u32(&mut self) -> u32 {
        if self.at == N {
            for i in 0..N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
                let twist = if y & 1 == 0 { 0 } else { 0x9908_b0df };
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ twist;
            }
            self.at = 0;
        }
        let mut y = self.state[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// A number in `low..high` (more than 2³² apart): masked and rejected, high half drawn first.
    pub(crate) fn randint(&mut self, low: u64, high: u64) -> u64 {
        let span = high - low - 1;
        let mask = u64::MAX >> span.leading_zeros();
        loop {
            let drawn = (u64::from(self.next_u32()) << 32 | u64::from(self.next_u32())) & mask;
            if drawn <= span {
                return low + drawn;
            }
        }
    }
}
