//! The model's operations, one file each.
//!
//! Every operation takes and gives `burn` tensors and works on any device through tensor
//! primitives. On Burn's CPU backend (Flex) in float32 and on CUDA in bf16 the costly ones have
//! their own forward and backward; the composed form of tensor primitives stays beside it and is
//! what they are tested against.

pub mod adamw;
pub mod attention;
pub(crate) mod cpu;
pub mod cross_entropy;
pub mod embedding;
mod exp;
pub mod gate;
pub(crate) mod lanes;
pub mod linear;
pub mod lrpe;
pub(crate) mod operation;
pub(crate) mod parts;
pub mod sequences;
pub mod sglu;
pub mod srms_norm;
pub mod weight;

#[cfg(test)]
pub(crate) mod testing;

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device, Tensor};

use crate::cuda::{Architecture, Kernel};

/// Whether `device` is Burn's CPU backend, with or without autodiff.
pub(crate) fn is_flex(device: &Device) -> bool {
    matches!(device.as_dispatch().clone().inner(), DispatchDevice::Flex(_))
}

/// Whether an operation on `x` runs in its own CPU form: Flex, float32.
pub(crate) fn has_cpu_form<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && is_flex(&x.device())
}

/// Whether `device` is a CUDA device, with or without autodiff.
pub(crate) fn is_cuda(device: &Device) -> bool {
    matches!(device.as_dispatch().clone().inner(), DispatchDevice::Cube(_))
}

/// Whether an operation on `x` runs in its own CUDA form: CUDA, bf16.
pub(crate) fn has_cuda_form<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::BF16 && is_cuda(&x.device())
}

/// Kernels of every source of CUDA code, in specialisations that the published sizes use: what a
/// check of the compiler compiles.
pub fn kernels() -> Vec<Kernel> {
    let narrow = srms_norm::kernel("norm_forward", 1, 1024).0;
    let wide = srms_norm::kernel("norm_forward", 1, 4096).0;
    let with_width = |source, entry, width: i64| Kernel::new(source, entry).define("WIDTH", width);
    vec![
        Kernel::new(&adamw::SOURCE, "adamw"),
        Kernel::new(&cross_entropy::SOURCE, "cross_entropy_rows"),
        with_width(&embedding::SOURCE, "embedding_sum", 1024),
        narrow,
        wide,
        with_width(&sglu::SOURCE, "sglu_forward", 2816),
        Kernel::new(&crate::cuda::COMPARE, "compare"),
        Kernel::new(&attention::lightning::ANY, "lightning_any_forward"),
        Kernel::new(&attention::gated_cuda::LRPE, "lrpe_forward"),
        Kernel::new(&parts::SOURCE, "put_part"),
        Kernel::new(&crate::engine::decoder::SOURCE, "recurrent_step").define("HEAD", 128).define("ROTATED", 1),
    ]
}

/// The forms of `lightning.cu` that training takes on an architecture, one with every mask, one in float16, and those that
/// take the gradient of LRPE's angles, between states too.
pub fn attention_kernels(architecture: Architecture) -> Vec<Kernel> {
    let hopper = architecture == Architecture::new(9, 0);
    let form = |entry, documents: bool, states_only: bool| {
        Kernel::new(&attention::lightning::SOURCE, entry)
            .define("HOPPER", hopper)
            .define("NW", if hopper { 2 } else { 1 })
            .define("STAGES", if hopper { 3 } else { 2 })
            .define("DOCS", documents)
            .define("STATE_ONLY", states_only)
    };
    let plain = |documents, states_only| form("lightning_backward", documents, states_only);
    let theta = |states_only| form("lightning_backward_theta", true, states_only).define("THETA", true);
    let between = |documents, states_only| {
        let form = form("lightning_backward_theta_states", documents, states_only);
        form.define("THETA", true).define("STATES", true)
    };
    vec![
        plain(false, false),
        plain(true, false).define("SILU", true),
        plain(true, true).define("SILU", true),
        plain(true, false).define("HALF", true),
        theta(false),
        theta(true),
        between(false, false),
        between(true, true),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Error;

    #[test]
    #[allow(clippy::print_stderr)]
    fn every_kernel_compiles_for_hopper_and_ampere() {
        for architecture in [Architecture::new(9, 0), Architecture::new(8, 0)] {
            for kernel in kernels().into_iter().chain(attention_kernels(architecture)) {
                match kernel.compile(architecture) {
                    // An ELF file.
                    Ok(cubin) => assert!(cubin.starts_with(b"\x7fELF"), "{}", kernel.name()),
                    Err(Error::Missing(advice)) => {
                        eprintln!("skipped: no kernel is compiled, {advice}");
                        return;
                    }
                    Err(error) => panic!("{}: {error}", kernel.name()),
                }
            }
        }
    }

    #[test]
    fn every_source_is_among_the_kernels_and_every_parameter_is_understood() {
        let kernels: Vec<Kernel> = kernels().into_iter().chain(attention_kernels(Architecture::new(9, 0))).collect();
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels");
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "cu") {
                let name = path.file_name().unwrap().to_str().unwrap();
                let kernel = kernels.iter().find(|kernel| kernel.name().starts_with(&format!("{name}: ")));
                let kernel = kernel.unwrap_or_else(|| panic!("no kernel of {name}"));
                kernel.check_source().unwrap();
            }
        }
    }
}
