//! COPIED: set exactly where the refcount is one.

use byteorder::{BigEndian, ByteOrder};

use super::{Repair, RepairError, RepairIo, Stage, Work, edit};
use crate::check::walk::{COMPRESSED, COPIED, L1_RESERVED, L2_RESERVED, OFFSET, ZERO};
use crate::check::{Kind, Slot, index};

/// What decides about a flag.
#[derive(Clone, Copy)]
struct Judge {
    what: Repair,
    incomplete: bool,
    cluster_bits: u32,
    external_data: bool,
}

impl Judge {
    /// The entry as it should be, from its bits that are reserved and the clusters' refcounts.
    fn of(self, word: u64, reserved: u64, slots: &[Slot]) -> u64 {
        let offset = word & OFFSET;
        if word & reserved != 0 || offset & ((1 << self.cluster_bits) - 1) != 0 {
            return word;
        }
        let Some(slot) = slots.get(index(offset >> self.cluster_bits)) else { return word };
        if slot.count != slot.refs {
            // Its refcount is not right, so nothing follows from it.
            return word;
        }
        let copied = slot.count == 1;
        let may = match self.what {
            Repair::All => !(copied && self.incomplete),
            Repair::Leaks => copied && slot.kinds & Kind::LOWERED != 0,
        };
        match (may, copied) {
            (false, _) => word,
            (true, true) => word | COPIED,
            (true, false) => word & !COPIED,
        }
    }

    fn l1_entry(self, word: u64, slots: &[Slot]) -> u64 {
        if word & OFFSET == 0 { word } else { self.of(word, L1_RESERVED, slots) }
    }

    /// The same of an L2 table. In one that only snapshots have, `active` is not set: COPIED says
    /// nothing there of clusters with a place, but is wrong where it never means anything.
    fn l2_entry(self, word: u64, slots: &[Slot], active: bool) -> u64 {
        let all = self.what == Repair::All;
        if word & COMPRESSED != 0 {
            return if all { word & !COPIED } else { word };
        }
        if self.external_data {
            let somewhere = active && word & OFFSET != 0 && word & L2_RESERVED == 0;
            return if all && somewhere { word | COPIED } else { word };
        }
        if word & OFFSET == 0 {
            return if all && word & L2_RESERVED == 0 { word & !COPIED } else { word };
        }
        if active { self.of(word, L2_RESERVED & !ZERO, slots) } else { word }
    }
}

impl<F: RepairIo + ?Sized> Work<'_, '_, F> {
    /// Sets and clears COPIED in the active tables, and clears it in those of snapshots where it
    /// never means anything; makes that durable.
    pub(super) fn flags(&mut self) -> Result<(), RepairError> {
        if !self.changed && (self.what == Repair::Leaks || !self.state().wrong_flags) {
            return Ok(());
        }
        let judge = Judge {
            what: self.what,
            incomplete: self.state().incomplete,
            cluster_bits: self.head.cluster_bits,
            external_data: self.head.external_data,
        };
        let l1 = self.head.l1;
        let bits = self.head.cluster_bits;
        let mut clusters = l1.start >> bits..(l1.start + l1.len).div_ceil(1 << bits);
        if clusters.all(|cluster| self.is_only(cluster, Kind::L1)) {
            let slots = &self.checker.state.slots;
            edit::edit(self.file, l1.start, l1.start + l1.len, |_, bytes| {
                each(bytes, 8, |word| judge.l1_entry(word, slots));
            })?;
        }
        self.l2_flags(judge)?;
        self.sync()
    }

    fn l2_flags(&mut self, judge: Judge) -> Result<(), RepairError> {
        let step = if self.head.extended { 16 } else { 8 };
        let size = self.head.cluster_size();
        let slots = &self.checker.state.slots;
        for (nth, slot) in slots.iter().enumerate() {
            let judged = slot.active != 0 || slot.inactive != 0 && judge.what == Repair::All;
            if !judged || slot.kinds & !Kind::LOWERED != Kind::L2 {
                continue;
            }
            let start = (nth as u64) << self.head.cluster_bits;
            edit::edit(self.file, start, start + size, |_, bytes| {
                each(bytes, step, |word| judge.l2_entry(word, slots, slot.active != 0));
            })?;
            (self.progress)(Stage::Flags, nth as u64, slots.len() as u64);
        }
        Ok(())
    }
}

/// Replaces the first word of each entry of `step` bytes.
fn each(bytes: &mut [u8], step: usize, change: impl Fn(u64) -> u64) {
    for entry in bytes.chunks_exact_mut(step) {
        let word = BigEndian::read_u64(entry);
        if word != 0 {
            BigEndian::write_u64(entry, change(word));
        }
    }
}
