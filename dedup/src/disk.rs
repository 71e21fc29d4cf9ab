//! Room on the disk, looked at before a stage begins rather than when it is full.

use std::path::Path;

use pipeline::{Error, Result, RunContext};

/// Free bytes of the file system of `path`, for this user.
pub(crate) fn free_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).map_err(|e| Error::io(path, e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Refuse to begin a stage that will write `bytes` where there is less room. What it has committed
/// already counts as room.
pub(crate) fn check_room(run: &RunContext, stage: &str, bytes: u64) -> Result<()> {
    let there: u64 = run.journal(stage).values().flat_map(|e| &e.files).map(|f| f.bytes).sum();
    let free = free_bytes(run.dir())?;
    if bytes <= free.saturating_add(there) {
        return Ok(());
    }
    Err(Error::Limit(format!(
        "stage {stage} will write about {} MB, and {} has {} MB free: make room, or give another --run-dir",
        bytes / 1_000_000,
        run.dir().display(),
        free / 1_000_000
    )))
}
