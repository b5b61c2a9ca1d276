//! What an engine says of itself: counters, memory, health.

use crate::error::Failure;

/// Counters since open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Guest reads that were replied to.
    pub reads: u64,
    /// Guest writes that were replied to.
    pub writes: u64,
    /// Guest write zeroes and discards that were replied to.
    pub zeroes: u64,
    /// Guest FLUSHes that were replied to.
    pub flushes: u64,
    /// Guest writes with FUA that were replied to; also counted as writes.
    pub fua_writes: u64,
    /// fdatasyncs issued.
    pub syncs: u64,
    /// Host clusters allocated for guest data.
    pub allocated_data: u64,
    /// Host clusters allocated for metadata.
    pub allocated_metadata: u64,
    /// Clusters of guest data that were filled with more than what was written to them, each part
    /// counted: before the write, behind it.
    pub copies: u64,
    /// Bytes that took.
    pub copied_bytes: u64,
    /// L2 pages that were looked for and were there. (A request that had to wait looks again.)
    pub l2_hits: u64,
    /// L2 pages that had to be read.
    pub l2_misses: u64,
    /// Refcount pages that were looked for and were there.
    pub refcount_hits: u64,
    /// Refcount pages that had to be read.
    pub refcount_misses: u64,
    /// Metadata reads issued.
    pub metadata_reads: u64,
    /// Metadata writes issued.
    pub metadata_writes: u64,
    /// Requests that ended with an error.
    pub errors: u64,
    /// Host clusters whose refcounts are raised ahead of need, now.
    pub reserved: u64,
    /// Host clusters on their way to being free, now.
    pub quarantined: u64,
    /// Mappings that wait for their data to become durable, now.
    pub overlay: u64,
}

/// Memory in use, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Budget of the L2 and refcount caches; committed by use.
    pub caches: u64,
    /// L1 table, refcount table and the set of metadata clusters, and the L1 tables of the layers
    /// beneath; grows with the image.
    pub tables: u64,
}

/// Whether the image still takes writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// All is well.
    Good,
    /// A metadata write or an fdatasync failed, or the image contradicts itself: writes and
    /// FLUSHes fail from now on, reads go on.
    Failed(Failure),
}
