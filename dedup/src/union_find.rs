//! Disjoint sets whose representative is the smallest member, whatever the order of the unions and
//! whoever makes them.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memmap2::MmapMut;
use pipeline::{Error, Result};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::{Errno, retry_on_intr};

/// The parent of an element in memory that threads share: 32 bits while there are few enough
/// elements, 64 beyond. Every bit pattern is a value.
pub(crate) trait Cell: Sync {
    fn load(&self) -> usize;
    fn store(&mut self, parent: usize);
    /// Put `new` where `old` is; whether it was there.
    fn replace(&self, old: usize, new: usize) -> bool;
}

impl Cell for AtomicU32 {
    fn load(&self) -> usize {
        Self::load(self, Ordering::Relaxed) as usize
    }
    fn store(&mut self, parent: usize) {
        *self.get_mut() = parent as u32;
    }
    fn replace(&self, old: usize, new: usize) -> bool {
        self.compare_exchange(old as u32, new as u32, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

impl Cell for AtomicU64 {
    fn load(&self) -> usize {
        Self::load(self, Ordering::Relaxed) as usize
    }
    fn store(&mut self, parent: usize) {
        *self.get_mut() = parent as u64;
    }
    fn replace(&self, old: usize, new: usize) -> bool {
        self.compare_exchange(old as u64, new as u64, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// Lock-free union-find (Anderson and Woll 1991) with linking by minimum: a root is linked to the
/// smaller root, so a parent is never larger than its child and the root of a set is its minimum.
/// Which thread links first changes the trees, never the sets. Path halving keeps paths short.
pub(crate) struct UnionFind<'m, C> {
    parents: &'m [C],
}

impl<'m, C: Cell> UnionFind<'m, C> {
    /// A set for every cell.
    pub(crate) fn new(cells: &'m mut [C]) -> Self {
        cells.iter_mut().enumerate().for_each(|(i, cell)| cell.store(i));
        Self { parents: cells }
    }

    /// Smallest member of the set of `element`.
    pub(crate) fn find(&self, element: usize) -> usize {
        let mut at = element;
        loop {
            let parent = self.parents[at].load();
            if parent == at {
                return at;
            }
            let grandparent = self.parents[parent].load();
            if grandparent != parent {
                // Lost to another thread, the path is as short as that one made it.
                self.parents[at].replace(parent, grandparent);
            }
            at = grandparent;
        }
    }

    /// Make one set of the sets of `a` and `b`.
    pub(crate) fn union(&self, a: usize, b: usize) {
        loop {
            let (a, b) = (self.find(a), self.find(b));
            let (small, large) = if a < b { (a, b) } else { (b, a) };
            // Fails where another thread linked that root meanwhile: look again from where it is now.
            if small == large || self.parents[large].replace(large, small) {
                return;
            }
        }
    }
}

/// Zeroed cells in memory, or in a file of `dir` that the system pages where they take more than
/// `limit_bytes`.
pub(crate) enum Cells<C> {
    Memory(Vec<C>),
    File { map: MmapMut, len: usize },
}

impl<C: Cell> Cells<C> {
    pub(crate) fn new(len: usize, limit_bytes: usize, dir: &Path, zero: impl FnMut() -> C) -> Result<Self> {
        let bytes = len * size_of::<C>();
        if bytes <= limit_bytes {
            let mut cells = Vec::with_capacity(len);
            cells.resize_with(len, zero);
            return Ok(Self::Memory(cells));
        }
        let fail = |e| Error::io(dir.join("parents"), e);
        std::fs::create_dir_all(dir).map_err(fail)?;
        let file = tempfile::tempfile_in(dir).map_err(fail)?;
        allocate(&file, bytes as u64).map_err(fail)?;
        // SAFETY: the file has no name, so that no other process can change or cut it.
        let map = unsafe { MmapMut::map_mut(&file) }.map_err(fail)?;
        Ok(Self::File { map, len })
    }

    pub(crate) fn cells(&mut self) -> &mut [C] {
        match self {
            Self::Memory(cells) => cells,
            // SAFETY: the map is `len` cells long, begins at a page and is borrowed for as long; a cell
            // is an integer, of which every bit pattern is a value.
            Self::File { map, len } => unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().cast(), *len) },
        }
    }
}

/// Makes the empty `file` one of `bytes` zeroes that have their room on the disk. A hole would do for the map, but a
/// write to one that finds the disk full ends the process (SIGBUS) instead of failing.
fn allocate(mut file: &File, bytes: u64) -> io::Result<()> {
    match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, bytes)) {
        // Not every file system can reserve room.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => io::copy(&mut io::repeat(0).take(bytes), &mut file).map(|_| ()),
        result => result.map_err(io::Error::from),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEN: usize = 60;

    /// Smallest element reachable from each, by repeated sweeps over the edges.
    fn closure(edges: &[(usize, usize)]) -> Vec<usize> {
        let mut least: Vec<usize> = (0..LEN).collect();
        loop {
            let before = least.clone();
            for &(a, b) in edges {
                let m = least[a].min(least[b]);
                (least[a], least[b]) = (m, m);
            }
            if before == least {
                return least;
            }
        }
    }

    fn representatives<C: Cell>(mut cells: Cells<C>, edges: &[(usize, usize)]) -> Vec<usize> {
        let sets = UnionFind::new(cells.cells());
        edges.iter().for_each(|&(a, b)| sets.union(a, b));
        (0..LEN).map(|i| sets.find(i)).collect()
    }

    proptest! {
        #[test]
        fn is_the_closure_under_any_order_in_memory_and_in_a_file(
            (edges, shuffled) in prop::collection::vec((0..LEN, 0..LEN), 0..80)
                .prop_flat_map(|edges| (Just(edges.clone()), Just(edges).prop_shuffle())),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let expected = closure(&edges);
            let memory = Cells::new(LEN, 4 * LEN, dir.path(), || AtomicU32::new(0)).unwrap();
            let in_memory = matches!(memory, Cells::Memory(_));
            prop_assert!(in_memory);
            prop_assert_eq!(&representatives(memory, &edges), &expected);
            let file = Cells::new(LEN, 8 * LEN - 1, dir.path(), || AtomicU64::new(0)).unwrap();
            let in_memory = matches!(file, Cells::Memory(_));
            prop_assert!(!in_memory);
            let turned: Vec<_> = shuffled.iter().map(|&(a, b)| (b, a)).collect();
            prop_assert_eq!(&representatives(file, &turned), &expected);
        }
    }

    #[test]
    fn a_file_of_cells_has_its_room_on_the_disk() {
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().unwrap();
        allocate(&file, 1 << 20).unwrap();
        let found = file.metadata().unwrap();
        assert_eq!(found.len(), 1 << 20);
        assert!(512 * found.blocks() >= 1 << 20, "{} blocks", found.blocks());
    }

    #[test]
    fn four_threads_come_to_the_sets_of_one() {
        let n = 100_000;
        let edges: Vec<(usize, usize)> = (0..n).map(|i| (i * 7919 % n, (i * i + 13) % n)).collect();
        let mut alone: Vec<AtomicU32> = (0..n).map(|_| AtomicU32::new(0)).collect();
        let alone = UnionFind::new(&mut alone);
        edges.iter().for_each(|&(a, b)| alone.union(a, b));
        let mut shared: Vec<AtomicU32> = (0..n).map(|_| AtomicU32::new(0)).collect();
        let shared = UnionFind::new(&mut shared);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (edges, shared) = (&edges, &shared);
                scope.spawn(move || edges.iter().skip(thread).step_by(4).for_each(|&(a, b)| shared.union(a, b)));
            }
        });
        assert!((0..n).all(|i| alone.find(i) == shared.find(i)));
    }

    #[test]
    fn a_chain_of_a_million_is_one_set_in_either_direction() {
        let n = 1_000_000;
        for backwards in [false, true] {
            let mut cells: Vec<AtomicU32> = (0..n).map(|_| AtomicU32::new(0)).collect();
            let sets = UnionFind::new(&mut cells);
            for i in 1..n {
                let i = if backwards { n - i } else { i };
                sets.union(i - 1, i);
            }
            assert!((0..n).all(|i| sets.find(i) == 0));
        }
    }
}
