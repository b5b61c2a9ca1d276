//! Rounds: how what is in memory becomes durable. The heart of the engine.
//!
//! # Soft updates in two paragraphs
//!
//! A power cut keeps any subset of the sectors that were not synced. An L2 entry on disk that leads
//! to a cluster whose bytes, or whose refcount, are not on disk is a corruption, or shows the guest
//! what somebody else once wrote. A journal avoids this by writing everything twice. *Soft updates*
//! avoid it by order alone: what is pointed to is durable before what points to it, and what points
//! is gone, durably, before what it pointed to is used again.
//!
//! Order costs fdatasyncs, and an fdatasync costs a flush of the device. So the work here is to
//! need few: most orders are made unnecessary by preparing things early, and the rest shares two.
//!
//! # What depends on what, and how that is kept
//!
//! ```text
//!              data ◄───────────┐  overlay: an entry waits there until its data is durable,
//!                               │  unless the space is Zero and nothing lies beneath
//!   refcount ◄── reservation ◄──┼── L2 entry ◄── (first table in Zero space: no order) ── L1 entry
//!      ▲                        │
//!      └ refcount block ◄── refcount table: the entry is hidden until the block is durable
//!
//!   unlinked ──► refcount lowered ──► punched ──► free        quarantine: each after the other
//! ```
//!
//! - **Data before mapping.** A write into new space whose every crash state the guest may see
//!   needs no order: the space is zeros on disk ([`Space::Zero`](crate::allocator::Space)) and the
//!   guest cluster read as zeros before, so a lost sector shows what was there before. Its entry
//!   goes straight into the L2 page. All other entries wait in the [overlay](crate::overlay) with
//!   the [epoch](crate::epoch) of their data, and are *folded* into the page once it is durable.
//!   So **an L2 page in memory is always fit to be written**, at any time, and so is every other.
//! - **Refcount before mapping.** Clusters come from a [reservation](crate::allocator) whose raised
//!   refcounts are durable already.
//! - **L2 table before L1.** A first table in Zero space reads as unallocated wherever its sectors
//!   were lost, which is what its range was; in other space it is zeroed, and that made durable,
//!   before L1 names it.
//! - **A copied L2 table before L1.** A table that a snapshot shares is copied as a whole, and the
//!   copy made durable, before L1 names it; the old one is counted down once that is durable.
//! - **New before old.** What a folded entry replaces (a compressed cluster, one that a snapshot
//!   has too) goes into quarantine when it is folded, and is counted down once the page is durable.
//! - **Refcount block before refcount table.** The staging copy of a table page leaves out entries
//!   whose block is not durable (classic soft updates' roll-back).
//! - **Unlinked before lowered before punched before free**: see [`quarantine`](crate::quarantine).
//!
//! # A round
//!
//! ```text
//!   begin ── write all dirty pages ── fdatasync A ─┬─ nothing to fold ──────────────► reply, end
//!             (refcounts, L2, L1,                  │
//!              refcount table)                     └─ fold, write those pages ── fdatasync B ──► …
//! ```
//!
//! Its set is fixed at the start: entries that come into the overlay later have a later epoch,
//! which A does not cover, so they are not folded; pages that become dirty later are not waited
//! for. **A FLUSH ends after at most two fdatasyncs, however many writers go on.** It costs one
//! when nothing was allocated or only Zero space was; two for copy-on-write and Stale space. One
//! that arrives during a round waits for the next, and all that wait share it. A page that changes
//! while it is being written was copied before, and is dirty again.
//!
//! Without guest FLUSHes, rounds begin by themselves: when reservation, clean pages, overlay or
//! quarantine run low, and when something was dirty for [`max_dirty_ms`](crate::Options).
//!
//! **Invariant:** only this module and [`grow`](crate::grow) write metadata, and only they sync.

use crate::cache::{Cache, Lookup, SlotId};
use crate::engine::Engine;
use crate::entry::Reference;
use crate::error::{FailureKind, IoErrorKind};
use crate::grow::Grown;
use crate::mark;
use crate::op::OpKind;
use crate::optable::{OpState, Owner};
use crate::overlay::Entry;
use crate::planted::{self, Bug};
use crate::request::{RequestState, Stop, Wait, Which};

/// What a round is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    #[default]
    Idle,
    Refcounts,
    L2,
    L1,
    RefcountTable,
    SyncA,
    Fold,
    Folded,
    TableAgain,
    SyncB,
    /// The refcount table moves to a larger place: see [`grow`](crate::grow).
    GrowExtend,
    GrowWrite,
    SyncGrown,
    Header,
    SyncHeader,
    /// All is durable.
    End,
}

/// The round under way, if any.
#[derive(Clone, Debug, Default)]
pub(crate) struct Round {
    pub(crate) phase: Phase,
    /// Somebody wants a round to begin.
    pub(crate) wanted: bool,
    /// Where to go on in what this phase writes.
    pub(crate) cursor: usize,
    /// Writes that are in flight.
    pub(crate) writes: usize,
    /// The fdatasync, or the extending, of this phase is in flight.
    pub(crate) waiting: bool,
    /// Rounds begun so far.
    pub(crate) number: u64,
    /// The last round whose fdatasync A has returned: what was dirty when it began is durable.
    pub(crate) synced: u64,
    /// Something was written since A.
    wrote: bool,
    /// Some entry was folded since A: a FLUSH has to wait for B.
    folded: bool,
    /// The overlay's entries of durable epochs, to be folded by this round.
    fold: alloc::vec::Vec<Entry>,
    pub(crate) grown: Option<Grown>,
    /// Clusters whose mappings this round makes durable, as a count since open.
    allocated: u64,
}

impl Round {
    pub(crate) fn is_idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// The image has failed: there will be no more rounds.
    pub(crate) fn stop(&mut self) {
        self.phase = Phase::Idle;
        self.wanted = false;
    }

    pub(crate) fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.cursor = 0;
        self.waiting = false;
    }

    /// Room for folding `most` entries, set aside at open.
    pub(crate) fn reserve(&mut self, most: usize) {
        self.fold.reserve(most);
    }
}

impl Engine {
    /// The round that will make durable what changes now.
    pub(crate) fn next_round(&self) -> u64 {
        self.round.number + 1
    }

    /// Does what the round can do now. True if a round came to its end.
    pub(crate) fn advance_round(&mut self) -> bool {
        let mut ended = false;
        while self.failed.is_none() && self.advance_phase() {
            ended |= self.round.is_idle();
        }
        ended
    }

    /// Moves on by one phase, unless that has to wait.
    fn advance_phase(&mut self) -> bool {
        match self.round.phase {
            Phase::Idle => self.begin_round(),
            Phase::Refcounts => self.write_pages(Which::Refcounts, Phase::L2),
            Phase::L2 => self.write_pages(Which::L2, Phase::L1),
            Phase::L1 => self.write_top(Which::L2, Phase::RefcountTable),
            Phase::RefcountTable => self.write_top(Which::Refcounts, Phase::SyncA),
            Phase::SyncA => self.sync(self.epochs.is_volatile()),
            Phase::Fold => self.fold(),
            Phase::Folded => self.write_folded(),
            Phase::TableAgain => self.write_top(Which::Refcounts, Phase::SyncB),
            Phase::SyncB => self.sync(self.round.wrote),
            Phase::SyncGrown => self.sync(!planted::is(Bug::HeaderBeforeTable)),
            Phase::SyncHeader => self.sync(true),
            Phase::GrowExtend => self.grow_extend(),
            Phase::GrowWrite => self.grow_write(),
            Phase::Header => self.grow_header(),
            Phase::End => {
                self.finish_growing();
                self.end_round();
                true
            }
        }
    }

    fn begin_round(&mut self) -> bool {
        if !self.round.wanted || !self.may_begin_round() {
            return false;
        }
        self.round.wanted = false;
        self.round.number += 1;
        self.round.allocated = self.allocated_and_settled();
        self.quarantine.round_begins();
        self.switch_records();
        self.dirty_since_ms = None;
        for state in &mut self.requests {
            if state.wait == Wait::NextFlush {
                state.wait = Wait::ThisFlush;
            }
        }
        (self.round.wrote, self.round.folded) = (false, false);
        self.round.enter(Phase::Refcounts);
        true
    }

    /// Waits for the writes so far, then syncs if there is need for it.
    fn sync(&mut self, needed: bool) -> bool {
        if self.round.waiting || self.round.writes != 0 {
            return false;
        }
        if needed {
            match self.round.phase {
                Phase::SyncA => mark!("round.sync_a"),
                Phase::SyncB => mark!("round.sync_b"),
                _ => mark!("round.sync_grown"),
            }
            self.round.waiting = true;
            self.emit_sync(Owner::Sync);
            return false;
        }
        self.after_sync();
        true
    }

    /// What an fdatasync, or that none was needed, makes possible.
    fn after_sync(&mut self) {
        let number = self.round.number;
        let next = match self.round.phase {
            Phase::SyncA => {
                self.round.synced = number;
                self.quarantine.round_synced();
                self.reserve_synced(number);
                self.tables_to_link(number);
                self.begin_fold();
                Phase::Fold
            }
            Phase::SyncB => {
                self.tables_synced(number);
                Phase::GrowExtend
            }
            Phase::SyncGrown => Phase::Header,
            Phase::SyncHeader => Phase::End,
            _ => unreachable!("not a sync"),
        };
        self.round.enter(next);
    }

    /// Sends off every page that is dirty, once.
    fn write_pages(&mut self, which: Which, next: Phase) -> bool {
        let sent = self.send_dirty_pages(which);
        if sent {
            self.round.enter(next);
        }
        sent
    }

    /// Sends off the dirty pages from the cursor on. False: there is no staging for all of them.
    fn send_dirty_pages(&mut self, which: Which) -> bool {
        let size = self.geometry().page_size();
        loop {
            let cursor = self.round.cursor;
            let Some(slot) = self.cache(which).next_dirty(cursor) else { return true };
            if !self.ops.has_staging() {
                return false;
            }
            let page = self.cache(which).page_of(slot);
            let offset = page << self.geometry().page_bits();
            let cluster = offset >> self.geometry().cluster_bits();
            debug_assert!(self.metadata.contains(cluster), "pages of tables lie in tables");
            let id = self.emit_meta_write(Owner::Page(which, slot), offset, size);
            let cache = match which {
                Which::L2 => &mut self.l2_cache,
                Which::Refcounts => &mut self.refcount_cache,
            };
            self.ops.staging_mut(id).copy_from_slice(cache.bytes(slot));
            cache.begin_write(slot);
            self.round.cursor = Cache::number(slot) + 1;
            self.note_round_write();
        }
    }

    fn note_round_write(&mut self) {
        self.round.writes += 1;
        self.round.wrote |= self.round.synced == self.round.number;
    }

    /// The same for the top-level table above the pages of a cache.
    fn write_top(&mut self, which: Which, next: Phase) -> bool {
        let size = self.geometry().page_size();
        while self.ops.has_staging() {
            let table = match which {
                Which::L2 => &mut self.l1,
                Which::Refcounts => &mut self.refcount_table,
            };
            let Some(page) = table.take_dirty(self.round.cursor) else {
                self.round.enter(next);
                return true;
            };
            let offset = table.offset_of(page);
            let id = self.emit_meta_write(Owner::Top, offset, size);
            let staging = self.ops.staging_mut(id);
            match which {
                Which::L2 => self.l1.copy_page(page, staging, |_| false),
                Which::Refcounts => {
                    let hidden = |index| self.allocator.hides(index);
                    self.refcount_table.copy_page(page, staging, hidden);
                }
            }
            self.round.cursor = page + 1;
            self.note_round_write();
        }
        false
    }

    // ---- folding ----

    /// Collects the overlay's entries whose data is durable now.
    fn begin_fold(&mut self) {
        let durable = |entry: &Entry| entry.units_of(|epoch| self.epochs.is_durable(epoch)) != 0;
        self.round.fold.clear();
        self.round.fold.extend(self.overlay.iter().filter(durable));
        // In the order of the disk: neighbours share a page.
        self.round.fold.sort_unstable_by_key(|entry| entry.guest.0);
    }

    /// Folds what can be folded; pages have to come and to become clean meanwhile.
    fn fold(&mut self) -> bool {
        while let Some(&entry) = self.round.fold.last() {
            // It may be gone: unmapped since the round collected it, perhaps mapped again.
            let now = self.overlay.get(entry.guest).filter(|now| now.host == entry.host);
            let durable = |entry: Entry| entry.units_of(|epoch| self.epochs.is_durable(epoch));
            let units = now.map_or(0, durable);
            if units == 0 {
                self.round.fold.pop();
                continue;
            }
            let Some((slot, index)) = self.page_to_fold(entry) else { return false };
            mark!("round.folded");
            self.fold_entry(entry, units, slot, index);
            self.round.fold.pop();
            self.round.folded = true;
        }
        if self.round.folded {
            self.wake(|wait| wait == Wait::Overlay);
        } else {
            // All that a FLUSH can ask for is durable.
            mark!("round.nothing_to_fold");
            self.reply_flushes();
        }
        self.round.enter(Phase::Folded);
        true
    }

    /// Puts the mapping of some units into the page, which is fit to be written afterwards: all of
    /// an entry changes in one piece, as it lies within a sector.
    fn fold_entry(&mut self, entry: Entry, units: u32, slot: SlotId, index: usize) {
        let before = self.l2_cache.entry(slot, index);
        let after = self.decoder.with_data(before, entry.host, units);
        if !planted::is(Bug::OverlayEntryLost) {
            self.l2_cache.set_entry(slot, index, after);
            let old = self.decoder.reference(before, entry.guest);
            let same = matches!(old, Reference::Cluster(pointer) if pointer.at == entry.host);
            if !same {
                self.quarantine_reference(old);
            }
        }
        self.overlay.remove_units(entry.guest, units);
    }

    /// The page of an entry, if it is there and may be changed. Otherwise that is seen to: every
    /// dirty page in memory is fit to be written, and is clean afterwards.
    fn page_to_fold(&mut self, entry: Entry) -> Option<(SlotId, usize)> {
        let table = self.l2_table(entry.guest).expect("secured before the write was issued");
        let place = self.entry_place(table, entry.guest);
        match self.l2_cache.lookup(place.page) {
            Lookup::Hit(slot) if self.l2_cache.may_dirty(slot) => return Some((slot, place.index)),
            Lookup::Loading => return None,
            Lookup::Absent => {
                if self.load_for_round(Which::L2, place.page) != Stop::Wait(Wait::Slot(Which::L2)) {
                    return None;
                }
            }
            Lookup::Hit(_) => {}
        }
        mark!("round.makes_room_to_fold");
        self.round.cursor = 0;
        self.send_dirty_pages(Which::L2);
        None
    }

    /// Does the round wait for this page, to fold an entry into it?
    pub(crate) fn is_folding_into(&self, page: u64) -> bool {
        self.round.phase == Phase::Fold
            && self.round.fold.last().is_some_and(|entry| {
                let table = self.l2_table(entry.guest).expect("secured before");
                self.entry_place(table, entry.guest).page == page
            })
    }

    /// Writes the pages that were folded into; none of them may be on its way already.
    fn write_folded(&mut self) -> bool {
        if !self.round.folded {
            self.round.enter(Phase::TableAgain);
            return true;
        }
        if self.round.cursor == 0 && self.round.writes != 0 {
            return false;
        }
        self.write_pages(Which::L2, Phase::TableAgain)
    }

    /// A mapping that a FLUSH of this round may have asked for was replaced before it was folded:
    /// the page with the new one has to become durable in its place.
    pub(crate) fn fold_replaced(&mut self) {
        if !self.round.is_idle() {
            mark!("round.replaced_before_folded");
            self.round.folded = true;
        }
    }

    // ---- completions ----

    /// The fdatasync of a phase has returned, of every file.
    pub(crate) fn round_synced(&mut self) {
        self.epochs.succeeded();
        self.after_sync();
    }

    /// An operation of a round has ended.
    pub(crate) fn finish_round_op(&mut self, op: &OpState, result: Result<(), IoErrorKind>) {
        if let Owner::Page(which, slot) = op.owner {
            self.cache(which).end_write(slot, result.is_ok());
            self.wake(|wait| wait == Wait::Slot(which));
        }
        let result = if planted::is(Bug::LatchIgnored) { Ok(()) } else { result };
        match op.owner {
            // After a failure there is no round that this could belong to.
            _ if self.failed.is_some() => {}
            Owner::ExtendGrown => self.finish_grow_extend(op.kind, result),
            _ if result.is_err() => {
                let OpKind::MetaWrite { offset, .. } = op.kind else {
                    unreachable!("the rest of a round is metadata writes");
                };
                self.fail(FailureKind::MetadataWrite, offset);
            }
            _ => self.round.writes -= 1,
        }
    }

    fn reply_flushes(&mut self) {
        for id in 0..self.requests.len() {
            if self.requests[id].wait == Wait::ThisFlush {
                self.set_wait(id, Wait::Nothing);
                self.reply(id);
            }
        }
    }

    fn end_round(&mut self) {
        self.round.enter(Phase::Idle);
        self.allocated_durable = self.round.allocated;
        self.retire_records();
        self.reply_flushes();
        if self.is_dirty() || !self.quarantine.is_empty() {
            // What was folded has replaced clusters, which one more round gives back.
            self.note_dirty();
        }
        // Those who wait for room in quarantine would otherwise wait for the next FLUSH.
        let waits = |state: &RequestState| state.wait == Wait::Quarantine;
        if self.quarantine.is_crowded() || self.requests.iter().any(waits) {
            self.round.wanted |= self.quarantine.needs_round(self.round.synced);
        }
        self.wake(|wait| matches!(wait, Wait::Slot(_) | Wait::Overlay | Wait::Staging));
    }
}
