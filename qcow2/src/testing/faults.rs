//! Every fault at every place: each operation of a run fails once, or from then on.
//!
//! After it there is no panic and no hang: when nothing is in flight, every request has an answer.
//! The answers are honest: what was acknowledged is found, also after a crash, and who has nothing
//! to do with the fault gets no error. The image leaks at most, and opens and reads right when the
//! disk is well again. Only runs count in which the fault changed something: there is no short
//! fdatasync.

use std::format;
use std::string::String;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::vec::Vec;

use crate::error::IoErrorKind;
use crate::planted::Bug;
use crate::testing::cuts::{Cut, Cuts};
use crate::testing::explore::Violation;
use crate::testing::guest::Demand;
use crate::testing::judge::{Judge, State};
use crate::testing::pool::{Pool, mix};
use crate::testing::run::{Fault, Run};
use crate::testing::workload::{self, Workload};

/// What was tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Runs: each of one workload, seed, place, kind of fault and mode, in which it had an effect.
    pub runs: u64,
    /// The first violation.
    pub violation: Option<Violation>,
}

/// Events of a run; more where the image comes near a limit, until the refcount table has moved.
const STEPS: u64 = 90;
const STEPS_NEAR: u64 = 220;
/// One event in so many kills the process, where it is recovered.
const DEATHS: u64 = 25;
/// States of the crash at the end of a run that are judged.
const STATES: u64 = 40;

const KINDS: [Option<IoErrorKind>; 3] = [Some(IoErrorKind::Io), Some(IoErrorKind::NoSpace), None];

/// At least `runs` runs, on all workloads, from `seed` on.
///
/// # Panics
/// If a thread panics.
#[must_use]
pub fn explore(seed: u64, runs: u64, threads: usize) -> Found {
    explore_on(&workload::all(), seed, runs, (threads, None))
}

/// The same where the process is killed, and recovered from its journal; also while things fail.
///
/// # Panics
/// If a thread panics.
#[must_use]
pub fn explore_kills(seed: u64, runs: u64, threads: usize) -> Found {
    explore_on(&workload::recovering(), seed, runs, (threads, None))
}

/// The first with a planted bug.
///
/// # Panics
/// If a thread panics.
#[must_use]
pub fn explore_with(seed: u64, runs: u64, threads: usize, bug: Option<Bug>) -> Found {
    explore_on(&workload::all(), seed, runs, (threads, bug))
}

fn explore_on(
    workloads: &[Workload],
    seed: u64,
    runs: u64,
    (threads, bug): (usize, Option<Bug>),
) -> Found {
    let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let stop = AtomicBool::new(false);
    let violation = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                crate::planted::plant(bug);
                while done.load(Ordering::Relaxed) < runs && !stop.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let count = workloads.len() as u64;
                    let workload = &workloads[crate::testing::size(number % count)];
                    let result = all_places(workload, seed.wrapping_add(number / count), &done);
                    if let Err(found) = result {
                        stop.store(true, Ordering::Relaxed);
                        violation.lock().expect("no thread has panicked").get_or_insert(found);
                    }
                }
            });
        }
    });
    let violation = violation.into_inner().expect("no thread has panicked");
    Found { runs: done.into_inner(), violation }
}

/// All faults at all places of one run.
fn all_places(workload: &Workload, seed: u64, done: &AtomicU64) -> Result<(), Violation> {
    let mut index = 0;
    loop {
        let mut hit = false;
        for kind in KINDS {
            for lasting in [false, true] {
                let fault = Fault { index, kind, lasting };
                let path = name(workload, seed, fault);
                crate::testing::explore::note(&path);
                let ended = one(workload, seed, fault, None).map_err(|what| Violation {
                    what,
                    replay: path,
                    trace: Vec::new(),
                })?;
                hit |= ended != Ended::Before;
                done.fetch_add(u64::from(ended == Ended::Faulted), Ordering::Relaxed);
            }
        }
        if !hit {
            return Ok(());
        }
        index += 1;
    }
}

/// The path of a run with a fault, for `--replay`.
fn name(workload: &Workload, seed: u64, fault: Fault) -> String {
    let kind = match fault.kind {
        Some(IoErrorKind::NoSpace) => "enospc",
        Some(_) => "eio",
        None => "short",
    };
    let mode = if fault.lasting { "on" } else { "once" };
    format!("fault:{}:{seed}:{}:{kind}:{mode}", workload.label(), fault.index)
}

/// Replays the path of a run with a fault; `None` if it is not the path of one.
pub(super) fn replay(path: &str, trace: &mut Vec<String>) -> Option<Result<(), String>> {
    let parts: Vec<&str> = path.split(':').collect();
    let ["fault", workload, seed, index, kind, mode] = parts[..] else { return None };
    let kind = match kind {
        "eio" => Some(IoErrorKind::Io),
        "enospc" => Some(IoErrorKind::NoSpace),
        "short" => None,
        _ => return None,
    };
    if !matches!(mode, "once" | "on") {
        return None;
    }
    let fault = Fault { index: index.parse().ok()?, kind, lasting: mode == "on" };
    let workload = workload::find(workload)?;
    Some(one(&workload, seed.parse().ok()?, fault, Some(trace)).map(|_| ()))
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// The run had fewer operations than that.
    Before,
    /// The operation cannot fail in this way.
    Whole,
    Faulted,
}

/// One run with a fault.
fn one(
    workload: &Workload,
    seed: u64,
    fault: Fault,
    trace: Option<&mut Vec<String>>,
) -> Result<Ended, String> {
    let pool = Pool::shared();
    let deaths = if workload.options.journal == 0 { 0 } else { DEATHS };
    let workload = Workload { deaths, ..workload.clone() };
    let mut run = Run::new(&workload, mix(seed, 0xfa), &pool)?;
    run.inject(fault);
    run.trace = trace.is_some().then(Vec::new);
    let result = to_the_end(&mut run, seed);
    if let (Some(mine), Some(theirs)) = (run.trace.as_mut(), trace) {
        theirs.append(mine);
    }
    result?;
    Ok(match run.ended > fault.index {
        false => Ended::Before,
        true if !run.was_faulted() => Ended::Whole,
        true => Ended::Faulted,
    })
}

fn to_the_end(run: &mut Run, seed: u64) -> Result<(), String> {
    let steps = if run.workload.image.near.is_some() { STEPS_NEAR } else { STEPS };
    while run.steps < steps && !run.is_stuck() {
        run.step()?;
    }
    run.settle()?;
    run.read_all()?;
    let mut demand = Demand::default();
    run.demand(&mut demand);
    judge_some(run, &demand, seed).map_err(|what| format!("after a crash at the end: {what}"))?;
    run.close_and_reopen().map_err(|what| format!("closed and opened on a good disk: {what}"))
}

/// Judges some of the states of a crash: the first, which are of one kind, and then one here and
/// one there.
fn judge_some(run: &Run, demand: &Demand, seed: u64) -> Result<(), String> {
    let (mut judge, mut left, mut result) = (Judge::default(), STATES, Ok(()));
    let pool = run.world.disk.pool().borrow();
    let (disk, data) = (&run.world.disk, run.world.data.as_ref());
    Cuts::default().visit(disk, data, seed, &mut |cut, _| {
        let Cut { sectors, len, data, index, hash } = cut;
        if index >= STATES / 4 && !mix(hash, seed).is_multiple_of(16) {
            return true;
        }
        let state = State { pool: &pool, sectors, len, data, setting: &run.setting };
        result = judge.judge(state, demand).map(|_| ());
        left -= 1;
        result.is_ok() && left != 0
    });
    result
}
