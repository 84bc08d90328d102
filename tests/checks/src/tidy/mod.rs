//! `cargo xtask tidy`: the house rules that a program can check.

mod code;
mod manifest;
mod rooms;
mod rules;

use std::path::Path;

use anyhow::{Context, Result, bail};

use memtrace_harness::checkout::Checkout;
use memtrace_harness::run::say;

/// Directories that are not checked: build output, version control, vendored code, findings of the
/// fuzzer.
const FOREIGN: [&str; 5] = ["target", ".git", "vendor", "artifacts", "corpus"];

/// Arguments of `cargo xtask tidy`.
#[derive(clap::Args)]
pub struct Args {}

/// A text file of the repository.
pub(crate) struct File {
    /// Relative to the repository, with forward slashes.
    pub(crate) path: String,
    /// Full text.
    pub(crate) text: String,
}

/// A breach of a rule.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// Path of the file, relative to the repository.
    pub(crate) path: String,
    /// Line number, from 1.
    pub(crate) line: usize,
    /// What is wrong and what to do about it.
    pub(crate) message: String,
}

/// Runs the verb.
pub fn run(checkout: &Checkout, _args: &Args) -> Result<()> {
    check(checkout)
}

/// Checks every file and prints every breach. Fails if there is one.
pub fn check(checkout: &Checkout) -> Result<()> {
    let mut files = Vec::new();
    collect(&checkout.root, &checkout.root, &mut files)?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let findings: Vec<Finding> =
        files.iter().flat_map(|file| rules::check(file).chain(manifest::check(file))).collect();
    for finding in &findings {
        say(format_args!("tidy: {}:{}: {}", finding.path, finding.line, finding.message));
    }
    if !findings.is_empty() {
        bail!("{} breaches of the house rules", findings.len());
    }
    say(format_args!("tidy: {} files in order", files.len()));
    Ok(())
}

/// Collects all text files, except below the directories that are not checked.
fn collect(root: &Path, dir: &Path, files: &mut Vec<File>) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("failed to read {}", dir.display()))? {
        let entry = entry.with_context(|| format!("failed to read {}", dir.display()))?;
        let path = entry.path();
        let name = entry.file_name();
        let kind = entry.file_type().with_context(|| format!("failed to look at {}", path.display()))?;
        if FOREIGN.iter().any(|other| name == *other) {
            continue;
        }
        if kind.is_dir() {
            collect(root, &path, files)?;
        } else if kind.is_file() {
            let bytes = std::fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
            let relative = path.strip_prefix(root).unwrap_or(&path);
            if let Ok(text) = String::from_utf8(bytes) {
                files.push(File { path: relative.to_string_lossy().into_owned(), text });
            }
        }
    }
    Ok(())
}
