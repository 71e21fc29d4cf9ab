//! `--nproc N`: copies of this command as ranks on this host, started as torchrun would start them.

use std::ffi::OsString;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use train::parallel::Launch;

use crate::exit::Usage;
use crate::stop;

/// Between two looks at the ranks.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long ranks may go on once one has failed: they notice it themselves, and say what they know.
const GRACE: Duration = Duration::from_secs(5);
const LOOPBACK: &str = "127.0.0.1";

/// A rank failed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct RankFailed {
    message: String,
    /// Exit code of the whole.
    pub code: u8,
}

/// The place of this process: with `--nproc 1` it is alone, in a batch script of SLURM, too, whose variables are those of a
/// rank; else it is what the environment says.
///
/// # Errors
/// [`Usage`] when a variable is wrong, or a launcher has started this process and `--nproc` asks for another one.
pub fn place(nproc: Option<usize>) -> Result<Launch> {
    if nproc.is_some() {
        refuse_rank()?;
        return Ok(Launch::alone());
    }
    Ok(Launch::from_env().map_err(|e| Usage(e.to_string()))?)
}

fn refuse_rank() -> Result<(), Usage> {
    match std::env::var_os("RANK") {
        Some(_) => Err(Usage("--nproc starts ranks, but RANK is set: a launcher has started this one already".into())),
        None => Ok(()),
    }
}

/// Starts `nproc` ranks with the present command line, without its `--nproc`, and waits for them. Signals to stop are
/// passed on. Where one fails, the others are given a little time.
///
/// # Errors
/// [`RankFailed`] with the first rank that failed, [`pipeline::Error::Interrupted`] when they were told to stop and did.
pub fn ranks(nproc: usize) -> Result<()> {
    refuse_rank()?;
    let stop = stop::on_signal()?;
    let program = std::env::current_exe().context("the path of this program")?;
    let port = match std::env::var("MASTER_PORT") {
        Ok(port) => port.parse().map_err(|_| Usage(format!("MASTER_PORT is {port:?}, which is no port")))?,
        Err(_) => TcpListener::bind((LOOPBACK, 0)).and_then(|free| free.local_addr()).context("a free port")?.port(),
    };
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut ranks = Vec::with_capacity(nproc);
    for rank in 0..nproc {
        let launch = Launch { rank, world: nproc, local_rank: rank, master: (LOOPBACK.to_owned(), port), job: None };
        let mut command = Command::new(&program);
        command.args(arguments(std::env::args_os().skip(1))).envs(launch.variables()).env(stop::LAUNCHED, "1");
        for (name, value) in [
            ("RAYON_NUM_THREADS", (cores / nproc).max(1).to_string()),
            // Multicast of NVLink needs more of the host than every container has.
            ("NCCL_NVLS_ENABLE", "0".to_owned()),
        ] {
            if std::env::var_os(name).is_none() {
                command.env(name, value);
            }
        }
        // Signals of the terminal come through this process, once.
        command.process_group(0).stdin(Stdio::piped());
        if rank > 0 {
            command.stdout(Stdio::null());
        }
        match command.spawn() {
            Ok(child) => ranks.push(Rank { child, ended: None }),
            Err(error) => {
                ranks.iter_mut().for_each(Rank::kill);
                return Err(error).with_context(|| format!("rank {rank} cannot start"));
            }
        }
    }
    let mut told = None;
    let mut stopped = false;
    let mut failed: Option<(usize, ExitStatus, Instant)> = None;
    let mut hung: Vec<String> = Vec::new();
    loop {
        for (number, rank) in ranks.iter_mut().enumerate() {
            let ended = rank.look().with_context(|| format!("waiting for rank {number}"))?;
            match ended.map(|status| (outcome(status, told), status)) {
                Some((Outcome::Stopped, _)) => stopped = true,
                Some((Outcome::Failed, status)) if failed.is_none() => failed = Some((number, status, Instant::now())),
                _ => {}
            }
        }
        if ranks.iter().all(|rank| rank.ended.is_some()) {
            break;
        }
        if stop.load(Ordering::Relaxed) && told.is_none() {
            let signal = stop::signal();
            told = Some(signal);
            ranks.iter_mut().for_each(|rank| rank.stop(signal));
        }
        if failed.is_some_and(|(.., at)| at.elapsed() >= GRACE) {
            if hung.is_empty() {
                let left = ranks.iter().enumerate().filter(|(_, rank)| rank.ended.is_none());
                hung = left.map(|(number, _)| number.to_string()).collect();
            }
            ranks.iter_mut().for_each(Rank::kill);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    match failed {
        None if stopped => Err(pipeline::Error::Interrupted.into()),
        None => Ok(()),
        Some((rank, status, _)) => {
            let how = match (status.code(), status.signal()) {
                (Some(code), _) => format!("ended with code {code}"),
                (None, Some(signal)) => format!("was killed by signal {signal}"),
                (None, None) => "ended".to_owned(),
            };
            let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
            let mut message = format!("rank {rank} of {nproc} {how}");
            if !hung.is_empty() {
                message += &format!("; rank {} did not end and was killed", hung.join(", "));
            }
            Err(RankFailed { message, code }.into())
        }
    }
}

/// What the end of a rank means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    /// It did what it was told to: the others may take their time to do the same.
    Stopped,
    Failed,
}

/// The outcome of a rank that was `told` to stop, with that signal, or not.
fn outcome(status: ExitStatus, told: Option<usize>) -> Outcome {
    let code = status.code().and_then(|code| usize::try_from(code).ok());
    match told {
        _ if status.success() => Outcome::Done,
        Some(signal) if code == Some(128 + signal) => Outcome::Stopped,
        _ => Outcome::Failed,
    }
}

/// The command line of a rank.
fn arguments(mut all: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut kept = Vec::new();
    while let Some(argument) = all.next() {
        if argument == "--nproc" {
            all.next();
        } else if !argument.to_string_lossy().starts_with("--nproc=") {
            kept.push(argument);
        }
    }
    kept
}

struct Rank {
    child: Child,
    ended: Option<ExitStatus>,
}

impl Rank {
    /// How it ended, the first time it is asked after that.
    fn look(&mut self) -> std::io::Result<Option<ExitStatus>> {
        if self.ended.is_some() {
            return Ok(None);
        }
        self.ended = self.child.try_wait()?;
        Ok(self.ended)
    }

    /// Asks it to save and stop.
    fn stop(&mut self, signal: usize) {
        if let Some(stdin) = &mut self.child.stdin {
            // One that has ended does not listen.
            let _ = writeln!(stdin, "{signal}").and_then(|()| stdin.flush());
        }
    }

    fn kill(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_get_the_command_line_without_their_number() {
        let of = |line: &str| arguments(line.split(' ').map(OsString::from));
        assert_eq!(of("train a.toml --nproc 4 --json"), ["train", "a.toml", "--json"]);
        assert_eq!(of("train --nproc=4 a.toml"), ["train", "a.toml"]);
    }

    #[test]
    fn a_rank_that_was_told_to_stop_and_does_has_not_failed() {
        let ended = |code: i32| ExitStatus::from_raw(code << 8);
        assert_eq!(outcome(ended(0), None), Outcome::Done);
        assert_eq!(outcome(ended(0), Some(2)), Outcome::Done);
        assert_eq!(outcome(ended(130), Some(2)), Outcome::Stopped);
        for (status, told) in
            [(ended(130), None), (ended(1), Some(2)), (ended(130), Some(15)), (ExitStatus::from_raw(9), Some(9))]
        {
            assert_eq!(outcome(status, told), Outcome::Failed, "{status:?} {told:?}");
        }
    }
}
