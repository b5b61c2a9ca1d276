//! Direct or buffered I/O: which one a file gets, and why.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use qcow2::Geometry;

use crate::buffer::PAGE;
use crate::files::Source;
use crate::sys;

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

impl Mode {
    /// That of the options `--direct` and `--buffered`, of which one at most is given.
    pub fn of(direct: bool, buffered: bool) -> Self {
        match (direct, buffered) {
            (true, _) => Self::Direct,
            (_, true) => Self::Buffered,
            _ => Self::Auto,
        }
    }
}

/// Decides between direct and buffered I/O for a device with logical blocks of `block` bytes, and
/// switches the open file. Buffered comes with a note for the user.
pub fn choose(source: &mut Source, mode: Mode, block: u32) -> Result<Option<String>> {
    if mode == Mode::Buffered {
        return Ok(None);
    }
    let why = match needed_alignment(&source.file) {
        Ok(alignment) if alignment <= 512 => {
            source.alignment = 512;
            return Ok(None);
        }
        Ok(alignment) if alignment <= 4096 => {
            if block >= 4096 {
                source.alignment = 4096;
                return Ok(None);
            }
            format!("needs units of {alignment} bytes there; --block-size 4096 makes it possible")
        }
        Ok(alignment) => format!("needs units of {alignment} bytes there"),
        Err(error) => format!("is not possible there ({error})"),
    };
    give_up(source, mode, &why)
}

/// The same once the image is known: what has a mapping of its own may lie anywhere, and is read
/// and written by itself. That is a cluster, or with extended L2 entries a subcluster.
pub fn fit(source: &mut Source, mode: Mode, geometry: Geometry) -> Result<Option<String>> {
    if u64::from(source.alignment) <= geometry.unit_size() {
        return Ok(None);
    }
    let what = if geometry.has_extended_l2() { "subclusters" } else { "clusters" };
    give_up(source, mode, &format!("needs {what} of 4096 bytes or more there"))
}

/// Uses the page cache: a note that direct I/O is not used, or the error where it was demanded.
fn give_up(source: &mut Source, mode: Mode, why: &str) -> Result<Option<String>> {
    clear_flag(&source.file, OFlag::O_DIRECT)?;
    source.alignment = 1;
    match mode {
        Mode::Direct => bail!("direct I/O {why}; leave --direct out to use the page cache"),
        Mode::Auto => Ok(Some(format!("direct I/O {why}; using the page cache"))),
        Mode::Buffered => Ok(None),
    }
}

/// Takes a flag off an open file.
pub fn clear_flag(file: &File, flag: OFlag) -> Result<()> {
    set_flags(file, |flags| flags & !flag).context("changing the mode of the open file")
}

fn set_flags(file: &File, change: impl Fn(OFlag) -> OFlag) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(change(flags))).map(drop)
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
    let mut memory = vec![0u8; 2 * PAGE];
    let pad = memory.as_ptr().align_offset(PAGE);
    for alignment in [512, 4096] {
        if file.read_at(&mut memory[pad..pad + alignment], 0).is_ok() {
            return Ok(u32::try_from(alignment)?);
        }
    }
    bail!("reads of 512 and of 4096 bytes failed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2::Header;

    /// Of an image with clusters of this size.
    fn geometry(cluster: u32, extended_l2: bool) -> Geometry {
        let mut bytes = vec![0; cluster as usize];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        bytes[23] = u8::try_from(cluster.trailing_zeros()).unwrap();
        // The virtual size, which one L1 entry is enough for, and the tables.
        (bytes[30], bytes[39], bytes[59]) = (2, 1, 1);
        for at in [40, 48] {
            bytes[at..at + 8].copy_from_slice(&u64::from(cluster).to_be_bytes());
        }
        bytes[79] = if extended_l2 { 16 } else { 0 };
        (bytes[99], bytes[103]) = (4, 104);
        Header::parse(&bytes, 1 << 30, true).unwrap().geometry()
    }

    #[test]
    fn subclusters_are_the_least_that_direct_io_has_to_reach() {
        let fits = |alignment, cluster, extended_l2, mode| {
            let file = tempfile::tempfile().unwrap();
            let mut source = Source::new(file, true).unwrap();
            source.alignment = alignment;
            let note = fit(&mut source, mode, geometry(cluster, extended_l2));
            note.map(|note| (note.is_none(), source.is_direct()))
        };
        let auto = |alignment, cluster, l2| fits(alignment, cluster, l2, Mode::Auto).unwrap();
        assert_eq!(auto(4096, 4 << 10, false), (true, true));
        assert_eq!(auto(4096, 2 << 10, false), (false, false));
        assert_eq!(auto(512, 16 << 10, true), (true, true));
        assert_eq!(auto(4096, 64 << 10, true), (false, false));
        assert_eq!(auto(4096, 128 << 10, true), (true, true));
        let error = fits(4096, 64 << 10, true, Mode::Direct).unwrap_err();
        assert!(error.to_string().contains("subclusters"), "{error}");
    }
}
