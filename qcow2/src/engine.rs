//! The engine: one value that owns all state of one image.
//!
//! Its methods are of four kinds. **Events** in: [`submit`](Engine::submit),
//! [`complete`](Engine::complete), [`tick`](Engine::tick). **Commands**: [`close`](Engine::close).
//! **Actions** out: [`next_op`](Engine::next_op), [`next_reply`](Engine::next_reply), to be drained
//! until `None` after each event. And **getters**.
//!
//! An event changes state and puts what can go on into a queue; then [`Engine::run`] works that
//! queue off. Handlers never call each other back, so there is no recursion and no order of calls
//! to remember. A step of a request looks everything up first; where something is missing it notes
//! what it waits for and changes nothing, and later simply looks again.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use crate::allocator::Allocator;
use crate::cache::Cache;
use crate::entry::Decoder;
use crate::error::{Failure, FailureKind, IoErrorKind, OpenError};
use crate::flush::Round;
use crate::geometry::Geometry;
use crate::header::Header;
use crate::image::Image;
use crate::metaset::MetaSet;
use crate::op::{FileId, Op, OpId, OpKind, Outcome, Reply, Request};
use crate::optable::{OpTable, Owner};
use crate::options::Options;
use crate::request::{RequestId, RequestState, Step, Stop, Wait};
use crate::table::Table;
use crate::write::NewTable;

/// Counters since open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Guest reads that were replied to.
    pub reads: u64,
    /// Guest writes that were replied to.
    pub writes: u64,
    /// Guest FLUSHes that were replied to.
    pub flushes: u64,
    /// fdatasyncs issued.
    pub syncs: u64,
    /// Host clusters allocated for guest data.
    pub allocated_data: u64,
    /// Host clusters allocated for metadata.
    pub allocated_metadata: u64,
    /// Pages that had to be read.
    pub cache_misses: u64,
    /// Metadata reads issued.
    pub metadata_reads: u64,
    /// Metadata writes issued.
    pub metadata_writes: u64,
    /// Requests that ended with an error.
    pub errors: u64,
}

/// Memory in use, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Budget of the L2 and refcount caches; committed by use.
    pub caches: u64,
    /// L1 table, refcount table and the set of metadata clusters; grows with the image.
    pub tables: u64,
}

/// Whether the image still takes writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// All is well.
    Good,
    /// A metadata write or an fdatasync failed, or the image contradicts itself: writes and
    /// FLUSHes fail from now on, reads go on.
    Failed(Failure),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// Before the first fdatasync has returned.
    Opening,
    Serving,
    Closing {
        truncated: bool,
    },
    Closed,
}

/// Incidents that are kept for the server's log; more are counted only.
const MAX_INCIDENTS: usize = 16;

/// One image being served. See the [crate] for the picture.
#[derive(Clone, Debug)]
pub struct Engine {
    pub(crate) decoder: Decoder,
    pub(crate) header: Header,
    pub(crate) options: Options,
    virtual_size: u64,
    pub(crate) file_len: u64,
    pub(crate) life: Life,
    pub(crate) failed: Option<Failure>,
    incidents: VecDeque<Failure>,

    pub(crate) requests: Vec<RequestState>,
    pub(crate) active: usize,
    /// Requests that wait for something else than their own operations.
    blocked: usize,
    pub(crate) ready: VecDeque<RequestId>,
    /// Requests with segments: allocations under way.
    pub(crate) writers: Vec<RequestId>,
    pub(crate) new_tables: Vec<NewTable>,
    pub(crate) ops: OpTable,
    pub(crate) out: Vec<VecDeque<OpId>>,
    replies: Vec<VecDeque<Reply>>,
    /// The queue whose event is being handled: metadata operations go out there.
    pub(crate) current_queue: u16,

    pub(crate) l1: Table,
    pub(crate) refcount_table: Table,
    pub(crate) metadata: MetaSet,
    pub(crate) l2_cache: Cache,
    pub(crate) refcount_cache: Cache,
    pub(crate) allocator: Allocator,
    pub(crate) round: Round,
    /// Some write has completed since the submission of the last successful fdatasync.
    pub(crate) volatile: bool,
    pub(crate) now_ms: u64,
    /// When metadata became dirty, if it is.
    pub(crate) dirty_since_ms: Option<u64>,
    pub(crate) stats: Stats,
}

impl Engine {
    /// An engine for `image`. A writable one begins with an fdatasync: pump operations until
    /// [`is_ready`](Engine::is_ready).
    ///
    /// # Errors
    /// Options that do not fit the image.
    pub fn new(image: Image, options: &Options) -> Result<Self, OpenError> {
        let geometry = image.decoder.geometry;
        options.validate(geometry.cluster_size())?;
        let count = usize::from(options.queues) * usize::from(options.depth);
        let (l2_pages, refcount_pages, staging) = sizes(&image, options);
        let metadata_end = geometry.clusters_for(image.file_len);
        let per_queue = count / usize::from(options.queues);
        let ops = OpTable::new(count, staging, geometry);
        let out = vec![VecDeque::with_capacity(ops.capacity()); options.queues.into()];
        let replies = vec![VecDeque::with_capacity(per_queue); options.queues.into()];
        let mut engine = Self {
            decoder: image.decoder,
            virtual_size: image.virtual_size(),
            header: image.header,
            options: options.clone(),
            file_len: image.file_len,
            life: if options.read_only { Life::Serving } else { Life::Opening },
            failed: None,
            incidents: VecDeque::with_capacity(MAX_INCIDENTS),
            requests: vec![RequestState::IDLE; count],
            active: 0,
            blocked: 0,
            ready: VecDeque::with_capacity(count * 2),
            writers: Vec::with_capacity(count),
            new_tables: Vec::with_capacity(count),
            ops,
            out,
            replies,
            current_queue: 0,
            l1: image.l1,
            refcount_table: image.refcounts,
            metadata: image.metadata,
            l2_cache: Cache::new(l2_pages, geometry),
            refcount_cache: Cache::new(refcount_pages, geometry),
            allocator: Allocator::new(metadata_end),
            round: Round::default(),
            // A process may have died a moment ago: what was read is not durable.
            volatile: !options.read_only,
            now_ms: 0,
            dirty_since_ms: None,
            stats: Stats::default(),
        };
        if !options.read_only {
            engine.emit_sync(Owner::FirstSync);
        }
        Ok(engine)
    }

    // ---- events ----

    /// A guest request arrives on `queue` with `tag` (below the queue depth, not in use). A request
    /// outside the virtual disk, or not made of sectors, is answered with `Invalid`.
    pub fn submit(&mut self, queue: u16, tag: u16, request: Request) {
        assert!(queue < self.options.queues && tag < self.options.depth, "the driver's bug");
        let id = usize::from(queue) * usize::from(self.options.depth) + usize::from(tag);
        assert!(self.requests[id].request.is_none(), "tag {tag} of queue {queue} is in use");
        self.current_queue = queue;
        self.requests[id] = RequestState { request: Some(request), ..RequestState::IDLE };
        self.active += 1;
        if !self.is_valid(request) {
            self.requests[id].error = Some(IoErrorKind::Invalid);
        } else if self.options.read_only && !matches!(request, Request::Read { .. }) {
            // A FLUSH has nothing to do; a write is refused.
            if !matches!(request, Request::Flush) {
                self.requests[id].error = Some(IoErrorKind::Io);
            }
        }
        self.ready.push_back(id);
        self.run();
    }

    fn is_valid(&self, request: Request) -> bool {
        match request {
            Request::Read { offset, len } | Request::Write { offset, len, .. } => {
                let end = offset.checked_add(len.into());
                let inside = end.is_some_and(|end| end <= self.virtual_size);
                inside && len != 0 && offset % 512 == 0 && len % 512 == 0
            }
            Request::Flush => true,
        }
    }

    /// Operation `id` has ended.
    pub fn complete(&mut self, id: OpId, outcome: Outcome) {
        let state = *self.ops.get(id);
        self.current_queue = state.queue;
        let writes = matches!(
            state.kind,
            OpKind::Write { .. }
                | OpKind::WriteZeros { .. }
                | OpKind::MetaWrite { .. }
                | OpKind::Extend { .. }
                | OpKind::Truncate { .. }
        );
        // Also when it failed: some of it may have got there.
        self.volatile |= writes;
        let outcome = match outcome {
            Outcome::Short(done) => {
                // A short transfer is one of less than the whole; a driver's bug would end here.
                let Some(outcome) = self.take_up_short(id, done) else {
                    self.run();
                    return;
                };
                outcome
            }
            whole => whole,
        };
        let result = match outcome {
            Outcome::Error(kind) => Err(kind),
            Outcome::Done | Outcome::Short(_) => Ok(()),
        };
        self.finish_op(id, result);
        self.run();
    }

    /// Time passes: `now_ms` is milliseconds since any fixed moment.
    pub fn tick(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
        let old = |since: u64| now_ms.saturating_sub(since) >= self.options.max_dirty_ms;
        if self.dirty_since_ms.is_some_and(old) {
            self.round.wanted = true;
        }
        self.run();
    }

    // ---- commands ----

    /// No requests will follow: what is under way ends, everything becomes durable, the unused end
    /// of the file is given back. Pump until [`is_closed`](Engine::is_closed).
    pub fn close(&mut self) {
        if matches!(self.life, Life::Opening | Life::Serving) {
            self.life = Life::Closing { truncated: false };
        }
        self.run();
    }

    // ---- actions ----

    /// The next operation for `queue` to carry out.
    pub fn next_op(&mut self, queue: u16) -> Option<Op> {
        let id = self.out[usize::from(queue)].pop_front()?;
        Some(Op { id, file: FileId::Image, kind: self.ops.get(id).kind })
    }

    /// The next answer to a request of `queue`.
    pub fn next_reply(&mut self, queue: u16) -> Option<Reply> {
        self.replies[usize::from(queue)].pop_front()
    }

    /// The next thing that an operator should know of and that no reply tells in full.
    pub fn next_incident(&mut self) -> Option<Failure> {
        self.incidents.pop_front()
    }

    // ---- getters ----

    /// The bytes that a metadata write puts into the file.
    #[must_use]
    pub fn staging(&self, id: OpId) -> &[u8] {
        let len = match self.ops.get(id).kind {
            OpKind::MetaWrite { len, .. } | OpKind::MetaRead { len, .. } => len,
            _ => 0,
        };
        &self.ops.staging(id)[..len as usize]
    }

    /// Takes the bytes that a metadata read has found, before it is completed.
    pub fn fill_staging(&mut self, id: OpId, bytes: &[u8]) {
        self.ops.staging_mut(id)[..bytes.len()].copy_from_slice(bytes);
    }

    /// May requests be served? Not before the first fdatasync of a writable open has returned.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(self.life, Life::Serving)
    }

    /// Has [`close`](Engine::close) come to its end? If it ended in failure, `health` says so.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self.life, Life::Closed)
    }

    /// Whether the image still takes writes.
    #[must_use]
    pub fn health(&self) -> Health {
        self.failed.map_or(Health::Good, Health::Failed)
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Operations that may be under way at the same time.
    #[must_use]
    pub fn max_ops(&self) -> usize {
        self.ops.capacity()
    }

    /// Size of the virtual disk in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// Memory in use.
    #[must_use]
    pub fn memory(&self) -> Memory {
        let words = self.l1.len() + self.refcount_table.len();
        Memory {
            caches: self.l2_cache.memory() + self.refcount_cache.memory(),
            tables: words * Geometry::ENTRY_BYTES + self.metadata.memory(),
        }
    }

    /// Not before the first fdatasync has returned.
    pub(crate) fn may_begin_round(&self) -> bool {
        !matches!(self.life, Life::Opening | Life::Closed) && !self.options.read_only
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.decoder.geometry
    }

    // ---- the loop ----

    /// Works off what can go on.
    fn run(&mut self) {
        loop {
            while let Some(id) = self.ready.pop_front() {
                self.step(id);
            }
            self.free_clusters();
            let ended = self.advance_round();
            if self.ready.is_empty() && !ended {
                break;
            }
        }
        self.advance_close();
    }

    /// Makes as many steps of one request as possible.
    fn step(&mut self, id: RequestId) {
        let state = &self.requests[id];
        let Some(request) = state.request else { return };
        if matches!(state.wait, Wait::NextFlush | Wait::ThisFlush) && self.failed.is_none() {
            return;
        }
        self.set_wait(id, Wait::Nothing);
        if self.failed.is_some() && !matches!(request, Request::Read { .. }) {
            self.requests[id].error.get_or_insert(IoErrorKind::Io);
        }
        let done = match request {
            Request::Read { .. } => self.step_read(id),
            Request::Write { fua, .. } => self.step_write(id, fua),
            Request::Flush => self.step_flush(id),
        };
        match done {
            Ok(()) => self.reply(id),
            Err(Stop::Wait(wait)) => self.set_wait(id, wait),
            Err(Stop::Fail(kind)) => {
                self.requests[id].error.get_or_insert(kind);
                self.ready.push_back(id);
            }
        }
    }

    fn step_flush(&mut self, id: RequestId) -> Step<()> {
        if self.requests[id].error.is_some() || self.options.read_only {
            return Ok(());
        }
        self.durable()
    }

    /// Waits until all that is complete now is durable.
    pub(crate) fn durable(&mut self) -> Step<()> {
        if self.volatile || self.is_dirty() || !self.round.is_idle() {
            self.round.wanted = true;
            return Err(Stop::Wait(Wait::NextFlush));
        }
        Ok(())
    }

    pub(crate) fn reply(&mut self, id: RequestId) {
        let state = &mut self.requests[id];
        debug_assert_eq!((state.pending, state.segment_count), (0, 0));
        let result = state.error.map_or(Ok(()), Err);
        match state.request.take() {
            Some(Request::Read { .. }) => self.stats.reads += 1,
            Some(Request::Write { .. }) => self.stats.writes += 1,
            Some(Request::Flush) => self.stats.flushes += 1,
            None => unreachable!("only active requests make steps"),
        }
        self.stats.errors += u64::from(result.is_err());
        self.active -= 1;
        let depth = usize::from(self.options.depth);
        let tag = u16::try_from(id % depth).expect("below the depth");
        self.replies[id / depth].push_back(Reply { tag, result });
    }

    // ---- waiting and waking ----

    pub(crate) fn set_wait(&mut self, id: RequestId, wait: Wait) {
        let counts = |wait| !matches!(wait, Wait::Nothing | Wait::Ops);
        let state = &mut self.requests[id];
        self.blocked -= usize::from(counts(state.wait));
        self.blocked += usize::from(counts(wait));
        state.wait = wait;
    }

    /// Lets every request go on whose wait `matches`.
    pub(crate) fn wake(&mut self, matches: impl Fn(Wait) -> bool) {
        if self.blocked == 0 {
            return;
        }
        for id in 0..self.requests.len() {
            let state = &self.requests[id];
            if state.request.is_some() && matches(state.wait) && state.wait != Wait::Nothing {
                self.set_wait(id, Wait::Nothing);
                self.ready.push_back(id);
            }
        }
    }

    /// The same, with an error.
    pub(crate) fn wake_failing(&mut self, kind: IoErrorKind, matches: impl Fn(Wait) -> bool) {
        for id in 0..self.requests.len() {
            let state = &mut self.requests[id];
            if state.request.is_some() && matches(state.wait) && state.wait != Wait::Nothing {
                state.error.get_or_insert(kind);
            }
        }
        self.wake(matches);
    }

    // ---- failure ----

    /// Tells the operator.
    pub(crate) fn incident(&mut self, kind: FailureKind, offset: u64) {
        if self.incidents.len() < MAX_INCIDENTS {
            self.incidents.push_back(Failure { kind, offset });
        }
    }

    /// Fail-stop: no more writes to this image, ever. Reads go on.
    pub(crate) fn fail(&mut self, kind: FailureKind, offset: u64) {
        if self.failed.is_some() {
            return;
        }
        self.failed = Some(Failure { kind, offset });
        self.incident(kind, offset);
        self.round.stop();
        for id in 0..self.requests.len() {
            let state = &self.requests[id];
            if state.request.is_some() && !state.is_read() {
                self.ready.push_back(id);
            }
        }
        self.wake(|_| true);
    }

    // ---- the end ----

    fn advance_close(&mut self) {
        let Life::Closing { truncated } = self.life else { return };
        if self.active != 0 || self.ops.in_flight() != 0 {
            return;
        }
        self.drop_new_tables();
        if self.failed.is_some() || self.options.read_only {
            self.life = Life::Closed;
        } else if self.has_frees() {
            self.free_clusters();
            self.advance_round();
        } else if self.volatile || self.is_dirty() {
            self.round.wanted = true;
            self.advance_round();
        } else if !truncated && self.allocator.unused_end(self.geometry()) < self.file_len {
            self.life = Life::Closing { truncated: true };
            let to = self.allocator.unused_end(self.geometry());
            self.file_len = to;
            self.emit(Owner::Truncate, OpKind::Truncate { to });
        } else {
            self.life = Life::Closed;
        }
    }
}

/// Pages of the two caches, and staging buffers.
fn sizes(image: &Image, options: &Options) -> (usize, usize, u16) {
    if options.stress {
        return (2, 2, 1);
    }
    let page = image.decoder.geometry.page_size() as u64;
    let whole = image.all_l2_bytes().min(Options::MAX_DEFAULT_L2_CACHE);
    let pages = |bytes: u64| usize::try_from(bytes / page).unwrap_or(usize::MAX);
    let l2 = pages(options.l2_cache.unwrap_or(whole)).max(MIN_PAGES);
    let refcounts = pages(options.refcount_cache).max(MIN_PAGES);
    (l2, refcounts, options.staging)
}

/// Fewer pages make no sense outside tests: 64 KiB.
const MIN_PAGES: usize = 16;
