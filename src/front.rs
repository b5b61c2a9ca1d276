//! Where a queue's requests come from, and where its replies go to.
//!
//! | front | what it takes |
//! | --- | --- |
//! | single | a command for each request, which takes the reply and waits for the next of its tag |
//! | batch (Linux 7.0) | a command for all replies of a turn, and one that stays and brings tags |
//! | generator | nothing: the requests are made here (`bench`) |
//!
//! A request is with us from the moment that its tag is [`arrived`](Front::arrived) until
//! [`commit`](Front::commit); a batched reply leaves at the end of the turn, with
//! [`send`](Front::send).
//!
//! **The end.** When the device stops or is handed over, the driver aborts what waits for requests:
//! each tag's command, or the one that brings tags. After that no request comes, and the front
//! [is over](Front::is_over) when the last reply is out.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail};
use bytemuck::bytes_of;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::buffer::{Area, Piece};
use crate::errno;
use crate::generator::{Generator, Plan};
use crate::payload::Payload;
use crate::ring::{Io, Ring};
use crate::ublk::{self, BatchCmd, Element, IoCmd, IoDesc};

/// How the driver and the server hand requests to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Delivery {
    /// Many at a time (Linux 7.0).
    Batch,
    /// One at a time.
    Single,
}

impl Delivery {
    /// Its name on the command line and in `list`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::Single => "single",
        }
    }

    /// How a device was added.
    pub fn of(info: &ublk::DevInfo) -> Self {
        if info.flags & ublk::F_BATCH_IO == 0 { Self::Single } else { Self::Batch }
    }
}

/// The character device. It is opened only when the queues may ask for requests: as long as it is
/// open, the driver lets nobody take a device over.
pub type CharDevice = Arc<OnceLock<File>>;

/// What the queues of a device are made for.
#[derive(Clone)]
pub enum Requests {
    /// Those that the driver has for its character device.
    Ublk { device: CharDevice, delivery: Delivery },
    /// Made here.
    Made(Plan),
}

impl Requests {
    /// The character device, if there is one.
    pub fn device(&self) -> Option<CharDevice> {
        match self {
            Self::Ublk { device, .. } => Some(Arc::clone(device)),
            Self::Made(_) => None,
        }
    }
}

/// Whose completion it is.
#[derive(Clone, Copy, Debug)]
pub enum Sent {
    /// A tag's command.
    Fetch(u16),
    /// What makes all tags known to the driver, in this slot.
    Prepared { slot: usize },
    /// The elements in this slot, of so many bytes.
    Committed { slot: usize, bytes: u32 },
}

/// Replies that wait for the end of the turn are copied to one of so many slots. A command is done
/// with its slot when it is submitted, but for what the kernel cannot do at once.
const SLOTS: usize = 4;

/// How many operations of the ring a front has under way at most.
pub fn commands(requests: &Requests, depth: u16) -> u32 {
    match requests {
        Requests::Ublk { delivery: Delivery::Single, .. } => depth.into(),
        // The slots, and the command that takes a submission entry alone.
        Requests::Ublk { .. } => u32::try_from(SLOTS).expect("a few") + 1,
        Requests::Made(_) => 0,
    }
}

/// The front of one queue.
pub enum Front {
    Ublk(Ublk),
    Made(Generator),
}

/// The driver's side of one queue.
pub struct Ublk {
    // Kept open as long as commands may be in flight; closed before the device is deleted.
    device: CharDevice,
    number: u16,
    depth: u16,
    /// Mapped when requests may come.
    descriptors: Option<Area>,
    kind: Kind,
    /// Tags that have come and were not taken yet.
    arrived: VecDeque<u16>,
}

enum Kind {
    /// Tags whose command was not aborted, and whether one was.
    Single {
        open: u16,
        leaving: bool,
    },
    Batch(Batch),
}

struct Batch {
    /// Of each element with what follows it.
    element_bytes: u32,
    elements: Area,
    free: Vec<usize>,
    waiting: Vec<(u16, i32)>,
    /// Whether tags may still come.
    open: bool,
    to_fetch: bool,
}

impl Front {
    /// For `depth` tags of queue `number`, on this ring.
    pub fn new<T>(
        requests: Requests,
        number: u16,
        depth: u16,
        payload: &Payload,
        ring: &mut Ring<T>,
    ) -> Result<Self> {
        let (device, delivery) = match requests {
            Requests::Made(plan) => return Ok(Self::Made(Generator::new(plan, number, depth))),
            Requests::Ublk { device, delivery } => (device, delivery),
        };
        let kind = match delivery {
            Delivery::Single => Kind::Single { open: 0, leaving: false },
            Delivery::Batch => {
                ring.make_inbox(depth).context("making buffers for tags")?;
                Kind::Batch(Batch::new(depth, payload).context("buffers")?)
            }
        };
        let arrived = VecDeque::with_capacity(depth.into());
        Ok(Self::Ublk(Ublk { device, number, depth, descriptors: None, kind, arrived }))
    }

    /// Asks for requests. The character device is open by then.
    ///
    /// The driver hears of all tags of the queue in one system call, and only then are the
    /// descriptors mapped: no request comes before the main thread has started the device. Linux
    /// before 6.15 lets no other process map them once one has, until START_USER_RECOVERY; and it
    /// takes that only where a queue has asked. A server that is killed between the two would leave
    /// a device that nobody can take over.
    pub fn begin<T: From<Sent>>(&mut self, ring: &mut Ring<T>, payload: &Payload) -> Result<()> {
        match self {
            Self::Ublk(ublk) => ublk.begin(ring, payload),
            Self::Made(generator) => {
                generator.begin();
                Ok(())
            }
        }
    }

    /// Something that was sent has completed with this code.
    pub fn completed(&mut self, sent: Sent, code: i32) -> Result<()> {
        match self {
            Self::Ublk(ublk) => ublk.completed(sent, code),
            Self::Made(_) => Ok(()),
        }
    }

    /// After the completions of a turn: takes what has come in batches.
    pub fn collect<T>(&mut self, ring: &mut Ring<T>) -> Result<()> {
        match self {
            Self::Ublk(ublk) => ublk.collect(ring),
            Self::Made(_) => Ok(()),
        }
    }

    /// A tag with a request, if there is another.
    pub fn arrived(&mut self, payload: &Payload) -> Option<u16> {
        match self {
            Self::Ublk(ublk) => ublk.arrived.pop_front(),
            Self::Made(generator) => generator.made(payload),
        }
    }

    /// Whether [`arrived`](Self::arrived) has one already.
    pub fn has_more(&self) -> bool {
        match self {
            Self::Ublk(ublk) => !ublk.arrived.is_empty(),
            Self::Made(generator) => generator.has_more(),
        }
    }

    /// The request of a tag.
    pub fn descriptor(&self, tag: u16) -> IoDesc {
        match self {
            Self::Ublk(Ublk { descriptors, .. }) => {
                let all = descriptors.as_ref().expect("requests come after they were let");
                all.read(usize::from(tag) * size_of::<IoDesc>())
            }
            Self::Made(generator) => generator.descriptor(tag),
        }
    }

    /// The reply to the request of a tag, whose next may come.
    pub fn commit<T: From<Sent>>(
        &mut self,
        tag: u16,
        result: i32,
        ring: &mut Ring<T>,
        payload: &Payload,
    ) {
        match self {
            Self::Ublk(ublk) => ublk.commit(tag, result, ring, payload),
            Self::Made(generator) => generator.replied(tag, result, payload),
        }
    }

    /// At the end of a turn: what was kept for it.
    pub fn send<T: From<Sent>>(&mut self, ring: &mut Ring<T>, payload: &Payload) {
        if let Self::Ublk(ublk) = self {
            ublk.send(ring, payload);
        }
    }

    /// The driver has aborted commands, but not all: those of tags that had a request at that
    /// moment go on to wait for the next, until it is asked again.
    pub fn is_leaving(&self) -> bool {
        matches!(self, Self::Ublk(Ublk { kind: Kind::Single { leaving: true, .. }, .. }))
    }

    /// No request can come any more, and all replies are out; `busy` are still to be replied to.
    pub fn is_over(&self, busy: u16) -> bool {
        match self {
            Self::Ublk(Ublk { kind: Kind::Single { open, .. }, .. }) => *open == 0,
            Self::Ublk(Ublk { kind: Kind::Batch(batch), arrived, .. }) => {
                batch.is_over() && arrived.is_empty() && busy == 0
            }
            Self::Made(generator) => generator.is_over(),
        }
    }
}

impl Ublk {
    fn begin<T: From<Sent>>(&mut self, ring: &mut Ring<T>, payload: &Payload) -> Result<()> {
        match &mut self.kind {
            Kind::Single { open, .. } => {
                *open = self.depth;
                for tag in 0..self.depth {
                    self.single(tag, ublk::IO_FETCH, 0, ring, payload);
                }
            }
            Kind::Batch(batch) => {
                batch.open = true;
                batch.waiting.extend((0..self.depth).map(|tag| (tag, 0)));
                self.batch(ublk::IO_PREPARE_BATCH, ring, payload);
            }
        }
        ring.submit().context("io_uring_enter")?;
        let device = self.device.get().context("the character device is open")?;
        let bytes = usize::from(self.depth) * size_of::<IoDesc>();
        let offset = u64::from(self.number) * ublk::DESC_STRIDE;
        let descriptors = Area::map_shared(device, offset, bytes);
        let what = "mapping the request descriptors of the ublk device";
        self.descriptors = Some(descriptors.context(what)?);
        Ok(())
    }

    fn fd(&self) -> RawFd {
        self.device.get().expect("open since requests may come").as_raw_fd()
    }

    fn completed(&mut self, sent: Sent, code: i32) -> Result<()> {
        let failed = |what: &str| bail!("{what} failed: {}", errno::describe(-code));
        match (&mut self.kind, sent) {
            (Kind::Single { .. }, Sent::Fetch(tag)) if code >= 0 => self.arrived.push_back(tag),
            (Kind::Single { open, leaving }, Sent::Fetch(tag)) => {
                *open -= 1;
                *leaving = true;
                if code != ublk::RES_ABORT {
                    return failed(&format!("a ublk command of tag {tag}"));
                }
            }
            (Kind::Batch(batch), Sent::Prepared { slot }) => {
                if code < 0 {
                    return failed("the ublk command that makes tags ready");
                }
                batch.free.push(slot);
                batch.to_fetch = true;
            }
            (Kind::Batch(batch), Sent::Committed { slot, bytes }) => {
                if code < 0 {
                    return failed("a ublk command with replies");
                }
                if u32::try_from(code) != Ok(bytes) {
                    bail!("the ublk driver took {code} of {bytes} bytes of replies");
                }
                batch.free.push(slot);
            }
            (Kind::Single { .. }, _) | (Kind::Batch(_), Sent::Fetch(_)) => {
                panic!("what completes was sent")
            }
        }
        Ok(())
    }

    fn collect<T>(&mut self, ring: &mut Ring<T>) -> Result<()> {
        let fd = self.device.get().map(AsRawFd::as_raw_fd);
        let Kind::Batch(batch) = &mut self.kind else { return Ok(()) };
        let inbox = ring.inbox().context("a front for batches has an inbox")?;
        self.arrived.extend(inbox.tags());
        if let Some(&tag) = self.arrived.iter().find(|&&tag| tag >= self.depth) {
            bail!("the ublk driver delivered tag {tag}, which does not exist");
        }
        match inbox.ended() {
            None => {}
            Some(ublk::RES_ABORT) => batch.open = false,
            // Out of buffers for a moment.
            Some(code) if code >= 0 || code == -libc::ENOBUFS => batch.to_fetch = true,
            Some(code) => bail!("the ublk command for requests failed: {}", errno::describe(-code)),
        }
        if let Some(fd) = fd.filter(|_| std::mem::take(&mut batch.to_fetch)) {
            let element_bytes = 2;
            let payload = BatchCmd { queue: self.number, element_bytes, ..BatchCmd::default() };
            ring.fetch(fd, ublk::IO_FETCH_BATCH, command(bytes_of(&payload)));
        }
        Ok(())
    }

    fn commit<T: From<Sent>>(
        &mut self,
        tag: u16,
        result: i32,
        ring: &mut Ring<T>,
        payload: &Payload,
    ) {
        match &mut self.kind {
            Kind::Single { .. } => {
                self.single(tag, ublk::IO_COMMIT_AND_FETCH, result, ring, payload);
            }
            Kind::Batch(batch) => batch.waiting.push((tag, result)),
        }
    }

    fn send<T: From<Sent>>(&mut self, ring: &mut Ring<T>, payload: &Payload) {
        if matches!(&self.kind, Kind::Batch(batch) if batch.has_something_to_send()) {
            self.batch(ublk::IO_COMMIT_BATCH, ring, payload);
        }
    }

    fn single<T: From<Sent>>(
        &self,
        tag: u16,
        code: u32,
        result: i32,
        ring: &mut Ring<T>,
        payload: &Payload,
    ) {
        let (addr, register) = payload.to_fetch(tag);
        let payload = IoCmd { queue: self.number, tag, result, addr };
        let (fd, payload) = (self.fd(), command(bytes_of(&payload)));
        let io = Io::Command { fd, code, payload, address: register };
        ring.push(Sent::Fetch(tag).into(), io);
    }

    /// Sends what waits. There must be something, and a free slot.
    fn batch<T: From<Sent>>(&mut self, code: u32, ring: &mut Ring<T>, payload: &Payload) {
        let fd = self.fd();
        let Kind::Batch(batch) = &mut self.kind else { panic!("a front for batches") };
        let slot = batch.free.pop().expect("the caller has looked");
        let count = u16::try_from(batch.waiting.len()).expect("at most a reply for each tag");
        let piece = batch.fill(slot, usize::from(self.depth), payload);
        let cmd = BatchCmd {
            queue: self.number,
            flags: if payload.has_addresses() { ublk::BATCH_HAS_ADDRESS } else { 0 },
            elements: count,
            element_bytes: u8::try_from(batch.element_bytes).expect("8 or 16"),
            ..BatchCmd::default()
        };
        let sent = match code {
            ublk::IO_PREPARE_BATCH => Sent::Prepared { slot },
            _ => Sent::Committed { slot, bytes: piece.len() },
        };
        let (payload, address) = (command(bytes_of(&cmd)), piece.address() as u64);
        ring.push(sent.into(), Io::Command { fd, code, payload, address });
    }
}

impl Batch {
    fn new(depth: u16, payload: &Payload) -> io::Result<Self> {
        let element_bytes = if payload.has_addresses() { 16 } else { 8 };
        Ok(Self {
            element_bytes,
            elements: Area::new(SLOTS * usize::from(depth) * element_bytes as usize)?,
            free: (0..SLOTS).collect(),
            waiting: Vec::with_capacity(depth.into()),
            open: false,
            to_fetch: false,
        })
    }

    fn has_something_to_send(&self) -> bool {
        !self.waiting.is_empty() && !self.free.is_empty()
    }

    fn is_over(&self) -> bool {
        !self.open && self.waiting.is_empty() && self.free.len() == SLOTS
    }

    /// Moves what waits into a slot: where that is.
    fn fill(&mut self, slot: usize, depth: usize, payload: &Payload) -> Piece {
        let bytes = self.element_bytes as usize;
        let start = slot * depth * bytes;
        let mut at = start;
        for (tag, result) in self.waiting.drain(..) {
            let (address, _) = payload.to_fetch(tag);
            let element = Element { tag, register: tag, result };
            self.elements.copy_in(at, bytes_of(&element));
            if payload.has_addresses() {
                self.elements.copy_in(at + size_of::<Element>(), bytes_of(&address));
            }
            at += bytes;
        }
        let len = u32::try_from(at - start).expect("at most 4096 elements of 16 bytes");
        self.elements.piece(start, len)
    }
}

/// The bytes of a command.
fn command(payload: &[u8]) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(payload);
    bytes
}
