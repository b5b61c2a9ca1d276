//! Explores the crashes of the engine: see `qcow2::testing`.

use std::process::ExitCode;
use std::time::Duration;

use qcow2::testing::explore::{self, Config};
use qcow2::testing::{faults, workload};

const USAGE: &str = "usage: explore [--seed S] [--states N] [--workload W] [--minutes M]
               [--threads T] [--faults RUNS] [--kills] | --replay PATH

--kills: with the journal of recovery; the process is killed often. A workload W with it is W+kill.";

struct Arguments {
    config: Config,
    faults: u64,
    replay: Option<String>,
}

fn parse() -> Option<Arguments> {
    let mut config = Config { progress: true, ..Config::default() };
    let (mut faults, mut replay) = (0, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        if name == "--kills" {
            config.kills = true;
            continue;
        }
        let value = arguments.next()?;
        match name.as_str() {
            "--seed" => config.seed = value.parse().ok()?,
            "--states" => config.states = value.parse().ok()?,
            "--workload" => {
                if workload::find(&value).is_none() {
                    let names: Vec<_> = workload::all()
                        .iter()
                        .chain(&workload::named())
                        .map(|it| it.name)
                        .collect();
                    eprintln!("no workload is called '{value}'; there are: {}", names.join(" "));
                    return None;
                }
                config.workload = Some(value);
            }
            "--minutes" => {
                let seconds = value.parse::<f64>().ok()? * 60.0;
                config.time = Some(Duration::try_from_secs_f64(seconds).ok()?);
            }
            "--threads" => config.threads = value.parse().ok().filter(|&threads| threads != 0)?,
            "--faults" => faults = value.parse().ok()?,
            "--replay" => replay = Some(value),
            _ => return None,
        }
    }
    Some(Arguments { config, faults, replay })
}

fn main() -> ExitCode {
    let Some(Arguments { config, faults, replay }) = parse() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    explore::announce_panics();
    if let Some(path) = replay {
        return match explore::replay(&path) {
            Ok(trace) => {
                println!("{}\nnothing is wrong there", trace.join("\n"));
                ExitCode::SUCCESS
            }
            Err(violation) => {
                println!("{}", explore::tell(&violation));
                ExitCode::FAILURE
            }
        };
    }
    let mut report = explore::explore(&config);
    let mut fault_runs = 0;
    if report.violation.is_none() && faults != 0 {
        let explore = if config.kills { faults::explore_kills } else { faults::explore };
        let found = explore(config.seed, faults, config.threads);
        fault_runs = found.runs;
        report.violation = found.violation;
    }
    if let Some(violation) = &report.violation {
        let told = match explore::replay(&violation.replay) {
            Err(replayed) => replayed,
            Ok(_) => violation.clone(),
        };
        println!("{}", explore::tell(&told));
    }
    println!("{}", report.json(config.seed, fault_runs));
    if report.violation.is_none() && report.distinct < config.states {
        eprintln!("the time was over before {} distinct states", config.states);
        return ExitCode::from(3);
    }
    if report.violation.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
