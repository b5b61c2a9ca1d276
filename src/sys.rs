//! System calls that no crate of ours wraps safely. (One of the four files with `unsafe`.)

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::{ForkResult, Pid};

/// What the file system says about direct I/O on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlignment {
    /// What buffer addresses have to be a multiple of.
    pub memory: u32,
    /// What offsets and lengths have to be a multiple of. Zero: no direct I/O.
    pub offset: u32,
}

/// The alignment that direct I/O on `file` needs, or `None` where the kernel or the file system
/// does not say (before 6.1, tmpfs).
pub fn direct_alignment(file: &File) -> io::Result<Option<DirectAlignment>> {
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, which with AT_EMPTY_PATH names the descriptor
    // itself; `status` is as large as the kernel's structure.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            status.as_mut_ptr(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all bytes were zero before the call, which is a valid value of a plain C structure.
    let status = unsafe { status.assume_init() };
    if status.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(None);
    }
    Ok(Some(DirectAlignment {
        memory: status.stx_dio_mem_align,
        offset: status.stx_dio_offset_align,
    }))
}

/// Marks this thread, and every thread it starts, as one that memory reclaim may wait for: its own
/// allocations must not wait for writes to the device that it serves. Needs CAP_SYS_RESOURCE.
pub fn become_io_flusher() -> io::Result<()> {
    // The number is part of the kernel's interface; libc names it for other targets only.
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: takes plain numbers and changes only flags of the calling thread.
    match unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets this thread run on these CPUs only.
pub fn run_on(cpus: &[usize]) -> nix::Result<()> {
    let mut set = CpuSet::new();
    for &cpu in cpus.iter().filter(|cpu| **cpu < CpuSet::count()) {
        set.set(cpu)?;
    }
    sched_setaffinity(Pid::from_raw(0), &set)
}

/// Large pieces of memory come from the system one by one, so that they go back there when they are
/// freed. (By itself the allocator takes them from its heap once one was freed.)
pub fn return_large_memory() {
    // SAFETY: takes plain numbers; no other thread allocates yet.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10) };
}

/// Gives memory that was freed back to the system.
pub fn trim_memory() {
    // SAFETY: takes a plain number; the allocator does its own locking.
    unsafe { libc::malloc_trim(0) };
}

/// What the kernel says of this process, for [`fork`]: to be opened where there is a `/proc`.
pub fn own_status() -> io::Result<File> {
    File::open("/proc/self/status")
}

/// Splits the process in two. EAGAIN where it has more than one thread by its status, or there is
/// no telling.
pub fn fork(status: &File) -> nix::Result<ForkResult> {
    let mut bytes = vec![0; 8192];
    let len = status.read_at(&mut bytes, 0).unwrap_or(0);
    let mut lines = bytes[..len].split(|&byte| byte == b'\n');
    if !lines.any(|line| line == b"Threads:\t1") {
        return Err(Errno::EAGAIN);
    }
    // SAFETY: only this thread exists, so no lock can be held by one that the child does not have.
    unsafe { nix::unistd::fork() }
}

/// Ends a child made by [`fork`] at once: what its parent wants done at the end is not its own.
pub fn leave() -> ! {
    // SAFETY: ends the process, whatever its state.
    unsafe { libc::_exit(0) }
}

/// A descriptor that names exactly this process, even after its number is used again. Readable
/// once the process has ended.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens it; ESRCH if there is no such process.
    pub fn open(pid: Pid) -> io::Result<Self> {
        // SAFETY: takes plain numbers and returns a new descriptor, or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made this descriptor for us, nothing else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sends SIGTERM to the process.
    pub fn terminate(&self) -> io::Result<()> {
        let no_info: *const libc::siginfo_t = std::ptr::null();
        // SAFETY: the descriptor is ours; without signal information the kernel fills in its own.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                libc::SIGTERM,
                no_info,
                0,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Whether the process ended within `limit`.
    pub fn ended_within(&self, limit: Duration) -> io::Result<bool> {
        let mut set = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        match poll(&mut set, limit) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// The size of a block device in bytes.
pub fn block_device_size(file: &File) -> io::Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 to the pointer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) };
    if result == 0 { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

/// `_IOR(0x12, 114, size_t)` on a 64-bit machine.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

/// Ignores SIGHUP, and SIGXFSZ: a write beyond RLIMIT_FSIZE fails with EFBIG instead of killing.
/// And SIGCHLD, so that nobody has to wait for couriers that have ended.
pub fn ignore_signals() {
    // SAFETY: ignoring a signal installs no handler.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
    }
}

/// Closes every descriptor from 3 on, except those in `keep`. Only right after a fork, where no
/// owner of a descriptor is used any more but of those that are kept.
pub fn close_all_but(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<_> = keep.iter().filter_map(|&fd| libc::c_uint::try_from(fd).ok()).collect();
    keep.sort_unstable();
    let mut first = 3;
    for end in keep.into_iter().chain([libc::c_uint::MAX]) {
        // The last one is no descriptor, so it does not matter that it stays.
        if first < end {
            // SAFETY: see above; the range has none that is used.
            if unsafe { libc::close_range(first, end - 1, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = end.saturating_add(1).max(first);
    }
    Ok(())
}
