//! 128-bit XXH3: the one hash for content, checksums and fingerprints.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// A 128-bit XXH3 digest, written as 32 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub u128);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(xxh3_128(bytes))
    }

    /// The digest of a JSON value. Object keys keep the order they were written in, so build the
    /// value in a fixed order (a `struct` or a `BTreeMap`).
    pub fn of_json(value: &serde_json::Value) -> Self {
        Self::of(value.to_string().as_bytes())
    }

    /// The digest of a file's bytes, read in 1 MiB pieces.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let mut hasher = Xxh3::new();
        let mut buffer = vec![0u8; 1 << 20];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(Self(hasher.digest128())),
                Ok(n) => hasher.update(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        u128::from_str_radix(&text, 16)
            .map(Self)
            .map_err(|e| serde::de::Error::custom(format!("not a digest: {text}: {e}")))
    }
}

/// A writer that hashes and counts what passes through it, so that no file is read again for its
/// checksum.
pub struct DigestWriter<W> {
    inner: W,
    hasher: Box<Xxh3>,
    bytes: u64,
}

impl<W: Write> DigestWriter<W> {
    /// Wrap `inner`.
    pub fn new(inner: W) -> Self {
        Self { inner, hasher: Box::new(Xxh3::new()), bytes: 0 }
    }

    /// Bytes written and their digest so far, and the inner writer.
    pub fn finish(self) -> (W, u64, Digest) {
        (self.inner, self.bytes, Digest(self.hasher.digest128()))
    }
}

impl<W: Write> Write for DigestWriter<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.hasher.update(&buf[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_writer_and_slice_agree_and_round_trip_as_text() {
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i * 31) as u8).collect();
        let mut writer = DigestWriter::new(Vec::new());
        writer.write_all(&bytes[..1234]).unwrap();
        writer.write_all(&bytes[1234..]).unwrap();
        let (inner, n, digest) = writer.finish();
        assert_eq!((inner.len() as u64, n), (bytes.len() as u64, bytes.len() as u64));
        assert_eq!(digest, Digest::of(&bytes));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(digest, Digest::of_file(&path).unwrap());
        let text = serde_json::to_string(&digest).unwrap();
        assert_eq!(serde_json::from_str::<Digest>(&text).unwrap(), digest);
    }
}
