//! From the command `add` to a daemon: fork, wait for it to be ready, report.
//!
//! The child says over a pipe what it is doing, one line at a time; the parent prints the result,
//! and cleans up after a child that dies, hangs, or is interrupted. The pipe's messages:
//! `stage TEXT` (what is being done), `ready PATH`, `error TEXT`.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, setsid};

use crate::control::Control;
use crate::device;
use crate::log::{self, Verbosity};
use crate::notify;
use crate::signals::Signals;
use crate::state::State;
use crate::sys;

/// How long a daemon may take to be ready. Its first fdatasync may have much to write.
pub const START_LIMIT: Duration = Duration::from_secs(120);

/// How long it may take to end when it was told to.
const END_LIMIT: Duration = Duration::from_secs(20);

/// Where the server says how far it is.
pub enum Reporter {
    /// To the parent, over the pipe.
    Parent(File),
    /// To the terminal.
    Foreground,
}

impl Reporter {
    /// What is being done, for the message of a parent that waits too long.
    pub fn stage(&mut self, what: &str) -> Result<()> {
        tracing::info!("{what}");
        if let Self::Foreground = self {
            notify::stage(what, START_LIMIT);
        }
        self.send("stage", what)
    }

    /// The block device can be used. A daemon leaves the terminal here.
    pub fn ready(&mut self, path: &Path) -> Result<()> {
        match self {
            Self::Parent(_) => {
                // Nothing of the caller's surroundings stays in use.
                chdir("/").context("chdir")?;
                self.send("ready", &path.display().to_string())?;
                let null = OpenOptions::new().write(true).open("/dev/null")?;
                Ok(dup2_stderr(&null)?)
            }
            Self::Foreground => {
                writeln!(io::stdout(), "{}", path.display()).context("writing to stdout")?;
                notify::ready(path)
            }
        }
    }

    /// The device is going away.
    pub fn stopping(&mut self) {
        if let Self::Foreground = self {
            notify::stopping();
        }
    }

    fn send(&mut self, kind: &str, text: &str) -> Result<()> {
        let Self::Parent(pipe) = self else { return Ok(()) };
        // One line: the text must not have line breaks of its own.
        let text = text.replace('\n', " ");
        writeln!(pipe, "{kind} {text}").context("the command that started the server is gone")
    }
}

/// Runs `serve` in a daemon and returns once it is ready or has failed. Where the device `stays`,
/// whatever becomes of this server, it is left alone: others use it.
pub fn launch(
    verbosity: Option<Verbosity>,
    stays: bool,
    serve: impl FnOnce(&mut Reporter) -> Result<()>,
) -> Result<()> {
    // Before the fork, so that neither process misses one.
    let signals = Signals::take_over()?;
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("pipe")?;
    match sys::fork(&sys::own_status().context("/proc/self/status")?).context("fork")? {
        ForkResult::Child => {
            drop((reader, signals));
            let mut reporter = Reporter::Parent(File::from(writer));
            let result = detach(&reporter).and_then(|()| {
                log::open(false, verbosity);
                serve(&mut reporter)
            });
            let code = match result {
                Ok(()) => 0,
                Err(error) => {
                    // After `ready` nobody listens, and the log and the state file tell.
                    let _ = reporter.send("error", &format!("{error:#}"));
                    tracing::error!("{error:#}");
                    1
                }
            };
            log::flush();
            std::process::exit(code);
        }
        ForkResult::Parent { child } => {
            drop(writer);
            let pipe = File::from(reader);
            Parent { child, stays, pipe, text: Vec::new(), stage: String::new() }.wait(&signals)
        }
    }
}

/// Leaves the terminal's session, and everything inherited but stderr and the pipe.
fn detach(reporter: &Reporter) -> Result<()> {
    let Reporter::Parent(pipe) = reporter else { return Ok(()) };
    setsid().context("setsid")?;
    sys::close_all_but(&[pipe.as_raw_fd()]).context("closing inherited files")?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").context("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    Ok(())
}

struct Parent {
    child: Pid,
    stays: bool,
    pipe: File,
    /// Received, not yet a whole line.
    text: Vec<u8>,
    stage: String,
}

/// How waiting for the child's next message ended.
enum News {
    Message(String),
    Silence,
    Interrupted,
    TooLate,
}

impl Parent {
    fn wait(mut self, signals: &Signals) -> Result<()> {
        let mut deadline = Instant::now() + START_LIMIT;
        loop {
            let line = match self.next(signals, deadline)? {
                News::Message(line) => line,
                News::Silence => {
                    let how = self.reap(END_LIMIT);
                    self.clean_up();
                    bail!("the server died while {} ({how})", self.stage);
                }
                News::Interrupted => {
                    self.end_child();
                    bail!("interrupted while {}", self.stage);
                }
                News::TooLate => {
                    self.end_child();
                    let limit = START_LIMIT.as_secs();
                    bail!("gave up after {limit} s of {}; nothing is served", self.stage);
                }
            };
            match line.split_once(' ') {
                Some(("stage", text)) => {
                    self.stage = text.to_string();
                    // It goes on: rebuilding refcounts takes as long as the image is large.
                    deadline = Instant::now() + START_LIMIT;
                    if text.ends_with("%)") && io::stderr().is_terminal() {
                        eprint!(
                            "\rublk-qcow2: {text}{}",
                            if text.contains("100 %") { "\n" } else { "" }
                        );
                    }
                }
                Some(("ready", path)) => {
                    let told = writeln!(io::stdout(), "{path}").and_then(|()| io::stdout().flush());
                    if told.is_err() && !self.stays {
                        // Nobody knows of the device: it must not stay.
                        self.end_child();
                    }
                    return told.context("writing the device's path to stdout");
                }
                Some(("error", text)) => {
                    let text = text.to_string();
                    self.reap(END_LIMIT);
                    return Err(anyhow!(text));
                }
                _ => bail!("the server said {line:?}"),
            }
        }
    }

    fn next(&mut self, signals: &Signals, deadline: Instant) -> Result<News> {
        loop {
            if let Some(end) = self.text.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.text.drain(..=end).collect();
                return Ok(News::Message(String::from_utf8_lossy(&line[..end]).into_owned()));
            }
            if Instant::now() >= deadline {
                return Ok(News::TooLate);
            }
            let mut set = [
                PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.fd(), PollFlags::POLLIN),
            ];
            match poll(&mut set, 500u16) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error).context("poll"),
            }
            if signals.came() {
                return Ok(News::Interrupted);
            }
            if set[0].any() == Some(true) {
                let mut bytes = [0; 1024];
                match self.pipe.read(&mut bytes).context("reading from the server")? {
                    0 => return Ok(News::Silence),
                    count => self.text.extend_from_slice(&bytes[..count]),
                }
            }
        }
    }

    /// Ends the child, kindly first, and removes what it may have left. What would stop a device
    /// that stays is not kind: it waits for its next server after a SIGKILL.
    fn end_child(&self) {
        // A child that is gone already is fine.
        let _ = kill(self.child, if self.stays { Signal::SIGKILL } else { Signal::SIGTERM });
        if self.reap(END_LIMIT).is_empty() {
            let _ = kill(self.child, Signal::SIGKILL);
            self.reap(Duration::from_secs(5));
        }
        self.clean_up();
    }

    /// Waits for the child's end: how it ended, or nothing if it did not in time.
    fn reap(&self, limit: Duration) -> String {
        let deadline = Instant::now() + limit;
        loop {
            match waitpid(self.child, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(_, code)) => return format!("exit status {code}"),
                Ok(WaitStatus::Signaled(_, signal, _)) => return format!("signal {signal}"),
                Ok(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(_) => return String::new(),
                Err(error) => return error.desc().to_string(),
            }
        }
    }

    /// Deletes the device of a child that did not do so itself.
    fn clean_up(&self) {
        if self.stays {
            return;
        }
        // Without a control device or a list of devices there is none.
        let (Ok(mut control), Ok(ids)) = (Control::open(), device::all()) else { return };
        for id in ids {
            let info = control.info(id);
            if info.is_ok_and(|info| device::marked_pid(&info) == Some(self.child.as_raw())) {
                let _ = control.delete_soon(id);
                State::remove(id);
            }
        }
    }
}
