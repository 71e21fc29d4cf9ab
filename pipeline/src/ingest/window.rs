//! The unread bytes of a stream that have been read ahead: what readers of records search for their ends.

use std::io::{self, Read};

use super::bytes::CHUNK_BYTES;

/// Bytes between what was consumed of a stream and what was read of it. Grows only when more is asked for
/// than fits: a reader that consumes holds one chunk.
pub(super) struct Window {
    buffer: Vec<u8>,
    /// The unread bytes are `buffer[start..end]`.
    start: usize,
    end: usize,
    /// Offset in the stream of `buffer[start]`.
    offset: u64,
}

impl Window {
    /// An empty window over a stream whose next byte is at `offset`.
    pub fn new(offset: u64) -> Self {
        Self { buffer: Vec::new(), start: 0, end: 0, offset }
    }

    /// The bytes in the window.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Offset of the first of them in the stream.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Leave `n` bytes behind and give them for a last look.
    pub fn consume(&mut self, n: usize) -> &[u8] {
        let start = self.start;
        self.start += n;
        self.offset += n as u64;
        &self.buffer[start..self.start]
    }

    /// Leave all bytes behind.
    pub fn clear(&mut self) {
        self.consume(self.len());
    }

    /// Read a chunk of `input` behind what is there; false when it gives no more.
    pub fn fill(&mut self, input: &mut impl Read) -> io::Result<bool> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.buffer.len() - self.end < CHUNK_BYTES / 2 {
            self.buffer.resize(self.end + CHUNK_BYTES, 0);
        }
        loop {
            match input.read(&mut self.buffer[self.end..]) {
                Ok(n) => {
                    self.end += n;
                    return Ok(n > 0);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Bytes of memory held.
    #[cfg(test)]
    pub fn capacity(&self) -> usize {
        self.buffer.capacity()
    }
}
