//! From a request as the driver describes it to one of the engine's.

use qcow2::Request;

use crate::ublk;

/// What a device takes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of the largest read or write.
    pub max_request: u32,
    /// Bytes of the block device: no request reaches beyond.
    pub size: u64,
    /// Bytes of a logical block.
    pub block: u32,
}

/// The request, and the number that its success is replied with: every byte of a read or write
/// (never 0: that would be sent again for ever), 0 for others. Or the error to reply with.
pub fn decode(desc: &ublk::IoDesc, limits: &Limits) -> Result<(Request, i32), i32> {
    let fua = desc.op_flags & ublk::IO_F_FUA != 0;
    match desc.op() {
        ublk::OP_FLUSH => Ok((Request::Flush, 0)),
        // The block layer sends no such thing, and nobody may think that it was durable.
        ublk::OP_WRITE_ZEROES if fua => Err(libc::EOPNOTSUPP),
        op @ (ublk::OP_DISCARD | ublk::OP_WRITE_ZEROES) => {
            let (offset, len) = range(desc, limits, u32::MAX).ok_or(libc::EIO)?;
            let unmap = desc.op_flags & ublk::IO_F_NOUNMAP == 0;
            let request = match op {
                ublk::OP_DISCARD => Request::Discard { offset, len },
                _ => Request::WriteZeroes { offset, len, unmap },
            };
            Ok((request, 0))
        }
        op @ (ublk::OP_READ | ublk::OP_WRITE) => {
            let (offset, len) = range(desc, limits, limits.max_request).ok_or(libc::EIO)?;
            let success = i32::try_from(len).map_err(|_| libc::EIO)?;
            let request = match op {
                ublk::OP_READ => Request::Read { offset, len },
                _ => Request::Write { offset, len, fua },
            };
            Ok((request, success))
        }
        _ => Err(libc::EOPNOTSUPP),
    }
}

/// Offset and length in bytes, if they lie on the disk and are at most `most` bytes.
fn range(desc: &ublk::IoDesc, limits: &Limits, most: u32) -> Option<(u64, u32)> {
    let offset = desc.start_sector.checked_mul(ublk::SECTOR)?;
    let len = u64::from(desc.nr_sectors).checked_mul(ublk::SECTOR)?;
    let end = offset.checked_add(len)?;
    let aligned = (offset | len) & u64::from(limits.block - 1) == 0;
    let len = u32::try_from(len).ok()?;
    let fits = (1..=most).contains(&len) && end <= limits.size;
    (fits && aligned).then_some((offset, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { max_request: 8192, size: 1 << 20, block: 4096 };

    fn desc(op: u8, flags: u32, start_sector: u64, nr_sectors: u32) -> ublk::IoDesc {
        let op_flags = u32::from(op) | flags;
        ublk::IoDesc { op_flags, nr_sectors, start_sector, addr: 0 }
    }

    #[test]
    fn every_byte_of_a_read_or_write_is_confirmed_and_none_of_others() {
        let read = decode(&desc(ublk::OP_READ, 0, 8, 16), &LIMITS);
        assert_eq!(read, Ok((Request::Read { offset: 4096, len: 8192 }, 8192)));
        let fua = decode(&desc(ublk::OP_WRITE, ublk::IO_F_FUA, 0, 8), &LIMITS);
        assert_eq!(fua, Ok((Request::Write { offset: 0, len: 4096, fua: true }, 4096)));
        assert_eq!(decode(&desc(ublk::OP_FLUSH, 0, 0, 0), &LIMITS), Ok((Request::Flush, 0)));
        let zeroes = decode(&desc(ublk::OP_WRITE_ZEROES, ublk::IO_F_NOUNMAP, 0, 2048), &LIMITS);
        let expected = Request::WriteZeroes { offset: 0, len: 1 << 20, unmap: false };
        assert_eq!(zeroes, Ok((expected, 0)));
    }

    #[test]
    fn what_the_device_does_not_take_is_refused() {
        for (start, count) in [(0, 0), (0, 24), (4, 8), (0, 4), (2048, 8), (u64::MAX, 8)] {
            let result = decode(&desc(ublk::OP_READ, 0, start, count), &LIMITS);
            assert_eq!(result, Err(libc::EIO), "{start} {count}");
        }
        assert_eq!(decode(&desc(4, 0, 0, 8), &LIMITS), Err(libc::EOPNOTSUPP));
        let durable = desc(ublk::OP_WRITE_ZEROES, ublk::IO_F_FUA, 0, 8);
        assert_eq!(decode(&durable, &LIMITS), Err(libc::EOPNOTSUPP));
    }
}
