//! `check` and `info` from the command line: exit statuses, what is printed, and that their JSON
//! says what `qemu-img`'s does.

#![expect(clippy::unwrap_used, reason = "a test's helpers are tests")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Map, Value};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ublk-qcow2");

fn fixtures(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(folder)
}

/// A folder with images, in which commands run.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    /// A folder with a copy of each fixture, and their names.
    fn of_fixtures() -> (Self, Vec<String>) {
        let folder = Self::new();
        let mut names = Vec::new();
        for from in ["images", "corrupt"] {
            for entry in fs::read_dir(fixtures(from)).unwrap() {
                let entry = entry.unwrap();
                let name = entry.file_name().into_string().unwrap();
                if !name.ends_with(".tsv") {
                    fs::copy(entry.path(), folder.path(&name)).unwrap();
                    names.push(name);
                }
            }
        }
        names.sort();
        assert!(names.len() > 60);
        (folder, names)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.0.path());
        command.output().unwrap_or_else(|error| panic!("{program}: {error}"))
    }

    fn ours(&self, arguments: &[&str]) -> Output {
        self.run(PROGRAM, arguments)
    }

    /// An image of `qemu-img create -o OPTIONS`, with something written to it.
    fn image(&self, name: &str, options: &str) -> PathBuf {
        let create = ["create", "-q", "-f", "qcow2", "-o", options, name, "1M"];
        assert!(self.run("qemu-img", &create).status.success());
        let write = ["-f", "qcow2", "-c", "write -P 7 0 100k", name];
        assert!(self.run("qemu-io", &write).status.success());
        self.path(name)
    }

    /// Runs `check` with these options, and expects a status and parts of what is printed.
    fn check(&self, name: &str, options: &[&str], status: i32, parts: &[&str]) -> String {
        let output = self.ours(&[&["check", "-f", name], options].concat());
        let (out, error) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(status), "{name} {options:?}: {out}{error}");
        let shown = if matches!(status, 1 | 63) { &error } else { &out };
        for part in parts {
            assert!(shown.contains(part), "{name} {options:?}: {part:?} is missing in: {shown}");
        }
        if matches!(status, 1 | 63) {
            assert!(out.is_empty() && error.lines().count() == 1, "{name}: {out}{error}");
        } else {
            assert!(error.is_empty(), "{name}: no progress bar where there is no terminal");
        }
        out
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The refcount of a cluster, in an image with the first refcount block at cluster 2 and 16 bits.
fn set_refcount(path: &Path, cluster_size: usize, cluster: usize, count: u8) {
    let mut bytes = fs::read(path).unwrap();
    bytes[2 * cluster_size + cluster * 2 + 1] = count;
    fs::write(path, bytes).unwrap();
}

#[test]
fn the_exit_status_is_that_of_qemu_img() {
    let (folder, _) = Folder::of_fixtures();
    folder.check("v3-512.qcow2", &[], 0, &["v3-512.qcow2: no errors", "clusters allocated"]);
    let leaky = folder.image("leaky", "cluster_size=4k");
    set_refcount(&leaky, 4096, 4, 2);
    set_refcount(&leaky, 4096, 200, 1);
    let next = "repair with 'ublk-qcow2 check -f leaky --repair all'";
    folder.check("leaky", &[], 2, &["COPIED", "leaky: 1 corruption and 1 leaked cluster", next]);
    let spare = folder.image("spare", "cluster_size=4k");
    let len = fs::metadata(&spare).unwrap().len();
    fs::File::options().write(true).open(&spare).unwrap().set_len(len + 4096).unwrap();
    set_refcount(&spare, 4096, usize::try_from(len / 4096).unwrap(), 1);
    folder.check("spare", &[], 3, &["1 leaked cluster", "--repair leaks'"]);
    folder.check("l2-entry-reserved.qcow2", &[], 2, &["reserved bits", "1 corruption"]);
    for (name, status, part) in [
        ("text.txt", 1, "not a qcow2 image"),
        ("missing.qcow2", 1, "no such file"),
        (".", 1, "is a directory"),
        ("cluster-bits-22.qcow2", 1, "cluster_bits"),
        ("version-1.qcow2", 63, "version 1"),
        ("incompatible-5.qcow2", 63, "bit 5"),
        ("incompatible-named.qcow2", 63, "\"dirty bit\""),
    ] {
        folder.check(name, &[], status, &[name, part]);
        let before = fs::read(folder.path(name)).unwrap_or_default();
        folder.check(name, &["--repair", "all"], status, &[name, part]);
        assert_eq!(fs::read(folder.path(name)).unwrap_or_default(), before);
    }
    for options in [&["check"][..], &["check", "-f", "x", "--repair", "some"]] {
        let output = folder.ours(options);
        assert_eq!(output.status.code(), Some(1), "2 would mean that it is corrupt");
        assert!(output.stdout.is_empty() && text(&output.stderr).contains("--help"));
    }
}

#[test]
fn a_check_changes_nothing_and_a_repair_what_it_has_to() {
    let folder = Folder::new();
    let path = folder.image("image", "cluster_size=4k");
    set_refcount(&path, 4096, 5, 0);
    set_refcount(&path, 4096, 6, 3);
    let before = (folder.bytes("image"), fs::metadata(&path).unwrap().mtime_nsec());
    folder.check("image", &[], 2, &[]);
    assert_eq!((folder.bytes("image"), fs::metadata(&path).unwrap().mtime_nsec()), before);

    let out = folder.check("image", &["--repair", "leaks"], 2, &["repaired: 1 corruption and 1 l"]);
    assert!(out.contains("--repair all"), "{out}");
    let parts = ["repaired: 2 corruptions and 0 leaks", "image: no errors"];
    folder.check("image", &["--repair", "all"], 0, &parts);
    assert!(folder.run("qemu-img", &["check", "image"]).status.success());
    let read = folder.run("qemu-io", &["-f", "qcow2", "-c", "read -P 7 0 100k", "image"]);
    assert!(read.status.success() && !text(&read.stdout).contains("failed"));
    // Nothing to do: nothing is said of it.
    let out = folder.check("image", &["--repair", "all"], 0, &[]);
    assert_eq!(out.lines().count(), 1, "{out}");
}

#[test]
fn a_repair_leaves_what_it_would_have_to_guess() {
    let (folder, _) = Folder::of_fixtures();
    let name = "l2-entry-outside.qcow2";
    let out = folder.check(name, &["--repair", "all"], 2, &["over the end", "copy what can be"]);
    assert!(out.contains("qemu-img convert"), "{out}");
    let before = folder.bytes("encrypted-aes.qcow2");
    folder.check("encrypted-aes.qcow2", &["--repair", "all"], 63, &["an encrypted image is not"]);
    assert_eq!(folder.bytes("encrypted-aes.qcow2"), before);
}

#[test]
fn new_refcount_tables_are_made_where_there_are_none() {
    let (folder, _) = Folder::of_fixtures();
    for name in [
        "refcount-table-outside.qcow2",
        "refcount-table-at-zero.qcow2",
        "refcount-table-truncated.qcow2",
        "refcount-table-unaligned.qcow2",
        "refcount-table-empty.qcow2",
        "refcount-table-too-large.qcow2",
        "refcount-table-entry-reserved.qcow2",
        "refcount-table-entry-outside.qcow2",
        "refcount-table-entry-in-l1.qcow2",
    ] {
        folder.check(name, &["--repair", "all"], 0, &["repaired: ", "with new refcount tables"]);
        assert!(folder.run("qemu-img", &["check", name]).status.success(), "{name}");
    }
}

#[test]
fn somebody_elses_image_is_left_alone() {
    let folder = Folder::new();
    let path = folder.image("image", "cluster_size=4k");
    set_refcount(&path, 4096, 5, 0);
    let holder = fs::File::options().read(true).write(true).open(&path).unwrap();
    // What QEMU holds of an image that it writes: bytes 100 (consistent read) and 201 (no other
    // writer); of one that it reads: 100, and 201 as well.
    let lock = |byte, kind| {
        let lock = libc::flock {
            l_type: i16::try_from(kind).unwrap(),
            l_whence: 0,
            l_start: byte,
            l_len: 1,
            l_pid: 0,
        };
        nix::fcntl::fcntl(&holder, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    };
    let before = folder.bytes("image");
    for byte in [100, 201] {
        lock(byte, libc::F_RDLCK);
    }
    // A reader: a check may read, too; a repair may not write.
    folder.check("image", &[], 2, &[]);
    folder.check("image", &["--repair", "all"], 1, &["in use"]);
    lock(101, libc::F_RDLCK);
    folder.check("image", &[], 1, &["in use"]);
    folder.check("image", &["--repair", "leaks"], 1, &["in use"]);
    assert!(folder.ours(&["info", "-f", "image"]).status.success(), "info takes no lock");
    for policy in ["on", "auto"] {
        folder.check("image", &["--lock", policy], 1, &["in use"]);
    }
    assert_eq!(folder.bytes("image"), before);
    // Who says so may, as with add.
    folder.check("image", &["--lock", "off"], 2, &["2 corruptions"]);
    folder.check("image", &["--lock", "off", "--repair", "all"], 0, &["repaired: "]);
}

fn json(output: &Output) -> Option<Map<String, Value>> {
    serde_json::from_slice::<Value>(&output.stdout).ok()?.as_object().cloned()
}

/// What `qemu-img check` does not open and `check` judges. It opens backing and data files, and
/// wants a key, while `check` opens nothing but the image; and where a table is wrong, `check` says
/// so and goes on with the rest.
const JUDGED_HERE_ALONE: [&str; 11] = [
    "backing-file-raw.qcow2",
    "backing-file.qcow2",
    "bitmap-directory-outside.qcow2",
    "bitmap-name-too-long.qcow2",
    "bitmap-table-too-large.qcow2",
    "data-file-raw.qcow2",
    "data-file.qcow2",
    "encrypted-aes.qcow2",
    "encrypted-luks.qcow2",
    "l1-end-wraps.qcow2",
    "snapshot-extra-too-large.qcow2",
];

#[test]
fn the_json_of_check_is_that_of_qemu_img() {
    let (folder, names) = Folder::of_fixtures();
    // What they name.
    fs::write(folder.path("backing.img"), vec![0; 1 << 16]).unwrap();
    fs::write(folder.path("data.img"), vec![0; 1 << 16]).unwrap();
    let (mut equal, mut unopened) = (0, 0);
    for name in names {
        // QEMU reads behind the end of a file as zeros, also in a header.
        if name == "truncated-header-v2.qcow2" {
            folder.check(&name, &[], 1, &["the header is cut short"]);
            continue;
        }
        let theirs = folder.run("qemu-img", &["check", "-f", "qcow2", "--output=json", &name]);
        let ours = folder.ours(&["check", "-f", &name, "--output", "json"]);
        let (status, expected) = (ours.status.code(), theirs.status.code());
        let (theirs, mut ours) = match (json(&theirs), json(&ours)) {
            (Some(theirs), Some(ours)) => (theirs, ours),
            (theirs, ours) => {
                assert_eq!((theirs.is_none(), expected), (true, Some(1)), "{name}");
                assert_eq!(ours.is_none(), matches!(status, Some(1 | 63)), "{name}");
                assert_eq!(ours.is_some(), JUDGED_HERE_ALONE.contains(&&*name), "{name}");
                unopened += 1;
                continue;
            }
        };
        let findings = ours.remove("findings");
        assert_eq!(findings.is_some(), status != Some(0), "{name}");
        // What it does not count; see the list at the head of qcow2/src/check.rs.
        if findings.is_some_and(|findings| {
            let extra = ["Overlap", "CopiedWithoutOffset", "ZeroFlag", "BeginsBeyondEnd"];
            findings
                .as_array()
                .unwrap()
                .iter()
                .any(|f| extra.contains(&f["kind"].as_str().unwrap()))
        }) {
            continue;
        }
        assert_eq!((status, ours), (expected, theirs), "{name}");
        equal += 1;
    }
    assert!(equal > 45 && unopened > 35, "only {equal}, and {unopened} that QEMU does not open");
}

#[test]
fn the_json_of_a_repair_has_what_was_fixed() {
    let folder = Folder::new();
    let path = folder.image("image", "cluster_size=4k");
    set_refcount(&path, 4096, 5, 0);
    let output = folder.ours(&["check", "-f", "image", "--repair", "all", "--output", "json"]);
    let ours = json(&output).unwrap();
    assert_eq!(ours["corruptions-fixed"], 2, "{ours:?}");
    assert!(!ours.contains_key("corruptions") && !ours.contains_key("leaks-fixed"), "{ours:?}");
}

/// Compares `info` with `qemu-img info`, but for what only one of them says.
fn same_info(folder: &Folder, name: &str) -> bool {
    let theirs = folder.run("qemu-img", &["info", "-f", "qcow2", "--output=json", name]);
    let ours = folder.ours(&["info", "-f", name, "--output", "json"]);
    let (Some(mut theirs), Some(mut ours)) = (json(&theirs), json(&ours)) else { return false };
    ours.remove("features");
    ours.remove("stale-bitmaps");
    for json in [&mut ours, &mut theirs] {
        // Of encryption, only the method is ours.
        if let Some(encrypt) = json["format-specific"]["data"].get_mut("encrypt") {
            *encrypt = encrypt["format"].clone();
        }
    }
    assert_eq!(ours, theirs, "{name}");
    true
}

#[test]
fn the_json_of_info_is_that_of_qemu_img() {
    let (folder, names) = Folder::of_fixtures();
    fs::write(folder.path("data.img"), vec![0; 1 << 16]).unwrap();
    let equal = names.iter().filter(|name| same_info(&folder, name)).count();
    assert!(equal > 45, "only {equal}");

    fs::create_dir(folder.path("below")).unwrap();
    fs::write(folder.path("base.raw"), vec![0; 1 << 20]).unwrap();
    let over = "backing_file=../base.raw,backing_fmt=raw,lazy_refcounts=on";
    folder.image("below/over", over);
    folder.image("zstd", "compression_type=zstd,extended_l2=on,refcount_bits=64");
    for step in [
        &["snapshot", "-c", "first one", "zstd"][..],
        &["bitmap", "--add", "-g", "64k", "zstd", "b0"],
        &["bitmap", "--add", "--disable", "zstd", "b1"],
        &["snapshot", "-c", "second", "zstd"],
    ] {
        assert!(folder.run("qemu-img", step).status.success(), "{step:?}");
    }
    assert!(same_info(&folder, "below/over") && same_info(&folder, "zstd"));
    let ours = json(&folder.ours(&["info", "-f", "zstd", "--output", "json"])).unwrap();
    assert_eq!(ours["features"]["incompatible"][0]["name"], "compression type", "{ours:?}");
}

#[test]
fn info_tells_of_every_image_or_why_not_in_one_line() {
    let (folder, names) = Folder::of_fixtures();
    let mut told = 0;
    for name in &names {
        let output = folder.ours(&["info", "-f", name]);
        let (out, error) = (text(&output.stdout), text(&output.stderr));
        let harmless = |text: &str| text.chars().all(|char| char == '\n' || !char.is_control());
        assert!(harmless(&out) && harmless(&error), "{name}: {out:?} {error:?}");
        match output.status.code() {
            Some(0) => {
                assert!(out.contains("virtual size: ") && error.is_empty(), "{name}: {out}");
                told += 1;
            }
            Some(1) => assert!(out.is_empty() && error.lines().count() == 1, "{name}: {error}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    assert!(told > 55, "only {told} of {}", names.len());
    for (name, part) in [
        ("snapshot.qcow2", "snapshot: 1, first, 20"),
        ("bitmap.qcow2", "bitmap: "),
        ("data-file-raw.qcow2", "data file: data.img (raw)"),
        ("backing-file-raw.qcow2", "backing format: raw"),
        ("encrypted-luks.qcow2", "encryption: luks"),
        ("incompatible-5.qcow2", "unnamed (bit 5, not known here)"),
        ("dirty.qcow2", "incompatible feature: dirty"),
    ] {
        let out = text(&folder.ours(&["info", "-f", name]).stdout);
        assert!(out.contains(part), "{name}: {out}");
    }
}

/// A pipe that nobody writes to would hold up whoever opens it.
#[test]
fn info_opens_nothing_but_the_image() {
    let folder = Folder::new();
    folder.image("image", "cluster_size=4k");
    assert!(folder.run("mkfifo", &["pipe"]).status.success());
    let rebase = ["rebase", "-u", "-b", "pipe", "-F", "qcow2", "image"];
    assert!(folder.run("qemu-img", &rebase).status.success());
    let output = folder.run("timeout", &["20", PROGRAM, "info", "-f", "image"]);
    assert!(text(&output.stdout).contains("backing file: pipe"));
    let output = folder.run("timeout", &["20", PROGRAM, "check", "-f", "image"]);
    assert_eq!(output.status.code(), Some(0), "a check needs no backing file");
    let output = folder.run("timeout", &["20", PROGRAM, "info", "-f", "pipe"]);
    assert!(text(&output.stderr).contains("is a pipe"));
}

#[test]
fn the_help_has_the_exit_statuses() {
    let folder = Folder::new();
    let help = text(&folder.ours(&["check", "--help"]).stdout);
    for part in ["\n  0 ", "\n  1 ", "\n  2 ", "\n  3 ", "\n  63 ", "leaks, all", "human, json"] {
        assert!(help.contains(part), "{part:?} in {help}");
    }
    let help = text(&folder.ours(&["info", "--help"]).stdout);
    assert!(help.contains("nothing but the image"), "{help}");
    assert!(text(&folder.ours(&["--help"]).stdout).contains("check -f vm.qcow2"));
}
