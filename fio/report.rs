//! Makes report.md and report.svg of what fio/run has measured: medians over the repeats, and how
//! many times as fast as each peer we are.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use plotters::prelude::*;
use serde_json::Value;

const PEERS: [&str; 9] = [
    "ours",
    "nbd-native",
    "nbd-uring",
    "vduse",
    "rublk-qcow2",
    "rublk-loop",
    "rublk-loop-zc",
    "raw",
    "null",
];

/// A clock tick, as programs see it, in µs.
const TICK_US: f64 = 10_000.0;

/// What one run gave.
#[derive(Clone, Debug, Default)]
struct Run {
    iops: f64,
    /// 99 % of the requests took at most so long, in µs.
    p99: f64,
    /// Of the server and its threads, for each request.
    cpu_us: Option<f64>,
    /// Of the whole machine, fio with it.
    busy_us: Option<f64>,
    /// Of the disk beneath: flushes per fsync, and bytes written per byte.
    flushes: Option<f64>,
    written: Option<f64>,
    /// Of our engine: misses of the L2 cache per read, reads of tables per miss, fdatasync per
    /// FLUSH.
    misses: Option<f64>,
    reads_per_miss: Option<f64>,
    syncs: Option<f64>,
    error: String,
}

type Runs = BTreeMap<(String, String), Vec<Run>>;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: report FOLDER")?;
    let folder = Path::new(&folder);
    let (order, runs) = read(&folder.join("results"))?;
    fs::write(folder.join("report.md"), report(&order, &runs)?)?;
    chart(&folder.join("report.svg"), &order, &runs)?;
    Ok(())
}

/// All runs, and the workloads in the order in which they were measured.
fn read(folder: &Path) -> Result<(Vec<String>, Runs), Box<dyn Error>> {
    let (mut runs, mut first) = (Runs::new(), BTreeMap::new());
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let Ok(value) = serde_json::from_slice::<Value>(&fs::read(&path)?) else {
            eprintln!("{}: no JSON", path.display());
            continue;
        };
        let text = |name: &str| value[name].as_str().unwrap_or_default().to_string();
        let written = fs::metadata(&path)?.modified()?;
        let first = first.entry(text("workload")).or_insert(written);
        *first = written.min(*first);
        runs.entry((text("workload"), text("peer"))).or_default().push(run(&value));
    }
    let mut order: Vec<_> = first.into_iter().collect();
    order.sort_by_key(|(_, written)| *written);
    Ok((order.into_iter().map(|(name, _)| name).collect(), runs))
}

fn run(value: &Value) -> Run {
    let job = &value["fio"]["jobs"][0];
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let both = |name: &str| number(&job["read"][name]) + number(&job["write"][name]);
    let requests = both("total_ios");
    let change = |name: &str, at: Option<usize>| {
        let pair = |index: usize| match at {
            Some(at) => value[name][index][at].as_f64(),
            None => value[name][index].as_f64(),
        };
        Some(pair(1)? - pair(0)?)
    };
    let p99_of = |kind: &str, of: &str| number(&job[kind][of]["percentile"]["99.000000"]) / 1e3;
    let p99 = |kind: &str| p99_of(kind, "clat_ns");
    let above = number(&job["write"]["io_bytes"]);
    let syncs = number(&job["sync"]["total_ios"]);
    let per = |amount: Option<f64>, count: f64| amount.filter(|_| count > 0.0).map(|n| n / count);
    let stat = |name: &str| {
        let at = |index: usize| value["stats"][index][name].as_f64();
        Some(at(1)? - at(0)?)
    };
    let ratio = |above: &str, below: &str| per(stat(above), stat(below)?);
    Run {
        iops: both("iops"),
        p99: p99("read").max(p99("write")).max(p99_of("sync", "lat_ns")),
        cpu_us: per(change("ticks", None).map(|ticks| ticks * TICK_US), requests),
        busy_us: per(change("busy", None).map(|ticks| ticks * TICK_US), requests),
        misses: ratio("l2_misses", "reads"),
        reads_per_miss: ratio("metadata_reads", "l2_misses"),
        syncs: ratio("syncs", "flushes"),
        flushes: per(change("beneath", Some(0)), syncs),
        written: per(change("beneath", Some(1)).map(|sectors| sectors * 512.0), above),
        error: value["error"].as_str().unwrap_or_default().to_string(),
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

/// The median over the repeats that ended well.
fn of(runs: &Runs, workload: &str, peer: &str, what: impl Fn(&Run) -> Option<f64>) -> Option<f64> {
    let runs = runs.get(&(workload.to_string(), peer.to_string()))?;
    median(runs.iter().filter(|run| run.error.is_empty()).filter_map(what).collect())
}

fn iops(runs: &Runs, workload: &str, peer: &str) -> Option<f64> {
    of(runs, workload, peer, |run| Some(run.iops))
}

fn report(order: &[String], runs: &Runs) -> Result<String, Box<dyn Error>> {
    let present = |peer: &&str| runs.keys().any(|(_, name)| name == peer);
    let peers: Vec<_> = PEERS.into_iter().filter(present).collect();
    let repeats = runs.values().map(Vec::len).max().unwrap_or(0);
    let mut text = "# ublk-qcow2 and its peers\n\n".to_string();
    writeln!(
        text,
        "IOPS (reads and writes together), medians of {repeats}, all in one boot; in brackets how \
         many times as fast we are. Where the CPU is emulated only the ratios mean anything.\n"
    )?;
    let cell = |workload: &str, peer: &str| {
        let Some(theirs) = iops(runs, workload, peer) else {
            let key = (workload.to_string(), peer.to_string());
            return if runs.contains_key(&key) { "failed".to_string() } else { "–".to_string() };
        };
        match iops(runs, workload, "ours") {
            Some(ours) if peer != "ours" => format!("{theirs:.0} ({:.2})", ours / theirs),
            _ => format!("{theirs:.0}"),
        }
    };
    table(&mut text, &peers, order, cell)?;
    for (title, what) in [
        ("CPU of the server, µs for each request", (|run| run.cpu_us) as fn(&Run) -> Option<f64>),
        ("CPU of the whole machine, fio and kernel with it, µs for each request", |run| {
            run.busy_us
        }),
        ("99 % of the requests took at most, µs", |run| Some(run.p99)),
        ("Bytes written beneath for each byte written", |run| run.written),
        ("Flushes of the disk beneath for each fsync", |run| run.flushes),
        ("fdatasync for each FLUSH", |run| run.syncs),
        ("Misses of the L2 cache for each read", |run| run.misses),
        ("Reads of tables for each miss", |run| run.reads_per_miss),
    ] {
        writeln!(text, "\n## {title}\n")?;
        table(&mut text, &peers, order, |workload, peer| {
            of(runs, workload, peer, what).map_or("–".to_string(), |value| format!("{value:.2}"))
        })?;
    }
    text += "\n## What failed\n\n";
    let mut none = true;
    for ((workload, peer), all) in runs {
        for run in all.iter().filter(|run| !run.error.is_empty()) {
            writeln!(text, "- {workload}, {peer}: {}", run.error)?;
            none = false;
        }
    }
    if none {
        text += "Nothing.\n";
    }
    Ok(text)
}

fn table(
    text: &mut String,
    peers: &[&str],
    order: &[String],
    cell: impl Fn(&str, &str) -> String,
) -> Result<(), Box<dyn Error>> {
    writeln!(text, "| workload | {} |", peers.join(" | "))?;
    writeln!(text, "| --- |{}", " ---: |".repeat(peers.len()))?;
    for workload in order {
        let cells: Vec<_> = peers.iter().map(|peer| cell(workload, peer)).collect();
        writeln!(text, "| {workload} | {} |", cells.join(" | "))?;
    }
    Ok(())
}

/// A bar for each workload and peer: its IOPS as a share of ours.
fn chart(path: &Path, order: &[String], runs: &Runs) -> Result<(), Box<dyn Error>> {
    let mut bars = Vec::new();
    for workload in order {
        let Some(ours) = iops(runs, workload, "ours").filter(|ours| *ours > 0.0) else { continue };
        for (index, peer) in PEERS.iter().enumerate() {
            let share = iops(runs, workload, peer).map(|theirs| theirs / ours);
            // Beyond twice ours the rest is of no interest, and small bars must be seen.
            bars.extend(share.map(|share| (workload, index, share.min(2.0))));
        }
    }
    let height = u32::try_from(bars.len())? * 14 + 120;
    let area = SVGBackend::new(path, (900, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let count = i32::try_from(bars.len())?;
    let mut chart = ChartBuilder::on(&area)
        .caption("IOPS as a share of ublk-qcow2's (cut off at 2)", ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(260)
        .build_cartesian_2d(0.0..2.05, (0..count).into_segmented())?;
    let label = |at: &SegmentValue<i32>| match at {
        SegmentValue::CenterOf(at) | SegmentValue::Exact(at) => usize::try_from(count - 1 - at)
            .ok()
            .and_then(|at| bars.get(at))
            .map_or(String::new(), |(workload, peer, _)| format!("{workload}: {}", PEERS[*peer])),
        SegmentValue::Last => String::new(),
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(bars.len())
        .y_label_formatter(&label)
        .label_style(("sans-serif", 11))
        .draw()?;
    chart.draw_series(bars.iter().enumerate().map(|(at, (_, peer, share))| {
        let at = count - 1 - i32::try_from(at).unwrap_or(0);
        let color =
            if *peer == 0 { BLUE.filled() } else { Palette99::pick(*peer).mix(0.7).filled() };
        let corners = [(0.0, SegmentValue::Exact(at)), (*share, SegmentValue::Exact(at + 1))];
        let mut bar = Rectangle::new(corners, color);
        bar.set_margin(1, 1, 0, 0);
        bar
    }))?;
    area.present()?;
    Ok(())
}
