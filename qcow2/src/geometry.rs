//! The constants of an image: cluster size and what follows from it.

use crate::units::{GuestCluster, GuestOffset, HostCluster, HostOffset};

/// Cluster size, entry sizes and what follows from them. Does not change while the image is open;
/// the virtual size is not in it, since that can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
    /// Extended L2 entries: 16 bytes, 32 subclusters.
    extended: bool,
}

impl Geometry {
    /// The largest cached piece of a table, in bytes: one host page.
    pub const MAX_PAGE: usize = 4096;
    /// An L1, refcount table or standard L2 entry takes 8 bytes.
    pub const ENTRY_BYTES: u64 = 8;

    pub(crate) fn new(cluster_bits: u32, refcount_order: u32) -> Self {
        assert!((9..=21).contains(&cluster_bits), "the header parser checks the cluster size");
        assert!(refcount_order <= 6, "the header parser checks the refcount width");
        Self { cluster_bits, refcount_order, extended: false }
    }

    /// The same with extended L2 entries, which need clusters of at least 16 KiB.
    pub(crate) fn with_extended_l2(self) -> Self {
        assert!(self.cluster_bits >= 14, "the header parser checks the cluster size");
        Self { extended: true, ..self }
    }

    /// Does each L2 entry describe 32 subclusters (specification: "Extended L2 Entries")?
    #[must_use]
    pub fn has_extended_l2(self) -> bool {
        self.extended
    }

    /// Bytes that have a mapping of their own: a subcluster, or a cluster.
    #[must_use]
    pub fn unit_size(self) -> u64 {
        1 << self.unit_bits()
    }

    /// log2 of [`unit_size`](Self::unit_size).
    pub(crate) fn unit_bits(self) -> u32 {
        self.cluster_bits - self.units_bits()
    }

    /// log2 of the units per cluster: 5 or 0.
    pub(crate) fn units_bits(self) -> u32 {
        if self.extended { 5 } else { 0 }
    }

    /// The bits of all units of a cluster.
    pub(crate) fn all_units(self) -> u32 {
        if self.extended { u32::MAX } else { 1 }
    }

    /// log2 of the bytes of an L2 entry.
    pub(crate) fn entry_bits(self) -> u32 {
        if self.extended { 4 } else { 3 }
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
        self.cluster_bits - self.entry_bits()
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

    /// Bytes before the byte with refcount number `index` of a block.
    pub(crate) fn refcount_bytes(self, index: u64) -> u64 {
        (index << self.refcount_order) >> 3
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
