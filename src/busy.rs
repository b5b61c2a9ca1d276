//! Who uses a block device: for messages, and for kernels that cannot say it themselves.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::device::block_path;

/// Everybody who uses device `id` or a partition of it, as far as this process can see; in words.
pub fn users(id: u32) -> Vec<String> {
    let mut found = mounts(id);
    found.extend(swaps(id));
    found.extend(holders(id));
    found.extend(exports(id, Path::new("/sys/kernel/config/nvmet/subsystems")));
    found.extend(openers(id));
    found
}

/// The same as one phrase, `in use` where nothing more is known.
pub fn phrase(users: &[String]) -> String {
    match users {
        [] => "open".to_string(),
        [one] => one.clone(),
        [one, two] => format!("{one}, {two}"),
        [one, two, rest @ ..] => format!("{one}, {two} and {} more", rest.len()),
    }
}

/// Whether somebody else holds the device exclusively (a mount, swap, a device mapper target).
pub fn open_exclusively(id: u32) -> std::io::Result<fs::File> {
    let flags = libc::O_EXCL | libc::O_NONBLOCK;
    fs::OpenOptions::new().read(true).custom_flags(flags).open(block_path(id))
}

/// `/dev/ublkb0` and `/dev/ublkb0p1`, but not `/dev/ublkb01`.
fn is_of(id: u32, path: &str) -> bool {
    let path = path.strip_suffix(" (deleted)").unwrap_or(path);
    let Some(rest) = path.strip_prefix(&format!("/dev/ublkb{id}")) else { return false };
    let digits = rest.strip_prefix('p').unwrap_or("");
    rest.is_empty() || !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

fn lines(path: &str) -> Vec<String> {
    // Without /proc nothing is known, and that is what is said.
    fs::read_to_string(path).unwrap_or_default().lines().map(str::to_string).collect()
}

fn mounts(id: u32) -> Vec<String> {
    let mut found = Vec::new();
    for line in lines("/proc/self/mountinfo") {
        // ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS... - TYPE SOURCE ...
        let Some((place, source)) = line.split_once(" - ") else { continue };
        if source.split(' ').nth(1).is_some_and(|source| is_of(id, source)) {
            found.push(format!("mounted on {}", place.split(' ').nth(4).unwrap_or("?")));
        }
    }
    found
}

fn swaps(id: u32) -> Vec<String> {
    let used = |line: &String| line.split(' ').next().is_some_and(|path| is_of(id, path));
    lines("/proc/swaps").iter().filter(|line| used(line)).map(|_| "used as swap".into()).collect()
}

fn holders(id: u32) -> Vec<String> {
    let Ok(entries) = fs::read_dir(format!("/sys/block/ublkb{id}/holders")) else {
        return Vec::new();
    };
    let names = entries.flatten().map(|entry| entry.file_name());
    names.map(|name| format!("used by {}", name.to_string_lossy())).collect()
}

/// Namespaces of the kernel's NVMe target, whose folder of subsystems is given. It opens a device
/// for itself, and not exclusively, so nothing else here sees it.
fn exports(id: u32, subsystems: &Path) -> Vec<String> {
    let mut found = Vec::new();
    // Without the folder there is no target.
    for subsystem in fs::read_dir(subsystems).into_iter().flatten().flatten() {
        let namespaces = fs::read_dir(subsystem.path().join("namespaces"));
        for namespace in namespaces.into_iter().flatten().flatten() {
            let read = |name| fs::read_to_string(namespace.path().join(name)).unwrap_or_default();
            if read("enable").trim() == "1" && is_of(id, read("device_path").trim()) {
                let name = subsystem.file_name();
                found.push(format!("exported by the NVMe target as {}", name.to_string_lossy()));
            }
        }
    }
    found
}

fn openers(id: u32) -> Vec<String> {
    let mut found = Vec::new();
    let Ok(processes) = fs::read_dir("/proc") else { return found };
    for process in processes.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // A process may end meanwhile; then it has nothing open.
        let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
        let is_open = |file: fs::DirEntry| {
            fs::read_link(file.path()).is_ok_and(|path| is_of(id, &path.to_string_lossy()))
        };
        if pid != std::process::id() && files.flatten().any(is_open) {
            found.push(format!("open in {} (process {pid})", command_name(&process.path())));
        }
    }
    found
}

fn command_name(process: &Path) -> String {
    fs::read_to_string(process.join("comm")).unwrap_or_default().trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_belong_to_their_disk_and_other_numbers_do_not() {
        for path in ["/dev/ublkb1", "/dev/ublkb1p2", "/dev/ublkb1 (deleted)"] {
            assert!(is_of(1, path), "{path}");
        }
        for path in ["/dev/ublkb11", "/dev/ublkb1px", "/dev/ublkb1p", "/dev/ublkc1", "/dev/ublkb"] {
            assert!(!is_of(1, path), "{path}");
        }
    }

    #[test]
    fn an_export_is_found_while_it_is_enabled() {
        let folder = tempfile::tempdir().unwrap();
        let namespace = folder.path().join("nqn.test/namespaces/1");
        fs::create_dir_all(&namespace).unwrap();
        fs::write(namespace.join("device_path"), "/dev/ublkb3\n").unwrap();
        fs::write(namespace.join("enable"), "0\n").unwrap();
        assert!(exports(3, folder.path()).is_empty());
        fs::write(namespace.join("enable"), "1\n").unwrap();
        assert_eq!(exports(3, folder.path()), ["exported by the NVMe target as nqn.test"]);
        assert!(exports(4, folder.path()).is_empty());
    }

    #[test]
    fn a_process_is_found_by_its_open_files() {
        assert!(openers(u32::MAX).is_empty());
    }
}
