//! Linear attention with a decay per head (Lightning Attention, arXiv 2401.04658):
//! `o_t = Σ_{s≤t} exp(-λ(t-s)) (q_t·k_s) v_s`, the sum running over the document of t.
//!
//! Three forms of the same operation on `q, k: [B, H, T, K]`, `v: [B, H, T, V]`:
//! [`naive`] is the definition, [`chunked`] trains, [`recurrent`] generates. No factor in any of
//! them exceeds 1. [`gated`] is the whole token mixer between its two projections.

pub mod chunked;
pub mod decay;
pub mod gated;
mod gated_cpu;
pub(crate) mod gated_cuda;
pub mod lightning;
pub mod naive;
pub mod recurrent;

#[cfg(test)]
mod tests;
