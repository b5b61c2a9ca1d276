//! What a package is made of: the unit, completions, the manual page, and the list of its files.
//! (The unit and the udev rules at work: `tests/guest/service.sh` and `udev.sh`.)

#![expect(clippy::unwrap_used, reason = "a test's helpers are tests")]

mod support;

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ublk-qcow2");
const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// What a command that has to succeed prints.
fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(ROOT).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// The first words of the lines of a help's section.
fn words(help: &str, heading: &str) -> Vec<String> {
    let lines = help.lines().skip_while(|line| *line != heading).skip(1);
    let lines = lines.take_while(|line| !line.is_empty());
    lines.map(|line| line.split_whitespace().next().unwrap().to_string()).collect()
}

/// The commands that the help shows.
fn commands() -> Vec<String> {
    let mut commands = words(&output(PROGRAM, &["-h"]), "Commands:");
    assert_eq!(commands.pop().as_deref(), Some("help"));
    assert!(commands.len() > 4, "{commands:?}");
    assert!(!commands.contains(&"dist".to_string()), "`dist` is hidden");
    commands
}

/// The long options that a command's help shows.
fn options(command: &str) -> Vec<String> {
    let help = output(PROGRAM, &[command, "-h"]);
    let options = help.split_whitespace().filter(|word| word.starts_with("--"));
    // A word may have more behind it, as in --output=json or --all).
    let name = |option: &str| {
        let end = |char: char| !char.is_ascii_lowercase() && char != '-';
        option.split(end).next().unwrap().to_string()
    };
    let options: Vec<String> = options.map(name).filter(|name| name.len() > 2).collect();
    assert!(options.contains(&"--help".to_string()), "{options:?}");
    options
}

#[test]
fn the_manual_page_has_every_command_and_option() {
    let page = output(PROGRAM, &["dist", "man"]);
    assert!(page.contains(".TH UBLK-QCOW2 8"), "{page}");
    // The dash of an option is written as \-.
    let page = page.replace("\\-", "-");
    for command in commands() {
        let heading = format!(".SH \"{}\"\n", command.to_uppercase());
        let (_, section) = page.split_once(&heading).expect("a section for the command");
        let section = section.split("\n.SH ").next().unwrap();
        for option in options(&command) {
            assert!(section.contains(&option), "{command} {option}");
        }
    }
    assert!(page.contains(".SH EXAMPLES") && !page.contains("--stress"), "{page}");
}

#[test]
fn completions_have_every_command_and_option() {
    for shell in ["bash", "zsh", "fish"] {
        let script = output(PROGRAM, &["dist", "completions", shell]);
        for command in commands() {
            assert!(script.contains(&command), "{shell}: {command}");
            for option in options(&command) {
                // Fish has options without their dashes.
                let option = if shell == "fish" { &option[2..] } else { &option };
                assert!(script.contains(option), "{shell}: {command} {option}");
            }
        }
        assert!(!script.contains("completions"), "{shell}: offers what is hidden");
    }
}

#[test]
fn the_completion_for_bash_completes() {
    let script = output(PROGRAM, &["dist", "completions", "bash"]);
    let call = "COMP_WORDS=(ublk-qcow2 add --trust) COMP_CWORD=2\n\
                _ublk__qcow2 ublk-qcow2 --trust add\n\
                printf '%s\\n' \"${COMPREPLY[@]}\"\n";
    assert_eq!(output("bash", &["-c", &(script + call)]), "--trust-content\n");
}

/// The `[package.metadata.deb]` of the server.
fn deb() -> Value {
    let arguments = ["metadata", "--no-deps", "--offline", "--locked", "--format-version", "1"];
    let all: Value = serde_json::from_str(&output(env!("CARGO"), &arguments)).unwrap();
    let packages = all["packages"].as_array().unwrap();
    let ours = packages.iter().find(|package| package["name"] == "ublk-qcow2").unwrap();
    ours["metadata"]["deb"].clone()
}

#[test]
fn every_file_of_the_debian_package_is_there_or_made() {
    let script = fs::read_to_string(Path::new(ROOT).join("src/dist/build-deb")).unwrap();
    let deb = deb();
    let mut sources = Vec::new();
    for asset in deb["assets"].as_array().unwrap() {
        let source = asset[0].as_str().unwrap();
        if let Some(name) = source.strip_prefix("target/release/dist/") {
            assert!(script.contains(&format!(">\"$made/{name}\"")), "build-deb makes no {name}");
        } else if source != "target/release/ublk-qcow2" {
            assert!(Path::new(ROOT).join(source).is_file(), "there is no {source}");
        }
        sources.push(source.to_string());
    }
    // And the other way round: a file that is forgotten is not in the package.
    let folder = deb["maintainer-scripts"].as_str().unwrap();
    assert!(Path::new(ROOT).join(deb["license-file"].as_str().unwrap()).is_file());
    for entry in fs::read_dir(Path::new(ROOT).join("src/dist")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let by_itself = ["build-deb", "copyright", "postinst", "postrm"].contains(&name.as_str());
        let path = format!("{folder}{name}");
        assert!(by_itself || sources.contains(&path), "{path} is not in the package");
    }
}

#[test]
fn systemd_finds_nothing_wrong_with_the_unit() {
    let folder = TempDir::new().unwrap();
    let name = "ublk-qcow2@.service";
    let unit = fs::read_to_string(Path::new(ROOT).join("src/dist").join(name)).unwrap();
    // Where the program is before it is installed.
    let unit = unit.replace("/usr/bin/ublk-qcow2", PROGRAM);
    let path = folder.path().join(name);
    let verify = |unit: &str| {
        fs::write(&path, unit).unwrap();
        let mut command = Command::new("systemd-analyze");
        command.args(["verify", "--man=no", "--recursive-errors=no"]).arg(&path);
        command.stdin(Stdio::null()).output()
    };
    let output = match verify(&unit) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return support::skip("there is no systemd-analyze to look at the unit");
        }
        output => output.unwrap(),
    };
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && error.is_empty(), "{error}");
    // It does look.
    let output = verify(&unit.replace("Restart=no", "Restart=perhaps")).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("perhaps"), "a wrong value is not seen: {error}");
}
