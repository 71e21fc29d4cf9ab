//! Collectives over the ranks' GPUs: right sums, and how fast they come.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{DType, Device, Tensor};
use burn_cubecl::CubeDevice;
use burn_cubecl::tensor::CubeTensor;
use serde::Serialize;

use crate::Error;
use crate::cuda;
use crate::ops::is_cuda;
use crate::parallel::nccl::Gpus;
use crate::parallel::{Alone, Collective, Team};

/// One collective at one size.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CollectiveTime {
    /// `all-reduce`, `reduce-scatter`, `all-gather` or `relay`, in which the first rank's values go from rank to rank.
    pub collective: String,
    /// `float32` or `bf16`.
    pub values: &'static str,
    /// Ranks.
    pub world: usize,
    /// Bytes of the larger of the two sides.
    pub bytes: u64,
    /// Median of several batches, by the host's clock.
    pub time_ms: f64,
    /// Those bytes per second.
    pub gb_per_s: f64,
    /// Bytes that every link moves per second where each rank has one, as nccl-tests count them: the above times
    /// (N - 1) / N, twice for an all-reduce, and once for a relay.
    pub bus_gb_per_s: f64,
    /// Values of this rank's result, all of which were compared with what they have to be.
    pub checked: usize,
    /// Those that differed.
    pub wrong: usize,
}

/// Collectives that are timed together.
const BATCH: usize = 10;
/// Such batches.
const BATCHES: usize = 7;

/// Value `at` of rank `rank`: a small integer, so that sums over all ranks are exact in bf16.
fn value(rank: usize, at: usize, world: usize) -> f32 {
    let most = (256 / world).clamp(1, 15);
    ((at * 7 + rank * 13) % (2 * most + 1)) as f32 - most as f32
}

/// Runs each collective in float32 and bf16 at each of the sizes (bytes of the larger side, rounded up to what all ranks
/// can share), and between several ranks a relay in float32, as that of states. Results are poisoned before and compared with sums taken on the host. All ranks call it together; `told` gets
/// what this rank sees.
///
/// # Errors
/// [`Error::Device`] when `device` is no CUDA device or NCCL is not there, and what `gpus` tells of lost ranks.
pub fn collectives(
    device: &Device,
    group: &Arc<dyn Collective>,
    sizes: &[u64],
    mut told: impl FnMut(&CollectiveTime),
) -> Result<(), Error> {
    if !is_cuda(device) {
        let reason = "collectives are of CUDA devices".to_owned();
        return Err(Error::Device { device: format!("{device:?}"), reason });
    }
    let near = cuda::of(Tensor::<1>::zeros([8], device));
    let team = Team {
        all: group.clone(),
        inner: group.clone(),
        outer: Alone::shared(),
        sequence: group.clone(),
        tensor: Alone::shared(),
        copy: group.clone(),
    };
    let gpus = Gpus::join(&near, &team)?;
    for &bytes in sizes {
        for dtype in [DType::F32, DType::BF16] {
            use cuda::Collective::{AllGather, AllReduce, ReduceScatter};
            for collective in [AllReduce, ReduceScatter, AllGather] {
                told(&one(&gpus, group.as_ref(), &near, collective, dtype, bytes)?);
            }
        }
        if group.world() > 1 {
            told(&relay(&gpus, group.as_ref(), &near, bytes)?);
        }
    }
    // None leaves while another is at work.
    group.barrier()
}

fn place(device: &CubeDevice, values: &[f32], dtype: DType) -> CubeTensor {
    match dtype {
        DType::BF16 => cuda::upload_bf16(device, values),
        _ => cuda::upload_floats(device, values),
    }
}

fn one(
    gpus: &Gpus,
    group: &dyn Collective,
    near: &CubeTensor,
    collective: cuda::Collective,
    dtype: DType,
    bytes: u64,
) -> Result<CollectiveTime, Error> {
    let (rank, world) = (group.rank(), group.world());
    // Pieces begin where kernels may read them.
    let piece = (bytes as usize / dtype.size()).div_ceil(world).next_multiple_of(8);
    let all = piece * world;
    let sum = |at: usize| (0..world).map(|rank| value(rank, at, world)).sum::<f32>();
    let own = |count: usize| (0..count).map(|at| value(rank, at, world)).collect::<Vec<f32>>();
    let (sent, want): (Vec<f32>, Vec<f32>) = match collective {
        cuda::Collective::AllReduce => (own(all), (0..all).map(sum).collect()),
        cuda::Collective::ReduceScatter => (own(all), (rank * piece..(rank + 1) * piece).map(sum).collect()),
        cuda::Collective::AllGather => {
            let of = |rank| (0..piece).map(move |at| value(rank, at, world));
            (own(piece), (0..world).flat_map(of).collect())
        }
    };
    let from = place(&near.device, &sent, dtype);
    let to = place(&near.device, &vec![f32::NAN; want.len()], dtype);
    let start = || gpus.start(collective, &from, &to).wait(&to);
    start();
    let wrong = wrong(gpus, &to, &want)?;
    let time_s = median(gpus, group, near, start)?;
    let bytes = (all * dtype.size()) as u64;
    let rate = bytes as f64 / time_s / 1e9;
    let passes = if collective == cuda::Collective::AllReduce { 2.0 } else { 1.0 };
    Ok(CollectiveTime {
        collective: collective.to_string(),
        values: if dtype == DType::BF16 { "bf16" } else { "float32" },
        world,
        bytes,
        time_ms: 1e3 * time_s,
        gb_per_s: rate,
        bus_gb_per_s: rate * passes * (world - 1) as f64 / world as f64,
        checked: want.len(),
        wrong,
    })
}

/// The first rank's values from rank to rank, each of which hands on what came.
fn relay(gpus: &Gpus, group: &dyn Collective, near: &CubeTensor, bytes: u64) -> Result<CollectiveTime, Error> {
    let (rank, world) = (group.rank(), group.world());
    let want: Vec<f32> = (0..(bytes as usize / 4).next_multiple_of(8)).map(|at| value(0, at, world)).collect();
    let own = if rank == 0 { want.clone() } else { vec![f32::NAN; want.len()] };
    let values = place(&near.device, &own, DType::F32);
    let [before, after] = gpus.neighbours(false);
    let pass = || {
        if let Some(before) = before {
            before.receive(&values).wait(&values);
        }
        if let Some(after) = after {
            after.send(&values).wait(&values);
        }
    };
    pass();
    let wrong = wrong(gpus, &values, &want)?;
    let time_s = median(gpus, group, near, pass)?;
    let bytes = 4 * want.len() as u64;
    let rate = bytes as f64 / time_s / 1e9;
    Ok(CollectiveTime {
        collective: "relay".to_owned(),
        values: "float32",
        world,
        bytes,
        time_ms: 1e3 * time_s,
        gb_per_s: rate,
        bus_gb_per_s: rate,
        checked: want.len(),
        wrong,
    })
}

/// How many values differ from what they have to be.
fn wrong(gpus: &Gpus, got: &CubeTensor, want: &[f32]) -> Result<usize, Error> {
    gpus.settle(got)?;
    let failed = |error: cuda::Error| Error::Device { device: "cuda".to_owned(), reason: error.to_string() };
    let got = cuda::download_floats(got).map_err(failed)?;
    Ok(got.iter().zip(want).filter(|(got, want)| got != want).count())
}

/// Seconds that `start` takes, of many that are asked for together: the median of several times.
fn median(gpus: &Gpus, group: &dyn Collective, near: &CubeTensor, start: impl Fn()) -> Result<f64, Error> {
    let mut times = Vec::with_capacity(BATCHES);
    for _ in 0..BATCHES {
        group.barrier()?;
        let begin = Instant::now();
        for _ in 0..BATCH {
            start();
        }
        gpus.settle(near)?;
        times.push(begin.elapsed().as_secs_f64() / BATCH as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[BATCHES / 2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::nccl_device;

    #[test]
    fn sums_of_all_ranks_are_exact_in_bf16() {
        for world in [1, 2, 3, 8, 64, 256] {
            for at in [0, 1, 2, 1000, 123_457] {
                let sum: f32 = (0..world).map(|rank| value(rank, at, world)).sum();
                assert_eq!(half::bf16::from_f32(sum).to_f32(), sum, "{world} {at}");
            }
        }
    }

    #[test]
    fn a_world_of_one_gets_its_own_values() {
        let Some(device) = nccl_device("collectives") else { return };
        let mut lines = 0;
        collectives(&device, &Alone::shared(), &[4096, 1 << 20], |time| {
            lines += 1;
            assert!(time.wrong == 0 && time.checked > 0, "{time:?}");
        })
        .unwrap();
        assert_eq!(lines, 12);
    }
}
