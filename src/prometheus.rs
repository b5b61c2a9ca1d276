//! Figures in Prometheus' text format, version 0.0.4.

use std::fmt::Write;

use crate::figures::Figures;
use crate::meter::{BUCKETS, Kind, limit_of};

/// Whose figures they are.
pub struct Subject<'a> {
    pub device: &'a str,
    pub image: &'a str,
}

/// What is written so far, and the labels of every sample.
struct Page {
    text: String,
    labels: String,
}

const UP: &str = "1 if the device's server answers.";

/// The page of a device whose server does not answer.
pub fn down(of: &Subject) -> String {
    let mut page = Page { text: String::new(), labels: labels(of) };
    page.single("gauge", "up", UP, 0.0);
    page.text
}

fn labels(of: &Subject) -> String {
    format!("device=\"{}\",image=\"{}\"", escaped(of.device), escaped(of.image))
}

/// All figures of one device.
pub fn text(of: &Subject, figures: &Figures) -> String {
    let labels = labels(of);
    let mut page = Page { text: String::new(), labels };
    page.single("gauge", "up", UP, 1.0);
    page.requests(figures);
    page.latencies(figures);
    page.engine(figures);
    page.state(figures);
    page.queues(figures);
    page.text
}

/// A label's value: backslash, quote and line feed have escapes of their own.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

impl Page {
    /// A metric and its samples: more labels, and the value.
    fn metric(&mut self, kind: &str, name: &str, help: &str, samples: &[(String, f64)]) {
        // Writing into a string does not fail.
        let _ = writeln!(self.text, "# HELP ublk_qcow2_{name} {help}");
        let _ = writeln!(self.text, "# TYPE ublk_qcow2_{name} {kind}");
        for (labels, value) in samples {
            self.sample(name, labels, *value);
        }
    }

    fn sample(&mut self, name: &str, labels: &str, value: f64) {
        let comma = if labels.is_empty() { "" } else { "," };
        let _ = writeln!(self.text, "ublk_qcow2_{name}{{{}{comma}{labels}}} {value}", self.labels);
    }

    /// A counter or a gauge without labels of its own.
    fn single(&mut self, kind: &str, name: &str, help: &str, value: f64) {
        self.metric(kind, name, help, &[(String::new(), value)]);
    }

    fn requests(&mut self, figures: &Figures) {
        let kinds = |value: fn(&crate::meter::Requests) -> u64| -> Vec<(String, f64)> {
            let one =
                |kind: Kind| (label("kind", kind.name()), value(&figures.of_kind(kind)) as f64);
            Kind::ALL.into_iter().map(one).collect()
        };
        let help = "Requests that were replied to.";
        self.metric("counter", "requests_total", help, &kinds(|one| one.requests));
        let help = "Bytes that requests asked for.";
        self.metric("counter", "request_bytes_total", help, &kinds(|one| one.bytes));
        let help = "Requests that ended with an error.";
        self.metric("counter", "request_errors_total", help, &kinds(|one| one.errors));
    }

    fn latencies(&mut self, figures: &Figures) {
        let name = "request_duration_seconds";
        let help = "From the arrival of a request to its reply.";
        self.metric("histogram", name, help, &[]);
        for kind in Kind::ALL {
            let one = figures.of_kind(kind);
            let kind = label("kind", kind.name());
            let mut below = 0;
            for index in 0..BUCKETS {
                below += one.latency.buckets[index];
                let limit = limit_of(index);
                let le = limit.map_or("+Inf".to_string(), |us| (us as f64 / 1e6).to_string());
                let labels = format!("{kind},{}", label("le", &le));
                self.sample(&format!("{name}_bucket"), &labels, below as f64);
            }
            let seconds = one.latency.sum_us as f64 / 1e6;
            self.sample(&format!("{name}_sum"), &kind, seconds);
            // Exactly what the last bucket says, as the format wants it.
            self.sample(&format!("{name}_count"), &kind, below as f64);
        }
    }

    fn engine(&mut self, figures: &Figures) {
        let stats = &figures.stats;
        let two = |name: &str, a: (&str, u64), b: (&str, u64)| {
            [(label(name, a.0), a.1 as f64), (label(name, b.0), b.1 as f64)]
        };
        let hits = two("cache", ("l2", stats.l2_hits), ("refcounts", stats.refcount_hits));
        let misses = two("cache", ("l2", stats.l2_misses), ("refcounts", stats.refcount_misses));
        let clusters =
            two("for", ("data", stats.allocated_data), ("tables", stats.allocated_metadata));
        let tables =
            two("direction", ("read", stats.metadata_reads), ("write", stats.metadata_writes));
        let mut counter = |name: &str, help: &str, samples: &[(String, f64)]| {
            self.metric("counter", name, help, samples);
        };
        let one = |value: u64| [(String::new(), value as f64)];
        counter(
            "fua_writes_total",
            "Writes with FUA, also counted as writes.",
            &one(stats.fua_writes),
        );
        counter("fdatasyncs_total", "Calls of fdatasync.", &one(stats.syncs));
        counter("cache_hits_total", "Pages of tables that were in the cache.", &hits);
        counter("cache_misses_total", "Pages of tables that had to be read.", &misses);
        counter("table_operations_total", "Reads and writes of pages of tables.", &tables);
        counter("allocated_clusters_total", "Host clusters allocated.", &clusters);
        counter("copies_total", "Parts of clusters copied on write.", &one(stats.copies));
        counter("copied_bytes_total", "Bytes copied on write.", &one(stats.copied_bytes));
        let dropped = figures.log_lines_dropped;
        counter("log_lines_dropped_total", "Lines that the log did not take.", &one(dropped));
    }

    fn state(&mut self, figures: &Figures) {
        let help = "1 if a failure below made writes and flushes fail for good.";
        self.single("gauge", "degraded", help, f64::from(u8::from(figures.degraded)));
        let help = "Clusters that a crash at this moment would leak at the most.";
        self.single("gauge", "leak_bound_clusters", help, figures.leak_bound as f64);
        let stats = &figures.stats;
        let help =
            "Clusters that are set aside: reserved ahead of need, or on their way to being free.";
        let aside = [
            (label("for", "reserved"), stats.reserved as f64),
            (label("for", "quarantined"), stats.quarantined as f64),
        ];
        self.metric("gauge", "clusters_aside", help, &aside);
        let help = "Mappings whose data is not durable yet.";
        self.single("gauge", "overlay_mappings", help, stats.overlay as f64);
        let help = "Operations on files that have not returned for 30 s.";
        // Not added up as fractions: the sum of none of those is -0.
        let stuck: u64 = figures.stuck.iter().map(|one| u64::from(one.count)).sum();
        self.single("gauge", "stuck_operations", help, stuck as f64);
        let help = "For how long the first of them has not; 0 without any.";
        let longest = figures.stuck.iter().map(|one| one.seconds).max().unwrap_or(0);
        self.single("gauge", "stuck_seconds", help, longest as f64);
        let memory = [
            (label("for", "caches"), figures.memory.caches as f64),
            (label("for", "tables"), figures.memory.tables as f64),
        ];
        let help = "Memory: the budget of the caches, and what tables take.";
        self.metric("gauge", "memory_bytes", help, &memory);
    }

    fn queues(&mut self, figures: &Figures) {
        let queue = |number: usize| label("queue", &number.to_string());
        let mut requests = Vec::new();
        for one in &figures.queues {
            for (kind, count) in &one.requests {
                let labels = format!("{},{}", queue(one.number), label("kind", kind));
                requests.push((labels, *count as f64));
            }
        }
        let help = "Requests that were replied to, by queue.";
        self.metric("counter", "queue_requests_total", help, &requests);
        let each = |value: fn(&crate::figures::QueueFigures) -> f64| -> Vec<(String, f64)> {
            figures.queues.iter().map(|one| (queue(one.number), value(one))).collect()
        };
        let help = "Bytes that requests asked for, by queue.";
        self.metric("counter", "queue_bytes_total", help, &each(|one| one.bytes as f64));
        let help = "Requests that are not served or could not be read, by queue.";
        self.metric("counter", "queue_refused_total", help, &each(|one| one.refused as f64));
        let help = "Requests under way, by queue.";
        let under_way = each(|one| one.requests_under_way as f64);
        self.metric("gauge", "queue_requests_under_way", help, &under_way);
        let help = "1 if the queue's thread has answered just now.";
        let responds = each(|one| f64::from(u8::from(one.responds)));
        self.metric("gauge", "queue_responds", help, &responds);
    }
}

fn label(name: &str, value: &str) -> String {
    format!("{name}=\"{}\"", escaped(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::QueueFigures;
    use crate::meter::Requests;

    fn page() -> String {
        let mut figures = Figures::default();
        let mut reads = Requests { requests: 6, bytes: 24576, errors: 1, ..Requests::default() };
        (reads.latency.buckets[0], reads.latency.buckets[3]) = (2, 3);
        (reads.latency.buckets[BUCKETS - 1], reads.latency.sum_us) = (1, 40_000_100);
        figures.requests.insert("read".to_string(), reads);
        let queue = QueueFigures { number: 1, responds: true, bytes: 7, ..QueueFigures::default() };
        figures.queues.push(queue);
        figures.stats.syncs = 5;
        let image = "/srv/a \"b\"\\c\nd.qcow2";
        text(&Subject { device: "/dev/ublkb0", image }, &figures)
    }

    #[test]
    fn every_sample_has_its_type_and_labels_are_escaped() {
        let page = page();
        let mut names = Vec::new();
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                names.push(rest.split(' ').next().unwrap().to_string());
                assert!(page.contains(&format!("# HELP {} ", names.last().unwrap())), "{line}");
            } else if !line.starts_with('#') {
                let begin = names.last().unwrap();
                assert!(line.starts_with(begin.as_str()), "{line} is not of {begin}");
                let labels = r#"{device="/dev/ublkb0",image="/srv/a \"b\"\\c\nd.qcow2""#;
                assert!(line.contains(labels), "{line}");
                let value = line.rsplit(' ').next().unwrap();
                assert!(value.parse::<f64>().unwrap().is_sign_positive(), "{line}");
            }
        }
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count, "each metric once");
    }

    #[test]
    fn a_histogram_counts_upwards_and_in_seconds() {
        let page = page();
        let value = |what: &str| {
            let line = page.lines().find(|line| line.contains(what));
            line.unwrap_or_else(|| panic!("no {what}")).rsplit(' ').next().unwrap().to_string()
        };
        assert_eq!(value("kind=\"read\",le=\"0.000001\"}"), "2");
        assert_eq!(value("kind=\"read\",le=\"0.000004\"}"), "2");
        assert_eq!(value("kind=\"read\",le=\"0.000008\"}"), "5");
        assert_eq!(value("kind=\"read\",le=\"33.554432\"}"), "5");
        assert_eq!(value("kind=\"read\",le=\"+Inf\"}"), "6");
        let line = |name: &str| format!("request_duration_seconds_{name}{{");
        assert_eq!(value(&line("count")), "6");
        assert_eq!(value(&line("sum")), "40.0001");
        assert_eq!(value("fdatasyncs_total{"), "5");
        assert_eq!(value("queue_bytes_total{"), "7");
    }
}
