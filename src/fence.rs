//! The fence between a dead server and its successor.
//!
//! A process that is killed leaves its rings to the kernel, which takes them apart later: what they
//! had in flight may still reach the image when the successor is already reading it. So a server
//! holds the lock of a file, through one open file that is also registered with each of its rings.
//! A ring lets go of it with its last operation; only then can the successor have the lock.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::state;

/// How long operations of a dead server may take to end.
const LIMIT: Duration = Duration::from_secs(30);

/// The lock, held.
pub struct Fence(Flock<File>);

impl Fence {
    /// Waits until no operation of an earlier server is in flight, and keeps later ones out.
    pub fn take(id: u32) -> Result<Self> {
        state::make_folder()?;
        let path = state::path(id, "fence");
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file =
            options.open(&path).with_context(|| format!("opening {}", path.display()))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Self(lock)),
                Err((again, Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                    file = again;
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err((_, Errno::EWOULDBLOCK)) => bail!(
                    "operations of the last server of device {id} are still under way after {} s, \
                     or another `recover` is; try again when the storage of the image answers",
                    LIMIT.as_secs()
                ),
                Err((_, errno)) => {
                    return Err(errno).with_context(|| format!("locking {}", path.display()));
                }
            }
        }
    }

    /// For registering with a ring.
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
