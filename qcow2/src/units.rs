//! Units as types: guest and host offsets and cluster numbers cannot be mixed up.
//!
//! Conversions between offsets and clusters go through [`Geometry`](crate::Geometry), which knows
//! the cluster size of the image.

use core::num::NonZeroU64;

/// A byte offset on the virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// The number of a guest cluster: guest offset divided by the cluster size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestCluster(pub u64);

/// A byte offset in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

/// The number of the smallest piece of the virtual disk that has a mapping of its own: a subcluster
/// in an image with extended L2 entries, else a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestUnit(pub u64);

/// The number of a host cluster. Cluster 0 holds the header and is never referenced by a table, so
/// zero is free to mean "none".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostCluster(pub NonZeroU64);

impl HostCluster {
    /// The cluster of number `index`, unless that is the header's.
    #[must_use]
    pub fn new(index: u64) -> Option<Self> {
        NonZeroU64::new(index).map(Self)
    }

    /// The plain number.
    #[must_use]
    pub fn index(self) -> u64 {
        self.0.get()
    }

    /// The cluster `count` further on in the file.
    #[must_use]
    pub fn plus(self, count: u64) -> Self {
        Self(self.0.checked_add(count).expect("cluster numbers stay below 2^55"))
    }
}

/// A number of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterCount(pub u64);
