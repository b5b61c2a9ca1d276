//! The command line's failures, as far as they need no ublk: each is one clear line on stderr, exit
//! status 1, and no change on disk.

#![expect(clippy::unwrap_used, reason = "a test's helpers are tests")]

#[path = "cli/files.rs"]
mod files;
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ublk-qcow2");

fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().expect("the program was built")
}

/// The one line on stderr of a command that has to fail with status 1 and print nothing else.
fn failure(output: &Output) -> String {
    let error = String::from_utf8(output.stderr.clone()).expect("messages are text");
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(output.stdout.is_empty(), "stdout is for the device's path alone");
    assert_eq!(error.lines().count(), 1, "one line: {error:?}");
    assert!(error.starts_with("ublk-qcow2: "), "{error}");
    error
}

fn has_ublk() -> bool {
    Path::new("/dev/ublk-control").exists()
}

/// An image folder, and what `add` says about a file in it that must stay as it is.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn refusal(&self, path: &Path, more: &[&str]) -> String {
        let before = self.contents();
        let name = path.to_str().unwrap();
        let error = failure(&run(&[&["add", "-f", name], more].concat()));
        assert_eq!(self.contents(), before, "nothing is written");
        assert!(error.contains(name), "the image is named: {error}");
        // Without its name, which may happen to contain what is looked for.
        error.replacen(name, "", 1)
    }

    fn contents(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let paths = fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().path());
        let mut all: Vec<_> =
            paths.map(|path| (path.clone(), fs::read(path).unwrap_or_default())).collect();
        all.sort();
        all
    }
}

/// Stores a number of `width` bytes as qcow2 does, most significant byte first.
fn put(bytes: &mut [u8], at: usize, value: u64, width: usize) {
    for (index, byte) in bytes[at..at + width].iter_mut().rev().enumerate() {
        *byte = u8::try_from(value >> (8 * index) & 0xff).unwrap();
    }
}

/// A valid, empty image of 64 MiB with clusters of 64 KiB: header, refcount table, one refcount
/// block, L1 table.
fn image() -> Vec<u8> {
    const CLUSTER: u64 = 65536;
    let mut bytes = vec![0; 4 * 65536];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    put(&mut bytes, 4, 3, 4); // version
    put(&mut bytes, 20, 16, 4); // cluster_bits
    put(&mut bytes, 24, 64 << 20, 8); // size
    put(&mut bytes, 36, 1, 4); // l1_size
    put(&mut bytes, 40, 3 * CLUSTER, 8); // l1_table_offset
    put(&mut bytes, 48, CLUSTER, 8); // refcount_table_offset
    put(&mut bytes, 56, 1, 4); // refcount_table_clusters
    put(&mut bytes, 96, 4, 4); // refcount_order
    put(&mut bytes, 100, 104, 4); // header_length
    put(&mut bytes, 65536, 2 * CLUSTER, 8);
    for cluster in 0..4 {
        put(&mut bytes, 2 * 65536 + 2 * cluster, 1, 2);
    }
    bytes
}

#[test]
fn what_is_not_a_qcow2_image_is_refused() {
    let folder = Folder::new();
    for (name, bytes) in [("empty", &b""[..]), ("text", b"hello\n"), ("raw", &[0; 100_000])] {
        let error = folder.refusal(&folder.file(name, bytes), &[]);
        assert!(error.contains("qcow2") || error.contains("truncated"), "{error}");
    }
}

#[test]
fn a_missing_file_a_folder_a_device_and_a_pipe_are_refused_by_their_kind() {
    let folder = Folder::new();
    let missing = folder.refusal(&folder.0.path().join("nope"), &[]);
    assert!(missing.contains("no such file"), "{missing}");
    let directory = folder.refusal(folder.0.path(), &[]);
    assert!(directory.contains("directory"), "{directory}");
    let directory = folder.refusal(folder.0.path(), &["--read-only"]);
    assert!(directory.contains("directory"), "{directory}");
    let device = folder.refusal(Path::new("/dev/null"), &[]);
    assert!(device.contains("character device"), "{device}");

    let pipe = folder.0.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let error = failure(&run(&["add", "-f", pipe.to_str().unwrap()]));
    assert!(error.contains("pipe"), "{error}");
}

#[test]
fn truncated_and_contradicting_images_name_what_is_wrong() {
    let folder = Folder::new();
    let whole = image();
    type Damage = fn(&mut Vec<u8>);
    let cases: [(&str, Damage, &str); 6] = [
        ("header", |bytes| bytes.truncate(60), "truncated"),
        ("tables", |bytes| bytes.truncate(70_000), "outside"),
        ("l1-offset", |bytes| put(bytes, 40, 1 << 40, 8), "outside"),
        ("refcount-offset", |bytes| put(bytes, 48, 1 << 40, 8), "outside"),
        ("l1-size", |bytes| put(bytes, 24, 1 << 50, 8), "l1_size"),
        ("version", |bytes| put(bytes, 4, 7, 4), "version"),
    ];
    for (name, damage, expected) in cases {
        let mut bytes = whole.clone();
        damage(&mut bytes);
        let error = folder.refusal(&folder.file(name, &bytes), &[]);
        assert!(error.contains(expected), "{name}: {error}");
    }
}

#[test]
fn features_that_are_not_served_are_named() {
    let folder = Folder::new();
    let cases: [(&str, usize, u64, usize, &str); 3] = [
        ("backing", 8, 0x1000_0000_0010, 8, "backing"),
        ("crypt", 32, 2, 4, "crypt"),
        ("unknown", 72, 1 << 40, 8, "bit 40"),
    ];
    for (name, at, value, width, expected) in cases {
        let mut bytes = image();
        put(&mut bytes, at, value, width);
        let error = folder.refusal(&folder.file(name, &bytes), &[]);
        assert!(error.to_lowercase().contains(expected), "{name}: {error}");
    }
}

#[test]
fn without_the_driver_a_good_image_is_refused_with_the_module_to_load() {
    if has_ublk() {
        support::skip("this machine has /dev/ublk-control");
        return;
    }
    let folder = Folder::new();
    let good = folder.file("good.qcow2", &image());
    for more in [&[][..], &["--foreground"], &["--read-only"], &["--buffered"]] {
        let error = folder.refusal(&good, more);
        assert!(error.contains("modprobe ublk_drv") && error.contains("CONFIG_BLK_DEV_UBLK"));
    }
    for arguments in
        [&["list"][..], &["features"], &["del", "-n", "0"], &["del", "-a"], &["stats", "-n", "0"]]
    {
        let error = failure(&run(arguments));
        assert!(error.contains("modprobe ublk_drv"), "{error}");
    }
}

#[test]
fn a_file_without_permission_is_refused_with_the_way_out() {
    let folder = Folder::new();
    let path = folder.file("good.qcow2", &image());
    let name = path.to_str().unwrap();
    let mode = |file: &Path, mode: &str| {
        assert!(Command::new("chmod").arg(mode).arg(file).status().unwrap().success());
    };
    mode(folder.0.path(), "0755");
    // Root may read anything: the program runs as another user.
    let is_root = fs::metadata("/proc/self").is_ok_and(|data| {
        use std::os::unix::fs::MetadataExt;
        data.uid() == 0
    });
    let as_user = || {
        if !is_root {
            return run(&["add", "-f", name]);
        }
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", PROGRAM]);
        command.args(["add", "-f", name]).output().expect("util-linux has setpriv")
    };
    mode(&path, "0600");
    if !is_root {
        mode(&path, "0000");
    }
    let output = as_user();
    if String::from_utf8_lossy(&output.stderr).contains("failed to execute") {
        support::skip(&format!("another user cannot reach {PROGRAM}"));
        return;
    }
    let error = failure(&output);
    assert!(error.contains("permission denied"), "{error}");
    mode(&path, "0444");
    let error = failure(&as_user());
    assert!(error.contains("--read-only"), "{error}");
}

#[test]
fn a_number_of_queues_that_makes_no_sense_is_refused() {
    let folder = Folder::new();
    let path = folder.file("good.qcow2", &image());
    for number in ["0", "65", "many"] {
        let output = run(&["add", "-f", path.to_str().unwrap(), "-q", number]);
        assert_eq!(output.status.code(), Some(2));
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains("--queues") && error.contains(number), "{error}");
    }
}

#[test]
fn an_image_that_another_program_has_locked_is_refused() {
    let folder = Folder::new();
    let path = folder.file("good.qcow2", &image());
    // What QEMU holds of an image that it writes: bytes 100 (consistent read) and 201 (no other
    // writer), each with a shared OFD lock.
    let holder = fs::File::options().read(true).write(true).open(&path).unwrap();
    hold(&holder, &[100, 201]);
    let error = folder.refusal(&path, &[]);
    assert!(error.contains("in use"), "{error}");
}

/// Takes shared OFD locks on these bytes.
fn hold(file: &fs::File, bytes: &[i64]) {
    for &byte in bytes {
        let lock = libc::flock {
            l_type: i16::try_from(libc::F_RDLCK).unwrap(),
            l_whence: 0,
            l_start: byte,
            l_len: 1,
            l_pid: 0,
        };
        nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    }
}

#[test]
fn wrong_options_end_with_a_usage_line() {
    for arguments in [
        &["add"][..],
        &["add", "-f", "x", "--block-size", "1024"],
        &["add", "-f", "x", "-d", "0"],
        &["add", "-f", "x", "-d", "4097"],
        &["add", "-f", "x", "--direct", "--buffered"],
        &["add", "-f", "x", "--l2-cache", "lots"],
        &["add", "-f", "x", "--discard", "maybe"],
        &["add", "-f", "x", "--lock", "maybe"],
        &["del"],
        &["del", "-n", "0", "-a"],
        &["stats"],
        &["stats", "-n", "many"],
        &["stats", "-n", "0", "--json", "--prometheus"],
        &["stats", "-n", "0", "--watch", "--json"],
        &["add", "-f", "x", "--log", "loud"],
        &["frobnicate"],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn the_help_has_units_and_examples() {
    let output = run(&["--help"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("ublk-qcow2 add -f vm.qcow2"));
    let output = run(&["add", "--help"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("512K"));
    let output = run(&["del", "--help"]);
    let help = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(help.contains("between is not seen"), "the race of old kernels is told: {help}");
    let output = run(&["stats", "--help"]);
    let help = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(help.contains("latency_limits_us"), "the fields of the JSON are told: {help}");
}
