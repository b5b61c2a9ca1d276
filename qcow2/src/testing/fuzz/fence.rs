//! What an image must be kept from even where it contradicts itself.
//!
//! The [rules](crate::testing::rules) of order argue from sound tables, and would refuse nearly
//! everything here. These hold for any image that was opened:
//!
//! - what is read-only, or lies beneath, is never written;
//! - before the first sync nothing is; after a failed metadata write or sync only the header, to
//!   say that the image is corrupt, which one sync follows;
//! - guest data and punches never hit the header, the top-level tables, a table or refcount block
//!   that these name, or what is protected for snapshots and bitmaps;
//! - metadata never hits the latter either, changes no more of the header than what may change, and
//!   takes no entry out of a top-level table, nor puts one in that leads to other metadata;
//! - nothing is written behind the end of the file, no metadata is cut off, and the file grows by
//!   steps that follow from its length. A hole may come before a step, over clusters that are
//!   counted already: it takes no room, and blocks in the file have to count it.

use std::format;
use std::rc::Rc;
use std::vec::Vec;

use crate::header::Extent;
use crate::op::{FileId, Op, OpKind, Outcome};
use crate::options::Options;
use crate::testing::disk::Disk;
use crate::testing::format::{COPIED, Format};
use crate::testing::pool::{SECTOR, WORDS};
use crate::testing::rules::{Broken, Submitted};

/// The rules for one image, and what they have seen.
#[derive(Clone, Debug)]
pub struct Fence {
    read_only: bool,
    virtual_size: u64,
    /// What snapshots and bitmaps need, in sectors.
    protected: Rc<[(u64, u64)]>,
    /// A metadata write or a sync has failed.
    latched: bool,
    /// The sync that the mark in the header is allowed after that was begun.
    mark_synced: bool,
    synced: bool,
    /// What the tables on the disk say, unless they have changed since.
    layout: Option<Layout>,
}

/// Where metadata lies, in sectors.
#[derive(Clone, Debug)]
struct Layout {
    format: Format,
    l1: (u64, u64),
    table: (u64, u64),
    /// Clusters that are L2 tables or refcount blocks, in order.
    named: Vec<u64>,
}

/// The mark in word 9 of the header, the incompatible features.
const CORRUPT: u64 = 1 << 1;

type Verdict = Result<(), Broken>;

fn overlap(one: (u64, u64), other: (u64, u64)) -> bool {
    one.0 < other.1 && other.0 < one.1
}

fn sectors(start: u64, len: u64) -> (u64, u64) {
    let sector = SECTOR as u64;
    (start / sector, start.saturating_add(len).div_ceil(sector))
}

/// Does it change a file, or make durable what it holds?
fn changes(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Write { .. }
            | OpKind::WriteZeros { .. }
            | OpKind::CopyWrite { .. }
            | OpKind::MetaWrite { .. }
            | OpKind::ZeroRange { .. }
            | OpKind::Punch { .. }
            | OpKind::Extend { .. }
            | OpKind::Truncate { .. }
            | OpKind::Sync
    )
}

impl Layout {
    /// As a reader finds it.
    fn of(disk: &Disk) -> Self {
        let format = Format::of(&words(disk, 0)).expect("an image that was opened has a header");
        let place = |(first, count): (usize, usize)| (first as u64, (first + count) as u64);
        let l1 = place((format.l1.0, format.l1.1.div_ceil(WORDS)));
        let table = place(format.table);
        let mut named = Vec::new();
        for (range, entries) in [(l1, format.l1.1), (table, usize::MAX)] {
            let all = (range.0..range.1).flat_map(|sector| words(disk, sector)).take(entries);
            named.extend(all.filter_map(|word| format.pointer(word)));
        }
        named.sort_unstable();
        Self { format, l1, table, named }
    }

    /// Which metadata lies there.
    fn found(&self, range: (u64, u64)) -> Option<&'static str> {
        let per_cluster = self.format.sectors() as u64;
        let (first, end) = (range.0 / per_cluster, range.1.div_ceil(per_cluster));
        let next = self.named.partition_point(|&cluster| cluster < first);
        match range {
            _ if range.0 < per_cluster => Some("the header"),
            _ if overlap(range, self.l1) => Some("the L1 table"),
            _ if overlap(range, self.table) => Some("the refcount table"),
            _ if self.named.get(next).is_some_and(|&cluster| cluster < end) => {
                Some("an L2 table or refcount block")
            }
            _ => None,
        }
    }
}

fn words(disk: &Disk, sector: u64) -> [u64; WORDS] {
    let at = usize::try_from(sector).expect("a place in memory");
    *disk.pool().borrow().words(disk.sectors().get(at).copied().unwrap_or_default())
}

impl Fence {
    pub(crate) fn new(options: &Options, virtual_size: u64, protected: &[Extent]) -> Self {
        let protected = protected.iter().map(|extent| sectors(extent.offset, extent.len));
        Self {
            read_only: options.read_only,
            virtual_size,
            protected: protected.collect(),
            latched: false,
            mark_synced: false,
            synced: false,
            layout: None,
        }
    }

    /// An operation has ended.
    pub(crate) fn note(&mut self, op: Op, outcome: Outcome) {
        if op.file != FileId::Image {
            return;
        }
        match (op.kind, outcome) {
            (OpKind::MetaWrite { .. } | OpKind::Sync, Outcome::Error(_)) => self.latched = true,
            (OpKind::Sync, _) => self.synced = true,
            _ => {}
        }
        if matches!(op.kind, OpKind::MetaWrite { .. } | OpKind::Truncate { .. }) {
            self.layout = None;
        }
    }

    /// May this be done?
    pub(crate) fn check(&mut self, disk: &Disk, op: Op, submitted: &Submitted) -> Verdict {
        if !changes(op.kind) {
            return Ok(());
        }
        let refuse = |rule| Err(Broken::new(rule, format!("{op:?}")));
        match op.file {
            FileId::Backing(_) | FileId::BackingData(_) => {
                return refuse("what lies beneath is never written");
            }
            _ if self.read_only => return refuse("what is opened read-only is never written"),
            _ if self.latched && !self.is_mark(disk, op, submitted) => {
                return refuse("nothing but reads follows a failure of metadata or a sync");
            }
            FileId::Data => return self.check_data_file(op),
            FileId::Image if matches!(op.kind, OpKind::Sync) => return Ok(()),
            FileId::Image => {}
        }
        // Unknown autoclear bits are cleared in the header before everything else.
        let first = matches!(op.kind, OpKind::MetaWrite { offset: 0, .. });
        if !self.synced && !first {
            return refuse("a writable open begins with a sync");
        }
        let layout = match self.layout.take() {
            Some(layout) => layout,
            None => Layout::of(disk),
        };
        let verdict = self.check_change(&layout, disk, submitted);
        self.layout = Some(layout);
        verdict
    }

    /// After a failure: does this say in the header that the image is corrupt, and no more, or make
    /// that durable?
    fn is_mark(&mut self, disk: &Disk, op: Op, submitted: &Submitted) -> bool {
        if op.file != FileId::Image {
            return false;
        }
        match op.kind {
            OpKind::MetaWrite { offset, .. } => {
                let written = (offset / SECTOR as u64..).zip(&submitted.payload);
                written.into_iter().all(|(sector, &id)| {
                    let mut marked = words(disk, sector);
                    let new = *disk.pool().borrow().words(id);
                    marked[9] |= if sector == 0 { CORRUPT } else { 0 };
                    new == marked || new == words(disk, sector)
                })
            }
            OpKind::Sync => {
                let marked = words(disk, 0)[9] & CORRUPT != 0;
                marked && !core::mem::replace(&mut self.mark_synced, true)
            }
            _ => false,
        }
    }

    fn check_data_file(&self, op: Op) -> Verdict {
        let end = match op.kind {
            OpKind::Write { offset, len, .. }
            | OpKind::WriteZeros { offset, len }
            | OpKind::CopyWrite { offset, len, .. } => offset.saturating_add(len.into()),
            OpKind::Punch { offset, len } | OpKind::ZeroRange { offset, len } => {
                offset.saturating_add(len)
            }
            OpKind::Sync => 0,
            _ => u64::MAX,
        };
        // The last cluster may be written as a whole; none is larger than 2 MiB.
        if end > self.virtual_size.next_multiple_of(2 << 20) {
            let rule = "a data file has guest data, and no more than fits the virtual disk";
            return Err(Broken::new(rule, format!("{op:?} of {}", self.virtual_size)));
        }
        Ok(())
    }

    /// A change of the image itself.
    fn check_change(&self, layout: &Layout, disk: &Disk, submitted: &Submitted) -> Verdict {
        let cluster = SECTOR as u64 * layout.format.sectors() as u64;
        let refuse = |rule, what: &str| {
            Err(Broken::new(rule, format!("{:?}: {what}, length {}", submitted.kind, disk.len())))
        };
        match submitted.kind {
            OpKind::Extend { from, to } => {
                let hole = from.saturating_sub(disk.len().next_multiple_of(cluster));
                let counted = cluster << layout.format.block_bits();
                if hole > counted.saturating_mul(layout.named.len() as u64) {
                    return refuse("a hole is over clusters that are counted", "");
                }
                let most = disk.len().saturating_mul(12).saturating_add(cluster * 128 + (64 << 10));
                let most = most.saturating_add(hole);
                return if to <= most { Ok(()) } else { refuse("the file grows by steps", "") };
            }
            OpKind::Truncate { to } => {
                let ends = [layout.l1.1, layout.table.1].into_iter();
                let named = layout.named.iter().map(|&at| at * cluster / SECTOR as u64 + 1);
                let protected = self.protected.iter().map(|&(_, end)| end);
                let end = ends.chain(named).chain(protected).max().unwrap_or(0);
                let end = (end * SECTOR as u64).min(disk.len());
                let rule = "no metadata is cut off";
                return if end <= to { Ok(()) } else { refuse(rule, &format!("{end}")) };
            }
            _ => {}
        }
        let Some(range) = submitted.writes() else { return Ok(()) };
        let range = (range.start as u64, range.end as u64);
        if range.1 * SECTOR as u64 > disk.len().next_multiple_of(cluster) {
            return refuse("nothing is written behind the end of the file", "");
        }
        if self.protected.iter().any(|&other| overlap(range, other)) {
            return refuse("what is protected is never written", "a snapshot's or bitmap's");
        }
        if submitted.is_metadata() {
            return layout.check_metadata(disk, range.0, submitted);
        }
        match layout.found(range) {
            Some(what) => refuse("guest data is never written where metadata lies", what),
            None => Ok(()),
        }
    }
}

impl Layout {
    fn check_metadata(&self, disk: &Disk, first: u64, submitted: &Submitted) -> Verdict {
        for (sector, &id) in (first..).zip(&submitted.payload) {
            let new = *disk.pool().borrow().words(id);
            let old = words(disk, sector);
            let changed = (0..WORDS).filter(|&at| old[at] != new[at]);
            let refuse = |rule, at: usize| {
                let (old, new) = (old[at], new[at]);
                let what = format!("word {at} of sector {sector} from {old:#x} to {new:#x}");
                Err(Broken::new(rule, what))
            };
            let inside = |range: (u64, u64)| range.0 <= sector && sector < range.1;
            for at in changed {
                if sector < self.format.sectors() as u64 {
                    // Refcount table; incompatible and autoclear features.
                    if sector != 0 || ![6, 7, 9, 11].contains(&at) {
                        return refuse("most of the header never changes", at);
                    }
                } else if inside(self.l1) {
                    // Behind its last entry the table may be filled up with zeros.
                    let entry = usize::try_from(sector - self.l1.0).expect("in the table") * WORDS;
                    if entry + at >= self.format.l1.1 && new[at] == 0 {
                        continue;
                    }
                    if !self.may_name(disk, new[at]) || new[at] & COPIED == 0 {
                        return refuse("an L1 entry leads to an L2 table of its own", at);
                    }
                } else if inside(self.table) && (old[at] != 0 || !self.may_name(disk, new[at])) {
                    return refuse("a refcount table entry leads to one new block", at);
                }
            }
        }
        Ok(())
    }

    /// May a new entry of a top-level table lead there?
    fn may_name(&self, disk: &Disk, word: u64) -> bool {
        let per_cluster = self.format.sectors() as u64;
        self.format.pointer(word).is_some_and(|cluster| {
            let range = (cluster * per_cluster, (cluster + 1) * per_cluster);
            range.0 * (SECTOR as u64) < disk.len() && self.found(range).is_none()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::vec;

    use super::*;
    use crate::op::OpId;
    use crate::testing::image::ImageSpec;
    use crate::testing::pool::Pool;

    /// Clusters of 512 bytes: the header, the refcount table in 1, the L1 table in 2; the last two
    /// are free.
    fn disk() -> Disk {
        let pool = Pool::shared();
        let spec = ImageSpec { every: 2, ..ImageSpec::plain(9, 32 << 10) };
        let mut bytes = spec.make(&mut pool.borrow_mut()).bytes;
        bytes.resize(bytes.len() + 1024, 0);
        Disk::sharing(&bytes, &pool)
    }

    /// Which rule an operation breaks.
    fn rule(fence: &mut Fence, disk: &Disk, op: Op, bytes: &[u8]) -> Option<&'static str> {
        let mut pool = disk.pool().borrow_mut();
        let payload = bytes.chunks(SECTOR).map(|sector| pool.intern(sector)).collect();
        drop(pool);
        let submitted = Submitted { kind: op.kind, payload, guest: None };
        fence.check(disk, op, &submitted).err().map(|broken| broken.rule)
    }

    fn op(kind: OpKind) -> Op {
        Op { id: OpId(0), file: FileId::Image, kind }
    }

    fn fence(options: &Options, protected: &[Extent]) -> Fence {
        let mut fence = Fence::new(options, 32 << 10, protected);
        fence.note(op(OpKind::Sync), Outcome::Done);
        fence
    }

    #[test]
    fn guest_data_never_hits_metadata_nor_what_is_protected() {
        let disk = disk();
        let last = disk.len() - 512;
        let mut fence = fence(&Options::default(), &[Extent { offset: last - 512, len: 1 }]);
        let layout = Layout::of(&disk);
        let named = layout.named.iter().map(|cluster| cluster * 512);
        let metadata: Vec<u64> = [0, layout.l1.0 * 512, layout.table.0 * 512].into_iter().collect();
        for offset in metadata.into_iter().chain(named).chain([last - 512, last + 512]) {
            let zeros = op(OpKind::WriteZeros { offset, len: 512 });
            assert!(rule(&mut fence, &disk, zeros, &[0; 512]).is_some(), "{offset}");
            let punch = op(OpKind::Punch { offset, len: 512 });
            assert!(rule(&mut fence, &disk, punch, &[]).is_some(), "{offset}");
        }
        let zeros = op(OpKind::WriteZeros { offset: last, len: 512 });
        assert_eq!(rule(&mut fence, &disk, zeros, &[0; 512]), None);
        let beneath = Op { file: FileId::Backing(0), ..zeros };
        assert!(rule(&mut fence, &disk, beneath, &[0; 512]).unwrap().contains("beneath"));
    }

    #[test]
    fn metadata_keeps_to_its_place() {
        let disk = disk();
        let mut fence = fence(&Options::default(), &[]);
        let layout = Layout::of(&disk);
        let mut try_word = |sector: u64, at: usize, word: u64| {
            let mut bytes = vec![0; 512];
            disk.read(sector * 512, &mut bytes);
            bytes[at * 8..][..8].copy_from_slice(&word.to_be_bytes());
            let write = op(OpKind::MetaWrite { offset: sector * 512, len: 512 });
            rule(&mut fence, &disk, write, &bytes)
        };
        let free = (disk.len() - 512) | COPIED;
        assert_eq!(try_word(layout.l1.0, 0, free), None);
        assert_eq!(try_word(layout.table.0, 1, free & !COPIED), None);
        assert_eq!(try_word(0, 9, 2), None);
        for (sector, at, word) in [
            (0, 5, 0),
            (layout.l1.0, 0, 0),
            (layout.l1.0, 0, free & !COPIED),
            (layout.l1.0, 1, (layout.table.0 * 512) | COPIED),
            (layout.table.0, 0, free & !COPIED),
            (layout.table.0, 1, layout.named[0] * 512),
            (layout.table.0, 1, disk.len()),
        ] {
            assert!(try_word(sector, at, word).is_some(), "{sector} {at} {word:#x}");
        }
    }

    #[test]
    fn what_is_read_only_or_has_failed_is_never_written() {
        let disk = disk();
        let zeros = op(OpKind::WriteZeros { offset: disk.len() - 512, len: 512 });
        let read_only = Options { read_only: true, ..Options::default() };
        for (mut fence, phrase) in [
            (fence(&read_only, &[]), "read-only"),
            (Fence::new(&Options::default(), 512, &[]), "begins with a sync"),
        ] {
            assert!(rule(&mut fence, &disk, zeros, &[0; 512]).unwrap().contains(phrase));
        }
        let mut fence = fence(&Options::default(), &[]);
        assert_eq!(rule(&mut fence, &disk, zeros, &[0; 512]), None);
        let write = op(OpKind::MetaWrite { offset: 0, len: 512 });
        fence.note(write, Outcome::Error(crate::IoErrorKind::Io));
        assert!(rule(&mut fence, &disk, zeros, &[0; 512]).unwrap().contains("failure"));
        // But for the mark, and one sync when it is there.
        let sync = op(OpKind::Sync);
        assert!(rule(&mut fence, &disk, sync, &[]).unwrap().contains("failure"));
        let mut header = disk.bytes()[..512].to_vec();
        header[79] |= 2;
        assert_eq!(rule(&mut fence, &disk, write, &header), None);
        let other = FileId::Data;
        assert!(rule(&mut fence, &disk, Op { file: other, ..write }, &header).is_some());
        let (mut bytes, pool) = (disk.bytes(), Pool::shared());
        bytes[..512].copy_from_slice(&header);
        let marked = Disk::sharing(&bytes, &pool);
        assert_eq!(rule(&mut fence, &marked, sync, &[]), None);
        assert!(rule(&mut fence, &marked, sync, &[]).unwrap().contains("failure"));
        header[79] |= 1;
        assert!(rule(&mut fence, &disk, write, &header).unwrap().contains("failure"));
    }

    #[test]
    fn the_length_changes_by_steps_and_cuts_nothing_off() {
        let disk = disk();
        let extend = |to| op(OpKind::Extend { from: 0, to });
        let mut fence = fence(&Options::default(), &[]);
        assert_eq!(rule(&mut fence, &disk, extend(disk.len() + 512), &[]), None);
        assert!(rule(&mut fence, &disk, extend(1 << 40), &[]).is_some());
        // Blocks of clusters of 512 bytes count 256 each.
        let named = Layout::of(&disk).named.len() as u64;
        let hole = |clusters| {
            let from = disk.len().next_multiple_of(512) + clusters * 512;
            op(OpKind::Extend { from, to: from + 512 })
        };
        assert_eq!(rule(&mut fence, &disk, hole(named * 256), &[]), None);
        assert!(rule(&mut fence, &disk, hole(named * 256 + 1), &[]).is_some());
        let truncate = |to| op(OpKind::Truncate { to });
        assert_eq!(rule(&mut fence, &disk, truncate(disk.len()), &[]), None);
        assert!(rule(&mut fence, &disk, truncate(1024), &[]).is_some());
    }
}
