//! Host clusters: finding free ones, raising and lowering refcounts, extending the file.
//!
//! Two sources. **Fresh** clusters lie past what was the end of the file when it was opened; the
//! file is extended over them ahead of need, so they read as zeros. **Recycled** ones have refcount
//! 0 inside the old file; a cursor looks for them one refcount page at a time, and never makes
//! a request wait: a page that is not in the cache is sent for while a fresh cluster is used.
//!
//! A refcount rises here, in memory; it becomes durable in the round that makes the mapping
//! durable, before it (see [`flush`](crate::flush)). A cluster counts as free only if its refcount
//! is 0 *and* no table of the image lies there.

use alloc::vec::Vec;

use crate::cache::{Lookup, SlotId};
use crate::engine::Engine;
use crate::entry::copied_word;
use crate::error::IoErrorKind;
use crate::geometry::Geometry;
use crate::op::OpKind;
use crate::optable::Owner;
use crate::request::{Step, Stop, Wait, Which};
use crate::units::HostCluster;

/// What a free cluster holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    /// It reads as zeros, and will after a crash: past the old end of the file, never written.
    Zero,
    /// Anything.
    Stale,
}

/// Clusters that were allocated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allocated {
    pub(crate) at: HostCluster,
    pub(crate) count: u64,
    pub(crate) space: Space,
}

/// Where to look for free clusters.
#[derive(Clone, Debug)]
pub(crate) struct Allocator {
    /// All clusters from here on are fresh.
    next_fresh: u64,
    /// Clusters `scan..scan_end` were not looked at yet and may be free.
    scan: u64,
    scan_end: u64,
    extending: bool,
    /// The file could not be extended: look at every refcount before giving up.
    full: bool,
    /// Clusters whose refcount is to be lowered to 0 as soon as its page is there.
    frees: Vec<u64>,
    /// The refcount table is too short for `next_fresh`.
    pub(crate) must_grow: bool,
}

impl Allocator {
    /// For a file that ends within or before cluster `end`.
    pub(crate) fn new(end: u64) -> Self {
        let frees = Vec::new();
        let (extending, full, must_grow) = (false, false, false);
        Self { next_fresh: end, scan: 1, scan_end: end, extending, full, frees, must_grow }
    }

    /// Where the file may be cut off when it is closed, in bytes.
    pub(crate) fn unused_end(&self, geometry: Geometry) -> u64 {
        self.next_fresh << geometry.cluster_bits()
    }

    pub(crate) fn next_fresh(&self) -> u64 {
        self.next_fresh
    }

    pub(crate) fn skip_fresh(&mut self, to: u64) {
        debug_assert!(to >= self.next_fresh);
        self.next_fresh = to;
    }

    /// Refcounts could not be read: what is not known to be free is not.
    pub(crate) fn stop_recycling(&mut self) {
        self.scan = self.scan_end;
        self.frees.clear();
    }
}

/// Where the refcount of a cluster is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RefcountPlace {
    /// Page number in the file, index in the page.
    Page(u64, usize),
    /// There is no refcount block: the refcount is 0.
    NoBlock,
    /// The refcount table is too short.
    NoTable,
}

impl Engine {
    fn refcount_place(&self, cluster: u64) -> RefcountPlace {
        let geometry = self.geometry();
        let Some(word) = self.refcount_table.get(cluster >> geometry.refblock_bits()) else {
            return RefcountPlace::NoTable;
        };
        // Checked when the image was opened, and ours since then.
        let Ok(Some(block)) = self.decoder.refcount_table(word, u64::MAX) else {
            return RefcountPlace::NoBlock;
        };
        let within = cluster & (geometry.refcounts_per_block() - 1);
        let byte = geometry.host_start(block).0 + within * 2;
        let index = within & ((1 << geometry.refcount_page_bits()) - 1);
        let index = usize::try_from(index).expect("below 2048");
        RefcountPlace::Page(byte >> geometry.page_bits(), index)
    }

    /// Allocates up to `want` adjacent clusters: their refcounts are 1 from now on.
    pub(crate) fn allocate(&mut self, want: u64) -> Step<Allocated> {
        if let Some(found) = self.recycle(want)? {
            return Ok(found);
        }
        // Nothing is left inside the file: the next write tries to extend it again.
        self.allocator.full &= self.allocator.scan < self.allocator.scan_end;
        self.allocate_fresh(want)
    }

    /// Looks for free clusters inside the old file. Waits for a page of refcounts only if the file
    /// could not be extended.
    fn recycle(&mut self, want: u64) -> Step<Option<Allocated>> {
        let per_page = 1_u64 << self.geometry().refcount_page_bits();
        // Two pages at the most: the rest of this one and the next. All, if that is the only way.
        for _ in 0..if self.allocator.full { u64::MAX } else { 2 } {
            let start = self.allocator.scan;
            if start >= self.allocator.scan_end {
                return Ok(None);
            }
            let page_end = ((start / per_page) + 1) * per_page;
            let end = page_end.min(self.allocator.scan_end);
            let RefcountPlace::Page(page, first) = self.refcount_place(start) else {
                self.allocator.scan = end;
                continue;
            };
            let slot = match self.refcount_page(page) {
                Ok(slot) => slot,
                Err(stop) if self.allocator.full => return Err(stop),
                Err(_) => return Ok(None),
            };
            let free = |engine: &Self, cluster: u64| {
                let index = first + usize::try_from(cluster - start).expect("within a page");
                engine.refcount_cache.refcount(slot, index) == 0
                    && !engine.metadata.contains(cluster)
            };
            let Some(at) = (start..end).find(|&cluster| free(self, cluster)) else {
                self.allocator.scan = end;
                continue;
            };
            let most = end.min(at + want);
            let count = (at..most).take_while(|&cluster| free(self, cluster)).count() as u64;
            self.raise(slot, first + usize::try_from(at - start).expect("within a page"), count);
            self.allocator.scan = at + count;
            let at = HostCluster::new(at).expect("the scan begins behind the header");
            return Ok(Some(Allocated { at, count, space: Space::Stale }));
        }
        Ok(None)
    }

    fn allocate_fresh(&mut self, want: u64) -> Step<Allocated> {
        loop {
            let first = self.allocator.next_fresh;
            let (page, index) = match self.refcount_place(first) {
                RefcountPlace::Page(page, index) => (page, index),
                RefcountPlace::NoBlock => {
                    self.new_refcount_block(first)?;
                    continue;
                }
                RefcountPlace::NoTable => {
                    self.allocator.must_grow = true;
                    self.round.wanted = true;
                    return Err(Stop::Wait(Wait::Grow));
                }
            };
            let slot = self.refcount_page(page)?;
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
                continue;
            }
            let run = (0..left.min(want)).take_while(|&step| zero(self, step)).count() as u64;
            let run = self.extend_over(first, run)?;
            self.raise(slot, index, run);
            self.allocator.next_fresh += run;
            let at = HostCluster::new(first).expect("fresh clusters lie behind the header");
            return Ok(Allocated { at, count: run, space: Space::Zero });
        }
    }

    /// The refcount page, ready to be changed.
    fn refcount_page(&mut self, page: u64) -> Step<SlotId> {
        match self.refcount_cache.lookup(page) {
            Lookup::Hit(slot) if self.refcount_cache.may_dirty(slot) => Ok(slot),
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
            self.refcount_cache.set_refcount(slot, index + step, 1);
        }
        self.note_dirty();
    }

    /// Makes sure that the file reaches over up to `want` clusters from `first` on; returns how
    /// many of them it reaches over now, at least one.
    fn extend_over(&mut self, first: u64, want: u64) -> Step<u64> {
        let geometry = self.geometry();
        let reached = self.file_len >> geometry.cluster_bits();
        if reached > first {
            return Ok(want.min(reached - first));
        }
        if !self.allocator.extending {
            let need = (first + want) << geometry.cluster_bits();
            let ahead = (first << geometry.cluster_bits()) + self.options.reservation;
            let ahead = geometry.clusters_for(ahead) << geometry.cluster_bits();
            self.emit_extend(need.max(ahead), false);
        }
        Err(Stop::Wait(Wait::Extend))
    }

    fn emit_extend(&mut self, to: u64, least: bool) {
        self.allocator.extending = true;
        self.emit(Owner::Extend { least }, OpKind::Extend { from: self.file_len, to });
    }

    pub(crate) fn finish_extend(
        &mut self,
        kind: OpKind,
        least: bool,
        result: Result<(), IoErrorKind>,
    ) {
        let OpKind::Extend { to, .. } = kind else { unreachable!("an extend") };
        self.allocator.extending = false;
        match result {
            Ok(()) => {
                self.file_len = self.file_len.max(to);
                self.wake(|wait| wait == Wait::Extend);
            }
            Err(IoErrorKind::NoSpace) if !least => {
                // Ahead of need there is no room; perhaps for one cluster there is.
                let to = (self.allocator.next_fresh + 1) << self.geometry().cluster_bits();
                self.emit_extend(to, true);
            }
            Err(_) if self.allocator.scan < self.allocator.scan_end => {
                self.allocator.full = true;
                self.wake(|wait| wait == Wait::Extend);
            }
            Err(kind) => self.wake_failing(kind, |wait| wait == Wait::Extend),
        }
    }

    /// A refcount block for the range that `cluster` lies in, at `cluster` itself: it counts
    /// itself. The space is fresh, so all of the block but that one entry is zeros on disk already.
    fn new_refcount_block(&mut self, cluster: u64) -> Step<()> {
        if self.round.holds() {
            // The table page must not name a block that this round does not make durable.
            return Err(Stop::Wait(Wait::Round));
        }
        self.extend_over(cluster, 1)?;
        let geometry = self.geometry();
        let within = cluster & (geometry.refcounts_per_block() - 1);
        let block = HostCluster::new(cluster).expect("fresh clusters lie behind the header");
        let page = (geometry.host_start(block).0 + within * 2) >> geometry.page_bits();
        let slot = match self.refcount_cache.lookup(page) {
            // Left by an attempt that ended just below: it is what the disk holds.
            Lookup::Hit(slot) => slot,
            Lookup::Loading => unreachable!("nobody reads a block that no table names"),
            Lookup::Absent => {
                let Some(slot) = self.refcount_cache.begin_load(page) else {
                    self.round.wanted = true;
                    return Err(Stop::Wait(Wait::Slot(Which::Refcounts)));
                };
                self.refcount_cache.finish_zero(slot);
                slot
            }
        };
        if !self.refcount_cache.may_dirty(slot) {
            self.round.wanted = true;
            return Err(Stop::Wait(Wait::Round));
        }
        let index = within & ((1 << geometry.refcount_page_bits()) - 1);
        self.refcount_cache.set_refcount(slot, usize::try_from(index).expect("below 2048"), 1);
        let word = copied_word(geometry.host_start(block)) & !crate::entry::COPIED;
        self.refcount_table.set(cluster >> geometry.refblock_bits(), word);
        self.metadata.insert(cluster);
        self.allocator.next_fresh = cluster + 1;
        self.stats.allocated_metadata += 1;
        self.note_dirty();
        Ok(())
    }

    /// Gives clusters back that nothing on disk refers to. Nothing may be in flight to them.
    pub(crate) fn release(&mut self, at: HostCluster, count: u64) {
        self.allocator.frees.extend(at.index()..at.index() + count);
    }

    pub(crate) fn has_frees(&self) -> bool {
        !self.allocator.frees.is_empty()
    }

    /// Lowers the refcounts of released clusters, as far as their pages are there.
    pub(crate) fn free_clusters(&mut self) {
        while self.failed.is_none()
            && let Some(&cluster) = self.allocator.frees.last()
        {
            let RefcountPlace::Page(page, index) = self.refcount_place(cluster) else {
                // It was allocated, so it has a refcount.
                debug_assert!(false, "cluster {cluster} has no refcount");
                self.allocator.frees.pop();
                continue;
            };
            // When there is no page or no room, the next completion comes by here again.
            let Ok(slot) = self.refcount_page(page) else { return };
            self.allocator.frees.pop();
            let refcount = self.refcount_cache.refcount(slot, index).saturating_sub(1);
            self.refcount_cache.set_refcount(slot, index, refcount);
            // If it was more than 1 in an image that counts wrongly, the scan passes over it.
            self.allocator.scan = self.allocator.scan.min(cluster);
            self.allocator.scan_end = self.allocator.scan_end.max(cluster + 1);
            self.note_dirty();
        }
    }
}
