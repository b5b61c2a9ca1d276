//! Persistent bitmaps: who writes to an image without keeping them up to date marks them as in use
//! first, so that nobody believes them, and writes nowhere where they lie.
//!
//! (Clearing the autoclear bit instead would say the same, but then nobody knows of their clusters
//! any more, and a check counts them as leaked.)

use alloc::vec::Vec;

use byteorder::{BigEndian, ByteOrder};

use crate::error::{OpenError, OpenErrorInner};
use crate::geometry::Geometry;
use crate::header::{Bitmaps, Extent};

/// One bitmap (specification: "Bitmap directory").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name, as bytes.
    pub name: Vec<u8>,
    /// Its table.
    pub table: Extent,
    /// Where its flags lie in the directory.
    flags: usize,
}

/// The fixed part of an entry, in bytes.
const FIXED: usize = 24;
/// Flag "in use": the bitmap may be out of date.
const IN_USE: u32 = 1;
/// Bits of a table entry that hold an offset; bit 0 has a meaning only without one.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

const DIRECTORY: &str = "bitmap directory";
const TABLE: &str = "bitmap table";

fn bad(table: &'static str, index: usize, value: u64, why: &'static str) -> OpenError {
    OpenErrorInner::BadEntry { table, index: index as u64, value, why }.into()
}

/// What is wrong with a place in the file, if anything is.
fn misplaced(at: Extent, geometry: Geometry, file_len: u64) -> Option<&'static str> {
    match at {
        _ if at.offset & (geometry.cluster_size() - 1) != 0 => {
            Some("not a multiple of the cluster size")
        }
        _ if at.offset == 0 || at.end() > file_len => Some("outside the file"),
        _ => None,
    }
}

impl Bitmaps {
    /// Does the directory lie where one may?
    ///
    /// # Errors
    /// It is unaligned or outside the file.
    pub fn check(&self, geometry: Geometry, file_len: u64) -> Result<(), OpenError> {
        let wrong = misplaced(self.directory, geometry, file_len);
        wrong.map_or(Ok(()), |why| Err(bad(DIRECTORY, 0, self.directory.offset, why)))
    }

    /// The bitmaps in the bytes of the directory.
    ///
    /// # Errors
    /// An entry that is cut off, or whose table is unaligned or outside the file.
    pub fn entries(
        &self,
        directory: &[u8],
        geometry: Geometry,
        file_len: u64,
    ) -> Result<Vec<Bitmap>, OpenError> {
        let mut found = Vec::new();
        let mut at = 0;
        for index in 0..self.count as usize {
            let rest = directory.get(at..).unwrap_or_default();
            let cut = || bad(DIRECTORY, index, at as u64, "it is cut off");
            let fixed = rest.get(..FIXED).ok_or_else(cut)?;
            let offset = BigEndian::read_u64(fixed);
            let len = u64::from(BigEndian::read_u32(&fixed[8..])) * 8;
            let name = usize::from(BigEndian::read_u16(&fixed[18..]));
            let extra = BigEndian::read_u32(&fixed[20..]) as usize;
            let start = FIXED.checked_add(extra).ok_or_else(cut)?;
            let name = rest.get(start..start.saturating_add(name)).ok_or_else(cut)?;
            let table = Extent { offset, len };
            if let Some(why) = misplaced(table, geometry, file_len) {
                return Err(bad(DIRECTORY, index, offset, why));
            }
            found.push(Bitmap { name: name.to_vec(), table, flags: at + 12 });
            at += (start + name.len()).next_multiple_of(8);
        }
        Ok(found)
    }
}

impl Bitmap {
    /// Marks it as in use in the bytes of the directory that it was found in. True: it was not.
    pub fn mark_in_use(&self, directory: &mut [u8]) -> bool {
        let field = &mut directory[self.flags..self.flags + 4];
        let flags = BigEndian::read_u32(field);
        BigEndian::write_u32(field, flags | IN_USE);
        flags & IN_USE == 0
    }

    /// The clusters with its bits, from a part of the bytes of its table.
    ///
    /// # Errors
    /// One that is unaligned or outside the file.
    pub fn clusters(
        table: &[u8],
        geometry: Geometry,
        file_len: u64,
    ) -> impl Iterator<Item = Result<Extent, OpenError>> {
        let entries = table.chunks_exact(8).map(BigEndian::read_u64).enumerate();
        let entries = entries.filter(|(_, value)| value & OFFSET != 0);
        entries.map(move |(index, value)| {
            let offset = value & OFFSET;
            // The last cluster of a file may be cut off.
            let len = geometry.cluster_size().min(file_len.saturating_sub(offset)).max(1);
            let extent = Extent { offset, len };
            let wrong = misplaced(extent, geometry, file_len);
            wrong.map_or(Ok(extent), |why| Err(bad(TABLE, index, value, why)))
        })
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;
    use alloc::vec;

    use super::*;

    const LEN: u64 = 16 << 16;

    fn geometry() -> Geometry {
        Geometry::new(16, 4)
    }

    /// A directory with two bitmaps, "one" (with 8 bytes of extra data) and "second".
    fn directory() -> (Bitmaps, Vec<u8>) {
        let mut bytes = vec![0; 40 + 32];
        for (at, table, name, extra) in [(0, 5_u64, "one", 8), (40, 7, "second", 0)] {
            BigEndian::write_u64(&mut bytes[at..], table << 16);
            BigEndian::write_u32(&mut bytes[at + 8..], 2);
            let len = u16::try_from(name.len()).unwrap();
            BigEndian::write_u16(&mut bytes[at + 18..], len);
            BigEndian::write_u32(&mut bytes[at + 20..], extra);
            let name_at = at + 24 + extra as usize;
            bytes[name_at..name_at + name.len()].copy_from_slice(name.as_bytes());
        }
        let directory = Extent { offset: 4 << 16, len: bytes.len() as u64 };
        (Bitmaps { count: 2, directory }, bytes)
    }

    #[test]
    fn entries_are_found_and_marked_one_by_one() {
        let (bitmaps, mut bytes) = directory();
        bitmaps.check(geometry(), LEN).unwrap();
        let found = bitmaps.entries(&bytes, geometry(), LEN).unwrap();
        let names: Vec<_> = found.iter().map(|bitmap| &bitmap.name[..]).collect();
        assert_eq!(names, [&b"one"[..], b"second"]);
        assert_eq!(found[1].table, Extent { offset: 7 << 16, len: 16 });
        let before = bytes.clone();
        assert!(found[1].mark_in_use(&mut bytes));
        assert!(!found[1].mark_in_use(&mut bytes), "it is marked");
        let changed: Vec<_> = (0..bytes.len()).filter(|&at| bytes[at] != before[at]).collect();
        assert_eq!(changed, [40 + 15]);
    }

    #[test]
    fn what_is_cut_off_or_elsewhere_is_an_error() {
        let (bitmaps, whole) = directory();
        for len in 0..whole.len() - 2 {
            let error = bitmaps.entries(&whole[..len], geometry(), LEN).unwrap_err();
            assert!(error.to_string().contains("cut off"), "{error}");
        }
        for (offset, why) in [(0, "outside"), ((7 << 16) + 512, "multiple"), (LEN, "outside")] {
            let mut bytes = whole.clone();
            BigEndian::write_u64(&mut bytes[40..], offset);
            let error = bitmaps.entries(&bytes, geometry(), LEN).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
        let mut bytes = whole;
        BigEndian::write_u32(&mut bytes[20..], u32::MAX);
        bitmaps.entries(&bytes, geometry(), LEN).unwrap_err();
        let directory = Extent { offset: LEN, len: 64 };
        Bitmaps { directory, ..bitmaps }.check(geometry(), LEN).unwrap_err();
    }

    #[test]
    fn tables_have_clusters_and_entries_without_one() {
        let mut table = vec![0; 32];
        BigEndian::write_u64(&mut table, 9 << 16);
        // All bits are one: no cluster.
        BigEndian::write_u64(&mut table[8..], 1);
        let found: Result<Vec<_>, _> = Bitmap::clusters(&table, geometry(), LEN).collect();
        assert_eq!(found.unwrap(), [Extent { offset: 9 << 16, len: 1 << 16 }]);
        BigEndian::write_u64(&mut table[24..], LEN);
        let found: Result<Vec<_>, _> = Bitmap::clusters(&table, geometry(), LEN).collect();
        assert!(found.unwrap_err().to_string().contains("outside"));
    }
}
