//! Reductions of a slice in eight running values: they vectorise, and their order is fixed.

const LANES: usize = 8;

/// Folds `values` into eight lanes from `start`, then the lanes into one.
#[inline]
fn fold<T: Copy>(values: &[T], start: f32, step: impl Fn(f32, T) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = step(*lane, value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane = step(*lane, value);
    }
    lanes.into_iter().fold(start, join)
}

/// Σ x.
pub(crate) fn sum(x: &[f32]) -> f32 {
    fold(x, 0.0, |lane, x| lane + x, |a, b| a + b)
}

/// The largest value; those that are not numbers do not count.
pub(crate) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    fold(x, f32::NEG_INFINITY, larger, larger)
}

/// Σ x·y of two slices of one length.
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (x, y) in xs.iter().zip(ys) {
        for (lane, (x, y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane += x * y;
        }
    }
    for (lane, (x, y)) in lanes.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *lane += x * y;
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_counts_once() {
        for count in [0, 1, 7, 8, 9, 40, 43] {
            let x: Vec<f32> = (0..count).map(|i| (i * i % 19) as f32 - 9.0).collect();
            let y: Vec<f32> = (0..count).map(|i| (i % 5) as f32).collect();
            assert_eq!(sum(&x), x.iter().sum::<f32>());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            assert_eq!(dot(&x, &y), x.iter().zip(&y).map(|(x, y)| x * y).sum::<f32>());
        }
    }
}
