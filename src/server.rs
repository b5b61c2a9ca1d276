//! The server process of one device: start, serve until told to stop, close.
//!
//! The main thread talks to the control device, to signals and to `list`; the queue threads
//! (`queue.rs`) do all I/O. Stopping a device blocks in the kernel until its requests have
//! ended, which needs a queue thread that goes on: hence two threads even for one queue. The first
//! queue's prepares the image; the others are started when it is ready.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cli::AddArgs;
use crate::control::Control;
use crate::core::Core;
use crate::daemon::{Reporter, START_LIMIT};
use crate::decode::Limits;
use crate::device::Device;
use crate::driver::Common;
use crate::fence::Fence;
use crate::figures::Figures;
use crate::files::Files;
use crate::front::{CharDevice, Delivery, Requests};
use crate::isolate;
use crate::journal::Journal;
use crate::link::{self, Event, MainEnd};
use crate::log;
use crate::open::Opened;
use crate::orders::{self, Order};
use crate::prepare;
use crate::queue;
use crate::resize::{self, Grown};
use crate::signals::Signals;
use crate::state::{self, State};
use crate::sys;
use crate::ublk::{self, DevInfo};

/// How long requests may take to end, and then the image to close.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// Milliseconds until the driver is asked again to take the rest of a device.
const ASK_AGAIN: u8 = 100;

/// What to serve.
pub enum What {
    /// A new device.
    New,
    /// A device whose server has died, or has handed it over.
    Old { info: DevInfo, state: Box<State> },
}

/// Serves an image until a signal, `del`, or a failure ends it.
pub fn serve(args: &AddArgs, what: What, reporter: &mut Reporter) -> Result<()> {
    let signals = Signals::take_over()?;
    sys::ignore_signals();
    sys::return_large_memory();
    // Inherited by the queue threads and by the kernel's workers of their rings. Not permitted to
    // every user; who is not will be told by the driver.
    let flusher = sys::become_io_flusher();
    if args.recovery.is_some() && args.absolute()?.file.to_str().is_none() {
        bail!("--recovery needs a path in UTF-8");
    }

    let mut what = what;
    let (mut control, opened, fence) = prepare::prepare(args, &mut what, reporter)?;
    // The tables were read into memory that is free again, of their size.
    sys::trim_memory();
    if !args.unprivileged {
        flusher.context("PR_SET_IO_FLUSHER; run as root, or give --unprivileged")?;
        isolate::keep_resident()?;
    }
    let wanted = prepare::device(args, &opened);
    let (device, before) = match what {
        What::New => {
            reporter.stage("adding a ublk device")?;
            (Device::add(&mut control, wanted)?, None)
        }
        What::Old { info, state } => (Device::resume(info, wanted)?, Some(*state)),
    };
    log::name_device(device.id());
    let mut state = prepare::describe(args, &opened, &device)?;
    if let Some(before) = &before {
        state.added_by = before.added_by;
    }
    let notes = prepare::notes(args, &opened, &device);
    let mut server = Server {
        control,
        device,
        signals,
        state,
        notes,
        main: None,
        core: None,
        running: 0,
        char_device: CharDevice::default(),
        fence,
        stays: before.is_some(),
        came_up: false,
        stopped: false,
        leaving: false,
        files: opened.files.clone(),
    };
    // Nothing outside the folder of states and /dev is opened from here on.
    let status = sys::own_status().context("/proc/self/status")?;
    let alone = match args.unprivileged {
        true => Ok(()),
        false => isolate::leave_mounts().context("making a mount namespace of its own"),
    };
    // A courier that was started before would keep the mounts.
    let alone = alone.and_then(|()| server.control.for_server(&status));
    drop(status);
    let result = alone.and_then(|()| log::start()).and_then(|()| server.run(opened, reporter));
    server.leave(&result);
    result
}

/// Rewrites the record of a device. If it cannot be, service goes on.
fn record(state: &State) {
    if let Err(error) = state.store() {
        tracing::error!("{error:#}");
    }
}

/// What others talk to the server over.
struct Sockets {
    figures: UnixListener,
    orders: UnixListener,
}

struct Server {
    control: Control,
    device: Device,
    signals: Signals,
    state: State,
    /// For the user, once all has gone well: an error is to be the only line.
    notes: Vec<String>,
    /// The link to the queue threads, once they run.
    main: Option<MainEnd>,
    /// What they share.
    core: Option<Arc<Core>>,
    /// How many of them do.
    running: u16,
    /// For the queues, until they have it.
    char_device: CharDevice,
    fence: Option<Arc<Fence>>,
    /// The device was there before this server, which has not taken it over yet.
    stays: bool,
    /// The device is served, and somebody knows of it.
    came_up: bool,
    /// This server has stopped the device.
    stopped: bool,
    /// The driver takes the device from us.
    leaving: bool,
    /// Closed last: the locks go with them.
    files: Files,
}

impl Server {
    fn run(&mut self, opened: Opened, reporter: &mut Reporter) -> Result<()> {
        opened.prepare()?;
        if !self.stays {
            self.device.set_params(&mut self.control)?;
            if self.state.recipe.is_some() {
                self.fence = Some(Arc::new(Fence::take(self.device.id())?));
            }
        }
        reporter.stage("waiting for the image's first fdatasync")?;
        self.start_queues(opened)?;
        let told = reporter.stage("starting the ublk device");
        if !self.stays {
            told?;
        }
        // Before the disk is there, and with it udev's first look at it.
        self.state.tell_udev()?;
        // From here on a successor would find what it needs.
        self.state.store()?;
        let started = match self.stays {
            true => self.device.finish_resume(&mut self.control),
            false => self.device.start(&mut self.control),
        };
        let heard = self.hear(reporter).context("the queue ended");
        let path = heard.and(started)?;
        self.came_up = self.stays;
        self.stays = false;
        let id = self.device.id();
        let sockets =
            Sockets { figures: state::listen(id, "sock")?, orders: state::listen(id, "orders")? };
        for note in &self.notes {
            eprintln!("ublk-qcow2: {}", crate::list::plain(note));
            tracing::info!("{note}");
        }
        let ready = reporter.ready(&path);
        if ready.is_err() && !self.came_up {
            // Nobody knows of this device: stop it again.
            self.stop()?;
            return ready;
        }
        self.came_up = true;
        self.until_end(&sockets, reporter)
    }

    /// Starts the first queue's thread, and when the image is ready, those of the others.
    fn start_queues(&mut self, opened: Opened) -> Result<()> {
        let (main, end) = link::link(self.device.queues()).context("eventfd")?;
        let copies = opened.engine.copy_buffers();
        let recovers = self.state.recipe.is_some() && !self.state.read_only;
        let journal = match opened.journal {
            None if recovers => Some(Journal::create(self.device.id(), &opened.files.image)?),
            journal => journal,
        };
        let setup = queue::Setup {
            core: Arc::new(Core::new(opened.engine, journal, self.device.queues())),
            common: Common::new(opened.files, copies).context("buffers and worker threads")?,
            requests: Requests::Ublk {
                device: Arc::clone(&self.char_device),
                delivery: Delivery::of(&self.device.info),
            },
            path: self.device.path,
            depth: self.device.info.queue_depth,
            limits: Limits {
                max_request: self.device.max_request(),
                size: self.device.size(),
                block: self.state.block_size,
            },
            fence: self.fence.clone(),
        };
        self.main = Some(main);
        self.core = Some(Arc::clone(&setup.core));
        for number in 0..self.device.queues() {
            let cpus = self.control.affinity(self.device.id(), number)?;
            let (setup, end) = (setup.clone(), end.clone());
            std::thread::Builder::new()
                .name(format!("queue-{number}"))
                .spawn(move || queue::run(setup, number, &cpus, end))
                .context("starting a queue's thread")?;
            self.running += 1;
            // The others find the engine ready.
            self.wait_for(&Event::Opened)?;
        }
        self.take_char_device()?;
        for _ in 0..self.running {
            self.wait_for(&Event::Ready)?;
        }
        if self.stays {
            self.change_record(|before| before.taking_over = false)?;
        }
        if self.signals.came() {
            bail!("interrupted");
        }
        // Only the queues have it open from here on.
        self.char_device = CharDevice::default();
        Ok(())
    }

    /// Lets the queues ask for requests. As late as can be: a server that dies from here on, before
    /// all of them have, may be one that Linux before 7.0 has no successor for.
    fn take_char_device(&mut self) -> Result<()> {
        if self.stays {
            self.device.begin_resume(&mut self.control)?;
        }
        let file = self.device.open_char()?;
        self.char_device.get_or_init(|| file);
        if self.stays && !self.device.is_taken_whole(&mut self.control)? {
            self.change_record(|before| before.taking_over = true)?;
        }
        self.main.as_ref().context("the queue threads run")?.let_go();
        Ok(())
    }

    /// Waits until the next queue has got so far.
    fn wait_for(&mut self, wanted: &Event) -> Result<()> {
        // A little less than the parent waits, so that this text is the one that is seen.
        let deadline = Instant::now() + START_LIMIT.saturating_sub(Duration::from_secs(15));
        loop {
            // Not half way: where some queues ask for requests already, the others do in a moment.
            if *wanted == Event::Opened && self.signals.came() {
                bail!("interrupted");
            }
            let main = self.main.as_ref().context("the queue threads run")?;
            match main.wait_event(Duration::from_millis(100)) {
                Some(event) if event == *wanted => return Ok(()),
                Some(Event::Ended(Err(text))) => return Err(anyhow!(text)),
                Some(Event::Failed(text)) => {
                    // A sync that has failed, of what another server had acknowledged, must not be
                    // tried again and believed.
                    if let Err(error) = self.change_record(|it| it.failed = Some(text.clone())) {
                        tracing::error!("{error:#}");
                    }
                    bail!("{text}");
                }
                Some(_) => bail!("the queue ended before it began"),
                None if Instant::now() < deadline => {}
                None => bail!("the image's first fdatasync did not end in time"),
            }
        }
    }

    fn event(&self) -> Option<Event> {
        self.main.as_ref().and_then(MainEnd::event)
    }

    /// Serves `list` and `resize` until a signal comes or the device was stopped from elsewhere.
    fn until_end(&mut self, sockets: &Sockets, reporter: &mut Reporter) -> Result<()> {
        loop {
            let main = self.main.as_ref().context("the queue threads run")?;
            let mut set = [
                PollFd::new(self.signals.fd(), PollFlags::POLLIN),
                PollFd::new(main.event_fd(), PollFlags::POLLIN),
                PollFd::new(sockets.figures.as_fd(), PollFlags::POLLIN),
                PollFd::new(sockets.orders.as_fd(), PollFlags::POLLIN),
            ];
            let limit = if self.leaving { PollTimeout::from(ASK_AGAIN) } else { PollTimeout::NONE };
            match poll(&mut set, limit) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error).context("poll"),
            }
            state::answer(&sockets.figures, || Figures::of(main));
            self.hear(reporter)?;
            if self.running == 0 {
                return Ok(());
            }
            if self.leaving {
                self.be_taken();
            }
            self.obey(&sockets.orders)?;
            if self.signals.came() {
                reporter.stopping();
                return self.stop();
            }
        }
    }

    /// Leaves the device to another server from now on.
    fn hand_over(&mut self) -> Result<()> {
        if self.device.info.flags & ublk::F_QUIESCE == 0 {
            bail!("it ends with its server, or the driver had no QUIESCE_DEV when it was added");
        }
        if let Some(text) = &self.state.failed {
            bail!("it takes no writes any more ({text}), and no other server would take it over");
        }
        self.leaving = true;
        Ok(())
    }

    /// While the device is taken from us: QUIESCE_DEV aborts the commands of tags that have no
    /// request at that moment, and leaves those alone whose request is with us, be it all of them,
    /// which then go on to wait for ever. So it is sent again until the queues have ended. By us:
    /// as long as this process lives no successor can be hit by it.
    fn be_taken(&mut self) {
        if self.state.recipe.is_some() {
            // What is still under way ends soon, or this is tried again.
            let _ = self.control.quiesce(self.device.id(), Duration::from_millis(200));
        }
    }

    /// Takes orders, and answers. An error ends serving the image.
    fn obey(&mut self, orders: &UnixListener) -> Result<()> {
        let mut fatal = None;
        orders::answer(orders, |order| {
            let done = match order {
                Order::HandOver => self.hand_over(),
                Order::Resize(size) => self.resize(size).unwrap_or_else(|error| {
                    fatal = Some(anyhow!("{error:#}"));
                    Err(error)
                }),
            };
            if let Err(error) = &done {
                tracing::warn!("{order:?}: {error:#}");
            }
            done
        });
        fatal.map_or(Ok(()), Err)
    }

    /// Makes the disk larger: the image, and then the device. The outer error ends serving it.
    fn resize(&mut self, size: u64) -> Result<Result<()>> {
        if self.state.read_only {
            return Ok(Err(anyhow!("it is served read-only")));
        }
        let core = Arc::clone(self.core.as_ref().context("the queue threads run")?);
        let main = self.main.as_ref().context("the queue threads run")?;
        // It has that size already where only the driver was not told.
        if size != core.size() {
            match resize::grow(&core, main, &self.files, size)? {
                Grown::Done => tracing::info!("the disk has {size} bytes from now on"),
                Grown::Refused(error) => return Ok(Err(error)),
                Grown::Failed(error) => {
                    return Ok(Err(error.context("it takes no writes any more")));
                }
            }
        }
        self.state.virtual_size = size;
        self.record();
        let told = self.control.update_size(self.device.id(), size / ublk::SECTOR);
        Ok(told.context("the image has the new size, but the device not; give the command again"))
    }

    /// Takes what the queue threads have told.
    fn hear(&mut self, reporter: &mut Reporter) -> Result<()> {
        while let Some(event) = self.event() {
            match event {
                Event::Opened | Event::Ready => {}
                Event::Leaving => self.leaving = true,
                Event::Failed(text) => {
                    // A successor must not take what was acknowledged for being there.
                    self.state.failed = Some(text);
                    self.record();
                }
                Event::Ended(result) => {
                    reporter.stopping();
                    result.map_err(|text| anyhow!(text))?;
                    self.running -= 1;
                }
            }
        }
        Ok(())
    }

    /// Changes what the server before this one has left, until the device is ours.
    fn change_record(&self, change: impl FnOnce(&mut State)) -> Result<()> {
        let Some(mut before) = State::load(self.device.id()).filter(|_| self.stays) else {
            return Ok(());
        };
        change(&mut before);
        before.store()
    }

    /// Rewrites the record of the device.
    fn record(&self) {
        record(&self.state);
    }

    /// Stops the device and waits until the queue threads have closed the image.
    fn stop(&mut self) -> Result<()> {
        self.stopped = true;
        let stopped = self.control.stop(self.device.id(), STOP_LIMIT);
        if let Err(error) = stopped
            && error.errno == libc::ETIME
        {
            return Err(anyhow!(error).context("requests did not end"));
        }
        // Any other failure means that the device was stopped already.
        let main = self.main.as_ref().context("the queue threads run")?;
        let deadline = Instant::now() + STOP_LIMIT;
        while self.running > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            match main.wait_event(left) {
                Some(Event::Ended(result)) => {
                    result.map_err(|text| anyhow!(text))?;
                    self.running -= 1;
                }
                Some(Event::Opened | Event::Ready | Event::Leaving | Event::Failed(_)) => {}
                None => bail!("the image was not closed within {} s", STOP_LIMIT.as_secs()),
            }
        }
        Ok(())
    }

    /// Whether the device goes on without this server. One that was stopped is dead before its tags
    /// are aborted; one that was taken from us is quiesced when the driver has noticed that our
    /// character device is closed, which may take a moment. So is one whose server gives up.
    fn outlives(&mut self) -> bool {
        let may = self.state.recipe.is_some() && self.came_up && !self.stopped;
        let is_dead = |info: DevInfo| info.state == ublk::STATE_DEAD;
        may && !self.control.info(self.device.id()).is_ok_and(is_dead)
    }

    /// Removes the device, unless it waits for another server, and records how it ended.
    fn leave(&mut self, result: &Result<()>) {
        let id = self.device.id();
        if self.stays {
            // As it was before: a dead server's, to be tried again.
            return;
        }
        if self.outlives() {
            self.state.handed_over = result.is_ok();
            self.state.close_error = result.as_ref().err().map(|error| format!("{error:#}"));
            self.record();
            return;
        }
        if result.is_err() {
            // A queue thread that still runs ends with its tags, or without any if there are none.
            if let Some(main) = &self.main {
                main.ask_stop();
            }
            // Fails if it was stopped already, and is given up if requests do not end.
            let _ = self.control.stop(id, Duration::from_secs(5));
        }
        State::forget_trust(id);
        match (result, State::load(id)) {
            // Only a device that had come up has a file; the end of others is told by `add`.
            (Err(error), Some(state)) if state.pid == self.state.pid => {
                self.state.close_error = Some(format!("{error:#}"));
                self.record();
            }
            _ => State::remove(id),
        }
        self.device.delete(&mut self.control);
    }
}
