//! `stats`: the figures of one device, for people, for programs, and for Prometheus.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::cli::StatsArgs;
use crate::control::Control;
use crate::device;
use crate::figures::Figures;
use crate::list::plain;
use crate::meter::Kind;
use crate::prometheus::{self, Subject};
use crate::state::{self, State};

/// How long to wait for an answer: the one device is all that was asked for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Between two lines of `--watch`.
const PERIOD: Duration = Duration::from_secs(1);

/// Runs `stats`.
pub fn run(args: &StatsArgs) -> Result<()> {
    let state = find(args.number)?;
    if args.watch {
        return watch(&state);
    }
    let (value, figures) = match ask(&state) {
        Err(error) if args.prometheus => {
            eprintln!("ublk-qcow2: {}", plain(&format!("{error:#}")));
            let device = device::block_path(state.id).display().to_string();
            let page = prometheus::down(&Subject { device: &device, image: &state.image_path });
            return io::stdout().write_all(page.as_bytes()).context("writing to stdout");
        }
        answer => answer?,
    };
    let text = if args.json {
        serde_json::to_string_pretty(&json_of(&state, value))? + "\n"
    } else if args.prometheus {
        let device = device::block_path(state.id).display().to_string();
        prometheus::text(&Subject { device: &device, image: &state.image_path }, &figures)
    } else {
        text_of(&state, &figures)
    };
    io::stdout().write_all(text.as_bytes()).context("writing to stdout")
}

/// What is recorded of a device of ours.
fn find(id: u32) -> Result<State> {
    let mut control = Control::open()?;
    control.features()?;
    let info = control.named(id)?;
    State::of(&info).with_context(|| {
        format!(
            "device {id} is not one of ublk-qcow2, or was added in another place; only its own \
             server has its figures"
        )
    })
}

/// The figures as they came, and as we read them.
fn ask(state: &State) -> Result<(Value, Figures)> {
    let (id, pid) = (state.id, state.pid);
    let Some(value) = state::figures(id, PATIENCE) else {
        if State::load(id).is_none() {
            bail!("device {id} has gone");
        }
        if State::is_server(pid) {
            bail!("the server of device {id} (process {pid}) does not answer; ask again");
        }
        let next = match state.recipe {
            Some(_) => format!("`ublk-qcow2 recover -n {id}` serves it again"),
            None => format!("`ublk-qcow2 del -n {id}` removes the device"),
        };
        bail!("the server of device {id} (process {pid}) has died; {next}");
    };
    let figures = serde_json::from_value(value.clone())
        .with_context(|| format!("the figures of device {id} are of another version"))?;
    Ok((value, figures))
}

fn json_of(state: &State, figures: Value) -> Value {
    let mut all = json!({
        "device": device::block_path(state.id).display().to_string(),
        "image": state.image_path,
        "pid": state.pid,
    });
    if let (Value::Object(all), Value::Object(figures)) = (&mut all, figures) {
        all.extend(figures);
    }
    all
}

fn text_of(state: &State, figures: &Figures) -> String {
    let device = device::block_path(state.id).display().to_string();
    let mut text = format!("{device}: {}\n", plain(&state.image_path));
    // Writing into a string does not fail; nor do the others here.
    let _ = writeln!(text, "health        {}", plain(&figures.health));
    let _ = writeln!(
        text,
        "              {:>12} {:>16} {:>8} {:>10} {:>10} {:>10}",
        "requests", "bytes", "errors", "mean us", "50% <= us", "99% <= us"
    );
    let limit = |limit: Option<u64>| limit.map_or("more".to_string(), |us| us.to_string());
    for kind in Kind::ALL {
        let one = figures.of_kind(kind);
        let latency = one.latency;
        let (half, most) = match one.requests {
            0 => ("-".to_string(), "-".to_string()),
            _ => (limit(latency.at_most(0.5)), limit(latency.at_most(0.99))),
        };
        let _ = writeln!(
            text,
            "{:<13} {:>12} {:>16} {:>8} {:>10.0} {half:>10} {most:>10}",
            kind.name().replace('_', " "),
            one.requests,
            one.bytes,
            one.errors,
            latency.mean(one.requests),
        );
    }
    more_of(&mut text, figures);
    text
}

/// What is below the table of requests.
fn more_of(text: &mut String, figures: &Figures) {
    let stats = &figures.stats;
    let hits = |hits: u64, misses: u64| match hits + misses {
        0 => "unused".to_string(),
        all => format!("{hits} hits, {misses} misses ({} %)", hits * 100 / all),
    };
    let _ = writeln!(
        text,
        "flushes       {} and {} writes with FUA, {} fdatasyncs\n\
         L2 cache      {}\n\
         refcounts     {}\n\
         tables        {} reads, {} writes\n\
         allocated     {} clusters for data, {} for tables\n\
         copy-on-write {} copies, {} bytes\n\
         a crash now   leaks at most {} clusters\n\
         memory        {} KiB for caches at most, {} KiB for tables",
        stats.flushes,
        stats.fua_writes,
        stats.syncs,
        hits(stats.l2_hits, stats.l2_misses),
        hits(stats.refcount_hits, stats.refcount_misses),
        stats.metadata_reads,
        stats.metadata_writes,
        stats.allocated_data,
        stats.allocated_metadata,
        stats.copies,
        stats.copied_bytes,
        figures.leak_bound,
        figures.memory.caches >> 10,
        figures.memory.tables >> 10,
    );
    for queue in &figures.queues {
        let _ = writeln!(
            text,
            "queue {:<7} {} requests, {} bytes, mean {:.0} us, {} under way; {} operations, {} \
             under way; {} turns{}{}",
            queue.number,
            queue.requests.values().sum::<u64>(),
            queue.bytes,
            queue.mean_latency_us,
            queue.requests_under_way,
            queue.operations,
            queue.operations_under_way,
            queue.turns,
            if queue.refused == 0 { String::new() } else { format!("; {} refused", queue.refused) },
            if queue.responds { "" } else { "; DOES NOT ANSWER" },
        );
    }
    for stuck in &figures.stuck {
        let _ = writeln!(text, "stuck         {}", stuck.text());
    }
    if figures.log_lines_dropped != 0 {
        let _ = writeln!(text, "log           {} lines dropped", figures.log_lines_dropped);
    }
}

/// A line a second, until the device goes or nobody reads any more.
fn watch(state: &State) -> Result<()> {
    let (mut before, mut then) = (ask(state)?.1, Instant::now());
    let head =
        format!("{:>12} {:>10} {:>10} {:>12}\n", "requests/s", "MiB/s", "mean us", "fdatasync/s");
    for line in 0u32.. {
        if line % 20 == 0 && !show(&head)? {
            break;
        }
        sleep(PERIOD);
        let (now, at) = (ask(state)?.1, Instant::now());
        if !show(&line_of(&before, &now, at - then))? {
            break;
        }
        (before, then) = (now, at);
    }
    Ok(())
}

fn line_of(before: &Figures, now: &Figures, passed: Duration) -> String {
    let (old, new) = (before.total(), now.total());
    let seconds = passed.as_secs_f64().max(0.001);
    // A server that was replaced has begun again.
    let more = |new: u64, old: u64| new.checked_sub(old).unwrap_or(new) as f64;
    let requests = more(new.requests, old.requests);
    let latency = more(new.latency.sum_us, old.latency.sum_us) / requests.max(1.0);
    let mut line = format!(
        "{:>12.0} {:>10.1} {latency:>10.0} {:>12.0}",
        requests / seconds,
        more(new.bytes, old.bytes) / seconds / f64::from(1 << 20),
        more(now.stats.syncs, before.stats.syncs) / seconds,
    );
    if now.degraded {
        line += &format!("  {}", plain(&now.health));
    }
    for stuck in &now.stuck {
        line += &format!("  stuck: {}", stuck.text());
    }
    line + "\n"
}

/// False if nobody reads any more.
fn show(text: &str) -> Result<bool> {
    let mut out = io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("writing to stdout"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meter::Requests;

    #[test]
    fn a_line_of_watch_tells_what_happened_since_the_last() {
        let figures = |requests, bytes, sum_us, syncs| {
            let mut one = Requests { requests, bytes, ..Requests::default() };
            one.latency.sum_us = sum_us;
            let mut figures = Figures::default();
            figures.requests.insert("read".to_string(), one);
            figures.stats.syncs = syncs;
            figures
        };
        let before = figures(100, 1 << 20, 1000, 5);
        let line = line_of(&before, &figures(300, 5 << 20, 21_000, 9), Duration::from_secs(2));
        assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["100", "2.0", "100", "2"]);
        // Another server, which has begun to count.
        let line = line_of(&before, &figures(10, 0, 50, 0), Duration::from_secs(1));
        assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["10", "0.0", "5", "0"]);
    }
}
