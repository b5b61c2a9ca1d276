//! `list` and `features`: what there is, and what the kernel can do.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use crate::cli::{ListArgs, OwnerArgs};
use crate::control::Control;
use crate::device;
use crate::figures::Figures;
use crate::front::Delivery;
use crate::state::{self, State};
use crate::ublk::{self, DevInfo, Params};

/// How long to wait for the figures of one device.
const PATIENCE: Duration = Duration::from_secs(1);

/// A device as it is shown.
struct Entry {
    info: DevInfo,
    params: Params,
    /// What its daemon recorded, if it is ours.
    state: Option<State>,
    /// Its live figures, if it answers.
    figures: Option<Value>,
}

/// Runs `list`.
pub fn run(args: &ListArgs) -> Result<()> {
    let mut control = Control::open()?;
    control.features()?;
    let ids = match args.number {
        Some(id) => vec![id],
        None => device::all()?,
    };
    let mut entries = Vec::new();
    for id in ids {
        match Entry::of(&mut control, id) {
            Ok(entry) => entries.push(entry),
            // Deleted since the folder was read, or asked for by number and not there.
            Err(error) if error.errno == libc::ENODEV && args.number.is_none() => {}
            // Of somebody else.
            Err(error) if is_denied(error.errno) && args.number.is_none() => {}
            Err(error) if error.errno == libc::ENODEV => {
                return Err(anyhow!("there is no ublk device {id}; leave -n out to see all"));
            }
            Err(error) => return Err(anyhow!(error).context(format!("device {id}"))),
        }
    }
    // Only now: asking takes threads, and after those there are no new processes for commands.
    entries.iter_mut().for_each(Entry::ask);
    let text = match args.json {
        true => {
            let all: Vec<Value> = entries.iter().map(Entry::json).collect();
            serde_json::to_string_pretty(&all)? + "\n"
        }
        false => entries.iter().map(Entry::text).collect(),
    };
    io::stdout().write_all(text.as_bytes()).context("writing to stdout")
}

impl Entry {
    fn of(control: &mut Control, id: u32) -> Result<Self, crate::control::ControlError> {
        let info = control.info(id)?;
        // A device that was added but never given parameters has none.
        let params = control.params(id).unwrap_or_default();
        let state = State::of(&info);
        Ok(Self { info, params, state, figures: None })
    }

    fn ask(&mut self) {
        let id = self.info.dev_id;
        self.figures = self.state.as_ref().and_then(|_| state::figures(id, PATIENCE));
    }

    /// The live figures as we read them; of none nothing.
    fn read(&self) -> Figures {
        let figures = self.figures.clone().map(serde_json::from_value);
        figures.and_then(Result::ok).unwrap_or_default()
    }

    fn recovery(&self) -> Option<&'static str> {
        let recipe = self.state.as_ref()?.recipe.as_ref()?;
        recipe.recovery.map(device::Recovery::name)
    }

    fn block_size(&self) -> u32 {
        1u32.checked_shl(self.params.basic.logical_bs_shift.into()).unwrap_or(0)
    }

    fn health(&self) -> &str {
        let told = self.figures.as_ref().and_then(|figures| figures["health"].as_str());
        told.unwrap_or(match self.info.state {
            ublk::STATE_LIVE => "unknown (the server does not answer)",
            _ => "the server is gone",
        })
    }

    fn text(&self) -> String {
        let (info, devt) = (&self.info, &self.params.devt);
        let mut text = format!(
            "dev id {}: nr_hw_queues {} queue_depth {} block size {} dev_capacity {}\n\
             \tmax rq size {} daemon pid {} flags {:#x} state {}\n\
             \tublkc: {}:{} ublkb: {}:{} owner: {}:{}\n",
            info.dev_id,
            info.nr_hw_queues,
            info.queue_depth,
            self.block_size(),
            self.params.basic.dev_sectors,
            info.max_io_buf_bytes,
            info.ublksrv_pid,
            info.flags,
            ublk::state_name(info.state),
            devt.char_major,
            devt.char_minor,
            devt.disk_major,
            devt.disk_minor,
            info.owner_uid,
            info.owner_gid,
        );
        if let Some(state) = &self.state {
            text += &format!(
                "\ttarget qcow2 version {} cluster size {} image {}{}\n\
                 \tdata path {} delivery {} queues {} file I/O {} recovery {} health {}\n",
                state.version,
                state.cluster_size,
                plain(&state.image_path),
                if state.read_only { " (read-only)" } else { "" },
                state.data_path,
                Delivery::of(info).name(),
                info.nr_hw_queues,
                if state.direct { "direct" } else { "buffered" },
                self.recovery().unwrap_or("none"),
                plain(self.health()),
            );
            for stuck in self.read().stuck {
                text += &format!("\tstuck: {}\n", stuck.text());
            }
            if let Some(error) = &state.close_error {
                text += &format!("\tthe image was not closed cleanly: {}\n", plain(error));
            }
        }
        text
    }

    fn json(&self) -> Value {
        let (info, devt) = (&self.info, &self.params.devt);
        json!({
            "dev_id": info.dev_id,
            "path": device::block_path(info.dev_id).display().to_string(),
            "nr_hw_queues": info.nr_hw_queues,
            "queue_depth": info.queue_depth,
            "block_size": self.block_size(),
            "dev_capacity": self.params.basic.dev_sectors,
            "max_rq_size": info.max_io_buf_bytes,
            "daemon_pid": info.ublksrv_pid,
            "flags": info.flags,
            "flag_names": names(info.flags),
            "state": ublk::state_name(info.state),
            "ublkc": format!("{}:{}", devt.char_major, devt.char_minor),
            "ublkb": format!("{}:{}", devt.disk_major, devt.disk_minor),
            "owner_uid": info.owner_uid,
            "owner_gid": info.owner_gid,
            "target_type": self.state.as_ref().map(|_| "qcow2"),
            "target": self.state,
            "recovery": self.recovery(),
            "health": self.state.as_ref().map(|_| self.health()),
            "degraded": self.figures.as_ref().map(|figures| &figures["degraded"]),
            "stuck": self.figures.as_ref().map(|figures| &figures["stuck"]),
            "stats": self.figures.as_ref().map(|figures| &figures["stats"]),
            "memory": self.figures.as_ref().map(|figures| &figures["memory"]),
        })
    }
}

fn is_denied(errno: i32) -> bool {
    matches!(errno, libc::EPERM | libc::EACCES)
}

/// Runs `owner`: what udev makes the owner of a node.
pub fn owner(args: &OwnerArgs) -> Result<()> {
    let digits = |rest: &str| rest.split('p').next().and_then(|number| number.parse().ok());
    let number = args.name.strip_prefix("ublkc").or(args.name.strip_prefix("ublkb"));
    let id = number.and_then(digits).with_context(|| format!("{} is no ublk device", args.name))?;
    let info = Control::open()?.named(id)?;
    if info.flags & ublk::F_UNPRIVILEGED_DEV == 0 {
        bail!("device {id} is not one of a user");
    }
    writeln!(io::stdout(), "{} {}", info.owner_uid, info.owner_gid).context("writing to stdout")
}

/// Without control characters: names come from elsewhere, and lines are lines.
pub fn plain(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { '?' } else { char }).collect()
}

fn names(flags: u64) -> Vec<String> {
    let mut names = Vec::new();
    for bit in (0..64).filter(|bit| flags >> bit & 1 == 1) {
        let known = ublk::FEATURES.iter().find(|(known, _, _)| *known == bit);
        names.push(known.map_or_else(|| format!("bit {bit}"), |(_, name, _)| name.to_string()));
    }
    names
}

/// Runs `features`.
pub fn features() -> Result<()> {
    let flags = Control::open()?.features()?;
    let mut text = format!("ublk_drv features: {flags:#x}\n");
    for (bit, name, since) in ublk::FEATURES {
        let state = match (flags >> bit & 1 == 1, is_used(bit)) {
            (true, true) => "yes, used",
            (true, false) => "yes",
            (false, _) => "no",
        };
        text += &format!("\t{name:<24} since {since:<5} {state}\n");
    }
    for name in names(flags).iter().filter(|name| name.starts_with("bit ")) {
        text += &format!("\t{name:<24} unknown     yes\n");
    }
    io::stdout().write_all(text.as_bytes()).context("writing to stdout")
}

fn is_used(bit: u32) -> bool {
    ublk::F_USED >> bit & 1 == 1
}
