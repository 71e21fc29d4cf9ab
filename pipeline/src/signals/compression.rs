//! How well a text compresses: repetition of any kind that the n-grams do not see, and noise.

use std::fmt;

use zstd::bulk::Compressor;
use zstd::zstd_safe::CParameter;

/// Level of Zstandard: fast, and what a higher level would find says little more about a text.
pub(super) const LEVEL: i32 = 1;
/// A larger buffer is not kept for the next document (bytes).
const KEEP: usize = 4 << 20;

/// A compressor and its output, kept from document to document.
#[derive(Default)]
pub(super) struct Compression {
    compressor: Option<Compressor<'static>>,
    output: Vec<u8>,
}

impl fmt::Debug for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compression").field("buffer", &self.output.capacity()).finish()
    }
}

impl Compression {
    /// Compressed bytes per byte, at most 1; 0 for nothing. A text depends on no text before it.
    pub fn ratio(&mut self, bytes: &[u8]) -> f64 {
        if bytes.is_empty() {
            return 0.0;
        }
        if self.compressor.is_none() {
            self.compressor = Compressor::new(LEVEL).ok().and_then(|mut compressor| {
                for off in
                    [CParameter::ContentSizeFlag(false), CParameter::ChecksumFlag(false), CParameter::DictIdFlag(false)]
                {
                    compressor.set_parameter(off).ok()?;
                }
                Some(compressor)
            });
        }
        let Some(compressor) = &mut self.compressor else { return 1.0 };
        self.output.clear();
        self.output.reserve(zstd::zstd_safe::compress_bound(bytes.len()));
        let size = compressor.compress_to_buffer(bytes, &mut self.output).unwrap_or(bytes.len());
        if self.output.capacity() > KEEP {
            self.output = Vec::new();
        }
        (size as f64 / bytes.len() as f64).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetition_compresses_and_noise_does_not() {
        let mut compression = Compression::default();
        assert_eq!(compression.ratio(b""), 0.0);
        assert_eq!(compression.ratio(b"x"), 1.0);
        assert!(compression.ratio("the same again. ".repeat(1000).as_bytes()) < 0.01);
        let noise: Vec<u8> = (0u64..4096).map(|n| xxhash_rust::xxh3::xxh3_64(&n.to_le_bytes()) as u8).collect();
        assert!(compression.ratio(&noise) > 0.99);
        let text = b"What stands here is a sentence, and what stands there is another sentence that is not unlike it.";
        let first = compression.ratio(text);
        compression.ratio(&noise);
        assert_eq!(compression.ratio(text), first);
    }
}
