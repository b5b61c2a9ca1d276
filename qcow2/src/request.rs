//! The state of guest requests. A request's place in the table is queue × depth + tag, so there is
//! nothing to allocate and nothing to look up.

use crate::error::IoErrorKind;
use crate::op::Request;
use crate::read::Cursor;
use crate::units::{GuestCluster, HostCluster};

/// Runs of new clusters that one request may have under way at the same time. More of them wait:
/// a 512 KiB write has more than eight runs only where the free space is in crumbs.
pub(crate) const MAX_SEGMENTS: usize = 8;

/// Place of a request in the table.
pub(crate) type RequestId = usize;

/// Which cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    L2,
    Refcounts,
}

/// What a request waits for. Waking one too early is harmless: it looks again and waits again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Nothing: it is in the ready queue or was not looked at yet.
    Nothing,
    /// Its own operations.
    Ops,
    /// A page to be loaded.
    Page(Which, u64),
    /// A clean slot in a cache.
    Slot(Which),
    /// A place in the table of operations.
    OpSlot,
    /// A staging buffer.
    Staging,
    /// Somebody else's allocation for this guest cluster.
    Cluster(GuestCluster),
    /// A new L2 table for this L1 entry being zeroed.
    Table(u64),
    /// Clusters in the reservation.
    Reserve,
    /// Room in the overlay.
    Overlay,
    /// Room in quarantine.
    Quarantine,
    /// Room in the journal.
    Journal,
    /// The end of the next round, which makes all durable that is complete now.
    NextFlush,
    /// The end of this round.
    ThisFlush,
}

/// Why a step could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    Wait(Wait),
    Fail(IoErrorKind),
}

/// The result of a step.
pub(crate) type Step<T> = Result<T, Stop>;

/// Host clusters that a write is filling and that no L2 entry shows as data yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) guest: GuestCluster,
    pub(crate) host: HostCluster,
    pub(crate) count: u64,
    /// Of which units: all, or with extended L2 entries some of a single cluster.
    pub(crate) units: u32,
    /// Allocated for this write (and given back if that fails), not kept by a zero cluster before.
    pub(crate) allocated: bool,
    /// The mapping may become durable together with the data, or before it.
    pub(crate) unordered: bool,
}

/// One guest request.
#[derive(Clone, Debug)]
pub(crate) struct RequestState {
    /// Which of the table it is.
    pub(crate) queue: u16,
    pub(crate) tag: u16,
    pub(crate) request: Option<Request>,
    /// Bytes for which operations were issued.
    pub(crate) pos: u32,
    /// How far the search for the byte at `pos` has come.
    pub(crate) cursor: Cursor,
    /// Operations under way.
    pub(crate) pending: u32,
    pub(crate) wait: Wait,
    pub(crate) error: Option<IoErrorKind>,
    pub(crate) segments: [Option<Segment>; MAX_SEGMENTS],
    pub(crate) segment_count: usize,
}

impl RequestState {
    /// The request that `queue` has under `tag`, of which there is none yet.
    pub(crate) fn idle(queue: u16, tag: u16) -> Self {
        Self {
            queue,
            tag,
            request: None,
            pos: 0,
            cursor: Cursor::START,
            pending: 0,
            wait: Wait::Nothing,
            error: None,
            segments: [None; MAX_SEGMENTS],
            segment_count: 0,
        }
    }

    /// A request has come. (What segments there were is of no account: none is counted.)
    pub(crate) fn begin(&mut self, request: Request) {
        self.request = Some(request);
        (self.pos, self.cursor, self.pending) = (0, Cursor::START, 0);
        (self.wait, self.error, self.segment_count) = (Wait::Nothing, None, 0);
    }

    pub(crate) fn push_segment(&mut self, segment: Segment) {
        self.segments[self.segment_count] = Some(segment);
        self.segment_count += 1;
    }

    /// The segments that are still to be committed.
    pub(crate) fn segments(&self) -> impl Iterator<Item = &Segment> {
        self.segments[..self.segment_count].iter().flatten()
    }

    pub(crate) fn range(&self) -> (u64, u32) {
        match self.request {
            Some(
                Request::Read { offset, len }
                | Request::Write { offset, len, .. }
                | Request::WriteZeroes { offset, len, .. }
                | Request::Discard { offset, len },
            ) => (offset, len),
            Some(Request::Flush) | None => (0, 0),
        }
    }

    pub(crate) fn is_read(&self) -> bool {
        matches!(self.request, Some(Request::Read { .. }))
    }
}
