//! The decay of every head.

/// λ of every head of layer `layer` of `layers`: slope_h · (1 − ℓ/(L−1) + 1e-5) with the slopes of
/// ALiBi (arXiv 2108.12409). A model of one layer has no ℓ/(L−1); it takes the first layer's.
pub fn decay_rates(heads: usize, layer: usize, layers: usize) -> Vec<f64> {
    let depth = layer as f64 / (layers.max(2) - 1) as f64;
    slopes(heads).into_iter().map(|slope| slope * (1.0 - depth + 1e-5)).collect()
}

fn slopes(heads: usize) -> Vec<f64> {
    let power = 1 << heads.ilog2();
    let series = |n: usize| {
        let start = (-(-((n as f64).log2() - 3.0)).exp2()).exp2();
        (1..=n).map(move |i| start.powi(i as i32))
    };
    series(power).chain(series(2 * power).step_by(2)).take(heads).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_alibis() {
        let eight: Vec<f64> = (1..=8).map(|i| 0.5f64.powi(i)).collect();
        assert_eq!(slopes(8), eight);
        // 12 heads: the series of 8, then entries 0, 2, 4, 6 of the series of 16.
        let twelve = slopes(12);
        assert_eq!(twelve[..8], eight);
        for (i, slope) in twelve[8..].iter().enumerate() {
            let want = 0.5f64.sqrt().powi(2 * i as i32 + 1);
            assert!((slope - want).abs() < 1e-15);
        }
    }

    #[test]
    fn the_last_layer_hardly_forgets() {
        assert!((decay_rates(4, 0, 3)[0] - 0.25 * (1.0 + 1e-5)).abs() < 1e-12);
        assert!((decay_rates(4, 2, 3)[0] - 0.25 * 1e-5).abs() < 1e-12);
        assert!((decay_rates(4, 0, 1)[0] - 0.25 * (1.0 + 1e-5)).abs() < 1e-12);
    }
}
