//! The header parser against headers with one thing changed at a time.

use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use super::*;
use crate::error::OpenErrorKind;

const LEN: u64 = 4 << 16;

/// A version 3 header as `qemu-img create -f qcow2 x 1G` makes it: L1 in cluster 3, refcount table
/// in cluster 1.
fn plain() -> Vec<u8> {
    let mut bytes = vec![0; 1 << 16];
    BigEndian::write_u32(&mut bytes[0..], MAGIC);
    BigEndian::write_u32(&mut bytes[4..], 3);
    BigEndian::write_u32(&mut bytes[20..], 16);
    BigEndian::write_u64(&mut bytes[24..], 1 << 30);
    BigEndian::write_u32(&mut bytes[36..], 2);
    BigEndian::write_u64(&mut bytes[40..], 3 << 16);
    BigEndian::write_u64(&mut bytes[48..], 1 << 16);
    BigEndian::write_u32(&mut bytes[56..], 1);
    BigEndian::write_u32(&mut bytes[96..], 4);
    BigEndian::write_u32(&mut bytes[100..], 112);
    bytes
}

/// Parses `plain()` with one change and returns the error.
fn refused(change: impl FnOnce(&mut Vec<u8>)) -> (OpenErrorKind, String) {
    let mut bytes = plain();
    change(&mut bytes);
    let error = Header::parse(&bytes, LEN, false).expect_err("this header is bad");
    (error.kind(), error.to_string())
}

#[test]
fn a_plain_header_is_taken() {
    let header = Header::parse(&plain(), LEN, false).unwrap();
    assert_eq!(header.virtual_size(), 1 << 30);
    assert_eq!(header.l1_extent(), Extent { offset: 3 << 16, len: 16 });
    assert_eq!(header.refcount_table_extent(), Extent { offset: 1 << 16, len: 1 << 16 });
    assert_eq!(Header::needed(&plain()[..512]), Ok(1 << 16));
}

#[test]
fn every_feature_that_is_not_served_is_named_with_its_field() {
    type Case = (&'static str, &'static str, fn(&mut Vec<u8>));
    let cases: [Case; 5] = [
        ("AES", "crypt_method", |b| BigEndian::write_u32(&mut b[32..], 1)),
        ("LUKS", "crypt_method", |b| BigEndian::write_u32(&mut b[32..], 2)),
        ("dirty", "incompatible_features", |b| b[79] = 1),
        ("corrupt", "incompatible_features", |b| b[79] = 2),
        ("bit 5", "incompatible_features", |b| b[79] = 32),
    ];
    for (name, field, change) in cases {
        let (kind, text) = refused(change);
        assert_eq!(kind, OpenErrorKind::Unsupported, "{name}: {text}");
        assert!(text.contains(name) && text.contains(field), "{name}, {field}: {text}");
    }
}

#[test]
fn features_that_are_served_are_understood() {
    let parse = |change: fn(&mut Vec<u8>)| {
        let mut bytes = plain();
        change(&mut bytes);
        Header::parse(&bytes, LEN, false).unwrap()
    };
    assert!(parse(|b| (b[79], b[39]) = (16, 4)).geometry().has_extended_l2());
    assert_eq!(parse(|b| b[99] = 0).geometry().refcount_width(), 1);
    assert_eq!(parse(|b| b[99] = 6).geometry().refcount_width(), 64);
    let zstd = parse(|b| (b[79], b[104]) = (8, 1));
    assert_eq!(zstd.compression(), Compression::Zstd);
    let raw = parse(|b| (b[79], b[95]) = (4, 2));
    assert_eq!(raw.data_file(), Some(&DataFile { name: None, raw: true }));
    // Cluster 2, 64 KiB each.
    let snapshots = parse(|b| (b[63], b[69]) = (3, 2));
    assert_eq!(snapshots.snapshots(), Some(Directory { offset: 2 << 16, entries: 3 }));
}

#[test]
fn there_are_as_many_snapshots_as_qemu_makes() {
    let parse = |entries| {
        let mut bytes = plain();
        BigEndian::write_u32(&mut bytes[60..], entries);
        BigEndian::write_u64(&mut bytes[64..], 4 << 16);
        Header::parse(&bytes, 64 << 16, false)
    };
    assert_eq!(parse(65536).unwrap().snapshots().unwrap().entries, 65536);
    assert!(parse(65537).unwrap_err().to_string().contains("at most 65536"));
}

#[test]
fn images_for_reading_only_may_be_dirty_or_corrupt() {
    let mut bytes = plain();
    bytes[79] = 3;
    let header = Header::parse(&bytes, LEN, true).unwrap();
    assert!(header.is_dirty() && header.is_corrupt());
}

#[test]
fn unknown_autoclear_bits_are_cleared_before_anything_is_written() {
    let mut bytes = plain();
    (bytes[88], bytes[95]) = (0x80, 5);
    let header = Header::parse(&bytes, LEN, false).unwrap();
    assert!(header.rewrite);
    assert_eq!(header.first_bytes(512)[88..96], [0, 0, 0, 0, 0, 0, 0, 1]);
    let header = Header::parse(&bytes, LEN, true).unwrap();
    assert!(!header.rewrite);
    assert_eq!(header.first_bytes(512)[88..96], bytes[88..96]);
}

#[test]
fn a_backing_file_is_named_with_its_format() {
    let mut bytes = plain();
    BigEndian::write_u64(&mut bytes[8..], 300);
    BigEndian::write_u32(&mut bytes[16..], 8);
    bytes[300..308].copy_from_slice(b"base.raw");
    BigEndian::write_u32(&mut bytes[112..], 0xe279_2aca);
    BigEndian::write_u32(&mut bytes[116..], 3);
    bytes[120..123].copy_from_slice(b"raw");
    let header = Header::parse(&bytes, LEN, false).unwrap();
    let backing = header.backing().unwrap();
    assert_eq!(
        (&backing.name[..], backing.format.as_deref()),
        (&b"base.raw"[..], Some(&b"raw"[..]))
    );
    for offset in [8, 1 << 16, (1 << 16) - 4, u64::MAX] {
        BigEndian::write_u64(&mut bytes[8..], offset);
        let error = Header::parse(&bytes, LEN, false).expect_err("the name lies elsewhere");
        assert_eq!(error.kind(), OpenErrorKind::Malformed, "{offset}: {error}");
    }
}

#[test]
fn an_unknown_feature_is_called_what_the_image_calls_it() {
    let (_, text) = refused(|b| {
        b[79] = 128;
        BigEndian::write_u32(&mut b[112..], 0x6803_f857);
        BigEndian::write_u32(&mut b[116..], 48);
        b[121] = 7;
        b[122..127].copy_from_slice(b"warp\x1b");
    });
    assert!(text.contains("\"warp?\""), "{text}");
}

#[test]
fn fields_outside_their_bounds_are_refused() {
    let bad: [fn(&mut Vec<u8>); 13] = [
        |b| BigEndian::write_u32(&mut b[20..], 8),
        |b| BigEndian::write_u32(&mut b[20..], 22),
        |b| BigEndian::write_u32(&mut b[100..], 96),
        |b| BigEndian::write_u32(&mut b[100..], 113),
        |b| BigEndian::write_u32(&mut b[100..], (1 << 16) + 8),
        |b| BigEndian::write_u64(&mut b[24..], 0),
        |b| BigEndian::write_u64(&mut b[24..], u64::MAX),
        |b| BigEndian::write_u32(&mut b[36..], 1),
        |b| BigEndian::write_u32(&mut b[36..], u32::MAX),
        |b| BigEndian::write_u64(&mut b[40..], LEN),
        |b| BigEndian::write_u64(&mut b[48..], !0xffff),
        |b| BigEndian::write_u32(&mut b[56..], 0),
        |b| BigEndian::write_u32(&mut b[116..], u32::MAX),
    ];
    for (index, change) in bad.into_iter().enumerate() {
        let (kind, text) = refused(|b| {
            BigEndian::write_u32(&mut b[112..], 0xdead_beef);
            change(b);
        });
        assert_eq!(kind, OpenErrorKind::Malformed, "case {index}: {text}");
    }
}

#[test]
fn no_prefix_of_a_header_panics() {
    let bytes = plain();
    for len in 0..200 {
        let _ = Header::needed(&bytes[..len]);
        let _ = Header::parse(&bytes[..len], len as u64, false);
    }
}

#[test]
fn what_is_not_qcow2_is_called_so() {
    assert_eq!(refused(|b| b[0] = 0).0, OpenErrorKind::NotQcow2);
    assert_eq!(refused(|b| b[7] = 1).0, OpenErrorKind::Unsupported);
    assert_eq!(refused(|b| b[7] = 4).0, OpenErrorKind::Unsupported);
}
