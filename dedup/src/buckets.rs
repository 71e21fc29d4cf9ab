//! From keys and their documents to pairs of documents.

use pipeline::Result;

use crate::runs::{BUFFER_RECORDS, Buffered, NUMBER_BYTES, Pair, Record, RunWriter, number_at, put_number};

/// Tag of the documents that are in a pair.
pub(crate) const CANDIDATES: u32 = u32::MAX - 1;

/// The number of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Number(pub(crate) u64);

impl Record for Number {
    const BYTES: usize = NUMBER_BYTES;
    const KEY_BITS: u32 = 8 * NUMBER_BYTES as u32;
    const COUNTED: bool = true;
    fn key(&self) -> u64 {
        self.0
    }
    fn put(&self, bytes: &mut [u8]) {
        put_number(self.0, bytes);
    }
    fn get(bytes: &[u8]) -> Self {
        Self(number_at(bytes, 0))
    }
}

/// Keys of one partition with their documents, and the pairs they make: the smallest document of a bucket
/// with each other.
///
/// Documents come in the order of their numbers, so the smallest of a bucket is known as soon as the bucket is
/// seen: when many keys are held, their pairs are written and one document of each is held on. Memory is the
/// distinct keys of the partition, however many documents share them.
pub(crate) struct Buckets<K> {
    keys: Vec<(K, u64)>,
    most: usize,
    pairs: Buffered<Pair>,
    candidates: Option<Buffered<Number>>,
}

/// Bytes of memory of the keys of a partition of `partition` of `keys` keys, twice over, and of the pairs that are not yet written.
pub(crate) fn bytes<K>(keys: u64, partition: u64, candidates: bool) -> u64 {
    let buffered = size_of::<Pair>() + if candidates { size_of::<Number>() } else { 0 };
    2 * keys.min(partition) * size_of::<(K, u64)>() as u64 + keys.min(BUFFER_RECORDS as u64) * buffered as u64
}

impl<K: Copy + Ord> Buckets<K> {
    /// Pairs get tag `tag`; their documents are written too if `candidates`. `most` keys are held at first.
    pub(crate) fn new(tag: u32, candidates: bool, most: usize) -> Self {
        let candidates = candidates.then(|| Buffered::new(CANDIDATES));
        Self { keys: Vec::new(), most, pairs: Buffered::new(tag), candidates }
    }

    /// Document `number` has `key`.
    pub(crate) fn push(&mut self, key: K, number: u64) {
        self.keys.push((key, number));
    }

    /// Write pairs if there are too many keys; call it now and then.
    pub(crate) fn shorten(&mut self, writer: &mut RunWriter) -> Result<()> {
        if self.keys.len() > self.most {
            self.pair(writer)?;
            // All of them distinct: wait until there are as many again.
            self.most = self.most.max(2 * self.keys.len());
        }
        Ok(())
    }

    /// Write the pairs of the keys held; hold the first document of each.
    fn pair(&mut self, writer: &mut RunWriter) -> Result<()> {
        self.keys.sort_unstable();
        for bucket in self.keys.chunk_by(|a, b| a.0 == b.0).filter(|bucket| bucket.len() > 1) {
            let first = bucket[0].1;
            for &(_, second) in &bucket[1..] {
                self.pairs.push(Pair::new(first, second), writer)?;
                if let Some(candidates) = &mut self.candidates {
                    candidates.push(Number(second), writer)?;
                }
            }
            if let Some(candidates) = &mut self.candidates {
                candidates.push(Number(first), writer)?;
            }
        }
        self.keys.dedup_by_key(|key| key.0);
        Ok(())
    }

    /// Write what is left; the number of pairs.
    pub(crate) fn finish(mut self, writer: &mut RunWriter) -> Result<u64> {
        self.pair(writer)?;
        self.pairs.flush(writer)?;
        if let Some(mut candidates) = self.candidates {
            candidates.flush(writer)?;
        }
        Ok(self.pairs.written())
    }
}
