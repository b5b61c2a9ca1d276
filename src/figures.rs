//! The figures of a served device: what its server tells whoever asks (`state.rs`), and the reader
//! of it, which may be of another version: what one does not tell is zero for the other.

use std::collections::BTreeMap;
use std::time::Duration;

use qcow2::{Health, Stats};
use serde::{Deserialize, Serialize};

use crate::files;
use crate::link::{MainEnd, QueueReport, Report, Reports};
use crate::meter::{BUCKETS, Kind, Requests, limit_of};
use crate::{list, log};

/// How long a queue thread may take to give fresh figures.
const REPORT_LIMIT: Duration = Duration::from_millis(500);

/// All of them. Counters are since the server's start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// "good", or why writes and FLUSHes fail from now on.
    pub health: String,
    /// Whether it is the latter.
    pub degraded: bool,
    /// By kind: read, write, flush, discard, write_zeroes.
    pub requests: BTreeMap<String, Requests>,
    /// What each place of a histogram counts: latencies of at most so many µs, and above the
    /// place before; the last one all above.
    pub latency_limits_us: Vec<Option<u64>>,
    pub stats: EngineFigures,
    pub memory: MemoryFigures,
    /// Clusters that a crash at this moment would leave counted and not used, at the most.
    pub leak_bound: u64,
    /// Operations on files that do not return for more than 30 s.
    pub stuck: Vec<Stuck>,
    pub queues: Vec<QueueFigures>,
    /// Lines that the log did not take in time.
    pub log_lines_dropped: u64,
}

/// See [`Stats`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EngineFigures {
    pub reads: u64,
    pub writes: u64,
    pub zeroes: u64,
    pub flushes: u64,
    pub fua_writes: u64,
    pub errors: u64,
    pub syncs: u64,
    pub allocated_data: u64,
    pub allocated_metadata: u64,
    pub copies: u64,
    pub copied_bytes: u64,
    pub l2_hits: u64,
    pub l2_misses: u64,
    pub refcount_hits: u64,
    pub refcount_misses: u64,
    pub metadata_reads: u64,
    pub metadata_writes: u64,
    pub reserved: u64,
    pub quarantined: u64,
    pub overlay: u64,
}

/// Bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryFigures {
    /// The budget; committed by use.
    pub caches: u64,
    pub tables: u64,
}

/// Operations of a kind on a file that do not return.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stuck {
    pub queue: usize,
    pub file: String,
    pub operation: String,
    pub count: u32,
    /// Of the first of them.
    pub seconds: u64,
}

/// One queue.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct QueueFigures {
    pub number: usize,
    /// Its thread has answered just now. If not, the rest is as old as its last report.
    pub responds: bool,
    /// By kind, of those that were replied to.
    pub requests: BTreeMap<String, u64>,
    pub bytes: u64,
    pub errors: u64,
    pub refused: u64,
    pub mean_latency_us: f64,
    pub requests_under_way: usize,
    pub operations: u64,
    pub operations_under_way: usize,
    pub turns: u64,
}

impl Figures {
    /// Those of now.
    pub fn of(main: &MainEnd) -> Self {
        Self::from(&main.fresh_reports(REPORT_LIMIT))
    }

    fn from(reports: &Reports) -> Self {
        let mut figures = Self {
            health: "unknown (no queue has told yet)".to_string(),
            latency_limits_us: (0..BUCKETS).map(limit_of).collect(),
            log_lines_dropped: log::dropped(),
            ..Self::default()
        };
        if let Some(report) = &reports.engine {
            figures.take_engine(report);
        }
        for kind in Kind::ALL {
            let mut sum = Requests::default();
            reports.queues.iter().for_each(|queue| sum.add(queue.meter.of(kind)));
            figures.requests.insert(kind.name().to_string(), sum);
        }
        for (number, (queue, silent)) in reports.queues.iter().zip(&reports.silent).enumerate() {
            figures.queues.push(QueueFigures::of(number, queue, !silent));
            let stuck = queue.stuck.iter().map(|one| Stuck {
                queue: number,
                file: files::name(one.file),
                operation: one.what.to_string(),
                count: one.count,
                seconds: one.lasts(queue.tick).as_secs(),
            });
            figures.stuck.extend(stuck);
        }
        figures
    }

    fn take_engine(&mut self, report: &Report) {
        (self.health, self.degraded) = match report.health {
            Health::Good => ("good".to_string(), false),
            Health::Failed(failure) => (format!("failed: {failure}"), true),
        };
        self.stats = EngineFigures::of(&report.stats);
        self.leak_bound = report.leak_bound;
        let memory = &report.memory;
        self.memory = MemoryFigures { caches: memory.caches, tables: memory.tables };
    }

    /// Requests of a kind.
    pub fn of_kind(&self, kind: Kind) -> Requests {
        self.requests.get(kind.name()).copied().unwrap_or_default()
    }

    /// The sum over all kinds.
    pub fn total(&self) -> Requests {
        let mut sum = Requests::default();
        self.requests.values().for_each(|requests| sum.add(requests));
        sum
    }
}

impl EngineFigures {
    fn of(stats: &Stats) -> Self {
        Self {
            reads: stats.reads,
            writes: stats.writes,
            zeroes: stats.zeroes,
            flushes: stats.flushes,
            fua_writes: stats.fua_writes,
            errors: stats.errors,
            syncs: stats.syncs,
            allocated_data: stats.allocated_data,
            allocated_metadata: stats.allocated_metadata,
            copies: stats.copies,
            copied_bytes: stats.copied_bytes,
            l2_hits: stats.l2_hits,
            l2_misses: stats.l2_misses,
            refcount_hits: stats.refcount_hits,
            refcount_misses: stats.refcount_misses,
            metadata_reads: stats.metadata_reads,
            metadata_writes: stats.metadata_writes,
            reserved: stats.reserved,
            quarantined: stats.quarantined,
            overlay: stats.overlay,
        }
    }
}

impl QueueFigures {
    fn of(number: usize, report: &QueueReport, responds: bool) -> Self {
        let mut sum = Requests::default();
        Kind::ALL.iter().for_each(|&kind| sum.add(report.meter.of(kind)));
        let count = |kind: Kind| (kind.name().to_string(), report.meter.of(kind).requests);
        Self {
            number,
            responds,
            requests: Kind::ALL.into_iter().map(count).collect(),
            bytes: sum.bytes,
            errors: sum.errors,
            refused: report.meter.refused,
            mean_latency_us: sum.latency.mean(sum.requests),
            requests_under_way: report.requests,
            operations: report.meter.operations,
            operations_under_way: report.operations,
            turns: report.meter.turns,
        }
    }
}

impl Stuck {
    /// For people.
    pub fn text(&self) -> String {
        let Self { queue, file, operation, count, seconds } = self;
        let (file, operation) = (list::plain(file), list::plain(operation));
        format!("{count} operations ({operation}) on {file} for {seconds} s, queue {queue}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meter::{Arrived, Meter};
    use crate::watch::Episode;
    use qcow2::{FileId, Request};
    use std::time::Instant;

    fn reports() -> Reports {
        let mut meter = Meter::default();
        let read = Request::Read { offset: 0, len: 4096 };
        for _ in 0..3 {
            meter.replied(Arrived::new(read, Instant::now()), true);
        }
        let stuck = vec![Episode { file: FileId::Image, what: "write", count: 2, since: 10 }];
        let first = QueueReport { renewed: 2, meter, stuck, tick: 100, ..QueueReport::default() };
        let second = QueueReport { meter, ..QueueReport::default() };
        Reports { engine: None, queues: vec![first, second], silent: vec![false, true] }
    }

    #[test]
    fn the_figures_of_queues_are_added_up_and_come_back_as_they_went() {
        let figures = Figures::from(&reports());
        let reads = figures.of_kind(Kind::Read);
        assert_eq!((reads.requests, reads.bytes, reads.errors), (6, 6 * 4096, 0));
        assert_eq!(figures.total(), reads);
        assert_eq!(figures.queues[1].requests["read"], 3);
        assert!(figures.queues[0].responds && !figures.queues[1].responds);
        let expected = "2 operations (write) on the image for 45 s, queue 0";
        assert_eq!(figures.stuck[0].text(), expected);
        let text = serde_json::to_string(&figures).unwrap();
        assert_eq!(serde_json::from_str::<Figures>(&text).unwrap(), figures);
        assert_eq!(figures.latency_limits_us[..3], [Some(1), Some(2), Some(4)]);
        assert_eq!(figures.latency_limits_us.last(), Some(&None));
    }

    #[test]
    fn figures_of_another_version_are_read() {
        let figures: Figures = serde_json::from_str(r#"{"health": "good", "new": 1}"#).unwrap();
        assert_eq!((figures.health.as_str(), figures.total().requests), ("good", 0));
    }
}
