//! SIGINT and SIGTERM ask the run to stop at the next commit point. A second SIGINT, of a person who does not want to
//! wait, ends the process at once (which is safe too: nothing half-written is ever taken for done). A second SIGTERM says
//! nothing new: schedulers and launchers both send it to each process. A rank that another process of this program
//! started hears of them through its standard input.

use std::io::{self, BufRead};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// The last signal; 0 for none.
static SIGNAL: LazyLock<Arc<AtomicUsize>> = LazyLock::new(|| Arc::new(AtomicUsize::new(0)));

/// Environment variable of a rank whose standard input is the word of the process that started it.
pub const LAUNCHED: &str = "FULGURITE_LAUNCHED";

/// Install the handlers; the flag that they set.
pub fn on_signal() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    // Order matters: on the second SIGINT the flag is set already and the process ends.
    let interrupted = Arc::new(AtomicBool::new(false));
    flag::register_conditional_shutdown(SIGINT, 128 + SIGINT, interrupted.clone())?;
    flag::register(SIGINT, interrupted)?;
    for signal in [SIGINT, SIGTERM] {
        flag::register_usize(signal, SIGNAL.clone(), signal as usize)?;
        flag::register(signal, stop.clone())?;
    }
    if std::env::var_os(LAUNCHED).is_some() {
        let stop = stop.clone();
        std::thread::Builder::new().name("launcher".into()).spawn(move || {
            let mut line = String::new();
            // The end of the input is that of the launcher: nobody waits for this rank any more.
            let heard = io::stdin().lock().read_line(&mut line);
            let signal = heard.ok().and_then(|_| line.trim().parse().ok()).unwrap_or(SIGTERM as usize);
            SIGNAL.store(signal, Ordering::Relaxed);
            stop.store(true, Ordering::Relaxed);
        })?;
    }
    Ok(stop)
}

/// The signal that came last, SIGTERM where none came.
pub fn signal() -> usize {
    match SIGNAL.load(Ordering::Relaxed) {
        0 => SIGTERM as usize,
        signal => signal,
    }
}

/// Whether a person stopped this process. A scheduler that takes the machine away sends SIGTERM.
pub fn by_person() -> bool {
    SIGNAL.load(Ordering::Relaxed) == SIGINT as usize
}

/// 130 after SIGINT, 143 after SIGTERM.
pub fn exit_code() -> u8 {
    match SIGNAL.load(Ordering::Relaxed) {
        0 => 128 + SIGINT as u8,
        signal => 128 + signal as u8,
    }
}
