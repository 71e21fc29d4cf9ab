//! `fulgurite doctor`

use anyhow::Result;

use crate::cli::Doctor;
use crate::output;

/// Print what this machine offers.
pub fn doctor(args: &Doctor) -> Result<()> {
    let options = pipeline::RunOptions::new();
    let cuda = match train::device::cuda_devices() {
        Ok(0) => "no device".to_string(),
        Ok(n) => format!("{n} devices"),
        Err(reason) => format!("cannot be used: {reason}"),
    };
    let checks = [
        ("cores", options.threads.to_string()),
        ("memory limit of a run", output::bytes(options.memory_limit_bytes as u64)),
        ("CUDA", cuda),
    ];
    if args.json {
        let map: serde_json::Map<String, serde_json::Value> =
            checks.into_iter().map(|(what, found)| (what.into(), found.into())).collect();
        return output::json(&map);
    }
    for (what, found) in checks {
        output::line(format!("{what}: {found}"))?;
    }
    Ok(())
}
