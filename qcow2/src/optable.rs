//! The table of operations under way, and their staging buffers. Both are sized at open.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use crate::cache::SlotId;
use crate::copy::CopyId;
use crate::geometry::Geometry;
use crate::op::{FileId, OpId, OpKind};
use crate::request::{RequestId, Which};

/// On whose behalf an operation runs, and so what its completion means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// A guest request: its payload, or zeros around it.
    Request(RequestId),
    /// Copy-on-write for a guest request: a job in [`crate::copy`].
    Copy(CopyId),
    /// A new L2 table for this L1 entry is being zeroed.
    NewTable(u64),
    /// Recycled clusters from this one on are being zeroed.
    Reserved(u64),
    /// Clusters from this one on are being punched.
    Punch(u64),
    /// A page is being read into a cache.
    Load(Which, SlotId),
    /// A page of a cache is being written.
    Page(Which, SlotId),
    /// A page of the L1 or refcount table is being written.
    Top,
    /// A page of a new refcount table, or of a refcount block that comes with it.
    Grown,
    /// The header.
    Header,
    /// The header of an image that contradicts itself, and the fdatasync after it.
    Mark,
    MarkSync,
    /// An fdatasync of a round.
    Sync,
    /// The fdatasync that a writable open begins with; and the header, if that has to be written
    /// before.
    FirstSync,
    FirstHeader,
    /// A new refcount block of this refcount table entry is being zeroed.
    NewBlock(u64),
    /// The file is being extended; `least`: by no more than is needed right now.
    Extend {
        least: bool,
    },
    /// The file is being extended for a new refcount table.
    ExtendGrown,
    /// The unused end of the file is being cut off.
    Truncate,
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpState {
    pub(crate) owner: Owner,
    pub(crate) file: FileId,
    pub(crate) kind: OpKind,
    pub(crate) queue: u16,
    pub(crate) staging: Option<u16>,
    /// How often a short transfer was taken up again without progress of the whole.
    pub(crate) retries: u8,
    /// Rises with every operation.
    pub(crate) number: u64,
    /// The only operation of a request that needs nothing else ([`hit`](crate::hit)).
    pub(crate) ends: bool,
}

/// All operations, and the staging memory.
#[derive(Clone, Debug)]
pub(crate) struct OpTable {
    states: Vec<Option<OpState>>,
    free: Vec<u32>,
    /// Operations of guest requests that may still be made; the rest is kept for metadata.
    payload_left: usize,
    staging_free: Vec<u16>,
    staging: Vec<u8>,
    page_size: usize,
    /// Places that only copies and the operations that exist once may take.
    kept: usize,
    next_number: u64,
}

/// Operations that one step of a request makes at the most: zeros before, payload, zeros behind.
pub(crate) const OPS_PER_STEP: usize = 3;

/// Operations of which there is one at a time: syncs, extends, the truncate.
const FIXED_OPS: usize = 8;

/// Operations without staging of which there may be many: zeroed tables, zeroed and punched runs.
const OTHER_OPS: usize = 64;

impl OpTable {
    pub(crate) fn new(requests: usize, staging: u16, copies: u16, geometry: Geometry) -> Self {
        // Twice as many as requests, so that each can have an extent in flight and another queued.
        let payload = requests * 2 + OPS_PER_STEP;
        let kept = usize::from(copies) + FIXED_OPS;
        let total = payload + usize::from(staging) + kept + OTHER_OPS;
        let total32 = u32::try_from(total).expect("at most 2^16 requests");
        let page_size = geometry.page_size();
        Self {
            states: vec![None; total],
            free: (0..total32).rev().collect(),
            payload_left: payload,
            staging_free: (0..staging).rev().collect(),
            staging: vec![0; usize::from(staging) * page_size],
            page_size,
            kept,
            next_number: 0,
        }
    }

    /// Operations that may be under way at the same time.
    pub(crate) fn capacity(&self) -> usize {
        self.states.len()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.states.len() - self.free.len()
    }

    /// May a request make a step?
    pub(crate) fn has_payload_room(&self) -> bool {
        self.payload_left >= OPS_PER_STEP
    }

    /// May an operation without staging be made for metadata?
    pub(crate) fn has_room(&self) -> bool {
        self.free.len() > self.payload_left + self.staging_free.len() + self.kept
    }

    pub(crate) fn has_staging(&self) -> bool {
        !self.staging_free.is_empty()
    }

    pub(crate) fn staging_left(&self) -> usize {
        self.staging_free.len()
    }

    /// Makes an operation. The caller has asked for room before.
    pub(crate) fn insert(&mut self, owner: Owner, file: FileId, kind: OpKind, queue: u16) -> OpId {
        self.payload_left -= usize::from(matches!(owner, Owner::Request(_)));
        let staged = matches!(kind, OpKind::MetaRead { .. } | OpKind::MetaWrite { .. });
        let staging =
            staged.then(|| self.staging_free.pop().expect("callers ask for staging first"));
        self.put(OpState { owner, file, kind, queue, staging, retries: 0, number: 0, ends: false })
    }

    /// The same as [`insert`](Self::insert) for an operation of a request's payload in the image.
    #[inline]
    pub(crate) fn insert_payload(
        &mut self,
        id: RequestId,
        kind: OpKind,
        queue: u16,
        ends: bool,
    ) -> OpId {
        self.payload_left -= 1;
        let owner = Owner::Request(id);
        let file = FileId::Image;
        self.put(OpState { owner, file, kind, queue, staging: None, retries: 0, number: 0, ends })
    }

    #[inline]
    fn put(&mut self, mut state: OpState) -> OpId {
        let id = self.free.pop().expect("callers ask for room first");
        state.number = self.next_number;
        self.next_number += 1;
        self.states[id as usize] = Some(state);
        OpId(id)
    }

    pub(crate) fn get(&self, id: OpId) -> &OpState {
        self.states[id.0 as usize].as_ref().expect("an operation under way")
    }

    pub(crate) fn get_mut(&mut self, id: OpId) -> &mut OpState {
        self.states[id.0 as usize].as_mut().expect("an operation under way")
    }

    /// The same as [`remove`](Self::remove) for an operation of a request's payload.
    #[inline]
    pub(crate) fn forget_payload(&mut self, id: OpId) {
        self.states[id.0 as usize] = None;
        self.free.push(id.0);
        self.payload_left += 1;
    }

    pub(crate) fn remove(&mut self, id: OpId) -> OpState {
        let state = self.states[id.0 as usize].take().expect("an operation under way");
        self.free.push(id.0);
        self.payload_left += usize::from(matches!(state.owner, Owner::Request(_)));
        self.staging_free.extend(state.staging);
        state
    }

    /// Is a write of the header under way?
    pub(crate) fn writes_header(&self) -> bool {
        let header = |op: &OpState| matches!(op.kind, OpKind::MetaWrite { offset: 0, .. });
        self.states.iter().flatten().any(header)
    }

    /// Is guest data on its way to any of these bytes of the image?
    pub(crate) fn writes_guest_data(&self, bytes: Range<u64>) -> bool {
        self.states.iter().flatten().any(|op| match op.kind {
            OpKind::Write { offset, len, .. }
            | OpKind::WriteZeros { offset, len }
            | OpKind::CopyWrite { offset, len, .. } => {
                let end = offset.saturating_add(len.into());
                op.file == FileId::Image && offset < bytes.end && bytes.start < end
            }
            _ => false,
        })
    }

    /// The number that the next operation will have.
    pub(crate) fn next_number(&self) -> u64 {
        self.next_number
    }

    /// The number of the oldest operation under way that reads or writes guest data.
    pub(crate) fn oldest_payload(&self) -> u64 {
        let payload = |op: &&OpState| matches!(op.owner, Owner::Request(_) | Owner::Copy(_));
        let under_way = self.states.iter().flatten().filter(payload);
        under_way.map(|op| op.number).min().unwrap_or(u64::MAX)
    }

    /// The staging buffer of an operation that has one.
    pub(crate) fn staging(&self, id: OpId) -> &[u8] {
        let start = self.staging_start(id);
        &self.staging[start..start + self.page_size]
    }

    pub(crate) fn staging_mut(&mut self, id: OpId) -> &mut [u8] {
        let start = self.staging_start(id);
        &mut self.staging[start..start + self.page_size]
    }

    fn staging_start(&self, id: OpId) -> usize {
        let slot = self.get(id).staging.expect("only metadata operations have staging");
        usize::from(slot) * self.page_size
    }
}
