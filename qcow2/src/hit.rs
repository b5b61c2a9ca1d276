//! The short way: a read, or a write in place, of a part of one cluster that is all in the caches.
//!
//! Most requests are of this kind once an image is written to and its tables are cached, so for
//! them there is nothing but a few words to look at: the L1 word, the cache's index, the L2 entry,
//! and for a write the set of metadata. They make the same operation, after the same checks, as the
//! steps of [`read`](crate::read) and [`write`](crate::write), which everything else takes, and
//! which say why. Where anything is out of the ordinary the answer is "not here".
//!
//! **Invariant:** nothing is changed before it is certain that the request takes this way.

use crate::cache::{Lookup, SlotId};
use crate::engine::Engine;
use crate::entry::{PLAIN_OFFSET, is_plain};
use crate::life::Life;
use crate::mark;
use crate::op::{OpId, OpKind, Reply, Request};
use crate::optable::{OpState, Owner};
use crate::planted::{self, Bug};
use crate::request::{RequestId, Wait};

/// What is found on the short way.
pub(crate) struct Hit {
    page: SlotId,
    len: u32,
    kind: OpKind,
    /// The operation's end is the request's.
    ends: bool,
}

impl Engine {
    /// The one operation of a request that has just come; `None`: not here. Changes nothing.
    #[inline]
    pub(crate) fn find_hit(&self, tag: u16, request: Request) -> Option<Hit> {
        let (offset, len, write, fua) = match request {
            Request::Read { offset, len } => (offset, len, false, false),
            Request::Write { offset, len, fua } => (offset, len, true, fua),
            _ => return None,
        };
        let geometry = self.decoder.geometry;
        let bits = geometry.cluster_bits();
        let last = geometry.cluster_size() - 1;
        let within = offset & last;
        let end = offset.checked_add(len.into())?;
        if (offset | u64::from(len)) % 512 != 0
            || len == 0
            || end > self.virtual_size()
            || within + u64::from(len) > last + 1
            || geometry.has_extended_l2()
            || self.decoder.data_file
            || !self.overlay.is_empty() && !planted::is(Bug::HitPastOverlay)
            || !matches!(self.life, Life::Serving)
            || !self.ops.has_payload_room()
        {
            return None;
        }
        let cluster = offset >> bits;
        let table = self.l1.get(cluster >> geometry.l2_bits()).filter(|&word| is_plain(word))?;
        let byte = (table & PLAIN_OFFSET) + ((cluster & (geometry.l2_entries() - 1)) << 3);
        let page_bits = geometry.page_bits();
        let Lookup::Hit(page) = self.l2_cache.lookup(byte >> page_bits) else { return None };
        let entry = self.l2_cache.word_at(page, byte & ((1 << page_bits) - 1));
        let host = entry & PLAIN_OFFSET;
        if !is_plain(entry) || host & last != 0 || host >= self.file_len {
            return None;
        }
        let offset = host + within;
        if !write {
            mark!("hit.read");
            let kind = OpKind::Read { tag, at: 0, offset, len };
            return Some(Hit { page, len, kind, ends: true });
        }
        // Without COPIED in table and entry, somebody else may have the cluster, too.
        let owned = (entry & table) >> 63 == 1 || planted::is(Bug::HitInSharedCluster);
        if !owned
            || self.options.read_only
            || self.failed.is_some()
            || !self.writers.is_empty()
            || self.metadata.contains(host >> bits)
        {
            return None;
        }
        mark!("hit.write");
        // A FUA write waits for a round.
        let ends = !fua || planted::is(Bug::HitAnsweredBeforeSync);
        Some(Hit { page, len, kind: OpKind::Write { tag, at: 0, offset, len }, ends })
    }

    /// Sends off the operation.
    #[inline]
    pub(crate) fn take_short_way(&mut self, id: RequestId, request: Request, hit: &Hit) {
        self.l2_cache.touch(hit.page);
        self.stats.l2_hits += 1;
        let state = &mut self.requests[id];
        state.begin(request);
        (state.pos, state.pending) = (hit.len, 1);
        let queue = state.queue;
        let op = self.ops.insert_payload(id, hit.kind, queue, hit.ends);
        self.out[usize::from(queue)].push_back(op);
    }

    /// The one operation of a request has ended, and with that the request; false: not here.
    #[inline]
    pub(crate) fn ends_short_way(&mut self, op: OpId) -> bool {
        let &OpState { owner: Owner::Request(id), kind, queue, ends: true, .. } = self.ops.get(op)
        else {
            return false;
        };
        if let OpKind::Write { offset, len, .. } = kind {
            if self.failed.is_some() {
                return false;
            }
            self.written_end = self.written_end.max(offset + u64::from(len));
            self.stats.writes += 1;
            if !planted::is(Bug::HitNotCounted) {
                self.epochs.note_write();
            }
        } else {
            self.stats.reads += 1;
        }
        self.current_queue = queue;
        self.ops.forget_payload(op);
        let state = &mut self.requests[id];
        (state.pending, state.request) = (0, None);
        let reply = Reply { tag: state.tag, result: Ok(()) };
        self.active -= 1;
        self.replies[usize::from(queue)].push_back(reply);
        if self.blocked != 0 {
            // There may be room for others' operations now.
            self.wake(|wait| wait == Wait::OpSlot);
        }
        self.due = self.due || !self.is_quiet();
        true
    }

    /// Has nothing but requests on the short way anything to wait for?
    #[inline]
    pub(crate) fn is_quiet(&self) -> bool {
        self.ready.is_empty()
            && self.blocked == 0
            && matches!(self.life, Life::Serving)
            && self.round.is_idle()
            && !self.round.wanted
            && self.quarantine.is_empty()
            && self.writers.is_empty()
            && self.adoption.is_none()
    }
}
