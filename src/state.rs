//! `/run/ublk-qcow2`: what a daemon says about its device to `list` and `del`. (Of other users than
//! root that is `$XDG_RUNTIME_DIR/ublk-qcow2`.)
//!
//! `N.json` describes the daemon of device N. It is written when the device is there, rewritten if
//! closing the image fails, and removed after a clean close. So after a daemon has ended: no file
//! means all is well, a file with `close_error` says what failed, and a file without it means that
//! the daemon died. `N.sock` gives live figures as JSON, one object per connection; `N.orders`
//! takes what it is to do (`orders.rs`). A device that outlives its daemon also has `N.journal`
//! and `N.fence` (`journal.rs`, `fence.rs`). `N.trusted` or `N.untrusted`, which is empty, is for
//! the udev rules (`src/dist/`).

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::cli::AddArgs;
use crate::device;
use crate::figures::Figures;
use crate::ublk::DevInfo;

/// The folder of root.
pub const FOLDER: &str = "/run/ublk-qcow2";

/// The folder of the user who runs this.
pub fn folder() -> PathBuf {
    let user = nix::unistd::geteuid();
    if user.is_root() {
        return FOLDER.into();
    }
    let own = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
    own.unwrap_or_else(|| format!("/run/user/{user}").into()).join("ublk-qcow2")
}

/// A daemon and its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub id: u32,
    /// The process that serves it.
    pub pid: u32,
    /// When that began, in the kernel's ticks since the machine did: the number may become
    /// another's.
    #[serde(default)]
    pub pid_since: u64,
    /// The process that added it: what the driver keeps as the device's mark.
    pub added_by: u32,
    /// The image as it was given on the command line.
    pub image: String,
    /// The same, absolute.
    pub image_path: String,
    /// The qcow2 version.
    pub version: u32,
    pub virtual_size: u64,
    pub cluster_size: u64,
    pub read_only: bool,
    pub direct: bool,
    pub block_size: u32,
    /// Whether udev may act on what is on the disk.
    #[serde(default)]
    pub trusted: bool,
    /// How payload travels between kernel and daemon.
    pub data_path: String,
    #[serde(default)]
    pub delivery: String,
    /// Why closing the image failed.
    pub close_error: Option<String>,
    /// Why the image takes no writes any more, since when its server ran.
    #[serde(default)]
    pub failed: Option<String>,
    /// Which file the image is, whatever its name.
    #[serde(default)]
    pub identity: (u64, u64),
    /// And its external data file.
    #[serde(default)]
    pub data_identity: Option<(u64, u64)>,
    /// How to serve it again, for a device that outlives its server.
    pub recipe: Option<AddArgs>,
    /// A server was about to take the device over when this was written, and died if it still is
    /// there: the driver may know a part of its queues, and before Linux 7.0 it must not be asked
    /// to let another take over then.
    #[serde(default)]
    pub taking_over: bool,
    /// The server has closed the image and ended, and the device waits for another.
    #[serde(default)]
    pub handed_over: bool,
}

/// When a process began, in ticks since the machine did.
pub fn process_start(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc(5): the 22nd field; the second is a name in brackets, which may hold anything.
    text.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The path of a file of our own about a device.
pub fn path(id: u32, what: &str) -> PathBuf {
    folder().join(format!("{id}.{what}"))
}

/// Makes the folder, for this user alone.
pub fn make_folder() -> Result<()> {
    let folder = folder();
    let shown = folder.display();
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("making the folder {shown}"))
        }
        _ => {
            let data = fs::symlink_metadata(&folder).with_context(|| shown.to_string())?;
            if !data.is_dir() || data.uid() != nix::unistd::geteuid().as_raw() {
                bail!("{shown} is not a folder of this user; remove it");
            }
            Ok(())
        }
    }
}

impl State {
    /// What is recorded for a device, if anything.
    pub fn load(id: u32) -> Option<Self> {
        let bytes = fs::read(path(id, "json")).ok()?;
        serde_json::from_slice(&bytes).ok().filter(|state: &Self| state.id == id)
    }

    /// An error if a device without a server waits for one with this image: what its users wrote
    /// comes before anything else that is written.
    pub fn refuse_waiting(identity: (u64, u64)) -> Result<()> {
        let Some(state) = Self::waiting_for(identity) else { return Ok(()) };
        bail!(
            "device {0} has lost its server and waits for another with this image; \
             `ublk-qcow2 recover -n {0}` serves it, `ublk-qcow2 del -n {0} --force` gives up what \
             was not flushed",
            state.id
        )
    }

    fn waiting_for(identity: (u64, u64)) -> Option<Self> {
        let names = fs::read_dir(folder()).ok()?.flatten().map(|entry| entry.file_name());
        let id = |name: OsString| name.to_str()?.strip_suffix(".json")?.parse().ok();
        let mut states = names.filter_map(id).filter_map(Self::load);
        states.find(|state| {
            let there = Path::new(&format!("/dev/ublkc{}", state.id)).exists();
            let waits = state.recipe.is_some() && !state.read_only && there;
            waits && state.identity == identity && !state.has_server()
        })
    }

    /// What is recorded for this very device, and not for an earlier one of its number.
    pub fn of(info: &DevInfo) -> Option<Self> {
        let marked = device::marked_pid(info).and_then(|pid| u32::try_from(pid).ok())?;
        Self::load(info.dev_id).filter(|state| state.added_by == marked)
    }

    /// The same of a device that is named as one of ours.
    pub fn recorded(info: &DevInfo) -> Result<Self> {
        Self::of(info).with_context(|| {
            format!(
                "of device {} nothing is recorded in {} that can be read; it is not one of \
                 ublk-qcow2, or of another user or version of it",
                info.dev_id,
                folder().display()
            )
        })
    }

    /// Whether the process that is recorded still runs. (It may have ended, and not be waited for.)
    pub fn has_server(&self) -> bool {
        let same = self.pid_since == 0 || process_start(self.pid) == Some(self.pid_since);
        same && Self::is_server(self.pid)
    }

    /// Whether a process has the name of this program; it may be a renamed copy, and so have we.
    pub fn is_server(pid: u32) -> bool {
        let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).ok();
        name(&pid.to_string()).is_some_and(|found| Some(found) == name("self"))
    }

    /// Writes it, all or nothing.
    pub fn store(&self) -> Result<()> {
        make_folder()?;
        let path = path(self.id, "json");
        let fresh = path.with_extension("json.new");
        let text = serde_json::to_vec_pretty(self)?;
        fs::write(&fresh, text)
            .and_then(|()| fs::rename(&fresh, &path))
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Says to the udev rules that the device is ours, and what they shall do with it.
    pub fn tell_udev(&self) -> Result<()> {
        make_folder()?;
        let (mark, other) = match self.trusted {
            true => ("trusted", "untrusted"),
            false => ("untrusted", "trusted"),
        };
        let (mark, other) = (path(self.id, mark), path(self.id, other));
        // An earlier server of this number may have died.
        match fs::remove_file(&other) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
        .with_context(|| format!("removing {}", other.display()))?;
        fs::write(&mark, []).with_context(|| format!("making {}", mark.display()))
    }

    /// Removes what the udev rules were told: another device may get the number.
    pub fn forget_trust(id: u32) {
        for file in ["trusted", "untrusted"] {
            let _ = fs::remove_file(path(id, file));
        }
    }

    /// Removes what is recorded for a device.
    pub fn remove(id: u32) {
        // Missing is as good as removed, and nothing depends on the rest.
        for file in ["json", "sock", "orders", "journal", "fence"] {
            let _ = fs::remove_file(path(id, file));
        }
        Self::forget_trust(id);
    }
}

/// Listens on a socket of the device: `sock` for those who want figures, `orders` for orders.
pub fn listen(id: u32, what: &str) -> Result<UnixListener> {
    make_folder()?;
    let path = path(id, what);
    let _ = fs::remove_file(&path);
    let listener =
        UnixListener::bind(&path).with_context(|| format!("making {}", path.display()))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Answers everybody who is waiting.
pub fn answer(listener: &UnixListener, figures: impl Fn() -> Figures) {
    while let Ok((mut stream, _)) = listener.accept() {
        // The text is smaller than a socket's buffer, so this does not wait; a client that is
        // gone is its own concern.
        let _ = stream.set_nonblocking(true);
        let text = serde_json::to_vec(&figures()).unwrap_or_default();
        let _ = stream.write_all(&text);
    }
}

/// The live figures of a device, if its daemon answers in time.
pub fn figures(id: u32, limit: Duration) -> Option<serde_json::Value> {
    let (sender, receiver) = mpsc::channel();
    // In a thread, since connecting to a daemon that does not accept has no limit of its own.
    std::thread::spawn(move || {
        let ask = || -> io::Result<serde_json::Value> {
            let mut stream = UnixStream::connect(path(id, "sock"))?;
            stream.set_read_timeout(Some(limit))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(serde_json::from_str(&text)?)
        };
        let _ = sender.send(ask().ok());
    });
    receiver.recv_timeout(limit).ok().flatten()
}
