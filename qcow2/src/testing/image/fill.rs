//! What is in an image from the start: guest data in every form, and snapshots that share it.

use std::vec::Vec;

use super::deflate::deflate;
use super::writer::Writer;
use super::{DataFile, ImageSpec, garbage};
use crate::testing::format::{COMPRESSED, COPIED, Format, OFFSET, Unit, ZERO};
use crate::testing::guest::guest_sector;
use crate::testing::pool::{Pool, SECTOR, SectorId};
use crate::testing::size;

/// An image while it is being filled.
pub(super) struct Filler<'a> {
    spec: &'a ImageSpec,
    format: Format,
    pub(super) file: Writer,
    /// Where the L1 table is.
    l1: u64,
    pub(super) content: Vec<SectorId>,
    pub(super) data: Option<Vec<u8>>,
    pool: &'a mut Pool,
    /// What each snapshot reads as, and where its L1 table is.
    pub(super) snapshots: Vec<Vec<SectorId>>,
    tables: Vec<u64>,
    /// Entries of compressed clusters, and what they hold.
    pub(super) packed: Vec<(u64, Vec<SectorId>)>,
    /// The next free byte for compressed data, and the end of its last cluster.
    free: (u64, u64),
}

/// The bitmaps of extended entries, in turn: all data; half of it; data, zeros and nothing mixed;
/// zeros that keep their place.
const BITMAPS: [u64; 4] =
    [0xffff_ffff, 0x0000_ffff, 0x00ff_00ff | 0x0f00_0f00 << 32, 0xffff_ffff << 32];

impl<'a> Filler<'a> {
    pub(super) fn new(
        spec: &'a ImageSpec,
        file: Writer,
        l1: u64,
        content: Vec<SectorId>,
        data: Option<Vec<u8>>,
        pool: &'a mut Pool,
    ) -> Self {
        Self {
            spec,
            format: super::format_of(&file.bytes),
            file,
            l1,
            content,
            data,
            pool,
            snapshots: Vec::new(),
            tables: Vec::new(),
            packed: Vec::new(),
            free: (0, 0),
        }
    }

    fn cluster(&self) -> u64 {
        1 << self.spec.cluster_bits
    }

    /// The L2 table for a guest cluster, which is made if there is none.
    fn table(&mut self, guest: u64) -> u64 {
        let at = self.l1 + guest / self.format.entries() as u64 * 8;
        if self.file.word(at) == 0 {
            let table = self.file.take(1);
            self.file.put_word(at, table | COPIED);
        }
        self.file.word(at) & OFFSET
    }

    /// Where the L2 entry of a guest cluster is.
    fn place(&mut self, guest: u64) -> u64 {
        let table = self.table(guest);
        table + guest % self.format.entries() as u64 * 8 * self.format.entry_words() as u64
    }

    fn set(&mut self, guest: u64, word: u64, bitmap: u64) {
        let at = self.place(guest);
        self.file.put_word(at, word);
        if self.format.extended {
            self.file.put_word(at + 8, bitmap);
        }
    }

    /// Fills every so many guest clusters, as write `number`.
    pub(super) fn fill(&mut self, number: u64) {
        if self.spec.every == 0 {
            return;
        }
        let used = (0..self.spec.guest / self.cluster()).step_by(size(self.spec.every));
        let all: Vec<(u64, u64)> = (0..).zip(used).collect();
        for &(_, guest) in &all {
            self.table(guest);
        }
        // Those that are compressed first: they share host clusters, which have to be adjacent.
        let compressed = self.spec.compressed;
        let is_compressed = |turn: u64| compressed != 0 && turn.is_multiple_of(compressed);
        for &(turn, guest) in all.iter().filter(|&&(turn, _)| is_compressed(turn)) {
            self.compress(guest, number, (turn / compressed).is_multiple_of(3));
        }
        for &(turn, guest) in all.iter().filter(|&&(turn, _)| !is_compressed(turn)) {
            let bitmap = if self.format.extended { BITMAPS[size(turn % 4)] } else { 0 };
            self.write(guest, number, bitmap);
        }
    }

    /// Gives a guest cluster a host cluster, with data where the bitmap says so.
    fn write(&mut self, guest: u64, number: u64, bitmap: u64) {
        let (cluster, sectors) = (self.cluster(), self.format.sectors());
        let at = match self.data {
            Some(_) => guest * cluster,
            None => self.file.take(1),
        };
        self.set(guest, at | COPIED, bitmap);
        for step in 0..sectors {
            let place = size(guest) * sectors + step;
            let unit = step * self.format.units() / sectors;
            let mut bytes = garbage(place as u64, self.pool);
            match self.format.unit([at | COPIED, bitmap], unit) {
                Unit::Data => {
                    let id = self.pool.intern_words(&guest_sector(place as u64, number));
                    bytes = self.pool.bytes(id);
                    self.content[place] = id;
                }
                Unit::Zeros => self.content[place] = SectorId::ZERO,
                Unit::Nothing => {}
            }
            let to = at + (step * SECTOR) as u64;
            if matches!(self.spec.data_file, Some(DataFile::Own(len)) if to >= len) {
                // The data file ends before that.
                self.content[place] = SectorId::ZERO;
            }
            match &mut self.data {
                Some(data) => data[size(to)..size(to) + SECTOR].copy_from_slice(&bytes),
                None => self.file.put(to, &bytes),
            }
        }
    }

    /// Stores a guest cluster compressed: full of data, or with one sector of data.
    fn compress(&mut self, guest: u64, number: u64, full: bool) {
        let sectors = self.format.sectors();
        let mut bytes = Vec::new();
        let mut content = Vec::new();
        for step in 0..sectors {
            let place = size(guest) * sectors + step;
            let id = match full || step == 0 {
                true => self.pool.intern_words(&guest_sector(place as u64, number)),
                false => SectorId::ZERO,
            };
            bytes.extend(self.pool.bytes(id));
            content.push(id);
            self.content[place] = id;
        }
        let packed = deflate(&bytes, SECTOR);
        let len = packed.len() as u64;
        while self.free.1 - self.free.0 < len {
            let at = self.file.take_uncounted();
            if at != self.free.1 {
                self.free.0 = at;
            }
            self.free.1 = at + self.cluster();
        }
        let (at, bits) = (self.free.0, self.spec.cluster_bits);
        self.free.0 += len;
        self.file.put(at, &packed);
        let more = (at + len - 1) / 512 - at / 512;
        let x = 62 - (bits - 8);
        assert!(more >> (62 - x) == 0, "the entry has bits for so many sectors");
        let word = COMPRESSED | more << x | at;
        self.file.refer(self.format.counted(word));
        self.set(guest, word, 0);
        self.packed.push((word, content));
    }

    /// Nothing refers to a guest cluster's host clusters any more.
    fn release(&mut self, guest: u64) -> u64 {
        let at = self.place(guest);
        let word = self.file.word(at);
        self.file.release(self.format.counted(word));
        word
    }

    /// Takes a snapshot of all: it and the active tables share everything.
    pub(super) fn snapshot(&mut self) {
        let (cluster, entry) = (self.cluster(), 8 * self.format.entry_words() as u64);
        let bytes = self.format.l1.1 as u64 * 8;
        let copy = self.file.take(bytes.div_ceil(cluster));
        for at in (0..bytes).step_by(8) {
            // As it was: nobody looks at the COPIED flags of a snapshot.
            let word = self.file.word(self.l1 + at);
            self.file.put_word(copy + at, word);
            if word == 0 {
                continue;
            }
            let table = word & OFFSET;
            self.file.put_word(self.l1 + at, table);
            self.file.refer(table / cluster..table / cluster + 1);
            for place in (table..table + cluster).step_by(size(entry)) {
                let word = self.file.word(place);
                self.file.refer(self.format.counted(word));
                self.file.put_word(place, word & !COPIED);
            }
        }
        self.tables.push(copy);
        self.snapshots.push(self.content.clone());
    }

    /// What may happen after a snapshot: tables are copied (of the last snapshot, those with odd
    /// numbers), and in the copies clusters are written, unmapped, and made zeros.
    pub(super) fn live(&mut self, number: u64, last: bool) {
        let entries = self.format.entries() as u64;
        for index in 0..self.format.l1.1 as u64 {
            let at = self.l1 + index * 8;
            let old = self.file.word(at);
            if old == 0 || (last && index % 2 == 0) {
                continue;
            }
            self.copy_table(at, old & OFFSET);
            let end = ((index + 1) * entries).min(self.spec.guest / self.cluster());
            for guest in index * entries..end {
                match guest % 8 {
                    1 | 2 | 5 => {
                        self.release(guest);
                        let all = if self.format.extended { BITMAPS[0] } else { 0 };
                        self.write(guest, number, all);
                    }
                    3 | 4 if self.spec.version == 3 => self.make_zeros(guest, guest % 8 == 4),
                    _ => {}
                }
            }
        }
    }

    fn copy_table(&mut self, at: u64, old: u64) {
        let cluster = self.cluster();
        let copy = self.file.take(1);
        let bytes = self.file.bytes[size(old)..size(old + cluster)].to_vec();
        self.file.put(copy, &bytes);
        self.file.put_word(at, copy | COPIED);
        self.file.release(old / cluster..old / cluster + 1);
    }

    /// A guest cluster becomes zeros; it may keep its place, which a snapshot has, too.
    fn make_zeros(&mut self, guest: u64, keep: bool) {
        let at = self.place(guest);
        let word = self.file.word(at);
        let keep = keep && word & COMPRESSED == 0 && word & OFFSET != 0;
        if !keep {
            self.release(guest);
        }
        let word = if keep { word } else { 0 };
        match self.format.extended {
            true => self.set(guest, word, BITMAPS[3]),
            false => self.set(guest, word | ZERO, 0),
        }
        let sectors = self.format.sectors();
        self.content[size(guest) * sectors..(size(guest) + 1) * sectors].fill(SectorId::ZERO);
    }

    /// Writes the table of snapshots, if there are any.
    pub(super) fn finish_snapshots(&mut self) {
        if self.tables.is_empty() {
            return;
        }
        let at = self.file.take(1);
        let count = u32::try_from(self.tables.len()).expect("few snapshots");
        self.file.put(60, &count.to_be_bytes());
        self.file.put_word(64, at);
        for number in 0..self.tables.len() {
            let entry = at + number as u64 * 64;
            self.file.put_word(entry, self.tables[number]);
            let l1_entries = u32::try_from(self.format.l1.1).expect("a small L1 table");
            self.file.put(entry + 8, &l1_entries.to_be_bytes());
            // Lengths of ID and name; 16 bytes of extra data: no VM state, and the virtual size.
            self.file.put(entry + 12, &[0, 1, 0, 4]);
            self.file.put(entry + 36, &16_u32.to_be_bytes());
            self.file.put_word(entry + 48, self.spec.guest);
            let id = b'1' + u8::try_from(number).expect("few snapshots");
            self.file.put(entry + 56, &[id, b'b', b'a', b's', b'e']);
        }
    }
}
