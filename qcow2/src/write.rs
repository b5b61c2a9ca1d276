//! Writes: in place, into a cluster that a zero cluster kept, or into a new one.
//!
//! A write of new clusters goes: secure the L2 table, allocate (refcounts rise in memory), write
//! the payload and zeros around it, and only when all of that has completed put the mapping into
//! the L2 page. Until then readers see the old state, and if anything fails the old state stays.
//!
//! While a write fills a guest cluster that was not data before, the cluster belongs to it: other
//! writes to the same cluster wait, and then find it allocated. A request takes clusters in
//! ascending order only, so two requests can't wait for each other.

use crate::allocator::Space;
use crate::cache::Lookup;
use crate::engine::Engine;
use crate::entry::{Mapping, Pointer, copied_word};
use crate::error::{FailureKind, IoErrorKind};
use crate::op::OpKind;
use crate::optable::Owner;
use crate::request::{MAX_SEGMENTS, RequestId, Segment, Step, Stop, Wait, Which};
use crate::units::{GuestCluster, GuestOffset, HostCluster};

/// An L2 table on its way: allocated, not yet linked into L1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NewTable {
    pub(crate) l1_index: u64,
    pub(crate) at: HostCluster,
    /// All of it reads as zeros: it may be linked.
    pub(crate) zeroed: bool,
}

/// A part of a write, cut so that one mapping holds for all of it.
struct Piece {
    /// First byte in the request's buffer.
    at: u32,
    bytes: u32,
    /// First guest cluster.
    cluster: GuestCluster,
    /// Bytes of that cluster before the piece.
    within: u64,
    /// Clusters that the piece touches.
    clusters: u64,
}

impl Engine {
    pub(crate) fn step_write(&mut self, id: RequestId, fua: bool) -> Step<()> {
        let len = self.requests[id].range().1;
        loop {
            if self.requests[id].pending == 0 && self.requests[id].segment_count != 0 {
                if self.requests[id].error.is_some() {
                    self.abort_segments(id);
                } else {
                    self.commit_segments(id)?;
                }
            }
            let state = &self.requests[id];
            if state.error.is_some() || state.pos == len {
                if state.pending != 0 {
                    return Err(Stop::Wait(Wait::Ops));
                }
                // A FUA write waits for one round, which replies for it.
                return if fua && state.error.is_none() { self.durable() } else { Ok(()) };
            }
            if state.segment_count == MAX_SEGMENTS {
                return Err(Stop::Wait(Wait::Ops));
            }
            self.issue_piece(id)?;
        }
    }

    /// Issues the operations for the next piece of a write.
    fn issue_piece(&mut self, id: RequestId) -> Step<()> {
        if !self.ops.has_payload_room() {
            return Err(Stop::Wait(Wait::OpSlot));
        }
        let geometry = self.geometry();
        let (offset, len) = self.requests[id].range();
        let at = self.requests[id].pos;
        let guest = GuestOffset(offset + u64::from(at));
        let (cluster, within) = (geometry.cluster_of(guest), geometry.within(guest));
        let left = u64::from(len - at);
        let most = self.not_in_progress(cluster, geometry.clusters_for(within + left));
        if most == 0 {
            return Err(Stop::Wait(Wait::Cluster(cluster)));
        }
        let run = self.resolve(cluster, most)?;
        let piece = |clusters: u64| {
            let bytes = left.min((clusters << geometry.cluster_bits()) - within);
            let bytes = u32::try_from(bytes).expect("at most the request");
            Piece { at, bytes, cluster, within, clusters }
        };
        match run.mapping {
            Mapping::Data(pointer) => {
                self.check_copied(pointer)?;
                self.write_in_place(id, pointer.at, &piece(run.clusters))
            }
            Mapping::Zero { keeps: Some(pointer) } => {
                self.check_copied(pointer)?;
                self.write_new(id, pointer.at, Space::Stale, false, &piece(run.clusters))
            }
            Mapping::Unallocated | Mapping::Zero { keeps: None } => {
                self.ensure_table(cluster)?;
                let found = self.allocate(run.clusters)?;
                self.stats.allocated_data += found.count;
                self.write_new(id, found.at, found.space, true, &piece(found.count))
            }
            Mapping::Compressed => unreachable!("resolve refuses them"),
        }
    }

    fn check_copied(&mut self, pointer: Pointer) -> Step<()> {
        if pointer.copied {
            return Ok(());
        }
        self.incident(FailureKind::NotCopied, self.geometry().host_start(pointer.at).0);
        Err(Stop::Fail(IoErrorKind::Io))
    }

    /// Guest data must never hit metadata, whatever the tables of the image say.
    fn check_overlap(&mut self, at: HostCluster, clusters: u64) -> Step<()> {
        if !self.metadata.overlaps(at.index(), clusters) {
            return Ok(());
        }
        self.fail(FailureKind::Overlap, self.geometry().host_start(at).0);
        Err(Stop::Fail(IoErrorKind::Io))
    }

    fn write_in_place(&mut self, id: RequestId, host: HostCluster, piece: &Piece) -> Step<()> {
        self.check_overlap(host, piece.clusters)?;
        let offset = self.geometry().host_start(host).0 + piece.within;
        let (tag, at, len) = (self.tag_of(id), piece.at, piece.bytes);
        self.emit(Owner::Request(id), OpKind::Write { tag, at, offset, len });
        self.requests[id].pos += piece.bytes;
        Ok(())
    }

    /// Fills clusters that no L2 entry shows as data: payload, and zeros around it unless the space
    /// is known to read as zeros.
    fn write_new(
        &mut self,
        id: RequestId,
        host: HostCluster,
        space: Space,
        allocated: bool,
        piece: &Piece,
    ) -> Step<()> {
        self.check_overlap(host, piece.clusters)?;
        let start = self.geometry().host_start(host).0;
        let owner = Owner::Request(id);
        let behind = piece.within + u64::from(piece.bytes);
        let whole = piece.clusters << self.geometry().cluster_bits();
        if space == Space::Stale {
            // Less than a cluster each, so at most 2 MiB.
            let len = |bytes: u64| u32::try_from(bytes).expect("less than a cluster");
            if piece.within != 0 {
                self.emit(owner, OpKind::WriteZeros { offset: start, len: len(piece.within) });
            }
            if behind != whole {
                let (offset, len) = (start + behind, len(whole - behind));
                self.emit(owner, OpKind::WriteZeros { offset, len });
            }
        }
        let (tag, at, len) = (self.tag_of(id), piece.at, piece.bytes);
        self.emit(owner, OpKind::Write { tag, at, offset: start + piece.within, len });
        let segment = Segment { guest: piece.cluster, host, count: piece.clusters, allocated };
        if self.requests[id].segment_count == 0 {
            self.writers.push(id);
        }
        self.requests[id].push_segment(segment);
        self.requests[id].pos += piece.bytes;
        Ok(())
    }

    /// How many of the `most` clusters from `cluster` on no write is filling.
    fn not_in_progress(&self, cluster: GuestCluster, most: u64) -> u64 {
        let mut free = most;
        for &writer in &self.writers {
            for segment in self.requests[writer].segments() {
                let end = segment.guest.0 + segment.count;
                if end > cluster.0 && segment.guest.0 < cluster.0 + free {
                    free = segment.guest.0.saturating_sub(cluster.0);
                }
            }
        }
        free
    }

    /// Puts the mapping of what was written into the L2 pages.
    fn commit_segments(&mut self, id: RequestId) -> Step<()> {
        for number in 0..self.requests[id].segment_count {
            while let Some(segment) = self.requests[id].segments[number] {
                self.commit_part(id, number, segment)?;
            }
        }
        self.end_segments(id);
        Ok(())
    }

    /// Commits as much of a segment as one L2 page holds.
    fn commit_part(&mut self, id: RequestId, number: usize, segment: Segment) -> Step<()> {
        if self.round.holds() {
            return Err(Stop::Wait(Wait::Round));
        }
        let table = self.l2_table(segment.guest).expect("secured before the write was issued");
        let place = self.entry_place(table, segment.guest);
        let slot = match self.l2_cache.lookup(place.page) {
            Lookup::Hit(slot) => slot,
            Lookup::Loading => return Err(Stop::Wait(Wait::Page(Which::L2, place.page))),
            Lookup::Absent => return Err(self.load(Which::L2, place.page)),
        };
        if !self.l2_cache.may_dirty(slot) {
            self.round.wanted = true;
            return Err(Stop::Wait(Wait::Round));
        }
        let count = segment.count.min(place.left);
        for step in 0..count {
            let word = copied_word(self.geometry().host_start(segment.host.plus(step)));
            let index = place.index + usize::try_from(step).expect("within a page");
            self.l2_cache.set_word(slot, index, word);
        }
        self.note_dirty();
        let rest = (count < segment.count).then(|| Segment {
            guest: GuestCluster(segment.guest.0 + count),
            host: segment.host.plus(count),
            count: segment.count - count,
            ..segment
        });
        self.requests[id].segments[number] = rest;
        Ok(())
    }

    /// The write has failed: what it had allocated is free again, the mapping is as it was.
    fn abort_segments(&mut self, id: RequestId) {
        for number in 0..self.requests[id].segment_count {
            let Some(segment) = self.requests[id].segments[number] else { continue };
            if segment.allocated {
                self.release(segment.host, segment.count);
            }
        }
        self.end_segments(id);
    }

    fn end_segments(&mut self, id: RequestId) {
        let state = &mut self.requests[id];
        state.segments = [None; MAX_SEGMENTS];
        state.segment_count = 0;
        self.writers.retain(|&writer| writer != id);
        // All that wait for a cluster look again: a request waits at most as often as there are
        // others, and only where two write to one new cluster.
        self.wake(|wait| matches!(wait, Wait::Cluster(_)));
    }

    // ---- new L2 tables ----

    /// Makes sure that there is an L2 table for a guest cluster.
    fn ensure_table(&mut self, cluster: GuestCluster) -> Step<()> {
        let l1_index = self.l1_index(cluster);
        if self.l1.get(l1_index) != Some(0) {
            return Ok(());
        }
        let mine = |table: &NewTable| table.l1_index == l1_index;
        let table = match self.new_tables.iter().copied().find(mine) {
            Some(table) => table,
            None => self.begin_table(l1_index)?,
        };
        if !table.zeroed {
            return Err(Stop::Wait(Wait::Table(l1_index)));
        }
        if self.round.holds() {
            return Err(Stop::Wait(Wait::Round));
        }
        self.new_tables.retain(|table| !mine(table));
        self.l1.set(l1_index, copied_word(self.geometry().host_start(table.at)));
        self.metadata.insert(table.at.index());
        self.note_dirty();
        // The page that is needed first is zeros: it need not be read.
        let place = self.entry_place(Pointer { at: table.at, copied: true }, cluster);
        if self.l2_cache.lookup(place.page) == Lookup::Absent
            && let Some(slot) = self.l2_cache.begin_load(place.page)
        {
            self.l2_cache.finish_zero(slot);
        }
        Ok(())
    }

    fn begin_table(&mut self, l1_index: u64) -> Step<NewTable> {
        if !self.ops.has_room() {
            return Err(Stop::Wait(Wait::OpSlot));
        }
        if self.round.holds() {
            return Err(Stop::Wait(Wait::Round));
        }
        let found = self.allocate(1)?;
        self.stats.allocated_metadata += 1;
        let zeroed = found.space == Space::Zero;
        let table = NewTable { l1_index, at: found.at, zeroed };
        self.new_tables.push(table);
        if !zeroed {
            let offset = self.geometry().host_start(found.at).0;
            let len = u32::try_from(self.geometry().cluster_size()).expect("at most 2 MiB");
            self.emit(Owner::NewTable(l1_index), OpKind::WriteZeros { offset, len });
        }
        Ok(table)
    }

    pub(crate) fn finish_new_table(&mut self, l1_index: u64, result: Result<(), IoErrorKind>) {
        let Some(number) = self.new_tables.iter().position(|t| t.l1_index == l1_index) else {
            return;
        };
        match result {
            Ok(()) => {
                self.new_tables[number].zeroed = true;
                self.wake(|wait| wait == Wait::Table(l1_index));
            }
            Err(kind) => {
                let table = self.new_tables.swap_remove(number);
                self.release(table.at, 1);
                self.wake_failing(kind, |wait| wait == Wait::Table(l1_index));
            }
        }
    }

    /// Frees tables that nobody came back for, since all who wanted them failed.
    pub(crate) fn drop_new_tables(&mut self) {
        while let Some(table) = self.new_tables.pop() {
            self.release(table.at, 1);
        }
    }
}
