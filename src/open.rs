//! Opening an image: blocking code around the engine's pure parsers.
//!
//! The order: open without side effects, lock, decide between direct and buffered I/O, read header
//! and tables in that same mode, open what else the image consists of, hand all to the engine.
//! [`open`] writes nothing, so that an image which cannot be served stays as it was. One that is
//! to be written to is first looked at by [`look`]; what an earlier crash has left is mended by
//! [`mend`] (`recover.rs`), once it is sure that there is a driver; what is to be written before
//! the first guest request by [`Opened::prepare`].
//!
//! Whether the image lies on a device of our own needs no check: its device does not exist yet.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::fcntl::OFlag;
use qcow2::{Engine, Header, Health, Image, Layer, Options};

pub use crate::direct::Mode;
use crate::files::{Files, Source, open_image};
use crate::journal::Journal;
use crate::{backing, bitmaps, direct, lock, recover, snapshots};

/// What to open, and how.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub path: PathBuf,
    pub mode: Mode,
    /// Bytes of a logical block of the device: 512 or 4096.
    pub block: u32,
    /// The external data file.
    pub data_file: Option<PathBuf>,
    /// Where backing files may lie, beside the image's own folder.
    pub allow_backing: Vec<PathBuf>,
    /// ID or name of the internal snapshot to be served.
    pub snapshot: Option<OsString>,
    pub lock: lock::Policy,
    /// For the engine; alignment and fixed size are filled in here.
    pub options: Options,
    /// The journal of the dead server of this device, to be brought into the image.
    pub resume: Option<u32>,
}

impl Wanted {
    /// An image by itself, in the usual way.
    pub fn new(path: &Path, options: Options) -> Self {
        Self {
            path: path.to_path_buf(),
            mode: Mode::Auto,
            block: 512,
            data_file: None,
            allow_backing: Vec::new(),
            snapshot: None,
            lock: lock::Policy::On,
            options,
            resume: None,
        }
    }
}

/// An image that is ready to be served.
pub struct Opened {
    pub files: Files,
    pub engine: Engine,
    pub direct: bool,
    /// What the user did not rule out on the command line, and should know.
    pub notes: Vec<String>,
    pub version: u32,
    pub cluster_bits: u32,
    marks: Option<bitmaps::Marks>,
    /// Where a dead server's records came from.
    pub journal: Option<Journal>,
}

impl Opened {
    /// Writes what must be on disk before the first guest request.
    pub fn prepare(&self) -> Result<()> {
        self.marks.as_ref().map_or(Ok(()), |marks| marks.write(&self.files.image))
    }
}

/// Why an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// To find out whether it can be served for writing, once it is mended.
    Look,
    /// To serve it.
    Serve,
}

/// Opens the image. Errors do not name it; the caller does.
pub fn open(wanted: &Wanted) -> Result<Opened> {
    open_for(wanted, Purpose::Serve)
}

/// Before an image is mended and served for writing: finds out what is in the way of that.
/// Returns which file the image is.
pub fn look(wanted: &Wanted) -> Result<(u64, u64)> {
    let opened = open_for(wanted, Purpose::Look)?;
    recover::judge(&opened.files.image.file, &wanted.path)?;
    opened.files.image.identity()
}

fn open_for(wanted: &Wanted, purpose: Purpose) -> Result<Opened> {
    let read_only = wanted.options.read_only;
    let mut notes = Vec::new();
    let mut file = open_source(&wanted.path, wanted, &mut notes)?;
    let len = file.len().context("cannot get the length of the file")?;
    let header = read_header(&file, len, read_only, purpose)?;
    let geometry = header.geometry();
    notes.extend(direct::fit(&mut file, wanted.mode, geometry)?);
    let header = match &wanted.snapshot {
        Some(snapshot) => {
            let snapshot = snapshots::find(&file, header.snapshots(), snapshot)?;
            header.for_snapshot(&snapshot, len)?
        }
        None => header,
    };
    let data = open_data_file(&header, wanted, &file, &mut notes)?;
    let mut known = vec![file.identity()?];
    known.extend(data.as_ref().map(Source::identity).transpose()?);
    let allow = &wanted.allow_backing;
    let beneath = backing::chain(&wanted.path, file.kind, known, &header, allow, wanted.lock)?;
    notes.extend(beneath.notes);

    let version = header.version();
    let (image, marks) = assemble(&file, data.as_ref(), header, beneath.layers, read_only)?;
    let alignment = data.as_ref().map_or(1, |data| data.alignment).max(file.alignment).max(512);
    let fixed_size = file.kind.is_device();
    let options = Options { alignment, fixed_size, ..wanted.options.clone() };
    let (engine, journal) = match wanted.resume {
        None => (Engine::new(image, &options)?, None),
        Some(id) => {
            let (journal, records) = Journal::open(id, &file)?;
            // It goes on with the journal as its predecessor made it.
            let options = Options { journal: journal.records(), ..options };
            (Engine::recover(image, &options, &records)?, Some(journal))
        }
    };
    let direct = file.is_direct() && data.as_ref().is_none_or(Source::is_direct);
    let files = Files { image: file, data, beneath: beneath.files };
    let cluster_bits = geometry.cluster_bits();
    Ok(Opened { files, engine, direct, notes, version, cluster_bits, marks, journal })
}

/// The image of a header, with what else the file says of it.
fn assemble(
    file: &Source,
    data: Option<&Source>,
    header: Header,
    layers: Vec<Layer>,
    read_only: bool,
) -> Result<(Image, Option<bitmaps::Marks>)> {
    let l1 = file.extent(header.l1_extent()).context("reading the L1 table")?;
    let refcounts = header.refcount_table_extent();
    let len = file.len().context("cannot get the length of the file")?;
    let (bitmaps, table, geometry) = (header.bitmaps(), header.snapshots(), header.geometry());
    let image = match read_only {
        true => Image::for_reading(header, &l1, len)?,
        false => {
            let refcounts = file.extent(refcounts).context("reading the refcount table")?;
            Image::new(header, &l1, &refcounts, len)?
        }
    };
    let mut image = image.with_layers(layers)?;
    if let Some(data) = data {
        image = image.with_data_file(data.len().context("the data file")?);
    }
    if read_only {
        return Ok((image, None));
    }
    table.map_or(Ok(()), |table| snapshots::protect(&mut image, table, file))?;
    let found = bitmaps.map(|all| bitmaps::protect(&mut image, all, file, geometry));
    Ok((image, found.transpose()?.flatten()))
}

/// An engine for the image of one that is closed, which is open as it was, after somebody else has
/// written to it. It takes no writes where the old one has failed.
pub fn again(files: &Files, old: &mut Engine) -> Result<Engine> {
    let failed = matches!(old.health(), Health::Failed(_));
    let options = Options { read_only: failed, ..old.options().clone() };
    let len = files.image.len().context("cannot get the length of the file")?;
    let header = read_header(&files.image, len, failed, Purpose::Serve)?;
    let layers = old.take_layers();
    let (image, _) = assemble(&files.image, files.data.as_ref(), header, layers, failed)?;
    Ok(Engine::new(image, &options)?.succeed(old))
}

fn read_header(file: &Source, len: u64, read_only: bool, purpose: Purpose) -> Result<Header> {
    let first = file.up_to(512).context("reading the header")?;
    let bytes = file.up_to(Header::needed(&first)?).context("reading the header")?;
    let header = Header::parse(&bytes, len, true)?;
    // What is dirty is mended first. Later it is not dirty, or somebody else had it meanwhile.
    let mended = purpose == Purpose::Look && header.is_dirty() && !header.is_corrupt();
    if read_only || mended { Ok(header) } else { Ok(header.for_writing()?) }
}

/// Before an image is written to: mends what an earlier crash has left in it, and says what that
/// was. `tell` hears what takes long.
pub fn mend(wanted: &Wanted, tell: &mut dyn FnMut(&str) -> Result<()>) -> Result<Option<String>> {
    let (file, header) = open_to_mend(wanted)?;
    if header.is_dirty() {
        return rebuild(&file, &header, &wanted.path, Some(recover::MOST), tell).map(Some);
    }
    if header.is_foreign() {
        // What these keep in the file would be taken for leaked.
        return Ok(Some(
            "leaks were not searched for: it has extensions or features that are not known"
                .to_string(),
        ));
    }
    recover::reclaim(&file.file, &wanted.path, header.geometry().cluster_size())
}

/// Before a dead server's records are brought in: it may have died while the L1 table of the image
/// moved (`resize.rs`), which is marked dirty then, and there are no records.
pub fn mend_unfinished(
    wanted: &Wanted,
    id: u32,
    tell: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<()> {
    let (file, header) = open_to_mend(wanted)?;
    if header.is_dirty() && Journal::open(id, &file).is_ok_and(|(_, records)| records.is_empty()) {
        // The mark is ours, and nobody else may mend it now: whatever it takes.
        rebuild(&file, &header, &wanted.path, None, tell)?;
    }
    Ok(())
}

fn rebuild(
    file: &Source,
    header: &Header,
    path: &Path,
    most: Option<u64>,
    tell: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<String> {
    if header.is_foreign() {
        bail!(
            "it is marked dirty and has extensions or features that are not known: what these keep \
             in the file would be given back as leaked; repair it with the program that made it, \
             or serve it with --read-only"
        );
    }
    recover::rebuild(&file.file, path, most, tell)
}

/// The image, locked, and its header, which may be marked dirty. (What there is to note is noted
/// when it is served.)
fn open_to_mend(wanted: &Wanted) -> Result<(Source, Header)> {
    let file = open_source(&wanted.path, wanted, &mut Vec::new())?;
    let len = file.len().context("cannot get the length of the file")?;
    let header = read_header(&file, len, false, Purpose::Look)?;
    Ok((file, header))
}

/// Opens and locks a file that is written to if the image is.
fn open_source(path: &Path, wanted: &Wanted, notes: &mut Vec<String>) -> Result<Source> {
    let read_only = wanted.options.read_only;
    let file = open_image(path, !read_only, "--read-only serves it for reading")?;
    let mut source = Source::new(file, read_only)?;
    // Opened so that a pipe or a terminal could not hold us up; that is settled now.
    direct::clear_flag(&source.file, OFlag::O_NONBLOCK)?;
    notes.extend(lock::take(&source.file, read_only, wanted.lock)?);
    notes.extend(direct::choose(&mut source, wanted.mode, wanted.block)?);
    Ok(source)
}

/// The external data file, if the image has one: only the one given on the command line.
fn open_data_file(
    header: &Header,
    wanted: &Wanted,
    image: &Source,
    notes: &mut Vec<String>,
) -> Result<Option<Source>> {
    let path = match (header.data_file(), &wanted.data_file) {
        (None, None) => return Ok(None),
        (None, Some(_)) => bail!("it has no external data file; leave --data-file out"),
        (Some(named), None) => {
            let name = named.name.as_deref().map(String::from_utf8_lossy);
            let called = name.map_or(String::new(), |name| format!(", which it calls {name:?}"));
            bail!(
                "its content is in an external data file{called}; give that file with \
                 --data-file PATH, since an image may name any file of this host"
            )
        }
        (Some(_), Some(path)) => path,
    };
    let about = || format!("the data file {}", path.display());
    let mut own = Vec::new();
    let mut source = open_source(path, wanted, &mut own).with_context(about)?;
    let note = direct::fit(&mut source, wanted.mode, header.geometry());
    own.extend(note.with_context(about)?);
    if source.identity()? == image.identity()? {
        bail!("{} is the image itself", about());
    }
    notes.extend(own.into_iter().map(|note| format!("{}: {note}", about())));
    Ok(Some(source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    fn wanted(path: &Path, read_only: bool) -> Wanted {
        Wanted::new(path, Options { read_only, ..Options::default() })
    }

    #[test]
    fn a_dirty_image_is_looked_at_but_not_served_for_writing_before_it_is_mended() {
        let dirty = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/corrupt/dirty.qcow2");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dirty.qcow2");
        fs::copy(dirty, &path).unwrap();
        let refused = || open(&wanted(&path, false)).err().map(|error| error.to_string());
        look(&wanted(&path, false)).unwrap();
        assert!(refused().unwrap().contains("marked dirty"));
        open(&wanted(&path, true)).unwrap();
        let note = mend(&wanted(&path, false), &mut |_| Ok(())).unwrap();
        assert!(note.unwrap().contains("refcounts rebuilt"));
        assert_eq!(refused(), None);
    }

    #[test]
    fn what_unknown_extensions_may_own_is_not_given_back() {
        let sound = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/images/v3-512.qcow2");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("foreign.qcow2");
        let mut bytes = fs::read(sound).unwrap();
        // Behind the header, whose length is in bytes 100 to 103, there is no extension yet; now
        // one of no bytes.
        let at = usize::from(bytes[103]);
        assert_eq!(bytes[at..at + 16], [0; 16]);
        bytes[at..at + 4].copy_from_slice(b"else");
        fs::write(&path, &bytes).unwrap();
        look(&wanted(&path, false)).unwrap();
        let note = mend(&wanted(&path, false), &mut |_| Ok(())).unwrap();
        assert!(note.unwrap().contains("not known"));
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn where_leaks_are_not_searched_for_one_line_says_so() {
        let sound = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/images/v3-512.qcow2");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("it's.qcow2");
        fs::copy(sound, &path).unwrap();
        let mend = || mend(&wanted(&path, false), &mut |_| Ok(())).unwrap();
        assert_eq!(mend(), None);
        // So long that counting would take more memory than it is worth.
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(512 << 20).unwrap();
        let note = mend().unwrap();
        let next = format!("'ublk-qcow2 check -f '{}/it'\\''s.qcow2''", folder.path().display());
        assert!(note.contains("not searched for") && note.contains(&next), "{note}");
        assert_eq!(note.lines().count(), 1);
    }
}
