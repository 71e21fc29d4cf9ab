//! Where the time of the device goes: events of the driver around every launch, product and copy.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn_cubecl::tensor::CubeTensor;
use cubecl_common::device_handle::DeviceHandle;
use cudarc::driver::result::event;
use cudarc::driver::sys;
use serde::Serialize;

use super::Error;
use super::kernel::set_context;
use super::work::CudaServer;

/// One thing that the device did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Span {
    /// The kernel, or the product with its sizes.
    pub name: String,
    /// What [`phase`] said when it was asked for.
    pub phase: &'static str,
    /// Microseconds since the first one began.
    pub begin_us: f64,
    /// Microseconds.
    pub duration_us: f64,
}

/// An event of the driver.
pub(super) struct Event(sys::CUevent);
// SAFETY: an id of the driver, used with the context of its device current.
unsafe impl Send for Event {}

struct Mark {
    name: String,
    phase: &'static str,
    begin: Event,
    end: Event,
}

static RECORDING: AtomicBool = AtomicBool::new(false);
static MARKS: Mutex<Vec<Mark>> = Mutex::new(Vec::new());

thread_local! {
    static PHASE: Cell<&'static str> = const { Cell::new("") };
}

fn marks() -> MutexGuard<'static, Vec<Mark>> {
    MARKS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Names what this thread asks for from now on.
pub fn phase(name: &'static str) {
    PHASE.set(name);
}

/// Records all that is asked for from now on, by any thread, until [`stop`].
pub fn start() {
    RECORDING.store(true, Ordering::Relaxed);
}

/// The phase of this thread, while recording.
pub(super) fn current() -> Option<&'static str> {
    RECORDING.load(Ordering::Relaxed).then(|| PHASE.get())
}

/// A point in the order of `stream`. On the device thread.
pub(super) fn mark(stream: sys::CUstream) -> Result<Event, Error> {
    let failed = |error| Error::call("an event", error);
    let made = event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed)?;
    // SAFETY: an event that was just made, on a stream of the current context.
    unsafe { event::record(made, stream) }.map_err(failed)?;
    Ok(Event(made))
}

/// Keeps what lies between two points.
pub(super) fn keep(name: String, phase: &'static str, begin: Event, end: Event) {
    marks().push(Mark { name, phase, begin, end });
}

/// Ends the recording and gives what was recorded on the device of `near`, in order. Waits for it.
///
/// # Errors
/// When the driver refuses, or work on the device has failed.
pub fn stop(near: &CubeTensor) -> Result<Vec<Span>, Error> {
    RECORDING.store(false, Ordering::Relaxed);
    let device = near.client.service_id().device;
    let index = u32::from(device.index_id);
    let spans = DeviceHandle::<CudaServer>::new(device).submit_blocking(move |_server| {
        set_context(index)?;
        let marks = std::mem::take(&mut *marks());
        spans(&marks)
    });
    spans.unwrap_or_else(|error| Err(Error::call("device thread", format!("{error:?}"))))
}

fn spans(marks: &[Mark]) -> Result<Vec<Span>, Error> {
    let failed = |error| Error::call("an event", error);
    let Some(first) = marks.first() else { return Ok(Vec::new()) };
    let mut spans = Vec::with_capacity(marks.len());
    for mark in marks {
        // SAFETY: events of one stream that were recorded and are destroyed below.
        unsafe {
            event::synchronize(mark.end.0).map_err(failed)?;
            let begin = event::elapsed(first.begin.0, mark.begin.0).map_err(failed)?;
            let duration = event::elapsed(mark.begin.0, mark.end.0).map_err(failed)?;
            spans.push(Span {
                name: mark.name.clone(),
                phase: mark.phase,
                begin_us: 1e3 * f64::from(begin),
                duration_us: 1e3 * f64::from(duration),
            });
        }
    }
    for mark in marks {
        for made in [&mark.begin, &mark.end] {
            // SAFETY: made above and used no more.
            unsafe { event::destroy(made.0) }.map_err(failed)?;
        }
    }
    Ok(spans)
}

/// The spans as the trace viewers of Chrome and Perfetto read them.
///
/// # Errors
/// When it cannot be written.
pub fn write_chrome_trace(spans: &[Span], mut to: impl std::io::Write) -> std::io::Result<()> {
    let events: Vec<serde_json::Value> = spans
        .iter()
        .map(|span| {
            serde_json::json!({
                "name": span.name, "cat": span.phase, "ph": "X", "pid": 0, "tid": 0,
                "ts": span.begin_us, "dur": span.duration_us, "args": { "phase": span.phase },
            })
        })
        .collect();
    serde_json::to_writer(&mut to, &serde_json::json!({ "traceEvents": events, "displayTimeUnit": "ms" }))?;
    to.flush()
}

/// Time by phase and name, the longest first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Total {
    /// As in [`Span`].
    pub phase: &'static str,
    /// As in [`Span`].
    pub name: String,
    /// How often.
    pub count: usize,
    /// Milliseconds of all together.
    pub total_ms: f64,
}

/// Sums of the spans.
pub fn totals(spans: &[Span]) -> Vec<Total> {
    let mut totals: Vec<Total> = Vec::new();
    for span in spans {
        match totals.iter_mut().find(|total| total.phase == span.phase && total.name == span.name) {
            Some(total) => {
                total.count += 1;
                total.total_ms += span.duration_us / 1e3;
            }
            None => totals.push(Total {
                phase: span.phase,
                name: span.name.clone(),
                count: 1,
                total_ms: span.duration_us / 1e3,
            }),
        }
    }
    totals.sort_by(|a, b| b.total_ms.total_cmp(&a.total_ms));
    totals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_by_phase_and_name_and_the_trace_is_json() {
        let span =
            |phase, name: &str, begin_us, duration_us| Span { name: name.to_owned(), phase, begin_us, duration_us };
        let spans = [
            span("forward", "norm", 0.0, 10.0),
            span("forward", "product", 10.0, 500.0),
            span("backward", "norm", 510.0, 30.0),
            span("forward", "norm", 540.0, 12.0),
        ];
        let totals = totals(&spans);
        let short: Vec<_> = totals.iter().map(|total| (total.phase, total.name.as_str(), total.count)).collect();
        assert_eq!(short, [("forward", "product", 1), ("backward", "norm", 1), ("forward", "norm", 2)]);
        assert!((totals[2].total_ms - 0.022).abs() < 1e-9);
        let mut text = Vec::new();
        write_chrome_trace(&spans, &mut text).unwrap();
        let trace: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(trace["traceEvents"].as_array().map(Vec::len), Some(4));
        assert_eq!(trace["traceEvents"][1]["dur"], 500.0);
    }
}
