//! What GPUs that share the blocks (`tensor_ranks`) make of their parts: [`super::join`], in bf16.
//!
//! The projections into a half of a block are cut by their outputs, the one out of it by its inputs: what that gives is a term
//! of the sum over the GPUs, and so is the gradient of what the projections into it read, the norm of the stream. These four
//! sums of a block are in bf16, as the stream itself is: a term is rounded as what it is a part of would be, and half the
//! bytes go between the GPUs of what float32 would take. Two sums of one float32 for each token go along: the squares of
//! the attention's output, whose norm is over the channels of all heads, and in the backward what its gradient sums up.
//! The norm is one factor for each token, so it comes after the projection, and the squares are on their way
//! meanwhile.

use burn_cubecl::tensor::CubeTensor;

use crate::cuda::{Collective, Communicator};

/// A sum on its way; calling it lets all that is asked for later wait until it is there.
pub(super) type Coming = Box<dyn FnOnce()>;

/// The ranks that share the blocks. All of them go through the same calls in the same order.
pub(super) trait Partners {
    /// Number of ranks.
    fn world(&self) -> usize;

    /// Begins to add up the contiguous `values` of all ranks, in place: the same bits on all.
    fn add_up(&self, values: &CubeTensor) -> Coming;

    /// Puts the contiguous `own` of all ranks into `all`, one after the other.
    fn gather(&self, own: &CubeTensor, all: &CubeTensor);
}

impl Partners for Communicator {
    fn world(&self) -> usize {
        Communicator::world(self)
    }

    fn add_up(&self, values: &CubeTensor) -> Coming {
        let (ticket, near) = (self.start(Collective::AllReduce, values, values), values.clone());
        Box::new(move || ticket.wait(&near))
    }

    fn gather(&self, own: &CubeTensor, all: &CubeTensor) {
        self.start(Collective::AllGather, own, all).wait(all);
    }
}
