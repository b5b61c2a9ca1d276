//! What requests wait for, and how they go on.
//!
//! A request that misses something notes what ([`Wait`]), and whoever brings that about wakes all
//! who wait for it; they look again, and may find that others were faster.

use crate::engine::Engine;
use crate::error::IoErrorKind;
use crate::request::{RequestId, Wait};

impl Engine {
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
        self.fail_adoption_if(kind, &matches);
        self.wake(matches);
    }
}
