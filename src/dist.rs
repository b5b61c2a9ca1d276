//! `dist`: what a package has besides the program, made from the command line's definition.
//!
//! Hidden, since it is for `src/dist/build-deb` and for whoever packages the program otherwise.
//! The folder `src/dist/` has the rest: the unit, the udev rules, and what a Debian package needs.

use std::io::{self, Write};

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_mangen::Man;

use crate::cli::{Cli, DistArgs, DistWhat};

/// Runs `dist`.
pub fn run(args: &DistArgs) -> Result<()> {
    let mut text = Vec::new();
    match args.what {
        DistWhat::Completions { shell } => {
            clap_complete::generate(shell, &mut shown(), "ublk-qcow2", &mut text);
            // For bash the dash of the name becomes one thing where a command is recognized, and
            // another where its options are listed; both must be the same.
            text = String::from_utf8(text)?.replace("ublk__subcmd__qcow2", "ublk__qcow2").into();
        }
        DistWhat::Man => man(&mut text).context("making the manual page")?,
    }
    io::stdout().write_all(&text).context("writing to stdout")
}

/// The definition without the commands that are hidden, which completions would offer.
fn shown() -> Command {
    let whole = Cli::command();
    let mut shown = Command::new("ublk-qcow2").subcommand_required(true);
    shown = shown.version(env!("CARGO_PKG_VERSION"));
    shown = shown.about(whole.get_about().cloned().unwrap_or_default());
    shown = shown.after_help(whole.get_after_help().cloned().unwrap_or_default());
    for command in whole.get_subcommands().filter(|command| !command.is_hide_set()) {
        shown = shown.subcommand(command.clone());
    }
    shown
}

/// One page with every command, so that one search finds an option.
fn man(out: &mut Vec<u8>) -> io::Result<()> {
    let mut command = shown().disable_help_subcommand(true);
    command.build();
    let page = Man::new(command.clone())
        .title("UBLK-QCOW2")
        .section("8")
        .source(format!("ublk-qcow2 {}", env!("CARGO_PKG_VERSION")))
        .manual("System Administration");
    page.render_title(out)?;
    page.render_name_section(out)?;
    page.render_synopsis_section(out)?;
    page.render_description_section(out)?;
    for command in command.get_subcommands() {
        let page = Man::new(command.clone());
        writeln!(out, ".SH \"{}\"", command.get_name().to_uppercase())?;
        out.extend(body(|text| page.render_synopsis_section(text))?);
        out.extend(body(|text| page.render_description_section(text))?);
        out.extend(body(|text| page.render_options_section(text))?);
        if command.get_after_help().is_some() {
            out.extend(body(|text| page.render_extra_section(text))?);
        }
    }
    writeln!(out, ".SH EXAMPLES")?;
    out.extend(body(|text| page.render_extra_section(text))?);
    Ok(())
}

/// A section as paragraphs, without its heading.
fn body(render: impl Fn(&mut dyn Write) -> io::Result<()>) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    render(&mut text)?;
    let mut body = b".PP\n".to_vec();
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        if !line.starts_with(b".SH ") {
            body.extend(line);
        }
    }
    Ok(body)
}
