//! Internal snapshots: the table that lists them. (How writes leave them alone is told in
//! [`write`](crate::write): what they share is copied first.)

use alloc::vec::Vec;

use byteorder::{BigEndian, ByteOrder};

use crate::error::{OpenError, OpenErrorInner};
use crate::header::{Directory, Extent, Header};

/// One snapshot (specification: "Snapshots").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its unique ID, as bytes.
    pub id: Vec<u8>,
    /// Its name, as bytes.
    pub name: Vec<u8>,
    /// Its L1 table.
    pub l1: Extent,
    /// Size of the virtual disk then, if the entry says so.
    pub virtual_size: Option<u64>,
}

/// The fixed part of an entry, in bytes.
const FIXED: usize = 40;

impl Directory {
    /// The snapshots in `bytes`, which begin at [`offset`](Directory::offset) of the file. `None`:
    /// more bytes are needed.
    ///
    /// # Errors
    /// An L1 table that is too long.
    pub fn snapshots(&self, bytes: &[u8]) -> Result<Option<Vec<Snapshot>>, OpenError> {
        let mut found = Vec::new();
        let mut rest = bytes;
        for index in 0..self.entries {
            let Some((snapshot, length)) = Snapshot::parse(rest, index.into())? else {
                return Ok(None);
            };
            found.push(snapshot);
            // The last one need not be filled up.
            rest = rest.get(length.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(Some(found))
    }

    /// Where the table lies, as far as it can be told from `bytes`, its beginning.
    #[must_use]
    pub fn extent(&self, bytes: &[u8]) -> Extent {
        let mut len = 0;
        for _ in 0..self.entries {
            let rest = bytes.get(len..).unwrap_or_default();
            let Ok(Some((_, length))) = Snapshot::parse(rest, 0) else { break };
            len += length.next_multiple_of(8);
        }
        Extent { offset: self.offset, len: len as u64 }
    }
}

impl Snapshot {
    fn parse(bytes: &[u8], index: u64) -> Result<Option<(Self, usize)>, OpenError> {
        if bytes.len() < FIXED {
            return Ok(None);
        }
        let entries = BigEndian::read_u32(&bytes[8..]);
        // As the active table: 32 MiB.
        if entries > 4 << 20 {
            let (table, why) = ("snapshot table", "its L1 table has more than 4194304 entries");
            let value = entries.into();
            return Err(OpenErrorInner::BadEntry { table, index, value, why }.into());
        }
        let l1 = Extent { offset: BigEndian::read_u64(bytes), len: u64::from(entries) * 8 };
        let id_len = usize::from(BigEndian::read_u16(&bytes[12..]));
        let name_len = usize::from(BigEndian::read_u16(&bytes[14..]));
        let extra_len = BigEndian::read_u32(&bytes[36..]) as usize;
        if extra_len > 1024 {
            let (table, why) = ("snapshot table", "it has more than 1024 bytes of extra data");
            let value = extra_len as u64;
            return Err(OpenErrorInner::BadEntry { table, index, value, why }.into());
        }
        let length = FIXED + extra_len + id_len + name_len;
        let Some(whole) = bytes.get(..length) else { return Ok(None) };
        let (extra, names) = whole[FIXED..].split_at(extra_len);
        let (id, name) = names.split_at(id_len);
        // Extra data: 8 bytes of VM state size, then 8 bytes of virtual disk size.
        let virtual_size = extra.get(8..16).map(BigEndian::read_u64);
        let snapshot = Self { id: id.to_vec(), name: name.to_vec(), l1, virtual_size };
        Ok(Some((snapshot, length)))
    }
}

impl Header {
    /// The header of the image as it was at a snapshot: for reading only. `file_len` is the length
    /// of the file.
    ///
    /// # Errors
    /// An image with an external data file; an L1 table that is unaligned, outside the file, or too
    /// short for the virtual size.
    pub fn for_snapshot(self, snapshot: &Snapshot, file_len: u64) -> Result<Self, OpenError> {
        if self.data_file().is_some() {
            // Nothing counts the clusters of that file, so the disk's writes change it for all.
            let (name, field) = ("a snapshot beside an external data file", "nb_snapshots");
            let (value, next) = (1, "it has not kept what the disk had; serve the disk itself");
            return Err(OpenErrorInner::Feature { name, field, value, next }.into());
        }
        let size = snapshot.virtual_size.unwrap_or(self.virtual_size()) & !511;
        let geometry = self.geometry();
        let (entries, need) = (snapshot.l1.len / 8, geometry.l1_entries_for(size));
        if size == 0 || size > i64::MAX as u64 || entries < need {
            return Err(OpenErrorInner::L1TooSmall { entries, need }.into());
        }
        let (field, offset) = ("the snapshot's L1 table offset", snapshot.l1.offset);
        if offset & (geometry.cluster_size() - 1) != 0 {
            return Err(OpenErrorInner::Unaligned { what: field, offset }.into());
        }
        if offset == 0 || snapshot.l1.end() > file_len {
            let (what, end) = ("snapshot's L1 table", snapshot.l1.end());
            return Err(OpenErrorInner::Outside { what, offset, end, file_len }.into());
        }
        Ok(self.at_snapshot(snapshot.l1, size))
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    #[test]
    fn entries_are_read_and_cut_off_ones_ask_for_more() {
        let mut bytes = vec![0; 40 + 16 + 1 + 4];
        BigEndian::write_u64(&mut bytes, 0x5_0000);
        BigEndian::write_u32(&mut bytes[8..], 3);
        BigEndian::write_u16(&mut bytes[12..], 1);
        BigEndian::write_u16(&mut bytes[14..], 4);
        BigEndian::write_u32(&mut bytes[36..], 16);
        BigEndian::write_u64(&mut bytes[48..], 1 << 20);
        bytes[56..].copy_from_slice(b"1base");
        let table = Directory { offset: 0, entries: 1 };
        let found = table.snapshots(&bytes).unwrap().unwrap();
        let l1 = Extent { offset: 0x5_0000, len: 24 };
        let expected =
            Snapshot { id: b"1".to_vec(), name: b"base".to_vec(), l1, virtual_size: Some(1 << 20) };
        assert_eq!(found, [expected]);
        assert_eq!(table.extent(&bytes), Extent { offset: 0, len: 64 });
        for len in 0..bytes.len() {
            assert_eq!(table.snapshots(&bytes[..len]), Ok(None));
        }
    }
}
