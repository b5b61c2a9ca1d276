//! Mappings that readers see and the disk may not yet: their data is not durable.
//!
//! An entry is the new place of one guest cluster, together with the epoch in which its data was
//! complete. When that epoch is durable, the next round folds the entry into its L2 page. Entries
//! keep their own epoch, so that writers that go on and on never hold up those that were before.

use alloc::vec;
use alloc::vec::Vec;

use crate::epoch::Epoch;
use crate::units::{GuestCluster, HostCluster};

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) guest: GuestCluster,
    pub(crate) host: HostCluster,
    /// The data was complete in this epoch.
    pub(crate) since: Epoch,
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

    /// Adds an entry for a guest cluster that has none; the caller has asked for room.
    pub(crate) fn insert(&mut self, entry: Entry) {
        assert!(self.has_room(1), "callers ask for room first");
        match self.find(entry.guest) {
            Ok(_) => unreachable!("one allocation per guest cluster at a time"),
            Err(at) => self.slots[at] = Some(entry),
        }
        self.len += 1;
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
    fn it_is_a_map() {
        let since = Epochs::new(false).now();
        let mut overlay = Overlay::new(64);
        let mut model = alloc::collections::BTreeMap::new();
        let mut prng = Prng::new(1);
        for step in 1..20_000 {
            let guest = GuestCluster(prng.below(100));
            if prng.one_in(2) && overlay.has_room(1) && !model.contains_key(&guest) {
                let host = HostCluster::new(step).unwrap();
                overlay.insert(Entry { guest, host, since });
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
