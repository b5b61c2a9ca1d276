//! The explorer finds every bug that is planted in the engine.

#![cfg(feature = "planted-bugs")]

use std::collections::BTreeMap;
use std::env;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use qcow2::planted::{self, Bug};
use qcow2::testing::explore::{self, Config};
use qcow2::testing::faults;

/// Where the first panic was in a thread with this bug: others follow from it.
static PLACES: Mutex<BTreeMap<Bug, String>> = Mutex::new(BTreeMap::new());

fn places() -> MutexGuard<'static, BTreeMap<Bug, String>> {
    PLACES.lock().unwrap_or_else(PoisonError::into_inner)
}

fn of_the_engine(bug: Bug) -> bool {
    let place = places().remove(&bug).unwrap_or_default();
    println!("a panic at {place}");
    !place.contains("testing/")
}

/// States until a bug was found, or `None`.
fn hunt(bug: Bug, seed: u64) -> Option<(u64, String)> {
    let time = Some(Duration::from_secs(120));
    let config = Config {
        seed,
        states: 6_000_000,
        threads: 1,
        sample: 0,
        time,
        bug: Some(bug),
        kills: bug.is_of_recovery(),
        ..Config::default()
    };
    let found = catch_unwind(|| explore::explore(&config));
    match found {
        // An assertion of the engine was faster; one of the tests' own is no find.
        Err(_) => return of_the_engine(bug).then(|| (0, "a panic of the engine".into())),
        Ok(report) => {
            if let Some(violation) = report.violation {
                return Some((report.distinct, violation.what));
            }
        }
    }
    let found = catch_unwind(|| faults::explore_with(seed, 20_000, 1, Some(bug)));
    match found {
        Err(_) => of_the_engine(bug).then(|| (0, "a panic of the engine after a fault".into())),
        Ok(found) => found.violation.map(|violation| (found.runs, violation.what)),
    }
}

#[test]
fn every_planted_bug_is_found() {
    // By hand: SEED=1 BUG=EpochCutAtCompletion.
    let seed = env::var("SEED").map_or(2, |seed| seed.parse().expect("a number"));
    let only = env::var("BUG").ok();
    let bugs =
        Bug::ALL.iter().filter(|bug| only.as_ref().is_none_or(|it| *it == format!("{bug:?}")));
    let bugs: Vec<Bug> = bugs.copied().collect();
    std::panic::set_hook(Box::new(|info| {
        let here = info.location().map(ToString::to_string).unwrap_or_default();
        // A thread that waits for the one that panicked has no bug, and nothing to say.
        if let Some(bug) = planted::planted() {
            places().entry(bug).or_insert(here);
        }
    }));
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(&bug) = bugs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let states = hunt(bug, seed);
                    match &states {
                        Some((states, what)) => {
                            println!("{bug:?}: seed {seed}, {states} states: {what}");
                        }
                        None => println!("{bug:?}: seed {seed}, not found"),
                    }
                    found.lock().unwrap().push((bug, states.map(|(states, _)| states)));
                }
            });
        }
    });
    let found = found.into_inner().unwrap();
    assert_eq!(found.len(), bugs.len());
    let missed: Vec<Bug> = found.iter().filter(|it| it.1.is_none()).map(|it| it.0).collect();
    let mut counts: Vec<u64> = found.iter().filter_map(|it| it.1).collect();
    counts.sort_unstable();
    assert!(missed.is_empty(), "not found: {missed:?}");
    assert!(Bug::ALL.len() >= 30);
    assert!(counts[counts.len() / 2] < 100_000, "the median is {}", counts[counts.len() / 2]);
}
