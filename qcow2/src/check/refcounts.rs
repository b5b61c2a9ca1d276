//! On-disk refcounts: reading them, and the blocks that hold them.

use byteorder::{BigEndian, ByteOrder};

use super::{CheckError, FindingKind, Kind, ReadAt, Walk, index, pieces, read};

/// Bits 9 to 63 of a refcount table entry: where the block lies.
pub(super) const OFFSET: u64 = !0x1ff;

/// The refcounts in `bytes`, cut off at 2^32-1, which no number of references reaches.
fn each_count(bytes: &[u8], order: u32, mut put: impl FnMut(u32)) {
    match order {
        0..=2 => {
            let width = 1_u32 << order;
            let mask = 0xff_u8 >> (8 - width);
            for &byte in bytes {
                for nth in 0..8 / width {
                    put(u32::from(byte >> (nth * width) & mask));
                }
            }
        }
        3 => bytes.iter().for_each(|&byte| put(byte.into())),
        4 => bytes.chunks_exact(2).for_each(|count| put(BigEndian::read_u16(count).into())),
        5 => bytes.chunks_exact(4).for_each(|count| put(BigEndian::read_u32(count))),
        _ => bytes.chunks_exact(8).for_each(|count| {
            put(u32::try_from(BigEndian::read_u64(count)).unwrap_or(u32::MAX));
        }),
    }
}

impl<R: ReadAt + ?Sized> Walk<'_, R> {
    /// Reads the refcounts of all clusters of the file into the slots.
    pub(super) fn load_refcounts(&mut self) -> Result<(), CheckError> {
        let image = self.image;
        let table = self.head.refcount_table;
        let blocks = (self.state.slots.len() as u64).div_ceil(1 << self.head.block_bits());
        let end = table.start.saturating_add(table.len.min(blocks.saturating_mul(8)));
        pieces(image, table.start, end, |at, bytes| {
            for (nth, word) in bytes.chunks_exact(8).enumerate() {
                let block = BigEndian::read_u64(word) & OFFSET;
                if block == 0 {
                    continue;
                }
                let entry = (at - table.start) / 8 + nth as u64;
                self.load_block(block, entry << self.head.block_bits())?;
            }
            Ok(())
        })
    }

    fn load_block(&mut self, block: u64, first: u64) -> Result<(), CheckError> {
        let order = self.head.refcount_order;
        let slots = self.state.slots.get_mut(index(first)..).unwrap_or_default();
        // Only as much of the block as there are clusters: a block of 2 MiB covers a million.
        let bytes = ((slots.len() as u64) << order).div_ceil(8).next_multiple_of(16);
        let mut slots = slots.iter_mut();
        let end = block.saturating_add(bytes.min(self.head.cluster_size()));
        pieces(self.image, block, end, |_, bytes| {
            each_count(bytes, order, |count| {
                if let Some(slot) = slots.next() {
                    slot.count = count;
                }
            });
            Ok(())
        })
    }

    /// The on-disk refcount of any cluster, also behind the end of the file.
    pub(super) fn refcount(&self, cluster: u64) -> Result<u64, CheckError> {
        if let Some(slot) = self.state.slots.get(index(cluster)) {
            return Ok(slot.count.into());
        }
        let table = self.head.refcount_table;
        let at = (cluster >> self.head.block_bits()) * 8;
        if at >= table.len {
            return Ok(0);
        }
        let mut word = [0; 8];
        read(self.image, table.start.saturating_add(at), &mut word)?;
        let block = BigEndian::read_u64(&word) & OFFSET;
        if block == 0 {
            return Ok(0);
        }
        let nth = cluster & ((1 << self.head.block_bits()) - 1);
        let first_bit = nth << self.head.refcount_order;
        // The eight bytes around it, from a multiple of its width on.
        let around = first_bit / 64 * 8;
        read(self.image, block.saturating_add(around), &mut word)?;
        let mut left = (first_bit % 64) >> self.head.refcount_order;
        let mut found = 0;
        each_count(&word, self.head.refcount_order, |count| {
            if left == 0 {
                found = count;
            }
            left = left.wrapping_sub(1);
        });
        Ok(found.into())
    }

    /// Counts the references to refcount blocks; the last of all references to be counted.
    pub(super) fn refcount_blocks(&mut self) -> Result<(), CheckError> {
        let image = self.image;
        let table = self.head.refcount_table;
        pieces(image, table.start, table.start.saturating_add(table.len), |at, bytes| {
            for (nth, word) in bytes.chunks_exact(8).enumerate() {
                let word = BigEndian::read_u64(word);
                if word != 0 {
                    self.refcount_block(at + nth as u64 * 8, word)?;
                }
            }
            Ok(())
        })
    }

    fn refcount_block(&mut self, at: u64, word: u64) -> Result<(), CheckError> {
        let offset = word & OFFSET;
        if word & !OFFSET != 0 {
            self.state.bad_blocks = true;
            self.note(FindingKind::ReservedBits, at, word, 0, 1);
            return Ok(());
        }
        if self.head.in_cluster(offset) != 0 {
            self.state.bad_blocks = true;
            self.note(FindingKind::Unaligned, at, word, 0, 1);
            return Ok(());
        }
        let cluster = offset >> self.head.cluster_bits;
        if cluster >= self.state.used_slots as u64 {
            self.state.bad_blocks = true;
            self.note(FindingKind::BeyondEnd, at, word, 0, 1);
            return Ok(());
        }
        self.mark(offset, self.head.cluster_size(), Kind::REFCOUNT_BLOCK, 1, at)?;
        let refs = self.state.slots[index(cluster)].refs;
        self.state.bad_blocks |= refs != 1;
        let refs = refs.min(self.head.largest_refcount());
        if refs != 1 {
            self.note(FindingKind::SharedRefcountBlock, at, refs.into(), 1, 1);
        }
        Ok(())
    }
}
