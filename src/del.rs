//! `del`: ends devices, and waits until their images are closed.
//!
//! A living daemon of ours closes its image by itself as soon as its device stops, whoever stopped
//! it. So `del` stops the device (through the driver where that can refuse an open device, else by
//! SIGTERM to the daemon), waits for the daemon's end, and then looks at what it left behind.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::unistd::Pid;

use crate::busy;
use crate::cli::DelArgs;
use crate::control::{Control, ControlError, LIMIT};
use crate::device;
use crate::state::State;
use crate::sys::PidFd;
use crate::ublk::{self, DevInfo};

/// How long an opener may go on: udev opens devices for a moment after they appear or are written.
const PATIENCE: Duration = Duration::from_secs(3);
/// Gives up on a daemon that makes no progress for so long,
const IDLE_LIMIT: Duration = Duration::from_secs(15);
/// and on one that does after so long.
const BUSY_LIMIT: Duration = Duration::from_secs(60);
/// How long the driver may take to forget a device that was deleted.
const GONE_LIMIT: Duration = Duration::from_secs(5);
/// The same for one that was stopped by force: whoever has it open keeps its number.
const FORCED_GONE_LIMIT: Duration = Duration::from_millis(500);

/// Runs `del`.
pub fn run(args: &DelArgs) -> Result<()> {
    let mut control = Control::open()?;
    let features = control.features()?;
    if let Some(id) = args.number {
        return delete(&mut control, features, id, args.force);
    }
    let mut failures = Vec::new();
    for id in device::all()? {
        if is_ours(&mut control, id)
            && let Err(error) = delete(&mut control, features, id, args.force)
        {
            failures.push(format!("{error:#}"));
        }
    }
    if failures.is_empty() { Ok(()) } else { bail!("{}", failures.join("; ")) }
}

fn is_ours(control: &mut Control, id: u32) -> bool {
    match control.info(id) {
        Ok(info) => device::marked_pid(&info).is_some(),
        Err(_) => false,
    }
}

fn delete(control: &mut Control, features: u64, id: u32, force: bool) -> Result<()> {
    let info = control.named(id)?;
    match Daemon::of(id, &info) {
        Some(daemon) => {
            // A device that is only just being started has no disk yet that could be open.
            let starting = info.state == ublk::STATE_DEAD && State::load(id).is_none();
            let told = daemon.stop(control, features, force || starting)?;
            daemon.wait(told)?;
            // However it ended: the device goes, and then its end is told.
            let verdict = verdict(id, daemon.pid);
            remove(control, id, force).and(verdict)
        }
        None => {
            refuse_others(control, id, &info)?;
            if !force {
                refuse_recoverable(control, features, id)?;
            }
            remove(control, id, force)
        }
    }
}

/// Fails for a device whose living server is another program.
fn refuse_others(control: &mut Control, id: u32, info: &DevInfo) -> Result<()> {
    let alive = info.ublksrv_pid > 0 && process_name(info.ublksrv_pid).is_some();
    if info.state != ublk::STATE_DEAD && alive && device::marked_pid(info).is_none() {
        let name = process_name(info.ublksrv_pid).unwrap_or_default();
        bail!(
            "device {id} is served by {name} (process {}), not by ublk-qcow2; stop it with its \
             own tool",
            info.ublksrv_pid
        );
    }
    // A server that died a moment ago: the driver is about to notice.
    let deadline = Instant::now() + GONE_LIMIT;
    let is_live = |info: DevInfo| info.state == ublk::STATE_LIVE;
    while control.info(id).is_ok_and(is_live) {
        if Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        // Deleting it would end it under whoever has it open.
        bail!(
            "device {id} is being served, but its server (process {}) cannot be seen from here; \
             run del where the server runs",
            info.ublksrv_pid
        );
    }
    Ok(())
}

/// Fails for a device whose dead server has left what another could bring back, and stops one that
/// was handed over and that nobody uses.
fn refuse_recoverable(control: &mut Control, features: u64, id: u32) -> Result<()> {
    let info = control.info(id).map_err(|error| anyhow!(error).context(format!("device {id}")))?;
    if info.state == ublk::STATE_DEAD || info.flags & ublk::F_USER_RECOVERY == 0 {
        return Ok(());
    }
    let Some(state) = State::of(&info) else {
        bail!(
            "device {id} waits for another server, and of what its last one has left nothing is \
             recorded that can be read; --force removes the device"
        )
    };
    if !state.handed_over {
        bail!(
            "the server of device {id} has died; `ublk-qcow2 recover -n {id}` brings back all that \
             was acknowledged, --force removes the device without what was not flushed"
        )
    }
    let refusal = |users: &[String]| {
        anyhow!(
            "device {id} waits for a server and is in use ({}); `ublk-qcow2 recover -n {id}` \
             serves it again, --force removes it",
            busy::phrase(users)
        )
    };
    let deadline = Instant::now() + PATIENCE;
    if features & ublk::F_SAFE_STOP_DEV != 0 {
        return stop_unless_open(control, id, deadline, refusal);
    }
    // As with a living server, nobody can mount it from here to its end.
    let guard = exclusive(id, deadline, refusal)?;
    let stopped = control.stop(id, LIMIT);
    drop(guard);
    stopped.map_err(|error| anyhow!(error).context(format!("device {id}")))
}

/// Stops a device through the driver, which refuses where it is open.
fn stop_unless_open(
    control: &mut Control,
    id: u32,
    deadline: Instant,
    refusal: impl Fn(&[String]) -> anyhow::Error,
) -> Result<()> {
    loop {
        match control.try_stop(id, BUSY_LIMIT) {
            Ok(()) => return Ok(()),
            Err(error) if error.errno == libc::EBUSY && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(error) if error.errno == libc::EBUSY => return Err(refusal(&busy::users(id))),
            // Stopped already: its daemon is about to end.
            Err(error) if error.errno == libc::ENODEV => return Ok(()),
            Err(error) => return Err(anyhow!(error).context(format!("device {id}"))),
        }
    }
}

/// Opens a device so that nobody else can mount it, unless somebody uses it; nothing, where its
/// disk is gone.
fn exclusive(
    id: u32,
    deadline: Instant,
    refusal: impl Fn(&[String]) -> anyhow::Error,
) -> Result<Option<fs::File>> {
    loop {
        let users = busy::users(id);
        match busy::open_exclusively(id) {
            Ok(file) if users.is_empty() => return Ok(Some(file)),
            // The disk is gone: the device was stopped already.
            Err(error) if is_gone(&error) && users.is_empty() => return Ok(None),
            Err(error) if error.raw_os_error() != Some(libc::EBUSY) => {
                return Err(error).with_context(|| format!("opening /dev/ublkb{id}"));
            }
            _ if Instant::now() >= deadline => return Err(refusal(&users)),
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// What the daemon left behind says how its end was.
fn verdict(id: u32, pid: i32) -> Result<()> {
    let Some(state) = State::load(id) else { return Ok(()) };
    if i64::from(state.pid) != i64::from(pid) {
        return Ok(());
    }
    State::remove(id);
    match state.close_error {
        Some(text) => bail!(
            "device {id} was removed, but its image {} was not closed cleanly: {text}; run \
             `qemu-img check` on it",
            state.image_path
        ),
        None => bail!(
            "the server of device {id} died before it had closed the image {}; `qemu-img check` \
             may find leaked clusters",
            state.image_path
        ),
    }
}

/// Deletes what is left of the device, once nobody serves it.
fn remove(control: &mut Control, id: u32, force: bool) -> Result<()> {
    let deadline = Instant::now() + if force { FORCED_GONE_LIMIT } else { GONE_LIMIT };
    // A daemon that ended well has deleted its device already; one that died has not.
    match control.info(id) {
        Err(error) if error.errno == libc::ENODEV => {
            State::remove(id);
            return Ok(());
        }
        Ok(info) if Daemon::of(id, &info).is_some() => return Ok(()),
        _ => {}
    }
    match control.delete_soon(id) {
        Ok(()) => {}
        Err(error) if error.errno == libc::ENODEV => {}
        Err(error) => return Err(still_used(id, error)),
    }
    State::remove(id);
    loop {
        match control.info(id) {
            Err(error) if error.errno == libc::ENODEV => return Ok(()),
            _ if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            _ if force => {
                let users = busy::phrase(&busy::users(id));
                eprintln!(
                    "ublk-qcow2: device {id} is stopped; its number is free when nothing has it \
                     open any more ({users})"
                );
                return Ok(());
            }
            Ok(_) => {
                let users = busy::phrase(&busy::users(id));
                bail!("device {id} is stopped, but not gone: it is {users}; close or unmount it")
            }
            Err(error) => return Err(still_used(id, error)),
        }
    }
}

fn still_used(id: u32, error: ControlError) -> anyhow::Error {
    let users = busy::phrase(&busy::users(id));
    anyhow!(error).context(format!("device {id} is stopped, but cannot be removed ({users})"))
}

/// How long a process that was just killed may take to be gone.
const DYING: Duration = Duration::from_millis(50);

/// A living server process of ours.
struct Daemon {
    id: u32,
    pid: i32,
    handle: PidFd,
}

impl Daemon {
    /// The daemon of a device, if it is alive and ours. (The driver's own record of the server is
    /// gone as soon as the device has stopped, while the daemon still closes the image.)
    fn of(id: u32, info: &DevInfo) -> Option<Self> {
        let marked = device::marked_pid(info)?;
        let state = State::of(info);
        let recorded = state.as_ref().and_then(|state| i32::try_from(state.pid).ok());
        let pid = recorded.unwrap_or(marked);
        // Opened before the name is looked at: from here on the number cannot become another's.
        let handle = PidFd::open(Pid::from_raw(pid)).ok()?;
        // One that is dead, and that nobody has waited for, still has its name.
        if handle.ended_within(DYING).unwrap_or(false) {
            return None;
        }
        // While the device is live the driver itself says who serves it. Afterwards the number may
        // be another's by now, unless the process has our name.
        let serves = info.state == ublk::STATE_LIVE && info.ublksrv_pid == pid;
        let ours = serves
            || match state {
                Some(state) => state.has_server(),
                None => u32::try_from(pid).is_ok_and(State::is_server),
            };
        ours.then_some(Self { id, pid, handle })
    }

    /// Tells it to end, and returns since when it knows.
    fn stop(&self, control: &mut Control, features: u64, force: bool) -> Result<Instant> {
        if force {
            self.terminate()?;
            return Ok(Instant::now());
        }
        let deadline = Instant::now() + PATIENCE;
        if features & ublk::F_SAFE_STOP_DEV != 0 {
            stop_unless_open(control, self.id, deadline, |users| self.refusal(users))?;
            return Ok(Instant::now());
        }
        // Racy: somebody may open the device between this look and its end. While our exclusive
        // open lasts, at least nobody can mount it.
        let guard = exclusive(self.id, deadline, |users| self.refusal(users))?;
        self.terminate()?;
        let told = Instant::now();
        // `wait` has the longer limit; here nobody else can open the device for so long.
        let limit = told + PATIENCE;
        while control.info(self.id).is_ok_and(|info| info.state == ublk::STATE_LIVE)
            && Instant::now() < limit
        {
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(guard);
        Ok(told)
    }

    fn refusal(&self, users: &[String]) -> anyhow::Error {
        anyhow!(
            "/dev/ublkb{} is in use ({}); unmount or close it first, or give --force",
            self.id,
            busy::phrase(users)
        )
    }

    fn terminate(&self) -> Result<()> {
        match self.handle.terminate() {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                Err(error).with_context(|| format!("stopping the server (process {})", self.pid))
            }
            _ => Ok(()),
        }
    }

    /// Waits until the process has ended, which was told to.
    fn wait(&self, told: Instant) -> Result<()> {
        let (mut seen, mut progress) = (self.activity(), told);
        loop {
            if self.handle.ended_within(Duration::from_millis(200)).context("poll")? {
                return Ok(());
            }
            let now = self.activity();
            if now != seen {
                (seen, progress) = (now, Instant::now());
            }
            let how = match (progress.elapsed() > IDLE_LIMIT, told.elapsed() > BUSY_LIMIT) {
                (true, _) => format!("made no progress for {} s", IDLE_LIMIT.as_secs()),
                (_, true) => format!("is still busy after {} s", BUSY_LIMIT.as_secs()),
                _ => continue,
            };
            let (id, pid) = (self.id, self.pid);
            let next = match is_stopped(pid) {
                true => format!("it was stopped by a signal: `kill -CONT {pid}` lets it go on"),
                false => "it was left to go on".to_string(),
            };
            bail!("device {id}: its server (process {pid}) {how}; {next} closing the image");
        }
    }

    /// Changes as long as requests or the daemon's own I/O make progress.
    fn activity(&self) -> (String, String) {
        let read = |path: String| fs::read_to_string(path).unwrap_or_default();
        let (id, pid) = (self.id, self.pid);
        (read(format!("/proc/{pid}/io")), completed(&read(format!("/sys/block/ublkb{id}/stat"))))
    }
}

/// What of a block device's `stat` counts requests that have ended. The others (requests under way
/// and two times) go on where nothing moves.
fn completed(stat: &str) -> String {
    let fields = stat.split_whitespace().enumerate();
    let ended = fields.filter(|(index, _)| !(8..11).contains(index)).map(|(_, field)| field);
    ended.collect::<Vec<_>>().join(" ")
}

fn is_gone(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO | libc::ENODEV))
}

fn process_name(pid: i32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(name.trim_end().to_string())
}

/// Whether a process waits for SIGCONT.
fn is_stopped(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:\tT"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_passes_is_no_progress() {
        let before = "1 0 8 3 5 0 40 9 64 100 700 2 0 16 1 4 6";
        let waited = "1 0 8 3 5 0 40 9 64 300 900 2 0 16 1 4 6";
        assert_eq!(completed(before), completed(waited));
        for ended in [
            "2 0 8 3 5 0 40 9 64 100 700 2 0 16 1 4 6",
            "1 0 8 3 6 0 40 9 63 100 700 2 0 16 1 4 6",
            "1 0 8 3 5 0 40 9 64 100 700 3 0 16 1 4 6",
            "1 0 8 3 5 0 40 9 64 100 700 2 0 16 1 5 6",
        ] {
            assert_ne!(completed(before), completed(ended));
        }
    }
}
