//! Host clusters between their last reference and being free.
//!
//! A cluster that a write-zeroes or a discard has unmapped goes through four gates, in this order;
//! each would corrupt or leak data if it were left out:
//!
//! 1. **Unlinked, durably.** As long as a crash can bring the old L2 entry back, the cluster is
//!    that entry's: its refcount stays and its bytes stay.
//! 2. **Lowered, durably.** Only then is the refcount lowered; were the cluster punched before that
//!    is durable, nothing would break, but it must not be handed out while the disk still counts
//!    it, for it would be counted up without being written down.
//! 3. **No operation in flight.** A read or write that was issued on the old mapping may still be
//!    on its way ([pins](Item::before)): it must not meet the next owner's bytes.
//! 4. **Punched.** The hole is complete before the cluster is free, so that it can't swallow what
//!    the next owner writes.
//!
//! That a run was one entry's alone (COPIED) is what the image says; what counts is the refcount.
//! A cluster that is still counted is left alone, and one that was not counted at all before ends
//! writing: the image contradicts itself.
//!
//! A cluster that several refer to (snapshots, compressed clusters that share it) passes the first
//! two gates once for each reference; only the last goes on to the others.

use alloc::vec::Vec;

use crate::allocator::RefcountPlace;
use crate::engine::Engine;
use crate::entry::Reference;
use crate::error::{FailureKind, IoErrorKind};
use crate::mark;
use crate::op::OpKind;
use crate::optable::Owner;
use crate::planted::{self, Bug};
use crate::request::Wait;
use crate::units::HostCluster;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The L2 page without the entry is durable after the first fdatasync of this round.
    Unlinked(u64),
    /// The refcounts of the first so many clusters have been lowered in memory.
    Lowering(u64),
    /// The lowered refcounts are durable after the first fdatasync of this round.
    Lowered(u64),
    Punching,
}

/// A run of clusters.
#[derive(Clone, Copy, Debug)]
struct Item {
    start: u64,
    count: u64,
    stage: Stage,
    /// Payload operations with a number below this may use the old mapping.
    before: u64,
    /// Nothing on disk ever referred to it: it is free as soon as its refcount is lowered.
    unused: bool,
    /// A single cluster that others may refer to as well: only the last of them frees it.
    shared: bool,
    /// The same, and it is an L2 table that was copied: see [`Engine::quarantine_table`].
    table: bool,
}

/// All of them.
#[derive(Clone, Debug)]
pub(crate) struct Quarantine {
    items: Vec<Item>,
    clusters: u64,
    /// Clusters that have left, and whose lowered refcount is not durable: the present round makes
    /// it so, or the next.
    settling: [u64; 2],
}

/// Runs in quarantine; when it is full, those who unmap wait.
const MAX_ITEMS: usize = 1024;

/// What a round that folds mappings may add on top of that: one run for each.
const MAX_FOLDED: usize = 2048;

impl Quarantine {
    pub(crate) fn new() -> Self {
        let items = Vec::with_capacity(MAX_ITEMS + MAX_FOLDED);
        Self { items, clusters: 0, settling: [0; 2] }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Clusters in quarantine.
    pub(crate) fn clusters(&self) -> u64 {
        self.clusters
    }

    /// Clusters that have left it, and are counted on disk.
    pub(crate) fn settling(&self) -> u64 {
        self.settling[0] + self.settling[1]
    }

    /// A round begins: it makes durable what was lowered before.
    pub(crate) fn round_begins(&mut self) {
        self.settling = [self.settling[0] + self.settling[1], 0];
    }

    /// The first fdatasync of the round has returned.
    pub(crate) fn round_synced(&mut self) {
        self.settling[0] = 0;
    }

    pub(crate) fn has_room(&self, runs: usize) -> bool {
        self.items.len() + runs <= MAX_ITEMS
    }

    pub(crate) fn is_crowded(&self) -> bool {
        self.items.len() * 2 > MAX_ITEMS
    }

    /// Does any run wait for a round that has not synced yet?
    pub(crate) fn needs_round(&self, synced: u64) -> bool {
        self.items.iter().any(|item| match item.stage {
            Stage::Unlinked(round) | Stage::Lowered(round) => round > synced,
            Stage::Lowering(_) | Stage::Punching => false,
        })
    }

    pub(crate) fn contains(&self, cluster: u64) -> bool {
        self.items.iter().any(|item| item.start <= cluster && cluster < item.start + item.count)
    }

    /// Reserved clusters that are not needed: just count them down.
    pub(crate) fn lower_only(&mut self, start: u64, count: u64) {
        self.clusters += count;
        let stage = Stage::Lowering(0);
        let (before, unused, shared, table) = (0, true, false, false);
        self.items.push(Item { start, count, stage, before, unused, shared, table });
    }
}

impl Engine {
    /// What an entry referred to, and does not refer to any more.
    pub(crate) fn quarantine_reference(&mut self, reference: Reference) {
        match reference {
            Reference::Nothing => {}
            Reference::Cluster(pointer) if pointer.copied => self.quarantine(pointer.at, 1),
            Reference::Cluster(pointer) => self.quarantine_shared(pointer.at.index()),
            Reference::Compressed { first, count } => {
                for cluster in first..first + count {
                    self.quarantine_shared(cluster);
                }
                if planted::is(Bug::CompressedReleasedTwice) {
                    self.quarantine_shared(first);
                }
            }
        }
    }

    /// One of perhaps several references to a cluster is gone from memory.
    pub(crate) fn quarantine_shared(&mut self, cluster: u64) {
        mark!("quarantine.shared");
        self.quarantine_one(cluster, false);
    }

    /// The L1 entry that led to an L2 table leads to a copy of it, in memory. The table stays in
    /// the set of metadata: on disk the entry leads to it still, and what an image that contradicts
    /// itself lets the guest write there would be a table after a crash. When the last reference is
    /// gone it leaves the set; until then it is a snapshot's.
    pub(crate) fn quarantine_table(&mut self, cluster: u64) {
        self.quarantine_one(cluster, true);
    }

    fn quarantine_one(&mut self, cluster: u64, table: bool) {
        let (start, count, before) = (cluster, 1, self.ops.next_number());
        let stage = Stage::Unlinked(self.next_round());
        self.quarantine.clusters += 1;
        let item = Item { start, count, stage, before, unused: false, shared: true, table };
        self.quarantine.items.push(item);
        self.round.wanted |= self.quarantine.is_crowded();
    }

    /// The mapping to `at` is gone from memory.
    pub(crate) fn quarantine(&mut self, at: HostCluster, count: u64) {
        let (start, before) = (at.index(), self.ops.next_number());
        let stage = Stage::Unlinked(self.next_round());
        self.quarantine.clusters += count;
        if let Some(last) = self.quarantine.items.last_mut()
            && last.start + last.count == start
            && last.stage == stage
            && !(last.unused || last.shared)
        {
            last.count += count;
            last.before = before;
            return;
        }
        let (unused, shared, table) = (false, false, false);
        let item = Item { start, count, stage, before, unused, shared, table };
        self.quarantine.items.push(item);
        self.round.wanted |= self.quarantine.is_crowded();
    }

    /// Lets every run go on that can.
    pub(crate) fn advance_quarantine(&mut self) {
        if self.quarantine.is_empty() || self.failed.is_some() {
            return;
        }
        let oldest = self.ops.oldest_payload();
        let mut number = 0;
        while let Some(&item) = self.quarantine.items.get(number) {
            if self.failed.is_some() {
                return;
            }
            let mut gone = false;
            match item.stage {
                Stage::Unlinked(round)
                    if round <= self.round.synced || planted::is(Bug::DecrementBeforeUnlink) =>
                {
                    if !item.table && self.is_table(item) {
                        return;
                    }
                    mark!("quarantine.unlinked_durably");
                    self.quarantine.items[number].stage = Stage::Lowering(0);
                    gone = self.lower(number);
                }
                Stage::Lowering(_) => gone = self.lower(number),
                Stage::Lowered(_) if planted::is(Bug::FreeBeforeDecrement) => {
                    self.release(number);
                    gone = true;
                }
                Stage::Lowered(round)
                    if (round <= self.round.synced || planted::is(Bug::PunchBeforeDecrement))
                        && (item.before <= oldest || planted::is(Bug::PinIgnored))
                        && self.ops.has_room() =>
                {
                    if self.is_table(item) {
                        return;
                    }
                    mark!("quarantine.lowered_durably");
                    self.quarantine.items[number].stage = Stage::Punching;
                    let bits = self.geometry().cluster_bits();
                    let (offset, len) = (item.start << bits, item.count << bits);
                    self.emit(Owner::Punch(item.start), OpKind::Punch { offset, len });
                    if planted::is(Bug::ReuseBeforePunch) {
                        self.release(number);
                        gone = true;
                    }
                }
                Stage::Lowered(round) if round <= self.round.synced && item.before > oldest => {
                    mark!("quarantine.pinned");
                }
                Stage::Unlinked(_) | Stage::Lowered(_) | Stage::Punching => {}
            }
            number += usize::from(!gone);
        }
    }

    /// Does metadata lie there, or has come to lie there? Then the entry that is gone contradicted
    /// the rest of the image, and the table is not to be counted down and punched: writing ends.
    fn is_table(&mut self, item: Item) -> bool {
        let is_table = self.metadata.overlaps(item.start, item.count);
        if is_table {
            self.fail(FailureKind::Overlap, item.start << self.geometry().cluster_bits());
        }
        is_table
    }

    /// Counts down as far as the refcount pages are there. True if the item is gone.
    fn lower(&mut self, number: usize) -> bool {
        loop {
            let item = self.quarantine.items[number];
            let Stage::Lowering(done) = item.stage else { unreachable!("called for that stage") };
            if done == item.count {
                break;
            }
            // When the page is not there, the event that brings it comes by here again.
            let Some(left) = self.lower_one(item.start + done) else { return false };
            if left == 0 || planted::is(Bug::SharedClusterPunched) {
                if item.table {
                    self.metadata.remove(item.start);
                }
                self.quarantine.items[number].stage = Stage::Lowering(done + 1);
            } else if item.count == 1 {
                self.still_counted(item.start, item.before);
                self.quarantine.items.remove(number);
                return true;
            } else {
                // COPIED said that nobody else has it. The refcount is what counts.
                self.still_counted(item.start + done, item.before);
                self.leave_out(number, done);
            }
        }
        let item = self.quarantine.items[number];
        if item.unused {
            self.quarantine.settling[1] += item.count;
            self.release(number);
            return true;
        }
        self.quarantine.items[number].stage = Stage::Lowered(self.next_round());
        false
    }

    /// Counts one cluster down, and returns what is left. `None`: not now, or never again, as there
    /// is nothing to count down.
    fn lower_one(&mut self, cluster: u64) -> Option<u64> {
        let slot = match self.refcount_place(cluster) {
            RefcountPlace::Page(page, index) => Some((self.refcount_page(page).ok()?, index)),
            RefcountPlace::NoBlock | RefcountPlace::NoTable => None,
        };
        let count = slot.map_or(0, |(slot, index)| self.refcount_cache.refcount(slot, index));
        let (Some((slot, index)), Some(left)) = (slot, count.checked_sub(1)) else {
            // Two have referred to it, and one was counted: whose bytes are there, nobody knows.
            self.fail(FailureKind::NotCounted, cluster << self.geometry().cluster_bits());
            return None;
        };
        self.refcount_cache.set_refcount(slot, index, left);
        self.note_dirty();
        Some(left)
    }

    /// Others still refer to a cluster. Whoever frees it waits for our readers, too.
    fn still_counted(&mut self, cluster: u64, before: u64) {
        mark!("quarantine.still_counted");
        self.quarantine.clusters -= 1;
        self.quarantine.settling[1] += 1;
        for other in &mut self.quarantine.items {
            if other.start <= cluster && cluster < other.start + other.count {
                other.before = other.before.max(before);
            }
        }
        self.wake(|wait| wait == Wait::Quarantine);
    }

    /// Takes the cluster behind the first `done` out of a run of several. What comes before and
    /// what comes behind it go on by themselves. (That there is one more of them now, and perhaps
    /// more than there is room set aside for, happens only where an image contradicts itself.)
    fn leave_out(&mut self, number: usize, done: u64) {
        let item = self.quarantine.items[number];
        let head = Item { count: done, stage: Stage::Lowering(done), ..item };
        let (start, count) = (item.start + done + 1, item.count - done - 1);
        let rest = Item { start, count, stage: Stage::Lowering(0), ..item };
        let (stays, moves) = if count == 0 { (head, rest) } else { (rest, head) };
        self.quarantine.items[number] = stays;
        if moves.count != 0 {
            self.quarantine.items.push(moves);
        }
    }

    /// A page of refcounts cannot be read: the clusters that it counts stay counted, a leak. Those
    /// of a run that were counted down before go on.
    pub(crate) fn abandon_lowering(&mut self, page: u64) {
        let needs = |engine: &Self, item: &Item| match item.stage {
            Stage::Lowering(done) => {
                let place = engine.refcount_place(item.start + done);
                matches!(place, RefcountPlace::Page(needed, _) if needed == page)
            }
            _ => false,
        };
        while let Some(number) = self.quarantine.items.iter().position(|item| needs(self, item)) {
            let round = self.next_round();
            let item = &mut self.quarantine.items[number];
            let Stage::Lowering(done) = item.stage else { unreachable!("looked for") };
            self.quarantine.clusters -= item.count - done;
            (item.count, item.stage) = (done, Stage::Lowered(round));
            if done == 0 {
                self.quarantine.items.remove(number);
            } else if item.unused {
                self.release(number);
            }
        }
        self.wake(|wait| wait == Wait::Quarantine);
    }

    fn release(&mut self, number: usize) {
        let item = self.quarantine.items.remove(number);
        self.quarantine.clusters -= item.count;
        self.allocator.freed(item.start, item.count);
        self.wake(|wait| wait == Wait::Quarantine);
    }

    /// The hole is there, or the host cannot make one, which is no failure.
    pub(crate) fn finish_punch(&mut self, start: u64, result: Result<(), IoErrorKind>) {
        // Whatever the result: the cluster is free, and whoever reserves it zeroes it.
        let _ = result;
        let punched = |item: &Item| item.start == start && item.stage == Stage::Punching;
        if let Some(number) = self.quarantine.items.iter().position(punched) {
            mark!("quarantine.punched");
            self.release(number);
        }
    }
}
