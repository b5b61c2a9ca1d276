//! The file beneath an image: which one may be opened, and opening it.
//!
//! The name stands in an image that somebody else may have made, and we run as root: followed
//! blindly it would hand any file of the host to the guest. So a name opens nothing by itself. It
//! must lie beneath the image's own folder, without any way out of it (the kernel sees to that:
//! `openat2` with RESOLVE_BENEATH), be a regular file, and have its format declared: a format is
//! never guessed, since a guest can write a header into a raw disk. So far only raw files serve.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use qcow2::Backing;

use crate::lock;

/// Opens the file beneath `image` for reading, and returns it with its length.
pub fn open(image: &Path, named: &Backing) -> Result<(File, u64)> {
    let shown = String::from_utf8_lossy(&named.name).escape_debug().to_string();
    let name = CString::new(&named.name[..])
        .map_err(|_| anyhow!("the backing file's name {shown:?} has a zero byte"))?;
    match named.format.as_deref() {
        Some(b"raw") => {}
        None => bail!(
            "the format of the backing file {shown:?} is not declared; declare it with \
             'qemu-img rebase -u -b NAME -F FORMAT'"
        ),
        Some(format) => bail!(
            "a backing file of format {:?} is not served (header field backing_file_offset); \
             'qemu-img convert -O qcow2' merges it into one image",
            String::from_utf8_lossy(format)
        ),
    }
    let folder = fs::canonicalize(image)
        .ok()
        .and_then(|path| path.parent().map(Path::to_path_buf))
        .context("cannot find the folder of the image")?;
    let folder = File::open(&folder).context("cannot open the folder of the image")?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = openat2(folder.as_fd(), name.as_c_str(), how).map_err(|errno| match errno {
        Errno::EXDEV => anyhow!(
            "the backing file {shown:?} does not lie beneath the image's own folder; it is not \
             opened, since an image may name any file of this host"
        ),
        Errno::ENOENT => anyhow!("the backing file {shown:?} does not exist"),
        errno => anyhow!("the backing file {shown:?} cannot be opened: {}", errno.desc()),
    })?;
    let file = File::from(file);
    let data = file.metadata().context("cannot look at the backing file")?;
    if !data.is_file() {
        bail!("the backing file {shown:?} is not a regular file");
    }
    lock::take(&file, true).with_context(|| format!("the backing file {shown:?}"))?;
    Ok((file, data.len()))
}
