//! Mappings that readers see and the disk may not yet: their data is not durable.
//!
//! An entry is the new place of one guest cluster, together with the epoch in which its data was
//! complete. When that epoch is durable, the next round folds the entry into its L2 page. Entries
//! keep their own epoch, so that writers that go on and on never hold up those that were before.
//!
//! With extended L2 entries, subclusters of one cluster come one after the other: an entry then has
//! a part for each epoch. There are at most three at a time: one that is durable and waits to be
//! folded, one that an fdatasync under way covers, and the present one.

use alloc::vec;
use alloc::vec::Vec;

use crate::epoch::Epoch;
use crate::units::{GuestCluster, HostCluster};

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) guest: GuestCluster,
    pub(crate) host: HostCluster,
    parts: [Part; 3],
}

/// Units whose data was complete in one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    units: u32,
    since: Epoch,
}

impl Entry {
    pub(crate) fn new(guest: GuestCluster, host: HostCluster, units: u32, since: Epoch) -> Self {
        let none = Part { units: 0, since };
        Self { guest, host, parts: [Part { units, since }, none, none] }
    }

    /// All units that it has a mapping for.
    pub(crate) fn units(&self) -> u32 {
        self.parts.iter().fold(0, |units, part| units | part.units)
    }

    /// Those of them whose epoch is `durable`.
    pub(crate) fn units_of(&self, durable: impl Fn(Epoch) -> bool) -> u32 {
        let of = self.parts.iter().filter(|part| durable(part.since));
        of.fold(0, |units, part| units | part.units)
    }

    fn add(&mut self, units: u32, since: Epoch, durable: impl Fn(Epoch) -> bool) {
        // Those that are durable are folded together: they need one part only.
        let mut first: Option<usize> = None;
        for number in 0..self.parts.len() {
            let Part { units, since } = self.parts[number];
            if units == 0 || !durable(since) {
                continue;
            }
            match first {
                None => first = Some(number),
                Some(first) => {
                    self.parts[first].units |= units;
                    self.parts[number].units = 0;
                }
            }
        }
        let of = |wanted: &dyn Fn(&Part) -> bool| self.parts.iter().position(wanted);
        let at = of(&|part| part.units != 0 && part.since == since).or(of(&|part| part.units == 0));
        let part = &mut self.parts[at.expect("three at a time: durable, being synced, open")];
        *part = Part { units: part.units | units, since };
    }
}

/// A hash table of bounded size: linear probing, at most half full.
#[derive(Clone, Debug)]
pub(crate) struct Overlay {
    slots: Vec<Option<Entry>>,
    len: usize,
    most: usize,
}

impl Overlay {
    pub(crate) fn new(most: usize) -> Self {
        Self { slots: vec![None; (most * 2).next_power_of_two()], len: 0, most }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Is there room for `count` more?
    pub(crate) fn has_room(&self, count: usize) -> bool {
        self.len + count <= self.most
    }

    /// The most entries that may be added in one go.
    pub(crate) fn capacity(&self) -> usize {
        self.most
    }

    /// More than half full: time for a round.
    pub(crate) fn is_crowded(&self) -> bool {
        self.len * 2 > self.most
    }

    fn home(&self, guest: GuestCluster) -> usize {
        let hash = guest.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        usize::try_from(hash).expect("32 bits") & (self.slots.len() - 1)
    }

    fn find(&self, guest: GuestCluster) -> Result<usize, usize> {
        let mask = self.slots.len() - 1;
        let mut at = self.home(guest);
        while let Some(entry) = self.slots[at] {
            if entry.guest == guest {
                return Ok(at);
            }
            at = (at + 1) & mask;
        }
        Err(at)
    }

    pub(crate) fn get(&self, guest: GuestCluster) -> Option<Entry> {
        if self.len == 0 {
            return None;
        }
        self.find(guest).ok().and_then(|at| self.slots[at])
    }

    /// Adds a mapping for units that have none here; the caller has asked for room. What is known
    /// of other units of the cluster is at the same place.
    pub(crate) fn insert(&mut self, entry: Entry, durable: impl Fn(Epoch) -> bool) {
        assert!(self.has_room(1), "callers ask for room first");
        let at = match self.find(entry.guest) {
            Ok(at) => at,
            Err(at) => {
                self.slots[at] = Some(entry);
                self.len += 1;
                return;
            }
        };
        let known = self.slots[at].as_mut().expect("found");
        let Part { units, since } = entry.parts[0];
        assert!(known.host == entry.host && known.units() & units == 0, "one write at a time");
        known.add(units, since, durable);
    }

    /// Forgets some units of a cluster. True if nothing of it is left.
    pub(crate) fn remove_units(&mut self, guest: GuestCluster, units: u32) -> bool {
        let Ok(at) = self.find(guest) else { return true };
        let known = self.slots[at].as_mut().expect("found");
        for part in &mut known.parts {
            part.units &= !units;
        }
        let empty = known.units() == 0;
        if empty {
            self.remove(guest);
        }
        empty
    }

    pub(crate) fn remove(&mut self, guest: GuestCluster) -> Option<Entry> {
        if self.len == 0 {
            return None;
        }
        let mask = self.slots.len() - 1;
        let mut hole = self.find(guest).ok()?;
        let removed = self.slots[hole].take();
        self.len -= 1;
        // Close the gap: move back every later entry of the cluster whose home is not after it.
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let Some(entry) = self.slots[at] else { break };
            let home = self.home(entry.guest);
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.slots[hole] = self.slots[at].take();
                hole = at;
            }
        }
        removed
    }

    /// All entries, in no order that means anything.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Entry> + '_ {
        self.slots.iter().copied().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::Epochs;
    use crate::testing::Prng;

    #[test]
    fn units_keep_their_epochs() {
        let mut epochs = Epochs::new(false);
        let mut overlay = Overlay::new(4);
        let (guest, host) = (GuestCluster(3), HostCluster::new(9).unwrap());
        let insert = |units, epochs: &mut Epochs, overlay: &mut Overlay| {
            epochs.note_write();
            let entry = Entry::new(guest, host, units, epochs.of_writes());
            overlay.insert(entry, |epoch| epochs.is_durable(epoch));
        };
        for step in 0..8 {
            insert(1 << (step * 2), &mut epochs, &mut overlay);
            epochs.cut();
            insert(2 << (step * 2), &mut epochs, &mut overlay);
            epochs.succeeded();
            let entry = overlay.get(guest).unwrap();
            let durable = entry.units_of(|epoch| epochs.is_durable(epoch));
            assert_eq!(entry.units(), (4 << (step * 2)) - 1);
            assert_eq!(durable, (2 << (step * 2)) - 1, "all but the last");
        }
        assert!(!overlay.remove_units(guest, 0xff));
        assert!(overlay.remove_units(guest, 0xff00));
        assert!(overlay.is_empty());
    }

    #[test]
    fn it_is_a_map() {
        let since = Epochs::new(false).of_writes();
        let mut overlay = Overlay::new(64);
        let mut model = alloc::collections::BTreeMap::new();
        let mut prng = Prng::new(1);
        for step in 1..20_000 {
            let guest = GuestCluster(prng.below(100));
            if prng.one_in(2) && overlay.has_room(1) && !model.contains_key(&guest) {
                let host = HostCluster::new(step).unwrap();
                overlay.insert(Entry::new(guest, host, 1, since), |_| false);
                model.insert(guest, host);
            } else {
                assert_eq!(overlay.remove(guest).map(|entry| entry.host), model.remove(&guest));
            }
            assert_eq!(overlay.len(), model.len());
            let probe = GuestCluster(prng.below(100));
            assert_eq!(overlay.get(probe).map(|entry| entry.host), model.get(&probe).copied());
        }
    }
}
