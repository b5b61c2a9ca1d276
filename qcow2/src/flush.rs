//! Rounds: how what is in memory becomes durable, in an order that every crash survives.
//!
//! A **round** writes all dirty metadata in four groups, each made durable before the next begins:
//!
//! ```text
//!   guest data  ─┐ (complete before the round began)
//!   refcounts   ─┴─ fdatasync ─ refcount table ─ fdatasync ─ L2 ─ fdatasync ─ L1 ─ fdatasync
//! ```
//!
//! So, whatever subset of the not yet synced sectors a power cut leaves:
//!
//! - A refcount is on disk before anything that refers to the cluster. It may be too high (a leak,
//!   which `qemu-img check -r leaks` takes away), never too low.
//! - A refcount block is complete before the refcount table names it; an L2 table before L1 does.
//! - The bytes are on disk before the L2 entry that leads to them: no entry shows what was in the
//!   cluster before.
//!
//! A group that has nothing to write is left out, and so is an fdatasync when no write has
//! completed since the last one was *submitted*. What completes while one is in flight is not
//! covered by it. A FLUSH of an image in which nothing was allocated thus costs one fdatasync, and
//! one that allocated costs two.
//!
//! **While a round runs, mappings stand still** ([`Round::holds`]): a write that has filled a new
//! cluster waits to put it into its L2 page until the round ends, and so do new L2 tables and
//! refcount blocks. Otherwise the third group could contain an entry whose refcount the first group
//! did not. Reads, writes in place, and the filling of new clusters go on. Refcounts may rise at
//! any time, since too high is harmless.
//!
//! A FLUSH or FUA write that arrives during a round waits for the next; all that wait share one.
//!
//! **Invariant:** only this module and [`grow`](crate::grow) write metadata, and only they sync.

use crate::cache::Cache;
use crate::engine::Engine;
use crate::error::{FailureKind, IoErrorKind};
use crate::grow::Grown;
use crate::op::OpKind;
use crate::optable::{OpState, Owner};
use crate::request::{Wait, Which};

/// What a round is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    #[default]
    Idle,
    Refcounts,
    SyncRefcounts,
    RefcountTable,
    SyncRefcountTable,
    L2,
    SyncL2,
    L1,
    SyncL1,
    /// The refcount table moves to a larger place: see [`grow`](crate::grow).
    GrowExtend,
    GrowWrite,
    SyncGrown,
    Header,
    SyncHeader,
    /// All is durable.
    End,
}

/// The round under way, if any.
#[derive(Clone, Debug, Default)]
pub(crate) struct Round {
    pub(crate) phase: Phase,
    /// Somebody wants a round to begin.
    pub(crate) wanted: bool,
    /// Where to go on in what this phase writes.
    pub(crate) cursor: usize,
    /// Writes of this phase that are in flight.
    pub(crate) writes: usize,
    /// The fdatasync, or the extending, of this phase is in flight.
    pub(crate) waiting: bool,
    pub(crate) grown: Option<Grown>,
}

impl Round {
    pub(crate) fn is_idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// Must mappings stand still?
    pub(crate) fn holds(&self) -> bool {
        !self.is_idle()
    }

    /// The image has failed: there will be no more rounds.
    pub(crate) fn stop(&mut self) {
        self.phase = Phase::Idle;
        self.wanted = false;
    }

    pub(crate) fn enter(&mut self, phase: Phase) {
        debug_assert_eq!(self.writes, 0, "a phase ends when all its writes have");
        self.phase = phase;
        self.cursor = 0;
        self.waiting = false;
    }
}

impl Phase {
    fn after_sync(self) -> Self {
        match self {
            Self::SyncRefcounts => Self::RefcountTable,
            Self::SyncRefcountTable => Self::L2,
            Self::SyncL2 => Self::L1,
            Self::SyncL1 => Self::GrowExtend,
            Self::SyncGrown => Self::Header,
            Self::SyncHeader => Self::End,
            _ => unreachable!("not a sync"),
        }
    }
}

impl Engine {
    /// Does what the round can do now. True if a round came to its end.
    pub(crate) fn advance_round(&mut self) -> bool {
        let mut ended = false;
        while self.failed.is_none() && self.advance_phase() {
            ended |= self.round.is_idle();
        }
        ended
    }

    /// Moves on by one phase, unless that has to wait.
    fn advance_phase(&mut self) -> bool {
        match self.round.phase {
            Phase::Idle => self.begin_round(),
            Phase::Refcounts => self.write_pages(Which::Refcounts, Phase::SyncRefcounts),
            Phase::RefcountTable => self.write_top(Which::Refcounts, Phase::SyncRefcountTable),
            Phase::L2 => self.write_pages(Which::L2, Phase::SyncL2),
            Phase::L1 => self.write_top(Which::L2, Phase::SyncL1),
            Phase::SyncRefcounts
            | Phase::SyncRefcountTable
            | Phase::SyncL2
            | Phase::SyncL1
            | Phase::SyncGrown
            | Phase::SyncHeader => self.sync_phase(),
            Phase::GrowExtend => self.grow_extend(),
            Phase::GrowWrite => self.grow_write(),
            Phase::Header => self.grow_header(),
            Phase::End => {
                self.finish_growing();
                self.end_round();
                true
            }
        }
    }

    fn begin_round(&mut self) -> bool {
        if !self.round.wanted || !self.may_begin_round() {
            return false;
        }
        self.round.wanted = false;
        self.dirty_since_ms = None;
        for state in &mut self.requests {
            if state.wait == Wait::NextFlush {
                state.wait = Wait::ThisFlush;
            }
        }
        self.round.enter(Phase::Refcounts);
        true
    }

    fn sync_phase(&mut self) -> bool {
        if self.round.waiting {
            return false;
        }
        if self.volatile {
            self.round.waiting = true;
            self.emit_sync(Owner::Sync);
            return false;
        }
        self.round.enter(self.round.phase.after_sync());
        true
    }

    /// Sends off every page that is dirty, once, and waits for all of them.
    fn write_pages(&mut self, which: Which, next: Phase) -> bool {
        let size = self.geometry().page_size();
        loop {
            let cursor = self.round.cursor;
            let Some(slot) = self.cache(which).next_dirty(cursor) else { break };
            if !self.ops.has_staging() {
                return false;
            }
            let page = self.cache(which).page_of(slot);
            let offset = page << self.geometry().page_bits();
            let cluster = offset >> self.geometry().cluster_bits();
            debug_assert!(self.metadata.contains(cluster), "pages of tables lie in tables");
            let id = self.emit_meta_write(Owner::Page(which, slot), offset, size);
            let cache = match which {
                Which::L2 => &mut self.l2_cache,
                Which::Refcounts => &mut self.refcount_cache,
            };
            self.ops.staging_mut(id).copy_from_slice(cache.bytes(slot));
            cache.begin_write(slot);
            self.round.cursor = Cache::number(slot) + 1;
            self.round.writes += 1;
        }
        self.end_writes(next)
    }

    /// The same for the top-level table above the pages of a cache.
    fn write_top(&mut self, which: Which, next: Phase) -> bool {
        let size = self.geometry().page_size();
        while self.ops.has_staging() {
            let table = match which {
                Which::L2 => &mut self.l1,
                Which::Refcounts => &mut self.refcount_table,
            };
            let Some(page) = table.take_dirty(self.round.cursor) else {
                return self.end_writes(next);
            };
            let offset = table.offset_of(page);
            let id = self.emit_meta_write(Owner::Top, offset, size);
            let table = match which {
                Which::L2 => &self.l1,
                Which::Refcounts => &self.refcount_table,
            };
            table.copy_page(page, self.ops.staging_mut(id));
            self.round.cursor = page + 1;
            self.round.writes += 1;
        }
        false
    }

    pub(crate) fn end_writes(&mut self, next: Phase) -> bool {
        if self.round.writes != 0 {
            return false;
        }
        self.round.enter(next);
        true
    }

    /// An operation of a round has ended.
    pub(crate) fn finish_round_op(&mut self, op: &OpState, result: Result<(), IoErrorKind>) {
        if let Owner::Page(which, slot) = op.owner {
            self.cache(which).end_write(slot, result.is_ok());
            self.wake(|wait| wait == Wait::Slot(which));
        }
        match op.owner {
            Owner::Sync if result.is_err() => self.fail(FailureKind::Sync, 0),
            // After a failure there is no round that this could belong to.
            _ if self.failed.is_some() => {}
            Owner::Sync => self.round.enter(self.round.phase.after_sync()),
            Owner::ExtendGrown => self.finish_grow_extend(op.kind, result),
            _ if result.is_err() => {
                let OpKind::MetaWrite { offset, .. } = op.kind else {
                    unreachable!("the rest of a round is metadata writes");
                };
                self.fail(FailureKind::MetadataWrite, offset);
            }
            _ => self.round.writes -= 1,
        }
    }

    fn end_round(&mut self) {
        self.round.enter(Phase::Idle);
        if self.is_dirty() {
            self.note_dirty();
        }
        for id in 0..self.requests.len() {
            if self.requests[id].wait == Wait::ThisFlush {
                self.set_wait(id, Wait::Nothing);
                self.reply(id);
            }
        }
        self.wake(|wait| matches!(wait, Wait::Round | Wait::Grow | Wait::Slot(_)));
    }
}
