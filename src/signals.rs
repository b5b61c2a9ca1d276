//! SIGINT and SIGTERM as something to poll.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// SIGINT and SIGTERM, blocked for every thread that starts from here on.
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals and takes them over.
    pub fn take_over() -> Result<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGINT);
        set.add(Signal::SIGTERM);
        set.thread_block().context("blocking signals")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self(SignalFd::with_flags(&set, flags).context("signalfd")?))
    }

    /// Whether one came since the last call.
    pub fn came(&self) -> bool {
        matches!(self.0.read_signal(), Ok(Some(_)))
    }

    /// Readable when one came.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
