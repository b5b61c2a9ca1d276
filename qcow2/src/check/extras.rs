//! Snapshots and bitmaps: directories of tables that may, in a bad image, overlap at will.
//!
//! Sixty thousand snapshots that all name the same huge L1 table must not cost sixty thousand
//! walks, so tables are collected as edges first, and each stretch is walked once, with a weight.

use alloc::vec::Vec;
use core::mem;

use byteorder::{BigEndian, ByteOrder};

use super::walk::Weight;
use super::{CheckError, FindingKind, Kind, ReadAt, TOO_MANY, Walk, pieces, read};

const MAX_L1_ENTRIES: u64 = (32 << 20) / 8;
const MAX_SNAPSHOT_EXTRA: u64 = 1024;
/// vm_state_size and disk_size, which version 3 demands.
const MIN_SNAPSHOT_EXTRA_V3: u64 = 16;

const BITMAP_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 0 of the flags of a bitmap.
const BITMAP_IN_USE: u32 = 1;
const BITMAP_ALL_ONES: u64 = 1;
const MAX_BITMAP_TABLE: u64 = 0x0800_0000;
const MAX_BITMAP_BYTES: u64 = 0x2000_0000;

/// Begin (+1) and end (-1) of tables, in bytes.
pub(super) type Edges = Vec<(u64, i32)>;

/// Calls `visit(start, end, weight)` for each stretch between edges that is within any table.
fn sweep(
    edges: &mut Edges,
    mut visit: impl FnMut(u64, u64, u32) -> Result<(), CheckError>,
) -> Result<(), CheckError> {
    edges.sort_unstable();
    let mut weight = 0_i32;
    for pair in edges.windows(2) {
        weight += pair[0].1;
        let (start, end) = (pair[0].0, pair[1].0);
        if weight > 0 && start < end {
            visit(start, end, weight.unsigned_abs())?;
        }
    }
    edges.clear();
    Ok(())
}

impl<R: ReadAt + ?Sized> Walk<'_, R> {
    /// Notes a table that is to be marked with `kind` and then walked.
    fn collect(&mut self, start: u64, len: u64, at: u64) {
        let end = start.saturating_add(len);
        if len == 0 {
            return;
        }
        if self.beyond(start, end, 1, at) {
            let end = end.div_ceil(self.head.cluster_size()) << self.head.cluster_bits;
            self.state.areas.extend([(start, 1), (end, -1)]);
        } else if start < self.len {
            self.state.incomplete = true;
        }
        self.state.tables.extend([(start, 1), (start.saturating_add(len), -1)]);
    }

    fn mark_collected(&mut self, kind: u16) -> Result<(), CheckError> {
        let mut areas = mem::take(&mut self.state.areas);
        let bits = self.head.cluster_bits;
        let done = sweep(&mut areas, |start, end, weight| {
            self.mark_clusters(start >> bits, (end >> bits) - 1, kind, weight)
        });
        self.state.areas = areas;
        done
    }

    pub(super) fn snapshots(&mut self) -> Result<(), CheckError> {
        if self.head.snapshots != 0 && self.head.external_data {
            self.note(FindingKind::SnapshotInDataFile, 0, self.head.snapshots.into(), 0, 1);
        }
        let start = self.head.snapshots_at;
        let mut at = start;
        for left in (1..=self.head.snapshots).rev() {
            if at >= self.len {
                // All zeros: short entries without an L1 table.
                if self.head.version >= 3 {
                    self.note(FindingKind::SnapshotTable, at, 0, MIN_SNAPSHOT_EXTRA_V3, left);
                }
                at = at.saturating_add(40 * u64::from(left));
                self.state.incomplete = true;
                break;
            }
            match self.snapshot(at)? {
                Some(next) => at = next,
                None => break,
            }
        }
        self.mark(start, at - start, Kind::SNAPSHOT_TABLE, 1, start)?;
        self.mark_collected(Kind::L1)?;
        let mut tables = mem::take(&mut self.state.tables);
        let done = sweep(&mut tables, |start, end, inactive| {
            self.l1(start, end, Weight { active: 0, inactive })
        });
        self.state.tables = tables;
        done
    }

    /// One entry of the snapshot table. Returns where the next one is.
    fn snapshot(&mut self, at: u64) -> Result<Option<u64>, CheckError> {
        let mut entry = [0; 40];
        read(self.image, at, &mut entry)?;
        let l1 = BigEndian::read_u64(&entry);
        let entries = u64::from(BigEndian::read_u32(&entry[8..]));
        let names = u64::from(BigEndian::read_u16(&entry[12..]))
            + u64::from(BigEndian::read_u16(&entry[14..]));
        let extra = u64::from(BigEndian::read_u32(&entry[36..]));
        if extra > MAX_SNAPSHOT_EXTRA {
            self.note(FindingKind::SnapshotTable, at, extra, MAX_SNAPSHOT_EXTRA, 1);
            self.state.incomplete = true;
            return Ok(None);
        }
        if self.head.version >= 3 && extra < MIN_SNAPSHOT_EXTRA_V3 {
            self.note(FindingKind::SnapshotTable, at, extra, MIN_SNAPSHOT_EXTRA_V3, 1);
        }
        if self.head.in_cluster(l1) != 0 {
            self.note(FindingKind::Unaligned, at, l1, 0, 1);
            self.state.incomplete = true;
        } else if entries > MAX_L1_ENTRIES {
            self.note(FindingKind::SnapshotTable, at, entries, MAX_L1_ENTRIES, 1);
            self.state.incomplete = true;
        } else {
            self.collect(l1, entries * 8, at);
        }
        Ok(Some((at + 40 + extra + names).next_multiple_of(8)))
    }

    /// Specification: "Bitmaps".
    pub(super) fn bitmaps(&mut self) -> Result<(), CheckError> {
        if self.head.bitmaps == 0 {
            return Ok(());
        }
        let directory = self.head.bitmap_directory;
        self.mark(directory.start, directory.len, Kind::BITMAP_DIRECTORY, 1, directory.start)?;
        let end = directory.start.saturating_add(directory.len);
        let mut at = directory.start;
        for _ in 0..self.head.bitmaps {
            match self.bitmap(at, end)? {
                Some(next) => at = next,
                None => break,
            }
        }
        if at != end {
            self.state.incomplete = true;
            self.note(FindingKind::BitmapDirectory, at, at, end, 1);
        }
        self.mark_collected(Kind::BITMAP_TABLE)?;
        let mut tables = mem::take(&mut self.state.tables);
        let done = sweep(&mut tables, |start, end, weight| self.bitmap_table(start, end, weight));
        self.state.tables = tables;
        done
    }

    /// One entry of the bitmap directory. Returns where the next one is.
    fn bitmap(&mut self, at: u64, end: u64) -> Result<Option<u64>, CheckError> {
        let mut entry = [0; 24];
        if at.saturating_add(24) > end.min(self.len) {
            self.note(FindingKind::BitmapDirectory, at, 0, 0, 1);
            self.state.incomplete = true;
            return Ok(None);
        }
        read(self.image, at, &mut entry)?;
        let table = BigEndian::read_u64(&entry);
        let entries = u64::from(BigEndian::read_u32(&entry[8..]));
        let flags = BigEndian::read_u32(&entry[12..]);
        let (kind, granularity) = (entry[16], entry[17]);
        let name = u64::from(BigEndian::read_u16(&entry[18..]));
        if BigEndian::read_u32(&entry[20..]) != 0 {
            return Err(CheckError::Unsupported("a bitmap with extra data"));
        }
        let next = (at + 24 + name).next_multiple_of(8);
        let bytes = entries << self.head.cluster_bits;
        let covers = u128::from(bytes) << (u32::from(granularity.min(63)) + 3);
        let good = table != 0
            && self.head.in_cluster(table) == 0
            && (1..=MAX_BITMAP_TABLE).contains(&entries)
            && bytes <= MAX_BITMAP_BYTES
            && (9..=31).contains(&granularity)
            && flags < 8
            && kind == 1
            && name <= 1023
            && next <= end
            // One in use may be from before the disk was grown: it is out of date anyway.
            && (flags & BITMAP_IN_USE != 0 || covers >= u128::from(self.head.virtual_size));
        if !good {
            self.note(FindingKind::BitmapDirectory, at, table, 0, 1);
            self.state.incomplete = true;
            return Ok(None);
        }
        self.collect(table, entries * 8, at);
        Ok(Some(next))
    }

    fn bitmap_table(&mut self, start: u64, end: u64, weight: u32) -> Result<(), CheckError> {
        let image = self.image;
        pieces(image, start, end, |at, bytes| {
            for (nth, word) in bytes.chunks_exact(8).enumerate() {
                let (at, word) = (at + nth as u64 * 8, BigEndian::read_u64(word));
                if word == 0 {
                    continue;
                }
                let offset = word & BITMAP_OFFSET;
                let flags = word & !BITMAP_OFFSET;
                if flags & !BITMAP_ALL_ONES != 0 || flags != 0 && offset != 0 {
                    self.note(FindingKind::ReservedBits, at, word, 0, weight);
                } else if self.head.in_cluster(offset) != 0 {
                    self.note(FindingKind::Unaligned, at, word, 0, weight);
                } else if offset != 0 {
                    self.mark(offset, self.head.cluster_size(), Kind::BITMAP, weight, at)?;
                }
            }
            Ok(())
        })
    }

    /// Adds `weight` references to the clusters from `first` to `last`.
    pub(super) fn mark_clusters(
        &mut self,
        first: u64,
        last: u64,
        kind: u16,
        weight: u32,
    ) -> Result<(), CheckError> {
        for cluster in first..=last {
            // The callers know that the last one is at most one behind the file.
            let Some(slot) = self.state.slots.get_mut(super::index(cluster)) else { break };
            slot.refs = slot.refs.checked_add(weight).ok_or(TOO_MANY)?;
            slot.kinds |= kind;
        }
        self.state.used_slots = self.state.used_slots.max(super::index(last.saturating_add(1)));
        Ok(())
    }
}
