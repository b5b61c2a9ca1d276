//! How an image stops: by failure, for writes and for good; and by being closed.

use alloc::vec::Vec;

use crate::engine::Engine;
use crate::error::{Failure, FailureKind, IoErrorKind};
use crate::layer::Layer;
use crate::op::OpKind;
use crate::optable::Owner;
use crate::planted::{self, Bug};
use crate::report::Health;

/// Incidents that are kept for the server's log; more are counted only.
pub(crate) const MAX_INCIDENTS: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// Before the first fdatasync has returned.
    Opening,
    /// What a killed process has left is being made durable.
    Adopting,
    Serving,
    Closing {
        truncated: bool,
    },
    Closed,
}

/// Whether the header is to say that the image contradicts itself (incompatible feature "corrupt",
/// of version 3): then nobody writes to it again before it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    No,
    /// As soon as there is staging for it, and no other write of the header is under way.
    Wanted,
    /// Its write or fdatasync is under way, or has ended: it is not tried again.
    Begun,
}

impl Engine {
    /// No requests will follow: what is under way ends, everything becomes durable, the unused end
    /// of the file is given back. Pump until [`is_closed`](Engine::is_closed).
    pub fn close(&mut self) {
        if matches!(self.life, Life::Opening | Life::Adopting | Life::Serving) {
            self.life = Life::Closing { truncated: false };
        }
        self.run();
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

    /// Size of the disk beneath, in bytes; 0 without one.
    #[must_use]
    pub fn size_beneath(&self) -> u64 {
        self.layers.first().map_or(0, Layer::virtual_size)
    }

    /// What lies beneath, of an engine that is closed, for the one that follows it.
    pub fn take_layers(&mut self) -> Vec<Layer> {
        core::mem::take(&mut self.layers)
    }

    /// Goes on where `old` has ended, which was closed, with the same image: with its counters, and
    /// without writes if it had failed (the options are to say that, too).
    #[must_use]
    pub fn succeed(mut self, old: &Self) -> Self {
        self.stats = old.stats;
        // All that was allocated has its mapping.
        self.allocated_durable = self.stats.allocated_data + self.stats.allocated_metadata;
        self.now_ms = old.now_ms;
        self.failed = old.failed;
        self
    }

    /// Somebody else has failed to write to the image: from now on nobody does.
    pub fn give_up(&mut self, kind: FailureKind) {
        self.fail(kind, 0);
    }

    /// An engine that was to be closed, and that has failed at that, serves reads again: what it
    /// could not write is in its memory only.
    pub fn stay(&mut self) {
        if self.failed.is_some() && self.life == Life::Closed {
            self.life = Life::Serving;
        }
    }

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
        let failure = Failure { kind, offset };
        self.failed = Some(failure);
        self.incident(kind, offset);
        self.round.stop();
        if failure.is_corruption() {
            self.corrupt_mark = Mark::Wanted;
        }
        for id in 0..self.requests.len() {
            let state = &self.requests[id];
            if state.request.is_some() && !state.is_read() {
                self.ready.push_back(id);
            }
        }
        self.wake(|_| true);
    }

    /// After a failure: what was not handed out yet and would change a file comes to nothing. The
    /// one write that follows is that of the header, where the failure is the image's own.
    pub(crate) fn end_writing(&mut self) {
        if self.failed.is_none() {
            return;
        }
        for queue in 0..self.out.len() {
            let mut number = 0;
            while let Some(&id) = self.out[queue].get(number) {
                let state = self.ops.get(id);
                if state.kind.only_reads() || matches!(state.owner, Owner::Mark | Owner::MarkSync) {
                    number += 1;
                } else {
                    self.out[queue].remove(number);
                    self.finish_op(id, Err(IoErrorKind::Io));
                }
            }
        }
        let may = self.ops.has_staging() && !self.ops.writes_header();
        if self.corrupt_mark == Mark::Wanted && may {
            self.corrupt_mark = Mark::Begun;
            self.write_mark();
        }
    }

    fn write_mark(&mut self) {
        if self.header.version() < 3 {
            // It has no place for the mark.
            return;
        }
        let len = self.options.alignment as usize;
        let id = self.emit_meta_write(Owner::Mark, 0, len);
        let bytes = self.header.marked_corrupt(len);
        self.ops.staging_mut(id)[..len].copy_from_slice(bytes);
    }

    /// The header with the mark was written, or could not be: writing has ended either way.
    pub(crate) fn finish_mark(&mut self, owner: Owner, result: Result<(), IoErrorKind>) {
        match (owner, result) {
            (Owner::Mark, Ok(())) => {
                // No epoch is cut: nothing else is said to be durable ever again.
                self.stats.syncs += 1;
                self.emit(Owner::MarkSync, OpKind::Sync);
            }
            (_, Ok(())) => {}
            (_, Err(_)) => self.incident(FailureKind::NotMarked, 0),
        }
    }

    pub(crate) fn advance_close(&mut self) {
        let Life::Closing { truncated } = self.life else { return };
        self.end_writing();
        if self.active != 0 || self.ops.in_flight() != 0 {
            return;
        }
        if self.adoption.is_some() && self.failed.is_none() {
            return;
        }
        if self.failed.is_some() || self.options.read_only {
            self.life = Life::Closed;
            return;
        }
        self.drop_new_tables();
        self.return_reserve();
        self.advance_quarantine();
        if self.failed.is_some() {
            return self.advance_close();
        }
        let busy = self.ops.in_flight() != 0;
        if !busy && (self.epochs.is_volatile() || self.is_dirty() || !self.quarantine.is_empty()) {
            self.round.wanted = true;
            if self.advance_round() {
                // It found nothing to write: what waited for its end goes on at once.
                self.advance_quarantine();
                self.advance_close();
            }
        } else if !busy && !truncated {
            self.life = Life::Closing { truncated: true };
            let mut to = self.allocator.unused_end(self.geometry());
            if planted::is(Bug::TruncateTooShort) {
                to -= self.geometry().cluster_size();
            }
            if to < self.file_len && !self.options.fixed_size {
                self.file_len = to;
                self.emit(Owner::Truncate, OpKind::Truncate { to });
            }
            self.advance_close();
        } else if !busy {
            self.life = Life::Closed;
            self.clear_records();
        }
    }

    /// Gives the reservation back: the refcounts go down, and the end of the file with them.
    fn return_reserve(&mut self) {
        self.allocator.stopped = true;
        let pool: Vec<_> =
            self.allocator.zero.drain(..).chain(self.allocator.stale.drain(..)).collect();
        let pending = self.allocator.pending.drain(..).map(|p| (p.start, p.count));
        let mut all: Vec<_> = pool.into_iter().chain(pending).collect();
        (self.allocator.pool, self.allocator.pending_clusters) = (0, 0);
        all.sort_unstable();
        for (start, count) in all.into_iter().rev() {
            if start + count == self.allocator.next_fresh {
                self.allocator.next_fresh = start;
            }
            self.quarantine.lower_only(start, count);
        }
    }
}
