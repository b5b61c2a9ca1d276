//! `ublk-qcow2`: serves qcow2 images as block devices through ublk.
//!
//! The server around the sans-I/O engine of the crate `qcow2`: every descriptor, thread and system
//! call of the program is here.
//!
//! ```text
//!   cli ─ main ┬ daemon ─ server ┬ open ─ lock, direct         main thread: start, signals, stop
//!              │  └ notify       │  └ recover, backing, snapshots, bitmaps
//!              ├ resume (recover,├ device ─ control             ublk's control commands
//!              │   quiesce)      ├ state, journal, fence        what outlives the server
//!              ├ del, list       ├ isolate                      own mounts, locked memory
//!              └ check, info,    └ link ─ queue ─ decode        a thread for each queue: all I/O
//!                dist              core (the engine)├ driver ─ payload, files
//!                                  ring, buffer     └ pool ─ inflate  worker threads
//! ```
//!
//! `unsafe` code is in `ring.rs`, `buffer.rs`, `journal.rs` and `sys.rs`, and nowhere else.

mod backing;
mod bitmaps;
mod buffer;
mod busy;
mod check;
mod cli;
mod control;
mod core;
mod daemon;
mod decode;
mod del;
mod device;
mod direct;
mod dist;
mod driver;
mod errno;
mod fence;
mod files;
mod image_file;
mod inflate;
mod info;
mod isolate;
mod journal;
mod link;
mod list;
mod lock;
mod notify;
mod open;
mod payload;
mod pool;
mod queue;
mod recover;
mod resume;
mod ring;
mod server;
mod signals;
mod snapshots;
mod state;
mod sys;
mod ublk;

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
        Command::List(args) => ("".into(), list::run(args).map(|()| 0)),
        Command::Features => ("".into(), list::features().map(|()| 0)),
        Command::Dist(args) => ("".into(), dist::run(args).map(|()| 0)),
        Command::Check(args) => (args.file.to_string_lossy(), check::run(args)),
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
    run_server(args.foreground, |reporter| server::serve(args, What::New, reporter))
}

/// Runs a server, in a daemon or here.
pub fn run_server(foreground: bool, serve: impl FnOnce(&mut Reporter) -> Result<()>) -> Result<()> {
    if !foreground {
        return daemon::launch(serve);
    }
    // Only here is there a terminal to log to (RUST_LOG=info); a daemon must not write to a file
    // that may lie on its own device.
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    serve(&mut Reporter::Foreground)
}
