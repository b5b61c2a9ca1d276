//! One ublk device from ADD_DEV to DEL_DEV.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::control::Control;
use crate::front::Delivery;
use crate::payload::DataPath;
use crate::ublk::{self, DevInfo, ParamBasic, ParamDiscard, Params};

/// Bytes of the largest request. A buffer of this size exists for each tag.
pub const MAX_REQUEST: u32 = 512 << 10;

/// How long udev or devtmpfs may take to make a device node.
const NODE_LIMIT: Duration = Duration::from_secs(10);

/// What the device is to be.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// The number in `/dev/ublkbN`; `None`: the first free one.
    pub id: Option<u32>,
    /// How many queues there are to be; the driver makes no more than there are CPUs.
    pub queues: u16,
    pub depth: u16,
    /// The data path, unless the best is to be taken.
    pub path: Option<DataPath>,
    /// How requests are handed over, unless the driver's best is to be taken.
    pub delivery: Option<Delivery>,
    /// The device of a user who need not be root.
    pub unprivileged: bool,
    /// The kernel looks for partitions.
    pub partscan: bool,
    /// What happens to requests while there is no server, if the device outlives it.
    pub recovery: Option<Recovery>,
    /// What the memory of requests has to be aligned to, where their pages go down.
    pub memory_alignment: u32,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Bytes of a logical block: 512 or 4096.
    pub block: u32,
    /// log2 of the cluster size, the optimal size of requests.
    pub cluster_bits: u32,
    pub read_only: bool,
    /// Does a discard do anything?
    pub discard: bool,
}

/// What happens to requests when the server of a device has died. The device stays, and `recover`
/// starts another server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Recovery {
    /// Those that the dead server had fail; new ones wait for its successor.
    Queue,
    /// All wait, and what the dead server had is sent again.
    Reissue,
    /// All fail until there is a successor (Linux 6.13).
    Fail,
}

impl Recovery {
    fn flags(self) -> u64 {
        ublk::F_USER_RECOVERY
            | match self {
                Self::Queue => 0,
                Self::Reissue => ublk::F_USER_RECOVERY_REISSUE,
                Self::Fail => ublk::F_USER_RECOVERY_FAIL_IO,
            }
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Reissue => "reissue",
            Self::Fail => "fail",
        }
    }
}

/// A device that was added. [`delete`](Self::delete) it in every case.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    pub info: DevInfo,
    pub path: DataPath,
    wanted: Wanted,
}

/// What a device of ours carries in the word that the driver keeps for servers: that it is ours,
/// and its server's process number. It is there from ADD_DEV on, unlike the driver's own record of
/// the server, so that a device can be found whose server died before it had started it.
fn mark(pid: u32) -> u64 {
    MARK << 32 | u64::from(pid)
}

/// The letters "qcow", where the mark of a device of ours begins.
const MARK: u64 = 0x7163_6f77;

/// The server's process number, if the device is ours.
pub fn marked_pid(info: &DevInfo) -> Option<i32> {
    let pid = i32::try_from(info.ublksrv_flags & u64::from(u32::MAX)).ok()?;
    (info.ublksrv_flags >> 32 == MARK).then_some(pid)
}

/// The path of the block device.
pub fn block_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

fn char_path(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkc{id}"))
}

impl Device {
    /// Adds the device; it has a character device and no parameters yet.
    pub fn add(control: &mut Control, wanted: Wanted) -> Result<Self> {
        if !wanted.size.is_multiple_of(u64::from(wanted.block)) {
            bail!(
                "the virtual disk has {} bytes, which is not a multiple of the logical block of \
                 {} bytes; give a smaller --block-size",
                wanted.size,
                wanted.block
            );
        }
        let features = control.features()?;
        let path = match (wanted.unprivileged, wanted.path) {
            (false, path) => choose(features, path)?,
            (true, None | Some(DataPath::Copy)) => DataPath::Copy,
            (true, Some(path)) => bail!(
                "an unprivileged device has no data path {}; leave --data-path out",
                path.name()
            ),
        };
        let recovery = wanted.recovery.map_or(0, Recovery::flags);
        if features & recovery != recovery {
            bail!(
                "the kernel's ublk driver has not what --recovery {} needs; it takes Linux {}",
                wanted.recovery.map_or("", Recovery::name),
                if recovery & ublk::F_USER_RECOVERY_FAIL_IO == 0 { "6.1" } else { "6.13" }
            );
        }
        let asked = DevInfo {
            nr_hw_queues: wanted.queues,
            queue_depth: wanted.depth,
            max_io_buf_bytes: MAX_REQUEST,
            dev_id: wanted.id.unwrap_or(u32::MAX),
            flags: ublk::F_CMD_IOCTL_ENCODE
                | if wanted.partscan { 0 } else { features & ublk::F_NO_AUTO_PART_SCAN }
                | path.flags()
                | recovery
                | upgrade(features, recovery)
                | deliver(features, wanted)?
                | if wanted.unprivileged { ublk::F_UNPRIVILEGED_DEV } else { 0 },
            ublksrv_flags: mark(std::process::id()),
            ..DevInfo::default()
        };
        let info =
            control.add(&asked).map_err(|error| explain(error.errno, error.into(), wanted.id))?;
        let device = Self { info, path, wanted };
        if wanted.unprivileged {
            // Until udev has made the user its owner, the driver takes no commands for it.
            device.open_char().with_context(|| {
                format!(
                    "udev has to give the nodes of device {0} to the user, by the rules of the \
                     package; `ublk-qcow2 del -n {0}` of root removes it",
                    device.id()
                )
            })?;
        }
        // The driver masks flags that it does not know without a word.
        if info.flags & asked.flags != asked.flags || info.nr_hw_queues > wanted.queues {
            device.delete(control);
            bail!(
                "the ublk driver changed what was asked for: flags {:#x} became {:#x}, {} queues \
                 {}",
                asked.flags,
                info.flags,
                wanted.queues,
                info.nr_hw_queues
            );
        }
        Ok(device)
    }

    /// A device that has lost its server, to be served by this process.
    pub fn resume(info: DevInfo, wanted: Wanted) -> Result<Self> {
        let has = |path: &DataPath| info.flags & path.flags() == path.flags();
        let path = DataPath::ALL.into_iter().find(has).context("the device has no data path")?;
        Ok(Self { info, path, wanted })
    }

    /// Takes the device over from the dead server; requests wait until
    /// [`finish_resume`](Self::finish_resume).
    pub fn begin_resume(&self, control: &mut Control) -> Result<()> {
        let deadline = Instant::now() + NODE_LIMIT;
        loop {
            match control.start_recovery(self.id()) {
                Err(error) if error.errno == libc::EBUSY && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) if error.errno == libc::EBUSY => {
                    bail!("device {} still has its dead server's character device open", self.id())
                }
                // Before 6.15, where a server has got this far and died before its queues had asked
                // for requests: the driver waits for those.
                Err(error) if error.errno == libc::EINVAL && self.waits(control) => {
                    return Ok(());
                }
                result => return Ok(result?),
            }
        }
    }

    /// Does it wait for a server?
    fn waits(&self, control: &mut Control) -> bool {
        let waiting = [ublk::STATE_QUIESCED, ublk::STATE_FAIL_IO];
        control.info(self.id()).is_ok_and(|info| waiting.contains(&info.state))
    }

    /// Whether a server may die at any moment of taking the device over: there is one queue, which
    /// asks for requests or does not, or the driver can stand a part of them. (It learned that
    /// together with batches. Before 6.15 it follows a null pointer then; later ones never give the
    /// dead server's commands back.)
    pub fn is_taken_whole(&self, control: &mut Control) -> Result<bool> {
        Ok(self.queues() == 1 || control.features()? & ublk::F_BATCH_IO != 0)
    }

    /// The device goes on. Every tag has to be fetched.
    pub fn finish_resume(&self, control: &mut Control) -> Result<PathBuf> {
        control.end_recovery(self.id(), std::process::id())?;
        Ok(block_path(self.id()))
    }

    /// How many queues there are.
    pub fn queues(&self) -> u16 {
        self.info.nr_hw_queues
    }

    /// The device's number.
    pub fn id(&self) -> u32 {
        self.info.dev_id
    }

    /// Bytes of the largest request.
    pub fn max_request(&self) -> u32 {
        self.info.max_io_buf_bytes.min(MAX_REQUEST)
    }

    /// Bytes of the block device: whole logical blocks.
    pub fn size(&self) -> u64 {
        self.wanted.size
    }

    /// Opens the character device, for the queue thread.
    pub fn open_char(&self) -> Result<File> {
        let path = char_path(self.id());
        let open = || OpenOptions::new().read(true).write(true).open(&path);
        until_there(open).with_context(|| format!("opening {}", path.display()))
    }

    /// Tells the driver size, block sizes and cache.
    pub fn set_params(&self, control: &mut Control) -> Result<()> {
        Ok(control.set_params(self.id(), self.params()?)?)
    }

    fn params(&self) -> Result<Params> {
        let max_sectors = self.max_request() / 512;
        let shift = |bytes: u32| u8::try_from(bytes.trailing_zeros()).unwrap_or(12);
        // A read-only disk has nothing to flush.
        let attrs = match self.wanted.read_only {
            true => ublk::ATTR_READ_ONLY,
            false => ublk::ATTR_VOLATILE_CACHE | ublk::ATTR_FUA,
        };
        let basic = ParamBasic {
            attrs,
            logical_bs_shift: shift(self.wanted.block),
            physical_bs_shift: 12,
            // Not above the largest request, and not below the physical block.
            io_opt_shift: shift((1u32 << self.wanted.cluster_bits).clamp(4096, self.max_request())),
            io_min_shift: 12,
            max_sectors,
            chunk_sectors: 0,
            dev_sectors: self.size() / ublk::SECTOR,
            virt_boundary_mask: 0,
        };
        // Less than 4 GiB at a time, so that the length in bytes fits 32 bits.
        let most = u32::MAX >> 9 & !7;
        let discard = ParamDiscard {
            alignment: 0,
            granularity: 1 << self.wanted.cluster_bits.max(12),
            // Without this the kernel has none, and who asks for one is told so.
            max_discard_sectors: if self.wanted.discard { most } else { 0 },
            max_write_zeroes_sectors: most,
            max_segments: 1,
            reserved: 0,
        };
        let len = u32::try_from(size_of::<Params>())?;
        let writable = if self.wanted.read_only { 0 } else { ublk::PARAM_DISCARD };
        let mut types = ublk::PARAM_BASIC | writable;
        let alignment = self.wanted.memory_alignment;
        if self.path == DataPath::ZeroCopy && alignment > 1 {
            types |= ublk::PARAM_DMA_ALIGN;
        }
        let dma_alignment = alignment.saturating_sub(1);
        Ok(Params { len, types, basic, discard, dma_alignment, ..Params::default() })
    }

    /// Starts the device and waits until its block device node can be opened.
    pub fn start(&self, control: &mut Control) -> Result<PathBuf> {
        control.start(self.id(), std::process::id())?;
        let devt = control.params(self.id())?.devt;
        let number = nix::sys::stat::makedev(devt.disk_major.into(), devt.disk_minor.into());
        let path = block_path(self.id());
        let open = || {
            let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
            let data = file.metadata()?;
            // Right after an older device of the same number, the node may still be the old one.
            match data.file_type().is_block_device() && data.rdev() == number {
                true => Ok(()),
                false => Err(io::Error::from_raw_os_error(libc::ENXIO)),
            }
        };
        until_there(open).map_err(|error| {
            let shown = path.display();
            // A program that writes to the path of a device that is gone leaves a plain file.
            match fs::symlink_metadata(&path) {
                Ok(data) if data.is_file() => {
                    anyhow!("a plain file is in the place of the device node {shown}; remove it")
                }
                _ => {
                    let limit = NODE_LIMIT.as_secs();
                    anyhow!("{shown} did not become usable within {limit} s: {error}")
                }
            }
        })?;
        Ok(path)
    }

    /// Deletes the device. What fails is only said: the caller is ending anyway.
    pub fn delete(&self, control: &mut Control) {
        if let Err(error) = control.delete_soon(self.id()) {
            tracing::warn!("device {}: {error}", self.id());
        }
    }
}

/// Repeats `open` while the node is missing (or still another), within a limit.
fn until_there<T>(open: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let deadline = Instant::now() + NODE_LIMIT;
    loop {
        match open() {
            Err(error) if is_not_there_yet(&error) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

fn is_not_there_yet(error: &io::Error) -> bool {
    // EACCES and EPERM: udev sets the owner a moment after the node appears.
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV | libc::EACCES | libc::EPERM | libc::EBUSY)
    )
}

/// What lets a server be replaced without one failed request, where a device outlives its server.
fn upgrade(features: u64, recovery: u64) -> u64 {
    if recovery == 0 { 0 } else { features & ublk::F_QUIESCE }
}

/// How requests are handed over. Not in batches where the device outlives its server: the driver of
/// 7.3 ends requests with an error that wait for the next server (`tests/guest/quiesce.sh` shows it
/// when this is taken out), and a number of a version does not tell where that is mended.
fn deliver(features: u64, wanted: Wanted) -> Result<u64> {
    let has = features & ublk::F_BATCH_IO != 0;
    match wanted.delivery {
        Some(Delivery::Batch) if !has => bail!(
            "the kernel's ublk driver does not deliver in batches; leave --delivery out to use \
             single"
        ),
        Some(Delivery::Batch) if wanted.recovery.is_some() => bail!(
            "--delivery batch and --recovery exclude each other, since the driver would let \
             requests fail; leave --delivery out"
        ),
        Some(Delivery::Batch) if wanted.depth < 2 => {
            bail!("--delivery batch needs a --depth of 2; leave --delivery out")
        }
        Some(Delivery::Batch) => Ok(ublk::F_BATCH_IO),
        None if has && wanted.recovery.is_none() && !wanted.unprivileged && wanted.depth > 1 => {
            Ok(ublk::F_BATCH_IO)
        }
        None | Some(Delivery::Single) => Ok(0),
    }
}

/// The data path: the one that was asked for, or the best that the driver has.
fn choose(features: u64, wanted: Option<DataPath>) -> Result<DataPath> {
    let has = |path: &DataPath| features & path.flags() == path.flags();
    match wanted {
        Some(path) if has(&path) => Ok(path),
        Some(path) => {
            let best = choose(features, None)?.name();
            bail!(
                "the kernel's ublk driver has no data path {}; leave --data-path out to use {best}",
                path.name()
            )
        }
        None => Ok(DataPath::ALL.into_iter().find(has).unwrap_or(DataPath::Copy)),
    }
}

fn explain(errno: i32, error: anyhow::Error, id: Option<u32>) -> anyhow::Error {
    match (errno, id) {
        (libc::EEXIST, Some(id)) => anyhow!(
            "device number {id} is taken; choose another with -n, or leave -n out for a free one"
        ),
        (libc::EPERM | libc::EACCES, _) => {
            anyhow!("not permitted to add ublk devices; run as root, or give --unprivileged")
        }
        (libc::EINVAL | libc::ENOSPC, Some(id)) => {
            error.context(format!("the driver refused device number {id}"))
        }
        _ => error.context("adding a ublk device"),
    }
}

/// The numbers of all ublk devices, in order.
pub fn all() -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    let entries = match fs::read_dir("/sys/class/ublk-char") {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ids),
        Err(error) => return Err(error).context("listing /sys/class/ublk-char"),
    };
    for entry in entries {
        let name = entry.context("listing /sys/class/ublk-char")?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("ublkc"));
        ids.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    ids.sort_unstable();
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_discards_only_where_they_do_something() {
        let params = |read_only, discard| {
            let wanted = Wanted {
                id: None,
                queues: 1,
                depth: 1,
                path: None,
                delivery: None,
                unprivileged: false,
                partscan: false,
                recovery: None,
                memory_alignment: 1,
                size: 1 << 30,
                block: 512,
                cluster_bits: 16,
                read_only,
                discard,
            };
            let info = DevInfo { max_io_buf_bytes: MAX_REQUEST, ..DevInfo::default() };
            Device { info, path: DataPath::Copy, wanted }.params().unwrap()
        };
        let limits = |params: Params| {
            let ParamDiscard { max_discard_sectors, max_write_zeroes_sectors, .. } = params.discard;
            let told = params.types & ublk::PARAM_DISCARD != 0;
            (told && max_discard_sectors != 0, told && max_write_zeroes_sectors != 0)
        };
        assert_eq!(limits(params(false, true)), (true, true));
        assert_eq!(limits(params(false, false)), (false, true));
        assert_eq!(limits(params(true, true)), (false, false));
    }
}
