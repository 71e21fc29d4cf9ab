//! Our own CUDA work on Burn's tensors: kernels compiled at run time, matrix products by cuBLASLt, collectives by NCCL.
//!
//! The only place that calls the driver. [`Work`] gathers kernel launches and products on the
//! caller's thread and sends them to the device thread in one piece; they run on the stream, on the
//! memory and in the order of Burn's own operations. Nothing waits for the GPU. When something
//! fails, it is logged and the tensors that were to be written carry the failure: reading them is
//! an error, here and in everything computed from them.
//!
//! [`Kernel`] names one `__global__` function of an embedded CUDA C++ [`Source`]. It is compiled by
//! NVRTC for the GPU at hand at its first use, and its machine code is kept on disk; arguments are
//! checked against the parameters its source declares. [`libraries`] finds what all of this needs.

mod argument;
mod buffer;
mod communicator;
mod compile;
mod driver;
mod kernel;
pub mod libraries;
mod product;
pub mod profile;
mod signature;
mod tune;
mod work;

pub use argument::{
    Argument, Swizzle, Tiles, absent, f32, i32, i64, read, strided, strided_out, tiles, tiles_out, u32, u64, update,
    view, write,
};
pub use buffer::{
    aligned_to, bytes, columns, contiguous, download, download_floats, empty, empty_like, flat_view, in_rows,
    is_contiguous, lasting, of, row_range, rows, to_tensor, upload, upload_bf16, upload_floats,
};
pub use communicator::{COMMUNICATION, Collective, Communicator, EXPOSED, ID_BYTES, Ticket, Unfinished, UniqueId};
pub use compile::{Architecture, Source};
pub use driver::{DeviceFacts, Memory, architecture, device_count, device_facts, facts_of, memory};
pub use kernel::{Grid, Kernel, warm_up};
pub use product::Product;
pub(crate) use tune::SOURCE as COMPARE;
pub use work::{Work, flush, give_all_back, give_back, together};

/// Why CUDA work cannot be done.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A library or header that is not there, with what to do about it.
    #[error("{0}")]
    Missing(String),
    /// NVRTC refused a source.
    #[error("{source_name} for {architecture}: {log}")]
    Compile {
        /// The file of the kernel.
        source_name: &'static str,
        /// The GPU it was compiled for.
        architecture: String,
        /// What the compiler said.
        log: String,
    },
    /// A call into the driver or a library failed.
    #[error("{call}: {reason}")]
    Call {
        /// What was asked.
        call: String,
        /// What came back.
        reason: String,
    },
}

impl Error {
    fn call(call: impl Into<String>, reason: impl ToString) -> Self {
        Self::Call { call: call.into(), reason: reason.to_string() }
    }
}
