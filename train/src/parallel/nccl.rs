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

use burn_cubecl::tensor::CubeTensor;

use super::{Collective, Team};
use crate::Error;
use crate::cuda::{self, Communicator, ID_BYTES, Ticket};

/// The GPU of this rank among those of all ranks.
#[derive(Debug)]
pub struct Gpus {
    /// Those that together have one copy of what is sharded.
    inner: Communicator,
    /// Those that have the same shard, where there are others.
    outer: Option<Communicator>,
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
        let group = team.all.clone();
        let communicators = [&inner].into_iter().chain(&outer).cloned().collect();
        let watch = match group.world() {
            1 => None,
            _ => Some(Watch::new(communicators, group.clone()).map_err(device_error)?),
        };
        Ok(Self { inner, outer, group, _watch: watch })
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
                alive && self.outer.as_ref().is_none_or(|outer| outer.error().is_ok())
            };
            self.inner.settle(near, self.group.timeout(), &mut go_on)
        };
        let Err(error) = settled else { return Ok(()) };
        if let Some(outer) = &self.outer {
            outer.abort(&error.to_string());
        }
        // The watch may have been the first to know.
        let own = || Error::Rank { rank: self.group.rank(), reason: format!("cannot go on: {error}") };
        Err(lost.or_else(|| self.group.check().err()).unwrap_or_else(own))
    }
}
