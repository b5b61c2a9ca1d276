//! The set of host clusters that hold metadata, asked before every write of anything else.
//!
//! An image can contradict itself: an L2 entry that points to a refcount block would let the guest
//! write refcounts. QEMU calls the check against this "overlap check"; here it is on in release
//! builds. The set grows with the file: 16 bytes (a half-full table of 8-byte slots) per L2 table
//! and refcount block; header, L1 and refcount table are kept as ranges.
//!
//! A cluster that is to hold a table enters the set before anything of the table is written
//! ([`Engine::claim`]): an entry may lead there though it is free by its refcount.

use alloc::vec;
use alloc::vec::Vec;

use crate::engine::Engine;
use crate::error::{FailureKind, IoErrorKind};
use crate::geometry::Geometry;
use crate::header::Extent;
use crate::request::{RequestId, Segment, Step, Stop};

/// Clusters with metadata. An open-addressing hash set; 0 marks an empty slot, since cluster 0 is
/// the header's and is kept as a range.
#[derive(Clone, Debug)]
pub(crate) struct MetaSet {
    slots: Vec<u64>,
    len: usize,
    crowded: bool,
    /// Clusters `start..end`: the header, the L1 table, the refcount table, and where that moves.
    ranges: [(u64, u64); 4],
}

/// More steps to find a cluster are no accident.
const MAX_PROBES: usize = 512;

/// Which range of clusters: a place in `ranges`, whose first is the header's for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fixed {
    L1 = 1,
    RefcountTable = 2,
    Moving = 3,
}

impl MetaSet {
    /// An empty set with room for `expected` clusters before it has to grow.
    pub(crate) fn new(expected: usize) -> Self {
        let slots = (expected * 2).next_power_of_two().max(64);
        Self {
            slots: vec![0; slots],
            len: 0,
            crowded: false,
            ranges: [(0, 1), (0, 0), (0, 0), (0, 0)],
        }
    }

    /// Says where a fixed table lies. False if that overlaps what is known.
    pub(crate) fn set_range(&mut self, which: Fixed, extent: Extent, geometry: Geometry) -> bool {
        let start = extent.offset >> geometry.cluster_bits();
        let end = start + geometry.clusters_for(extent.len);
        self.ranges[which as usize] = (0, 0);
        let free = !(start..end).any(|cluster| self.contains(cluster));
        self.ranges[which as usize] = (start, end);
        free
    }

    fn home(&self, cluster: u64) -> usize {
        // Fibonacci hashing: the high bits of the product are well mixed.
        let hash = cluster.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        usize::try_from(hash).expect("32 bits") & (self.slots.len() - 1)
    }

    #[inline]
    pub(crate) fn contains(&self, cluster: u64) -> bool {
        if self.ranges.iter().any(|&(start, end)| start <= cluster && cluster < end) {
            return true;
        }
        let mask = self.slots.len() - 1;
        let mut at = self.home(cluster);
        while self.slots[at] != 0 {
            if self.slots[at] == cluster {
                return true;
            }
            at = (at + 1) & mask;
        }
        false
    }

    /// Is any of the `count` clusters from `start` on in the set?
    pub(crate) fn overlaps(&self, start: u64, count: u64) -> bool {
        (start..start + count).any(|cluster| self.contains(cluster))
    }

    /// Adds a cluster. False if it was there.
    pub(crate) fn insert(&mut self, cluster: u64) -> bool {
        if self.contains(cluster) {
            return false;
        }
        if (self.len + 1) * 2 > self.slots.len() {
            let doubled = vec![0; self.slots.len() * 2];
            let old = core::mem::replace(&mut self.slots, doubled);
            for cluster in old.into_iter().filter(|&cluster| cluster != 0) {
                self.place(cluster);
            }
        }
        self.place(cluster);
        self.len += 1;
        true
    }

    /// Takes a cluster out.
    pub(crate) fn remove(&mut self, cluster: u64) {
        let mask = self.slots.len() - 1;
        let mut hole = self.home(cluster);
        while self.slots[hole] != cluster {
            if self.slots[hole] == 0 {
                return;
            }
            hole = (hole + 1) & mask;
        }
        self.slots[hole] = 0;
        self.len -= 1;
        // Close the gap: move back every later entry of the chain whose home is not after it.
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let entry = self.slots[at];
            if entry == 0 {
                return;
            }
            let home = self.home(entry);
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.slots[hole] = entry;
                self.slots[at] = 0;
                hole = at;
            }
        }
    }

    fn place(&mut self, cluster: u64) {
        let mask = self.slots.len() - 1;
        let mut at = self.home(cluster);
        let mut probes = 0;
        while self.slots[at] != 0 {
            at = (at + 1) & mask;
            probes += 1;
        }
        self.slots[at] = cluster;
        self.crowded |= probes > MAX_PROBES;
    }

    /// Do the clusters lie so that looking one up takes long? At most half full, a table has runs
    /// of a few dozen by chance; more is an image made to slow us down.
    pub(crate) fn is_crowded(&self) -> bool {
        self.crowded
    }

    /// Bytes of memory.
    pub(crate) fn memory(&self) -> u64 {
        self.slots.len() as u64 * 8
    }
}

impl Engine {
    /// Tables are to lie in `count` clusters from `start` on, which were reserved, or come behind
    /// all that is in use. Fails where guest data is on its way there: it could land on the table.
    pub(crate) fn claim(&mut self, start: u64, count: u64) -> Step<()> {
        let bits = self.geometry().cluster_bits();
        let hit = |at: u64, clusters: u64| at < start + count && start < at + clusters;
        let filled = |segment: &Segment| hit(segment.host.index(), segment.count);
        let is_filled = |&writer: &RequestId| self.requests[writer].segments().any(filled);
        let is_written = self.writers.iter().any(is_filled)
            || self.ops.writes_guest_data(start << bits..(start + count) << bits);
        // No table lies in an external data file, whose clusters have numbers of their own.
        if is_written && !self.decoder.data_file {
            self.fail(FailureKind::Overlap, start << bits);
            return Err(Stop::Fail(IoErrorKind::Io));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_inserted_is_found_and_nothing_else() {
        let mut set = MetaSet::new(0);
        for cluster in (7..10_000).step_by(7) {
            assert!(set.insert(cluster));
            assert!(!set.insert(cluster));
        }
        for cluster in 1..10_000 {
            assert_eq!(set.contains(cluster), cluster % 7 == 0, "{cluster}");
        }
        assert!(set.contains(0), "the header is always in it");
        assert!(set.overlaps(8, 7) && !set.overlaps(8, 6));
    }

    #[test]
    fn what_is_removed_is_gone_and_nothing_else() {
        let mut set = MetaSet::new(0);
        for cluster in 1..3000 {
            set.insert(cluster * cluster);
        }
        for cluster in (1..3000).step_by(3) {
            set.remove(cluster * cluster);
            set.remove(cluster * cluster);
        }
        for cluster in 1..3000 {
            assert_eq!(set.contains(cluster * cluster), cluster % 3 != 1, "{cluster}");
        }
    }

    #[test]
    fn a_range_that_overlaps_is_reported() {
        let geometry = Geometry::new(16, 4);
        let mut set = MetaSet::new(0);
        assert!(set.insert(5));
        let extent = |cluster: u64, len| Extent { offset: cluster << 16, len };
        assert!(set.set_range(Fixed::L1, extent(1, 8), geometry));
        assert!(!set.set_range(Fixed::RefcountTable, extent(1, 1 << 16), geometry));
        assert!(!set.set_range(Fixed::RefcountTable, extent(4, 2 << 16), geometry));
        assert!(set.set_range(Fixed::RefcountTable, extent(2, 2 << 16), geometry));
        assert!(set.contains(3) && !set.contains(4));
        assert!(set.set_range(Fixed::RefcountTable, extent(6, 2 << 16), geometry), "it moved");
        assert!(!set.contains(3) && set.contains(7));
    }
}
