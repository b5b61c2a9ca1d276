//! After a warm-up nothing on the path of a request allocates: the server must not wait for memory
//! while memory waits for it. Counted by the allocator, with a driver that allocates nothing.
//!
//! What may allocate, and does not happen here: moving the refcount table, and an image of more
//! tables than are set aside for ([`MetaSet`](../src/metaset.rs)).

#![cfg(feature = "testing")]
#![expect(clippy::unwrap_used, reason = "a test may end so")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2::testing::Prng;
use qcow2::{
    COPY_BUFFER, Engine, Extent, FileId, Header, Health, Image, Layer, Op, OpKind, Options,
    Outcome, Reply, Request,
};

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static ARMED: Cell<bool> = const { Cell::new(false) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// Counts, and says where the first few come from.
fn count() {
    // What a panic needs is its own affair, and it may hold the lock of backtraces.
    if std::thread::panicking() || !ARMED.replace(false) {
        return;
    }
    COUNT.set(COUNT.get() + 1);
    if COUNT.get() <= 3 {
        eprintln!("allocation {}:\n{}", COUNT.get(), Backtrace::force_capture());
    }
    ARMED.set(true);
}

/// Allocations of this thread by what `act` does.
fn counted(act: impl FnOnce()) -> u64 {
    struct Disarm;
    impl Drop for Disarm {
        fn drop(&mut self) {
            ARMED.set(false);
        }
    }
    COUNT.set(0);
    let disarm = Disarm;
    ARMED.set(true);
    act();
    drop(disarm);
    COUNT.get()
}

// SAFETY: everything is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, size) }
    }
}

const DEPTH: u16 = 32;
const QUEUES: u16 = 2;
const SIZE: u64 = 256 << 20;
const SECTOR: u64 = 512;
/// The file never gets so long: data, tables, what is reserved ahead of need, and what is on its
/// way to being free.
const MOST: usize = 512 << 20;

/// An engine, the bytes of its image, and what is under way.
struct Driver {
    engine: Engine,
    image: Vec<u8>,
    /// How much of `image` is there.
    len: usize,
    copies: Vec<[u8; COPY_BUFFER as usize]>,
    in_flight: Vec<Op>,
    free: Vec<(u16, u16)>,
    prng: Prng,
    now: u64,
    done: u64,
}

fn at(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

impl Driver {
    fn submit(&mut self) {
        let Some((queue, tag)) = self.free.pop() else { return };
        let most = if self.prng.one_in(4) { 1024 } else { 64 };
        let sectors = 1 + self.prng.below(most);
        let offset = self.prng.below(SIZE / SECTOR - sectors) * SECTOR;
        let len = u32::try_from(sectors * SECTOR).unwrap();
        let request = match self.prng.below(32) {
            0 => Request::Flush,
            1..12 => Request::Read { offset, len },
            12..16 => Request::Discard { offset, len },
            16..18 => Request::WriteZeroes { offset, len, unmap: true },
            18 => Request::WriteZeroes { offset, len, unmap: false },
            n => Request::Write { offset, len, fua: n == 19 },
        };
        self.engine.submit(queue, tag, request);
    }

    /// Takes what the engine wants, and the replies.
    fn take(&mut self) {
        for queue in 0..QUEUES {
            while let Some(op) = self.engine.next_op(queue) {
                self.in_flight.push(op);
            }
            while let Some(Reply { tag, result }) = self.engine.next_reply(queue) {
                assert_eq!(result, Ok(()));
                self.free.push((queue, tag));
                self.done += 1;
            }
        }
        while let Some(event) = self.engine.next_record() {
            std::hint::black_box(event);
        }
        assert!(self.engine.next_incident().is_none());
    }

    fn complete(&mut self) {
        let number = self.prng.index(self.in_flight.len());
        let op = self.in_flight.swap_remove(number);
        // What it reads and writes of guest data is nobody's concern here.
        if op.file == FileId::Image {
            self.carry_out(op);
        }
        self.engine.complete(op.id, Outcome::Done);
    }

    fn carry_out(&mut self, op: Op) {
        match op.kind {
            OpKind::MetaRead { offset, len } => {
                let bytes = &self.image[at(offset)..][..len as usize];
                self.engine.fill_staging(op.id, bytes);
            }
            OpKind::MetaWrite { offset, len } => {
                let bytes = self.engine.staging(op.id);
                self.image[at(offset)..][..len as usize].copy_from_slice(bytes);
                self.len = self.len.max(at(offset) + len as usize);
            }
            OpKind::WriteZeros { offset, len } => {
                self.image[at(offset)..][..len as usize].fill(0);
                self.len = self.len.max(at(offset) + len as usize);
            }
            OpKind::ZeroRange { offset, len } | OpKind::Punch { offset, len } => {
                self.image[at(offset)..][..at(len)].fill(0);
            }
            OpKind::CopyRead { buffer, at: from, offset, len } => {
                let to = &mut self.copies[usize::from(buffer)][from as usize..][..len as usize];
                to.copy_from_slice(&self.image[at(offset)..][..len as usize]);
            }
            OpKind::CopyWrite { buffer, offset, len } => {
                let from = &self.copies[usize::from(buffer)][..len as usize];
                self.image[at(offset)..][..len as usize].copy_from_slice(from);
            }
            OpKind::CopyFill { buffer, at, len } => {
                self.copies[usize::from(buffer)][at as usize..][..len as usize].fill(0);
            }
            OpKind::Extend { to, .. } => self.len = self.len.max(at(to)),
            OpKind::Truncate { to } => self.len = at(to),
            OpKind::Sync
            | OpKind::Read { .. }
            | OpKind::Write { .. }
            | OpKind::Fill { .. }
            | OpKind::Inflate { .. }
            | OpKind::CopyInflate { .. } => {}
        }
        assert!(self.len <= MOST, "{} bytes", self.len);
    }

    fn serve(&mut self, requests: u64) {
        let end = self.done + requests;
        while self.done < end {
            for _ in 0..self.prng.below(6) {
                self.submit();
                self.take();
            }
            for _ in 0..self.prng.below(24) {
                if !self.in_flight.is_empty() {
                    self.complete();
                    self.take();
                }
            }
            if self.prng.one_in(64) {
                self.now += 500;
                self.engine.tick(self.now);
                self.take();
            }
        }
    }
}

fn create(name: &str, layout: &str) -> Vec<u8> {
    let path: PathBuf = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.qcow2"));
    let create = ["create", "-q", "-f", "qcow2", "-o", layout];
    let done = Command::new("qemu-img").args(create).arg(&path).arg(SIZE.to_string()).status();
    assert!(done.expect("qemu-img must be installed").success());
    std::fs::read(&path).unwrap()
}

fn driver(name: &str, layout: &str, over: bool, more: &Options) -> Driver {
    let bytes = create(name, layout);
    let header = Header::parse(&bytes, bytes.len() as u64, false).unwrap();
    let part = |extent: Extent| &bytes[at(extent.offset)..][..at(extent.len)];
    let (l1, refcounts) = (part(header.l1_extent()), part(header.refcount_table_extent()));
    let image = Image::new(header.clone(), l1, refcounts, bytes.len() as u64).unwrap();
    let layers = if over { vec![Layer::raw(SIZE)] } else { Vec::new() };
    let image = image.with_layers(layers).unwrap();
    let options = Options { queues: QUEUES, depth: DEPTH, ..more.clone() };
    let engine = Engine::new(image, &options).unwrap();
    let len = bytes.len();
    let mut image = vec![0; MOST];
    image[..len].copy_from_slice(&bytes);
    let tags = |queue| (0..DEPTH).map(move |tag| (queue, tag));
    let mut driver = Driver {
        copies: vec![[0; COPY_BUFFER as usize]; engine.copy_buffers()],
        in_flight: Vec::with_capacity(engine.max_ops()),
        free: (0..QUEUES).flat_map(tags).collect(),
        engine,
        image,
        len,
        prng: Prng::new(len as u64),
        now: 0,
        done: 0,
    };
    driver.take();
    while !driver.engine.is_ready() {
        driver.complete();
        driver.take();
    }
    driver
}

/// Serves with the allocator watching.
fn check(name: &str, layout: &str, over: bool, options: &Options) {
    let mut driver = driver(name, layout, over, options);
    driver.serve(1_000);
    let before = driver.engine.stats();
    let allocations = counted(|| driver.serve(100_000));
    assert_eq!(allocations, 0, "{name}: allocations");
    // It was no idle run.
    let stats = driver.engine.stats();
    assert_eq!(driver.engine.health(), Health::Good);
    assert!(stats.allocated_data - before.allocated_data > 10_000, "{name}: {stats:?}");
    assert!(stats.syncs - before.syncs > 1_000, "{name}: {stats:?}");
    assert!(stats.zeroes - before.zeroes > 10_000, "{name}: {stats:?}");
    assert!(!over || stats.copies - before.copies > 1_000, "{name}: {stats:?}");
}

#[test]
fn the_allocator_of_this_test_counts() {
    let allocate = || drop(std::hint::black_box(Vec::<u8>::with_capacity(100)));
    assert_eq!((counted(|| ()), counted(allocate)), (0, 1));
}

#[test]
fn serving_an_image_allocates_nothing() {
    check("plain", "cluster_size=64k", false, &Options::default());
    check("small", "cluster_size=4k", false, &Options::default());
}

#[test]
fn serving_an_overlay_allocates_nothing() {
    check("over", "cluster_size=64k", true, &Options::default());
    check("subclusters", "cluster_size=64k,extended_l2=on", true, &Options::default());
}

#[test]
fn serving_with_a_tiny_cache_allocates_nothing() {
    // Not so few refcounts: where a page of them is missing, the file is made longer meanwhile.
    let least = Options { l2_cache: Some(0), ..Options::default() };
    check("least", "cluster_size=4k", false, &least);
}

#[test]
fn serving_with_a_journal_allocates_nothing() {
    let journal = Options { journal: 1 << 12, ..Options::default() };
    check("journal", "cluster_size=64k", true, &journal);
}
