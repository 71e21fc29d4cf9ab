//! Stage `near_verified`: pairs of documents in one bucket that are as similar as the threshold asks.

use std::path::PathBuf;

use async_trait::async_trait;
use pipeline::{Result, RunContext, Stage, Task, TaskContext, TaskReport};

use super::{NearConfig, PAIRS, SETS, SIGNATURES, Sets, VERIFIED, Verify};
use crate::disk::check_room;
use crate::documents::{Documents, ROW_BYTES, digest_of_stage, sum_of_notes};
use crate::minhash::{SKETCH_BYTES, jaccard, sketch_similarity};
use crate::partition::{keys_of, partition_tasks, stop_if_asked};
use crate::runs::{Buffered, Pair, Record, RunWriter};

/// Tag of the pairs.
pub(super) const SIMILAR: u32 = 0;

/// Pairs of a partition, about, every band counted.
const PARTITION_PAIRS: u64 = 1 << 20;

/// Comparisons of a group by sketches that take no more than a second or two: all pairs of 11,585 documents.
const MOST_BY_SKETCH: usize = 1 << 26;

/// Comparisons of a group by sets, likewise: all pairs of 2,897 documents.
const MOST_BY_SET: usize = 1 << 22;

/// Documents of a group that all others are compared with, however many these are.
const LEAST_PIVOTS: usize = 32;

/// Verifies a partition of the pairs.
///
/// All buckets of one first document are looked at together. Each other document is compared with the first
/// one; those that are not similar to it with all others of a bucket they are in, unless both are
/// connected already. So two documents end in one cluster exactly where a chain of pairs leads from one to the
/// other, each pair in a common bucket and similar.
///
/// Where the buckets of one first document hold more than some thousands that are not all similar, comparing all pairs would take
/// hours. There each document is compared with those that were similar to none before them, the first of their kind, as
/// long as [`MOST_BY_SKETCH`] or [`MOST_BY_SET`] lasts. What is lost are chains that lead over others, and the kinds behind the
/// end of that; the journal says how many pairs were left out (`not_compared`).
pub(super) struct Verified {
    pub(super) config: NearConfig,
    pub(super) against: Vec<PathBuf>,
}

#[async_trait]
impl Stage for Verified {
    fn name(&self) -> &str {
        VERIFIED
    }

    fn version(&self) -> u32 {
        3
    }

    fn inputs(&self) -> Vec<String> {
        match self.config.verify {
            Verify::Exact => vec![SIGNATURES.into(), PAIRS.into(), SETS.into()],
            _ => vec![SIGNATURES.into(), PAIRS.into()],
        }
    }

    fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "verify": self.config.verify, "threshold": self.config.threshold }))
    }

    fn task_memory_bytes(&self, run: &RunContext) -> Result<u64> {
        // Twice the pairs with their bands, and two sketches for each.
        let pairs = sum_of_notes(run, PAIRS, "pairs").min(PARTITION_PAIRS);
        Ok(pairs * 2 * (size_of::<(Pair, u128)>() + 8 + SKETCH_BYTES) as u64)
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let pairs = sum_of_notes(run, PAIRS, "pairs");
        // If all of them are similar, and each is in one band alone.
        check_room(run, VERIFIED, pairs * Pair::BYTES as u64)?;
        Ok(partition_tasks(pairs, PARTITION_PAIRS, digest_of_stage(run, PAIRS)))
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let documents = Documents::of(&task.run, SIGNATURES, &self.against)?;
        let buckets = self.buckets(task)?;
        let mut judge = Judge {
            config: &self.config,
            sets: (self.config.verify == Verify::Exact).then(|| Sets::new(&task.run, &documents)),
            numbers: Vec::new(),
            sketches: Vec::new(),
            bounds: (0..self.config.bands as usize).map(|band| self.config.bound(band)).collect(),
            looked: u64::MAX,
            set: Vec::new(),
            other: Vec::new(),
            compared: 0,
            not_compared: 0,
        };
        if judge.sets.is_none() {
            judge.look_up(&buckets, &documents)?;
        }
        let mut writer = RunWriter::create(task)?;
        let mut similar = Buffered::new(SIMILAR);
        let mut group = Vec::new();
        let most = if judge.sets.is_some() { MOST_BY_SET } else { MOST_BY_SKETCH };
        for pairs in buckets.chunk_by(|a, b| a.0.first() == b.0.first()) {
            stop_if_asked(task)?;
            group.clear();
            group.push(judge.member(pairs[0].0.first(), u128::MAX));
            group.extend(pairs.iter().map(|(pair, bands)| judge.member(pair.second, *bands)));
            verify(&group, most, &mut judge, |a, b| similar.push(Pair::new(a, b), &mut writer))?;
        }
        similar.flush(&mut writer)?;
        let rows = similar.written();
        let notes = serde_json::json!({
            "pairs": rows,
            "candidates": buckets.len(),
            "compared": judge.compared,
            "not_compared": judge.not_compared,
        });
        writer.report(rows, notes)
    }
}

impl Verified {
    /// The pairs of the partition, each with the bands it is in, in order.
    fn buckets(&self, task: &TaskContext) -> Result<Vec<(Pair, u128)>> {
        let (mut pairs, mut most) = (Vec::new(), 4 * PARTITION_PAIRS as usize);
        let files = Documents::of(&task.run, PAIRS, &[])?;
        files.each_section(task, 0..self.config.bands, keys_of::<Pair>(task)?, |_, section, found: &[Pair]| {
            pairs.extend(found.iter().map(|pair| (*pair, 1u128 << section.tag)));
            if pairs.len() > most {
                merge(&mut pairs);
                most = most.max(2 * pairs.len());
            }
            Ok(())
        })?;
        merge(&mut pairs);
        Ok(pairs)
    }
}

/// Sort, and make one of equal pairs.
fn merge(pairs: &mut Vec<(Pair, u128)>) {
    pairs.sort_unstable();
    pairs.dedup_by(|next, pair| {
        let same = next.0 == pair.0;
        if same {
            pair.1 |= next.1;
        }
        same
    });
}

/// A document of a group.
#[derive(Clone, Copy, Debug)]
struct Member {
    number: u64,
    /// The bands in which it shares the bucket of the first document.
    bands: u128,
    /// Place of its sketch.
    sketch: usize,
}

/// Looks at two documents of a group.
trait Compare {
    /// Whether two documents that share band `band` are similar.
    fn similar(&mut self, a: &Member, b: &Member, band: u32) -> Result<bool>;
    /// So many pairs are left out.
    fn leave(&mut self, pairs: u64);
}

/// Find a forest of similar pairs of a group: of all pairs if they are at most `most`, else with about so many
/// comparisons. Two documents may be compared where they share a band.
fn verify(
    group: &[Member],
    most: usize,
    judge: &mut impl Compare,
    mut similar: impl FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    fn find(parents: &mut [u32], mut at: u32) -> u32 {
        while parents[at as usize] != at {
            parents[at as usize] = parents[parents[at as usize] as usize];
            at = parents[at as usize];
        }
        at
    }
    let n = group.len();
    let all = n * n.saturating_sub(1) / 2;
    let mut parents: Vec<u32> = (0..n as u32).collect();
    let (mut sets, mut pivots, mut compared, mut seen) = (n, 0, 0, 0);
    for i in 0..n {
        if sets == 1 || all > most && pivots >= LEAST_PIVOTS && compared > most {
            break;
        }
        // Of many, only those that nothing before them is similar to are set against the rest.
        if all > most && find(&mut parents, i as u32) != i as u32 {
            continue;
        }
        pivots += 1;
        seen += n - i - 1;
        for j in i + 1..n {
            let (a, b) = (find(&mut parents, i as u32), find(&mut parents, j as u32));
            let shared = group[i].bands & group[j].bands;
            if a == b || shared == 0 {
                continue;
            }
            compared += 1;
            if judge.similar(&group[i], &group[j], shared.trailing_zeros())? {
                parents[b.max(a) as usize] = a.min(b);
                sets -= 1;
                let (a, b) = (group[i].number, group[j].number);
                similar(a.min(b), a.max(b))?;
            }
        }
    }
    if sets > 1 {
        judge.leave((all - seen) as u64);
    }
    Ok(())
}

/// Says whether two documents are similar, by their sets or by their sketches.
struct Judge<'d> {
    config: &'d NearConfig,
    sets: Option<Sets<'d>>,
    /// The documents whose sketches are held, in order.
    numbers: Vec<u64>,
    /// Their sketches, one after the other.
    sketches: Vec<u8>,
    /// For every band the positions of a sketch that say nothing, and what two sketches must come to.
    bounds: Vec<(usize, f64)>,
    /// The document whose set is in `set`.
    looked: u64,
    set: Vec<u64>,
    other: Vec<u64>,
    compared: u64,
    not_compared: u64,
}

impl Judge<'_> {
    /// Hold the sketches of the documents of `pairs`.
    fn look_up(&mut self, pairs: &[(Pair, u128)], documents: &Documents) -> Result<()> {
        self.numbers = pairs.iter().map(|(pair, _)| pair.second).collect();
        self.numbers.extend(pairs.chunk_by(|a, b| a.0.first() == b.0.first()).map(|group| group[0].0.first()));
        self.numbers.sort_unstable();
        self.numbers.dedup();
        self.sketches = vec![0; self.numbers.len() * SKETCH_BYTES];
        let from = ROW_BYTES + self.config.keep.row_bytes();
        documents.look_up(&self.numbers, |i, _, row| {
            self.sketches[i * SKETCH_BYTES..][..SKETCH_BYTES].copy_from_slice(&row[from..from + SKETCH_BYTES]);
        })
    }

    fn member(&self, number: u64, bands: u128) -> Member {
        // With sets no sketch is held, and none is asked for.
        Member { number, bands, sketch: self.numbers.binary_search(&number).unwrap_or(0) }
    }

    fn sketch(&self, member: &Member) -> &[u8] {
        &self.sketches[member.sketch * SKETCH_BYTES..][..SKETCH_BYTES]
    }
}

impl Compare for Judge<'_> {
    fn similar(&mut self, a: &Member, b: &Member, band: u32) -> Result<bool> {
        self.compared += 1;
        match &mut self.sets {
            None => {
                let (agreed, bound) = self.bounds[band as usize];
                Ok(sketch_similarity(self.sketch(a), self.sketch(b), agreed) >= bound)
            }
            Some(sets) => {
                if self.looked != a.number {
                    sets.read(a.number, &mut self.set)?;
                    self.looked = a.number;
                }
                sets.read(b.number, &mut self.other)?;
                Ok(jaccard(&self.set, &self.other) >= self.config.threshold)
            }
        }
    }

    fn leave(&mut self, pairs: u64) {
        self.not_compared += pairs;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Documents are similar where their numbers are the same modulo so much; counts what is asked.
    struct Modulo {
        modulus: u64,
        asked: usize,
        left: u64,
    }

    impl Compare for Modulo {
        fn similar(&mut self, a: &Member, b: &Member, _: u32) -> Result<bool> {
            self.asked += 1;
            Ok(a.number % self.modulus == b.number % self.modulus)
        }
        fn leave(&mut self, pairs: u64) {
            self.left += pairs;
        }
    }

    /// Edges that a group of `n` documents of one bucket comes to, comparisons, and pairs that were left out.
    fn outcome(n: u64, modulus: u64, most: usize) -> (Vec<(u64, u64)>, usize, u64) {
        let group: Vec<Member> = (0..n).map(|number| Member { number, bands: 1, sketch: 0 }).collect();
        let (mut judge, mut edges) = (Modulo { modulus, asked: 0, left: 0 }, Vec::new());
        verify(&group, most, &mut judge, |a, b| {
            edges.push((a, b));
            Ok(())
        })
        .unwrap();
        (edges, judge.asked, judge.left)
    }

    #[test]
    fn a_group_of_any_size_is_compared_within_bounds() {
        let pairs = |n: u64| n * (n - 1) / 2;
        // All similar: one comparison each.
        assert_eq!(outcome(100_000, 1, 1 << 22).1, 99_999);
        // A small group: every pair.
        assert_eq!(outcome(2000, u64::MAX, 1 << 22), (Vec::new(), pairs(2000) as usize, 0));
        // A large one of few kinds: all of a kind meet, though not every pair was looked at.
        let (edges, asked, left) = outcome(20_000, 100, 1 << 22);
        assert!(edges.iter().all(|(a, b)| a % 100 == b % 100) && edges.len() == 20_000 - 100);
        assert!(asked < 1 << 21 && left > pairs(20_000) * 9 / 10, "{asked} {left}");
        // A large one without any: the comparisons that there is room for.
        let (edges, asked, left) = outcome(100_000, u64::MAX, 1 << 22);
        assert!(edges.is_empty() && (1 << 22..(1 << 22) + 100_000).contains(&asked), "{asked}");
        assert_eq!(asked as u64 + left, pairs(100_000));
        // And with some documents at least, whatever the room.
        assert!(outcome(1_000_000, u64::MAX, 1 << 22).1 > 31_000_000);
    }
}
