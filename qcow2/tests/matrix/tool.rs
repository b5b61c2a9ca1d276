//! `qemu-img` and `qemu-io`.

use std::path::Path;
use std::process::Command;

/// Runs one of them in a folder.
///
/// # Errors
/// What it says where its exit status is not 0.
fn run(dir: &Path, program: &str, args: &[&str]) -> Result<String, String> {
    let out = Command::new(program).current_dir(dir).args(args).output();
    let out = out.map_err(|error| format!("{program} cannot be run: {error}"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let text = text + &String::from_utf8_lossy(&out.stderr);
    if out.status.success() {
        return Ok(text);
    }
    let wrong: Vec<_> = text.lines().filter(|line| !is_report(line)).take(8).collect();
    Err(format!("{program} {}: {}", args.join(" "), wrong.join("; ")))
}

/// Does qemu-io say here that all went well?
fn is_report(line: &str) -> bool {
    line.starts_with("wrote ") || line.starts_with("discard ") || line.contains(" ops; ")
}

pub fn img(dir: &Path, args: &[&str]) -> Result<String, String> {
    run(dir, "qemu-img", args)
}

/// Runs commands of qemu-io on an image.
pub fn io(dir: &Path, image: &str, commands: &[String]) -> Result<String, String> {
    // Nothing here outlives the power; discards are carried out.
    let mut args = vec!["-f", "qcow2", "-t", "unsafe", "-d", "unmap"];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(image);
    run(dir, "qemu-io", &args)
}

/// What an image holds, as QEMU reads it.
pub fn content(dir: &Path, image: &str) -> Result<Vec<u8>, String> {
    let raw = format!("{image}.raw");
    img(dir, &["convert", "-f", "qcow2", "-O", "raw", image, &raw])?;
    let path = dir.join(raw);
    let bytes = std::fs::read(&path).map_err(|error| error.to_string())?;
    std::fs::remove_file(path).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// Neither an error nor a leak, and this content.
pub fn judge(dir: &Path, image: &str, model: &[u8]) -> Result<(), String> {
    img(dir, &["check", "-f", "qcow2", image])?;
    let raw = format!("{image}.model");
    let path = dir.join(&raw);
    std::fs::write(&path, model).map_err(|error| error.to_string())?;
    img(dir, &["compare", "-f", "qcow2", "-F", "raw", image, &raw])?;
    std::fs::remove_file(path).map_err(|error| error.to_string())
}
