//! One run of a workload: a guest, an engine and a disk, event by event, from one seed.

use std::format;
use std::rc::Rc;
use std::string::String;
use std::vec::Vec;

use crate::error::IoErrorKind;
use crate::op::{Op, OpId, OpKind, Request};
use crate::testing::disk::Disk;
use crate::testing::guest::{Demand, Guest, describe};
use crate::testing::image::Setting;
use crate::testing::judge::{Judge, State};
use crate::testing::pool::{SECTOR, SectorId, SharedPool};
use crate::testing::prng::Prng;
use crate::testing::workload::Workload;
use crate::testing::world::World;

mod honest;
mod lives;

/// Where the image is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Opening,
    Serving,
    Closing,
}

/// A fault to be injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which operation, counted from the start of the run in the order of their ends.
    pub index: u64,
    /// An error, or a short transfer.
    pub kind: Option<IoErrorKind>,
    /// All that follow, too.
    pub lasting: bool,
}

/// The run.
#[derive(Clone, Debug)]
pub struct Run {
    /// Engine, disk and buffers.
    pub world: World,
    /// What the guest may expect.
    pub guest: Guest,
    /// The mix and the image.
    pub workload: Workload,
    /// What is around the image, or in it, and never changes.
    pub setting: Rc<Setting>,
    pool: SharedPool,
    prng: Prng,
    /// Some events are worked on together.
    gathers: bool,
    stage: Stage,
    /// Events so far.
    pub steps: u64,
    now_ms: u64,
    /// Clusters that may have been leaked before the image was opened.
    leaks_before: u64,
    /// The process that is opening the image is the successor of one that was killed.
    recovers: bool,
    /// Operations that have ended.
    pub ended: u64,
    fault: Option<Fault>,
    /// The operation that was last short by all it asked for.
    stalled: Option<OpId>,
    /// An error was injected since the image was opened: requests may fail.
    faulted: bool,
    /// What the first fault hit.
    first: Option<Hit>,
    /// At which step each tag's request was submitted.
    asked: Vec<u64>,
    /// What happened, in words, if somebody wants to know.
    pub trace: Option<Vec<String>>,
    judge: Judge,
}

/// What a fault hit, and when.
#[derive(Clone, Copy, Debug)]
struct Hit {
    step: u64,
    kind: OpKind,
}

/// In a quarter of the runs, one event in so many is worked on together with the next.
const GATHERED: u64 = 3;

/// One event in so many kills a successor that is opening the image, or a process that closes it.
const DEATHS_OPENING: u64 = 20;

/// A result in words.
pub type Told<T> = Result<T, String>;

impl Run {
    /// Begins, on a fresh image.
    ///
    /// # Errors
    /// If the image does not open.
    pub fn new(workload: &Workload, seed: u64, pool: &SharedPool) -> Told<Self> {
        let made = workload.image.make(&mut pool.borrow_mut());
        let disk = Disk::sharing(&made.bytes, pool);
        let data = made.data.map(|bytes| Disk::sharing(&bytes, pool));
        let setting = Rc::new(made.setting);
        Self::on(workload, seed, (disk, data, setting), &made.content, 0)
    }

    /// Begins on a disk, and perhaps one for the data file, in which the guest finds `content`.
    ///
    /// # Errors
    /// If the image does not open.
    pub fn on(
        workload: &Workload,
        seed: u64,
        (mut disk, data, setting): (Disk, Option<Disk>, Rc<Setting>),
        content: &[SectorId],
        leaks: u64,
    ) -> Told<Self> {
        disk.watch();
        let pool = SharedPool::clone(disk.pool());
        let mut world = World::open_on(disk, setting.files.clone(), data, &workload.options)
            .map_err(|error| format!("the image does not open: {error}"))?;
        (world.plain, world.full) = (!workload.punch, workload.options.fixed_size);
        let mut run = Self {
            world,
            guest: Guest::new(content),
            workload: workload.clone(),
            setting,
            pool,
            prng: Prng::new(seed),
            gathers: seed.is_multiple_of(4),
            stage: Stage::Opening,
            steps: 0,
            now_ms: 0,
            leaks_before: leaks,
            recovers: false,
            ended: 0,
            fault: None,
            stalled: None,
            faulted: false,
            first: None,
            asked: std::vec![0; usize::from(workload.options.depth)],
            trace: None,
            judge: Judge::default(),
        };
        run.world.pump(None);
        Ok(run)
    }

    /// The same image, after a crash that has left these sectors, length, and data file.
    ///
    /// # Errors
    /// If the image does not open.
    pub(crate) fn after_crash(
        &self,
        seed: u64,
        (sectors, len, data): (Vec<SectorId>, u64, Vec<SectorId>),
        content: &[SectorId],
        leaks: u64,
    ) -> Told<Self> {
        let disk = Disk::of_sectors(sectors, len, &self.pool);
        let data_len = (data.len() * SECTOR) as u64;
        let has_data = self.world.data.is_some();
        let data = has_data.then(|| Disk::of_sectors(data, data_len, &self.pool));
        let setting = Rc::clone(&self.setting);
        Self::on(&self.workload, seed, (disk, data, setting), content, leaks)
    }

    /// Injects a fault.
    pub fn inject(&mut self, fault: Fault) {
        self.fault = Some(fault);
    }

    /// Was an error injected into the life that goes on?
    #[must_use]
    pub fn is_faulted(&self) -> bool {
        self.faulted
    }

    /// Had the fault an effect?
    #[must_use]
    pub fn was_faulted(&self) -> bool {
        self.first.is_some()
    }

    /// Has a fault ended the life of the image: it does not open, or not close?
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.faulted && self.stage != Stage::Serving && self.world.in_flight.is_empty()
    }

    fn tell(&mut self, what: impl FnOnce(&Self) -> String) {
        if self.trace.is_some() {
            let line = format!("{:4} {}", self.steps, what(self));
            if let Some(trace) = &mut self.trace {
                trace.push(line);
            }
        }
    }

    /// Grows whenever what a crash may leave changes.
    pub(crate) fn generation(&self) -> (u64, u64) {
        let data = self.world.data.as_ref().map_or(0, Disk::generation);
        (self.world.disk.generation() + data, self.guest.generation())
    }

    /// What a crash now may leave.
    pub fn demand(&self, out: &mut Demand) {
        self.guest.demand(self.most_leaks(), &self.pool.borrow(), out);
    }

    /// Clusters that may be leaked now: what was before this life, and what the engine says.
    fn most_leaks(&self) -> u64 {
        let bound = self.world.engine.leak_bound();
        if self.faulted { u64::MAX } else { self.leaks_before.saturating_add(bound) }
    }

    /// One event.
    ///
    /// # Errors
    /// What the engine does wrong.
    pub fn step(&mut self) -> Told<()> {
        self.steps += 1;
        self.world.gathers = false;
        match self.stage {
            Stage::Opening => {
                if self.world.engine.is_ready() {
                    self.opened()?;
                } else if self.recovers && self.prng.one_in(DEATHS_OPENING) {
                    crate::mark!("adopt.death");
                    self.die()?;
                } else if self.workload.errors != 0 && self.has_failed() {
                    // A transfer has failed: the journal is kept, and recovered from once more.
                    self.die()?;
                } else {
                    self.complete_one()?;
                }
            }
            Stage::Serving => self.serve()?,
            Stage::Closing => {
                if self.world.engine.is_closed() {
                    self.closed()?;
                } else if self.world.kept.is_some() && self.prng.one_in(DEATHS_OPENING) {
                    self.die()?;
                } else {
                    self.complete_one()?;
                }
            }
        }
        self.look()
    }

    fn serve(&mut self) -> Told<()> {
        let Workload { deaths, closes, .. } = self.workload;
        if deaths != 0 && self.prng.one_in(deaths) {
            return self.die();
        }
        if closes != 0 && self.prng.one_in(closes) {
            self.tell(|_| "close".into());
            self.stage = Stage::Closing;
            self.world.engine.close();
            self.world.pump(Some(&self.guest));
            return Ok(());
        }
        if self.prng.one_in(60) {
            self.now_ms += self.prng.below(4000);
            self.world.engine.tick(self.now_ms);
            self.world.pump(Some(&self.guest));
        }
        if self.world.in_flight.is_empty() {
            self.world.go_on(Some(&self.guest));
            self.look()?;
        }
        let idle = self.world.in_flight.is_empty();
        // As in a turn of the server, where much may have come.
        self.world.gathers = self.gathers && !idle && self.prng.one_in(GATHERED);
        if !idle && self.prng.one_in(2) {
            return self.complete_one();
        }
        let depth = self.workload.options.depth;
        match (0..depth).find(|&tag| !self.guest.is_busy(tag)) {
            Some(tag) => self.submit(tag),
            None if idle => return Err("nothing is in flight, and requests hang".into()),
            None => return self.complete_one(),
        }
        Ok(())
    }

    /// A random request.
    fn submit(&mut self, tag: u16) {
        let sectors = self.guest.len() as u64;
        let start = self.prng.below(sectors);
        let len = (1 + self.prng.below(self.workload.longest)).min(sectors - start);
        let offset = start * SECTOR as u64;
        let len = u32::try_from(len * SECTOR as u64).expect("a short request");
        let mix = self.workload.mix;
        let mut choice = self.prng.below(mix.total());
        let unmap = self.prng.one_in(2);
        let weighted = [
            (mix.read, Request::Read { offset, len }),
            (mix.write, Request::Write { offset, len, fua: false }),
            (mix.fua, Request::Write { offset, len, fua: true }),
            (mix.flush, Request::Flush),
            (mix.zero, Request::WriteZeroes { offset, len, unmap }),
            (mix.discard, Request::Discard { offset, len }),
        ];
        let mut request = Request::Flush;
        for (weight, candidate) in weighted {
            if choice < weight {
                request = candidate;
                break;
            }
            choice -= weight;
        }
        self.request(tag, request);
    }

    /// The guest submits this request.
    pub fn request(&mut self, tag: u16, request: Request) {
        self.tell(|run| format!("guest {tag}: {}", words(request, &run.guest)));
        self.asked[usize::from(tag)] = self.steps;
        let bytes = self.guest.submit(tag, request, &mut self.pool.borrow_mut());
        self.world.submit_for(tag, request, bytes, Some(&self.guest));
    }

    /// Lets one operation end, any of those in flight.
    fn complete_one(&mut self) -> Told<()> {
        let in_flight = self.world.in_flight.len();
        if in_flight == 0 {
            let waits = self.world.engine.waits();
            return Err(format!("nothing is in flight, and the engine does not go on: {waits}"));
        }
        let index = self.pick(in_flight);
        let short = self.prng.one_in(30);
        let part = self.prng.any();
        self.complete(index, short, part);
        Ok(())
    }

    /// Which operation ends next.
    fn pick(&mut self, in_flight: usize) -> usize {
        let index = self.prng.index(in_flight);
        let payload = |op: &Op| {
            matches!(op.kind, OpKind::Read { .. } | OpKind::Write { .. } | OpKind::Inflate { .. })
        };
        let slow = self.workload.slow;
        if slow == 0 || !payload(&self.world.in_flight[index]) || self.prng.one_in(slow) {
            return index;
        }
        let other = self.world.in_flight.iter().position(|op| !payload(op));
        other.unwrap_or(index)
    }

    /// Lets operation number `index` of those in flight end.
    pub fn complete(&mut self, index: usize, short: bool, part: u64) {
        let op = self.world.in_flight[index];
        let len = match op.kind {
            OpKind::Read { len, .. }
            | OpKind::Write { len, .. }
            | OpKind::WriteZeros { len, .. }
            | OpKind::CopyRead { len, .. }
            | OpKind::CopyWrite { len, .. }
            | OpKind::MetaWrite { len, .. } => len,
            _ => 0,
        };
        let number = self.ended;
        self.ended += 1;
        let hit = self.fault.filter(|it| it.index == number || it.lasting && it.index < number);
        let memory = matches!(op.kind, OpKind::Fill { .. } | OpKind::CopyFill { .. });
        let hit = hit.filter(|it| !memory && (it.kind.is_some() || len > 512));
        let sectors = u64::from(len) / SECTOR as u64;
        let part = |end: u64| {
            if end == 0 { 0 } else { u32::try_from(part % end * SECTOR as u64).expect("short") }
        };
        let flaky = self.flaky(op.kind);
        let (error, most) = match hit {
            None if flaky.is_some() => (flaky, part(sectors + 1)),
            Some(Fault { kind: Some(kind), .. }) => (Some(kind), part(sectors + 1)),
            // A read of nothing would be the end of the file.
            Some(Fault { kind: None, .. }) if matches!(op.kind, OpKind::Read { .. }) => {
                (None, part(sectors - 1) + 512_u32)
            }
            Some(Fault { kind: None, .. }) => (None, part(sectors)),
            // A read of nothing would be the end of the file.
            _ if short && matches!(op.kind, OpKind::Read { .. }) => match sectors {
                0 | 1 => (None, u32::MAX),
                _ => (None, part(sectors - 1) + 512),
            },
            // Nothing at all is transferred once, but not again and again: that is an error.
            _ if short && len != 0 && self.stalled != Some(op.id) => (None, part(sectors)),
            _ => (None, u32::MAX),
        };
        self.stalled = if most == 0 { Some(op.id) } else { self.stalled };
        self.faulted |= hit.is_some();
        if hit.is_some() {
            self.first.get_or_insert(Hit { step: self.steps, kind: op.kind });
        }
        self.tell(|_| match (error, most) {
            (Some(kind), most) => format!("disk: {:?} fails ({kind}) after {most} bytes", op.kind),
            (None, u32::MAX) => format!("disk: {:?} done", op.kind),
            (None, most) => format!("disk: {:?} is short, {most} bytes", op.kind),
        });
        self.world.end(index, error, most, Some(&self.guest));
    }

    /// With which error does this operation fail, in a workload where such things happen?
    fn flaky(&mut self, kind: OpKind) -> Option<IoErrorKind> {
        let payload = matches!(
            kind,
            OpKind::Write { .. }
                | OpKind::WriteZeros { .. }
                | OpKind::CopyRead { .. }
                | OpKind::CopyWrite { .. }
        );
        let errors = self.workload.errors;
        if errors == 0 || !payload || !self.prng.one_in(errors) {
            return None;
        }
        Some(if self.prng.one_in(2) { IoErrorKind::Io } else { IoErrorKind::NoSpace })
    }

    /// Takes the answers, and asks the disk whether it has refused anything.
    ///
    /// # Errors
    /// What is wrong.
    pub fn look(&mut self) -> Told<()> {
        if self.trace.is_some() {
            for kind in self.world.handed.replace(Vec::new()).unwrap_or_default() {
                self.tell(|_| format!("     engine: {kind:?}"));
            }
        }
        for reply in core::mem::take(&mut self.world.replies) {
            self.tell(|_| format!("reply {}: {:?}", reply.tag, reply.result));
            let read = matches!(self.guest.request(reply.tag), Some(Request::Read { .. }));
            let found = if read { self.world.found(reply.tag) } else { Vec::new() };
            let pool = self.pool.borrow();
            let request = self.guest.answer(reply.tag, reply.result, &found, &pool)?;
            drop(pool);
            // A device may run full, and says so to whoever needs more of it.
            let full =
                self.workload.options.fixed_size && reply.result == Err(IoErrorKind::NoSpace);
            let excused = self.faulted || self.workload.errors != 0 || full;
            if let (Err(kind), false) = (reply.result, excused) {
                let health = self.world.engine.health();
                return Err(format!(
                    "{request:?} was answered with {kind}, but nothing failed; {health:?}"
                ));
            }
            if let Err(kind) = reply.result {
                self.check_honest(reply.tag, request, kind)?;
            }
        }
        match self.world.broken.take() {
            Some(broken) => Err(format!("the disk refuses: {}: {}", broken.rule, broken.detail)),
            None if self.world.engine.next_incident().is_some() && !self.faulted => {
                Err("the engine reports an incident, but nothing failed".into())
            }
            None => Ok(()),
        }
    }

    /// What a reader of the file sees now; returns the leaks, and `self.judge` the content.
    fn state_of_view(&mut self) -> Told<u64> {
        let pool = self.pool.borrow();
        let disk = &self.world.disk;
        let state = State {
            pool: &pool,
            sectors: disk.sectors(),
            len: disk.len(),
            data: self.world.data.as_ref().map_or(&[], Disk::sectors),
            setting: &self.setting,
        };
        Ok(self.judge.check(state)?.leaks)
    }

    /// Everything ends; then all requests have an answer.
    ///
    /// # Errors
    /// What is wrong.
    pub fn settle(&mut self) -> Told<()> {
        let mut most = 2_000;
        self.world.gathers = false;
        self.world.go_on(Some(&self.guest));
        self.look()?;
        while !self.world.in_flight.is_empty() {
            self.complete_one()?;
            self.look()?;
            most -= 1;
            if most == 0 {
                return Err("operations follow each other without end".into());
            }
        }
        if self.guest.busy() != 0 {
            return Err("nothing is in flight, and requests have no answer".into());
        }
        Ok(())
    }

    /// Is the image being served?
    #[must_use]
    pub fn is_serving(&self) -> bool {
        self.stage == Stage::Serving
    }

    /// Reads the whole disk through the engine, if it serves; nothing may be in flight.
    ///
    /// # Errors
    /// What is wrong, with a read or with what the file holds now.
    pub fn read_all(&mut self) -> Told<()> {
        self.state_of_view()?;
        for (place, &id) in (0..).zip(self.judge.content()) {
            if !self.guest.is_legal(place, id) {
                let found = describe(&self.pool.borrow(), id);
                return Err(format!("in the file guest sector {place} holds {found}"));
            }
        }
        let end = (self.guest.len() * SECTOR) as u64;
        let step = 32 << 10;
        for offset in (0..end).step_by(step) {
            if self.stage == Stage::Serving {
                let len = (end - offset).min(step as u64);
                let len = u32::try_from(len).expect("a short read");
                self.request(0, Request::Read { offset, len });
                self.look()?;
                self.settle()?;
            }
        }
        Ok(())
    }

    fn check_view(&mut self) -> Told<u64> {
        let leaks = self.state_of_view()?;
        self.guest.check_content(self.judge.content(), &self.pool.borrow())?;
        Ok(leaks)
    }
}

fn kinds(world: &World) -> Vec<OpKind> {
    world.in_flight.iter().map(|op| op.kind).collect()
}

fn words(request: Request, guest: &Guest) -> String {
    let (offset, len) = crate::testing::guest::range(request);
    let (first, end) = (offset / SECTOR as u64, (offset + u64::from(len)) / SECTOR as u64);
    match request {
        Request::Read { .. } => format!("read sectors {first}..{end}"),
        Request::Write { fua, .. } => {
            let fua = if fua { " with FUA" } else { "" };
            format!("write {} to sectors {first}..{end}{fua}", guest.writes() + 1)
        }
        Request::WriteZeroes { unmap, .. } => {
            format!("write zeroes to sectors {first}..{end}, may unmap: {unmap}")
        }
        Request::Discard { .. } => format!("discard sectors {first}..{end}"),
        Request::Flush => "FLUSH".into(),
    }
}
