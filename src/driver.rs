//! From an engine [`Op`] to an io_uring operation, and from its completion back to an [`Outcome`].
//!
//! What lives here and nowhere else: retry of EINTR and EAGAIN, reads that end at the end of the
//! file, the staging blocks, the buffers of copies, and what to do where fallocate or ftruncate are
//! missing. Compressed clusters are the [`pool`](crate::pool)'s, the bytes of requests the
//! [`payload`](crate::payload)'s.
//!
//! Each queue has a driver of its own. Only [`Driver::stage`] and [`Driver::finish`] see the
//! engine, and move no more than the bytes of metadata: they are what happens with it locked.
//!
//! **Invariant:** outcomes are returned, and the loop in `queue.rs` hands them on, so nothing
//! recurses.

use std::io;
use std::os::fd::RawFd;

use qcow2::{COPY_BUFFER, Compressed, Engine, FileId, IoErrorKind, Op, OpKind, Outcome};

use crate::buffer::{Area, PAGE, Piece};
use crate::errno;
use crate::files::{FileKind, Files, Source};
use crate::payload::Payload;
use crate::pool::{Pool, Workers};
use crate::ring::Io;
use crate::watch::Ticks;

/// The largest `WriteZeros` the engine asks for.
const ZEROS: usize = 2 << 20;

/// Gives up on an operation that the kernel has put off (EAGAIN) so often.
const MAX_TRIES: u32 = 1000;

/// Gives up on a read that ends early without being at the end of the file.
const MAX_PARTS: u32 = 16;

/// An operation in flight.
#[derive(Clone, Copy, Debug)]
pub struct Flight {
    staged: Staged,
    io: Io,
    /// Bytes of a read of metadata, of a copy, or of zeros, that are there already.
    have: u32,
    /// Reads that it took so far.
    parts: u32,
    tries: u32,
    /// Whether fallocate was refused and this is the ftruncate in its place.
    fallback: bool,
    /// When it was submitted last.
    since: Ticks,
}

impl Flight {
    /// What the watch looks at: the file, the operation, since when.
    pub fn watched(&self) -> (FileId, OpKind, Ticks) {
        (self.staged.op.file, self.staged.op.kind, self.since)
    }
}

/// An operation that the engine wants carried out, and its staging block if it is one of metadata.
#[derive(Clone, Copy, Debug)]
pub struct Staged {
    op: Op,
    block: Option<u32>,
}

/// An operation that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    staged: Staged,
    outcome: Outcome,
}

/// What comes next for an operation.
pub enum Step {
    /// Submit this.
    Submit(Flight, Io),
    /// It waits for a cluster to be inflated, and ends in [`Driver::inflated`].
    Pooled,
    /// It has ended.
    Ended(Ended),
}

/// The files of an image and the memory that its operations use.
pub struct Driver {
    files: Files,
    payload: Payload,
    zeros: Area,
    staging: Area,
    free_blocks: Vec<u32>,
    copies: Area,
    pool: Pool,
    can_truncate: bool,
}

/// What the drivers of all queues have in common.
#[derive(Clone)]
pub struct Common {
    pub files: Files,
    zeros: Area,
    copies: Area,
    workers: Workers,
}

impl Common {
    /// `copy_buffers`: how many the engine uses.
    pub fn new(files: Files, copy_buffers: usize) -> io::Result<Self> {
        Ok(Self {
            files,
            zeros: Area::new(ZEROS)?,
            copies: Area::new(copy_buffers * COPY_BUFFER as usize)?,
            workers: Workers::new()?,
        })
    }
}

impl Driver {
    /// `operations` is how many may be in flight.
    pub fn new(
        common: &Common,
        payload: Payload,
        operations: u32,
        can_truncate: bool,
    ) -> io::Result<Self> {
        Ok(Self {
            files: common.files.clone(),
            payload,
            zeros: common.zeros,
            staging: Area::new(operations as usize * PAGE)?,
            free_blocks: (0..operations).rev().collect(),
            copies: common.copies,
            pool: Pool::new(&common.workers)?,
            can_truncate,
        })
    }

    /// The payload of requests.
    pub fn payload(&self) -> &Payload {
        &self.payload
    }

    /// The descriptor to read eight bytes from to be woken for [`inflated`](Self::inflated).
    pub fn pool_fd(&self) -> RawFd {
        self.pool.wake_fd()
    }

    /// Takes an operation from the engine: what it writes of metadata is what the engine has now.
    pub fn stage(&mut self, engine: &Engine, op: Op) -> Staged {
        let block = match op.kind {
            OpKind::MetaRead { .. } | OpKind::MetaWrite { .. } => {
                Some(self.free_blocks.pop().expect("one block for each operation in flight"))
            }
            _ => None,
        };
        if let (OpKind::MetaWrite { len, .. }, Some(index)) = (op.kind, block) {
            let bytes = engine.staging(op.id);
            assert!(bytes.len() == len as usize, "a staging block holds what is written");
            self.staging.copy_in(block_start(index), bytes);
        }
        Staged { op, block }
    }

    /// What waits to be inflated, as [`Flight::watched`].
    pub fn watched(&self) -> impl Iterator<Item = (FileId, OpKind, Ticks)> {
        self.pool.watched()
    }

    /// The first step of an operation, at this tick.
    pub fn start(&mut self, staged: Staged, now: Ticks) -> Step {
        let op = staged.op;
        let Some(file) = self.files.get(op.file) else {
            return ended(staged, Outcome::Error(IoErrorKind::Io));
        };
        let fd = file.fd();
        let io = match op.kind {
            OpKind::Read { tag, at, offset, len } => self.payload.read(fd, offset, tag, at, len),
            OpKind::Write { tag, at, offset, len } => self.payload.write(fd, offset, tag, at, len),
            OpKind::Inflate { source, .. } | OpKind::CopyInflate { source, .. } => {
                return self.inflate(staged, source, now);
            }
            OpKind::Fill { tag, at, len } => match self.payload.zero(tag, at, len) {
                Some(io) => io,
                None => return ended(staged, Outcome::Done),
            },
            OpKind::CopyFill { buffer, at, len } => {
                self.copies.zero(copy_start(buffer, at, len), len as usize);
                return ended(staged, Outcome::Done);
            }
            OpKind::WriteZeros { offset, len } => {
                Io::Write { fd, from: self.zeros.piece(0, len), offset }
            }
            OpKind::MetaRead { offset, len } => {
                Io::Read { fd, to: self.block(staged, len), offset }
            }
            OpKind::MetaWrite { offset, len } => {
                Io::Write { fd, from: self.block(staged, len), offset }
            }
            OpKind::CopyRead { buffer, at, offset, len } => {
                Io::Read { fd, to: self.copy(buffer, at, len), offset }
            }
            OpKind::CopyWrite { buffer, offset, len } => {
                Io::Write { fd, from: self.copy(buffer, 0, len), offset }
            }
            OpKind::ZeroRange { offset, len } => {
                // The size stays: the range lies inside the file, or it is a block device.
                let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
                Io::Allocate { fd, mode, offset, len }
            }
            OpKind::Punch { offset, len } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                Io::Allocate { fd, mode, offset, len }
            }
            OpKind::Sync => Io::Sync { fd },
            OpKind::Extend { from, to } => match extend(file, from, to) {
                Ok(io) => io,
                Err(outcome) => return ended(staged, outcome),
            },
            OpKind::Truncate { to } => match self.truncate(file, to) {
                Ok(io) => io,
                Err(outcome) => return ended(staged, outcome),
            },
        };
        let (have, parts, tries, fallback, since) = (0, 0, 0, false, now);
        Step::Submit(Flight { staged, io, have, parts, tries, fallback, since }, io)
    }

    /// The step after a completion with `result`, at this tick.
    pub fn next(&mut self, mut flight: Flight, result: i32, now: Ticks) -> Step {
        flight.since = now;
        if matches!(-result, libc::EINTR | libc::EAGAIN) && flight.tries < MAX_TRIES {
            flight.tries += 1;
            return Step::Submit(flight, flight.io);
        }
        let op = flight.staged.op;
        let again = match (op.kind, u32::try_from(result)) {
            (OpKind::Extend { to, .. }, Err(_)) if !flight.fallback && is_refusal(-result) => {
                flight.fallback = true;
                self.lengthen(op, to)
            }
            (_, Err(_)) => Err(Outcome::Error(errno::kind_of(-result))),
            (
                OpKind::MetaRead { offset, len } | OpKind::CopyRead { offset, len, .. },
                Ok(count),
            ) => self.read_more(&mut flight, offset, len, count),
            (OpKind::Fill { tag, at, len }, Ok(count)) => {
                self.zero_more(&mut flight, tag, at, len, count)
            }
            (kind, Ok(count)) => Err(counted(kind, count)),
        };
        match again {
            Ok(io) => Step::Submit(Flight { io, ..flight }, io),
            Err(outcome) => ended(flight.staged, outcome),
        }
    }

    /// Hands an operation that has ended back to the engine, with the metadata that it has read.
    pub fn finish(&mut self, engine: &mut Engine, ended: Ended) {
        let Ended { staged: Staged { op, block }, outcome } = ended;
        if let Some(index) = block {
            if let (OpKind::MetaRead { len, .. }, Outcome::Done) = (op.kind, outcome) {
                let mut bytes = [0; PAGE];
                let bytes = &mut bytes[..len as usize];
                self.staging.copy_out(block_start(index), bytes);
                engine.fill_staging(op.id, bytes);
            }
            self.free_blocks.push(index);
        }
        engine.hand_back(op.id, outcome);
    }

    fn inflate(&mut self, staged: Staged, source: Compressed, now: Ticks) -> Step {
        let op = staged.op;
        let file = self.files.get(op.file).expect("the caller has looked");
        match self.pool.get(file, source, op, now) {
            Some(cluster) => ended(staged, deliver(&self.payload, &self.copies, op, cluster)),
            None => Step::Pooled,
        }
    }

    /// Calls `each` for every operation that has ended with an inflated cluster, or without.
    pub fn inflated(&mut self, mut each: impl FnMut(Ended)) {
        let (payload, copies) = (&self.payload, &self.copies);
        self.pool.take(|op, cluster| {
            let failed = Outcome::Error(IoErrorKind::Io);
            let outcome = cluster.map_or(failed, |bytes| deliver(payload, copies, op, bytes));
            each(Ended { staged: Staged { op, block: None }, outcome });
        });
    }

    fn copy(&self, buffer: u16, at: u32, len: u32) -> Piece {
        self.copies.piece(copy_start(buffer, at, len), len)
    }

    fn block(&self, staged: Staged, len: u32) -> Piece {
        assert!(len as usize <= PAGE, "a metadata operation fits a staging block");
        let index = staged.block.expect("an operation on metadata has a staging block");
        self.staging.piece(block_start(index), len)
    }

    /// Where a read of metadata or of a copy goes to.
    fn place(&self, flight: &Flight) -> (&Area, usize) {
        match (flight.staged.op.kind, flight.staged.block) {
            (OpKind::CopyRead { buffer, at, len, .. }, _) => {
                (&self.copies, copy_start(buffer, at, len))
            }
            (_, block) => {
                (&self.staging, block_start(block.expect("a metadata read has a staging block")))
            }
        }
    }

    /// After `count` more bytes of a read of metadata or of a copy: the read of the rest, or how it
    /// ended. Zeros only stand for what lies behind the end of the file; a file that has become
    /// shorter, or a read that ends early for an error further on, must not become zeros.
    fn read_more(
        &self,
        flight: &mut Flight,
        offset: u64,
        len: u32,
        count: u32,
    ) -> Result<Io, Outcome> {
        let wrong = Err(Outcome::Error(IoErrorKind::Io));
        let Staged { op, block } = flight.staged;
        let Some(file) = self.files.get(op.file) else { return wrong };
        flight.have = (flight.have + count).min(len);
        if flight.have == len {
            return Err(Outcome::Done);
        }
        let end = file.end().map_err(|error| failed(&error))?;
        let (area, start) = self.place(flight);
        if offset + u64::from(flight.have) >= end {
            if flight.have == 0 && block.is_some() {
                // A page of metadata begins inside the file, or somebody has cut the file off.
                return wrong;
            }
            area.zero(start + flight.have as usize, (len - flight.have) as usize);
            return Err(Outcome::Done);
        }
        flight.parts += 1;
        if flight.parts >= MAX_PARTS {
            return wrong;
        }
        // Direct I/O goes on at such a boundary only; the bytes before it are read again.
        flight.have -= flight.have % file.alignment;
        let to = area.piece(start + flight.have as usize, len - flight.have);
        Ok(Io::Read { fd: file.fd(), to, offset: offset + u64::from(flight.have) })
    }

    /// After `count` more zeros: the rest of them, or how it ended.
    fn zero_more(
        &self,
        flight: &mut Flight,
        tag: u16,
        at: u32,
        len: u32,
        count: u32,
    ) -> Result<Io, Outcome> {
        flight.have = (flight.have + count).min(len);
        if count == 0 {
            return Err(Outcome::Error(IoErrorKind::Io));
        }
        if flight.have == len {
            return Err(Outcome::Done);
        }
        self.payload.zero(tag, at + flight.have, len - flight.have).ok_or(Outcome::Done)
    }

    /// A longer sparse file, where the file system has no fallocate. Never a shorter one.
    fn lengthen(&self, op: Op, to: u64) -> Result<Io, Outcome> {
        let Some(file) = self.files.get(op.file) else {
            return Err(Outcome::Error(IoErrorKind::Io));
        };
        match file.len() {
            Ok(len) if len >= to => Err(Outcome::Done),
            Ok(_) => self.truncate(file, to),
            Err(error) => Err(failed(&error)),
        }
    }

    fn truncate(&self, file: &Source, to: u64) -> Result<Io, Outcome> {
        if file.kind.is_device() {
            return Err(Outcome::Done);
        }
        if self.can_truncate {
            return Ok(Io::Truncate { fd: file.fd(), len: to });
        }
        // Before 6.9. Blocks the queue for a moment, at the close of an image (or, without
        // fallocate, once per reservation).
        Err(match file.file.set_len(to) {
            Ok(()) => Outcome::Done,
            Err(error) => failed(&error),
        })
    }
}

fn ended(staged: Staged, outcome: Outcome) -> Step {
    Step::Ended(Ended { staged, outcome })
}

/// Copies what an operation wants of an inflated cluster to where it wants it.
fn deliver(payload: &Payload, copies: &Area, op: Op, cluster: &[u8]) -> Outcome {
    let part = |from: u32, len: u32| cluster.get(from as usize..)?.get(..len as usize);
    match op.kind {
        OpKind::Inflate { tag, at, from, len, .. } => {
            let Some(bytes) = part(from, len) else { return Outcome::Error(IoErrorKind::Io) };
            if let Err(error) = payload.copy_in(tag, at, bytes) {
                return failed(&error);
            }
        }
        OpKind::CopyInflate { buffer, at, from, len, .. } => {
            let Some(bytes) = part(from, len) else { return Outcome::Error(IoErrorKind::Io) };
            copies.copy_in(copy_start(buffer, at, len), bytes);
        }
        _ => unreachable!("only these two wait for a cluster"),
    }
    Outcome::Done
}

fn extend(file: &Source, from: u64, to: u64) -> Result<Io, Outcome> {
    if let FileKind::BlockDevice { size } = file.kind {
        // A block device does not grow; what lies inside is there already.
        return Err(match to <= size {
            true => Outcome::Done,
            false => Outcome::Error(IoErrorKind::NoSpace),
        });
    }
    if to <= from {
        return Err(Outcome::Done);
    }
    Ok(Io::Allocate { fd: file.fd(), mode: 0, offset: from, len: to - from })
}

fn copy_start(buffer: u16, at: u32, len: u32) -> usize {
    let end = u64::from(at) + u64::from(len);
    assert!(end <= COPY_BUFFER.into(), "a copy goes through one buffer");
    usize::from(buffer) * COPY_BUFFER as usize + at as usize
}

fn block_start(index: u32) -> usize {
    index as usize * PAGE
}

/// Whether fallocate said that it cannot, rather than that it failed.
fn is_refusal(errno: i32) -> bool {
    matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
}

fn failed(error: &io::Error) -> Outcome {
    Outcome::Error(errno::kind_of(error.raw_os_error().unwrap_or(libc::EIO)))
}

/// The outcome of an operation that succeeded with `count`.
fn counted(kind: OpKind, count: u32) -> Outcome {
    match kind {
        OpKind::Read { len, .. } if count < len => Outcome::Short(count),
        // A write that wrote nothing would be tried for ever.
        OpKind::Write { .. }
        | OpKind::WriteZeros { .. }
        | OpKind::MetaWrite { .. }
        | OpKind::CopyWrite { .. }
            if count == 0 =>
        {
            Outcome::Error(IoErrorKind::Io)
        }
        OpKind::Write { len, .. }
        | OpKind::WriteZeros { len, .. }
        | OpKind::MetaWrite { len, .. }
        | OpKind::CopyWrite { len, .. }
            if count < len =>
        {
            Outcome::Short(count)
        }
        _ => Outcome::Done,
    }
}
