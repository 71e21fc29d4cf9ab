//! The learning rate of every step.

use crate::config::ScheduleConfig;

/// The learning rate of step `step` (from 0) of `steps`. The warm-up reaches `peak` with its last
/// step; the decay would reach its minimum one step after the last.
pub fn learning_rate(schedule: &ScheduleConfig, peak: f64, steps: u64, step: u64) -> f64 {
    let (warmup, decay) = schedule.parts(steps);
    if step < warmup {
        return peak * (step + 1) as f64 / warmup as f64;
    }
    // How far the part of the run from `begin` on has come.
    let progress = |begin: u64| {
        let part = steps.saturating_sub(begin).max(1) as f64;
        (step.saturating_sub(begin) as f64 / part).min(1.0)
    };
    let ratio = match schedule {
        ScheduleConfig::Cosine(cosine) => {
            let wave = 0.5 * (1.0 + (std::f64::consts::PI * progress(warmup)).cos());
            cosine.minimum_ratio + (1.0 - cosine.minimum_ratio) * wave
        }
        ScheduleConfig::WarmupStableDecay(wsd) => {
            1.0 - (1.0 - wsd.minimum_ratio) * progress(steps.saturating_sub(decay))
        }
    };
    peak * ratio
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CosineConfig, WarmupStableDecayConfig};

    #[test]
    fn cosine_warms_up_and_falls_to_its_minimum() {
        let schedule = ScheduleConfig::Cosine(CosineConfig { warmup_steps: Some(10), minimum_ratio: 0.1 });
        let rate = |step| learning_rate(&schedule, 2.0, 110, step);
        assert!((rate(0) - 0.2).abs() < 1e-12 && (rate(9) - 2.0).abs() < 1e-12);
        assert!((rate(10) - 2.0).abs() < 1e-12 && (rate(60) - 1.1).abs() < 1e-12);
        assert!((rate(110) - 0.2).abs() < 1e-12 && (rate(1000) - 0.2).abs() < 1e-12);
        assert!((10..109).all(|step| rate(step + 1) < rate(step)));
    }

    #[test]
    fn warmup_stable_decay_is_flat_between() {
        let schedule = ScheduleConfig::WarmupStableDecay(WarmupStableDecayConfig {
            warmup_steps: Some(4),
            decay_steps: Some(20),
            minimum_ratio: 0.0,
        });
        let rate = |step| learning_rate(&schedule, 1.0, 100, step);
        assert_eq!((rate(0), rate(3), rate(4), rate(80)), (0.25, 1.0, 1.0, 1.0));
        assert!((rate(90) - 0.5).abs() < 1e-12 && (rate(99) - 0.05).abs() < 1e-12);
    }

    #[test]
    fn no_warm_up_and_no_decay_are_fine() {
        let schedule = ScheduleConfig::WarmupStableDecay(WarmupStableDecayConfig {
            warmup_steps: Some(0),
            decay_steps: Some(0),
            minimum_ratio: 0.0,
        });
        assert!((0..5).all(|step| learning_rate(&schedule, 3.0, 5, step) == 3.0));
    }
}
