//! How evenly bytes are spread.

/// Entropy of the byte values in bits: 0 for none and for one value, 8 for all equally often.
pub(super) fn of_bytes(bytes: &[u8]) -> f64 {
    // Four tables, so that a byte does not wait for the count of the same byte before it.
    let mut tables = [[0u32; 256]; 4];
    let mut counts = [0u64; 256];
    // A table's counts fit 32 bits within a piece.
    for piece in bytes.chunks(1 << 30) {
        let (chunks, rest) = piece.as_chunks::<4>();
        for chunk in chunks {
            tables[0][chunk[0] as usize] += 1;
            tables[1][chunk[1] as usize] += 1;
            tables[2][chunk[2] as usize] += 1;
            tables[3][chunk[3] as usize] += 1;
        }
        for byte in rest {
            tables[0][*byte as usize] += 1;
        }
        for (value, count) in counts.iter_mut().enumerate() {
            *count += tables.iter().map(|table| u64::from(table[value])).sum::<u64>();
        }
        tables = [[0; 256]; 4];
    }
    if bytes.is_empty() {
        return 0.0;
    }
    let total = bytes.len() as f64;
    let sum: f64 = counts.iter().filter(|c| **c > 1).map(|c| *c as f64 * (*c as f64).log2()).sum();
    (total.log2() - sum / total).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        assert_eq!(of_bytes(b""), 0.0);
        assert_eq!(of_bytes(b"aaaaa"), 0.0);
        assert_eq!(of_bytes(b"abababab"), 1.0);
        assert_eq!(of_bytes(b"abcd"), 2.0);
        assert_eq!(of_bytes(&(0..=255).collect::<Vec<u8>>()), 8.0);
    }
}
