//! `qemu-img` as the second judge of a sample of states.

use std::path::PathBuf;
use std::process::Command;
use std::string::{String, ToString};
use std::vec::Vec;

use crate::testing::disk::bytes_of;
use crate::testing::guest::{Demand, describe};
use crate::testing::image::BACKING_NAME;
use crate::testing::pool::{SECTOR, SectorId, SharedPool};

fn scratch() -> std::io::Result<PathBuf> {
    let id = std::thread::current().id();
    let dir = std::env::temp_dir().join(std::format!("qcow2-{}-{id:?}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

fn run(args: &[&str]) -> Result<(Option<i32>, String), String> {
    let out = Command::new("qemu-img").args(args).output();
    let out = out.map_err(|error| std::format!("qemu-img cannot be run: {error}"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    Ok((out.status.code(), text + &String::from_utf8_lossy(&out.stderr)))
}

/// Judges a state with `qemu-img check` and `qemu-img convert`.
///
/// # Errors
/// What `qemu-img` finds wrong, or that it cannot be run.
pub fn judge(
    (sectors, len): (&[SectorId], u64),
    backing: &[SectorId],
    demand: &Demand,
    pool: &SharedPool,
) -> Result<(), String> {
    let io = |error: std::io::Error| error.to_string();
    let dir = scratch().map_err(io)?;
    let result = judge_in(&dir, bytes_of(sectors, len, pool), backing, demand, pool);
    std::fs::remove_dir_all(&dir).map_err(io)?;
    result
}

fn judge_in(
    dir: &std::path::Path,
    image: Vec<u8>,
    backing: &[SectorId],
    demand: &Demand,
    pool: &SharedPool,
) -> Result<(), String> {
    let io = |error: std::io::Error| error.to_string();
    let (path, raw) = (dir.join("state.qcow2"), dir.join("state.raw"));
    std::fs::write(&path, image).map_err(io)?;
    if !backing.is_empty() {
        let bytes = bytes_of(backing, (backing.len() * SECTOR) as u64, pool);
        std::fs::write(dir.join(BACKING_NAME), bytes).map_err(io)?;
    }
    let (name, raw_name) = (path.to_string_lossy(), raw.to_string_lossy());
    let (code, text) = run(&["check", "-f", "qcow2", &name])?;
    if !matches!(code, Some(0 | 3)) {
        return Err(std::format!("qemu-img check says: {text}"));
    }
    let (code, text) = run(&["convert", "-f", "qcow2", "-O", "raw", &name, &raw_name])?;
    if code != Some(0) {
        return Err(std::format!("qemu-img convert says: {text}"));
    }
    let bytes = std::fs::read(&raw).map_err(io)?;
    if bytes.len() != demand.len() * SECTOR {
        return Err(std::format!("qemu-img convert has written {} bytes", bytes.len()));
    }
    for (place, chunk) in bytes.chunks(SECTOR).enumerate() {
        let id = pool.borrow_mut().intern(chunk);
        if !demand.of(place).contains(&id) {
            let found = describe(&pool.borrow(), id);
            return Err(std::format!("qemu-img convert finds {found} in guest sector {place}"));
        }
    }
    Ok(())
}
