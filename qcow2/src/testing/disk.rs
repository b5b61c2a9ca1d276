//! A simulated disk: what is durable, and what was written since and may be lost.
//!
//! Reads see a write from its completion on. A sync makes durable what had completed when it was
//! *submitted*. A power cut leaves in each sector that is not synced either the last synced bytes
//! or those of any later write, also of one still in flight, independently of all other sectors;
//! the file's size lies anywhere between the old and the new.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use crate::op::OpId;
use crate::testing::prng::Prng;

/// What a disk writes in one piece, in bytes.
pub const SECTOR: usize = 512;

/// A write that is not durable yet.
#[derive(Clone, Debug)]
struct Unsynced {
    op: OpId,
    metadata: bool,
    offset: usize,
    bytes: Vec<u8>,
    /// Order of completion; `None` while in flight.
    completed: Option<u64>,
}

/// The disk.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    durable: Vec<u8>,
    durable_len: usize,
    /// Bytes behind `len` are zeros.
    view: Vec<u8>,
    unsynced: Vec<Unsynced>,
    /// Order of completions so far.
    completions: u64,
    /// Syncs in flight: how many completions each covers, and the size it makes durable.
    syncs: Vec<(OpId, u64, usize)>,
}

impl Disk {
    /// A disk that holds `bytes`, durably.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        let durable_len = bytes.len();
        Self { durable: bytes.clone(), durable_len, view: bytes, ..Self::default() }
    }

    /// The file as a reader sees it.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.view
    }

    /// Bytes in the file.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.view.len() as u64
    }

    /// Has the file no bytes?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.view.is_empty()
    }

    /// Copies what a reader sees at `offset`; returns how many bytes the file has there.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> usize {
        let offset = usize::try_from(offset).expect("tests use small files");
        let have = self.view.len().saturating_sub(offset).min(out.len());
        out[..have].copy_from_slice(&self.view[offset..offset + have]);
        have
    }

    /// A write is submitted: from now on a power cut may leave it.
    ///
    /// # Panics
    /// If metadata is written while another write to the same bytes is in flight.
    pub fn submit_write(&mut self, op: OpId, offset: u64, bytes: Vec<u8>, metadata: bool) {
        let offset = usize::try_from(offset).expect("tests use small files");
        let end = offset + bytes.len();
        for other in self.unsynced.iter().filter(|other| other.completed.is_none()) {
            let apart = other.offset >= end || other.offset + other.bytes.len() <= offset;
            assert!(
                apart || !(metadata || other.metadata),
                "a metadata write overlaps another write in flight at {offset}"
            );
        }
        self.unsynced.push(Unsynced { op, metadata, offset, bytes, completed: None });
    }

    /// The first `done` bytes of a write have been written.
    pub fn complete_write(&mut self, op: OpId, done: usize) {
        self.completions += 1;
        let found = self.unsynced.iter().position(|w| w.op == op && w.completed.is_none());
        let write = &mut self.unsynced[found.expect("a write in flight")];
        write.completed = Some(self.completions);
        write.bytes.truncate(done);
        let (offset, end) = (write.offset, write.offset + done);
        if self.view.len() < end {
            self.view.resize(end, 0);
        }
        let bytes = write.bytes.clone();
        self.view[offset..end].copy_from_slice(&bytes);
    }

    /// The file becomes at least `to` bytes long.
    pub fn extend(&mut self, to: u64) {
        let to = usize::try_from(to).expect("tests use small files");
        if self.view.len() < to {
            self.view.resize(to, 0);
        }
    }

    /// The file becomes `to` bytes long.
    pub fn truncate(&mut self, to: u64) {
        self.view.resize(usize::try_from(to).expect("tests use small files"), 0);
    }

    /// A sync is submitted: it covers what has completed by now.
    pub fn submit_sync(&mut self, op: OpId) {
        self.syncs.push((op, self.completions, self.view.len()));
    }

    /// A sync has succeeded.
    pub fn complete_sync(&mut self, op: OpId) {
        let found = self.syncs.iter().position(|&(id, ..)| id == op).expect("a sync in flight");
        let (_, covered, len) = self.syncs.swap_remove(found);
        let is_covered = |write: &Unsynced| write.completed.is_some_and(|order| order <= covered);
        let mut writes: Vec<_> = self.unsynced.iter().filter(|w| is_covered(w)).cloned().collect();
        writes.sort_by_key(|write| write.completed);
        for write in writes {
            put(&mut self.durable, write.offset, &write.bytes);
        }
        self.durable_len = len;
        self.unsynced.retain(|write| !is_covered(write));
    }

    /// The candidates of each sector that is not synced, the synced one first.
    fn candidates(&self) -> BTreeMap<usize, Vec<[u8; SECTOR]>> {
        let mut found: BTreeMap<usize, Vec<[u8; SECTOR]>> = BTreeMap::new();
        for write in &self.unsynced {
            for (index, bytes) in write.bytes.chunks_exact(SECTOR).enumerate() {
                let sector = write.offset / SECTOR + index;
                let old = || vec![sector_of(&self.durable, sector)];
                let value = bytes.try_into().expect("a whole sector");
                found.entry(sector).or_insert_with(old).push(value);
            }
        }
        found
    }

    /// One of the states that a power cut may leave.
    pub fn power_cut(&self, prng: &mut Prng) -> Vec<u8> {
        let mut image = self.durable.clone();
        let mut end = self.durable_len;
        // Now and then all of one kind, otherwise each sector for itself.
        let bias = prng.below(4);
        for (sector, values) in self.candidates() {
            let choice = match bias {
                0 => 0,
                1 => values.len() - 1,
                _ => prng.index(values.len()),
            };
            if choice != 0 {
                put(&mut image, sector * SECTOR, &values[choice]);
                end = end.max((sector + 1) * SECTOR);
            }
        }
        // The size may have grown with or without what was written there.
        if self.view.len() > end && prng.one_in(2) {
            end += prng.index(self.view.len() - end + 1);
        }
        image.resize(end, 0);
        image
    }
}

fn sector_of(bytes: &[u8], sector: usize) -> [u8; SECTOR] {
    let mut out = [0; SECTOR];
    let start = (sector * SECTOR).min(bytes.len());
    let end = (start + SECTOR).min(bytes.len());
    out[..end - start].copy_from_slice(&bytes[start..end]);
    out
}

fn put(image: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if image.len() < offset + bytes.len() {
        image.resize(offset + bytes.len(), 0);
    }
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
}
