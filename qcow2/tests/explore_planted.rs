//! The explorer finds every bug that is planted in the engine.

#![cfg(feature = "planted-bugs")]

use std::env;
use std::panic::catch_unwind;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use qcow2::planted::{self, Bug};
use qcow2::testing::explore::{self, Config};
use qcow2::testing::faults;

/// Where the last panic was.
static PLACE: Mutex<String> = Mutex::new(String::new());

fn of_the_engine() -> bool {
    let place = PLACE.lock().unwrap_or_else(PoisonError::into_inner).clone();
    println!("a panic at {place}");
    // A thread of the explorer that waits for the one that panicked has nothing to say.
    !place.contains("testing/")
}

/// States until a bug was found, or `None`.
fn hunt(bug: Bug, seed: u64) -> Option<(u64, String)> {
    let time = Some(Duration::from_secs(60));
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
        Err(_) => return of_the_engine().then(|| (0, "a panic of the engine".into())),
        Ok(report) => {
            if let Some(violation) = report.violation {
                return Some((report.distinct, violation.what));
            }
        }
    }
    let found = catch_unwind(|| faults::explore_with(seed, 20_000, 1, Some(bug)));
    match found {
        Err(_) => of_the_engine().then(|| (0, "a panic of the engine after a fault".into())),
        Ok(found) => found.violation.map(|violation| (found.runs, violation.what)),
    }
}

#[test]
fn every_planted_bug_is_found() {
    // By hand: SEED=2 BUG=EpochCutAtCompletion.
    let seed = env::var("SEED").map_or(1, |seed| seed.parse().expect("a number"));
    let only = env::var("BUG").ok();
    let bugs =
        Bug::ALL.iter().filter(|bug| only.as_ref().is_none_or(|it| *it == format!("{bug:?}")));
    std::panic::set_hook(Box::new(|info| {
        let mut place = PLACE.lock().unwrap_or_else(PoisonError::into_inner);
        let here = info.location().map(ToString::to_string).unwrap_or_default();
        // The first one counts: others follow from it.
        if place.is_empty() {
            *place = here;
        }
    }));
    let (mut missed, mut counts) = (Vec::new(), Vec::new());
    for &bug in bugs {
        PLACE.lock().unwrap_or_else(PoisonError::into_inner).clear();
        match hunt(bug, seed) {
            Some((states, what)) => {
                println!("{bug:?}: seed {seed}, {states} states: {what}");
                counts.push(states);
            }
            None => {
                println!("{bug:?}: seed {seed}, not found");
                missed.push(bug);
            }
        }
    }
    planted::plant(None);
    counts.sort_unstable();
    assert!(missed.is_empty(), "not found: {missed:?}");
    assert!(Bug::ALL.len() >= 30);
    assert!(counts[counts.len() / 2] < 100_000, "the median is {}", counts[counts.len() / 2]);
}
