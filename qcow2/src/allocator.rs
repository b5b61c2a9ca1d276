//! The reservation: host clusters whose refcounts were raised ahead of need.
//!
//! A mapping may reach the disk only when the refcount of its cluster is there. Raising refcounts
//! one by one would cost every FLUSH of a new cluster an fdatasync of its own, so they are raised
//! for many clusters in one write, early; when that is durable the clusters stand in the **pool**
//! and a mapping to one of them needs no further order with refcounts. A crash leaks at most what
//! is reserved; a clean close gives it back.
//!
//! ```text
//!   free ──raise, zero──► pending ──round──► pool ──allocate──► mapped
//!                (refcount 1 in memory)  (refcount 1 on disk)
//! ```
//!
//! Two sources. **Recycled** clusters have refcount 0 inside the file; a cursor looks for them one
//! refcount page at a time. They may hold anything, also data of a reservation that an earlier
//! process lost, so they are zeroed (`ZeroRange`) as part of being reserved. **Fresh** ones lie
//! past the end of the file, which is extended over them (on a block device: behind all that is
//! counted; there they hold anything, too). Either way what becomes durable in the
//! same fdatasync as the refcounts is [`Space::Zero`]; where the host cannot zero, it is
//! [`Space::Stale`]. A cluster counts as free only if its refcount is 0 *and* no table lies there
//! *and* it is not in [quarantine](crate::quarantine).

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::cache::{Lookup, SlotId};
use crate::engine::Engine;
use crate::error::IoErrorKind;
use crate::geometry::Geometry;
use crate::mark;
use crate::op::OpKind;
use crate::optable::Owner;
use crate::planted::{self, Bug};
use crate::request::{Step, Stop, Wait, Which};
use crate::units::HostCluster;

/// What a cluster holds, in every state that a crash can leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    /// Zeros.
    Zero,
    /// Anything.
    Stale,
}

/// Adjacent clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allocated {
    pub(crate) at: HostCluster,
    pub(crate) count: u64,
    pub(crate) space: Space,
}

/// Clusters on their way into the pool.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pending {
    pub(crate) start: u64,
    pub(crate) count: u64,
    space: Space,
    /// The round whose first fdatasync makes them durable; `None` while they are being zeroed.
    round: Option<u64>,
}

/// A refcount block that the refcount table on disk must not name yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewBlock {
    /// Entry of the refcount table.
    pub(crate) index: u64,
    /// The round whose first fdatasync makes the block durable.
    pub(crate) round: u64,
    /// The block is durable, and its table entry is being made so by this round.
    pub(crate) linked: bool,
}

/// Reservation and the search for free clusters.
#[derive(Clone, Debug)]
pub(crate) struct Allocator {
    pub(crate) zero: VecDeque<(u64, u64)>,
    pub(crate) stale: VecDeque<(u64, u64)>,
    pub(crate) pool: u64,
    pub(crate) pending: Vec<Pending>,
    pub(crate) pending_clusters: u64,
    pub(crate) new_blocks: Vec<NewBlock>,
    /// On a block device: this cluster was zeroed to become one.
    pub(crate) zeroed_block: Option<u64>,
    /// Clusters to hold in reserve, once somebody has wanted one.
    pub(crate) target: u64,
    wanted: bool,
    /// All clusters from here on are fresh.
    pub(crate) next_fresh: u64,
    /// Clusters `scan..scan_end` were not looked at yet and may be free.
    scan: u64,
    scan_end: u64,
    pub(crate) extending: bool,
    /// Fresh space is written with zeros, not only allocated; FLUSHes and clusters allocated when
    /// that was decided.
    writes_zeros: bool,
    before: (u64, u64),
    /// Why nothing fresh can be reserved for now.
    pub(crate) error: Option<IoErrorKind>,
    /// The refcount table is too short for `next_fresh`.
    pub(crate) must_grow: bool,
    /// Reserve no more: the image is being closed.
    pub(crate) stopped: bool,
}

/// What looking for free clusters inside the file came to.
enum Recycled {
    Some,
    /// None that can be had now: fresh ones serve.
    Nothing,
    /// There are some, and they can be had when an operation under way has ended.
    Later,
}

/// Where the refcount of a cluster is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefcountPlace {
    /// Page number in the file, index in the page.
    Page(u64, usize),
    /// There is no refcount block: the refcount is 0.
    NoBlock,
    /// The refcount table is too short.
    NoTable,
}

/// With no more clusters than this for each FLUSH, fresh space is written with zeros.
const CLUSTERS_PER_FLUSH: u64 = 8;
/// Bytes of zeros written in one operation, or one cluster.
const MOST_WRITTEN: u64 = 2 << 20;

/// Reserved runs that are on their way at the same time; more would only fragment.
const MAX_PENDING: usize = 32;

impl Allocator {
    /// For a file that ends within or before cluster `end`, to keep `target` clusters in reserve.
    /// With `writes_zeros` the first of them are written: see `decide_how_to_zero`.
    pub(crate) fn new(end: u64, target: u64, writes_zeros: bool) -> Self {
        // As many runs as clusters at the worst.
        let runs = usize::try_from(target).expect("bytes in memory are more") + MAX_PENDING;
        Self {
            zero: VecDeque::with_capacity(runs),
            stale: VecDeque::with_capacity(runs),
            pool: 0,
            pending: Vec::with_capacity(MAX_PENDING),
            pending_clusters: 0,
            new_blocks: Vec::with_capacity(MAX_PENDING),
            zeroed_block: None,
            target,
            wanted: false,
            next_fresh: end,
            scan: 1,
            scan_end: end,
            extending: false,
            writes_zeros,
            before: (0, 0),
            error: None,
            must_grow: false,
            stopped: false,
        }
    }

    /// Where the file may be cut off when it is closed, in bytes.
    pub(crate) fn unused_end(&self, geometry: Geometry) -> u64 {
        self.next_fresh << geometry.cluster_bits()
    }

    pub(crate) fn skip_fresh(&mut self, to: u64) {
        debug_assert!(to >= self.next_fresh);
        self.next_fresh = to;
    }

    /// Clusters in reserve, durable or not.
    pub(crate) fn reserved(&self) -> u64 {
        self.pool + self.pending_clusters
    }

    /// Blocks that are not linked on disk stand in the way of moving the table.
    pub(crate) fn has_new_blocks(&self) -> bool {
        !self.new_blocks.is_empty()
    }

    /// Is this refcount table entry one that the disk must not see yet?
    pub(crate) fn hides(&self, index: u64) -> bool {
        if planted::is(Bug::BlockBeforeDurable) {
            return false;
        }
        self.new_blocks.iter().any(|block| block.index == index && !block.linked)
    }

    /// Refcounts could not be read: what is not known to be free is not. The next write that wants
    /// a cluster tries again.
    pub(crate) fn unreadable(&mut self) {
        self.scan = self.scan_end;
        self.error = Some(IoErrorKind::Io);
    }

    /// These clusters are free again.
    pub(crate) fn freed(&mut self, start: u64, count: u64) {
        self.scan = self.scan.min(start);
        self.scan_end = self.scan_end.max(start + count);
    }

    fn add_to_pool(&mut self, start: u64, count: u64, space: Space) {
        let queue = match space {
            Space::Zero => &mut self.zero,
            Space::Stale => &mut self.stale,
        };
        self.pool += count;
        match queue.back_mut() {
            Some((last, length)) if *last + *length == start => *length += count,
            _ => queue.push_back((start, count)),
        }
    }

    /// Takes up to `want` adjacent clusters, zeroed ones first.
    fn take(&mut self, want: u64) -> Option<Allocated> {
        let (queue, space) = if self.zero.is_empty() {
            (&mut self.stale, Space::Stale)
        } else {
            (&mut self.zero, Space::Zero)
        };
        let (start, length) = queue.front_mut()?;
        let count = want.min(*length);
        let at = HostCluster::new(*start).expect("the header is never free");
        (*start, *length) = (*start + count, *length - count);
        if *length == 0 {
            queue.pop_front();
        }
        self.pool -= count;
        Some(Allocated { at, count, space })
    }
}

impl Engine {
    pub(crate) fn refcount_place(&self, cluster: u64) -> RefcountPlace {
        let geometry = self.geometry();
        let Some(word) = self.refcount_table.get(cluster >> geometry.refblock_bits()) else {
            return RefcountPlace::NoTable;
        };
        // Checked when the image was opened, and ours since then.
        let Ok(Some(block)) = self.decoder.refcount_table(word, u64::MAX) else {
            return RefcountPlace::NoBlock;
        };
        let within = cluster & (geometry.refcounts_per_block() - 1);
        let byte = geometry.host_start(block).0 + geometry.refcount_bytes(within);
        let index = within & ((1 << geometry.refcount_page_bits()) - 1);
        let index = usize::try_from(index).expect("at most 2^15 per page");
        RefcountPlace::Page(byte >> geometry.page_bits(), index)
    }

    /// Takes up to `want` adjacent clusters from the pool. Nothing on disk refers to them.
    pub(crate) fn allocate(&mut self, want: u64) -> Step<Allocated> {
        if let Some(found) = self.allocator.take(want) {
            return Ok(found);
        }
        self.allocator.wanted = true;
        if self.allocator.reserved() == 0 && !self.allocator.extending {
            // Perhaps there is room again.
            self.allocator.error = None;
        }
        // `refill` runs after every event, so it is on its way, or finds now that it cannot be.
        Err(Stop::Wait(Wait::Reserve))
    }

    /// Clusters that were taken and never came to be referred to.
    pub(crate) fn put_back(&mut self, at: HostCluster, count: u64) {
        let zero = planted::is(Bug::FailedWriteStillZero);
        let space = if zero { Space::Zero } else { Space::Stale };
        mark!("reserve.put_back");
        self.allocator.add_to_pool(at.index(), count, space);
        self.wake(|wait| wait == Wait::Reserve);
    }

    /// Reserves more clusters when there are few.
    pub(crate) fn refill(&mut self) {
        if self.failed.is_some() || self.allocator.stopped || !self.allocator.wanted {
            return;
        }
        if !self.may_begin_round() {
            return;
        }
        let low = self.allocator.target.div_ceil(2);
        if self.allocator.reserved() < low {
            self.decide_how_to_zero();
        }
        while self.allocator.reserved() < low && self.reserve_more() {}
        if self.allocator.pool * 4 < self.allocator.target
            && self.allocator.pending.iter().any(|pending| pending.round.is_some())
        {
            self.round.wanted = true;
        }
    }

    /// Reserves up to the target. False: no more for now.
    fn reserve_more(&mut self) -> bool {
        while self.allocator.reserved() < self.allocator.target
            && self.allocator.pending.len() < MAX_PENDING
        {
            let want = self.allocator.target - self.allocator.reserved();
            match self.recycle(want) {
                Recycled::Some => {}
                Recycled::Later => return false,
                Recycled::Nothing if self.reserve_fresh(want) => {}
                Recycled::Nothing => return false,
            }
        }
        self.allocator.reserved() >= self.allocator.target
    }

    /// Reserves free clusters inside the file.
    fn recycle(&mut self, want: u64) -> Recycled {
        let per_page = 1_u64 << self.geometry().refcount_page_bits();
        while self.allocator.scan < self.allocator.scan_end {
            let start = self.allocator.scan;
            let end = ((start / per_page + 1) * per_page).min(self.allocator.scan_end);
            let RefcountPlace::Page(page, first) = self.refcount_place(start) else {
                self.allocator.scan = end;
                continue;
            };
            // A page that has to be read holds up nobody: fresh clusters serve meanwhile.
            let Ok(slot) = self.refcount_page(page) else { return Recycled::Nothing };
            let index = |cluster: u64| first + usize::try_from(cluster - start).expect("in page");
            let free = |engine: &Self, cluster: u64| {
                engine.refcount_cache.refcount(slot, index(cluster)) == 0
                    && !engine.metadata.contains(cluster)
                    && !engine.quarantine.contains(cluster)
            };
            let Some(at) = (start..end).find(|&cluster| free(self, cluster)) else {
                self.allocator.scan = end;
                continue;
            };
            if !self.ops.has_room() {
                // There is one when an operation has ended. Were the file made longer meanwhile, it
                // would grow for ever where discards and writes go on.
                return Recycled::Later;
            }
            let most = end.min(at + want);
            let count = (at..most).take_while(|&cluster| free(self, cluster)).count() as u64;
            self.raise(slot, index(at), count);
            self.allocator.scan = at + count;
            mark!("reserve.recycled");
            if planted::is(Bug::FreeAtOpenIsZero) {
                self.push_pending(at, count, Space::Zero, Some(self.next_round()));
                return Recycled::Some;
            }
            if planted::is(Bug::PunchNotDurable) {
                self.push_pending(at, count, Space::Zero, Some(self.next_round()));
            } else {
                self.push_pending(at, count, Space::Stale, None);
            }
            self.zero_reserved(at, count);
            return Recycled::Some;
        }
        Recycled::Nothing
    }

    fn zero_reserved(&mut self, at: u64, count: u64) {
        let bits = self.geometry().cluster_bits();
        let kind = OpKind::ZeroRange { offset: at << bits, len: count << bits };
        self.emit(Owner::Reserved(at), kind);
    }

    /// A recycled run was zeroed, or cannot be.
    pub(crate) fn finish_reserved(&mut self, start: u64, result: Result<(), IoErrorKind>) {
        let round = self.next_round();
        let found = self.allocator.pending.iter_mut().find(|p| p.start == start);
        let Some(pending) = found else { return };
        match result {
            Ok(()) if planted::is(Bug::PunchNotDurable) => {}
            Ok(()) => (pending.space, pending.round) = (Space::Zero, Some(round)),
            // The host cannot, or has no room: it is as good as any other space that holds
            // anything. A write to it will say for itself if there is no room.
            Err(_) => {
                mark!("reserve.cannot_zero");
                pending.round = Some(round);
            }
        }
        if planted::is(Bug::ReraisedRefcountNotDurable) {
            pending.round = Some(0);
            self.admit(self.round.synced);
        }
    }

    fn push_pending(&mut self, start: u64, count: u64, space: Space, round: Option<u64>) {
        self.allocator.pending.push(Pending { start, count, space, round });
        self.allocator.pending_clusters += count;
    }

    /// Reserves clusters past the end of the file. False: not now.
    fn reserve_fresh(&mut self, want: u64) -> bool {
        if self.allocator.error.is_some() {
            return false;
        }
        let first = self.allocator.next_fresh;
        let (page, index) = match self.refcount_place(first) {
            RefcountPlace::Page(page, index) => (page, index),
            RefcountPlace::NoBlock if self.metadata.contains(first) => {
                // On a block device, a table that nothing counts.
                self.allocator.next_fresh += 1;
                return true;
            }
            RefcountPlace::NoBlock => return self.new_refcount_block(first),
            RefcountPlace::NoTable => {
                self.allocator.must_grow = true;
                self.round.wanted = true;
                return false;
            }
        };
        let Ok(slot) = self.refcount_page(page) else { return false };
        let left = (1_u64 << self.geometry().refcount_page_bits()) - index as u64;
        let zero = |engine: &Self, step: u64| {
            let index = index + usize::try_from(step).expect("within a page");
            engine.refcount_cache.refcount(slot, index) == 0
                && !engine.metadata.contains(first + step)
        };
        let used = (0..left).take_while(|&step| !zero(self, step)).count() as u64;
        if used != 0 {
            // Somebody counts clusters past the end of the file. They are not ours.
            self.allocator.next_fresh += used;
            return true;
        }
        let run = (0..left.min(want)).take_while(|&step| zero(self, step)).count() as u64;
        let bits = self.geometry().cluster_bits();
        let most = if self.allocator.writes_zeros { (MOST_WRITTEN >> bits).max(1) } else { run };
        let run = self.extended_over(first, run.min(most));
        if run == 0 {
            return false;
        }
        if self.options.fixed_size && !self.ops.has_room() {
            return false;
        }
        self.raise(slot, index, run);
        self.allocator.next_fresh += run;
        mark!("reserve.fresh");
        if self.options.fixed_size {
            // What lies there was there before.
            self.push_pending(first, run, Space::Stale, None);
            self.zero_reserved(first, run);
            return true;
        }
        if planted::is(Bug::NoSyncBeforeL2) {
            self.allocator.add_to_pool(first, run, Space::Zero);
            self.wake(|wait| wait == Wait::Reserve);
            return true;
        }
        if self.allocator.writes_zeros && self.ops.has_room() {
            mark!("reserve.written");
            self.push_pending(first, run, Space::Stale, None);
            let (offset, len) = (first << bits, u32::try_from(run << bits).expect("2 MiB"));
            self.emit(Owner::Reserved(first), OpKind::WriteZeros { offset, len });
            return true;
        }
        self.push_pending(first, run, Space::Zero, Some(self.next_round()));
        true
    }

    /// Decides how fresh space becomes zeros. To have it allocated (fallocate) costs next to
    /// nothing, but then the first write to each piece of it changes the file system's metadata,
    /// and the fdatasync after that costs a flush of the device more. Where there is nearly one
    /// FLUSH for each cluster, writing zeros ahead of need is the smaller price. Above a backing
    /// file that is how it begins: a FLUSH costs two fdatasyncs there, and new clusters are mostly
    /// copied whole anyway.
    fn decide_how_to_zero(&mut self) {
        let flushes = self.stats.flushes + self.stats.fua_writes;
        let (flushes_then, clusters_then) = self.allocator.before;
        let clusters = self.stats.allocated_data;
        // Asked again and again until the file is longer.
        if clusters - clusters_then < self.allocator.target / 4 {
            return;
        }
        self.allocator.before = (flushes, clusters);
        self.allocator.writes_zeros =
            (flushes - flushes_then) * CLUSTERS_PER_FLUSH > clusters - clusters_then;
    }

    /// The refcount page, ready to be changed; if it is not, that is being seen to.
    pub(crate) fn refcount_page(&mut self, page: u64) -> Step<SlotId> {
        match self.refcount_cache.lookup(page) {
            Lookup::Hit(slot) if self.refcount_cache.may_dirty(slot) => {
                self.stats.refcount_hits += 1;
                Ok(slot)
            }
            Lookup::Hit(_) => {
                self.round.wanted = true;
                Err(Stop::Wait(Wait::Slot(Which::Refcounts)))
            }
            Lookup::Loading => Err(Stop::Wait(Wait::Page(Which::Refcounts, page))),
            Lookup::Absent => Err(self.load(Which::Refcounts, page)),
        }
    }

    fn raise(&mut self, slot: SlotId, index: usize, count: u64) {
        for step in 0..usize::try_from(count).expect("within a page") {
            debug_assert_eq!(self.refcount_cache.refcount(slot, index + step), 0);
            let two = planted::is(Bug::CopiedWithRefcountTwo);
            self.refcount_cache.set_refcount(slot, index + step, if two { 2 } else { 1 });
        }
        self.note_dirty();
    }

    /// After `refill`: if nothing fresh can be reserved, and nothing is on its way from elsewhere,
    /// those who wait for a cluster fail.
    pub(crate) fn check_starved(&mut self) {
        let Some(kind) = self.allocator.error else { return };
        let scanning = self.allocator.scan < self.allocator.scan_end;
        let wanted = self.requests.iter().any(|request| request.wait == Wait::Reserve)
            || self.adoption_waits_for(Wait::Reserve);
        if !self.quarantine.is_empty() && wanted {
            // Clusters are on their way to being free: a round at a time brings them closer.
            mark!("reserve.waits_for_quarantine");
            self.round.wanted |= self.quarantine.needs_round(self.round.synced);
            return;
        }
        if self.allocator.reserved() == 0 && !scanning && !self.allocator.extending {
            // The next write that wants a cluster tries again; without one nobody does.
            self.allocator.error = None;
            self.allocator.wanted = false;
            self.wake_failing(kind, |wait| wait == Wait::Reserve);
        }
    }

    /// Moves into the pool what is durable and counted by a block that the table names.
    pub(crate) fn admit(&mut self, round: u64) {
        let bits = self.geometry().refblock_bits();
        let mut number = 0;
        while let Some(&pending) = self.allocator.pending.get(number) {
            let durable = pending.round.is_some_and(|made| made <= round);
            let block = pending.start >> bits;
            if durable && !self.allocator.new_blocks.iter().any(|new| new.index == block) {
                self.allocator.pending.remove(number);
                self.allocator.pending_clusters -= pending.count;
                self.allocator.add_to_pool(pending.start, pending.count, pending.space);
            } else {
                number += 1;
            }
        }
        if self.allocator.pool != 0 {
            self.wake(|wait| wait == Wait::Reserve);
        }
    }
}
