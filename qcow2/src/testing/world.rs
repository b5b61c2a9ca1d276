//! An engine, a disk and the buffers between them.

use std::rc::Rc;
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

use crate::engine::Engine;
use crate::error::{IoErrorKind, OpenError};
use crate::layer::Layer;
use crate::op::{
    COPY_BUFFER, Compressed, Compression, FileId, Op, OpKind, Outcome, Reply, Request,
};
use crate::options::Options;
use crate::report::Health;
use crate::testing::disk::Disk;
use crate::testing::fuzz::Fence;
use crate::testing::guest::Guest;
use crate::testing::image::inflate;
use crate::testing::kept::Kept;
use crate::testing::open::{Opened, Source};
use crate::testing::pool::{SECTOR, SectorId};
use crate::testing::prng::Prng;
use crate::testing::rules::{Broken, Submitted};
use crate::testing::size;

/// One image being served from a simulated disk.
#[derive(Clone, Debug)]
pub struct World {
    /// The engine.
    pub engine: Engine,
    /// What it is served from.
    pub disk: Disk,
    /// What lies beneath, from the top.
    pub beneath: Vec<Beneath>,
    /// The external data file: a disk of its own, with syncs of its own.
    pub data: Option<Disk>,
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
    /// What comes is handed to the engine, which is to work on it later.
    pub gathers: bool,
    /// The host has no room for a longer file.
    pub full: bool,
    /// The host has room for files of so many bytes.
    pub room: u64,
    /// What an image that may be wrong must still be kept from.
    pub fence: Option<Fence>,
    /// Inflates a cluster to exactly the length of the last; whether that went well.
    pub inflate: Inflate,
    /// The journal, if there is one.
    pub kept: Option<Kept>,
    /// Where each tag's request begins on the virtual disk.
    places: Vec<u64>,
}

/// Fills a cluster from compressed bytes, if they are good.
pub type Inflate = fn(Compression, &[u8], &mut [u8]) -> bool;

/// A file beneath an image.
#[derive(Clone, Debug)]
pub struct Beneath {
    /// Its bytes.
    pub bytes: Rc<[u8]>,
    /// It is a qcow2 image, not a raw file.
    pub qcow2: bool,
    /// Its external data file.
    pub data: Option<Rc<[u8]>>,
}

impl Beneath {
    /// A raw file.
    #[must_use]
    pub fn raw(bytes: Rc<[u8]>) -> Self {
        Self { bytes, qcow2: false, data: None }
    }

    fn layer(&self) -> Result<Layer, OpenError> {
        let len = self.bytes.len() as u64;
        if !self.qcow2 {
            return Ok(Layer::raw(len));
        }
        let read = |offset: u64, len: usize| part_of(&self.bytes, offset, len).to_vec();
        let source = Source { read: &read, len };
        source.layer(&source.header(true)?, self.data.as_ref().map(|data| data.len() as u64))
    }
}

/// As much as there is of `len` bytes at `offset`.
fn part_of(bytes: &[u8], offset: u64, len: usize) -> &[u8] {
    let rest = bytes.get(size(offset)..).unwrap_or_default();
    &rest[..len.min(rest.len())]
}

/// Inflates what the images made in code have.
fn inflate_own(_: Compression, bytes: &[u8], cluster: &mut [u8]) -> bool {
    let found = inflate(bytes, cluster.len());
    found.is_some_and(|found| {
        cluster.copy_from_slice(&found);
        true
    })
}

/// Opens an image.
///
/// # Errors
/// See [`Header::parse`](crate::Header::parse) and [`Image::new`](crate::Image::new).
pub(crate) fn open_image(
    disk: &Disk,
    beneath: &[Beneath],
    data: Option<u64>,
    (read_only, snapshot): (bool, Option<usize>),
) -> Result<Opened, OpenError> {
    let read = |offset: u64, len: usize| {
        let mut bytes = vec![0; len.min(size(disk.len().saturating_sub(offset)))];
        disk.read(offset, &mut bytes);
        bytes
    };
    let source = Source { read: &read, len: disk.len() };
    let mut header = source.header(read_only)?;
    if let (Some(number), Some(table)) = (snapshot, header.snapshots()) {
        let (all, _) = source.snapshots(table)?;
        header = header.for_snapshot(&all[number % all.len()], disk.len())?;
    }
    let layers = beneath.iter().map(Beneath::layer).collect::<Result<_, _>>()?;
    source.image(header, layers, data, read_only)
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
        let beneath = backing.map(|bytes| Beneath::raw(Rc::from(bytes)));
        Self::open_on(disk, beneath.into_iter().collect(), None, options)
    }

    /// The same above any files, with an external data file.
    ///
    /// # Errors
    /// As [`World::open`].
    pub fn open_on(
        disk: Disk,
        beneath: Vec<Beneath>,
        data: Option<Disk>,
        options: &Options,
    ) -> Result<Self, OpenError> {
        let len = data.as_ref().map(Disk::len);
        let opened = open_image(&disk, &beneath, len, (options.read_only, None))?;
        Self::of(opened, disk, beneath, data, options)
    }

    /// The same for an image that has been opened already.
    pub(crate) fn of(
        opened: Opened,
        mut disk: Disk,
        beneath: Vec<Beneath>,
        data: Option<Disk>,
        options: &Options,
    ) -> Result<Self, OpenError> {
        let engine = Engine::new(opened.image, options)?;
        if let Some((offset, bytes)) = opened.marks {
            disk.write_durably(offset, &bytes);
        }
        let kept = (options.journal != 0).then(|| Kept::new(options.journal));
        Ok(Self::with(engine, (disk, beneath, data), kept, options))
    }

    /// The same as the successor of a killed process, with its journal.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn recover(
        disk: Disk,
        beneath: Vec<Beneath>,
        data: Option<Disk>,
        options: &Options,
        kept: Kept,
    ) -> Result<Self, String> {
        let len = data.as_ref().map(Disk::len);
        let (kept, records) = kept.found().map_err(|error| error.to_string())?;
        // Bitmaps were marked when the image was opened first.
        let opened = open_image(&disk, &beneath, len, (false, None));
        let engine = opened.and_then(|it| Engine::recover(it.image, options, &records));
        let engine = engine.map_err(|error| error.to_string())?;
        Ok(Self::with(engine, (disk, beneath, data), Some(kept), options))
    }

    fn with(
        engine: Engine,
        (disk, beneath, data): (Disk, Vec<Beneath>, Option<Disk>),
        kept: Option<Kept>,
        options: &Options,
    ) -> Self {
        let depth = usize::from(options.depth);
        let copies = vec![Vec::new(); engine.copy_buffers()];
        Self {
            engine,
            disk,
            beneath,
            data,
            in_flight: Vec::new(),
            buffers: vec![Vec::new(); depth],
            copies,
            replies: Vec::new(),
            broken: None,
            handed: None,
            plain: false,
            gathers: false,
            full: false,
            room: u64::MAX,
            fence: None,
            inflate: inflate_own,
            kept,
            places: vec![0; depth],
        }
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
        self.engine.hand_in(0, tag, request);
        self.go_on(guest);
    }

    /// Lets the engine work on what has come, unless it is to wait for more.
    pub fn go_on(&mut self, guest: Option<&Guest>) {
        if !self.gathers {
            self.engine.go_on();
            self.pump(guest);
        }
    }

    /// Takes what the engine has to say.
    pub fn pump(&mut self, guest: Option<&Guest>) {
        if let Some(kept) = &mut self.kept {
            kept.take(&mut self.engine);
        }
        if let Health::Failed(failure) = self.engine.health() {
            self.disk.latch(failure.is_corruption());
        }
        while let Some(op) = self.engine.next_op(0) {
            let submitted = self.submitted(op);
            if let Some(fence) = &mut self.fence
                && let Err(broken) = fence.check(&self.disk, op, &submitted)
            {
                self.broken.get_or_insert(broken);
            }
            let legal = |sector, id| guest.is_none_or(|guest| guest.is_legal(sector, id));
            match (op.file, &mut self.data) {
                (FileId::Image, data) => {
                    self.disk.can_punch = !self.plain;
                    self.disk.follow(data.as_ref());
                    // Two entries of an image that is wrong may share a cluster of guest data.
                    // When one is gone it is punched, whoever writes through the other.
                    let theirs = self.fence.is_some() && !submitted.is_metadata();
                    if let Err(broken) = self.disk.submit(op.id, &submitted, &legal)
                        && !theirs
                    {
                        self.broken.get_or_insert(broken);
                    }
                }
                (FileId::Data, Some(data)) => {
                    data.can_punch = !self.plain;
                    data.follow(Some(&self.disk));
                    // The guest may do there what it likes.
                    let _ = data.submit(op.id, &submitted, &legal);
                }
                _ => {}
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
        if let OpKind::CopyRead { buffer, .. }
        | OpKind::CopyFill { buffer, .. }
        | OpKind::CopyInflate { buffer, .. }
        | OpKind::CopyWrite { buffer, .. } = op.kind
        {
            // Most runs need few of them.
            self.copies[usize::from(buffer)].resize(COPY_BUFFER as usize, 0xbb);
        }
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
            None if self.is_too_long(op) => self.break_off(op, IoErrorKind::NoSpace, 0),
            None => self.carry_out(op, most),
        };
        if op.file == FileId::Image && outcome != Outcome::Done {
            let metadata = matches!(op.kind, OpKind::MetaWrite { .. } | OpKind::Sync);
            if metadata && matches!(outcome, Outcome::Error(_)) {
                self.disk.latch(false);
            }
        }
        if let Some(fence) = &mut self.fence {
            fence.note(op, outcome);
        }
        self.engine.hand_back(op.id, outcome);
        self.go_on(guest);
    }

    /// The process is killed in the middle of what follows from the end of an operation.
    pub fn die_at(&mut self, index: usize, prng: &mut Prng) {
        let op = self.in_flight.remove(index);
        let outcome = self.carry_out(op, u32::MAX);
        self.engine.complete(op.id, outcome);
        if let Some(kept) = &mut self.kept {
            kept.tear(&mut self.engine, prng);
        }
    }

    /// Would a file become longer than there is room for?
    fn is_too_long(&self, op: Op) -> bool {
        let end = match op.kind {
            OpKind::Write { offset, len, .. }
            | OpKind::WriteZeros { offset, len }
            | OpKind::CopyWrite { offset, len, .. }
            | OpKind::MetaWrite { offset, len } => offset.saturating_add(len.into()),
            OpKind::ZeroRange { offset, len } => offset.saturating_add(len),
            OpKind::Extend { to, .. } => to,
            _ => 0,
        };
        end > self.room
    }

    /// The disk that an operation goes to, which is not one beneath.
    fn disk_of(&mut self, file: FileId) -> &mut Disk {
        match (file, &mut self.data) {
            (FileId::Data, Some(data)) => {
                data.follow(Some(&self.disk));
                data
            }
            (_, data) => {
                self.disk.follow(data.as_ref());
                &mut self.disk
            }
        }
    }

    fn break_off(&mut self, op: Op, kind: IoErrorKind, most: u32) -> Outcome {
        match op.kind {
            OpKind::Write { len, .. }
            | OpKind::WriteZeros { len, .. }
            | OpKind::CopyWrite { len, .. }
            | OpKind::MetaWrite { len, .. } => {
                self.disk_of(op.file).complete(op.id, most.min(len).into());
            }
            OpKind::ZeroRange { .. } if !self.plain => self.disk.complete(op.id, most.into()),
            _ => self.disk_of(op.file).cancel(op.id),
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
                self.finish_read(op);
                outcome(have, len)
            }
            OpKind::CopyRead { buffer, at, offset, len } => {
                let number = usize::from(buffer);
                let mut whole = core::mem::take(&mut self.copies[number]);
                let bytes = &mut whole[at as usize..];
                let want = len.min(most);
                let have = self.read(op, offset, &mut bytes[..want as usize]);
                // Bytes past the end count as zeros.
                if want == len {
                    bytes[have as usize..len as usize].fill(0);
                }
                self.copies[number] = whole;
                self.finish_read(op);
                outcome(want, len)
            }
            OpKind::Inflate { .. }
            | OpKind::CopyInflate { .. }
            | OpKind::Fill { .. }
            | OpKind::CopyFill { .. } => {
                let found = self.bytes_for(op);
                self.finish_read(op);
                found.map_or(Outcome::Error(IoErrorKind::Io), |()| Outcome::Done)
            }
            OpKind::Write { len, .. }
            | OpKind::WriteZeros { len, .. }
            | OpKind::CopyWrite { len, .. }
            | OpKind::MetaWrite { len, .. } => {
                let done = len.min(most);
                self.disk_of(op.file).complete(op.id, done.into());
                outcome(done, len)
            }
            OpKind::MetaRead { offset, len } => {
                let mut bytes = vec![0; len as usize];
                self.read(op, offset, &mut bytes);
                self.engine.fill_staging(op.id, &bytes);
                self.finish_read(op);
                Outcome::Done
            }
            OpKind::Sync => {
                self.disk_of(op.file).complete_sync(op.id);
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
                self.disk_of(op.file).complete(op.id, 0);
                Outcome::Done
            }
        }
    }

    /// Puts zeros, or a part of a compressed cluster, where the operation wants them.
    fn bytes_for(&mut self, op: Op) -> Option<()> {
        let part = |bytes: Vec<u8>, from: u32, len: u32| {
            bytes[from as usize..(from + len) as usize].to_vec()
        };
        let (buffer, at, bytes) = match op.kind {
            OpKind::Inflate { tag, at, source, from, len } => {
                let bytes = part(self.inflate(op, source)?, from, len);
                (&mut self.buffers[usize::from(tag)], at, bytes)
            }
            OpKind::CopyInflate { buffer, at, source, from, len } => {
                let bytes = part(self.inflate(op, source)?, from, len);
                (&mut self.copies[usize::from(buffer)], at, bytes)
            }
            OpKind::Fill { tag, at, len } => {
                (&mut self.buffers[usize::from(tag)], at, vec![0; len as usize])
            }
            OpKind::CopyFill { buffer, at, len } => {
                (&mut self.copies[usize::from(buffer)], at, vec![0; len as usize])
            }
            other => unreachable!("{other:?} is none of these"),
        };
        buffer[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        Some(())
    }

    fn finish_read(&mut self, op: Op) {
        if matches!(op.file, FileId::Image | FileId::Data) {
            self.disk_of(op.file).complete(op.id, 0);
        }
    }

    /// Inflates a cluster.
    fn inflate(&self, op: Op, source: Compressed) -> Option<Vec<u8>> {
        let mut bytes = vec![0; source.len as usize];
        let have = self.read(op, source.offset, &mut bytes);
        let mut cluster = vec![0; 1 << source.cluster_bits];
        let good = (self.inflate)(source.method, &bytes[..have as usize], &mut cluster);
        good.then_some(cluster)
    }

    /// Reads from the image or from what lies beneath; returns how much there was.
    fn read(&self, op: Op, offset: u64, out: &mut [u8]) -> u32 {
        let layer = |number: u8| &self.beneath[usize::from(number)];
        let from = match op.file {
            FileId::Image | FileId::Data => {
                let data = self.data.as_ref().filter(|_| op.file == FileId::Data);
                let have = data.unwrap_or(&self.disk).read(offset, out);
                return u32::try_from(have).expect("at most the length");
            }
            FileId::Backing(number) => &layer(number).bytes,
            FileId::BackingData(number) => layer(number).data.as_deref().unwrap_or_default(),
        };
        let part = part_of(from, offset, out.len());
        out[..part.len()].copy_from_slice(part);
        u32::try_from(part.len()).expect("at most the length")
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
