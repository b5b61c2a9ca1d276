//! A bounded cache of table pages: L2 slices or refcount slices.
//!
//! A page is min(4 KiB, cluster) bytes, keyed by its number in the file (offset / page size). All
//! memory is set aside at open and touched only when used; nothing is allocated later.
//!
//! **Invariants:** a dirty page, or one whose write is in flight, is never evicted, so readers
//! always see the newest state. At least one slot is never dirty, so that reads can go on when
//! writing has stopped for good. A page has at most one write in flight.

use alloc::vec;
use alloc::vec::Vec;

use byteorder::{BigEndian, ByteOrder};

use crate::entry::L2Entry;
use crate::geometry::Geometry;
use crate::planted::{self, Bug};

/// A slot of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotId(u32);

impl SlotId {
    fn at(self) -> usize {
        self.0 as usize
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Loading,
    Resident,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    page: u64,
    state: State,
    /// Used since the clock hand last came by.
    referenced: bool,
    dirty: bool,
    writing: bool,
}

/// What is known of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lookup {
    Hit(SlotId),
    Loading,
    Absent,
}

/// The cache.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    page_bits: u32,
    /// log2 of the bits of a refcount, of the bytes of an L2 entry.
    refcount_order: u32,
    entry_bits: u32,
    slots: Vec<Slot>,
    data: Vec<u8>,
    /// Open addressing, linear probing, at most half full: slot number + 1, or 0.
    index: Vec<u32>,
    hand: usize,
    /// Slots that are dirty or being written.
    unclean: usize,
}

impl Cache {
    /// A cache of `slots` pages (at least two).
    pub(crate) fn new(slots: usize, geometry: Geometry) -> Self {
        let free =
            Slot { page: 0, state: State::Free, referenced: false, dirty: false, writing: false };
        let slots = slots.max(2);
        Self {
            page_bits: geometry.page_bits(),
            refcount_order: geometry.refcount_width().trailing_zeros(),
            entry_bits: geometry.entry_bits(),
            slots: vec![free; slots],
            data: vec![0; slots << geometry.page_bits()],
            index: vec![0; (slots * 2).next_power_of_two()],
            hand: 0,
            unclean: 0,
        }
    }

    /// Bytes of page memory.
    pub(crate) fn memory(&self) -> u64 {
        self.data.len() as u64
    }

    #[inline]
    fn home(&self, page: u64) -> usize {
        let hash = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        usize::try_from(hash).expect("32 bits") & (self.index.len() - 1)
    }

    /// Where page `page` is. Changes nothing.
    #[inline]
    pub(crate) fn lookup(&self, page: u64) -> Lookup {
        let mask = self.index.len() - 1;
        let mut at = self.home(page);
        loop {
            let entry = self.index[at];
            if entry == 0 {
                return Lookup::Absent;
            }
            let id = SlotId(entry - 1);
            let slot = &self.slots[id.at()];
            if slot.page == page {
                return match slot.state {
                    State::Resident => Lookup::Hit(id),
                    State::Loading => Lookup::Loading,
                    State::Free => unreachable!("free slots are not in the index"),
                };
            }
            at = (at + 1) & mask;
        }
    }

    /// Notes that the page is in use, so that it is not the next to go.
    pub(crate) fn touch(&mut self, id: SlotId) {
        self.slots[id.at()].referenced = true;
    }

    /// Takes a slot for `page`, which must be absent; the least recently used clean page goes.
    /// `None`: every page is dirty, loading or being written.
    pub(crate) fn begin_load(&mut self, page: u64) -> Option<SlotId> {
        debug_assert_eq!(self.lookup(page), Lookup::Absent);
        let id = self.victim()?;
        if self.slots[id.at()].state == State::Resident {
            self.remove_from_index(id);
        }
        self.slots[id.at()] =
            Slot { page, state: State::Loading, referenced: true, dirty: false, writing: false };
        let mask = self.index.len() - 1;
        let mut at = self.home(page);
        while self.index[at] != 0 {
            at = (at + 1) & mask;
        }
        self.index[at] = id.0 + 1;
        Some(id)
    }

    fn victim(&mut self) -> Option<SlotId> {
        // Twice round: the first turn may only clear marks.
        for _ in 0..self.slots.len() * 2 {
            let at = self.hand;
            self.hand = if at + 1 == self.slots.len() { 0 } else { at + 1 };
            let slot = &mut self.slots[at];
            let id = SlotId(u32::try_from(at).expect("fewer than 2^32 slots"));
            match slot.state {
                State::Free => return Some(id),
                State::Loading => {}
                State::Resident if slot.dirty && planted::is(Bug::EvictedPageForgotten) => {
                    slot.dirty = false;
                    self.unclean -= usize::from(!slot.writing);
                    if !slot.writing {
                        return Some(id);
                    }
                }
                State::Resident if slot.dirty || slot.writing => {}
                State::Resident if slot.referenced => slot.referenced = false,
                State::Resident => return Some(id),
            }
        }
        None
    }

    fn remove_from_index(&mut self, id: SlotId) {
        let mask = self.index.len() - 1;
        let mut hole = self.home(self.slots[id.at()].page);
        while self.index[hole] != id.0 + 1 {
            hole = (hole + 1) & mask;
        }
        // Close the gap: move back every later entry of the cluster whose home is not after it.
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let entry = self.index[at];
            if entry == 0 {
                break;
            }
            let home = self.home(self.slots[SlotId(entry - 1).at()].page);
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.index[hole] = entry;
                hole = at;
            }
        }
        self.index[hole] = 0;
    }

    /// The page that slot `id` was taken for has arrived.
    pub(crate) fn finish_load(&mut self, id: SlotId, bytes: &[u8]) {
        debug_assert_eq!(self.slots[id.at()].state, State::Loading);
        self.bytes_mut(id).copy_from_slice(bytes);
        self.slots[id.at()].state = State::Resident;
    }

    /// The same for a page of a new table, which is all zeros and need not be read.
    pub(crate) fn finish_zero(&mut self, id: SlotId) {
        debug_assert_eq!(self.slots[id.at()].state, State::Loading);
        self.bytes_mut(id).fill(0);
        self.slots[id.at()].state = State::Resident;
    }

    /// The page could not be read.
    pub(crate) fn abandon_load(&mut self, id: SlotId) {
        debug_assert_eq!(self.slots[id.at()].state, State::Loading);
        self.remove_from_index(id);
        self.slots[id.at()].state = State::Free;
    }

    /// The page in slot `id`, which is clean, is not what the file holds there any more.
    pub(crate) fn forget(&mut self, id: SlotId) {
        let slot = self.slots[id.at()];
        debug_assert!(slot.state == State::Resident && !slot.dirty && !slot.writing);
        self.remove_from_index(id);
        self.slots[id.at()].state = State::Free;
    }

    /// The number of the page in slot `id`.
    pub(crate) fn page_of(&self, id: SlotId) -> u64 {
        self.slots[id.at()].page
    }

    pub(crate) fn bytes(&self, id: SlotId) -> &[u8] {
        let start = id.at() << self.page_bits;
        &self.data[start..start + (1 << self.page_bits)]
    }

    fn bytes_mut(&mut self, id: SlotId) -> &mut [u8] {
        let start = id.at() << self.page_bits;
        &mut self.data[start..start + (1 << self.page_bits)]
    }

    /// The word that begins at this byte of a page.
    #[inline]
    pub(crate) fn word_at(&self, id: SlotId, byte: u64) -> u64 {
        let at = (id.at() << self.page_bits) + usize::try_from(byte).expect("within a page");
        BigEndian::read_u64(&self.data[at..at + 8])
    }

    /// Word `index` of a page of 8-byte words.
    pub(crate) fn word(&self, id: SlotId, index: usize) -> u64 {
        BigEndian::read_u64(&self.bytes(id)[index * 8..])
    }

    /// Entry `index` of a page of L2 entries of the image that the cache is made for.
    pub(crate) fn entry(&self, id: SlotId, index: usize) -> L2Entry {
        self.entry_as(id, index, self.entry_bits)
    }

    /// The same of an image with entries of so many bytes, as log2.
    pub(crate) fn entry_as(&self, id: SlotId, index: usize, entry_bits: u32) -> L2Entry {
        match entry_bits {
            3 => L2Entry { word: self.word(id, index), bitmap: 0 },
            _ => L2Entry { word: self.word(id, index * 2), bitmap: self.word(id, index * 2 + 1) },
        }
    }

    /// Entry `index` of a page of refcounts (specification: "Refcounts"): from 8 bits on they are
    /// big-endian numbers; of the smaller ones, the first in a byte has the lowest bits.
    pub(crate) fn refcount(&self, id: SlotId, index: usize) -> u64 {
        refcount_in(self.bytes(id), self.refcount_order, index)
    }

    /// May this page be changed now? One slot always stays clean.
    pub(crate) fn may_dirty(&self, id: SlotId) -> bool {
        let slot = &self.slots[id.at()];
        slot.dirty || slot.writing || self.unclean + 1 < self.slots.len()
    }

    pub(crate) fn set_word(&mut self, id: SlotId, index: usize, word: u64) {
        BigEndian::write_u64(&mut self.bytes_mut(id)[index * 8..], word);
        self.mark_dirty(id);
    }

    pub(crate) fn set_entry(&mut self, id: SlotId, index: usize, entry: L2Entry) {
        if self.entry_bits == 3 {
            return self.set_word(id, index, entry.word);
        }
        self.set_word(id, index * 2, entry.word);
        self.set_word(id, index * 2 + 1, entry.bitmap);
    }

    pub(crate) fn set_refcount(&mut self, id: SlotId, index: usize, refcount: u64) {
        let order = self.refcount_order;
        set_refcount_in(self.bytes_mut(id), order, index, refcount);
        self.mark_dirty(id);
    }

    fn mark_dirty(&mut self, id: SlotId) {
        assert!(self.may_dirty(id), "callers ask first");
        let slot = &mut self.slots[id.at()];
        debug_assert_eq!(slot.state, State::Resident);
        self.unclean += usize::from(!slot.dirty && !slot.writing);
        slot.dirty = true;
        slot.referenced = true;
    }

    /// Is any page dirty or being written?
    pub(crate) fn is_unclean(&self) -> bool {
        self.unclean != 0
    }

    /// More than half of the pages are dirty: time for a round.
    pub(crate) fn is_crowded(&self) -> bool {
        self.unclean * 2 > self.slots.len()
    }

    /// The first dirty page at or after slot number `from` that has no write in flight.
    pub(crate) fn next_dirty(&self, from: usize) -> Option<SlotId> {
        if self.unclean == 0 {
            return None;
        }
        let found = self.slots.get(from..)?.iter().position(|s| s.dirty && !s.writing)?;
        Some(SlotId(u32::try_from(from + found).expect("fewer than 2^32 slots")))
    }

    /// The slot number, to go on from.
    pub(crate) fn number(id: SlotId) -> usize {
        id.at()
    }

    /// The page's bytes were taken for writing: a change from now on makes it dirty again.
    pub(crate) fn begin_write(&mut self, id: SlotId) {
        let slot = &mut self.slots[id.at()];
        debug_assert!(slot.dirty && !slot.writing, "one write of a page at a time");
        slot.dirty = false;
        slot.writing = true;
        if planted::is(Bug::CleanBeforeWritten) {
            slot.writing = false;
            self.unclean -= 1;
        }
    }

    /// The write has ended; a failed one leaves the page dirty.
    pub(crate) fn end_write(&mut self, id: SlotId, ok: bool) {
        let slot = &mut self.slots[id.at()];
        if planted::is(Bug::CleanBeforeWritten) {
            return;
        }
        debug_assert!(slot.writing);
        slot.writing = false;
        slot.dirty |= !ok;
        self.unclean -= usize::from(!slot.dirty);
    }
}

/// Refcount number `index` of those in `bytes`, of 2^`order` bits each.
pub(crate) fn refcount_in(bytes: &[u8], order: u32, index: usize) -> u64 {
    if order >= 3 {
        let width = 1 << (order - 3);
        return BigEndian::read_uint(&bytes[index * width..], width);
    }
    let (byte, shift) = (index >> (3 - order), (index << order) & 7);
    u64::from(bytes[byte]) >> shift & ((1 << (1 << order)) - 1)
}

pub(crate) fn set_refcount_in(bytes: &mut [u8], order: u32, index: usize, refcount: u64) {
    debug_assert!(order == 6 || refcount >> (1 << order) == 0, "it fits");
    if order >= 3 {
        let width = 1 << (order - 3);
        return BigEndian::write_uint(&mut bytes[index * width..], refcount, width);
    }
    let (byte, shift) = (index >> (3 - order), (index << order) & 7);
    let mask = ((1_u8 << (1 << order)) - 1) << shift;
    let bits = u8::try_from(refcount).expect("at most 4 bits") << shift;
    bytes[byte] = (bytes[byte] & !mask) | bits;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(slots: usize) -> Cache {
        Cache::new(slots, Geometry::new(9, 4))
    }

    fn load(cache: &mut Cache, page: u64) -> SlotId {
        let id = cache.begin_load(page).expect("a clean slot");
        cache.finish_load(id, &[u8::try_from(page & 0xff).unwrap(); 512]);
        id
    }

    #[test]
    fn pages_are_found_until_they_are_evicted() {
        let mut cache = cache(8);
        for page in 0..1000 {
            load(&mut cache, page * 37);
            for back in 0..8.min(page) {
                let hit = cache.lookup((page - back) * 37);
                let Lookup::Hit(id) = hit else { panic!("{page} {back}: {hit:?}") };
                assert_eq!(cache.page_of(id), (page - back) * 37);
            }
            if page >= 8 {
                assert_eq!(cache.lookup((page - 8) * 37), Lookup::Absent);
            }
        }
    }

    #[test]
    fn a_dirty_page_is_not_evicted_and_one_slot_stays_clean() {
        let mut cache = cache(2);
        let a = load(&mut cache, 1);
        cache.set_word(a, 0, 42);
        let b = load(&mut cache, 2);
        assert!(cache.may_dirty(a) && !cache.may_dirty(b));
        let c = load(&mut cache, 3);
        assert_eq!(cache.lookup(1), Lookup::Hit(a));
        assert_eq!(cache.lookup(2), Lookup::Absent);
        cache.begin_write(a);
        assert!(!cache.may_dirty(c), "a write in flight may still fail");
        cache.end_write(a, true);
        assert!(cache.may_dirty(c));
    }

    #[test]
    fn a_change_during_the_write_or_a_failed_write_leaves_the_page_dirty() {
        let mut cache = cache(4);
        let a = load(&mut cache, 1);
        cache.set_word(a, 0, 1);
        cache.begin_write(a);
        cache.set_word(a, 0, 2);
        assert_eq!(cache.next_dirty(0), None, "not while its write is in flight");
        cache.end_write(a, true);
        assert_eq!(cache.next_dirty(0), Some(a));
        cache.begin_write(a);
        cache.end_write(a, false);
        assert_eq!(cache.next_dirty(0), Some(a));
        cache.begin_write(a);
        cache.end_write(a, true);
        assert!(!cache.is_unclean());
    }

    #[test]
    fn refcounts_of_every_width_are_kept_apart() {
        for order in 0..=6 {
            let count = (512 * 8) >> order;
            let most = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
            let value = |index: usize| (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & most;
            let mut bytes = [0xaa; 512];
            for index in 0..count {
                set_refcount_in(&mut bytes, order, index, value(index));
            }
            for index in 0..count {
                assert_eq!(refcount_in(&bytes, order, index), value(index), "{order} {index}");
            }
        }
        // As the specification says: entry 0 is in the lowest bits of byte 0.
        let mut bytes = [0; 2];
        set_refcount_in(&mut bytes, 0, 1, 1);
        set_refcount_in(&mut bytes, 2, 2, 5);
        assert_eq!(bytes, [0b10, 5]);
    }

    #[test]
    fn a_forgotten_page_is_read_again_and_the_others_stay() {
        let mut cache = cache(8);
        let ids: Vec<_> = (0..8).map(|page| load(&mut cache, page * 16)).collect();
        cache.forget(ids[3]);
        assert_eq!(cache.lookup(3 * 16), Lookup::Absent);
        for page in (0..8).filter(|&page| page != 3) {
            assert!(matches!(cache.lookup(page * 16), Lookup::Hit(_)), "{page}");
        }
        assert_eq!(load(&mut cache, 1000), ids[3]);
    }

    #[test]
    fn an_abandoned_load_leaves_no_trace() {
        let mut cache = cache(2);
        let id = cache.begin_load(9).unwrap();
        assert_eq!(cache.lookup(9), Lookup::Loading);
        cache.abandon_load(id);
        assert_eq!(cache.lookup(9), Lookup::Absent);
    }
}
