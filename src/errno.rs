//! Between the kernel's error numbers and the engine's error kinds, in both directions.
//!
//! **Invariant:** only EIO, ENOSPC, EOPNOTSUPP and EINVAL ever go up to the block layer; it gives
//! other numbers (EAGAIN, ENOMEM, EBUSY) meanings that no client of a disk expects.

use qcow2::IoErrorKind;

/// What a failed file operation means to the engine. `errno` is positive.
pub fn kind_of(errno: i32) -> IoErrorKind {
    match errno {
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => IoErrorKind::NoSpace,
        // ENOTSUP is the same number.
        libc::EOPNOTSUPP => IoErrorKind::Unsupported,
        _ => IoErrorKind::Io,
    }
}

/// What the block layer is told, as a positive error number.
pub fn errno_of(kind: IoErrorKind) -> i32 {
    match kind {
        IoErrorKind::Io => libc::EIO,
        IoErrorKind::NoSpace => libc::ENOSPC,
        IoErrorKind::Unsupported => libc::EOPNOTSUPP,
        IoErrorKind::Invalid => libc::EINVAL,
    }
}

/// The text of an error number, as in `No such device (ENODEV)`.
pub fn describe(errno: i32) -> String {
    // The kernel's own ENOTSUPP escapes from some drivers and has no name in user space.
    const ENOTSUPP: i32 = 524;
    if errno == ENOTSUPP {
        return "not supported by this kernel (ENOTSUPP)".to_string();
    }
    let code = nix::errno::Errno::from_raw(errno);
    format!("{} ({code:?})", code.desc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_a_quota_and_a_size_limit_are_all_no_space() {
        for errno in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG] {
            assert_eq!(kind_of(errno), IoErrorKind::NoSpace);
        }
        assert_eq!(kind_of(libc::EROFS), IoErrorKind::Io);
        assert_eq!(errno_of(kind_of(libc::ENOSPC)), libc::ENOSPC);
    }
}
