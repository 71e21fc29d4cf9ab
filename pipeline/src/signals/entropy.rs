//! How evenly bytes are spread.

/// How often each byte value occurs.
pub(super) fn count(bytes: &[u8]) -> [u64; 256] {
    // Four tables, so that a byte does not wait for the count of the same byte before it.
    let mut tables = [[0u32; 256]; 4];
    let mut counts = [0u64; 256];
    // A table's counts fit 32 bits within a piece.
    for piece in bytes.chunks(1 << 30) {
        let (chunks, rest) = piece.as_chunks::<8>();
        for chunk in chunks {
            // One load of eight bytes.
            let eight = u64::from_le_bytes(*chunk);
            for (byte, table) in [0, 1, 2, 3, 0, 1, 2, 3].into_iter().enumerate() {
                tables[table][(eight >> (8 * byte)) as usize & 0xff] += 1;
            }
        }
        for byte in rest {
            tables[0][*byte as usize] += 1;
        }
        for (value, count) in counts.iter_mut().enumerate() {
            *count += tables.iter().map(|table| u64::from(table[value])).sum::<u64>();
        }
        tables = [[0; 256]; 4];
    }
    counts
}

/// Entropy of byte values that occur so often, in bits: 0 for none and for one value, 8 for all equally often.
pub(super) fn of_counts(counts: &[u64; 256]) -> f64 {
    let total: u64 = counts.iter().sum();
    if total == 0 {
        return 0.0;
    }
    let total = total as f64;
    let sum: f64 = counts.iter().filter(|c| **c > 1).map(|c| *c as f64 * (*c as f64).log2()).sum();
    (total.log2() - sum / total).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_bytes(bytes: &[u8]) -> f64 {
        of_counts(&count(bytes))
    }

    #[test]
    fn by_hand() {
        assert_eq!(of_bytes(b""), 0.0);
        assert_eq!(of_bytes(b"aaaaa"), 0.0);
        assert_eq!(of_bytes(b"abababab"), 1.0);
        assert_eq!(of_bytes(b"abcd"), 2.0);
        assert_eq!(of_bytes(&(0..=255).collect::<Vec<u8>>()), 8.0);
    }
}
