//! `resize`: a larger disk for a device that is in use.
//!
//! The command sends an order to the server (`orders.rs`), which does it.
//! The engine knows one size for all its life, and the code that grows an image ([`qcow2::resize`])
//! wants it for itself. So requests are held back for a moment, outside the engine; it closes the
//! image as at its end; the image is grown; another engine takes over, on the same open files; and
//! when that is ready requests go on. Last, the driver is told.
//!
//! Most of what stands in the way is found before anything stops. A failure while something is
//! written that is in use is final for the image as any other: the new engine takes no writes.
//! While the image is grown the main thread does nothing else: `list` and signals wait.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use qcow2::check::repair::{RepairIo, WriteError};
use qcow2::check::{ReadAt, ReadError};
use qcow2::resize::ResizeError;
use qcow2::{FailureKind, Health};

use crate::cli::ResizeArgs;
use crate::control::Control;
use crate::core::{Core, Locked};
use crate::files::{Files, Source};
use crate::link::MainEnd;
use crate::open;
use crate::orders::{self, Order};
use crate::resume;
use crate::state::State;
use crate::ublk;

/// How long requests under way may take to end; else nothing has happened.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// Runs `resize`.
pub fn run(args: &ResizeArgs) -> Result<()> {
    let id = args.number;
    let mut control = Control::open()?;
    let features = control.features()?;
    let info = control.named(id)?;
    let state = State::recorded(&info)?;
    if features & ublk::F_UPDATE_SIZE == 0 {
        bail!(
            "the kernel's ublk driver cannot change the size of a device (Linux 6.16 can); \
             `qemu-img resize` grows the image while nobody uses it"
        );
    }
    resume::refuse_unserved(&info)?;
    if !args.size.is_multiple_of(state.block_size.into()) {
        bail!(
            "{} bytes are no multiple of the device's logical block of {} bytes",
            args.size,
            state.block_size
        );
    }
    orders::give(&state, &Order::Resize(args.size))
}

/// What has become of the image.
pub enum Grown {
    Done,
    /// It is as it was.
    Refused(anyhow::Error),
    /// It takes no writes any more.
    Failed(anyhow::Error),
}

/// Grows the image beneath a device that is being served. An error is the end of serving it.
pub fn grow(core: &Core, main: &MainEnd, files: &Files, size: u64) -> Result<Grown> {
    if let Err(error) = judge(core, files, size) {
        return Ok(Grown::Refused(error));
    }
    if !core.hold() {
        return Ok(Grown::Refused(anyhow!("the device is being stopped")));
    }
    let grown = grow_held(core, main, files, size);
    core.lock().held = false;
    main.wake();
    grown
}

/// What can be known before anything is stopped.
fn judge(core: &Core, files: &Files, size: u64) -> Result<()> {
    let (health, beneath) = {
        let engine = &core.lock().engine;
        (engine.health(), engine.size_beneath())
    };
    if let Health::Failed(failure) = health {
        bail!("it takes no writes: {failure}");
    }
    let file = Plain::new(&files.image)?;
    let can_grow = !files.image.kind.is_device();
    file.explained(qcow2::resize::judge(&file, size, beneath, can_grow))
}

/// The same while requests are held back.
fn grow_held(core: &Core, main: &MainEnd, files: &Files, size: u64) -> Result<Grown> {
    if !until(core, main, Some(DRAIN_LIMIT), || core.lock().engine.is_idle())? {
        let seconds = DRAIN_LIMIT.as_secs();
        return Ok(Grown::Refused(anyhow!(
            "requests under way did not end within {seconds} s; nothing was changed"
        )));
    }
    core.lock().engine.close();
    // As long as this takes nothing could be served anyway.
    until(core, main, None, || core.lock().engine.is_closed())?;
    let health = core.lock().engine.health();
    if let Health::Failed(failure) = health {
        core.lock().engine.stay();
        return Ok(Grown::Failed(anyhow!("{failure}")));
    }
    let mut file = Plain::new(&files.image)?;
    let beneath = core.lock().engine.size_beneath();
    let result = qcow2::resize::grow(&mut file, size, beneath);
    let failed = result.as_ref().is_err_and(ResizeError::is_final);
    let grown = match file.explained(result) {
        Ok(()) => Grown::Done,
        Err(error) if failed => Grown::Failed(error),
        Err(error) => Grown::Refused(error),
    };
    if failed {
        core.lock().engine.give_up(FailureKind::MetadataWrite);
    }
    core.replace(|old| open::again(files, old)).context("opening the image once more")?;
    // It may also be closed at once: the device was stopped meanwhile.
    until(core, main, None, || {
        let Locked { engine, .. } = &*core.lock();
        engine.is_ready() || engine.is_closed() || engine.health() != Health::Good
    })?;
    let health = core.lock().engine.health();
    match health {
        Health::Failed(failure) if !failed => Ok(Grown::Failed(anyhow!("{failure}"))),
        _ => Ok(grown),
    }
}

/// Lets the queue threads go on until something is so; false: not within `limit`. An error if one
/// of them has ended.
fn until(
    core: &Core,
    main: &MainEnd,
    limit: Option<Duration>,
    is_so: impl Fn() -> bool,
) -> Result<bool> {
    let begin = Instant::now();
    main.wake();
    while !is_so() {
        if !core.is_driven() {
            bail!("a queue has ended meanwhile");
        }
        if limit.is_some_and(|limit| begin.elapsed() > limit) {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(true)
}

/// An image file that nobody else writes to at the moment.
struct Plain<'a> {
    source: &'a Source,
    len: u64,
    failure: std::cell::RefCell<Option<io::Error>>,
}

impl<'a> Plain<'a> {
    fn new(source: &'a Source) -> Result<Self> {
        let len = source.len().context("cannot get the length of the file")?;
        Ok(Self { source, len, failure: None.into() })
    }

    /// With what the operating system said.
    fn explained(&self, result: Result<(), ResizeError>) -> Result<()> {
        result.map_err(|error| match self.failure.take() {
            Some(failure) => anyhow!("{error} ({failure})"),
            None => anyhow!(error),
        })
    }

    fn noted<T, E>(&self, result: io::Result<T>, error: E) -> Result<T, E> {
        result.map_err(|failure| {
            self.failure.replace(Some(failure));
            error
        })
    }

    fn file(&self) -> &File {
        &self.source.file
    }
}

impl ReadAt for Plain<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let bytes = self.noted(self.source.read(offset, buf.len()), ReadError)?;
        buf[..bytes.len()].copy_from_slice(&bytes);
        buf[bytes.len()..].fill(0);
        Ok(())
    }
}

impl RepairIo for Plain<'_> {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        self.noted(self.source.write(offset, bytes), WriteError)
    }

    fn sync(&mut self) -> Result<(), WriteError> {
        self.noted(self.file().sync_data(), WriteError)
    }

    fn set_len(&mut self, len: u64) -> Result<(), WriteError> {
        self.noted(self.source.kind.lengthen(self.file(), len), WriteError)?;
        self.len = len.max(self.len);
        Ok(())
    }
}
