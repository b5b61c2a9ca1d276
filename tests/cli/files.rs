//! The other files of an image: which ones are opened, and what is said of those that are not.

use std::fs;
use std::path::Path;

use super::{Folder, failure, has_ublk, image, put, run, support};

/// An image with the name of a file beneath it, and its format if that is to be declared.
fn over(name: &str, format: Option<&str>) -> Vec<u8> {
    let mut bytes = image();
    put(&mut bytes, 8, 0x200, 8); // backing_file_offset
    put(&mut bytes, 16, name.len() as u64, 4); // backing_file_size
    bytes[0x200..0x200 + name.len()].copy_from_slice(name.as_bytes());
    if let Some(format) = format {
        put(&mut bytes, 104, 0xe279_2aca, 4);
        put(&mut bytes, 108, format.len() as u64, 4);
        bytes[112..112 + format.len()].copy_from_slice(format.as_bytes());
    }
    bytes
}

/// An image with an external data file of this name.
fn with_data_file(name: &str) -> Vec<u8> {
    let mut bytes = image();
    put(&mut bytes, 72, 4, 8); // incompatible_features
    put(&mut bytes, 104, 0x4441_5441, 4);
    put(&mut bytes, 108, name.len() as u64, 4);
    bytes[112..112 + name.len()].copy_from_slice(name.as_bytes());
    bytes
}

/// An image with two snapshots of an empty disk: 1 "before" and 2 "after".
fn with_snapshots() -> Vec<u8> {
    let mut bytes = image();
    bytes.resize(7 << 16, 0);
    put(&mut bytes, 60, 2, 4); // nb_snapshots
    put(&mut bytes, 64, 4 << 16, 8); // snapshots_offset
    for (index, (id, name)) in [("1", "before"), ("2", "after")].into_iter().enumerate() {
        let at = (4 << 16) + index * 48;
        put(&mut bytes, at, (5 + index as u64) << 16, 8); // l1_table_offset
        put(&mut bytes, at + 8, 1, 4); // l1_size
        put(&mut bytes, at + 12, 1, 2);
        put(&mut bytes, at + 14, name.len() as u64, 2);
        let text = format!("{id}{name}");
        bytes[at + 40..at + 40 + text.len()].copy_from_slice(text.as_bytes());
    }
    for cluster in 4..7 {
        put(&mut bytes, 2 * 65536 + 2 * cluster, 1, 2);
    }
    bytes
}

impl Folder {
    /// The image is fine, and only the kernel's driver is missing.
    fn served(&self, path: &Path, more: &[&str]) {
        if has_ublk() {
            let path = path.display();
            support::skip(&format!(
                "a device would come of {path} {more:?}: tests/guest does this"
            ));
            return;
        }
        let error = self.refusal(path, more);
        assert!(error.contains("modprobe ublk_drv"), "{more:?}: {error}");
    }

    fn path(&self) -> &str {
        self.0.path().to_str().expect("temporary folders have plain names")
    }
}

#[test]
fn a_chain_is_served_down_to_sixteen_files() {
    let folder = Folder::new();
    folder.file("16.raw", &[1; 1000]);
    let mut above = "16.raw".to_string();
    for number in (0..16).rev() {
        let format = if above.ends_with("raw") { "raw" } else { "qcow2" };
        let name = format!("{number}.qcow2");
        folder.file(&name, &over(&above, Some(format)));
        above = name;
    }
    let path = folder.0.path().join("0.qcow2");
    folder.served(&path, &[]);
    folder.served(&path, &["--read-only"]);
    let deeper = folder.file("deeper.qcow2", &over("0.qcow2", Some("qcow2")));
    let error = folder.refusal(&deeper, &[]);
    assert!(error.contains("more than 16") && error.contains("qemu-img convert"), "{error}");
}

#[test]
fn loops_are_refused() {
    let folder = Folder::new();
    let one = folder.file("one.qcow2", &over("two.qcow2", Some("qcow2")));
    folder.file("two.qcow2", &over("three.qcow2", Some("qcow2")));
    folder.file("three.qcow2", &over("two.qcow2", Some("qcow2")));
    let own = folder.file("own.qcow2", &over("./own.qcow2", Some("raw")));
    for path in [one, own] {
        let error = folder.refusal(&path, &[]);
        assert!(error.contains("loop"), "{error}");
    }
}

#[test]
fn an_undeclared_format_is_refused_with_the_line_that_declares_it() {
    let folder = Folder::new();
    folder.file("base file.raw", &[0; 512]);
    let path = folder.file("top.qcow2", &over("base file.raw", None));
    let error = failure(&run(&["add", "-f", path.to_str().unwrap()]));
    let line = format!("'qemu-img rebase -u -b 'base file.raw' -F FORMAT {}'", path.display());
    assert!(error.contains(&line), "{error}");

    // The same further down: there it is the file beneath that has to declare it.
    let above = folder.file("above.qcow2", &over("top.qcow2", Some("qcow2")));
    let error = folder.refusal(&above, &[]);
    assert!(error.contains(&line), "{error}");

    let path = folder.file("vmdk.qcow2", &over("base file.raw", Some("vmdk")));
    let error = folder.refusal(&path, &[]);
    assert!(error.contains("\"vmdk\"") && error.contains("qemu-img convert"), "{error}");
}

#[test]
fn a_file_elsewhere_is_refused_with_the_option_that_allows_it() {
    let (folder, other) = (Folder::new(), Folder::new());
    let base = other.file("base.raw", &[3; 4096]);
    let absolute = base.to_str().unwrap();
    let name = other.0.path().file_name().and_then(|name| name.to_str()).unwrap();
    let relative = format!("../{name}/base.raw");
    std::os::unix::fs::symlink(&base, folder.0.path().join("link.raw")).unwrap();
    let option = format!("--allow-backing {}", other.path());
    for (top, backing) in
        [("absolute", absolute), ("relative", &relative), ("symbolic", "link.raw")]
    {
        let path = folder.file(top, &over(backing, Some("raw")));
        let error = folder.refusal(&path, &[]);
        assert!(error.contains(&option) && error.contains("own folder"), "{top}: {error}");
        folder.served(&path, &["--allow-backing", other.path()]);
        folder.served(&path, &["--allow-backing", "/usr", "--allow-backing", other.path()]);
        if top != "symbolic" {
            folder.served(&path, &["--allow-backing", absolute]);
        }
    }
    let path = folder.file("climbs", &over("x/../../../etc/hostname", Some("raw")));
    fs::create_dir(folder.0.path().join("x")).unwrap();
    let error = folder.refusal(&path, &[]);
    assert!(error.contains("own folder") && error.contains("qemu-img rebase -u"), "{error}");
    let error = folder.refusal(&path, &["--allow-backing", "/nowhere/at/all"]);
    assert!(error.contains("--allow-backing /nowhere/at/all"), "{error}");
}

#[test]
fn each_file_is_relative_to_the_folder_of_the_one_above_it() {
    let folder = Folder::new();
    fs::create_dir(folder.0.path().join("sub")).unwrap();
    folder.file("base.raw", &[0; 512]);
    folder.file("sub/middle.qcow2", &over("../base.raw", Some("raw")));
    let path = folder.file("top.qcow2", &over("sub/middle.qcow2", Some("qcow2")));
    folder.served(&path, &[]);
    // From inside, what lies beside the folder is elsewhere.
    let error = folder.refusal(&folder.0.path().join("sub/middle.qcow2"), &[]);
    assert!(error.contains(&format!("--allow-backing {}", folder.path())), "{error}");
}

#[test]
fn names_with_protocols_are_refused() {
    let folder = Folder::new();
    folder.file("file:base.raw", &[0; 512]);
    for name in ["json:{\"file\":\"x\"}", "nbd://localhost", "file:base.raw"] {
        let path = folder.file("top.qcow2", &over(name, Some("raw")));
        let error = folder.refusal(&path, &[]);
        assert!(error.contains("protocol") && error.contains("rebase -u"), "{error}");
    }
    let path = folder.file("top.qcow2", &over("/dev/fd/0", Some("raw")));
    let error = folder.refusal(&path, &[]);
    assert!(error.contains("own folder"), "{error}");
    // For QEMU a colon behind a slash is one.
    let path = folder.file("top.qcow2", &over("./file:base.raw", Some("raw")));
    folder.served(&path, &[]);
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let folder = Folder::new();
    fs::create_dir(folder.0.path().join("folder")).unwrap();
    for name in ["folder", "."] {
        let path = folder.file("top.qcow2", &over(name, Some("raw")));
        let error = folder.refusal(&path, &[]);
        assert!(error.contains("not a regular file"), "{error}");
    }
    let path = folder.file("top.qcow2", &over("/dev/zero", Some("raw")));
    let error = folder.refusal(&path, &[]);
    assert!(error.contains("--allow-backing /dev/zero allows"), "{error}");
    let error = folder.refusal(&path, &["--allow-backing", "/dev"]);
    assert!(error.contains("not a regular file"), "{error}");
    let error = folder.refusal(&path, &["--allow-backing", "/dev/zero"]);
    assert!(error.contains("nor a block device"), "{error}");
    // A file that is said to be an image and is none.
    folder.file("text", b"hello");
    let path = folder.file("top.qcow2", &over("text", Some("qcow2")));
    let error = folder.refusal(&path, &[]);
    assert!(error.contains("\"text\"") && error.contains("not a qcow2 image"), "{error}");
}

#[test]
fn a_data_file_is_only_the_one_on_the_command_line() {
    let folder = Folder::new();
    let data = folder.file("data.raw", &[0; 65536]);
    let data = data.to_str().unwrap();
    let path = folder.file("top.qcow2", &with_data_file("data.raw"));
    for more in [&[][..], &["--read-only"]] {
        let error = folder.refusal(&path, more);
        assert!(error.contains("\"data.raw\"") && error.contains("--data-file PATH"), "{error}");
    }
    folder.served(&path, &["--data-file", data]);
    folder.served(&path, &["--data-file", data, "--read-only"]);
    let missing = folder.0.path().join("missing").display().to_string();
    let error = folder.refusal(&path, &["--data-file", &missing]);
    assert!(error.contains("missing: no such file"), "{error}");
    let error = folder.refusal(&path, &["--data-file", path.to_str().unwrap(), "--lock", "off"]);
    assert!(error.contains("is the image itself"), "{error}");

    let plain = folder.file("plain.qcow2", &image());
    let error = folder.refusal(&plain, &["--data-file", data]);
    assert!(error.contains("leave --data-file out"), "{error}");

    let above = folder.file("above.qcow2", &over("top.qcow2", Some("qcow2")));
    let error = folder.refusal(&above, &[]);
    assert!(error.contains("\"top.qcow2\"") && error.contains("qemu-img convert"), "{error}");
}

#[test]
fn a_snapshot_is_served_for_reading_by_its_id_or_name() {
    let folder = Folder::new();
    let path = folder.file("top.qcow2", &with_snapshots());
    folder.served(&path, &[]);
    for wanted in ["1", "2", "before", "after"] {
        folder.served(&path, &["--read-only", "--snapshot", wanted]);
    }
    let error = folder.refusal(&path, &["--read-only", "--snapshot", "between"]);
    assert!(error.contains("\"between\""), "{error}");
    assert!(error.contains("1 \"before\", 2 \"after\""), "{error}");
    let plain = folder.file("plain.qcow2", &image());
    let error = folder.refusal(&plain, &["--read-only", "--snapshot", "1"]);
    assert!(error.contains("no internal snapshots"), "{error}");

    let output = run(&["add", "-f", path.to_str().unwrap(), "--snapshot", "1"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--read-only"));
}

#[test]
fn a_snapshot_whose_id_is_the_name_of_another_is_served_by_either() {
    let folder = Folder::new();
    let mut bytes = with_snapshots();
    // Snapshot 1 is called "2" now.
    put(&mut bytes, (4 << 16) + 14, 1, 2);
    put(&mut bytes, (4 << 16) + 41, u64::from(b'2'), 1);
    let path = folder.file("snapshots.qcow2", &bytes);
    let error = folder.refusal(&path, &["--read-only", "--snapshot", "2"]);
    assert!(error.contains("more than one") && error.contains("id=ID"), "{error}");
    for one in ["id=2", "name=2", "id=1", "1", "name=after"] {
        folder.served(&path, &["--read-only", "--snapshot", one]);
    }
    let error = folder.refusal(&path, &["--read-only", "--snapshot", "name=1"]);
    assert!(error.contains("no snapshot"), "{error}");
}

#[test]
fn snapshots_beside_a_data_file_are_only_read() {
    let folder = Folder::new();
    let data = folder.file("data.raw", &[0; 512]);
    let mut bytes = with_snapshots();
    put(&mut bytes, 72, 4, 8); // incompatible_features
    let path = folder.file("both.qcow2", &bytes);
    let name = data.to_str().unwrap();
    let error = folder.refusal(&path, &["--data-file", name]);
    assert!(error.contains("snapshots beside an external data file"), "{error}");
    folder.served(&path, &["--data-file", name, "--read-only"]);
}

#[test]
fn a_corrupt_image_is_served_for_reading_and_a_dirty_one_is_mended() {
    let folder = Folder::new();
    let mut bytes = image();
    put(&mut bytes, 72, 2, 8);
    let path = folder.file("corrupt.qcow2", &bytes);
    let error = folder.refusal(&path, &[]);
    assert!(error.contains("--read-only"), "{error}");
    folder.served(&path, &["--read-only"]);
    put(&mut bytes, 72, 1, 8);
    let path = folder.file("dirty.qcow2", &bytes);
    folder.served(&path, &["--read-only"]);
    // Not before there is a device: see tests/guest/wrong-input.sh.
    folder.served(&path, &[]);
}

#[test]
fn an_image_whose_first_write_could_destroy_data_is_served_for_reading_only() {
    let folder = Folder::new();
    // The refcount of the L1 table is 0, so that an allocation would take its place.
    let mut bytes = image();
    put(&mut bytes, 2 * 65536 + 2 * 3, 0, 2);
    let path = folder.file("not sound.qcow2", &bytes);
    let output = run(&["add", "-f", path.to_str().unwrap()]);
    assert_eq!(folder.contents(), [(path.clone(), bytes)]);
    let error = failure(&output);
    let next = format!("'ublk-qcow2 check -f '{}' --repair all'", path.display());
    for part in ["1 corruption,", "fewer refcounts", "at 0x30000", &next, "--read-only"] {
        assert!(error.contains(part), "{part:?} is missing in: {error}");
    }
    folder.served(&path, &["--read-only"]);
    // The next step is one.
    let output = run(&["check", "-f", path.to_str().unwrap(), "--repair", "all"]);
    assert_eq!(output.status.code(), Some(0));
    folder.served(&path, &[]);
}

#[test]
fn leaks_and_what_only_cannot_be_read_are_no_reason_to_refuse_an_image() {
    let folder = Folder::new();
    let mut bytes = image();
    bytes.resize(6 << 16, 0);
    for cluster in 4..6 {
        put(&mut bytes, 2 * 65536 + 2 * cluster, 1, 2);
    }
    let path = folder.file("leaks.qcow2", &bytes);
    let output = run(&["check", "-f", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3), "leaks, and nothing worse");
    folder.served(&path, &[]);
    // An L2 table, whose first entry has a reserved bit.
    put(&mut bytes, 3 << 16, 1 << 63 | 4 << 16, 8);
    put(&mut bytes, 4 << 16, 1 << 57, 8);
    let path = folder.file("reserved.qcow2", &bytes);
    let output = run(&["check", "-f", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2), "a corruption");
    folder.served(&path, &[]);
}

#[test]
fn locks_are_on_every_file() {
    let folder = Folder::new();
    let base = folder.file("base.raw", &[0; 512]);
    let top = folder.file("top.qcow2", &over("base.raw", Some("raw")));
    let data = folder.file("data.raw", &[0; 512]);
    let split = folder.file("split.qcow2", &with_data_file("data.raw"));
    let name = data.to_str().unwrap();
    for (path, other, more) in [(top, base, &[][..]), (split, data.clone(), &["--data-file", name])]
    {
        let file = fs::File::options().read(true).write(true).open(&other).unwrap();
        super::hold(&file, &[100, 101, 201]);
        let with = |lock| [more, &["--lock", lock]].concat();
        for lock in ["on", "auto"] {
            let error = folder.refusal(&path, &with(lock));
            let name = other.file_name().unwrap().to_str().unwrap();
            assert!(error.contains("in use") && error.contains(name), "{error}");
        }
        folder.served(&path, &with("off"));
        drop(file);
        folder.served(&path, &with("on"));
    }
}
