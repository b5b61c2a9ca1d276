//! The files beneath an image: which ones may be opened, and opening them.
//!
//! Their names stand in images that somebody else may have made, and we run as root: followed
//! blindly they would hand any file of the host to the guest. So a name opens nothing by itself.
//!
//! - The file must lie beneath the folder of the image that is served, or beneath a folder given
//!   with `--allow-backing` (or be the very file or block device given there). The name is compared
//!   with these folders as text, and opened from the folder's descriptor, with no way out of it:
//!   the kernel sees to that (`openat2` with RESOLVE_BENEATH). Where a symbolic link leads out, the
//!   place it leads to is looked for in the same folders, in the same way.
//! - It must be a regular file; a block device only if it was given on the command line. What it is
//!   is known before it is opened for reading: opening a tape or a watchdog does something already.
//! - An image that is a device node has no folder of its own: /dev/vg is no place for files.
//! - Its format must be declared. It is never guessed, since a guest can write a header into a raw
//!   disk.
//! - A relative name is relative to the folder of the image that has it, as its path was written.
//!   Names are bytes: `json:` and `nbd:` mean nothing.
//! - Its own external data file, if it has one, is never opened: such an image is refused.

use std::ffi::{CString, OsStr};
use std::fs::{self, File, FileType, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use qcow2::{Backing, Header, Layer};

use crate::files::{FileKind, Source, reopen};
use crate::lock;

/// Files beneath an image, at the most.
const MAX_DEPTH: usize = 16;

/// What is beneath an image, from the top.
#[derive(Default)]
pub struct Chain {
    pub files: Vec<Source>,
    pub layers: Vec<Layer>,
    /// For the user.
    pub notes: Vec<String>,
}

/// Declared formats that are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Raw,
    Qcow2,
}

/// Opens all that lies beneath `image`, whose files (for the search for loops) are `known`.
pub fn chain(
    image: &Path,
    kind: FileKind,
    known: Vec<(u64, u64)>,
    header: &Header,
    allow: &[PathBuf],
    lock: lock::Policy,
) -> Result<Chain> {
    let mut chain = Chain::default();
    let Some(mut named) = header.backing().cloned() else { return Ok(chain) };
    let mut known = known;
    let mut folder = folder_of(image)?;
    let allowed = Allowed::new(&folder, image, kind, allow)?;
    let mut above = image.to_path_buf();
    loop {
        let shown = shown(&named.name);
        if chain.files.len() == MAX_DEPTH {
            bail!(
                "more than {MAX_DEPTH} files lie beneath it; 'qemu-img convert -O qcow2' merges \
                 them into one image"
            );
        }
        refuse_protocol(&named, &above)?;
        let format = format(&named, &above)?;
        let path =
            absolute(&folder, &named.name).with_context(|| format!("the backing file {shown}"))?;
        let file = allowed.open(&path, &shown)?;
        let about = || format!("the backing file {shown}");
        let source = Source::new(file, true).with_context(about)?;
        let identity = source.identity()?;
        if known.contains(&identity) {
            bail!("{} is beneath itself: its chain of backing files is a loop", about());
        }
        known.push(identity);
        let note = lock::take(&source.file, true, lock).with_context(about)?;
        chain.notes.extend(note.map(|note| format!("{}: {note}", about())));
        let next = match format {
            Format::Raw => {
                chain.layers.push(Layer::raw(source.len()?));
                None
            }
            Format::Qcow2 => {
                let (layer, next) = qcow2_layer(&source).with_context(about)?;
                chain.layers.push(layer);
                next
            }
        };
        chain.files.push(source);
        let Some(next) = next else { return Ok(chain) };
        named = next;
        folder = folder_of(&path)?;
        above = path;
    }
}

fn qcow2_layer(source: &Source) -> Result<(Layer, Option<Backing>)> {
    let len = source.len()?;
    let first = source.up_to(512).context("reading the header")?;
    let bytes = source.up_to(Header::needed(&first)?).context("reading the header")?;
    let header = Header::parse(&bytes, len, true)?;
    if header.data_file().is_some() {
        bail!(
            "has an external data file, which is not served beneath an image; \
             'qemu-img convert -O qcow2' makes one file of the two"
        );
    }
    let l1 = source.extent(header.l1_extent()).context("reading the L1 table")?;
    let layer = Layer::qcow2(&header, &l1, len, None)?;
    Ok((layer, header.backing().cloned()))
}

/// QEMU takes what comes before a colon in the first part of a name for a protocol (`json:`,
/// `nbd:`, and `file:`, too). A file of that name would not be the one that QEMU shows.
fn refuse_protocol(named: &Backing, above: &Path) -> Result<()> {
    let first = named.name.split(|&byte| byte == b'/').next().unwrap_or_default();
    if !first.contains(&b':') {
        return Ok(());
    }
    bail!(
        "the backing file {} is named with a protocol, which is not followed; name a file or \
         block device with 'qemu-img rebase -u -b PATH -F FORMAT {}' (./ before a name with a \
         colon)",
        shown(&named.name),
        quoted(above.as_os_str())
    )
}

/// The declared format of a file beneath the image `above`.
fn format(named: &Backing, above: &Path) -> Result<Format> {
    let shown = shown(&named.name);
    match named.format.as_deref() {
        Some(b"raw") => Ok(Format::Raw),
        Some(b"qcow2") => Ok(Format::Qcow2),
        None => bail!(
            "the format of the backing file {shown} is not declared (raw or qcow2), and is never \
             guessed; declare it with 'qemu-img rebase -u -b {} -F FORMAT {}'",
            quoted(OsStr::from_bytes(&named.name)),
            quoted(above.as_os_str())
        ),
        Some(format) => bail!(
            "the backing file {shown} is declared to be of format {:?}, raw and qcow2 are served; \
             'qemu-img convert -O qcow2' merges it into one image",
            String::from_utf8_lossy(format)
        ),
    }
}

fn shown(name: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(name))
}

/// A name as the shell wants it.
pub fn quoted(name: &OsStr) -> String {
    let text = name.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%=".contains(c);
    match text.chars().all(plain) && !text.is_empty() {
        true => text.into_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

/// The folder in which relative names of this image begin. It has no symbolic links.
fn folder_of(image: &Path) -> Result<PathBuf> {
    let folder = std::path::absolute(image).ok();
    let folder = folder.as_ref().and_then(|path| path.parent());
    let folder = folder.and_then(|folder| fs::canonicalize(folder).ok());
    folder.with_context(|| format!("cannot find the folder of {}", image.display()))
}

/// The whole name of a file that an image in `folder` names.
fn absolute(folder: &Path, name: &[u8]) -> Result<PathBuf> {
    if name.contains(&0) {
        bail!("has a zero byte in its name");
    }
    let mut folder = folder.to_path_buf();
    let mut parts = Path::new(OsStr::from_bytes(name)).components();
    // `folder` has no symbolic links, so that going up is exact. Any other `..` is the kernel's.
    loop {
        match parts.clone().next() {
            Some(Component::ParentDir) => drop(folder.pop()),
            Some(Component::CurDir) => {}
            _ => return Ok(folder.join(parts.as_path())),
        }
        parts.next();
    }
}

/// Where backing files may lie.
struct Allowed {
    places: Vec<Place>,
    /// What is said of a file that lies elsewhere.
    elsewhere: &'static str,
}

struct Place {
    /// How it may be spelled: as it was given, and without symbolic links.
    names: Vec<PathBuf>,
    /// Its descriptor, of a folder; otherwise it allows exactly one file.
    folder: Option<File>,
}

impl Place {
    fn new(path: &Path) -> Result<Self> {
        let about = || format!("--allow-backing {}", path.display());
        let real = fs::canonicalize(path).with_context(about)?;
        let names = vec![std::path::absolute(path).with_context(about)?, real];
        if !fs::metadata(path).with_context(about)?.is_dir() {
            return Ok(Self { names, folder: None });
        }
        let folder = File::open(path).with_context(about)?;
        Ok(Self { names, folder: Some(folder) })
    }
}

/// Stands for: a device, a folder, a pipe.
const NOT_A_FILE: Errno = Errno::ENODEV;

/// How looking for a file in one place ended.
enum Found {
    File(File),
    /// The name belongs to another place.
    Elsewhere,
    /// It begins here and leads out.
    Escapes,
    Failed(Errno),
}

impl Allowed {
    /// `folder` is the real one of `image`.
    fn new(folder: &Path, image: &Path, kind: FileKind, allow: &[PathBuf]) -> Result<Self> {
        let mut places = Vec::new();
        let elsewhere = if kind.is_device() {
            "lies beneath no folder that is allowed (an image that is a device has none of its own)"
        } else {
            let mut own = Place::new(folder).context("the folder of the image")?;
            let spelled = std::path::absolute(image).ok();
            let spelled = spelled.as_ref().and_then(|path| path.parent());
            own.names.extend(spelled.map(Path::to_path_buf));
            places.push(own);
            "does not lie beneath the image's own folder"
        };
        for path in allow {
            places.push(Place::new(path)?);
        }
        Ok(Self { places, elsewhere })
    }

    fn open(&self, path: &Path, shown: &str) -> Result<File> {
        match self.search(path, ResolveFlag::empty()) {
            Found::File(file) => Ok(file),
            Found::Failed(Errno::ENOENT) => {
                bail!("the backing file {shown} does not exist ({})", path.display())
            }
            Found::Failed(errno) => Err(cannot_open(errno, shown)),
            Found::Elsewhere => Err(self.outside(path, shown)),
            Found::Escapes => self.follow(path, shown),
        }
    }

    /// A symbolic link leads out of the place that the name begins in.
    fn follow(&self, path: &Path, shown: &str) -> Result<File> {
        let real = fs::canonicalize(path);
        let real = real.map_err(|error| anyhow!("the backing file {shown}: {error}"))?;
        match self.search(&real, ResolveFlag::RESOLVE_NO_SYMLINKS) {
            Found::File(file) => Ok(file),
            Found::Failed(errno) => Err(cannot_open(errno, shown)),
            Found::Elsewhere | Found::Escapes => Err(self.outside(&real, shown)),
        }
    }

    fn search(&self, path: &Path, more: ResolveFlag) -> Found {
        let mut result = Found::Elsewhere;
        for place in &self.places {
            for name in &place.names {
                match (place.open(name, path, more), &result) {
                    (Found::File(file), _) => return Found::File(file),
                    (Found::Elsewhere, _) => {}
                    (found, Found::Elsewhere) => result = found,
                    _ => {}
                }
            }
        }
        let climbs = path.components().any(|part| part == Component::ParentDir);
        match result {
            // Where it leads to is nobody's business.
            Found::Escapes if climbs => Found::Elsewhere,
            result => result,
        }
    }

    fn outside(&self, path: &Path, shown: &str) -> anyhow::Error {
        let climbs = path.components().any(|part| part == Component::ParentDir);
        // Beneath /dev a folder allows nothing that anybody wants.
        let device = path.starts_with("/dev").then_some(path);
        let next = match device.or_else(|| path.parent()) {
            Some(place) if !climbs => {
                format!("--allow-backing {} allows it", quoted(place.as_os_str()))
            }
            _ => "give it a name without '..' in the middle with 'qemu-img rebase -u'".to_string(),
        };
        anyhow!(
            "the backing file {shown} {}; it is not opened, since an image may name any file of \
             this host; {next}",
            self.elsewhere
        )
    }
}

impl Place {
    /// Opens `path` if it begins with `name`, one of this place's.
    fn open(&self, name: &Path, path: &Path, more: ResolveFlag) -> Found {
        // So far nothing happens to what is there, whatever that is.
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let Some(folder) = &self.folder else {
            if path != name {
                return Found::Elsewhere;
            }
            let found = OpenOptions::new().read(true).custom_flags(flags.bits()).open(name);
            return match found {
                Ok(found) => open_if(&found, |kind| kind.is_file() || kind.is_block_device()),
                Err(error) => Found::Failed(errno_of(&error)),
            };
        };
        let Ok(rest) = path.strip_prefix(name) else { return Found::Elsewhere };
        let rest = if rest.as_os_str().is_empty() { Path::new(".") } else { rest };
        let Ok(rest) = CString::new(rest.as_os_str().as_bytes()) else { return Found::Elsewhere };
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS | more;
        let how = OpenHow::new().flags(flags).resolve(resolve);
        match openat2(folder.as_fd(), rest.as_c_str(), how) {
            Ok(found) => open_if(&File::from(found), FileType::is_file),
            Err(Errno::EXDEV) => Found::Escapes,
            Err(errno) => Found::Failed(errno),
        }
    }
}

/// Opens what `found` names, for reading, if it is of the right kind.
fn open_if(found: &File, right: impl Fn(&FileType) -> bool) -> Found {
    match found.metadata() {
        Ok(data) if right(&data.file_type()) => {}
        Ok(_) => return Found::Failed(NOT_A_FILE),
        Err(error) => return Found::Failed(errno_of(&error)),
    }
    match reopen(found, false) {
        Ok(file) => Found::File(file),
        Err(error) => Found::Failed(errno_of(&error)),
    }
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

fn cannot_open(errno: Errno, shown: &str) -> anyhow::Error {
    match errno {
        NOT_A_FILE => anyhow!(
            "the backing file {shown} is not a regular file, nor a block device that \
             --allow-backing names"
        ),
        errno => anyhow!("the backing file {shown} cannot be opened: {}", errno.desc()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use std::{slice, thread};

    #[test]
    fn names_are_relative_to_the_folder_and_have_no_prefixes() {
        let whole = |name: &str| absolute(Path::new("/a/b"), name.as_bytes()).unwrap();
        assert_eq!(whole("x.raw"), Path::new("/a/b/x.raw"));
        assert_eq!(whole("./../c/x"), Path::new("/a/c/x"));
        assert_eq!(whole("../../../../x"), Path::new("/x"));
        assert_eq!(whole("/etc/passwd"), Path::new("/etc/passwd"));
        assert_eq!(whole("c/../x"), Path::new("/a/b/c/../x"));
        assert_eq!(whole("nbd:host:1"), Path::new("/a/b/nbd:host:1"));
        assert!(absolute(Path::new("/a"), b"x\0y").is_err());
    }

    /// Opening a pipe for reading lets go whoever waits for a reader; a tape would be wound.
    #[test]
    fn what_is_no_file_is_not_opened_to_find_that_out() {
        let folder = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(folder.path()).unwrap();
        let pipe = real.join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let waiting = thread::spawn({
            let pipe = pipe.clone();
            move || OpenOptions::new().write(true).open(pipe)
        });
        thread::sleep(Duration::from_millis(50));
        let image = real.join("image");
        for allow in [&[][..], slice::from_ref(&pipe)] {
            let allowed = Allowed::new(&real, &image, FileKind::Regular, allow).unwrap();
            let error = allowed.open(&pipe, "\"pipe\"").unwrap_err();
            assert!(error.to_string().contains("is not a regular file"), "{error}");
        }
        thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished(), "somebody opened the pipe");
        File::open(&pipe).unwrap();
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn an_image_that_is_a_device_has_no_folder_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(folder.path()).unwrap();
        let (image, base) = (real.join("image"), real.join("base"));
        fs::write(&base, b"beneath").unwrap();
        let open = |kind, allow: &[PathBuf]| {
            Allowed::new(&real, &image, kind, allow).unwrap().open(&base, "\"base\"").map(drop)
        };
        open(FileKind::Regular, &[]).unwrap();
        let device = FileKind::BlockDevice { size: 1 << 20 };
        let error = open(device, &[]).unwrap_err().to_string();
        let next = format!("--allow-backing {} allows it", real.display());
        assert!(error.contains("a device") && error.contains(&next), "{error}");
        open(device, slice::from_ref(&real)).unwrap();
    }

    #[test]
    fn names_for_the_shell_are_quoted_where_they_must_be() {
        assert_eq!(quoted(OsStr::new("/a/b-1.raw")), "/a/b-1.raw");
        assert_eq!(quoted(OsStr::new("a b")), "'a b'");
        assert_eq!(quoted(OsStr::new("it's")), "'it'\\''s'");
    }
}
