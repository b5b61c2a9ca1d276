//! Write zeroes and discard.
//!
//! Whole clusters change by their L2 entry alone; the host clusters that lose their last reference
//! go into [quarantine](crate::quarantine). With extended L2 entries, write zeroes does the same
//! with whole subclusters. The rest is written with zeros, and left alone by a discard.
//!
//! | before, whole cluster | write zeroes, unmap | write zeroes, NOUNMAP | discard |
//! | --- | --- | --- | --- |
//! | reads as zeros, no host cluster | – | – | – |
//! | zero, keeps a host cluster | released | – | released |
//! | data | released | zero flag, keeps it | released |
//! | data that a snapshot has, too; compressed | released | released | released |
//! | unallocated over a backing file | zero flag | zero flag | zero flag |
//!
//! What is released becomes unallocated where nothing lies beneath, else a plain zero cluster. A
//! host cluster that others count as well is not kept: a write could not go there.
//! Version 2 has no zero flag: where one would be needed, write zeroes writes zeros, and a discard
//! does nothing.
//!
//! In an external data file each guest cluster has its place for good. What is data there stays
//! mapped: write zeroes writes zeros, and a discard punches a hole into the data file, or where it
//! is to keep the space, makes it a zero cluster. A raw data file must read like the virtual disk
//! for those who open it alone: there a discard that keeps the space writes zeros, and what reads
//! as zeros already is made zeros in the data file, too, since a write may have ended there before
//! its mapping. Holes and zeros need no order with anything else, and the next FLUSH syncs them as
//! it does any write. Only a cluster of which some subclusters show what lies beneath becomes a
//! zero cluster wherever it is discarded.

use crate::cache::SlotId;
use crate::engine::Engine;
use crate::entry::{Decoder, L2Entry, Mapping, Pointer, Reference};
use crate::error::{FailureKind, IoErrorKind};
use crate::mark;
use crate::op::OpKind;
use crate::optable::Owner;
use crate::options::Discards;
use crate::planted::{self, Bug};
use crate::request::{MAX_SEGMENTS, RequestId, Step, Stop, Wait};
use crate::units::GuestCluster;
use crate::write::Piece;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Zeroing {
    /// Parts of clusters, and what cannot be expressed, may stay as they are.
    pub(crate) discard: bool,
    /// Host clusters are given back.
    pub(crate) unmap: bool,
}

/// What becomes of one cluster.
enum Change {
    Nothing,
    Entry(L2Entry),
    /// It has to be written with zeros.
    Write(Mapping),
    /// Its place in the data file is punched.
    Punch,
    /// Or filled with zeros.
    Fill,
}

/// What is known of a whole cluster.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// The mapping of its first unit.
    mapping: Mapping,
    /// Some of it is data; all of it is.
    data: bool,
    all_data: bool,
    /// Its host cluster, if it has one that may be kept.
    owned: Option<Pointer>,
    /// It counts something.
    counts: bool,
    /// All of it reads as zeros, whatever lies beneath.
    zero: bool,
    /// Nothing of it is mapped: it reads as what lies beneath.
    unallocated: bool,
}

impl Engine {
    pub(crate) fn step_zero(&mut self, id: RequestId, how: Zeroing) -> Step<()> {
        let (offset, len) = self.requests[id].range();
        if how.discard && self.options.discards == Discards::Ignore {
            self.requests[id].pos = len;
        }
        loop {
            if self.requests[id].pending == 0 && self.requests[id].segment_count != 0 {
                self.settle_segments(id)?;
            }
            let state = &self.requests[id];
            if state.error.is_some() || state.pos == len {
                return if state.pending != 0 { Err(Stop::Wait(Wait::Ops)) } else { Ok(()) };
            }
            if state.segment_count == MAX_SEGMENTS {
                return Err(Stop::Wait(Wait::Ops));
            }
            if !self.ops.has_payload_room() {
                return Err(Stop::Wait(Wait::OpSlot));
            }
            let piece = self.next_piece(id)?;
            let start = offset + u64::from(piece.at);
            let to_end = start + u64::from(piece.bytes) == self.virtual_size();
            let whole = match piece.within == 0 && to_end {
                // The last cluster may reach over the end of the virtual disk.
                true => piece.clusters,
                false => self.whole_clusters(piece),
            };
            if whole != 0 {
                self.zero_clusters(id, self.cut(piece, whole), how)?;
            } else {
                self.zero_part(id, self.cut(piece, 1), how)?;
            }
        }
    }

    /// A part of one cluster: as much of it as is mapped in one way.
    fn zero_part(&mut self, id: RequestId, piece: Piece, how: Zeroing) -> Step<()> {
        if how.discard {
            self.requests[id].pos += piece.bytes;
            return Ok(());
        }
        let (first, most) = self.units_of(piece);
        let run = self.resolve(first, most)?;
        let piece = self.cut_units(piece, run.units);
        let guest = (piece.cluster.0 << self.geometry().cluster_bits()) + piece.within;
        let zero = match run.mapping {
            Mapping::Zero { .. } => true,
            Mapping::Unallocated { .. } => self.beneath(guest, piece.bytes.into()) == 0,
            Mapping::Data(_) | Mapping::Compressed(_) => false,
        };
        if zero && self.has_raw_data_file() {
            self.zero_place(id, guest, piece.bytes, Change::Fill);
            return Ok(());
        }
        if zero {
            self.requests[id].pos += piece.bytes;
            return Ok(());
        }
        let bits = self.geometry().unit_bits();
        let before = piece.within & ((1 << bits) - 1);
        let whole = u64::from(piece.bytes) >> bits;
        let can = self.geometry().has_extended_l2()
            && !self.decoder.data_file
            && !matches!(run.mapping, Mapping::Compressed(_));
        if can && before == 0 && whole != 0 {
            return self.zero_units(id, self.cut_units(piece, whole), how, run.mapping);
        }
        if can && before + u64::from(piece.bytes) > 1 << bits && before != 0 {
            // Up to where a whole subcluster begins.
            return self.write_piece(id, self.cut_units(piece, 1), run.mapping);
        }
        self.write_piece(id, piece, run.mapping)
    }

    /// Whole subclusters of one cluster: by their bits alone.
    fn zero_units(
        &mut self,
        id: RequestId,
        piece: Piece,
        how: Zeroing,
        mapping: Mapping,
    ) -> Step<()> {
        self.ensure_table(piece.cluster)?;
        let table = self.l2_table(piece.cluster).expect("ensured");
        let place = self.entry_place(table, piece.cluster);
        let slot = self.l2_page_to_change(place)?;
        if !self.quarantine.has_room(1) {
            self.round.wanted = true;
            return Err(Stop::Wait(Wait::Quarantine));
        }
        self.room_to_record(1)?;
        let entry = self.l2_cache.entry(slot, place.index);
        if matches!(self.decoder.reference(entry, piece.cluster), Reference::Compressed { .. }) {
            // What replaces it is in the overlay, and on disk it has to stay as it is until then.
            return self.write_piece(id, piece, mapping);
        }
        mark!("zero.subclusters");
        let bits = self.geometry().unit_bits();
        let (first, count) = (piece.within >> bits, u64::from(piece.bytes) >> bits);
        let units = u32::try_from(((1_u64 << count) - 1) << first).expect("32 units");
        let bitmap = (entry.bitmap & !u64::from(units)) | u64::from(units) << 32;
        let pending = self.overlay.get(piece.cluster);
        let left = pending.map_or(0, |known| known.units() & !units);
        let word = match pending {
            _ if bitmap << 32 == 0 && left == 0 && how.unmap => 0,
            Some(known) if left == 0 => self.decoder.data_word(known.host),
            _ => entry.word,
        };
        self.replace_entry(piece.cluster, slot, place.index, (L2Entry { word, bitmap }, units));
        self.requests[id].pos += piece.bytes;
        Ok(())
    }

    /// Whole clusters, as many of them as one L2 page describes.
    fn zero_clusters(&mut self, id: RequestId, piece: Piece, how: Zeroing) -> Step<()> {
        let bits = self.geometry().cluster_bits();
        let table = match self.l2_table(piece.cluster) {
            Some(table) if table.copied => table,
            Some(_) => {
                // It is ours then, or the request has to wait.
                self.ensure_table(piece.cluster)?;
                return Ok(());
            }
            None => {
                let entries = self.geometry().l2_entries();
                let clusters = piece.clusters.min(entries - (piece.cluster.0 & (entries - 1)));
                let guest = piece.cluster.0 << bits;
                let beneath = self.beneath(guest, clusters << bits);
                if beneath == 0 && self.has_raw_data_file() {
                    let change = self.place_change(how);
                    // What is written goes out cluster by cluster: 2 MiB at the most.
                    let clusters = if matches!(change, Change::Fill) { 1 } else { clusters };
                    self.zero_place(id, guest, self.cut(piece, clusters).bytes, change);
                    return Ok(());
                }
                if beneath == 0 || (how.discard && !self.has_zero_flag()) {
                    self.requests[id].pos += self.cut(piece, clusters).bytes;
                    return Ok(());
                }
                if !self.has_zero_flag() {
                    return self.write_piece(id, self.cut(piece, 1), Mapping::NOTHING);
                }
                return self.ensure_table(piece.cluster);
            }
        };
        let place = self.entry_place(table, piece.cluster);
        let slot = self.l2_page_to_change(place)?;
        for step in 0..piece.clusters.min(place.left) {
            let cluster = GuestCluster(piece.cluster.0 + step);
            let index = place.index + usize::try_from(step).expect("within a page");
            let one = Piece { cluster, at: self.requests[id].pos, ..piece };
            let one = self.cut(Piece { bytes: piece.bytes - (one.at - piece.at), ..one }, 1);
            let Some(known) = self.known(cluster, slot, index) else {
                self.incident(FailureKind::BadEntry, place.page << self.geometry().page_bits());
                return Err(Stop::Fail(IoErrorKind::Io));
            };
            match self.change_of(cluster, known, how)? {
                Change::Nothing => {}
                Change::Entry(entry) => {
                    if !self.quarantine.has_room(2) {
                        self.round.wanted = true;
                        return Err(Stop::Wait(Wait::Quarantine));
                    }
                    self.room_to_record(1)?;
                    let all = self.geometry().all_units();
                    self.replace_entry(cluster, slot, index, (entry, all));
                }
                Change::Write(_) if self.geometry().has_extended_l2() => {
                    return self.zero_part(id, one, how);
                }
                Change::Write(mapping) => return self.write_piece(id, one, mapping),
                change @ (Change::Punch | Change::Fill) => {
                    self.zero_place(id, cluster.0 << bits, one.bytes, change);
                    return Ok(());
                }
            }
            self.requests[id].pos += one.bytes;
        }
        Ok(())
    }

    /// Makes zeros of a place in the data file.
    fn zero_place(&mut self, id: RequestId, offset: u64, bytes: u32, how: Change) {
        let kind = if matches!(how, Change::Punch) {
            mark!("zero.punched_data_file");
            let size = self.geometry().cluster_size();
            OpKind::Punch { offset, len: u64::from(bytes).next_multiple_of(size) }
        } else {
            mark!("zero.filled_data_file");
            // Not behind the end of the virtual disk: the file must not grow.
            OpKind::WriteZeros { offset, len: bytes }
        };
        self.emit_to(Owner::Request(id), self.data_file(), kind);
        self.requests[id].pos += bytes;
    }

    fn has_raw_data_file(&self) -> bool {
        self.header.data_file().is_some_and(|file| file.raw)
    }

    /// What is done to the place of clusters that read as zeros, in a raw data file.
    fn place_change(&self, how: Zeroing) -> Change {
        let unmap = if how.discard { self.options.discards == Discards::Unmap } else { how.unmap };
        // On a file system without holes it stays as it is: the disk reads zeros all the same.
        if unmap { Change::Punch } else { Change::Fill }
    }

    fn has_zero_flag(&self) -> bool {
        if planted::is(Bug::ZeroFlagInVersion2) {
            return true;
        }
        self.decoder.version >= 3
    }

    fn known(&self, cluster: GuestCluster, slot: SlotId, index: usize) -> Option<Known> {
        let entry = self.l2_cache.entry(slot, index);
        let mapping = self.mapping(cluster, 0, entry, true).ok()?;
        let reference = self.decoder.reference(entry, cluster);
        let overlay = self.overlay.get(cluster);
        let owned = match (overlay, reference) {
            (Some(entry), _) => Some(Pointer { at: entry.host, copied: true }),
            (None, Reference::Cluster(pointer)) => Some(pointer).filter(|p| p.copied),
            _ => None,
        };
        let extended = self.geometry().has_extended_l2();
        let zero_bits = entry.bitmap >> 32 == u32::MAX.into();
        let any_bits = entry.bitmap != 0;
        let data_bits = entry.bitmap << 32 != 0;
        let pending = overlay.map_or(0, |entry| entry.units());
        let data_units = entry.bitmap & u64::from(u32::MAX) | u64::from(pending);
        let compressed = matches!(mapping, Mapping::Compressed(_));
        Some(Known {
            mapping,
            data: if extended { data_bits } else { matches!(mapping, Mapping::Data(_)) },
            all_data: !extended || data_units == u32::MAX.into(),
            owned,
            counts: overlay.is_some() || reference != Reference::Nothing,
            zero: overlay.is_none()
                && if extended { zero_bits } else { matches!(mapping, Mapping::Zero { .. }) },
            unallocated: overlay.is_none()
                && !compressed
                && if extended {
                    !any_bits
                } else {
                    matches!(mapping, Mapping::Unallocated { .. })
                },
        })
    }

    /// What becomes of one whole cluster.
    fn change_of(&mut self, cluster: GuestCluster, known: Known, how: Zeroing) -> Step<Change> {
        let bits = self.geometry().cluster_bits();
        let beneath = self.beneath(cluster.0 << bits, 1 << bits) != 0;
        let zero = known.zero || (known.unallocated && !beneath);
        let unmap = if how.discard { self.options.discards == Discards::Unmap } else { how.unmap };
        if zero && self.has_raw_data_file() {
            return Ok(self.place_change(how));
        }
        if zero && !(unmap && known.counts) {
            return Ok(Change::Nothing);
        }
        if self.decoder.data_file && (known.data || self.overlay.get(cluster).is_some()) {
            if !how.discard {
                return Ok(Change::Write(known.mapping));
            }
            if !unmap && !self.has_raw_data_file() {
                let place = self.decoder.data_word(Decoder::data_cluster(cluster));
                return Ok(Change::Entry(self.decoder.zero_entry(place)));
            }
            if known.all_data || !beneath {
                return Ok(if unmap { Change::Punch } else { Change::Fill });
            }
            // A hole would leave the subclusters as they are that show what lies beneath.
        }
        if let Some(pointer) = known.owned {
            self.check_overlap(pointer.at, 1)?;
        }
        let keep = known.owned.filter(|_| !unmap);
        let needs_flag = beneath || keep.is_some();
        if needs_flag && !self.has_zero_flag() {
            return Ok(if how.discard { Change::Nothing } else { Change::Write(known.mapping) });
        }
        Ok(Change::Entry(match keep {
            Some(pointer) => self.decoder.zero_entry(self.decoder.data_word(pointer.at)),
            None if beneath && !planted::is(Bug::DiscardShowsBeneath) => self.decoder.zero_entry(0),
            None => L2Entry::default(),
        }))
    }

    /// Changes an entry, for these units of it: what it and the overlay referred to, and nothing
    /// does now, is given back. The caller has asked for room in quarantine and journal.
    pub(crate) fn replace_entry(
        &mut self,
        cluster: GuestCluster,
        slot: SlotId,
        index: usize,
        (entry, units): (L2Entry, u32),
    ) {
        let old = self.decoder.reference(self.l2_cache.entry(slot, index), cluster);
        let pending = self.overlay.get(cluster);
        if pending.is_some_and(|pending| pending.units() & units != 0) {
            self.fold_replaced();
        }
        let empty = pending.is_some() && self.overlay.remove_units(cluster, units);
        self.l2_cache.set_entry(slot, index, entry);
        self.note_dirty();
        if !planted::is(Bug::ZeroNotRecorded) {
            self.record(cluster, entry);
        }
        let place = |reference: Reference| match reference {
            Reference::Cluster(pointer) => Some(pointer.at),
            _ => None,
        };
        let now = place(self.decoder.reference(entry, cluster));
        if old != Reference::Nothing && (now.is_none() || place(old) != now) {
            mark!("zero.released");
            self.quarantine_reference(old);
        }
        // A host cluster that only the overlay knew. (Nobody counts those of a data file.)
        if let Some(pending) = pending.filter(|_| empty && !self.decoder.data_file)
            && Some(pending.host) != place(old)
            && Some(pending.host) != now
        {
            mark!("zero.released_pending");
            self.quarantine(pending.host, 1);
        }
    }
}
