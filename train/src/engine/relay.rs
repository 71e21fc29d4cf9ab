//! The states of attention on their way between ranks that share the tokens of rows.
//!
//! Attention is linear: of all tokens before its own a rank needs one state `[B, H, K, V]` in float32 (2K with LRPE), which the
//! rank before it sends. A block waits for it between its projection and its attention, and sends its own on before it goes
//! on; in the backward the gradient of the state goes the other way, and is waited for behind the channel mixer. All else is
//! computed meanwhile, so a rank is behind the one before it by one attention and the way of a state.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use burn_cubecl::tensor::CubeTensor;

use crate::cuda::Ticket;
use crate::ops::attention::lightning::CHUNK;
use crate::parallel::nccl::Gpus;
use crate::parallel::share;

/// What a block takes over from the tokens before its own, and leaves to those behind them; in the backward the gradients of
/// these, the other way.
#[derive(Default)]
pub(super) struct Relay<'a> {
    /// Gives what comes, which it waits for; none where nothing does: it is zero.
    pub(super) receive: Option<Box<dyn FnOnce() -> CubeTensor + 'a>>,
    /// Takes what goes; none where nobody asks for it.
    pub(super) send: Option<Box<dyn FnOnce(CubeTensor) + 'a>>,
}

/// The way of states from rank to rank. All of them go through it for the same blocks in the same order.
pub(super) trait Line {
    /// Makes ready for the state of one block to come, into what `room` gives, and to go; `backwards` for its gradient.
    fn relay(&self, room: &dyn Fn() -> CubeTensor, backwards: bool) -> Relay<'_>;

    /// Lets all that is asked for later on the device of `near` wait until what was sent is gone.
    fn finish(&self, near: &CubeTensor);
}

/// The tokens of a row of `length` that rank `rank` of `world` has: whole chunks, but for the end of the row, so that those of a
/// rank are the chunks that one rank would go through (θ's gradient counts on it).
pub(super) fn tokens(length: usize, rank: usize, world: usize) -> Range<usize> {
    let chunks = share(length / CHUNK, rank, world);
    let end = if rank + 1 == world { length } else { chunks.end * CHUNK };
    chunks.start * CHUNK..end
}

/// Why rows of `length` tokens cannot be shared by `world` ranks: each needs a chunk.
pub(super) fn check(length: usize, world: usize) -> Result<(), String> {
    if length / CHUNK < world {
        let most = length / CHUNK;
        return Err(format!(
            "each GPU needs {CHUNK} tokens of a row or more, so rows of {length} are for {most} at most, not {world}"
        ));
    }
    Ok(())
}

/// The way over NCCL.
pub(super) struct Neighbours {
    gpus: Arc<Gpus>,
    /// The last state that was sent: its memory is held until it is gone.
    sent: RefCell<Option<Ticket>>,
}

impl Neighbours {
    pub(super) fn new(gpus: Arc<Gpus>) -> Self {
        Self { gpus, sent: RefCell::default() }
    }
}

impl Line for Neighbours {
    fn relay(&self, room: &dyn Fn() -> CubeTensor, backwards: bool) -> Relay<'_> {
        let [from, to] = self.gpus.neighbours(backwards);
        let receive = from.map(|from| {
            let state = room();
            let coming = from.receive(&state);
            let receive = move || {
                coming.wait(&state);
                state
            };
            Box::new(receive) as Box<dyn FnOnce() -> CubeTensor>
        });
        let send = to.map(|to| {
            let send = move |state: CubeTensor| {
                let going = to.send(&state);
                // That of the block before is long gone, unless the other rank is a block behind: then this one waits for it.
                if let Some(before) = self.sent.replace(Some(going)) {
                    before.wait(&state);
                }
            };
            Box::new(send) as Box<dyn FnOnce(CubeTensor)>
        });
        Relay { receive, send }
    }

    fn finish(&self, near: &CubeTensor) {
        if let Some(going) = self.sent.take() {
            going.wait(near);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_one_ranks_and_all_but_the_last_have_whole_chunks() {
        for length in [64, 200, 640, 641, 1000, 32_768] {
            for world in 1..=8 {
                if check(length, world).is_err() {
                    assert!(length < CHUNK * world);
                    continue;
                }
                let parts: Vec<_> = (0..world).map(|rank| tokens(length, rank, world)).collect();
                assert!(parts[0].start == 0 && parts[world - 1].end == length);
                assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
                assert!(parts.iter().all(|part| part.len() >= CHUNK && part.start.is_multiple_of(CHUNK)));
                let most = parts.iter().map(Range::len).max().unwrap_or(0);
                assert!(most <= length.div_ceil(world) + 2 * CHUNK, "{length} {parts:?}");
            }
        }
        assert!(check(200, 4).unwrap_err().contains("3 at most"));
    }
}
