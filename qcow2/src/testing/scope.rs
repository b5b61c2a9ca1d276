//! Small scopes, exhaustively: every order in which a few requests may be submitted and their
//! operations may end, and every crash on the way.
//!
//! A search goes through all choices (submit the next request, or let any operation in flight end),
//! on clones of the whole world. Two ways that lead to the same state of engine, disk and guest go
//! on as one: a state is known by a hash of all its parts.

use core::fmt::{self, Write};
use std::collections::HashSet;
use std::format;
use std::string::String;
use std::vec::Vec;

use crate::op::Request;
use crate::testing::cuts::{Cut, Cuts};
use crate::testing::disk::Disk;
use crate::testing::guest::Demand;
use crate::testing::image::ImageSpec;
use crate::testing::judge::{Judge, State};
use crate::testing::pool::{Pool, mix};
use crate::testing::run::Run;
use crate::testing::workload::Workload;

/// What was gone through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// States of engine, disk and guest.
    pub nodes: u64,
    /// States that a crash may leave, judged.
    pub states: u64,
    /// Those in which the process was killed and recovered.
    pub kills: u64,
    /// There are more states of the world than were gone through.
    pub cut: bool,
}

/// A hash of what is written to it.
struct Digest(u64);

impl Write for Digest {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for chunk in text.as_bytes().chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = mix(self.0, u64::from_be_bytes(word));
        }
        Ok(())
    }
}

/// The search.
struct Search {
    requests: Vec<Request>,
    seen: HashSet<u64>,
    judged: HashSet<u64>,
    cuts: Cuts,
    judge: Judge,
    demand: Demand,
    scope: Scope,
    most: u64,
    /// Of what can happen next, the submitting of a request comes first.
    submit_first: bool,
}

/// Two clusters, as the alphabet of requests knows them.
#[must_use]
pub fn alphabet(cluster: u64, zeroes: bool) -> Vec<Request> {
    let len = u32::try_from(cluster).expect("a small cluster");
    let part = 512;
    let mut all = std::vec![
        Request::Write { offset: 0, len, fua: false },
        Request::Write { offset: 512, len: part, fua: false },
        Request::Write { offset: cluster, len: part, fua: true },
        Request::Write { offset: 512, len, fua: false },
        Request::Flush,
    ];
    if zeroes {
        all.push(Request::WriteZeroes { offset: 0, len, unmap: true });
        all.push(Request::WriteZeroes { offset: 512, len, unmap: false });
        all.push(Request::Discard { offset: 0, len: len * 2 });
    }
    all
}

/// Goes through every order of `requests`, submitted in this order, on a fresh image. Of more than
/// `most` states of the world it takes the first on two ways: one on which all requests are there
/// before any operation ends, and one on which each comes when those before have ended.
///
/// # Errors
/// What is wrong, and the way there.
pub fn search(workload: &Workload, requests: &[Request], most: u64) -> Result<Scope, String> {
    let pool = Pool::shared();
    let mut run = Run::new(workload, 1, &pool)?;
    while !run.is_serving() {
        run.step()?;
    }
    run.trace = Some(Vec::new());
    let mut search = Search {
        requests: requests.to_vec(),
        seen: HashSet::new(),
        judged: HashSet::new(),
        cuts: Cuts::default(),
        judge: Judge::default(),
        demand: Demand::default(),
        scope: Scope::default(),
        most,
        submit_first: true,
    };
    search.from(&run, 0)?;
    if search.scope.cut {
        search.seen.clear();
        search.most += search.scope.nodes;
        search.submit_first = false;
        search.from(&run, 0)?;
    }
    Ok(search.scope)
}

/// The workload of small scopes: two guest clusters in use or not, or over something.
#[must_use]
pub fn workload(version: u32, every: u64, backing: u64) -> Workload {
    on(ImageSpec { version, every, backing, ..ImageSpec::plain(10, 4 << 10) })
}

/// The same for any image.
#[must_use]
pub fn on(image: ImageSpec) -> Workload {
    let base = crate::testing::workload::find("c1k").expect("it is in the list");
    let mut options = base.options;
    options.stress = true;
    options.depth = 4;
    Workload { name: "scope", image, options, deaths: 0, closes: 0, ..base }
}

impl Search {
    fn from(&mut self, run: &Run, submitted: usize) -> Result<(), String> {
        let key = self.key(run, submitted);
        if self.scope.nodes >= self.most {
            self.scope.cut = true;
            return Ok(());
        }
        if !self.seen.insert(key) {
            return Ok(());
        }
        self.scope.nodes += 1;
        self.crash(run).map_err(|what| tell(run, &what))?;
        let in_flight = run.world.in_flight.len();
        if in_flight == 0 && submitted == self.requests.len() && run.guest.busy() != 0 {
            return Err(tell(run, "nothing is in flight, and requests have no answer"));
        }
        if self.submit_first {
            self.submit(run, submitted)?;
        }
        for index in 0..in_flight {
            let mut next = run.clone();
            next.complete(index, false, 0);
            next.look().map_err(|what| tell(&next, &what))?;
            self.from(&next, submitted)?;
        }
        if self.submit_first { Ok(()) } else { self.submit(run, submitted) }
    }

    fn submit(&mut self, run: &Run, submitted: usize) -> Result<(), String> {
        let Some(&request) = self.requests.get(submitted) else { return Ok(()) };
        let mut next = run.clone();
        next.request(u16::try_from(submitted).expect("few requests"), request);
        next.look().map_err(|what| tell(&next, &what))?;
        self.from(&next, submitted + 1)
    }

    fn key(&self, run: &Run, submitted: usize) -> u64 {
        let mut digest = Digest(submitted as u64);
        let (engine, guest, disk) = (&run.world.engine, &run.guest, &run.world.disk);
        let (in_flight, data) = (&run.world.in_flight, run.world.data.as_ref().map(Disk::digest));
        write!(digest, "{engine:?}{guest:?}{in_flight:?}{:?}{data:?}", disk.digest())
            .expect("a digest takes everything");
        digest.0
    }

    fn crash(&mut self, run: &Run) -> Result<(), String> {
        run.demand(&mut self.demand);
        let pool = run.world.disk.pool().borrow();
        let mut wrong = Ok(());
        let Self { cuts, judge, demand, judged, scope, .. } = self;
        let (disk, data) = (&run.world.disk, run.world.data.as_ref());
        cuts.visit(disk, data, 1, &mut |cut, _| {
            if judged.insert(mix(cut.hash, demand.hash)) {
                scope.states += 1;
                let Cut { sectors, len, data, .. } = cut;
                let state = State { pool: &pool, sectors, len, data, setting: &run.setting };
                wrong = judge.judge(state, demand).map(|_| ());
            }
            wrong.is_ok()
        });
        wrong.map_err(|what| {
            format!("{what}; of what was not synced this is left:\n{}", cuts.describe())
        })?;
        drop(pool);
        if run.world.kept.is_none() {
            return Ok(());
        }
        self.scope.kills += 1;
        // The guest's state after that follows from the node, so it is not gone into.
        let mut killed = run.clone();
        killed.trace = Some(Vec::new());
        killed.kill().map_err(|what| {
            format!(
                "{what}; the process was killed:\n{}",
                killed.trace.unwrap_or_default().join("\n")
            )
        })
    }
}

fn tell(run: &Run, what: &str) -> String {
    format!("{}\n{what}", run.trace.as_deref().unwrap_or_default().join("\n"))
}
