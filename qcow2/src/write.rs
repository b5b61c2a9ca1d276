//! Writes: in place, into a cluster that a zero cluster kept, or into a new one.
//!
//! A write of new clusters goes: secure the L2 table, take clusters from the reservation, write the
//! payload and what belongs around it, and only when all of that has completed put the mapping
//! where readers see it: straight into the L2 page where it needs no order, into the overlay
//! otherwise (see [`flush`](crate::flush)). Until then readers see the old state, and if anything
//! fails the old state stays.
//!
//! While a write fills a guest cluster that was not data before, the cluster belongs to it: other
//! writes to the same cluster wait, and then find it allocated. A request takes clusters in
//! ascending order only, so two requests can't wait for each other.
//!
//! A write of zeros to a part of a cluster comes here too: its payload is zeros.

use crate::allocator::Space;
use crate::cache::Lookup;
use crate::engine::Engine;
use crate::entry::{Mapping, Pointer, copied_word};
use crate::error::{FailureKind, IoErrorKind};
use crate::mark;
use crate::op::{OpKind, Request};
use crate::optable::Owner;
use crate::overlay::Entry;
use crate::planted::{self, Bug};
use crate::request::{MAX_SEGMENTS, RequestId, Segment, Step, Stop, Wait};
use crate::units::{GuestCluster, GuestOffset, HostCluster};

/// An L2 table on its way: allocated, not yet linked into L1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NewTable {
    pub(crate) l1_index: u64,
    pub(crate) at: HostCluster,
    pub(crate) state: TableState,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableState {
    /// Being filled with zeros.
    Zeroing,
    /// The zeros are durable after the first fdatasync of this round.
    Zeroed(u64),
    /// It reads as zeros in every state that a crash can leave: it may be linked.
    Ready,
}

/// A part of a write, cut so that one mapping holds for all of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// First byte in the request's buffer.
    pub(crate) at: u32,
    pub(crate) bytes: u32,
    /// First guest cluster.
    pub(crate) cluster: GuestCluster,
    /// Bytes of that cluster before the piece.
    pub(crate) within: u64,
    /// Clusters that the piece touches.
    pub(crate) clusters: u64,
}

/// Where a write goes that is not in place.
#[derive(Clone, Copy, Debug)]
struct Target {
    host: HostCluster,
    space: Space,
    /// Taken from the reservation for this write.
    allocated: bool,
    /// The clusters are unallocated: what lies beneath shines through.
    over_backing: bool,
}

impl Engine {
    pub(crate) fn step_write(&mut self, id: RequestId, fua: bool) -> Step<()> {
        let len = self.requests[id].range().1;
        loop {
            if self.requests[id].pending == 0 && self.requests[id].segment_count != 0 {
                self.settle_segments(id)?;
            }
            let state = &self.requests[id];
            if state.error.is_some() || state.pos == len {
                if state.pending != 0 {
                    return Err(Stop::Wait(Wait::Ops));
                }
                // A FUA write waits for one round, which replies for it.
                let fua = fua && !planted::is(Bug::FuaBeforeMapping);
                return if fua && state.error.is_none() { self.durable() } else { Ok(()) };
            }
            if state.segment_count == MAX_SEGMENTS {
                return Err(Stop::Wait(Wait::Ops));
            }
            self.issue_piece(id)?;
        }
    }

    /// The part of a request that is to come next, as far as no other write is filling its
    /// clusters; and a function that cuts it to so many clusters.
    pub(crate) fn next_piece(&mut self, id: RequestId) -> Step<Piece> {
        let geometry = self.geometry();
        let (offset, len) = self.requests[id].range();
        let at = self.requests[id].pos;
        let guest = GuestOffset(offset + u64::from(at));
        let (cluster, within) = (geometry.cluster_of(guest), geometry.within(guest));
        let left = u64::from(len - at);
        let clusters = self.not_in_progress(cluster, geometry.clusters_for(within + left));
        if clusters == 0 {
            mark!("write.waits_for_cluster");
            return Err(Stop::Wait(Wait::Cluster(cluster)));
        }
        let whole = Piece { at, bytes: len - at, cluster, within, clusters };
        Ok(self.cut(whole, clusters))
    }

    /// The first `clusters` clusters of a piece.
    pub(crate) fn cut(&self, piece: Piece, clusters: u64) -> Piece {
        let bytes = (clusters << self.geometry().cluster_bits()) - piece.within;
        let bytes = u32::try_from(bytes.min(piece.bytes.into())).expect("at most the request");
        Piece { bytes, clusters, ..piece }
    }

    /// Issues the operations for the next piece of a write.
    pub(crate) fn issue_piece(&mut self, id: RequestId) -> Step<()> {
        if !self.ops.has_payload_room() {
            return Err(Stop::Wait(Wait::OpSlot));
        }
        let piece = self.next_piece(id)?;
        let run = self.resolve(piece.cluster, piece.clusters)?;
        self.write_piece(id, self.cut(piece, run.clusters), run.mapping)
    }

    /// Issues the operations for a piece whose clusters are all mapped like this.
    pub(crate) fn write_piece(&mut self, id: RequestId, piece: Piece, to: Mapping) -> Step<()> {
        match to {
            Mapping::Data(pointer) => {
                self.check_copied(pointer)?;
                self.write_in_place(id, pointer.at, piece)
            }
            Mapping::Zero { keeps: Some(pointer) } => {
                self.check_copied(pointer)?;
                let (host, space) = (pointer.at, Space::Stale);
                let target = Target { host, space, allocated: false, over_backing: false };
                self.write_new(id, target, piece)
            }
            Mapping::Unallocated | Mapping::Zero { keeps: None } => {
                self.ensure_table(piece.cluster)?;
                let found = self.allocate(piece.clusters)?;
                self.stats.allocated_data += found.count;
                let over_backing = to == Mapping::Unallocated;
                let (host, space) = (found.at, found.space);
                let target = Target { host, space, allocated: true, over_backing };
                self.write_new(id, target, self.cut(piece, found.count))
            }
            Mapping::Compressed => unreachable!("resolve refuses them"),
        }
    }

    pub(crate) fn check_copied(&mut self, pointer: Pointer) -> Step<()> {
        if pointer.copied {
            return Ok(());
        }
        self.incident(FailureKind::NotCopied, self.geometry().host_start(pointer.at).0);
        Err(Stop::Fail(IoErrorKind::Io))
    }

    /// Guest data must never hit metadata, whatever the tables of the image say.
    pub(crate) fn check_overlap(&mut self, at: HostCluster, clusters: u64) -> Step<()> {
        if !self.metadata.overlaps(at.index(), clusters) {
            return Ok(());
        }
        self.fail(FailureKind::Overlap, self.geometry().host_start(at).0);
        Err(Stop::Fail(IoErrorKind::Io))
    }

    /// The payload of a piece, to `offset` of the file.
    fn emit_payload(&mut self, id: RequestId, piece: Piece, offset: u64) {
        let (tag, at, len) = (self.tag_of(id), piece.at, piece.bytes);
        let zeros = matches!(self.requests[id].request, Some(Request::WriteZeroes { .. }));
        if !zeros {
            self.emit(Owner::Request(id), OpKind::Write { tag, at, offset, len });
        } else {
            // Less than a cluster before and behind whole ones, or v2, cut by the caller.
            self.emit(Owner::Request(id), OpKind::WriteZeros { offset, len });
        }
        self.requests[id].pos += piece.bytes;
    }

    fn write_in_place(&mut self, id: RequestId, host: HostCluster, piece: Piece) -> Step<()> {
        self.check_overlap(host, piece.clusters)?;
        let offset = self.geometry().host_start(host).0 + piece.within;
        self.emit_payload(id, piece, offset);
        Ok(())
    }

    /// Fills clusters that no L2 entry shows as data: payload, and around it what was there before.
    fn write_new(&mut self, id: RequestId, target: Target, piece: Piece) -> Step<()> {
        self.check_overlap(target.host, piece.clusters)?;
        let geometry = self.geometry();
        let start = geometry.host_start(target.host).0;
        let whole = piece.clusters << geometry.cluster_bits();
        let guest = piece.cluster.0 << geometry.cluster_bits();
        let behind = piece.within + u64::from(piece.bytes);
        self.surround(id, target, guest, 0, piece.within);
        self.surround(id, target, guest, behind, whole - behind);
        self.emit_payload(id, piece, start + piece.within);
        let beneath = if target.over_backing { self.beneath(guest, whole) } else { 0 };
        let segment = Segment {
            guest: piece.cluster,
            host: target.host,
            count: piece.clusters,
            allocated: target.allocated,
            unordered: (target.space == Space::Zero && beneath == 0)
                || planted::is(Bug::MappingBeforeData),
        };
        if self.requests[id].segment_count == 0 {
            self.writers.push(id);
        }
        self.requests[id].push_segment(segment);
        Ok(())
    }

    /// Provides `len` bytes from byte `at` of a new run on: what lies beneath, or zeros.
    fn surround(&mut self, id: RequestId, target: Target, guest: u64, at: u64, len: u64) {
        if planted::is(Bug::CopyWithoutTail) && at != 0 {
            return;
        }
        let start = self.geometry().host_start(target.host).0;
        let beneath = if target.over_backing { self.beneath(guest + at, len) } else { 0 };
        // The last sector may reach over the end of what lies beneath, and reads as zeros there.
        let beneath = beneath.next_multiple_of(self.options.alignment.into()).min(len);
        if beneath != 0 {
            self.copy_from_beneath(id, guest + at, start + at, beneath);
        }
        let zeros = len - beneath;
        if zeros != 0 && target.space == Space::Stale {
            // Less than a cluster, so at most 2 MiB.
            let (offset, len) = (start + at + (len - zeros), u32::try_from(zeros));
            let len = len.expect("less than a cluster");
            self.emit(Owner::Request(id), OpKind::WriteZeros { offset, len });
        }
    }

    /// How many of the `most` clusters from `cluster` on no write is filling.
    fn not_in_progress(&self, cluster: GuestCluster, most: u64) -> u64 {
        let mut free = most;
        if planted::is(Bug::NoClusterLock) {
            return most;
        }
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

    /// Clusters that writes are filling.
    pub(crate) fn in_progress(&self) -> u64 {
        let segments = self.writers.iter().flat_map(|&writer| self.requests[writer].segments());
        segments.map(|segment| segment.count).sum()
    }

    /// All that was written into new clusters has completed, or something has failed.
    pub(crate) fn settle_segments(&mut self, id: RequestId) -> Step<()> {
        if self.requests[id].error.is_none() {
            return self.commit_segments(id);
        }
        self.abort_segments(id);
        Ok(())
    }

    /// Puts the mapping of what was written where readers see it.
    fn commit_segments(&mut self, id: RequestId) -> Step<()> {
        for number in 0..self.requests[id].segment_count {
            while let Some(segment) = self.requests[id].segments[number] {
                let count = if segment.unordered {
                    self.commit_to_page(segment)?
                } else {
                    self.commit_to_overlay(segment)?
                };
                let rest = (count < segment.count).then(|| Segment {
                    guest: GuestCluster(segment.guest.0 + count),
                    host: segment.host.plus(count),
                    count: segment.count - count,
                    ..segment
                });
                self.requests[id].segments[number] = rest;
            }
        }
        self.end_segments(id);
        Ok(())
    }

    /// Commits as much of a segment as one L2 page holds.
    fn commit_to_page(&mut self, segment: Segment) -> Step<u64> {
        mark!("write.unordered");
        let table = self.l2_table(segment.guest).expect("secured before the write was issued");
        let place = self.entry_place(table, segment.guest);
        let slot = self.l2_page_to_change(place)?;
        let count = segment.count.min(place.left);
        for step in 0..count {
            let word = copied_word(self.geometry().host_start(segment.host.plus(step)));
            let index = place.index + usize::try_from(step).expect("within a page");
            self.l2_cache.set_word(slot, index, word);
        }
        self.note_dirty();
        Ok(count)
    }

    /// Commits as much of a segment as the overlay may hold at all.
    fn commit_to_overlay(&mut self, segment: Segment) -> Step<u64> {
        let most = self.overlay.capacity().div_ceil(2);
        let count = segment.count.min(most as u64);
        if !self.overlay.has_room(usize::try_from(count).expect("at most the capacity")) {
            self.round.wanted = true;
            mark!("write.overlay_full");
            return Err(Stop::Wait(Wait::Overlay));
        }
        mark!("write.to_overlay");
        let since = self.epochs.now();
        for step in 0..count {
            let guest = GuestCluster(segment.guest.0 + step);
            self.overlay.insert(Entry { guest, host: segment.host.plus(step), since });
        }
        self.round.wanted |= self.overlay.is_crowded();
        self.note_dirty();
        Ok(count)
    }

    /// The write has failed: what it had taken goes back, the mapping is as it was.
    fn abort_segments(&mut self, id: RequestId) {
        mark!("write.aborted");
        for number in 0..self.requests[id].segment_count {
            let Some(segment) = self.requests[id].segments[number] else { continue };
            if segment.allocated {
                self.put_back(segment.host, segment.count);
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
    pub(crate) fn ensure_table(&mut self, cluster: GuestCluster) -> Step<()> {
        let l1_index = self.l1_index(cluster);
        if self.l1.get(l1_index) != Some(0) {
            return Ok(());
        }
        let mine = |table: &NewTable| table.l1_index == l1_index;
        let table = match self.new_tables.iter().copied().find(mine) {
            Some(table) => table,
            None => self.begin_table(l1_index)?,
        };
        if table.state != TableState::Ready {
            return Err(Stop::Wait(Wait::Table(l1_index)));
        }
        mark!("table.linked");
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
        let found = self.allocate(1)?;
        self.stats.allocated_metadata += 1;
        let zero = found.space == Space::Zero || planted::is(Bug::StaleTable);
        let state = if zero { TableState::Ready } else { TableState::Zeroing };
        let table = NewTable { l1_index, at: found.at, state };
        self.new_tables.push(table);
        if !zero {
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
                mark!("table.zeroed_first");
                let round = self.next_round();
                self.new_tables[number].state = TableState::Zeroed(round);
                if planted::is(Bug::NoSyncBeforeL1) {
                    self.new_tables[number].state = TableState::Ready;
                    self.wake(|wait| matches!(wait, Wait::Table(_)));
                }
                self.round.wanted = true;
            }
            Err(kind) => {
                let table = self.new_tables.swap_remove(number);
                self.put_back(table.at, 1);
                self.wake_failing(kind, |wait| wait == Wait::Table(l1_index));
            }
        }
    }

    /// The first fdatasync of a round has returned: tables that were zeroed before may be linked.
    pub(crate) fn tables_to_link(&mut self, round: u64) {
        for table in &mut self.new_tables {
            if matches!(table.state, TableState::Zeroed(since) if since <= round) {
                table.state = TableState::Ready;
            }
        }
        self.wake(|wait| matches!(wait, Wait::Table(_)));
    }

    /// Puts back tables that nobody came back for, since all who wanted them failed.
    pub(crate) fn drop_new_tables(&mut self) {
        while let Some(table) = self.new_tables.pop() {
            self.put_back(table.at, 1);
        }
    }
}
