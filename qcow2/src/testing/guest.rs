//! What each guest sector may hold: now, for a read, and after a crash.
//!
//! Every write leaves an entry for each of its sectors, with when it was submitted and when it was
//! answered. An entry is *superseded* by one that was submitted after this one had been answered.
//! A read may find what was not superseded by anything answered before it was submitted; a crash
//! may leave what was not superseded by anything that an acknowledged FLUSH covers. Where guest
//! requests overlap in time, either result is legal. An acknowledged FLUSH drops what it rules out,
//! so the lists stay short and *are* what a crash may leave.
//!
//! A discard allows zeros and rules nothing out; so does a write that was answered with an error.

use std::vec;
use std::vec::Vec;

use crate::error::IoErrorKind;
use crate::op::Request;
use crate::testing::pool::{Pool, SECTOR, SectorId, WORDS, fold, mix};
use crate::testing::size;

/// One value that a sector was given.
#[derive(Clone, Copy, Debug)]
struct Entry {
    id: SectorId,
    submitted: u64,
    answered: Option<u64>,
    /// Rules out what came before it, once it is answered.
    firm: bool,
    /// A crash cannot leave it any more; a read that is under way may still find it.
    gone: bool,
    tag: u16,
}

impl Entry {
    fn new(id: SectorId, submitted: u64, tag: u16) -> Self {
        Self { id, submitted, answered: None, firm: false, gone: false, tag }
    }

    /// What was there before anybody wrote.
    fn first(id: SectorId, now: u64) -> Self {
        Self { answered: Some(now), firm: true, ..Self::new(id, now, u16::MAX) }
    }
}

/// A request under way.
#[derive(Clone, Copy, Debug)]
struct Pending {
    tag: u16,
    request: Request,
    submitted: u64,
}

/// The guest's side: all it did and all it may expect.
#[derive(Clone, Debug)]
pub struct Guest {
    sectors: Vec<Vec<Entry>>,
    pending: Vec<Pending>,
    now: u64,
    writes: u64,
    generation: u64,
    /// FLUSHes and FUA writes that were answered with success.
    pub flushed: u64,
}

/// What every sector may hold if power is cut now, ready to be asked fast.
#[derive(Clone, Debug, Default)]
pub struct Demand {
    starts: Vec<u32>,
    ids: Vec<SectorId>,
    /// Clusters that may be leaked.
    pub leaks: u64,
    /// The same for the same demand.
    pub hash: u64,
}

impl Demand {
    /// What guest sector `sector` may hold.
    #[must_use]
    pub fn of(&self, sector: usize) -> &[SectorId] {
        &self.ids[self.starts[sector] as usize..self.starts[sector + 1] as usize]
    }

    /// How many guest sectors there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// Has the disk no sectors?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The words of a guest sector: its place, the number of the write, a CRC-32 of both, and noise.
#[must_use]
pub fn guest_sector(place: u64, write: u64) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    words[0] = place;
    words[1] = write;
    words[2] = u64::from(crc32(&[place, write])) << 32 | 0x7175_636b;
    for (at, word) in (0..).zip(&mut words[3..]) {
        *word = fold(place ^ 0x9e37_79b9_7f4a_7c15, write + at * 2 + 1);
    }
    words
}

/// What a sector says of itself, in words.
#[must_use]
pub fn describe(pool: &Pool, id: SectorId) -> std::string::String {
    let words = pool.words(id);
    if id == SectorId::ZERO {
        return "zeros".into();
    }
    let (place, write) = (words[0], words[1]);
    if *words == guest_sector(place, write) {
        return std::format!("write {write} to sector {place}");
    }
    std::format!("no guest sector: {:#x} {:#x} …", words[0], words[1])
}

fn crc32(words: &[u64]) -> u32 {
    let mut crc = u32::MAX;
    for byte in words.iter().flat_map(|word| word.to_be_bytes()) {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

impl Guest {
    /// A guest that finds `content`.
    #[must_use]
    pub fn new(content: &[SectorId]) -> Self {
        Self {
            sectors: content.iter().map(|&id| vec![Entry::first(id, 0)]).collect(),
            pending: Vec::new(),
            now: 1,
            writes: 0,
            generation: 0,
            flushed: 0,
        }
    }

    /// Sectors of the virtual disk.
    #[must_use]
    pub fn len(&self) -> usize {
        self.sectors.len()
    }

    /// Has the disk no sectors?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// Writes so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Requests under way.
    #[must_use]
    pub fn busy(&self) -> usize {
        self.pending.len()
    }

    /// Is this tag in use?
    #[must_use]
    pub fn is_busy(&self, tag: u16) -> bool {
        self.pending.iter().any(|pending| pending.tag == tag)
    }

    /// Grows whenever what a crash may leave changes.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The request that a tag stands for.
    #[must_use]
    pub fn request(&self, tag: u16) -> Option<Request> {
        self.pending.iter().find(|pending| pending.tag == tag).map(|pending| pending.request)
    }

    /// The guest submits a request; returns the bytes of a write, or room for those of a read.
    pub fn submit(&mut self, tag: u16, request: Request, pool: &mut Pool) -> Vec<u8> {
        self.now += 1;
        self.pending.push(Pending { tag, request, submitted: self.now });
        let (offset, len) = range(request);
        let first = size(offset) / SECTOR;
        let count = len as usize / SECTOR;
        let mut bytes = vec![0xaa; len as usize];
        let entry = |id| Entry::new(id, self.now, tag);
        match request {
            Request::Write { .. } => {
                self.writes += 1;
                for (step, chunk) in bytes.chunks_exact_mut(SECTOR).enumerate() {
                    let id = pool.intern_words(&guest_sector((first + step) as u64, self.writes));
                    chunk.copy_from_slice(&pool.bytes(id));
                    self.sectors[first + step].push(entry(id));
                }
                self.generation += 1;
            }
            Request::WriteZeroes { .. } | Request::Discard { .. } => {
                for sector in &mut self.sectors[first..first + count] {
                    sector.push(entry(SectorId::ZERO));
                }
                self.generation += 1;
            }
            Request::Read { .. } | Request::Flush => {}
        }
        bytes
    }

    /// A request was answered; `found` is what a read found.
    ///
    /// # Errors
    /// What is wrong with the answer.
    ///
    /// # Panics
    /// If nobody asked.
    pub fn answer(
        &mut self,
        tag: u16,
        result: Result<(), IoErrorKind>,
        found: &[SectorId],
        pool: &Pool,
    ) -> Result<Request, std::string::String> {
        let at = self.pending.iter().position(|pending| pending.tag == tag);
        let Pending { request, submitted, .. } =
            self.pending.swap_remove(at.expect("an answer to a request under way"));
        self.now += 1;
        let now = self.now;
        let (offset, len) = range(request);
        let sectors = size(offset) / SECTOR..(size(offset) + len as usize) / SECTOR;
        match request {
            Request::Read { .. } => {
                if result.is_ok() {
                    self.check_read(sectors, submitted, found, pool)?;
                }
            }
            Request::Write { .. } | Request::WriteZeroes { .. } | Request::Discard { .. } => {
                let firm = result.is_ok() && !matches!(request, Request::Discard { .. });
                let fua = matches!(request, Request::Write { fua: true, .. }) && result.is_ok();
                for sector in &mut self.sectors[sectors] {
                    for entry in sector.iter_mut().filter(|entry| entry.tag == tag) {
                        *entry = Entry { answered: Some(now), firm, tag: u16::MAX, ..*entry };
                    }
                    if fua {
                        drop_older(sector, submitted);
                    }
                }
                self.flushed += u64::from(fua);
                self.generation += u64::from(fua);
            }
            Request::Flush => {
                if result.is_ok() {
                    for sector in &mut self.sectors {
                        let latest = latest(sector, submitted);
                        drop_older(sector, latest);
                    }
                    self.flushed += 1;
                    self.generation += 1;
                }
            }
        }
        let reads = |pending: &Pending| matches!(pending.request, Request::Read { .. });
        if !self.pending.iter().any(reads) {
            for sector in &mut self.sectors {
                sector.retain(|entry| !entry.gone);
            }
        }
        Ok(request)
    }

    fn check_read(
        &self,
        sectors: core::ops::Range<usize>,
        submitted: u64,
        found: &[SectorId],
        pool: &Pool,
    ) -> Result<(), std::string::String> {
        for (place, &id) in sectors.zip(found) {
            let entries = &self.sectors[place];
            let latest = latest(entries, submitted);
            let legal = |entry: &&Entry| entry.answered.is_none_or(|answered| answered >= latest);
            if !entries.iter().filter(legal).any(|entry| entry.id == id) {
                let may: Vec<_> =
                    entries.iter().filter(legal).map(|entry| describe(pool, entry.id)).collect();
                let found = describe(pool, id);
                return Err(std::format!(
                    "a read of sector {place} found {found}; it may be {may:?}"
                ));
            }
        }
        Ok(())
    }

    /// What a read of the whole disk may find now.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_content(
        &self,
        found: &[SectorId],
        pool: &Pool,
    ) -> Result<(), std::string::String> {
        self.check_read(0..self.sectors.len(), self.now + 1, found, pool)
    }

    /// May a crash now leave this?
    #[must_use]
    pub fn is_legal(&self, sector: u64, id: SectorId) -> bool {
        let entries = self.sectors.get(size(sector));
        entries.is_none_or(|entries| entries.iter().any(|entry| entry.id == id && !entry.gone))
    }

    /// The process dies: requests under way get no answer.
    pub fn death(&mut self) {
        self.now += 1;
        self.pending.clear();
        for entry in self.sectors.iter_mut().flatten() {
            entry.answered.get_or_insert(self.now);
            entry.tag = u16::MAX;
        }
    }

    /// The disk holds exactly this, durably.
    pub fn settle(&mut self, content: &[SectorId]) {
        self.now += 1;
        for (sector, &id) in self.sectors.iter_mut().zip(content) {
            *sector = vec![Entry::first(id, self.now)];
        }
        self.generation += 1;
    }

    /// What a crash now may leave, with so many leaked clusters at the most.
    pub fn demand(&self, leaks: u64, pool: &Pool, out: &mut Demand) {
        out.starts.clear();
        out.ids.clear();
        out.leaks = leaks;
        out.hash = mix(leaks, 0);
        let length = |ids: &[SectorId]| u32::try_from(ids.len()).expect("few sectors");
        for (place, entries) in self.sectors.iter().enumerate() {
            let start = out.ids.len();
            out.starts.push(length(&out.ids));
            let mut sum = 0_u64;
            for entry in entries.iter().filter(|entry| !entry.gone) {
                if !out.ids[start..].contains(&entry.id) {
                    out.ids.push(entry.id);
                    sum = sum.wrapping_add(mix(pool.hash(entry.id), 3));
                }
            }
            out.hash ^= mix(place as u64, sum);
        }
        out.starts.push(length(&out.ids));
    }
}

/// When the latest was submitted that was answered before `before` and rules others out.
fn latest(entries: &[Entry], before: u64) -> u64 {
    let firm = |entry: &&Entry| entry.firm && entry.answered.is_some_and(|at| at < before);
    entries.iter().filter(firm).map(|entry| entry.submitted).max().unwrap_or(0)
}

fn drop_older(entries: &mut [Entry], latest: u64) {
    for entry in entries {
        entry.gone |= entry.answered.is_some_and(|answered| answered < latest);
    }
}

/// Offset and length of a request.
#[must_use]
pub fn range(request: Request) -> (u64, u32) {
    match request {
        Request::Read { offset, len }
        | Request::Write { offset, len, .. }
        | Request::WriteZeroes { offset, len, .. }
        | Request::Discard { offset, len } => (offset, len),
        Request::Flush => (0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(guest: &mut Guest, tag: u16, pool: &mut Pool) -> SectorId {
        let bytes = guest.submit(tag, Request::Write { offset: 0, len: 512, fua: false }, pool);
        pool.intern(&bytes)
    }

    #[test]
    fn a_crash_may_leave_what_no_flush_rules_out() {
        let mut pool = Pool::new();
        let mut guest = Guest::new(&[SectorId::ZERO]);
        let one = write(&mut guest, 0, &mut pool);
        assert!(guest.is_legal(0, SectorId::ZERO) && guest.is_legal(0, one));
        guest.answer(0, Ok(()), &[], &pool).unwrap();
        guest.submit(1, Request::Flush, &mut pool);
        let two = write(&mut guest, 2, &mut pool);
        guest.answer(2, Ok(()), &[], &pool).unwrap();
        assert!(guest.is_legal(0, SectorId::ZERO));
        guest.answer(1, Ok(()), &[], &pool).unwrap();
        assert!(!guest.is_legal(0, SectorId::ZERO));
        assert!(guest.is_legal(0, one) && guest.is_legal(0, two));
    }

    #[test]
    fn overlapping_writes_may_land_in_either_order() {
        let mut pool = Pool::new();
        let mut guest = Guest::new(&[SectorId::ZERO]);
        let one = write(&mut guest, 0, &mut pool);
        let two = write(&mut guest, 1, &mut pool);
        guest.answer(1, Ok(()), &[], &pool).unwrap();
        guest.answer(0, Ok(()), &[], &pool).unwrap();
        for found in [one, two] {
            guest.check_content(&[found], &pool).unwrap();
        }
        guest.check_content(&[SectorId::ZERO], &pool).unwrap_err();
    }

    #[test]
    fn a_failed_write_rules_nothing_out() {
        let mut pool = Pool::new();
        let mut guest = Guest::new(&[SectorId::ZERO]);
        let one = write(&mut guest, 0, &mut pool);
        guest.answer(0, Err(IoErrorKind::Io), &[], &pool).unwrap();
        for found in [one, SectorId::ZERO] {
            guest.check_content(&[found], &pool).unwrap();
        }
    }
}
