//! The format as the tests know it: what a header says, and what the bits of table words mean.
//!
//! Judge and rules share this, and nothing of it comes from the engine.

use crate::testing::pool::{SECTOR, WORDS};
use crate::testing::size;

/// Bit 63 of an L1 or L2 entry: the refcount is exactly one.
pub(crate) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: compressed.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry: reads as zeros.
pub(crate) const ZERO: u64 = 1;
/// Bits 9 to 55: a place in the file.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What a header says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) version: u64,
    /// log2 of the cluster size.
    pub(crate) bits: u32,
    /// log2 of the bits of a refcount.
    pub(crate) order: u32,
    pub(crate) extended: bool,
    pub(crate) data_file: bool,
    /// The data file reads like the virtual disk.
    pub(crate) raw: bool,
    pub(crate) guest_sectors: usize,
    /// First sector of the L1 table, and its entries.
    pub(crate) l1: (usize, usize),
    /// First sector of the refcount table, and how many there are.
    pub(crate) table: (usize, usize),
    /// First sector of the snapshot table, and its entries.
    pub(crate) snapshots: (usize, usize),
}

/// What one unit (a cluster, or one of its 32 subclusters) reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// What lies beneath.
    Nothing,
    Zeros,
    Data,
}

/// An L1 table: its first sector and its entries.
pub(crate) type L1 = (usize, usize);

impl Format {
    /// Reads the first sector of a file.
    pub(crate) fn of(words: &[u64; WORDS]) -> Option<Self> {
        let low = |word: u64| word & 0xffff_ffff;
        let bits = u32::try_from(low(words[2])).expect("32 bits");
        let version = low(words[0]);
        if words[0] >> 32 != 0x5146_49fb || !(9..=21).contains(&bits) {
            return None;
        }
        let sector = |offset: u64| size(offset) / SECTOR;
        let three = version >= 3;
        Some(Self {
            version,
            bits,
            order: if three { u32::try_from(words[12] >> 32).ok()? } else { 4 },
            extended: three && words[9] & 1 << 4 != 0,
            data_file: three && words[9] & 1 << 2 != 0,
            raw: three && words[11] & 1 << 1 != 0,
            guest_sectors: sector(words[3]),
            l1: (sector(words[5]), size(low(words[4]))),
            table: (sector(words[6]), sector((words[7] >> 32) << bits)),
            snapshots: (sector(words[8]), size(low(words[7]))),
        })
    }

    /// Sectors per cluster.
    pub(crate) fn sectors(&self) -> usize {
        (1 << self.bits) / SECTOR
    }

    /// Words of an L2 entry.
    pub(crate) fn entry_words(&self) -> usize {
        if self.extended { 2 } else { 1 }
    }

    /// Entries of an L2 table.
    pub(crate) fn entries(&self) -> usize {
        (1 << self.bits) / (8 * self.entry_words())
    }

    /// Parts of a cluster that have a mapping of their own.
    pub(crate) fn units(&self) -> usize {
        if self.extended { 32 } else { 1 }
    }

    /// log2 of the refcounts in a block.
    pub(crate) fn block_bits(&self) -> u32 {
        self.bits + 3 - self.order
    }

    /// Refcounts in a word, and in a sector.
    pub(crate) fn counts_per_word(&self) -> usize {
        64 >> self.order
    }

    pub(crate) fn counts_per_sector(&self) -> usize {
        WORDS * self.counts_per_word()
    }

    /// Refcount number `lane` of a word. Those smaller than a byte fill it from its low end.
    pub(crate) fn count_in(&self, word: u64, lane: usize) -> u64 {
        let (width, lane) = (1 << self.order, u32::try_from(lane).expect("below 64"));
        let shift = match width {
            1..8 => 56 - (lane * width / 8 * 8) + lane * width % 8,
            _ => 64 - width * (lane + 1),
        };
        word >> shift & (u64::MAX >> (64 - width))
    }

    /// The cluster that a word of L1, L2 or the refcount table names.
    pub(crate) fn pointer(&self, word: u64) -> Option<u64> {
        let offset = word & OFFSET;
        (offset != 0).then_some(offset >> self.bits)
    }

    /// The bytes that a compressed entry refers to: whole sectors at the end.
    pub(crate) fn span(&self, word: u64) -> core::ops::Range<u64> {
        let x = 62 - (self.bits - 8);
        let offset = word & ((1 << x) - 1);
        let sectors = ((word & !COMPRESSED) >> x) + 1;
        offset..offset / 512 * 512 + sectors * 512
    }

    /// The host clusters that an L2 entry counts, each once.
    pub(crate) fn counted(&self, word: u64) -> core::ops::Range<u64> {
        if self.data_file {
            return 0..0;
        }
        if word & COMPRESSED != 0 {
            let span = self.span(word);
            return span.start >> self.bits..span.end.div_ceil(1 << self.bits);
        }
        self.pointer(word).map_or(0..0, |cluster| cluster..cluster + 1)
    }

    /// What unit number `unit` of an entry reads as that is not compressed.
    pub(crate) fn unit(&self, [word, bitmap]: [u64; 2], unit: usize) -> Unit {
        if self.extended {
            return match (bitmap >> unit & 1, bitmap >> (32 + unit) & 1) {
                (_, 1) => Unit::Zeros,
                (1, _) => Unit::Data,
                _ => Unit::Nothing,
            };
        }
        let allocated = if self.data_file { word & COPIED != 0 } else { word & OFFSET != 0 };
        match word & ZERO {
            0 if allocated => Unit::Data,
            0 => Unit::Nothing,
            _ => Unit::Zeros,
        }
    }

    /// The entries in a sector of an L2 table, with their number in it.
    pub(crate) fn entries_of<'a>(
        &self,
        words: &'a [u64; WORDS],
    ) -> impl Iterator<Item = (usize, [u64; 2])> + 'a + use<'a> {
        let step = self.entry_words();
        let entry = move |at: usize| [words[at], if step == 2 { words[at + 1] } else { 0 }];
        (0..WORDS).step_by(step).map(move |at| (at / step, entry(at)))
    }

    /// The L1 tables in the first sector of a snapshot table.
    pub(crate) fn snapshot_tables(&self, words: &[u64; WORDS]) -> std::vec::Vec<L1> {
        let mut found = std::vec::Vec::new();
        let mut at = 0;
        for _ in 0..self.snapshots.1 {
            let Some(entry) = words.get(at..at + 5) else { break };
            found.push((size(entry[0]) / SECTOR, size(entry[1] >> 32)));
            let names = (entry[1] >> 16 & 0xffff) + (entry[1] & 0xffff);
            let len = 40 + names + (entry[4] & 0xffff_ffff);
            at += size(len.div_ceil(8));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_lie_where_the_specification_says() {
        let of = |order| Format { order, ..Format::default() };
        let word = 0x0123_4567_89ab_cdef;
        assert_eq!(of(6).count_in(word, 0), word);
        assert_eq!(of(5).count_in(word, 1), 0x89ab_cdef);
        assert_eq!(of(4).count_in(word, 0), 0x0123);
        assert_eq!(of(3).count_in(word, 7), 0xef);
        assert_eq!((of(2).count_in(word, 0), of(2).count_in(word, 3)), (1, 2));
        assert_eq!((of(1).count_in(word, 0), of(1).count_in(word, 4)), (1, 3));
        assert_eq!((of(0).count_in(word, 0), of(0).count_in(word, 63)), (1, 1));
        assert_eq!(of(0).count_in(word, 1), 0);
    }
}
