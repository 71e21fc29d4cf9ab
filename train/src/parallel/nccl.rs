//! The ranks' GPUs: NCCL between them, the host's collective beside it.
//!
//! NCCL does not know when a process dies on the same host, and its kernels wait for ever. So whoever waits for a GPU
//! waits here: meanwhile the host's collective is asked whether all ranks are alive, and NCCL whether it met an error;
//! when one is gone everything that is on its way is ended, and the error names the rank.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::{Collective, Team};
use crate::Error;
use crate::cuda::{self, Communicator, ID_BYTES, Ticket, Work};

/// The GPU of this rank among those of all ranks.
#[derive(Debug)]
pub struct Gpus {
    /// Those that together have one copy of what is sharded.
    inner: Communicator,
    /// Those that have the same shard, where there are others.
    outer: Option<Communicator>,
    /// Those that share the tokens of every row, where there are others.
    sequence: Option<Communicator>,
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

/// A thread that ends what is on its way when a rank is lost: the thread that asks for the work may be held up by a queue
/// that is full.
#[derive(Debug)]
struct Watch {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// How often the ranks are looked at.
const LOOK: Duration = Duration::from_millis(200);

impl Watch {
    fn new(communicators: Vec<Communicator>, group: Arc<dyn Collective>) -> std::io::Result<Self> {
        let done = Arc::new(AtomicBool::new(false));
        let ends = done.clone();
        let look = move || {
            while !ends.load(Ordering::Acquire) {
                // The thread that asks for work waits in a queue while the device is behind, and looks at nothing.
                let lost = group.check().err().map(|error| error.to_string());
                let failed = || communicators.iter().find_map(|communicator| communicator.error().err());
                if let Some(reason) = lost.or_else(|| failed().map(|error| error.to_string())) {
                    communicators.iter().for_each(|communicator| communicator.abort(&reason));
                    return;
                }
                thread::park_timeout(LOOK);
            }
        };
        let thread = thread::Builder::new().name("ranks".to_owned()).spawn(look)?;
        Ok(Self { done, thread: Some(thread) })
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
        let group = team.all.clone();
        let communicators = [&inner].into_iter().chain(&outer).chain(&sequence).cloned().collect();
        let watch = match group.world() {
            1 => None,
            _ => Some(Watch::new(communicators, group.clone()).map_err(device_error)?),
        };
        let gpus = Self { inner, outer, sequence, group, _watch: watch };
        gpus.greet(near);
        Ok(gpus)
    }

    /// Lets neighbours connect, which NCCL does when they first send something, and for which it holds up the thread that asks
    /// until the other asks too: now, where no other work waits behind it.
    fn greet(&self, near: &CubeTensor) {
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
        self.outer.iter().chain(&self.sequence)
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
