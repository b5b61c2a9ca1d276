//! `bench`: the engine and the queue loop as they serve a device, with requests that are made here
//! in the place of the ublk driver's. What `qemu-img bench` is to QEMU.
//!
//! The payload of a request is a buffer of ours, as on the data path `copy`, but nobody copies it.

use std::path::PathBuf;
use std::sync::{Arc, Barrier, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use qcow2::{Options, Stats};
use serde_json::json;

use crate::cli::{self, Output};
use crate::core::Core;
use crate::decode::Limits;
use crate::device::MAX_REQUEST;
use crate::driver::Common;
use crate::front::Requests;
use crate::generator::{Kind, Outcome, Plan};
use crate::link::{self, Event, MainEnd, QueueEnd};
use crate::lock;
use crate::meter::{self, Latency};
use crate::open::{self, Mode, Opened};
use crate::payload::DataPath;
use crate::queue::{self, Setup};
use crate::state::State;

/// How long the image's first fdatasync may take.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// `bench`
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// The qcow2 image: a file or a block device.
    #[arg(short = 'f', long = "file", value_name = "IMAGE")]
    pub file: PathBuf,

    /// What the requests are; randrw: half of them reads. All but read and randread OVERWRITE what
    /// is on the disk.
    #[arg(long, value_name = "KIND", value_enum, default_value = "randread")]
    pub rw: Kind,

    /// Bytes of a request: a multiple of 512, at most 512K.
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = cli::size)]
    pub bs: u64,

    /// Requests under way at the same time, in each queue.
    #[arg(short = 'd', long, value_name = "DEPTH", default_value_t = 64,
          value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub depth: u16,

    /// Requests in all.
    #[arg(long, value_name = "N", default_value_t = 1_000_000,
          value_parser = clap::value_parser!(u64).range(1..))]
    pub count: u64,

    /// Queues, each with a thread of its own.
    #[arg(short = 'q', long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,

    /// Use so many bytes from the beginning of the disk; all of it if left out.
    #[arg(long, value_name = "SIZE", value_parser = cli::size)]
    pub size: Option<u64>,

    /// A FLUSH after each N writes.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub flush_after: u64,

    /// Write what tells its own place, and test what is read for it. (Write it first, with
    /// `--rw write --stamp` and a count that covers the disk.)
    #[arg(long)]
    pub stamp: bool,

    /// Where the random numbers begin.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Insist on direct I/O (O_DIRECT). It is the default where it is possible.
    #[arg(long, conflicts_with = "buffered")]
    pub direct: bool,

    /// Use the page cache.
    #[arg(long)]
    pub buffered: bool,

    /// Memory for L2 tables; by default enough for the whole image, at most 32M.
    #[arg(long, value_name = "SIZE", value_parser = cli::size)]
    pub l2_cache: Option<u64>,

    /// The external data file of an image that has one.
    #[arg(long, value_name = "PATH")]
    pub data_file: Option<PathBuf>,

    /// Also open backing files beneath this folder. May be given several times.
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,

    /// QEMU's image locks.
    #[arg(long, value_enum, default_value_t)]
    pub lock: lock::Policy,

    /// How to print the result.
    #[arg(long, value_name = "FORMAT", default_value = "human")]
    pub output: Output,
}

/// Runs `bench`.
pub fn run(args: &BenchArgs) -> Result<()> {
    let bytes = request_bytes(args)?;
    if args.count < args.queues.into() {
        bail!("--count {} is less than a request for each of {} queues", args.count, args.queues);
    }
    let wanted = wanted(args);
    if !args.rw.is_read() {
        State::refuse_waiting(open::look(&wanted)?)?;
        open::mend(&wanted, &mut |_| Ok(()))?;
    }
    let opened = open::open(&wanted)?;
    opened.prepare()?;
    let disk = opened.engine.virtual_size();
    let size = args.size.unwrap_or(disk).min(disk) / u64::from(bytes) * u64::from(bytes);
    if size == 0 {
        bail!("the disk has {disk} bytes, less than one request of {bytes}");
    }
    let outcome = Arc::default();
    let plan = Plan {
        kind: args.rw,
        bytes,
        size,
        count: args.count,
        queues: args.queues,
        flush_after: args.flush_after,
        stamps: args.stamp,
        seed: args.seed,
        start: Arc::new(Barrier::new(args.queues.into())),
        outcome: Arc::clone(&outcome),
    };
    let setup = setup(opened, plan, args.depth)?;
    let core = Arc::clone(&setup.core);
    let main = play(&setup, args.queues)?;
    let cpu = cpu_seconds()?;
    let outcome = std::mem::take(&mut *outcome.lock().unwrap_or_else(PoisonError::into_inner));
    let stats = core.lock().engine.stats();
    tell(args, &outcome, &stats, &main, cpu)
}

fn request_bytes(args: &BenchArgs) -> Result<u32> {
    u32::try_from(args.bs)
        .ok()
        .filter(|bs| (512..=MAX_REQUEST).contains(bs) && bs.is_multiple_of(512))
        .with_context(|| format!("--bs {}: expected a multiple of 512, at most 512K", args.bs))
}

fn wanted(args: &BenchArgs) -> open::Wanted {
    let options = Options {
        read_only: args.rw.is_read(),
        queues: args.queues,
        depth: args.depth,
        l2_cache: args.l2_cache,
        ..Options::default()
    };
    open::Wanted {
        mode: Mode::of(args.direct, args.buffered),
        data_file: args.data_file.clone(),
        allow_backing: args.allow_backing.clone(),
        lock: args.lock,
        ..open::Wanted::new(&args.file, options)
    }
}

/// Queues for the requests of a plan.
pub fn setup(opened: Opened, plan: Plan, depth: u16) -> Result<Setup> {
    let copies = opened.engine.copy_buffers();
    let size = opened.engine.virtual_size();
    Ok(Setup {
        limits: Limits { max_request: plan.bytes, size, block: 512 },
        core: Arc::new(Core::new(opened.engine, None, plan.queues)),
        common: Common::new(opened.files, copies).context("buffers and worker threads")?,
        requests: Requests::Made(plan),
        path: DataPath::Copy,
        depth,
        fence: None,
    })
}

/// Starts the queues' threads, and waits until all have ended.
fn play(setup: &Setup, queues: u16) -> Result<MainEnd> {
    let (main, end) = link::link(queues).context("eventfd")?;
    let mut threads = Vec::new();
    for number in 0..queues {
        let (setup, end): (Setup, QueueEnd) = (setup.clone(), end.clone());
        let run = move || queue::run(setup, number, &[], end);
        let thread = thread::Builder::new().name(format!("queue-{number}")).spawn(run);
        threads.push(thread.context("starting a queue's thread")?);
        // The first one prepares the image; the others wait for nothing.
        if number == 0 {
            main.let_go();
            match main.wait_event(READY_LIMIT) {
                Some(Event::Opened) => {}
                Some(Event::Ended(Err(text)) | Event::Failed(text)) => bail!(text),
                Some(_) => bail!("the queue ended before it began"),
                None => bail!("the image's first fdatasync did not end in time"),
            }
        }
    }
    // Where one fails the others may wait for it for ever; they end with the process.
    let mut running = threads.len();
    while running > 0 {
        match main.wait_event(Duration::from_secs(1)) {
            Some(Event::Ended(Ok(()))) => running -= 1,
            Some(Event::Failed(text) | Event::Ended(Err(text))) => bail!(text),
            Some(Event::Opened | Event::Ready | Event::Leaving) | None => {}
        }
    }
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a queue's thread has panicked"))?;
    }
    Ok(main)
}

/// What all threads of the process have used so far.
fn cpu_seconds() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).context("getrusage")?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(micros as f64 / 1e6)
}

fn tell(
    args: &BenchArgs,
    outcome: &Outcome,
    stats: &Stats,
    main: &MainEnd,
    cpu: f64,
) -> Result<()> {
    if let Some(wrong) = &outcome.wrong {
        bail!("{wrong}");
    }
    let (began, ended) = outcome.began.zip(outcome.ended).context("nothing was measured")?;
    let seconds = ended.duration_since(began).as_secs_f64();
    let (mut latency, mut turns, mut operations) = (Latency::default(), 0, 0);
    for queue in main.fresh_reports(Duration::ZERO).queues {
        for kind in meter::Kind::ALL {
            latency.add_all(&queue.meter.of(kind).latency);
        }
        turns += queue.meter.turns;
        operations += queue.meter.operations;
    }
    let replied = outcome.replied as f64;
    let iops = args.count as f64 / seconds;
    let mean = latency.mean(outcome.replied);
    let p99 = latency.at_most(0.99);
    let cpu_ns = cpu * 1e9 / replied;
    if args.output == Output::Json {
        let value = json!({
            "requests": args.count, "flushes": outcome.replied - args.count, "seconds": seconds,
            "iops": iops, "bytes_per_second": iops * args.bs as f64,
            "mean_latency_us": mean, "p99_latency_us": p99,
            "cpu_ns_per_request": cpu_ns, "turns": turns, "operations": operations,
            "l2_hits": stats.l2_hits, "l2_misses": stats.l2_misses,
            "metadata_reads": stats.metadata_reads, "metadata_writes": stats.metadata_writes,
            "syncs": stats.syncs,
        });
        println!("{value:#}");
        return Ok(());
    }
    println!(
        "{} requests of {} bytes in {seconds:.3} s: {iops:.0} IOPS, {:.0} MiB/s",
        args.count,
        args.bs,
        iops * args.bs as f64 / f64::from(1 << 20)
    );
    let p99 = p99.map_or("more".to_string(), |us| format!("at most {us} us"));
    println!("latency: mean {mean:.1} us, 99 % {p99}");
    println!(
        "CPU: {cpu_ns:.0} ns per request, with opening and closing; {:.1} requests per system call",
        replied / turns.max(1) as f64
    );
    println!(
        "{} L2 hits, {} misses; {} metadata reads, {} writes; {} fdatasyncs",
        stats.l2_hits, stats.l2_misses, stats.metadata_reads, stats.metadata_writes, stats.syncs
    );
    Ok(())
}
