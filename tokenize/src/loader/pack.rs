//! Sequences of one source, cut out of its stream in windows.
//!
//! A window is a fixed number of tokens of the stream and a fixed number of sequences, so any of them is
//! found by its number. By concatenation a sequence is the next tokens, whatever they belong to. By best
//! fit (Ding et al. 2024, "Fewer Truncations Improve Language Modeling") documents are put into
//! sequences whole where they fit, the longest first, each where it leaves least room; a window then has
//! some room to spare, and what fits nowhere at the end is cut to fill the gaps.

use std::collections::BTreeSet;

use super::batch::Row;
use super::config::{DataConfig, Packing};
use super::order::{WINDOW, permutation};
use super::stream::Stream;
use crate::error::{Error, Result};

/// How a stream is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    packing: Packing,
    /// T.
    length: usize,
    /// Sequences of a window.
    pub sequences: u64,
    /// Tokens of a window.
    pub tokens: u64,
}

impl Plan {
    /// Windows of about `window_tokens` tokens, of a stream that has `per_epoch` in an epoch.
    pub fn new(config: &DataConfig, length: usize, window_tokens: f64, per_epoch: u64) -> Self {
        let most = (window_tokens as u64).min(per_epoch);
        let sequences = (most / length as u64).max(1);
        let tokens = match config.packing {
            Packing::Concatenate => sequences * length as u64,
            Packing::BestFit => {
                let room = sequences * (length as u64 + 1);
                ((room as f64 * (1.0 - config.padding)).floor() as u64).clamp(1, room)
            }
        };
        Self { packing: config.packing, length, sequences, tokens }
    }

    /// Inputs of the sequences of a window for a token of the stream: 1, and more where there is padding.
    pub fn inputs_per_token(&self) -> f64 {
        (self.sequences * self.length as u64) as f64 / self.tokens as f64
    }

    /// Share of the positions of all sequences that is padding.
    pub fn padding(&self) -> f64 {
        match self.packing {
            Packing::Concatenate => 0.0,
            Packing::BestFit => 1.0 - self.tokens as f64 / (self.sequences * (self.length as u64 + 1)) as f64,
        }
    }
}

/// What packing did to the documents of a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cuts {
    /// Documents, and parts of documents that the window begins or ends with.
    pub documents: u64,
    /// Those of them that fit into a sequence.
    pub short: u64,
    /// Those of these that were cut all the same, by room that was scattered or to leave no sequence empty.
    pub cut: u64,
}

/// The sequences of a source by number.
pub struct Sequences {
    stream: Stream,
    plan: Plan,
    seed: u64,
    pad: u32,
    window: Option<Window>,
}

/// A window: its tokens in stream order, and its sequences in the order they are used in.
#[derive(Default)]
struct Window {
    number: u64,
    tokens: Vec<u32>,
    /// Positions in `tokens` at which a document begins, ascending.
    starts: Vec<u32>,
    order: Vec<u32>,
    /// By best fit: the parts of `tokens` in each sequence.
    bins: Vec<Vec<Part>>,
    cuts: Cuts,
}

/// A run of tokens of one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    from: u32,
    length: u32,
}

impl Sequences {
    /// Of this stream. Padding is the token `pad`.
    pub fn new(stream: Stream, plan: Plan, seed: u64, pad: u32) -> Self {
        Self { stream, plan, seed, pad, window: None }
    }

    /// Append a sequence to a batch.
    pub fn append(&mut self, sequence: u64, row: &mut Row<'_>) -> Result<()> {
        let Plan { packing, length, sequences, .. } = self.plan;
        let pad = self.pad;
        let window = self.window(sequence / sequences)?;
        let place = window.order[(sequence % sequences) as usize] as usize;
        let mut starts = vec![0];
        match packing {
            Packing::Concatenate => {
                let from = place * length;
                row.tokens.extend_from_slice(&window.tokens[from..=from + length]);
                let first = window.starts.partition_point(|&s| s as usize <= from);
                let inside = window.starts[first..].iter().take_while(|&&s| s as usize <= from + length);
                starts.extend(inside.map(|&s| s - from as u32));
                row.filled.push(length as u32 + 1);
            }
            Packing::BestFit => {
                let mut filled = 0;
                for part in &window.bins[place] {
                    if filled > 0 {
                        starts.push(filled);
                    }
                    filled += part.length;
                    row.tokens.extend_from_slice(&window.tokens[part.from as usize..][..part.length as usize]);
                }
                row.tokens.extend(std::iter::repeat_n(pad, length + 1 - filled as usize));
                row.filled.push(filled);
            }
        }
        row.document_starts.push(starts);
        Ok(())
    }

    /// What packing does to the documents of a window.
    pub fn cuts(&mut self, window: u64) -> Result<Cuts> {
        self.window(window).map(|window| window.cuts)
    }

    fn window(&mut self, number: u64) -> Result<&Window> {
        let window = match self.window.take() {
            Some(window) if window.number == number => window,
            old => self.make(number, old.unwrap_or_default())?,
        };
        Ok(&*self.window.insert(window))
    }

    /// A window in the buffers of another: there is never more than one.
    fn make(&mut self, number: u64, mut window: Window) -> Result<Window> {
        let Plan { packing, length, sequences, tokens } = self.plan;
        let Window { tokens: ids, starts, .. } = &mut window;
        ids.clear();
        starts.clear();
        // By concatenation one token more: the last target of the last sequence.
        let more = usize::from(packing == Packing::Concatenate);
        let count = usize::try_from(tokens).ok().filter(|&n| n < u32::MAX as usize);
        let count = count.ok_or_else(|| Error::Loader("a shuffle window has 2^32 tokens or more".into()))?;
        self.stream.read(u128::from(number) * u128::from(tokens), count + more, ids, starts)?;
        window.order = permutation(&[self.seed, WINDOW, number], sequences as usize);
        if packing == Packing::BestFit {
            let room = length as u32 + 1;
            (window.bins, window.cuts) = best_fit(&window.starts, count as u32, room, sequences as usize);
        }
        window.number = number;
        Ok(window)
    }
}

/// Put the documents that begin at `starts` among `tokens` tokens into `bins` bins of `room` tokens, which
/// are room enough for all of them.
fn best_fit(starts: &[u32], tokens: u32, room: u32, bins: usize) -> (Vec<Vec<Part>>, Cuts) {
    let mut cuts = Cuts::default();
    // What is before the first start is the rest of a document.
    let mut bounds = vec![0];
    bounds.extend(starts.iter().copied().filter(|&start| start > 0));
    bounds.push(tokens);
    let mut parts = Vec::with_capacity(bounds.len());
    for pair in bounds.windows(2).filter(|pair| pair[0] < pair[1]) {
        cuts.documents += 1;
        cuts.short += u64::from(pair[1] - pair[0] <= room);
        // A document that is longer than a sequence fills some; its rest is a document like others.
        for from in (pair[0]..pair[1]).step_by(room as usize) {
            parts.push(Part { from, length: room.min(pair[1] - from) });
        }
    }
    // The longest first; equals in stream order.
    parts.sort_by_key(|part| (std::cmp::Reverse(part.length), part.from));
    let mut filled: Vec<Vec<Part>> = vec![Vec::new(); bins];
    let mut free: BTreeSet<(u32, u32)> = (0..bins as u32).map(|bin| (room, bin)).collect();
    let mut left = Vec::new();
    for part in parts {
        let Some(&(space, bin)) = free.range((part.length, 0)..).next() else {
            left.push(part);
            continue;
        };
        free.remove(&(space, bin));
        filled[bin as usize].push(part);
        if space > part.length {
            free.insert((space - part.length, bin));
        }
    }
    for mut part in left {
        // The widest gaps, so that it falls into few parts.
        while part.length > 0
            && let Some((space, bin)) = free.pop_last()
        {
            let length = space.min(part.length);
            filled[bin as usize].push(Part { from: part.from, length });
            part = Part { from: part.from + length, length: part.length - length };
            if space > length {
                free.insert((space - length, bin));
            }
        }
    }
    leave_none_empty(&mut filled);
    // What is cut has a part that begins inside of it.
    let mut begins: Vec<u32> = filled.iter().flatten().map(|part| part.from).collect();
    begins.sort_unstable();
    let is_cut = |pair: &&[u32]| {
        let next = begins.partition_point(|&from| from <= pair[0]);
        pair[1] - pair[0] <= room && begins.get(next).is_some_and(|&from| from < pair[1])
    };
    cuts.cut = bounds.windows(2).filter(is_cut).count() as u64;
    (filled, cuts)
}

/// A sequence of padding alone would teach nothing, and a batch of them has no loss: give each empty bin the
/// shortest part of the bin that has the most, or half of the longest.
fn leave_none_empty(bins: &mut [Vec<Part>]) {
    for empty in 0..bins.len() {
        if !bins[empty].is_empty() {
            continue;
        }
        let Some(donor) = (0..bins.len()).max_by_key(|&bin| (bins[bin].len(), std::cmp::Reverse(bin))) else { return };
        let part = match bins[donor].as_mut_slice() {
            [_, .., _] => bins[donor].pop(),
            _ => bins.iter_mut().flatten().max_by_key(|part| part.length).filter(|part| part.length > 1).map(|part| {
                let length = part.length / 2;
                part.length -= length;
                Part { from: part.from + part.length, length }
            }),
        };
        bins[empty].extend(part);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_token_is_in_one_bin(
            lengths in prop::collection::vec(1u32..90, 1..60),
            room in 2u32..40,
            spare in 0usize..4,
            begins_inside in any::<bool>(),
        ) {
            let tokens: u32 = lengths.iter().sum();
            let bins = tokens.div_ceil(room) as usize + spare;
            let mut at = 0;
            let mut starts: Vec<u32> = lengths.iter().map(|length| { at += length; at - length }).collect();
            if begins_inside {
                starts.remove(0);
            }
            let (filled, cuts) = best_fit(&starts, tokens, room, bins);
            prop_assert_eq!(filled.len(), bins);
            let mut seen = vec![0; tokens as usize];
            for bin in &filled {
                prop_assert!(bin.iter().map(|part| part.length).sum::<u32>() <= room);
                for part in bin {
                    prop_assert!(part.length > 0);
                    (part.from..part.from + part.length).for_each(|token| seen[token as usize] += 1);
                    // No part holds the start of a document but at its own.
                    prop_assert!(!starts.iter().any(|&s| s > part.from && s < part.from + part.length));
                }
            }
            prop_assert!(seen.iter().all(|&n| n == 1));
            prop_assert!(filled.iter().all(|bin| !bin.is_empty()) || tokens < bins as u32);
            prop_assert_eq!(cuts.documents, lengths.len() as u64);
            // Of the documents that fit into a bin, those that are not in one bin as a whole.
            let whole = |from: u32, length: u32| filled.iter().flatten().any(|part| *part == Part { from, length });
            let mut at = 0;
            let (mut short, mut cut) = (0, 0);
            for &length in &lengths {
                short += u64::from(length <= room);
                cut += u64::from(length <= room && !whole(at, length));
                at += length;
            }
            prop_assert_eq!((cuts.short, cuts.cut), (short, cut));
        }
    }

    #[test]
    fn the_longest_go_first_and_where_they_leave_least_room() {
        // Lengths 3, 6, 4, 7 into two bins of ten: 7 + 3 and 6 + 4, nothing cut.
        let (bins, cuts) = best_fit(&[0, 3, 9, 13], 20, 10, 2);
        let part = |from, length| Part { from, length };
        assert_eq!(bins, [vec![part(13, 7), part(0, 3)], vec![part(3, 6), part(9, 4)]]);
        assert_eq!(cuts, Cuts { documents: 4, short: 4, cut: 0 });
        // Without room to spare something must be cut.
        let (bins, cuts) = best_fit(&[0, 7, 14], 20, 10, 2);
        assert_eq!(bins, [vec![part(0, 7), part(17, 3)], vec![part(7, 7), part(14, 3)]]);
        assert_eq!(cuts, Cuts { documents: 3, short: 3, cut: 1 });
        // Nor where there are more bins than documents: none may be empty.
        let (bins, cuts) = best_fit(&[0, 4], 9, 10, 3);
        assert_eq!(bins, [vec![part(4, 3)], vec![part(0, 4)], vec![part(7, 2)]]);
        assert_eq!(cuts, Cuts { documents: 2, short: 2, cut: 1 });
    }
}
