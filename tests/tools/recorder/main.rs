//! Writes to a block device and records outside of it what must be there after a crash; then
//! compares an image with that record.
//!
//! A **sector** is 512 bytes, all numbers big-endian: magic (8), its own byte address (8), the
//! sequence number of the write that it belongs to (8), the identity of the log (8), 476 bytes of
//! filler derived from the other fields, CRC-32 of all before (4).
//!
//! The **log** is text, one event per line, appended before the next thing happens:
//!
//!     log IDENTITY SPAN        the first line
//!     w SEQ SECTOR COUNT       this write is about to be submitted
//!     z SEQ SECTOR COUNT       the same for a write of zeros without a payload
//!     t SEQ SECTOR COUNT       the same for a discard ("trim")
//!     d FROM TO                FROM to TO completed, and (unless --acknowledged) a later fsync too
//!     o SECTOR SEQ             verify --pin saw this value (0: as at the start) after a crash
//!
//! Writes go in batches. Those of a batch do not overlap and run at the same time, together with
//! the fsync of the batch before, so a crash finds both in flight.
//!
//! **Rule.** A sector holds the newest value that is durable, or one that was submitted after it.
//! A sector without a durable value may also hold what was there at the start: zeros, or the same
//! sector of the base. A discard makes zeros allowed, and rules nothing out: it is a hint. Anything
//! else is a failure.

mod record;

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use qcow2::testing::Prng;
use serde_json::json;

use record::{Content, Expected, Extent, Kind, Log, SECTOR, content, fill};

const SECTOR_U64: u64 = 512;
/// Writes are at most this long, in sectors.
const MAX_SECTORS: u64 = 128;
/// Buffers for O_DIRECT begin at a multiple of this.
const ALIGNMENT: usize = 4096;
/// The image is read for verification in pieces of this size.
const CHUNK: u64 = 1 << 20;

#[derive(Parser)]
#[command(about = "Records what was fsynced on a device, and checks an image against it")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write until the device fails (status 0) or --writes are done; prints one line of JSON
    Write {
        /// Block device, or a file
        #[arg(long)]
        device: PathBuf,
        /// Created, or continued
        #[arg(long)]
        log: PathBuf,
        #[arg(long)]
        seed: u64,
        /// Bytes of the device that are used [default: all, or as the log says]
        #[arg(long)]
        span: Option<u64>,
        /// Writes per fsync
        #[arg(long, default_value_t = 8)]
        sync_every: u64,
        /// Writes in flight at the same time
        #[arg(long, default_value_t = 4)]
        threads: usize,
        /// End after so many writes [default: never]
        #[arg(long)]
        writes: Option<u64>,
        /// A third of all is a discard or a write of zeros without a payload
        #[arg(long)]
        trim: bool,
        /// Never fsync: what has completed counts as durable. For a device that outlives its server
        #[arg(long)]
        acknowledged: bool,
    },
    /// Compare a raw image with the log; prints one line of JSON, status 1 if anything is wrong
    Verify {
        #[arg(long)]
        image_raw: PathBuf,
        #[arg(long)]
        log: PathBuf,
        /// What was there at the start; zeros behind its end [default: zeros]
        #[arg(long)]
        base: Option<PathBuf>,
        /// Append to the log which of several allowed values was seen, so that it has to stay
        #[arg(long)]
        pin: bool,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Write {
            device,
            log,
            seed,
            span,
            sync_every,
            threads,
            writes,
            trim,
            acknowledged,
        } => {
            let writes = writes.unwrap_or(u64::MAX);
            let limits = Limits { sync_every, threads, writes, trim, acknowledged };
            write(&device, &log, seed, span, &limits).map(|()| true)
        }
        Command::Verify { image_raw, log, base, pin } => {
            verify(&image_raw, &log, base.as_deref(), pin)
        }
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("recorder: {error:#}");
            ExitCode::from(2)
        }
    }
}

// --- write ----------------------------------------------------------------------------------

struct Limits {
    sync_every: u64,
    threads: usize,
    writes: u64,
    trim: bool,
    acknowledged: bool,
}

/// A write to be done.
#[derive(Clone, Copy)]
struct Job {
    seq: u64,
    kind: Kind,
    extent: Extent,
}

/// Extents of a batch, which do not overlap. Half of all go to a sixteenth of the span, so that
/// much is written more than once.
fn batch(random: &mut Prng, first_seq: u64, count: u64, span: u64, trim: bool) -> Vec<Job> {
    let sectors = span / SECTOR_U64;
    let mut jobs: Vec<Job> = Vec::new();
    while (jobs.len() as u64) < count {
        let length = match random.below(8) {
            0..=2 => 1,
            3..=4 => 8,
            5 => 1 + random.below(16),
            6 => 1 + random.below(MAX_SECTORS),
            _ => MAX_SECTORS,
        };
        let area = if random.below(2) == 0 { sectors / 16 } else { sectors };
        let length = length.min(sectors);
        let mut first = random.below(area.max(1)).min(sectors - length);
        if random.below(4) == 0 {
            first &= !7;
        }
        let overlaps = |job: &Job| {
            first < job.extent.first + job.extent.count && job.extent.first < first + length
        };
        if !jobs.iter().any(overlaps) {
            let extent = Extent { first, count: length };
            let kind = match random.below(6) {
                0 if trim => Kind::Zeros,
                1 if trim => Kind::Discard,
                _ => Kind::Write,
            };
            jobs.push(Job { seq: first_seq + jobs.len() as u64, kind, extent });
        }
    }
    jobs
}

mod ioctl {
    nix::ioctl_write_ptr_bad!(
        /// `BLKDISCARD` of the two numbers, offset and length in bytes.
        blkdiscard,
        nix::request_code_none!(0x12, 119),
        [u64; 2]
    );
}

/// A discard, or a write of zeros; a file cannot discard, and gets a hole.
fn without_payload(device: &File, job: Job) -> io::Result<()> {
    let (offset, length) = (job.extent.first * SECTOR_U64, job.extent.count * SECTOR_U64);
    if job.kind == Kind::Discard && device.metadata()?.file_type().is_block_device() {
        // SAFETY: the kernel reads two numbers from the array, which outlives the call.
        unsafe { ioctl::blkdiscard(device.as_raw_fd(), &[offset, length]) }?;
        return Ok(());
    }
    // Every second may give the space back, the others keep it.
    let flags = if job.seq.is_multiple_of(2) || job.kind == Kind::Discard {
        FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE
    } else {
        FallocateFlags::FALLOC_FL_ZERO_RANGE
    };
    let signed = |number: u64| i64::try_from(number).map_err(io::Error::other);
    fallocate(device, flags, signed(offset)?, signed(length)?)?;
    Ok(())
}

/// Writes the jobs of one thread.
fn perform(device: &File, jobs: &[Job], identity: u64) -> io::Result<()> {
    let longest = jobs.iter().map(|job| job.extent.count).max().unwrap_or(0);
    let bytes = usize::try_from(longest).map_err(io::Error::other)? * SECTOR;
    let mut memory = vec![0; bytes + ALIGNMENT];
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    for job in jobs {
        if job.kind != Kind::Write {
            without_payload(device, *job)?;
            continue;
        }
        let length = usize::try_from(job.extent.count).map_err(io::Error::other)? * SECTOR;
        let buffer = &mut memory[start..start + length];
        for (sector, address) in buffer.chunks_mut(SECTOR).zip(job.extent.first..) {
            fill(sector, address * SECTOR_U64, job.seq, identity);
        }
        device.write_all_at(buffer, job.extent.first * SECTOR_U64)?;
    }
    Ok(())
}

/// Writes a batch and, at the same time, does the fsync for the one before.
fn round(device: &File, jobs: &[Job], sync: bool, threads: usize, id: u64) -> [io::Result<()>; 2] {
    let share = jobs.len().div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        let syncing = scope.spawn(|| if sync { device.sync_all() } else { Ok(()) });
        let writers: Vec<_> =
            jobs.chunks(share).map(|jobs| scope.spawn(move || perform(device, jobs, id))).collect();
        let joined = |thread: std::thread::ScopedJoinHandle<'_, io::Result<()>>| {
            thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        };
        let mut written = Ok(());
        for writer in writers {
            written = written.and(joined(writer));
        }
        [written, joined(syncing)]
    })
}

fn device_size(device: &File) -> Result<u64> {
    let metadata = device.metadata()?;
    if metadata.file_type().is_block_device() {
        let end = lseek(device, 0, Whence::SeekEnd).context("cannot find the device's size")?;
        return Ok(u64::try_from(end)?);
    }
    Ok(metadata.len())
}

fn write(
    device_path: &Path,
    log_path: &Path,
    seed: u64,
    span: Option<u64>,
    limits: &Limits,
) -> Result<()> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(device_path)
        .with_context(|| format!("cannot open {}", device_path.display()))?;
    let size = device_size(&device)?;
    let mut output = OpenOptions::new().append(true).create(true).open(log_path)?;
    let mut log = if output.metadata()?.len() == 0 {
        let span = span.unwrap_or(size) / SECTOR_U64 * SECTOR_U64;
        let log = Log { identity: seed, span, ..Log::default() };
        writeln!(output, "log {} {}", log.identity, log.span)?;
        log
    } else {
        Log::parse(BufReader::new(File::open(log_path)?))?
    };
    ensure!(log.span > 0 && log.span <= size, "span {} on {size} bytes", log.span);

    let mut random = Prng::new(seed ^ log.last_seq);
    let first_seq = log.last_seq + 1;
    let mut unsynced: Option<(u64, u64)> = None;
    let mut durable = 0;
    let ended = loop {
        let done = log.last_seq + 1 - first_seq;
        let count = limits.sync_every.max(1).min(limits.writes - done);
        let jobs = batch(&mut random, log.last_seq + 1, count, log.span, limits.trim);
        let mut lines = String::new();
        for Job { seq, kind, extent: Extent { first, count } } in &jobs {
            lines.push_str(&format!("{} {seq} {first} {count}\n", kind.letter()));
        }
        output.write_all(lines.as_bytes())?;
        let sync = unsynced.is_some() && !limits.acknowledged;
        let [written, synced] = round(&device, &jobs, sync, limits.threads, log.identity);
        if let (Ok(()), Some((from, to))) = (&synced, unsynced.take()) {
            writeln!(output, "d {from} {to}")?;
            durable += to + 1 - from;
        }
        if let Err(error) = written.and(synced) {
            break error;
        }
        if jobs.is_empty() {
            println!("{}", json!({"ended": "writes", "writes": done, "durable": durable}));
            return Ok(());
        }
        let last = log.last_seq + count;
        unsynced = Some((log.last_seq + 1, last));
        log.last_seq = last;
    };
    // A device that has died says so, or has no bytes any more. Anything else is for a person.
    let died = match ended.raw_os_error() {
        Some(libc::EIO | libc::ENXIO | libc::ENODEV) => true,
        Some(libc::ENOSPC) => device_size(&device).is_ok_and(|size| size == 0),
        _ => false,
    };
    if !died {
        return Err(ended).context("unexpected failure of the device");
    }
    let writes = log.last_seq + 1 - first_seq;
    println!("{}", json!({"ended": ended.to_string(), "writes": writes, "durable": durable}));
    Ok(())
}

// --- verify ---------------------------------------------------------------------------------

/// What verification counted, and the first few complaints.
#[derive(Debug, Default)]
struct Verdict {
    durable: u64,
    newer: u64,
    undecided: u64,
    untouched: u64,
    lost: u64,
    old: u64,
    foreign: u64,
    torn: u64,
    complaints: Vec<String>,
    /// For `--pin`: sectors for which several values were allowed, and the one found.
    seen: Vec<(u64, u64)>,
}

impl Verdict {
    fn good(&self) -> bool {
        self.lost + self.old + self.foreign + self.torn == 0
    }

    fn complain(&mut self, sector: u64, content: Content, expected: Option<&Expected>) {
        if self.complaints.len() < 10 {
            let address = sector * SECTOR_U64;
            let expected = expected.map(|e| (e.durable, &e.maybe));
            self.complaints.push(format!(
                "sector {sector} (byte {address}): {content:?}, expected (durable, maybe) \
                 {expected:?}"
            ));
        }
    }

    fn sector(&mut self, log: &Log, sector: u64, content: Content, base_is_zeros: bool) {
        let none = Expected::default();
        let expected = log.sectors.get(&sector);
        let Expected { durable, maybe } = expected.unwrap_or(&none);
        let allows = |&seq: &u64| log.allows(seq, content, base_is_zeros);
        // The newest that fits: what is seen has to stay, and zeros may be of several.
        let found = maybe.iter().copied().rev().find(allows).or(Some(*durable).filter(allows));
        let Some(seq) = found else {
            *match content {
                Content::Written { seq } if seq < *durable => &mut self.old,
                Content::Zeros | Content::Base if *durable != 0 => &mut self.lost,
                Content::Torn => &mut self.torn,
                // Never submitted for this sector, or nobody's at all.
                _ => &mut self.foreign,
            } += 1;
            self.complain(sector, content, expected);
            return;
        };
        *match seq {
            0 => &mut self.untouched,
            seq if seq == *durable => &mut self.durable,
            _ if *durable == 0 => &mut self.undecided,
            _ => &mut self.newer,
        } += 1;
        if !maybe.is_empty() {
            self.seen.push((sector, seq));
        }
    }
}

/// Checks the bytes of `image` from sector `first` on, which at the start were those of `base`.
fn check_bytes(log: &Log, first: u64, image: &[u8], base: &[u8], verdict: &mut Verdict) {
    for ((bytes, base), sector) in image.chunks(SECTOR).zip(base.chunks(SECTOR)).zip(first..) {
        let found = content(bytes, base, sector * SECTOR_U64, log.identity);
        verdict.sector(log, sector, found, base == [0; SECTOR]);
    }
}

/// Whether there is any data in the file from `start` to `end`. Errs on the side of yes.
fn has_data(file: &File, start: u64, end: u64) -> bool {
    let Ok(start) = i64::try_from(start) else { return true };
    match lseek(file, start, Whence::SeekData) {
        Ok(data) => u64::try_from(data).map_or(true, |data| data < end),
        Err(error) => error != nix::errno::Errno::ENXIO,
    }
}

/// Reads `bytes` from `offset` on; zeros behind the end.
fn read_padded(file: &File, bytes: &mut [u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64)? {
            0 => break,
            more => done += more,
        }
    }
    bytes[done..].fill(0);
    Ok(())
}

fn verify(image: &Path, log_path: &Path, base: Option<&Path>, pin: bool) -> Result<bool> {
    let log = Log::parse(BufReader::new(File::open(log_path).context("cannot open the log")?))?;
    let file = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
    let size = device_size(&file)?;
    ensure!(size >= log.span, "the image has {size} bytes, the record covers {}", log.span);
    // Of a device only what was written is read: it cannot say where its holes are.
    let device = file.metadata()?.file_type().is_block_device();
    let mut verdict = Verdict::default();
    let base = base.map(File::open).transpose().context("cannot open the base")?;
    let mut buffer = vec![0; usize::try_from(CHUNK)?];
    let mut beneath = buffer.clone();
    for start in (0..size).step_by(usize::try_from(CHUNK)?) {
        let end = size.min(start + CHUNK);
        let sectors = start / SECTOR_U64..end.div_ceil(SECTOR_U64);
        let written = log.sectors.range(sectors.clone()).next().is_some();
        if base.is_none() && !written && (device || !has_data(&file, start, end)) {
            verdict.untouched += sectors.end - sectors.start;
            continue;
        }
        let bytes = &mut buffer[..usize::try_from(end - start)?];
        file.read_exact_at(bytes, start)?;
        let beneath = &mut beneath[..bytes.len()];
        if let Some(base) = &base {
            read_padded(base, beneath, start)?;
        }
        check_bytes(&log, sectors.start, bytes, beneath, &mut verdict);
    }
    for complaint in &verdict.complaints {
        eprintln!("recorder: {complaint}");
    }
    if pin && verdict.good() {
        let lines: String = verdict.seen.iter().map(|(s, seq)| format!("o {s} {seq}\n")).collect();
        OpenOptions::new().append(true).open(log_path)?.write_all(lines.as_bytes())?;
    }
    let Verdict { durable, newer, undecided, untouched, lost, old, foreign, torn, .. } = verdict;
    println!(
        "{}",
        json!({
            "good": verdict.good(), "writes": log.last_seq, "durable_writes": log.durable_writes,
            "sectors_written": log.sectors.len(), "sectors_durable": durable,
            "sectors_newer": newer, "sectors_undecided": undecided, "sectors_untouched": untouched,
            "lost": lost, "old": old, "foreign": foreign, "torn": torn,
        })
    );
    Ok(verdict.good())
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: u64 = 7;

    fn log(text: &str) -> Log {
        Log::parse(format!("log {IDENTITY} 8192\n{text}").as_bytes()).unwrap()
    }

    /// An image of 16 sectors in which the sectors given hold the sequence numbers given.
    fn image(sectors: &[(u64, u64)]) -> Vec<u8> {
        let mut image = vec![0; 16 * SECTOR];
        for &(sector, seq) in sectors {
            let at = usize::try_from(sector).unwrap() * SECTOR;
            fill(&mut image[at..at + SECTOR], sector * SECTOR_U64, seq, IDENTITY);
        }
        image
    }

    fn judge(log: &Log, image: &[u8]) -> Verdict {
        judge_above(log, image, &vec![0; image.len()])
    }

    fn judge_above(log: &Log, image: &[u8], base: &[u8]) -> Verdict {
        let mut verdict = Verdict::default();
        check_bytes(log, 0, image, base, &mut verdict);
        verdict
    }

    /// Two writes to sectors 2 and 3, the first durable.
    const TWO: &str = "w 1 2 2\nd 1 1\nw 2 3 1\n";

    #[test]
    fn the_durable_value_and_a_later_one_are_right() {
        for (third, newer) in [(1, 0), (2, 1)] {
            let verdict = judge(&log(TWO), &image(&[(2, 1), (3, third)]));
            assert!(verdict.good(), "{verdict:?}");
            assert_eq!(verdict.newer, newer);
            assert_eq!(verdict.untouched, 14);
        }
    }

    #[test]
    fn a_sector_without_durable_value_may_be_zeros_or_any_submitted_value() {
        let log = log("w 1 5 1\nw 2 5 1\n");
        for sectors in [&[][..], &[(5, 1)], &[(5, 2)]] {
            assert!(judge(&log, &image(sectors)).good());
        }
    }

    #[test]
    fn a_lost_sector_is_found() {
        let verdict = judge(&log(TWO), &image(&[(2, 1)]));
        assert_eq!((verdict.good(), verdict.lost), (false, 1));
    }

    #[test]
    fn an_old_value_is_found() {
        let log = log("w 1 2 2\nd 1 1\nw 2 3 1\nd 2 2\n");
        let verdict = judge(&log, &image(&[(2, 1), (3, 1)]));
        assert_eq!((verdict.good(), verdict.old), (false, 1));
    }

    #[test]
    fn a_sector_of_another_address_is_foreign() {
        let mut image = image(&[(2, 1), (3, 1)]);
        image.copy_within(2 * SECTOR..3 * SECTOR, 3 * SECTOR);
        let verdict = judge(&log(TWO), &image);
        assert_eq!((verdict.good(), verdict.foreign), (false, 1));
    }

    #[test]
    fn bytes_of_somebody_else_are_foreign_also_where_nothing_was_written() {
        for at in [2, 9] {
            let mut image = image(&[(2, 1), (3, 1)]);
            image[at * SECTOR..(at + 1) * SECTOR].fill(0xaa);
            let verdict = judge(&log(TWO), &image);
            assert_eq!((verdict.good(), verdict.foreign), (false, 1));
        }
    }

    #[test]
    fn a_value_never_submitted_for_the_sector_is_foreign() {
        let verdict = judge(&log(TWO), &image(&[(2, 2), (3, 2)]));
        assert_eq!((verdict.good(), verdict.foreign), (false, 1));
    }

    #[test]
    fn a_sector_of_another_log_is_foreign() {
        let mut image = image(&[(2, 1), (3, 1)]);
        fill(&mut image[2 * SECTOR..3 * SECTOR], 2 * SECTOR_U64, 1, IDENTITY + 1);
        assert_eq!(judge(&log(TWO), &image).foreign, 1);
    }

    #[test]
    fn a_torn_sector_is_found() {
        for byte in [8, 20, 33, 300, 507, 511] {
            let mut image = image(&[(2, 1), (3, 1)]);
            image[2 * SECTOR + byte] ^= 1;
            let verdict = judge(&log(TWO), &image);
            assert_eq!((verdict.good(), verdict.torn), (false, 1), "byte {byte}");
        }
        let mut image = image(&[(2, 1), (3, 1)]);
        image[2 * SECTOR + 256..3 * SECTOR].fill(0);
        assert_eq!(judge(&log(TWO), &image).torn, 1);
    }

    #[test]
    fn a_write_that_failed_does_not_become_durable_by_a_later_session() {
        // 1 was in flight at the kill; 2 is of the next session, elsewhere.
        let log = log("w 1 5 1\nw 2 6 1\nd 2 2\n");
        assert!(judge(&log, &image(&[(6, 2)])).good());
        assert!(judge(&log, &image(&[(5, 1), (6, 2)])).good());
    }

    #[test]
    fn what_was_seen_after_a_crash_has_to_stay() {
        let mut log = log("w 1 5 1\n");
        assert_eq!(judge(&log, &image(&[(5, 1)])).seen, [(5, 1)]);
        assert_eq!(judge(&log, &image(&[])).seen, [(5, 0)]);
        log.event("o 5 0").unwrap();
        assert_eq!(judge(&log, &image(&[(5, 1)])).foreign, 1, "a write that landed late");
        log.event("o 5 1").unwrap();
        assert_eq!(judge(&log, &image(&[])).lost, 1);
    }

    #[test]
    fn after_a_discard_there_are_zeros_or_what_was_there() {
        let log = log("w 1 5 1\nd 1 1\nt 2 5 1\nd 2 2\n");
        assert!(judge(&log, &image(&[])).good());
        assert!(judge(&log, &image(&[(5, 1)])).good());
        let base = image(&[(7, 1)]);
        let verdict = judge_above(&log, &base, &base);
        assert!(verdict.good() && verdict.untouched == 16 - 1, "{verdict:?}");
    }

    #[test]
    fn a_write_after_a_discard_stays() {
        let log = log("w 1 5 1\nd 1 1\nt 2 5 1\nd 2 2\nw 3 5 1\nd 3 3\n");
        assert!(judge(&log, &image(&[(5, 3)])).good());
        assert_eq!(judge(&log, &image(&[])).lost, 1);
        assert_eq!(judge(&log, &image(&[(5, 1)])).old, 1);
    }

    #[test]
    fn zeros_that_were_written_stay() {
        let log = log("w 1 5 1\nd 1 1\nz 2 5 1\nd 2 2\n");
        assert!(judge(&log, &image(&[])).good());
        assert_eq!(judge(&log, &image(&[(5, 1)])).old, 1);
    }

    #[test]
    fn zeros_where_the_base_has_content_need_a_reason() {
        let mut base = image(&[]);
        base[5 * SECTOR..6 * SECTOR].fill(0xbb);
        for (text, zeros, beneath) in [
            ("", false, true),
            ("t 1 5 1\nd 1 1\n", true, true),
            ("z 1 5 1\n", true, true),
            ("z 1 5 1\nd 1 1\n", true, false),
        ] {
            let log = log(text);
            assert_eq!(judge_above(&log, &image(&[]), &base).good(), zeros, "{text}");
            assert_eq!(judge_above(&log, &base, &base).good(), beneath, "{text}");
        }
    }

    #[test]
    fn batches_do_not_overlap_and_stay_inside() {
        let mut random = Prng::new(3);
        for _ in 0..100 {
            let mut jobs = batch(&mut random, 1, 8, 1 << 20, true);
            jobs.sort_by_key(|job| job.extent.first);
            for pair in jobs.windows(2) {
                assert!(pair[0].extent.first + pair[0].extent.count <= pair[1].extent.first);
            }
            let last = jobs.last().unwrap().extent;
            assert!(last.first + last.count <= 2048);
        }
    }

    #[test]
    fn what_was_written_to_a_file_verifies_and_a_hole_in_it_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let (file, log) = (folder.path().join("raw"), folder.path().join("log"));
        File::create(&file).unwrap().set_len(8 << 20).unwrap();
        let limits =
            Limits { sync_every: 8, threads: 4, writes: 60, trim: true, acknowledged: false };
        // In memory O_DIRECT may be refused; then there is nothing to test here.
        let refused = |error: &anyhow::Error| {
            let error = error.downcast_ref::<io::Error>();
            error.and_then(io::Error::raw_os_error) == Some(libc::EINVAL)
        };
        for seed in 1..3 {
            match write(&file, &log, seed, Some(4 << 20), &limits) {
                Err(error) if refused(&error) => return,
                result => result.unwrap(),
            }
            assert!(verify(&file, &log, None, true).unwrap());
        }
        let parsed = Log::parse(BufReader::new(File::open(&log).unwrap())).unwrap();
        assert_eq!((parsed.last_seq, parsed.durable_writes), (120, 120));
        let first = *parsed.sectors.keys().next().unwrap();
        let raw = OpenOptions::new().write(true).open(&file).unwrap();
        raw.write_all_at(&[0; SECTOR], first * SECTOR_U64).unwrap();
        assert!(!verify(&file, &log, None, false).unwrap());
    }
}
