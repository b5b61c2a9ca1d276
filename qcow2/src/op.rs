//! What goes in and out of the engine: requests, operations, outcomes and replies.
//!
//! **Invariant:** the payload of guest requests never passes through here. An operation names the
//! request (by its tag) and a range of its buffer; the driver moves the bytes.

use crate::error::IoErrorKind;

/// A file of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileId {
    /// The qcow2 file itself.
    Image,
    /// Its external data file.
    Data,
    /// A file of the chain beneath, counted from 0 at the image's own backing file. Only read.
    Backing(u8),
    /// The external data file of such a one. Only read.
    BackingData(u8),
}

/// How clusters are compressed (header field compression_type).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate with a window of at most 4 KiB (2^12).
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// A compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// First byte in the file; need not be aligned to anything.
    pub offset: u64,
    /// Bytes up to the end of its last sector. The last of them may lie behind the end of the file
    /// and may belong to the next cluster.
    pub len: u32,
    /// How it is compressed.
    pub method: Compression,
    /// log2 of the bytes that it inflates to, exactly.
    pub cluster_bits: u32,
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
    /// Make a range of the virtual disk read as zeros, whatever lies beneath.
    WriteZeroes {
        /// First byte on the virtual disk.
        offset: u64,
        /// Bytes.
        len: u32,
        /// Whole clusters may give their host cluster back; otherwise (NOUNMAP) they keep it, so
        /// that later writes to them need no new space.
        unmap: bool,
    },
    /// Nobody needs the bytes of a range any more. Whole clusters are unmapped and read as zeros;
    /// the rest of the range stays as it is.
    Discard {
        /// First byte on the virtual disk.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Reply when all that was replied to before would survive a power cut.
    Flush,
}

/// Bytes of one copy buffer. Larger copies go through in pieces.
pub const COPY_BUFFER: u32 = 64 << 10;

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
    /// Inflate a cluster, and put `len` of its bytes, from its byte `from` on, into the buffer of
    /// request `tag`, from byte `at` of that buffer on. `Io` if it cannot be inflated.
    Inflate {
        /// The guest request whose buffer is meant.
        tag: u16,
        /// First byte in that buffer.
        at: u32,
        /// Where it is, and how it is compressed.
        source: Compressed,
        /// First byte of the inflated cluster.
        from: u32,
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
    /// Read `len` bytes at `offset` of the file (the image or what lies beneath it) into copy
    /// buffer `buffer`, from its byte `at` on. Bytes past the end of the file count as zeros.
    CopyRead {
        /// Which copy buffer.
        buffer: u16,
        /// First byte in that buffer.
        at: u32,
        /// First byte in the file.
        offset: u64,
        /// Bytes, at most [`COPY_BUFFER`].
        len: u32,
    },
    /// The same as [`Inflate`](OpKind::Inflate), into a copy buffer.
    CopyInflate {
        /// Which copy buffer.
        buffer: u16,
        /// First byte in that buffer.
        at: u32,
        /// Where it is, and how it is compressed.
        source: Compressed,
        /// First byte of the inflated cluster.
        from: u32,
        /// Bytes.
        len: u32,
    },
    /// Fill `len` bytes of copy buffer `buffer` with zeros, from its byte `at` on.
    CopyFill {
        /// Which copy buffer.
        buffer: u16,
        /// First byte in that buffer.
        at: u32,
        /// Bytes.
        len: u32,
    },
    /// Write the first `len` bytes of copy buffer `buffer` to `offset` of the file.
    CopyWrite {
        /// Which copy buffer.
        buffer: u16,
        /// First byte in the file.
        offset: u64,
        /// Bytes, at most [`COPY_BUFFER`].
        len: u32,
    },
    /// Make `len` bytes at `offset` read as zeros and keep (or get) host space for them, so that
    /// later writes there need none (fallocate with ZERO_RANGE). `Unsupported` is no failure:
    /// the bytes are anything then.
    ZeroRange {
        /// First byte in the file.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Give the host space of `len` bytes at `offset` back (punch a hole, keep the size): they
    /// read as zeros afterwards. `Unsupported` is no failure: then they read as anything.
    Punch {
        /// First byte in the file.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// fdatasync. Covers exactly what had completed when this was submitted.
    Sync,
    /// Make the file at least `to` bytes long, with the bytes from `from` on allocated on the host
    /// and reading as zeros (fallocate; where that is not supported, a longer sparse file).
    Extend {
        /// Old length in bytes; the file may end up to a cluster before, or further where clusters
        /// behind its end are counted: these become a hole.
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

impl OpKind {
    /// Does it leave every file as it is? (An fdatasync does, but makes durable what it holds.)
    pub(crate) fn only_reads(self) -> bool {
        matches!(
            self,
            Self::Read { .. }
                | Self::CopyRead { .. }
                | Self::Inflate { .. }
                | Self::CopyInflate { .. }
                | Self::Fill { .. }
                | Self::CopyFill { .. }
                | Self::MetaRead { .. }
        )
    }
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
