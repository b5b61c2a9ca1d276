//! How an image stops: by failure, for writes and for good; and by being closed.

use crate::engine::Engine;
use crate::error::{Failure, FailureKind};
use crate::op::OpKind;
use crate::optable::Owner;
use crate::planted::{self, Bug};

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

impl Engine {
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

    pub(crate) fn advance_close(&mut self) {
        let Life::Closing { truncated } = self.life else { return };
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
}
