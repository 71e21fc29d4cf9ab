//! The ranks' GPUs: NCCL between them, the host's collective beside it.
//!
//! NCCL does not know when a process dies on the same host, and its kernels wait for ever. So whoever waits for a GPU
//! waits here: meanwhile the host's collective is asked whether all ranks are alive, NCCL whether it met an error, and
//! the driver whether collectives get on; when a rank is gone, or nothing gets on for the time of the group, everything
//! that is on its way is ended, and the error names the rank, or what this one has waited for.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::{Collective, Team};
use crate::Error;
use crate::cuda::{self, Communicator, ID_BYTES, Ticket, Unfinished, Work};

/// The GPU of this rank among those of all ranks.
#[derive(Debug)]
pub struct Gpus {
    /// Those that together have one copy of what is sharded.
    inner: Communicator,
    /// Those that have the same shard, where there are others.
    outer: Option<Communicator>,
    /// Those that share the tokens of every row, where there are others.
    sequence: Option<Communicator>,
    /// Those that share each block, where there are others.
    tensor: Option<Communicator>,
    group: Arc<dyn Collective>,
    _watch: Option<Watch>,
}

/// A sum over all ranks that was asked for, to be waited for as a [`Ticket`].
#[derive(Debug)]
#[must_use = "the sum is there after the wait"]
pub struct Sum(Ticket, Option<Ticket>);

impl Sum {
    /// Lets all that this thread asks for later wait until the sum is there.
    pub fn wait(self, near: &CubeTensor) {
        let Self(inner, outer) = self;
        inner.wait(near);
        if let Some(outer) = outer {
            outer.wait(near);
        }
    }
}

/// A rank beside this one among those that share the tokens of rows.
#[derive(Clone, Copy, Debug)]
pub struct Neighbour<'a> {
    communicator: &'a Communicator,
    rank: usize,
}

impl Neighbour<'_> {
    /// Puts `values` on their way to it, see [`Communicator::send`].
    ///
    /// # Panics
    /// As that.
    #[track_caller]
    pub fn send(&self, values: &CubeTensor) -> Ticket {
        self.communicator.send(values, self.rank)
    }

    /// Lets `values` come from it, see [`Communicator::receive`].
    ///
    /// # Panics
    /// As that.
    #[track_caller]
    pub fn receive(&self, values: &CubeTensor) -> Ticket {
        self.communicator.receive(values, self.rank)
    }
}

/// Threads that end what is on its way when a rank is lost or nothing gets on: the thread that asks for the work may be held
/// up by a queue that is full.
#[derive(Debug)]
struct Watch {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Closed when the thread that asks the driver has ended.
    asked: Mutex<Receiver<()>>,
}

/// How often the ranks and what is on its way are looked at.
const LOOK: Duration = Duration::from_millis(200);
/// How long this process may take to end after it was told why; a GPU that hangs may hold it up for ever.
const LAST: Duration = Duration::from_secs(30);

/// Notices when nothing gets on: the oldest of what is under way is the same for too long.
#[derive(Debug)]
struct Patience {
    limit: Duration,
    /// Its number, that of the newest when it was looked at last, and when it became the oldest.
    oldest: Option<(u64, u64, Instant)>,
}

impl Patience {
    fn new(limit: Duration) -> Self {
        Self { limit, oldest: None }
    }

    /// How long `oldest` has been that, where it is longer than the limit. While the driver does not answer, which it does not
    /// either where a healthy rank is far ahead of its GPU, the time begins anew with whatever is put on the stream.
    fn over(&mut self, oldest: Option<&Unfinished>, now: Instant) -> Option<Duration> {
        let Some(&Unfinished { number, newest, begun, .. }) = oldest else {
            self.oldest = None;
            return None;
        };
        match &mut self.oldest {
            Some((same, last, since)) if *same == number && (begun.is_some() || *last == newest) => {
                *last = newest;
                Some(now.saturating_duration_since(*since)).filter(|waited| *waited >= self.limit)
            }
            _ => {
                self.oldest = Some((number, newest, now));
                None
            }
        }
    }
}

/// Of the oldest collectives of several communicators, which take turns on one stream, the one that does not get on, for
/// people.
fn stalled(unfinished: &[Option<Unfinished>], patience: &mut [Patience], now: Instant) -> Option<String> {
    let over = patience.iter_mut().zip(unfinished).filter_map(|(patience, oldest)| {
        let waited = patience.over(oldest.as_ref(), now)?;
        oldest.as_ref().map(|oldest| (oldest, waited.as_secs_f64()))
    });
    let over: Vec<(&Unfinished, f64)> = over.collect();
    // What has not begun may wait for the other communicator's.
    let (oldest, seconds) = over.iter().find(|(oldest, _)| oldest.begun == Some(true)).or(over.first())?;
    let what = &oldest.what;
    Some(match oldest.begun {
        Some(true) => format!(
            "its {what}, has begun and did not end for {seconds:.1} s: the GPU of another rank, or the way to it, hangs"
        ),
        Some(false) => format!("its {what}, did not begin for {seconds:.1} s: its GPU hangs in what comes before"),
        None => format!("its {what}, did not end for {seconds:.1} s, and the driver does not answer: its GPU may hang"),
    })
}

impl Watch {
    fn new(communicators: Vec<Communicator>, group: Arc<dyn Collective>) -> std::io::Result<Self> {
        let done = Arc::new(AtomicBool::new(false));
        // The driver is asked by a thread of its own: it answers nobody while a queue of the device is full.
        let (ends, of_driver) = (done.clone(), communicators.clone());
        let (closed, asked) = channel();
        thread::Builder::new().name("collectives".to_owned()).spawn(move || {
            while !ends.load(Ordering::Acquire) {
                if let Some(error) = of_driver.iter().find_map(|communicator| communicator.look().err()) {
                    // Whoever reads from the device gets the same; collectives that it keeps from ending are noticed.
                    tracing::debug!(%error, "the driver was asked for collectives");
                    break;
                }
                thread::park_timeout(LOOK);
            }
            drop(of_driver);
            drop(closed);
        })?;
        let ends = done.clone();
        let look = move || {
            let mut patience: Vec<Patience> = communicators.iter().map(|_| Patience::new(group.timeout())).collect();
            while !ends.load(Ordering::Acquire) {
                // The thread that asks for work waits in a queue while the device is behind, and looks at nothing.
                let lost = group.check().err().map(|error| error.to_string());
                let failed = || communicators.iter().find_map(|communicator| communicator.error().err());
                let unfinished: Vec<_> = communicators.iter().map(Communicator::unfinished).collect();
                let stalled = stalled(&unfinished, &mut patience, Instant::now());
                if let Some(reason) = lost.or_else(|| failed().map(|error| error.to_string())).or(stalled) {
                    end_in_time(&ends, &group, &reason);
                    communicators.iter().for_each(|communicator| communicator.abort(&reason));
                    return;
                }
                thread::park_timeout(LOOK);
            }
        };
        let thread = thread::Builder::new().name("ranks".to_owned()).spawn(look)?;
        Ok(Self { done, thread: Some(thread), asked: Mutex::new(asked) })
    }
}

/// Ends the process where it has not come to its end by itself in a while: calls of the driver, and NCCL's own end, may wait
/// for a GPU that hangs.
fn end_in_time(ends: &Arc<AtomicBool>, group: &Arc<dyn Collective>, reason: &str) {
    let (ends, group, reason) = (ends.clone(), group.clone(), reason.to_owned());
    let last = move || {
        thread::sleep(LAST);
        if !ends.load(Ordering::Acquire) {
            let error = Error::Rank { rank: group.rank(), reason: format!("cannot go on: {reason}") };
            tracing::error!(%error, "the GPU does not come to an end either; this process is ended");
            group.leave(Some(&error.to_string()));
            std::process::abort();
        }
    };
    if let Err(error) = thread::Builder::new().name("last resort".to_owned()).spawn(last) {
        tracing::error!(%error, "nothing ends this process if its GPU hangs");
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It has no result, and a panic of it says so itself.
            let _ = thread.join();
        }
        // Nothing is sent: this ends when the thread does, unless the driver holds it up.
        let asked = self.asked.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = asked.recv_timeout(Duration::from_secs(2));
    }
}

fn device_error(error: impl Display) -> Error {
    Error::Device { device: "cuda".to_owned(), reason: error.to_string() }
}

/// Joins the GPUs of the ranks of `group`. Every rank speaks even where it cannot go on, so that none waits for its id.
fn join(near: &CubeTensor, group: &dyn Collective, beside: Option<&Communicator>) -> Result<Communicator, Error> {
    let own = match group.rank() {
        0 => Communicator::unique_id().map(|id| id.to_vec()),
        _ => Ok(Vec::new()),
    };
    let mut said = group.exchange(own.as_deref().unwrap_or_default())?;
    own.map_err(device_error)?;
    let id = <[u8; ID_BYTES]>::try_from(said.swap_remove(0));
    let id = id.map_err(|_| device_error("the first of the ranks has no NCCL"))?;
    let mut lost = None;
    let communicator = {
        let mut go_on = || group.check().map_err(|error| lost = Some(error)).is_ok();
        let (rank, world, limit) = (group.rank(), group.world(), group.timeout());
        Communicator::join(near, &id, rank, world, beside, limit, &mut go_on)
    };
    match (communicator, lost) {
        (_, Some(error)) => Err(error),
        (communicator, None) => communicator.map_err(device_error),
    }
}

impl Gpus {
    /// Joins the GPUs of all ranks of `team`, each with the device that its `near` is on. All ranks call it together.
    ///
    /// # Errors
    /// [`Error::Device`] when NCCL is not there or refuses, what the ranks tell of one that is lost.
    pub fn join(near: &CubeTensor, team: &Team) -> Result<Self, Error> {
        let inner = join(near, team.inner.as_ref(), None)?;
        let outer = match team.outer.world() {
            1 => None,
            _ => Some(join(near, team.outer.as_ref(), Some(&inner))?),
        };
        let sequence = match team.sequence.world() {
            1 => None,
            _ => Some(join(near, team.sequence.as_ref(), Some(&inner))?),
        };
        let tensor = match team.tensor.world() {
            1 => None,
            _ => Some(join(near, team.tensor.as_ref(), Some(&inner))?),
        };
        let group = team.all.clone();
        let communicators = [&inner].into_iter().chain(&outer).chain(&sequence).chain(&tensor).cloned().collect();
        let watch = match group.world() {
            1 => None,
            _ => Some(Watch::new(communicators, group.clone()).map_err(device_error)?),
        };
        let gpus = Self { inner, outer, sequence, tensor, group, _watch: watch };
        gpus.greet(near);
        Ok(gpus)
    }

    /// Lets neighbours connect, which NCCL does when they first send something, and for which it holds up the thread that asks
    /// until the other asks too: now, where no other work waits behind it. And those that share blocks: what an all-reduce of
    /// so few values needs; NCCL chooses another way for many, and connects it when that is first gone.
    fn greet(&self, near: &CubeTensor) {
        if let Some(tensor) = &self.tensor {
            let values = cuda::empty(near, [8], DType::F32);
            let mut work = Work::near(near);
            work.zero(&values);
            work.submit();
            tensor.start(cuda::Collective::AllReduce, &values, &values).wait(near);
        }
        for backwards in [false, true] {
            let [from, to] = self.neighbours(backwards);
            let values = cuda::empty(near, [8], DType::F32);
            let mut work = Work::near(near);
            work.zero(&values);
            work.submit();
            if let Some(from) = from {
                from.receive(&values).wait(near);
            }
            if let Some(to) = to {
                to.send(&values).wait(near);
            }
        }
    }

    /// The communicators besides the first.
    fn beside(&self) -> impl Iterator<Item = &Communicator> {
        self.outer.iter().chain(&self.sequence).chain(&self.tensor)
    }

    /// Puts a collective of the ranks that share one copy on its way, see [`Communicator::start`].
    ///
    /// # Panics
    /// As that.
    #[track_caller]
    pub fn start(&self, collective: cuda::Collective, from: &CubeTensor, to: &CubeTensor) -> Ticket {
        self.inner.start(collective, from, to)
    }

    /// Puts a sum over all ranks on its way: `collective` within each copy, then the all-reduce of what arrives in `to`
    /// over the copies.
    ///
    /// # Panics
    /// As [`Communicator::start`].
    #[track_caller]
    pub fn add_up(&self, collective: cuda::Collective, from: &CubeTensor, to: &CubeTensor) -> Sum {
        let inner = self.inner.start(collective, from, to);
        Sum(inner, self.outer.as_ref().map(|outer| outer.start(cuda::Collective::AllReduce, to, to)))
    }

    /// Whether other ranks have the same shard.
    pub fn has_copies(&self) -> bool {
        self.outer.is_some()
    }

    /// Gives all ranks that have the same `values` as this one, with the same part of the blocks, the bits of the first of them:
    /// those that share one copy where `everywhere`, else those that have the same shard. It is a sum of them and of
    /// zeros, which is the same in any order. Nothing where there are no others.
    ///
    /// # Panics
    /// As [`Communicator::start`].
    #[track_caller]
    pub fn level(&self, values: &CubeTensor, everywhere: bool) -> Option<Ticket> {
        let alike = if everywhere { Some(&self.inner) } else { self.outer.as_ref() };
        let alike = alike.filter(|alike| alike.world() > 1)?;
        if alike.rank() > 0 {
            let mut work = Work::near(values);
            work.zero(values);
            work.submit();
        }
        Some(alike.start(cuda::Collective::AllReduce, values, values))
    }

    /// The ranks that share each block with this one.
    pub fn partners(&self) -> Option<&Communicator> {
        self.tensor.as_ref()
    }

    /// The rank that states come from among those that share the tokens of rows, and the one that they go to; the other way round
    /// where `backwards`.
    pub fn neighbours(&self, backwards: bool) -> [Option<Neighbour<'_>>; 2] {
        let Some(communicator) = &self.sequence else { return [None, None] };
        let (rank, world) = (communicator.rank(), communicator.world());
        let ranks = [rank.checked_sub(1), Some(rank + 1).filter(|&next| next < world)];
        let [before, after] = ranks.map(|rank| rank.map(|rank| Neighbour { communicator, rank }));
        if backwards { [after, before] } else { [before, after] }
    }

    /// Waits until the device of `near` has done all that this thread has asked for, as long as all ranks are alive.
    ///
    /// # Errors
    /// [`Error::Rank`]: what the ranks tell of one that is lost, or of this one NCCL's own errors and that the device is not
    /// done within the time of the group.
    pub fn settle(&self, near: &CubeTensor) -> Result<(), Error> {
        let mut lost = None;
        let settled = {
            let mut go_on = || {
                let alive = self.group.check().map_err(|error| lost = Some(error)).is_ok();
                alive && self.beside().all(|communicator| communicator.error().is_ok())
            };
            self.inner.settle(near, self.group.timeout(), &mut go_on)
        };
        let Err(error) = settled else { return Ok(()) };
        self.beside().for_each(|communicator| communicator.abort(&error.to_string()));
        // The watch may have been the first to know.
        let own = || Error::Rank { rank: self.group.rank(), reason: format!("cannot go on: {error}") };
        Err(lost.or_else(|| self.group.check().err()).unwrap_or_else(own))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unfinished(number: u64, begun: Option<bool>) -> Option<Unfinished> {
        behind(number, number, begun)
    }

    fn behind(number: u64, newest: u64, begun: Option<bool>) -> Option<Unfinished> {
        Some(Unfinished { number, newest, what: format!("all-gather number {number}, of 8 values"), begun })
    }

    #[test]
    fn what_gets_on_is_waited_for_and_what_does_not_is_told_after_the_limit() {
        let (begin, limit) = (Instant::now(), Duration::from_secs(10));
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        let mut patience = [Patience::new(limit)];
        let mut look = |oldest, seconds| stalled(&[oldest], &mut patience, at(seconds));
        // Each takes long, but another is the oldest before the limit; nothing is under way for longer than that.
        for (number, seconds) in [(1, 0), (1, 9), (2, 12), (2, 21)] {
            assert_eq!(look(unfinished(number, Some(true)), seconds), None);
        }
        assert_eq!(look(None, 22), None);
        assert_eq!(look(None, 90), None);
        // The number that was the oldest before is counted anew.
        assert_eq!(look(unfinished(3, Some(false)), 100), None);
        assert_eq!(look(unfinished(3, Some(true)), 109), None);
        let said = look(unfinished(3, Some(true)), 110).unwrap();
        assert!(said.contains("all-gather number 3") && said.contains("10.0 s"), "{said}");
    }

    #[test]
    fn a_driver_that_does_not_answer_is_waited_for_while_more_is_put_on_the_stream() {
        let (begin, limit) = (Instant::now(), Duration::from_secs(10));
        let at = |seconds: u64| begin + Duration::from_secs(seconds);
        let mut patience = [Patience::new(limit)];
        let mut look = |oldest, seconds| stalled(&[oldest], &mut patience, at(seconds));
        for (newest, seconds) in [(1, 0), (2, 9), (3, 18), (4, 27)] {
            assert_eq!(look(behind(1, newest, None), seconds), None);
        }
        assert_eq!(look(behind(1, 4, None), 36), None);
        assert!(look(behind(1, 4, None), 37).unwrap().contains("does not answer"));
        // Where it answers, what comes behind says nothing of the oldest.
        assert_eq!(look(behind(2, 5, Some(true)), 40), None);
        assert!(look(behind(2, 9, Some(true)), 50).unwrap().contains("has begun"));
    }

    #[test]
    fn whose_gpu_hangs_is_told_as_far_as_it_is_known() {
        let begin = Instant::now();
        let late = begin + Duration::from_secs(5);
        let said = |first: Option<Unfinished>, second: Option<Unfinished>| {
            let mut patience = [Patience::new(Duration::from_secs(5)), Patience::new(Duration::from_secs(5))];
            let both = [first, second];
            assert_eq!(stalled(&both, &mut patience, begin), None);
            stalled(&both, &mut patience, late).unwrap()
        };
        assert!(said(unfinished(1, Some(false)), None).contains("its GPU hangs in what comes before"));
        assert!(said(None, unfinished(1, None)).contains("the driver does not answer"));
        // Both wait; the one that has begun is what the other waits for.
        let of_two = said(unfinished(4, Some(false)), unfinished(9, Some(true)));
        assert!(of_two.contains("number 9") && of_two.contains("another rank"), "{of_two}");
    }
}
