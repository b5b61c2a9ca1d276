//! Reads, and the resolving of guest offsets that all requests share.
//!
//! [`resolve`](Engine::resolve) says how the image itself maps the virtual disk, and
//! [`locate`](Engine::locate) where bytes come from in the end, through all that lies beneath. Both
//! may find that a page is missing: then it was sent for, and the caller looks again later.

use crate::cache::{Lookup, SlotId};
use crate::engine::Engine;
use crate::entry::{Decoder, L2Entry, Mapping, Pointer};
use crate::error::FailureKind;
use crate::layer::{Kind, Qcow2};
use crate::op::{Compressed, FileId, OpKind};
use crate::optable::Owner;
use crate::request::{RequestId, Step, Stop, Wait, Which};
use crate::units::{GuestCluster, GuestUnit};

/// Adjacent units that are mapped in the same way: unallocated, zero, in adjacent host clusters, or
/// of one compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The mapping of the first unit.
    pub(crate) mapping: Mapping,
    /// How many units, at least one. A run never crosses an L2 page, so another may follow that
    /// would continue it.
    pub(crate) units: u64,
}

/// Where the L2 entry of a guest cluster is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryPlace {
    /// The page, as the cache knows it.
    pub(crate) page: u64,
    /// Entry within the page.
    pub(crate) index: usize,
    /// Entries from there to the end of the page, or of the table.
    pub(crate) left: u64,
    /// Nobody else has this table: what its entries point to may be changed where they say so.
    pub(crate) owned: bool,
}

/// Where bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Zeros,
    File { file: FileId, offset: u64 },
    Compressed { file: FileId, source: Compressed, from: u32 },
}

/// What was found for some offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Located {
    pub(crate) source: Source,
    /// It is so for so many bytes.
    pub(crate) bytes: u64,
}

/// How far a search for one offset has come: no layer is asked again after it has answered, so two
/// cached pages are enough for a chain of any length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// The next to be asked: 0 is the image itself.
    layer: u8,
    /// For so many bytes the ones before had nothing.
    bytes: u64,
}

impl Cursor {
    pub(crate) const START: Self = Self { layer: 0, bytes: 0 };
}

/// The cache knows a page of layer `n` beneath by this and its number in the file, which is below
/// 2^63 / 512.
const LAYER_SHIFT: u32 = 56;

/// The file and the page number that the L2 cache's name of a page stands for.
pub(crate) fn file_of_page(page: u64) -> (FileId, u64) {
    let number = page & ((1 << LAYER_SHIFT) - 1);
    match u8::try_from(page >> LAYER_SHIFT).expect("8 bits") {
        0 => (FileId::Image, number),
        layer => (FileId::Backing(layer - 1), number),
    }
}

/// Where an entry lies, in pages of the cache's size. Tables of layers beneath may be shorter.
fn place_in(decoder: Decoder, table: Pointer, cluster: GuestCluster, page_bits: u32) -> EntryPlace {
    let geometry = decoder.geometry;
    let index = cluster.0 & (geometry.l2_entries() - 1);
    let byte = geometry.host_start(table.at).0 + (index << geometry.entry_bits());
    let within = (byte & ((1 << page_bits) - 1)) >> geometry.entry_bits();
    let in_page = (1_u64 << (page_bits - geometry.entry_bits())) - within;
    EntryPlace {
        page: byte >> page_bits,
        index: usize::try_from(within).expect("at most 512 per page"),
        left: in_page.min(geometry.l2_entries() - index),
        owned: table.copied,
    }
}

impl Engine {
    pub(crate) fn l1_index(&self, cluster: GuestCluster) -> u64 {
        cluster.0 >> self.geometry().l2_bits()
    }

    /// The file with guest data.
    pub(crate) fn data_file(&self) -> FileId {
        if self.decoder.data_file { FileId::Data } else { FileId::Image }
    }

    /// The L2 table for a guest cluster, if there is one.
    pub(crate) fn l2_table(&self, cluster: GuestCluster) -> Option<Pointer> {
        let word = self.l1.get(self.l1_index(cluster))?;
        // Checked when the image was opened, and ours since then.
        self.decoder.l1(word, u64::MAX).ok().flatten()
    }

    pub(crate) fn entry_place(&self, table: Pointer, cluster: GuestCluster) -> EntryPlace {
        place_in(self.decoder, table, cluster, self.geometry().page_bits())
    }

    /// The L2 page at `place`, if it is there; otherwise it is sent for.
    pub(crate) fn l2_page(&mut self, page: u64) -> Step<SlotId> {
        match self.l2_cache.lookup(page) {
            Lookup::Hit(slot) => {
                self.l2_cache.touch(slot);
                self.stats.l2_hits += 1;
                Ok(slot)
            }
            Lookup::Loading => Err(Stop::Wait(Wait::Page(Which::L2, page))),
            Lookup::Absent => Err(self.load(Which::L2, page)),
        }
    }

    /// The same, ready to be changed.
    pub(crate) fn l2_page_to_change(&mut self, place: EntryPlace) -> Step<SlotId> {
        debug_assert!(place.owned, "a table that others share is copied first");
        let slot = self.l2_page(place.page)?;
        if self.l2_cache.may_dirty(slot) {
            return Ok(slot);
        }
        self.round.wanted = true;
        Err(Stop::Wait(Wait::Slot(Which::L2)))
    }

    /// How one unit of a guest cluster is mapped, with its entry at hand: the overlay comes first.
    pub(crate) fn mapping(
        &self,
        cluster: GuestCluster,
        unit: u32,
        entry: L2Entry,
        owned: bool,
    ) -> Result<Mapping, ()> {
        let found = self.decoder.l2(entry, cluster, unit, self.file_len).map_err(|_| ());
        if let Some(entry) = self.overlay.get(cluster) {
            let pointer = Pointer { at: entry.host, copied: true };
            if entry.units() >> unit & 1 != 0 {
                return Ok(Mapping::Data(pointer));
            }
            // The other units of the cluster have their place there, too.
            return Ok(match found? {
                Mapping::Unallocated { .. } => Mapping::Unallocated { keeps: Some(pointer) },
                Mapping::Zero { .. } => Mapping::Zero { keeps: Some(pointer) },
                data @ (Mapping::Data(_) | Mapping::Compressed(_)) => data,
            });
        }
        Ok(if owned { found? } else { shared(found?) })
    }

    /// How the unit `first` and up to `most` following are mapped. On a miss the page is sent for.
    pub(crate) fn resolve(&mut self, first: GuestUnit, most: u64) -> Step<Run> {
        let geometry = self.geometry();
        let bits = geometry.units_bits();
        let cluster = GuestCluster(first.0 >> bits);
        let Some(table) = self.l2_table(cluster) else {
            let units = geometry.l2_entries() << bits;
            let units = most.min(units - (first.0 & (units - 1)));
            return Ok(Run { mapping: Mapping::NOTHING, units });
        };
        let place = self.entry_place(table, cluster);
        let slot = self.l2_page(place.page)?;
        let run = run_of(self.decoder, first, most, place, |cluster, unit, index| {
            let entry = self.l2_cache.entry(slot, index);
            self.mapping(cluster, unit, entry, place.owned)
        });
        run.ok_or_else(|| {
            self.incident(FailureKind::BadEntry, place.page << geometry.page_bits());
            Stop::Fail(crate::IoErrorKind::Io)
        })
    }

    /// The same for layer number `number` beneath.
    fn resolve_beneath(&mut self, number: u8, first: GuestUnit, most: u64) -> Step<Run> {
        let page_bits = self.geometry().page_bits();
        let Kind::Qcow2(layer) = &self.layers[usize::from(number)].0 else {
            unreachable!("a raw file has no mappings");
        };
        let (decoder, file_len) = (layer.decoder, layer.file_len);
        let bits = decoder.geometry.units_bits();
        let cluster = GuestCluster(first.0 >> bits);
        let table = layer.l1.get(cluster.0 >> decoder.geometry.l2_bits());
        // Checked when the layer was made.
        let table = table.and_then(|word| decoder.l1(word, u64::MAX).ok().flatten());
        let Some(table) = table else {
            let units = decoder.geometry.l2_entries() << bits;
            let units = most.min(units - (first.0 & (units - 1)));
            return Ok(Run { mapping: Mapping::NOTHING, units });
        };
        let mut place = place_in(decoder, table, cluster, page_bits);
        place.page |= (u64::from(number) + 1) << LAYER_SHIFT;
        let slot = self.l2_page(place.page)?;
        let run = run_of(decoder, first, most, place, |cluster, unit, index| {
            let entry = self.l2_cache.entry_as(slot, index, decoder.geometry.entry_bits());
            decoder.l2(entry, cluster, unit, file_len).map_err(|_| ())
        });
        run.ok_or_else(|| {
            let page = place.page & ((1 << LAYER_SHIFT) - 1);
            self.incident(FailureKind::BadEntryBeneath(number), page << page_bits);
            Stop::Fail(crate::IoErrorKind::Io)
        })
    }

    /// Bytes of the virtual disk from `offset` on, at most `len`, that lie within the file beneath.
    pub(crate) fn beneath(&self, offset: u64, len: u64) -> u64 {
        let size = self.layers.first().map_or(0, crate::Layer::virtual_size);
        size.saturating_sub(offset).min(len)
    }

    /// Where the bytes of the virtual disk from `offset` on are, for `len` bytes or fewer.
    pub(crate) fn locate(&mut self, offset: u64, len: u64, cursor: &mut Cursor) -> Step<Located> {
        if cursor.layer == 0 {
            let (first, most) = units_of(self.decoder, offset, len);
            let run = self.resolve(first, most)?;
            let file = self.data_file();
            let found = found(self.decoder, run, (FileId::Image, file), offset, len);
            match found {
                Ok(found) => return Ok(found),
                Err(bytes) => *cursor = Cursor { layer: 1, bytes },
            }
        }
        loop {
            let bytes = cursor.bytes.min(len);
            let number = cursor.layer - 1;
            let Some(layer) = self.layers.get(usize::from(number)) else {
                return Ok(Located { source: Source::Zeros, bytes });
            };
            let size = layer.virtual_size();
            if offset >= size {
                return Ok(Located { source: Source::Zeros, bytes });
            }
            // Whole sectors: the driver comes to the end of the file in the last.
            let bytes = bytes.min((size - offset).next_multiple_of(512));
            let Kind::Qcow2(layer) = &layer.0 else {
                let file = FileId::Backing(number);
                return Ok(Located { source: Source::File { file, offset }, bytes });
            };
            let Qcow2 { decoder, .. } = **layer;
            let (first, most) = units_of(decoder, offset, bytes);
            let run = self.resolve_beneath(number, first, most)?;
            let data = if decoder.data_file {
                FileId::BackingData(number)
            } else {
                FileId::Backing(number)
            };
            match found(decoder, run, (FileId::Backing(number), data), offset, bytes) {
                Ok(found) => return Ok(found),
                Err(bytes) => *cursor = Cursor { layer: cursor.layer + 1, bytes },
            }
        }
    }

    pub(crate) fn step_read(&mut self, id: RequestId) -> Step<()> {
        let (offset, len) = self.requests[id].range();
        while self.requests[id].error.is_none() && self.requests[id].pos < len {
            if !self.ops.has_payload_room() {
                return Err(Stop::Wait(Wait::OpSlot));
            }
            let at = self.requests[id].pos;
            let mut cursor = self.requests[id].cursor;
            let found = self.locate(offset + u64::from(at), u64::from(len - at), &mut cursor);
            self.requests[id].cursor = cursor;
            let Located { source, bytes } = found?;
            self.requests[id].cursor = Cursor::START;
            let (tag, len) = (self.tag_of(id), u32::try_from(bytes).expect("at most the request"));
            let (file, kind) = match source {
                Source::Zeros => (FileId::Image, OpKind::Fill { tag, at, len }),
                Source::File { file, offset } => (file, OpKind::Read { tag, at, offset, len }),
                Source::Compressed { file, source, from } => {
                    (file, OpKind::Inflate { tag, at, source, from, len })
                }
            };
            self.emit_to(Owner::Request(id), file, kind);
            self.requests[id].pos += len;
        }
        if self.requests[id].pending != 0 { Err(Stop::Wait(Wait::Ops)) } else { Ok(()) }
    }

    pub(crate) fn tag_of(&self, id: RequestId) -> u16 {
        self.requests[id].tag
    }
}

/// The first unit that `len` bytes from `offset` on touch, and how many they touch.
pub(crate) fn units_of(decoder: Decoder, offset: u64, len: u64) -> (GuestUnit, u64) {
    let bits = decoder.geometry.unit_bits();
    let first = offset >> bits;
    (GuestUnit(first), ((offset + len - 1) >> bits) - first + 1)
}

/// The run of equal mappings from `first` on that lies in one page. `None`: a bad entry.
fn run_of(
    decoder: Decoder,
    first: GuestUnit,
    most: u64,
    place: EntryPlace,
    mapping: impl Fn(GuestCluster, u32, usize) -> Result<Mapping, ()>,
) -> Option<Run> {
    let bits = decoder.geometry.units_bits();
    let mask = (1 << bits) - 1;
    let within = first.0 & mask;
    let at = |step: u64| {
        let (cluster, unit) = ((within + step) >> bits, (within + step) & mask);
        let index = place.index + usize::try_from(cluster).expect("within a page");
        let unit = u32::try_from(unit).expect("below 32");
        (mapping(GuestCluster((first.0 >> bits) + cluster), unit, index), cluster)
    };
    let start = at(0).0.ok()?;
    let most = match start {
        Mapping::Compressed(_) => most.min(mask + 1 - within),
        _ => most.min((place.left << bits) - within),
    };
    let mut units = 1;
    while units < most {
        let (next, clusters) = at(units);
        if next != Ok(continued(start, clusters)) {
            break;
        }
        units += 1;
    }
    Some(Run { mapping: start, units })
}

/// The mapping that a unit `clusters` clusters on from one with `mapping` has if it continues the
/// run.
fn continued(mapping: Mapping, clusters: u64) -> Mapping {
    let advance = |p: Pointer| Pointer { at: p.at.plus(clusters), copied: p.copied };
    match mapping {
        Mapping::Data(pointer) => Mapping::Data(advance(pointer)),
        Mapping::Zero { keeps } => Mapping::Zero { keeps: keeps.map(advance) },
        Mapping::Unallocated { keeps } => Mapping::Unallocated { keeps: keeps.map(advance) },
        same @ Mapping::Compressed(_) => same,
    }
}

/// What an entry of a table that others share says: none of it is ours alone.
fn shared(mapping: Mapping) -> Mapping {
    let not_ours = |p: Pointer| Pointer { copied: false, ..p };
    match mapping {
        Mapping::Data(pointer) => Mapping::Data(not_ours(pointer)),
        Mapping::Zero { keeps } => Mapping::Zero { keeps: keeps.map(not_ours) },
        Mapping::Unallocated { keeps } => Mapping::Unallocated { keeps: keeps.map(not_ours) },
        same @ Mapping::Compressed(_) => same,
    }
}

/// Where the bytes of a run are, from `offset` on and at most `len`, in an image whose metadata and
/// whose guest data are in these `files`. `Err`: not there, for so many bytes.
fn found(
    decoder: Decoder,
    run: Run,
    files: (FileId, FileId),
    offset: u64,
    len: u64,
) -> Result<Located, u64> {
    let geometry = decoder.geometry;
    let within_unit = offset & ((1 << geometry.unit_bits()) - 1);
    let within = offset & (geometry.cluster_size() - 1);
    let bytes = len.min((run.units << geometry.unit_bits()) - within_unit);
    let source = match run.mapping {
        Mapping::Unallocated { .. } => return Err(bytes),
        Mapping::Zero { .. } => Source::Zeros,
        Mapping::Data(pointer) => {
            Source::File { file: files.1, offset: decoder.data_start(pointer.at).0 + within }
        }
        Mapping::Compressed(source) => {
            let from = u32::try_from(within).expect("within 2 MiB");
            Source::Compressed { file: files.0, source, from }
        }
    };
    Ok(Located { source, bytes })
}
