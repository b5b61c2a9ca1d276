//! The process that sends ublk's control commands for this one.
//!
//! A command may wait inside the kernel where no signal ends it: STOP_DEV waits for requests of the
//! device, others for a command before them. A process cannot exit, not even by SIGKILL, as long as
//! a command of its own waits like that. For a server this would be for ever: the driver gives up
//! the requests of a killed server when its character device is closed, which comes later in its
//! exit than the wait for its commands. So a child that has nothing but the control device open
//! sends them; whoever waits for it can stop waiting, and exit.
//!
//! The child ends with its parent: by a signal, when the other end of its socket is closed, or as
//! soon as a command returns that nothing interrupts.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bytemuck::{Pod, Zeroable};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, chdir, dup2_stderr, dup2_stdin, dup2_stdout};

use crate::buffer::{Area, PAGE};
use crate::ring::ControlRing;
use crate::sys;
use crate::ublk::CtrlCmd;

/// The name of the process, for `ps`; at most 15 bytes.
const NAME: &std::ffi::CStr = c"ublk-qcow2-ctl";

/// The most that a command takes along or brings back: a CPU mask of 1024 bytes, and a short path.
pub const MOST: usize = 2048;

/// A command: what the driver is given.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Errand {
    code: u32,
    padding: u32,
    /// Its address is filled in by the child.
    command: CtrlCmd,
    /// As many bytes as the command says are used.
    bytes: [u8; MOST],
}

/// What the driver made of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Answer {
    /// Not negative, or a negative error number.
    pub result: i32,
    padding: u32,
    pub bytes: [u8; MOST],
}

impl Errand {
    /// A command that takes `bytes` along and may bring as many back. (What stands in the command
    /// as length of the device's path is a part of them.)
    pub fn new(code: u32, command: CtrlCmd, bytes: &[u8]) -> Self {
        let len = u16::try_from(bytes.len()).expect("structures of the interface are small");
        let mut errand = Self { code, command: CtrlCmd { len, ..command }, ..Self::zeroed() };
        errand.bytes[..bytes.len()].copy_from_slice(bytes);
        errand
    }
}

/// The way to the child.
pub struct Courier(UnixStream);

impl Courier {
    /// Starts a child for the open control device. Only in a process with one thread, by its status
    /// ([`sys::own_status`]).
    ///
    /// # Errors
    ///
    /// Those of making a process, and of making a ring, which may be forbidden.
    pub fn start(device: &File, status: &File) -> io::Result<Self> {
        let (here, there) = UnixStream::pair()?;
        match sys::fork(status)? {
            ForkResult::Child => {
                // The owners of what is closed in there are never dropped: nobody returns.
                let _ = work(there, device);
                sys::leave()
            }
            ForkResult::Parent { .. } => {
                drop(there);
                let mut courier = Self(here);
                let answer = courier.hear(Duration::from_secs(10))?;
                match answer.result {
                    0 => Ok(courier),
                    error => Err(io::Error::from_raw_os_error(-error)),
                }
            }
        }
    }

    /// Sends a command and waits for what comes of it, but no longer than `limit`: then the error
    /// is ETIME, the command is still under way, and this courier will bring nothing any more.
    pub fn carry(&mut self, errand: &Errand, limit: Duration) -> io::Result<Answer> {
        self.0.write_all(bytemuck::bytes_of(errand))?;
        self.hear(limit)
    }

    fn hear(&mut self, limit: Duration) -> io::Result<Answer> {
        self.0.set_read_timeout(Some(limit))?;
        let mut answer = Answer::zeroed();
        self.0.read_exact(bytemuck::bytes_of_mut(&mut answer)).map_err(|error| {
            match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                    io::Error::from_raw_os_error(libc::ETIME)
                }
                _ => error,
            }
        })?;
        Ok(answer)
    }
}

/// What the child does.
fn work(socket: UnixStream, device: &File) -> io::Result<()> {
    // Nothing of what the other has open, least of all its output that somebody may wait on.
    sys::close_all_but(&[socket.as_raw_fd(), device.as_raw_fd()])?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    chdir("/")?;
    prctl::set_name(NAME)?;
    // Where its command can be interrupted: START_DEV waits for a server that is gone.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // A server without it cannot stop its device. Who may not say so is no server of root's.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    serve(socket, device)
}

/// Command after command, until nobody asks any more.
fn serve(mut socket: UnixStream, device: &File) -> io::Result<()> {
    let mut tell = |result: i32, bytes: [u8; MOST]| {
        socket.write_all(bytemuck::bytes_of(&Answer { result, padding: 0, bytes }))?;
        let mut errand = Errand::zeroed();
        socket.read_exact(bytemuck::bytes_of_mut(&mut errand)).map(|()| errand)
    };
    let errno = |error: &io::Error| -error.raw_os_error().unwrap_or(libc::EIO);
    let made = ControlRing::new().and_then(|ring| Ok((ring, Area::new(PAGE)?)));
    let (mut ring, area) = match made {
        Ok(made) => made,
        Err(error) => return tell(errno(&error), [0; MOST]).map(drop),
    };
    let mut errand = tell(0, [0; MOST])?;
    loop {
        let mut command = errand.command;
        if command.len != 0 {
            area.copy_in(0, &errand.bytes);
            command.addr = area.piece(0, command.len.into()).address() as u64;
        }
        let mut bytes = [0; MOST];
        let result = ring.command(device.as_raw_fd(), errand.code, &command);
        area.copy_out(0, &mut bytes);
        errand = tell(result.unwrap_or_else(|error| errno(&error)), bytes)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_courier_brings_the_drivers_answer_and_can_be_left() {
        // No device at all: the kernel says so.
        let file = tempfile::tempfile().unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        let child = std::thread::spawn(move || serve(there, &file));
        let mut courier = Courier(here);
        assert_eq!(courier.hear(Duration::from_secs(10)).unwrap().result, 0);
        let errand = Errand::new(1, CtrlCmd::default(), &[]);
        let answer = courier.carry(&errand, Duration::from_secs(10)).unwrap();
        assert_eq!(answer.result, -libc::EOPNOTSUPP);
        drop(courier);
        assert!(child.join().unwrap().is_err());
    }

    #[test]
    fn who_does_not_answer_is_not_waited_for() {
        let (here, _there) = UnixStream::pair().unwrap();
        let mut courier = Courier(here);
        let error = courier.hear(Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ETIME));
    }
}
