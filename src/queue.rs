//! The loop: guest requests in, operations out, completions in, replies out.
//!
//! A thread and a ring for each queue, one `io_uring_enter` per turn. A turn takes every completion
//! there is (a ublk command brings requests, a file operation an outcome), hands them to the
//! engine that all queues share ([`Core`]), and takes from it what is for this queue: operations
//! become submissions, replies go to the [`Front`]. Nothing blocks but the ring; compressed
//! clusters are inflated by other threads, which wake the ring through an eventfd. What the bytes
//! of requests take (`payload.rs`) happens before and after the engine is locked.
//!
//! The device's end reaches this loop as aborted commands: when the fronts of all queues are over
//! no request can come any more, and the engine is closed. So the loop ends the same way whoever
//! stopped the device: our own main thread, `del`, or another tool.
//!
//! The first queue also keeps the engine's time. Each has a timer, on which it looks for operations
//! that do not return (`watch.rs`) and reports to the main thread; it does that on demand, too.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use qcow2::{Engine, Health, Reply, Request};

use crate::buffer::Area;
use crate::core::Core;
use crate::decode::{Limits, decode};
use crate::driver::{Common, Driver, Ended, Flight, Staged, Step};
use crate::errno;
use crate::fence::Fence;
use crate::front::{self, Front, Requests, Sent};
use crate::link::{Event, QueueEnd, Report};
use crate::meter::{Arrived, Meter};
use crate::payload::{DataPath, Payload};
use crate::ring::{Io, MAX_ENTRIES, Ring};
use crate::sys;
use crate::watch::Watch;

/// What every queue thread is given.
#[derive(Clone)]
pub struct Setup {
    pub core: Arc<Core>,
    pub common: Common,
    pub requests: Requests,
    pub path: DataPath,
    pub depth: u16,
    pub limits: Limits,
    /// Kept by every ring until its last operation has ended.
    pub fence: Option<Arc<Fence>>,
}

/// Whose completion it is.
enum Token {
    Front(Sent),
    File(Flight),
    /// Another queue was woken.
    Poke(u16),
    Timer,
    Wake,
    Inflated,
}

impl From<Sent> for Token {
    fn from(sent: Sent) -> Self {
        Self::Front(sent)
    }
}

/// Where a tag is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tag {
    /// Not with us.
    Away,
    /// With the engine; the reply of success is this number. A read's payload leaves with it.
    Busy { success: i32, read: bool, arrived: Arrived },
}

/// Poking of another queue.
#[derive(Clone, Copy, Debug, Default)]
struct Poke {
    under_way: bool,
    /// Once more when it has ended.
    again: bool,
}

/// Timer, wake-up by the main thread, wake-up by the pool.
const OWN_OPERATIONS: u32 = 3;

/// What the engine said when it was last looked at.
struct Seen {
    ready: bool,
    closed: bool,
    health: Health,
}

struct Queue {
    number: u16,
    ring: Ring<Token>,
    driver: Driver,
    core: Arc<Core>,
    link: QueueEnd,
    front: Front,
    wake: Area,
    inflated: Area,
    tags: Vec<Tag>,
    /// How many of them are busy.
    busy: u16,
    told_of_leaving: bool,
    limits: Limits,
    /// File operations in flight and their limit.
    flights: usize,
    max_flights: usize,
    pokes: Vec<Poke>,
    seen: Seen,
    meter: Meter,
    watch: Watch,
    /// The present turn has begun: the time at which what it found arrived.
    begun: Instant,
    /// For the engine: it is time; the main thread waits for figures; what has come.
    tick: bool,
    report: bool,
    requests: Vec<(u16, Request)>,
    ended: Vec<Ended>,
    /// From the engine.
    staged: Vec<Staged>,
    replies: Vec<Reply>,
    done: Vec<(Token, i32)>,
}

/// The thread of one queue, on these CPUs: serves until the device has stopped and the image is
/// closed. Tells the result through `link`.
pub fn run(setup: Setup, number: u16, cpus: &[usize], link: QueueEnd) {
    // A matter of speed alone.
    let _ = sys::run_on(cpus);
    let core = Arc::clone(&setup.core);
    let link = link.of_queue(number);
    let result = Queue::new(setup, number, link.clone()).and_then(|mut queue| {
        core.register(number, Some(queue.ring.fd()));
        let result = queue.serve();
        core.register(number, None);
        // Dropping the queue closes the ring and its copy of the character device.
        result
    });
    link.tell(Event::Ended(result.map_err(|error| format!("{error:#}"))));
}

impl Queue {
    fn new(setup: Setup, number: u16, link: QueueEnd) -> Result<Self> {
        let Setup { core, common, requests, path, depth, limits, fence } = setup;
        let queues = core.queues();
        let others = front::commands(&requests, depth) + OWN_OPERATIONS + u32::from(queues);
        // Metadata goes out on whichever queue had the event, so each may get all there is.
        let wanted = u32::try_from(core.lock().engine.max_ops()).unwrap_or(MAX_ENTRIES).max(1);
        let flights = wanted.min(MAX_ENTRIES - others);
        let mut ring = Ring::new(flights + others).context(
            "io_uring is not available (kernel.io_uring_disabled must be 0, and a memory limit \
             must leave room for the ring)",
        )?;
        if let Some(fence) = &fence {
            ring.hold(fence.fd()).context("registering a file with the ring")?;
        }
        let payload = Payload::new(path, requests.device(), number, depth, limits.max_request);
        let payload = payload.context("buffers")?;
        if payload.registers() {
            ring.register_buffers(depth).context("making the ring's table of buffers")?;
        }
        let front = Front::new(requests, number, depth, &payload, &mut ring)?;
        let driver = Driver::new(&common, payload, flights, ring.can_truncate());
        let tags = usize::from(depth);
        let flights = flights as usize;
        Ok(Self {
            number,
            driver: driver.context("buffers")?,
            ring,
            core,
            link,
            front,
            wake: Area::new(8).context("buffers")?,
            inflated: Area::new(8).context("buffers")?,
            tags: vec![Tag::Away; tags],
            busy: 0,
            told_of_leaving: false,
            limits,
            flights: 0,
            max_flights: flights,
            pokes: vec![Poke::default(); queues.into()],
            seen: Seen { ready: false, closed: false, health: Health::Good },
            meter: Meter::default(),
            watch: Watch::new(),
            begun: Instant::now(),
            tick: false,
            report: true,
            requests: Vec::with_capacity(tags),
            ended: Vec::with_capacity(flights),
            staged: Vec::with_capacity(flights),
            replies: Vec::with_capacity(tags),
            done: Vec::with_capacity(flights + others as usize),
        })
    }

    /// Turns until requests may come.
    fn start(&mut self) -> Result<()> {
        self.push_inflated();
        self.push_wake();
        self.ring.push(Token::Timer, Io::Timer);
        if self.is_first() {
            self.open()?;
        }
        self.link.tell(Event::Opened);
        self.link.wait_for_go();
        self.front.begin(&mut self.ring, self.driver.payload())?;
        self.link.tell(Event::Ready);
        Ok(())
    }

    fn serve(&mut self) -> Result<()> {
        self.start()?;
        while !self.front.is_over(self.busy) {
            self.turn()?;
        }
        // Every request was replied to, and none can come.
        if self.core.ended_one() {
            self.core.lock().engine.close();
        }
        while !self.seen.closed {
            self.turn()?;
        }
        self.tell(None);
        self.check("closing the image")
    }

    /// Turns until the image can be served.
    fn open(&mut self) -> Result<()> {
        self.work();
        while !self.seen.ready {
            self.check("preparing the image")?;
            if self.link.stop_wanted() {
                bail!("stopped before the image was ready");
            }
            self.turn()?;
            self.work();
        }
        self.check("preparing the image")
    }

    fn check(&self, what: &str) -> Result<()> {
        match self.seen.health {
            Health::Good => Ok(()),
            Health::Failed(failure) => Err(anyhow!("{what}: {failure}")),
        }
    }

    fn is_first(&self) -> bool {
        self.number == 0
    }

    /// One turn of the loop.
    fn turn(&mut self) -> Result<()> {
        self.work();
        if self.seen.closed {
            // The others are waiting to hear of it.
            return self.ring.submit().context("io_uring_enter");
        }
        let mut done = std::mem::take(&mut self.done);
        let turned = self.ring.turn(&mut done).context("io_uring_enter");
        self.begun = Instant::now();
        self.meter.turns += 1;
        if *turned.as_ref().unwrap_or(&false) {
            self.core.woken(self.number);
        }
        for (token, code) in done.drain(..) {
            match token {
                Token::File(flight) => {
                    let step = self.driver.next(flight, code, self.watch.now());
                    self.apply(step, 0);
                }
                Token::Front(sent) => self.front.completed(sent, code)?,
                Token::Poke(queue) => self.poked(queue, code),
                Token::Timer => {
                    self.timer();
                }
                Token::Wake => {
                    self.report = true;
                    self.push_wake();
                }
                Token::Inflated => {
                    let Self { driver, ended, flights, .. } = self;
                    driver.inflated(|end| {
                        *flights -= 1;
                        ended.push(end);
                    });
                    self.push_inflated();
                }
            }
        }
        self.done = done;
        self.front.collect(&mut self.ring)?;
        if self.front.is_leaving() && !std::mem::replace(&mut self.told_of_leaving, true) {
            self.link.tell(Event::Leaving);
        }
        turned.map(drop)
    }

    /// Hands over what has come, and carries out what the engine wants, until it wants no more.
    fn work(&mut self) {
        loop {
            while let Some(tag) = self.front.arrived(self.driver.payload()) {
                self.arrived(tag);
            }
            self.exchange();
            let mut staged = std::mem::take(&mut self.staged);
            for staged in staged.drain(..) {
                let step = self.driver.start(staged, self.watch.now());
                self.apply(step, 1);
            }
            self.staged = staged;
            let mut replies = std::mem::take(&mut self.replies);
            for reply in replies.drain(..) {
                self.reply(reply);
            }
            self.replies = replies;
            if self.ended.is_empty() && !self.front.has_more() {
                break;
            }
        }
        self.front.send(&mut self.ring, self.driver.payload());
    }

    /// All that happens with the engine locked.
    fn exchange(&mut self) {
        let core = Arc::clone(&self.core);
        let mut locked = core.lock();
        let engine = &mut locked.engine;
        if std::mem::take(&mut self.tick) && self.is_first() {
            engine.tick(core.now());
        }
        for ended in self.ended.drain(..) {
            self.driver.finish(engine, ended);
        }
        if !locked.held {
            for (tag, request) in self.requests.drain(..) {
                locked.engine.hand_in(self.number, tag, request);
            }
        }
        let held = locked.held;
        locked.engine.go_on();
        locked.record();
        let engine = &mut locked.engine;
        // What does not fit stays in the engine until completions make room.
        while self.flights + self.staged.len() < self.max_flights {
            let Some(op) = engine.next_op(self.number) else { break };
            self.staged.push(self.driver.stage(engine, op));
        }
        while let Some(reply) = engine.next_reply(self.number) {
            self.replies.push(reply);
        }
        while let Some(incident) = engine.next_incident() {
            tracing::error!("{incident}");
        }
        if let (Health::Good, Health::Failed(failure)) = (self.seen.health, engine.health())
            && !failure.is_of_journal()
        {
            self.link.tell(Event::Failed(failure.to_string()));
        }
        self.seen = Seen {
            ready: engine.is_ready(),
            closed: engine.is_closed() && !held,
            health: engine.health(),
        };
        let report = (self.report && self.is_first()).then(|| report(engine));
        for queue in 0..core.queues() {
            let wanted = self.seen.closed || engine.has_something_for(queue);
            if wanted && queue != self.number {
                self.poke(queue);
            }
        }
        drop(locked);
        if std::mem::take(&mut self.report) {
            self.tell(report);
        }
    }

    /// Another tick has passed.
    fn timer(&mut self) {
        (self.tick, self.report) = (true, true);
        let flights = self.ring.in_flight().filter_map(|token| match token {
            Token::File(flight) => Some(flight.watched()),
            _ => None,
        });
        self.watch.tick(flights.chain(self.driver.watched()));
        self.ring.push(Token::Timer, Io::Timer);
    }

    /// Tells the main thread where things are.
    fn tell(&self, engine: Option<Report>) {
        self.link.report(engine, |report| {
            report.meter = self.meter;
            let busy = |tag: &&Tag| matches!(tag, Tag::Busy { .. });
            report.requests = self.tags.iter().filter(busy).count();
            report.operations = self.flights;
            report.tick = self.watch.now();
            report.stuck.clear();
            report.stuck.extend_from_slice(self.watch.episodes());
        });
    }

    fn poke(&mut self, queue: u16) {
        let Some(ring) = self.core.to_poke(queue) else { return };
        let poke = &mut self.pokes[usize::from(queue)];
        if poke.under_way {
            poke.again = true;
            return;
        }
        poke.under_way = true;
        self.ring.push(Token::Poke(queue), Io::Poke { ring });
    }

    /// A poke has ended: once more if it failed for a moment, or another was wanted meanwhile.
    fn poked(&mut self, queue: u16, code: i32) {
        let poke = &mut self.pokes[usize::from(queue)];
        let again = std::mem::take(&mut poke.again);
        poke.under_way = false;
        let failed = matches!(-code, libc::EAGAIN | libc::EINTR | libc::ENOMEM | libc::EOVERFLOW);
        if again || failed {
            self.core.woken(queue);
            self.poke(queue);
        }
    }

    /// Carries out a step of an operation that adds `new` to those in flight if it is submitted.
    fn apply(&mut self, step: Step, new: usize) {
        match step {
            Step::Submit(flight, io) => {
                self.flights += new;
                self.meter.operations += 1;
                self.ring.push(Token::File(flight), io);
            }
            Step::Pooled => self.flights += new,
            Step::Ended(ended) => {
                self.flights -= 1 - new;
                self.ended.push(ended);
            }
        }
    }

    fn arrived(&mut self, tag: u16) {
        match self.accept(tag) {
            Ok(request) => self.requests.push((tag, request)),
            Err(errno) => {
                self.meter.refused += 1;
                self.commit(tag, -errno);
            }
        }
    }

    /// The request, with its payload here. Or the error to reply with.
    fn accept(&mut self, tag: u16) -> Result<Request, i32> {
        let desc = self.front.descriptor(tag);
        let limits = Limits { size: self.core.size(), ..self.limits };
        let (request, success) = decode(&desc, &limits)?;
        if let Request::Write { len, .. } = request {
            moved("fetching", tag, self.driver.payload().arrived(tag, len))?;
        }
        let read = matches!(request, Request::Read { .. });
        let arrived = Arrived::new(request, self.begun);
        let before = &mut self.tags[usize::from(tag)];
        assert!(*before == Tag::Away, "a tag has one request at a time");
        *before = Tag::Busy { success, read, arrived };
        self.busy += 1;
        Ok(request)
    }

    fn reply(&mut self, reply: Reply) {
        let tag = reply.tag;
        let Tag::Busy { success, read, arrived } = self.tags[usize::from(tag)] else {
            panic!("the engine replies once to each request");
        };
        self.tags[usize::from(tag)] = Tag::Away;
        self.busy -= 1;
        let mut result = reply.result.map_or_else(|kind| -errno::errno_of(kind), |()| success);
        if read && let Ok(len @ 1..) = u32::try_from(result) {
            let left = moved("handing over", tag, self.driver.payload().leaves(tag, len));
            result = left.map_or_else(|errno| -errno, |()| success);
        }
        self.meter.replied(arrived, result >= 0);
        self.commit(tag, result);
    }

    fn commit(&mut self, tag: u16, result: i32) {
        self.front.commit(tag, result, &mut self.ring, self.driver.payload());
    }

    fn push_wake(&mut self) {
        let io = wake_read(self.link.wake_fd(), &self.wake);
        self.ring.push(Token::Wake, io);
    }

    fn push_inflated(&mut self) {
        let io = wake_read(self.driver.pool_fd(), &self.inflated);
        self.ring.push(Token::Inflated, io);
    }
}

fn wake_read(fd: RawFd, area: &Area) -> Io {
    Io::Read { fd, to: area.piece(0, 8), offset: 0 }
}

fn report(engine: &Engine) -> Report {
    Report {
        stats: engine.stats(),
        health: engine.health(),
        memory: engine.memory(),
        leak_bound: engine.leak_bound(),
    }
}

/// The error to reply with where the payload of a request could not be copied.
fn moved(what: &str, tag: u16, result: io::Result<()>) -> Result<(), i32> {
    result.map_err(|error| {
        tracing::error!("{what} the payload of tag {tag}: {error}");
        libc::EIO
    })
}
