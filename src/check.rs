//! `check`: counts what an image references, compares, and repairs.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use qcow2::check::repair::{Repair, RepairError, Repaired, Stage, repair};
use qcow2::check::{CheckError, Report, check_with};
use serde_json::{Map, Value, json};

use crate::backing::quoted;
use crate::cli::{CheckArgs, Output, RepairKind};
use crate::image_file::ImageFile;
use crate::list;

/// Exit status: corruptions.
const CORRUPTIONS: u8 = 2;
/// Exit status: leaks, and nothing worse.
const LEAKS: u8 = 3;
/// Exit status: not that kind of image.
pub const NOT_SUPPORTED: u8 = 63;

/// How many findings are printed.
const SHOWN: usize = 20;

/// An image of a kind that cannot be checked, or repaired.
#[derive(Debug)]
pub struct NotSupported(String);

impl std::fmt::Display for NotSupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NotSupported {}

/// What came of it.
struct Outcome {
    report: Report,
    repaired: Option<Repaired>,
}

/// Runs `check`; returns the exit status.
pub fn run(args: &CheckArgs) -> Result<u8> {
    let mut image = ImageFile::open(&args.file, args.repair.is_some())?;
    if let Some(note) = image.lock(args.repair.is_none(), args.lock)? {
        let name = args.file.to_string_lossy();
        eprintln!("ublk-qcow2: {}", list::plain(&format!("{name}: {note}")));
    }
    let bar = Bar::new();
    if args.repair.is_some() {
        image.refuse_waiting()?;
    }
    let outcome = match args.repair {
        None => check_with(&image, &mut |done, total| bar.show("checking", done, total))
            .map(|report| Outcome { report, repaired: None })
            .map_err(RepairError::Check),
        Some(kind) => {
            let what = match kind {
                RepairKind::Leaks => Repair::Leaks,
                RepairKind::All => Repair::All,
            };
            let mut progress = |stage, done, total| bar.show(words(stage), done, total);
            let repaired = repair(&mut image, what, &mut progress);
            repaired.map(|repaired| Outcome {
                report: repaired.after.clone(),
                repaired: Some(repaired),
            })
        }
    };
    bar.0.finish_and_clear();
    let outcome = outcome.map_err(|error| image.explain(named(error, &image)))?;
    let text = match args.output {
        Output::Json => serde_json::to_string_pretty(&outcome.json(args))? + "\n",
        Output::Human => outcome.text(args)?,
    };
    io::stdout().write_all(text.as_bytes()).context("writing to stdout")?;
    Ok(outcome.status())
}

/// The error with its exit status, and with the image's own name for a feature.
fn named(error: RepairError, image: &ImageFile) -> anyhow::Error {
    let text = error.to_string();
    match error {
        RepairError::Check(CheckError::UnknownFeature(bit)) => {
            let info = qcow2::info::info(image);
            let features = info.map(|info| info.incompatible).unwrap_or_default();
            let name = features.into_iter().find(|feature| feature.bit == bit);
            let name = name.map(|feature| String::from_utf8_lossy(&feature.name).into_owned());
            let name = name.filter(|name| !name.is_empty());
            let name = name.map(|name| format!(", which it calls {name:?}")).unwrap_or_default();
            NotSupported(format!("{text}{name}; use a program that knows it")).into()
        }
        RepairError::Check(CheckError::Version(_) | CheckError::Unsupported(_)) => {
            NotSupported(text).into()
        }
        RepairError::Refused(_) => {
            NotSupported(format!("{text}; repair it with 'qemu-img check -r'")).into()
        }
        error => error.into(),
    }
}

fn words(stage: Stage) -> &'static str {
    match stage {
        Stage::Checking => "checking",
        Stage::Refcounts => "writing refcounts",
        Stage::Flags => "writing flags",
        Stage::CheckingAgain => "checking again",
    }
}

/// A progress bar on stderr, if that is a terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{msg:18} [{bar:40}] {percent:>3} %  {eta}")
        {
            bar.set_style(style);
        }
        Self(bar)
    }

    fn show(&self, what: &'static str, done: u64, total: u64) {
        if self.0.message() != what {
            self.0.set_message(what);
        }
        self.0.set_length(total);
        self.0.set_position(done);
    }
}

impl Outcome {
    fn status(&self) -> u8 {
        match (self.report.corruptions, self.report.leaks) {
            (0, 0) => 0,
            (0, _) => LEAKS,
            _ => CORRUPTIONS,
        }
    }

    /// The fields of `qemu-img check --output=json`, and the findings.
    fn json(&self, args: &CheckArgs) -> Value {
        let Report { corruptions, leaks, allocated, fragmented, compressed, .. } = self.report;
        let mut fields = Map::new();
        let mut put = |name: &str, value: Value| fields.insert(name.to_string(), value);
        put("filename", json!(args.file.to_string_lossy()));
        put("format", json!("qcow2"));
        put("check-errors", json!(0));
        let fixed = |count: fn(&Repaired) -> u64| self.repaired.as_ref().map_or(0, count);
        for (name, count) in [
            ("image-end-offset", self.report.image_end),
            ("total-clusters", self.report.guest_clusters),
            ("corruptions", corruptions),
            ("leaks", leaks),
            ("corruptions-fixed", fixed(Repaired::corruptions_fixed)),
            ("leaks-fixed", fixed(Repaired::leaks_fixed)),
            ("allocated-clusters", allocated),
            ("fragmented-clusters", fragmented),
            ("compressed-clusters", compressed),
        ] {
            if count != 0 {
                put(name, json!(count));
            }
        }
        if let Some(left) = self.repaired.as_ref().and_then(|repaired| repaired.left) {
            put("left", json!(left.to_string()));
        }
        if !self.report.findings.is_empty() {
            let findings = self.report.findings.iter().map(|finding| {
                json!({
                    "kind": format!("{:?}", finding.kind),
                    "what": finding.kind.words(),
                    "at": finding.at,
                    "found": finding.found,
                    "expected": finding.expected,
                    "times": finding.times,
                })
            });
            put("findings", findings.collect());
        }
        Value::Object(fields)
    }

    fn text(&self, args: &CheckArgs) -> Result<String> {
        let mut text = String::new();
        if let Some(repaired) = &self.repaired {
            let (corruptions, leaks) = (repaired.corruptions_fixed(), repaired.leaks_fixed());
            let rebuilt = if repaired.rebuilt { ", with new refcount tables" } else { "" };
            let marks = &repaired.before;
            let cleared = match (
                marks.dirty && !repaired.after.dirty,
                marks.corrupt && !repaired.after.corrupt,
            ) {
                (false, false) => "",
                (true, false) => "; the mark 'dirty' is cleared",
                (false, true) => "; the mark 'corrupt' is cleared",
                (true, true) => "; the marks 'dirty' and 'corrupt' are cleared",
            };
            if corruptions + leaks != 0 || repaired.rebuilt || !cleared.is_empty() {
                let (corruptions, leaks) =
                    (counted(corruptions, "corruption"), counted(leaks, "leak"));
                writeln!(text, "repaired: {corruptions} and {leaks}{rebuilt}{cleared}")?;
            }
            if let Some(left) = repaired.left {
                writeln!(text, "left: {left}")?;
            }
        }
        let findings = &self.report.findings;
        for finding in findings.iter().take(SHOWN) {
            writeln!(text, "{finding}")?;
        }
        if findings.len() > SHOWN {
            writeln!(text, "… and more (--output json shows {})", findings.len())?;
        }
        let name = list::plain(&args.file.to_string_lossy());
        writeln!(text, "{name}: {}", self.verdict())?;
        if let Some(next) = self.next(args) {
            writeln!(text, "{next}")?;
        }
        Ok(text)
    }

    /// The verdict, in one line.
    fn verdict(&self) -> String {
        let Report { corruptions, leaks, dirty, corrupt, .. } = self.report;
        let mut verdict = match (corruptions, leaks) {
            (0, 0) => "no errors".to_string(),
            (0, _) => format!("{}, harmless but for the space", counted(leaks, "leaked cluster")),
            (_, 0) => counted(corruptions, "corruption"),
            _ => {
                let leaks = counted(leaks, "leaked cluster");
                format!("{} and {leaks}", counted(corruptions, "corruption"))
            }
        };
        verdict += match (dirty, corrupt) {
            (false, false) => "",
            (true, false) => "; marked dirty",
            (false, true) => "; marked corrupt",
            (true, true) => "; marked dirty and corrupt",
        };
        let Report { allocated, fragmented, compressed, guest_clusters, .. } = self.report;
        let _ = write!(verdict, "; {allocated} of {guest_clusters} clusters allocated");
        for (count, word) in [(fragmented, "fragmented"), (compressed, "compressed")] {
            if count != 0 {
                let _ = write!(verdict, ", {count} {word}");
            }
        }
        verdict
    }

    /// What to do next, if anything.
    fn next(&self, args: &CheckArgs) -> Option<String> {
        let Report { corruptions, leaks, dirty, corrupt, .. } = self.report;
        let what = match (corruptions, leaks) {
            (0, 0) if !dirty && !corrupt => return None,
            (0, leaks) if leaks != 0 && !dirty && !corrupt => "leaks",
            _ => "all",
        };
        let tried =
            args.repair == Some(RepairKind::All) || what == "leaks" && args.repair.is_some();
        Some(if tried {
            "what is left cannot be repaired without losing data; copy what can be read with \
             'qemu-img convert', or restore a backup"
                .to_string()
        } else {
            let name = quoted(args.file.as_os_str());
            format!("repair with 'ublk-qcow2 check -f {name} --repair {what}'")
        })
    }
}

/// A number with its noun.
pub fn counted(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}
