//! Lines of a byte stream in bounded memory.

use std::io::{self, Read};

use super::rows::EXCERPT_BYTES;
use super::window::Window;

/// One line without its end.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Line<'a> {
    /// Offset of its first byte in the file.
    pub offset: u64,
    /// Number of lines before it in the stream.
    pub index: u64,
    /// The bytes.
    pub body: Body<'a>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Body<'a> {
    /// All of it.
    Whole(&'a [u8]),
    /// Longer than the limit: its first bytes and its length. The rest was read past, not held.
    TooLong { head: &'a [u8], length: u64 },
}

/// Splits a stream at `\n` and takes a `\r` before it off.
///
/// Holds at most `limit` bytes and one chunk, whatever the input.
pub(super) struct Lines<R> {
    input: R,
    limit: usize,
    window: Window,
    index: u64,
    ended: bool,
    /// Beginning of the line that is being read past.
    head: Vec<u8>,
}

impl<R: Read> Lines<R> {
    /// Lines of `input`, whose first byte is at `offset` of the file.
    pub fn new(input: R, offset: u64, limit: usize) -> Self {
        Self { input, limit, window: Window::new(offset), index: 0, ended: false, head: Vec::new() }
    }

    /// Skip a byte order mark.
    pub fn skip_bom(&mut self) -> io::Result<()> {
        while self.window.len() < 3 && self.fill()? {}
        if self.window.bytes().starts_with(b"\xEF\xBB\xBF") {
            self.window.consume(3);
        }
        Ok(())
    }

    /// Skip to the first line that starts behind an end of line. Stops early at `end`: a line that
    /// starts there is of no interest.
    pub fn skip_partial_line(&mut self, end: u64) -> io::Result<()> {
        loop {
            match memchr::memchr(b'\n', self.window.bytes()) {
                Some(at) => {
                    self.window.consume(at + 1);
                    return Ok(());
                }
                None => self.window.clear(),
            }
            if self.offset() >= end || !self.fill()? {
                return Ok(());
            }
        }
    }

    /// Offset of the next line.
    pub fn offset(&self) -> u64 {
        self.window.offset()
    }

    /// Number of lines given so far.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// The beginning of what was read of the next line, after an error.
    pub fn rest(&self) -> &[u8] {
        if self.head.is_empty() { self.window.bytes() } else { &self.head }
    }

    /// The next line. A last line needs no end.
    pub fn next(&mut self) -> io::Result<Option<Line<'_>>> {
        self.head.clear();
        let mut searched = 0;
        loop {
            if let Some(at) = memchr::memchr(b'\n', &self.window.bytes()[searched..]) {
                return Ok(Some(self.take(searched + at, 1)));
            }
            searched = self.window.len();
            // One byte of grace for the `\r` of a line that is exactly as long as it may be.
            if searched > self.limit.saturating_add(1) {
                return self.read_past().map(Some);
            }
            if !self.fill()? {
                let length = self.window.len();
                return Ok((length > 0).then(|| self.take(length, 0)));
            }
        }
    }

    /// Give the next `length` bytes as a line that is followed by `ending` bytes of line end.
    fn take(&mut self, length: usize, ending: usize) -> Line<'_> {
        let (offset, index) = (self.offset(), self.index);
        self.index += 1;
        let line = &self.window.consume(length + ending)[..length];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let body = if line.len() > self.limit {
            Body::TooLong { head: &line[..line.len().min(EXCERPT_BYTES)], length: line.len() as u64 }
        } else {
            Body::Whole(line)
        };
        Line { offset, index, body }
    }

    /// Read to the end of a line that is too long, holding its head alone.
    fn read_past(&mut self) -> io::Result<Line<'_>> {
        let (offset, index) = (self.offset(), self.index);
        let unread = self.window.bytes();
        self.head.extend_from_slice(&unread[..unread.len().min(EXCERPT_BYTES)]);
        let mut last = None;
        let (length, ending) = loop {
            let unread = self.window.bytes();
            if let Some(at) = memchr::memchr(b'\n', unread) {
                last = at.checked_sub(1).map(|before| unread[before]).or(last);
                break (self.offset() - offset + at as u64, at + 1);
            }
            last = unread.last().copied().or(last);
            self.window.clear();
            if !self.fill()? {
                break (self.offset() - offset, 0);
            }
        };
        self.window.consume(ending);
        self.index += 1;
        let length = length - u64::from(last == Some(b'\r'));
        Ok(Line { offset, index, body: Body::TooLong { head: &self.head, length } })
    }

    /// Read a chunk; false at the end of the stream.
    fn fill(&mut self) -> io::Result<bool> {
        if self.ended {
            return Ok(false);
        }
        self.ended = !self.window.fill(&mut self.input)?;
        Ok(!self.ended)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::bytes::CHUNK_BYTES;
    use super::*;

    /// Gives `bytes` in pieces of the sizes in `pieces`, in turn.
    struct Pieces<'a> {
        bytes: &'a [u8],
        pieces: &'a [usize],
        at: usize,
    }

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.at += 1;
            let n = self.pieces[self.at % self.pieces.len()].min(self.bytes.len()).min(buffer.len());
            buffer[..n].copy_from_slice(&self.bytes[..n]);
            self.bytes = &self.bytes[n..];
            Ok(n)
        }
    }

    proptest! {
        #[test]
        fn lines_are_those_of_a_plain_split(
            bytes in prop::collection::vec(prop::sample::select(b"ab\r\n".to_vec()), 0..200),
            pieces in prop::collection::vec(1usize..20, 1..5),
            limit in 0usize..20,
        ) {
            let mut lines = Lines::new(Pieces { bytes: &bytes, pieces: &pieces, at: 0 }, 7, limit);
            let mut offset = 7;
            let mut expected: Vec<&[u8]> = bytes.split(|b| *b == b'\n').collect();
            if expected.last() == Some(&&b""[..]) {
                expected.pop();
            }
            for (index, raw) in expected.into_iter().enumerate() {
                let line = lines.next().unwrap().unwrap();
                prop_assert_eq!((line.offset, line.index), (offset, index as u64));
                offset += raw.len() as u64 + 1;
                let whole = raw.strip_suffix(b"\r").unwrap_or(raw);
                match line.body {
                    Body::Whole(body) => prop_assert!(body == whole && body.len() <= limit),
                    Body::TooLong { head, length } => {
                        prop_assert!(whole.len() > limit);
                        prop_assert_eq!(length, whole.len() as u64);
                        prop_assert!(raw.starts_with(head) && head.len() >= limit.min(EXCERPT_BYTES));
                    }
                }
            }
            prop_assert_eq!(lines.next().unwrap(), None);
        }
    }

    /// A line of `left` bytes, then a short one.
    struct Endless {
        left: u64,
    }

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.left == 0 {
                return Ok(0);
            }
            let n = buffer.len().min(usize::try_from(self.left).unwrap());
            buffer[..n].fill(b'x');
            self.left -= n as u64;
            if self.left == 0 {
                buffer[n - 3..n].copy_from_slice(b"\nok");
            }
            Ok(n)
        }
    }

    #[test]
    fn a_line_of_300_mb_is_read_past_without_being_held() {
        let limit = 1 << 20;
        let mut lines = Lines::new(Endless { left: 300 << 20 }, 0, limit);
        let line = lines.next().unwrap().unwrap();
        let Body::TooLong { head, length } = line.body else { panic!("{line:?}") };
        assert_eq!((head.len(), length), (EXCERPT_BYTES, (300 << 20) - 3));
        let line = lines.next().unwrap().unwrap();
        assert_eq!((line.offset, line.body), ((300 << 20) - 2, Body::Whole(b"ok")));
        assert_eq!(lines.next().unwrap(), None);
        assert!(lines.window.capacity() <= 2 * (limit + CHUNK_BYTES), "{}", lines.window.capacity());
    }

    #[test]
    fn a_byte_order_mark_is_skipped_but_counted() {
        let mut lines = Lines::new(&b"\xEF\xBB\xBFa\nb"[..], 0, 10);
        lines.skip_bom().unwrap();
        assert_eq!(lines.next().unwrap().unwrap().offset, 3);
        assert_eq!(lines.next().unwrap().unwrap().offset, 5);
        let mut short = Lines::new(&b"\xEF"[..], 0, 10);
        short.skip_bom().unwrap();
        assert_eq!(short.next().unwrap().unwrap().body, Body::Whole(b"\xEF"));
    }
}
