//! What a training run shows of itself on stderr: a plot of the loss on a terminal, plain lines elsewhere, JSON
//! events on request.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use train::run::Metrics;

use crate::cli::{LogFormat, Logging};
use crate::output;

/// Between two lines off a terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// Size of the plot in characters.
const COLUMNS: usize = 72;
const ROWS: usize = 8;

/// The view of one run.
pub struct Live {
    steps: u64,
    form: Form,
    /// Step and loss of every line so far, thinned out by halves when they become many.
    losses: Vec<(u64, f64)>,
    last: Option<Metrics>,
    begin: Option<(Instant, u64)>,
}

enum Form {
    Quiet,
    Json,
    Lines(Option<Instant>),
    Plot(ProgressBar),
}

impl Live {
    /// A view of `steps` steps in the form that the log options ask for.
    pub fn new(steps: u64, logging: &Logging) -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let form = match (logging.quiet, logging.log_format) {
            (true, _) => Form::Quiet,
            (_, LogFormat::Json) => Form::Json,
            _ if io::stderr().is_terminal() && !dumb => {
                let style = ProgressStyle::with_template("{msg}\n{bar:40.cyan/dim} {pos}/{len}")
                    .unwrap_or_else(|_| ProgressStyle::default_bar());
                Form::Plot(ProgressBar::new(steps).with_style(style))
            }
            _ => Form::Lines(None),
        };
        Self { steps, form, losses: Vec::new(), last: None, begin: None }
    }

    /// One that shows nothing.
    pub fn quiet(steps: u64) -> Self {
        Self { steps, form: Form::Quiet, losses: Vec::new(), last: None, begin: None }
    }

    /// Shows the metrics of a step.
    pub fn show(&mut self, metrics: &Metrics) {
        let (begin, first) = *self.begin.get_or_insert((Instant::now(), metrics.step));
        let per_step = begin.elapsed().as_secs_f64() / (metrics.step - first).max(1) as f64;
        let left = (metrics.step > first).then(|| per_step * self.steps.saturating_sub(metrics.step) as f64);
        if metrics.loss.is_finite() {
            self.losses.push((metrics.step, metrics.loss));
            if self.losses.len() > 16 * COLUMNS {
                let mut index = 0;
                self.losses.retain(|_| {
                    index += 1;
                    index % 2 == 0
                });
            }
        }
        match &mut self.form {
            Form::Quiet => {}
            Form::Json => output::record("INFO", metrics),
            Form::Lines(told) => {
                let due = told.is_none_or(|at| at.elapsed() >= LINE_EVERY);
                if due || metrics.held_out_loss.is_some() || metrics.step == self.steps {
                    *told = Some(Instant::now());
                    output::note(line(metrics, self.steps, left));
                }
            }
            Form::Plot(bar) => {
                bar.set_position(metrics.step);
                bar.set_message(format!("{}\n{}", plot(&self.losses), line(metrics, self.steps, left)));
            }
        }
        self.last = Some(metrics.clone());
    }

    /// Ends the view, the plot stays; the metrics of the last step.
    pub fn finish(self) -> Option<Metrics> {
        if let Form::Plot(bar) = &self.form {
            bar.abandon();
        }
        self.last
    }
}

fn line(metrics: &Metrics, steps: u64, left_s: Option<f64>) -> String {
    let mut line = format!(
        "step {}/{}  loss {:.4}  lr {:.2e}  norm {:.3}  {} tokens/s",
        output::thousands(metrics.step),
        output::thousands(steps),
        metrics.loss,
        metrics.learning_rate,
        metrics.grad_norm,
        output::thousands(metrics.tokens_per_s as u64)
    );
    if let Some(loss) = metrics.held_out_loss {
        line += &format!("  held-out {loss:.4}");
    }
    if let Some(mfu) = metrics.mfu {
        line += &format!("  MFU {:.1} %", 100.0 * mfu);
    }
    if let Some(bytes) = metrics.memory_bytes {
        line += &format!("  {}", output::bytes(bytes));
    }
    if metrics.skipped > 0 {
        line += &format!("  {} skipped", metrics.skipped);
    }
    if let Some(left) = left_s {
        line += &format!("  {} left", duration(left));
    }
    line
}

/// `2h05m`, `3m20s`, `12s`.
fn duration(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match (s / 3600, s / 60 % 60, s % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

/// The losses as columns of dots, eight levels of height to a character row of one eighth blocks.
fn plot(losses: &[(u64, f64)]) -> String {
    let (Some(&(first, _)), Some(&(last, _))) = (losses.first(), losses.last()) else { return String::new() };
    let width = COLUMNS.min(losses.len().max(2));
    let span = (last - first).max(1) as f64;
    let mut columns: Vec<(f64, usize)> = vec![(0.0, 0); width];
    for &(step, loss) in losses {
        let column = ((step - first) as f64 / span * (width - 1) as f64).round() as usize;
        columns[column].0 += loss;
        columns[column].1 += 1;
    }
    let mut means: Vec<Option<f64>> = Vec::new();
    for (sum, count) in columns {
        // A column without a step of its own shows the one before.
        let before = means.last().copied().flatten();
        means.push(if count > 0 { Some(sum / count as f64) } else { before });
    }
    let all = means.iter().flatten();
    let (low, high) = all.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &x| (low.min(x), high.max(x)));
    let range = (high - low).max(1e-9);
    const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let mut text = String::new();
    for row in (0..ROWS).rev() {
        let mut line = match row {
            0 => format!("{low:>8.3} "),
            _ if row == ROWS - 1 => format!("{high:>8.3} "),
            _ => " ".repeat(9),
        };
        for mean in &means {
            let eighths = mean.map_or(0.0, |mean| (mean - low) / range * (8 * ROWS - 1) as f64 + 1.0);
            line.push(EIGHTHS[(eighths - 8.0 * row as f64).clamp(0.0, 8.0) as usize]);
        }
        text += line.trim_end();
        if row > 0 {
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plot_falls_from_the_top_left_to_the_bottom_right() {
        let losses: Vec<(u64, f64)> = (0..500).map(|step| (step, 10.0 - step as f64 / 100.0)).collect();
        let text = plot(&losses);
        let rows: Vec<&str> = text.lines().collect();
        assert_eq!(rows.len(), ROWS);
        assert!(rows[0].starts_with("  10.0") || rows[0].starts_with("   9.9"), "{text}");
        assert!(rows[ROWS - 1].starts_with("   5.0"), "{text}");
        let lengths: Vec<usize> = rows.iter().map(|row| row.chars().count()).collect();
        assert!(lengths.is_sorted(), "lower rows reach further: {lengths:?}");
        assert!(plot(&[]).is_empty());
        assert_eq!(plot(&[(5, 2.0)]).lines().count(), ROWS);
    }

    #[test]
    fn durations_are_short() {
        assert_eq!([duration(7.6), duration(200.0), duration(7500.0)], ["8s", "3m20s", "2h05m"]);
    }
}
