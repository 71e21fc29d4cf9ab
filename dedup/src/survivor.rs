//! Which copy of a document survives.

use serde::{Deserialize, Serialize};

/// Survivor policy: a total order of the members of a cluster, whatever order they were found in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// The smallest ordinal.
    #[default]
    Earliest,
    /// The most bytes of text, the smallest ordinal among equals.
    Longest,
}
