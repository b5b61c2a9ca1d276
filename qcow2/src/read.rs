//! Reads, and the resolving of guest offsets that all requests share.

use crate::cache::{Lookup, SlotId};
use crate::engine::Engine;
use crate::entry::{Mapping, Pointer};
use crate::error::{FailureKind, IoErrorKind};
use crate::op::{FileId, OpKind};
use crate::optable::Owner;
use crate::request::{RequestId, Step, Stop, Wait, Which};
use crate::units::{GuestCluster, GuestOffset};

/// Adjacent guest clusters that are mapped in the same way: unallocated, zero, or to adjacent host
/// clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The mapping of the first cluster.
    pub(crate) mapping: Mapping,
    /// How many clusters, at least one. A run never crosses an L2 page, so another may follow that
    /// would continue it.
    pub(crate) clusters: u64,
}

/// Where the L2 entry of a guest cluster is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryPlace {
    /// Page number in the file.
    pub(crate) page: u64,
    /// Entry within the page.
    pub(crate) index: usize,
    /// Entries from there to the end of the page.
    pub(crate) left: u64,
}

impl Engine {
    pub(crate) fn l1_index(&self, cluster: GuestCluster) -> u64 {
        cluster.0 >> self.geometry().l2_bits()
    }

    /// The L2 table for a guest cluster, if there is one.
    pub(crate) fn l2_table(&self, cluster: GuestCluster) -> Option<Pointer> {
        let word = self.l1.get(self.l1_index(cluster))?;
        // Checked when the image was opened, and ours since then.
        self.decoder.l1(word, u64::MAX).ok().flatten()
    }

    pub(crate) fn entry_place(&self, table: Pointer, cluster: GuestCluster) -> EntryPlace {
        let geometry = self.geometry();
        let index = cluster.0 & (geometry.l2_entries() - 1);
        let byte = geometry.host_start(table.at).0 + index * 8;
        let per_page = 1_u64 << (geometry.page_bits() - 3);
        let within = index & (per_page - 1);
        EntryPlace {
            page: byte >> geometry.page_bits(),
            index: usize::try_from(within).expect("below 512"),
            left: per_page - within,
        }
    }

    /// The L2 page at `place`, if it is there; otherwise it is sent for.
    pub(crate) fn l2_page(&mut self, place: EntryPlace) -> Step<SlotId> {
        match self.l2_cache.lookup(place.page) {
            Lookup::Hit(slot) => {
                self.l2_cache.touch(slot);
                Ok(slot)
            }
            Lookup::Loading => Err(Stop::Wait(Wait::Page(Which::L2, place.page))),
            Lookup::Absent => Err(self.load(Which::L2, place.page)),
        }
    }

    /// The same, ready to be changed.
    pub(crate) fn l2_page_to_change(&mut self, place: EntryPlace) -> Step<SlotId> {
        let slot = self.l2_page(place)?;
        if self.l2_cache.may_dirty(slot) {
            return Ok(slot);
        }
        self.round.wanted = true;
        Err(Stop::Wait(Wait::Slot(Which::L2)))
    }

    /// How one guest cluster is mapped, with its page at hand: the overlay comes first.
    pub(crate) fn mapping(
        &self,
        cluster: GuestCluster,
        slot: SlotId,
        index: usize,
    ) -> Result<Mapping, ()> {
        if let Some(entry) = self.overlay.get(cluster) {
            return Ok(Mapping::Data(Pointer { at: entry.host, copied: true }));
        }
        self.decoder.l2(self.l2_cache.word(slot, index), self.file_len).map_err(|_| ())
    }

    /// How the guest cluster at `cluster` and up to `most` following are mapped. On a miss the page
    /// is sent for.
    pub(crate) fn resolve(&mut self, cluster: GuestCluster, most: u64) -> Step<Run> {
        let Some(table) = self.l2_table(cluster) else {
            let entries = self.geometry().l2_entries();
            let clusters = most.min(entries - (cluster.0 & (entries - 1)));
            return Ok(Run { mapping: Mapping::Unallocated, clusters });
        };
        let place = self.entry_place(table, cluster);
        let slot = self.l2_page(place)?;
        let mapping_at = |step: u64| {
            let index = place.index + usize::try_from(step).expect("within a page");
            self.mapping(GuestCluster(cluster.0 + step), slot, index)
        };
        let Ok(mapping) = mapping_at(0) else {
            self.incident(FailureKind::BadEntry, place.page << self.geometry().page_bits());
            return Err(Stop::Fail(IoErrorKind::Io));
        };
        let most = most.min(place.left);
        let mut clusters = 1;
        while clusters < most && mapping_at(clusters) == Ok(continued(mapping, clusters)) {
            clusters += 1;
        }
        if mapping == Mapping::Compressed {
            self.incident(FailureKind::Compressed, place.page << self.geometry().page_bits());
            return Err(Stop::Fail(IoErrorKind::Io));
        }
        Ok(Run { mapping, clusters })
    }

    /// Bytes of the virtual disk from `offset` on, at most `len`, that lie within the backing file.
    pub(crate) fn beneath(&self, offset: u64, len: u64) -> u64 {
        self.backing_len.unwrap_or(0).saturating_sub(offset).min(len)
    }

    pub(crate) fn step_read(&mut self, id: RequestId) -> Step<()> {
        let (offset, len) = self.requests[id].range();
        let geometry = self.geometry();
        while self.requests[id].error.is_none() && self.requests[id].pos < len {
            if !self.ops.has_payload_room() {
                return Err(Stop::Wait(Wait::OpSlot));
            }
            let at = self.requests[id].pos;
            let guest = GuestOffset(offset + u64::from(at));
            let within = geometry.within(guest);
            let left = u64::from(len - at);
            let run =
                self.resolve(geometry.cluster_of(guest), geometry.clusters_for(within + left))?;
            let bytes = left.min((run.clusters << geometry.cluster_bits()) - within);
            match run.mapping {
                Mapping::Data(pointer) => {
                    let offset = geometry.host_start(pointer.at).0 + within;
                    self.read_from(id, FileId::Image, offset, bytes);
                }
                Mapping::Unallocated => {
                    let beneath = self.beneath(guest.0, bytes);
                    if beneath != 0 {
                        // Whole sectors: the driver comes to the end of the file in the last.
                        let whole = beneath.next_multiple_of(512).min(bytes);
                        self.read_from(id, FileId::Backing, guest.0, whole);
                    } else {
                        self.fill(id, bytes);
                    }
                }
                Mapping::Zero { .. } => self.fill(id, bytes),
                Mapping::Compressed => unreachable!("resolve refuses them"),
            }
        }
        if self.requests[id].pending != 0 { Err(Stop::Wait(Wait::Ops)) } else { Ok(()) }
    }

    fn read_from(&mut self, id: RequestId, file: FileId, offset: u64, bytes: u64) {
        let (tag, len) = (self.tag_of(id), u32::try_from(bytes).expect("at most the request"));
        let at = self.requests[id].pos;
        self.emit_to(Owner::Request(id), file, OpKind::Read { tag, at, offset, len });
        self.requests[id].pos += len;
    }

    fn fill(&mut self, id: RequestId, bytes: u64) {
        let at = self.requests[id].pos;
        let (tag, len) = (self.tag_of(id), u32::try_from(bytes).expect("at most the request"));
        self.emit(Owner::Request(id), OpKind::Fill { tag, at, len });
        self.requests[id].pos += len;
    }

    pub(crate) fn tag_of(&self, id: RequestId) -> u16 {
        u16::try_from(id % usize::from(self.options.depth)).expect("below the depth")
    }
}

/// The mapping that the cluster `step` after one with `mapping` has if it continues the run.
fn continued(mapping: Mapping, step: u64) -> Mapping {
    let advance = |p: Pointer| Pointer { at: p.at.plus(step), copied: p.copied };
    match mapping {
        Mapping::Data(pointer) => Mapping::Data(advance(pointer)),
        Mapping::Zero { keeps } => Mapping::Zero { keeps: keeps.map(advance) },
        same @ (Mapping::Unallocated | Mapping::Compressed) => same,
    }
}
