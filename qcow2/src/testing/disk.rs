//! A simulated disk: what is durable, and what was written since and may be lost.
//!
//! Reads see a write from its completion on. A sync makes durable what had completed when it was
//! *submitted*. Everything else is a [`Change`]: a power cut leaves in each sector either the
//! durable content or that of any change, also of one still in flight ([`cuts`](super::cuts)).
//! The grain is the sector; a punch is a change to zeros, so it too may be undone.
//!
//! With [`watch`](Disk::watch) the disk also refuses operations that break the rules of order
//! ([`rules`](super::rules)), which are decoded from what it is given and share no code with the
//! engine.

use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use crate::op::{OpId, OpKind};
use crate::planted::{self, Bug};
use crate::testing::pool::{Pool, SECTOR, SectorId, SharedPool};
use crate::testing::prng::Prng;
use crate::testing::rules::{Broken, Rules, Submitted};
use crate::testing::size;

/// What a change is about, as far as the disk can tell from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Structure {
    /// Guest data, zeros around it, punches.
    Data,
    /// An L2 table, linked or not.
    L2,
    /// The L1 table.
    L1,
    /// A refcount block.
    RefcountBlock,
    /// The refcount table.
    RefcountTable,
    /// The first cluster.
    Header,
    /// A table that nothing names yet.
    NewTable,
}

/// What a change does.
#[derive(Clone, Debug)]
pub enum What {
    /// These sectors from `first` on.
    Write {
        /// The first sector.
        first: usize,
        /// Their contents.
        ids: Rc<[SectorId]>,
    },
    /// Zeros: a punch, or what a truncation cuts off.
    Zero {
        /// The first sector.
        first: usize,
        /// How many.
        count: usize,
    },
    /// The file becomes longer, if it is not so long already.
    Grow {
        /// New length in bytes.
        to: u64,
    },
    /// The file becomes shorter.
    Shrink {
        /// New length in bytes.
        to: u64,
    },
}

impl What {
    /// The content that this puts into a sector.
    #[must_use]
    pub fn at(&self, sector: usize) -> Option<SectorId> {
        match self {
            Self::Write { first, ids } => ids.get(sector.checked_sub(*first)?).copied(),
            Self::Zero { first, count } => {
                (sector >= *first && sector < first + count).then_some(SectorId::ZERO)
            }
            Self::Grow { .. } => None,
            Self::Shrink { to } => {
                (sector >= size(to.div_ceil(SECTOR as u64))).then_some(SectorId::ZERO)
            }
        }
    }

    /// The sectors that it touches, up to `end`.
    #[must_use]
    pub fn sectors(&self, end: usize) -> core::ops::Range<usize> {
        match self {
            Self::Write { first, ids } => *first..first + ids.len(),
            Self::Zero { first, count } => *first..first + count,
            Self::Grow { .. } => 0..0,
            Self::Shrink { to } => size(to.div_ceil(SECTOR as u64)).min(end)..end,
        }
    }
}

/// Something that is not durable yet.
#[derive(Clone, Debug)]
pub struct Change {
    /// The operation, while it is in flight.
    pub op: Option<OpId>,
    /// Order of submission.
    pub serial: u64,
    /// What it does.
    pub what: What,
    /// To what.
    pub structure: Structure,
    /// Order of completion; `None` while in flight.
    pub completed: Option<u64>,
}

/// A read in flight: what it reads must stay.
#[derive(Clone, Debug)]
pub(crate) struct Reading {
    pub(crate) op: OpId,
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) guest: Option<u64>,
}

/// The disk.
#[derive(Clone, Debug)]
pub struct Disk {
    pool: SharedPool,
    pub(crate) durable: Vec<SectorId>,
    pub(crate) durable_len: u64,
    view: Vec<SectorId>,
    len: u64,
    changes: Vec<Change>,
    pub(crate) reading: Vec<Reading>,
    serial: u64,
    completions: u64,
    /// Syncs in flight, and how many completions each covers.
    syncs: Vec<(OpId, u64)>,
    /// Grows whenever what a power cut may leave changes.
    generation: u64,
    pub(crate) rules: Option<Rules>,
    /// Does the host punch holes, and zero ranges?
    pub can_punch: bool,
}

impl Disk {
    /// A disk that holds `bytes`, durably, with a pool of its own.
    #[must_use]
    pub fn new(bytes: impl AsRef<[u8]>) -> Self {
        Self::sharing(bytes.as_ref(), &Pool::shared())
    }

    /// The same with a pool that others use, too.
    #[must_use]
    pub fn sharing(bytes: &[u8], pool: &SharedPool) -> Self {
        let mut known = pool.borrow_mut();
        let durable = bytes.chunks(SECTOR).map(|sector| known.intern(sector)).collect();
        Self::of_sectors(durable, bytes.len() as u64, pool)
    }

    /// A disk that holds these sectors, durably.
    #[must_use]
    pub fn of_sectors(durable: Vec<SectorId>, len: u64, pool: &SharedPool) -> Self {
        Self {
            pool: Rc::clone(pool),
            view: durable.clone(),
            durable,
            durable_len: len,
            len,
            changes: Vec::new(),
            reading: Vec::new(),
            serial: 0,
            completions: 0,
            syncs: Vec::new(),
            generation: 0,
            rules: None,
            can_punch: true,
        }
    }

    /// Puts bytes where nothing is under way, as if written and synced by somebody else.
    ///
    /// # Panics
    /// If they begin within a sector, or do not lie in the file.
    pub(crate) fn write_durably(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset.is_multiple_of(SECTOR as u64) && offset + bytes.len() as u64 <= self.len);
        let mut pool = self.pool.borrow_mut();
        for (sector, part) in (size(offset) / SECTOR..).zip(bytes.chunks(SECTOR)) {
            let mut whole = pool.bytes(self.view[sector]);
            whole[..part.len()].copy_from_slice(part);
            self.view[sector] = pool.intern(&whole);
            self.durable[sector] = self.view[sector];
        }
    }

    /// From now on operations that break a rule are refused.
    pub fn watch(&mut self) {
        self.rules = Some(Rules::of(self));
    }

    /// The sectors that this disk and others share.
    #[must_use]
    pub fn pool(&self) -> &SharedPool {
        &self.pool
    }

    /// The file as a reader sees it.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        bytes_of(&self.view, self.len, &self.pool)
    }

    /// The file as a reader sees it, in sectors.
    #[must_use]
    pub fn sectors(&self) -> &[SectorId] {
        &self.view
    }

    /// Bytes in the file.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Has the file no bytes?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What is not durable, in the order of submission.
    #[must_use]
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// Grows whenever what a power cut may leave changes.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// All that decides what may happen to this disk from now on.
    pub(crate) fn digest(&self) -> impl core::fmt::Debug + '_ {
        (&self.durable, self.durable_len, &self.view, self.len, &self.changes, &self.syncs)
    }

    /// Every content that a crash may leave in a sector, the durable one first.
    pub(crate) fn possible(&self, sector: usize) -> impl Iterator<Item = SectorId> + '_ {
        let durable = self.durable.get(sector).copied().unwrap_or_default();
        let later = self.changes.iter().filter_map(move |change| change.what.at(sector));
        core::iter::once(durable).chain(later)
    }

    /// The shortest that a crash may leave the file.
    pub(crate) fn least_len(&self) -> u64 {
        let shrunk = self.changes.iter().filter_map(|change| match change.what {
            What::Shrink { to } => Some(to),
            _ => None,
        });
        shrunk.fold(self.durable_len, u64::min)
    }

    /// What happens to this disk from now on comes after all that happened to the other.
    pub(crate) fn follow(&mut self, other: Option<&Self>) {
        let Some(other) = other else { return };
        self.serial = self.serial.max(other.serial);
        self.completions = self.completions.max(other.completions);
    }

    /// Copies what a reader sees at `offset`; returns how many bytes the file has there.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> usize {
        let have = size(self.len.saturating_sub(offset)).min(out.len());
        let pool = self.pool.borrow();
        let (mut sector, mut within) = (size(offset / SECTOR as u64), size(offset % SECTOR as u64));
        let mut rest = &mut out[..have];
        while !rest.is_empty() {
            let bytes = pool.bytes(self.view.get(sector).copied().unwrap_or_default());
            let count = rest.len().min(SECTOR - within);
            rest[..count].copy_from_slice(&bytes[within..within + count]);
            rest = &mut rest[count..];
            (sector, within) = (sector + 1, 0);
        }
        have
    }

    /// An operation is submitted: from now on a power cut may leave what it does. `payload` is what
    /// a write puts there.
    ///
    /// # Errors
    /// The rule that it breaks. It is carried out nevertheless.
    ///
    /// # Panics
    /// If a write of metadata overlaps another write in flight.
    pub fn submit(
        &mut self,
        op: OpId,
        submitted: &Submitted,
        legal: &dyn Fn(u64, SectorId) -> bool,
    ) -> Result<(), Broken> {
        let verdict = match &self.rules {
            Some(rules) => rules.check(self, op, submitted, legal),
            None => self.no_overlap(submitted),
        };
        let structure = match &self.rules {
            Some(_) => Rules::structure(self, submitted),
            None => Structure::Data,
        };
        if let Some(rules) = &mut self.rules {
            rules.note(op, submitted);
        }
        let what = match submitted.kind {
            OpKind::ZeroRange { .. } if !self.can_punch => None,
            OpKind::Write { offset, .. }
            | OpKind::WriteZeros { offset, .. }
            | OpKind::ZeroRange { offset, .. }
            | OpKind::CopyWrite { offset, .. }
            | OpKind::MetaWrite { offset, .. } => Some(What::Write {
                first: size(offset / SECTOR as u64),
                ids: submitted.payload.clone().into(),
            }),
            OpKind::Punch { offset, len } if self.can_punch => {
                let (first, count) = (size(offset / SECTOR as u64), size(len / SECTOR as u64));
                Some(What::Zero { first, count })
            }
            OpKind::Extend { to, .. } => Some(What::Grow { to }),
            OpKind::Truncate { to } => Some(What::Shrink { to }),
            OpKind::Read { offset, len, .. }
            | OpKind::CopyRead { offset, len, .. }
            | OpKind::MetaRead { offset, len } => {
                let first = size(offset / SECTOR as u64);
                let count = len as usize / SECTOR;
                self.reading.push(Reading { op, first, count, guest: submitted.guest });
                None
            }
            OpKind::Inflate { source, .. } | OpKind::CopyInflate { source, .. } => {
                let first = size(source.offset / SECTOR as u64);
                let end = source.offset + u64::from(source.len);
                let count = size(end.div_ceil(SECTOR as u64)) - first;
                self.reading.push(Reading { op, first, count, guest: submitted.guest });
                None
            }
            OpKind::Sync => {
                self.syncs.push((op, self.completions));
                None
            }
            OpKind::Punch { .. } | OpKind::Fill { .. } | OpKind::CopyFill { .. } => None,
        };
        if let Some(what) = what {
            self.push(Some(op), what, structure);
        }
        verdict
    }

    fn push(&mut self, op: Option<OpId>, what: What, structure: Structure) {
        self.serial += 1;
        self.generation += 1;
        self.changes.push(Change { op, serial: self.serial, what, structure, completed: None });
    }

    /// A metadata write must not meet another write, nor a punch any.
    pub(crate) fn no_overlap(&self, submitted: &Submitted) -> Result<(), Broken> {
        let Some(mine) = submitted.writes() else { return Ok(()) };
        let alone = submitted.is_metadata() || matches!(submitted.kind, OpKind::Punch { .. });
        for other in self.changes.iter().filter(|change| change.completed.is_none()) {
            let theirs = other.what.sectors(usize::MAX);
            let apart = theirs.start >= mine.end || theirs.end <= mine.start;
            let guests = matches!(other.what, What::Write { .. })
                && other.structure == Structure::Data
                && !alone;
            if !apart && !guests {
                return Err(Broken::new(
                    "a metadata write or a punch never overlaps another write in flight",
                    std::format!("{:?} meets {:?}", submitted.kind, other.what),
                ));
            }
        }
        Ok(())
    }

    /// The first `done` bytes of a write have been written, or another operation is done.
    ///
    /// # Panics
    /// If no such operation is in flight.
    pub fn complete(&mut self, op: OpId, done: u64) {
        self.reading.retain(|reading| reading.op != op);
        let Some(found) = self.in_flight(op) else { return };
        self.completions += 1;
        self.generation += 1;
        let change = &mut self.changes[found];
        change.completed = Some(self.completions);
        change.op = None;
        if let What::Write { ids, .. } = &mut change.what {
            let keep = size(done / SECTOR as u64).min(ids.len());
            if keep != ids.len() {
                *ids = ids[..keep].into();
            }
        }
        let what = change.what.clone();
        apply(&what, &mut self.view, &mut self.len);
    }

    /// An operation has had no effect, and will not have any.
    pub fn cancel(&mut self, op: OpId) {
        self.reading.retain(|reading| reading.op != op);
        if let Some(found) = self.in_flight(op) {
            self.changes.remove(found);
            self.generation += 1;
        }
        self.syncs.retain(|&(id, _)| id != op);
    }

    /// The engine was told that a metadata write or a sync has failed: only reads may follow. Or
    /// (`corrupt`) it says that the image contradicts itself: that is written into the header.
    pub fn latch(&mut self, corrupt: bool) {
        if let Some(rules) = &mut self.rules {
            rules.latch(corrupt);
        }
    }

    fn in_flight(&self, op: OpId) -> Option<usize> {
        self.changes.iter().position(|change| change.op == Some(op))
    }

    /// A sync has succeeded.
    ///
    /// # Panics
    /// If it is not in flight.
    pub fn complete_sync(&mut self, op: OpId) {
        let found = self.syncs.iter().position(|&(id, _)| id == op).expect("a sync in flight");
        let (_, covered) = self.syncs.swap_remove(found);
        self.generation += 1;
        let is_covered = |change: &Change| change.completed.is_some_and(|order| order <= covered);
        let (mut done, rest): (Vec<_>, Vec<_>) =
            core::mem::take(&mut self.changes).into_iter().partition(is_covered);
        self.changes = rest;
        done.sort_by_key(|change| change.completed);
        for change in done {
            apply(&change.what, &mut self.durable, &mut self.durable_len);
        }
        if let Some(rules) = &mut self.rules {
            rules.synced = true;
        }
    }

    /// The process dies: of each write in flight some sectors land, chosen by `prng`, the rest
    /// never will. What has completed stays, but is not durable.
    ///
    /// That nothing lands after the image was opened again is not the disk's doing: the server
    /// holds the image's locks by the descriptors that its operations use, so they end with the
    /// last of them, and the next server waits for the locks. [`Bug::LateWriteAfterDeath`] is a
    /// next server that does not.
    pub fn death(&mut self, prng: &mut Prng) {
        self.syncs.clear();
        self.reading.clear();
        if let Some(rules) = &mut self.rules {
            rules.death();
        }
        for index in 0..self.changes.len() {
            let change = &mut self.changes[index];
            change.op = None;
            if change.completed.is_some() {
                continue;
            }
            if planted::is(Bug::LateWriteAfterDeath) {
                // It stays on its way: nobody waited for it.
                continue;
            }
            self.completions += 1;
            change.completed = Some(self.completions);
            let how = prng.below(4);
            let landed = match how {
                0 => 0,
                1 | 3 => usize::MAX,
                _ => prng.index(change.what.sectors(self.view.len()).len() + 1),
            };
            if let (3, What::Write { first, ids }) = (how, &mut change.what) {
                // Here one and there one; the others stay what they are.
                let stay = |sector: usize| self.view.get(sector).copied();
                let mixed = ids.iter().zip(*first..).map(|(&id, sector)| {
                    if prng.one_in(2) { stay(sector).unwrap_or(id) } else { id }
                });
                *ids = mixed.collect();
            }
            match &mut change.what {
                What::Write { ids, .. } => *ids = ids[..landed.min(ids.len())].into(),
                What::Zero { count, .. } => *count = landed.min(*count),
                What::Grow { to } | What::Shrink { to } if landed == 0 => *to = self.len,
                What::Grow { .. } | What::Shrink { .. } => {}
            }
            let what = change.what.clone();
            apply(&what, &mut self.view, &mut self.len);
        }
        self.generation += 1;
    }

    /// One of the states that a power cut may leave.
    pub fn power_cut(&self, prng: &mut Prng) -> Vec<u8> {
        let mut image = self.durable.clone();
        let all: u64 = self.changes.iter().map(|change| end_of(&change.what)).max().unwrap_or(0);
        let most = all.max(self.durable_len).max(self.len);
        let least = self.least_len();
        let len = if prng.one_in(2) { most } else { least + prng.below(most - least + 1) };
        image.resize(size(len.div_ceil(SECTOR as u64)), SectorId::ZERO);
        // Now and then all of one kind, otherwise each sector for itself.
        let bias = prng.below(4);
        for (sector, slot) in image.iter_mut().enumerate() {
            let count = self.possible(sector).count();
            let choice = match bias {
                0 => 0,
                1 => count - 1,
                _ => prng.index(count),
            };
            *slot = self.possible(sector).nth(choice).unwrap_or_default();
        }
        bytes_of(&image, len, &self.pool)
    }
}

/// Where a change ends, in bytes.
fn end_of(what: &What) -> u64 {
    match what {
        What::Write { first, ids } => ((first + ids.len()) * SECTOR) as u64,
        What::Grow { to } | What::Shrink { to } => *to,
        What::Zero { .. } => 0,
    }
}

/// The lengths that a crash may leave: the least and the most first.
pub(crate) fn possible_lens(disk: &Disk) -> Vec<u64> {
    let mut all = vec![disk.durable_len, disk.len];
    all.extend(disk.changes.iter().filter(|c| !matches!(c.what, What::Zero { .. })).map(
        |change| {
            let end = end_of(&change.what);
            if matches!(change.what, What::Shrink { .. }) { end } else { end.max(disk.durable_len) }
        },
    ));
    all.sort_unstable();
    all.dedup();
    all
}

fn apply(what: &What, sectors: &mut Vec<SectorId>, len: &mut u64) {
    match what {
        What::Write { first, ids } => {
            if ids.is_empty() {
                return;
            }
            *len = (*len).max(end_of(what));
            if sectors.len() < first + ids.len() {
                sectors.resize(first + ids.len(), SectorId::ZERO);
            }
            sectors[*first..first + ids.len()].copy_from_slice(ids);
        }
        What::Zero { first, count } => {
            let end = (first + count).min(sectors.len());
            if *first < end {
                sectors[*first..end].fill(SectorId::ZERO);
            }
        }
        What::Grow { to } => {
            *len = (*len).max(*to);
            let need = size(len.div_ceil(SECTOR as u64));
            if sectors.len() < need {
                sectors.resize(need, SectorId::ZERO);
            }
        }
        What::Shrink { to } => {
            *len = (*len).min(*to);
            sectors.truncate(size(len.div_ceil(SECTOR as u64)));
        }
    }
}

pub(crate) fn bytes_of(sectors: &[SectorId], len: u64, pool: &SharedPool) -> Vec<u8> {
    let pool = pool.borrow();
    let mut out: Vec<u8> = sectors.iter().flat_map(|&id| pool.bytes(id)).collect();
    out.resize(size(len), 0);
    out
}
