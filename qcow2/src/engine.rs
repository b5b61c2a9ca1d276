//! The engine: one value that owns all state of one image.
//!
//! Its methods are of four kinds. **Events** in: [`submit`](Engine::submit),
//! [`complete`](Engine::complete), [`tick`](Engine::tick). **Commands**: [`close`](Engine::close).
//! **Actions** out: [`next_record`](Engine::next_record) first, if there is a journal, then
//! [`next_op`](Engine::next_op) and [`next_reply`](Engine::next_reply), to be drained until `None`
//! after each event. And **getters**.
//!
//! An event changes state and puts what can go on into a queue; then [`Engine::run`] works that
//! queue off. Handlers never call each other back, so there is no recursion and no order of calls
//! to remember. A step of a request looks everything up first; where something is missing it notes
//! what it waits for and changes nothing, and later simply looks again.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::adopt::Adoption;
use crate::allocator::Allocator;
use crate::cache::Cache;
use crate::copy::Copies;
use crate::entry::Decoder;
use crate::epoch::Epochs;
use crate::error::{Failure, IoErrorKind, OpenError};
use crate::flush::Round;
use crate::geometry::Geometry;
use crate::header::Header;
use crate::image::Image;
use crate::layer::Layer;
use crate::life::{Life, MAX_INCIDENTS, Mark};
use crate::mark;
use crate::metaset::MetaSet;
use crate::op::{Op, OpId, OpKind, Outcome, Reply, Request};
use crate::optable::{OpTable, Owner};
use crate::options::Options;
use crate::overlay::Overlay;
use crate::planted::{self, Bug};
use crate::quarantine::Quarantine;
use crate::record::Records;
use crate::report::{Memory, Stats};
use crate::request::{RequestId, RequestState, Step, Stop, Wait};
use crate::table::Table;
use crate::write::NewTable;
use crate::zero::Zeroing;

/// One image being served. See the [crate] for the picture.
#[derive(Clone, Debug)]
pub struct Engine {
    pub(crate) decoder: Decoder,
    pub(crate) header: Header,
    pub(crate) options: Options,
    virtual_size: u64,
    pub(crate) file_len: u64,
    /// The end of what was written to the image file, if it ended within a cluster of data. (The
    /// clusters up to `file_len` are allocated; a write does not allocate those it passes.)
    pub(crate) written_end: u64,
    pub(crate) life: Life,
    pub(crate) failed: Option<Failure>,
    pub(crate) corrupt_mark: Mark,
    pub(crate) incidents: VecDeque<Failure>,

    pub(crate) requests: Vec<RequestState>,
    pub(crate) active: usize,
    /// Requests that wait for something else than their own operations.
    pub(crate) blocked: usize,
    pub(crate) ready: VecDeque<RequestId>,
    /// Requests with segments: allocations under way.
    pub(crate) writers: Vec<RequestId>,
    pub(crate) new_tables: Vec<NewTable>,
    pub(crate) ops: OpTable,
    pub(crate) out: Vec<VecDeque<OpId>>,
    pub(crate) replies: Vec<VecDeque<Reply>>,
    /// The queue whose event is being handled: metadata operations go out there.
    pub(crate) current_queue: u16,
    /// Something was handed in or back that has to be worked on.
    pub(crate) due: bool,

    pub(crate) l1: Table,
    pub(crate) refcount_table: Table,
    pub(crate) metadata: MetaSet,
    pub(crate) l2_cache: Cache,
    pub(crate) refcount_cache: Cache,
    pub(crate) allocator: Allocator,
    pub(crate) overlay: Overlay,
    pub(crate) quarantine: Quarantine,
    pub(crate) copies: Copies,
    /// Bytes of the external data file, if there is one.
    pub(crate) data_len: Option<u64>,
    /// What lies beneath, from the top.
    pub(crate) layers: Vec<Layer>,
    /// Fdatasyncs in flight: one for each file.
    pub(crate) syncs: u8,
    pub(crate) round: Round,
    pub(crate) epochs: Epochs,
    /// Of all clusters allocated since open, so many have durable mappings.
    pub(crate) allocated_durable: u64,
    pub(crate) now_ms: u64,
    /// When metadata became dirty, if it is.
    pub(crate) dirty_since_ms: Option<u64>,
    pub(crate) stats: Stats,
    /// What the driver's journal has to know, if there is one.
    pub(crate) records: Option<Records>,
    /// What a killed process has left to us, as long as that is not durable.
    pub(crate) adoption: Option<Adoption>,
}

impl Engine {
    /// An engine for `image`. A writable one begins with an fdatasync: pump operations until
    /// [`is_ready`](Engine::is_ready).
    ///
    /// # Errors
    /// Options that do not fit the image.
    pub fn new(image: Image, options: &Options) -> Result<Self, OpenError> {
        let mut engine = Self::build(image, options)?;
        engine.begin_open();
        Ok(engine)
    }

    /// An engine for which nothing was sent off yet.
    pub(crate) fn build(image: Image, options: &Options) -> Result<Self, OpenError> {
        let geometry = image.decoder.geometry;
        options.validate(geometry.cluster_size())?;
        image.check_files()?;
        let count = usize::from(options.queues) * usize::from(options.depth);
        let (l2_pages, refcount_pages, staging) = sizes(&image, options);
        let (overlay, copy_buffers) = if options.stress { (4, 1) } else { (2048, 16) };
        // At least as many as one request may want to take at a time, and a table.
        let reservation = (options.reservation >> geometry.cluster_bits()).max(4);
        let metadata_end = first_fresh(&image, options);
        let per_queue = count / usize::from(options.queues);
        let ops = OpTable::new(count, staging, copy_buffers, geometry);
        // Each made on its own: a clone of an empty queue has no room.
        let out = (0..options.queues).map(|_| VecDeque::with_capacity(ops.capacity())).collect();
        let replies = (0..options.queues).map(|_| VecDeque::with_capacity(per_queue)).collect();
        let mut engine = Self {
            decoder: image.decoder,
            virtual_size: image.virtual_size(),
            header: image.header,
            options: options.clone(),
            file_len: image.file_len,
            written_end: 0,
            life: if options.read_only { Life::Serving } else { Life::Opening },
            failed: None,
            corrupt_mark: Mark::No,
            incidents: VecDeque::with_capacity(MAX_INCIDENTS),
            requests: (0..options.queues)
                .flat_map(|queue| (0..options.depth).map(move |tag| RequestState::idle(queue, tag)))
                .collect(),
            active: 0,
            blocked: 0,
            ready: VecDeque::with_capacity(count * 2),
            writers: Vec::with_capacity(count),
            new_tables: Vec::with_capacity(count),
            ops,
            out,
            replies,
            current_queue: 0,
            due: false,
            l1: image.l1,
            refcount_table: image.refcounts,
            metadata: image.metadata,
            l2_cache: Cache::new(l2_pages, geometry),
            refcount_cache: Cache::new(refcount_pages, geometry),
            allocator: Allocator::new(metadata_end, reservation, !image.layers.is_empty()),
            overlay: Overlay::new(overlay),
            quarantine: Quarantine::new(),
            copies: Copies::new(copy_buffers, count),
            data_len: image.data_len,
            layers: image.layers,
            syncs: 0,
            round: Round::default(),
            // A process may have died a moment ago: what was read is not durable.
            epochs: Epochs::new(!options.read_only),
            allocated_durable: 0,
            now_ms: 0,
            dirty_since_ms: None,
            stats: Stats::default(),
            records: Records::new(if options.read_only { 0 } else { options.journal }),
            adoption: None,
        };
        engine.round.reserve(overlay);
        Ok(engine)
    }

    // ---- events ----

    /// A guest request arrives on `queue` with `tag` (below the queue depth, not in use). A request
    /// outside the virtual disk, or not made of sectors, is answered with `Invalid`.
    pub fn submit(&mut self, queue: u16, tag: u16, request: Request) {
        self.hand_in(queue, tag, request);
        self.go_on();
    }

    /// The same without working on it, unless it is a hit: [`go_on`](Self::go_on) does, for all
    /// that has come. Until then nothing may be taken out.
    pub fn hand_in(&mut self, queue: u16, tag: u16, request: Request) {
        assert!(queue < self.options.queues && tag < self.options.depth, "the driver's bug");
        let id = usize::from(queue) * usize::from(self.options.depth) + usize::from(tag);
        assert!(self.requests[id].request.is_none(), "tag {tag} of queue {queue} is in use");
        self.active += 1;
        if let Some(hit) = self.find_hit(tag, request) {
            return self.take_short_way(id, request, &hit);
        }
        self.current_queue = queue;
        self.requests[id].begin(request);
        if !self.is_valid(request) {
            self.requests[id].error = Some(IoErrorKind::Invalid);
        } else if self.options.read_only && !matches!(request, Request::Read { .. }) {
            // A FLUSH has nothing to do; a write is refused.
            if !matches!(request, Request::Flush) {
                self.requests[id].error = Some(IoErrorKind::Io);
            }
        }
        self.ready.push_back(id);
        self.due = true;
    }

    /// Works on what was handed in and handed back.
    pub fn go_on(&mut self) {
        if core::mem::take(&mut self.due) {
            self.run();
        }
    }

    fn is_valid(&self, request: Request) -> bool {
        match request {
            Request::Read { offset, len }
            | Request::Write { offset, len, .. }
            | Request::WriteZeroes { offset, len, .. }
            | Request::Discard { offset, len } => {
                let end = offset.checked_add(len.into());
                let inside = end.is_some_and(|end| end <= self.virtual_size);
                inside && len != 0 && offset % 512 == 0 && len % 512 == 0
            }
            Request::Flush => true,
        }
    }

    /// Operation `id` has ended.
    pub fn complete(&mut self, id: OpId, outcome: Outcome) {
        self.hand_back(id, outcome);
        self.go_on();
    }

    /// The same without working on what follows: [`go_on`](Self::go_on) does, for all that has
    /// come. Until then nothing may be taken out.
    pub fn hand_back(&mut self, id: OpId, outcome: Outcome) {
        if outcome == Outcome::Done && self.ends_short_way(id) {
            return;
        }
        let state = *self.ops.get(id);
        self.current_queue = state.queue;
        let writes = match state.kind {
            // That of a discard is seen by the guest. Of a cluster that nobody has any more it
            // need not become durable: whoever takes that next zeroes it.
            OpKind::Punch { .. } => matches!(state.owner, Owner::Request(_)),
            OpKind::Sync => false,
            kind => !kind.only_reads(),
        };
        self.note_len(state.file, state.kind, outcome);
        // Also when it failed: some of it may have got there.
        if writes {
            self.epochs.note_write();
        }
        let outcome = match outcome {
            Outcome::Short(done) => {
                // A short transfer is one of less than the whole; a driver's bug would end here.
                let Some(outcome) = self.take_up_short(id, done) else {
                    self.due = true;
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
        self.due = true;
        if matches!(state.owner, Owner::Load(..)) {
            // Who has waited for the page looks at it before another can take its place.
            self.go_on();
        }
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

    // ---- actions ----

    /// The next operation for `queue` to carry out. None while there are records to be taken.
    pub fn next_op(&mut self, queue: u16) -> Option<Op> {
        if !self.is_recorded() {
            return None;
        }
        let id = self.out[usize::from(queue)].pop_front()?;
        let state = self.ops.get(id);
        Some(Op { id, file: state.file, kind: state.kind })
    }

    /// The next answer to a request of `queue`. None while there are records to be taken.
    pub fn next_reply(&mut self, queue: u16) -> Option<Reply> {
        if !self.is_recorded() {
            return None;
        }
        self.replies[usize::from(queue)].pop_front()
    }

    /// Whether there is an operation or a reply for `queue`.
    #[must_use]
    pub fn has_something_for(&self, queue: u16) -> bool {
        let queue = usize::from(queue);
        !self.out[queue].is_empty() || !self.replies[queue].is_empty()
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

    /// May requests be served? Not before the first fdatasync of a writable open has returned, and
    /// what a predecessor has left is durable.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(self.life, Life::Serving)
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            reserved: self.allocator.reserved(),
            quarantined: self.quarantine.clusters(),
            overlay: self.overlay.len() as u64,
            ..self.stats
        }
    }

    /// Copy buffers of [`COPY_BUFFER`](crate::COPY_BUFFER) bytes that the driver has to have.
    #[must_use]
    pub fn copy_buffers(&self) -> usize {
        self.copies.buffers()
    }

    /// Host clusters that a crash at this moment may leave counted and not used.
    #[must_use]
    pub fn leak_bound(&self) -> u64 {
        let allocated = self.stats.allocated_data + self.stats.allocated_metadata;
        let released = self.quarantine.clusters() + self.quarantine.settling();
        self.allocator.reserved() + released + self.moving() + allocated - self.allocated_durable
    }

    /// How many clusters of those allocated have a mapping that the next round makes durable.
    pub(crate) fn allocated_and_settled(&self) -> u64 {
        let allocated = self.stats.allocated_data + self.stats.allocated_metadata;
        let tables = self.new_tables.len() as u64;
        allocated.saturating_sub(self.in_progress() + tables)
    }

    /// Operations that may be under way at the same time.
    #[must_use]
    pub fn max_ops(&self) -> usize {
        self.ops.capacity()
    }

    /// For tests: what every request waits for, and what the round does.
    #[cfg(feature = "testing")]
    #[must_use]
    pub fn waits(&self) -> alloc::string::String {
        let active = self.requests.iter().filter(|state| state.request.is_some());
        let waits: Vec<_> = active.map(|state| (state.wait, state.pending)).collect();
        let round = (self.round.phase, self.round.wanted, self.round.writes, self.round.waiting);
        alloc::format!("{waits:?} round {round:?} {:?} {:?}", self.allocator, self.quarantine)
    }

    /// Size of the virtual disk in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// What it was made with.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Are there no requests, and no replies that nobody has taken?
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.active == 0 && (0..self.options.queues).all(|queue| !self.has_something_for(queue))
    }

    /// Memory in use.
    #[must_use]
    pub fn memory(&self) -> Memory {
        let beneath: u64 = self.layers.iter().map(Layer::l1_entries).sum();
        let words = self.l1.len() + self.refcount_table.len() + beneath;
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
    pub(crate) fn run(&mut self) {
        loop {
            // First, so that readers don't take the staging that it needs again and again.
            self.end_writing();
            while let Some(id) = self.ready.pop_front() {
                self.step(id);
            }
            self.advance_copies();
            self.advance_adoption();
            self.advance_quarantine();
            self.refill();
            self.check_starved();
            let ended = self.advance_round();
            self.end_writing();
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
            Request::WriteZeroes { unmap, .. } => {
                self.step_zero(id, Zeroing { discard: false, unmap })
            }
            Request::Discard { .. } => self.step_zero(id, Zeroing { discard: true, unmap: true }),
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
        if self.epochs.is_volatile() || self.is_dirty() || !self.round.is_idle() {
            if planted::is(Bug::FlushSkipped) && !self.is_dirty() {
                return Ok(());
            }
            self.round.wanted = true;
            if planted::is(Bug::FlushJoinsRunningSync) && !self.round.is_idle() {
                return Err(Stop::Wait(Wait::ThisFlush));
            }
            if !self.round.is_idle() {
                mark!("flush.waits_for_next_round");
            }
            return Err(Stop::Wait(Wait::NextFlush));
        }
        Ok(())
    }

    pub(crate) fn reply(&mut self, id: RequestId) {
        let state = &mut self.requests[id];
        debug_assert_eq!((state.pending, state.segment_count), (0, 0));
        let (queue, tag) = (state.queue, state.tag);
        let result = state.error.map_or(Ok(()), Err);
        match state.request.take() {
            Some(Request::Read { .. }) => self.stats.reads += 1,
            Some(Request::Write { fua, .. }) => {
                self.stats.writes += 1;
                self.stats.fua_writes += u64::from(fua);
            }
            Some(Request::WriteZeroes { .. } | Request::Discard { .. }) => self.stats.zeroes += 1,
            Some(Request::Flush) => self.stats.flushes += 1,
            None => unreachable!("only active requests make steps"),
        }
        self.stats.errors += u64::from(result.is_err());
        self.active -= 1;
        self.replies[usize::from(queue)].push_back(Reply { tag, result });
    }
}

/// The first cluster behind all that may be in use: the end of the file; of a block device, the end
/// of what refcount blocks count.
fn first_fresh(image: &Image, options: &Options) -> u64 {
    let geometry = image.decoder.geometry;
    let end = geometry.clusters_for(image.file_len);
    if !options.fixed_size {
        return end;
    }
    let last = image.refcounts.words().iter().rposition(|&word| word != 0);
    let blocks = last.map_or(0, |index| index as u64 + 1);
    (blocks << geometry.refblock_bits()).clamp(1, end.max(1))
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
