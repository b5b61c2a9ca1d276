//! One execution of the fuzzer: an image that is damaged on purpose, and requests to it.
//!
//! The bytes of the fuzzer choose which words of which tables are changed and to what: values that
//! mean something (another table, the end of the file, flags) more often than noise, since a header
//! of noise never gets further than the parser. Then they choose requests, and in which order and
//! how the operations of the engine end. What is asked is that the engine **ends**: without a
//! panic, with an answer to every request, within bounded work. Whether the answers are right is
//! for other tests; here the image is wrong.

use std::vec;
use std::vec::Vec;

use crate::engine::Engine;
use crate::error::{IoErrorKind, OpenError};
use crate::header::Header;
use crate::image::Image;
use crate::layer::Layer;
use crate::op::{COPY_BUFFER, Compressed, FileId, Op, OpKind, Outcome, Request};
use crate::options::{Discards, Options};
use crate::testing::image::inflate;

/// The bytes of the fuzzer, taken one after the other; zeros when they are used up.
#[derive(Clone, Debug)]
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    /// All of `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end.max(1)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// How an execution ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The image was refused.
    Refused,
    /// It was served; so many operations.
    Served(u64),
}

/// No host has room for more than this, in bytes.
const ROOM: usize = 32 << 20;
/// An execution with more operations than this hangs.
const MOST_OPERATIONS: u64 = 20_000;
const DEPTH: u16 = 4;

/// Damages `image` and uses it, as `bytes` choose.
///
/// # Panics
/// Where the engine does, hangs, or leaves a request without an answer.
#[must_use]
pub fn execute(image: &[u8], bytes: &[u8]) -> Verdict {
    let mut choices = Choices::new(bytes);
    let mut file = image.to_vec();
    for _ in 0..choices.below(6) {
        damage(&mut file, &mut choices);
    }
    serve(file, choices)
}

/// Uses `file` as it is.
///
/// # Panics
/// As [`execute`].
#[must_use]
pub fn serve(file: Vec<u8>, mut choices: Choices) -> Verdict {
    let options = options(&mut choices);
    let Ok((image, beneath, data)) = open(&file, options.read_only) else {
        return Verdict::Refused;
    };
    let Ok(engine) = Engine::new(image, &options) else { return Verdict::Refused };
    let copies = vec![vec![0; COPY_BUFFER as usize]; engine.copy_buffers()];
    let mut bench = Bench {
        engine,
        files: [file, data, beneath],
        copies,
        in_flight: Vec::new(),
        busy: [false; DEPTH as usize],
        operations: 0,
    };
    bench.run(&mut choices);
    Verdict::Served(bench.operations)
}

fn options(choices: &mut Choices) -> Options {
    let flags = choices.byte();
    Options {
        read_only: flags & 7 == 7,
        depth: DEPTH,
        l2_cache: Some(64 << 10),
        refcount_cache: 16 << 10,
        staging: 4,
        reservation: 16 << 10,
        stress: flags & 8 != 0,
        discards: if flags & 16 != 0 { Discards::Keep } else { Discards::Unmap },
        fixed_size: flags & 0x60 == 0x60,
        ..Options::default()
    }
}

/// As much as there is of `len` bytes at `offset`.
fn part(file: &[u8], offset: u64, len: usize) -> &[u8] {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = file.get(start..).unwrap_or_default();
    &rest[..len.min(rest.len())]
}

/// The image with a raw file beneath it and a data file, where its header wants them.
fn open(file: &[u8], read_only: bool) -> Result<(Image, Vec<u8>, Vec<u8>), OpenError> {
    let needed = Header::needed(part(file, 0, 512))?;
    let header = Header::parse(part(file, 0, needed), file.len() as u64, read_only)?;
    let len = |extent: crate::Extent| usize::try_from(extent.len).expect("inside the file");
    let table = |extent: crate::Extent| part(file, extent.offset, len(extent)).to_vec();
    let (l1, refcounts) = (table(header.l1_extent()), table(header.refcount_table_extent()));
    let beneath = if header.backing().is_some() { vec![7; 5000] } else { Vec::new() };
    let data = header.data_file().is_some();
    let mut layers = Vec::new();
    if header.backing().is_some() {
        // The image itself once more, and what is beneath it.
        layers.push(Layer::qcow2(&header, &l1, file.len() as u64, data.then_some(0))?);
        layers.push(Layer::raw(beneath.len() as u64));
    }
    let mut image = Image::new(header, &l1, &refcounts, file.len() as u64)?;
    if data {
        image = image.with_data_file(0);
    }
    Ok((image.with_layers(layers)?, beneath, Vec::new()))
}

// --- damage -------------------------------------------------------------------------------------

fn word(file: &[u8], offset: usize) -> u64 {
    let bytes = file.get(offset..).and_then(|rest| rest.first_chunk::<8>());
    bytes.map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

fn put(file: &mut [u8], offset: usize, bytes: &[u8]) {
    if let Some(place) = file.get_mut(offset..).and_then(|rest| rest.get_mut(..bytes.len())) {
        place.copy_from_slice(bytes);
    }
}

/// Offsets and lengths of the header's fields.
const FIELDS: [(usize, usize); 18] = [
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 8),
];

/// Changes one thing.
fn damage(file: &mut Vec<u8>, choices: &mut Choices) {
    let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
    let pointer = |word: u64| at(word & 0x00ff_ffff_ffff_fe00);
    let (l1, refcounts) = (at(word(file, 40)), at(word(file, 48)));
    let entry = choices.below(16) * 8;
    let kind = choices.below(10);
    let place = match kind {
        0 => {
            let (offset, len) = FIELDS[choices.below(FIELDS.len())];
            let value = value(file, choices).to_be_bytes();
            return put(file, offset, &value[8 - len..]);
        }
        1 => l1.saturating_add(entry),
        2 => refcounts.saturating_add(entry),
        3 | 4 => {
            let table = pointer(word(file, l1.saturating_add(choices.below(4) * 8)));
            table.saturating_add(choices.below(64) * 8)
        }
        5 => {
            let block = pointer(word(file, refcounts.saturating_add(choices.below(2) * 8)));
            return put(file, block.saturating_add(choices.below(64) * 2), &[0, choices.byte()]);
        }
        6 => at(choices.number(3)) % file.len().max(1),
        7 => {
            let len = at(choices.number(3)) % (file.len() + 1);
            return file.truncate(len);
        }
        8 => {
            let from = word(file, l1.saturating_add(entry));
            let table = pointer(word(file, l1));
            return put(file, table.saturating_add(choices.below(16) * 8), &from.to_be_bytes());
        }
        _ => {
            let table = pointer(word(file, l1));
            let from = word(file, table.saturating_add(entry));
            return put(file, table.saturating_add(choices.below(32) * 8), &from.to_be_bytes());
        }
    };
    let value = value(file, choices).to_be_bytes();
    put(file, place, &value);
}

/// A value that means something, or noise.
fn value(file: &[u8], choices: &mut Choices) -> u64 {
    let len = file.len() as u64;
    let cluster = 1 << (word(file, 16) & 31);
    let base = match choices.below(12) {
        0 => 0,
        1 => u64::MAX,
        2 => len,
        3 => len.saturating_sub(cluster),
        4 => cluster * (choices.byte() as u64),
        5 => word(file, 40),
        6 => word(file, 48),
        7 => choices.number(8),
        8 => 1 << choices.below(64),
        9 => choices.number(1),
        10 => (len + choices.number(2)) & !(cluster - 1),
        _ => choices.number(4),
    };
    match choices.below(6) {
        0 => base | 1 << 63,
        1 => base | 1 << 62,
        2 => base | 1,
        3 => base | (1 << 63) | 1,
        _ => base,
    }
}

// --- use ----------------------------------------------------------------------------------------

struct Bench {
    engine: Engine,
    /// Image, data file, what is beneath.
    files: [Vec<u8>; 3],
    copies: Vec<Vec<u8>>,
    in_flight: Vec<Op>,
    busy: [bool; DEPTH as usize],
    operations: u64,
}

impl Bench {
    fn run(&mut self, choices: &mut Choices) {
        self.pump();
        self.drain(choices);
        let mut now = 0;
        for _ in 0..24 {
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
            self.engine.tick(now);
            self.pump();
        }
        self.drain(choices);
        assert!(self.busy == [false; DEPTH as usize], "requests hang: {}", self.engine.waits());
        self.engine.close();
        self.pump();
        self.drain(choices);
        assert!(self.engine.is_closed(), "closing hangs: {}", self.engine.waits());
    }

    fn submit(&mut self, tag: u16, choices: &mut Choices) {
        let size = self.engine.virtual_size();
        // Near the beginning, where the tables are, or anywhere.
        let span = if choices.byte() & 3 == 0 { size } else { size.min(64 << 10) };
        let offset = (choices.number(4).wrapping_mul(512) % span.max(1)) & !511;
        let len = (1 + choices.number(1)) * 512;
        let len = u32::try_from(len.min(size - offset)).expect("at most 128 KiB");
        let request = match choices.below(8) {
            0 | 1 => Request::Read { offset, len },
            2 | 3 => Request::Write { offset, len, fua: false },
            4 => Request::Write { offset, len, fua: true },
            5 => Request::WriteZeroes { offset, len, unmap: choices.byte() & 1 == 0 },
            6 => Request::Discard { offset, len },
            _ => Request::Flush,
        };
        self.busy[usize::from(tag)] = true;
        self.engine.submit(0, tag, request);
        self.pump();
    }

    fn pump(&mut self) {
        while let Some(op) = self.engine.next_op(0) {
            self.operations += 1;
            assert!(self.operations < MOST_OPERATIONS, "it hangs: {}", self.engine.waits());
            self.in_flight.push(op);
        }
        while let Some(reply) = self.engine.next_reply(0) {
            let busy = &mut self.busy[usize::from(reply.tag)];
            assert!(core::mem::take(busy), "two answers to request {}", reply.tag);
        }
        while self.engine.next_incident().is_some() {}
    }

    fn drain(&mut self, choices: &mut Choices) {
        while !self.in_flight.is_empty() {
            self.end_one(choices);
        }
    }

    fn end_one(&mut self, choices: &mut Choices) {
        if self.in_flight.is_empty() {
            return;
        }
        let op = self.in_flight.swap_remove(choices.below(self.in_flight.len()));
        let outcome = match choices.byte() {
            1 => Outcome::Error(IoErrorKind::Io),
            2 => Outcome::Error(IoErrorKind::NoSpace),
            _ => self.carry_out(op),
        };
        self.engine.complete(op.id, outcome);
        self.pump();
    }

    fn file(&self, id: FileId) -> &Vec<u8> {
        match id {
            FileId::Image | FileId::Backing(0) => &self.files[0],
            FileId::Data | FileId::BackingData(_) => &self.files[1],
            FileId::Backing(_) => &self.files[2],
        }
    }

    fn carry_out(&mut self, op: Op) -> Outcome {
        let short = |have: usize, len: u32| match u32::try_from(have).expect("at most len") {
            have if have < len => Outcome::Short(have),
            _ => Outcome::Done,
        };
        match op.kind {
            OpKind::Read { offset, len, .. } => {
                short(part(self.file(op.file), offset, len as usize).len(), len)
            }
            OpKind::MetaRead { offset, len } => {
                let mut bytes = part(self.file(op.file), offset, len as usize).to_vec();
                bytes.resize(len as usize, 0);
                self.engine.fill_staging(op.id, &bytes);
                Outcome::Done
            }
            OpKind::MetaWrite { offset, .. } => {
                let bytes = self.engine.staging(op.id).to_vec();
                self.write(op.file, offset, &bytes)
            }
            OpKind::Write { offset, len, .. } => {
                self.write(op.file, offset, &vec![0x5a; len as usize])
            }
            OpKind::WriteZeros { offset, len } => {
                self.write(op.file, offset, &vec![0; len as usize])
            }
            OpKind::CopyWrite { buffer, offset, len } => {
                let bytes = self.copies[usize::from(buffer)][..len as usize].to_vec();
                self.write(op.file, offset, &bytes)
            }
            OpKind::CopyRead { buffer, at, offset, len } => {
                let bytes = part(self.file(op.file), offset, len as usize).to_vec();
                let place = &mut self.copies[usize::from(buffer)][at as usize..][..len as usize];
                place.fill(0);
                place[..bytes.len()].copy_from_slice(&bytes);
                Outcome::Done
            }
            OpKind::Inflate { source, from, len, .. } => self.inflate(op.file, source, from, len),
            OpKind::CopyInflate { source, from, len, at, .. } => {
                assert!(at + len <= COPY_BUFFER, "it fits the buffer");
                self.inflate(op.file, source, from, len)
            }
            OpKind::ZeroRange { offset, len } | OpKind::Punch { offset, len } => {
                let file = self.files[usize::from(op.file == FileId::Data)].len() as u64;
                let end = file.min(offset.saturating_add(len));
                let zeros = vec![0; usize::try_from(end.saturating_sub(offset)).expect("small")];
                if zeros.is_empty() { Outcome::Done } else { self.write(op.file, offset, &zeros) }
            }
            OpKind::Extend { to, .. } => match usize::try_from(to) {
                Ok(to) if to <= ROOM => {
                    let len = self.files[0].len().max(to);
                    self.files[0].resize(len, 0);
                    Outcome::Done
                }
                _ => Outcome::Error(IoErrorKind::NoSpace),
            },
            OpKind::Truncate { to } => {
                self.files[0].truncate(usize::try_from(to).unwrap_or(usize::MAX));
                Outcome::Done
            }
            OpKind::Fill { .. } | OpKind::CopyFill { .. } | OpKind::Sync => Outcome::Done,
        }
    }

    fn inflate(&self, file: FileId, source: Compressed, from: u32, len: u32) -> Outcome {
        let cluster = 1_u64 << source.cluster_bits;
        assert!(u64::from(from) + u64::from(len) <= cluster, "within the cluster");
        let bytes = part(self.file(file), source.offset, source.len as usize);
        match inflate(bytes, 1 << source.cluster_bits) {
            Some(_) => Outcome::Done,
            None => Outcome::Error(IoErrorKind::Io),
        }
    }

    fn write(&mut self, file: FileId, offset: u64, bytes: &[u8]) -> Outcome {
        assert!(matches!(file, FileId::Image | FileId::Data), "only these are written to");
        let file = &mut self.files[usize::from(file == FileId::Data)];
        let Some(end) = usize::try_from(offset).ok().and_then(|at| at.checked_add(bytes.len()))
        else {
            return Outcome::Error(IoErrorKind::NoSpace);
        };
        if end > ROOM {
            return Outcome::Error(IoErrorKind::NoSpace);
        }
        file.resize(file.len().max(end), 0);
        file[end - bytes.len()..end].copy_from_slice(bytes);
        Outcome::Done
    }
}
