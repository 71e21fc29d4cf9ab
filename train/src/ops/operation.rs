//! Operations with a backward of their own: the adapter that puts a pair of functions on the
//! buffers of one backend onto Burn's tape.

use std::fmt::Debug;
use std::marker::PhantomData;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Flex};
use burn::tensor::Tensor;
use burn_cubecl::CubeBackend;

/// An operation on the tensors of backend `B`.
///
/// `forward` gives the output and, when it is `tracked`, what the backward needs; `backward` gives
/// the gradient of every input that is `wanted`, from that and the gradient of the output. An input
/// whose gradient goes elsewhere, into a [`super::weight::GradientSum`], gets none.
pub(crate) trait Operation<B: Backend, const N: usize>: Clone + Debug + Send + Sync + 'static {
    fn forward(&self, inputs: [FloatTensor<B>; N], tracked: bool) -> (FloatTensor<B>, Vec<FloatTensor<B>>);
    fn backward(
        &self,
        saved: Vec<FloatTensor<B>>,
        gradient: FloatTensor<B>,
        wanted: [bool; N],
    ) -> [Option<FloatTensor<B>>; N];
}

/// A backend that operations of our own run on.
pub(crate) trait Place: Backend {
    fn plain(tensor: Tensor<2>) -> FloatTensor<Self>;
    fn tracked(tensor: Tensor<2>) -> FloatTensor<Autodiff<Self>>;
    fn to_plain<const D: usize>(primitive: FloatTensor<Self>) -> Tensor<D>;
    fn to_tracked<const D: usize>(primitive: FloatTensor<Autodiff<Self>>) -> Tensor<D>;
}

macro_rules! place {
    ($backend:ty) => {
        impl Place for $backend {
            fn plain(tensor: Tensor<2>) -> FloatTensor<Self> {
                tensor.try_into_primitive::<Self>().expect("the inputs of an operation are on its backend")
            }

            fn tracked(tensor: Tensor<2>) -> FloatTensor<Autodiff<Self>> {
                let tensor = tensor.autodiff().try_into_primitive::<Autodiff<Self>>();
                tensor.expect("the inputs of an operation are on its backend")
            }

            fn to_plain<const D: usize>(primitive: FloatTensor<Self>) -> Tensor<D> {
                Tensor::from_primitive::<Self>(primitive)
            }

            fn to_tracked<const D: usize>(primitive: FloatTensor<Autodiff<Self>>) -> Tensor<D> {
                Tensor::from_primitive::<Autodiff<Self>>(primitive)
            }
        }
    };
}

place!(Flex);
place!(CubeBackend);

#[derive(Debug)]
struct Adapter<O>(PhantomData<O>);

impl<B: Backend, O: Operation<B, N>, const N: usize> Backward<B, N> for Adapter<O> {
    type State = (O, Vec<FloatTensor<B>>);

    fn backward(self, ops: Ops<Self::State, N>, gradients: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let gradient = gradients.consume::<B>(&ops.node);
        let (operation, saved) = ops.state;
        let wanted = std::array::from_fn(|input| ops.parents[input].is_some());
        let results = operation.backward(saved, gradient, wanted);
        for (parent, gradient) in ops.parents.into_iter().zip(results) {
            if let (Some(node), Some(gradient)) = (parent, gradient) {
                gradients.register::<B>(node.id, gradient);
            }
        }
    }
}

/// Runs `operation` on `inputs`, on the tape when one of them is.
///
/// # Panics
/// When an input is not on backend `B`; callers ask first, for example [`super::has_cpu_form`].
pub(crate) fn apply<B: Place, O: Operation<B, N>, const N: usize, const D: usize>(
    operation: O,
    inputs: [Tensor<2>; N],
) -> Tensor<D> {
    if !inputs.iter().any(Tensor::is_autodiff) {
        return B::to_plain(operation.forward(inputs.map(B::plain), false).0);
    }
    let parts = inputs.map(|input| B::tracked(input).into_parts());
    let mut nodes = Vec::with_capacity(N);
    let primitives = parts.map(|(primitive, node)| {
        nodes.push(node);
        primitive
    });
    let Ok(nodes) = nodes.try_into() else { unreachable!("one node for each input") };
    let (output, saved) = operation.forward(primitives, true);
    let preparation = Backward::<B, N>::prepare::<NoCheckpointing>(Adapter(PhantomData), nodes);
    let output = match preparation.compute_bound().stateful() {
        OpsKind::Tracked(preparation) => preparation.finish((operation, saved), output),
        OpsKind::UnTracked(preparation) => preparation.finish(output),
    };
    B::to_tracked(output)
}
