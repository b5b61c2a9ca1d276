//! What goes into the [journal](crate::journal), when, and what it waits for.
//!
//! **Every change of what a reader finds is recorded when it is made**: mappings in a page that was
//! not written yet are lost with the process just as those in the overlay are. A record is the L2
//! entry as it will stand in the end, overlay merged over page; folding changes nothing then, and
//! is not recorded. Data that is written in place, or punched in a data file, has no mapping to
//! lose.
//!
//! **No operation and no answer overtakes a record**: the engine hands out neither while records
//! wait. So the disk is never newer than the journal, and to install what the journal says last
//! never brings back something older.
//!
//! Reservation, quarantine and lowered refcounts are not recorded: what a killed process leaves of
//! them is counted too high, which is a leak. A cluster that a record names is counted on disk, as
//! it came from the reservation, or was an entry's before; it was lowered by nobody, since its
//! mapping is the one that is in force.
//!
//! # What a round retires
//!
//! When a round begins the engine says `Switch`, and at its successful end `Retire`. All that was
//! recorded before the one is durable at the other:
//!
//! - An entry in an L2 page: the page was dirty, no write of it was in flight (a round waits for
//!   its writes), so it is written before fdatasync A, as is L1.
//! - An entry in the overlay: its data had completed, in an epoch that A covers; so it is folded
//!   and written before fdatasync B, or has been replaced since, by a later record.
//! - A request that is still writing its data makes its record when that has completed: later.
//!
//! # Bounds
//!
//! A segment that is half full wants a round. When it is full, changes wait ([`Wait::Journal`]) for
//! the next one to begin. A step asks for room before it changes anything, as for all else.

use alloc::collections::VecDeque;

use crate::engine::Engine;
use crate::entry::L2Entry;
use crate::journal::{JournalEvent, Record};
use crate::mark;
use crate::planted::{self, Bug};
use crate::request::{Segment, Step, Stop, Wait};
use crate::units::GuestCluster;

/// Events for the driver's journal.
#[derive(Clone, Debug)]
pub(crate) struct Records {
    queue: VecDeque<JournalEvent>,
    /// Records of one segment.
    capacity: u32,
    /// Those in the present one.
    used: u32,
}

/// Events besides records that one turn may have: a round ends, others begin and end.
const OTHERS: usize = 64;

impl Records {
    /// For a segment of so many records; none without.
    pub(crate) fn new(capacity: u32) -> Option<Self> {
        // The driver takes them after each event, in which one segment may be filled, and another.
        let most = capacity as usize * 2 + OTHERS;
        (capacity != 0).then(|| Self { queue: VecDeque::with_capacity(most), capacity, used: 0 })
    }

    fn left(&self) -> u32 {
        self.capacity - self.used
    }
}

impl Engine {
    /// What the driver has to do to its journal next. To be called until `None`, before
    /// [`next_op`](Engine::next_op) and [`next_reply`](Engine::next_reply), which give out nothing
    /// before that.
    pub fn next_record(&mut self) -> Option<JournalEvent> {
        self.records.as_mut()?.queue.pop_front()
    }

    /// Has the driver taken all records?
    pub(crate) fn is_recorded(&self) -> bool {
        self.records.as_ref().is_none_or(|records| records.queue.is_empty())
    }

    /// For how many of `want` changes there is room in the journal: at least one.
    pub(crate) fn room_to_record(&mut self, want: u64) -> Step<u64> {
        let Some(records) = self.records.as_ref().filter(|_| self.adoption.is_none()) else {
            return Ok(want);
        };
        match records.left() {
            0 => {
                mark!("record.waits_for_room");
                self.round.wanted = true;
                Err(Stop::Wait(Wait::Journal))
            }
            left => Ok(want.min(left.into())),
        }
    }

    /// The mapping of a guest cluster whose entry in the L2 page is `entry` has changed; the caller
    /// has asked for room.
    pub(crate) fn record(&mut self, guest: GuestCluster, entry: L2Entry) {
        // What is adopted is in the journal already.
        let Some(records) = self.records.as_mut().filter(|_| self.adoption.is_none()) else {
            return;
        };
        let L2Entry { word, bitmap } = match self.overlay.get(guest) {
            Some(pending) => self.decoder.with_data(entry, pending.host, pending.units()),
            None => entry,
        };
        records.queue.push_back(JournalEvent::Record(Record { guest, word, bitmap }));
        records.used += 1;
        self.round.wanted |= records.used > records.capacity / 2;
    }

    /// The entry beneath what a segment is going to put into the overlay, as far as a record needs
    /// it: with subclusters, others of the same cluster are in the page.
    pub(crate) fn entry_to_record(&mut self, segment: Segment) -> Step<L2Entry> {
        if self.records.is_none() || segment.units == self.geometry().all_units() {
            return Ok(L2Entry::default());
        }
        let table = self.l2_table(segment.guest).expect("secured before the write was issued");
        let place = self.entry_place(table, segment.guest);
        let slot = self.l2_page(place.page)?;
        Ok(self.l2_cache.entry(slot, place.index))
    }

    /// A round begins.
    pub(crate) fn switch_records(&mut self) {
        let Some(records) = self.records.as_mut().filter(|_| self.adoption.is_none()) else {
            return;
        };
        records.used = 0;
        records.queue.push_back(JournalEvent::Switch);
        if planted::is(Bug::RetiredEarly) {
            records.queue.push_back(JournalEvent::Retire);
        }
        self.wake(|wait| wait == Wait::Journal);
    }

    /// It has succeeded.
    pub(crate) fn retire_records(&mut self) {
        if let Some(records) = self.records.as_mut().filter(|_| self.adoption.is_none()) {
            records.queue.push_back(JournalEvent::Retire);
        }
    }

    /// All is durable.
    pub(crate) fn clear_records(&mut self) {
        if let Some(records) = &mut self.records {
            records.used = 0;
            records.queue.push_back(JournalEvent::Clear);
        }
    }
}
