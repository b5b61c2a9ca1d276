//! The directories of snapshots and of bitmaps (specification: "Snapshots", "Bitmaps").

use alloc::vec::Vec;

use byteorder::{BigEndian, ByteOrder};

use super::{Bitmap, InfoError, Snapshot, bound};
use crate::check::ReadAt;

const MAX_SNAPSHOTS: u32 = 65_536;
const MAX_BITMAPS: u32 = 65_535;
const MAX_BYTES: u64 = 64 << 20;
const MAX_SNAPSHOT_EXTRA: u32 = 1024;

/// A directory of entries of different lengths, read from one to the next.
struct Directory<'a, R: ReadAt + ?Sized> {
    image: &'a R,
    name: &'static str,
    at: u64,
    end: u64,
}

impl<'a, R: ReadAt + ?Sized> Directory<'a, R> {
    fn new(image: &'a R, name: &'static str, start: u64, len: u64) -> Self {
        let end = start.saturating_add(len.min(MAX_BYTES)).min(image.len());
        Self { image, name, at: start, end }
    }

    /// The next `len` bytes.
    fn take(&mut self, len: usize) -> Result<Vec<u8>, InfoError> {
        let next = self.at.saturating_add(len as u64);
        if next > self.end {
            return Err(InfoError::Entry { of: self.name, at: self.at });
        }
        let mut bytes = alloc::vec![0; len];
        let unreadable = InfoError::Unreadable(self.at);
        self.image.read_at(self.at, &mut bytes).map_err(|_| unreadable)?;
        self.at = next;
        Ok(bytes)
    }

    /// Goes on to a multiple of 8; both directories begin at one.
    fn align(&mut self) {
        self.at = self.at.next_multiple_of(8);
    }
}

pub(super) fn snapshots<R: ReadAt + ?Sized>(
    image: &R,
    header: &[u8],
) -> Result<Vec<Snapshot>, InfoError> {
    let count = BigEndian::read_u32(&header[60..]);
    bound("nb_snapshots", count, "at most 65536", count <= MAX_SNAPSHOTS)?;
    let start = BigEndian::read_u64(&header[64..]);
    let mut table = Directory::new(image, "snapshot table", start, MAX_BYTES);
    let mut all = Vec::new();
    for _ in 0..count {
        let fixed = table.take(40)?;
        let lengths = [12, 14].map(|at| usize::from(BigEndian::read_u16(&fixed[at..])));
        let extra = BigEndian::read_u32(&fixed[36..]);
        if extra > MAX_SNAPSHOT_EXTRA {
            return Err(InfoError::Entry { of: table.name, at: table.at - 40 });
        }
        let extra = table.take(extra as usize)?;
        let (id, name) = (table.take(lengths[0])?, table.take(lengths[1])?);
        table.align();
        let extra = |at: usize| extra.get(at..at + 8).map(BigEndian::read_u64);
        all.push(Snapshot {
            id,
            name,
            seconds: BigEndian::read_u32(&fixed[16..]),
            nanoseconds: BigEndian::read_u32(&fixed[20..]),
            vm_clock: BigEndian::read_u64(&fixed[24..]),
            vm_state: extra(0).unwrap_or(BigEndian::read_u32(&fixed[32..]).into()),
            disk_size: extra(8),
            instructions: extra(16).filter(|&count| count != u64::MAX),
        });
    }
    Ok(all)
}

/// `extension` is the data of the bitmaps extension.
pub(super) fn bitmaps<R: ReadAt + ?Sized>(
    image: &R,
    extension: &[u8],
) -> Result<Vec<Bitmap>, InfoError> {
    let len = u32::try_from(extension.len()).unwrap_or(u32::MAX);
    bound("bitmaps extension length", len, "24", len == 24)?;
    let count = BigEndian::read_u32(extension);
    bound("nb_bitmaps", count, "1 to 65535", (1..=MAX_BITMAPS).contains(&count))?;
    let (len, start) =
        (BigEndian::read_u64(&extension[8..]), BigEndian::read_u64(&extension[16..]));
    let mut directory = Directory::new(image, "bitmap directory", start, len);
    let mut all = Vec::new();
    for _ in 0..count {
        let fixed = directory.take(24)?;
        let flags = BigEndian::read_u32(&fixed[12..]);
        let name = usize::from(BigEndian::read_u16(&fixed[18..]));
        let extra = u64::from(BigEndian::read_u32(&fixed[20..]));
        // Not read, however long it is.
        directory.at = directory.at.saturating_add(extra);
        let name = directory.take(name)?;
        directory.align();
        all.push(Bitmap {
            name,
            granularity_bits: fixed[17],
            in_use: flags & 1 != 0,
            auto: flags & 2 != 0,
        });
    }
    Ok(all)
}
