//! The data path: how the bytes of requests travel between the kernel and us.
//!
//! | path | since | what happens |
//! | --- | --- | --- |
//! | zero copy | 6.16 | the pages of a request become a buffer of our ring |
//! | user copy | 6.5 | we copy them, with pread and pwrite on the character device |
//! | copy | 6.0 | the driver copies, before it hands a write over and after a read is committed |
//!
//! With zero copy no byte of a request passes through our memory: operations read and write the
//! files from those pages. Zeros come from `/dev/zero`, read into them by an operation like any
//! other; what was inflated is written with user copy, which works on the same device. (Rejected
//! for zeros: pwrite, a system call for each; the ring takes them along for nothing.)
//!
//! The best path that the driver reports is taken. Nothing else in the server knows which it is.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::buffer::{Area, Piece};
use crate::front::CharDevice;
use crate::ring::{Io, Registered};
use crate::ublk;

/// A data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum DataPath {
    /// Files are read into and written from the pages of requests (Linux 6.16).
    ZeroCopy,
    /// The server copies (Linux 6.5).
    UserCopy,
    /// The driver copies.
    Copy,
}

impl DataPath {
    /// From the best to the one that every driver has.
    pub const ALL: [Self; 3] = [Self::ZeroCopy, Self::UserCopy, Self::Copy];

    /// What ADD_DEV has to grant.
    pub fn flags(self) -> u64 {
        match self {
            Self::ZeroCopy => ublk::F_SUPPORT_ZERO_COPY | ublk::F_AUTO_BUF_REG | ublk::F_USER_COPY,
            Self::UserCopy => ublk::F_USER_COPY,
            Self::Copy => 0,
        }
    }

    /// Its name on the command line and in `list`.
    pub fn name(self) -> &'static str {
        match self {
            Self::ZeroCopy => "zero-copy",
            Self::UserCopy => "user-copy",
            Self::Copy => "copy",
        }
    }
}

/// The payload of the requests of one queue.
pub struct Payload {
    path: DataPath,
    queue: u16,
    /// A buffer for each tag, unless the pages of requests are used; committed by use.
    buffers: Option<Area>,
    /// Bytes of each.
    bytes: u32,
    /// The character device; none where there are buffers and nobody to copy from or to.
    device: Option<CharDevice>,
    zero: File,
}

impl Payload {
    /// Of `depth` requests of at most `bytes` bytes on the queue `queue`, of a character device if
    /// there is one.
    pub fn new(
        path: DataPath,
        device: Option<CharDevice>,
        queue: u16,
        depth: u16,
        bytes: u32,
    ) -> io::Result<Self> {
        let buffers = match path {
            DataPath::ZeroCopy => None,
            _ => Some(Area::new(usize::from(depth) * bytes as usize)?),
        };
        Ok(Self { path, queue, buffers, bytes, device, zero: File::open("/dev/zero")? })
    }

    /// Whether the ring needs a table of registered buffers.
    pub fn registers(&self) -> bool {
        self.path == DataPath::ZeroCopy
    }

    /// Whether each tag has a buffer that the driver has to know.
    pub fn has_addresses(&self) -> bool {
        self.path == DataPath::Copy
    }

    /// What a FETCH or COMMIT of this tag says: the address of a buffer, and what is to be
    /// registered.
    pub fn to_fetch(&self, tag: u16) -> (u64, u64) {
        match self.path {
            DataPath::ZeroCopy => (0, ublk::auto_register(tag)),
            DataPath::UserCopy => (0, 0),
            DataPath::Copy => (self.piece(tag, 0, self.bytes).address() as u64, 0),
        }
    }

    /// Fetches the payload of a write that has just arrived.
    pub fn arrived(&self, tag: u16, len: u32) -> io::Result<()> {
        self.copy_all(tag, len, Area::read_from)
    }

    /// Hands the payload of a read over that is about to be committed.
    pub fn leaves(&self, tag: u16, len: u32) -> io::Result<()> {
        self.copy_all(tag, len, Area::write_to)
    }

    /// Copies between the first `len` bytes of a request and its buffer, where that is ours to do.
    fn copy_all(
        &self,
        tag: u16,
        len: u32,
        copy: impl Fn(&Area, &File, u64, usize, usize) -> io::Result<u32>,
    ) -> io::Result<()> {
        let Some(area) = self.copied() else { return Ok(()) };
        let start = self.start(tag, 0, len);
        let mut have = 0;
        while have < len {
            let offset = ublk::payload_offset(self.queue, tag, have);
            let at = start + have as usize;
            have += copy(area, self.device(), offset, at, (len - have) as usize)?;
        }
        Ok(())
    }

    /// The buffers, where it is we who copy between them and the kernel.
    fn copied(&self) -> Option<&Area> {
        self.buffers.as_ref().filter(|_| self.path == DataPath::UserCopy)
    }

    /// Reads a part of a request from a file.
    pub fn read(&self, fd: RawFd, offset: u64, tag: u16, at: u32, len: u32) -> Io {
        match self.buffers {
            Some(_) => Io::Read { fd, to: self.piece(tag, at, len), offset },
            None => Io::ReadFixed { fd, to: self.pages(tag, at, len), offset },
        }
    }

    /// Writes a part of a request to a file.
    pub fn write(&self, fd: RawFd, offset: u64, tag: u16, at: u32, len: u32) -> Io {
        match self.buffers {
            Some(_) => Io::Write { fd, from: self.piece(tag, at, len), offset },
            None => Io::WriteFixed { fd, from: self.pages(tag, at, len), offset },
        }
    }

    /// Makes a part of a request zeros: done, unless it takes an operation.
    pub fn zero(&self, tag: u16, at: u32, len: u32) -> Option<Io> {
        match &self.buffers {
            Some(area) => {
                area.zero(self.start(tag, at, len), len as usize);
                None
            }
            None => Some(self.read(self.zero.as_raw_fd(), 0, tag, at, len)),
        }
    }

    /// Copies bytes into a part of a request.
    pub fn copy_in(&self, tag: u16, at: u32, from: &[u8]) -> io::Result<()> {
        let len = u32::try_from(from.len()).expect("an operation's length is a u32");
        let start = self.start(tag, at, len);
        match &self.buffers {
            Some(area) => area.copy_in(start, from),
            None => {
                let offset = ublk::payload_offset(self.queue, tag, at);
                self.device().write_all_at(from, offset)?;
            }
        }
        Ok(())
    }

    /// Copies a part of a request that has a buffer.
    pub fn copy_out(&self, tag: u16, at: u32, to: &mut [u8]) {
        let len = u32::try_from(to.len()).expect("a part of a request");
        let start = self.start(tag, at, len);
        self.buffers.as_ref().expect("asked for where there are buffers").copy_out(start, to);
    }

    fn device(&self) -> &File {
        let device = self.device.as_ref().and_then(|device| device.get());
        device.expect("only a device's requests are copied")
    }

    fn start(&self, tag: u16, at: u32, len: u32) -> usize {
        let end = u64::from(at) + u64::from(len);
        assert!(end <= u64::from(self.bytes), "an operation stays inside its request");
        usize::from(tag) * self.bytes as usize + at as usize
    }

    fn piece(&self, tag: u16, at: u32, len: u32) -> Piece {
        let area = self.buffers.as_ref().expect("asked for where there are buffers");
        area.piece(self.start(tag, at, len), len)
    }

    fn pages(&self, tag: u16, at: u32, len: u32) -> Registered {
        self.start(tag, at, len);
        Registered { index: tag, at, len }
    }
}
