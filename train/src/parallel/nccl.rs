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

use super::Collective;
use crate::Error;
use crate::cuda::{self, Communicator, ID_BYTES, Ticket};

/// The GPU of this rank among those of all ranks.
#[derive(Debug)]
pub struct Gpus {
    communicator: Communicator,
    group: Arc<dyn Collective>,
    _watch: Option<Watch>,
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
    fn new(communicator: Communicator, group: Arc<dyn Collective>) -> std::io::Result<Self> {
        let done = Arc::new(AtomicBool::new(false));
        let ends = done.clone();
        let look = move || {
            while !ends.load(Ordering::Acquire) {
                if let Err(error) = group.check() {
                    communicator.abort(&error.to_string());
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

impl Gpus {
    /// Joins the GPUs of all ranks of `group`, each with the device that its `near` is on. All ranks call it together.
    ///
    /// # Errors
    /// [`Error::Device`] when NCCL is not there or refuses, what `group` tells of a rank that is lost.
    pub fn join(near: &CubeTensor, group: &Arc<dyn Collective>) -> Result<Self, Error> {
        // Every rank speaks even where it cannot go on, so that none waits for its id.
        let own = match group.rank() {
            0 => Communicator::unique_id().map(|id| id.to_vec()),
            _ => Ok(Vec::new()),
        };
        let mut said = group.exchange(own.as_deref().unwrap_or_default())?;
        own.map_err(device_error)?;
        let id = <[u8; ID_BYTES]>::try_from(said.swap_remove(0));
        let id = id.map_err(|_| device_error("rank 0 has no NCCL"))?;
        let mut lost = None;
        let communicator = {
            let mut go_on = || group.check().map_err(|error| lost = Some(error)).is_ok();
            Communicator::join(near, &id, group.rank(), group.world(), group.timeout(), &mut go_on)
        };
        let communicator = match (communicator, lost) {
            (_, Some(error)) => return Err(error),
            (communicator, None) => communicator.map_err(device_error)?,
        };
        let watch = match group.world() {
            1 => None,
            _ => Some(Watch::new(communicator.clone(), group.clone()).map_err(device_error)?),
        };
        Ok(Self { communicator, group: group.clone(), _watch: watch })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.communicator.rank()
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.communicator.world()
    }

    /// Puts a collective on its way, see [`Communicator::start`].
    ///
    /// # Panics
    /// As that.
    #[track_caller]
    pub fn start(&self, collective: cuda::Collective, from: &CubeTensor, to: &CubeTensor) -> Ticket {
        self.communicator.start(collective, from, to)
    }

    /// Waits until the device of `near` has done all that this thread has asked for, as long as all ranks are alive.
    ///
    /// # Errors
    /// What `group` tells of a rank that is lost, [`Error::Device`] with NCCL's own errors and when the device is not done
    /// within the time of the group.
    pub fn settle(&self, near: &CubeTensor) -> Result<(), Error> {
        let mut lost = None;
        let settled = {
            let mut go_on = || self.group.check().map_err(|error| lost = Some(error)).is_ok();
            self.communicator.settle(near, self.group.timeout(), &mut go_on)
        };
        match (settled, lost) {
            (_, Some(error)) => Err(error),
            (Ok(()), None) => Ok(()),
            // The watch may have been the first to know.
            (Err(error), None) => Err(self.group.check().err().unwrap_or_else(|| device_error(error))),
        }
    }
}
