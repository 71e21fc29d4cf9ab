//! What a step is trained on.

/// The rows of one rank of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The step.
    pub step: u64,
    /// Rows in this batch.
    pub rows: usize,
    /// Inputs of a row, T.
    pub sequence_length: usize,
    /// Token ids, row-major `[rows, T + 1]`: inputs are the first T of a row, targets the last T.
    pub tokens: Vec<u32>,
    /// For each row, where its segments begin: 0 always, then every position `1..=T` at which a document
    /// begins. State must not pass these positions, and the token there is no target of the one before. By best fit
    /// the parts of a document that was cut begin such segments too: one target is lost at each cut.
    pub document_starts: Vec<Vec<u32>>,
    /// For each row how many of its tokens are tokens of documents: the others, at its end, are padding, and
    /// no targets.
    pub filled: Vec<u32>,
}

/// The parts of a batch that a row is appended to.
pub(super) struct Row<'a> {
    pub tokens: &'a mut Vec<u32>,
    pub document_starts: &'a mut Vec<Vec<u32>>,
    pub filled: &'a mut Vec<u32>,
}

impl Batch {
    /// The T + 1 tokens of a row, padding included.
    pub fn row(&self, row: usize) -> &[u32] {
        let width = self.sequence_length + 1;
        &self.tokens[row * width..(row + 1) * width]
    }

    /// Cumulative lengths of the segments among the T inputs of a row, from 0 to T: what kernels call
    /// `cu_seqlens`. Padding is a segment of its own.
    pub fn cumulative_lengths(&self, row: usize) -> Vec<u32> {
        let length = self.sequence_length as u32;
        let mut bounds: Vec<u32> = self.document_starts[row].iter().copied().filter(|&s| s < length).collect();
        if self.filled[row] < length && bounds.last() != Some(&self.filled[row]) {
            bounds.push(self.filled[row]);
        }
        bounds.push(length);
        bounds
    }

    /// Position of each of the T inputs of a row in its segment, from 0.
    pub fn positions(&self, row: usize) -> Vec<u32> {
        self.cumulative_lengths(row).windows(2).flat_map(|pair| 0..pair[1] - pair[0]).collect()
    }

    /// For each of the T targets of a row whether it counts: neither padding nor the first token of a
    /// document, which nothing before it foretells, or, by best fit, of a part of one, whose beginning lies elsewhere.
    pub fn loss_mask(&self, row: usize) -> Vec<bool> {
        let filled = self.filled[row] as usize;
        let mut mask: Vec<bool> = (1..=self.sequence_length).map(|target| target < filled).collect();
        for &start in self.document_starts[row].iter().filter(|&&start| start > 0) {
            mask[start as usize - 1] = false;
        }
        mask
    }
}
