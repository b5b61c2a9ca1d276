//! The rules of order, seen from the disk: which operation may be submitted when.
//!
//! The disk knows every content that a crash may leave in a sector (the durable one and those of
//! all changes since). From these it decodes, with code of its own, every table word that a crash
//! may leave, and refuses an operation that would make a wrong state possible: an L2 entry whose
//! refcount may still be lost, a decrement under an entry that may still come back, and so on. What
//! it refuses has a name ([`Broken::rule`]), and a test that breaks it.
//!
//! Judging all states of a crash would find most of these too. But a broken rule is found in the
//! run itself, whatever states are picked, and says at once which edge is missing.

use std::rc::Rc;
use std::string::String;
use std::vec::Vec;

use crate::op::{OpId, OpKind};
use crate::testing::disk::{Change, Disk, Structure};
use crate::testing::format::{COMPRESSED, COPIED, Unit};
use crate::testing::pool::{SECTOR, SectorId, WORDS};
use crate::testing::size;

mod layout;
#[cfg(test)]
mod tests;

use layout::{From, Layout, Reference};

/// A rule was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Which.
    pub rule: &'static str,
    /// By what.
    pub detail: String,
}

impl Broken {
    pub(crate) fn new(rule: &'static str, detail: String) -> Self {
        Self { rule, detail }
    }
}

/// An operation, as the disk gets it.
#[derive(Clone, Debug)]
pub struct Submitted {
    /// What to do.
    pub kind: OpKind,
    /// What a write puts there, in sectors.
    pub payload: Vec<SectorId>,
    /// The guest sector that a payload operation begins with.
    pub guest: Option<u64>,
}

impl Submitted {
    /// The sectors that it writes.
    pub(crate) fn writes(&self) -> Option<core::ops::Range<usize>> {
        let (offset, len) = match self.kind {
            OpKind::Write { offset, len, .. }
            | OpKind::WriteZeros { offset, len }
            | OpKind::CopyWrite { offset, len, .. }
            | OpKind::MetaWrite { offset, len } => (offset, u64::from(len)),
            OpKind::Punch { offset, len } | OpKind::ZeroRange { offset, len } => (offset, len),
            _ => return None,
        };
        let first = size(offset / SECTOR as u64);
        Some(first..first + size(len / SECTOR as u64))
    }

    pub(crate) fn is_metadata(&self) -> bool {
        matches!(self.kind, OpKind::MetaWrite { .. })
    }
}

type Verdict = Result<(), Broken>;

fn refuse<T>(rule: &'static str, detail: String) -> Result<T, Broken> {
    Err(Broken { rule, detail })
}

/// Why nothing may be written any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Latch {
    #[default]
    Open,
    /// A metadata write or a sync has failed.
    Failed,
    /// The image contradicts itself: its header is marked, by the operation that is noted here.
    Corrupt(Option<OpId>),
}

/// What the rules remember beyond what the disk does.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Writing has ended.
    latch: Latch,
    /// A sync has succeeded since the image was opened.
    pub(crate) synced: bool,
    /// What snapshots refer to.
    kept: Rc<[Reference]>,
}

/// Says what a guest sector may hold if power is cut now.
type Legal<'a> = &'a dyn Fn(u64, SectorId) -> bool;

impl Rules {
    /// For a disk as it is before anything is written.
    pub(crate) fn of(disk: &Disk) -> Self {
        Self { kept: Rc::from(layout::of_snapshots(disk)), ..Self::default() }
    }

    /// The process has died.
    pub(crate) fn death(&mut self) {
        (self.latch, self.synced) = (Latch::Open, false);
    }

    /// Writing has ended; `corrupt`: since the image contradicts itself. The first reason stays.
    pub(crate) fn latch(&mut self, corrupt: bool) {
        if self.latch == Latch::Open {
            self.latch = if corrupt { Latch::Corrupt(None) } else { Latch::Failed };
        }
    }

    /// This was submitted.
    pub(crate) fn note(&mut self, op: OpId, submitted: &Submitted) {
        if let (Latch::Corrupt(mark), true) = (&mut self.latch, submitted.is_metadata()) {
            mark.get_or_insert(op);
        }
    }

    /// After a failure nothing is written, but for the mark of an image that contradicts itself:
    /// by one operation (which may be short, and go on), and synced.
    fn check_after_latch(&self, disk: &Disk, op: OpId, submitted: &Submitted) -> Verdict {
        let detail = std::format!("{:?}", submitted.kind);
        let Latch::Corrupt(mark) = self.latch else {
            return refuse("nothing but reads follows a failure of metadata or a sync", detail);
        };
        let may = match submitted.kind {
            OpKind::Sync => mark.is_some(),
            OpKind::MetaWrite { offset: 0, .. } => {
                mark.is_none_or(|mark| mark == op) && marks_only(disk, &submitted.payload)
            }
            _ => false,
        };
        if !may {
            return refuse("an image found corrupt is marked so, once, and left alone", detail);
        }
        disk.no_overlap(submitted)
    }

    /// What an operation is about.
    pub(crate) fn structure(disk: &Disk, submitted: &Submitted) -> Structure {
        let Some(sectors) = submitted.writes() else { return Structure::Data };
        if !submitted.is_metadata() {
            return Structure::Data;
        }
        Layout::of(disk).structure(sectors.start)
    }

    /// May this be submitted?
    pub(crate) fn check(
        &self,
        disk: &Disk,
        op: OpId,
        submitted: &Submitted,
        legal: Legal,
    ) -> Verdict {
        if submitted.kind.only_reads() {
            return Ok(());
        }
        if self.latch != Latch::Open {
            return self.check_after_latch(disk, op, submitted);
        }
        if !self.synced && !matches!(submitted.kind, OpKind::Sync) {
            let detail = std::format!("{:?}", submitted.kind);
            return refuse("a writable open begins with a sync", detail);
        }
        disk.no_overlap(submitted)?;
        let layout = Layout::of(disk);
        self.check_kept(&layout, submitted)?;
        match submitted.kind {
            OpKind::MetaWrite { .. } => layout.check_metadata(disk, submitted, (legal, &self.kept)),
            OpKind::Write { .. } | OpKind::WriteZeros { .. } | OpKind::CopyWrite { .. } => {
                layout.check_data(disk, submitted)
            }
            OpKind::Punch { .. } | OpKind::ZeroRange { .. } => layout.check_punch(disk, submitted),
            OpKind::Truncate { to } => layout.check_truncate(disk, to),
            _ => Ok(()),
        }
    }

    /// What a snapshot refers to is never written.
    fn check_kept(&self, layout: &Layout, submitted: &Submitted) -> Verdict {
        let per_cluster = layout.format.sectors();
        let sectors = match submitted.kind {
            OpKind::Truncate { to } => size(to) / SECTOR..usize::MAX,
            _ => submitted.writes().unwrap_or(0..0),
        };
        let clusters = sectors.start / per_cluster..sectors.end.div_ceil(per_cluster);
        let hit = self.kept.iter().find(|kept| clusters.contains(&size(kept.cluster)));
        hit.map_or(Ok(()), |kept| {
            let detail = std::format!("{:?} hits {kept:?}", submitted.kind);
            refuse("what a snapshot refers to never changes", detail)
        })
    }
}

/// Is this what the header holds already, of version 3, with the bit "corrupt"?
fn marks_only(disk: &Disk, payload: &[SectorId]) -> bool {
    let pool = disk.pool().borrow();
    payload.iter().enumerate().all(|(sector, &id)| {
        disk.possible(sector).any(|before| {
            let mut words = *pool.words(before);
            if sector == 0 {
                words[9] |= 2;
            }
            words == *pool.words(id) && (sector != 0 || words[0] << 32 >> 32 == 3)
        })
    })
}

/// The parts of `new` words that differ, `step` at a time: their number, and what they are now.
fn changed(new: &[u64; WORDS], old: &[u64; WORDS], step: usize) -> Vec<(usize, [u64; 2])> {
    let differs = |at: &usize| new[*at..at + step] != old[*at..at + step];
    let entry = |at: usize| (at / step, [new[at], if step == 2 { new[at + 1] } else { 0 }]);
    (0..WORDS).step_by(step).filter(differs).map(entry).collect()
}

impl Layout {
    fn check_metadata(
        &self,
        disk: &Disk,
        submitted: &Submitted,
        (legal, kept): (Legal, &[Reference]),
    ) -> Verdict {
        let first = submitted.writes().expect("a write").start;
        let pool = disk.pool().borrow();
        for (sector, &id) in (first..).zip(&submitted.payload) {
            let durable = *pool.words(disk.durable.get(sector).copied().unwrap_or_default());
            let words = *pool.words(id);
            match self.structure(sector) {
                Structure::L2 => {
                    let base = self.guest_cluster_of(sector);
                    for (at, entry) in changed(&words, &durable, self.format.entry_words()) {
                        self.check_entry(disk, base + at as u64, entry, legal)?;
                    }
                }
                Structure::L1 => {
                    let base = (sector - self.l1.start) * WORDS;
                    for (at, [word, _]) in changed(&words, &durable, 1) {
                        self.check_link(disk, (base + at) as u64, word, legal)?;
                    }
                }
                Structure::RefcountTable => {
                    for (at, [word, _]) in changed(&words, &durable, 1) {
                        self.check_block(disk, sector, at, word)?;
                    }
                }
                Structure::RefcountBlock => {
                    self.check_refcounts(disk, sector, (&words, &durable), kept)?;
                }
                Structure::Header => self.check_header(disk, sector, &words, &durable)?,
                Structure::NewTable | Structure::Data => {}
            }
        }
        Ok(())
    }

    /// A new L2 entry for guest cluster `guest`.
    fn check_entry(&self, disk: &Disk, guest: u64, entry: [u64; 2], legal: Legal) -> Verdict {
        let format = &self.format;
        if format.data_file {
            // The data file is another disk: the judge sees to it.
            return Ok(());
        }
        if entry[0] & COMPRESSED != 0 {
            let lost = |cluster: &u64| self.refcounts(disk, *cluster).contains(&0);
            return match format.counted(entry[0]).find(lost) {
                None => Ok(()),
                Some(cluster) => refuse(
                    "what an entry points to has a durable refcount",
                    std::format!("compressed entry {:#x}, cluster {cluster}", entry[0]),
                ),
            };
        }
        let Some(cluster) = self.checked_pointer(disk, "an L2 entry", entry[0])? else {
            return Ok(());
        };
        let per_cluster = format.sectors();
        for step in 0..per_cluster {
            if format.unit(entry, step * format.units() / per_cluster) != Unit::Data {
                continue;
            }
            let place = guest * per_cluster as u64 + step as u64;
            let sector = size(cluster) * per_cluster + step;
            if let Some(id) = disk.possible(sector).find(|&id| !legal(place, id)) {
                let what = if id == SectorId::ZERO { "zeros" } else { "other bytes" };
                return refuse(
                    "an L2 entry points to bytes that are durable, or legal in every crash",
                    std::format!("guest sector {place} may find {what} in cluster {cluster}"),
                );
            }
        }
        Ok(())
    }

    /// Refcount, COPIED and end of file of what an L1 or L2 word points to.
    fn checked_pointer(&self, disk: &Disk, what: &str, word: u64) -> Result<Option<u64>, Broken> {
        let Some(cluster) = self.format.pointer(word) else { return Ok(None) };
        let refcounts = self.refcounts(disk, cluster);
        let detail = || std::format!("{what} {word:#x}, refcounts that may be: {refcounts:?}");
        if refcounts.contains(&0) {
            return refuse("what an entry points to has a durable refcount", detail());
        }
        if refcounts.iter().any(|&count| (count == 1) != (word & COPIED != 0)) {
            return refuse("COPIED is set exactly where the refcount is 1", detail());
        }
        if cluster << self.format.bits >= disk.least_len() {
            let detail = std::format!("{what} {word:#x}, the file may have {}", disk.least_len());
            return refuse("what is referenced begins inside the durable file", detail);
        }
        Ok(Some(cluster))
    }

    /// A new L1 entry.
    fn check_link(&self, disk: &Disk, index: u64, word: u64, legal: Legal) -> Verdict {
        let Some(cluster) = self.checked_pointer(disk, "an L1 entry", word)? else {
            return Ok(());
        };
        let (format, per_cluster) = (&self.format, self.format.sectors());
        let sectors = size(cluster) * per_cluster..(size(cluster) + 1) * per_cluster;
        let slot = self.l1.start + size(index) / WORDS;
        let pool = disk.pool().borrow();
        let first = disk.possible(slot).all(|id| {
            let old = pool.words(id)[size(index) % WORDS];
            old == 0 || old == word
        });
        // Entries that have changed since the copy was made are looked at below.
        let copying = |change: &Change| {
            let touched = change.what.sectors(usize::MAX);
            change.structure == Structure::Data
                && touched.start < sectors.end
                && touched.end > sectors.start
        };
        if !first && disk.changes().iter().any(copying) {
            let detail = std::format!("L1 entry {index} becomes {word:#x}");
            return refuse("a copy of an L2 table is durable before it is linked", detail);
        }
        // A first table may have missing sectors; whatever it has must be right.
        for (step, sector) in sectors.clone().enumerate() {
            let base = size(index) * format.entries() + step * WORDS / format.entry_words();
            for id in disk.possible(sector) {
                for (at, entry) in format.entries_of(pool.words(id)) {
                    self.check_entry(disk, (base + at) as u64, entry, legal)?;
                }
            }
        }
        Ok(())
    }

    /// A new refcount table entry, word `word` of `sector`.
    fn check_block(&self, disk: &Disk, sector: usize, word: usize, value: u64) -> Verdict {
        let rule = "a refcount block is complete and durable before it is linked";
        let detail = |why: &str| std::format!("refcount table entry {value:#x}: {why}");
        let pool = disk.pool().borrow();
        if disk.possible(sector).any(|id| ![0, value].contains(&pool.words(id)[word])) {
            return refuse("a refcount block stays where it is", detail("another is there"));
        }
        let Some(cluster) = self.format.pointer(value) else { return Ok(()) };
        self.check_new_block(disk, cluster).map_err(|why| Broken::new(rule, detail(why)))
    }

    fn check_new_block(&self, disk: &Disk, cluster: u64) -> Result<(), &'static str> {
        let per_cluster = self.format.sectors();
        let mut sectors = size(cluster) * per_cluster..(size(cluster) + 1) * per_cluster;
        if !sectors.all(|sector| layout::is_settled(disk, sector)) {
            return Err("some of it may be lost");
        }
        if cluster << self.format.bits >= disk.least_len() {
            return Err("it may lie outside the file");
        }
        Ok(())
    }

    /// New refcounts in a block.
    fn check_refcounts(
        &self,
        disk: &Disk,
        sector: usize,
        (words, durable): (&[u64; WORDS], &[u64; WORDS]),
        kept: &[Reference],
    ) -> Verdict {
        let (base, lanes) = (self.counted_from(sector), self.format.counts_per_word());
        let mut references = self.references(disk);
        references.extend(kept);
        references.sort_unstable_by_key(|reference| (reference.cluster, reference.from));
        for group in references.chunk_by(|one, other| one.cluster == other.cluster) {
            let cluster = group[0].cluster;
            let Some(at) = cluster.checked_sub(base).map(size) else { continue };
            let at = (at / lanes, at % lanes);
            if at.0 >= WORDS || words[at.0] == durable[at.0] {
                continue;
            }
            let count = self.format.count_in(words[at.0], at.1);
            let detail = || std::format!("refcount {count} under {group:?}");
            // Of an entry there may be several versions, but only one at a time.
            let most = group.chunk_by(|one, other| one.from == other.from).count();
            if count < most as u64 {
                return refuse("an unlinking is durable before the refcount falls", detail());
            }
            for Reference { copied, from, .. } in group {
                match from {
                    From::L1(_) | From::Guest(_) if *copied && count != 1 => {
                        return refuse("no refcount is raised under a COPIED entry", detail());
                    }
                    From::L1(_) | From::Guest(_) if !copied && count == 1 => {
                        let rule = "no refcount falls to 1 under an entry without COPIED";
                        return refuse(rule, detail());
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// A new header.
    fn check_header(
        &self,
        disk: &Disk,
        sector: usize,
        words: &[u64; WORDS],
        durable: &[u64; WORDS],
    ) -> Verdict {
        // Words 6 and 7: refcount table; 9 and 11: feature bits that may change.
        let free = |word: usize| sector == 0 && [6, 7, 9, 11].contains(&word);
        if let Some(word) = (0..WORDS).find(|&word| words[word] != durable[word] && !free(word)) {
            let detail = std::format!("sector {sector}, byte {}", word * 8);
            return refuse("only the refcount table's fields of the header change", detail);
        }
        if sector != 0 || words[6..8] == durable[6..8] {
            return Ok(());
        }
        let rule = "the refcount table is durable before the header names it";
        let table = self.table_of(words);
        let old = self.table_of(durable);
        if !table.clone().all(|sector| layout::is_settled(disk, sector)) {
            return refuse(rule, std::format!("sectors {table:?}"));
        }
        if (table.end * SECTOR) as u64 > disk.least_len() {
            return refuse(rule, std::format!("sectors {table:?} may lie outside the file"));
        }
        let pool = disk.pool().borrow();
        for (step, sector) in table.clone().enumerate() {
            let new = *pool.words(disk.durable.get(sector).copied().unwrap_or_default());
            for (at, value) in new.into_iter().enumerate() {
                let was = old.clone().nth(step).map(|sector| {
                    let mut all = disk.possible(sector).map(|id| pool.words(id)[at]);
                    let first = all.next().unwrap_or(0);
                    (first, all.all(|other| other == first))
                });
                match was {
                    Some((was, true)) if was == value => continue,
                    Some((was, _)) if was != 0 => {
                        let detail = std::format!("entry {was:#x} becomes {value:#x}");
                        return refuse("a moved refcount table keeps its entries", detail);
                    }
                    _ => {}
                }
                let Some(cluster) = self.format.pointer(value) else { continue };
                self.check_new_block(disk, cluster)
                    .map_err(|why| Broken::new(rule, std::format!("block {cluster}: {why}")))?;
            }
        }
        let mine = size(table.start as u64) / self.format.sectors();
        for cluster in mine as u64..(table.end / self.format.sectors()) as u64 {
            if layout::refcounts_through(disk, &table, cluster, &self.format).contains(&0) {
                return refuse(rule, std::format!("cluster {cluster} of it is not counted"));
            }
        }
        Ok(())
    }

    /// A write of guest bytes, or of zeros.
    fn check_data(&self, disk: &Disk, submitted: &Submitted) -> Verdict {
        let sectors = submitted.writes().expect("a write");
        let per_cluster = self.format.sectors();
        let clusters = sectors.start / per_cluster..sectors.end.div_ceil(per_cluster);
        self.not_metadata(&clusters, submitted)?;
        let Some(guest) = submitted.guest else { return Ok(()) };
        let rule = "a cluster is not written for another guest cluster while it may be referenced";
        for reference in self.references(disk) {
            let cluster = size(reference.cluster);
            if !clusters.contains(&cluster) {
                continue;
            }
            let here = (cluster * per_cluster).max(sectors.start);
            let mine = (guest + (here - sectors.start) as u64) / per_cluster as u64;
            let wrong = match reference.from {
                From::Guest(owner) => owner != mine || !reference.copied,
                From::Compressed(_) => true,
                _ => false,
            };
            if wrong {
                return refuse(rule, std::format!("{:?} under {reference:?}", submitted.kind));
            }
        }
        for reading in disk.reading.iter().filter(|reading| overlaps(reading, &sectors)) {
            let apart = |other: u64| other + sectors.start as u64 != guest + reading.first as u64;
            if reading.guest.is_some_and(apart) {
                let rule = "a cluster is not reused while an operation on the old mapping runs";
                return refuse(rule, std::format!("{:?} under {reading:?}", submitted.kind));
            }
        }
        Ok(())
    }

    fn not_metadata(&self, clusters: &core::ops::Range<usize>, submitted: &Submitted) -> Verdict {
        for cluster in clusters.clone() {
            let structure = self.structure(cluster * self.format.sectors());
            if structure != Structure::NewTable {
                let detail = std::format!("{:?} hits {structure:?}", submitted.kind);
                return refuse("guest data is never written where metadata lies", detail);
            }
        }
        Ok(())
    }

    /// A cluster that nothing refers to is punched, or zeroed on its way into the reservation.
    fn check_punch(&self, disk: &Disk, submitted: &Submitted) -> Verdict {
        let sectors = submitted.writes().expect("a punch");
        let per_cluster = self.format.sectors();
        let clusters = sectors.start / per_cluster..sectors.end.div_ceil(per_cluster);
        self.not_metadata(&clusters, submitted)?;
        let detail = |what: &str| std::format!("{:?}: {what}", submitted.kind);
        let inside = |reference: &&Reference| clusters.contains(&size(reference.cluster));
        if let Some(reference) = self.references(disk).iter().find(inside) {
            let what = std::format!("{reference:?}");
            return refuse("an unlinking is durable before the cluster is punched", detail(&what));
        }
        let counted =
            |cluster: &usize| self.refcounts(disk, *cluster as u64).iter().any(|&count| count != 0);
        let punch = matches!(submitted.kind, OpKind::Punch { .. });
        if let Some(cluster) = clusters.clone().find(counted).filter(|_| punch) {
            let what = std::format!("cluster {cluster} may be counted");
            return refuse("a decrement is durable before the cluster is punched", detail(&what));
        }
        if let Some(reading) = disk.reading.iter().find(|reading| overlaps(reading, &sectors)) {
            let what = std::format!("{reading:?}");
            let rule = "a cluster is not punched while an operation on the old mapping runs";
            return refuse(rule, detail(&what));
        }
        Ok(())
    }

    fn check_truncate(&self, disk: &Disk, to: u64) -> Verdict {
        let behind = |cluster: u64| cluster << self.format.bits >= to;
        let referenced = self.references(disk).into_iter().find(|it| behind(it.cluster));
        if let Some(reference) = referenced {
            let detail = std::format!("{reference:?} behind {to}");
            return refuse("nothing that may be referenced is cut off", detail);
        }
        Ok(())
    }
}

fn overlaps(reading: &crate::testing::disk::Reading, sectors: &core::ops::Range<usize>) -> bool {
    reading.first < sectors.end && reading.first + reading.count > sectors.start
}
