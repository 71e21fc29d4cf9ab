//! Which tokens of a batch see each other.

use std::ops::Range;

use crate::Error;

/// The shape of a packed batch and the documents in it.
///
/// A row may hold several documents one after the other. The state of the attention is zero before
/// the first token of each document and positions count from there, so packed documents do not see
/// each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequences {
    rows: usize,
    length: usize,
    /// `[rows × length]`, position of every token in its document.
    positions: Vec<u32>,
    /// Whether a document starts after the first token of a row.
    packed: bool,
}

impl Sequences {
    /// `rows` sequences of `length` tokens, each one document from its first token on.
    pub fn whole(rows: usize, length: usize) -> Self {
        Self::continued(rows, length, 0)
    }

    /// `rows` sequences of `length` tokens that continue documents of which `offset` tokens were
    /// read before.
    pub fn continued(rows: usize, length: usize, offset: usize) -> Self {
        let row = offset as u32..(offset + length) as u32;
        Self { rows, length, positions: (0..rows).flat_map(|_| row.clone()).collect(), packed: false }
    }

    /// One row per entry of `starts`, which names the positions where a document starts in
    /// ascending order; a document starts at position 0 whether it is named or not.
    ///
    /// # Errors
    /// [`Error::Input`] when the starts of a row do not ascend or lie outside of it.
    pub fn packed<S: AsRef<[u32]>>(starts: &[S], length: usize) -> Result<Self, Error> {
        let mut positions = Vec::with_capacity(starts.len() * length);
        let mut packed = false;
        for (row, starts) in starts.iter().enumerate() {
            let starts = starts.as_ref();
            let ascending = starts.windows(2).all(|pair| pair[0] < pair[1]);
            if !ascending || starts.last().is_some_and(|&last| last as usize >= length) {
                return Err(Error::Input(format!(
                    "row {row}: document starts {starts:?} do not ascend below {length}"
                )));
            }
            let mut next = starts.iter().skip_while(|&&start| start == 0).peekable();
            packed |= next.peek().is_some();
            let mut begin = 0;
            for t in 0..length as u32 {
                if next.next_if(|&&start| start == t).is_some() {
                    begin = t;
                }
                positions.push(t - begin);
            }
        }
        Ok(Self { rows: starts.len(), length, positions, packed })
    }

    /// The tokens `range` of every row, with the positions they have here: what comes before is in a state.
    pub fn part(&self, range: Range<usize>) -> Self {
        let rows = self.positions.chunks_exact(self.length.max(1)).flat_map(|row| &row[range.clone()]);
        Self { rows: self.rows, length: range.len(), positions: rows.copied().collect(), packed: self.packed }
    }

    /// B, the number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// T, the tokens of a row.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Position in its document of every token of a row; 0 is where a document starts.
    pub fn positions(&self, row: usize) -> &[u32] {
        &self.positions[row * self.length..(row + 1) * self.length]
    }

    /// Positions of all rows, one after the other.
    pub fn all_positions(&self) -> &[u32] {
        &self.positions
    }

    /// Whether some row holds more than one document.
    pub fn is_packed(&self) -> bool {
        self.packed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_restart_at_documents() {
        let sequences = Sequences::packed(&[vec![0, 3], vec![], vec![1]], 4).unwrap();
        assert_eq!(sequences.all_positions(), [0, 1, 2, 0, 0, 1, 2, 3, 0, 0, 1, 2]);
        assert!(sequences.is_packed());
        assert!(!Sequences::packed(&[vec![0]], 4).unwrap().is_packed());
        assert!(Sequences::packed(&[vec![2, 2]], 4).is_err());
        assert!(Sequences::packed(&[vec![4]], 4).is_err());
        assert_eq!(sequences.part(2..4).all_positions(), [2, 0, 2, 3, 1, 2]);
    }
}
