//! The decompressed bytes of a WARC file, member by member where it is gzip.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::GzDecoder;

use super::bytes::CHUNK_BYTES;
use super::listing::Compression;

/// First bytes of a gzip member that is deflated, as all are.
const GZIP_MAGIC: [u8; 3] = [0x1f, 0x8b, 0x08];

/// A stream of one or more members. [`Read::read`] gives 0 at the end of a member.
///
/// A WARC file holds every record in a gzip member of its own, so the end of a member is the end of
/// a record, whatever the record's length field says, and a broken member costs no more than itself.
pub(super) enum Members<R: Read> {
    /// One member: plain bytes, or Zstandard.
    One(Box<dyn Read + Send>, std::marker::PhantomData<R>),
    /// Members of a gzip file.
    Gzip(Gzip<R>),
}

/// See [`Members::Gzip`].
pub(super) enum Gzip<R: Read> {
    Within(Box<GzDecoder<Counted<R>>>),
    Between(Counted<R>),
    /// Only while one of the above becomes the other.
    Gone,
}

impl<R: Read + Send + 'static> Members<R> {
    pub fn new(input: R, compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::Gzip => Self::Gzip(Gzip::Between(Counted::new(input))),
            other => Self::One(super::bytes::decompress(input, other)?, std::marker::PhantomData),
        })
    }

    /// Go to the next member; false at the end of the file.
    pub fn next_member(&mut self) -> io::Result<bool> {
        let Self::Gzip(gzip) = self else { return Ok(false) };
        let mut input = gzip.take_input();
        // Zeroes after the last member are padding.
        let magic = input.skip_zeroes_and_peek();
        match magic {
            Ok(None) => {
                *gzip = Gzip::Between(input);
                Ok(false)
            }
            Ok(Some(0x1f)) => {
                *gzip = Gzip::Within(Box::new(GzDecoder::new(input)));
                Ok(true)
            }
            Ok(Some(_)) => {
                *gzip = Gzip::Between(input);
                Err(io::Error::new(io::ErrorKind::InvalidData, "there is something between the gzip members"))
            }
            Err(e) => {
                *gzip = Gzip::Between(input);
                Err(e)
            }
        }
    }

    /// After an error: skip to what looks like the next member; false if there is none.
    pub fn skip_to_member(&mut self) -> io::Result<bool> {
        let Self::Gzip(gzip) = self else { return Ok(false) };
        let mut input = gzip.take_input();
        let found = input.skip_to(&GZIP_MAGIC);
        *gzip = match found {
            Ok(true) => Gzip::Within(Box::new(GzDecoder::new(input))),
            _ => Gzip::Between(input),
        };
        found
    }
}

impl<R: Read> Gzip<R> {
    fn take_input(&mut self) -> Counted<R> {
        match std::mem::replace(self, Self::Gone) {
            Self::Within(decoder) => decoder.into_inner(),
            Self::Between(input) => input,
            Self::Gone => Counted::ended(),
        }
    }
}

impl<R: Read + Send + 'static> Read for Members<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::One(input, _) => input.read(buffer),
            Self::Gzip(Gzip::Within(decoder)) => decoder.read(buffer),
            Self::Gzip(_) => Ok(0),
        }
    }
}

/// A buffered reader that knows whether it moved since the last search.
pub(super) struct Counted<R: Read> {
    input: Option<BufReader<R>>,
    consumed: u64,
    searched_at: Option<u64>,
}

impl<R: Read> Counted<R> {
    fn new(input: R) -> Self {
        Self { input: Some(BufReader::with_capacity(CHUNK_BYTES, input)), consumed: 0, searched_at: None }
    }

    fn ended() -> Self {
        Self { input: None, consumed: 0, searched_at: None }
    }

    fn skip_zeroes_and_peek(&mut self) -> io::Result<Option<u8>> {
        loop {
            let bytes = self.fill_buf()?;
            let Some(first) = bytes.iter().position(|b| *b != 0) else {
                let n = bytes.len();
                if n == 0 {
                    return Ok(None);
                }
                self.consume(n);
                continue;
            };
            let byte = bytes[first];
            self.consume(first);
            return Ok(Some(byte));
        }
    }

    /// Move to the next occurrence of `magic`, and always forward.
    fn skip_to(&mut self, magic: &[u8; 3]) -> io::Result<bool> {
        if self.searched_at == Some(self.consumed) {
            if self.fill_buf()?.is_empty() {
                return Ok(false);
            }
            self.consume(1);
        }
        loop {
            let bytes = self.fill_buf()?;
            if bytes.is_empty() {
                return Ok(false);
            }
            match memchr::memchr(magic[0], bytes) {
                None => {
                    let n = bytes.len();
                    self.consume(n);
                }
                Some(at) => {
                    self.consume(at);
                    if self.looks_like(magic)? {
                        self.searched_at = Some(self.consumed);
                        return Ok(true);
                    }
                    self.consume(1);
                }
            }
        }
    }

    /// Whether `magic` comes next, as far as the buffer shows: where it ends between two bytes of
    /// the magic, the decoder decides.
    fn looks_like(&mut self, magic: &[u8; 3]) -> io::Result<bool> {
        let bytes = self.fill_buf()?;
        let n = bytes.len().min(magic.len());
        Ok(bytes[..n] == magic[..n])
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(buffer)?;
        self.consume(n);
        Ok(n)
    }
}

impl<R: Read> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        match &mut self.input {
            Some(input) => input.fill_buf(),
            None => Ok(&[]),
        }
    }

    fn consume(&mut self, n: usize) {
        if let Some(input) = &mut self.input {
            input.consume(n);
        }
        self.consumed += n as u64;
    }
}
