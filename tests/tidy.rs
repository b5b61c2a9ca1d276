//! The house rules that the compiler does not know: short files, short functions, short lines, a
//! module doc at the head of each file, and `unsafe` only where it is announced.

use std::fs;
use std::path::{Path, PathBuf};

/// The only files with unsafe code.
const UNSAFE: [&str; 4] = ["src/buffer.rs", "src/journal.rs", "src/ring.rs", "src/sys.rs"];
const MAX_FILE: usize = 600;
const MAX_FUNCTION: usize = 70;
const MAX_COLUMNS: usize = 100;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file of the project, by its path from the root, with its text.
fn files(folders: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut open: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).collect();
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).expect("it is below the root");
                let text = fs::read_to_string(&path).expect("source files are text");
                found.push((name.display().to_string(), text));
            }
        }
    }
    assert!(!found.is_empty(), "there is something to look at");
    found.sort();
    found
}

/// The text without the unit tests at its end.
fn code(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text)
}

fn none(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

#[test]
fn every_file_begins_with_its_module_doc() {
    let missing = files(&["src", "qcow2/src", "tests"]);
    let missing = missing.into_iter().filter(|(_, text)| !text.starts_with("//! "));
    none("no module doc", missing.map(|(name, _)| name).collect());
}

#[test]
fn files_and_lines_are_short() {
    let mut found = Vec::new();
    for (name, text) in files(&["src", "qcow2/src", "tests"]) {
        let lines = code(&text).lines().count();
        if lines > MAX_FILE {
            found.push(format!("{name}: {lines} lines, at most {MAX_FILE}"));
        }
        for (index, line) in text.lines().enumerate() {
            if line.chars().count() > MAX_COLUMNS {
                found.push(format!("{name}:{}: longer than {MAX_COLUMNS} columns", index + 1));
            }
        }
    }
    none("too long", found);
}

#[test]
fn functions_are_short() {
    let mut found = Vec::new();
    for (name, text) in files(&["src", "qcow2/src"]) {
        let mut begin: Option<(usize, usize)> = None;
        for (index, line) in code(&text).lines().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let is_function =
                line.contains("fn ") && !line.trim_start().starts_with("//") && indent <= 8;
            if begin.is_none() && is_function && !line.trim_end().ends_with(';') {
                begin = Some((index, indent));
            }
            // rustfmt ends a function at the indentation that it began with.
            if let Some((start, at)) = begin
                && indent == at
                && line.trim_end().ends_with('}')
            {
                begin = None;
                if index - start + 1 > MAX_FUNCTION {
                    found.push(format!("{name}:{}: {} lines", start + 1, index - start + 1));
                }
            }
        }
    }
    none("functions too long", found);
}

#[test]
fn unsafe_code_is_only_where_it_is_announced() {
    let has = |text: &str| {
        let mut lines = text.lines().map(str::trim_start);
        lines.any(|line| {
            !line.starts_with("//")
                && (line.contains("unsafe {")
                    || line.contains("unsafe impl")
                    || line.contains("unsafe fn"))
        })
    };
    let here = files(&["src", "qcow2/src"]).into_iter().filter(|(_, text)| has(text));
    let here: Vec<String> = here.map(|(name, _)| name).collect();
    assert_eq!(here, UNSAFE);
}

#[test]
fn nothing_is_left_to_be_fixed() {
    // Spelled so that this file does not find itself.
    let words = ["FIX", "TO", "XX"].map(|word| match word {
        "FIX" => ["FIX", "ME"].concat(),
        "TO" => ["TO", "DO"].concat(),
        word => word.repeat(2),
    });
    let mut found = Vec::new();
    for (name, text) in files(&["src", "qcow2/src"]) {
        for (index, line) in text.lines().enumerate() {
            if words.iter().any(|word| line.contains(word.as_str())) {
                found.push(format!("{name}:{}: {line}", index + 1));
            }
        }
    }
    none("left to be fixed", found);
}
