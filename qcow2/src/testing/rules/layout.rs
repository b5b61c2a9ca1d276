//! Where the tables lie in any state that a crash may leave, and what their words say.

use core::ops::Range;
use std::vec::Vec;

use crate::testing::disk::{Disk, Structure, What};
use crate::testing::pool::{SECTOR, WORDS};
use crate::testing::rules::COPIED;
use crate::testing::size;

/// The cluster that a word of L1, L2 or the refcount table names.
pub(super) fn pointer(word: u64, bits: u32) -> Option<u64> {
    let offset = word & 0x00ff_ffff_ffff_fe00;
    (offset != 0).then_some(offset >> bits)
}

/// An entry that a crash may leave, and what it points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    pub(super) cluster: u64,
    pub(super) copied: bool,
    /// The guest cluster, if it is an L2 entry.
    pub(super) guest: Option<u64>,
}

/// All tables that any crash state may have.
pub(super) struct Layout {
    pub(super) bits: u32,
    /// Sectors of the L1 table; it does not move.
    pub(super) l1: Range<usize>,
    /// L1 index and cluster of each L2 table.
    tables: Vec<(u64, u64)>,
    /// Sectors of each refcount table; there are two while it moves.
    reftables: Vec<Range<usize>>,
    /// Index and cluster of each refcount block.
    blocks: Vec<(u64, u64)>,
}

/// Can a crash leave only one content in this sector?
pub(super) fn is_settled(disk: &Disk, sector: usize) -> bool {
    let mut all = disk.possible(sector);
    let first = all.next();
    all.all(|other| Some(other) == first)
}

/// Calls `f` with index and value of each word, not 0, that may be in these sectors.
fn each_word(disk: &Disk, sectors: &Range<usize>, mut f: impl FnMut(u64, u64)) {
    let pool = disk.pool().borrow();
    let mut sector_of = |sector: usize, id| {
        if id == super::SectorId::ZERO {
            return;
        }
        for (at, &word) in pool.words(id).iter().enumerate().filter(|(_, word)| **word != 0) {
            f(((sector - sectors.start) * WORDS + at) as u64, word);
        }
    };
    let end = sectors.end.min(disk.durable.len());
    for sector in sectors.start..end {
        sector_of(sector, disk.durable[sector]);
    }
    for change in disk.changes() {
        if let What::Write { first, ids } = &change.what {
            for (sector, &id) in (*first..).zip(ids.iter()) {
                if sectors.contains(&sector) {
                    sector_of(sector, id);
                }
            }
        }
    }
}

/// Every refcount of a cluster that a crash may leave, through the table at these sectors.
pub(super) fn refcounts_through(
    disk: &Disk,
    table: &Range<usize>,
    cluster: u64,
    bits: u32,
) -> Vec<u64> {
    let block_bits = bits - 1;
    let index = size(cluster >> block_bits);
    let within = size(cluster & ((1 << block_bits) - 1));
    let sector = table.start + index / WORDS;
    if !table.contains(&sector) {
        return std::vec![0];
    }
    let pool = disk.pool().borrow();
    let mut found = Vec::new();
    for id in disk.possible(sector) {
        let Some(block) = pointer(pool.words(id)[index % WORDS], bits) else {
            found.push(0);
            continue;
        };
        let at = size(block << bits) / SECTOR + within * 2 / SECTOR;
        for id in disk.possible(at) {
            let word = pool.words(id)[within / 4 % WORDS];
            found.push((word >> (48 - 16 * (within % 4))) & 0xffff);
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

impl Layout {
    /// Reads what the disk may hold.
    pub(super) fn of(disk: &Disk) -> Self {
        let pool = disk.pool().borrow();
        let header = *pool.words(disk.durable.first().copied().unwrap_or_default());
        let bits = u32::try_from(header[2] & 0xffff_ffff).expect("32 bits");
        // Word 4: crypt method and L1 size; word 5: L1 offset.
        let l1 = size(header[5]) / SECTOR;
        let l1 = l1..l1 + (size(header[4] & 0xffff_ffff) * 8).div_ceil(SECTOR);
        let mut layout =
            Self { bits, l1, tables: Vec::new(), reftables: Vec::new(), blocks: Vec::new() };
        for id in disk.possible(0) {
            let table = layout.table_of(pool.words(id));
            if !layout.reftables.contains(&table) {
                layout.reftables.push(table);
            }
        }
        drop(pool);
        let mut found = Vec::new();
        each_word(disk, &layout.l1, |index, word| {
            found.extend(pointer(word, bits).map(|cluster| (index, cluster)));
        });
        layout.tables = found;
        let mut found = Vec::new();
        for table in &layout.reftables {
            each_word(disk, table, |index, word| {
                found.extend(pointer(word, bits).map(|cluster| (index, cluster)));
            });
        }
        layout.blocks = found;
        for list in [&mut layout.tables, &mut layout.blocks] {
            list.sort_unstable();
            list.dedup();
        }
        layout
    }

    /// The sectors of the refcount table that this header names.
    pub(super) fn table_of(&self, header: &[u64; WORDS]) -> Range<usize> {
        let first = size(header[6]) / SECTOR;
        first..first + size((header[7] >> 32) << self.bits) / SECTOR
    }

    pub(super) fn sectors_per_cluster(&self) -> usize {
        (1 << self.bits) / SECTOR
    }

    /// Entries of an L2 table.
    pub(super) fn entries(&self) -> u64 {
        1 << (self.bits - 3)
    }

    pub(super) fn structure(&self, sector: usize) -> Structure {
        let cluster = (sector / self.sectors_per_cluster()) as u64;
        let is = |&(_, at): &(u64, u64)| at == cluster;
        let per_cluster = self.sectors_per_cluster();
        let whole = |range: &Range<usize>| {
            range.contains(&sector) || sector / per_cluster == (range.end - 1) / per_cluster
        };
        match cluster {
            0 => Structure::Header,
            _ if whole(&self.l1) => Structure::L1,
            _ if self.reftables.iter().any(whole) => Structure::RefcountTable,
            _ if self.blocks.iter().any(is) => Structure::RefcountBlock,
            _ if self.tables.iter().any(is) => Structure::L2,
            _ => Structure::NewTable,
        }
    }

    /// The guest cluster of the first entry in a sector of an L2 table.
    pub(super) fn guest_cluster_of(&self, sector: usize) -> u64 {
        let cluster = (sector / self.sectors_per_cluster()) as u64;
        let table = self.tables.iter().find(|(_, at)| *at == cluster).expect("an L2 table");
        table.0 * self.entries() + ((sector % self.sectors_per_cluster()) * WORDS) as u64
    }

    /// The cluster whose refcount is the first in a sector of a refcount block.
    pub(super) fn counted_from(&self, sector: usize) -> u64 {
        let cluster = (sector / self.sectors_per_cluster()) as u64;
        let block = self.blocks.iter().find(|(_, at)| *at == cluster).expect("a block");
        (block.0 << (self.bits - 1)) + ((sector % self.sectors_per_cluster()) * WORDS * 4) as u64
    }

    /// Every refcount of a cluster that a crash may leave.
    pub(super) fn refcounts(&self, disk: &Disk, cluster: u64) -> Vec<u64> {
        let through = |table| refcounts_through(disk, table, cluster, self.bits);
        let mut all: Vec<u64> = self.reftables.iter().flat_map(through).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Every entry that a crash may leave, of L1, L2, refcount table and header.
    pub(super) fn references(&self, disk: &Disk) -> Vec<Reference> {
        let mut found = Vec::new();
        let plain = |cluster| Reference { cluster, copied: false, guest: None };
        found.extend(self.blocks.iter().map(|&(_, cluster)| plain(cluster)));
        let per_cluster = self.sectors_per_cluster();
        for table in self.reftables.iter().chain([&self.l1]) {
            let clusters = table.start / per_cluster..table.end.div_ceil(per_cluster);
            found.extend(clusters.map(|cluster| plain(cluster as u64)));
        }
        for &(index, cluster) in &self.tables {
            found.push(Reference { cluster, copied: true, guest: None });
            let first = size(cluster) * per_cluster;
            each_word(disk, &(first..first + per_cluster), |at, word| {
                if word & super::COMPRESSED == 0
                    && let Some(cluster) = pointer(word, self.bits)
                {
                    let guest = Some(index * self.entries() + at);
                    found.push(Reference { cluster, copied: word & COPIED != 0, guest });
                }
            });
        }
        found
    }
}
