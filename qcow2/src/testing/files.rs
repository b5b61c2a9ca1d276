//! An engine on real files: an image by its path, with its external data file and all that lies
//! beneath. Operations are carried out when they complete, in an order that the caller chooses.
//!
//! There is no policy here about which files may be opened: names mean what they mean to QEMU,
//! relative to the image that holds them.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;
use std::{format, io};

use miniz_oxide::inflate::{TINFLStatus, core as deflate};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::engine::Engine;
use crate::error::IoErrorKind;
use crate::header::Header;
use crate::layer::Layer;
use crate::op::{
    COPY_BUFFER, Compressed, Compression, FileId, Op, OpKind, Outcome, Reply, Request,
};
use crate::options::Options;
use crate::report::Health;
use crate::testing::open::Source;
use crate::testing::size;

/// An image being served from real files.
#[derive(Debug)]
pub struct Files {
    /// The engine.
    pub engine: Engine,
    image: Pair,
    /// What lies beneath, from the top.
    beneath: Vec<Pair>,
    /// Operations that were handed out and have not completed, in the order of submission.
    pub in_flight: Vec<Op>,
    /// The buffer of each tag.
    pub buffers: Vec<Vec<u8>>,
    copies: Vec<Vec<u8>>,
    /// Answers that nobody has looked at yet.
    pub replies: Vec<Reply>,
    /// The host can neither zero nor punch.
    pub plain: bool,
}

/// A file of the chain, with its external data file.
#[derive(Debug)]
struct Pair {
    file: File,
    data: Option<File>,
}

/// What a function here complains of: a text for the one who runs the test.
type Result<T> = core::result::Result<T, String>;

fn at<E: ToString>(path: &Path) -> impl Fn(E) -> String + '_ {
    move |error| format!("{}: {}", path.display(), error.to_string())
}

fn open_file(path: &Path, writable: bool) -> Result<(File, u64)> {
    let file = OpenOptions::new().read(true).write(writable).open(path).map_err(at(path))?;
    let len = file.metadata().map_err(at(path))?.len();
    Ok((file, len))
}

/// As much as there is of the buffer's length at `offset`.
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut have = 0;
    while have < bytes.len() {
        match file.read_at(&mut bytes[have..], offset + have as u64) {
            Ok(0) => break,
            Ok(more) => have += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}

fn read_part(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let have = read_at(file, &mut bytes, offset)?;
    bytes.truncate(have);
    Ok(bytes)
}

/// The same for [`open`](super::open).
fn read_or_panic(file: &File, offset: u64, len: usize) -> Vec<u8> {
    read_part(file, offset, len).expect("a test's own file can be read")
}

/// What a name in `image` stands for.
fn beside(image: &Path, name: &[u8]) -> PathBuf {
    let name = String::from_utf8_lossy(name).into_owned();
    image.parent().unwrap_or(Path::new("")).join(name)
}

fn open_data(header: &Header, path: &Path, writable: bool) -> Result<(Option<File>, Option<u64>)> {
    let Some(data) = header.data_file() else { return Ok((None, None)) };
    let name = data.name.as_deref().ok_or("the data file has no name")?;
    let (file, len) = open_file(&beside(path, name), writable)?;
    Ok((Some(file), Some(len)))
}

/// The files that lie beneath the image at `path`, from the top.
fn open_chain(header: &Header, path: &Path) -> Result<(Vec<Pair>, Vec<Layer>)> {
    let (mut files, mut layers) = (Vec::new(), Vec::new());
    let (mut next, mut above) = (header.backing().cloned(), path.to_path_buf());
    while let Some(backing) = next.take() {
        let path = beside(&above, &backing.name);
        let (file, len) = open_file(&path, false)?;
        if backing.format.as_deref() == Some(b"raw") {
            layers.push(Layer::raw(len));
            files.push(Pair { file, data: None });
            break;
        }
        let read = |offset, len| read_or_panic(&file, offset, len);
        let source = Source { read: &read, len };
        let header = source.header(true).map_err(at(&path))?;
        let (data, data_len) = open_data(&header, &path, false)?;
        layers.push(source.layer(&header, data_len).map_err(at(&path))?);
        files.push(Pair { file, data });
        (next, above) = (header.backing().cloned(), path);
    }
    Ok((files, layers))
}

impl Files {
    /// Opens an image with everything that it names, up to where it takes requests.
    ///
    /// # Errors
    /// What cannot be opened, and why.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        Self::open_at(path, None, options)
    }

    /// The same for one of its snapshots, which can only be read.
    ///
    /// # Errors
    /// As [`Files::open`].
    pub fn open_snapshot(path: &Path, name: &str, options: &Options) -> Result<Self> {
        let options = Options { read_only: true, ..options.clone() };
        Self::open_at(path, Some(name), &options)
    }

    fn open_at(path: &Path, snapshot: Option<&str>, options: &Options) -> Result<Self> {
        let (file, len) = open_file(path, !options.read_only)?;
        let read = |offset, len| read_or_panic(&file, offset, len);
        let source = Source { read: &read, len };
        let mut header = source.header(options.read_only).map_err(at(path))?;
        let (data, data_len) = open_data(&header, path, !options.read_only)?;
        let (beneath, layers) = open_chain(&header, path)?;
        if let Some(name) = snapshot {
            let table = header.snapshots().ok_or("it has no snapshots")?;
            let (all, _) = source.snapshots(table).map_err(at(path))?;
            let found = all.iter().find(|it| it.name == name.as_bytes());
            let found = found.ok_or_else(|| format!("no snapshot {name}"))?;
            header = header.for_snapshot(found, len).map_err(at(path))?;
        }
        let opened = source.image(header, layers, data_len, options.read_only);
        let opened = opened.map_err(at(path))?;
        let engine = Engine::new(opened.image, options).map_err(at(path))?;
        if let Some((offset, bytes)) = opened.marks {
            file.write_all_at(&bytes, offset).map_err(at(path))?;
        }
        let copies = vec![vec![0xbb; COPY_BUFFER as usize]; engine.copy_buffers()];
        let mut files = Self {
            engine,
            image: Pair { file, data },
            beneath,
            in_flight: Vec::new(),
            buffers: vec![Vec::new(); options.depth.into()],
            copies,
            replies: Vec::new(),
            plain: false,
        };
        files.settle();
        let ready = files.engine.is_ready();
        ready.then_some(files).ok_or_else(|| format!("{}: it does not get ready", path.display()))
    }

    /// Submits a request; a write's bytes are in `buffer`, a read's length is that of `buffer`.
    pub fn submit(&mut self, tag: u16, request: Request, buffer: Vec<u8>) {
        self.buffers[usize::from(tag)] = buffer;
        self.engine.submit(0, tag, request);
        self.pump();
    }

    fn pump(&mut self) {
        self.in_flight.extend(core::iter::from_fn(|| self.engine.next_op(0)));
        self.replies.extend(core::iter::from_fn(|| self.engine.next_reply(0)));
    }

    /// Carries out operation number `index` of those in flight, and completes it. A transfer ends
    /// after `most` bytes.
    pub fn complete(&mut self, index: usize, most: u32) {
        let op = self.in_flight.remove(index);
        let outcome = self.carry_out(op, most).unwrap_or_else(|error| Outcome::Error(kind(&error)));
        self.engine.complete(op.id, outcome);
        self.pump();
    }

    /// Completes everything in the order of submission until nothing is in flight.
    pub fn settle(&mut self) {
        self.pump();
        while !self.in_flight.is_empty() {
            self.complete(0, u32::MAX);
        }
    }

    /// Closes the image.
    ///
    /// # Panics
    /// If the engine does not come to an end.
    #[must_use]
    pub fn close(mut self) -> Health {
        self.engine.close();
        self.settle();
        let waits = self.engine.waits();
        assert!(self.engine.is_closed(), "nothing is in flight, but it is not closed: {waits}");
        self.engine.health()
    }

    /// All of the virtual disk, from an engine with nothing under way.
    ///
    /// # Errors
    /// Where a read fails.
    ///
    /// # Panics
    /// If a read does not come to an end.
    pub fn read_all(&mut self) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        while (all.len() as u64) < self.engine.virtual_size() {
            let offset = all.len() as u64;
            let bytes = (self.engine.virtual_size() - offset).min(1 << 20);
            let len = u32::try_from(bytes).expect("at most a mebibyte");
            self.submit(0, Request::Read { offset, len }, vec![0xaa; size(bytes)]);
            self.settle();
            let reply = self.replies.pop().expect("a reply to the only request");
            reply.result.map_err(|error| format!("a read at {offset} ends with {error:?}"))?;
            all.append(&mut self.buffers[0]);
        }
        Ok(all)
    }

    fn file(&self, id: FileId) -> &File {
        let data = |pair: &'_ Pair| pair.data.is_some();
        let pair = match id {
            FileId::Image | FileId::Data => &self.image,
            FileId::Backing(number) | FileId::BackingData(number) => {
                &self.beneath[usize::from(number)]
            }
        };
        match id {
            FileId::Data | FileId::BackingData(_) => {
                assert!(data(pair), "an external data file");
                pair.data.as_ref().expect("just asserted")
            }
            FileId::Image | FileId::Backing(_) => &pair.file,
        }
    }

    fn carry_out(&mut self, op: Op, most: u32) -> io::Result<Outcome> {
        match op.kind {
            OpKind::Read { tag, at, offset, len } => {
                let mut buffer = core::mem::take(&mut self.buffers[usize::from(tag)]);
                let part = &mut buffer[at as usize..(at + len.min(most)) as usize];
                let have = read_at(self.file(op.file), part, offset);
                self.buffers[usize::from(tag)] = buffer;
                Ok(outcome(u32::try_from(have?).expect("at most the length"), len))
            }
            OpKind::CopyRead { buffer, at, offset, len } => {
                let number = usize::from(buffer);
                let mut whole = core::mem::take(&mut self.copies[number]);
                let part = &mut whole[at as usize..][..len.min(most) as usize];
                let have = read_at(self.file(op.file), part, offset);
                if let Ok(have) = have {
                    part[have..].fill(0);
                }
                self.copies[number] = whole;
                have.map(|_| outcome(most, len))
            }
            OpKind::Inflate { tag, at, source, from, len } => {
                let bytes = inflate(self.file(op.file), source)?;
                let part = &bytes[from as usize..][..len as usize];
                self.buffers[usize::from(tag)][at as usize..][..part.len()].copy_from_slice(part);
                Ok(Outcome::Done)
            }
            OpKind::CopyInflate { buffer, at, source, from, len } => {
                let bytes = inflate(self.file(op.file), source)?;
                let part = &bytes[from as usize..][..len as usize];
                self.copies[usize::from(buffer)][at as usize..][..part.len()].copy_from_slice(part);
                Ok(Outcome::Done)
            }
            OpKind::Fill { tag, at, len } => {
                self.buffers[usize::from(tag)][at as usize..][..len as usize].fill(0);
                Ok(Outcome::Done)
            }
            OpKind::CopyFill { buffer, at, len } => {
                self.copies[usize::from(buffer)][at as usize..][..len as usize].fill(0);
                Ok(Outcome::Done)
            }
            OpKind::MetaRead { offset, len } => {
                let mut bytes = vec![0; len as usize];
                read_at(self.file(op.file), &mut bytes, offset)?;
                self.engine.fill_staging(op.id, &bytes);
                Ok(Outcome::Done)
            }
            _ => self.change(op, most),
        }
    }

    /// The operations that write.
    fn change(&self, op: Op, most: u32) -> io::Result<Outcome> {
        let file = self.file(op.file);
        let write = |bytes: &[u8], offset: u64| {
            let len = u32::try_from(bytes.len()).expect("a transfer");
            file.write_all_at(&bytes[..len.min(most) as usize], offset)?;
            Ok(outcome(most, len))
        };
        match op.kind {
            OpKind::Write { tag, at, offset, len } => {
                write(&self.buffers[usize::from(tag)][at as usize..][..len as usize], offset)
            }
            OpKind::CopyWrite { buffer, offset, len } => {
                write(&self.copies[usize::from(buffer)][..len as usize], offset)
            }
            OpKind::WriteZeros { offset, len } => write(&vec![0; len as usize], offset),
            OpKind::MetaWrite { offset, .. } => write(self.engine.staging(op.id), offset),
            OpKind::ZeroRange { .. } | OpKind::Punch { .. } if self.plain => {
                Ok(Outcome::Error(IoErrorKind::Unsupported))
            }
            OpKind::ZeroRange { offset, len } => {
                let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE;
                allocate(file, mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len)
            }
            OpKind::Punch { offset, len } => {
                let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE;
                allocate(file, mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len)
            }
            OpKind::Extend { from, to } => {
                let sparse = allocate(file, FallocateFlags::empty(), from, to - from);
                if !matches!(sparse, Ok(Outcome::Done)) {
                    file.set_len(to.max(file.metadata()?.len()))?;
                }
                Ok(Outcome::Done)
            }
            OpKind::Truncate { to } => file.set_len(to).map(|()| Outcome::Done),
            // Nothing here outlives the power.
            OpKind::Sync => Ok(Outcome::Done),
            other => unreachable!("{other:?} does not write"),
        }
    }
}

fn outcome(done: u32, len: u32) -> Outcome {
    if done >= len { Outcome::Done } else { Outcome::Short(done) }
}

fn kind(error: &io::Error) -> IoErrorKind {
    match error.kind() {
        io::ErrorKind::Unsupported => IoErrorKind::Unsupported,
        io::ErrorKind::StorageFull => IoErrorKind::NoSpace,
        _ => IoErrorKind::Io,
    }
}

fn allocate(file: &File, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<Outcome> {
    let signed = |value: u64| i64::try_from(value).expect("tests use small files");
    match fallocate(file, mode, signed(offset), signed(len)) {
        Ok(()) => Ok(Outcome::Done),
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {
            Ok(Outcome::Error(IoErrorKind::Unsupported))
        }
        Err(error) => Err(error.into()),
    }
}

/// The bytes of a compressed cluster.
fn inflate(file: &File, source: Compressed) -> io::Result<Vec<u8>> {
    let bytes = read_part(file, source.offset, source.len as usize)?;
    let mut out = vec![0; 1 << source.cluster_bits];
    let whole = match source.method {
        Compression::Zlib => inflate_raw(&bytes, &mut out),
        Compression::Zstd => inflate_zstd(&bytes, &mut out),
    };
    if whole { Ok(out) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Raw deflate, of which the first cluster counts.
fn inflate_raw(bytes: &[u8], out: &mut [u8]) -> bool {
    let mut state = deflate::DecompressorOxide::new();
    let flags = deflate::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, _, count) = deflate::decompress(&mut state, bytes, out, 0, flags);
    let whole = matches!(
        status,
        TINFLStatus::Done
            | TINFLStatus::HasMoreOutput
            | TINFLStatus::FailedCannotMakeProgress
            | TINFLStatus::NeedsMoreInput
    );
    whole && count == out.len()
}

/// Zstandard frames, as many as fill `out`; the last of them has to end there.
fn inflate_zstd(mut bytes: &[u8], out: &mut [u8]) -> bool {
    let mut filled = 0;
    while filled < out.len() {
        let Ok(mut decoder) = ruzstd::decoding::StreamingDecoder::new(&mut bytes) else {
            return false;
        };
        let before = filled;
        loop {
            match io::Read::read(&mut decoder, &mut out[filled..]) {
                Ok(0) if filled == out.len() => {
                    return matches!(io::Read::read(&mut decoder, &mut [0]), Ok(0));
                }
                Ok(0) => break,
                Ok(more) => filled += more,
                Err(_) => return false,
            }
        }
        if filled == before {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use miniz_oxide::deflate::compress_to_vec;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec as zstd_to_vec};

    use super::*;

    #[test]
    fn a_stream_of_more_than_a_cluster_is_taken_as_qemu_takes_it() {
        for (len, raw, zstd) in [(4095, false, false), (4096, true, true), (4097, true, false)] {
            let (content, mut out) = (vec![7; len], vec![0; 4096]);
            assert_eq!(inflate_raw(&compress_to_vec(&content, 6), &mut out), raw, "{len}");
            assert!(!raw || out == vec![7; 4096]);
            let bytes = zstd_to_vec(&content[..], CompressionLevel::Fastest);
            assert_eq!(inflate_zstd(&bytes, &mut out), zstd, "{len}");
        }
    }
}
