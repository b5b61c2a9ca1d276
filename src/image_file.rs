//! An image as `check` and `info` see it: a file that is read, or repaired, at any place.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use qcow2::check::repair::{RepairIo, WriteError};
use qcow2::check::{ReadAt, ReadError};

use crate::files::{FileKind, open_image};
use crate::lock;
use crate::state::State;

/// An open image.
pub struct ImageFile {
    pub file: File,
    kind: FileKind,
    len: u64,
    /// The last thing that went wrong, which the library does not carry.
    failure: RefCell<Option<io::Error>>,
}

impl ImageFile {
    /// Opens an image; a pipe or a terminal does not hold this up. Errors do not name the image.
    pub fn open(path: &Path, write: bool) -> Result<Self> {
        Self::over(open_image(path, write, "'check' without --repair only reads it")?)
    }

    /// An error if a device that has lost its server waits for another with this image: what its
    /// users wrote is not all there, and what looks leaked may be theirs.
    pub fn refuse_waiting(&self) -> Result<()> {
        State::refuse_waiting(self.kind.identity(&self.file)?)
    }

    /// The same of a file that is open.
    pub fn over(file: File) -> Result<Self> {
        let kind = FileKind::of(&file)?;
        let len = kind.len(&file).context("cannot get the length of the file")?;
        Ok(Self { file, kind, len, failure: RefCell::new(None) })
    }

    /// Takes the locks of a reader or a writer, and looks again how long the file is: until then
    /// somebody else may have changed that. A note says where there are no locks.
    pub fn lock(&mut self, read_only: bool, policy: lock::Policy) -> Result<Option<String>> {
        let note = lock::take(&self.file, read_only, policy)?;
        self.kind = FileKind::of(&self.file)?;
        self.len = self.kind.len(&self.file).context("cannot get the length of the file")?;
        Ok(note)
    }

    /// An error of the library, with what the operating system said of it, if anything.
    pub fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        match self.failure.take() {
            Some(failure) => anyhow!("{error} ({failure})"),
            None => error,
        }
    }

    /// How QEMU calls what the image is stored in.
    pub fn protocol(&self) -> &'static str {
        match self.kind {
            FileKind::Regular => "file",
            FileKind::BlockDevice { .. } => "host_device",
        }
    }

    fn wrote<T>(&self, result: io::Result<T>) -> Result<T, WriteError> {
        result.map_err(|error| {
            self.failure.replace(Some(error));
            WriteError
        })
    }
}

impl ReadAt for ImageFile {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Behind the largest offset that there is.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) && offset >= self.len => {
                    break;
                }
                Err(error) => {
                    self.failure.replace(Some(error));
                    return Err(ReadError);
                }
            }
        }
        buf[done..].fill(0);
        Ok(())
    }
}

impl RepairIo for ImageFile {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        self.wrote(self.file.write_all_at(bytes, offset))
    }

    fn sync(&mut self) -> Result<(), WriteError> {
        self.wrote(self.file.sync_data())
    }

    fn set_len(&mut self, len: u64) -> Result<(), WriteError> {
        self.wrote(self.kind.lengthen(&self.file, len))?;
        self.len = len.max(self.len);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_is_the_one_under_the_lock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1000).unwrap();
        let mut image = ImageFile::open(file.path(), true).unwrap();
        // Somebody who still has the image writes to it, and goes.
        file.as_file().set_len(5000).unwrap();
        assert_eq!(image.lock(false, lock::Policy::On).unwrap(), None);
        assert_eq!(image.len(), 5000);
    }
}
