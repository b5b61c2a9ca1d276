//! The options of one image, from the command line to the engine.

use crate::error::{OpenError, OpenErrorInner};

/// How an image is to be served. All sizes are in bytes unless said otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Refuse writes; nothing is ever written to the file.
    pub read_only: bool,
    /// Queues that submit requests.
    pub queues: u16,
    /// Requests that may be outstanding per queue.
    pub depth: u16,
    /// Budget for cached L2 slices. `None`: enough for the whole image, at most 32 MiB.
    pub l2_cache: Option<u64>,
    /// Budget for cached refcount slices.
    pub refcount_cache: u64,
    /// Metadata operations that may be in flight at the same time.
    pub staging: u16,
    /// Offset and length of every access to the file are multiples of this (512 or 4096).
    pub alignment: u32,
    /// Host space that is reserved ahead of need: refcounts raised, the file extended. A crash
    /// leaks at most so much.
    pub reservation: u64,
    /// What a discard does.
    pub discards: Discards,
    /// The file is a block device: it does not grow, and what lies behind the last cluster in use
    /// may be anything.
    pub fixed_size: bool,
    /// For tests: two slices per cache and one staging slot, so that every wait is waited.
    pub stress: bool,
    /// Start a flush of our own when something has been volatile for so long, in milliseconds.
    pub max_dirty_ms: u64,
    /// Recovery: mappings that are not durable yet are kept in a [journal](crate::journal) with so
    /// many records in each of its two segments. 0: there is none, and a killed process is as a
    /// power cut. A full segment makes writes of new clusters wait for a round.
    pub journal: u32,
}

/// What a discard of whole clusters does. They read as zeros afterwards, unless it is ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discards {
    /// Give the host space back.
    Unmap,
    /// Keep it, as a zero cluster (in a raw data file, filled with zeros): writes to it need no new
    /// space.
    Keep,
    /// Nothing.
    Ignore,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            read_only: false,
            queues: 1,
            depth: 128,
            l2_cache: None,
            refcount_cache: 1 << 20,
            staging: 32,
            alignment: 512,
            reservation: 16 << 20,
            discards: Discards::Unmap,
            fixed_size: false,
            stress: false,
            max_dirty_ms: 5000,
            journal: 0,
        }
    }
}

impl Options {
    /// The cache size that `None` stands for is never above this, as in QEMU.
    pub const MAX_DEFAULT_L2_CACHE: u64 = 32 << 20;

    /// Records in a segment of the journal: 128 MiB.
    pub const MAX_JOURNAL: u32 = 4 << 20;

    pub(crate) fn validate(&self, cluster_size: u64) -> Result<(), OpenError> {
        let bad =
            |what, value, expected| Err(OpenErrorInner::Option { what, value, expected }.into());
        if self.queues == 0 {
            return bad("the number of queues", 0, "at least 1");
        }
        if self.depth == 0 || self.depth > 4096 {
            return bad("the queue depth", self.depth.into(), "1 to 4096");
        }
        if self.alignment != 512 && self.alignment != 4096 {
            return bad("the alignment", self.alignment.into(), "512 or 4096");
        }
        if u64::from(self.alignment) > cluster_size {
            return bad("the alignment", self.alignment.into(), "at most the cluster size");
        }
        if self.journal > Self::MAX_JOURNAL {
            return bad("the size of the journal", self.journal.into(), "at most 4194304 records");
        }
        if self.staging == 0 {
            return bad("the number of metadata operations in flight", 0, "at least 1");
        }
        Ok(())
    }
}
