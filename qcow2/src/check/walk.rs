//! L1 and L2 tables, active and not.

use byteorder::{BigEndian, ByteOrder};

use super::{CheckError, FindingKind, Kind, ReadAt, Walk, index, pieces};

pub(super) const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;
pub(super) const ZERO: u64 = 1;
/// Bits 9 to 55: where a cluster lies.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// What is reserved in an L1 entry: bits 0 to 8 and 56 to 62.
pub(super) const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// What is reserved in a standard cluster descriptor: bits 1 to 8 and 56 to 61.
pub(super) const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// The allocation half of a subcluster bitmap.
const SUBCLUSTERS: u64 = 0xffff_ffff;

/// How often a table is referenced. The flag COPIED is only judged for active references.
#[derive(Clone, Copy)]
pub(super) struct Weight {
    pub(super) active: u32,
    pub(super) inactive: u32,
}

impl Weight {
    fn all(self) -> Result<u32, CheckError> {
        self.active.checked_add(self.inactive).ok_or(super::TOO_MANY)
    }
}

impl<R: ReadAt + ?Sized> Walk<'_, R> {
    pub(super) fn active_l1(&mut self) -> Result<(), CheckError> {
        let l1 = self.head.l1;
        self.mark(l1.start, l1.len, Kind::L1, 1, l1.start)?;
        self.l1(l1.start, l1.start.saturating_add(l1.len), Weight { active: 1, inactive: 0 })
    }

    /// Counts the references from the L1 entries between two places of the file.
    pub(super) fn l1(&mut self, start: u64, end: u64, weight: Weight) -> Result<(), CheckError> {
        let image = self.image;
        pieces(image, start, end, |at, bytes| {
            for (nth, word) in bytes.chunks_exact(8).enumerate() {
                let word = BigEndian::read_u64(word);
                if word != 0 {
                    self.l1_entry(at + nth as u64 * 8, word, weight)?;
                }
            }
            Ok(())
        })
    }

    fn l1_entry(&mut self, at: u64, word: u64, weight: Weight) -> Result<(), CheckError> {
        let all = weight.all()?;
        if word & L1_RESERVED != 0 {
            self.note(FindingKind::ReservedBits, at, word, 0, all);
        }
        let offset = word & OFFSET;
        let cluster = offset >> self.head.cluster_bits;
        self.mark(offset, self.head.cluster_size(), Kind::L2, all, at)?;
        if weight.active != 0 && offset != 0 {
            self.copied(at, word, cluster, weight.active)?;
        }
        if self.head.in_cluster(offset) == 0 && offset != 0 {
            // Walked later, once, however often it is referenced.
            if let Some(slot) = self.state.slots.get_mut(index(cluster)) {
                let (active, inactive) = (weight.active, weight.inactive);
                slot.active = slot.active.checked_add(active).ok_or(super::TOO_MANY)?;
                slot.inactive = slot.inactive.checked_add(inactive).ok_or(super::TOO_MANY)?;
            }
            return Ok(());
        }
        if offset != 0 {
            self.note(FindingKind::Unaligned, at, word, 0, all);
        }
        // Nothing good can come of what is there, but `qemu-img check` counts its references, and
        // so do we, as far as that does not make our work a multiple of the file.
        let spent = self.head.cluster_size();
        if offset >= self.len {
            return Ok(());
        }
        if spent <= self.state.budget {
            self.state.budget -= spent;
            // The flags of a table in the header's place are not judged.
            let active = if offset == 0 { 0 } else { weight.active };
            return self.l2(offset, Weight { active, inactive: all - active });
        }
        self.state.incomplete = true;
        Ok(())
    }

    /// Walks all L2 tables that were found.
    pub(super) fn l2_tables(&mut self) -> Result<(), CheckError> {
        for nth in 0..self.state.slots.len() {
            let slot = self.state.slots[nth];
            if slot.active | slot.inactive != 0 {
                let weight = Weight { active: slot.active, inactive: slot.inactive };
                self.l2((nth as u64) << self.head.cluster_bits, weight)?;
                (self.progress)(nth as u64, self.state.slots.len() as u64);
            }
        }
        Ok(())
    }

    fn l2(&mut self, offset: u64, weight: Weight) -> Result<(), CheckError> {
        let image = self.image;
        let all = weight.all()?;
        let extended = self.head.extended;
        self.state.expected_next = 0;
        pieces(image, offset, offset.saturating_add(self.head.cluster_size()), |at, bytes| {
            if extended {
                for (nth, entry) in bytes.chunks_exact(16).enumerate() {
                    let word = BigEndian::read_u64(entry);
                    let bitmap = BigEndian::read_u64(&entry[8..]);
                    if word | bitmap != 0 {
                        let at = at + nth as u64 * 16;
                        self.l2_entry(at, word, bitmap, weight.active, all)?;
                    }
                }
                return Ok(());
            }
            for (nth, entry) in bytes.chunks_exact(8).enumerate() {
                let word = BigEndian::read_u64(entry);
                if word != 0 {
                    self.l2_entry(at + nth as u64 * 8, word, 0, weight.active, all)?;
                }
            }
            Ok(())
        })
    }

    fn l2_entry(
        &mut self,
        at: u64,
        word: u64,
        bitmap: u64,
        active: u32,
        all: u32,
    ) -> Result<(), CheckError> {
        if word & COMPRESSED != 0 {
            return self.compressed(at, word, bitmap, active, all);
        }
        if word & L2_RESERVED != 0 {
            self.note(FindingKind::ReservedBits, at, word, 0, all);
        }
        if word & ZERO != 0 && (self.head.version < 3 || self.head.extended) {
            self.note(FindingKind::ZeroFlag, at, word, 0, all);
        }
        let offset = word & OFFSET;
        let zero = word & ZERO != 0 && !self.head.extended;
        // In an external data file, and only there, COPIED makes offset 0 a place.
        let somewhere = offset != 0 || self.head.external_data && word & COPIED != 0 && !zero;
        if !somewhere {
            if bitmap & SUBCLUSTERS != 0 {
                self.note(FindingKind::SubclusterBitmap, at, word, bitmap, all);
            }
            if word & COPIED != 0 && !self.head.external_data {
                self.note(FindingKind::CopiedWithoutOffset, at, word, 0, all);
            }
            return Ok(());
        }
        if (bitmap >> 32) & bitmap != 0 {
            self.note(FindingKind::SubclusterBitmap, at, word, bitmap, all);
        }
        if self.head.in_cluster(offset) != 0 {
            self.note(FindingKind::Unaligned, at, word, 0, all);
        }
        self.count_guest(offset, active);
        if self.head.external_data {
            if active != 0 && word & COPIED == 0 {
                self.note(FindingKind::Copied, at, word, 1, active);
            }
            return Ok(());
        }
        self.mark(offset, self.head.cluster_size(), Kind::DATA, all, at)?;
        if active != 0 {
            self.copied(at, word, offset >> self.head.cluster_bits, active)?;
        }
        Ok(())
    }

    /// Counts a guest cluster with a place of its own, and whether that follows the last one's.
    fn count_guest(&mut self, offset: u64, active: u32) {
        let state = &mut *self.state;
        state.allocated = state.allocated.saturating_add(active.into());
        if state.expected_next != 0 && state.expected_next != offset {
            state.fragmented = state.fragmented.saturating_add(active.into());
        }
        state.expected_next = offset.saturating_add(self.head.cluster_size());
    }

    /// Specification: "Compressed Clusters Descriptor".
    fn compressed(
        &mut self,
        at: u64,
        word: u64,
        bitmap: u64,
        active: u32,
        all: u32,
    ) -> Result<(), CheckError> {
        if word & COPIED != 0 {
            self.note(FindingKind::CopiedCompressed, at, word, 0, all);
        }
        if self.head.external_data {
            self.note(FindingKind::CompressedInDataFile, at, word, 0, all);
            return Ok(());
        }
        if bitmap != 0 {
            self.note(FindingKind::SubclusterBitmap, at, word, bitmap, all);
            return Ok(());
        }
        let state = &mut *self.state;
        for counter in [&mut state.allocated, &mut state.compressed, &mut state.fragmented] {
            *counter = counter.saturating_add(active.into());
        }
        let size_at = 62 - (self.head.cluster_bits - 8);
        let offset = word & ((1 << size_at) - 1);
        let descriptor = word & (COMPRESSED - 1);
        // The sectors from the one that `offset` lies in, to the end of the last.
        let sectors = (descriptor >> size_at) + 1;
        let end = offset / 512 * 512 + sectors * 512;
        self.mark(offset, end - offset, Kind::COMPRESSED, all, at)
    }

    /// COPIED must be set exactly where the refcount is one.
    fn copied(&mut self, at: u64, word: u64, cluster: u64, times: u32) -> Result<(), CheckError> {
        let count = self.refcount(cluster)?;
        match (word & COPIED != 0, count == 1) {
            (true, false) => self.note(FindingKind::Copied, at, word, count, times),
            (false, true) => self.note(FindingKind::NotCopied, at, word, count, times),
            _ => {}
        }
        Ok(())
    }
}
