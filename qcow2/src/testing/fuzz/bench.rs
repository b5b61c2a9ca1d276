//! Serves an image from the simulated disk, with requests, faults and an order of completions that
//! the fuzzer chooses.

use std::collections::VecDeque;
use std::format;
use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use super::choices::Choices;
use super::fence::Fence;
use super::{Input, ROOM, mend};
use crate::error::{IoErrorKind, OpenError};
use crate::op::{OpKind, Request};
use crate::options::{Discards, Options};
use crate::testing::disk::Disk;
use crate::testing::open::Source;
use crate::testing::pool::Pool;
use crate::testing::prng::Prng;
use crate::testing::world::{Beneath, Inflate, World, open_image};

/// An execution with more operations than this hangs.
const MOST_OPERATIONS: u64 = 20_000;
const DEPTH: u16 = 4;
/// Requests of an execution, at the most.
const MOST_REQUESTS: usize = 24;

/// Cache budgets, in bytes.
pub(super) const L2_CACHE: u64 = 64 << 10;
pub(super) const REFCOUNT_CACHE: u64 = 16 << 10;

/// Serves `input` as its choices say; returns the number of operations, or why it is refused.
pub(super) fn serve(input: Input, inflate: Inflate) -> Result<u64, OpenError> {
    let Input { image, data, beneath, mut choices } = input;
    let options = options(&mut choices);
    // Of a snapshot there is only what it was.
    let snapshot = (options.read_only && choices.one_in(3)).then(|| choices.below(4));
    let sound = !options.read_only && mend::is_sound(&image);
    let pool = Pool::shared();
    let disk = Disk::sharing(&image, &pool);
    let read = |offset: u64, len: usize| part(&image, offset, len).to_vec();
    let source = Source { read: &read, len: image.len() as u64 };
    let header = source.header(options.read_only)?;
    let beneath = chain(header.backing().is_some(), beneath);
    let data = header.data_file().map(|_| Disk::sharing(&data.unwrap_or_default(), &pool));
    let len = data.as_ref().map(Disk::len);
    let opened = open_image(&disk, &beneath, len, (options.read_only, snapshot))?;
    let protected = opened.protected.clone();
    let mut world = World::of(opened, disk, beneath, data, &options)?;
    world.fence = Some(Fence::new(&options, world.engine.virtual_size(), &protected));
    // A device has no room behind its end.
    world.room = if options.fixed_size { image.len() } else { ROOM } as u64;
    world.inflate = inflate;
    let mut bench = Bench { world, busy: [false; DEPTH as usize], operations: 0 };
    bench.pump();
    bench.drain(&mut choices);
    let cut = bench.run(&mut choices);
    let disk = &bench.world.disk;
    if options.read_only {
        assert!(disk.bytes() == image, "what is opened read-only has changed");
    } else if sound {
        let left = cut.unwrap_or_else(|| disk.bytes());
        mend::assert_still_sound(&left);
    }
    Ok(bench.operations)
}

fn options(choices: &mut Choices) -> Options {
    let (flags, more) = (choices.byte(), choices.byte());
    Options {
        read_only: flags & 7 == 7,
        depth: DEPTH,
        l2_cache: Some(if more & 1 != 0 { 0 } else { L2_CACHE }),
        refcount_cache: if more & 2 != 0 { 0 } else { REFCOUNT_CACHE },
        staging: if more & 4 != 0 { 1 } else { 4 },
        alignment: if more & 0x38 == 0x38 { 4096 } else { 512 },
        reservation: if more & 0x40 != 0 { 1024 } else { 16 << 10 },
        stress: flags & 8 != 0,
        discards: match flags & 0x30 {
            0x10 => Discards::Keep,
            0x30 => Discards::Ignore,
            _ => Discards::Unmap,
        },
        fixed_size: flags & 0xc0 == 0xc0,
        ..Options::default()
    }
}

/// As much as there is of `len` bytes at `offset`.
fn part(file: &[u8], offset: u64, len: usize) -> &[u8] {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = file.get(start..).unwrap_or_default();
    &rest[..len.min(rest.len())]
}

/// Exactly as many files as are named; a raw one where there is none.
fn chain(mut wanted: bool, have: Vec<Beneath>) -> Vec<Beneath> {
    let mut have = VecDeque::from(have);
    let mut all = Vec::new();
    while wanted {
        let next = have.pop_front().unwrap_or_else(|| Beneath::raw(Rc::from([7; 5000])));
        let read = |offset: u64, len: usize| part(&next.bytes, offset, len).to_vec();
        let source = Source { read: &read, len: next.bytes.len() as u64 };
        let names = |header: crate::Header| header.backing().is_some();
        wanted = next.qcow2 && source.header(true).is_ok_and(names);
        all.push(next);
    }
    all
}

struct Bench {
    world: World,
    busy: [bool; DEPTH as usize],
    operations: u64,
}

impl Bench {
    /// Requests, and the end: closing, or a power cut and what it leaves.
    fn run(&mut self, choices: &mut Choices) -> Option<Vec<u8>> {
        let mut now = 0;
        for _ in 0..MOST_REQUESTS {
            if choices.is_empty() {
                break;
            }
            match (0..DEPTH).find(|&tag| !self.busy[usize::from(tag)]) {
                Some(tag) => self.submit(tag, choices),
                None => self.end_one(choices),
            }
            if choices.byte() & 3 == 0 {
                self.drain(choices);
            }
            now += 3000;
            self.world.engine.tick(now);
            self.pump();
        }
        if choices.one_in(8) {
            let mut prng = Prng::new(choices.number(8));
            return Some(self.world.disk.power_cut(&mut prng));
        }
        self.drain(choices);
        let waits = |world: &World| world.engine.waits();
        assert!(self.busy == [false; DEPTH as usize], "requests hang: {}", waits(&self.world));
        self.world.engine.close();
        self.pump();
        self.drain(choices);
        assert!(self.world.engine.is_closed(), "closing hangs: {}", waits(&self.world));
        None
    }

    fn submit(&mut self, tag: u16, choices: &mut Choices) {
        let size = self.world.engine.virtual_size();
        // Near the beginning, where the tables are, or anywhere.
        let span = if choices.byte() & 7 == 7 { size } else { size.min(64 << 10) };
        let offset = (choices.number(4).wrapping_mul(512) % span.max(1)) & !511;
        let sectors = match choices.byte() {
            many @ 0xf0.. => u64::from(many) * 4,
            few => 1 + u64::from(few & 15),
        };
        let len = u32::try_from((sectors * 512).min(size - offset)).expect("at most 512 KiB");
        let request = match choices.below(8) {
            0 | 1 => Request::Read { offset, len },
            2 | 3 => Request::Write { offset, len, fua: false },
            4 => Request::Write { offset, len, fua: true },
            5 => Request::WriteZeroes { offset, len, unmap: choices.byte() & 1 == 0 },
            6 => Request::Discard { offset, len },
            _ => Request::Flush,
        };
        let buffer = match request {
            Request::Read { .. } | Request::Write { .. } => vec![0x5a; len as usize],
            _ => Vec::new(),
        };
        self.busy[usize::from(tag)] = true;
        self.world.submit(tag, request, buffer);
        self.pump();
    }

    /// Looks at what the engine has said.
    fn pump(&mut self) {
        let world = &mut self.world;
        world.pump(None);
        for reply in world.replies.drain(..) {
            let busy = &mut self.busy[usize::from(reply.tag)];
            assert!(core::mem::take(busy), "two answers to request {}", reply.tag);
        }
        while let Some(failure) = world.engine.next_incident() {
            assert!(!format!("{failure}").is_empty());
        }
        assert!(world.broken.is_none(), "{:?}", world.broken);
    }

    fn drain(&mut self, choices: &mut Choices) {
        while !self.world.in_flight.is_empty() {
            self.end_one(choices);
        }
    }

    fn end_one(&mut self, choices: &mut Choices) {
        let count = self.world.in_flight.len();
        if count == 0 {
            return;
        }
        self.operations += 1;
        assert!(self.operations < MOST_OPERATIONS, "it hangs: {}", self.world.engine.waits());
        let index = choices.below(count);
        let kind = self.world.in_flight[index].kind;
        let optional = matches!(kind, OpKind::Punch { .. } | OpKind::ZeroRange { .. });
        let (error, most) = match choices.byte() {
            1 => (Some(IoErrorKind::Io), choices.byte().into()),
            2 => (Some(IoErrorKind::NoSpace), 0),
            3 if optional => (Some(IoErrorKind::Unsupported), 0),
            4 => (None, 512 * (1 + u32::from(choices.byte() & 7))),
            _ => (None, u32::MAX),
        };
        self.world.end(index, error, most, None);
        self.pump();
    }
}
