//! Worker threads that inflate compressed clusters, and a few megabytes of those inflated last.
//!
//! A worker also reads the compressed bytes itself, with pread: reading and inflating are one job
//! for one thread that may block, into memory of its own. On the ring it would take a buffer there
//! and a second trip through the queue thread, and gain nothing beside what inflating costs.
//!
//! **Invariant:** workers never touch the buffers of requests. A queue thread copies out of an
//! inflated cluster, into every operation that has waited for it; several for one cluster are
//! inflated once. It also owns a cache. An entry cannot go stale: nothing here writes compressed
//! clusters, so where one was, another never comes to be.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;
use nix::sys::eventfd::{EfdFlags, EventFd};
use qcow2::{Compressed, FileId, Op, OpKind};

use crate::files::{self, Source};
use crate::inflate::Inflate;
use crate::watch::Ticks;

/// Inflated clusters that each queue keeps, in bytes: four of the largest.
const CACHE: usize = 8 << 20;

/// At the most; more would take the CPU from the guest for nothing.
const MAX_WORKERS: usize = 4;

/// The decoders' state lies on the heap.
const STACK: usize = 256 << 10;

/// Which cluster: the file, the first byte, the length.
type Key = (FileId, u64, u32);

/// Handed to a worker.
struct Job {
    key: Key,
    file: Source,
    what: Compressed,
    answer: Answer,
}

/// Where a worker puts what it has inflated.
#[derive(Clone)]
struct Answer {
    results: Sender<(Key, Inflated)>,
    ready: Arc<EventFd>,
}

/// The threads, for all queues. They end with the last copy of this.
#[derive(Clone)]
pub struct Workers(Sender<Job>);

impl Workers {
    /// Starts them.
    pub fn new() -> io::Result<Self> {
        let (jobs, take) = channel();
        let take = Arc::new(Mutex::new(take));
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS);
        for number in 0..workers {
            let take = Arc::clone(&take);
            std::thread::Builder::new()
                .name(format!("inflate-{number}"))
                .stack_size(STACK)
                .spawn(move || work(&take))?;
        }
        Ok(Self(jobs))
    }
}

/// A cluster, or why there is none.
type Inflated = Result<Box<[u8]>, String>;

/// Operations that wait for a cluster, and since when.
#[derive(Default)]
struct Waiting {
    ops: Vec<Op>,
    since: Ticks,
}

/// The end of one queue thread.
pub struct Pool {
    workers: Workers,
    results: Receiver<(Key, Inflated)>,
    answer: Answer,
    waiting: HashMap<Key, Waiting>,
    cache: LruCache<Key, Box<[u8]>>,
    cached: usize,
}

impl Pool {
    /// An end for one more queue thread.
    pub fn new(workers: &Workers) -> io::Result<Self> {
        let (give, results) = channel();
        let ready = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        Ok(Self {
            workers: workers.clone(),
            results,
            answer: Answer { results: give, ready },
            waiting: HashMap::new(),
            cache: LruCache::unbounded(),
            cached: 0,
        })
    }

    /// The descriptor to read eight bytes from to be woken when [`take`](Self::take) has something.
    pub fn wake_fd(&self) -> RawFd {
        self.answer.ready.as_fd().as_raw_fd()
    }

    /// The inflated cluster `what` of `file` if it is at hand. Otherwise it is sent for, and `op`
    /// comes back from [`take`](Self::take) with it. `now` is for [`watched`](Self::watched).
    pub fn get(&mut self, file: &Source, what: Compressed, op: Op, now: Ticks) -> Option<&[u8]> {
        let key = (op.file, what.offset, what.len);
        if self.cache.contains(&key) {
            return self.cache.get(&key).map(AsRef::as_ref);
        }
        let waiting = self.waiting.entry(key).or_default();
        waiting.ops.push(op);
        if waiting.ops.len() == 1 {
            waiting.since = now;
            let answer = self.answer.clone();
            let sent = self.workers.0.send(Job { key, file: file.clone(), what, answer });
            sent.expect("workers live as long as this");
        }
        None
    }

    /// Calls `each` for every operation whose cluster has been inflated, or could not be.
    pub fn take(&mut self, mut each: impl FnMut(Op, Option<&[u8]>)) {
        while let Ok((key, result)) = self.results.try_recv() {
            let waiting = self.waiting.remove(&key).unwrap_or_default();
            if let Err(why) = &result {
                let (file, offset, _) = key;
                tracing::error!(
                    "the compressed cluster at byte {offset} of {}: {why}",
                    files::name(file)
                );
            }
            for op in waiting.ops {
                each(op, result.as_deref().ok());
            }
            if let Ok(cluster) = result {
                self.keep(key, cluster);
            }
        }
    }

    /// What waits for a cluster: for the watch, one operation for each.
    pub fn watched(&self) -> impl Iterator<Item = (FileId, OpKind, Ticks)> {
        let first = |one: &Waiting| Some((one.ops.first()?.file, one.ops.first()?.kind, one.since));
        self.waiting.values().filter_map(first)
    }

    fn keep(&mut self, key: Key, cluster: Box<[u8]>) {
        self.cached += cluster.len();
        let before = self.cache.put(key, cluster);
        self.cached -= before.map_or(0, |before| before.len());
        while self.cached > CACHE {
            let Some((_, oldest)) = self.cache.pop_lru() else { break };
            self.cached -= oldest.len();
        }
    }
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    let mut inflate = Inflate::new();
    let mut memory = Vec::new();
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { key, file, what, answer }) = job else { return };
        let result = one(&mut inflate, &mut memory, &file, what);
        // The file closes with its last copy, which must not be this one.
        drop(file);
        // A queue that is gone does not want it any more.
        let _ = answer.results.send((key, result));
        let _ = answer.ready.write(1);
    }
}

fn one(inflate: &mut Inflate, memory: &mut Vec<u8>, file: &Source, what: Compressed) -> Inflated {
    let len = what.len as usize;
    let bytes = file.read_with(what.offset, len, memory);
    let bytes = bytes.map_err(|error| format!("cannot be read: {error}"))?;
    let mut cluster = vec![0; 1 << what.cluster_bits].into_boxed_slice();
    // What lies behind the end of the file reads as zeros.
    let result = if bytes.len() == len {
        inflate.run(what.method, bytes, &mut cluster)
    } else {
        let mut padded = bytes.to_vec();
        padded.resize(len, 0);
        inflate.run(what.method, &padded, &mut cluster)
    };
    result.map(|()| cluster).map_err(|bad| bad.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2::{Compression, OpId};
    use std::os::unix::fs::FileExt;

    fn source(bytes: &[u8]) -> Source {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        Source::new(file, true).unwrap()
    }

    fn op(id: u32, source: Compressed) -> Op {
        let kind = OpKind::Inflate { tag: 0, at: 0, source, from: 0, len: 512 };
        Op { id: OpId(id), file: FileId::Image, kind }
    }

    fn wait(pool: &mut Pool) -> Vec<(u32, Option<Vec<u8>>)> {
        let mut found = Vec::new();
        while !pool.waiting.is_empty() {
            pool.answer.ready.read().unwrap();
            pool.take(|op, cluster| found.push((op.id.0, cluster.map(<[u8]>::to_vec))));
        }
        found.sort();
        found
    }

    #[test]
    fn a_cluster_is_inflated_once_for_all_who_wait_and_then_kept() {
        let content: Vec<u8> = (0..4096u32).map(|at| u8::try_from(at % 13).unwrap()).collect();
        let mut bytes = vec![0xaa; 300];
        bytes.extend(miniz_oxide::deflate::compress_to_vec(&content, 6));
        // The last sector is not whole: the rest of it reads as zeros.
        let file = source(&bytes);
        let (method, cluster_bits) = (Compression::Zlib, 12);
        let good = Compressed { offset: 300, len: 724, method, cluster_bits };
        let bad = Compressed { offset: 0, len: 512, method, cluster_bits };
        let mut pool = Pool::new(&Workers::new().unwrap()).unwrap();
        for id in 0..3 {
            assert!(pool.get(&file, good, op(id, good), 0).is_none());
        }
        assert!(pool.get(&file, bad, op(3, bad), 0).is_none());
        let whole = Some(content.clone());
        let expected = [(0, whole.clone()), (1, whole.clone()), (2, whole), (3, None)];
        assert_eq!(wait(&mut pool), expected);
        assert_eq!(pool.get(&file, good, op(4, good), 0), Some(&content[..]));
        assert!(pool.get(&file, bad, op(5, bad), 0).is_none(), "what failed is tried again");
        assert_eq!(wait(&mut pool), [(5, None)]);
    }

    #[test]
    fn the_cache_has_a_limit_in_bytes() {
        let mut pool = Pool::new(&Workers::new().unwrap()).unwrap();
        for number in 0..20 {
            pool.keep((FileId::Image, number, 1), vec![0; 1 << 20].into_boxed_slice());
        }
        assert_eq!((pool.cached, pool.cache.len()), (CACHE, 8));
        assert!(pool.cache.contains(&(FileId::Image, 19, 1)));
    }
}
