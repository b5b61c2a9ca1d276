//! `recover` and `quiesce`: another server for a device that stays.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::unistd::Pid;

use crate::cli::{AddArgs, QuiesceArgs, RecoverArgs};
use crate::control::Control;
use crate::daemon::Reporter;
use crate::orders::{self, Order};
use crate::server::{self, What};
use crate::state::State;
use crate::sys::PidFd;
use crate::ublk::{self, DevInfo};

/// How long the driver may take to notice that a server has died, and a dying one to be gone.
const GONE_LIMIT: Duration = Duration::from_secs(10);

/// How long a server may take to hand its device over: requests under way have to end, and then the
/// image has to be closed.
const CLOSE_LIMIT: Duration = Duration::from_secs(90);

/// Runs `recover`.
pub fn recover(args: &RecoverArgs) -> Result<()> {
    let mut control = Control::open()?;
    control.features()?;
    let (info, state, recipe) = waiting(&mut control, args.number)?;
    drop(control);
    let image = state.image_path.clone();
    let what = What::Old { info, state: Box::new(state) };
    let verbosity = args.log.or(recipe.log);
    let serve = |reporter: &mut Reporter| server::serve(&recipe, what, reporter);
    crate::run_server(args.foreground, verbosity, true, serve)
        .with_context(|| format!("device {}, image {image}", args.number))
}

/// Runs `quiesce`.
pub fn quiesce(args: &QuiesceArgs) -> Result<()> {
    let id = args.number;
    let mut control = Control::open()?;
    if control.features()? & ublk::F_QUIESCE == 0 {
        bail!(
            "the kernel's ublk driver cannot quiesce a device (Linux 6.16 can); a server that is \
             killed is replaced by `ublk-qcow2 recover`, too"
        );
    }
    let (info, state, _) = find(&mut control, id)?;
    refuse_unserved(&info)?;
    let server = pid_of(&state).and_then(|pid| PidFd::open(pid).ok());
    let server = server.with_context(|| {
        format!("device {id} has lost its server; `ublk-qcow2 recover -n {id}` serves it again")
    })?;
    orders::give(&state, &Order::HandOver)?;
    if !server.ended_within(CLOSE_LIMIT).context("poll")? {
        bail!(
            "the server of device {id} (process {}) has not handed it over within {} s; \
             `ublk-qcow2 list -n {id}` says what it waits for, and `ublk-qcow2 recover -n {id}` \
             goes on when it has",
            state.pid,
            CLOSE_LIMIT.as_secs()
        );
    }
    match State::load(id) {
        Some(State { handed_over: true, .. }) => Ok(()),
        Some(State { close_error: Some(text), .. }) => {
            bail!("device {id}: the image was not closed cleanly: {text}")
        }
        Some(_) => bail!(
            "the server of device {id} died before it had closed the image; `ublk-qcow2 recover \
             -n {id}` serves it again"
        ),
        None => bail!("device {id} was removed meanwhile"),
    }
}

/// A device of ours that waits for another server, as it is now.
pub fn waiting(control: &mut Control, id: u32) -> Result<(DevInfo, State, AddArgs)> {
    let (info, state, recipe) = find(control, id)?;
    let info = without_server(control, info, &state)?;
    refuse_failed(&state)?;
    Ok((info, state, recipe))
}

/// A sync that has failed may seem to succeed when it is tried again.
fn refuse_failed(state: &State) -> Result<()> {
    let Some(text) = &state.failed else { return Ok(()) };
    bail!(
        "device {0}: the image {1} had failed before its server died ({text}), so what was \
         acknowledged may be lost; `ublk-qcow2 del -n {0} --force` removes the device, then look \
         at the image with `ublk-qcow2 check`",
        state.id,
        state.image_path
    )
}

/// Called with the fence in hand: nobody is taking it over at the moment.
pub fn refuse_half_taken(state: &State) -> Result<()> {
    if !state.taking_over {
        return Ok(());
    }
    bail!(
        "device {0}: a server died in the instant in which it took the device over, and the ublk \
         driver of Linux before 7.0 would crash or hang if another tried; what was acknowledged is \
         in the image {1}: `ublk-qcow2 del -n {0} --force` removes the device, then add it again",
        state.id,
        state.image_path
    )
}

/// An error for a device that nobody serves at the moment.
pub fn refuse_unserved(info: &DevInfo) -> Result<()> {
    if info.state == ublk::STATE_LIVE {
        return Ok(());
    }
    bail!(
        "device {0} is in state {1}, and not being served; `ublk-qcow2 recover -n {0}` does",
        info.dev_id,
        ublk::state_name(info.state)
    )
}

/// A device of ours that outlives its server.
fn find(control: &mut Control, id: u32) -> Result<(DevInfo, State, AddArgs)> {
    let info = control.named(id)?;
    let state = State::recorded(&info)?;
    let Some(recipe) = state.recipe.clone() else {
        bail!(
            "device {id} was added without --recovery, so it ends with its server; \
             `ublk-qcow2 del -n {id}` removes it, `add` serves the image again"
        );
    };
    Ok((info, state, AddArgs { number: Some(id), ..recipe }))
}

/// The device as it is without its server; an error if that lives.
fn without_server(control: &mut Control, found: DevInfo, state: &State) -> Result<DevInfo> {
    let id = found.dev_id;
    if let Some(server) = pid_of(state).and_then(|pid| PidFd::open(pid).ok())
        && state.has_server()
        && !server.ended_within(Duration::from_secs(1)).context("poll")?
    {
        bail!(
            "device {id} is served by process {}; end that first (`ublk-qcow2 quiesce -n {id}` \
             where the kernel has it, or kill it)",
            state.pid
        );
    }
    // A server that died a moment ago: the driver is about to notice.
    let deadline = Instant::now() + GONE_LIMIT;
    loop {
        let info = control.info(id).map_err(|error| anyhow!(error).context(format!("{id}")))?;
        match info.state {
            ublk::STATE_QUIESCED | ublk::STATE_FAIL_IO => return Ok(info),
            ublk::STATE_LIVE if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => bail!(
                "device {id} is in state {}, and cannot be recovered; `ublk-qcow2 del -n {id}` \
                 removes it",
                ublk::state_name(other)
            ),
        }
    }
}

fn pid_of(state: &State) -> Option<Pid> {
    i32::try_from(state.pid).ok().map(Pid::from_raw)
}
