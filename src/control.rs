//! `/dev/ublk-control`: one typed function per control command.
//!
//! Commands are io_uring commands on the control device, sent one at a time by a process of their
//! own (`courier.rs`). Each has a limit: a command that the kernel does not finish in time is
//! abandoned together with that process, and the caller gets an error. Nothing here can hang.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::time::Duration;

use anyhow::{Result, anyhow};
use bytemuck::Pod;

use crate::courier::{Answer, Courier, Errand};
use crate::errno;
use crate::sys;
use crate::ublk::{self, Command, CtrlCmd, DevInfo, Params};

const PATH: &str = "/dev/ublk-control";

/// The limit of every command that does not wait for guest I/O.
pub const LIMIT: Duration = Duration::from_secs(10);

/// A control command that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlError {
    command: &'static str,
    /// The positive error number; ETIME for a command that exceeded its limit.
    pub errno: i32,
    limit: Duration,
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.errno == libc::ETIME {
            let seconds = self.limit.as_secs();
            return write!(
                f,
                "ublk command {} did not end within {seconds} s; see the kernel's log for what it \
                 waits for, and try again",
                self.command
            );
        }
        write!(f, "ublk command {}: {}", self.command, errno::describe(self.errno))
    }
}

impl std::error::Error for ControlError {}

/// The open control device.
pub struct Control {
    file: File,
    /// None after a command that did not end.
    courier: Option<Courier>,
    /// For who has threads by then, and cannot make another.
    spare: Option<Courier>,
    /// Devices of users: the driver wants each command to name the device's node, and looks
    /// whether the caller may write to that.
    unprivileged: BTreeSet<u32>,
}

impl Control {
    /// Opens the control device, or says what is missing. Before there is a second thread.
    pub fn open() -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(PATH).map_err(explain)?;
        let (courier, spare) = (None, None);
        let mut control = Self { file, courier, spare, unprivileged: BTreeSet::new() };
        control.start_couriers(1, &sys::own_status()?)?;
        Ok(control)
    }

    /// Another courier, for what this process has become, and a spare one: a server has threads
    /// when it has to stop its device. As long as it has one, by its status.
    pub fn for_server(&mut self, status: &File) -> Result<()> {
        self.start_couriers(2, status)
    }

    fn start_couriers(&mut self, count: usize, status: &File) -> Result<()> {
        let start = |_| {
            Courier::start(&self.file, status).map_err(|error| match error.raw_os_error() {
                Some(libc::EPERM) => anyhow!(
                    "io_uring is switched off; set the sysctl kernel.io_uring_disabled to 0"
                ),
                _ => anyhow!("cannot start a process with an io_uring for ublk commands: {error}"),
            })
        };
        let mut couriers = (0..count).map(start).collect::<Result<Vec<_>>>()?;
        (self.courier, self.spare) = (couriers.pop(), couriers.pop());
        Ok(())
    }

    /// The driver's feature flags.
    pub fn features(&mut self) -> Result<u64> {
        match self.receive(ublk::GET_FEATURES, u32::MAX, 0u64) {
            Ok(features) if features & ublk::F_CMD_IOCTL_ENCODE != 0 => Ok(features),
            Ok(_) => {
                Err(anyhow!("the kernel's ublk driver is too old; Linux 6.5 or later is needed"))
            }
            Err(error) if is_unknown(error.errno) => Err(anyhow!(
                "the kernel's ublk driver is too old ({error}); Linux 6.5 or later is needed"
            )),
            Err(error) if error.errno == libc::EPERM => Err(not_root()),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes the character device; returns what the driver made of `info`.
    pub fn add(&mut self, info: &DevInfo) -> Result<DevInfo, ControlError> {
        let info = self.exchange(ublk::ADD_DEV, info.dev_id, *info)?;
        self.note(&info);
        Ok(info)
    }

    fn note(&mut self, info: &DevInfo) {
        if info.flags & ublk::F_UNPRIVILEGED_DEV != 0 {
            self.unprivileged.insert(info.dev_id);
        } else {
            // The number may have been another's.
            self.unprivileged.remove(&info.dev_id);
        }
    }

    /// What the driver knows of a device; ENODEV if there is none.
    pub fn info(&mut self, id: u32) -> Result<DevInfo, ControlError> {
        if !self.unprivileged.contains(&id) {
            match self.receive(ublk::GET_DEV_INFO, id, DevInfo::default()) {
                // It may be that the path is missing.
                Err(error) if error.errno == libc::EINVAL => {}
                result => return result,
            }
        }
        self.unprivileged.insert(id);
        let result = self.receive(ublk::GET_DEV_INFO2, id, DevInfo::default());
        if let Ok(info) = &result {
            self.note(info);
        } else {
            self.unprivileged.remove(&id);
        }
        result
    }

    /// The same of a device that somebody has named.
    pub fn named(&mut self, id: u32) -> Result<DevInfo> {
        self.info(id).map_err(|error| match error.errno {
            libc::ENODEV => {
                anyhow!("there is no ublk device {id}; `ublk-qcow2 list` shows all")
            }
            _ => anyhow!(error).context(format!("device {id}")),
        })
    }

    /// Sets the parameters of a device that was not started yet.
    pub fn set_params(&mut self, id: u32, params: Params) -> Result<(), ControlError> {
        self.exchange(ublk::SET_PARAMS, id, params).map(drop)
    }

    /// The parameters of a device.
    pub fn params(&mut self, id: u32) -> Result<Params, ControlError> {
        let len = u32::try_from(size_of::<Params>()).unwrap_or(0);
        self.exchange(ublk::GET_PARAMS, id, Params { len, ..Params::default() })
    }

    /// The CPUs whose requests go to a queue.
    pub fn affinity(&mut self, id: u32, queue: u16) -> Result<Vec<usize>, ControlError> {
        const BYTES: usize = 1024;
        let empty = [0; BYTES];
        let mask = self.send(ublk::GET_QUEUE_AFFINITY, id, queue.into(), &empty, LIMIT)?.bytes;
        // Words in the machine's order: on those with the lowest byte first, bytes count up.
        let set = |cpu: &usize| mask[cpu / 8] >> (cpu % 8) & 1 != 0;
        Ok((0..BYTES * 8).filter(set).collect())
    }

    /// Makes the block device. Every tag has to be fetched, or about to be.
    pub fn start(&mut self, id: u32, pid: u32) -> Result<(), ControlError> {
        self.plain(ublk::START_DEV, id, u64::from(pid), LIMIT)
    }

    /// Takes over a device that has no server any more; EBUSY while the dead one's character device
    /// is still being closed.
    pub fn start_recovery(&mut self, id: u32) -> Result<(), ControlError> {
        self.plain(ublk::START_USER_RECOVERY, id, 0, LIMIT)
    }

    /// The device goes on with the server `pid`. Every tag has to be fetched, or about to be.
    pub fn end_recovery(&mut self, id: u32, pid: u32) -> Result<(), ControlError> {
        self.plain(ublk::END_USER_RECOVERY, id, u64::from(pid), LIMIT)
    }

    /// Lets requests under way end, and then takes the device from its server; EBUSY if they do not
    /// end within `limit`.
    pub fn quiesce(&mut self, id: u32, limit: Duration) -> Result<(), ControlError> {
        let ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        self.plain(ublk::QUIESCE_DEV, id, ms, limit + LIMIT)
    }

    /// Gives a device that has started a new size, in sectors of 512 bytes.
    pub fn update_size(&mut self, id: u32, sectors: u64) -> Result<(), ControlError> {
        self.plain(ublk::UPDATE_SIZE, id, sectors, LIMIT)
    }

    /// Stops the device, also one that is open, after its requests have ended.
    pub fn stop(&mut self, id: u32, limit: Duration) -> Result<(), ControlError> {
        self.plain(ublk::STOP_DEV, id, 0, limit)
    }

    /// Stops the device unless it is open (EBUSY).
    pub fn try_stop(&mut self, id: u32, limit: Duration) -> Result<(), ControlError> {
        self.plain(ublk::TRY_STOP_DEV, id, 0, limit)
    }

    /// Deletes a device and waits until its number is free.
    pub fn delete(&mut self, id: u32) -> Result<(), ControlError> {
        self.plain(ublk::DEL_DEV, id, 0, LIMIT)
    }

    /// Deletes a device; its number is free once nothing has it open.
    pub fn delete_soon(&mut self, id: u32) -> Result<(), ControlError> {
        match self.plain(ublk::DEL_DEV_ASYNC, id, 0, LIMIT) {
            Err(error) if is_unknown(error.errno) => self.delete(id),
            result => result,
        }
    }

    fn plain(
        &mut self,
        command: Command,
        id: u32,
        data: u64,
        limit: Duration,
    ) -> Result<(), ControlError> {
        self.send(command, id, data, &[], limit).map(drop)
    }

    /// Sends nothing and gets a value.
    fn receive<T: Pod>(&mut self, command: Command, id: u32, empty: T) -> Result<T, ControlError> {
        self.exchange(command, id, empty)
    }

    /// Sends a value, and gets what the driver made of it.
    fn exchange<T: Pod>(&mut self, command: Command, id: u32, value: T) -> Result<T, ControlError> {
        let answer = self.send(command, id, 0, bytemuck::bytes_of(&value), LIMIT)?;
        Ok(bytemuck::pod_read_unaligned(&answer.bytes[..size_of::<T>()]))
    }

    fn send(
        &mut self,
        command: Command,
        id: u32,
        data: u64,
        bytes: &[u8],
        limit: Duration,
    ) -> Result<Answer, ControlError> {
        let failed = |errno| ControlError { command: command.name, errno, limit };
        let path = match self.unprivileged.contains(&id) {
            true => format!("/dev/ublkc{id}\0").into_bytes(),
            false => Vec::new(),
        };
        let payload = CtrlCmd {
            dev_id: id,
            queue_id: u16::MAX,
            data,
            dev_path_len: u16::try_from(path.len()).expect("a short path"),
            ..CtrlCmd::default()
        };
        let errand = Errand::new(command.code, payload, &[&path[..], bytes].concat());
        match self.carry(&errand, limit).map_err(&failed)? {
            answer if answer.result < 0 => Err(failed(-answer.result)),
            mut answer => {
                answer.bytes.copy_within(path.len().., 0);
                Ok(answer)
            }
        }
    }

    /// Has a command carried out, by another courier where one has died. ETIME: it was not, or it
    /// has not ended.
    fn carry(&mut self, errand: &Errand, limit: Duration) -> Result<Answer, i32> {
        loop {
            // Where there are threads by now, there is no other but the spare one.
            let start = || Courier::start(&self.file, &sys::own_status().ok()?).ok();
            let next = || self.spare.take().or_else(start);
            let mut courier = self.courier.take().or_else(next).ok_or(libc::ETIME)?;
            match courier.carry(errand, limit) {
                Ok(answer) => {
                    self.courier = Some(courier);
                    return Ok(answer);
                }
                // It goes on with its command, and ends after it.
                Err(error) if error.raw_os_error() == Some(libc::ETIME) => return Err(libc::ETIME),
                Err(_) => {}
            }
        }
    }
}

/// Whether the driver says that it does not know a command.
fn is_unknown(errno: i32) -> bool {
    const ENOTSUPP: i32 = 524;
    matches!(errno, libc::EOPNOTSUPP | libc::EINVAL | ENOTSUPP)
}

fn not_root() -> anyhow::Error {
    anyhow!("not permitted to use {PATH}; run as root, or be let at it (see `add --help`)")
}

fn explain(error: io::Error) -> anyhow::Error {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => anyhow!(
            "there is no {PATH}; load the module with `modprobe ublk_drv` (the kernel has to be \
             Linux 6.5 or later, built with CONFIG_BLK_DEV_UBLK)"
        ),
        Some(libc::EACCES | libc::EPERM) => not_root(),
        _ => anyhow!("cannot open {PATH}: {error}"),
    }
}
