//! The exponential function in float32.

/// e^x within two units in the last place, for x between -87 and 88; beyond, the value there.
///
/// Made of additions and multiplications alone, so loops over it vectorise and every machine gets
/// the same bits, which the C library does not promise. NaN stays NaN.
#[inline]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding this to a float32 below 2^22 rounds it to an integer, in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts: products of the first with small integers are exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = x.clamp(-87.0, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN_2[0] - n * LN_2[1];
    // The minimax polynomial of Cephes' expf for |r| <= ln 2 / 2.
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let p = p * r * r + r + 1.0;
    // The low bits of `rounded` are n: its exponent field is that of 2^n.
    let scale = rounded.to_bits().wrapping_add(127).wrapping_shl(23);
    p * f32::from_bits(scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere_and_ends_softly() {
        let mut worst = 0f64;
        for i in 0..=1_750_000 {
            let x = -87.0 + i as f32 * 1e-4;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - want).abs() / want);
        }
        assert!(worst < 2.4e-7, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(f32::INFINITY).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }
}
