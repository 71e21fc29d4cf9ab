//! The encodings of recent pieces.
//!
//! Text repeats itself: most pieces were seen shortly before. A direct-mapped table of one cache line an
//! entry answers for them; a piece that is not there takes the place of whatever is.

/// Entries of a cache: 4 MiB, a core's share of the last-level cache of a server.
const ENTRIES: usize = 1 << 16;
/// Bytes of the longest piece that is kept.
pub const KEY_BYTES: usize = 31;
/// Ids of the longest encoding that is kept.
const IDS: usize = 7;

/// The bytes of a piece and, in the last byte, their number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Key(u128, u128);

/// A line: the key and the ids, of which the last word says how many there are.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Entry {
    key: Key,
    ids: [u32; IDS],
    length: u32,
}

/// Encodings by piece.
pub struct PieceCache(Box<[Entry]>);

impl Default for PieceCache {
    fn default() -> Self {
        // No piece is empty, so an empty key is no key.
        Self(vec![Entry { key: Key(0, 0), ids: [0; IDS], length: 0 }; ENTRIES].into())
    }
}

impl Key {
    /// The key of the piece `text[from..to]`, unless it is too long.
    #[inline(always)]
    pub fn of(text: &[u8], from: usize, to: usize) -> Option<Self> {
        let length = to - from;
        if length > KEY_BYTES {
            return None;
        }
        // Two loads where there is text enough; what lies behind the piece is masked.
        let (low, high) = match text[from..].first_chunk::<32>() {
            Some(bytes) => halves(bytes),
            None => {
                let mut bytes = [0; 32];
                bytes[..length].copy_from_slice(&text[from..to]);
                halves(&bytes)
            }
        };
        let mask = |bytes: usize| if bytes >= 16 { u128::MAX } else { (1 << (bytes * 8)) - 1 };
        Some(Self(low & mask(length), high & mask(length.saturating_sub(16)) | (length as u128) << 120))
    }

    #[inline(always)]
    fn place(self) -> usize {
        // Folded multiplication, as in wyhash.
        let fold = |a: u64, b: u64| {
            let product = u128::from(a) * u128::from(b);
            product as u64 ^ (product >> 64) as u64
        };
        let low = fold(self.0 as u64 ^ 0xA076_1D64_78BD_642F, (self.0 >> 64) as u64 ^ 0xE703_7ED1_A0B4_28DB);
        let high = fold(self.1 as u64 ^ 0x8EBC_6AF0_9C88_C6E3, (self.1 >> 64) as u64 ^ 0x5899_65CC_7537_4CC3);
        (low ^ high.rotate_left(31)) as usize % ENTRIES
    }
}

#[inline(always)]
fn halves(bytes: &[u8; 32]) -> (u128, u128) {
    let half = |at: usize| {
        let mut half = [0; 16];
        half.copy_from_slice(&bytes[at..at + 16]);
        u128::from_le_bytes(half)
    };
    (half(0), half(16))
}

impl PieceCache {
    /// Append the ids of a piece to `ids`; whether they were there.
    #[inline(always)]
    pub fn get(&self, key: Key, ids: &mut Vec<u32>) -> bool {
        let entry = &self.0[key.place()];
        if entry.key != key {
            return false;
        }
        match entry.length {
            1 => ids.push(entry.ids[0]),
            length => ids.extend_from_slice(&entry.ids[..length as usize]),
        }
        true
    }

    /// Keep the ids of a piece, if they are few.
    pub fn put(&mut self, key: Key, ids: &[u32]) {
        if ids.len() <= IDS {
            let entry = &mut self.0[key.place()];
            entry.key = key;
            entry.ids[..ids.len()].copy_from_slice(ids);
            entry.length = ids.len() as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_piece_wherever_it_lies() {
        let text = "the cat and the hat and thé cats, 0123456789abcdef0123456789abcdef";
        let of = |from, to| Key::of(text.as_bytes(), from, to);
        assert!(of(0, 3) == of(12, 15) && of(0, 3).is_some());
        assert!(of(0, 4) != of(0, 3) && of(12, 16) == of(0, 4));
        let alone = |from: usize, to: usize| Key::of(&text.as_bytes()[from..to], 0, to - from);
        for (from, to) in [(4, 7), (0, 31), (35, 66), (40, 56), (41, 58), (60, 67)] {
            assert!(of(from, to) == alone(from, to), "{from}..{to}");
        }
        assert!(of(0, 32).is_none());
        // A piece that ends in zeroes is not the shorter one.
        assert!(Key::of(b"a\0", 0, 2) != Key::of(b"a\0", 0, 1));
    }

    #[test]
    fn what_was_put_is_found_until_something_takes_its_place() {
        let mut cache = PieceCache::default();
        let keys: Vec<Key> =
            (0..200_000u32).filter_map(|i| Key::of(i.to_string().as_bytes(), 0, i.to_string().len())).collect();
        let mut ids = Vec::new();
        for (i, key) in (0..).zip(&keys) {
            assert!(!cache.get(*key, &mut ids));
            cache.put(*key, &[i, i + 1]);
            assert!(cache.get(*key, &mut ids));
            assert_eq!(ids.split_off(0), [i, i + 1]);
        }
        let kept = keys.iter().filter(|key| cache.get(**key, &mut ids)).count();
        assert!((ENTRIES / 2..=ENTRIES).contains(&kept), "{kept}");
        cache.put(keys[0], &[0; IDS + 1]);
        assert!(keys[1] != keys[0]);
    }
}
