//! What an image says of itself: the header, its extensions, and the directories of snapshots and
//! bitmaps; for any image, also one that is not served.
//!
//! Nothing is opened or followed but these, and nothing is believed: work and memory are bounded
//! by the first cluster (2 MiB at most) and by 64 MiB for each directory, which has to lie inside
//! the file. It shares nothing with the engine's parser, which knows only what is served.
//! Names are bytes: whoever shows them has to see to it that they do a terminal no harm.

use alloc::vec::Vec;

use byteorder::{BigEndian, ByteOrder};

use crate::check::ReadAt;

mod directories;
mod error;

pub use error::InfoError;

const MAGIC: u32 = 0x5146_49fb;
const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;

const INCOMPATIBLE: [&str; 5] =
    ["dirty", "corrupt", "external data file", "compression type", "extended L2 entries"];
const COMPATIBLE: [&str; 1] = ["lazy refcounts"];
const AUTOCLEAR: [&str; 2] = ["bitmaps", "raw external data"];

/// What an image says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// 2 or 3.
    pub version: u32,
    /// Bytes of the virtual disk.
    pub virtual_size: u64,
    /// log2 of the bytes of a cluster.
    pub cluster_bits: u32,
    /// log2 of the bits of a refcount.
    pub refcount_order: u32,
    /// `crypt_method`: 0 for none, 1 for AES, 2 for LUKS; another is not known.
    pub encryption: u32,
    /// `compression_type`: 0 for zlib, 1 for zstd; another is not known.
    pub compression: u8,
    /// Features that one has to know to open the image.
    pub incompatible: Vec<Feature>,
    /// Features that need not be known.
    pub compatible: Vec<Feature>,
    /// Features that whoever does not know them has to clear before writing.
    pub autoclear: Vec<Feature>,
    /// The name of the backing file.
    pub backing: Option<Vec<u8>>,
    /// Its format, where that is declared.
    pub backing_format: Option<Vec<u8>>,
    /// The name of the external data file, where there is one and the image names it.
    pub data_file: Option<Vec<u8>>,
    /// The internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// The persistent bitmaps, if they are consistent.
    pub bitmaps: Vec<Bitmap>,
    /// There are bitmaps, but somebody wrote to the image without keeping them.
    pub stale_bitmaps: bool,
}

impl Info {
    /// Whether an incompatible feature is there.
    fn has(&self, bit: u32) -> bool {
        self.incompatible.iter().any(|feature| feature.bit == bit)
    }

    /// Refcounts may be wrong.
    #[must_use]
    pub fn dirty(&self) -> bool {
        self.has(0)
    }

    /// Anything may be wrong.
    #[must_use]
    pub fn corrupt(&self) -> bool {
        self.has(1)
    }

    /// Guest data lies in another file.
    #[must_use]
    pub fn external_data(&self) -> bool {
        self.has(2)
    }

    /// L2 entries have subclusters.
    #[must_use]
    pub fn extended_l2(&self) -> bool {
        self.has(4)
    }

    /// Whoever writes may put off the refcounts.
    #[must_use]
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible.iter().any(|feature| feature.bit == 0)
    }

    /// The external data file is a raw image of the disk.
    #[must_use]
    pub fn raw_data(&self) -> bool {
        self.autoclear.iter().any(|feature| feature.bit == 1)
    }
}

/// One bit of a feature bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Which bit.
    pub bit: u32,
    /// Whether it is one that is known here.
    pub known: bool,
    /// Our name for it, else the image's; empty where neither has one.
    pub name: Vec<u8>,
}

/// An internal snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Its ID.
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
    /// When it was taken, in seconds since 1970.
    pub seconds: u32,
    /// The nanoseconds on top.
    pub nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of the state of the machine.
    pub vm_state: u64,
    /// Bytes of the virtual disk, then.
    pub disk_size: Option<u64>,
    /// The instructions that the guest had run, if they were counted.
    pub instructions: Option<u64>,
}

/// A persistent bitmap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: Vec<u8>,
    /// log2 of the bytes of the disk for each bit.
    pub granularity_bits: u8,
    /// It was in use when its writer died, so it may be stale.
    pub in_use: bool,
    /// It follows every write.
    pub auto: bool,
}

/// Reads what an image says of itself.
///
/// # Errors
/// Where it is no qcow2 image of version 2 or 3, or what it says cannot be; see [`InfoError`].
pub fn info<R: ReadAt + ?Sized>(image: &R) -> Result<Info, InfoError> {
    let bytes = first_cluster(image)?;
    let mut info = Info {
        version: BigEndian::read_u32(&bytes[4..]),
        // Whole sectors, as QEMU has it.
        virtual_size: BigEndian::read_u64(&bytes[24..]) & !511,
        cluster_bits: BigEndian::read_u32(&bytes[20..]),
        refcount_order: 4,
        encryption: BigEndian::read_u32(&bytes[32..]),
        ..Info::default()
    };
    let mut end = bytes.len();
    if let Some((start, name)) = backing(&bytes)? {
        info.backing = Some(name.to_vec());
        end = start;
    }
    let header_length = match info.version {
        2 => V2_LENGTH,
        _ => version_3(&bytes, &mut info)?,
    };
    let extensions = Extensions::parse(&bytes[..end], header_length)?;
    if info.version >= 3 {
        info.incompatible = features(&bytes[72..], 0, &INCOMPATIBLE, extensions.names);
        info.compatible = features(&bytes[80..], 1, &COMPATIBLE, extensions.names);
        info.autoclear = features(&bytes[88..], 2, &AUTOCLEAR, extensions.names);
    }
    info.backing_format = extensions.backing_format.map(<[u8]>::to_vec);
    info.data_file = extensions.data_file.map(<[u8]>::to_vec);
    info.snapshots = directories::snapshots(image, &bytes)?;
    if let Some(bitmaps) = extensions.bitmaps {
        if info.autoclear.iter().any(|feature| feature.bit == 0) {
            info.bitmaps = directories::bitmaps(image, bitmaps)?;
        } else {
            info.stale_bitmaps = true;
        }
    }
    Ok(info)
}

/// The first cluster, or what there is of it: at least a whole header.
fn first_cluster<R: ReadAt + ?Sized>(image: &R) -> Result<Vec<u8>, InfoError> {
    let mut head = [0; V3_LENGTH];
    let there = usize::try_from(image.len()).unwrap_or(usize::MAX);
    image.read_at(0, &mut head).map_err(|_| InfoError::Unreadable(0))?;
    if BigEndian::read_u32(&head) != MAGIC {
        return Err(InfoError::NotQcow2);
    }
    let version = BigEndian::read_u32(&head[4..]);
    let length = match version {
        2 => V2_LENGTH,
        3 => V3_LENGTH,
        _ if there >= 8 => return Err(InfoError::Version(version)),
        _ => 8,
    };
    if there < length {
        return Err(InfoError::Truncated { need: length as u64, have: image.len() });
    }
    let cluster_bits = BigEndian::read_u32(&head[20..]);
    bound("cluster_bits", cluster_bits, "9 to 21", (9..=21).contains(&cluster_bits))?;
    let mut bytes = Vec::new();
    let len = there.min(1 << cluster_bits);
    bytes.try_reserve(len).map_err(|_| InfoError::Memory)?;
    bytes.resize(len, 0);
    image.read_at(0, &mut bytes).map_err(|_| InfoError::Unreadable(0))?;
    Ok(bytes)
}

/// Where the name of the backing file begins, and the name.
fn backing(bytes: &[u8]) -> Result<Option<(usize, &[u8])>, InfoError> {
    let offset = BigEndian::read_u64(&bytes[8..]);
    if offset == 0 {
        return Ok(None);
    }
    let len = BigEndian::read_u32(&bytes[16..]);
    bound("backing_file_size", len, "1 to 1023", (1..=1023).contains(&len))?;
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let name = bytes.get(start..).and_then(|rest| rest.get(..len as usize));
    let expected = "a place in the first cluster, behind the header";
    match name {
        Some(name) if start >= V2_LENGTH => Ok(Some((start, name))),
        _ => Err(InfoError::Field { field: "backing_file_offset", value: offset, expected }),
    }
}

/// The fields that only version 3 has. Returns the length of the header.
fn version_3(bytes: &[u8], info: &mut Info) -> Result<usize, InfoError> {
    info.refcount_order = BigEndian::read_u32(&bytes[96..]);
    bound("refcount_order", info.refcount_order, "at most 6", info.refcount_order <= 6)?;
    let length = BigEndian::read_u32(&bytes[100..]);
    let good = length as usize >= V3_LENGTH && length % 8 == 0 && length as usize <= bytes.len();
    bound("header_length", length, "a multiple of 8, from 104 to the first cluster's end", good)?;
    if length as usize > V3_LENGTH {
        info.compression = bytes[V3_LENGTH];
    }
    Ok(length as usize)
}

/// What the header extensions say (specification: "Header extensions").
#[derive(Default)]
struct Extensions<'a> {
    names: &'a [u8],
    backing_format: Option<&'a [u8]>,
    data_file: Option<&'a [u8]>,
    bitmaps: Option<&'a [u8]>,
}

impl<'a> Extensions<'a> {
    /// Walks them from behind the header to the end of `area`.
    fn parse(area: &'a [u8], start: usize) -> Result<Self, InfoError> {
        let mut found = Self::default();
        let mut at = start;
        while let Some(head) = area.get(at..).and_then(|rest| rest.get(..8)) {
            let kind = BigEndian::read_u32(head);
            let len = BigEndian::read_u32(&head[4..]);
            if kind == 0 {
                break;
            }
            let data = area[at + 8..].get(..len as usize);
            let expected = "a length that ends within the first cluster";
            let field = "header extension length";
            let Some(data) = data else {
                return Err(InfoError::Field { field, value: len.into(), expected });
            };
            match kind {
                0xe279_2aca => found.backing_format = Some(data),
                0x6803_f857 => found.names = data,
                0x2385_2875 => found.bitmaps = Some(data),
                0x4441_5441 => found.data_file = Some(data),
                _ => {}
            }
            at += 8 + data.len().next_multiple_of(8);
        }
        Ok(found)
    }
}

/// The bits that are set in a feature bitmap, with their names.
fn features(word: &[u8], kind: u8, known: &[&str], names: &[u8]) -> Vec<Feature> {
    let word = BigEndian::read_u64(word);
    let bits = (0..64_u8).filter(|bit| word & (1 << bit) != 0);
    bits.map(|bit| {
        let ours = known.get(usize::from(bit));
        let theirs = || {
            let mut entries = names.chunks_exact(48);
            let entry = entries.find(|entry| entry[..2] == [kind, bit]);
            entry.map_or(&[][..], |entry| {
                let end = entry[2..].iter().position(|&byte| byte == 0).unwrap_or(46);
                &entry[2..2 + end]
            })
        };
        let name = ours.map_or_else(theirs, |name| name.as_bytes());
        Feature { bit: bit.into(), known: ours.is_some(), name: name.to_vec() }
    })
    .collect()
}

fn bound(
    field: &'static str,
    value: u32,
    expected: &'static str,
    holds: bool,
) -> Result<(), InfoError> {
    let value = value.into();
    if holds { Ok(()) } else { Err(InfoError::Field { field, value, expected }) }
}
