//! The header as the checker reads it: raw fields, bounds, and where the tables lie.
//!
//! Written from the specification alone, without a look at the engine's parser, so that a
//! misreading in one of them does not hide in the other.

use byteorder::{BigEndian, ByteOrder};

use super::{CheckError, ReadAt, read};

const MAGIC: u32 = 0x5146_49fb;
const MAX_L1_BYTES: u64 = 32 << 20;
pub(super) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;
const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const AUTOCLEAR_BITMAPS: u64 = 1;
const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;
const KNOWN_AUTOCLEAR: u64 = AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA;

/// A range of the file, in bytes; its end does not overflow.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Area {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// What the header says, in so far as the checker needs it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Head {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    pub(super) virtual_size: u64,
    pub(super) l1: Area,
    pub(super) refcount_table: Area,
    pub(super) snapshots: u32,
    pub(super) snapshots_at: u64,
    pub(super) encrypted: bool,
    pub(super) encryption: Area,
    pub(super) bitmaps: u32,
    pub(super) bitmap_directory: Area,
    pub(super) external_data: bool,
    pub(super) extended: bool,
    pub(super) dirty: bool,
    pub(super) corrupt: bool,
    /// Autoclear features that must be cleared before anything is written.
    pub(super) unknown_autoclear: bool,
    /// No refcount table can be where the header says; [`Head::for_repair`] only.
    pub(super) no_refcount_table: bool,
}

impl Head {
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// log2 of the clusters that one refcount block covers.
    pub(super) fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// The largest refcount that the width of the image can hold, or 2^32-1.
    pub(super) fn largest_refcount(&self) -> u32 {
        match self.refcount_order {
            order @ 0..=4 => (1 << (1 << order)) - 1,
            _ => u32::MAX,
        }
    }

    pub(super) fn parse<R: ReadAt + ?Sized>(image: &R) -> Result<Self, CheckError> {
        let head = Self::for_repair(image)?;
        bound(!head.no_refcount_table, "refcount_table_offset or refcount_table_clusters")?;
        Ok(head)
    }

    /// As [`Head::parse`], but fields of the refcount table that are outside their bounds make an
    /// empty one: it can be made anew.
    pub(super) fn for_repair<R: ReadAt + ?Sized>(image: &R) -> Result<Self, CheckError> {
        let mut raw = [0; 112];
        read(image, 0, &mut raw)?;
        if BigEndian::read_u32(&raw) != MAGIC {
            return Err(CheckError::NotQcow2);
        }
        let version = BigEndian::read_u32(&raw[4..]);
        if version != 2 && version != 3 {
            return Err(CheckError::Version(version));
        }
        let header_length = match version {
            2 => 72,
            _ => BigEndian::read_u32(&raw[100..]),
        };
        let cluster_bits = BigEndian::read_u32(&raw[20..]);
        bound((9..=21).contains(&cluster_bits), "cluster_bits")?;
        bound(version == 2 || header_length >= 104, "header_length")?;
        bound(u64::from(header_length) <= 1 << cluster_bits, "header_length")?;
        bound(u64::from(header_length) <= image.len(), "the header is cut short")?;
        let mut head = Self { version, cluster_bits, refcount_order: 4, ..Self::default() };
        let autoclear = match version {
            2 => 0,
            _ => head.version_3(&raw, header_length)?,
        };
        head.unknown_autoclear = autoclear & !KNOWN_AUTOCLEAR != 0;
        head.tables(&raw)?;
        let crypt = BigEndian::read_u32(&raw[32..]);
        if crypt > 2 {
            return Err(CheckError::Unsupported("an unknown encryption method"));
        }
        head.encrypted = crypt != 0;
        head.extensions(
            image,
            &raw,
            header_length,
            crypt == 2,
            autoclear & AUTOCLEAR_BITMAPS != 0,
        )?;
        Ok(head)
    }

    /// The fields that only version 3 has. Returns the autoclear features.
    fn version_3(&mut self, raw: &[u8; 112], header_length: u32) -> Result<u64, CheckError> {
        let incompatible = BigEndian::read_u64(&raw[72..]);
        let unknown = incompatible & !(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2);
        if unknown != 0 {
            return Err(CheckError::UnknownFeature(unknown.trailing_zeros()));
        }
        self.dirty = incompatible & DIRTY != 0;
        self.corrupt = incompatible & CORRUPT != 0;
        self.external_data = incompatible & DATA_FILE != 0;
        self.extended = incompatible & EXTENDED_L2 != 0;
        bound(!self.extended || self.cluster_bits >= 14, "cluster_bits with extended L2 entries")?;
        self.refcount_order = BigEndian::read_u32(&raw[96..]);
        bound(self.refcount_order <= 6, "refcount_order")?;
        let compression = if header_length > 104 { raw[104] } else { 0 };
        let declared = incompatible & COMPRESSION != 0;
        bound((compression != 0) == declared && compression <= 1, "compression_type")?;
        let autoclear = BigEndian::read_u64(&raw[88..]);
        let raw_data = autoclear & AUTOCLEAR_RAW_DATA != 0;
        bound(!raw_data || self.external_data, "autoclear_features: raw data without a data file")?;
        Ok(autoclear)
    }

    fn tables(&mut self, raw: &[u8; 112]) -> Result<(), CheckError> {
        self.virtual_size = BigEndian::read_u64(&raw[24..]);
        bound(i64::try_from(self.virtual_size).is_ok(), "size")?;
        let l1_entries = u64::from(BigEndian::read_u32(&raw[36..]));
        bound(l1_entries * 8 <= MAX_L1_BYTES, "l1_size")?;
        let entry_bits = if self.extended { 4 } else { 3 };
        let l1_shift = 2 * self.cluster_bits - entry_bits;
        bound(l1_entries >= self.virtual_size.div_ceil(1 << l1_shift), "l1_size")?;
        self.l1 = self.area(BigEndian::read_u64(&raw[40..]), l1_entries * 8, "l1_table_offset")?;
        let clusters = u64::from(BigEndian::read_u32(&raw[56..]));
        let bytes = clusters << self.cluster_bits;
        match self.area(BigEndian::read_u64(&raw[48..]), bytes, "refcount_table_offset") {
            Ok(table) if bytes <= MAX_REFCOUNT_TABLE_BYTES => self.refcount_table = table,
            _ => self.no_refcount_table = true,
        }
        self.snapshots = BigEndian::read_u32(&raw[60..]);
        bound(self.snapshots <= MAX_SNAPSHOTS, "nb_snapshots")?;
        let start = BigEndian::read_u64(&raw[64..]);
        self.snapshots_at = self.area(start, 0, "snapshots_offset")?.start;
        Ok(())
    }

    fn area(&self, start: u64, len: u64, field: &'static str) -> Result<Area, CheckError> {
        let end = start.checked_add(len).and_then(|end| i64::try_from(end).ok());
        bound(self.in_cluster(start) == 0 && end.is_some(), field)?;
        Ok(Area { start, len })
    }

    /// Walks the header extensions (specification: "Header extensions"): from the end of the
    /// header to the backing file name, or to the end of the first cluster.
    fn extensions<R: ReadAt + ?Sized>(
        &mut self,
        image: &R,
        raw: &[u8; 112],
        header_length: u32,
        luks: bool,
        with_bitmaps: bool,
    ) -> Result<(), CheckError> {
        let backing = BigEndian::read_u64(&raw[8..]);
        bound(backing <= self.cluster_size(), "backing_file_offset")?;
        let end = if backing == 0 { self.cluster_size() } else { backing };
        let mut at = u64::from(header_length);
        let mut word = [0; 8];
        while at < end {
            read(image, at, &mut word)?;
            let kind = BigEndian::read_u32(&word);
            let len = u64::from(BigEndian::read_u32(&word[4..]));
            at += 8;
            bound(len <= end.saturating_sub(at), "header extension length")?;
            if kind == 0 {
                break;
            }
            match kind {
                0x2385_2875 if with_bitmaps => self.bitmaps(image, at, len)?,
                0x0537_be77 => {
                    bound(luks && len == 16, "encryption header extension")?;
                    let mut data = [0; 16];
                    read(image, at, &mut data)?;
                    let (start, len) = data.split_at(8);
                    let (start, len) = (BigEndian::read_u64(start), BigEndian::read_u64(len));
                    self.encryption = self.area(start, len, "encryption header offset")?;
                }
                _ => {}
            }
            at += len.next_multiple_of(8);
        }
        bound(!luks || self.encryption.len != 0, "encryption header extension")
    }

    /// Specification: "Bitmaps extension".
    fn bitmaps<R: ReadAt + ?Sized>(
        &mut self,
        image: &R,
        at: u64,
        len: u64,
    ) -> Result<(), CheckError> {
        bound(len == 24, "bitmaps extension length")?;
        let mut data = [0; 24];
        read(image, at, &mut data)?;
        self.bitmaps = BigEndian::read_u32(&data);
        bound((1..=MAX_BITMAPS).contains(&self.bitmaps), "nb_bitmaps")?;
        bound(BigEndian::read_u32(&data[4..]) == 0, "reserved field of the bitmaps extension")?;
        let len = BigEndian::read_u64(&data[8..]);
        bound(len != 0 && len <= MAX_DIRECTORY_BYTES, "bitmap_directory_size")?;
        let start = BigEndian::read_u64(&data[16..]);
        self.bitmap_directory = self.area(start, len, "bitmap_directory_offset")?;
        Ok(())
    }
}

fn bound(holds: bool, field: &'static str) -> Result<(), CheckError> {
    if holds { Ok(()) } else { Err(CheckError::Header(field)) }
}
