//! The image header: parsing, bounds, and the features that are refused by name.
//!
//! Parse, don't validate: a [`Header`] that exists belongs to an image that may be served. What is
//! not served ends here with an error that names the feature and the header field.

mod extensions;
mod features;

use alloc::vec::Vec;

use byteorder::{BigEndian, ByteOrder};

use crate::error::{OpenError, OpenErrorInner};
use crate::geometry::Geometry;
use crate::op::Compression;

use extensions::{BackingName, extensions};
use features::{CORRUPT, Features};

/// "QFI\xfb".
const MAGIC: u32 = 0x5146_49fb;
/// Length of a version 2 header, in bytes.
const V2_LENGTH: usize = 72;
/// Least length of a version 3 header, in bytes.
const V3_LENGTH: usize = 104;
/// Byte offset of refcount_table_offset; refcount_table_clusters follows it.
pub(crate) const REFCOUNT_TABLE_FIELD: usize = 48;
/// Byte offset of incompatible_features, of version 3.
const INCOMPATIBLE_FIELD: usize = 72;
/// The one compatible feature that is known.
const LAZY_REFCOUNTS: u64 = 1;
/// The L1 table is at most so long (as in QEMU), in bytes.
const MAX_L1_BYTES: u64 = 32 << 20;
/// The refcount table is at most so long (as in QEMU), in bytes.
pub(crate) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// So many snapshots at the most (as in QEMU).
const MAX_SNAPSHOTS: u32 = 65536;

/// A piece of the file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl Extent {
    /// The byte after the last.
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// What the header says of the file beneath. The name is bytes and means nothing by itself: who
/// opens it decides which files may be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its name, as it stands in the header.
    pub name: Vec<u8>,
    /// Its format (header extension "backing file format name"), if that is declared.
    pub format: Option<Vec<u8>>,
}

/// The external data file of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Its name (header extension "external data file name"), if there is one. It means as little
    /// as that of a backing file.
    pub name: Option<Vec<u8>>,
    /// The data file must read like the virtual disk, for those who open it alone.
    pub raw: bool,
}

/// A table in the file of which only place and number of entries are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directory {
    /// First byte.
    pub offset: u64,
    /// Entries, of different lengths.
    pub entries: u32,
}

/// The header extension "bitmaps extension".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmaps {
    /// How many bitmaps there are.
    pub count: u32,
    /// Where their directory lies.
    pub directory: Extent,
}

impl Bitmaps {
    fn parse(data: &[u8]) -> Result<Self, OpenError> {
        if data.len() < 24 {
            return Err(bounds("bitmaps extension length", data.len() as u64, "24 bytes"));
        }
        let count = BigEndian::read_u32(data);
        let len = BigEndian::read_u64(&data[8..]);
        // Each entry has at least 24 bytes, and QEMU takes 65535 bitmaps in at most 64 MiB.
        if count == 0 || count > 0xffff || len < u64::from(count) * 24 || len > 64 << 20 {
            return Err(bounds("bitmap_directory_size", len, "24 bytes per bitmap to 64 MiB"));
        }
        Ok(Self { count, directory: Extent { offset: BigEndian::read_u64(&data[16..]), len } })
    }
}

/// The header of an image that may be served.
#[derive(Clone, Debug)]
pub struct Header {
    version: u32,
    geometry: Geometry,
    features: Features,
    virtual_size: u64,
    l1: Extent,
    refcount_table: Extent,
    backing: Option<Backing>,
    data_file: Option<DataFile>,
    bitmaps: Option<Bitmaps>,
    snapshots: Option<Directory>,
    /// It has extensions or features of others, who may have clusters in the file.
    foreign: bool,
    /// The first page of the file, to rewrite single fields of it.
    page: Vec<u8>,
    /// `page` is to be written before anything else is.
    pub(crate) rewrite: bool,
}

const DECRYPT: &str = "decrypt it with 'qemu-img convert' first";

impl Header {
    /// How many bytes from the start of the file [`Header::parse`] wants, judged by `first`, the
    /// first 512 bytes (or the whole file, if that is shorter): one cluster, at most 2 MiB. The
    /// file may be shorter; then all of it will do.
    ///
    /// # Errors
    /// Where not even a cluster size can be read.
    pub fn needed(first: &[u8]) -> Result<usize, OpenError> {
        let (_, cluster_bits) = Self::version_and_cluster_bits(first)?;
        Ok(1 << cluster_bits)
    }

    fn version_and_cluster_bits(bytes: &[u8]) -> Result<(u32, u32), OpenError> {
        if bytes.len() < 4 || BigEndian::read_u32(bytes) != MAGIC {
            return Err(OpenErrorInner::Magic.into());
        }
        let length = if bytes.len() >= 8 && BigEndian::read_u32(&bytes[4..]) != 2 {
            V3_LENGTH
        } else {
            V2_LENGTH
        };
        if bytes.len() >= 8 {
            let version = BigEndian::read_u32(&bytes[4..]);
            if version != 2 && version != 3 {
                return Err(OpenErrorInner::Version(version).into());
            }
        }
        if bytes.len() < length {
            let (need, have) = (length as u64, bytes.len() as u64);
            return Err(OpenErrorInner::Truncated { what: "the header", need, have }.into());
        }
        let cluster_bits = BigEndian::read_u32(&bytes[20..]);
        if !(9..=21).contains(&cluster_bits) {
            return Err(bounds("cluster_bits", cluster_bits, "9 to 21"));
        }
        Ok((BigEndian::read_u32(&bytes[4..]), cluster_bits))
    }

    /// Parses and checks the first cluster of a file of `file_len` bytes.
    ///
    /// # Errors
    /// Not a qcow2 image; a field outside its bounds; a table outside the file; a feature that is
    /// not served. (Specification: "Header", "Header extensions".)
    pub fn parse(bytes: &[u8], file_len: u64, read_only: bool) -> Result<Self, OpenError> {
        let header = Self::parse_for_reading(bytes, file_len)?;
        if read_only { Ok(header) } else { header.for_writing() }
    }

    /// The header of an image that is going to be written to, from one that was parsed for reading.
    ///
    /// # Errors
    /// The image is marked dirty or corrupt, or it has snapshots beside an external data file: of
    /// a guest cluster there is one place, so that they cannot keep what the disk had.
    pub fn for_writing(mut self) -> Result<Self, OpenError> {
        self.features.may_write()?;
        if let (Some(snapshots), Some(_)) = (self.snapshots, &self.data_file) {
            let (name, field) = ("snapshots beside an external data file", "nb_snapshots");
            let (value, next) = (snapshots.entries.into(), "serve it with --read-only");
            return Err(OpenErrorInner::Feature { name, field, value, next }.into());
        }
        if self.features.unknown_autoclear != 0 {
            let left = BigEndian::read_u64(&self.page[88..]) & !self.features.unknown_autoclear;
            BigEndian::write_u64(&mut self.page[88..], left);
            self.rewrite = true;
        }
        Ok(self)
    }

    fn parse_for_reading(bytes: &[u8], file_len: u64) -> Result<Self, OpenError> {
        let (version, cluster_bits) = Self::version_and_cluster_bits(bytes)?;
        let header_length = Self::header_length(bytes, version, cluster_bits)?;
        let backing = BackingName::parse(bytes, header_length, cluster_bits)?;
        let end = backing.as_ref().map_or(1 << cluster_bits, |name| name.start);
        let extensions = extensions(bytes, header_length, end)?;
        let features = Features::parse(bytes, version, &extensions.names)?;
        let backing = backing.map(|found| Backing {
            name: found.name.to_vec(),
            format: extensions.backing_format.map(<[u8]>::to_vec),
        });
        let data_file = features.data_file.then(|| DataFile {
            name: extensions.data_file.map(<[u8]>::to_vec),
            raw: features.data_file_raw,
        });
        let geometry = Self::geometry_of(cluster_bits, &features)?;
        let virtual_size = BigEndian::read_u64(&bytes[24..]) & !511;
        if virtual_size == 0 || virtual_size > i64::MAX as u64 {
            return Err(bounds("size", BigEndian::read_u64(&bytes[24..]), "512 to 2^63-1 bytes"));
        }
        Ok(Self {
            version,
            geometry,
            features,
            virtual_size,
            l1: Self::l1(bytes, geometry, virtual_size, file_len)?,
            refcount_table: Self::refcount_table(bytes, geometry, file_len)?,
            backing,
            data_file,
            // Without its autoclear bit the extension is out of date, and means nothing.
            bitmaps: match extensions.bitmaps.filter(|_| features.bitmaps) {
                Some(data) => Some(Bitmaps::parse(data)?),
                None => None,
            },
            snapshots: Self::snapshot_table(bytes, geometry, file_len)?,
            foreign: extensions.unknown
                || features.unknown_autoclear != 0
                || version > 2 && BigEndian::read_u64(&bytes[80..]) & !LAZY_REFCOUNTS != 0,
            page: bytes[..geometry.page_size().min(bytes.len())].to_vec(),
            rewrite: false,
        })
    }

    fn geometry_of(cluster_bits: u32, features: &Features) -> Result<Geometry, OpenError> {
        let geometry = Geometry::new(cluster_bits, features.refcount_order);
        if !features.extended_l2 {
            return Ok(geometry);
        }
        if cluster_bits < 14 {
            return Err(bounds("cluster_bits", cluster_bits, "14 to 21 with extended L2 entries"));
        }
        Ok(geometry.with_extended_l2())
    }

    /// Where the snapshots are described, if there are any.
    fn snapshot_table(
        bytes: &[u8],
        geometry: Geometry,
        file_len: u64,
    ) -> Result<Option<Directory>, OpenError> {
        let entries = BigEndian::read_u32(&bytes[60..]);
        let offset = BigEndian::read_u64(&bytes[64..]);
        if entries == 0 {
            return Ok(None);
        }
        if entries > MAX_SNAPSHOTS {
            return Err(bounds("nb_snapshots", entries, "at most 65536"));
        }
        let field = "header field snapshots_offset";
        table("snapshot table", field, offset, u64::from(entries) * 40, geometry, file_len)?;
        Ok(Some(Directory { offset, entries }))
    }

    fn header_length(bytes: &[u8], version: u32, cluster_bits: u32) -> Result<usize, OpenError> {
        if version == 2 {
            return Ok(V2_LENGTH);
        }
        let length = BigEndian::read_u32(&bytes[100..]);
        let fits = u64::from(length) <= 1 << cluster_bits;
        if (length as usize) < V3_LENGTH || length % 8 != 0 || !fits {
            let expected = "a multiple of 8, from 104 to the cluster size";
            return Err(bounds("header_length", length, expected));
        }
        if bytes.len() < length as usize {
            let (need, have) = (length.into(), bytes.len() as u64);
            return Err(OpenErrorInner::Truncated { what: "the header", need, have }.into());
        }
        Ok(length as usize)
    }

    fn l1(bytes: &[u8], geometry: Geometry, size: u64, file_len: u64) -> Result<Extent, OpenError> {
        let entries = u64::from(BigEndian::read_u32(&bytes[36..]));
        let need = geometry.l1_entries_for(size);
        if entries < need {
            return Err(OpenErrorInner::L1TooSmall { entries, need }.into());
        }
        let len = entries * Geometry::ENTRY_BYTES;
        if len > MAX_L1_BYTES {
            return Err(bounds("l1_size", entries, "at most 4194304 entries (32 MiB)"));
        }
        let offset = BigEndian::read_u64(&bytes[40..]);
        table("L1 table", "header field l1_table_offset", offset, len, geometry, file_len)
    }

    fn refcount_table(bytes: &[u8], geometry: Geometry, len: u64) -> Result<Extent, OpenError> {
        let clusters = u64::from(BigEndian::read_u32(&bytes[REFCOUNT_TABLE_FIELD + 8..]));
        let most = MAX_REFCOUNT_TABLE_BYTES >> geometry.cluster_bits();
        if clusters == 0 || clusters > most {
            return Err(bounds("refcount_table_clusters", clusters, "1 cluster to 8 MiB"));
        }
        let offset = BigEndian::read_u64(&bytes[REFCOUNT_TABLE_FIELD..]);
        let bytes = clusters << geometry.cluster_bits();
        let field = "header field refcount_table_offset";
        table("refcount table", field, offset, bytes, geometry, len)
    }

    /// The constants of the image.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// 2 or 3.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Size of the virtual disk in bytes, a multiple of 512.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// The file beneath, if the image has one.
    #[must_use]
    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// The external data file, if guest data lies in one.
    #[must_use]
    pub fn data_file(&self) -> Option<&DataFile> {
        self.data_file.as_ref()
    }

    /// How compressed clusters are compressed.
    #[must_use]
    pub fn compression(&self) -> Compression {
        self.features.compression
    }

    /// Bitmaps that are up to date. Whoever is going to write marks them as in use first.
    #[must_use]
    pub fn bitmaps(&self) -> Option<Bitmaps> {
        self.bitmaps
    }

    /// The table of internal snapshots, if there are any.
    #[must_use]
    pub fn snapshots(&self) -> Option<Directory> {
        self.snapshots
    }

    /// Refcounts may be wrong (incompatible feature "dirty"): they are to be rebuilt before
    /// anything is written.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.features.dirty
    }

    /// Somebody has found the image to contradict itself (incompatible feature "corrupt").
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        self.features.corrupt
    }

    /// Does it have extensions, or compatible or autoclear features, that are not known? What they
    /// keep in the file looks as if it had leaked.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        self.foreign
    }

    /// Where the active L1 table lies.
    #[must_use]
    pub fn l1_extent(&self) -> Extent {
        self.l1
    }

    /// Where the refcount table lies.
    #[must_use]
    pub fn refcount_table_extent(&self) -> Extent {
        self.refcount_table
    }

    /// The first `len` bytes of the file, with unknown autoclear bits cleared.
    pub(crate) fn first_bytes(&self, len: usize) -> &[u8] {
        &self.page[..len]
    }

    /// The first `len` bytes of the file with the mark of an image that contradicts itself, for
    /// which only version 3 has a place.
    pub(crate) fn marked_corrupt(&mut self, len: usize) -> &[u8] {
        debug_assert!(self.version >= 3);
        let field = &mut self.page[INCOMPATIBLE_FIELD..INCOMPATIBLE_FIELD + 8];
        let bits = BigEndian::read_u64(field) | CORRUPT;
        BigEndian::write_u64(field, bits);
        &self.page[..len]
    }

    /// The same header for one of the image's snapshots.
    pub(crate) fn at_snapshot(self, l1: Extent, virtual_size: u64) -> Self {
        Self { l1, virtual_size, ..self }
    }

    /// The first `len` bytes of the file with the refcount table at another place. Only bytes 48
    /// to 59 differ from what is on disk, so a torn write of the page changes one sector or none.
    pub(crate) fn with_refcount_table(&mut self, at: Extent, len: usize) -> &[u8] {
        let clusters = at.len >> self.geometry.cluster_bits();
        let clusters = u32::try_from(clusters).expect("the table has at most 8 MiB");
        let field = &mut self.page[REFCOUNT_TABLE_FIELD..REFCOUNT_TABLE_FIELD + 12];
        BigEndian::write_u64(field, at.offset);
        BigEndian::write_u32(&mut field[8..], clusters);
        self.refcount_table = at;
        &self.page[..len]
    }
}

fn bounds(field: &'static str, value: impl Into<u64>, expected: &'static str) -> OpenError {
    OpenErrorInner::Bounds { field, value: value.into(), expected }.into()
}

fn table(
    what: &'static str,
    field: &'static str,
    offset: u64,
    len: u64,
    geometry: Geometry,
    file_len: u64,
) -> Result<Extent, OpenError> {
    if offset & (geometry.cluster_size() - 1) != 0 {
        return Err(OpenErrorInner::Unaligned { what: field, offset }.into());
    }
    let extent = Extent { offset, len };
    if offset == 0 || extent.end() > file_len {
        let end = extent.end();
        return Err(OpenErrorInner::Outside { what, offset, end, file_len }.into());
    }
    Ok(extent)
}

#[cfg(test)]
mod tests;
