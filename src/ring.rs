//! io_uring behind a typed slab: the only place that knows `user_data`. (One of the four files
//! with `unsafe`.)
//!
//! Every operation in flight holds one slot of the slab, and a slot's number is the operation's
//! `user_data`. There are two other values: a poke by another ring ([`Io::Poke`]), of which one at
//! a time is under way, and the one command with many completions, which brings tags to the
//! [`Inbox`]; of those no more are waiting than that has buffers. Any other operation has exactly
//! one completion, and the submission queue has at least as many entries as the slab has slots. So
//! neither queue can overflow, and nothing is ever refused or lost: the owner of a ring gives it as
//! many slots as it has operations.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};

use crate::buffer::Piece;
use crate::inbox::{self, Inbox};
use crate::ublk;

/// The largest submission queue the kernel makes.
pub const MAX_ENTRIES: u32 = 32768;

/// An operation as the driver names it.
#[derive(Clone, Copy, Debug)]
pub enum Io {
    /// Bytes of the file into memory.
    Read { fd: RawFd, to: Piece, offset: u64 },
    /// Memory into the file.
    Write { fd: RawFd, from: Piece, offset: u64 },
    /// Bytes of the file into a registered buffer, from its byte `at` on.
    ReadFixed { fd: RawFd, to: Registered, offset: u64 },
    /// Bytes of a registered buffer into the file.
    WriteFixed { fd: RawFd, from: Registered, offset: u64 },
    /// fdatasync.
    Sync { fd: RawFd },
    /// fallocate with this mode; 0: allocate and lengthen.
    Allocate { fd: RawFd, mode: i32, offset: u64, len: u64 },
    /// ftruncate.
    Truncate { fd: RawFd, len: u64 },
    /// A ublk I/O command on the character device: its payload, and its address or what it has in
    /// the place of one.
    Command { fd: RawFd, code: u32, payload: [u8; 16], address: u64 },
    /// Wakes the owner of another ring, for whom [`Ring::turn`] returns true.
    Poke { ring: RawFd },
    /// Completes (with ETIME) after [`TICK`].
    Timer,
}

/// A range of a buffer that was registered with the ring, by its number: the pages of a request.
#[derive(Clone, Copy, Debug)]
pub struct Registered {
    pub index: u16,
    pub at: u32,
    pub len: u32,
}

/// The `user_data` of a poke by another ring. No slot has such a number.
const POKE: u64 = u64::MAX;
/// That of the command which brings tags, and the number of its group of buffers.
const FETCH: u64 = u64::MAX - 1;
const GROUP: u16 = 0;

/// The period of [`Io::Timer`].
pub const TICK: Duration = Duration::from_millis(500);

/// A ring, and what is in flight on it.
pub struct Ring<T> {
    // The ring is dropped first: what it still runs touches only memory that is never unmapped.
    ring: IoUring,
    slots: Vec<Option<T>>,
    free: Vec<u32>,
    inbox: Option<Inbox>,
    tick: Box<Timespec>,
    can_truncate: bool,
}

impl<T> Ring<T> {
    /// A ring for `capacity` operations at a time, to be used by this thread alone.
    pub fn new(capacity: u32) -> io::Result<Self> {
        assert!((1..=MAX_ENTRIES).contains(&capacity), "a ring has 1 to 32768 entries");
        let ring = build(capacity.next_power_of_two())?;
        assert!(ring.params().sq_entries() >= capacity, "one submission entry for each slot");
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        Ok(Self {
            ring,
            slots: (0..capacity).map(|_| None).collect(),
            free: (0..capacity).rev().collect(),
            inbox: None,
            tick: Box::new(Timespec::from(TICK)),
            can_truncate: probe.is_supported(opcode::Ftruncate::CODE),
        })
    }

    /// Makes a table of `count` buffers, which the ublk driver fills with the pages of requests.
    pub fn register_buffers(&self, count: u16) -> io::Result<()> {
        self.ring.submitter().register_buffers_sparse(count.into())
    }

    /// Makes buffers for the tags of requests that come in batches.
    pub fn make_inbox(&mut self, depth: u16) -> io::Result<()> {
        let inbox = Inbox::new(depth)?;
        let submitter = self.ring.submitter();
        // SAFETY: an inbox lies in areas, which are never unmapped.
        unsafe {
            submitter.register_buf_ring_with_flags(inbox.address(), inbox::BUFFERS, GROUP, 0)
        }?;
        self.inbox = Some(inbox);
        Ok(())
    }

    /// What has come in batches, if there is an inbox.
    pub fn inbox(&mut self) -> Option<&mut Inbox> {
        self.inbox.as_mut()
    }

    /// Queues the command that brings tags to the inbox; only one may be under way. It takes a
    /// submission entry, which the owner leaves to it, and no slot.
    pub fn fetch(&mut self, fd: RawFd, code: u32, payload: [u8; 16]) {
        let entry = opcode::UringCmd16::new(Fd(fd), code).cmd(payload).build();
        let entry = multishot(entry).user_data(FETCH);
        // SAFETY: the buffers are those of the inbox.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the owner leaves a submission entry to this");
    }

    /// Keeps a file open until the last operation of this ring has ended, also after the process.
    pub fn hold(&self, fd: RawFd) -> io::Result<()> {
        self.ring.submitter().register_files(&[fd])
    }

    /// The descriptor for [`Io::Poke`].
    pub fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Whether the kernel has [`Io::Truncate`] (6.9).
    pub fn can_truncate(&self) -> bool {
        self.can_truncate
    }

    /// Queues an operation for the next [`turn`](Self::turn). There must be a free slot.
    pub fn push(&mut self, token: T, io: Io) {
        let slot = self.free.pop().expect("the owner counts its operations");
        let index = usize::try_from(slot).expect("a slot number is an index");
        assert!(self.slots[index].is_none(), "a free slot is empty");
        self.slots[index] = Some(token);
        let entry = self.entry(io).user_data(u64::from(slot));
        // SAFETY: buffers in `entry` are `Piece`s, which are never unmapped and to which no Rust
        // reference exists, or ranges of registered buffers, which the kernel checks; the timer's
        // value lives in a box that outlives the submission.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "there are as many submission entries as slots");
    }

    /// Submits what was pushed, waits for at least one completion, and appends all there are.
    /// Returns whether another ring has poked this one.
    pub fn turn(&mut self, done: &mut Vec<(T, i32)>) -> io::Result<bool> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => {}
            // Interrupted or short of memory for a moment: what is there is handled, then again.
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(error),
        }
        let mut poked = false;
        for completion in self.ring.completion() {
            match completion.user_data() {
                POKE => {
                    poked = true;
                    continue;
                }
                FETCH => {
                    let (result, flags) = (completion.result(), completion.flags());
                    let inbox = self.inbox.as_mut().expect("it was fetched into");
                    inbox.take(result, cqueue::buffer_select(flags), cqueue::more(flags));
                    continue;
                }
                _ => {}
            }
            let index = usize::try_from(completion.user_data()).expect("ours: a slot number");
            let token = self.slots[index].take().expect("one completion for each operation");
            self.free.push(u32::try_from(index).expect("ours: a slot number"));
            done.push((token, completion.result()));
        }
        Ok(poked)
    }

    /// Whose operations are in flight.
    pub fn in_flight(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().flatten()
    }

    /// Submits what was pushed and waits for nothing.
    pub fn submit(&mut self) -> io::Result<()> {
        self.ring.submit().map(drop)
    }

    fn entry(&self, io: Io) -> squeue::Entry {
        match io {
            Io::Read { fd, to, offset } => {
                opcode::Read::new(Fd(fd), to.address(), to.len()).offset(offset).build()
            }
            Io::Write { fd, from, offset } => {
                opcode::Write::new(Fd(fd), from.address(), from.len()).offset(offset).build()
            }
            Io::ReadFixed { fd, to, offset } => {
                let Registered { index, at, len } = to;
                opcode::ReadFixed::new(Fd(fd), at as usize as *mut u8, len, index)
                    .offset(offset)
                    .build()
            }
            Io::WriteFixed { fd, from, offset } => {
                let Registered { index, at, len } = from;
                opcode::WriteFixed::new(Fd(fd), at as usize as *const u8, len, index)
                    .offset(offset)
                    .build()
            }
            Io::Sync { fd } => opcode::Fsync::new(Fd(fd)).flags(FsyncFlags::DATASYNC).build(),
            Io::Allocate { fd, mode, offset, len } => {
                opcode::Fallocate::new(Fd(fd), len).offset(offset).mode(mode).build()
            }
            Io::Truncate { fd, len } => opcode::Ftruncate::new(Fd(fd), len).build(),
            Io::Command { fd, code, payload, address } => {
                opcode::UringCmd16::new(Fd(fd), code).cmd(payload).addr(Some(address)).build()
            }
            Io::Poke { ring } => opcode::MsgRingData::new(Fd(ring), 0, POKE, None).build(),
            Io::Timer => opcode::Timeout::new(&raw const *self.tick).build(),
        }
    }
}

/// A command that may complete many times, each time into a buffer of the group. (The crate has no
/// words for these two fields.)
fn multishot(entry: squeue::Entry) -> squeue::Entry {
    const FLAGS_AT: usize = 28;
    const GROUP_AT: usize = 40;
    const MULTISHOT: u32 = 1 << 1;
    let mut entry = entry.flags(squeue::Flags::BUFFER_SELECT);
    let start = (&raw mut entry).cast::<u8>();
    // SAFETY: an entry is the kernel's structure of plain numbers, in which these two lie, aligned.
    unsafe {
        start.add(FLAGS_AT).cast::<u32>().write(MULTISHOT);
        start.add(GROUP_AT).cast::<u16>().write(GROUP);
    }
    entry
}

const _: () = assert!(size_of::<squeue::Entry>() == 64 && align_of::<squeue::Entry>() == 8);

fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME))
}

/// The best ring this kernel makes: completions run only when this thread asks for them.
fn build(entries: u32) -> io::Result<IoUring> {
    let mut last = None;
    for attempt in 0..3 {
        let mut builder = IoUring::builder();
        builder.dontfork();
        if attempt == 0 {
            builder.setup_single_issuer().setup_defer_taskrun();
        }
        if attempt <= 1 {
            builder.setup_coop_taskrun();
        }
        match builder.build(entries) {
            Ok(ring) => return Ok(ring),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EINVAL)))
}

/// A small ring with wide entries for control commands, one at a time.
pub struct ControlRing(IoUring<squeue::Entry128, cqueue::Entry>);

impl ControlRing {
    /// A fresh ring.
    pub fn new() -> io::Result<Self> {
        Ok(Self(IoUring::builder().dontfork().build(4)?))
    }

    /// Sends one command and waits for its result, however long that takes.
    pub fn command(&mut self, fd: RawFd, code: u32, payload: &ublk::CtrlCmd) -> io::Result<i32> {
        let mut bytes = [0; 80];
        bytes[..size_of::<ublk::CtrlCmd>()].copy_from_slice(bytemuck::bytes_of(payload));
        let entry = opcode::UringCmd80::new(Fd(fd), code).cmd(bytes).build();
        // SAFETY: the address in the payload is that of an area, which is never unmapped.
        let pushed = unsafe { self.0.submission().push(&entry) };
        assert!(pushed.is_ok(), "commands are sent one at a time");
        loop {
            match self.0.submitter().submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
            if let Some(completion) = self.0.completion().next() {
                return Ok(completion.result());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Area;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_poked_ring_wakes_up_and_has_nothing_in_flight() {
        let (mut one, mut other) = (Ring::new(1).unwrap(), Ring::<()>::new(1).unwrap());
        let (mut done, mut none) = (Vec::new(), Vec::new());
        one.push((), Io::Poke { ring: other.fd() });
        assert!(!one.turn(&mut done).unwrap());
        assert_eq!(done, [((), 0)]);
        assert!(other.turn(&mut none).unwrap() && none.is_empty());
    }

    #[test]
    fn bytes_written_are_read_back_and_slots_are_given_back() {
        let file = tempfile::tempfile().unwrap();
        let fd = file.as_raw_fd();
        let area = Area::new(8192).unwrap();
        area.copy_in(0, b"hello");
        let mut ring = Ring::new(2).unwrap();
        let mut done = Vec::new();
        ring.push("write", Io::Write { fd, from: area.piece(0, 5), offset: 3 });
        ring.turn(&mut done).unwrap();
        assert_eq!(done.pop(), Some(("write", 5)));
        ring.push("read", Io::Read { fd, to: area.piece(4096, 100), offset: 0 });
        ring.push("sync", Io::Sync { fd });
        assert!(ring.free.is_empty());
        while done.len() < 2 {
            ring.turn(&mut done).unwrap();
        }
        assert!(done.contains(&("read", 8)) && done.contains(&("sync", 0)));
        let mut bytes = [0; 8];
        area.copy_out(4096, &mut bytes);
        assert_eq!(&bytes, b"\0\0\0hello");
    }
}
