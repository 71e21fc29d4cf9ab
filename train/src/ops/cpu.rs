//! What the operations of our own on Burn's CPU backend are made of: slices and small products.

use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;
use burn::tensor::TensorData;

/// A tensor of the CPU backend.
pub(crate) type FlexTensor = FloatTensor<Flex>;

/// A contiguous tensor of `shape` that owns `values`.
pub(crate) fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

/// `tensor` with its values in one piece: itself when it is.
pub(crate) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    match tensor.as_slice::<f32>() {
        Some(_) => tensor,
        None => tensor.to_contiguous(),
    }
}

/// The values of a tensor that [`contiguous`] gave.
pub(crate) fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("a contiguous float32 tensor")
}

/// A matrix in a slice: element (i, j) is at `i * rows + j * columns`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    values: &'a [f32],
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// Rows of `stride` values, of which the first ones count.
    pub(crate) fn rows(values: &'a [f32], stride: usize) -> Self {
        Self { values, row_stride: stride, column_stride: 1 }
    }

    /// The transpose, without a copy.
    pub(crate) fn t(self) -> Self {
        Self { values: self.values, row_stride: self.column_stride, column_stride: self.row_stride }
    }

    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0
            || columns == 0
            || (rows - 1) * self.row_stride + (columns - 1) * self.column_stride < self.values.len()
    }
}

/// `to = keep · to + left × right` on one thread, for `left: [m, k]`, `right: [k, n]` and the rows
/// of `to` `stride` apart. With `keep` 0 the old values do not matter.
pub(crate) fn product(
    [m, n, k]: [usize; 3],
    to: &mut [f32],
    stride: usize,
    keep: f32,
    left: View<'_>,
    right: View<'_>,
) {
    multiply([m, n, k], to, stride, keep, left, right, gemm::Parallelism::None);
}

/// [`product`] on all threads of the pool. Each value is summed by one thread in an order that
/// does not depend on their number.
pub(crate) fn parallel_product(
    [m, n, k]: [usize; 3],
    to: &mut [f32],
    stride: usize,
    keep: f32,
    left: View<'_>,
    right: View<'_>,
) {
    multiply([m, n, k], to, stride, keep, left, right, gemm::Parallelism::Rayon(0));
}

fn multiply(
    [m, n, k]: [usize; 3],
    to: &mut [f32],
    stride: usize,
    keep: f32,
    left: View<'_>,
    right: View<'_>,
    parallelism: gemm::Parallelism,
) {
    assert!(left.holds(m, k) && right.holds(k, n) && View::rows(to, stride).holds(m, n));
    assert!(n <= stride);
    // SAFETY: the assertions above bound every element that is read or written, rows of `to` do not
    // overlap, and `to` is borrowed mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            to.as_mut_ptr(),
            1,
            stride as isize,
            keep != 0.0,
            left.values.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.values.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            keep,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}
