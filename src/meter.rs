//! What one queue counts: requests, bytes, latencies. Plain numbers of a queue thread, which
//! `queue.rs` publishes now and then; nothing is locked or allocated for a request.

use std::time::{Duration, Instant};

use qcow2::Request;
use serde::{Deserialize, Serialize};

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

impl Kind {
    pub const ALL: [Self; 5] =
        [Self::Read, Self::Write, Self::Flush, Self::Discard, Self::WriteZeroes];

    /// Its name in figures.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write_zeroes",
        }
    }
}

/// Latencies up to 2^25 µs (34 s) are told apart, and those beyond.
pub const BUCKETS: usize = 27;

/// The largest latency that bucket `index` counts, in µs; the last one has no limit.
pub fn limit_of(index: usize) -> Option<u64> {
    (index + 1 < BUCKETS).then(|| 1 << index)
}

/// Latencies in µs. Bucket 0 counts those of at most 1 µs, bucket i those above 2^(i-1) and at most
/// 2^i; the last one all above.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    pub buckets: [u64; BUCKETS],
    /// Of all latencies.
    pub sum_us: u64,
}

impl Latency {
    fn add(&mut self, latency: Duration) {
        let us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bits = u64::BITS - us.saturating_sub(1).leading_zeros();
        let index = usize::try_from(bits).unwrap_or(BUCKETS).min(BUCKETS - 1);
        self.buckets[index] += 1;
        self.sum_us = self.sum_us.saturating_add(us);
    }

    /// Those of another.
    pub fn add_all(&mut self, other: &Self) {
        for (sum, count) in self.buckets.iter_mut().zip(other.buckets) {
            *sum += count;
        }
        self.sum_us = self.sum_us.saturating_add(other.sum_us);
    }

    /// The mean in µs, of this many.
    pub fn mean(&self, count: u64) -> f64 {
        if count == 0 { 0.0 } else { self.sum_us as f64 / count as f64 }
    }

    /// A latency that `share` of all do not exceed, as exactly as the buckets tell: in µs.
    pub fn at_most(&self, share: f64) -> Option<u64> {
        let total: u64 = self.buckets.iter().sum();
        let mut below = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            below += count;
            if below as f64 >= share * total as f64 {
                return limit_of(index);
            }
        }
        None
    }
}

/// Requests of one kind that were replied to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requests {
    pub requests: u64,
    /// What they asked for, also of those that failed.
    pub bytes: u64,
    /// Those that ended with an error; they are among the requests.
    pub errors: u64,
    pub latency: Latency,
}

impl Requests {
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.latency.add_all(&other.latency);
    }
}

/// The numbers of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meter {
    /// In the order of [`Kind::ALL`].
    kinds: [Requests; Kind::ALL.len()],
    /// Requests that never reached the engine: of a kind that is not served, or not to be read.
    pub refused: u64,
    /// Rounds of the loop: each is one system call.
    pub turns: u64,
    /// Operations that were given to the kernel.
    pub operations: u64,
}

/// A request under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived {
    kind: Kind,
    bytes: u32,
    at: Instant,
}

impl Arrived {
    /// `at` this moment.
    pub fn new(request: Request, at: Instant) -> Self {
        let (kind, bytes) = match request {
            Request::Read { len, .. } => (Kind::Read, len),
            Request::Write { len, .. } => (Kind::Write, len),
            Request::Flush => (Kind::Flush, 0),
            Request::Discard { len, .. } => (Kind::Discard, len),
            Request::WriteZeroes { len, .. } => (Kind::WriteZeroes, len),
        };
        Self { kind, bytes, at }
    }
}

impl Meter {
    /// A request is replied to.
    pub fn replied(&mut self, request: Arrived, ok: bool) {
        let requests = &mut self.kinds[request.kind as usize];
        requests.requests += 1;
        requests.bytes += u64::from(request.bytes);
        requests.errors += u64::from(!ok);
        requests.latency.add(request.at.elapsed());
    }

    /// Requests of this kind.
    pub fn of(&self, kind: Kind) -> &Requests {
        &self.kinds[kind as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_is_counted_where_its_limit_is_the_next_power_of_two() {
        let cases = [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (1 << 25, 25)];
        for (us, bucket) in cases.into_iter().chain([((1 << 25) + 1, 26), (1 << 40, 26)]) {
            let mut latency = Latency::default();
            latency.add(Duration::from_micros(us));
            assert_eq!(latency.buckets.iter().position(|&count| count == 1), Some(bucket), "{us}");
            assert!(limit_of(bucket).is_none_or(|limit| us <= limit), "{us}");
            assert!(bucket == 0 || us > limit_of(bucket - 1).unwrap(), "{us}");
        }
        let mut latency = Latency::default();
        latency.add(Duration::MAX);
        latency.add(Duration::MAX);
        assert_eq!((latency.buckets[BUCKETS - 1], latency.sum_us), (2, u64::MAX));
    }

    #[test]
    fn the_figures_of_a_queue_tell_kinds_apart() {
        let mut meter = Meter::default();
        let now = Instant::now();
        let write = Request::Write { offset: 0, len: 4096, fua: true };
        meter.replied(Arrived::new(write, now), true);
        meter.replied(Arrived::new(write, now), false);
        meter.replied(Arrived::new(Request::Flush, now), true);
        let writes = meter.of(Kind::Write);
        assert_eq!((writes.requests, writes.bytes, writes.errors), (2, 8192, 1));
        assert_eq!(writes.latency.buckets.iter().sum::<u64>(), 2);
        assert_eq!((meter.of(Kind::Flush).requests, meter.of(Kind::Read).requests), (1, 0));
        let mut sum = *writes;
        sum.add(meter.of(Kind::Flush));
        assert_eq!((sum.requests, sum.latency.buckets.iter().sum::<u64>()), (3, 3));
    }

    #[test]
    fn a_share_of_latencies_lies_below_a_limit() {
        let mut latency = Latency::default();
        for us in [1, 10, 10, 1000] {
            latency.add(Duration::from_micros(us));
        }
        assert_eq!((latency.at_most(0.5), latency.at_most(0.99)), (Some(16), Some(1024)));
        assert!((latency.mean(4) - 255.25).abs() < 0.01);
    }
}
