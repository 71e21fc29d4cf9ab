//! The door to the device: launches and products gathered here run on Burn's stream and memory.

use std::cell::RefCell;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl_common::device_handle::DeviceHandle;
use cubecl_environment::backtrace::BackTrace;
use cubecl_environment::stream::StreamId;
use cubecl_server::runtime::Runtime;
use cubecl_server::server::{BufferBinding, ServerError, ServerStorage};
use cubecl_server::stream::{ExecuteScope, WriteScoped, failed_writing};
use cudarc::driver::result as cu;
use cudarc::driver::sys;

use super::argument::{Access, Kind};
use super::communicator::{self, Ticket};
use super::product::{self, Product};
use super::{Argument, Error, Grid, Kernel, Swizzle, Tiles, architecture, buffer, profile};

/// The server behind a CUDA client; `CudaServer` itself is not exported by name.
pub(super) type CudaServer = <cubecl::cuda::CudaRuntime as Runtime>::Server;

/// Kernels and products for one device, gathered in order and sent off together.
///
/// What was sent runs after all that this thread asked of Burn before and in front of all that it
/// asks later. Memory of tensors that are dropped after [`Work::submit`] stays until it has run.
#[must_use = "nothing runs before `submit`"]
pub struct Work {
    device: cubecl_common::device::DeviceId,
    /// Every buffer once, by the order of its first use.
    buffers: Vec<Buffer>,
    steps: Vec<Step>,
    /// The phase it belongs to, where times are recorded.
    phase: Option<&'static str>,
}

thread_local! {
    /// What gathers the work of this thread, inside of [`together`].
    static OPEN: RefCell<Option<Work>> = const { RefCell::new(None) };
}

/// Sends all work on the device of `near` that `make` submits in one piece, which spares most of the time that a piece
/// takes on its way. In return the memory of what `make` drops is not used again before it returns.
pub fn together<T>(near: &CubeTensor, make: impl FnOnce() -> T) -> T {
    /// Sends what was gathered when it goes, after a panic too.
    struct Gathering(Option<Work>);
    impl Drop for Gathering {
        fn drop(&mut self) {
            if let Some(work) = OPEN.replace(self.0.take()) {
                work.submit();
            }
        }
    }
    let _gathering = Gathering(OPEN.replace(Some(Work::near(near))));
    make()
}

/// Lets the device of `near` begin with all that was asked for: else the last of it waits until more comes. For those who
/// wait for something else before they ask for more.
pub fn flush(near: &CubeTensor) {
    DeviceHandle::<CudaServer>::new(near.client.service_id().device).flush_queue();
}

/// Gives all memory back to the driver that nothing is in. Waits for the device; for those who ask for other sizes from now on.
///
/// # Errors
/// When the device has failed.
pub fn give_all_back(near: &CubeTensor) -> Result<(), Error> {
    near.client.memory_cleanup().map_err(|error| Error::call("giving memory back", error))
}

/// Gives memory back to the driver that nothing is in any more and nothing new goes into: pages of a size that a larger
/// allocation has outgrown. CubeCL takes them out, but gives them back only when memory is short, or where it is asked to.
/// Waits for the device, so that it is for those who have waited for it anyway.
///
/// # Errors
/// When the device has failed.
pub fn give_back(near: &CubeTensor) -> Result<(), Error> {
    near.client.flush().map_err(|error| Error::call("giving memory back", error))
}

/// Pieces of work of this process that failed.
static FAILURES: AtomicUsize = AtomicUsize::new(0);
/// The first of them, which are told to everybody.
const FAILURES_TOLD: usize = 3;

struct Buffer {
    binding: BufferBinding,
    written: bool,
}

/// Index into the buffers of the work.
type Slot = usize;

enum Step {
    Launch { kernel: Kernel, grid: Grid, values: Vec<Value> },
    Product { call: product::Call, slots: [Slot; 4] },
    Zero { slot: Slot, bytes: usize },
    Copy { from: Slot, to: Slot, bytes: usize },
    Collective { call: communicator::Call, from: Slot, to: Slot },
    Wait { ticket: Ticket },
}

enum Value {
    Pointer(Slot),
    Tiles(Slot, Tiles, DType),
    Strided(Slot, Tiles),
    /// The bits of a value of 4 or 8 bytes; the machines that CUDA runs on store the low ones first.
    Bits(u64),
}

impl Work {
    /// Nothing yet, on the device of `near`.
    ///
    /// # Panics
    /// When that is not a CUDA device.
    pub fn near(near: &CubeTensor) -> Self {
        let name = near.client.name();
        assert!(name == "cuda", "CUDA work on a {name} device");
        Self {
            device: near.client.service_id().device,
            buffers: Vec::new(),
            steps: Vec::new(),
            phase: profile::current(),
        }
    }

    fn slot(&mut self, tensor: &CubeTensor, access: Access) -> Slot {
        assert!(
            tensor.client.service_id().device == self.device,
            "a tensor of another device in the work of device {}",
            self.device.index_id
        );
        let binding = tensor.handle.clone().binding();
        self.buffers.push(Buffer { binding, written: access != Access::Read });
        self.buffers.len() - 1
    }

    /// Adds a launch of `kernel`.
    ///
    /// # Panics
    /// When the arguments are not what the kernel's source declares: their number, the type of a
    /// value or of a tensor's values, `const` for what is only read.
    #[track_caller]
    pub fn launch(&mut self, kernel: &Kernel, grid: Grid, arguments: &[Argument<'_>]) {
        let parameters = kernel.parameters();
        let name = kernel.entry;
        let (given, taken) = (arguments.len(), parameters.len());
        assert!(given == taken, "{name} takes {taken} arguments, not {given}");
        for (at, (argument, parameter)) in arguments.iter().zip(parameters.iter()).enumerate() {
            assert!(argument.0.fits(parameter), "argument {at} of {name} is {parameter:?}, not {argument:?}");
        }
        if grid.is_empty() {
            return;
        }
        let values = arguments.iter().map(|argument| match &argument.0 {
            Kind::Pointer(tensor, access) => Value::Pointer(self.slot(tensor, *access)),
            Kind::Tiles(tensor, tiles, access) => Value::Tiles(self.slot(tensor, *access), tiles.clone(), tensor.dtype),
            Kind::Strided(tensor, tiles, access) => Value::Strided(self.slot(tensor, *access), tiles.clone()),
            Kind::Absent => Value::Bits(0),
            Kind::U32(value) => Value::Bits(u64::from(*value)),
            Kind::I32(value) => Value::Bits(u64::from(*value as u32)),
            Kind::U64(value) => Value::Bits(*value),
            Kind::I64(value) => Value::Bits(*value as u64),
            Kind::F32(value) => Value::Bits(u64::from(value.to_bits())),
        });
        let values = values.collect();
        self.steps.push(Step::Launch { kernel: kernel.clone(), grid, values });
    }

    /// Adds a matrix product.
    ///
    /// # Panics
    /// When the shapes or types do not fit each other.
    #[track_caller]
    pub fn product(&mut self, product: &Product<'_>) {
        let call = product.call();
        if call.is_empty() {
            return;
        }
        let accumulates = product.accumulates();
        let a = self.slot(product.a, Access::Read);
        let b = self.slot(product.b, Access::Read);
        let out = self.slot(product.out, if accumulates { Access::Update } else { Access::Write });
        let added = product.added.map_or(out, |added| self.slot(added, Access::Read));
        self.steps.push(Step::Product { call, slots: [a, b, added, out] });
    }

    /// Sets all bits of the contiguous `tensor` to zero.
    ///
    /// # Panics
    /// When it is not contiguous.
    #[track_caller]
    pub fn zero(&mut self, tensor: &CubeTensor) {
        assert!(buffer::is_contiguous(tensor), "not contiguous: {tensor:?}");
        let bytes = tensor.meta.shape().num_elements() * tensor.dtype.size();
        let slot = self.slot(tensor, Access::Write);
        self.steps.push(Step::Zero { slot, bytes });
    }

    /// Copies the contiguous `from` to the contiguous `to` of as many bytes.
    ///
    /// # Panics
    /// When one is not contiguous or they differ in size.
    #[track_caller]
    pub fn copy(&mut self, from: &CubeTensor, to: &CubeTensor) {
        assert!(buffer::is_contiguous(from) && buffer::is_contiguous(to), "a copy between contiguous tensors");
        let bytes = |tensor: &CubeTensor| tensor.meta.shape().num_elements() * tensor.dtype.size();
        assert!(bytes(from) == bytes(to), "a copy of {} bytes to {}", bytes(from), bytes(to));
        let (bytes, from) = (bytes(from), self.slot(from, Access::Read));
        let to = self.slot(to, Access::Write);
        self.steps.push(Step::Copy { from, to, bytes });
    }

    /// Adds a collective, which goes on beside what comes later.
    pub(super) fn collective(&mut self, call: communicator::Call, from: &CubeTensor, to: &CubeTensor) {
        let from = self.slot(from, Access::Read);
        let to = self.slot(to, if call.writes() { Access::Write } else { Access::Read });
        self.steps.push(Step::Collective { call, from, to });
    }

    /// Lets what comes later wait for a collective.
    pub(super) fn wait(&mut self, ticket: &Ticket) {
        self.steps.push(Step::Wait { ticket: ticket.clone() });
    }

    /// Takes over what another piece of work has gathered, behind its own.
    fn append(&mut self, other: Self) {
        let offset = self.buffers.len();
        self.buffers.extend(other.buffers);
        self.steps.extend(other.steps.into_iter().map(|step| step.moved(offset)));
    }

    /// Sends everything to the device thread and returns at once; inside of [`together`] it waits for the others.
    pub fn submit(self) {
        if self.steps.is_empty() {
            return;
        }
        let apart = OPEN.with_borrow_mut(|open| match open {
            Some(open) if open.device == self.device && open.phase == self.phase => {
                open.append(self);
                None
            }
            _ => Some(self),
        });
        if let Some(work) = apart {
            work.send();
        }
    }

    fn send(self) {
        let stream = StreamId::current();
        DeviceHandle::<CudaServer>::new(self.device).submit(move |server| {
            let Err(error) = self.run(server, stream) else { return };
            // Hundreds of pieces may be on their way that need what the first one did not write.
            if FAILURES.fetch_add(1, Ordering::Relaxed) < FAILURES_TOLD {
                tracing::error!("CUDA work failed, what it was to write cannot be read: {error}");
            } else {
                tracing::debug!("CUDA work failed: {error}");
            }
        });
    }

    /// On the device thread.
    fn run(self, server: &mut CudaServer, stream_id: StreamId) -> Result<(), ServerError> {
        let written = self.buffers.iter().filter(|buffer| buffer.written);
        let written: Vec<BufferBinding> = written.map(|buffer| buffer.binding.clone()).collect();
        // A resource orders our stream behind the one that owns the buffer, refuses what failed work
        // never filled, makes the context current and pins the address. It must come before the
        // scope, which claims what it writes.
        let mut resources = Vec::with_capacity(self.buffers.len());
        for buffer in &self.buffers {
            match server.get_resource(buffer.binding.clone(), stream_id) {
                Ok(resource) => resources.push(resource),
                Err(error) => {
                    failed_writing(server, stream_id, written, error.clone());
                    return Err(error);
                }
            }
        }
        let pointers: Vec<sys::CUdeviceptr> = resources.iter().map(|held| held.resource().ptr).collect();
        let device = u32::from(self.device.index_id);
        let (steps, phase) = (self.steps, self.phase);
        let done = ExecuteScope::over(server, stream_id, written).execute(|server| {
            let stream = server.write_streams().resolve(stream_id, std::iter::empty())?.current().sys;
            for step in &steps {
                step.recorded(device, stream, &pointers, phase).map_err(|error| ServerError::Generic {
                    reason: error.to_string(),
                    backtrace: BackTrace::capture(),
                })?;
            }
            Ok(())
        });
        // The last to land of those that use this memory keeps it.
        let last = steps.iter().rev().find_map(|step| match step {
            Step::Collective { call, .. } => Some(&call.ticket),
            _ => None,
        });
        if let Some(ticket) = last {
            ticket.hold(Box::new(resources));
        }
        done.into_result()
    }
}

impl Step {
    /// The same behind so many other buffers.
    fn moved(mut self, offset: usize) -> Self {
        match &mut self {
            Self::Launch { values, .. } => {
                for value in values {
                    match value {
                        Value::Pointer(slot) | Value::Tiles(slot, ..) | Value::Strided(slot, _) => *slot += offset,
                        Value::Bits(_) => {}
                    }
                }
            }
            Self::Product { slots, .. } => slots.iter_mut().for_each(|slot| *slot += offset),
            Self::Zero { slot, .. } => *slot += offset,
            Self::Copy { from, to, .. } | Self::Collective { from, to, .. } => {
                *from += offset;
                *to += offset;
            }
            Self::Wait { .. } => {}
        }
        self
    }

    fn name(&self) -> String {
        match self {
            Self::Launch { kernel, .. } => kernel.entry.to_owned(),
            Self::Product { call, .. } => call.name(),
            Self::Zero { .. } => "zero".to_owned(),
            Self::Copy { .. } => "copy".to_owned(),
            Self::Collective { call, .. } => call.name(),
            Self::Wait { .. } => "wait for a collective".to_owned(),
        }
    }

    fn recorded(
        &self,
        device: u32,
        stream: sys::CUstream,
        pointers: &[sys::CUdeviceptr],
        phase: Option<&'static str>,
    ) -> Result<(), Error> {
        let phase = match (self, phase) {
            (_, None) => return self.run(device, stream, pointers),
            // On a stream of its own, where it takes its times.
            (Self::Collective { call, from, to }, Some(_)) => {
                return call.run(stream, pointers[*from], pointers[*to], true);
            }
            (Self::Wait { .. }, Some(_)) => communicator::EXPOSED,
            (_, Some(phase)) => phase,
        };
        let begin = profile::mark(stream)?;
        self.run(device, stream, pointers)?;
        profile::keep(self.name(), phase, begin, profile::mark(stream)?);
        Ok(())
    }

    fn run(&self, device: u32, stream: sys::CUstream, pointers: &[sys::CUdeviceptr]) -> Result<(), Error> {
        match self {
            Self::Launch { kernel, grid, values } => {
                let function = kernel.load(device)?;
                let mut bits = Vec::with_capacity(values.len());
                let mut maps = Vec::with_capacity(values.len());
                for value in values {
                    let (word, map) = match value {
                        Value::Pointer(slot) => (pointers[*slot], None),
                        Value::Bits(bits) => (*bits, None),
                        Value::Tiles(slot, tiles, dtype) if architecture(device)?.version >= 90 => {
                            (0, Some(Description::Map(tensor_map(pointers[*slot], tiles, *dtype)?)))
                        }
                        Value::Tiles(slot, tiles, _) | Value::Strided(slot, tiles) => {
                            (0, Some(Description::View(view(pointers[*slot], tiles))))
                        }
                    };
                    bits.push(word);
                    maps.push(map);
                }
                let addresses = bits.iter_mut().zip(&mut maps).map(|(bits, map)| match map {
                    Some(Description::Map(map)) => std::ptr::from_mut(map).cast(),
                    Some(Description::View(view)) => std::ptr::from_mut(view).cast(),
                    None => std::ptr::from_mut(bits).cast(),
                });
                let mut addresses: Vec<*mut c_void> = addresses.collect();
                // SAFETY: the arguments were checked against the source, the resources are held by
                // the caller, and memory freed later is reused behind this launch on its stream.
                let launched = unsafe { function.launch(stream, *grid, &mut addresses) };
                launched.map_err(|error| {
                    Error::call(format!("launch of {} with {grid:?}", kernel.entry), format!("{error:?}"))
                })
            }
            Self::Product { call, slots } => call.run(device, stream, slots.map(|slot| pointers[slot])),
            Self::Zero { slot, bytes } => {
                // SAFETY: the buffer holds so many bytes.
                unsafe { cu::memset_d8_async(pointers[*slot], 0, *bytes, stream) }
                    .map_err(|error| Error::call("memset", error))
            }
            Self::Copy { from, to, bytes } => {
                // SAFETY: both buffers hold so many bytes.
                unsafe { cu::memcpy_dtod_async(pointers[*to], pointers[*from], *bytes, stream) }
                    .map_err(|error| Error::call("copy", error))
            }
            Self::Collective { call, from, to } => call.run(stream, pointers[*from], pointers[*to], false),
            Self::Wait { ticket } => ticket.land(stream),
        }
    }
}

/// A tensor as a kernel's parameter describes it.
enum Description {
    Map(sys::CUtensorMap),
    View(View),
}

/// `View` in the sources of kernels, as large as a tensor map, in whose place it may stand.
#[repr(C, align(64))]
struct View {
    values: sys::CUdeviceptr,
    strides: [u64; 4],
    dims: [u32; 5],
    rest: [u32; 17],
}

fn view(pointer: sys::CUdeviceptr, tiles: &Tiles) -> View {
    let mut view = View { values: pointer, strides: [0; 4], dims: [1; 5], rest: [0; 17] };
    for (to, from) in view.strides.iter_mut().zip(&tiles.strides) {
        *to = *from;
    }
    for (to, from) in view.dims.iter_mut().zip(&tiles.dims) {
        *to = u32::try_from(*from).unwrap_or(u32::MAX);
    }
    view
}

/// What the bulk copy engine is told of a tensor.
fn tensor_map(pointer: sys::CUdeviceptr, tiles: &Tiles, dtype: DType) -> Result<sys::CUtensorMap, Error> {
    use sys::CUtensorMapDataType as Element;
    let element = match dtype {
        DType::F32 => Element::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        DType::BF16 => Element::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        DType::F16 => Element::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        other => return Err(Error::call("tensor map", format!("no tiles of {other:?}"))),
    };
    let rank = tiles.dims.len();
    if rank == 0 || rank > 5 || tiles.strides.len() != rank - 1 || tiles.tile.len() != rank {
        return Err(Error::call("tensor map", format!("the ranks differ in {tiles:?}")));
    }
    let swizzle = match tiles.swizzle {
        Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        Swizzle::B32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        Swizzle::B64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        Swizzle::B128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let mut map = MaybeUninit::uninit();
    // SAFETY: the lists have the lengths that the rank says, and the map is written on success.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            map.as_mut_ptr(),
            element,
            rank as u32,
            pointer as *mut c_void,
            tiles.dims.as_ptr(),
            tiles.strides.as_ptr(),
            tiles.tile.as_ptr(),
            [1u32; 5].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        .result()
        .map_err(|error| Error::call(format!("tensor map of {tiles:?}"), error))?;
        Ok(map.assume_init())
    }
}
