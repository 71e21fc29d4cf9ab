//! The choice among cuBLASLt's algorithms for a product: the fastest of those that give the very bits of its own first
//! choice.
//!
//! The library orders its algorithms by a model of the GPU; trying them is worth several percent of a training step.
//! Algorithms that add in another order would make results depend on a measurement. So each candidate's result is compared
//! with the first's, on the operands of the first call, and only equal ones are timed. An algorithm that adds in another
//! order would have to give the same bits in each of the millions of sums of that call to be taken for equal.

use std::ffi::c_void;

use cudarc::cublaslt::sys::cublasLtMatmulAlgo_t as Algorithm;
use cudarc::driver::result as cu;
use cudarc::driver::result::event;
use cudarc::driver::sys::{CUdeviceptr, CUevent_flags, CUstream};

use super::{Error, Grid, Kernel, Source};

pub(crate) static SOURCE: Source = Source { name: "compare.cu", text: include_str!("../kernels/compare.cu") };

/// Products of fewer operations than this are not worth a measurement.
pub(super) const LEAST_OPERATIONS: f64 = 2e9;
/// A candidate has to be faster than the first by this factor to be taken.
const GAIN: f64 = 0.985;
/// Calls that are timed together, and how often.
const CALLS: usize = 2;
const ROUNDS: usize = 3;

/// Memory outside of CubeCL's pools, for the time of a measurement.
struct Scratch(CUdeviceptr);

impl Scratch {
    fn new(bytes: usize, stream: CUstream) -> Result<Self, Error> {
        // SAFETY: the context is current.
        let memory = unsafe { cu::malloc_sync(bytes) }.map_err(|error| Error::call("scratch memory", error))?;
        let scratch = Self(memory);
        // SAFETY: it holds so many bytes.
        unsafe { cu::memset_d8_async(memory, 0, bytes, stream) }.map_err(|error| Error::call("memset", error))?;
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: allocated above; everything that used it was waited for.
        let _ = unsafe { cu::free_sync(self.0) };
    }
}

/// The best of `algorithms`, the first of which is the library's own choice. `call` puts the product on the stream with an
/// algorithm and a place for the result of `bytes` bytes.
///
/// # Errors
/// When there is not memory enough for two results, or the driver fails.
pub(super) fn best(
    device: u32,
    stream: CUstream,
    bytes: usize,
    algorithms: &[Algorithm],
    call: impl Fn(&Algorithm, CUdeviceptr) -> Result<(), Error>,
) -> Result<usize, Error> {
    let (first, other) = (Scratch::new(bytes, stream)?, Scratch::new(bytes, stream)?);
    let counts = Scratch::new(8, stream)?;
    let compare = Kernel::new(&SOURCE, "compare").load(device)?;
    let synchronize = || {
        // SAFETY: a stream of the current context.
        unsafe { cu::stream::synchronize(stream) }.map_err(|error| Error::call("the device", error))
    };
    call(&algorithms[0], first.0)?;
    let mut equal = vec![0];
    for (index, algorithm) in algorithms.iter().enumerate().skip(1) {
        // A product that adds to what is there has to find what the first found.
        // SAFETY: it holds so many bytes.
        unsafe { cu::memset_d8_async(other.0, 0, bytes, stream) }.map_err(|error| Error::call("memset", error))?;
        if call(algorithm, other.0).is_err() {
            continue;
        }
        let mut words = (bytes / 4) as u64;
        let (mut a, mut b, mut to) = (first.0, other.0, counts.0);
        let mut arguments: [*mut c_void; 4] = [
            std::ptr::from_mut(&mut a).cast(),
            std::ptr::from_mut(&mut b).cast(),
            std::ptr::from_mut(&mut words).cast(),
            std::ptr::from_mut(&mut to).cast(),
        ];
        let mut found = [0u32; 2];
        // SAFETY: both results hold so many words, the counts two; the arguments live until the launch returns.
        unsafe {
            cu::memset_d8_async(counts.0, 0, 8, stream).map_err(|error| Error::call("memset", error))?;
            compare
                .launch(stream, Grid::new(1056, 256), &mut arguments)
                .map_err(|error| Error::call("launch of compare", format!("{error:?}")))?;
            synchronize()?;
            cu::memcpy_dtoh_sync(&mut found, counts.0).map_err(|error| Error::call("reading counts", error))?;
        }
        // Nothing but zeros would be equal whatever the order of additions.
        if found[0] == 0 && found[1] > 0 {
            equal.push(index);
        }
    }
    let mut times = vec![f64::INFINITY; equal.len()];
    for _ in 0..ROUNDS {
        for (time, &index) in times.iter_mut().zip(&equal) {
            let failed = |error| Error::call("an event", error);
            let make = || event::create(CUevent_flags::CU_EVENT_DEFAULT).map_err(failed);
            let (begin, end) = (make()?, make()?);
            // SAFETY: events that were just made, on a stream of the current context.
            unsafe {
                event::record(begin, stream).map_err(failed)?;
                (0..CALLS).try_for_each(|_| call(&algorithms[index], other.0))?;
                event::record(end, stream).map_err(failed)?;
                event::synchronize(end).map_err(failed)?;
                *time = time.min(f64::from(event::elapsed(begin, end).map_err(failed)?));
                event::destroy(begin).map_err(failed)?;
                event::destroy(end).map_err(failed)?;
            }
        }
    }
    synchronize()?;
    let fastest = (0..equal.len()).min_by(|&a, &b| times[a].total_cmp(&times[b])).unwrap_or(0);
    Ok(if times[fastest] < GAIN * times[0] { equal[fastest] } else { 0 })
}
