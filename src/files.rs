//! The files of an image: the image itself, its external data file, and those beneath it; what they
//! are stored in, and reading and writing them while nothing is served yet.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use qcow2::{Extent, FileId};

use crate::buffer::PAGE;
use crate::sys;

/// What a file is stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    Regular,
    BlockDevice { size: u64 },
}

impl FileKind {
    /// The kind of an open file; an error where it is neither.
    pub fn of(file: &File) -> Result<Self> {
        let kind = file.metadata().context("fstat")?.file_type();
        if kind.is_file() {
            return Ok(Self::Regular);
        }
        if kind.is_block_device() {
            let size = sys::block_device_size(file).context("cannot get its size")?;
            return Ok(Self::BlockDevice { size });
        }
        let what = match kind {
            _ if kind.is_dir() => "a directory",
            _ if kind.is_fifo() => "a pipe",
            _ if kind.is_char_device() => "a character device",
            _ => "neither a file nor a block device",
        };
        bail!("is {what}; give an image file")
    }

    /// The length in bytes, now.
    pub fn len(self, file: &File) -> io::Result<u64> {
        match self {
            Self::Regular => Ok(file.metadata()?.len()),
            Self::BlockDevice { size } => Ok(size),
        }
    }

    /// Makes the file `len` bytes long, which is no less than it has; ENOSPC behind the end of a
    /// block device.
    pub fn lengthen(self, file: &File, len: u64) -> io::Result<()> {
        match self {
            Self::Regular => file.set_len(len),
            Self::BlockDevice { size } if len <= size => Ok(()),
            Self::BlockDevice { .. } => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    /// What no other file on this machine has.
    pub fn identity(self, file: &File) -> Result<(u64, u64)> {
        let data = file.metadata().context("fstat")?;
        // A block device may have several nodes.
        Ok(if self.is_device() { (u64::MAX, data.rdev()) } else { (data.dev(), data.ino()) })
    }

    /// Whether it is a block device.
    pub fn is_device(self) -> bool {
        matches!(self, Self::BlockDevice { .. })
    }
}

/// Opens a file for reading, and for writing if wanted. A pipe or a terminal does not hold this up.
fn open_plain(path: &Path, write: bool) -> io::Result<File> {
    // The standard library sets O_CLOEXEC.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
}

/// The same file once more, with flags and a position of its own; also one that is only a path.
pub fn reopen(file: &File, write: bool) -> io::Result<File> {
    open_plain(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())), write)
}

/// Opens an image, or its data file. Errors do not name it; where it cannot be written to but read,
/// they have the next step `instead`.
pub fn open_image(path: &Path, write: bool, instead: &str) -> Result<File> {
    open_plain(path, write).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT) => anyhow!("no such file"),
        Some(libc::EISDIR) => anyhow!("is a directory; give a qcow2 image file"),
        Some(libc::EACCES | libc::EPERM | libc::EROFS)
            if write && open_plain(path, false).is_ok() =>
        {
            anyhow!("cannot be opened for writing ({error}); {instead}")
        }
        Some(libc::EACCES | libc::EPERM) => {
            let and_write = if write { " and write" } else { "" };
            anyhow!("permission denied; run as a user that may read{and_write} it")
        }
        _ => anyhow!("cannot be opened: {error}"),
    })
}

/// One open file. Its locks are released when the last copy is dropped.
#[derive(Clone, Debug)]
pub struct Source {
    pub file: Arc<File>,
    pub kind: FileKind,
    /// Offset and length of every access are a multiple of this: 1 through the page cache.
    pub alignment: u32,
    /// So many bytes must be there: the length of a file that nobody writes to.
    least: u64,
}

impl Source {
    /// A file that is accessed through the page cache so far.
    pub fn new(file: File, read_only: bool) -> Result<Self> {
        let kind = FileKind::of(&file)?;
        let mut source = Self { file: Arc::new(file), kind, alignment: 1, least: 0 };
        if read_only {
            source.least = source.len().context("cannot get the length of the file")?;
        }
        Ok(source)
    }

    /// The descriptor, for an operation on a ring.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Whether the page cache is passed by.
    pub fn is_direct(&self) -> bool {
        self.alignment > 1
    }

    /// The length in bytes, now.
    pub fn len(&self) -> io::Result<u64> {
        self.kind.len(&self.file)
    }

    /// What lies from here on reads as zeros. Never inside a file that nobody should have cut off.
    pub fn end(&self) -> io::Result<u64> {
        Ok(self.len()?.max(self.least))
    }

    /// What no other file on this machine has.
    pub fn identity(&self) -> Result<(u64, u64)> {
        self.kind.identity(&self.file)
    }

    /// The first `want` bytes, or the whole file if it is shorter.
    pub fn up_to(&self, want: usize) -> io::Result<Vec<u8>> {
        self.read(0, want)
    }

    /// Exactly an extent, which was found to lie inside the file.
    pub fn extent(&self, extent: Extent) -> Result<Vec<u8>> {
        let len = usize::try_from(extent.len)?;
        let bytes = self.read(extent.offset, len)?;
        if bytes.len() < len {
            bail!("the file ended at byte {}", extent.offset + bytes.len() as u64);
        }
        Ok(bytes)
    }

    /// Up to `len` bytes from `offset` on; less only at the end of the file.
    pub fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut memory = Vec::new();
        Ok(self.read_with(offset, len, &mut memory)?.to_vec())
    }

    /// The same in a piece of `memory`, which grows as needed.
    pub fn read_with<'a>(
        &self,
        offset: u64,
        len: usize,
        memory: &'a mut Vec<u8>,
    ) -> io::Result<&'a [u8]> {
        let unit = u64::from(self.alignment);
        let skip = usize::try_from(offset % unit).map_err(io::Error::other)?;
        let start = offset - offset % unit;
        let total = (skip + len).next_multiple_of(self.alignment as usize);
        let room = page_aligned(memory, total);
        let mut have = 0;
        while have < total {
            match self.file.read_at(&mut room[have..], start + have as u64) {
                Ok(0) => break,
                Ok(count) => have += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            if !have.is_multiple_of(self.alignment as usize) {
                // Only the end of the file is not aligned.
                break;
            }
        }
        let end = have.min(skip + len);
        Ok(room.get(skip..end).unwrap_or_default())
    }

    /// Writes `bytes` to `offset`, with what lies around them as the alignment wants it. All of it
    /// lies inside the file, and nobody else writes to it.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let unit = u64::from(self.alignment);
        let skip = usize::try_from(offset % unit).map_err(io::Error::other)?;
        let start = offset - offset % unit;
        let total = (skip + bytes.len()).next_multiple_of(self.alignment as usize);
        let mut memory = Vec::new();
        let before = self.read(start, total)?;
        let room = page_aligned(&mut memory, total);
        // Behind the end of the file there is nothing to be kept.
        room[..before.len()].copy_from_slice(&before);
        room[skip..skip + bytes.len()].copy_from_slice(bytes);
        self.file.write_all_at(room, start)
    }
}

/// `len` bytes of `memory` that begin at a page, as direct I/O wants it.
fn page_aligned(memory: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if memory.len() < len + PAGE {
        memory.resize(len + PAGE, 0);
    }
    let pad = memory.as_ptr().align_offset(PAGE);
    &mut memory[pad..pad + len]
}

/// How people call a file.
pub fn name(file: FileId) -> String {
    match file {
        FileId::Image => "the image".to_string(),
        FileId::Data => "the data file".to_string(),
        FileId::Backing(number) | FileId::BackingData(number) => {
            format!("backing file {}", u32::from(number) + 1)
        }
    }
}

/// All files of an image.
#[derive(Clone, Debug)]
pub struct Files {
    pub image: Source,
    pub data: Option<Source>,
    /// What lies beneath, from the top. Read through the page cache, which images share.
    pub beneath: Vec<Source>,
}

impl Files {
    /// What the memory of requests has to be a multiple of so that it can be read into directly.
    pub fn memory_alignment(&self) -> u32 {
        let others = self.data.iter().chain(&self.beneath);
        others.map(|source| source.alignment).fold(self.image.alignment, u32::max)
    }

    /// The file that the engine names, if there is one.
    pub fn get(&self, id: FileId) -> Option<&Source> {
        match id {
            FileId::Image => Some(&self.image),
            FileId::Data => self.data.as_ref(),
            FileId::Backing(number) => self.beneath.get(usize::from(number)),
            // Images beneath that have a data file are refused.
            FileId::BackingData(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(bytes: &[u8], alignment: u32) -> Source {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        Source { alignment, ..Source::new(file, true).unwrap() }
    }

    fn pattern() -> Vec<u8> {
        (0..10_000u32).map(|at| u8::try_from(at % 251).unwrap()).collect()
    }

    #[test]
    fn an_aligned_reader_returns_what_was_asked_for() {
        let bytes = pattern();
        for alignment in [1, 512, 4096] {
            let source = source(&bytes, alignment);
            assert_eq!(source.read(700, 5000).unwrap(), bytes[700..5700]);
            assert_eq!(source.read(9_990, 100).unwrap(), bytes[9_990..]);
            assert!(source.read(20_000, 100).unwrap().is_empty());
            assert_eq!(source.up_to(50).unwrap(), bytes[..50]);
        }
    }

    #[test]
    fn an_aligned_writer_keeps_what_lies_around() {
        for alignment in [1, 512, 4096] {
            let source = source(&pattern(), alignment);
            source.write(4090, b"eleven byte").unwrap();
            let mut expected = pattern();
            expected[4090..4101].copy_from_slice(b"eleven byte");
            assert_eq!(source.read(0, 10_000).unwrap(), expected);
        }
    }

    #[test]
    fn a_file_that_nobody_writes_to_does_not_end_earlier() {
        let source = source(&pattern(), 1);
        source.file.set_len(10).unwrap();
        assert_eq!((source.len().unwrap(), source.end().unwrap()), (10, 10_000));
    }
}
