//! The journal of a device that outlives its server: a file on tmpfs, mapped into memory.
//!
//! What it holds, and why a store into it is enough, is told in [`qcow2::journal`]. Here are its
//! file and its mapping. It is read by a successor on the same boot, so it is never synced; its
//! space is allocated when it is made, since a store into a hole of a full tmpfs would be fatal.
//! (One of the four files with `unsafe`.)

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use anyhow::{Context, Result};
use memmap2::MmapMut;
use nix::fcntl::{FallocateFlags, fallocate};
use qcow2::{Engine, Log, Record};

use crate::files::Source;
use crate::state;

/// Records in each of the two segments: 2 MiB each. A round of its own begins long before that many
/// clusters were mapped, unless they are mapped faster than the disk is synced.
pub const RECORDS: u32 = 1 << 16;

/// An open journal.
pub struct Journal {
    map: MmapMut,
    log: Log,
}

impl Journal {
    /// Makes the journal of a device.
    pub fn create(id: u32, image: &Source) -> Result<Self> {
        state::make_folder()?;
        let path = state::path(id, "journal");
        // One of an earlier device of this number is not to be changed under whoever has it.
        let _ = std::fs::remove_file(&path);
        let make = || -> Result<Self> {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
            let len = libc::off_t::try_from(Log::len_for(RECORDS))?;
            fallocate(&file, FallocateFlags::empty(), 0, len)?;
            let mut map = mapped(&file)?;
            let log = Log::create(&mut map, RECORDS, number_of(image)?);
            Ok(Self { map, log })
        };
        make().with_context(|| format!("making the journal {}", path.display()))
    }

    /// Opens what a dead server has left, and what stands in it.
    pub fn open(id: u32, image: &Source) -> Result<(Self, Vec<Record>)> {
        let path = state::path(id, "journal");
        let open = || -> Result<(Self, Vec<Record>)> {
            let file = OpenOptions::new().read(true).write(true).open(&path)?;
            let map = mapped(&file)?;
            let (log, records) = Log::open(&map, number_of(image)?)?;
            Ok((Self { map, log }, records))
        };
        open().with_context(|| format!("reading the journal {}", path.display()))
    }

    /// Records in each segment: what the engine has to be told.
    pub fn records(&self) -> u32 {
        self.log.capacity()
    }

    /// Takes over what the engine has recorded. Before this it hands out no operation or reply.
    pub fn follow(&mut self, engine: &mut Engine) {
        while let Some(event) = engine.next_record() {
            self.log.apply(&mut self.map, event);
        }
    }
}

fn mapped(file: &File) -> Result<MmapMut> {
    // A journal that was cut off must not be mapped beyond its end; at least its headers are there.
    let mut first = [0];
    file.read_exact_at(&mut first, 0).context("it is empty")?;
    // SAFETY: the file lies in a folder for root alone, and only the server of the device, or its
    // successor after it has died, maps it; nobody makes it shorter.
    Ok(unsafe { MmapMut::map_mut(file)? })
}

/// A number for the image that no other file of this machine has, as long as it is there.
fn number_of(image: &Source) -> Result<u64> {
    let (device, inode) = image.identity()?;
    Ok(inode ^ device.rotate_left(32))
}
