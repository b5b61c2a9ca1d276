//! Operations on their way: handing them out, short transfers, and what a completion means.

use crate::engine::Engine;
use crate::epoch::Epochs;
use crate::error::{FailureKind, IoErrorKind};
use crate::life::Life;
use crate::mark;
use crate::op::{FileId, OpId, OpKind, Outcome};
use crate::optable::Owner;
use crate::planted::{self, Bug};
use crate::request::{RequestId, Wait};

/// How often an operation without any progress is taken up again.
const MAX_RETRIES: u8 = 3;

impl Engine {
    pub(crate) fn emit(&mut self, owner: Owner, kind: OpKind) -> OpId {
        self.emit_to(owner, FileId::Image, kind)
    }

    pub(crate) fn emit_to(&mut self, owner: Owner, file: FileId, kind: OpKind) -> OpId {
        let queue = match owner {
            Owner::Request(id) => {
                self.requests[id].pending += 1;
                self.requests[id].queue
            }
            _ => self.current_queue,
        };
        let id = self.ops.insert(owner, file, kind, queue);
        self.out[usize::from(queue)].push_back(id);
        id
    }

    pub(crate) fn emit_sync(&mut self, owner: Owner) {
        // Cleared before it is carried out: what completes from now on is not covered.
        self.epochs.cut();
        for file in [FileId::Image, FileId::Data] {
            let has_data = self.data_len.is_some() && !planted::is(Bug::DataFileNotSynced);
            if file == FileId::Image || has_data {
                self.syncs += 1;
                self.stats.syncs += 1;
                self.emit_to(owner, file, OpKind::Sync);
            }
        }
    }

    /// A writable image begins with its first bytes, if they change, and an fdatasync.
    pub(crate) fn begin_open(&mut self) {
        if planted::is(Bug::OpenWithoutSync) {
            (self.life, self.epochs) = (Life::Serving, Epochs::new(false));
            return;
        }
        if self.options.read_only {
            return;
        }
        if self.header.rewrite {
            let len = self.options.alignment as usize;
            let id = self.emit_meta_write(Owner::FirstHeader, 0, len);
            let bytes = self.header.first_bytes(len);
            self.ops.staging_mut(id)[..len].copy_from_slice(bytes);
        } else {
            self.emit_sync(Owner::FirstSync);
        }
    }

    /// One of the fdatasyncs of an epoch has ended. True: with success, and it was the last.
    fn sync_ended(&mut self, result: Result<(), IoErrorKind>) -> bool {
        self.syncs -= 1;
        if result.is_err() && !planted::is(Bug::SyncRetried) {
            self.fail(FailureKind::Sync, 0);
        }
        self.failed.is_none() && self.syncs == 0
    }

    /// A write may have made a file longer: the external data file, or the image where that ended
    /// within a cluster.
    pub(crate) fn note_len(&mut self, file: FileId, kind: OpKind, outcome: Outcome) {
        let (OpKind::Write { offset, len, .. }
        | OpKind::WriteZeros { offset, len }
        | OpKind::CopyWrite { offset, len, .. }) = kind
        else {
            return;
        };
        let done = match outcome {
            Outcome::Done => len,
            Outcome::Short(done) => done,
            Outcome::Error(_) => return,
        };
        let end = offset + u64::from(done);
        match file {
            _ if done == 0 => {}
            FileId::Data => self.data_len = self.data_len.map(|before| before.max(end)),
            _ => self.written_end = self.written_end.max(end),
        }
    }

    /// Bytes of a file; what lies behind them reads as zeros.
    fn len_of(&self, file: FileId) -> u64 {
        match file {
            FileId::Image => self.file_len.max(self.written_end),
            FileId::Data => self.data_len.unwrap_or(0),
            FileId::Backing(layer) | FileId::BackingData(layer) => {
                self.layers.get(usize::from(layer)).map_or(0, |layer| layer.len_of(file))
            }
        }
    }

    /// Writes a page of metadata; the caller has made sure of staging.
    pub(crate) fn emit_meta_write(&mut self, owner: Owner, offset: u64, len: usize) -> OpId {
        debug_assert_eq!(offset % u64::from(self.options.alignment), 0);
        let len = u32::try_from(len).expect("a page");
        self.stats.metadata_writes += 1;
        self.emit(owner, OpKind::MetaWrite { offset, len })
    }

    /// Only the first `done` bytes were transferred: sends the rest off again, or says how the
    /// operation ended.
    pub(crate) fn take_up_short(&mut self, id: OpId, done: u32) -> Option<Outcome> {
        if planted::is(Bug::ShortIsWhole) {
            return Some(Outcome::Done);
        }
        mark!("op.short");
        let align = self.options.alignment;
        let file_len = self.len_of(self.ops.get(id).file);
        let failed = self.failed.is_some();
        let state = self.ops.get_mut(id);
        // Direct I/O goes on at a multiple of the alignment.
        let whole_sectors = done - done % align;
        let mut progress = whole_sectors != 0;
        match &mut state.kind {
            OpKind::Read { tag, at, offset, len } => {
                let end = *at + *len;
                if *offset + u64::from(whole_sectors) + u64::from(align) > file_len {
                    // The end of the file, in the middle of a cluster: what lies behind is zeros.
                    // The bytes of a partial last sector are in the buffer already.
                    let have = file_len.saturating_sub(*offset).min((*len).into());
                    let have = u32::try_from(have).expect("at most the length");
                    if done >= have {
                        let at = *at + have;
                        state.kind = OpKind::Fill { tag: *tag, at, len: end - at };
                    } else if whole_sectors == 0 {
                        return Some(Outcome::Error(IoErrorKind::Io));
                    } else {
                        *at += whole_sectors;
                        *offset += u64::from(whole_sectors);
                        *len = end - *at;
                    }
                } else {
                    *at += whole_sectors;
                    *offset += u64::from(whole_sectors);
                    *len = end - *at;
                }
            }
            OpKind::Write { at, offset, len, .. } => {
                *at += whole_sectors;
                *offset += u64::from(whole_sectors);
                *len -= whole_sectors;
            }
            OpKind::WriteZeros { offset, len } => {
                *offset += u64::from(whole_sectors);
                *len -= whole_sectors;
            }
            // A page, or a copy buffer, is transferred as a whole, once more.
            OpKind::MetaWrite { .. } | OpKind::CopyRead { .. } | OpKind::CopyWrite { .. } => {
                progress = false;
            }
            _ => return Some(Outcome::Error(IoErrorKind::Io)),
        }
        if failed && !state.kind.only_reads() && state.owner != Owner::Mark {
            // Fail-stop: no more writes, not even the rest of one.
            return Some(Outcome::Error(IoErrorKind::Io));
        }
        state.retries = if progress { 0 } else { state.retries + 1 };
        if state.retries > MAX_RETRIES {
            return Some(Outcome::Error(IoErrorKind::Io));
        }
        let queue = usize::from(state.queue);
        self.out[queue].push_back(id);
        None
    }

    pub(crate) fn finish_op(&mut self, id: OpId, result: Result<(), IoErrorKind>) {
        let owner = self.ops.get(id).owner;
        if let Owner::Load(which, slot) = owner {
            self.finish_page_load(id, which, slot, result);
        }
        let state = self.ops.remove(id);
        match owner {
            Owner::Request(request) => {
                // A discard that the host cannot carry out is none, and no failure.
                let punch = matches!(state.kind, OpKind::Punch { .. });
                let unsupported = punch && result == Err(IoErrorKind::Unsupported);
                self.finish_payload(request, if unsupported { Ok(()) } else { result });
            }
            Owner::NewTable(index) => self.finish_new_table(index, result),
            Owner::Load(..) => {}
            Owner::NewBlock(cluster) => self.finish_zeroed_block(cluster, result),
            Owner::Extend { least } => self.finish_extend(state.kind, least, result),
            Owner::Copy(buffer) => self.finish_copy(buffer, result),
            Owner::Reserved(start) => self.finish_reserved(start, result),
            Owner::Punch(start) => self.finish_punch(start, result),
            Owner::FirstHeader => match result {
                Ok(()) => self.emit_sync(Owner::FirstSync),
                Err(_) => self.fail(FailureKind::MetadataWrite, 0),
            },
            Owner::FirstSync => {
                if self.sync_ended(result) {
                    self.epochs.succeeded();
                    self.adoption_synced();
                    self.life = if self.life == Life::Opening { Life::Serving } else { self.life }
                }
            }
            Owner::Sync => {
                if self.sync_ended(result) {
                    self.round_synced();
                }
            }
            Owner::Mark | Owner::MarkSync => self.finish_mark(owner, result),
            Owner::Truncate => {}
            Owner::Page(..) | Owner::Top | Owner::Grown | Owner::Header | Owner::ExtendGrown => {
                self.finish_round_op(&state, result)
            }
        }
        if state.staging.is_some() {
            self.wake(|wait| wait == Wait::Staging);
        }
        self.wake(|wait| wait == Wait::OpSlot);
    }

    pub(crate) fn finish_payload(&mut self, id: RequestId, result: Result<(), IoErrorKind>) {
        let state = &mut self.requests[id];
        state.pending -= 1;
        if let Err(kind) = result {
            state.error.get_or_insert(kind);
        }
        if state.pending == 0 {
            self.set_wait(id, Wait::Nothing);
            self.ready.push_back(id);
        }
    }
}
