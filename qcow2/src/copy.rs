//! Copy-on-write: the parts of a new cluster that a write does not cover.
//!
//! They come from what lies beneath, through copy buffers of the driver, 64 KiB at a time, and go
//! into the new cluster while the payload is being written beside them. The buffers are few and
//! fixed; jobs that find none wait their turn, so a copy-on-write of 2 MiB clusters at any queue
//! depth needs no more memory than one of 64 KiB.

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;

use crate::engine::Engine;
use crate::error::IoErrorKind;
use crate::op::{COPY_BUFFER, FileId, OpKind};
use crate::optable::Owner;
use crate::request::RequestId;

/// A job that has a buffer; its number is that of the buffer.
pub(crate) type CopyId = u16;

/// Bytes to copy from what lies beneath into the image.
#[derive(Clone, Copy, Debug)]
struct Job {
    request: RequestId,
    /// First byte beneath, which is that of the virtual disk.
    from: u64,
    /// First byte in the image.
    to: u64,
    left: u64,
}

/// All jobs.
#[derive(Clone, Debug)]
pub(crate) struct Copies {
    running: Vec<Option<Job>>,
    waiting: VecDeque<Job>,
}

impl Copies {
    pub(crate) fn new(buffers: u16, requests: usize) -> Self {
        let waiting = VecDeque::with_capacity(requests * 2);
        Self { running: vec![None; buffers.into()], waiting }
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
    /// Copies `len` bytes for a request, which counts it as one operation of its own.
    pub(crate) fn copy_from_beneath(&mut self, request: RequestId, from: u64, to: u64, len: u64) {
        self.requests[request].pending += 1;
        self.copies.waiting.push_back(Job { request, from, to, left: len });
        self.start_copies();
    }

    fn start_copies(&mut self) {
        while let Some(buffer) = self.copies.running.iter().position(Option::is_none) {
            let Some(job) = self.copies.waiting.pop_front() else { return };
            self.copies.running[buffer] = Some(job);
            self.read_piece(u16::try_from(buffer).expect("a buffer number"), job);
        }
    }

    fn read_piece(&mut self, buffer: CopyId, job: Job) {
        let kind = OpKind::CopyRead { buffer, offset: job.from, len: piece(&job) };
        self.emit_to(Owner::Copy(buffer), FileId::Backing, kind);
    }

    /// A piece was read, or written.
    pub(crate) fn finish_copy(
        &mut self,
        buffer: CopyId,
        kind: OpKind,
        result: Result<(), IoErrorKind>,
    ) {
        let running = &mut self.copies.running[usize::from(buffer)];
        let job = running.as_mut().expect("a job with this buffer");
        let was_read = matches!(kind, OpKind::CopyRead { .. });
        // Fail-stop: after a failure nothing is written any more.
        let result = if self.failed.is_some() { Err(IoErrorKind::Io) } else { result };
        if result.is_ok() && was_read {
            let kind = OpKind::CopyWrite { buffer, offset: job.to, len: piece(job) };
            self.emit(Owner::Copy(buffer), kind);
            return;
        }
        let done = u64::from(piece(job));
        (job.from, job.to, job.left) = (job.from + done, job.to + done, job.left - done);
        let job = *job;
        // A write that failed already fails as a whole: the rest need not be copied.
        if result.is_ok() && job.left != 0 && self.requests[job.request].error.is_none() {
            self.read_piece(buffer, job);
            return;
        }
        self.copies.running[usize::from(buffer)] = None;
        self.finish_payload(job.request, result);
        self.start_copies();
    }
}
