//! The loop: guest requests in, operations out, completions in, replies out.
//!
//! One thread, one ring, one `io_uring_enter` per turn. A turn takes every completion there is
//! (a ublk command brings a request, a file operation an outcome), then drains the engine:
//! operations become submissions, replies become COMMIT_AND_FETCH. Nothing blocks but the ring;
//! compressed clusters are inflated by other threads, which wake the ring through an eventfd.
//!
//! The device's end reaches this loop as aborted fetches: when every tag is aborted no request can
//! come any more, and the engine is closed. So the loop ends the same way whoever stopped the
//! device: our own main thread, `del`, or another tool.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use qcow2::{Engine, Health, Reply, Request};

use crate::buffer::Area;
use crate::driver::{Driver, Flight, Step, TagBuffers};
use crate::errno;
use crate::files::Files;
use crate::link::{Event, QueueEnd, Report};
use crate::ring::{Io, MAX_ENTRIES, Ring};
use crate::ublk;

/// Our only queue, until requests of one image can be spread over several.
const QUEUE: u16 = 0;

/// What the thread is given.
pub struct Setup {
    pub engine: Engine,
    pub files: Files,
    pub char_device: File,
    pub depth: u16,
    /// Bytes of the largest request.
    pub max_request: u32,
    /// Bytes of the block device: no request reaches beyond.
    pub device_size: u64,
    /// Bytes of a logical block.
    pub block: u32,
}

/// Whose completion it is.
enum Token {
    Fetch(u16),
    File(Flight),
    Timer,
    Wake,
    Inflated,
}

/// Where a tag is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tag {
    /// Not fetched yet, or aborted: no request can come.
    Closed,
    /// With the kernel.
    Fetching,
    /// With the engine; the reply of success is this number.
    Busy(i32),
}

/// Timer, wake-up by the main thread, wake-up by the pool.
const OWN_OPERATIONS: u32 = 3;

struct Queue {
    ring: Ring<Token>,
    driver: Driver,
    engine: Engine,
    link: QueueEnd,
    char_fd: RawFd,
    descriptors: Area,
    wake: Area,
    inflated: Area,
    tags: Vec<Tag>,
    open_tags: u16,
    /// File operations in flight and their limit.
    flights: u32,
    max_flights: u32,
    max_request: u32,
    device_size: u64,
    block: u32,
    begin: Instant,
    done: Vec<(Token, i32)>,
    // Kept open as long as commands may be in flight; closed before the device is deleted.
    _char_device: File,
}

/// The queue thread: serves until the device has stopped, then closes the image. Tells the result
/// through `link`.
pub fn run(setup: Setup, link: QueueEnd) {
    let result = match Queue::new(setup, link) {
        Err((error, link)) => (Err(error), link),
        Ok(mut queue) => {
            let result = queue.serve();
            queue.publish();
            // Dropping the rest of the queue closes the ring and the character device.
            (result, queue.link)
        }
    };
    let (result, link) = result;
    link.tell(Event::Ended(result.map_err(|error| format!("{error:#}"))));
}

impl Queue {
    fn new(setup: Setup, link: QueueEnd) -> Result<Self, (anyhow::Error, QueueEnd)> {
        let wake_fd = link.wake_fd();
        match Parts::new(&setup).and_then(|parts| parts.queue(setup)) {
            Ok(make) => {
                let mut queue = make(link);
                queue.ring.push(Token::Timer, Io::Timer);
                queue.ring.push(Token::Wake, wake_read(wake_fd, &queue.wake));
                let pool_fd = queue.driver.pool_fd();
                queue.ring.push(Token::Inflated, wake_read(pool_fd, &queue.inflated));
                Ok(queue)
            }
            Err(error) => Err((error, link)),
        }
    }

    fn serve(&mut self) -> Result<()> {
        while !self.engine.is_ready() {
            self.check("preparing the image")?;
            if self.link.stop_wanted() {
                bail!("stopped before the image was ready");
            }
            self.turn()?;
        }
        self.check("preparing the image")?;
        self.publish();
        for tag in 0..self.depth() {
            self.fetch(tag, ublk::IO_FETCH, 0);
        }
        self.open_tags = self.depth();
        self.link.tell(Event::Ready);

        while self.open_tags > 0 {
            self.turn()?;
        }
        // Every request was replied to, and none can come: the image can be closed.
        self.engine.close();
        while !self.engine.is_closed() {
            self.turn()?;
        }
        self.check("closing the image")
    }

    fn check(&self, what: &str) -> Result<()> {
        match self.engine.health() {
            Health::Good => Ok(()),
            Health::Failed(failure) => Err(anyhow!("{what}: {failure}")),
        }
    }

    fn depth(&self) -> u16 {
        u16::try_from(self.tags.len()).expect("the depth is a u16")
    }

    /// One turn of the loop.
    fn turn(&mut self) -> Result<()> {
        self.pump();
        while let Some(incident) = self.engine.next_incident() {
            tracing::error!("{incident}");
        }
        let mut done = std::mem::take(&mut self.done);
        let result = self.ring.turn(&mut done).context("io_uring_enter");
        for (token, code) in done.drain(..) {
            match token {
                Token::File(flight) => self.file_completed(flight, code),
                Token::Fetch(tag) => self.fetched(tag, code)?,
                Token::Timer => {
                    self.engine.tick(self.now());
                    self.publish();
                    self.ring.push(Token::Timer, Io::Timer);
                }
                Token::Wake => {
                    self.publish();
                    self.ring.push(Token::Wake, wake_read(self.link.wake_fd(), &self.wake));
                }
                Token::Inflated => {
                    let Self { driver, engine, flights, .. } = self;
                    driver.inflated(|op, outcome| {
                        *flights -= 1;
                        engine.complete(op.id, outcome);
                    });
                    let pool_fd = driver.pool_fd();
                    self.ring.push(Token::Inflated, wake_read(pool_fd, &self.inflated));
                }
            }
        }
        self.done = done;
        result
    }

    /// Drains the engine: operations to the ring, replies to the kernel.
    fn pump(&mut self) {
        loop {
            let mut idle = true;
            // What does not fit stays in the engine until completions make room.
            while self.flights < self.max_flights {
                let Some(op) = self.engine.next_op(QUEUE) else { break };
                idle = false;
                let step = self.driver.start(&self.engine, op);
                self.apply(step, 1);
            }
            while let Some(reply) = self.engine.next_reply(QUEUE) {
                idle = false;
                self.reply(reply);
            }
            if idle {
                return;
            }
        }
    }

    /// Carries out a step of an operation that adds `new` to those in flight if it is submitted.
    fn apply(&mut self, step: Step, new: u32) {
        match step {
            Step::Submit(flight, io) => {
                self.flights += new;
                self.ring.push(Token::File(flight), io);
            }
            Step::Pooled => self.flights += new,
            Step::Ended(op, outcome) => {
                self.flights -= 1 - new;
                self.engine.complete(op.id, outcome);
            }
        }
    }

    fn file_completed(&mut self, flight: Flight, code: i32) {
        let step = self.driver.next(&mut self.engine, flight, code);
        self.apply(step, 0);
    }

    fn fetched(&mut self, tag: u16, code: i32) -> Result<()> {
        let index = usize::from(tag);
        if code < 0 {
            self.tags[index] = Tag::Closed;
            self.open_tags -= 1;
            if code != ublk::RES_ABORT {
                bail!("a ublk command of tag {tag} failed: {}", errno::describe(-code));
            }
            return Ok(());
        }
        let desc: ublk::IoDesc = self.descriptors.read(index * size_of::<ublk::IoDesc>());
        match self.decode(&desc) {
            Ok((request, success)) => {
                self.tags[index] = Tag::Busy(success);
                self.engine.submit(QUEUE, tag, request);
            }
            Err(errno) => self.commit(tag, -errno),
        }
        Ok(())
    }

    /// The request that a descriptor describes, and the number that its success is replied with:
    /// every byte of a read or write (never 0: that would be sent again for ever), 0 for others.
    fn decode(&self, desc: &ublk::IoDesc) -> Result<(Request, i32), i32> {
        let fua = desc.op_flags & ublk::IO_F_FUA != 0;
        match desc.op() {
            ublk::OP_FLUSH => Ok((Request::Flush, 0)),
            // The block layer sends no such thing, and nobody may think that it was durable.
            ublk::OP_WRITE_ZEROES if fua => Err(libc::EOPNOTSUPP),
            op @ (ublk::OP_DISCARD | ublk::OP_WRITE_ZEROES) => {
                let (offset, len) = self.range(desc, u32::MAX).ok_or(libc::EIO)?;
                let unmap = desc.op_flags & ublk::IO_F_NOUNMAP == 0;
                let request = match op {
                    ublk::OP_DISCARD => Request::Discard { offset, len },
                    _ => Request::WriteZeroes { offset, len, unmap },
                };
                Ok((request, 0))
            }
            op @ (ublk::OP_READ | ublk::OP_WRITE) => {
                let (offset, len) = self.range(desc, self.max_request).ok_or(libc::EIO)?;
                let success = i32::try_from(len).map_err(|_| libc::EIO)?;
                let request = match op {
                    ublk::OP_READ => Request::Read { offset, len },
                    _ => Request::Write { offset, len, fua },
                };
                Ok((request, success))
            }
            _ => Err(libc::EOPNOTSUPP),
        }
    }

    /// Offset and length in bytes, if they lie on the disk and are at most `most` bytes.
    fn range(&self, desc: &ublk::IoDesc, most: u32) -> Option<(u64, u32)> {
        let offset = desc.start_sector.checked_mul(ublk::SECTOR)?;
        let len = u64::from(desc.nr_sectors).checked_mul(ublk::SECTOR)?;
        let end = offset.checked_add(len)?;
        let aligned = (offset | len) & u64::from(self.block - 1) == 0;
        let len = u32::try_from(len).ok()?;
        let fits = (1..=most).contains(&len) && end <= self.device_size;
        (fits && aligned).then_some((offset, len))
    }

    fn reply(&mut self, reply: Reply) {
        let Tag::Busy(success) = self.tags[usize::from(reply.tag)] else {
            panic!("the engine replies once to each request");
        };
        let result = match reply.result {
            Ok(()) => success,
            Err(kind) => -errno::errno_of(kind),
        };
        self.commit(reply.tag, result);
    }

    fn commit(&mut self, tag: u16, result: i32) {
        self.fetch(tag, ublk::IO_COMMIT_AND_FETCH, result);
    }

    fn fetch(&mut self, tag: u16, code: u32, result: i32) {
        self.tags[usize::from(tag)] = Tag::Fetching;
        let payload = ublk::IoCmd { queue: QUEUE, tag, result, addr: self.driver.address(tag) };
        self.ring.push(Token::Fetch(tag), Io::Command { fd: self.char_fd, code, payload });
    }

    fn publish(&self) {
        self.link.report(Report {
            stats: self.engine.stats(),
            health: self.engine.health(),
            memory: self.engine.memory(),
        });
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

fn wake_read(fd: RawFd, area: &Area) -> Io {
    Io::Read { fd, to: area.piece(0, 8), offset: 0 }
}

/// What can fail to be made, before anything is taken from the setup.
struct Parts {
    ring: Ring<Token>,
    max_flights: u32,
    buffers: TagBuffers,
    descriptors: Area,
    wake: Area,
    inflated: Area,
}

impl Parts {
    fn new(setup: &Setup) -> Result<Self> {
        let others = u32::from(setup.depth) + OWN_OPERATIONS;
        let wanted = u32::try_from(setup.engine.max_ops()).unwrap_or(MAX_ENTRIES).max(1);
        let max_flights = wanted.min(MAX_ENTRIES - others);
        let ring = Ring::new(max_flights + others).context(
            "io_uring is not available (kernel.io_uring_disabled must be 0, and a memory limit \
             must leave room for the ring)",
        )?;
        let bytes = usize::from(setup.depth) * size_of::<ublk::IoDesc>();
        let offset = u64::from(QUEUE) * ublk::DESC_STRIDE;
        let descriptors = Area::map_shared(&setup.char_device, offset, bytes)
            .context("mapping the request descriptors of the ublk device")?;
        let buffers = TagBuffers::new(setup.depth, setup.max_request).context("buffers")?;
        let wake = Area::new(8).context("buffers")?;
        let inflated = Area::new(8).context("buffers")?;
        Ok(Self { ring, max_flights, buffers, descriptors, wake, inflated })
    }

    fn queue(self, setup: Setup) -> Result<impl FnOnce(QueueEnd) -> Queue> {
        let can_truncate = self.ring.can_truncate();
        let copies = setup.engine.copy_buffers();
        let driver = Driver::new(setup.files, self.buffers, self.max_flights, copies, can_truncate)
            .context("buffers and worker threads")?;
        let depth = usize::from(setup.depth);
        Ok(move |link| Queue {
            char_fd: setup.char_device.as_raw_fd(),
            done: Vec::with_capacity(depth + (self.max_flights + OWN_OPERATIONS) as usize),
            ring: self.ring,
            driver,
            engine: setup.engine,
            link,
            descriptors: self.descriptors,
            wake: self.wake,
            inflated: self.inflated,
            tags: vec![Tag::Closed; depth],
            open_tags: 0,
            flights: 0,
            max_flights: self.max_flights,
            max_request: setup.max_request,
            device_size: setup.device_size,
            block: setup.block,
            begin: Instant::now(),
            _char_device: setup.char_device,
        })
    }
}
