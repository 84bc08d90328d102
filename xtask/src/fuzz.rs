//! `cargo xtask fuzz`: runs one fuzz target, or all in turn, for a limited time.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context, Result, bail};

use memtrace_harness::checkout::Checkout;
use memtrace_harness::run::{run as run_command, say, succeeds};
use memtrace_harness::setup;

/// Version of cargo-fuzz that is installed.
const CARGO_FUZZ_VERSION: &str = "0.13.2";

/// Arguments of `cargo xtask fuzz`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The target; all of them, in turn, when not given
    target: Option<String>,
    /// How long each target runs
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Runs the verb.
pub(crate) fn run(checkout: &Checkout, args: &Args) -> Result<()> {
    let known = targets(checkout)?;
    let chosen = match &args.target {
        Some(target) if known.contains(target) => vec![target.clone()],
        Some(target) => bail!("no fuzz target `{target}`; there are: {}", known.join(", ")),
        None => known,
    };
    if !succeeds(Command::new("rustup").args(["run", "nightly", "rustc", "--version"])) {
        bail!("fuzzing needs the sanitizers of a nightly compiler: rustup toolchain install nightly");
    }
    setup::cargo_tool(checkout, "cargo-fuzz", CARGO_FUZZ_VERSION)?;
    let mut path = OsString::from(checkout.tools().join("bin"));
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    let fuzz = |verb: &str, target: &str| {
        let mut fuzz = Command::new("rustup");
        fuzz.current_dir(&checkout.root).env("PATH", &path).env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
        fuzz.args(["run", "nightly", "cargo", "fuzz", verb, target]);
        fuzz
    };
    for target in chosen {
        say(format_args!("fuzzing {target} for {} s", args.seconds));
        run_command(&mut fuzz("build", &target)).with_context(|| format!("failed to build {target}"))?;
        let corpus = checkout.root.join("fuzz/corpus").join(&target);
        std::fs::create_dir_all(&corpus).with_context(|| format!("failed to create {}", corpus.display()))?;
        let seeds = checkout.root.join("fuzz/seeds").join(&target);
        let mut run = fuzz("run", &target);
        // the fuzzer writes new inputs into the first directory and only reads the seeds
        run.arg(corpus).args(seeds.is_dir().then_some(seeds));
        run.arg("--").arg(format!("-max_total_time={}", args.seconds));
        run_command(&mut run).with_context(|| format!("{target} found something: see fuzz/artifacts/{target}"))?;
    }
    Ok(())
}

fn targets(checkout: &Checkout) -> Result<Vec<String>> {
    let dir = checkout.root.join("fuzz/fuzz_targets");
    let entries =
        std::fs::read_dir(&dir).with_context(|| format!("no fuzz targets: failed to read {}", dir.display()))?;
    let mut targets = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("failed to read {}", dir.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(stem) = path.file_stem()
        {
            targets.push(stem.to_string_lossy().into_owned());
        }
    }
    targets.sort();
    Ok(targets)
}
