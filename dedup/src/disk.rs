//! Room on the disk, looked at before a stage begins rather than when it is full.

use std::path::Path;
use std::sync::Arc;

use pipeline::{Error, Result, RunContext};

/// Share of the documents (lines, anchors) that are taken to have a duplicate: an assumption, for a prediction that should
/// not be too small.
pub(crate) const EXPECTED_DUPLICATES: f64 = 0.3;

/// Free bytes of the file system of `path`, for this user.
pub(crate) fn free_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).map_err(|e| Error::io(path, e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Bytes of text in the shards of a stage of documents, as their footers say.
pub(crate) fn text_bytes(run: &RunContext, stage: &str) -> Result<u64> {
    Ok(text_bytes_of_shards(run, stage)?.iter().sum())
}

/// Those of the shard that has the most.
pub(crate) fn most_text_bytes(run: &RunContext, stage: &str) -> Result<u64> {
    Ok(text_bytes_of_shards(run, stage)?.iter().copied().max().unwrap_or(0))
}

fn text_bytes_of_shards(run: &RunContext, stage: &str) -> Result<Arc<Vec<u64>>> {
    run.shared(&format!("bytes of text of {stage}"), || {
        run.shards(stage)?.iter().map(|shard| pipeline::shard::text_bytes(&shard.path)).collect::<Result<Vec<u64>>>()
    })
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

#[cfg(test)]
mod tests {
    use pipeline::RunOptions;

    use super::*;

    #[test]
    fn a_stage_that_has_no_room_is_refused_with_the_figures() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunContext::new(dir.path(), RunOptions::new()).unwrap();
        let free = free_bytes(dir.path()).unwrap();
        assert!(free > 0);
        check_room(&run, "near_signatures", free / 2).unwrap();
        let error = check_room(&run, "near_signatures", 1 << 60).unwrap_err().to_string();
        assert!(error.contains("stage near_signatures will write about 1152921504606 MB"), "{error}");
        assert!(error.contains("make room, or give another --run-dir"), "{error}");
    }
}
