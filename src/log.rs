//! Where log lines go: to stderr in the foreground, in the background to the journal, or to syslog
//! where there is no journal.
//!
//! A queue thread must not wait for a log: what reads it may be slow, and may be waiting for our
//! own device. So whoever logs hands the line over to a thread of its own, over a channel with a
//! bound, and where that is full the line is dropped and counted. Nothing is ever written to a
//! file, which might lie on the device. (Rejected: crates that send to journal or syslog from the
//! thread that logs; a datagram socket blocks when its reader does not keep up.)
//!
//! The sockets are connected before the host's mounts are left, so they need no path later. A
//! syslog daemon that is restarted is lost to us (its lines count as dropped); the journal's socket
//! is held open by the service manager, and survives.

use std::io::{self, IsTerminal, Write};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// Lines that may wait for the thread.
const WAITING: usize = 512;

/// How long the end of the process waits for the last lines.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// How long one line may take to be sent; then it is dropped.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// The thread's stack.
const STACK: usize = 128 << 10;

const JOURNAL: &str = "/run/systemd/journal/socket";
const SYSLOG: &str = "/dev/log";
const NAME: &str = "ublk-qcow2";

/// `--log`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Verbosity {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl Verbosity {
    fn filter(self) -> LevelFilter {
        match self {
            Self::Off => LevelFilter::OFF,
            Self::Error => LevelFilter::ERROR,
            Self::Warn => LevelFilter::WARN,
            Self::Info => LevelFilter::INFO,
            Self::Debug => LevelFilter::DEBUG,
            Self::Trace => LevelFilter::TRACE,
        }
    }
}

/// A line, and its priority as syslog counts; or the wish to be told when all before it is out.
enum Item {
    Line(u8, Vec<u8>),
    Flush(Sender<()>),
}

/// What a line is written to.
#[derive(Debug)]
enum Sink {
    Stderr,
    Journal(UnixDatagram),
    Syslog(UnixDatagram),
    /// There is neither.
    Nothing,
}

/// The end of those who log.
struct Log {
    items: SyncSender<Item>,
    /// For the thread, until it is started.
    rest: Mutex<Option<(Receiver<Item>, Sink)>>,
}

static LOG: OnceLock<Log> = OnceLock::new();
static DROPPED: AtomicU64 = AtomicU64::new(0);
/// The device, for the lines in logs of the whole machine; none yet: the largest number.
static DEVICE: AtomicU32 = AtomicU32::new(u32::MAX);

/// Begins to log. What is logged is kept until [`start`].
pub fn open(foreground: bool, verbosity: Option<Verbosity>) {
    let sink = if foreground { Sink::Stderr } else { Sink::of_machine() };
    let filter = match verbosity {
        Some(verbosity) => EnvFilter::default().add_directive(verbosity.filter().into()),
        None => {
            EnvFilter::builder().with_default_directive(LevelFilter::WARN.into()).from_env_lossy()
        }
    };
    let (items, rest) = sync_channel(WAITING);
    let log = Log { items: items.clone(), rest: Mutex::new(Some((rest, sink))) };
    if LOG.set(log).is_err() {
        return;
    }
    let layer = fmt::layer().with_target(false).with_writer(Lines(items));
    let layer = match foreground {
        true => layer.with_ansi(io::stderr().is_terminal()).boxed(),
        false => layer.with_ansi(false).without_time().with_level(false).boxed(),
    };
    // Fails only where one is set already.
    let _ = tracing_subscriber::registry().with(filter).with(layer).try_init();
}

/// Starts the thread that writes. To be called when no mount namespace is to be left any more.
pub fn start() -> Result<()> {
    let Some((items, sink)) = take_rest() else { return Ok(()) };
    let thread = std::thread::Builder::new().name("log".to_string()).stack_size(STACK);
    thread.spawn(move || write_all(&items, &sink)).context("starting the thread of the log")?;
    Ok(())
}

/// From now on, lines in logs of the whole machine name this device.
pub fn name_device(id: u32) {
    DEVICE.store(id, Ordering::Relaxed);
}

/// Lines that could not be written.
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Waits a moment until what was logged is out.
pub fn flush() {
    let Some(log) = LOG.get() else { return };
    if let Some((items, sink)) = take_rest() {
        while let Ok(item) = items.try_recv() {
            write_one(item, &sink);
        }
        return;
    }
    let (told, out) = channel();
    if log.items.try_send(Item::Flush(told)).is_ok() {
        let _ = out.recv_timeout(FLUSH_LIMIT);
    }
}

fn take_rest() -> Option<(Receiver<Item>, Sink)> {
    LOG.get()?.rest.lock().unwrap_or_else(PoisonError::into_inner).take()
}

fn write_all(items: &Receiver<Item>, sink: &Sink) {
    while let Ok(item) = items.recv() {
        write_one(item, sink);
    }
}

fn write_one(item: Item, sink: &Sink) {
    match item {
        Item::Line(priority, line) => {
            if sink.write(priority, &line).is_err() {
                DROPPED.fetch_add(1, Ordering::Relaxed);
            }
        }
        // Who does not wait any more needs no answer.
        Item::Flush(told) => drop(told.send(())),
    }
}

impl Sink {
    fn of_machine() -> Self {
        let connect = |path: &str| -> io::Result<UnixDatagram> {
            let socket = UnixDatagram::unbound()?;
            socket.connect(path)?;
            socket.set_write_timeout(Some(SEND_LIMIT))?;
            Ok(socket)
        };
        let journal = connect(JOURNAL).map(Self::Journal);
        journal.or_else(|_| connect(SYSLOG).map(Self::Syslog)).unwrap_or(Self::Nothing)
    }

    fn write(&self, priority: u8, line: &[u8]) -> io::Result<()> {
        match self {
            Self::Stderr => io::stderr().write_all(line),
            Self::Journal(socket) => {
                let text = message(line);
                // One field a line: a value without line breaks needs no length.
                let fields = format!(
                    "PRIORITY={priority}\nSYSLOG_FACILITY=3\nSYSLOG_IDENTIFIER={NAME}\n\
                     MESSAGE={text}\n"
                );
                socket.send(fields.as_bytes()).map(drop)
            }
            Self::Syslog(socket) => {
                // Facility 3 is that of daemons.
                let (code, pid, text) = (3 * 8 + priority, std::process::id(), message(line));
                socket.send(format!("<{code}>{NAME}[{pid}]: {text}").as_bytes()).map(drop)
            }
            Self::Nothing => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// A line for a log of the whole machine.
fn message(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let text = crate::list::plain(text.trim());
    match DEVICE.load(Ordering::Relaxed) {
        u32::MAX => text,
        id => format!("device {id}: {text}"),
    }
}

/// Makes a writer for each line.
struct Lines(SyncSender<Item>);

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { items: &self.0, priority: 6, bytes: Vec::new() }
    }

    fn make_writer_for(&'a self, of: &Metadata<'_>) -> Line<'a> {
        let priority = match *of.level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        Line { items: &self.0, priority, bytes: Vec::new() }
    }
}

/// A line that is being put together, and handed over at its end.
struct Line<'a> {
    items: &'a SyncSender<Item>,
    priority: u8,
    bytes: Vec<u8>,
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        let line = Item::Line(self.priority, std::mem::take(&mut self.bytes));
        match self.items.try_send(line) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                DROPPED.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 512];
        let len = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..len].to_vec()).unwrap()
    }

    #[test]
    fn a_line_cannot_add_a_field_or_a_line() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let journal = Sink::Journal(ours);
        journal.write(3, b" bad\nPRIORITY=0\x1b[31m\n").unwrap();
        let expected = "PRIORITY=3\nSYSLOG_FACILITY=3\nSYSLOG_IDENTIFIER=ublk-qcow2\n\
                        MESSAGE=bad?PRIORITY=0?[31m\n";
        assert_eq!(received(&theirs), expected);
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        Sink::Syslog(ours).write(4, b"one\ntwo\n").unwrap();
        let pid = std::process::id();
        assert_eq!(received(&theirs), format!("<28>ublk-qcow2[{pid}]: one?two"));
    }

    #[test]
    fn whoever_logs_does_not_wait_and_what_does_not_fit_is_counted() {
        let (items, rest) = sync_channel(2);
        let lines = Lines(items);
        let before = dropped();
        for number in 0..5 {
            write!(lines.make_writer(), "line {number}").unwrap();
        }
        assert_eq!(dropped() - before, 3);
        let text = |item| match item {
            Item::Line(_, bytes) => String::from_utf8(bytes).unwrap(),
            Item::Flush(_) => unreachable!("nobody flushes"),
        };
        assert_eq!(rest.try_iter().map(text).collect::<Vec<_>>(), ["line 0", "line 1"]);
        assert!(Sink::Nothing.write(3, b"lost").is_err());
    }
}
