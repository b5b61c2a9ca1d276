//! From an engine [`Op`] to an io_uring operation, and from its completion back to an [`Outcome`].
//!
//! What lives here and nowhere else: retry of EINTR and EAGAIN, metadata reads that end at the end
//! of the file, the staging blocks, the buffers of the requests, and what to do where fallocate or
//! ftruncate are missing.
//!
//! **Invariant:** nothing here calls into [`Engine::complete`]; outcomes are returned, and the loop
//! in `queue.rs` hands them on, so nothing recurses.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use qcow2::{COPY_BUFFER, Engine, FileId, IoErrorKind, Op, OpKind, Outcome};

use crate::buffer::{Area, PAGE, Piece};
use crate::errno;
use crate::open::FileKind;
use crate::ring::Io;

/// The largest `WriteZeros` the engine asks for.
const ZEROS: usize = 2 << 20;

/// Gives up on an operation that the kernel has put off (EAGAIN) so often.
const MAX_TRIES: u32 = 1000;

/// Gives up on a metadata read that ends early without being at the end of the file.
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
}

/// An operation in flight.
#[derive(Clone, Copy, Debug)]
pub struct Flight {
    op: Op,
    io: Io,
    /// The staging block of a metadata operation.
    block: Option<u32>,
    /// Bytes of a metadata read that are there already.
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
    /// It has ended.
    Ended(Op, Outcome),
}

/// The image file and the memory that its operations use.
pub struct Driver {
    file: File,
    kind: FileKind,
    buffers: TagBuffers,
    zeros: Area,
    staging: Area,
    free_blocks: Vec<u32>,
    /// What lies beneath, if anything does. Read through the page cache, which images share.
    backing: Option<(File, u64)>,
    copies: Area,
    can_truncate: bool,
}

/// The files of an image.
pub struct Files {
    pub image: File,
    pub kind: FileKind,
    /// What lies beneath, and its length when it was opened.
    pub backing: Option<(File, u64)>,
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
            file: files.image,
            kind: files.kind,
            backing: files.backing,
            copies: Area::new(copy_buffers * COPY_BUFFER as usize)?,
            buffers,
            zeros: Area::new(ZEROS)?,
            staging: Area::new(operations as usize * PAGE)?,
            free_blocks: (0..operations).rev().collect(),
            can_truncate,
        })
    }

    /// What a FETCH or COMMIT of this tag says.
    pub fn address(&self, tag: u16) -> u64 {
        self.buffers.address(tag)
    }

    /// The first step of an operation.
    pub fn start(&mut self, engine: &Engine, op: Op) -> Step {
        let fd = match (op.file, &self.backing) {
            (FileId::Backing, Some((backing, _))) => backing.as_raw_fd(),
            (FileId::Backing, None) => return Step::Ended(op, Outcome::Error(IoErrorKind::Io)),
            (FileId::Image, _) => self.file.as_raw_fd(),
        };
        let mut block = None;
        let io = match op.kind {
            OpKind::Read { tag, at, offset, len } => {
                Io::Read { fd, to: self.buffers.piece(tag, at, len), offset }
            }
            OpKind::Write { tag, at, offset, len } => {
                Io::Write { fd, from: self.buffers.piece(tag, at, len), offset }
            }
            OpKind::Fill { tag, at, len } => {
                self.buffers.zero(tag, at, len);
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
            OpKind::CopyRead { buffer, offset, len } => {
                Io::Read { fd, to: self.copy(buffer, 0, len), offset }
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
            OpKind::Extend { from, to } => match self.extend(fd, from, to) {
                Ok(io) => io,
                Err(outcome) => return Step::Ended(op, outcome),
            },
            OpKind::Truncate { to } => match self.truncate(fd, to) {
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
                match self.lengthen(to) {
                    Ok(io) => {
                        let flight = Flight { io, fallback: true, ..flight };
                        return Step::Submit(flight, io);
                    }
                    Err(outcome) => outcome,
                }
            }
            (_, Err(_)) => Outcome::Error(errno::kind_of(-result)),
            (OpKind::MetaRead { offset, len }, Ok(count)) => {
                match self.read_more(&mut flight, offset, len, count) {
                    Some(io) => return Step::Submit(Flight { io, ..flight }, io),
                    None => self.hand_over(engine, &flight, len),
                }
            }
            (OpKind::CopyRead { buffer, offset, len }, Ok(count)) => {
                match self.copy_more(&mut flight, buffer, offset, len, count) {
                    Ok(Some(io)) => return Step::Submit(Flight { io, ..flight }, io),
                    Ok(None) => Outcome::Done,
                    Err(outcome) => outcome,
                }
            }
            (kind, Ok(count)) => counted(kind, count),
        };
        if let Some(index) = flight.block {
            self.free_blocks.push(index);
        }
        Step::Ended(flight.op, outcome)
    }

    fn copy_start(&self, buffer: u16) -> usize {
        usize::from(buffer) * COPY_BUFFER as usize
    }

    fn copy(&self, buffer: u16, at: u32, len: u32) -> Piece {
        assert!(at + len <= COPY_BUFFER, "a copy goes through one buffer");
        self.copies.piece(self.copy_start(buffer) + at as usize, len)
    }

    /// After `count` more bytes of a copy's read: the read of the rest, or `None` when all is
    /// there. Zeros only stand for what lies behind the end of the file; a file that has become
    /// shorter, or a read that ends early for an error further on, must not become zeros.
    fn copy_more(
        &self,
        flight: &mut Flight,
        buffer: u16,
        offset: u64,
        len: u32,
        count: u32,
    ) -> Result<Option<Io>, Outcome> {
        let Some((backing, end)) = &self.backing else {
            return Err(Outcome::Error(IoErrorKind::Io));
        };
        flight.have = (flight.have + count).min(len);
        let inside = end.saturating_sub(offset).min(len.into());
        if u64::from(flight.have) >= inside {
            let rest = self.copy_start(buffer) + flight.have as usize;
            self.copies.zero(rest, (len - flight.have) as usize);
            return Ok(None);
        }
        flight.parts += 1;
        if count == 0 || flight.parts >= MAX_PARTS {
            return Err(Outcome::Error(IoErrorKind::Io));
        }
        let to = self.copy(buffer, flight.have, len - flight.have);
        let offset = offset + u64::from(flight.have);
        Ok(Some(Io::Read { fd: backing.as_raw_fd(), to, offset }))
    }

    fn take_block(&mut self, len: u32) -> (u32, Piece) {
        assert!(len as usize <= PAGE, "a metadata operation fits a staging block");
        let index = self.free_blocks.pop().expect("one block for each operation in flight");
        (index, self.staging.piece(block_start(index), len))
    }

    /// After `count` more bytes of a metadata read: the read of the rest, or `None` when all is
    /// there. What lies past the end of the file counts as zeros.
    fn read_more(&self, flight: &mut Flight, offset: u64, len: u32, count: u32) -> Option<Io> {
        let index = flight.block.expect("a metadata read has a staging block");
        flight.have = (flight.have + count).min(len);
        if flight.have == len {
            return None;
        }
        if count == 0 && flight.have == 0 {
            // A page of metadata begins inside the file, or somebody has cut the file off.
            flight.parts = MAX_PARTS;
        }
        let at_end = count == 0
            || self.len().is_ok_and(|end| offset + u64::from(flight.have) >= end)
            || flight.parts >= MAX_PARTS;
        if at_end {
            let rest = (len - flight.have) as usize;
            // With all parts used up, `hand_over` makes an error of it.
            self.staging.zero(block_start(index) + flight.have as usize, rest);
            return None;
        }
        flight.parts += 1;
        // Direct I/O goes on at a sector boundary only; the bytes before it are read again.
        flight.have -= flight.have % 512;
        let start = block_start(index) + flight.have as usize;
        let to = self.staging.piece(start, len - flight.have);
        Some(Io::Read { fd: self.file.as_raw_fd(), to, offset: offset + u64::from(flight.have) })
    }

    fn hand_over(&self, engine: &mut Engine, flight: &Flight, len: u32) -> Outcome {
        if flight.parts >= MAX_PARTS {
            return Outcome::Error(IoErrorKind::Io);
        }
        let index = flight.block.expect("a metadata read has a staging block");
        let mut bytes = [0; PAGE];
        let bytes = &mut bytes[..len as usize];
        self.staging.copy_out(block_start(index), bytes);
        engine.fill_staging(flight.op.id, bytes);
        Outcome::Done
    }

    fn len(&self) -> io::Result<u64> {
        self.kind.len(&self.file)
    }

    fn extend(&self, fd: RawFd, from: u64, to: u64) -> Result<Io, Outcome> {
        if let FileKind::BlockDevice { size } = self.kind {
            // A block device does not grow; what lies inside is there already.
            return Err(match to <= size {
                true => Outcome::Done,
                false => Outcome::Error(IoErrorKind::NoSpace),
            });
        }
        if to <= from {
            return Err(Outcome::Done);
        }
        Ok(Io::Allocate { fd, mode: 0, offset: from, len: to - from })
    }

    /// A longer sparse file, where the file system has no fallocate. Never a shorter one.
    fn lengthen(&self, to: u64) -> Result<Io, Outcome> {
        match self.len() {
            Ok(len) if len >= to => Err(Outcome::Done),
            Ok(_) => self.truncate(self.file.as_raw_fd(), to),
            Err(error) => Err(failed(&error)),
        }
    }

    fn truncate(&self, fd: RawFd, to: u64) -> Result<Io, Outcome> {
        if matches!(self.kind, FileKind::BlockDevice { .. }) {
            return Err(Outcome::Done);
        }
        if self.can_truncate {
            return Ok(Io::Truncate { fd, len: to });
        }
        // Before 6.9. Blocks the queue for a moment, at the close of an image (or, without
        // fallocate, once per reservation).
        Err(match self.file.set_len(to) {
            Ok(()) => Outcome::Done,
            Err(error) => failed(&error),
        })
    }
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
