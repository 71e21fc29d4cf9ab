//! What a program that runs stages asks of its allocator.

/// Has glibc keep freed buffers of up to 32 MiB for the next ones. By itself it maps most of those of a quarter of a
/// megabyte and more and gives them back at once, and every batch of documents, page and row group is such a buffer: the
/// kernel then clears the same pages again and again. What is free at the end of an arena goes back from 16 MiB on: two row
/// groups. What is free between buffers in use stays.
/// To be called before threads begin. Does nothing with other allocators, and where the environment says what glibc is to do.
pub fn keep_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use std::ffi::c_int;

        unsafe extern "C" {
            safe fn mallopt(parameter: c_int, value: c_int) -> c_int;
        }
        // As in malloc.h. The threshold for maps is the largest that it takes.
        const M_TRIM_THRESHOLD: c_int = -1;
        const M_MMAP_THRESHOLD: c_int = -3;
        if is_told(|name| std::env::var(name).ok()) {
            return;
        }
        // It gives 0 for a value that it does not take, and all is as before.
        mallopt(M_MMAP_THRESHOLD, 32 << 20);
        mallopt(M_TRIM_THRESHOLD, 16 << 20);
    }
}

/// Whether the environment sets one of the four settings by which glibc decides what it maps and what it gives back (mallopt(3); each
/// has a variable and a tunable). Whoever sets one has the others as glibc then has them.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn is_told(variable: impl Fn(&str) -> Option<String>) -> bool {
    let tunables = variable("GLIBC_TUNABLES").unwrap_or_default();
    ["mmap_threshold", "trim_threshold", "mmap_max", "top_pad"].into_iter().any(|setting| {
        let tunable = format!("glibc.malloc.{setting}=");
        variable(&format!("MALLOC_{}_", setting.to_uppercase())).is_some()
            || tunables.split(':').any(|set| set.starts_with(&tunable))
    })
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use super::is_told;

    #[test]
    fn settings_of_the_environment_are_left() {
        let told = |name: &str, value: &str| is_told(|asked| (asked == name).then(|| value.to_owned()));
        assert!(told("MALLOC_MMAP_THRESHOLD_", "131072") && told("MALLOC_TRIM_THRESHOLD_", "0"));
        assert!(told("MALLOC_MMAP_MAX_", "0") && told("MALLOC_TOP_PAD_", "0"));
        assert!(told("GLIBC_TUNABLES", "glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=1048576"));
        assert!(told("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072"));
        // These say nothing of what is kept.
        assert!(!told("GLIBC_TUNABLES", "glibc.malloc.arena_max=1") && !told("MALLOC_ARENA_MAX", "1"));
        assert!(!is_told(|_| None));
    }
}
