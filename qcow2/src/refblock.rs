//! New refcount blocks: made where fresh clusters begin, and linked one fdatasync later.
//!
//! The block must be durable before the refcount table names it. The table page is written in the
//! meantime as if the entry were not there ([`hides`](crate::allocator::Allocator::hides)), once
//! more after the first fdatasync of the round, and what the block counts goes into the pool after
//! the second.

use crate::allocator::NewBlock;
use crate::cache::Lookup;
use crate::engine::Engine;
use crate::error::IoErrorKind;
use crate::mark;
use crate::op::OpKind;
use crate::optable::Owner;
use crate::units::HostCluster;

impl Engine {
    /// Does the cluster, which is to become a refcount block, hold zeros? Fresh space in a file
    /// does; on a block device that is seen to.
    fn is_zeroed(&mut self, cluster: u64) -> bool {
        if !self.options.fixed_size || self.allocator.zeroed_block == Some(cluster) {
            return true;
        }
        if !self.allocator.extending && self.ops.has_room() {
            self.allocator.extending = true;
            let offset = cluster << self.geometry().cluster_bits();
            let len = u32::try_from(self.geometry().cluster_size()).expect("at most 2 MiB");
            self.emit(Owner::NewBlock(cluster), OpKind::WriteZeros { offset, len });
        }
        false
    }

    pub(crate) fn finish_zeroed_block(&mut self, cluster: u64, result: Result<(), IoErrorKind>) {
        self.allocator.extending = false;
        match result {
            Ok(()) => self.allocator.zeroed_block = Some(cluster),
            Err(kind) => self.no_fresh(kind),
        }
    }

    /// A refcount block for the range that `cluster` lies in, at `cluster` itself: it counts
    /// itself. The space is fresh, so all of the block but that one entry is zeros on disk already.
    pub(crate) fn new_refcount_block(&mut self, cluster: u64) -> bool {
        if self.extended_over(cluster, 1) == 0 || !self.is_zeroed(cluster) {
            return false;
        }
        let geometry = self.geometry();
        let within = cluster & (geometry.refcounts_per_block() - 1);
        let block = HostCluster::new(cluster).expect("fresh clusters lie behind the header");
        let page = (geometry.host_start(block).0 + geometry.refcount_bytes(within))
            >> geometry.page_bits();
        let slot = match self.refcount_cache.lookup(page) {
            // Left by an attempt that ended just below: it is what the disk holds.
            Lookup::Hit(slot) => slot,
            Lookup::Loading => unreachable!("nobody reads a block that no table names"),
            Lookup::Absent => {
                let Some(slot) = self.refcount_cache.begin_load(page) else {
                    self.round.wanted |= self.refcount_cache.is_unclean();
                    return false;
                };
                self.refcount_cache.finish_zero(slot);
                slot
            }
        };
        if !self.refcount_cache.may_dirty(slot) {
            self.round.wanted = true;
            return false;
        }
        if self.claim(cluster, 1).is_err() {
            return false;
        }
        let index = within & ((1 << geometry.refcount_page_bits()) - 1);
        self.refcount_cache.set_refcount(slot, usize::try_from(index).expect("below 2^15"), 1);
        let entry = cluster >> geometry.refblock_bits();
        let round = self.next_round();
        mark!("reserve.new_refcount_block");
        self.allocator.new_blocks.push(NewBlock { index: entry, round, linked: false });
        self.refcount_table.set(entry, geometry.host_start(block).0);
        self.metadata.insert(cluster);
        self.allocator.next_fresh = cluster + 1;
        self.stats.allocated_metadata += 1;
        self.note_dirty();
        true
    }

    /// The first fdatasync of a round has returned: what was reserved before the round is durable.
    pub(crate) fn reserve_synced(&mut self, round: u64) {
        for block in &mut self.allocator.new_blocks {
            if block.round <= round && !block.linked {
                block.linked = true;
                // The page on disk had this entry hidden: it has to be written once more.
                self.refcount_table.touch(block.index);
            }
        }
        self.admit(round);
    }

    /// The second one has: so are the refcount table entries.
    pub(crate) fn tables_synced(&mut self, round: u64) {
        self.allocator.new_blocks.retain(|block| !block.linked);
        self.admit(round);
    }
}
