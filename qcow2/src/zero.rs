//! Write zeroes and discard.
//!
//! Whole clusters change by their L2 entry alone; the host clusters that lose their last reference
//! go into [quarantine](crate::quarantine). Parts of clusters are written with zeros, and left
//! alone by a discard.
//!
//! | before, whole cluster | write zeroes, unmap | write zeroes, NOUNMAP | discard |
//! | --- | --- | --- | --- |
//! | reads as zeros, no host cluster | – | – | – |
//! | zero, keeps a host cluster | released | – | released |
//! | data | released | zero flag, keeps it | released |
//! | unallocated over a backing file | zero flag | zero flag | zero flag |
//!
//! What is released becomes unallocated where nothing lies beneath, else a plain zero cluster.
//! Version 2 has no zero flag: where one would be needed, write zeroes writes zeros, and a discard
//! does nothing.

use crate::cache::SlotId;
use crate::engine::Engine;
use crate::entry::{Mapping, Pointer, copied_word, zero_word};
use crate::error::{FailureKind, IoErrorKind};
use crate::mark;
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
    Word {
        word: u64,
        release: Option<Pointer>,
    },
    /// It has to be written with zeros.
    Write(Mapping),
}

impl Engine {
    pub(crate) fn step_zero(&mut self, id: RequestId, how: Zeroing) -> Step<()> {
        let (offset, len) = self.requests[id].range();
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
            let bits = self.geometry().cluster_bits();
            let mut whole = u64::from(piece.bytes) >> bits;
            if piece.within == 0 && to_end {
                // The last cluster may reach over the end of the virtual disk.
                whole = piece.clusters;
            }
            if piece.within == 0 && whole != 0 {
                self.zero_clusters(id, self.cut(piece, whole), how)?;
            } else {
                self.zero_part(id, self.cut(piece, 1), how)?;
            }
        }
    }

    /// A part of one cluster.
    fn zero_part(&mut self, id: RequestId, piece: Piece, how: Zeroing) -> Step<()> {
        if how.discard {
            self.requests[id].pos += piece.bytes;
            return Ok(());
        }
        let mapping = self.resolve(piece.cluster, 1)?.mapping;
        let guest = (piece.cluster.0 << self.geometry().cluster_bits()) + piece.within;
        let zero = match mapping {
            Mapping::Zero { .. } => true,
            Mapping::Unallocated => self.beneath(guest, piece.bytes.into()) == 0,
            Mapping::Data(_) | Mapping::Compressed => false,
        };
        if zero {
            self.requests[id].pos += piece.bytes;
            return Ok(());
        }
        self.write_piece(id, piece, mapping)
    }

    /// Whole clusters, as many of them as one L2 page describes.
    fn zero_clusters(&mut self, id: RequestId, piece: Piece, how: Zeroing) -> Step<()> {
        let bits = self.geometry().cluster_bits();
        let Some(table) = self.l2_table(piece.cluster) else {
            let entries = self.geometry().l2_entries();
            let clusters = piece.clusters.min(entries - (piece.cluster.0 & (entries - 1)));
            let beneath = self.beneath(piece.cluster.0 << bits, clusters << bits);
            if beneath == 0 || (how.discard && !self.has_zero_flag()) {
                self.requests[id].pos += self.cut(piece, clusters).bytes;
                return Ok(());
            }
            if !self.has_zero_flag() {
                return self.write_piece(id, self.cut(piece, 1), Mapping::Unallocated);
            }
            // It is there now, or the request has to wait.
            return self.ensure_table(piece.cluster);
        };
        let place = self.entry_place(table, piece.cluster);
        let slot = self.l2_page_to_change(place)?;
        for step in 0..piece.clusters.min(place.left) {
            let cluster = GuestCluster(piece.cluster.0 + step);
            let index = place.index + usize::try_from(step).expect("within a page");
            let one = Piece { cluster, at: self.requests[id].pos, ..piece };
            let one = self.cut(Piece { bytes: piece.bytes - (one.at - piece.at), ..one }, 1);
            let Ok(mapping) = self.mapping(cluster, slot, index) else {
                self.incident(FailureKind::BadEntry, place.page << self.geometry().page_bits());
                return Err(Stop::Fail(IoErrorKind::Io));
            };
            match self.change_of(cluster, mapping, how)? {
                Change::Nothing => {}
                Change::Word { word, release } => {
                    if !self.quarantine.has_room(1) {
                        self.round.wanted = true;
                        return Err(Stop::Wait(Wait::Quarantine));
                    }
                    self.change_entry(cluster, slot, index, word);
                    if let Some(pointer) = release {
                        mark!("zero.released");
                        self.quarantine(pointer.at, 1);
                    }
                }
                Change::Write(mapping) => return self.write_piece(id, one, mapping),
            }
            self.requests[id].pos += one.bytes;
        }
        Ok(())
    }

    fn has_zero_flag(&self) -> bool {
        if planted::is(Bug::ZeroFlagInVersion2) {
            return true;
        }
        self.decoder.version >= 3
    }

    /// What becomes of one whole cluster that is mapped like this.
    fn change_of(&mut self, cluster: GuestCluster, mapping: Mapping, how: Zeroing) -> Step<Change> {
        let bits = self.geometry().cluster_bits();
        let beneath = self.beneath(cluster.0 << bits, 1 << bits) != 0;
        let pointer = match mapping {
            Mapping::Zero { keeps: None } => return Ok(Change::Nothing),
            Mapping::Unallocated if !beneath => return Ok(Change::Nothing),
            Mapping::Zero { keeps: Some(_) } if !how.unmap => return Ok(Change::Nothing),
            Mapping::Unallocated => None,
            Mapping::Zero { keeps } => keeps,
            Mapping::Data(pointer) => Some(pointer),
            Mapping::Compressed => {
                self.incident(FailureKind::Compressed, 0);
                return Err(Stop::Fail(IoErrorKind::Io));
            }
        };
        if let Some(pointer) = pointer {
            self.check_copied(pointer)?;
            self.check_overlap(pointer.at, 1)?;
        }
        let keep = pointer.filter(|_| !how.unmap);
        let needs_flag = beneath || keep.is_some();
        if needs_flag && !self.has_zero_flag() {
            return Ok(if how.discard { Change::Nothing } else { Change::Write(mapping) });
        }
        let word = match keep {
            Some(pointer) => zero_word(copied_word(self.geometry().host_start(pointer.at))),
            None if beneath && !planted::is(Bug::DiscardShowsBeneath) => zero_word(0),
            None => 0,
        };
        Ok(Change::Word { word, release: pointer.filter(|_| how.unmap) })
    }

    fn change_entry(&mut self, cluster: GuestCluster, slot: SlotId, index: usize, word: u64) {
        if self.overlay.remove(cluster).is_some() {
            self.fold_replaced();
        }
        self.l2_cache.set_word(slot, index, word);
        self.note_dirty();
    }
}
