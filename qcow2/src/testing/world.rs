//! An engine, a disk and the buffers between them.

use alloc::vec;
use alloc::vec::Vec;

use crate::engine::{Engine, Health};
use crate::error::{IoErrorKind, OpenError};
use crate::header::Header;
use crate::image::Image;
use crate::op::{Op, OpKind, Outcome, Reply, Request};
use crate::options::Options;
use crate::testing::disk::Disk;

/// One image being served from a simulated disk.
#[derive(Clone, Debug)]
pub struct World {
    /// The engine.
    pub engine: Engine,
    /// What it is served from.
    pub disk: Disk,
    /// Operations that were handed out and have not completed.
    pub in_flight: Vec<Op>,
    /// The buffer of each tag.
    pub buffers: Vec<Vec<u8>>,
    /// Answers that nobody has looked at yet.
    pub replies: Vec<Reply>,
    /// The host has no room for a longer file.
    pub full: bool,
}

impl World {
    /// Opens the image on the disk, as the server does.
    ///
    /// # Errors
    /// See [`Header::parse`], [`Image::new`] and [`Engine::new`].
    pub fn open(disk: Disk, options: &Options) -> Result<Self, OpenError> {
        let bytes = disk.bytes();
        let needed = Header::needed(&bytes[..bytes.len().min(512)])?;
        let header =
            Header::parse(&bytes[..bytes.len().min(needed)], disk.len(), options.read_only)?;
        let part = |extent: crate::Extent| {
            let at = |offset: u64| usize::try_from(offset).expect("tests use small files");
            &bytes[at(extent.offset)..at(extent.end())]
        };
        let (l1, refcounts) = (part(header.l1_extent()), part(header.refcount_table_extent()));
        let image = Image::new(header, l1, refcounts, disk.len())?;
        let engine = Engine::new(image, options)?;
        let buffers = vec![Vec::new(); options.depth.into()];
        let (in_flight, replies) = (Vec::new(), Vec::new());
        let mut world = Self { engine, disk, in_flight, buffers, replies, full: false };
        world.pump();
        Ok(world)
    }

    /// Submits a request; a write's bytes are in `buffer`, a read's length is that of `buffer`.
    pub fn submit(&mut self, tag: u16, request: Request, buffer: Vec<u8>) {
        self.buffers[usize::from(tag)] = buffer;
        self.engine.submit(0, tag, request);
        self.pump();
    }

    /// Takes what the engine has to say.
    pub fn pump(&mut self) {
        while let Some(op) = self.engine.next_op(0) {
            match op.kind {
                OpKind::Write { tag, at, offset, len } => {
                    let range = at as usize..(at + len) as usize;
                    let bytes = self.buffers[usize::from(tag)][range].to_vec();
                    self.disk.submit_write(op.id, offset, bytes, false);
                }
                OpKind::WriteZeros { offset, len } => {
                    self.disk.submit_write(op.id, offset, vec![0; len as usize], false);
                }
                OpKind::MetaWrite { offset, .. } => {
                    let bytes = self.engine.staging(op.id).to_vec();
                    self.disk.submit_write(op.id, offset, bytes, true);
                }
                OpKind::Sync => self.disk.submit_sync(op.id),
                _ => {}
            }
            self.in_flight.push(op);
        }
        while let Some(reply) = self.engine.next_reply(0) {
            self.replies.push(reply);
        }
    }

    /// Completes operation number `index` of those in flight in full.
    pub fn complete(&mut self, index: usize) {
        let op = self.in_flight.swap_remove(index);
        let outcome = self.carry_out(op, u32::MAX);
        self.engine.complete(op.id, outcome);
        self.pump();
    }

    /// Completes it with less than it asked for, if it is a transfer of payload or a write.
    pub fn complete_short(&mut self, index: usize, bytes: u32) {
        let op = self.in_flight.swap_remove(index);
        let outcome = self.carry_out(op, bytes);
        self.engine.complete(op.id, outcome);
        self.pump();
    }

    /// Lets it fail; a write may have left any first part of itself.
    pub fn fail(&mut self, index: usize, kind: IoErrorKind, bytes: usize) {
        let op = self.in_flight.swap_remove(index);
        match op.kind {
            OpKind::Write { len, .. }
            | OpKind::WriteZeros { len, .. }
            | OpKind::MetaWrite { len, .. } => {
                self.disk.complete_write(op.id, bytes.min(len as usize));
            }
            _ => {}
        }
        self.engine.complete(op.id, Outcome::Error(kind));
        self.pump();
    }

    fn carry_out(&mut self, op: Op, most: u32) -> Outcome {
        let outcome =
            |done: u32, len| if done == len { Outcome::Done } else { Outcome::Short(done) };
        match op.kind {
            OpKind::Read { tag, at, offset, len } => {
                let want = len.min(most);
                let out = &mut self.buffers[usize::from(tag)][at as usize..(at + want) as usize];
                let have = self.disk.read(offset, out);
                outcome(u32::try_from(have).expect("at most the length"), len)
            }
            OpKind::Fill { tag, at, len } => {
                self.buffers[usize::from(tag)][at as usize..(at + len) as usize].fill(0);
                Outcome::Done
            }
            OpKind::Write { len, .. }
            | OpKind::WriteZeros { len, .. }
            | OpKind::MetaWrite { len, .. } => {
                let done = len.min(most);
                self.disk.complete_write(op.id, done as usize);
                outcome(done, len)
            }
            OpKind::MetaRead { offset, len } => {
                let mut bytes = vec![0; len as usize];
                self.disk.read(offset, &mut bytes);
                self.engine.fill_staging(op.id, &bytes);
                Outcome::Done
            }
            OpKind::Sync => {
                self.disk.complete_sync(op.id);
                Outcome::Done
            }
            OpKind::Extend { .. } if self.full => Outcome::Error(IoErrorKind::NoSpace),
            OpKind::Extend { to, .. } => {
                self.disk.extend(to);
                Outcome::Done
            }
            OpKind::Truncate { to } => {
                self.disk.truncate(to);
                Outcome::Done
            }
        }
    }

    /// Completes everything in the order of submission until nothing is in flight.
    pub fn settle(&mut self) {
        while !self.in_flight.is_empty() {
            let op = self.in_flight.remove(0);
            let outcome = self.carry_out(op, u32::MAX);
            self.engine.complete(op.id, outcome);
            self.pump();
        }
    }

    /// Closes the image and returns the disk.
    ///
    /// # Panics
    /// If the engine does not come to an end.
    #[must_use]
    pub fn close(mut self) -> (Disk, Health) {
        self.engine.close();
        self.pump();
        self.settle();
        assert!(self.engine.is_closed(), "nothing is in flight, but the engine is not closed");
        (self.disk, self.engine.health())
    }
}
