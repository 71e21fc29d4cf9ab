//! SIGINT and SIGTERM: the first asks the run to stop at the next commit point, the second ends the
//! process at once (which is safe too: nothing half-written is ever taken for done).

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

static SIGNAL: LazyLock<Arc<AtomicUsize>> = LazyLock::new(|| Arc::new(AtomicUsize::new(SIGINT as usize)));

/// Install the handlers; the flag that they set.
pub fn on_signal() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // Order matters: on the second signal the flag is set already and the process ends.
        flag::register_conditional_shutdown(signal, 128 + signal, stop.clone())?;
        flag::register_usize(signal, SIGNAL.clone(), signal as usize)?;
        flag::register(signal, stop.clone())?;
    }
    Ok(stop)
}

/// 130 after SIGINT, 143 after SIGTERM.
pub fn exit_code() -> u8 {
    128 + SIGNAL.load(Ordering::Relaxed) as u8
}
