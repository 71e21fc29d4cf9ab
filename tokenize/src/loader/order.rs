//! Deterministic permutations.

use xxhash_rust::xxh3::xxh3_64;

/// What is permuted, so that no two kinds share a hash.
pub const WINDOW: u64 = 1;
/// Shards of an epoch.
pub const SHARDS: u64 = 2;
/// Row groups of a shard in an epoch.
pub const ROW_GROUPS: u64 = 3;
/// Documents of a row group in an epoch.
pub const DOCUMENTS: u64 = 4;
/// Sources of the sequences of a block.
pub const MIXTURE: u64 = 5;

/// A permutation of `0..n` that is a function of `key`: its values sorted by their hash.
pub fn permutation(key: &[u64], n: usize) -> Vec<u32> {
    let mut bytes: Vec<u8> = key.iter().flat_map(|k| k.to_le_bytes()).collect();
    let end = bytes.len();
    bytes.extend_from_slice(&[0; 4]);
    let mut hashed: Vec<(u64, u32)> = (0..n as u32)
        .map(|i| {
            bytes[end..].copy_from_slice(&i.to_le_bytes());
            (xxh3_64(&bytes), i)
        })
        .collect();
    hashed.sort_unstable();
    hashed.into_iter().map(|(_, i)| i).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutations_hold_every_value_once_and_differ_by_key() {
        for n in [0, 1, 2, 17, 1000] {
            let mut order = permutation(&[1, 2, 3], n);
            assert_eq!(order, permutation(&[1, 2, 3], n));
            if n > 10 {
                assert_ne!(order, permutation(&[1, 2, 4], n));
            }
            order.sort_unstable();
            assert_eq!(order, (0..n as u32).collect::<Vec<_>>());
        }
    }
}
