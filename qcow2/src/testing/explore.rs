//! Exploring: many seeded runs, all their crashes, and what the engine makes of those.

use std::collections::HashSet;
use std::format;
use std::string::{String, ToString};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::vec::Vec;

use crate::check::Checker;
use crate::testing::cuts::{Cut, Cuts};
use crate::testing::disk::{Disk, bytes_of};
use crate::testing::guest::Demand;
use crate::testing::judge::{Judge, State};
use crate::testing::pool::{Pool, SectorId, mix};
use crate::testing::qemu;
use crate::testing::run::Run;
use crate::testing::seen::Seen;
use crate::testing::workload::{self, Workload};
use crate::testing::world::open_image;

mod replay;

pub(super) use replay::note;
pub use replay::{announce_panics, replay};

/// What to explore.
#[derive(Clone, Debug)]
pub struct Config {
    /// The first seed.
    pub seed: u64,
    /// Distinct states to reach.
    pub states: u64,
    /// Workloads whose process is killed and recovered, instead of those without a journal.
    pub kills: bool,
    /// Only this workload.
    pub workload: Option<String>,
    /// Stop after so long.
    pub time: Option<Duration>,
    /// Threads.
    pub threads: usize,
    /// One distinct state in so many goes to `qemu-img`; 0 for none.
    pub sample: u64,
    /// Say how far it is, every few seconds.
    pub progress: bool,
    /// The bug to be planted in the engine.
    pub bug: Option<crate::planted::Bug>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: 1,
            states: 1_000_000,
            kills: false,
            workload: None,
            time: None,
            threads: 2,
            sample: 10_000,
            progress: false,
            bug: None,
        }
    }
}

/// Something is wrong with the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What.
    pub what: String,
    /// `workload:seed:step[:state]`, and the same again after a `/` for a run after that crash.
    pub replay: String,
    /// The trace, in words, and the crash.
    pub trace: Vec<String>,
}

/// What was explored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// States that were visited.
    pub states: u64,
    /// Those that were not seen before, and so were judged.
    pub distinct: u64,
    /// Points in time whose crashes were visited.
    pub crash_points: u64,
    /// Names of the workloads.
    pub workloads: u64,
    /// Runs.
    pub runs: u64,
    /// Runs that began in a state that a crash had left.
    pub reopened: u64,
    /// States that `qemu-img` has judged.
    pub sampled: u64,
    /// How long it took.
    pub seconds: f64,
    /// The first violation.
    pub violation: Option<Violation>,
}

/// Counters that the threads share.
#[derive(Default)]
struct Shared {
    seen: Seen,
    next: AtomicU64,
    states: AtomicU64,
    distinct: AtomicU64,
    points: AtomicU64,
    runs: AtomicU64,
    reopened: AtomicU64,
    sampled: AtomicU64,
    stop: AtomicBool,
    /// Distinct states to reach.
    wanted: u64,
    violation: Mutex<Option<Violation>>,
}

/// How deep runs after a crash nest.
const DEPTH: u32 = 2;
/// One distinct state in so many is opened and worked on.
const BRANCH: u64 = 5_000;
/// One distinct state in so many is checked by the crate's own checker, too.
const CHECK: u64 = 500;
/// Events of such a run.
const BRANCH_STEPS: u64 = 40;
/// Of the points in time at which the state changes, the crashes of one in so many are visited:
/// neighbours have most of their states in common.
const EVERY: u64 = 3;
/// From so many points in time do the states come, at least, where a million and more are wanted.
const POINTS: u64 = 10_000;

/// One thread's tools.
struct Explorer<'a> {
    shared: &'a Shared,
    sample: u64,
    judge: Judge,
    cuts: Cuts,
    demand: Demand,
    checker: Checker,
    /// Headers and top-level tables that were opened before.
    opened: HashSet<u64>,
}

/// A state to be looked at more closely.
struct Chosen {
    sectors: Vec<SectorId>,
    len: u64,
    data: Vec<SectorId>,
    index: u64,
    leaks: u64,
    content: Vec<SectorId>,
    why: Why,
}

#[derive(PartialEq, Eq)]
enum Why {
    Qemu,
    Branch,
}

/// Where a run comes from, and so how to replay it.
#[derive(Clone, Debug)]
struct Path {
    text: String,
    seed: u64,
}

impl Path {
    fn root(workload: &str, seed: u64) -> Self {
        let text = format!("{workload}:{seed}");
        Self { text, seed: mix(seed, 0x77) }
    }

    fn at(&self, step: u64) -> String {
        format!("{}:{step}", self.text)
    }

    fn after(&self, step: u64, state: u64) -> Self {
        let seed = mix(mix(self.seed, step), state);
        Self { text: format!("{}:{step}:{state}/", self.text), seed }
    }

    /// The seed of the cuts at a step.
    fn cut_seed(&self, step: u64) -> u64 {
        mix(self.seed, step ^ 0x5eed)
    }
}

/// Explores as the configuration says.
///
/// # Panics
/// If there is no such workload, or a thread panics.
#[must_use]
pub fn explore(config: &Config) -> Report {
    let begin = Instant::now();
    let mut workloads = if config.kills { workload::recovering() } else { workload::all() };
    if let Some(name) = &config.workload {
        workloads = workload::find(name).into_iter().collect();
    }
    assert!(!workloads.is_empty(), "no such workload");
    let shared = Shared { wanted: config.states, ..Shared::default() };
    std::thread::scope(|scope| {
        for _ in 0..config.threads {
            scope.spawn(|| work(config, &workloads, &shared, begin));
        }
        if config.progress {
            show_progress(config, &shared, begin);
        }
    });
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    Report {
        states: load(&shared.states),
        distinct: load(&shared.distinct),
        crash_points: load(&shared.points),
        workloads: workloads.len() as u64,
        runs: load(&shared.runs),
        reopened: load(&shared.reopened),
        sampled: load(&shared.sampled),
        seconds: begin.elapsed().as_secs_f64(),
        violation: shared.violation.into_inner().expect("no thread has panicked"),
    }
}

fn work(config: &Config, workloads: &[Workload], shared: &Shared, begin: Instant) {
    crate::planted::plant(config.bug);
    let mut explorer = Explorer {
        shared,
        sample: config.sample,
        judge: Judge::default(),
        cuts: Cuts::default(),
        demand: Demand::default(),
        checker: Checker::new(),
        opened: HashSet::new(),
    };
    let over = || config.time.is_some_and(|time| begin.elapsed() >= time);
    while !shared.stop.load(Ordering::Relaxed) {
        if over() {
            break;
        }
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        let count = workloads.len() as u64;
        let workload = &workloads[crate::testing::size(number % count)];
        let path = Path::root(&workload.label(), config.seed.wrapping_add(number / count));
        note(&path.text);
        shared.runs.fetch_add(1, Ordering::Relaxed);
        let pool = Pool::shared();
        let result = match Run::new(workload, path.seed, &pool) {
            Ok(run) => explorer.run(run, &path, 0),
            Err(what) => Err(Violation { what, replay: path.at(0), trace: Vec::new() }),
        };
        if let Err(violation) = result {
            shared.stop.store(true, Ordering::Relaxed);
            shared.violation.lock().expect("no thread has panicked").get_or_insert(violation);
        }
    }
    shared.stop.store(true, Ordering::Relaxed);
}

fn show_progress(config: &Config, shared: &Shared, begin: Instant) {
    let mut next = Duration::from_secs(2);
    while !shared.stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(50));
        let elapsed = begin.elapsed();
        if elapsed >= next {
            next = elapsed + Duration::from_secs(5);
            let distinct = shared.distinct.load(Ordering::Relaxed);
            let states = shared.states.load(Ordering::Relaxed);
            let points = shared.points.load(Ordering::Relaxed);
            let seconds = elapsed.as_secs_f64();
            let wanted = config.states;
            std::eprintln!(
                "{seconds:6.0} s  {distinct} of {wanted} distinct states, {states} in all, \
                 at {points} points"
            );
        }
    }
}

impl Explorer<'_> {
    /// One run and the crashes along it.
    fn run(&mut self, mut run: Run, path: &Path, depth: u32) -> Result<(), Violation> {
        let steps = if depth == 0 { run.workload.steps } else { BRANCH_STEPS };
        let mut before = (u64::MAX, u64::MAX);
        while run.steps < steps && !self.shared.stop.load(Ordering::Relaxed) {
            run.step().map_err(|what| Violation {
                what,
                replay: path.at(run.steps),
                trace: Vec::new(),
            })?;
            let now = run.generation();
            let due = mix(path.seed, run.steps).is_multiple_of(EVERY);
            if now != before && due {
                before = now;
                self.crash(&run, path, depth)?;
            }
        }
        if run.steps < steps {
            return Ok(());
        }
        run.settle().map_err(|what| Violation {
            what,
            replay: path.at(steps + 1),
            trace: Vec::new(),
        })
    }

    /// Everything that a crash now may leave.
    fn crash(&mut self, run: &Run, path: &Path, depth: u32) -> Result<(), Violation> {
        let shared = self.shared;
        shared.points.fetch_add(1, Ordering::Relaxed);
        run.demand(&mut self.demand);
        let mut chosen = Vec::new();
        let mut wrong = None;
        let (mut states, mut distinct) = (0, 0);
        let mut cuts = core::mem::take(&mut self.cuts);
        let (disk, data) = (&run.world.disk, run.world.data.as_ref());
        cuts.visit(disk, data, path.cut_seed(run.steps), &mut |cut, _| {
            states += 1;
            let key = mix(cut.hash, self.demand.hash);
            if !shared.seen.insert(key) {
                return true;
            }
            distinct += 1;
            wrong = self.look_at(run, cut, key, depth, &mut chosen).err().map(|it| (it, cut.index));
            wrong.is_none()
        });
        self.cuts = cuts;
        shared.states.fetch_add(states, Ordering::Relaxed);
        let distinct = shared.distinct.fetch_add(distinct, Ordering::Relaxed) + distinct;
        let points = shared.points.load(Ordering::Relaxed);
        if distinct >= shared.wanted && points >= (shared.wanted / 100).min(POINTS) {
            shared.stop.store(true, Ordering::Relaxed);
        }
        if let Some((what, index)) = wrong {
            let replay = format!("{}:{index}", path.at(run.steps));
            return Err(Violation { what, replay, trace: Vec::new() });
        }
        for chosen in chosen {
            self.follow(run, path, depth, chosen)?;
        }
        Ok(())
    }

    /// Judges one state; notes it if it is to be looked at more closely.
    fn look_at(
        &mut self,
        run: &Run,
        cut: Cut,
        key: u64,
        depth: u32,
        chosen: &mut Vec<Chosen>,
    ) -> Result<(), String> {
        let pool = run.world.disk.pool().borrow();
        let Cut { sectors, len, data, .. } = cut;
        let state = State { pool: &pool, sectors, len, data, setting: &run.setting };
        let summary = self.judge.judge(state, &self.demand)?;
        if self.opened.insert(mix(summary.top, cut.len)) {
            let disk = Disk::of_sectors(cut.sectors.to_vec(), cut.len, run.world.disk.pool());
            let data = run.world.data.as_ref().map(Disk::len);
            open_image(&disk, &run.setting.files, data, (false, None))
                .map_err(|error| format!("the image does not open: {error}"))?;
        }
        let dice = mix(key, 0xd1ce);
        if (dice >> 40).is_multiple_of(CHECK) {
            let checked = self.checker.check_bytes(&bytes_of(sectors, len, run.world.disk.pool()));
            let checked = checked.map_err(|error| format!("the checker cannot: {error}"))?;
            if let Some(finding) = checked.first.filter(|_| checked.corruptions != 0) {
                return Err(format!("the checker finds {finding}"));
            }
            if checked.leaks > summary.leaks {
                return Err(format!("the checker finds {} leaks", checked.leaks));
            }
        }
        let mut choose = |why| {
            chosen.push(Chosen {
                sectors: sectors.to_vec(),
                len,
                data: data.to_vec(),
                index: cut.index,
                leaks: summary.leaks,
                content: self.judge.content().to_vec(),
                why,
            });
        };
        // Of no number but 0 is 0 a divisor.
        if dice.is_multiple_of(self.sample) {
            choose(Why::Qemu);
        }
        if depth < DEPTH && (dice >> 20).is_multiple_of(BRANCH) {
            choose(Why::Branch);
        }
        Ok(())
    }

    fn follow(
        &mut self,
        run: &Run,
        path: &Path,
        depth: u32,
        chosen: Chosen,
    ) -> Result<(), Violation> {
        let Chosen { sectors, len, data, index, leaks, content, why } = chosen;
        let pool = run.world.disk.pool();
        if why == Why::Qemu {
            self.shared.sampled.fetch_add(1, Ordering::Relaxed);
            run.demand(&mut self.demand);
            let known = pool.borrow();
            let setting = &run.setting;
            let state = State { pool: &known, sectors: &sectors, len, data: &data, setting };
            return qemu::judge(state, &self.demand, pool).map_err(|what| {
                let replay = format!("{}:{index}", path.at(run.steps));
                Violation { what, replay, trace: Vec::new() }
            });
        }
        self.shared.reopened.fetch_add(1, Ordering::Relaxed);
        let path = path.after(run.steps, index);
        match run.after_crash(path.seed, (sectors, len, data), &content, leaks) {
            Ok(run) => self.run(run, &path, depth + 1),
            Err(what) => Err(Violation { what, replay: path.at(0), trace: Vec::new() }),
        }
    }
}

impl Report {
    /// One line of JSON, as the command prints it.
    #[must_use]
    pub fn json(&self, seed: u64, faults: u64) -> String {
        let violations = u64::from(self.violation.is_some());
        let Self { states, distinct, crash_points, workloads, seconds, .. } = self;
        format!(
            "{{\"states\":{states},\"distinct\":{distinct},\"crash_points\":{crash_points},\
             \"workloads\":{workloads},\"faults\":{faults},\"violations\":{violations},\
             \"seconds\":{seconds:.1},\"seed\":{seed}}}"
        )
    }
}

/// The words of a violation, as a test or the command prints them.
#[must_use]
pub fn tell(violation: &Violation) -> String {
    let mut out = violation.trace.join("\n");
    out += &format!("\nviolation: {}\n", violation.what);
    out += "replay: cargo run --release -p qcow2 --features testing --example explore -- ";
    out += &format!("--replay {}", violation.replay);
    out.to_string()
}
