//! Replaying a violation from its path: only the run that leads there, and only that state.

use core::cell::RefCell;
use std::format;
use std::string::{String, ToString};
use std::vec::Vec;

use crate::check::Checker;
use crate::testing::cuts::Cuts;
use crate::testing::disk::{Disk, bytes_of};
use crate::testing::explore::{BRANCH_STEPS, Path, Violation};
use crate::testing::guest::Demand;
use crate::testing::judge::{Judge, State};
use crate::testing::pool::{Pool, SectorId};
use crate::testing::qemu;
use crate::testing::run::Run;
use crate::testing::workload;

std::thread_local! {
    /// The run under way, for the case that the engine panics.
    static CURRENT: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Remembers which run is under way.
pub(in crate::testing) fn note(path: &str) {
    CURRENT.with(|current| *current.borrow_mut() = path.into());
}

/// Lets a panic say which run it was in.
pub fn announce_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(std::boxed::Box::new(move |info| {
        before(info);
        let path = CURRENT.with(|current| current.borrow().clone());
        let steps = if path.starts_with("fault") { "" } else { ":1000000" };
        std::eprintln!("it was in: --replay {path}{steps}");
    }));
}

/// One stage of a path: a step, and perhaps a state that a crash leaves there.
struct Stage {
    step: u64,
    state: Option<u64>,
}

fn parse(text: &str) -> Option<(workload::Workload, u64, Vec<Stage>)> {
    let (name, rest) = text.split_once(':')?;
    let (seed, rest) = rest.split_once(':').unwrap_or((rest, "18446744073709551615"));
    let mut stages = Vec::new();
    for part in rest.split("/:") {
        let (step, state) = match part.split_once(':') {
            Some((step, state)) => (step, Some(state.parse().ok()?)),
            None => (part, None),
        };
        stages.push(Stage { step: step.parse().ok()?, state });
    }
    Some((workload::find(name)?, seed.parse().ok()?, stages))
}

/// Replays what leads to `text`, a path as in [`Violation::replay`]. `Ok` says that nothing is
/// wrong there.
///
/// # Errors
/// The violation, with the trace in words; also if the path cannot be read.
pub fn replay(text: &str) -> Result<Vec<String>, Violation> {
    let mut trace = Vec::new();
    let result = follow(text, &mut trace);
    match result {
        Ok(()) => Ok(trace),
        Err(what) => Err(Violation { what, replay: text.to_string(), trace }),
    }
}

fn follow(text: &str, trace: &mut Vec<String>) -> Result<(), String> {
    if let Some(result) = crate::testing::faults::replay(text, trace) {
        return result;
    }
    let (workload, seed, stages) =
        parse(text).ok_or_else(|| format!("'{text}' is no workload:seed:step:state"))?;
    let pool = Pool::shared();
    let mut path = Path::root(&workload.label(), seed);
    let mut run = Run::new(&workload, path.seed, &pool)?;
    for (depth, stage) in stages.iter().enumerate() {
        run.trace = Some(Vec::new());
        let most = if depth == 0 { workload.steps } else { BRANCH_STEPS };
        let result = advance(&mut run, stage.step, most);
        trace.append(run.trace.as_mut().expect("just set"));
        result?;
        let Some(state) = stage.state else { return Ok(()) };
        let (sectors, len, data) = pick(&run, &path, state, trace)?;
        path = path.after(run.steps, state);
        let mut judge = Judge::default();
        let mut demand = Demand::default();
        run.demand(&mut demand);
        let leaks = {
            let known = pool.borrow();
            let setting = &run.setting;
            let found = State { pool: &known, sectors: &sectors, len, data: &data, setting };
            let summary = match judge.judge(found, &demand) {
                Ok(summary) => summary,
                Err(what) => {
                    let theirs = qemu::judge(found, &demand, &pool);
                    let theirs = theirs.err().unwrap_or_else(|| "nothing is wrong".into());
                    return Err(format!("{what}\nqemu-img says: {theirs}"));
                }
            };
            let bytes = bytes_of(&sectors, len, &pool);
            let checked = Checker::new().check_bytes(&bytes).map_err(|error| error.to_string())?;
            if let Some(finding) = checked.first.filter(|_| checked.corruptions != 0) {
                return Err(format!("the checker finds {finding}"));
            }
            qemu::judge(found, &demand, &pool)?;
            summary.leaks
        };
        run = run.after_crash(path.seed, (sectors, len, data), judge.content(), leaks)?;
    }
    Ok(())
}

/// A run of `most` events ends when all is settled.
fn advance(run: &mut Run, step: u64, most: u64) -> Result<(), String> {
    while run.steps < step.min(most) {
        run.step()?;
    }
    if step > most { run.settle() } else { Ok(()) }
}

/// State number `state` of those that a crash may leave now.
fn pick(
    run: &Run,
    path: &Path,
    state: u64,
    trace: &mut Vec<String>,
) -> Result<(Vec<SectorId>, u64, Vec<SectorId>), String> {
    let mut cuts = Cuts::default();
    let mut found = None;
    let (disk, data) = (&run.world.disk, run.world.data.as_ref());
    cuts.visit(disk, data, path.cut_seed(run.steps), &mut |cut, _| {
        if cut.index == state {
            found = Some((cut.sectors.to_vec(), cut.len, cut.data.to_vec()));
        }
        found.is_none()
    });
    let found = found.ok_or_else(|| format!("there is no state {state} here"))?;
    trace.push(format!("power is cut; of what was not synced this is left:\n{}", cuts.describe()));
    let of = |disk: &'_ Disk| disk.changes().to_vec();
    for change in data.map(of).into_iter().flatten().chain(of(disk)) {
        let sectors = change.what.sectors(disk.sectors().len());
        let done = if change.completed.is_some() { "complete" } else { "in flight" };
        trace.push(format!(
            "  change {}: {:?}, sectors {sectors:?}, {done}",
            change.serial, change.structure
        ));
    }
    Ok(found)
}
