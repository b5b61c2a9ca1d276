//! Small images, made in code: an independent and minimal writer of qcow2.

use std::collections::HashMap;
use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use crate::testing::format::Format;
use crate::testing::guest::guest_sector;
use crate::testing::pool::{Pool, SECTOR, SectorId, WORDS};
use crate::testing::size;
use crate::testing::world::Beneath;

mod deflate;
mod fill;
mod writer;

pub use deflate::inflate;
use fill::Filler;
use writer::Writer;

/// What an image is to be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSpec {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Bytes of the virtual disk.
    pub guest: u64,
    /// Guest clusters that are allocated, and hold data: one in so many; 0 for none.
    pub every: u64,
    /// Of those, so many are compressed: one in so many; 0 for none.
    pub compressed: u64,
    /// Bytes of the raw file that lies beneath it all; 0 for none.
    pub backing: u64,
    /// Between the two lies a qcow2 image of so many bytes, with clusters of another size.
    pub chain: Option<(u32, u64)>,
    /// The L1 table is made so long that the file ends a few clusters before a limit.
    pub near: Option<Limit>,
    /// log2 of the bits of a refcount.
    pub refcount_order: u32,
    /// Extended L2 entries.
    pub extended: bool,
    /// Internal snapshots, with changes after each but the last.
    pub snapshots: u32,
    /// Guest data lies in a file of its own.
    pub data_file: Option<DataFile>,
    /// A persistent bitmap.
    pub bitmap: bool,
    /// The file is so many bytes long, with garbage behind what is in use; 0 for as it comes.
    pub device: u64,
}

/// An external data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataFile {
    /// It is so many bytes long, and holds garbage where nothing is mapped.
    Own(u64),
    /// It reads like the virtual disk.
    Raw,
}

/// What a file is soon too long for, and in how many clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Its first refcount block.
    Block(u64),
    /// Its refcount table.
    Table(u64),
}

/// The names that stand in headers: of a raw file beneath, a qcow2 image beneath, the data file.
pub const BACKING_NAME: &str = "beneath.raw";
/// See there.
pub const MIDDLE_NAME: &str = "middle.qcow2";
/// See there.
pub const DATA_NAME: &str = "state.data";

/// An image and what the guest finds in it.
#[derive(Clone, Debug)]
pub struct Made {
    /// The file.
    pub bytes: Vec<u8>,
    /// The external data file.
    pub data: Option<Vec<u8>>,
    /// What each guest sector reads as.
    pub content: Vec<SectorId>,
    /// What stays as it is.
    pub setting: Setting,
}

/// What is around an image, or in it, and never changes.
#[derive(Clone, Debug, Default)]
pub struct Setting {
    /// The files beneath, from the top.
    pub files: Vec<Beneath>,
    /// What shines through where nothing is mapped.
    pub beneath: Vec<SectorId>,
    /// What each snapshot's sectors read as.
    pub snapshots: Vec<Vec<SectorId>>,
    /// Clusters that are others' for good, by their first sector, and what stands in them; nothing
    /// where that may change.
    pub others: Vec<(usize, Vec<SectorId>)>,
    /// What compressed clusters hold, by their L2 entry.
    pub compressed: HashMap<u64, Packed>,
}

/// A compressed cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// The sectors of the file that its entry refers to.
    pub source: Vec<SectorId>,
    /// What it inflates to.
    pub content: Vec<SectorId>,
}

/// The numbers of the writes that made what lies beneath, what was there at first, what was written
/// after a snapshot was taken, and what is nowhere to be seen.
const BENEATH: u64 = 1 << 40;
const MIDDLE: u64 = 1 << 42;
const AT_FIRST: u64 = 1 << 41;
const AFTER: u64 = 1 << 43;
const GARBAGE: u64 = 1 << 44;

/// A sector of bytes that nobody may ever find.
fn garbage(place: u64, pool: &mut Pool) -> [u8; SECTOR] {
    let id = pool.intern_words(&guest_sector(place, GARBAGE));
    pool.bytes(id)
}

impl ImageSpec {
    /// A plain one of version 3.
    #[must_use]
    pub const fn plain(cluster_bits: u32, guest: u64) -> Self {
        Self {
            version: 3,
            cluster_bits,
            guest,
            every: 0,
            compressed: 0,
            backing: 0,
            chain: None,
            near: None,
            refcount_order: 4,
            extended: false,
            snapshots: 0,
            data_file: None,
            bitmap: false,
            device: 0,
        }
    }

    /// Makes it.
    ///
    /// # Panics
    /// If the refcount table of one cluster is too small for it.
    #[must_use]
    pub fn make(&self, pool: &mut Pool) -> Made {
        self.make_as(pool, AT_FIRST)
    }

    /// The same with another number for the writes that made its data.
    fn make_as(&self, pool: &mut Pool, number: u64) -> Made {
        let mut setting = self.make_beneath(pool);
        let cluster = 1_u64 << self.cluster_bits;
        let mut file = Writer::new(self.cluster_bits);
        let table = file.take(1);
        let l1_entries = self.l1_entries();
        let l1 = file.take((l1_entries * 8).div_ceil(cluster));
        let mut content = setting.beneath.clone();
        content.resize(size(self.guest) / SECTOR, SectorId::ZERO);
        let bitmap = self.bitmap.then(|| self.put_bitmap(&mut file, pool));
        self.header(&mut file, (table, l1, l1_entries), bitmap.map(|[directory, ..]| directory));
        let data = self.data_file.map(|kind| match kind {
            DataFile::Raw => vec![0; size(self.guest)],
            DataFile::Own(_) => {
                (0..self.guest / 512).flat_map(|place| garbage(place, pool)).collect()
            }
        });
        let mut filler = Filler::new(self, file, l1, content, data, pool);
        filler.fill(number);
        for snapshot in 0..self.snapshots {
            filler.snapshot();
            filler.live(AFTER + u64::from(snapshot), snapshot + 1 == self.snapshots);
        }
        filler.finish_snapshots();
        let Filler { mut file, content, mut data, snapshots, packed, .. } = filler;
        setting.snapshots = snapshots;
        file.write_refcounts(table, self.refcount_order);
        if let (Some(DataFile::Own(len)), Some(data)) = (self.data_file, &mut data) {
            data.truncate(size(len));
        }
        let mut bytes = file.bytes;
        for (number, at) in bitmap.into_iter().flatten().enumerate() {
            let cluster = bytes[size(at)..size(at + cluster)].chunks(SECTOR);
            // Its flags are in the directory: it is going to be marked as in use.
            let kept = cluster.map(|sector| pool.intern(sector)).filter(|_| number != 0);
            setting.others.push((size(at) / SECTOR, kept.collect()));
        }
        for place in bytes.len() as u64 / 512..self.device / 512 {
            bytes.extend(garbage(place, pool));
        }
        let format = format_of(&bytes);
        for (word, content) in packed {
            let span = format.span(word);
            let source = bytes[size(span.start / 512 * 512)..size(span.end)].chunks(SECTOR);
            let source = source.map(|sector| pool.intern(sector)).collect();
            setting.compressed.insert(word, Packed { source, content });
        }
        Made { bytes, data, content, setting }
    }

    /// The files beneath, and what they read as.
    fn make_beneath(&self, pool: &mut Pool) -> Setting {
        let mut raw = Vec::new();
        for place in 0..self.backing.div_ceil(SECTOR as u64) {
            let id = pool.intern_words(&guest_sector(place, BENEATH));
            raw.extend(pool.bytes(id));
        }
        raw.truncate(size(self.backing));
        let mut beneath: Vec<SectorId> =
            raw.chunks(SECTOR).map(|sector| pool.intern(sector)).collect();
        let mut files: Vec<_> =
            (self.backing != 0).then(|| Beneath::raw(Rc::from(raw))).into_iter().collect();
        if let Some((cluster_bits, guest)) = self.chain {
            let plain = Self::plain(cluster_bits, guest);
            let spec = Self { every: 2, compressed: 3, backing: self.backing, ..plain };
            let made = spec.make_as(pool, MIDDLE);
            files.insert(0, Beneath { bytes: Rc::from(made.bytes), qcow2: true, data: None });
            beneath = made.content;
        }
        beneath.truncate(size(self.guest) / SECTOR);
        Setting { files, beneath, ..Setting::default() }
    }

    fn l1_entries(&self) -> u64 {
        let cluster = 1_u64 << self.cluster_bits;
        let words = cluster / 8;
        let entries = if self.extended { words / 2 } else { words };
        let per_block = 1_u64 << (self.cluster_bits + 3 - self.refcount_order);
        let need = self.guest.div_ceil(cluster * entries);
        // Header, table, its blocks; a table and a cluster for each that is allocated.
        let filled = (self.guest / cluster).checked_div(self.every).map_or(0, |used| need + used);
        match self.near {
            Some(Limit::Table(left)) => (words * per_block - 2 - words - filled - left) * entries,
            Some(Limit::Block(left)) => (per_block - 3 - filled - left) * entries,
            None => need,
        }
    }

    /// A bitmap of one cluster (specification: "Bitmaps"): its directory, its table, itself.
    fn put_bitmap(&self, file: &mut Writer, pool: &mut Pool) -> [u64; 3] {
        let [directory, table, data] = [(); 3].map(|()| file.take(1));
        file.put_word(directory, table);
        file.put(directory + 8, &1_u32.to_be_bytes()); // bitmap_table_size
        file.put(directory + 12, &2_u32.to_be_bytes()); // flags: auto
        file.put(directory + 16, &[1, 9]); // type, granularity_bits
        file.put(directory + 18, &2_u16.to_be_bytes()); // name_size
        file.put(directory + 24, b"b0");
        file.put_word(table, data);
        for place in 0..(1_u64 << self.cluster_bits) / 512 {
            file.put(data + place * 512, &garbage(place, pool));
        }
        [directory, table, data]
    }

    fn header(
        &self,
        file: &mut Writer,
        (table, l1, l1_entries): (u64, u64, u64),
        bitmaps: Option<u64>,
    ) {
        let l1_entries = u32::try_from(l1_entries).expect("a small L1 table");
        file.put(0, b"QFI\xfb");
        file.put(4, &self.version.to_be_bytes());
        file.put(20, &self.cluster_bits.to_be_bytes());
        file.put_word(24, self.guest);
        file.put(36, &l1_entries.to_be_bytes());
        file.put_word(40, l1);
        file.put_word(48, table);
        file.put(56, &1_u32.to_be_bytes());
        let mut end = 72;
        if self.version == 3 {
            let bit = |set: bool, bit: u64| u64::from(set) << bit;
            file.put_word(72, bit(self.data_file.is_some(), 2) | bit(self.extended, 4));
            let raw = bit(self.data_file == Some(DataFile::Raw), 1);
            file.put_word(88, raw | bit(self.bitmap, 0));
            file.put(96, &self.refcount_order.to_be_bytes());
            file.put(100, &104_u32.to_be_bytes());
            end = 104;
        }
        let mut extension = |file: &mut Writer, kind: u32, data: &[u8]| {
            file.put(end, &kind.to_be_bytes());
            let len = u32::try_from(data.len()).expect("a short name");
            file.put(end + 4, &len.to_be_bytes());
            file.put(end + 8, data);
            end += 8 + u64::from(len.next_multiple_of(8));
            end
        };
        if self.data_file.is_some() {
            extension(file, 0x4441_5441, DATA_NAME.as_bytes());
        }
        if let Some(directory) = bitmaps {
            let words = [1 << 32, 32, directory].map(u64::to_be_bytes);
            extension(file, 0x2385_2875, words.as_flattened());
        }
        let (name, kind) = match self.chain {
            Some(_) => (MIDDLE_NAME, &b"qcow2"[..]),
            None if self.backing != 0 => (BACKING_NAME, &b"raw"[..]),
            None => return,
        };
        let name_at = extension(file, 0xe279_2aca, kind) + 8;
        file.put(name_at, name.as_bytes());
        file.put_word(8, name_at);
        file.put(16, &u32::try_from(name.len()).expect("a short name").to_be_bytes());
    }
}

/// What the header of a file says.
fn format_of(bytes: &[u8]) -> Format {
    let mut words = [0; WORDS];
    for (word, chunk) in words.iter_mut().zip(bytes.chunks(8)) {
        *word = u64::from_be_bytes(chunk.try_into().expect("8 bytes"));
    }
    Format::of(&words).expect("a header")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Checker;
    use crate::testing::guest::{Demand, Guest};
    use crate::testing::judge::{Judge, State};
    use crate::testing::{Disk, qemu, workload};

    #[test]
    fn every_image_is_right_for_all_three_judges() {
        for workload in workload::all() {
            let (pool, name) = (Pool::shared(), workload.name);
            let made = workload.image.make(&mut pool.borrow_mut());
            let checked = Checker::new().check_bytes(&made.bytes).expect(name);
            assert_eq!((checked.corruptions, checked.leaks), (0, 0), "{name}: {:?}", checked.first);
            let disk = Disk::sharing(&made.bytes, &pool);
            let data = made.data.map(|bytes| Disk::sharing(&bytes, &pool));
            let data = data.as_ref().map_or(&[][..], Disk::sectors);
            let mut demand = Demand::default();
            Guest::new(&made.content).demand(0, &pool.borrow(), &mut demand);
            let (sectors, len) = (disk.sectors(), disk.len());
            let state = State { pool: &pool.borrow(), sectors, len, data, setting: &made.setting };
            for result in [
                Judge::default().judge(state, &demand).map(|_| ()),
                qemu::judge(state, &demand, &pool),
            ] {
                result.unwrap_or_else(|what| panic!("{name}: {what}"));
            }
        }
    }
}
