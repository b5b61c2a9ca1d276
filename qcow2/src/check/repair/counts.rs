//! Refcounts in place: each becomes the number of references.

use core::ops::Range;

use byteorder::{BigEndian, ByteOrder};

use super::{Repair, RepairError, RepairIo, Stage, Work, edit};
use crate::check::refcounts::OFFSET;
use crate::check::{Kind, Slot, index, read};

/// What decides about a refcount.
#[derive(Clone, Copy)]
struct Rule {
    what: Repair,
    incomplete: bool,
    largest: u32,
}

impl Rule {
    /// What the refcount of a cluster should be.
    fn of(self, slot: Slot) -> u32 {
        let counted = slot.refs.min(self.largest);
        // What may be referenced in ways that were not counted keeps its refcount.
        let uncounted = self.incomplete || slot.kinds & Kind::CUT_SHORT != 0;
        match (self.what, uncounted) {
            (Repair::Leaks, true) => slot.count,
            (Repair::Leaks, false) => slot.count.min(counted),
            (Repair::All, true) => slot.count.max(counted),
            (Repair::All, false) => counted,
        }
    }
}

/// Writes the refcount number `nth` of `bytes`.
pub(super) fn put(bytes: &mut [u8], order: u32, nth: usize, count: u32) {
    let le = |count: u32| u8::try_from(count & 0xff).unwrap_or(0);
    match order {
        0..=2 => {
            let width = 1 << order;
            let (byte, shift) = (nth * width / 8, nth * width % 8);
            let mask = 0xff_u8 >> (8 - width) << shift;
            bytes[byte] = bytes[byte] & !mask | le(count) << shift & mask;
        }
        3 => bytes[nth] = le(count),
        4 => BigEndian::write_uint(&mut bytes[nth * 2..], (count & 0xffff).into(), 2),
        5 => BigEndian::write_u32(&mut bytes[nth * 4..], count),
        _ => BigEndian::write_u64(&mut bytes[nth * 8..], count.into()),
    }
}

impl<F: RepairIo + ?Sized> Work<'_, '_, F> {
    /// The blocks that it takes to cover the clusters of the file.
    fn blocks(&self) -> u64 {
        (self.state().used_slots as u64).div_ceil(1 << self.head.block_bits())
    }

    /// The clusters of the file that the block number `nth` covers.
    fn covered(&self, nth: u64) -> Range<usize> {
        let used = self.state().used_slots;
        let (start, end) = (nth << self.head.block_bits(), (nth + 1) << self.head.block_bits());
        index(start).min(used)..index(end).min(used)
    }

    /// The whole refcount table is in the file, and nothing else.
    fn table_is_sound(&self) -> bool {
        let table = self.head.refcount_table;
        let first = table.start >> self.head.cluster_bits;
        let clusters = first..first + (table.len >> self.head.cluster_bits);
        clusters.end <= self.state().host_clusters
            && !clusters.is_empty()
            && clusters.into_iter().all(|cluster| self.is_only(cluster, Kind::REFCOUNT_TABLE))
    }

    /// Where the block number `nth` lies, if it is one, and nothing else.
    fn block(&self, nth: u64) -> Result<Option<u64>, RepairError> {
        let table = self.head.refcount_table;
        if nth * 8 >= table.len {
            return Ok(None);
        }
        let mut word = [0; 8];
        read(&*self.file, table.start + nth * 8, &mut word)?;
        let word = BigEndian::read_u64(&word);
        let bits = self.covered(nth).len() << self.head.refcount_order;
        let end = (word & OFFSET).saturating_add(bits.div_ceil(8) as u64);
        let usable = word != 0
            && word & !OFFSET == 0
            && self.head.in_cluster(word) == 0
            && end <= self.file.len()
            && self.is_only(word >> self.head.cluster_bits, Kind::REFCOUNT_BLOCK);
        Ok(usable.then_some(word))
    }

    /// Whether there are refcounts that cannot be put right where they are.
    pub(super) fn needs_rebuild(&self) -> Result<bool, RepairError> {
        if self.head.no_refcount_table || self.state().bad_blocks || !self.table_is_sound() {
            return Ok(true);
        }
        for nth in 0..self.blocks() {
            let referenced =
                self.state().slots[self.covered(nth)].iter().any(|slot| slot.refs != 0);
            if referenced && self.block(nth)?.is_none() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What decides about a refcount.
    fn rule(&self) -> Rule {
        Rule {
            what: self.what,
            incomplete: self.state().incomplete,
            largest: self.head.largest_refcount(),
        }
    }

    /// Writes the refcounts that are wrong, and makes them durable.
    pub(super) fn counts_in_place(&mut self) -> Result<(), RepairError> {
        if !self.table_is_sound() {
            return Ok(());
        }
        let (rule, blocks) = (self.rule(), self.blocks());
        let mut written = false;
        for nth in 0..blocks {
            let slots = self.covered(nth);
            if self.state().slots[slots.clone()].iter().all(|&slot| rule.of(slot) == slot.count) {
                continue;
            }
            if let Some(block) = self.block(nth)? {
                self.counts_of(rule, block, slots)?;
                written = true;
            }
            (self.progress)(Stage::Refcounts, nth, blocks);
        }
        if written { self.sync() } else { Ok(()) }
    }

    fn counts_of(
        &mut self,
        rule: Rule,
        block: u64,
        slots: Range<usize>,
    ) -> Result<(), RepairError> {
        let order = self.head.refcount_order;
        let slots = &mut self.checker.state.slots[slots];
        let changed = &mut self.changed;
        let end = block + ((slots.len() << order).div_ceil(8)) as u64;
        edit::edit(self.file, block, end, |at, bytes| {
            let first = index(((at - block) * 8) >> order);
            let there = (bytes.len() * 8) >> order;
            for (nth, slot) in slots.iter_mut().skip(first).take(there).enumerate() {
                let wanted = rule.of(*slot);
                if slot.count == wanted {
                    continue;
                }
                if wanted < slot.count {
                    slot.kinds |= Kind::LOWERED;
                }
                *changed |= wanted != 0;
                slot.count = wanted;
                put(bytes, order, nth, wanted);
            }
        })
    }
}
