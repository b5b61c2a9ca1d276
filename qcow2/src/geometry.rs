//! The constants of an image: cluster size and what follows from it.

use crate::units::{GuestCluster, GuestOffset, HostCluster, HostOffset};

/// Cluster size, entry sizes and what follows from them. Does not change while the image is open;
/// the virtual size is not in it, since that can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
}

impl Geometry {
    /// The largest cached piece of a table, in bytes: one host page.
    pub const MAX_PAGE: usize = 4096;
    /// An L1, L2 or refcount table entry takes 8 bytes.
    pub const ENTRY_BYTES: u64 = 8;

    pub(crate) fn new(cluster_bits: u32, refcount_order: u32) -> Self {
        assert!((9..=21).contains(&cluster_bits), "the header parser checks the cluster size");
        assert!(refcount_order <= 6, "the header parser checks the refcount width");
        Self { cluster_bits, refcount_order }
    }

    /// log2 of the cluster size.
    #[must_use]
    pub fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// Bytes per cluster, 512 to 2 Mi.
    #[must_use]
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes per cached piece of a table: min(4 KiB, cluster), so that no piece crosses a cluster.
    #[must_use]
    pub fn page_size(self) -> usize {
        1 << self.page_bits()
    }

    pub(crate) fn page_bits(self) -> u32 {
        self.cluster_bits.min(12)
    }

    /// Entries of one L2 table.
    #[must_use]
    pub fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    pub(crate) fn l2_bits(self) -> u32 {
        self.cluster_bits - 3
    }

    /// Clusters whose refcounts one refcount block holds.
    #[must_use]
    pub fn refcounts_per_block(self) -> u64 {
        1 << self.refblock_bits()
    }

    pub(crate) fn refblock_bits(self) -> u32 {
        // cluster size in bits over bits per refcount: 2^(cluster_bits + 3 - refcount_order)
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Clusters whose refcounts one cached piece of a refcount block holds.
    pub(crate) fn refcount_page_bits(self) -> u32 {
        self.page_bits() + 3 - self.refcount_order
    }

    /// Bits of one refcount: 1 to 64.
    #[must_use]
    pub fn refcount_width(self) -> u32 {
        1 << self.refcount_order
    }

    /// L1 entries that a virtual disk of `size` bytes needs (specification: "Cluster mapping").
    #[must_use]
    pub fn l1_entries_for(self, size: u64) -> u64 {
        size.div_ceil(1 << (self.cluster_bits + self.l2_bits()))
    }

    pub(crate) fn cluster_of(self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    pub(crate) fn within(self, offset: GuestOffset) -> u64 {
        offset.0 & (self.cluster_size() - 1)
    }

    pub(crate) fn host_start(self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.index() << self.cluster_bits)
    }

    /// The number of clusters that `bytes` bytes touch, from a cluster boundary on.
    pub(crate) fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }
}
