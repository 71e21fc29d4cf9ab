//! Operations of our own on Burn's CPU backend: the adapter that makes a pair of functions on
//! slices an operation with a backward, and the small products they are made of.

use std::fmt::Debug;
use std::marker::PhantomData;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Flex};
use burn::tensor::{Tensor, TensorData};

/// A tensor of the CPU backend.
pub(crate) type FlexTensor = FloatTensor<Flex>;

/// An operation on the float32 tensors of the CPU backend.
///
/// `forward` gives the output and, when it is `tracked`, what the backward needs; `backward` gives
/// the gradient of every input from that and the gradient of the output.
pub(crate) trait CpuOperation<const N: usize>: Clone + Debug + Send + Sync + 'static {
    fn forward(&self, inputs: [FlexTensor; N], tracked: bool) -> (FlexTensor, Vec<FlexTensor>);
    fn backward(&self, saved: Vec<FlexTensor>, gradient: FlexTensor) -> [FlexTensor; N];
}

#[derive(Debug)]
struct Adapter<O>(PhantomData<O>);

impl<O: CpuOperation<N>, const N: usize> Backward<Flex, N> for Adapter<O> {
    type State = (O, Vec<FlexTensor>);

    fn backward(self, ops: Ops<Self::State, N>, gradients: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let gradient = gradients.consume::<Flex>(&ops.node);
        let (operation, saved) = ops.state;
        let results = operation.backward(saved, gradient);
        for (parent, gradient) in ops.parents.into_iter().zip(results) {
            if let Some(node) = parent {
                gradients.register::<Flex>(node.id, gradient);
            }
        }
    }
}

/// Runs `operation` on `inputs`, on the tape when one of them is.
///
/// # Panics
/// When an input is not on the CPU backend; callers ask [`super::has_cpu_form`] first.
pub(crate) fn apply<O: CpuOperation<N>, const N: usize, const D: usize>(
    operation: O,
    inputs: [Tensor<2>; N],
) -> Tensor<D> {
    const ON_CPU: &str = "the inputs of a CPU operation are on the CPU backend";
    if !inputs.iter().any(Tensor::is_autodiff) {
        let inputs = inputs.map(|input| input.try_into_primitive::<Flex>().expect(ON_CPU));
        return Tensor::from_primitive::<Flex>(operation.forward(inputs, false).0);
    }
    let parts = inputs.map(|input| {
        let input = input.autodiff().try_into_primitive::<Autodiff<Flex>>();
        input.expect(ON_CPU).into_parts()
    });
    let mut nodes = Vec::with_capacity(N);
    let primitives = parts.map(|(primitive, node)| {
        nodes.push(node);
        primitive
    });
    let Ok(nodes) = nodes.try_into() else { unreachable!("one node for each input") };
    let (output, saved) = operation.forward(primitives, true);
    let preparation = Adapter(PhantomData).prepare::<NoCheckpointing>(nodes);
    let output = match preparation.compute_bound().stateful() {
        OpsKind::Tracked(preparation) => preparation.finish((operation, saved), output),
        OpsKind::UnTracked(preparation) => preparation.finish(output),
    };
    Tensor::from_primitive::<Autodiff<Flex>>(output)
}

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
