//! Weights of operations, and where their gradients go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;

use crate::cuda;

/// A matrix that an operation is made with. Its gradient comes out of the tape like any other, or is
/// added to a sum in place.
#[derive(Clone, Debug)]
pub struct Weight {
    pub(crate) value: Tensor<2>,
    pub(crate) sum: Option<GradientSum>,
}

impl From<Tensor<2>> for Weight {
    fn from(value: Tensor<2>) -> Self {
        Self { value, sum: None }
    }
}

impl Weight {
    /// A weight on a CUDA device, in bf16, whose gradient is added to `sum` by the backward of every
    /// operation that it is given to; the tape gives none. The value is a leaf of the tape.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn with_sum(value: Tensor<2>, sum: GradientSum) -> Self {
        let shape: Vec<usize> = sum.buffer.meta.shape().iter().copied().collect();
        assert!(shape == value.dims(), "a gradient of {shape:?} for a weight of {:?}", value.dims());
        Self { value, sum: Some(sum) }
    }

    /// The value, where an operation has no form of its own that could add to a sum.
    #[track_caller]
    pub(crate) fn without_sum(self) -> Tensor<2> {
        assert!(self.sum.is_none(), "this operation adds gradients to a sum in bf16 on CUDA alone: {:?}", self.value);
        self.value
    }
}

/// A float32 buffer that gradients of one weight are summed in, over the parts of a batch. Clones are
/// the same sum.
#[derive(Clone, Debug)]
pub struct GradientSum {
    buffer: CubeTensor,
    begun: Arc<AtomicBool>,
}

impl GradientSum {
    /// A sum in `buffer: [rows, columns]`, whose values do not matter.
    ///
    /// # Panics
    /// When the buffer is not of float32 or not contiguous.
    pub fn new(buffer: CubeTensor) -> Self {
        assert!(buffer.dtype == DType::F32 && cuda::is_contiguous(&buffer), "no place for a sum: {buffer:?}");
        Self { buffer, begun: Arc::default() }
    }

    /// Forgets the sum: the next gradient replaces it.
    pub fn restart(&self) {
        self.begun.store(false, Ordering::Relaxed);
    }

    /// Whether a gradient was added since the last restart; else the buffer holds nothing of use.
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    /// The buffer itself.
    pub(crate) fn into_buffer(self) -> CubeTensor {
        self.buffer
    }

    /// The buffer, and whether the next gradient is added to what is in it. Counts as that gradient.
    pub(crate) fn next(&self) -> (&CubeTensor, bool) {
        (&self.buffer, self.begun.swap(true, Ordering::Relaxed))
    }
}
