//! Replays the log of a dm-log-writes device onto another device, up to any of its entries, as if
//! the power had been cut there.
//!
//! The **log** has a superblock in its first sector and then `entries` times a header sector with
//! the data of that write behind it. Numbers are little-endian; the size of a sector is that of
//! the logged device, and everything is counted in it.
//!
//!     superblock   magic (8), version (8), entries (8), bytes per sector (4)
//!     header       sector (8), sectors (8), flags (8), length of what follows (8), a mark's name
//!
//! A discard has no data behind its header although it says how many sectors; a flush and a mark
//! have none at all. An entry is in the log once the device had acknowledged that it is durable:
//! with the FLUSH that came after it, or at once if it is FUA. So each FLUSH or FUA entry ends a
//! state that a power cut may leave: with everything up to it, and nothing after.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use serde_json::json;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
/// What the superblock and a header need of their sector.
const HEADER: usize = 32;

const FLUSH: u64 = 1 << 0;
const FUA: u64 = 1 << 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;
const METADATA: u64 = 1 << 4;
const NAMES: [(u64, &str); 5] =
    [(FLUSH, "FLUSH"), (FUA, "FUA"), (DISCARD, "DISCARD"), (MARK, "MARK"), (METADATA, "METADATA")];

/// Data is copied in pieces of at most this size.
const CHUNK: usize = 1 << 20;

#[derive(Parser)]
#[command(about = "Replays the log of a dm-log-writes device")]
struct Cli {
    /// The log, a device or a copy in a file
    #[arg(long)]
    log: PathBuf,
    /// Print one line per entry: its number, flags, first sector, sectors and, of a mark, the name
    #[arg(long, conflicts_with_all = ["to", "until", "from"], required_unless_present = "to")]
    list: bool,
    /// Device or file to write to; prints one line of JSON
    #[arg(long, requires = "until")]
    to: Option<PathBuf>,
    /// The last entry to apply
    #[arg(long, requires = "to")]
    until: Option<u64>,
    /// The first entry to apply, for a device that has all those before
    #[arg(long, requires = "to", default_value_t = 0)]
    from: u64,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match (&cli.to, cli.until) {
        (Some(to), Some(until)) => replay(&cli.log, to, cli.from, until),
        _ => list(&cli.log),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("replay: {error:#}");
            ExitCode::FAILURE
        }
    }
}

// --- the format -----------------------------------------------------------------------------

/// A little-endian number.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

#[derive(Debug, PartialEq, Eq)]
struct Superblock {
    entries: u64,
    /// Bytes per sector.
    sector: u64,
}

impl Superblock {
    fn parse(bytes: &[u8]) -> Result<Self> {
        ensure!(bytes.len() >= HEADER, "the superblock is cut off");
        ensure!(number(&bytes[..8]) == MAGIC, "not a log of dm-log-writes");
        let version = number(&bytes[8..16]);
        ensure!(version == VERSION, "the log has version {version}, not {VERSION}");
        let sector = number(&bytes[24..28]);
        ensure!(
            sector.is_power_of_two() && (512..=65536).contains(&sector),
            "the log has sectors of {sector} bytes"
        );
        Ok(Self { entries: number(&bytes[16..24]), sector })
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    sector: u64,
    sectors: u64,
    flags: u64,
    /// Of a mark, or empty.
    name: String,
}

impl Entry {
    /// Parses a header, which is a whole sector.
    fn parse(bytes: &[u8]) -> Result<Self> {
        ensure!(bytes.len() >= HEADER, "the header is cut off");
        let (sector, sectors) = (number(&bytes[..8]), number(&bytes[8..16]));
        let (flags, length) = (number(&bytes[16..24]), number(&bytes[24..32]));
        let known = NAMES.iter().fold(0, |known, (flag, _)| known | flag);
        ensure!(flags & !known == 0, "unknown flags {flags:#x}");
        let mut name = String::new();
        if flags & MARK != 0 {
            ensure!(sectors == 0 && flags == MARK, "a mark that also writes");
            let end = usize::try_from(length).ok().and_then(|length| length.checked_add(HEADER));
            let text = end.and_then(|end| bytes.get(HEADER..end));
            let text = text.context("the name of a mark is longer than its sector")?;
            name = String::from_utf8_lossy(text).into_owned();
        } else {
            ensure!(length == 0, "inline data of {length} bytes, which only DAX makes");
        }
        Ok(Self { sector, sectors, flags, name })
    }

    /// How many sectors of data follow the header.
    fn data_sectors(&self) -> u64 {
        if self.flags & DISCARD != 0 { 0 } else { self.sectors }
    }

    /// Offset and length of what it changes, in bytes.
    fn target(&self, sector_size: u64) -> Result<(u64, u64)> {
        let start = self.sector.checked_mul(sector_size).context("its sector is out of range")?;
        let length = self.sectors.checked_mul(sector_size).context("its length is out of range")?;
        start.checked_add(length).context("its end is out of range")?;
        Ok((start, length))
    }
}

/// Flags by name, or "-", then the range, or the name of a mark.
impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = NAMES
            .iter()
            .filter(|(flag, _)| self.flags & flag != 0)
            .map(|&(_, name)| name)
            .collect();
        let flags = if names.is_empty() { "-".to_owned() } else { names.join("|") };
        write!(f, "{flags} {} {}", self.sector, self.sectors)?;
        if self.flags & MARK != 0 {
            write!(f, " {}", self.name)?;
        }
        Ok(())
    }
}

// --- the log --------------------------------------------------------------------------------

/// Iterates over the entries, each with its number and the offset of its data in the log.
struct Log {
    file: File,
    size: u64,
    superblock: Superblock,
    /// Number and offset of the next entry.
    next: u64,
    offset: u64,
}

impl Log {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let size = size(&file)?;
        let mut bytes = [0; HEADER];
        file.read_exact_at(&mut bytes, 0).context("cannot read the superblock")?;
        let superblock = Superblock::parse(&bytes)?;
        let offset = superblock.sector;
        Ok(Self { file, size, superblock, next: 0, offset })
    }

    fn entry(&mut self) -> Result<(u64, Entry, u64)> {
        let sector = self.superblock.sector;
        let data = self.offset.checked_add(sector).filter(|&data| data <= self.size);
        let data = data.context("the header is beyond the end of the log")?;
        let mut bytes = vec![0; usize::try_from(sector)?];
        self.file.read_exact_at(&mut bytes, self.offset).context("cannot read the header")?;
        let entry = Entry::parse(&bytes)?;
        let length = entry.data_sectors().checked_mul(sector);
        let end = length.and_then(|length| data.checked_add(length));
        let end = end.filter(|&end| end <= self.size);
        self.offset = end.context("the data is beyond the end of the log")?;
        self.next += 1;
        Ok((self.next - 1, entry, data))
    }
}

impl Iterator for Log {
    type Item = Result<(u64, Entry, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.superblock.entries {
            return None;
        }
        let (number, offset) = (self.next, self.offset);
        let item = self.entry();
        if item.is_err() {
            // Where the one after begins is not known.
            self.next = self.superblock.entries;
        }
        Some(item.with_context(|| format!("entry {number} at byte {offset} of the log")))
    }
}

/// Of a file or a block device.
fn size(mut file: &File) -> Result<u64> {
    file.seek(SeekFrom::End(0)).context("cannot find out its size")
}

fn list(path: &Path) -> Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    for item in Log::open(path)? {
        let (number, entry, _) = item?;
        writeln!(out, "{number} {entry}")?;
    }
    out.flush()?;
    Ok(())
}

// --- replay ---------------------------------------------------------------------------------

#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    applied: u64,
    writes: u64,
    bytes: u64,
    discards: u64,
    /// Entries that a power cut may have come right after.
    durable: u64,
    marks: u64,
}

fn replay(path: &Path, to: &Path, from: u64, until: u64) -> Result<()> {
    let log = Log::open(path)?;
    let target = OpenOptions::new().write(true).open(to);
    let target = target.with_context(|| format!("cannot open {}", to.display()))?;
    let counts = apply(log, &target, from, until)?;
    target.sync_all().with_context(|| format!("cannot sync {}", to.display()))?;
    println!(
        "{}",
        json!({
            "applied": counts.applied,
            "writes": counts.writes,
            "bytes": counts.bytes,
            "discards": counts.discards,
            "durable": counts.durable,
            "marks": counts.marks,
            "next": until + 1,
        })
    );
    Ok(())
}

/// Applies the entries `from..=until`.
fn apply(log: Log, target: &File, from: u64, until: u64) -> Result<Counts> {
    let entries = log.superblock.entries;
    ensure!(until < entries, "there are {entries} entries, and no number {until}");
    ensure!(from <= until, "entry {from} comes after entry {until}");
    let (sector, target_size) = (log.superblock.sector, size(target)?);
    let source = log.file.try_clone()?;
    let mut counts = Counts::default();
    let mut buffer = vec![0; CHUNK];
    for item in log {
        let (number, entry, data) = item?;
        if number > until {
            return Ok(counts);
        }
        if number < from {
            continue;
        }
        let (start, length) = entry.target(sector).with_context(|| format!("entry {number}"))?;
        if start + length > target_size {
            bail!("entry {number} ends at byte {}, beyond the device", start + length);
        }
        let discard = entry.flags & DISCARD != 0;
        copy(&source, (!discard).then_some(data), target, start, length, &mut buffer)
            .with_context(|| format!("entry {number}"))?;
        counts.applied += 1;
        counts.marks += u64::from(entry.flags & MARK != 0);
        counts.durable += u64::from(entry.flags & (FLUSH | FUA) != 0);
        counts.discards += u64::from(discard);
        if !discard && length > 0 {
            counts.writes += 1;
            counts.bytes += length;
        }
    }
    Ok(counts)
}

/// Copies `length` bytes from offset `data` of the log, or zeros, to `start` of the target.
fn copy(
    source: &File,
    data: Option<u64>,
    target: &File,
    start: u64,
    length: u64,
    buffer: &mut [u8],
) -> io::Result<()> {
    let mut done = 0;
    if data.is_none() {
        buffer.fill(0);
    }
    while done < length {
        let left = usize::try_from(length - done).unwrap_or(usize::MAX);
        let piece = left.min(buffer.len());
        if let Some(data) = data {
            source.read_exact_at(&mut buffer[..piece], data + done)?;
        }
        target.write_all_at(&buffer[..piece], start + done)?;
        done += piece as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u64]) -> Vec<u8> {
        let byte = |word: u64, index: u32| u8::try_from(word >> (8 * index) & 0xff).unwrap();
        words.iter().flat_map(|&word| (0..8).map(move |index| byte(word, index))).collect()
    }

    fn padded(mut bytes: Vec<u8>, size: usize) -> Vec<u8> {
        assert!(bytes.len() <= size);
        bytes.resize(size, 0);
        bytes
    }

    fn superblock(entries: u64, sector: u64) -> Vec<u8> {
        words(&[MAGIC, VERSION, entries, sector])
    }

    fn header(sector: u64, sectors: u64, flags: u64) -> Vec<u8> {
        padded(words(&[sector, sectors, flags, 0]), 512)
    }

    fn mark(name: &str) -> Vec<u8> {
        let mut bytes = words(&[0, 0, MARK, name.len() as u64]);
        bytes.extend(name.as_bytes());
        padded(bytes, 512)
    }

    /// A log with these entries; `parts` are headers, each with its data behind it.
    fn log(entries: u64, parts: &[Vec<u8>]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut bytes = padded(superblock(entries, 512), 512);
        bytes.extend(parts.concat());
        file.as_file().write_all_at(&bytes, 0).unwrap();
        file
    }

    fn with_data(header: Vec<u8>, byte: u8, sectors: usize) -> Vec<u8> {
        [header, vec![byte; sectors * 512]].concat()
    }

    fn example() -> tempfile::NamedTempFile {
        log(
            6,
            &[
                with_data(header(1, 2, METADATA), 0xaa, 2),
                header(0, 0, FLUSH),
                mark("one"),
                with_data(header(2, 1, FUA), 0xbb, 1),
                header(1, 1, DISCARD),
                header(0, 0, FLUSH),
            ],
        )
    }

    fn apply_to(
        log: &tempfile::NamedTempFile,
        size: u64,
        ranges: &[(u64, u64)],
    ) -> Result<(Vec<u8>, Counts)> {
        let target = tempfile::NamedTempFile::new().unwrap();
        target.as_file().set_len(size).unwrap();
        let mut counts = Counts::default();
        for &(from, until) in ranges {
            counts = apply(Log::open(log.path())?, target.as_file(), from, until)?;
        }
        Ok((std::fs::read(target.path()).unwrap(), counts))
    }

    #[test]
    fn superblocks_are_checked() {
        let parsed = Superblock::parse(&superblock(7, 4096)).unwrap();
        assert_eq!(parsed, Superblock { entries: 7, sector: 4096 });
        assert!(Superblock::parse(&superblock(7, 512)[..31]).is_err());
        assert!(Superblock::parse(&words(&[MAGIC + 1, 1, 7, 512])).is_err());
        assert!(Superblock::parse(&words(&[MAGIC, 2, 7, 512])).is_err());
        for sector in [0, 256, 513, 1 << 17] {
            assert!(Superblock::parse(&superblock(7, sector)).is_err(), "{sector}");
        }
    }

    #[test]
    fn headers_are_checked() {
        let entry = Entry::parse(&header(8, 3, FUA | METADATA)).unwrap();
        assert_eq!((entry.sector, entry.sectors, entry.data_sectors()), (8, 3, 3));
        assert_eq!(entry.to_string(), "FUA|METADATA 8 3");
        let entry = Entry::parse(&header(8, 3, 0)).unwrap();
        assert_eq!(entry.to_string(), "- 8 3");
        let entry = Entry::parse(&header(8, 3, DISCARD)).unwrap();
        assert_eq!((entry.sectors, entry.data_sectors()), (3, 0));
        let entry = Entry::parse(&mark("file 7")).unwrap();
        assert_eq!(entry.to_string(), "MARK 0 0 file 7");

        assert!(Entry::parse(&header(8, 3, 0)[..31]).is_err());
        assert!(Entry::parse(&header(8, 3, 32)).is_err(), "an unknown flag");
        assert!(Entry::parse(&header(8, 3, MARK)).is_err(), "a mark with data");
        for length in [481, u64::MAX - 16, u64::MAX] {
            let bytes = padded(words(&[0, 0, MARK, length]), 512);
            assert!(Entry::parse(&bytes).is_err(), "{length}");
        }
        assert!(Entry::parse(&padded(words(&[0, 1, 0, 5]), 512)).is_err(), "inline data");
    }

    #[test]
    fn a_log_is_listed() {
        let log = example();
        let entries: Vec<String> = Log::open(log.path())
            .unwrap()
            .map(|item| item.map(|(number, entry, _)| format!("{number} {entry}")).unwrap())
            .collect();
        assert_eq!(
            entries,
            [
                "0 METADATA 1 2",
                "1 FLUSH 0 0",
                "2 MARK 0 0 one",
                "3 FUA 2 1",
                "4 DISCARD 1 1",
                "5 FLUSH 0 0"
            ]
        );
    }

    #[test]
    fn replay_ends_at_the_entry() {
        let log = example();
        let state = |sectors: [u8; 4]| sectors.map(|byte| [byte; 512]).concat();
        let (bytes, counts) = apply_to(&log, 2048, &[(0, 2)]).unwrap();
        assert!(bytes == state([0, 0xaa, 0xaa, 0]));
        let expected =
            Counts { applied: 3, writes: 1, bytes: 1024, discards: 0, durable: 1, marks: 1 };
        assert_eq!(counts, expected);
        assert!(apply_to(&log, 2048, &[(0, 3)]).unwrap().0 == state([0, 0xaa, 0xbb, 0]));
        assert!(apply_to(&log, 2048, &[(0, 5)]).unwrap().0 == state([0, 0, 0xbb, 0]));
        assert!(
            apply_to(&log, 2048, &[(0, 0), (1, 3), (4, 5)]).unwrap().0 == state([0, 0, 0xbb, 0])
        );
        assert!(apply_to(&log, 2048, &[(3, 3)]).unwrap().0 == state([0, 0, 0xbb, 0]));
    }

    #[test]
    fn ranges_are_checked() {
        let log = example();
        assert!(apply_to(&log, 2048, &[(0, 6)]).is_err(), "no such entry");
        assert!(apply_to(&log, 2048, &[(3, 2)]).is_err());
        assert!(apply_to(&log, 1024, &[(0, 0)]).is_err(), "beyond the device");
    }

    #[test]
    fn broken_logs_are_errors() {
        let fails = |log: tempfile::NamedTempFile| {
            let items: Vec<_> = Log::open(log.path()).unwrap().collect();
            assert!(items.last().unwrap().is_err());
            assert!(items.len() <= 2, "nothing after the error");
        };
        // More entries than there are, data that is cut off, and lengths that overflow.
        fails(log(u64::MAX, &[header(0, 0, FLUSH)]));
        fails(log(5, &[with_data(header(0, 2, 0), 1, 1)]));
        fails(log(5, &[header(0, u64::MAX, 0)]));
        fails(log(5, &[header(0, u64::MAX / 512, 0)]));
        let far = log(1, &[with_data(header(u64::MAX, 1, 0), 1, 1)]);
        assert!(apply_to(&far, 2048, &[(0, 0)]).is_err());
        let far = log(1, &[with_data(header(u64::MAX / 512, 1, 0), 1, 1)]);
        assert!(apply_to(&far, 2048, &[(0, 0)]).is_err());
    }
}
