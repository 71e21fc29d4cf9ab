//! What a step is trained on.

use std::ops::Range;
use std::sync::Arc;

use crate::Error;
use crate::ops::cross_entropy::IGNORE;
use crate::ops::sequences::Sequences;

/// Rows of packed documents: `length + 1` token ids each, of which the first `length` are read and
/// the last `length` predicted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// `[rows × (length + 1)]` token ids.
    pub tokens: Vec<u32>,
    /// For every row the positions, ascending and below `length + 1`, where a document starts. A
    /// row begins with the start of a document or with the rest of one; either way its state is
    /// zero there. The first token of a document is not predicted from the one before.
    pub starts: Vec<Vec<u32>>,
    /// T, the predicted tokens of a row.
    pub length: usize,
}

/// A batch as the model takes it.
pub(crate) struct Rows {
    pub(crate) inputs: Vec<u32>,
    pub(crate) targets: Vec<u32>,
    pub(crate) sequences: Arc<Sequences>,
}

impl Rows {
    /// Targets that count.
    pub(crate) fn counted(&self) -> usize {
        self.targets.iter().filter(|&&id| id != IGNORE).count()
    }
}

impl Rows {
    /// The tokens `range` of every row.
    pub(crate) fn part(&self, range: Range<usize>) -> Self {
        let length = self.sequences.length();
        let cut = |ids: &[u32]| ids.chunks_exact(length).flat_map(|row| row[range.clone()].iter().copied()).collect();
        Self {
            inputs: cut(&self.inputs),
            targets: cut(&self.targets),
            sequences: Arc::new(self.sequences.part(range.clone())),
        }
    }
}

impl Batch {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.starts.len()
    }

    /// Splits into inputs and targets of at most `rows` rows each.
    pub(crate) fn split(&self, rows: usize) -> Result<Vec<Rows>, Error> {
        let width = self.length + 1;
        if self.length == 0 || self.starts.is_empty() || self.tokens.len() != self.rows() * width {
            return Err(Error::Input(format!(
                "a batch of {} rows of {width} tokens holds {} ids",
                self.rows(),
                self.tokens.len()
            )));
        }
        let parts = self.tokens.chunks(rows * width);
        parts
            .zip(self.starts.chunks(rows))
            .map(|(tokens, starts)| {
                // Checks the starts of the whole row, the last token included.
                Sequences::packed(starts, width)?;
                let mut targets: Vec<u32> = Vec::with_capacity(tokens.len());
                let mut inputs: Vec<u32> = Vec::with_capacity(tokens.len());
                let mut read = Vec::with_capacity(starts.len());
                for (row, starts) in tokens.chunks_exact(width).zip(starts) {
                    inputs.extend(&row[..self.length]);
                    let first = targets.len();
                    targets.extend(&row[1..]);
                    for &start in starts.iter().filter(|&&start| start > 0) {
                        targets[first + start as usize - 1] = IGNORE;
                    }
                    let mut starts = starts.clone();
                    starts.retain(|&start| (start as usize) < self.length);
                    read.push(starts);
                }
                Ok(Rows { inputs, targets, sequences: Arc::new(Sequences::packed(&read, self.length)?) })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_token_of_a_document_is_no_target() {
        let batch = Batch { tokens: vec![1, 2, 3, 4, 5, 6, 7, 8], starts: vec![vec![0, 2], vec![3]], length: 3 };
        let parts = batch.split(1).unwrap();
        assert_eq!(parts[0].inputs, [1, 2, 3]);
        assert_eq!(parts[0].targets, [2, IGNORE, 4]);
        assert_eq!(parts[0].sequences.positions(0), [0, 1, 0]);
        assert_eq!(parts[1].targets, [6, 7, IGNORE]);
        assert_eq!(parts[1].sequences.positions(0), [0, 1, 2]);
        assert_eq!(batch.split(2).unwrap()[0].counted(), 4);
    }

    #[test]
    fn a_batch_of_another_size_is_refused() {
        let batch = Batch { tokens: vec![1; 7], starts: vec![vec![]; 2], length: 3 };
        assert!(batch.split(1).is_err());
    }
}
