//! The two top-level tables, L1 and refcount table, which stay in memory as a whole.
//!
//! Their memory grows with the file, 8 bytes per L2 table or refcount block: a 1 TiB image of
//! 64 KiB clusters has 2048 L1 entries (16 KiB) and, when full, 512 refcount blocks.

use alloc::vec;
use alloc::vec::Vec;

use byteorder::{BigEndian, ByteOrder};

use crate::header::Extent;

/// A top-level table and which of its pages differ from what was last sent to the disk.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    extent: Extent,
    words: Vec<u64>,
    page_bits: u32,
    dirty: Vec<bool>,
    dirty_pages: usize,
}

impl Table {
    /// The table in `bytes`, which lies at `extent`; `page_bits` is log2 of the unit of writing.
    pub(crate) fn parse(bytes: &[u8], extent: Extent, page_bits: u32) -> Self {
        assert_eq!(bytes.len() as u64, extent.len, "the caller reads all of the table");
        let words = bytes.chunks_exact(8).map(BigEndian::read_u64).collect();
        Self::new(words, extent, page_bits)
    }

    pub(crate) fn new(words: Vec<u64>, extent: Extent, page_bits: u32) -> Self {
        let pages = (words.len() * 8).div_ceil(1 << page_bits);
        Self { extent, words, page_bits, dirty: vec![false; pages], dirty_pages: 0 }
    }

    pub(crate) fn extent(&self) -> Extent {
        self.extent
    }

    pub(crate) fn len(&self) -> u64 {
        self.words.len() as u64
    }

    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    pub(crate) fn get(&self, index: u64) -> Option<u64> {
        self.words.get(usize::try_from(index).ok()?).copied()
    }

    pub(crate) fn set(&mut self, index: u64, word: u64) {
        let index = usize::try_from(index).expect("an index into a table in memory");
        self.words[index] = word;
        let page = (index * 8) >> self.page_bits;
        self.dirty_pages += usize::from(!self.dirty[page]);
        self.dirty[page] = true;
    }

    /// The page with entry `index` has to be written again.
    pub(crate) fn touch(&mut self, index: u64) {
        let word = self.get(index).expect("an index into a table in memory");
        self.set(index, word);
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.dirty_pages != 0
    }

    /// Takes the first dirty page at or after `from`: it counts as clean from now on.
    pub(crate) fn take_dirty(&mut self, from: usize) -> Option<usize> {
        if self.dirty_pages == 0 {
            return None;
        }
        let page = from + self.dirty.get(from..)?.iter().position(|&dirty| dirty)?;
        self.dirty[page] = false;
        self.dirty_pages -= 1;
        Some(page)
    }

    /// Where page `page` lies in the file.
    pub(crate) fn offset_of(&self, page: usize) -> u64 {
        self.extent.offset + ((page as u64) << self.page_bits)
    }

    /// Fills `out`, one page, with page `page`, leaving out entries that are `hidden`. What lies
    /// behind the last entry is zero, as the rest of the table's last cluster is nobody's.
    pub(crate) fn copy_page(&self, page: usize, out: &mut [u8], hidden: impl Fn(u64) -> bool) {
        let first = page << (self.page_bits - 3);
        for (index, bytes) in (first..).zip(out.chunks_exact_mut(8)) {
            let word = self.words.get(index).copied().unwrap_or(0);
            let word = if word != 0 && hidden(index as u64) { 0 } else { word };
            BigEndian::write_u64(bytes, word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_pages_are_taken_once_and_in_order() {
        let extent = Extent { offset: 4096, len: 4096 };
        let mut table = Table::parse(&[0; 4096], extent, 9);
        table.set(511, 7);
        table.set(0, 1);
        table.set(1, 2);
        assert_eq!(table.take_dirty(0), Some(0));
        assert_eq!(table.take_dirty(1), Some(7));
        assert_eq!(table.take_dirty(0), None);
        assert!(!table.is_dirty());
        let mut page = [0xff; 512];
        table.copy_page(7, &mut page, |_| false);
        assert_eq!(page[503..], [0, 0, 0, 0, 0, 0, 0, 0, 7]);
        assert_eq!(table.offset_of(7), 4096 + 7 * 512);
    }
}
