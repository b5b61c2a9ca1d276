//! Small images, made in code: an independent and minimal writer of qcow2.

use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use crate::testing::guest::guest_sector;
use crate::testing::pool::{Pool, SECTOR, SectorId};
use crate::testing::size;

/// What an image is to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSpec {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Bytes of the virtual disk.
    pub guest: u64,
    /// Guest clusters that are allocated, and hold data: one in so many; 0 for none.
    pub every: u64,
    /// Bytes of what lies beneath; 0 for nothing.
    pub backing: u64,
    /// The L1 table is made so long that the file ends a few clusters before a limit.
    pub near: Option<Limit>,
}

/// What a file is soon too long for, and in how many clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Its first refcount block.
    Block(u64),
    /// Its refcount table.
    Table(u64),
}

/// The name of the backing file in the header.
pub const BACKING_NAME: &str = "beneath.raw";

/// An image and what the guest finds in it.
#[derive(Clone, Debug)]
pub struct Made {
    /// The file.
    pub bytes: Vec<u8>,
    /// The file beneath.
    pub backing: Option<Rc<[u8]>>,
    /// What each guest sector reads as.
    pub content: Vec<SectorId>,
}

/// Inflates a deflate stream of stored blocks only (RFC 1951, 3.2.4), to exactly `len` bytes.
#[must_use]
pub fn inflate_stored(mut bytes: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    loop {
        let (&head, rest) = bytes.split_first()?;
        let count = usize::from(u16::from_le_bytes([*rest.first()?, *rest.get(1)?]));
        let inverse = u16::from_le_bytes([*rest.get(2)?, *rest.get(3)?]);
        if head & 6 != 0 || usize::from(!inverse) != count {
            return None;
        }
        out.extend_from_slice(rest.get(4..4 + count)?);
        bytes = &rest[4 + count..];
        if head & 1 != 0 {
            return (out.len() == len).then_some(out);
        }
    }
}

/// The number of the write that made what lies beneath, and what was there at first.
const BENEATH: u64 = 1 << 40;
const AT_FIRST: u64 = 1 << 41;

struct Writer {
    bytes: Vec<u8>,
    bits: u32,
    next: u64,
}

impl Writer {
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let offset = size(offset);
        if self.bytes.len() < offset + bytes.len() {
            self.bytes.resize(offset + bytes.len(), 0);
        }
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Takes clusters at the end of the file.
    fn take(&mut self, clusters: u64) -> u64 {
        let at = self.next << self.bits;
        self.next += clusters;
        self.bytes.resize(size(self.next << self.bits), 0);
        at
    }
}

impl ImageSpec {
    /// Makes it.
    ///
    /// # Panics
    /// If the refcount table of one cluster is too small for it.
    #[must_use]
    pub fn make(&self, pool: &mut Pool) -> Made {
        let bits = self.cluster_bits;
        let cluster = 1_u64 << bits;
        let entries = cluster / 8;
        let per_block = 1_u64 << (bits - 1);
        let mut file = Writer { bytes: Vec::new(), bits, next: 1 };
        let table = file.take(1);
        let need_l1 = self.guest.div_ceil(cluster * entries);
        let mut l1_entries = need_l1;
        // Header, table, its blocks; a table and a cluster for each that is allocated.
        let filled =
            (self.guest / cluster).checked_div(self.every).map_or(0, |used| need_l1 + used);
        match self.near {
            Some(Limit::Table(left)) => {
                l1_entries = (entries * per_block - 2 - entries - filled - left) * entries;
            }
            Some(Limit::Block(left)) => l1_entries = (per_block - 3 - filled - left) * entries,
            None => {}
        }
        let l1 = file.take((l1_entries * 8).div_ceil(cluster));
        let mut beneath = Vec::new();
        for place in 0..self.backing.div_ceil(SECTOR as u64) {
            let id = pool.intern_words(&guest_sector(place, BENEATH));
            beneath.extend(pool.bytes(id));
        }
        beneath.truncate(size(self.backing));
        let mut content: Vec<SectorId> =
            beneath.chunks(SECTOR).map(|sector| pool.intern(sector)).collect();
        content.resize(size(self.guest) / SECTOR, SectorId::ZERO);
        let backing = (self.backing != 0).then(|| Rc::from(beneath));
        if self.every != 0 {
            self.fill(&mut file, l1, &mut content, pool);
        }
        let blocks = self.count(&mut file, table);
        assert!(blocks <= entries, "one cluster of refcount table counts the whole file");
        self.header(&mut file, (table, l1, l1_entries));
        Made { bytes: file.bytes, backing, content }
    }

    /// Allocates guest clusters.
    fn fill(&self, file: &mut Writer, l1: u64, content: &mut [SectorId], pool: &mut Pool) {
        let cluster = 1_u64 << self.cluster_bits;
        let entries = cluster / 8;
        let per_cluster = size(cluster) / SECTOR;
        let mut tables: Vec<Option<u64>> = vec![None; content.len()];
        for guest in (0..self.guest / cluster).step_by(size(self.every)) {
            let index = guest / entries;
            let table = *tables[size(index)].get_or_insert_with(|| {
                let at = file.take(1);
                file.put(l1 + index * 8, &(at | 1 << 63).to_be_bytes());
                at
            });
            let at = file.take(1);
            file.put(table + guest % entries * 8, &(at | 1 << 63).to_be_bytes());
            for step in 0..per_cluster {
                let place = size(guest) * per_cluster + step;
                let id = pool.intern_words(&guest_sector(place as u64, AT_FIRST));
                file.put(at + (step * SECTOR) as u64, &pool.bytes(id));
                content[place] = id;
            }
        }
    }

    /// Writes the refcount blocks, which count themselves.
    fn count(&self, file: &mut Writer, table: u64) -> u64 {
        let per_block = 1_u64 << (self.cluster_bits - 1);
        let mut blocks = 1;
        while (file.next + blocks).div_ceil(per_block) > blocks {
            blocks += 1;
        }
        let at = file.take(blocks);
        for block in 0..blocks {
            let block_at = at + (block << self.cluster_bits);
            file.put(table + block * 8, &block_at.to_be_bytes());
        }
        for cluster in 0..file.next {
            // Blocks lie one after the other, so refcounts do, too.
            file.put(at + cluster * 2, &1_u16.to_be_bytes());
        }
        blocks
    }

    fn header(&self, file: &mut Writer, (table, l1, l1_entries): (u64, u64, u64)) {
        let l1_entries = u32::try_from(l1_entries).expect("a small L1 table");
        file.put(0, b"QFI\xfb");
        file.put(4, &self.version.to_be_bytes());
        file.put(20, &self.cluster_bits.to_be_bytes());
        file.put(24, &self.guest.to_be_bytes());
        file.put(36, &l1_entries.to_be_bytes());
        file.put(40, &l1.to_be_bytes());
        file.put(48, &table.to_be_bytes());
        file.put(56, &1_u32.to_be_bytes());
        let mut end = 72;
        if self.version == 3 {
            file.put(96, &4_u32.to_be_bytes());
            file.put(100, &104_u32.to_be_bytes());
            end = 104;
        }
        if self.backing != 0 {
            file.put(end, &0xe279_2aca_u32.to_be_bytes());
            file.put(end + 4, &3_u32.to_be_bytes());
            file.put(end + 8, b"raw");
            let name = end + 24;
            file.put(name, BACKING_NAME.as_bytes());
            file.put(8, &name.to_be_bytes());
            let len = u32::try_from(BACKING_NAME.len()).expect("a short name");
            file.put(16, &len.to_be_bytes());
        }
    }
}
