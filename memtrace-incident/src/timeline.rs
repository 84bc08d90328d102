//! The memory curve in the incident file. It is stored as columns because a file has thousands of
//! readings: a column compresses well, and its name is written once.

use serde::{Deserialize, Serialize};

use crate::capped;

/// The memory curve of a cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Timeline {
    /// The readings, as columns of equal length.
    pub columns: Columns,
    /// Readings that were left out: older parts of the curve are stored at a lower resolution.
    pub thinned: u64,
}

/// The readings of a curve. Row i of every column is one reading.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Columns {
    /// When the reading was taken, boot clock, ascending.
    #[serde(deserialize_with = "capped::rows")]
    pub boot_ns: Vec<u64>,
    /// Usage of the cgroup, which the kernel compares with the limit.
    #[serde(deserialize_with = "capped::rows")]
    pub usage_bytes: Vec<Option<u64>>,
    /// Hard limit of the cgroup; null when it has none.
    #[serde(deserialize_with = "capped::rows")]
    pub limit_bytes: Vec<Option<u64>>,
    /// Highest usage so far (the kernel's watermark).
    #[serde(deserialize_with = "capped::rows")]
    pub watermark_bytes: Vec<Option<u64>>,
    /// Resident anonymous memory of its processes, summed.
    #[serde(deserialize_with = "capped::rows")]
    pub anon_bytes: Vec<u64>,
    /// Resident file pages of its processes, summed. A page mapped by two processes counts twice.
    #[serde(deserialize_with = "capped::rows")]
    pub file_bytes: Vec<u64>,
    /// Resident shared memory of its processes, summed. A page mapped by two processes counts
    /// twice.
    #[serde(deserialize_with = "capped::rows")]
    pub shmem_bytes: Vec<u64>,
    /// Swap entries of its processes, summed.
    #[serde(deserialize_with = "capped::rows")]
    pub swap_bytes: Vec<u64>,
    /// Swap usage of the cgroup, as the kernel counts it; on cgroup v1 memory and swap together.
    #[serde(deserialize_with = "capped::rows")]
    pub swap_usage_bytes: Vec<Option<u64>>,
    /// Limit for `swap_usage_bytes`; null when there is none.
    #[serde(deserialize_with = "capped::rows")]
    pub swap_limit_bytes: Vec<Option<u64>>,
}
