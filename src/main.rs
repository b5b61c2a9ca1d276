//! `ublk-qcow2`: serves qcow2 images as block devices through ublk.
//!
//! The server around the sans-I/O engine of the crate `qcow2`: every descriptor, thread and system
//! call of the program is here.
//!
//! ```text
//!   cli ─ main ┬ daemon ─ server ┬ prepare ─ open ─ lock,     main thread: start, signals, stop
//!              │  └ notify       │      └ recover, └ direct, backing, snapshots, bitmaps
//!              ├ resume (recover,├ device ─ control ─ courier  ublk's control commands
//!              │   quiesce)      ├ state, journal, fence       what outlives the server
//!              ├ resize ─ orders ┤                             a larger disk, while it is used
//!              ├ del, list       ├ isolate, log                own mounts, locked memory
//!              ├ stats           ├ figures                     what `list` and `stats` show
//!              │  └ prometheus   └ link ─ queue                a thread for each queue: all I/O
//!              ├ bench ─────────────────────┤
//!              └ check, info, dist          ├ front ─ decode, generator   requests and replies
//!                                           ├ core                        the engine and its lock
//!                                           ├ driver ─ payload, files     operations on files
//!                                           │   └ pool ─ inflate          worker threads
//!                                           ├ ring ─ buffer, inbox        io_uring
//!                                           └ meter, watch                counters, what is stuck
//! ```
//!
//! `unsafe` code is in `ring.rs`, `buffer.rs`, `journal.rs` and `sys.rs`, and nowhere else.

mod backing;
mod bench;
mod bitmaps;
mod buffer;
mod busy;
mod check;
mod cli;
mod control;
mod core;
mod courier;
mod daemon;
mod decode;
mod del;
mod device;
mod direct;
mod dist;
mod driver;
mod errno;
mod fence;
mod figures;
mod files;
mod front;
mod generator;
mod image_file;
mod inbox;
mod inflate;
mod info;
mod isolate;
mod journal;
mod link;
mod list;
mod lock;
mod log;
mod meter;
mod notify;
mod open;
mod orders;
mod payload;
mod pool;
mod prepare;
mod prometheus;
mod queue;
mod recover;
mod resize;
mod resume;
mod ring;
mod server;
mod signals;
mod snapshots;
mod state;
mod stats;
mod sys;
mod ublk;
mod watch;

use std::env;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use cli::{AddArgs, Cli, Command};
use daemon::Reporter;
use server::What;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Where 2 says that an image is corrupt, it must not say anything else.
        Err(error) if error.use_stderr() && env::args_os().nth(1) == Some("check".into()) => {
            eprint!("{error}");
            return ExitCode::FAILURE;
        }
        Err(error) => error.exit(),
    };
    let (subject, result) = match &cli.command {
        Command::Add(args) => (args.file.to_string_lossy(), add(args).map(|()| 0)),
        Command::Del(args) => ("".into(), del::run(args).map(|()| 0)),
        Command::Recover(args) => ("".into(), resume::recover(args).map(|()| 0)),
        Command::Quiesce(args) => ("".into(), resume::quiesce(args).map(|()| 0)),
        Command::Resize(args) => ("".into(), resize::run(args).map(|()| 0)),
        Command::List(args) => ("".into(), list::run(args).map(|()| 0)),
        Command::Stats(args) => ("".into(), stats::run(args).map(|()| 0)),
        Command::Features => ("".into(), list::features().map(|()| 0)),
        Command::Dist(args) => ("".into(), dist::run(args).map(|()| 0)),
        Command::Owner(args) => ("".into(), list::owner(args).map(|()| 0)),
        Command::Check(args) => (args.file.to_string_lossy(), check::run(args)),
        Command::Bench(args) => (args.file.to_string_lossy(), bench::run(args).map(|()| 0)),
        Command::Info(args) => (args.file.to_string_lossy(), info::run(args).map(|()| 0)),
    };
    let error = match result {
        Ok(code) => return ExitCode::from(code),
        Err(error) => error,
    };
    let subject = if subject.is_empty() { subject } else { format!("{subject}: ").into() };
    eprintln!("ublk-qcow2: {}", list::plain(&format!("{subject}{error:#}")));
    ExitCode::from(if error.is::<check::NotSupported>() { check::NOT_SUPPORTED } else { 1 })
}

fn add(args: &AddArgs) -> Result<()> {
    let serve = |reporter: &mut Reporter| server::serve(args, What::New, reporter);
    run_server(args.foreground, args.log, false, serve)
}

/// Runs a server, in a daemon or here; of a device that `stays` when the server does not, or not.
pub fn run_server(
    foreground: bool,
    verbosity: Option<log::Verbosity>,
    stays: bool,
    serve: impl FnOnce(&mut Reporter) -> Result<()>,
) -> Result<()> {
    if !foreground {
        return daemon::launch(verbosity, stays, serve);
    }
    log::open(foreground, verbosity);
    let result = serve(&mut Reporter::Foreground);
    log::flush();
    result
}
