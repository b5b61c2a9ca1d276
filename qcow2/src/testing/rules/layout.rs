//! Where the tables lie in any state that a crash may leave, and what their words say.

use core::ops::Range;
use std::vec::Vec;

use crate::testing::disk::{Disk, Structure, What};
use crate::testing::format::{COMPRESSED, COPIED, Format};
use crate::testing::pool::{SECTOR, SectorId, WORDS};
use crate::testing::size;

/// An entry that a crash may leave, and what it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    pub(super) cluster: u64,
    pub(super) copied: bool,
    pub(super) from: From,
}

/// What refers: two entries of which only one can be there are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum From {
    /// Header or refcount table.
    Fixed,
    /// The L1 entry of this number.
    L1(u64),
    /// The L2 entry of this guest cluster.
    Guest(u64),
    /// The L2 entry of this guest cluster, which is compressed.
    Compressed(u64),
    /// An entry of a snapshot's table: of the table, of the guest cluster.
    Snapshot(u64, u64),
}

/// All tables that any crash state may have.
pub(super) struct Layout {
    pub(super) format: Format,
    /// Sectors of the L1 table; it does not move.
    pub(super) l1: Range<usize>,
    /// L1 index, cluster and COPIED flag of each L2 table.
    tables: Vec<(u64, u64, bool)>,
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

/// Calls `f` with each content, not zeros, that may be in these sectors, and with its place there.
fn each_sector(disk: &Disk, sectors: &Range<usize>, mut f: impl FnMut(usize, &[u64; WORDS])) {
    let pool = disk.pool().borrow();
    let mut sector_of = |sector: usize, id| {
        if id != SectorId::ZERO {
            f(sector - sectors.start, pool.words(id));
        }
    };
    for sector in sectors.start..sectors.end.min(disk.durable.len()) {
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

/// Calls `f` with index and value of each word, not 0, that may be in these sectors.
fn each_word(disk: &Disk, sectors: &Range<usize>, mut f: impl FnMut(u64, u64)) {
    each_sector(disk, sectors, |step, words| {
        for (at, &word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
            f((step * WORDS + at) as u64, word);
        }
    });
}

/// Every refcount of a cluster that a crash may leave, through the table at these sectors.
pub(super) fn refcounts_through(
    disk: &Disk,
    table: &Range<usize>,
    cluster: u64,
    format: &Format,
) -> Vec<u64> {
    let index = size(cluster >> format.block_bits());
    let within = size(cluster & ((1 << format.block_bits()) - 1));
    let sector = table.start + index / WORDS;
    if !table.contains(&sector) {
        return std::vec![0];
    }
    let pool = disk.pool().borrow();
    let mut found = Vec::new();
    for id in disk.possible(sector) {
        let Some(block) = format.pointer(pool.words(id)[index % WORDS]) else {
            found.push(0);
            continue;
        };
        let at = size(block) * format.sectors() + within / format.counts_per_sector();
        for id in disk.possible(at) {
            let lanes = format.counts_per_word();
            let word = pool.words(id)[within / lanes % WORDS];
            found.push(format.count_in(word, within % lanes));
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// What the snapshots refer to: it is durable, and never changes.
pub(super) fn of_snapshots(disk: &Disk) -> Vec<Reference> {
    let pool = disk.pool().borrow();
    let durable = |sector: usize| disk.durable.get(sector).copied().unwrap_or_default();
    let mut found = Vec::new();
    let Some(format) = Format::of(pool.words(durable(0))) else { return found };
    if format.snapshots.1 == 0 {
        return found;
    }
    let mut add = |cluster: u64, table: u64, guest: u64| {
        let from = From::Snapshot(table, guest);
        found.push(Reference { cluster, copied: false, from });
    };
    let per_cluster = format.sectors();
    add((format.snapshots.0 / per_cluster) as u64, u64::MAX, 0);
    for (first, entries) in format.snapshot_tables(pool.words(durable(format.snapshots.0))) {
        let own = first as u64;
        for cluster in first / per_cluster..(first + entries.div_ceil(WORDS)).div_ceil(per_cluster)
        {
            add(cluster as u64, own, u64::MAX);
        }
        for index in 0..entries {
            let word = pool.words(durable(first + index / WORDS))[index % WORDS];
            let Some(table) = format.pointer(word) else { continue };
            add(table, own, u64::MAX - 1 - index as u64);
            for step in 0..per_cluster {
                let words = pool.words(durable(size(table) * per_cluster + step));
                let base = index * format.entries() + step * WORDS / format.entry_words();
                for (at, [word, _]) in format.entries_of(words) {
                    for cluster in format.counted(word) {
                        add(cluster, own, (base + at) as u64);
                    }
                }
            }
        }
    }
    found
}

impl Layout {
    /// Reads what the disk may hold.
    pub(super) fn of(disk: &Disk) -> Self {
        let pool = disk.pool().borrow();
        let header = disk.durable.first().copied().unwrap_or_default();
        let format = Format::of(pool.words(header)).expect("a header");
        let l1 = format.l1.0..format.l1.0 + (format.l1.1 * 8).div_ceil(SECTOR);
        let (tables, blocks) = (Vec::new(), Vec::new());
        let mut layout = Self { format, l1, tables, reftables: Vec::new(), blocks };
        for id in disk.possible(0) {
            let table = layout.table_of(pool.words(id));
            if !layout.reftables.contains(&table) {
                layout.reftables.push(table);
            }
        }
        drop(pool);
        each_word(disk, &layout.l1, |index, word| {
            let table = format.pointer(word).map(|at| (index, at, word & COPIED != 0));
            layout.tables.extend(table);
        });
        for table in &layout.reftables {
            each_word(disk, table, |index, word| {
                layout.blocks.extend(format.pointer(word).map(|cluster| (index, cluster)));
            });
        }
        layout.tables.sort_unstable();
        layout.tables.dedup();
        layout.blocks.sort_unstable();
        layout.blocks.dedup();
        layout
    }

    /// The sectors of the refcount table that this header names.
    pub(super) fn table_of(&self, header: &[u64; WORDS]) -> Range<usize> {
        let first = size(header[6]) / SECTOR;
        first..first + size((header[7] >> 32) << self.format.bits) / SECTOR
    }

    pub(super) fn structure(&self, sector: usize) -> Structure {
        let per_cluster = self.format.sectors();
        let cluster = (sector / per_cluster) as u64;
        let whole = |range: &Range<usize>| {
            range.contains(&sector) || sector / per_cluster == (range.end - 1) / per_cluster
        };
        match cluster {
            0 => Structure::Header,
            _ if whole(&self.l1) => Structure::L1,
            _ if self.reftables.iter().any(whole) => Structure::RefcountTable,
            _ if self.blocks.iter().any(|&(_, at)| at == cluster) => Structure::RefcountBlock,
            _ if self.tables.iter().any(|&(_, at, _)| at == cluster) => Structure::L2,
            _ => Structure::NewTable,
        }
    }

    /// The guest cluster of the first entry in a sector of an L2 table.
    pub(super) fn guest_cluster_of(&self, sector: usize) -> u64 {
        let (per_cluster, entries) = (self.format.sectors(), self.format.entries() as u64);
        let cluster = (sector / per_cluster) as u64;
        let table = self.tables.iter().find(|(_, at, _)| *at == cluster).expect("an L2 table");
        let within = sector % per_cluster * WORDS / self.format.entry_words();
        table.0 * entries + within as u64
    }

    /// The cluster whose refcount is the first in a sector of a refcount block.
    pub(super) fn counted_from(&self, sector: usize) -> u64 {
        let per_cluster = self.format.sectors();
        let cluster = (sector / per_cluster) as u64;
        let block = self.blocks.iter().find(|(_, at)| *at == cluster).expect("a block");
        let within = sector % per_cluster * self.format.counts_per_sector();
        (block.0 << self.format.block_bits()) + within as u64
    }

    /// Every refcount of a cluster that a crash may leave.
    pub(super) fn refcounts(&self, disk: &Disk, cluster: u64) -> Vec<u64> {
        let through = |table| refcounts_through(disk, table, cluster, &self.format);
        let mut all: Vec<u64> = self.reftables.iter().flat_map(through).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Every entry that a crash may leave, of L1, L2, refcount table and header.
    pub(super) fn references(&self, disk: &Disk) -> Vec<Reference> {
        let mut found = Vec::new();
        let plain = |cluster| Reference { cluster, copied: false, from: From::Fixed };
        found.extend(self.blocks.iter().map(|&(_, cluster)| plain(cluster)));
        let (format, per_cluster) = (&self.format, self.format.sectors());
        for table in self.reftables.iter().chain([&self.l1]) {
            let clusters = table.start / per_cluster..table.end.div_ceil(per_cluster);
            found.extend(clusters.map(|cluster| plain(cluster as u64)));
        }
        for &(index, cluster, copied) in &self.tables {
            found.push(Reference { cluster, copied, from: From::L1(index) });
            let first = size(cluster) * per_cluster;
            each_sector(disk, &(first..first + per_cluster), |step, words| {
                let base = size(index) * format.entries() + step * WORDS / format.entry_words();
                for (at, [word, _]) in format.entries_of(words) {
                    let guest = (base + at) as u64;
                    let from = match word & COMPRESSED {
                        0 => From::Guest(guest),
                        _ => From::Compressed(guest),
                    };
                    let copied = word & COPIED != 0;
                    let counted = format.counted(word);
                    found.extend(counted.map(|cluster| Reference { cluster, copied, from }));
                }
            });
        }
        found
    }
}
