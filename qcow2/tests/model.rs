//! Seeded mixes of reads, writes and flushes against a byte-for-byte model, on small clusters so
//! that every table grows, with completions in any order; then `qemu-img` judges the image.

#![expect(clippy::unwrap_used, reason = "a test may end so")]

use std::path::{Path, PathBuf};
use std::process::Command;

use qcow2::testing::{Disk, Prng, SECTOR, World};
use qcow2::{Health, IoErrorKind, Options, Request};

fn qemu_img(args: &[&str]) -> (bool, String) {
    let out = Command::new("qemu-img").args(args).output().expect("qemu-img must be installed");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    (out.status.success(), text + &String::from_utf8_lossy(&out.stderr))
}

fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn create(path: &Path, options: &str, size: u64) -> Vec<u8> {
    let path = path.to_str().unwrap();
    let size = size.to_string();
    let (ok, text) = qemu_img(&["create", "-f", "qcow2", "-o", options, path, &size]);
    assert!(ok, "{text}");
    std::fs::read(path).unwrap()
}

/// What was written to one sector, oldest first: the marks of the writes, 0 for the first content.
#[derive(Clone)]
struct History {
    marks: Vec<u64>,
    /// How many of `marks` belong to writes that were replied to.
    complete: usize,
    /// The first mark that a power cut may leave.
    durable: usize,
}

/// An image being worked on, and what is known of it.
struct Run {
    world: World,
    model: Vec<u8>,
    prng: Prng,
    /// What each tag does: the request and where in the model it is.
    busy: Vec<Option<(Request, Vec<u8>)>>,
    size: u64,
    cluster: u64,
    backing: Option<Vec<u8>>,
    sectors: Vec<History>,
    /// For each FLUSH under way: how far each sector was complete when it was submitted.
    flushes: Vec<(usize, Vec<usize>)>,
}

/// The bytes of a sector that was written with `mark`.
fn sector_bytes(place: u64, mark: u64) -> [u8; SECTOR] {
    let mut sector = [u8::try_from(mark & 0xff).unwrap(); SECTOR];
    sector[..8].copy_from_slice(&place.to_be_bytes());
    sector[8..16].copy_from_slice(&mark.to_be_bytes());
    sector
}

impl Run {
    fn new(seed: u64, image: Vec<u8>, model: Vec<u8>, options: &Options) -> Self {
        Self::over(seed, image, None, model, options)
    }

    fn over(
        seed: u64,
        image: Vec<u8>,
        backing: Option<Vec<u8>>,
        model: Vec<u8>,
        options: &Options,
    ) -> Self {
        let cluster = 1 << image[23];
        let disk = Disk::new(image);
        let mut world = World::open_over(disk, backing.clone(), options).expect("a good image");
        world.plain = seed % 3 == 2;
        world.settle();
        assert!(world.engine.is_ready());
        let size = model.len() as u64;
        let depth = options.depth;
        // A sector that was there before: what it holds says with which mark it was written.
        let mark = |sector: &[u8]| u64::from_be_bytes(sector[8..16].try_into().unwrap());
        let first = |s: &[u8]| History { marks: vec![mark(s)], complete: 1, durable: 0 };
        let sectors = model.chunks_exact(SECTOR).map(first).collect();
        let (prng, busy) = (Prng::new(seed), vec![None; depth.into()]);
        let flushes = Vec::new();
        Self { world, model, prng, busy, size, cluster, backing, sectors, flushes }
    }

    /// A range that no request under way writes to.
    fn range(&mut self, longest: u64) -> Option<(u64, u32)> {
        let sectors = self.size / SECTOR as u64;
        let start = self.prng.below(sectors);
        let len = (1 + self.prng.below(longest)).min(sectors - start);
        let (offset, len) = (start * SECTOR as u64, len * SECTOR as u64);
        let apart = |request: &Request| match *request {
            Request::Read { offset: at, len: n }
            | Request::WriteZeroes { offset: at, len: n, .. }
            | Request::Discard { offset: at, len: n }
            | Request::Write { offset: at, len: n, .. } => {
                at >= offset + len || at + u64::from(n) <= offset
            }
            Request::Flush => true,
        };
        let free = self.busy.iter().flatten().all(|(request, _)| apart(request));
        free.then(|| (offset, u32::try_from(len).unwrap()))
    }

    fn submit(&mut self, longest: u64) {
        let Some(tag) = self.busy.iter().position(Option::is_none) else { return };
        let Some((offset, len)) = self.range(longest) else { return };
        let request = match self.prng.below(16) {
            0 => Request::Flush,
            1..6 => Request::Read { offset, len },
            n @ 12..15 => {
                let request = match n {
                    12 => Request::Discard { offset, len },
                    n => Request::WriteZeroes { offset, len, unmap: n == 13 },
                };
                for sector in self.zeroed(request) {
                    self.sectors[sector].marks.push(0);
                }
                request
            }
            n => return self.write(tag, offset, len, n == 6),
        };
        if request == Request::Flush {
            let complete = self.sectors.iter().map(|sector| sector.complete).collect();
            self.flushes.push((tag, complete));
        }
        self.busy[tag] = Some((request, Vec::new()));
        self.world.submit(u16::try_from(tag).unwrap(), request, vec![0xaa; len as usize]);
    }

    /// The sectors that a write zeroes or discard makes zero: a discard leaves parts of clusters.
    fn zeroed(&self, request: Request) -> std::ops::Range<usize> {
        let at = |offset: u64| usize::try_from(offset).unwrap() / SECTOR;
        match request {
            Request::WriteZeroes { offset, len, .. } => at(offset)..at(offset + u64::from(len)),
            Request::Discard { offset, len } => {
                let start = offset.next_multiple_of(self.cluster);
                let end = offset + u64::from(len);
                let end = if end == self.size { end } else { end - end % self.cluster };
                at(start)..at(end.max(start))
            }
            _ => 0..0,
        }
    }

    /// Writes the first `end` bytes, in pieces of 64 KiB, some of them at the same time.
    fn fill(&mut self, end: u64) {
        for offset in (0..end).step_by(1 << 16) {
            while self.busy.iter().all(Option::is_some) {
                let index = self.prng.index(self.world.in_flight.len());
                self.world.complete(index);
                self.take_replies();
            }
            let tag = self.busy.iter().position(Option::is_none).unwrap();
            self.write(tag, offset, 1 << 16, false);
        }
    }

    fn write(&mut self, tag: usize, offset: u64, len: u32, fua: bool) {
        let mark = self.prng.any();
        let mut bytes = vec![0; len as usize];
        for (index, sector) in bytes.chunks_exact_mut(SECTOR).enumerate() {
            let place = offset + (index * SECTOR) as u64;
            sector.copy_from_slice(&sector_bytes(place, mark));
            self.sectors[usize::try_from(place).unwrap() / SECTOR].marks.push(mark);
        }
        let request = Request::Write { offset, len, fua };
        self.busy[tag] = Some((request, bytes.clone()));
        self.world.submit(u16::try_from(tag).unwrap(), request, bytes);
    }

    fn flush(&mut self) {
        let complete = self.sectors.iter().map(|sector| sector.complete).collect();
        self.flushes.push((0, complete));
        self.busy[0] = Some((Request::Flush, Vec::new()));
        self.world.submit(0, Request::Flush, Vec::new());
        self.world.settle();
        self.take_replies();
    }

    fn take_replies(&mut self) {
        for reply in std::mem::take(&mut self.world.replies) {
            let tag = usize::from(reply.tag);
            let (request, bytes) = self.busy[tag].take().expect("a request under way");
            assert_eq!(reply.result, Ok(()));
            match request {
                Request::Read { offset, len } => {
                    let start = usize::try_from(offset).unwrap();
                    let expected = &self.model[start..start + len as usize];
                    assert!(self.world.buffers[tag] == expected, "a read at {offset} differs");
                }
                Request::Write { offset, len, fua } => {
                    let start = usize::try_from(offset).unwrap();
                    let end = start + len as usize;
                    self.model[start..end].copy_from_slice(&bytes);
                    for sector in &mut self.sectors[start / SECTOR..end / SECTOR] {
                        sector.complete = sector.marks.len();
                        if fua {
                            sector.durable = sector.marks.len() - 1;
                        }
                    }
                }
                Request::WriteZeroes { .. } | Request::Discard { .. } => {
                    for sector in self.zeroed(request) {
                        self.model[sector * SECTOR..(sector + 1) * SECTOR].fill(0);
                        self.sectors[sector].complete = self.sectors[sector].marks.len();
                    }
                }
                Request::Flush => {
                    let found = self.flushes.iter().position(|(by, _)| *by == tag).unwrap();
                    let (_, complete) = self.flushes.swap_remove(found);
                    for (sector, complete) in self.sectors.iter_mut().zip(complete) {
                        sector.durable = sector.durable.max(complete - 1);
                    }
                }
            }
        }
    }

    /// Every sector of `image` holds what it held at the last FLUSH, or something later.
    fn check_after_cut(&self, image: Vec<u8>, options: &Options) {
        let disk = Disk::new(image);
        let opened = World::open_over(disk, self.backing.clone(), options);
        let mut world = opened.expect("it opens without repair");
        world.settle();
        let len = u32::try_from(self.size).unwrap();
        world.submit(0, Request::Read { offset: 0, len }, vec![0xaa; self.model.len()]);
        world.settle();
        assert_eq!(world.replies[0].result, Ok(()));
        for (index, found) in world.buffers[0].chunks_exact(SECTOR).enumerate() {
            let place = (index * SECTOR) as u64;
            let history = &self.sectors[index];
            let allowed = &history.marks[history.durable..];
            let is = |mark: u64| match mark {
                0 => found.iter().all(|&byte| byte == 0),
                mark => found == sector_bytes(place, mark),
            };
            assert!(
                allowed.iter().any(|&mark| is(mark)),
                "sector {index}: not one of {allowed:x?}"
            );
        }
    }

    fn step(&mut self) {
        let in_flight = self.world.in_flight.len();
        if in_flight != 0 && self.prng.one_in(2) {
            let index = self.prng.index(in_flight);
            if self.prng.one_in(20) {
                let bytes = u32::try_from(self.prng.below(8)).unwrap() * 512;
                self.world.complete_short(index, bytes);
            } else {
                self.world.complete(index);
            }
        } else {
            let longest = if self.prng.one_in(8) { 64 } else { 8 };
            self.submit(longest);
        }
        self.take_replies();
    }

    fn finish(mut self) -> (Disk, Vec<u8>) {
        self.world.settle();
        self.take_replies();
        let hangs: Vec<_> = self.busy.iter().flatten().map(|(request, _)| request).collect();
        assert!(hangs.is_empty(), "requests hang: {hangs:?} {}", self.world.engine.waits());
        let (disk, health) = self.world.close();
        assert_eq!(health, Health::Good);
        (disk, self.model)
    }
}

fn judge(path: &Path, image: &[u8], model: &[u8]) {
    std::fs::write(path, image).unwrap();
    let name = path.to_str().unwrap();
    let (ok, text) = qemu_img(&["check", "-f", "qcow2", name]);
    assert!(ok && text.contains("No errors"), "qemu-img check says: {text}");
    let raw = path.with_extension("raw");
    std::fs::write(&raw, model).unwrap();
    let raw = raw.to_str().unwrap();
    let (ok, text) = qemu_img(&["compare", "-f", "qcow2", "-F", "raw", name, raw]);
    assert!(ok, "qemu-img compare says: {text}");
}

/// `qemu-img check` exits with 0 for a clean image, with 3 where all it finds is leaks.
fn leaks_at_most(path: &Path) {
    let mut check = Command::new("qemu-img");
    let out = check.args(["check", "-f", "qcow2"]).arg(path).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(matches!(out.status.code(), Some(0 | 3)), "qemu-img check says: {text}");
}

/// One image, a number of steps, close, judge, and once more on what is there now.
fn check(name: &str, create_options: &str, size: u64, options: &Options, steps: u64) {
    let dir = scratch("model");
    for seed in 0..4 {
        let path = dir.join(format!("{name}-{seed}.qcow2"));
        let mut image: Vec<u8> = create(&path, create_options, size);
        let mut model = vec![0; usize::try_from(size).unwrap()];
        for reopened in 0..2 {
            println!("replay: {name} seed={seed} reopened={reopened}");
            let mut run = Run::new(seed * 2 + reopened, image, model, options);
            for _ in 0..steps {
                run.step();
            }
            let (disk, after) = run.finish();
            judge(&path, &disk.bytes(), &after);
            (image, model) = (disk.bytes(), after);
        }
    }
}

fn small() -> Options {
    Options { depth: 16, reservation: 8192, ..Options::default() }
}

#[test]
fn clusters_of_512_bytes_where_every_table_grows() {
    check("c512", "cluster_size=512", 24 << 20, &small(), 6000);
}

#[test]
fn clusters_of_512_bytes_under_stress() {
    let options = Options { stress: true, ..small() };
    check("c512-stress", "cluster_size=512", 4 << 20, &options, 4000);
}

#[test]
fn clusters_of_4_kib() {
    check("c4k", "cluster_size=4096", 16 << 20, &small(), 4000);
}

#[test]
fn clusters_of_4_kib_under_stress() {
    let options = Options { stress: true, ..small() };
    check("c4k-stress", "cluster_size=4096", 16 << 20, &options, 4000);
}

#[test]
fn clusters_of_64_kib_and_a_size_that_is_no_multiple() {
    check("c64k", "cluster_size=65536", (5 << 20) + 512 * 3, &small(), 2000);
}

#[test]
fn clusters_of_2_mib() {
    check("c2m", "cluster_size=2M", 8 << 20, &small(), 300);
}

#[test]
fn version_2() {
    check("v2", "compat=0.10,cluster_size=1024", 4 << 20, &small(), 3000);
}

#[test]
fn preallocated_metadata() {
    check("meta", "preallocation=metadata,cluster_size=4096", 4 << 20, &small(), 2000);
}

#[test]
fn preallocated_in_full() {
    check("full", "preallocation=full,cluster_size=4096", 4 << 20, &small(), 2000);
}

/// The same over a backing file that is shorter than the image and ends within a sector.
fn check_overlay(name: &str, cluster: u64, options: &Options, steps: u64) {
    let dir = scratch("overlay");
    let size: u64 = 2 << 20;
    for seed in 0..6 {
        println!("replay: {name} seed={seed}");
        let mut prng = Prng::new(seed);
        let path = dir.join(format!("{name}-{seed}.qcow2"));
        let beneath = dir.join(format!("{name}-{seed}.base"));
        let mut backing = Vec::new();
        for place in (0..size * 2 / 3).step_by(SECTOR) {
            backing.extend_from_slice(&sector_bytes(place, 7));
        }
        backing.truncate(backing.len() - 200);
        std::fs::write(&beneath, &backing).unwrap();
        let more = format!("cluster_size={cluster}");
        let image = create(&path, &more, size);
        let mut model = backing.clone();
        model.resize(usize::try_from(size).unwrap(), 0);
        let mut run = Run::over(seed, image, Some(backing), model, options);
        // The sector that the end lies in is neither: let it be written first.
        let last = (run.backing.as_ref().unwrap().len() / SECTOR * SECTOR) as u64;
        run.write(0, last, 512, false);
        run.world.settle();
        run.take_replies();
        run.sectors[usize::try_from(last).unwrap() / SECTOR].durable = 1;
        run.flush();
        for step in 0..steps {
            run.step();
            if step % 97 == 0 {
                let image = run.world.disk.power_cut(&mut prng);
                std::fs::write(&path, &image).unwrap();
                leaks_at_most(&path);
                run.check_after_cut(image, options);
            }
        }
        let (disk, model) = run.finish();
        std::fs::write(&path, disk.bytes()).unwrap();
        let (name, base) = (path.to_str().unwrap(), beneath.to_str().unwrap());
        // The engine was told of the backing file; now the image is, too.
        let (ok, text) = qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", base, "-F", "raw", name]);
        assert!(ok, "{text}");
        judge(&path, &std::fs::read(&path).unwrap(), &model);
    }
}

#[test]
fn overlays_with_clusters_of_512_bytes() {
    check_overlay("o512", 512, &small(), 3000);
}

#[test]
fn overlays_with_clusters_of_4_kib() {
    check_overlay("o4k", 4096, &small(), 3000);
}

#[test]
fn overlays_under_stress() {
    check_overlay("o4k-stress", 4096, &Options { stress: true, ..small() }, 2000);
}

#[test]
fn overlays_with_clusters_of_64_kib() {
    check_overlay("o64k", 65536, &small(), 1000);
}

#[test]
fn an_error_leaves_the_old_state_and_leaks_at_most() {
    let dir = scratch("errors");
    for seed in 0..60 {
        println!("replay: errors seed={seed}");
        let mut prng = Prng::new(seed);
        let path = dir.join(format!("{seed}.qcow2"));
        let image = create(&path, "cluster_size=512", 1 << 20);
        let options = Options { stress: seed % 2 == 0, ..small() };
        let mut run = Run::new(seed, image, vec![0; 1 << 20], &options);
        for _ in 0..300 {
            run.step();
        }
        // From here on operations fail at random; whatever happens, all requests end.
        for _ in 0..200 {
            let in_flight = run.world.in_flight.len();
            if in_flight != 0 && prng.one_in(2) {
                let kind = if prng.one_in(2) { IoErrorKind::NoSpace } else { IoErrorKind::Io };
                let index = prng.index(in_flight);
                if prng.one_in(3) {
                    run.world.fail(index, kind, prng.index(4) * SECTOR);
                } else {
                    run.world.complete(index);
                }
            } else {
                run.submit(8);
            }
            for reply in std::mem::take(&mut run.world.replies) {
                run.busy[usize::from(reply.tag)] = None;
            }
        }
        run.world.settle();
        for reply in std::mem::take(&mut run.world.replies) {
            run.busy[usize::from(reply.tag)] = None;
        }
        let hangs: Vec<_> = run.busy.iter().flatten().map(|(request, _)| request).collect();
        assert!(hangs.is_empty(), "requests hang: {hangs:?} {}", run.world.engine.waits());
        let (disk, _) = run.world.close();
        std::fs::write(&path, disk.bytes()).unwrap();
        leaks_at_most(&path);
    }
}

/// Where the header says that the refcount table lies.
fn refcount_table(image: &[u8]) -> [u8; 12] {
    image[48..60].try_into().unwrap()
}

#[test]
fn the_refcount_table_moves_when_the_file_outgrows_it() {
    // One cluster of table counts 64 blocks of 256 clusters of 512 bytes: 8 MiB. The image begins
    // just below, and is cut while the table moves.
    let dir = scratch("grow");
    let size = 10 << 20;
    let mut moved = 0;
    for seed in 0..6 {
        println!("replay: grow seed={seed}");
        let mut prng = Prng::new(seed);
        let path = dir.join(format!("{seed}.qcow2"));
        let image = create(&path, "cluster_size=512", size);
        let before = refcount_table(&image);
        let options = Options { stress: seed % 3 == 0, ..small() };
        let mut run = Run::new(seed, image, vec![0; usize::try_from(size).unwrap()], &options);
        run.fill(((7 << 20) + (13 << 16)) & !0xffff);
        let mut cuts = 0;
        for _ in 0..4000 {
            run.step();
            let growing = run.world.disk.len() > (8 << 20) - (1 << 16)
                && refcount_table(&run.world.disk.bytes()) == before;
            if growing && cuts < 12 && prng.one_in(20) {
                cuts += 1;
                let image = run.world.disk.power_cut(&mut prng);
                let path = dir.join(format!("{seed}-cut.qcow2"));
                std::fs::write(&path, &image).unwrap();
                leaks_at_most(&path);
                run.check_after_cut(image, &options);
            }
        }
        let (disk, model) = run.finish();
        moved += u32::from(refcount_table(&disk.bytes()) != before);
        judge(&path, &disk.bytes(), &model);
        let mut again = Run::new(seed, disk.bytes(), model, &options);
        for _ in 0..200 {
            again.step();
        }
        let (disk, model) = again.finish();
        judge(&path, &disk.bytes(), &model);
    }
    assert!(moved >= 3, "only {moved} of these images outgrow their table");
}

#[test]
fn a_power_cut_leaves_leaks_at_most_and_what_was_flushed() {
    let dir = scratch("cut");
    for seed in 0..40 {
        println!("replay: cut seed={seed}");
        let mut prng = Prng::new(seed);
        let path = dir.join(format!("{seed}.qcow2"));
        let size = 1 << 20;
        let image = create(&path, "cluster_size=512", size);
        let options = Options { stress: seed % 4 == 0, ..small() };
        let mut run = Run::new(seed, image, vec![0; usize::try_from(size).unwrap()], &options);
        for _ in 0..200 + prng.below(800) {
            run.step();
        }
        for cut in 0..8 {
            let image = run.world.disk.power_cut(&mut prng);
            let path = dir.join(format!("{seed}-{cut}.qcow2"));
            std::fs::write(&path, &image).unwrap();
            leaks_at_most(&path);
            run.check_after_cut(image, &options);
        }
    }
}

#[test]
fn free_clusters_inside_the_file_serve_when_it_cannot_grow() {
    let dir = scratch("full");
    for seed in 0..4 {
        println!("replay: full seed={seed}");
        let path = dir.join(format!("{seed}.qcow2"));
        let size = 1 << 20;
        let mut image = create(&path, "cluster_size=512", size);
        // Free space inside the file, full of somebody's old bytes; and no room behind it.
        image.resize(image.len().next_multiple_of(512), 0);
        image.resize(image.len() + (100 << 10), 0x5a);
        let mut run = Run::new(seed, image, vec![0; usize::try_from(size).unwrap()], &small());
        run.world.full = true;
        for step in 0..60 {
            let tag = run.busy.iter().position(Option::is_none).unwrap();
            run.write(tag, (step * 7 % 60) * 1024, 1024, false);
            if step % 4 == 3 {
                while !run.world.in_flight.is_empty() {
                    let index = run.prng.index(run.world.in_flight.len());
                    run.world.complete(index);
                }
                run.take_replies();
            }
        }
        run.world.settle();
        run.take_replies();
        // Now it is full in truth, and says so.
        let mut refused = 0;
        for step in 0..200 {
            run.world.submit(0, write(512 << 10, step), vec![1; 512]);
            run.world.settle();
            for reply in std::mem::take(&mut run.world.replies) {
                refused += u64::from(reply.result == Err(IoErrorKind::NoSpace));
            }
        }
        assert!(refused > 50, "{refused}");
        let (disk, health) = run.world.close();
        assert_eq!(health, Health::Good);
        std::fs::write(&path, disk.bytes()).unwrap();
        let (ok, text) = qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
        assert!(ok, "{text}");
    }
}

fn write(base: u64, step: u64) -> Request {
    Request::Write { offset: base + step * 1024, len: 512, fua: false }
}
