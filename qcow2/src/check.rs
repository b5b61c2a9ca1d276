//! An independent consistency checker: counts what an image references, and compares.
//!
//! It shares no code with the engine, not even the constants of the format, so that a bug in how
//! the engine reads or writes a table cannot hide here. It is fast on tiny images, since the crash
//! explorer calls it millions of times; there, keep a [`Checker`] (1.7 µs for 52 KiB in clusters
//! of 512 bytes).
//!
//! The work and the memory of a check follow from the length of the file, whatever its header
//! claims. It takes 20 bytes per cluster (320 MiB for 1 TiB in clusters of 64 KiB); refcounts are
//! read once per cluster of the file, and each L2 table is walked once, with the number of
//! references to it as a weight. It never panics; what cannot be judged is an error.
//!
//! # What is counted
//!
//! As `qemu-img check` (10.0) counts, so that the numbers can be compared:
//!
//! - a leak: a cluster whose refcount is higher than the number of references to it;
//! - a corruption: a cluster whose refcount is lower; a flag COPIED in the active tables that is
//!   set where the refcount is not 1, or the other way round; an entry that is unaligned, has
//!   reserved bits set, or leads behind the end of the file (the last cluster may be cut short); a
//!   refcount block referenced twice; a malformed subcluster bitmap, snapshot or bitmap entry.
//!
//! Covered: versions 2 and 3, all refcount widths, zero and compressed clusters, internal
//! snapshots, extended L2 entries, external data files, persistent bitmaps, the LUKS header.
//!
//! # Where `qemu-img check` differs
//!
//! Corruptions that it does not count; ours are more by exactly these:
//!
//! 1. **Hidden overlaps** ([`FindingKind::Overlap`]). A cluster with two uses that exclude each
//!    other (say, an L2 table that is guest data, too) whose refcount covers both. It only looks at
//!    refcounts.
//! 2. **COPIED without an offset** ([`FindingKind::CopiedWithoutOffset`]) where there is no
//!    external data file, and **the zero flag** ([`FindingKind::ZeroFlag`]) in version 2 or with
//!    extended L2 entries. It looks at neither, though in version 2 it fails to read the cluster.
//! 3. **What begins behind the end of the file** but ends less than one cluster behind it
//!    ([`FindingKind::BeginsBeyondEnd`]): compressed data, and tables shorter than a cluster. It
//!    only looks at the end.
//!
//! Where both find corruptions, but it stops early:
//!
//! 4. **It gives up** on a bad directory of bitmaps or snapshots, and prints no numbers. Here, what
//!    follows in that directory is not counted, all else is.
//! 5. **It cannot get refcounts** from a block whose offset is unaligned or beyond 2^63; it counts
//!    each as a "check error" and stops comparing. Here they are read as they are, or as 0.
//!
//! 6. **It wants the external data file, the backing file, or a key**, and does nothing without.
//!    Here, none is opened.
//! 7. **A header that the end of the file cuts short** is filled up with zeros there, and judged.
//!    Here, it is an error.
//!
//! What it cannot open at all, for its header, is [`CheckError::Header`] here.
//!
//! Refcounts of clusters behind the end of the file are looked at by neither. The offset in an
//! external data file is not compared to the guest offset by either.

use alloc::vec::Vec;

mod extras;
mod header;
mod limits;
mod refcounts;
pub mod repair;
mod verdict;
mod walk;

use extras::Edges;
use header::Head;
pub use limits::{Limits, check_within, memory_for};
pub use verdict::{CheckError, Finding, FindingKind, ReadError, Report, Summary};

/// How many findings are kept.
const MAX_FINDINGS: usize = 64;
/// Files of more clusters than this are not judged (nor by QEMU).
const MAX_CLUSTERS: u64 = 0x7fff_fffe;
const TOO_MANY: CheckError = CheckError::Unsupported("2^32 references to one cluster");

/// A file that can be read at any place.
pub trait ReadAt {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether there is nothing in it.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` with what is at `offset`; zeros behind the end.
    ///
    /// # Errors
    /// Where the file cannot be read.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError>;

    /// The `len` bytes at `offset`, where they lie in memory anyway.
    fn bytes(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let _ = (offset, len);
        None
    }
}

impl ReadAt for [u8] {
    fn len(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let rest = self.get(index(offset)..).unwrap_or_default();
        let there = rest.len().min(buf.len());
        let (head, tail) = buf.split_at_mut(there);
        head.copy_from_slice(&rest[..there]);
        tail.fill(0);
        Ok(())
    }

    fn bytes(&self, offset: u64, len: usize) -> Option<&[u8]> {
        self.get(index(offset)..)?.get(..len)
    }
}

/// Checks an image.
///
/// # Errors
/// Where it cannot be judged; see [`CheckError`].
pub fn check<R: ReadAt + ?Sized>(image: &R) -> Result<Report, CheckError> {
    check_with(image, &mut |_, _| {})
}

/// Checks an image, and calls `progress(done, total)` now and then.
///
/// # Errors
/// Where it cannot be judged; see [`CheckError`].
pub fn check_with<R: ReadAt + ?Sized>(
    image: &R,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Report, CheckError> {
    let mut checker = Checker::new();
    let head = Head::parse(image)?;
    checker.walk(image, head, progress)?;
    Ok(checker.state.report())
}

/// A checker that keeps its memory from one image to the next.
#[derive(Debug)]
pub struct Checker {
    state: State,
}

impl Default for Checker {
    fn default() -> Self {
        Self::new()
    }
}

impl Checker {
    /// A checker that holds no memory yet.
    #[must_use]
    pub fn new() -> Self {
        Self::with_findings(MAX_FINDINGS)
    }

    /// A checker that keeps the first `most` findings, not the first 64.
    #[must_use]
    pub fn with_findings(most: usize) -> Self {
        Self { state: State { most_findings: most, ..State::default() } }
    }

    /// Checks an image that is in memory.
    ///
    /// # Errors
    /// Where it cannot be judged; see [`CheckError`].
    pub fn check_bytes(&mut self, image: &[u8]) -> Result<Summary, CheckError> {
        self.check(image)
    }

    /// Checks an image.
    ///
    /// # Errors
    /// Where it cannot be judged; see [`CheckError`].
    pub fn check<R: ReadAt + ?Sized>(&mut self, image: &R) -> Result<Summary, CheckError> {
        let head = Head::parse(image)?;
        self.walk(image, head, &mut |_, _| {})?;
        let State { corruptions, leaks, ref findings, .. } = self.state;
        Ok(Summary { corruptions, leaks, first: findings.first().copied() })
    }

    /// Counts what an image references, from the tables that `head` names.
    fn walk<R: ReadAt + ?Sized>(
        &mut self,
        image: &R,
        head: Head,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), CheckError> {
        self.state.clear();
        let len = image.len();
        Walk { image, head, len, state: &mut self.state, progress }.run()
    }

    /// The first things found by the last check.
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.state.findings
    }
}

/// What a cluster is used for: one bit per use.
struct Kind;

impl Kind {
    const HEADER: u16 = 1;
    const L1: u16 = 1 << 1;
    const L2: u16 = 1 << 2;
    const REFCOUNT_TABLE: u16 = 1 << 3;
    const REFCOUNT_BLOCK: u16 = 1 << 4;
    const SNAPSHOT_TABLE: u16 = 1 << 5;
    const BITMAP_DIRECTORY: u16 = 1 << 6;
    const BITMAP_TABLE: u16 = 1 << 7;
    const BITMAP: u16 = 1 << 8;
    const ENCRYPTION: u16 = 1 << 9;
    const DATA: u16 = 1 << 10;
    const COMPRESSED: u16 = 1 << 11;
    /// What has references to other clusters in it, other than the header and the refcounts.
    const TABLES: u16 =
        Self::L1 | Self::L2 | Self::SNAPSHOT_TABLE | Self::BITMAP_DIRECTORY | Self::BITMAP_TABLE;
    /// Not a use that counts: the beginning of something that reaches over the end of the file.
    const CUT_SHORT: u16 = 1 << 14;
    /// Not a use: a repair has lowered its refcount.
    const LOWERED: u16 = 1 << 15;
    /// What may be referenced more than once.
    const SHAREABLE: u16 = Self::L2 | Self::DATA | Self::COMPRESSED;
}

/// What is known of one cluster of the file.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// The refcount on disk.
    count: u32,
    /// References found.
    refs: u32,
    /// References from active L1 tables, where this is an L2 table.
    active: u32,
    /// References from L1 tables of snapshots.
    inactive: u32,
    /// What the references take it for.
    kinds: u16,
}

#[derive(Debug, Default)]
struct State {
    /// One per cluster of the file, and one for what may hang over its end.
    slots: Vec<Slot>,
    /// Clusters of the file, or one more if something hangs over.
    used_slots: usize,
    /// Bytes of misplaced L2 tables that may still be looked at.
    budget: u64,
    areas: Edges,
    tables: Edges,
    findings: Vec<Finding>,
    most_findings: usize,
    forbids_writing: Option<Finding>,
    corruptions: u64,
    extra: u64,
    leaks: u64,
    allocated: u64,
    fragmented: u64,
    compressed: u64,
    guest_clusters: u64,
    /// Where the next guest cluster of an L2 table lies, if they lie one after the other.
    expected_next: u64,
    host_clusters: u64,
    image_end: u64,
    dirty: bool,
    corrupt: bool,
    /// A table was not followed to its end, so that references are missing.
    incomplete: bool,
    /// Entries without COPIED that should have it.
    not_copied: u64,
    /// Flags COPIED that are wrong.
    wrong_flags: bool,
    /// Refcounts that are too low, or of no use.
    low_refcounts: bool,
    /// There are more references to a cluster than its refcount can hold.
    overflows: bool,
    /// An entry of the refcount table is of no use.
    bad_blocks: bool,
    /// The first cluster behind the file that something leads to.
    first_beyond: Option<u64>,
}

impl State {
    /// Forgets the last image, but keeps the memory.
    fn clear(&mut self) {
        self.slots.clear();
        self.areas.clear();
        self.tables.clear();
        self.findings.clear();
        (self.corruptions, self.extra, self.leaks) = (0, 0, 0);
        (self.allocated, self.fragmented, self.compressed) = (0, 0, 0);
        (self.incomplete, self.bad_blocks, self.first_beyond) = (false, false, None);
        self.not_copied = 0;
        (self.wrong_flags, self.low_refcounts, self.overflows) = (false, false, false);
        self.forbids_writing = None;
    }

    fn report(&self) -> Report {
        Report {
            corruptions: self.corruptions,
            extra: self.extra,
            leaks: self.leaks,
            allocated: self.allocated,
            fragmented: self.fragmented,
            compressed: self.compressed,
            guest_clusters: self.guest_clusters,
            host_clusters: self.host_clusters,
            image_end: self.image_end,
            dirty: self.dirty,
            corrupt: self.corrupt,
            findings: self.findings.clone(),
            forbids_writing: self.forbids_writing,
        }
    }
}

/// One check under way.
struct Walk<'a, R: ReadAt + ?Sized> {
    image: &'a R,
    head: Head,
    len: u64,
    state: &'a mut State,
    progress: &'a mut dyn FnMut(u64, u64),
}

impl<R: ReadAt + ?Sized> Walk<'_, R> {
    fn run(&mut self) -> Result<(), CheckError> {
        let clusters = self.len.div_ceil(self.head.cluster_size());
        if clusters > MAX_CLUSTERS {
            return Err(CheckError::TooLarge);
        }
        let slots = index(clusters);
        self.state.slots.try_reserve(slots + 1).map_err(|_| CheckError::TooLarge)?;
        self.state.slots.resize(slots + 1, Slot::default());
        self.state.used_slots = slots;
        self.state.host_clusters = clusters;
        self.state.guest_clusters = self.head.virtual_size.div_ceil(self.head.cluster_size());
        self.state.budget = self.len;
        (self.state.dirty, self.state.corrupt) = (self.head.dirty, self.head.corrupt);
        self.load_refcounts()?;
        self.mark(0, self.head.cluster_size(), Kind::HEADER, 1, 0)?;
        self.active_l1()?;
        self.snapshots()?;
        self.l2_tables()?;
        let table = self.head.refcount_table;
        self.mark(table.start, table.len, Kind::REFCOUNT_TABLE, 1, table.start)?;
        let luks = self.head.encryption;
        self.mark(luks.start, luks.len, Kind::ENCRYPTION, 1, luks.start)?;
        self.bitmaps()?;
        self.refcount_blocks()?;
        self.compare();
        Ok(())
    }

    /// Judges a range by the end of the file. Returns whether its clusters can be counted.
    fn beyond(&mut self, start: u64, end: u64, times: u32, at: u64) -> bool {
        // The last cluster may be cut short, so less than one cluster may be missing; QEMU knows
        // the length in whole sectors only.
        let sectors_end = self.len.next_multiple_of(512);
        let countable = end.saturating_sub(sectors_end) < self.head.cluster_size();
        if !countable {
            self.note(FindingKind::BeyondEnd, at, start, self.len, times);
            let cluster = start.max(self.len) >> self.head.cluster_bits;
            let first = self.state.first_beyond.unwrap_or(cluster);
            self.state.first_beyond = Some(first.min(cluster));
        } else if start >= self.len {
            self.note(FindingKind::BeginsBeyondEnd, at, start, self.len, times);
        }
        countable
    }

    /// Remembers the part of a range that is in the file. It does not count, but is no free space.
    fn cut_short(&mut self, start: u64, end: u64) {
        let bits = self.head.cluster_bits;
        let clusters = index(self.state.host_clusters);
        let last = index(end.div_ceil(1 << bits)).min(clusters);
        for slot in self.state.slots[..last].iter_mut().skip(index(start >> bits)) {
            slot.kinds |= Kind::CUT_SHORT;
        }
    }

    /// Counts `times` references to the clusters of a range.
    fn mark(
        &mut self,
        start: u64,
        len: u64,
        kind: u16,
        times: u32,
        at: u64,
    ) -> Result<(), CheckError> {
        let end = start.saturating_add(len);
        if len == 0 {
            return Ok(());
        }
        if !self.beyond(start, end, times, at) {
            self.cut_short(start, end);
            return Ok(());
        }
        let bits = self.head.cluster_bits;
        self.mark_clusters(start >> bits, (end - 1) >> bits, kind, times)
    }

    /// Compares refcounts with references.
    fn compare(&mut self) {
        let largest = self.head.largest_refcount();
        let mut last = 0;
        for nth in 0..self.state.used_slots {
            let slot = self.state.slots[nth];
            let at = (nth as u64) << self.head.cluster_bits;
            if slot.count | slot.refs != 0 {
                last = nth as u64;
            }
            if slot.refs > largest {
                let (refs, excess) = (slot.refs.into(), slot.refs - largest);
                self.note(FindingKind::RefcountOverflow, at, slot.count.into(), refs, excess);
            }
            let refs = slot.refs.min(largest);
            let (count, expected) = (slot.count.into(), refs.into());
            if slot.count < refs {
                self.note(FindingKind::RefcountTooLow, at, count, expected, 1);
                continue;
            }
            if slot.count > refs {
                self.note(FindingKind::Leak, at, count, expected, 1);
            }
            let kinds = slot.kinds & !Kind::CUT_SHORT;
            let exclusive = kinds & !Kind::SHAREABLE != 0 && slot.refs > 1;
            let shown = kinds & Kind::REFCOUNT_BLOCK != 0 || slot.refs > largest;
            let several = kinds & kinds.wrapping_sub(1) != 0;
            if (exclusive || several) && !shown {
                self.note(FindingKind::Overlap, at, kinds.into(), expected, 1);
            }
        }
        self.state.image_end = (last + 1) << self.head.cluster_bits;
    }

    /// Something is wrong, `times` over.
    #[cold]
    fn note(&mut self, kind: FindingKind, at: u64, found: u64, expected: u64, times: u32) {
        let counter = match kind {
            FindingKind::Leak => &mut self.state.leaks,
            _ => &mut self.state.corruptions,
        };
        *counter = counter.saturating_add(times.into());
        match kind {
            FindingKind::RefcountTooLow | FindingKind::SharedRefcountBlock => {
                self.state.low_refcounts = true;
            }
            FindingKind::RefcountOverflow => self.state.overflows = true,
            FindingKind::NotCopied => {
                self.state.wrong_flags = true;
                self.state.not_copied = self.state.not_copied.saturating_add(times.into());
            }
            FindingKind::Copied
            | FindingKind::CopiedCompressed
            | FindingKind::CopiedWithoutOffset => self.state.wrong_flags = true,
            _ => {}
        }
        if kind.is_extra() {
            self.state.extra = self.state.extra.saturating_add(times.into());
        }
        let finding = Finding { kind, at, found, expected, times };
        if kind.forbids_writing() {
            self.state.forbids_writing.get_or_insert(finding);
        }
        if self.state.findings.len() < self.state.most_findings {
            self.state.findings.push(finding);
        }
    }
}

/// As an index into memory; one that nothing has, where memory cannot be that large.
fn index(place: u64) -> usize {
    usize::try_from(place).unwrap_or(usize::MAX)
}

fn read<R: ReadAt + ?Sized>(image: &R, offset: u64, buf: &mut [u8]) -> Result<(), CheckError> {
    image.read_at(offset, buf).map_err(|_| CheckError::Unreadable(offset))
}

/// Calls `visit` for what lies between two places, piece by piece. Stops at the end of the file,
/// but completes its last 16 bytes with zeros.
fn pieces<R: ReadAt + ?Sized>(
    image: &R,
    start: u64,
    end: u64,
    mut visit: impl FnMut(u64, &[u8]) -> Result<(), CheckError>,
) -> Result<(), CheckError> {
    let end = end.min(image.len().checked_next_multiple_of(16).unwrap_or(u64::MAX));
    if start >= end {
        return Ok(());
    }
    if let Some(bytes) = image.bytes(start, index(end - start)) {
        return visit(start, bytes);
    }
    let mut buffer = [0; 4096];
    let mut at = start;
    while at < end {
        let len = index(end - at).min(buffer.len());
        read(image, at, &mut buffer[..len])?;
        visit(at, &buffer[..len])?;
        at += len as u64;
    }
    Ok(())
}
