//! What a program that runs stages asks of its allocator.

/// Has glibc keep freed buffers of up to 32 MiB for the next ones. By itself it maps most of those of a quarter of a
/// megabyte and more and gives them back at once, and every batch of documents, page and row group is such a buffer: the
/// kernel then clears the same pages again and again. What is free at the end of an arena goes back from 16 MiB on: two row
/// groups.
/// To be called before threads begin. Does nothing with other allocators.
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
        // It gives 0 for a value that it does not take, and all is as before.
        mallopt(M_MMAP_THRESHOLD, 32 << 20);
        mallopt(M_TRIM_THRESHOLD, 16 << 20);
    }
}
