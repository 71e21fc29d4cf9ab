//! Questions to the driver.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use burn_cubecl::tensor::CubeTensor;
use cubecl_common::device_handle::DeviceHandle;
use cudarc::driver::result as cu;
use cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::kernel::set_context;
use super::work::CudaServer;
use super::{Architecture, Error, libraries};

/// What the driver says of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Such as `NVIDIA H200`.
    pub name: String,
    /// Compute capability.
    pub architecture: Architecture,
    /// Bytes of its memory.
    pub memory: u64,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that one block may ask for.
    pub shared_per_block: u32,
    /// Bytes of the second-level cache.
    pub cache: u64,
}

impl DeviceFacts {
    /// Whether it has Hopper's own instructions: wgmma, and the bulk copies that feed it.
    pub fn is_hopper(&self) -> bool {
        self.architecture.version == 90
    }
}

impl DeviceFacts {
    /// Floating-point operations per second of dense bf16 products with float32 sums at the best clock, as the
    /// maker's data sheets say; of the GPUs that are known here.
    pub fn peak_bf16_flops(&self) -> Option<f64> {
        const TERA: [(&str, f64); 12] = [
            ("H100 PCIe", 756.0),
            ("H100 NVL", 835.0),
            ("H100", 989.4),
            ("H200", 989.4),
            ("GH200", 989.4),
            ("B200", 2250.0),
            ("A100", 312.0),
            ("A800", 312.0),
            ("H800", 989.4),
            ("L40S", 362.0),
            ("RTX 4090", 165.2),
            ("RTX 3090", 71.0),
        ];
        TERA.iter().find(|(name, _)| self.name.contains(name)).map(|(_, tera)| tera * 1e12)
    }
}

impl DeviceFacts {
    /// Bytes per second between it and its memory at best, as the maker's data sheets say; of the GPUs that are known
    /// here.
    pub fn bandwidth(&self) -> Option<f64> {
        const TERA: [(&str, f64); 10] = [
            ("H100 PCIe", 2.0),
            ("H100 NVL", 3.9),
            ("H100", 3.35),
            ("H200", 4.8),
            ("B200", 8.0),
            ("A100", 2.0),
            ("A800", 2.0),
            ("L40S", 0.864),
            ("RTX 4090", 1.008),
            ("RTX 3090", 0.936),
        ];
        TERA.iter().find(|(name, _)| self.name.contains(name)).map(|(_, tera)| tera * 1e12)
    }
}

/// Bytes of a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Nobody's.
    pub free: u64,
    /// All.
    pub total: u64,
}

/// What the driver says of the memory of the device of `near`.
///
/// # Errors
/// When it refuses.
pub fn memory(near: &CubeTensor) -> Result<Memory, Error> {
    let device = near.client.service_id().device;
    let index = u32::from(device.index_id);
    let told = DeviceHandle::<CudaServer>::new(device).submit_blocking(move |_server| {
        set_context(index)?;
        let (free, total) = cu::mem_get_info().map_err(|error| Error::call("memory of the device", error))?;
        Ok(Memory { free: free as u64, total: total as u64 })
    });
    told.unwrap_or_else(|error| Err(Error::call("device thread", format!("{error:?}"))))
}

/// What the GPU behind `tensor` is; asked of the driver once.
///
/// # Panics
/// When the driver does not know the device of a tensor that is on it.
pub fn facts_of(tensor: &CubeTensor) -> DeviceFacts {
    static KNOWN: LazyLock<Mutex<HashMap<u32, DeviceFacts>>> = LazyLock::new(Mutex::default);
    let index = u32::from(tensor.client.service_id().device.index_id);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let facts = known.entry(index).or_insert_with(|| match device_facts(index) {
        Ok(facts) => facts,
        Err(error) => panic!("a device in use: {error}"),
    });
    facts.clone()
}

/// Number of CUDA devices that the driver shows.
///
/// # Errors
/// When the driver refuses. Without its library this panics: ask [`libraries`] before.
pub fn device_count() -> Result<usize, Error> {
    let count = cu::init().and_then(|()| cu::device::get_count());
    count.map(|count| count.max(0) as usize).map_err(|error| Error::call("the CUDA driver", error))
}

fn attribute(index: u32, attribute: Attribute) -> Result<u32, Error> {
    // The bindings panic at the first call into a library that is not there.
    if let Err(advice) = &libraries::find().driver.found {
        return Err(Error::Missing(advice.clone()));
    }
    let failed = |error| Error::call(format!("device {index}, {attribute:?}"), error);
    cu::init().map_err(failed)?;
    let device = cu::device::get(index as i32).map_err(failed)?;
    // SAFETY: a device handle that the driver just gave.
    let value = unsafe { cu::device::get_attribute(device, attribute) }.map_err(failed)?;
    Ok(value.max(0) as u32)
}

/// The architecture of the GPU of this index.
///
/// # Errors
/// When a library lacks or the driver refuses.
pub fn architecture(index: u32) -> Result<Architecture, Error> {
    let major = attribute(index, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(index, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(Architecture::new(major, minor))
}

/// What the GPU of this index is.
///
/// # Errors
/// When a library lacks or the driver refuses.
pub fn device_facts(index: u32) -> Result<DeviceFacts, Error> {
    let architecture = architecture(index)?;
    let failed = |error| Error::call(format!("device {index}"), error);
    let device = cu::device::get(index as i32).map_err(failed)?;
    Ok(DeviceFacts {
        name: cu::device::get_name(device).map_err(failed)?,
        architecture,
        // SAFETY: a device handle that the driver just gave.
        memory: unsafe { cu::device::total_mem(device) }.map_err(failed)? as u64,
        multiprocessors: attribute(index, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_per_block: attribute(index, Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        cache: u64::from(attribute(index, Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
    })
}
