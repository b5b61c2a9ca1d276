//! Opening an image: blocking code around the engine's pure parsers.
//!
//! The order: open without side effects, lock, decide between direct and buffered I/O, read header
//! and tables in that same mode, hand them to the engine. Nothing is written here.
//!
//! Whether the image lies on a device of our own needs no check: its device does not exist yet.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use qcow2::{Engine, Extent, Header, Image, Options};

use crate::buffer::PAGE;
use crate::{backing, lock, sys};

/// Direct or buffered I/O on the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Direct where possible.
    Auto,
    /// Direct, or an error.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// What to open, and how.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub path: PathBuf,
    pub mode: Mode,
    /// Bytes of a logical block of the device: 512 or 4096.
    pub block: u32,
    /// For the engine; the alignment is filled in here.
    pub options: Options,
}

/// An image that is ready to be served.
pub struct Opened {
    pub file: File,
    /// What lies beneath.
    pub backing: Option<(File, u64)>,
    pub kind: FileKind,
    pub engine: Engine,
    pub direct: bool,
    /// Why buffered I/O is used although direct I/O was not ruled out on the command line.
    pub note: Option<String>,
    pub version: u32,
    pub cluster_bits: u32,
}

/// What the image is stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    Regular,
    BlockDevice { size: u64 },
}

impl FileKind {
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
        bail!("is {what}; give a qcow2 image file")
    }

    /// The length in bytes, now.
    pub fn len(self, file: &File) -> io::Result<u64> {
        match self {
            Self::Regular => Ok(file.metadata()?.len()),
            Self::BlockDevice { size } => Ok(size),
        }
    }
}

/// Opens the image. Errors do not name it; the caller does.
pub fn open(wanted: &Wanted) -> Result<Opened> {
    let read_only = wanted.options.read_only;
    let file = open_file(&wanted.path, read_only)?;
    let kind = FileKind::of(&file)?;
    if matches!(kind, FileKind::BlockDevice { .. }) && !read_only {
        bail!(
            "is a block device; images on block devices are served with --read-only only, so far \
             (or copy it to a file)"
        );
    }
    // Opened so that a pipe or a terminal could not hold us up; that is settled now.
    clear_flag(&file, OFlag::O_NONBLOCK)?;
    lock::take(&file, read_only)?;

    let (mut direct, mut note) = choose(&file, wanted)?;
    let mut reader = Reader { file: &file, alignment: direct.unwrap_or(1) };
    let len = kind.len(&file).context("cannot get the length of the file")?;
    let first = reader.up_to(512, len).context("reading the header")?;
    let needed = Header::needed(&first)?;
    let bytes = reader.up_to(needed, len).context("reading the header")?;
    let header = Header::parse(&bytes, len, read_only)?;

    let geometry = header.geometry();
    if direct.is_some_and(|alignment| u64::from(alignment) > geometry.cluster_size()) {
        (direct, note) =
            (None, buffered(wanted.mode, "needs clusters of 4096 bytes or more there")?);
        clear_flag(&file, OFlag::O_DIRECT)?;
        reader.alignment = 1;
    }
    let version = header.version();
    let l1 = reader.extent(header.l1_extent()).context("reading the L1 table")?;
    let refcounts =
        reader.extent(header.refcount_table_extent()).context("reading the refcount table")?;
    let backing = match header.backing() {
        Some(named) => Some(backing::open(&wanted.path, named)?),
        None => None,
    };
    let image = match &backing {
        Some((_, beneath)) => Image::with_backing(header, &l1, &refcounts, len, *beneath)?,
        None => Image::new(header, &l1, &refcounts, len)?,
    };
    let options = Options { alignment: direct.unwrap_or(512), ..wanted.options.clone() };
    let engine = Engine::new(image, &options)?;
    let cluster_bits = geometry.cluster_bits();
    let direct = direct.is_some();
    Ok(Opened { file, backing, kind, engine, direct, note, version, cluster_bits })
}

fn open_file(path: &Path, read_only: bool) -> Result<File> {
    let open = |write: bool| {
        // The standard library sets O_CLOEXEC.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        OpenOptions::new().read(true).write(write).custom_flags(flags).open(path)
    };
    open(!read_only).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT) => anyhow!("no such file"),
        Some(libc::EISDIR) => anyhow!("is a directory; give a qcow2 image file"),
        Some(libc::EACCES | libc::EPERM | libc::EROFS) if !read_only && open(false).is_ok() => {
            anyhow!("cannot be opened for writing ({error}); --read-only serves it for reading")
        }
        Some(libc::EACCES | libc::EPERM) => {
            anyhow!("permission denied; run as a user that may read and write it")
        }
        _ => anyhow!("cannot be opened: {error}"),
    })
}

fn clear_flag(file: &File, flag: OFlag) -> Result<()> {
    set_flags(file, |flags| flags & !flag).context("changing the mode of the open file")
}

fn set_flags(file: &File, change: impl Fn(OFlag) -> OFlag) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(change(flags))).map(drop)
}

/// Decides between direct and buffered I/O, and switches the open file. Direct comes with the
/// alignment that every access needs; buffered with a note for the user.
fn choose(file: &File, wanted: &Wanted) -> Result<(Option<u32>, Option<String>)> {
    if wanted.mode == Mode::Buffered {
        return Ok((None, None));
    }
    let why = match needed_alignment(file) {
        Ok(alignment) if alignment <= 512 => {
            return Ok((Some(512), None));
        }
        Ok(alignment) if alignment <= 4096 => {
            if wanted.block >= 4096 {
                return Ok((Some(4096), None));
            }
            format!("needs units of {alignment} bytes there; --block-size 4096 makes it possible")
        }
        Ok(alignment) => format!("needs units of {alignment} bytes there"),
        Err(error) => format!("is not possible there ({error})"),
    };
    clear_flag(file, OFlag::O_DIRECT)?;
    Ok((None, buffered(wanted.mode, &why)?))
}

/// The note that direct I/O is not used, or the error where it was demanded.
fn buffered(mode: Mode, why: &str) -> Result<Option<String>> {
    match mode {
        Mode::Direct => bail!("direct I/O {why}; leave --direct out to use the page cache"),
        Mode::Auto => Ok(Some(format!("direct I/O {why}; using the page cache"))),
        Mode::Buffered => Ok(None),
    }
}

/// Switches direct I/O on, and returns the alignment it needs.
fn needed_alignment(file: &File) -> Result<u32> {
    let told = sys::direct_alignment(file)?;
    if told.is_some_and(|told| told.offset == 0) {
        bail!("the file system has none");
    }
    set_flags(file, |flags| flags | OFlag::O_DIRECT)
        .map_err(|errno| anyhow!("{}", errno.desc()))?;
    if let Some(told) = told {
        // Buffers begin at a page; a piece of one begins at a multiple of the logical block.
        return Ok(told.offset.max(told.memory));
    }
    // The kernel does not say (before 6.1, and on some file systems): try.
    for alignment in [512u32, 4096] {
        let reader = Reader { file, alignment };
        if reader.aligned(0, alignment as usize).is_ok() {
            return Ok(alignment);
        }
    }
    bail!("reads of 512 and of 4096 bytes failed")
}

/// Reads whole ranges with the alignment that the mode needs.
struct Reader<'a> {
    file: &'a File,
    alignment: u32,
}

impl Reader<'_> {
    /// The first `want` bytes, or the whole file if it is shorter.
    fn up_to(&self, want: usize, file_len: u64) -> io::Result<Vec<u8>> {
        let len = usize::try_from(file_len).map_or(want, |len| want.min(len));
        let mut bytes = self.aligned(0, len)?;
        bytes.truncate(len);
        Ok(bytes)
    }

    /// Exactly an extent, which the header parser found to lie inside the file.
    fn extent(&self, extent: Extent) -> Result<Vec<u8>> {
        let len = usize::try_from(extent.len)?;
        let bytes = self.aligned(extent.offset, len)?;
        if bytes.len() < len {
            bail!("the file ended at byte {}", extent.offset + bytes.len() as u64);
        }
        Ok(bytes)
    }

    /// Up to `len` bytes from `offset` on; less only at the end of the file.
    fn aligned(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let unit = u64::from(self.alignment);
        let skip = usize::try_from(offset % unit).map_err(io::Error::other)?;
        let start = offset - offset % unit;
        let total = (skip + len).next_multiple_of(self.alignment as usize);
        // A direct read goes to an aligned address: room for one page more, to begin at a page.
        let mut memory = vec![0u8; total + PAGE];
        let pad = memory.as_ptr().align_offset(PAGE);
        let room = &mut memory[pad..pad + total];
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
        Ok(room.get(skip..end).unwrap_or_default().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_aligned_reader_returns_what_was_asked_for() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..10_000u32).map(|at| u8::try_from(at % 251).unwrap()).collect();
        file.write_all_at(&bytes, 0).unwrap();
        for alignment in [1, 512, 4096] {
            let reader = Reader { file: &file, alignment };
            assert_eq!(reader.aligned(700, 5000).unwrap(), bytes[700..5700]);
            assert_eq!(reader.aligned(9_990, 100).unwrap(), bytes[9_990..]);
            assert!(reader.aligned(20_000, 100).unwrap().is_empty());
            assert_eq!(reader.up_to(104, 50).unwrap(), bytes[..50]);
        }
    }
}
