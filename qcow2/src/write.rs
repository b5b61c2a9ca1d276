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
//!
//! | the cluster is | what a write does |
//! | --- | --- |
//! | data, COPIED | writes in place |
//! | data without COPIED: a snapshot's, too; or compressed | copies all of it to a new cluster |
//! | zero or unallocated, and has a host cluster | writes there |
//! | zero or unallocated | takes a new cluster |
//!
//! With extended L2 entries the last two concern single subclusters, where something lies beneath
//! that need not be copied. An L2 table that a snapshot shares is copied as a whole before one of
//! its entries changes; what the copy refers to was counted for both when the snapshot was made.

use crate::allocator::Space;
use crate::cache::Lookup;
use crate::copy::For;
use crate::engine::Engine;
use crate::entry::{Decoder, Mapping, Pointer, copied_word};
use crate::error::{FailureKind, IoErrorKind};
use crate::mark;
use crate::op::{OpKind, Request};
use crate::optable::Owner;
use crate::overlay::Entry;
use crate::planted::{self, Bug};
use crate::read::units_of;
use crate::request::{MAX_SEGMENTS, RequestId, Segment, Step, Stop, Wait};
use crate::units::{GuestCluster, GuestOffset, GuestUnit, HostCluster};

/// An L2 table on its way: allocated, not yet linked into L1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NewTable {
    pub(crate) l1_index: u64,
    pub(crate) at: HostCluster,
    pub(crate) state: TableState,
    /// The table that it is a copy of.
    copy_of: Option<HostCluster>,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableState {
    /// Being filled, with zeros or a copy.
    Filling,
    /// What it is filled with is durable after the first fdatasync of this round.
    Filled(u64),
    /// It is whole, or reads as zeros, in every state that a crash can leave: it may be linked.
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
    before: Before,
}

/// What the guest finds in the clusters of a target before the write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    Zeros,
    /// What lies beneath shines through.
    Beneath,
    /// Bytes of a cluster that is going to be replaced.
    Content,
}

/// What a write fills, in bytes from the start of its first cluster.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    end: u64,
    units: u32,
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
        if clusters == 0 && self.requests[id].segments().any(|s| s.guest == cluster) {
            // Another subcluster of a cluster that this request is filling.
            return Err(Stop::Wait(Wait::Ops));
        }
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
        let (first, most) = self.units_of(piece);
        let run = self.resolve(first, most)?;
        self.write_piece(id, self.cut_units(piece, run.units), run.mapping)
    }

    /// The first unit that a piece touches, and how many.
    pub(crate) fn units_of(&self, piece: Piece) -> (GuestUnit, u64) {
        let start = (piece.cluster.0 << self.geometry().cluster_bits()) + piece.within;
        units_of(self.decoder, start, piece.bytes.into())
    }

    /// How many whole clusters a piece begins with.
    pub(crate) fn whole_clusters(&self, piece: Piece) -> u64 {
        if piece.within != 0 {
            return 0;
        }
        u64::from(piece.bytes) >> self.geometry().cluster_bits()
    }

    /// The first `units` units of a piece.
    pub(crate) fn cut_units(&self, piece: Piece, units: u64) -> Piece {
        let geometry = self.geometry();
        let within = piece.within & ((1 << geometry.unit_bits()) - 1);
        let bytes = ((units << geometry.unit_bits()) - within).min(piece.bytes.into());
        let clusters = geometry.clusters_for(piece.within + bytes);
        let bytes = u32::try_from(bytes).expect("at most the request");
        Piece { bytes, clusters, ..piece }
    }

    /// Issues the operations for a piece whose units are all mapped like this.
    pub(crate) fn write_piece(&mut self, id: RequestId, piece: Piece, to: Mapping) -> Step<()> {
        let stale = |host, before| Target { host, space: Space::Stale, allocated: false, before };
        match to {
            Mapping::Data(pointer) if pointer.copied => self.write_in_place(id, pointer.at, piece),
            Mapping::Zero { keeps: Some(pointer) } if pointer.copied => {
                self.write_new(id, stale(pointer.at, Before::Zeros), piece)
            }
            Mapping::Unallocated { keeps: Some(pointer) } if pointer.copied => {
                self.write_new(id, stale(pointer.at, Before::Beneath), piece)
            }
            Mapping::Zero { keeps: None } => self.write_allocating(id, piece, Before::Zeros),
            Mapping::NOTHING => self.write_allocating(id, piece, Before::Beneath),
            _ => {
                mark!("write.replaces");
                let piece = self.cut(piece, 1);
                self.write_allocating(id, piece, Before::Content)
            }
        }
    }

    /// The same with clusters that are to be taken.
    fn write_allocating(&mut self, id: RequestId, piece: Piece, before: Before) -> Step<()> {
        self.ensure_table(piece.cluster)?;
        if self.decoder.data_file {
            let (host, space) = (Decoder::data_cluster(piece.cluster), Space::Stale);
            let target = Target { host, space, allocated: false, before };
            return self.write_new(id, target, piece);
        }
        let whole = self.whole_clusters(piece);
        let piece = match self.geometry().has_extended_l2() {
            // What follows the piece in its last cluster may be mapped in another way.
            true if whole != 0 => self.cut(piece, whole),
            true if self.fills_units(piece, before) => self.cut(piece, 1),
            _ => piece,
        };
        let found = self.allocate(piece.clusters)?;
        self.stats.allocated_data += found.count;
        let (host, space) = (found.at, found.space);
        let target = Target { host, space, allocated: true, before };
        self.write_new(id, target, self.cut(piece, found.count))
    }

    /// Does a write fill the subclusters that it touches, and no more of their cluster?
    fn fills_units(&self, piece: Piece, before: Before) -> bool {
        let geometry = self.geometry();
        let guest = piece.cluster.0 << geometry.cluster_bits();
        geometry.has_extended_l2()
            && self.whole_clusters(piece) == 0
            && before != Before::Content
            && self.beneath(guest, geometry.cluster_size()) != 0
    }

    /// Guest data must never hit metadata, whatever the tables of the image say.
    pub(crate) fn check_overlap(&mut self, at: HostCluster, clusters: u64) -> Step<()> {
        // No table lies in an external data file, whose clusters have numbers of their own.
        if self.decoder.data_file || !self.metadata.overlaps(at.index(), clusters) {
            return Ok(());
        }
        self.fail(FailureKind::Overlap, self.geometry().host_start(at).0);
        Err(Stop::Fail(IoErrorKind::Io))
    }

    /// The payload of a piece, to `offset` of the file with guest data.
    fn emit_payload(&mut self, id: RequestId, piece: Piece, offset: u64) {
        let (tag, at, len) = (self.tag_of(id), piece.at, piece.bytes);
        let zeros = matches!(self.requests[id].request, Some(Request::WriteZeroes { .. }));
        let kind = if !zeros {
            OpKind::Write { tag, at, offset, len }
        } else {
            // Less than a cluster before and behind whole ones, or v2, cut by the caller.
            OpKind::WriteZeros { offset, len }
        };
        self.emit_to(Owner::Request(id), self.data_file(), kind);
        self.requests[id].pos += piece.bytes;
    }

    fn write_in_place(&mut self, id: RequestId, host: HostCluster, piece: Piece) -> Step<()> {
        self.check_overlap(host, piece.clusters)?;
        let offset = self.decoder.data_start(host).0 + piece.within;
        self.emit_payload(id, piece, offset);
        Ok(())
    }

    /// What is to be filled for a piece.
    fn span(&self, piece: Piece, target: Target) -> Span {
        let geometry = self.geometry();
        // A cluster that was there before may hold other subclusters.
        let units_only = geometry.has_extended_l2()
            && piece.clusters == 1
            && target.before != Before::Content
            && (!target.allocated || self.fills_units(piece, target.before));
        if !units_only {
            let end = piece.clusters << geometry.cluster_bits();
            return Span { start: 0, end, units: geometry.all_units() };
        }
        let bits = geometry.unit_bits();
        let first = piece.within >> bits;
        let end = (piece.within + u64::from(piece.bytes)).div_ceil(1 << bits);
        let below = |count: u64| u32::try_from((1_u64 << count) - 1).expect("at most 32 bits");
        Span { start: first << bits, end: end << bits, units: below(end) & !below(first) }
    }

    /// Fills clusters that no L2 entry shows as data: payload, and around it what was there before.
    fn write_new(&mut self, id: RequestId, target: Target, piece: Piece) -> Step<()> {
        // With extended L2 entries, subclusters of one cluster or whole clusters.
        let geometry = self.geometry();
        let piece = match geometry.has_extended_l2() && !target.allocated {
            true => self.cut(piece, self.whole_clusters(piece).max(1)),
            false => piece,
        };
        self.ensure_table(piece.cluster)?;
        self.check_overlap(target.host, piece.clusters)?;
        let span = self.span(piece, target);
        let start = self.decoder.data_start(target.host).0;
        let guest = piece.cluster.0 << geometry.cluster_bits();
        let behind = piece.within + u64::from(piece.bytes);
        self.surround(id, target, guest, span.start, piece.within - span.start);
        self.surround(id, target, guest, behind, span.end - behind);
        self.emit_payload(id, piece, start + piece.within);
        let shines = match target.before {
            Before::Zeros => false,
            Before::Beneath => self.beneath(guest + span.start, span.end - span.start) != 0,
            Before::Content => true,
        };
        let early = planted::is(Bug::MappingBeforeData)
            || (geometry.has_extended_l2() && planted::is(Bug::SubclusterBeforeData));
        let segment = Segment {
            guest: piece.cluster,
            host: target.host,
            count: piece.clusters,
            units: span.units,
            allocated: target.allocated,
            unordered: (target.space == Space::Zero && !shines) || early,
        };
        if self.requests[id].segment_count == 0 {
            self.writers.push(id);
        }
        self.requests[id].push_segment(segment);
        Ok(())
    }

    /// Provides `len` bytes from byte `at` of a new run on: what the guest finds there, or zeros.
    fn surround(&mut self, id: RequestId, target: Target, guest: u64, at: u64, len: u64) {
        if planted::is(Bug::CopyWithoutTail) && at != 0 {
            return;
        }
        if planted::is(Bug::SubclusterNotFilled) && self.geometry().has_extended_l2() {
            return;
        }
        let start = self.decoder.data_start(target.host).0;
        let copied = match target.before {
            Before::Zeros => 0,
            Before::Beneath => self.beneath(guest + at, len),
            Before::Content => len,
        };
        // The last sector may reach over the end of what lies beneath, and reads as zeros there.
        let copied = copied.next_multiple_of(self.options.alignment.into()).min(len);
        if copied != 0 {
            self.copy(For::Request(id, guest + at), start + at, copied);
        }
        let zeros = len - copied;
        if zeros != 0 && target.space == Space::Stale {
            // Less than a cluster, so at most 2 MiB.
            let (offset, len) = (start + at + (len - zeros), u32::try_from(zeros));
            let len = len.expect("less than a cluster");
            let kind = OpKind::WriteZeros { offset, len };
            self.emit_to(Owner::Request(id), self.data_file(), kind);
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
        let count = self.room_to_record(segment.count.min(place.left))?;
        for step in 0..count {
            let index = place.index + usize::try_from(step).expect("within a page");
            let before = self.l2_cache.entry(slot, index);
            let entry = self.decoder.with_data(before, segment.host.plus(step), segment.units);
            self.l2_cache.set_entry(slot, index, entry);
            self.record(GuestCluster(segment.guest.0 + step), entry);
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
        let before = self.entry_to_record(segment)?;
        let count = self.room_to_record(count)?;
        mark!("write.to_overlay");
        let since = self.epochs.of_writes();
        for step in 0..count {
            let guest = GuestCluster(segment.guest.0 + step);
            let entry = Entry::new(guest, segment.host.plus(step), segment.units, since);
            self.overlay.insert(entry, |epoch| self.epochs.is_durable(epoch));
            if !planted::is(Bug::CopyNotRecorded) {
                self.record(guest, before);
            }
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

    /// Makes sure that there is an L2 table for a guest cluster, and that nobody else has it.
    pub(crate) fn ensure_table(&mut self, cluster: GuestCluster) -> Step<()> {
        let l1_index = self.l1_index(cluster);
        let old = self.l2_table(cluster);
        if old.is_some_and(|table| table.copied) {
            return Ok(());
        }
        let mine = |table: &NewTable| table.l1_index == l1_index;
        let table = match self.new_tables.iter().copied().find(mine) {
            Some(table) => table,
            None => self.begin_table(l1_index, old.map(|table| table.at))?,
        };
        if table.state != TableState::Ready {
            return Err(Stop::Wait(Wait::Table(l1_index)));
        }
        if !self.quarantine.has_room(1) {
            self.round.wanted = true;
            return Err(Stop::Wait(Wait::Quarantine));
        }
        self.forget_pages(table.at)?;
        self.new_tables.retain(|table| !mine(table));
        self.l1.set(l1_index, copied_word(self.geometry().host_start(table.at)));
        self.note_dirty();
        if let Some(old) = table.copy_of {
            mark!("table.copy_linked");
            // From now on it is the snapshot's alone, which counts it.
            self.quarantine_table(old.index());
            return Ok(());
        }
        mark!("table.linked");
        // The page that is needed first is zeros: it need not be read.
        let place = self.entry_place(Pointer { at: table.at, copied: true }, cluster);
        if self.l2_cache.lookup(place.page) == Lookup::Absent
            && let Some(slot) = self.l2_cache.begin_load(place.page)
        {
            self.l2_cache.finish_zero(slot);
        }
        Ok(())
    }

    fn begin_table(&mut self, l1_index: u64, copy_of: Option<HostCluster>) -> Step<NewTable> {
        if !self.ops.has_room() {
            return Err(Stop::Wait(Wait::OpSlot));
        }
        let found = self.allocate(1)?;
        self.claim(found.at.index(), 1)?;
        self.metadata.insert(found.at.index());
        self.stats.allocated_metadata += 1;
        let zero = found.space == Space::Zero || planted::is(Bug::StaleTable);
        let ready = zero && copy_of.is_none();
        let state = if ready { TableState::Ready } else { TableState::Filling };
        let table = NewTable { l1_index, at: found.at, state, copy_of };
        self.new_tables.push(table);
        let geometry = self.geometry();
        let offset = geometry.host_start(found.at).0;
        if let Some(old) = copy_of {
            let who = For::Table(l1_index, geometry.host_start(old).0);
            self.copy(who, offset, geometry.cluster_size());
        } else if !zero {
            let len = u32::try_from(geometry.cluster_size()).expect("at most 2 MiB");
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
                mark!("table.filled_first");
                let round = self.next_round();
                let table = &mut self.new_tables[number];
                table.state = TableState::Filled(round);
                let early = planted::is(Bug::TableCopyLinkedEarly) && table.copy_of.is_some();
                if planted::is(Bug::NoSyncBeforeL1) || early {
                    self.new_tables[number].state = TableState::Ready;
                    self.wake(|wait| matches!(wait, Wait::Table(_)));
                }
                self.round.wanted = true;
            }
            Err(kind) => {
                let table = self.new_tables.swap_remove(number);
                self.metadata.remove(table.at.index());
                self.put_back(table.at, 1);
                self.wake_failing(kind, |wait| wait == Wait::Table(l1_index));
            }
        }
    }

    /// The first fdatasync of a round has returned: tables that were filled before may be linked.
    pub(crate) fn tables_to_link(&mut self, round: u64) {
        for table in &mut self.new_tables {
            if matches!(table.state, TableState::Filled(since) if since <= round) {
                table.state = TableState::Ready;
            }
        }
        self.wake(|wait| matches!(wait, Wait::Table(_)));
    }

    /// Puts back tables that nobody came back for, since all who wanted them failed.
    pub(crate) fn drop_new_tables(&mut self) {
        while let Some(table) = self.new_tables.pop() {
            self.metadata.remove(table.at.index());
            self.put_back(table.at, 1);
        }
    }
}
