//! The explorer, at the size of a test: crash states, faults, small scopes, and coverage marks.
//! What is found is printed with the command that replays it.

#![cfg(feature = "testing")]
#![expect(clippy::unwrap_used, reason = "a test may end so")]

use qcow2::testing::explore::{self, Config, Violation};
use qcow2::testing::image::{DataFile, ImageSpec};
use qcow2::testing::{faults, scope, workload};

/// A debug build is some thirty times slower.
const SCALE: u64 = if cfg!(debug_assertions) { 30 } else { 1 };

/// Ends the test with what was found and the command that replays it.
fn none(violation: Option<&Violation>) {
    if let Some(violation) = violation {
        let told = explore::replay(&violation.replay).err();
        panic!("{}", explore::tell(told.as_ref().unwrap_or(violation)));
    }
}

#[test]
fn no_crash_state_is_wrong() {
    explore::announce_panics();
    let config = Config { seed: 1, states: 1_000_000 / SCALE, ..Config::default() };
    let report = explore::explore(&config);
    none(report.violation.as_ref());
    let rate = report.distinct as f64 / report.seconds;
    println!("{}; {rate:.0} distinct states per second", report.json(config.seed, 0));
    assert!(report.distinct >= config.states);
    assert!(report.crash_points >= config.states / 100, "states from many points in time");
    assert!(report.sampled > 0 && report.reopened > 0);
}

#[test]
fn what_a_killed_process_acknowledged_is_found_by_the_next() {
    explore::announce_panics();
    let states = 1_000_000 / SCALE;
    let config = Config { seed: 1, states, kills: true, ..Config::default() };
    let report = explore::explore(&config);
    none(report.violation.as_ref());
    println!("with kills: {}", report.json(config.seed, 0));
    assert!(report.distinct >= config.states && report.reopened > 0);
}

#[test]
fn workloads_that_are_explored_by_name_alone() {
    explore::announce_panics();
    // By hand 1 000 000 each: `explore --workload`.
    let states = 200_000 / SCALE;
    for workload in workload::named() {
        for name in [workload.label(), format!("{}+kill", workload.name)] {
            let config = Config { states, workload: Some(name.clone()), ..Config::default() };
            let report = explore::explore(&config);
            none(report.violation.as_ref());
            assert!(report.distinct >= states, "{name}: {}", report.distinct);
        }
    }
}

#[test]
fn after_any_fault_the_answers_are_honest() {
    explore::announce_panics();
    // By hand 100 000 and more: `explore --faults`.
    let found = faults::explore(1, 20_000 / SCALE, 2);
    none(found.violation.as_ref());
    println!("{} runs with a fault", found.runs);
}

#[test]
fn after_any_fault_a_killed_process_is_recovered() {
    explore::announce_panics();
    let found = faults::explore_kills(1, 3_000 / SCALE, 2);
    none(found.violation.as_ref());
    println!("{} runs with a fault and kills", found.runs);
}

#[test]
fn a_violation_is_replayed_from_its_path_alone() {
    let trace = explore::replay("c512:1:20:0").unwrap();
    assert!(trace.len() > 20);
    assert!(explore::replay("nonsense").is_err());
}

/// States of the world for one sequence: so many, or what `EXPLORE_SCOPE` says, for long runs.
fn most(default: u64) -> u64 {
    let wanted = std::env::var("EXPLORE_SCOPE").map(|text| text.parse().unwrap());
    wanted.unwrap_or(default) / SCALE
}

/// Sequences of requests on two clusters.
fn scopes(len: usize, images: &[ImageSpec], most: u64) {
    scopes_with(len, images, 0, most);
}

/// The same; with a journal, the process is killed in each state of the world.
fn scopes_with(len: usize, images: &[ImageSpec], journal: u32, most: u64) {
    let mut kills = 0;
    let (mut nodes, mut states, mut cut) = (0, 0, 0);
    for &image in images {
        let mut workload = scope::on(image);
        workload.options.journal = journal;
        let all = scope::alphabet(1 << image.cluster_bits, true);
        for number in 0..all.len().pow(u32::try_from(len).unwrap()) {
            let mut requests = Vec::new();
            let mut rest = number;
            for _ in 0..len {
                requests.push(all[rest % all.len()]);
                rest /= all.len();
            }
            let found = scope::search(&workload, &requests, most);
            let found = found.unwrap_or_else(|what| panic!("{image:?}: {requests:?}\n{what}"));
            nodes += found.nodes;
            states += found.states;
            kills += found.kills;
            cut += u32::from(found.cut);
        }
    }
    println!(
        "{len} requests: {nodes} states of the world, {states} crash states, {kills} kills; {cut} \
         sequences have more than {most} states of the world, of which these are the first on both ways"
    );
}

#[test]
fn every_order_of_two_requests() {
    let plain = ImageSpec::plain(10, 4 << 10);
    let images = [ImageSpec { every: 1, ..plain }, ImageSpec { backing: 4096, ..plain }];
    scopes(2, &images, most(2_000));
}

/// Images with one other feature each.
fn others() -> [ImageSpec; 5] {
    let plain = ImageSpec { every: 1, ..ImageSpec::plain(10, 4 << 10) };
    [
        ImageSpec { snapshots: 1, ..plain },
        ImageSpec { compressed: 1, cluster_bits: 11, ..plain },
        ImageSpec { compressed: 1, snapshots: 1, cluster_bits: 11, ..plain },
        ImageSpec { data_file: Some(DataFile::Own(2048)), backing: 4096, every: 2, ..plain },
        ImageSpec { extended: true, cluster_bits: 14, backing: 20 << 10, guest: 32 << 10, ..plain },
    ]
}

#[test]
fn every_order_of_two_requests_with_other_features() {
    scopes(2, &others(), most(400));
}

#[test]
fn a_kill_in_every_order_of_two_requests() {
    let plain = ImageSpec::plain(10, 4 << 10);
    let backing = 4096;
    let images = [plain, ImageSpec { every: 1, ..plain }, ImageSpec { backing, ..plain }];
    scopes_with(2, &images, 2, most(150));
    scopes_with(2, &others(), 2, most(80));
}

#[test]
fn every_order_of_four_requests_of_a_few_kinds() {
    let all = scope::alphabet(1024, true);
    let picked = [[0, 4, 7, 4], [1, 5, 1, 4], [0, 7, 3, 4], [3, 2, 5, 4]];
    for (version, every, backing) in [(3, 0, 0), (3, 1, 0), (3, 0, 4096)] {
        let workload = scope::workload(version, every, backing);
        for numbers in picked {
            let requests: Vec<_> = numbers.iter().map(|&number| all[number]).collect();
            let found = scope::search(&workload, &requests, most(4_000));
            found.unwrap_or_else(|what| panic!("{requests:?}\n{what}"));
        }
    }
}

#[test]
fn every_mark_is_hit() {
    explore::announce_panics();
    // Some lines only one workload comes by, so each has its turn.
    for workload in workload::all().into_iter().chain(workload::recovering()) {
        let states = if workload.options.journal == 0 { 40_000 } else { 10_000 } / SCALE;
        let workload = Some(workload.label());
        let config = Config { seed: 7, states, workload, ..Config::default() };
        none(explore::explore(&config).violation.as_ref());
    }
    none(faults::explore(7, 5_000 / SCALE, 2).violation.as_ref());
    assert_eq!(qcow2::marks::missing(), [""; 0], "no run came by these lines");
}
