//! Repeated spans: runs of words that stand earlier in the corpus, too, are cut out of the texts.
//!
//! # What is cut
//!
//! A *window* is the shortest run of whole words from some word on that has at least `length` words (or bytes). It is a
//! repeat if the same window stands earlier in the corpus (in the order of the ordinals, then of the text), the first
//! of them ending before it begins. What repeats cover is cut; everything else stays. So every
//! repeated span of at least `length` goes but where it stands first, cuts begin and end at the border of a word (and
//! with that of a character), and a text that repeats itself keeps the first round. Every word that is cut has an equal one that
//! stays: it is that of an earlier window, and if that was cut, too, of one earlier still. With `words` two windows are the same if their words are, in lower case,
//! whatever stands between; with `bytes` if they are byte for byte.
//!
//! This says nothing of chunks, shards or threads, and so the result does not depend on them.
//!
//! # Why not one suffix array
//!
//! Lee et al. (2022) sort all suffixes of the corpus. That takes five to nine bytes of memory for each byte of a
//! chunk, and a repeat whose copies lie in different chunks is found only by merging, with the text of all chunks at hand: eight
//! bytes a byte on disk, read at random. But a suffix array answers more than what is asked here, repeats of every length. For one
//! length, equal windows can meet by their hash, and the only trouble is their number, one for each word. It is cut down by
//! *anchors*, the minimizers of Schleimer et al. (2003): the anchor of a window is, of the runs of half its length in it, the one
//! of the smallest hash. It is a function of what is in the window, so windows that are the same have the same anchor, and if an
//! anchor stands only once in the corpus, no window around it is a repeat. Neighbouring windows share anchors: one word in
//! fourteen begins one (2 / 27 for 50 words).
//!
//! So the text is read three times, and what is between is sorted runs on disk ([`crate::runs`]), of which a task holds one radix partition:
//!
//! | stage | task | output |
//! | --- | --- | --- |
//! | `substring_anchors` | document shard | runs: the hash of every anchor, once a section, and whether it was there more often |
//! | `substring_candidates` | partition of the anchors | runs: by shard, the anchors that the corpus has more than once |
//! | `substring_windows` | document shard | runs: 128-bit hash and place of every window around such an anchor |
//! | `substring_repeats` | partition of the windows | runs: by document, the windows that stand earlier, and where first |
//! | `substring` | document shard | documents without the repeats; dropped, where nothing is left |
//! | its table `substring_cuts` | | a row for every cut: `ordinal`, `start`, `bytes`, `first_ordinal`, `first_start`, `text` |
//!
//! Memory is a partition of some two million records (of up to 2²⁵ beyond 2²⁷), or the candidates and the merged repeats of one document shard; a window that
//! stands a million times is held once. On disk, with 50 words and a tenth of the corpus repeated: 0.11 bytes a byte of text for
//! anchors, half a byte for windows; of a corpus that is copies alone 2.9 bytes for windows, and as many for repeats.

use std::sync::Arc;

use pipeline::{Error, Result, Stage};
use serde::{Deserialize, Serialize};

use crate::partition::PARTITION_ROWS;
use crate::texts::Texts;

mod anchors;
mod cut;
mod repeats;
mod windows;

/// Name of the last stage, whose kept shards are documents.
pub const SUBSTRING: &str = "substring";
const ANCHORS: &str = "substring_anchors";
const CANDIDATES: &str = "substring_candidates";
const WINDOWS: &str = "substring_windows";
const REPEATS: &str = "substring_repeats";

/// How long a span is, and when two are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Words (Unicode's, UAX #29), compared in lower case and whatever stands between.
    #[default]
    Words,
    /// Bytes of whole words and what stands between, compared byte for byte.
    Bytes,
}

/// Removal of repeated spans in a recipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SubstringConfig {
    /// What `length` counts.
    pub measure: Measure,
    /// Words or bytes that a repeated span has at least.
    pub length: u32,
}

impl Default for SubstringConfig {
    fn default() -> Self {
        Self { measure: Measure::default(), length: 50 }
    }
}

/// The stages of the removal of repeated spans from the documents of `selection` (all, if `None`), whose text is
/// in stage `documents`. The last is called `substring`.
pub fn substring_stages(
    config: &SubstringConfig,
    documents: &str,
    selection: Option<&str>,
) -> Result<Vec<Arc<dyn Stage>>> {
    substring_stages_cut(config, documents, selection, PARTITION_ROWS, SECTION_RECORDS)
}

/// Records of a section, about: 32 MB.
const SECTION_RECORDS: usize = 1 << 20;

/// Where work is cut, which no result depends on.
#[derive(Clone, Copy)]
struct Sizes {
    /// Records of a partition at least, about.
    partition: u64,
    /// Records of a section.
    section: usize,
}

/// As [`substring_stages`], with partitions and sections of other sizes: what tests vary to show that no result depends
/// on them.
#[doc(hidden)]
pub fn substring_stages_cut(
    config: &SubstringConfig,
    documents: &str,
    selection: Option<&str>,
    partition: u64,
    section: usize,
) -> Result<Vec<Arc<dyn Stage>>> {
    let sizes = Sizes { partition, section };
    if config.length == 0 {
        return Err(Error::setting("substring.length", "must be at least 1"));
    }
    let input = Input { config: config.clone(), texts: Texts::new(documents, selection) };
    Ok(vec![
        Arc::new(anchors::Anchors { input: input.clone(), sizes }),
        Arc::new(anchors::Candidates { sizes }),
        Arc::new(repeats::Windows { input: input.clone(), sizes }),
        Arc::new(repeats::Repeats { sizes }),
        Arc::new(cut::Cut { texts: input.texts }),
    ])
}

/// The texts that are read, and what for.
#[derive(Clone)]
struct Input {
    config: SubstringConfig,
    texts: Texts,
}
