//! The image header: parsing, bounds, and the features that are refused by name.
//!
//! Parse, don't validate: a [`Header`] that exists belongs to an image that may be served. What is
//! not served (yet) ends here with an error that names the feature and the header field.

use alloc::vec::Vec;

use byteorder::{BigEndian, ByteOrder};

use crate::error::{FeatureName, OpenError, OpenErrorInner};
use crate::geometry::Geometry;

/// "QFI\xfb".
const MAGIC: u32 = 0x5146_49fb;
/// Length of a version 2 header, in bytes.
const V2_LENGTH: usize = 72;
/// Least length of a version 3 header, in bytes.
const V3_LENGTH: usize = 104;
/// Byte offset of refcount_table_offset; refcount_table_clusters follows it.
pub(crate) const REFCOUNT_TABLE_FIELD: usize = 48;
/// The L1 table is at most so long (as in QEMU), in bytes.
const MAX_L1_BYTES: u64 = 32 << 20;
/// The refcount table is at most so long (as in QEMU), in bytes.
pub(crate) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

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

/// The header of an image that may be served.
#[derive(Clone, Debug)]
pub struct Header {
    version: u32,
    geometry: Geometry,
    virtual_size: u64,
    l1: Extent,
    refcount_table: Extent,
    backing: Option<Backing>,
    /// The first page of the file, to rewrite single fields of it.
    page: Vec<u8>,
}

/// A name for a feature bit, the field, and what the user can do.
struct Refusal {
    bit: u32,
    name: &'static str,
    next: &'static str,
}

/// Incompatible features that are known, and why they are refused.
const INCOMPATIBLE: [Refusal; 5] = [
    Refusal {
        bit: 0,
        name: "an image marked dirty",
        next: "repair its refcounts with 'qemu-img check -r all' first",
    },
    Refusal {
        bit: 1,
        name: "an image marked corrupt",
        next: "look at it with 'qemu-img check' and repair or restore it first",
    },
    Refusal {
        bit: 2,
        name: "an external data file",
        next: "merge it with 'qemu-img convert -O qcow2'",
    },
    Refusal {
        bit: 3,
        name: "a compression type other than zlib",
        next: "rewrite it with 'qemu-img convert -O qcow2'",
    },
    Refusal {
        bit: 4,
        name: "extended L2 entries (subclusters)",
        next: "rewrite it with 'qemu-img convert -O qcow2 -o extended_l2=off'",
    },
];

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
        let _ = read_only; // Nothing is served read-only that is not served otherwise, so far.
        let (version, cluster_bits) = Self::version_and_cluster_bits(bytes)?;
        let header_length = Self::header_length(bytes, version, cluster_bits)?;
        let backing = BackingName::parse(bytes, header_length, cluster_bits)?;
        let end = backing.as_ref().map_or(1 << cluster_bits, |name| name.start);
        let extensions = extensions(bytes, header_length, end)?;
        refuse_features(bytes, version, &extensions.names)?;
        let backing = backing.map(|found| Backing {
            name: found.name.to_vec(),
            format: extensions.backing_format.map(<[u8]>::to_vec),
        });
        let geometry = Geometry::new(cluster_bits, 4);
        let virtual_size = BigEndian::read_u64(&bytes[24..]) & !511;
        if virtual_size == 0 || virtual_size > i64::MAX as u64 {
            return Err(bounds("size", BigEndian::read_u64(&bytes[24..]), "512 to 2^63-1 bytes"));
        }
        let page = bytes[..geometry.page_size().min(bytes.len())].to_vec();
        let l1 = Self::l1(bytes, geometry, virtual_size, file_len)?;
        let refcount_table = Self::refcount_table(bytes, geometry, file_len)?;
        Ok(Self { version, geometry, virtual_size, l1, refcount_table, backing, page })
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

/// The entries of the feature name table of an image: 48 bytes each.
struct FeatureNames<'a>(&'a [u8]);

impl FeatureNames<'_> {
    /// The image's own name for bit `bit` of bitmap `kind` (0 incompatible, 2 autoclear).
    fn find(&self, kind: u8, bit: u32) -> FeatureName {
        let mut name = [0; 46];
        let entry = self.0.chunks_exact(48).find(|e| e[0] == kind && u32::from(e[1]) == bit);
        if let Some(entry) = entry {
            name.copy_from_slice(&entry[2..]);
        }
        FeatureName(name)
    }
}

/// The name of the file beneath, within the first cluster.
struct BackingName<'a> {
    start: usize,
    name: &'a [u8],
}

impl<'a> BackingName<'a> {
    fn parse(bytes: &'a [u8], header: usize, bits: u32) -> Result<Option<Self>, OpenError> {
        let offset = BigEndian::read_u64(&bytes[8..]);
        if offset == 0 {
            return Ok(None);
        }
        let len = BigEndian::read_u32(&bytes[16..]);
        if len == 0 || len > 1023 {
            return Err(bounds("backing_file_size", len, "1 to 1023 bytes"));
        }
        let area = &bytes[..bytes.len().min(1 << bits)];
        let start = usize::try_from(offset).ok().filter(|&start| start >= header);
        let name = start.and_then(|start| area.get(start..)?.get(..len as usize));
        let (Some(start), Some(name)) = (start, name) else {
            let expected = "a place in the first cluster, behind the header";
            return Err(bounds("backing_file_offset", offset, expected));
        };
        Ok(Some(Self { start, name }))
    }
}

/// What is of interest in the header extensions.
struct Extensions<'a> {
    names: FeatureNames<'a>,
    backing_format: Option<&'a [u8]>,
}

/// Walks the header extensions (specification: "Header extensions"), which end before `end`.
fn extensions(bytes: &[u8], start: usize, end: usize) -> Result<Extensions<'_>, OpenError> {
    const END: u32 = 0;
    const FEATURE_NAMES: u32 = 0x6803_f857;
    const BITMAPS: u32 = 0x2385_2875;
    const ENCRYPTION: u32 = 0x0537_be77;
    const BACKING_FORMAT: u32 = 0xe279_2aca;
    let mut found = Extensions { names: FeatureNames(&[]), backing_format: None };
    // The area ends with an END extension, at the backing file name, or with the cluster.
    let area = &bytes[..bytes.len().min(end)];
    let mut at = start;
    while let Some(head) = area.get(at..at + 8) {
        let kind = BigEndian::read_u32(head);
        let len = BigEndian::read_u32(&head[4..]) as usize;
        if kind == END {
            break;
        }
        let Some(data) = area.get(at + 8..).and_then(|rest| rest.get(..len)) else {
            let expected = "a length that ends within the first cluster";
            return Err(bounds("extension length", len as u64, expected));
        };
        let refuse = |name, next| {
            let field = "header extension type";
            Err(OpenErrorInner::Feature { name, field, value: kind.into(), next }.into())
        };
        match kind {
            FEATURE_NAMES => found.names = FeatureNames(data),
            BACKING_FORMAT => found.backing_format = Some(data),
            BITMAPS => {
                let next = "remove them with 'qemu-img bitmap --remove'";
                return refuse("an image with persistent bitmaps", next);
            }
            ENCRYPTION => return refuse("encryption (LUKS)", DECRYPT),
            _ => {}
        }
        at += 8 + len.next_multiple_of(8);
    }
    Ok(found)
}

const DECRYPT: &str = "decrypt it with 'qemu-img convert' first";

fn refuse_features(bytes: &[u8], version: u32, names: &FeatureNames) -> Result<(), OpenError> {
    let refuse = |name, field, value: u64, next| {
        Err(OpenErrorInner::Feature { name, field, value, next }.into())
    };
    if version >= 3 {
        refuse_bits(bytes, names)?;
    }
    let crypt = BigEndian::read_u32(&bytes[32..]);
    match crypt {
        0 => {}
        1 => return refuse("encryption (AES)", "crypt_method", 1, DECRYPT),
        2 => return refuse("encryption (LUKS)", "crypt_method", 2, DECRYPT),
        _ => return Err(bounds("crypt_method", crypt, "0, 1 or 2")),
    }
    let snapshots = BigEndian::read_u32(&bytes[60..]);
    if snapshots != 0 {
        let next = "delete them with 'qemu-img snapshot -d'";
        return refuse("an image with internal snapshots", "nb_snapshots", snapshots.into(), next);
    }
    if version < 3 {
        return Ok(());
    }
    let order = BigEndian::read_u32(&bytes[96..]);
    if order > 6 {
        return Err(bounds("refcount_order", order, "at most 6"));
    }
    if order != 4 {
        let next = "rewrite it with 'qemu-img convert -O qcow2 -o refcount_bits=16'";
        return refuse("a refcount width other than 16 bits", "refcount_order", order.into(), next);
    }
    let compression = bytes.get(V3_LENGTH).copied().unwrap_or(0);
    if BigEndian::read_u32(&bytes[100..]) as usize > V3_LENGTH && compression != 0 {
        return Err(bounds("compression_type", compression, "0 without its incompatible bit"));
    }
    Ok(())
}

/// Bits of incompatible_features and autoclear_features, in that order.
fn refuse_bits(bytes: &[u8], names: &FeatureNames) -> Result<(), OpenError> {
    let incompatible = BigEndian::read_u64(&bytes[72..]);
    for known in &INCOMPATIBLE {
        if incompatible & (1 << known.bit) != 0 {
            let Refusal { name, next, .. } = *known;
            let (field, value) = ("incompatible_features", incompatible);
            return Err(OpenErrorInner::Feature { name, field, value, next }.into());
        }
    }
    if incompatible != 0 {
        let (field, bit) = ("incompatible_features", incompatible.trailing_zeros());
        let name = names.find(0, bit);
        return Err(OpenErrorInner::UnknownFeature { field, bit, name }.into());
    }
    let autoclear = BigEndian::read_u64(&bytes[88..]);
    let known = [(0, "an image with persistent bitmaps"), (1, "a raw external data file")];
    for (bit, name) in known {
        if autoclear & (1 << bit) != 0 {
            let (field, value) = ("autoclear_features", autoclear);
            let next = "rewrite it with 'qemu-img convert -O qcow2'";
            return Err(OpenErrorInner::Feature { name, field, value, next }.into());
        }
    }
    if autoclear != 0 {
        let (field, bit) = ("autoclear_features", autoclear.trailing_zeros());
        let name = names.find(2, bit);
        return Err(OpenErrorInner::UnknownFeature { field, bit, name }.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
