//! Looking at an image that somebody else made costs nothing but a look: for every file of
//! `fixtures/`, `info`, `check` and `add` (as far as it comes without ublk) take at most 100 ms of
//! CPU, leave the file as it was, and open no other file, whatever names the image holds.
//!
//! The limit is for release builds; a debug build is given ten times as much. `tests/all` has a
//! release build looked at, by naming it in `RELEASE_PROGRAM`. What is opened is seen by strace
//! (`tests/setup tools` installs it).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// The program to look at, and how much CPU time it may take.
fn program() -> (PathBuf, Duration) {
    match env::var_os("RELEASE_PROGRAM") {
        Some(path) => (path.into(), Duration::from_millis(100)),
        None => {
            let limit = if cfg!(debug_assertions) { 1000 } else { 100 };
            (env!("CARGO_BIN_EXE_ublk-qcow2").into(), Duration::from_millis(limit))
        }
    }
}

/// The names that stand in fixtures, of files that exist here: a decoy for whoever follows them.
const DECOYS: [&str; 2] = ["backing.img", "data.img"];

/// Where the program itself, its libraries and its settings come from.
const SYSTEM: [&str; 6] = ["/dev/", "/etc/", "/lib", "/proc/", "/sys/", "/usr/"];

/// The CPU time of children is known of all together, so only one runs at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn cpu_of_children() -> Duration {
    // SAFETY: all zeros are a valid rusage, which is plain numbers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a whole rusage.
    assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) }, 0);
    let time = |time: libc::timeval| {
        let micros = time.tv_sec * 1_000_000 + time.tv_usec;
        Duration::from_micros(u64::try_from(micros).unwrap())
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// A copy of a fixture beside decoys.
struct Copy {
    folder: tempfile::TempDir,
    path: PathBuf,
    before: Vec<u8>,
}

impl Copy {
    fn of(fixture: &Path) -> Self {
        Self::with(fixture, fs::read(fixture).unwrap())
    }

    fn with(name: &Path, bytes: Vec<u8>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for decoy in DECOYS {
            fs::write(folder.path().join(decoy), [0; 65536]).unwrap();
        }
        let path = folder.path().join(name.file_name().unwrap());
        fs::write(&path, &bytes).unwrap();
        Self { folder, path, before: bytes }
    }

    /// The CPU time that a command takes.
    fn cpu(&self, command: &[&str]) -> Duration {
        let before = cpu_of_children();
        let output = Command::new(program().0).args(command).arg(&self.path).output().unwrap();
        assert!(output.status.code().is_some(), "{command:?} was killed: {output:?}");
        cpu_of_children() - before
    }

    /// The files that a command opens, without those of the system.
    fn opened(&self, command: &[&str]) -> Vec<PathBuf> {
        let log = tempfile::NamedTempFile::new().unwrap();
        let output: Output = Command::new("strace")
            .args(["-f", "-qq", "-y", "-e", "trace=open,openat,openat2,creat", "-o"])
            .arg(log.path())
            .arg(program().0)
            .args(command)
            .arg(&self.path)
            .output()
            .expect("strace is needed: tests/setup tools");
        let text = fs::read_to_string(log.path()).unwrap();
        assert!(text.contains("ld.so") || text.contains("libc.so"), "no trace: {output:?}");
        let mut found: Vec<_> = text.lines().filter_map(opened_by).collect();
        found.retain(|path| path.is_file() && !SYSTEM.iter().any(|own| path.starts_with_text(own)));
        found.sort();
        found.dedup();
        found
    }

    fn is_unchanged(&self) -> bool {
        let names = fs::read_dir(self.folder.path()).unwrap().count();
        fs::read(&self.path).unwrap() == self.before && names == DECOYS.len() + 1
    }

    fn modified(&self) -> std::time::SystemTime {
        fs::metadata(&self.path).unwrap().modified().unwrap()
    }
}

trait StartsWithText {
    fn starts_with_text(&self, text: &str) -> bool;
}

impl StartsWithText for PathBuf {
    fn starts_with_text(&self, text: &str) -> bool {
        self.to_str().is_some_and(|path| path.starts_with(text))
    }
}

/// The file that a line of strace tells of as opened: `… = 3</path>`.
fn opened_by(line: &str) -> Option<PathBuf> {
    let (_, result) = line.rsplit_once(" = ")?;
    let (number, path) = result.split_once('<')?;
    number.parse::<u32>().ok()?;
    Some(PathBuf::from(path.strip_suffix('>')?))
}

fn all() -> Vec<PathBuf> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let files = ["corrupt", "images"].into_iter().flat_map(|folder| {
        let entries = fs::read_dir(fixtures.join(folder)).unwrap();
        entries.map(|entry| entry.unwrap().path())
    });
    let mut files: Vec<_> = files.filter(|path| !path.ends_with("expected.tsv")).collect();
    files.sort();
    assert!(files.len() > 90, "only {} fixtures", files.len());
    files
}

const LOOKS: [&[&str]; 2] = [&["info", "-f"], &["check", "-f"]];
const ADDS: [&[&str]; 2] = [&["add", "-f"], &["add", "--read-only", "-f"]];

fn commands() -> Vec<&'static [&'static str]> {
    if Path::new("/dev/ublk-control").exists() {
        support::skip("this machine has ublk, where add would serve the fixtures");
        return LOOKS.to_vec();
    }
    [LOOKS, ADDS].concat()
}

#[test]
fn a_look_is_cheap_and_changes_nothing() {
    let _alone = alone();
    let (_, limit) = program();
    let mut wrong = Vec::new();
    let mut most = Duration::ZERO;
    for fixture in all() {
        let copy = Copy::of(&fixture);
        let modified = copy.modified();
        for command in commands() {
            let took = copy.cpu(command);
            most = most.max(took);
            let name = copy.path.file_name().unwrap().display();
            if took > limit {
                wrong.push(format!("{command:?} {name}: {took:?} of CPU"));
            }
            if !copy.is_unchanged() || copy.modified() != modified {
                wrong.push(format!("{command:?} {name}: something has changed"));
            }
        }
    }
    println!("at most {most:?} of CPU");
    assert!(wrong.is_empty(), "limit {limit:?}:\n{}", wrong.join("\n"));
}

#[test]
fn a_look_opens_no_other_file() {
    let _alone = alone();
    let mut wrong = Vec::new();
    for fixture in all() {
        let copy = Copy::of(&fixture);
        let name = fixture.file_name().unwrap().to_str().unwrap();
        for command in commands() {
            let mut allowed = vec![copy.path.clone()];
            if command[0] == "add" && name.starts_with("backing-file") {
                // It lies beside the image, so it may be opened.
                allowed.push(copy.folder.path().join("backing.img"));
            }
            let opened = copy.opened(command);
            if !opened.contains(&copy.path) {
                wrong.push(format!("{command:?} {name}: not even the image, but {opened:?}"));
            }
            let others: Vec<_> = opened.iter().filter(|path| !allowed.contains(path)).collect();
            if !others.is_empty() {
                wrong.push(format!("{command:?} {name}: opens {others:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// A name that leads out of the image's folder opens nothing until an option allows it.
#[test]
fn a_backing_file_elsewhere_is_opened_only_with_permission() {
    let _alone = alone();
    let elsewhere = tempfile::tempdir().unwrap();
    let target = elsewhere.path().join("base.raw");
    fs::write(&target, [0; 65536]).unwrap();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/corrupt");
    let fixture = fixtures.join("backing-file-raw.qcow2");
    let mut bytes = fs::read(&fixture).unwrap();
    let offset = u64::from_be_bytes(bytes[8..16].try_into().unwrap());
    let (start, name) = (usize::try_from(offset).unwrap(), target.to_str().unwrap());
    bytes[start..start + name.len()].copy_from_slice(name.as_bytes());
    bytes[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
    let copy = Copy::with(&fixture, bytes);
    for command in commands() {
        assert_eq!(copy.opened(command), std::slice::from_ref(&copy.path), "{command:?}");
    }
    if Path::new("/dev/ublk-control").exists() {
        return;
    }
    // The other way round: the trace would have shown it.
    let folder = elsewhere.path().to_str().unwrap();
    let opened = copy.opened(&["add", "--allow-backing", folder, "-f"]);
    assert!(opened.contains(&target), "{opened:?}");
}
