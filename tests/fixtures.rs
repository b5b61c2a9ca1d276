//! Goes through the tables of `fixtures/` with the command line: what is refused, is refused with
//! one line that says what and where; what is served, gets as far as `/dev/ublk-control`.
//!
//! That what is served reads right, and what cannot be read ends with EIO, is tested in the VM
//! (`tests/guest/wrong-input.sh`), since it takes a kernel with ublk.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// One line of `corrupt/expected.tsv`.
struct Expected {
    file: String,
    verdict: String,
    field: String,
    phrase: String,
}

fn fixtures(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(folder)
}

fn lines(folder: &str) -> Vec<Vec<String>> {
    let table = fs::read_to_string(fixtures(folder).join("expected.tsv")).unwrap();
    let lines = table.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}

fn corrupt() -> Vec<Expected> {
    let lines = lines("corrupt").into_iter();
    let expected = lines.map(|line| {
        let mut columns = line.into_iter();
        let mut next = || columns.next().unwrap_or_default();
        Expected { file: next(), verdict: next(), field: next(), phrase: next() }
    });
    expected.collect()
}

/// Runs `add` on a copy of the image, which must be the same afterwards.
fn add(path: &Path) -> Output {
    add_with(path, &[])
}

fn add_with(path: &Path, options: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join(path.file_name().unwrap());
    fs::copy(path, &copy).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_ublk-qcow2"))
        .args(["add", "-f"])
        .arg(&copy)
        .args(options)
        .output()
        .unwrap();
    assert!(fs::read(path).unwrap() == fs::read(&copy).unwrap(), "{} was changed", path.display());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "{}", path.display());
    output
}

/// What is wrong with how `add` failed, if anything: it has to name the file, and the parts.
fn complaint(output: &Output, file: &str, parts: &[&str]) -> Option<String> {
    let error = String::from_utf8_lossy(&output.stderr);
    // Without the file's name, which may happen to contain a part.
    let reason = error.replacen(file, "", 1);
    let mut missing: Vec<_> = parts.iter().filter(|part| !reason.contains(**part)).collect();
    if !error.contains(file) {
        missing.push(&"the file's name");
    }
    let plain = error.chars().all(|character| character == '\n' || !character.is_control());
    let right = output.status.code() == Some(1)
        && output.stdout.is_empty()
        && error.lines().count() == 1
        && plain
        && missing.is_empty();
    (!right).then(|| format!("{}, missing {missing:?} in: {error}", output.status))
}

#[test]
fn each_file_has_its_verdict() {
    for folder in ["corrupt", "images"] {
        let mut listed: Vec<_> = lines(folder).into_iter().map(|mut line| line.remove(0)).collect();
        let names = fs::read_dir(fixtures(folder)).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut present: Vec<_> = names.filter(|name| name != "expected.tsv").collect();
        listed.sort();
        present.sort();
        assert_eq!(listed, present, "fixtures/{folder}/expected.tsv and the files beside it");
    }
}

#[test]
fn what_is_refused_is_named_in_one_line() {
    let mut complaints = Vec::new();
    for Expected { file, field, phrase, .. } in corrupt().iter().filter(|e| e.verdict == "refuse") {
        let output = add(&fixtures("corrupt").join(file));
        let wrong = complaint(&output, file, &[field, phrase]);
        complaints.extend(wrong.map(|wrong| format!("{file}: {wrong}")));
    }
    assert!(complaints.is_empty(), "{} wrong:\n{}", complaints.len(), complaints.join("\n"));
}

/// Where only refcounts are bad, what is there can be read.
#[test]
fn what_has_bad_refcounts_is_served_for_reading() {
    if Path::new("/dev/ublk-control").exists() {
        support::skip("this machine has ublk, where these would be served");
        return;
    }
    let all = corrupt().into_iter().map(|expected| expected.file);
    let names: Vec<_> = all.filter(|name| name.starts_with("refcount-table-entry-")).collect();
    assert_eq!(names.len(), 3);
    for name in names {
        let path = fixtures("corrupt").join(name);
        let wrong =
            complaint(&add_with(&path, &["--read-only"]), "", &["/dev/ublk-control", "ublk_drv"]);
        assert_eq!(wrong, None, "{}", path.display());
    }
}

#[test]
fn what_is_served_only_lacks_the_kernel() {
    if Path::new("/dev/ublk-control").exists() {
        support::skip("this machine has ublk; tests/guest/wrong-input.sh does this there");
        return;
    }
    let served = corrupt().into_iter().filter(|e| e.verdict != "refuse");
    let served = served.map(|expected| fixtures("corrupt").join(expected.file));
    let valid = lines("images").into_iter().map(|line| fixtures("images").join(&line[0]));
    let mut complaints = Vec::new();
    for path in served.chain(valid) {
        // This error is about the machine, so it names no image.
        let wrong = complaint(&add(&path), "", &["/dev/ublk-control", "ublk_drv"]);
        complaints.extend(wrong.map(|wrong| format!("{}: {wrong}", path.display())));
    }
    assert!(complaints.is_empty(), "{} wrong:\n{}", complaints.len(), complaints.join("\n"));
}
