//! Tensors as buffers: memory from Burn's allocator, views at an offset, and the way from a tensor
//! to what is behind it.

use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::zspace::metadata::Metadata;
use cubecl::zspace::strides;
use half::bf16;

use super::Error;

/// The buffer behind a tensor that is on a CUDA device and on no tape.
///
/// # Panics
/// When it is elsewhere.
pub fn of<const D: usize>(tensor: Tensor<D>) -> CubeTensor {
    match tensor.try_into_primitive::<CubeBackend>() {
        Ok(buffer) => buffer,
        Err(error) => panic!("the tensor is not a plain one of a CUDA device: {error:?}"),
    }
}

/// The tensor over a buffer.
pub fn to_tensor<const D: usize>(buffer: CubeTensor) -> Tensor<D> {
    Tensor::from_primitive::<CubeBackend>(buffer)
}

/// Uninitialised memory on the device of `near`, contiguous.
pub fn empty<const D: usize>(near: &CubeTensor, shape: [usize; D], dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(near.client.clone(), near.device.clone(), Shape::new(shape), dtype)
}

/// Like [`empty`], for what lives as long as the engine: an allocation of exactly its size. Others lie in pages as large as the
/// largest of them, which what is kept would fill in part, and hold.
pub fn lasting<const D: usize>(near: &CubeTensor, shape: [usize; D], dtype: DType) -> CubeTensor {
    near.client.memory_persistent_allocation((), |()| empty(near, shape, dtype))
}

/// Bytes of a tensor's values.
pub fn bytes(tensor: &CubeTensor) -> u64 {
    (tensor.meta.num_elements() * tensor.dtype.size()) as u64
}

/// Uninitialised memory of the shape and type of `like`, contiguous.
pub fn empty_like(like: &CubeTensor) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), like.meta.shape().clone(), like.dtype)
}

/// 32-bit numbers on `device`, as unsigned ones for kernels.
pub fn upload(device: &CubeDevice, values: &[u32]) -> CubeTensor {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
    let client = device.client();
    let memory = client.create_from_slice(&bytes);
    CubeTensor::new_contiguous(client, device.clone(), Shape::new([values.len()]), memory, DType::U32)
}

/// Float32 numbers on `device`.
pub fn upload_floats(device: &CubeDevice, values: &[f32]) -> CubeTensor {
    let words: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
    CubeTensor { dtype: DType::F32, ..upload(device, &words) }
}

/// Float32 numbers on `device`, rounded to bf16.
pub fn upload_bf16(device: &CubeDevice, values: &[f32]) -> CubeTensor {
    let bytes: Vec<u8> = values.iter().flat_map(|value| bf16::from_f32(*value).to_ne_bytes()).collect();
    let client = device.client();
    let memory = client.create_from_slice(&bytes);
    CubeTensor::new_contiguous(client, device.clone(), Shape::new([values.len()]), memory, DType::BF16)
}

/// The words of a contiguous buffer of 32-bit numbers. Waits for the device.
///
/// # Errors
/// When work that was to write them has failed.
pub fn download(buffer: &CubeTensor) -> Result<Vec<u32>, Error> {
    assert!(buffer.dtype.size() == 4 && is_contiguous(buffer), "no 32-bit numbers: {buffer:?}");
    let read = buffer.client.read_one(buffer.handle.clone());
    let bytes = read.map_err(|error| Error::call("reading a buffer", error))?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word)).collect())
}

/// The values of a contiguous buffer in float32 or bf16. Waits for the device.
///
/// # Errors
/// When work that was to write them has failed.
pub fn download_floats(buffer: &CubeTensor) -> Result<Vec<f32>, Error> {
    if buffer.dtype != DType::BF16 {
        assert!(buffer.dtype == DType::F32, "no floats: {buffer:?}");
        return Ok(download(buffer)?.into_iter().map(f32::from_bits).collect());
    }
    assert!(is_contiguous(buffer), "not contiguous: {buffer:?}");
    let read = buffer.client.read_one(buffer.handle.clone());
    let bytes = read.map_err(|error| Error::call("reading a buffer", error))?;
    Ok(bytes.as_chunks::<2>().0.iter().map(|value| bf16::from_ne_bytes(*value).to_f32()).collect())
}

/// Values `offset..` of the contiguous `flat` in the given shape, without a copy.
///
/// # Panics
/// When they are more than `flat` holds.
pub fn flat_view<const D: usize>(flat: &CubeTensor, offset: usize, shape: [usize; D]) -> CubeTensor {
    assert!(is_contiguous(flat), "not contiguous: {flat:?}");
    let width = flat.dtype.size();
    let shape = Shape::new(shape);
    let end = offset + shape.num_elements();
    let held = flat.meta.shape().num_elements();
    assert!(end <= held, "values {offset}..{end} of {held}");
    let tail = flat.handle.size_in_used() - (end * width) as u64;
    let memory = flat.handle.clone().offset_start((offset * width) as u64).offset_end(tail);
    CubeTensor::new_contiguous(flat.client.clone(), flat.device.clone(), shape, memory, flat.dtype)
}

/// Rows `begin..begin + count` of a matrix, without a copy.
///
/// # Panics
/// When it has fewer.
pub fn row_range(matrix: &CubeTensor, begin: usize, count: usize) -> CubeTensor {
    let ([held, width], stride) = rows(matrix);
    assert!(begin + count <= held, "rows {begin}..{} of {held}", begin + count);
    part(matrix, begin * stride, [count, width], stride)
}

/// Columns `begin..begin + count` of a matrix, without a copy.
///
/// # Panics
/// When it has fewer.
pub fn columns(matrix: &CubeTensor, begin: usize, count: usize) -> CubeTensor {
    let ([held, width], stride) = rows(matrix);
    assert!(begin + count <= width, "columns {begin}..{} of {width}", begin + count);
    part(matrix, begin, [held, count], stride)
}

/// A matrix of rows `stride` values apart, from value `begin` of `matrix` on.
fn part(matrix: &CubeTensor, begin: usize, shape: [usize; 2], stride: usize) -> CubeTensor {
    let begin = (begin * matrix.dtype.size()) as u64;
    let mut part = matrix.clone();
    part.handle = part.handle.offset_start(begin);
    *part.meta = Metadata::new(Shape::new(shape), strides![stride, 1]);
    part
}

/// The tensor itself where its values lie one after the other, else a copy.
pub fn contiguous(tensor: CubeTensor) -> CubeTensor {
    into_contiguous(tensor)
}

/// Whether the values lie one after the other in row-major order.
pub fn is_contiguous(tensor: &CubeTensor) -> bool {
    let mut expected = 1;
    let dims = tensor.meta.shape().iter().zip(tensor.meta.strides().iter()).rev();
    dims.into_iter().all(|(&size, &stride)| {
        let fits = size == 1 || stride == expected;
        expected *= size;
        fits
    })
}

/// Whether the first value is at a multiple of `bytes`, a power of two up to 256: allocations begin
/// at multiples of that.
pub fn aligned_to(tensor: &CubeTensor, bytes: u64) -> bool {
    tensor.handle.offset_start.unwrap_or(0).is_multiple_of(bytes)
}

/// A matrix whose rows lie in one piece each and begin where kernels may read them: itself where it
/// is so, else a copy.
pub fn in_rows(matrix: CubeTensor) -> CubeTensor {
    let wide = (16 / matrix.dtype.size()).max(1);
    let strides = matrix.meta.strides();
    let in_place = strides.len() == 2 && strides[1] == 1 && strides[0].is_multiple_of(wide) && aligned_to(&matrix, 16);
    if in_place { matrix } else { into_contiguous(matrix) }
}

/// `[rows, columns]` of a matrix and the values from one row to the next; a row lies in one piece.
///
/// # Panics
/// When the tensor is no matrix or the values of a row are apart.
#[track_caller]
pub fn rows(tensor: &CubeTensor) -> ([usize; 2], usize) {
    let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
    assert!(shape.num_dims() == 2 && (strides[1] == 1 || shape[1] == 1), "not rows of a matrix: {tensor:?}");
    // The stride of a single row may be any number.
    let stride = if shape[0] == 1 { strides[0].max(shape[1]) } else { strides[0] };
    ([shape[0], shape[1]], stride)
}
