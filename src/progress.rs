//! Progress of a run on stderr: bars on a terminal, plain lines elsewhere, JSON events on request.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressState, ProgressStyle};
use pipeline::{Event, Observer, StageStatus};

use crate::cli::{LogFormat, Logging};
use crate::output::{note, record, thousands};

/// Between two lines of progress inside one stage, off a terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The observer that the log options ask for.
pub fn observer(logging: &Logging) -> Observer {
    if logging.log_format == LogFormat::Json {
        if logging.quiet {
            return Arc::new(|_| {});
        }
        return Arc::new(|event| record(if matches!(event, Event::Warning { .. }) { "WARN" } else { "INFO" }, event));
    }
    if logging.quiet {
        return Arc::new(|_| {});
    }
    // `indicatif` leaves colours out where NO_COLOR says so, and a terminal that cannot move its cursor gets lines.
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    if io::stderr().is_terminal() && !dumb { bars() } else { lines() }
}

fn bars() -> Observer {
    let screen = MultiProgress::new();
    let stages: Mutex<HashMap<String, ProgressBar>> = Mutex::default();
    Arc::new(move |event| {
        let mut stages = stages.lock().unwrap_or_else(|e| e.into_inner());
        match event {
            Event::StageStarted { stage, status, tasks, done } => {
                if *status == StageStatus::Done {
                    let _ = screen.println(line(event).unwrap_or_default());
                    return;
                }
                let style = ProgressStyle::with_template(
                    "{prefix:>18.bold} {bar:20.cyan/dim} {pos}/{len} {elapsed}{left} {wide_msg:.dim}",
                )
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .with_key("left", left);
                let bar = screen.add(ProgressBar::new(*tasks).with_style(style));
                bar.set_prefix(stage.clone());
                bar.set_position(*done);
                bar.enable_steady_tick(Duration::from_millis(200));
                stages.insert(stage.clone(), bar);
            }
            Event::TaskCommitted { stage, .. } => {
                if let Some(bar) = stages.get(stage).filter(|b| b.length() != Some(0)) {
                    bar.inc(1);
                }
            }
            Event::Progress { stage, done, total, message } => {
                if let Some(bar) = stages.get(stage) {
                    if let Some(total) = total {
                        bar.set_length(*total);
                        bar.set_position(*done);
                    }
                    bar.set_message(message.clone());
                }
            }
            Event::StageFinished { stage, .. } => {
                if let Some(bar) = stages.remove(stage) {
                    bar.finish_and_clear();
                }
                let _ = screen.println(line(event).unwrap_or_default());
            }
            other => {
                if let Some(text) = line(other) {
                    let _ = screen.println(text);
                }
            }
        }
    })
}

fn lines() -> Observer {
    let told: Mutex<HashMap<String, Instant>> = Mutex::default();
    Arc::new(move |event| {
        if let Event::Progress { stage, .. } = event {
            let mut told = told.lock().unwrap_or_else(|e| e.into_inner());
            match told.get(stage) {
                Some(last) if last.elapsed() < LINE_EVERY => return,
                _ => told.insert(stage.clone(), Instant::now()),
            };
        }
        if let Some(text) = line(event) {
            note(text);
        }
    })
}

/// An event as a line for people, where it is worth one.
fn line(event: &Event) -> Option<String> {
    match event {
        Event::StageStarted { stage, status, tasks, done } => match status {
            StageStatus::Done => Some(format!("{stage:>18}  done already")),
            status => Some(format!("{stage:>18}  {status}; {} of {tasks} tasks to do", tasks - done)),
        },
        Event::TaskCommitted { .. } => None,
        Event::TaskRetried { stage, task, reason } => {
            Some(format!("{stage:>18}  task {task} is tried again: {reason}"))
        }
        Event::Progress { stage, done, total, message } => {
            let total = total.map(|t| format!(" of {}", thousands(t))).unwrap_or_default();
            Some(format!("{stage:>18}  {}{total}  {message}", thousands(*done)))
        }
        Event::StageFinished { stage, rows_read, rows_kept, seconds } => {
            let rows = match (rows_read, rows_kept) {
                (0, 0) => "done".to_string(),
                (read, kept) if read == kept => format!("{} rows", thousands(*kept)),
                (read, kept) => format!("{} rows kept of {}", thousands(*kept), thousands(*read)),
            };
            Some(format!("{stage:>18}  {rows} in {seconds:.1} s"))
        }
        Event::Warning { message } => Some(format!("warning: {message}")),
    }
}

/// What is left, once a task has told how long one takes.
fn left(state: &ProgressState, to: &mut dyn std::fmt::Write) {
    if state.pos() > 0 {
        // A screen that cannot be written to is nobody's fault.
        let _ = write!(to, ", {:#} left", HumanDuration(state.eta()));
    }
}
