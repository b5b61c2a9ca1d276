//! Copy-on-write: the parts of a new cluster that a write does not cover; and whole L2 tables that
//! a snapshot shares.
//!
//! The bytes come from wherever the guest finds them now: the image, a file beneath it, a
//! compressed cluster. They go through copy buffers of the driver, 64 KiB at a time, into the new
//! cluster while the payload is being written beside them. The buffers are few and fixed; jobs that
//! find none wait their turn, so a copy-on-write of 2 MiB clusters at any queue depth needs no more
//! memory than one of 64 KiB.
//!
//! A buffer is filled piece by piece, each from one place. Finding the next may need a page that is
//! not there: then the job looks again after every event, as a request does.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use crate::engine::Engine;
use crate::error::IoErrorKind;
use crate::op::{COPY_BUFFER, FileId, OpKind};
use crate::optable::Owner;
use crate::read::{Cursor, Source};
use crate::request::{RequestId, Step, Stop, Wait, Which};

/// A job that has a buffer; its number is that of the buffer.
pub(crate) type CopyId = u16;

/// Who wants the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum For {
    /// A request, which counts the job as one operation of its own. They come from this byte of
    /// the virtual disk on.
    Request(RequestId, u64),
    /// A copy of the L2 table for this L1 entry. They come from this byte of the image on.
    Table(u64, u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Looking for the next piece.
    Filling,
    /// So many more bytes are on their way into the buffer.
    Reading(u32),
    Writing,
}

/// Bytes to copy.
#[derive(Clone, Copy, Debug)]
struct Job {
    who: For,
    /// First byte in the file written to.
    to: u64,
    left: u64,
    /// Bytes that are done, before this buffer; and in it.
    done: u64,
    filled: u32,
    cursor: Cursor,
    state: State,
    wait: Wait,
}

/// All jobs.
#[derive(Clone, Debug)]
pub(crate) struct Copies {
    running: Vec<Option<Job>>,
    waiting: VecDeque<Job>,
    /// Jobs that look for their next piece.
    filling: usize,
}

impl Copies {
    /// As many jobs as two for each request, and one for each table.
    pub(crate) fn new(buffers: u16, requests: usize) -> Self {
        let waiting = VecDeque::with_capacity(requests * 3);
        Self { running: vec![None; buffers.into()], waiting, filling: 0 }
    }

    /// Copy buffers that the driver has to have.
    pub(crate) fn buffers(&self) -> usize {
        self.running.len()
    }
}

fn piece(job: &Job) -> u32 {
    u32::try_from(job.left.min(COPY_BUFFER.into())).expect("at most a buffer")
}

impl Engine {
    /// Copies `len` bytes to byte `to` of the file with guest data, or of the image for a table.
    pub(crate) fn copy(&mut self, who: For, to: u64, len: u64) {
        if let For::Request(request, _) = who {
            self.requests[request].pending += 1;
            self.stats.copies += 1;
            self.stats.copied_bytes += len;
        }
        let (cursor, state, wait) = (Cursor::START, State::Filling, Wait::Nothing);
        self.copies.waiting.push_back(Job {
            who,
            to,
            left: len,
            done: 0,
            filled: 0,
            cursor,
            state,
            wait,
        });
        self.start_copies();
    }

    fn start_copies(&mut self) {
        while let Some(buffer) = self.copies.running.iter().position(Option::is_none) {
            let Some(job) = self.copies.waiting.pop_front() else { return };
            self.copies.running[buffer] = Some(job);
            self.copies.filling += 1;
            self.fill(buffer);
        }
    }

    /// Lets every job go on that looks for its next piece.
    pub(crate) fn advance_copies(&mut self) {
        if self.copies.filling == 0 {
            return;
        }
        for buffer in 0..self.copies.running.len() {
            if self.copies.running[buffer].is_some_and(|job| job.state == State::Filling) {
                self.fill(buffer);
            }
        }
    }

    /// Sends for the next piece, or writes the buffer when it is full.
    fn fill(&mut self, buffer: usize) {
        let mut job = self.copies.running[buffer].expect("a job with this buffer");
        let id = CopyId::try_from(buffer).expect("a buffer number");
        if job.filled == piece(&job) {
            let file = match job.who {
                For::Request(..) => self.data_file(),
                For::Table(..) => FileId::Image,
            };
            let kind = OpKind::CopyWrite { buffer: id, offset: job.to + job.done, len: job.filled };
            job.state = State::Writing;
            self.copies.filling -= 1;
            self.copies.running[buffer] = Some(job);
            self.emit_to(Owner::Copy(id), file, kind);
            return;
        }
        match self.next_piece_of(id, &mut job) {
            Ok((file, kind, len)) => {
                job.state = State::Reading(len);
                self.copies.filling -= 1;
                self.copies.running[buffer] = Some(job);
                self.emit_to(Owner::Copy(id), file, kind);
            }
            Err(Stop::Wait(wait)) => {
                job.wait = wait;
                self.copies.running[buffer] = Some(job);
            }
            Err(Stop::Fail(kind)) => self.end_copy(buffer, Err(kind)),
        }
    }

    /// What brings the next bytes into the buffer, and how many.
    fn next_piece_of(&mut self, buffer: CopyId, job: &mut Job) -> Step<(FileId, OpKind, u32)> {
        let (at, want) = (job.filled, piece(job) - job.filled);
        let from = job.done + u64::from(at);
        let guest = match job.who {
            For::Table(_, start) => {
                let kind = OpKind::CopyRead { buffer, at, offset: start + from, len: want };
                return Ok((FileId::Image, kind, want));
            }
            For::Request(_, start) => start + from,
        };
        let found = self.locate(guest, want.into(), &mut job.cursor)?;
        job.cursor = Cursor::START;
        let len = u32::try_from(found.bytes).expect("at most a buffer");
        Ok(match found.source {
            Source::Zeros => (FileId::Image, OpKind::CopyFill { buffer, at, len }, len),
            Source::File { file, offset } => {
                (file, OpKind::CopyRead { buffer, at, offset, len }, len)
            }
            Source::Compressed { file, source, from } => {
                (file, OpKind::CopyInflate { buffer, at, source, from, len }, len)
            }
        })
    }

    /// A piece was read, or a buffer was written.
    pub(crate) fn finish_copy(&mut self, buffer: CopyId, result: Result<(), IoErrorKind>) {
        let buffer = usize::from(buffer);
        // Fail-stop: after a failure nothing is written any more.
        let result = if self.failed.is_some() { Err(IoErrorKind::Io) } else { result };
        let job = self.copies.running[buffer].as_mut().expect("a job with this buffer");
        match job.state {
            State::Reading(len) => job.filled += len,
            State::Writing => {
                let done = u64::from(job.filled);
                (job.done, job.left, job.filled) = (job.done + done, job.left - done, 0);
            }
            State::Filling => unreachable!("it has no operation"),
        }
        job.state = State::Filling;
        self.copies.filling += 1;
        let (who, left) = (job.who, job.left);
        // A write that failed already fails as a whole: the rest need not be copied.
        let given_up = match who {
            For::Request(request, _) => self.requests[request].error.is_some(),
            For::Table(..) => false,
        };
        if result.is_err() || left == 0 || given_up {
            self.end_copy(buffer, result);
        } else {
            self.fill(buffer);
        }
    }

    /// A page that jobs wait for cannot be read.
    pub(crate) fn fail_copies(&mut self, page: u64) {
        for buffer in 0..self.copies.running.len() {
            let waits =
                |job: &Job| job.state == State::Filling && job.wait == Wait::Page(Which::L2, page);
            if self.copies.running[buffer].as_ref().is_some_and(waits) {
                self.end_copy(buffer, Err(IoErrorKind::Io));
            }
        }
    }

    fn end_copy(&mut self, buffer: usize, result: Result<(), IoErrorKind>) {
        let job = self.copies.running[buffer].take().expect("a job with this buffer");
        self.copies.filling -= 1;
        match job.who {
            For::Request(request, _) => self.finish_payload(request, result),
            For::Table(l1_index, _) => self.finish_new_table(l1_index, result),
        }
        self.start_copies();
    }
}
