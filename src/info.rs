//! `info`: what an image says of itself.

use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use qcow2::check::ReadAt;
use qcow2::info::{Bitmap, Feature, Info, Snapshot, info};
use serde_json::{Map, Value, json};

use crate::cli::{InfoArgs, Output};
use crate::image_file::ImageFile;
use crate::list;

/// Runs `info`.
pub fn run(args: &InfoArgs) -> Result<()> {
    let image = ImageFile::open(&args.file, false)?;
    let told = info(&image).map_err(|error| image.explain(error.into()))?;
    let disk = image.file.metadata().context("fstat")?.blocks().saturating_mul(512);
    let shown = Shown { path: &args.file, image: &image, info: told, disk };
    let text = match args.output {
        Output::Json => serde_json::to_string_pretty(&shown.json())? + "\n",
        Output::Human => {
            let mut text = String::new();
            shown.text(&mut text)?;
            text
        }
    };
    io::stdout().write_all(text.as_bytes()).context("writing to stdout")
}

/// What is shown.
struct Shown<'a> {
    path: &'a Path,
    image: &'a ImageFile,
    info: Info,
    /// Bytes on disk.
    disk: u64,
}

/// A name from an image, as text that does a terminal no harm.
fn safe(name: &[u8]) -> String {
    list::plain(&String::from_utf8_lossy(name))
}

fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

impl Shown<'_> {
    /// The fields of `qemu-img info --output=json`, and the features.
    fn json(&self) -> Value {
        let info = &self.info;
        let name = self.path.to_string_lossy();
        let mut fields = Map::new();
        let mut put = |name: &str, value: Value| fields.insert(name.to_string(), value);
        put("filename", json!(name));
        put("format", json!("qcow2"));
        put("virtual-size", json!(info.virtual_size));
        put("cluster-size", json!(1_u64 << info.cluster_bits));
        put("actual-size", json!(self.disk));
        put("dirty-flag", json!(info.dirty()));
        put("format-specific", json!({ "type": "qcow2", "data": self.specific() }));
        let file = json!({
            "children": [],
            "virtual-size": self.image.len().next_multiple_of(512),
            "filename": name,
            "format": self.image.protocol(),
            "actual-size": self.disk,
            "format-specific": { "type": self.image.protocol(), "data": {} },
            "dirty-flag": false,
        });
        put("children", json!([{ "name": "file", "info": file }]));
        if info.encryption != 0 {
            put("encrypted", json!(true));
        }
        if let Some(backing) = &info.backing {
            put("backing-filename", json!(lossy(backing)));
            put("full-backing-filename", json!(self.full(&lossy(backing))));
        }
        if let Some(format) = &info.backing_format {
            put("backing-filename-format", json!(lossy(format)));
        }
        if !info.snapshots.is_empty() {
            put("snapshots", info.snapshots.iter().map(snapshot_json).collect());
        }
        let features = [
            ("incompatible", &info.incompatible),
            ("compatible", &info.compatible),
            ("autoclear", &info.autoclear),
        ];
        let features = features.map(|(kind, list)| (kind.to_string(), feature_json(list)));
        put("features", Value::Object(features.into_iter().collect()));
        if info.stale_bitmaps {
            put("stale-bitmaps", json!(true));
        }
        Value::Object(fields)
    }

    /// `format-specific`, `data`.
    fn specific(&self) -> Value {
        let info = &self.info;
        let mut data = Map::new();
        let mut put = |name: &str, value: Value| data.insert(name.to_string(), value);
        put("compat", json!(if info.version == 2 { "0.10" } else { "1.1" }));
        put("compression-type", json!(compression(info.compression)));
        put("refcount-bits", json!(1_u64 << info.refcount_order));
        if info.version >= 3 {
            put("lazy-refcounts", json!(info.lazy_refcounts()));
            put("corrupt", json!(info.corrupt()));
            put("extended-l2", json!(info.extended_l2()));
        }
        if info.external_data() {
            if let Some(name) = &info.data_file {
                put("data-file", json!(lossy(name)));
            }
            put("data-file-raw", json!(info.raw_data()));
        }
        if info.encryption != 0 {
            put("encrypt", json!({ "format": encryption(info.encryption) }));
        }
        if !info.bitmaps.is_empty() {
            put("bitmaps", info.bitmaps.iter().map(bitmap_json).collect());
        }
        Value::Object(data)
    }

    /// The name of the backing file from where we are, as QEMU would say it.
    fn full(&self, backing: &str) -> String {
        let colon = backing.find(':').unwrap_or(backing.len());
        let has_protocol = colon < backing.find('/').unwrap_or(backing.len());
        let image = self.path.to_string_lossy();
        match image.rfind('/') {
            Some(slash) if !backing.starts_with('/') && !has_protocol => {
                format!("{}{backing}", &image[..=slash])
            }
            _ => backing.to_string(),
        }
    }

    fn text(&self, out: &mut String) -> fmt::Result {
        let info = &self.info;
        writeln!(out, "image: {}", list::plain(&self.path.to_string_lossy()))?;
        writeln!(out, "format: qcow2, version {}", info.version)?;
        writeln!(out, "virtual size: {}", size(info.virtual_size))?;
        writeln!(out, "file length: {}", size(self.image.len()))?;
        writeln!(out, "size on disk: {}", size(self.disk))?;
        writeln!(out, "cluster size: {}", size(1 << info.cluster_bits))?;
        writeln!(out, "refcount bits: {}", 1_u64 << info.refcount_order)?;
        writeln!(out, "compression: {}", compression(info.compression))?;
        if info.encryption != 0 {
            writeln!(out, "encryption: {}", encryption(info.encryption))?;
        }
        if let Some(backing) = &info.backing {
            writeln!(out, "backing file: {}", safe(backing))?;
            let format = info.backing_format.as_deref().map_or("not declared".to_string(), safe);
            writeln!(out, "backing format: {format}")?;
        }
        if info.external_data() {
            let name = info.data_file.as_deref().map_or("not named".to_string(), safe);
            let raw = if info.raw_data() { " (raw)" } else { "" };
            writeln!(out, "data file: {name}{raw}")?;
        }
        for (kind, features) in [
            ("incompatible", &info.incompatible),
            ("compatible", &info.compatible),
            ("autoclear", &info.autoclear),
        ] {
            for feature in features {
                writeln!(out, "{kind} feature: {}", feature_text(feature))?;
            }
        }
        for snapshot in &info.snapshots {
            writeln!(out, "snapshot: {}", snapshot_text(snapshot))?;
        }
        for Bitmap { name, granularity_bits, in_use, auto } in &info.bitmaps {
            let in_use = if *in_use { ", in use" } else { "" };
            let auto = if *auto { ", auto" } else { "" };
            let granularity = granularity(*granularity_bits);
            writeln!(out, "bitmap: {}, granularity {granularity}{auto}{in_use}", safe(name))?;
        }
        if info.stale_bitmaps {
            writeln!(out, "bitmaps: inconsistent, since the image was written without them")?;
        }
        Ok(())
    }
}

fn compression(kind: u8) -> String {
    match kind {
        0 => "zlib".to_string(),
        1 => "zstd".to_string(),
        _ => format!("unknown ({kind})"),
    }
}

fn encryption(method: u32) -> String {
    match method {
        1 => "aes".to_string(),
        2 => "luks".to_string(),
        _ => format!("unknown ({method})"),
    }
}

fn granularity(bits: u8) -> u64 {
    1_u64.checked_shl(bits.into()).unwrap_or(0)
}

fn feature_text(feature: &Feature) -> String {
    let name = if feature.name.is_empty() { "unnamed".to_string() } else { safe(&feature.name) };
    if feature.known { name } else { format!("{name} (bit {}, not known here)", feature.bit) }
}

fn feature_json(features: &[Feature]) -> Value {
    let features = features.iter().map(|feature| {
        json!({ "bit": feature.bit, "known": feature.known, "name": lossy(&feature.name) })
    });
    features.collect()
}

fn snapshot_json(snapshot: &Snapshot) -> Value {
    let mut json = json!({
        "id": lossy(&snapshot.id),
        "name": lossy(&snapshot.name),
        "vm-state-size": snapshot.vm_state,
        "date-sec": snapshot.seconds,
        "date-nsec": snapshot.nanoseconds,
        "vm-clock-sec": snapshot.vm_clock / 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock % 1_000_000_000,
    });
    if let Some(count) = snapshot.instructions {
        json["icount"] = json!(count);
    }
    json
}

fn bitmap_json(bitmap: &Bitmap) -> Value {
    let flags = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")];
    let flags: Vec<_> = flags.into_iter().filter(|flag| flag.0).map(|flag| flag.1).collect();
    json!({
        "name": lossy(&bitmap.name),
        "granularity": granularity(bitmap.granularity_bits),
        "flags": flags,
    })
}

fn snapshot_text(snapshot: &Snapshot) -> String {
    let Snapshot { id, name, seconds, vm_clock, vm_state, disk_size, .. } = snapshot;
    let clock = vm_clock / 1_000_000;
    let (hours, minutes) = (clock / 3_600_000, clock / 60_000 % 60);
    let clock = format!("{hours:02}:{minutes:02}:{:02}.{:03}", clock / 1000 % 60, clock % 1000);
    let disk = disk_size.map(|bytes| format!(", disk {}", size(bytes))).unwrap_or_default();
    let (id, name, date) = (safe(id), safe(name), date(*seconds));
    format!("{id}, {name}, {date}, VM clock {clock}, VM state {}{disk}", size(*vm_state))
}

/// A number of bytes, also in the largest unit that it has one of.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = bytes.max(1).ilog2() / 10;
    if unit == 0 {
        return format!("{bytes} bytes");
    }
    // In hundredths, since floating point would round the largest ones.
    let hundredths = (u128::from(bytes) * 100) >> (10 * unit);
    let (whole, part) = (hundredths / 100, hundredths % 100);
    let part = if part == 0 { String::new() } else { format!(".{part:02}") };
    format!("{whole}{part} {} ({bytes} bytes)", UNITS[unit as usize])
}

/// A time in UTC, from seconds since 1970, by the Gregorian calendar.
fn date(seconds: u32) -> String {
    let (mut days, time) = (seconds / 86_400, seconds % 86_400);
    let leap =
        |year: u32| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let mut year = 1970;
    while days >= 365 + u32::from(leap(year)) {
        days -= 365 + u32::from(leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u32::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year}-{month:02}-{:02} {hour:02}:{minute:02}:{second:02} UTC", days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_of_the_gregorian_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(date(1_795_254_680), "2026-11-21 09:51:20 UTC");
        assert_eq!(date(u32::MAX), "2106-02-07 06:28:15 UTC");
    }

    #[test]
    fn sizes_have_a_unit_and_the_bytes() {
        assert_eq!(size(0), "0 bytes");
        assert_eq!(size(1536), "1.50 KiB (1536 bytes)");
        assert_eq!(size(u64::MAX), "15.99 EiB (18446744073709551615 bytes)");
    }
}
