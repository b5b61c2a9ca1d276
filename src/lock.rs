//! QEMU's image locks, so that an image is never written by two programs.
//!
//! QEMU locks single bytes of the image with shared OFD locks: byte 100 + P says "I use permission
//! P", byte 200 + P says "I do not share permission P". Every opener first takes its own bytes and
//! then looks for others' (never the other way round: two openers could miss each other), with the
//! test for a conflicting exclusive lock. The locks belong to the open file, not to the process, so
//! they survive a fork and end when the last copy of the descriptor is closed.

use std::fs::File;

use anyhow::{Result, anyhow};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use serde::{Deserialize, Serialize};

/// QEMU's permissions: reading consistent data, writing, resizing. (Bit 2, writing unchanged data,
/// nobody refuses to share.)
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

const HELD: i64 = 100;
const UNSHARED: i64 = 200;

/// What is held, and what is not shared with others.
struct Claims {
    held: &'static [i64],
    unshared: &'static [i64],
}

const WRITER: Claims =
    Claims { held: &[CONSISTENT_READ, WRITE, RESIZE], unshared: &[WRITE, RESIZE] };
const READER: Claims = Claims { held: &[CONSISTENT_READ], unshared: &[WRITE, RESIZE] };

/// What to do about locks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub enum Policy {
    /// Take them, or refuse the image.
    #[default]
    On,
    /// Take them; only warn where the file system has none.
    Auto,
    /// Take none: nothing keeps another program from writing to the image.
    Off,
}

/// Why there is no lock.
enum Problem {
    /// Somebody else's conflict.
    Taken(Option<i32>),
    /// The file system has none.
    Missing(Errno),
}

/// Takes the locks of a writer or a reader on `file`, or fails because somebody else's conflict.
/// Where there are none and that is no reason to fail, a note says so.
pub fn take(file: &File, read_only: bool, policy: Policy) -> Result<Option<String>> {
    if policy == Policy::Off {
        return Ok(None);
    }
    let claims = if read_only { READER } else { WRITER };
    match attempt(file, &claims) {
        Ok(()) => Ok(None),
        Err(Problem::Taken(pid)) => Err(in_use(pid)),
        Err(Problem::Missing(errno)) if policy == Policy::Auto => Ok(Some(format!(
            "cannot be locked ({}): nothing keeps other programs from using it",
            errno.desc()
        ))),
        Err(Problem::Missing(errno)) => Err(anyhow!(
            "cannot be locked ({}); put it on a file system with working locks, or see --lock",
            errno.desc()
        )),
    }
}

fn attempt(file: &File, claims: &Claims) -> Result<(), Problem> {
    let result = claim(file, claims);
    if result.is_err() {
        for byte in 0..4 {
            // Unlocking what is not locked is no error, and nothing could be done about one.
            let _ = set(file, libc::F_UNLCK, HELD + byte);
            let _ = set(file, libc::F_UNLCK, UNSHARED + byte);
        }
    }
    result
}

fn claim(file: &File, claims: &Claims) -> Result<(), Problem> {
    let bytes = claims.held.iter().map(|bit| HELD + bit);
    for byte in bytes.chain(claims.unshared.iter().map(|bit| UNSHARED + bit)) {
        set(file, libc::F_RDLCK, byte).map_err(|errno| match errno {
            Errno::EAGAIN | Errno::EACCES => Problem::Taken(None),
            errno => Problem::Missing(errno),
        })?;
    }
    // Somebody who does not share what we use, or uses what we do not share.
    let conflicts = claims.held.iter().map(|bit| UNSHARED + bit);
    for byte in conflicts.chain(claims.unshared.iter().map(|bit| HELD + bit)) {
        let mut lock = flock(libc::F_WRLCK, byte);
        match fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)) {
            Ok(_) if i32::from(lock.l_type) == libc::F_UNLCK => {}
            Ok(_) => return Err(Problem::Taken(Some(lock.l_pid))),
            Err(errno) => return Err(Problem::Missing(errno)),
        }
    }
    Ok(())
}

fn in_use(pid: Option<i32>) -> anyhow::Error {
    // An OFD lock has no owner (-1); a plain lock has.
    let who = match pid {
        Some(pid) if pid > 0 => format!("process {pid}"),
        _ => "another process (QEMU, or another ublk-qcow2)".to_string(),
    };
    anyhow!("is in use by {who}; stop it first")
}

fn set(file: &File, kind: i32, byte: i64) -> nix::Result<i32> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&flock(kind, byte)))
}

fn flock(kind: i32, byte: i64) -> libc::flock {
    let short = |value: i32| i16::try_from(value).expect("lock constants are small");
    libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: byte,
        l_len: 1,
        // Must be 0 for OFD locks.
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(file: &File, read_only: bool) -> Result<()> {
        super::take(file, read_only, Policy::On).map(drop)
    }

    fn again(file: &tempfile::NamedTempFile) -> File {
        File::options().read(true).write(true).open(file.path()).unwrap()
    }

    #[test]
    fn a_writer_excludes_a_writer_and_a_reader_until_it_is_closed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = again(&file);
        take(&first, false).unwrap();
        assert!(take(&again(&file), false).is_err());
        assert!(take(&again(&file), true).is_err());
        drop(first);
        take(&again(&file), false).unwrap();
    }

    #[test]
    fn without_locks_nobody_is_in_the_way() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = again(&file);
        take(&first, false).unwrap();
        assert!(super::take(&again(&file), false, Policy::Auto).is_err());
        assert!(super::take(&again(&file), false, Policy::Off).unwrap().is_none());
    }

    #[test]
    fn readers_share_and_exclude_a_writer() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, two) = (again(&file), again(&file));
        take(&one, true).unwrap();
        take(&two, true).unwrap();
        assert!(take(&again(&file), false).is_err());
    }

    #[test]
    fn a_failed_claim_leaves_no_lock_behind() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (one, two) = (again(&file), again(&file));
        take(&one, true).unwrap();
        assert!(take(&two, false).is_err());
        drop(one);
        take(&again(&file), false).unwrap();
    }
}
