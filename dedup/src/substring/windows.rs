//! The windows of a text and their anchors.

use std::ops::Range;

use xxhash_rust::xxh3::xxh3_128;

use super::{Measure, SubstringConfig};
use crate::shingles::{POLYNOMIAL, Shingles, mix};

/// A run of words of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// Number of its first word.
    pub(super) first: usize,
    /// Number of the word behind its last.
    pub(super) end: usize,
    /// Number of the first word of its anchor.
    pub(super) anchor: usize,
}

/// Finds windows and anchors. Memory is kept from text to text.
#[derive(Debug, Default)]
pub(super) struct Finder {
    shingles: Shingles,
    places: Vec<Range<usize>>,
    /// The word hashes of the text as bytes.
    words: Vec<u8>,
    /// Powers of the polynomial.
    powers: Vec<u64>,
    /// From every word on the shortest run of half the length: the word behind it, and its hash.
    halves: Vec<(usize, u64)>,
    /// For the halves of a block, the smallest of those from each on to the end of the block.
    smallest: Vec<usize>,
    windows: Vec<Window>,
}

impl Finder {
    /// The windows of `text`, in order. A text of 4 GiB and more has none: places are 32 bits.
    pub(super) fn set(&mut self, text: &str, config: &SubstringConfig) -> &[Window] {
        let Self { shingles, places, words, powers, halves, smallest, windows } = self;
        halves.clear();
        windows.clear();
        words.clear();
        places.clear();
        if u32::try_from(text.len()).is_err()
            || (config.measure == Measure::Bytes && text.len() < config.length as usize)
        {
            return windows;
        }
        let hashes = shingles.words(text, places);
        words.resize(8 * hashes.len(), 0);
        words.as_chunks_mut::<8>().0.iter_mut().zip(hashes).for_each(|(word, hash)| *word = hash.to_le_bytes());
        let measure = |first: usize, end: usize| match config.measure {
            _ if end <= first => 0,
            Measure::Words => end - first,
            Measure::Bytes => places[end - 1].end - places[first].start,
        };
        let length = config.length as usize;
        let half = length.div_ceil(2);
        let (mut end, mut sum) = (0, 0u64);
        for (first, go) in hashes.iter().enumerate() {
            while end < hashes.len() && measure(first, end) < half {
                sum = sum.wrapping_mul(POLYNOMIAL).wrapping_add(hashes[end]);
                end += 1;
            }
            if measure(first, end) < half {
                break;
            }
            halves.push((end, mix(sum)));
            while powers.len() < end - first {
                powers.push(powers.last().map_or(1, |power| power.wrapping_mul(POLYNOMIAL)));
            }
            sum = sum.wrapping_sub(go.wrapping_mul(powers[end - first - 1]));
        }
        // The smallest half of a window is that of two parts: of a block of halves, of which the first ones leave one by one, and of
        // those behind, which come one by one. When the block is used up, those behind are the next. No branch of it is hard to
        // guess, and ties go to the first.
        smallest.clear();
        smallest.resize(halves.len(), 0);
        let least = |a: usize, b: usize| if halves[b].1 < halves[a].1 { b } else { a };
        let (mut end, mut next, mut block_end, mut behind) = (0, 0, 0, 0);
        for first in 0..halves.len() {
            while end < hashes.len() && measure(first, end) < length {
                end += 1;
            }
            if measure(first, end) < length {
                break;
            }
            // The half that begins where the window does is in it, so there is one from `first` on.
            while next < halves.len() && halves[next].0 <= end {
                behind = if next == block_end { next } else { least(behind, next) };
                next += 1;
            }
            if first == block_end {
                let mut last = next - 1;
                for half in (first..next).rev() {
                    last = least(half, last);
                    smallest[half] = last;
                }
                block_end = next;
            }
            let anchor = if block_end < next { least(smallest[first], behind) } else { smallest[first] };
            windows.push(Window { first, end, anchor });
        }
        windows
    }

    /// The windows of the last text.
    pub(super) fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// Hash of the anchor of a window.
    pub(super) fn anchor(&self, window: &Window) -> u64 {
        self.halves[window.anchor].1
    }

    /// The bytes of the text that a window is.
    pub(super) fn place(&self, window: &Window) -> Range<usize> {
        self.places[window.first].start..self.places[window.end - 1].end
    }

    /// Hash of what a window is compared by; `text` is what was set.
    pub(super) fn hash(&self, window: &Window, text: &str, measure: Measure) -> u128 {
        match measure {
            Measure::Words => xxh3_128(&self.words[8 * window.first..8 * window.end]),
            Measure::Bytes => xxh3_128(&text.as_bytes()[self.place(window)]),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn windows_are_the_shortest_long_enough_and_anchors_the_smallest_half(
            text in "([abc]{1,3}[ .,\n]{1,2}|東|é ){0,60}", length in 1u32..30, bytes: bool,
        ) {
            let measure = if bytes { Measure::Bytes } else { Measure::Words };
            let config = SubstringConfig { measure, length };
            let mut finder = Finder::default();
            finder.set("something else before, which is longer than a little", &config);
            finder.set(&text, &config);
            let mut places = Vec::new();
            let hashes = Shingles::default().words(&text, &mut places).to_vec();
            let long = |first: usize, end: usize, least: usize| {
                end > first && least <= if bytes { places[end - 1].end - places[first].start } else { end - first }
            };
            let run = |first: usize, least: usize| (first + 1..=hashes.len()).find(|&end| long(first, end, least));
            let hash = |first: usize, end: usize| {
                mix(hashes[first..end].iter().fold(0, |sum: u64, h| sum.wrapping_mul(POLYNOMIAL).wrapping_add(*h)))
            };
            let mut expected = Vec::new();
            for first in 0..hashes.len() {
                let Some(end) = run(first, length as usize) else { continue };
                let halves = (first..end).filter_map(|at| Some((at, run(at, length.div_ceil(2) as usize)?)));
                let anchor = halves.filter(|half| half.1 <= end).min_by_key(|half| hash(half.0, half.1)).unwrap();
                let window = Window { first, end, anchor: anchor.0 };
                prop_assert_eq!(finder.anchor(&window), hash(anchor.0, anchor.1));
                expected.push(window);
            }
            prop_assert_eq!(finder.windows(), &expected[..]);
        }
    }

    #[test]
    fn one_word_in_fourteen_begins_an_anchor() {
        let text: Vec<String> = (0..20_000u32).map(|i| format!("w{}", i.wrapping_mul(2_654_435_761))).collect();
        let mut finder = Finder::default();
        let windows = finder.set(&text.join(" "), &SubstringConfig::default());
        let anchors = windows.chunk_by(|a, b| a.anchor == b.anchor).count() as f64;
        assert!((anchors / 20_000.0 * 27.0 / 2.0 - 1.0).abs() < 0.05, "{anchors}");
    }
}
