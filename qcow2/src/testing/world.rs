//! An engine, a disk and the buffers between them.

use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use crate::engine::Engine;
use crate::error::{IoErrorKind, OpenError};
use crate::header::Header;
use crate::image::Image;
use crate::op::{COPY_BUFFER, FileId, Op, OpKind, Outcome, Reply, Request};
use crate::options::Options;
use crate::report::Health;
use crate::testing::disk::Disk;
use crate::testing::guest::Guest;
use crate::testing::pool::{SECTOR, SectorId};
use crate::testing::rules::{Broken, Submitted};
use crate::testing::size;

/// One image being served from a simulated disk.
#[derive(Clone, Debug)]
pub struct World {
    /// The engine.
    pub engine: Engine,
    /// What it is served from.
    pub disk: Disk,
    /// The bytes of what lies beneath.
    pub backing: Option<Rc<[u8]>>,
    /// Operations that were handed out and have not completed, in the order of submission.
    pub in_flight: Vec<Op>,
    /// The buffer of each tag.
    pub buffers: Vec<Vec<u8>>,
    /// The copy buffers of the engine.
    pub copies: Vec<Vec<u8>>,
    /// Answers that nobody has looked at yet.
    pub replies: Vec<Reply>,
    /// Which rule the engine has broken first.
    pub broken: Option<Broken>,
    /// Operations that were handed out since somebody looked, if somebody does.
    pub handed: Option<Vec<OpKind>>,
    /// The host can neither zero nor punch.
    pub plain: bool,
    /// The host has no room for a longer file.
    pub full: bool,
    /// Where each tag's request begins on the virtual disk.
    places: Vec<u64>,
}

/// Opens an image: the one place that knows how much of it is read.
///
/// # Errors
/// See [`Header::parse`] and [`Image::new`].
pub fn open_image(
    disk: &Disk,
    backing_len: Option<u64>,
    read_only: bool,
) -> Result<Image, OpenError> {
    let read = |offset: u64, len: usize| {
        let mut bytes = vec![0; len];
        let have = disk.read(offset, &mut bytes);
        bytes.truncate(have);
        bytes
    };
    let needed = Header::needed(&read(0, SECTOR))?;
    let header = Header::parse(&read(0, needed), disk.len(), read_only)?;
    let part = |extent: crate::Extent| read(extent.offset, size(extent.len));
    let (l1, refcounts) = (part(header.l1_extent()), part(header.refcount_table_extent()));
    match backing_len {
        None => Image::new(header, &l1, &refcounts, disk.len()),
        Some(len) => Image::with_backing(header, &l1, &refcounts, disk.len(), len),
    }
}

impl World {
    /// Opens the image on the disk, as the server does.
    ///
    /// # Errors
    /// See [`Header::parse`], [`Image::new`] and [`Engine::new`].
    pub fn open(disk: Disk, options: &Options) -> Result<Self, OpenError> {
        Self::open_over(disk, None, options)
    }

    /// The same with something beneath.
    ///
    /// # Errors
    /// As [`World::open`].
    pub fn open_over(
        disk: Disk,
        backing: Option<Vec<u8>>,
        options: &Options,
    ) -> Result<Self, OpenError> {
        Self::open_shared(disk, backing.map(Rc::from), options)
    }

    /// The same, with one copy for all that it lies beneath.
    ///
    /// # Errors
    /// As [`World::open`].
    pub fn open_shared(
        disk: Disk,
        backing: Option<Rc<[u8]>>,
        options: &Options,
    ) -> Result<Self, OpenError> {
        let backing_len = backing.as_ref().map(|bytes| bytes.len() as u64);
        let image = open_image(&disk, backing_len, options.read_only)?;
        let engine = Engine::new(image, options)?;
        let depth = usize::from(options.depth);
        let copies = vec![vec![0xbb; COPY_BUFFER as usize]; engine.copy_buffers()];
        Ok(Self {
            engine,
            disk,
            backing,
            in_flight: Vec::new(),
            buffers: vec![Vec::new(); depth],
            copies,
            replies: Vec::new(),
            broken: None,
            handed: None,
            plain: false,
            full: false,
            places: vec![0; depth],
        })
    }

    /// Submits a request; a write's bytes are in `buffer`, a read's length is that of `buffer`.
    pub fn submit(&mut self, tag: u16, request: Request, buffer: Vec<u8>) {
        self.submit_for(tag, request, buffer, None);
    }

    /// The same, for a guest that knows what its sectors may hold.
    pub fn submit_for(
        &mut self,
        tag: u16,
        request: Request,
        buffer: Vec<u8>,
        guest: Option<&Guest>,
    ) {
        self.buffers[usize::from(tag)] = buffer;
        self.places[usize::from(tag)] = crate::testing::guest::range(request).0;
        self.engine.submit(0, tag, request);
        self.pump(guest);
    }

    /// Takes what the engine has to say.
    pub fn pump(&mut self, guest: Option<&Guest>) {
        while let Some(op) = self.engine.next_op(0) {
            if op.file == FileId::Image {
                self.disk.can_punch = !self.plain;
                let submitted = self.submitted(op);
                let legal = |sector, id| guest.is_none_or(|guest| guest.is_legal(sector, id));
                if let Err(broken) = self.disk.submit(op.id, &submitted, &legal) {
                    self.broken.get_or_insert(broken);
                }
            }
            if let Some(handed) = &mut self.handed {
                handed.push(op.kind);
            }
            self.in_flight.push(op);
        }
        while let Some(reply) = self.engine.next_reply(0) {
            self.replies.push(reply);
        }
    }

    /// The operation with the bytes that it writes.
    fn submitted(&mut self, op: Op) -> Submitted {
        let mut pool = self.disk.pool().borrow_mut();
        let mut intern = |bytes: &[u8]| bytes.chunks(SECTOR).map(|it| pool.intern(it)).collect();
        let place = |tag: u16, at: u32| {
            Some((self.places[usize::from(tag)] + u64::from(at)) / SECTOR as u64)
        };
        let (payload, guest) = match op.kind {
            OpKind::Write { tag, at, len, .. } => {
                let range = at as usize..(at + len) as usize;
                (intern(&self.buffers[usize::from(tag)][range]), place(tag, at))
            }
            OpKind::Read { tag, at, .. } => (Vec::new(), place(tag, at)),
            OpKind::WriteZeros { len, .. } => (vec![SectorId::ZERO; len as usize / SECTOR], None),
            OpKind::ZeroRange { len, .. } => (vec![SectorId::ZERO; size(len) / SECTOR], None),
            OpKind::MetaWrite { .. } => (intern(self.engine.staging(op.id)), None),
            OpKind::CopyWrite { buffer, len, .. } => {
                (intern(&self.copies[usize::from(buffer)][..len as usize]), None)
            }
            _ => (Vec::new(), None),
        };
        Submitted { kind: op.kind, payload, guest }
    }

    /// Completes operation number `index` of those in flight in full.
    pub fn complete(&mut self, index: usize) {
        self.end(index, None, u32::MAX, None);
    }

    /// Completes it with less than it asked for, if it is a transfer of payload or a write.
    pub fn complete_short(&mut self, index: usize, bytes: u32) {
        self.end(index, None, bytes, None);
    }

    /// Lets it fail; a write may have left any first part of itself.
    pub fn fail(&mut self, index: usize, kind: IoErrorKind, bytes: usize) {
        self.end(index, Some(kind), u32::try_from(bytes).expect("few"), None);
    }

    /// Ends an operation: with an error after `most` bytes, or with at most so many.
    pub fn end(
        &mut self,
        index: usize,
        error: Option<IoErrorKind>,
        most: u32,
        guest: Option<&Guest>,
    ) {
        let op = self.in_flight.remove(index);
        let outcome = match error {
            Some(kind) => self.break_off(op, kind, most),
            None => self.carry_out(op, most),
        };
        if op.file == FileId::Image && outcome != Outcome::Done {
            let metadata = matches!(op.kind, OpKind::MetaWrite { .. } | OpKind::Sync);
            if metadata && matches!(outcome, Outcome::Error(_)) {
                self.disk.latch();
            }
        }
        self.engine.complete(op.id, outcome);
        self.pump(guest);
    }

    fn break_off(&mut self, op: Op, kind: IoErrorKind, most: u32) -> Outcome {
        match op.kind {
            OpKind::Write { len, .. }
            | OpKind::WriteZeros { len, .. }
            | OpKind::CopyWrite { len, .. }
            | OpKind::MetaWrite { len, .. } => {
                self.disk.complete(op.id, most.min(len).into());
            }
            OpKind::ZeroRange { .. } if !self.plain => self.disk.complete(op.id, most.into()),
            _ => self.disk.cancel(op.id),
        }
        Outcome::Error(kind)
    }

    fn carry_out(&mut self, op: Op, most: u32) -> Outcome {
        let outcome =
            |done: u32, len| if done >= len { Outcome::Done } else { Outcome::Short(done) };
        match op.kind {
            OpKind::Read { tag, at, offset, len } => {
                let want = len.min(most);
                let mut buffer = core::mem::take(&mut self.buffers[usize::from(tag)]);
                let have = self.read(op, offset, &mut buffer[at as usize..(at + want) as usize]);
                self.buffers[usize::from(tag)] = buffer;
                self.disk.complete(op.id, 0);
                outcome(have, len)
            }
            OpKind::CopyRead { buffer, offset, len } => {
                let number = usize::from(buffer);
                let mut bytes = core::mem::take(&mut self.copies[number]);
                let want = len.min(most);
                let have = self.read(op, offset, &mut bytes[..want as usize]);
                // Bytes past the end count as zeros.
                if want == len {
                    bytes[have as usize..len as usize].fill(0);
                }
                self.copies[number] = bytes;
                self.disk.complete(op.id, 0);
                outcome(want, len)
            }
            OpKind::Fill { tag, at, len } => {
                self.buffers[usize::from(tag)][at as usize..(at + len) as usize].fill(0);
                Outcome::Done
            }
            OpKind::Write { len, .. }
            | OpKind::WriteZeros { len, .. }
            | OpKind::CopyWrite { len, .. }
            | OpKind::MetaWrite { len, .. } => {
                let done = len.min(most);
                self.disk.complete(op.id, done.into());
                outcome(done, len)
            }
            OpKind::MetaRead { offset, len } => {
                let mut bytes = vec![0; len as usize];
                self.disk.read(offset, &mut bytes);
                self.engine.fill_staging(op.id, &bytes);
                self.disk.complete(op.id, 0);
                Outcome::Done
            }
            OpKind::Sync => {
                self.disk.complete_sync(op.id);
                Outcome::Done
            }
            OpKind::ZeroRange { .. } | OpKind::Punch { .. } if self.plain => {
                Outcome::Error(IoErrorKind::Unsupported)
            }
            OpKind::Extend { .. } if self.full => {
                self.disk.cancel(op.id);
                Outcome::Error(IoErrorKind::NoSpace)
            }
            OpKind::ZeroRange { len, .. } => {
                self.disk.complete(op.id, len);
                Outcome::Done
            }
            OpKind::Punch { .. } | OpKind::Extend { .. } | OpKind::Truncate { .. } => {
                self.disk.complete(op.id, 0);
                Outcome::Done
            }
        }
    }

    /// Reads from the image or from what lies beneath; returns how much there was.
    fn read(&self, op: Op, offset: u64, out: &mut [u8]) -> u32 {
        let have = match op.file {
            FileId::Image => self.disk.read(offset, out),
            FileId::Backing => {
                let beneath = self.backing.as_deref().unwrap_or_default();
                let rest = beneath.get(size(offset)..).unwrap_or_default();
                let have = rest.len().min(out.len());
                out[..have].copy_from_slice(&rest[..have]);
                have
            }
        };
        u32::try_from(have).expect("at most the length")
    }

    /// What the buffer of a tag holds, in sectors.
    #[must_use]
    pub fn found(&self, tag: u16) -> Vec<SectorId> {
        let mut pool = self.disk.pool().borrow_mut();
        self.buffers[usize::from(tag)].chunks(SECTOR).map(|it| pool.intern(it)).collect()
    }

    /// Completes everything in the order of submission until nothing is in flight.
    pub fn settle(&mut self) {
        self.pump(None);
        while !self.in_flight.is_empty() {
            self.complete(0);
        }
    }

    /// Closes the image and returns the disk.
    ///
    /// # Panics
    /// If the engine does not come to an end.
    #[must_use]
    pub fn close(mut self) -> (Disk, Health) {
        self.engine.close();
        self.settle();
        assert!(self.engine.is_closed(), "nothing is in flight, but the engine is not closed");
        (self.disk, self.engine.health())
    }
}
