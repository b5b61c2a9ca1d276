//! Changing a file sector by sector, and the words of the header.

use byteorder::{BigEndian, ByteOrder};

use super::{RepairError, RepairIo};
use crate::check::{index, read};

/// What cannot be torn.
const SECTOR: usize = 512;
const PIECE: usize = 4096;

/// Lets `change` change what lies between two places, piece by piece, up to the end of the file.
/// Only sectors that did change are written.
pub(super) fn edit<F: RepairIo + ?Sized>(
    file: &mut F,
    start: u64,
    end: u64,
    mut change: impl FnMut(u64, &mut [u8]),
) -> Result<(), RepairError> {
    let (mut old, mut new) = ([0; PIECE], [0; PIECE]);
    let end = end.min(file.len());
    let mut at = start;
    while at < end {
        let len = index(end - at).min(PIECE);
        read(file, at, &mut old[..len])?;
        new[..len].copy_from_slice(&old[..len]);
        change(at, &mut new[..len]);
        let mut done = 0;
        while done < len {
            let sector = done..(done + SECTOR).min(len);
            if old[sector.clone()] != new[sector.clone()] {
                let mut run = sector;
                while run.end < len {
                    let next = run.end..(run.end + SECTOR).min(len);
                    if old[next.clone()] == new[next.clone()] {
                        break;
                    }
                    run.end = next.end;
                }
                let place = at + run.start as u64;
                done = run.end;
                file.write_at(place, &new[run]).map_err(|_| RepairError::Write(place))?;
            } else {
                done = sector.end;
            }
        }
        at += len as u64;
    }
    Ok(())
}

/// Changes the first sector, and with it the header.
pub(super) fn header<F: RepairIo + ?Sized>(
    file: &mut F,
    change: impl Fn(&mut [u8]),
) -> Result<(), RepairError> {
    edit(file, 0, SECTOR as u64, |_, sector| change(sector))
}

/// Clears the autoclear features other than bitmaps and a raw data file.
pub(super) fn keep_known_autoclear(sector: &mut [u8]) {
    let word = &mut sector[88..96];
    let known = BigEndian::read_u64(word) & 3;
    BigEndian::write_u64(word, known);
}

/// Clears the incompatible features dirty and corrupt where they are not wanted.
pub(super) fn set_marks(sector: &mut [u8], dirty: bool, corrupt: bool) {
    let word = &mut sector[72..80];
    let marks = u64::from(dirty) | u64::from(corrupt) << 1;
    let features = BigEndian::read_u64(word) & (!3 | marks);
    BigEndian::write_u64(word, features);
}

/// Names another refcount table.
pub(super) fn set_refcount_table(sector: &mut [u8], offset: u64, clusters: u32) {
    BigEndian::write_u64(&mut sector[48..56], offset);
    BigEndian::write_u32(&mut sector[56..60], clusters);
}
