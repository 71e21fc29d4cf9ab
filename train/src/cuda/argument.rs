//! Arguments of kernels, typed: [`super::Work::launch`] checks them against the parameters that the
//! kernel's source declares.

use burn_cubecl::tensor::CubeTensor;

use super::buffer;
use super::signature::{Parameter, Scalar};

/// What a kernel does with a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    /// Reads what was there and writes it anew.
    Update,
}

/// One argument of a kernel.
#[derive(Debug)]
pub struct Argument<'a>(pub(super) Kind<'a>);

#[derive(Debug)]
pub(super) enum Kind<'a> {
    /// The address of the first value of a tensor.
    Pointer(&'a CubeTensor, Access),
    Tiles(&'a CubeTensor, Tiles, Access),
    Strided(&'a CubeTensor, Tiles, Access),
    /// No address, where a kernel takes one or none.
    Absent,
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
}

/// Bytes that the address of every tensor given to a kernel is a multiple of: one wide access.
const ALIGNMENT: u64 = 16;

#[track_caller]
fn pointer(tensor: &CubeTensor, access: Access) -> Argument<'_> {
    assert!(
        buffer::aligned_to(tensor, ALIGNMENT),
        "a tensor given to a kernel begins at a multiple of {ALIGNMENT} bytes: {tensor:?}"
    );
    Argument(Kind::Pointer(tensor, access))
}

/// A contiguous tensor that the kernel reads.
///
/// # Panics
/// As [`view`], and when the tensor is not contiguous.
#[track_caller]
pub fn read(tensor: &CubeTensor) -> Argument<'_> {
    assert!(buffer::is_contiguous(tensor), "not contiguous: {tensor:?}");
    view(tensor)
}

/// A tensor that the kernel reads by strides that it is told.
///
/// # Panics
/// When the tensor does not begin at a multiple of 16 bytes.
#[track_caller]
pub fn view(tensor: &CubeTensor) -> Argument<'_> {
    pointer(tensor, Access::Read)
}

/// A tensor that the kernel writes, contiguous or by strides that it is told.
///
/// # Panics
/// When the tensor does not begin at a multiple of 16 bytes.
#[track_caller]
pub fn write(tensor: &CubeTensor) -> Argument<'_> {
    pointer(tensor, Access::Write)
}

/// A tensor that the kernel reads and writes.
///
/// # Panics
/// When the tensor does not begin at a multiple of 16 bytes.
#[track_caller]
pub fn update(tensor: &CubeTensor) -> Argument<'_> {
    pointer(tensor, Access::Update)
}

/// An `unsigned int`.
pub fn u32(value: u32) -> Argument<'static> {
    Argument(Kind::U32(value))
}

/// An `int`.
pub fn i32(value: i32) -> Argument<'static> {
    Argument(Kind::I32(value))
}

/// An `unsigned long long`.
pub fn u64(value: u64) -> Argument<'static> {
    Argument(Kind::U64(value))
}

/// A `long long`.
pub fn i64(value: i64) -> Argument<'static> {
    Argument(Kind::I64(value))
}

/// A `float`.
pub fn f32(value: f32) -> Argument<'static> {
    Argument(Kind::F32(value))
}

/// No tensor, for a pointer that may be null.
pub fn absent<'a>() -> Argument<'a> {
    Argument(Kind::Absent)
}

/// A tensor that the kernel reads in tiles by the bulk copy engine (compute capability 9.0 on): the
/// parameter is `const __grid_constant__ TensorMap`. On older GPUs the kernel finds what
/// [`strided`] gives in its place.
pub fn tiles(tensor: &CubeTensor, tiles: Tiles) -> Argument<'_> {
    Argument(Kind::Tiles(tensor, tiles, Access::Read))
}

/// [`tiles`] that the kernel writes.
pub fn tiles_out(tensor: &CubeTensor, tiles: Tiles) -> Argument<'_> {
    Argument(Kind::Tiles(tensor, tiles, Access::Write))
}

/// A tensor that the kernel reads by its address, strides in bytes and dimensions: the parameter is
/// `const __grid_constant__ View` with `struct View { char* values; long long strides[4]; unsigned
/// dims[5]; }`. The address may be any.
pub fn strided(tensor: &CubeTensor, tiles: Tiles) -> Argument<'_> {
    Argument(Kind::Strided(tensor, tiles, Access::Read))
}

/// [`strided`] that the kernel writes.
pub fn strided_out(tensor: &CubeTensor, tiles: Tiles) -> Argument<'_> {
    Argument(Kind::Strided(tensor, tiles, Access::Write))
}

/// How the bulk copy engine cuts a tensor; every list begins with the innermost dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Values in every dimension, one to five.
    pub dims: Vec<u64>,
    /// Bytes from one index to the next, of all dimensions but the innermost.
    pub strides: Vec<u64>,
    /// Values of a tile in every dimension.
    pub tile: Vec<u32>,
    /// How 16-byte pieces are spread over the banks of shared memory.
    pub swizzle: Swizzle,
}

/// Span of the permutation of 16-byte pieces in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Rows as they are.
    None,
    /// 32 bytes.
    B32,
    /// 64 bytes.
    B64,
    /// 128 bytes.
    B128,
}

impl Kind<'_> {
    /// Whether this can be given for `parameter`.
    pub(super) fn fits(&self, parameter: &Parameter) -> bool {
        let scalar = match (self, parameter) {
            (Self::Pointer(tensor, access), Parameter::Pointer { element, read_only }) => {
                return element.is_none_or(|element| element == tensor.dtype)
                    && *read_only == (*access == Access::Read);
            }
            (Self::Tiles(..), Parameter::Tiles) | (Self::Strided(..), Parameter::Strided) => return true,
            (Self::Absent, Parameter::Pointer { .. }) => return true,
            (Self::U32(_), _) => Scalar::U32,
            (Self::I32(_), _) => Scalar::I32,
            (Self::U64(_), _) => Scalar::U64,
            (Self::I64(_), _) => Scalar::I64,
            (Self::F32(_), _) => Scalar::F32,
            _ => return false,
        };
        *parameter == Parameter::Scalar(scalar)
    }
}
