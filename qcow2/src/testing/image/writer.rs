//! The file while it is being made: bytes, and how often each cluster is referred to.

use std::vec::Vec;

use crate::testing::size;

/// A file that grows at its end.
pub(super) struct Writer {
    pub(super) bytes: Vec<u8>,
    /// log2 of the cluster size.
    pub(super) bits: u32,
    /// How often each cluster is counted.
    counts: Vec<u64>,
}

impl Writer {
    /// With the cluster of the header.
    pub(super) fn new(bits: u32) -> Self {
        Self { bytes: std::vec![0; 1 << bits], bits, counts: std::vec![1] }
    }

    pub(super) fn put(&mut self, offset: u64, bytes: &[u8]) {
        let offset = size(offset);
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn put_word(&mut self, offset: u64, word: u64) {
        self.put(offset, &word.to_be_bytes());
    }

    pub(super) fn word(&self, offset: u64) -> u64 {
        let bytes = &self.bytes[size(offset)..size(offset) + 8];
        u64::from_be_bytes(bytes.try_into().expect("8 bytes"))
    }

    /// Clusters so far.
    pub(super) fn clusters(&self) -> u64 {
        self.counts.len() as u64
    }

    /// Takes clusters at the end of the file, and counts them once.
    pub(super) fn take(&mut self, clusters: u64) -> u64 {
        let at = self.clusters() << self.bits;
        self.counts.resize(self.counts.len() + size(clusters), 1);
        self.bytes.resize(self.counts.len() << self.bits, 0);
        at
    }

    /// Takes a cluster that nothing refers to yet.
    pub(super) fn take_uncounted(&mut self) -> u64 {
        let at = self.take(1);
        self.counts[size(at >> self.bits)] = 0;
        at
    }

    /// Counts clusters once more.
    pub(super) fn refer(&mut self, clusters: core::ops::Range<u64>) {
        for cluster in clusters {
            self.counts[size(cluster)] += 1;
        }
    }

    /// Counts clusters once less.
    pub(super) fn release(&mut self, clusters: core::ops::Range<u64>) {
        for cluster in clusters {
            self.counts[size(cluster)] -= 1;
        }
    }

    pub(super) fn count(&self, cluster: u64) -> u64 {
        self.counts[size(cluster)]
    }

    /// Writes the refcount blocks, which count themselves, and names them in the table.
    pub(super) fn write_refcounts(&mut self, table: u64, order: u32) {
        let per_block = 1_u64 << (self.bits + 3 - order);
        let mut blocks = 1;
        while (self.clusters() + blocks).div_ceil(per_block) > blocks {
            blocks += 1;
        }
        assert!(blocks <= (1 << self.bits) / 8, "one cluster of table counts the whole file");
        let at = self.take(blocks);
        for block in 0..blocks {
            self.put_word(table + block * 8, at + (block << self.bits));
        }
        for cluster in 0..self.clusters() {
            // Blocks lie one after the other, so refcounts do, too.
            let count = self.count(cluster);
            assert!(order == 6 || count >> (1 << order) == 0, "it can be counted");
            let bit = cluster << order;
            let byte = size(at + bit / 8);
            if order < 3 {
                self.bytes[byte] |= u8::try_from(count << (bit % 8)).expect("within a byte");
            } else {
                let width = 1 << (order - 3);
                self.bytes[byte..byte + width].copy_from_slice(&count.to_be_bytes()[8 - width..]);
            }
        }
    }
}
