//! Kernels: named by source, entry and macros, loaded once for every device.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use burn_cubecl::CubeDevice;
use cubecl_common::device_handle::DeviceHandle;
use cudarc::driver::result as cu;
use cudarc::driver::sys;

use super::compile::{self, Architecture, Defines, Source};
use super::signature::{self, Parameter};
use super::work::CudaServer;
use super::{Error, architecture};

/// One `__global__` function of a source, specialised by macros.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    pub(super) source: &'static Source,
    pub(super) entry: &'static str,
    defines: Defines,
}

impl Kernel {
    /// The function `entry` of `source`.
    pub const fn new(source: &'static Source, entry: &'static str) -> Self {
        Self { source, entry, defines: Vec::new() }
    }

    /// With the macro `name` defined as `value`.
    pub fn define(mut self, name: &'static str, value: impl Into<i64>) -> Self {
        self.defines.push((name, value.into()));
        self
    }

    /// Compiles it for `architecture`, whatever was kept on disk. Needs no GPU.
    ///
    /// # Errors
    /// [`Error::Missing`] without NVRTC, [`Error::Compile`] with the compiler's log.
    pub fn compile(&self, architecture: Architecture) -> Result<Vec<u8>, Error> {
        compile::anew(self.source, &self.defines, architecture)
    }

    /// Whether arguments can be checked for every kernel of its source.
    ///
    /// # Errors
    /// The parameter that is not understood.
    pub fn check_source(&self) -> Result<(), String> {
        let entries = signature::entries(self.source.text);
        entries.iter().try_for_each(|entry| signature::parameters(self.source.text, entry).map(|_| ()))
    }

    /// File and function, for messages.
    pub fn name(&self) -> String {
        format!("{}: {}", self.source.name, self.entry)
    }

    /// The parameters that its source declares.
    ///
    /// # Panics
    /// When the source has no such kernel or one of its types has no counterpart here.
    #[track_caller]
    pub(super) fn parameters(&self) -> Arc<[Parameter]> {
        type Known = HashMap<(&'static str, &'static str), Arc<[Parameter]>>;
        static KNOWN: LazyLock<Mutex<Known>> = LazyLock::new(Mutex::default);
        let mut known = lock(&KNOWN);
        let key = (self.source.name, self.entry);
        known
            .entry(key)
            .or_insert_with(|| match signature::parameters(self.source.text, self.entry) {
                Ok(parameters) => parameters.into(),
                Err(reason) => panic!("{}: {reason}", self.source.name),
            })
            .clone()
    }

    /// Compiles for the GPU `device` and loads, unless that was done. On the device thread.
    pub(super) fn load(&self, device: u32) -> Result<Function, Error> {
        static FUNCTIONS: LazyLock<Mutex<HashMap<(u32, Kernel), Function>>> = LazyLock::new(Mutex::default);
        let key = (device, self.clone());
        if let Some(function) = lock(&FUNCTIONS).get(&key) {
            return Ok(*function);
        }
        let module = Module::load(self.source, &self.defines, device)?;
        let name = CString::new(self.entry).map_err(|error| Error::call(self.entry, error))?;
        // SAFETY: the module is loaded and stays.
        let function = unsafe { cu::module::get_function(module.0, name) };
        let function =
            function.map_err(|error| Error::call(format!("{} of {}", self.entry, self.source.name), error))?;
        let function = Function(function);
        lock(&FUNCTIONS).insert(key, function);
        Ok(function)
    }
}

/// What a panic elsewhere left is as good as before: every entry is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Compiles and loads `kernels` now, so that no step waits for the compiler and every error shows
/// before work begins.
///
/// # Errors
/// The first that cannot be compiled or loaded.
///
/// # Panics
/// When `device` is not a CUDA device.
pub fn warm_up(device: &CubeDevice, kernels: Vec<Kernel>) -> Result<(), Error> {
    let service = device.client().service_id().device;
    let index = u32::from(service.index_id);
    let loaded = DeviceHandle::<CudaServer>::new(service).submit_blocking(move |_server| {
        set_context(index)?;
        kernels.iter().try_for_each(|kernel| kernel.load(index).map(|_| ()))
    });
    loaded.unwrap_or_else(|error| Err(Error::call("device thread", format!("{error:?}"))))
}

/// Makes the device's own context, which CubeCL uses, current on this thread.
pub(super) fn set_context(index: u32) -> Result<(), Error> {
    let failed = |error| Error::call(format!("context of device {index}"), error);
    let device = cu::device::get(index as i32).map_err(failed)?;
    // SAFETY: the primary context lives as long as the process keeps it, which this call sees to.
    unsafe {
        let context = cu::primary_ctx::retain(device).map_err(failed)?;
        cu::ctx::set_current(context).map_err(failed)
    }
}

#[derive(Clone, Copy)]
struct Module(sys::CUmodule);
// SAFETY: an id of the driver, used with its context current.
unsafe impl Send for Module {}

impl Module {
    fn load(source: &'static Source, defines: &Defines, device: u32) -> Result<Self, Error> {
        type Loaded = HashMap<(u32, &'static str, Defines), Module>;
        static MODULES: LazyLock<Mutex<Loaded>> = LazyLock::new(Mutex::default);
        let key = (device, source.name, defines.clone());
        if let Some(module) = lock(&MODULES).get(&key) {
            return Ok(*module);
        }
        let cubin = compile::cached(source, defines, architecture(device)?)?;
        // SAFETY: a whole cubin, which the driver copies; the context is current on this thread.
        let module = unsafe { cu::module::load_data(cubin.as_ptr().cast::<c_void>()) };
        let module = Self(module.map_err(|error| Error::call(format!("loading {}", source.name), error))?);
        lock(&MODULES).insert(key, module);
        Ok(module)
    }
}

/// A loaded kernel.
#[derive(Clone, Copy)]
pub(super) struct Function(sys::CUfunction);
// SAFETY: an id of the driver, used with its context current.
unsafe impl Send for Function {}

/// Blocks, threads and shared memory of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    blocks: [u32; 3],
    threads: [u32; 3],
    cluster: [u32; 3],
    shared: u32,
}

impl Grid {
    /// `blocks` blocks of `threads` threads, both in one dimension.
    pub const fn new(blocks: u32, threads: u32) -> Self {
        Self { blocks: [blocks, 1, 1], threads: [threads, 1, 1], cluster: [1; 3], shared: 0 }
    }

    /// With the blocks in three dimensions.
    pub const fn blocks(self, blocks: [u32; 3]) -> Self {
        Self { blocks, ..self }
    }

    /// With clusters of blocks (compute capability 9.0 on); their sizes divide the blocks.
    pub const fn cluster(self, cluster: [u32; 3]) -> Self {
        Self { cluster, ..self }
    }

    /// With `bytes` of dynamic shared memory; above 48 KiB the kernel is allowed them.
    pub const fn shared(self, bytes: u32) -> Self {
        Self { shared: bytes, ..self }
    }

    /// Whether there is nothing to launch.
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.contains(&0)
    }
}

impl Function {
    /// Puts a launch on `stream`.
    ///
    /// # Safety
    /// `arguments` address values of the kernel's parameter types, and the pointers among them
    /// memory that lives until the launch has run.
    pub(super) unsafe fn launch(
        self,
        stream: sys::CUstream,
        grid: Grid,
        arguments: &mut [*mut c_void],
    ) -> Result<(), sys::CUresult> {
        let check = |result: sys::CUresult| match result {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            error => Err(error),
        };
        // SAFETY: as this function asks; the structures live through the calls.
        unsafe {
            if grid.shared > 48 << 10 {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                check(sys::cuFuncSetAttribute(self.0, attribute, grid.shared as i32))?;
            }
            let mut attributes: [sys::CUlaunchAttribute; 1] = std::mem::zeroed();
            attributes[0].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            let [x, y, z] = grid.cluster;
            let cluster = &mut attributes[0].value.clusterDim;
            (cluster.x, cluster.y, cluster.z) = (x, y, z);
            let config = sys::CUlaunchConfig {
                gridDimX: grid.blocks[0],
                gridDimY: grid.blocks[1],
                gridDimZ: grid.blocks[2],
                blockDimX: grid.threads[0],
                blockDimY: grid.threads[1],
                blockDimZ: grid.threads[2],
                sharedMemBytes: grid.shared,
                hStream: stream,
                attrs: attributes.as_mut_ptr(),
                numAttrs: u32::from(grid.cluster != [1; 3]),
            };
            check(sys::cuLaunchKernelEx(&config, self.0, arguments.as_mut_ptr(), std::ptr::null_mut()))
        }
    }
}
