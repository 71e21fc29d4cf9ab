//! Collectives over GPUs by NCCL, and values from one GPU to another, on a stream of their own beside that of the products.
//!
//! The library is loaded at run time and called through the few functions of `nccl.h` (2.18 on) that are declared
//! here. A collective begins when all is done that was asked for before it on its tensors' device; it is followed by
//! what waits for its [`Ticket`]. Between the two the GPU does both. Communicators are made non-blocking, so that no call
//! waits for a rank that does not come: the waiting is done here, with a limit and a question in between whether to
//! go on.

use std::any::Any;
use std::cell::Cell;
use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl_common::device_handle::DeviceHandle;
use cubecl_environment::stream::StreamId;
use cubecl_server::server::ServerError;
use cubecl_server::stream::WriteScoped;
use cudarc::driver::result::{event, stream as streams};
use cudarc::driver::sys;
use libloading::Library;

use super::kernel::set_context;
use super::work::{CudaServer, Work};
use super::{Error, buffer, libraries, profile};

/// What rank 0 makes and all ranks of a communicator begin with.
pub type UniqueId = [u8; ID_BYTES];

/// Bytes of a [`UniqueId`], `NCCL_UNIQUE_ID_BYTES`.
pub const ID_BYTES: usize = 128;

/// `ncclUniqueId`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Id([u8; ID_BYTES]);

/// `ncclComm_t`.
type Handle = *mut c_void;

/// `ncclConfig_t` as of version 2.17; later libraries take it and know by its version what it lacks.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cluster_size: c_int,
    fewest_blocks: c_int,
    most_blocks: c_int,
    network: *const c_char,
}

impl Config {
    fn non_blocking() -> Self {
        // `NCCL_CONFIG_UNDEF_INT`
        let unset = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_700,
            blocking: 0,
            cluster_size: unset,
            fewest_blocks: unset,
            most_blocks: unset,
            network: std::ptr::null(),
        }
    }
}

/// `ncclSuccess` and `ncclInProgress`.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclSum`.
const SUM: c_int = 0;

type Reduction = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, sys::CUstream) -> c_int;
type Gathering = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, sys::CUstream) -> c_int;
type Sending = unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Handle, sys::CUstream) -> c_int;
type Receiving = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, sys::CUstream) -> c_int;

/// The functions of `libnccl` that are used.
struct Functions {
    unique_id: unsafe extern "C" fn(*mut Id) -> c_int,
    init: unsafe extern "C" fn(*mut Handle, c_int, Id, c_int, *mut Config) -> c_int,
    async_error: unsafe extern "C" fn(Handle, *mut c_int) -> c_int,
    abort: unsafe extern "C" fn(Handle) -> c_int,
    error_text: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn(Handle) -> *const c_char,
    all_reduce: Reduction,
    reduce_scatter: Reduction,
    all_gather: Gathering,
    send: Sending,
    receive: Receiving,
}

impl Functions {
    /// Loaded once in a process.
    fn get() -> Result<&'static Self, Error> {
        static LOADED: OnceLock<Result<Functions, Error>> = OnceLock::new();
        LOADED.get_or_init(Self::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> Result<Self, Error> {
        let found = libraries::find().collectives.found.clone().map_err(Error::Missing)?;
        let refused = |error: libloading::Error| Error::call(found.path.display().to_string(), error);
        // SAFETY: the library is in the process already, and stays: it is never closed. Every function has the type that
        // `nccl.h` declares it with since version 2.14.
        unsafe {
            let library = Library::new(&found.path).map_err(refused)?;
            let functions = Self {
                unique_id: *library.get(b"ncclGetUniqueId").map_err(refused)?,
                init: *library.get(b"ncclCommInitRankConfig").map_err(refused)?,
                async_error: *library.get(b"ncclCommGetAsyncError").map_err(refused)?,
                abort: *library.get(b"ncclCommAbort").map_err(refused)?,
                error_text: *library.get(b"ncclGetErrorString").map_err(refused)?,
                last_error: *library.get(b"ncclGetLastError").map_err(refused)?,
                all_reduce: *library.get(b"ncclAllReduce").map_err(refused)?,
                reduce_scatter: *library.get(b"ncclReduceScatter").map_err(refused)?,
                all_gather: *library.get(b"ncclAllGather").map_err(refused)?,
                send: *library.get(b"ncclSend").map_err(refused)?,
                receive: *library.get(b"ncclRecv").map_err(refused)?,
            };
            std::mem::forget(library);
            Ok(functions)
        }
    }

    /// What the library says of a result that is none of the two good ones.
    fn failure(&self, call: &str, code: c_int, handle: Handle) -> Error {
        // SAFETY: both functions give strings of the library's own, which it keeps.
        let (text, last) = unsafe { (text((self.error_text)(code)), text((self.last_error)(handle))) };
        let last = last.trim();
        Error::call(format!("NCCL {call}"), if last.is_empty() { text } else { format!("{text}: {last}") })
    }
}

/// # Safety
/// `from` is null or a string that ends with zero.
unsafe fn text(from: *const c_char) -> String {
    if from.is_null() {
        return String::new();
    }
    // SAFETY: as the caller says.
    unsafe { CStr::from_ptr(from) }.to_string_lossy().into_owned()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a collective does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// Every rank gets the sum of all ranks' values.
    AllReduce,
    /// Every rank gets its own of as many equal pieces of the sum as there are ranks.
    ReduceScatter,
    /// Every rank gets the values of all ranks, in their order.
    AllGather,
}

impl fmt::Display for Collective {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Self::AllReduce => "all-reduce",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllGather => "all-gather",
        })
    }
}

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Together(Collective),
    /// Gives this rank's values to the rank of that number.
    Send(usize),
    /// Takes those of the rank of that number.
    Receive(usize),
}

impl fmt::Display for Operation {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Together(collective) => collective.fmt(to),
            Self::Send(_) => to.write_str("send"),
            Self::Receive(_) => to.write_str("receive"),
        }
    }
}

/// One rank's place among the GPUs that work together. Clones are the same.
#[derive(Clone)]
pub struct Communicator(Arc<Shared>);

struct Shared {
    functions: &'static Functions,
    handle: Handle,
    stream: sys::CUstream,
    rank: usize,
    world: usize,
    /// Held while the library is at work for this communicator, which takes one thread at a time.
    turn: Mutex<()>,
    /// Why nothing can be asked of it any more.
    ended: Mutex<Option<String>>,
    ending: AtomicBool,
    device: u32,
    /// Collectives on the stream that were not seen done, the oldest first, and how many there were before; empty until
    /// somebody watches.
    flying: Mutex<(VecDeque<Flying>, u64)>,
    watched: AtomicBool,
    /// The driver is being asked about them.
    asking: AtomicBool,
}

/// A collective on the stream.
struct Flying {
    number: u64,
    what: String,
    begin: Done,
    end: Done,
    has_begun: bool,
}

/// A collective that was put on the stream and has not been seen done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// Its number among those of the communicator.
    pub number: u64,
    /// That of the one that was put on the stream last.
    pub newest: u64,
    /// What it is, for people.
    pub what: String,
    /// Whether it has begun, which is when this rank's GPU has done all that was asked for before it; unknown while the
    /// driver does not answer.
    pub begun: Option<bool>,
}

// SAFETY: ids of the library and the driver; calls with them are made one at a time (`turn`), from any thread.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl fmt::Debug for Communicator {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "Communicator({} of {})", self.rank(), self.world())
    }
}

/// A collective that was asked for. It has to be waited for: until then the memory of its tensors is held.
#[derive(Clone, Debug)]
#[must_use = "what a collective writes is there after the wait for its ticket"]
pub struct Ticket(Arc<Flight>);

#[derive(Default)]
struct Flight {
    /// Reached when it is done; none before it has begun, after it was waited for and when it failed.
    done: Mutex<Option<Done>>,
    /// What keeps the memory where it is.
    held: Mutex<Option<Box<dyn Any + Send>>>,
}

struct Done(sys::CUevent);
// SAFETY: an id of the driver, used with the context of its device current.
unsafe impl Send for Done {}

impl fmt::Debug for Flight {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "Flight({})", if lock(&self.held).is_some() { "in the air" } else { "landed" })
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // Nobody waited: the memory may still be written, so it is not given back.
        if let Some(held) = lock(&self.held).take() {
            std::mem::forget(held);
        }
    }
}

impl Ticket {
    /// Lets all that this thread asks for later wait until the collective is done. Does not wait itself.
    pub fn wait(self, near: &CubeTensor) {
        let mut work = Work::near(near);
        work.wait(&self);
        work.submit();
    }

    /// Keeps `held` until it was waited for.
    pub(super) fn hold(&self, held: Box<dyn Any + Send>) {
        *lock(&self.0.held) = Some(held);
    }

    /// Lets `compute` wait. On the device thread.
    pub(super) fn land(&self, compute: sys::CUstream) -> Result<(), Error> {
        let Some(done) = lock(&self.0.done).take() else { return Ok(()) };
        wait_for(compute, done)?;
        // Memory that is given back now is used again by what comes later on the same stream.
        drop(lock(&self.0.held).take());
        Ok(())
    }
}

/// The number of a type in `nccl.h`.
fn number(dtype: DType) -> Option<c_int> {
    match dtype {
        DType::F16 => Some(6),
        DType::F32 => Some(7),
        DType::F64 => Some(8),
        DType::BF16 => Some(9),
        _ => None,
    }
}

/// Makes the context of a device current on this thread.
fn enter(index: u32) -> Result<(), Error> {
    thread_local! {
        static ENTERED: Cell<Option<u32>> = const { Cell::new(None) };
    }
    if ENTERED.get() != Some(index) {
        set_context(index)?;
        ENTERED.set(Some(index));
    }
    Ok(())
}

/// Pauses of a fiftieth of what was waited so far: little is slept beyond the end, and little is asked.
struct Pause(Instant);

impl Pause {
    fn new() -> Self {
        Self(Instant::now())
    }

    fn waited(&self) -> Duration {
        self.0.elapsed()
    }

    fn take(&self) {
        std::thread::sleep((self.waited() / 50).clamp(Duration::from_micros(20), Duration::from_micros(500)));
    }
}

impl Communicator {
    /// An id for a new communicator, for all its ranks.
    ///
    /// # Errors
    /// [`Error::Missing`] without the library, [`Error::Call`] when it refuses.
    pub fn unique_id() -> Result<UniqueId, Error> {
        let functions = Functions::get()?;
        let mut id = Id([0; ID_BYTES]);
        // SAFETY: the id has the size that the library writes.
        let code = unsafe { (functions.unique_id)(&mut id) };
        if code == SUCCESS { Ok(id.0) } else { Err(functions.failure("id", code, std::ptr::null_mut())) }
    }

    /// Joins the other ranks, all of which do the same with the same `id`, on the device of `near`. Waits for them,
    /// at most for `limit`, as long as `go_on` says so. What is asked of it and of `beside` is done in one order.
    ///
    /// # Errors
    /// [`Error::Missing`] without the library, [`Error::Call`] when it refuses, the limit is over or `go_on` says no.
    pub fn join(
        near: &CubeTensor,
        id: &UniqueId,
        rank: usize,
        world: usize,
        beside: Option<&Self>,
        limit: Duration,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Self, Error> {
        let functions = Functions::get()?;
        let device = near.client.service_id().device;
        enter(u32::from(device.index_id))?;
        let failed = |error| Error::call("a stream for collectives", error);
        // Its blocks shall not wait behind those of a product that fills the device.
        let (_, greatest) = streams::get_priority_range().map_err(failed)?;
        let stream = match beside {
            Some(other) => other.0.stream,
            None => streams::create_with_priority(streams::StreamKind::NonBlocking, greatest).map_err(failed)?,
        };
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: what is written to lives, and the configuration is one that the library knows.
        let code = unsafe {
            (functions.init)(&mut handle, world as c_int, Id(*id), rank as c_int, &mut Config::non_blocking())
        };
        if code != SUCCESS && code != IN_PROGRESS {
            return Err(functions.failure("init", code, handle));
        }
        let shared = Shared {
            functions,
            handle,
            stream,
            rank,
            world,
            turn: Mutex::new(()),
            ended: Mutex::new(None),
            ending: AtomicBool::new(false),
            device: u32::from(device.index_id),
            flying: Mutex::default(),
            watched: AtomicBool::new(false),
            asking: AtomicBool::new(false),
        };
        let communicator = Self(Arc::new(shared));
        let pause = Pause::new();
        while !communicator.0.is_settled("init")? {
            let reason = if pause.waited() > limit {
                format!("not all of {world} ranks came within {} s", limit.as_secs())
            } else if !go_on() {
                "given up".to_owned()
            } else {
                pause.take();
                continue;
            };
            communicator.abort(&reason);
            return Err(Error::call("NCCL init", reason));
        }
        Ok(communicator)
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.0.world
    }

    /// Puts a collective on its way, from the contiguous `from` to the contiguous `to`. They may overlap as NCCL's may:
    /// the smaller is the rank's own piece of the larger, or both are the same.
    ///
    /// # Panics
    /// When they are not contiguous, differ in type, have none that can be added up, or their sizes do not fit.
    #[track_caller]
    pub fn start(&self, collective: Collective, from: &CubeTensor, to: &CubeTensor) -> Ticket {
        let count = |tensor: &CubeTensor| {
            assert!(buffer::is_contiguous(tensor), "not contiguous: {tensor:?}");
            tensor.meta.shape().num_elements()
        };
        let (sent, received) = (count(from), count(to));
        let (each, fits) = match collective {
            Collective::AllReduce => (sent, sent == received),
            Collective::ReduceScatter => (received, sent == received * self.world()),
            Collective::AllGather => (sent, sent * self.world() == received),
        };
        assert!(fits, "{collective} over {} ranks of {sent} values to {received}", self.world());
        self.ask(Operation::Together(collective), each, from, to)
    }

    /// Puts the contiguous `values` on their way to the rank `to`, which has to receive as many of that type. Of two ranks each
    /// sends and receives in the order in which the other does the opposite.
    ///
    /// # Panics
    /// When they are not contiguous, their type has no number in NCCL, or there is no such other rank.
    #[track_caller]
    pub fn send(&self, values: &CubeTensor, to: usize) -> Ticket {
        self.pass(Operation::Send(to), to, values)
    }

    /// Lets the contiguous `values` come from the rank `from`, see [`Communicator::send`].
    ///
    /// # Panics
    /// As that.
    #[track_caller]
    pub fn receive(&self, values: &CubeTensor, from: usize) -> Ticket {
        self.pass(Operation::Receive(from), from, values)
    }

    #[track_caller]
    fn pass(&self, operation: Operation, other: usize, values: &CubeTensor) -> Ticket {
        assert!(buffer::is_contiguous(values), "not contiguous: {values:?}");
        let (rank, world) = (self.rank(), self.world());
        assert!(other < world && other != rank, "rank {rank} of {world} has no other of number {other}");
        self.ask(operation, values.meta.shape().num_elements(), values, values)
    }

    #[track_caller]
    fn ask(&self, operation: Operation, count: usize, from: &CubeTensor, to: &CubeTensor) -> Ticket {
        let Some(dtype) = number(from.dtype).filter(|_| from.dtype == to.dtype) else {
            panic!("{operation} from {:?} to {:?}", from.dtype, to.dtype)
        };
        let ticket = Ticket(Arc::default());
        let call = Call { communicator: self.clone(), operation, count, dtype, ticket: ticket.clone() };
        let mut work = Work::near(from);
        work.collective(call, from, to);
        work.submit();
        ticket
    }

    /// Waits until the device of `near` has done all that this thread has asked for, and every collective, at most for
    /// `limit` and as long as `go_on` says so. After an error nothing can be asked of the communicator any more.
    ///
    /// # Errors
    /// [`Error::Call`] when the library tells an error of any rank, the limit is over or `go_on` says no.
    pub fn settle(&self, near: &CubeTensor, limit: Duration, go_on: &mut dyn FnMut() -> bool) -> Result<(), Error> {
        let device = near.client.service_id().device;
        enter(u32::from(device.index_id))?;
        let reached: Arc<Mutex<Option<Result<Done, Error>>>> = Arc::default();
        let (to, stream_id, shared) = (reached.clone(), StreamId::current(), self.0.clone());
        let door = DeviceHandle::<CudaServer>::new(device);
        door.submit(move |server| *lock(&to) = Some(shared.end(server, stream_id)));
        // Else it waits until more is asked for.
        door.flush_queue();
        let pause = Pause::new();
        loop {
            match &*lock(&reached) {
                Some(Err(error)) => return Err(error.clone()),
                // SAFETY: an event that was recorded and is destroyed when it is reached.
                Some(Ok(Done(at))) if unsafe { is_reached(*at) }? => {
                    // SAFETY: used no more.
                    let _ = unsafe { event::destroy(*at) };
                    return Ok(());
                }
                Some(Ok(_)) | None => {}
            }
            if let Some(reason) = lock(&self.0.ended).clone() {
                return Err(Error::call("collectives", reason));
            }
            let reason = match self.error() {
                Err(error) => error.to_string(),
                Ok(()) if pause.waited() > limit => {
                    format!("the device was not done within {} s: a rank does not answer", limit.as_secs())
                }
                Ok(()) if !go_on() => "given up".to_owned(),
                Ok(()) => {
                    pause.take();
                    continue;
                }
            };
            self.abort(&reason);
            return Err(Error::call("collectives", reason));
        }
    }

    /// Asks the library whether it met an error, such as a connection that was lost.
    ///
    /// # Errors
    /// What it met.
    pub fn error(&self) -> Result<(), Error> {
        // Whoever has the turn asks for itself. The question ends what a call has left to be done, so two threads that
        // ask at once would end it twice.
        let Ok(_turn) = self.0.turn.try_lock() else { return Ok(()) };
        if self.0.ending.load(Ordering::Acquire) {
            return Ok(());
        }
        self.0.is_settled("collective").map(|_| ())
    }

    /// Asks the driver which collectives have begun and ended, for [`Communicator::unfinished`]; from the first call on they
    /// are noted. One thread alone calls it, and may be held up in it: the driver answers nobody while a queue of the device
    /// is full.
    ///
    /// # Errors
    /// [`Error::Call`] when the device has failed.
    pub fn look(&self) -> Result<(), Error> {
        let shared = &*self.0;
        shared.watched.store(true, Ordering::Release);
        enter(shared.device)?;
        shared.asking.store(true, Ordering::Release);
        let asked = shared.look();
        shared.asking.store(false, Ordering::Release);
        asked
    }

    /// The oldest collective that [`Communicator::look`] has not seen done. Does not wait.
    pub fn unfinished(&self) -> Option<Unfinished> {
        let asking = self.0.asking.load(Ordering::Acquire);
        let flying = lock(&self.0.flying);
        let newest = flying.0.back().map_or(0, |newest| newest.number);
        flying.0.front().map(|oldest| Unfinished {
            number: oldest.number,
            newest,
            what: oldest.what.clone(),
            begun: if asking { None } else { Some(oldest.has_begun) },
        })
    }

    /// Ends everything that is on its way, so that nothing waits for ranks that are gone, and refuses all that comes.
    pub fn abort(&self, reason: &str) {
        let shared = &*self.0;
        if shared.ending.swap(true, Ordering::AcqRel) {
            return;
        }
        *lock(&shared.ended) = Some(reason.to_owned());
        // A call that is being made sees `ending`; one that the driver holds up is left alone with the library, which
        // makes it return.
        let begin = Instant::now();
        let turn = loop {
            match shared.turn.try_lock() {
                Ok(turn) => break Some(turn),
                Err(_) if begin.elapsed() > Duration::from_secs(2) => break None,
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        // SAFETY: a handle of the library that nothing uses after this.
        let code = unsafe { (shared.functions.abort)(shared.handle) };
        drop(turn);
        if code != SUCCESS && code != IN_PROGRESS {
            tracing::debug!(code, "NCCL did not abort");
        }
    }
}

/// A point in the order of `stream`, without its time. On the device thread.
fn point(stream: sys::CUstream) -> Result<Done, Error> {
    let failed = |error| Error::call("an event", error);
    let made = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed)?;
    // SAFETY: an event that was just made, on a stream of the current context.
    unsafe { event::record(made, stream) }.map_err(failed)?;
    Ok(Done(made))
}

/// Whether an event was reached.
///
/// # Safety
/// It was recorded and is not destroyed meanwhile.
unsafe fn is_reached(at: sys::CUevent) -> Result<bool, Error> {
    // SAFETY: as the caller says.
    match unsafe { event::query(at) } {
        Ok(()) => Ok(true),
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        Err(error) => Err(Error::call("the device", error)),
    }
}

impl Shared {
    /// Takes out what has ended. Asks without the lock: the device thread adds meanwhile.
    fn look(&self) -> Result<(), Error> {
        loop {
            let oldest = lock(&self.flying).0.front().map(|oldest| (oldest.begin.0, oldest.end.0));
            let Some((begin, end)) = oldest else { return Ok(()) };
            // SAFETY: both were recorded, and are destroyed here alone.
            let [has_begun, has_ended] = unsafe { [is_reached(begin)?, is_reached(end)?] };
            let mut flying = lock(&self.flying);
            if !has_ended {
                if let Some(oldest) = flying.0.front_mut() {
                    oldest.has_begun = has_begun;
                }
                return Ok(());
            }
            flying.0.pop_front();
            drop(flying);
            for at in [begin, end] {
                // SAFETY: used no more.
                let _ = unsafe { event::destroy(at) };
            }
        }
    }

    /// A point behind all that was asked for on a stream, and behind all collectives. On the device thread.
    fn end(&self, server: &mut CudaServer, stream_id: StreamId) -> Result<Done, Error> {
        let refused = |error: ServerError| Error::call("the stream", error);
        let compute = server.write_streams().resolve(stream_id, std::iter::empty()).map_err(refused)?.current().sys;
        wait_for(compute, point(self.stream)?)?;
        point(compute)
    }

    /// Whether the library has finished what it was asked for on the host's side.
    fn is_settled(&self, call: &str) -> Result<bool, Error> {
        let mut code = SUCCESS;
        // SAFETY: the handle is not yet aborted, and it is this thread's turn.
        let asked = unsafe { (self.functions.async_error)(self.handle, &mut code) };
        match (asked, code) {
            (SUCCESS, SUCCESS) => Ok(true),
            (SUCCESS, IN_PROGRESS) => Ok(false),
            (SUCCESS, code) | (code, _) => Err(self.functions.failure(call, code, self.handle)),
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if !self.ending.load(Ordering::Acquire) {
            // Gives back the memory that the library has taken. Unlike its other way to end this waits for nobody.
            // SAFETY: nobody has the handle any more.
            let _ = unsafe { (self.functions.abort)(self.handle) };
        }
    }
}

/// Lets `stream` wait for a point. On the device thread.
fn wait_for(stream: sys::CUstream, Done(at): Done) -> Result<(), Error> {
    let failed = |error| Error::call("waiting for a point in a stream", error);
    // SAFETY: an event that was recorded; it is used no more, and the driver keeps it as long as it needs it.
    unsafe {
        streams::wait_event(stream, at, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT).map_err(failed)?;
        event::destroy(at).map_err(failed)
    }
}

/// A collective as the device thread makes it.
#[derive(Debug)]
pub(super) struct Call {
    communicator: Communicator,
    operation: Operation,
    /// Values of the smaller side.
    count: usize,
    dtype: c_int,
    pub(super) ticket: Ticket,
}

/// Phase of the time that collectives take, and of that in which products wait for them.
pub const COMMUNICATION: &str = "communication";
/// See [`COMMUNICATION`].
pub const EXPOSED: &str = "exposed";

impl Call {
    pub(super) fn name(&self) -> String {
        self.operation.to_string()
    }

    /// Whether it writes anything on this rank.
    pub(super) fn writes(&self) -> bool {
        !matches!(self.operation, Operation::Send(_))
    }

    /// Puts it on its way behind what `compute` has so far, recorded or not. On the device thread.
    pub(super) fn run(
        &self,
        compute: sys::CUstream,
        from: sys::CUdeviceptr,
        to: sys::CUdeviceptr,
        recorded: bool,
    ) -> Result<(), Error> {
        let shared = &*self.communicator.0;
        let _turn = lock(&shared.turn);
        if let Some(reason) = &*lock(&shared.ended) {
            return Err(Error::call(self.name(), reason));
        }
        wait_for(shared.stream, point(compute)?)?;
        let began = if shared.watched.load(Ordering::Acquire) { Some(point(shared.stream)?) } else { None };
        let begin = if recorded { Some(profile::mark(shared.stream)?) } else { None };
        let (source, target) = (from as *const c_void, to as *mut c_void);
        let (functions, handle, stream) = (shared.functions, shared.handle, shared.stream);
        // SAFETY: the sizes were checked against the tensors, whose memory is held until the ticket has landed, and the
        // handle is not aborted while it is this thread's turn.
        let mut code = unsafe {
            match self.operation {
                Operation::Together(Collective::AllReduce) => {
                    (functions.all_reduce)(source, target, self.count, self.dtype, SUM, handle, stream)
                }
                Operation::Together(Collective::ReduceScatter) => {
                    (functions.reduce_scatter)(source, target, self.count, self.dtype, SUM, handle, stream)
                }
                Operation::Together(Collective::AllGather) => {
                    (functions.all_gather)(source, target, self.count, self.dtype, handle, stream)
                }
                Operation::Send(to) => (functions.send)(source, self.count, self.dtype, to as c_int, handle, stream),
                Operation::Receive(from) => {
                    (functions.receive)(target, self.count, self.dtype, from as c_int, handle, stream)
                }
            }
        };
        // Of a single send or receive releases of the library say success before it is on the stream (NVIDIA/nccl issue 1495),
        // where the point below would be too early; what they answer when asked is right.
        if code == SUCCESS && !matches!(self.operation, Operation::Together(_)) {
            code = IN_PROGRESS;
        }
        let pause = Pause::new();
        while code == IN_PROGRESS {
            if shared.ending.load(Ordering::Acquire) {
                return Err(Error::call(self.name(), "given up"));
            }
            match shared.is_settled(&self.name())? {
                true => code = SUCCESS,
                false => pause.take(),
            }
        }
        if code != SUCCESS {
            return Err(functions.failure(&self.name(), code, handle));
        }
        if let Some(begin) = begin {
            profile::keep(self.name(), COMMUNICATION, begin, profile::mark(shared.stream)?);
        }
        *lock(&self.ticket.0.done) = Some(point(shared.stream)?);
        if let Some(begin) = began {
            let end = point(shared.stream)?;
            let mut flying = lock(&shared.flying);
            let number = flying.1 + 1;
            flying.1 = number;
            let what = format!("{} number {number}, of {} values", self.name(), self.count);
            flying.0.push_back(Flying { number, what, begin, end, has_begun: false });
        }
        Ok(())
    }
}
