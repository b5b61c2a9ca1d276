//! `qemu-img` as the second judge of a sample of states.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::string::{String, ToString};
use std::vec::Vec;

use crate::testing::disk::bytes_of;
use crate::testing::guest::{Demand, describe};
use crate::testing::image::{BACKING_NAME, DATA_NAME, MIDDLE_NAME};
use crate::testing::judge::State;
use crate::testing::pool::{SECTOR, SharedPool};

fn scratch() -> std::io::Result<PathBuf> {
    let id = std::thread::current().id();
    let dir = std::env::temp_dir().join(std::format!("qcow2-{}-{id:?}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

fn run(dir: &Path, args: &[&str]) -> Result<(Option<i32>, String), String> {
    let out = Command::new("qemu-img").args(args).current_dir(dir).output();
    let out = out.map_err(|error| std::format!("qemu-img cannot be run: {error}"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    Ok((out.status.code(), text + &String::from_utf8_lossy(&out.stderr)))
}

/// Judges a state with `qemu-img check` and `qemu-img convert`, of the disk and of its snapshots.
///
/// # Errors
/// What `qemu-img` finds wrong, or that it cannot be run.
pub fn judge(state: State, demand: &Demand, pool: &SharedPool) -> Result<(), String> {
    let io = |error: std::io::Error| error.to_string();
    let dir = scratch().map_err(io)?;
    let result = judge_in(&dir, state, demand, pool);
    std::fs::remove_dir_all(&dir).map_err(io)?;
    result
}

fn judge_in(dir: &Path, state: State, demand: &Demand, pool: &SharedPool) -> Result<(), String> {
    let put = |name: &str, bytes: &[u8]| {
        std::fs::write(dir.join(name), bytes).map_err(|error| error.to_string())
    };
    put("state.qcow2", &bytes_of(state.sectors, state.len, pool))?;
    for file in &state.setting.files {
        put(if file.qcow2 { MIDDLE_NAME } else { BACKING_NAME }, &file.bytes)?;
    }
    if !state.data.is_empty() {
        put(DATA_NAME, &bytes_of(state.data, (state.data.len() * SECTOR) as u64, pool))?;
    }
    let (code, text) = run(dir, &["check", "-f", "qcow2", "state.qcow2"])?;
    if !matches!(code, Some(0 | 3)) {
        return Err(std::format!("qemu-img check says: {text}"));
    }
    let found = convert(dir, &[])?;
    if found.len() != demand.len() * SECTOR {
        return Err(std::format!("qemu-img convert has written {} bytes", found.len()));
    }
    for (place, chunk) in found.chunks(SECTOR).enumerate() {
        let known = demand.of(place).iter().any(|&id| state.pool.bytes(id) == *chunk);
        if !known {
            let may = demand.of(place).iter().map(|&id| describe(state.pool, id));
            let may: Vec<String> = may.collect();
            return Err(std::format!("qemu-img convert: guest sector {place} is none of {may:?}"));
        }
    }
    for (number, kept) in state.setting.snapshots.iter().enumerate() {
        let found = convert(dir, &["-l", &std::format!("snapshot.id={}", number + 1)])?;
        let wanted: Vec<u8> = kept.iter().flat_map(|&id| state.pool.bytes(id)).collect();
        if found != wanted {
            return Err(std::format!("qemu-img convert finds snapshot {number} changed"));
        }
    }
    Ok(())
}

/// What `qemu-img` reads.
fn convert(dir: &Path, options: &[&str]) -> Result<Vec<u8>, String> {
    let mut args = std::vec!["convert", "-f", "qcow2", "-O", "raw"];
    args.extend(options);
    args.extend(["state.qcow2", "state.raw"]);
    let (code, text) = run(dir, &args)?;
    if code != Some(0) {
        return Err(std::format!("qemu-img convert says: {text}"));
    }
    std::fs::read(dir.join("state.raw")).map_err(|error| error.to_string())
}
