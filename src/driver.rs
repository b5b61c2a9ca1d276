//! From an engine [`Op`] to an io_uring operation, and from its completion back to an [`Outcome`].
//!
//! What lives here and nowhere else: retry of EINTR and EAGAIN, reads that end at the end of the
//! file, the staging blocks, the buffers of requests and copies, and what to do where fallocate or
//! ftruncate are missing. Compressed clusters are the [`pool`](crate::pool)'s.
//!
//! **Invariant:** nothing here calls into [`Engine::complete`]; outcomes are returned, and the loop
//! in `queue.rs` hands them on, so nothing recurses.

use std::io;
use std::os::fd::RawFd;

use qcow2::{COPY_BUFFER, Compressed, Engine, IoErrorKind, Op, OpKind, Outcome};

use crate::buffer::{Area, PAGE, Piece};
use crate::errno;
use crate::files::{FileKind, Files, Source};
use crate::pool::Pool;
use crate::ring::Io;

/// The largest `WriteZeros` the engine asks for.
const ZEROS: usize = 2 << 20;

/// Gives up on an operation that the kernel has put off (EAGAIN) so often.
const MAX_TRIES: u32 = 1000;

/// Gives up on a read that ends early without being at the end of the file.
const MAX_PARTS: u32 = 16;

/// The data path "copy": the driver copies each request's payload to and from a buffer of its tag.
///
/// Another data path (registered request pages, pread on the character device) replaces this
/// type: the rest asks it only for the address to fetch with and for a piece of a request.
pub struct TagBuffers {
    area: Area,
    bytes: u32,
}

impl TagBuffers {
    /// Buffers of `bytes` bytes for `depth` tags; pages are committed when first used.
    pub fn new(depth: u16, bytes: u32) -> io::Result<Self> {
        Ok(Self { area: Area::new(usize::from(depth) * bytes as usize)?, bytes })
    }

    /// What a FETCH or COMMIT of this tag says.
    pub fn address(&self, tag: u16) -> u64 {
        self.piece(tag, 0, self.bytes).address() as u64
    }

    fn start(&self, tag: u16, at: u32, len: u32) -> usize {
        let end = u64::from(at) + u64::from(len);
        assert!(end <= u64::from(self.bytes), "an operation stays inside its request's buffer");
        usize::from(tag) * self.bytes as usize + at as usize
    }

    fn piece(&self, tag: u16, at: u32, len: u32) -> Piece {
        self.area.piece(self.start(tag, at, len), len)
    }

    fn zero(&self, tag: u16, at: u32, len: u32) {
        self.area.zero(self.start(tag, at, len), len as usize);
    }

    fn copy_in(&self, tag: u16, at: u32, from: &[u8]) {
        let len = u32::try_from(from.len()).expect("an operation's length is a u32");
        self.area.copy_in(self.start(tag, at, len), from);
    }
}

/// An operation in flight.
#[derive(Clone, Copy, Debug)]
pub struct Flight {
    op: Op,
    io: Io,
    /// The staging block of a metadata operation.
    block: Option<u32>,
    /// Bytes of a read of metadata, or of a copy, that are there already.
    have: u32,
    /// Reads that it took so far.
    parts: u32,
    tries: u32,
    /// Whether fallocate was refused and this is the ftruncate in its place.
    fallback: bool,
}

/// What comes next for an operation.
pub enum Step {
    /// Submit this.
    Submit(Flight, Io),
    /// It waits for a cluster to be inflated, and ends in [`Driver::inflated`].
    Pooled,
    /// It has ended.
    Ended(Op, Outcome),
}

/// The files of an image and the memory that its operations use.
pub struct Driver {
    files: Files,
    buffers: TagBuffers,
    zeros: Area,
    staging: Area,
    free_blocks: Vec<u32>,
    copies: Area,
    pool: Pool,
    can_truncate: bool,
}

impl Driver {
    /// `operations` is how many may be in flight, `copy_buffers` how many buffers the engine uses.
    pub fn new(
        files: Files,
        buffers: TagBuffers,
        operations: u32,
        copy_buffers: usize,
        can_truncate: bool,
    ) -> io::Result<Self> {
        Ok(Self {
            files,
            copies: Area::new(copy_buffers * COPY_BUFFER as usize)?,
            buffers,
            zeros: Area::new(ZEROS)?,
            staging: Area::new(operations as usize * PAGE)?,
            free_blocks: (0..operations).rev().collect(),
            pool: Pool::new()?,
            can_truncate,
        })
    }

    /// What a FETCH or COMMIT of this tag says.
    pub fn address(&self, tag: u16) -> u64 {
        self.buffers.address(tag)
    }

    /// The descriptor to read eight bytes from to be woken for [`inflated`](Self::inflated).
    pub fn pool_fd(&self) -> RawFd {
        self.pool.wake_fd()
    }

    /// The first step of an operation.
    pub fn start(&mut self, engine: &Engine, op: Op) -> Step {
        let Some(file) = self.files.get(op.file) else {
            return Step::Ended(op, Outcome::Error(IoErrorKind::Io));
        };
        let fd = file.fd();
        let mut block = None;
        let io = match op.kind {
            OpKind::Read { tag, at, offset, len } => {
                Io::Read { fd, to: self.buffers.piece(tag, at, len), offset }
            }
            OpKind::Write { tag, at, offset, len } => {
                Io::Write { fd, from: self.buffers.piece(tag, at, len), offset }
            }
            OpKind::Inflate { source, .. } | OpKind::CopyInflate { source, .. } => {
                return self.inflate(op, source);
            }
            OpKind::Fill { tag, at, len } => {
                self.buffers.zero(tag, at, len);
                return Step::Ended(op, Outcome::Done);
            }
            OpKind::CopyFill { buffer, at, len } => {
                self.copies.zero(copy_start(buffer, at, len), len as usize);
                return Step::Ended(op, Outcome::Done);
            }
            OpKind::WriteZeros { offset, len } => {
                Io::Write { fd, from: self.zeros.piece(0, len), offset }
            }
            OpKind::MetaRead { offset, len } => {
                let (index, piece) = self.take_block(len);
                block = Some(index);
                Io::Read { fd, to: piece, offset }
            }
            OpKind::MetaWrite { offset, len } => {
                let (index, piece) = self.take_block(len);
                block = Some(index);
                let bytes = engine.staging(op.id);
                assert!(bytes.len() == len as usize, "a staging block holds what is written");
                self.staging.copy_in(block_start(index), bytes);
                Io::Write { fd, from: piece, offset }
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
                Err(outcome) => return Step::Ended(op, outcome),
            },
            OpKind::Truncate { to } => match self.truncate(file, to) {
                Ok(io) => io,
                Err(outcome) => return Step::Ended(op, outcome),
            },
        };
        let flight = Flight { op, io, block, have: 0, parts: 0, tries: 0, fallback: false };
        Step::Submit(flight, io)
    }

    /// The step after a completion with `result`.
    pub fn next(&mut self, engine: &mut Engine, mut flight: Flight, result: i32) -> Step {
        if matches!(-result, libc::EINTR | libc::EAGAIN) && flight.tries < MAX_TRIES {
            flight.tries += 1;
            return Step::Submit(flight, flight.io);
        }
        let outcome = match (flight.op.kind, u32::try_from(result)) {
            (OpKind::Extend { to, .. }, Err(_)) if !flight.fallback && is_refusal(-result) => {
                match self.lengthen(flight.op, to) {
                    Ok(io) => {
                        let flight = Flight { io, fallback: true, ..flight };
                        return Step::Submit(flight, io);
                    }
                    Err(outcome) => outcome,
                }
            }
            (_, Err(_)) => Outcome::Error(errno::kind_of(-result)),
            (
                OpKind::MetaRead { offset, len } | OpKind::CopyRead { offset, len, .. },
                Ok(count),
            ) => match self.read_more(&mut flight, offset, len, count) {
                Ok(Some(io)) => return Step::Submit(Flight { io, ..flight }, io),
                Ok(None) => self.hand_over(engine, &flight, len),
                Err(outcome) => outcome,
            },
            (kind, Ok(count)) => counted(kind, count),
        };
        if let Some(index) = flight.block {
            self.free_blocks.push(index);
        }
        Step::Ended(flight.op, outcome)
    }

    fn inflate(&mut self, op: Op, source: Compressed) -> Step {
        let file = self.files.get(op.file).expect("the caller has looked");
        match self.pool.get(file, source, op) {
            Some(cluster) => Step::Ended(op, deliver(&self.buffers, &self.copies, op, cluster)),
            None => Step::Pooled,
        }
    }

    /// Calls `each` for every operation that has ended with an inflated cluster, or without.
    pub fn inflated(&mut self, mut each: impl FnMut(Op, Outcome)) {
        let (buffers, copies) = (&self.buffers, &self.copies);
        self.pool.take(|op, cluster| {
            let failed = Outcome::Error(IoErrorKind::Io);
            each(op, cluster.map_or(failed, |cluster| deliver(buffers, copies, op, cluster)));
        });
    }

    fn copy(&self, buffer: u16, at: u32, len: u32) -> Piece {
        self.copies.piece(copy_start(buffer, at, len), len)
    }

    fn take_block(&mut self, len: u32) -> (u32, Piece) {
        assert!(len as usize <= PAGE, "a metadata operation fits a staging block");
        let index = self.free_blocks.pop().expect("one block for each operation in flight");
        (index, self.staging.piece(block_start(index), len))
    }

    /// Where a read of metadata or of a copy goes to.
    fn place(&self, flight: &Flight) -> (&Area, usize) {
        match (flight.op.kind, flight.block) {
            (OpKind::CopyRead { buffer, at, len, .. }, _) => {
                (&self.copies, copy_start(buffer, at, len))
            }
            (_, block) => {
                (&self.staging, block_start(block.expect("a metadata read has a staging block")))
            }
        }
    }

    /// After `count` more bytes of a read of metadata or of a copy: the read of the rest, or `None`
    /// when all is there. Zeros only stand for what lies behind the end of the file; a file that
    /// has become shorter, or a read that ends early for an error further on, must not become
    /// zeros.
    fn read_more(
        &self,
        flight: &mut Flight,
        offset: u64,
        len: u32,
        count: u32,
    ) -> Result<Option<Io>, Outcome> {
        let wrong = Err(Outcome::Error(IoErrorKind::Io));
        let Some(file) = self.files.get(flight.op.file) else { return wrong };
        flight.have = (flight.have + count).min(len);
        if flight.have == len {
            return Ok(None);
        }
        let end = file.end().map_err(|error| failed(&error))?;
        let (area, start) = self.place(flight);
        if offset + u64::from(flight.have) >= end {
            if flight.have == 0 && flight.block.is_some() {
                // A page of metadata begins inside the file, or somebody has cut the file off.
                return wrong;
            }
            area.zero(start + flight.have as usize, (len - flight.have) as usize);
            return Ok(None);
        }
        flight.parts += 1;
        if flight.parts >= MAX_PARTS {
            return wrong;
        }
        // Direct I/O goes on at such a boundary only; the bytes before it are read again.
        flight.have -= flight.have % file.alignment;
        let to = area.piece(start + flight.have as usize, len - flight.have);
        Ok(Some(Io::Read { fd: file.fd(), to, offset: offset + u64::from(flight.have) }))
    }

    /// All bytes of a read are there: those of metadata go to the engine.
    fn hand_over(&self, engine: &mut Engine, flight: &Flight, len: u32) -> Outcome {
        if let Some(index) = flight.block {
            let mut bytes = [0; PAGE];
            let bytes = &mut bytes[..len as usize];
            self.staging.copy_out(block_start(index), bytes);
            engine.fill_staging(flight.op.id, bytes);
        }
        Outcome::Done
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

/// Copies what an operation wants of an inflated cluster to where it wants it.
fn deliver(buffers: &TagBuffers, copies: &Area, op: Op, cluster: &[u8]) -> Outcome {
    let part = |from: u32, len: u32| cluster.get(from as usize..)?.get(..len as usize);
    match op.kind {
        OpKind::Inflate { tag, at, from, len, .. } => {
            let Some(bytes) = part(from, len) else { return Outcome::Error(IoErrorKind::Io) };
            buffers.copy_in(tag, at, bytes);
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
