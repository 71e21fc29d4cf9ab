//! `fulgurite doctor`

use anyhow::Result;
use serde::Serialize;
use train::bench::{Ceilings, ceilings};
use train::cuda::{self, libraries};
use train::device::{Device, cuda_devices};

use crate::cli::Doctor;
use crate::output;

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Check {
    what: String,
    found: String,
    /// Whether training on a GPU can do with it as it is.
    good: bool,
}

/// Print what this machine offers, and what to do about what lacks.
pub fn doctor(args: &Doctor) -> Result<()> {
    let mut checks = Vec::new();
    let mut tell = |what: &str, found: Result<String, String>| -> Result<()> {
        let good = found.is_ok();
        let found = found.unwrap_or_else(|advice| advice);
        if !args.json {
            let mark = if good { "ok" } else { "--" };
            output::line(format!("{mark}  {what}: {found}"))?;
        }
        checks.push(Check { what: what.into(), found, good });
        Ok(())
    };
    let options = pipeline::RunOptions::new();
    tell("cores", Ok(options.threads.to_string()))?;
    tell("memory limit of a run", Ok(output::bytes(options.memory_limit_bytes as u64)))?;

    let found = libraries::find();
    for library in found.all() {
        let what = format!("{} ({})", library.name, library.purpose);
        let told = library.found.as_ref().map(|at| format!("{} from {}", at.version, at.path.display()));
        tell(&what, told.map_err(Clone::clone))?;
    }
    let headers = found.headers.as_ref().map(|at| format!("{} in {}", at.version, at.path.display()));
    tell("CUDA headers (for kernels that include them)", headers.map_err(Clone::clone))?;
    let devices = cuda_devices();
    let count = match devices {
        Ok(0) => Err("the driver shows none".to_string()),
        Ok(count) => Ok(count),
        Err(reason) => Err(reason),
    };
    tell("CUDA devices", count.clone().map(|count| count.to_string()))?;
    for index in 0..count.unwrap_or(0) {
        gpu(index, &mut tell)?;
    }
    if args.json {
        return output::json(&checks);
    }
    Ok(())
}

/// Takes what was looked at, and what was found or what to do about it.
type Tell<'a> = dyn FnMut(&str, Result<String, String>) -> Result<()> + 'a;

fn gpu(index: usize, tell: &mut Tell<'_>) -> Result<()> {
    let facts = cuda::device_facts(index as u32).map_err(|e| e.to_string());
    let told = facts.as_ref().map(|facts| {
        format!(
            "{}, compute capability {}.{}, {} of memory, {} multiprocessors",
            facts.name,
            facts.architecture.version / 10,
            facts.architecture.version % 10,
            output::bytes(facts.memory),
            facts.multiprocessors
        )
    });
    tell(&format!("cuda:{index}"), told.map_err(Clone::clone))?;
    let Ok(facts) = facts else { return Ok(()) };
    let begin = std::time::Instant::now();
    let kernels = train::ops::kernels().into_iter().chain(train::ops::attention_kernels(facts.architecture));
    let (mut count, mut failed) = (0, None);
    for kernel in kernels {
        match kernel.compile(facts.architecture) {
            Ok(_) => count += 1,
            Err(error) => failed = failed.or(Some(error.to_string())),
        }
    }
    let compiled = format!("{count} kernels in {:.1} s", begin.elapsed().as_secs_f64());
    tell(&format!("cuda:{index} compiles"), failed.map_or(Ok(compiled), Err))?;
    let speed = |reached: f64, best: Option<f64>| match best {
        Some(best) => format!(" ({:.0} % of what its data sheet says)", 100.0 * reached / best),
        None => String::new(),
    };
    let told = ceilings(&Device::cuda(index)).map(|Ceilings { copy_bytes_per_s, product_flops }| {
        format!(
            "a copy of 1 GiB at {:.2} TB/s{}, a bf16 product of 8192³ at {:.0} TFLOP/s{}",
            copy_bytes_per_s / 1e12,
            speed(copy_bytes_per_s, facts.bandwidth()),
            product_flops / 1e12,
            speed(product_flops, facts.peak_bf16_flops())
        )
    });
    tell(&format!("cuda:{index} reaches"), told.map_err(|e| e.to_string()))
}
