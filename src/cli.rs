//! The command line.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::bench::BenchArgs;
use crate::device::Recovery;
use crate::front::Delivery;
use crate::lock;
use crate::log::Verbosity;
use crate::payload::DataPath;

/// Serves a qcow2 image as a block device /dev/ublkbN.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "\
Examples:
  ublk-qcow2 add -f vm.qcow2            prints /dev/ublkb0
  ublk-qcow2 add -f vm.qcow2 --read-only -n 7
  ublk-qcow2 add -f vm.qcow2 --read-only --snapshot before-upgrade
  ublk-qcow2 add -f overlay.qcow2 --allow-backing /srv/templates
  ublk-qcow2 list --json
  ublk-qcow2 stats -n 0 --watch
  ublk-qcow2 resize -n 0 40G
  ublk-qcow2 del -n 0
  ublk-qcow2 info -f vm.qcow2
  ublk-qcow2 check -f vm.qcow2 --repair leaks

Needs root, and the ublk driver (`modprobe ublk_drv`; Linux 6.5 or later). `check` and `info` need
neither."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const LIST_FIELDS: &str = "\
JSON, for each device:
  path, dev_id, state, flags…   what the driver says; state is LIVE, QUIESCED (its server has died
                    or handed it over, requests wait), FAIL_IO (they fail) or DEAD
  target            what its server recorded; null for devices of other servers. Of it:
    image_path, version, virtual_size, cluster_size, block_size, read_only
    data_path       zero-copy, user-copy or copy: how the bytes of requests travel
    delivery        batch or single: how requests themselves do
    direct          whether the image is read and written past the page cache
    recipe          the options of its `add`, if it has --recovery
    handed_over     its server has ended and waits for `recover`
    taking_over     another is taking it over, or has died while it did
    close_error     why the image could not be closed cleanly
    failed          why it took no writes any more when its server ran; `recover` refuses it
    trusted, pid, pid_since, added_by, identity      of --trust-content, of its server, of the image
    data_identity   of its external data file
  recovery          what --recovery said; null: the device ends with its server
  health            good; failed: why writes and flushes fail from now on; or that the server
                    is gone or does not answer
  degraded          whether it is failed; null if nobody answers
  stuck             operations on files that have not returned for 30 s: queue, file, operation,
                    count, seconds (of the first)
  stats, memory     of `stats --json`; null if nobody answers";

const STATS_FIELDS: &str = "\
Counters begin at 0 when a server starts. JSON:
  device, image, pid, health, degraded, stuck      as in `list --json`
  requests          for read, write, flush, discard, write_zeroes:
    requests, bytes, errors     that were replied to; errors are among the requests
    latency         from arrival to reply: sum_us, and in buckets how many took at most as many us
                    as latency_limits_us says at that place, and more than at the place before
  stats             of the engine:
    syncs           calls of fdatasync; fua_writes: writes with FUA, also counted as writes
    l2_hits, l2_misses, refcount_hits, refcount_misses      of the caches of tables
    metadata_reads, metadata_writes      of pages of tables
    allocated_data, allocated_metadata   host clusters
    copies, copied_bytes                 copy-on-write
    reserved, quarantined, overlay       now: clusters reserved ahead of need, clusters on their
                    way to being free, mappings whose data is not durable yet
  leak_bound        clusters that a crash now would leave counted and unused, at the most
  memory            bytes: caches (the budget), tables
  queues            for each: requests by kind, bytes, errors, mean_latency_us, what is under way,
                    operations and turns (system calls) of its ring; refused: requests of a kind
                    that is not served; responds: false if its thread does not answer
  log_lines_dropped

Prometheus: most of it, as ublk_qcow2_… with the labels device and image; latencies are the
histogram ublk_qcow2_request_duration_seconds. ublk_qcow2_up is 0, and all there is, while nobody
serves the device; the exit status is then 0 too.";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a block device of an image; prints its path when it is usable.
    Add(AddArgs),
    /// Stop devices: wait for their I/O, flush and close their images, remove them.
    #[command(after_help = "\
A device that is open or mounted is refused unless --force is given. Linux 7.0 and later test that
and stop the device in one step. Before, this program looks for openers first (in /proc, and with an
exclusive open): something that opens the device in the moment between is not seen.

Returns when the image is closed and its locks are released. Waits 15 s for a device that makes no
progress, and at most 60 s.")]
    Del(DelArgs),
    /// Serve a device again whose server has died; needs `add --recovery`.
    #[command(after_help = "\
Serves the same image with the options of its `add`, and prints the device's path when it goes on.
What the dead server had acknowledged is all there. Needs a boot that has not ended: after a power
cut, `add` is what serves the image again, and what was not flushed is lost.

If it fails, the device stays as it is, and `recover` can be tried again.")]
    Recover(RecoverArgs),
    /// Let the server of a device end and the device wait for another: an upgrade under way.
    #[command(after_help = "\
Requests under way end, the image is closed, the server ends; the device stays, and requests wait
until `ublk-qcow2 recover -n ID` serves them, with this or another version of the program. No
request fails (but with `--recovery fail`, what comes meanwhile). Needs `add --recovery` and Linux
6.16.")]
    Quiesce(QuiesceArgs),
    /// Make the disk of a device larger while it is in use.
    #[command(after_help = "\
Grows the image, and then the device; whoever uses it is told (of a file system: resize2fs,
xfs_growfs). Requests wait meanwhile, mostly for a moment; where the L1 table of a large image has
to move, until its refcounts are counted. None fails, but after a failure to write to the image it
takes no more writes. Nothing is made smaller. Needs Linux 6.16.

Refused, with the reason, for images with persistent bitmaps, an external data file, or a backing
file that is longer than the disk; `qemu-img resize` grows some of them while nobody uses them.")]
    Resize(ResizeArgs),
    /// Show ublk devices, also those of other servers.
    #[command(after_help = LIST_FIELDS)]
    List(ListArgs),
    /// Show what a device does: requests, latencies, caches, what is stuck.
    #[command(after_help = STATS_FIELDS)]
    Stats(StatsArgs),
    /// Check the tables of an image, and repair them.
    #[command(after_help = "\
Exit status, as of `qemu-img check`:
  0   no errors
  1   not checked: the file cannot be read, is in use, its header is bad, or the command is wrong
  2   corruptions (with --repair: those that are left)
  3   leaked clusters, and nothing worse
  63  the image is of a kind that cannot be checked or repaired: another version, a feature that is
      not known, or, for a repair, encryption (where `qemu-img check -f qcow2` may exit with 1)

A check only reads, and shares the image with other readers. A repair needs it for itself. Stopped
at any moment, a repair leaves the image no worse than it was. What it cannot put right without a
guess at the guest's data, it leaves: entries with bad offsets, clusters used twice.

JSON has the fields of `qemu-img check --output=json`, where zeros are left out, and the first 64
findings.")]
    Check(CheckArgs),
    /// Show what an image says of itself.
    #[command(after_help = "\
Opens nothing but the image, not even its backing or data file, and takes no lock. JSON has the
fields of `qemu-img info --output=json`, and \"features\" and \"stale-bitmaps\" of its own.")]
    Info(InfoArgs),
    /// Measure how fast an image is served, without a device.
    #[command(after_help = "\
The engine, its caches and the loop of a queue as `add` runs them, with requests made here. What is
written stays in the image; with a read kind it is opened for reading only.

Example, on a copy:
  ublk-qcow2 bench -f copy.qcow2 --rw write --bs 512k --count 2048 --stamp
  ublk-qcow2 bench -f copy.qcow2 --rw randread --depth 64 --stamp")]
    Bench(BenchArgs),
    /// Show what the kernel's ublk driver can do, and what of it is used.
    Features,
    /// Print what a package has besides the program.
    #[command(hide = true)]
    Dist(DistArgs),
    /// For the udev rules: print user and group of an unprivileged device, by the name of its node.
    #[command(hide = true)]
    Owner(OwnerArgs),
}

/// `add`
#[derive(Args, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddArgs {
    /// The qcow2 image: a file or a block device.
    #[arg(short = 'f', long = "file", value_name = "IMAGE")]
    pub file: PathBuf,

    /// Device number N of /dev/ublkbN; the first free one if left out.
    #[arg(short = 'n', long = "number", value_name = "ID",
          value_parser = clap::value_parser!(u32).range(0..1 << 20))]
    pub number: Option<u32>,

    /// Number of queues, each with a thread of its own; at most as many as there are CPUs.
    #[arg(short = 'q', long = "queues", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,

    /// How the bytes of requests travel; the best that the kernel has if left out.
    #[arg(long, value_name = "PATH", value_enum)]
    pub data_path: Option<DataPath>,

    /// How the driver hands requests over; if left out, many at a time where it can (Linux 7.0).
    /// One at a time with --unprivileged, a depth of 1, and --recovery (where batches let requests
    /// fail that wait for the next server).
    #[arg(long, value_name = "HOW", value_enum)]
    #[serde(default)]
    pub delivery: Option<Delivery>,

    /// Requests per queue that can be under way at the same time; without zero copy, each has a
    /// buffer of 512 KiB of address space.
    #[arg(short = 'd', long = "depth", value_name = "DEPTH", default_value_t = 128,
          value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub depth: u16,

    /// Serve the image for reading only. Nothing is written to it.
    #[arg(long)]
    pub read_only: bool,

    /// Serve this internal snapshot, named by its ID or name (or id=ID, name=NAME, where one is
    /// called what is another's ID); needs --read-only.
    #[arg(long, value_name = "ID|NAME", requires = "read_only")]
    pub snapshot: Option<OsString>,

    /// The external data file of an image that has one. The name in the image is not followed.
    #[arg(long, value_name = "PATH")]
    pub data_file: Option<PathBuf>,

    /// Also open backing files beneath this folder, or exactly this file or block device. Without
    /// it only those beneath the image's own folder are opened. May be given several times.
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,

    /// What a discard (TRIM) of whole clusters does.
    #[arg(long, value_enum, default_value_t)]
    pub discard: Discard,

    /// QEMU's image locks, on backing files and data files too.
    #[arg(long, value_enum, default_value_t)]
    pub lock: lock::Policy,

    /// Let the device outlive its server: what happens to requests after that has died, until
    /// `ublk-qcow2 recover` has started another. No acknowledged write is lost. Off if left out:
    /// then a dead server is as a disk that was unplugged.
    #[arg(long, value_name = "MODE", value_enum)]
    pub recovery: Option<Recovery>,

    /// A device of the user who runs this, who need not be root: plain copy, without --recovery.
    /// The user has to be let at /dev/ublk-control and the image, and udev gives the device's nodes
    /// to the user by the rules of the package. Nothing keeps the server from being swapped out, so
    /// no swap and no file system that the machine depends on should be on such a device.
    #[arg(long, conflicts_with = "recovery")]
    #[serde(default)]
    pub unprivileged: bool,

    /// Stay in the foreground; SIGINT (Ctrl-C) or SIGTERM stops the device. For a service manager
    /// too: it is told over NOTIFY_SOCKET when the device is usable.
    #[arg(long)]
    pub foreground: bool,

    /// Let udev and systemd look at what is on the disk, and act on it: file systems, volume
    /// groups, arrays. The udev rules of the package keep them from it otherwise.
    #[arg(long)]
    pub trust_content: bool,

    /// Let the kernel look for partitions on the disk. (Before Linux 7.0 it always does; on devices
    /// of users it never does.) Without it, `partx -a /dev/ublkbN` brings them when wanted.
    #[arg(long, conflicts_with = "unprivileged")]
    #[serde(default)]
    pub partscan: bool,

    /// Logical block size of the device in bytes: 512 or 4096.
    #[arg(long, value_name = "BYTES", default_value_t = 512, value_parser = block_size)]
    pub block_size: u32,

    /// Insist on direct I/O (O_DIRECT) on the image. It is the default where it is possible.
    #[arg(long, conflicts_with = "buffered")]
    pub direct: bool,

    /// Use the page cache for the image.
    #[arg(long)]
    pub buffered: bool,

    /// Memory for L2 tables, as 8M or 512K; by default enough for the whole image, at most 32M.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub l2_cache: Option<u64>,

    /// Memory for refcount blocks.
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = size)]
    pub refcount_cache: u64,

    /// How much is logged: to stderr in the foreground, in the background to the journal or to
    /// syslog. Warnings and errors if left out, or what RUST_LOG says.
    #[arg(long, value_name = "LEVEL", value_enum)]
    #[serde(default)]
    pub log: Option<Verbosity>,

    /// For tests: caches so small that every wait is waited.
    #[arg(long, hide = true)]
    pub stress: bool,
}

impl AddArgs {
    /// The same from any folder.
    pub fn absolute(&self) -> io::Result<Self> {
        let mut args = self.clone();
        let paths = args.data_file.iter_mut().chain(&mut args.allow_backing);
        for path in paths.chain([&mut args.file]) {
            *path = std::path::absolute(&*path)?;
        }
        Ok(args)
    }
}

/// `recover`
#[derive(Args, Debug)]
pub struct RecoverArgs {
    /// The device number N of /dev/ublkbN.
    #[arg(short = 'n', long = "number", value_name = "ID")]
    pub number: u32,

    /// Stay in the foreground; SIGINT (Ctrl-C) or SIGTERM stops the device.
    #[arg(long)]
    pub foreground: bool,

    /// How much is logged; as `add` was told if left out.
    #[arg(long, value_name = "LEVEL", value_enum)]
    pub log: Option<Verbosity>,
}

/// `quiesce`
#[derive(Args, Debug)]
pub struct QuiesceArgs {
    /// The device number N of /dev/ublkbN.
    #[arg(short = 'n', long = "number", value_name = "ID")]
    pub number: u32,
}

/// `resize`
#[derive(Args, Debug)]
pub struct ResizeArgs {
    /// The device number N of /dev/ublkbN.
    #[arg(short = 'n', long = "number", value_name = "ID")]
    pub number: u32,

    /// The new size of the disk in bytes; K, M, G and T are powers of 1024.
    #[arg(value_name = "SIZE", value_parser = size)]
    pub size: u64,
}

/// `add --discard`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Discard {
    /// Gives the host space back.
    #[default]
    Unmap,
    /// Keeps the host space, so that later writes need no new one.
    Keep,
    /// Nothing: the device has no discards.
    Ignore,
}

/// `del`
#[derive(Args, Debug)]
pub struct DelArgs {
    /// The device number N of /dev/ublkbN.
    #[arg(
        short = 'n',
        long = "number",
        value_name = "ID",
        required_unless_present = "all",
        conflicts_with = "all"
    )]
    pub number: Option<u32>,

    /// All devices of ublk-qcow2.
    #[arg(short = 'a', long)]
    pub all: bool,

    /// Also a device that is open or mounted: its users get I/O errors from then on. What they had
    /// written is flushed to the image.
    #[arg(long)]
    pub force: bool,
}

/// `list`
#[derive(Args, Debug)]
pub struct ListArgs {
    /// Only this device.
    #[arg(short = 'n', long = "number", value_name = "ID")]
    pub number: Option<u32>,

    /// As a JSON array, with live counters.
    #[arg(long)]
    pub json: bool,
}

/// `stats`
#[derive(Args, Debug)]
pub struct StatsArgs {
    /// The device number N of /dev/ublkbN.
    #[arg(short = 'n', long = "number", value_name = "ID")]
    pub number: u32,

    /// As a JSON object.
    #[arg(long, conflicts_with_all = ["prometheus", "watch"])]
    pub json: bool,

    /// In Prometheus' text format, for a textfile collector.
    #[arg(long, conflicts_with = "watch")]
    pub prometheus: bool,

    /// A line each second, until Ctrl-C: requests, bytes, mean latency, fdatasyncs.
    #[arg(long)]
    pub watch: bool,
}

/// `check`
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// The qcow2 image: a file or a block device.
    #[arg(short = 'f', long = "file", value_name = "IMAGE")]
    pub file: PathBuf,

    /// Repair: `leaks` frees leaked clusters; `all` makes all refcounts right, with new refcount
    /// tables where that takes it, and the flags that follow from them.
    #[arg(long, value_name = "WHAT")]
    pub repair: Option<RepairKind>,

    /// QEMU's image locks. Without them, make sure that nothing else uses the image.
    #[arg(long, value_enum, default_value_t)]
    pub lock: lock::Policy,

    /// How to print the result.
    #[arg(long, value_name = "FORMAT", default_value = "human")]
    pub output: Output,
}

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RepairKind {
    Leaks,
    All,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Human,
    Json,
}

/// `info`
#[derive(Args, Debug)]
pub struct InfoArgs {
    /// The qcow2 image: a file or a block device.
    #[arg(short = 'f', long = "file", value_name = "IMAGE")]
    pub file: PathBuf,

    /// How to print it.
    #[arg(long, value_name = "FORMAT", default_value = "human")]
    pub output: Output,
}

/// `owner`
#[derive(Args, Debug)]
pub struct OwnerArgs {
    /// As in /dev, such as ublkc0 or ublkb0p1.
    pub name: String,
}

/// `dist`
#[derive(Args, Debug)]
pub struct DistArgs {
    #[command(subcommand)]
    pub what: DistWhat,
}

/// What to print.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum DistWhat {
    /// Completions of this command line for a shell.
    Completions { shell: clap_complete::Shell },
    /// The manual page.
    Man,
}

fn block_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" | "4K" | "4k" => Ok(4096),
        _ => Err("expected 512 or 4096".to_string()),
    }
}

/// Bytes, with K, M, G or T for powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let error = || "expected a number of bytes, or one with K, M, G or T".to_string();
    let digits = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(error()),
    };
    let number: u64 = digits.parse().map_err(|_| error())?;
    number.checked_mul(1 << shift).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(size("512"), Ok(512));
        assert_eq!(size("8M"), Ok(8 << 20));
        assert_eq!(size("1kib"), Ok(1024));
        assert_eq!(size("2T"), Ok(2 << 40));
        assert!(size("").is_err() && size("1P").is_err() && size("99999999999G").is_err());
    }
}
