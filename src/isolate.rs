//! What keeps the server from waiting for itself, and others from waiting for it.
//!
//! - **Memory.** All of it is locked as it is touched, and the out-of-memory killer looks
//!   elsewhere: a server that has to be swapped in from its own device would wait for ever.
//! - **Mounts.** The server's own mount namespace has nothing but an empty root with the folder of
//!   states and `/dev`. With the host's mounts in it, a file system on our own device would stay in
//!   use by us until we end, and others of the host would be pinned. (A private copy keeps what was
//!   mounted at its making, a slave one receives the mount of our own device; so none is kept.)
//!
//! The image and all that belongs to it are held by descriptors that were opened before.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::unistd::{chdir, fchdir, pivot_root};

use crate::state;

/// Locks all memory, that which is there and that which will be, as it is touched.
fn lock_memory() -> Result<()> {
    // As long as nothing is touched nothing is taken: buffers are for the worst case.
    let on_fault = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | on_fault)
        .context("locking the server's memory (mlockall; CAP_IPC_LOCK is needed)")
}

/// Asks the out-of-memory killer to spare this process: with it goes a disk.
fn avoid_oom_killer() -> Result<()> {
    fs::write("/proc/self/oom_score_adj", "-1000").context("writing /proc/self/oom_score_adj")
}

/// All of this, for a device that others may depend on. A device of a user gets none: it takes
/// rights that only root has.
pub fn keep_resident() -> Result<()> {
    avoid_oom_killer()?;
    lock_memory()
}

/// Leaves the host's mounts. To be called while there is one thread, with all files open. Stays
/// with them where the root cannot be left behind: in a chroot, and in an initial RAM disk.
pub fn leave_mounts() -> Result<()> {
    state::make_folder()?;
    if !root_can_be_left(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()) {
        tracing::warn!("no mount namespace of its own: the root is no mount that can be left");
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
    // In the new namespace: a mount of the old one cannot be bound here.
    let mut keep = vec![(folder(state::FOLDER)?, PathBuf::from(state::FOLDER))];
    keep.push((folder("/dev")?, "/dev".into()));
    // The service manager waits to hear from us; an abstract socket needs no path.
    let socket = env::var_os("NOTIFY_SOCKET").map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(path) = socket {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path);
        keep.push((file.with_context(|| format!("opening {}", path.display()))?, path));
    }
    let none: Option<&str> = None;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).context("making the mounts private")?;

    // The new root covers the folder of states, which any machine has that we run on.
    let root = state::FOLDER;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("ublk-qcow2"), root, Some("tmpfs"), flags, Some("size=64k,mode=755"))
        .context("mounting an empty root")?;
    for (file, place) in &keep {
        bind(file, place, Path::new(root))
            .with_context(|| format!("mounting {}", place.display()))?;
    }
    let new = folder(root)?;
    fchdir(new.as_fd()).context("fchdir")?;
    // Both at the same place: the old root is on top of the new one then, and is taken off.
    pivot_root(".", ".").context("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).context("leaving the old root")?;
    chdir("/").context("chdir")?;
    let read_only = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, "/", none, read_only, none).context("making the root read-only")
}

/// Whether `pivot_root` can work, from `/proc/self/mountinfo`: proc_pid_mountinfo(5). Where that
/// cannot be read it will be seen.
fn root_can_be_left(mounts: &str) -> bool {
    // ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS... - TYPE SOURCE ...
    let at_root = mounts.lines().rfind(|line| line.split(' ').nth(4) == Some("/"));
    match at_root.and_then(|line| line.split_once(" - ")) {
        Some((_, kind)) => !kind.starts_with("rootfs "),
        None => mounts.is_empty(),
    }
}

/// Makes an open folder or socket appear at its place below `root`.
fn bind(file: &File, place: &Path, root: &Path) -> Result<()> {
    let to = root.join(place.strip_prefix("/")?);
    if file.metadata()?.is_dir() {
        fs::create_dir_all(&to)?;
    } else {
        fs::create_dir_all(to.parent().context("a socket lies in a folder")?)?;
        File::create(&to)?;
    }
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    let none: Option<&str> = None;
    Ok(mount(Some(from.as_str()), &to, none, MsFlags::MS_BIND, none)?)
}

fn folder(path: &str) -> Result<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY);
    options.open(path).with_context(|| format!("opening {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chroot_and_an_initial_ram_disk_are_no_root_to_leave() {
        let disk = "21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n";
        let ram = "1 1 0:2 / / rw - rootfs rootfs rw\n";
        let proc = "23 21 0:21 / /proc rw,nosuid - proc proc rw\n";
        assert!(root_can_be_left(&format!("{disk}{proc}")));
        assert!(root_can_be_left(&format!("{ram}{proc}{disk}")));
        assert!(!root_can_be_left(&format!("{ram}{proc}")));
        assert!(!root_can_be_left(proc));
        assert!(root_can_be_left(""));
    }
}
