//! Making the file longer, over clusters that are to be reserved.

use crate::engine::Engine;
use crate::error::IoErrorKind;
use crate::mark;
use crate::op::OpKind;
use crate::optable::Owner;
use crate::planted::{self, Bug};

impl Engine {
    /// How many of `want` clusters from `first` on the file reaches over; if none, it is extended.
    pub(crate) fn extended_over(&mut self, first: u64, want: u64) -> u64 {
        let bits = self.geometry().cluster_bits();
        let reached = self.file_len >> bits;
        if reached > first {
            return want.min(reached - first);
        }
        if !self.allocator.extending {
            let to = (first + want.max(self.allocator.target)) << bits;
            if planted::is(Bug::EntryAtEndOfFile) {
                self.file_len = to;
                return want;
            }
            self.emit_extend(to, false);
            if planted::is(Bug::SizeNotDurable) {
                self.file_len = to;
                return want;
            }
        }
        0
    }

    fn emit_extend(&mut self, to: u64, least: bool) {
        self.allocator.extending = true;
        self.emit(Owner::Extend { least }, OpKind::Extend { from: self.extend_from(), to });
    }

    /// From where on the file is allocated when it is extended. Clusters behind its end that are
    /// counted are left out: there may be terabytes of them, and nobody uses them.
    pub(crate) fn extend_from(&self) -> u64 {
        let geometry = self.geometry();
        match self.allocator.next_fresh > geometry.clusters_for(self.file_len) {
            true => self.allocator.next_fresh << geometry.cluster_bits(),
            false => self.file_len,
        }
    }

    pub(crate) fn finish_extend(
        &mut self,
        kind: OpKind,
        least: bool,
        result: Result<(), IoErrorKind>,
    ) {
        let OpKind::Extend { to, .. } = kind else { unreachable!("an extend") };
        self.allocator.extending = false;
        match result {
            Ok(()) => self.file_len = self.file_len.max(to),
            Err(IoErrorKind::NoSpace) if !least && self.failed.is_none() => {
                // Ahead of need there is no room; perhaps for one cluster there is.
                let to = (self.allocator.next_fresh + 1) << self.geometry().cluster_bits();
                self.emit_extend(to, true);
            }
            Err(kind) => {
                mark!("reserve.file_cannot_grow");
                self.allocator.error = Some(kind);
            }
        }
    }

    /// The file, or the refcount table, cannot grow.
    pub(crate) fn no_fresh(&mut self, kind: IoErrorKind) {
        self.allocator.error = Some(kind);
    }
}
