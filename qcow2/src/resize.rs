//! Growing the virtual disk of an image that nobody serves at the moment.
//!
//! [`grow`] changes the fields size and l1_size of the header (specification: "Header"), and the
//! L1 table where that has to be longer. A crash leaves the disk with the old size or the new one,
//! and what it held in both:
//!
//! 1. Nothing: what was read may not be durable yet, so a sync comes first.
//! 2. **The end of the last cluster.** A disk that ends within a cluster says nothing of the bytes
//!    behind its end, which are about to be part of it: they become zeros.
//! 3. **The L1 table.** If its last cluster has room, the new entries there become zeros. If not,
//!    a longer copy goes behind the end of the file. Both are durable before the next step.
//! 4. **The header**, in one sector. For a table at another place it also gets the mark dirty: the
//!    refcounts know nothing of the new place. Whoever opens the image next, after a crash, counts
//!    anew; without one that is the last step.
//!
//! # What is refused
//!
//! A smaller disk; persistent bitmaps, which have the size of the disk; an external data file,
//! which would have to grow with it; a backing file that is longer than the disk, whose content
//! would come to light; in version 2 snapshots, which share the size, and a longer table at another
//! place, for which there is no mark.

use alloc::vec;
use core::{error, fmt};

use byteorder::{BigEndian, ByteOrder};

use crate::check::repair::{RepairError, RepairIo, rebuild_if_dirty};
use crate::check::{CheckError, ReadAt, check};
use crate::entry::{BadWord, Decoder, L2Entry, Mapping};
use crate::error::OpenError;
use crate::header::{Extent, Header};
use crate::units::{GuestOffset, HostOffset};

/// What cannot be torn, in bytes.
const SECTOR: usize = 512;

/// Why the disk was not grown. The image is as it was, unless that [is final](Self::is_final).
#[derive(Debug)]
pub enum ResizeError {
    /// The image cannot be written to.
    Open(OpenError),
    /// What stands in the way, and what may be done about it.
    Refused(&'static str),
    /// The new size is less than the old one, in bytes.
    Shrinks(u64),
    /// So much is wrong with the image.
    Unsound(u64),
    /// An entry of a table is bad.
    Entry(&'static str),
    /// Reading, writing or counting failed, before anything was changed that is in use.
    Repair(RepairError),
    /// It failed later, or a sync did.
    Final(RepairError),
    /// The refcounts could not be made right. The image has the new size, and is marked dirty.
    NotCounted,
}

impl ResizeError {
    /// Must nobody write to the image any more, as after any failed write of metadata?
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Final(_) | Self::NotCounted | Self::Repair(RepairError::Sync))
    }
}

impl fmt::Display for ResizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(error) => error.fmt(f),
            Self::Refused(what) => f.write_str(what),
            Self::Shrinks(now) => write!(
                f,
                "the disk has {now} bytes, and it is only made larger; 'qemu-img resize --shrink' \
                 cuts off an image that nobody uses"
            ),
            Self::Unsound(count) => {
                write!(f, "the image is not sound ({count} corruptions); repair it first")
            }
            Self::Entry(why) => write!(f, "an entry of a table is bad: {why}"),
            Self::Repair(error) | Self::Final(error) => error.fmt(f),
            Self::NotCounted => f.write_str(
                "the refcounts could not be made right; look at the image with 'ublk-qcow2 check'",
            ),
        }
    }
}

impl error::Error for ResizeError {}

impl From<OpenError> for ResizeError {
    fn from(error: OpenError) -> Self {
        Self::Open(error)
    }
}

impl From<RepairError> for ResizeError {
    fn from(error: RepairError) -> Self {
        Self::Repair(error)
    }
}

impl From<CheckError> for ResizeError {
    fn from(error: CheckError) -> Self {
        Self::Repair(error.into())
    }
}

impl From<BadWord> for ResizeError {
    fn from(word: BadWord) -> Self {
        Self::Entry(word.text())
    }
}

/// What of the refusals the header tells; writes nothing, and the image may be in use.
///
/// `can_grow`: the file can become longer.
///
/// # Errors
/// See [`ResizeError`].
pub fn judge<F: ReadAt>(
    file: &F,
    size: u64,
    beneath: u64,
    can_grow: bool,
) -> Result<(), ResizeError> {
    let (header, mut first) = header(file)?;
    if size == header.virtual_size() {
        return Ok(());
    }
    let (l1, moves) = plan(&header, size, beneath)?;
    set_fields(&mut first, size, l1);
    // Where the table will be is not known yet, only how long it is.
    Header::parse(&first, u64::MAX, false)?;
    if moves && !can_grow {
        return Err(ResizeError::Refused(
            "its L1 table has no room, and on a block device there is none behind the image; \
             'qemu-img resize' finds some, while nobody uses it",
        ));
    }
    Ok(())
}

/// The L1 table for a disk of `size` bytes, where it is now, and whether it cannot stay there; or
/// what of the refusals the header tells.
fn plan(header: &Header, size: u64, beneath: u64) -> Result<(Extent, bool), ResizeError> {
    may_grow(header, size, beneath)?;
    let (geometry, have) = (header.geometry(), header.l1_extent());
    let need = geometry.l1_entries_for(size) * 8;
    let room = geometry.clusters_for(have.len) << geometry.cluster_bits();
    let moves = need > room;
    if moves && header.version() < 3 {
        return Err(ResizeError::Refused(
            "its L1 table has no room, and of version 2 it cannot be moved; 'qemu-img amend -o \
             compat=1.1' makes version 3 of it, while nobody uses the image",
        ));
    }
    Ok((Extent { offset: have.offset, len: need.max(have.len) }, moves))
}

/// Makes the virtual disk `size` bytes large, a multiple of 512; nothing, if it is. `beneath` is
/// the size of the disk of its backing file, or 0.
///
/// # Errors
/// See [`ResizeError`]. After a final one the image may have the new size.
pub fn grow<F: RepairIo>(file: &mut F, size: u64, beneath: u64) -> Result<(), ResizeError> {
    sync(file)?;
    let (header, mut first) = header(file)?;
    let now = header.virtual_size();
    if size == now {
        return Ok(());
    }
    let (l1, moves) = plan(&header, size, beneath)?;
    let (geometry, have) = (header.geometry(), header.l1_extent());
    let l1 = if moves { Extent { offset: end_of(file, &header)?, ..l1 } } else { l1 };
    // What the image will say is read as anybody would, before anything is written.
    set_fields(&mut first, size, l1);
    let end = geometry.clusters_for(l1.end()) << geometry.cluster_bits();
    Header::parse(&first, file.len().max(end), false)?;
    if moves {
        may_move(file)?;
    }
    clear_tail(file, &header)?;
    if moves {
        file.set_len(end).map_err(|_| RepairError::Grow(end))?;
        copy(file, have, l1.offset)?;
        // Written, so that it has its space: nothing may be missing when it is used.
        zero(file, l1.offset + have.len, end - l1.offset - have.len)?;
        sync(file)?;
        first[79] |= 1;
    } else if l1.len > have.len {
        zero(file, have.end(), l1.len - have.len).map_err(last)?;
        sync(file)?;
    }
    write(file, 0, &first[..SECTOR]).map_err(last)?;
    sync(file)?;
    match rebuild_if_dirty(file, &mut |_, _, _| {}).map_err(ResizeError::Final)? {
        Some(done) if done.after.dirty || done.after.corruptions != 0 => {
            Err(ResizeError::NotCounted)
        }
        _ => Ok(()),
    }
}

/// An error while what is in use is written.
fn last(error: ResizeError) -> ResizeError {
    match error {
        ResizeError::Repair(error) => ResizeError::Final(error),
        other => other,
    }
}

/// The header and the bytes it was read from, at least a sector.
fn header<F: ReadAt>(file: &F) -> Result<(Header, vec::Vec<u8>), ResizeError> {
    let mut first = vec![0; SECTOR];
    read(file, 0, &mut first)?;
    first.resize(Header::needed(&first)?.max(SECTOR), 0);
    read(file, 0, &mut first)?;
    Ok((Header::parse(&first, file.len(), false)?, first))
}

fn may_grow(header: &Header, size: u64, beneath: u64) -> Result<(), ResizeError> {
    let now = header.virtual_size();
    let refused = |what| Err(ResizeError::Refused(what));
    match header {
        _ if size < now => Err(ResizeError::Shrinks(now)),
        _ if !size.is_multiple_of(512) => refused("the size is no multiple of 512 bytes"),
        header if header.bitmaps().is_some() => refused(
            "it has persistent bitmaps, which cover a disk of the old size; remove them with \
             'qemu-img bitmap --remove'",
        ),
        header if header.data_file().is_some() => refused(
            "its content is in an external data file; 'qemu-img resize' grows both, while nobody \
             uses them",
        ),
        _ if beneath > now => refused(
            "its backing file is longer than the disk, and its content would come to light; \
             'qemu-img resize' hides it, while nobody uses the image",
        ),
        header if header.version() < 3 && header.snapshots().is_some() => refused(
            "it has snapshots, and version 2 does not say how large their disks are; 'qemu-img \
             amend -o compat=1.1' makes version 3 of it, while nobody uses the image",
        ),
        _ => Ok(()),
    }
}

fn may_move<F: RepairIo>(file: &F) -> Result<(), ResizeError> {
    // An entry that leads behind the end of the file would lead to the new table.
    match check(file)?.corruptions {
        0 => Ok(()),
        count => Err(ResizeError::Unsound(count)),
    }
}

/// Where the file ends, at a cluster.
fn end_of<F: RepairIo>(file: &F, header: &Header) -> Result<u64, ResizeError> {
    let size = header.geometry().cluster_size();
    let end = file.len().checked_next_multiple_of(size);
    end.ok_or(ResizeError::Repair(RepairError::Grow(file.len())))
}

/// Specification, "Header": size in bytes 24 to 31, l1_size in 36 to 39, l1_table_offset behind it.
fn set_fields(first: &mut [u8], size: u64, l1: Extent) {
    BigEndian::write_u64(&mut first[24..], size);
    // At most 2^22 entries are read back.
    BigEndian::write_u32(&mut first[36..], u32::try_from(l1.len / 8).unwrap_or(u32::MAX));
    BigEndian::write_u64(&mut first[40..], l1.offset);
}

/// Zeros behind the end of a disk that ends within a cluster.
fn clear_tail<F: RepairIo>(file: &mut F, header: &Header) -> Result<(), ResizeError> {
    let (geometry, size) = (header.geometry(), header.virtual_size());
    let used = geometry.within(GuestOffset(size));
    if used == 0 {
        return Ok(());
    }
    let (decoder, len) = (Decoder::of(header), file.len());
    let guest = geometry.cluster_of(GuestOffset(size));
    let index = guest.0 >> geometry.l2_bits();
    let table = decoder.l1(word(file, header.l1_extent().offset + index * 8)?, len)?;
    let Some(table) = table else { return Ok(()) };
    let within = (guest.0 & (geometry.l2_entries() - 1)) << geometry.entry_bits();
    let at = geometry.host_start(table.at).0 + within;
    let bitmap = if geometry.has_extended_l2() { word(file, at + 8)? } else { 0 };
    let entry = L2Entry { word: word(file, at)?, bitmap };
    // Of all subclusters, those behind the end, too: they are in the same cluster.
    for unit in 0..1 << geometry.units_bits() {
        match decoder.l2(entry, guest, unit, len)? {
            Mapping::Data(found) if table.copied && found.copied => {
                let HostOffset(start) = decoder.data_start(found.at);
                let end = (start + geometry.cluster_size()).min(len);
                zero(file, start + used, end.saturating_sub(start + used))?;
                return sync(file);
            }
            Mapping::Data(_) | Mapping::Compressed(_) => {
                return Err(ResizeError::Refused(
                    "the disk ends within a cluster that is compressed, or shared with a snapshot; \
                     write something to its last sectors first",
                ));
            }
            Mapping::Unallocated { .. } | Mapping::Zero { .. } => {}
        }
    }
    Ok(())
}

const PIECE: usize = 1 << 16;

fn copy<F: RepairIo>(file: &mut F, from: Extent, to: u64) -> Result<(), ResizeError> {
    pieces(from.len, |at, len| {
        let mut bytes = vec![0; len];
        read(file, from.offset + at, &mut bytes)?;
        write(file, to + at, &bytes)
    })
}

fn zero<F: RepairIo>(file: &mut F, offset: u64, len: u64) -> Result<(), ResizeError> {
    pieces(len, |at, len| write(file, offset + at, &vec![0; len]))
}

fn pieces(
    len: u64,
    mut each: impl FnMut(u64, usize) -> Result<(), ResizeError>,
) -> Result<(), ResizeError> {
    let mut at = 0;
    while at < len {
        let piece = usize::try_from(len - at).unwrap_or(PIECE).min(PIECE);
        each(at, piece)?;
        at += piece as u64;
    }
    Ok(())
}

fn word<F: RepairIo>(file: &F, at: u64) -> Result<u64, ResizeError> {
    let mut bytes = [0; 8];
    read(file, at, &mut bytes)?;
    Ok(BigEndian::read_u64(&bytes))
}

fn read<F: ReadAt>(file: &F, at: u64, bytes: &mut [u8]) -> Result<(), ResizeError> {
    file.read_at(at, bytes).map_err(|_| CheckError::Unreadable(at).into())
}

fn write<F: RepairIo>(file: &mut F, at: u64, bytes: &[u8]) -> Result<(), ResizeError> {
    file.write_at(at, bytes).map_err(|_| RepairError::Write(at).into())
}

fn sync<F: RepairIo>(file: &mut F) -> Result<(), ResizeError> {
    file.sync().map_err(|_| RepairError::Sync.into())
}
