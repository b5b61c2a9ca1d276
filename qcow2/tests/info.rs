//! What images say of themselves: on the small images of `fixtures/`, whole and damaged at random.

#![expect(clippy::unwrap_used, reason = "a test may end so")]

use std::fs;
use std::path::Path;

use qcow2::info::{InfoError, info};

fn fixture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    let path = folder.join("images").join(name);
    fs::read(if path.exists() { path } else { folder.join("corrupt").join(name) }).unwrap()
}

#[test]
fn an_image_tells_of_snapshots_bitmaps_and_names() {
    let told = info(&fixture("snapshot.qcow2")[..]).unwrap();
    assert_eq!(told.snapshots.len(), 1);
    assert_eq!(told.snapshots[0].name, b"first");
    assert_eq!((told.snapshots[0].vm_state, told.snapshots[0].disk_size), (0, Some(262_144)));
    let told = info(&fixture("bitmap.qcow2")[..]).unwrap();
    assert!(told.bitmaps.len() == 1 && told.bitmaps[0].auto && !told.bitmaps[0].in_use);
    let told = info(&fixture("incompatible-named.qcow2")[..]).unwrap();
    let feature = &told.incompatible[0];
    assert_eq!((feature.bit, feature.known, &feature.name[..]), (5, false, &b"dirty bit"[..]));
    let told = info(&fixture("data-file-raw.qcow2")[..]).unwrap();
    assert!(told.external_data() && told.raw_data());
    assert_eq!(told.data_file.unwrap(), b"data.img");
    assert_eq!(info(&fixture("version-1.qcow2")[..]), Err(InfoError::Version(1)));
}

#[test]
fn bitmaps_that_were_not_kept_are_not_read() {
    let mut image = fixture("bitmap.qcow2");
    image[95] &= !1;
    let told = info(&image[..]).unwrap();
    assert!(told.bitmaps.is_empty() && told.stale_bitmaps);
}

#[test]
fn a_directory_that_leaves_the_file_is_an_error() {
    let mut image = fixture("snapshot.qcow2");
    image[60..64].copy_from_slice(&60_000_u32.to_be_bytes());
    let told = info(&image[..]);
    assert!(matches!(told, Err(InfoError::Entry { of: "snapshot table", .. })), "{told:?}");
    image[64..72].copy_from_slice(&u64::MAX.to_be_bytes());
    let told = info(&image[..]);
    assert!(matches!(told, Err(InfoError::Entry { of: "snapshot table", .. })), "{told:?}");
}

#[test]
fn no_damage_makes_it_panic() {
    let names = ["snapshot", "bitmap", "incompatible-named", "data-file", "backing-file-raw"];
    let images = names.map(|name| fixture(&format!("{name}.qcow2")));
    let mut seed = 1_u64;
    // Knuth's constants, and the upper bits.
    let mut dice = |end: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).unwrap() % end
    };
    let mut told = 0;
    for nth in 0..60_000 {
        let mut image = images[nth % images.len()].clone();
        for _ in 0..=dice(6) {
            let span = if dice(2) == 0 { 400 } else { image.len() };
            image[dice(span)] ^= 1 << dice(8);
        }
        if dice(8) == 0 {
            image.truncate(dice(1200));
        }
        told += usize::from(info(&image[..]).is_ok());
    }
    assert!(told > 10_000, "{told}");
}
