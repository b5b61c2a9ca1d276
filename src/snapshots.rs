//! Internal snapshots: finding the one to be served, and keeping guest data away from all of them.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use anyhow::{Context, Result, bail};
use qcow2::{Directory, Extent, Image, Snapshot};

use crate::files::Source;

/// The table is at most so long, as in QEMU.
const MAX_TABLE: usize = 64 << 20;

/// The L1 tables of all snapshots together are at most so long: as many as 32 of the longest.
const MAX_L1: u64 = 1 << 30;

/// So many are listed in an error.
const SHOWN: usize = 20;

/// All snapshots of an image, and where their table lies.
pub fn read(file: &Source, table: Directory) -> Result<(Vec<Snapshot>, Extent)> {
    let mut want = 64 << 10;
    loop {
        let bytes = file.read(table.offset, want).context("reading the snapshot table")?;
        if let Some(found) = table.snapshots(&bytes)? {
            return Ok((found, table.extent(&bytes)));
        }
        if bytes.len() < want || want >= MAX_TABLE {
            bail!("the snapshot table at byte {} is cut off or too long", table.offset);
        }
        want *= 2;
    }
}

/// The snapshot with this ID or name; `id=` or `name=` before it says which of them, as where one
/// is called what is another's ID.
pub fn find(file: &Source, table: Option<Directory>, wanted: &OsStr) -> Result<Snapshot> {
    let Some(table) = table else {
        bail!("it has no internal snapshots; leave --snapshot out");
    };
    let (all, _) = read(file, table)?;
    let bytes = wanted.as_bytes();
    let fits = |one: &&Snapshot| match (bytes.strip_prefix(b"id="), bytes.strip_prefix(b"name=")) {
        _ if one.id == bytes || one.name == bytes => true,
        (Some(id), _) => one.id == id,
        (_, Some(name)) => one.name == name,
        _ => false,
    };
    let mut fitting = all.iter().filter(fits);
    match (fitting.next(), fitting.next()) {
        (Some(only), None) => Ok(only.clone()),
        (None, _) => bail!("it has no snapshot {wanted:?}; there are {}", list(&all)),
        (Some(_), Some(_)) => {
            bail!(
                "more than one snapshot has the ID or name {wanted:?}; give id=ID or name=NAME of \
                 one of {}",
                list(&all)
            )
        }
    }
}

/// `ID "name"` of each.
fn list(all: &[Snapshot]) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let shown =
        all.iter().take(SHOWN).map(|one| format!("{} {:?}", text(&one.id), text(&one.name)));
    let mut list = shown.collect::<Vec<_>>().join(", ");
    if all.len() > SHOWN {
        list += &format!(" and {} more", all.len() - SHOWN);
    }
    list
}

/// Keeps guest data away from the snapshot table and the snapshots' L1 tables.
pub fn protect(image: &mut Image, table: Directory, file: &Source) -> Result<()> {
    let next = "see what 'ublk-qcow2 check' says, or serve it with --read-only";
    let len = file.len()?;
    let (all, place) = read(file, table)?;
    if !image.protect(place) {
        bail!("the snapshot table overlaps other metadata; {next}");
    }
    let mut total = 0;
    for (number, snapshot) in all.iter().enumerate() {
        let Extent { offset, len: bytes } = snapshot.l1;
        total += bytes;
        if snapshot.l1.end() > len || total > MAX_L1 {
            bail!(
                "the L1 table of snapshot {number} (bytes {offset} to {}) lies outside the file, \
                 or there is too much of them; {next}",
                snapshot.l1.end()
            );
        }
        if bytes != 0 && !image.protect(snapshot.l1) {
            bail!("the L1 table of snapshot {number} overlaps other metadata; {next}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    /// Two snapshots, of which the second has the first's ID as its name.
    fn table() -> (Source, Directory) {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = Vec::new();
        for (id, name) in [("1", "before"), ("2", "1")] {
            let mut entry = [0; 40];
            entry[13] = u8::try_from(id.len()).unwrap();
            entry[15] = u8::try_from(name.len()).unwrap();
            bytes.extend(entry);
            bytes.extend(id.bytes().chain(name.bytes()));
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        file.write_all_at(&bytes, 512).unwrap();
        (Source::new(file, true).unwrap(), Directory { offset: 512, entries: 2 })
    }

    #[test]
    fn a_snapshot_is_found_by_id_or_name_and_otherwise_all_are_listed() {
        let (file, table) = table();
        let found = |wanted: &str| find(&file, Some(table), OsStr::new(wanted));
        assert_eq!(found("before").unwrap().id, b"1");
        assert_eq!(found("2").unwrap().name, b"1");
        for (wanted, phrase) in [("1", "more than one"), ("nope", "no snapshot \"nope\"")] {
            let error = found(wanted).unwrap_err().to_string();
            assert!(error.contains(phrase), "{error}");
            assert!(error.contains("1 \"before\", 2 \"1\""), "{error}");
        }
        assert!(find(&file, None, OsStr::new("1")).unwrap_err().to_string().contains("leave"));
    }

    #[test]
    fn a_table_that_is_cut_off_is_an_error() {
        let (file, table) = table();
        let longer = Directory { entries: 3, ..table };
        assert!(read(&file, longer).unwrap_err().to_string().contains("cut off"));
    }
}
