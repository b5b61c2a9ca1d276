//! What goes in and out of the engine: requests, operations, outcomes and replies.
//!
//! **Invariant:** the payload of guest requests never passes through here. An operation names the
//! request (by its tag) and a range of its buffer; the driver moves the bytes.

use crate::error::IoErrorKind;

/// A file of the image. (Backing and data files get numbers of their own when they are served.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileId {
    /// The qcow2 file itself.
    Image,
}

/// A guest request, in bytes. Offsets and lengths are multiples of 512.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Fill the request's buffer from the virtual disk.
    Read {
        /// First byte on the virtual disk.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Put the request's buffer onto the virtual disk.
    Write {
        /// First byte on the virtual disk.
        offset: u64,
        /// Bytes.
        len: u32,
        /// Reply only when the bytes and their mapping would survive a power cut.
        fua: bool,
    },
    /// Reply when all that was replied to before would survive a power cut.
    Flush,
}

/// Names an operation between [`Engine::next_op`](crate::Engine::next_op) and
/// [`Engine::complete`](crate::Engine::complete). Small and dense: an index into a fixed table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u32);

/// An operation that the driver has to carry out. Operations that were handed out may be carried
/// out at the same time and complete in any order: the engine orders by waiting for completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// Hand this back with the outcome.
    pub id: OpId,
    /// The file it goes to.
    pub file: FileId,
    /// What to do.
    pub kind: OpKind,
}

/// The kinds of operation. All offsets are bytes in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Read `len` bytes at `offset` of the file into the buffer of request `tag`, from byte `at`
    /// of that buffer on.
    Read {
        /// The guest request whose buffer is meant.
        tag: u16,
        /// First byte in that buffer.
        at: u32,
        /// First byte in the file.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Write `len` bytes of the buffer of request `tag`, from byte `at` on, to `offset`.
    Write {
        /// The guest request whose buffer is meant.
        tag: u16,
        /// First byte in that buffer.
        at: u32,
        /// First byte in the file.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Fill `len` bytes of the buffer of request `tag` with zeros. Touches no file.
    Fill {
        /// The guest request whose buffer is meant.
        tag: u16,
        /// First byte in that buffer.
        at: u32,
        /// Bytes.
        len: u32,
    },
    /// Make `len` bytes at `offset` of the file read as zeros; never more than 2 MiB.
    WriteZeros {
        /// First byte in the file.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Read metadata: the driver hands the bytes to
    /// [`Engine::fill_staging`](crate::Engine::fill_staging) before it completes the operation.
    /// Bytes past the end of the file count as zeros; so does a short read there.
    MetaRead {
        /// First byte in the file.
        offset: u64,
        /// Bytes, at most [`Geometry::MAX_PAGE`](crate::Geometry::MAX_PAGE).
        len: u32,
    },
    /// Write metadata: the bytes are [`Engine::staging`](crate::Engine::staging) of this operation,
    /// and stay the same until it completes.
    MetaWrite {
        /// First byte in the file.
        offset: u64,
        /// Bytes, at most [`Geometry::MAX_PAGE`](crate::Geometry::MAX_PAGE).
        len: u32,
    },
    /// fdatasync. Covers exactly what had completed when this was submitted.
    Sync,
    /// Make the file at least `to` bytes long, with the bytes from `from` on allocated on the host
    /// and reading as zeros (fallocate; where that is not supported, a longer sparse file).
    Extend {
        /// Old length in bytes; the file may end up to a cluster before.
        from: u64,
        /// New length in bytes.
        to: u64,
    },
    /// Cut the file to `to` bytes.
    Truncate {
        /// New length in bytes.
        to: u64,
    },
}

/// How an operation ended. Retrying EINTR and EAGAIN is the driver's; everything else comes here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of it.
    Done,
    /// Only the first so many bytes of a read or write; 0 is the end of the file for a read.
    Short(u32),
    /// It failed.
    Error(IoErrorKind),
}

/// The answer to a guest request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request's tag.
    pub tag: u16,
    /// Success means the whole length.
    pub result: Result<(), IoErrorKind>,
}
