//! Growth of the refcount table: the last phases of a round, when the file has become longer than
//! the table can count.
//!
//! The new table lies at the end of the file, together with the refcount blocks for the range that
//! it opens, which count all of these clusters themselves:
//!
//! ```text
//!   … old end │ refcount blocks (k) │ new table (t clusters) │ fresh …
//! ```
//!
//! Both are durable before the header names them: sector 0 is written in one piece, so a crash
//! leaves the old table or the new one, each complete. The old table is given back afterwards. All
//! this happens at the end of a round, with mappings and tables standing still, so that the copy is
//! of a table that is durable itself.

use crate::cache::set_refcount_in;
use crate::engine::Engine;
use crate::error::IoErrorKind;
use crate::flush::Phase;
use crate::geometry::Geometry;
use crate::header::{Extent, MAX_REFCOUNT_TABLE_BYTES};
use crate::mark;
use crate::metaset::Fixed;
use crate::op::OpKind;
use crate::optable::Owner;
use crate::planted::{self, Bug};
use crate::table::Table;
use crate::units::HostCluster;

/// A refcount table on its way.
#[derive(Clone, Debug)]
pub(crate) struct Grown {
    /// Its first cluster is the first of the refcount blocks.
    first: u64,
    blocks: u64,
    table_clusters: u64,
    table: Table,
}

/// How many blocks and table clusters are needed at `first`: the blocks have to count both.
fn plan(geometry: Geometry, first: u64, old_clusters: u64) -> (u64, u64) {
    let block_of = |cluster: u64| cluster >> geometry.refblock_bits();
    let (mut blocks, mut table) = (1, old_clusters + old_clusters / 2 + 1);
    loop {
        let last = first + blocks + table - 1;
        let need_blocks = block_of(last) - block_of(first) + 1;
        let need_table = geometry.clusters_for((block_of(last) + 1) * Geometry::ENTRY_BYTES);
        if need_blocks <= blocks && need_table <= table {
            return (blocks, table);
        }
        blocks = blocks.max(need_blocks);
        table = table.max(need_table);
    }
}

impl Engine {
    /// Begins to grow if that is what somebody waits for; else the round is at its end.
    pub(crate) fn grow_extend(&mut self) -> bool {
        if self.round.waiting {
            return false;
        }
        if self.allocator.must_grow && self.allocator.has_new_blocks() {
            // The copy must be of a table whose every entry is on disk.
            self.round.wanted = true;
            self.round.enter(Phase::End);
            return true;
        }
        if !self.allocator.must_grow {
            self.round.enter(Phase::End);
            return true;
        }
        let geometry = self.geometry();
        let old = self.refcount_table.extent();
        let first = self.allocator.next_fresh;
        let (blocks, table_clusters) = plan(geometry, first, geometry.clusters_for(old.len));
        let len = table_clusters << geometry.cluster_bits();
        if len > MAX_REFCOUNT_TABLE_BYTES {
            self.give_up_growing(IoErrorKind::NoSpace);
            return true;
        }
        if self.claim(first, blocks + table_clusters).is_err() {
            return false;
        }
        let whole = Extent {
            offset: first << geometry.cluster_bits(),
            len: (blocks + table_clusters) << geometry.cluster_bits(),
        };
        self.metadata.set_range(Fixed::Moving, whole, geometry);
        if planted::is(Bug::ReleaseBeforeSecured) {
            let clusters = geometry.clusters_for(old.len);
            self.quarantine.lower_only(old.offset >> geometry.cluster_bits(), clusters);
        }
        let mut words = self.refcount_table.words().to_vec();
        words.resize(usize::try_from(len / 8).expect("at most 2^20 entries"), 0);
        let first_block = first >> geometry.refblock_bits();
        for block in 0..blocks {
            let index = usize::try_from(first_block + block).expect("within the table");
            words[index] = (first + block) << geometry.cluster_bits();
        }
        let extent = Extent { offset: (first + blocks) << geometry.cluster_bits(), len };
        let table = Table::new(words, extent, geometry.page_bits());
        self.round.grown = Some(Grown { first, blocks, table_clusters, table });
        self.round.waiting = true;
        // An extending ahead of need may be in flight: both only make the file longer.
        let to = extent.end().max(self.file_len);
        self.emit(Owner::ExtendGrown, OpKind::Extend { from: self.extend_from(), to });
        false
    }

    /// Clusters of a refcount table that the header may not name any more.
    pub(crate) fn moving(&self) -> u64 {
        let old = self.geometry().clusters_for(self.refcount_table.extent().len);
        self.round.grown.as_ref().map_or(0, |_| old)
    }

    fn give_up_growing(&mut self, kind: IoErrorKind) {
        self.allocator.must_grow = false;
        self.round.grown = None;
        self.metadata.set_range(Fixed::Moving, Extent { offset: 0, len: 0 }, self.geometry());
        self.no_fresh(kind);
        self.round.enter(Phase::End);
    }

    pub(crate) fn finish_grow_extend(&mut self, kind: OpKind, result: Result<(), IoErrorKind>) {
        let OpKind::Extend { to, .. } = kind else { unreachable!("an extend") };
        match result {
            Ok(()) => {
                self.file_len = self.file_len.max(to);
                self.round.enter(Phase::GrowWrite);
            }
            Err(kind) => self.give_up_growing(kind),
        }
    }

    /// Writes blocks and table, page by page; fresh space has the pages of zeros already.
    pub(crate) fn grow_write(&mut self) -> bool {
        let geometry = self.geometry();
        let per_cluster = 1 << (geometry.cluster_bits() - geometry.page_bits());
        while self.ops.has_staging() {
            let grown = self.round.grown.as_ref().expect("growing");
            let page = self.round.cursor as u64;
            if page == (grown.blocks + grown.table_clusters) * per_cluster {
                self.round.enter(Phase::SyncGrown);
                return true;
            }
            self.round.cursor += 1;
            let mut bytes = [0; Geometry::MAX_PAGE];
            let bytes = &mut bytes[..geometry.page_size()];
            let offset = grown.page(page, geometry, bytes);
            if self.options.fixed_size || bytes.iter().any(|&byte| byte != 0) {
                let id = self.emit_meta_write(Owner::Grown, offset, bytes.len());
                self.ops.staging_mut(id).copy_from_slice(bytes);
                self.round.writes += 1;
            }
        }
        false
    }

    pub(crate) fn grow_header(&mut self) -> bool {
        if !self.ops.has_staging() {
            return false;
        }
        self.round.writes += 1;
        let len = self.options.alignment as usize;
        let id = self.emit_meta_write(Owner::Header, 0, len);
        let grown = self.round.grown.as_ref().expect("growing");
        let header = self.header.with_refcount_table(grown.table.extent(), len);
        self.ops.staging_mut(id)[..len].copy_from_slice(header);
        self.round.enter(Phase::SyncHeader);
        true
    }

    /// The header that names the new table is durable.
    pub(crate) fn finish_growing(&mut self) {
        let Some(grown) = self.round.grown.take() else { return };
        let geometry = self.geometry();
        let old = self.refcount_table.extent();
        self.metadata.set_range(Fixed::Moving, Extent { offset: 0, len: 0 }, geometry);
        self.metadata.set_range(Fixed::RefcountTable, grown.table.extent(), geometry);
        for block in 0..grown.blocks {
            self.metadata.insert(grown.first + block);
        }
        self.stats.allocated_metadata += grown.blocks + grown.table_clusters;
        self.allocator.skip_fresh(grown.first + grown.blocks + grown.table_clusters);
        self.allocator.must_grow = false;
        self.refcount_table = grown.table;
        let at = HostCluster::new(old.offset >> geometry.cluster_bits());
        mark!("grow.moved");
        if planted::is(Bug::ReleaseBeforeSecured) {
            return;
        }
        // The header that named it is overwritten, durably: it is unlinked already, but takes the
        // same way as all others.
        self.quarantine(at.expect("checked at open"), geometry.clusters_for(old.len));
    }
}

impl Grown {
    /// Fills `out` with page `page` of blocks and table, and returns its offset in the file.
    fn page(&self, page: u64, geometry: Geometry, out: &mut [u8]) -> u64 {
        let per_cluster_bits = geometry.cluster_bits() - geometry.page_bits();
        let offset = (self.first << geometry.cluster_bits()) + (page << geometry.page_bits());
        let block_pages = self.blocks << per_cluster_bits;
        if page >= block_pages {
            let page = usize::try_from(page - block_pages).expect("within the table");
            self.table.copy_page(page, out, |_| false);
            return offset;
        }
        let (block, within) = (page >> per_cluster_bits, page & ((1 << per_cluster_bits) - 1));
        let first_block = self.first >> geometry.refblock_bits();
        let start = ((first_block + block) << geometry.refblock_bits())
            + (within << geometry.refcount_page_bits());
        let used = self.first..self.first + self.blocks + self.table_clusters;
        let order = geometry.refcount_width().trailing_zeros();
        out.fill(0);
        for step in 0..1 << geometry.refcount_page_bits() {
            if used.contains(&(start + step)) {
                let index = usize::try_from(step).expect("within a page");
                set_refcount_in(out, order, index, 1);
            }
        }
        offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_blocks_count_themselves_and_the_table() {
        for cluster_bits in [9, 12, 16, 21] {
            let geometry = Geometry::new(cluster_bits, 4);
            for old in [1, 2, 7, 100] {
                let first = old << (cluster_bits - 3 + geometry.refblock_bits());
                for first in [first, first + 1, first + geometry.refcounts_per_block() - 1] {
                    let (blocks, table) = plan(geometry, first, old);
                    let last = first + blocks + table - 1;
                    let block_of = |cluster: u64| cluster >> geometry.refblock_bits();
                    assert!(block_of(last) - block_of(first) < blocks, "{cluster_bits} {old}");
                    assert!(block_of(last) < table << (cluster_bits - 3), "{cluster_bits} {old}");
                    assert!(table > old, "it grows");
                }
            }
        }
    }
}
