//! What `qemu-img check` says, and how it compares with what we say.

use std::path::Path;

use qcow2::check::{CheckError, FindingKind, Report};

use crate::images::run;

/// What `qemu-img check` printed.
#[derive(Debug, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) corruptions: u64,
    pub(crate) leaks: u64,
    pub(crate) allocated: u64,
    pub(crate) image_end: u64,
    pub(crate) check_errors: u64,
    pub(crate) fragmented: u64,
    pub(crate) compressed: u64,
    pub(crate) total: u64,
}

pub(crate) fn field(json: &str, name: &str) -> Option<u64> {
    let after = json.split(&format!("\"{name}\": ")).nth(1)?;
    after.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// The verdict, unless it gave up.
pub(crate) fn qemu_check(dir: &Path, file: &str) -> (Option<Verdict>, String) {
    const SECRET: &str = "secret,id=s,data=open";
    let luks = format!("driver=qcow2,file.filename={file},encrypt.key-secret=s");
    let args: &[&str] = if file.starts_with("luks") {
        &["check", "--output=json", "--object", SECRET, "--image-opts", &luks]
    } else {
        &["check", "--output=json", "-f", "qcow2", file]
    };
    let (_, mut text) = run(dir, "qemu-img", args);
    if text.contains("Could not open backing file") {
        // Which does not matter to a check.
        let name = format!(r#"{{"driver":"file","filename":"{file}"}}"#);
        let alone = format!(r#"json:{{"driver":"qcow2","backing":null,"file":{name}}}"#);
        (_, text) = run(dir, "qemu-img", &["check", "--output=json", &alone]);
    }
    let verdict = field(&text, "check-errors").map(|check_errors| Verdict {
        corruptions: field(&text, "corruptions").unwrap_or(0),
        leaks: field(&text, "leaks").unwrap_or(0),
        allocated: field(&text, "allocated-clusters").unwrap_or(0),
        image_end: field(&text, "image-end-offset").unwrap_or(0),
        check_errors,
        fragmented: field(&text, "fragmented-clusters").unwrap_or(0),
        compressed: field(&text, "compressed-clusters").unwrap_or(0),
        total: field(&text, "total-clusters").unwrap_or(0),
    });
    (verdict, text)
}

impl From<&Report> for Verdict {
    fn from(report: &Report) -> Self {
        Self {
            corruptions: report.corruptions,
            leaks: report.leaks,
            allocated: report.allocated,
            image_end: report.image_end,
            check_errors: 0,
            fragmented: report.fragmented,
            compressed: report.compressed,
            total: report.guest_clusters,
        }
    }
}

/// Where `qemu-img check` ends without a verdict (class 4): what it says, and one of what we have
/// found then.
const GIVES_UP: &[(&str, &[FindingKind])] = {
    use FindingKind::{BeginsBeyondEnd, BeyondEnd, BitmapDirectory, SnapshotTable};
    &[
        ("Too much extra metadata in snapshot table", &[SnapshotTable]),
        ("Could not read L1 table", &[BeyondEnd, BeginsBeyondEnd]),
        ("doesn't satisfy the constraints", &[BeyondEnd, BeginsBeyondEnd, BitmapDirectory]),
        ("Broken bitmap directory", &[BitmapDirectory]),
    ]
};

/// Does it give up for a reason that we have found, too?
fn gives_up(report: &Report, text: &str) -> bool {
    let found = |kinds: &[FindingKind]| report.findings.iter().any(|f| kinds.contains(&f.kind));
    GIVES_UP.iter().any(|(says, kinds)| text.contains(says) && found(kinds))
}

/// Of refcounts that it cannot read (class 5) it counts none, and does not look at what depends on
/// them: nothing else may be missing in its sum, and no error of another kind.
fn lacks_refcounts(report: &Report, theirs: &Verdict, text: &str) -> bool {
    let unread = text.matches("Can't get refcount for cluster").count() as u64;
    theirs.corruptions > 0
        && theirs.check_errors == unread
        && report.corruptions >= theirs.corruptions
        && report.leaks >= theirs.leaks
}

/// How a report compares with a verdict; the name of the class of the difference, if allowed.
pub(crate) fn compare(
    mine: &Result<Report, CheckError>,
    theirs: Option<&Verdict>,
    text: &str,
) -> Result<&'static str, ()> {
    if theirs.is_none() && text.contains("' is required for ") {
        return Ok("class 6: wants a data file, or a key");
    }
    if *mine == Err(CheckError::Header("the header is cut short")) {
        return if theirs.is_none_or(|theirs| theirs.corruptions > 0) {
            Ok("class 7: the header is cut short")
        } else {
            Err(())
        };
    }
    let report = match mine {
        Err(_) if theirs.is_none() => return Ok("neither can open it"),
        Err(_) => return Err(()),
        Ok(report) => report,
    };
    let Some(theirs) = theirs else {
        return if gives_up(report, text) { Ok("class 4: gives up") } else { Err(()) };
    };
    if (report.corruptions, report.leaks) == (theirs.corruptions, theirs.leaks) {
        return Ok(if report.corruptions + report.leaks == 0 {
            "equal, clean"
        } else {
            "equal, broken"
        });
    }
    if theirs.check_errors > 0 && lacks_refcounts(report, theirs, text) {
        return Ok("class 5: cannot get refcounts");
    }
    let classes = [
        (FindingKind::Overlap, "class 1: hidden overlap"),
        (FindingKind::CopiedWithoutOffset, "class 2: no offset"),
        (FindingKind::ZeroFlag, "class 2: zero flag"),
        (FindingKind::BeginsBeyondEnd, "class 3: begins behind the end"),
    ];
    // Ours must be more by exactly what is of these classes.
    if (report.corruptions - report.extra, report.leaks) != (theirs.corruptions, theirs.leaks) {
        return Err(());
    }
    let named = |class: &&(FindingKind, _)| report.findings.iter().any(|f| f.kind == class.0);
    Ok(classes.iter().find(named).map_or("class 1 to 3, among others", |class| class.1))
}
